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
# [▶ Open this chapter in Colab](https://colab.research.google.com/github/OWNER/nanolib/blob/main/notebooks/03_muon.ipynb): nothing to install on your machine.

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
# # 03 · The optimizer
#
# A gradient says for every weight which way is uphill. It does not say how far to go the other way. How
# far, then, and is "weight by weight" even the right way to look at a matrix?
#
# **You will learn**
# - why momentum helps, and what AdamW does in ten lines;
# - what is lopsided about the gradient of a matrix, and how Muon evens it out with products alone;
# - who gets which rule, why rates depend on the width, and what clipping is for.
#
# **You need** [chapter 02](02_model.ipynb), whose model is trained here in small;
# products of matrices; the singular value decomposition is explained where it is needed;
# no run: nothing is taken from earlier stages.
#
# **Takes** 40 minutes to read and run, 60 more with the exercises; any CPU.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import matplotlib.pyplot as plt
import torch
import torch._dynamo  # torch.optim's first optimizer needs it: seconds, and better here than below
import torch.nn.functional as F
from torch.testing import assert_close

import checks
import lesson
from nanolib import optim
from nanolib.config import REPOSITORY, ModelConfig, OptimConfig
from nanolib.model import GPT
from nanolib.runtime import Runtime

run = lesson.begin(profile, run, overrides)
torch.set_printoptions(precision=2, sci_mode=False)

# %% [markdown]
# ## Five words
#
# Chapter 02 made a vector of each of our five words, and looked at how a loss comes out at the end. Now
# the loss comes back down. These five tokens will tell us which rule the embedding should have; first
# we need the rules.

# %%
words = ["Ada", " fed", " her", " owl", " again"]
lesson.tokens(words, numbers=range(5))

# %% [markdown]
# ## 1. Downhill, and momentum
#
# **Gradient descent** (SGD) takes a step against the [gradient](glossary.ipynb#gradient). Here is a
# landscape of two weights: a valley, twenty times steeper across than along. The step must be small
# enough for the steep direction (at a rate of 0.1 it would jump from side to side for ever), and so it is
# far too small for the flat one.
#
# [Momentum](glossary.ipynb#momentum) keeps a running mean of the gradients. Across the valley they change
# sign and cancel; along it they agree. Looking one step ahead (Nesterov), the step is a mix of the mean
# and of the gradient at hand.


# %%
def descend(lr, momentum, steps=25):
    steepness = torch.tensor([1.0, 20.0])
    place, mean, path = torch.tensor([-4.0, 1.0]), torch.zeros(2), []
    for _ in range(steps):
        path.append(place)
        grad = steepness * place
        mean = mean.lerp(grad, 1 - momentum)  # momentum · mean + (1 − momentum) · grad
        place = place - lr * grad.lerp(mean, momentum)
    return torch.stack(path)


plain, with_momentum = descend(0.09, momentum=0.0), descend(0.3, momentum=0.8)
assert_close(plain[1], torch.tensor([-4.0, 1.0]) * (1 - 0.09 * torch.tensor([1.0, 20.0])))
print(f"distance left after 25 steps: {plain[-1].norm():.3f}, with momentum", end=" ")
print(f"{with_momentum[-1].norm():.3f}")

# %%
flat, steep = torch.linspace(-4.5, 1, 80), torch.linspace(-1.4, 1.4, 80)
height = flat[None] ** 2 / 2 + 10 * steep[:, None] ** 2
figure, panels = plt.subplots(1, 2, sharey=True, figsize=(7.2, 2.1))
for axes, path, name in zip(panels, (plain, with_momentum), ("SGD", "with momentum"), strict=True):
    axes.contourf(flat, steep, height, levels=5, cmap="Greys", alpha=0.3)
    axes.plot(path[:, 0], path[:, 1], ".-", color=lesson.BLUE, linewidth=1.2)
    axes.plot(0, 0, "*", color=lesson.ORANGE, markersize=12)
    axes.set(title=f"{name}, 25 steps", xlabel="first weight", xlim=(-4.5, 1), ylim=(-1.4, 1.4))
panels[0].set_ylabel("second weight")
lesson.show(
    "A path zigzags across a valley and is still far from the star; with momentum it arrives"
)

# %% [markdown]
# ## 2. AdamW: a step size for every weight
#
# The valley's two directions wanted two learning rates. [AdamW](glossary.ipynb#adamw) gives each weight
# its own: the mean gradient is divided by the root of the mean *squared* gradient. What is left is about
# ±1 where the gradients agree and near 0 where they do not, whatever their size. Both means start at
# zero, so they are scaled up at first. The W is for weight decay that does not pass through the division.


# %%
def adamw(weight, grad, memory, step, lr, betas=(0.8, 0.95), eps=1e-10, decay=0.0):
    mean, square = memory
    mean += (1 - betas[0]) * (grad - mean)
    square += (1 - betas[1]) * (grad**2 - square)
    fair_mean = mean / (1 - betas[0] ** step)
    fair_square = square / (1 - betas[1] ** step)
    weight -= lr * decay * weight
    weight -= lr * fair_mean / (fair_square.sqrt() + eps)


# %%
torch.manual_seed(0)
weight, grads = torch.randn(6, 4), torch.randn(5, 6, 4)
ours, real, theirs = weight.clone(), weight.clone(), torch.nn.Parameter(weight.clone())
memory, moments = torch.zeros(2, 6, 4), torch.zeros(2, 6, 4)
settings = {"betas": (0.8, 0.95), "eps": 1e-10}
torchs = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01, **settings)
for step, grad in enumerate(grads, start=1):
    adamw(ours, grad, memory, step, lr=0.1, decay=0.01)
    optim.adamw_step(real, grad, *moments, step=step, lr=0.1, weight_decay=0.01, **settings)
    theirs.grad = grad
    torchs.step()
assert_close(ours, real)
assert_close(ours, theirs.data)
print("after 5 steps ours equals nanolib's adamw_step and torch's AdamW")

# %% [markdown]
# ## 3. A matrix is more than its numbers
#
# AdamW treats a matrix as a bag of numbers. But a matrix is a *map*, from vectors to vectors, and a step
# is a matrix too. What does a step do, as a map? Send a circle of vectors through it. Here is a gradient
# of two by two numbers. The circle becomes a thin ellipse: inputs in one direction are moved a lot, in
# the other hardly at all. The half axes of that ellipse are the **singular values**.
#
# Before you run it: AdamW's very first step is the *sign* of each number. What does the circle become
# then?

# %%
G = torch.tensor([[3.0, 1.4], [1.8, 1.2]])
print("singular values of the gradient:  ", torch.linalg.svdvals(G))
print("of Adam's first step, signs alone:", torch.linalg.svdvals(G.sign()))
assert torch.linalg.svdvals(G.sign())[1] < 1e-5


# %%
def circle_through(axes, matrix, look="-"):
    """What a matrix makes of the unit circle, and of two of its vectors."""
    turn = torch.linspace(0, 6.2832, 100)
    circle = torch.stack([turn.cos(), turn.sin()])
    axes.plot(*circle, ":", color="#4a5568", lw=1)
    axes.plot(*(matrix @ circle), look, color=lesson.BLUE)
    for marker, at in (("o", 10), ("s", 35)):  # two of the circle's vectors, a quarter apart
        axes.plot(*(matrix @ circle)[:, at], marker, color=lesson.ORANGE, markersize=7)
    axes.set(xlim=(-2.1, 2.1), ylim=(-1.7, 1.7), aspect="equal")


figure, panels = plt.subplots(1, 3, sharey=True, figsize=(7.2, 2.3))
maps = {"the circle": torch.eye(2), "gradient, length 1": G / G.norm(), "Adam: its signs": G.sign()}
for axes, (name, matrix) in zip(panels, maps.items(), strict=True):
    circle_through(axes, matrix)
    axes.set_title(name)
lesson.show("A circle; a thin ellipse, made by the gradient; a straight line, made by its signs")

# %% [markdown]
# A line. All four signs are alike, so AdamW's step moves every input in one and the same direction. It
# has made every *number* equally large, and in doing so it has left one *direction* with nothing at all.
#
# Is that a trick of this example? We need a real gradient: a toy model on nanolib's own source code (a
# token is a byte), after a few steps, since the very first gradients are zero (chapter 02,
# exercise 2.4).

# %%
source = b"".join(path.read_bytes() for path in sorted((REPOSITORY / "nanolib").glob("*.py")))
text = torch.tensor([byte for byte in source if byte < 128])
small = ModelConfig(depth=2, aspect=32, head_dim=16, sequence_len=64)
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)


def loss_of(gpt, seed, step, rows=8):
    """The loss of one batch, drawn from (seed, step): the same for every rule."""
    dice = torch.Generator().manual_seed(1000 * seed + step)
    starts = torch.randint(len(text) - 65, (rows, 1), generator=dice)
    ids = text[starts + torch.arange(65)]
    return F.cross_entropy(gpt(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


print(f"{len(text):,} bytes; {small.parameters(128):,} weights; 512 tokens a step")


# %%
@torch.no_grad()
def update(gpt, memory, rule, lr, step, scale=1.0):
    """One step: the matrices of the blocks by `rule`, embedding and head always by AdamW."""
    rates = {"embedding.weight": 0.3, "head.weight": 0.01}
    for name, weight in gpt.named_parameters():
        its_rule, its_lr = (adamw, rates[name]) if name in rates else (rule, lr)
        state = memory.setdefault(name, torch.zeros(2, *weight.shape))
        its_rule(weight, weight.grad, state, step, scale * its_lr)


# %%
def train(rule, lr, steps, seed):
    gpt, memory, losses = GPT.build(small, 128, cpu.device, seed), {}, []
    for step in range(steps):
        loss = loss_of(gpt, seed, step)
        gpt.zero_grad()
        loss.backward()
        scale = min(1.0, (steps - step) / (0.4 * steps))  # constant, then down to zero
        update(gpt, memory, rule, lr, step + 1, scale)
        losses.append(loss.item())
    return gpt, losses


gpt, losses = train(adamw, lr=0.01, steps=12, seed=1)
gradients = {name: w.grad for name, w in gpt.named_parameters() if name.startswith("blocks")}
print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}; gradients of {len(gradients)} matrices")

# %% [markdown]
# Below: the singular values of the second block's gradients, largest first, on a scale of powers of ten;
# and how much of the gradient's square stands in the first three of 64 directions.

# %%
values, shares = {}, {}
for name, grad in gradients.items():
    if name.startswith("blocks.1"):
        short = name.removeprefix("blocks.1.").removesuffix(".weight")
        values[short] = S = torch.linalg.svdvals(grad)
        shares[short] = 100 * float(S[:3].square().sum() / S.square().sum())
assert min(shares.values()) > 3 * 100 * 3 / 64  # three times an equal share, at least

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 2.9), width_ratios=(3, 2))
styles = ("-", "--", "-.", ":", "-", "--")
for (name, S), style in zip(values.items(), styles, strict=True):
    left.semilogy(range(1, len(S) + 1), S / S[0], style, label=name)
left.set(xlabel="direction", ylabel="singular value ÷ the largest", ylim=(1e-4, 1.5))
left.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))
right.bar_label(right.barh(list(shares), shares.values(), color=lesson.BLUE), fmt="%.0f", padding=2)
right.set(title="% in three directions", xlim=(0, 112))
right.invert_yaxis()
lesson.show("Singular values fall steeply; much of each gradient is in three directions of 64")

# %% [markdown]
# No trick: a few directions have nearly everything. A step along such a gradient moves the matrix in
# those and hardly in the others, however useful those may be.
#
# ## 4. Every direction alike
#
# The singular value decomposition writes the gradient as G = U S Vᵀ: a sum of parts, each reading one
# direction (a column of V), writing another (a column of U), with a strength (in S). The idea of
# [Muon](glossary.ipynb#muon) is to keep the directions and forget the strengths: step along U Vᵀ, the same
# matrix with every singular value set to 1. The ellipse becomes a circle again.
#
# There is a reason behind it. A step must not change what the layer puts out by too much. If "too much"
# is measured by the vector that changes most (the largest singular value of the step), then among all
# steps of size 1, U Vᵀ lowers the loss most, to first order: by the *sum* of the singular values.

# %%
G = gradients["blocks.1.mlp.up.weight"]
U, S, Vt = torch.linalg.svd(G, full_matrices=False)
best = (G * (U @ Vt)).sum()
assert_close(best, S.sum())
others = [torch.linalg.qr(torch.randn(G.shape))[0] for _ in range(100)]  # of size 1 as well
assert best > max((G * other).sum() for other in others)
print(f"first-order gain: U Vᵀ {best:.2g}, the gradient itself {(G * G / S[0]).sum():.2g},")
print(f"the best of 100 random steps {max((G * other).sum() for other in others):.2g}")

# %% [markdown]
# ## 5. Newton–Schulz: the same without a decomposition
#
# A decomposition of every matrix at every step is slow, most of all on a GPU, which is made for products
# of matrices. Products are enough. X Xᵀ X has the singular vectors of X, and the cubes of its singular
# values. So an odd polynomial of a matrix applies *the polynomial to each singular value* and touches
# nothing else. One step of Muon's [Newton–Schulz](glossary.ipynb#newton-schulz) iteration has degree five:
#
# $$p(X) = a\,X + b\,(X X^\top) X + c\,(X X^\top)^2 X \qquad p(s) = a\,s + b\,s^3 + c\,s^5$$
#
# **Exercise 3.1 ★★ · 8 minutes · build** One Newton–Schulz step.
# Write it for a matrix with R rows and C columns, R ≤ C, with three products of matrices and no more.
# Which of X Xᵀ and Xᵀ X is the small one?


# %% tags=["exercise"]
def newton_schulz_step(X, a=3.4445, b=-4.7750, c=2.0315):
    """X [R, C] -> a X + b (X Xᵀ) X + c (X Xᵀ)² X, of the same shape."""
    ...


checks.verify("3.1", newton_schulz_step)

# %% [markdown]
# <details><summary>Hint 1</summary>What do the second and the third term have in common on their right?
# </details>
# <details><summary>Hint 2</summary>(b M + c M M) X, with M = X Xᵀ: one product for M, one for M M, and one
# with X.</details>
# <details><summary>Solution</summary>
#
# ```python
# def newton_schulz_step(X, a=3.4445, b=-4.7750, c=2.0315):
#     gram = X @ X.T
#     return a * X + (b * gram + c * gram @ gram) @ X
# ```
#
# X Xᵀ is R by R, the small one where the matrix is wide.
#
# </details>


# %% tags=["solution-twin"]
def newton_schulz_step(X, a=3.4445, b=-4.7750, c=2.0315):
    gram = X @ X.T
    return a * X + (b * gram + c * gram @ gram) @ X


# %%
def polynomial(s):
    return 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5


after = newton_schulz_step(G.T / G.norm())  # no singular value above 1
assert_close(after, Vt.T @ torch.diag(polynomial(S / G.norm())) @ U.T, atol=1e-5, rtol=1e-4)
print("one step on the matrix is the polynomial on its singular values")

# %% [markdown]
# Watch it at work on the two-by-two gradient: the thin ellipse, after one, two, three and five steps, and
# Adam's step for comparison. In a live notebook, move the slider.

# %%
tiny = torch.tensor([[3.0, 1.4], [1.8, 1.2]])


def draw(axes, count):
    matrix = tiny.sign() if count == "Adam" else tiny / tiny.norm()
    for _ in range(0 if count == "Adam" else count):
        matrix = newton_schulz_step(matrix)
    circle_through(axes, matrix, "--" if count == "Adam" else "-")
    long, short = torch.linalg.svdvals(matrix).tolist()
    axes.set_xlabel(f"half axes {long:.2f} and {short:.2f}")


alt = (
    """A thin ellipse becomes nearly a circle in five Newton–Schulz steps; Adam's step is a line"""
)
lesson.frames(draw, [0, 1, 2, 3, 5, "Adam"], label="steps:", alt=alt)

# %% [markdown]
# What does the polynomial do to a singular value, again and again? On the left, once: small values grow
# 3.4-fold, values near 1 are held in a band. On the right, after one, three and five steps: five lift a
# singular value of 0.003 into the band. They do not end *at* 1, only near it, and exercise 3.2 finds out
# why. For a step, near is good enough, and the steep start is worth more.

# %%
s = torch.cat([torch.zeros(1), torch.logspace(-4, 0, 400)])
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.4))
left.plot(s, polynomial(s))
left.plot(s, s, color="#4a5568", linestyle="--", linewidth=1)
left.set(xlabel="singular value before", ylabel="after one step", title="the polynomial")
value = s
for count, style in enumerate((":", "", "--", "", "-"), start=1):
    value = polynomial(value)
    if style:
        right.semilogx(s, value, style, color=lesson.BLUE, label=f"after {count}")
right.axhspan(0.68, 1.21, color=lesson.PASTELS[2], zorder=0, label="0.68 to 1.21")
right.set(xlabel="singular value at first", title="again and again")
right.legend(loc="upper left", bbox_to_anchor=(1, 1))
lesson.show("Left: a steep start, then a band around 1. Right: five steps lift 0.003 into the band")
print(f"from 0.004 up they end between {value[s >= 0.004].min():.2f} and {value.max():.2f}")

# %% [markdown]
# **Exercise 3.2 ★★ · 10 minutes · predict** Where is it at rest?
# Which singular value between 0 and 1 does Muon's polynomial leave as it is? Work it out by hand: divide
# a s + b s³ + c s⁵ = s by s and solve for s². Three digits. Then look at the slope there: why do the
# singular values never settle on it?

# %% tags=["exercise"]
fixed_point = ...

checks.verify("3.2", fixed_point)

# %% [markdown]
# <details><summary>Hint 1</summary>With y = s² you have a quadratic equation. Which of its two roots lies
# below 1?</details>
# <details><summary>Hint 2</summary>c y² + b y + (a − 1) = 0, the smaller root, and then s = √y.</details>
# <details><summary>Solution</summary>
#
# ```python
# a, b, c = 3.4445, -4.7750, 2.0315
# fixed_point = ((-b - (b * b - 4 * c * (a - 1)) ** 0.5) / (2 * c)) ** 0.5
# ```
#
# The slope there, a + 3b s² + 5c s⁴, is about −1.6: a value beside the fixed point lands on the other side
# and farther away. So the values hop about in the band. A polynomial that does settle has a flatter start
# and would need more steps. *Polar Express* (below) takes another polynomial at each step and gets both.
#
# </details>

# %% [markdown]
# The whole of it: make the largest singular value at most 1 (the root of the sum of all squares is never
# less than it), turn a tall matrix on its side so that X Xᵀ is the small one, and take five steps.


# %%
def orthogonalise(G, steps=5):
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(steps):
        X = newton_schulz_step(X)
    return X.T if G.shape[0] > G.shape[1] else X


for grad in gradients.values():
    assert_close(orthogonalise(grad), optim.orthogonalise(grad[None])[0], atol=1e-5, rtol=1e-4)
before, after = torch.linalg.svdvals(G), torch.linalg.svdvals(orthogonalise(G))
print(f"on {len(gradients)} real gradients ours equals nanolib.optim.orthogonalise")
print(f"largest ÷ median singular value: {before[0] / before[32]:.0f} → {after[0] / after[32]:.1f}")

# %% [markdown]
# ## 6. Muon
#
# Momentum, then orthogonalise, then one more factor. A step with singular values 1 turns an input of C
# numbers of size 1 into outputs of size about 1 where the matrix is square or wide. Where it is tall,
# C inputs become R outputs: the same length is spread over more numbers, and each is smaller by √(C/R).
# The factor √max(1, R/C) makes up for it.
#
# **Exercise 3.3 ★★ · 20 minutes · build** Muon.
# With `orthogonalise` from above, in five lines: the new mean is momentum · mean + (1 − momentum) · grad;
# look one step ahead as in section 1 (Nesterov); orthogonalise; scale; step. Return new tensors and leave
# the old ones alone. Does the *size* of the gradient play any part?


# %% tags=["exercise"]
def muon_step(weight, grad, mean, lr=0.02, momentum=0.95):
    """weight, grad, mean [R, C] -> (new weight, new mean)."""
    ...


checks.verify("3.3", muon_step)

# %% [markdown]
# <details><summary>Hint 1</summary>Which of the three is orthogonalised: the gradient, the mean, or a mix
# of both?</details>
# <details><summary>Hint 2</summary><code>ahead = (1 - momentum) * grad + momentum * mean</code>, with the new
# mean. The factor is <code>max(1, rows / columns) ** 0.5</code>.</details>
# <details><summary>Solution</summary>
#
# ```python
# def muon_step(weight, grad, mean, lr=0.02, momentum=0.95):
#     mean = momentum * mean + (1 - momentum) * grad
#     ahead = momentum * mean + (1 - momentum) * grad
#     rows, columns = weight.shape
#     return weight - lr * max(1, rows / columns) ** 0.5 * orthogonalise(ahead), mean
# ```
#
# The size plays no part in a single step: orthogonalise divides it away. It does in the mean, where a
# large gradient outweighs the others. Section 10 comes back to that.
#
# </details>


# %% tags=["solution-twin"]
def muon_step(weight, grad, mean, lr=0.02, momentum=0.95):
    mean = momentum * mean + (1 - momentum) * grad
    ahead = momentum * mean + (1 - momentum) * grad
    rows, columns = weight.shape
    return weight - lr * max(1, rows / columns) ** 0.5 * orthogonalise(ahead), mean


# %%
def muon(weight, grad, memory, step, lr):
    """The same in place, called like `adamw`."""
    new_weight, memory[0] = muon_step(weight, grad, memory[0], lr)
    weight.copy_(new_weight)


print("Muon in under thirty lines: newton_schulz_step, orthogonalise, muon_step")

# %% [markdown]
# Two referees: nanolib's `muon_step`, and PyTorch's own `Muon`. PyTorch iterates in bfloat16, numbers
# with eight bits of precision, so with it we agree only to within a small part of a step (five steps of
# 0.02 here; a wrong rule is off by 0.01 and more).

# %%
for shape in ((32, 32), (48, 16), (16, 48)):
    weight, grads = torch.randn(shape), torch.randn(5, *shape)
    ours, real, theirs = weight.clone(), weight.clone(), torch.nn.Parameter(weight.clone())
    memory, momenta = torch.zeros(2, *shape), torch.zeros(1, *shape)
    torchs = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.0)
    for step, grad in enumerate(grads, start=1):
        muon(ours, grad, memory, step, lr=0.02)
        optim.muon_step(real[None], grad[None], momenta, lr=0.02, momentum=0.95)
        theirs.grad = grad
        torchs.step()
    assert_close(ours, real, atol=1e-5, rtol=1e-4)
    off = (ours - theirs).abs().max().item()
    assert off < 2e-3
    print(f"{shape}: equals muon_step; at most {off:.5f} from torch's Muon")

# %% [markdown]
# **Exercise 3.4 ★ · 4 minutes · predict** Without the factor.
# `mlp.up` has four times as many rows as columns. Leave out √max(1, R/C). By what is the size (root mean
# square) of the change in its *output* multiplied?

# %% tags=["exercise"]
shrinks_to = ...

checks.verify("3.4", shrinks_to)

# %% [markdown]
# <details><summary>Hint 1</summary>By what is the whole step multiplied when the factor is gone?</details>
# <details><summary>Hint 2</summary>R/C is 4 here, and the output is linear in the step.</details>
# <details><summary>Solution</summary>
#
# ```python
# shrinks_to = 1 / 4**0.5
# ```
#
# The training would not break. The layer learns at half the rate of the others, and nobody notices: the
# worst kind of bug in an optimizer, and why two referees are worth their lines.
#
# </details>
#
# ## 7. Why the embedding gets AdamW
#
# Back to the five words. Looking up a token's row is multiplying the table by a one-hot vector (chapter 02
# asserted it). So the gradient of the table is one-hot vectors times what came back down the road: each row
# holds what the positions with *that token* sent, and the rows of absent tokens are zero.
#
# Muon treats the table as a map and spreads its step over all directions at once. But the inputs of this map
# are one-hot: they share nothing, and a row belongs to its word alone. Let the same five words come in a
# small batch, and again beside 35 others that send gradients of their own. What should change for "Ada"?

# %%
sent_TD = torch.randn(40, 16)  # what comes back to each of 40 positions, all with different tokens
steps_for_ada = {}
for rule in (adamw, muon):
    for count in (5, 40):
        one_hot_TV = F.one_hot(torch.arange(count), 40).float()
        grad_VD, step_VD = one_hot_TV.T @ sent_TD[:count], torch.zeros(40, 16)
        rule(step_VD, grad_VD, torch.zeros(2, 40, 16), step=1, lr=1.0)
        steps_for_ada[rule.__name__, count] = step_VD[0]
        rows = int((grad_VD != 0).any(dim=1).sum())
        print(
            f"{rule.__name__:6} {rows:2} rows with a gradient; Ada's moves by {step_VD[0].norm():.2f}"
        )
assert_close(steps_for_ada["adamw", 5], steps_for_ada["adamw", 40])
ratio = steps_for_ada["muon", 40].norm() / steps_for_ada["muon", 5].norm()
assert ratio < 0.9

# %% [markdown]
# For AdamW nothing changes: "Ada" moves as before, whoever else is in the room. Muon has only 16 directions
# to give to 40 rows, so each row's step depends on words that have nothing to do with it. The head is such a
# table at the other end, with a row for each token that is scored. Both get AdamW, which goes number by
# number, and everything between gets Muon. This is nanolib's own list:

# %%
optimizer = optim.MuonAdamW(gpt, OptimConfig(), cpu)
for group in optimizer.groups:
    shape = tuple(group.params[0].shape)
    count = len(group.params)
    print(f"{group.rule:6} {count} of {shape!s:11} rate {group.lr:.4f}  {group.names[0]} …")
assert {group.rule for group in optimizer.groups if "blocks" in group.names[0]} == {"muon"}

# %% [markdown]
# ## 8. A race, run fairly
#
# The same toy model, the same batches, the same number of steps. Only the rule for the blocks' matrices
# differs; embedding and head have AdamW each time. *frozen* leaves the matrices as they were made, so that
# the blocks add nothing: who does not beat it has learned nothing with them.
#
# A race at somebody else's rate proves nothing. So each rule first tries five rates, in factors of two,
# on seed 0. The best one then runs on seeds 1, 2 and 3, which had no say in the choice. Which rule minds a
# wrong rate least? Guess before you look.


# %%
def sgd(weight, grad, memory, step, lr, momentum=0.9):
    memory[0] += (1 - momentum) * (grad - memory[0])
    weight -= lr * memory[0]


def end(losses):
    """Mean loss of the last ten steps; every batch is new text, so it is held-out loss as well."""
    return sum(losses[-10:]) / len(losses[-10:])


# %%
steps = 80 if profile != "smoke" else 3  # tests only see that it runs
rules = {"sgd": (sgd, 1.25), "adamw": (adamw, 0.0025), "muon": (muon, 0.0125)}
sweep = {}
for name, (rule, lowest) in rules.items():
    rates = [lowest * 2**i for i in range(5)]
    sweep[name] = {lr: end(train(rule, lr, steps, seed=0)[1]) for lr in rates}
    print(f"{name:6}", "  ".join(f"{lr:g}: {loss:.2f}" for lr, loss in sweep[name].items()))
best = {name: min(tried, key=tried.get) for name, tried in sweep.items()}
if steps >= 80:  # neither wants a rate beyond those it tried
    assert all(best[name] not in (min(sweep[name]), max(sweep[name])) for name in ("adamw", "muon"))

# %%
race = {"frozen": (sgd, 0.0)} | {name: (rules[name][0], best[name]) for name in rules}
curves = {
    name: [train(rule, lr, steps, seed)[1] for seed in (1, 2, 3)]
    for name, (rule, lr) in race.items()
}
ends = {name: torch.tensor([end(losses) for losses in runs]) for name, runs in curves.items()}
for name, loss in ends.items():
    seeds = "  ".join(f"{value:.3f}" for value in loss)
    spread = loss.max() - loss.min()
    print(
        f"{name:7} rate {race[name][1]:<7g} {seeds}   mean {loss.mean():.3f}, spread {spread:.3f}"
    )
if steps >= 80:
    assert (ends["muon"] < ends["adamw"]).all() and (ends["adamw"] < ends["frozen"]).all()

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.8), sharey=True)
for (name, tried), style in zip(sweep.items(), (":^", "--s", "-o"), strict=True):
    left.plot(range(5), tried.values(), style, label=name)
for place, loss in enumerate(ends.values()):
    right.plot([place] * 3, loss, "o", color=lesson.BLUE, mfc="white")
    right.plot([place - 0.25, place + 0.25], [loss.mean()] * 2, color=lesson.BLUE)
left.set(title="seed 0: five rates for each rule", ylabel="loss at the end (nats a byte)")
left.set_xticks(range(5), ["lowest", "× 2", "× 4", "× 8", "× 16"])
left.legend(loc="upper left", ncols=3, bbox_to_anchor=(-0.05, -0.15))
right.set(title="seeds 1, 2, 3 at the best rate; lines: means")
right.set_xticks(range(4), ends)
lesson.show(
    "Left: loss against learning rate, a valley for each rule, Muon's the lowest. Right: three seeds "
    "for each rule; Muon ends below AdamW, AdamW below SGD or near it, frozen blocks above"
)

# %% [markdown]
# Muon ends below AdamW in each seed. The spread between seeds may be as large as that lead, so one run of
# each rule, each on a seed of its own, would have told us little. Compare seed by seed: the batches are the
# same. And a wrong rate? SGD's valley is flat because it learns little at any rate; AdamW pays most for one that
# is too high (in this run).
#
# What this does *not* show: a toy, eighty steps, one schedule, AdamW's betas not tuned. A Muon step is also
# more expensive, by fifteen products of matrices for each weight matrix. In a large model this hardly shows beside
# the work of many thousands of tokens; here it does.
#
# **And what came after Muon?** Three refinements from the records of 2025 and 2026, each tried alone ("+") and on
# top of all the others ("-"), on the same tokens of web text ("pack"; "deep" at depth 12) from the same seeds:
# what each adds to the bits per byte, so that below zero is better, in bold where that is beyond the noise (the
# whole table is read in [chapter 04](04_pretraining.ipynb)). *Polar Express* takes another polynomial in
# each iteration, *NorMuon* evens out the rows of the update, *cautious decay* shrinks a weight only where the
# update does so too. What NorMuon gained, 0.002 bits per byte, was not worth its lines here, so nanolib has
# dropped it.

# %%
table = (REPOSITORY / "runs" / "bench" / "ablations.md").read_text().splitlines()
rows = ("| ingredient", "| ---", "| `polar", "| `normuon", "| `cautious")
lesson.markdown("\n".join(line for line in table if line.startswith(rows)))

# %% [markdown]
# And the referee for all our parts together: nanolib's optimizer, from the same start, on the same batches.
# Its rates are scaled by the width (next section), so we hand it ours divided by that.

# %%
scale = (small.width / 768) ** -0.5
rates = {"embedding_lr": 0.3 / scale, "head_lr": 0.01 / scale, "matrix_lr": best["muon"]}
theirs = GPT.build(small, 128, cpu.device, seed=1)
optimizer = optim.MuonAdamW(theirs, OptimConfig(**rates, clip=None, momentum_warmup=0), cpu)
for step in range(min(10, steps)):
    loss = loss_of(theirs, 1, step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(lr_scale=1.0)
    assert_close(loss.item(), curves["muon"][0][step], atol=1e-3, rtol=1e-3)
print("nanolib's MuonAdamW, step by step: the same losses as ours")

# %% [markdown]
# ## 9. Why rates depend on the width
#
# Say the input has numbers of size 1. How much does one step move a layer's output, in the direction that
# the gradient asks for? An AdamW step changes every weight by about the rate, C of them add up, and the
# output moves by rate × C: a wider model needs a lower rate. A Muon step moves it by the rate times a
# singular value of the step, which is about 1, whatever the width.
#
# Before you run it: draw both lines.

# %%
widths, moved = [32, 64, 128, 256, 512], {"adamw": [], "muon": []}
for width in widths:
    x = torch.randn(width).sign()  # an input whose numbers have size 1
    grad = torch.randn(width, 1) * x  # what one token's loss asks of the matrix
    for rule in (adamw, muon):
        change = torch.zeros(width, width)
        rule(change, grad, torch.zeros(2, width, width), step=1, lr=0.02)
        moved[rule.__name__].append((change @ x).square().mean().sqrt().item())
assert_close(moved["adamw"], [0.02 * width for width in widths], atol=0, rtol=1e-3)
assert max(moved["muon"]) < 1.1 * min(moved["muon"])
print("adamw", [round(m, 3) for m in moved["adamw"]], " muon", [round(m, 3) for m in moved["muon"]])

# %%
figure, axes = plt.subplots(figsize=(5.4, 2.5))
axes.loglog(widths, moved["adamw"], "--s", label="AdamW")
axes.loglog(widths, moved["muon"], "-o", label="Muon")
axes.set(xlabel="width", ylabel="how far an output moves")
axes.set_xticks(widths, widths)
axes.minorticks_off()
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
lesson.show(
    "With the width, AdamW's step moves an output ever farther, in proportion; Muon's does not"
)

# %% [markdown]
# So nanolib scales AdamW's rates with the width and leaves Muon's alone. The factor is that of October 2025:
# √(768 / width), half way (in powers) between no scaling and the worst case above. Where inputs and
# gradients do not agree, C changes of either sign add up to √C only.
#
# Muon's momentum has a [warmup](glossary.ipynb#warmup) of its own. At first the gradients turn quickly and
# an old mean misleads, so the mean forgets faster: it begins at 0.85 and reaches 0.95 at step 300.

# %%
optimizer = optim.MuonAdamW(gpt, OptimConfig(), cpu)
memory = []
for optimizer.steps in range(500):
    memory.append(optimizer.momentum())
assert memory[0] == 0.85 and memory[-1] == 0.95
reach = [1 / (1 - keep) for keep in (memory[0], memory[-1])]
print(f"the mean reaches back about {reach[0]:.0f} steps at first, {reach[1]:.0f} later")

# %% [markdown]
# ## 10. Clipping: one bad batch
#
# Once in a while a batch has a gradient a hundred times larger than the others: a page of garbage, a
# number that has run away. Neither Muon nor AdamW makes a hundred times larger *step* of it. What it does
# is spoil their memory: in a running mean, one such gradient outweighs a hundred others.
# [Clipping](glossary.ipynb#clipping) shortens a gradient that is longer than a limit, and keeps its
# direction.
#
# **Exercise 3.5 ★ · 8 minutes · build** Clip.
# A model's gradient is a list of tensors, and its length is that of all their numbers in one long vector.
# If that is more than the limit, scale *all* of them by the same factor. Why not each tensor by its own?


# %% tags=["exercise"]
def clip(grads, limit=1.0):
    """A list of tensors -> the same list, scaled so that its global norm is at most `limit`."""
    ...


checks.verify("3.5", clip)

# %% [markdown]
# <details><summary>Hint 1</summary>How do you get the length of a vector from the lengths of its parts?
# </details>
# <details><summary>Hint 2</summary>The root of the sum of all squares. The factor is never above 1.</details>
# <details><summary>Solution</summary>
#
# ```python
# def clip(grads, limit=1.0):
#     norm = sum(grad.square().sum() for grad in grads) ** 0.5
#     factor = min(1.0, limit / float(norm)) if norm > 0 else 1.0
#     return [grad * factor for grad in grads]
# ```
#
# One factor for all keeps the direction of the whole gradient. A factor for each tensor turns it.
#
# </details>


# %% tags=["solution-twin"]
def clip(grads, limit=1.0):
    norm = sum(grad.square().sum() for grad in grads) ** 0.5
    factor = min(1.0, limit / float(norm)) if norm > 0 else 1.0
    return [grad * factor for grad in grads]


# %%
mine = clip([grad.clone() for grad in gradients.values()], limit=0.01)
for name in gradients:
    gpt.get_parameter(name).grad = gradients[name].clone()
matrices = [gpt.get_parameter(name) for name in gradients]
torch.nn.utils.clip_grad_norm_(matrices, 0.01)
assert_close(mine, [weight.grad for weight in matrices], atol=1e-6, rtol=1e-3)
print("ours equals torch's clip_grad_norm_")

# %% [markdown]
# **Break it.** Sixty gradients that agree but for some noise, and one bad batch at step 20, a hundred times as
# large. How well does the mean point the right way, with the limit and without?

# %%
good = torch.randn(64) / 8  # of length about 1
noisy = [good + torch.randn(64) / 8 for _ in range(60)]
noisy[20] = 100 * torch.randn(64) / 8
figure, axes = plt.subplots(figsize=(6, 2.5))
for limit, style in ((float("inf"), "--"), (1.0, "-")):
    mean, likeness = torch.zeros(64), []
    for grad in noisy:
        mean = 0.95 * mean + 0.05 * clip([grad], limit)[0]
        likeness.append(float(F.cosine_similarity(mean, good, dim=0)))
    axes.plot(likeness, style, label="not clipped" if limit > 1 else "clipped at 1")
    print(f"limit {limit}: ten steps after the bad batch the likeness is {likeness[30]:.2f}")
    assert limit > 1 or likeness[30] > 0.8
axes.set(xlabel="step", ylabel="likeness to the good gradient", ylim=(-0.4, 1.05))
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
lesson.show("Unclipped, the mean loses its way at step 20 for dozens of steps; clipped it does not")

# %% [markdown]
# ## 11. Several processes, one gradient
#
# With several GPUs each process ([rank](glossary.ipynb#rank)) has the whole model and a part of the batch.
# The gradients must be added up. But not every rank needs every sum: an optimizer step can be shared out.
# Each rank *owns* some matrices whole, since half a matrix cannot be orthogonalised, and some rows of the
# tables. It receives the summed gradient of those alone (*reduce-scatter*), keeps momentum for those alone,
# steps, and sends the new weights to all (*all-gather*). So a gradient travels once, and memory for the
# optimizer shrinks with the number of ranks.
#
# Two ranks in one process, by hand: each has half of the rows.


# %%
def up_gradients(ids):
    """The gradient of both blocks' mlp.up [N, R, C] by these rows' part of the loss."""
    gpt.zero_grad()
    logits = gpt(ids[:, :-1]).flatten(0, 1)
    (F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / 512).backward()
    return torch.stack([block.mlp.up.weight.grad for block in gpt.blocks])


ids = text[torch.arange(8)[:, None] * 500 + torch.arange(65)]  # 8 rows with 64 targets each
halves = [up_gradients(ids[rank::2]) for rank in range(2)]
assert_close(halves[0] + halves[1], up_gradients(ids), atol=1e-5, rtol=1e-3)
print("the halves' gradients add up to the whole batch's")

# %%
weights_NRC = torch.stack([block.mlp.up.weight.detach() for block in gpt.blocks])
gathered_NRC = weights_NRC.clone()
for rank in range(2):  # rank r owns matrix r: receives its sum, steps, sends the weights
    grad_RC = halves[0][rank] + halves[1][rank]
    muon(gathered_NRC[rank], grad_RC, torch.zeros(2, *grad_RC.shape), step=1, lr=0.05)
alone_NRC, grads_NRC = weights_NRC.clone(), up_gradients(ids)
optim.muon_step(alone_NRC, grads_NRC, torch.zeros_like(grads_NRC), lr=0.05, momentum=0.95)
assert_close(gathered_NRC, alone_NRC, atol=1e-3, rtol=1e-3)
print("two ranks with half the batch each end where one rank with all of it ends")

# %% [markdown]
# Who owns what, when two ranks share this model (nanolib's own bookkeeping, `Group.owned`). Matrices of
# one shape are stacked and dealt out whole; tables are cut by rows.

# %%
two = optim.MuonAdamW(gpt, OptimConfig(), Runtime(device=cpu.device, dtype=cpu.dtype, world_size=2))
names = [name for group in two.groups for name in group.names]
figure, axes = plt.subplots(figsize=(6.8, 4))
looks = ({"color": "#dbeafe"}, {"color": "#fde7c8", "hatch": "//"})
middle = {"ha": "center", "va": "center", "bbox": {"fc": "white", "ec": "none", "pad": 0.5}}
for group in two.groups:
    for rank, look in enumerate(looks):
        for name, rows, _ in group.owned(rank):
            total = gpt.get_parameter(name).shape[0]
            share, left = (rows.stop - rows.start) / total, rows.start / total
            axes.barh(names.index(name), share, left=left, ec="#4a5568", **look)
            axes.text(left + share / 2, names.index(name), f"rank {rank}", **middle)
axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names])
axes.set(xlabel="share of the rows")
axes.invert_yaxis()
lesson.show("A bar for each parameter: matrices belong to rank 0 or to rank 1, tables half to each")

# %% [markdown]
# **Exercise 3.6 ★★ · 10 minutes · open** Give Muon the embedding.
# Define `update` anew, so that the embedding gets Muon at a rate of its own (`train` calls the newest). Find
# that rate as carefully as above, and race three seeds. What is known: published Muon runs keep AdamW for
# embedding and head; how much that is worth depends on the size of the vocabulary, and 128 bytes are few. What
# do you find, and is it more than the spread between seeds?

# %% tags=["open"]
my_race = {"muon": [end(train(muon, best["muon"], steps, seed)[1]) for seed in (4,)]}
print(my_race)

# %% [markdown]
# ## To read
#
# - Jordan et al., *Muon: An optimizer for hidden layers in neural networks*,
#   [kellerjordan.github.io](https://kellerjordan.github.io/posts/muon/)
# - Liu et al., *Muon is Scalable for LLM Training*, [arXiv:2502.16982](https://arxiv.org/abs/2502.16982)
# - Bernstein & Newhouse, *Old Optimizer, New Norm: An Anthology* (why the spectral norm, and why another
#   one for the embedding), [arXiv:2409.20325](https://arxiv.org/abs/2409.20325)
# - Loshchilov & Hutter, *Decoupled Weight Decay Regularization* (AdamW),
#   [arXiv:1711.05101](https://arxiv.org/abs/1711.05101)
# - Amsel et al., *The Polar Express*, [arXiv:2505.16932](https://arxiv.org/abs/2505.16932)
# - Rajbhandari et al., *ZeRO* (shared optimizer state),
#   [arXiv:1910.02054](https://arxiv.org/abs/1910.02054)
#
# In the code: `nanolib/optim.py`, all of it. **Next:** [chapter 04](04_pretraining.ipynb), the long run.
