"""The checks of chapter 02's exercises. Spoilers ahead."""

import torch
import torch.nn.functional as F
from torch import Tensor

from checks import BLANK, Build, Custom, Exercise, Value
from nanolib import model

# ---------------------------------------------------------------------------- 2.1 norm


def vectors(generator: torch.Generator) -> list[tuple[Tensor]]:
    shapes = ((5, 2), (3, 1, 7), (2, 3, 4, 5), (6,))
    several = [(torch.randn(shape, generator=generator) * 30,) for shape in shapes]
    return [*several, (torch.zeros(2, 3),), (torch.full((2, 4), 1e-3),)]


def by_length(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def over_everything(x):
    return x / (x.square().mean() + 1e-6).sqrt()


def layer_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def without_root(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6)


def without_epsilon(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


# ---------------------------------------------------------------------------- 2.2 attend


def queries(generator: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
    """First values that say who they are: there the output *is* the weights."""
    query, key = torch.randn(2, 1, 6, 2, 6, generator=generator)
    named = torch.eye(6)[None, :, None].expand(1, 6, 2, 6).clone()
    shapes = ((2, 5, 3, 4), (1, 1, 1, 2), (3, 7, 1, 5), (1, 9, 4, 1))
    drawn = (tuple(torch.randn(3, *shape, generator=generator)) for shape in shapes)
    return [(query, key, named), *drawn]


def attention(query, key, value, scale=0.5, mask="before", axis=-1, diagonal=1):
    scores = torch.einsum("bthk,bshk->bhts", query, key) / query.shape[-1] ** scale
    future = torch.ones(scores.shape[-2:]).triu(diagonal=diagonal).bool()
    if mask == "past":
        future = torch.ones(scores.shape[-2:]).tril(diagonal=-1).bool()
    if mask in ("before", "past"):
        scores = scores.masked_fill(future, -torch.inf)
    weights = scores.softmax(dim=axis)
    if mask == "after":
        weights = weights.masked_fill(future, 0.0)
    return torch.einsum("bhts,bshk->bthk", weights, value)


def no_mask(query, key, value):
    return attention(query, key, value, mask="none")


def not_divided(query, key, value):
    return attention(query, key, value, scale=0.0)


def divided_by_k(query, key, value):
    return attention(query, key, value, scale=1.0)


def masked_after_softmax(query, key, value):
    return attention(query, key, value, mask="after")


def masks_itself(query, key, value):
    return attention(query, key, value, diagonal=0)


def masks_the_past(query, key, value):
    return attention(query, key, value, mask="past")


def softmax_over_queries(query, key, value):
    return attention(query, key, value, axis=-2)


def sees_one_ahead(query, key, value):
    return attention(query, key, value, diagonal=2)


def which_positions(got: Tensor, expected: Tensor, query: Tensor, key: Tensor, value: Tensor):
    """Words about the weights, where the values are one-hot and the output shows them."""
    steps = query.shape[1]
    if value.shape[-1] != steps or not torch.equal(value[0, :, 0], torch.eye(steps)):
        return None
    for t, s in torch.cartesian_prod(torch.arange(steps), torch.arange(steps)).tolist():
        weight = float(got[0, t, 0, s])
        if s > t and weight > 1e-6:
            return f"your mask lets position {t} see position {s}"
        if s <= t and weight < 1e-9:
            return f"position {t} cannot see position {s}, which is not in its future"
    for t, total in enumerate(got[0, :, 0].sum(-1).tolist()):
        if abs(total - 1) > 1e-4:
            return f"the weights of position {t} add up to {total:.3g}, not to 1"
    return "every position sees the right ones, but with other weights: look at scores and scale"


ATTEND = Build(
    model.attend,
    queries,
    {
        "There is no mask: position 0 sees position 5, and every position sees its answer.": no_mask,
        "You do not divide the scores by √K: with a large K, softmax takes all or nothing.": not_divided,
        "You divide the scores by K; a dot product of K numbers has the size √K.": divided_by_k,
        "You mask after the softmax, so the rows no longer add up to 1: mask the scores, "
        "with −∞.": masked_after_softmax,
        "Your mask hides each position from itself, and position 0 has nobody left to look at: "
        "NaN.": masks_itself,
        "Your mask is upside down: it hides the past and shows the future.": masks_the_past,
        "Your softmax runs over the queries (T); each query's weights over the keys (S) must add "
        "up to 1.": softmax_over_queries,
        "Your mask lets position 0 see position 1: it begins one diagonal too late.": sees_one_ahead,
    },
    explain=which_positions,
)


def past_moves(answer) -> str | None:
    """Words when a change of a later position changes the output of an earlier one."""
    query, key, value = torch.randn(3, 1, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    before = answer(query.clone(), key.clone(), value.clone())
    for s in range(5, 0, -1):
        new_key, new_value = key.clone(), value.clone()
        new_key[:, s], new_value[:, s] = 1.0, 9.0
        after = answer(query.clone(), new_key, new_value)
        moved = (after - before).abs().amax(dim=(0, 2, 3)) > 1e-5
        if bool(moved[:s].any()):
            t = int(moved[:s].nonzero()[0])
            return f"a change at position {s} moves the output at position {t}: it sees the future"
    return None


def attend_complaint(answer) -> str | None:
    return _with_property(ATTEND, "2.2", answer, past_moves)


# ---------------------------------------------------------------------------- 2.3 rotate


def placed(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    cases = (((2, 5, 3, 4), torch.arange(5)), ((1, 3, 1, 2), torch.tensor([7, 0, 40])))
    cases += (((2, 1, 2, 6), torch.tensor([11])), ((1, 4, 2, 10), torch.arange(4) * 3))
    return [(torch.randn(shape, generator=generator), places) for shape, places in cases]


def turned(x, places, sign=1.0, base=10_000.0, step=2, halves=True):
    size = x.shape[-1]
    angles = sign * places[:, None, None] * base ** (-torch.arange(0, size, 2) * step / 2 / size)
    a, b = x.chunk(2, dim=-1) if halves else (x[..., ::2], x[..., 1::2])
    one, other = a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin()
    if halves:
        return torch.cat((one, other), dim=-1)
    return torch.stack((one, other), dim=-1).flatten(-2)


def real_rotate(x, places):
    return model.rotate(x, model.rotation(places, x.shape[-1]))


def backwards(x, places):
    return turned(x, places, sign=-1.0)


def neighbours(x, places):
    return turned(x, places, halves=False)


def half_speeds(x, places):
    return turned(x, places, step=1)


def one_speed(x, places):
    return turned(x, places, base=1.0)


def counted_again(x, places):
    return turned(x, torch.arange(x.shape[1]))


def lengths_or_start(got: Tensor, expected: Tensor, x: Tensor, places: Tensor) -> str | None:
    if not torch.allclose(got.norm(dim=-1), x.norm(dim=-1), rtol=1e-3):
        return "turning must not change the length of a vector, and yours does"
    if places[0] == 0 and not torch.allclose(got[:, 0], x[:, 0], atol=1e-5):
        return "position 0 has the angle 0, so nothing may change there"
    return None


ROTATE = Build(
    real_rotate,
    placed,
    {
        "You turn the other way: here it is by minus the angle, clockwise.": backwards,
        "Your pairs are neighbours (x[0], x[1]); here they are (x[i], x[i + K/2]).": neighbours,
        "Your hands slow down half as fast as they should: pair i has the exponent −2i/K, "
        "with K the whole head.": half_speeds,
        "All your hands have the same speed: each pair needs its own.": one_speed,
        "You count positions from 0 yourself; use the ones you are given.": counted_again,
    },
    explain=lengths_or_start,
)


def more_than_distance(answer) -> str | None:
    """Words when moving query and key along together changes their dot product."""
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    products = []
    for shift in (0, 1, 10):
        one = answer(query.clone(), torch.tensor([5 + shift]))
        other = answer(key.clone(), torch.tensor([2 + shift]))
        products.append(float((one * other).sum()))
    if max(products) - min(products) > 1e-3:
        return (
            "a query at 5 and a key at 2 have another dot product than the same two at 15 and 12: "
            "only the distance may count"
        )
    return None


def rotate_complaint(answer) -> str | None:
    return _with_property(ROTATE, "2.3", answer, more_than_distance)


def _with_property(build: Build, number: str, answer, broken) -> str | None:
    """The complaint of `build`; where it names no typical mistake, the broken property's first."""
    complaint = build.complaint(number, answer)
    if complaint is None or complaint == BLANK or complaint in build.wrong:
        return complaint
    try:
        return broken(answer) or complaint
    except Exception:  # it cannot even be called like that: the complaint says so
        return complaint


# ---------------------------------------------------------------------------- all

EXERCISES: dict[str, Exercise] = {
    "2.1": Build(
        model.norm,
        vectors,
        {
            "You divide by the length (the root of the sum); the root of the *mean* does not grow "
            "with D.": by_length,
            "You take one mean over all vectors; each vector has its own: mean(-1, "
            "keepdim=True).": over_everything,
            "You subtract the mean first: that is LayerNorm. RMS norm only divides.": layer_norm,
            "You forgot the root: a vector twice as long comes out half as long.": without_root,
            "A vector of zeros becomes NaN: add 1e-6 under the root.": without_epsilon,
        },
    ),
    "2.2": Custom(attend_complaint, ATTEND.wrong),
    "2.3": Custom(rotate_complaint, ROTATE.wrong),
    "2.4": Value(
        "3794fc4e3699",
        {
            10: "That is the logarithm to base 2, in bits; nats use the natural one.",
            3.01: "That is the logarithm to base 10; nats use the natural one.",
            1 / 1024: "That is the probability; the loss is minus its logarithm.",
            0: "A loss of 0 would mean that the model is certain, and right.",
        },
    ),
    "2.5": Value(
        "a6c6523ab093",
        {
            104_857_600: "That is the keys alone; the values are kept as well.",
            419_430_400: "That would be four bytes a number.",
            10_485_760: "That is a single layer.",
        },
    ),
}
