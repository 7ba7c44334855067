"""GRPO: learn from answers that can be graded (arXiv:2402.03300, simplified as in the original).

A step takes some questions, lets the model answer each several times, and raises the probability
of answers that were better than their question's average: advantage = reward − mean. There is no
value network, no KL penalty and no division by the standard deviation (arXiv:2503.20783), and the
loss is a mean over all tokens of the step that the model chose. What a tool put in is no target.

To the `Trainer` this is a source of batches and a loss, like any other stage's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolib.conversation import Conversation, Message, answer_parts
from nanolib.data.packing import IGNORED, Batch, batch_of_rows, groups
from nanolib.engine import Answer, Engine
from nanolib.rundir import Metrics
from nanolib.runtime import seed_of
from nanolib.tasks import GradedTask

Reward = Callable[[int, Sequence[str]], Sequence[float]]  # question, its answers -> one each

ROWS_AT_ONCE = 256  # sampled together
PADDING = 16  # a batch's length is a multiple of this: fewer shapes to compile for


# ---------------------------------------------------------------------------- the loss


def advantages(rewards: Sequence[float]) -> list[float]:
    """How much better each answer is than its question's average.

    >>> advantages([1, 0, 0, 1])
    [0.5, -0.5, -0.5, 0.5]
    """
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


class PolicyGradient:
    """−Σ advantage · log p / tokens; after the first update of a rollout PPO's clipped form.

    A batch's field "advantage" [B, T] belongs to its targets. With a field "old_nll", what `nll`
    was before the first update, the gain is that of PPO (arXiv:1707.06347): the ratio of the
    probabilities now and then, kept within 1 ± `clip`. At a ratio of 1 both have one gradient.
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


# ---------------------------------------------------------------------------- questions, answers


class Quiz:
    """A task's questions as prompts, and the grading of what is said to them.

    Questions that leave less than `max_new_tokens` of the context are left out of `usable`.
    settings: of `Engine.answers`.
    """

    def __init__(self, engine: Engine, task: GradedTask, max_new_tokens: int, **settings: Any):
        self.engine, self.task = engine, task
        self.settings = settings | {"max_new_tokens": max_new_tokens, "max_rows": ROWS_AT_ONCE}
        self.prompts = [self.asked(i).prompt(engine.tokenizer) for i in range(len(task))]
        room = engine.context - max_new_tokens
        self.usable = [i for i, prompt in enumerate(self.prompts) if len(prompt) <= room]
        if not self.usable:
            raise ValueError(
                f"no question of {task.name} leaves room for {max_new_tokens} tokens of answer in "
                f"a context of {engine.context}; lower max_new_tokens or raise model.sequence_len"
            )

    def asked(self, question: int) -> Conversation:
        """The question alone: the reference answer's turn is left out."""
        return Conversation(self.task.conversation(question).messages[:-1])

    def answers(self, questions: Sequence[int], samples: int, seeds: Sequence[int], **settings):
        """`samples` answers [questions][samples]."""
        prompts = [self.prompts[question] for question in questions]
        said = self.engine.answers(
            prompts, samples=samples, seeds=seeds, **self.settings, **settings
        )
        return [said[i : i + samples] for i in range(0, len(said), samples)]

    def text(self, answer: Answer) -> str:
        """What is graded: the text parts, without python and its outputs."""
        return Message("assistant", answer_parts(answer.ids, self.engine.tokenizer)).text

    def grade(self, question: int, texts: Sequence[str]) -> list[float]:
        """1 for each right answer, 0 for each wrong one."""
        return [float(self.task.grade(question, text)) for text in texts]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k answers is right, from `right` of `samples` (arXiv:2107.03374).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4), pass_at_k(4, 2, 2)
    (0.25, 1.0, 0.8333333333333334)
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def passes(
    quiz: Quiz,
    questions: int,
    samples: int,
    seed: int,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, float]:
    """Greedy accuracy, pass@1 and pass@`samples` on a task's first questions, over all ranks.

    `progress(done, total)` is called before each round of this rank's questions, and may raise.
    """
    runtime = quiz.engine.runtime
    chosen = quiz.usable[:questions]
    mine, at_once = chosen[runtime.rank :: runtime.world_size], max(1, ROWS_AT_ONCE // samples)
    sums = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    for start in range(0, len(mine), at_once):
        if progress is not None:
            progress(start, len(mine))
        asked = mine[start : start + at_once]
        seeds = [seed_of(seed, "passes", question) for question in asked]
        sampled = quiz.answers(asked, samples, seeds, temperature=1.0)
        greedy = quiz.answers(asked, 1, seeds)
        for question, many, (one,) in zip(asked, sampled, greedy, strict=True):
            right = int(sum(quiz.grade(question, [quiz.text(answer) for answer in many])))
            (best,) = quiz.grade(question, [quiz.text(one)])
            every = pass_at_k(samples, right, samples)
            sums += torch.tensor([best, pass_at_k(samples, right, 1), every], device=sums.device)
    shares = (runtime.sum(sums) / len(chosen)).tolist()
    return dict(zip(("greedy", "pass@1", f"pass@{samples}"), shares, strict=True))


# ---------------------------------------------------------------------------- the source


@dataclass(frozen=True, slots=True)
class Rollout:
    """All sampled answers to one question, and the reward of each."""

    question: int
    answers: list[Answer]
    texts: list[str]
    rewards: list[float]


class RolloutSource:
    """Batches of a step's own rollouts: a function of (weights, seed, step).

    `questions` a step (over all ranks; question i goes to rank i mod ranks with all its `samples`)
    in a new order every epoch. `updates_each` > 1: so many updates on the same rollouts, clipped;
    `nll` is then the training forward that gives the old log-probabilities. A micro-batch has at
    most the tokens of `device_batch` rows of the whole context (None: it is this rank's share).
    `reward` None: the task's own grade. Each step leaves a row of kind "rollout" in `metrics`.
    Raises ValueError for a reward that is not finite, and where the ranks outnumber the questions.
    """

    def __init__(
        self,
        quiz: Quiz,
        *,
        questions: int,
        samples: int,
        seed: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        updates_each: int = 1,
        device_batch: int | None = None,
        reward: Reward | None = None,
        nll: Callable[[Batch], Tensor] | None = None,
        metrics: Metrics | None = None,
    ):
        self.quiz, self.questions, self.samples, self.seed = quiz, questions, samples, seed
        self.engine, self.runtime = quiz.engine, quiz.engine.runtime
        self.settings = {"temperature": temperature, "top_k": top_k}
        self.updates_each = updates_each
        self.device_tokens = (device_batch or questions * samples) * self.engine.context
        self.reward = reward or quiz.grade
        self.nll = nll or quiz.engine.model.nll
        self.metrics = metrics
        self._order = lru_cache(maxsize=2)(self._draw_order)
        if questions < self.runtime.world_size:
            raise ValueError(
                f"{self.runtime.world_size} ranks need at least as many questions a step, got {questions}"
            )

    def updates(self, step: int) -> list[list[Batch]]:
        rollouts = self.rollouts(step)
        self._tell(step + 1, rollouts)
        batches = list(self._batches(rollouts))
        if self.updates_each > 1:
            batches = [self._with_old_nll(batch) for batch in batches]
        return [batches] * self.updates_each

    def rollouts(self, step: int) -> list[Rollout]:
        """This rank's share of a step."""
        first = step * self.questions
        places = range(first + self.runtime.rank, first + self.questions, self.runtime.world_size)
        count = len(self.quiz.usable)
        asked = [int(self._order(place // count)[place % count]) for place in places]
        seeds = [seed_of(self.seed, "rollout", place) for place in places]
        said = self.quiz.answers(asked, self.samples, seeds, **self.settings)
        return [self._graded(question, many) for question, many in zip(asked, said, strict=True)]

    def _draw_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng(seed_of(self.seed, "questions", epoch))
        return rng.permutation(self.quiz.usable)

    def _graded(self, question: int, answers: list[Answer]) -> Rollout:
        texts = [self.quiz.text(answer) for answer in answers]
        rewards = [float(reward) for reward in self.reward(question, texts)]
        for text, reward in zip(texts, rewards, strict=True):
            if not math.isfinite(reward):
                raise ValueError(
                    f"the reward of question {question} of {self.quiz.task.name} is {reward} for "
                    f"the answer {text[:80]!r}; a reward must be a finite number"
                )
        return Rollout(question, answers, texts, rewards)

    def _batches(self, rollouts: Sequence[Rollout]) -> Iterator[Batch]:
        """Micro-batches of rows of like length."""
        rows: list[tuple[np.ndarray, np.ndarray, float]] = []
        for rollout in rollouts:
            prompt = self.quiz.prompts[rollout.question]
            for answer, value in zip(rollout.answers, advantages(rollout.rewards), strict=True):
                ends = [] if answer.end is None else [answer.end]  # a choice like any other
                mask = [False] * len(prompt) + answer.chosen + [True] * len(ends)
                rows.append((np.array(prompt + answer.ids + ends), np.array(mask), value))
        rows.sort(key=lambda row: len(row[0]))
        for group in groups([_padded(row[0]) for row in rows], self.device_tokens):
            ids, masks, values = zip(*(rows[place] for place in group), strict=True)
            length = _padded(ids[-1])
            batch = batch_of_rows(ids, masks, length, self.engine.tokenizer.bos)
            advantage_BT = torch.tensor(values)[:, None].expand(-1, length).contiguous()
            yield replace(batch, fields={"advantage": advantage_BT})

    @torch.no_grad()
    def _with_old_nll(self, batch: Batch) -> Batch:
        with self.runtime.autocast():
            old_nll_BT = self.nll(batch.to(self.runtime.device))
        return replace(batch, fields=batch.fields | {"old_nll": old_nll_BT})

    def _tell(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """One row over all ranks' rollouts, with the best and the worst answer to one question."""
        sums = [
            (
                sum(rollout.rewards),
                float(len(set(rollout.rewards)) > 1),
                sum(len(answer.ids) for answer in rollout.answers),
                sum(answer.end is None for answer in rollout.answers),
            )
            for rollout in rollouts
        ]
        mine = torch.tensor(sums, dtype=torch.float64, device=self.runtime.device).sum(0)
        reward, mixed, tokens, cut = self.runtime.sum(mine).tolist()
        if self.metrics is None or not self.runtime.is_lead:
            return
        total = self.questions * self.samples
        self.metrics.append(
            kind="rollout",
            step=step,
            reward=reward / total,
            mixed=mixed
            / self.questions,  # questions whose answers differ: the others teach nothing
            answer_tokens=tokens / total,
            cut=cut / total,  # answers that met a limit
            samples=list(self._shown(rollouts)),
        )

    def _shown(self, rollouts: Sequence[Rollout]) -> Iterator[list[Any]]:
        rollout = max(rollouts, key=lambda r: max(r.rewards) - min(r.rewards))
        question = self.quiz.asked(rollout.question).messages[-1].text
        order = np.argsort(rollout.rewards, kind="stable").tolist()
        for place in dict.fromkeys([order[-1], order[0]]):
            answer = self.engine.tokenizer.decode(rollout.answers[place].ids)
            yield [question, answer, rollout.rewards[place]]


def _padded(ids: np.ndarray) -> int:
    """The length of a batch for a row of so many ids."""
    return math.ceil((len(ids) - 1) / PADDING) * PADDING
