"""The command line, and above all what it says to those who mistype."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanolib import launch
from nanolib.data import toyworld
from nanolib.rundir import Run
from nanolib.stages import worker
from nanolib.ui import cli


@pytest.fixture(autouse=True)
def _restore_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def nanolib(capfd):
    """Runs a command here; returns (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = cli.main(words)
        except SystemExit as exit:  # tyro's own
            code = int(exit.code or 0)
        return (code, *capfd.readouterr())

    return call


# ---------------------------------------------------------------------------- words


def test_settings_lists_every_path_with_its_value(nanolib):
    code, out, _ = nanolib("settings", "smoke", "--base.steps", "7")
    assert "model.depth                  26" in nanolib("settings", "speedrun", "--depth", "26")[1]
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0 and lines["base.steps"] == "7" and lines["machine.device"] == "cpu"
    assert lines["model.kv_heads"] == "none" and lines["eval.tasks"].startswith("mmlu,")


def test_help_is_quick():
    """No torch, no papermill, no plotting to say what the commands are."""
    script = (
        "import sys\nfrom nanolib.ui import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'papermill', 'matplotlib', 'jupytext', 'pyarrow', 'numpy'}\n"
        "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in ("run", "stage", "chat", "export", "settings"))


def test_a_stage_starts_without_pandas():
    """pyarrow.dataset imports it: a second for each of the dozen processes of a run."""
    script = "import sys\nimport nanolib.stages.worker\nsys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_command_and_the_module_are_the_same():
    script = Path(sys.executable).with_name("nanolib")
    for command in ([script], [sys.executable, "-m", "nanolib"]):
        result = subprocess.run([*command, "settings", "nix"], capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.startswith("error: there is no profile 'nix'")


def test_bench_is_listed_lists_its_scripts_and_hands_their_words_on(nanolib):
    assert "bench" in nanolib("--help")[1]
    code, out, _ = nanolib("bench")
    names = [line.split()[0] for line in out.splitlines()]
    assert code == 0 and names == [
        "ablations",
        "climb",
        "demo",
        "device",
        "faults",
        "guest",
        "ranks",
        "referee",
        "serve",
        "text",
        "tokenizer",
    ]
    code, out, _ = nanolib("bench", "ranks", "--help")
    assert code == 0 and "--steps" in out
    code, _, errors = nanolib("bench", "ranks", "--model.dept", "3")
    assert code == 2 and "model.dept" in errors


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "words, message",
    [
        ("run dmeo", r"no profile 'dmeo'; there are .*demo"),
        ("run smoke --base.step 3", r"no setting 'base.step'; did you mean base.steps"),
        ("run smoke --base.steps many", r"base.steps must be a whole number or none, got 'many'"),
        ("run smoke --base.steps", r"--base.steps needs a value"),
        ("run smoke --base.steps --nproc 2", r"--base.steps needs a value"),
        ("run smoke --model.depth 0", r"model.depth must be at least 1, got 0"),
        ("run smoke --depth 0", r"model.depth must be at least 1, got 0"),
        ("run smoke --nproc 3", r"8 rows, which 3 ranks cannot .* choose machine.ranks or"),
        ("run smoke --run a,b", r"a run is a name \(letters.*got 'a,b'"),
        ("run smoke --on H100", r"--on names the machine of a --dry-run"),
        ("run nix --dry-run", r"no profile 'nix'"),
        ("run speedrun --dry-run --on 8xToaster", r"such as 8xH100, got '8xToaster'"),
        ("run d32 --dry-run --on 8xRTX4090", r"too small.*lower model.sequence_len or model.depth"),
        (
            "run h100 --dry-run --on H100 --machine.device-batch 256 --base.batch-tokens 1048576",
            r"device_batch = 256 rows should not fit .*lower it to 32",
        ),
        ("run smoke --dry-run --on 5xH100", r"8 rows, which 5 ranks cannot"),
        ("run smoke --dry-run --nproc 2 --on H100", r"machine.ranks = 2 needs as many devices"),
        ("run laptop --dry-run --mirror nowhere", r"nowhere/text: 0 parquet files.*give --mirror"),
        ("plan --profile nix", r"no profile 'nix'"),
        ("plan --depth 0", r"model.depth must be at least 1"),
        ("plan --depth 40 --on RTX4090", r"too small.*model.depth"),
        ("plan --on 3xH100", r"256 rows, which 3 ranks cannot"),
        ("stage base", r"no run yet .* nanolib run demo"),
        ("stage base --run nix", r"no run 'nix'"),
        ("stage pretrain --profile smoke", r"no stage 'pretrain'; there are data, .*report"),
        ("stage sft --of base --profile smoke", r"only eval takes `of`"),
        ("stage eval --of data --profile smoke", r"no model 'data'; it has base, mid, sft"),
        ("chat", r"no run yet"),
        ("serve", r"no run yet"),
        ("report --run nix", r"no run 'nix'"),
        ("run smoke --dry-run --from demo", r"leave --detach and --from out"),
        ("run smoke --from nix", r"no run 'nix'"),
        ("stage sft --profile smoke --from nix", r"no run 'nix'"),
        ("notebooks", r"needs one of --refresh and --check"),
        (
            "bench dmeo",
            r"no measurement 'dmeo'; there are ablations, climb, demo, device, faults, guest, ranks, referee, serve, text, tokenizer",
        ),
    ],
)
def test_a_mistake_is_one_line_that_helps(nanolib, words, message):
    code, out, errors = nanolib(*words.split())
    assert code == 2 and not out
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert re.search(message, errors), errors


def test_a_dry_run_checks_the_chapters_too(nanolib, tmp_path, monkeypatch):
    (tmp_path / "01_x.py").write_text('# %% tags=["parameters"]\nprofile = None\nrun = None\n')
    monkeypatch.setattr("nanolib.pipeline.NOTEBOOKS", tmp_path)
    code, out, errors = nanolib("run", "smoke", "--dry-run")
    assert code == 2 and "needs one cell tagged 'parameters'" in errors and not out


def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(nanolib, tmp_path):
    words = ("run", "smoke", "--dry-run", "--nproc", "2")
    code, out, _ = nanolib(*words)
    assert code == 0 and not list(tmp_path.iterdir())
    assert re.search(r"run smoke: would be made at .*/smoke", out)
    assert re.search(r"base +4 of 4 rows a rank at once", out)
    assert re.search(r"stages +data, tokenizer, shards, base, eval of base, mid, .*, report\n", out)
    Run.open("smoke").stage("data").finish({})
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, out, _ = nanolib(*words)
    assert code == 0 and {p: p.lstat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert "run smoke: exists" in out
    assert re.search(r"stages +data \(finished\), tokenizer, shards,", out)
    code, _, errors = nanolib(*words, "--run", "smoke", "--seed", "9")
    assert code == 2 and "was made with seed = 1" in errors
    code, _, errors = nanolib("run", "laptop", "--dry-run", "--run", "smoke")
    assert code == 2 and "was made with profile = smoke" in errors


def test_a_dry_run_opens_the_mirror(nanolib, tmp_path):
    toyworld.write(tmp_path / "mirror", seed=1)
    words = ("run", "laptop", "--dry-run", "--mirror", str(tmp_path / "mirror"))
    small = ("--data.text-shards", "1", "--eval.core-problems", "0")
    code, out, errors = nanolib(*words, *small)
    assert code == 0, errors
    assert re.search(r"mirror: 1 training text files, all tasks complete", out)
    (tmp_path / "mirror/hub/openai/gsm8k/main/train.parquet").unlink()
    code, _, errors = nanolib(*words, *small)
    assert code == 2 and re.search(r"gsm8k/main/train.parquet is missing", errors)


def test_a_micro_batch_may_be_larger_than_the_one_that_would_be_found(nanolib):
    words = "run h100 --dry-run --on H100 --data.source toyworld --base.batch-tokens 1048576"
    for given, rows in (("", 32), ("--machine.device-batch 64", 64)):
        code, out, _ = nanolib(*words.split(), *given.split())
        assert code == 0 and re.search(rf"base +{rows} of 512 rows", out)


def test_plan_prints_the_dial_and_the_price(nanolib):
    code, out, _ = nanolib("plan", "--depth", "12", "--on", "2xH100", "--dollars-per-hour", "5")
    assert code == 0 and "depth 12, width 768" in out and "$5.00 an hour" in out
    assert "52.2% of the peak" in out
    one = "--machine.ranks=1", "--dollars-per-hour=5"
    assert "$5.00 an hour" in nanolib("run", "smoke", "--dry-run", "--on", "2xH100", *one)[1]


@pytest.mark.parametrize("more", ["", "--data.drop-contaminated true", "--data.conversations /x"])
def test_a_plan_counts_a_mirrors_conversations(nanolib, tmp_path, more):
    """Without what only the data stage makes; your own conversations are copied there."""
    toyworld.write(tmp_path / "mirror", seed=1)
    (tmp_path / "x.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}'
    )
    words = f"plan --profile h100 --on H100 --eval.core-problems 0 --mirror {tmp_path}/mirror"
    more = more.replace("/x", str(tmp_path / "x.jsonl"))
    code, out, errors = nanolib(*words.split(), *more.split())
    assert code == 0, errors
    counted = "conversations" not in more
    assert bool(re.search(r"(?m)^mid .* steps x 32,768 tokens .*\(projected\)", out)) == counted


@pytest.mark.parametrize("words", ["", "fly", "run", "run smoke extra", "stage", "chat --fast"])
def test_words_that_no_command_takes(nanolib, words):
    code, _, errors = nanolib(*words.split())
    assert code == 2 and errors and "Traceback" not in errors


@pytest.mark.parametrize(
    "command", ["run smoke --run mine", "stage data --run mine", "chat --run mine"]
)
def test_a_setting_that_differs_from_the_runs_recipe(nanolib, command):
    run = Run.open("smoke", "mine", {"base.steps": 9})
    code, _, errors = nanolib(*command.split(), "--base.steps", "10")
    assert code == 2 and "'mine' was made with base.steps = 9, not 10" in errors
    assert "--run NAME" in errors and [p.name for p in run.path.iterdir()] == ["manifest.json"]


def test_a_run_given_by_path_is_relative_to_the_shell(nanolib, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nanolib("stage", "pretrain", "--profile", "smoke", "--run", "./here")
    assert (tmp_path / "here" / "manifest.json").exists()


# ---------------------------------------------------------------------------- a real run


@pytest.fixture
def copy(finished_run) -> Run:
    """A copy of the finished smoke run, as the run opened last."""
    target = Path(os.environ["NANOLIB_RUNS"]) / "smoke"
    shutil.copytree(finished_run.path, target)
    return Run.open("smoke")


@pytest.fixture
def work_here(monkeypatch):
    """Stages run in this process: starting workers is tested elsewhere, and takes its time."""

    def work(run, stage, *_):
        worker.work(stage.name, run, stage.of)

    monkeypatch.setattr(launch, "_work", work)


def test_the_commands_that_read_a_run(nanolib, copy):
    (copy.path / "report.md").unlink()
    code, out, errors = nanolib("report")
    assert (code, out.strip()) == (0, str(copy.path / "report.md")), errors
    assert (copy.path / "report.md").read_text().startswith("# Report card")
    code, out, errors = nanolib("export", "--of", "base", "--out", str(copy.path / "hf"))
    assert code == 0 and (Path(out.strip()) / "config.json").exists(), errors
    code, out, errors = nanolib("stage", "eval", "--of", "base")
    assert code == 0 and "compression" in out, errors
    question = ("chat", "-p", "What is Ada's pet?", "--temperature", "0")
    code, out, errors = nanolib(*question)
    assert code == 0 and out.strip(), errors
    assert nanolib(*question, "--of", "sft")[:2] == (0, out)


def test_runs_are_listed_with_how_far_they_are(nanolib, copy):
    Run.open("smoke", "young", {"grpo.enabled": False}).stage("data").finish({})
    (Run.open("smoke", "spoilt").path / "manifest.json").write_text("{")
    code, out, errors = nanolib("runs")
    assert code == 0 and not errors
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert set(rows) == {"smoke", "young", "spoilt"}
    assert re.search(r"smoke +smoke +grpo \(7 of 7\) +- +[\d.]+ MB +\d{4}-", rows["smoke"])
    assert re.search(r"young +smoke +data \(1 of 6\) +tokenizer +0\.0 MB", rows["young"])
    assert "cannot be read" in rows["spoilt"]


def test_there_are_no_runs_to_list(nanolib):
    code, out, _ = nanolib("runs")
    assert code == 0 and "make one: nanolib run demo" in out


def test_another_grpo_setting_begins_with_what_the_first_run_learned(nanolib, copy, work_here):
    words = ("stage", "grpo", "--profile", "smoke", "--run", "second", "--grpo.steps", "2")
    code, out, errors = nanolib(*words, "--from", "smoke")
    assert code == 0, errors
    assert "taken over from run smoke: tokenizer, shards, base, eval of base, mid" in out
    assert "grpo is not taken over: grpo.steps is 6 there, 2 here" in out
    second = Run.load("second")
    assert second.stage("grpo").metrics.rows()[-1]["step"] == 2
    for name in ("base", "mid", "sft"):
        assert (second.stage(name).done() or {})["taken_over"] == "smoke"
        weights = list(second.stage(name).checkpoints.glob("*/*.safetensors"))
        assert weights and all(file.stat().st_nlink > 1 for file in weights)


def test_a_talk_in_a_terminal(copy):
    """A real pseudo-terminal: a question, its answer, /save, Ctrl-D."""
    master, slave = pty.openpty()
    script = Path(sys.executable).with_name("nanolib")
    talk = subprocess.Popen([script, "chat"], stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""

    def until(words: bytes) -> None:
        nonlocal seen
        while words not in seen:
            ready, _, _ = select.select([master], [], [], 60)
            assert ready, seen
            seen += os.read(master, 4096)
        seen = seen.split(words, 1)[1]

    until(b"you> ")
    os.write(master, b"What is your name?\n")
    until(b"model> ")
    until(b"you> ")
    os.write(master, b"/save\n")
    until(b"(saved to ")
    until(b"you> ")
    os.write(master, b"\x04")
    assert talk.wait(60) == 0
    os.close(master)
    saved = json.loads((copy.path / "chat-1.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]


# ---------------------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(nanolib, copy, how):
    older, newest = sorted(copy.stage("grpo").checkpoints.glob("step_*"))
    weights = newest / "rank_0.safetensors"
    truncate(weights)
    code, _, errors = nanolib("chat", "-p", "Hello")
    assert code == 0 and f"{weights} is damaged (its hash differs)" in errors
    truncate(older / "rank_0.safetensors")
    code, _, errors = nanolib("chat", "-p", "Hello")
    last = errors.splitlines()[-1]
    assert code == 2 and last.startswith("error: no usable checkpoint") and "delete" in last
    assert "Traceback" not in errors


def test_a_missing_checkpoint(nanolib, copy, work_here):
    shutil.rmtree(copy.stage("sft").checkpoints)
    code, _, errors = nanolib("chat", "--of", "sft", "-p", "Hello")
    assert code == 2 and "has no sft model to talk to yet" in errors and "nanolib run" in errors
    shutil.rmtree(copy.stage("mid").checkpoints)
    (copy.stage("sft").path / "done.json").unlink()
    code, _, errors = nanolib("stage", "sft")
    assert code == 2 and "no mid model yet" in errors and "nanolib stage mid" in errors


def test_a_damaged_checkpoint_in_a_worker_of_its_own(nanolib, copy):
    """The worker's message arrives as one line, and what was saved stays."""
    for weights in copy.stage("mid").checkpoints.glob("*/*.safetensors"):
        truncate(weights)
    (copy.stage("sft").path / "done.json").unlink()
    shutil.rmtree(copy.stage("sft").checkpoints)
    kept = {path: path.stat().st_mtime_ns for path in copy.stage("mid").path.rglob("*")}
    code, _, errors = nanolib("stage", "sft")
    assert code == 2 and errors.startswith("error: no usable checkpoint") and "Trace" not in errors
    assert "Traceback" in copy.stage("sft").log.read_text()
    assert kept == {path: path.stat().st_mtime_ns for path in copy.stage("mid").path.rglob("*")}


# ---------------------------------------------------------------------------- bad text


def test_a_spoilt_text_shard_is_named(nanolib, copy, tmp_path, work_here):
    shutil.copytree(copy.path / "data" / "mirror", tmp_path / "pack")
    shard = sorted((tmp_path / "pack" / "text").glob("*.parquet"))[0]
    truncate(shard)
    words = ("stage", "tokenizer", "--profile", "smoke", "--data.source", "hub")
    code, _, errors = nanolib(*words, "--mirror", str(tmp_path / "pack"))
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert f"{shard} is damaged" in errors


def test_a_mirror_that_is_none(nanolib, work_here):
    words = ("stage", "data", "--profile", "smoke", "--data.source", "hub")
    code, _, errors = nanolib(*words, "--mirror", "nowhere")
    assert code == 2 and "nowhere/text: 0 parquet files" in errors and "--mirror" in errors
    code, _, errors = nanolib("run", "smoke", "--mirror", "nowhere")
    assert code == 2 and "data.source = toyworld makes its own text" in errors


def test_the_mirror_is_remembered(nanolib, copy, tmp_path, work_here):
    shutil.copytree(copy.path / "data" / "mirror", tmp_path / "pack")
    words = ("stage", "data", "--profile", "smoke", "--data.source", "hub", "--run", "packed")
    code, _, errors = nanolib(*words, "--mirror", str(tmp_path / "pack"))
    assert code == 0, errors
    code, _, errors = nanolib("stage", "tokenizer", "--run", "packed")
    assert code == 0, errors


# ---------------------------------------------------------------------------- a full disk


def test_a_full_disk(nanolib, copy):
    """/dev/full answers every write with "no space left on device"."""
    shutil.rmtree(copy.path / "eval" / "base")
    place = copy.stage("eval", "base")
    place.path.mkdir(parents=True)
    place.metrics.path.symlink_to("/dev/full")
    before = {path: path.stat().st_mtime_ns for path in copy.path.glob("*/*")}
    code, _, errors = nanolib("stage", "eval", "--of", "base")  # the worker meets it
    assert code == 2 and errors.startswith(f"error: the disk is full: {place.metrics.path}")
    assert "run the same command to go on" in errors and "Traceback" not in errors
    place.metrics.path.unlink()
    place.log.unlink()
    place.log.symlink_to("/dev/full")
    code, _, errors = nanolib("stage", "eval", "--of", "base")  # the launcher meets it
    assert code == 2 and errors.startswith(f"error: the disk is full: {place.log}")
    place.log.unlink()
    assert nanolib("stage", "eval", "--of", "base")[0] == 0
    assert all(path.stat().st_mtime_ns == when for path, when in before.items() if path.is_file())
