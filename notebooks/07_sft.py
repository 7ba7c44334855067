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
# [▶ Open this chapter in Colab](https://colab.research.google.com/github/OWNER/nanolib/blob/main/notebooks/07_sft.ipynb): nothing to install on your machine.

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
# # 07 · Learning to answer
#
# After [chapter 06](06_midtraining.ipynb) the model talks. **Supervised finetuning** (SFT) goes on with fewer
# and, where one has them, better conversations, and with smaller steps. Which tokens does it learn from, exactly? How do conversations
# of all lengths fit into rows? And what does it buy: which answers does it mend, and which does it spoil?
#
# **You will learn**
# - who is graded in a conversation, and how one wrong shift or one wrong division spoils it;
# - how to compare two models question by question, and tell a gain from noise;
# - why a model may know an answer and still fail a multiple-choice test.
#
# **You need** the chat template and the tool ([chapter 06](06_midtraining.ipynb));
# the loss and the training loop ([chapter 04](04_pretraining.ipynb)).
#
# **Takes** 20 minutes to read and run, 35 more with the exercises; in profile `demo` the stage trains for
# another minute on two CPU cores. Stages: `sft`, then `eval` of `sft`.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.testing import assert_close

import checks
import lesson
from nanolib import checkpoint, launch, tasks
from nanolib.conversation import LETTERS, Conversation, answer_parts, choice_question
from nanolib.data.packing import batch_of_rows, pack
from nanolib.engine import Engine
from nanolib.evals.answers import Questions
from nanolib.evals.choices import by_letter, by_text
from nanolib.runtime import Runtime
from nanolib.stages.text import limits
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox

run = lesson.begin(profile, run, overrides)
launch.stage("mid", run, watch=lesson.Live())  # chapter 06's work, if it is not there yet
tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
cpu = Runtime(device=torch.device("cpu"), dtype=torch.float32)
length = run.config.recipe.model.sequence_len
chats, problems = (tasks.load(name, "test", run.mirror()) for name in ("smoltalk", "gsm8k"))
ASKED = 120 if profile == "demo" else 8  # what a lesson has time for

# %% [markdown]
# ## 1. Who is graded
#
# The model reads the whole conversation, and learns from a part of it. Which part? The user's words are not
# its business. What the assistant says is, **up to and including the marker that ends its turn**: without
# that one it would never learn to stop. And inside the assistant's turn stands something that the assistant
# did not say: the tool's result. A model that trains on results learns to make them up.
#
# **Predict**: in `It is <|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>5`, which of the
# four markers are graded?
#
# **Exercise 7.1 ★★ · 10 minutes · build** The loss mask.
# Write, for each id, whether it is a target of the loss: the [loss mask](glossary.ipynb#loss-mask). `start`
# and `end` are the ids around the assistant's turn, `output` and `output_end` those around a tool's result.


# %% tags=["exercise"]
def loss_mask(ids, start, end, output, output_end):
    """ids: a list of ints -> a list of bools of the same length."""
    ...


checks.verify("7.1", loss_mask)

# %% [markdown]
# <details><summary>Hint 1</summary>Walk through the ids and remember two things: is the assistant speaking, and
# is it the tool's turn?</details>
# <details><summary>Hint 2</summary>Order matters. The opening marker of the turn is not graded, the closing one
# is; the opening marker of a result is already the tool's, and the closing one is still the tool's.</details>
# <details><summary>Solution</summary>
#
# ```python
# def loss_mask(ids, start, end, output, output_end):
#     mask, speaking, tool = [], False, False
#     for id in ids:
#         tool = tool or id == output
#         mask.append(speaking and not tool)
#         tool = tool and id != output_end
#         speaking = (speaking or id == start) and id != end
#     return mask
# ```
#
# The program's markers are the assistant's own: it must learn to call.
#
# </details>

# %% [markdown]
# Here is the same walk, which also says *whose* each token is. Blue and green are graded: the assistant's
# words and its programs. Orange was put there by the tool, grey is only read.


# %% tags=["solution-twin"]
def whose(ids):
    """Each id's kind in the course's colour code."""
    kinds, now = [], "masked"
    for id in ids:
        name = tokenizer.decode([id])
        now = "forced" if name == "<|output_start|>" else now
        now = "program" if name == "<|python_start|>" and now == "chosen" else now
        kinds.append(now)
        opens = ("<|assistant_start|>", "<|python_end|>", "<|output_end|>")  # it speaks from here
        now = "chosen" if name in opens else now
        now = "masked" if name == "<|assistant_end|>" else now
    return kinds


for conversation in [task.conversation(i) for task in (chats, problems) for i in range(20)]:
    real = conversation.render(tokenizer)
    assert [kind in ("chosen", "program") for kind in whose(real.ids)] == real.loss_mask
print("40 conversations: our mask equals nanolib's")

# %%
for conversation in (chats.conversation(3), problems.conversation(0)):
    rendered = conversation.render(tokenizer, max_tokens=160)
    pieces = [tokenizer.decode([id]) for id in rendered.ids]
    lesson.tokens(pieces, kinds=whose(rendered.ids))
print(f"in the last one, {np.mean(rendered.loss_mask):.0%} of the tokens are graded")

# %% [markdown]
# ## 2. Shifted by one
#
# The target at position *t* is token *t* + 1, so the mask moves with it. At `<|assistant_start|>`, which the
# model only reads, it must already predict the first word of the answer.
#
# **Exercise 7.2 ★ · 5 minutes · build** Targets.
# From ids and mask, write the targets: the next id where that one is graded, −1 where it is not. How many
# are there?


# %% tags=["exercise"]
def targets(ids, mask):
    """Two lists of the same length -> a list, one shorter."""
    ...


checks.verify("7.2", targets)

# %% [markdown]
# <details><summary>Hint 1</summary>Whose mask decides: that of the token being read, or of the one being
# predicted?</details>
# <details><summary>Hint 2</summary>Walk over <code>zip(ids[1:], mask[1:])</code>.</details>
# <details><summary>Solution</summary>
#
# ```python
# def targets(ids, mask):
#     return [id if graded else -1 for id, graded in zip(ids[1:], mask[1:], strict=True)]
# ```
#
# Being off by one here is a classic: everything runs, the loss looks fine, and the model cannot begin or
# cannot stop.
#
# </details>

# %%
ids, mask = np.array(rendered.ids), np.array(rendered.loss_mask)
batch = batch_of_rows([ids], [mask], len(ids) - 1, tokenizer.bos)
assert (batch.targets_BT[0] >= 0).tolist() == rendered.loss_mask[1:]
first = rendered.loss_mask[1:].index(True)
for t in range(first - 2, first + 2):
    target = int(batch.targets_BT[0, t])
    learned = repr(tokenizer.decode([target])) if target >= 0 else "(ignored)"
    print(f"{tokenizer.decode([ids[t]])!r:>24} → {learned}")

# %% [markdown]
# ## 3. A mean over what?
#
# The loss of a batch is a mean. Take two conversations, one with 2 graded tokens, one with 40. If you
# average each and then average the two, the 2 tokens weigh as much as the 40, each of them as much as twenty
# of the others. Short answers would shout.
#
# **Exercise 7.3 ★ · 5 minutes · build** The masked mean.
# Write the loss of a batch from every token's loss and the mask: sum first, divide once.


# %% tags=["exercise"]
def masked_mean(nll_BT, mask_BT):
    """nll_BT: losses of all tokens; mask_BT: bools of the same shape -> a tensor with one number."""
    ...


checks.verify("7.3", masked_mean)

# %% [markdown]
# <details><summary>Hint 1</summary>How many numbers are you averaging? Not B × T.</details>
# <details><summary>Hint 2</summary>A bool tensor can be multiplied with, and summed.</details>
# <details><summary>Solution</summary>
#
# ```python
# def masked_mean(nll_BT, mask_BT):
#     return (nll_BT * mask_BT).sum() / mask_BT.sum()
# ```
#
# </details>

# %% [markdown]
# Both ways on two real conversations, a short and a long one, with the midtrained model:

# %%
model = checkpoint.load_model(run.stage("mid").checkpoints, cpu.device)
some = [chats.conversation(i).render(tokenizer, length + 1) for i in range(30)]
two = [min(some, key=lambda r: sum(r.loss_mask)), max(some, key=lambda r: sum(r.loss_mask))]
rows, masks = [np.array(r.ids) for r in two], [np.array(r.loss_mask) for r in two]
batch = batch_of_rows(rows, masks, max(map(len, rows)) - 1, tokenizer.bos)
with torch.no_grad():
    nll_BT = model.nll(batch)  # already 0 where a target is ignored
count_B = (batch.targets_BT >= 0).sum(dim=1)
once, twice = nll_BT.sum() / count_B.sum(), (nll_BT.sum(dim=1) / count_B).mean()
assert_close(once, nll_BT[batch.targets_BT >= 0].mean())
print(f"{count_B.tolist()} graded tokens: {once:.3f} divided once, {twice:.3f} the mean of means")

# %% [markdown]
# ## 4. Conversations share a row
#
# Conversations are short and rows are long. One in each row would be mostly padding, so as many as fit
# share one; this is [packing](glossary.ipynb#packing). None is ever split: half an answer teaches nothing
# good. (As with documents in chapter 04, each sees those before it in its row.)
#
# **Exercise 7.4 ★★ · 10 minutes · build** First fit.
# Go through the conversations in order and put each into the *first* row that still has room for it. Open a
# new row where none has.


# %% tags=["exercise"]
def first_fit(lengths, room):
    """lengths: tokens of each conversation; room: of a row -> for each row a list of indices."""
    ...


checks.verify("7.4", first_fit)

# %% [markdown]
# <details><summary>Hint 1</summary>Keep two lists: the rows, and the room each of them has left.</details>
# <details><summary>Hint 2</summary><code>for ... else</code> runs its <code>else</code> when the loop found no row: open a new
# one there.</details>
# <details><summary>Solution</summary>
#
# ```python
# def first_fit(lengths, room):
#     rows, left = [], []
#     for item, need in enumerate(lengths):
#         for row, space in enumerate(left):
#             if space >= need:
#                 break
#         else:
#             row = len(rows)
#             rows.append([])
#             left.append(room)
#         rows[row].append(item)
#         left[row] -= need
#     return rows
# ```
#
# </details>

# %% [markdown]
# nanolib takes the row with the *least* room that is still enough (best fit), of 64 rows that it keeps open.
# Each box is a conversation; what is left white is wasted.

# %%
lengths = [len(chats.conversation(i).render(tokenizer, length + 1).ids) for i in range(60)]
packed = pack(lengths, length + 1, range(60))
assert sorted(item for row in packed for item in row) == list(range(60))  # each exactly once
figure, axes = plt.subplots(figsize=(7.2, 2.6))
for place, row in enumerate(packed):
    sizes = np.array([lengths[item] for item in row])
    looks = {"color": lesson.PASTELS[0], "edgecolor": lesson.BLUE, "height": 0.9}
    axes.barh([place] * len(row), sizes, left=sizes.cumsum() - sizes, **looks)
axes.set(xlabel="position", ylabel="row", xlim=(0, length + 1))
axes.invert_yaxis()
axes.grid(False)
used = sum(lengths) / len(packed) / (length + 1)
axes.set_title(f"60 conversations in {len(packed)} rows, {used:.0%} used")
lesson.show("Rows filled with boxes, one for each conversation, most of them nearly to the end")
print(f"one conversation in each row would use {np.mean(lengths) / (length + 1):.0%}")

# %% [markdown]
# ## 5. The run
#
# The recipe says how many rows come from where. The worker goes on from the weights of `mid`, with a fresh
# optimizer and a learning rate that falls to zero from the first step on. Right in the figure: the held-out
# losses of chats and word problems begin where chapter 06 ended, on the same ones. (`arc_easy` and
# `arc_challenge` are questions with four choices, as `mmlu` was: near 0.69, the letter is a guess.)

# %%
print("rows of each source (None: all):", limits(run.config.recipe, "sft"))
result = launch.stage("sft", run, watch=lesson.Live())
print(f"{result['epochs']:.2f} passes over {result['conversations']}")

# %% [markdown]
# ## 6. What does it buy?
#
# A loss says little about answers. So ask both models the same questions, none of which were in any
# training conversation, and compare *question by question*. **Mended** are those that `mid` got wrong and
# `sft` right; **spoilt**, the other way round. **Predict**: will there be any spoilt ones, if the
# model got better?

# %%
names = [name for name in ("facts", "gsm8k") if name in run.config.recipe.eval.tasks]
tested = {name: tasks.load(name, "test", run.mirror()) for name in names}
limit = min(64, run.config.recipe.eval.max_new_tokens)


def tries(stage, task):
    """A stage's greedy answers to the first questions: their parts, and whether each is right."""
    model = checkpoint.load_model(run.stage(stage).checkpoints, cpu.device)
    with Sandbox() as sandbox:
        engine = Engine(model, tokenizer, cpu, lambda source: sandbox.run(source).text)
        questions = Questions(engine, task, limit)
        asked = questions.fitting(range(min(ASKED, len(task))), room=8)
        given = [group[0] for group in questions.answers(asked)]
    right = [bool(task.grade(i, questions.text(a))) for i, a in zip(asked, given, strict=True)]
    return asked, [answer_parts(a.ids, tokenizer) for a in given], right


found = {name: {s: tries(s, task) for s in ("mid", "sft")} for name, task in tested.items()}
for name, by_stage in found.items():
    print(name, {stage: f"{np.mean(right):.0%} right" for stage, (_, _, right) in by_stage.items()})

# %%
figure, panels = plt.subplots(1, len(found), figsize=(3.8 * len(found), 2.4), squeeze=False)
labels = ["mid right", "sft right", "mended", "spoilt"]
looks = ((lesson.GREY, ""), (lesson.BLUE, ""), (lesson.VIOLET, "..."), (lesson.RED, "xx"))
for axes, (name, by_stage) in zip(panels[0], found.items(), strict=True):
    old, new = (np.array(by_stage[stage][2], bool) for stage in ("mid", "sft"))
    counts = [int(kind.sum()) for kind in (old, new, new & ~old, old & ~new)]
    for place, (count, (colour, hatch)) in enumerate(zip(counts, looks, strict=True)):
        bar = axes.bar(place, count, color=colour, hatch=hatch, edgecolor="white")
        axes.bar_label(bar)
    axes.set_xticks(range(4), labels, fontsize=9)
    axes.set(title=f"{name}: {len(old)} questions", ylabel="answers", ylim=(0, 1.15 * len(old)))
    luck = (counts[2] + counts[3]) ** 0.5
    print(f"{name}: net {counts[2] - counts[3]:+d}, by chance alone ±{luck:.1f}")
lesson.show("Facts and word problems: how many mid and sft get right, how many are mended, spoilt")

# %% [markdown]
# Compare the net gain with what went back and forth. Training moves *all* weights a little, and answers
# that were on the edge fall to one side or the other. How much of the gain is luck? Only the questions that
# changed say anything. If SFT did nothing but toss a coin over each of these, mended minus spoilt would be 0
# give or take the root of their number: that is the ± above. A gain of less than two of these is one to be
# quiet about.
#
# So is it worth a stage? In the toy world its data differ little from midtraining's: the same kinds of
# conversations, fewer of them, smaller steps. What it buys is polish, if anything. Four demos of 2026-11-29,
# while the toy world was still growing, gained 13, 11, 20 and −3 of these 120 word problems, and 12, 24, 29 and −15 of
# the 400 that the stage's evaluation asks. (The last gained 2 of these 120 facts, and 8 of all 288.) Even two errors
# are luck now and then, and the cure is more questions, and more runs.
# Where the data of SFT are *better* than what came before, written with care rather than collected, it buys more.
# Look at some of the changes: was a spoilt answer ever right for the right reason? (An "I know no …" about a friend
# would be the habit of declining strangers, gone too far.)


# %%
def told(parts):
    """An answer in one line: a program and its result in brackets."""
    shown = {"text": "{}", "python": "[{} →", "output": " {}] "}
    return "".join(shown[part.kind].format(part.text) for part in parts)[:110]


for name, by_stage in found.items():
    (asked, before, old), (_, after, new) = by_stage["mid"], by_stage["sft"]
    for word, wanted in (("mended", (False, True)), ("spoilt", (True, False))):
        places = [p for p, pair in enumerate(zip(old, new, strict=True)) if pair == wanted]
        for place in places[:1]:
            print(f"{word}: {tested[name].unanswered(asked[place]).turns[-1].text[:150]}")
            for stage, parts in (("mid", before), ("sft", after)):
                print(f"   {stage}: {told(parts[place])!r}")
print("[program → result]")

# %% [markdown]
# ## 7. Answers that ignore their tool
#
# In chapter 06 the model believed its tool, even a liar. Nearly always. Here are answers whose tool was
# honest, and which end in *another* number than it said. **Predict** from the results: what might have put
# them off?

# %%
train = tasks.load("gsm8k", "train", run.mirror())
parts = [p for i in range(min(1000, len(train))) for p in train.conversation(i).messages[-1].parts]
usual = {part.text for part in parts if part.kind == "output"}
counted = {"believes": [], "ignores": []}
for answered in [*found["gsm8k"]["mid"][1], *found["gsm8k"]["sft"][1]]:
    outputs = [part.text for part in answered if part.kind == "output"]
    text = "".join(part.text for part in answered if part.kind == "text")
    if outputs and "####" in text:
        kind = "believes" if tasks.final_number(text) == outputs[-1] else "ignores"
        counted[kind].append((outputs[-1], answered))
for kind, results in counted.items():
    new = sum(output not in usual for output, _ in results)
    print(f"{kind}: {len(results)} answers, {new} with a result unheard of in training answers")
for _, answered in counted["ignores"][:4]:
    print(f"   {told(answered)!r}")

# %% [markdown]
# Compare the first two lines: how often is a result unheard of among those that were believed, and among
# those that were ignored? In earlier demos the ignored ones stood out, five of five in one. They were odd: 0, a
# negative number, three or four digits where two are usual, often from wrong programs such as `27-29`. In
# training a result was always the right one, and the right one was always an ordinary number. So a likely
# reading is this: nobody ever showed the model what to do with "−2 more", and what it knows about *ordinary
# answers* wins over what it knows about copying. It is not distrust. (Likely, not proved: many odd results
# are believed, and an ordinary one may be miscopied: 80, and a digit too many.) You will see such answers again
# in [chapter 08](08_grpo.ipynb), where a wrong one costs something.
#
# ## 8. What does it know?
#
# The stage's evaluation asks, in the toy world, about facts that stand in the pretraining text only. Four-choice
# questions are scored in two ways. By **text**: ask the bare question, and see which of the four texts the
# model finds the likeliest answer. By **letter**, as benchmarks do it: show all four, ask for A, B, C or D,
# and compare the letters' scores. **Predict**: will the two agree?

# %%
scores = launch.stage("eval", run, of="sft", watch=lesson.Live())
choice_scores = {name: score for name, score in scores.items() if "letters" in score}
places = np.arange(len(choice_scores))
figure, axes = plt.subplots(figsize=(7.2, 2.6))
ways = ((-0.2, "text", lesson.BLUE, ""), (0.2, "letters", lesson.VIOLET, "///"))
for shift, way, colour, hatch in ways:
    heights = [100 * score[way] for score in choice_scores.values()]
    look = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": f"by {way}"}
    axes.bar_label(axes.bar(places + shift, heights, 0.38, **look), fmt="%.0f", padding=6)
chance = np.mean([score["chance"] for score in choice_scores.values()])
axes.axhline(100 * chance, color="black", ls="--", label="guessing")
axes.set_xticks(places, [name.replace("mmlu", "toy-MMLU") for name in choice_scores])
axes.set(ylabel="% right", ylim=(0, 115))
axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
lesson.show("Share right by text and by letter on each quiz, and a dashed line at guessing")

# %% [markdown]
# The same model, the same questions, and it may know the answer and still not its letter. To say "C" it has to
# find the right text among four, look which letter stands *beside that text*, and say it. The middle step
# has a name: **induction**, finding an earlier place where the present thing stood and copying what followed
# there. An attention head that does it is an [induction head](glossary.ipynb#induction-head).
#
# Here are the letters' probabilities for some thirty questions, sorted by the right answer. A model that can
# bind letters would light up under the rings. How much do these columns depend on them?


# %%
@torch.no_grad()
def letter_probabilities(model, question, choices, begun=""):
    """Of each letter; begun: what the answer already says."""
    prompt = Conversation.ask(choice_question(question, choices)).prompt(tokenizer)
    logits_V = model(torch.tensor([prompt + tokenizer.encode(begun)]))[0, -1]
    letters = [tokenizer.encode(letter)[0] for letter in LETTERS[: len(choices)]]
    return logits_V[letters].softmax(dim=-1)


# %%
model = checkpoint.load_model(run.stage("sft").checkpoints, cpu.device)
quiz = tasks.load(next(iter(choice_scores)), "test", run.mirror())
rows = [i for i in range(min(32, len(quiz))) if len(quiz.choices(i)) == 4]
rows = [i for i in rows if len(quiz.unanswered(i).prompt(tokenizer)) <= length]
rows.sort(key=quiz.answer)
truth = [(quiz.question(i), quiz.choices(i), quiz.answer(i)) for i in rows]
table_NC = torch.stack([letter_probabilities(model, q, choices) for q, choices, _ in truth])
by_hand = [int(row.argmax()) == right for row, (_, _, right) in zip(table_NC, truth, strict=True)]
assert by_hand == [right for right, _ in by_letter(Engine(model, tokenizer, cpu), quiz, rows)]
print(f"{np.mean(by_hand):.0%} right by letter")

# %%
figure, axes = plt.subplots(figsize=(7.2, 2.2))
figure.colorbar(lesson.heatmap(axes, table_NC.T, rows=list("ABCD"), limits=(0, 1)))
axes.plot(range(len(rows)), [right for _, _, right in truth], "o", mfc="none", color=lesson.RED)
axes.set(
    xlabel="question", ylabel="letter", title="probability of each letter (ring: the right one)"
)
lesson.show("Probabilities of A to D for each question as shades; rings mark the right letters")

# %% [markdown]
# A row that is as pale under its rings as beside them says: not at all. Now compare the choices' *texts*. Each is scored as an answer to the bare question: the sum of the
# log-probabilities of its tokens, the ending marker included.


# %%
@torch.no_grad()
def text_score(model, question, choice):
    rendered = Conversation.ask(question, choice).render(tokenizer, length + 1)
    ids, mask = np.array(rendered.ids), np.array(rendered.loss_mask)
    return -model.nll(batch_of_rows([ids], [mask], len(ids) - 1, tokenizer.bos)).sum().item()


right = []
for question, choices, answer in truth:
    points = [text_score(model, question, choice) for choice in choices]
    right.append(points.index(max(points)) == answer)
assert right == [right for right, _ in by_text(Engine(model, tokenizer, cpu), quiz, rows)]
print(f"{np.mean(right):.0%} right by text")

# %% [markdown]
# ## 9. Let it write first
#
# What if the model may say the answer before it has to name a letter? First it answers the bare question in
# its own words, and *we* look up which choice it named. Then its own lookup is tested: the right text is
# already written as the beginning of its answer, and the letters are compared once more.

# %%
engine = Engine(model, tokenizer, cpu)
bare = [Conversation.ask(question).prompt(tokenizer) for question, _, _ in truth]
said = [tokenizer.decode(ids) for ids in engine.complete(bare, max_new_tokens=16)]
named = [[c for c in cs if c in text] for (_, cs, _), text in zip(truth, said, strict=True)]
right = [n == [cs[a]] for n, (_, cs, a) in zip(named, truth, strict=True)]
print(f"it writes first: {np.mean(right):.0%} of its answers name the right choice and no other")
begun = [letter_probabilities(model, q, cs, f"{cs[a]} ").argmax() for q, cs, a in truth]
hits = [int(letter) == a for letter, (_, _, a) in zip(begun, truth, strict=True)]
print(f"with the right text before its eyes, it finds the letter in {np.mean(hits):.0%}")

# %% [markdown]
# Where the scores by text are high, writing first turns a question that the model fails into one that it
# knows: the answer comes out of its memory in a form it was trained to give. (Larger models gain from the
# same thing when they reason step by step.) What stays hard either way is the last step, the induction: a
# few drills of SFT at this size are not enough for it. Large models do learn to bind letters, and then the
# letters are the cheaper test. A benchmark measures the model *and* the way of asking.
#
# **Exercise 7.5 ★ · 4 minutes · predict** Is it better than guessing?
# A model gets 31 of 100 four-choice questions right; guessing gets 25. The share of right guesses has a
# standard error of √(p(1−p)/n). How many standard errors above guessing is it?

# %% tags=["exercise"]
errors_above_chance = ...

checks.verify("7.5", errors_above_chance)

# %% [markdown]
# <details><summary>Hint 1</summary>Which p belongs under the root, if you ask whether it is only guessing?
# </details>
# <details><summary>Hint 2</summary>p = 0.25, n = 100; then divide the distance by that error.</details>
# <details><summary>Solution</summary>
#
# ```python
# errors_above_chance = (0.31 - 0.25) / (0.25 * 0.75 / 100) ** 0.5
# ```
#
# With a hundred questions, 31 % may well be luck. With 2,400 it is not. Below two, be quiet.
#
# </details>
#
# ## To read
#
# - Ouyang et al., *Training language models to follow instructions with human feedback*,
#   [arXiv:2203.02155](https://arxiv.org/abs/2203.02155)
# - Allal et al., *SmolLM2* (the conversations' source, SmolTalk),
#   [arXiv:2502.02737](https://arxiv.org/abs/2502.02737)
# - Olsson et al., *In-context Learning and Induction Heads*,
#   [arXiv:2209.11895](https://arxiv.org/abs/2209.11895)
# - Hendrycks et al., *Measuring Massive Multitask Language Understanding*,
#   [arXiv:2009.03300](https://arxiv.org/abs/2009.03300)
# - Robinson, Rytting & Wingate, *Leveraging Large Language Models for Multiple Choice Question
#   Answering* (letters, and which models can bind them),
#   [arXiv:2210.12353](https://arxiv.org/abs/2210.12353)
# - Ding et al., *Fewer Truncations Improve Language Modeling* (best-fit packing),
#   [arXiv:2404.10830](https://arxiv.org/abs/2404.10830)
#
# In the code: `nanolib/conversation.py`, `nanolib/data/packing.py`, `nanolib/evals/choices.py`,
# `nanolib/tasks.py`. **Next:** [08, answers that can be graded](08_grpo.ipynb).
