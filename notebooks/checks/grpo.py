"""The checks of chapter 08's exercises. Spoilers ahead."""

import math

import torch
from torch import Tensor

from checks import Build, Custom, Exercise, Value
from nanolib.evals.answers import pass_at_k

# ---------------------------------------------------------------------------- 8.1 advantages


def group_advantages(rewards_QN):
    return rewards_QN - rewards_QN.mean(dim=1, keepdim=True)


def over_all_questions(rewards_QN):
    return rewards_QN - rewards_QN.mean()


def over_the_questions(rewards_QN):
    return rewards_QN - rewards_QN.mean(dim=0, keepdim=True)


def by_deviation(rewards_QN):
    return group_advantages(rewards_QN) / (rewards_QN.std(dim=1, keepdim=True) + 1e-6)


def leave_one_out(rewards_QN):
    answers = rewards_QN.shape[1]
    return group_advantages(rewards_QN) * answers / (answers - 1)


def as_rewarded(rewards_QN):
    return rewards_QN


def random_rewards(generator):
    def grades(*shape):
        return torch.randint(2, shape, generator=generator).float()

    paid = torch.rand(2, 5, generator=generator) * 3
    return [(grades(3, 8),), (grades(1, 4),), (torch.ones(2, 3),), (paid,)]


# ---------------------------------------------------------------------------- 8.3 the loss


def policy_loss(log_p_BT, chosen_BT, advantage_B):
    return -(advantage_B[:, None] * log_p_BT * chosen_BT).sum() / chosen_BT.sum()


def unmasked(log_p_BT, chosen_BT, advantage_B):
    return -(advantage_B[:, None] * log_p_BT).sum() / log_p_BT.numel()


def over_all_places(log_p_BT, chosen_BT, advantage_B):
    return -(advantage_B[:, None] * log_p_BT * chosen_BT).mean()


def mean_of_means(log_p_BT, chosen_BT, advantage_B):
    return -(advantage_B * (log_p_BT * chosen_BT).sum(1) / chosen_BT.sum(1)).mean()


def summed(log_p_BT, chosen_BT, advantage_B):
    return -(advantage_B[:, None] * log_p_BT * chosen_BT).sum()


def made_small(log_p_BT, chosen_BT, advantage_B):
    return -policy_loss(log_p_BT, chosen_BT, advantage_B)


def random_answers(generator):
    cases = []
    for answers, tokens in ((4, 6), (1, 3), (7, 11)):
        log_p_BT = -3 * torch.rand(answers, tokens, generator=generator)
        chosen_BT = torch.rand(answers, tokens, generator=generator) < 0.6
        chosen_BT[:, 0] = True
        cases.append((log_p_BT, chosen_BT, torch.randn(answers, generator=generator)))
    return cases


# ---------------------------------------------------------------------------- 8.4 the loop


class Toy:
    """A policy small enough to check a loop with: four tokens an answer, six to choose from."""

    questions, answers, length, vocab = 3, 4, 4, 6

    def __init__(self):
        generator = torch.Generator().manual_seed(8)
        shape = (self.questions, self.length, self.vocab)
        self.scores_QTV = torch.randn(shape, generator=generator).requires_grad_()
        self.losses: list[float] = []
        self.sampled: list[int] = []

    def sample(self, step):
        self.sampled.append(step)
        generator = torch.Generator().manual_seed(step)
        p_QTV = self.scores_QTV.detach().softmax(-1)
        p_QTV = p_QTV[:, None].expand(-1, self.answers, -1, -1)
        ids = torch.multinomial(p_QTV.reshape(-1, self.vocab), 1, generator=generator)
        ids_QNT = ids.view(self.questions, self.answers, self.length)
        return list(range(self.questions)), ids_QNT.tolist()

    def log_p(self, questions, answers):
        ids_QNT = torch.as_tensor(answers)
        log_p_QTV = self.scores_QTV.log_softmax(-1)[:, None].expand(-1, self.answers, -1, -1)
        log_p_QNT = log_p_QTV.gather(-1, ids_QNT[..., None]).squeeze(-1)
        chosen_BT = torch.ones(self.questions * self.answers, self.length, dtype=torch.bool)
        chosen_BT[::2, 2] = False  # a tool's result
        chosen_BT[1::3, 3] = False  # padding
        return log_p_QNT.flatten(0, 1), chosen_BT

    def step(self, loss):
        self.losses.append(float(loss.detach()))
        (push_QTV,) = torch.autograd.grad(loss, self.scores_QTV)
        self.scores_QTV = (self.scores_QTV - 2 * push_QTV).detach().requires_grad_()


def toy_reward(questions, answers):
    """[Q, N]: how often an answer says its question's number, and 1 more for question 0."""
    ids_QNT = torch.as_tensor(answers)
    said_QN = (ids_QNT == torch.tensor(questions)[:, None, None]).sum(-1)
    return said_QN + (torch.tensor(questions)[:, None] == 0).float()


def loop(advantages=group_advantages, loss=policy_loss, sample_once=False, curve=True):
    """A training loop, in one of the ways in which it may be written."""

    def train(policy, reward, steps):
        means = []
        for step in range(steps):
            if step == 0 or not sample_once:
                questions, answers = policy.sample(step)
            rewards_QN = reward(questions, answers)
            advantage_B = advantages(rewards_QN).flatten()
            policy.step(loss(*policy.log_p(questions, answers), advantage_B))
            means.append(rewards_QN.mean().item())
        return means if curve else None

    return train


train = loop()
BY_LOSS = {  # what the losses of a wrong loop are
    "You have no baseline: every rewarded answer is praised, the usual ones too. Take off the "
    "mean of the question's own answers.": loop(as_rewarded),
    "You take one mean over all questions. Then an easy question's answers are praised for being "
    "easy: take the mean along dim=1.": loop(over_all_questions),
    "You divide the advantages by their deviation, as GRPO first did; this loop does not.": loop(
        by_deviation
    ),
    "You grade forced tokens and padding too: use chosen_BT.": loop(loss=unmasked),
    "You divide by all positions; count those that were chosen.": loop(loss=over_all_places),
    "You do not divide by the number of chosen tokens: the longer the answers, the larger the "
    "step.": loop(loss=summed),
    "The sign is wrong: an optimizer makes a loss small, so this one unlearns what was right.": loop(
        loss=made_small
    ),
}
ONCE = (
    "You sample once and go on learning from those answers. After the first step they are no "
    "longer the policy's own: sample within the loop."
)
NO_CURVE = "The loss is right. Now return the mean reward of every step, as a list of numbers."


def losses_of(answer) -> tuple[Toy, object]:
    policy = Toy()
    return policy, answer(policy, toy_reward, 3)


def check_train(answer) -> str | None:
    policy, curve = losses_of(answer)
    model, means = losses_of(train)
    if not policy.losses:
        return "policy.step(loss) was never called: nothing is learned"
    for message, wrong in BY_LOSS.items():
        if close(policy.losses[:1], losses_of(wrong)[0].losses[:1]):
            return message
    if len(policy.sampled) == 1:
        return ONCE
    if policy.sampled != model.sampled:
        return f"for 3 steps you called policy.sample with {policy.sampled}; give it each step once"
    if not close(policy.losses, model.losses):
        return "the loss is not yet right: reward, advantage, chosen tokens, number of them"
    if not isinstance(curve, list | tuple | Tensor) or len(curve) != 3:
        return NO_CURVE
    return None if close(curve, means) else "the curve is not the mean reward of each step"


def close(some, others) -> bool:
    if len(some) != len(others):
        return False
    return all(
        math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in zip(some, others, strict=True)
    )


# ---------------------------------------------------------------------------- 8.6 pass@k


def with_replacement(n, c, k):
    return 1 - (1 - c / n) ** k


def added_up(n, c, k):
    return min(1.0, k * c / n)


def all_right(n, c, k):
    return math.comb(c, k) / math.comb(n, k)


def none_right(n, c, k):
    return math.comb(n - c, k) / math.comb(n, k)


def counts(generator):
    return [(16, c, k) for c in (0, 1, 5, 15, 16) for k in (1, 2, 8)] + [(4, 1, 4), (5, 2, 3)]


# ---------------------------------------------------------------------------- 8.5 a gated bonus


def gated(right_QN, programs_QN):
    return right_QN * (1 + 0.5 * programs_QN.clamp(max=1))


def wrong_ones_paid(right_QN, programs_QN):
    return right_QN + 0.5 * programs_QN.clamp(max=1)


def no_ceiling(right_QN, programs_QN):
    return right_QN * (1 + 0.5 * programs_QN)


def only_with_program(right_QN, programs_QN):
    return 1.5 * right_QN * programs_QN.clamp(max=1)


def grades_and_programs(generator):
    return [
        (
            torch.randint(2, shape, generator=generator).float(),
            torch.randint(5, shape, generator=generator).float(),
        )
        for shape in ((3, 8), (1, 6), (5, 4))
    ]


EXERCISES: dict[str, Exercise] = {
    "8.1": Build(
        group_advantages,
        random_rewards,
        wrong={
            "You take one mean over all questions: then an easy question's answers are praised "
            "for being easy.": over_all_questions,
            "You take the mean of one answer to each question (dim=0). A group is a row: dim=1, "
            "with keepdim=True.": over_the_questions,
            "You divide by the deviation as well. GRPO first did; here it is left out.": by_deviation,
            "You compare with the mean of the others (leave one out). It is a good baseline too, "
            "n / (n - 1) times this one; take the mean of all.": leave_one_out,
            "These are the rewards as they were: take off what is usual for the question.": as_rewarded,
        },
    ),
    "8.2": Value(
        "f0a4ef498d0f",
        wrong={
            0.43: "That is the chance that all eight are wrong. When do they differ?",
            0.8: "Chances of events that can happen together do not add up.",
            0.1: "That is the chance that one answer is right.",
            0.383: "That is exactly one right of eight. Two right and six wrong differ too.",
        },
    ),
    "8.3": Build(
        policy_loss,
        random_answers,
        wrong={
            "You grade all positions: what a tool printed, and padding, was not chosen.": unmasked,
            "You divide by all positions; count those that were chosen.": over_all_places,
            "You take each answer's mean and then the mean of these, as GRPO first did: a token "
            "of a long answer weighs less.": mean_of_means,
            "You do not divide by the number of chosen tokens.": summed,
            "The sign is wrong: an optimizer makes a loss small, so what was good would become "
            "rarer.": made_small,
        },
    ),
    "8.4": Custom(
        check_train, wrong=BY_LOSS | {ONCE: loop(sample_once=True)} | {NO_CURVE: loop(curve=False)}
    ),
    "8.6": Build(
        pass_at_k,
        counts,
        wrong={
            "You draw with replacement: 1 - (1 - c/n)**k. From n answers at hand, k different ones "
            "are taken, and your formula is too low on average.": with_replacement,
            "You add up chances: with two right ones among the k you count twice.": added_up,
            "That is the chance that all k are right.": all_right,
            "That is the chance that none of the k is right; you want the opposite.": none_right,
        },
    ),
    "8.5": Build(
        gated,
        grades_and_programs,
        wrong={
            "A wrong answer is paid for its program: the model can live on that.": wrong_ones_paid,
            "There is no ceiling: a right answer with nine programs is paid nine times.": no_ceiling,
            "A right answer without a program gets nothing; the number is what counts.": only_with_program,
        },
    ),
}
