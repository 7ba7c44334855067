"""FLOPs and memory of a model, computed from its configuration, and device specifications.

A multiply-add counts as two FLOPs. Only matrix products are counted: everything else is under one
percent of the arithmetic, though not of the time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nanolib.config import ModelConfig

DOLLARS_PER_GPU_HOUR = 3.0  # what nanochat paid per H100; prices vary

# Peak (dense bfloat16 FLOP/s) and memory (10⁹ bytes) from the data sheets; the first key contained
# in torch's device name applies.
DEVICES = {
    "H100 PCIe": (756e12, 80),
    "H100 NVL": (835e12, 94),
    "H100": (989e12, 80),
    "H200": (989e12, 141),
    "B200": (2250e12, 180),
    "A100-SXM4-40GB": (312e12, 40),
    "A100": (312e12, 80),
    "L40S": (362e12, 48),
    "RTX 4090": (165e12, 24),
}

# Model FLOPs utilisation by depth on one H100 in bfloat16, update included (runs/bench/device.md):
# 12 and 20 from whole steps (2026-11-28), 32 summed from its parts, 8 from a run on an H200.
MEASURED_MFU = {8: 0.441, 12: 0.522, 20: 0.554, 32: 0.578}

# What else a plan goes by; H100 and EPYC tell on what it was measured.
ROWS = (1, 16, 128, 256)  # answers at once; below: tokens/s by depth, temperature 1, top-k 50
WRITING = {12: (2_211, 17_830, 82_150, 78_977), 20: (919, 10_301, 44_569, 44_885)}
STARTING = 28  # seconds until a model's stage begins: imports, proof of kernels, compiling
LAUNCHING = 0.009 / 8  # least seconds a step and layer: launching kernels and CUDA graphs
H100 = "one H100, small steps one H200, 2026-11-28 and 29 (runs/bench/device.md)"
H200 = "one H200 at depth 8, 2026-11-29 (runs/report_h100.md)"
TRAINED, ENCODED = 27e6, 25e6  # bytes/s of text: tokenizer training; making token shards
SEARCHED = 60e6  # bytes/s of text: looking for test problems in it, one core of an AMD EPYC
DOWNLOADED = 50e6  # bytes/s: a guess, since every line differs
SCORED = 4_800  # tokens of training at the peak that take as long as scoring a problem
PARQUET = 0.39  # size of a shard of text over that of its text
EPYC = "2 cores of an AMD EPYC, 2026-11-29 (runs/bench/text.md: vocabulary 65,536, less 4 s)"

# Fraction of the layers' activations that compiled bfloat16 code keeps, fitted so that the estimate
# is within 10 % of the peaks measured on an H100 (runs/bench/device.md).
KEPT_ON_CUDA = 0.71


@dataclass(frozen=True, kw_only=True)
class Machine:
    name: str
    count: int
    peak: float | None  # dense bfloat16 FLOP/s per device; None: unknown
    memory: float  # GB per device
    dollars_per_hour: float | None = None
    cuda: bool = True

    @classmethod
    def parse(cls, text: str) -> Machine:
        """Parse text such as "8xH100"; ValueError for a device that is not in `DEVICES`."""
        found = re.fullmatch(r"(?:([1-9]\d*)[x×])?(.+)", text.lower().replace(" ", ""))
        known = {name.lower().replace(" ", ""): name for name in DEVICES}
        if found is None or found[2] not in known:
            wanted = f"a machine is a number of devices such as 8xH100, got {text!r}"
            raise ValueError(f"{wanted}; the devices known are {', '.join(DEVICES)}")
        count, name = int(found[1] or 1), known[found[2]]
        price = count * DOLLARS_PER_GPU_HOUR
        peak, memory = DEVICES[name]
        return cls(name=name, count=count, peak=peak, memory=memory, dollars_per_hour=price)

    def training_seconds(
        self, model: ModelConfig, vocab_size: int, steps: int, tokens: float
    ) -> float | None:
        """Projected time to train on `tokens` in `steps` steps; None if the peak is unknown."""
        if self.peak is None:
            return None
        speed = assumed_mfu(model.depth) * self.peak * self.count
        computing = training_flops(model, vocab_size) * tokens / speed
        return max(computing, steps * LAUNCHING * model.depth)

    def scoring_seconds(self, model: ModelConfig, vocab_size: int, problems: float) -> float | None:
        """Projected time to score models on so many problems; None if the peak is unknown."""
        if self.peak is None:
            return None
        return problems * SCORED * training_flops(model, vocab_size) / (self.peak * self.count)

    def writing_rate(self, depth: int, rows: int) -> float | None:
        """Tokens/s of all devices, with `rows` answers at once on each; None where not measured."""
        if "H100" not in self.name or not min(WRITING) <= depth <= max(WRITING):
            return None
        rates = [np.interp(rows, ROWS, rate) for rate in WRITING.values()]
        return self.count * float(np.interp(depth, [*WRITING], rates))


@dataclass(frozen=True)
class TrainingMemory:
    """Estimated memory of training, in bytes per device."""

    model: ModelConfig
    vocab_size: int
    ranks: int = 1
    cuda: bool = False
    bytes_per_number: int = 4

    @property
    def weights(self) -> int:
        return 4 * self.model.parameters(self.vocab_size)

    @property
    def optimizer(self) -> int:
        """Optimizer state, sharded: one number per weight for Muon, two for AdamW."""
        counts = self.model.parts(self.vocab_size)
        numbers = 2 * sum(counts.values()) - counts["attention"] - counts["mlp"]
        return 4 * -(-numbers // self.ranks)

    @property
    def update(self) -> int:
        """The optimizer's temporary stacked copies of weights and gradients."""
        return 2 * self.weights

    def activations(self, rows: int) -> int:
        """What the forward pass of `rows` rows saves for the backward pass.

        Per layer and token: inputs and outputs of both norms, queries and keys before and after
        QK-norm, values, the attention output, and the 4 D hidden units before and after squaring.
        The head saves the logits twice: soft-capped and as exponentials (on CUDA, in bfloat16,
        before the cap and as a gradient). x0 adds one input per layer, value embeddings one vector
        per token and layer, smear two embeddings per token.
        """
        model, width, uses = self.model, self.model.width, self.model.uses
        kv_width = model.num_kv_heads * model.head_dim
        layer = 4 * width + 2 * width + 3 * kv_width + width + 8 * width + width * ("x0" in uses)
        more = len(model.value_layers) * kv_width + 2 * width * ("smear" in uses)
        hidden = model.depth * layer + 3 * width + more
        layers = hidden * self.bytes_per_number * (KEPT_ON_CUDA if self.cuda else 1)
        token = layers + 2 * self.vocab_size * (self.bytes_per_number if self.cuda else 4)
        return int(rows * model.sequence_len * token)

    def total(self, rows: int) -> int:
        """Peak memory; activations and the copies for the update never coexist."""
        return 2 * self.weights + self.optimizer + max(self.activations(rows), self.update)


def forward_flops(config: ModelConfig, vocab_size: int) -> int:
    """FLOPs per token of a forward pass over T = sequence_len tokens: two per weight in a matrix
    product, plus 4 T D per layer for attention (non-causal; a causal kernel does half)."""
    counts = config.parts(vocab_size)
    length, short = config.sequence_len, len(config.short_layers)
    attention = 4 * config.width * (config.depth * length - short * (length // 2))
    return 2 * sum(counts[part] for part in ("attention", "mlp", "head")) + attention


def training_flops(config: ModelConfig, vocab_size: int) -> int:
    """FLOPs per token of a forward and a backward pass; backward costs twice the forward."""
    return 3 * forward_flops(config, vocab_size)


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by torch's name for it; None if unknown."""
    return next((peak for part, (peak, _) in DEVICES.items() if part in device), None)


def mfu(
    config: ModelConfig, vocab_size: int, *, tokens_per_second: float, device: str, ranks: int = 1
) -> float | None:
    """Model FLOPs utilisation (arXiv:2204.02311, appendix B); None if the peak is unknown."""
    if (peak := peak_flops(device)) is None:
        return None
    return training_flops(config, vocab_size) * tokens_per_second / (peak * ranks)


def assumed_mfu(depth: int) -> float:
    """Expected MFU at a depth: `MEASURED_MFU`, interpolated, constant beyond its ends."""
    return float(np.interp(depth, list(MEASURED_MFU), list(MEASURED_MFU.values())))


def measured(depth: int, machine: Machine) -> Iterator[str]:
    """Lines that say what a plan goes by, with device and date, and what nobody measured."""
    if machine.peak:
        share = f"{assumed_mfu(depth):.1%} of the peak"
        least = f"at least {1000 * LAUNCHING:.1f} ms a step and layer"
        yield f"measured     training {share}, {least}, {STARTING} s to start a stage: {H100}"
        yield f"measured     a problem's scores take as long as {SCORED:,} tokens at the peak: {H200}"
    if rate := machine.writing_rate(depth, ROWS[-1]):
        each = f"{rate / machine.count:,.0f} tokens/s of {ROWS[-1]} answers at once"
        yield f"measured     {each}: {H100}"
    yield f"measured     tokenizer {TRAINED / 1e6:.0f}, shards {ENCODED / 1e6:.0f} MB/s of text: {EPYC}"
    yield f"assumed      a download of {DOWNLOADED / 1e6:.0f} MB/s"
    yield "not measured more than two GPUs, scores at other depths than 8, evaluations in training"


def bytes_per_token(vocab_size: int) -> float:
    """Of validation text, 2026-11-29: the toy world's up to 1,024, web text and books from 4,096."""
    sizes = (512, 1024, 4096, 16_384, 65_536)
    return float(np.interp(vocab_size, sizes, (2.12, 3.25, 3.20, 3.89, 4.32)))
