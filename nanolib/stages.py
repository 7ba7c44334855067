"""The stages of the road: each assembles its parts, works, and leaves a done record.

    data → tokenizer → shards → base → mid → sft → grpo → eval → report

``python -m nanolib.stages NAME DIR [--of STAGE] [--machine JSON]`` is the worker that
`nanolib.launch` starts, once a rank. Readers and tests may call the functions themselves. Every
stage can be stopped and killed at any instant and goes on from what it had saved.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanolib import checkpoint, hub, planning, report, tasks
from nanolib.config import (
    MODELS,
    STAGES,
    BaseConfig,
    ConversationConfig,
    GRPOConfig,
    TokenizerConfig,
    flatten,
)
from nanolib.data import shards as token_shards
from nanolib.data import toyworld
from nanolib.data.packing import Batch
from nanolib.data.sources import ConversationSource, RowSource, TextSource
from nanolib.engine import Engine
from nanolib.evals import choices, core
from nanolib.evals.bpb import Trigram, bits_per_byte
from nanolib.evals.chatcore import chatcore
from nanolib.grpo import PolicyGradient, Quiz, Reward, RolloutSource, passes
from nanolib.guard import Guard
from nanolib.model import GPT
from nanolib.optim import MuonAdamW
from nanolib.rundir import Run, StageDir, now
from nanolib.runtime import Runtime, processor, seed_of
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox
from nanolib.train import Loss, Stopped, Trainer

Nll = Callable[[Batch], torch.Tensor]  # what `GPT.nll` is, compiled or not

USERS_MISTAKE, STOPPED = 2, 75  # exit codes of the worker
TRIGRAM_TOKENS = 20_000_000  # the baseline's training text is cut here
HELD_OUT = 100  # conversations of each source in mid's and SFT's held-out losses
SAMPLE_PROMPTS = 4  # openings of validation documents that the base model continues


@dataclass(kw_only=True)
class Context:
    """What every stage is given."""

    run: Run
    stage: StageDir
    runtime: Runtime
    guard: Guard
    of: str | None = None  # whose model an evaluation is of

    _told: float = 0.0  # when the last progress row was written

    def progress(self, done: int, total: int, message: str) -> None:
        """A progress row at most twice a second; raises Stopped when the guard asks for it."""
        if self.guard.stop_requested:
            raise Stopped(f"stopped at {message} ({done} of {total})")
        if self.runtime.is_lead and time.monotonic() - self._told > 0.5:
            self._told = time.monotonic()
            self.stage.metrics.append(kind="progress", step=done, steps=total, message=message)


# ---------------------------------------------------------------------------- data


def data(context: Context) -> dict[str, Any]:
    """Write the toy world, or find the text; record what the run is made of."""
    run = context.run
    if run.config.recipe.data.source == "toyworld":
        toyworld.write(context.stage.path / "mirror", run.config.recipe.seed)
    files = hub.text_files(run.config, run.mirror())
    check_tasks(run)
    return {
        "mirror": run.config.machine.mirror and str(run.mirror()),
        "fingerprint": _fingerprint(run, files),
        "train_files": [path.name for path in files.train],
        "validation_file": files.validation.name,
        "text_bytes": sum(path.stat().st_size for path in [*files.train, files.validation]),
        "code": report.code_base(),
    }


def check_tasks(run: Run) -> None:
    """Open what later stages will read, so that what is missing is told before the long wait."""
    recipe, mirror = run.config.recipe, run.mirror()
    if recipe.eval.core_problems != 0:
        core.load(hub.eval_bundle(mirror))
    for stage in (recipe.mid, recipe.sft):
        for name, limit in flatten(stage.rows).items():
            if stage.enabled and limit != 0:
                tasks.load(name, "train", mirror)
    if recipe.grpo.enabled:
        _graded_task(recipe.grpo.task, "train", mirror)
    if set(recipe.models) - {"base"}:
        for name in recipe.eval.tasks:
            tasks.load(name, "test", mirror)


def _fingerprint(run: Run, files: hub.TextFiles) -> str:
    """A hash of the names, sizes and ends (parquet footers) of everything a run reads."""
    digest = hashlib.sha256()
    mirror = run.mirror()
    others = [] if mirror is None else sorted(mirror.glob("hub/**/*.parquet"))
    others += [] if mirror is None else sorted(mirror.glob("eval_bundle.zip"))
    for path in [*files.train, files.validation, *others]:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 65_536))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return digest.hexdigest()[:16]


def _text_files(run: Run) -> hub.TextFiles:
    """The run's text, checked to be what the data stage recorded."""
    files = hub.text_files(run.config, run.mirror())
    record = run.stage("data").done()
    if record is not None and record["result"]["fingerprint"] != _fingerprint(run, files):
        raise ValueError(
            f"the data in {run.mirror() or 'the hub'} is not what run {run.id} began with; give "
            f"--mirror the folder it had, or use `--run NAME` for a run of its own"
        )
    return files


# ---------------------------------------------------------------------------- tokenizer


def tokenizer(context: Context) -> dict[str, Any]:
    """Train the run's tokenizer on its training text."""
    config = context.run.config.recipe.tokenizer
    files = _text_files(context.run)

    def stop_or_go(phase: str, done: int, total: int | None) -> None:
        context.progress(done, total or config.max_chars, phase)

    texts = _training_text(files.train, config)
    trained = Tokenizer.train(texts, config.vocab_size, progress=stop_or_go)
    trained.save(context.stage.path / "tokenizer.json")
    sample = _head(hub.documents(files.validation), 1_000_000)
    tokens = sum(len(ids) for ids in trained.encode_batch(sample))
    size = sum(len(text.encode()) for text in sample)
    return {
        "vocab_size": trained.vocab_size,
        "fingerprint": trained.fingerprint(),
        "validation_bytes_per_token": size / tokens,
    }


def _training_text(files: Iterable[Path], config: TokenizerConfig) -> Iterator[str]:
    """Documents cut at max_document_chars until max_chars are reached."""
    left = config.max_chars
    for path in files:
        for text in hub.documents(path):
            text = text[: min(left, config.max_document_chars)]
            left -= len(text)
            yield text
            if left <= 0:
                return


def _head(texts: Iterable[str], chars: int) -> list[str]:
    """The first texts, until `chars` are reached."""
    kept = []
    for text in texts:
        kept.append(text)
        chars -= len(text)
        if chars <= 0:
            break
    return kept


def load_tokenizer(run: Run) -> Tokenizer:
    """The run's tokenizer. Raises ValueError when it has none."""
    path = run.stage("tokenizer").path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"run {run.id} has no tokenizer yet: nanolib stage tokenizer")
    return Tokenizer.load(path)


# ---------------------------------------------------------------------------- shards


def shards(context: Context) -> dict[str, Any]:
    """Tokenize every text file; shards are shared out over the ranks, finished ones are kept."""
    run, runtime = context.run, context.runtime
    files = _text_files(run)
    texts = [*files.train, files.validation]
    encoder, folder = load_tokenizer(run), context.stage.path
    for number, text in enumerate(texts):
        target = token_shards.shard_path(folder, text)
        if number % runtime.ranks == runtime.rank and not target.exists():
            for documents in token_shards.tokenize(text, target, encoder, torch.get_num_threads()):
                context.progress(number, len(texts), f"{text.name}: {documents} documents")
    runtime.barrier()
    tokens = [np.load(token_shards.shard_path(folder, text), mmap_mode="r") for text in texts]
    return {
        "train_tokens": sum(map(len, tokens[:-1])),
        "train_documents": int(sum((shard == encoder.bos).sum() for shard in tokens[:-1])),
        "validation_tokens": len(tokens[-1]),
        "validation_bytes": int(encoder.byte_lengths[tokens[-1]].sum()),
    }


def shard_paths(run: Run) -> tuple[list[Path], Path]:
    """The token shards of training and of validation text."""
    record = run.stage("data").done()
    if record is None:
        raise ValueError(f"run {run.id} has no data yet: nanolib stage data")
    folder, result = run.stage("shards").path, record["result"]
    names = [*result["train_files"], result["validation_file"]]
    *train, validation = (token_shards.shard_path(folder, Path(name)) for name in names)
    return train, validation


# ---------------------------------------------------------------------------- training


def base(context: Context) -> dict[str, Any]:
    """Pretrain on the token shards; bits per byte on the validation shard as it goes."""
    run, config = context.run, context.run.config.recipe.base
    train, _ = shard_paths(run)
    student = _student(context)
    encoder = student.encoder
    source = TextSource.open(train, **_row_settings(context, config, student))
    assert config.steps is not None
    documents = validation_documents(run, encoder, config.eval_documents)

    def score(step: int) -> None:
        bpb = bits_per_byte(
            student.model, documents, encoder.byte_lengths, encoder.bos, context.runtime
        )
        _eval_row(context, step, bpb=bpb)

    return _train(context, config, student, source, config.steps, score) | {
        "epochs": config.steps * source.batch_rows / len(source)
    }


def mid(context: Context) -> dict[str, Any]:
    """Go on from base with conversations, four choices and word problems that use the tool."""
    return _converse(context, context.run.config.recipe.mid)


def sft(context: Context) -> dict[str, Any]:
    """Finetune on a small, clean mixture of the same kind."""
    return _converse(context, context.run.config.recipe.sft)


def _converse(context: Context, config: ConversationConfig) -> dict[str, Any]:
    """Train on conversations: the loss covers what the assistant says, nothing else."""
    student = _student(context)
    encoder, settings = student.encoder, _row_settings(context, config, student)
    mixture = {
        name: _conversations(context, name, "train", limit)
        for name, limit in flatten(config.rows).items()
        if limit != 0
    }
    source, cut = _render(encoder, [c for part in mixture.values() for c in part], settings)
    alike = settings | {"seed": context.run.config.recipe.seed}  # the same rows in every stage
    held = {
        name: _render(encoder, _conversations(context, name, "test", HELD_OUT), alike)[0]
        for name in mixture
    }
    steps = config.steps or math.ceil(config.epochs * len(source) / source.batch_rows)

    def score(step: int) -> None:
        losses = {
            f"{name}_loss": _validation_loss(student.model, rows, context.runtime)
            for name, rows in held.items()
        }
        _eval_row(context, step, **losses)

    _score_start(context, score)
    return _train(context, config, student, source, steps, score) | {
        "conversations": {name: len(part) for name, part in mixture.items()},
        "cut_tokens": cut,
        "epochs": steps * source.batch_rows / len(source),
    }


def grpo(context: Context) -> dict[str, Any]:
    """Learn from answers that can be graded, the tool running; see `nanolib.grpo`."""
    run, config, mirror = context.run, context.run.config.recipe.grpo, context.run.mirror()
    student = _student(context)
    seed = seed_of(run.config.recipe.seed, "grpo")
    with Sandbox() as sandbox:
        engine = _engine(context, student.model, student.encoder, sandbox)
        quiz, held = (
            Quiz(engine, _graded_task(config.task, split, mirror), config.max_new_tokens)
            for split in ("train", "test")
        )
        source = RolloutSource(
            quiz,
            questions=config.questions,
            samples=config.samples,
            seed=seed,
            temperature=config.temperature,
            top_k=config.top_k,
            updates_each=config.updates_each,
            device_batch=student.device_batch,
            reward=_shuffled(quiz, seed) if config.shuffled else None,
            nll=student.nll,
            metrics=context.stage.metrics,
        )
        steps = config.steps or math.ceil(config.epochs * len(quiz.usable) / config.questions)

        def score(step: int) -> None:
            tell = partial(context.progress, message="answers to held-out questions")
            asked = (config.eval_questions, config.eval_samples)
            _eval_row(context, step, **passes(held, *asked, seed, tell))

        _score_start(context, score)
        loss = PolicyGradient(config.clip)
        return _train(context, config, student, source, steps, score, loss) | {
            "epochs": steps * config.questions / len(quiz.usable),
            "answers": steps * config.questions * config.samples,
        }


def _graded_task(name: str, split: str, mirror: Path | None) -> tasks.GradedTask:
    task = tasks.load(name, split, mirror)
    if not isinstance(task, tasks.GradedTask):
        raise ValueError(f"grpo.task must be one whose answers are graded, got {name!r}; try gsm8k")
    return task


def _shuffled(quiz: Quiz, seed: int) -> Reward:
    """The control: the same rewards, dealt to a question's answers at random. Teaches nothing."""

    def reward(question: int, texts: Sequence[str]) -> list[float]:
        key = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        rng = np.random.default_rng(seed_of(seed, "shuffled", question, key))
        return rng.permutation(quiz.grade(question, texts)).tolist()

    return reward


def _row_settings(
    context: Context, config: BaseConfig | ConversationConfig, student: Student
) -> dict[str, Any]:
    run, runtime = context.run, context.runtime
    length = run.config.recipe.model.sequence_len
    return {
        "length": length,
        "batch_rows": config.batch_tokens // length,
        "bos": student.encoder.bos,
        "seed": seed_of(run.config.recipe.seed, context.stage.name),
        "rank": runtime.rank,
        "ranks": runtime.ranks,
        "device_batch": student.device_batch,
    }


@dataclass(frozen=True)
class Student:
    """What a training stage trains, and how much of it at once."""

    encoder: Tokenizer
    model: GPT
    nll: Nll  # of the model, compiled on CUDA
    device_batch: int  # rows in a micro-batch at most


def _student(context: Context) -> Student:
    """The model that a stage goes on with, and its micro-batch.

    Before the optimizer is made: on CUDA the rows are found by trying.
    """
    config, runtime = context.run.config, context.runtime
    encoder = load_tokenizer(context.run)
    model = _new_model(context, encoder)
    nll = model.compiled_nll() if runtime.device.type == "cuda" else model.nll
    length = config.recipe.model.sequence_len
    share = planning.share_of(config.recipe, context.stage.name, runtime.ranks)
    rows = config.machine.device_batch or planning.fitting_rows(model, nll, length, share, runtime)
    if runtime.is_lead:
        print(f"micro-batch: {min(rows, share)} of a rank's {share} rows", flush=True)
    return Student(encoder, model, nll, rows)


def _new_model(context: Context, encoder: Tokenizer) -> GPT:
    """A model with the weights of the run's training stage before this one, else drawn ones."""
    run, recipe = context.run, context.run.config.recipe
    vocab, device = recipe.tokenizer.vocab_size, context.runtime.device
    model = GPT.build(recipe.model, vocab, device, recipe.seed)
    earlier = recipe.models[: recipe.models.index(context.stage.name)]
    if earlier:
        found = checkpoint.latest(run.stage(earlier[-1]).checkpoints)
        if found is None:
            raise ValueError(
                f"run {run.id} has no {earlier[-1]} model: nanolib stage {earlier[-1]}"
            )
        checkpoint.check_same(found, about_checkpoint(run, earlier[-1], encoder))
        checkpoint.restore_model(found, model)
    return model


def about_checkpoint(run: Run, stage: str, encoder: Tokenizer) -> dict[str, Any]:
    """What a stage's checkpoint depends on: the tokenizer, and the recipe up to that stage."""
    later = {*MODELS[MODELS.index(stage) + 1 :], "eval"}
    recipe = flatten(run.config.recipe)
    return {
        "recipe": {path: recipe[path] for path in recipe if path.split(".")[0] not in later},
        "vocab_size": encoder.vocab_size,
        "tokenizer": encoder.fingerprint(),
    }


def _train(
    context: Context,
    config: BaseConfig | ConversationConfig | GRPOConfig,
    student: Student,
    source: RowSource | RolloutSource,
    steps: int,
    score: Callable[[int], None],
    loss: Loss | None = None,
) -> dict[str, Any]:
    """Run the trainer; the result is read off the metrics, so a resumed stage tells the same."""
    every = max(1, steps // 10)
    trainer = Trainer(
        stage=context.stage,
        model=student.model,
        nll=student.nll,
        optimizer=MuonAdamW(student.model, context.run.config.recipe.optim, context.runtime),
        source=source,
        schedule=config,
        steps=steps,
        save_every=config.save_every or every,
        eval_every=config.eval_every or every,
        runtime=context.runtime,
        guard=context.guard,
        about=about_checkpoint(context.run, context.stage.name, student.encoder),
        loss=loss,
        hooks=[lambda trainer: score(trainer.step)],
    )
    trainer.fit()
    context.runtime.barrier()
    rows = context.stage.metrics.rows()
    steps_done = [row for row in rows if row["kind"] == "train"]
    scores = [row for row in rows if row["kind"] == "eval"]
    seconds = sum(row["seconds"] for row in steps_done)
    tokens = sum(row["tokens"] for row in steps_done)
    final = {k: v for k, v in scores[-1].items() if k not in ("kind", "step")}
    return {
        "steps": steps,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "train_loss": steps_done[-1]["loss"],
        **{f"validation_{name}": value for name, value in final.items()},
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def _score_start(context: Context, score: Callable[[int], None]) -> None:
    """Score the model that the stage starts from, once."""
    if not any(row["kind"] == "eval" for row in context.stage.metrics.rows()):
        score(0)


def _eval_row(context: Context, step: int, **scores: float) -> None:
    if context.runtime.is_lead:
        context.stage.metrics.append(kind="eval", step=step, **scores)


def validation_documents(run: Run, encoder: Tokenizer, limit: int | None) -> list[np.ndarray]:
    """The first `limit` documents (None: all) of the validation shard, as ids with BOS."""
    _, validation = shard_paths(run)
    tokens = np.load(validation, mmap_mode="r")
    return token_shards.split_documents(tokens, encoder.bos)[:limit]


def _conversations(context: Context, name: str, split: str, limit: int | None) -> list:
    """Conversations of a task, the first `limit` in a seeded order."""
    task = tasks.load(name, split, context.run.mirror())
    purpose = context.stage.name if split == "train" else "held out"
    seed = seed_of(context.run.config.recipe.seed, "mixture", purpose, name)
    order = np.random.default_rng(seed).permutation(len(task))
    return [task.conversation(int(i)) for i in order[:limit]]


def _render(
    encoder: Tokenizer, conversations: list, settings: Mapping[str, Any]
) -> tuple[ConversationSource, int]:
    """Packed rows of conversations, and the tokens cut off those longer than a row."""
    rendered = [c.render(encoder, max_tokens=settings["length"] + 1) for c in conversations]
    usable = [r for r in rendered if any(r.mask[1:])]
    source = ConversationSource([r.ids for r in usable], [r.mask for r in usable], **settings)
    return source, sum(r.cut for r in rendered)


@torch.no_grad()
def _validation_loss(model: GPT, held: ConversationSource, runtime: Runtime) -> float:
    """Nats a token on held-out conversations, one pass, shared among the ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for number in range(held.rank, len(held), held.ranks):
        batch = held.batch([held.row(number)]).to(runtime.device)
        with runtime.autocast():
            nll_BT = model.nll(batch)
        sums += torch.stack([nll_BT.sum().double(), (batch.targets_BT >= 0).sum().double()])
    total, count = runtime.sum(sums).tolist()
    return total / count


# ---------------------------------------------------------------------------- eval

Score = Callable[[], dict[str, Any]]


def evaluate(context: Context) -> dict[str, Any]:
    """Score one stage's model; each task's score is kept as soon as it is known."""
    run, of = context.run, context.of or "base"
    encoder = load_tokenizer(run)
    model = checkpoint.load_model(run.stage(of).checkpoints, context.runtime.device)
    known = {
        row["task"]: row["scores"] for row in context.stage.metrics.rows() if row["kind"] == "score"
    }
    with Sandbox() as sandbox:
        engine = _engine(context, model, encoder, sandbox)
        parts = _text_scores(context, engine) | _core_scores(context, engine)
        if of != "base":
            parts |= _task_scores(context, engine)
        for number, (name, score) in enumerate(parts.items()):
            context.progress(number, len(parts), name)
            if name in known:
                continue
            known[name] = score()
            if context.runtime.is_lead:
                context.stage.metrics.append(
                    kind="score", step=number, task=name, scores=known[name]
                )
    return _with_means({name: known[name] for name in parts})


def _engine(context: Context, model: GPT, encoder: Tokenizer, sandbox: Sandbox) -> Engine:
    """An engine whose tool is the sandbox."""
    return Engine(model, encoder, context.runtime, lambda source: sandbox.run(source).text)


def _with_means(scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Scores with CORE and ChatCORE, where their parts are there."""
    core_parts = {name: part for name, part in scores.items() if name.startswith("core/")}
    if core_parts:
        scores["core"] = {"accuracy": core.core(core_parts), "tasks": len(core_parts)}
    chat = chatcore(scores)
    if chat is not None:
        scores["chatcore"] = {"accuracy": chat}
    return scores


def _text_scores(context: Context, engine: Engine) -> dict[str, Score]:
    """Bits per byte (of base beside a trigram's), and what base writes after a few openings."""
    run, encoder = context.run, engine.tokenizer
    documents = validation_documents(run, encoder, run.config.recipe.base.eval_documents)
    lengths = encoder.byte_lengths

    def compression() -> dict[str, Any]:
        bpb = bits_per_byte(engine.model, documents, lengths, encoder.bos, context.runtime)
        return {"bpb": bpb}

    def beside_trigram() -> dict[str, Any]:
        train, _ = shard_paths(run)
        tokens = np.concatenate([np.load(path, mmap_mode="r") for path in train])[:TRIGRAM_TOKENS]
        trigram = Trigram(tokens, encoder.vocab_size)
        return compression() | {
            "trigram_bpb": trigram.bits_per_byte(np.concatenate(documents), lengths)
        }

    def samples() -> dict[str, Any]:
        openings = [ids[: max(2, min(16, len(ids) // 4))].tolist() for ids in documents]
        openings = openings[:SAMPLE_PROMPTS]
        continued = engine.complete(openings, max_new_tokens=48)
        texts = [
            [encoder.decode(opening[1:]), encoder.decode(new)]
            for opening, new in zip(openings, continued, strict=True)
        ]
        return {"samples": texts}

    if context.of == "base":
        return {"compression": beside_trigram, "samples": samples}
    return {"compression": compression}


def _core_scores(context: Context, engine: Engine) -> dict[str, Score]:
    """CORE's tasks, as core/LABEL."""
    limit = context.run.config.recipe.eval.core_problems
    if limit == 0:
        return {}

    def score(task: core.CoreTask) -> Score:
        tell = partial(context.progress, message=f"core/{task.label}")
        return lambda: core.evaluate(
            engine.model, engine.tokenizer, task, context.runtime, limit=limit, progress=tell
        )

    bundle = core.load(hub.eval_bundle(context.run.mirror()))
    return {f"core/{task.label}": score(task) for task in bundle}


def _task_scores(context: Context, engine: Engine) -> dict[str, Score]:
    config, mirror = context.run.config.recipe.eval, context.run.mirror()

    def score(name: str) -> Score:
        return lambda: choices.evaluate(
            engine,
            tasks.load(name, "test", mirror),
            context.runtime,
            limit=config.max_problems,
            max_new_tokens=config.max_new_tokens,
            progress=partial(context.progress, message=name),
        )

    return {name: score(name) for name in config.tasks}


# ---------------------------------------------------------------------------- report


def write_report(context: Context) -> dict[str, Any]:
    """The report card, from the run directory alone."""
    report.build(context.run)
    return {"file": "report.md"}


# ---------------------------------------------------------------------------- the worker

WORK: dict[str, Callable[[Context], dict[str, Any]]] = {
    "data": data,
    "tokenizer": tokenizer,
    "shards": shards,
    "base": base,
    "mid": mid,
    "sft": sft,
    "grpo": grpo,
    "eval": evaluate,
    "report": write_report,
}


def work(name: str, run: Run, of: str | None = None) -> dict[str, Any]:
    """Do one stage in this process (one rank of it) and leave its done record."""
    stage = run.stage(name, of)
    started, clock = now(), time.perf_counter()
    stage.path.mkdir(parents=True, exist_ok=True)
    guard = Guard.start()  # first: joining ranks that are gone would wait for minutes
    runtime = Runtime.start(run.config.machine)
    context = Context(run=run, stage=stage, runtime=runtime, guard=guard, of=of)
    result = WORK[name](context)
    runtime.barrier()
    if runtime.is_lead:
        rate = run.config.machine.dollars_per_hour
        seconds = max(time.perf_counter() - clock, result.get("seconds", 0.0))
        stage.finish(
            result,
            started=started,
            seconds=seconds,
            dollars=None if rate is None else rate * seconds / 3600,
            machine=asdict(run.config.machine) | _hardware(runtime),
        )
    runtime.close()  # not after an error: it waits for the other ranks, who may wait for us
    return result


def _hardware(runtime: Runtime) -> dict[str, Any]:
    cuda = runtime.device.type == "cuda"
    return {
        "ranks": runtime.ranks,
        "device": torch.cuda.get_device_name(runtime.device) if cuda else processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> int:
    """One rank of one stage. Exit code 2: the user's mistake; 75: stopped and saved."""
    parser = argparse.ArgumentParser(prog="python -m nanolib.stages", description=main.__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("run", help="the run's directory")
    parser.add_argument("--of", help="whose model to evaluate")
    parser.add_argument("--machine", default="{}", help="machine settings as JSON")
    given = parser.parse_args()
    try:
        run = Run.load(str(Path(given.run).resolve()), machine=json.loads(given.machine))
        if run.stage(given.stage, given.of).done() is None:
            work(given.stage, run, given.of)
    except Stopped as stopped:
        print(stopped, flush=True)
        return STOPPED
    except (ValueError, FloatingPointError) as error:
        traceback.print_exc()  # for the log; the launcher shows its user the last line alone
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USERS_MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
