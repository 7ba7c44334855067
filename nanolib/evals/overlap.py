"""Contamination: test problems that share 13 words in a row with training data (arXiv:2005.14165).

Words are runs of A-Z, in any case, and 0-9. Every 13 of them have a 64-bit hash; `naive` in
tests/test_overlap.py compares the words themselves. Texts stay in Arrow arrays, which threads read
without Python's lock: 60 MB a second and core (AMD EPYC, 2026-11-29), so that 215 shards with 54 GB of
text take 15 minutes of one core.
"""

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanolib.hub import Progress

WORDS = 13
SHOWN = 60  # words of a passage that are kept
AT_ONCE = 512  # texts of an array, which one thread searches
FACTOR = np.uint64(0x9E3779B97F4A7C15)
TOP = np.uint64(64 - 24)  # hashes are first looked up by their highest 24 bits
WORD = (ord(c.lower()) if c.isascii() and c.isalnum() else 0 for c in map(chr, range(256)))
LOWER = np.array([*WORD], np.uint8)  # each byte of a word in lower case; 0 where there is no word
BINARY = pa.large_binary()
BYTES = np.array([256**n - 1 for n in range(9)], np.uint64)  # masks of the first n bytes


def arrays(texts: Iterable[str]) -> Generator[pa.Array, None, None]:
    raw = (text.encode(errors="replace") for text in texts)
    while group := [*islice(raw, AT_ONCE)]:
        yield pa.array(group, BINARY)


def windows(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The hash of every 13 words in a row of each text, in order, and the number of that text."""
    parts = [texts.cast(BINARY), pa.scalar(b" ", BINARY), pa.scalar(b"", BINARY)]
    _, ends, data = pc.call_function("binary_join_element_wise", parts).buffers()
    bounds = np.frombuffer(ends, np.int64, len(texts) + 1)
    bytes_N = np.zeros(bounds[-1] + 8, np.uint8)
    LOWER.take(np.frombuffer(data, np.uint8, bounds[-1]), out=bytes_N[:-8], mode="clip")
    edges = np.flatnonzero(np.diff(bytes_N > 0, prepend=False))
    starts, ends = edges[::2], edges[1::2]
    eight_N = np.ndarray(len(bytes_N) - 7, "<u8", bytes_N, strides=(1,))  # from each byte on
    word_W, place = np.zeros(len(starts), np.uint64), starts
    left = np.arange(len(starts))  # words with bytes that are not hashed yet
    while len(left):
        size = ends[left] - place
        mixed = (word_W[left] ^ (eight_N[place] & BYTES[np.minimum(size, 8)])) * FACTOR
        word_W[left] = mixed ^ (mixed >> np.uint64(32))
        left, place = left[size > 8], place[size > 8] + 8
    count = max(0, len(starts) - WORDS + 1)
    hashes = np.zeros(count, np.uint64)
    for i in range(WORDS):
        hashes = hashes * FACTOR + word_W[i : i + count]
    owner = np.repeat(np.arange(len(texts)), np.diff(np.searchsorted(starts, bounds)))
    within = owner[:count] == owner[WORDS - 1 :][:count]
    return hashes[within], owner[:count][within]


def overlap(
    tests: Mapping[str, Sequence[str]],
    sources: Mapping[str, Iterator[pa.Array]],
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """How many problems of each test share words with each source, and of each test the longest
    passage: 13 of its words in a row stand in one text of the source, all of it perhaps in none.

    "texts" counts the texts of each source, and "quoting" lists those that share words, from 0.
    """
    problems = [(test, text) for test, texts in tests.items() for text in texts]
    raw = [text.encode(errors="replace") for _, text in problems]
    hashes, owner = windows(pa.array(raw, BINARY))
    known, places = np.unique(hashes, return_inverse=True)
    bounds = np.searchsorted(owner, range(len(problems) + 1))
    found, sizes, quoting, longest = {}, {}, {}, {}
    for number, (source, texts) in enumerate(sources.items()):
        tick = partial(progress, number, len(sources), f"looking for test problems in {source}")
        seen, quoting[source], sizes[source] = _search(known, texts, threads, tick)
        hit = seen[places]
        found[source] = dict.fromkeys(tests, 0)
        for problem in np.unique(owner[hit]).tolist():
            test, text = problems[problem]
            found[source][test] += 1
            for run in re.finditer(rb"\x01+", hit[bounds[problem] : bounds[problem + 1]].tobytes()):
                first, length = run.start(), len(run[0]) + WORDS - 1
                if length > longest.get(test, {"words": 0})["words"]:
                    words = re.findall("[a-zA-Z0-9]+", text)[first : first + length]
                    shown = " ".join(words[:SHOWN]).lower() + " …" * (length > SHOWN)
                    longest[test] = {"test": test, "source": source, "words": length, "text": shown}
    passages = sorted(longest.values(), key=lambda passage: -passage["words"])
    about = {"problems": {test: len(texts) for test, texts in tests.items()}, "found": found}
    return about | {"passages": passages, "texts": sizes, "quoting": quoting}


def _search(
    known: np.ndarray, texts: Iterator[pa.Array], threads: int, tick: Callable[[], object]
) -> tuple[np.ndarray, list[int], int]:
    """Which `known` hashes stand in the texts [bool], the texts with any, and how many there are."""
    seen, likely = np.zeros(len(known), bool), np.zeros(1 << 24, bool)
    likely[known >> TOP] = True
    quoting, size = [], 0

    def look(group: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        there, text = windows(group)
        maybe = np.flatnonzero(likely[there >> TOP])
        at = np.searchsorted(known, there[maybe])
        hit = known.take(at, mode="clip") == there[maybe]
        return at[hit], np.unique(text[maybe][hit])

    with ThreadPoolExecutor(threads) as pool:
        while some := [*islice(texts, 4 * threads)]:
            tick()
            for group, (at, which) in zip(some, pool.map(look, some), strict=True):
                seen[at] = True
                quoting += (size + which).tolist()
                size += len(group)
    return seen, quoting, size
