"""The report card: one Markdown file that says what a run did, from its directory alone.

This module gathers the figures, ``templates/report.md.j2`` has the words, and
``templates/report.toml`` names the scores and what to compare them with.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanolib import accounting, attempts
from nanolib.config import MODELS, REPOSITORY, Recipe, as_text, flatten, recipe_difference
from nanolib.progress import clock
from nanolib.rundir import Run, write_atomic

TEMPLATES = Path(__file__).parent / "templates"
KNOWN = tomllib.loads((TEMPLATES / "report.toml").read_text(encoding="utf-8"))
COLUMNS: dict[str, str] = KNOWN["columns"]
SAMPLES = 8  # shown of each evaluation
EVALUATIONS = 12  # rows shown of a stage's scores along the way
BARS = " ▁▂▃▄▅▆▇█"
DASH = "—"
_INLINE = str.maketrans("|\n", "¦ ")  # what would end a table's cell


def build(run: Run) -> str:
    """Write ``report.md`` into the run's directory and return its text.

    The same directory always gives the same text.
    """
    stages, recipe = _stages(run), run.config.recipe
    evaluations = [stage for stage in stages if stage.of]
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
        base_mfu=_utilisation(recipe, base),
        stages=stages,
        models=MODELS,
        summary=_summary(evaluations),
        levels=_levels(recipe, evaluations),
        commands=attempts.spent(run.path),
        environment=_environment(stages),
        core=_core(evaluations),
        code=stages[0].result.get("code"),
    )
    write_atomic(run.path / "report.md", text)
    return text


def compare(run: Run, other: Run) -> str:
    """Two runs side by side, as Markdown: settings that differ, scores, time and money."""
    differences = recipe_difference(run.config.recipe, flatten(other.config.recipe))
    stages = _stages(run)
    ours, theirs = _measures(stages), _measures(_stages(other))
    scores = []
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        change = None if a is None or b is None else f"{a - b:+.4f}"
        of, task, how = key
        scores.append([f"{COLUMNS[of]} {_measure_label(task, how)}", a, b, change])
    return _render(
        "compare.md.j2",
        run=run,
        other=other,
        settings=[[path, as_text(mine), as_text(its)] for path, mine, its in differences],
        scores=scores,
        stages=[(stage, Stage.read(other, stage.name, stage.of)) for stage in stages],
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
    for written in (number, dollars, share, clock, fenced, quoted):
        environment.filters[written.__name__] = written
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
        """Whether the stage is finished, and how far it got if not."""
        if self.record:
            return "finished"
        kind = "train" if self.name in MODELS else "progress"
        last = next((row for row in reversed(self.rows) if row["kind"] == kind), None)
        return f"unfinished, at {last['step']:,} of {last['steps']:,}" if last else "not begun"

    @property
    def training_seconds(self) -> float:
        """Of the training steps that were kept."""
        return self.result.get("seconds", 0.0)

    @property
    def figures(self) -> list[list[str]]:
        """The numbers and words of the result; `code` has a section of its own."""
        flat = _plain(flatten({key: v for key, v in self.result.items() if key != "code"}))
        return [[re.sub(r"[._]", " ", key), number(value)] for key, value in flat.items()]

    @property
    def curve(self) -> list[tuple[float, float]]:
        """(step, mean reward) where there are rollouts, else (step, training loss)."""
        kind, key = ("rollout", "reward") if self.name == "grpo" else ("train", "loss")
        return [(row["step"], row[key]) for row in self.rows if row["kind"] == kind]

    @property
    def held_out(self) -> str:
        """The scores along the way, as a table of evenly spaced steps."""
        rows = [row for row in self.rows if row["kind"] == "eval"]
        shown = np.linspace(0, len(rows) - 1, min(len(rows), EVALUATIONS)).round().astype(int)
        hidden = {"kind", "steps", "time"}
        return _grid([{k: v for k, v in rows[i].items() if k not in hidden} for i in shown])

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Task -> numbers and words of an evaluation."""
        tasks = {t: _plain(values) for t, values in self.result.items() if isinstance(values, dict)}
        return {task: values for task, values in tasks.items() if values}

    @property
    def task_table(self) -> str:
        """An evaluation's tasks; those of CORE have a table of their own."""
        scores = self.scores.items()
        return _grid([{"task": _label(t), **s} for t, s in scores if not t.startswith("core/")])

    @property
    def samples(self) -> list[Sequence[Any]]:
        """What a model said in GRPO's last step, or in an evaluation."""
        rollouts = [row["samples"] for row in self.rows if row["kind"] == "rollout"]
        tasks = [values for values in self.result.values() if isinstance(values, dict)]
        said = [sample for values in tasks for sample in values.get("samples", [])]
        return rollouts[-1] if rollouts else said[:SAMPLES]


def _stages(run: Run) -> list[Stage]:
    """Every stage of the run in order, then an evaluation for each model."""
    models = run.config.recipe.models
    return [
        *(Stage.read(run, name) for name in ("data", "tokenizer", "shards", *models)),
        *(Stage.read(run, "eval", model) for model in models),
    ]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and words among some values."""
    return {key: value for key, value in values.items() if isinstance(value, int | float | str)}


# ---------------------------------------------------------------------------- sections


def _summary(evaluations: Sequence[Stage]) -> str:
    """Every score, a column a model, and the original's beside them."""
    rows = []
    for task, how in dict.fromkeys((task, how) for _, task, how in _measures(evaluations)):
        scores = {stage.of: stage.scores.get(task, {}) for stage in evaluations}
        row: dict[str, Any] = {"": _measure_label(task, how)}
        row |= {COLUMNS[of]: known.get(how) for of, known in scores.items()}
        row["chance"] = next((s["chance"] for s in scores.values() if "chance" in s), None)
        comparable = how in ("accuracy", "letters")  # scored as the original does
        for of in scores:
            row[f"original {COLUMNS[of]}"] = KNOWN["original"][of].get(task) if comparable else None
        rows.append(row)
    return _grid(rows)


def _measures(stages: Iterable[Stage]) -> dict[tuple[str, str, str], float]:
    """(model, task, how) -> score; counts, chances and CORE's single tasks are left out."""
    return {
        (stage.of, task, how): value
        for stage in stages
        if stage.of
        for task, scores in stage.scores.items()
        for how, value in scores.items()
        if isinstance(value, float) and how != "chance" and not task.startswith("core/")
    }


def _measure_label(task: str, how: str) -> str:
    if task == "compression":
        return _label(how)
    return _label(task) if how == "accuracy" else f"{_label(task)}, {how}"


def _label(name: str) -> str:
    return KNOWN["labels"].get(name, name.replace("_", " "))


def _grid(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a column for each key of its rows; "" without rows."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return (
        table([*map(_label, columns)], [[*map(row.get, columns)] for row in rows]) if rows else ""
    )


def _levels(recipe: Recipe, evaluations: Sequence[Stage]) -> list[list[Any]]:
    """Each level with the run's best score, and whether that reaches it."""
    rows = []
    for level in KNOWN["levels"]["toyworld" if recipe.data.source == "toyworld" else "real"]:
        found = [stage.scores.get(level["task"], {}) for stage in evaluations]
        score, bar = level["score"], level["bar"]
        if score == "ratio":
            ratios = [s["bpb"] / s["trigram_bpb"] for s in found if "trigram_bpb" in s]
            best, sign = min(ratios, default=None), "≤"
            passed = best is not None and best <= bar
        else:
            best = max((float(s[score]) for s in found if score in s), default=None)
            passed, sign = best is not None and best >= bar, "≥"
        rows.append([level["name"], f"{sign} {bar:g}", best, "passed" if passed else "not yet"])
    return rows


def _utilisation(recipe: Recipe, base: Stage) -> float | None:
    """Base's MFU; the other stages process more tokens than they count."""
    machine = base.record.get("machine", {})
    return accounting.mfu(
        recipe.model,
        recipe.tokenizer.vocab_size,
        tokens_per_second=base.result.get("tokens_per_second", 0.0),
        device=machine.get("device", ""),
        ranks=machine.get("ranks", 1),
    )


def _environment(stages: Sequence[Stage]) -> list[list[str]]:
    """The machine of the stages: one value where they all agree."""
    machines = {stage.title: stage.record.get("machine", {}) for stage in stages if stage.record}
    rows = []
    for key in dict.fromkeys(key for machine in machines.values() for key in machine):
        values = {title: str(machine.get(key)) for title, machine in machines.items()}
        distinct = set(values.values())
        each = ", ".join(f"{title}: {value}" for title, value in values.items())
        if distinct != {"None"}:
            rows.append([key, distinct.pop() if len(distinct) == 1 else each])
    return rows


def _core(evaluations: Sequence[Stage]) -> str:
    """CORE's tasks one by one, a column a model."""
    rows: dict[str, dict[str, Any]] = {}
    means: dict[str, Any] = {}
    for stage in evaluations:
        for task, scores in stage.scores.items():
            if task.startswith("core/"):
                facts = {key: scores.get(key) for key in ("shots", "questions", "chance")}
                row = rows.setdefault(task.removeprefix("core/"), facts)
                row[COLUMNS[stage.of]] = scores["accuracy"]
            elif task == "core":
                means[COLUMNS[stage.of]] = scores["accuracy"]
    if not means:
        return ""
    mean = {"task": "**CORE** (mean of centred)", "shots": "", "questions": "", "chance": ""}
    return _grid([*({"task": task, **row} for task, row in rows.items()), mean | means])


def code_base() -> dict[str, int]:
    """Lines of this checkout by part, blank ones left out, and its direct dependencies."""
    parts = {
        "nanolib": "nanolib/**/*.py",
        "rust_tokenizer": "rust_tokenizer/src/*.rs",
        "notebooks": "notebooks/*.py",
        "benchmarks": "runs/bench/*.py",
        "tests": "tests/*.py",
    }
    counts = {}
    for name, pattern in parts.items():
        texts = [path.read_text(encoding="utf-8") for path in REPOSITORY.glob(pattern)]
        counts[f"{name} lines"] = sum(len(re.findall(r"(?m)^.*\S", text)) for text in texts)
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
    """A sample as text: the prompt, then each answer on a line of its own, with its grade."""
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


def chart(points: Sequence[tuple[float, float]], width: int = 64, height: int = 8) -> str:
    """A curve as lines of text: columns of block characters, with the extremes named.

    Each column is the mean of the points that fall into it; x grows evenly from left to right.
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return "(nothing to draw)"
    x, y = np.array(finite, dtype=float).T
    width = min(width, len(finite))
    column = np.minimum((x - x[0]) / ((x[-1] - x[0]) or 1) * width, width - 1).astype(int)
    counts = np.bincount(column, minlength=width)
    means = np.bincount(column, y, width)[counts > 0] / counts[counts > 0]
    low, high = means.min(), means.max()
    eighths = np.zeros(width, dtype=int)  # of a line; a column with points has at least one
    eighths[counts > 0] = 1 + np.round((means - low) / ((high - low) or 1) * (8 * height - 1))
    lines = []
    for line in reversed(range(height)):
        blocks = "".join(BARS[level] for level in np.clip(eighths - 8 * line, 0, 8))
        name = number(high) if line == height - 1 else number(low) if line == 0 else ""
        lines.append(f"{name:>8} │{blocks}".rstrip())
    first, last = number(x[0]), number(x[-1])
    ends = first + f"{last:>{max(1, width - len(first))}}"
    return "\n".join([*lines, f"{'':>8} └{'─' * width}", f"{'':>10}{ends}"])
