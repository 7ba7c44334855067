"""The stages that leave a model: base, mid, sft and grpo."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanolib import checkpoint, planning, tasks
from nanolib.config import ConversationConfig, OptimConfig, flatten, up_to
from nanolib.conversation import Conversation
from nanolib.data.packing import IGNORED
from nanolib.data.sources import (
    ConversationSource,
    RowSource,
    TextSource,
    render,
    save_conversations,
)
from nanolib.engine import Engine
from nanolib.evals import answers, score_all
from nanolib.evals.answers import Questions
from nanolib.evals.bpb import bits_per_byte
from nanolib.grpo import PolicyGradient, RolloutSource
from nanolib.model import GPT
from nanolib.optim import MuonAdamW
from nanolib.rundir import Run, StageDir, whole_folder, write_json
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
    config = context.run.config.recipe.base
    assert config.steps is not None
    training = Training(context)
    tokenizer = training.tokenizer
    shards, _ = shard_paths(context.run)
    source = TextSource.open(shards, **training.row_settings(config.batch_tokens))
    documents = validation_documents(context.run, tokenizer, config.eval_documents)

    def score() -> dict[str, float]:
        lengths, bos = tokenizer.byte_lengths, tokenizer.bos
        return {"bpb": bits_per_byte(training.model, documents, lengths, bos, context.runtime)}

    return training.run(source, config.steps, score) | {
        "epochs": config.steps * source.batch_rows / len(source)
    }


def converse(context: Context) -> dict[str, Any]:
    """Train on what the assistant says in a mixture of conversations: the stages mid and sft."""
    recipe = context.run.config.recipe
    config = recipe.mid if context.stage.name == "mid" else recipe.sft
    training = Training(context)
    settings = training.row_settings(config.batch_tokens)
    folder, about = _mixture(context, config, training.tokenizer)
    source = ConversationSource.open(folder / "train", **settings)
    alike = settings | {"seed": recipe.seed}  # the same rows in every stage
    held_out = {
        name: ConversationSource.open(folder / "held_out" / name, **alike)
        for name in about["conversations"]
    }
    steps = config.steps or math.ceil(config.epochs * len(source) / source.batch_rows)

    def score() -> dict[str, float]:
        return {
            f"{name}_loss": _validation_loss(training.model, part, context.runtime)
            for name, part in held_out.items()
        }

    return training.run(source, steps, score) | {
        **about,
        "epochs": steps * source.batch_rows / len(source),
    }


def grpo(context: Context) -> dict[str, Any]:
    """Learn from graded answers, with the tool at hand; see `nanolib.grpo`."""
    config, mirror = context.run.config.recipe.grpo, context.run.mirror()
    training = Training(context)
    seed = seed_of(context.run.config.recipe.seed, "grpo")
    with Sandbox() as sandbox:
        engine = make_engine(context, training.model, training.tokenizer, sandbox)
        train, test = (
            Questions(engine, tasks.load_graded(config.task, split, mirror), config.max_new_tokens)
            for split in ("train", "test")
        )
        source = RolloutSource(
            train,
            config,
            seed,
            device_batch=training.device_batch,
            nll=training.nll,
            metrics=context.stage.metrics,
        )
        held_out = test.usable()[: config.eval_questions]
        steps = config.steps or math.ceil(config.epochs * len(source.usable) / config.questions)

        def score() -> dict[str, float]:
            progress = partial(context.progress, message="answers to held-out questions")
            greedy = answers.evaluate(test, held_out, progress)["accuracy"]
            sampled = answers.evaluate_sampled(
                test, held_out, config.eval_samples, seed, config.top_k, progress
            )
            return {"greedy": greedy, **sampled}

        return training.run(source, steps, score, PolicyGradient(config.clip)) | {
            "epochs": steps * config.questions / len(source.usable),
            "answers": steps * config.questions * config.samples,
        }


class Training:
    """What a training stage starts with: tokenizer, model, micro-batch; and how it trains.

    Make it before the optimizer: on CUDA the micro-batch is found by trying.
    """

    def __init__(self, context: Context):
        config, runtime, name = context.run.config, context.runtime, context.stage.name
        self.context, self.tokenizer = context, load_tokenizer(context.run)
        self.model = _new_model(context, self.tokenizer)
        self.nll: planning.Nll = self.model.nll
        if runtime.device.type == "cuda":
            self.nll = self.model.compiled_nll(cudnn=name != "grpo")  # whose rows vary in length
        self.length = config.recipe.model.sequence_len
        share = planning.share_of(config.recipe, name, runtime.world_size)
        self.device_batch = config.machine.device_batch or planning.fitting_rows(
            self.model, self.nll, self.length, share, runtime
        )
        if runtime.is_lead:
            rows = min(self.device_batch, share)
            print(f"micro-batch: {rows} of a rank's {share} rows", flush=True)

    def row_settings(self, batch_tokens: int) -> dict[str, Any]:
        """Of a `RowSource`."""
        return {
            "length": self.length,
            "batch_rows": batch_tokens // self.length,
            "bos": self.tokenizer.bos,
            "seed": seed_of(self.context.run.config.recipe.seed, self.context.stage.name),
            "rank": self.context.runtime.rank,
            "world_size": self.context.runtime.world_size,
            "device_batch": self.device_batch,
        }

    def run(
        self,
        source: RowSource | RolloutSource,
        steps: int,
        score: Callable[[], dict[str, float]],
        loss: Loss | None = None,
    ) -> dict[str, Any]:
        """Train to the last step; returns the stage's result.

        `score` is also called before the first step, unless the weights are new.
        """
        context, runtime, stage = self.context, self.context.runtime, self.context.stage
        config = context.run.config
        schedule = getattr(config.recipe, stage.name)

        every = max(1, steps // 10)
        save_minutes = SAVE_MINUTES_ON_CUDA if runtime.device.type == "cuda" else None
        trainer = Trainer(
            stage=stage,
            model=self.model,
            nll=self.nll,
            optimizer=MuonAdamW(self.model, _optim(context), runtime),
            source=source,
            schedule=schedule,
            steps=steps,
            save_every=schedule.save_every or every,
            save_minutes=config.machine.save_minutes or save_minutes,
            eval_every=schedule.eval_every or every,
            runtime=runtime,
            guard=context.guard,
            about=about_checkpoint(context.run, stage.name, self.tokenizer),
            loss=loss or CrossEntropy(),
            score=lambda trainer: self._record(trainer.step, score()),
        )
        if stage.name != "base" and not _rows(stage, "eval"):
            self._record(0, score())
        trainer.fit()
        runtime.barrier()
        return _result(stage, self.model)

    def _record(self, step: int, scores: dict[str, float]) -> None:
        if self.context.runtime.is_lead:
            self.context.stage.metrics.append(kind="eval", step=step, **scores)


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


def _optim(context: Context) -> OptimConfig:
    """The recipe's, as far as it holds here: the original clips in base, warms up in base and mid."""
    config, stage = context.run.config.recipe.optim, context.stage.name
    if stage == "base" or config.every_stage:
        return config
    return replace(
        config, clip=None, momentum_warmup=config.momentum_warmup if stage == "mid" else 0
    )


def _result(stage: StageDir, model: GPT) -> dict[str, Any]:
    """A finished stage's result, from its metrics: the same however often it was resumed."""
    steps, scores = _rows(stage, "train"), _rows(stage, "eval")
    seconds = sum(row["seconds"] for row in steps)
    tokens = sum(row["tokens"] for row in steps)
    final = {k: v for k, v in scores[-1].items() if k not in ("kind", "step")}
    return {
        "steps": len(steps),
        "tokens": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": steps[-1]["loss"],
        **{f"validation_{name}": value for name, value in final.items()},
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def _rows(stage: StageDir, kind: str) -> list[dict[str, Any]]:
    """The stage's metrics of one kind."""
    return [row for row in stage.metrics.rows() if row["kind"] == kind]


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
    """Nats a token on held-out conversations."""

    def sums(rows: Sequence[int]) -> list[tuple[float, int]]:
        batch = held.batch([held.row(number) for number in rows]).to(runtime.device)
        with runtime.autocast():
            nll = model.nll(batch).sum()
        return [(float(nll), int((batch.targets_BT != IGNORED).sum()))]

    nats, targets = zip(*score_all(sums, range(len(held)), 1, runtime), strict=True)
    return sum(nats) / sum(targets)


def make_engine(context: Context, model: GPT, tokenizer: Tokenizer, sandbox: Sandbox) -> Engine:
    """An engine whose tool is the sandbox."""
    return Engine(model, tokenizer, context.runtime, lambda source: sandbox.run(source).text)
