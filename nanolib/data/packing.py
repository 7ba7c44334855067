"""Pack documents and conversations into rows, and rows into batches.

A row holds T + 1 token ids: T inputs and, shifted by one, T targets. A text shard is one stream, in
which row i starts at token i · T. Conversations are never split; their rows are padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

IGNORED = -1  # marks targets that are excluded from the loss
TOKENS_AT_ONCE = 16_384  # in a batch to score, padding included
Ids = Sequence[int] | np.ndarray  # also used for masks


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows of T tokens; attention is not masked at document boundaries."""

    inputs_BT: Tensor
    targets_BT: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)  # other per-token tensors [B, T]

    @property
    def count(self) -> int:
        """The number of targets in the loss."""
        return int((self.targets_BT != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        tensors = (self.inputs_BT, self.targets_BT, *self.fields.values())
        inputs_BT, targets_BT, *more = (x.to(device, non_blocking=True) for x in tensors)
        fields = dict(zip(self.fields, more, strict=True))
        return Batch(inputs_BT=inputs_BT, targets_BT=targets_BT, fields=fields)


class Source(Protocol):
    """Training data of a stage: a pure function of (data, seed, step)."""

    def updates(self, step: int) -> list[list[Batch]]:
        """This rank's micro-batches of a step, one list per optimizer update."""
        ...


def batch_of_rows(rows: Sequence[Ids], masks: Sequence[Ids], length: int, bos: int) -> Batch:
    """Pad rows of at most `length` + 1 ids; `masks` (bool) mark the ids that are targets."""
    longest = max(map(len, rows))
    if longest > length + 1:
        raise ValueError(f"a row of {longest} ids does not fit into {length} + 1")
    ids_BT, mask_BT = padded(rows, bos, length + 1), padded(masks, 0, length + 1)
    targets_BT = torch.where(mask_BT[:, 1:].bool(), ids_BT[:, 1:], IGNORED)
    return Batch(inputs_BT=ids_BT[:, :-1].contiguous(), targets_BT=targets_BT)


def padded(rows: Sequence[Ids], pad: int, length: int | None = None) -> Tensor:
    """Rows of ids as [B, T], right-padded with `pad`; T is `length`, else the longest row's."""
    ids_BT = np.full((len(rows), length or max(1, *map(len, rows))), pad, dtype=np.int64)
    for ids_T, row in zip(ids_BT, rows, strict=True):
        ids_T[: len(row)] = row
    return torch.from_numpy(ids_BT)


def groups(lengths: Sequence[int], tokens_at_once: int) -> Iterator[list[int]]:
    """Rows sorted by length, in groups of at most `tokens_at_once` padded tokens (or one row)."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[index] > tokens_at_once:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def pack(
    lengths: Sequence[int], capacity: int, order: Sequence[int], open_rows: int = 64
) -> list[list[int]]:
    """Best-fit packing of items, in `order`, into rows of at most `capacity` ids.

    Returns the items of each row. When `open_rows` rows are open, the fullest is closed.
    """
    closed, rows, room = [], [], []  # room: free ids in each open row
    for item in order:
        if (need := lengths[item]) > capacity:
            raise ValueError(f"item {item} has {need} ids, a row holds {capacity}")
        fits = [i for i, space in enumerate(room) if space >= need]
        if not fits:
            if len(rows) == open_rows:
                fullest = room.index(min(room))
                closed.append(rows.pop(fullest))
                room.pop(fullest)
            rows.append([])
            room.append(capacity)
        best = min(fits or [-1], key=room.__getitem__)
        rows[best].append(item)
        room[best] -= need
    return closed + rows
