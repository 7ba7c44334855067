"""One attention function, every backend behind it.

Shapes: B rows, T queries, S keys, H query heads, G key/value heads (G divides H), K head size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(
    query_BTHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, mask_BTS: Tensor | None = None
) -> Tensor:
    """Softmax attention, scaled by K ** -0.5; query head h reads key head h // (H / G).

    Without a mask query t sees keys 0 … t (T = S); with one (bool, True = may look) exactly
    what it says. Returns [B, T, H, K].
    """
    query, key, value = (x.transpose(1, 2) for x in (query_BTHK, key_BSGK, value_BSGK))
    mixed_BHTK = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask_BTS is None else mask_BTS.unsqueeze(1),
        is_causal=mask_BTS is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return mixed_BHTK.transpose(1, 2)
