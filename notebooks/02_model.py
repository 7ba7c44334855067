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
# # 02 · The model
#
# A language model is a function: it takes the tokens so far and gives a score to every token that
# might come next. This chapter builds that function from nothing, part by part, on tensors small
# enough to print, and holds each part against the one in `nanolib/model.py`.
#
# **You will learn** what a Transformer of today is made of (RMS norm, rotary positions, attention,
# ReLU²), why a model that generates needs a cache, and how one number, the depth, decides the rest.
#
# **Takes** about five minutes to read and ten seconds to run, on any CPU. Nothing is trained here.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close

import lesson
from nanolib import model
from nanolib.config import ModelConfig

run = lesson.begin(profile, run, overrides)

# %% [markdown]
# ## The letters in the names
#
# Shapes are everything here, so names carry them: `x_BTD` has **B** rows, **T** positions in time
# and a width of **D** numbers. Later come **H** heads of **K** numbers each and a vocabulary of
# **V** tokens. A name is read like a type.

# %%
torch.manual_seed(0)
B, T, H, K = 2, 6, 4, 8
D = H * K
x_BTD = torch.randn(B, T, D) * torch.tensor([0.1, 10.0]).view(B, 1, 1)
print("shape", tuple(x_BTD.shape), " sizes of the two rows:", x_BTD.std(dim=(1, 2)).tolist())

# %% [markdown]
# ## 1. RMS norm: every vector gets the same size
#
# The second row's numbers are a hundred times the first's. Left alone, such differences grow with
# each layer until training fails. RMS norm divides each vector by its root mean square. It forgets
# the length and keeps the direction. Ours has no weights to learn.


# %%
def norm(x):
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


assert_close(norm(x_BTD), model.norm(x_BTD))
print("sizes after the norm:", norm(x_BTD).std(dim=(1, 2)).tolist())

# %% [markdown]
# ## 2. Attention: each position gathers from the ones before it
#
# A position asks a **query**. Every earlier position offers a **key** and a **value**. The query is
# compared with all keys, the comparisons become weights that sum to one, and the position takes home
# the weighted mean of the values. Looking ahead is forbidden: at training time the answer stands
# there.


# %%
def attend(query_BTHK, key_BTHK, value_BTHK):
    scores_BHTS = (
        torch.einsum("bthk,bshk->bhts", query_BTHK, key_BTHK) / query_BTHK.shape[-1] ** 0.5
    )
    future_TS = torch.ones(scores_BHTS.shape[-2:]).triu(diagonal=1).bool()
    weights_BHTS = scores_BHTS.masked_fill(future_TS, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshk->bthk", weights_BHTS, value_BTHK)


query, key, value = torch.randn(3, B, T, H, K)
assert_close(attend(query, key, value), model.attend(query, key, value))
print("ours equals nanolib.model.attend; shape", tuple(attend(query, key, value).shape))

# %% [markdown]
# Why divide by √K? A dot product of K random numbers grows like √K, and softmax turns large
# differences into all or nothing. Below: the weights of the last of 24 positions, with and without
# the division. Without it, one position takes nearly everything and the rest gets no gradient.

# %%
scores_S = torch.randn(64) @ torch.randn(64, 24)
figure, (left, right) = plt.subplots(1, 2, sharey=True)
for axes, scale, title in ((left, 1.0, "without"), (right, 64**-0.5, "divided by √64")):
    weights_S = (scores_S * scale).softmax(dim=-1)
    axes.bar(range(24), weights_S.tolist(), color=lesson.BLUE)
    axes.set_title(f"{title}: the largest weight is {weights_S.max():.2f}")
    axes.set_xlabel("position looked at")
left.set_ylabel("weight")
plt.show()

# %% [markdown]
# ## 3. Rotary positions: where a token stands becomes an angle
#
# Attention as written sees a bag of tokens: shuffle them and the weights go along. RoPE turns each
# query and each key by an angle proportional to its position. A dot product depends only on the
# *difference* of two angles, so the model sees distances. Each pair of numbers turns at its own
# speed: fast pairs tell neighbours apart, slow ones tell near from far.
#
# The pairs are `(x[k], x[k + K/2])`, first half with second half. As complex numbers, turning is one
# multiplication:


# %%
def rotate(x_BTHK, positions_T):
    half = x_BTHK.shape[-1] // 2
    speeds_K = 10_000.0 ** -(torch.arange(half) / half)
    turn_TK = torch.polar(torch.ones(len(positions_T), half), -positions_T[:, None] * speeds_K)
    pairs_BTHK = torch.complex(x_BTHK[..., :half], x_BTHK[..., half:])
    turned_BTHK = pairs_BTHK * turn_TK[:, None]
    return torch.cat([turned_BTHK.real, turned_BTHK.imag], dim=-1)


positions_T = torch.arange(T)
assert_close(rotate(query, positions_T), model.rotate(query, model.rotation(positions_T, K)))
assert_close(rotate(query, positions_T).norm(dim=-1), query.norm(dim=-1))
print("ours equals nanolib.model.rotate, and turning changes no length")

# %% [markdown]
# On the left, the angles of a few pairs as the position grows. On the right, the proof that only
# distance counts: one query and one key, placed at many pairs of positions. Along each diagonal, the
# dot product is the same.

# %%
places_T = torch.arange(20)
q_TK, k_TK = (rotate(vector.expand(1, 20, 1, K), places_T)[0, :, 0] for vector in torch.randn(2, K))
dots_TS = q_TK @ k_TK.T
assert_close(dots_TS[5, 2], dots_TS[17, 14], atol=1e-4, rtol=0)
figure, (left, right) = plt.subplots(1, 2)
for pair, speed in enumerate(10_000.0 ** -(torch.arange(4) / 4)):
    left.plot(torch.cos(torch.arange(64) * speed).tolist(), label=f"pair {pair}")
left.set(title="cosine of the angle", xlabel="position")
left.legend(loc="lower right", fontsize=8)
figure.colorbar(lesson.heatmap(right, dots_TS, colours="RdBu"))
right.set(title="query · key", xlabel="the key's position", ylabel="the query's position")
plt.show()

# %% [markdown]
# ## 4. A whole attention layer
#
# Four matrices: three make queries, keys and values, the last mixes what the heads brought back.
# After the rotation, queries and keys are normalised too (**QK-norm**): no comparison can blow up,
# however large the matrices grow.
#
# We take the real layer's weights, so that there is something to compare. Freshly made, its output
# matrix is zero (why? see exercise 2), so here every weight is drawn at random.

# %%
config = ModelConfig(depth=2, aspect=16, head_dim=K, sequence_len=32)
gpt = model.GPT(config, vocab_size=50)
with torch.no_grad():
    for weight in gpt.parameters():
        weight.normal_(std=0.2)
print(f"width {config.width}, {config.heads} heads of {config.head_dim}, {config.depth} blocks")


# %%
def attention_layer(x_BTD, layer, positions_T):
    def heads(linear):
        return (x_BTD @ linear.weight.T).unflatten(-1, (-1, K))

    query = norm(rotate(heads(layer.query), positions_T))
    key = norm(rotate(heads(layer.key), positions_T))
    mixed_BTHK = attend(query, key, heads(layer.value))
    return mixed_BTHK.flatten(2) @ layer.out.weight.T


layer = gpt.blocks[0].attention
real = layer(x_BTD, model.rotation(positions_T[None], K))
assert_close(attention_layer(x_BTD, layer, positions_T), real)
print("ours equals nanolib's layer")

# %% [markdown]
# ## 5. The MLP, and the block
#
# Attention moves things between positions. The MLP works on each position alone: four times wider,
# a nonlinearity, and back. The nonlinearity is ReLU²: negative numbers become zero and the others
# are squared.
#
# A block adds both to a running sum, the **residual stream**. Layers only ever *add* to it, so the
# gradient finds a straight way back to the first.


# %%
def mlp(x_BTD, layer):
    return (x_BTD @ layer.up.weight.T).relu().square() @ layer.down.weight.T


def block(x_BTD, layer, positions_T):
    x_BTD = x_BTD + attention_layer(norm(x_BTD), layer.attention, positions_T)
    return x_BTD + mlp(norm(x_BTD), layer.mlp)


real = gpt.blocks[0](x_BTD, model.rotation(positions_T[None], K))
assert_close(block(x_BTD, gpt.blocks[0], positions_T), real)
print("ours equals nanolib's block")

# %% [markdown]
# ## 6. The whole function
#
# Look the tokens up in a table, run the blocks, compare the result with a vector for each token of
# the vocabulary. The scores are softly capped at ±15, so that no single token can run away.


# %%
def language_model(ids_BT, gpt):
    positions_T = torch.arange(ids_BT.shape[1])
    x_BTD = norm(gpt.embedding.weight[ids_BT])
    for layer in gpt.blocks:
        x_BTD = block(x_BTD, layer, positions_T)
    logits_BTV = norm(x_BTD) @ gpt.head.weight.T
    return 15 * torch.tanh(logits_BTV / 15)


ids_BT = torch.randint(50, (B, 12))
assert_close(language_model(ids_BT, gpt), gpt(ids_BT), atol=1e-4, rtol=1e-4)
print("scores for the next token:", tuple(gpt(ids_BT).shape), "- ours equals nanolib's GPT")

# %% [markdown]
# ## Where does a position look?
#
# The weights of attention can be drawn. Row *t* shows how position *t* spreads its attention; the
# upper right is the future and stays white. These weights are random, so there is nothing to see but
# the triangle. Chapter 04 draws this picture again for a model that has learned something.

# %%
query, key = torch.randn(2, 1, 12, 2, K)
figure, panels = plt.subplots(1, 2, sharey=True, figsize=(7.2, 3))
eye_BTHK = torch.eye(12)[None, :, None].expand(1, 12, 2, 12)  # values that say who they are
for head, axes in enumerate(panels):
    scaled = (query[..., head : head + 1, :], key[..., head : head + 1, :], eye_BTHK[:, :, :1])
    weights_TS = attend(*scaled)[0, :, 0]
    lesson.heatmap(axes, weights_TS, limits=(0, 1))
    axes.set(title=f"head {head}", xlabel="looks at position")
panels[0].set_ylabel("position")
plt.show()
# %% [markdown]
# ## 7. The cache: never compute a key twice
#
# To write, the model is asked for one token after the other. The keys and values of the old tokens
# do not change when a new one comes: nobody looks ahead. So they are kept, and each step computes
# those of one token alone. The cache is only right if it changes nothing:

# %%
cache = model.KVCache(config, B, 12, torch.device("cpu"), torch.float32)
with torch.no_grad():
    one_by_one = []
    for t in range(12):
        one_by_one.append(gpt(ids_BT[:, t : t + 1], cache=cache))
        cache.advance(1)
    all_at_once = gpt(ids_BT)
assert_close(torch.cat(one_by_one, dim=1), all_at_once, atol=1e-4, rtol=1e-4)
print("the cache holds", tuple(cache.keys_LBGSK.shape), "keys: layers, rows, heads, positions, K")

# %% [markdown]
# ## The dial
#
# nanolib has one dial. `depth` decides the width (`aspect` × depth, rounded up to whole heads) and
# with it everything else. A model that is only to be counted needs no memory: on the *meta device*
# tensors have a shape and nothing in them.


# %%
def count(config, vocab_size):
    with torch.device("meta"):
        gpt = model.GPT(config, vocab_size)
    return {name: weight.numel() for name, weight in gpt.named_parameters()}


d20 = ModelConfig(depth=20)  # the size of the October 2025 model
assert sum(count(d20, 65_536).values()) == 560_988_160 == d20.parameters(65_536)
print(f"{'depth':>5} {'width':>6} {'heads':>6} {'parameters':>14}")
for depth in (4, 8, 12, 20, 26, 32):
    size = ModelConfig(depth=depth)
    parameters = sum(count(size, 65_536).values())
    print(f"{depth:>5} {size.width:>6} {size.heads:>6} {parameters:>14,}")

# %%
depths = range(2, 33, 2)
shares = {"embedding": [], "head": [], "attention": [], "mlp": []}
for depth in depths:
    sizes = count(ModelConfig(depth=depth), 65_536)
    for part, share in shares.items():
        part_sizes = [n for name, n in sizes.items() if part in name]
        share.append(100 * sum(part_sizes) / sum(sizes.values()))
figure, axes = plt.subplots()
axes.stackplot(depths, shares.values(), labels=shares, alpha=0.85)
axes.set(
    xlabel="depth", ylabel="% of the parameters", title="what a model spends its parameters on"
)
axes.margins(0)
axes.legend(loc="lower right")
plt.show()
# %% [markdown]
# Small models are mostly vocabulary: the tables grow with the width, the blocks with its square and
# the depth. That is why small profiles take a small vocabulary. And this run's model:

# %%
mine, vocab = run.config.recipe.model, run.config.recipe.tokenizer.vocab_size
sizes = count(mine, vocab)
table = sizes["embedding.weight"] + sizes["head.weight"]
print(f"{sum(sizes.values()):,} parameters, {table / sum(sizes.values()):.0%} of them vocabulary")
assert sum(sizes.values()) == mine.parameters(vocab)

# %% [markdown]
# ## Exercises
#
# **1.** How many bytes does the cache of the depth 20 model take for one row of 2,048 positions, at
# two bytes a number? Keys and values, every layer, every head.

# %% tags=["exercise"]
cache_bytes = ...

lesson.check(cache_bytes, 209_715_200)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Two (keys and values) × 20 layers × 10 heads × 128 numbers × 2,048 positions × 2 bytes:
#
# ```python
# cache_bytes = 2 * d20.depth * d20.num_kv_heads * d20.head_dim * d20.sequence_len * 2
# ```
#
# 210 MB for one conversation: long contexts are paid for in memory. Grouped-query attention
# (`model.kv_heads`) shares each key head among several query heads and divides this number.
#
# </details>
#
# **2.** A new model's head and both output matrices (`attention.out`, `mlp.down`) are zero. What is
# the loss, in nats, of a new model with a vocabulary of V on its first batch? Write it as a function
# of V.


# %% tags=["exercise"]
def first_loss(V):
    return ...


lesson.check(first_loss, (50, 3.912023), (65_536, 11.090355))

# %% [markdown]
# <details><summary>Solution</summary>
#
# All scores are zero, so every token has the probability 1/V and the loss is −log(1/V):
#
# ```python
# def first_loss(V):
#     return torch.tensor(float(V)).log()
# ```
#
# Zero output matrices make every block the identity at first: the residual stream passes unchanged
# and each layer learns what to add. A first loss that is not log V is a bug. Chapter 04 checks it.
#
# </details>
#
# **3.** Grouped-query attention: with H query heads and G key heads (G divides H), query head *h*
# reads key head *h // (H / G)*. Give the list of key heads that the query heads read.


# %% tags=["exercise"]
def key_heads(H, G):
    return ...


lesson.check(key_heads, (4, 4, [0, 1, 2, 3]), (4, 2, [0, 0, 1, 1]), (6, 1, [0] * 6))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def key_heads(H, G):
#     return [h // (H // G) for h in range(H)]
# ```
#
# </details>
#
# ## To read
#
# - Vaswani et al., *Attention Is All You Need*, [arXiv:1706.03762](https://arxiv.org/abs/1706.03762)
# - Su et al., *RoFormer* (rotary positions), [arXiv:2104.09864](https://arxiv.org/abs/2104.09864)
# - Zhang & Sennrich, *Root Mean Square Layer Normalization*,
#   [arXiv:1910.07467](https://arxiv.org/abs/1910.07467)
# - Henry et al., *Query-Key Normalization for Transformers*,
#   [arXiv:2010.04245](https://arxiv.org/abs/2010.04245)
# - So et al., *Primer* (ReLU²), [arXiv:2109.08668](https://arxiv.org/abs/2109.08668)
# - Ainslie et al., *GQA*, [arXiv:2305.13245](https://arxiv.org/abs/2305.13245)
#
# In the code: `nanolib/model.py`. **Next:** 03, how a gradient becomes a step.
