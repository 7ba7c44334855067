"""What a model costs, from its configuration alone: parameters, FLOPs, bytes, money.

A multiplication and an addition are two FLOPs. Only matrix products count: the rest is under one
percent of the arithmetic (not of the time). Shapes: T time, D width, H query heads, G key/value
heads, K head size, V vocabulary, L layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nanolib.config import ModelConfig

DOLLARS_PER_GPU_HOUR = 3.0  # what the original paid for an H100; rents differ by place and day


@dataclass(frozen=True)
class Device:
    """One accelerator, by its maker's data sheet."""

    peak: float  # dense bfloat16 FLOP/s
    memory: int  # GB of 10⁹ bytes


# By a part of the name that torch.cuda.get_device_name gives; the first that matches counts.
DEVICES = {
    "H100 PCIe": Device(756e12, 80),
    "H100 NVL": Device(835e12, 94),
    "H100": Device(989e12, 80),
    "H200": Device(989e12, 141),
    "B200": Device(2250e12, 180),
    "A100-SXM4-40GB": Device(312e12, 40),
    "A100": Device(312e12, 80),
    "L40S": Device(362e12, 48),
    "RTX 4090": Device(165e12, 24),
}

# Model FLOPs utilisation by depth, measured in bfloat16 on one H100 (2026-11-24, runs/bench/device.md):
# of whole runs at 8 and 20, at the others of forward, backward and update. What ranks say to each
# other is not in it. (nanochat of July 2026 on one: 0.41 at 12, 0.487 at 20.)
MEASURED_MFU = {8: 0.346, 12: 0.427, 20: 0.474, 26: 0.485, 32: 0.526}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Some devices of one kind, and what an hour of all of them costs."""

    name: str
    count: int
    device: Device
    dollars_per_hour: float

    @classmethod
    def parse(cls, text: str, dollars_per_hour: float | None = None) -> Machine:
        """A machine from its description; ValueError for a device that is not in the table.

        >>> Machine.parse("8xH100").dollars_per_hour
        24.0
        """
        found = re.fullmatch(r"(?:(\d+)\s*[x×]\s*)?(.+)", text.strip(), re.IGNORECASE)
        count, wanted = (int(found[1] or 1), found[2].lower()) if found else (1, "")
        known = {name.lower().replace(" ", ""): name for name in DEVICES}
        name = known.get(wanted.replace(" ", ""))
        if name is None or count < 1:
            raise ValueError(
                f"a machine is a number of devices such as 8xH100, got {text!r}; the devices known "
                f"are {', '.join(DEVICES)}"
            )
        if dollars_per_hour is None:
            dollars_per_hour = count * DOLLARS_PER_GPU_HOUR
        return cls(name=name, count=count, device=DEVICES[name], dollars_per_hour=dollars_per_hour)


# ---------------------------------------------------------------------------- size


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device while training."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    step: int  # for a while, once the activations are gone: the optimizer's stacks of both above

    @property
    def total(self) -> int:
        """The most that is there at one time."""
        standing = self.weights + self.gradients + self.optimizer
        return standing + max(self.activations, self.step)


def memory(
    config: ModelConfig,
    vocab_size: int,
    *,
    rows: int,
    ranks: int = 1,
    bytes_a_number: int = 4,
    kept: float = 1.0,
) -> Memory:
    """Bytes on one of `ranks` devices that trains `rows` sequences at a time.

    Weights, gradients and optimizer state are float32; the state (Muon one number a weight of the
    blocks, AdamW two of embedding and head) is shared out over the ranks. `kept`: the share of the
    activations that a compiled program keeps.
    """
    counts = config.parts(vocab_size)
    total = sum(counts.values())
    state = total + counts["embedding"] + counts["head"]
    return Memory(
        weights=4 * total,
        gradients=4 * total,
        optimizer=4 * -(-state // ranks),
        activations=int(kept * activation_bytes(config, vocab_size, rows, bytes_a_number)),
        step=8 * total,
    )


def activation_bytes(
    config: ModelConfig, vocab_size: int, rows: int, bytes_a_number: int = 4
) -> int:
    """Bytes that the backward pass needs of the forward pass, an estimate.

    Without recomputation, a layer keeps per token: the inputs of both norms and what comes out of
    them, queries and keys before and after their norms, values, what attention mixed (no T x T
    matrix), and the MLP's 4 D before and after the square. The logits are kept twice, in float32:
    after the soft cap, and as log-probabilities. (torch.compile may keep less.)
    """
    width, kv_width = config.width, config.num_kv_heads * config.head_dim
    layer = 4 * width + 2 * width + 3 * kv_width + width + 8 * width
    tokens = rows * config.sequence_len
    hidden = config.depth * layer + 3 * width
    return tokens * (hidden * bytes_a_number + 2 * vocab_size * 4)


def cache_bytes(config: ModelConfig, rows: int, length: int, bytes_a_number: int = 2) -> int:
    """Bytes of keys and values of `rows` sequences of `length` positions."""
    kv_width = config.num_kv_heads * config.head_dim
    return 2 * config.depth * rows * length * kv_width * bytes_a_number


# ---------------------------------------------------------------------------- work


def forward_flops(config: ModelConfig, vocab_size: int) -> int:
    """FLOPs a token of a forward pass over rows of T = sequence_len tokens.

    Two a weight that multiplies (the embedding only looks up), and 4 T H K a layer for the scores
    and the mixing of values. As is the custom, attention counts in full: a causal kernel does half.
    """
    counts = config.parts(vocab_size)
    attention = 4 * config.depth * config.width * config.sequence_len
    return 2 * (sum(counts.values()) - counts["embedding"]) + attention


def training_flops(config: ModelConfig, vocab_size: int) -> int:
    """FLOPs a token of forward and backward pass; the backward pass does twice the forward's."""
    return 3 * forward_flops(config, vocab_size)


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device with that name; None for one not in the table."""
    return next((known.peak for part, known in DEVICES.items() if part in device), None)


def mfu(
    config: ModelConfig, vocab_size: int, *, tokens_per_second: float, device: str, ranks: int = 1
) -> float | None:
    """Model FLOPs utilisation: the share of `ranks` devices' bfloat16 peak that training used.

    None where the device's peak is not known (arXiv:2204.02311, appendix B).
    """
    peak = peak_flops(device)
    if peak is None:
        return None
    return training_flops(config, vocab_size) * tokens_per_second / (peak * ranks)


def assumed_mfu(depth: int) -> float:
    """The utilisation to expect at a depth: between two measured ones on the line that joins them."""
    depths = sorted(MEASURED_MFU)
    depth = min(max(depth, depths[0]), depths[-1])
    below = max(known for known in depths if known <= depth)
    above = min(known for known in depths if known >= depth)
    low, high = MEASURED_MFU[below], MEASURED_MFU[above]
    return low + (high - low) * (depth - below) / max(1, above - below)


def training_seconds(
    config: ModelConfig, vocab_size: int, tokens: float, machine: Machine
) -> float:
    """Seconds to train on so many tokens at the assumed utilisation; a projection."""
    work = training_flops(config, vocab_size) * tokens
    return work / (assumed_mfu(config.depth) * machine.device.peak * machine.count)


def dollars(seconds: float, dollars_per_hour: float | None) -> float | None:
    """What `seconds` of a machine cost; None where its price is not given."""
    return None if dollars_per_hour is None else dollars_per_hour * seconds / 3600
