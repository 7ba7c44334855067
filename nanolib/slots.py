"""The engine's KV cache with per-row sampling state, and its prefix cache.

Shapes: B rows, R chosen rows, N values of a row's state, L layers, G key/value heads, S cached
positions, T those of one row, K head size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from nanolib.model import KVCache
from nanolib.runtime import Replay

KEPT_LEAST = 16  # tokens; shorter common prefixes are not reused


class Slots(KVCache):
    """A KV cache with each row's sampling state, and CUDA graphs of the decoding step."""

    def __init__(self, *given):
        super().__init__(*given)
        # A row's state is a column of two tables, so that few copies set it for many rows.
        self.whole_NB = self.used_B.new_zeros(4, len(self.used))
        self.used_B, ids_B, self.key_B, self.top_k_B = self.whole_NB
        self.ids_B1 = ids_B[:, None]  # each row's latest token
        self.real_NB = torch.ones_like(self.whole_NB[:2], dtype=torch.float32)
        self.temperature_B, self.top_p_B = self.real_NB
        self.views: dict[int, Slots] = {}
        self.replays: dict[tuple, Replay | None] = {}  # None: ran once, not captured yet

    def first(self, rows: int) -> Slots:
        """A view of the first rows, sharing memory."""
        if rows not in self.views:
            view = self.views[rows] = copy.copy(self)
            view.views, view.replays = {}, {}
            for name, value in vars(self).items():
                if isinstance(value, Tensor):  # its name says which axis has the rows
                    setattr(view, name, value.narrow(name.split("_")[-1].index("B"), 0, rows))
        self.views[rows].used = self.used[:rows]
        return self.views[rows]

    def read_row(self, row: int, used: int) -> Tensor:
        """A copy of a row's first keys and values [2, L, G, T, K]."""
        return torch.stack([x[:, row, :, :used] for x in (self.keys_LBGSK, self.values_LBGSK)])

    def write_row(self, row: int, ids: list[int], read_2LGTK: Tensor) -> None:
        used = self.used[row] = self.used_B[row] = len(ids)
        self.keys_LBGSK[:, row, :, :used], self.values_LBGSK[:, row, :, :used] = read_2LGTK
        self.ids_BS[row, :used] = torch.tensor(ids)

    def copy(self, other: Slots, rows: Sequence[int], to: Sequence[int]) -> None:
        """Copy the tokens of rows of a cache, this or another, to rows `to`."""
        from_R, to_R = torch.tensor([rows, to], device=self.used_B.device)
        reach = max(other.used[row] for row in rows)
        for name, B, S in (("keys_LBGSK", 1, 3), ("values_LBGSK", 1, 3), ("ids_BS", 0, 1)):
            both = [getattr(c, name).narrow(S, 0, reach).transpose(0, B) for c in (self, other)]
            both[0][to_R] = both[1][from_R]

    def set(self, rows: Sequence[int], states: Sequence) -> None:
        """Set the state of rows: tokens used, latest token, seed, top-k, temperature, top-p."""
        used, *whole, temperature, top_p = zip(*states, strict=True)
        given_NR = self.whole_NB.new_tensor([rows, used, *whole])
        self.whole_NB.index_copy_(1, given_NR[0], given_NR[1:])
        self.real_NB.index_copy_(1, given_NR[0], self.real_NB.new_tensor([temperature, top_p]))
        for row, count in zip(rows, used, strict=True):
            self.used[row] = count


class Kept:
    """An LRU prefix cache of finished rows' keys and values, of at most `most_bytes`, for prompts
    that share a beginning."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.rows: list[tuple[list[int], Tensor]] = []  # ids, and `Slots.read_row` of them

    def add(self, ids: list[int], read_2LGTK: Tensor) -> None:
        self.rows = [row for row in self.rows if row[0] != ids[: len(row[0])]]
        self.rows.append((ids, read_2LGTK))
        while sum(read.nbytes for _, read in self.rows) > self.most_bytes:
            del self.rows[0]

    def find(self, ids: list[int]) -> tuple[list[int], Tensor] | None:
        """The longest cached prefix of `ids` with its keys and values, or None if too short."""
        pairs = [zip(ids, row[0], strict=False) for row in self.rows]
        common = [len([*takewhile(lambda pair: pair[0] == pair[1], each)]) for each in pairs]
        longest = max(common, default=0)
        if longest < KEPT_LEAST:
            return None
        self.rows.append(self.rows.pop(common.index(longest)))
        return ids[:longest], self.rows[-1][1][:, :, :, :longest]
