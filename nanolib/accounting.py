"""What a model costs, from its configuration alone: parameters, FLOPs, bytes, money.

A multiplication and an addition are two FLOPs. Only matrix products count: the rest is under one
percent of the arithmetic (not of the time). Shapes: T time, D width, H query heads, G key/value
heads, K head size, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanolib.config import ModelConfig

# Dense bfloat16 peak of one device in FLOP/s (makers' data sheets), by a part of the name that
# torch.cuda.get_device_name gives; the first that matches counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


# ---------------------------------------------------------------------------- size


def parameters(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Weights by what they are for; their sum is the model's parameter count."""
    width, kv_width = config.width, config.num_kv_heads * config.head_dim
    return {
        "embedding": vocab_size * width,
        "attention": config.depth * (2 * width * width + 2 * width * kv_width),
        "mlp": config.depth * 8 * width * width,
        "head": vocab_size * width,
    }


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device while training."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(
    config: ModelConfig, vocab_size: int, *, rows: int, ranks: int = 1, bytes_a_number: int = 4
) -> Memory:
    """Bytes on one of `ranks` devices that trains `rows` sequences at a time.

    Weights, gradients and optimizer state are float32; the state (Muon one number a weight of the
    blocks, AdamW two of embedding and head) is shared out over the ranks.
    """
    counts = parameters(config, vocab_size)
    total = sum(counts.values())
    state = total + counts["embedding"] + counts["head"]
    return Memory(
        weights=4 * total,
        gradients=4 * total,
        optimizer=4 * -(-state // ranks),
        activations=activation_bytes(config, vocab_size, rows, bytes_a_number),
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
    counts = parameters(config, vocab_size)
    attention = 4 * config.depth * config.width * config.sequence_len
    return 2 * (sum(counts.values()) - counts["embedding"]) + attention


def training_flops(config: ModelConfig, vocab_size: int) -> int:
    """FLOPs a token of forward and backward pass; the backward pass does twice the forward's."""
    return 3 * forward_flops(config, vocab_size)


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device with that name; None for one not in the table."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device), None)


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


def dollars(seconds: float, dollars_per_hour: float | None) -> float | None:
    """What `seconds` of a machine cost; None where its price is not given."""
    return None if dollars_per_hour is None else dollars_per_hour * seconds / 3600
