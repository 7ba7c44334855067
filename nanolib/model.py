"""The Transformer: preset ``classic`` is the October 2025 nanochat architecture.

Token embedding, RMS norm, `depth` blocks of causal attention and a ReLU² MLP, RMS norm, untied
head, logits soft-capped at 15. Queries and keys are rotated (RoPE, arXiv:2104.09864, pairing the
two halves of a head) and normalised (QK-norm, arXiv:2010.04245). Norms have no weights and linear
layers no bias. `ModelConfig.ingredients` add options from modded-nanogpt and nanochat (2026).

Shapes: B rows, T time, D width, H query heads, G key/value heads, K head size, V vocabulary,
L layers, S cached positions.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanolib import masks
from nanolib.config import ModelConfig
from nanolib.runtime import seed_of

if TYPE_CHECKING:
    from nanolib.data.packing import Batch

ROTARY_BASE = 10_000
REACH = 64  # KV-cache reads are rounded up to a multiple of this, so that shapes seldom change
SOFTCAP = 15.0  # bound on the absolute value of a logit
FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
CUDNN, MATH = SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH
EPS = 1e-6  # for RMS norm


def norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last axis, without weights (arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def rotation(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """RoPE cosines and sines [..., 1, K / 2] (float32) at each position, shared by all heads."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * ROTARY_BASE ** -(exponents / head_dim)
    return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)


@functools.cache
def rotary_tables(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """RoPE cosines and sines [T, 1, K / 2] of every position of the context."""
    return rotation(torch.arange(config.sequence_len, device=device), config.head_dim)


def rotate(x_BTHK: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE: rotate each pair (x[k], x[k + K/2]) by minus its angle."""
    cos, sin = (table.to(x_BTHK.dtype) for table in cos_sin)
    left, right = x_BTHK.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


def attend(
    query_BTHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, mask_BTS: Tensor | None = None
) -> Tensor:
    """Softmax attention, scaled by K ** -0.5; query head h uses key head h // (H / G).

    Causal without a mask (T = S); with a bool mask, queries attend where it is True; with a block
    mask by FlexAttention (arXiv:2412.05496), fast only when compiled. Returns [B, T, H, K].
    """
    query, key, value = (x.transpose(1, 2) for x in (query_BTHK, key_BSGK, value_BSGK))
    how: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]}
    if mask_BTS is None:
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, **how)
    elif isinstance(mask_BTS, Tensor):
        mixed = F.scaled_dot_product_attention(query, key, value, mask_BTS.unsqueeze(1), **how)
    else:
        from torch.nn.attention.flex_attention import flex_attention

        mixed = flex_attention(query, key, value, block_mask=mask_BTS, **how)
        assert isinstance(mixed, Tensor)
    return mixed.transpose(1, 2)


@functools.cache
def _proven_kernels(device: torch.device, use: Literal["training", "writing"]) -> ModuleType | None:
    """`nanolib.kernels` if its kernels for `use` run correctly on this device, else None."""
    if device.type != "cuda":
        return None
    try:
        from nanolib import decoding, kernels

        (kernels if use == "training" else decoding).prove(device)
    except Exception as error:  # no Triton, an old GPU or a wrong result: fall back to torch
        warnings.warn(f"{use} goes on without our kernels: {error!r}"[:300], stacklevel=2)
        return None
    return kernels


class KVCache:
    """A KV cache of fixed size, at fixed addresses (for CUDA graphs).

    Stored head-major, so that the keys of one head are contiguous. Row b holds `used_B[b]` tokens;
    rows may differ in length. New keys and values are written after those, but only count once the
    caller calls `advance`. Anything beyond (padding of shorter rows) is overwritten before use.
    """

    def __init__(
        self, config: ModelConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (config.depth, rows, config.num_kv_heads, length, config.head_dim)
        self.keys_LBGSK = torch.zeros(shape, device=device, dtype=dtype)
        self.values_LBGSK = torch.zeros(shape, device=device, dtype=dtype)
        self.used_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.used = [0] * rows  # the same on the host, to avoid a device sync
        self.ids_BS = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.multiple = REACH  # reads are rounded up to this

    @property
    def length(self) -> int:
        return self.keys_LBGSK.shape[3]

    def reach(self, new_tokens: int) -> int:
        """Positions to read after `new_tokens` more per row: up to the end of the longest."""
        reach = max(self.used) + new_tokens
        return min(self.length, self.multiple * math.ceil(reach / self.multiple))

    def positions(self, new_tokens: int) -> Tensor:
        """Positions [B, T] of the next `new_tokens` tokens of every row."""
        return self.used_B[:, None] + torch.arange(new_tokens, device=self.used_B.device)

    def mask(self, positions_BT: Tensor) -> Tensor | None:
        """Causal mask [B, T, S] over the cached positions, where S is `reach`.

        None while the cache is empty: plain causal attention among the new tokens suffices.
        """
        if not any(self.used):
            return None
        reach = self.reach(positions_BT.shape[1])
        return torch.arange(reach, device=positions_BT.device) <= positions_BT[..., None]

    def write(self, layer: int, positions_BT: Tensor, key_BTGK: Tensor, value_BTGK: Tensor) -> None:
        """Store the new keys and values of one layer at their positions."""
        index = positions_BT[:, None, :, None].expand_as(key_BTGK.transpose(1, 2))
        for store, new_BTGK in ((self.keys_LBGSK, key_BTGK), (self.values_LBGSK, value_BTGK)):
            store[layer].scatter_(2, index, new_BTGK.transpose(1, 2).to(store.dtype))

    def read(self, layer: int, reach: int) -> tuple[Tensor, Tensor]:
        """The first `reach` keys and values [B, S, G, K] of one layer."""
        stores = self.keys_LBGSK[layer], self.values_LBGSK[layer]
        keys_BSGK, values_BSGK = (store[:, :, :reach].transpose(1, 2) for store in stores)
        return keys_BSGK, values_BSGK

    def advance(self, lengths: Sequence[int] | int) -> None:
        """Count the tokens just written, of each row or the same number of all; padding is not."""
        each = [lengths] * len(self.used) if isinstance(lengths, int) else lengths
        self.used_B += torch.tensor(each, device=self.used_B.device)
        self.used = [before + new for before, new in zip(self.used, each, strict=True)]

    def copy_rows(self, other: KVCache, rows: Sequence[int]) -> None:
        """Copy row `rows[b]` of another cache to row b (one prefill, many samples)."""
        index = torch.tensor(rows, device=self.used_B.device)
        self.used_B.copy_(other.used_B[index])
        self.used = [other.used[row] for row in rows]
        reach = slice(max(self.used))
        self.keys_LBGSK[:, :, :, reach] = other.keys_LBGSK[:, index, :, reach]
        self.values_LBGSK[:, :, :, reach] = other.values_LBGSK[:, index, :, reach]
        self.ids_BS[:, reach] = other.ids_BS[index, reach]


class Attention(nn.Module):
    """Causal self-attention with RoPE and QK-norm; grouped-query attention if G < H."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        kv_width = config.num_kv_heads * config.head_dim
        self.layer, self.head_dim = layer, config.head_dim
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        mask_BTS: Tensor | None = None,
        cache: KVCache | None = None,
        positions_BT: Tensor | None = None,
        lookup: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """lookup: the value embeddings of the tokens [B, T, G K] and the gate weights [G, gate]."""
        heads = (-1, self.head_dim)
        # RoPE preserves norms, so norm and rotation commute; norming first means that autograd
        # need not keep the rotated queries and keys.
        query_BTHK = rotate(norm(self.query(x_BTD).unflatten(-1, heads)), cos_sin)
        key_BTGK = rotate(norm(self.key(x_BTD).unflatten(-1, heads)), cos_sin)
        value_BTGK = self.value(x_BTD).unflatten(-1, heads)
        if lookup is not None:
            own_BTE, gate = lookup
            share_BTG = 2 * torch.sigmoid(F.linear(x_BTD[..., : gate.shape[1]], gate))
            value_BTGK = value_BTGK + share_BTG[..., None] * own_BTE.unflatten(-1, heads)
        if cache is not None:
            assert positions_BT is not None
            cache.write(self.layer, positions_BT, key_BTGK, value_BTGK)
            if mask_BTS is not None:
                key_BTGK, value_BTGK = cache.read(self.layer, mask_BTS.shape[-1])
                query_BTHK = query_BTHK.to(key_BTGK.dtype)
        mixed_BTHK = attend(query_BTHK, key_BTGK, value_BTGK, mask_BTS)
        return self.out(mixed_BTHK.flatten(2))


class MLP(nn.Module):
    """Down(ReLU(Up(x))²) with hidden width 4 D (ReLU²: arXiv:2109.08668)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x_BTD: Tensor, fused: Callable[..., Tensor] | None = None) -> Tensor:
        """fused: a kernel for the whole MLP, (x [N, D], up, down) -> [N, D]."""
        if fused is not None:
            weights = self.up.weight, self.down.weight
            return fused(x_BTD.flatten(0, 1), *weights).view_as(x_BTD)
        return self.down(F.relu(self.up(x_BTD)).square())


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTD: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        *context,
        mix: tuple[Tensor, Tensor] | None = None,
        lookup: tuple[Tensor, ...] | None = None,
        fused: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """mix: the embedding x0 [B, T, D] and the weights [2] of x and x0 in the block's input."""
        if mix is not None:
            x0_BTD, shares = mix
            x_BTD = shares[0] * x_BTD + shares[1] * x0_BTD
        x_BTD = x_BTD + self.attention(norm(x_BTD), cos_sin, *context, lookup=lookup)
        return x_BTD + self.mlp(norm(x_BTD), fused)


class GPT(nn.Module):
    """A decoder-only Transformer language model.

    Use `build` for a model with initial weights, or `empty` for one whose weights will be loaded.
    ``with torch.device("meta"): GPT(...)`` allocates no memory.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        # from_pretrained avoids nn.Embedding's normal_(), which on the meta device imports torch's
        # compiler: seconds in every process that builds a model.
        table_VD = torch.empty(vocab_size, config.width)
        self.embedding = nn.Embedding.from_pretrained(table_VD, freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        for name, shape in config.extras(vocab_size).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @classmethod
    def build(cls, config: ModelConfig, vocab_size: int, device: torch.device, seed: int) -> GPT:
        """A model on `device` with initial weights drawn from `seed` (the same on any device)."""
        model = cls.empty(config, vocab_size, device)
        model.init_weights(seed)
        return model

    @classmethod
    def empty(cls, config: ModelConfig, vocab_size: int, device: torch.device) -> GPT:
        """A model with uninitialised weights on `device`.

        Equivalent to Module.to_empty, without the three seconds of imports that it triggers.
        """
        with torch.device("meta"):
            model = cls(config, vocab_size)
        weights = model.named_parameters()
        memory = {name: torch.empty(weight.shape, device=device) for name, weight in weights}
        model.load_state_dict(memory, assign=True)
        return model

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Linear: std min(1, √(out/in)) / √in; embedding: std 1; output projections and head: 0."""
        begin = {"x0": [1.0, 0.1], "smear": [0.0], "value_gates": [0.0]}
        for name, weight in self.named_parameters():
            if name in begin:
                weight.copy_(torch.tensor(begin[name]).expand_as(weight))
            elif name.endswith(("out.weight", "down.weight")) or name == "head.weight":
                weight.zero_()
            else:
                fan_out, fan_in = weight.shape
                std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
                std = 1.0 if name == "embedding.weight" else std
                draws = torch.Generator().manual_seed(seed_of(seed, "init", name))
                weight.copy_(torch.randn(weight.shape, generator=draws) * std)

    def hidden(
        self,
        ids_BT: Tensor,
        cache: KVCache | None = None,
        run: Callable[..., Tensor] = Block.__call__,
    ) -> Tensor:
        """The final hidden states [B, T, D], after the last norm.

        With a cache, `ids_BT` continues its rows; keys and values are written to it, but the
        caller must call `cache.advance`. run: the function that calls a block.
        """
        mask_BTS, seen_BS = None, ids_BT
        if cache is not None:
            positions_BT = cache.positions(ids_BT.shape[1])
            mask_BTS = cache.mask(positions_BT)
            cache.ids_BS.scatter_(1, positions_BT, ids_BT)
            seen_BS = cache.ids_BS
        else:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        given = self.config, self.vocab_size, run is not Block.__call__ and ids_BT.is_cuda
        masks_L = masks.by_layer(*given, mask_BTS, seen_BS, positions_BT)
        cos, sin = rotary_tables(self.config, ids_BT.device)
        known_BT = positions_BT.clamp(max=len(cos) - 1)  # padding may lie beyond the table
        cos_sin = cos[known_BT], sin[known_BT]  # copies: the tables may be inference tensors
        x_BTD, own = self._embedded(ids_BT), dict(self.named_parameters(recurse=False))
        if "smear" in own:
            x_BTD = self._smeared(x_BTD, positions_BT, cache)
        x0_BTD = x_BTD.view_as(x_BTD)  # a view: aliased inputs would recompile a block
        for layer, block in enumerate(self.blocks):
            more: dict[str, Any] = {"mix": (x0_BTD, own["x0"][layer])} if "x0" in own else {}
            if layer in self.config.value_layers:
                # Not in the compiled block: its gradient would use atomic adds, which are slow for
                # frequent tokens and not deterministic.
                own_BTE = F.embedding(ids_BT, own[f"value_embeddings_{layer}"]).to(x_BTD.dtype)
                more["lookup"] = own_BTE, own["value_gates"][layer // 2]
            x_BTD = run(block, x_BTD, cos_sin, masks_L[layer], cache, positions_BT, **more)
        return norm(x_BTD)

    def _embedded(self, ids_BT: Tensor) -> Tensor:
        """The normalised token embeddings [B, T, D], the input of the residual stream."""
        x_BTD = self.embedding(ids_BT)
        if torch.is_autocast_enabled(x_BTD.device.type):
            # Keep the residual stream in the autocast dtype: float32 would double memory traffic
            # of every block (5 % of a step at depth 12 on an H100).
            x_BTD = x_BTD.to(torch.get_autocast_dtype(x_BTD.device.type))
        return norm(x_BTD)

    def _smeared(self, x_BTD: Tensor, positions_BT: Tensor, cache: KVCache | None) -> Tensor:
        """Add a gated fraction of the previous token's embedding (ingredient "smear")."""
        if cache is None:
            before_BTD = F.pad(x_BTD[:, :-1], (0, 0, 1, 0))  # a row's first token has none
        else:
            before_BT = cache.ids_BS.gather(1, (positions_BT - 1).clamp(min=0))
            before_BTD = self._embedded(before_BT) * (positions_BT > 0)[..., None]
        gate = self.get_parameter("smear")
        share_BT = gate[0] * torch.sigmoid(x_BTD[..., : len(gate) - 1] @ gate[1:])
        return x_BTD + share_BT.to(x_BTD.dtype)[..., None] * before_BTD

    def logits(self, hidden_D: Tensor) -> Tensor:
        """Float32 logits [..., V] for hidden states [..., D]."""
        return self.capped(self.head(hidden_D))

    @staticmethod
    def capped(scores: Tensor) -> Tensor:
        """The head's outputs in float32, soft-capped to ±15."""
        return SOFTCAP * torch.tanh(scores.float() / SOFTCAP)

    def forward(self, ids_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits [B, T, V] in float32; see `hidden` for the cache."""
        return self.logits(self.hidden(ids_BT, cache))

    def nll(self, batch: Batch) -> Tensor:
        """Negative log-likelihood [B, T] of the targets; 0 where ignored."""
        return self._nll(self.hidden(batch.inputs_BT), batch.targets_BT)

    def fast_kernels(self, use: Literal["training", "writing"]) -> ModuleType | None:
        """`nanolib.kernels` if they work on this device and support this model, else None."""
        known = use == "training" or not self.config.architecture
        aligned = self.config.width % 8 == 0 and self.config.head_dim.bit_count() == 1
        return _proven_kernels(self.head.weight.device, use) if aligned and known else None

    def compiled_nll(self, cudnn: bool = False, **options: Any) -> Callable[[Batch], Tensor]:
        """`nll` under torch.compile (`options`): one graph for all blocks, one for the loss.

        Compile time does not depend on depth. cudnn: allow cuDNN attention, which is 20 to 50 %
        faster than flash attention but spends 40 to 240 ms planning each new shape: worth it only
        if all rows have the same length.
        """
        fast = self.fast_kernels("training")
        fused = None if fast is None else fast.SquaredReLUMLP.apply

        def block(block: Block, *inputs, **given) -> Tensor:
            return block.forward(*inputs, **given, fused=fused)

        run, nll = torch.compile(block, **options), torch.compile(self._nll, **options)
        # A compiled function keeps the attention backend that was allowed when it was compiled, but
        # torch's disk cache does not include that in its key: the tag keeps the two apart.
        kernels = [FLASH, EFFICIENT, MATH, *([CUDNN] if cudnn else [])]
        tag = "cudnn" if cudnn else "flash"

        def compiled(batch: Batch) -> Tensor:
            tagged = torch.compiler.config.patch(cache_key_tag=tag)  # ty: ignore[missing-attribute]
            with sdpa_kernel(kernels), tagged:
                hidden_BTD = self.hidden(batch.inputs_BT, run=run)
            return nll(hidden_BTD, batch.targets_BT)

        return compiled

    def _nll(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = self.logits(hidden_BTD)
        # The softcap bounds the logits, so exp cannot overflow: no need to subtract the maximum.
        total_BT = logits_BTV.exp().sum(dim=-1).log()
        if torch.compiler.is_compiling():
            # Not gather, whose gradient would materialise a tensor as large as the logits.
            ids_V = torch.arange(self.vocab_size, device=targets_BT.device)
            own_BT = torch.where(ids_V == targets_BT[..., None], logits_BTV, 0).sum(dim=-1)
        else:
            own_BT = logits_BTV.gather(-1, targets_BT.clamp(min=0)[..., None]).squeeze(-1)
        return (total_BT - own_BT).masked_fill(targets_BT < 0, 0)
