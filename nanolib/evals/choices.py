"""Scores of a talking model: four choices, by letter and by text, and answers in words.

By letter, as MMLU and ARC are scored in the original: the question with its choices is asked and
the letters' logits compared. By text: the bare question is asked and each choice's text scored as
the answer by its log-probability, ``<|assistant_end|>`` included. In words: what the engine says is
graded, with the tool it has. Work is shared among the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nanolib.conversation import LETTERS, Conversation, Message, answer_parts, choice_question
from nanolib.data.packing import batch_of_rows, groups, padded
from nanolib.engine import Engine
from nanolib.evals import programs
from nanolib.evals.core import centred
from nanolib.runtime import Runtime
from nanolib.tasks import ChoiceTask, GradedTask, HumanEval, Task
from nanolib.tools import Sandbox

TOKENS_AT_ONCE = 16_384
QUESTIONS_AT_ONCE = 128  # between two calls of `progress`
SHOWN = 8  # answers kept to be looked at
RIGHT = (True, "passed")  # outcomes of grading
TOO_LONG = "too long"
PROGRAM_SECONDS = 6  # of a function with its tests

Graded = tuple[int, str, str, bool | str]  # row, question, answer as it was said, outcome


def evaluate(
    engine: Engine,
    task: Task,
    runtime: Runtime,
    limit: int | None = None,
    max_new_tokens: int = 256,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """All scores of one task on its first `limit` rows (None: all).

    `progress(done, total)` is called before each round of this rank's questions, and may raise to
    stop. Raises ValueError for a task that cannot be graded.
    """
    count = len(task) if limit is None else min(limit, len(task))
    rounds = _rounds(range(runtime.rank, count, runtime.world_size), progress)
    if isinstance(task, ChoiceTask):
        right = np.zeros(2)
        for rows in rounds:
            right += sum(by_letter(engine, task, rows)), sum(by_text(engine, task, rows))
        letters, text = _summed(right, runtime)
        chance = float(np.mean([1 / len(task.choices(i)) for i in range(count)]))
        return {
            "text": text / count,
            "letters": letters / count,
            "chance": chance,
            "questions": count,
        }

    def words(grade: Callable[[int, str], bool | str]) -> list[Graded]:
        return [g for rows in rounds for g in in_words(engine, task, rows, max_new_tokens, grade)]

    if isinstance(task, HumanEval):
        with Sandbox(seconds=PROGRAM_SECONDS) as sandbox:
            graded = words(lambda i, said: programs.check(task.row(i), said, sandbox).outcome)
    elif isinstance(task, GradedTask):
        graded = words(task.grade)
    else:
        raise ValueError(f"task {task.name!r} has nothing to grade answers by; leave it out")
    return _of_words([entry for part in runtime.gather(graded) for entry in part])


def _rounds(
    rows: Sequence[int], progress: Callable[[int, int], object] | None
) -> Iterator[Sequence[int]]:
    for start in range(0, len(rows), QUESTIONS_AT_ONCE):
        if progress is not None:
            progress(start, len(rows))
        yield rows[start : start + QUESTIONS_AT_ONCE]


def _of_words(graded: list[Graded]) -> dict[str, Any]:
    """Scores of all ranks' answers in words; what is neither right nor wrong is counted apart."""
    graded = sorted(graded, key=lambda entry: entry[0])
    outcomes = [outcome for *_, outcome in graded]
    apart = {name: outcomes.count(name) for name in ("unsupported", TOO_LONG)}
    return {
        "accuracy": sum(outcome in RIGHT for outcome in outcomes) / len(graded),
        "questions": len(graded),
        **{name: count for name, count in apart.items() if count},
        "samples": [
            [question, said, outcome in RIGHT] for _, question, said, outcome in graded[:SHOWN]
        ],
    }


def _summed(values: np.ndarray, runtime: Runtime) -> list[float]:
    return runtime.sum(torch.tensor(values, device=runtime.device)).tolist()


@torch.inference_mode()
def by_letter(engine: Engine, task: ChoiceTask, rows: Sequence[int]) -> list[bool]:
    """For each row whether the right choice's letter has the largest logit of its letters."""
    tokenizer, device = engine.tokenizer, engine.runtime.device
    letter_ids = [tokenizer.encode(letter)[0] for letter in LETTERS]
    prompts = [
        Conversation.ask(choice_question(task.question(i), task.choices(i))).prompt(tokenizer)
        for i in rows
    ]
    best: dict[int, int] = {}
    for group in groups([len(prompt) for prompt in prompts], TOKENS_AT_ONCE):
        ids_BT = padded([prompts[g] for g in group], tokenizer.bos)
        last_B = torch.tensor([len(prompts[g]) - 1 for g in group])
        with engine.runtime.autocast():
            hidden_BTD = engine.model.hidden(ids_BT.to(device))
            logits_BV = engine.model.logits(hidden_BTD[torch.arange(len(group)), last_B])
        for g, scores in zip(group, logits_BV, strict=True):
            best[g] = int(scores[letter_ids[: len(task.choices(rows[g]))]].argmax())
    return [best[g] == task.answer(i) for g, i in enumerate(rows)]


@torch.inference_mode()
def by_text(engine: Engine, task: ChoiceTask, rows: Sequence[int]) -> list[bool]:
    """For each row whether the right choice's text is the likeliest answer to the bare question."""
    tokenizer, runtime = engine.tokenizer, engine.runtime
    rendered = [
        Conversation.ask(task.question(i), choice).render(tokenizer, engine.context + 1)
        for i in rows
        for choice in task.choices(i)
    ]
    scores = np.zeros(len(rendered))
    for group in groups([len(r.ids) for r in rendered], TOKENS_AT_ONCE):
        ids = [np.array(rendered[g].ids) for g in group]
        masks = [np.array(rendered[g].mask) for g in group]
        batch = batch_of_rows(ids, masks, max(map(len, ids)) - 1, tokenizer.bos)
        with runtime.autocast():
            nll_BT = engine.model.nll(batch.to(runtime.device))
        scores[group] = -nll_BT.sum(1).double().cpu().numpy()
    right, at = [], 0
    for i in rows:
        count = len(task.choices(i))
        right.append(int(scores[at : at + count].argmax()) == task.answer(i))
        at += count
    return right


def in_words(
    engine: Engine,
    task: Task,
    rows: Sequence[int],
    max_new_tokens: int,
    grade: Callable[[int, str], bool | str],
) -> list[Graded]:
    """Each row's greedy answer, graded.

    The outcome is what `grade` says of the row's number and the answer's text parts. A question
    that fills the context is not asked: it is TOO_LONG.
    """
    tokenizer = engine.tokenizer
    asked = [Conversation(task.conversation(i).messages[:-1]) for i in rows]
    prompts = [conversation.prompt(tokenizer) for conversation in asked]
    fitting = [at for at, prompt in enumerate(prompts) if len(prompt) < engine.context]
    said = engine.complete([prompts[at] for at in fitting], max_new_tokens=max_new_tokens)
    answers = dict(zip(fitting, said, strict=True))
    graded = []
    for at, i in enumerate(rows):
        ids, question = answers.get(at, []), asked[at].turns[0].text
        text = Message("assistant", answer_parts(ids, tokenizer)).text
        outcome = grade(i, text) if at in answers else TOO_LONG
        graded.append((i, question, tokenizer.decode(ids), outcome))
    return graded


# ---------------------------------------------------------------------------- ChatCORE

# Task -> which of its scores counts, and what a guesser gets.
CHATCORE_PARTS = {
    "arc_easy": ("letters", 0.25),
    "arc_challenge": ("letters", 0.25),
    "mmlu": ("letters", 0.25),
    "gsm8k": ("accuracy", 0.0),
    "humaneval": ("accuracy", 0.0),
}


def chatcore(scores: Mapping[str, Mapping[str, Any]]) -> float | None:
    """ChatCORE (nanochat, October 2025): the mean centred accuracy over the five tasks of a chat.

    scores: task -> its scores. None unless all five are there.
    """
    if not all(measure in scores.get(task, {}) for task, (measure, _) in CHATCORE_PARTS.items()):
        return None
    parts = [
        centred(scores[task][measure], chance) for task, (measure, chance) in CHATCORE_PARTS.items()
    ]
    return sum(parts) / len(parts)
