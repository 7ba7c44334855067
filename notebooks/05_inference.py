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
# [▶ Open this chapter in Colab](https://colab.research.google.com/github/OWNER/nanolib/blob/main/notebooks/05_inference.ipynb): nothing to install on your machine.

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
# # 05 · Writing, a token at a time
#
# The model of chapter 04 gives a score to every token that might come next. To write, choose one, append
# it, ask again. That is four lines. They are slow, write one text at a time, and cannot calculate. What
# does it take to mend all three?
#
# **You will learn**
# - what a KV cache keeps, by writing it, and what limits the speed then;
# - how a token is drawn, and how a seed gives the same text whatever is written beside it;
# - how a tool's result gets into an answer, and what becomes of it if the tool lies.
#
# **You need** [attention](02_model.ipynb) and its causal mask;
# [chapter 04](04_pretraining.ipynb), whose model is used here, and made first if it is not there.
#
# **Takes** 35 minutes to read and run, 70 more with the exercises; any CPU. Nothing is trained.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import codecs
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import checks
import lesson
from nanolib import accounting, checkpoint, launch
from nanolib.config import ModelConfig
from nanolib.data.sources import split_documents
from nanolib.engine import Engine
from nanolib.model import GPT, KVCache, attend, norm, rotate, rotation
from nanolib.runtime import Runtime
from nanolib.sampling import inverse_cdf, probabilities
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox

run = lesson.begin(profile, run, overrides)
launch.stage("base", run, watch=lesson.Live())  # chapter 04's work, if it is not there yet
tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)
gpt = checkpoint.load_model(run.stage("base").checkpoints, cpu.device)
engine = Engine(gpt, tokenizer, cpu)

# %% [markdown]
# ## 1. The four lines
#
# Our five words go in, and the model writes on. Take the likeliest next token, again and again:
# [greedy decoding](glossary.ipynb#greedy-decoding). Writing like this, each token from all before it, is
# called [autoregressive](glossary.ipynb#autoregressive).


# %%
@torch.inference_mode()
def write(ids, count):
    ids = list(ids)
    for _ in range(count):
        scores_V = gpt(torch.tensor([ids]))[0, -1]
        ids.append(int(scores_V.argmax()))
    return ids


five = [tokenizer.bos, *tokenizer.encode("Ada fed her owl again")]
written = write(five, 12)
print(f"{tokenizer.decode(five[1:])} ┃ {tokenizer.decode(written[len(five) :])!r}")

# %% [markdown]
# And a held-out text, cut after 24 tokens, against nanolib's engine.

# %%
*_, validation_file = sorted(run.stage("shards").path.glob("*.npy"))
held_out = split_documents(np.load(validation_file), tokenizer.bos)
documents = [document[:60].tolist() for document in sorted(held_out, key=len)[-3:]]
prompt = documents[0][:24]
ours = write(prompt, 20)[len(prompt) :]
(real,) = engine.complete([prompt], max_new_tokens=20)  # stops at a text's end; ours does not
assert real == ours[: len(real)]
print(f"{tokenizer.decode(prompt[1:])} ┃ {tokenizer.decode(real)}")

# %% [markdown]
# For every new token the model reads *everything* anew. How much work is that?
#
# **Exercise 5.1 ★ · 4 minutes · build** Positions computed.
# The four lines write `count` tokens after a [prompt](glossary.ipynb#prompt) of `prompt` tokens. How many
# positions does the model compute in all? (One that remembered what it read would need
# prompt + count − 1. Why − 1?)


# %% tags=["exercise"]
def positions_anew(prompt, count):
    """How many positions go through the model, over all its calls."""
    ...


checks.verify("5.1", positions_anew)

# %% [markdown]
# <details><summary>Hint 1</summary>How long is the text at the first call, and at the second?</details>
# <details><summary>Hint 2</summary>prompt, prompt + 1, … How many calls are there?</details>
# <details><summary>Solution</summary>
#
# ```python
# def positions_anew(prompt, count):
#     return sum(prompt + already for already in range(count))
# ```
#
# The last token that is written is never read: hence the − 1. For 1,000 tokens after 1,000 it is 1,499,500
# positions against 1,999.
#
# </details>

# %% [markdown]
# ## 2. The cache
#
# Nobody looks ahead, so the keys and values of old tokens never change
# ([chapter 02](02_model.ipynb)). Keep them. A new token then needs its own query, key and value, and a look
# at what is kept. That is the [KV cache](glossary.ipynb#kv-cache). Why are queries not kept?
#
# **Exercise 5.2 ★★ · 10 minutes · build** A cache that grows.
# Write `extend`: it gets the keys and values of new tokens of one layer, appends them to what that layer
# has, and returns all of them. `layer` is anything that can be a key of a dictionary.


# %% tags=["exercise"]
class Cache:
    def __init__(self):
        self.kept, self.length = {}, 0  # layer -> (keys, values); tokens so far

    def extend(self, layer, key_BTGK, value_BTGK):
        """Keep the new keys and values; return the layer's keys and values so far [B, S, G, K]."""
        ...


checks.verify("5.2", Cache)

# %% [markdown]
# <details><summary>Hint 1</summary>What does a layer have before its first token? Along which axis do
# tokens lie?</details>
# <details><summary>Hint 2</summary><code>torch.cat([old, new], dim=1)</code>, for keys and for values, if
# the layer is in <code>self.kept</code>.</details>
# <details><summary>Solution</summary>
#
# ```python
# class Cache:
#     def __init__(self):
#         self.kept, self.length = {}, 0
#
#     def extend(self, layer, key_BTGK, value_BTGK):
#         if layer in self.kept:
#             key_BTGK = torch.cat([self.kept[layer][0], key_BTGK], dim=1)
#             value_BTGK = torch.cat([self.kept[layer][1], value_BTGK], dim=1)
#         self.kept[layer] = (key_BTGK, value_BTGK)
#         return self.kept[layer]
# ```
#
# A query asks once, at its own position, and nobody ever looks at it again.
#
# </details>


# %% tags=["solution-twin"]
class Cache:
    def __init__(self):
        self.kept, self.length = {}, 0

    def extend(self, layer, key_BTGK, value_BTGK):
        if layer in self.kept:
            key_BTGK = torch.cat([self.kept[layer][0], key_BTGK], dim=1)
            value_BTGK = torch.cat([self.kept[layer][1], value_BTGK], dim=1)
        self.kept[layer] = (key_BTGK, value_BTGK)
        return self.kept[layer]


trial = Cache()
for new_tokens in (3, 1):
    keys, values = trial.extend("a layer", *torch.randn(2, 1, new_tokens, 4, 8))
print("after three tokens and one more, a query sees", tuple(keys.shape), "keys")

# %% [markdown]
# With it, the model of chapter 02 reads only what is new. Positions go on where the cache ends, and of
# several new tokens each sees the kept ones, itself and those before it.


# %%
def cached_attention(layer, x_BTD, cos_sin, mask_BTS, cache):
    heads = (-1, layer.head_dim)
    query = norm(rotate(layer.query(x_BTD).unflatten(-1, heads), cos_sin))
    key = norm(rotate(layer.key(x_BTD).unflatten(-1, heads), cos_sin))
    keys, values = cache.extend(layer, key, layer.value(x_BTD).unflatten(-1, heads))
    return layer.out(attend(query, keys, values, mask_BTS).flatten(2))


# %%
@torch.inference_mode()
def read(ids, cache, first=None):
    """The scores after each of the new tokens; the cache remembers them."""
    first = cache.length if first is None else first
    positions_T = torch.arange(first, first + len(ids))
    places_T = torch.arange(cache.length, cache.length + len(ids))
    cache.length += len(ids)
    mask_BTS = (torch.arange(cache.length) <= places_T[:, None])[None]
    cos_sin = rotation(positions_T, gpt.config.head_dim)
    x_BTD = norm(gpt.embedding(torch.tensor([ids])))
    for block in gpt.blocks:
        x_BTD = x_BTD + cached_attention(block.attention, norm(x_BTD), cos_sin, mask_BTS, cache)
        x_BTD = x_BTD + block.mlp(norm(x_BTD))
    return gpt.logits(norm(x_BTD))[0]


# %%
cache = Cache()
scores_TV = torch.cat([read(prompt[:10], cache), *(read([id], cache) for id in prompt[10:])])
assert_close(scores_TV, gpt(torch.tensor([prompt]))[0], atol=1e-3, rtol=1e-3)
print(f"ten tokens at once, then {len(prompt) - 10} one by one: the same scores as without a cache")

# %% [markdown]
# And now the decoding loop, with nothing hidden. It has two phases. [Prefill](glossary.ipynb#prefill) reads
# the whole prompt at once. [Decode](glossary.ipynb#decode) feeds one token, extends the cache, chooses.


# %% tags=["loop"]
def write_cached(ids, count):
    cache, new = Cache(), []
    scores_TV = read(ids, cache)  # prefill
    while len(new) < count:
        new.append(int(scores_TV[-1].argmax()))  # choose
        scores_TV = read(new[-1:], cache)  # feed it, extend the cache
    return new


assert write_cached(prompt, 20) == ours
print("the same text:", repr(tokenizer.decode(ours)))

# %% [markdown]
# Here is the cache as it grows while the model writes on after our five words. Each cell holds a key and a
# value. Prefill fills a block, every token after that is one column.


# %%
def grid(axes, tokens):
    """The cache when that many tokens have been read: the prompt plain, written tokens hatched."""
    layers = len(gpt.blocks)
    for place in range(tokens):
        colour, hatch = (lesson.GREY, "") if place < len(five) else (lesson.CHOSEN, "//")
        alpha = 1 if place == tokens - 1 or tokens == len(five) else 0.5  # new ones are darker
        look = {"color": colour, "hatch": hatch, "alpha": alpha, "edgecolor": "white"}
        axes.bar(place, layers, 1, bottom=-0.5, **look)
    axes.hlines(np.arange(layers - 1) + 0.5, -0.5, len(written), color="white")
    axes.set(ylim=(-0.5, layers - 0.5), xlabel="position", ylabel="layer", yticks=range(layers))
    axes.set_xlim(-0.5, len(written))
    axes.grid(False)


alt = "Layers by positions: first a plain block, the prompt; then a hatched column more for each token"
moments = [len(five) + more for more in (0, 1, 2, 4, 7, 11)]
lesson.frames(grid, moments, label="tokens read:", alt=alt)


# %%
def cache_bytes(config, rows, length, bytes_per_number=2):
    """Keys and values of every layer: two vectors per row and position, shared by query heads."""
    width = config.num_kv_heads * config.head_dim
    return 2 * config.depth * rows * length * width * bytes_per_number


kept = sum(x.nbytes for pair in cache.kept.values() for x in pair)  # ours, after the prompt
assert kept == cache_bytes(gpt.config, 1, len(prompt), bytes_per_number=4)
size = cache_bytes(gpt.config, rows=1, length=len(written), bytes_per_number=4)
print(f"{len(written)} tokens, {len(gpt.blocks)} layers: {size:,} bytes")

# %% [markdown]
# **Break it.** Two mistakes that everybody makes once. In the first, the new token's position starts at 0
# again. In the second, all layers share one drawer. Neither raises an error. Before you run it: which one
# still writes sentences?


# %%
class OneDrawer(Cache):
    def extend(self, layer, key_BTGK, value_BTGK):
        key_BTGK, value_BTGK = super().extend("all", key_BTGK, value_BTGK)
        return key_BTGK[:, -self.length :], value_BTGK[:, -self.length :]


right_TV = gpt(torch.tensor([written])).detach()[0, len(five) - 1 :]
trials = {"ours": (Cache, None), "positions from 0": (Cache, 0), "one drawer": (OneDrawer, None)}
for name, (kind, first) in trials.items():
    cache = kind()
    scores = [read(five, cache)[-1]]
    scores += [read([id], cache, first)[-1] for id in written[len(five) :]]
    worst = (torch.stack(scores) - right_TV).abs().max()
    said = [int(scores_V.argmax()) for scores_V in scores]
    print(f"{name:17} scores off by {worst:5.2f}: {tokenizer.decode(said)!r}")
    assert (worst < 1e-2) == (name == "ours")

# %% [markdown]
# Here the right tokens were fed each time, and each model only had to say the next one. Both broken ones are
# far off, and yet both still write stretches that one can read: such a bug lives long in a demo. Comparing
# scores with a run without a cache finds it in a second.

# %% [markdown]
# How long does the next token take, after 16, 32, … 512 tokens? Measured here and now, with a
# fresh model of 0.8 million weights (its scores mean nothing, its arithmetic is real).

# %%
fresh = ModelConfig(depth=4, aspect=32, head_dim=32, sequence_len=520)
clock_model = GPT.build(fresh, 256, cpu.device, seed=1)
lengths, milliseconds = [16, 32, 64, 128, 256, 512], {"everything anew": [], "with a cache": []}
for length in lengths:
    kept = KVCache(fresh, 1, 520, cpu.device, cpu.dtype)
    kept.advance(length)
    for name, tokens, memory in (("everything anew", length, None), ("with a cache", 1, kept)):
        times = []
        for _ in range(3):
            started = time.perf_counter()
            with torch.inference_mode():
                clock_model(torch.zeros(1, tokens, dtype=torch.long), cache=memory)
            times.append(1000 * (time.perf_counter() - started))
        milliseconds[name].append(min(times))
print("ratio:", [f"{a / b:.1f}" for a, b in zip(*milliseconds.values(), strict=True)])

# %%
figure, axes = plt.subplots(figsize=(6.4, 2.6))
looks = ((lesson.GREY, "s--"), (lesson.BLUE, "o-"))
for (name, times), (colour, line) in zip(milliseconds.items(), looks, strict=True):
    axes.loglog(lengths, times, line, label=name, color=colour)
axes.set_xticks(lengths, lengths)
axes.set_yticks([1, 2, 5, 10, 20, 50], [1, 2, 5, 10, 20, 50])
axes.minorticks_off()
axes.set(xlabel="tokens so far", ylabel="milliseconds", title="time for one more token")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
lesson.show(
    "Time for one more token: without a cache it grows with the text, with one it is nearly flat"
)

# %% [markdown]
# With a cache the time grows little beside the other. What grows is the look at the kept keys alone.
#
# ## 3. What limits the speed: bytes, not arithmetic
#
# To write one token, every weight is read from memory once and used once. On a GPU that is a waste. An H100
# calculates some 300 FLOP in the time it reads one byte (its data sheet: 989 × 10¹² FLOP and 3.35 × 10¹²
# bytes a second, its [memory bandwidth](glossary.ipynb#memory-bandwidth)). But if many rows are written
# together, a weight that has been read serves all of them. Only the cache is each row's own.
#
# A [roofline](glossary.ipynb#roofline) draws that. To the right: how much arithmetic is done for each byte
# read. Upwards: how fast it can go at best. The slope is limited by memory, the flat part by arithmetic. We
# put the depth 20 model on it, each row with 1,024 tokens behind it. Before you look: as the batch grows,
# the point for decoding walks to the right. Does it reach the flat part?

# %%
d20, vocab, bandwidth = ModelConfig(depth=20), 65_536, 3.35e12
peak = accounting.peak_flops("H100")
weight_bytes = 2 * (d20.parameters(vocab) - d20.parts(vocab)["embedding"])
row_bytes = cache_bytes(d20, rows=1, length=1024)
row_flops = accounting.forward_flops(d20, vocab)


def intensity(rows, tokens=1):
    """FLOP for each byte read, when `tokens` new tokens of each of `rows` rows are computed."""
    return rows * tokens * row_flops / (weight_bytes + rows * row_bytes)


print(f"one row, one token: {intensity(1):.1f} FLOP a byte")

# %%
print(f"weights {weight_bytes / 1e9:.2f} GB, a row's cache {row_bytes / 1e9:.2f} GB")
for rows in (1, 16, 256, 1024):
    best = min(peak, bandwidth * intensity(rows)) / row_flops
    print(
        f"{rows:5} rows: {intensity(rows):5.1f} FLOP a byte, at best {best:8,.0f} tokens a second"
    )
print(f"a prompt of 1,024 tokens: {intensity(1, 1024):.0f} FLOP a byte")
print(f"the roof is flat from {peak / bandwidth:.0f}")


# %%
def roofline(axes, rows):
    x = np.logspace(-0.5, 3.5, 50)
    axes.loglog(x, np.minimum(peak, bandwidth * x), color=lesson.GREY)
    for name, at, mark in (("decode", intensity(rows), "o"), ("prefill", intensity(1, 1024), "^")):
        height = min(peak, bandwidth * at)
        axes.plot(at, height, mark, markersize=9, color=lesson.BLUE)
        axes.text(at * 1.4, height / 5, name, ha="left" if name == "decode" else "center")
    axes.set(xlabel="FLOP a byte", ylabel="FLOP a second", ylim=(3e11, 3e15))


lesson.frames(
    roofline,
    [1, 4, 16, 64, 256, 1024],
    label="rows:",
    alt="A roof that rises and then is flat. Prefill stands on the flat part; decode starts far down on "
    "the slope, walks up it as the rows grow, and stops before the flat part",
)
assert intensity(1024) < row_flops / row_bytes < peak / bandwidth < intensity(1, 1024)

# %% [markdown]
# It never gets there. Each row brings its own cache to be read, so the point stops at the arithmetic of one
# token for the bytes of one row's cache, however large the batch. That ceiling is why caches get squeezed:
# fewer key heads ([grouped-query attention](glossary.ipynb#grouped-query-attention)), fewer bits, memory
# in pages. The prompt is another matter: its tokens go through together, one reading of the weights serves them
# all. Prefill is limited by arithmetic, decode by memory. This is a calculation, not a
# measurement: the best that the data sheet allows.
#
# **Exercise 5.3 ★★ · 6 minutes · predict** A GPU has 80 × 10⁹ bytes. How many rows of 2,048 positions can
# the depth 20 model write at once, with weights and caches at two bytes a number, and nothing else in
# memory? `cache_bytes` helps, and all weights count.

# %% tags=["exercise"]
most_rows = ...

checks.verify("5.3", most_rows)

# %% [markdown]
# <details><summary>Hint 1</summary>What is left when the weights are in memory?</details>
# <details><summary>Hint 2</summary>Divide it by <code>cache_bytes(d20, rows=1, length=2048)</code>, and round down.</details>
# <details><summary>Solution</summary>
#
# ```python
# row = cache_bytes(d20, rows=1, length=2048)
# most_rows = int((80e9 - 2 * d20.parameters(vocab)) // row)
# ```
#
# The weights take 1.1 GB. The other 99 % are for caches.
#
# </details>

# %% [markdown]
# Small models meet another limit first. A step is several hundred kernels, the GPU's small programs, and
# starting one may take longer than running it. So nanolib's engine records a step once, as a CUDA graph,
# and repeats it with a single start. What is repeated must stay where it is and keep its shape: `KVCache`
# therefore has all its memory from the beginning (ours grew), and is read in multiples of 64 positions,
# with a mask over those that are not yet written.
#
# ## 4. Rows of different length
#
# To write many rows together, they must be one tensor. Short prompts are filled up on the **right**, and
# each row knows how much of it is real. Does the filling do harm? It leaves rubbish in the cache, behind
# the row's last real token, where nobody looks, and the next tokens overwrite it.
# (Dark below: what the next token sees. ×: rubbish.)

# %%
prompts = [documents[0][:16], documents[1][:6], documents[2][:11]]
lengths_B = torch.tensor([len(ids) for ids in prompts])
ids_BT = torch.zeros(3, 16, dtype=torch.long)
for row, ids in zip(ids_BT, prompts, strict=True):
    row[: len(ids)] = torch.tensor(ids)
kept = KVCache(gpt.config, 3, 24, cpu.device, cpu.dtype)
with torch.inference_mode():
    after_prompt_BV = gpt(ids_BT, cache=kept)[torch.arange(3), lengths_B - 1]
kept.advance(lengths_B.tolist())
for row, ids in enumerate(prompts):
    assert_close(after_prompt_BV[row], gpt(torch.tensor([ids]))[0, -1], atol=1e-3, rtol=1e-3)
print("three prompts in one batch: the same scores as each alone;", kept.used_B.tolist(), "used")

# %%
figure, panels = plt.subplots(1, 2, sharey=True, figsize=(7.6, 2))
place_S, state_BS = torch.arange(24), torch.zeros(3, 24)
state_BS[:, :16] = 1  # written by the prefill
for axes, title in zip(panels, ("after the prompts", "five tokens later"), strict=True):
    state_BS[place_S < kept.used_B[:, None]] = 2
    lesson.heatmap(axes, state_BS, limits=(0, 3.2), rows=["0", "1", "2"])
    for row, place in (state_BS == 1).nonzero().tolist():
        axes.text(place, row, "×", ha="center", va="center")
    axes.set(title=title, xlabel="position in the cache", ylabel="row")
    for _ in range(5 if axes is panels[0] else 0):
        token_B1 = after_prompt_BV.argmax(dim=-1, keepdim=True)
        after_prompt_BV = gpt(token_B1, cache=kept)[:, -1].detach()
        kept.advance(1)
lesson.show("Three rows of a cache: dark, seen by the next token; crossed, rubbish; white, unused")

# %% [markdown]
# The rubbish shrinks as a row writes, and no token ever sees it.
#
# ## 5. Drawing a token
#
# The likeliest token every time is safe and dull, and N [samples](glossary.ipynb#sampling) of it are N
# times the same. So we draw, in three steps.
#
# **[Temperature](glossary.ipynb#temperature).** Divide the [logits](glossary.ipynb#logits) by a number
# before the softmax. Below 1 the differences grow, and towards 0 the likeliest takes all; above 1 they
# shrink, and everything becomes possible. Here our text's favourite comes closest to one half. (Labels
# do not show line breaks.)

# %%
with torch.inference_mode():
    logits_TV = gpt(torch.tensor([prompt]))[0]
favourite_T = logits_TV.softmax(dim=-1).max(dim=-1).values
place = 4 + int((favourite_T[4:] - 0.5).abs().argmin())
opening, logits_V = prompt[: place + 1], logits_TV[place]
top = logits_V.topk(8).indices
labels = [tokenizer.decode([id]).replace(" ", "·").replace("$", r"\$") for id in top.tolist()]


def spread(axes, temperature):
    shares = (logits_V / temperature).softmax(dim=-1)[top]
    axes.bar(range(8), shares.tolist(), color=lesson.CHOSEN)
    axes.set_xticks(range(8), labels, rotation=45)
    axes.set(ylim=(0, 1), ylabel="probability")


alt = "Eight likely tokens: the lower the temperature, the more of it all the first one takes"
print(f"What comes after {tokenizer.decode(opening[1:])!r}?")
lesson.frames(spread, [0.2, 0.5, 0.8, 1.0, 1.5, 3.0], label="temperature", alt=alt)

# %% [markdown]
# **[Top-k](glossary.ipynb#top-k).** Even at temperature 1 the many unlikely tokens may have a few percent
# together, and in a long text one of them will come, and derail it. So keep the k likeliest, and throw the
# rest away. k is the same where the model is sure and where it is not; top-p is cleverer:
#
# **Exercise 5.4 ★★ · 10 minutes · build** Top-p, or nucleus sampling.
# Keep the *fewest* likeliest tokens whose probabilities add up to at least `top_p`, and scale those so that
# they add up to 1; the rest get 0. Lists in, list out, in the given order. Ties go to the earlier token.
# At `top_p` = 0, how many are left?


# %% tags=["exercise"]
def nucleus(probabilities, top_p):
    """A list of probabilities -> the list with only the nucleus left, adding up to 1."""
    ...


checks.verify("5.4", nucleus)

# %% [markdown]
# <details><summary>Hint 1</summary>In which order do you look at the tokens, and when do you stop? Does
# the one that crosses the border belong to it?</details>
# <details><summary>Hint 2</summary><code>sorted(range(len(p)), key=lambda id: -p[id])</code>; take tokens
# while the sum of those taken before is below top_p, and at least one.</details>
# <details><summary>Solution</summary>
#
# ```python
# def nucleus(probabilities, top_p):
#     kept, total = set(), 0.0
#     for id in sorted(range(len(probabilities)), key=lambda id: -probabilities[id]):
#         if total < top_p or not kept:
#             kept.add(id)
#             total += probabilities[id]
#     return [p / total if id in kept else 0.0 for id, p in enumerate(probabilities)]
# ```
#
# One is left: the likeliest. Top-p keeps few where the model is sure and many where it is not.
#
# </details>

# %% [markdown]
# **The dart.** Line the probabilities up from 0 to 1 and throw a dart: the token whose stretch it hits is
# next. (Its name: the inverse of the cumulative distribution, or inverse CDF.)


# %%
def draw(p_V, dart):
    totals = p_V.cumsum(dim=0).tolist()  # the last is 1, but for rounding
    return next(id for id, total in enumerate(totals) if total > dart * totals[-1])


p_V = probabilities(logits_V[None], temperature=1.0, top_k=12)[0]
darts = [0.05, 0.35, 0.65, 0.95]
hit = [draw(p_V, dart) for dart in darts]
assert hit == inverse_cdf(p_V.expand(4, -1), darts).tolist()
print(f"{tokenizer.decode(opening[1:])} ┃", [tokenizer.decode([id]) for id in hit])

# %%
figure, axes = plt.subplots(figsize=(7.6, 1.7))
left = 0.0
for number, id in enumerate((p_V > 0).nonzero().flatten().tolist()):
    share = p_V[id].item()
    axes.barh(0, share, left=left, color=lesson.PASTELS[number % 6], edgecolor="#4a5568")
    if share > 0.05:
        name = tokenizer.decode([id]).replace(" ", "·").replace("$", r"\$")
        axes.text(left + share / 2, 0, name, ha="center", va="center", fontsize=9)
    left += share
axes.plot(darts, [0.55] * 4, "v", color=lesson.RED)
axes.set(xlim=(0, 1), ylim=(-0.5, 0.7), xlabel="probability, summed up in the order of the ids")
axes.set(yticks=[], title="twelve tokens and four darts")
lesson.show("A bar from 0 to 1 cut into the stretches of twelve tokens, with four darts above it")

# %% [markdown]
# Where do the darts come from? Each is a hash of the request's seed, the sample's number and the position
# in the row. If all rows drew from one generator, a row that ends early would shift the darts of all
# others, and your answer would depend on who else is asking. Below, section 4's prompts run together, alone
# and in reverse: always the same texts.

# %%
settings = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 50}
seeds = (7, 8, 9)
together = engine.complete(prompts, seeds=seeds, **settings)
alone = [
    engine.complete([p], seeds=[s], **settings)[0] for p, s in zip(prompts, seeds, strict=True)
]
backwards = engine.complete(prompts[::-1], seeds=seeds[::-1], **settings)
assert together == alone == backwards[::-1]
for seed, ids in zip(seeds, together, strict=True):
    print(f"seed {seed}: {tokenizer.decode(ids)!r}")

# %% [markdown]
# ## 6. One prompt, many samples
#
# Evaluation and reinforcement learning ([chapter 08](08_grpo.ipynb)) want many answers to the same question.
# The prompt is read once, and its keys and values are copied to every row. We count how many tokens go
# through the model.

# %%
seen, settings = [], {"max_new_tokens": 8, "temperature": 1.0}
hook = gpt.embedding.register_forward_hook(lambda module, ids, out: seen.append(ids[0].numel()))
shared = engine.complete([opening], samples=8, seeds=[1], **settings)
tokens_shared = sum(seen)
seen.clear()
engine.complete([opening] * 8, **settings)
tokens_apart = sum(seen)
hook.remove()
print(f"8 samples of {len(opening)} + at most 8 tokens. Tokens that go through the model:")
print(f"{tokens_shared} with one prefill, {tokens_apart} with eight")
assert len({tuple(ids) for ids in shared}) > 1 and tokens_shared < tokens_apart

# %% [markdown]
# ## 7. A tool: some tokens are chosen, some are forced
#
# [Chapter 04](04_pretraining.ipynb) ended with a model that copies superbly and cannot add. So it may write
# a program between `<|python_start|>` and `<|python_end|>`. The engine runs it and **forces** the result into
# the row, between `<|output_start|>` and `<|output_end|>`, as if the model had said it. Then the model goes
# on, and has only to copy ([tool use](glossary.ipynb#tool-use)).
#
# The model of chapter 04 has never seen such a marker; it learns them in
# [chapter 06](06_midtraining.ipynb). To watch the machine we need no learned model. A **scripted** one will
# do: it reads its row, as it stands in the cache, and a rule of ours says what comes next.

# %%
characters = Tokenizer(merges=[])  # every byte a token: easy to look at
parts = [(part, edge) for part in ("assistant", "python", "output") for edge in ("start", "end")]
markers = [characters.special(f"<|{part}_{edge}|>") for part, edge in parts]
START, END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = markers
print("markers:", markers)


# %%
class Scripted:
    """A stand-in for a model: it keeps its tokens where others keep keys, and follows a rule."""

    config = ModelConfig(depth=1, aspect=2, head_dim=2, sequence_len=96)

    def __init__(self, rule):
        self.rule = rule

    def hidden(self, ids_BT, cache):
        places_BT, kept = cache.positions(ids_BT.shape[1]), ids_BT[..., None, None].float()
        cache.write(0, places_BT, kept.expand(-1, -1, 1, 2), kept.expand(-1, -1, 1, 2))
        rows = cache.read(0, cache.length)[0][:, :, 0, 0].long().tolist()
        pairs = zip(rows, places_BT.tolist(), strict=True)
        return torch.tensor([[self.rule(row[: place + 1]) for place in p] for row, p in pairs])

    def logits(self, ids):
        return 100.0 * F.one_hot(ids, characters.vocab_size)

    def __call__(self, ids_BT, cache):
        return self.logits(self.hidden(ids_BT, cache))


print("a rule is a function from the ids so far to the next id")

# %% [markdown]
# Our rule: the question stands between `<|bos|>` and `<|assistant_start|>`. Write it as a program. When a
# result has come, copy it.


# %%
def rule(ids):
    if START not in ids:
        return END
    cut = ids.index(START)
    said, program = ids[cut + 1 :], ids[1:cut]
    lines = [PYTHON, *program, PYTHON_END]
    if OUTPUT_END in said:  # the result is there: copy it
        result = said[said.index(OUTPUT) + 1 : said.index(OUTPUT_END)]
        lines += [OUTPUT, *result, OUTPUT_END, *characters.encode("It is "), *result, END]
    return lines[len(said)] if len(said) < len(lines) else END


# %%
def ask(question):
    return [characters.bos, *characters.encode(question), START]


def calculator(source):
    products = [math.prod(map(int, product.split("*"))) for product in source.split("+")]
    return str(sum(products))


def liar(source):
    return str(int(calculator(source)) + 1)


print("asked 12+30, the tool says", calculator("12+30"), "and the liar", liar("12+30"))

# %% [markdown]
# Before you run it: what will the row say when the tool lies?


# %%
def told(answer):
    """Show an answer, token by token, in the course's colours."""
    pieces, kinds, program = [], [], False
    names = {PYTHON: "⟨py⟩", PYTHON_END: "⟨/py⟩", OUTPUT: "⟨out⟩", OUTPUT_END: "⟨/out⟩"}
    for id, chosen in zip(answer.ids, answer.chosen, strict=True):
        program = program or id == PYTHON
        kinds.append("forced" if not chosen else "program" if program else "chosen")
        pieces.append(names.get(id, characters.decode([id])))
        program = program and id != PYTHON_END
    lesson.tokens(pieces, kinds=kinds)


for tool in (calculator, liar):
    talker = Engine(Scripted(rule), characters, cpu, tool)
    (answer,) = talker.answers([ask("12+30")], max_new_tokens=40)
    told(answer)
    assert characters.decode(answer.ids).endswith(tool("12+30"))

# %% [markdown]
# It says what it was told. Nothing marks the lie, no confidence drops. Whatever stands between the two
# markers is text like any other to the model, and being trained to copy it means being trained to believe
# it. That is the strength of a tool, and a good reason to be careful with whom you let write there.
# Chapter 06 lies to a model that has really learned, and counts how often it believes.
#
# How does the engine do it? The state of one row is small: the program that is being written, if one is, and
# the tokens that are still to be forced.
#
# **Exercise 5.5 ★★★ · 25 minutes · build** One row with a tool.
# Tokens are texts here, so that you can read them: `"<py>"`, `"</py>"`, `"<out>"`, `"</out>"`, `"<end>"`, and
# single characters. `say(tokens)` is the model: the next token it wants, given all so far. `tool(source)`
# returns a text. At every step ask the model; where a token is forced, its wish is thrown away.
# Return the tokens without `"<end>"`, at most `limit` of them (forced ones count). What goes wrong if a
# wish for `"<end>"` ends the row although something else is forced?


# %% tags=["exercise"]
def one_row(say, tool, limit):
    """The row that a model `say` writes with a `tool`: a list of tokens."""
    ...


checks.verify("5.5", one_row)

# %% [markdown]
# <details><summary>Hint 1</summary>What must the loop remember from one token to the next? Two things,
# beside the tokens.</details>
# <details><summary>Hint 2</summary><code>wish = say(tokens)</code>, then <code>token = forced.pop(0) if
# forced else wish</code>. On "&lt;py&gt;" begin to collect, on "&lt;/py&gt;" call the tool and fill
# <code>forced</code>.</details>
# <details><summary>Solution</summary>
#
# ```python
# def one_row(say, tool, limit):
#     tokens, forced, source = [], [], None
#     while len(tokens) < limit:
#         wish = say(tokens)
#         token = forced.pop(0) if forced else wish
#         if token == "<end>":
#             break
#         tokens.append(token)
#         if token == "<py>":
#             source = []
#         elif token == "</py>" and source is not None:
#             forced, source = ["<out>", *tool("".join(source)), "</out>"], None
#         elif source is not None:
#             source.append(token)
#     return tokens
# ```
#
# Then a row ends in the middle of a result. Our scripted model wishes to end as soon as its program is
# written: it has nothing to say until the result is there.
#
# </details>


# %% tags=["solution-twin", "loop"]
def one_row(say, tool, limit):
    tokens, forced, source = [], [], None
    while len(tokens) < limit:
        wish = say(tokens)
        token = forced.pop(0) if forced else wish
        if token == "<end>":
            break
        tokens.append(token)
        if token == "<py>":
            source = []
        elif token == "</py>" and source is not None:
            forced, source = ["<out>", *tool("".join(source)), "</out>"], None
        elif source is not None:
            source.append(token)
    return tokens


# %%
short = {PYTHON: "<py>", PYTHON_END: "</py>", OUTPUT: "<out>", OUTPUT_END: "</out>", END: "<end>"}
ids_of = {name: id for id, name in short.items()}
questions = ["3*4", "12+30", "7", "2*3*4+5", "9+9", "1+2*8"]


def say(question):
    def next_token(tokens):
        ids = [ids_of.get(token) or characters.encode(token)[0] for token in tokens]
        id = rule([*ask(question), *ids])
        return short.get(id) or characters.decode([id])

    return next_token


talker = Engine(Scripted(rule), characters, cpu, calculator)
steps = list(talker.generate([ask(q) for q in questions], max_new_tokens=40))
for row, question in enumerate(questions):
    ids = [t.id for step in steps for t in step if t.row == row and t.kind != "end"]
    ours = one_row(say(question), calculator, 40)
    assert [short.get(id) or characters.decode([id]) for id in ids] == ours
    print(f"{question:>8}:", "".join(ours))

# %% [markdown]
# Now watch the six rows of nanolib's engine together. Each column is a step, in which every row that is not
# over gets one token. No row waits for another: while one's program runs (its cell stays empty) or a result is
# forced into it, the others write on. A row that is over leaves its place at once, to a question that waits
# or to the last row. This is called [continuous batching](glossary.ipynb#continuous-batching).

# %%
signs = {PYTHON: "▸", PYTHON_END: "◂", OUTPUT: "«", OUTPUT_END: "»", END: "■"}
figure, axes = plt.subplots(figsize=(9.2, 2.6))
writes = [False] * 6
for step, tokens in enumerate(steps):
    for row, id, kind in tokens:
        writes[row] = kind == "chosen" and (id == PYTHON or writes[row])
        colour = lesson.FORCED if kind == "forced" else lesson.CHOSEN
        colour = lesson.PROGRAM if writes[row] else colour
        writes[row] = writes[row] and id != PYTHON_END
        look = {"color": colour, "alpha": 0.35, "hatch": lesson.HATCHES[colour], "ec": "white"}
        axes.barh(row, 1, left=step, **look)
        axes.text(step + 0.5, row, signs.get(id, characters.decode([id])), ha="center", va="center")
axes.set_yticks(range(6), questions)
axes.set(xlabel="step", title="▸ program ◂   « forced result »   ■ end", xlim=(0, len(steps)))
axes.invert_yaxis()
lesson.show("Six rows, a token a column: a dotted program, a striped result, a plain answer")

# %% [markdown]
# ## 8. The sandbox
#
# Our calculator knows + and *. A model may write any program, also one that never ends or reads your files.
# What a model wrote runs in nanolib in one place only: a `Sandbox`, an interpreter of its own in a process of
# its own, without files and network, with limits on time, memory, recursion and output. Whatever happens in
# there comes back as text, which the model reads like any other result.

# %%
programs = {
    "a sum": "12*7",
    "an error": "1/0",
    "never ends": "while True: pass",
    "fills the memory": "'x' * 10**9",
    "never returns": "def f(n): return f(n + 1)\nf(0)",
    "floods": "print('spam ' * 5000)",
    "reads your files": "open('/etc/passwd').read()",
}
with Sandbox(seconds=0.3, workers=1) as sandbox:
    for name, program in programs.items():
        started = time.perf_counter()
        text = sandbox.run(program).text
        print(f"{name:17} {time.perf_counter() - started:4.1f} s  {text[-60:]!r}")
    assert sandbox.run("6*7").text == "42"  # and it still works

# %% [markdown]
# ## 9. Whole characters
#
# A chat shows the answer while it is written. But tokens are bytes ([chapter 01](01_tokenizer.ipynb)), and a
# character may have up to four of them. Decode each token by itself, and you see �. So a stream holds back
# what is not yet a whole character.


# %%
def whole_characters(ids):
    waiting = b""
    for id in ids:
        waiting += characters.token_bytes(id)
        try:
            piece, waiting = waiting.decode(), b""
        except UnicodeDecodeError:
            piece = ""
        yield piece


ids = characters.encode("né 🙂")
decoder = codecs.getincrementaldecoder("utf-8")()  # Python has one too
pieces = list(whole_characters(ids))
assert pieces == [decoder.decode(characters.token_bytes(id)) for id in ids]
print("each by itself:", [characters.decode([id]) for id in ids])
print("held back:     ", pieces)

# %% [markdown]
# **Exercise 5.6 ★★★ · 15 minutes · open** Half a cache.
# Let `extend` keep keys and values in `torch.bfloat16`, or in eight bits (one scale for each vector), and
# give them back in float32. Which first changes its text, `write_cached` with cheap keys or with cheap
# values? What is known: eight bits hardly ever change an answer, and keys suffer before values do.

# %% tags=["open"]
cache = Cache()
read(five, cache)
print("bytes of keys by layer, to be halved:", [keys.nbytes for keys, _ in cache.kept.values()])

# %% [markdown]
# ## To read
#
# - Pope et al., *Efficiently Scaling Transformer Inference* (prefill, decode, and what limits each),
#   [arXiv:2211.05102](https://arxiv.org/abs/2211.05102)
# - Shazeer, *Fast Transformer Decoding: One Write-Head is All You Need*,
#   [arXiv:1911.02150](https://arxiv.org/abs/1911.02150)
# - Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*,
#   [arXiv:2309.06180](https://arxiv.org/abs/2309.06180)
# - Leviathan, Kalman & Matias, *Fast Inference from Transformers via Speculative Decoding*,
#   [arXiv:2211.17192](https://arxiv.org/abs/2211.17192)
# - Holtzman et al., *The Curious Case of Neural Text Degeneration* (top-p),
#   [arXiv:1904.09751](https://arxiv.org/abs/1904.09751)
# - Schick et al., *Toolformer*, [arXiv:2302.04761](https://arxiv.org/abs/2302.04761)
#
# In the code: `nanolib/engine.py`, `nanolib/sampling.py`, `KVCache` in `nanolib/model.py`,
# `nanolib/tools.py`, `nanolib/accounting.py`.
#
# **Next:** [chapter 06](06_midtraining.ipynb), between reading and talking.
