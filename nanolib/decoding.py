"""The forward pass of `nanolib.model` for decoding on CUDA: bfloat16 weights, fused kernels.

Shapes as in `nanolib.model`, and N = B · T.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanolib import kernels
from nanolib.config import ModelConfig
from nanolib.model import GPT, Block, KVCache, attend, norm, rotary_tables


class Writer:
    """A model for inference: a bfloat16 copy of the weights at fixed addresses (for CUDA graphs).
    Call `refresh` to copy them again after training has changed them."""

    def __init__(self, model: GPT, dtype: torch.dtype = torch.bfloat16):
        self.model = model
        self.copies = [weight.to(dtype) for weight in self._weights()]

    def _weights(self) -> list[Tensor]:
        """Embedding, head, then four matrices per layer: fused QKV, output, MLP up and down."""
        weights = [self.model.embedding.weight, self.model.head.weight]
        for block in self.model.blocks:
            assert isinstance(block, Block)
            attention, mlp = block.attention, block.mlp
            parts = attention.query, attention.key, attention.value
            weights.append(torch.cat([part.weight for part in parts]))
            weights += [attention.out.weight, mlp.up.weight, mlp.down.weight]
        return [weight.detach() for weight in weights]

    def refresh(self) -> None:
        torch._foreach_copy_(self.copies, self._weights())

    def hidden(self, ids_BT: Tensor, cache: KVCache) -> Tensor:
        """The final hidden states [B, T, D]; see `GPT.hidden`."""
        (B, T), K = ids_BT.shape, self.model.config.head_dim
        # Decoding (T = 1) needs no mask: `read_cache` takes lengths from used_B. Prefill does.
        mask_BTS = None if T == 1 else cache.mask(cache.positions(T))
        reach = T if mask_BTS is None else mask_BTS.shape[-1]
        cos_sin = rotary_tables(self.model.config, ids_BT.device)
        x_ND = norm(F.embedding(ids_BT, self.copies[0])).flatten(0, 1)
        for layer in range(self.model.config.depth):
            qkv, out, up, down = self.copies[2 + 4 * layer : 6 + 4 * layer]
            keys_BGSK, values_BGSK = cache.keys_LBGSK[layer], cache.values_LBGSK[layer]
            qkv_ND = kernels.linear(x_ND, qkv, normed=True)
            query_BTHK = kernels.place(
                qkv_ND.view(B, T, -1, K), cos_sin, cache.used_B, keys_BGSK, values_BGSK
            )
            if T == 1:
                mixed = kernels.read_cache(query_BTHK[:, 0], keys_BGSK, values_BGSK, cache.used_B)
            else:
                mixed = attend(query_BTHK, *cache.read(layer, reach), mask_BTS)
            x_ND = kernels.linear(mixed.reshape(B * T, -1), out, residual_NF=x_ND)
            inner_NF = kernels.linear(x_ND, up, normed=True, squared_relu=True)
            x_ND = kernels.linear(inner_NF, down, residual_NF=x_ND)
        return norm(x_ND).view(B, T, -1)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Float32 logits [N, V]."""
        return self.model.capped(kernels.linear(hidden_ND, self.copies[1]))


@torch.inference_mode()
def prove(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Compare `Writer` with `GPT` on a small random model; AssertionError if it differs."""
    config = ModelConfig(depth=1, aspect=64, head_dim=32, kv_heads=1, sequence_len=64)
    model, random = GPT.empty(config, 100, device), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=random) * weight.shape[-1] ** -0.5)
    writer = Writer(model, dtype)
    for rows in (2, kernels.FEW_ROWS + 1):
        caches = [KVCache(config, rows, 64, device, it) for it in (dtype, torch.float32)]
        for length in (20, 2, 1):
            ids_BT = torch.randint(100, (rows, length), generator=random).to(device)
            got, want = (
                part.logits(part.hidden(ids_BT, cache)[:, 0])
                for part, cache in zip((writer, model), caches, strict=True)
            )
            kernels.check(got, want, 2e-2)
            for cache in caches:
                cache.advance([max(1, length - 9 * row) for row in range(rows)])
