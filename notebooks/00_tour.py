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
# # 00 · The road
#
# This course builds a small ChatGPT, all of it: the tokenizer, the model, the training, the chat. You
# read it as notebooks, and the notebooks *are* the training run. `nanolib run demo` executes them one
# after the other, and ten minutes later there is a model to talk to.
#
# **You will learn** how the parts hang together, and you will follow three small things through the
# machine: one token, one gradient, and one `kill -9`.
#
# **Takes** ten minutes to read and a few seconds to run, on any CPU. Nothing is trained here.

# %% [markdown]
# Every chapter begins with the same three names. `profile` is a file in `runs/`: how large, how long,
# on what text. `run` names the directory of results (`None`: the profile's name). `overrides` changes
# single settings, for example `{"model.depth": 6}`.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close

import lesson
from nanolib import accounting, config
from nanolib.model import GPT
from nanolib.rundir import StageDir
from nanolib.tokenizer import Tokenizer

run = lesson.begin(profile, run, overrides)

# %% [markdown]
# ## The road
#
# Text goes in at one end, a chat comes out at the other. Each box is a **stage**: it reads what the
# stages before it left behind, works in a process of its own, and leaves a record when it is done.
# Green boxes are finished in this run.

# %%
lesson.road(run)
plt.show()

# %% [markdown]
# A chapter explains an idea with a version small enough to read, checks that nanolib's own version
# gives the same numbers, and then starts the real stage and watches it. Notebooks never carry code
# that the road needs. All of that is in `nanolib/`.
#
# ## One token
#
# What happens between a word and the next? Text becomes bytes, bytes become **ids** (chapter 01), ids
# become vectors, and the vectors pass through the model (chapter 02), which gives every id of the
# vocabulary a probability to come next. Here is a vocabulary that knows bytes only, and a model with
# random weights:

# %%
tokenizer = Tokenizer(merges=[])
tiny = config.ModelConfig(depth=1, aspect=16, head_dim=16, sequence_len=32)
model = GPT(tiny, tokenizer.vocab_size)
torch.manual_seed(0)
with torch.no_grad():
    for weight in model.parameters():
        weight.normal_(std=0.3)
ids_T = torch.tensor([tokenizer.bos, *tokenizer.encode("The cat sa")])
print("ids:", ids_T.tolist())
print("the last one's vector:", model.embedding(ids_T)[-1].detach().numpy().round(2))

# %%
logits_TV = model(ids_T[None])[0]
p_V = logits_TV[-1].softmax(dim=-1)
assert_close(p_V.sum(), torch.tensor(1.0))
for probability, id in zip(*p_V.topk(4), strict=True):
    print(f"{probability:6.2%}  {tokenizer.token_bytes(int(id))!r}")
print(f"{p_V[ord('t')]:6.2%}  b't', the right one")

# %% [markdown]
# To write, draw one of them, append it, and ask again. That loop is all a chat does (chapter 09). To
# make the right one likely is what training is for.
#
# ## One gradient
#
# The text says that `t` comes next. The **loss** is the negative logarithm of the probability the
# model gave to it, and the **gradient** says for each weight which way the loss grows. For the scores
# it has a form worth remembering: *what the model said minus what was right*.

# %%
logits_V = model(ids_T[None])[0, -1]
logits_V.retain_grad()
loss = -logits_V.log_softmax(dim=-1)[ord("t")]
loss.backward()
right_V = torch.zeros_like(logits_V)
right_V[ord("t")] = 1.0
assert_close(logits_V.grad, logits_V.detach().softmax(dim=-1) - right_V)
print(f"loss {loss:.3f}; gradient of the score of 't': {logits_V.grad[ord('t')]:.4f}")

# %% [markdown]
# Every weight got its share of it. A small step against the gradient, and `t` is a little more likely.
# Training is this, some hundreds or millions of times, on many tokens at once:

# %%
with torch.no_grad():
    for weight in model.parameters():
        weight -= 0.02 * weight.grad
    after = -model(ids_T[None])[0, -1].log_softmax(dim=-1)[ord("t")]
print(f"loss {loss:.3f} → {after:.3f}")
assert after < loss

# %% [markdown]
# ## One `kill -9`
#
# Training takes long, and long things get interrupted: a closed laptop, a full disk, a colleague. In
# nanolib the process that trains is never the one you look at. They share nothing but files in the
# run's directory, and one pipe that tells the worker when nobody is there any more.
#
# Here is a worker in miniature. It goes on after the last row it finds, writes a row for each step,
# and stops in order when it is asked to.

# %%
worker = """
import sys, time
from pathlib import Path
from nanolib.guard import Guard
from nanolib.rundir import StageDir

metrics, guard = StageDir("tiny", Path(sys.argv[1])).metrics, Guard.start()
step = max([row["step"] for row in metrics.rows()], default=0)
while not guard.stop_requested:
    step += 1
    metrics.append(kind="train", step=step, loss=10 / step)
    time.sleep(0.02)
print("asked to stop: the last step was", step, flush=True)
"""

# %%
stage = StageDir("tiny", Path(tempfile.mkdtemp()))


def start_and_wait_for(step):
    command = [sys.executable, "-c", worker, str(stage.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, env=os.environ | {"NANOLIB_GUARD": "1"})
    while len(stage.metrics.rows()) < step:
        assert process.poll() is None, "the worker ended early"
        time.sleep(0.02)
    return process


first = start_and_wait_for(5)
first.send_signal(signal.SIGKILL)  # kill -9: no chance to say goodbye
killed_by = signal.Signals(-first.wait())
assert len(stage.metrics.rows()) >= 5
print(f"killed by {killed_by.name}; what it had written is there")

# %% [markdown]
# `kill -9` may hit in the middle of a line. We add such a torn line by hand. Readers skip it, and the
# next writer cuts it off. Then the second worker starts, and after a while we close the pipe. The
# operating system does just that when the watcher is killed.

# %%
with stage.metrics.path.open("a") as file:
    file.write('{"kind": "train", "ste')
second = start_and_wait_for(12)
second.communicate()  # closes the pipe, and waits for the worker's end
steps = [row["step"] for row in stage.metrics.rows()]
assert second.returncode == 0 and steps == list(range(1, len(steps) + 1))
print("two workers, one killed: every step is there, once and in order")

# %% [markdown]
# The real stages do the same with checkpoints: weights are written under another name, flushed to the
# disk and renamed, so that one is there in full or not at all. Whatever happens, the remedy is to run
# the same command again.
#
# ## What a run leaves behind
#
# Everything a run knows is in its directory, as files you can open:
#
# | file | what it is |
# |---|---|
# | `manifest.json` | the recipe: every setting, written once |
# | `<stage>/metrics.jsonl` | one line a step, while it happens |
# | `<stage>/checkpoints/` | weights and optimizer, the last two |
# | `<stage>/done.json` | result, seconds, machine: there when the stage is finished |
# | `<stage>/log.txt` | what its processes printed |
# | `eval/<stage>/` | how the model of that stage scored |
# | `chapters/` | these notebooks, executed |
# | `report.md` | the report card |

# %%
lesson.tree(run.path, depth=1)

# %% [markdown]
# ## The dial
#
# `depth` is the one dial. The width follows from it, and with both the number of weights, the tokens
# to read, and the arithmetic for all that. Here are this repository's profiles beside the model of
# October 2025, which is depth 20. Mind the axes: they count in powers of ten.

# %%
sizes = {name: config.resolve(name).recipe for name in config.profiles()}
sizes["October 2025"] = config.Recipe(base=config.BaseConfig(steps=21_400))
figure, axes = plt.subplots(figsize=(7.2, 3.2))
for name, recipe in sizes.items():
    vocab = recipe.tokenizer.vocab_size
    parameters = recipe.model.parameters(vocab)
    tokens = recipe.base.steps * recipe.base.batch_tokens
    flops = tokens * accounting.training_flops(recipe.model, vocab)
    print(f"{name:13} depth {recipe.model.depth:2}  {parameters:12,} weights  {tokens:15,} tokens")
    axes.loglog(parameters, flops, "o", color=lesson.BLUE)
    side = "right" if name == "October 2025" else "left"  # it is the speedrun's point too
    axes.annotate(f" {name} ", (parameters, flops), fontsize=8, va="top", ha=side)
axes.set(xlabel="weights", ylabel="FLOP", title="pretraining, from a laptop to eight H100")
plt.show()

# %% [markdown]
# ## Exercises
#
# **1.** The gradient of the scores is *what the model said minus what was right*. Write it as a
# function of the probabilities and the right id. What do its numbers add up to?


# %% tags=["exercise"]
def gradient(probabilities, right):
    return ...


lesson.check(gradient, ([0.7, 0.2, 0.1], 0, [-0.3, 0.2, 0.1]), ([0.5, 0.5], 1, [0.5, -0.5]))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def gradient(probabilities, right):
#     return [p - (id == right) for id, p in enumerate(probabilities)]
# ```
#
# They add up to 0: what the right token gains, the others lose, in proportion to how wrongly likely
# they were.
#
# </details>
#
# **2.** A model that has learned nothing gives each of V tokens the same probability. What is its
# loss on any text? (A number, for the 265 tokens of our byte vocabulary.)

# %% tags=["exercise"]
loss_of_nothing = ...

lesson.check(loss_of_nothing, 5.579730)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The logarithm of 265:
#
# ```python
# loss_of_nothing = torch.tensor(265.0).log().item()
# ```
#
# </details>
#
# ## To read
#
# - Karpathy, *nanochat* (the system whose October 2025 state this course rebuilds),
#   [github.com/karpathy/nanochat](https://github.com/karpathy/nanochat)
# - Radford et al., *Improving Language Understanding by Generative Pre-Training* (GPT, 2018), and
#   Brown et al., *Language Models are Few-Shot Learners* (GPT-3),
#   [arXiv:2005.14165](https://arxiv.org/abs/2005.14165)
# - Ouyang et al., *Training language models to follow instructions* (how a reader becomes a talker),
#   [arXiv:2203.02155](https://arxiv.org/abs/2203.02155)
#
# In the code: `nanolib/launch.py` and `nanolib/guard.py` (starting, watching, stopping),
# `nanolib/rundir.py`, `nanolib/config.py`. **Next:** 01, text becomes numbers.
