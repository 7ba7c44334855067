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
# # 04 · Pretraining
#
# The model of chapter 02 knows nothing: every token is as likely as any other. Now it reads. At every
# position it says how likely each next token is, the text shows which one came, and the weights move
# a little, so that it would be less surprised next time.
#
# **You will learn** how text becomes rows, what exactly the loss divides by, how the learning rate
# moves, what *bits per byte* means, and what a model looks like inside when it has learned something.
#
# **Takes** fifteen minutes to read. The run trains for as long as its profile says: a few minutes in
# `demo` on two CPU cores. Stages: `base`, then `eval` of `base`.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.testing import assert_close

import lesson
from nanolib import checkpoint, launch
from nanolib.config import ModelConfig, Schedule
from nanolib.data.packing import batch_of_rows
from nanolib.data.sources import TextSource, split_documents
from nanolib.evals.bpb import bits_per_byte
from nanolib.model import GPT, norm, rotate, rotation
from nanolib.runtime import Runtime
from nanolib.tokenizer import Tokenizer
from nanolib.train import CrossEntropy, lr_scale

run = lesson.begin(profile, run, overrides)
launch.stage("shards", run, watch=lesson.Live())  # chapter 01's work, if it is not there yet
tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")

# %% [markdown]
# ## Rows: the text, cut into slices
#
# The shards of chapter 01 hold the text as one long list of numbers. A row is a slice of it. Its
# **targets** are the same slice, one place further: at each position, the right answer is simply the
# next token. So a row of T tokens asks T questions at once.

# %%
*train_files, validation_file = sorted(run.stage("shards").path.glob("*.npy"))
settings = {"batch_rows": 24, "bos": tokenizer.bos, "seed": 1}
source = TextSource.open(train_files, length=48, **settings)
(batch,) = source.updates(step=0)[0]
for input_id, target_id in zip(batch.inputs_BT[0, :6], batch.targets_BT[0, :6], strict=True):
    print(f"{tokenizer.decode([input_id])!r:>14} → {tokenizer.decode([target_id])!r}")
assert (batch.inputs_BT[:, 1:] == batch.targets_BT[:, :-1]).all()

# %% [markdown]
# Documents are of any length, rows are not. A document that does not fit goes on in another row, and
# one that ends early is followed by the next. Nothing is padded and nothing is thrown away. Attention does
# not stop at the border: a token sees the document before its own too, and has to learn that what stands
# before `<|bos|>` is of no use. Here are 24 rows, drawn in random order; where the colour changes, the next
# document begins.

# %%
figure, axes = plt.subplots(figsize=(7.2, 3))
documents_BT = (batch.inputs_BT == tokenizer.bos).cumsum(1)
colours_BT = (documents_BT + 3 * torch.arange(24)[:, None]) % 8
axes.imshow(colours_BT, cmap="Pastel2", aspect="auto", interpolation="nearest")
axes.set(xlabel="position in the row", ylabel="row", title="one batch")
axes.grid(False)
plt.show()

# %% [markdown]
# ## The loss: first the sum, one division last
#
# The loss of one token is the negative logarithm of the probability the model gave to it. It is 0
# when the model was sure, and grows without bound when it was sure of something else.

# %%
small = GPT(ModelConfig(depth=2, aspect=16, head_dim=16, sequence_len=48), tokenizer.vocab_size)
with torch.no_grad():
    for weight in small.parameters():
        weight.normal_(std=0.1, generator=torch.Generator().manual_seed(weight.numel()))
log_p_BTV = small(batch.inputs_BT).log_softmax(dim=-1)
by_hand_BT = -log_p_BTV.gather(-1, batch.targets_BT[..., None]).squeeze(-1)
assert_close(by_hand_BT, small.nll(batch))
print(f"mean {by_hand_BT.mean():.3f} nats; the worst token {by_hand_BT.max():.3f}")

# %% [markdown]
# A batch seldom fits into memory at once, and with several processes each has only its part of it. The
# parts may hold different numbers of tokens: rows end early, questions are masked. The mean of the
# parts' means is then *not* the mean. It weighs a token in a short part more than one in a long part.
# So nanolib counts first, over all parts, and divides each part's sum by that.

# %%
row = np.asarray(source.row(0)[0])
parts = [batch_of_rows([r], [np.ones(len(r), bool)], 48, tokenizer.bos) for r in (row, row[:9])]
loss = CrossEntropy()
sums = [loss.sum(small.nll(part), part) for part in parts]
counts = [loss.count(part) for part in parts]
means = [total / count for total, count in zip(sums, counts, strict=True)]
print(f"counts {counts}: mean of means {sum(means) / 2:.4f}, mean {sum(sums) / sum(counts):.4f}")
together = batch_of_rows([row, row[:9]], [np.ones(49, bool), np.ones(9, bool)], 48, tokenizer.bos)
nll_BT = small.nll(together)
assert_close(sum(sums) / sum(counts), nll_BT[together.targets_BT >= 0].mean())

# %% [markdown]
# ## The first loss is known in advance
#
# A new model's head is zero, all tokens are equally likely, and the loss is log V. If training does
# not begin there, something is wrong before it has begun.

# %%
recipe = run.config.recipe
new = GPT.build(recipe.model, tokenizer.vocab_size, torch.device("cpu"), recipe.seed)
with torch.no_grad():
    first_loss = new.nll(batch).mean().item()
print(f"{first_loss:.4f} nats, log V = {math.log(tokenizer.vocab_size):.4f}")
assert math.isclose(first_loss, math.log(tokenizer.vocab_size), rel_tol=1e-5)

# %% [markdown]
# ## Bits per byte: a loss that knows no tokenizer
#
# A loss per token cannot be compared between tokenizers: with longer tokens there is more to guess
# in each. Bytes are the same for everybody. So: add up the bits the model needs for a text it has
# never seen, and divide by the text's bytes. Files have 8 bits a byte; a good model needs less than 1.
#
# By hand, document by document, against the function that measures the run:


# %%
@torch.no_grad()
def bits_by_hand(gpt, documents):
    bits = size = 0
    for document in documents:
        ids_T = torch.from_numpy(document[: gpt.config.sequence_len + 1].astype(np.int64))
        log_p_TV = gpt(ids_T[None, :-1])[0].log_softmax(dim=-1)
        bits -= log_p_TV.gather(-1, ids_T[1:, None]).sum().item() / math.log(2)
        size += sum(len(tokenizer.token_bytes(id)) for id in ids_T[1:])
    return bits / size


held_out = split_documents(np.load(validation_file), tokenizer.bos)
short = [document[:40] for document in held_out[:30]]
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)
real = bits_per_byte(small, short, tokenizer.byte_lengths, tokenizer.bos, cpu)
assert math.isclose(bits_by_hand(small, short), real, rel_tol=1e-5)
print(f"a model with random weights: {real:.3f} bits per byte")

# %% [markdown]
# ## The schedule
#
# The learning rate is the size of a step. It stays high for most of the run, to get far, and falls at
# the end, to settle. How much of the run is for settling is the recipe's to say. Chapter 03 took the
# optimizer itself apart; here it is enough that it takes one step for each batch.


# %%
def rate(step, steps, warmdown):
    return min(1.0, (steps - step) / (warmdown * steps))


plain = Schedule(warmdown=0.4)
assert_close(
    [rate(step, 50, 0.4) for step in range(50)], [lr_scale(plain, s, 50) for s in range(50)]
)
steps, base = recipe.base.steps, recipe.base
figure, axes = plt.subplots(figsize=(7.2, 2.2))
axes.step(range(1, steps + 1), [lr_scale(base, step, steps) for step in range(steps)])
axes.set_title(f"{steps} steps of {base.batch_tokens:,} tokens: the learning rate's factor")
axes.set(xlabel="step", ylim=(0, None))
plt.show()

# %% [markdown]
# ## The run
#
# Now the real thing. A process of its own trains; this cell only watches, redraws the figure every two
# seconds, and returns when the stage is finished. If you **interrupt the kernel**, the process finishes
# its step, saves and ends. Execute the cell again and it goes on from there. A stage that is finished
# returns at once.
#
# Close the browser tab and it goes on training. A tab opened again finds the kernel busy and shows no
# figure; to see one, restart the kernel and run all cells. The stage saves, ends, and goes on.

# %%
result = launch.stage("base", run, watch=lesson.Live())
print(f"{result['parameters']:,} parameters read {result['tokens']:,} tokens", end="")
print(f", {result['epochs']:.2f} passes over the text")

# %% [markdown]
# Left is the loss on the text it reads, right the bits per byte of text that it never reads. Where a run
# reads its text more than once, the left curve falls by a step at each new pass: the model begins to know
# the text by heart. Only the right curve tells whether it still learns what is true of other texts. If it
# rises, less would have been more. Chapters 06 and 07 draw the same two curves.

# %% [markdown]
# ## What has it learned?
#
# First, a number. The rival is a **trigram**: it looks at the last two tokens and answers with what
# followed them in the training text, counted. Where it has seen too little of that, it mixes in what
# followed the last one alone, and how common each token is.

# %%
scores = launch.stage("eval", run, of="base", watch=lesson.Live())
bytes_per_token = run.stage("tokenizer").done()["result"]["validation_bytes_per_token"]
bars = {
    "a file": 8.0,
    "a new model": math.log2(tokenizer.vocab_size) / bytes_per_token,
    "a trigram": scores["compression"]["trigram_bpb"],
    "this model": scores["compression"]["bpb"],
}
figure, axes = plt.subplots(figsize=(7.2, 2.2))
drawn = axes.barh(list(bars), list(bars.values()), color=[*[lesson.GREY] * 3, lesson.BLUE])
axes.bar_label(drawn, fmt="%.2f", padding=3)
axes.set_title("bits per byte of text nobody has trained on")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# Then, what it writes. It was given the beginning of a text it had not seen (before the bar) and went
# on by itself, always with the most likely token.

# %%
for opening, continuation in scores["samples"]["samples"]:
    print(f"{opening} ┃ {continuation}\n")

# %% [markdown]
# ## Where is it surprised?
#
# The loss is a mean over tokens, and the tokens differ. Here is a held-out text: the redder a token,
# the more bits it took. The middle of a word is easy; names and new facts are not.

# %%
gpt = checkpoint.load_model(run.stage("base").checkpoints, torch.device("cpu"))
document = held_out[1][: min(90, recipe.model.sequence_len)]
alone = batch_of_rows([document], [np.ones(len(document), bool)], len(document) - 1, tokenizer.bos)
with torch.no_grad():
    bits_T = gpt.nll(alone)[0] / math.log(2)
pieces = [tokenizer.decode([id]) for id in document[1:]]
lesson.tokens(pieces, shades=(bits_T / 8).tolist())
print(f"{bits_T.sum():.0f} bits for {sum(map(len, pieces))} characters, at most {bits_T.max():.1f}")

# %% [markdown]
# ## Where does it look?
#
# Chapter 02 drew the attention of random queries and keys: spots without a plan. Here is the last layer of
# the trained model, reading the beginning of the same text. Look for heads that prefer the token before,
# the start, or the name that the sentence is about.


# %%
@torch.no_grad()
def look(gpt, ids_T, layer):
    """The attention weights [H, T, T] of one layer."""
    cos_sin = rotation(torch.arange(len(ids_T)), gpt.config.head_dim)
    x_BTD = norm(gpt.embedding(ids_T[None]))
    for block in gpt.blocks[:layer]:
        x_BTD = block(x_BTD, cos_sin)
    attention, x_BTD = gpt.blocks[layer].attention, norm(x_BTD)
    heads = (-1, gpt.config.head_dim)
    query = norm(rotate(attention.query(x_BTD).unflatten(-1, heads), cos_sin))
    key = norm(rotate(attention.key(x_BTD).unflatten(-1, heads), cos_sin))
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores_HTS = torch.einsum("bthk,bshk->hts", query, key) / gpt.config.head_dim**0.5
    future_TS = torch.ones(scores_HTS.shape[1:]).triu(diagonal=1).bool()
    return scores_HTS.masked_fill(future_TS, -torch.inf).softmax(dim=-1)


# %%
ids_T = torch.from_numpy(document[:16].astype(np.int64))
weights_HTS = look(gpt, ids_T, layer=len(gpt.blocks) - 1)
assert_close(weights_HTS.sum(dim=-1), torch.ones(weights_HTS.shape[:2]))
names = [tokenizer.decode([id]) for id in ids_T]
shown = min(4, len(weights_HTS))
figure, panels = plt.subplots(1, shown, figsize=(2.4 * shown + 1, 3.2), sharey=True, squeeze=False)
for head, axes in enumerate(panels[0]):
    lesson.heatmap(axes, weights_HTS[head], rows=names, columns=names, limits=(0, 1))
    axes.set_title(f"head {head}")
    axes.tick_params(labelsize=7)
plt.show()

# %% [markdown]
# ## Exercises
#
# **1.** A model reports a loss of 2.0 nats a token. Its tokens have 4.0 bytes on average. How many
# bits per byte is that? Write the function.


# %% tags=["exercise"]
def to_bits_per_byte(nats_per_token, bytes_per_token):
    return ...


lesson.check(to_bits_per_byte, (2.0, 4.0, 0.721348), (math.log(2), 1.0, 1.0))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def to_bits_per_byte(nats_per_token, bytes_per_token):
#     return nats_per_token / math.log(2) / bytes_per_token
# ```
#
# </details>
#
# **2.** A rule of thumb says: read 20 tokens for each parameter. How many steps is that, rounded up, for
# a model of `parameters` with `batch_tokens` tokens a step?


# %% tags=["exercise"]
def horizon(parameters, batch_tokens):
    return ...


lesson.check(horizon, (1_000_000, 8_192, 2_442), (560_988_160, 524_288, 21_400))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def horizon(parameters, batch_tokens):
#     return math.ceil(20 * parameters / batch_tokens)
# ```
#
# The second case is the depth 20 model of October 2025: 11.2 billion tokens.
#
# </details>
#
# **3.** Add a linear warmup to the schedule: over the first `warmup` steps (a number of steps) the rate
# rises to 1, so that step 0 has 1/warmup; over the last `warmdown` steps it falls towards 0.


# %% tags=["exercise"]
def rate_with_warmup(step, steps, warmup, warmdown):
    return ...


lesson.check(
    rate_with_warmup,
    (0, 10, 4, 2, 0.25),
    (3, 10, 4, 2, 1.0),
    (5, 10, 4, 2, 1.0),
    (9, 10, 4, 2, 0.5),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def rate_with_warmup(step, steps, warmup, warmdown):
#     return min(1.0, (step + 1) / warmup, (steps - step) / warmdown)
# ```
#
# `nanolib.train.lr_scale` does this with fractions of the run instead of steps.
#
# </details>
#
# **4.** Start a run of your own, in the parameters cell above: `run = "mine"`, and
# `overrides = {"base.steps": 60, "optim.matrix_lr": 0.1}`. Interrupt it, run it again, and look at what
# is in `runs/out/mine/base/`. What does a learning rate five times too large do to the curve?
#
# ## To read
#
# - Radford et al., *Language Models are Unsupervised Multitask Learners* (GPT-2),
#   [report](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
# - Hoffmann et al., *Training Compute-Optimal Large Language Models* (20 tokens a parameter),
#   [arXiv:2203.15556](https://arxiv.org/abs/2203.15556)
# - Hägele et al., *Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations* (constant
#   rate, then cooldown), [arXiv:2405.18392](https://arxiv.org/abs/2405.18392)
# - Elhage et al., *A Mathematical Framework for Transformer Circuits*,
#   [transformer-circuits.pub](https://transformer-circuits.pub/2021/framework/index.html)
#
# In the code: `nanolib/train.py`, `nanolib/data/`, `nanolib/evals/bpb.py`, `nanolib/checkpoint.py`.
# **Next:** 05, the model writes.
