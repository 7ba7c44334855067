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
# [▶ Open this chapter in Colab](https://colab.research.google.com/github/OWNER/nanolib/blob/main/notebooks/04_pretraining.ipynb): nothing to install on your machine.

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
# # 04 · Pretraining
#
# The model of chapter 02 knows nothing: every token is as likely as any other. Now it reads. At every
# position it says what may come next, the text shows what did, and the weights move a little. What does
# it pick up that way, in which order, and what can it not learn at all?
#
# **You will learn**
# - how to write a training loop and what its loss divides by;
# - what is learned first, what only later, and which heads do the later part;
# - what a base model is good at, where it fails, and how size pays.
#
# **You need** [chapter 02](02_model.ipynb), the model, and [chapter 03](03_muon.ipynb), the optimizer;
# what a logarithm and a gradient are.
#
# **Takes** 40 minutes to read and run, 65 more with the exercises; the run itself trains for four
# to ten minutes in `demo` on two CPU cores. Stages: `base`, then `eval` of `base`.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import itertools
import math
import re
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.testing import assert_close

import checks
import lesson
from nanolib import checkpoint, launch
from nanolib.config import REPOSITORY, ModelConfig, OptimConfig, Schedule
from nanolib.data.packing import Batch, batch_of_rows
from nanolib.data.sources import TextSource, split_documents
from nanolib.engine import Engine
from nanolib.evals.bpb import bits_per_byte
from nanolib.model import GPT, norm, rotate, rotation
from nanolib.optim import MuonAdamW
from nanolib.runtime import Runtime, seed_of
from nanolib.tokenizer import Tokenizer
from nanolib.train import lr_scale

run = lesson.begin(profile, run, overrides)
launch.stage("shards", run, watch=lesson.Live())  # chapter 01's work, if it is not there yet
tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
recipe, V = run.config.recipe, tokenizer.vocab_size
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)
*train_files, validation_file = sorted(run.stage("shards").path.glob("*.npy"))
held_out = split_documents(np.load(validation_file), tokenizer.bos)

# %% [markdown]
# ## 1. A text asks its own questions
#
# Our five words once more, now through the tokenizer of this run. What makes text such good teaching
# material? It comes with the answers. At each position the right answer is simply the next token, the
# **target**, so a text of T tokens asks T questions, and nobody had to write one of them.

# %%
five = [tokenizer.bos, *tokenizer.encode("Ada fed her owl again")]
for place, (_, answer) in enumerate(itertools.pairwise(five)):
    print(f"{place:3} {tokenizer.decode(five[: place + 1])!r:>34} → {tokenizer.decode([answer])!r}")

# %% [markdown]
# The [shards](glossary.ipynb#shard) of chapter 01 hold all text as one long list of ids. A
# [row](glossary.ipynb#row) is a slice of that list, its targets are the same slice one place further, and
# some rows make a [batch](glossary.ipynb#batch). Documents are of any length, rows are not: a document that
# does not fit goes on in another row, one that ends early is followed by the next. Nothing is padded,
# nothing is thrown away. Here are 24 rows in random order; each new stretch is a new document.

# %%
source = TextSource.open(train_files, length=48, batch_rows=24, bos=tokenizer.bos, seed=1)
(batch,) = source.updates(step=0)[0]
assert (batch.inputs_BT[:, 1:] == batch.targets_BT[:, :-1]).all()
begins_BT = batch.inputs_BT == tokenizer.bos
figure, axes = plt.subplots(figsize=(7.2, 2.8))
stretches_BT = (begins_BT.cumsum(1) + torch.arange(24)[:, None]) % 2
axes.imshow(stretches_BT, cmap="Blues", vmin=-0.3, vmax=2.5, aspect="auto", interpolation="nearest")
rows, places = begins_BT.nonzero().T.tolist()
axes.plot(places, rows, "|", color="black", markersize=7)
axes.set(xlabel="position in the row", ylabel="row", title="one batch: | begins a document")
axes.grid(False)
lesson.show(
    "24 rows of 48 tokens; short vertical strokes, at no regular place, mark where documents begin"
)

# %% [markdown]
# Attention does not stop at the border. A token sees the document before its own too, and has to learn
# that what stands before `<|bos|>` is of no use.
#
# ## 2. Surprise is the loss
#
# Suppose the model gave the right answer a probability p. Its [surprise](glossary.ipynb#surprise) is
# −log p: 0 when it was sure, and without bound when it was sure of something else. With the natural
# logarithm it is counted in [nats](glossary.ipynb#nats), with base two in bits. Its mean over the targets
# is the [loss](glossary.ipynb#loss), also called [cross-entropy](glossary.ipynb#cross-entropy).

# %%
for p in (1.0, 0.5, 0.25, 0.01, 1 / V):
    print(f"p = {p:8.5f}: {math.log(1 / p):5.2f} nats, {math.log2(1 / p):5.2f} bits")

# %% [markdown]
# **Exercise 4.1 ★ · 5 minutes · build** Surprise.
# From a model's [logits](glossary.ipynb#logits) to nats, position by position. A target of −1 means: nobody
# asks here, the surprise is 0. Some logits in the check are in the hundreds; what happens to a
# probability then, and to its logarithm?


# %% tags=["exercise"]
def surprise(logits_TV, targets_T):
    """Nats [T] of each target under softmax(logits); 0 where the target is -1."""
    ...


checks.verify("4.1", surprise)

# %% [markdown]
# <details><summary>Hint 1</summary>Can you take the logarithm of softmax without ever computing the
# softmax?</details>
# <details><summary>Hint 2</summary><code>logits_TV.log_softmax(dim=-1)</code>, then pick one number from
# each row with <code>gather</code>. A target of −1 cannot be picked: clamp it first, blank it after.</details>
# <details><summary>Solution</summary>
#
# ```python
# def surprise(logits_TV, targets_T):
#     log_p_TV = logits_TV.log_softmax(dim=-1)
#     picked_T = log_p_TV.gather(-1, targets_T.clamp(min=0)[:, None])[:, 0]
#     return -picked_T * (targets_T >= 0)
# ```
#
# A probability below 1e-45 is rounded to 0 in float32, and log 0 is −∞. `log_softmax` subtracts the
# largest logit and never leaves the logarithms.
#
# </details>


# %% tags=["solution-twin"]
def surprise(logits_TV, targets_T):
    log_p_TV = logits_TV.log_softmax(dim=-1)
    picked_T = log_p_TV.gather(-1, targets_T.clamp(min=0)[:, None])[:, 0]
    return -picked_T * (targets_T >= 0)


# %% [markdown]
# What is the loss of a model that has not learned anything? You know it before you run it. Its head is
# zero, all V tokens are equally likely, so the loss is log V. If training does not begin there, something
# is wrong before it has begun.

# %%
# A run too large for a lesson's CPU is stood in for by a model of the demo's size.
small = recipe.model.parameters(V) <= lesson.LARGE
shape = recipe.model if small else ModelConfig(depth=4, aspect=32, head_dim=32, sequence_len=256)
new = GPT.build(shape, V, cpu.device, recipe.seed)
with torch.no_grad():
    logits_BTV = new(batch.inputs_BT)
first_T = surprise(logits_BTV[0], batch.targets_BT[0])
assert_close(first_T, new.nll(batch)[0].detach())
assert math.isclose(first_T.mean(), math.log(V), rel_tol=1e-5)
print(f"a new model: {first_T.mean():.4f} nats; log {V:,} = {math.log(V):.4f}")

# %% [markdown]
# ## 3. Gradient accumulation: first the sum, one division last
#
# A batch seldom fits into memory at once. So it is cut into [micro-batches](glossary.ipynb#micro-batch):
# run one forward and backward, let its gradient stay where it is, run the next, whose gradient is added.
# Only then take the step. This is [gradient accumulation](glossary.ipynb#gradient-accumulation).
#
# Parts may hold different numbers of targets: a row ends early, or some of its tokens are not asked for. Take
# two parts, one with 48 targets and one with 9. Before you run it: whose tokens count for more in the mean of
# the two means, and how many times?

# %%
row = np.asarray(source.row(0)[0])
parts = [batch_of_rows([r], [np.ones(len(r), bool)], 48, tokenizer.bos) for r in (row, row[:10])]
warm = deepcopy(new)  # with weights everywhere: a new model's head is zero
with torch.no_grad():
    for name, weight in warm.named_parameters():
        draw = torch.Generator().manual_seed(len(name))
        weight.add_(torch.randn(weight.shape, generator=draw), alpha=0.05)
counts = [int((part.targets_BT >= 0).sum()) for part in parts]
sums = [warm.nll(part).sum().item() for part in parts]
means = [total / count for total, count in zip(sums, counts, strict=True)]
print(f"targets {counts}, means {means[0]:.3f} and {means[1]:.3f}")
print(f"mean of means {sum(means) / 2:.3f}, mean of all {sum(sums) / sum(counts):.3f}")
print(f"a token of the short part counts {counts[0] / counts[1]:.1f} times as much")

# %% [markdown]
# **Exercise 4.2 ★★ · 12 minutes · build** Gradient accumulation.
# You have micro-batches of unequal size. Leave in the model's weights the gradient that *one* batch with
# all the targets would have left, and return its mean loss. `model.nll(batch)` gives nats [B, T], 0 where
# the target is −1 (`batch.targets_BT`). At no time may more than one micro-batch be in memory. Why can you
# not simply divide at the very end?


# %% tags=["exercise"]
def accumulate(model, batches):
    """Add the gradient of the mean loss over all targets of all batches; return that mean."""
    ...


checks.verify("4.2", accumulate)

# %% [markdown]
# <details><summary>Hint 1</summary>What do you divide by, and when do you know it?</details>
# <details><summary>Hint 2</summary>Count first, over all batches; then go through them a second time,
# and call <code>backward()</code> once for each.</details>
# <details><summary>Solution</summary>
#
# ```python
# def accumulate(model, batches):
#     count = sum(int((batch.targets_BT >= 0).sum()) for batch in batches)
#     loss = 0.0
#     for batch in batches:
#         part = model.nll(batch).sum() / count
#         part.backward()
#         loss += part.item()
#     return loss
# ```
#
# You could divide at the end: every gradient once more, by hand. Counting first is free, and the sums
# that several processes add up then need no second division either.
#
# </details>


# %% tags=["solution-twin"]
def accumulate(model, batches):
    count = sum(int((batch.targets_BT >= 0).sum()) for batch in batches)
    loss = 0.0
    for batch in batches:
        part = model.nll(batch).sum() / count
        part.backward()
        loss += part.item()
    return loss


# %%
def gradient(model):
    flat = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    model.zero_grad()
    return flat


ours = accumulate(warm, parts), gradient(warm)
whole = Batch(**{n: torch.cat([getattr(p, n) for p in parts]) for n in ("inputs_BT", "targets_BT")})
assert_close(ours, (accumulate(warm, [whole]), gradient(warm)), rtol=1e-4, atol=1e-5)
usual = [warm.nll(part).sum() / count / 2 for part, count in zip(parts, counts, strict=True)]
sum(usual).backward()
wrong = gradient(warm)
print(f"mean of means: off by {(wrong - ours[1]).norm() / ours[1].norm():.0%} of the gradient")
assert (wrong - ours[1]).norm() > 0.05 * ours[1].norm()

# %% [markdown]
# Nothing crashes if you do it the usual way. The loss even falls. It is one of those mistakes that costs
# a few percent for years. `nanolib.train` counts over all micro-batches *and* all processes before the
# first backward pass.
#
# ## 4. How large a step
#
# The [learning rate](glossary.ipynb#learning-rate) is the size of a step. It may rise at first
# ([warmup](glossary.ipynb#warmup)), stays high for most of the run to get far, and falls at the end to
# settle: a noisy walk comes to rest only if its steps shrink. The recipe's
# [schedule](glossary.ipynb#schedule) says how much of each.
#
# **Exercise 4.3 ★★ · 8 minutes · build** A schedule.
# Over the first `warmup` steps the factor rises by equal amounts to 1: step 0 has 1/warmup. Over the last
# `warmdown` steps it falls towards 0: the last step has 1/warmdown. In between it is 1. Both may be 0.
# Why not let the first step have 0, and the last?


# %% tags=["exercise"]
def rate(step, steps, warmup, warmdown):
    """The learning rate's factor at a step 0 … steps - 1; warmup and warmdown in steps."""
    ...


checks.verify("4.3", rate)

# %% [markdown]
# <details><summary>Hint 1</summary>It is the smallest of three lines. Which?</details>
# <details><summary>Hint 2</summary>The rising line is (step + 1) / warmup. How many steps are left at the
# last one, counting itself? And what if warmup is 0?</details>
# <details><summary>Solution</summary>
#
# ```python
# def rate(step, steps, warmup, warmdown):
#     rise = (step + 1) / warmup if warmup else 1.0
#     fall = (steps - step) / warmdown if warmdown else 1.0
#     return min(1.0, rise, fall)
# ```
#
# A step with factor 0 reads a batch and learns nothing from it.
#
# </details>


# %% tags=["solution-twin"]
def rate(step, steps, warmup, warmdown):
    rise = (step + 1) / warmup if warmup else 1.0
    fall = (steps - step) / warmdown if warmdown else 1.0
    return min(1.0, rise, fall)


# %%
base, steps = recipe.base, recipe.base.steps
plain = Schedule(warmup=0.2, warmdown=0.4)
assert_close([rate(s, 50, 10, 20) for s in range(50)], [lr_scale(plain, s, 50) for s in range(50)])
figure, axes = plt.subplots(figsize=(7.2, 2.1))
axes.step(range(1, steps + 1), [lr_scale(base, step, steps) for step in range(steps)])
axes.set(xlabel="step", ylabel="factor", ylim=(0, None), title=f"this run: {steps:,} steps")
falls = steps - round(base.warmdown * steps)
lesson.show(
    f"The learning rate's factor is constant until step {falls:,}, then falls to zero in a line"
)

# %% [markdown]
# ## 5. The loop
#
# Here it is, with nothing hidden. Rows; how many targets; forward and backward, part by part; the
# gradient, shortened if it is longer than 1 ([clipping](glossary.ipynb#clipping)); the rate; the step;
# away with the old gradient. Read it until you could write it.


# %% tags=["loop"]
def train(model, source, steps, total, optim=recipe.optim):
    optimizer = MuonAdamW(model, optim, cpu)
    losses = []
    for step in range(steps):
        (batches,) = source.updates(step)
        count = sum(int((batch.targets_BT >= 0).sum()) for batch in batches)
        loss = 0.0
        for batch in batches:
            part = model.nll(batch).sum() / count
            part.backward()
            loss += part.item()
        grads, squares = optimizer.reduce()  # over processes; here there is one
        length = squares.sqrt().item()
        optimizer.update(grads, length, lr_scale(base, step, total))  # clips, then steps
        optimizer.zero_grad()
        losses.append(loss)
    return losses


# %% [markdown]
# Twenty real steps with it, on the run's own text, in the run's own order, from the run's own first
# weights. We cut each batch in two; the run did not have to.

# %%
rows = base.batch_tokens // shape.sequence_len if small else 8
settings = {"length": shape.sequence_len, "batch_rows": rows, "bos": tokenizer.bos}
settings |= {"seed": seed_of(recipe.seed, "base"), "device_batch": max(1, rows // 2)}
reader = GPT.build(shape, V, cpu.device, recipe.seed)
losses = train(reader, TextSource.open(train_files, **settings), min(20, steps), steps)
print("loss:", " ".join(f"{loss:.2f}" for loss in losses))

# %% [markdown]
# ## 6. The run
#
# Now the real thing. A process of its own trains; this cell only watches, redraws the figure every two
# seconds, and returns when the stage is finished (at once, if it was finished before). If you **interrupt
# the kernel**, the process finishes its step, saves and ends; execute the cell again and it goes on from
# there. Close the browser tab and it goes on too.

# %%
result = launch.stage("base", run, watch=lesson.Live())
print(f"{result['parameters']:,} parameters read {result['tokens']:,} tokens", end="")
print(f", {result['epochs']:.2f} passes over the text")

# %% [markdown]
# Left is the loss on the text it reads. Right are the bits per byte (section 8) of text that it never
# reads, the [validation set](glossary.ipynb#validation-set). Where a run reads its text more than once,
# the left curve drops at each new pass: the model begins to know the text by heart. Only the right curve
# tells whether it still learns what is true of other texts. If it rises, that is
# [overfitting](glossary.ipynb#overfitting).
#
# And did your loop do the same?

# %%
curve = [row for row in run.stage("base").metrics.rows() if row["kind"] == "train"]
theirs = [row["loss"] for row in curve][: len(losses)]
exact = small and run.stage("base").done()["machine"]["dtype"] == "float32"
for step in range(0, len(losses), 5):
    print(f"step {step + 1:3}: ours {losses[step]:.5f}, the stage's {theirs[step]:.5f}")
if exact:
    assert_close(losses, theirs, atol=1e-3, rtol=1e-3)
    print(f"equal to 1e-3 in all {len(losses)} steps")

# %% [markdown]
# It is the same loop, with a checkpoint, a progress bar and a way to stop.
#
# ## 7. Break it
#
# A training loop fails quietly. Here are three small changes, and the loop as it is, each on a tiny model with
# three seeds. Write down first what each change does to the loss after thirty steps: (a) `zero_grad`
# forgotten, (b) a learning rate 200 times as large, (c) targets not shifted, so that the answer is the token
# itself.


# %%
def broken(seed, how):
    """The loss after 30 steps, the mean of the last three."""
    tiny = ModelConfig(depth=2, aspect=16, head_dim=16, sequence_len=48)
    model = GPT.build(tiny, V, cpu.device, seed)
    optimizer, losses = MuonAdamW(model, OptimConfig(), cpu), []
    for step in range(30 if profile != "smoke" else 4):
        (batch,) = source.updates(step)[0]
        targets_BT = batch.inputs_BT if how == "not shifted" else batch.targets_BT
        loss = model.nll(Batch(inputs_BT=batch.inputs_BT, targets_BT=targets_BT)).mean()
        loss.backward()
        grads, squares = optimizer.reduce()
        optimizer.update(grads, squares.sqrt().item(), 200.0 if how == "rate × 200" else 1.0)
        if how != "no zero_grad":
            optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-3:]) / 3


# %%
table = {
    how: [broken(seed, how) for seed in range(3)]
    for how in ("as it is", "no zero_grad", "rate × 200", "not shifted")
}
for how, ends in table.items():
    print(f"{how:14} {'  '.join(f'{end:6.2f}' for end in ends)}")
assert profile == "smoke" or max(table["not shifted"]) < min(table["as it is"]) < math.log(V)

# %% [markdown]
# The one that looks best is the worst. Where targets are not shifted, the model only has to say what it
# has just been given; the loss falls like a stone, and the model has learned nothing. A loss that is too
# good is a bug until you have shown that it is not. Forgetting `zero_grad` turns the gradient into a sum
# over all the past: a step that remembers too much, and clipping hides it. A rate far too large throws
# the weights somewhere from which they do not return.
#
# ## 8. Bits per byte: a loss that knows no tokenizer
#
# With longer tokens there is more to guess in each, so a loss per token cannot be compared between
# tokenizers. Bytes are the same for everybody. Add up the bits that the model needs for a text it has
# never seen, divide by the text's bytes: [bits per byte](glossary.ipynb#bits-per-byte). A plain file takes 8.
#
# **Exercise 4.4 ★ · 3 minutes · predict** A model reports a loss of 2.0 nats a token. Its tokens have 4.0
# bytes on average. How many bits per byte is that?

# %% tags=["exercise"]
answer_bits = ...

checks.verify("4.4", answer_bits)

# %% [markdown]
# <details><summary>Hint 1</summary>How many bits is one nat?</details>
# <details><summary>Hint 2</summary>e = 2 to the power of 1.4427.</details>
# <details><summary>Solution</summary>
#
# ```python
# answer_bits = 2.0 / math.log(2) / 4.0
# ```
#
# Less than one bit a byte: a zip file of ordinary English needs about two or three.
#
# </details>

# %%
gpt = checkpoint.load_model(run.stage("base").checkpoints, cpu.device)
documents = [document[:40] for document in held_out[:30]]
nats = size = 0
for document in documents:
    ids_T = torch.from_numpy(document.astype(np.int64))
    with torch.no_grad():
        nats += surprise(gpt(ids_T[None, :-1])[0], ids_T[1:]).sum().item()
    size += len(tokenizer.decode(ids_T[1:].tolist()).encode())
real = bits_per_byte(gpt, documents, tokenizer, cpu)
assert math.isclose(nats / math.log(2) / size, real, rel_tol=1e-3)
print(f"{size:,} bytes, {nats:.0f} nats: {nats / math.log(2) / size:.3f} bits per byte")

# %% [markdown]
# Is that good? A number needs a rival. Ours is a **trigram**: it looks at the last two tokens and answers
# with what followed them in the training text, counted. Where it has seen too little of that, it mixes in
# what followed the last one alone, and how common each token is.

# %%
scores = launch.stage("eval", run, of="base", watch=lesson.Live())
bytes_per_token = run.stage("tokenizer").done()["result"]["validation_bytes_per_token"]
bars = {
    "a file": 8.0,
    "a new model": math.log2(V) / bytes_per_token,
    "a trigram": scores["compression"]["trigram_bpb"],
    "this model": scores["compression"]["bpb"],
}
figure, axes = plt.subplots(figsize=(7.2, 2.1))
drawn = axes.barh(list(bars), list(bars.values()), color=[*[lesson.GREY] * 3, lesson.BLUE])
axes.bar_label(drawn, fmt="%.2f", padding=3)
axes.set(title="text nobody has trained on", xlabel="bits per byte")
axes.invert_yaxis()
lesson.show(
    "Bars of bits per byte: " + ", ".join(f"{name} {bar:.2f}" for name, bar in bars.items())
)

# %% [markdown]
# ## 9. Two kinds of knowledge
#
# Look at the curve once more, on a logarithmic axis of steps. What a trigram knows is drawn as a line.
# *Before you run it*: a trigram sees two tokens back. What becomes of a curve that has learned all of that?

# %%
smoothed = lesson.smooth([row["loss"] for row in curve], keep=0.93)
trigram = bars["a trigram"] * bytes_per_token * math.log(2)
figure, axes = plt.subplots(figsize=(7.2, 2.8))
axes.semilogx(range(1, len(curve) + 1), smoothed)
axes.axhline(trigram, color=lesson.GREY, linestyle="--")
axes.text(1, trigram, " a trigram", va="bottom")
axes.set(xlabel="step (logarithmic)", ylabel="loss (nats a token)", ylim=(0, 2 * trigram))
axes.set_title("training loss; its beginning is far above")
lesson.show(
    f"Loss against steps: from {smoothed[0]:.1f} at the first step to {smoothed[-1]:.2f} at the last"
)
for step in sorted({1, *(2**k for k in range(3, 12) if 2**k < len(curve)), len(curve)}):
    print(f"step {step:5}: {smoothed[step - 1]:.2f}")

# %% [markdown]
# It falls fast as far as a trigram gets, and there it bends. Beyond, it takes ten times as many steps, and
# still goes down. Most of what a trigram knows can be learned by looking at the last token or two: how
# words are spelt, how sentences run. Gradients for it are large and everywhere.
#
# What comes after that has to be *fetched* from further back: which name, which number. That takes two heads
# in two layers that fit together. A **previous-token head** writes onto each token which one stood before it.
# An [induction head](glossary.ipynb#induction-head) looks for the place onto which the token at hand was
# written, and copies what stands there: "Ada fed … Ada" → "fed". Either alone is of no use, so there is hardly
# a gradient towards either. Then they find each other by chance, and what can be copied becomes cheap at once.
#
# Where a text asks for only one kind of copy, the loss rests at the bend and then drops a second time. Where
# it asks for many, as this one does, many drops make one slope.
#
# That is a claim. Can we watch it alone? Let a tiny model read nothing but random symbols that repeat
# after 6 to 12 places, a new length in every row. There is nothing to know here and everything to copy.
# Two layers should drop all of a sudden. One layer cannot: before you run it, say why.


# %%
def repeats(generator, count=32, length=32, symbols=24):
    """Rows that repeat after 6 to 12 symbols; first sayings are no targets."""
    period_B1 = torch.randint(6, 13, (count, 1), generator=generator)
    ids_BT = torch.randint(symbols, (count, 13), generator=generator)
    place_T = torch.arange(length + 1)
    rows_BT = ids_BT.gather(1, place_T % period_B1)
    targets_BT = rows_BT[:, 1:].masked_fill(place_T[1:] <= period_B1, -1)
    return Batch(inputs_BT=rows_BT[:, :-1], targets_BT=targets_BT)


def learn_to_copy(layers, steps):
    shape = ModelConfig(depth=layers, aspect=32 // layers, head_dim=16, sequence_len=32)
    model, generator = GPT.build(shape, 24, cpu.device, 1), torch.Generator().manual_seed(1)
    copying = type("Repeats", (), {"updates": lambda self, step: [[repeats(generator)]]})()
    return train(model, copying, steps, 10 * steps, OptimConfig()), model


print(repeats(torch.Generator().manual_seed(1), count=1).inputs_BT.tolist())

# %%
lengths = 240 if profile != "smoke" else 8
copied = {layers: learn_to_copy(layers, lengths) for layers in (1, 2)}
figure, axes = plt.subplots(figsize=(7.2, 2.6))
for (layers, (path, _)), line in zip(copied.items(), ("--", "-"), strict=True):
    axes.plot(lesson.smooth(path, keep=0.8), line, label=f"{layers} layer{'s'[: layers - 1]}")
axes.axhline(math.log(24), color=lesson.GREY, linewidth=1, linestyle=":")
axes.set(
    xlabel="step", ylabel="loss (nats a token)", title="only copying; dots: log 24", ylim=(0, None)
)
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
lesson.show("Loss of two tiny models that can only copy: two layers end far below one layer")
ends = {layers: sum(path[-10:]) / len(path[-10:]) for layers, (path, _) in copied.items()}
print("loss at the end:", {layers: round(end, 2) for layers, end in ends.items()})
assert profile == "smoke" or ends[2] < 0.7 * ends[1]

# %% [markdown]
# One layer learns which symbols its row has, and guesses among them. Its query can look for a token that equals
# it, but what it would have to copy stands one place further, and nobody has written there what came
# before. The first layer of two does that
# writing. Every language model of this kind that people have looked into goes through this turn; in large
# ones it is a small bump in the first percent of the run.
#
# ## 10. What it writes on the way
#
# The run keeps only its two newest [checkpoints](glossary.ipynb#checkpoint). We have four moments all the
# same: the new model, *your* loop's model after its steps, and the two that were kept. Each continues two
# texts it has not seen, always with the likeliest token.

# %%
folder = run.stage("base").checkpoints
moments = {0: new, len(losses): reader}
for path in sorted(folder.glob("step_*")):
    kept = GPT.empty(recipe.model, V, cpu.device)
    checkpoint.restore_model(checkpoint.verify(path, weights_only=True), kept)
    moments[int(path.name.removeprefix("step_"))] = kept
openings = [document[: max(4, len(document) // 3)].tolist() for document in held_out[1:3]]
for step, model in sorted(moments.items(), key=lambda pair: pair[0]):
    written = Engine(model, tokenizer, cpu).complete(openings, max_new_tokens=16)
    for opening, ids in zip(openings, written, strict=True):
        print(f"{step:6,}  {tokenizer.decode(opening[1:])!r} ┃ {tokenizer.decode(ids)!r}")

# %% [markdown]
# The new model has no favourite: all tokens tie, and the first of the vocabulary wins. Yours knows phrases,
# fitting or not. The two kept ones know the people from other texts: only these texts were held out.
#
# Here is a held-out text, the redder a token the more bits it took; the numbers are bits. From top to
# bottom: first everything costs the same, then common words get cheap, and last what can be copied, or is
# known by heart. A name said twice, or what other texts say of a person, is often nearly free. Not so
# where this text had a choice, of words or of what to tell next: that can be neither copied nor known.

# %%
document = held_out[1][: min(60, recipe.model.sequence_len)]
ids_T = torch.from_numpy(document.astype(np.int64))
pieces = [tokenizer.decode([id]) for id in ids_T[1:].tolist()]
for step, model in moments.items():
    if step in (0, len(losses), max(moments)):
        with torch.no_grad():
            bits_T = surprise(model(ids_T[None, :-1])[0], ids_T[1:]) / math.log(2)
        print(f"step {step:,}: {bits_T.sum():.0f} bits")
        lesson.tokens(
            pieces, shades=(bits_T / 10).tolist(), numbers=[f"{b:.0f}" for b in bits_T.tolist()]
        )

# %% [markdown]
# ## 11. It copies, it cannot add
#
# The toy world has texts of this kind: "Erin had 10 nuts … 10+5=15. Now Erin has 15." The 15 stands there
# twice: first it is a **sum**, then a **copy** of what was just said. (The 10 before the plus is a copy, too.)
# Before you run it: how many bits does each cost the trained model?

# %%
SUM = re.compile(r"(\d+)\+(\d+)=(\d+)\D+(\d+)")
texts = [tokenizer.decode(document[1:].tolist()) for document in held_out[:1000]]
found = [
    text for text in texts if (sum_ := SUM.search(text)) and sum_[3] == sum_[4] and text.isascii()
]
made = "Erin had {} shells. Opal gave Erin {} more: {}+{}={}. Now Erin has {}."  # if there are none
found = found or [made.format(a, b, a, b, a + b, a + b) for a in (12, 27) for b in (5, 16)]


@torch.no_grad()
def bits_of(model, text, spans):
    """The bits of the tokens that overlap each span of characters."""
    ids = [tokenizer.bos, *tokenizer.encode(text)]
    bits_T = surprise(model(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:])) / math.log(2)
    ends_T = torch.tensor([len(tokenizer.token_bytes(id)) for id in ids[1:]]).cumsum(0)
    starts_T = torch.cat((torch.zeros(1), ends_T[:-1]))
    return [bits_T[(starts_T < stop) & (ends_T > start)].sum().item() for start, stop in spans]


print(f"{len(found)} texts, such as: {found[0]}")

# %%
groups = {"a number of the story": 1, "the sum": 3, "its copy": 4}
cost = {step: np.zeros(3) for step in (0, len(losses), max(moments))}
for text in found[:60]:
    spans = [SUM.search(text).span(group) for group in groups.values()]
    for step in cost:
        cost[step] += np.array(bits_of(moments[step], text, spans)) / len(found[:60])
for step, bits in cost.items():
    print(f"step {step:6,}:", ", ".join(f"{n} {b:.2f}" for n, b in zip(groups, bits, strict=True)))
print(f"for the sum it hesitates between some {2 ** bits[1]:.0f} numbers")
assert profile != "demo" or bits[2] + 1 < bits[1]

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.6))
for place, ((step, bits), hatch) in enumerate(zip(cost.items(), ("xx", "//", ""), strict=False)):
    at = np.arange(3) + 0.27 * (place - 1)
    drawn = axes.bar(at, bits, 0.25, hatch=hatch, edgecolor="white", label=f"step {step:,}")
    axes.bar_label(drawn, fmt="%.1f")
axes.set_xticks(range(3), list(groups))
axes.margins(y=0.12)
axes.set(ylabel="bits", title="one number in three roles")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
lesson.show(f"After training a sum costs {bits[1]:.1f} bits and its copy {bits[2]:.1f}")

# %% [markdown]
# Both copies are nearly free: the number that the story told, and the sum once it has been said. For the
# sum itself the model hesitates: it knows that a number comes, and roughly how large. Copying is *one* rule, the same for
# every number, and induction heads implement it. Adding is a table of thousands of entries, unless you have
# the algorithm, with its carries, and a tiny model has not found it in this text.
#
# So do not teach it to add. Teach it to say "12+30", let a computer add, and hand it the result. Then all
# it has to do is copy, which it does superbly. That is the whole case for the tool in
# [chapter 05](05_inference.ipynb) and [chapter 06](06_midtraining.ipynb).
#
# ## 12. Heads with names
#
# Is there an induction head in our models? [Heads](glossary.ipynb#head) have no labels, so we score them:
# which share of its attention does a head give to the **previous** token, to the **first** one, and to what
# **followed** when this token was last seen? Here is the attention of all heads at once, as chapter 02
# computed it for one.


# %%
@torch.no_grad()
def look(gpt, ids_BT):
    """The attention weights [L, H, T, S] of all heads, mean over the rows."""
    patterns, heads = [], (-1, gpt.config.head_dim)
    cos_sin = rotation(torch.arange(ids_BT.shape[1]), gpt.config.head_dim)
    future_TS = torch.ones(2 * ids_BT.shape[1:]).triu(diagonal=1).bool()
    x_BTD = norm(gpt.embedding(ids_BT))
    for block in gpt.blocks:
        layers, seen_BTD = block.attention, norm(x_BTD)
        query = norm(rotate(layers.query(seen_BTD).unflatten(-1, heads), cos_sin))
        key = norm(rotate(layers.key(seen_BTD).unflatten(-1, heads), cos_sin))
        key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        scores = torch.einsum("bthk,bshk->bhts", query, key) / gpt.config.head_dim**0.5
        patterns.append(scores.masked_fill(future_TS, -torch.inf).softmax(dim=-1).mean(0))
        x_BTD = block(x_BTD, cos_sin)
    return torch.stack(patterns)


# %% [markdown]
# **Exercise 4.5 ★★ · 12 minutes · build** The induction score.
# `weights_HTS` are attention weights over n tokens said twice, 2n positions in all. At position t of the
# second saying, which earlier position holds the token that comes *next*? Return each head's weight there,
# averaged over the second saying. A head that looks at the token's own earlier copy gets no points: what
# would it be good for?


# %% tags=["exercise"]
def induction_score(weights_HTS, n):
    """weights [H, 2n, 2n] -> [H]: mean weight on what followed the token the first time."""
    ...


checks.verify("4.5", induction_score)

# %% [markdown]
# <details><summary>Hint 1</summary>Position n holds the same token as position 0. What should follow it,
# and where does that stand?</details>
# <details><summary>Hint 2</summary>Position t looks at t − n + 1: in the matrix that is a diagonal, and
# <code>weights.diagonal(offset, 1, 2)</code> picks one. Does its last part belong to the second
# saying?</details>
# <details><summary>Solution</summary>
#
# ```python
# def induction_score(weights_HTS, n):
#     t = torch.arange(n, 2 * n)
#     return weights_HTS[:, t, t - n + 1].mean(-1)
# ```
#
# `diagonal(1 - n, 1, 2)` has n + 1 entries; the first belongs to position n − 1 and is left out. A head
# that looks at the same token finds out *where* it stood, which helps others, but copies nothing useful.
#
# </details>


# %% tags=["solution-twin"]
def induction_score(weights_HTS, n):
    t = torch.arange(n, 2 * n)
    return weights_HTS[:, t, t - n + 1].mean(-1)


# %% [markdown]
# First the two tiny copiers of section 9, where there was nothing to learn but this. They read 12 random
# symbols, twice.

# %%
said_BT = torch.randint(24, (64, 12), generator=torch.Generator().manual_seed(2))
twice_BT = torch.cat((said_BT, said_BT), dim=1)
for layers, (_, model) in copied.items():
    for layer, weights_HTS in enumerate(look(model, twice_BT)):
        induction = [f"{score:.2f}" for score in induction_score(weights_HTS, 12).tolist()]
        previous = [f"{score:.2f}" for score in weights_HTS.diagonal(-1, 1, 2).mean(-1).tolist()]
        print(f"depth {layers}, layer {layer}: induction {induction}, previous {previous}")
top = {
    n: max(float(induction_score(w, 12).max()) for w in look(m, twice_BT))
    for n, (_, m) in copied.items()
}
assert profile == "smoke" or top[2] > 2 * top[1]

# %% [markdown]
# There they are: a previous-token head below, an induction head above, and nothing of the kind in the
# model with one layer. Now the run's model. It has never seen random symbols, so we look at the text it
# knows: all places of held-out documents where a token came before *and* the same token followed. Beside
# it a new model, because even attention without a plan gives every place something.


# %%
KINDS = ("previous", "first", "induction")


@torch.no_grad()
def head_scores(gpt, documents):
    """How much each head looks at the previous token, the first, and what followed last time."""
    total, seen = [torch.zeros(len(gpt.blocks), gpt.config.heads) for _ in KINDS], [0] * 3
    for document in documents:
        ids = document[: gpt.config.sequence_len].tolist()
        weights_LHTS = look(gpt, torch.tensor([ids]))
        for t in range(3, len(ids) - 1):
            followed = [s + 1 for s in range(1, t - 1) if ids[s : s + 2] == ids[t : t + 2]]
            for kind, places in enumerate(([t - 1], [0], followed[-1:])):
                total[kind] += weights_LHTS[:, :, t, places].sum(-1)
                seen[kind] += len(places)
    print(f"{seen[0]} places, {seen[2]} of them with something to copy")
    return {name: t / max(1, n) for name, t, n in zip(KINDS, total, seen, strict=True)}


# %%
named = {
    name: head_scores(model, held_out[:40]) for name, model in (("new", new), ("trained", gpt))
}
best = {kind: divmod(int(s.argmax()), s.shape[1]) for kind, s in named["trained"].items()}
for kind, (layer, head) in best.items():
    here, before = named["trained"][kind].max(), named["new"][kind].max()
    print(
        f"{kind:10} layer {layer} head {head}: {here:.2f} (best head of a new model {before:.2f})"
    )
assert (
    profile != "demo" or named["trained"]["induction"].max() > 1.5 * named["new"]["induction"].max()
)

# %%
figure, panels = plt.subplots(2, 3, figsize=(7.6, 4.2), sharey="row", squeeze=False)
for line, (name, kinds) in zip(panels, named.items(), strict=True):
    for axes, (kind, scores_LH) in zip(line, kinds.items(), strict=True):
        lesson.heatmap(axes, scores_LH, limits=(0, 0.4))
        for layer, head in np.ndindex(*scores_LH.shape) if scores_LH.numel() <= 40 else ():
            number = f"{scores_LH[layer, head]:.2f}"
            axes.text(head, layer, number, ha="center", va="center", fontsize=9)
        axes.set(title=f"{name}: {kind}", xlabel="head")
    line[0].set_ylabel("layer")
lesson.show(
    "Scores of every head, three kinds, above for a new model, below for the trained one: "
    + ", ".join(f"{kind} best in layer {layer} head {head}" for kind, (layer, head) in best.items())
)

# %% [markdown]
# A new model spreads its attention evenly. After training some heads lean towards one trade, most have
# none that we have a name for: a model this small cannot spare a head for one job. Where the best head scores
# hardly more than the new model's, there is none. (An induction head feeds on a previous-token head *below* it,
# perhaps not the best one.) A mean hides much, too. Here is what the three best do with a real text. By their
# names, the first should darken just left of the diagonal, the second the left column, the third what followed
# a token when it was last said.

# %%
names = [tokenizer.decode([id]) for id in ids_T[:18].tolist()]
patterns = look(gpt, ids_T[None, :18])
figure, panels = plt.subplots(1, 3, figsize=(9, 3.4), sharey=True)
for axes, (kind, (layer, head)) in zip(panels, best.items(), strict=True):
    lesson.heatmap(axes, patterns[layer, head], rows=names, columns=names, limits=(0, 1))
    axes.set(title=f"{kind}: layer {layer} head {head}", xlabel="looks at")
lesson.show("Attention of the three best heads on the first 18 tokens of a held-out text")

# %% [markdown]
# A name for a head is a hypothesis about what it does on some texts; a dark column elsewhere, say below a
# person's name, is another trade. Whether the model *needs* the head, only switching it off can tell:
# exercise 4.6.
#
# ## 13. How size pays
#
# How much better does a larger model get from the same text? Four tiny models read the same rows, in the
# same order, with your loop. Sizes are counted without embedding and head, as is the custom.

# %%
tiny_steps, found_laws = (100, []) if profile != "smoke" else (6, [])
tiny_source = TextSource.open(train_files, length=64, batch_rows=16, bos=tokenizer.bos, seed=3)
test = [document[:65] for document in held_out[:100]]
for width in (8, 16, 32, 64):
    size = ModelConfig(depth=2, aspect=width // 2, head_dim=8, sequence_len=64)
    counted = size.parts(V)["attention"] + size.parts(V)["mlp"]
    model = GPT.build(size, V, cpu.device, 1)
    train(model, tiny_source, tiny_steps, tiny_steps, OptimConfig())
    bpb = bits_per_byte(model, test, tokenizer, cpu)
    found_laws.append((counted, bpb))
    print(f"width {width:3}: {counted:8,} parameters, {bpb:.3f} bits per byte")

# %% [markdown]
# A [scaling law](glossary.ipynb#scaling-law) says that the loss falls as a power of the size,
# $c \cdot N^{-\alpha}$: on logarithmic axes, a line. A line can be drawn through anything. A law is worth what it
# *predicts*, so we also fit the three smallest alone, and ask them about the largest.

# %%
sizes, bpbs = np.array(found_laws).T
alpha, c = np.polyfit(np.log(sizes), np.log(bpbs), 1)
three = np.polyfit(np.log(sizes[:3]), np.log(bpbs[:3]), 1)
told = math.exp(np.polyval(three, math.log(sizes[3])))
figure, axes = plt.subplots(figsize=(6.4, 2.8))
axes.loglog(sizes, bpbs, "o", label="four models")
axes.loglog(sizes, np.exp(np.polyval((alpha, c), np.log(sizes))), "--", label="the law")
axes.set(xlabel="parameters without embedding and head", ylabel="bits per byte")
axes.set_yticks(bpbs.round(2), [f"{bpb:.2f}" for bpb in bpbs])
axes.minorticks_off()
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
lesson.show(
    f"Four points from {bpbs[0]:.2f} down to {bpbs[-1]:.2f} bits per byte and a falling line"
)
print(f"loss falls as N^{alpha:.3f}; three models predict {told:.3f} for the fourth: {bpbs[3]:.3f}")
assert profile == "smoke" or alpha < 0

# %% [markdown]
# Ours is a law of four points, one seed, one length of training. If the fourth ends above what the three
# predict, the line bends: without more text, size pays less and less. The measured laws run over six orders of
# magnitude: Kaplan et al. found an exponent of −0.076 for real text. Hoffmann et al. asked the next
# question: for a given amount of arithmetic, how large a model, and how much text? Their answer, about 20
# tokens for each parameter, sets the length of nanolib's larger runs. Models that are to be *used* a lot
# are trained for much longer: a smaller model is cheaper every time it speaks.
#
# And which ingredient of the model and the optimizer is worth how much? Public records disagree, and what helps a
# run of minutes may do nothing for a day's. So we measured it (`nanolib bench ablations`): what each adds to the
# bits per byte at the same tokens and seeds, so that below zero is better. "+" is each alone, "-" each on top of
# all the others; bold is beyond the noise. Preset `modern` has those of the list that are in use.

# %%
table = (REPOSITORY / "runs" / "bench" / "ablations.md").read_text()
lesson.markdown(table[table.index("| ingredient") :])

# %% [markdown]
# Two of the three that help most have one thing in common. *Value embeddings* give each token a vector of its own
# inside the attention, *smear* mixes the token before into each one at the input: both are **memory that costs hardly
# any arithmetic**, for single tokens and for pairs. A model without them must spend layers on that. Third,
# *document mask* keeps a token from looking into the other documents of its row. What stands there has nothing to
# do with it, and in the test nothing stands there at all. (It is not in the preset yet. The toy world gains as much
# by it on top of the rest.)
#
# Now compare the columns "+" and "-". Smear alone is worth more than twice as much as smear on top of the rest: value
# embeddings had done part of its work. Gains of ingredients do **not** add up, and a paper that shows one alone promises
# too much. The tricks of the optimizer are worth much less here. At depth 12 ("deep") the same three lead; at the
# end of a long training that may differ.

# %% [markdown]
# **Exercise 4.6 ★★★ · 25 minutes · open** Switch a head off.
# Set the columns of `attention.out.weight` that belong to one head to zero (head h of K numbers has those from
# h·K to (h + 1)·K), in a `deepcopy` of `gpt`.
# Do it for the best induction head, for the best previous-token head and for three others, and measure the
# sum and the copy of section 11 each time (`bits_of`). Does the copy become expensive? There may be a second
# induction head that takes over: it is known that large models have spares.

# %% tags=["open"]
without = deepcopy(gpt)
print("one layer's output matrix:", tuple(without.blocks[0].attention.out.weight.shape))

# %% [markdown]
# ## To read
#
# - Radford et al., *Language Models are Unsupervised Multitask Learners* (GPT-2),
#   [report](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
# - Olsson et al., *In-context Learning and Induction Heads*,
#   [arXiv:2209.11895](https://arxiv.org/abs/2209.11895)
# - Elhage et al., *A Mathematical Framework for Transformer Circuits*,
#   [transformer-circuits.pub](https://transformer-circuits.pub/2021/framework/index.html)
# - Kaplan et al., *Scaling Laws for Neural Language Models*,
#   [arXiv:2001.08361](https://arxiv.org/abs/2001.08361)
# - Hoffmann et al., *Training Compute-Optimal Large Language Models* (20 tokens a parameter),
#   [arXiv:2203.15556](https://arxiv.org/abs/2203.15556)
# - Hägele et al., *Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations* (constant
#   rate, then cooldown), [arXiv:2405.18392](https://arxiv.org/abs/2405.18392)
#
# In the code: `nanolib/train.py`, `nanolib/data/`, `nanolib/evals/bpb.py`, `nanolib/checkpoint.py`.
#
# **Next:** [chapter 05](05_inference.ipynb), the model writes.
