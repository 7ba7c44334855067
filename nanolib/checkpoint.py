"""Checkpoints that survive a crash at any instant and load on any number of ranks.

``<stage>/checkpoints/step_00000100/`` holds ``index.json`` and two safetensors files of each rank:
weights, and optimizer state (one file of both in the first edition). A logical tensor (a weight, or
a slot such as ``head.weight.momentum``) is written in parts by the ranks that own its rows.
"""

import hashlib
import itertools
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
from nanolib.rundir import saved_recipe, whole_file, write_atomic

VERSION = 1
KEPT = 2
OPTIMIZER = ".optimizer.safetensors"  # how the name of a file with optimizer state ends


class DamagedCheckpoint(ValueError):
    """A checkpoint folder that cannot be trusted; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    index: Mapping[str, Any]

    @property
    def step(self) -> int:
        return self.index["step"]

    def tensor(self, name: str) -> Tensor:
        """A whole logical tensor, assembled from its parts, on the CPU."""
        entry = self.index["tensors"][name]
        whole = torch.empty(entry["shape"])
        for part in entry["parts"]:
            with safe_open(self.path / part["file"], "pt") as file:
                whole[slice(*part["rows"])] = file.get_tensor(f"{name}@{part['rows'][0]}")
        return whole


def save(
    folder: Path, step: int, model: GPT, optimizer: MuonAdamW, about: Mapping[str, Any]
) -> None:
    """Write ``folder/step_<step>`` with all ranks together, whole or not at all; keep the last two.

    about, kept in the index: the recipe (flat), vocabulary size and tokenizer fingerprint.
    """
    final, runtime = folder / f"step_{step:08d}", optimizer.runtime
    partial = folder / f"{final.name}.partial"
    if runtime.is_lead:
        for unfinished in folder.glob("*.partial"):  # of processes that were killed while saving
            shutil.rmtree(unfinished)
        partial.mkdir(parents=True)
    runtime.barrier()
    shares = runtime.gather(_write_share(partial, model, optimizer))
    if runtime.is_lead:
        files, tensors = {}, {}
        for name, digest, parts in itertools.chain(*shares):
            files[name] = digest
            for tensor, rows, shape in parts:
                entry = tensors.setdefault(tensor, {"shape": shape, "parts": []})
                entry["parts"].append({"file": name, "rows": rows})
        index = {"version": VERSION, "files": files, "tensors": tensors}
        index |= {"step": step, "updates": optimizer.steps, **about}
        write_atomic(partial / "index.json", json.dumps(index))
        _sync_folder(partial)
        if final.exists():  # a damaged one that we resumed behind
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(folder)
        for old in _folders(folder)[KEPT:]:
            shutil.rmtree(old)
    runtime.barrier()


def _write_share(folder: Path, model: GPT, optimizer: MuonAdamW) -> list[tuple[str, str, list]]:
    """Write what this rank owns; (file, its hash, [tensor, rows, shape of all] of each part)."""
    rank, params, written = optimizer.runtime.rank, dict(model.named_parameters()), []
    weights, states = [], []  # (tensor, rows, shape of all, values)
    for group in optimizer.groups:
        for name, rows, inner in group.owned(rank):
            values, shape = params[name].detach()[rows], list(params[name].shape)
            where = [rows.start, rows.stop]
            weights.append((name, where, shape, values))
            for slot, state in group.state.items():
                value = state[inner].reshape(len(values), -1)
                whole = [shape[0], value.shape[1]]  # of NorMuon's squares [R, 1]
                states.append((f"{name}.{slot}", where, whole, value))
    for ending, owned in ((".safetensors", weights), (OPTIMIZER, states)):
        data = to_safetensors({f"{name}@{at[0]}": x.cpu().contiguous() for name, at, _, x in owned})
        with whole_file(path := folder / f"rank_{rank}{ending}") as file:
            file.write(data)
        parts = [part[:3] for part in owned]
        written.append((path.name, hashlib.sha256(data).hexdigest(), parts))
    return written


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
    """The checkpoint in a folder, each file (weights_only: not the optimizer's state) checked
    against the index's hashes; DamagedCheckpoint names one that differs."""
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
    """The newest undamaged checkpoint below `folder`, or None where there never was one."""
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
    """The model of a stage's newest checkpoint, which must be of what `about` says, if given."""
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
    """Raise ValueError unless a checkpoint was made by the recipe and tokenizer of `about`."""
    saved = saved_recipe(checkpoint.index["recipe"], checkpoint.path)
    theirs = {**flatten(replace_settings(Recipe(), saved)), **checkpoint.index}
    mine = {**about["recipe"], **about, "recipe": theirs["recipe"]}
    if differing := [f"{k} {theirs[k]!r} != {v!r}" for k, v in mine.items() if theirs[k] != v]:
        belongs = f"{checkpoint.path} belongs to another run ({', '.join(differing)})"
        raise ValueError(f"{belongs}; use `--run NAME` for a run of its own")
