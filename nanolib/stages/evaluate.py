"""The scores of one stage's model, and the report card."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nanolib import checkpoint, hub, report, tasks
from nanolib.data.sources import first_tokens
from nanolib.engine import Engine
from nanolib.evals import answers, choices, core
from nanolib.evals.bpb import Trigram, bits_per_byte
from nanolib.stages import Context
from nanolib.stages.text import load_tokenizer, shard_paths, validation_documents
from nanolib.stages.training import make_engine
from nanolib.tools import Sandbox

TRIGRAM_TOKENS = 20_000_000  # the baseline's training text is cut here
SAMPLE_PROMPTS = 4  # openings of validation documents that the base model continues

Score = Callable[[], dict[str, Any]]


def evaluate(context: Context) -> dict[str, Any]:
    """Score one stage's model; a task that is scored is not scored again on resuming."""
    run, of = context.run, context.of or "base"
    tokenizer = load_tokenizer(run)
    model = checkpoint.load_model(run.stage(of).checkpoints, context.runtime.device)
    known = {
        row["task"]: row["scores"] for row in context.stage.metrics.rows() if row["kind"] == "score"
    }
    with Sandbox() as sandbox:
        engine = make_engine(context, model, tokenizer, sandbox)
        parts = _text_scores(context, engine) | _core_scores(context, engine)
        if of != "base":
            names = run.config.recipe.eval.tasks
            parts |= {name: partial(score_task, context, engine, name) for name in names}
        for number, (name, score) in enumerate(parts.items()):
            context.progress(number, len(parts), name)
            if name in known:
                continue
            scores = known[name] = score()
            if context.runtime.is_lead:
                context.stage.metrics.append(kind="score", step=number, task=name, scores=scores)
    return _with_means({name: known[name] for name in parts})


def _with_means(scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Scores with CORE and ChatCORE, where their parts are there."""
    core_parts = {name: part for name, part in scores.items() if name.startswith("core/")}
    if core_parts:
        scores["core"] = {"accuracy": core.core(core_parts), "tasks": len(core_parts)}
    if (chat := choices.chatcore(scores)) is not None:
        scores["chatcore"] = {"accuracy": chat}
    return scores


def _text_scores(context: Context, engine: Engine) -> dict[str, Score]:
    """Bits per byte (of base beside a trigram's), and what base writes after a few openings."""
    run, tokenizer = context.run, engine.tokenizer
    documents = validation_documents(run, tokenizer, run.config.recipe.base.eval_documents)

    def compression() -> dict[str, Any]:
        model, lengths, runtime = engine.model, tokenizer.byte_lengths, context.runtime
        scores = {"bpb": bits_per_byte(model, documents, lengths, tokenizer.bos, runtime)}
        if context.of == "base" and runtime.is_lead:  # gigabytes: once is enough
            tokens = first_tokens(shard_paths(run)[0], TRIGRAM_TOKENS)
            trigram = Trigram(tokens, tokenizer.vocab_size)
            scores["trigram_bpb"] = trigram.bits_per_byte(np.concatenate(documents), lengths)
        return scores

    def samples() -> dict[str, Any]:
        first = documents[:SAMPLE_PROMPTS]
        openings = [ids[: max(2, min(16, len(ids) // 4))].tolist() for ids in first]
        continued = engine.complete(openings, max_new_tokens=48)
        texts = [
            [tokenizer.decode(opening[1:]), tokenizer.decode(new)]
            for opening, new in zip(openings, continued, strict=True)
        ]
        return {"samples": texts}

    return {"compression": compression} | ({"samples": samples} if context.of == "base" else {})


def _core_scores(context: Context, engine: Engine) -> dict[str, Score]:
    """CORE's tasks, as core/LABEL."""
    limit = context.run.config.recipe.eval.core_problems
    if limit == 0:
        return {}

    def score(task: core.CoreTask) -> dict[str, Any]:
        progress = partial(context.progress, message=f"core/{task.label}")
        few = task.shuffled(limit)
        return core.evaluate(engine.model, engine.tokenizer, few, context.runtime, progress)

    bundle = core.load(hub.eval_bundle(context.run.mirror()))
    return {f"core/{task.label}": partial(score, task) for task in bundle}


def score_task(context: Context, engine: Engine, name: str) -> dict[str, Any]:
    """A task's scores on its first test questions. Raises ValueError where it has no answers."""
    config = context.run.config.recipe.eval
    task = tasks.load(name, "test", context.run.mirror())
    indices = range(len(task))[: config.max_problems]
    progress = partial(context.progress, message=name)
    if isinstance(task, tasks.ChoiceTask):
        return choices.evaluate(engine, task, indices, progress)
    if isinstance(task, tasks.GradedTask):
        questions = answers.Questions(engine, task, config.max_new_tokens)
        return answers.evaluate(questions, indices, progress)
    raise ValueError(f"eval.tasks names {name!r}, whose answers cannot be graded; leave it out")


def write_report(context: Context) -> dict[str, Any]:
    """The report card, from the run directory alone."""
    report.build(context.run)
    return {"file": "report.md"}
