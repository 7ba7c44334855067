"""Triton kernels for training on Hopper GPUs and for decoding on any CUDA device.

Importing it requires Triton. Use `GPT.fast_kernels`, which returns this module only if the kernels
pass a small numerical check on the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

EPS = 1e-6  # for RMS norm, as in the model
PROGRAMS = 2048  # enough small ones to keep a whole GPU busy (`read_cache`)
FEW_ROWS = 4  # up to this many rows, `linear` uses its own kernel instead of torch's matmul

# ---------------------------------------------------------------------------- the MLP in training
# The hidden activation is four times as wide as the residual stream, and a separate elementwise
# kernel would read and write it once more. So ReLU² is fused into the epilogue of the first matmul
# u = x upᵀ, and its derivative into the backward matmul. With h = ReLU(u)² the derivative is
# 2 ReLU(u) = 2 √h, so only h has to be saved, not u.

TILE = {"ROWS": 128, "COLUMNS": 256, "INNER": 64, "GROUP": 8}


@triton.jit
def _product(
    a_desc,  # [M, K]
    b_desc,  # [N, K], or [K, N] backward
    h_desc,  # [M, N], backward
    out_desc,  # [M, N]
    M,
    N,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,  # row tiles that reuse a tile of b while it is in the L2 cache
    PROGRAMS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        first = tile // (GROUP * column_tiles) * GROUP
        size = min(row_tiles - first, GROUP)
        within = tile % (GROUP * column_tiles)
        row, column = (first + within % size) * ROWS, within // size * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in range(0, K, INNER):
            a = a_desc.load([row, k])
            b = b_desc.load([k, column]) if BACKWARD else b_desc.load([column, k]).T
            total = tl.dot(a, b, total)
        # Store half a tile at a time: less shared memory leaves room for more loads in flight.
        halves = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            at = column + half * (COLUMNS // 2)
            if BACKWARD:
                root = tl.sqrt(h_desc.load([row, at]).to(tl.float32))
                value = 2 * halves[half] * root
            else:
                positive = tl.maximum(halves[half], 0.0)
                value = positive * positive
            out_desc.store([row, at], value.to(out_desc.dtype))


def _launch(a_MK: Tensor, b: Tensor, h_MN: Tensor | None) -> Tensor:
    """ReLU(a bᵀ)² [M, N] or, if h is given, the backward (a b) · 2 √h, elementwise; bfloat16."""
    backward = h_MN is not None
    (M, K), N = a_MK.shape, b.shape[1 if backward else 0]
    out_MN = a_MK.new_empty(M, N)
    rows, columns, inner = TILE["ROWS"], TILE["COLUMNS"], TILE["INNER"]
    out_desc = TensorDescriptor.from_tensor(out_MN, [rows, columns // 2])
    programs = torch.cuda.get_device_properties(a_MK.device).multi_processor_count
    _product[(programs,)](
        TensorDescriptor.from_tensor(a_MK, [rows, inner]),
        TensorDescriptor.from_tensor(b, [inner, columns] if backward else [columns, inner]),
        TensorDescriptor.from_tensor(h_MN, [rows, columns // 2]) if backward else out_desc,
        out_desc,
        M,
        N,
        K,
        **TILE,
        PROGRAMS=programs,
        BACKWARD=backward,
        num_warps=8,
        num_stages=3,
    )
    return out_MN


@torch.library.custom_op("nanolib::up_squared_relu", mutates_args=())
def up_squared_relu(x_ND: Tensor, up_FD: Tensor) -> Tensor:
    """ReLU(x upᵀ)² [N, F]."""
    return _launch(x_ND, up_FD, None)


@torch.library.custom_op("nanolib::squared_relu_backward", mutates_args=())
def squared_relu_backward(grad_ND: Tensor, down_DF: Tensor, h_NF: Tensor) -> Tensor:
    """Gradient [N, F] w.r.t. ReLU²'s input, given that of the MLP's output h downᵀ [N, D]."""
    return _launch(grad_ND, down_DF, h_NF)


@up_squared_relu.register_fake
def _(x_ND: Tensor, up_FD: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], up_FD.shape[0])  # len() would specialise on N


@squared_relu_backward.register_fake
def _(grad_ND: Tensor, down_DF: Tensor, h_NF: Tensor) -> Tensor:
    return torch.empty_like(h_NF)


class SquaredReLUMLP(torch.autograd.Function):
    """x [N, D], up [F, D], down [D, F] -> ReLU(x upᵀ)² downᵀ [N, D], in x's bfloat16."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        up_FD, down_DF = up_FD.to(x_ND.dtype), down_DF.to(x_ND.dtype)
        h_NF = up_squared_relu(x_ND, up_FD)
        ctx.save_for_backward(x_ND, up_FD, down_DF, h_NF)
        return h_NF @ down_DF.mT

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_ND, up_FD, down_DF, h_NF = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_NF = squared_relu_backward(grad_ND, down_DF, h_NF)
        return grad_NF @ up_FD, grad_NF.mT @ x_ND, grad_ND.mT @ h_NF


# ---------------------------------------------------------------------------- decoding


@triton.jit
def _few_rows(
    x,  # [N, D]
    weight,  # [F, D]
    residual,  # [N, F] or x
    out,  # [N, F]
    F,
    EPS: tl.constexpr,
    D: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INNER: tl.constexpr,
    NORM: tl.constexpr,
    SQUARED_RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    row, f = tl.program_id(0), tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    square = 0.0
    total = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for start in range(0, D, INNER):
        d = start + tl.arange(0, INNER)
        x_D = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        at_FD = f[:, None].to(tl.int64) * D + d[None]
        inside_FD = (f < F)[:, None] & (d < D)[None]
        weight_FD = tl.load(weight + at_FD, mask=inside_FD, other=0.0).to(tl.float32)
        total += tl.sum(weight_FD * x_D[None], 1)
        square += tl.sum(x_D * x_D, 0)
    if NORM:  # a factor per row, so it can be applied after the dot product
        total *= tl.rsqrt(square / D + EPS)
    if SQUARED_RELU:
        total = tl.maximum(total, 0.0) * tl.maximum(total, 0.0)
    if RESIDUAL:
        total += tl.load(residual + row * F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(out + row * F + f, total.to(out.dtype.element_ty), mask=f < F)


def linear(
    x_ND: Tensor,
    weight_FD: Tensor,
    *,
    normed: bool = False,
    squared_relu: bool = False,
    residual_NF: Tensor | None = None,
) -> Tensor:
    """act(norm(x) weightᵀ) + residual [N, F]; all but the product optional. May overwrite residual.

    With few rows, nearly all time goes into reading the weights, so one kernel does everything in a
    single pass over them.
    """
    (N, D), F_ = x_ND.shape, len(weight_FD)
    if N > FEW_ROWS:
        if normed:
            x_ND = F.rms_norm(x_ND, (D,), eps=EPS)
        if squared_relu:
            return up_squared_relu(x_ND, weight_FD)
        if residual_NF is not None:
            return residual_NF.addmm_(x_ND, weight_FD.mT)
        return x_ND @ weight_FD.mT
    out_NF = x_ND.new_empty(N, F_)
    outputs = 4 if D <= 1024 else 1
    _few_rows[(N, triton.cdiv(F_, outputs))](
        x_ND.contiguous(),
        weight_FD,
        x_ND if residual_NF is None else residual_NF,
        out_NF,
        F_,
        EPS=EPS,
        D=D,
        OUTPUTS=outputs,
        INNER=min(1024, triton.next_power_of_2(D)),
        NORM=normed,
        SQUARED_RELU=squared_relu,
        RESIDUAL=residual_NF is not None,
        num_warps=4,
    )
    return out_NF


@triton.jit
def _place(
    qkv,  # [B, T, H + 2 G, K]
    cos,  # [positions, K / 2]
    sin,
    used,  # [B]: cached positions before the T new ones
    query,  # [B, T, H, K] out
    keys,  # [B, G, S, K] out, at the new positions
    values,
    T,
    S,
    last,  # last position in the cos and sin tables
    EPS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row, head = tl.program_id(1), tl.program_id(2)
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    k = tl.arange(0, HALF)[None]
    position = tl.load(used + row) + t
    token = row.to(tl.int64) * T + t
    source = qkv + (token * (H + 2 * G) + head) * 2 * HALF + k
    left = tl.load(source, mask=t < T, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=t < T, other=0.0).to(tl.float32)
    if head < H + G:
        square = tl.sum(left * left + right * right, 1, keep_dims=True)
        scale = tl.rsqrt(square / (2 * HALF) + EPS)
        turn = tl.minimum(position, last) * HALF + k
        c, s = tl.load(cos + turn), tl.load(sin + turn)
        left, right = scale * (left * c + right * s), scale * (right * c - left * s)
    if head < H:
        to = query + (token * H + head) * 2 * HALF
    elif head < H + G:
        to = keys + ((row * G + head - H).to(tl.int64) * S + position) * 2 * HALF
    else:
        to = values + ((row * G + head - H - G).to(tl.int64) * S + position) * 2 * HALF
    inside = (t < T) & ((head < H) | (position < S))
    tl.store(to + k, left.to(query.dtype.element_ty), mask=inside)
    tl.store(to + HALF + k, right.to(query.dtype.element_ty), mask=inside)


def place(
    qkv_BTNK: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    used_B: Tensor,
    keys_BGSK: Tensor,
    values_BGSK: Tensor,
) -> Tensor:
    """Apply QK-norm and RoPE, write keys and values to the cache, return the queries [B, T, H, K].

    qkv holds H query, G key and G value heads; the cache has the same dtype.
    """
    (B, T, heads, K), (G, S) = qkv_BTNK.shape, keys_BGSK.shape[1:3]
    cos, sin = cos_sin
    query_BTHK = qkv_BTNK.new_empty(B, T, heads - 2 * G, K)
    tokens = min(16, triton.next_power_of_2(T))
    _place[(triton.cdiv(T, tokens), B, heads)](
        *(qkv_BTNK, cos, sin, used_B, query_BTHK, keys_BGSK, values_BGSK),
        *(T, S, len(cos) - 1),
        EPS=EPS,
        H=heads - 2 * G,
        G=G,
        HALF=K // 2,
        TOKENS=tokens,
        num_warps=1 if tokens == 1 else 4,
    )
    return query_BTHK


@triton.jit
def _read_cache(
    query,  # [B, H, K]
    keys,  # [B, G, S, K]
    values,
    used,  # [B]: the query's position, the last one it attends to
    mixed,  # [B, H, PARTS, K] out: Σ exp(score) · value over each part
    weight,  # [B, H, PARTS] out: Σ exp(score) over each part
    scale,
    H,
    G,
    S,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.minimum(tl.load(used + row) + 1, S).to(tl.int32)
    width = tl.cdiv(tl.cdiv(count, PARTS), BLOCK) * BLOCK
    last = min((part + 1) * width, count)
    k, s = tl.arange(0, K), tl.arange(0, BLOCK)
    query_K = tl.load(query + (row * H + head) * K + k).to(tl.float32) * scale
    tile_SK = (row * G + head // (H // G)).to(tl.int64) * S * K + (s[:, None] * K + k[None])
    keys_SK, values_SK = keys + tile_SK, values + tile_SK
    sum_S = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_SK = tl.zeros((BLOCK, K), dtype=tl.float32)
    for start in range(part * width, last, BLOCK):
        here_S1 = (start + s < last)[:, None]
        key_SK = tl.load(keys_SK + start * K, mask=here_S1, other=0.0).to(tl.float32)
        value_SK = tl.load(values_SK + start * K, mask=here_S1, other=0.0).to(tl.float32)
        # QK-norm bounds scores by √K, so exp cannot overflow: no need to subtract the maximum.
        weight_S = tl.where(start + s < last, tl.exp(tl.sum(key_SK * query_K[None], 1)), 0.0)
        sum_S += weight_S
        sum_SK += weight_S[:, None] * value_SK
    place = (row * H + head) * PARTS + part
    tl.store(mixed + place * K + k, tl.sum(sum_SK, 0))
    tl.store(weight + place, tl.sum(sum_S, 0))


@triton.jit
def _combine(mixed, weight, out, PARTS: tl.constexpr, K: tl.constexpr):
    head, k, p = tl.program_id(0), tl.arange(0, K), tl.arange(0, PARTS)
    mixed_PK = tl.load(mixed + (head * PARTS + p)[:, None] * K + k[None])
    total = tl.sum(tl.load(weight + head * PARTS + p), 0)
    tl.store(out + head * K + k, (tl.sum(mixed_PK, 0) / total).to(out.dtype.element_ty))


def read_cache(query_BHK: Tensor, keys_BGSK: Tensor, values_BGSK: Tensor, used_B: Tensor) -> Tensor:
    """Attention [B, H, K] of one query per row over cached positions 0 … used.

    With few rows, the positions of each are split over several programs to fill the GPU.
    """
    (B, H, K), (G, S) = query_BHK.shape, keys_BGSK.shape[1:3]
    parts = max(1, min(64, triton.next_power_of_2(PROGRAMS // (B * H))))
    mixed = query_BHK.new_empty((B, H, parts, K), dtype=torch.float32)
    weight = mixed.new_empty((B, H, parts))
    _read_cache[(B, H, parts)](
        *(query_BHK, keys_BGSK, values_BGSK, used_B, mixed, weight),
        *(K**-0.5, H, G, S),
        PARTS=parts,
        K=K,
        BLOCK=16,
        num_warps=1,
        num_stages=4,
    )
    out_BHK = torch.empty_like(query_BHK)
    _combine[(B * H,)](mixed, weight, out_BHK, PARTS=parts, K=K, num_warps=4)
    return out_BHK


# ---------------------------------------------------------------------------- checks


def prove(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Check both MLP kernels against torch on small random inputs; AssertionError if wrong."""
    random = torch.Generator(device).manual_seed(0)
    shapes = (130, 64), (264, 64), (64, 264)
    x, up, down = (torch.randn(it, generator=random, device=device).to(dtype) for it in shapes)
    h = F.relu(x.float() @ up.float().mT).square()
    check(up_squared_relu(x, up), h)
    backward = 2 * (x.float() @ down.float()) * h.sqrt()
    check(squared_relu_backward(x, down, h.to(dtype)), backward)


def check(got: Tensor, want: Tensor, most: float = 1e-2) -> None:
    error = float((got.float() - want).norm() / want.norm())
    assert error < most, f"relative error {error:.1e}"
