"""The training stages: base, mid, sft and grpo."""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanolib import checkpoint, planning, tasks
from nanolib.config import OptimConfig, up_to
from nanolib.conversation import Conversation
from nanolib.data.packing import IGNORED, TOKENS_AT_ONCE, Source
from nanolib.data.sources import ConversationSource, TextSource, render, save_conversations
from nanolib.evals import answers, score_all
from nanolib.evals.bpb import bits_per_byte
from nanolib.grpo import RolloutSource, policy_gradient
from nanolib.model import GPT
from nanolib.optim import MuonAdamW
from nanolib.rundir import Run, StageDir, whole_folder, write_json
from nanolib.stages import Context, Result, text
from nanolib.stages.text import chosen, limits, shard_paths, stage_seed, validation_documents
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox
from nanolib.train import Loss, Trainer, cross_entropy

SAVE_MINUTES_ON_CUDA = 10.0  # the default of machine.save_minutes on CUDA
SAVE_APART_ON_CUDA = 30.0  # seconds between saves, unless the stage's save_every is set
HELD_OUT = 100  # conversations per source in the held-out losses of mid and SFT

Score = Callable[[], dict[str, float]]


def base(context: Context) -> Result:
    """Pretrain on the token shards, with bits per byte on the validation shard."""
    training = Training(context)
    source = TextSource.open(shard_paths(context.run)[0], **training.row_settings())
    documents = validation_documents(context)

    def score() -> dict[str, float]:
        tokenizer, runtime = context.tokenizer, context.runtime
        return {"bpb": bits_per_byte(training.model, documents, tokenizer, runtime)}

    return training.run(source, len(source), source.batch_rows, score)


def converse(context: Context) -> Result:
    """The stages mid and sft: train on the assistant's tokens in a mixture of conversations."""
    training = Training(context)
    folder, about = _mixture(context)
    settings = training.row_settings()
    source = ConversationSource.open(folder / "train", **settings)
    settings["seed"] = context.run.config.recipe.seed  # the same held-out rows in every stage
    names = about["conversations"]
    held_out = [ConversationSource.open(folder / "held_out" / it, **settings) for it in names]

    def score() -> dict[str, float]:
        losses = map(training.validation_loss, held_out)
        return {f"{name}_loss": loss for name, loss in zip(names, losses, strict=True)}

    return training.run(source, len(source), source.batch_rows, score) | about


def grpo(context: Context) -> Result:
    """GRPO on graded answers, which may use the Python tool; see `nanolib.grpo`."""
    recipe, mirror, training = context.run.config.recipe, context.run.mirror(), Training(context)
    config, seed = recipe.grpo, stage_seed(recipe, "grpo", "grpo")
    with Sandbox() as sandbox:
        engine = context.engine(training.model, sandbox)

        def questions(split: str) -> answers.Questions:
            task = tasks.load_graded(config.task, split, mirror, config.sums)
            return answers.Questions(engine, task, config.max_new_tokens)

        train, test = questions("train"), questions("test")
        source = RolloutSource(
            questions=train,
            config=config,
            seed=seed,
            device_batch=training.device_batch,
            nll=training.nll,
            reference=training.reference,
            metrics=context.stage.metrics,
        )
        drop = {*text.left_out(context.run, f"grpo: {config.task}")}
        source.usable = [question for question in source.usable if question not in drop]
        held_out = test.usable()[: config.eval_questions]

        def score() -> dict[str, float]:
            progress = partial(context.progress, message="answers to held-out questions")
            greedy = answers.evaluate(test, held_out, progress)["accuracy"]
            return {"greedy": greedy} | answers.evaluate_sampled(
                test, held_out, config.eval_samples, seed, config.top_k, progress
            )

        loss = partial(policy_gradient, config)
        result = training.run(source, len(source.usable), config.questions, score, loss)
    return result | {"answers": result["steps"] * config.questions * config.samples}


class Training:
    """A training stage's model, micro-batch size and training run."""

    def __init__(self, context: Context):
        config, runtime, name = context.run.config, context.runtime, context.stage.name
        self.context, self.schedule = context, getattr(config.recipe, name)
        self.model = _initial_model(context)
        self.nll = self.compiled(self.model)
        # GRPO's reference policy, copied before the micro-batch is fitted to memory.
        leashed = name == "grpo" and config.recipe.grpo.kl > 0
        self.reference = self.compiled(copy.deepcopy(self.model)) if leashed else None
        share = planning.share_of(config.recipe, name, runtime.world_size)
        given = config.machine.device_batch
        self.device_batch = given or planning.fitting_rows(self.model, self.nll, share, runtime)
        if runtime.is_lead:
            print(f"micro-batch: {min(self.device_batch, share)} of a rank's {share} rows")

    def compiled(self, model: GPT) -> planning.Nll:
        """The model's `nll`, on CUDA through torch.compile."""
        if self.context.runtime.device.type != "cuda":
            return model.nll
        return model.compiled_nll(cudnn=self.context.stage.name != "grpo")  # rows vary in length

    def row_settings(self) -> dict[str, Any]:
        context, recipe = self.context, self.context.run.config.recipe
        length, stage = recipe.model.sequence_len, context.stage.name
        return {
            "length": length,
            "batch_rows": self.schedule.batch_tokens // length,
            "bos": context.tokenizer.bos,
            "seed": stage_seed(recipe, stage, stage),
            "rank": context.runtime.rank,
            "world_size": context.runtime.world_size,
            "device_batch": self.device_batch,
        }

    def run(
        self, source: Source, epoch: int, at_once: int, score: Score, loss: Loss = cross_entropy
    ) -> Result:
        """Train to the last step; returns the stage's result.

        epoch: rows or questions per epoch. at_once: the same per step.
        """
        context, runtime, stage = self.context, self.context.runtime, self.context.stage
        machine, schedule = context.run.config.machine, self.schedule
        steps = schedule.steps or math.ceil(schedule.epochs * epoch / at_once)
        every = max(1, steps // 10)
        cuda, usual = runtime.device.type == "cuda", schedule.save_every in (None, every)
        trainer = Trainer(
            stage=stage,
            model=self.model,
            nll=self.nll,
            optimizer=MuonAdamW(self.model, _optim(context), runtime),
            source=source,
            schedule=schedule,
            steps=steps,
            save_every=schedule.save_every or every,
            save_apart=SAVE_APART_ON_CUDA if cuda and usual else 0.0,
            save_minutes=machine.save_minutes or (SAVE_MINUTES_ON_CUDA if cuda else None),
            eval_every=schedule.eval_every or every,
            runtime=runtime,
            guard=context.guard,
            about=about_checkpoint(context.run, stage.name, context.tokenizer),
            loss=loss,
            score=score,
        )
        trainer.fit()
        runtime.barrier()
        return _result(stage, self.model) | {"epochs": steps * at_once / epoch}

    @torch.no_grad()
    def validation_loss(self, held_out: ConversationSource) -> float:
        """Mean loss in nats per target token on held-out conversations."""
        runtime, rows_at_once = self.context.runtime, max(1, TOKENS_AT_ONCE // held_out.length)

        def sums(rows: Sequence[int]) -> list[tuple[float, int]]:
            batch = held_out.batch(rows)
            with runtime.autocast():
                nll_BT = self.model.nll(batch.to(runtime.device))
            counts_B = (batch.targets_BT != IGNORED).sum(dim=1)
            return [*zip(nll_BT.sum(dim=1).tolist(), counts_B.tolist(), strict=True)]

        found = score_all(sums, range(len(held_out)), rows_at_once, runtime)
        nats, targets = zip(*found, strict=True)
        return sum(nats) / sum(targets)


def _initial_model(context: Context) -> GPT:
    """The model of the previous training stage, or a newly initialised one."""
    run, recipe, device = context.run, context.run.config.recipe, context.runtime.device
    earlier = recipe.models[: recipe.models.index(context.stage.name)]
    if not earlier:
        return GPT.build(recipe.model, recipe.tokenizer.vocab_size, device, recipe.seed)
    about = about_checkpoint(run, earlier[-1], context.tokenizer)
    return checkpoint.load_model(run.stage(earlier[-1]).checkpoints, device, about)


def about_checkpoint(run: Run, stage: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a stage's checkpoint depends on: the tokenizer and the recipe up to that stage."""
    recipe, vocab_size = up_to(run.config.recipe, stage), tokenizer.vocab_size
    return {"recipe": recipe, "vocab_size": vocab_size, "tokenizer": tokenizer.fingerprint()}


def _optim(context: Context) -> OptimConfig:
    """This stage's settings: like nanochat, clip in base only, warm up in base and mid only."""
    config, stage = context.run.config.recipe.optim, context.stage.name
    if stage == "base" or config.every_stage:
        return config
    warmup = config.momentum_warmup if stage == "mid" else 0
    return replace(config, clip=None, momentum_warmup=warmup)


def _result(stage: StageDir, model: GPT) -> Result:
    """A finished stage's result, from its metrics, so that resuming does not change it."""
    steps, scores = stage.metrics.rows("train"), stage.metrics.rows("eval")[-1]
    seconds, tokens = (sum(row[key] for row in steps) for key in ("seconds", "tokens"))
    found = {f"validation_{k}": v for k, v in scores.items() if k not in ("kind", "step")}
    found |= {"steps": len(steps), "train_loss": steps[-1]["loss"], "tokens": tokens}
    found |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
    return found | {"parameters": sum(p.numel() for p in model.parameters())}


# ---------------------------------------------------------------------------- the mixture


def _mixture(context: Context) -> tuple[Path, dict[str, Any]]:
    """The folder with a stage's rendered conversations, and their number per source.

    Rank 0 renders, all ranks memory-map. The folder's name is a hash of everything it depends on.
    """
    recipe, stage = context.run.config.recipe, context.stage
    config, data = getattr(recipe, stage.name), context.run.stage("data").result()
    rows, seed = limits(recipe, stage.name), recipe.seed if config.seed is None else config.seed
    about = [stage.name, seed, rows, recipe.model.sequence_len]
    about += [context.tokenizer.fingerprint(), HELD_OUT, data]
    about += [vars(config.sums)] if "sums" in rows else []
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    folder = stage.path / f"conversations-{key[:16]}"
    if context.runtime.is_lead and not folder.exists():
        with whole_folder(folder) as draft:
            _render_mixture(context, rows, draft)
    while not folder.exists():  # a barrier would not react to a stop request
        context.progress(0, 1, "waiting for rank 0 to render the conversations")
        time.sleep(0.1)
    return folder, json.loads((folder / "about.json").read_text())


def _render_mixture(context: Context, rows: Mapping[str, int | None], folder: Path) -> None:
    counts = dict.fromkeys(rows, 0)
    max_tokens = context.run.config.recipe.model.sequence_len + 1
    threads = torch.get_num_threads() * context.runtime.world_size  # the other ranks are idle

    def training() -> Iterator[Conversation]:
        for name, limit in rows.items():
            for conversation in _conversations(context, name, "train", limit):
                counts[name] += 1
                yield conversation

    def save(conversations: Iterator[Conversation], place: str) -> int:
        rendered = render(conversations, context.tokenizer, max_tokens, threads)
        return save_conversations(rendered, folder / place, context.tokenizer.vocab_size)

    cut = save(training(), "train")
    for name in rows:
        save(_conversations(context, name, "test", HELD_OUT), f"held_out/{name}")
    write_json(folder / "about.json", {"conversations": counts, "cut_tokens": cut})


def _conversations(
    context: Context, name: str, split: str, limit: int | None
) -> Iterator[Conversation]:
    task, order = chosen(context.run, context.stage.name, name, split, limit)
    for done, number in enumerate(order):
        context.progress(done, len(order), f"rendering {name} ({split})")
        yield task.conversation(int(number))
