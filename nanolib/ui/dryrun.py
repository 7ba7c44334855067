"""``nanolib run PROFILE --dry-run``: everything that can be known to fail before it starts.

Nothing is written, nothing is fetched and nothing is trained.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nanolib import config, hub, launch, pipeline, planning
from nanolib.accounting import Machine
from nanolib.config import MODELS, Config, MachineConfig
from nanolib.data.packing import Batch
from nanolib.model import GPT
from nanolib.rundir import Run
from nanolib.stages import text


def check(
    profile: str, run: str | None, overrides: Mapping[str, Any], on: str | None = None
) -> Iterator[str]:
    """Lines that say what a run would do. Raises ValueError at the first mistake.

    on: the machine it is meant for, such as "8xH100"; None: this one.
    """
    machine = Machine.parse(on) if on else None
    notebooks = {source: pipeline.read(source) for source in pipeline.chapters()}
    this = Run.peek(profile, run, overrides)
    yield f"run {this.name}: {'exists' if this.exists() else 'would be made'} at {this.path}"
    yield _data(this)
    yield from _devices(this.config, machine)
    yield from _roads(this, notebooks)


# ---------------------------------------------------------------------------- data


def _data(run: Run) -> str:
    """What the run will read; a mirror that is there is opened in full."""
    if run.config.recipe.data.source == "toyworld":
        return "data: the toy world, which the run writes itself"
    mirror = run.mirror()
    if run.config.machine.mirror is None and not mirror.is_dir():
        return "data: from the hub, not looked at here (--mirror FOLDER would be)"
    files = hub.text_files(run.config, mirror)
    text.check_tasks(run)
    return f"data: {mirror}: {len(files.train)} text files and one to validate; its tasks are whole"


# ---------------------------------------------------------------------------- shapes, memory


def _devices(given: Config, machine: Machine | None) -> Iterator[str]:
    """Each training stage's micro-batch on each device; checks that ranks share every batch."""
    name, ranks, room, cuda, size = _machine(given.machine, machine)
    flat = config.flatten(given.recipe) | {"machine.ranks": ranks}
    recipe = config.from_flat(given.profile, flat).recipe  # raises where ranks cannot share
    model, vocab = recipe.model, recipe.tokenizer.vocab_size
    about = {"cuda": cuda, "bytes_a_number": size}
    yield f"on {ranks} x {name}, {planning.size(room)} of memory each for training (estimated):"
    for stage in recipe.models:
        share, wanted = planning.share_of(recipe, stage, ranks), given.machine.device_batch
        found = planning.estimated_rows(model, vocab, share, ranks, room, **about)
        rows = found if wanted is None else min(share, wanted)
        memory = planning.needed(model, vocab, rows, ranks, **about)
        if memory.total > room:
            raise ValueError(
                f"machine.device_batch = {wanted} rows should not fit into {planning.size(room)}; "
                f"lower it to {found}, or leave it out to have it found"
            )
        shape = tuple(_forward(model, vocab, rows).shape)
        yield f"  {stage:<6} {rows} of {share} rows a rank at once, nll {shape}, about " + (
            planning.size(memory.total)
        )


def _machine(given: MachineConfig, machine: Machine | None) -> tuple[str, int, float, bool, int]:
    """Name, ranks, usable bytes of each, whether it is CUDA, bytes of a number."""
    gpus = torch.cuda.device_count() if given.device in ("auto", "cuda") else 0
    if machine is not None:
        gpus = machine.count
    elif given.device == "cuda" and not gpus:
        raise ValueError(
            "machine.device is 'cuda', which torch does not see here; name the machine that it is "
            "for (--on 8xH100), or try --machine.device auto"
        )
    ranks = given.ranks or max(1, gpus)
    if not gpus:
        size = 2 if given.dtype == "bfloat16" else 4
        return "share of this computer", ranks, planning.main_memory(ranks), False, size
    if ranks > gpus:
        raise ValueError(
            f"machine.ranks = {ranks} needs as many devices, and there are {gpus}; lower it"
        )
    if machine is not None:
        name, memory = machine.name, machine.device.memory * 1e9
    else:
        name = torch.cuda.get_device_name(0)
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(ranks))
    return name, ranks, planning.MARGIN * memory, True, 4 if given.dtype == "float32" else 2


def _forward(model: config.ModelConfig, vocab_size: int, rows: int) -> torch.Tensor:
    """A micro-batch's losses [B, T] on the meta device: shapes without numbers."""
    with torch.device("meta"):
        gpt = GPT(model, vocab_size)
        ids_BT = torch.zeros(rows, model.sequence_len, dtype=torch.long)
    counts = model.parts(vocab_size)
    assert sum(w.numel() for w in gpt.parameters()) == sum(counts.values())
    nll_BT = gpt.nll(Batch(inputs_BT=ids_BT, targets_BT=ids_BT))
    nll_BT.sum().backward()
    return nll_BT


# ---------------------------------------------------------------------------- the road


def _roads(run: Run, notebooks: Mapping[Path, Any]) -> Iterator[str]:
    """Each chapter and the stages that it would run."""
    seen: set[tuple[str, str | None]] = set()
    for source, notebook in notebooks.items():
        parts = []
        for stage, of in _stages(run, notebook):
            if (stage, of) not in seen:
                seen.add((stage, of))
                done = run.stage(stage, of).done() is not None
                parts.append((f"{stage} of {of}" if of else stage) + " (finished)" * done)
        yield f"chapter {source.stem:<18} {', '.join(parts) or 'reads what is there'}"
    enabled = run.config.recipe.models
    if missing := [name for name in enabled if (name, None) not in seen]:
        yield f"missing: no chapter runs {', '.join(missing)}"


def _stages(run: Run, notebook: Any) -> Iterator[tuple[str, str | None]]:
    """The stages a chapter's calls of `launch.stage` bring about, what they need before them.

    A call whose `of` is not spelled out counts for every model of the run.
    """
    recipe = run.config.recipe
    enabled = recipe.models
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    calls = [call for call in ast.walk(ast.parse(source)) if isinstance(call, ast.Call)]
    for call in sorted(calls, key=lambda call: call.lineno):
        named = ast.unparse(call.func) == "launch.stage" and isinstance(call.args[0], ast.Constant)
        name = ast.literal_eval(call.args[0]) if named else None
        if name not in config.STAGES or (name in MODELS and name not in enabled):
            continue
        for of in _models(call, enabled) if name == "eval" else [None]:
            yield from ((stage, None) for stage in launch.before(name, run, of))
            yield name, of


def _models(call: ast.Call, enabled: Sequence[str]) -> Sequence[str]:
    """Whose model an evaluation is of."""
    of = next((word.value for word in call.keywords if word.arg == "of"), None)
    if of is None:
        return enabled[-1:]
    return [name for name in enabled if not isinstance(of, ast.Constant) or of.value == name]
