"""Measure a profile's model on one device in a few minutes: memory, speed, sampling.

    uv run nanolib bench device --profile h100 --model.depth 12 --nanochat ../nanochat

It uses random weights and no data, so run it first on a rented machine. "Programs" are the graphs
that torch.compile has made since the model was built. With a checkout of nanochat, its training is
measured too: full attention, and the same micro-batch, vocabulary and tokens per step.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nanolib import accounting, config, planning, report
from nanolib.data.packing import Batch
from nanolib.engine import Engine
from nanolib.model import GPT, KVCache
from nanolib.optim import MuonAdamW
from nanolib.runtime import Runtime, processor
from nanolib.sampling import inverse_cdf
from nanolib.tokenizer import Tokenizer

Row = tuple[str, str]  # label and figure
LENGTHS = (0.15, 0.21, 0.19, 0.22, 0.13)  # shares of the context: row lengths of five GRPO steps


class Bench:
    """A profile's model on this machine's device."""

    def __init__(
        self,
        recipe: config.Recipe,
        machine: config.MachineConfig,
        repeats: int,
        peer: Path | None = None,
    ):
        self.recipe, self.repeats, self.peer = recipe, repeats, peer
        self.found = 1  # micro-batch size
        self.runtime = Runtime.start(machine)
        self.device, self.cuda = self.runtime.device, self.runtime.device.type == "cuda"
        self.vocab = recipe.tokenizer.vocab_size

    def seconds(self, work: Callable[[], Any], times: int = 1) -> float:
        """Mean seconds of `work`, with the device synchronised."""
        wait = torch.cuda.synchronize if self.cuda else lambda: None
        wait()
        started = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        return (time.perf_counter() - started) / times

    def model(self) -> GPT:
        """A model with all weights random: the zero projections of a new one would hide errors."""
        model = GPT.empty(self.recipe.model, self.vocab, self.device)
        generator = torch.Generator(self.device).manual_seed(1)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.02, generator=generator)
        return model

    def batch(self, rows: int, length: int) -> Batch:
        ids_BT = torch.randint(self.vocab, (rows, length), device=self.device)
        return Batch(inputs_BT=ids_BT, targets_BT=ids_BT.roll(-1, 1))

    def rows(self) -> Iterator[Row]:
        """All measurements; one that fails gives a row with its error, and the next follows."""
        for part in (self.training, self.nanochat, self.writing, self.drawing):
            try:
                yield from part()
            except Exception as error:
                traceback.print_exc()
                yield f"**{part.__name__} failed**", f"{type(error).__name__}: {error}"[:200]

    def training(self) -> Iterator[Row]:
        """The fitting micro-batch; then speed and memory of forward, backward and update."""
        length, model = self.recipe.model.sequence_len, self.model()
        share = planning.share_of(self.recipe, "base", 1)
        nll = self.compiled(model)
        found: list[int] = []
        took = self.seconds(
            lambda: found.append(planning.fitting_rows(model, nll, share, self.runtime))
        )
        yield (
            "micro-batch",
            f"{found[0]} of base's {share} rows of {length:,}, found in {took:.1f} s",
        )
        self.found = found[0]
        batch, tokens = self.batch(found[0], length), found[0] * length
        programs = _programs()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        speed = tokens / self.seconds(self.step(nll, batch), self.repeats)
        yield "forward and backward", self._speed(speed)
        optimizer = MuonAdamW(model, self.recipe.optim, self.runtime)
        optimizer.step(0.1)  # warm-up: the first step loads kernels
        update = self.seconds(lambda: optimizer.step(0.1), self.repeats)
        yield "update", f"{1e3 * update:.1f} ms"
        micro_batches = max(1, self.recipe.base.batch_tokens // tokens)
        forward_backward = self.step(nll, batch)

        def whole() -> None:
            for _ in range(micro_batches):
                forward_backward()
            optimizer.step(0.1)
            optimizer.zero_grad()

        whole()
        speed = micro_batches * tokens / self.seconds(whole, self.repeats)
        yield f"whole steps of {micro_batches * tokens:,} tokens", self._speed(speed)
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
            yield from self._kernels(forward_backward)
        yield "programs compiled for a shape that was tried", str(_programs() - programs)
        yield from self._lengths(model, tokens)
        yield (
            "loss, as it is trained and in float32",
            f"{self._rounding(model, nll):.1e} nats apart",
        )

    def _lengths(self, model: GPT, tokens: int) -> Iterator[Row]:
        """Rows of several lengths, with the graphs that GRPO compiles for them."""
        programs, nll = _programs(), self.compiled(model, cudnn=False)
        for part in LENGTHS:
            length = 16 * math.ceil(part * self.recipe.model.sequence_len / 16)
            step = self.step(nll, self.batch(max(1, tokens // length), length))
            first, then = self.seconds(step), self.seconds(step, self.repeats)
            yield f"rows of {length}", f"{first:.2f} s, then {then:.3f} s"
        yield "programs compiled for rows of GRPO", str(_programs() - programs)

    def compiled(self, model: GPT, cudnn: bool = True) -> Callable[[Batch], torch.Tensor]:
        return model.compiled_nll(cudnn) if self.cuda else model.nll

    def _kernels(self, work: Callable[[], None]) -> Iterator[Row]:
        """The device's time by kernel, and its idle share."""
        took = self.seconds(work, self.repeats)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.seconds(work)
        kernels = sorted(profile.key_averages(), key=lambda k: -k.self_device_time_total)
        busy = 1e-6 * sum(kernel.self_device_time_total for kernel in kernels)
        yield (
            "a micro-batch's kernels",
            f"{1e3 * busy:.1f} ms, idle {max(0.0, 1 - busy / took):.0%}",
        )
        for kernel in kernels[:8]:
            share = 1e-6 * kernel.self_device_time_total / busy
            yield f"- {kernel.key[:60]}", f"{share:.1%} in {kernel.count}"

    def nanochat(self) -> Iterator[Row]:
        """Training speed of nanochat in its checkout, set up as in its own script."""
        if self.peer is None:
            return
        sys.path.insert(0, str(self.peer))
        nanochat = importlib.import_module("nanochat.gpt")
        model, length = self.recipe.model, self.recipe.model.sequence_len
        sizes = {"n_layer": model.depth, "n_head": model.heads, "n_kv_head": model.num_kv_heads}
        sizes |= {"n_embd": model.width, "vocab_size": self.vocab, "sequence_len": length}
        with torch.device("meta"):
            peer = nanochat.GPT(nanochat.GPTConfig(**sizes, window_pattern="L"))
        peer.to_empty(device=self.device)
        peer.init_weights()
        optimizer, compiled = peer.setup_optimizer(), torch.compile(peer, dynamic=False)
        tokens = self.found * length
        micro_batches = max(1, self.recipe.base.batch_tokens // tokens)
        batch = self.batch(self.found, length)

        def whole() -> None:
            for _ in range(micro_batches):
                (compiled(batch.inputs_BT, batch.targets_BT) / micro_batches).backward()
            optimizer.step()
            peer.zero_grad(set_to_none=True)

        whole()
        torch.cuda.reset_peak_memory_stats()
        speed = micro_batches * tokens / self.seconds(whole, self.repeats)
        peak = planning.size(torch.cuda.max_memory_allocated())
        yield f"nanochat, {self.found} rows at once", f"{speed:,.0f} tokens/s, peak memory {peak}"

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
        """Tokens per second of the engine, and whether batching changes a row's output."""
        tokenizer = Tokenizer(merges=[])
        model = GPT.build(self.recipe.model, tokenizer.vocab_size, self.device, 1)
        with torch.no_grad():
            model.head.weight.normal_(std=0.05)
            model.head.weight[tokenizer.bos :] = 0.0
        engine = Engine(model, tokenizer, self.runtime)
        new = min(480, engine.context - 32)
        for rows, sampled in itertools.product((1, 16, 256), (False, True)):
            prompts = [[tokenizer.bos, *range(60, 91)] for _ in range(rows)]
            settings = {"max_new_tokens": new} | (
                {"temperature": 1.0, "top_k": 50} if sampled else {}
            )
            engine.ends, ends = frozenset(), engine.ends  # no early ends: rows of equal length
            engine.complete(prompts, **settings)
            took = self.seconds(lambda p=prompts, s=settings: engine.complete(p, **s), 2)
            engine.ends = ends
            name = f"writing {rows} rows of {new}, {'top-k 50' if sampled else 'greedy'}"
            yield name, f"{1e3 * took / new:.2f} ms a step, {rows * new / took:,.0f} tokens/s"
        yield from self._reading(engine)
        prompts = [[tokenizer.bos, *range(60, 65 + i % 9)] for i in range(16)]
        alone = [engine.complete([prompt], max_new_tokens=24)[0] for prompt in prompts]
        together = engine.complete(prompts, max_new_tokens=24)
        same = sum(a == b for a, b in zip(alone, together, strict=True))
        yield "greedy rows that are the same alone and together", f"{same} of {len(prompts)}"

    def _reading(self, engine: Engine) -> Iterator[Row]:
        """Prefill of prompts as long as the context; the head's FLOPs are not counted."""
        config, rows = self.recipe.model, 8
        cache = KVCache(config, rows, config.sequence_len, self.device, self.runtime.dtype)
        ids_BT = torch.randint(256, (rows, config.sequence_len), device=self.device)

        def read() -> None:
            with torch.inference_mode(), self.runtime.autocast(engine.writer is None):
                (engine.writer or engine.model).hidden(ids_BT, cache=cache)

        read()
        took = self.seconds(read, self.repeats)
        tokens = ids_BT.numel()
        name = torch.cuda.get_device_name() if self.cuda else processor()
        flops = accounting.forward_flops(config, 0) * tokens / took
        peak = accounting.peak_flops(name)
        share = f", {flops / peak:.1%} of the peak" if peak else ""
        yield f"reading {rows} x {config.sequence_len}", f"{1e3 * took:.2f} ms{share}"

    def drawing(self) -> Iterator[Row]:
        """Tokens of probability zero must never be sampled, whatever the device's rounding."""
        chosen = torch.randint(self.vocab, (256, 50), device=self.device)
        weights = torch.zeros(256, self.vocab, device=self.device)
        weights.scatter_(1, chosen, torch.rand(256, 50, device=self.device))
        weights /= weights.sum(1, keepdim=True)
        draws = [inverse_cdf(weights, torch.rand(256).tolist()) for _ in range(50)]
        wrong = sum(int((weights.gather(1, drawn[:, None]) == 0).sum()) for drawn in draws)
        yield "impossible tokens drawn", f"{wrong:,} of {256 * len(draws):,}"


def _programs() -> int:
    """The number of graphs that torch.compile has made in this process."""
    if "torch._dynamo" not in sys.modules:  # nothing compiled yet; the import takes seconds
        return 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def main(arguments: Sequence[str]) -> None:
    words, overrides = config.split_settings(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--profile", default="h100")
    parser.add_argument("--repeats", type=int, default=5, help="steps to average over")
    parser.add_argument("--nanochat", type=Path, help="a checkout of nanochat to compare with")
    given = parser.parse_args(words)
    settings = config.resolve(given.profile, {"machine.device": "auto"} | overrides)
    bench = Bench(settings.recipe, settings.machine, given.repeats, given.nanochat)
    name = torch.cuda.get_device_name() if bench.cuda else processor()
    today = datetime.datetime.now(datetime.UTC).date()
    what = " ".join([given.profile, *(f"{path}={value}" for path, value in overrides.items())])
    print(f"{what}, {today}, {name}, {bench.runtime.dtype}, torch {torch.__version__}\n")
    print(report.table(["", ""], []))
    for row in bench.rows():
        print(report.table_row(row), flush=True)
