"""From documents and conversations to rows, and from rows to batches.

A row holds T + 1 token ids: T inputs and, one to the right, T targets. Text is one long stream
per shard (every document is BOS + tokens), and row i is the slice that starts at token i · T, so
neighbouring rows overlap by one id and every token but a shard's first is a target exactly once.
Conversations are never split: each row holds as many whole ones as fit, and padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

IGNORED = -1  # a target that is not trained on


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows of T tokens, ready for the model.

    A row's documents see each other: ``classic`` attends across them. `fields` holds further
    per-token tensors [B, T].
    """

    inputs_BT: Tensor
    targets_BT: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        return Batch(
            inputs_BT=self.inputs_BT.to(device, non_blocking=True),
            targets_BT=self.targets_BT.to(device, non_blocking=True),
            fields={
                name: tensor.to(device, non_blocking=True) for name, tensor in self.fields.items()
            },
        )


class Source(Protocol):
    """What a stage trains on: a pure function of (data, seed, step)."""

    def updates(self, step: int) -> list[list[Batch]]:
        """This rank's micro-batches, for each optimizer update of that step."""
        ...


def batch_of_rows(
    rows: Sequence[np.ndarray], masks: Sequence[np.ndarray], length: int, bos: int
) -> Batch:
    """Rows of at most `length` + 1 ids as a padded batch.

    `masks` (bool, same lengths) say which ids may be targets. A row's unused tail is padding:
    input BOS, target ignored.
    """
    ids = np.full((len(rows), length + 1), bos, dtype=np.int64)
    wanted = np.zeros((len(rows), length + 1), dtype=bool)
    for i, row in enumerate(rows):
        if len(row) > length + 1:
            raise ValueError(f"a row of {len(row)} ids does not fit into {length} + 1")
        ids[i, : len(row)] = row
        wanted[i, : len(row)] = masks[i]
    targets = np.where(wanted[:, 1:], ids[:, 1:], IGNORED)
    return Batch(
        inputs_BT=torch.from_numpy(ids[:, :-1].copy()),
        targets_BT=torch.from_numpy(targets),
    )


def padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Rows of ids as one tensor [B, T], filled up at the end; T is at least 1."""
    ids_BT = torch.full((len(rows), max(1, *map(len, rows))), pad)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids_BT


def groups(lengths: Sequence[int], tokens_at_once: int) -> Iterator[list[int]]:
    """Places of rows of similar length, the shortest first: so many padded tokens, or one row."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[place] > tokens_at_once:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def pack(
    lengths: Sequence[int], capacity: int, order: Sequence[int], open_rows: int = 64
) -> list[list[int]]:
    """Put items into rows of at most `capacity` ids, never splitting one: best fit, in `order`.

    At most `open_rows` rows stay open; the fullest is closed first. Returns the items of each row;
    each item is in exactly one. Raises ValueError for an item longer than a row.
    """
    closed: list[list[int]] = []
    room: list[int] = []
    rows: list[list[int]] = []
    for item in order:
        need = lengths[item]
        if need > capacity:
            raise ValueError(f"item {item} has {need} ids, a row holds {capacity}")
        fits = [i for i, space in enumerate(room) if space >= need]
        if fits:
            best = min(fits, key=room.__getitem__)
            rows[best].append(item)
            room[best] -= need
            continue
        if len(rows) == open_rows:
            fullest = min(range(len(rows)), key=room.__getitem__)
            closed.append(rows.pop(fullest))
            room.pop(fullest)
        rows.append([item])
        room.append(capacity - need)
    return closed + rows
