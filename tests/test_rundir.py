"""A run's directory: made once, opened again with the same recipe, never half a file."""

import errno
import io
import json
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanolib import config, rundir
from nanolib.rundir import Metrics, Run


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Two small profiles and an empty runs folder of our own."""
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    (profiles / "tiny.toml").write_text(
        'data.source = "toyworld"\nmodel = {depth = 2}\nbase.steps = 10\nmachine.ranks = 1\n'
    )
    (profiles / "real.toml").write_text("model = {depth = 2}\nbase.steps = 10\n")
    monkeypatch.setattr(config, "PROFILES", profiles)
    monkeypatch.setenv("NANOLIB_RUNS", str(tmp_path / "out"))
    return tmp_path


def test_a_run_is_opened_twice_and_loaded(folder):
    run = Run.open("tiny")
    assert run.path == folder / "out" / "tiny"
    assert Run.open("tiny") == run == Run.load("tiny") == Run.load() == Run.load(str(run.path))
    assert json.loads((run.path / "manifest.json").read_text())["recipe"]["model.depth"] == 2
    assert list(run.path.iterdir()) == [run.path / "manifest.json"]  # no temporary files are left


def test_threads_open_runs_at_the_same_instant():
    """As `bench demo --at-once 2` does: all leave a link to the run they opened."""

    def open_often(name: str) -> None:
        gate.wait()
        for _ in range(100):
            Run.open("tiny", name)

    gate = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_often, "abcd"))
    assert Run.load().id in "abcd"


def test_the_default_name_tells_recipes_apart_and_machines_not():
    assert Run.open("tiny", overrides={"base.steps": "10", "nproc": 2}).id == "tiny"
    other = Run.open("tiny", overrides={"base.steps": 11})
    assert other.id.startswith("tiny-") and other.config.recipe.base.steps == 11
    assert Run.open("tiny", overrides={"base.steps": "1_1"}) == other
    assert other.id == "tiny-7b6a57"  # ids are for ever: a run is found again by its overrides
    assert len({Run.open("tiny", overrides={"base.steps": n}).id for n in range(1, 30)}) == 29


def test_the_recipe_is_inherited_and_the_machine_is_not():
    Run.open("tiny", "mine", {"model.depth": 3, "machine.ranks": 2})
    again = Run.open("tiny", "mine")
    assert again.config.recipe.model.depth == 3
    assert again.config.machine.ranks == 1
    assert Run.load("mine", {"machine.ranks": 4}).config.machine.ranks == 4


def test_another_recipe_is_refused_with_key_both_values_and_remedy(folder):
    Run.open("tiny", "mine", {"model.depth": 3})
    before = (folder / "out/mine/manifest.json").read_bytes()
    with pytest.raises(ValueError, match=r"'mine'.*model\.depth = 3, not 4.*--run NAME"):
        Run.open("tiny", "mine", {"model.depth": 4})
    with pytest.raises(ValueError, match=r"'mine'.*profile = tiny, not real.*--run NAME"):
        Run.open("real", "mine")
    assert (folder / "out/mine/manifest.json").read_bytes() == before


def test_a_profile_edited_since_is_noticed(folder):
    Run.open("tiny")
    text = (folder / "profiles/tiny.toml").read_text()
    (folder / "profiles/tiny.toml").write_text(text + "seed = 7\n")
    with pytest.raises(ValueError, match=r"seed = 1, not 7; restore profile tiny, .*--run NAME"):
        Run.open("tiny")
    assert Run.load("tiny").config.recipe.seed == 1


def test_a_run_keeps_a_default_that_has_changed_since(folder):
    """Neither profile nor overrides name it, so nobody asks for another value."""
    path = Run.open("tiny").path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"]["grpo.eval_samples"] = 4
    path.write_text(json.dumps(manifest))
    assert Run.open("tiny").config.recipe.grpo.eval_samples == 4
    with pytest.raises(ValueError, match=r"made with grpo\.eval_samples = 4, not 8"):
        Run.open("tiny", "tiny", {"grpo.eval_samples": 8})


def test_loading_takes_machine_settings_and_refuses_another_recipe():
    Run.open("tiny")
    same = {"base.steps": 10, "eval.tasks": "arc_easy,arc_challenge,mmlu,gsm8k,humaneval"}
    same |= {"machine.ranks": 2}
    assert Run.load("tiny", same).config.machine.ranks == 2
    with pytest.raises(ValueError, match=r"base\.steps = 10, not 11"):
        Run.load("tiny", {"base.steps": 11})


def test_a_manifest_of_an_older_version_opens(folder):
    path = Run.open("tiny").path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["recipe"]["eval.max_new_tokens"]
    manifest["recipe"]["model.gone"] = 1
    path.write_text(json.dumps(manifest))
    assert Run.open("tiny").config == Run.load("tiny").config == config.resolve("tiny")


def test_a_setting_newer_than_the_run_has_its_default_and_can_be_asked_for(folder):
    """The profile may set it by now: the run was made without it."""
    path = Run.open("tiny").path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["recipe"]["grpo.top_k"]
    path.write_text(json.dumps(manifest))
    profile = folder / "profiles/tiny.toml"
    profile.write_text(profile.read_text() + "grpo.top_k = 7\n")
    assert Run.open("tiny").config.recipe.grpo.top_k == 50
    with pytest.raises(ValueError, match=r"'tiny' was made with grpo\.top_k = 50, not 7"):
        Run.open("tiny", overrides={"grpo.top_k": 7}, run="tiny")


def test_unknown_settings_of_a_manifest_are_named_once(folder, capsys):
    path = Run.open("tiny", overrides={"base.steps": 3}).path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"] |= {"model.gone": 1, "base.old": None}
    manifest["overrides"]["model.gone"] = 1
    path.write_text(json.dumps(manifest))
    opened = Run.open("tiny", overrides={"base.steps": 3})
    assert opened == Run.load() and opened.config.recipe.base.steps == 3
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.endswith("left out: base.old, model.gone\n")


def test_a_run_is_opened_with_one_read_of_its_profile(monkeypatch):
    calls = []

    def counted(name):
        call = getattr(config, name)
        return lambda *given: [calls.append(name), call(*given)][1]

    for name in ("load_profile", "check_overrides"):
        monkeypatch.setattr(config, name, counted(name))
    given = {"base.steps": 3, "machine.ranks": 2}
    for _ in ("created", "opened"):
        calls.clear()
        Run.open("tiny", overrides=given)
        counts = [calls.count(name) for name in ("load_profile", "check_overrides")]
        assert counts == [1, 3]  # the profile, the overrides, the manifest


@pytest.mark.parametrize("content", ["", "{", "[]", '{"profile": "tiny"}'])
def test_a_damaged_manifest_is_named(content):
    path = Run.open("tiny").path / "manifest.json"
    path.write_text(content)
    for call in (lambda: Run.open("tiny"), lambda: Run.load("tiny")):
        with pytest.raises(ValueError, match=r"manifest\.json is damaged.*--run NAME"):
            call()


def test_a_peek_gives_what_open_gives_and_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    for given in ({}, {"base.steps": 3, "machine.ranks": 2}):
        seen = Run.peek("tiny", overrides=given)
        assert not seen.exists() and sorted(folder.rglob("*")) == before
        opened = Run.open("tiny", overrides=given)
        before = sorted(folder.rglob("*"))
        assert opened == seen and seen.exists()
        first = Run.load().path
        assert Run.peek("tiny", opened.id, {"machine.threads": 3}).path == opened.path
        Run.peek("tiny", "another")
        assert Run.load().path == first and sorted(folder.rglob("*")) == before
    with pytest.raises(ValueError, match=r"was made with base\.steps = 10, not 11"):
        Run.peek("tiny", "tiny", {"base.steps": 11})


def test_the_link_to_the_last_run_cannot_be_opened_as_one():
    last = Run.open("tiny")
    with pytest.raises(ValueError, match="opened last"):
        Run.open("tiny", "latest")
    assert Run.load() == last


def test_names_and_places_that_cannot_be_a_run(folder):
    for name in ("a b", "..", "-x", ""):
        if name:
            with pytest.raises(ValueError, match="letters, digits"):
                Run.open("tiny", name)
    with pytest.raises(ValueError, match="opened last"):
        Run.open("tiny", "latest")
    (folder / "home").mkdir()
    (folder / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"home is not a run: .* no manifest\.json"):
        Run.open("tiny", str(folder / "home"))
    with pytest.raises(ValueError, match=r"letter\.txt is not a run: a file"):
        Run.open("tiny", str(folder / "home" / "letter.txt"))
    with pytest.raises(ValueError, match="there is no run 'nobody'"):
        Run.load("nobody")
    with pytest.raises(ValueError, match=r"there is no run yet.*nanolib run demo"):
        Run.load()


def test_a_path_is_a_run_too_and_the_last_one_opened_is_found(folder):
    elsewhere = Run.open("tiny", str(folder / "elsewhere" / "x"))
    assert Run.load() == elsewhere and elsewhere.name == str(folder / "elsewhere" / "x")
    inside = Run.open("tiny")
    assert Run.load() == inside and inside.name == "tiny"
    Run.load(elsewhere.name)
    assert Run.load() == inside  # reading is not opening


def test_the_manifest_is_written_once(folder):
    """What happens when two processes find no manifest at the same moment."""
    path = Run.open("tiny").path
    before = (path / "manifest.json").read_bytes()
    late = Run(path, config.resolve("tiny", {"seed": 9}))
    assert not rundir._create(late, {"seed": 9})
    assert (path / "manifest.json").read_bytes() == before


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    rundir.write_atomic(tmp_path / "x", "old")
    with (tmp_path / "x").open() as reader:
        rundir.write_atomic(tmp_path / "x", "new")
        assert reader.read() == "old" and (tmp_path / "x").read_text() == "new"


def _open(barrier, results):
    barrier.wait()
    results.put(Run.open("tiny").manifest()["created"])


def test_processes_that_open_at_once_agree(monkeypatch):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_open, args=(barrier, results)) for _ in range(6)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=20) for _ in processes}) == 1
    for process in processes:
        process.join()


def test_mirror(folder):
    assert Run.open("tiny").mirror() == folder / "out/tiny/data/mirror"
    assert Run.open("real").mirror() == folder / "out/real/data/mirror"
    assert Run.open("real", overrides={"mirror": "/there"}).mirror() == Path("/there")
    assert Run.load("real", {"mirror": "x"}).mirror() == config.REPOSITORY / "x"
    Run.load("real").stage("data").finish({"mirror": "/recorded"})
    assert Run.load("real").mirror() == Path("/recorded")


def test_stage_directories_and_done_records():
    run = Run.open("tiny")
    stage = run.stage("eval", of="sft")
    assert stage.path == run.path / "eval" / "sft" and stage.done() is None
    stage.finish({"accuracy": 0.5}, seconds=1.5, machine={"ranks": 1})
    record = stage.done()
    assert record["result"] == {"accuracy": 0.5} and record["seconds"] == 1.5
    assert record["finished"] and os.listdir(stage.path) == ["done.json"]


# ---------------------------------------------------------------------------- metrics


def test_metrics_survive_a_writer_killed_in_the_middle_of_a_line(tmp_path):
    metrics = Metrics(tmp_path / "stage" / "metrics.jsonl")
    assert metrics.rows() == []
    metrics.append(step=1, kind="train", loss=2.0)
    with metrics.path.open("ab") as file:
        file.write(b'{"step": 2, "kin')
    assert metrics.rows() == [{"step": 1, "kind": "train", "loss": 2.0}]
    Metrics(metrics.path).append(step=2, kind="train", loss=1.0)
    assert [row["step"] for row in metrics.rows()] == [1, 2]


@pytest.mark.parametrize("torn", [b"", b"x", b"y" * 10_000])
def test_an_appended_row_reads_no_more_than_the_end(tmp_path, monkeypatch, torn):
    """However long the file is, and though each row comes from a Metrics of its own."""
    path = tmp_path / "metrics.jsonl"
    for step in range(1000):
        Metrics(path).append(step=step, kind="train")
    with path.open("ab") as file:
        file.write(torn)
    read = 0

    class Counted(io.BufferedRandom):
        def read(self, size=-1):
            nonlocal read
            found = super().read(size)
            read += len(found)
            return found

    monkeypatch.setattr(Path, "open", lambda path, mode: Counted(io.FileIO(path, mode)))
    monkeypatch.setattr(Path, "read_bytes", None)
    Metrics(path).append(step=1000, kind="train")
    monkeypatch.undo()
    assert read <= len(torn) + 4096 + 1
    assert [row["step"] for row in Metrics(path).rows()] == list(range(1001))


def test_metrics_that_are_one_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"z" * 5000)
    Metrics(path).append(step=1)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_truncate_drops_what_will_be_written_again(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(5):
        metrics.append(step=step, kind="train")
        metrics.append(step=step, kind="eval")
    metrics.truncate(2)
    assert [row["step"] for row in metrics.rows()] == [0, 0, 1, 1, 2, 2]
    metrics.append(step=3, kind="train")
    assert len(metrics.rows()) == 7
    Metrics(tmp_path / "none.jsonl").truncate(0)


# ---------------------------------------------------------------------------- a full disk


def test_a_full_disk_is_a_message_and_keeps_what_was_saved(tmp_path):
    """/dev/full answers every write with "no space left on device"."""
    tmp_path = tmp_path / "run"
    path = tmp_path / "done.json"
    rundir.write_atomic(path, "old")
    rundir._draft(path).symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"disk is full: .*done\.json.*run the same command"):
        rundir.write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["done.json"]

    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"disk is full: .*metrics\.jsonl"):
        Metrics(tmp_path / "metrics.jsonl").append(step=1)


def test_saving_understands_other_libraries_and_hides_nothing_else(tmp_path):
    with pytest.raises(ValueError, match="disk is full"), rundir.saving(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(ValueError, match="disk is full"), rundir.saving(tmp_path):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    with pytest.raises(RuntimeError, match="other"), rundir.saving(tmp_path):
        raise RuntimeError("other")
