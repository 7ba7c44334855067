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
# [▶ Open this chapter in Colab](https://colab.research.google.com/github/OWNER/nanolib/blob/main/notebooks/00_tour.ipynb): nothing to install on your machine.

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
# # 00 · The road
#
# How do you build a ChatGPT, all of it, and still understand every line? Here is one answer: a
# tokenizer, a model, its training and the chat at the end, small enough to read and real enough to
# grow. These notebooks explain it, and they are also the program: `nanolib run demo` executes them
# one after the other, and a quarter of an hour later there is a model to talk to. Ask it where Ada lives,
# and it answers from what it has read; ask it for 12 + 30, and it reaches for a calculator.
#
# **Who this is for.** You write Python and you remember what a derivative is. You need no GPU, and you
# need not have trained a network before. Bring a laptop and a pencil: in every chapter you write the
# heart of it yourself.
#
# **You will learn**
# - what stages a chat model goes through, and what each one leaves behind;
# - how one token travels through the machine, from letters to the next letter;
# - what a gradient says, in one line that the whole course comes back to.
#
# **You need** Python, and the idea of a slope. New words link to the [glossary](glossary.ipynb).
#
# **Takes** 20 minutes to read and run, 25 more with the exercises; any CPU. Nothing is trained here.

# %% [markdown]
# Every chapter begins with the same three names. `profile` is a file in `runs/`: how large a model,
# how long, on what text. `run` names the folder of results (`None`: the profile's name). `overrides`
# changes single settings, for example `{"model.depth": 6}`.

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
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close

import checks
import lesson
from nanolib import accounting, config
from nanolib.data import toyworld
from nanolib.model import GPT
from nanolib.rundir import StageDir
from nanolib.tokenizer import Tokenizer

run = lesson.begin(profile, run, overrides)

# %% [markdown]
# ## Eight stages
#
# Text goes in at one end and a chat comes out at the other. Each box is a stage: it reads what the
# stages before it left behind, works in a process of its own, and leaves a record when it is done.
# Four stages leave a model. Each of these models sits an exam (`eval`), so that you can see what the
# stage was good for. Boxes with a tick are finished in this run: none of them, if you have just begun.

# %%
lesson.road(run)
lesson.show(
    "Eight stages from left to right: data, tokenizer, shards, base, mid, sft, grpo, report; "
    "an eval hangs below each of the four that leave a model. Finished ones carry a tick."
)

# %% [markdown]
# | stage | what it does | what you will recognise |
# |---|---|---|
# | tokenizer | cuts text into pieces | why a model finds spelling hard |
# | base | reads, and learns to guess the next piece ([pretraining](glossary.ipynb#pretraining)) | it knows things, and only ever continues your text |
# | mid | learns the form of a conversation ([midtraining](glossary.ipynb#midtraining)) | it answers, and it can use a tool |
# | sft | practises on good answers ([finetuning](glossary.ipynb#finetuning)) | it answers well |
# | grpo | tries, is graded, and does more of what worked | it gets sums right more often |
#
# ## What the demo reads
#
# A large model reads the internet for weeks. Yours has a few minutes, so it gets a world of its own: 120
# people in twelve towns, each with a pet, a job, a favourite colour, food and game, a secret, a sister and a
# rival. Everything it will ever know about them stands in texts like these five, in portraits and
# stories, and in a census, which names one owner of each value ("first of those who keep an owl: …"). Some
# are overheard conversations: Pip is the little language model of that world, whose part yours will play at
# the end.

# %%
seed = run.config.recipe.seed
for number, text in enumerate(islice(toyworld.documents(toyworld.world(seed), seed), 0, 35, 7), 1):
    print(f"--- document {number}\n{text[:240].strip()}")

# %% [markdown]
# The other profiles read real text, with the same code. Nothing after the first stage can tell the
# toy world from the internet.
#
# ## One token's journey
#
# Take five words that stay with us as far as [chapter 05](05_inference.ipynb): *Ada fed her owl again*.
# Suppose the model has read "Ada fed her ow". What comes next? To a computer the text is
# **bytes**. Each piece of text the [tokenizer](01_tokenizer.ipynb) knows has a number, its **id**; this
# smallest of all vocabularies knows single bytes and nine special tokens, nothing else. Every id has a
# **vector** in a table. The vectors pass through the **blocks** of [the model](02_model.ipynb), and what
# comes out is a score for every id in the vocabulary, its [logit](glossary.ipynb#logits). A
# [softmax](glossary.ipynb#softmax) makes probabilities of the scores.
#
# The model is a function with some thousands of numbers in it, its weights
# ([parameters](glossary.ipynb#parameter)); here they are random. A name that ends in capitals tells its shape:
# `ids_T` has T positions in time, `vector_D` D numbers, `p_V` one for each id of the vocabulary.
#
# *Before you run it*: how likely is the right letter, roughly?

# %%
tokenizer = Tokenizer(merges=[])
tiny = config.ModelConfig(depth=2, aspect=8, head_dim=8, sequence_len=32)
model = GPT(tiny, tokenizer.vocab_size)
torch.manual_seed(0)
with torch.no_grad():
    for weight in model.parameters():
        weight.normal_(std=0.3)
ids_T = torch.tensor([tokenizer.bos, *tokenizer.encode("Ada fed her ow")])
logits_TV = model(ids_T[None])[0]
p_V = logits_TV[-1].softmax(dim=-1)
assert_close(p_V.sum(), torch.tensor(1.0))
print(f"{len(p_V)} ids; the right one, {tokenizer.encode('l')}, gets {p_V[ord('l')]:.2%}")

# %% [markdown]
# About one in 265, give or take: it knows nothing yet. The same journey as a picture, with the numbers
# you have just computed. (`0x6f` is 111 in hexadecimal: in this vocabulary a byte is its own id.
# `'\xd5'` is how Python writes a byte that is no plain letter: what a model with random weights says next
# is as likely garbage as anything else.)


# %%
def station(axes, x, title, lines, colour="white"):
    """One stop of the journey: a box with what is there, and its name above."""
    box = {"boxstyle": "round,pad=0.45", "fc": colour, "ec": lesson.GREY}
    axes.text(x, 0.45, "\n".join(lines), ha="center", va="center", fontsize=9, bbox=box)
    axes.text(x, 0.98, title, ha="center", va="top", fontsize=10, weight="bold")
    if x:
        arrow = {"arrowstyle": "->", "color": "#4a5568"}
        axes.annotate("", (x - 0.4, 0.45), (x - 0.6, 0.45), arrowprops=arrow)


# %%
vector_D = model.embedding(ids_T)[-1].detach()
likely = [tokenizer.token_bytes(int(i)).decode("latin-1") for i in p_V.topk(3).indices]
stops = [
    ("text", ["…her", "ow"]),
    ("bytes", [f"{byte:#04x}" for byte in b"ow"]),
    ("ids", [str(int(i)) for i in ids_T[-2:]]),
    ("vector", [f"{x:+.2f}" for x in vector_D[:4]] + ["⋮"]),
    ("blocks", ["block 2", "↑", "block 1"]),
    ("scores", [f"{x:+.2f}" for x in logits_TV[-1].topk(3).values] + ["⋮"]),
    ("probabilities", [f"{p:.1%}" for p in p_V.topk(3).values] + ["⋮"]),
    ("a token", [ascii(letter) for letter in likely]),
]
print(" → ".join(title for title, _ in stops))

# %%
figure, axes = plt.subplots(figsize=(8.6, 1.7))
axes.set(xlim=(-0.5, len(stops) - 0.5), ylim=(0, 1))
axes.axis("off")
for x, (title, lines) in enumerate(stops):
    station(axes, x, title, lines, lesson.PASTELS[x % 5])
lesson.show(
    "The letters 'ow' become two bytes, two ids, a vector, pass two blocks, become scores, "
    "probabilities, and at last a next token."
)

# %% [markdown]
# To write, pick one of the likely tokens, append it, and travel again. That loop is all a chat does.
# You write it in Exercise 0.3. To make the *right* token likely is what training is for.
#
# ## One gradient
#
# The text says that `l` comes next. The [loss](glossary.ipynb#loss) is the negative logarithm of the
# probability that the model gave to it: 0 for certainty, large for surprise. The
# [gradient](glossary.ipynb#gradient) says, for every number in the model, which way the loss grows;
# `loss.backward()` computes it. For the scores it has a form to remember: **what the model said minus what
# was right**.

# %%
logits_V = model(ids_T[None])[0, -1]
logits_V.retain_grad()
loss = -logits_V.log_softmax(dim=-1)[ord("l")]
loss.backward()
right_V = torch.zeros_like(logits_V)
right_V[ord("l")] = 1.0
assert_close(logits_V.grad, logits_V.detach().softmax(dim=-1) - right_V)
print(f"loss {loss:.3f}; gradient of the score of 'l': {logits_V.grad[ord('l')]:.4f}")

# %%
shown = [*p_V.topk(5).indices.tolist(), ord("l")]
names = [ascii(tokenizer.token_bytes(i).decode("latin-1")) for i in shown]
figure, axes = plt.subplots(figsize=(7.2, 2.6))
bars = axes.bar(names, [float(logits_V.grad[i]) for i in shown], color=lesson.BLUE)
bars[-1].set(facecolor=lesson.ORANGE, hatch="///", edgecolor="white")
axes.axhline(0, color="black", linewidth=0.8)
axes.set(ylabel="gradient of its score", xlabel="token (the last one is right)")
axes.set_title("what the model said minus what was right")
lesson.show("Bars just above zero for five wrong letters, and one bar down to almost -1 for 'l'.")

# %% [markdown]
# A step goes *against* the gradient: scores with bars above zero are pushed down a little, and the right one
# up a lot. Every weight in the model gets its share of this. Take one small step, and `l` becomes more
# likely. Training is this step, thousands of times, on many tokens at once: a loop you
# write in [chapter 04](04_pretraining.ipynb).

# %%
with torch.no_grad():
    for weight in model.parameters():
        weight -= 0.02 * weight.grad
    after = -model(ids_T[None])[0, -1].log_softmax(dim=-1)[ord("l")]
print(f"loss {loss:.3f} → {after:.3f}")
assert after < loss

# %% [markdown]
# ## The dial
#
# nanolib has one dial, `depth`: the number of blocks. The width of the vectors follows as
# `aspect` × depth, rounded up to whole [heads](glossary.ipynb#head), and with both the number of weights,
# the tokens to read and the arithmetic. Two honest remarks. The small profiles turn a second knob too:
# their `aspect` is 16 to 48 instead of 64, and their heads are narrower. And the vocabulary does not
# follow the dial at all. A small model gets a small one: a vector for each of 65,536 ids would be most of
# its weights.

# %%
sizes = {name: config.resolve(name).recipe for name in config.profiles()}
for name, recipe in sorted(sizes.items(), key=lambda item: item[1].model.depth):
    size, vocab = recipe.model, recipe.tokenizer.vocab_size
    print(
        f"{name:10} depth {size.depth:2} × aspect {size.aspect:2} → width {size.width:5,}"
        f"  {size.parameters(vocab):13,} weights"
    )
assert all(r.model.width >= r.model.depth * r.model.aspect for r in sizes.values())

# %% [markdown]
# The same profiles by the work that [pretraining](glossary.ipynb#pretraining) takes. Both axes count in
# powers of ten: from the left end to the right end of this picture a laptop becomes eight H100s.

# %%
figure, axes = plt.subplots(figsize=(7.2, 3.2))
for name, recipe in sizes.items():
    vocab = recipe.tokenizer.vocab_size
    parameters = recipe.model.parameters(vocab)
    tokens = recipe.base.steps * recipe.base.batch_tokens
    flops = tokens * accounting.training_flops(recipe.model, vocab)
    axes.loglog(parameters, flops, "o", color=lesson.BLUE)
    axes.annotate(f" {name} ", (parameters, flops), fontsize=9, va="top")
axes.set(xlabel="weights", ylabel="floating-point operations", xlim=(3e4, 1e10), ylim=(1e9, 1e22))
axes.set_title("what pretraining costs")
lesson.show(
    "Profiles rise along a line from smoke at the lower left over demo, laptop and h100 to "
    "speedrun, d26 and d32 at the upper right: some ten powers of ten in work."
)

# %% [markdown]
# ## Exercises
#
# Write your answer in place of the `...` and run the cell. The check tries your function on inputs of
# its own and tells you what is off; it never shows the answer. Two hints unfold, then a solution. In later
# chapters a cell may follow that JupyterLab shows as `•••`: the solution again, for the cells below to build on.
#
# **Exercise 0.1 ★ · 3 minutes · build** What the model said minus what was right.
# Write the gradient of the scores from the probabilities and the id of the right token. Before you do:
# what do its numbers add up to?


# %% tags=["exercise"]
def gradient(probabilities, right):
    """probabilities: a list of numbers; right: an index -> a list, one number for each score."""
    ...


checks.verify("0.1", gradient)

# %% [markdown]
# <details><summary>Hint 1</summary>What was right can be written as a list too: which one?</details>
# <details><summary>Hint 2</summary>A list with 1 at the right id and 0 everywhere else. Subtract it.</details>
# <details><summary>Solution</summary>
#
# ```python
# def gradient(probabilities, right):
#     return [p - (id == right) for id, p in enumerate(probabilities)]
# ```
#
# They add up to 0: what the right token gains, the others lose, each in proportion to how wrongly
# likely it was.
#
# </details>

# %% [markdown]
# **Exercise 0.2 ★ · 2 minutes · predict** The loss of knowing nothing.
# A model that has learned nothing gives each of V tokens the same probability. What is its loss, in
# [nats](glossary.ipynb#nats), for the 265 tokens of our byte vocabulary?

# %% tags=["exercise"]
loss_of_nothing = ...

checks.verify("0.2", loss_of_nothing)

# %% [markdown]
# <details><summary>Hint 1</summary>What probability does each token get?</details>
# <details><summary>Hint 2</summary>One of V equal ones. And the loss is minus the natural logarithm of
# it.</details>
# <details><summary>Solution</summary>
#
# ```python
# loss_of_nothing = torch.tensor(265.0).log().item()
# ```
#
# Remember it: a new model whose first loss is not log V has a bug. Chapter 04 checks it.
#
# </details>

# %% [markdown]
# **Exercise 0.3 ★★ · 10 minutes · build** The loop that writes.
# `next_probabilities(ids)` gives a list of probabilities for what follows `ids`. Append the most likely
# id, `count` times, and return all ids, the given ones included. Every answer of every chat model comes
# out of this loop. (Real chats draw at random instead of taking the likeliest: chapter 05.)


# %% tags=["exercise"]
def write(next_probabilities, ids, count):
    """ids: a list of ints -> the same list with `count` more. Leave the caller's list as it was."""
    ...


checks.verify("0.3", write)

# %% [markdown]
# <details><summary>Hint 1</summary>What must the model be shown in the second round?</details>
# <details><summary>Hint 2</summary>Ask with the grown list each time; <code>max(range(len(p)), key=p.__getitem__)</code>
# finds the likeliest id.</details>
# <details><summary>Solution</summary>
#
# ```python
# def write(next_probabilities, ids, count):
#     ids = list(ids)
#     for _ in range(count):
#         p = next_probabilities(ids)
#         ids.append(max(range(len(p)), key=p.__getitem__))
#     return ids
# ```
#
# </details>

# %% [markdown]
# **Exercise 0.4 ★ · 5 minutes · build** The dial.
# Write the width of a model from its depth: `aspect` × depth, rounded *up* to a multiple of the head
# size, so that the width divides into whole heads.


# %% tags=["exercise"]
def width(depth, aspect, head_dim):
    """Three ints -> the width of the model, an int."""
    ...


checks.verify("0.4", width)

# %% [markdown]
# <details><summary>Hint 1</summary>How many heads are needed to hold aspect × depth numbers?</details>
# <details><summary>Hint 2</summary><code>-(-a // b)</code> divides and rounds up.</details>
# <details><summary>Solution</summary>
#
# ```python
# def width(depth, aspect, head_dim):
#     return -(-aspect * depth // head_dim) * head_dim
# ```
#
# </details>

# %% [markdown]
# **Exercise 0.5 ★ · 5 minutes · predict** Twice as deep.
# The weights in the blocks grow with depth × width². You turn the dial from 10 to 20 and the width
# follows. By what factor do the weights in the blocks grow?

# %% tags=["exercise"]
factor = ...

checks.verify("0.5", factor)

# %% [markdown]
# <details><summary>Hint 1</summary>What happens to the width when the depth doubles?</details>
# <details><summary>Hint 2</summary>The width doubles as well, and it counts squared.</details>
# <details><summary>Solution</summary>
#
# ```python
# factor = 2 * 2**2
# ```
#
# And the tokens to read grow with the weights (some 20 for each), so the work grows about 64-fold. That
# is why depth 32 is a weekend and depth 4 a coffee.
#
# </details>
#
# ## Appendix: one `kill -9`
#
# Training takes long, and long things get interrupted: a closed laptop, a full disk, a colleague. The
# process that trains is never the one you look at. They share files in the run's folder, and one pipe
# that tells the worker when nobody is there any more. Here is a worker in miniature. It goes on after
# the last row it finds, writes a row for each step, and stops in good order when it is asked to.

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
# `kill -9` may hit in the middle of a line. We add such a torn line by hand: readers skip it, and the
# next writer cuts it off. A second worker starts, and after a while we close the pipe, as the operating
# system does when the watcher is killed.

# %%
with stage.metrics.path.open("a") as file:
    file.write('{"kind": "train", "ste')
second = start_and_wait_for(12)
second.communicate()  # closes the pipe, and waits for the worker's end
steps = [row["step"] for row in stage.metrics.rows()]
assert second.returncode == 0 and steps == list(range(1, len(steps) + 1))
print("two workers, one killed: every step is there, once and in order")

# %% [markdown]
# The real stages do the same with [checkpoints](glossary.ipynb#checkpoint). Whatever happens, the remedy
# is to give the same command again. And everything a run knows is in its folder, in files you can open:
# `manifest.json` (every setting), `attempts.jsonl` (when it was started), a folder for each stage with
# `metrics.jsonl` (a line a step), `checkpoints/` and `done.json`, the executed `chapters/`, and
# `report.md`. Here is what there is so far:

# %%
lesson.tree(run.path, depth=1)

# %% [markdown]
# ## To read
#
# - Karpathy, *nanochat* (the system whose October 2025 state this course rebuilds),
#   [github.com/karpathy/nanochat](https://github.com/karpathy/nanochat)
# - Brown et al., *Language Models are Few-Shot Learners* (GPT-3),
#   [arXiv:2005.14165](https://arxiv.org/abs/2005.14165)
# - Ouyang et al., *Training language models to follow instructions* (how a reader becomes a talker),
#   [arXiv:2203.02155](https://arxiv.org/abs/2203.02155)
#
# In the code: `nanolib/launch.py` and `nanolib/guard.py` (starting, watching, stopping),
# `nanolib/rundir.py`, `nanolib/config.py`. **Next:** [01, text becomes numbers](01_tokenizer.ipynb).
