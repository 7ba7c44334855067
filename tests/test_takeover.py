"""A run takes over another's finished stages where the recipe is the same, whole or not at all."""

import os
import re
import shutil
from pathlib import Path

import pytest

from nanolib import launch
from nanolib.rundir import Run
from nanolib.takeover import take_over

ROAD = ("data", "tokenizer", "shards", "base", "mid", "sft", "grpo")


@pytest.fixture(autouse=True)
def files(monkeypatch) -> list[str]:
    """The data stage records what we say the run's files are, and does nothing else."""
    found = ["as ever"]

    def stage(name: str, run: Run, watch=None) -> dict:
        assert name == "data"
        if run.stage("data").done() is None:
            run.stage("data").finish({"fingerprint": found[-1]})
        record = run.stage("data").done()
        assert record is not None
        return record["result"]

    monkeypatch.setattr(launch, "stage", stage)
    return found


@pytest.fixture
def source() -> Run:
    """A run with small files in place of the real ones, finished up to sft."""
    run = Run.open("smoke", "source")
    launch.stage("data", run)
    for name in ROAD[1:-1]:
        step = run.stage(name).checkpoints / "step_00000004"
        step.mkdir(parents=True)
        (step / "rank_0.safetensors").write_text(f"weights of {name}")
        (step / "index.json").write_text("{}")
        run.stage(name).metrics.append(step=4, kind="train", loss=1.0)
        run.stage(name).log.write_text("what it printed\n")
        run.stage(name).finish({"steps": 4})
    run.stage("eval", of="base").finish({"bpb": 1.0})
    return run


def started(run: Run) -> list[str]:
    return [name for name in ROAD if run.stage(name).path.exists()]


def test_another_grpo_setting_does_not_retrain_base(source):
    run = Run.open("smoke", overrides={"grpo.lr": 0.2})
    names = "tokenizer, shards, base, eval of base, mid, sft"
    assert take_over(run, source) == [
        f"taken over from run source: {names}",
        "grpo is not taken over: grpo.lr is 0.05 there, 0.2 here",
    ]
    assert started(run) == list(ROAD[:-1])
    record, theirs = run.stage("mid").done(), source.stage("mid").done()
    assert record == (theirs or {}) | {"taken_over": "source"}
    assert run.stage("eval", of="base").done() and not run.stage("grpo").path.exists()
    assert run.stage("mid").log.read_text() == "what it printed\n"
    weights = run.stage("mid").checkpoints / "step_00000004" / "rank_0.safetensors"
    assert weights.stat().st_nlink == 2  # shared with the source
    run.stage("mid").metrics.append(step=5, kind="train")
    assert len(source.stage("mid").metrics.rows()) == 1  # and this is not
    shutil.rmtree(source.path)
    assert weights.read_text() == "weights of mid"


def test_the_same_command_again_changes_nothing_and_goes_on_with_what_is_new(source):
    run = Run.open("smoke", overrides={"eval.max_problems": 3})
    said = take_over(run, source)
    assert said[1] == "grpo is not taken over: run source has not finished it"
    assert not run.stage("eval", of="base").path.exists()  # another number of problems
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert take_over(run, source) == said
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    source.stage("grpo").finish({})
    assert take_over(run, source)[0].endswith("base, mid, sft, grpo")


@pytest.mark.parametrize(
    "overrides, taken, obstacle",
    [
        ({"model.depth": 3}, ["tokenizer", "shards"], "base .*: model.depth is 2 there, 3 here"),
        ({"tokenizer.vocab_size": 500}, [], "tokenizer .*: tokenizer.vocab_size is 512 there"),
        ({"seed": 2}, [], "data .*: seed is 1 there, 2 here"),
        ({"optim.clip": None}, ["tokenizer", "shards"], "base .*: optim.clip is 1.0 there, none"),
        ({"mid.enabled": False}, ["tokenizer", "shards", "base"], "sft .*: mid.enabled is True"),
    ],
)
def test_it_ends_with_the_first_stage_that_differs(source, overrides, taken, obstacle):
    run = Run.open("smoke", overrides=overrides)
    *_, why = take_over(run, source)
    assert [name for name in started(run) if name != "data"] == taken
    assert re.match(obstacle, why), why


def test_other_files_mean_other_stages(source, files):
    files.append("a newer mirror")
    run = Run.open("smoke", "other")
    assert take_over(run, source) == [
        "taken over from run source: nothing",
        "data is not taken over: run source has read other files",
    ]
    assert started(run) == ["data"]


def test_another_revision_of_a_data_set_matters_from_mid_on(source):
    run = Run.open("smoke", "other")
    text = run.config.recipe.data.repository
    for it, revision in ((run, "a"), (source, "b")):
        revisions = {text: revision, "openai/gsm8k": revision, "cais/mmlu": "a"}
        it.stage("data").finish({"fingerprint": "as ever", "revisions": revisions})
    *_, why = take_over(run, source)
    assert why == "mid is not taken over: openai/gsm8k has another revision there"
    assert started(run) == ["data", "tokenizer", "shards", "base"]


def test_what_was_begun_here_stays_and_what_follows_it_is_made_here(source):
    run = Run.open("smoke", "other")
    run.stage("mid").metrics.append(step=1, kind="train")
    *_, why = take_over(run, source)
    assert why == "mid is not taken over: it was begun here before"
    assert started(run) == ["data", "tokenizer", "shards", "base", "mid"]
    assert os.listdir(run.stage("mid").path) == ["metrics.jsonl"]


def test_a_killed_copy_leaves_no_stage_and_is_made_again(source, monkeypatch):
    run = Run.open("smoke", "other")

    def killed(path, target):
        if "mid" in str(target):
            raise KeyboardInterrupt
        return rename(path, target)

    rename = Path.rename
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        take_over(run, source)
    assert started(run) == ["data", "tokenizer", "shards", "base"]
    take_over(run, source)
    assert started(run) == list(ROAD[:-1])
    assert not list(run.path.rglob(".*"))  # nothing half-made is left


def test_without_hard_links_files_are_copied(source, monkeypatch):
    def refuse(file, target):
        raise OSError("another file system")

    run = Run.open("smoke", "other")  # a manifest is made with a link
    monkeypatch.setattr(os, "link", refuse)
    take_over(run, source)
    weights = run.stage("base").checkpoints / "step_00000004" / "rank_0.safetensors"
    assert weights.read_text() == "weights of base" and weights.stat().st_nlink == 1


def test_a_run_cannot_take_over_itself(source):
    with pytest.raises(ValueError, match="cannot take over its own stages"):
        take_over(Run.load("source"), source)
