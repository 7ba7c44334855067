"""Finds the largest micro-batch that fits on a device, and projects a run's time and cost.

The micro-batch size does not affect the gradient, so the largest that fits is used.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from nanolib import accounting, checkpoint, hub
from nanolib.accounting import Machine, TrainingMemory
from nanolib.config import Config, GRPOConfig, MachineConfig, Recipe, check_together
from nanolib.config import steps as steps_of
from nanolib.data import own
from nanolib.data.packing import Batch
from nanolib.model import GPT
from nanolib.progress import clock
from nanolib.runtime import Runtime

MARGIN = 0.92  # usable fraction of GPU memory; the rest is for fragmentation and NCCL
ENOUGH = 65_536  # tokens per micro-batch, as in nanochat; more is not faster
UNCOUNTED = "not counted before the data is there (--mirror DIR)"

Part = tuple[str, str, float | None, float]  # a stage, its work, seconds (if known), bytes on disk
Nll = Callable[[Batch], Tensor]  # the loss function of training, compiled if training compiles


def size(number: float) -> str:
    """Format bytes: 71,540,000,000 as 71.5 GB, 12,300,000 as 12.3 MB."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def estimated_rows(memory: TrainingMemory, share: int, room: float) -> int:
    """Rows estimated to fit into `room` bytes: `share` (at most `ENOUGH` tokens) or else a power
    of two; ValueError if not even one fits."""
    most = min(share, max(1, ENOUGH // memory.model.sequence_len))
    return _largest(lambda rows: memory.total(rows) <= room, most) or _too_small(memory, room)


def _too_small(memory: TrainingMemory, room: float) -> NoReturn:
    one = f"one row of {memory.model.sequence_len} tokens at depth {memory.model.depth}"
    needs = f"{one} needs about {size(memory.total(1))}, and {size(room)} can be used"
    remedy = "lower model.sequence_len or model.depth, or use more devices (machine.ranks)"
    raise ValueError(f"the device is too small: {needs}; {remedy}")


def _largest(fits: Callable[[int], bool], rows: int) -> int:
    """The largest of `rows` and the powers of two below it that fits; 0 if none does."""
    while rows and not fits(rows):
        rows = 2 ** (rows - 1).bit_length() // 2
    return rows


def fitting_rows(model: GPT, nll: Nll, share: int, runtime: Runtime) -> int:
    """Full rows that fit in a micro-batch on this device, at most `share`.

    All ranks must call it, before the optimizer exists. On CUDA the estimate is tried and halved
    until it fits (training reuses the compiled code); elsewhere the estimate is returned.
    """
    runtime.sum(torch.zeros(1, device=runtime.device))  # NCCL allocates before we measure
    cuda, ranks = runtime.device.type == "cuda", runtime.world_size
    room = main_memory(ranks)
    if cuda:
        free, _ = torch.cuda.mem_get_info(runtime.device)
        room = MARGIN * (free + torch.cuda.memory_reserved(runtime.device))
    room = min(runtime.gather(room))  # bytes available on every rank, weights included
    memory = TrainingMemory(model.config, model.vocab_size, ranks, cuda, runtime.dtype.itemsize)
    rows = estimated_rows(memory, share, room)
    if cuda:
        rows = _largest(lambda n: all(runtime.gather(_fits(n, model, nll, room, runtime))), rows)
    return rows or _too_small(memory, room)


def main_memory(ranks: int) -> float:
    """Bytes of host memory per rank; half of the total is left for everything else."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 / ranks


def _fits(rows: int, model: GPT, nll: Nll, room: float, runtime: Runtime) -> bool:
    """Try training steps of `rows` rows; frees gradients and memory afterwards. Uses no
    collectives, because only some ranks may run out of memory."""
    cuda = runtime.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(runtime.device)
    try:
        _try(model, nll, rows, runtime)
        fits = not cuda or torch.cuda.max_memory_allocated(runtime.device) <= room
    except torch.OutOfMemoryError:
        fits = False
    model.zero_grad()  # not in `except`, where the traceback keeps tensors alive
    if cuda:
        torch.cuda.empty_cache()
        if not fits:  # else the next size compiles with dynamic shapes, which are slower
            torch.compiler.reset()
    return fits


def _try(model: GPT, nll: Nll, rows: int, runtime: Runtime) -> None:
    """Run two forward and backward passes and allocate as much as the optimizer would."""
    memory = TrainingMemory(model.config, model.vocab_size, runtime.world_size)
    state = torch.empty(memory.optimizer, dtype=torch.uint8, device=runtime.device)
    count = rows * model.config.sequence_len
    ids_BT = torch.arange(count, device=runtime.device).view(rows, -1) % model.vocab_size
    # Copied, or torch.compile would specialise on targets that alias the inputs.
    batch = Batch(inputs_BT=ids_BT, targets_BT=ids_BT.clone())
    for _ in range(2):  # the second pass accumulates gradients, as in training
        with runtime.autocast():
            nll_BT = nll(batch)
        nll_BT.sum().backward()
    update = torch.empty(memory.update, dtype=torch.uint8, device=runtime.device)
    del state, update


def share_of(recipe: Recipe, stage: str, ranks: int) -> int:
    """Rows per step and rank in a stage. GRPO keeps all samples of a question on one rank."""
    config = getattr(recipe, stage)
    if isinstance(config, GRPOConfig):
        return -(-config.questions // ranks) * config.samples
    return config.batch_tokens // recipe.model.sequence_len // ranks


def this_machine(given: MachineConfig) -> Machine:
    gpus = torch.cuda.device_count() if given.device in ("auto", "cuda") else 0
    if found := [torch.cuda.get_device_properties(number) for number in range(gpus)]:
        name, memory = found[0].name, min(gpu.total_memory for gpu in found) / 1e9
        return Machine(name=name, count=gpus, peak=accounting.peak_flops(name), memory=memory)
    if given.device == "cuda":
        seen = "machine.device is 'cuda', which torch does not see here"
        raise ValueError(f"{seen}; name the machine that it is for (--on 8xH100)")
    ranks = given.ranks or 1
    memory = main_memory(ranks) / 1e9
    return Machine(name="CPU process", count=ranks, peak=None, memory=memory, cuda=False)


def plan(
    config: Config, machine: Machine, counted: Mapping[str, float] | None = None
) -> Iterator[str]:
    """Lines with the size, memory, time, cost and disk of a run on `machine.ranks` (or all) devices.

    counted: what the data holds (`stages.text.counted`), if it is there.
    """
    recipe, given = config.recipe, config.machine
    ranks = given.ranks * given.nodes if given.ranks else machine.count
    if ranks > machine.count:
        needs = f"machine.ranks = {ranks} needs as many devices, and there are {machine.count}"
        raise ValueError(f"{needs}; lower it")
    check_together(recipe, replace(given, ranks=ranks, nodes=1))
    if given.dollars_per_hour is not None:
        machine = replace(machine, dollars_per_hour=given.dollars_per_hour)
    machine, model, vocab = replace(machine, count=ranks), recipe.model, recipe.tokenizer.vocab_size
    peak = f", {machine.peak / 1e12:,.0f} TFLOP/s in bfloat16" if machine.peak else ""
    price = f", ${machine.dollars_per_hour:,.2f} an hour" if machine.dollars_per_hour else ""
    yield f"{config.profile} on {ranks} x {machine.name} ({machine.memory:.3g} GB{peak} each){price}"
    shape = f"depth {model.depth}, width {model.width:,}, {model.heads} heads"
    yield f"model        {shape}, context {model.sequence_len:,}, vocabulary {vocab:,}"
    parts = ", ".join(f"{name} {count:,}" for name, count in model.parts(vocab).items())
    yield f"parameters   {model.parameters(vocab):,}: {parts}"
    yield from own.describe(config.recipe.data)
    yield from _stage_lines(config, machine, counted or {})
    yield from accounting.measured(model.depth, machine)


def _stage_lines(config: Config, machine: Machine, counted: Mapping[str, float]) -> Iterator[str]:
    recipe, given, ranks = config.recipe, config.machine, machine.count
    room = machine.memory * 1e9 * (MARGIN if machine.cuda else 1)
    half = given.dtype == "bfloat16" or (machine.cuda and given.dtype != "float32")
    vocab_size, width = recipe.tokenizer.vocab_size, 2 if half else 4
    memory = TrainingMemory(recipe.model, vocab_size, ranks, machine.cuda, width)
    fixed = f"weights and gradients {size(2 * memory.weights)} + optimizer {size(memory.optimizer)}"
    yield f"memory       of one device, estimated: {fixed} + a micro-batch's activations"
    parts, saved = _text(config, counted), memory.weights + replace(memory, ranks=1).optimizer
    for name in recipe.models:
        share = share_of(recipe, name, ranks)
        found = estimated_rows(memory, share, room)
        rows = min(share, given.device_batch or found)
        if memory.total(rows) > room:
            wrong = f"machine.device_batch = {rows} rows should not fit into {size(room)}"
            raise ValueError(f"{wrong}; lower it to {found}, or leave it out to have it found")
        batch = f"{rows} of {share} rows a rank at once ({size(memory.total(rows))})"
        work, seconds = _work(recipe, name, machine, counted)
        parts.append((name, f"{batch}; {work}", seconds, checkpoint.KEPT * saved))
    starts, them, scoring = 2 * len(recipe.models), ", ".join(recipe.models), None
    problems, each = UNCOUNTED, counted.get("problems")
    if each is not None:
        problems = f"{each:,.0f} problems each"
        scoring = machine.scoring_seconds(recipe.model, vocab_size, each * len(recipe.models))
    parts.append(("evaluations", f"of {them}; {problems}", scoring, 0))
    starting = starts * accounting.STARTING if machine.peak else None
    parts.append(("starting", f"{starts} stages", starting, 0))
    without = [name for name, _, seconds, _ in parts if seconds is None]
    known = sum(seconds or 0 for *_, seconds, _ in parts) or None
    whole = f"without {', '.join(without)}" if without else "stages"
    parts.append(("all", whole, known, sum(part[-1] for part in parts)))
    for name, work, seconds, disk in parts:
        dollars = (machine.dollars_per_hour or 0) * (seconds or 0) / 3600
        price = f", ${dollars:.2f}" if dollars else ""
        time = "not measured" if seconds is None else f"{clock(seconds)}{price} (projected)"
        yield f"{name:<12} {work}: {time}" + (f", {size(disk)} on disk" if disk else "")


def _text(config: Config, counted: Mapping[str, float]) -> list[Part]:
    recipe, data, base = config.recipe, config.recipe.data, config.recipe.base
    vocab_size, tokens = recipe.tokenizer.vocab_size, (base.steps or 0) * base.batch_tokens
    fetched = data.source == "hub" and not data.text
    text = hub.BYTES_PER_TOKEN * tokens * (fetched and not data.text_shards)
    if "text" in counted:
        text, tokens = counted["text"], counted["text"] / accounting.bytes_per_token(vocab_size)
    if not text:
        return [(name, UNCOUNTED, None, 0) for name in ("data", "tokenizer", "shards")]
    read = min(text, recipe.tokenizer.max_chars)
    onto = accounting.PARQUET * text * (fetched and config.machine.mirror is None)
    reading = onto / accounting.DOWNLOADED + text / accounting.SEARCHED
    ids = tokens * (2 if vocab_size <= 2**16 else 4)
    return [
        ("data", f"{size(text)} of text", reading, onto),
        ("tokenizer", f"{size(read)} of text", read / accounting.TRAINED, 0),
        ("shards", f"{tokens / 1e6:,.0f} M tokens", text / accounting.ENCODED, ids),
    ]


def _work(
    recipe: Recipe, name: str, machine: Machine, counted: Mapping[str, float]
) -> tuple[str, float | None]:
    """What a training stage does, in words, and its seconds."""
    stage, model, vocab = getattr(recipe, name), recipe.model, recipe.tokenizer.vocab_size
    if (steps := steps_of(recipe, name, counted)) is None:
        return f"{stage.epochs:g} epochs, {UNCOUNTED}", None
    if isinstance(stage, GRPOConfig):
        answers, at_most = stage.questions * stage.samples, stage.max_new_tokens
        times = steps // (stage.eval_every or max(1, steps // 10)) + 1
        tested = times * stage.eval_questions * (1 + stage.eval_samples)
        text = f"{steps:,} steps x {answers:,} answers + {tested:,} in evaluations, of {at_most} tokens"
        tokens = steps * answers * at_most
        training = machine.training_seconds(model, vocab, steps, tokens)
        rate = machine.writing_rate(model.depth, answers // machine.count)
        known = training is not None and rate is not None
        return f"{text} at most", training + (tokens + tested * at_most) / rate if known else None
    tokens = steps * stage.batch_tokens
    flops = accounting.training_flops(model, vocab) * tokens
    text = f"{steps:,} steps x {stage.batch_tokens:,} tokens = {tokens / 1e6:,.0f} M tokens"
    text += f" ({tokens / model.parameters(vocab):.1f} a parameter), {flops:.2e} FLOPs"
    return text, machine.training_seconds(model, vocab, steps, tokens)
