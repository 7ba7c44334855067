"""Contamination: test problems that share 13 words in a row with training data (arXiv:2005.14165).

Words are runs of a-z and 0-9 in lower case. Every 13 of them have a 64-bit hash; `naive` in
tests/test_overlap.py compares the words themselves.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from nanolib.hub import Progress

WORDS = 13
SHOWN = 60  # words of a passage that are kept
AT_ONCE = 512  # texts that a thread looks at together
FACTOR = 0x9E3779B97F4A7C15  # of the powers in a hash; odd, so that it has an inverse
IS_WORD = np.isin(np.arange(256), list(b"abcdefghijklmnopqrstuvwxyz0123456789"))
Texts = Mapping[str, Iterable[str]]


def windows(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hash of every 13 words in a row of each text, in order, and the number of that text."""
    raw = [f"{text.lower()} ".encode(errors="replace") for text in texts]
    bytes_N = np.frombuffer(b"".join(raw), np.uint8)
    word_N = IS_WORD[bytes_N]
    steps_N = np.diff(word_N.view(np.int8), prepend=np.int8(0))
    starts, ends = np.flatnonzero(steps_N == 1), np.flatnonzero(steps_N == -1)
    first, end = starts[: 1 - WORDS], ends[WORDS - 1 :]
    power_N = np.cumsum(word_N) + np.cumsum(steps_N == 1)  # one is left out between words
    powers, inverses = (
        np.multiply.accumulate(np.full(2 * len(bytes_N) + 1, it, np.uint64))
        for it in (FACTOR, pow(FACTOR, -1, 2**64))
    )
    sums_N = np.cumsum(word_N * bytes_N * powers[power_N])  # a space is before each end
    hashes = (sums_N[end] - sums_N[first - 1] * (first > 0)) * inverses[power_N[first]]
    owner = np.searchsorted(np.cumsum([*map(len, raw)]), starts, side="right")
    within = owner[: len(first)] == owner[WORDS - 1 :]
    return hashes[within], owner[: len(first)][within]


def overlap(
    tests: Mapping[str, Sequence[str]], sources: Texts, threads: int, progress: Progress
) -> dict[str, Any]:
    """How many problems of each test share words with each source, and of each test the longest
    passage: 13 of its words in a row stand in one text of the source, all of it perhaps in none.
    """
    problems = [(test, text) for test, texts in tests.items() for text in texts]
    hashes, owner = windows(text for _, text in problems)
    known, places = np.unique(hashes, return_inverse=True)
    found: dict[str, dict[str, int]] = {}
    longest: dict[str, dict[str, Any]] = {}

    def look(texts: Sequence[str]) -> np.ndarray:
        there = windows(texts)[0]
        at = np.searchsorted(known, there)
        return at[known.take(at, mode="clip") == there] if len(known) else at[:0]

    for number, (source, texts) in enumerate(sources.items()):
        seen, groups = np.zeros(len(known), bool), iter(texts)
        with ThreadPoolExecutor(threads) as pool:
            while some := [g for _ in range(threads) if (g := list(islice(groups, AT_ONCE)))]:
                progress(number, len(sources), f"looking for test problems in {source}")
                for at in pool.map(look, some):
                    seen[at] = True
        hits = np.flatnonzero(seen[places])
        counts = Counter(problems[problem][0] for problem in np.unique(owner[hits]))
        found[source] = {test: counts[test] for test in tests}
        breaks = np.flatnonzero((np.diff(hits) > 1) | (np.diff(owner[hits]) > 0)) + 1
        for run in np.split(hits, breaks) if len(hits) else ():
            (test, text), length = problems[owner[run[0]]], len(run) + WORDS - 1
            if length > longest.get(test, {"words": 0})["words"]:
                words = re.findall("[a-z0-9]+", text.lower())
                words = words[run[0] - np.searchsorted(owner, owner[run[0]]) :][:length]
                passage = " ".join(words[:SHOWN]) + " …" * (length > SHOWN)
                longest[test] = {"test": test, "source": source, "words": length, "text": passage}
    passages = sorted(longest.values(), key=lambda passage: -passage["words"])
    sizes = {test: len(texts) for test, texts in tests.items()}
    return {"problems": sizes, "found": found, "passages": passages}
