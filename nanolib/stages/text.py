"""The stages data, tokenizer and shards: from text to token shards."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from nanolib import accounting, hub, mirror, tasks
from nanolib.config import Recipe, flatten
from nanolib.data import own, toyworld
from nanolib.data.sources import split_documents
from nanolib.evals import core
from nanolib.evals.overlap import arrays, overlap
from nanolib.rundir import Run, whole_file, whole_folder, write_json
from nanolib.runtime import seed_of
from nanolib.stages import Context, Result
from nanolib.tokenizer import Tokenizer

AT_ONCE = 1024  # documents tokenized together
OVERLAP = "overlap.json"  # in the data stage: what `overlap` found
SAMPLED = 300  # rows of a source, for their mean length


def data(context: Context) -> Result:
    """Write or fetch the run's data, check it, and record where it came from."""
    run = context.run
    digests = own.write(run, context.progress)
    revisions = _gather(context) if run.config.machine.mirror is None else {}
    files = hub.text_files(run.config, run.text_mirror())
    check_tasks(run, context.progress)
    sources = {"text": (texts for path in files.train for texts in hub.text_arrays(path))}
    for stage, name, task, rows in _learned(run):
        sources[f"{stage}: {name}"] = arrays(map(partial(_problem, task), rows.tolist()))
    found = overlap(_tests(run), sources, torch.get_num_threads(), context.progress)
    write_json(context.stage.path / OVERLAP, found)
    nothing = [it for it, size in found["texts"].items() if len(found["quoting"][it]) == size > 0]
    if nothing and run.config.recipe.data.drop_contaminated:
        why = f"all texts of {', '.join(nothing)} share words with a test problem"
        raise ValueError(f"{why}: leave out data.drop_contaminated, or that source")
    return {
        "mirror": run.config.machine.mirror and str(run.mirror()),
        "revisions": revisions,
        "fingerprint": _fingerprint(run, files),
        "own": digests,
        "train_files": [path.name for path in files.train],
        "validation_file": files.validation.name,
        "text_bytes": sum(path.stat().st_size for path in [*files.train, files.validation]),
        "counted": counted(run),
    }


def _gather(context: Context) -> dict[str, str]:
    """Write the toy world or download from the hub; returns the revisions downloaded."""
    config, folder = context.run.config, context.run.stage("data").path / "mirror"
    if config.recipe.data.source == "toyworld":
        toyworld.write(folder, config.recipe.seed, progress=context.progress)
        return {}
    with whole_folder(folder) as draft:
        return mirror.fill(config, tables(config.recipe), draft, context.progress, link=True)


def gather_if_gone(context: Context) -> None:
    """Restore a missing mirror, which early versions did not keep; check the user's own data."""
    run = context.run
    if context.runtime.is_lead:
        own.check_unchanged(run)
        if has_own_mirror(run) and not run.mirror().is_dir():
            _gather(context)
    context.runtime.barrier()


def has_own_mirror(run: Run) -> bool:
    """Whether the run reads the mirror that its own data stage made, not one from --mirror."""
    return run.mirror() == run.stage("data").path / "mirror"


def limits(recipe: Recipe, stage: str) -> dict[str, int | None]:
    """The number of rows of each source in a stage's mixture; None means all."""
    rows = flatten(getattr(recipe, stage).rows) | ({} if recipe.data.conversations else {"mine": 0})
    return {name: limit for name, limit in rows.items() if limit != 0}


def _splits(recipe: Recipe) -> list[tuple[str, str]]:
    """The (task, split) pairs that later stages read."""
    stages = [stage for stage in ("mid", "sft") if getattr(recipe, stage).enabled]
    learned = {name for stage in stages for name in limits(recipe, stage)} - {"mine"}
    learned |= {recipe.grpo.task} if recipe.grpo.enabled else set()
    tested = learned | set(recipe.eval.tasks if set(recipe.models) - {"base"} else ())
    return sorted([(name, "train") for name in learned] + [(name, "test") for name in tested])


def tables(recipe: Recipe) -> list[hub.Split]:
    """The location of those splits on the hub and in a mirror."""
    read = ((tasks.find(name), split) for name, split in _splits(recipe))
    return [task.source(split) for task, split in read if task.repository]


def check_tasks(run: Run, progress: hub.Progress = lambda *_: None) -> None:
    """Open everything that later stages read, so that a missing file fails early."""
    recipe, mirror, splits = run.config.recipe, run.mirror(), _splits(run.config.recipe)
    if recipe.eval.core_problems != 0:
        core.load(mirror / "eval_bundle.zip")
    for number, (name, split) in enumerate(splits):
        progress(number, len(splits), f"checking {name} ({split})")
        tasks.load(name, split, mirror)
    if recipe.grpo.enabled:
        tasks.load_graded(recipe.grpo.task, "train", mirror)


def chosen(
    run: Run, stage: str, name: str, split: str, limit: int | None, drop: bool = True
) -> tuple[tasks.Task, np.ndarray]:
    """A task and its first `limit` rows in a seeded order, the user's own repeated.

    drop: without those that `left_out` names.
    """
    recipe, is_mine = run.config.recipe, name == "mine"
    read, mirror = ("smoltalk", run.own()) if is_mine else (name, run.mirror())
    task = tasks.load(read, split, mirror, getattr(recipe, stage).sums)
    if split == "test":
        seed = seed_of(recipe.seed, "mixture", "held out", name)  # the same in every stage
        return task, np.random.default_rng(seed).permutation(len(task))[:limit]
    seed = stage_seed(recipe, stage, "mixture", stage, name)
    order = np.random.default_rng(seed).permutation(len(task))
    order = np.resize(order, limit or len(order)) if is_mine else order[:limit]
    return task, np.delete(order, left_out(run, f"{stage}: {name}") if drop else [])


def left_out(run: Run, source: str) -> list[int]:
    """The numbers of a source's texts that the run must not train on (data.drop_contaminated)."""
    if not run.config.recipe.data.drop_contaminated:
        return []
    return json.loads((run.stage("data").path / OVERLAP).read_text())["quoting"][source]


def stage_seed(recipe: Recipe, stage: str, *purpose: str) -> int:
    """A seed for random draws of a stage, from its own seed or else the run's."""
    own = getattr(recipe, stage).seed
    return seed_of(recipe.seed if own is None else own, *purpose)


def _tests(run: Run) -> dict[str, list[str]]:
    """The problems that the run's models are scored on, each with its right answer."""
    recipe, found = run.config.recipe, {}
    for name in recipe.eval.tasks if set(recipe.models) - {"base"} else ():
        task = tasks.load(name, "test", run.mirror())
        found[name] = [_problem(task, i) for i in range(len(task))[: recipe.eval.max_problems]]
    if (limit := recipe.eval.core_problems) != 0:
        for task in core.load(run.mirror() / "eval_bundle.zip"):
            asked = task.shuffled(limit).questions
            found[f"core/{task.label}"] = [" ".join(one.options[one.gold]) for one in asked]
    return found


def _learned(run: Run) -> Iterator[tuple[str, str, tasks.Task, np.ndarray]]:
    """What mid, SFT and GRPO train on: (stage, source, its task, the numbers of the rows)."""
    recipe = run.config.recipe
    for stage in (it for it in recipe.models if it in ("mid", "sft")):
        for name, limit in limits(recipe, stage).items():
            yield stage, name, *chosen(run, stage, name, "train", limit, drop=False)
    if recipe.grpo.enabled:
        task = tasks.load_graded(recipe.grpo.task, "train", run.mirror(), recipe.grpo.sums)
        yield "grpo", recipe.grpo.task, task, np.arange(len(task))


def counted(run: Run) -> dict[str, float]:
    """What later stages read: bytes of text, tokens of mid and SFT (estimated from a sample of
    their conversations), questions of GRPO, problems of an evaluation."""
    recipe, files = run.config.recipe, hub.text_files(run.config, run.text_mirror())
    found = {"text": sum(map(hub.text_bytes, [*files.train, files.validation]))}
    for stage, _, task, rows in _learned(run):
        if stage == "grpo":
            found[stage] = len(rows)
            continue
        some = [task.conversation(i).messages for i in rows[:SAMPLED].tolist()]
        size = sum(len(it.text.encode()) for messages in some for it in messages)
        markers = sum(1 + 2 * len(messages) for messages in some)
        tokens = size / accounting.bytes_per_token(recipe.tokenizer.vocab_size) + markers
        found[stage] = found.get(stage, 0) + round(len(rows) * tokens / len(some))
    return found | {"problems": sum(map(len, _tests(run).values()))}


def known(run: Run) -> dict[str, float]:
    """What the data stage counted, or a mirror given before it; empty if there is neither."""
    data, given = run.config.recipe.data, not has_own_mirror(run) and run.mirror().is_dir()
    there = given and not (data.text or data.conversations)
    return run.stage("data").result().get("counted") or (counted(run) if there else {})


def _problem(task: tasks.Task, i: int) -> str:
    if isinstance(task, tasks.ChoiceTask):
        return f"{task.question(i)} {task.choices(i)[task.answer(i)]}"
    return " ".join(message.text for message in task.conversation(i).messages)


def _fingerprint(run: Run, text: hub.TextFiles) -> str:
    """Hash the names, sizes and last 64 KiB (parquet footers) of a run's text files, of its other
    files unless `revisions` pin them, and what is left out.
    """
    digest, mirror, files = hashlib.sha256(), run.mirror(), [*text.train, text.validation]
    if run.config.recipe.data.source == "toyworld" or not has_own_mirror(run):
        files += [*sorted(mirror.glob("hub/**/*.parquet")), *mirror.glob("eval_bundle.zip")]
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 65_536))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    if run.config.recipe.data.drop_contaminated:
        digest.update((run.stage("data").path / OVERLAP).read_bytes())
    return digest.hexdigest()[:16]


def _text_files(run: Run) -> hub.TextFiles:
    """The run's text files; ValueError if they changed since the data stage."""
    files = hub.text_files(run.config, run.text_mirror())
    if run.stage("data").result()["fingerprint"] != _fingerprint(run, files):
        remedy = "give --mirror the folder it had, or start a new run with --run NAME"
        raise ValueError(f"{run.mirror()} differs from what run {run.id} started with; {remedy}")
    return files


def _documents(run: Run, paths: Iterable[Path]) -> Iterator[Iterator[str]]:
    """The documents of each text file, without those that `left_out` names."""
    first, drop = 0, {*left_out(run, "text")}
    for path in paths:
        numbered = enumerate(hub.documents(path), first)
        yield (text for number, text in numbered if number not in drop)
        first += pq.read_metadata(path).num_rows


def tokenizer(context: Context) -> Result:
    config = context.run.config.recipe.tokenizer
    files = _text_files(context.run)

    def progress(phase: str, done: int, total: int | None) -> None:
        context.progress(done, total or config.max_chars, phase)

    longest = config.max_document_chars
    documents = itertools.chain.from_iterable(_documents(context.run, files.train))
    texts = (text[:longest] for text in documents)
    trained = Tokenizer.train(_head(texts, config.max_chars), config.vocab_size, progress)
    trained.save(context.stage.path / "tokenizer.json")
    sample = list(_head(hub.documents(files.validation), 1_000_000))
    density = sum(len(text.encode()) for text in sample) / len(trained.encode_flat(sample)[0])
    about = {"vocab_size": trained.vocab_size, "fingerprint": trained.fingerprint()}
    return about | {"validation_bytes_per_token": density}


def _head(texts: Iterable[str], chars: int) -> Iterator[str]:
    """Texts up to a total of `chars` characters."""
    for text in texts:
        yield text[:chars]
        chars -= len(text)
        if chars <= 0:
            return


def shards(context: Context) -> Result:
    """Tokenize files without a shard into flat ``.npy`` arrays of ids, BOS before each document."""
    files, tokenizer = _text_files(context.run), context.tokenizer
    train, validation = shard_paths(context.run)
    texts, targets = [*files.train, files.validation], [*train, validation]
    each = zip(texts, _documents(context.run, texts), targets, strict=True)
    for number, (text, documents, target) in enumerate(each):
        if not target.exists():
            parts, done = [tokenizer.encode_flat([])[0]], 0
            while group := list(itertools.islice(documents, AT_ONCE)):
                parts.append(tokenizer.encode_flat(group, torch.get_num_threads(), bos=True)[0])
                done += len(group)
                context.progress(number, len(texts), f"{text.name}: {done} documents")
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
    """The first `base.eval_documents` validation documents, as ids with BOS."""
    tokens = np.load(shard_paths(context.run)[1], mmap_mode="r")
    limit = context.run.config.recipe.base.eval_documents
    return split_documents(tokens, context.tokenizer.bos)[:limit]
