"""CORE: one score for a base model over 22 tasks it was not trained for (DCLM, arXiv:2406.11794).

All tasks are few-shot and scored by likelihood. In multiple_choice (one context, several
continuations) and schema (several contexts, one continuation), the answer is the option with the
highest mean log-probability per token; in language_modeling, the continuation must be what greedy
decoding would produce. Accuracies are centred: guessing scores 0. Questions and few-shot examples
are drawn as in nanochat (October 2025), so that scores can be compared question by question.
"""

from __future__ import annotations

import csv
import io
import json
import random
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml

from nanolib.data.packing import TOKENS_AT_ONCE, groups, padded
from nanolib.engine import Engine
from nanolib.evals import QUESTIONS_AT_ONCE, Grade, Progress, accuracy, notes, rights, score_all
from nanolib.model import GPT, KVCache
from nanolib.runtime import Runtime
from nanolib.tokenizer import Tokenizer

DELIMITER = " "  # between context and continuation, unless core.yaml has one
SHUFFLE_SEED = 1337  # for the order of a task's questions, as in nanochat
EXAMPLES_SEED = 1234  # plus a question's shuffled index: for its few-shot examples
BLIND = " without the question"  # suffix of a score that saw only the choices
# Raised by a damaged or malformed bundle.
UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, LookupError, TypeError, ValueError)


# ---------------------------------------------------------------------------- the bundle


class Question(NamedTuple):
    options: list[tuple[str, str]]  # context and continuation
    gold: int  # index of the right option


@dataclass(frozen=True, kw_only=True)
class CoreTask:
    label: str
    kind: str
    shots: int
    delimiter: str
    chance: float  # accuracy of random guessing, at least 0 and below 1
    questions: Sequence[Question]

    def shuffled(self, limit: int | None = None) -> CoreTask:
        """The task with its first `limit` questions in nanochat's order."""
        questions = list(self.questions)
        random.Random(SHUFFLE_SEED).shuffle(questions)
        return replace(self, questions=questions[:limit])


def load(bundle: Path) -> list[CoreTask]:
    """The tasks of an evaluation bundle, in order; ValueError if it is damaged or malformed."""
    try:
        with zipfile.ZipFile(bundle) as file:
            names = [name for name in file.namelist() if f"/{name}".endswith("/core.yaml")]
            root = min(names, key=len, default="").removesuffix("core.yaml")

            def read(name: str) -> str:
                return file.read(root + name).decode()

            listed = yaml.safe_load(read("core.yaml"))["icl_tasks"]
            table = csv.DictReader(io.StringIO(read("eval_meta_data.csv")))
            chances = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in table}
            return [_task(entry, chances, read) for entry in listed]
    except (*UNREADABLE, yaml.YAMLError) as error:
        no_bundle = f"{bundle} is no evaluation bundle of CORE ({type(error).__name__}: {error})"
        raise ValueError(f"{no_bundle}; copy it again, or set eval.core_problems = 0") from error


def _task(entry: dict, chances: Mapping[str, float], read: Callable[[str], str]) -> CoreTask:
    label, kind, uri = entry["label"], entry["icl_task_type"], entry["dataset_uri"]
    if not 0 <= (chance := chances.get(label, -1)) < 1:
        bounds = f"a random baseline of at least 0 and below 100 percent, got {chances.get(label)}"
        raise ValueError(f"eval_meta_data.csv must give {label} {bounds}")
    delimiter, shots = entry.get("continuation_delimiter", DELIMITER), entry["num_fewshot"][0]
    questions = []
    for number, line in enumerate(filter(str.strip, read(f"eval_data/{uri}").split("\n")), 1):
        try:
            questions.append(question(kind, json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{uri}, row {number}: {error}") from error
    if not questions:
        raise ValueError(f"{uri} has no rows")
    return CoreTask(
        label=label, kind=kind, shots=shots, delimiter=delimiter, chance=chance, questions=questions
    )


def question(kind: str, row: Any) -> Question:
    options, gold = [], 0
    match kind, row:
        case "multiple_choice", {"query": query, "choices": [*choices], "gold": int(gold)}:
            options = [(query, choice) for choice in choices]
        case "schema", {"context_options": [*contexts], "continuation": end, "gold": int(gold)}:
            options = [(context, end) for context in contexts]
        case "language_modeling", {"context": str(context), "continuation": end}:
            options = [(context.strip(), end)]
    texts = all(isinstance(text, str) for option in options for text in option)
    if not texts or not all(end.strip() for _, end in options) or gold not in range(len(options)):
        wanted = "something to score in each option, and a gold among the options"
        raise ValueError(f"a row of a {kind} task must have {wanted}, got {str(row)[:200]}")
    return Question(options, gold)


# ---------------------------------------------------------------------------- from rows to ids


@dataclass(frozen=True)
class Prompt:
    context: list[int]  # ids between the first `head` and the last `tail` may be cut
    continuations: list[list[int]]
    head: int = 1  # BOS
    tail: int = 0

    def cut_to(self, length: int) -> Prompt | None:
        """Cut the context so that all continuations fit in `length` inputs; None if impossible."""
        excess = len(self.context) + max(map(len, self.continuations)) - (length + 1)
        if excess <= 0:
            return self
        if excess > len(self.context) - self.head - self.tail:
            return None
        return replace(self, context=self.context[: self.head] + self.context[self.head + excess :])


def examples(task: CoreTask, index: int) -> list[int]:
    """Indices of the few-shot examples of a question: `task.shots`, or all others if fewer."""
    others = [i for i in range(len(task.questions)) if i != index]
    return random.Random(EXAMPLES_SEED + index).sample(others, min(task.shots, len(others)))


def prompts(task: CoreTask, index: int, tokenizer: Tokenizer, blind: bool = False) -> list[Prompt]:
    """What to score for a question: one context with all choices, or one context per option.

    blind: leave out the question's own context, but not those of the few-shot examples.
    As in the reference, the boundary is found by comparing ids, since a token may straddle it.
    """
    solved = [task.questions[i] for i in examples(task, index)]
    before = "".join(f"{task.delimiter.join(one.options[one.gold])}\n\n" for one in solved)
    options = [("" if blind else context, end) for context, end in task.questions[index].options]
    texts = [before + task.delimiter.join(option) for option in options]
    if task.kind == "language_modeling":
        texts.append((before + options[0][0] + task.delimiter).strip())
    rows = [[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(texts)]
    most = min(map(len, rows[: len(options)])) - 1  # leaves both sides at least one id
    if task.kind == "schema":
        suffix = max(1, min(common_prefix([ids[::-1] for ids in rows]), most))
        return [Prompt(ids[:-suffix], [ids[-suffix:]]) for ids in rows]
    prefix = min(common_prefix(rows), most)
    return [Prompt(rows[0][:prefix], [ids[prefix:] for ids in rows[: len(options)]])]


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    same = (len(set(ids)) == 1 for ids in zip(*rows, strict=False))
    return sum(takewhile(bool, same))


# ---------------------------------------------------------------------------- scoring


class Score(NamedTuple):
    """One continuation: log-probability in nats, length, and whether greedy decoding yields it."""

    logprob: float
    tokens: int
    greedy: bool


def grades(
    engine: Engine, asked: Iterable[tuple[list[Prompt], int]], right: Callable[..., bool]
) -> list[Grade]:
    """Grade questions, given as (prompts, gold), with `right(scores of the options, gold)`."""
    asked = list(asked)
    short = [[prompt.cut_to(engine.context) for prompt in prompts] for prompts, _ in asked]
    fitting = [prompt for prompts in short if None not in prompts for prompt in prompts if prompt]
    scores = iter(score(engine.model, fitting, engine.runtime))
    found: list[Grade] = []
    for (prompts, gold), cut in zip(asked, short, strict=True):
        if None in cut:
            found.append((False, "too long"))
            continue
        options = [one for _ in cut for one in next(scores)]
        found.append((right(options, gold), "cut" * (cut != prompts)))
    return found


@torch.inference_mode()
def score(
    model: GPT, prompts: Sequence[Prompt], runtime: Runtime, tokens_at_once: int = TOKENS_AT_ONCE
) -> list[list[Score]]:
    """Score the continuations of each prompt; prompts of similar length share a batch.

    Each context is read once; its continuations start from copies of its KV cache.
    """
    scores: list[list[Score]] = [[] for _ in prompts]
    lengths = [len(prompt.context) + sum(map(len, prompt.continuations)) for prompt in prompts]
    for group in groups(lengths, tokens_at_once):
        contexts = [prompts[i].context[:-1] for i in group]
        each = [(row, ids) for row, i in enumerate(group) for ids in prompts[i].continuations]
        owners, targets = zip(*each, strict=True)
        inputs = [[prompts[group[row]].context[-1], *ids[:-1]] for row, ids in each]
        pad = prompts[group[0]].context[0]
        contexts_PT, inputs_BS = padded(contexts, pad), padded(inputs, pad)
        length = contexts_PT.shape[1] + inputs_BS.shape[1]
        read, cache = (
            KVCache(model.config, rows, length, runtime.device, runtime.dtype)
            for rows in (len(contexts), len(inputs))
        )
        sizes = [len(ids) for ids in targets]
        used_BS = torch.arange(inputs_BS.shape[1]) < torch.tensor(sizes)[:, None]
        target_N = torch.tensor([id for ids in targets for id in ids], device=runtime.device)
        with runtime.autocast():
            model.hidden(contexts_PT.to(runtime.device), cache=read)
            read.advance([len(ids) for ids in contexts])
            cache.copy_rows(read, owners)
            hidden_BSD = model.hidden(inputs_BS.to(runtime.device), cache=cache)
            logits_NV = model.logits(hidden_BSD[used_BS.to(runtime.device)])
        nll_N = F.cross_entropy(logits_NV, target_N, reduction="none").cpu().double()
        hit_N = (logits_NV.argmax(1) == target_N).cpu()
        for row, nll, hit in zip(owners, nll_N.split(sizes), hit_N.split(sizes), strict=True):
            scores[group[row]].append(Score(-float(nll.sum()), len(nll), bool(hit.all())))
    return scores


# ---------------------------------------------------------------------------- the score


def evaluate(engine: Engine, task: CoreTask, progress: Progress | None = None) -> dict[str, Any]:
    """Accuracy on all questions of a task, raw and centred, and how many were cut or too long.

    For multiple choice, also the accuracy without the question.
    """
    ways = (False, True) if task.kind == "multiple_choice" else (False,)

    def grade(some: Sequence[int]) -> list[tuple[Grade, ...]]:
        def asked(blind: bool) -> list[tuple[list[Prompt], int]]:
            read = partial(prompts, task, tokenizer=engine.tokenizer, blind=blind)
            return [(read(i), task.questions[i].gold) for i in some]

        return list(zip(*(grades(engine, asked(blind), right) for blind in ways), strict=True))

    def right(scores: Sequence[Score], gold: int) -> bool:
        if task.kind == "language_modeling":
            return scores[0].greedy
        return highest([score.logprob / score.tokens for score in scores]) == gold

    questions = range(len(task.questions))
    found = score_all(grade, questions, QUESTIONS_AT_ONCE, engine.runtime, progress)
    graded, *control = zip(*found, strict=True)
    scores: dict[str, Any] = {"accuracy": accuracy(graded)}
    scores |= {f"accuracy{BLIND}": accuracy(blind) for blind in control}
    scores |= {"centred": centred(scores["accuracy"], task.chance), "chance": task.chance}
    scores |= {"questions": len(graded), "shots": task.shots, "cut": 0}
    return scores | notes(graded) | {"right": {"accuracy": rights(graded)}}


def highest(scores: Sequence[float]) -> int:
    """The index of the highest score; the first one if tied."""
    return max(range(len(scores)), key=scores.__getitem__)


def centred(accuracy: float, chance: float) -> float:
    """0 for guessing, 1 for everything right."""
    return (accuracy - chance) / (1 - chance)


def core(results: Mapping[str, Mapping[str, Any]]) -> float:
    """CORE: the mean centred accuracy over the tasks, from the results of `evaluate`."""
    return sum(scores["centred"] for scores in results.values()) / len(results)
