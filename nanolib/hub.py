"""A mirror: a folder that holds everything a run reads.

It has ``text/*.parquet`` (pretraining text; the last name is the validation shard),
``hub/REPOSITORY/[CONFIG/]SPLIT.parquet`` and ``eval_bundle.zip``, whether it is the user's own, the
toy world, or filled by `fetch` from the Hugging Face hub. Only `fetch` uses the network.
"""

import contextlib
import hashlib
import math
import shutil
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from nanolib.config import Config
from nanolib.rundir import whole_file

BYTES_PER_TOKEN = 5.0  # of a 65,536-token vocabulary on English, rounded up: 4.8 was measured
EVAL_BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # nanochat's
DOCUMENTS_AT_ONCE = 1024  # read from a shard together
LOOK_ELSEWHERE = "give --mirror DIR with a complete mirror, or leave --mirror out to use the hub"
OFFLINE = "give --mirror DIR, or data.source = toyworld to work offline"

Split = tuple[str, str | None, str]  # repository, configuration, split
Progress = Callable[[int, int, str], object]  # done, total, what is next; may raise to stop


class TextFiles(NamedTuple):
    train: list[Path]
    validation: Path  # the last name of the full listing, whatever is used


def text_files(config: Config, mirror: Path) -> TextFiles:
    """The shards of pretraining text, of which ``data.text_shards`` limits the training ones."""
    wanted, folder = config.recipe.data.text_shards, mirror / "text"
    files = sorted(folder.glob("*.parquet"))
    _check_count(len(files), folder, wanted)
    *train, validation = files
    for path in [*train[:wanted], validation]:
        _check_text(path)
    return TextFiles(train[:wanted], validation)


def _check_count(found: int, where: object, wanted: int | None) -> None:
    if found < 2:
        raise ValueError(f"{where}: {found} parquet files, text needs two; {LOOK_ELSEWHERE}")
    if (wanted or 1) >= found:
        most = f"{found - 1} (of {where})"
        raise ValueError(f"data.text_shards must be between 1 and {most}, got {wanted}")


# ---------------------------------------------------------------------------- reading parquet


@contextlib.contextmanager
def _reading(path: Path) -> Generator[None, None, None]:
    """Turn Arrow's errors, for damage and for text that is not UTF-8, into a ValueError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): write or copy it again") from error


def _open(path: Path) -> pq.ParquetFile:
    if path.is_symlink() and not path.exists():
        gone = f"{path.readlink()}, which is gone"
        raise ValueError(f"{path} was linked to {gone}: delete data/done.json and rerun")
    if not path.is_file():
        raise ValueError(f"{path} is missing; {LOOK_ELSEWHERE}")
    with _reading(path):
        file = pq.ParquetFile(path)
    if file.metadata.num_rows == 0:
        raise ValueError(f"{path} has no rows: copy it again or leave it out")
    return file


def _check_text(path: Path) -> None:
    columns = {column.name: column.type for column in _open(path).schema_arrow}
    if columns.get("text") not in (pa.string(), pa.large_string()):
        found = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        raise ValueError(f"{path} needs a column 'text' of strings, it has {found}")


def documents(path: Path) -> Iterator[str]:
    _check_text(path)
    with _reading(path):
        shard = pyarrow.dataset.dataset(path, format="parquet")
        for batch in shard.to_batches(["text"], batch_size=DOCUMENTS_AT_ONCE, batch_readahead=4):
            batch.validate(full=True)
            if batch["text"].null_count:
                raise ValueError(f"{path} has {batch['text'].null_count} rows without text")
            yield from batch["text"].to_pylist()


def table(split: Split, mirror: Path) -> pa.Table:
    file = _open(path := _table_path(split, mirror))
    with _reading(path):
        rows = file.read()
        rows.validate(full=True)
    return rows


def _table_path(split: Split, mirror: Path) -> Path:
    repository, name, part = split
    return mirror / "hub" / repository / (name or "") / f"{part}.parquet"


def eval_bundle(mirror: Path) -> Path:
    path = mirror / "eval_bundle.zip"
    if not path.is_file():
        remedy = "copy it there, or set eval.core_problems = 0"
        raise ValueError(f"{mirror} has no eval_bundle.zip: {remedy}")
    return path


# ---------------------------------------------------------------------------- the network


def fetch(
    config: Config, splits: Sequence[Split], folder: Path, progress: Progress
) -> dict[str, str]:
    """Fill `folder` as a mirror from the hub; returns each repository's revision (commit hash).

    Text is as much as ``data.text_shards`` says or pretraining will read; cached files are linked.
    """
    revisions = {config.recipe.data.repository: _fetch_text(config, folder / "text", progress)}
    if config.recipe.eval.core_problems != 0:
        progress(0, 1, "the evaluation bundle")
        (folder / "eval_bundle.zip").symlink_to(_fetch_bundle())
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
        kind = type(error).__name__
        raise ValueError(f"cannot fetch {what} ({kind}: {error}); {remedy}") from error


def _fetch_text(config: Config, folder: Path, progress: Progress) -> str:
    """Link the text's parquet files into `folder`, the validation shard first."""
    from huggingface_hub import HfApi

    repository, wanted = config.recipe.data.repository, config.recipe.data.text_shards
    with _network(repository):
        info = HfApi().dataset_info(repository, files_metadata=True)
    assert info.sha is not None
    files = [file for file in info.siblings or [] if file.rfilename.endswith(".parquet")]
    files.sort(key=lambda file: Path(file.rfilename).name)
    _check_count(len(files), repository, wanted)
    folder.mkdir()
    base = config.recipe.base
    missing = BYTES_PER_TOKEN * (base.steps or 0) * base.batch_tokens
    total = 1 + (wanted or 1)
    for number, file in enumerate([files[-1], *files[:-1]]):
        if number == total:
            break
        name = Path(file.rfilename).name
        progress(number, total, name)
        path = _fetch_file(repository, file, info.sha)
        _check_text(path)
        (folder / name).symlink_to(path)
        if number and wanted is None:
            size = _text_bytes(path)
            missing -= size
            total = number + 1 + max(0, math.ceil(missing / size))
    return info.sha


def _fetch_file(repository: str, file, revision: str) -> Path:
    """One cached file, its size and hash checked; a damaged one is fetched again."""
    from huggingface_hub import hf_hub_download

    problem, asked = "", partial(hf_hub_download, repo_type="dataset", revision=revision)
    for again in (False, True):
        with _network(repository):
            found = asked(repository, file.rfilename, force_download=again)
        if not (problem := _difference(path := Path(found).resolve(), file)):
            return path
        print(f"{path} {problem}: fetching it again", flush=True)
    raise ValueError(f"{repository} gave {file.rfilename} damaged twice ({problem}); {OFFLINE}")


def _difference(path: Path, listed) -> str:
    size = path.stat().st_size
    if listed.size not in (None, size):
        return f"has {size} of {listed.size} bytes"
    with path.open("rb") as file:
        if listed.lfs and hashlib.file_digest(file, "sha256").hexdigest() != listed.lfs.sha256:
            return "has another SHA-256 than the hub lists"
    return ""


def _text_bytes(path: Path) -> int:
    """Of a shard, estimated from its footer."""
    shard = pq.read_metadata(path)
    column, groups = shard.schema.names.index("text"), range(shard.num_row_groups)
    return sum(shard.row_group(i).column(column).total_uncompressed_size for i in groups)


def _fetch_table(split: Split, folder: Path, revisions: dict[str, str]) -> None:
    """One split as the mirror's parquet file, at the revision that `revisions` has or gets."""
    import datasets
    from huggingface_hub import HfApi

    repository, name, part = split
    target = _table_path(split, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _network(f"{repository} ({name or 'no config'}, {part})"):
        if repository not in revisions:
            revisions[repository] = HfApi().dataset_info(repository).sha or "main"
        rows = datasets.load_dataset(repository, name, split=part, revision=revisions[repository])
        rows.to_parquet(target)


def _fetch_bundle() -> Path:
    """CORE's evaluation bundle in the user's cache; a damaged one is fetched again."""
    target = Path.home() / ".cache/nanolib/eval_bundle.zip"
    if target.is_file():
        if not (problem := _zip_problem(target)):
            return target
        print(f"{target} {problem}: fetching it again", flush=True)
    remedy = "give --mirror DIR, or set eval.core_problems = 0 to leave CORE out"
    with _network(EVAL_BUNDLE, remedy), whole_file(target) as draft:
        with urllib.request.urlopen(EVAL_BUNDLE, timeout=60) as reply:
            shutil.copyfileobj(reply, draft)
        draft.flush()
        if problem := _zip_problem(Path(draft.name)):
            raise ConnectionError(f"the download {problem}")
    return target


def _zip_problem(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        return f"is cut short or no zip file ({error})"
    return f"has damaged {bad}" if bad else ""
