"""Multiple choice, asked of a chat model by letter and by text; and ChatCORE.

By letter, as the original scores MMLU and ARC: the question is asked with its choices, and the
letters' probabilities are compared. By text: the question is asked alone, and each choice's text
is scored as the answer by its log-probability, ``<|assistant_end|>`` included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nanolib.conversation import LETTERS, Conversation
from nanolib.engine import Engine
from nanolib.evals import Progress, rounds
from nanolib.evals.core import Prompt, centred, score_questions
from nanolib.tasks import ChoiceTask

QUESTIONS_AT_ONCE = 128  # between two calls of `progress`

Graded = tuple[list[bool | None], int]  # right or not (None: too long); how many were cut to fit


def evaluate(
    engine: Engine, task: ChoiceTask, questions: Sequence[int], progress: Progress | None = None
) -> dict[str, Any]:
    """Accuracy by text and by letter.

    "cut" counts questions that lost their beginning to fit the context, and "too long" those with
    a choice that cannot fit, which count as wrong; each once by text and once by letter.
    """
    counts = torch.zeros(4, dtype=torch.long)
    for some in rounds(questions, QUESTIONS_AT_ONCE, engine.runtime, progress):
        for column, grade in enumerate((by_text, by_letter)):
            right, cut = grade(engine, task, some)
            counts[column] += right.count(True)
            counts[2:] += torch.tensor([cut, right.count(None)])
    total = engine.runtime.sum(counts.to(engine.runtime.device))
    text, letters, cut, too_long = total.tolist()
    return {
        "text": text / len(questions),
        "letters": letters / len(questions),
        "chance": float(np.mean([1 / len(task.choices(i)) for i in questions])),
        "questions": len(questions),
    } | {name: count for name, count in (("cut", cut), ("too long", too_long)) if count}


def by_letter(engine: Engine, task: ChoiceTask, questions: Sequence[int]) -> Graded:
    """Whether the right choice's letter is the likeliest of the question's letters."""
    letters = [[engine.tokenizer.encode(letter)[0]] for letter in LETTERS]
    asked = [(task.unanswered(i), letters[: len(task.choices(i))]) for i in questions]
    return _grade(engine, asked, [task.answer(i) for i in questions])


def by_text(engine: Engine, task: ChoiceTask, questions: Sequence[int]) -> Graded:
    """Whether the right choice's text is the likeliest answer to the question alone."""
    tokenizer = engine.tokenizer
    end = tokenizer.special("<|assistant_end|>")
    asked = [
        (
            Conversation.ask(task.question(i)),
            [[*tokenizer.encode(choice), end] for choice in task.choices(i)],
        )
        for i in questions
    ]
    return _grade(engine, asked, [task.answer(i) for i in questions])


def _grade(
    engine: Engine, asked: Sequence[tuple[Conversation, list[list[int]]]], right: Sequence[int]
) -> Graded:
    """Compare answers (ids) to questions; `right` is the index of each question's right one."""
    # Of <|bos|> <|user_start|> question <|user_end|> <|assistant_start|> the question may be cut.
    prompts = [
        [Prompt(question.prompt(engine.tokenizer), answers, head=2, tail=2)]
        for question, answers in asked
    ]
    scores, cut = score_questions(engine.model, prompts, engine.runtime)
    best = [
        max(range(len(found)), key=lambda n, found=found: found[n].logprob) if found else None
        for found in scores
    ]
    return [n if n is None else n == gold for n, gold in zip(best, right, strict=True)], cut


# ---------------------------------------------------------------------------- ChatCORE

# Task -> which of its scores counts, and a guesser's accuracy.
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
