"""CORE: one score for a base model over 22 tasks it was not trained for (DCLM, arXiv:2406.11794).

Nothing is asked for in words: the model only says how likely a text is. A task is of one kind:

* multiple_choice: one context, several continuations; the likeliest one (mean log-probability
  per token, which does not favour short ones) is the answer;
* schema: several contexts, one continuation; the context after which it is likeliest;
* language_modeling: one continuation, right if the model, always taking its likeliest token,
  would write exactly that.

Solved examples stand before each question. Accuracies are centred, so that guessing scores 0 and
knowing everything 1, and CORE is their mean. Tasks, examples and random baselines come from an
evaluation bundle (a zip with core.yaml, eval_meta_data.csv and eval_data/).
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanolib.data.packing import groups, padded
from nanolib.model import GPT, KVCache
from nanolib.runtime import Runtime, seed_of
from nanolib.tokenizer import Tokenizer

COLUMNS: dict[str, dict[str, type]] = {  # of each kind of task
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
DELIMITER = " "  # between context and continuation where core.yaml names none
SEED = 0  # the same draws for every run: scores of two runs are then of the same questions
TOKENS_AT_ONCE = 16_384
POSITIONS_AT_ONCE = 2_048  # whose logits are in memory together
QUESTIONS_AT_ONCE = 128  # tokenised, sorted by length and scored between two calls of `progress`


# ---------------------------------------------------------------------------- the bundle


@dataclass(frozen=True, kw_only=True)
class CoreTask:
    """One task of the bundle. `chance` is what a guesser gets right, from 0 to below 1."""

    label: str
    kind: str
    shots: int
    delimiter: str
    chance: float
    rows: Sequence[Mapping[str, Any]]

    def pairs(self, item: int) -> list[tuple[str, str]]:
        """Everything row `item` may say, as (context, continuation)."""
        row = self.rows[item]
        if self.kind == "multiple_choice":
            return [(row["query"], choice) for choice in row["choices"]]
        if self.kind == "schema":
            return [(context, row["continuation"]) for context in row["context_options"]]
        return [(row["context"].strip(), row["continuation"])]

    def gold(self, item: int) -> int:
        """Which of the pairs is true."""
        return self.rows[item].get("gold", 0)


def load(bundle: Path) -> list[CoreTask]:
    """The tasks of an evaluation bundle, in the order of its core.yaml.

    Raises ValueError that names the file and what is missing or malformed in it.
    """
    import yaml

    try:
        with zipfile.ZipFile(bundle) as file:
            names = [name for name in file.namelist() if f"/{name}".endswith("/core.yaml")]
            root = min(names, key=len, default="").removesuffix("core.yaml")

            def read(name: str) -> str:
                if root + name not in file.namelist():
                    raise ValueError(f"there is no {name}")
                return file.read(root + name).decode()

            listed = yaml.safe_load(read("core.yaml"))["icl_tasks"]
            chances = _chances(read("eval_meta_data.csv"))
            return [_task(entry, chances, read) for entry in listed]
    except (KeyError, TypeError, IndexError, yaml.YAMLError) as error:
        problem = f"core.yaml is malformed ({error!r})"
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        problem = str(error)
    raise ValueError(f"{bundle} is no evaluation bundle of CORE ({problem}): copy it again")


def _chances(table: str) -> dict[str, float]:
    """Task -> the share that a guesser gets right."""
    chances = {}
    for row in csv.DictReader(io.StringIO(table)):
        label, percent = str(row.get("Eval Task")), row.get("Random baseline")
        try:
            chances[label] = float(percent or "") / 100
        except ValueError as error:
            raise ValueError(
                f"eval_meta_data.csv needs columns 'Eval Task' and 'Random baseline' (percent); "
                f"the latter of {label} is {percent!r}"
            ) from error
    return chances


def _task(
    entry: Mapping[str, Any], chances: Mapping[str, float], read: Callable[[str], str]
) -> CoreTask:
    label, kind, uri = entry["label"], entry["icl_task_type"], entry["dataset_uri"]
    if kind not in COLUMNS:
        raise ValueError(f"core.yaml: {label} is a {kind!r}; known are {', '.join(COLUMNS)}")
    if not 0 <= chances.get(label, -1) < 1:
        raise ValueError(
            f"eval_meta_data.csv must give {label} a random baseline of at least 0 and below 100 "
            f"percent, got {chances.get(label)}"
        )
    task = CoreTask(
        label=label,
        kind=kind,
        shots=entry["num_fewshot"][0],
        delimiter=entry.get("continuation_delimiter", DELIMITER),
        chance=chances[label],
        rows=list(_rows(read(f"eval_data/{uri}"), kind, uri)),
    )
    for item in range(len(task.rows)):
        _check(task, item, f"{uri}, row {item + 1}")
    return task


def _check(task: CoreTask, item: int, where: str) -> None:
    pairs = task.pairs(item)
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError(f"{where}: options must be text, got {pairs}")
    if not all(continuation.strip() for _, continuation in pairs):
        raise ValueError(f"{where}: nothing to score after {pairs[0][0]!r}")
    if task.gold(item) not in range(len(pairs)):
        raise ValueError(f"{where}: gold is {task.gold(item)}, of {len(pairs)} options")


def _rows(text: str, kind: str, uri: str) -> Iterator[dict[str, Any]]:
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{uri} has no rows")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{uri}, row {number} is not JSON: {error}") from error
        for column, wanted in COLUMNS[kind].items():
            if not isinstance(row, dict) or not isinstance(row.get(column), wanted):
                raise ValueError(f"{uri}, row {number} needs a {wanted.__name__} {column!r}")
        yield row


# ---------------------------------------------------------------------------- from rows to ids


@dataclass(frozen=True)
class Prompt:
    """Ids of a context, BOS first, and of what may follow it: those alone are scored."""

    context: list[int]
    continuations: list[list[int]]

    @property
    def tokens(self) -> int:
        """Ids the model reads for it: the context once, then each continuation."""
        return len(self.context) + sum(map(len, self.continuations))

    def cut_to(self, length: int) -> Prompt:
        """Shortened from the left, after BOS, until `length` inputs and one target fit a row."""
        longest = max(map(len, self.continuations))
        extra = len(self.context) + longest - (length + 1)
        if extra <= 0:
            return self
        kept = self.context[:1] + self.context[1 + extra :]
        return Prompt(kept, [ids[:length] for ids in self.continuations])


def examples(task: CoreTask, item: int, seed: int = SEED) -> list[int]:
    """Rows shown solved before row `item`, never itself: `task.shots`, or as many as there are.

    They depend on (seed, task, item) alone, whatever else is asked.
    """
    others = len(task.rows) - 1
    draw = np.random.default_rng(seed_of(seed, "core examples", task.label, item))
    chosen = draw.choice(others, size=min(task.shots, others), replace=False)
    return [int(i) + (i >= item) for i in chosen]


def prompts(task: CoreTask, item: int, tokenizer: Tokenizer, seed: int = SEED) -> list[Prompt]:
    """What to score for row `item`: a context with all choices, or one context an option.

    Which ids are the continuation is found by comparing ids, as the reference does: a token may
    straddle the place where the texts part.
    """
    solved = [task.pairs(i)[task.gold(i)] for i in examples(task, item, seed)]
    before = "".join(f"{task.delimiter.join(pair)}\n\n" for pair in solved)
    pairs = task.pairs(item)
    texts = [before + task.delimiter.join(pair) for pair in pairs]
    if task.kind == "language_modeling":
        texts.append((before + pairs[0][0] + task.delimiter).strip())
    rows = [[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(texts)]
    fewest = min(map(len, rows[: len(pairs)])) - 1  # both parts keep an id of each row
    if task.kind == "schema":
        suffix = max(1, min(common_suffix(rows), fewest))
        return [Prompt(ids[:-suffix], [ids[-suffix:]]) for ids in rows]
    prefix = min(common_prefix(rows), fewest)
    return [Prompt(rows[0][:prefix], [ids[prefix:] for ids in rows[: len(pairs)]])]


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows begin with."""
    for place, ids in enumerate(zip(*rows, strict=False)):
        if len(set(ids)) > 1:
            return place
    return min(map(len, rows))


def common_suffix(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows end with."""
    return common_prefix([row[::-1] for row in rows])


# ---------------------------------------------------------------------------- scoring


class Score(NamedTuple):
    """Of one continuation: its log-probability in nats, its ids, whether each was the likeliest."""

    logprob: float
    tokens: int
    greedy: bool


@torch.inference_mode()
def score(
    model: GPT,
    asked: Sequence[Prompt],
    runtime: Runtime,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> list[list[Score]]:
    """For each prompt the scores of its continuations; prompts of similar length go together."""
    scores: list[list[Score]] = [[] for _ in asked]
    for group in groups([prompt.tokens for prompt in asked], tokens_at_once):
        found = iter(_score_group(model, [asked[i] for i in group], runtime))
        for i in group:
            scores[i] = [next(found) for _ in asked[i].continuations]
    return scores


def _score_group(model: GPT, asked: Sequence[Prompt], runtime: Runtime) -> list[Score]:
    """Read each context once, then all continuations after copies of its keys and values.

    A continuation's inputs are the context's last id and its own ids but the last.
    """
    contexts = [prompt.context[:-1] for prompt in asked]
    targets = [ids for prompt in asked for ids in prompt.continuations]
    owners = [i for i, prompt in enumerate(asked) for _ in prompt.continuations]
    inputs = [[asked[i].context[-1], *ids[:-1]] for i, ids in zip(owners, targets, strict=True)]
    pad = asked[0].context[0]
    contexts_PT, inputs_BS = padded(contexts, pad), padded(inputs, pad)
    with runtime.autocast():
        cache = _cache(model, contexts_PT.shape, inputs_BS.shape[1], runtime)
        model.hidden(contexts_PT.to(runtime.device), cache=cache)
        cache.advance([len(ids) for ids in contexts])
        if len(owners) > len(asked):
            shape = (len(owners), contexts_PT.shape[1])
            read, cache = cache, _cache(model, shape, inputs_BS.shape[1], runtime)
            cache.copy_rows(read, owners)
        hidden_BSD = model.hidden(inputs_BS.to(runtime.device), cache=cache)
        return _scores(model, hidden_BSD, targets)


def _cache(model: GPT, shape: Sequence[int], more: int, runtime: Runtime) -> KVCache:
    rows, length = shape
    return KVCache(model.config, rows, length + more, runtime.device, runtime.dtype)


def _scores(model: GPT, hidden_BSD: Tensor, targets: Sequence[Sequence[int]]) -> list[Score]:
    """Scores of the targets after the hidden states before them; a row's tail is padding."""
    sizes = np.array([len(ids) for ids in targets])
    device = hidden_BSD.device
    used_BS = torch.arange(hidden_BSD.shape[1]) < torch.from_numpy(sizes)[:, None]
    hidden_ND = hidden_BSD[used_BS.to(device)]
    target_N = torch.tensor([token for ids in targets for token in ids], device=device)
    parts: list[tuple[Tensor, Tensor]] = []
    for some_MD, target_M in zip(
        hidden_ND.split(POSITIONS_AT_ONCE), target_N.split(POSITIONS_AT_ONCE), strict=True
    ):
        logits_MV = model.logits(some_MD)
        nll_M = F.cross_entropy(logits_MV, target_M, reduction="none")
        parts.append((nll_M, logits_MV.argmax(1) == target_M))
    nll_N, hit_N = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    starts = np.cumsum(sizes) - sizes
    logprobs = -np.add.reduceat(nll_N.astype(np.float64), starts)
    greedy = np.logical_and.reduceat(hit_N, starts)
    return [
        Score(float(sum_), int(size), bool(all_))
        for sum_, size, all_ in zip(logprobs, sizes, greedy, strict=True)
    ]


# ---------------------------------------------------------------------------- the score


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    task: CoreTask,
    runtime: Runtime,
    limit: int | None = None,
    seed: int = SEED,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Accuracy, also centred, on `limit` rows of a task drawn by `seed` (None: all of them).

    Shared among the ranks. `cut` counts questions that did not fit the model's context and lost
    the beginning of their examples. `progress(done, total)` is called before each round of this
    rank's questions and may raise to stop.
    """
    draw = np.random.default_rng(seed_of(seed, "core", task.label))
    drawn = draw.permutation(len(task.rows))[:limit].tolist()
    mine = drawn[runtime.rank :: runtime.world_size]
    right = cut = 0
    for start in range(0, len(mine), QUESTIONS_AT_ONCE):
        if progress is not None:
            progress(start, len(mine))
        items = mine[start : start + QUESTIONS_AT_ONCE]
        whole = [prompts(task, item, tokenizer, seed) for item in items]
        asked = [[prompt.cut_to(model.config.sequence_len) for prompt in row] for row in whole]
        cut += sum(row != short for row, short in zip(whole, asked, strict=True))
        found = iter(score(model, [prompt for row in asked for prompt in row], runtime))
        for item, row in zip(items, asked, strict=True):
            right += _is_right(task, item, [one for _ in row for one in next(found)])
    counts = torch.tensor([right, cut], device=runtime.device)
    right, cut = runtime.sum(counts).tolist()
    accuracy = right / len(drawn)
    return {
        "accuracy": accuracy,
        "centred": centred(accuracy, task.chance),
        "chance": task.chance,
        "questions": len(drawn),
        "shots": task.shots,
        "cut": cut,
    }


def _is_right(task: CoreTask, item: int, scores: Sequence[Score]) -> bool:
    if task.kind == "language_modeling":
        return scores[0].greedy
    means = [logprob / tokens for logprob, tokens, _ in scores]
    return means.index(max(means)) == task.gold(item)


def centred(accuracy: float, chance: float) -> float:
    """0 for guessing, 1 for everything right; below 0 for worse than guessing."""
    return (accuracy - chance) / (1 - chance)


def core(results: Mapping[str, Mapping[str, Any]]) -> float:
    """CORE: the mean centred accuracy of what `evaluate` found for each task."""
    if not results:
        raise ValueError("CORE is a mean over tasks, and there is none")
    return sum(scores["centred"] for scores in results.values()) / len(results)
