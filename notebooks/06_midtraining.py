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
# [▶ Open this chapter in Colab](https://colab.research.google.com/github/OWNER/nanolib/blob/main/notebooks/06_midtraining.ipynb): nothing to install on your machine.

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
# # 06 · Between reading and talking
#
# The model of [chapter 04](04_pretraining.ipynb) has read a great deal and has never been spoken to. How
# does it learn that a conversation has two sides, that a question with four choices wants a letter, and
# that it may ask a calculator? And what does it lose while it learns? **Midtraining** is the same training
# as before, on other text.
#
# **You will learn**
# - how chats, quizzes and word problems become one grammar, and text becomes a tool call;
# - what a mixture really weighs, what the model gains from it, what it forgets, and what helps;
# - how to find out whether a model believes its tool, by lying to it.
#
# **You need** special tokens ([chapter 01](01_tokenizer.ipynb)) and the training loop
# ([chapter 04](04_pretraining.ipynb));
# the engine that runs a tool ([chapter 05](05_inference.ipynb)).
#
# **Takes** 30 minutes to read and run, 55 more with the exercises; in profile `demo` the stage trains for
# another one or two minutes on two CPU cores. Stages: `mid`, then `eval` of `mid`.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import itertools
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch

import checks
import lesson
from nanolib import checkpoint, launch, tasks
from nanolib.conversation import Conversation, Message, answer_parts
from nanolib.data.packing import batch_of_rows
from nanolib.data.sources import ConversationSource, TextSource, split_documents
from nanolib.engine import Engine
from nanolib.evals.bpb import bits_per_byte
from nanolib.model import GPT
from nanolib.optim import MuonAdamW
from nanolib.runtime import Runtime
from nanolib.stages.text import limits, shard_paths
from nanolib.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanolib.tools import Sandbox

run = lesson.begin(profile, run, overrides)
before = launch.stage("eval", run, of="base", watch=lesson.Live())  # chapter 04's, if not there yet
tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)
STEPS, SEEDS = (30, (1, 2)) if profile == "demo" else (3, (1,))  # what a lesson has time for

# %% [markdown]
# One thing before we start. In profile `demo` the conversations, quizzes and sums are **toy tasks**: they
# come from the toy world, they are short, and a model of a million weights can learn them in two minutes.
# They share their form with the real ones and nothing else, so compare these scores with each other, never
# with a published number. The larger profiles run this same chapter on the real data sets.
#
# ## 1. Markers it has never seen
#
# Conversations are written with nine [special tokens](glossary.ipynb#special-token). The pretraining text
# holds only one of them, `<|bos|>`. The others have rows in the embedding table all the same, drawn at
# random when the model was made. **Predict**: how far have those rows moved during pretraining?

# %%
base = checkpoint.load_model(run.stage("base").checkpoints, cpu.device)
newborn = GPT.build(base.config, tokenizer.vocab_size, cpu.device, run.config.recipe.seed)
moved_V = (base.embedding.weight - newborn.embedding.weight).norm(dim=1).tolist()
for name in SPECIAL_TOKENS[:5]:
    print(f"{name:20} {moved_V[tokenizer.special(name)]:.2f}")
print(f"{'the median token':20} {np.median(moved_V):.2f}")
assert moved_V[tokenizer.bos] > 0
assert moved_V[tokenizer.special("<|assistant_start|>")] == 0.0

# %% [markdown]
# Not at all: a token that is never read gets no gradient. For this model `<|assistant_start|>` is noise.
# What does it write when it stands there? We ask it for something it may know, and for something that
# needs a calculator. The kinds of parts are in brackets: `text`, `python` (what the model gives to the
# tool) and `output` (what the tool gives back).


# %%
def answer(model, question, tool=None, tokens=60):
    with Sandbox() as sandbox:
        engine = Engine(model, tokenizer, cpu, tool or (lambda source: sandbox.run(source).text))
        prompt = Conversation.ask(question).prompt(tokenizer)
        (ids,) = engine.complete([prompt], max_new_tokens=min(tokens, engine.context - len(prompt)))
    return answer_parts(ids, tokenizer)


def show(parts):
    for part in parts:
        print(f"    [{part.kind}] {part.text[:100]!r}")


chats, problems = (tasks.load(name, "test", run.mirror()) for name in ("smoltalk", "gsm8k"))
asked = [task.conversation(3).turns[0].text for task in (chats, problems)]
by_base = [answer(base, question) for question in asked]
for question, parts in zip(asked, by_base, strict=True):
    print(question[:300])
    show(parts)

# %% [markdown]
# ## 2. Three sources, one grammar
#
# **Conversations** are there as they are. **Four choices** become a conversation too: the question and its
# choices from the user, one letter from the assistant. **Word problems** come as GSM8K writes them, with
# every sum marked for a calculator, `<<a+b=c>>`:

# %%
quiz, solved = (tasks.load(name, "train", run.mirror()) for name in ("mmlu", "gsm8k"))
question, letter = quiz.conversation(0).messages
print(f"{question.text}\n→ {letter.text}\n")
raw = solved.row(0)
print(f"{raw['question']}\n→ {raw['answer']}")

# %% [markdown]
# Left of the last `=` stands what to give to the tool, right of it what comes back. That is all there is
# to teaching a tool: cut the text at the marks, and say of each piece whose it is.
#
# **Exercise 6.1 ★★ · 8 minutes · build** A tool call out of text.
# Write the cutting. Each `<<source=result>>` becomes a `python` piece and an `output` piece, what stands
# between is `text`. What if the source contains a `=` itself?


# %% tags=["exercise"]
def parts_of(text):
    """'Jill has <<24-21=3>>3 left.' -> a list of (kind, text) pairs; no empty text pieces."""
    ...


checks.verify("6.1", parts_of)

# %% [markdown]
# <details><summary>Hint 1</summary><code>text.partition("&lt;&lt;")</code> gives what stands before the first mark, the mark,
# and the rest. Which method cuts at the <em>last</em> <code>=</code>?</details>
# <details><summary>Hint 2</summary><code>while "&lt;&lt;" in text:</code> partition at <code>&lt;&lt;</code>, then at <code>&gt;&gt;</code>, then <code>rpartition("=")</code>.
# What is left over at the end is text.</details>
# <details><summary>Solution</summary>
#
# ```python
# def parts_of(text):
#     parts = []
#     while "<<" in text:
#         said, _, rest = text.partition("<<")
#         call, _, text = rest.partition(">>")
#         source, _, result = call.rpartition("=")
#         parts += [("text", said), ("python", source), ("output", result)]
#     parts.append(("text", text))
#     return [part for part in parts if part[0] != "text" or part[1]]
# ```
#
# </details>

# %% [markdown]
# nanolib's version does the same, and one thing more. The results came with the problems, but when the
# model writes a program itself, our sandbox will answer. Do the two agree? In the toy world, always. In
# GSM8K one in four differs in form: `48/2` is 24 on paper and 24.0 in Python. A model that had read only
# 24 would be at a loss when it reads 24.0, so nanolib's conversations hold what Python says.

# %%
show(tasks.calculator_parts(raw["answer"]))
calls = []
for i in range(min(60, len(solved))):
    parts = tasks.calculator_parts(solved.row(i)["answer"])
    pairs = itertools.pairwise(parts)
    calls += [(call.text, result.text) for call, result in pairs if call.kind == "python"]
with Sandbox() as sandbox:
    said = [sandbox.run(source).text for source, _ in calls]
agree = [result == text for (_, result), text in zip(calls, said, strict=True)]
print(f"{np.mean(agree):.0%} of {len(calls)} written results are what the sandbox prints")
told = [solved.conversation(i).messages[-1].parts for i in range(min(60, len(solved)))]
assert said == [part.text for parts in told for part in parts if part.kind == "output"]

# %% [markdown]
# Now all three are conversations, and a conversation becomes ids by one rule, the
# [chat template](glossary.ipynb#chat-template): `<|bos|>`, then for each message its opening marker, its
# text, its closing marker. A part that is not text has markers of its own inside.
#
# **Exercise 6.2 ★★ · 12 minutes · build** Render a conversation.
# Write that rule. `encode(text)` gives a text's ids, `special(name)` the id of a marker, for instance
# `special("<|user_start|>")`. Why must the markers not go through `encode`?


# %% tags=["exercise"]
def render(messages, encode, special):
    """messages: a list of (role, parts), parts: a list of (kind, text) pairs -> a list of ids."""
    ...


checks.verify("6.2", render)

# %% [markdown]
# <details><summary>Hint 1</summary>Two loops, messages and parts. Which markers belong to which?</details>
# <details><summary>Hint 2</summary>A part with <code>kind != "text"</code> puts <code>&lt;|kind_start|&gt;</code> and <code>&lt;|kind_end|&gt;</code> around
# its ids; a message puts <code>&lt;|role_start|&gt;</code> and <code>&lt;|role_end|&gt;</code> around all its parts.</details>
# <details><summary>Solution</summary>
#
# ```python
# def render(messages, encode, special):
#     ids = [special("<|bos|>")]
#     for role, parts in messages:
#         ids.append(special(f"<|{role}_start|>"))
#         for kind, text in parts:
#             piece = encode(text)
#             if kind != "text":
#                 piece = [special(f"<|{kind}_start|>"), *piece, special(f"<|{kind}_end|>")]
#             ids += piece
#         ids.append(special(f"<|{role}_end|>"))
#     return ids
# ```
#
# If `encode` made markers of text, whoever types `<|assistant_start|>` into a chat could put words into the
# model's mouth.
#
# </details>

# %% [markdown]
# This is a word problem as the model reads it. Blue: the words that the assistant says. Green: the program
# it writes, markers included. Orange: what the tool puts there. Grey: what it only reads. Blue and green are
# **targets**, the tokens that the loss grades; [chapter 07](07_sft.ipynb) is about that rule.


# %%
def coloured(rendered):
    """lesson.tokens of a rendered conversation, by who put each token there."""
    inside, kinds = "chosen", []
    for id, graded in zip(rendered.ids, rendered.loss_mask, strict=True):
        name = tokenizer.decode([id])
        inside = {"<|python_start|>": "program", "<|output_start|>": "forced"}.get(name, inside)
        read = "forced" if inside == "forced" else "masked"
        kinds.append(inside if graded else read)
        inside = "chosen" if name in ("<|python_end|>", "<|output_end|>") else inside
    lesson.tokens([tokenizer.decode([id]) for id in rendered.ids], kinds=kinds)


for example in (solved.conversation(0), quiz.conversation(0)):
    coloured(example.render(tokenizer, max_tokens=150))

# %% [markdown]
# ## 3. The mixture
#
# The recipe says how many examples are taken of each source. But the loss is a mean over *targets*. So
# how much of the loss is each source? **Predict**: which of the three will nearly vanish? (We look at two
# hundred examples of each source and scale up.)

# %%
counts = {}
for name, limit in limits(run.config.recipe, "mid").items():
    own = name == "mine"  # your own conversations, where the run was given some; they repeat
    source = tasks.load("smoltalk" if own else name, "train", run.own() if own else run.mirror())
    rows = (limit if own else min(limit, len(source))) if limit else len(source)
    places = np.random.default_rng(1).permutation(len(source))[: min(rows, 200)].tolist()
    looked = [source.conversation(i).render(tokenizer) for i in places]
    tokens = np.mean([len(r.ids) for r in looked])
    targets = np.mean([sum(r.loss_mask) for r in looked])
    counts[name] = rows * np.array([1, tokens, targets])
    print(f"{name:10} {rows:7,} examples of {tokens:5.0f} tokens, {targets / tokens:4.0%} graded")

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.3))
left_3, totals_3 = np.zeros(3), np.sum(list(counts.values()), axis=0)
looks = zip(("#2b6cb0", "#b7791f", "#6b46c1", "#4a5568"), ("", "///", "...", "xx"), strict=True)
for (name, numbers), (colour, hatch) in zip(counts.items(), looks, strict=False):
    share_3 = 100 * numbers / totals_3
    bars = axes.barh(
        ["examples", "tokens", "targets"], share_3, left=left_3, label=name, color=colour
    )
    for bar in bars:
        bar.set(hatch=hatch, edgecolor="white")
    left_3 += share_3
axes.invert_yaxis()
axes.set(xlabel="% of the mixture", xlim=(0, 100))
axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
lesson.show("Three stacked bars of the sources' shares by examples, by tokens, and by targets")
print({name: f"{numbers[2] / totals_3[2]:.1%} of the targets" for name, numbers in counts.items()})

# %% [markdown]
# A question with four choices has two targets, its letter and the end of the turn, however long it is. It
# takes its full place in the batch and weighs next to nothing in the loss. A word problem is graded about
# as densely as a conversation; if it weighs more than its number says, that is because it is *longer*.
# Whoever sets a mixture by counting examples sets something else.
#
# **Exercise 6.3 ★ · 3 minutes · predict** How many questions?
# A mixture has 180,000 targets in conversations. How many questions with four choices, two targets each,
# must be added to make up a *tenth* of all targets?

# %% tags=["exercise"]
questions_needed = ...

checks.verify("6.3", questions_needed)

# %% [markdown]
# <details><summary>Hint 1</summary>A tenth of what: of the 180,000, or of everything together?</details>
# <details><summary>Hint 2</summary>If they are a tenth, then the 180,000 are nine tenths.</details>
# <details><summary>Solution</summary>
#
# ```python
# questions_needed = 180_000 / 9 / 2
# ```
#
# This is one reason why the system this course rebuilds mixes in a hundred thousand of them.
#
# </details>

# %% [markdown]
# Now the stage. Watch the loss on held-out conversations (right), source by source, from before the first
# step. The four choices (`mmlu`) are curious: soon the model knows *that* a letter is wanted and that
# the turn ends after it, but not *which* letter. One even guess among four and one certain token:
# ln 4 / 2 = 0.69 [nats](glossary.ipynb#nats) a target. (The legend says where each curve ends. What is above 0.69
# is uneven guessing.)

# %%
mid = run.config.recipe.mid
steps = mid.steps or math.ceil(mid.epochs * totals_3[1] / mid.batch_tokens)
print(f"{totals_3[1]:,.0f} tokens at {mid.batch_tokens:,} a step: about {steps:,} steps")
result = launch.stage("mid", run, watch=lesson.Live())
print(f"the stage took {result['steps']:,} steps, {result['epochs']:.2f} passes")

# %% [markdown]
# (A few steps off the estimate is no fault: that looked at two hundred examples, and took every row to be full.)
#
# Why a stage of its own? New markers, new formats and a tool are much to learn, so midtraining takes many
# tokens and large steps. Chapter 07 follows with few, clean examples and small steps, so that little is
# lost. One stage for both would need one learning rate for both. This is the multiplier of all rates, step
# after step; each stage begins with a fresh optimizer.

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.4))
start = 0
for stage, colour, hatch in (("base", lesson.GREY, ""), ("mid", lesson.BLUE, "///")):
    train = [row for row in run.stage(stage).metrics.rows() if row["kind"] == "train"]
    at, rates = [start + row["step"] for row in train], [row["lr"] for row in train]
    targets = sum(row["tokens"] for row in train)
    label = f"{stage}: {targets:,} targets"
    axes.fill_between(at, rates, facecolor=colour, hatch=hatch, alpha=0.6, label=label)
    start += len(train)
axes.axhline(run.config.recipe.sft.lr, color=lesson.VIOLET, ls="--", label="where sft starts")
axes.set(xlabel="step", ylabel="multiplier of the rates", ylim=(0, None))
axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
lesson.show(
    "The rate of base, then the lower one of mid; each falls to zero at its end; sft's is lower"
)

# %% [markdown]
# ## 4. The same chat, written twice
#
# Once by the reader, once by the talker. Same questions, same markers, same engine.

# %%
talker = checkpoint.load_model(run.stage("mid").checkpoints, cpu.device)
by_mid = [answer(talker, question) for question in asked]


def cell(parts):
    """Parts as one line of a table."""
    words = " ".join(f"**{part.kind}** {part.text[:120]!r}" for part in parts) or "(nothing)"
    return words.replace("|", "\\|").replace("<", "&lt;").replace("#", "\\#")


table = ["| asked | base | mid |", "|---|---|---|"]
for question, old, new in zip(asked, by_base, by_mid, strict=True):
    asked_text = question[:160].replace("|", "\\|").replace("\n", " ")
    table.append(f"| {asked_text} | {cell(old)} | {cell(new)} |")
lesson.markdown("\n".join(table))

# %% [markdown]
# The form is there. Whether a program is the *right* sum is another matter (do its numbers stand in the problem?);
# section 6 counts.
#
# What exactly has it learned? We score every token of some held-out conversations with both models and
# sort the [surprises](glossary.ipynb#surprise) by the kind of token. Three kinds were *never* targets: the
# user's words, the user's numbers, and the tool's results. **Predict**: which bar falls most, and which
# numbers stay a surprise?

# %%
NAMES = ["user's words", "user's numbers", "words", "numbers", "program", "result", "markers"]
ITS_OWN = ("<|python_start|>", "<|python_end|>", "<|assistant_end|>")  # the model writes these
print(len(NAMES), "kinds; of the markers, the model has to write", *ITS_OWN)


# %%
def kinds_of(ids):
    """Which of NAMES each id is; None for a marker that the model never has to write."""
    found, part = [], "user"
    for id in ids:
        piece = tokenizer.decode([id])
        if piece in SPECIAL_TOKENS:
            found.append(NAMES.index("markers") if piece in ITS_OWN else None)
            opened = piece.strip("<|>").removesuffix("_start")
            part = opened if piece.endswith("_start|>") else "assistant"
        elif part in ("python", "output"):
            found.append(NAMES.index("program" if part == "python" else "result"))
        else:
            found.append((0 if part == "user" else 2) + piece.strip().isdigit())
    return found


# %%
length = base.config.sequence_len
nats_KM, count_K = np.zeros((len(NAMES), 2)), np.zeros(len(NAMES), int)
for example in [task.conversation(i) for task in (chats, problems) for i in range(12)]:
    ids = np.array(example.render(tokenizer, length + 1).ids)
    batch = batch_of_rows([ids], [ids >= 0], len(ids) - 1, tokenizer.bos)
    kinds = kinds_of(ids.tolist())[1:]
    with torch.no_grad():
        scores = [model.nll(batch)[0].tolist() for model in (base, talker)]
    for kind, *nats in zip(kinds, *scores, strict=True):
        if kind is not None:
            nats_KM[kind] += nats
            count_K[kind] += 1
nats_KM /= count_K.clip(1)[:, None]
print(", ".join(f"{name} {count}" for name, count in zip(NAMES, count_K, strict=True)), "tokens")
falls_K = nats_KM[:, 0] - nats_KM[:, 1]
assert profile != "demo" or NAMES[falls_K.argmax()] == "markers"

# %%
figure, axes = plt.subplots(figsize=(7.6, 2.8))
places = np.arange(len(NAMES))
for shift, stage, colour, hatch in ((-0.2, 0, lesson.GREY, ""), (0.2, 1, lesson.BLUE, "///")):
    look = {"color": colour, "hatch": hatch, "edgecolor": "white"}
    bars = axes.bar(places + shift, nats_KM[:, stage], 0.38, label=("base", "mid")[stage], **look)
    axes.bar_label(bars, fmt="%.1f")
axes.set_xticks(places, [name.replace(" ", "\n") for name in NAMES])
axes.set(ylabel="surprise (nats a token)")
axes.margins(y=0.15)
axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
lesson.show(
    "Surprise by kind of token, base beside mid: the markers' falls most, to nearly nothing"
)

# %% [markdown]
# The markers were the greatest surprise of all, and hardly any of it is left: that is the grammar,
# learned. The assistant's *numbers* are mostly copies, of the tool's result or of the answer just given;
# copying is easy. The *program* is where the model has to choose. The user's words and numbers and the
# results were never graded: whatever those bars do is a by-product. So the model has no idea what a result
# will be. It has to ask.
#
# ## 5. What it costs
#
# The stage's evaluation scores the new model on the plain text of chapter 04 as well. None of that text
# was shown in this stage, so the weights were free to drift away from it.

# %%
after = launch.stage("eval", run, of="mid", watch=lesson.Live())
bits = {name: found["compression"]["bpb"] for name, found in (("base", before), ("mid", after))}
print(f"bits per byte of held-out text: {bits['base']:.3f} → {bits['mid']:.3f}")
for name in run.config.recipe.eval.tasks:
    found = after[name]
    told = ("text", "letters", "accuracy", "chance")
    print(f"{name:20}", {key: f"{found[key]:.0%}" for key in told if key in found})

# %% [markdown]
# That is [forgetting](glossary.ipynb#forgetting). The manner of that text, its stories
# and lists, fades: it is hardly asked for any more (Pip's own stories are three short sentences). What it *told*
# lasts longer, because the answers need it: `facts` asks, in the toy world, what stands in the pretraining text alone. (`text` and
# `letters` are two ways to score four choices; chapter 07 says why they can be so far apart. `humaneval` is a toy
# as well: ten short functions to write, with changing numbers in them.)
#
# The usual cure is to mix some pretraining text into the stage. Does the forgetting vanish? And does the
# chat suffer? An experiment in small, from the base model: thirty steps with four rows of conversations,
# and thirty with the same four rows **and one row of text**. This is the whole training loop.

# %% tags=["loop"]
folder = next(run.stage("mid").path.glob("conversations-*"))  # what the stage has rendered
documents = split_documents(np.load(shard_paths(run)[1]), tokenizer.bos)[:40]
about = {"length": length, "bos": tokenizer.bos}
held_out = ConversationSource.open(
    folder / "held_out" / "smoltalk", batch_rows=8, seed=1, **about
).updates(0)[0][0]


def short_midtraining(text_rows, seed):
    """Train the base model for STEPS steps; what it scores then on text and on chats."""
    model = checkpoint.load_model(run.stage("base").checkpoints, cpu.device)
    optimizer = MuonAdamW(model, replace(run.config.recipe.optim, clip=None), cpu)
    sources = [ConversationSource.open(folder / "train", batch_rows=4, seed=seed, **about)]
    if text_rows:
        paths = shard_paths(run)[0]
        sources.append(TextSource.open(paths, batch_rows=text_rows, seed=seed, **about))
    for step in range(STEPS):
        batches = [batch for source in sources for batch in source.updates(step)[0]]
        count = sum(int((batch.targets_BT >= 0).sum()) for batch in batches)
        for batch in batches:
            (model.nll(batch).sum() / count).backward()
        optimizer.step(mid.lr * min(1.0, (STEPS - step) / (0.4 * STEPS)))
        optimizer.zero_grad()
    return scores_of(model)


print(f"{STEPS} steps, {len(SEEDS)} seeds, {len(documents)} documents to score")


# %%
@torch.no_grad()
def scores_of(model):
    """Bits per byte of held-out text, and nats a target of held-out conversations."""
    bpb = bits_per_byte(model, documents, tokenizer, cpu)
    return bpb, float(model.nll(held_out).sum() / (held_out.targets_BT >= 0).sum())


start_bpb, start_chat = scores_of(base)
found = {rows: [short_midtraining(rows, seed) for seed in SEEDS] for rows in (0, 1)}
print(f"{'before':16} text {start_bpb:.3f}   chat {start_chat:.2f}")
for rows, name in ((0, "chats alone"), (1, "chats and text")):
    for seed, (bpb, chat) in zip(SEEDS, found[rows], strict=True):
        print(f"{name:14} {seed} text {bpb:.3f}   chat {chat:.2f}")

# %%
figure, panels = plt.subplots(1, 2, figsize=(7.6, 2.5))
titles = ("text: bits per byte", "chat: nats a target")
for axes, score, title in zip(panels, (0, 1), titles, strict=True):
    for place, marker in enumerate("os"[: len(SEEDS)]):
        pair = [found[rows][place][score] for rows in (0, 1)]
        axes.plot([0, 1], pair, f"{marker}-", color=lesson.BLUE, label=f"seed {SEEDS[place]}")
    axes.set_xticks([0, 1], ["chats alone", "chats and text"])
    axes.set(xlim=(-0.4, 1.4), title=title)
    axes.margins(y=0.3)
panels[1].set_ylim(0, 1.3 * found[0][0][1])  # from zero: what is small is to look small
panels[0].axhline(start_bpb, color=lesson.RED, ls="--", label="before")
panels[0].legend(loc="upper left", bbox_to_anchor=(0, -0.15), ncols=3)
lesson.show("Held-out text and chat, without and with a row of text: less is forgotten with it")
forgotten = {rows: np.mean([bpb for bpb, _ in found[rows]]) - start_bpb for rows in (0, 1)}
print(f"forgotten: {forgotten[0]:.3f} bits per byte, with text {forgotten[1]:.3f}")
assert profile != "demo" or 0 < forgotten[1] < forgotten[0]

# %% [markdown]
# How far to trust this? There are two seeds, thirty steps and forty documents. What counts is the difference
# *within* a seed, where the two runs saw the same chats. Compare it with the difference *between* the seeds:
# what is smaller than that, as for the chat in the runs we looked at, cannot be told from noise. So we can
# say that text protects the text, and not whether it helps or harms the chat.
#
# And the forgetting does **not vanish**. It shrinks, and the bill is one row in five of the computing. That
# row is far more than a fifth of the *targets*, since every token of a text counts: section 3 once more.
# Larger systems do mix text in here. nanolib's recipe does not, to stay with the system it rebuilds, and
# pays in bits per byte.
#
# ## 6. Does it use its tool?
#
# We ask the held-out word problems, with the sandbox as the tool, and count.


# %%
def solve(tool, count=24):
    engine = Engine(talker, tokenizer, cpu, tool)
    prompts = [problems.unanswered(i).prompt(tokenizer) for i in range(count)]
    said = engine.complete(prompts, max_new_tokens=min(100, length - max(map(len, prompts))))
    return [Message("assistant", answer_parts(ids, tokenizer)) for ids in said]


def right(answers):
    return float(np.mean([problems.grade(i, said.text) for i, said in enumerate(answers)]))


with Sandbox() as sandbox:
    honest = solve(lambda source: sandbox.run(source).text)
calling = [any(part.kind == "python" for part in said.parts) for said in honest]
print(f"{np.mean(calling):.0%} of the answers call the tool, {right(honest):.0%} are right")
for i in (0, 1):
    print(problems.row(i)["question"])
    show(honest[i].parts)

# %% [markdown]
# Where an answer is wrong, look at its program: the tool did that sum well, but was it the right sum? And a
# right answer proves nothing: the model might do the sum in its head and call for show. So give it a
# tool that **lies**: each result is 1 too large. **Predict**: what happens to the answers, if the model
# believes its tool? And if it does not?


# %%
def liar(source):
    text = sandbox.run(source).text
    return str(int(text) + 1) if text.lstrip("-").isdigit() else text


with Sandbox() as sandbox:
    deceived = solve(liar)
print(f"right with an honest tool {right(honest):.0%}, with a lying one {right(deceived):.0%}")
place = int(np.argmax(calling))  # the first that calls
print(problems.row(place)["question"])
show(deceived[place].parts)

# %% [markdown]
# Fewer right answers alone could mean that the lie merely confused it. Belief is more: the answer *is* the
# lie. You write the judge.
#
# **Exercise 6.4 ★★ · 8 minutes · build** Believes, ignores, or never asks.
# From an answer's parts, return `"no call"` where the tool was not asked, `"believes"` where the number
# after `####` is the tool's last result, else `"ignores"`. What about an answer that is cut off before its
# number?


# %% tags=["exercise"]
def verdict(parts):
    """parts: a list of (kind, text) pairs -> "no call", "believes" or "ignores"."""
    ...


checks.verify("6.4", verdict)

# %% [markdown]
# <details><summary>Hint 1</summary>Collect the <code>output</code> texts; if there is none, nothing was asked. Two steps
# mean two results: which one does the answer end with?</details>
# <details><summary>Hint 2</summary>Join the <code>text</code> pieces, take what follows the last <code>####</code>, and strip it. No
# <code>####</code>: then nothing was believed.</details>
# <details><summary>Solution</summary>
#
# ```python
# def verdict(parts):
#     results = [text for kind, text in parts if kind == "output"]
#     if not results:
#         return "no call"
#     _, mark, number = "".join(text for kind, text in parts if kind == "text").rpartition("####")
#     return "believes" if mark and number.strip() == results[-1] else "ignores"
# ```
#
# </details>


# %% tags=["solution-twin"]
# The same, counted over many answers.
def judged(answers):
    """How many answers believe the tool, ignore it, never ask."""
    kinds = {"believes": 0, "ignores": 0, "no call": 0}
    for said in answers:
        results = [part.text for part in said.parts if part.kind == "output"]
        believes = bool(results) and tasks.final_number(said.text) == results[-1]
        kinds["believes" if believes else "ignores" if results else "no call"] += 1
    return kinds


for name, answers in (("honest", honest), ("lying", deceived)):
    print(f"{name:7} tool: {right(answers):4.0%} right, {judged(answers)}")

# %%
shares = [right(honest), right(deceived), judged(deceived)["believes"] / len(deceived)]
labels = ["honest tool: right", "lying tool: right", "lying tool: answers the lie"]
figure, axes = plt.subplots(figsize=(7.2, 1.8))
bars = axes.barh(labels, 100 * np.array(shares), color=[lesson.BLUE, lesson.BLUE, lesson.FORCED])
bars[2].set(hatch=lesson.HATCHES[lesson.FORCED], edgecolor="white")
axes.bar_label(bars, fmt=" %.0f")
axes.set(xlim=(0, 108), xlabel=f"% of {len(deceived)} problems")
axes.invert_yaxis()
lesson.show(
    "Share right with an honest tool, with a lying tool, and share of answers that are the lie"
)

# %% [markdown]
# Where the third bar is long, the model believes what it is told: it has learned to read results, not to
# make them up. That is what we wanted, and it is worth a moment's thought: a model that believes its tool
# is as reliable as the tool. (An answer that is right in spite of the liar may be luck: two mistakes that
# cancel. Where hardly any were right to begin with, as in profile `smoke`, none of these bars says much.)
#
# What is left to learn is not the sum but *which* sum: the program. [Chapter 08](08_grpo.ipynb) works on
# that.
#
# **Exercise 6.5 ★★★ · 25 minutes · open** Small steps.
# Midtraining with ten times smaller steps: `overrides = {"mid.lr": 0.026}` and `run = "small-steps"` in the
# first cell make another run. Write down beforehand which bars of this chapter will change and which will
# not. What is known: small steps forget less and learn less. What is not obvious: which of the two
# shrinks more.

# %% tags=["open"]
my_prediction = {
    "bits per byte of text": "?",
    "held-out facts": "?",
    "word problems": "?",
    "belief": "?",
}
print(my_prediction)

# %% [markdown]
# ## To read
#
# - OLMo team, *2 OLMo 2 Furious* (a recipe with a stage in the middle, and what it is mixed from),
#   [arXiv:2501.00656](https://arxiv.org/abs/2501.00656)
# - Hu et al., *MiniCPM* (conversations in the last, falling part of pretraining),
#   [arXiv:2404.06395](https://arxiv.org/abs/2404.06395)
# - Cobbe et al., *Training Verifiers to Solve Math Word Problems* (GSM8K and its calculator),
#   [arXiv:2110.14168](https://arxiv.org/abs/2110.14168)
# - Schick et al., *Toolformer*, [arXiv:2302.04761](https://arxiv.org/abs/2302.04761)
# - Biderman et al., *LoRA Learns Less and Forgets Less* (how forgetting is measured),
#   [arXiv:2405.09673](https://arxiv.org/abs/2405.09673)
#
# In the code: `nanolib/conversation.py`, `nanolib/tasks.py`, `converse` in `nanolib/stages/training.py`,
# `nanolib/tools.py`. **Next:** [07, learning to answer](07_sft.ipynb).
