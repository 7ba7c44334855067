"""Reads mirrors, folders with all the data of a run, and fetches files from the Hugging Face hub.

A mirror has ``text/*.parquet`` (pretraining text; the last file is the validation shard),
``hub/REPOSITORY/[CONFIG/]SPLIT.parquet``, ``eval_bundle.zip`` and, if chapter 01 is to compare with
GPT-2 and GPT-4, ``encodings/``. It can be the user's own, the toy world, or filled by `nanolib.mirror`.
"""

import contextlib
import fnmatch
import functools
import hashlib
import math
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanolib.config import Config
from nanolib.rundir import whole_file

BYTES_PER_TOKEN = 5.0  # English, 65,536-token vocabulary; 4.8 measured, rounded up
EVAL_BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # nanochat's
REVISIONS = {  # commits of the data sets; None: the newest when first fetched
    "karpathy/fineweb-edu-100b-shuffle": None,
    # From huggingface/smollm, text/evaluation/tasks.py:
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
    "openai/gsm8k": "e53f048856ff4f594e959d75785d2c2d37b678ee",
    # From adamthuvesen/esme-posttrain, run_cards/esme-214m-sft-multiturn.md:
    "HuggingFaceTB/smol-smoltalk": "f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc",
    # From phi9t/torchtitan, experiments/scaffold_to_policy/run_humaneval_public_vllm_smoke.sh:
    "openai/openai_humaneval": "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
}
OPENAI = "https://openaipublic.blob.core.windows.net/encodings"
ENCODINGS = {  # SHA-256 of GPT-2's and GPT-4's, from tiktoken_ext/openai_public.py of tiktoken
    "r50k_base": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
}
DOCUMENTS_AT_ONCE = 1024  # batch size when reading a shard
LOOK_ELSEWHERE = "give --mirror DIR with a complete mirror, or leave --mirror out to use the hub"
OFFLINE = "run it again, give --mirror DIR, or data.source = toyworld to work offline"

Split = tuple[str, str | None, str]  # repository, configuration, split
Progress = Callable[[int, int, str], object]  # done, total, message; may raise to stop


class TextFiles(NamedTuple):
    train: list[Path]
    validation: Path  # the last file of all, whatever `text_shards` is


def text_files(config: Config, mirror: Path) -> TextFiles:
    """The pretraining shards of a mirror; ``data.text_shards`` limits the training ones."""
    data, folder = config.recipe.data, mirror / "text"
    wanted = None if data.text else data.text_shards
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
    """Turn Arrow errors (damaged files, text that is not UTF-8) into a ValueError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): write or copy it again") from error


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        if path.is_symlink():
            gone = f"{path.readlink()}, which is gone"
            raise ValueError(f"{path} was linked to {gone}: delete data/done.json and rerun")
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
    for texts in text_arrays(path):
        yield from texts.to_pylist()


def text_arrays(path: Path) -> Generator[pa.Array, None, None]:
    """The documents of a shard, up to 1024 in an array."""
    import pyarrow.dataset  # imports pandas: a second that most processes need not spend

    _check_text(path)
    with _reading(path):
        shard = pyarrow.dataset.dataset(path, format="parquet")
        for batch in shard.to_batches(["text"], batch_size=DOCUMENTS_AT_ONCE, batch_readahead=4):
            batch.validate(full=True)
            if batch["text"].null_count:
                raise ValueError(f"{path} has {batch['text'].null_count} rows without text")
            yield batch["text"]


def table(split: Split, mirror: Path) -> pa.Table:
    file = _open(path := mirror / table_path(split))
    with _reading(path):
        rows = file.read()
        rows.validate(full=True)
    return rows


def table_path(split: Split) -> str:
    repository, name, part = split
    return "/".join(filter(None, ["hub", repository, name, f"{part}.parquet"]))


# ---------------------------------------------------------------------------- the network


class Remote(NamedTuple):
    """A file on the hub, with its metadata."""

    repository: str
    revision: str
    name: str
    length: int | None
    sha256: str | None


Wanted = dict[str, list[Remote]]  # path in the mirror -> hub files that are concatenated into it


def wanted(
    config: Config, splits: Sequence[Split], folder: Path, revisions: dict[str, str]
) -> Iterator[Wanted]:
    """Groups of files that a run needs; fetch each into `folder` before asking for the next.

    The number of text shards is ``data.text_shards``, or estimated from the size of those fetched.
    `revisions` has commit hashes by repository; missing ones are filled in, from `REVISIONS` if there.
    """
    data, base = config.recipe.data, config.recipe.base
    listed = functools.cache(partial(_listing, revisions=revisions))
    files = [] if data.text else sorted(listed(data.repository), key=lambda it: Path(it.name).name)
    group = {table_path(it): _parts(it, listed(it[0])) for it in splits}
    if data.text:
        yield group
        return
    _check_count(len(files), data.repository, data.text_shards)
    *train, validation = [(f"text/{Path(file.name).name}", [file]) for file in files]
    group |= [validation]
    missing = BYTES_PER_TOKEN * (base.steps or 0) * base.batch_tokens
    count = data.text_shards or 1
    while added := train[:count]:
        yield group | dict(added)
        sizes = [text_bytes(folder / path) for path, _ in added]
        missing, train, group = missing - sum(sizes), train[count:], {}
        count = 0 if data.text_shards else max(0, math.ceil(missing / sizes[-1]))


def _listing(repository: str, revisions: dict[str, str]) -> list[Remote]:
    """The parquet files of a data set on the hub."""
    from huggingface_hub import HfApi

    with _network(repository):
        revision = revisions.get(repository) or REVISIONS.get(repository)
        info = HfApi().dataset_info(repository, revision=revision, files_metadata=True)
    revisions[repository] = sha = info.sha or "main"
    return [
        Remote(repository, sha, it.rfilename, it.size, getattr(it.lfs, "sha256", None))
        for it in info.siblings or ()
        if it.rfilename.endswith(".parquet")
    ]


def _parts(split: Split, listed: Sequence[Remote]) -> list[Remote]:
    """The files of one split; large ones are sharded, as in data/train-00000-of-00004.parquet."""
    repository, name, part = split
    pattern = f"{name or '*'}/{part}[-.]*parquet"
    if not (found := [file for file in listed if fnmatch.fnmatch(file.name, pattern)]):
        raise ValueError(f"{repository} has no {pattern} on the hub; {OFFLINE}")
    return sorted(found, key=lambda file: file.name)


def join(parts: Sequence[Path], target: Path) -> None:
    """Concatenate parquet files."""
    from datasets import Dataset

    with tempfile.TemporaryDirectory(dir=target.parent) as cache, whole_file(target) as file:
        rows = Dataset.from_parquet([*map(str, parts)], cache_dir=cache)
        rows.to_parquet(file)  # ty: ignore[invalid-argument-type]


@contextlib.contextmanager
def _network(what: str, remedy: str = OFFLINE) -> Generator[None, None, None]:
    """Turn network errors into a ValueError with a remedy. Wrap library calls only."""
    try:
        yield
    except Exception as error:  # httpx2, hf_xet and huggingface_hub share no base class
        kind = type(error).__name__
        raise ValueError(f"cannot fetch {what} ({kind}: {error}); {remedy}") from error


def fetch_file(file: Remote, folder: Path | None, meter: Any) -> Path:
    """Download a file to `folder` (None: the hub cache) and check it; delete it if damaged."""
    from huggingface_hub import hf_hub_download

    fetch = partial(hf_hub_download, repo_type="dataset", local_dir=folder, tqdm_class=meter)
    with _network(file.repository):
        found = str(fetch(file.repository, file.name, revision=file.revision))
    if problem := difference(path := Path(found).resolve(), file.length, file.sha256):
        print(f"{path} {problem}: fetching it again", flush=True)
        path.unlink()
        raise ValueError(f"{file.repository} gave {file.name} damaged ({problem}); {OFFLINE}")
    return path


def difference(path: Path, length: int | None, sha256: str | None) -> str:
    """How a file differs from its recorded length and hash; empty if it does not."""
    found = path.stat().st_size
    if length not in (None, found):
        return f"has {found} of {length} bytes"
    return "has another SHA-256 than is recorded" if sha256 not in (None, digest(path)) else ""


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_bytes(path: Path) -> int:
    """Uncompressed size of a shard's text, from its parquet footer."""
    shard = pq.read_metadata(path)
    column, groups = shard.schema.names.index("text"), range(shard.num_row_groups)
    return sum(shard.row_group(i).column(column).total_uncompressed_size for i in groups)


def fetch_bundle(target: Path | None = None) -> Path:
    """Download CORE's evaluation bundle (None: to the user's cache)."""
    target = target or Path.home() / ".cache/nanolib/eval_bundle.zip"
    remedy = "give --mirror DIR, or set eval.core_problems = 0 to leave CORE out"
    return _fetch_page(EVAL_BUNDLE, target, _zip_problem, remedy)


def fetch_encoding(name: str, folder: Path) -> Path:
    """Download one of `ENCODINGS` into a mirror."""
    target = folder / f"encodings/{name}.tiktoken"
    problem = partial(difference, length=None, sha256=ENCODINGS[name])
    remedy = f"run it again, or copy that file to {target}"
    return _fetch_page(f"{OPENAI}/{target.name}", target, problem, remedy)


def _fetch_page(url: str, target: Path, problem: Callable[[Path], str], remedy: str) -> Path:
    """Download a file unless an intact one exists; `problem` says what is wrong with one."""
    if target.is_file():
        if not (wrong := problem(target)):
            return target
        print(f"{target} {wrong}: fetching it again", flush=True)
    with _network(url, remedy), whole_file(target) as draft:
        with urllib.request.urlopen(url, timeout=60) as reply:
            shutil.copyfileobj(reply, draft)
        draft.flush()
        if wrong := problem(Path(draft.name)):
            raise ConnectionError(f"the download {wrong}")
    return target


def _zip_problem(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as file:
            return f"has damaged {bad}" if (bad := file.testzip()) else ""
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        return f"is cut short or no zip file ({error})"
