"""What fits on a device, and what a run will take.

The micro-batch is a matter of the machine, not of the recipe: any split of the same rows into
micro-batches gives the same gradient. So the largest that fits is found, first by an estimate, then
on a GPU by trying.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanolib import accounting
from nanolib.accounting import Machine, Memory
from nanolib.config import Config, GRPOConfig, ModelConfig, Recipe
from nanolib.data.packing import Batch
from nanolib.model import GPT
from nanolib.progress import clock
from nanolib.runtime import Runtime

MARGIN = 0.92  # of a GPU's memory: the rest is for the allocator's gaps and the ranks' messages
# Of the activations that `accounting` counts, the part that a compiled bfloat16 program keeps: what
# brings the estimate within a tenth of the peaks that were measured on an H100 (runs/bench/device.md).
KEPT_ON_CUDA = 0.82
ENOUGH = 65_536  # tokens of a micro-batch, the original's most: more would only take more memory
ORIGINAL_SECONDS = 3 * 3600 + 51 * 60  # the original's d20 on 8xH100, all stages; $92
ORIGINAL_PARAMETERS = 560_988_160


def size(number: float) -> str:
    """Bytes for people.

    >>> size(12_300_000), size(71.54e9)
    ('12.3 MB', '71.5 GB')
    """
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


# ---------------------------------------------------------------------------- what should fit


def needed(
    model: ModelConfig, vocab_size: int, rows: int, ranks: int, *, cuda: bool, bytes_a_number: int
) -> Memory:
    """An estimate of the bytes that training takes on one of `ranks` devices."""
    return accounting.memory(
        model,
        vocab_size,
        rows=rows,
        ranks=ranks,
        bytes_a_number=bytes_a_number,
        kept=KEPT_ON_CUDA if cuda else 1.0,
    )


def estimated_rows(
    model: ModelConfig,
    vocab_size: int,
    share: int,
    ranks: int,
    room: float,
    *,
    cuda: bool,
    bytes_a_number: int,
) -> int:
    """`share`, or what holds `ENOUGH` tokens if that is less, where so many rows should fit into
    `room` bytes; else the largest power of two that should, at least 1.

    Raises ValueError that names what to lower where one row does not fit.
    """
    rows = min(share, max(1, ENOUGH // model.sequence_len))
    while True:
        memory = needed(model, vocab_size, rows, ranks, cuda=cuda, bytes_a_number=bytes_a_number)
        if memory.total <= room:
            return rows
        if rows == 1:
            raise _too_small(model, memory.total, room)
        rows = _smaller(rows)


def _smaller(rows: int) -> int:
    """The largest power of two below `rows`; 0 below 1."""
    return 1 << ((rows - 1).bit_length() - 1) if rows > 1 else 0


def _too_small(model: ModelConfig, wanted: float, room: float) -> ValueError:
    return ValueError(
        f"the device is too small: one row of {model.sequence_len} tokens at depth {model.depth} "
        f"needs about {size(wanted)}, and {size(room)} can be used; lower "
        "model.sequence_len or model.depth, or use more devices (machine.ranks)"
    )


# ---------------------------------------------------------------------------- what does fit


def fitting_rows(
    model: GPT, nll: Callable[[Batch], Tensor], length: int, share: int, runtime: Runtime
) -> int:
    """The rows of `length` tokens that one micro-batch may have on this device, `share` at most.

    The same on all ranks, which must all call it, before the optimizer is made and with no
    gradients. nll: what training will call, compiled if training compiles. On CUDA the estimate is
    tried, with bytes set aside for the optimizer's state, and halved while it does not fit. (A
    compiled program keeps far less than an eager one, so only trying the compiled one says what
    fits; what it compiles, training uses again.) Elsewhere the estimate stands.
    Raises ValueError where not even one row fits.
    """
    runtime.sum(torch.zeros(1, device=runtime.device))  # NCCL takes its memory before we measure
    room = min(runtime.gather(_room(runtime)))
    model_config, vocab, ranks = model.config, model.vocab_size, runtime.world_size
    about = {"cuda": runtime.device.type == "cuda", "bytes_a_number": runtime.dtype.itemsize}
    start = estimated_rows(model_config, vocab, share, ranks, room, **about)
    if not about["cuda"]:
        return start
    rows = _largest(lambda rows: _fits(model, nll, length, rows, room, runtime), start, runtime)
    if rows == 0:
        raise _too_small(model_config, needed(model_config, vocab, 1, ranks, **about).total, room)
    return rows


def _room(runtime: Runtime) -> float:
    """Bytes that this rank may use in all, the model's weights included."""
    if runtime.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(runtime.device)
        return MARGIN * (free + torch.cuda.memory_reserved(runtime.device))
    return main_memory(runtime.world_size)


def main_memory(ranks: int) -> float:
    """Bytes of the computer's own memory for each rank: half of it is left to everything else."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 / ranks


def _largest(fits: Callable[[int], bool], start: int, runtime: Runtime) -> int:
    """The first of `start` and the powers of two below it that fits on every rank; 0 if none."""
    rows = start
    while rows:
        failed = torch.tensor(int(not fits(rows)), device=runtime.device)
        if int(runtime.sum(failed)) == 0:
            break
        rows = _smaller(rows)
    return rows


def _fits(
    model: GPT,
    nll: Callable[[Batch], Tensor],
    length: int,
    rows: int,
    room: float,
    runtime: Runtime,
) -> bool:
    """Whether training steps of so many rows really fit; leaves no gradients and no memory behind.

    Nothing is sent between ranks in here, so one rank may fail where another does not.
    """
    cuda = runtime.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(runtime.device)
    try:
        _try(model, nll, length, rows, runtime)
        fits = not cuda or torch.cuda.max_memory_allocated(runtime.device) <= room
    except torch.OutOfMemoryError:
        fits = False
    for weight in model.parameters():  # outside of `except`: its traceback holds on to tensors
        weight.grad = None
    if cuda:
        torch.cuda.empty_cache()
        if not fits:  # or the next size would be compiled as one of many, which is slower
            torch.compiler.reset()
    return fits


def _try(
    model: GPT, nll: Callable[[Batch], Tensor], length: int, rows: int, runtime: Runtime
) -> None:
    """Two passes forward and backward and the room of an update, beside the optimizer's state."""
    memory = accounting.memory(model.config, model.vocab_size, rows=0, ranks=runtime.world_size)
    state = torch.empty(memory.optimizer, dtype=torch.uint8, device=runtime.device)
    ids_BT = torch.arange(rows * length, device=runtime.device).view(rows, length)
    ids_BT = ids_BT % model.vocab_size
    targets_BT = ids_BT.clone()  # or it would be compiled for targets that are the inputs
    batch = Batch(inputs_BT=ids_BT, targets_BT=targets_BT)
    for _ in range(2):  # the second finds the first one's gradients there, as training does
        with runtime.autocast():
            nll_BT = nll(batch)
        nll_BT.sum().backward()
        del nll_BT
    stacks = torch.empty(memory.step, dtype=torch.uint8, device=runtime.device)
    del state, stacks


# ---------------------------------------------------------------------------- the plan


def share_of(recipe: Recipe, stage: str, ranks: int) -> int:
    """Rows of one step of a stage on one rank. GRPO deals out questions with all their samples."""
    config = getattr(recipe, stage)
    if isinstance(config, GRPOConfig):
        return -(-config.questions // ranks) * config.samples
    return config.batch_tokens // recipe.model.sequence_len // ranks


def plan(config: Config, machine: Machine) -> Iterator[str]:
    """Lines that say what a run takes on a machine. Raises ValueError where it does not fit."""
    recipe, model = config.recipe, config.recipe.model
    vocab, ranks = recipe.tokenizer.vocab_size, machine.count
    device, rate = machine.device, machine.dollars_per_hour
    counts = model.parts(vocab)
    total = sum(counts.values())
    yield (
        f"{config.profile} on {ranks} x {machine.name} ({device.memory} GB and "
        f"{device.peak / 1e12:,.0f} TFLOP/s in bfloat16 each), ${rate:,.2f} an hour"
    )
    yield (
        f"model        depth {model.depth}, width {model.width:,}, {model.heads} heads, context "
        f"{model.sequence_len:,}, vocabulary {vocab:,}"
    )
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    yield f"parameters   {total:,}: {parts}"
    yield from _memory_lines(config, machine)
    mfu = accounting.assumed_mfu(model.depth)
    yield (
        f"time         projected, never measured: at {mfu:.1%} of the peak, from what one H100 "
        "reached (without messages between GPUs) at"
    )
    yield "             " + ", ".join(
        f"depth {depth} ({share:.1%})" for depth, share in accounting.MEASURED_MFU.items()
    )
    for name in recipe.models:
        yield f"{name:<12} {_stage_line(recipe, name, machine)}"
    if (total, machine.name, ranks) == (ORIGINAL_PARAMETERS, "H100", 8) and recipe.base.enabled:
        yield _beside_the_original(recipe, machine)


def _memory_lines(config: Config, machine: Machine) -> Iterator[str]:
    recipe, ranks, room = config.recipe, machine.count, MARGIN * machine.device.memory * 1e9
    model, vocab = recipe.model, recipe.tokenizer.vocab_size
    share = share_of(recipe, "base", ranks)
    rows = config.machine.device_batch or estimated_rows(
        model, vocab, share, ranks, room, cuda=True, bytes_a_number=2
    )
    memory = needed(model, vocab, rows, ranks, cuda=True, bytes_a_number=2)
    shared = f" (shared by {ranks})" if ranks > 1 else ""
    yield (
        f"memory       a device, estimated: weights {size(memory.weights)} + gradients "
        f"{size(memory.gradients)} + optimizer {size(memory.optimizer)}{shared} + activations "
        f"{size(memory.activations)} = {size(memory.total)} of {machine.device.memory} GB"
    )
    yield f"micro-batch  {rows} rows of base's {share} a rank (on the device it is tried)"


def _stage_line(recipe: Recipe, name: str, machine: Machine) -> str:
    """Steps, tokens, FLOPs, hours and dollars, where the configuration alone decides them."""
    stage, model = getattr(recipe, name), recipe.model
    if isinstance(stage, GRPOConfig):
        steps = f"{stage.steps:,} steps" if stage.steps else f"epochs: {stage.epochs:g}, in steps"
        answers = stage.questions * stage.samples
        return f"{steps} of {answers:,} answers; not projected: most of it is sampling"
    if stage.steps is None:
        return (
            f"epochs: {stage.epochs:g}; not projected: that depends on its conversations' lengths"
        )
    tokens = stage.steps * stage.batch_tokens
    vocab = recipe.tokenizer.vocab_size
    seconds = accounting.training_seconds(model, vocab, tokens, machine)
    flops = accounting.training_flops(model, vocab) * tokens
    return (
        f"{stage.steps:,} steps x {stage.batch_tokens:,} tokens = {tokens / 1e6:,.0f} M tokens "
        f"({tokens / model.parameters(vocab):.1f} a parameter), {flops:.2e} FLOPs: "
        f"{clock(seconds)}, ${accounting.dollars(seconds, machine.dollars_per_hour):.2f} (projected)"
    )


def _beside_the_original(recipe: Recipe, machine: Machine) -> str:
    tokens = (recipe.base.steps or 0) * recipe.base.batch_tokens
    vocab = recipe.tokenizer.vocab_size
    seconds = accounting.training_seconds(recipe.model, vocab, tokens, machine)
    difference = ORIGINAL_SECONDS - seconds
    return (
        f"original     {clock(ORIGINAL_SECONDS)} and $92 for all its stages and scores; base alone is "
        f"projected at {clock(abs(difference))} {'less' if difference > 0 else 'more'}"
    )
