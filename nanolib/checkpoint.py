"""Checkpoints: atomic (safe against crashes), and loadable on any number of ranks.

``<stage>/checkpoints/step_00000100/`` holds ``index.json`` and two safetensors files per rank:
weights and optimizer state (a single file in the first edition). A tensor (a weight, or optimizer
state such as ``head.weight.moment1``) is saved in parts by the ranks that own its rows.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from nanolib.config import REMOVED, Recipe, flatten, replace_settings
from nanolib.model import GPT
from nanolib.optim import SLOTS, MuonAdamW
from nanolib.rundir import saved_recipe, whole_file, write_atomic, write_json

VERSION = 1
KEPT = 2  # checkpoints per stage
OPTIMIZER = ".optimizer.safetensors"  # suffix of the optimizer files

Owned = tuple[str, list[int], list[int], Tensor]  # name, [first, last + 1] row, full shape, values


class DamagedCheckpoint(ValueError):
    """A damaged checkpoint; the message names the file and the problem."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    index: Mapping[str, Any]

    @property
    def step(self) -> int:
        return self.index["step"]

    def tensor(self, name: str) -> Tensor:
        """Load a full tensor on the CPU, assembled from its parts."""
        entry = self.index["tensors"][name]
        whole = torch.empty(entry["shape"])
        for part in entry["parts"]:
            with safe_open(self.path / part["file"], "pt") as file:
                whole[slice(*part["rows"])] = file.get_tensor(f"{name}@{part['rows'][0]}")
        return whole


def begin(
    folder: Path, step: int, model: GPT, optimizer: MuonAdamW, about: Mapping[str, Any]
) -> Future[None]:
    """Write ``folder/step_<step>`` atomically in the background; keep the last two.

    All ranks call it. Each copies its shard to host memory before this returns, and a thread writes
    it. Rank 0's future completes once the whole checkpoint is in place.

    about: saved in the index; the flat recipe, vocabulary size and tokenizer fingerprint.
    """
    partial, runtime = folder / f"step_{step:08d}.partial", optimizer.runtime
    about = {"version": VERSION, "step": step, "updates": optimizer.steps, **about}
    weights, states = _share(model, optimizer)

    def write() -> None:
        partial.mkdir(parents=True, exist_ok=True)
        rank = f"rank_{runtime.rank}"
        files = {f"{rank}.safetensors": weights, rank + OPTIMIZER: states}
        written = [_write_file(partial / name, owned) for name, owned in files.items()]
        write_json(partial / f"{rank}.json", written)
        if runtime.is_lead:
            _complete(partial, runtime.world_size, about)

    thread = ThreadPoolExecutor(1)
    writing = thread.submit(write)
    thread.shutdown(wait=False)
    return writing


def _share(model: GPT, optimizer: MuonAdamW) -> tuple[list[Owned], list[Owned]]:
    """This rank's shard of the weights and of the optimizer state, copied to host memory."""
    rank, params = optimizer.runtime.rank, dict(model.named_parameters())
    weights, states = [], []
    for group in optimizer.groups:
        for name, rows, inner in group.owned(rank):
            values, shape = params[name].detach()[rows], list(params[name].shape)
            where = [rows.start, rows.stop]
            weights.append((name, where, shape, values.to("cpu", copy=True)))
            for slot, state in group.state.items():
                value = state[inner].reshape(values.shape).to("cpu", copy=True)
                states.append((f"{name}.{slot}", where, shape, value))
    return weights, states


def _write_file(path: Path, owned: Sequence[Owned]) -> tuple[str, str, list]:
    """Returns (file name, SHA-256, [tensor name, rows, full shape] of each part)."""
    data = to_safetensors({f"{name}@{at[0]}": x.contiguous() for name, at, _, x in owned})
    with whole_file(path) as file:
        file.write(data)
    return path.name, hashlib.sha256(data).hexdigest(), [part[:3] for part in owned]


def _complete(partial: Path, ranks: int, about: Mapping[str, Any]) -> None:
    """Wait for all ranks' files, write the index, rename the folder, delete old ones."""
    folder, final = partial.parent, partial.with_suffix("")
    files, tensors = {}, {}
    for written in [partial / f"rank_{rank}.json" for rank in range(ranks)]:
        while not written.exists():
            time.sleep(0.05)
        for name, digest, parts in json.loads(written.read_text()):
            files[name] = digest
            for tensor, rows, shape in parts:
                entry = tensors.setdefault(tensor, {"shape": shape, "parts": []})
                entry["parts"].append({"file": name, "rows": rows})
        written.unlink()
    write_atomic(partial / "index.json", json.dumps({**about, "files": files, "tensors": tensors}))
    _sync_folder(partial)
    if final.exists():  # damaged: we resumed from an earlier one
        shutil.rmtree(final)
    partial.rename(final)
    _sync_folder(folder)
    for old in _folders(folder)[KEPT:]:
        shutil.rmtree(old)


def remove_unfinished(folder: Path) -> None:
    """Delete partial checkpoints of killed processes; call before any rank starts one."""
    for partial in folder.glob("*.partial"):
        shutil.rmtree(partial)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folders(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step_*") if p.suffix != ".partial"]
    return sorted(found, reverse=True)


def verify(path: Path, *, weights_only: bool = False) -> Checkpoint:
    """Check a checkpoint's files against the hashes in its index and return it; DamagedCheckpoint
    if one differs. weights_only: skip the optimizer files."""
    file = path / "index.json"
    try:
        index = json.loads(file.read_bytes())
        if index["version"] != VERSION:
            raise ValueError(f"its version is {index['version']}, not {VERSION}")
        for name, expected in index["files"].items():
            if not (weights_only and name.endswith(OPTIMIZER)):
                with (file := path / name).open("rb") as content:
                    if hashlib.file_digest(content, "sha256").hexdigest() != expected:
                        raise ValueError("its hash differs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{file} is damaged ({error})") from None
    return Checkpoint(path, index)


def latest(folder: Path, *, weights_only: bool = False) -> Checkpoint | None:
    """The newest intact checkpoint, or None if there are none; raises if all are damaged."""
    errors = []
    for path in _folders(folder):
        try:
            return verify(path, weights_only=weights_only)
        except DamagedCheckpoint as error:
            errors.append(str(error))
            print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr)
    if errors:
        remedy = "Restore one from a copy, or delete the folder to begin this stage again"
        raise DamagedCheckpoint(f"no usable checkpoint in {folder}: {'; '.join(errors)}. {remedy}")
    return None


def load_model(folder: Path, device: torch.device, about: Mapping[str, Any] | None = None) -> GPT:
    """Load the model from a stage's newest checkpoint; `about`, if given, must match it."""
    if (checkpoint := latest(folder, weights_only=True)) is None:
        stage = folder.parent.name
        raise ValueError(f"there is no {stage} model yet in {folder}: nanolib stage {stage}")
    if about is not None:
        check_same(checkpoint, about)
    recipe = replace_settings(Recipe(), checkpoint.index["recipe"])
    model = GPT.empty(recipe.model, checkpoint.index["vocab_size"], device)
    restore_model(checkpoint, model)
    return model


@torch.no_grad()
def restore_model(checkpoint: Checkpoint, model: GPT) -> None:
    """Load the weights; ValueError if the checkpoint also has some of a removed ingredient."""
    weights, slots = dict(model.named_parameters()), [*chain(*SLOTS.values())]
    known = {*weights, *(f"{name}.{slot}" for name in weights for slot in slots)}
    if more := sorted(checkpoint.index["tensors"].keys() - known):
        has = f"{checkpoint.path} has {more[0]}, of an ingredient that nanolib no longer has"
        raise ValueError(f"{has}; commit {REMOVED['backout']} reads it")
    for name, param in weights.items():
        param.copy_(checkpoint.tensor(name))


@torch.no_grad()
def restore_optimizer(checkpoint: Checkpoint, optimizer: MuonAdamW) -> None:
    """Load this rank's shard of the optimizer state, however many ranks saved it."""
    optimizer.steps = checkpoint.index["updates"]
    for group in optimizer.groups:
        for name, rows, inner in group.owned(optimizer.runtime.rank):
            for slot, state in group.state.items():
                values = checkpoint.tensor(f"{name}.{slot}")[rows]
                state[inner].copy_(values.reshape(state[inner].shape))


def check_same(checkpoint: Checkpoint, about: Mapping[str, Any]) -> None:
    """Raise ValueError unless a checkpoint has the recipe and tokenizer in `about`."""
    saved = saved_recipe(checkpoint.index["recipe"], checkpoint.path)
    theirs = {**flatten(replace_settings(Recipe(), saved)), **checkpoint.index}
    mine = {**about["recipe"], **about, "recipe": theirs["recipe"]}
    if differing := [f"{k} {theirs[k]!r} != {v!r}" for k, v in mine.items() if theirs[k] != v]:
        belongs = f"{checkpoint.path} belongs to another run ({', '.join(differing)})"
        raise ValueError(f"{belongs}; use `--run NAME` for a run of its own")
