"""The report card: one Markdown file that says what a run did, from its directory alone.

Every number stands under the name of the file it was read from; what is missing is said to be.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanolib import accounting
from nanolib import markdown as md
from nanolib.config import MODELS, REPOSITORY, as_text, flatten, recipe_difference
from nanolib.progress import clock
from nanolib.rundir import Run, StageDir, write_atomic

Scores = dict[str, dict[str, Any]]  # task -> what was measured

SAMPLES = 8  # shown of each evaluation

# The system this course rebuilds, at depth 20 (its own report of October 2025): column, task.
ORIGINAL = {
    "base": {"core": 0.2219},
    "mid": {
        "arc_challenge": 0.2875,
        "arc_easy": 0.3561,
        "gsm8k": 0.0250,
        "humaneval": 0.0671,
        "mmlu": 0.3111,
        "chatcore": 0.0730,
    },
    "sft": {
        "arc_challenge": 0.2807,
        "arc_easy": 0.3876,
        "gsm8k": 0.0455,
        "humaneval": 0.0854,
        "mmlu": 0.3151,
        "chatcore": 0.0884,
    },
    "grpo": {"gsm8k": 0.0758},
}
COLUMNS = {"base": "BASE", "mid": "MID", "sft": "SFT", "grpo": "RL"}
LABELS = {
    "arc_challenge": "ARC-Challenge",
    "arc_easy": "ARC-Easy",
    "chatcore": "ChatCORE",
    "core": "CORE",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "mmlu": "MMLU",
    "bpb": "bits per byte",
    "trigram_bpb": "bits per byte of a token trigram",
}


def build(run: Run) -> str:
    """Write ``report.md`` into the run's directory and return its text.

    The same directory always gives the same text.
    """
    sections = [
        *(_head, _summary, _levels, _costs, _machine, _model, _data),
        *(_training, _evaluations, _core, _samples, _code),
    ]
    lines = [line for section in sections for line in [*section(run), ""]]
    text = "\n".join(lines).rstrip() + "\n"
    write_atomic(run.path / "report.md", text)
    return text


# ---------------------------------------------------------------------------- what there is


def _stages(run: Run) -> list[StageDir]:
    """Every stage the run should have, in order; evaluations once a model."""
    return [run.stage(*name) for name in _names(run)]


def _names(run: Run) -> list[tuple[str, str | None]]:
    recipe = run.config.recipe
    models = recipe.models
    names = ["data", "tokenizer", "shards", *models]
    return [(name, None) for name in names] + [("eval", name) for name in models]


def _title(stage: StageDir) -> str:
    return stage.name if stage.path.name == stage.name else f"{stage.name}/{stage.path.name}"


def _state(stage: StageDir) -> str:
    """Whether a stage is finished, and how far it came if not."""
    if stage.done():
        return "finished"
    kinds = ("train",) if stage.name in MODELS else ("train", "progress")
    rows = [row for row in stage.metrics.rows() if row["kind"] in kinds]
    last = rows[-1] if rows else None
    if last is None:
        return "not begun"
    return f"unfinished, at {last['step']:,} of {last['steps']:,}"


def _result(stage: StageDir) -> dict[str, Any]:
    record = stage.done()
    return record["result"] if record else {}


# ---------------------------------------------------------------------------- sections


def _head(run: Run) -> Iterator[str]:
    recipe, manifest = run.config.recipe, run.manifest()
    yield f"# Report card of run `{run.id}`"
    yield ""
    model, vocab = recipe.model, recipe.tokenizer.vocab_size
    data = "the toy world" if recipe.data.source == "toyworld" else "real text"
    yield (
        f"Profile `{run.config.profile}`, made {manifest['created']}: depth {model.depth}, width "
        f"{model.width}, vocabulary {vocab:,}, {model.parameters(vocab):,} parameters, trained on "
        f"{data}. Source: `manifest.json`."
    )
    changed = manifest.get("overrides") or {}
    if changed:
        yield ""
        yield "Set by hand: " + ", ".join(f"`{key} = {value}`" for key, value in changed.items())
    states = [(_title(stage), _state(stage)) for stage in _stages(run)]
    missing = [f"{title} ({state})" for title, state in states if state != "finished"]
    if missing:
        yield ""
        yield f"**Not finished:** {', '.join(missing)}. What follows is what there is."


def _summary(run: Run) -> Iterator[str]:
    """BASE and SFT side by side, and the original beside them."""
    yield "## Summary"
    yield ""
    found = _all_measures(run)
    measures = dict.fromkeys(measure for _, measure in found)
    if not measures:
        yield "No evaluation is finished."
        return
    chances = {
        task: scores.get("chance") for n in MODELS for task, scores in _scores(run, n).items()
    }
    models = run.config.recipe.models
    rows = []
    for measure in measures:
        task = measure.split(", ")[0]
        ours = [*(found.get((name, measure)) for name in models), chances.get(task)]
        asked_alike = measure == task or measure.endswith("letters")
        theirs = [ORIGINAL[name].get(task) if asked_alike else None for name in models]
        rows.append([_measure_label(measure), *map(md.score, [*ours, *theirs])])
    ours = [COLUMNS[name] for name in models]
    header = ["", *ours, "chance", *(f"original {name}" for name in ours)]
    yield from md.table(header, rows)
    yield ""
    yield (
        "Source: `eval/*/done.json`. The original is the system this course rebuilds, at depth 20 "
        "with 561 M parameters on the real tasks (its report of October 2025)."
    )
    if run.config.recipe.data.source == "toyworld":
        yield "This run's tasks are the toy world's: only their form is the original's."


@dataclass(frozen=True)
class Level:
    """A step of a game: a score of some model that some known system has reached."""

    name: str
    task: str
    score: str
    bar: float
    toy: bool = False  # of the toy world; the others are of the real tasks


LEVELS = (
    Level("Reads: half of a trigram's bits per byte", "compression", "ratio", 0.5, toy=True),
    Level("Remembers: four of five facts, told in words", "facts", "accuracy", 0.8, toy=True),
    Level("Calculates: two of five word problems", "gsm8k", "accuracy", 0.4, toy=True),
    Level("Programs: one of two functions", "humaneval", "accuracy", 0.5, toy=True),
    Level("Reads: below a trigram's bits per byte", "compression", "ratio", 1.0),
    Level("Guesses no more: ARC-Easy by text at 30 %", "arc_easy", "text", 0.30),
    Level("The original's SFT on GSM8K", "gsm8k", "accuracy", 0.0455),
    Level("The original's RL on GSM8K", "gsm8k", "accuracy", 0.0758),
    Level("The original's ChatCORE", "chatcore", "accuracy", 0.0884),
    Level("The original's CORE (depth 20)", "core", "accuracy", 0.2219),
    Level("GPT-2's CORE (1.6 B parameters)", "core", "accuracy", 0.2565),
)


def _levels(run: Run) -> Iterator[str]:
    """Which known marks some model of the run has reached."""
    yield "## Levels"
    yield ""
    toy = run.config.recipe.data.source == "toyworld"
    rows = []
    for level in (level for level in LEVELS if level.toy == toy):
        less_is_better = level.score == "ratio"
        best = _best(run, level)
        passed = best is not None and (best <= level.bar if less_is_better else best >= level.bar)
        sign = "≤" if less_is_better else "≥"
        mark = "passed" if passed else "not yet"
        rows.append([level.name, f"{sign} {level.bar:g}", md.score(best), mark])
    yield from md.table(["level", "bar", "best of this run", ""], rows)
    yield ""
    yield (
        "Source: `eval/*/done.json`; the original's figures are of October 2025, GPT-2's CORE "
        "(0.256525) is that of nanochat's leaderboard."
    )


def _best(run: Run, level: Level) -> float | None:
    """The best score of a level over the run's models."""
    scores = [_scores(run, name).get(level.task, {}) for name in MODELS]
    if level.score == "ratio":
        ratios = [s["bpb"] / s["trigram_bpb"] for s in scores if "trigram_bpb" in s]
        return min(ratios, default=None)
    return max((float(s[level.score]) for s in scores if level.score in s), default=None)


def _costs(run: Run) -> Iterator[str]:
    """Time, speed and money of each stage."""
    yield "## Time and cost"
    yield ""
    recipe, records = run.config.recipe, [(stage, stage.done()) for stage in _stages(run)]
    rows, seconds, money = [], 0.0, []
    for stage, record in records:
        if record is None:
            rows.append([_title(stage), _state(stage), md.DASH, md.DASH, md.DASH, md.DASH])
            continue
        result, machine = record["result"], record.get("machine", {})
        speed = result.get("tokens_per_second")
        share = (
            stage.name == "base"
            and speed
            and accounting.mfu(
                recipe.model,
                recipe.tokenizer.vocab_size,
                tokens_per_second=speed,
                device=str(machine.get("device")),
                ranks=machine.get("ranks", 1),
            )
        )
        seconds += record["seconds"]
        money.append(record.get("dollars"))
        rows.append(
            [
                _title(stage),
                clock(record["seconds"]),
                md.number(result.get("tokens")),
                md.DASH if speed is None else f"{speed:,.0f}",
                f"{share:.1%}" if share else md.DASH,
                md.dollars(money[-1]),
            ]
        )
    priced = [m for m in money if m is not None]
    total = md.dollars(sum(priced) if priced else None)
    rows.append(["**all**", f"**{clock(seconds)}**", "", "", "", f"**{total}**"])
    yield from md.table(["stage", "time", "tokens", "tokens/s", "MFU", "cost"], rows)
    yield ""
    yield (
        "Source: each stage's `done.json`. Tokens are those learned from (in SFT what the assistant "
        "says). MFU: base's share of the device's bfloat16 peak, where known. Cost: time x "
        "`machine.dollars_per_hour`, where given."
    )


def _machine(run: Run) -> Iterator[str]:
    """What it was computed on; once if all stages agree."""
    yield "## Environment"
    yield ""
    records = [(_title(stage), stage.done()) for stage in _stages(run)]
    machines = {title: record.get("machine", {}) for title, record in records if record}
    keys = dict.fromkeys(key for machine in machines.values() for key in machine)
    rows = []
    for key in keys:
        values = {title: machine.get(key) for title, machine in machines.items()}
        if all(value is None for value in values.values()):
            continue
        alike = len(set(map(str, values.values()))) == 1
        one = next(iter(values.values()))
        shown = one if alike else ", ".join(f"{title}: {value}" for title, value in values.items())
        rows.append([key, str(shown)])
    yield from md.table(["", ""], rows) if rows else ["No stage is finished."]
    if rows:
        yield ""
        yield "Source: `machine` in each stage's `done.json`."


def _model(run: Run) -> Iterator[str]:
    yield "## Model"
    yield ""
    model, vocab = run.config.recipe.model, run.config.recipe.tokenizer.vocab_size
    counts = model.parts(vocab)
    flops = accounting.training_flops(model, vocab)
    rows = [
        ["depth x width", f"{model.depth} x {model.width}"],
        ["heads (key/value heads)", f"{model.heads} ({model.num_kv_heads})"],
        ["context", f"{model.sequence_len:,} tokens"],
        *([f"parameters, {part}", f"{count:,}"] for part, count in counts.items()),
        ["parameters", f"{sum(counts.values()):,}"],
        ["training FLOPs a token", f"{flops:.3g}"],
    ]
    tokens = _result(run.stage("base")).get("tokens")
    if tokens:
        rows.append(["base: tokens a parameter", f"{tokens / sum(counts.values()):.2f}"])
        rows.append(["base: training FLOPs", f"{flops * tokens:.3g}"])
    yield from md.table(["", ""], rows)
    yield ""
    yield "Source: counted by `nanolib.accounting` from the recipe in `manifest.json`"
    yield "and the tokens in `base/done.json`."


def _data(run: Run) -> Iterator[str]:
    yield "## Data and tokenizer"
    for name in ("data", "tokenizer", "shards"):
        yield from ["", f"### {name}", ""]
        yield from _result_table(run.stage(name))


def _training(run: Run) -> Iterator[str]:
    """Each training stage: its result, its loss as a curve, its scores along the way."""
    yield "## Training"
    for stage in _stages(run):
        if stage.name not in MODELS:
            continue
        yield from ["", f"### {stage.name}", ""]
        yield from _result_table(stage)
        rows = stage.metrics.rows()
        losses = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
        rewards = [(row["step"], row["reward"]) for row in rows if row["kind"] == "rollout"]
        curve, name = (
            (rewards, "Mean reward") if rewards else (losses, "Training loss, nats a token")
        )
        if curve:
            yield from ["", f"{name}, by step:", "", "```text"]
            yield from md.chart(curve)
            yield "```"
        scores = [row for row in rows if row["kind"] == "eval"]
        if scores:
            names = [key for key in scores[-1] if key not in ("kind", "step", "steps", "time")]
            shown = md.thinned(scores, 12)
            yield from ["", "On held-out data:", ""]
            yield from md.table(
                ["step", *(LABELS.get(name, name.replace("_", " ")) for name in names)],
                [[f"{row['step']:,}", *(md.score(row.get(n)) for n in names)] for row in shown],
            )
        if losses or scores:
            yield from ["", f"Source: `{stage.name}/metrics.jsonl`."]


def _evaluations(run: Run) -> Iterator[str]:
    yield "## Evaluations"
    for stage in _stages(run):
        if stage.name != "eval":
            continue
        yield from ["", f"### {stage.path.name}", ""]
        scores = {
            task: values
            for task, values in _scores(run, stage.path.name).items()
            if not task.startswith("core/")
        }
        columns = dict.fromkeys(key for task in scores.values() for key in task)
        if not columns:
            yield f"{_state(stage).capitalize()}."
            continue
        rows = [
            [LABELS.get(task, task), *(md.score(values.get(key)) for key in columns)]
            for task, values in scores.items()
        ]
        yield from md.table(["task", *(LABELS.get(column, column) for column in columns)], rows)
        yield from ["", f"Source: `{_title(stage)}/done.json`."]


def _core(run: Run) -> Iterator[str]:
    """CORE's tasks one by one, a column a model."""
    models = [name for name in MODELS if _core_tasks(run, name)]
    if not models:
        return
    yield "## CORE"
    yield ""
    tasks = {name: _core_tasks(run, name) for name in models}
    rows = []
    for label in dict.fromkeys(label for found in tasks.values() for label in found):
        known = [tasks[name].get(label, {}) for name in models]
        about = next(scores for scores in known if scores)
        questions = [md.number(about.get(key)) for key in ("shots", "questions")]
        accuracies = [md.score(scores.get("accuracy")) for scores in known]
        rows.append([label, *questions, md.score(about.get("chance")), *accuracies])
    means = [_scores(run, name).get("core", {}).get("accuracy") for name in models]
    rows.append(["**CORE** (mean of centred)", "", "", "", *map(md.score, means)])
    columns = [COLUMNS[name] for name in models]
    yield from md.table(["task", "shots", "questions", "chance", *columns], rows)
    yield ""
    yield "Accuracies; centred means (accuracy − chance) / (1 − chance). Source: `eval/*/done.json`."


def _core_tasks(run: Run, model: str) -> Scores:
    scores = _scores(run, model)
    return {t.removeprefix("core/"): s for t, s in scores.items() if t.startswith("core/")}


def _samples(run: Run) -> Iterator[str]:
    """What the models say, verbatim."""
    yield "## Samples"
    found = False
    for stage in _stages(run):
        samples, source = list(_texts(_result(stage)))[:SAMPLES], "done.json"
        rollouts = [row for row in stage.metrics.rows() if row["kind"] == "rollout"]
        if rollouts:
            samples, source = rollouts[-1]["samples"], "metrics.jsonl"
        if samples:
            found = True
            yield from [
                "",
                f"From `{_title(stage)}/{source}`: what was given, then what came.",
                "",
            ]
            yield from md.fenced("\n\n".join(map(md.quoted, samples)))
    if not found:
        yield from ["", "No samples were recorded."]


# ---------------------------------------------------------------------------- the code base


def code_base() -> dict[str, int]:
    """Lines of this checkout by part, blank ones left out, and its direct dependencies."""
    parts = {
        "nanolib": "nanolib/**/*.py",
        "rust_tokenizer": "rust_tokenizer/src/*.rs",
        "notebooks": "notebooks/*.py",
        "tests": "tests/*.py",
    }
    counts = {
        f"{name} lines": sum(
            bool(line.strip())
            for path in REPOSITORY.glob(pattern)
            for line in path.read_text(encoding="utf-8").splitlines()
        )
        for name, pattern in parts.items()
    }
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return counts | {"dependencies": len(project["dependencies"])}


def _code(run: Run) -> Iterator[str]:
    code = _result(run.stage("data")).get("code")
    if not code:
        return
    yield "## Code base"
    yield ""
    yield from md.table(["", ""], [[name, md.number(count)] for name, count in code.items()])
    yield ""
    yield "When the run began; blank lines left out, direct dependencies. Source: `data/done.json`."


# ---------------------------------------------------------------------------- two runs


def compare(run: Run, other: Run) -> str:
    """Two runs side by side, as Markdown: settings that differ, scores, time and money."""
    lines = [f"# `{run.id}` against `{other.id}`", "", "## Settings that differ", ""]
    names = ["setting", run.id, other.id]
    differences = recipe_difference(run.config.recipe, flatten(other.config.recipe))
    rows = [[path, as_text(mine), as_text(theirs)] for path, mine, theirs in differences]
    lines += list(md.table(names, rows)) if rows else ["None: the recipes are the same."]
    lines += ["", "## Scores", ""]
    ours, others = _all_measures(run), _all_measures(other)
    rows = []
    for key in dict.fromkeys([*ours, *others]):
        a, b = ours.get(key), others.get(key)
        label = f"{COLUMNS[key[0]]} {_measure_label(key[1])}"
        change = md.DASH if a is None or b is None else f"{a - b:+.4f}"
        rows.append([label, md.score(a), md.score(b), change])
    lines += list(md.table(["score", run.id, other.id, "difference"], rows))
    lines += ["", "## Time and cost", ""]
    rows = []
    for mine_, theirs_ in [(run.stage(*n), other.stage(*n)) for n in _names(run)]:
        records = [stage.done() or {} for stage in (mine_, theirs_)]
        times = [clock(r["seconds"]) if "seconds" in r else md.DASH for r in records]
        rows.append([_title(mine_), *times, *(md.dollars(r.get("dollars")) for r in records)])
    lines += list(md.table(["stage", run.id, other.id, f"{run.id}, $", f"{other.id}, $"], rows))
    return "\n".join(lines) + "\n"


def _all_measures(run: Run) -> dict[tuple[str, str], float]:
    """(model, measure) -> score."""
    return {
        (name, measure): number
        for name in MODELS
        for task, scores in _scores(run, name).items()
        for measure, number in _measures(task, scores)
    }


# ---------------------------------------------------------------------------- reading results


def _scores(run: Run, model: str) -> Scores:
    """Task -> flat scalars of the evaluation of one stage's model."""
    result = _result(run.stage("eval", of=model))
    tasks = {task: _flat(values) for task, values in result.items() if isinstance(values, dict)}
    return {task: values for task, values in tasks.items() if values}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers and words of a nested dictionary; lists (samples) are left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key} ")
        elif isinstance(value, int | float | str):
            flat[prefix + key] = value
    return flat


def _measures(task: str, scores: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(measure, number) of a task for the summary: what is a score, not a count or chance."""
    if task.startswith("core/"):  # these have a table of their own
        return
    for key, value in scores.items():
        words = key.split()
        if isinstance(value, float) and not {"chance", "seconds"} & set(words):
            how = " ".join(word for word in words if word != "accuracy")
            name = task if not how else how if task == "compression" else f"{task}, {how}"
            yield name, value


def _measure_label(measure: str) -> str:
    task, *how = measure.split(", ")
    return ", ".join([LABELS.get(task, task), *how])


def _texts(result: Mapping[str, Any]) -> Iterator[Sequence[str | bool]]:
    """Every sample anywhere in a result: a list of texts, and perhaps whether the last is right."""
    for key, value in result.items():
        if key == "samples" and isinstance(value, list):
            yield from ([said] if isinstance(said, str) else said for said in value)
        elif isinstance(value, Mapping):
            yield from _texts(value)


def _result_table(stage: StageDir) -> Iterator[str]:
    """The scalars of a stage's result, or how far it came."""
    result = _flat(_result(stage))
    if not result:
        yield f"{_state(stage).capitalize()}."
        return
    rows = [[key.replace("_", " "), md.number(value)] for key, value in result.items()]
    yield from md.table(["", ""], rows)
    yield ""
    yield f"Source: `{_title(stage)}/done.json`."
