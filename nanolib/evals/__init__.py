"""Scores of a model. Ranks share the questions of each task."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from nanolib.runtime import Runtime

Progress = Callable[[int, int], object]  # done, total
Result = TypeVar("Result")
# Whether an answer is right, and a note: the question was "cut" at its beginning to fit the context;
# it is "too long", or its answer "unsupported" by the sandbox, which both count as wrong.
Grade = tuple[bool, str]

QUESTIONS_AT_ONCE = 128  # between two calls of `progress`


def score_all(
    score: Callable[[Sequence[int]], Sequence[Result]],
    questions: Sequence[int],
    at_once: int,
    runtime: Runtime,
    progress: Progress | None = None,
) -> list[Result]:
    """What `score` returns for each question, in order, on every rank; the ranks share them.

    `progress` is called before each `at_once` questions.
    """
    mine = questions[runtime.rank :: runtime.world_size]
    scores: list[Result] = []
    for start in range(0, len(mine), at_once):
        if progress is not None:
            progress(start, len(mine))
        scores += score(mine[start : start + at_once])
    parts = runtime.gather(scores)
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(questions))]


def accuracy(grades: Sequence[Grade]) -> float:
    return sum(right for right, _ in grades) / len(grades)


def rights(grades: Sequence[Grade]) -> str:
    """A character a question, 1 where it is right: what two models are compared by."""
    return "".join("01"[right] for right, _ in grades)


def notes(grades: Sequence[Grade]) -> dict[str, int]:
    return Counter(note for _, note in grades if note)
