"""Byte-level BPE tokenizer: trained by the Rust crate, encoding by tiktoken.

Ids 0 to 255 are bytes, followed by the merges in order, then `SPECIAL_TOKENS`. Special tokens in
text are encoded as ordinary text; only `Tokenizer.special` returns their ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

import rust_tokenizer
from nanolib.config import FEWEST_TOKENS, SPECIAL_TOKENS, VOCAB_BOUND
from nanolib.rundir import write_atomic

# GPT-4's pattern, but with digits in groups of at most two, to save ids in a small vocabulary.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
VERSION = 1  # of the JSON file
Progress = Callable[[str, int, int | None], object]  # phase, done, total


class Tokenizer:
    """An immutable trained tokenizer: `merges[n] = (left id, right id)` defines id 256 + n."""

    def __init__(self, merges: Iterable[tuple[int, int]], pattern: str = PATTERN):
        self.pattern = pattern
        self.merges = tuple((int(left), int(right)) for left, right in merges)
        ordinary = _token_bytes(self.merges)
        self._specials = {name: len(ordinary) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._bytes = ordinary + [name.encode() for name in SPECIAL_TOKENS]
        ranks, specials = {token: id for id, token in enumerate(ordinary)}, self._specials
        self._encoding = tiktoken.Encoding(
            "nanolib", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
        )
        self.vocab_size = len(self._bytes)
        self.bos = self._specials["<|bos|>"]

    @classmethod
    def train(
        cls, documents: Iterable[str], vocab_size: int, progress: Progress | None = None
    ) -> Tokenizer:
        """Train on `documents`; `vocab_size` counts bytes, merges and special tokens.

        `progress` is called about every 50 ms: with the bytes read in phase "count" (total None),
        then with the merges done in phase "merge".
        """
        if vocab_size < FEWEST_TOKENS:
            raise ValueError(f"vocab_size must be {VOCAB_BOUND}, got {vocab_size}")
        merges, _ = rust_tokenizer.train(documents, vocab_size - FEWEST_TOKENS, PATTERN, progress)
        if (most := FEWEST_TOKENS + len(merges)) < vocab_size:
            has = f"vocab_size is {vocab_size}, but the text has pairs for {most} at most"
            raise ValueError(f"{has}: give more text or lower vocab_size")
        return cls(merges)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            if saved["version"] != VERSION or saved["specials"] != list(SPECIAL_TOKENS):
                raise ValueError("it has another version or other special tokens")
            return cls(saved["merges"], saved["pattern"])
        except FileNotFoundError:
            raise ValueError(f"no tokenizer at {path}: run the tokenizer stage first") from None
        except (ValueError, TypeError, KeyError) as error:
            remedy = "delete it and run the tokenizer stage again"
            raise ValueError(f"{path} is no tokenizer ({error}): {remedy}") from error

    def _to_json(self) -> str:
        saved = {"version": VERSION, "pattern": self.pattern, "specials": SPECIAL_TOKENS}
        saved["merges"] = self.merges
        return json.dumps(saved, ensure_ascii=False, separators=(",", ":")) + "\n"

    def save(self, path: Path | str) -> None:
        write_atomic(Path(path), self._to_json())

    def fingerprint(self) -> str:
        """A 16-digit hexadecimal hash of the tokenizer."""
        return hashlib.sha256(self._to_json().encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never special tokens."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts, num_threads=threads)

    def encode_flat(
        self, texts: Iterable[str], threads: int = 1, bos: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode all texts into one array: ids [N] (uint16 or uint32), offsets [texts + 1].

        Text i is ``ids[offsets[i]:offsets[i + 1]]``, with BOS first if `bos`.
        """
        wide, prefix = self.vocab_size > 2**16, self.bos if bos else None
        ids, ends = self._encoder.encode_batch(texts, threads=threads, prefix=prefix, wide=wide)
        return np.frombuffer(ids, np.uint32 if wide else np.uint16), np.frombuffer(ends, np.int64)

    @cached_property
    def _encoder(self) -> rust_tokenizer.Encoder:
        return rust_tokenizer.Encoder(self.merges, self.pattern)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, with U+FFFD for invalid UTF-8 and special tokens as their names."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token, or a special token's name."""
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token ids go from 0 to {self.vocab_size - 1}, got {id}")
        return self._bytes[id]

    def special(self, name: str) -> int:
        """The id of a special token such as ``<|bos|>``."""
        if name not in self._specials:
            raise ValueError(f"no special token {name!r}; there are {', '.join(SPECIAL_TOKENS)}")
        return self._specials[name]

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text per token, int32 [V]; 0 for special tokens (used for bits per byte)."""
        lengths = np.array([*map(len, self._bytes)], dtype=np.int32)
        lengths[-len(SPECIAL_TOKENS) :] = 0
        lengths.flags.writeable = False
        return lengths


def _token_bytes(merges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of every ordinary token; ValueError if `merges` is not a valid BPE."""
    tokens = [bytes([byte]) for byte in range(256)]
    known = set(tokens)
    for number, (left, right) in enumerate(merges):
        if not (0 <= left < len(tokens) and 0 <= right < len(tokens)):
            raise ValueError(f"merge {number} joins ({left}, {right}), which do not exist yet")
        token = tokens[left] + tokens[right]
        if token in known:
            raise ValueError(f"merge {number} repeats the token {token!r}")
        known.add(token)
        tokens.append(token)
    return tokens
