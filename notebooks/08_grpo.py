# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     notebook_metadata_filter: kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 · Learning from answers that can be graded
#
# So far the model imitates: it is shown an answer and makes it likelier. But for a word problem we need
# not show anything. We can let the model answer in its own way, several times, and *grade* what it says:
# 1 for the right number, 0 for any other. Then make likely what was right. That is **reinforcement
# learning**, and the form of it that language models use, **GRPO**, is short.
#
# **You will learn** where the gradient of a reward comes from, what a baseline is for, why a question that
# is always answered right teaches nothing, which tokens an answer is responsible for, how pass@k is
# counted, what clipping does, and how to tell learning from a drift: by a control.
#
# **Takes** twenty minutes to read. The stage trains for two or three minutes in profile `demo` on two CPU
# cores. Stages: `grpo`, then `eval` of `grpo`.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import itertools
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.testing import assert_close

import lesson
from nanolib import checkpoint, grpo, launch, tasks
from nanolib.config import ModelConfig
from nanolib.data.packing import Batch, batch_of_rows
from nanolib.engine import Engine
from nanolib.evals.answers import Questions, pass_at_k
from nanolib.grpo import PolicyGradient, RolloutSource
from nanolib.model import GPT
from nanolib.runtime import Runtime
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox

run = lesson.begin(profile, run, overrides)
before = launch.stage("eval", run, of="sft", watch=lesson.Live())  # chapter 07's, if not there yet
tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)

# %% [markdown]
# ## 1. Four buttons
#
# Forget texts for a moment. There are four buttons, and each pays 1 with a chance that we do not know.
# Our whole model is four scores; softmax makes them the chances to press each. What is to be made large
# is the expected reward, Σ p(a) · pay(a). If we *knew* what the buttons pay, autograd would do it.

# %%
PAYS_A = torch.tensor([0.2, 0.5, 0.4, 0.8])
scores_A = torch.tensor([0.5, 0.0, 0.2, -0.5], requires_grad=True)
p_A = scores_A.softmax(dim=0)
expected = (p_A * PAYS_A).sum()
(exact_A,) = torch.autograd.grad(expected, scores_A)
print(f"expected reward {expected.item():.3f}, its gradient {exact_A.numpy().round(3)}")

# %% [markdown]
# We do not. We can press, and see what comes. The trick (Williams, 1992): ∇p = p · ∇log p, so the gradient
# of the expected reward is itself an expected value, of **reward × ∇log p(what was pressed)**. An expected
# value can be estimated by pressing. For softmax scores, ∇log p is simply *pressed − p*.

# %%
dice = torch.Generator().manual_seed(1)
pressed_N = torch.multinomial(p_A.detach(), 20_000, replacement=True, generator=dice)
reward_N = torch.bernoulli(PAYS_A[pressed_N], generator=dice)
grad_log_p_NA = torch.eye(4)[pressed_N] - p_A.detach()
estimates_NA = reward_N[:, None] * grad_log_p_NA
assert_close(estimates_NA.mean(dim=0), exact_A, atol=0.015, rtol=0)
print("exact     ", exact_A.numpy().round(3))
print("estimated ", estimates_NA.mean(dim=0).numpy().round(3))

# %% [markdown]
# That is REINFORCE. Now a small mischief: let every press pay 5 more. Nothing about *which* button is best
# has changed, and the mean of the gradient has not. But each single estimate is now eight times as wild:
# every button that is pressed seems wonderful. Take off the mean reward, and the mischief is gone. A press
# should be praised not for a high reward but for a **higher one than usual**: its *advantage*.


# %%
def noise(reward_N):
    return (reward_N[:, None] * grad_log_p_NA).std(dim=0).norm().item()


print(
    f"noise of one estimate:  reward {noise(reward_N):.2f},  reward + 5 {noise(reward_N + 5):.2f}"
)
print(f"minus the mean, both:   {noise(reward_N - reward_N.mean()):.2f}")
shifted_NA = (reward_N + 5)[:, None] * grad_log_p_NA
centred_NA = (reward_N - reward_N.mean())[:, None] * grad_log_p_NA
assert_close(centred_NA.mean(dim=0), exact_A, atol=0.015, rtol=0)
assert noise(reward_N + 5) > 3 * noise(reward_N - reward_N.mean())

# %% [markdown]
# Learning, then: press eight times, step, press again, with the 5 more for every press. Forty learners at
# once, so that luck evens out. The third way is a **control**: the same rewards, dealt to the presses at
# random. It has the same numbers in it and no information. It should learn nothing, and if it did, we would
# have fooled ourselves.


# %%
def learn(way, steps=150, learners=40, presses=8, rate=0.4):
    dice, scores_LA, path = np.random.default_rng(3), np.zeros((learners, 4)), []
    for _ in range(steps):
        p_LA = np.exp(scores_LA) / np.exp(scores_LA).sum(axis=1, keepdims=True)
        path.append(p_LA @ PAYS_A.numpy())
        darts = dice.random((learners, presses, 1))
        pressed = (darts > p_LA.cumsum(axis=1)[:, None, :-1]).sum(axis=2)
        gain = 5.0 + (dice.random(pressed.shape) < PAYS_A.numpy()[pressed])
        gain = dice.permuted(gain, axis=1) if way == "shuffled" else gain
        gain = gain if way == "reward" else gain - gain.mean(axis=1, keepdims=True)
        grad = (gain[..., None] * (np.eye(4)[pressed] - p_LA[:, None])).mean(axis=1)
        scores_LA += rate * grad
    return np.array(path)


paths = {way: learn(way) for way in ("reward", "reward − mean", "shuffled")}
print({way: f"{path[-1].mean():.2f}" for way, path in paths.items()})

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.8), dpi=75)
for (way, path_SL), colour in zip(
    paths.items(), (lesson.GREY, lesson.BLUE, lesson.RED), strict=True
):
    axes.plot(path_SL.mean(axis=1), color=colour, label=way)
    low, high = np.quantile(path_SL, [0.1, 0.9], axis=1)
    axes.fill_between(range(len(low)), low, high, color=colour, alpha=0.12)
axes.axhline(PAYS_A.max(), color="black", ls=":", linewidth=1)
axes.set(xlabel="step", title="expected reward of forty learners (band: 10 % to 90 %)")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# Without the mean, whatever is pressed is praised, so what was pressed by luck at the start is pressed ever
# more: many learners end with a poor button and never try another. With it, all of them find the best.
# The control stays where it was.
#
# ## 2. A group is its own baseline
#
# For a language model a button is a whole answer, and what is usual depends on the question: 0.5 is poor
# for an easy one and grand for a hard one. PPO trains a second network to guess it. GRPO asks the same
# question several times and takes the mean of *these* answers. That is the whole G in GRPO.


# %%
def my_advantages(rewards):
    return [reward - sum(rewards) / len(rewards) for reward in rewards]


for rewards in ([1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]):
    assert my_advantages(rewards) == grpo.advantages(rewards)
    print(rewards, "→", my_advantages(rewards))

# %% [markdown]
# Look at the last two. Where all answers are right, or all wrong, nothing is learned: no answer is better
# than another. How often does that happen? With n answers, each right with chance p, they differ with
# chance 1 − pⁿ − (1 − p)ⁿ.

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.6), dpi=75)
p = np.linspace(0, 1, 101)
for samples in (2, 4, 8, 16):
    axes.plot(p, 1 - p**samples - (1 - p) ** samples, label=f"{samples} answers")
axes.set(xlabel="chance of a right answer", title="chance that a question teaches something")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
draws = np.random.default_rng(1).random((20_000, 8)) < 0.1
mixed = np.mean(draws.any(axis=1) & ~draws.all(axis=1))
assert abs(mixed - (1 - 0.1**8 - 0.9**8)) < 0.02
print(f"p = 0.1, 8 answers: {mixed:.2f}, counted in 20,000 groups")

# %% [markdown]
# A model that can do nothing learns nothing from being graded, nor does one that can do everything. That
# is why this chapter comes late, and why chapter 06 left some word problems to be learned.
#
# ## 3. From a button to a text
#
# An answer is many tokens, and its log-probability is their sum. So one loss does it all, with each
# token's advantage that of its answer: **−Σ advantage · log p(token) / tokens**. In words: cross-entropy
# on the model's own answers, weighted by how good they were; for the bad ones the weight is negative.
#
# One thing is new. Some tokens of an answer were not the model's choice: what the tool printed was forced
# in (chapter 05). Blaming or praising the model for them would teach it to predict outputs. They stay in
# the text, and out of the loss. A tiny model, a question of three tokens, two answers:

# %%
tiny = GPT.build(ModelConfig(depth=1, aspect=16, head_dim=16, sequence_len=32), 24, cpu.device, 1)
for weight in tiny.parameters():
    torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(weight.numel()))
question = [1, 2, 3]
answers = [([4, 5, 6, 7, 8], [True, True, False, False, True]), ([9, 10], [True, True])]
rewards = [1.0, 0.0]
print("forced by the tool:", [id for id, chosen in zip(*answers[0], strict=True) if not chosen])


# %%
def textbook(model):
    total, tokens = 0.0, 0
    for (said, chosen), advantage in zip(answers, my_advantages(rewards), strict=True):
        log_p_TV = model(torch.tensor([question + said]))[0].log_softmax(dim=-1)
        for place, id in enumerate(said):
            if chosen[place]:
                total = total - advantage * log_p_TV[len(question) + place - 1, id]
                tokens += 1
    return total / tokens


print(f"loss by hand {textbook(tiny).item():.4f}")

# %%
rows = [np.array(question + said) for said, _ in answers]
masks = [np.array([False] * 3 + chosen) for _, chosen in answers]
batch = batch_of_rows(rows, masks, length=7, bos=0)
batch.fields["advantage"] = torch.tensor(my_advantages(rewards))[:, None].expand(-1, 7)
policy = PolicyGradient()
loss = policy.sum(tiny.nll(batch), batch) / policy.count(batch)
assert_close(loss, textbook(tiny))
weights = list(tiny.parameters())
for real, ours in zip(
    torch.autograd.grad(loss, weights), torch.autograd.grad(textbook(tiny), weights), strict=True
):
    assert_close(real, ours)
print(f"nanolib's {loss.item():.4f}, and the gradients of all {len(weights)} weights are the same")

# %% [markdown]
# And the gradient that reaches the scores is the buttons' again, *advantage × (said − p)*, at every token
# that was chosen, and nothing at the others:

# %%
logits_BTV = tiny(batch.inputs_BT).detach().requires_grad_()
target_BT = batch.targets_BT.clamp(min=0)
nll_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none")
nll_BT = nll_BT * (batch.targets_BT >= 0)
(policy.sum(nll_BT, batch) / policy.count(batch)).backward()
said_BTV = torch.nn.functional.one_hot(target_BT, 24)
by_hand_BTV = -batch.fields["advantage"][..., None] * (said_BTV - logits_BTV.detach().softmax(-1))
by_hand_BTV *= (batch.targets_BT >= 0)[..., None] / policy.count(batch)
assert_close(logits_BTV.grad, by_hand_BTV)
figure, panels = plt.subplots(1, 2, sharey=True, figsize=(7.6, 2.6))
for axes, push_TV, title in zip(panels, -logits_BTV.grad, ("right", "wrong"), strict=True):
    lesson.heatmap(axes, push_TV, limits=(-0.08, 0.08), colours="RdBu")
    axes.set(title=f"the {title} answer", xlabel="token", ylabel="position")
plt.show()

# %% [markdown]
# Blue is pushed up, red down. Empty rows: the question, the tool's two tokens, the padding.
#
# ## 4. A rollout of the real model
#
# Now the model of chapter 07, some training questions, eight answers to each, with the sandbox at hand.
# `RolloutSource` is what the stage uses. (Answers are cut short here, and one that is cut before its number
# is wrong.) One question whose answers differ, if there is one:

# %%
settings = run.config.recipe.grpo
model = checkpoint.load_model(run.stage("sft").checkpoints, cpu.device)
with Sandbox() as sandbox:
    engine = Engine(model, tokenizer, cpu, lambda source: sandbox.run(source).text)
    task = tasks.load(settings.task, "train", run.mirror())
    questions = Questions(engine, task, min(64, settings.max_new_tokens))
    few = replace(settings, questions=4, samples=8)
    source = RolloutSource(questions, few, seed=1)
    rollouts = source.rollouts(step=0)
    batches = source.updates(step=0)[0]  # the same rollouts again, as batches
rollout = max(rollouts, key=lambda rollout: np.std(rollout.rewards))
print(task.unanswered(rollout.question).messages[0].text)
graded = zip(rollout.answers, rollout.rewards, grpo.advantages(rollout.rewards), strict=True)
for answer, reward, advantage in graded:
    print(f"{reward:.0f} {advantage:+.2f}  {tokenizer.decode(answer.ids)!r}")

# %% [markdown]
# What each of them is responsible for. The end of the turn counts too, where the model chose it.

# %%
for place in dict.fromkeys((int(np.argmax(rollout.rewards)), int(np.argmin(rollout.rewards)))):
    answer = rollout.answers[place]
    pieces = [tokenizer.decode([id]) for id in answer.ids]
    groups = [1 if chosen else 0 for chosen in answer.chosen]
    lesson.tokens(pieces, groups=groups, legend=["forced: no target", "chosen: a target"])
chosen = sum(sum(a.chosen) + (a.end is not None) for r in rollouts for a in r.answers)
counted = sum(policy.count(batch) for batch in batches)
assert counted == chosen
mixed = np.mean([len(set(r.rewards)) > 1 for r in rollouts])
print(f"{counted} targets; {mixed:.0%} of these questions teach something")

# %% [markdown]
# ## 5. How to score it: pass@k
#
# Two questions can be asked of a model that answers at random. How often is an answer right (pass@1)? And
# how often is at least one of k right (**pass@k**)? Estimating the second from k answers alone is noisy.
# With n of them, c right, count over *all* choices of k:


# %%
def brute_force(samples, right, k):
    answers = [place < right for place in range(samples)]
    return np.mean([any(chosen) for chosen in itertools.combinations(answers, k)])


for samples in range(1, 8):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        assert abs(pass_at_k(samples, right, k) - brute_force(samples, right, k)) < 1e-9
print("pass@1, 2, 4 with 1 of 4 right:", [pass_at_k(4, 1, k) for k in (1, 2, 4)])

# %% [markdown]
# The gap between pass@1 and pass@k is what there is to gain: the model *can* find the answer, and does
# not reliably say it. Reinforcement learning mostly closes this gap. It sharpens what is there.
#
# ## 6. The run
#
# Each step: some questions, several answers to each, one update. The model is scored on held-out questions
# as it goes, from before the first step on.

# %%
steps = (settings.questions, settings.samples, settings.temperature, settings.max_new_tokens)
print("questions a step, answers to each, temperature, tokens at most:", steps)
result = launch.stage("grpo", run, watch=lesson.Live())
print(f"{result['answers']:,} answers in {result['steps']} steps, {result['epochs']:.2f} passes")

# %% [markdown]
# The loss that is drawn there says little. A group's advantages sum to zero, and with them most of the
# loss: it is there for its gradient. What to look at are the rewards. These are of other questions at
# every step, so they jump:

# %%
told = [row for row in run.stage("grpo").metrics.rows() if row["kind"] == "rollout"]
figure, panels = plt.subplots(2, 2, sharex=True, figsize=(7.6, 4), dpi=80)
titles = {
    "reward": "mean reward",
    "mixed": "share of questions that teach",
    "answer_tokens": "tokens of an answer",
    "cut": "share of answers that met a limit",
}
for axes, (name, title) in zip(panels.flat, titles.items(), strict=True):
    values, place = [row[name] for row in told], [row["step"] for row in told]
    axes.plot(place, values, ".", color=lesson.GREY)
    axes.plot(place, lesson.smooth(values, keep=0.85), color=lesson.BLUE)
    axes.set(title=title, ylim=(0, None if name in ("answer_tokens", "reward") else 1))
for axes in panels[1]:
    axes.set_xlabel("step")
plt.show()

# %% [markdown]
# On held-out questions, always the same ones, so these can be compared. **Greedy** is the likeliest answer,
# what a user would get. The bars are one standard error, √(p(1 − p)/n): a change well inside them is no
# news.

# %%
scored = [row for row in run.stage("grpo").metrics.rows() if row["kind"] == "eval"]
names = [name for name in scored[0] if name not in ("kind", "step", "steps")]
figure, axes = plt.subplots(figsize=(7.2, 2.9))
for name in names:
    p = np.array([row[name] for row in scored])
    error = np.sqrt(p * (1 - p) / settings.eval_questions)
    axes.errorbar([row["step"] for row in scored], p, error, fmt="o-", capsize=3, label=name)
axes.set(xlabel="step", title=f"{settings.eval_questions} held-out questions", ylim=(0, None))
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
for name in names:
    print(f"{name:7} {scored[0][name]:.3f} → {scored[-1][name]:.3f}")

# %% [markdown]
# The best and the worst answer to one question, from the first step and from the last:

# %%
for row in (told[0], told[-1]):
    print(f"step {row['step']}: {row['samples'][0][0]}")
    for _, text, reward in row["samples"]:
        print(f"  {reward:.0f}  {text[-160:]!r}")

# %% [markdown]
# Was anything else harmed? Nothing rewarded the model for knowing facts or for plain text. Small steps and
# few of them are what protects them here; others add a penalty on the distance from the starting model.

# %%
after = launch.stage("eval", run, of="grpo", watch=lesson.Live())
figure, axes = plt.subplots(figsize=(7.6, 2.6))
both = list(run.config.recipe.eval.tasks)
for shift, found, stage in ((-0.2, before, "sft"), (0.2, after, "grpo")):
    heights = [100 * found[name].get("text", found[name].get("accuracy", 0)) for name in both]
    bars = axes.bar(np.arange(len(both)) + shift, heights, 0.36, label=stage)
    axes.bar_label(bars, fmt="%.0f")
axes.set_xticks(range(len(both)), both)
axes.set(title="% right (four choices: by text)", ylim=(0, 112))
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
bits = [found["compression"]["bpb"] for found in (before, after)]
print(f"bits per byte of plain text: {bits[0]:.3f} → {bits[1]:.3f}")

# %% [markdown]
# ## 7. Is it the reward?
#
# Scores may rise for reasons that have nothing to do with what is rewarded: training on one's own answers
# at temperature 1 makes any model surer of itself. With some large models even *random* rewards raised a
# benchmark. So there is a control: `overrides = {"grpo.shuffled": True}` deals each question's rewards to
# its answers at random, and leaves all else as it is. Only what goes beyond that run is learned from the
# grades. Section 1 had the same control for buttons. For a text it is as easily dealt:

# %%
rewards = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
dealt_N8 = np.random.default_rng(1).permuted(np.tile(rewards, (2000, 1)), axis=1)
honest = grpo.advantages(rewards.tolist())
mean_8 = np.mean([grpo.advantages(row.tolist()) for row in dealt_N8], axis=0)
print("graded:  ", np.round(honest, 2))
print("shuffled:", np.round(mean_8, 2), "on average over 2,000 deals")
assert np.abs(mean_8).max() < 0.05

# %% [markdown]
# ## 8. More than one step on a rollout
#
# Writing answers is the slow part. May we take several steps on the same ones? After the first step they
# are no longer the model's own, and the gradient above is no longer right. Two mends: weigh each token by
# the **ratio** of its probability now and when it was said, and stop when the ratio has gone far enough:
# the gain is min(ratio · A, clip(ratio, 1 ± ε) · A), PPO's **clipped objective**. Here drawn with
# nanolib's own loss.

# %%
ratio_T = torch.linspace(0.4, 1.8, 141)
nll_1T = -ratio_T.log()[None].requires_grad_()  # against an old nll of 0
curves = {}
for advantage in (1.0, -1.0):
    fields = {"advantage": torch.full((1, 141), advantage), "old_nll": torch.zeros(1, 141)}
    none = torch.zeros(1, 141, dtype=torch.long)
    batch = Batch(inputs_BT=none, targets_BT=none, fields=fields)
    loss = PolicyGradient(clip=0.2).sum(nll_1T, batch)
    (push_1T,) = torch.autograd.grad(loss, nll_1T)
    gain_T = torch.minimum(ratio_T * advantage, ratio_T.clamp(0.8, 1.2) * advantage)
    assert_close(loss, -gain_T.sum())
    assert_close(push_1T[0, 60].item(), advantage, atol=1e-3, rtol=0)  # of advantage · nll
    curves[advantage] = (gain_T, push_1T[0])
print("at a ratio of", round(ratio_T[60].item(), 2), "the push is the plain policy gradient's")

# %%
figure, panels = plt.subplots(1, 2, figsize=(7.6, 2.7))
for (advantage, (gain_T, push_T)), colour in zip(
    curves.items(), (lesson.GREEN, lesson.RED), strict=True
):
    panels[0].plot(ratio_T, gain_T, color=colour, label=f"advantage {advantage:+.0f}")
    panels[1].plot(ratio_T, push_T, color=colour)
for axes, title in zip(panels, ("gain", "push on log p"), strict=True):
    axes.axvline(1, color="black", linewidth=0.8, ls=":")
    axes.set(title=title, xlabel="probability now / when it was said")
panels[0].legend(loc="lower left")
plt.show()

# %% [markdown]
# A good answer is pushed until it is 1.2 times as likely, and then left alone; a bad one until it is 0.8
# times. But one that went the *wrong* way is pushed back, however far it is. With one step a rollout
# (`grpo.updates_each = 1`, what all profiles do) every ratio is 1, and none of this matters.
#
# ## Exercises
#
# **1.** Rewards need not be 0 and 1. What are the advantages when *all* of a group's rewards are `r`? And
# how much do they change if every reward gets `c` more? Write a group's advantages for `c + reward`.


# %% tags=["exercise"]
def shifted_advantages(rewards, c):
    return ...


lesson.check(
    shifted_advantages,
    ([1.0, 1.0, 1.0], 0, [0.0, 0.0, 0.0]),
    ([1.0, 0.0], 5, [0.5, -0.5]),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def shifted_advantages(rewards, c):
#     return grpo.advantages([c + reward for reward in rewards])
# ```
#
# Zero, and not at all. A bonus for all ("you answered!") teaches nothing either.
#
# </details>
#
# **2.** A group's mean contains the answer itself. A cleaner baseline is the mean of the *others*
# (leave one out, RLOO). Write it, and find its ratio to reward − mean.


# %% tags=["exercise"]
def leave_one_out(rewards):
    return ...


lesson.check(
    leave_one_out,
    ([1.0, 0.0, 0.0, 0.0], [1.0, -1 / 3, -1 / 3, -1 / 3]),
    ([1.0, 0.0], [1.0, -1.0]),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def leave_one_out(rewards):
#     total, others = sum(rewards), len(rewards) - 1
#     return [reward - (total - reward) / others for reward in rewards]
# ```
#
# It is n / (n − 1) times reward − mean, for every answer: another learning rate, nothing more.
#
# </details>
#
# **3.** GRPO as first written takes each answer's mean over its tokens, then the mean of the answers. Here
# the sum over all tokens is divided by their number. What weight does *each token* of each answer get,
# before its advantage? Write both, for answers of given lengths.


# %% tags=["exercise"]
def token_weights(lengths, by_answer):
    return ...


lesson.check(
    token_weights,
    ([10, 40], True, [0.05, 0.0125]),
    ([10, 40], False, [0.02, 0.02]),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def token_weights(lengths, by_answer):
#     if by_answer:
#         return [1 / length / len(lengths) for length in lengths]
#     return [1 / sum(lengths) for _ in lengths]
# ```
#
# By answer, the tokens of a long answer weigh less. If it is wrong, it is punished less for each token the
# longer it is: the model learns to ramble when it is lost (Dr. GRPO and DAPO both saw it).
#
# </details>
#
# **4.** GRPO as first written also divides each group's advantages by their standard deviation. With `right`
# of `n` answers right, how large does the advantage of a right answer become?


# %% tags=["exercise"]
def divided_advantage(n, right):
    return ...


lesson.check(divided_advantage, (8, 4, 1.0), (8, 1, 2.645751), (8, 7, 0.377964))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def divided_advantage(n, right):
#     p = right / n
#     return (1 - p) / (p * (1 - p)) ** 0.5
# ```
#
# So a question with one right answer in eight weighs more than it does without the division, compared
# with one that is right half of the time. It lifts the very hard and the very easy ones, which say least.
#
# </details>
#
# ## To read
#
# - Shao et al., *DeepSeekMath* (where GRPO comes from),
#   [arXiv:2402.03300](https://arxiv.org/abs/2402.03300)
# - Liu et al., *Understanding R1-Zero-Like Training* (Dr. GRPO: no division),
#   [arXiv:2503.20783](https://arxiv.org/abs/2503.20783)
# - Yu et al., *DAPO* (a mean over tokens; leaving out questions that teach nothing),
#   [arXiv:2503.14476](https://arxiv.org/abs/2503.14476)
# - Schulman et al., *Proximal Policy Optimization* (clipping),
#   [arXiv:1707.06347](https://arxiv.org/abs/1707.06347)
# - Ahmadian et al., *Back to Basics* (leave one out),
#   [arXiv:2402.14740](https://arxiv.org/abs/2402.14740)
# - Chen et al., *Evaluating Large Language Models Trained on Code* (pass@k),
#   [arXiv:2107.03374](https://arxiv.org/abs/2107.03374)
# - Yue et al., *Does Reinforcement Learning Really Incentivize Reasoning Capacity in LLMs Beyond the Base
#   Model?*, [arXiv:2504.13837](https://arxiv.org/abs/2504.13837)
# - Shao et al., *Spurious Rewards* (why a control is needed),
#   [arXiv:2506.10947](https://arxiv.org/abs/2506.10947)
#
# In the code: `nanolib/grpo.py`, `Engine.answers` in `nanolib/engine.py`, `grpo` in `nanolib/stages/training.py`.
# **Next:** 09, the card and the chat.
