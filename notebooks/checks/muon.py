"""The checks of chapter 03's exercises. Spoilers ahead."""

import torch
from torch import Tensor

from checks import Build, Exercise, Value
from nanolib import optim

A, B, C = optim.NEWTON_SCHULZ

# ---------------------------------------------------------------------------- 3.1 one step


def wide(generator: torch.Generator) -> list[tuple[Tensor]]:
    drawn = [torch.randn(shape, generator=generator) for shape in ((3, 5), (4, 4), (1, 6), (7, 20))]
    return [(matrix / matrix.norm(),) for matrix in drawn]


def step(X):
    gram = X @ X.T
    return A * X + (B * gram + C * gram @ gram) @ X


def first_term_forgotten(X):
    return step(X) - A * X


def gram_not_squared(X):
    gram = X @ X.T
    return A * X + (B * gram + C * gram) @ X


def number_by_number(X):
    return A * X + B * X**3 + C * X**5


def gram_squared_by_number(X):
    gram = X @ X.T
    return A * X + (B * gram + C * gram**2) @ X


def last_x_forgotten(X):
    gram = X @ X.T
    return A * torch.eye(len(X)) + B * gram + C * gram @ gram


# ---------------------------------------------------------------------------- 3.3 Muon


def weights(generator: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
    shapes = ((12, 3), (3, 12), (5, 5))
    return [tuple(torch.randn(3, *shape, generator=generator)) for shape in shapes]


def muon(weight, grad, mean, lr=0.02, momentum=0.95, nesterov=True, factor="rows"):
    mean = momentum * mean + (1 - momentum) * grad
    ahead = momentum * mean + (1 - momentum) * grad if nesterov else mean
    rows, columns = weight.shape
    ratios = {"rows": rows / columns, "columns": columns / rows, "none": 1.0}
    scale = max(1.0, ratios[factor]) ** 0.5
    return weight - lr * scale * optim.orthogonalise(ahead[None])[0], mean


def without_nesterov(weight, grad, mean):
    return muon(weight, grad, mean, nesterov=False)


def without_factor(weight, grad, mean):
    return muon(weight, grad, mean, factor="none")


def factor_upside_down(weight, grad, mean):
    return muon(weight, grad, mean, factor="columns")


def uphill(weight, grad, mean):
    new, mean = muon(weight, grad, mean)
    return 2 * weight - new, mean


def not_orthogonalised(weight, grad, mean):
    new_mean = muon(weight, grad, mean)[1]
    rows, columns = weight.shape
    ahead = 0.95 * new_mean + 0.05 * grad
    return weight - 0.02 * max(1.0, rows / columns) ** 0.5 * ahead, new_mean


def gradient_alone(weight, grad, mean):
    return muon(weight, grad, grad)[0], muon(weight, grad, mean)[1]


def weights_swapped(weight, grad, mean):
    """The shares of the old mean and of the gradient, the wrong way round."""
    return muon(weight, grad, mean, momentum=0.05)


def what_is_off(got, expected, weight: Tensor, grad: Tensor, mean: Tensor) -> str | None:
    if not isinstance(got, tuple | list) or len(got) != 2:
        return "return two tensors: the new weight and the new mean"
    if not torch.allclose(got[1], expected[1], atol=1e-5):
        return "the new mean is wrong: it is 0.95 of the old one and 0.05 of the gradient"
    sizes = torch.linalg.svdvals(got[0] - weight) / torch.linalg.svdvals(expected[0] - weight)
    return (
        f"the mean is right; the first singular value of your step is {sizes[0]:.3g} times as large "
        "as it should be"
    )


# ---------------------------------------------------------------------------- 3.5 clip


def lists(generator: torch.Generator) -> list[tuple[list[Tensor], float]]:
    def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [torch.randn(shape, generator=generator) for shape in shapes]

    small = [0.01 * grad for grad in drawn((2, 2), (3,))]
    return [(drawn((3, 4), (5,), (2, 1, 2)), 1.0), (small, 1.0), (drawn((6,)), 0.5)]


def clip(grads, limit=1.0):
    norm = sum(grad.square().sum() for grad in grads) ** 0.5
    return [grad * min(1.0, limit / float(norm)) for grad in grads]


def each_by_its_own(grads, limit=1.0):
    return [clip([grad], limit)[0] for grad in grads]


def always_to_the_limit(grads, limit=1.0):
    norm = sum(grad.square().sum() for grad in grads) ** 0.5
    return [grad * limit / norm for grad in grads]


def every_number(grads, limit=1.0):
    return [grad.clamp(-limit, limit) for grad in grads]


def lengths_added(grads, limit=1.0):
    total = sum(float(grad.norm()) for grad in grads)
    return [grad * min(1.0, limit / total) for grad in grads]


def root_forgotten(grads, limit=1.0):
    square = float(sum(grad.square().sum() for grad in grads))
    return [grad * min(1.0, limit / square) for grad in grads]


# ---------------------------------------------------------------------------- all

EXERCISES: dict[str, Exercise] = {
    "3.1": Build(
        step,
        wide,
        {
            "The first term is missing: a X.": first_term_forgotten,
            "c belongs to the *square* of X Xᵀ: gram @ gram.": gram_not_squared,
            "You apply the polynomial to each number; it is for the matrix, with @: then it acts on "
            "the singular values.": number_by_number,
            "gram**2 squares each number; the square of a matrix is gram @ gram.": (
                gram_squared_by_number
            ),
            "You forgot to multiply by X at the end: the result has to have the shape of X.": (
                last_x_forgotten
            ),
        },
    ),
    "3.2": Value(
        "59e07ff9719b",
        {
            0.753: "That is s²; the singular value is its root.",
            1.264: "That one is at rest as well, but it lies above 1: take the smaller root.",
            0: "True of 0, but the exercise asks for one between 0 and 1.",
            1: "At s = 1 the polynomial gives a + b + c, which is not 1.",
        },
    ),
    "3.3": Build(
        muon,
        weights,
        {
            "You orthogonalise the mean alone; look one step ahead first (Nesterov): mix in the "
            "gradient once more.": without_nesterov,
            "The factor √max(1, R/C) is missing: tall matrices take too small a step.": without_factor,
            "Your factor is upside down: it is for matrices with more rows than columns, "
            "√max(1, R/C).": factor_upside_down,
            "You step uphill: the step is subtracted.": uphill,
            "You step along the mean as it is: orthogonalise it first.": not_orthogonalised,
            "You orthogonalise the gradient and leave the mean out of the step.": gradient_alone,
            "The shares are the wrong way round: the old mean keeps 0.95, the gradient adds "
            "0.05.": weights_swapped,
        },
        explain=what_is_off,
    ),
    "3.4": Value(
        "a3cf119b63e3",
        {
            0.25: "That is C/R; the factor has a root.",
            2: "That is the factor itself; without it the change gets smaller.",
            1: "Something does change: R/C is 4.",
        },
    ),
    "3.5": Build(
        clip,
        lists,
        {
            "You clip each tensor by its own length; there is one length, that of all of them "
            "together.": each_by_its_own,
            "You lengthen short gradients up to the limit; those below it stay as they "
            "are.": always_to_the_limit,
            "You clip each number, which turns the gradient; scale all by one factor.": every_number,
            "Lengths of parts do not add up; their squares do.": lengths_added,
            "You forgot the root: the sum of squares is the length squared.": root_forgotten,
        },
    ),
}
