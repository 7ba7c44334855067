"""Training data: token shards for pretraining, packed conversations for finetuning.

Both are an endless sequence of rows, shuffled in each epoch by (seed, epoch). A step takes the next
`batch_rows` rows, and row i goes to rank i mod world_size, so resuming needs no state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nanolib.conversation import Conversation, Rendered
from nanolib.data.packing import Batch, Ids, batch_of_rows, pack
from nanolib.runtime import seed_of
from nanolib.tokenizer import Tokenizer

CONVERSATIONS_AT_ONCE = 1024  # tokenized together


@dataclass(kw_only=True, eq=False)
class RowSource:
    """Batches of rows; a subclass defines the rows of an epoch and their number."""

    length: int  # T
    batch_rows: int  # per step, over all ranks and micro-batches
    bos: int
    seed: int
    rank: int = 0
    world_size: int = 1
    device_batch: int | None = None  # maximum rows of a micro-batch; None: all of this rank's

    def __len__(self) -> int:
        raise NotImplementedError

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a row and its target mask (bool)."""
        raise NotImplementedError

    def row_numbers(self, step: int) -> list[int]:
        first = step * self.batch_rows
        mine = range(first + self.rank, first + self.batch_rows, self.world_size)
        size = len(self)
        return [int(_order(self.seed, i // size, size)[i % size]) for i in mine]

    def updates(self, step: int) -> list[list[Batch]]:
        numbers = self.row_numbers(step)
        size = self.device_batch or len(numbers)
        return [[self.batch(numbers[i : i + size]) for i in range(0, len(numbers), size)]]

    def batch(self, numbers: Sequence[int]) -> Batch:
        ids, masks = zip(*map(self.row, numbers), strict=True)
        return batch_of_rows(ids, masks, self.length, self.bos)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed_of(seed, "rows", epoch)).permutation(rows)


class TextSource(RowSource):
    """Rows of memory-mapped token shards: row i of a shard is ids i·T to i·T + T, inclusive."""

    def __init__(self, shards: Sequence[np.ndarray], **settings: Any):
        super().__init__(**settings)
        self.shards = [shard for shard in shards if len(shard) > 1]
        self.ends = np.cumsum([-(-(len(shard) - 1) // self.length) for shard in self.shards])
        if not self.shards:
            raise ValueError("the token shards are empty: there is nothing to train on")

    @classmethod
    def open(cls, paths: Sequence[Path], **settings: Any) -> TextSource:
        return cls([np.load(path, mmap_mode="r") for path in paths], **settings)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        shard = int(np.searchsorted(self.ends, number, side="right"))
        first = number - (int(self.ends[shard - 1]) if shard else 0)
        ids = self.shards[shard][first * self.length : (first + 1) * self.length + 1]
        return ids, np.ones(len(ids), bool)


def split_documents(tokens: np.ndarray, bos: int) -> list[np.ndarray]:
    """Views of the documents of a token shard, each starting with BOS."""
    return np.split(tokens, np.flatnonzero(tokens == bos)[1:])


def first_tokens(shards: Iterable[Path], limit: int) -> np.ndarray:
    parts: list[np.ndarray] = []
    for path in shards:
        parts.append(np.load(path, mmap_mode="r")[: limit - sum(map(len, parts))])
        if sum(map(len, parts)) == limit:
            break
    return np.concatenate(parts)


class ConversationSource(RowSource):
    """Rows of whole conversations, packed by best fit in a seeded order; `masks`: the targets."""

    def __init__(self, ids: Sequence[Ids], masks: Sequence[Ids], **settings: Any):
        super().__init__(**settings)
        self.ids, self.masks = ids, masks
        order = np.random.default_rng(seed_of(self.seed, "pack")).permutation(len(ids))
        self.rows = pack([*map(len, ids)], self.length + 1, order.tolist())

    @classmethod
    def open(cls, folder: Path, **settings: Any) -> ConversationSource:
        paths = (folder / f"{name}.npy" for name in ("ids", "masks", "ends"))
        # np.asarray: a view of an array takes less memory than one of a memmap.
        ids, masks, ends = (np.asarray(np.load(path, mmap_mode="r")) for path in paths)
        return cls(np.split(ids, ends[:-1]), np.split(masks, ends[:-1]), **settings)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        items = self.rows[number]
        ids, masks = ([whole[item] for item in items] for whole in (self.ids, self.masks))
        return np.concatenate(ids), np.concatenate(masks)


def render(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, max_tokens: int, threads: int
) -> Iterator[Rendered]:
    """`Conversation.render` each, tokenizing many texts at once on several threads."""
    conversations = iter(conversations)
    while group := list(itertools.islice(conversations, CONVERSATIONS_AT_ONCE)):
        parts = (part for c in group for m in c.folded().messages for part in m.parts)
        texts = list({part.text: None for part in parts})
        ids, offsets = tokenizer.encode_flat(texts, threads=threads)
        flat, bounds = ids.tolist(), itertools.pairwise(offsets.tolist())
        encoded = {text: flat[i:j] for text, (i, j) in zip(texts, bounds, strict=True)}
        for conversation in group:
            yield conversation.render(tokenizer, max_tokens, encoded.__getitem__)


def save_conversations(rendered: Iterable[Rendered], folder: Path, vocab_size: int) -> int:
    """Write conversations that have targets as flat arrays; returns how many ids were cut."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    ids, masks, cut = [], [], 0
    for conversation in rendered:
        cut += conversation.cut
        if any(conversation.loss_mask[1:]):
            ids.append(np.array(conversation.ids, dtype))
            masks.append(np.array(conversation.loss_mask, bool))
    if not ids:
        raise ValueError("there are no conversations to train on: every source has 0 rows")
    folder.mkdir(parents=True)
    np.save(folder / "ids.npy", np.concatenate(ids))
    np.save(folder / "masks.npy", np.concatenate(masks))
    np.save(folder / "ends.npy", np.cumsum([len(item) for item in ids]))
    return cut
