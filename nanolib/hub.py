"""Data sets and other files as a mirror: a folder that holds everything a run reads.

A mirror has ``text/*.parquet`` (pretraining text; the last name is the validation shard),
``hub/REPOSITORY/[CONFIG/]SPLIT.parquet`` and ``eval_bundle.zip``. The user's own, the toy world and
what `fetch` brings from the Hugging Face hub look the same; only `fetch` uses the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import urllib.request
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanolib.config import Config

BYTES_PER_TOKEN = 5.0  # of a 65,536-token vocabulary on English, rounded up: 4.8 was measured
EVAL_BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # nanochat's
READERS = 4  # threads that decode text
LOOK_ELSEWHERE = "give --mirror DIR with a complete mirror, or leave --mirror out to use the hub"
OFFLINE = "give --mirror DIR, or data.source = toyworld to work offline"

Split = tuple[str, str | None, str]  # repository, configuration, split
Progress = Callable[[int, int, str], object]  # done, total, what is next; may raise to stop


@dataclass(frozen=True)
class TextFiles:
    """Pretraining text. `validation` is the last name of the full listing, whatever is used."""

    train: list[Path]
    validation: Path


def text_files(config: Config, mirror: Path) -> TextFiles:
    """The parquet shards of pretraining text, each checked to have a column `text`.

    ``data.text_shards`` limits the training shards (None: all the mirror has).
    """
    wanted = config.recipe.data.text_shards
    folder = mirror / "text"
    if not folder.is_dir():
        raise ValueError(f"the mirror {mirror} has no folder text/; {LOOK_ELSEWHERE}")
    files = sorted(folder.glob("*.parquet"))
    _check_listing(len(files), f"{folder}", wanted)
    train = files[:-1] if wanted is None else files[:wanted]
    for path in [*train, files[-1]]:
        _open_text(path)
    return TextFiles(train, files[-1])


def _check_listing(found: int, where: str, wanted: int | None) -> None:
    if found < 2:
        raise ValueError(
            f"{where} has {found} parquet files; text needs at least two: the last one validates"
        )
    if wanted is not None and not 1 <= wanted < found:
        raise ValueError(
            f"data.text_shards must be between 1 and {found - 1} (what {where} has besides the "
            f"validation shard), got {wanted}"
        )


# ---------------------------------------------------------------------------- reading parquet


def _open(path: Path) -> pq.ParquetFile:
    """A parquet file that has rows, or a ValueError that names it."""
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"{path} was linked to {path.readlink()}, which is gone: delete data/done.json of the "
            "run and give the command again"
        )
    if not path.is_file():
        raise ValueError(f"{path} is missing; {LOOK_ELSEWHERE}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): copy it again")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a readable parquet file, perhaps cut short ({error}): copy it again"
        ) from error
    if file.metadata.num_rows == 0:
        raise ValueError(f"{path} has no rows: copy it again or leave it out")
    return file


def _open_text(path: Path) -> pq.ParquetFile:
    file = _open(path)
    schema = file.schema_arrow
    if "text" not in schema.names:
        raise ValueError(
            f"{path} has no column 'text' (it has {', '.join(schema.names)}): pretraining text is "
            "parquet with a string column 'text'"
        )
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{path}: column 'text' must hold strings, got {kind}")
    return file


def documents(path: Path) -> Iterator[str]:
    """The documents of one shard of pretraining text, in order.

    A few threads decode row groups ahead, so that an encoder with many threads does not wait.
    """
    path = Path(path)
    metadata = _open_text(path).metadata

    def read(group: int) -> pa.ChunkedArray:
        file = pq.ParquetFile(path, metadata=metadata)
        column = _checked(path, lambda: file.read_row_group(group, columns=["text"]))["text"]
        if column.null_count:
            raise ValueError(f"{path}: row group {group} has {column.null_count} rows without text")
        return column

    groups = iter(range(metadata.num_row_groups))
    with ThreadPoolExecutor(READERS) as readers:
        ahead = deque(readers.submit(read, group) for group in islice(groups, READERS))
        while ahead:
            column = ahead.popleft().result()
            ahead.extend(readers.submit(read, group) for group in islice(groups, 1))
            yield from column.to_pylist()


def _checked(path: Path, read) -> pa.Table:
    """A table, fully validated. Raises ValueError for damage and for text that is not UTF-8."""
    try:
        table = read()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        reason = "has text that is not UTF-8" if "UTF8" in str(error).upper() else "is damaged"
        raise ValueError(f"{path} {reason} ({error}): write or copy it again") from error
    return table


def table(repository: str, split: str, config_name: str | None, mirror: Path) -> pa.Table:
    """All rows of one split of a data set."""
    path = _table_path(mirror, (repository, config_name, split))
    return _checked(path, _open(path).read)


def _table_path(mirror: Path, split: Split) -> Path:
    repository, name, part = split
    return mirror / "hub" / repository / (name or "") / f"{part}.parquet"


def eval_bundle(mirror: Path) -> Path:
    """The evaluation bundle of CORE."""
    path = mirror / "eval_bundle.zip"
    if not path.is_file():
        raise ValueError(
            f"the mirror {mirror} has no eval_bundle.zip: copy it there, or set "
            "eval.core_problems = 0 to leave CORE out"
        )
    return path


# ---------------------------------------------------------------------------- the network


def fetch(
    config: Config, splits: Iterable[Split], folder: Path, progress: Progress
) -> dict[str, str]:
    """Fill `folder` as a mirror from the hub; returns each repository's revision (commit hash).

    Text as far as ``data.text_shards`` or the pretraining horizon needs, `splits`, and the
    evaluation bundle if CORE is scored. Cached files are linked, not copied. Raises
    ValueError for network errors and for a file that arrives damaged twice.
    """
    revisions = {config.recipe.data.repository: _fetch_text(config, folder / "text", progress)}
    if config.recipe.eval.core_problems != 0:
        progress(0, 1, "the evaluation bundle")
        (folder / "eval_bundle.zip").symlink_to(_download(EVAL_BUNDLE))
    splits = list(splits)
    for number, split in enumerate(splits):
        progress(number, len(splits), " ".join(filter(None, split)))
        _fetch_table(split, folder, revisions)
    return revisions


@contextlib.contextmanager
def _network(what: str, remedy: str = OFFLINE) -> Generator[None, None, None]:
    """Turn network errors into a ValueError with a remedy. Wrap library calls only."""
    try:
        yield
    except Exception as error:  # httpx2, hf_xet, fsspec and datasets have no common base
        raise ValueError(
            f"cannot fetch {what} ({type(error).__name__}: {error}); {remedy}"
        ) from error


def _fetch_text(config: Config, folder: Path, progress: Progress) -> str:
    """Link the text's parquet files into `folder`, the validation shard first."""
    from huggingface_hub import HfApi

    repository, wanted = config.recipe.data.repository, config.recipe.data.text_shards
    with _network(repository):
        info = HfApi().dataset_info(repository, files_metadata=True)
    assert info.sha is not None
    files = {Path(file.rfilename).name: file for file in info.siblings or []}
    names = sorted(name for name in files if name.endswith(".parquet"))
    _check_listing(len(names), repository, wanted)
    folder.mkdir()
    base = config.recipe.base
    size = missing = BYTES_PER_TOKEN * (base.steps or 0) * base.batch_tokens
    for number, name in enumerate([names[-1], *names[:-1]]):
        left = wanted + 1 - number if wanted else max(2 - number, math.ceil(missing / size))
        if left <= 0:
            break
        progress(number, number + left, name)
        path = _fetch_file(repository, files[name], info.sha)
        _open_text(path)
        (folder / name).symlink_to(path)
        if number:
            size = _text_bytes(path)
            missing -= size
    return info.sha


def _fetch_file(repository: str, file, revision: str) -> Path:
    """One cached file of the hub, its size and hash checked; a damaged one is fetched again."""
    from huggingface_hub import hf_hub_download

    problem = ""
    for again in (False, True):
        with _network(repository):
            path = Path(
                hf_hub_download(
                    repository,
                    file.rfilename,
                    repo_type="dataset",
                    revision=revision,
                    force_download=again,
                )
            ).resolve()
        problem = _difference(path, file.size, file.lfs and file.lfs.sha256)
        if not problem:
            return path
        print(f"{path} {problem}: fetching it again", flush=True)
    raise ValueError(f"{repository} gave {file.rfilename} damaged twice ({problem}); {OFFLINE}")


def _difference(path: Path, size: int | None, sha256: str | None) -> str:
    """How a file differs from the listed size and hash; "" if it does not."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"has {found} of {size} bytes"
    if sha256:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return "has another SHA-256 than the hub lists"
    return ""


def _text_bytes(path: Path) -> int:
    """Bytes of text in a shard, estimated from its footer."""
    metadata = pq.read_metadata(path)
    column = metadata.schema.to_arrow_schema().get_field_index("text")
    groups = range(metadata.num_row_groups)
    return sum(metadata.row_group(g).column(column).total_uncompressed_size for g in groups)


def _fetch_table(split: Split, folder: Path, revisions: dict[str, str]) -> None:
    """One split as the mirror's parquet file, at the revision that `revisions` has or gets."""
    import datasets
    from huggingface_hub import HfApi

    repository, name, part = split
    target = _table_path(folder, split)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _network(f"{repository} ({name or 'no config'}, {part})"):
        if repository not in revisions:
            revisions[repository] = HfApi().dataset_info(repository).sha or "main"
        rows = datasets.load_dataset(repository, name, split=part, revision=revisions[repository])
        rows.to_parquet(target)


def _download(url: str) -> Path:
    """A zip file from the web, kept in the user's cache; a damaged one is fetched again."""
    target = Path.home() / ".cache/nanolib" / url.rsplit("/", 1)[-1]
    if target.is_file():
        problem = _zip_problem(target)
        if not problem:
            return target
        print(f"{target} {problem}: fetching it again", flush=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with _network(url, "give --mirror DIR, or set eval.core_problems = 0 to leave CORE out"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=60) as reply, partial.open("wb") as file:
                shutil.copyfileobj(reply, file)
            length = reply.headers["Content-Length"]
            problem = _difference(partial, length and int(length), None) or _zip_problem(partial)
            if problem:
                raise ConnectionError(f"the download {problem}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _zip_problem(path: Path) -> str:
    """What is wrong with a zip file; "" if all checksums match."""
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        return f"is no whole zip file ({error})"
    return f"has damaged {bad}" if bad else ""
