"""The real worker, its answers graded by their length: random weights never give a right one."""

import sys
from collections.abc import Sequence

from nanolib import grpo
from nanolib.stages import worker


def by_length(quiz: grpo.Quiz, question: int, texts: Sequence[str]) -> list[float]:
    return [len(text) % 7 / 7 for text in texts]


if __name__ == "__main__":
    grpo.Quiz.grade = by_length
    sys.exit(worker.main())
