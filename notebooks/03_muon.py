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
# # 03 · The optimizer
#
# A gradient says for every weight which way is uphill. It does not say how far to go the other way.
# That is the optimizer's business, and it decides how much a model learns from the same text. This
# chapter builds two optimizers, AdamW in ten lines and **Muon** in thirty, and holds both against
# `nanolib/optim.py`.
#
# **You will learn** why momentum helps, what is lopsided about the gradient of a matrix, how a
# polynomial of degree five evens it out, which parameter gets which rule, and how several processes
# share the work.
#
# **Takes** fifteen minutes to read and some ten seconds to run, on any CPU. Only toy models are
# trained here; chapter 04 trains the real one, with these rules.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import matplotlib.pyplot as plt
import torch
import torch._dynamo  # torch.optim's first optimizer needs it: seconds, and better here than below
from torch.testing import assert_close

import lesson
from nanolib import launch, optim
from nanolib.config import ModelConfig, OptimConfig
from nanolib.data.sources import TextSource
from nanolib.model import GPT
from nanolib.runtime import Runtime
from nanolib.tokenizer import Tokenizer

run = lesson.begin(profile, run, overrides)
launch.stage("shards", run, watch=lesson.Live())  # chapter 01's work, if it is not there yet
tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")

# %% [markdown]
# ## 1. Downhill, and momentum
#
# **Gradient descent** (SGD) takes a step against the gradient. Here is a landscape of two weights: a
# valley, twenty times steeper across than along. The step must be small enough for the steep
# direction, and so it is far too small for the flat one.
#
# **Momentum** keeps a running mean of the gradients. Across the valley they change sign and cancel,
# along it they agree. Looking one step ahead (Nesterov), the step is a mix of the mean and of the
# gradient at hand.


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
print("distance left after 25 steps:", plain[-1].norm().item(), with_momentum[-1].norm().item())

# %%
flat, steep = torch.meshgrid(
    torch.linspace(-4.5, 1, 80), torch.linspace(-1.2, 1.2, 80), indexing="ij"
)
figure, panels = plt.subplots(1, 2, sharey=True, figsize=(7.2, 2.1))
for axes, path, name in zip(panels, (plain, with_momentum), ("SGD", "with momentum"), strict=True):
    axes.contourf(flat, steep, flat**2 / 2 + 10 * steep**2, levels=5, cmap="Greys", alpha=0.3)
    axes.plot(path[:, 0], path[:, 1], ".-", color=lesson.BLUE, linewidth=1.2)
    axes.plot(0, 0, "*", color=lesson.ORANGE, markersize=12)
    axes.set(title=f"{name}, 25 steps", xlabel="first weight", xlim=(-4.5, 1), ylim=(-1.2, 1.2))
panels[0].set_ylabel("second weight")
plt.show()

# %% [markdown]
# ## 2. AdamW: a step size for every weight
#
# The valley's two directions wanted two learning rates. AdamW gives each weight its own: the mean
# gradient is divided by the root of the mean *squared* gradient. What is left is about ±1 where the
# gradients agree and near 0 where they do not, whatever their size. Both means start at zero, so they
# are scaled up at first. The W is for weight decay that does not pass through the division.


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
# AdamW treats a matrix as a bag of numbers. But a matrix is a map, from vectors to vectors, and it has
# directions: the singular value decomposition writes it as a sum of parts, each reading one direction,
# writing another, with a strength called the **singular value**.
#
# So what does the gradient of a matrix look like, as a map? We need a real one: a toy model, some real
# text, and a few steps, since the very first gradients are zero (chapter 02, exercise 2).

# %%
small = ModelConfig(depth=2, aspect=16, head_dim=16, sequence_len=32)
*train_files, _ = sorted(run.stage("shards").path.glob("*.npy"))
source = TextSource.open(train_files, length=32, batch_rows=16, bos=tokenizer.bos, seed=1)
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)


def new_model():
    return GPT.build(small, tokenizer.vocab_size, cpu.device, seed=1)


print(f"{sum(weight.numel() for weight in new_model().parameters()):,} weights, 512 tokens a step")


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
def train(rule, lr, steps):
    gpt, memory, losses = new_model(), {}, []
    for step in range(steps):
        loss = gpt.nll(source.updates(step)[0][0]).mean()
        gpt.zero_grad()
        loss.backward()
        scale = min(1.0, (steps - step) / (0.4 * steps))  # constant, then down to zero
        update(gpt, memory, rule, lr, step + 1, scale)
        losses.append(loss.item())
    return gpt, losses


gpt, losses = train(adamw, lr=0.01, steps=12)
gradients = {name: w.grad for name, w in gpt.named_parameters() if name.startswith("blocks")}
print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}; gradients of {len(gradients)} matrices")

# %% [markdown]
# Below, the singular values of the second block's gradients, largest first, on a scale of powers of
# ten, and beside them how much of the gradient's square stands in the first three of 32 directions.
# A few have most of it. A step along the gradient moves the matrix in those and hardly in the others,
# however useful those may be.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.3), width_ratios=(3, 2))
top_shares = {}
for name, grad in gradients.items():
    if name.startswith("blocks.1"):
        S = torch.linalg.svdvals(grad)
        short = name.removeprefix("blocks.1.").removesuffix(".weight")
        left.semilogy(range(1, len(S) + 1), S / S[0], label=short, linewidth=1.2)
        top_shares[short] = 100 * float(S[:3].square().sum() / S.square().sum())
left.set(xlabel="direction", ylabel="singular value ÷ the largest", title="lopsided")
left.legend(fontsize=7, ncols=2)
right.bar_label(right.barh(list(top_shares), top_shares.values()), fmt="%.0f", padding=2)
right.set(title="% in three directions", xlim=(0, 112))
right.invert_yaxis()
plt.show()

# %% [markdown]
# ## 4. Orthogonalise: every direction alike
#
# **Muon**'s idea: keep the directions and forget the strengths. With G = U S Vᵀ, step along U Vᵀ, the
# same matrix with every singular value set to 1.
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
# An SVD for every matrix at every step is slow, most of all on a GPU, which is made for products of
# matrices. Products are enough. X Xᵀ X has the singular vectors of X, and the cubes of its singular
# values; so an odd polynomial of a matrix applies *the polynomial to each singular value* and touches
# nothing else. Muon uses degree five:


# %%
def newton_schulz_step(X):
    a, b, c = 3.4445, -4.7750, 2.0315
    gram = X @ X.T
    return a * X + (b * gram + c * gram @ gram) @ X


def polynomial(s):
    return 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5


X = G / G.norm()  # no singular value above 1
after = newton_schulz_step(X.T)
assert_close(after, Vt.T @ torch.diag(polynomial(S / G.norm())) @ U.T, atol=1e-5, rtol=1e-4)
print("one step on the matrix is the polynomial on its singular values")

# %% [markdown]
# What does the polynomial do, again and again? On the left, once: small values grow 3.4-fold, values
# near 1 are held in a band. On the right, after one, three and five steps: five lift a singular value
# of 0.003 into the band (green, 0.68 to 1.21). They do not end *at* 1, only near it; exercise 2 finds
# out why. For a step, near is good enough, and the steep start is worth more.

# %%
s = torch.cat([torch.zeros(1), torch.logspace(-4, 0, 400)])
figure, (left, right) = plt.subplots(1, 2, figsize=(6.6, 2.2))
left.plot(s, polynomial(s))
left.plot(s, s, color=lesson.GREY, linestyle="--", linewidth=1)
left.set(xlabel="singular value before", ylabel="after one step", title="the polynomial")
value = s
for count in range(1, 6):
    value = polynomial(value)
    if count in (1, 3, 5):
        right.semilogx(s, value, label=f"{count}", color=plt.cm.Blues(0.2 + 0.16 * count))
right.axhspan(0.68, 1.21, color=lesson.PASTELS[2], zorder=0)
right.set(xlabel="singular value at first", title="after 1, 3, 5 steps")
right.legend(title="steps", fontsize=8)
plt.show()
enters = s[int((value < 0.68).nonzero()[-1]) + 1]
print(f"from {enters:.4f} up: between {value[s >= enters].min():.3f} and {value.max():.3f}")


# %% [markdown]
# The whole of it: make the largest singular value at most 1 (the norm of all numbers together is never
# less), turn a tall matrix on its side so that X Xᵀ is the small one, and take five steps.


# %%
def orthogonalise(G, steps=5):
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(steps):
        X = newton_schulz_step(X)
    return X.T if G.shape[0] > G.shape[1] else X


for grad in gradients.values():
    assert_close(orthogonalise(grad), optim.orthogonalise(grad[None])[0], atol=1e-5, rtol=1e-4)
print(f"on {len(gradients)} real gradients ours equals nanolib.optim.orthogonalise")

# %%
after = torch.linalg.svdvals(orthogonalise(G))
figure, axes = plt.subplots(figsize=(5.2, 2.2))
axes.plot(range(1, 33), S / S[0], label="the gradient (÷ its largest)", color=lesson.GREY)
axes.plot(range(1, 33), after, label="five steps later")
axes.set(xlabel="direction", title="singular values of mlp.up", ylim=(0, None))
axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## 6. Muon
#
# Momentum, then orthogonalise, then one more factor. A step with singular values 1 turns an input of C
# numbers of size 1 into outputs of size about 1 where the matrix is square or wide. Where it is tall,
# C inputs become R outputs, the same length is spread over more numbers, and each is smaller by
# √(C/R). The factor √max(1, R/C) makes up for it.


# %%
def muon(weight, grad, memory, step, lr, momentum=0.95):
    mean = memory[0]
    mean += (1 - momentum) * (grad - mean)
    ahead = (1 - momentum) * grad + momentum * mean
    rows, columns = weight.shape
    weight -= lr * max(1, rows / columns) ** 0.5 * orthogonalise(ahead)


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
    assert_close(ours, real)
    off = (ours - theirs).abs().max().item()
    assert off < 2e-3
    print(f"{shape}: equals muon_step; at most {off:.5f} from torch's Muon")

# %% [markdown]
# ## 7. Which parameter gets which
#
# Muon is for matrices that map vectors to vectors. The embedding is not one: it is a table, each token
# looks up its row, and most rows have no gradient at all in a batch. Orthogonalising it would step as
# far for a token that came once as for one that came a hundred times, and mix rows that have nothing to
# do with each other. The head is such a table at the other end. Both get AdamW, which goes number by
# number.

# %%
optimizer = optim.MuonAdamW(gpt, OptimConfig(), cpu)
for group in optimizer.groups:
    shape = tuple(group.params[0].shape)
    print(
        f"{group.rule:6} {len(group.params)} of {shape!s:11} rate {group.lr:.4f}  {group.names[0]} …"
    )
touched = (gpt.embedding.weight.grad != 0).any(dim=1).float().mean()
assert {group.rule for group in optimizer.groups if "blocks" in group.names[0]} == {"muon"}
print(f"rows of the embedding with a gradient in the last batch: {touched:.0%}")

# %% [markdown]
# ## 8. A race
#
# The same toy model, the same text, eighty steps. Only the rule for the blocks' matrices differs;
# embedding and head have AdamW each time. *frozen* leaves the matrices as they were made, and then the
# blocks add nothing. Every rule runs at the best of several learning rates, tried beforehand in factors
# of two on profile `demo`. A race at somebody else's rate proves nothing.


# %%
def sgd(weight, grad, memory, step, lr, momentum=0.9):
    memory[0] += (1 - momentum) * (grad - memory[0])
    weight -= lr * memory[0]


curves, steps = {}, min(80, run.config.recipe.base.steps or 80)  # tests have fewer
race = (("frozen", sgd, 0.0), ("sgd", sgd, 20.0), ("adamw", adamw, 0.01), ("muon", muon, 0.05))
for name, rule, lr in race:
    curves[name] = train(rule, lr, steps)[1]
    print(f"{name:7} mean loss of the last ten steps {sum(curves[name][-10:]) / 10:.3f}")
assert all(curve[0] == curves["sgd"][0] for curve in curves.values())

# %%
figure, axes = plt.subplots(figsize=(6.2, 2.4))
colours = (lesson.GREY, lesson.GREEN, lesson.ORANGE, lesson.BLUE)
for (name, curve), colour in zip(curves.items(), colours, strict=True):
    axes.plot(lesson.smooth(curve, 0.7), color=colour, label=name)
low = min(min(curve) for curve in curves.values())
axes.set(xlabel="step", ylabel="loss (nats a token), smoothed", ylim=(low - 0.1, low + 1.2))
axes.set_xlim(steps // 3, steps)
axes.set_title("the last two thirds: same model, same text")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# Look closely before you believe it: one seed, a toy, eighty steps, rates that were sought on `demo`. What
# is learned so early needs blocks little, as the frozen ones show: embedding and head alone learn which
# tokens are common, and which follow which. In `demo`, blocks that move even disturb them at first. The race
# is about who gets below the grey line, and how far.
#
# A Muon step is also dearer, by 5 × 3 products of matrices each. On a large model this hardly shows
# beside the work of many thousands of tokens; here it is a visible part.
#
# And the referee for all our parts together: nanolib's optimizer, from the same start, on the same
# batches. Its rates are scaled by the width (next section), so we hand it ours divided by that.

# %%
scale = (small.width / 768) ** -0.5
settings = {"matrix_lr": 0.05, "embedding_lr": 0.3 / scale, "head_lr": 0.01 / scale, "clip": None}
theirs = new_model()
optimizer = optim.MuonAdamW(theirs, OptimConfig(**settings, momentum_warmup=0), cpu)
for step in range(10):
    loss = theirs.nll(source.updates(step)[0][0]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(lr_scale=1.0)
    assert_close(loss.item(), curves["muon"][step], atol=1e-3, rtol=1e-3)
print("ten steps of nanolib's MuonAdamW: the same losses as ours")

# %% [markdown]
# ## 9. What happens with the width, and at the start
#
# Say the input has numbers of size 1. How much does one step move a layer's output, in the direction
# that the gradient asks for? An AdamW step changes every weight by about the rate, C of them add up,
# and the output moves by rate × C: a wider model needs a lower rate. A Muon step moves it by the rate
# times a singular value of the step, which is about 1 (0.7 here) whatever the width.
#
# So nanolib scales AdamW's rates and leaves Muon's alone. The factor is that of October 2025:
# (width / 768)^−½, half way (in powers) between no scaling and the worst case below. Where inputs and
# gradients do not agree, C changes of either sign add up to √C only.

# %%
widths, moved = [32, 64, 128, 256, 512], {"adamw": [], "muon": []}
for width in widths:
    x = torch.randn(width).sign()  # an input whose numbers have size 1
    grad = torch.randn(width, 1) * x  # what one token's loss asks of the matrix
    for rule in (adamw, muon):
        step = torch.zeros(width, width)
        rule(step, grad, torch.zeros(2, width, width), step=1, lr=0.02)
        moved[rule.__name__].append((step @ x).square().mean().sqrt().item())
assert_close(moved["adamw"], [0.02 * width for width in widths], atol=0, rtol=1e-3)
print("adamw", [round(m, 3) for m in moved["adamw"]], " muon", [round(m, 3) for m in moved["muon"]])

# %% [markdown]
# Momentum has a warmup of its own. At first the gradients turn quickly and an old mean misleads, so the
# mean forgets faster: it begins at 0.85 and reaches 0.95 at step 300.

# %%
optimizer = optim.MuonAdamW(gpt, OptimConfig(), cpu)
memory = []
for optimizer.steps in range(500):
    memory.append(optimizer.momentum())
assert memory[0] == 0.85 and memory[-1] == 0.95
reach = [1 / (1 - keep) for keep in (memory[0], memory[-1])]
print(f"the mean reaches back about {reach[0]:.0f} steps at first, {reach[1]:.0f} later")

# %%
figure, (left, right) = plt.subplots(1, 2)
for name, colour in (("adamw", lesson.ORANGE), ("muon", lesson.BLUE)):
    left.loglog(widths, moved[name], "o-", color=colour, label=name)
left.set(title="how far one step moves an output", xlabel="width")
left.set_xticks(widths, widths)
left.minorticks_off()
left.legend()
right.plot(memory)
right.set(title="Muon's momentum", xlabel="step")
plt.show()

# %% [markdown]
# ## 10. Several processes, one gradient
#
# With several GPUs each process (**rank**) has the whole model and a part of the batch. The gradients
# must be added up. But not every rank needs every sum: an optimizer step can be shared out. Each rank
# *owns* some matrices whole, since half a matrix cannot be orthogonalised, and some rows of the tables.
# It receives the summed gradient of those alone (**reduce-scatter**), keeps momentum for those alone,
# steps, and sends the new weights to all (**all-gather**). So a gradient travels once, and memory for
# the optimizer shrinks with the number of ranks.
#
# Two ranks in one process, by hand: each has half of the rows.

# %%
ranks, (batch,) = 2, source.updates(20)[0]
halves = []
for rank in range(ranks):
    gpt.zero_grad()
    (gpt.nll(batch)[rank::ranks].sum() / batch.targets_BT.numel()).backward()
    halves.append(torch.stack([b.mlp.up.weight.grad.clone() for b in gpt.blocks]))
weights_NRC = torch.stack([block.mlp.up.weight.detach() for block in gpt.blocks])
gathered = []
for rank in range(ranks):  # rank r owns matrix r: receives its sum, steps, sends the weights
    grad_RC, weight_RC = sum(half[rank] for half in halves), weights_NRC[rank].clone()
    muon(weight_RC, grad_RC, torch.zeros(2, *grad_RC.shape), step=1, lr=0.05)
    gathered.append(weight_RC)
print("each rank stepped for one matrix:", [tuple(weight.shape) for weight in gathered])

# %%
gpt.zero_grad()
gpt.nll(batch).mean().backward()
grads_NRC = torch.stack([block.mlp.up.weight.grad for block in gpt.blocks])
alone_NRC = weights_NRC.clone()
optim.muon_step(alone_NRC, grads_NRC, torch.zeros_like(grads_NRC), lr=0.05, momentum=0.95)
assert_close(torch.stack(gathered), alone_NRC, atol=1e-4, rtol=1e-4)
print("two ranks with half the batch each end where one rank with all of it ends")

# %% [markdown]
# Who owns what, when two ranks share this model (nanolib's own bookkeeping, `Group.owned`). Matrices of
# one shape are stacked and dealt out whole; tables are cut by rows.

# %%
two = optim.MuonAdamW(gpt, OptimConfig(), Runtime(device=cpu.device, dtype=cpu.dtype, world_size=2))
names = [name for group in two.groups for name in group.names]
figure, axes = plt.subplots(figsize=(6.4, 2.8))
for group in two.groups:
    for rank, colour in enumerate((lesson.BLUE, lesson.ORANGE)):
        for name, rows, _ in group.owned(rank):
            total = gpt.get_parameter(name).shape[0]
            share = (rows.stop - rows.start) / total
            axes.barh(names.index(name), share, left=rows.start / total, color=colour)
axes.set_yticks(range(len(names)), [n.removesuffix(".weight") for n in names], fontsize=8)
axes.set(xlabel="share of the rows", title="owned by rank 0 (blue) and rank 1 (orange)")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## Exercises
#
# **1.** Write one Newton–Schulz step with coefficients of your own: the classical cubic
# 1.5 X − 0.5 X Xᵀ X, which does converge to 1, though slowly.


# %% tags=["exercise"]
def cubic_step(X):
    return ...


lesson.check(
    cubic_step,
    (torch.eye(2), torch.eye(2)),
    (torch.tensor([[0.5, 0.0]]), torch.tensor([[0.6875, 0.0]])),
    (torch.tensor([[0.6], [0.0]]), torch.tensor([[0.792], [0.0]])),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def cubic_step(X):
#     return 1.5 * X - 0.5 * X @ X.T @ X
# ```
#
# From 0.003 it takes 14 of these to reach 0.68; the quintic needs 5, of one more product each.
#
# </details>
#
# **2.** Which singular value between 0 and 1 does Muon's polynomial leave as it is? (To three digits.
# By hand: divide a s + b s³ + c s⁵ = s by s, and solve for s².) Then look at the slope there: why do the
# singular values not settle on it?

# %% tags=["exercise"]
fixed_point = ...

lesson.check(fixed_point, 0.868, tolerance=1e-3)

# %% [markdown]
# <details><summary>Solution</summary>
#
# With y = s²: c y² + b y + (a − 1) = 0, and the smaller root is the one below 1.
#
# ```python
# a, b, c = 3.4445, -4.7750, 2.0315
# fixed_point = ((-b - (b * b - 4 * c * (a - 1)) ** 0.5) / (2 * c)) ** 0.5
# ```
#
# The slope there, a + 3b s² + 5c s⁴, is about −1.6: a value beside the fixed point lands on the other
# side and farther away. So the values hop about in the band and never settle. A polynomial that does
# settle has a flatter start, and would need more steps. *Polar Express* (below) takes another
# polynomial at each step and gets both.
#
# </details>
#
# **3.** `mlp.up` has four times as many rows as columns. Leave out Muon's factor √max(1, R/C): by what
# factor does the size (root mean square) of the change in its *output* shrink? Write it for any shape.


# %% tags=["exercise"]
def shrinks_to(rows, columns):
    return ...


lesson.check(shrinks_to, (128, 32, 0.5), (32, 32, 1.0), (32, 128, 1.0), (900, 100, 1 / 3))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def shrinks_to(rows, columns):
#     return 1 / max(1, rows / columns) ** 0.5
# ```
#
# The training would not break: the layer learns at half the rate of the others, and nobody notices.
# That is the worst kind of bug in an optimizer, and why two referees above are worth their lines.
#
# </details>
#
# **4.** Try other rates in the race, ten times lower and ten times higher for each rule. Which rule
# minds least? And give Muon the embedding: move it out of `rates` in `update`.
#
# ## To read
#
# - Jordan et al., *Muon: An optimizer for hidden layers in neural networks*,
#   [kellerjordan.github.io](https://kellerjordan.github.io/posts/muon/)
# - Liu et al., *Muon is Scalable for LLM Training*, [arXiv:2502.16982](https://arxiv.org/abs/2502.16982)
# - Bernstein & Newhouse, *Old Optimizer, New Norm: An Anthology* (why the spectral norm),
#   [arXiv:2409.20325](https://arxiv.org/abs/2409.20325)
# - Loshchilov & Hutter, *Decoupled Weight Decay Regularization* (AdamW),
#   [arXiv:1711.05101](https://arxiv.org/abs/1711.05101)
# - Amsel et al., *The Polar Express*, [arXiv:2505.16932](https://arxiv.org/abs/2505.16932)
# - Rajbhandari et al., *ZeRO* (shared optimizer state),
#   [arXiv:1910.02054](https://arxiv.org/abs/1910.02054)
#
# In the code: `nanolib/optim.py`, all of it. **Next:** 04, the long run.
