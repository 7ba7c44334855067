"""Attention masks for sliding windows and document boundaries (`nanolib.config.INGREDIENTS`).

Windows are as in Mistral (arXiv:2310.06825), three short layers per long one as in modded-nanogpt
and nanochat; document masks as in Llama 3 (arXiv:2407.21783, section 3.2). Flash attention takes no
mask, so compiled CUDA training uses FlexAttention, which skips fully masked blocks.

Shapes as in `nanolib.model`.
"""

from typing import Any

import torch
from torch import Tensor

from nanolib.config import SPECIAL_TOKENS, ModelConfig


def by_layer(
    config: ModelConfig,
    vocab_size: int,
    flex: bool,
    causal_BTS: Tensor | None,
    seen_BS: Tensor,
    positions_BT: Tensor,
) -> list[Any]:
    """One mask per layer, [B, T, S] bool or (flex) a block mask for FlexAttention.

    causal: the plain causal mask, None if T = S; returned unchanged without these ingredients.
    seen: the token ids at positions 0 ... S - 1 of each row. positions: those of the queries.
    """
    if not config.uses & {"windows", "document_mask"}:
        return [causal_BTS] * config.depth
    seen_BS = seen_BS[:, : (positions_BT if causal_BTS is None else causal_BTS).shape[-1]]
    documents_BS = (seen_BS == vocab_size - len(SPECIAL_TOKENS)).cumsum(dim=1, dtype=torch.int32)
    if "document_mask" not in config.uses:
        documents_BS = torch.zeros_like(documents_BS)
    (rows, reach), device = seen_BS.shape, seen_BS.device

    def mask(window: int) -> Any:
        def sees(row: Tensor, _: Any, query: Tensor, key: Tensor) -> Tensor:
            is_near = (key <= query) & (key > query - window)
            return is_near & (documents_BS[row, key] == documents_BS[row, query])

        if flex:
            from torch.nn.attention.flex_attention import create_block_mask

            return create_block_mask(sees, rows, None, reach, reach, device=device)
        row_B11, key_S = torch.arange(rows, device=device), torch.arange(reach, device=device)
        return sees(row_B11[:, None, None], None, positions_BT[..., None], key_S)

    long, short = mask(config.sequence_len), mask(config.sequence_len // 2)
    return [short if layer in config.short_layers else long for layer in range(config.depth)]
