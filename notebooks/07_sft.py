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
# [▶ Open this chapter in Colab](https://colab.research.google.com/github/OWNER/nanolib/blob/main/notebooks/07_sft.ipynb): nothing to install on your machine.

# %% tags=["colab"]
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("lesson.py"):  # get the course, install it
    source, course = "https://github.com/OWNER/nanolib", "/content/nanolib"
    subprocess.run(["git", "clone", "-q", "--depth=1", source, course], check=True)
    os.chdir(f"{course}/notebooks")
    sys.path[:0] = [course, f"{course}/notebooks"]
    subprocess.run([sys.executable, "colab.py"], check=True)

# %% [markdown]
# # 07 · Learning to answer
#
# The model of chapter 04 can go on with a text. Ask it something and it goes on with *that*: perhaps
# with another question. What it knows is in there, but it does not know that it is being spoken to.
# **Supervised finetuning** shows it conversations and lets it learn one side of them: the answers.
#
# **You will learn** how a conversation becomes tokens, which of them count in the loss and why, how
# conversations share a row, and why a model may know the answer and still fail a multiple-choice test.
#
# **Takes** fifteen minutes to read. The stage trains for a few minutes in profile `demo` on two CPU
# cores. Stages: `sft`, then `eval` of `sft`.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

import lesson
from nanolib import checkpoint, launch, tasks
from nanolib.conversation import LETTERS, Conversation, choice_question
from nanolib.data.packing import batch_of_rows
from nanolib.data.sources import ConversationSource
from nanolib.engine import Engine
from nanolib.evals.choices import by_letter, by_text
from nanolib.runtime import Runtime
from nanolib.tokenizer import Tokenizer

run = lesson.begin(profile, run, overrides)
launch.stage("base", run, watch=lesson.Live())  # chapter 04's work, if it is not there yet
tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)

# %% [markdown]
# ## The question before
#
# First, the reader as it is. We ask it something, in the form a conversation has, and let it go on.


# %%
def answer(stage, question):
    model = checkpoint.load_model(run.stage(stage).checkpoints, cpu.device)
    engine = Engine(model, tokenizer, cpu)
    prompt = Conversation.ask(question).prompt(tokenizer)
    (ids,) = engine.complete([prompt], max_new_tokens=24)
    return tokenizer.decode(ids)


chats = tasks.load("smoltalk", "test", run.mirror())
length = run.config.recipe.model.sequence_len
some = (chats.conversation(i) for i in range(len(chats)))
conversation = next(c for c in some if 20 < len(c.render(tokenizer).ids) < length)
question, reference = (turn.text for turn in conversation.turns[:2])
print("asked: ", question[:200])
print("answer:", answer("base", question))

# %% [markdown]
# ## A conversation is a text with markers
#
# Who speaks is said by special tokens, which no user can type (chapter 01). Here is a conversation as
# the model sees it. Blue is what it only reads. Orange is what the assistant says, up to and
# including the marker that ends its turn: that is what the model shall learn to say.

# %%
rendered = conversation.render(tokenizer)
pieces = [tokenizer.decode([id]) for id in rendered.ids]
said = [int(is_said) for is_said in rendered.loss_mask]
lesson.tokens(pieces, groups=said, legend=["read", "said: in the loss"])

# %% [markdown]
# Why not learn all of it? Then the model would spend its effort on guessing what users ask. And the
# ending marker *must* be learned, or the model never stops talking.
#
# What a tool prints stands inside the assistant's turn, but the assistant did not say it. A model that
# trains on it learns to make results up. Here the rule is in a few lines, against nanolib's:


# %%
def is_said(ids):
    names = ("assistant_start", "assistant_end", "output_start", "output_end")
    start, end, output, output_end = (tokenizer.special(f"<|{name}|>") for name in names)
    mask, speaking, tool = [], False, False
    for id in ids:
        tool = tool or id == output
        mask.append(speaking and not tool)
        tool = tool and id != output_end
        speaking = (speaking or id == start) and id != end
    return mask


problems = tasks.load("gsm8k", "test", run.mirror())
examples = [task.conversation(i) for task in (chats, problems) for i in range(20)]
for example in examples:
    expected = example.render(tokenizer)
    assert is_said(expected.ids) == expected.loss_mask
print(f"{len(examples)} conversations: our mask equals nanolib's")

# %% [markdown]
# A word problem from the same mixture. The `<|output_start|>` … `<|output_end|>` part is the tool's.

# %%
rendered = problems.conversation(0).render(tokenizer, max_tokens=160)
pieces = [tokenizer.decode([id]) for id in rendered.ids]
lesson.tokens(
    pieces, groups=[int(m) for m in rendered.loss_mask], legend=["read", "said: in the loss"]
)

# %% [markdown]
# ## Shifted by one
#
# The target of position *t* is token *t* + 1, so the mask moves with it: at `<|assistant_start|>`,
# which the model only reads, it must already predict the first word of the answer. Being off by one
# here is a classic: everything runs, the loss looks fine, and the model cannot begin or cannot stop.

# %%
ids, mask = np.array(rendered.ids), np.array(rendered.loss_mask)
batch = batch_of_rows([ids], [mask], len(ids) - 1, tokenizer.bos)
assert (batch.targets_BT[0] >= 0).tolist() == rendered.loss_mask[1:]
first = rendered.loss_mask[1:].index(True)
for t in range(first - 2, first + 2):
    target = int(batch.targets_BT[0, t])
    learned = repr(tokenizer.decode([target])) if target >= 0 else "(ignored)"
    print(f"{tokenizer.decode([ids[t]])!r:>24} → {learned}")

# %% [markdown]
# ## Conversations share a row
#
# Conversations are short and rows are long. One in each row would be mostly padding, so as many as fit
# share one. None is ever split: half an answer teaches nothing good. (As with documents in chapter 04, each
# sees those before it in its row.) Below, every row of a small packing. Each colour is a conversation, white
# is unused.

# %%
rendered = [chats.conversation(i).render(tokenizer, length + 1) for i in range(60)]
settings = {"length": length, "batch_rows": 4, "bos": tokenizer.bos, "seed": 1}
source = ConversationSource([r.ids for r in rendered], [r.loss_mask for r in rendered], **settings)
assert sorted(item for row in source.rows for item in row) == list(range(60))  # each exactly once
picture = np.full((len(source), length + 1), np.nan)
for row, items in zip(picture, source.rows, strict=True):
    ends = np.cumsum([len(source.ids[item]) for item in items])
    for number, (end, item) in enumerate(zip(ends, items, strict=True)):
        row[end - len(source.ids[item]) : end] = (number + 3 * len(items)) % 8

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.6))
axes.imshow(picture, cmap="Set3", aspect="auto", interpolation="nearest")
axes.set(xlabel="position", ylabel="row")
axes.yaxis.get_major_locator().set_params(integer=True)
axes.set_title(f"60 conversations in {len(source)} rows, {np.mean(~np.isnan(picture)):.0%} used")
axes.grid(False)
plt.show()

# %% [markdown]
# ## The run
#
# The recipe says how many rows come from where. The worker continues from the weights of the stage before,
# `mid` (chapter 06), with the optimizer starting afresh and a learning rate that falls to zero from the
# first step on. Right in the figure, the held-out losses begin where chapter 06 ended: they are of the
# same conversations.

# %%
sft = run.config.recipe.sft
print("rows:", sft.rows)
result = launch.stage("sft", run, watch=lesson.Live())
print(f"{result['epochs']:.2f} passes over {result['conversations']}")

# %% [markdown]
# And the question from before:

# %%
print("asked:      ", question[:200])
for stage in ("base", "mid", "sft"):
    if stage in run.config.recipe.models:
        print(f"{stage} says:".ljust(12), answer(stage, question))
print("the answer: ", reference[:200])

# %% [markdown]
# ## What does it know?
#
# The evaluation asks what it has not seen in any training conversation. In the toy world these are
# facts that stand in the pretraining text only: answering right means having carried something over
# from reading to talking.
#
# Four-choice questions are scored in two ways. By **text**: ask the bare question, and see which of
# the four texts the model finds the likeliest answer. By **letter**, as the benchmarks do it: show all
# four, ask for A, B, C or D, and compare the letters' scores. The dashed line is guessing.

# %%
scores = launch.stage("eval", run, of="sft", watch=lesson.Live())
asked = {name: found for name, found in scores.items() if "letters" in found}
places = np.arange(len(asked))
figure, axes = plt.subplots(figsize=(7.2, 2.6))
for shift, way, colour in ((-0.2, "text", lesson.BLUE), (0.2, "letters", lesson.ORANGE)):
    heights = [100 * found[way] for found in asked.values()]
    bars = axes.bar(places + shift, heights, 0.36, label=f"by {way}", color=colour)
    axes.bar_label(bars, fmt="%.0f")
chance = np.mean([found["chance"] for found in asked.values()])
axes.axhline(100 * chance, color="black", ls="--", zorder=0)
axes.set_xticks(places, list(asked))
axes.set(title="% right", ylim=(0, 108))
axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
plt.show()

# %% [markdown]
# ## Why do the letters fail?
#
# The same model, the same questions: it may know the answer and still not its letter. To answer "C" it
# would have to find the right text among four, look up which letter stands beside it, and say that
# letter: three steps, the middle one a lookup inside the question. A model this small learns a
# shortcut, namely how often each letter is right.
#
# Here are the letter probabilities for some thirty questions, sorted by the right answer. A model that
# could bind letters would light up the dots. How much do these columns depend on them?


# %%
@torch.no_grad()
def letter_probabilities(model, question, choices):
    prompt = Conversation.ask(choice_question(question, choices)).prompt(tokenizer)
    logits_V = model(torch.tensor([prompt]))[0, -1]
    letters = [tokenizer.encode(letter)[0] for letter in LETTERS[: len(choices)]]
    return logits_V[letters].softmax(dim=-1)


model = checkpoint.load_model(run.stage("sft").checkpoints, cpu.device)
quiz = tasks.load(next(iter(asked)), "test", run.mirror())
rows = [i for i in range(min(32, len(quiz))) if len(quiz.choices(i)) == 4]
rows = [i for i in rows if len(quiz.unanswered(i).prompt(tokenizer)) <= length]
rows.sort(key=quiz.answer)
print(letter_probabilities(model, quiz.question(rows[0]), quiz.choices(rows[0])))

# %%
answers = [letter_probabilities(model, quiz.question(i), quiz.choices(i)) for i in rows]
table_NC, right_N = torch.stack(answers), torch.tensor([quiz.answer(i) for i in rows])
by_hand = (table_NC.argmax(dim=1) == right_N).tolist()
assert by_hand == [right for right, _ in by_letter(Engine(model, tokenizer, cpu), quiz, rows)]
print(f"{np.mean(by_hand):.0%} right by letter")

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.2))
figure.colorbar(lesson.heatmap(axes, table_NC.T, rows=list("ABCD"), limits=(0, 1)))
axes.plot(range(len(rows)), right_N, ".", color=lesson.RED)
axes.set(xlabel="question", title="probability of each letter (red: the right one)")
plt.show()

# %% [markdown]
# Now compare the choices' *texts*. Each is scored as an answer to the bare question: the sum of the
# log-probabilities of its tokens, the ending marker included. What the model knows, it shows here.


# %%
@torch.no_grad()
def text_score(model, question, choice):
    rendered = Conversation.ask(question, choice).render(tokenizer, length + 1)
    ids, mask = np.array(rendered.ids), np.array(rendered.loss_mask)
    return -model.nll(batch_of_rows([ids], [mask], len(ids) - 1, tokenizer.bos)).sum().item()


right = []
for i in rows:
    points = [text_score(model, quiz.question(i), choice) for choice in quiz.choices(i)]
    right.append(points.index(max(points)) == quiz.answer(i))
assert right == [right for right, _ in by_text(Engine(model, tokenizer, cpu), quiz, rows)]
print(f"{np.mean(right):.0%} right by text")

# %% [markdown]
# ## Let it write first
#
# What if the model may say the answer before it has to name a letter? It answers the bare question in
# its own words, and we look which choice it named. The hard step, the lookup, is then ours.

# %%
engine = Engine(model, tokenizer, cpu)
bare = [Conversation.ask(quiz.question(i)).prompt(tokenizer) for i in rows]
said = [tokenizer.decode(ids) for ids in engine.complete(bare, max_new_tokens=16)]
named = [[c for c in quiz.choices(i) if c in text] for i, text in zip(rows, said, strict=True)]
right = [n == [quiz.choices(i)[quiz.answer(i)]] for i, n in zip(rows, named, strict=True)]
print(f"{np.mean(right):.0%} name the right choice, and no other, when they write first")

# %% [markdown]
# And the model's own lookup? The four choices stand in the question, the *right* text is already written
# as the beginning of its answer, and the letters are compared once more.


# %%
@torch.no_grad()
def letter_after_text(question, choices, text):
    asked = Conversation.ask(choice_question(question, choices)).prompt(tokenizer)
    logits_V = model(torch.tensor([asked + tokenizer.encode(f"{text} ")]))[0, -1]
    letters = [tokenizer.encode(letter)[0] for letter in LETTERS[: len(choices)]]
    return logits_V[letters].argmax().item()


truth = [(quiz.question(i), quiz.choices(i), quiz.answer(i)) for i in rows]
found = [letter_after_text(q, choices, choices[answer]) for q, choices, answer in truth]
hits = [letter == answer for letter, (_, _, answer) in zip(found, truth, strict=True)]
print(f"{np.mean(hits):.0%} find the letter, the right text before their eyes")

# %% [markdown]
# Where the scores by text are high (the toy world), writing first turns a question that the model fails
# into one that it knows: the answer comes out of its memory in a form that it was trained to give. (Larger
# models gain from the same thing when they reason step by step.) Where they are near guessing, nothing is
# there to come out, and writing first cannot help. What stays hard either way is the last step, copying the
# letter that stands beside a text: an *induction* circuit, for which a few drills of SFT at this size are
# not enough.
#
# Large models do learn to bind letters, and then the letters are the cheaper test. A benchmark
# measures the model *and* the way of asking.
#
# ## In words
#
# The plainest test: ask, and read what it says.

# %%
for name, found in scores.items():
    if "samples" in found:
        print(f"{name}: {found['accuracy']:.0%} of {found['questions']} right\n")
        for asked_text, answered, is_right in found["samples"]:
            print(f"{'✓' if is_right else '✗'} {asked_text[:120]}  →  {answered[:120]}")

# %% [markdown]
# ## Exercises
#
# **1.** From ids and mask to targets: position *t*'s target is the next id, or −1 where that is not
# said by the assistant.


# %% tags=["exercise"]
def targets(ids, mask):
    return ...


lesson.check(
    targets,
    ([1, 2, 3, 4], [False, False, True, True], [-1, 3, 4]),
    ([7, 8], [False, False], [-1]),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def targets(ids, mask):
#     return [id if said else -1 for id, said in zip(ids[1:], mask[1:], strict=True)]
# ```
#
# </details>
#
# **2.** Is 31 % on `n` four-choice questions better than guessing? The share of right guesses has a
# standard error of √(p(1−p)/n). How many standard errors above chance is a `score`?


# %% tags=["exercise"]
def errors_above_chance(score, n, chance=0.25):
    return ...


lesson.check(errors_above_chance, (0.31, 100, 1.385641), (0.31, 2400, 6.788225))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def errors_above_chance(score, n, chance=0.25):
#     return (score - chance) / (chance * (1 - chance) / n) ** 0.5
# ```
#
# With a hundred questions, 31 % may well be luck. With 2,400 it is not. Below two, be quiet.
#
# </details>
#
# **3.** How many of 1,000 conversations' tokens are learned from? Write the share of tokens that are
# said, over several masks: one division, at the end.


# %% tags=["exercise"]
def share_said(masks):
    return ...


lesson.check(share_said, ([[False, True], [True] * 6], 0.875), ([[False], [True]], 0.5))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def share_said(masks):
#     return sum(map(sum, masks)) / sum(map(len, masks))
# ```
#
# </details>
#
# ## To read
#
# - Ouyang et al., *Training language models to follow instructions with human feedback*,
#   [arXiv:2203.02155](https://arxiv.org/abs/2203.02155)
# - Allal et al., *SmolLM2* (the conversations' source, SmolTalk),
#   [arXiv:2502.02737](https://arxiv.org/abs/2502.02737)
# - Hendrycks et al., *Measuring Massive Multitask Language Understanding*,
#   [arXiv:2009.03300](https://arxiv.org/abs/2009.03300)
# - Robinson, Rytting & Wingate, *Leveraging Large Language Models for Multiple Choice Question
#   Answering* (letters, and which models can bind them),
#   [arXiv:2210.12353](https://arxiv.org/abs/2210.12353)
# - Ding et al., *Fewer Truncations Improve Language Modeling* (best-fit packing),
#   [arXiv:2404.10830](https://arxiv.org/abs/2404.10830)
#
# In the code: `nanolib/conversation.py`, `nanolib/data/packing.py`, `nanolib/evals/choices.py`,
# `nanolib/tasks.py`. **Next:** 08, answers that can be graded.
