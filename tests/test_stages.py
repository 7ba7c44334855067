"""The stages in this process: what they read, what they resume, what they refuse."""

import dataclasses
import itertools
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_hub import FakeHub
from test_overlap import naive

from nanolib import stages, tasks
from nanolib.config import MODELS
from nanolib.conversation import Conversation, Message
from nanolib.data.sources import ConversationSource, first_tokens, render, save_conversations
from nanolib.grpo import RolloutSource
from nanolib.guard import Guard
from nanolib.rundir import Run
from nanolib.runtime import Runtime
from nanolib.stages import evaluate, text, training, worker
from nanolib.tokenizer import Tokenizer
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
            worker.work(name, run)
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


def _fork(run: Run, path: Path, overrides: dict) -> Run:
    """A run of its own that takes over everything up to sft."""
    fork = Run.open("smoke", str(path), SMALL | overrides)
    for name in ("data", "tokenizer", "shards", "base", "mid", "sft"):
        shutil.copytree(run.stage(name).path, fork.path / name)
    return fork


def _context(run: Run, stage: str, of: str | None = None, guard: Guard | None = None):
    runtime = Runtime(device=torch.device("cpu"), dtype=torch.float32)
    place = run.stage(stage, of)
    return stages.Context(run=run, stage=place, runtime=runtime, guard=guard or Guard())


def test_shards_are_bos_and_the_tokens_of_every_document(run):
    tokenizer = _context(run, "mid").tokenizer
    _, validation = text.shard_paths(run)
    tokens = np.load(validation)
    files = text.hub.text_files(run.config, run.mirror())
    texts = list(text.hub.documents(files.validation))
    assert tokenizer.decode(tokens[tokens != tokenizer.bos].tolist()) == "".join(texts)
    assert int((tokens == tokenizer.bos).sum()) == len(texts)
    result = run.stage("shards").done()["result"]
    assert result["validation_bytes"] == sum(len(text.encode()) for text in texts)


def _packed(talks, tokenizer, folder: Path, settings) -> tuple[ConversationSource, int]:
    """Conversations rendered and packed as a stage does it, and the ids that were cut off."""
    rendered = render(talks, tokenizer, settings["length"] + 1, threads=2)
    cut = save_conversations(rendered, folder, tokenizer.vocab_size)
    return ConversationSource.open(folder, **settings), cut


def _sft_settings(run: Run) -> dict:
    context = _context(run, "sft")
    return training.Training(context).row_settings()


def _targets(message: Message) -> str:
    """What the assistant itself writes: programs too, and not what they print."""
    program = "<|python_start|>{}<|python_end|>"
    forms = {"text": "{}", "python": program, "output": ""}
    return "".join(forms[part.kind].format(part.text) for part in message.parts)


def test_sft_targets_are_what_the_assistant_says(run, tmp_path):
    """Decoded targets of every row, in the order of the packed conversations."""
    context = _context(run, "sft")
    tokenizer = context.tokenizer
    talks = list(training._conversations(context, "smoltalk", "test", 30))
    settings = _sft_settings(run) | {"length": 256}
    source, cut = _packed(talks, tokenizer, tmp_path / "packed", settings)
    assert cut == 0
    found = []
    for number in range(len(source)):
        ids = source.batch([number]).targets_BT[0]
        found += [tokenizer.decode(ids[ids >= 0].tolist())]
    said = sorted(_targets(m) for talk in talks for m in talk.messages if m.role == "assistant")
    assert any("<|python_start|>" in text for text in said)
    assert sorted("".join(found).replace("<|assistant_end|>", "\0").split("\0")[:-1]) == said


def test_a_conversation_without_a_target_is_left_out(run, tmp_path):
    """A question that fills the row leaves no room for an answer to learn from."""
    tokenizer = _context(run, "mid").tokenizer
    talks = [Conversation.ask("why? " * 200, "so"), Conversation.ask("who?", "me")]
    source, cut = _packed(talks, tokenizer, tmp_path / "packed", _sft_settings(run))
    targets = source.batch([0]).targets_BT
    assert len(source) == 1 and cut > 0
    assert tokenizer.decode(targets[targets >= 0].tolist()) == "me<|assistant_end|>"
    with pytest.raises(ValueError, match="no conversations to train on"):
        _packed(talks[:1], tokenizer, tmp_path / "none", _sft_settings(run))


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_of_a_mixture_are_those_of_rendering_one_conversation_after_the_other(run, ranks):
    """Ids and masks of every row, and a step's batches, on every rank."""
    context = _context(run, "mid")
    setup = training.Training(context)
    folder, about = training._mixture(context)
    settings = setup.row_settings() | {"world_size": ranks}
    talks = [
        talk
        for name, limit in text.limits(run.config.recipe, "mid").items()
        for talk in training._conversations(context, name, "train", limit)
    ]
    assert sum(about["conversations"].values()) == len(talks) > 50
    one_by_one = [talk.render(context.tokenizer, settings["length"] + 1) for talk in talks]
    assert about["cut_tokens"] == sum(r.cut for r in one_by_one)
    kept = [r for r in one_by_one if any(r.loss_mask[1:])]
    for rank in range(ranks):
        mapped = ConversationSource.open(folder / "train", **settings | {"rank": rank})
        naive = ConversationSource([r.ids for r in kept], [r.loss_mask for r in kept], **settings | {"rank": rank})  # fmt: skip
        assert isinstance(mapped.ids[0].base.base, np.memmap)
        assert mapped.rows == naive.rows
        for number in range(len(naive)):
            for found, expected in zip(mapped.row(number), naive.row(number), strict=True):
                assert found.tolist() == expected.tolist()
        for step in (0, 1, 99):
            (found,), (expected,) = mapped.updates(step), naive.updates(step)
            for left, right in zip(found, expected, strict=True):
                assert torch.equal(left.inputs_BT, right.inputs_BT)
                assert torch.equal(left.targets_BT, right.targets_BT)


def test_a_mixture_is_rendered_once_by_the_lead_rank(run, tmp_path, monkeypatch):
    """A resumed stage and every other rank map what is there; another recipe renders its own."""
    fork = _fork(run, tmp_path / "fork", {"mid.rows.gsm8k": 3})
    first, _ = training._mixture(_context(run, "mid"))
    other, about = training._mixture(_context(fork, "mid"))
    assert first.name != other.name and about["conversations"]["gsm8k"] == 3
    monkeypatch.setattr(tasks, "load", lambda *_: pytest.fail("rendered again"))
    context = _context(run, "mid")
    for rank in (0, 1):
        context.runtime = dataclasses.replace(context.runtime, rank=rank, world_size=2)
        assert training._mixture(context)[0] == first


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mixture_stops_while_it_is_rendered_and_leaves_nothing_half(rank, run, tmp_path):
    """The lead between two conversations, the others while they wait."""
    fork = _fork(run, tmp_path / "fork", {"mid.rows.gsm8k": 5})
    context = _context(fork, "mid")
    context.runtime = dataclasses.replace(context.runtime, rank=rank, world_size=2)
    shown = []

    def progress(done: int, total: int, message: str) -> None:
        shown.append(message)
        if len(shown) == 7:
            context.guard.request_stop()
        stages.Context.progress(context, done, total, message)

    context.progress = progress
    before = sorted(fork.stage("mid").path.glob("conversations-*"))
    rows = context.stage.metrics.rows()
    with pytest.raises(Stopped, match="rendering" if rank == 0 else "waiting for rank 0"):
        training._mixture(context)
    assert sorted(fork.stage("mid").path.glob("conversations-*")) == before
    new = context.stage.metrics.rows()[len(rows) :]
    assert [row["kind"] for row in new] == ["progress"] * (rank == 0)


def test_held_out_conversations_are_the_same_in_every_stage_and_training_ones_are_not(run):
    def drawn(stage: str, split: str) -> list[str]:
        found = training._conversations(_context(run, stage), "smoltalk", split, 20)
        return [talk.messages[1].text for talk in found]

    assert drawn("mid", "test") == drawn("sft", "test")
    assert drawn("mid", "train") != drawn("sft", "train")


def test_held_out_losses_of_a_stage_begin_where_those_of_the_one_before_ended(run):
    """The same conversations in the same rows, of every source that both stages learn from."""
    mid, sft = (
        [row for row in run.stage(name).metrics.rows() if row["kind"] == "eval"]
        for name in ("mid", "sft")
    )
    assert mid[0]["step"] == sft[0]["step"] == 0
    shared = {name for name in mid[0] if name.endswith("_loss")} & sft[0].keys()
    assert shared >= {"smoltalk_loss", "gsm8k_loss"}
    for name in shared:
        assert sft[0][name] == pytest.approx(mid[-1][name], abs=1e-9)


def test_validation_loss_is_of_what_the_assistant_says(run, tmp_path):
    """Against the mean over the targets of all rows, computed one by one."""
    context = _context(run, "sft")
    setup = training.Training(context)
    settings = setup.row_settings()
    talks = training._conversations(context, "smoltalk", "test", 30)
    held, _ = _packed(talks, context.tokenizer, tmp_path / "packed", settings)
    nats, count = 0.0, 0
    for number in range(len(held)):
        batch = held.batch([number])
        nats += float(setup.model.nll(batch)[batch.targets_BT >= 0].detach().sum())
        count += int((batch.targets_BT >= 0).sum())
    mean = setup.validation_loss(held)
    assert mean == pytest.approx(nats / count)


@pytest.mark.parametrize("every_stage", [False, True])
def test_base_clips_and_base_and_mid_warm_momentum_up(every_stage, run, tmp_path, monkeypatch):
    """As in the original, unless optim.every_stage says otherwise (as in the first edition)."""
    fork = _fork(run, tmp_path / "fork", {"optim.every_stage": every_stage})
    found = {}

    def made(*, stage, optimizer, **_):
        found[stage.name] = (optimizer.config.clip, optimizer.momentum())
        raise Stopped("seen")

    monkeypatch.setattr(training, "Trainer", made)
    monkeypatch.setattr(training.checkpoint, "check_same", lambda *_: None)
    for name in MODELS:
        with pytest.raises(Stopped):
            worker.WORK[name](_context(fork, name))
    every = dict.fromkeys(MODELS, (1.0, 0.85))
    original = {"mid": (None, 0.85), "sft": (None, 0.95), "grpo": (None, 0.95)}
    assert found == every | ({} if every_stage else original)


# ---------------------------------------------------------------------------- grpo


def test_grpo_scores_where_it_starts_once(run, tmp_path):
    fork = _fork(run, tmp_path / "begun", {})
    worker.work("grpo", fork)
    scored = [row["step"] for row in fork.stage("grpo").metrics.rows() if row["kind"] == "eval"]
    assert scored == [0, 2]
    (fork.stage("grpo").path / "done.json").unlink()
    shutil.rmtree(fork.stage("grpo").checkpoints / "step_00000002")
    worker.work("grpo", fork)
    scored = [row["step"] for row in fork.stage("grpo").metrics.rows() if row["kind"] == "eval"]
    assert scored == [0, 2]


SUMS = {"sft.rows.sums": 20, "sft.sums.most": 2, "grpo.task": "sums", "grpo.sums.fewest": 4}


def test_sums_reach_sft_and_grpo_with_their_dials_and_no_file(run, tmp_path):
    fork = _fork(run, tmp_path / "sums", SUMS | {"grpo.max_new_tokens": 8})
    shutil.rmtree(fork.stage("sft").path)
    assert all(repository for repository, _, _ in text.tables(fork.config.recipe))
    assert worker.work("sft", fork)["conversations"]["sums"] == 20
    asked = [
        it.turns[0].text
        for it in training._conversations(_context(fork, "sft"), "sums", "train", 20)
    ]
    assert {text.count("+") + text.count("-") for text in asked} == {1}
    worker.work("grpo", fork)
    rows = fork.stage("grpo").metrics.rows("rollout")
    questions = [question for row in rows for question, _, _ in row["samples"]]
    assert questions and all(q.count("+") + q.count("-") == 3 for q in questions)


def test_a_stages_own_seed_draws_other_rows_and_questions(run, tmp_path):
    def drawn(fork: Run) -> list[list]:
        context = _context(fork, "sft")
        rows = [it.turns[0].text for it in training._conversations(context, "smoltalk", "train", 9)]
        held_out = training._conversations(context, "smoltalk", "test", 9)
        order = training.Training(context).row_settings()["seed"]
        return [[training._mixture(context)[0].name], rows, [order], [it.turns for it in held_out]]

    same, other = ({"sft.seed": seed} for seed in (1, 2))  # the run's is 1
    plain = drawn(_fork(run, tmp_path / "plain", {}))
    assert drawn(_fork(run, tmp_path / "same", same)) == plain
    *changed, held_out = drawn(_fork(run, tmp_path / "other", other))
    assert all(a != b for a, b in zip(changed, plain, strict=False)) and held_out == plain[-1]


def test_grpos_divergence_is_from_where_it_started_also_when_resumed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.GSM8K, "grade", lambda task, i, answer: len(answer) % 2 == 0)
    given = {"grpo.steps": 3, "grpo.lr": 2.0, "grpo.save_every": 1, "grpo.kl": 1e-6}
    fork = _fork(run, tmp_path / "kl", given)
    worker.work("grpo", fork)
    rows = fork.stage("grpo").metrics.rows("rollout")
    assert all("kl" not in row for row in run.stage("grpo").metrics.rows("rollout"))  # no reference
    first, *later = [row["kl"] for row in rows]
    assert first == 0 and min(later) > 0.01
    (fork.stage("grpo").path / "done.json").unlink()
    shutil.rmtree(fork.stage("grpo").checkpoints / "step_00000003")
    worker.work("grpo", fork)
    assert fork.stage("grpo").metrics.rows("rollout") == rows


# ---------------------------------------------------------------------------- evaluations


def test_an_evaluation_tells_how_far_it_is(run, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(stages.Context, "progress", lambda self, *args, **how: told.append((args, how)))  # fmt: skip
    fork = _fork(run, tmp_path / "told", {})
    fork.stage("eval", "sft").path.mkdir(parents=True)
    evaluate.evaluate(_context(fork, "eval", of="sft"))
    within = [(args, how["message"]) for args, how in told if how]
    tasks_told = ("core/toy_choices", "core/toy_people", "core/toy_facts", "arc_easy", "facts")
    assert set(within) == {((0, 4), name) for name in tasks_told}


def test_a_finished_evaluation_of_a_task_is_not_repeated(run, monkeypatch):
    asked = []
    original = evaluate.score_task

    def counted(context, engine, name):
        asked.append(name)
        return original(context, engine, name)

    monkeypatch.setattr(evaluate, "score_task", counted)
    context = _context(run, "eval", of="sft")
    first = evaluate.evaluate(context)
    assert asked == ["arc_easy", "facts"]
    core = {f"core/toy_{name}" for name in ("choices", "people", "facts")}
    assert set(first) == {"compression", *core, "core", *asked}
    assert evaluate.evaluate(context) == first
    assert asked == ["arc_easy", "facts"]


def test_the_trigram_reads_no_more_text_than_it_uses(run, monkeypatch):
    """The first tokens of all shards in a row; later shards are not even opened."""
    train, _ = text.shard_paths(run)
    whole = [np.load(path) for path in train]
    first, total = len(whole[0]), sum(map(len, whole))
    opened, original = [], np.load
    monkeypatch.setattr(np, "load", lambda path, **how: opened.append(path) or original(path, **how))  # fmt: skip
    for limit in (first - 5, first, first + 5, total + 5):
        opened.clear()
        tokens = first_tokens(train, limit)
        assert tokens.tolist() == np.concatenate(whole)[:limit].tolist()
        assert opened == train[: 1 if limit <= first else 2]


def test_only_the_lead_counts_trigrams(run, monkeypatch):
    made = []
    monkeypatch.setattr(evaluate, "TRIGRAM_TOKENS", 5000)
    original = evaluate.Trigram
    monkeypatch.setattr(
        evaluate, "Trigram", lambda ids, size: made.append(ids) or original(ids, size)
    )
    for rank in (0, 1):
        context = _context(run, "eval", of="base")
        context.runtime = dataclasses.replace(context.runtime, rank=rank)
        engine: Any = SimpleNamespace(tokenizer=context.tokenizer, model=None)
        monkeypatch.setattr(evaluate, "bits_per_byte", lambda *_: 1.0)
        documents = text.validation_documents(context)
        scores = evaluate.compression(context, engine, documents)
        assert scores.keys() == ({"bpb", "trigram_bpb"} if rank == 0 else {"bpb"})
    (tokens,) = made
    naive = np.concatenate([np.load(path) for path in text.shard_paths(run)[0]])[:5000]
    assert tokens.tolist() == naive.tolist()


def test_shards_stop_between_groups_of_documents_and_leave_nothing_half(run, tmp_path):
    guard = Guard()
    guard.request_stop()
    fresh = Run.open("smoke", str(tmp_path / "fresh"), SMALL)
    for name in ("data", "tokenizer"):
        shutil.copytree(run.stage(name).path, fresh.path / name)
    fresh.stage("shards").path.mkdir()
    with pytest.raises(Stopped):
        text.shards(_context(fresh, "shards", guard=guard))
    assert not list(fresh.stage("shards").path.glob("*.npy"))


def test_without_base_and_mid_sft_starts_from_new_weights(run, tmp_path):
    left_out = {"base.enabled": False, "mid.enabled": False}
    bare = Run.open("smoke", str(tmp_path / "bare"), SMALL | left_out)
    for name in ("data", "tokenizer"):
        shutil.copytree(run.stage(name).path, bare.path / name)
    result = worker.work("sft", bare)
    assert result["steps"] == 2


@pytest.mark.parametrize("stage", ["base", "mid", "sft", "grpo"])
def test_each_stage_finds_its_micro_batch(stage, run, monkeypatch):
    """What was found, or machine.device_batch, reaches the source; one forward reaches everyone."""
    asked, seen = [], {}

    def found(model, nll, share, runtime):
        asked.append(share)
        return 3

    def train(setup, source, *_):
        seen[setup.context.run.config.machine.device_batch] = source
        assert setup.nll == setup.model.nll == getattr(source, "nll", setup.nll)
        return {"steps": 2}

    monkeypatch.setattr(training.planning, "fitting_rows", found)
    monkeypatch.setattr(training.Training, "run", train)
    for given in (None, 5):
        machine = {"machine.device_batch": given}
        worker.WORK[stage](_context(Run.load(run.id, machine), stage))
    assert asked == [16 if stage == "grpo" else 8]
    for given, source in seen.items():
        rows = given or 3
        if stage == "grpo":
            assert source.device_tokens == rows * 128
        else:
            assert source.device_batch == rows


def test_a_computer_too_small_is_told_before_training(run, monkeypatch):
    monkeypatch.setattr(training.planning, "main_memory", lambda ranks: 1e5)
    with pytest.raises(ValueError, match=r"too small: one row .* lower model.sequence_len or"):
        training.base(_context(run, "base"))


# ---------------------------------------------------------------------------- data


@pytest.fixture
def hub_run(run, tmp_path, monkeypatch):
    """A run whose data comes from a hub that has the toy world's, and that hub."""
    shutil.copytree(run.mirror(), tmp_path / "mirror")
    hub = FakeHub(tmp_path / "mirror", monkeypatch)
    bundle = tmp_path / "mirror/eval_bundle.zip"
    monkeypatch.setattr(text.hub, "fetch_bundle", lambda _: hub.call("bundle") or bundle)
    return Run.open("smoke", str(tmp_path / "hubbed"), SMALL | {"data.source": "hub"}), hub


def test_after_the_data_stage_no_stage_needs_the_network(hub_run, run):
    """What was fetched trains as the same files in a mirror do; the revisions are recorded."""
    hubbed, hub = hub_run
    data = worker.work("data", hubbed)
    assert set(data["revisions"].values()) == {FakeHub.COMMIT} and len(data["revisions"]) == 6
    hub.broken = dict.fromkeys(hub.calls, ConnectionError("no network any more"))
    for name in ("tokenizer", "shards", "base", "mid", "sft", "grpo"):
        result = worker.work(name, hubbed)
        if name in ("base", "mid", "sft"):
            assert result["train_loss"] == run.stage(name).done()["result"]["train_loss"]
    scores = worker.work("eval", hubbed, of="sft")
    assert {"core", "arc_easy", "facts"} <= scores.keys()


def test_a_run_that_kept_no_data_gathers_it_again_and_checks_it(hub_run, tmp_path):
    """As runs of the first edition did, whose stages each asked the hub."""
    hubbed, _ = hub_run
    worker.work("data", hubbed)
    shutil.rmtree(hubbed.mirror())
    worker.work("tokenizer", hubbed)
    shutil.rmtree(hubbed.mirror())
    shards = sorted((tmp_path / "mirror/text").glob("*"))
    shutil.copy(shards[1], shards[0])
    with pytest.raises(ValueError, match="differs from what run hubbed started with"):
        worker.work("shards", hubbed)


@pytest.mark.parametrize("source", ["hub", "toyworld"])
def test_data_stops_between_files_and_leaves_no_mirror(source, hub_run, tmp_path, monkeypatch):
    hubbed, hub = hub_run
    fresh = hubbed if source == "hub" else Run.open("smoke", str(tmp_path / "toy"), SMALL)
    fresh.stage("data").path.mkdir(parents=True)
    context = _context(fresh, "data")
    written = []
    original = text.toyworld._write_table

    def write(path, rows):
        written.append(path)
        original(path, rows)
        context.guard.request_stop()

    monkeypatch.setattr(text.toyworld, "_write_table", write)
    begun, told, report = threading.Event(), threading.Event(), context.progress
    fetch_file = text.hub.fetch_file

    def progress(*now):
        try:
            report(*now)
            begun.set()
        except Stopped:
            told.set()
            raise

    def fetch(*asked):
        if hub.downloads:
            told.wait()
            raise KeyboardInterrupt  # as a download does that is told to stop
        begun.wait()
        context.guard.request_stop()
        return fetch_file(*asked)

    monkeypatch.setattr(context, "progress", progress)
    monkeypatch.setattr(text.hub, "fetch_file", fetch)
    monkeypatch.setattr(text.mirror, "AT_ONCE", 1)
    with pytest.raises(Stopped, match={"hub": "MB/s", "toyworld": "shard_"}[source]):
        text.data(context)
    assert len(written) + len(hub.downloads) == 1
    assert [row["message"] for row in context.stage.metrics.rows()][:1]
    assert not fresh.mirror().exists()


@pytest.mark.parametrize("stage", ["data", "tokenizer", "shards"])
def test_text_is_prepared_on_a_computer_without_the_gpu_of_the_run(stage, run, tmp_path):
    meant_for = Run.open("smoke", str(tmp_path / "cuda"), SMALL | {"machine.device": "cuda"})
    for name in ("data", "tokenizer", "shards")[: ("data", "tokenizer", "shards").index(stage)]:
        shutil.copytree(run.stage(name).path, meant_for.path / name)
    assert worker.work(stage, meant_for)
    with pytest.raises(ValueError, match="'cuda', which torch does not see"):
        worker.work("base", meant_for)


def test_data_finds_test_problems_in_what_the_run_trains_on(run, mirror, monkeypatch):
    """In every source as its stage uses it, and in no other rows; the older run is left alone."""
    seen = {}

    def flat(arrays):
        return [it.as_buffer().to_pybytes().decode() for texts in arrays for it in texts]

    def overlap(tests, sources, threads, progress):
        seen.update(tests=tests, sources={k: flat(v) for k, v in sources.items()})
        return {"texts": {}}

    monkeypatch.setattr(text, "overlap", overlap)
    worker.work("data", mirror)
    assert json.loads((mirror.stage("data").path / "overlap.json").read_text()) == {"texts": {}}
    files = text.hub.text_files(mirror.config, mirror.mirror())
    texts = [it for path in files.train for it in text.hub.documents(path)]
    expected = {"text": texts}
    for stage in ("mid", "sft"):
        for name, limit in text.limits(mirror.config.recipe, stage).items():
            talks = list(training._conversations(_context(mirror, stage), name, "train", limit))
            expected[f"{stage}: {name}"] = talks
    questions = tasks.load("gsm8k", "train", mirror.mirror())
    expected["grpo: gsm8k"] = [questions.conversation(i) for i in range(len(questions))]
    assert seen["sources"].keys() == expected.keys() and seen["sources"]["text"] == texts
    for name, talks in expected.items():
        assert len(seen["sources"][name]) == len(talks) > 0
        if "smoltalk" in name or "gsm8k" in name:
            said = [" ".join(message.text for message in talk.messages) for talk in talks]
            assert seen["sources"][name] == said
    tests, easy = seen["tests"], tasks.load("arc_easy", "test", mirror.mirror())
    assert [name for name in tests if "/" not in name] == ["arc_easy", "facts"]
    right = easy.choices(3)[easy.answer(3)]
    assert len(tests["arc_easy"]) == 4 and tests["arc_easy"][3] == f"{easy.question(3)} {right}"
    assert {len(its) for name, its in tests.items() if "/" in name} == {4}


@pytest.fixture
def quoting(mirror, tmp_path):
    """Settings of a run on little text, of which some quotes problems, as do the user's own chats."""
    tests = tasks.load("gsm8k", "test", mirror.mirror())
    quotes = [text._problem(tests, i) for i in range(4)]
    folder = tmp_path / "mirror" / "text"
    for number, path in enumerate(sorted(folder.glob("*"))):
        some = [it for it in itertools.islice(text.hub.documents(path), 30) if it.strip()]
        some[7:7] = [f"They ask: {quote}" for quote in quotes[number % 3 :]]
        pq.write_table(pa.table({"text": some}), path)
    chats = [("Who?", "Me."), ("Why?", quotes[2].upper()), ("How?", "So.")]
    lines = [Conversation.ask(*it).messages for it in chats]
    rows = [{"messages": [{"role": m.role, "content": m.text} for m in it]} for it in lines]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = SMALL | {"data.source": "hub", "machine.mirror": str(tmp_path / "mirror")}
    given |= {"eval.tasks": ["gsm8k"], "tokenizer.vocab_size": 300, "sft.rows.mine": 8}
    return given | {"data.conversations": str(tmp_path / "mine.jsonl")}


def test_what_quotes_a_test_problem_is_left_out_of_all_training(quoting, tmp_path, monkeypatch):
    """Beside a run that leaves nothing out, and sets of words."""
    sources = []

    def source(**given):
        sources.append(RolloutSource(**given))
        return sources[-1]

    monkeypatch.setattr(training, "RolloutSource", source)
    whole = Run.open("smoke", str(tmp_path / "whole"), quoting)
    clean = Run.open("smoke", str(tmp_path / "clean"), quoting | {"data.drop_contaminated": True})
    for run in (whole, clean):
        for name in ("data", "tokenizer", "shards", "base", "mid", "sft", "grpo"):
            worker.work(name, run)
    problems = {
        it for texts in text._tests(clean).values() for its in map(naive, texts) for it in its
    }

    def kept(texts):
        return [it for it in texts if not problems & set(naive(it))]

    files = text.hub.text_files(clean.config, clean.mirror())
    read = [it for path in files.train for it in text.hub.documents(path)]
    tokenizer = _context(clean, "base").tokenizer
    *shards, held_out = (np.load(it) for part in text.shard_paths(clean) for it in np.ravel(part))
    said = tokenizer.decode(np.concatenate(shards)).split("<|bos|>")[1:]
    assert said == kept(read) and len(said) < len(read)
    assert tokenizer.merges == Tokenizer.train(kept(read), 300).merges
    validation = list(text.hub.documents(files.validation))
    assert tokenizer.decode(held_out).split("<|bos|>")[1:] == validation != kept(validation)
    dropped = 0
    for stage in ("mid", "sft"):
        for name, limit in text.limits(clean.config.recipe, stage).items():
            asked = [
                training._conversations(_context(it, stage), name, "train", limit)
                for it in (whole, clean)
            ]
            every, left = ([" ".join(m.text for m in it.messages) for it in its] for its in asked)
            assert left == kept(every)
            dropped += len(every) - len(left)
            counts = [
                training._mixture(_context(it, stage))[1]["conversations"][name]
                for it in (whole, clean)
            ]
            assert counts == [len(every), len(left)]
    assert dropped > 2  # of mine and of gsm8k
    questions = tasks.load("gsm8k", "train", clean.mirror())
    every, left = (it.usable for it in sources)
    left_out = [i for i in every if not kept([text._problem(questions, i)])]
    assert left == [i for i in every if i not in left_out] and len(left_out) > 10
    fingerprints = {it.stage("data").result()["fingerprint"] for it in (whole, clean)}
    assert len(fingerprints) == 2
    path = clean.stage("data").path / "overlap.json"
    found = json.loads(path.read_text())
    found["quoting"]["text"].pop()
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="differs from what run clean started with"):
        text._text_files(clean)


def test_a_source_of_nothing_but_quotes_is_named(quoting, tmp_path):
    only = (tmp_path / "mine.jsonl").read_text().splitlines()[1]
    (tmp_path / "mine.jsonl").write_text(only)
    run = Run.open("smoke", str(tmp_path / "run"), quoting | {"data.drop_contaminated": True})
    with pytest.raises(
        ValueError, match=r"all texts of mid: mine, sft: mine share .*drop_contaminated"
    ):
        worker.work("data", run)


def test_data_that_changed_under_a_run_is_refused(mirror, tmp_path):
    worker.work("data", mirror)
    worker.work("tokenizer", mirror)
    text = sorted((tmp_path / "mirror" / "text").glob("*.parquet"))
    shutil.copy(text[1], text[0])
    with pytest.raises(ValueError, match="differs from what run mirrored started with"):
        worker.work("shards", mirror)


def test_one_byte_of_a_benchmark_is_other_data(mirror, tmp_path):
    files = text.hub.text_files(mirror.config, mirror.mirror())
    before = text._fingerprint(mirror, files)
    benchmark = next((tmp_path / "mirror").glob("hub/openai/**/train*"))
    content = bytearray(benchmark.read_bytes())
    content[-9] ^= 1
    benchmark.write_bytes(content)
    assert text._fingerprint(mirror, files) != before


@pytest.mark.parametrize(
    ("missing", "without"),
    [
        ("eval_bundle.zip", {"eval.core_problems": 0}),
        ("openai/gsm8k/main/train", {"mid.rows.gsm8k": 0, "sft.rows.gsm8k": 0, "grpo.enabled": False}),
        ("cais/mmlu/all/auxiliary_train", {"mid.rows.mmlu": 0, "sft.rows.mmlu": 0}),
        ("allenai/ai2_arc/ARC-Easy/test", {"eval.tasks": ["facts"], "mid.rows.arc_easy": 0, "sft.rows.arc_easy": 0}),
        ("HuggingFaceTB/smol-smoltalk/test", {"mid.rows.smoltalk": 0, "sft.rows.smoltalk": 0}),
    ],
)  # fmt: skip
def test_what_a_later_stage_will_miss_is_told_at_the_beginning(mirror, tmp_path, missing, without):
    text.check_tasks(mirror)
    found = list((tmp_path / "mirror").glob(f"**/{missing}*"))
    assert found, sorted((tmp_path / "mirror").glob("**/*"))
    for path in found:
        path.unlink()
    with pytest.raises(ValueError, match="mirror"):
        text.check_tasks(mirror)
    overrides = SMALL | {"data.source": "hub", "machine.mirror": str(tmp_path / "mirror")}
    text.check_tasks(Run.open("smoke", str(tmp_path / "less"), overrides | without))


def test_grpo_misses_its_task_though_no_other_stage_reads_it(mirror, tmp_path):
    (problems,) = (tmp_path / "mirror").glob("**/openai/gsm8k/main/train*")
    problems.unlink()
    overrides = SMALL | {"data.source": "hub", "machine.mirror": str(tmp_path / "mirror")}
    alone = overrides | {"mid.rows.gsm8k": 0, "sft.rows.gsm8k": 0}
    with pytest.raises(ValueError, match="gsm8k"):
        text.check_tasks(Run.open("smoke", str(tmp_path / "alone"), alone))


def test_a_task_by_a_wrong_name(run):
    with pytest.raises(ValueError, match="no task 'arcs'; there are arc_easy"):
        tasks.load("arcs", "test", run.mirror())


def test_a_stage_before_its_needs(tmp_path):
    run = Run.open("smoke", str(tmp_path / "new"), SMALL)
    with pytest.raises(ValueError, match="no tokenizer"):
        _ = _context(run, "shards").tokenizer


def test_a_checkpoint_depends_on_the_recipe_up_to_its_stage(run, tmp_path):
    """So a run that differs in a later stage may take over what comes before."""
    fork = _fork(run, tmp_path / "fork", {"grpo.steps": 1, "eval.tasks": []})
    assert worker.work("grpo", fork)["steps"] == 1
    other = _fork(run, tmp_path / "other", {"sft.lr": 0.25})
    with pytest.raises(ValueError, match=r"sft\.lr"):
        worker.work("grpo", other)
