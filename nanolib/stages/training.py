"""The stages that leave a model: base, mid, sft and grpo."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanolib import checkpoint, planning, tasks
from nanolib.config import BaseConfig, ConversationConfig, GRPOConfig, OptimConfig, flatten, up_to
from nanolib.conversation import Conversation
from nanolib.data.sources import (
    ConversationSource,
    RowSource,
    TextSource,
    render,
    save_conversations,
)
from nanolib.engine import Engine
from nanolib.evals import answers
from nanolib.evals.answers import Questions
from nanolib.evals.bpb import bits_per_byte
from nanolib.grpo import PolicyGradient, RolloutSource
from nanolib.model import GPT
from nanolib.optim import MuonAdamW
from nanolib.rundir import Run, whole_folder, write_json
from nanolib.runtime import Runtime, seed_of
from nanolib.stages import Context
from nanolib.stages.text import load_tokenizer, shard_paths, validation_documents
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox
from nanolib.train import CrossEntropy, Loss, Trainer

SAVE_MINUTES_ON_CUDA = 10.0  # unless machine.save_minutes is given
HELD_OUT = 100  # conversations of each source in mid's and SFT's held-out losses


def base(context: Context) -> dict[str, Any]:
    """Pretrain on the token shards; bits per byte on the validation shard as it goes."""
    run, config = context.run, context.run.config.recipe.base
    train, _ = shard_paths(run)
    setup = _setup(context)
    tokenizer = setup.tokenizer
    source = TextSource.open(train, **_row_settings(context, config, setup))
    assert config.steps is not None
    documents = validation_documents(run, tokenizer, config.eval_documents)

    def score(step: int) -> None:
        bpb = bits_per_byte(
            setup.model, documents, tokenizer.byte_lengths, tokenizer.bos, context.runtime
        )
        _eval_row(context, step, bpb=bpb)

    return _train(context, config, setup, source, config.steps, score) | {
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
    setup = _setup(context)
    settings = _row_settings(context, config, setup)
    folder, about = _mixture(context, config, setup.tokenizer)
    source = ConversationSource.open(folder / "train", **settings)
    alike = settings | {"seed": context.run.config.recipe.seed}  # the same rows in every stage
    held_out = {
        name: ConversationSource.open(folder / "held_out" / name, **alike)
        for name in about["conversations"]
    }
    steps = config.steps or math.ceil(config.epochs * len(source) / source.batch_rows)

    def score(step: int) -> None:
        losses = {
            f"{name}_loss": _validation_loss(setup.model, part, context.runtime)
            for name, part in held_out.items()
        }
        _eval_row(context, step, **losses)

    _score_start(context, score)
    return _train(context, config, setup, source, steps, score) | {
        **about,
        "epochs": steps * source.batch_rows / len(source),
    }


def grpo(context: Context) -> dict[str, Any]:
    """Learn from graded answers, with the tool at hand; see `nanolib.grpo`."""
    run, config, mirror = context.run, context.run.config.recipe.grpo, context.run.mirror()
    setup = _setup(context)
    seed = seed_of(run.config.recipe.seed, "grpo")
    with Sandbox() as sandbox:
        engine = make_engine(context, setup.model, setup.tokenizer, sandbox)
        train, test = (
            Questions(engine, tasks.load_graded(config.task, split, mirror), config.max_new_tokens)
            for split in ("train", "test")
        )
        source = RolloutSource(
            train,
            config,
            seed,
            device_batch=setup.device_batch,
            nll=setup.nll,
            metrics=context.stage.metrics,
        )
        held_out = test.usable()[: config.eval_questions]
        steps = config.steps or math.ceil(config.epochs * len(source.usable) / config.questions)

        def score(step: int) -> None:
            progress = partial(context.progress, message="answers to held-out questions")
            greedy = answers.evaluate(test, held_out, progress)["accuracy"]
            sampled = answers.evaluate_sampled(
                test, held_out, config.eval_samples, seed, config.top_k, progress
            )
            _eval_row(context, step, greedy=greedy, **sampled)

        _score_start(context, score)
        loss = PolicyGradient(config.clip)
        return _train(context, config, setup, source, steps, score, loss) | {
            "epochs": steps * config.questions / len(source.usable),
            "answers": steps * config.questions * config.samples,
        }


def _row_settings(
    context: Context, config: BaseConfig | ConversationConfig, setup: Setup
) -> dict[str, Any]:
    run, runtime = context.run, context.runtime
    length = run.config.recipe.model.sequence_len
    return {
        "length": length,
        "batch_rows": config.batch_tokens // length,
        "bos": setup.tokenizer.bos,
        "seed": seed_of(run.config.recipe.seed, context.stage.name),
        "rank": runtime.rank,
        "world_size": runtime.world_size,
        "device_batch": setup.device_batch,
    }


@dataclass(frozen=True)
class Setup:
    """What a training stage starts with."""

    tokenizer: Tokenizer
    model: GPT
    nll: planning.Nll  # of the model, compiled on CUDA
    device_batch: int  # most rows in a micro-batch


def _setup(context: Context) -> Setup:
    """The tokenizer, the model that a stage starts from, and its micro-batch.

    Call it before the optimizer is made: on CUDA the micro-batch is found by trying.
    """
    config, runtime = context.run.config, context.runtime
    tokenizer = load_tokenizer(context.run)
    model = _new_model(context, tokenizer)
    nll = model.nll
    if runtime.device.type == "cuda":
        nll = model.compiled_nll(cudnn=context.stage.name != "grpo")  # whose rows vary in length
    length = config.recipe.model.sequence_len
    share = planning.share_of(config.recipe, context.stage.name, runtime.world_size)
    rows = config.machine.device_batch or planning.fitting_rows(model, nll, length, share, runtime)
    if runtime.is_lead:
        print(f"micro-batch: {min(rows, share)} of a rank's {share} rows", flush=True)
    return Setup(tokenizer, model, nll, rows)


def _new_model(context: Context, tokenizer: Tokenizer) -> GPT:
    """The model of the training stage before this one, else one with initial weights."""
    run, recipe, device = context.run, context.run.config.recipe, context.runtime.device
    earlier = recipe.models[: recipe.models.index(context.stage.name)]
    if not earlier:
        return GPT.build(recipe.model, recipe.tokenizer.vocab_size, device, recipe.seed)
    about = about_checkpoint(run, earlier[-1], tokenizer)
    return checkpoint.load_model(run.stage(earlier[-1]).checkpoints, device, about)


def about_checkpoint(run: Run, stage: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a stage's checkpoint depends on: the tokenizer, and the recipe up to that stage."""
    return {
        "recipe": up_to(run.config.recipe, stage),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint(),
    }


def _train(
    context: Context,
    config: BaseConfig | ConversationConfig | GRPOConfig,
    setup: Setup,
    source: RowSource | RolloutSource,
    steps: int,
    score: Callable[[int], None],
    loss: Loss | None = None,
) -> dict[str, Any]:
    """Train to the last step; returns the stage's result."""
    runtime, machine = context.runtime, context.run.config.machine
    every = max(1, steps // 10)
    save_minutes = SAVE_MINUTES_ON_CUDA if runtime.device.type == "cuda" else None
    trainer = Trainer(
        stage=context.stage,
        model=setup.model,
        nll=setup.nll,
        optimizer=MuonAdamW(setup.model, _optim(context), runtime),
        source=source,
        schedule=config,
        steps=steps,
        save_every=config.save_every or every,
        save_minutes=machine.save_minutes or save_minutes,
        eval_every=config.eval_every or every,
        runtime=runtime,
        guard=context.guard,
        about=about_checkpoint(context.run, context.stage.name, setup.tokenizer),
        loss=loss or CrossEntropy(),
        score=lambda trainer: score(trainer.step),
    )
    trainer.fit()
    runtime.barrier()
    return _result(context, setup.model)


def _optim(context: Context) -> OptimConfig:
    """The recipe's, as far as it holds here: the original clips in base, warms up in base and mid."""
    config, stage = context.run.config.recipe.optim, context.stage.name
    if stage == "base" or config.every_stage:
        return config
    return replace(
        config, clip=None, momentum_warmup=config.momentum_warmup if stage == "mid" else 0
    )


def _result(context: Context, model: GPT) -> dict[str, Any]:
    """What a finished stage tells, from its metrics: the same however often it was resumed."""
    rows = context.stage.metrics.rows()
    steps_done = [row for row in rows if row["kind"] == "train"]
    scores = [row for row in rows if row["kind"] == "eval"]
    seconds = sum(row["seconds"] for row in steps_done)
    tokens = sum(row["tokens"] for row in steps_done)
    final = {k: v for k, v in scores[-1].items() if k not in ("kind", "step")}
    return {
        "steps": len(steps_done),
        "tokens": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
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


def _mixture(
    context: Context, config: ConversationConfig, tokenizer: Tokenizer
) -> tuple[Path, dict[str, Any]]:
    """The folder with a stage's rendered conversations, and how many of each source it has.

    The lead rank renders them once; every rank maps the files. The folder's name is a hash of all
    that they depend on, so a resumed stage finds its own and no other's.
    """
    recipe, stage = context.run.config.recipe, context.stage
    limits = {name: limit for name, limit in flatten(config.rows).items() if limit != 0}
    data = context.run.stage("data").done()
    about = [stage.name, recipe.seed, limits, recipe.model.sequence_len, tokenizer.fingerprint()]
    key = hashlib.sha256(json.dumps([*about, HELD_OUT, data and data["result"]]).encode())
    folder = stage.path / f"conversations-{key.hexdigest()[:16]}"
    if context.runtime.is_lead and not folder.exists():
        with whole_folder(folder) as draft:
            _render_mixture(context, limits, tokenizer, draft)
    while not folder.exists():  # rather than a barrier, which would not notice a stop
        context.progress(0, 1, "waiting for rank 0 to render the conversations")
        time.sleep(0.1)
    return folder, json.loads((folder / "about.json").read_text())


def _render_mixture(
    context: Context, limits: Mapping[str, int | None], tokenizer: Tokenizer, folder: Path
) -> None:
    counts = dict.fromkeys(limits, 0)
    max_tokens = context.run.config.recipe.model.sequence_len + 1
    threads = torch.get_num_threads() * context.runtime.world_size  # the other ranks wait

    def training() -> Iterator[Conversation]:
        for name, limit in limits.items():
            for conversation in _conversations(context, name, "train", limit):
                counts[name] += 1
                yield conversation

    def save(conversations: Iterator[Conversation], place: Path) -> int:
        rendered = render(conversations, tokenizer, max_tokens, threads)
        return save_conversations(rendered, place, tokenizer.vocab_size)

    cut = save(training(), folder / "train")
    for name in limits:
        save(_conversations(context, name, "test", HELD_OUT), folder / "held_out" / name)
    write_json(folder / "about.json", {"conversations": counts, "cut_tokens": cut})


def _conversations(
    context: Context, name: str, split: str, limit: int | None
) -> Iterator[Conversation]:
    """Conversations of a task, the first `limit` in a seeded order."""
    task = tasks.load(name, split, context.run.mirror())
    purpose = context.stage.name if split == "train" else "held out"
    seed = seed_of(context.run.config.recipe.seed, "mixture", purpose, name)
    order = np.random.default_rng(seed).permutation(len(task))[:limit]
    for done, number in enumerate(order):
        context.progress(done, len(order), f"rendering {name} ({split})")
        yield task.conversation(int(number))


@torch.no_grad()
def _validation_loss(model: GPT, held: ConversationSource, runtime: Runtime) -> float:
    """Nats a token on held-out conversations, one pass, shared among the ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for number in range(held.rank, len(held), held.world_size):
        batch = held.batch([held.row(number)]).to(runtime.device)
        with runtime.autocast():
            nll_BT = model.nll(batch)
        sums += torch.stack([nll_BT.sum().double(), (batch.targets_BT >= 0).sum().double()])
    total, count = runtime.sum(sums).tolist()
    return total / count


def make_engine(context: Context, model: GPT, tokenizer: Tokenizer, sandbox: Sandbox) -> Engine:
    """An engine whose tool is the sandbox."""
    return Engine(model, tokenizer, context.runtime, lambda source: sandbox.run(source).text)
