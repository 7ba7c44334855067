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
# [▶ Open this chapter in Colab](https://colab.research.google.com/github/OWNER/nanolib/blob/main/notebooks/08_grpo.ipynb): nothing to install on your machine.

# %% tags=["colab"]
# On Colab this fetches the course; elsewhere it does nothing.
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("lesson.py"):
    source, course = "https://github.com/OWNER/nanolib", "/content/nanolib"
    subprocess.run(["git", "clone", "-q", "--depth=1", source, course], check=True)
    os.chdir(f"{course}/notebooks")
    sys.path[:0] = [course, f"{course}/notebooks"]
    subprocess.run([sys.executable, "colab.py"], check=True)

# %% [markdown]
# # 08 · Learning from answers that can be graded
#
# So far the model has imitated: we showed it an answer and made that answer likelier. For a word problem
# nothing has to be shown. Let the model answer in its own way, several times, grade what it says, and make
# likely what was right. What exactly should be made likelier, by how much, and what does the model do when
# the grade is not quite what we meant?
#
# **You will learn**
# - where the gradient of a reward comes from, and what a baseline is for;
# - to write GRPO's training loop yourself, run it, and say what it leaves out of the full formula;
# - how a reward is hacked, how a hack is cured, and how to tell learning from drift.
#
# **You need** the engine and its tool ([chapter 05](05_inference.ipynb)), the loss mask
# ([chapter 07](07_sft.ipynb)), and what a logarithm and an expected value are.
#
# **Takes** 55 minutes to read and run, 60 more with the exercises; in profile `demo` the stage trains
# for another two on two CPU cores. Stages: `grpo`, then `eval` of `grpo`.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import itertools
import json
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.testing import assert_close

import checks
import lesson
from nanolib import checkpoint, config, grpo, launch, tasks
from nanolib.config import GRPOConfig
from nanolib.data.packing import Batch, batch_of_rows
from nanolib.engine import Engine
from nanolib.evals.answers import Questions, pass_at_k
from nanolib.grpo import policy_gradient
from nanolib.optim import MuonAdamW
from nanolib.runtime import Runtime, seed_of
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox

run = lesson.begin(profile, run, overrides)
before = launch.stage("eval", run, of="sft", watch=lesson.Live())  # chapter 07's, if not there yet
tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)
settings = run.config.recipe.grpo
sandbox = Sandbox().__enter__()  # closed at the end of the chapter
STEPS, ASKED, SAMPLES = (10, 8, 8) if profile == "demo" else (2, 2, 4)  # what a lesson has time for

# %% [markdown]
# ## 1. Right by luck
#
# This is what a demo of 2026-11-29 wrote in the first step of this chapter's stage, and it was *rewarded*:
#
# > Bruno counts 26 pears, Gus 25 and Thea 28. How many more is the most than the fewest?
# >
# > That is `29-26` → `3` more. #### **3**
#
# There is no 29, and 26 is not the fewest. It should be 28 − 25, which also is 3. The grade looks at the number
# after `####` and at nothing else, so the whole answer was made likelier: the 29 as well as the 3. Keep
# this answer in mind. It is why one answer teaches little and five thousand teach something, and it is a
# small member of a large family, which we meet in section 8.
#
# Three words first. The model that answers is called the [policy](glossary.ipynb#policy): it chooses what
# to do next. One answer that it wrote, from the question to the end, is a
# [rollout](glossary.ipynb#rollout). Its grade is the [reward](glossary.ipynb#reward). Here is a policy: the
# SFT model, some training problems, the tool, and an optimizer.

# %% tags=["loop"]
train_task, test_task = (
    tasks.load(settings.task, split, run.mirror()) for split in ("train", "test")
)
OPTIM = replace(run.config.recipe.optim, clip=None, momentum_warmup=0)


class Policy:
    """A stage's model, ASKED problems, the tool, and an optimizer."""

    def __init__(self, stage="sft", task=train_task, asked=ASKED, samples=SAMPLES):
        self.model = checkpoint.load_model(run.stage(stage).checkpoints, cpu.device)
        self.optimizer, self.samples = MuonAdamW(self.model, OPTIM, cpu), samples
        engine = Engine(self.model, tokenizer, cpu, lambda source: sandbox.run(source).text)
        self.problems = Questions(engine, task, min(64, settings.max_new_tokens))
        self.asked = self.problems.fitting(range(10 * asked), room=16)[:asked]

    def sample(self, step):
        """Q questions, the same at every step, and N new answers to each."""
        seeds = [seed_of(step, "lesson", question) for question in self.asked]
        answers = self.problems.answers(self.asked, self.samples, seeds=seeds, temperature=1.0)
        return self.asked, answers


policy = Policy()
questions, answers = policy.sample(step=0)
print(len(questions), "questions,", len(answers[0]), "answers to each")

# %% [markdown]
# The grade is 1 for the right number, 0 for any other. Eight answers to one question. **Predict**: will the
# wrong ones be wrong in their arithmetic, or somewhere else?


# %%
def right(questions, answers):
    """[Q, N]: 1 where an answer ends in the right number."""
    texts = [map(policy.problems.text, group) for group in answers]
    return torch.tensor(
        [policy.problems.rewards(*pair) for pair in zip(questions, texts, strict=True)]
    )


rewards_QN = right(questions, answers)
shown = int(rewards_QN.std(dim=1).argmax())  # the question whose answers differ most
print(train_task.unanswered(questions[shown]).messages[0].text)
for answer, reward in zip(answers[shown], rewards_QN[shown], strict=True):
    print(f"  {reward:.0f}  {tokenizer.decode(answer.ids)!r}"[:150])

# %% [markdown]
# The tool does not miscalculate. What goes wrong in the toy world is *which* numbers are put into the program,
# or that there is no program: at temperature 1 one unlikely token can lead an answer to another subject. Is there
# a lucky one among the rewarded? We look for right answers whose programs contain a number that stands neither in
# the question nor in a result of the tool.


# %%
def invented(question, answer):
    """Numbers in an answer's programs that nothing before them contains."""
    text = tokenizer.decode(answer.ids)
    known = train_task.unanswered(question).messages[0].text
    known += " ".join(re.findall(r"<\|output_start\|>(.*?)<\|output_end\|>", text))
    programs = " ".join(re.findall(r"<\|python_start\|>(.*?)<\|python_end\|>", text))
    return set(re.findall(r"\d+", programs)) - set(re.findall(r"\d+", known))


pairs = [(q, a) for q, group in zip(questions, answers, strict=True) for a in group]
graded = list(zip(pairs, rewards_QN.flatten().tolist(), strict=True))
lucky = [(q, a) for (q, a), reward in graded if reward and invented(q, a)]
print(f"{len(lucky)} of {int(rewards_QN.sum())} rewarded answers use a number from nowhere")
for question, answer in lucky[:2]:
    print(
        f"  {train_task.unanswered(question).messages[0].text}\n  {tokenizer.decode(answer.ids)!r}"
    )

# %% [markdown]
# ## 2. Four buttons
#
# Forget texts for a moment. There are four buttons, and each pays 1 with a chance that we do not know. Our
# whole policy is four scores; softmax makes them the chances to press each. What is to be made large is the
# expected reward, Σ p(a) · pay(a). If we *knew* what the buttons pay, autograd would do it.

# %%
PAYS_A = torch.tensor([0.2, 0.5, 0.4, 0.8])
scores_A = torch.tensor([0.5, 0.0, 0.2, -0.5], requires_grad=True)
p_A = scores_A.softmax(dim=0)
expected = (p_A * PAYS_A).sum()
(exact_A,) = torch.autograd.grad(expected, scores_A)
print(f"expected reward {expected.item():.3f}, its gradient {exact_A.numpy().round(3)}")

# %% [markdown]
# We do not know. We can press, and see what comes. The trick (Williams, 1992): ∇p = p · ∇log p, so the
# gradient of the expected reward is itself an expected value, of **reward × ∇log p(what was pressed)**. An
# expected value can be estimated by pressing. For softmax scores, ∇log p is simply *pressed − p*. This is
# [REINFORCE](glossary.ipynb#reinforce).

# %%
dice = torch.Generator().manual_seed(1)
pressed_N = torch.multinomial(p_A.detach(), 20_000, replacement=True, generator=dice)
reward_N = torch.bernoulli(PAYS_A[pressed_N], generator=dice)
grad_log_p_NA = torch.eye(4)[pressed_N] - p_A.detach()
estimate_A = (reward_N[:, None] * grad_log_p_NA).mean(dim=0)
assert_close(estimate_A, exact_A, atol=0.015, rtol=0)
print("exact     ", exact_A.numpy().round(3))
print("estimated ", estimate_A.numpy().round(3))

# %% [markdown]
# Now a small mischief: let every press pay 5 more. Which button is best has not changed, and the *mean* of
# the gradient has not either. **Predict**: what happens to a single estimate?


# %%
def noise(reward_N):
    """The spread of one press's gradient."""
    return (reward_N[:, None] * grad_log_p_NA).std(dim=0).norm().item()


centred_N = reward_N - reward_N.mean()
print(
    f"noise of one estimate:  reward {noise(reward_N):.2f},  reward + 5 {noise(reward_N + 5):.2f}"
)
print(f"minus the mean, both:   {noise(centred_N):.2f}")
assert_close((centred_N[:, None] * grad_log_p_NA).mean(dim=0), exact_A, atol=0.015, rtol=0)
assert noise(reward_N + 5) > 3 * noise(centred_N)

# %% [markdown]
# Every button that is pressed seems wonderful, and only the average over very many presses tells them
# apart. Take off the mean reward, the [baseline](glossary.ipynb#baseline), and the mischief is gone. A press
# should be praised not for a high reward but for a **higher one than usual**. That is its
# [advantage](glossary.ipynb#advantage).
#
# Learning, then, with the 5 more for every press: press eight times, step, press again. We try it in three
# ways: with the bare reward, with the reward minus the mean of the eight, and as a **control** with the same
# rewards dealt to the presses at random, which has the same numbers in it and no information about the
# buttons. Forty learners go at once, so that luck evens out.


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
figure, axes = plt.subplots(figsize=(7.2, 2.9))
looks = ((lesson.GREY, "--"), (lesson.BLUE, "-"), (lesson.VIOLET, ":"))
for (way, path_SL), (colour, line) in zip(paths.items(), looks, strict=True):
    axes.plot(path_SL.mean(axis=1), line, color=colour)
    low, high = np.quantile(path_SL, [0.1, 0.9], axis=1)
    axes.fill_between(range(len(low)), low, high, color=colour, alpha=0.25, lw=0)
    axes.text(152, path_SL[-1].mean(), way, color=colour, va="center")
axes.hlines(PAYS_A.max(), 0, 150, color="black", ls=":", linewidth=1)
axes.text(2, PAYS_A.max() + 0.01, "the best button's pay")
axes.set(xlabel="step", ylabel="expected reward", xlim=(0, 185), ylim=(0.15, 0.88))
axes.set_title("forty learners: mean, and band from 10 % to 90 %")
lesson.show(
    "Expected reward over 150 steps, learned in three ways: reward minus mean climbs close to the best "
    "button's 0.8, the bare reward climbs slower and spreads, shuffled rewards stay where they were."
)

# %% [markdown]
# Without the mean, whatever is pressed is praised, so what was pressed by luck at the start is pressed ever
# more: some learners end on the best button, and some on the worst. The control goes nowhere on average.
#
# ## 3. A group is its own baseline
#
# For a language model a button is a whole answer, and what is usual depends on the question: 0.5 is poor
# for an easy one and grand for a hard one. PPO, the method before GRPO, trains a second network to guess it.
# [GRPO](glossary.ipynb#grpo) asks the same question several times and takes the mean of *these* answers.
# That is the whole G, *group relative*, in GRPO.
#
# **Exercise 8.1 ★ · 4 minutes · build** The advantages of groups.
# Rewards come as a table: a row for each question, a column for each of its answers. What is each answer's
# advantage? And what do you expect for a question that was answered right every time?


# %% tags=["exercise"]
def advantages(rewards_QN):
    """rewards_QN [Q, N] -> [Q, N]: how much better each answer is than its question's mean."""
    ...


checks.verify("8.1", advantages)

# %% [markdown]
# <details><summary>Hint 1</summary>Which numbers does "the same question's answers" name: a row or a
# column?</details>
# <details><summary>Hint 2</summary><code>mean(dim=…, keepdim=True)</code> keeps the shape [Q, 1], which
# can be subtracted from [Q, N].</details>
# <details><summary>Solution</summary>
#
# ```python
# def advantages(rewards_QN):
#     return rewards_QN - rewards_QN.mean(dim=1, keepdim=True)
# ```
#
# All right or all wrong: zero everywhere. Add the same to all of a question's rewards: nothing changes.
#
# </details>

# %%
table_QN = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
advantage_QN = table_QN - table_QN.mean(dim=1, keepdim=True)
for rewards, row in zip(table_QN.tolist(), advantage_QN.tolist(), strict=True):
    assert row == grpo.advantages(rewards)  # nanolib's
    print(rewards, "→", row)

# %% [markdown]
# The last two rows teach nothing: no answer is better than another. How often is that so?
#
# **Exercise 8.2 ★ · 3 minutes · predict** A hard question.
# A question is answered right with chance 0.1. You sample eight answers. With what chance do they *differ*,
# so that the question teaches something? (Two digits will do.)

# %% tags=["exercise"]
chance = ...

checks.verify("8.2", chance)

# %% [markdown]
# <details><summary>Hint 1</summary>When do they not differ? There are two ways.</details>
# <details><summary>Hint 2</summary>All wrong has chance 0.9⁸. What is the chance of all right?</details>
# <details><summary>Solution</summary>
#
# ```python
# chance = 1 - 0.9**8 - 0.1**8
# ```
#
# More than half: eight answers find something to learn even in a question that is nearly always missed.
#
# </details>

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.8))
p = np.linspace(0, 1, 101)
for samples, line in ((2, ":"), (4, "-."), (8, "-"), (16, "--")):
    teaches = 1 - p**samples - (1 - p) ** samples
    axes.plot(p, teaches, line, color=lesson.BLUE, label=f"{samples} answers")
axes.legend(loc="lower center", ncols=2)
mixed = (rewards_QN.std(dim=1) > 0).float().mean().item()
axes.set(xlabel="chance of a right answer", ylabel="chance that it teaches", ylim=(0, 1.05))
lesson.show(
    "Chance that a question's answers differ, over the chance of a right answer: arches that are zero at 0 "
    "and 1; with 2 answers at most one half, with 16 nearly 1 except near the ends."
)
print(f"of the {len(questions)} questions above, {mixed:.0%} teach something")

# %% [markdown]
# A model that can do nothing learns nothing from being graded, nor does one that can do everything. That is
# why this chapter comes late, and why chapter 06 left some word problems to be learned.
#
# ## 4. From a button to a text
#
# An answer is many tokens, and its log-probability is the sum of theirs. So every token that the policy
# chose gets its answer's advantage: **loss = −Σ advantage · log p(token) / number of chosen tokens**. In
# words: cross-entropy on the model's own answers, weighted by how good they were; for the bad ones the
# weight is negative.
#
# Which tokens did the policy choose? Not the question, and not what the tool printed: that was forced in
# (chapter 05), and grading it would teach the model to predict outputs. The program *is* its choice, and so
# is **stopping**: the token that ends the turn is graded like any other. Only an answer that ran into the
# length limit has no end to be graded. (If the answer shown below opens no program, those of section 1 do.)


# %%
def as_row(problems, question, answer):
    """One rollout as token ids, and which of them the policy chose."""
    prompt = problems.prompt(question)
    end = [] if answer.end is None else [answer.end]
    ids = prompt + answer.ids + end
    return np.array(ids), np.array([False] * len(prompt) + answer.chosen + [True] * len(end))


ids_T, chosen_T = as_row(policy.problems, questions[shown], answers[shown][0])
print(f"{len(ids_T)} tokens, {chosen_T.sum()} of them chosen")

# %%
kinds, python = [], False
for id, chosen in zip(ids_T, chosen_T, strict=True):
    python = (python or id == tokenizer.special("<|python_start|>")) and chosen
    kinds.append("program" if python else "chosen" if chosen else "forced")
    python = python and id != tokenizer.special("<|python_end|>")
prompt = len(policy.problems.prompt(questions[shown]))
kinds[:prompt] = ["masked"] * prompt
lesson.tokens([tokenizer.decode([id]) for id in ids_T], kinds=kinds)

# %% [markdown]
# **Exercise 8.3 ★★ · 8 minutes · build** The masked loss.
# `log_p_BT[b, t]` is the log-probability of answer *b*'s token *t*, `chosen_BT` says which tokens count,
# and each answer has one advantage. Write the loss. One number comes out; a token of a long answer must
# weigh as much as one of a short answer.


# %% tags=["exercise"]
def policy_loss(log_p_BT, chosen_BT, advantage_B):
    """log_p_BT [B, T], chosen_BT [B, T] of True and False, advantage_B [B] -> the loss, a number."""
    ...


checks.verify("8.3", policy_loss)

# %% [markdown]
# <details><summary>Hint 1</summary>What shape must the advantages have to be multiplied with [B, T]? And
# what is True · 2.5?</details>
# <details><summary>Hint 2</summary>Sum first, divide once: by how many tokens in all answers together?
# And mind the sign: the optimizer makes a loss small.</details>
# <details><summary>Solution</summary>
#
# ```python
# def policy_loss(log_p_BT, chosen_BT, advantage_B):
#     gain_BT = advantage_B[:, None] * log_p_BT * chosen_BT
#     return -gain_BT.sum() / chosen_BT.sum()
# ```
#
# </details>

# %% [markdown]
# The same on the 64 real answers, beside nanolib's loss, gradients included. In a batch, targets that do not
# count are −1, so `targets >= 0` is the mask.


# %%
def batch_of(policy, questions, answers):
    """All rollouts as one padded batch; row q · N + n is answer n to question q."""
    pairs = zip(questions, answers, strict=True)
    rows = [as_row(policy.problems, q, answer) for q, group in pairs for answer in group]
    ids, chosen = zip(*rows, strict=True)
    return batch_of_rows(ids, chosen, max(map(len, ids)) - 1, tokenizer.bos)


print("rows and tokens:", *batch_of(policy, questions, answers).inputs_BT.shape)

# %%
batch = batch_of(policy, questions, answers)
advantage_B = (rewards_QN - rewards_QN.mean(dim=1, keepdim=True)).flatten()
log_p_BT, chosen_BT = -policy.model.nll(batch), batch.targets_BT >= 0
ours = -(advantage_B[:, None] * log_p_BT * chosen_BT).sum() / chosen_BT.sum()
batch.fields["advantage"] = advantage_B[:, None].expand_as(log_p_BT)
theirs = policy_gradient(GRPOConfig(), policy.model.nll(batch), batch) / batch.count
weights = list(policy.model.parameters())
assert_close(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights))
print(f"ours {ours.item():+.5f}, nanolib's {theirs.item():+.5f}, {chosen_BT.sum()} chosen tokens")

# %% [markdown]
# Do not read that number as a score. Within a question the advantages sum to zero, so the loss hovers around
# zero from first to last step, whatever is learned. It is there for its gradient. It is not "nats a token"
# either: it mixes log-probabilities with weights of both signs. Watch rewards.
#
# ## 5. Your loop
#
# You have the parts. Put them in order: **sample → grade → advantages → masked loss → step**. The policy
# gets two more methods, so that the loop need not know what a batch is, and a diary that notes what the
# reward does not see.


# %% tags=["loop"]
class Trainee(Policy):
    """A policy that can be trained, and keeps a diary of every step."""

    def __init__(self, *settings, lr=0.3, **more):
        super().__init__(*settings, **more)
        self.lr, self.diary = lr, []

    def log_p(self, questions, answers):
        """log p [Q · N, T] of every token, and whether the policy chose it [Q · N, T]."""
        batch = batch_of(self, questions, answers)
        log_p_BT, chosen_BT = -self.model.nll(batch), batch.targets_BT >= 0
        texts = [tokenizer.decode(answer.ids) for group in answers for answer in group]
        self.seen = {"right": right(questions, answers).mean().item()}
        self.seen["in form"] = np.mean(["#### " in text for text in texts])
        self.seen["tokens"] = np.mean([len(answer.ids) for group in answers for answer in group])
        self.seen["entropy"] = -(log_p_BT * chosen_BT).sum().item() / int(chosen_BT.sum())
        return log_p_BT, chosen_BT

    def step(self, loss):
        loss.backward()
        self.optimizer.step(self.lr)
        self.optimizer.zero_grad()
        self.diary.append(self.seen)


print("a trainee can", [name for name in dir(Trainee) if not name.startswith("_")])

# %% [markdown]
# **Exercise 8.4 ★★★ · 25 minutes · build** GRPO.
# Write the loop. `reward(questions, answers)` gives a table [Q, N]; answer *n* to question *q* is row
# *q · N + n* of `log_p`. The check runs it on a toy policy with six words, and compares every loss. Then it
# trains the real one, below. Which of the five lines would you have to change to turn this into SFT?


# %% tags=["exercise"]
def train(policy, reward, steps):
    """Train for `steps` steps; returns the mean reward of each, a list of numbers.

    policy.sample(step) -> questions, answers       policy.log_p(questions, answers) -> log_p_BT, chosen_BT
    policy.step(loss): gradient and optimizer       reward(questions, answers) -> rewards_QN
    """
    ...


checks.verify("8.4", train)

# %% [markdown]
# <details><summary>Hint 1</summary>Which of the five must happen anew in every step? May an answer be used
# after the policy has changed?</details>
# <details><summary>Hint 2</summary>Advantages are [Q, N] and the loss wants [B]: <code>flatten()</code>.
# The rest of the loss is exercise 8.3.</details>
# <details><summary>Solution</summary>
#
# ```python
# def train(policy, reward, steps):
#     curve = []
#     for step in range(steps):
#         questions, answers = policy.sample(step)
#         rewards_QN = reward(questions, answers)
#         advantage_QN = rewards_QN - rewards_QN.mean(dim=1, keepdim=True)
#         log_p_BT, chosen_BT = policy.log_p(questions, answers)
#         gain_BT = advantage_QN.flatten()[:, None] * log_p_BT * chosen_BT
#         policy.step(-gain_BT.sum() / chosen_BT.sum())
#         curve.append(rewards_QN.mean().item())
#     return curve
# ```
#
# SFT: the answers come from a data set instead of `sample`, and every advantage is 1.
#
# </details>

# %% [markdown]
# Ten steps on the real model, with your loop if it passed and a colleague's if not. All ten ask the *same*
# eight questions, so that the points of the curve can be compared, and so that it must climb if the loop is
# right. Overfitting a handful of examples is the first test of any training loop. **Predict** where the
# curve ends, and which of the answers printed above will be likelier then.


# %% tags=["loop", "solution-twin"]
def colleagues_train(policy, reward, steps):
    curve = []
    for step in range(steps):
        questions, answers = policy.sample(step)  # sample
        rewards_QN = reward(questions, answers)  # grade
        advantage_QN = rewards_QN - rewards_QN.mean(dim=1, keepdim=True)  # advantages
        log_p_BT, chosen_BT = policy.log_p(questions, answers)  # masked loss
        gain_BT = advantage_QN.flatten()[:, None] * log_p_BT * chosen_BT
        policy.step(-gain_BT.sum() / chosen_BT.sum())  # step
        curve.append(rewards_QN.mean().item())
    return curve


yours = checks.judge("8.4", train)[0] is True
loop = train if yours else colleagues_train
honest = Trainee()
curve = loop(honest, right, STEPS)
print("your loop:" if yours else "a colleague's loop:", " ".join(f"{value:.2f}" for value in curve))

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.6))
axes.plot(range(1, STEPS + 1), curve, "o-", color=lesson.BLUE)
axes.set(
    xlabel="step",
    ylabel="mean reward",
    ylim=(0, 1.05),
    title=f"{ASKED} questions, {SAMPLES} answers to each",
)
lesson.show(
    f"Mean reward of the same {ASKED} training questions over {STEPS} steps of the loop: "
    f"from {curve[0]:.2f} at the first step to {curve[-1]:.2f} at the last."
)

# %% [markdown]
# What did the steps do to single answers? Take the question from section 1 and all different answers it got
# there. The probability of a whole answer is the product of its tokens'. An arrow leads from what it was to
# what it is after the training; blue if the answer was right.


# %%
@torch.no_grad()
def probabilities(policy, question, group):
    batch = batch_of(policy, [question], [group])
    return (-policy.model.nll(batch)).sum(dim=1).exp().numpy()


distinct = {tuple(answer.ids): n for n, answer in enumerate(answers[shown])}
group = [answers[shown][n] for n in distinct.values()]
old_B, new_B = (probabilities(p, questions[shown], group) for p in (policy, honest))
print("all of them together:", f"{old_B.sum():.2f} → {new_B.sum():.2f}")

# %%
figure, axes = plt.subplots(figsize=(7.6, 0.6 + 0.36 * max(3, len(group))))
for place, (n, old, new) in enumerate(zip(distinct.values(), old_B, new_B, strict=True)):
    good = bool(rewards_QN[shown, n])
    arrow = {"arrowstyle": "-|>", "color": lesson.BLUE if good else lesson.RED, "lw": 2}
    axes.annotate("", (new, place), (old, place), arrowprops=arrow | {"ls": "-" if good else "--"})
    axes.plot(old, place, "o" if good else "x", color=arrow["color"])
    axes.plot(new, place, " ")  # makes room for the arrow's end
names = [tokenizer.decode(answer.ids).replace("\n", " ").replace("$", r"\$") for answer in group]
names = [re.sub(r"<\|(python|output)_(start|end)\|>", "|", name)[:60] for name in names]
axes.set_yticks(range(len(group)), names)
axes.set(xlabel="probability of the whole answer (● right, × wrong)")
axes.margins(x=0.05, y=0.15)
lesson.show(
    f"{len(group)} different answers to one question as arrows on their probabilities, from before to "
    f"after {STEPS} steps: right ones solid, wrong ones dashed."
)

# %% [markdown]
# Right answers may lose ground as well, to others, shown or not: all answers share one sum of 1. If one grew, is it the
# best? The grade looks at the number alone. If all fell, something grew that is not in the picture: after
# section 8's first cells `samples("trained", honest)` shows it.
#
# ## 6. The formula, and what we left out
#
# This is GRPO as DeepSeekMath wrote it. Nothing in it is new to you but three factors:
#
# $$J = \mathbb{E}\left[\frac1N\sum_{i=1}^{N}\frac1{|o_i|}\sum_{t}\Big(\min\big(\rho_{it}A_i,\
# \mathrm{clip}(\rho_{it},1-\varepsilon,1+\varepsilon)\,A_i\big)-\beta\,\mathrm{KL}_{it}\Big)\right]$$
#
# $$\rho_{it}=\frac{\pi_\theta(o_{it})}{\pi_{\text{old}}(o_{it})}\qquad
# A_i=\frac{r_i-\text{mean}(r)}{\text{std}(r)}\qquad
# \mathrm{KL}_{it}=\frac{\pi_{\text{ref}}}{\pi_\theta}-\log\frac{\pi_{\text{ref}}}{\pi_\theta}-1$$
#
# Answer *i* has |oᵢ| tokens; π with an index is the probability that one of three models gives to token *t*
# of it: the policy now (θ), as it was when it answered (old), and the model before any training of this kind
# (ref).
#
# | piece | what it is for | here | why |
# |---|---|---|---|
# | ratio ρ and clip | several updates on one rollout | left out | one update each: ρ is 1. `updates_each` brings it back (below) |
# | ÷ std(r) | rewards on any scale | left out | rewards are 0 or 1; dividing gives questions that are nearly always or nearly never right more weight (Dr. GRPO) |
# | 1/∣oᵢ∣, then mean of answers | every answer weighs the same | mean over the step's tokens | a long wrong answer would be punished less for each token (Dr. GRPO, DAPO) |
# | β KL to the reference | stay near the model that can talk | left out | small steps and few of them; section 8 puts one in |
# | a value network | PPO's baseline | not in GRPO either | the group's mean does it |
# | a learned reward model | answers nobody can check | not needed | the right number is known |
#
# So: **with one update, no deviation and no KL this is REINFORCE with a group mean.** One more difference
# is nanolib's own: the stage samples among the `top_k` likeliest tokens and grades with the whole
# distribution's log p, a small mismatch that our loop above does not have.
#
# What would the ratio do? Writing answers is the slow part, and one would like to take several steps on the
# same ones. After the first step they are no longer the policy's own
# ([off-policy](glossary.ipynb#on-policy)). Two mends: weigh each token by ρ, and stop rewarding it once ρ has
# gone far enough. That is PPO's [clipping](glossary.ipynb#clipping), here drawn with nanolib's own loss.

# %%
ratio_T = torch.linspace(0.4, 1.8, 141)
nll_1T = -ratio_T.log()[None].requires_grad_()  # against an old nll of 0
pushes, none_1T = {}, torch.zeros(1, 141, dtype=torch.long)
for advantage in (1.0, -1.0):
    fields = {"advantage": torch.full((1, 141), advantage), "old_nll": torch.zeros(1, 141)}
    tokens = Batch(inputs_BT=none_1T, targets_BT=none_1T, fields=fields)
    loss = policy_gradient(GRPOConfig(clip=0.2), nll_1T, tokens)
    (push_1T,) = torch.autograd.grad(loss, nll_1T)
    assert_close(
        loss, -torch.minimum(ratio_T * advantage, ratio_T.clamp(0.8, 1.2) * advantage).sum()
    )
    assert_close(push_1T[0, 60].item(), advantage, atol=1e-3, rtol=0)  # at a ratio of 1
    pushes[advantage] = push_1T[0]
print("at a ratio of", round(ratio_T[60].item(), 2), "the push is the plain policy gradient's")

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.6))
for (advantage, push_T), (colour, line) in zip(
    pushes.items(), ((lesson.BLUE, "-"), (lesson.RED, "--")), strict=True
):
    axes.plot(ratio_T, push_T, line, color=colour)
    axes.text(0.42, advantage * 0.85, f"advantage {advantage:+.0f}", color=colour, va="center")
axes.axvline(1, color="black", linewidth=0.8, ls=":")
axes.set(xlabel="ρ: the token's probability now / when it was said", ylabel="push on its log p")
lesson.show(
    "Push on a token's log-probability over the ratio of its probability now and when it was said: for a "
    "good answer it grows with the ratio and drops to zero above 1.2, for a bad one it is zero below 0.8."
)

# %% [markdown]
# Each *token* of a good answer is pushed until it is 1.2 times as likely as when it was said, and then left
# alone; a token of a bad one until it is 0.8 times as likely. The whole answer may change far more: twenty
# tokens at 1.2 make a factor of 38. A token that went the wrong way is pushed back, however far it is.
#
# ## 7. The stage
#
# It is the same loop with fresh questions in every step, a checkpoint and a progress bar. The model is scored
# on held-out questions as it goes, from before the first step on.

# %%
steps = (settings.questions, settings.samples, settings.temperature, settings.max_new_tokens)
print("questions a step, answers to each, temperature, tokens at most:", steps)
result = launch.stage("grpo", run, watch=lesson.Live())
print(f"{result['answers']:,} answers in {result['steps']} steps, {result['epochs']:.2f} passes")

# %% [markdown]
# The loss drawn there says little, as we saw. These say more. They come from other questions at every step, so
# they jump, and a gain of a tenth is hard to see:

# %%
told = [row for row in run.stage("grpo").metrics.rows() if row["kind"] == "rollout"]
figure, panels = plt.subplots(1, 3, figsize=(7.6, 2.5))
titles = ("reward", "mean reward"), ("mixed", "share that teaches"), ("answer_tokens", "tokens")
for axes, (name, title) in zip(panels, titles, strict=True):
    values, place = [row[name] for row in told], [row["step"] for row in told]
    axes.plot(place, values, ".", color=lesson.GREY)
    axes.plot(place, lesson.smooth(values, keep=0.85), color=lesson.BLUE)
    axes.set(ylabel=title, xlabel="step", ylim=(0, None if name == "answer_tokens" else 1))
lesson.show(
    "Three curves over the steps of the stage, points and a smoothed line: mean reward, share of "
    "questions whose answers differ, and tokens an answer."
)
print(f"answers that met the length limit: {told[0]['cut']:.0%} → {told[-1]['cut']:.0%}")

# %% [markdown]
# Held-out questions are the same ones each time. [Greedy](glossary.ipynb#greedy-decoding) is the likeliest
# answer, what a user would get at temperature 0; pass@1 is a sampled one. How sure are we of the difference?
# A question's four samples are not four questions, and before and after are the *same* questions, so
# √(p(1 − p)/n) is not the error here. Section 9 measures it properly, in pairs.

# %%
scored = [row for row in run.stage("grpo").metrics.rows() if row["kind"] == "eval"]
figure, axes = plt.subplots(figsize=(7.2, 2.8))
for name, marker in zip(("greedy", "pass@1", f"pass@{settings.eval_samples}"), "os^", strict=True):
    place, values = [row["step"] for row in scored], [row[name] for row in scored]
    axes.plot(place, values, marker + "-", label=name, clip_on=False)
    print(f"{name:7} {values[0]:.3f} → {values[-1]:.3f}")
axes.set(xlabel="step", ylabel="share right", ylim=(0, 1), xlim=(0, place[-1]))
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
axes.set_title(f"{settings.eval_questions} held-out questions")
lesson.show(
    "Share of held-out word problems answered right over the steps of the stage: greedy, one sampled answer, "
    f"and at least one right of {settings.eval_samples}."
)

# %% [markdown]
# Compare the three. Where pass@1 climbs while greedy or pass@4 stands still, the model has found few new right
# answers; it says more often what it could say before. (A change of 0.05 in greedy is ten questions of 200:
# not much.) Section 9 asks that question properly.
#
# The best and the worst answer to one question, from the first step and from the last. Does a rewarded one speak
# of the right person, and of the right things? The grade never reads them. Among the wrong ones you may meet the
# other fault that chapter 07 spoke of: a tool's result is read, and another number written after the `####`.
# Belief in the tool is not in the reward; only the last number is.

# %%
for row in (told[0], told[-1]):
    print(f"step {row['step']}: {row['samples'][0][0]}")
    for _, text, reward in row["samples"]:
        print(f"  {reward:.0f}  {'…' * (len(text) > 110)}{text[-110:]!r}")

# %% [markdown]
# Was anything else harmed? Nothing rewarded the model for knowing facts or for plain text.

# %%
after = launch.stage("eval", run, of="grpo", watch=lesson.Live())
bits = [found["compression"]["bpb"] for found in (before, after)]
print(f"bits per byte of plain text: {bits[0]:.3f} → {bits[1]:.3f}")

# %%
figure, axes = plt.subplots(figsize=(7.6, 2.7))
both = list(run.config.recipe.eval.tasks)
for shift, found, colour, hatch in ((-0.2, before, "#cbd5e0", "//"), (0.2, after, lesson.BLUE, "")):
    heights = [100 * found[name].get("text", found[name].get("accuracy", 0)) for name in both]
    places = np.arange(len(both)) + shift
    bars = axes.bar(places, heights, 0.36, color=colour, hatch=hatch)
    axes.bar_label(bars, fmt="%.0f")
axes.legend(["after SFT", "after GRPO"], loc="upper left", bbox_to_anchor=(1, 1))
axes.set_xticks(range(len(both)), [name.replace("mmlu", "toy-MMLU") for name in both])
axes.set(ylabel="% right (four choices: by text)", ylim=(0, 112))
lesson.show("Bars: share right in each task, after SFT and after GRPO, with their numbers on top.")

# %% [markdown]
# ## 8. A hack and its cure
#
# Suppose that we like thorough answers: **one point for each token of an answer**, on top of the point for
# the right number. **Predict**, before you run it, what ten steps make of three numbers: what is paid, how
# long an answer is, and how many answers are right. The loop is the same, the questions are the same, and
# the answers of the first step are too.


# %%
def lengths(answers):
    """[Q, N]: how many tokens each answer has."""
    return torch.tensor([[float(len(answer.ids)) for answer in group] for group in answers])


def bonus(questions, answers):
    return right(questions, answers) + lengths(answers)


hacked = Trainee()
paid = {"honest": curve, "hacked": loop(hacked, bonus, STEPS)}
print("paid:      ", " ".join(f"{value:5.2f}" for value in paid["hacked"]))
print("tokens:    ", " ".join(f"{row['tokens']:5.1f}" for row in hacked.diary))
print("truly right", " ".join(f"{row['right']:5.2f}" for row in hacked.diary))


# %%
def samples(name, policy):
    """New answers of a policy to the question of section 1: two in the middle by length."""
    asked = policy.problems.answers([questions[shown]], SAMPLES, seeds=[1], temperature=1.0)
    marks = {"python_start": "[", "python_end": " ", "output_start": "→ ", "output_end": "] "}
    for answer in sorted(asked[0], key=lambda answer: len(answer.ids))[SAMPLES // 2 :][:2]:
        text = re.sub(r"<\|(\w+)\|>", lambda m: marks.get(m[1], m[0]), tokenizer.decode(answer.ids))
        print(f"{name:12} {text!r}"[:115])


print(train_task.unanswered(questions[shown]).messages[0].text, "[program → result]")
samples("before", policy)
samples("hacked", hacked)

# %% [markdown]
# Read the three lines together, and then the samples. What we *meant* was a thorough answer. What we *paid
# for* is one token more. So why ever stop? Whatever goes on is worth more than what ends, until the length
# limit cuts the answer off; and no `####`, because behind it there is nothing left to earn. Where "paid"
# climbs and "truly right" falls, you see [reward hacking](glossary.ipynb#reward-hacking), or Goodhart's law:
# a measure that becomes a target ceases to be a good measure. No line of the loop is wrong, and the reward
# curve alone looks like a triumph. That is why true accuracy is kept apart.
#
# Did it have to come to that? Four finished models of 2026-11-29, of three seeds, all fell. Truly right were 0.19
# to 0.50 of their answers, and in the end at most 0.03; tokens went from 24 to 28 up to 53 and more. Another bonus, a point for each *program*
# that an answer opens, hacked one of them (1.1 → 8.4 programs, nothing right) and left another as if it were
# not there (1.1 → 1.1, and 0.39 → 0.91 right). **A reward can only teach what is sampled**: where all
# answers to a question open one program, the bonus is the same for all, and its advantage is zero. Lengths
# always differ a little.
#
# Two cures. The better one is to pay for what you mean; you write it in exercise 8.5. The other is for those
# who do not know yet how they will be cheated: a leash. Charge for every step *away from the model you started
# from*, by the [KL divergence](glossary.ipynb#kl-divergence) per token. With r = log π_ref − log π of a token
# that the policy chose, eʳ − r − 1 is never negative, and its mean is that divergence. The trainee adds β
# times it to the loss, as in DeepSeekMath, and the loop stays as it is, and the bonus as foolish as it was.
# **Predict**: which of the three lines will the leash hold back?


# %%
class Leashed(Trainee):
    """A trainee that pays beta for each nat per token that it has moved from a reference."""

    def __init__(self, reference, beta):
        super().__init__()
        self.reference, self.beta, self.moved = reference, beta, []

    def log_p(self, questions, answers):
        log_p_BT, chosen_BT = super().log_p(questions, answers)
        reference_BT, _ = self.reference.log_p(questions, answers)
        r_BT = reference_BT.detach() - log_p_BT
        self.kl = ((r_BT.exp() - r_BT - 1) * chosen_BT).sum() / chosen_BT.sum()
        self.moved.append(self.kl.item())
        return log_p_BT, chosen_BT

    def step(self, loss):
        super().step(loss + self.beta * self.kl)


on_leash = Leashed(Trainee(), beta=10)
print("a nat per token costs", on_leash.beta)

# %%
paid["on a leash"] = loop(on_leash, bonus, STEPS)
print("paid:      ", " ".join(f"{value:5.2f}" for value in paid["on a leash"]))
print("truly right", " ".join(f"{row['right']:5.2f}" for row in on_leash.diary))
print("moved, nats", " ".join(f"{value:5.2f}" for value in on_leash.moved))
samples("on a leash", on_leash)

# %%
LOOKS = {"honest": "C0o-", "hacked": "C3x-", "on a leash": "C2s--", "shuffled": "C4^:"}
runs = {"honest": honest, "hacked": hacked, "on a leash": on_leash}


def draw(axes, key, label, top=None):
    for name, trainee in runs.items():
        values = paid[name] if key == "paid" else [row[key] for row in trainee.diary]
        axes.plot(range(1, STEPS + 1), values, LOOKS[name], label=name)
    axes.set(xlabel="step", ylabel=label, ylim=(0, top))


figure, (left, right_axes) = plt.subplots(1, 2, figsize=(7.6, 3))
draw(left, "paid", "paid, the bonus included")
draw(right_axes, "right", "truly right", 1.05)
figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
lesson.show(
    "Left: what is paid over the steps, for an honest reward, a bonus for length, and the same bonus on a "
    "leash. Right: the share truly right. Where left rises and right falls, the reward is hacked."
)

# %% [markdown]
# Why should a leash hold? The policy that is best under reward − β · KL can be written down: it gives each answer
# the probability π_ref(answer) · exp(reward / β), up to a constant. What the reference hardly ever writes stays
# rare unless it pays many β. Our bonus pays in tens, so β = 10; DeepSeekMath's rewards are 0 and 1, and its β is
# 0.04. Three of the four models were put on one: with β = 10 they ended at 0.36, 0.42 and 0.30 truly right, from
# 0.39, 0.50 and 0.30; with β = 3 at 0.20, 0.33 and 0.02: too long a leash. Read the whole line, for one step is 64
# answers: a later demo's stayed between 0.22 and 0.41 until a last step at 0.17. Where "moved" jumps, the leash slips.
#
# And no leash knows right from wrong: it holds the honest part of the reward back as well. Compare its line on
# the right with the honest one. Hence trainings like R1's often do without one, where the grade cannot be cheated.
#
# And a fourth run, the control: honest rewards, dealt at random to the answers of each question.


# %%
def shuffled(questions, answers):
    deals = torch.Generator().manual_seed(seed_of(len(control.diary), "deal"))
    return torch.stack(
        [row[torch.randperm(len(row), generator=deals)] for row in right(questions, answers)]
    )


control = Trainee()
loop(control, shuffled, STEPS)
runs["shuffled"] = control
for name, trainee in runs.items():
    first, last = trainee.diary[0], trainee.diary[-1]
    print(f"{name:11}", *(f"{key} {first[key]:.2f}→{last[key]:.2f} " for key in first))

# %%
figure, panels = plt.subplots(1, 3, figsize=(8.2, 3))
draw(panels[0], "right", "truly right", 1.05)
draw(panels[1], "in form", "in form", 1.05)
draw(panels[2], "entropy", "entropy, nats a chosen token")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
lesson.show(
    "Four runs over the same steps in three panels: share truly right, share in the right form, entropy; "
    "honest, hacked, on a leash, and with shuffled rewards."
)

# %% [markdown]
# "In form" means that an answer reaches its `####`. It is not the same as being right: a run whose accuracy
# rises because more answers reach their `####` has learned a form. And mind how hard ten steps with rewards
# that mean nothing can hit: our rate is high, so that a lesson sees something, and eight questions are few.
# That is enough to see what a hack looks like, and not enough to call the other differences a law.
#
# **Exercise 8.5 ★★ · 10 minutes · build** Pay for what you mean.
# A bonus for the tool: half a point for using a program, at most once an answer, and only where the answer is
# right. A right answer without one still earns its point. If you like, hand it to `loop` afterwards: is it
# hacked?


# %% tags=["exercise"]
def gated(right_QN, programs_QN):
    """right_QN [Q, N] of 0 and 1, programs_QN [Q, N] of counts -> rewards [Q, N]."""
    ...


checks.verify("8.5", gated)

# %% [markdown]
# <details><summary>Hint 1</summary>What must a wrong answer earn, however many programs it opens?</details>
# <details><summary>Hint 2</summary>Something times <code>right_QN</code>; <code>clamp(max=1)</code> makes
# five programs count as one.</details>
# <details><summary>Solution</summary>
#
# ```python
# def gated(right_QN, programs_QN):
#     return right_QN * (1 + 0.5 * programs_QN.clamp(max=1))
# ```
#
# To train with it, count `tokenizer.special("<|python_start|>")` in each answer's `ids`. A gate leaves little
# to cheat: opening more pays nothing, and a wrong answer pays nothing. Where every right answer opens a
# program anyway, as on the demo, it is the honest reward times 1.5, and its curve is the honest one, to the
# last digit. (Why does the 1.5 change nothing? Chapter 03: both optimizers divide the gradient's size out.)
#
# </details>

# %% [markdown]
# ## 9. New ability, or the same one more often?
#
# How often is an answer right (pass@1)? And how often is at least one of *k* right
# ([pass@k](glossary.ipynb#pass-at-k))? From *n* samples of which *c* are right, of all ways to take *k* of
# them, count those without a right one:
#
# $$\text{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k}$$
#
# **Exercise 8.6 ★★ · 8 minutes · build** pass@k.
# Write it. Why not simply 1 − (1 − c/n)ᵏ? (The check knows that one.)


# %% tags=["exercise"]
def my_pass_at_k(n, c, k):
    """The chance that of k of n answers, c of which are right, at least one is right."""
    ...


checks.verify("8.6", my_pass_at_k)

# %% [markdown]
# <details><summary>Hint 1</summary>How many ways are there to take k of n? And of the wrong ones
# alone?</details>
# <details><summary>Hint 2</summary><code>math.comb(n, k)</code> counts them, and is 0 where k is larger than
# n.</details>
# <details><summary>Solution</summary>
#
# ```python
# import math
#
#
# def my_pass_at_k(n, c, k):
#     return 1 - math.comb(n - c, k) / math.comb(n, k)
# ```
#
# The other formula puts each answer back before it draws the next, and so may draw the same wrong one twice.
#
# </details>

# %%
for n in range(1, 8):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        ways = list(itertools.combinations([place < c for place in range(n)], k))
        assert abs(pass_at_k(n, c, k) - np.mean([any(way) for way in ways])) < 1e-9
print("pass@1, 2, 4 with 1 of 4 right:", [pass_at_k(4, 1, k) for k in (1, 2, 4)])

# %% [markdown]
# It is often said that training on graded answers only *sharpens*: the model says more often what it could
# already say now and then, and for large *k* gains nothing (Yue et al.). That is contested, and it is a
# question one can ask *this* model. Sixteen samples for each held-out question, before and after. If
# pass@1 rises and pass@8 stands still, it sharpened. If pass@8 rises as well, it reaches answers that it did
# not reach in eight tries before.

# %%
HELD_OUT, DRAWN, KS = (40, 16, range(1, 9)) if profile == "demo" else (4, 16, range(1, 9))
passes = {}
for stage in ("sft", "grpo"):
    solver = Policy(stage, test_task, HELD_OUT, DRAWN)
    counts = [
        int(sum(solver.problems.rewards(q, map(solver.problems.text, group))))
        for q, group in zip(*solver.sample(0), strict=True)
    ]
    passes[stage] = np.array([[pass_at_k(DRAWN, c, k) for k in KS] for c in counts])
gain_QK = passes["grpo"] - passes["sft"]  # the same questions: differences, then their spread
gain_K, error_K = gain_QK.mean(axis=0), gain_QK.std(axis=0, ddof=1) / len(gain_QK) ** 0.5
for k in (1, 2, 4, 8):
    ends = [passes[stage][:, k - 1].mean() for stage in passes]
    print(
        f"pass@{k}: {ends[0]:.3f} → {ends[1]:.3f}, gain {gain_K[k - 1]:+.3f} ± {error_K[k - 1]:.3f}"
    )

# %%
figure, (left, right_axes) = plt.subplots(1, 2, figsize=(7.6, 2.9))
for stage, (colour, look) in zip(passes, ((lesson.GREY, "s--"), (lesson.BLUE, "o-")), strict=True):
    left.plot(KS, passes[stage].mean(axis=0), look, color=colour, label=stage)
left.legend(loc="lower right")
left.set(xlabel="k", ylabel="pass@k", ylim=(0, 1))
right_axes.errorbar(KS, gain_K, error_K, fmt="o", capsize=3, color=lesson.BLUE)
right_axes.axhline(0, color="black", linewidth=0.8)
right_axes.set(xlabel="k", ylabel="gain, same questions (± 1 error)")
lesson.show(
    f"Left: pass@k for k from 1 to 8 on {HELD_OUT} held-out questions, before (sft) and after (grpo). Right: "
    "the gain in pairs with its standard error."
)

# %% [markdown]
# The bars are one standard error of a mean of *paired* differences: the spread over questions of "after minus
# before", divided by the root of their number. A question that is easy for both drops out, which is why
# pairs see more than two separate bars. With 40 questions a gain of a few hundredths is inside the noise;
# with ten times as many the bar would be a third as wide. What does your plot say: sharper, or further? Or
# narrower, where pass@8 falls: rare right answers were lost with the wrong ones. Within two bars of zero, be quiet.
#
# ## 10. Is it the reward?
#
# Scores can rise for reasons that have nothing to do with being right. With some large models even *random*
# rewards raised a benchmark (Shao et al., 2025). So every claim of this kind needs the control. For the whole
# stage, it was run for three seeds when the demo was measured, with `{"grpo.shuffled": True}`: the same
# questions and answers, each question's rewards dealt to its answers at random.

# %%
source = (config.REPOSITORY / "runs/bench/demo.md").read_text()
rows = [
    [cell.strip() for cell in line.split("|")[1:-1]] for line in source.splitlines() if "|" in line
]
figures = {row[0]: row[2:5] for row in rows}
told_honest, told_shuffled = (
    [float(cell) for cell in figures[f"{name}: sampled, gain"]]
    for name in ("GRPO", "shuffled rewards")
)
print("measured on", *re.findall(r"\d{4}-\d\d-\d\d", source)[:1], "(runs/bench/demo.md)")
differences = np.subtract(told_honest, told_shuffled)
for seed, (one, other, gap) in enumerate(
    zip(told_honest, told_shuffled, differences, strict=True), 1
):
    print(f"seed {seed}: honest {one:+.3f}, shuffled {other:+.3f}, difference {gap:+.3f}")
print(f"paired difference {differences.mean():.3f} ± {differences.std(ddof=1) / 3**0.5:.3f}")

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.8))
for seed, pair in enumerate(zip(told_shuffled, told_honest, strict=True), 1):
    axes.plot([seed, seed], pair, "-", color=lesson.GREY, linewidth=1)
    axes.plot(seed, pair[0], "^", color=lesson.VIOLET, markersize=8)
    axes.plot(seed, pair[1], "o", color=lesson.BLUE, markersize=8)
axes.text(3.08, told_honest[-1], "honest rewards", va="center", color=lesson.BLUE)
axes.text(3.08, told_shuffled[-1], "shuffled rewards", va="center", color=lesson.VIOLET)
axes.axhline(0, color="black", linewidth=0.8)
axes.set(xlabel="seed", ylabel="gain in pass@1", xticks=(1, 2, 3), xlim=(0.7, 4))
lesson.show(
    "Gain in sampled accuracy by the whole stage for three seeds, honest rewards and shuffled ones joined "
    f"by a line for each seed: on average {differences.mean():.2f} apart."
)

# %% [markdown]
# In the runs of 2026-11-24 shuffled rewards did not merely gain nothing: they lost 8 to 21 points. A random
# push is not a gentle one. Every step praises some wrong answers and blames some right ones, and forty such
# steps walk away from what SFT had taught. (Gains are on 400 held-out problems with four samples each, in the
# toy world as it was on that day. Entropy and form were not recorded there; section 8's violet line has them,
# for ten steps and one seed.) What goes beyond the control is what the grades taught.
#
# ## 11. The same at full size
#
# A toy may be a special case. Here is the same algorithm a size up: profile `h100`, a model of 42 million
# parameters at depth 8, trained on web text on a rented GPU. It cannot add. SFT shows it 800 worked sums of
# single digits, and then it gets four minutes of GRPO on sums that nobody worked for it: *Work out
# 3 + 8 - 4 + 9 in steps.* Three seeds with honest rewards, three with shuffled ones. All settings were
# fixed first; then 500 new sums were drawn and scored. `runs/bench/climb.py` did it, `runs/bench/climb.md`
# has every trial, the failed ones too. **Predict**: will pass@16 rise as well, or only pass@1?

# %%
source = (config.REPOSITORY / "runs/bench/climb.md").read_text()
lines = [line for line in source.splitlines() if line.startswith("| ")]
cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
columns = cells[0]
print(re.search(r"on \d{4}-\d\d-\d\d; profile [^,]*, [^,]*", source)[0])
print(f"{'':12} {'pass@1':15} {'right in form':15} {'pass@16':15} {'entropy':15}")
for row in cells[1:]:
    told = dict(zip(columns, row, strict=False))
    if row[0] in ("grpo", "shuffled") and "→" in told["sampled"]:
        keys = ("sampled", "of well-formatted", "pass@16", "entropy")
        print(f"{row[0]:9} {row[1]} ", *(f"{told[key]:15}" for key in keys))

# %% [markdown]
# Read a column at a time. *Right in form* counts only among answers that reach their `####`: it rises just as
# far, so the gain is arithmetic and not tidiness. And pass@16 rises: after training the model solves sums that
# it had missed in sixteen tries. *This* model, on *this* task, did not only sharpen. That does not settle the
# quarrel of section 9, in which the models are large and the problems hard. Here are the hundred steps.

# %%
text = (config.REPOSITORY / "runs/bench/climb.jsonl").read_text()
steps = [json.loads(line) for line in text.splitlines()]


def curve(axes, arm, key, look, colour, seeds=(1, 2, 3), label=None):
    """One thin line a seed, a mean over five steps each; `label` at the last one's end."""
    for seed in seeds:
        values = [row[key] for row in steps if (row["arm"], row["seed"]) == (arm, seed)]
        means = np.convolve(values, np.ones(5) / 5, "valid")
        axes.plot(range(5, len(means) + 5), means, look, color=colour, linewidth=1.2)
    axes.set(xlabel="step", xlim=(0, 100))
    axes.plot([], [], look, color=colour, label=label)


print(len(steps), "steps of", len({(row["arm"], row["seed"]) for row in steps}), "runs")

# %%
figure, panels = plt.subplots(1, 3, figsize=(8.2, 3))
kinds = (
    ("reward", "reward"),
    ("mixed", "questions that teach"),
    ("entropy", "entropy, nats a token"),
)
for axes, (key, label) in zip(panels, kinds, strict=True):
    curve(axes, "grpo", key, "-", lesson.BLUE, label="honest rewards")
    curve(axes, "shuffled", key, ":", lesson.VIOLET, label="shuffled rewards")
    axes.set(ylabel=label, ylim=(0, None))
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
lesson.show(
    "A hundred steps of GRPO at depth 8, three seeds each. Reward: honest from about 0.4 to 0.9, shuffled "
    "down to about 0.1. Questions that teach fall from 0.65 to about 0.2 with honest rewards. Entropy falls "
    "with honest rewards and not with shuffled ones."
)

# %% [markdown]
# The middle panel is section 3's arch: honest runs walk down its right side, where most sums come out right every
# time, and shuffled ones down its left. Shuffled rewards are no calm control here either. They undo what SFT taught.
#
# One more run was spoilt on purpose: a learning rate twenty times as high. **Predict** what breaks: the
# reward, the form, or something that the reward does not see?

# %%
figure, panels = plt.subplots(1, 3, figsize=(8.2, 3))
kinds = (
    ("reward", "reward"),
    ("answer_tokens", "tokens an answer"),
    ("entropy", "entropy, nats a token"),
)
for axes, (key, label) in zip(panels, kinds, strict=True):
    curve(axes, "grpo", key, "-", lesson.BLUE, (1,), "rate 0.02")
    curve(axes, "hot", key, "--", "C3", (1,), "rate 0.4")
    curve(axes, "hot-kl", key, "-.", "C2", (1,), "rate 0.4 on a leash (β = 0.2)")
    axes.set(ylabel=label, ylim=(0, None))
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
lesson.show(
    "Three runs of one seed. At rate 0.4 the reward still rises, but answers grow from 27 tokens to the limit "
    "of 96 within 35 steps. On a leash they stay at 27 and the reward rises by little."
)

# %% [markdown]
# Look only at the reward, and the hot run is nearly as good as the calm one. Now read what it says. This is from
# step 40, and it was rewarded:
#
# > 4 + 5 = 9<br>
# > 9 - 1 = 8<br>
# > 8 + 5 = 13<br>
# > \#\#\#\# 13does folded in fruit folded in fruit folded in fruit folded in fruit folded in fruit folded in fruit …
#
# From step 35 on *no* answer ends before the limit cuts it. The grade reads the number after `####`; what comes
# behind it costs nothing, and so high a rate broke the habit of stopping without the reward noticing. The leash keeps
# the habit, and most of the mistakes as well: its reward rises for ten steps, falls back, and ends 7 points up instead
# of 41. The real cure was the calm rate. Hence the advice of everyone who trains this way: plot more than the
# reward, and read samples.
#
# GRPO's usual extras (a KL term, clipping, dividing by the deviation, leaving out equal groups, CISPO) are settings of the
# stage. On these sums none of them beat the plain loop by more than noise; `climb.md` has a line for each.
#
# **If you have an evening (open)** Invent a reward of your own: full stops, the letter e, short answers,
# long ones. Write down before each run what you expect at step ten; then train a `Leashed` and find the smallest β
# that keeps `truly right` where it started. Nobody has the answer for your run.

# %%
sandbox.close()
print("sandbox closed;", f"{sum(len(t.diary) for t in runs.values())} steps by hand")

# %% [markdown]
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
# - Ahmadian et al., *Back to Basics* (REINFORCE is enough; leave one out),
#   [arXiv:2402.14740](https://arxiv.org/abs/2402.14740)
# - Gao et al., *Scaling Laws for Reward Model Overoptimization* (reward up, quality down, against KL),
#   [arXiv:2210.10760](https://arxiv.org/abs/2210.10760)
# - Chen et al., *Evaluating Large Language Models Trained on Code* (pass@k),
#   [arXiv:2107.03374](https://arxiv.org/abs/2107.03374)
# - Yue et al., *Does Reinforcement Learning Really Incentivize Reasoning Capacity in LLMs Beyond the Base
#   Model?* (sharpening), [arXiv:2504.13837](https://arxiv.org/abs/2504.13837)
# - Shao et al., *Spurious Rewards* (why a control is needed),
#   [arXiv:2506.10947](https://arxiv.org/abs/2506.10947)
#
# In the code: `nanolib/grpo.py`, `Engine.answers` in `nanolib/engine.py`, `grpo` in `nanolib/stages/training.py`.
#
# **Next:** [09, the card and the chat](09_chat.ipynb).
