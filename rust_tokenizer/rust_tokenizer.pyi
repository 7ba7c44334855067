from collections.abc import Callable, Iterable, Sequence
from typing import Literal

def train(
    documents: Iterable[str],
    num_merges: int,
    pattern: str,
    progress: Callable[[Literal["count", "merge"], int, int | None], object] | None = None,
    *,
    threads: int | None = None,
    batch_bytes: int = 262144,
) -> tuple[list[tuple[int, int]], list[int]]:
    """Train byte-level BPE on the words that `pattern` finds in `documents`.

    Returns the merges in order, as (left id, right id), and the count of each at the time of
    merging. Ids 0 to 255 are the bytes; merge n creates id 256 + n. Returns fewer than `num_merges`
    if no pairs are left. Ties go to the smallest (left, right). Text that the pattern does not
    match is skipped.

    `threads` count words (None: one per core) in batches of about `batch_bytes`. Neither affects
    the result, nor does the order of the documents. `documents` is iterated in the calling thread,
    which releases the GIL about every 20 ms.

    `progress(phase, done, total)` is called about every 50 ms, with bytes while counting and merges
    while merging. Ctrl-C takes effect within 100 ms. Exceptions of `documents` and `progress` are
    propagated. Raises ValueError for an invalid pattern, a document with lone surrogates
    (UnicodeEncodeError) or 0 threads; TypeError for a document that is not a str.
    """

class Encoder:
    """Encodes many texts into one array.

    `merges` in order: merge n creates id 256 + n. Raises ValueError for an invalid pattern.
    """

    def __init__(self, merges: Sequence[tuple[int, int]], pattern: str) -> None: ...
    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        threads: int = 1,
        prefix: int | None = None,
        wide: bool = False,
    ) -> tuple[bytearray, bytearray]:
        """The concatenated ids of all texts (uint16, or uint32 if `wide`) and offsets (uint64).

        Text i has the ids from offset i up to offset i + 1; `prefix`, if given, precedes each
        text's ids. Native byte order. Raises ValueError for an id that needs `wide`, a text with
        lone surrogates (UnicodeEncodeError) or 0 threads; TypeError for a text that is not a str.
        """
