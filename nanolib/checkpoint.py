"""Checkpoints that survive a crash at any instant and load on any number of ranks.

``<stage>/checkpoints/step_00000100/`` holds ``index.json`` and two safetensors files of each rank,
one of weights and one of optimizer state, which only a resumed training reads (the first edition
had both in one file, which is read as well). Every weight and every slot of optimizer state is a
logical tensor (``blocks.0.mlp.up.weight``, ``blocks.0.mlp.up.weight.momentum``); the rank that owns
a range of its rows writes it, and the index says which rows are where, with a hash of each file.
The folder is written under another name, flushed to disk and then renamed, so a checkpoint is there
in full or not at all. The last two are kept; a damaged one is refused by name and the one before it
is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from nanolib.config import Recipe, flatten, replace_settings
from nanolib.model import GPT
from nanolib.optim import MuonAdamW
from nanolib.rundir import saved_recipe, saving
from nanolib.runtime import Runtime

VERSION = 1
KEPT = 2
OPTIMIZER = ".optimizer.safetensors"  # how the name of a file with optimizer state ends


class DamagedCheckpoint(ValueError):
    """A checkpoint folder that cannot be trusted; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """An existing, verified checkpoint folder."""

    path: Path
    index: Mapping[str, Any]

    @property
    def step(self) -> int:
        return self.index["step"]

    def tensor(self, name: str) -> Tensor:
        """A whole logical tensor, assembled from its parts, on the CPU."""
        entry = self.index["tensors"].get(name)
        if entry is None:
            raise DamagedCheckpoint(f"{self.path} holds no tensor {name!r}")
        whole = torch.empty(entry["shape"])
        for part in entry["parts"]:
            with safe_open(self.path / part["file"], "pt") as file:
                whole[slice(*part["rows"])] = file.get_tensor(f"{name}@{part['rows'][0]}")
        return whole


# ---------------------------------------------------------------------------- saving


def save(
    folder: Path,
    step: int,
    model: GPT,
    optimizer: MuonAdamW,
    about: Mapping[str, Any],
    runtime: Runtime,
) -> None:
    """Write ``folder/step_<step>`` with all ranks together and delete all but the last two.

    `about` is saved in the index: the recipe (flat), vocabulary size and tokenizer fingerprint.
    Raises ValueError that names the path when the disk is full; older checkpoints stay whole.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f"{final.name}.partial"
    if runtime.is_lead:
        for unfinished in folder.glob("*.partial"):  # of processes that were killed while saving
            shutil.rmtree(unfinished)
        partial.mkdir(parents=True)
    runtime.barrier()
    files = runtime.gather(_write_share(partial, model, optimizer))
    if runtime.is_lead:
        index = _index([file for rank in files for file in rank])
        index |= {"step": step, "updates": optimizer.steps, **about}
        _write(partial / "index.json", json.dumps(index).encode())
        _sync_folder(partial)
        if final.exists():  # a damaged one that we resumed behind
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(folder)
        for old in _folders(folder)[KEPT:]:
            shutil.rmtree(old)
    runtime.barrier()


def _write_share(folder: Path, model: GPT, optimizer: MuonAdamW) -> list[dict[str, Any]]:
    """Write what this rank owns; returns what the index must know of each of the two files."""
    rank = optimizer.runtime.rank
    params = dict(model.named_parameters())
    written = []
    for name in (f"rank_{rank}.safetensors", f"rank_{rank}{OPTIMIZER}"):
        tensors: dict[str, Tensor] = {}
        parts = []
        for group in optimizer.groups:
            for weight, rows, inner in group.owned(rank):
                values = {weight: params[weight].detach()[rows]}
                if name.endswith(OPTIMIZER):
                    shape = values[weight].shape
                    values = {
                        f"{weight}.{s}": x[inner].reshape(shape) for s, x in group.state.items()
                    }
                for key, value in values.items():
                    tensors[f"{key}@{rows.start}"] = value.cpu().contiguous()
                    parts.append((key, [rows.start, rows.stop], list(params[weight].shape)))
        data = to_safetensors(tensors)
        _write(folder / name, data)
        written.append({"file": name, "sha256": hashlib.sha256(data).hexdigest(), "parts": parts})
    return written


def _index(written: list[dict[str, Any]]) -> dict[str, Any]:
    tensors: dict[str, dict[str, Any]] = {}
    for file in written:
        for name, rows, shape in file["parts"]:
            entry = tensors.setdefault(name, {"shape": shape, "parts": []})
            entry["parts"].append({"file": file["file"], "rows": rows})
    files = {file["file"]: file["sha256"] for file in written}
    return {"version": VERSION, "files": files, "tensors": tensors}


def _write(path: Path, data: bytes) -> None:
    with saving(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------- loading


def _folders(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    found = [p for p in folder.glob("step_*") if p.suffix != ".partial"]
    return sorted(found, reverse=True)


def verify(path: Path, *, weights_only: bool = False) -> Checkpoint:
    """The checkpoint in a folder, every byte of it checked against the index's hashes.

    weights_only: leave the optimizer's state unread, more than half of a checkpoint. Raises DamagedCheckpoint that names the file.
    """
    try:
        index = json.loads((path / "index.json").read_bytes())
        version = index["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path / 'index.json'} cannot be read: {error}") from None
    if version != VERSION:
        raise DamagedCheckpoint(f"{path} has version {version}; this nanolib reads {VERSION}")
    for name, expected in index["files"].items():
        if weights_only and name.endswith(OPTIMIZER):
            continue
        try:
            with (path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DamagedCheckpoint(f"{path / name} cannot be read: {error.strerror}") from None
        if found != expected:
            raise DamagedCheckpoint(f"{path / name} is truncated or changed: its hash differs")
    return Checkpoint(path, index)


def latest(folder: Path, *, weights_only: bool = False) -> Checkpoint | None:
    """The newest undamaged checkpoint below `folder`, or None where there never was one.

    A damaged one is named on stderr and the one before it used. Raises DamagedCheckpoint when
    there are checkpoints but none is whole.
    """
    errors = []
    for path in _folders(folder):
        try:
            return verify(path, weights_only=weights_only)
        except DamagedCheckpoint as error:
            errors.append(str(error))
            print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr)
    if errors:
        raise DamagedCheckpoint(
            f"no usable checkpoint in {folder}: {'; '.join(errors)}. Restore one from a copy, or "
            f"delete {folder} to begin this stage again"
        )
    return None


def load_model(folder: Path, device: torch.device, about: Mapping[str, Any] | None = None) -> GPT:
    """The model of a stage's newest checkpoint, made from what `about` says if given.

    Raises ValueError when the stage has none.
    """
    checkpoint = latest(folder, weights_only=True)
    if checkpoint is None:
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
    for name, param in model.named_parameters():
        param.copy_(checkpoint.tensor(name))


@torch.no_grad()
def restore_optimizer(checkpoint: Checkpoint, optimizer: MuonAdamW) -> None:
    """This rank's share of the optimizer state, whatever number of ranks saved it."""
    optimizer.steps = checkpoint.index["updates"]
    for group in optimizer.groups:
        for name, rows, inner in group.owned(optimizer.runtime.rank):
            for slot, state in group.state.items():
                values = checkpoint.tensor(f"{name}.{slot}")[rows]
                state[inner].copy_(values.reshape(state[inner].shape))


def check_same(checkpoint: Checkpoint, about: Mapping[str, Any]) -> None:
    """Raise ValueError unless a checkpoint was made by the recipe and tokenizer of `about`.

    The checkpoint may be of another version: a setting that it lacks had the default, one that
    this version lacks is named and ignored.
    """
    saved = saved_recipe(checkpoint.index["recipe"], checkpoint.path)
    theirs = {**flatten(replace_settings(Recipe(), saved)), **checkpoint.index}
    mine = {**about["recipe"], **about}
    differences = [
        f"{key} {theirs[key]!r} != {value!r}"
        for key, value in mine.items()
        if key != "recipe" and theirs[key] != value
    ]
    if differences:
        raise ValueError(
            f"{checkpoint.path} belongs to another run ({', '.join(differences)}); use "
            f"`--run NAME` for a run of its own"
        )
