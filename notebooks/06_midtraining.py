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
# # 06 · Between reading and talking
#
# The model of chapter 04 has read a great deal and has never been spoken to. It does not know that a
# conversation has two sides, that a question with four choices wants a letter, or that it may ask a
# calculator. **Midtraining** shows it all three, in many examples, before chapter 07 polishes the manners.
# It is the same training as before, at high learning rates, on other text.
#
# **You will learn** how three kinds of data become one grammar, how a marked-up solution becomes a tool
# call, which tokens count, what a mixture is made of and why its shares are not what they seem, what a
# model gains and forgets, and how to see that it really uses its tool.
#
# **Takes** fifteen minutes to read. The stage trains for a few minutes in profile `demo` on two CPU
# cores. Stages: `mid`, then `eval` of `mid`.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import torch

import lesson
from nanolib import checkpoint, launch, tasks
from nanolib.config import flatten
from nanolib.conversation import Conversation, Message, Part, answer_parts
from nanolib.data.packing import batch_of_rows
from nanolib.engine import Engine
from nanolib.model import GPT
from nanolib.runtime import Runtime
from nanolib.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanolib.tools import Sandbox

run = lesson.begin(profile, run, overrides)
before = launch.stage("eval", run, of="base", watch=lesson.Live())  # chapter 04's, if not there yet
tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)

# %% [markdown]
# ## 1. Markers it has never seen
#
# Conversations are written with nine special tokens (chapter 01). The pretraining text holds only one of
# them, `<|bos|>`. The others have rows in the embedding table all the same: they were drawn at random
# when the model was made, and no gradient has ever reached them. See for yourself: here is how far each
# token's row has moved since then.

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
# So for this model `<|assistant_start|>` is noise. What does it say when it stands there, and what to
# a question that needs a calculator? We let it go on after each, with the tool at hand. Kinds of parts
# are printed in brackets, as `text`, `python` (what the model gives to the tool) and `output` (what the
# tool gives back).


# %%
def answer(model, question, tool=None, tokens=60):
    with Sandbox() as sandbox:
        engine = Engine(model, tokenizer, cpu, tool or (lambda source: sandbox.run(source).text))
        prompt = Conversation.ask(question).prompt(tokenizer)
        (ids,) = engine.complete([prompt], max_new_tokens=tokens)
    return answer_parts(ids, tokenizer)


def show(parts):
    for part in parts:
        print(f"    [{part.kind}] {part.text[:160]!r}")


chats, problems = (tasks.load(name, "test", run.mirror()) for name in ("smoltalk", "gsm8k"))
asked = [task.conversation(3).turns[0].text for task in (chats, problems)]
for question in asked:
    print(question[:300])
    show(answer(base, question))

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


# %%
def parts_of(text):
    parts = []
    while "<<" in text:
        said, _, rest = text.partition("<<")
        call, _, text = rest.partition(">>")
        source, _, result = call.rpartition("=")
        parts += [Part("text", said), Part("python", source), Part("output", result)]
    parts += [Part("text", text)]
    return tuple(part for part in parts if part.text or part.kind != "text")


for i in range(min(200, len(solved))):
    assert parts_of(solved.row(i)["answer"]) == tasks.calculator_parts(solved.row(i)["answer"])
show(parts_of(raw["answer"]))

# %% [markdown]
# The results in there came with the problems. When the model writes a program itself, our sandbox will
# answer. Is it the same? In the toy world, always. In GSM8K one in four differs in form: `48/2` is 24 on
# paper and 24.0 in Python. A model that had read only 24 would be at a loss when it talks, and reads 24.0.
# So nanolib's conversations hold what Python says.

# %%
calls = []
for i in range(min(60, len(solved))):
    pairs = itertools.pairwise(parts_of(solved.row(i)["answer"]))
    calls += [(call.text, result.text) for call, result in pairs if call.kind == "python"]
with Sandbox() as sandbox:
    said = [sandbox.run(source).text for source, _ in calls]
agree = [result == text for (_, result), text in zip(calls, said, strict=True)]
print(f"{np.mean(agree):.0%} of {len(calls)} written results are what the sandbox prints")
print("for example", calls[0], "→", repr(said[0]))
told = [solved.conversation(i).messages[-1].parts for i in range(min(60, len(solved)))]
assert said == [part.text for parts in told for part in parts if part.kind == "output"]

# %% [markdown]
# ## 3. What counts, part by part
#
# Only what the assistant says is a target. Chapter 07 finds these tokens in a finished list of ids; it is
# easier while the list is made, where each piece's speaker is known. A `python` part is the assistant's,
# with its markers: it must learn to call. An `output` is *not*, also its markers: the engine puts it
# there. A model that learned outputs would learn to make results up.


# %%
def rendered(conversation):
    special, pieces = tokenizer.special, [([tokenizer.bos], False)]
    for message in conversation.folded().messages:
        says = message.role == "assistant"
        pieces.append(([special(f"<|{message.role}_start|>")], False))
        for part in message.parts:
            ids = tokenizer.encode(part.text)
            if part.kind != "text":
                ids = [special(f"<|{part.kind}_start|>"), *ids, special(f"<|{part.kind}_end|>")]
            pieces.append((ids, says and part.kind != "output"))
        pieces.append(([special(f"<|{message.role}_end|>")], says))
    mask = [said for ids, said in pieces for _ in ids]
    return [id for ids, _ in pieces for id in ids], mask


# %%
for task in (chats, problems, quiz):
    for i in range(min(40, len(task))):
        real = task.conversation(i).render(tokenizer)
        assert rendered(task.conversation(i)) == (real.ids, real.loss_mask)
print("conversations, word problems, four choices: our ids and mask equal nanolib's")

# %% [markdown]
# One of each kind, with its targets in orange. Look at how few there are in a question with four choices.

# %%
for example in (chats.conversation(3), quiz.conversation(0), solved.conversation(0)):
    ids, mask = rendered(example)
    pieces = [tokenizer.decode([id]) for id in ids[:150]]
    lesson.tokens(pieces, groups=[int(m) for m in mask[:150]], legend=["read", "a target"])

# %% [markdown]
# ## 4. The mixture
#
# The recipe says how many examples are taken of each source. But an example is not what is learned from:
# a target is, since the loss is a mean over targets. So we count all three. (A few hundred examples of
# each source are looked at, and the counts scaled up.)

# %%
counts = {}
for name, limit in flatten(run.config.recipe.mid.rows).items():
    if limit == 0:
        continue
    source = tasks.load(name, "train", run.mirror())
    rows = len(source) if limit is None else min(limit, len(source))
    places = np.random.default_rng(1).permutation(len(source))[: min(rows, 200)].tolist()
    looked = [source.conversation(i).render(tokenizer) for i in places]
    scale = rows / len(looked)
    tokens, targets = (sum(len(r.ids) for r in looked), sum(sum(r.loss_mask) for r in looked))
    counts[name] = (rows, scale * tokens, scale * targets)
    print(
        f"{name:10} {rows:7,} examples {scale * tokens:11,.0f} tokens {scale * targets:11,.0f} targets"
    )

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.3))
left_3 = np.zeros(3)
totals_3 = np.sum(list(counts.values()), axis=0)
for name, numbers in counts.items():
    share_3 = 100 * np.array(numbers) / totals_3
    bars = axes.barh(["examples", "tokens", "targets"], share_3, left=left_3, label=name)
    labels = [f"{share:.0f}" if share >= 3 else "" for share in share_3]
    axes.bar_label(bars, labels=labels, label_type="center", color="white")
    left_3 += share_3
axes.invert_yaxis()
axes.set(xlabel="% of the mixture", xlim=(0, 100))
axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
plt.show()

# %% [markdown]
# A question with four choices has two targets, its letter and the end of the turn, however long it is.
# So it takes its full place in the batch and weighs next to nothing in the loss. Word problems, which
# are long answers to short questions, weigh more than their number says. Whoever sets a mixture by
# counting examples sets something else.
#
# How long is one pass over it? (Conversations are never split, so rows are nearly, not quite, full.)
# Right in the figure: the loss on held-out conversations, source by source, from before the first step.
# Watch the four choices (`mmlu`). At first the model has no idea that a letter is wanted. Very soon it
# knows *that*, and that the turn ends after it, and not *which* letter: one even guess among four and
# one certain token are ln 4 / 2 = 0.69 nats a token.

# %%
mid = run.config.recipe.mid
steps = math.ceil(mid.epochs * totals_3[1] / mid.batch_tokens)
print(
    f"{totals_3[1]:,.0f} tokens at {mid.batch_tokens:,} a step: about {steps:,} for {mid.epochs:g} pass(es)"
)
result = launch.stage("mid", run, watch=lesson.Live())
print(f"the stage took {result['steps']:,} steps, {result['epochs']:.2f} passes")

# %% [markdown]
# ## 5. Why a stage of its own?
#
# New markers, new formats, a tool: much to learn, so many tokens and large steps. Then chapter 07: few,
# clean examples, small steps, so that little of it is lost. One stage that did both would have to take
# one learning rate for both. The multiplier of all learning rates, step after step, from the runs'
# metrics; each stage begins with a fresh optimizer.

# %%
figure, axes = plt.subplots()
start = 0
for stage, colour in (("base", lesson.GREY), ("mid", lesson.BLUE)):
    train = [row for row in run.stage(stage).metrics.rows() if row["kind"] == "train"]
    axes.fill_between(
        [start + row["step"] for row in train],
        [row["lr"] for row in train],
        color=colour,
        alpha=0.6,
        label=f"{stage}: {sum(row['tokens'] for row in train):,} targets",
    )
    start += len(train)
axes.axhline(run.config.recipe.sft.lr, color=lesson.ORANGE, ls="--", label="where sft starts")
axes.set(xlabel="step", title="multiplier of the learning rates", ylim=(0, None))
axes.legend()
plt.show()

# %% [markdown]
# ## 6. Before and after
#
# The same questions:

# %%
talker = checkpoint.load_model(run.stage("mid").checkpoints, cpu.device)
for question in asked:
    print(question[:300])
    for name, model in (("base", base), ("mid", talker)):
        print(f"  {name}")
        show(answer(model, question))

# %% [markdown]
# What exactly has it learned? Score every token of some held-out conversations with both models, and
# sort the scores by what kind of token it is. Among the kinds are two that were *never* targets: the
# user's words and the tool's output.

# %%
names = {tokenizer.special(name): name.strip("<|>") for name in SPECIAL_TOKENS}
kinds = ["user's text", "text", "python", "output", "markers"]


def kinds_of(ids):
    """Which of `kinds` each id is; a marker that only the engine writes counts as its part."""
    found, now = [], 0
    for id in ids:
        name = names.get(id, "")
        now = {"user_start": 0, "python_start": 2, "output_start": 3}.get(name, now)
        forced = name in ("bos", "user_start", "user_end", "assistant_start")
        found.append(0 if forced else 3 if now == 3 else 4 if name else now)
        if name in ("assistant_start", "python_end", "output_end"):
            now = 1
    return found


ids = rendered(problems.conversation(0))[0]
lesson.tokens([tokenizer.decode([id]) for id in ids], groups=kinds_of(ids), legend=kinds)

# %%
length = base.config.sequence_len
nats_KM, count_K = np.zeros((len(kinds), 2)), np.zeros(len(kinds), int)
for example in [task.conversation(i) for task in (chats, problems) for i in range(12)]:
    ids = np.array(rendered(example)[0][: length + 1])
    batch = batch_of_rows([ids], [ids >= 0], len(ids) - 1, tokenizer.bos)
    kind_T = kinds_of(ids.tolist())[1:]
    np.add.at(count_K, kind_T, 1)
    for place, model in enumerate((base, talker)):
        with torch.no_grad():
            np.add.at(nats_KM[:, place], kind_T, model.nll(batch)[0].numpy())
nats_KM /= count_K.clip(1)[:, None]
print("scored:", dict(zip(kinds, count_K.tolist(), strict=True)))

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.6))
places = np.arange(len(kinds))
for shift, stage, colour in ((-0.2, 0, lesson.GREY), (0.2, 1, lesson.BLUE)):
    name = ("base", "mid")[stage]
    bars = axes.bar(places + shift, nats_KM[:, stage], 0.36, label=name, color=colour)
    axes.bar_label(bars, fmt="%.1f")
axes.set_xticks(places, kinds)
axes.set(title="surprise on held-out conversations (nats a token)")
axes.margins(y=0.15)
axes.legend()
plt.show()

# %% [markdown]
# The markers were the greatest surprise, and hardly any is left: that is the grammar, learned. The user's
# words and the outputs were never targets, and nobody asked the model to predict them. Whatever these two
# bars do is a by-product. So it has no idea what a result will be, not even of 2 + 2: it has to ask.
#
# ## 7. What it costs
#
# The stage's evaluation scores the new model, also on the plain text of chapter 04. None of that text was
# shown in this stage, so the weights were free to drift away from it.

# %%
after = launch.stage("eval", run, of="mid", watch=lesson.Live())
bits = {name: found["compression"]["bpb"] for name, found in (("base", before), ("mid", after))}
for stage in ("base", "mid"):
    assert bits[stage] == run.stage("eval", of=stage).done()["result"]["compression"]["bpb"]
print(f"bits per byte of held-out text: {bits['base']:.3f} → {bits['mid']:.3f}")
for name in run.config.recipe.eval.tasks:
    found = after[name]
    shown = {
        k: f"{v:.0%}" for k, v in found.items() if k in ("text", "letters", "accuracy", "chance")
    }
    print(f"{name:20} {shown}")

# %%
figure, axes = plt.subplots(figsize=(7.2, 1.7))
bars = axes.barh(list(bits), list(bits.values()), color=[lesson.GREY, lesson.BLUE])
axes.bar_label(bars, fmt=" %.3f")
axes.axvline(before["compression"]["trigram_bpb"], color=lesson.RED, ls="--", label="trigrams")
axes.invert_yaxis()
axes.set(xlabel="bits per byte of held-out text (less is better)")
axes.legend(loc="lower right", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# That is **forgetting**. How stories and lists are told fades, since none is asked for any more. What they
# *told* is needed for the answers, and lasts longer (`facts` above, in the toy world: questions whose
# answers stand in the pretraining text alone). Smaller steps forget less and learn less. Larger systems
# mix some pretraining text into this stage.
#
# ## 8. Does it use its tool?
#
# We ask the held-out word problems, with the sandbox as the tool, and count.


# %%
def solve(tool, count=24):
    engine = Engine(talker, tokenizer, cpu, tool)
    asked = [Conversation(problems.conversation(i).messages[:-1]) for i in range(count)]
    prompts = [conversation.prompt(tokenizer) for conversation in asked]
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
# A right answer does not prove it: the model might do the sum in its head and call for show. So give it a
# tool that **lies**: each result is 1 too large. If the model believes its tool, all answers go wrong.
# Where hardly any were right before, that says little. Then look at how many answers *are* the lie, and mind
# that an answer which calls nothing, or is cut before its number, counts for neither.


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

# %%
follows = 0
for said in deceived:
    outputs = [part.text for part in said.parts if part.kind == "output"]
    follows += bool(outputs) and tasks.final_number(said.text) == outputs[-1]
shares = [right(honest), right(deceived), follows / len(deceived)]
labels = ["honest tool: right", "lying tool: right", "lying tool: answers the lie"]
figure, axes = plt.subplots(figsize=(7.2, 1.8))
bars = axes.barh(labels, 100 * np.array(shares), color=[lesson.GREEN, lesson.GREEN, lesson.RED])
axes.bar_label(bars, fmt=" %.0f")
axes.set(xlim=(0, 108), xlabel="% of 24 problems")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# What is left to learn is not the sum but *which* sum: the program. Chapter 08 works on that.
#
# ## Exercises
#
# **1.** A mixture holds `tokens` tokens in conversations, and a step has `batch_tokens`. How many steps
# are `epochs` passes, if only the share `full` of each row is used?


# %% tags=["exercise"]
def steps_for(tokens, batch_tokens, epochs=1, full=1.0):
    return ...


lesson.check(steps_for, (10_000, 2_000, 5), (10_000, 2_048, 2, 10), (9_000, 1_000, 1, 0.9, 10))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def steps_for(tokens, batch_tokens, epochs=1, full=1.0):
#     return math.ceil(epochs * tokens / (full * batch_tokens))
# ```
#
# Put in the tokens from above and compare with the steps that the stage took: how full are its rows?
#
# </details>
#
# **2.** A question with four choices has 2 targets. How many of them must be mixed with other examples
# that have `others` targets, so that they are the share `share` of the loss?


# %% tags=["exercise"]
def questions_for(share, others):
    return ...


lesson.check(questions_for, (0.5, 1000, 500.0), (0.1, 180_000, 10_000.0))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def questions_for(share, others):
#     return share * others / (1 - share) / 2
# ```
#
# From 2 n / (2 n + others) = share. This is why the original takes a hundred thousand of them.
#
# </details>
#
# **3.** What does the forgetting weigh? A text of `megabytes` million bytes is compressed with the model
# before and after. How many bytes longer is the second file?


# %% tags=["exercise"]
def extra_bytes(before, after, megabytes):
    return ...


lesson.check(extra_bytes, (0.5, 0.75, 8, 250_000.0), (0.3, 0.3, 1, 0.0))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def extra_bytes(before, after, megabytes):
#     return (after - before) / 8 * megabytes * 1e6
# ```
#
# </details>
#
# **4.** (Open.) Midtraining with ten times smaller steps: `overrides = {"mid.lr": 0.04}` in the first cell
# makes another run of it. Which bars above change, and which do you expect to?
#
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
# In the code: `nanolib/conversation.py`, `nanolib/tasks.py`, `_converse` in `nanolib/stages/training.py`,
# `nanolib/tools.py`. **Next:** 07, learning to answer.
