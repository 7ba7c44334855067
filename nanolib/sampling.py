"""Sampling the next token: temperature, top-k, top-p, and reproducible draws per row.

Shapes: B rows, V vocabulary, K the largest top-k.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def uniforms(keys_B: Tensor, positions_B: Tensor) -> Tensor:
    """Uniform draws [B] from [0, 1): a hash (splitmix64) of each row's key and position.

    Stateless, so a draw does not depend on earlier draws, other rows or the device.
    """
    mixed_B = keys_B + positions_B * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed_B = (mixed_B ^ _shifted(mixed_B, shift)) * factor
    return _shifted(mixed_B ^ _shifted(mixed_B, 31), 40).float() * 2**-24


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def probabilities(
    logits_BV: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """The distribution [B, V] that `choose` samples from; temperature must be positive.

    top_k keeps the k most likely tokens; top_p (arXiv:1904.09751) then keeps the smallest set of
    most likely tokens with at least this total probability. Ties with the last one kept stay too.
    Settings are scalars or tensors [B]; in a top_k tensor, 0 means no limit, and `most` must be its
    maximum.
    """
    logits_BV = logits_BV.float() / _column(temperature, logits_BV)
    most = min(top_k if isinstance(top_k, int) else most or 0, logits_BV.shape[-1])
    if top_k is not None and most:
        k_B1 = _column(top_k, logits_BV, torch.long).clamp(max=most).expand(len(logits_BV), 1)
        best_BK = logits_BV.topk(most, dim=-1).values
        least_B1 = best_BK.gather(1, (k_B1 - 1).clamp(min=0)).masked_fill(k_B1 == 0, -torch.inf)
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    probabilities_BV = logits_BV.softmax(dim=-1)
    if top_p is None:
        return probabilities_BV
    p_B1 = _column(top_p, logits_BV).clamp(min=1e-6)  # always keep the most likely token
    falling_BV = probabilities_BV.sort(dim=-1, descending=True).values
    before_BV = falling_BV.cumsum(dim=-1) - falling_BV
    least_B1 = falling_BV.masked_fill(before_BV >= p_B1, torch.inf).amin(dim=-1, keepdim=True)
    return probabilities_BV.masked_fill((probabilities_BV < least_B1) & (p_B1 < 1), 0)


def _column(setting: float | Tensor, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A scalar as [1, 1], or per-row values as [B, 1]."""
    return torch.as_tensor(setting, device=like.device, dtype=dtype).reshape(-1, 1)


def inverse_cdf(probabilities_BV: Tensor, uniform_B: Sequence[float] | Tensor) -> Tensor:
    """Inverse-CDF sampling: for each row, the first token [B] whose cumulative probability exceeds
    the row's uniform draw. Never a token of probability zero."""
    # GPU prefix sums are not monotone in float32, so a zero-probability token could be drawn.
    exact = torch.float64 if probabilities_BV.is_cuda else probabilities_BV.dtype
    cdf_BV = probabilities_BV.cumsum(dim=-1, dtype=exact)
    below_one = torch.as_tensor(uniform_B, device=cdf_BV.device, dtype=exact).clamp(max=1 - 2**-24)
    target_B1 = below_one[:, None] * cdf_BV[:, -1:]  # the total is 1 only up to rounding
    return torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(-1)


def choose(
    logits_BV: Tensor,
    uniform_B: Sequence[float] | Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """The next token [B] of each row: argmax at temperature 0, else a sample.

    Settings as for `probabilities`.
    """
    best_B = logits_BV.argmax(dim=-1)
    temperature = torch.as_tensor(temperature, device=logits_BV.device)
    warm_B = torch.where(temperature > 0, temperature, 1.0)
    drawn_B = inverse_cdf(probabilities(logits_BV, warm_B, top_k, top_p, most), uniform_B)
    return torch.where(temperature > 0, drawn_B, best_B)
