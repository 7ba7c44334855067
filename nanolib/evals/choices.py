"""Multiple choice for chat models, by letter and by text; and ChatCORE.

By letter (as nanochat scores MMLU and ARC): the likeliest letter after question and choices.
By text: the choice that, with ``<|assistant_end|>``, is the likeliest answer to the question alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nanolib.conversation import LETTERS, Conversation
from nanolib.engine import Engine
from nanolib.evals import QUESTIONS_AT_ONCE, Grade, Progress, accuracy, notes, rights, score_all
from nanolib.evals.core import BLIND, Prompt, Score, centred, grades, highest
from nanolib.tasks import ChoiceTask


def evaluate(
    engine: Engine, task: ChoiceTask, questions: Sequence[int], progress: Progress | None = None
) -> dict[str, Any]:
    """Accuracy by text and by letter, each also without the question; and counts of notes."""
    blind = task.without_questions()

    def grade(some: Sequence[int]) -> list[tuple[Grade, ...]]:
        ways = ((way, of) for way in (by_text, by_letter) for of in (task, blind))
        return list(zip(*(way(engine, of, some) for way, of in ways), strict=True))

    graded = score_all(grade, questions, QUESTIONS_AT_ONCE, engine.runtime, progress)
    names = ("text", f"text{BLIND}", "letters", f"letters{BLIND}")
    ways = dict(zip(names, zip(*graded, strict=True), strict=True))
    text, letters = ways["text"], ways["letters"]
    scores: dict[str, Any] = {name: accuracy(grades) for name, grades in ways.items()}
    scores["chance"] = float(np.mean([1 / len(task.choices(i)) for i in questions]))
    scores |= {"questions": len(questions)} | notes(text + letters)
    return scores | {"right": {"text": rights(text), "letters": rights(letters)}}


def by_letter(engine: Engine, task: ChoiceTask, questions: Sequence[int]) -> list[Grade]:
    """Grade by whether the right choice's letter is the likeliest."""
    letters = [[engine.tokenizer.encode(letter)[0]] for letter in LETTERS]
    asked = ((i, task.unanswered(i), letters[: len(task.choices(i))]) for i in questions)
    return _grades(engine, task, asked)


def by_text(engine: Engine, task: ChoiceTask, questions: Sequence[int]) -> list[Grade]:
    """Grade by whether the right choice's text is the likeliest answer to the question."""
    encode, end = engine.tokenizer.encode, engine.tokenizer.special("<|assistant_end|>")
    texts = ([[*encode(text), end] for text in task.choices(i)] for i in questions)
    asked = (Conversation.ask(task.question(i)) for i in questions)
    return _grades(engine, task, zip(questions, asked, texts, strict=True))


def _grades(
    engine: Engine, task: ChoiceTask, asked: Iterable[tuple[int, Conversation, list[list[int]]]]
) -> list[Grade]:
    """Grade rows of a task, given as (index, prompt, choices as ids)."""

    def right(scores: Sequence[Score], gold: int) -> bool:
        return highest([score.logprob for score in scores]) == gold

    # <|bos|> <|user_start|> question <|user_end|> <|assistant_start|>: cut only the question.
    prompts = (
        ([Prompt(question.prompt(engine.tokenizer), ids, head=2, tail=2)], task.answer(i))
        for i, question, ids in asked
    )
    return grades(engine, prompts, right)


# Task -> the score that counts, and its accuracy by chance.
CHATCORE_PARTS = dict.fromkeys(("arc_easy", "arc_challenge", "mmlu"), ("letters", 0.25))
CHATCORE_PARTS |= dict.fromkeys(("gsm8k", "humaneval"), ("accuracy", 0.0))


def chatcore(scores: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Mean centred accuracy over five tasks (nanochat, October 2025); None if one is missing."""
    parts = [
        centred(scores[task][measure], chance)
        for task, (measure, chance) in CHATCORE_PARTS.items()
        if measure in scores.get(task, {})
    ]
    return sum(parts) / len(parts) if len(parts) == len(CHATCORE_PARTS) else None
