"""Multiple choice, asked of a chat model by letter and by text; and ChatCORE.

By letter, as the original scores MMLU and ARC: the question is asked with its choices, and the
letters' probabilities are compared. By text: the question is asked alone, and each choice's text
is scored as the answer by its log-probability, ``<|assistant_end|>`` included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanolib.conversation import LETTERS, Conversation
from nanolib.engine import Engine
from nanolib.evals import QUESTIONS_AT_ONCE, Progress, score_all
from nanolib.evals.core import Grade, Prompt, centred, likeliest, score_questions
from nanolib.tasks import ChoiceTask


def evaluate(
    engine: Engine, task: ChoiceTask, questions: Sequence[int], progress: Progress | None = None
) -> dict[str, Any]:
    """Accuracy by text and by letter.

    "cut" counts questions that lost their beginning to fit the context, and "too long" those with
    a choice that cannot fit, which count as wrong; each once by text and once by letter.
    """

    def grade(some: Sequence[int]) -> list[tuple[Grade, Grade]]:
        grades = by_text(engine, task, some), by_letter(engine, task, some)
        return list(zip(*grades, strict=True))

    pairs = score_all(grade, questions, QUESTIONS_AT_ONCE, engine.runtime, progress)
    text, letters = ([right for right, _ in grades] for grades in zip(*pairs, strict=True))
    cut = sum(cut for pair in pairs for _, cut in pair)
    apart = {"cut": cut, "too long": (text + letters).count(None)}
    return {
        "text": text.count(True) / len(questions),
        "letters": letters.count(True) / len(questions),
        "chance": float(np.mean([1 / len(task.choices(i)) for i in questions])),
        "questions": len(questions),
    } | {name: count for name, count in apart.items() if count}


def by_letter(engine: Engine, task: ChoiceTask, questions: Sequence[int]) -> list[Grade]:
    """Whether the right choice's letter is the likeliest of the question's letters."""
    letters = [[engine.tokenizer.encode(letter)[0]] for letter in LETTERS]
    asked = [task.unanswered(i) for i in questions]
    answers = [letters[: len(task.choices(i))] for i in questions]
    return _grades(engine, task, questions, asked, answers)


def by_text(engine: Engine, task: ChoiceTask, questions: Sequence[int]) -> list[Grade]:
    """Whether the right choice's text is the likeliest answer to the question alone."""
    tokenizer = engine.tokenizer
    end = tokenizer.special("<|assistant_end|>")
    asked = [Conversation.ask(task.question(i)) for i in questions]
    texts = [[[*tokenizer.encode(text), end] for text in task.choices(i)] for i in questions]
    return _grades(engine, task, questions, asked, texts)


def _grades(
    engine: Engine,
    task: ChoiceTask,
    questions: Sequence[int],
    asked: Sequence[Conversation],
    answers: Sequence[list[list[int]]],
) -> list[Grade]:
    """Compare the log-probabilities of each question's answers (ids)."""
    # Of <|bos|> <|user_start|> question <|user_end|> <|assistant_start|> the question may be cut.
    prompts = [
        [Prompt(question.prompt(engine.tokenizer), ids, head=2, tail=2)]
        for question, ids in zip(asked, answers, strict=True)
    ]
    scored = score_questions(engine.model, prompts, engine.runtime)
    return [
        (likeliest([score.logprob for score in scores], task.answer(i)), cut)
        for i, (scores, cut) in zip(questions, scored, strict=True)
    ]


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
    parts = [
        centred(scores[task][measure], chance)
        for task, (measure, chance) in CHATCORE_PARTS.items()
        if measure in scores.get(task, {})
    ]
    return sum(parts) / len(parts) if len(parts) == len(CHATCORE_PARTS) else None
