"""The engine's KV cache with per-row sampling state, and its prefix cache.

Shapes: B rows, L layers, G key/value heads, S cached positions, T those of one row, K head size.
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

KeysValues = tuple[Tensor, Tensor, Tensor]  # of one row: keys and values [L, G, T, K], ids [T]


class Slots(KVCache):
    """A KV cache with each row's sampling state, and CUDA graphs of the decoding step."""

    def __init__(self, *given):
        super().__init__(*given)
        self.ids_B1 = torch.zeros_like(self.used_B)[:, None]  # each row's latest token
        self.key_B, self.top_k_B = torch.zeros_like(self.used_B), torch.zeros_like(self.used_B)
        self.temperature_B = torch.zeros_like(self.used_B, dtype=torch.float32)
        self.top_p_B = torch.ones_like(self.temperature_B)
        self.views: dict[int, Slots] = {}
        self.replays: dict[tuple, Replay | None] = {}  # None: ran once, not captured yet

    def settings(self) -> tuple[Tensor, ...]:
        """The per-row state, [B] each: latest token, seed, temperature, top-k, top-p."""
        return self.ids_B1[:, 0], self.key_B, self.temperature_B, self.top_k_B, self.top_p_B

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def first(self, rows: int) -> Slots:
        """A view of the first rows, sharing memory."""
        if rows not in self.views:
            view = self.views[rows] = copy.copy(self)
            view.views, view.replays = {}, {}
            for name, value in self.tensors().items():
                setattr(view, name, value[:, :rows] if value.dim() == 5 else value[:rows])
        self.views[rows].used = self.used[:rows]
        return self.views[rows]

    def fill(self, other: Slots) -> None:
        """Copy the contents of a smaller cache."""
        mine = self.tensors()
        for name, theirs in other.tensors().items():
            mine[name][tuple(map(slice, theirs.shape))] = theirs
        self.used[: len(other.used)] = other.used

    def read_row(self, row: int) -> KeysValues:
        used = self.used[row]
        keys, values = (x[:, row, :, :used] for x in (self.keys_LBGSK, self.values_LBGSK))
        return keys, values, self.ids_BS[row, :used]

    def write_row(self, row: int, read: KeysValues) -> None:
        used = self.used[row] = self.used_B[row] = read[0].shape[2]
        self.keys_LBGSK[:, row, :, :used], self.values_LBGSK[:, row, :, :used] = read[:2]
        self.ids_BS[row, :used] = read[2]

    def begin(self, rows: Sequence[int], settings: Sequence[tuple]) -> None:
        """Set the per-row state of these rows, one `settings` tuple per row."""
        rows_N = torch.tensor(rows, device=self.used_B.device)
        for mine_B, values in zip(self.settings(), zip(*settings, strict=True), strict=True):
            mine_B[rows_N] = torch.tensor(values, dtype=mine_B.dtype, device=mine_B.device)

    def move(self, row: int, to: int) -> None:
        """Copy row `row`, with its state, to row `to`."""
        self.write_row(to, self.read_row(row))
        for mine_B in self.settings():
            mine_B[to] = mine_B[row]

    def hold(self, row: int, id: int) -> None:
        """Undo a row's last step: the next one processes the same token, `id`, again."""
        self.ids_B1[row] = id
        self.used_B[row] -= 1
        self.used[row] -= 1

    def trim(self, rows: int) -> None:
        """Clear the rows from `rows` on, so that they do not count in `reach`."""
        self.used_B[rows:] = 0
        self.used[rows:] = [0] * (len(self.used) - rows)


class Kept:
    """An LRU prefix cache of finished rows' keys and values, of at most `most_bytes`, for prompts
    that share a beginning."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.rows: list[tuple[list[int], Tensor, Tensor, Tensor]] = []

    def add(self, ids: list[int], read: KeysValues) -> None:
        self.rows = [row for row in self.rows if row[0] != ids[: len(row[0])]]
        keys, values, ids_T = read
        self.rows.append((ids, keys.clone(), values.clone(), ids_T.clone()))
        while sum(row[1].nbytes + row[2].nbytes for row in self.rows) > self.most_bytes:
            del self.rows[0]

    def find(self, ids: list[int]) -> KeysValues | None:
        """Keys and values of the longest cached prefix of `ids`, or None if it is too short."""
        pairs = [zip(ids, row[0], strict=False) for row in self.rows]
        common = [len([*takewhile(lambda pair: pair[0] == pair[1], each)]) for each in pairs]
        longest = max(common, default=0)
        if longest < KEPT_LEAST:
            return None
        found = self.rows.pop(common.index(longest))
        self.rows.append(found)
        return found[1][:, :, :longest], found[2][:, :, :longest], found[3][:longest]
