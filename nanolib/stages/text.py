"""From text to token shards: the stages data, tokenizer and shards."""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from nanolib import hub, mirror, report, tasks
from nanolib.config import Recipe, flatten
from nanolib.data import own, toyworld
from nanolib.data.sources import split_documents
from nanolib.evals import core
from nanolib.rundir import Run, whole_file, whole_folder
from nanolib.stages import Context, Result
from nanolib.tokenizer import Tokenizer

AT_ONCE = 1024  # documents


def data(context: Context) -> Result:
    """Write or fetch the run's data, check it, and record where it came from."""
    run = context.run
    digests = own.write(run, context.progress)
    revisions = _gather(context) if run.config.machine.mirror is None else {}
    files = hub.text_files(run.config, run.text_mirror())
    check_tasks(run, context.progress)
    return {
        "mirror": run.config.machine.mirror and str(run.mirror()),
        "revisions": revisions,
        "fingerprint": _fingerprint(run, files),
        "own": digests,
        "train_files": [path.name for path in files.train],
        "validation_file": files.validation.name,
        "text_bytes": sum(path.stat().st_size for path in [*files.train, files.validation]),
        "code": report.code_base(),
    }


def _gather(context: Context) -> dict[str, str]:
    """Write the toy world or fetch from the hub; returns the revisions fetched."""
    config, folder = context.run.config, context.run.stage("data").path / "mirror"
    if config.recipe.data.source == "toyworld":
        toyworld.write(folder, config.recipe.seed, progress=context.progress)
        return {}
    with whole_folder(folder) as draft:
        return mirror.fill(config, tables(config.recipe), draft, context.progress, link=True)


def gather_if_gone(context: Context) -> None:
    """Runs of the first edition did not keep what they had fetched."""
    run = context.run
    if context.runtime.is_lead:
        own.check_unchanged(run)
        if has_own_mirror(run) and not run.mirror().is_dir():
            _gather(context)
    context.runtime.barrier()


def has_own_mirror(run: Run) -> bool:
    """Whether its data is what its data stage wrote or fetched."""
    return run.mirror() == run.stage("data").path / "mirror"


def limits(recipe: Recipe, stage: str) -> dict[str, int | None]:
    """The rows of each source of a stage's mixture; None: all."""
    rows = flatten(getattr(recipe, stage).rows) | ({} if recipe.data.conversations else {"mine": 0})
    return {name: limit for name, limit in rows.items() if limit != 0}


def _splits(recipe: Recipe) -> list[tuple[str, str]]:
    """That later stages read."""
    stages = [stage for stage in ("mid", "sft") if getattr(recipe, stage).enabled]
    learned = {name for stage in stages for name in limits(recipe, stage)} - {"mine"}
    learned |= {recipe.grpo.task} if recipe.grpo.enabled else set()
    tested = learned | set(recipe.eval.tasks if set(recipe.models) - {"base"} else ())
    return sorted([(name, "train") for name in learned] + [(name, "test") for name in tested])


def tables(recipe: Recipe) -> list[hub.Split]:
    """Where on the hub, and in a mirror, those are."""
    read = ((tasks.find(name), split) for name, split in _splits(recipe))
    return [task.source(split) for task, split in read if task.repository]


def check_tasks(run: Run, progress: hub.Progress = lambda *_: None) -> None:
    """Open everything that later stages read, so that a missing file is found at the start."""
    recipe, mirror, splits = run.config.recipe, run.mirror(), _splits(run.config.recipe)
    if recipe.eval.core_problems != 0:
        core.load(mirror / "eval_bundle.zip")
    for number, (name, split) in enumerate(splits):
        progress(number, len(splits), f"checking {name} ({split})")
        tasks.load(name, split, mirror)
    if recipe.grpo.enabled:
        tasks.load_graded(recipe.grpo.task, "train", mirror)


def _fingerprint(run: Run, text: hub.TextFiles) -> str:
    """Of the names, sizes and last 64 KiB (parquet footers) of a run's text, and of its other files
    unless `revisions` pin them.
    """
    digest, mirror, files = hashlib.sha256(), run.mirror(), [*text.train, text.validation]
    if run.config.recipe.data.source == "toyworld" or not has_own_mirror(run):
        files += [*sorted(mirror.glob("hub/**/*.parquet")), *mirror.glob("eval_bundle.zip")]
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 65_536))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return digest.hexdigest()[:16]


def _text_files(run: Run) -> hub.TextFiles:
    """The run's text; ValueError if it is not what the data stage recorded."""
    files = hub.text_files(run.config, run.text_mirror())
    if run.stage("data").result()["fingerprint"] != _fingerprint(run, files):
        remedy = "give --mirror the folder it had, or start a new run with --run NAME"
        raise ValueError(f"{run.mirror()} is not what run {run.id} began with; {remedy}")
    return files


def tokenizer(context: Context) -> Result:
    config = context.run.config.recipe.tokenizer
    files = _text_files(context.run)

    def progress(phase: str, done: int, total: int | None) -> None:
        context.progress(done, total or config.max_chars, phase)

    longest = config.max_document_chars
    texts = (text[:longest] for path in files.train for text in hub.documents(path))
    trained = Tokenizer.train(_head(texts, config.max_chars), config.vocab_size, progress)
    trained.save(context.stage.path / "tokenizer.json")
    sample = list(_head(hub.documents(files.validation), 1_000_000))
    density = sum(len(text.encode()) for text in sample) / len(trained.encode_flat(sample)[0])
    about = {"vocab_size": trained.vocab_size, "fingerprint": trained.fingerprint()}
    return about | {"validation_bytes_per_token": density}


def _head(texts: Iterable[str], chars: int) -> Iterator[str]:
    """The first `chars` characters of some texts."""
    for text in texts:
        yield text[:chars]
        chars -= len(text)
        if chars <= 0:
            return


def shards(context: Context) -> Result:
    """Tokenize what has no shard yet: a flat ``.npy`` array of ids, each document BOS + tokens."""
    files, tokenizer = _text_files(context.run), context.tokenizer
    train, validation = shard_paths(context.run)
    texts, targets = [*files.train, files.validation], [*train, validation]
    for number, (text, target) in enumerate(zip(texts, targets, strict=True)):
        parts, documents, done = [], hub.documents(text), 0
        while not target.exists() and (group := list(itertools.islice(documents, AT_ONCE))):
            parts.append(tokenizer.encode_flat(group, torch.get_num_threads(), bos=True)[0])
            done += len(group)
            context.progress(number, len(texts), f"{text.name}: {done} documents")
        if parts:
            with whole_file(target) as file:
                np.save(file, np.concatenate(parts))
    *trained, held_out = (np.load(target, mmap_mode="r") for target in targets)
    return {
        "train_tokens": sum(map(len, trained)),
        "train_documents": int(sum((shard == tokenizer.bos).sum() for shard in trained)),
        "validation_tokens": len(held_out),
        "validation_bytes": int(tokenizer.byte_lengths[held_out].sum()),
    }


def shard_paths(run: Run) -> tuple[list[Path], Path]:
    folder, result = run.stage("shards").path, run.stage("data").result()
    names = [*result["train_files"], result["validation_file"]]
    *train, validation = (folder / f"{Path(name).stem}.npy" for name in names)
    return train, validation


def validation_documents(context: Context) -> list[np.ndarray]:
    """Those that are scored, as ids with BOS."""
    tokens = np.load(shard_paths(context.run)[1], mmap_mode="r")
    limit = context.run.config.recipe.base.eval_documents
    return split_documents(tokens, context.tokenizer.bos)[:limit]
