"""Evaluations of a model; the questions of each task are split over the ranks."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from nanolib.runtime import Runtime

Progress = Callable[[int, int], object]  # done, total
Result = TypeVar("Result")
# Whether an answer is right, and a note: "cut" if the prompt lost its beginning to fit the context;
# "too long" and "unsupported" (by the sandbox) both count as wrong.
Grade = tuple[bool, str]

QUESTIONS_AT_ONCE = 128  # between two calls of `progress`


def score_all(
    score: Callable[[Sequence[int]], Sequence[Result]],
    questions: Sequence[int],
    at_once: int,
    runtime: Runtime,
    progress: Progress | None = None,
) -> list[Result]:
    """Score the questions, split over the ranks; all results, in order, on every rank.

    `progress` is called before each batch of `at_once` questions.
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
    """One character per question, "1" if right: to compare two models by question."""
    return "".join("01"[right] for right, _ in grades)


def notes(grades: Sequence[Grade]) -> dict[str, int]:
    return Counter(note for _, note in grades if note)
