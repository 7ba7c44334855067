"""The checks of chapter 04's exercises. Spoilers ahead."""

import math
from typing import Any

import torch
from torch import Tensor

from checks import Build, Custom, Exercise, Value
from nanolib.config import ModelConfig
from nanolib.data.packing import Batch
from nanolib.model import GPT

# ---------------------------------------------------------------------------- 4.1 surprise


def scored(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Small and huge logits, and targets of which some are -1."""
    cases = []
    for steps, vocab, size in ((5, 7, 1.0), (1, 3, 2.0), (9, 4, 300.0)):
        targets_T = torch.randint(vocab, (steps,), generator=generator)
        targets_T[1::3] = -1
        cases.append((size * torch.randn(steps, vocab, generator=generator), targets_T))
    return cases


def surprise(logits_TV, targets_T):
    log_p_TV = logits_TV.log_softmax(dim=-1)
    picked_T = log_p_TV.gather(-1, targets_T.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets_T >= 0, -picked_T, 0.0)


def log_of_softmax(logits_TV, targets_T):
    p_T = logits_TV.softmax(dim=-1).gather(-1, targets_T.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets_T >= 0, -p_T.log(), 0.0)


def asks_everywhere(logits_TV, targets_T):
    return -logits_TV.log_softmax(dim=-1)[torch.arange(len(targets_T)), targets_T]


def in_bits(logits_TV, targets_T):
    return surprise(logits_TV, targets_T) / math.log(2)


def no_sign(logits_TV, targets_T):
    return -surprise(logits_TV, targets_T)


def only_the_logit(logits_TV, targets_T):
    picked_T = logits_TV.gather(-1, targets_T.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets_T >= 0, -picked_T, 0.0)


def mean_of_it(logits_TV, targets_T):
    return surprise(logits_TV, targets_T).mean()


SURPRISE = Build(
    surprise,
    scored,
    {
        "With large logits some probabilities are rounded to 0 and their logarithm is −∞: take the "
        "logarithm of the softmax in one go.": log_of_softmax,
        "Where the target is −1 you pick the last token of the vocabulary: nobody asks "
        "there.": asks_everywhere,
        "These are bits; nats are asked for: use the natural logarithm.": in_bits,
        "The sign is wrong: the logarithm of a probability is negative, surprise is not.": no_sign,
        "You take the logit itself, without the softmax that makes it a "
        "probability.": only_the_logit,
        "You return the mean; each position's surprise is asked for.": mean_of_it,
    },
)

# ---------------------------------------------------------------------------- 4.2 accumulate


def accumulate(model, batches):
    count = sum(int((batch.targets_BT >= 0).sum()) for batch in batches)
    loss = 0.0
    for batch in batches:
        part = model.nll(batch).sum() / count
        part.backward()
        loss += part.item()
    return loss


def _each_divided(model, batches, by):
    loss = 0.0
    for batch in batches:
        part = model.nll(batch).sum() / by(batch, batches)
        part.backward()
        loss += part.item()
    return loss


def _targets(batch: Batch) -> int:
    return int((batch.targets_BT >= 0).sum())


def mean_of_means(model, batches):
    return _each_divided(model, batches, lambda batch, all_: _targets(batch) * len(all_))


def sum_of_means(model, batches):
    return _each_divided(model, batches, lambda batch, all_: _targets(batch))


def never_divided(model, batches):
    return _each_divided(model, batches, lambda batch, all_: 1)


def padding_counted(model, batches):
    return _each_divided(
        model, batches, lambda batch, all_: sum(b.targets_BT.numel() for b in all_)
    )


def only_the_last(model, batches):
    count = sum(map(_targets, batches))
    for batch in batches:
        for weight in model.parameters():
            weight.grad = None
        (model.nll(batch).sum() / count).backward()
    return 0.0


def no_backward(model, batches):
    return sum(model.nll(batch).sum().item() for batch in batches) / sum(map(_targets, batches))


NO_GRADIENT = "There is no gradient in the model's weights: call backward() for each part."
ACCUMULATES_WRONG = {
    "Each part is divided by its own count, and the means are averaged: a token of a short part "
    "counts for more than one of a long part.": mean_of_means,
    "Each part is divided by its own count and the results are added: the gradient is too large, "
    "and short parts count too much.": sum_of_means,
    "You never divide: the gradient is that of the sum, not of the mean.": never_divided,
    "You divide by all positions; those with the target −1 ask nothing and must not be "
    "counted.": padding_counted,
    "Only the last batch's gradient is left: do not clear gradients between the "
    "parts.": only_the_last,
    NO_GRADIENT: no_backward,
}


def _case(seed: int) -> tuple[GPT, list[Batch]]:
    draw = torch.Generator().manual_seed(seed)
    shape = ModelConfig(depth=1, aspect=8, head_dim=4, sequence_len=12)
    model = GPT.build(shape, 11, torch.device("cpu"), seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=draw))
    batches = []
    for rows, ends in ((2, 12), (1, 5), (1, 2)):
        ids_BT = torch.randint(11, (rows, 13), generator=draw)
        targets_BT = ids_BT[:, 1:].clone()
        targets_BT[:, ends:] = -1
        batches.append(Batch(inputs_BT=ids_BT[:, :-1], targets_BT=targets_BT))
    return model, batches[: 2 + seed % 2]


def _left_behind(answer, seed: int) -> tuple[Tensor | None, Any]:
    """The gradient that an answer leaves, and what it returns."""
    model, batches = _case(seed)
    returned = answer(model, batches)
    grads = [weight.grad for weight in model.parameters()]
    if any(grad is None for grad in grads):
        return None, returned
    return torch.cat([grad.flatten() for grad in grads if grad is not None]), returned


def _same(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def accumulate_complaint(answer) -> str | None:
    if not callable(answer):
        return "hand over the function itself, not what it returned"
    for seed in (1, 2):
        got, returned = _left_behind(answer, seed)
        if got is None:
            return NO_GRADIENT
        expected, loss = _left_behind(accumulate, seed)
        assert expected is not None
        if not _same(got, expected):
            for message, function in ACCUMULATES_WRONG.items():
                theirs, _ = _left_behind(function, seed)
                if theirs is not None and _same(got, theirs):
                    return message
            factor = float((got @ expected) / (expected @ expected))
            if _same(got, factor * expected):
                return f"Your gradient is {factor:.3g} times what it should be."
            return "Your gradient points elsewhere: it is not that of the mean over all targets."
        if returned is None or not math.isclose(float(returned), float(loss), rel_tol=1e-3):
            return "The gradient is right. What you return is not the mean loss over all targets."
    return None


# ---------------------------------------------------------------------------- 4.3 rate


def moments(generator: torch.Generator) -> list[tuple[int, int, int, int]]:
    plans = ((10, 4, 2), (10, 0, 5), (12, 3, 0), (7, 0, 0), (50, 10, 20))
    return [(step, steps, up, down) for steps, up, down in plans for step in range(steps)]


def rate(step, steps, warmup, warmdown):
    rise = (step + 1) / warmup if warmup else 1.0
    fall = (steps - step) / warmdown if warmdown else 1.0
    return min(1.0, rise, fall)


def begins_at_zero(step, steps, warmup, warmdown):
    return min(rate(step, steps, 0, warmdown), step / warmup if warmup else 1.0)


def ends_at_zero(step, steps, warmup, warmdown):
    return min(rate(step, steps, warmup, 0), (steps - 1 - step) / warmdown if warmdown else 1.0)


def no_warmup(step, steps, warmup, warmdown):
    return rate(step, steps, 0, warmdown)


def no_warmdown(step, steps, warmup, warmdown):
    return rate(step, steps, warmup, 0)


def above_one(step, steps, warmup, warmdown):
    rise = (step + 1) / warmup if warmup else 1.0
    return min(rise, (steps - step) / warmdown if warmdown else 1.0)


RATE = Build(
    rate,
    moments,
    {
        "Your first step has the factor 0: it reads a batch and learns nothing.": begins_at_zero,
        "Your last step has the factor 0; count the steps that are left with itself.": ends_at_zero,
        "There is no warmup: step 0 has the full rate.": no_warmup,
        "There is no warmdown: the last step has the full rate.": no_warmdown,
        "In the middle your factor is more than 1: it is the smallest of three lines, and one of "
        "them is 1.": above_one,
    },
    explain=lambda got, expected, step, steps, warmup, warmdown: (
        f"at step {step} of {steps} (warmup {warmup}, warmdown {warmdown}) your factor is {got:.3g}"
    ),
)

# ---------------------------------------------------------------------------- 4.5 induction score


def attentions(generator: torch.Generator) -> list[tuple[Tensor, int]]:
    cases = []
    for heads, n in ((3, 5), (1, 2), (4, 7)):
        scores = 3 * torch.randn(heads, 2 * n, 2 * n, generator=generator)
        future = torch.ones(2 * n, 2 * n).triu(diagonal=1).bool()
        cases.append((scores.masked_fill(future, -torch.inf).softmax(dim=-1), n))
    return cases


def induction_score(weights_HTS, n):
    t = torch.arange(n, 2 * n)
    return weights_HTS[:, t, t - n + 1].mean(-1)


def same_token(weights_HTS, n):
    t = torch.arange(n, 2 * n)
    return weights_HTS[:, t, t - n].mean(-1)


def token_before(weights_HTS, n):
    t = torch.arange(n + 1, 2 * n)
    return weights_HTS[:, t, t - n - 1].mean(-1)


def whole_diagonal(weights_HTS, n):
    return weights_HTS.diagonal(1 - n, 1, 2).mean(-1)


def summed(weights_HTS, n):
    return induction_score(weights_HTS, n) * n


def over_all_positions(weights_HTS, n):
    return induction_score(weights_HTS, n) / 2


INDUCTION = Build(
    induction_score,
    attentions,
    {
        "You look at the token's own earlier copy; what is to be copied stands one place "
        "further.": same_token,
        "You look at what stood before the earlier copy, not after it.": token_before,
        "Your diagonal begins one position too early: position n − 1 is still the first "
        "saying.": whole_diagonal,
        "You add the weights up; their mean over the second saying is asked for.": summed,
        "You divide by all 2n positions; only the n of the second saying count.": over_all_positions,
    },
)

EXERCISES: dict[str, Exercise] = {
    "4.1": SURPRISE,
    "4.2": Custom(accumulate_complaint, ACCUMULATES_WRONG),
    "4.3": RATE,
    "4.4": Value(
        "42e4bf71bf65",
        wrong={
            0.5: "You divided nats by bytes: a nat is not a bit.",
            0.34657: "You multiplied by ln 2; a nat is *more* than a bit, so the number grows.",
            2.88539: "These are the bits of a token; how many bytes does it have?",
            11.5416: "You multiplied by the bytes; the bits are shared among them.",
        },
    ),
    "4.5": INDUCTION,
}
