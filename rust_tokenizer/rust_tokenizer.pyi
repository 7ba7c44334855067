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

    Returns the merges in order, as (left id, right id), and each one's count when it was merged;
    ids 0 to 255 are the bytes and merge n makes id 256 + n. Fewer than `num_merges` come back when
    the text runs out of pairs. Ties go to the smallest (left, right). Text that the pattern does
    not match is left out.

    `threads` count words (None: one a core) in batches of about `batch_bytes`; neither changes the
    result, nor does the order of the documents. `documents` is pulled in the calling thread, which
    lets go of the GIL at least every 20 ms or so.

    `progress(phase, done, total)` is called about every 50 ms: bytes read while counting, merges
    while merging. Ctrl-C is answered within 100 ms. Exceptions of `documents` and `progress` pass
    through unchanged. ValueError: a pattern that does not compile, a document with lone surrogates
    (UnicodeEncodeError), 0 threads; TypeError: a document that is no str.
    """

class Encoder:
    """Encodes many texts into one array.

    `merges` in order: merge n makes id 256 + n. ValueError for a pattern that does not compile.
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
        """All texts' ids back to back (uint16, or uint32 if `wide`) and offsets (uint64).

        Text i has the ids from offset i up to offset i + 1; `prefix`, if given, comes before each
        text's ids. Byte order is the machine's. ValueError: an id that needs `wide`, a text with
        lone surrogates (UnicodeEncodeError), 0 threads; TypeError: a text that is no str.
        """
