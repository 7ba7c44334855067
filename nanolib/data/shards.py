"""Text to token shards: one flat array of ids a parquet file, every document BOS + tokens.

A shard is a ``.npy`` file (uint16 while the vocabulary fits, else uint32), memory-mapped by
whoever reads it, and written under a temporary name, so that one that is there is whole.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanolib import hub
from nanolib.rundir import saving
from nanolib.tokenizer import Tokenizer

DOCUMENTS_AT_ONCE = 1024


def shard_path(folder: Path, text: Path) -> Path:
    """Where the token shard of a parquet file of text is kept."""
    return folder / f"{text.stem}.npy"


def tokenize(text: Path, target: Path, tokenizer: Tokenizer, threads: int) -> Iterator[int]:
    """Write the token shard of one parquet file; yields the documents done so far.

    Nothing is left at `target` unless the iterator is driven to its end.
    """
    parts: list[np.ndarray] = []
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    documents = 0
    source = hub.documents(text)
    while texts := list(itertools.islice(source, DOCUMENTS_AT_ONCE)):
        ids, _ = tokenizer.encode_flat(texts, threads=threads, bos=True)
        parts.append(ids.astype(dtype, copy=False))
        documents += len(texts)
        yield documents
    partial = target.with_suffix(".partial")
    with saving(target):
        with partial.open("wb") as file:
            np.save(file, np.concatenate(parts) if parts else np.zeros(0, dtype))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(target)


def split_documents(tokens: np.ndarray, bos: int) -> list[np.ndarray]:
    """The documents of a shard, each with its BOS, as views."""
    starts = np.flatnonzero(tokens == bos)
    return np.split(tokens, starts[1:]) if len(starts) else []
