"""Scores of a model. Ranks share the questions of each task."""

from collections.abc import Callable, Iterator, Sequence

from nanolib.runtime import Runtime

Progress = Callable[[int, int], object]  # done, total


def rounds(
    questions: Sequence[int], size: int, runtime: Runtime, progress: Progress | None
) -> Iterator[Sequence[int]]:
    """This rank's share of the questions, `size` at a time.

    `progress` is called before each round and may raise to stop.
    """
    mine = questions[runtime.rank :: runtime.world_size]
    for start in range(0, len(mine), size):
        if progress is not None:
            progress(start, len(mine))
        yield mine[start : start + size]
