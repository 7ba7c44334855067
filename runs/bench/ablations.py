"""Ablations: what does each ingredient of `modern` contribute, at which scale, beyond noise?

``nanolib bench ablations SCALE [--mirror DIR] [--gpus N]`` trains classic, classic with one
ingredient (+NAME), modern, and modern without one (-NAME), with each seed and on the same tokens, so
other work on the machine does not affect the losses. On an otherwise idle machine, ``--quiet`` also
measures step times. ``--at-once`` runs several trials per GPU, or on the CPU. Each finished trial
appends a row to ablations.jsonl, and the same command resumes. ``--table`` writes ablations.md from
the rows. ``--try NAME --set PATH=VALUE`` adds a variant of your own.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

ROWS = Path(__file__).with_suffix(".jsonl")
WARM = 3  # warm-up steps, which compile
ROWS_AT_ONCE = 32  # micro-batch size on a GPU
DEEP = {"base.batch_tokens": 65_536, "model.depth": 12}


@dataclasses.dataclass(frozen=True)
class Scale:
    """A model size with its data and training length."""

    about: str
    profile: str
    settings: dict[str, Any]
    steps: int


SCALES = {
    "toy": Scale("toy world, depth 4, width 128", "demo", {}, 300),
    "pack": Scale("web text, depth 8, width 512", "h100", {"base.batch_tokens": 32_768}, 256),
    "deep": Scale("web text, depth 12, width 768", "h100", DEEP, 160),
}
CLAIMS = {  # public results, in short
    "value_embeddings": "helps (modded-nanogpt, nanochat 2026)",
    "x0": "helps (both)",
    "smear": "helps (nanochat 2026); not in all records",
    "backout": "helps a little (modded-nanogpt, late 2025)",
    "polar_express": "helps a little (arXiv:2505.16932)",
    "normuon": "helps: 0.9 of the steps or fewer (arXiv:2510.05491)",
    "cautious_decay": "helps (arXiv:2510.12402; both)",
    "multi_token": "helps a speedrun; not small models (arXiv:2404.19737)",
    "windows": "saves time at long contexts (both)",
    "document_mask": "helps a little where documents are short (both)",
}


def variants() -> dict[str, dict[str, Any]]:
    """The settings of each variant, by name."""
    from nanolib.config import INGREDIENTS, PRESETS

    modern = PRESETS["modern"]
    found: dict[str, dict[str, Any]] = {"classic": {}, "modern": {"model.preset": "modern"}}
    for name in INGREDIENTS:
        found[f"+{name}"] = {"model.ingredients": [name]}
        if name in modern:
            rest = [other for other in modern if other != name]
            found[f"-{name}"] = {"model.preset": "modern", "model.ingredients": rest}
    return found


# ---------------------------------------------------------------------------- one variant


def prepare(scale: Scale, mirror: str | None) -> Path:
    """The run with text, tokenizer and token shards, created if missing."""
    from nanolib import launch
    from nanolib.rundir import Run, runs_folder

    machine = {"machine.mirror": mirror} if mirror else {}
    run = Run.open(scale.profile, f"ablations-{scale.profile}", machine)
    launch.stage("shards", run)
    return runs_folder() / run.id


def trial(
    prepared: Path,
    scale_name: str,
    steps: int,
    variant: str,
    settings: dict,
    seeds: list[int],
    threads: int,
    quiet: bool,
) -> None:
    """Train one variant with each seed, compiling once, and append its rows."""
    import torch

    from nanolib import config
    from nanolib.data.sources import TextSource
    from nanolib.evals.bpb import bits_per_byte
    from nanolib.guard import Guard
    from nanolib.model import GPT
    from nanolib.optim import MuonAdamW
    from nanolib.rundir import Run, StageDir
    from nanolib.runtime import Runtime, processor, seed_of
    from nanolib.stages import Context
    from nanolib.stages.text import shard_paths, validation_documents
    from nanolib.train import Trainer

    scale = SCALES[scale_name]
    resolved = config.resolve(
        scale.profile, scale.settings | settings | {"machine.threads": threads}
    )
    recipe, guard = resolved.recipe, Guard.start()
    runtime, run = Runtime.start(resolved.machine), Run.load(str(prepared))
    context = Context(run=run, stage=run.stage("base"), runtime=runtime, guard=guard)
    tokenizer, documents = context.tokenizer, validation_documents(context)
    cuda, length = runtime.device.type == "cuda", recipe.model.sequence_len
    model = GPT.build(recipe.model, tokenizer.vocab_size, runtime.device, seeds[0])
    nll = model.compiled_nll() if cuda else model.nll

    def trainer(seed: int, steps: int) -> Trainer:
        model.init_weights(seed)
        source = TextSource.open(
            shard_paths(run)[0],
            length=length,
            batch_rows=recipe.base.batch_tokens // length,
            bos=tokenizer.bos,
            seed=seed_of(seed, "base"),
            device_batch=ROWS_AT_ONCE if cuda else None,
        )
        return Trainer(
            stage=StageDir("base", Path(tempfile.gettempdir())),
            model=model,
            nll=nll,
            optimizer=MuonAdamW(model, recipe.optim, runtime),
            source=source,
            schedule=recipe.base,
            steps=steps,
            save_every=steps + 1,
            eval_every=steps + 1,
            runtime=runtime,
            guard=guard,
            about={},
        )

    def train(seed: int, steps: int) -> tuple[float, float]:
        """The final loss and the median seconds per step."""
        this, loss, took = trainer(seed, steps), 0.0, []
        for _ in range(steps):
            started = time.perf_counter()
            loss = this.train_step()[0]["loss"]
            took.append(time.perf_counter() - started)
        return loss, median(took)

    train(seeds[0], WARM)
    for seed in seeds:
        loss, seconds = train(seed, steps)
        row = {
            "scale": scale_name,
            "variant": variant,
            "seed": seed,
            "settings": settings,
            "steps": steps,
            "tokens": steps * recipe.base.batch_tokens,
            "step_seconds": round(seconds, 5) if quiet else None,
            "loss": round(loss, 5),
            "bpb": round(bits_per_byte(model, documents, tokenizer, runtime), 5),
            "parameters": sum(p.numel() for p in model.parameters()),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else None,
            "device": torch.cuda.get_device_name() if cuda else processor(),
            "date": datetime.date.today().isoformat(),
        }
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{variant:<24} seed {seed}: {row['bpb']:.4f} bits a byte, {seconds:.4f} s", flush=True
        )


# ---------------------------------------------------------------------------- all of them


def run_all(given: argparse.Namespace, wanted: dict[str, dict[str, Any]]) -> None:
    """Run each variant in its own process, as many at once as there are GPUs or slots."""
    prepared = prepare(SCALES[given.scale], given.mirror)
    jobs: queue.SimpleQueue[tuple[str, dict, list[int]]] = queue.SimpleQueue()
    for variant, settings in wanted.items():
        done = {
            row["seed"]
            for row in rows()
            if (row["scale"], row["variant"]) == (given.scale, variant)
        }
        if missing := [seed for seed in given.seeds if seed not in done]:
            jobs.put((variant, settings, missing))
    steps = given.steps or SCALES[given.scale].steps
    # With a thread per core in each process, they would wait for each other in every small op.
    places = (given.gpus or 1) * given.at_once
    threads = given.threads or max(1, (os.cpu_count() or 1) // places)
    deadline = time.monotonic() + 60 * given.minutes

    def work(place: int) -> None:
        while not jobs.empty() and time.monotonic() < deadline:
            job = json.dumps([str(prepared), given.scale, steps, *jobs.get(), threads, given.quiet])
            environment = dict(os.environ)
            if given.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = str(place % given.gpus)
            command = [sys.executable, "-m", "runs.bench.ablations", "--trial", job]
            if failed := subprocess.run(command, env=environment).returncode:
                print(f"{job} ended with exit code {failed}", flush=True)

    workers = [threading.Thread(target=work, args=[i]) for i in range(places)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


# ---------------------------------------------------------------------------- the table

NONE = "—"
HEAD = """# The transfer table

Made by `nanolib bench ablations`. What each ingredient of preset `modern` does to bits per byte
(lower is better) at equal tokens and, where it was taken, to the time of a step: with it minus
without it, mean ± two standard errors of the same seeds, bold where that is beyond the noise. "+":
alone on `classic`. "-": the last to join the others in `modern`, which until 2026-11-29 had `backout`
and `normuon` too, as in most rows of `toy` and `pack`; those not in `modern` joined it without these two.

"""


def _about(scales: Sequence[str]) -> str:
    lines = []
    for name in scales:
        mine = [row for row in rows() if row["scale"] == name]
        devices, dates = (
            sorted({row["device"] for row in mine}),
            sorted({row["date"] for row in mine}),
        )
        trained = f"{mine[0]['steps']} steps, {mine[0]['tokens']:,} tokens"
        seeds = ", ".join(map(str, sorted({row["seed"] for row in mine})))
        what = f"{SCALES[name].about}, {trained}, seeds {seeds}"
        lines.append(f"- {name}: {what}; {', '.join(devices)}; {' to '.join(dates)}")
    return "\n".join(lines) + "\n"


def write_table() -> None:
    """Write ablations.md: each ingredient by scale, added to classic and removed from modern."""
    from nanolib.config import REMOVED

    scales = [name for name in SCALES if any(row["scale"] == name for row in rows())]
    heads = ["ingredient", *(f"{name}, {way}" for name in scales for way in "+-"), "public records"]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for name, claim in CLAIMS.items():
        cells = [_effect(scale, way, name) for scale in scales for way in "+-"]
        left = "; removed: too little for its lines" if name in REMOVED else ""
        lines.append(" | ".join([f"`{name}`", *cells, claim + left]))
    lines.append(" | ".join(["**all of modern**", *(_modern(scale) for scale in scales), ""]))
    text = HEAD + "\n".join(f"| {line} |" for line in lines) + "\n\n" + _about(scales)
    ROWS.with_suffix(".md").write_text(text)


def _found(scale: str, variant: str) -> dict[int, dict[str, Any]]:
    return {
        row["seed"]: row for row in rows() if (row["scale"], row["variant"]) == (scale, variant)
    }


def _effect(scale: str, way: str, name: str) -> str:
    """The ingredient's effect on bits per byte, paired by seed, and on step time."""
    pairs = [("modern", f"-{name}"), (f"modern+{name}", "modern"), (f"lean+{name}", "lean")]
    for with_it, without in [(f"+{name}", "classic")] if way == "+" else pairs:
        if (found := _difference(_found(scale, with_it), _found(scale, without))) != NONE:
            return found
    return NONE


def _modern(scale: str) -> str:
    return _difference(_found(scale, "modern"), _found(scale, "classic")) + " | "


def _difference(more: dict[int, dict], less: dict[int, dict]) -> str:
    if len(seeds := sorted(more.keys() & less.keys())) < 2:
        return NONE
    gains = [more[seed]["bpb"] - less[seed]["bpb"] for seed in seeds]
    noise = 2 * stdev(gains) / math.sqrt(len(gains))
    paces = [it[seed]["step_seconds"] for seed in seeds for it in (more, less)]
    pace = f", {mean(paces[::2]) / mean(paces[1::2]):.2f} ×" if all(paces) else ""
    beats = "**" if abs(mean(gains)) > noise and len(seeds) > 2 else ""
    few = "" if len(seeds) > 2 else ", two seeds"
    return f"{beats}{mean(gains):+.4f}{beats} ± {noise:.4f}{pace}{few}"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("nanolib bench ablations", description=__doc__)
    parser.add_argument("scale", nargs="?", choices=SCALES, default="pack")
    parser.add_argument("--mirror")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=1, help="trials per GPU, or on the CPU")
    parser.add_argument("--quiet", action="store_true", help="idle machine: measure step times")
    parser.add_argument("--threads", type=int, help="CPU threads per process")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--minutes", type=float, default=1e9, help="start no trials after this")
    parser.add_argument("--steps", type=int, help="override the scale's")
    parser.add_argument("--only", metavar="A,B", help="variants, such as --only=classic,+x0,-x0")
    parser.add_argument("--try", dest="name", help="a variant of your own")
    parser.add_argument("--set", nargs="+", default=[], metavar="PATH=VALUE")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.trial:
        prepared, *job = json.loads(given.trial)
        return trial(Path(prepared), *job)
    if given.table:
        return write_table()
    if given.name:
        wanted = {given.name: dict(pair.split("=", 1) for pair in given.set)}
    else:
        wanted = variants()
        wanted = {name: wanted[name] for name in (given.only or ",".join(wanted)).split(",")}
    return run_all(given, wanted)


if __name__ == "__main__":
    main(sys.argv[1:])
