"""From text to token shards: the stages data, tokenizer and shards."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanolib import hub, report, tasks
from nanolib.config import Recipe, TokenizerConfig, flatten
from nanolib.data import toyworld
from nanolib.data.sources import split_documents
from nanolib.evals import core
from nanolib.rundir import Run, saving, whole_folder
from nanolib.stages import Context
from nanolib.tokenizer import Tokenizer

DOCUMENTS_AT_ONCE = 1024

# ---------------------------------------------------------------------------- data


def data(context: Context) -> dict[str, Any]:
    """Write or fetch the run's data, check it, and record where it came from."""
    run = context.run
    revisions = gather(context) if run.config.machine.mirror is None else {}
    files = hub.text_files(run.config, run.mirror())
    check_tasks(run, context.progress)
    return {
        "mirror": run.config.machine.mirror and str(run.mirror()),
        "revisions": revisions,
        "fingerprint": _fingerprint(run, files),
        "train_files": [path.name for path in files.train],
        "validation_file": files.validation.name,
        "text_bytes": sum(path.stat().st_size for path in [*files.train, files.validation]),
        "code": report.code_base(),
    }


def gather(context: Context) -> dict[str, str]:
    """Write the toy world or fetch from the hub; the revisions of what was fetched."""
    recipe, folder = context.run.config.recipe, context.run.stage("data").path / "mirror"
    if recipe.data.source == "toyworld":
        toyworld.write(folder, recipe.seed, progress=context.progress)
        return {}
    splits = [tasks.find(name).source(split) for name, split in _splits(recipe)]
    with whole_folder(folder) as draft:
        return hub.fetch(context.run.config, splits, draft, context.progress)


def gather_if_gone(context: Context) -> None:
    """Write or fetch the data again if it is gone, or if an older version did not keep it."""
    run, runtime = context.run, context.runtime
    folder = run.stage("data").path / "mirror"
    if runtime.is_lead and run.mirror() == folder and not folder.is_dir():
        gather(context)
    runtime.barrier()


def _splits(recipe: Recipe) -> list[tuple[str, str]]:
    """Each task and split that a later stage reads."""
    found = {
        (name, split)
        for stage in (recipe.mid, recipe.sft)
        for name, limit in flatten(stage.rows).items()
        for split in ("train", "test")
        if stage.enabled and limit != 0
    }
    if recipe.grpo.enabled:
        found |= {(recipe.grpo.task, "train"), (recipe.grpo.task, "test")}
    if set(recipe.models) - {"base"}:
        found |= {(name, "test") for name in recipe.eval.tasks}
    return sorted(found)


def check_tasks(run: Run, progress: hub.Progress = lambda *_: None) -> None:
    """Open everything that later stages read, so that a missing file is found at the start."""
    recipe, mirror = run.config.recipe, run.mirror()
    if recipe.eval.core_problems != 0:
        core.load(hub.eval_bundle(mirror))
    splits = _splits(recipe)
    for number, (name, split) in enumerate(splits):
        progress(number, len(splits), f"checking {name} ({split})")
        tasks.load(name, split, mirror)
    if recipe.grpo.enabled:
        tasks.load_graded(recipe.grpo.task, "train", mirror)


def _fingerprint(run: Run, files: hub.TextFiles) -> str:
    """A hash of the names, sizes and last 64 KiB (parquet footers) of what a run reads.

    For data fetched from the hub it covers the text only; `revisions` pin the rest.
    """
    digest = hashlib.sha256()
    mirror = run.mirror()
    fetched = run.config.recipe.data.source == "hub" and mirror == run.stage("data").path / "mirror"
    tables = [] if fetched else sorted(mirror.glob("hub/**/*.parquet"))
    bundle = [] if fetched else sorted(mirror.glob("eval_bundle.zip"))
    for path in [*files.train, files.validation, *tables, *bundle]:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 65_536))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return digest.hexdigest()[:16]


def _text_files(run: Run) -> hub.TextFiles:
    """The run's text. Raises ValueError if it is not what the data stage recorded."""
    files = hub.text_files(run.config, run.mirror())
    record = run.stage("data").done()
    if record is not None and record["result"]["fingerprint"] != _fingerprint(run, files):
        raise ValueError(
            f"the data in {run.mirror()} is not what run {run.id} began with; give "
            f"--mirror the folder it had, or use `--run NAME` for a run of its own"
        )
    return files


# ---------------------------------------------------------------------------- tokenizer


def tokenizer(context: Context) -> dict[str, Any]:
    """Train the run's tokenizer on its training text."""
    config = context.run.config.recipe.tokenizer
    files = _text_files(context.run)

    def progress(phase: str, done: int, total: int | None) -> None:
        context.progress(done, total or config.max_chars, phase)

    texts = _training_text(files.train, config)
    trained = Tokenizer.train(texts, config.vocab_size, progress=progress)
    trained.save(context.stage.path / "tokenizer.json")
    sample = _head(hub.documents(files.validation), 1_000_000)
    tokens = sum(len(ids) for ids in trained.encode_batch(sample))
    size = sum(len(text.encode()) for text in sample)
    return {
        "vocab_size": trained.vocab_size,
        "fingerprint": trained.fingerprint(),
        "validation_bytes_per_token": size / tokens,
    }


def _training_text(files: Iterable[Path], config: TokenizerConfig) -> Iterator[str]:
    """Documents truncated to max_document_chars, until max_chars are reached."""
    left = config.max_chars
    for path in files:
        for text in hub.documents(path):
            text = text[: min(left, config.max_document_chars)]
            left -= len(text)
            yield text
            if left <= 0:
                return


def _head(texts: Iterable[str], chars: int) -> list[str]:
    """The first texts, until `chars` are reached."""
    kept = []
    for text in texts:
        kept.append(text)
        chars -= len(text)
        if chars <= 0:
            break
    return kept


def load_tokenizer(run: Run) -> Tokenizer:
    """The run's tokenizer. Raises ValueError when it has none."""
    path = run.stage("tokenizer").path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"run {run.id} has no tokenizer yet: nanolib stage tokenizer")
    return Tokenizer.load(path)


# ---------------------------------------------------------------------------- shards


def shards(context: Context) -> dict[str, Any]:
    """Tokenize every text file: one flat array of ids each, every document BOS + tokens.

    A shard is a ``.npy`` file (uint16 while the vocabulary fits, else uint32), memory-mapped by
    its readers. One that is there is whole and is kept.
    """
    run = context.run
    files = _text_files(run)
    texts = [*files.train, files.validation]
    tokenizer, folder = load_tokenizer(run), context.stage.path
    for number, text in enumerate(texts):
        target = _shard_path(folder, text.name)
        if not target.exists():
            for documents in tokenize(text, target, tokenizer, torch.get_num_threads()):
                context.progress(number, len(texts), f"{text.name}: {documents} documents")
    tokens = [np.load(_shard_path(folder, text.name), mmap_mode="r") for text in texts]
    return {
        "train_tokens": sum(map(len, tokens[:-1])),
        "train_documents": int(sum((shard == tokenizer.bos).sum() for shard in tokens[:-1])),
        "validation_tokens": len(tokens[-1]),
        "validation_bytes": int(tokenizer.byte_lengths[tokens[-1]].sum()),
    }


def tokenize(text: Path, target: Path, tokenizer: Tokenizer, threads: int) -> Iterator[int]:
    """Write the token shard of one parquet file; yields the documents done so far.

    Nothing is left at `target` unless the iterator is driven to its end.
    """
    parts: list[np.ndarray] = []
    documents = 0
    source = hub.documents(text)
    while texts := list(itertools.islice(source, DOCUMENTS_AT_ONCE)):
        ids, _ = tokenizer.encode_flat(texts, threads=threads, bos=True)
        parts.append(ids)
        documents += len(texts)
        yield documents
    partial = target.with_suffix(".partial")
    with saving(target):
        with partial.open("wb") as file:
            np.save(file, np.concatenate(parts))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(target)


def _shard_path(folder: Path, text_name: str) -> Path:
    return folder / f"{Path(text_name).stem}.npy"


def shard_paths(run: Run) -> tuple[list[Path], Path]:
    """The token shards of training and of validation text."""
    record = run.stage("data").done()
    if record is None:
        raise ValueError(f"run {run.id} has no data yet: nanolib stage data")
    folder, result = run.stage("shards").path, record["result"]
    train = [_shard_path(folder, name) for name in result["train_files"]]
    return train, _shard_path(folder, result["validation_file"])


def validation_documents(run: Run, tokenizer: Tokenizer, limit: int | None) -> list[np.ndarray]:
    """The first `limit` documents (None: all) of the validation shard, as ids with BOS."""
    _, validation = shard_paths(run)
    return split_documents(np.load(validation, mmap_mode="r"), tokenizer.bos)[:limit]
