"""Several nodes: two launchers on this machine, each with an agent of its own, share one run."""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import yaml
from torch.testing import assert_close

from nanolib import launch
from nanolib.config import REPOSITORY, MachineConfig
from nanolib.rundir import Run
from nanolib.ui import cli

COMMAND = """
import sys
from nanolib import launch
from nanolib.ui import cli
launch.WORKER = "tests.fake_stages" if sys.argv[1] == "fake" else launch.WORKER
sys.exit(cli.main(sys.argv[2:]))
"""
HANG = 600  # seconds: whatever takes longer has hung
LAUNCH = REPOSITORY / "runs" / "launch"
# Of `man sbatch` and of SkyPilot's YAML reference: what the files here may use.
SBATCH = (
    "job-name nodes ntasks-per-node gpus-per-node exclusive time signal requeue open-mode output"
)
TASK = {"name", "workdir", "num_nodes", "resources", "envs", "volumes", "setup", "run"}
RESOURCES = {"infra", "accelerators", "cpus", "memory", "use_spot", "disk_size", "network_tier"}


@pytest.fixture
def nodes():
    """Runs `nanolib …` on node 1 and then on node 0; returns what they said, 0's first."""
    started = []

    def run(worker: str, *words: list[str]) -> list[str]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        for number in (1, 0):
            environment = {"NANOLIB_NODE": str(number), "NANOLIB_RENDEZVOUS": address}
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, worker, *words[number], "--machine.nodes", "2"],
                cwd=REPOSITORY,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            started.insert(0, process)
        said = [process.communicate(timeout=HANG)[0] for process in started]
        assert [process.returncode for process in started] == [0, 0], said
        return said

    yield run
    for process in started:
        process.kill()


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(nodes, finished_run, tmp_path):
    run = Run.open("smoke", str(tmp_path / "shared"))
    for name in ("data", "tokenizer", "shards"):
        shutil.copytree(finished_run.path / name, run.path / name)
    nodes("real", *[["stage", "base", "--run", str(run.path)]] * 2)
    base, alone = run.stage("base"), finished_run.stage("base")
    assert base.done()["machine"]["ranks"] == 2 and base.done()["attempts"] == 1
    mine, theirs = (place.metrics.rows("train") for place in (base, alone))
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]  # one writer
    losses = ([row["loss"] for row in rows] for rows in (mine, theirs))
    assert_close(*losses, rtol=0, atol=1e-4)
    said = base.done()["result"]["validation_bpb"], alone.done()["result"]["validation_bpb"]
    assert_close(*said, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_other_nodes_wait_and_join_only_what_several_ranks_do(nodes):
    """Node 0 runs stages, as the chapters would; node 1 `nanolib run`. The workers only count."""
    only_base = [f"--{name}.enabled=false" for name in ("mid", "sft", "grpo")]
    first = ["stage", "eval", "--profile", "smoke", *only_base]
    said = nodes("fake", first, ["run", "smoke", *only_base])
    run = Run.load()
    for place in run.stages()[:-1]:  # without the report, which nobody asked for
        assert place.done() and (place.path / "starts").read_text() == "0\n", place
        joined = place.name in launch.PARALLEL
        assert (place.path / "log_1.txt").exists() == joined, place
        assert (place.path / "attempts.jsonl").read_text().count("null}") == 1  # begun once
    assert "20/20" in said[1] and not (run.path / "chapters").exists()


@pytest.mark.parametrize(
    "number, address, got",
    [("", "", "got ''.*got ''"), ("2", "a:1", "got '2'"), ("-1", "a:1", "'-1'"), ("0", "a", "'a'")],
)
def test_an_environment_that_says_too_little(monkeypatch, number, address, got):
    monkeypatch.setenv("NANOLIB_NODE", number)
    monkeypatch.setenv("NANOLIB_RENDEZVOUS", address)
    wants = r"machine.nodes = 2 needs NANOLIB_NODE = 0 to 1.*HOST:PORT of node 0.*runs/launch/"
    with pytest.raises(ValueError, match=wants) as caught:
        launch.node(MachineConfig(nodes=2))
    assert re.search(got, str(caught.value))
    assert launch.node(MachineConfig()) == (0, "")


def test_a_command_without_an_environment_writes_nothing(capsys, monkeypatch):
    for name in ("NANOLIB_NODE", "NANOLIB_RENDEZVOUS"):
        monkeypatch.delenv(name, raising=False)
    for words in (["run", "smoke"], ["stage", "base", "--profile", "smoke"]):
        assert cli.main([*words, "--machine.nodes", "2"]) == cli.USERS_MISTAKE
        assert "machine.nodes = 2 needs NANOLIB_NODE" in capsys.readouterr().err
    assert [it.name for it in Run.load().path.iterdir()] == ["manifest.json"]


def test_ranks_are_counted_over_all_nodes(capsys):
    words = "run smoke --dry-run --machine.nodes 3 --machine.ranks 1"
    assert cli.main(words.split()) == cli.USERS_MISTAKE
    assert "8 rows, which 3 ranks cannot share equally" in capsys.readouterr().err


# ---------------------------------------------------------------------------- the files


def test_the_slurm_script():
    text = (LAUNCH / "slurm.sh").read_text()
    lines = text.splitlines()
    subprocess.run(["bash", "-n", LAUNCH / "slurm.sh"], check=True)
    first = next(i for i, line in enumerate(lines) if line and line[0] != "#")
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert options == [line for line in lines[:first] if line.startswith("#SBATCH")]  # none is late
    for option in options:
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", option)
        assert found and found[1] in SBATCH.split(), option
    assert "#SBATCH --ntasks-per-node=1" in options  # one launcher, which starts the ranks
    assert "NANOLIB_NODE" in text and "NANOLIB_RENDEZVOUS" in text


def test_the_skypilot_task():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task.keys() <= TASK and task["resources"].keys() <= RESOURCES
    for step in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[step], text=True, check=True)
    assert task["envs"]["NANOLIB_RUNS"].startswith(tuple(task["volumes"]))
    environment = os.environ | {
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    environment |= {"SKYPILOT_NUM_NODES": "2", "PROFILE": "smoke"}
    script = 'uv() { echo "$NANOLIB_NODE $NANOLIB_RENDEZVOUS $*"; }\n' + task["run"]
    told = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True)
    assert told.stdout == ("1 10.0.0.1:29400 run --no-sync nanolib run smoke --machine.nodes 2\n")
