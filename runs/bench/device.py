"""What one device does with a profile's model, in some minutes: memory, speed, sampling.

    uv run nanolib bench device --profile h100 --model.depth 12

Weights are random and nothing is read: run it first on a machine you have rented. Programs are what
torch.compile has made since the model was built.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nanolib import accounting, config, planning, report
from nanolib.data.packing import Batch
from nanolib.engine import Engine, inverse_cdf
from nanolib.model import GPT
from nanolib.optim import MuonAdamW
from nanolib.runtime import Runtime, processor
from nanolib.tokenizer import Tokenizer

Row = tuple[str, str]  # what was measured, and the figure
LENGTHS = (0.15, 0.21, 0.19, 0.22, 0.13)  # of the context: the rows of five GRPO steps


class Bench:
    """A profile's model on this machine's device."""

    def __init__(self, recipe: config.Recipe, machine: config.MachineConfig, repeats: int):
        self.recipe, self.repeats = recipe, repeats
        self.runtime = Runtime.start(machine)
        self.device, self.cuda = self.runtime.device, self.runtime.device.type == "cuda"
        self.vocab = recipe.tokenizer.vocab_size

    def seconds(self, work: Callable[[], Any], times: int = 1) -> float:
        """Mean seconds of `work`, the device waited for."""
        wait = torch.cuda.synchronize if self.cuda else lambda: None
        wait()
        started = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        return (time.perf_counter() - started) / times

    def model(self) -> GPT:
        """With every weight drawn: a new model's zero projections would hide what goes wrong."""
        model = GPT.empty(self.recipe.model, self.vocab, self.device)
        generator = torch.Generator(self.device).manual_seed(1)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.02, generator=generator)
        return model

    def batch(self, rows: int, length: int) -> Batch:
        ids_BT = torch.randint(self.vocab, (rows, length), device=self.device)
        return Batch(inputs_BT=ids_BT, targets_BT=ids_BT.roll(-1, 1))

    def rows(self) -> Iterator[Row]:
        """Everything; a part that fails is a row of its own, and the next one follows."""
        for part in (self.training, self.writing, self.drawing):
            try:
                yield from part()
            except Exception as error:
                traceback.print_exc()
                yield f"**{part.__name__} failed**", f"{type(error).__name__}: {error}"[:200]

    def training(self) -> Iterator[Row]:
        """The micro-batch found, then speed and memory of forward, backward and update."""
        length, model = self.recipe.model.sequence_len, self.model()
        share = planning.share_of(self.recipe, "base", 1)
        nll = self.compiled(model)
        found: list[int] = []
        took = self.seconds(
            lambda: found.append(planning.fitting_rows(model, nll, length, share, self.runtime))
        )
        yield (
            "micro-batch",
            f"{found[0]} of base's {share} rows of {length:,}, found in {took:.1f} s",
        )
        batch, tokens = self.batch(found[0], length), found[0] * length
        programs = _programs()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        speed = tokens / self.seconds(self.step(nll, batch), self.repeats)
        yield "forward and backward", self._speed(speed)
        optimizer = MuonAdamW(model, self.recipe.optim, self.runtime)
        optimizer.step(0.1)  # the first one loads its kernels
        update = self.seconds(lambda: optimizer.step(0.1), self.repeats)
        yield "update", f"{1e3 * update:.1f} ms"
        memory = accounting.TrainingMemory(
            model.config, self.vocab, 1, self.cuda, self.runtime.dtype.itemsize
        )
        estimate = memory.total(found[0])
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
            yield (
                "peak memory",
                f"{planning.size(peak)}, estimated {planning.size(estimate)}",
            )
        yield "programs compiled for a shape that was tried", str(_programs() - programs)
        for part in LENGTHS:
            part_length = 16 * math.ceil(part * length / 16)
            step = self.step(nll, self.batch(max(1, tokens // part_length), part_length))
            first, then = self.seconds(step), self.seconds(step, self.repeats)
            yield f"rows of {part_length}", f"{first:.2f} s, then {then:.3f} s"
        yield "programs compiled for rows of GRPO", str(_programs() - programs)
        yield (
            "loss, as it is trained and in float32",
            f"{self._rounding(model, nll):.1e} nats apart",
        )

    def compiled(self, model: GPT) -> Callable[[Batch], torch.Tensor]:
        return model.compiled_nll() if self.cuda else model.nll

    def step(self, nll: Callable[[Batch], torch.Tensor], batch: Batch) -> Callable[[], None]:
        def forward_backward() -> None:
            with self.runtime.autocast():
                nll_BT = nll(batch)
            nll_BT.mean().backward()

        return forward_backward

    @torch.no_grad()
    def _rounding(self, model: GPT, nll: Callable[[Batch], torch.Tensor]) -> float:
        batch = self.batch(1, self.recipe.model.sequence_len)
        with self.runtime.autocast():
            ours = nll(batch).mean()
        return abs(float(ours - model.nll(batch).mean()))

    def _speed(self, tokens_per_second: float) -> str:
        name = torch.cuda.get_device_name() if self.cuda else processor()
        share = accounting.mfu(
            self.recipe.model, self.vocab, tokens_per_second=tokens_per_second, device=name
        )
        return f"{tokens_per_second:,.0f} tokens/s" + (f", MFU {share:.1%}" if share else "")

    def writing(self) -> Iterator[Row]:
        """Tokens a second of the engine, and whether a row says the same alone."""
        tokenizer = Tokenizer(merges=[])
        model = GPT.build(self.recipe.model, tokenizer.vocab_size, self.device, 1)
        with torch.no_grad():
            model.head.weight.normal_(std=0.05)
            model.head.weight[tokenizer.bos :] = 0.0
        engine = Engine(model, tokenizer, self.runtime)
        prompts = [[tokenizer.bos, *range(60, 65 + i % 9)] for i in range(16)]
        recorded = engine.record
        for record, samples in itertools.product(dict.fromkeys((None, recorded)), (1, 16)):
            engine.release()
            engine.record = record
            settings = {"samples": samples, "max_new_tokens": 48, "temperature": 1.0, "top_k": 50}
            engine.complete(prompts, **settings)
            said: list[list[int]] = []
            took = self.seconds(
                lambda s=settings, to=said: to.extend(engine.complete(prompts, **s))
            )
            steps, tokens = max(map(len, said)), sum(map(len, said))
            speed = f"{1e3 * took / steps:.1f} ms a token of each, {tokens / took:,.0f} tokens/s"
            yield f"writing {16 * samples} rows" + (", recorded" if record else ""), speed
        alone = [engine.complete([prompt], max_new_tokens=24)[0] for prompt in prompts]
        together = engine.complete(prompts, max_new_tokens=24)
        same = sum(a == b for a, b in zip(alone, together, strict=True))
        yield "greedy rows that are the same alone and together", f"{same} of {len(prompts)}"

    def drawing(self) -> Iterator[Row]:
        """Tokens of probability zero must never be drawn, however the device sums."""
        chosen = torch.randint(self.vocab, (256, 50), device=self.device)
        weights = torch.zeros(256, self.vocab, device=self.device)
        weights.scatter_(1, chosen, torch.rand(256, 50, device=self.device))
        weights /= weights.sum(1, keepdim=True)
        draws = [inverse_cdf(weights, torch.rand(256).tolist()) for _ in range(50)]
        wrong = sum(int((weights.gather(1, drawn[:, None]) == 0).sum()) for drawn in draws)
        yield "impossible tokens drawn", f"{wrong:,} of {256 * len(draws):,}"


def _programs() -> int:
    """Graphs that torch.compile has made in this process."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import takes seconds
        return 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def main(arguments: Sequence[str]) -> None:
    words, overrides = config.split_settings(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--profile", default="h100")
    parser.add_argument("--repeats", type=int, default=5, help="steps that a figure is the mean of")
    given = parser.parse_args(words)
    settings = config.resolve(given.profile, {"machine.device": "auto"} | overrides)
    bench = Bench(settings.recipe, settings.machine, given.repeats)
    name = torch.cuda.get_device_name() if bench.cuda else processor()
    today = datetime.datetime.now(datetime.UTC).date()
    what = " ".join([given.profile, *(f"{path}={value}" for path, value in overrides.items())])
    print(f"{what}, {today}, {name}, {bench.runtime.dtype}, torch {torch.__version__}\n")
    print(report.table(["", ""], []))
    for row in bench.rows():
        print(report.table_row(row), flush=True)
