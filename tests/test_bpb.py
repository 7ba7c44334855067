"""Bits per byte against a token-by-token walk; the trigram against plain counting."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanolib.evals import bpb
from nanolib.evals.bpb import Trigram, bits_per_byte

BOS = 299


def _documents():
    rng = np.random.default_rng(0)
    sizes = (1, 5, 31, 32, 33, 70, 0)
    return [np.array([BOS, *rng.integers(0, 299, size)]) for size in sizes]


def measured(lengths: np.ndarray) -> Any:
    """A tokenizer whose tokens are so many bytes long."""
    return SimpleNamespace(byte_lengths=lengths, bos=BOS)


def test_equals_a_walk_over_every_token(random_model, cpu, monkeypatch):
    model, lengths = random_model(), np.arange(300) % 5 + 1
    lengths[BOS] = 0
    bits = size = 0.0
    for document in _documents():
        for start in range(0, len(document) - 1, 32):
            window = torch.tensor(document[start : start + 33])
            scores = model(window[None, :-1]).log_softmax(-1)[0]
            for place, target in enumerate(window[1:].tolist()):
                bits -= scores[place, target].item() / math.log(2)
                size += lengths[target]
    monkeypatch.setattr(bpb, "TOKENS_AT_ONCE", 64)
    found = bits_per_byte(model, _documents(), measured(lengths), cpu)
    assert math.isclose(found, bits / size, rel_tol=1e-5)


def test_no_text_is_an_error(random_model, cpu):
    with pytest.raises(ValueError, match="hold no text"):
        bits_per_byte(random_model(), [np.array([BOS])], measured(np.ones(300)), cpu)


def test_trigram_is_a_distribution_and_equals_counting():
    tokens = np.random.default_rng(0).integers(0, 6, 2000)
    trigram = Trigram(tokens, vocab_size=6)
    seen = tokens[: -len(tokens) // 20]
    for a, b in ((1, 2), (3, 3)):
        contexts = [(a, b, c) for c in range(6)]
        probabilities, bucket = trigram._probabilities(np.array([x for c in contexts for x in c]))
        probabilities, bucket = probabilities[::3], bucket[::3]
        mixed = (trigram.weights[bucket] * probabilities).sum(1)
        assert math.isclose(mixed.sum(), 1.0, rel_tol=0.01)
        times = [
            sum(1 for i in range(len(seen) - 2) if tuple(seen[i : i + 3]) == c) for c in contexts
        ]
        pairs = sum(1 for i in range(len(seen) - 1) if tuple(seen[i : i + 2]) == (a, b))
        assert np.allclose(probabilities[:, 0], np.array(times) / pairs)


def test_trigram_learns_a_rule_that_a_bigram_cannot():
    """x, y, then x + y mod 5: predictable from two tokens, not from one."""
    rng, tokens = np.random.default_rng(0), []
    for _ in range(3000):
        x, y = rng.integers(0, 5, 2)
        tokens += [x, 5 + y, 10 + (x + y) % 5]
    lengths = np.array([0] * 10 + [1] * 5)  # only the third of each is scored
    found = Trigram(np.array(tokens), 15).bits_per_byte(np.array(tokens[:600]), lengths)
    assert found < 0.2
