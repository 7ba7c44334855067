"""The stages eval (scores of one stage's model) and report (the report card)."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from nanolib import checkpoint, report, tasks
from nanolib.data.sources import first_tokens
from nanolib.engine import Engine
from nanolib.evals import answers, choices, core
from nanolib.evals.bpb import Trigram, bits_per_byte
from nanolib.stages import Context, Result
from nanolib.stages.text import shard_paths, validation_documents
from nanolib.tools import Sandbox

TRIGRAM_TOKENS = 20_000_000  # at most, to fit the trigram baseline
SAMPLE_PROMPTS = 4  # beginnings of validation documents for the base model to continue


def evaluate(context: Context) -> Result:
    """Score one stage's model; a resumed evaluation skips tasks that already have scores."""
    run, of, metrics = context.run, context.stage.of, context.stage.metrics
    assert of is not None
    config, documents = run.config.recipe, validation_documents(context)
    model = checkpoint.load_model(run.stage(of).checkpoints, context.runtime.device)
    known = {row["task"]: row["scores"] for row in metrics.rows("score")}
    limit = config.eval.core_problems
    core_tasks = core.load(run.mirror() / "eval_bundle.zip") if limit != 0 else []
    with Sandbox() as sandbox:
        engine = context.engine(model, sandbox)
        parts = {"compression": partial(compression, context, engine, documents)}
        if of == "base":
            parts["samples"] = partial(samples, engine, documents[:SAMPLE_PROMPTS])
        for task in core_tasks:
            progress = partial(context.progress, message=(name := f"core/{task.label}"))
            parts[name] = partial(core.evaluate, engine, task.shuffled(limit), progress)
        for name in config.eval.tasks if of != "base" else ():
            parts[name] = partial(score_task, context, engine, name)
        for number, (name, score) in enumerate(parts.items()):
            context.progress(number, len(parts), name)
            if name not in known:
                known[name] = score()
                if context.runtime.is_lead:
                    metrics.append(kind="score", step=number, task=name, scores=known[name])
    scores = {name: known[name] for name in parts}
    if core_tasks:
        of_tasks = {task.label: scores[f"core/{task.label}"] for task in core_tasks}
        scores["core"] = {"accuracy": core.core(of_tasks), "tasks": len(core_tasks)}
    if (chat := choices.chatcore(scores)) is not None:
        scores["chatcore"] = {"accuracy": chat}
    return scores


def compression(context: Context, engine: Engine, documents: Sequence[np.ndarray]) -> Result:
    runtime, tokenizer = context.runtime, engine.tokenizer
    scores = {"bpb": bits_per_byte(engine.model, documents, tokenizer, runtime)}
    if context.stage.of == "base" and runtime.is_lead:  # on one rank only: it takes gigabytes
        tokens = first_tokens(shard_paths(context.run)[0], TRIGRAM_TOKENS)
        trigram, text = Trigram(tokens, tokenizer.vocab_size), np.concatenate(documents)
        scores["trigram_bpb"] = trigram.bits_per_byte(text, tokenizer.byte_lengths)
    return scores


def samples(engine: Engine, documents: Sequence[np.ndarray]) -> Result:
    """The model's continuations of the beginnings of documents."""
    openings = [ids[: max(2, min(16, len(ids) // 4))].tolist() for ids in documents]
    pairs = zip(openings, engine.complete(openings, max_new_tokens=48), strict=True)
    decode = engine.tokenizer.decode
    return {"samples": [[decode(opening[1:]), decode(new)] for opening, new in pairs]}


def score_task(context: Context, engine: Engine, name: str) -> Result:
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


def write_report(context: Context) -> Result:
    report.build(context.run)
    return {"file": "report.md"}
