"""Does GRPO improve a small model at sums, and do shuffled rewards as well?

Starting from a run's mid stage, for each seed: SFT with a few hundred worked examples, then one arm
(ARMS): GRPO, a control with shuffled rewards, or GRPO with other options. In this order:

    alias climb="python -m runs.bench.climb"  # each with --mirror DIR --gpus 2 --at-once 4
    climb pilot --rows 400,800 --epochs 16,32 --lr 0.1,0.3  # compare SFTs by number of terms
    FIXED="--rows 800 --epochs 16 --lr 0.1 --terms 4"
    climb train --seeds 0 --arms slow,grpo,fast,faster $FIXED  # compare learning rates
    climb train $FIXED --set grpo.steps=100 --set grpo.lr=0.02  # seeds 1, 2, 3 and their controls
    climb score --final-seed N  # when all settings are fixed: new problems

The parent run is trained if missing. A command stops after `--minutes` and resumes when given again;
every trial that was started stays in the table. `--set PATH=VALUE` changes any setting, `--arms A,B`
and `--seeds 1,2` select trials. `table` writes climb.md and climb.jsonl (metrics by step) beside this
script, from OUT/results and OUT/curves.jsonl, which `score` writes. It needs only the packages that a worker needs
(`nanolib.stages.worker`).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanolib import checkpoint, config, launch, report, rundir, tasks
from nanolib.config import GRPOConfig, SumsConfig
from nanolib.engine import Engine
from nanolib.evals.answers import Questions, evaluate, pass_at_k
from nanolib.grpo import Rollout, RolloutSource
from nanolib.rundir import Metrics, Run
from nanolib.runtime import Runtime
from nanolib.takeover import take_over
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox

Settings = dict[str, Any]

SFT: Settings = {  # some chat beside the worked examples, to keep it a chat model
    "sft.steps": None,  # set by epochs
    "sft.rows.smoltalk": 1000,
    "sft.rows.mmlu": 0,
    "sft.rows.arc_easy": 0,
    "sft.rows.arc_challenge": 0,
    "sft.rows.gsm8k": 0,
    "sft.sums.fewest": 2,
    "sft.sums.most": 6,
    "sft.eval_every": 1_000_000,  # only at the end
    "eval.core_problems": 0,
}
GRPO: Settings = {
    "grpo.task": "sums",
    "grpo.steps": 200,
    "grpo.questions": 64,  # Muon's step size ignores the gradient's scale: fewer answers, more noise
    "grpo.samples": 16,
    # Muon's momentum averages about 20 steps; before that, a full learning rate follows noise.
    "grpo.warmup": 0.2,
    "grpo.warmdown": 0.6,
    "grpo.max_new_tokens": 96,
    "grpo.eval_every": 50,
    "grpo.eval_questions": 200,
    "grpo.eval_samples": 16,
    "grpo.save_every": 25,
}
FOUR = {"grpo.updates_each": 4}
HOT = {"grpo.lr": 0.4}  # eight times too high
ARMS: dict[str, Settings] = {
    "grpo": {},
    "shuffled": {"grpo.shuffled": True},
    "slow": {"grpo.lr": 0.02},
    "fast": {"grpo.lr": 0.1},
    "faster": {"grpo.lr": 0.2},
    "kl": {"grpo.kl": 0.04},
    "deviation": {"grpo.deviation": True},
    "sequence-mean": {"grpo.sequence_mean": True},
    "skip-equal": {"grpo.skip_equal": True},
    "four-updates": FOUR,
    "clip-higher": FOUR | {"grpo.clip_high": 0.28},
    "cispo": FOUR | {"grpo.objective": "cispo"},
    "hot": HOT,
    "hot-kl": HOT | {"grpo.kl": 0.2},
}
NOTES = {
    "shuffled": "the control: a question's rewards are dealt to its answers at random",
    "kl": "a KL penalty in the loss (DeepSeekMath, arXiv:2402.03300)",
    "deviation": "advantages divided by the group's deviation (arXiv:2402.03300)",
    "sequence-mean": "a mean over each answer's tokens first (arXiv:2402.03300)",
    "skip-equal": "questions whose answers all score alike are left out (DAPO, arXiv:2503.14476)",
    "four-updates": "four updates from each step's answers, clipped (PPO, arXiv:1707.06347)",
    "clip-higher": "four updates, a higher upper clip (DAPO, arXiv:2503.14476)",
    "cispo": "four updates, the ratio clipped and not the loss (MiniMax-M1, arXiv:2506.13585)",
    "hot": "a learning rate far too high",
    "hot-kl": "the same rate on a KL leash",
}
ABOUT = ("seed", "arm", "terms", "sft", "given")  # identifies a trial
PASSES = (1, 2, 4, 8, 16)
DIALS = range(2, 9)  # numbers of terms that the pilot scores


# ---------------------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True)
class Bench:
    """Paths, and the settings that all trials share."""

    out: Path
    profile: str
    parent: str
    mirror: str | None
    given: Settings

    def machine(self) -> Settings:
        """Machine settings: one process per run."""
        return {"machine.ranks": 1} | ({"machine.mirror": self.mirror} if self.mirror else {})

    def without(self, *stages: str) -> Settings:
        """The given settings, without those of these stages."""
        return {k: v for k, v in self.given.items() if k.split(".")[0] not in stages}

    def prepare(self) -> Run:
        run = Run.open(self.profile, self.parent, self.machine() | self.without("sft", "grpo"))
        launch.stage("mid", run, watch=show)
        return run

    def run(self, name: str, settings: Settings, source: Run) -> Run:
        """A run for these settings, with the equal stages of `source` taken over."""
        path = str(self.out / f"{name}-{digest(settings)}")
        run = Run.open(self.profile, path, settings | self.machine())
        take_over(run, source)
        return run

    def started(self, seed: int, sft: Settings) -> Run:
        """The run with a seed's finished SFT."""
        settings = SFT | sft | {"sft.seed": seed} | self.without("grpo")
        run = self.run(f"sft-{seed}", settings, self.prepare())
        launch.stage("sft", run, watch=show)
        return run

    def results(self, kind: str) -> list[Settings]:
        files = sorted((self.out / "results").glob("*.jsonl"))
        return [row for file in files for row in Metrics(file).rows(kind)]

    def file(self, about: Settings) -> Metrics:
        """The trial's own results file, so that each file has one writer."""
        name = f"{about['arm']}-{about['seed']}-{digest(about)}"
        return Metrics(self.out / "results" / f"{name}.jsonl")


def digest(value: Settings) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:6]


def show(stage: rundir.StageDir, rows: Sequence[Settings]) -> None:
    """Print a line for each evaluation and when a stage is done."""
    if rows and (rows[-1]["kind"] == "eval" or stage.done()):
        told = {k: round(v, 3) for k, v in rows[-1].items() if isinstance(v, int | float)}
        print(f"{stage.path.parent.name} {stage.name} {told}", flush=True)


# ---------------------------------------------------------------------------- measuring


class Kept(RolloutSource):
    """Keeps the rollouts of the last step."""

    found: list[Rollout]

    def rollouts(self, step: int) -> list[Rollout]:
        self.found = super().rollouts(step)
        return self.found


class Judge:
    """Scores models that share a tokenizer on the same problems."""

    def __init__(self, run: Run, given: Settings):
        self.run, self.runtime = run, Runtime.start(run.config.machine)
        self.max_new_tokens = (GRPO | given)["grpo.max_new_tokens"]
        self.tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")

    def model(self, run: Run, stage: str):
        return checkpoint.load_model(run.stage(stage).checkpoints, self.runtime.device)

    def score(self, model, start, split: str, dial: SumsConfig, problems: int) -> Settings:
        """Score greedy and sampled answers to a split's problems; `start` is the KL's reference."""
        ours = self.run.config.recipe.grpo
        settings = GRPOConfig(
            questions=problems, samples=max(PASSES), top_k=ours.top_k, temperature=1.0
        )
        metrics = Metrics(self.run.path / f".score-{os.getpid()}.jsonl")
        metrics.path.unlink(missing_ok=True)
        with Sandbox() as sandbox:
            tool = lambda code: sandbox.run(code).text  # noqa: E731
            engine = Engine(model, self.tokenizer, self.runtime, tool)
            task = tasks.Sums(split, dial)
            questions = Questions(engine, task, self.max_new_tokens)
            source = Kept(
                questions=questions,
                config=settings,
                seed=1,
                device_batch=8,
                reference=start.nll,
                metrics=metrics,
            )
            source.updates(0)
            (row,) = metrics.rows("rollout")
            metrics.path.unlink()
            asked = [rollout.question for rollout in source.found]
            greedy = evaluate(questions, asked)["accuracy"]
            engine.release()
        right = {r.question: int(sum(r.rewards)) for r in source.found}
        n = settings.samples
        found = {f"pass@{k}": mean([pass_at_k(n, c, k) for c in right.values()]) for k in PASSES}
        return found | {
            "greedy": greedy,
            "sampled": row["reward"],
            "formatted": row["formatted"],
            "sampled_of_formatted": row["reward"] / max(row["formatted"], 1e-9),
            "tool": row["tool"],
            "cut": row["cut"],
            "tokens": row["answer_tokens"],
            "entropy": row["entropy"],
            "kl": row["kl"],
            "no_signal": 1 - row["mixed"],
            "distinct": len({task.problem(i)[0] for i in asked}),
            "right": [right[question] for question in sorted(right)],
        }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------------------- the three jobs


def pilot(bench: Bench, seed: int, sft: Settings) -> None:
    """Train one SFT and score its model on sums of 2 to 8 terms."""
    run = bench.started(seed, sft)
    judge = Judge(run, bench.given)
    model = judge.model(run, "sft")
    for terms in DIALS:
        dial = SumsConfig(fewest=terms, most=terms, largest=run.config.recipe.grpo.sums.largest)
        scores = judge.score(model, model, "test", dial, 100)
        row = {"seed": seed, **sft, "terms": terms, **scores}
        bench.file({"arm": "pilot", "seed": seed, **sft}).append(kind="pilot", step=0, **row)
        told = ("sampled", "greedy", "pass@16", "formatted", "tool", "entropy", "no_signal")
        words = ", ".join(f"{key} {scores[key]:.3f}" for key in told)
        print(f"pilot {sft} terms {terms}: {words}", flush=True)


def trial(bench: Bench, seed: int, sft: Settings, arm: str, terms: int) -> None:
    """Train SFT and one arm; writes a row at the start and one at the end."""
    about = {"seed": seed, "arm": arm, "terms": terms, "sft": sft, "given": bench.given}
    results = bench.file(about)
    if results.rows("trained"):
        return
    if not results.rows():
        results.append(kind="started", step=0, time=rundir.now(), **about)
    start = bench.started(seed, sft)
    dial = {"grpo.seed": seed, "grpo.sums.fewest": terms, "grpo.sums.most": terms}
    settings = SFT | sft | {"sft.seed": seed} | GRPO | dial | bench.given | ARMS[arm]
    run = bench.run(f"{arm}-{seed}", settings, start)
    launch.stage("grpo", run, watch=show)
    spent = {name: (run.stage(name).done() or {})["seconds"] for name in ("sft", "grpo")}
    device = (run.stage("grpo").done() or {})["machine"]["device"]
    where = {"start": str(start.path), "end": str(run.path)}
    results.append(kind="trained", step=1, **about, **where, seconds=spent, device=device)


def score(bench: Bench, trained: Settings, final_seed: int, problems: int) -> None:
    """Score a finished trial's first and last model on new problems."""
    results = bench.file({key: trained[key] for key in ABOUT})
    if any(row["final_seed"] == final_seed for row in results.rows("scored")):
        return
    run, start = Run.load(trained["end"], bench.machine()), Run.load(trained["start"])
    judge, dial = Judge(run, bench.given), run.config.recipe.grpo.sums
    split = f"final {final_seed}"
    first, last = judge.model(start, "sft"), judge.model(run, "grpo")
    before = judge.score(first, first, split, dial, problems)
    after = judge.score(last, first, split, dial, problems)
    row = trained | {"kind": "scored", "step": 2, "before": before, "after": after}
    results.append(**row, final_seed=final_seed, problems=problems)
    gains = [f"{k} {before[k]:.3f} -> {after[k]:.3f}" for k in ("sampled", "greedy")]
    print(f"seed {trained['seed']} {trained['arm']}: {', '.join(gains)}", flush=True)


def same(row: Settings, about: Settings) -> bool:
    return all(row.get(key) == value for key, value in about.items())


# ---------------------------------------------------------------------------- the table


def table(bench: Bench) -> str:
    """All started trials with their models' scores, as Markdown."""
    rows, scored = [], bench.results("scored")
    order = list(ARMS)
    trials = sorted(bench.results("started"), key=lambda it: (order.index(it["arm"]), it["seed"]))
    for started in trials:
        about = {key: started[key] for key in ABOUT}
        found = [row for row in scored if same(row, about)] or [None]
        rows += [_line(about, row) for row in found]
    head = [
        "arm",
        "seed",
        "terms",
        "settings",
        "sampled",
        "gain ± se",
        "greedy",
        "of well-formatted",
    ]
    head += ["format", "pass@4", "pass@16", "tokens", "entropy", "KL", "no signal", "SFT + GRPO"]
    return report.table(head, rows)


def shared(about: Settings) -> Settings:
    """The settings that trials of several seeds and arms share."""
    return about["sft"] | about["given"]


def _line(about: Settings, row: Settings | None) -> list[str]:
    first = [about["arm"], str(about["seed"]), str(about["terms"]), digest(shared(about))]
    if row is None:
        return [*first, "not finished", *[""] * 11]
    before, after = row["before"], row["after"]

    def both(key: str, digits: int = 3) -> str:
        return f"{before[key]:.{digits}f} → {after[key]:.{digits}f}"

    n = max(PASSES)
    gains = [(b - a) / n for a, b in zip(before["right"], after["right"], strict=True)]
    gain = mean(gains)
    spread = math.sqrt(mean([(it - gain) ** 2 for it in gains]) / len(gains))
    seconds = sum(row["seconds"].values())
    return [
        *first,
        both("sampled"),
        f"{100 * gain:+.1f} ± {100 * spread:.1f}",
        both("greedy"),
        both("sampled_of_formatted"),
        both("formatted"),
        both("pass@4"),
        both("pass@16"),
        both("tokens", 0),
        both("entropy"),
        f"{after['kl']:.3f}",
        both("no_signal", 2),
        f"{seconds / 60:.1f} min",
    ]


def pilots(bench: Bench) -> str:
    """Accuracy of the pilot's SFT models by number of terms, as Markdown."""
    found: dict[tuple, dict[int, float]] = {}
    for row in bench.results("pilot"):
        about = tuple(row[f"sft.{key}"] for key in ("rows.sums", "epochs", "lr"))
        found.setdefault(about, {})[row["terms"]] = row["sampled"]
    head = ["worked examples", "epochs", "sft.lr", *(f"{n} terms" for n in (2, 3, 4))]
    rows = [
        [*map(str, about), *(f"{found[about][n]:.2f}" for n in (2, 3, 4))]
        for about in sorted(found)
    ]
    return report.table(head, rows)


def write_table(bench: Bench, target: Path) -> None:
    scored = bench.results("scored")
    seeds = ", ".join(sorted({str(row["final_seed"]) for row in scored}))
    problems = ", ".join(sorted({str(row["problems"]) for row in scored}))
    devices = ", ".join(sorted({row["device"] for row in scored}))
    known = {digest(shared(row)): shared(row) for row in bench.results("started")}
    settings = "\n".join(f"- {key}: `{json.dumps(value)}`" for key, value in known.items())
    notes = "\n".join(f"- {arm}: {note}; `{json.dumps(ARMS[arm])}`" for arm, note in NOTES.items())
    text = f"""# GRPO on sums, and its control

Written by `runs/bench/climb.py` on {rundir.now()[:10]}; profile {bench.profile}, {devices}, several trials
on each GPU at once. From one run's base and mid, every seed has an SFT and a GRPO of its own. Scores are on {problems}
problems of final seed {seeds}, which no training used, with {max(PASSES)} answers each, sampled at temperature 1;
before (SFT) → after (GRPO). Gains are in points, with the standard error over questions; KL (to the SFT
model) and entropy are in nats a token; the last column is training time. All trials that were started
are listed; those not finished only compared learning rates or had no time left.

{table(bench)}

Settings:

{settings}

Arms:

{notes}

## The pilot

Sampled accuracy after SFT, seed 0, before anything else was chosen.

{pilots(bench)}
"""
    target.write_text(text, encoding="utf-8")


def write_curves(bench: Bench) -> None:
    """Write each trial's metrics by step to curves.jsonl."""
    names = ("step", "reward", "mixed", "answer_tokens", "cut", "formatted", "entropy", "kl")
    with (bench.out / "curves.jsonl").open("w", encoding="utf-8") as file:
        for trained in bench.results("trained"):
            about = {key: trained[key] for key in ("arm", "seed")}
            for row in Run.load(trained["end"]).stage("grpo").metrics.rows("rollout"):
                kept = {key: round(row[key], 3) for key in names if key in row}
                file.write(json.dumps(about | kept) + "\n")


# ---------------------------------------------------------------------------- several GPUs


def spread(jobs: Sequence[Settings], given: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run each job in its own process, one per GPU; returns how many failed."""
    gpus, ends = given.gpus, time.monotonic() + 60 * given.minutes
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    places = max(1, gpus) * given.at_once
    for place in range(places):
        free.put(place)

    def work(job: Settings) -> int:
        place = free.get()
        if time.monotonic() > ends:
            free.put(place)
            return 1
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(place % gpus)} if gpus else {})
        command = [sys.executable, "-m", "runs.bench.climb", *arguments, "--job", json.dumps(job)]
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, cwd=config.REPOSITORY)
        try:
            code = process.wait(max(1, ends - started))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # lets a stage save first
            code = process.wait()
        free.put(place)
        took = f"after {time.monotonic() - started:.0f} s"
        print(f"{job}: {'done' if code == 0 else f'not done ({code})'} {took}", flush=True)
        return code

    with ThreadPoolExecutor(places) as pool:
        return sum(code != 0 for code in pool.map(work, jobs))


def jobs(bench: Bench, given: argparse.Namespace) -> list[Settings]:
    grid = [
        {"sft.rows.sums": rows, "sft.epochs": epochs, "sft.lr": lr}
        for rows, epochs, lr in itertools.product(given.rows, given.epochs, given.lr)
    ]
    if given.command == "pilot":
        return [{"seed": 0, "sft": sft} for sft in grid]
    if given.command == "score":
        return [{"trained": number} for number in range(len(bench.results("trained")))]
    return [
        {"seed": seed, "sft": grid[0], "arm": arm} for arm in given.arms for seed in given.seeds
    ]


def work(bench: Bench, given: argparse.Namespace, job: Settings) -> None:
    if given.command == "pilot":
        pilot(bench, job["seed"], job["sft"])
    elif given.command == "train":
        trial(bench, job["seed"], job["sft"], job["arm"], given.terms)
    else:
        trained = bench.results("trained")[job["trained"]]
        score(bench, trained, given.final_seed, given.problems)


def main(arguments: Sequence[str]) -> None:
    numbers = lambda text: [int(it) for it in text.split(",")]  # noqa: E731
    floats = lambda text: [float(it) for it in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("pilot", "train", "score", "table"))
    parser.add_argument("--profile", default="h100")
    parser.add_argument("--from", dest="parent", help="the parent run; by default OUT/parent")
    parser.add_argument("--mirror")
    parser.add_argument("--out", default=str(rundir.runs_folder() / "climb"))
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to use")
    parser.add_argument("--at-once", type=int, default=1, help="processes per GPU, or on the CPU")
    parser.add_argument("--seeds", type=numbers, default=[1, 2, 3])
    parser.add_argument("--rows", type=numbers, default=[400], help="worked examples in SFT")
    parser.add_argument("--epochs", type=numbers, default=[8], help="epochs of SFT")
    parser.add_argument("--lr", type=floats, default=[0.02], help="learning rates of SFT (sft.lr)")
    parser.add_argument("--terms", type=int, default=4, help="terms of GRPO's sums")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=["grpo", "shuffled"])
    parser.add_argument("--final-seed", type=int, help="seed of the final problems")
    parser.add_argument("--minutes", type=float, default=600, help="stop and save after this")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    out = Path(given.out).absolute()
    mirror = given.mirror and str(Path(given.mirror).absolute())
    settings = config.check_overrides(dict(item.split("=", 1) for item in given.set))
    bench = Bench(out, given.profile, given.parent or str(out / "parent"), mirror, settings)
    if unknown := set(given.arms) - set(ARMS):
        parser.error(f"there is no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    if given.command == "score" and given.final_seed is None:
        parser.error("score needs --final-seed, a number nobody has used yet")
    if given.command == "table":
        write_table(bench, Path(__file__).with_suffix(".md"))
        shutil.copy(out / "curves.jsonl", Path(__file__).with_suffix(".jsonl"))
    elif given.job is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
        try:
            work(bench, given, given.job)
        except KeyboardInterrupt:
            sys.exit(130)
    else:
        if given.command != "score":
            bench.prepare()
        failed = spread(jobs(bench, given), given, arguments)
        if given.command == "score":
            write_table(bench, out / "climb.md")
            write_curves(bench)
        if failed:
            sys.exit(f"{failed} jobs are not done: the same command goes on")


if __name__ == "__main__":
    main(sys.argv[1:])
