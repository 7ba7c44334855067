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
# [▶ Open this chapter in Colab](https://colab.research.google.com/github/OWNER/nanolib/blob/main/notebooks/02_model.ipynb): nothing to install on your machine.

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
# # 02 · The model
#
# A language model is a function. It takes the tokens so far and gives a score to every token that
# might come next. What is inside that function, and why that and not something simpler?
#
# **You will learn**
# - how five words look at each other, in numbers small enough to print;
# - what each part of a Transformer is for, by writing three of them and breaking the rest;
# - why one number, the depth, decides the size of all of it.
#
# **You need** [chapter 01](01_tokenizer.ipynb), which turns text into numbers;
# products of matrices, and what sine and cosine do;
# no run: nothing is taken from earlier stages. The [glossary](glossary.ipynb) has every term.
#
# **Takes** 40 minutes to read and run, 50 more with the exercises; any CPU.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import checks
import lesson
from nanolib import model, optim
from nanolib.config import REPOSITORY, ModelConfig, OptimConfig
from nanolib.runtime import Runtime

run = lesson.begin(profile, run, overrides)
torch.set_printoptions(precision=2, sci_mode=False)

# %% [markdown]
# ## Five words
#
# Chapter 01 ended with text as a list of ids. We take five words through this whole chapter, and
# pretend that each is one [token](glossary.ipynb#token).

# %%
words = ["Ada", " fed", " her", " owl", " again"]
ids_T = torch.arange(5)
lesson.tokens(words, numbers=ids_T.tolist())

# %% [markdown]
# Here is the road that these ids will travel, from bottom to top. In the middle runs the
# [residual stream](glossary.ipynb#residual-stream): one vector for each word. Attention and the MLP
# are side trips. They read the stream and *add* something to it. We build the boxes one after the
# other, and the one at hand lights up.

# %%
lesson.stream("embedding")

# %% [markdown]
# ## 1. A word becomes a vector
#
# The [embedding](glossary.ipynb#embedding) is a table with a row of numbers for each token of the
# vocabulary. In a real model the rows are learned. Ours has two numbers a row, set by hand so that we
# can read them: how much of a *person* the word is, and how much of something *done*.
#
# Shapes are everything from here on, so names carry them. **T** is the number of positions, **D** the
# width of a vector, **V** the size of the vocabulary. Later come **B** rows at once and **H** heads of
# **K** numbers each. `x_TD` reads like a type: T vectors of D numbers.


# %%
def table(numbers, columns):
    """Print a row of numbers for each of the five words."""
    print(" " * 9 + "".join(f"{name.strip():>8}" for name in columns))
    for word, row in zip(words, numbers.tolist(), strict=True):
        print(f"{word.strip():>9}" + "".join(f"{number:8.2f}" for number in row))


embedding_VD = torch.tensor([[2.0, 0.2], [0.4, 2.0], [1.0, -0.2], [0.4, -0.8], [-0.3, 0.6]])
x_TD = embedding_VD[ids_T]
one_hot_TV = F.one_hot(ids_T, 5).float()
assert_close(one_hot_TV @ embedding_VD, x_TD)
table(x_TD, ["person", "done"])

# %% [markdown]
# The assert says the same thing in another way: looking up row 3 is multiplying the table by a vector
# that is 1 at place 3 and 0 elsewhere. Chapter 03 will need that.

# %% [markdown]
# ## 2. The norm: every vector gets the same size

# %%
lesson.stream("norm")

# %% [markdown]
# The five vectors have different lengths. In a deep model such differences grow from layer to layer,
# and section 9 shows what comes of it. The [RMS norm](glossary.ipynb#rms-norm) divides a vector by its
# *root mean square*: square the numbers, take their mean, take the root. Ours has no weights to learn.
#
# **Exercise 2.1 ★ · 3 minutes · build** RMS norm.
# Add 1e-6 to the mean before you take the root, so that a vector of zeros survives. The vectors lie
# along the last axis; there may be any number of axes before it. What happens to a vector's direction?


# %% tags=["exercise"]
def norm(x):
    """x [..., D] -> the same shape: each vector divided by its root mean square."""
    ...


checks.verify("2.1", norm)

# %% [markdown]
# <details><summary>Hint 1</summary>Which axis does the mean run along, and does that axis have to stay
# for the division to line up?</details>
# <details><summary>Hint 2</summary><code>x.square().mean(-1, keepdim=True)</code> has one number for
# each vector.</details>
# <details><summary>Solution</summary>
#
# ```python
# def norm(x):
#     return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
# ```
#
# The direction stays: all numbers of a vector are divided by the same one. Only the length is
# forgotten.
#
# </details>


# %% tags=["solution-twin"]
def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


# %%
anything = torch.randn(3, 1, 7) * 100
assert_close(norm(anything), model.norm(anything))
table(norm(x_TD), ["person", "done"])


# %%
def arrows(axes, vectors, title, **look):
    """Draw each word's vector from the origin, with the word at its tip."""
    for word, (right, up) in zip(words, vectors.tolist(), strict=True):
        axes.annotate("", (right, up), (0, 0), arrowprops={"arrowstyle": "->", "lw": 1.6} | look)
        axes.text(
            right * 1.12, up * 1.12, word.strip(), ha="center", va="bottom" if up > 0 else "top"
        )
    axes.set(xlim=(-1.7, 2.7), ylim=(-1.9, 2.7), title=title, xlabel="person", aspect="equal")


figure, panels = plt.subplots(1, 2, sharey=True, figsize=(6.4, 3.3))
arrows(panels[0], x_TD, "as they come from the table", color=lesson.BLUE)
arrows(panels[1], norm(x_TD), "after the norm", color=lesson.BLUE)
panels[1].add_patch(plt.Circle((0, 0), 2**0.5, fill=False, ls=":", ec="#4a5568"))
panels[0].set_ylabel("done")
lesson.show("Five arrows of different lengths; after the norm all five end on one circle")

# %% [markdown]
# ## 3. Attention: words look at words

# %%
lesson.stream("attention")

# %% [markdown]
# So far each word knows only itself. "her" cannot know that it stands for Ada. In
# [attention](glossary.ipynb#attention) each position says three things, each a vector:
#
# - a [query](glossary.ipynb#query): what am I looking for?
# - a [key](glossary.ipynb#key): what can I be found by?
# - a [value](glossary.ipynb#value): what do I hand over if you look at me?
#
# In a real model three matrices make them from the normalised stream. Here they are set by hand. "her"
# and "fed" look for a person; "owl" and "again" look for what was done; "Ada" is content with herself.

# %%
query_TK = torch.tensor([[2.0, 0.0], [1.0, 0.5], [2.0, 0.0], [0.0, 3.0], [0.0, 1.5]])
key_TK = torch.tensor([[2.0, 0.3], [0.3, 2.0], [1.0, -0.4], [-0.6, -0.6], [-0.3, 1.0]])
value_TK = torch.tensor([[3.0, 0.0], [0.0, 3.0], [1.0, -1.0], [-2.0, 0.0], [0.0, -2.0]])
scores_TS = query_TK @ key_TK.T / 2**0.5
print("scores: each row is a word's query times every word's key")
table(scores_TS, words)

# %% [markdown]
# A **score** is a dot product: large where query and key point the same way. (The division by √2 is
# explained below.) Row "fed" likes "Ada" best, and "her" has a score as well. But "her" comes *later*.
#
# The model is trained to predict the next word, and in training the whole text lies before it. If
# "fed" may look at "her", the answer is on the table. So the future is hidden by a
# [causal mask](glossary.ipynb#causal-mask): scores above the
# diagonal become −∞. Then [softmax](glossary.ipynb#softmax) turns each row into weights: e to the
# power of each score, divided by the row's sum.
#
# Before you run it: which weights does the first row have, whatever its scores are?

# %%
future_TS = torch.ones(5, 5).triu(diagonal=1).bool()
masked_TS = scores_TS.masked_fill(future_TS, -torch.inf)
weights_TS = masked_TS.softmax(dim=-1)
assert_close(weights_TS.sum(dim=-1), torch.ones(5))
print("weights: each row adds up to 1")
table(weights_TS, words)


# %%
def numbered(axes, numbers_TS, title, **settings):
    """A heat map with its numbers written in."""
    lesson.heatmap(axes, numbers_TS, rows=words, columns=words, **settings)
    for t, s in torch.cartesian_prod(ids_T, ids_T).tolist():
        text = f"{numbers_TS[t, s]:.1f}" if numbers_TS[t, s].isfinite() else "−∞"
        axes.text(s, t, text, ha="center", va="center", fontsize=9)
    axes.set(title=title, xlabel="looks at")


figure, panels = plt.subplots(1, 3, sharey=True, figsize=(7.6, 2.8))
numbered(panels[0], scores_TS, "scores", limits=(0, 10), colours="Greens")
numbered(panels[1], masked_TS, "the future masked", limits=(0, 10), colours="Greens")
numbered(panels[2], weights_TS, "weights after softmax", limits=(0, 1.6))
lesson.show(
    "Three five-by-five tables: scores; scores with minus infinity above the diagonal; weights, a "
    "lower triangle in which her looks at Ada, owl at fed, and Ada only at herself"
)

# %% [markdown]
# The first row has a single 1: Ada can look at nobody else. "her" has found Ada, "owl" has found
# "fed". What each brings home is the weighted mean of the values, `weights_TS @ value_TK`. That mean is
# the whole of what attention does: it *moves* vectors from earlier positions to later ones.

# %%
mixed_TK = weights_TS @ value_TK
table(mixed_TK, ["value 1", "value 2"])
figure, axes = plt.subplots(figsize=(5.6, 3))
axes.scatter(*value_TK.T, marker="o", color=lesson.BLUE, label="values")
axes.scatter(*mixed_TK.T, marker="*", s=90, color=lesson.ORANGE, label="what is brought home")
for word, (x, y), (a, b) in zip(words, mixed_TK.tolist(), value_TK.tolist(), strict=True):
    axes.text(a + 0.15, b + 0.2, word.strip(), color=lesson.BLUE)
    axes.text(x + 0.15, y - 0.6, word.strip(), color="#9c4221")
axes.set(xlabel="first number", ylabel="second number", xlim=(-2.5, 4), ylim=(-2.7, 4))
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
lesson.show(
    "Five values as dots and the mixture each word brings home as stars, all stars within the "
    "triangle of the dots; the star of her lies near the value of Ada, that of owl near fed"
)

# %% [markdown]
# ## 4. Why several heads
#
# "again" would like to know two things: *who*, and *what was done*. Let its query ask for both at once.
# It finds Ada and "fed", half and half, and brings home the mean of their values. Now let Ada and "fed"
# hand over each other's value. Before you run it: what does "again" notice?


# %%
def look(query_K, key_TK, value_TK):
    """What one query that may see all five words brings home."""
    return (key_TK @ query_K / 2**0.5).softmax(dim=0) @ value_TK


swapped_TK = value_TK[[1, 0, 2, 3, 4]]
both, who, what = torch.tensor([[8.0, 8.0], [8.0, 0.0], [0.0, 8.0]])
print("one head:  ", look(both, key_TK, value_TK), "swapped", look(both, key_TK, swapped_TK))
two, two_swapped = (
    torch.cat([look(q, key_TK, v) for q in (who, what)]) for v in (value_TK, swapped_TK)
)
print("two heads: ", two, "swapped", two_swapped)
assert_close(look(both, key_TK, value_TK), look(both, key_TK, swapped_TK))
assert (two - two_swapped).abs().max() > 2

# %% [markdown]
# Nothing. "Ada fed" and "fed Ada" give the same mean: one head has *one* set of weights, and a mean
# forgets who said what. Two [heads](glossary.ipynb#head) ask two questions, and their answers are laid
# side by side, so they stay apart. That is why D numbers are split among H heads of K numbers each.
# A last matrix then mixes what the heads brought.

# %% [markdown]
# ## 5. Why divide by √K
#
# A dot product of K random numbers of size 1 has a typical size of √K: 8 for K = 64. Softmax turns
# differences of 8 into all or nothing, whatever the words mean. Below: 24 random keys with K = 64, without
# the division and with it. Without it, one position takes nearly everything, and the others get hardly any gradient.

# %%
torch.manual_seed(0)
scores_NS = torch.randn(200, 1, 64) @ torch.randn(200, 64, 24)  # 200 queries, 24 keys each
figure, panels = plt.subplots(1, 2, sharey=True, figsize=(7.2, 2.4))
largest = []
for axes, scale, title in zip(
    panels, (1, 64**-0.5), ("not divided", "divided by √64"), strict=True
):
    weights_NS = (scores_NS[:, 0] * scale).softmax(dim=-1)
    largest.append(weights_NS.max(dim=-1).values.mean())
    axes.bar(range(24), weights_NS[0].tolist(), color=lesson.BLUE)
    axes.set(title=title, xlabel="position looked at", ylim=(0, 1))
panels[0].set_ylabel("weight")
lesson.show("Without division one bar of 24 holds most of the weight; with it all 24 have a share")
print(f"the largest of 24 weights, mean of 200: {largest[0]:.2f} and {largest[1]:.2f}")
assert largest[0] > 3 * largest[1]

# %% [markdown]
# **Exercise 2.2 ★★ · 15 minutes · build** Attention, for B rows and H heads at once.
# Use `torch.einsum` or transpose and `@`: the letters in the names tell you how. S counts the positions
# looked at; here it equals T. What would a test have to do that no table of right numbers does, to be
# sure that nobody sees the future?


# %% tags=["exercise"]
def attend(query_BTHK, key_BSHK, value_BSHK):
    """Causal softmax attention, head by head -> [B, T, H, K]."""
    ...


checks.verify("2.2", attend)

# %% [markdown]
# <details><summary>Hint 1</summary>The scores have the shape B, H, T, S. Which letter of the query and
# the key disappears in them? Which of the others do they share?</details>
# <details><summary>Hint 2</summary><code>torch.einsum("bthk,bshk->bhts", query_BTHK, key_BSHK)</code>,
# then the three lines that you saw with five words.</details>
# <details><summary>Solution</summary>
#
# ```python
# def attend(query_BTHK, key_BSHK, value_BSHK):
#     scores_BHTS = torch.einsum("bthk,bshk->bhts", query_BTHK, key_BSHK)
#     scores_BHTS = scores_BHTS / query_BTHK.shape[-1] ** 0.5
#     future_TS = torch.ones(scores_BHTS.shape[-2:]).triu(diagonal=1).bool()
#     weights_BHTS = scores_BHTS.masked_fill(future_TS, -torch.inf).softmax(dim=-1)
#     return torch.einsum("bhts,bshk->bthk", weights_BHTS, value_BSHK)
# ```
#
# A test of the mask changes a word and looks at the positions before it: not one number may move. The
# next cells do it.
#
# </details>


# %% tags=["solution-twin"]
def attend(query_BTHK, key_BSHK, value_BSHK, causal=True):
    scores_BHTS = torch.einsum("bthk,bshk->bhts", query_BTHK, key_BSHK)
    scores_BHTS = scores_BHTS / query_BTHK.shape[-1] ** 0.5
    if causal:
        future_TS = torch.ones(scores_BHTS.shape[-2:]).triu(diagonal=1).bool()
        scores_BHTS = scores_BHTS.masked_fill(future_TS, -torch.inf)
    return torch.einsum("bhts,bshk->bthk", scores_BHTS.softmax(dim=-1), value_BSHK)


# %%
B, T, H, K = 2, 7, 3, 8
query, key, value = torch.randn(3, B, T, H, K)
assert_close(attend(query, key, value), model.attend(query, key, value))
five = (x[None, :, None] for x in (query_TK, key_TK, value_TK))  # one row, one head
assert_close(attend(*five)[0, :, 0], mixed_TK)
print("ours equals nanolib.model.attend, and the table of the five words")

# %% [markdown]
# **Break it.** Change the last position's key and value, and see which outputs move: with the mask,
# and without.

# %%
changed_key, changed_value = key.clone(), value.clone()
changed_key[:, -1], changed_value[:, -1] = 1.0, 5.0
for causal in (True, False):
    before = attend(query, key, value, causal)
    after = attend(query, changed_key, changed_value, causal)
    moved = (after - before).abs().amax(dim=(0, 2, 3)) > 1e-6
    print(f"causal={causal!s:5} positions that changed: {moved.nonzero().flatten().tolist()}")
    assert bool(moved[:-1].any()) is not causal

# %% [markdown]
# ## 6. Rotary positions: an angle for every place

# %%
lesson.stream("rotary")

# %% [markdown]
# Does attention know the *order* of the words? Without a mask it does not: shuffle the words and the
# outputs are shuffled with them. With the causal mask it is often said to be blind as well. Is it? The
# last word sees all the others. We shuffle those, and look at what the last word brings home: after one
# layer of attention, and after two.


# %%
def layers_without_positions(x_BTD, count):
    heads_BTHK = x_BTD.unflatten(-1, (H, K))
    for _ in range(count):
        heads_BTHK = heads_BTHK + attend(heads_BTHK, heads_BTHK, heads_BTHK)
    return heads_BTHK.flatten(2)


x_BTD = torch.randn(1, 6, H * K)
shuffled_BTD = x_BTD[:, [3, 1, 0, 4, 2, 5]]  # the last word stays where it is
for count in (1, 2):
    one, other = (layers_without_positions(x, count)[:, -1] for x in (x_BTD, shuffled_BTD))
    print(
        f"{count} layer{'s'[: count - 1]}: the last word's vector moves by {(one - other).norm():.4f}"
    )
    assert torch.allclose(one, other, atol=1e-5) is (count == 1)

# %% [markdown]
# One causal layer is blind to order: a mean does not care. Two are not. In the second layer each word
# has seen a *different number* of others, and that gives its place away. So a causal model can find out
# where it is ([Haviv et al.](https://arxiv.org/abs/2203.16634) trained models on nothing else). But it
# has to spend layers on it. It would be better if each layer could read distances directly.
#
# [RoPE](glossary.ipynb#rope) does that. Take two numbers of a query as the hand of a clock, and turn it by an
# angle proportional to its position. Do the same with the key. The dot product of two hands depends on
# the *angle between* them, and that depends on the distance alone. Move both words along: the hands
# turn, the angle stays.


# %%
def clock(axes, position, distance=2, speed=0.7):
    hands = {"q": (position, 0.95, "-"), "k": (position - distance, 0.7, "--")}
    axes.add_patch(plt.Circle((0, 0), 1, fill=False, ec="#4a5568"))
    colours = (lesson.BLUE, lesson.ORANGE)
    for (name, (place, length, style)), colour in zip(hands.items(), colours, strict=True):
        hand = torch.polar(torch.tensor(length), torch.tensor(1.57 - speed * place))
        axes.plot([0, hand.real], [0, hand.imag], style, color=colour, lw=2.5)
        axes.text(1.25 * hand.real, 1.25 * hand.imag, name, ha="center", va="center")
    axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
    axes.axis("off")


alt = """Clocks with two hands, a solid one for the query and a dashed one for the key two places
earlier: both turn as they move along the text, the angle between them stays"""
lesson.frames(clock, [2, 3, 5, 8, 13, 21], label="query at", alt=alt)

# %% [markdown]
# One clock is not enough: after a full turn, a distance looks like another. So every pair of numbers is
# a clock with a speed of its own. Pair *i* of K/2 turns by $10000^{-2i/K}$ a position: fast hands tell
# neighbours apart, slow hands tell near from far. The pairs are `(x[i], x[i + K/2])`, first half with
# second half, and we turn *clockwise*: by minus the angle.
#
# **Exercise 2.3 ★★ · 15 minutes · build** Turn the hands.
# To turn a pair (a, b) by minus θ: (a cos θ + b sin θ, b cos θ − a sin θ). What must stay the same for
# every vector, whatever its position? And which position changes nothing at all?


# %% tags=["exercise"]
def rotate(x_BTHK, positions_T):
    """Turn pair (x[i], x[i + K/2]) by minus position · 10000 ** (-2 i / K) -> [B, T, H, K]."""
    ...


checks.verify("2.3", rotate)

# %% [markdown]
# <details><summary>Hint 1</summary>You need one angle for each position and each pair. Which shape must
# it have to line up with B, T, H, K/2?</details>
# <details><summary>Hint 2</summary><code>angles = positions_T[:, None, None] * speeds</code> has the
# shape T, 1, K/2. <code>x_BTHK.chunk(2, dim=-1)</code> gives both halves.</details>
# <details><summary>Solution</summary>
#
# ```python
# def rotate(x_BTHK, positions_T):
#     K = x_BTHK.shape[-1]
#     speeds = 10_000.0 ** (-torch.arange(0, K, 2) / K)
#     angles = positions_T[:, None, None] * speeds
#     a, b = x_BTHK.chunk(2, dim=-1)
#     turned = (a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin())
#     return torch.cat(turned, dim=-1)
# ```
#
# Turning changes no length, and position 0 is not turned.
#
# </details>


# %% tags=["solution-twin"]
def rotate(x_BTHK, positions_T):
    K = x_BTHK.shape[-1]
    speeds = 10_000.0 ** (-torch.arange(0, K, 2) / K)
    angles = positions_T[:, None, None] * speeds
    a, b = x_BTHK.chunk(2, dim=-1)
    turned = (a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin())
    return torch.cat(turned, dim=-1)


# %%
places_T = torch.arange(T)
assert_close(rotate(query, places_T), model.rotate(query, model.rotation(places_T, K)))
assert_close(rotate(query, places_T).norm(dim=-1), query.norm(dim=-1))
print("ours equals nanolib.model.rotate; no length has changed")

# %% [markdown]
# The proof that only the distance counts: one query and one key, put at every pair of 20 positions. All
# dot products along a diagonal are the same.

# %%
places_T = torch.arange(20)
q_TK, k_TK = (rotate(vector.expand(1, 20, 1, K), places_T)[0, :, 0] for vector in torch.randn(2, K))
dots_TS = q_TK @ k_TK.T
assert_close(dots_TS[5, 2], dots_TS[17, 14], atol=1e-4, rtol=0)
figure, (left, right) = plt.subplots(1, 2)
for pair, style in enumerate(("-", "--", "-.", ":")):
    angle_T = torch.arange(40) * 10_000.0 ** (-2 * pair / K)
    left.plot(angle_T.cos().tolist(), style, label=f"pair {pair}")
left.set(title="four clocks: cosine of the angle", xlabel="position")
left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4, handlelength=1.6)
figure.colorbar(lesson.heatmap(right, dots_TS))
right.set(title="query · key", xlabel="the key's position", ylabel="the query's position")
lesson.show("Left: four cosines, each slower than the last. Right: a table striped along diagonals")

# %% [markdown]
# Cosines cost time, and the angles never change. So nanolib computes the tables once, for every position
# that the context can have, and all layers and all steps read from the same two tables.

# %%
cos, sin = model.rotation(torch.arange(32), K)
again = rotate(query[:, :4], torch.tensor([9, 10, 11, 12]))
assert_close(model.rotate(query[:, :4], (cos[9:13], sin[9:13])), again)
used = run.config.recipe.model
numbers = 2 * used.sequence_len * used.head_dim // 2
print(f"this run's tables: {numbers:,} numbers, read {2 * used.depth} times in a forward pass")

# %% [markdown]
# ## 7. A whole attention layer
#
# Four matrices: three make queries, keys and values from the stream, the last mixes what the heads
# brought home. One more norm: after the rotation, queries and keys are normalised too
# ([QK-norm](glossary.ipynb#qk-norm)). So a score can never exceed √K, however large the matrices grow.
#
# We take a real model and draw all its weights at random, so that there is something to compare.
# (Freshly made, its output matrices are zero. Exercise 2.4 asks what that does.)

# %%
config = ModelConfig(depth=2, aspect=16, head_dim=8, sequence_len=32)
gpt = model.GPT(config, vocab_size=50)
with torch.no_grad():
    for weight in gpt.parameters():
        weight.normal_(std=0.2)
K = config.head_dim
print(f"width {config.width}, {config.heads} heads of {K}, {config.depth} blocks")


# %%
def attention(x_BTD, layer, turn=rotate):
    def heads(linear):
        return (x_BTD @ linear.weight.T).unflatten(-1, (-1, K))

    places_T = torch.arange(x_BTD.shape[1])
    query = norm(turn(heads(layer.query), places_T))
    key = norm(turn(heads(layer.key), places_T))
    return attend(query, key, heads(layer.value)).flatten(2) @ layer.out.weight.T


x_BTD = torch.randn(B, T, config.width)
cos_sin = model.rotation(torch.arange(T)[None], K)
assert_close(attention(x_BTD, gpt.blocks[0].attention), gpt.blocks[0].attention(x_BTD, cos_sin))
print("ours equals nanolib's attention layer")

# %% [markdown]
# ## 8. The MLP: each word thinks for itself

# %%
lesson.stream("mlp")

# %% [markdown]
# Attention moves vectors about and averages them. The [MLP](glossary.ipynb#mlp) works on each position
# alone: a matrix to four times the width, a bend, and a matrix back. Each of the 4·D numbers in the
# middle is a detector: its row of the first matrix is what it looks for, its column of the second is
# what it adds to the stream when it has found it.
#
# Without the bend, two matrices in a row are one matrix, and nothing is gained. The classical bend is
# ReLU: negative numbers become 0. Ours is **ReLU²**: they become 0, and the others are *squared*. A clear
# match counts far more than a vague one, most detectors are silent, and the slope has no jump at 0. It
# costs next to nothing to compute.


# %%
def relu_squared(x):
    return x.relu().square()


def mlp(x_BTD, layer, bend=relu_squared):
    return bend(x_BTD @ layer.up.weight.T) @ layer.down.weight.T


assert_close(mlp(x_BTD, gpt.blocks[0].mlp), gpt.blocks[0].mlp(x_BTD))
match = torch.linspace(-2, 2, 81)
figure, axes = plt.subplots(figsize=(4.6, 2.4))
axes.plot(match, match.relu(), "--", color=lesson.ORANGE, label="ReLU")
axes.plot(match, relu_squared(match), "-", color=lesson.BLUE, label="ReLU²")
axes.set(xlabel="how well a detector matches", ylabel="what it says")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
lesson.show("ReLU is flat and then a straight line; ReLU squared is flat and then a parabola")

# %% [markdown]
# ## 9. The road itself: add, never replace

# %%
lesson.stream("add")

# %% [markdown]
# A block is two side trips: `x + attention(norm(x))`, then `x + mlp(norm(x))`. What a layer has found
# is *added* to the stream, and what was there stays. So the gradient finds a straight way back from the
# last layer to the embedding: the derivative of x + f(x) always contains a 1.
#
# Note where the norm stands: on the side trip, before the layer ([pre-norm](glossary.ipynb#pre-norm)). The road is never
# touched. The first Transformer had it *on* the road, after the addition (**post-norm**).


# %%
def block(x_BTD, layer, turn=rotate, bend=relu_squared):
    x_BTD = x_BTD + attention(norm(x_BTD), layer.attention, turn)
    return x_BTD + mlp(norm(x_BTD), layer.mlp, bend)


def post_norm(x_BTD, layer):
    x_BTD = norm(x_BTD + attention(x_BTD, layer.attention))
    return norm(x_BTD + mlp(x_BTD, layer.mlp))


def no_norm(x_BTD, layer):
    x_BTD = x_BTD + attention(x_BTD, layer.attention)
    return x_BTD + mlp(x_BTD, layer.mlp)


assert_close(block(x_BTD, gpt.blocks[0]), gpt.blocks[0](x_BTD, cos_sin))
print("ours equals nanolib's block")

# %% [markdown]
# **Break it.** Send random vectors through 24 blocks with random weights, built in these three ways, and
# measure two things on the way up: the size of the stream, and how much of what entered is still there
# (the cosine of the angle to the first vector). Before you run it: which of the three blows up, and
# which one forgets?

# %%
deep = model.GPT(ModelConfig(depth=24, aspect=2, head_dim=8, sequence_len=32), vocab_size=50)
with torch.no_grad():
    for weight in deep.parameters():
        weight.normal_(std=weight.shape[1] ** -0.5)
seen = {}
for name, way in {"pre-norm": block, "post-norm": post_norm, "no norm": no_norm}.items():
    x = first = norm(torch.randn(8, T, deep.config.width))
    seen[name] = [(1.0, 1.0)]
    for layer in deep.blocks:
        x = way(x, layer).detach()
        likeness = F.cosine_similarity(x, first, dim=-1).mean()
        seen[name].append((float(x.square().mean().sqrt()), float(likeness)))
    print(f"{name:10} size after 4 blocks {seen[name][4][0]:.3g}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.8))
for (name, path), style in zip(seen.items(), ("-o", "--s", ":^"), strict=True):
    sizes, kept = zip(*path, strict=True)
    left.plot(sizes, style, markersize=4)
    right.plot(kept, style, markersize=4, label=name)
left.set(title="size of the stream", xlabel="block", yscale="log", ylim=(0.5, 1e6))
right.set(title="likeness to what entered", xlabel="block", ylim=(-0.2, 1.05))
right.legend(loc="upper left", bbox_to_anchor=(1, 1))
lesson.show(
    "Left: without a norm the stream grows beyond every bound within a few blocks, with pre-norm slowly, "
    "with post-norm not at all. Right: post-norm soon forgets what entered, pre-norm keeps a part of it"
)

# %% [markdown]
# Without a norm the stream blows up, until its numbers leave the range of a float and its line ends. Post-norm
# holds the size and forgets: after a few blocks nothing of what entered is left. Pre-norm grows slowly, and a
# part of the first vector is still there at the top.
#
# ## 10. The whole function

# %%
lesson.stream("head")

# %% [markdown]
# Look the tokens up, normalise, run the blocks, normalise again, and compare the result with a vector
# for every token of the vocabulary (the [head](glossary.ipynb#head)). The scores are called
# [logits](glossary.ipynb#logits). They are softly [capped](glossary.ipynb#softcap) at ±15, so that no token can run away.


# %%
def language_model(ids_BT, gpt, block=block, first=norm):
    x_BTD = first(gpt.embedding.weight[ids_BT])
    for layer in gpt.blocks:
        x_BTD = block(x_BTD, layer)
    logits_BTV = norm(x_BTD) @ gpt.head.weight.T
    return 15 * torch.tanh(logits_BTV / 15)


ids_BT = ids_T[None]
logits_BTV = language_model(ids_BT, gpt).detach()
assert_close(logits_BTV, gpt(ids_BT).detach(), atol=1e-4, rtol=1e-4)
print("ours equals nanolib's GPT. After 'again' it gives our five words the scores")
print({word.strip(): round(float(logits_BTV[0, -1, i]), 1) for i, word in enumerate(words)})

# %% [markdown]
# **Exercise 2.4 ★ · 4 minutes · predict** The first loss.
# In a new model the head and both output matrices of each block are zero. The loss is minus the
# (natural) logarithm of the probability that the model gives to the right token. What is it on the very
# first batch, with a vocabulary of 1,024? Work it out before you compute anything.

# %% tags=["exercise"]
first_loss = ...

checks.verify("2.4", first_loss)

# %% [markdown]
# <details><summary>Hint 1</summary>The head is zero. Which scores does it give, to anything?</details>
# <details><summary>Hint 2</summary>1,024 equal scores become 1,024 equal probabilities.</details>
# <details><summary>Solution</summary>
#
# ```python
# import math
#
# first_loss = math.log(1024)
# ```
#
# All scores are zero, every token has the probability 1/V, and the loss is log V. Zero output matrices
# also make each block the identity at first: the road is straight, and each layer learns what to add. A
# first loss that is not log V is a bug, and a very common one. Chapter 04 checks it.
#
# </details>

# %% [markdown]
# ## 11. Break each part
#
# What is each part worth? Take it out and train. The text is nanolib's own source code, a token is a byte,
# the model is a toy, and there are three seeds for every variant. The optimizer is chapter 03's subject.
#
# Predict first. Which loss is hurt most, and which not at all? Write down an order of these: no attention,
# no RoPE, no bend in the MLP, ReLU for ReLU², no residual road, no norm after the embedding, post-norm,
# no norm at all.

# %%
source = b"".join(path.read_bytes() for path in sorted((REPOSITORY / "nanolib").glob("*.py")))
text = torch.tensor([byte for byte in source if byte < 128])
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)
K = 16
print(f"{len(text):,} bytes; they begin:", repr(source[:60].decode()))


# %% tags=["loop"]
def train(seed, depth=4, steps=50, **parts):
    """Train a toy of width 32 on 8 x 48 bytes a step -> mean loss of the last ten steps."""
    size = ModelConfig(depth=depth, aspect=32 // depth, head_dim=K, sequence_len=48)
    gpt = model.GPT.build(size, 128, cpu.device, seed)
    optimizer, losses = optim.MuonAdamW(gpt, OptimConfig(), cpu), []
    dice = torch.Generator().manual_seed(seed)
    for step in range(steps):
        starts = torch.randint(len(text) - 49, (8, 1), generator=dice)
        rows = text[starts + torch.arange(49)]
        logits = language_model(rows[:, :-1], gpt, **parts)
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(lr_scale=min(1.0, (steps - step) / (0.4 * steps)))
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


# %%
def no_attention(x_BTD, layer):
    return x_BTD + mlp(norm(x_BTD), layer.mlp)


def no_road(x_BTD, layer):
    return mlp(norm(attention(norm(x_BTD), layer.attention)), layer.mlp)


variants = {
    "whole": {},
    "ReLU for ReLU²": {"block": partial(block, bend=F.relu)},
    "no bend": {"block": partial(block, bend=lambda x: x)},
    "no RoPE": {"block": partial(block, turn=lambda x, places: x)},
    "no attention": {"block": no_attention},
    "no norm after embedding": {"first": lambda x: x},
    "post-norm": {"block": post_norm},
    "no norm in blocks": {"block": no_norm},
    "no road": {"block": no_road},
}
print(len(variants), "models, each to be trained from seeds 1, 2 and 3")

# %%
steps = 50 if profile != "smoke" else 3  # tests only see that it runs
losses = {
    name: torch.tensor([train(seed, steps=steps, **parts) for seed in (1, 2, 3)])
    for name, parts in variants.items()
}
hurt = {name: loss - losses["whole"] for name, loss in losses.items()}  # seed by seed
for name, loss in losses.items():
    print(f"{name:24}", "  ".join(f"{value:.2f}" for value in loss), f"  {hurt[name].mean():+.2f}")
if steps >= 50:
    for name in ("no bend", "no RoPE", "no attention", "no norm after embedding", "no road"):
        assert hurt[name].min() > 0, name

# %%
figure, axes = plt.subplots(figsize=(7, 3))
names = sorted(set(hurt) - {"whole", "no road"}, key=lambda name: float(hurt[name].mean()))
for row, name in enumerate(names):
    axes.barh(row, hurt[name].mean(), color="#dbeafe", edgecolor=lesson.BLUE)
    axes.plot(hurt[name], [row] * 3, "k|", markersize=12)
axes.axvline(0, color="#4a5568", lw=1)
axes.set_yticks(range(len(names)), names)
axes.set(
    xlabel="loss above the whole model's, same seed (nats a byte)", title="bars: mean; ticks: seeds"
)
lesson.show(
    "Bars: taking out attention, the norm after the embedding, the bend or RoPE hurts; ReLU for "
    "ReLU squared changes next to nothing, and neither does the place of the norms"
)

# %% [markdown]
# Look at what did *not* hurt. In a toy of four layers and fifty steps ReLU does nearly as well as ReLU²,
# and the blocks need no norm at all. Were we fooled? Not about ReLU²: its gain is small and was found in
# [long runs](https://arxiv.org/abs/2109.08668). A toy cannot show it.
#
# "No road" (too far off to be drawn) does not learn at all: it stays at log 128, about 4.85. Its output matrices
# begin at zero, and where nothing is passed beside them, nothing comes out and no gradient comes in.
#
# And the norm after the embedding? The embedding's rows grow while they are learned, fast and unequally.
# Beside a large row, what a block adds is small. The norm puts every token on the road at one size.
#
# As for the norms in the blocks: the picture in section 9 says where to look. Make it deeper.


# %%
def or_nan(*arguments, **parts):
    """`train`, or NaN where the gradient is no longer a number."""
    try:
        return train(*arguments, **parts)
    except FloatingPointError:
        return float("nan")


depth, deeper = 16, {}
for name in ("whole", "post-norm", "no norm in blocks"):
    runs = [or_nan(seed, depth, steps, **variants[name]) for seed in (1, 2, 3)]
    deeper[name] = torch.tensor(runs)
    print(f"{name:18} at depth {depth}:", "  ".join(f"{loss:.2f}" for loss in runs))
if steps >= 50:
    assert (deeper["post-norm"] > deeper["whole"]).all()

# %% [markdown]
# At this depth post-norm is behind in every seed, and pre-norm trains as if nothing had happened. Without a
# norm it is a game of chance: a seed may come through fifty steps, or its numbers leave the range of a float
# and the loss is NaN, *not a number*. A run that takes days cannot be a game of chance. (Post-norm can be
# trained deep with care: a warmup of the learning rate, other starting weights. Pre-norm needs neither:
# [Xiong et al.](https://arxiv.org/abs/2002.04745))
# A part is not there for the model you try it on. It is there for the model you want next.

# %% [markdown]
# **Break it once more: no mask.** The text is now *random*: 16 tokens, all equally likely, so nothing can
# be predicted and the loss cannot fall below log 16, about 2.77. Unless somebody cheats. One causal model,
# one that may look ahead, three seeds each.


# %%
def train_on_noise(seed, causal, steps):
    size = ModelConfig(depth=2, aspect=16, head_dim=K, sequence_len=16)
    gpt = model.GPT.build(size, 16, cpu.device, seed)
    optimizer = optim.MuonAdamW(gpt, OptimConfig(), cpu)
    dice = torch.Generator().manual_seed(seed)
    mask_BTS = None if causal else torch.ones(1, 16, 16, dtype=torch.bool)
    for _ in range(steps):
        rows = torch.randint(16, (16, 17), generator=dice)
        x_BTD = norm(gpt.embedding(rows[:, :-1]))
        for layer in gpt.blocks:
            x_BTD = layer(x_BTD, model.rotation(torch.arange(16)[None], K), mask_BTS)
        loss = F.cross_entropy(gpt.logits(norm(x_BTD)).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(lr_scale=1.0)
    return loss.item()


# %%
for causal in (True, False):
    noise = [train_on_noise(seed, causal, 2 * steps) for seed in (1, 2, 3)]
    print(f"causal={causal!s:5} loss on noise:", "  ".join(f"{loss:.2f}" for loss in noise))
if steps >= 50:
    assert max(noise) < 2

# %% [markdown]
# The model without a mask reads the answer one place to the right, and becomes a very good copier of the
# future. When it has to write, the future is not there, and it knows nothing. If a loss is too good to be
# true, look at the mask first.
#
# ## 12. The cache: never compute a key twice
#
# To write, the model is asked for one token after the other. The keys and values of old tokens do not
# change when a new one comes, since nobody looks ahead. So they are kept in a
# [KV cache](glossary.ipynb#kv-cache), and each step computes those of one token alone. A cache is right if
# it changes nothing. You build it in [chapter 05](05_inference.ipynb).

# %%
cache = model.KVCache(config, 1, 5, torch.device("cpu"), torch.float32)
one_by_one = []
with torch.no_grad():
    for t in range(5):
        one_by_one.append(gpt(ids_BT[:, t : t + 1], cache=cache))
        cache.advance(1)
assert_close(torch.cat(one_by_one, dim=1), logits_BTV, atol=1e-4, rtol=1e-4)
print("the cache holds", tuple(cache.keys_LBGSK.shape), "keys: layers, rows, heads, positions, K")

# %% [markdown]
# ## 13. The dial
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
figure, axes = plt.subplots(figsize=(5.4, 2.5))
look = {"hatch": ["", ".", "/", "x"], "edgecolor": "white"}
axes.stackplot(depths, shares.values(), labels=shares, **look)
axes.set(xlabel="depth", ylabel="% of the parameters", title="vocabulary 65,536")
axes.margins(0)
axes.legend(reverse=True, loc="upper left", bbox_to_anchor=(1, 1))
lesson.show(
    "Shares by depth: embedding and head are most of a shallow model, MLP and attention later"
)

# %% [markdown]
# Small models are mostly vocabulary: the tables grow with the width, the blocks with its square and with
# the depth. That is why small profiles take a small vocabulary. And this run's model:

# %%
mine, vocab = run.config.recipe.model, run.config.recipe.tokenizer.vocab_size
sizes = count(mine, vocab)
vocabulary = sizes["embedding.weight"] + sizes["head.weight"]
print(
    f"{sum(sizes.values()):,} parameters, {vocabulary / sum(sizes.values()):.0%} of them vocabulary"
)
assert sum(sizes.values()) == mine.parameters(vocab)

# %% [markdown]
# **Exercise 2.5 ★ · 5 minutes · predict** The price of a long memory.
# How many bytes does the cache of the depth 20 model take for one row of 2,048 positions, at two bytes a
# number? It has 20 layers and 10 heads of 128 numbers.

# %% tags=["exercise"]
cache_bytes = ...

checks.verify("2.5", cache_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>What is kept for one position, in one head of one layer?</details>
# <details><summary>Hint 2</summary>A key <em>and</em> a value, 128 numbers each.</details>
# <details><summary>Solution</summary>
#
# ```python
# cache_bytes = 2 * d20.depth * d20.num_kv_heads * d20.head_dim * 2048 * 2
# ```
#
# 210 MB for a single conversation: a long context is paid for in memory. Grouped-query attention
# (`model.kv_heads`) lets several query heads share the keys and values of one, and divides this number.
#
# </details>

# %% [markdown]
# **Exercise 2.6 ★★ · 10 minutes · open** Break what is left.
# Three parts were never broken: QK-norm, the division by √K where QK-norm is there as well, and the soft
# cap of the logits. Add them to `variants` and train. Does a toy notice? At which depth, or at which
# learning rate (`OptimConfig(matrix_lr=…)`, 0.02 by default), does it begin to? Give "no road" random
# weights to start from, too: does it learn then? What is known: QK-norm was introduced against scores
# that grow during long training, the cap against logits that do. Neither is a matter of fifty steps.

# %% tags=["open"]
my_variants = {"whole": {}}
for name, parts in my_variants.items():
    print(name, train(seed=1, steps=steps, **parts))

# %% [markdown]
# ## To read
#
# - Vaswani et al., *Attention Is All You Need*, [arXiv:1706.03762](https://arxiv.org/abs/1706.03762)
# - Su et al., *RoFormer* (rotary positions), [arXiv:2104.09864](https://arxiv.org/abs/2104.09864)
# - Haviv et al., *Transformer Language Models without Positional Encodings Still Learn Positional
#   Information*, [arXiv:2203.16634](https://arxiv.org/abs/2203.16634)
# - Zhang & Sennrich, *Root Mean Square Layer Normalization*,
#   [arXiv:1910.07467](https://arxiv.org/abs/1910.07467)
# - Xiong et al., *On Layer Normalization in the Transformer Architecture* (pre-norm and post-norm),
#   [arXiv:2002.04745](https://arxiv.org/abs/2002.04745)
# - Henry et al., *Query-Key Normalization for Transformers*,
#   [arXiv:2010.04245](https://arxiv.org/abs/2010.04245)
# - So et al., *Primer* (ReLU²), [arXiv:2109.08668](https://arxiv.org/abs/2109.08668)
# - Ainslie et al., *GQA*, [arXiv:2305.13245](https://arxiv.org/abs/2305.13245)
#
# In the code: `nanolib/model.py`. **Next:** [chapter 03](03_muon.ipynb), how a gradient becomes a step.
