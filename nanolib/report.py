"""The report card: one Markdown file that says what a run did, from its directory alone.

This module gathers the figures; ``templates/report.md.j2`` has the words. Every number stands above
the name of the file it was read from; what is missing is said to be.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanolib import accounting, attempts
from nanolib.config import MODELS, REPOSITORY, as_text, flatten, recipe_difference
from nanolib.progress import clock
from nanolib.rundir import Run, write_atomic

TEMPLATES = Path(__file__).parent / "templates"
SAMPLES = 8  # shown of each evaluation
EVALUATIONS = 12  # rows shown of a stage's scores along the way
BARS = " ▁▂▃▄▅▆▇█"
DASH = "—"
_INLINE = str.maketrans("|\n", "¦ ")  # what would end a table's cell

# The system this course rebuilds, at depth 20 (its own report of October 2025): stage, task.
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


@dataclass(frozen=True)
class Level:
    """A mark that some known system has reached, and the score that any model of a run may."""

    name: str
    task: str
    score: str
    bar: float
    toy: bool = False  # of the toy world; the others are of the real tasks


LEVELS = (
    Level("Reads: half of a trigram's bits per byte", "compression", "ratio", 0.5, toy=True),
    Level("Remembers: four of five facts, in words", "facts", "accuracy", 0.8, toy=True),
    Level("Calculates: two of five word problems", "gsm8k", "accuracy", 0.4, toy=True),
    Level("Programs: one of two functions", "humaneval", "accuracy", 0.5, toy=True),
    Level("Reads: below a trigram's bits per byte", "compression", "ratio", 1.0),
    Level("Beats guessing: ARC-Easy by text at 30 %", "arc_easy", "text", 0.30),
    Level("The original's SFT on GSM8K", "gsm8k", "accuracy", 0.0455),
    Level("The original's RL on GSM8K", "gsm8k", "accuracy", 0.0758),
    Level("The original's ChatCORE", "chatcore", "accuracy", 0.0884),
    Level("The original's CORE (depth 20)", "core", "accuracy", 0.2219),
    Level("GPT-2's CORE (1.6 B parameters)", "core", "accuracy", 0.2565),
)


def build(run: Run) -> str:
    """Write ``report.md`` into the run's directory and return its text.

    The same directory always gives the same text.
    """
    stages, recipe = _stages(run), run.config.recipe
    vocab_size, base = recipe.tokenizer.vocab_size, Stage.read(run, "base")
    text = _render(
        "report.md.j2",
        run=run,
        manifest=run.manifest(),
        toy=recipe.data.source == "toyworld",
        model=recipe.model,
        vocab_size=vocab_size,
        parameters=recipe.model.parts(vocab_size),
        flops_per_token=accounting.training_flops(recipe.model, vocab_size),
        base_tokens=base.result.get("tokens"),
        base_mfu=_utilisation(run, base),
        stages=stages,
        models=MODELS,
        finished=[stage for stage in stages if stage.record],
        unfinished=[stage for stage in stages if not stage.record],
        summary=_summary(stages),
        levels=_levels(run, stages),
        commands=attempts.spent(run.path),
        environment=_environment(stages),
        core=_core(stages),
        samples=_samples(stages),
        code=stages[0].result.get("code"),
    )
    write_atomic(run.path / "report.md", text)
    return text


def compare(run: Run, other: Run) -> str:
    """Two runs side by side, as Markdown: settings that differ, scores, time and money."""
    differences = recipe_difference(run.config.recipe, flatten(other.config.recipe))
    ours, theirs = _measures(_stages(run)), _measures(_stages(other))
    scores = []
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        change = None if a is None or b is None else f"{a - b:+.4f}"
        scores.append([f"{COLUMNS[key[0]]} {_measure_label(key[1])}", a, b, change])
    times = []
    for stage in _stages(run):
        records = [stage.record, Stage.read(other, stage.name, stage.of).record]
        seconds = [clock(r["seconds"]) if "seconds" in r else None for r in records]
        times.append([stage.title, *seconds, *(dollars(r.get("dollars")) for r in records)])
    return _render(
        "compare.md.j2",
        run=run,
        other=other,
        settings=[[path, as_text(mine), as_text(its)] for path, mine, its in differences],
        scores=scores,
        times=times,
    )


def _render(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "dollars": dollars, "share": share}
    environment.filters |= {"clock": clock, "fenced": fenced}
    return environment.get_template(template).render(values, table=table, chart=chart)


# ---------------------------------------------------------------------------- one stage


@dataclass(frozen=True)
class Stage:
    """What a stage left in its directory."""

    name: str
    of: str  # whose model an evaluation is of; "" for the other stages
    record: dict[str, Any]  # done.json; empty: not finished
    rows: list[dict[str, Any]]  # metrics.jsonl

    @classmethod
    def read(cls, run: Run, name: str, of: str = "") -> Stage:
        stage = run.stage(name, of or None)
        record = stage.done()
        if record is not None:  # older ones lack these
            record = {"attempts": None, "dollars": None, "taken_over": None} | record
        return cls(name, of, record or {}, stage.metrics.rows())

    @property
    def title(self) -> str:
        return f"{self.name}/{self.of}" if self.of else self.name

    @property
    def result(self) -> dict[str, Any]:
        return self.record.get("result", {})

    @property
    def state(self) -> str:
        """Whether the stage is finished, and how far it came if not."""
        if self.record:
            return "finished"
        kinds = ("train",) if self.name in MODELS else ("train", "progress")
        last = next((row for row in reversed(self.rows) if row["kind"] in kinds), None)
        if last is None:
            return "not begun"
        return f"unfinished, at {last['step']:,} of {last['steps']:,}"

    @property
    def training_seconds(self) -> float:
        """Of the training steps that were kept."""
        return self.result.get("seconds", 0.0) if self.name in MODELS else 0.0

    @property
    def figures(self) -> list[list[str]]:
        """The numbers and words of the result, but for those with a section of their own."""
        flat = _flat({key: value for key, value in self.result.items() if key != "code"})
        return [[key.replace("_", " "), number(value)] for key, value in flat.items()]

    @property
    def curve(self) -> list[tuple[float, float]]:
        """(step, mean reward) where there are rollouts, else (step, training loss)."""
        kind, key = ("rollout", "reward") if self.name == "grpo" else ("train", "loss")
        return [(row["step"], row[key]) for row in self.rows if row["kind"] == kind]

    @property
    def held_out(self) -> str:
        """The scores along the way, as a table of evenly spaced steps."""
        scores = [row for row in self.rows if row["kind"] == "eval"]
        if not scores:
            return ""
        names = [key for key in scores[-1] if key not in ("kind", "step", "steps", "time")]
        header = ["step", *(LABELS.get(name, name.replace("_", " ")) for name in names)]
        shown = thinned(scores, EVALUATIONS)
        return table(header, [[row["step"], *(row.get(name) for name in names)] for row in shown])

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Task -> numbers and words of an evaluation."""
        tasks = {t: _flat(values) for t, values in self.result.items() if isinstance(values, dict)}
        return {task: values for task, values in tasks.items() if values}

    @property
    def task_table(self) -> str:
        """An evaluation's tasks; those of CORE have a table of their own."""
        scores = {t: values for t, values in self.scores.items() if not t.startswith("core/")}
        columns = dict.fromkeys(key for values in scores.values() for key in values)
        header = ["task", *(LABELS.get(column, column) for column in columns)]
        rows = [[LABELS.get(t, t), *map(values.get, columns)] for t, values in scores.items()]
        return table(header, rows) if rows else ""


def _stages(run: Run) -> list[Stage]:
    """Every stage the run should have, in order; evaluations once a model."""
    models = run.config.recipe.models
    names = ["data", "tokenizer", "shards", *models]
    return [
        *(Stage.read(run, name) for name in names),
        *(Stage.read(run, "eval", model) for model in models),
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers and words of a nested dictionary; lists (samples) are left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key} ")
        elif isinstance(value, int | float | str):
            flat[prefix + key] = value
    return flat


# ---------------------------------------------------------------------------- sections


def _summary(stages: Sequence[Stage]) -> str:
    """Every score, a column a model, and the original's beside them."""
    found, evaluations = _measures(stages), [stage for stage in stages if stage.of]
    rows = []
    for measure in dict.fromkeys(measure for _, measure in found):
        task = measure.split(", ")[0]
        scores = [stage.scores.get(task, {}) for stage in evaluations]
        chances = [score["chance"] for score in scores if "chance" in score]
        comparable = measure == task or measure.endswith("letters")  # the original's way to score
        theirs = [ORIGINAL[stage.of].get(task) if comparable else None for stage in evaluations]
        ours = [found.get((stage.of, measure)) for stage in evaluations]
        rows.append([_measure_label(measure), *ours, chances[-1] if chances else None, *theirs])
    models = [COLUMNS[stage.of] for stage in evaluations]
    header = ["", *models, "chance", *(f"original {model}" for model in models)]
    return table(header, rows) if rows else ""


def _measures(stages: Iterable[Stage]) -> dict[tuple[str, str], float]:
    """(model, measure) -> number: what is a score, not a count or chance; CORE without its tasks."""
    found = {}
    for stage in stages:
        for task, scores in stage.scores.items() if stage.of else ():
            for key, value in scores.items():
                words = key.split()
                if isinstance(value, float) and not {"chance", "seconds"} & set(words):
                    how = " ".join(word for word in words if word != "accuracy")
                    name = task if not how else how if task == "compression" else f"{task}, {how}"
                    found[stage.of, name] = value
    return {key: value for key, value in found.items() if not key[1].startswith("core/")}


def _measure_label(measure: str) -> str:
    task, *how = measure.split(", ")
    return ", ".join([LABELS.get(task, task), *how])


def _levels(run: Run, stages: Sequence[Stage]) -> list[list[Any]]:
    """Which known marks some model of the run has reached."""
    toy = run.config.recipe.data.source == "toyworld"
    rows = []
    for level in (level for level in LEVELS if level.toy == toy):
        found = [stage.scores.get(level.task, {}) for stage in stages if stage.of]
        if level.score == "ratio":
            ratios = [s["bpb"] / s["trigram_bpb"] for s in found if "trigram_bpb" in s]
            best, sign = min(ratios, default=None), "≤"
            passed = best is not None and best <= level.bar
        else:
            best = max((float(s[level.score]) for s in found if level.score in s), default=None)
            passed, sign = best is not None and best >= level.bar, "≥"
        mark = "passed" if passed else "not yet"
        rows.append([level.name, f"{sign} {level.bar:g}", best, mark])
    return rows


def _utilisation(run: Run, base: Stage) -> float | None:
    """Base's MFU. Of the other stages' tokens only some are counted, but all are computed."""
    recipe, machine = run.config.recipe, base.record.get("machine", {})
    if not (speed := base.result.get("tokens_per_second")):
        return None
    return accounting.mfu(
        recipe.model,
        recipe.tokenizer.vocab_size,
        tokens_per_second=speed,
        device=str(machine.get("device")),
        ranks=machine.get("ranks", 1),
    )


def _environment(stages: Sequence[Stage]) -> list[list[str]]:
    """What it was computed on; once where all stages agree."""
    machines = {stage.title: stage.record.get("machine", {}) for stage in stages if stage.record}
    rows = []
    for key in dict.fromkeys(key for machine in machines.values() for key in machine):
        values = {title: machine.get(key) for title, machine in machines.items()}
        distinct = list(dict.fromkeys(map(str, values.values())))
        each = ", ".join(f"{title}: {value}" for title, value in values.items())
        if distinct != ["None"]:
            rows.append([key, distinct[0] if len(distinct) == 1 else each])
    return rows


def _core(stages: Sequence[Stage]) -> str:
    """CORE's tasks one by one, a column a model."""
    models = [stage for stage in stages if "core" in stage.scores]
    tasks = [task for stage in models for task in stage.scores if task.startswith("core/")]
    rows = []
    for task in dict.fromkeys(tasks):
        known = [stage.scores.get(task, {}) for stage in models]
        about = next(scores for scores in known if scores)
        facts = [about.get(key) for key in ("shots", "questions", "chance")]
        accuracies = [scores.get("accuracy") for scores in known]
        rows.append([task.removeprefix("core/"), *facts, *accuracies])
    means = [stage.scores["core"].get("accuracy") for stage in models]
    rows.append(["**CORE** (mean of centred)", "", "", "", *means])
    header = ["task", "shots", "questions", "chance", *(COLUMNS[stage.of] for stage in models)]
    return table(header, rows) if models else ""


def _samples(stages: Sequence[Stage]) -> list[tuple[str, str]]:
    """(file, what a model said in it), of every stage that kept samples."""
    found = []
    for stage in stages:
        samples, source = list(_texts(stage.result))[:SAMPLES], "done.json"
        rollouts = [row for row in stage.rows if row["kind"] == "rollout"]
        if rollouts:
            samples, source = rollouts[-1]["samples"], "metrics.jsonl"
        if samples:
            found.append((f"{stage.title}/{source}", "\n\n".join(map(quoted, samples))))
    return found


def _texts(result: Mapping[str, Any]) -> Iterator[Sequence[str | bool]]:
    """Every sample anywhere in a result: a list of texts, and perhaps whether the last is right."""
    for key, value in result.items():
        if key == "samples" and isinstance(value, list):
            yield from ([said] if isinstance(said, str) else said for said in value)
        elif isinstance(value, Mapping):
            yield from _texts(value)


def code_base() -> dict[str, int]:
    """Lines of this checkout by part, blank ones left out, and its direct dependencies."""
    parts = {
        "nanolib": "nanolib/**/*.py",
        "rust_tokenizer": "rust_tokenizer/src/*.rs",
        "notebooks": "notebooks/*.py",
        "benchmarks": "runs/bench/*.py",
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


# ---------------------------------------------------------------------------- Markdown of figures


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; a float has four decimals and a missing value is a dash."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *map(table_row, rows)]
    return "\n".join(lines)


def table_row(values: Sequence[Any]) -> str:
    cells = [f"{value:.4f}" if isinstance(value, float) else number(value) for value in values]
    return f"| {' | '.join(cell.translate(_INLINE) for cell in cells)} |"


def number(value: Any) -> str:
    """A figure for a reader: 1,234,567 or 0.1235; None is a dash, words stay as they are."""
    if value is None:
        return DASH
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def dollars(value: float | None) -> str:
    return DASH if value is None else f"${value:,.2f}"


def share(part: float | None, whole: float = 1.0) -> str:
    """A part of a whole in percent."""
    return f"{part / whole:.1%}" if part else DASH


def quoted(sample: Sequence[str | bool | float]) -> str:
    """A sample: what was given, and each text that came on a line of its own."""
    text = ""
    for position, part in enumerate(sample):
        if isinstance(part, bool):
            text += " (right)" if part else " (wrong)"
        elif isinstance(part, float):
            text += f" (reward {part:g})"
        else:
            text += f"\n  {part!r}" if position else f"> {part!r}"
    return text


def fenced(text: str, language: str = "text") -> str:
    """Text in a code fence that nothing in it can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the rows, evenly, the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def chart(points: Sequence[tuple[float, float]], width: int = 64, height: int = 8) -> str:
    """A curve as lines of text: columns of block characters, with the extremes named.

    Each column is the mean of the points that fall into it; x grows evenly from left to right.
    """
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return "(nothing to draw)"
    means = _column_means(points, min(width, len(points)))
    known = [mean for mean in means if mean is not None]
    low, high = min(known), max(known)
    steps = 8 * height - 1  # a column is at least an eighth of a line high
    levels = [0 if m is None else 1 + round((m - low) / ((high - low) or 1) * steps) for m in means]
    lines = []
    for line in reversed(range(height)):
        blocks = "".join(BARS[min(8, max(0, level - 8 * line))] for level in levels)
        name = number(high) if line == height - 1 else number(low) if line == 0 else ""
        lines.append(f"{name:>8} │{blocks}".rstrip())
    first, last = number(points[0][0]), number(points[-1][0])
    ends = first + f"{last:>{max(1, len(means) - len(first))}}"
    return "\n".join([*lines, f"{'':>8} └{'─' * len(means)}", f"{'':>10}{ends}"])


def _column_means(points: Sequence[tuple[float, float]], columns: int) -> list[float | None]:
    """The mean y of the points in each of `columns` equal parts of x; None where there are none."""
    first, last = points[0][0], points[-1][0]
    bins: list[list[float]] = [[] for _ in range(columns)]
    for x, y in points:
        fraction = (x - first) / (last - first) if last > first else 0.0
        bins[min(int(fraction * columns), columns - 1)].append(y)
    return [sum(column) / len(column) if column else None for column in bins]
