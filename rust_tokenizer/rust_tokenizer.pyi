from collections.abc import Callable, Iterable
from typing import Literal

def train(
    documents: Iterable[str],
    num_merges: int,
    pattern: str,
    progress: Callable[[Literal["count", "merge"], int, int | None], object] | None = None,
) -> tuple[list[tuple[int, int]], list[int]]:
    """Train byte-level BPE on the words that `pattern` finds in `documents`.

    Returns the merges in order, as (left id, right id), and each one's count when it was merged;
    ids 0 to 255 are the bytes and merge n makes id 256 + n. Fewer than `num_merges` come back when
    the text runs out of pairs. Ties go to the smallest (left, right).

    `progress(phase, done, total)` is called about every 50 ms: bytes read while counting, merges
    while merging. Ctrl-C and exceptions of `documents` or `progress` pass through. ValueError: a
    pattern that does not compile, a document with lone surrogates; TypeError: one that is no str.
    """
