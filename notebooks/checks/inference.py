"""The checks of chapter 05's exercises. Spoilers ahead."""

from typing import Any

import torch

from checks import Build, Custom, Exercise, Value

# ---------------------------------------------------------------------------- 5.1 positions


def calls(generator: torch.Generator) -> list[tuple[int, int]]:
    drawn = torch.randint(1, 50, (4, 2), generator=generator).tolist()
    return [(10, 1), (10, 3), *map(tuple, drawn)]


def positions_anew(prompt, count):
    return sum(prompt + already for already in range(count))


def with_a_cache(prompt, count):
    return prompt + count - 1


def reads_the_last_too(prompt, count):
    return positions_anew(prompt, count + 1) - prompt


def never_grows(prompt, count):
    return prompt * count


# ---------------------------------------------------------------------------- 5.2 the cache


class Cache:
    def __init__(self):
        self.kept, self.length = {}, 0

    def extend(self, layer, key_BTGK, value_BTGK):
        if layer in self.kept:
            key_BTGK = torch.cat([self.kept[layer][0], key_BTGK], dim=1)
            value_BTGK = torch.cat([self.kept[layer][1], value_BTGK], dim=1)
        self.kept[layer] = (key_BTGK, value_BTGK)
        return self.kept[layer]


class Forgets(Cache):
    def extend(self, layer, key_BTGK, value_BTGK):
        self.kept[layer] = (key_BTGK, value_BTGK)
        return self.kept[layer]


class NeverKeeps(Cache):
    def extend(self, layer, key_BTGK, value_BTGK):
        if layer not in self.kept:
            self.kept[layer] = (key_BTGK, value_BTGK)
            return self.kept[layer]
        old = self.kept[layer]
        return torch.cat([old[0], key_BTGK], dim=1), torch.cat([old[1], value_BTGK], dim=1)


class SharesLayers(Cache):
    def extend(self, layer, key_BTGK, value_BTGK):
        return super().extend("all", key_BTGK, value_BTGK)


class NewFirst(Cache):
    def extend(self, layer, key_BTGK, value_BTGK):
        if layer in self.kept:
            key_BTGK = torch.cat([key_BTGK, self.kept[layer][0]], dim=1)
            value_BTGK = torch.cat([value_BTGK, self.kept[layer][1]], dim=1)
        self.kept[layer] = (key_BTGK, value_BTGK)
        return self.kept[layer]


class KeysTwice(Cache):
    def extend(self, layer, key_BTGK, value_BTGK):
        keys, _ = super().extend(layer, key_BTGK, value_BTGK)
        return keys, keys


class OnlyTheNew(Cache):
    def extend(self, layer, key_BTGK, value_BTGK):
        super().extend(layer, key_BTGK, value_BTGK)
        return key_BTGK, value_BTGK


class AnotherAxis(Cache):
    def extend(self, layer, key_BTGK, value_BTGK):
        if layer in self.kept:
            key_BTGK = torch.cat([self.kept[layer][0], key_BTGK], dim=2)
            value_BTGK = torch.cat([self.kept[layer][1], value_BTGK], dim=2)
        self.kept[layer] = (key_BTGK, value_BTGK)
        return self.kept[layer]


FORGETS = "The cache forgets: after two tokens and two more it must hold four."
NEVER_KEEPS = (
    "The third call has lost the second one's tokens: keep the longer tensors, not only the first."
)
SHARES = "A new layer already has tokens: each layer needs a place of its own."
NEW_FIRST = "The new tokens stand before the old ones; they came after them."
KEYS_TWICE = "Your values are not the values that were handed over: did you return keys twice?"
ONLY_NEW = "You keep all tokens and return only the new ones: the query needs to see all."
AXIS = "Tokens lie along axis 1 (T); you joined them along another."
WRONG_CACHES = {
    FORGETS: Forgets,
    NEVER_KEEPS: NeverKeeps,
    SHARES: SharesLayers,
    NEW_FIRST: NewFirst,
    KEYS_TWICE: KeysTwice,
    ONLY_NEW: OnlyTheNew,
    AXIS: AnotherAxis,
}


def cache_complaint(answer: Any) -> str | None:
    if not isinstance(answer, type):
        return "hand over the class itself, not an object of it"
    draw = torch.Generator().manual_seed(5)
    plan = (("a", 2), ("b", 3), ("a", 2), ("b", 2), ("a", 1), ("b", 1))
    cache, keys, values = answer(), {}, {}
    for layer, tokens in plan:
        shape = (1, tokens, 3, 4)
        key, value = torch.randn(2, *shape, generator=draw)
        before = keys.get(layer), values.get(layer)
        keys[layer] = key if before[0] is None else torch.cat([before[0], key], dim=1)
        values[layer] = value if before[1] is None else torch.cat([before[1], value], dim=1)
        got = cache.extend(layer, key.clone(), value.clone())
        if got is None:
            return "extend returns nothing; return the layer's keys and values so far."
        words = _what_is_wrong(got, keys[layer], values[layer], key, before[0], cache, layer, keys)
        if words:
            return words
    return None


def _what_is_wrong(got, keys, values, new, old, cache, layer, all_keys) -> str | None:
    got_keys, got_values = got
    if old is None and got_keys.shape != keys.shape and len(all_keys) > 1:
        return SHARES
    if torch.is_tensor(got_keys) and got_keys.shape != keys.shape:
        if got_keys.shape == new.shape:
            held = getattr(cache, "kept", {}).get(layer, (new,))[0]
            return ONLY_NEW if held.shape == keys.shape else FORGETS
        if got_keys.shape[1] == old.shape[1] - 1:
            return NEVER_KEEPS
        return AXIS if got_keys.shape[2] != keys.shape[2] else NEVER_KEEPS
    if not torch.equal(got_keys, keys):
        if old is not None and torch.equal(got_keys, torch.cat([new, old], dim=1)):
            return NEW_FIRST
        return "The keys are not those that were handed over, in their order."
    if not torch.equal(got_values, values):
        return KEYS_TWICE
    return None


# ---------------------------------------------------------------------------- 5.4 nucleus


def distributions(generator: torch.Generator) -> list[tuple[list[float], float]]:
    fixed = [
        ([0.5, 0.3, 0.2], 0.7),
        ([0.1, 0.9], 0.5),
        ([0.25, 0.5, 0.25], 1.0),
        ([0.25, 0.25, 0.5], 0.6),
        ([0.2, 0.5, 0.3], 0.0),
    ]
    drawn = [torch.rand(size, generator=generator).softmax(0).tolist() for size in (6, 9)]
    return [*fixed, (drawn[0], 0.5), (drawn[1], 0.81)]


def nucleus(probabilities, top_p):
    kept, total = set(), 0.0
    for id in sorted(range(len(probabilities)), key=lambda id: -probabilities[id]):
        if total < top_p or not kept:
            kept.add(id)
            total += probabilities[id]
    return [p / total if id in kept else 0.0 for id, p in enumerate(probabilities)]


def not_scaled(probabilities, top_p):
    scaled = nucleus(probabilities, top_p)
    return [p if s else 0.0 for p, s in zip(probabilities, scaled, strict=True)]


def in_given_order(probabilities, top_p):
    kept, total = set(), 0.0
    for id, p in enumerate(probabilities):
        if total < top_p or not kept:
            kept.add(id)
            total += p
    return [p / total if id in kept else 0.0 for id, p in enumerate(probabilities)]


def stops_before_the_border(probabilities, top_p):
    kept, total = set(), 0.0
    for id in sorted(range(len(probabilities)), key=lambda id: -probabilities[id]):
        if total + probabilities[id] <= top_p + 1e-9 or not kept:
            kept.add(id)
            total += probabilities[id]
    return [p / total if id in kept else 0.0 for id, p in enumerate(probabilities)]


def a_threshold(probabilities, top_p):
    total = sum(p for p in probabilities if p >= 1 - top_p) or 1.0
    return [p / total if p >= 1 - top_p else 0.0 for p in probabilities]


def sorted_result(probabilities, top_p):
    return sorted(nucleus(probabilities, top_p), reverse=True)


# ---------------------------------------------------------------------------- 5.5 a row with a tool


def script(*lines: str):
    """A model that says these tokens, one after the other, and at last wishes to end."""

    def say(tokens):
        return lines[len(tokens)] if len(tokens) < len(lines) else "<end>"

    return say


def patient(program: str):
    """Wishes to end when its program is written, and copies the result when it is there."""

    def say(tokens):
        lines = ["<py>", *program, "</py>"]
        if "</out>" in tokens:
            result = tokens[tokens.index("<out>") + 1 : tokens.index("</out>")]
            lines += ["<out>", *result, "</out>", "=", *result]
        return lines[len(tokens)] if len(tokens) < len(lines) else "<end>"

    return say


def add(source):
    return str(sum(map(int, source.split("+"))))


def models(generator: torch.Generator) -> list[tuple[Any, Any, int]]:
    return [
        (script("a", "b"), add, 9),
        (script("a", "b", "c"), add, 2),
        (patient("12+30"), add, 40),
        (patient("5+5"), lambda source: "no", 40),
        (patient("40+60"), add, 9),
        (script("</py>", "x"), add, 9),
        (script("<py>", "1", "+", "1", "</py>", "x", "y", "z", "<py>", "7", "</py>"), add, 30),
    ]


def one_row(say, tool, limit, ends="token", forces=True, opens=True, counts=True, resets=True):
    tokens, forced, source, free = [], [], None, 0
    while len(tokens) - free < limit:
        wish = say(tokens)
        is_forced = bool(forced)
        token = forced.pop(0) if forced else wish
        if "<end>" in ((token,) if ends == "token" else (token, wish)):
            break
        tokens.append(token)
        free += is_forced and not counts
        if token == "<py>":
            source = []
        elif token == "</py>" and source is not None:
            result = [*tool("".join(source))]
            forced = (["<out>", *result, "</out>"] if opens else result) if forces else []
            source = None if resets else source
        elif source is not None:
            source.append(token)
    return tokens


def ends_on_a_wish(say, tool, limit):
    return one_row(say, tool, limit, ends="wish")


def never_forces(say, tool, limit):
    return one_row(say, tool, limit, forces=False)


def without_markers(say, tool, limit):
    return one_row(say, tool, limit, opens=False)


def forced_are_free(say, tool, limit):
    return one_row(say, tool, limit, counts=False)


def keeps_the_end(say, tool, limit):
    tokens = one_row(say, tool, limit)
    return [*tokens, "<end>"] if len(tokens) < limit else tokens


def all_at_once(say, tool, limit):
    """A result is appended in one go, so it may run over the limit."""
    tokens, source = [], None
    while len(tokens) < limit:
        token = say(tokens)
        if token == "<end>":
            break
        tokens.append(token)
        if token == "<py>":
            source = []
        elif token == "</py>" and source is not None:
            tokens += ["<out>", *tool("".join(source)), "</out>"]
            source = None
        elif source is not None:
            source.append(token)
    return tokens


EXERCISES: dict[str, Exercise] = {
    "5.1": Build(
        positions_anew,
        calls,
        {
            "That is what a model with a cache needs; this one reads everything anew.": with_a_cache,
            "You read the last token too; nobody asks what comes after it.": reads_the_last_too,
            "The text grows by one token at each call.": never_grows,
        },
    ),
    "5.2": Custom(cache_complaint, WRONG_CACHES),
    "5.3": Value(
        "19d3bdb129b3",
        wrong={
            381: "You forgot the weights: they are in memory as well.",
            188: "You count four bytes a number for the cache, or its keys and values twice.",
            752: "Keys *and* values are kept, or the rows are longer than you think.",
        },
    ),
    "5.4": Build(
        nucleus,
        distributions,
        {
            "What is left does not add up to 1: scale it.": not_scaled,
            "You take tokens in the given order; the likeliest come first.": in_given_order,
            "You stop before the border is crossed: what is kept must add up to at least "
            "top_p.": stops_before_the_border,
            "You keep every token above some probability; it is their *sum* that "
            "counts.": a_threshold,
            "The probabilities are sorted; give them back in the given order.": sorted_result,
        },
    ),
    "5.5": Build(
        one_row,
        models,
        {
            "A wish for <end> ends your row although a result is still to be forced: look at the "
            "token, not at the wish.": ends_on_a_wish,
            "The tool's result never gets into the row.": never_forces,
            "The result comes without <out> and </out> around it: nobody can tell it from the "
            "model's own words.": without_markers,
            "Your row is too long: forced tokens count towards the limit too.": forced_are_free,
            "The row holds its <end>; it is not part of the answer.": keeps_the_end,
            "You append the result in one go, and it may run over the limit: one token a "
            "step.": all_at_once,
        },
    ),
}
