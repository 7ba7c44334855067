"""Bits per byte: compression of held-out text, comparable between tokenizers.

Documents are scored one by one, from BOS, in windows of T tokens that overlap by one id.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from nanolib.data.packing import TOKENS_AT_ONCE, batch_of_rows, groups
from nanolib.model import GPT
from nanolib.runtime import Runtime
from nanolib.tokenizer import Tokenizer


@torch.no_grad()
def bits_per_byte(
    model: GPT, documents: Sequence[np.ndarray], tokenizer: Tokenizer, runtime: Runtime
) -> float:
    """Bits per byte of documents (ids that start with BOS), split over the ranks."""
    length, nats = model.config.sequence_len, 0.0
    mine = documents[runtime.rank :: runtime.world_size]
    windows = [ids[i : i + length + 1] for ids in mine for i in range(0, len(ids) - 1, length)]
    size = sum(int(tokenizer.byte_lengths[window[1:]].sum()) for window in windows)
    for group in groups([len(window) for window in windows], TOKENS_AT_ONCE):
        rows = [windows[i] for i in group]
        masks = [np.ones(len(row), bool) for row in rows]
        batch = batch_of_rows(rows, masks, max(map(len, rows)) - 1, tokenizer.bos)
        with runtime.autocast():
            nll_BT = model.nll(batch.to(runtime.device)).cpu()  # MPS has no float64
        nats += float(nll_BT.sum(dtype=torch.float64))
    nats, size = map(sum, zip(*runtime.gather((nats, size)), strict=True))
    if not size:
        raise ValueError(f"{len(documents)} documents hold no text to score")
    return nats / math.log(2) / size


class Trigram:
    """A count-based baseline: an interpolated trigram model of tokens (Jelinek & Mercer, 1980).

    The weights of trigram, bigram and unigram depend on the count of the context (one bucket per
    doubling). EM fits them on the last 5 % of the training tokens, which are not counted.
    """

    BUCKETS = 16

    def __init__(self, tokens: np.ndarray, vocab_size: int, iterations: int = 20):
        self.vocab_size = vocab_size
        tokens = np.asarray(tokens, dtype=np.int64)
        held = max(1, len(tokens) // 20)
        pairs = tokens[: -held - 1] * vocab_size + tokens[1:-held]
        triples = pairs[:-1] * vocab_size + tokens[2:-held]
        self.unigrams = np.bincount(tokens[:-held], minlength=vocab_size)
        self.pairs, self.triples = (np.unique(x, return_counts=True) for x in (pairs, triples))
        self.weights = np.full((self.BUCKETS, 3), 1 / 3)
        probabilities, bucket = self._probabilities(tokens[-held:])
        for _ in range(iterations):
            joint = self.weights[bucket] * probabilities
            shares = joint / joint.sum(axis=1, keepdims=True)
            counts = [np.bincount(bucket, share, self.BUCKETS) for share in shares.T]
            sums = np.stack(counts, axis=1) + 1e-3  # so that empty buckets get weights too
            self.weights = sums / sums.sum(axis=1, keepdims=True)

    def _probabilities(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each token from the third on: three probabilities [N, 3] and its bucket [N]."""
        size = self.vocab_size
        first, second, third = tokens[:-2], tokens[1:-1], tokens[2:]
        context = _lookup(self.pairs, first * size + second)
        triple = _lookup(self.triples, (first * size + second) * size + third)
        pair = _lookup(self.pairs, second * size + third)
        unigram = (self.unigrams[third] + 1) / (self.unigrams.sum() + size)
        bigram = pair / np.maximum(self.unigrams[second], 1)
        trigram = triple / np.maximum(context, 1)
        bucket = np.minimum(np.log2(context + 1).astype(int), self.BUCKETS - 1)
        return np.stack([trigram, bigram, unigram], axis=1), bucket

    def bits_per_byte(self, tokens: np.ndarray, byte_lengths: np.ndarray) -> float:
        """Bits per byte of a token stream; BOS is not scored."""
        probabilities, bucket = self._probabilities(np.asarray(tokens, dtype=np.int64))
        mixed = (self.weights[bucket] * probabilities).sum(axis=1)
        sizes = byte_lengths[tokens[2:]]
        return float(-np.log2(mixed[sizes > 0]).sum() / sizes.sum())


def _lookup(counted: tuple[np.ndarray, np.ndarray], keys: np.ndarray) -> np.ndarray:
    known, counts = counted
    index = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[index] == keys, counts[index], 0)
