"""Scaling over ranks: the same training with world size 1, 2, 4, ….

    uv run nanolib bench ranks --profile smoke --ranks 1 2 4 8 --steps 48 [--model.depth 4 …]

Ranks communicate through gloo on CPUs and NCCL on GPUs. Each world size trains base on the same rows,
then GRPO, and scores the result; then one rank of the largest group is killed, and half of the ranks
resume. Throughput is measured in the first half of the steps. In the second half, phases are
synchronised to time them separately, and bytes are counted as a ring sends them: of S bytes
reduce-scattered or all-gathered among R ranks, each sends S (R − 1) / R; all-reduced, twice that.

Run as a program (``python -m runs.bench.ranks base DIR``), this module is the instrumented worker.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from nanolib import accounting, launch, report, rundir
from nanolib.config import split_settings
from nanolib.rundir import Run, StageDir
from runs.bench.faults import command_line

# Collective -> the multiple of (R − 1) / R of its bytes that a ring sends.
COLLECTIVES = {"reduce_scatter_tensor": 1, "all_gather_into_tensor": 1, "all_reduce": 2}
SHORT = {"mid.enabled": False, "sft.steps": 8}  # between base and GRPO


# ---------------------------------------------------------------------------- the worker


class Counts:
    """Seconds and bytes per phase in the second half of training, on one rank."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)
        self.steps = self.state = 0  # steps counted; bytes of optimizer state
        self._inner = 0.0  # seconds of phases nested in the current one

    @contextlib.contextmanager
    def phase(self, name: str, size: int = 0) -> Generator[None]:
        """Time a phase, excluding nested ones, with the device synchronised before and after."""
        import torch

        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        wait()
        started, outer, self._inner = time.perf_counter(), self._inner, 0.0
        yield
        wait()
        seconds = time.perf_counter() - started
        self.seconds[name] += seconds - self._inner
        self.bytes[name] += size
        self._inner = outer + seconds

    def install(self) -> None:
        """Wrap the trainer, the optimizer and the collectives of this process."""
        import torch
        import torch.distributed as dist

        from nanolib.optim import MuonAdamW
        from nanolib.train import Trainer

        train_step, counting = Trainer.train_step, False

        def wrap(owner: Any, name: str, collective: bool = False) -> None:
            plain = getattr(owner, name)

            def counted(*arguments: Any, **options: Any) -> Any:
                if not counting:
                    return plain(*arguments, **options)
                tensors = [a for a in arguments if collective and isinstance(a, torch.Tensor)]
                with self.phase(name, max((t.nbytes for t in tensors), default=0)):
                    return plain(*arguments, **options)

            setattr(owner, name, counted)

        def step(trainer: Trainer) -> Any:
            nonlocal counting
            counting = trainer.step >= trainer.steps // 2
            self.steps += counting
            groups = trainer.optimizer.groups
            self.state = sum(slot.nbytes for group in groups for slot in group.state.values())
            return train_step(trainer)

        setattr(Trainer, "train_step", step)  # noqa: B010 (a plain assignment is not typed)
        wrap(Trainer, "forward_backward")
        wrap(MuonAdamW, "update")
        for name in COLLECTIVES:
            wrap(dist, name, collective=True)

    def about(self) -> dict[str, Any]:
        import resource

        import torch

        cuda = torch.cuda.is_available()
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        found = {key: value for key, value in vars(self).items() if key != "_inner"}
        return found | {"peak": torch.cuda.max_memory_allocated() if cuda else peak}


def work() -> int:
    """The worker of any stage; base leaves ``rank_N.json`` in its directory."""
    import os

    from nanolib.stages import worker

    counts = Counts()
    if sys.argv[1] == "base":
        counts.install()
    code = worker.main()
    if sys.argv[1] == "base" and code == 0:
        path = Path(sys.argv[2], "base", f"rank_{os.environ.get('RANK', 0)}.json")
        rundir.write_json(path, counts.about())
    return code


# ---------------------------------------------------------------------------- one group of ranks


def begin(profile: str, name: str, ranks: int, overrides: dict[str, Any], data: Run | None) -> Run:
    """A new run with this world size, replacing an old one; `data`: the run to take tokens from."""
    path = rundir.runs_folder() / "ranks" / f"{profile}-{name}"
    shutil.rmtree(path, ignore_errors=True)  # its timings are out of date
    run = Run.open(profile, str(path), overrides | {"machine.ranks": ranks})
    if data is not None:
        for stage in ("data", "tokenizer", "shards"):
            shutil.copytree(data.path / stage, run.path / stage)
    return run


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in _steps(run.stage("base"))]


def _steps(place: StageDir) -> list[dict[str, Any]]:
    return [row for row in place.metrics.rows() if row["kind"] == "train"]


def furthest(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference between two curves of equal length."""
    return max(abs(a - b) for a, b in zip(mine, theirs, strict=True))


def measured(run: Run, alone: Run) -> dict[str, str]:
    """The figures of one world size, compared with one rank."""
    place, ranks = run.stage("base"), run.config.machine.ranks or 1
    rows, first = _steps(place), _steps(alone.stage("base"))
    speed, speed_alone = _speed(rows), _speed(first)
    counted = [json.loads((place.path / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
    lead = counted[0]
    record = place.done() or {}
    recipe = run.config.recipe
    share = accounting.mfu(
        recipe.model,
        recipe.tokenizer.vocab_size,
        tokens_per_second=speed,
        device=str(record["machine"]["device"]),
        ranks=ranks,
    )

    def each(name: str) -> float:
        return lead["seconds"].get(name, 0.0) / lead["steps"]

    sent = sum(COLLECTIVES[name] * lead["bytes"].get(name, 0) for name in COLLECTIVES)
    return {
        "ranks": str(ranks),
        "tokens/s": f"{speed:,.0f}",
        "to one rank": f"{speed / speed_alone:.2f}",
        "MFU": report.share(share),
        "furthest loss": f"{furthest(losses(run), losses(alone)):.1e}",
        "peak memory a rank, MB": f"{max(c['peak'] for c in counted) / 1e6:,.0f}",
        "optimizer state a rank, MB": " · ".join(
            dict.fromkeys(f"{c['state'] / 1e6:.2f}" for c in counted)
        ),
        "sent a step and rank, MB": f"{sent / lead['steps'] * (ranks - 1) / ranks / 1e6:.2f}",
        "forward and backward, ms": f"{1e3 * each('forward_backward'):.1f}",
        "reduce-scatter, ms": f"{1e3 * each('reduce_scatter_tensor'):.1f}",
        "all-gather, ms": f"{1e3 * each('all_gather_into_tensor'):.1f}",
        "all-reduce, ms": f"{1e3 * each('all_reduce'):.1f}",
        "rest of the update, ms": f"{1e3 * each('update'):.1f}",
        "GRPO, answers/s": f"{_answers_per_second(run):.1f}",
        "scores, s": f"{(run.stage('eval', of='grpo').done() or {})['seconds']:.1f}",
    }


def _speed(rows: Sequence[dict[str, Any]]) -> float:
    """Tokens per second in the second quarter: warmed up, and not instrumented yet."""
    quarter = rows[len(rows) // 4 : len(rows) // 2]
    return sum(row["tokens"] for row in quarter) / sum(row["seconds"] for row in quarter)


def _answers_per_second(run: Run) -> float:
    """Over all steps but the first, including updates."""
    config, rows = run.config.recipe.grpo, _steps(run.stage("grpo"))[1:]
    return len(rows) * config.questions * config.samples / sum(row["seconds"] for row in rows)


# ---------------------------------------------------------------------------- a killed rank


def strike(run: Run) -> float:
    """Train base and kill -9 its last rank past the middle; seconds until the launcher reports it."""
    import psutil

    struck: list[float] = []
    enough = 0.6 * (run.config.recipe.base.steps or 0)

    def kill(place: StageDir, rows: Sequence[dict[str, Any]]) -> None:
        if struck or len([row for row in rows if row["kind"] == "train"]) <= enough:
            return
        workers = [
            child
            for child in psutil.Process().children(recursive=True)
            if "torch.distributed.run" not in (words := command_line(child))
            and launch.WORKER in words
        ]
        workers[-1].kill()
        struck.append(time.monotonic())

    try:
        launch.stage("base", run, watch=kill)
    except launch.WorkerError:
        return time.monotonic() - struck[0]
    raise AssertionError("base was finished before a rank could be killed; raise --steps")


def struck_and_resumed(run: Run, alone: Run) -> str:
    """The effect of killing one rank and resuming with half of them."""
    from nanolib import checkpoint

    ranks = run.config.machine.ranks or 1
    seconds, saved = strike(run), checkpoint.latest(run.stage("base").checkpoints)
    fewer = Run.load(str(run.path), {"machine.ranks": ranks // 2})
    launch.stage("base", fewer)
    return (
        f"One of {ranks} ranks killed (-9) past the middle: the error came after {seconds:.1f} s, "
        f"and the same command on {ranks // 2} rank(s) went on from step {saved and saved.step} to a "
        f"curve that differs from one rank's by at most {furthest(losses(run), losses(alone)):.1e}."
    )


# ---------------------------------------------------------------------------- the command


def main(arguments: Sequence[str]) -> None:
    words, settings = split_settings(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=48, help="steps of base")
    given = parser.parse_args(words)
    launch.WORKER = "runs.bench.ranks"
    most = max(given.ranks)
    overrides = SHORT | {
        "base.steps": given.steps,
        "base.save_every": max(1, given.steps // 4),
        "grpo.questions": 2 * most,  # at least one per rank
    }
    overrides |= settings
    runs: list[Run] = []
    for ranks in sorted({1, *given.ranks}):
        run = begin(given.profile, f"on-{ranks}", ranks, overrides, runs[0] if runs else None)
        for stage in ("base", "sft", "grpo", "eval"):
            launch.stage(stage, run)
        runs.append(run)
        print(f"{ranks} rank(s): done", flush=True)
    tables = [measured(run, runs[0]) for run in runs]
    record = (runs[-1].stage("base").done() or {})["machine"]
    today = datetime.datetime.now(datetime.UTC).date()
    print(f"\n{today}, {record['device']}, {record['cores']} cores, {record['dtype']}\n")
    header, *rows = [[name, *(figures[name] for figures in tables)] for name in tables[0]]
    print(report.table(header, rows))
    if most > 1:
        struck = begin(given.profile, "struck", most, overrides, runs[0])
        print("\n" + struck_and_resumed(struck, runs[0]))


if __name__ == "__main__":
    sys.exit(work())
