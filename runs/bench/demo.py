"""Does the demo learn what it should? Several seeds, compared with baselines and controls.

``nanolib bench demo --seeds 1 2 3 [--at-once N] [--threads N]`` trains the demo's stages (no notebooks)
for each seed with and without pretraining, and GRPO again with shuffled rewards, and prints a table
of scores. The bars are the targets of the toy world's design; each must hold for every seed, except
GRPO's second, which is for the mean over seeds.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nanolib import launch, report, tasks
from nanolib.rundir import Run
from nanolib.takeover import take_over

CHOICE_TASKS = ("mmlu", "arc_easy")
MORE_PROBLEMS = {"grpo.eval_questions": 400, "grpo.eval_samples": 4}  # than the demo has time for


@dataclass(frozen=True)
class Bar:
    """One figure and its required bounds."""

    name: str
    value: Callable[[dict[str, Any]], float]
    least: float = -math.inf
    most: float = math.inf
    mean: bool = False  # the bar is for the mean over seeds

    @property
    def wanted(self) -> str:
        bounds = (("≥", self.least), ("≤", self.most))
        return " and ".join(f"{sign} {bound:.3g}" for sign, bound in bounds if math.isfinite(bound))


def _text_accuracy(scores: dict[str, Any]) -> float:
    """Accuracy over all four-choice questions, scored by text."""
    parts = [scores[name] for name in CHOICE_TASKS]
    return sum(p["text"] * p["questions"] for p in parts) / sum(p["questions"] for p in parts)


BARS = (
    Bar("base bpb / trigram bpb", lambda s: s["bpb_ratio"], most=2 / 3),
    Bar("four choices by text", _text_accuracy, least=0.9),
    Bar("facts in words", lambda s: s["facts"]["accuracy"], least=0.8),
    Bar("functions", lambda s: s["humaneval"]["accuracy"], least=0.5),
    Bar("word problems after SFT, greedy", lambda s: s["gsm8k"]["accuracy"], 0.4, 0.65),
    Bar("GRPO: sampled, gain", lambda s: s["grpo"]["sampled"], least=0.05),
    Bar("the same, mean of the seeds", lambda s: s["grpo"]["sampled"], least=0.08, mean=True),
    Bar("GRPO: greedy, gain", lambda s: s["grpo"]["greedy"], least=-0.02),
    Bar("shuffled rewards: sampled, gain", lambda s: s["shuffled"]["sampled"], most=0.02),
    Bar("without base", lambda s: s["without_base"], most=0.35),
    Bar("always the first", lambda s: s["first"], most=0.35),
    Bar("always the longest", lambda s: s["longest"], most=0.35),
)


def scores_of(seed: int, threads: int, profile: str = "demo") -> dict[str, Any]:
    """Train the demo for one seed with and without base; returns all scores for its bars."""
    name = f"{profile}-seed-{seed}"
    settings = {"seed": seed, "machine.threads": threads} | MORE_PROBLEMS
    run = Run.open(profile, name, settings)
    base = launch.stage("eval", run, of="base")["compression"]
    scores = launch.stage("eval", run, of="sft")
    bare = Run.open(profile, f"{name}-bare", settings | {"base.enabled": False})
    without_base = launch.stage("eval", bare, of="sft")
    shuffled = _fork(run, f"{name}-shuffled", {"grpo.shuffled": True})
    first, longest = _blind(run)
    return {
        **scores,
        "grpo": _gains(run),
        "shuffled": _gains(shuffled),
        "bpb": base["bpb"],
        "bpb_ratio": base["bpb"] / base["trigram_bpb"],
        "without_base": _text_accuracy(without_base),
        "first": first,
        "longest": longest,
    }


def _fork(run: Run, name: str, overrides: dict[str, Any]) -> Run:
    """A run that differs only in GRPO, with the earlier stages taken over."""
    given = {"seed": run.config.recipe.seed} | MORE_PROBLEMS | overrides
    machine = {"machine.threads": run.config.machine.threads}
    fork = Run.open(run.config.profile, name, given | machine)
    take_over(fork, run)
    return fork


def _gains(run: Run) -> dict[str, float]:
    """GRPO's change in held-out scores, from before its first step to after its last."""
    launch.stage("grpo", run)
    rows = [row for row in run.stage("grpo").metrics.rows() if row["kind"] == "eval"]
    change = {key: rows[-1][key] - rows[0][key] for key in ("greedy", "pass@1")}
    return {"greedy": change["greedy"], "sampled": change["pass@1"]}


def _blind(run: Run) -> tuple[float, float]:
    """Accuracy of always choosing the first and the longest choice, on the same questions."""
    limit = run.config.recipe.eval.max_problems
    first, longest = [], []
    for name in CHOICE_TASKS:
        task = tasks.load(name, "test", run.mirror())
        assert isinstance(task, tasks.ChoiceTask)
        for i in range(min(len(task), limit or len(task))):
            choices, answer = task.choices(i), task.answer(i)
            first.append(answer == 0)
            longest.append(max(range(len(choices)), key=lambda c: len(choices[c])) == answer)
    return sum(first) / len(first), sum(longest) / len(longest)


def table(seeds: Sequence[int], results: Sequence[dict[str, Any]]) -> str:
    """The scores as Markdown, one column per seed."""
    rows = []
    for bar in BARS:
        values = [bar.value(result) for result in results]
        judged = [sum(values) / len(values)] if bar.mean else values
        holds = "yes" if all(bar.least <= value <= bar.most for value in judged) else "**no**"
        shown = [f"{value:.3f}" for value in judged] + [""] * (len(values) - len(judged))
        rows.append([bar.name, bar.wanted, *shown, holds])
    letters = [[r[name]["letters"] for name in CHOICE_TASKS] for r in results]
    cells = [" · ".join(f"{x:.3f}" for x in row) for row in letters]
    rows.append([f"letters ({' · '.join(CHOICE_TASKS)}; chance 0.25)", "as it is", *cells, ""])
    cells = [f"{result['bpb']:.3f}" for result in results]
    rows.append(["base bits per byte", "as it is", *cells, ""])
    header = ["figure", "wanted", *(f"seed {seed}" for seed in seeds), "holds"]
    return report.table(header, rows)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--at-once", type=int, default=1, help="seeds trained in parallel")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads per seed")
    given = parser.parse_args(arguments)
    with ThreadPoolExecutor(given.at_once) as pool:
        results = list(pool.map(lambda seed: scores_of(seed, given.threads), given.seeds))
    today = datetime.datetime.now(datetime.UTC).date()
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores, {given.threads} thread(s) a run"
    print(f"\n{today}, {machine}\n\n{table(given.seeds, results)}")
