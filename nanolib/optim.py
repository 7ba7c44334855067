"""Muon for matrices, AdamW for embeddings, head and scalars, sharded over ranks.

`adamw_step` and `muon_step` are the two update rules as pure in-place functions on tensors.
`MuonAdamW` applies them to a model. As in ZeRO-2 (arXiv:1910.02054), gradients are
reduce-scattered, each rank clips and updates its shard of every parameter and keeps optimizer state
for that shard only, and the new weights are all-gathered.

Embedding and head are sharded by rows, the matrices of one shape by whole matrices; the number of
either is padded to a multiple of world_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from nanolib.config import OptimConfig
from nanolib.runtime import Runtime

if TYPE_CHECKING:
    from nanolib.model import GPT

# Quintic Newton–Schulz coefficients of Muon (Keller Jordan, 2024), chosen for the steepest slope at
# 0: singular values end up near 1, not exactly at 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Polar Express (arXiv:2505.16932): the optimal polynomial for each iteration, for singular values
# from 0.001 to 1.01 (rounding may push one above 1). Further iterations repeat the last.
POLAR_EXPRESS = (
    (8.205160, -22.901935, 16.460725),
    (4.066395, -2.861154, 0.518400),
    (3.909595, -2.823352, 0.525037),
    (3.285564, -2.415302, 0.485294),
    (2.277873, -1.619822, 0.398481),
    (1.856436, -1.213238, 0.356800),
)
# AdamW learning rates of the ingredients' scalars, by parameter name (nanochat, 2026).
SCALAR_LRS = {"x0": 0.02, "smear": 0.2, "value_gates": 0.01}
VALUE_EMBEDDING_LR = 0.5  # times embedding_lr

SLOTS = {"muon": ("momentum",), "adamw": ("moment1", "moment2")}  # state tensors of each rule


def adamw_step(
    weight: Tensor,
    grad: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """One AdamW update in place (arXiv:1711.05101); `step` counts from 1. All shapes equal."""
    beta1, beta2 = betas
    weight.mul_(1 - lr * weight_decay)
    moment1.lerp_(grad, 1 - beta1)
    moment2.lerp_(grad.square(), 1 - beta2)
    scale = (moment2 / (1 - beta2**step)).sqrt_().add_(eps)
    weight.addcdiv_(moment1, scale, value=-lr / (1 - beta1**step))


def orthogonalise(matrices_NRC: Tensor, steps: int = 5, polar_express: bool = False) -> Tensor:
    """Orthogonalise each matrix of a stack [N, R, C]: push its singular values towards 1.

    The Newton–Schulz iteration of Muon, in bfloat16 on CUDA and in the given precision elsewhere.
    """
    polynomials = POLAR_EXPRESS if polar_express else (NEWTON_SCHULZ,)
    x = matrices_NRC.bfloat16() if matrices_NRC.is_cuda else matrices_NRC
    wide = x.size(-2) <= x.size(-1)
    if not wide:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for step in range(steps):
        a, b, c = polynomials[min(step, len(polynomials) - 1)]
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x if wide else x.mT).to(matrices_NRC.dtype)


def muon_step(
    weights_NRC: Tensor,
    grads_NRC: Tensor,
    momenta_NRC: Tensor,
    *,
    lr: float,
    momentum: float,
    newton_schulz_steps: int = 5,
    decay: float = 0.0,
    uses: Set[str] = frozenset(),
) -> None:
    """One Muon update in place on a stack of matrices (https://kellerjordan.github.io/posts/muon).

    The Nesterov momentum is orthogonalised and scaled by √max(1, R/C). decay: decoupled weight
    decay. uses: "polar_express", and "cautious_decay" to decay only weights that the update also
    shrinks (arXiv:2510.12402).
    """
    momenta_NRC.lerp_(grads_NRC, 1 - momentum)
    update = grads_NRC.lerp(momenta_NRC, momentum)
    update = orthogonalise(update, newton_schulz_steps, "polar_express" in uses)
    if decay:
        where = update * weights_NRC > 0 if "cautious_decay" in uses else 1.0
        weights_NRC.mul_(1 - lr * decay * where)
    rows, columns = weights_NRC.shape[-2:]
    weights_NRC.add_(update, alpha=-lr * math.sqrt(max(1.0, rows / columns)))


@dataclass
class Group:
    """Parameters updated together, as N items sharded over ranks.

    Muon: N matrices of one shape, stacked [N, R, C]. AdamW: the N rows of one matrix [N, D], or the
    numbers of a vector [N].
    """

    rule: str  # "muon" or "adamw"
    names: list[str]
    params: list[Tensor]
    lr: float
    ranks: int

    def __post_init__(self) -> None:
        self.size = len(self.params if self.rule == "muon" else self.params[0])  # N
        self.share = math.ceil(self.size / self.ranks)  # items per rank; the last may have padding
        shape = self.params[0].shape[0 if self.rule == "muon" else 1 :]
        zeros = partial(torch.zeros, device=self.params[0].device, dtype=torch.float32)
        self.state = {slot: zeros((self.share, *shape)) for slot in SLOTS[self.rule]}

    def stack(self, tensors: list[Tensor]) -> Tensor:
        """All items in one tensor, padded to share · ranks."""
        stacked = torch.stack(tensors) if self.rule == "muon" else tensors[0]
        if missing := self.share * self.ranks - self.size:
            stacked = torch.cat((stacked, stacked.new_zeros(missing, *stacked.shape[1:])))
        return stacked

    def unstack(self, stacked: Tensor) -> list[Tensor]:
        """The inverse of `stack`: one tensor per parameter, without padding."""
        items = stacked[: self.size]
        return list(items) if self.rule == "muon" else [items]

    def owned(self, rank: int) -> Iterator[tuple[str, slice, slice]]:
        """(parameter name, rows of it on `rank`, their slice of the shard), for checkpoints.

        For Muon the inner slice has one element: the matrix's index in the shard.
        """
        first, last = rank * self.share, min((rank + 1) * self.share, self.size)
        if self.rule == "muon":
            for i in range(first, last):
                rows = slice(0, len(self.params[i]))
                yield self.names[i], rows, slice(i - first, i - first + 1)
        elif first < last:
            yield self.names[0], slice(first, last), slice(0, last - first)


class MuonAdamW:
    """The optimizer of every stage.

    Each rank's `param.grad` is its local gradient. `reduce` sums them over ranks, `update` clips by
    the global norm and changes the model in place; `step` does both. The trainer calls the two
    separately, to fetch the norm and its own sums from the device in one transfer.
    """

    def __init__(self, model: GPT, config: OptimConfig, runtime: Runtime):
        self.config, self.runtime, self.uses = config, runtime, model.config.uses
        self.groups = [*self._groups(model)]
        self.steps = 0  # updates made, for AdamW's bias correction and the momentum warmup

    def _groups(self, model: GPT) -> Iterator[Group]:
        ranks, width = self.runtime.world_size, model.config.width
        scale = (width / 768) ** -0.5  # the learning rates are tuned at width 768
        lrs = SCALAR_LRS | {
            "embedding.weight": self.config.embedding_lr * scale,
            "value_embeddings": self.config.embedding_lr * scale * VALUE_EMBEDDING_LR,
            "head.weight": self.config.head_lr * scale,
        }
        matrices: dict[torch.Size, dict[str, Tensor]] = {}
        for name, param in model.named_parameters():
            lr = next((lr for start, lr in lrs.items() if name.startswith(start)), None)
            if lr is not None:
                yield Group("adamw", [name], [param], lr, ranks)
            else:
                matrices.setdefault(param.shape, {})[name] = param
        for named in matrices.values():
            yield Group("muon", [*named], [*named.values()], self.config.matrix_lr, ranks)

    def momentum(self) -> float:
        """Muon's momentum for the next update, with linear warmup."""
        c = self.config
        warm = min(1.0, self.steps / c.momentum_warmup) if c.momentum_warmup else 1.0
        return c.momentum_start + (c.momentum - c.momentum_start) * warm

    def step(self, lr_scale: float) -> float:
        """`reduce` and `update`; returns the global gradient norm before clipping."""
        grads, squares = self.reduce()
        norm = float(self.runtime.sum(squares).sqrt())
        self.update(grads, norm, lr_scale)
        return norm

    @torch.no_grad()
    def reduce(self) -> tuple[list[Tensor], Tensor]:
        """Reduce-scatter: this rank's gradient shard of each group, and their sum of squares."""
        grads = [self._reduce_group(group) for group in self.groups]
        squares = torch.stack([grad.square().sum(dtype=torch.float64) for grad in grads]).sum()
        return grads, squares

    @torch.no_grad()
    def update(self, grads: list[Tensor], norm: float, lr_scale: float) -> None:
        """Update the model from the shards that `reduce` returned; `norm` is the global one.

        Raises FloatingPointError before any change if the norm is not finite.
        """
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm} at update {self.steps + 1}")
        clip = self.config.clip
        if clip is not None and norm > clip:
            torch._foreach_mul_(grads, clip / norm)
        momentum = self.momentum()
        self.steps += 1
        for group, grad in zip(self.groups, grads, strict=True):
            self._update_group(group, grad, lr_scale, momentum)

    def zero_grad(self) -> None:
        for group in self.groups:
            for param in group.params:
                param.grad = None

    def _reduce_group(self, group: Group) -> Tensor:
        """This rank's shard of the gradient, summed over ranks."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group.params]
        stacked = group.stack(grads)
        if self.runtime.world_size == 1:
            return stacked
        share = stacked.new_empty(group.share, *stacked.shape[1:])
        dist.reduce_scatter_tensor(share, stacked.contiguous())
        return share

    def _update_group(self, group: Group, grad: Tensor, lr_scale: float, momentum: float) -> None:
        """Update this rank's shard of a group, then all-gather the weights."""
        stacked = group.stack([p.data for p in group.params])
        first = self.runtime.rank * group.share
        weight = stacked[first : first + group.share].clone()
        config, lr = self.config, group.lr * lr_scale
        moments = group.state.values()
        if group.rule == "muon":
            settings = {"newton_schulz_steps": config.newton_schulz_steps, "uses": self.uses}
            decay = 0.1 * ("cautious_decay" in self.uses)
            decay = decay if config.matrix_decay is None else config.matrix_decay
            muon_step(weight, grad, *moments, lr=lr, momentum=momentum, decay=decay, **settings)
        else:
            decay = config.weight_decay if group.params[0].dim() == 2 else 0.0  # none for scalars
            settings = {"eps": config.adam_eps, "weight_decay": decay}
            betas = (config.adam_beta1, config.adam_beta2)
            adamw_step(weight, grad, *moments, step=self.steps, lr=lr, betas=betas, **settings)
        if self.runtime.world_size > 1:
            dist.all_gather_into_tensor(stacked, weight)
        else:
            stacked = weight
        torch._foreach_copy_([p.data for p in group.params], group.unstack(stacked))
