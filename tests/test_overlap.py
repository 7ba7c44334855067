"""Contamination: the fast count beside one that compares words."""

import random
import re
from itertools import product

import numpy as np
import pytest

from nanolib.evals import overlap

VOCABULARY = [
    "a",
    "b",
    "ab",
    "ba",
    "1",
    "x" * 300,
    "naïve",
    "ÜnDer",
    "don't",
    "\u0130x",
    "\u212a",
    "A,",
    "\ud800",
]


def naive(text: str) -> list[tuple[str, ...]]:
    words = [word.lower() for word in re.findall("[a-zA-Z0-9]+", text)]
    return [tuple(words[i : i + 13]) for i in range(len(words) - 12)]


def windows(texts: list[str]):
    (array,) = overlap.arrays(texts)
    return overlap.windows(array)


def prose(rng: random.Random, words: int) -> list[str]:
    return [rng.choice(VOCABULARY) + rng.choice(["", ".", "\n"]) for _ in range(words)]


def test_windows_are_those_of_words():
    """Two are equal exactly where their words are, and each knows its text."""
    rng = random.Random(1)
    few = [" ".join(rng.choices("ab", k=rng.randint(0, 40))) for _ in range(100)]
    texts = [*few, "", " ".join(prose(rng, 12)), *(" ".join(prose(rng, 30)) for _ in range(40))]
    words = [(i, window) for i, text in enumerate(texts) for window in naive(text)]
    hashes, owner = windows(texts)
    assert owner.tolist() == [i for i, _ in words]
    _, same = np.unique(hashes, return_inverse=True)
    pairs = set(zip(same.tolist(), (window for _, window in words), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) > 1000


@pytest.mark.parametrize("threads", [1, 2])
def test_counts_are_those_of_sets_of_words(threads, monkeypatch):
    """With passages of 12 to 20 words planted at a problem's beginning, middle and end."""
    monkeypatch.setattr(overlap, "AT_ONCE", 3)
    rng = random.Random(2)
    tests = {name: [" ".join(prose(rng, 40)) for _ in range(30)] for name in ("one", "two")}
    tests |= {"short": ["a b", ""]}
    sources = {name: [" ".join(prose(rng, 60)) for _ in range(8)] for name in ("web", "chat", "-")}
    ways = product(("one", "two"), ("web", "chat"), (0, 10, 99), (12, 13, 20))
    for test, source, place, length in ways:
        words = rng.choice(tests[test]).split()
        first = min(place, len(words) - length)
        near = [prose(rng, 5), words[first : first + length], prose(rng, 5)]
        sources[source].append(" ".join(word for part in near for word in part))
    found = find(tests, {k: iter(v) for k, v in sources.items()}, threads)
    assert found["problems"] == {"one": 30, "two": 30, "short": 2}
    longest, windows = {test: [] for test in tests}, {}
    for source, test in product(sources, tests):
        there = {window for text in sources[source] for window in naive(text)}
        hit = [problem for problem in tests[test] if there & set(naive(problem))]
        assert found["found"][source][test] == len(hit)
        longest[test] += [(len(run) + 12, source) for it in hit for run in runs(it, there)]
        windows[source] = there
    asked = {window for texts in tests.values() for text in texts for window in naive(text)}
    for source, texts in sources.items():
        assert found["texts"][source] == len(texts)
        quoting = [i for i, text in enumerate(texts) if asked & set(naive(text))]
        assert found["quoting"][source] == quoting and (len(quoting) > 9) == (source != "-")
    assert 0 < found["found"]["web"]["one"] < 30 and not any(found["found"]["-"].values())
    assert {it["test"] for it in found["passages"]} == {"one", "two"}
    for it in found["passages"]:
        assert (it["words"], it["source"]) in longest[it["test"]]
        assert it["words"] == len(it["text"].split()) == max(longest[it["test"]])[0]
        assert set(naive(it["text"])) <= windows[it["source"]]
    first, second = found["passages"]
    assert first["words"] >= second["words"] > 13


def find(tests, sources, threads=1) -> dict:
    sources = {source: overlap.arrays(texts) for source, texts in sources.items()}
    return overlap.overlap(tests, sources, threads, lambda *_: None)


def runs(text: str, there: set) -> list[str]:
    """A character for each of its windows that stand there in a row."""
    return re.findall("x+", "".join("-x"[window in there] for window in naive(text)))


def test_of_a_long_passage_the_beginning_is_kept():
    text = " ".join(map(str, range(100)))
    (passage,) = find({"t": [f"x y {text} z"]}, {"web": [f"Well: {text}!"]})["passages"]
    assert passage["words"] == 100 and passage["text"].split() == [*map(str, range(60)), "…"]


def test_nothing_to_compare_is_nothing_found():
    assert find({}, {"web": ["a " * 20]})["found"] == {"web": {}}
    assert find({"t": ["a " * 20]}, {"web": []})["found"] == {"web": {"t": 0}}
    assert find({"t": ["a " * 20]}, {})["passages"] == []


def test_words_are_told_apart_by_where_they_end():
    hashes, _ = windows([f"{two} {'c ' * 11}" for two in ("a ab", "aa b")])
    assert len(set(hashes.tolist())) == 2


def test_long_words_are_told_apart_by_every_byte():
    words = ["a" * n for n in range(1, 30)]
    words += [f"{word[:i]}b{word[i + 1 :]}" for word in words for i in range(len(word))]
    hashes, _ = windows([f"{word} {'c ' * 12}" for word in words])
    assert len(set(hashes.tolist())) == len(hashes) == len(words) == 29 + 435


def test_a_passage_ends_where_a_word_differs():
    text = " ".join(map(str, range(50)))
    (passage,) = find({"t": [text]}, {"web": [text.replace(" 20 ", " other ")]})["passages"]
    assert passage["text"].split() == [*map(str, range(21, 50))]
