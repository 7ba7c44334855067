"""GRPO: reinforcement learning from graded answers (arXiv:2402.03300, simplified as in nanochat).

Each step samples several answers per question and raises the probability of those with a higher
reward than their question's mean: advantage = reward − mean. There is no value network and, by
default, no KL penalty and no division by the standard deviation (arXiv:2503.20783). The loss is the
mean over all tokens sampled in the step. The `Trainer` gets a source and a loss, as in any stage.
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


def advantages(rewards: Sequence[float], deviation: bool = False) -> list[float]:
    """Reward minus the mean reward, for all answers to one question.

    deviation: also divide by the standard deviation, as in the GRPO paper, so that questions nearly
    always or nearly never answered get as much weight as the others.
    """
    mean = sum(rewards) / len(rewards)
    scale = float(np.std(rewards)) + 1e-6 if deviation else 1.0
    return [(reward - mean) / scale for reward in rewards]


def kl_k3(nll: Tensor, reference_nll: Tensor) -> Tensor:
    """Per-token, non-negative estimate of KL(policy ‖ reference) from the policy's samples.

    With r = p_reference / p it is r − 1 − log r (Schulman's k3 estimator; equation 4 of GRPO).
    """
    log_ratio = nll - reference_nll
    return log_ratio.exp() - 1 - log_ratio


def policy_gradient(config: GRPOConfig, nll_BT: Tensor, batch: Batch) -> Tensor:
    """Loss −Σ advantage · log p, or a clipped objective for repeated updates.

    Field "old_nll" (`nll` before the first update) enables the ratio of new to old probability. PPO
    (arXiv:1707.06347) clips it to 1 − `clip` … 1 + `clip_high` (DAPO, arXiv:2503.14476: a higher
    upper bound); clipped tokens get no gradient. CISPO (arXiv:2506.13585) caps the ratio and uses it
    as a constant weight. At ratio 1 all three have the same gradient. `kl` is the weight of `kl_k3`
    to field "reference_nll"; field "weight" holds token weights.
    """
    advantage_BT, old_nll_BT = batch.fields["advantage"], batch.fields.get("old_nll")
    low, high = 1 - config.clip, 1 + (config.clip_high or config.clip)
    if old_nll_BT is None:
        loss_BT = advantage_BT * nll_BT
    elif config.objective == "cispo":
        weight_BT = torch.exp(old_nll_BT - nll_BT).detach().clamp(max=high)
        loss_BT = weight_BT * advantage_BT * nll_BT
    else:
        ratio_BT = torch.exp(old_nll_BT - nll_BT)
        clipped_BT = ratio_BT.clamp(low, high)
        loss_BT = -torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
    if config.kl:
        loss_BT = loss_BT + config.kl * kl_k3(nll_BT, batch.fields["reference_nll"])
    if "weight" in batch.fields:
        loss_BT = loss_BT * batch.fields["weight"]
    return loss_BT.masked_fill(batch.targets_BT == IGNORED, 0).sum()


# ---------------------------------------------------------------------------- the source


@dataclass(frozen=True, slots=True)
class Rollout:
    question: int
    answers: list[Answer]
    texts: list[str]
    rewards: list[float]


@dataclass(kw_only=True, eq=False)
class RolloutSource:
    """Samples rollouts from the current policy and batches them; depends on (weights, seed, step).

    Questions are shuffled each epoch; question i of a step, with all samples, goes to rank i mod
    world size. A micro-batch holds at most as many tokens as `device_batch` full contexts (None: no
    limit). `nll`: the training forward pass. `reference`: that of the initial model, for the KL.
    `reward`: None for the task's grade. Each step appends a "rollout" row to `metrics`.
    """

    questions: Questions
    config: GRPOConfig
    seed: int
    device_batch: int | None = None
    reward: Reward | None = None
    nll: Callable[[Batch], Tensor] | None = None
    reference: Callable[[Batch], Tensor] | None = None
    metrics: Metrics | None = None

    def __post_init__(self) -> None:
        self.engine, self.runtime = self.questions.engine, self.questions.engine.runtime
        self.usable = self.questions.usable()
        rows = self.device_batch or self.config.questions * self.config.samples
        self.device_tokens = rows * self.engine.context

    def updates(self, step: int) -> list[list[Batch]]:
        rollouts = kept = self.rollouts(step)
        if self.config.skip_equal:  # unlike DAPO, without drawing replacements
            kept = [r for r in rollouts if len(set(r.rewards)) > 1] or rollouts[:1]
        batches, sums = [], torch.zeros(3, dtype=torch.float64, device=self.runtime.device)
        for batch in self._batches(kept):
            sums += self._measure(batch)
            batches.append(batch)
        self._record(step + 1, rollouts, self.runtime.sum(sums).tolist())
        return [batches] * self.config.updates_each

    @torch.no_grad()
    def _measure(self, batch: Batch) -> Tensor:
        """Add the fields that the loss needs; returns (tokens, Σ nll, Σ KL to `reference`)."""
        there = batch.to(self.runtime.device)
        with self.runtime.autocast():
            nll_BT = (self.nll or self.engine.model.nll)(there)
            reference_BT = self.reference(there) if self.reference else nll_BT
        if self.config.updates_each > 1:
            batch.fields["old_nll"] = nll_BT
        if self.reference:
            batch.fields["reference_nll"] = reference_BT
        # Both are 0 where there is no target.
        sums = nll_BT.sum(), kl_k3(nll_BT, reference_BT).sum()
        return torch.stack((torch.tensor(batch.count, device=nll_BT.device), *sums))

    def rollouts(self, step: int) -> list[Rollout]:
        """This rank's rollouts for a step."""
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
        self.engine.release()  # frees memory for training, which changes the weights
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
        rows: list[tuple[np.ndarray, np.ndarray, float]] = []  # ids, target mask, advantage
        for rollout in rollouts:
            prompt = self.questions.prompt(rollout.question)
            values = advantages(rollout.rewards, self.config.deviation)
            for answer, advantage in zip(rollout.answers, values, strict=True):
                end = [] if answer.end is None else [answer.end]  # also sampled by the policy
                chosen = [False] * len(prompt) + answer.chosen + [True] * len(end)
                rows.append((np.array(prompt + answer.ids + end), np.array(chosen), advantage))
        rows.sort(key=lambda row: len(row[0]))
        weights = self._weights([max(1, int(chosen.sum())) for _, chosen, _ in rows])
        for group in groups([_padded(row[0]) for row in rows], self.device_tokens):
            ids, chosen, values = zip(*(rows[i] for i in group), strict=True)
            length = _padded(ids[-1])
            batch = batch_of_rows(ids, chosen, length, self.engine.tokenizer.bos)
            fields = {"advantage": torch.tensor(values)}
            if weights is not None:
                fields["weight"] = weights[group]
            spread = {k: v[:, None].expand(-1, length).contiguous() for k, v in fields.items()}
            yield replace(batch, fields=spread)

    def _weights(self, tokens: list[int]) -> Tensor | None:
        """Per-answer token weights that turn the mean over tokens into a mean over answers."""
        if not self.config.sequence_mean:
            return None
        total = torch.tensor([sum(tokens), len(tokens)], device=self.runtime.device)
        all_tokens, answers = self.runtime.sum(total).tolist()
        return all_tokens / answers / torch.tensor(tokens)

    def _record(self, step: int, rollouts: Sequence[Rollout], sums: Sequence[float]) -> None:
        """Append one metrics row for all ranks' rollouts, with two sample answers."""
        formatted = self.questions.task.formatted
        triples = (it for r in rollouts for it in zip(r.answers, r.texts, r.rewards, strict=True))
        mine = [
            {
                "reward": reward,
                "answer_tokens": len(answer.ids),
                "cut": answer.end is None,  # it reached a length limit
                "formatted": formatted(text),
                "tool": not all(answer.chosen),
            }
            for answer, text, reward in triples
        ]
        mixed = sum(len(set(rollout.rewards)) > 1 for rollout in rollouts)
        gathered = self.runtime.gather((mine, mixed))
        if self.metrics is None or not self.runtime.is_lead:
            return
        answers = [answer for part, _ in gathered for answer in part]
        means = {key: sum(it[key] for it in answers) / len(answers) for key in answers[0]}
        # Questions with unequal rewards: the others give no gradient.
        means["mixed"] = sum(mixed for _, mixed in gathered) / self.config.questions
        tokens, nll, kl = sums
        means["entropy"] = nll / tokens  # nats per token: the mean nll of the sampled tokens
        if self.reference:
            means["kl"] = kl / tokens  # nats per token, before this step's update
        samples = list(self._extremes(rollouts))
        self.metrics.append(kind="rollout", step=step, **means, samples=samples)

    def _extremes(self, rollouts: Sequence[Rollout]) -> Iterator[list[Any]]:
        """Best and worst answer to the question with the widest range of rewards."""
        rollout = max(rollouts, key=lambda r: max(r.rewards) - min(r.rewards))
        question = self.questions.task.unanswered(rollout.question).messages[-1].text
        order = np.argsort(rollout.rewards, kind="stable").tolist()
        for i in dict.fromkeys([order[-1], order[0]]):
            answer = self.engine.tokenizer.decode(rollout.answers[i].ids)
            yield [question, answer, rollout.rewards[i]]


def _padded(ids: np.ndarray) -> int:
    return math.ceil((len(ids) - 1) / PADDING) * PADDING
