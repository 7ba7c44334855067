"""The checks of chapter 00's exercises. Spoilers ahead."""

import torch

from checks import Build, Exercise, Value


def gradient(probabilities, right):
    return [p - (place == right) for place, p in enumerate(probabilities)]


def some_probabilities(generator):
    draws = [torch.rand(size, generator=generator) for size in (2, 3, 7)]
    return [((draw / draw.sum()).tolist(), place) for place, draw in enumerate(draws)]


def write(next_probabilities, ids, count):
    ids = list(ids)
    for _ in range(count):
        p = next_probabilities(ids)
        ids.append(max(range(len(p)), key=p.__getitem__))
    return ids


def only_the_new(next_probabilities, ids, count):
    return write(next_probabilities, ids, count)[len(ids) :]


def never_shown(next_probabilities, ids, count):
    p = next_probabilities(list(ids))
    return [*ids, *[max(range(len(p)), key=p.__getitem__)] * count]


def least_likely(next_probabilities, ids, count):
    return write(lambda grown: [-p for p in next_probabilities(grown)], ids, count)


def counter(ids):
    """A model of seven tokens whose favourite depends on everything before."""
    favourite = (sum(ids) + len(ids)) % 7
    return [0.7 if place == favourite else 0.05 for place in range(7)]


def width(depth, aspect, head_dim):
    return -(-aspect * depth // head_dim) * head_dim


EXERCISES: dict[str, Exercise] = {
    "0.1": Build(
        gradient,
        some_probabilities,
        wrong={
            "The sign is the other way round: what the model said, minus what was right.": (
                lambda p, right: [-x for x in gradient(p, right)]
            ),
            "You changed the right token alone: every other token was given too much as well.": (
                lambda p, right: [p[right] - 1.0 if i == right else 0.0 for i in range(len(p))]
            ),
        },
    ),
    "0.2": Value(
        "1f5ce95c3e83",
        wrong={
            8.05: "That is in bits: a nat is the natural logarithm's unit.",
            0.00377: "That is the probability of each token; the loss is minus its logarithm.",
            -5.58: "The sign: a loss is minus the logarithm, so it is not negative.",
        },
    ),
    "0.3": Build(
        write,
        lambda generator: [(counter, [1, 2], 5), (counter, [3], 1), (counter, [0, 6, 6], 9)],
        wrong={
            "You return the new ids alone; the prompt belongs in front of them.": only_the_new,
            "The model never sees what it wrote: append each id before you ask again.": never_shown,
            "You take the least likely id.": least_likely,
        },
    ),
    "0.4": Build(
        width,
        lambda generator: [(20, 64, 128), (4, 32, 32), (13, 64, 128), (3, 16, 128), (5, 40, 64)],
        wrong={
            "You do not round: some widths do not divide into whole heads.": (
                lambda depth, aspect, head_dim: depth * aspect
            ),
            "You round down: a shallow model would have no width at all.": (
                lambda depth, aspect, head_dim: depth * aspect // head_dim * head_dim
            ),
            "That is the number of heads; the width is that many times the head size.": (
                lambda depth, aspect, head_dim: -(-aspect * depth // head_dim)
            ),
        },
    ),
    "0.5": Value(
        "4b3a9b83f6dc",
        wrong={
            2: "That is the depth alone; the width grows too.",
            4: "That is the width squared alone; there are also twice as many blocks.",
        },
    ),
}
