"""GRPO against the textbook: explicit log-probabilities, one answer at a time."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from test_engine import TOKENIZER, reverse, tool_engine
from torch.testing import assert_close

from nanolib.config import GRPOConfig, OptimConfig, Recipe, Schedule, flatten
from nanolib.conversation import Conversation
from nanolib.data.packing import IGNORED, Batch
from nanolib.evals.answers import Questions
from nanolib.grpo import RolloutSource, advantages, kl_k3, policy_gradient
from nanolib.guard import Guard
from nanolib.optim import MuonAdamW
from nanolib.rundir import StageDir
from nanolib.tasks import GradedTask
from nanolib.train import Stopped, Trainer


class Parity(GradedTask):
    """Right is what has an even number of characters."""

    name = "parity"

    def __init__(self, questions=("a", "bcd", "ef", "g", "hi", "jkl", "mn")):
        self.questions = questions

    def __len__(self):
        return len(self.questions)

    def conversation(self, i):
        return Conversation.ask(self.questions[i], "the reference answer, never shown")

    def grade(self, i, answer):
        return len(answer) % 2 == 0

    def formatted(self, answer):
        return len(answer) < 8


def ask(task=None, max_new_tokens=24, seed=7, tool=reverse) -> Questions:
    return Questions(tool_engine(seed, tool=tool), task or Parity(), max_new_tokens)


def source(asked=None, seed=5, reward=None, device_batch=None, **config) -> RolloutSource:
    config = GRPOConfig(**{"questions": 3, "samples": 4, "top_k": None, **config})
    given = {"seed": seed, "device_batch": device_batch, "reward": reward}
    return RolloutSource(questions=asked or ask(), config=config, **given)


def trainer(folder, source, steps=6, lr=0.3, guard=None, **settings) -> Trainer:
    stage = StageDir("grpo", folder)
    source.metrics = stage.metrics
    runtime, model = source.runtime, source.engine.model
    given = {"save_every": 2, "eval_every": 3} | settings
    return Trainer(
        stage=stage,
        model=model,
        optimizer=MuonAdamW(model, OptimConfig(), runtime),
        source=source,
        schedule=Schedule(lr=lr),
        steps=steps,
        runtime=runtime,
        guard=guard or Guard(),
        about={"recipe": flatten(Recipe()), "vocab_size": model.vocab_size, "tokenizer": "x"},
        loss=partial(policy_gradient, GRPOConfig()),
        **given,
    )


# ---------------------------------------------------------------------------- the loss


def textbook(source: RolloutSource, step: int = 0) -> tuple[torch.Tensor, int]:
    """−Σ (reward − mean) · log p(token | all before) / tokens, each answer by itself."""
    total, tokens = torch.zeros(()), 0
    for rollout in source.rollouts(step):
        mean = sum(rollout.rewards) / len(rollout.rewards)
        for answer, reward in zip(rollout.answers, rollout.rewards, strict=True):
            prompt = source.questions.prompt(rollout.question)
            said = answer.ids + ([] if answer.end is None else [answer.end])
            logits = source.engine.model(torch.tensor([prompt + said]))[0]
            for place, id in enumerate(said):
                if place < len(answer.ids) and not answer.chosen[place]:
                    continue  # the tool's
                log_p = logits[len(prompt) + place - 1].log_softmax(-1)[id]
                total = total - (reward - mean) * log_p
                tokens += 1
    return total / tokens, tokens


@pytest.mark.parametrize("device_batch", [None, 1])
def test_the_gradient_is_the_textbooks(device_batch, tmp_path):
    rollouts = source(device_batch=device_batch)
    answers = [a for rollout in rollouts.rollouts(0) for a in rollout.answers]
    assert sum(not chosen for answer in answers for chosen in answer.chosen) > 5, "no tool was used"
    assert {answer.end is None for answer in answers} == {True, False}
    loss, tokens = textbook(rollouts)
    weights = list(rollouts.engine.model.parameters())
    expected = torch.autograd.grad(loss, weights)
    (batches,) = rollouts.updates(0)
    assert (len(batches) == 1) == (device_batch is None)
    if device_batch is not None:
        assert all(batch.targets_BT.numel() <= 96 for batch in batches)
        assert any(len(batch.targets_BT) > 1 for batch in batches)
    assert sum(batch.count for batch in batches) == tokens
    found = trainer(tmp_path, rollouts).forward_backward(batches, tokens)
    assert math.isclose(found, loss.item(), rel_tol=1e-4, abs_tol=1e-6)
    for weight, grad in zip(weights, expected, strict=True):
        assert grad.abs().max() > 1e-6
        assert_close(weight.grad, grad, rtol=1e-3, atol=1e-6)


def test_advantages_of_a_question_sum_to_nothing():
    assert advantages([1, 0, 0, 0]) == [0.75, -0.25, -0.25, -0.25]
    assert advantages([1, 1, 1]) == [0, 0, 0]
    assert advantages([2.5]) == [0]


def a_batch(nll, old, advantage, targets) -> tuple[torch.Tensor, Batch]:
    fields = {"advantage": torch.tensor([advantage]), "old_nll": torch.tensor([old])}
    ids = torch.tensor([targets])
    return torch.tensor([nll], requires_grad=True), Batch(
        inputs_BT=ids, targets_BT=ids, fields=fields
    )


def test_the_clipped_gain_token_by_token():
    old = [1.0, 1.0, 1.0, 1.0, 0.0]
    nll = [1.1, 0.5, 1.5, 0.5, 0.0]  # ratios 0.90, 1.65, 0.61, 1.65; the last is ignored
    advantage = [1.0, 1.0, -1.0, -1.0, 1.0]
    nll_BT, batch = a_batch(nll, old, advantage, [7, 7, 7, 7, IGNORED])
    loss = policy_gradient(GRPOConfig(clip=0.2), nll_BT, batch)
    gains = [math.exp(-0.1), 1.2, -0.8, -math.exp(0.5)]
    assert_close(loss.item(), -sum(gains))
    loss.backward()
    # Only what is not clipped still pulls: by advantage · ratio.
    assert_close(nll_BT.grad[0], torch.tensor([math.exp(-0.1), 0, 0, -math.exp(0.5), 0]))


def test_at_a_ratio_of_one_clipped_and_plain_pull_alike():
    nll = [0.3, 2.0, 0.0]
    nll_BT, batch = a_batch(nll, nll, [0.5, -0.25, 0.5], [7, 7, IGNORED])
    clipped = torch.autograd.grad(policy_gradient(GRPOConfig(), nll_BT, batch), nll_BT)[0]
    plain = dataclasses.replace(batch, fields={"advantage": batch.fields["advantage"]})
    expected = torch.autograd.grad(policy_gradient(GRPOConfig(), nll_BT, plain), nll_BT)[0]
    assert_close(clipped[0, :2], expected[0, :2])


def test_several_updates_hold_on_to_the_probabilities_before_the_first(tmp_path):
    rollouts = source(updates_each=3)
    first, *more = updates = rollouts.updates(0)
    assert len(updates) == 3 and all(again is first for again in more)
    (batch,) = first
    with torch.no_grad():
        assert_close(batch.fields["old_nll"], rollouts.engine.model.nll(batch))
    loop = trainer(tmp_path, rollouts, lr=2.0)
    before = batch.fields["old_nll"].clone()
    row, *_ = loop.train_step()
    assert row["tokens"] == 3 * batch.count
    with torch.no_grad():
        assert not torch.allclose(rollouts.engine.model.nll(batch), before, atol=1e-3)
    assert batch.fields["old_nll"].equal(before)


def test_advantages_in_standard_deviations():
    found = advantages([1, 0, 0, 0], deviation=True)  # whose deviation is √3 / 4
    assert found == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3], rel=1e-4)
    assert advantages([1, 1, 1], deviation=True) == [0, 0, 0]


def test_further_up_than_down_may_a_ratio_go_before_it_is_clipped():
    old = [1.0] * 5
    nll = [0.8, 0.7, 1.3, 0.7, 1.2]  # ratios 1.22, 1.35, 0.74, 1.35, 0.82
    nll_BT, batch = a_batch(nll, old, [1.0, 1.0, -1.0, -1.0, -1.0], [7] * 5)
    loss = policy_gradient(GRPOConfig(clip=0.2, clip_high=0.28), nll_BT, batch)
    assert_close(loss.item(), -math.exp(0.2) - 1.28 + 0.8 + math.exp(0.3) + math.exp(-0.2))
    loss.backward()
    pulls = [math.exp(0.2), 0, 0, -math.exp(0.3), -math.exp(-0.2)]
    assert_close(nll_BT.grad[0], torch.tensor(pulls))


def test_cispo_limits_how_hard_a_token_pulls_and_loses_none():
    old = [1.0] * 5
    nll = [0.8, 0.5, 1.5, 0.5, 0.0]  # ratios 1.22, 1.65, 0.61, 1.65; the last is ignored
    advantage = [1.0, 1.0, -1.0, -1.0, 1.0]
    nll_BT, batch = a_batch(nll, old, advantage, [7, 7, 7, 7, IGNORED])
    loss = policy_gradient(GRPOConfig(clip_high=0.28, objective="cispo"), nll_BT, batch)
    weights = [math.exp(0.2), 1.28, math.exp(-0.5), 1.28, 0]
    pulls = [w * a for w, a in zip(weights, advantage, strict=True)]
    assert_close(loss.item(), sum(p * n for p, n in zip(pulls, nll, strict=True)))
    loss.backward()
    assert_close(nll_BT.grad[0], torch.tensor(pulls))


def test_the_penalty_is_an_estimate_of_the_divergence():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
    each = kl_k3(-p.log(), -q.log())  # of drawing each of three tokens
    assert (each >= 0).all()
    assert_close((p * each).sum(), (p * (p / q).log()).sum())


def test_the_penalty_is_added_token_by_token():
    nll, start = [1.0, 2.0, 0.5], [1.5, 1.0, 0.5]
    nll_BT, batch = a_batch(nll, nll, [0.5, -0.25, 0.0], [7, 7, IGNORED])
    fields = {"advantage": batch.fields["advantage"], "reference_nll": torch.tensor([start])}
    batch = dataclasses.replace(batch, fields=fields)
    loss = policy_gradient(GRPOConfig(kl=0.1), nll_BT, batch)
    penalty = sum(math.exp(n - s) - 1 - (n - s) for n, s in ((1.0, 1.5), (2.0, 1.0)))
    assert_close(loss.item(), 0.5 * 1.0 - 0.25 * 2.0 + 0.1 * penalty)
    loss.backward()  # towards the start
    expected = [0.5 + 0.1 * (math.exp(-0.5) - 1), -0.25 + 0.1 * (math.e - 1), 0]
    assert_close(nll_BT.grad[0], torch.tensor(expected))


def test_sequence_mean_counts_each_answer_alike():
    rollouts = source(sequence_mean=True, device_batch=1)
    nll = rollouts.engine.model.nll
    (batches,) = rollouts.updates(0)
    found = sum(policy_gradient(GRPOConfig(), nll(b), b) for b in batches)
    found /= sum(batch.count for batch in batches)
    means = []
    for rollout in rollouts.rollouts(0):
        for answer, advantage in zip(rollout.answers, advantages(rollout.rewards), strict=True):
            prompt = rollouts.questions.prompt(rollout.question)
            said = answer.ids + ([] if answer.end is None else [answer.end])
            chosen = [*answer.chosen, True][: len(said)]
            logits = rollouts.engine.model(torch.tensor([prompt + said]))[0, len(prompt) - 1 : -1]
            log_p = logits.log_softmax(-1)[range(len(said)), said][torch.tensor(chosen)]
            means.append(-advantage * log_p.mean())
    assert len({len(a.ids) for r in rollouts.rollouts(0) for a in r.answers}) > 2
    assert_close(found, sum(means) / len(means), rtol=1e-4, atol=1e-6)


def test_questions_without_signal_are_left_out_if_any_has_one():
    def of_one(question, texts):
        return [float(i == 0 and question == asked[0]) for i in range(len(texts))]

    asked = [source().rollouts(0)[1].question]
    rollouts = source(skip_equal=True, reward=of_one)
    (batches,) = rollouts.updates(0)
    assert sum(len(batch.targets_BT) for batch in batches) == 4  # its samples
    assert all(batch.fields["advantage"].any(1).all() for batch in batches)
    (batches,) = source(skip_equal=True, reward=lambda question, texts: [1.0] * 4).updates(0)
    assert sum(len(batch.targets_BT) for batch in batches) == 4
    assert not any(batch.fields["advantage"].any() for batch in batches)


# ---------------------------------------------------------------------------- rollouts


def test_a_step_is_a_function_of_weights_seed_and_step():
    first = source().rollouts(2)
    assert source().rollouts(2) == first
    assert source(seed=6).rollouts(2) != first
    assert source().rollouts(3) != first
    assert len({tuple(a.ids) for rollout in first for a in rollout.answers}) > 6


def test_every_question_comes_once_an_epoch():
    rollouts = source(questions=7, samples=1)
    orders = [[r.question for r in rollouts.rollouts(step)] for step in range(3)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(map(tuple, orders))) == 3


def test_the_ranks_share_the_questions_with_all_their_samples():
    whole, asked = source().rollouts(1), ask()
    parts = []
    for rank in (0, 1):
        asked.engine.runtime = dataclasses.replace(asked.engine.runtime, rank=rank, world_size=2)
        parts.append(source(asked).rollouts(1))
    assert [len(part) for part in parts] == [2, 1]
    assert [parts[i % 2][i // 2] for i in range(3)] == whole


def test_the_reference_is_never_in_the_prompt():
    asked = ask()
    assert TOKENIZER.decode(asked.prompt(1)) == (
        "<|bos|><|user_start|>bcd<|user_end|><|assistant_start|>"
    )


def test_questions_without_room_for_an_answer_are_left_out():
    asked = ask(Parity(("a", "x" * 80, "b")), max_new_tokens=24)
    assert asked.usable() == [0, 2]
    assert {r.question for r in source(asked, questions=4).rollouts(0)} == {0, 2}
    with pytest.raises(ValueError, match="no question of parity leaves room for 24 tokens"):
        source(ask(Parity(("x" * 80,))))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_named(bad):
    rollouts = source(reward=lambda question, texts: [1.0, bad, 0.0, 1.0])
    with pytest.raises(ValueError, match=rf"reward of question \d of parity is {bad} for the"):
        rollouts.updates(0)


def test_python_and_its_output_are_not_graded():
    asked = ask(tool=lambda source: "#### 5")
    rollouts = source(asked).rollouts(0)
    assert any(not all(answer.chosen) for rollout in rollouts for answer in rollout.answers)
    for rollout in rollouts:
        for answer, text, reward in zip(
            rollout.answers, rollout.texts, rollout.rewards, strict=True
        ):
            assert "####" not in text
            assert reward == (len(text) % 2 == 0)
            assert ("#" in TOKENIZER.decode(answer.ids)) or all(answer.chosen)


def lengths(question, texts):
    return [float(len(text)) for text in texts]


def test_shuffled_rewards_are_the_same_ones_dealt_anew():
    honest, dealt = (source(reward=lengths, samples=8, shuffled=on) for on in (False, True))
    orders = []
    for one, other in zip(honest.rollouts(0), dealt.rollouts(0), strict=True):
        assert one.answers == other.answers
        assert sorted(one.rewards) == sorted(other.rewards)
        assert one.rewards != other.rewards
        orders.append(tuple(map(one.rewards.index, other.rewards)))
    assert len(set(orders)) > 1
    assert dealt.rollouts(0) == source(reward=lengths, samples=8, shuffled=True).rollouts(0)


def test_each_step_leaves_a_row(tmp_path):
    rollouts = source()
    loop = trainer(tmp_path, rollouts, steps=2)
    expected = rollouts.rollouts(0)
    loop.fit()
    row = loop.stage.metrics.rows()[0]
    rewards = [reward for rollout in expected for reward in rollout.rewards]
    answers = [answer for rollout in expected for answer in rollout.answers]
    assert (row["kind"], row["step"]) == ("rollout", 1)
    assert row["reward"] == pytest.approx(sum(rewards) / 12)
    assert row["mixed"] == pytest.approx(sum(len(set(r.rewards)) > 1 for r in expected) / 3)
    assert row["answer_tokens"] == pytest.approx(sum(len(a.ids) for a in answers) / 12)
    assert row["cut"] == pytest.approx(sum(a.end is None for a in answers) / 12)
    texts = [text for rollout in expected for text in rollout.texts]
    assert row["formatted"] == pytest.approx(sum(len(text) < 8 for text in texts) / 12)
    assert row["tool"] == pytest.approx(sum(not all(a.chosen) for a in answers) / 12)
    assert 0 < row["formatted"] < 1 and 0 < row["tool"] < 1
    (question, best, one), (_, worst, zero) = row["samples"]
    assert question in Parity().questions and best != worst and (one, zero) == (1, 0)
    assert [row["step"] for row in loop.stage.metrics.rows() if row["kind"] == "rollout"] == [1, 2]


def test_entropy_and_divergence_are_those_of_what_was_drawn(tmp_path):
    rollouts, other = source(device_batch=1), ask(seed=8).engine.model
    rollouts.reference, rollouts.metrics = other.nll, StageDir("grpo", tmp_path).metrics
    (batches,) = rollouts.updates(0)
    (row,) = rollouts.metrics.rows("rollout")
    with torch.no_grad():
        pairs = [(rollouts.engine.model.nll(b), other.nll(b), b.targets_BT) for b in batches]
    mine, start = ([n for p in pairs for n in p[i][p[2] != IGNORED].tolist()] for i in (0, 1))
    assert row["entropy"] == pytest.approx(sum(mine) / len(mine), rel=1e-5)
    ratios = [math.exp(a - b) for a, b in zip(mine, start, strict=True)]  # reference to policy
    k3 = [r - 1 - math.log(r) for r in ratios]
    assert row["kl"] == pytest.approx(sum(k3) / len(k3), rel=1e-4)
    assert row["kl"] > 0.001


# ---------------------------------------------------------------------------- as a stage


def test_resumed_equals_straight(tmp_path):
    def without_time(rows):
        timed = ("seconds", "seconds_left", "tokens_per_second")
        return [{k: v for k, v in row.items() if k not in timed} for row in rows]

    straight = trainer(tmp_path / "a", source())
    straight.fit()
    first = trainer(tmp_path / "b", source(), save_every=5)
    log = first.log

    def stop_after_three(*given):
        log(*given)
        if first.step == 3:
            first.guard.request_stop()

    first.log = stop_after_three
    with pytest.raises(Stopped, match="saved after step 4 of 6"):
        first.fit()
    second = trainer(tmp_path / "b", source(ask(seed=9)))  # its weights come from the checkpoint
    second.fit()
    for one, two in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)
    rows = without_time(straight.stage.metrics.rows())
    assert rows == without_time(second.stage.metrics.rows())
    assert [row["step"] for row in rows if row["kind"] == "rollout"] == [1, 2, 3, 4, 5, 6]


def share_of_e(question, texts):
    return [text.count("e") / max(1, len(text)) for text in texts]


@pytest.mark.parametrize("updates_each", [1, 2])
def test_it_learns_what_is_rewarded(updates_each, tmp_path):
    asked = ask(max_new_tokens=8, tool=None, seed=0)
    rollouts = source(asked, questions=3, samples=8, reward=share_of_e, updates_each=updates_each)
    loop = trainer(tmp_path, rollouts, steps=25, lr=1.0, save_every=100)
    loop.fit()
    rewards = [row["reward"] for row in loop.stage.metrics.rows() if row["kind"] == "rollout"]
    assert sum(rewards[:5]) / 5 < 0.1
    assert sum(rewards[-5:]) / 5 > 0.5


def test_equal_rewards_teach_nothing(tmp_path):
    rollouts = source(reward=lambda question, texts: [1.0] * len(texts))
    before = [weight.detach().clone() for weight in rollouts.engine.model.parameters()]
    row, *_ = trainer(tmp_path, rollouts).train_step()
    assert row["loss"] == 0 and row["grad_norm"] == 0
    for weight, old in zip(rollouts.engine.model.parameters(), before, strict=True):
        assert weight.equal(old)
