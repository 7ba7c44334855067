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
# # 05 · Writing, a token at a time
#
# The model of chapter 04 gives a score to every token that might come next. To write, choose one,
# append it, ask again. That is four lines of code, and they are slow, write one text at a time, and
# cannot calculate. This chapter mends that step by step, until it stands before `nanolib/engine.py`.
#
# **You will learn** what a KV cache saves and what limits the speed then, how rows of different length
# share a batch, how a seed gives the same text whatever else is written beside it, how a tool's result
# gets into an answer, and why a stream must wait for a character's last byte.
#
# **Takes** fifteen minutes to read and half a minute to run, on any CPU. Nothing is trained here: it
# uses the model of chapter 04, which is made first if it is not there.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import codecs
import math
import random
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.testing import assert_close

import lesson
from nanolib import accounting, checkpoint, launch
from nanolib.model import attend
from nanolib.config import ModelConfig
from nanolib.data.sources import split_documents
from nanolib.engine import Engine, inverse_cdf, probabilities
from nanolib.model import GPT, KVCache, norm, rotate, rotation
from nanolib.runtime import Runtime, seed_of
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox

run = lesson.begin(profile, run, overrides)
launch.stage("base", run, watch=lesson.Live())  # chapter 04's work, if it is not there yet
tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")

# %% [markdown]
# ## 1. The four lines
#
# A text the model has never seen, cut after 24 tokens. Take the likeliest next token, again and again.
# For every new token the model reads *everything* anew.

# %%
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)
gpt = checkpoint.load_model(run.stage("base").checkpoints, cpu.device)
engine = Engine(gpt, tokenizer, cpu)
*_, validation_file = sorted(run.stage("shards").path.glob("*.npy"))
held_out = split_documents(np.load(validation_file), tokenizer.bos)
documents = [document[:60].tolist() for document in sorted(held_out, key=len)[-3:]]
prompt = documents[0][:24]
print(tokenizer.decode(prompt[1:]))


# %%
@torch.inference_mode()
def write(ids, count):
    ids = list(ids)
    for _ in range(count):
        scores_V = gpt(torch.tensor([ids]))[0, -1]
        ids.append(int(scores_V.argmax()))
    return ids


ours = write(prompt, 20)[len(prompt) :]
(real,) = engine.complete([prompt], max_new_tokens=20)  # stops at a text's end; ours does not
assert real == ours[: len(real)]
print(f"{tokenizer.decode(prompt[1:])} ┃ {tokenizer.decode(real)}")

# %% [markdown]
# ## 2. A cache in twenty lines
#
# Nobody looks ahead, so the keys and values of old tokens never change (chapter 02). Keep them. A new
# token then needs its own query, key and value, and a look at what is kept. The positions go on where
# the cache ends, and with several new tokens each sees the kept ones, itself and those before it.


# %%
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


# %%
def cached_attention(layer, x_BTD, cos_sin, mask_BTS, cache):
    heads = (-1, layer.head_dim)
    query = norm(rotate(layer.query(x_BTD).unflatten(-1, heads), cos_sin))
    key = norm(rotate(layer.key(x_BTD).unflatten(-1, heads), cos_sin))
    keys, values = cache.extend(layer, key, layer.value(x_BTD).unflatten(-1, heads))
    return layer.out(attend(query, keys, values, mask_BTS).flatten(2))


# %%
@torch.inference_mode()
def read(ids, cache):
    """The scores after each of the new tokens; the cache remembers them."""
    positions_T = torch.arange(cache.length, cache.length + len(ids))
    cache.length += len(ids)
    mask_TS = torch.arange(cache.length) <= positions_T[:, None]
    cos_sin = rotation(positions_T, gpt.config.head_dim)
    x_BTD = norm(gpt.embedding(torch.tensor([ids])))
    for block in gpt.blocks:
        x_BTD = x_BTD + cached_attention(
            block.attention, norm(x_BTD), cos_sin, mask_TS[None], cache
        )
        x_BTD = x_BTD + block.mlp(norm(x_BTD))
    return gpt.logits(norm(x_BTD))[0]


# %%
cache = Cache()
scores_TV = torch.cat([read(prompt[:10], cache), *(read([id], cache) for id in prompt[10:])])
assert_close(scores_TV, gpt(torch.tensor([prompt]))[0], atol=1e-3, rtol=1e-3)
print(f"ten tokens at once, then {len(prompt) - 10} one by one: the same scores as without a cache")

# %% [markdown]
# Two phases, then. **Prefill** reads the whole prompt at once. **Decode** reads one token at a time,
# each time to write the next.


# %%
def write_cached(ids, count):
    cache, new = Cache(), []
    scores_TV = read(ids, cache)  # prefill
    while len(new) < count:
        new.append(int(scores_TV[-1].argmax()))
        scores_TV = read(new[-1:], cache)  # decode
    return new


assert write_cached(prompt, 20) == ours
print("the same text:", repr(tokenizer.decode(ours)))

# %% [markdown]
# How long does the next token take, after 16, 32, … 512 tokens? Measured just now, on this machine, with
# a fresh model of 0.8 million weights (its scores mean nothing, its arithmetic is real). Without a cache
# the time grows with the text. With one it is nearly flat: the look at the kept keys grows too, but it is
# a small part.

# %%
fresh = ModelConfig(depth=4, aspect=32, head_dim=32, sequence_len=520)
clock_model = GPT.build(fresh, 256, cpu.device, seed=1)
lengths, milliseconds = [16, 32, 64, 128, 256, 512], {"everything anew": [], "with a cache": []}
for length in lengths:
    kept = KVCache(fresh, 1, 520, cpu.device, cpu.dtype)
    kept.advance(length)
    for name, tokens, memory in (("everything anew", length, None), ("with a cache", 1, kept)):
        times = []
        for _ in range(4):
            started = time.perf_counter()
            with torch.inference_mode():
                clock_model(torch.zeros(1, tokens, dtype=torch.long), cache=memory)
            times.append(1000 * (time.perf_counter() - started))
        milliseconds[name].append(min(times))
print("ratio:", [f"{a / b:.1f}" for a, b in zip(*milliseconds.values(), strict=True)])

# %%
figure, axes = plt.subplots(figsize=(6.4, 2.8))
for (name, times), colour in zip(milliseconds.items(), (lesson.GREY, lesson.BLUE), strict=True):
    axes.loglog(lengths, times, "o-", label=name, color=colour)
axes.set_xticks(lengths, lengths)
axes.set_yticks([1, 2, 5, 10, 20, 50], [1, 2, 5, 10, 20, 50])
axes.minorticks_off()
axes.set(xlabel="tokens so far", ylabel="milliseconds", title="time for one more token")
axes.legend()
plt.show()

# %% [markdown]
# ## 3. What limits the speed: bytes, not arithmetic
#
# To write one token, every weight is read from memory once and used once. On a GPU that is a waste: an
# H100 multiplies some 300 numbers in the time it reads one (its data sheet: 989 × 10¹² FLOP and
# 3.35 × 10¹² bytes a second). But if many rows are written together, a weight that has been read serves
# all of them. Only the cache is each row's own.
#
# Here is that sum for the depth 20 model, each row with 1,024 tokens behind it. It is a calculation,
# not a measurement: the best that the data sheet allows.

# %%
d20, vocab = ModelConfig(depth=20), 65_536
read_weights = d20.parameters(vocab) - d20.parts(vocab)["embedding"]
row_bytes = accounting.cache_bytes(d20, rows=1, length=1024)
row_flops = accounting.forward_flops(d20, vocab)
rows = 2 ** np.arange(11)
memory_seconds = (2 * read_weights + rows * row_bytes) / 3.35e12
compute_seconds = rows * row_flops / accounting.peak_flops("H100")
print(
    f"a token: {row_flops / 1e9:.2f} GFLOP. Read for it: weights {2 * read_weights / 1e9:.2f} GB,"
)
print(
    f"its row's cache {row_bytes / 1e9:.2f} GB. Alone: {row_flops / (2 * read_weights):.1f} FLOP a byte"
)
assert (memory_seconds > compute_seconds).all()

# %%
figure, axes = plt.subplots(figsize=(6.4, 3))
axes.loglog(rows, rows / memory_seconds, "o-", label="limit by reading")
axes.loglog(rows, rows / compute_seconds, "--", label="limit by arithmetic")
axes.axhline(3.35e12 / row_bytes, color=lesson.RED, linewidth=1, label="reading caches alone")
axes.set(
    xlabel="rows written together", ylabel="tokens a second", title="depth 20, one H100: at best"
)
axes.legend()
plt.show()

# %% [markdown]
# The prompt is another matter. Its tokens go through the model together, so one reading of the weights
# serves them all: prefill is limited by arithmetic, decode by memory. And a batch hits a ceiling, where
# the caches outweigh the weights. That is why caches get squeezed: fewer key heads (GQA, chapter 02,
# exercise 3), fewer bits, pages instead of slabs.
#
# Small models meet another limit first. A step is several hundred kernels, the GPU's small programs, and
# starting one may take longer than running it. So on a GPU nanolib's engine records a step once, as a CUDA
# graph, and repeats all of it with a single start. What is repeated must stay where it is and keep its
# shape: `KVCache` therefore has all its memory from the beginning (ours above grew), and is read in
# multiples of 64 positions, with a mask over those that are not yet written. So the shapes change only
# once in 64 tokens, and the numbers, but for rounding, not at all.
#
# ## 4. Rows of different length
#
# To write many rows together, they must be one tensor. Short prompts are filled up on the **right**, and
# each row knows how much of it is real. The filling leaves rubbish in the cache, and it does no harm:
# it lies behind the row's last real token, where nobody looks, and the next tokens overwrite it.

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
    lesson.heatmap(axes, state_BS, limits=(0, 2.6), rows=["0", "1", "2"])
    axes.set(title=title, xlabel="position in the cache")
    for _ in range(5 if axes is panels[0] else 0):
        token_B1 = after_prompt_BV.argmax(dim=-1, keepdim=True)
        after_prompt_BV = gpt(token_B1, cache=kept)[:, -1].detach()
        kept.advance(1)
panels[0].set_ylabel("row")
plt.show()
print("white: never written; light: rubbish, seen by nobody; dark: seen by the next token")

# %% [markdown]
# The light stretch of a row shrinks as it writes. In row 1, where rubbish is left, the next token still
# sees its own text alone.
#
# ## 5. Drawing a token
#
# The likeliest token every time is safe and dull, and N samples of it are N times the same. To draw,
# line the probabilities up from 0 to 1 and throw a dart: the token whose stretch it hits is next
# (**inverse CDF**). Temperature and top-k, which change the stretches, are taken apart in chapter 09.


# %%
def draw(p_V, dart):
    totals = p_V.cumsum(dim=0).tolist()  # the last is 1, but for rounding
    return next(id for id, total in enumerate(totals) if total > dart * totals[-1])


p_TV = probabilities(gpt(torch.tensor([prompt]))[0].detach(), temperature=1.0, top_k=12)
place = int((p_TV * p_TV.clamp(min=1e-9).log()).sum(dim=-1).argmin())  # where it is least sure
opening, p_V = prompt[: place + 1], p_TV[place]
darts = [0.05, 0.35, 0.65, 0.95]
ours = [draw(p_V, dart) for dart in darts]
assert ours == inverse_cdf(p_V.expand(4, -1), darts).tolist()
print(f"{tokenizer.decode(opening[1:])} ┃", [tokenizer.decode([id]) for id in ours])

# %%
figure, axes = plt.subplots(figsize=(7.6, 1.7))
left = 0.0
for place, id in enumerate((p_V > 0).nonzero().flatten().tolist()):
    share = p_V[id].item()
    axes.barh(0, share, left=left, color=lesson.PASTELS[place % 6], edgecolor="white")
    if share > 0.04:
        name = tokenizer.decode([id]).replace(" ", "·").replace("$", r"\$")
        axes.text(left + share / 2, 0, name, ha="center", va="center", fontsize=7)
    left += share
axes.plot(darts, [0.55] * 4, "v", color=lesson.RED)
axes.set(xlim=(0, 1), ylim=(-0.5, 0.7), xlabel="probability, summed up in the order of the ids")
axes.set(yticks=[], title="the twelve likeliest tokens, and four darts")
plt.show()

# %% [markdown]
# Where do the darts come from? From a generator of the row's **own**, seeded with the request's seed and
# the sample's number. If all rows shared one, a row that ends early would shift the darts of all others,
# and your answer would depend on who else is asking.

# %%
settings = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 50}
together = engine.complete(prompts, seeds=[7, 8, 9], **settings)
alone = [
    engine.complete([p], seeds=[s], **settings)[0] for p, s in zip(prompts, (7, 8, 9), strict=True)
]
backwards = engine.complete(prompts[::-1], seeds=[9, 8, 7], **settings)
assert together == alone == backwards[::-1]
for seed, ids in zip((7, 8, 9), together, strict=True):
    print(f"seed {seed}: {tokenizer.decode(ids)!r}")

# %% [markdown]
# ## 6. One prompt, many samples
#
# Evaluation and reinforcement learning (chapter 08) want many answers to the same question. The prompt
# is read once, and its keys and values are copied to every row. We count how many tokens go through the
# model:

# %%
seen = []
hook = gpt.embedding.register_forward_hook(lambda module, ids, out: seen.append(ids[0].numel()))
settings = {"max_new_tokens": 8, "temperature": 1.0}
shared = engine.complete([opening], samples=8, seeds=[1], **settings)
tokens_shared = sum(seen)
seen.clear()
engine.complete([opening] * 8, **settings)
tokens_apart = sum(seen)
hook.remove()
print(f"8 samples of {len(opening)} + at most 8 tokens: {tokens_shared} go through the model")
print(f"with one prefill, {tokens_apart} with eight")
assert len({tuple(ids) for ids in shared}) > 1 and tokens_shared < tokens_apart

# %% [markdown]
# ## 7. A tool: some tokens are chosen, some are forced
#
# Models are bad at sums and computers are good at them. So the model may write a program between
# `<|python_start|>` and `<|python_end|>`. The engine runs it and **forces** the result into the row,
# between `<|output_start|>` and `<|output_end|>`, as if the model had said it. Then the model goes on.
#
# The model of chapter 04 has never seen such a marker; it learns them in chapters 06 and 07. To watch the
# machine we need no learned model. A puppet will do, in which the last token alone decides what may come
# next: a program of digits with + and *, perhaps another, and the end.


# %%
characters = Tokenizer(merges=[])  # every byte a token: easy to look at
V = characters.vocab_size


def id_of(name):
    return characters.special(name) if name.startswith("<|") else characters.encode(name)[0]


START, END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = (
    id_of(f"<|{part}_{edge}|>")
    for part in ("assistant", "python", "output")
    for edge in ("start", "end")
)
print("markers:", START, END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END)


# %%
class Puppet:
    config = ModelConfig(depth=1, aspect=16, head_dim=16, sequence_len=64)

    def __init__(self, follows):
        self.scores_VV = torch.full((V, V), -torch.inf)
        self.scores_VV[:, END] = -30.0  # where nothing else may follow
        for name, nexts in follows.items():
            self.scores_VV[id_of(name), [id_of(next) for next in nexts]] = 0.0

    def logits(self, ids):
        return self.scores_VV[ids]

    def hidden(self, ids_BT, cache=None):
        return ids_BT

    def __call__(self, ids_BT, cache=None):
        return self.scores_VV[ids_BT]


print("what may follow what:", tuple(Puppet({}).scores_VV.shape))

# %%
after_digit = ["+", "*", "<|python_end|>", "<|python_end|>"]
follows = {"<|python_start|>": "123456789", "+": "123456789", "*": "123456789"}
follows |= dict.fromkeys("123456789", after_digit)
follows |= {"<|assistant_start|>": ["=", "<|python_start|>"], "=": ["<|python_start|>"]}
follows |= {"<|output_end|>": [",", "<|assistant_end|>"], ",": ["<|python_start|>"]}
puppet = Puppet(follows)
print("after <|python_start|>, chances of 7 and +:", puppet.scores_VV[PYTHON].softmax(0)[[55, 43]])

# %% [markdown]
# The state of one row is small: the program that is being written, if one is, and the tokens that are
# still to be forced. Here it is in one loop, for one row, with a dart thrown at every step, also where a
# token is forced: so the n-th dart belongs to the n-th token, whatever was forced before.


# %%
def one_row(seed, tool, limit):
    dice, said, forced, source = random.Random(seed_of(seed, "sample", 0)), [START], [], None
    while len(said) <= limit and said[-1] != END:
        p_V = puppet.scores_VV[said[-1]].softmax(dim=-1)
        drawn = draw(p_V, dice.random())
        id = forced.pop(0) if forced else drawn
        said.append(id)
        if id == PYTHON:
            source = []
        elif id == PYTHON_END and source is not None:
            result = characters.encode(tool(characters.decode(source)))
            forced, source = [OUTPUT, *result, OUTPUT_END], None
        elif source is not None:
            source.append(id)
    return [id for id in said[1:] if id != END]


# %%
def calculator(source):
    products = [math.prod(map(int, product.split("*"))) for product in source.split("+")]
    return str(sum(products))


talker = Engine(puppet, characters, cpu, calculator)
settings = {"max_new_tokens": 40, "temperature": 1.0}
steps = list(talker.generate([[START]] * 6, seeds=range(6), **settings))
rows = [
    [t.id for step in steps for t in step if t.row == row and t.kind != "end"] for row in range(6)
]
assert rows == [one_row(seed, calculator, limit=40) for seed in range(6)]
print("six rows of nanolib's engine equal our loop, one by one:")
for ids in rows[:3]:
    print(" ", characters.decode(ids))

# %%
colours = {"chosen": "#dbeafe", "program": "#fde7c8", "forced": "#d3f2df", "end": "#fbd9e0"}
short = {PYTHON: "[py", PYTHON_END: "py]", OUTPUT: "[out", OUTPUT_END: "out]", END: "end"}
print("[py … py]: chosen by the row; [out … out]: forced into it")

# %% [markdown]
# Now watch them together. Each column is a step, in which every row that is not over gets one token. No
# row waits for another: while a result is forced into one, the others write on. A row ends when it says
# so, or at its limit of forty tokens. When half of the rows are over, the engine moves the rest into a
# smaller batch.

# %%
figure, axes = plt.subplots(figsize=(9.2, 2.6))
writes = [False] * 6
for step, tokens in enumerate(steps):
    for row, id, kind in tokens:
        writes[row] = kind == "chosen" and (id == PYTHON or writes[row])
        colour = colours["program" if writes[row] else kind]
        writes[row] = writes[row] and id != PYTHON_END
        axes.barh(row, 1, left=step, color=colour, edgecolor="white")
        name = short.get(id, characters.decode([id]))
        axes.text(step + 0.5, row, name, ha="center", va="center", fontsize=6.5)
axes.set_yticks(range(6))
axes.set(xlabel="step", ylabel="row", title="what each row gets at each step", xlim=(0, len(steps)))
axes.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in colours.values()], colours, ncols=4)
axes.legend_.set(loc="lower right", bbox_to_anchor=(1, 1))
axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## 8. The sandbox
#
# Our calculator knows + and *, and the puppet can write nothing else. A model may write any program, also
# one that never ends or reads your files. What a model wrote runs in nanolib in one place only: a
# `Sandbox`, an interpreter of its own in a process of its own, without files and network, with limits on
# time, memory, recursion and output. Whatever happens in there comes back as text, which the model reads
# like any other result.

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
# A chat shows the answer while it is written. But tokens are bytes (chapter 01), and a character may have
# up to four of them. Who decodes each token by itself shows �. So a stream holds back what is not yet a
# whole character:


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
ours = list(whole_characters(ids))
assert ours == [decoder.decode(characters.token_bytes(id)) for id in ids]
print("each by itself:", [characters.decode([id]) for id in ids])
print("held back:     ", ours)

# %% [markdown]
# ## Exercises
#
# **1.** Without a cache, how many positions does the model compute to write `count` tokens after a prompt
# of `prompt` tokens? (With a cache: prompt + count − 1.)


# %% tags=["exercise"]
def positions_anew(prompt, count):
    return ...


lesson.check(positions_anew, (10, 1, 10), (10, 3, 33), (1000, 1000, 1_499_500))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def positions_anew(prompt, count):
#     return sum(prompt + already for already in range(count))
# ```
#
# </details>
#
# **2.** A GPU has 80 × 10⁹ bytes. How many rows of 2,048 positions can the depth 20 model write at once,
# with weights and caches at two bytes a number? (`accounting.cache_bytes` helps.)

# %% tags=["exercise"]
most_rows = ...

lesson.check(most_rows, 376)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# row = accounting.cache_bytes(d20, rows=1, length=2048)
# most_rows = int((80e9 - 2 * d20.parameters(vocab)) // row)
# ```
#
# The weights take 1.1 GB. The other 99 % are for caches.
#
# </details>
#
# **3.** **Top-p** (nucleus sampling): keep the fewest likeliest tokens whose probabilities add up to at
# least `top_p`, throw the rest away, and scale so that they add up to 1. Lists in, list out, in the given
# order.


# %% tags=["exercise"]
def nucleus(probabilities, top_p):
    return ...


lesson.check(
    nucleus,
    ([0.5, 0.3, 0.2], 0.7, [0.625, 0.375, 0.0]),
    ([0.1, 0.9], 0.5, [0.0, 1.0]),
    ([0.25, 0.5, 0.25], 1.0, [0.25, 0.5, 0.25]),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def nucleus(probabilities, top_p):
#     kept, total = set(), 0.0
#     for id in sorted(range(len(probabilities)), key=lambda id: -probabilities[id]):
#         if total < top_p:
#             kept.add(id)
#             total += probabilities[id]
#     return [p / total if id in kept else 0.0 for id, p in enumerate(probabilities)]
# ```
#
# Top-k keeps as many where the model is sure as where it is not; top-p keeps few where it is sure.
#
# </details>
#
# **4.** Let the puppet write a `/`, and then a 0 after it (`follows`), with `sandbox.run(source).text` as
# the tool, inside `with Sandbox() as sandbox:`. What does a row read when its program divides by zero?
#
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
# In the code: `nanolib/engine.py`, `KVCache` in `nanolib/model.py`, `nanolib/tools.py`,
# `nanolib/accounting.py`. **Next:** 06, between reading and talking.
