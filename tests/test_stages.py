"""The stages in this process: what they read, what they resume, what they refuse."""

import shutil

import numpy as np
import pytest
import torch

from nanolib import stages, tasks
from nanolib.guard import Guard
from nanolib.rundir import Run
from nanolib.runtime import Runtime
from nanolib.train import Stopped

SMALL = {
    "data.text_shards": 2,
    "base.steps": 2,
    "base.eval_documents": 4,
    "mid.steps": 2,
    "sft.steps": 2,
    "grpo.steps": 2,
    "eval.core_problems": 4,
    "eval.tasks": ["arc_easy", "facts"],
    "eval.max_problems": 4,
    "eval.max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A runs folder with a tiny run whose stages are done up to sft."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLIB_RUNS", str(folder))
        run = Run.open("smoke", "tiny", SMALL)
        for name in ("data", "tokenizer", "shards", "base", "mid", "sft"):
            stages.work(name, run)
    return folder


@pytest.fixture
def run(finished, monkeypatch) -> Run:
    monkeypatch.setenv("NANOLIB_RUNS", str(finished))
    return Run.load("tiny")


@pytest.fixture
def mirror(run, tmp_path):
    """A hub run on a copy of the toy world, as a user's mirror."""
    shutil.copytree(run.mirror(), tmp_path / "mirror")
    overrides = SMALL | {"data.source": "hub", "machine.mirror": str(tmp_path / "mirror")}
    return Run.open("smoke", str(tmp_path / "mirrored"), overrides)


def _context(run: Run, stage: str, of: str | None = None, guard: Guard | None = None):
    runtime = Runtime(device=torch.device("cpu"), dtype=torch.float32)
    place = run.stage(stage, of)
    return stages.Context(run=run, stage=place, runtime=runtime, guard=guard or Guard(), of=of)


def test_shards_are_bos_and_the_tokens_of_every_document(run):
    encoder = stages.load_tokenizer(run)
    _, validation = stages.shard_paths(run)
    tokens = np.load(validation)
    files = stages.hub.text_files(run.config, run.mirror())
    texts = list(stages.hub.documents(files.validation))
    assert encoder.decode(tokens[tokens != encoder.bos].tolist()) == "".join(texts)
    assert int((tokens == encoder.bos).sum()) == len(texts)
    result = run.stage("shards").done()["result"]
    assert result["validation_bytes"] == sum(len(text.encode()) for text in texts)


def test_sft_targets_are_what_the_assistant_says(run):
    """Decoded targets of every row, in the order of the packed conversations."""
    encoder, context = stages.load_tokenizer(run), _context(run, "sft")
    student = stages._student(context)
    settings = stages._row_settings(context, run.config.recipe.sft, student) | {"length": 256}
    talks = stages._conversations(context, "smoltalk", "test", 30)
    source, cut = stages._render(encoder, talks, settings)
    assert cut == 0
    found = []
    for number in range(len(source)):
        ids = source.batch([source.row(number)]).targets_BT[0]
        found += [encoder.decode(ids[ids >= 0].tolist())]
    said = sorted(m.text for talk in talks for m in talk.messages if m.role == "assistant")
    assert sorted("".join(found).replace("<|assistant_end|>", "\0").split("\0")[:-1]) == said


def test_a_finished_evaluation_of_a_task_is_not_repeated(run, monkeypatch):
    asked = []
    evaluate = stages.choices.evaluate

    def counted(engine, task, *args, **settings):
        asked.append(task.name)
        return evaluate(engine, task, *args, **settings)

    monkeypatch.setattr(stages.choices, "evaluate", counted)
    context = _context(run, "eval", of="sft")
    first = stages.evaluate(context)
    assert asked == ["arc_easy", "facts"]
    core = {f"core/toy_{name}" for name in ("choices", "people", "facts")}
    assert set(first) == {"compression", *core, "core", *asked}
    assert stages.evaluate(context) == first
    assert asked == ["arc_easy", "facts"]


def test_shards_stop_between_groups_of_documents_and_leave_nothing_half(run, tmp_path):
    guard = Guard()
    guard.request_stop()
    fresh = Run.open("smoke", str(tmp_path / "fresh"), SMALL)
    for name in ("data", "tokenizer"):
        shutil.copytree(run.stage(name).path, fresh.path / name)
    fresh.stage("shards").path.mkdir()
    with pytest.raises(Stopped):
        stages.shards(_context(fresh, "shards", guard=guard))
    assert not list(fresh.stage("shards").path.glob("*.npy"))


def test_without_base_and_mid_sft_starts_from_new_weights(run, tmp_path):
    left_out = {"base.enabled": False, "mid.enabled": False}
    bare = Run.open("smoke", str(tmp_path / "bare"), SMALL | left_out)
    for name in ("data", "tokenizer"):
        shutil.copytree(run.stage(name).path, bare.path / name)
    result = stages.work("sft", bare)
    assert result["steps"] == 2


@pytest.mark.parametrize("stage", ["base", "mid", "sft", "grpo"])
def test_each_stage_finds_its_micro_batch(stage, run, monkeypatch):
    """What was found, or machine.device_batch, reaches the source; one forward reaches everyone."""
    asked, seen = [], {}

    def found(model, nll, length, share, runtime):
        asked.append((length, share))
        return 3

    def train(context, config, student, source, *_):
        seen[context.run.config.machine.device_batch] = source
        assert student.nll == student.model.nll == getattr(source, "nll", student.nll)
        return {}

    monkeypatch.setattr(stages.planning, "fitting_rows", found)
    monkeypatch.setattr(stages, "_train", train)
    for given in (None, 5):
        machine = {"machine.device_batch": given}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "passes", lambda *_: {})
            stages.WORK[stage](_context(Run.load(run.id, machine), stage))
    ((length, share),) = asked
    assert length == 128 and share == (16 if stage == "grpo" else 8)
    for given, source in seen.items():
        rows = given or 3
        if stage == "grpo":
            assert source.device_tokens == rows * 128
        else:
            assert source.device_batch == rows


def test_a_computer_too_small_is_told_before_training(run, monkeypatch):
    monkeypatch.setattr(stages.planning, "main_memory", lambda ranks: 1e5)
    with pytest.raises(ValueError, match=r"too small: one row .* lower model.sequence_len or"):
        stages.base(_context(run, "base"))


def test_data_that_changed_under_a_run_is_refused(mirror, tmp_path):
    stages.work("data", mirror)
    stages.work("tokenizer", mirror)
    text = sorted((tmp_path / "mirror" / "text").glob("*.parquet"))
    shutil.copy(text[1], text[0])
    with pytest.raises(ValueError, match="is not what run mirrored began with"):
        stages.work("shards", mirror)


def test_a_task_by_a_wrong_name(run):
    with pytest.raises(ValueError, match="no task 'arcs'; there are arc_easy"):
        tasks.load("arcs", "test", run.mirror())


def test_a_stage_before_its_needs(tmp_path):
    run = Run.open("smoke", str(tmp_path / "new"), SMALL)
    with pytest.raises(ValueError, match="no data yet: nanolib stage data"):
        stages.shard_paths(run)
    with pytest.raises(ValueError, match="no tokenizer"):
        stages.load_tokenizer(run)


def test_a_checkpoint_depends_on_the_recipe_up_to_its_stage(run, tmp_path):
    """So a run that differs in a later stage may take over what comes before."""
    fork = Run.open("smoke", str(tmp_path / "fork"), SMALL | {"grpo.steps": 1, "eval.tasks": []})
    for name in ("data", "tokenizer", "shards", "base", "mid", "sft"):
        shutil.copytree(run.stage(name).path, fork.path / name)
    assert stages.work("grpo", fork)["steps"] == 1
    other = Run.open("smoke", str(tmp_path / "other"), SMALL | {"sft.lr": 0.25})
    for name in ("data", "tokenizer", "shards", "base", "mid", "sft"):
        shutil.copytree(run.stage(name).path, other.path / name)
    with pytest.raises(ValueError, match=r"sft\.lr"):
        stages.work("grpo", other)
