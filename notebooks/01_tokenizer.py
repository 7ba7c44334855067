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
# [▶ Open this chapter in Colab](https://colab.research.google.com/github/OWNER/nanolib/blob/main/notebooks/01_tokenizer.ipynb): nothing to install on your machine.

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
# # 01 · Text becomes numbers
#
# A model reads and writes whole numbers. This chapter takes the run's text, learns which pieces of it
# deserve a number of their own, and stores all of it as one long list of numbers.
#
# **You will learn** how byte pair encoding finds its tokens, why text is split into words first, what
# a larger vocabulary buys, and what a token shard is.
#
# **Takes** ten minutes to read and about half a minute to run in profile `demo`, on any CPU. Stages:
# `data`, `tokenizer`, `shards`.

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import base64
import codecs
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import regex
import tiktoken

import lesson
from nanolib import config, hub, launch
from nanolib.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer

run = lesson.begin(profile, run, overrides)

# %% [markdown]
# ## The text
#
# The `data` stage writes the toy world, or finds the text you pointed it to. From here on nothing
# knows which of the two it was: text is a folder of parquet files with one column, `text`. The last
# file is never trained on. It is there to measure.

# %%
launch.stage("data", run, watch=lesson.Live())
files = hub.text_files(run.config, run.mirror())
documents = list(islice(hub.documents(files.train[0]), 300))
for document in documents[:3]:
    print(document[:240], end="\n---\n")

# %% [markdown]
# ## Bytes: numbers that are already there
#
# On disk, text is bytes: numbers from 0 to 255. English letters take one byte, others two to four. So
# 256 tokens are enough to write anything, in any script, emoji included. Nothing is ever unknown.

# %%
for text in ("cat", "naïve", "€", "😀"):
    print(f"{text}: {list(text.encode())}")

# %% [markdown]
# But bytes are many, and every token costs a pass through the model. Pieces that occur often should
# have a number of their own. Which ones? **Byte pair encoding** asks the text: find the pair of
# neighbours that occurs most often, make it a new token, start over.
#
# First, text is cut into words by a pattern, and pairs never reach across a cut. Otherwise `dog.`,
# `dog,` and `dog!` would each take a number. Digits go in groups of at most two.

# %%
sentence = "Don't count 12345 sheep,\nplease!  They're asleep."
words = regex.findall(PATTERN, sentence)
lesson.tokens(words)
assert "".join(words) == sentence  # nothing is lost

# %% [markdown]
# ## Byte pair encoding in 25 lines
#
# Count pairs, take the most frequent (of equals the smallest), replace it everywhere, repeat.


# %%
def merge(ids, pair, new):
    """Replace each occurrence of a pair, from left to right, by a new id."""
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


print(merge([5, 6, 7, 5, 6], (5, 6), 256))


# %%
def train(texts, number_of_merges):
    counts = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = {word: list(word.encode()) for word in counts}
    merges = []
    for new in range(256, 256 + number_of_merges):
        pairs = Counter()
        for word, ids in words.items():
            for pair in pairwise(ids):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = {word: merge(ids, best, new) for word, ids in words.items()}
        merges.append(best)
    return merges


merges = train(documents, 100)
print(len(merges), "merges; the first three:", merges[:3])

# %% [markdown]
# The real trainer is written in Rust. It keeps the counts up to date instead of counting again after
# every merge, so it manages gigabytes where ours manages pages. The result must be the same, to the
# last tie:

# %%
small = Tokenizer.train(documents, vocab_size=256 + 100 + len(SPECIAL_TOKENS))
assert list(small.merges) == merges
for number, (left, right) in enumerate(merges[:6], start=256):
    parts = [small.decode([id]) for id in (left, right, number)]
    print(f"{number}: {parts[0]!r} + {parts[1]!r} = {parts[2]!r}")

# %% [markdown]
# ## A race
#
# How much does that bring? Both trainers on the same text. The naive one looks at every word again for
# every merge. The fast one keeps, for each pair, the list of places where it occurs, and a heap with
# the most frequent pair on top; so one merge costs only what it changes.

# %%
clock, seconds = time.perf_counter, {}
for name, trainer in (
    ("naive", train),
    ("nanolib", lambda texts, n: Tokenizer.train(texts, n + 265)),
):
    begin = clock()
    trainer(documents, 100)
    seconds[name] = clock() - begin
ratio = seconds["naive"] / seconds["nanolib"]
print(f"{ratio:.0f} times as fast, on a text this small")

# %% [markdown]
# Against the trainers that others use, a longer text is needed. This is the table of
# `nanolib bench tokenizer` that is kept in `runs/`: its date, machine and text stand above it. A race
# on two threads: the longer the bar, the longer the wait.

# %%
table = (config.REPOSITORY / "runs" / "bench" / "tokenizer.md").read_text()
print(table.split(", load")[0].strip())
cells = [line.split("|")[1:4] for line in table.splitlines() if line.count("|") == 6]
race = {name.strip(): float(s.split()[0]) for name, threads, s in cells if threads.strip() == "2"}
figure, axes = plt.subplots(figsize=(7.2, 1.8))
bars = axes.barh(list(race), list(race.values()), color=[lesson.BLUE, *[lesson.GREY] * 3])
axes.bar_label(bars, fmt="%.1f s", padding=3)
axes.invert_yaxis()
plt.show()

# %% [markdown]
# Where does the time go? On one thread most of it is reading, and little of that is finding the words (the
# pattern is written by hand instead of run by a regex engine): counting them in a hash table takes longest.
# Reading is shared out over threads, merging is not; with two of them it is the larger part.

# %%
rust = table.split("```")[1].strip().splitlines()
print("\n".join(line for line in rust if "1 threads" in line or "merges" in line))

# %% [markdown]
# ## Encoding: replay the merges
#
# To encode a new text, apply the merges in the order in which they were learned. nanolib leaves that
# to `tiktoken`; for whole shards the crate has an encoder of its own, on several threads, with the same
# ids (`Tokenizer.encode_flat`).


# %%
def encode(text, merges):
    ids = []
    for word in regex.findall(PATTERN, text):
        piece = list(word.encode())
        for new, pair in enumerate(merges, start=256):
            piece = merge(piece, pair, new)
        ids += piece
    return ids


assert encode(documents[0], merges) == small.encode(documents[0])
print(len(documents[0].encode()), "bytes are", len(small.encode(documents[0])), "tokens")

# %% [markdown]
# ## The real stage
#
# Now the run's own tokenizer, on the run's own training text. A process of its own does the work;
# this cell watches.

# %%
result = launch.stage("tokenizer", run, watch=lesson.Live())
tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
print(f"{tokenizer.vocab_size:,} tokens, {result['validation_bytes_per_token']:.2f} bytes a token")

# %% [markdown]
# A document as the model will see it. A dot is a space; colours only show where tokens end.

# %%
example = next(hub.documents(files.validation))[:300]
pieces = [tokenizer.decode([id]) for id in tokenizer.encode(example)]
lesson.tokens(pieces)

# %% [markdown]
# ## What does a larger vocabulary buy?
#
# A tokenizer with fewer merges is the same list, cut short. Left: what each doubling of the vocabulary
# buys. It also doubles the model's two tables, so at some point it no longer pays. Right: long tokens
# fill the *vocabulary*, but most of the *text* is written with short and frequent ones.

# %%
sample = list(islice(hub.documents(files.validation), 60))
size = sum(len(text.encode()) for text in sample)
kept = [0, *(2**n for n in range(4, 17) if 2**n < len(tokenizer.merges)), len(tokenizer.merges)]
shorter = [Tokenizer(tokenizer.merges[:number]) for number in kept]
lengths = [sum(map(len, cut.encode_batch(sample))) for cut in shorter]
print(f"{size:,} bytes are from {lengths[0]:,} down to {lengths[-1]:,} tokens")

# %%
figure, (left, right) = plt.subplots(1, 2)
left.plot([256 + number for number in kept], [size / length for length in lengths], "o-")
left.set_xscale("log", base=2)
left.set(xlabel="vocabulary", title="bytes a token")
used = np.concatenate(tokenizer.encode_batch(sample))
bins = np.arange(0.5, 17)
merged = tokenizer.byte_lengths[256 : -len(SPECIAL_TOKENS)]
right.hist(merged, bins, density=True, alpha=0.6, label="in the vocabulary")
right.hist(tokenizer.byte_lengths[used], bins, density=True, alpha=0.6, label="in the text")
right.set(xlabel="bytes", title="how long tokens are (share)")
right.legend()
plt.show()

# %% [markdown]
# Where the files of GPT-2's and GPT-4's tokenizers are at hand (in a mirror's `encodings/`), here is
# how they do on the same text. Theirs are much larger and know the whole web; ours knows this text.


# %%
def published(name: str, pattern: str) -> tiktoken.Encoding | None:
    """Read a .tiktoken file, where it is: a token in base64 and its rank on every line."""
    path = (run.mirror() or Path()) / f"encodings/{name}.tiktoken"
    if not path.is_file():
        return None
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


# %%
splits = {  # GPT-2's and GPT-4's: how each splits text into words
    "r50k_base": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s++$|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
}
print(f"{'nanolib':11} {size / lengths[-1]:.2f} bytes a token")
for name, pattern in splits.items():
    if encoding := published(name, pattern):
        count = sum(map(len, encoding.encode_ordinary_batch(sample)))
        print(f"{name:11} {size / count:.2f} bytes a token")

# %% [markdown]
# ## Special tokens are not text
#
# Nine more numbers mark structure: where a document begins, who speaks. They stand for no bytes. If a
# user *types* `<|bos|>`, that is ordinary text, seven characters, and must never become the marker:
# otherwise anybody could forge a conversation.

# %%
typed = tokenizer.encode("<|bos|>")
lesson.tokens([tokenizer.decode([id]) for id in typed])
assert tokenizer.bos not in typed
print("the marker itself:", tokenizer.bos, " specials:", *SPECIAL_TOKENS[:4], "…")

# %% [markdown]
# ## A token may be part of a character
#
# A character outside the vocabulary is several tokens, and none of them can be printed alone. Who
# streams an answer must wait until a character is complete. Python's incremental decoder does:

# %%
ids = tokenizer.encode("a € 😀")
print("one by one:", [tokenizer.decode([id]) for id in ids])
decoder = codecs.getincrementaldecoder("utf-8")()
print("streamed:  ", [decoder.decode(tokenizer.token_bytes(id)) for id in ids])

# %% [markdown]
# ## Shards: the text as one long list
#
# The last stage of this chapter encodes everything once. Each parquet file becomes one flat array of
# 16-bit numbers, every document with a `<|bos|>` in front. Training maps the file into memory and
# takes slices: no queue, no loader, no waiting.

# %%
result = launch.stage("shards", run, watch=lesson.Live())
print(f"{result['train_tokens']:,} tokens in {result['train_documents']:,} documents to train on")
print(f"{result['validation_tokens']:,} tokens to measure on")

# %%
shard = np.load(run.stage("shards").path / f"{files.train[0].stem}.npy", mmap_mode="r")
starts = np.flatnonzero(shard == tokenizer.bos)
assert tokenizer.decode(shard[starts[0] + 1 : starts[1]]) == documents[0]
print(
    f"{len(shard):,} numbers of {shard.dtype}; the first document is",
    shard[: starts[1]].tolist()[:12],
)

# %% [markdown]
# How long are documents, and how often is each token used? In natural text, frequencies fall like a
# power of the rank (Zipf's law), which on these axes is a straight line. A toy world has few rare
# words: its line is short and ends abruptly. At the far right any line falls off: there stand tokens that
# this file hardly has, such as markers and rare bytes. (Those that never occur are drawn at one half.)

# %%
figure, (left, right) = plt.subplots(1, 2)
left.hist(np.diff(starts), bins=40)
left.set(xlabel="tokens in a document", title="documents")
counts = np.sort(np.bincount(shard, minlength=tokenizer.vocab_size))[::-1]
right.loglog(np.arange(1, len(counts) + 1), np.maximum(counts, 0.5))
right.set(xlabel="rank of the token", title="times used")
plt.show()

# %% [markdown]
# ## Exercises
#
# **1.** Decoding needs nothing but the merges. Write it: from ids and merges to bytes. (Id 256 is the
# first merge, and its two halves may be merges themselves.)


# %% tags=["exercise"]
def to_bytes(ids, merges):
    return ...


lesson.check(to_bytes, ([104, 105], [], b"hi"), (small.encode("sheep"), merges, b"sheep"))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def to_bytes(ids, merges):
#     pieces = [bytes([byte]) for byte in range(256)]
#     for left, right in merges:
#         pieces.append(pieces[left] + pieces[right])
#     return b"".join(pieces[id] for id in ids)
# ```
#
# </details>
#
# **2.** How many bytes does each token stand for? Somebody measured it as
# `len(tokenizer.decode([id]).encode())`. For some tokens that is wrong. Write it right. Your function
# gets the bytes of a token, as `tokenizer.token_bytes(id)` gives them, and what a decoder makes of
# them; it says by how many bytes the wrong way is off.


# %% tags=["exercise"]
def off_by(token_bytes):
    return ...


lesson.check(off_by, (b"sheep", 0), (b"\xe2", 2), (b"\xe2\x82", 1), ("é".encode(), 0))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def off_by(token_bytes):
#     wrong = len(token_bytes.decode(errors="replace").encode())
#     return wrong - len(token_bytes)
# ```
#
# A part of a character decodes to `�`, which is three bytes in UTF-8. Scores "per byte" that count
# this way are flattered. nanolib measures on bytes (`Tokenizer.byte_lengths`).
#
# </details>
#
# **3.** By hand: a text has the words `hug` (10 times), `pug` (5), `pun` (12), `bun` (4) and `hugs`
# (5). Which pair is merged first? Answer with two letters, such as `("p", "u")`.

# %% tags=["exercise"]
first = ...

lesson.check(first, ("u", "g"))

# %% [markdown]
# <details><summary>Solution</summary>
#
# `u`+`g` occurs 10 + 5 + 5 = 20 times, `p`+`u` 17 times, `u`+`n` 16, `h`+`u` 15.
#
# ```python
# first = ("u", "g")
# ```
#
# </details>
#
# ## To read
#
# - Sennrich, Haddow & Birch, *Neural Machine Translation of Rare Words with Subword Units* (byte pair
#   encoding for models), [arXiv:1508.07909](https://arxiv.org/abs/1508.07909)
# - Wang, Cho & Gu, *Neural Machine Translation with Byte-Level Subwords*,
#   [arXiv:1909.03341](https://arxiv.org/abs/1909.03341)
# - Dagan, Synnaeve & Rozière, *Getting the most out of your tokenizer*,
#   [arXiv:2402.01035](https://arxiv.org/abs/2402.01035)
#
# In the code: `rust_tokenizer/src/bpe.rs`, `nanolib/tokenizer.py`, `nanolib/stages/text.py`.
# **Next:** 02, the function that reads these numbers.
