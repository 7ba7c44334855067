"""The report card: a Markdown summary of a run, built from its directory alone.

This module collects the figures; template ``report.md.j2`` has the text, ``report.toml`` the names
of scores and the reference values.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nanolib import accounting, rundir
from nanolib.config import MODELS, as_text, flatten, recipe_difference
from nanolib.progress import clock
from nanolib.rundir import Run, StageDir, write_atomic

TEMPLATES = Path(__file__).parent / "templates"
KNOWN = tomllib.loads((TEMPLATES / "report.toml").read_text(encoding="utf-8"))
COLUMNS: dict[str, str] = KNOWN["columns"]
SAMPLES = 8  # shown per evaluation
EVALUATIONS = 12  # rows shown of the evaluations during a stage
HIDDEN = ("kind", "steps", "time")  # columns left out there
DASH = "—"
AS_ORIGINAL = ("accuracy", "letters")  # scored in the same way as in nanochat
CORE_MEAN = "**CORE** (mean of centred)"
_INLINE = str.maketrans("|\n", "¦ ")  # characters that would end a table cell


def build(run: Run) -> str:
    """Write ``report.md`` into the run's directory and return its text."""
    stages, recipe, toy = _stages(run), run.config.recipe, _is_toy(run)
    measures = _measures(stages)
    text = _render(
        "report.md.j2",
        run=run,
        flops_per_token=accounting.training_flops(recipe.model, recipe.tokenizer.vocab_size),
        stages=stages,
        summary=_summary(measures, [stage.of for stage in stages if stage.of], toy),
        originals=_originals() if toy else "",
        paired=_paired(stages, toy),
        levels=_levels(measures, toy),
        commands=rundir.spent(run.path),
        environment=_environment(stages),
        core=_core(measures),
        contamination=_contamination(run, toy),
    )
    write_atomic(run.path / "report.md", text)
    return text


def compare(run: Run, other: Run) -> str:
    """Compare two runs, as Markdown: differing settings, scores, time and cost."""
    differences = recipe_difference(run.config.recipe, flatten(other.config.recipe))
    stages, toy = _stages(run), _is_toy(run) and _is_toy(other)
    ours, theirs = _measures(stages), _measures(_stages(other))
    scores = []
    for task, how in dict.fromkeys([*_headlines(ours), *_headlines(theirs)]):
        mine, its = ours.get((task, how), {}), theirs.get((task, how), {})
        for of in mine | its:
            a, b = mine.get(of), its.get(of)
            change = None if a is None or b is None else f"{a - b:+.4f}"
            scores.append([f"{COLUMNS[of]} {_measure_label(task, how, toy)}", a, b, change])
    return _render(
        "compare.md.j2",
        run=run,
        other=other,
        settings=[[path, as_text(mine), as_text(its)] for path, mine, its in differences],
        scores=scores,
        stages=[(stage, Stage(other.stage(stage.name, stage.of), other)) for stage in stages],
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
    filters = (number, dollars, share, clock, fenced, quoted)
    environment.filters |= {written.__name__: written for written in filters}
    return environment.get_template(template).render(values, table=table)


# ---------------------------------------------------------------------------- one stage


class Stage:
    """The contents of a stage's directory, prepared for the templates."""

    def __init__(self, directory: StageDir, run: Run) -> None:
        self.name, record, rows = directory.name, directory.done(), directory.metrics.rows
        self.of = directory.of or ""  # the stage that it scores
        self.title = f"eval/{self.of}" if self.of else self.name
        older = {"attempts": None, "dollars": None, "taken_over": None}  # older records lack these
        self.record: dict[str, Any] = older | record if record else {}  # empty: unfinished
        self.result = directory.result()
        self.state = "finished" if record else "not begun"
        if not record and (begun := rows("train" if self.name in MODELS else "progress")):
            self.state = f"unfinished, at {begun[-1]['step']:,} of {begun[-1]['steps']:,}"
        self.utilisation = _utilisation(self, run) if self.name == "base" and record else None

        flat = _plain(flatten(self.result))
        self.figures = [[re.sub(r"[._]", " ", key), number(value)] for key, value in flat.items()]
        scored = [{k: v for k, v in row.items() if k not in HIDDEN} for row in rows("eval")]
        steps = np.linspace(0, len(scored) - 1, min(len(scored), EVALUATIONS)).round().astype(int)
        self.held_out = _grid([scored[step] for step in steps])

        tasks = {task: it for task, it in self.result.items() if isinstance(it, dict)}
        kept = ((task, it.get("right", {})) for task, it in tasks.items())  # old runs have none
        self.right = {(task, how): bits for task, its in kept for how, bits in its.items()}
        self.scores = {task: plain for task, it in tasks.items() if (plain := _plain(it))}
        shown = {task: it for task, it in self.scores.items() if not task.startswith("core/")}
        self.task_table = _grid(
            [{"task": _label(t, _is_toy(run)), **it} for t, it in shown.items()]
        )
        samples = [it for task in tasks.values() for it in task.get("samples", [])][:SAMPLES]
        self.samples = rollouts[-1]["samples"] if (rollouts := rows("rollout")) else samples


def _utilisation(base: Stage, run: Run) -> float | None:
    """MFU of base; other stages process more tokens than they count, such as padding."""
    machine, recipe = base.record.get("machine", {}), run.config.recipe
    devices = {"device": machine.get("device", ""), "ranks": machine.get("ranks", 1)}
    speed, vocab_size = base.result.get("tokens_per_second", 0.0), recipe.tokenizer.vocab_size
    return accounting.mfu(recipe.model, vocab_size, tokens_per_second=speed, **devices)


def _stages(run: Run) -> list[Stage]:
    """All stages but the last, which is the report itself."""
    return [Stage(directory, run) for directory in run.stages()[:-1]]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, int | float | str)}


# ---------------------------------------------------------------------------- sections

# (task, measure) -> {model: score, chance level or count}
Measures = dict[tuple[str, str], dict[str, Any]]


def _measures(stages: Iterable[Stage]) -> Measures:
    measures: Measures = {}
    for stage in stages:
        for task, scores in stage.scores.items() if stage.of else ():
            if "trigram_bpb" in scores:
                scores["ratio"] = scores["bpb"] / scores["trigram_bpb"]
            for how, value in scores.items():
                measures.setdefault((task, how), {})[stage.of] = value
    return measures


def _headlines(measures: Measures) -> list[tuple[str, str]]:
    """The measures shown in the summary: scores, without CORE's individual tasks."""
    scores = [key for key in measures if isinstance(_any(measures, *key), float)]
    return [(task, how) for task, how in scores if how != "chance" and "core/" not in task]


def _any(measures: Measures, task: str, how: str) -> Any:
    """A measure that is the same for all models, or None."""
    return next(iter(measures.get((task, how), {}).values()), None)


def _summary(measures: Measures, models: Sequence[str], toy: bool) -> str:
    """The summary table: one column per model, and nanochat's scores for the real tasks."""
    rows = []
    for task, how in _headlines(measures):
        row: dict[str, Any] = {"": _measure_label(task, how, toy)}
        row |= {COLUMNS[of]: measures[task, how].get(of) for of in models}
        row["±"] = _widest(measures[task, how].values(), _any(measures, task, "questions"))
        row["chance"] = _any(measures, task, "chance")
        for of in models if not toy else ():
            theirs = KNOWN["original"][of] if how in AS_ORIGINAL else {}
            row[f"original {COLUMNS[of]}"] = theirs.get(task)
        rows.append(row)
    return _grid(rows)


def _widest(scores: Iterable[float], questions: int | None) -> float | None:
    """Half-width of the widest 95 % Wilson interval (1927) of `scores`; None without questions."""
    if not questions:
        return None
    z = 1.96
    spread = max(score * (1 - score) / questions + z**2 / (2 * questions) ** 2 for score in scores)
    return z * math.sqrt(spread) / (1 + z**2 / questions)


def _paired(stages: Iterable[Stage], toy: bool) -> str:
    """Per score: problems gained and lost by each model relative to the one before it."""
    rows: dict[str, dict[str, str]] = {}
    for before, after in pairwise(stage for stage in stages if stage.right):
        for key, now in after.right.items():
            if len(was := before.right.get(key, "")) == len(now):
                gained = sum(a < b for a, b in zip(was, now, strict=True))
                lost = sum(a > b for a, b in zip(was, now, strict=True))
                p = f"{value:.3f}" if (value := sign_test(gained, lost)) >= 0.001 else "< 0.001"
                row = rows.setdefault(label := _measure_label(*key, toy), {"": label})
                row[f"{COLUMNS[before.of]} → {COLUMNS[after.of]}"] = f"+{gained} −{lost} (p {p})"
    return _grid(list(rows.values()))


def sign_test(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact sign test (McNemar, 1947)."""
    n, fewer = gained + lost, min(gained, lost)
    ways = accumulate(range(fewer), lambda ways, k: ways * (n - k) // (k + 1), initial=1)
    return min(1.0, 2 * sum(ways) / 2**n)


def _originals() -> str:
    scores = [KNOWN["original"][of] for of in COLUMNS]
    rows = [[_label(t), *(its.get(t) for its in scores)] for t in dict.fromkeys(chain(*scores))]
    return table(["", *COLUMNS.values()], rows)


def _measure_label(task: str, how: str, toy: bool) -> str:
    if task == "compression":
        return _label(how)
    return _label(task, toy) if how == "accuracy" else f"{_label(task, toy)}, {how}"


def _is_toy(run: Run) -> bool:
    return run.config.recipe.data.source == "toyworld"


def _label(name: str, toy: bool = False) -> str:
    """A score's display name; toy: marks toy-world tasks, which only imitate the benchmarks."""
    label = KNOWN["labels"].get(name, name.replace("_", " "))
    return f"toy-{label}" if toy and name in KNOWN["benchmarks"] else label


def _grid(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with one column per key."""
    columns = dict.fromkeys(column for row in rows for column in row)
    body = [[row.get(column) for column in columns] for row in rows]
    return table([*map(_label, columns)], body) if rows else ""


def _levels(measures: Measures, toy: bool) -> list[list[Any]]:
    """Rows of (level, bar, the run's best score, whether it passes)."""
    rows = []
    for level in KNOWN["levels"]["toyworld" if toy else "real"]:
        bar, found = level["bar"], measures.get((level["task"], level["score"]), {}).values()
        sign, better = ("≤", min) if level["score"] == "ratio" else ("≥", max)
        best = better(map(float, found), default=None)
        passed = best is not None and better(best, bar) == best
        rows.append([level["name"], f"{sign} {bar:g}", best, "passed" if passed else "not yet"])
    return rows


def _environment(stages: Sequence[Stage]) -> list[list[str]]:
    """The machine the stages ran on: one value if they agree, else one per stage."""
    machines = {stage.title: stage.record.get("machine", {}) for stage in stages if stage.record}
    rows = []
    for key in dict.fromkeys(key for machine in machines.values() for key in machine):
        values = {title: str(m[key]) for title, m in machines.items() if m.get(key) is not None}
        if distinct := set(values.values()):
            each = ", ".join(f"{title}: {value}" for title, value in values.items())
            rows.append([key, each if len(distinct) > 1 else distinct.pop()])
    return rows


def _core(measures: Measures) -> str:
    rows = []
    for (task, how), scores in measures.items():
        if how.startswith("accuracy") and (task == "core" or task.startswith("core/")):
            name = task.removeprefix("core/") if task != "core" else CORE_MEAN
            row = {"task": name + how.removeprefix("accuracy")}
            row |= {key: _any(measures, task, key) for key in ("shots", "questions", "chance")}
            rows.append(row | {COLUMNS[of]: score for of, score in scores.items()})
    return _grid(rows)


def _contamination(run: Run, toy: bool) -> tuple[str, list[dict[str, Any]]]:
    """A row a test set, a column a training source, last its own texts; then three passages."""
    file = run.stage("data").path / "overlap.json"
    if not file.exists():  # older versions did not look
        return "", []
    kept = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for test, size in kept["problems"].items():
        counts = (its[test] for its in kept["found"].values())
        rows.append([_label(test, toy), *(f"{n:,} of {size:,}" if n else 0 for n in counts)])
    if quoting := kept.get("quoting"):
        drop = run.config.recipe.data.drop_contaminated
        title = "texts left out" if drop else "its texts that share words"
        counts = ((len(quoting[source]), size) for source, size in kept["texts"].items())
        rows.append([title, *(f"{n:,} of {size:,}" if n else 0 for n, size in counts)])
    return table(["", *kept["found"]], rows), kept["passages"][:3]


# ---------------------------------------------------------------------------- Markdown


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats get four decimals, None becomes a dash."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *map(table_row, rows)]
    return "\n".join(lines)


def table_row(values: Sequence[Any]) -> str:
    cells = [f"{value:.4f}" if isinstance(value, float) else number(value) for value in values]
    return f"| {' | '.join(cell.translate(_INLINE) for cell in cells)} |"


def number(value: Any) -> str:
    """Format a number (1,234,567 or 0.1235); None becomes a dash, text is unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return DASH if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def dollars(value: float | None) -> str:
    return DASH if value is None else f"${value:,.2f}"


def share(part: float | None, whole: float = 1.0) -> str:
    return f"{part / whole:.1%}" if part else DASH


def quoted(sample: Sequence[str | bool | float]) -> str:
    """A sample as text: the prompt, then one line per answer, with its grade."""
    text = f"> {sample[0]!r}"
    for part in sample[1:]:
        if isinstance(part, bool):
            text += " (right)" if part else " (wrong)"
        else:
            text += f"\n  {part!r}" if isinstance(part, str) else f" (reward {part:g})"
    return text


def fenced(text: str, language: str = "text") -> str:
    """Text in a code fence longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
