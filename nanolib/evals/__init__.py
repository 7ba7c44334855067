"""Scores of a model. Ranks share the questions of each task."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from nanolib.runtime import Runtime

Progress = Callable[[int, int], object]  # done, total
Result = TypeVar("Result")

QUESTIONS_AT_ONCE = 128  # between two calls of `progress`


def score_all(
    score: Callable[[Sequence[int]], Sequence[Result]],
    questions: Sequence[int],
    at_once: int,
    runtime: Runtime,
    progress: Progress | None = None,
) -> list[Result]:
    """What `score` returns for each question, in order, on every rank.

    Each rank scores its share, `at_once` questions at a time. `progress` is called before each
    time and may raise to stop.
    """
    mine = questions[runtime.rank :: runtime.world_size]
    scores: list[Result] = []
    for start in range(0, len(mine), at_once):
        if progress is not None:
            progress(start, len(mine))
        scores += score(mine[start : start + at_once])
    parts = runtime.gather(scores)
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(questions))]
