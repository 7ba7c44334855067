"""The one place that turns (repository, config, split) into files: mirror first, then the hub.

A mirror is a folder with ``text/*.parquet`` (pretraining text; the last name is the validation
shard), ``hub/REPOSITORY/[CONFIG/]SPLIT.parquet``, ``eval_bundle.zip`` and ``encodings/``. A given
mirror is complete: what it lacks is an error, never fetched from the hub.
"""

from __future__ import annotations

import http.client
import os
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanolib.config import Config

BYTES_PER_TOKEN = 5.0  # of a 65,536-token vocabulary on English, rounded up: 4.8 was measured
EVAL_BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # nanochat's
LOOK_ELSEWHERE = "give --mirror DIR with a complete mirror, or leave --mirror out to use the hub"


@dataclass(frozen=True)
class TextFiles:
    """Pretraining text. `validation` is the last name of the full listing, whatever is used."""

    train: list[Path]
    validation: Path


def text_files(config: Config, mirror: Path | None) -> TextFiles:
    """The parquet shards of pretraining text, each checked to have a column `text`.

    ``data.text_shards`` limits the training shards; without it a mirror gives all it has and the
    hub as many as the pretraining horizon needs.
    """
    wanted = config.recipe.data.text_shards
    if mirror is None:
        return _text_from_hub(config, wanted)
    folder = Path(mirror) / "text"
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


def _text_from_hub(config: Config, wanted: int | None) -> TextFiles:
    from huggingface_hub import HfApi, hf_hub_download

    repository = config.recipe.data.repository

    def fetch(name: str) -> Path:
        path = Path(hf_hub_download(repository, name, repo_type="dataset"))
        _open_text(path)
        return path

    try:
        listing = HfApi().list_repo_files(repository, repo_type="dataset")
        names = sorted(name for name in listing if name.endswith(".parquet"))
        _check_listing(len(names), repository, wanted)
        validation = fetch(names[-1])
        train: list[Path] = []
        base = config.recipe.base
        missing = BYTES_PER_TOKEN * (base.steps or 0) * base.batch_tokens
        for name in names[:-1]:
            if len(train) == wanted or (wanted is None and train and missing <= 0):
                break
            train.append(fetch(name))
            missing -= _text_bytes(train[-1])
    except OSError as error:  # huggingface_hub's own errors are OSErrors too
        raise ValueError(
            f"cannot fetch {repository} from the hub ({error}); give --mirror DIR, or data.source "
            "= toyworld to work offline"
        ) from error
    return TextFiles(train, validation)


def _text_bytes(path: Path) -> int:
    """Bytes of text in a shard, estimated from its footer."""
    metadata = pq.read_metadata(path)
    column = metadata.schema.to_arrow_schema().get_field_index("text")
    groups = range(metadata.num_row_groups)
    return sum(metadata.row_group(g).column(column).total_uncompressed_size for g in groups)


# ---------------------------------------------------------------------------- reading parquet


def _open(path: Path) -> pq.ParquetFile:
    """A parquet file that has rows, or a ValueError that names it."""
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
    """The documents of one shard of pretraining text, in order."""
    file = _open_text(Path(path))
    for group in range(file.metadata.num_row_groups):
        column = _checked(path, lambda g=group: file.read_row_group(g, columns=["text"]))["text"]
        if column.null_count:
            raise ValueError(f"{path}: row group {group} has {column.null_count} rows without text")
        yield from column.to_pylist()


def _checked(path: Path, read) -> pa.Table:
    """A table read and validated in full: damage and text that is not UTF-8 are errors here."""
    try:
        table = read()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        reason = "has text that is not UTF-8" if "UTF8" in str(error).upper() else "is damaged"
        raise ValueError(f"{path} {reason} ({error}): write or copy it again") from error
    return table


def table(repository: str, split: str, config_name: str | None, mirror: Path | None) -> pa.Table:
    """All rows of one split of a data set."""
    if mirror is not None:
        path = Path(mirror) / "hub" / repository / (config_name or "") / f"{split}.parquet"
        file = _open(path)
        return _checked(path, file.read)
    import datasets

    try:
        rows = datasets.load_dataset(repository, config_name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot fetch {repository} ({config_name or 'no config'}, {split}) from the hub "
            f"({error}); give --mirror DIR, or data.source = toyworld to work offline"
        ) from error
    return rows.with_format("arrow")[:]


# ---------------------------------------------------------------------------- single files


def eval_bundle(mirror: Path | None) -> Path:
    """The evaluation bundle of CORE: the mirror's, or fetched once into the user's cache."""
    if mirror is None:
        return _download(EVAL_BUNDLE)
    path = Path(mirror) / "eval_bundle.zip"
    if not path.is_file():
        raise ValueError(
            f"the mirror {mirror} has no eval_bundle.zip: copy it there, or set "
            "eval.core_problems = 0 to leave CORE out"
        )
    return path


def _download(url: str) -> Path:
    """A file of the web in the user's cache; whole or not there."""
    target = Path.home() / ".cache/nanolib" / url.rsplit("/", 1)[-1]
    if target.is_file():
        return target
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as reply, partial.open("wb") as file:
            shutil.copyfileobj(reply, file)
        partial.replace(target)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"cannot fetch {url} ({error}); give --mirror DIR, or set eval.core_problems = 0 to "
            "leave CORE out"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return target
