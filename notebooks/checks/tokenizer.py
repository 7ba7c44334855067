"""The checks of chapter 01's exercises. Spoilers ahead."""

from itertools import pairwise

import torch

from checks import Build, Exercise, Value

# ---------------------------------------------------------------------------- 1.1 utf-8


def utf8(point):
    return list(chr(point).encode())


def some_points(generator):
    ranges = ((0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    draws = [torch.randint(*bounds, (6,), generator=generator) for bounds in ranges]
    edges = [end for bounds in ranges for end in (bounds[0], bounds[1] - 1)]
    return [(int(point),) for point in (*edges, *torch.cat(draws))]


def unmarked(point):
    """UTF-8 whose later bytes do not begin with the bits 10."""
    first, *rest = utf8(point)
    return [first, *(byte & 63 for byte in rest)]


def shortest(point):
    return list(point.to_bytes(max(1, (point.bit_length() + 7) // 8)))


def tail_reversed(point):
    first, *rest = utf8(point)
    return [first, *reversed(rest)]


# ---------------------------------------------------------------------------- 1.2 merge


def merge(ids, pair, new):
    """Replace each occurrence of a pair, from left to right, by `new`."""
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == tuple(pair):
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def rows_of_ids(generator):
    cases = [
        ([5, 6, 7, 5, 6], (5, 6), 256),
        ([1, 1, 1], (1, 1), 9),
        ([], (1, 2), 9),
        ([3], (3, 3), 9),
    ]
    for size in (4, 9, 20, 40):
        ids = torch.randint(0, 3, (size,), generator=generator).tolist()
        cases += [(ids, (0, 1), 256), (ids, (2, 2), 257)]
    return [*cases, (list("hugpug"), ("u", "g"), "ug")]


def overlapping(ids, pair, new):
    """As if each place where the pair stands were independent of the one before."""
    merged, after = [], False
    for left, right in pairwise([*ids, object()]):
        found = (left, right) == tuple(pair)
        merged += [new] if found else [] if after else [left]
        after = found
    return merged


def from_the_right(ids, pair, new):
    return merge(ids[::-1], tuple(pair)[::-1], new)[::-1]


def first_only(ids, pair, new):
    for place in range(len(ids) - 1):
        if tuple(ids[place : place + 2]) == tuple(pair):
            return [*ids[:place], new, *ids[place + 2 :]]
    return ids


def right_half_stays(ids, pair, new):
    merged = [new if couple == tuple(pair) else couple[0] for couple in pairwise(ids)]
    return [*merged, *ids[-1:]]


def merged_ids(got, expected, ids, pair, new):
    if len(got) > len(expected):
        return (
            f"merge({ids}, {pair}, {new!r}): it is too long, some pair is left or half of it stays"
        )
    if len(got) < len(expected):
        return f"merge({ids}, {pair}, {new!r}): it is too short, something is lost"
    return None


# ---------------------------------------------------------------------------- 1.4 encoding


def encode_word(ids, ranks):
    ids = list(ids)
    while known := [pair for pair in pairwise(ids) if pair in ranks]:
        best = min(known, key=ranks.__getitem__)
        ids = merge(ids, best, ranks[best])
    return ids


def some_words(generator):
    """Words over four letters, and the merges of a text over the same."""
    words = [torch.randint(97, 101, (1 + n % 9,), generator=generator).tolist() for n in range(60)]
    ranks, pieces = {}, [list(word) for word in words]
    for new in range(256, 272):
        pairs = [pair for word in pieces for pair in pairwise(word)]
        best = max(sorted(set(pairs)), key=pairs.count)
        ranks[best] = new
        pieces = [merge(word, best, new) for word in pieces]
    longer = torch.randint(97, 101, (12, 14), generator=generator).tolist()
    return [(word, ranks) for word in (*words[:12], *longer)]


def leftmost(ids, ranks):
    """Merge the first pair that is known, whatever its rank."""
    ids = list(ids)
    while known := [pair for pair in pairwise(ids) if pair in ranks]:
        ids = merge(ids, known[0], ranks[known[0]])
    return ids


def newest(ids, ranks):
    ids = list(ids)
    while known := [pair for pair in pairwise(ids) if pair in ranks]:
        best = max(known, key=ranks.__getitem__)
        ids = merge(ids, best, ranks[best])
    return ids


def one_round(ids, ranks):
    known = [pair for pair in pairwise(ids) if pair in ranks]
    best = min(known, key=ranks.__getitem__, default=None)
    return list(ids) if best is None else merge(ids, best, ranks[best])


def longest_first(ids, ranks):
    """From left to right, the longest token that fits."""
    tokens = {bytes([byte]): byte for byte in range(256)}
    names = {byte: bytes([byte]) for byte in range(256)}
    for (left, right), new in ranks.items():
        names[new] = names[left] + names[right]
        tokens[names[new]] = new
    text, found = bytes(ids), []
    while text:
        end = next(n for n in range(len(text), 0, -1) if text[:n] in tokens)
        found.append(tokens[text[:end]])
        text = text[end:]
    return found


# ---------------------------------------------------------------------------- 1.5 decoding


def to_bytes(ids, merges):
    pieces = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        pieces.append(pieces[left] + pieces[right])
    return b"".join(pieces[id] for id in ids)


def swapped(ids, merges):
    return to_bytes(ids, [(right, left) for left, right in merges])


def as_text(ids, merges):
    return to_bytes(ids, merges).decode(errors="replace")


def ids_and_merges(generator):
    cases = [([104, 105], []), ([0xE2, 0x82], []), ([], [(1, 2)])]
    for size in (1, 5, 30):
        halves = [torch.randint(0, 256 + n, (2,), generator=generator) for n in range(size)]
        merges = [(int(left), int(right)) for left, right in halves]
        ids = torch.randint(250, 256 + size, (8,), generator=generator).tolist()
        cases.append((ids, merges))
    return cases


# ---------------------------------------------------------------------------- 1.6 measuring


def off_by(token_bytes):
    return len(token_bytes.decode(errors="replace").encode()) - len(token_bytes)


def some_tokens(generator):
    tokens = [b"sheep", b"\xe2", b"\xe2\x82", "é".encode(), "€".encode(), b"\xf0\x9f", b"a\xe2"]
    random = torch.randint(0, 256, (6, 4), generator=generator).tolist()
    return [(token,) for token in (*tokens, *map(bytes, random))]


EXERCISES: dict[str, Exercise] = {
    "1.1": Build(
        utf8,
        some_points,
        wrong={
            "The second byte and those after it begin with the bits 10: add 0x80.": unmarked,
            "These are the bytes of the number itself; UTF-8 also says how many there are.": shortest,
            "The six-bit groups after the first byte stand in the wrong order.": tail_reversed,
        },
    ),
    "1.2": Build(
        merge,
        rows_of_ids,
        wrong={
            "After a merge you look at its right half again: in [1, 1, 1] the pair fits once.": (
                overlapping
            ),
            "You go from right to left: in [1, 1, 1] the first two are merged, not the last.": (
                from_the_right
            ),
            "You stop after the first occurrence.": first_only,
            "The right half of the pair is still there: skip it.": right_half_stays,
        },
        explain=merged_ids,
    ),
    "1.3": Value(
        "b519bfa63f32",
        wrong={
            (
                "pug",
                "bunn",
                "ny",
            ): "You read all three off one table: each merge changes the counts.",
            ("pug", "bunn", "bunny"): "The second is a tie: of equals, the smallest ids go first.",
            ("pug", "ny", "hugs"): "Count again after the second merge: which pair has come up?",
            (
                "pug",
                "ny",
                "bunn",
            ): "After the second merge there is no n alone behind bun any more.",
        },
    ),
    "1.4": Build(
        encode_word,
        some_words,
        wrong={
            "You merge the first pair that is known; the one learned first goes first.": leftmost,
            "You merge the newest pair first; the merges are replayed from the oldest.": newest,
            "You merge once and stop: go on until no pair is known.": one_round,
            "You take the longest token that fits. BPE replays its merges in order.": longest_first,
        },
    ),
    "1.5": Build(
        to_bytes,
        ids_and_merges,
        wrong={
            "The two halves are swapped.": swapped,
            "You return text: a token may be a part of a character, so return bytes.": as_text,
        },
    ),
    "1.6": Build(
        off_by,
        some_tokens,
        wrong={
            "The sign is the other way round: the wrong length minus the right one.": (
                lambda token: -off_by(token)
            ),
            "You count characters; `.encode()` turns them into bytes again.": (
                lambda token: len(token.decode(errors="replace")) - len(token)
            ),
        },
    ),
}
