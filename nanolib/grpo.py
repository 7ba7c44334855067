"""GRPO: learn from answers that can be graded (arXiv:2402.03300, simplified as in the original).

A step samples several answers to each of some questions and raises the probability of those better
than their question's average: advantage = reward − mean. No value network, no KL penalty, no
division by the standard deviation (arXiv:2503.20783). The loss is a mean over all tokens of the
step that the policy chose. To the `Trainer` this is a source and a loss, like any other stage's.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolib.config import GRPOConfig
from nanolib.data.packing import IGNORED, Batch, batch_of_rows, groups
from nanolib.engine import Answer
from nanolib.evals.answers import Questions
from nanolib.rundir import Metrics
from nanolib.runtime import seed_of

Reward = Callable[[int, Sequence[str]], Sequence[float]]  # question, its answers -> one each

PADDING = 16  # a batch's length is a multiple of this: fewer shapes to compile for


# ---------------------------------------------------------------------------- the loss


def advantages(rewards: Sequence[float]) -> list[float]:
    """How much better each of a question's answers is than their average."""
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


class PolicyGradient:
    """−Σ advantage · log p / tokens, or PPO's clipped objective where a rollout is used again.

    A field "old_nll" (`nll` before the first update) makes it PPO's (arXiv:1707.06347): the ratio
    of new to old probability, clipped to 1 ± `clip`. At a ratio of 1 the gradients are the same.
    """

    def __init__(self, clip: float = 0.2):
        self.clip = clip

    def count(self, batch: Batch) -> int:
        return int((batch.targets_BT != IGNORED).sum())

    def sum(self, nll_BT: Tensor, batch: Batch) -> Tensor:
        advantage_BT = batch.fields["advantage"]
        old_nll_BT = batch.fields.get("old_nll")
        if old_nll_BT is None:
            return (advantage_BT * nll_BT).sum()
        ratio_BT = torch.exp(old_nll_BT - nll_BT)
        clipped_BT = ratio_BT.clamp(1 - self.clip, 1 + self.clip)
        gain_BT = torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
        return -gain_BT.masked_fill(batch.targets_BT == IGNORED, 0).sum()


# ---------------------------------------------------------------------------- the source


@dataclass(frozen=True, slots=True)
class Rollout:
    question: int
    answers: list[Answer]
    texts: list[str]
    rewards: list[float]


@dataclass(kw_only=True, eq=False)
class RolloutSource:
    """Batches of a step's own rollouts: a function of (weights, seed, step).

    Each epoch draws a new order of the questions; question i of a step goes, with all its samples,
    to rank i mod world size. A micro-batch has at most the tokens of `device_batch` whole contexts
    (None: this rank's share). `nll` is the training forward pass, `reward` None the task's grade.
    Each step appends a row of kind "rollout" to `metrics`.
    """

    questions: Questions
    config: GRPOConfig
    seed: int
    device_batch: int | None = None
    reward: Reward | None = None
    nll: Callable[[Batch], Tensor] | None = None
    metrics: Metrics | None = None

    def __post_init__(self) -> None:
        self.engine, self.runtime = self.questions.engine, self.questions.engine.runtime
        self.usable = self.questions.usable()
        rows = self.device_batch or self.config.questions * self.config.samples
        self.device_tokens = rows * self.engine.context

    @torch.no_grad()
    def updates(self, step: int) -> list[list[Batch]]:
        rollouts = self.rollouts(step)
        self._record(step + 1, rollouts)
        batches = list(self._batches(rollouts))
        if self.config.updates_each > 1:
            nll = self.nll or self.engine.model.nll
            for number, batch in enumerate(batches):
                with self.runtime.autocast():
                    old_nll_BT = nll(batch.to(self.runtime.device))
                batches[number] = replace(batch, fields=batch.fields | {"old_nll": old_nll_BT})
        return [batches] * self.config.updates_each

    def rollouts(self, step: int) -> list[Rollout]:
        """This rank's."""
        config, count, orders = self.config, len(self.usable), {}
        first = step * config.questions
        draws = range(first, first + config.questions)[self.runtime.rank :: self.runtime.world_size]
        for epoch in {draw // count for draw in draws}:
            rng = np.random.default_rng(seed_of(self.seed, "questions", epoch))
            orders[epoch] = rng.permutation(self.usable)
        questions = [int(orders[draw // count][draw % count]) for draw in draws]
        seeds = [seed_of(self.seed, "rollout", draw) for draw in draws]
        sampling = {"temperature": config.temperature, "top_k": config.top_k}
        answers = self.questions.answers(questions, config.samples, seeds=seeds, **sampling)
        self.engine.release()  # training needs the memory, and changes the weights
        return [self._graded(*pair) for pair in zip(questions, answers, strict=True)]

    def _graded(self, question: int, answers: list[Answer]) -> Rollout:
        texts = [self.questions.text(answer) for answer in answers]
        graded = (self.reward or self.questions.rewards)(question, texts)
        rewards = [float(reward) for reward in graded]
        for text, reward in zip(texts, rewards, strict=True):
            if not math.isfinite(reward):
                of = f"question {question} of {self.questions.task.name}"
                got = f"the reward of {of} is {reward} for the answer {text[:80]!r}"
                raise ValueError(f"{got}; a reward must be a finite number")
        if self.config.shuffled:
            key = hashlib.sha256("\0".join(texts).encode()).hexdigest()
            rng = np.random.default_rng(seed_of(self.seed, "shuffled", question, key))
            rewards = rng.permutation(rewards).tolist()
        return Rollout(question, answers, texts, rewards)

    def _batches(self, rollouts: Sequence[Rollout]) -> Iterator[Batch]:
        rows: list[tuple[np.ndarray, np.ndarray, float]] = []  # ids, targets or not, advantage
        for rollout in rollouts:
            prompt = self.questions.prompt(rollout.question)
            for answer, advantage in zip(rollout.answers, advantages(rollout.rewards), strict=True):
                end = [] if answer.end is None else [answer.end]  # the policy chose it too
                chosen = [False] * len(prompt) + answer.chosen + [True] * len(end)
                rows.append((np.array(prompt + answer.ids + end), np.array(chosen), advantage))
        rows.sort(key=lambda row: len(row[0]))
        for group in groups([_padded(row[0]) for row in rows], self.device_tokens):
            ids, chosen, values = zip(*(rows[i] for i in group), strict=True)
            length = _padded(ids[-1])
            batch = batch_of_rows(ids, chosen, length, self.engine.tokenizer.bos)
            advantage_BT = torch.tensor(values)[:, None].expand(-1, length).contiguous()
            yield replace(batch, fields={"advantage": advantage_BT})

    def _record(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """One metrics row over all ranks' rollouts, with two answers to one question."""
        pairs = (pair for r in rollouts for pair in zip(r.answers, r.rewards, strict=True))
        mine = [(reward, len(answer.ids), answer.end is None) for answer, reward in pairs]
        mixed = sum(len(set(rollout.rewards)) > 1 for rollout in rollouts)
        gathered = self.runtime.gather((mine, mixed))
        if self.metrics is None or not self.runtime.is_lead:
            return
        answers = [answer for part, _ in gathered for answer in part]
        reward, tokens, cut = (sum(column) / len(answers) for column in zip(*answers, strict=True))
        self.metrics.append(
            kind="rollout",
            step=step,
            reward=reward,
            # Of the questions: where all answers earn the same, nothing is learned.
            mixed=sum(mixed for _, mixed in gathered) / self.config.questions,
            answer_tokens=tokens,
            cut=cut,  # answers that reached a limit
            samples=list(self._extremes(rollouts)),
        )

    def _extremes(self, rollouts: Sequence[Rollout]) -> Iterator[list[Any]]:
        """The best and the worst answer to the question with the widest range of rewards."""
        rollout = max(rollouts, key=lambda r: max(r.rewards) - min(r.rewards))
        question = self.questions.task.unanswered(rollout.question).messages[-1].text
        order = np.argsort(rollout.rewards, kind="stable").tolist()
        for i in dict.fromkeys([order[-1], order[0]]):
            answer = self.engine.tokenizer.decode(rollout.answers[i].ids)
            yield [question, answer, rollout.rewards[i]]


def _padded(ids: np.ndarray) -> int:
    return math.ceil((len(ids) - 1) / PADDING) * PADDING
