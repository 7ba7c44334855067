"""The trainer of every stage: base, mid, SFT and GRPO differ only in data source and loss.

A step's target tokens are counted over all micro-batches and ranks before the first backward pass,
and each micro-batch's summed loss is divided by that count. So the gradient does not depend on how
rows are split into micro-batches and ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanolib import checkpoint
from nanolib.accounting import training_flops
from nanolib.config import Schedule
from nanolib.data.packing import Batch, Source
from nanolib.guard import Guard
from nanolib.model import GPT
from nanolib.optim import MuonAdamW
from nanolib.rundir import StageDir
from nanolib.runtime import Replay, Runtime, record_graph

# FLOPs of a micro-batch, below which launching its kernels takes longer than running them (H200).
RECORD_FLOPS = 2e13


# From `nll` [B, T] and its batch: the loss, summed over the targets. A stage's loss is that sum over
# all ranks and micro-batches, divided by the number of targets.
Loss = Callable[[Tensor, Batch], Tensor]


def cross_entropy(nll_BT: Tensor, batch: Batch) -> Tensor:
    return nll_BT.sum()


class Stopped(Exception):
    """The stage stopped on request after saving; running it again resumes."""


def lr_scale(schedule: Schedule, step: int, steps: int) -> float:
    """The learning-rate multiplier at a step (from 0): warmup, constant, warmdown.

    >>> [lr_scale(Schedule(warmup=0.25, warmdown=0.5), s, 8) for s in (0, 1, 3, 4, 7)]
    [0.5, 1.0, 1.0, 1.0, 0.25]
    """
    warmup, warmdown = round(schedule.warmup * steps), round(schedule.warmdown * steps)
    if step < warmup:
        return schedule.lr * (step + 1) / warmup
    if step < steps - warmdown:
        return schedule.lr
    left = (steps - step) / warmdown
    return schedule.lr * (left + (1 - left) * schedule.final)


@dataclass(kw_only=True)
class Trainer:
    """Trains a model from its newest checkpoint to the last step, saving regularly.

    Raises Stopped, after saving, if the guard requests a stop.
    """

    stage: StageDir
    model: GPT
    optimizer: MuonAdamW
    source: Source
    schedule: Schedule
    steps: int
    save_every: int  # steps, but never within `save_apart` of the last save
    save_apart: float = 0.0  # seconds, by rank 0's clock
    save_minutes: float | None = None  # also save this often, by the same clock
    eval_every: int  # steps
    runtime: Runtime
    guard: Guard
    about: Mapping[str, Any]  # recipe and tokenizer, saved in checkpoints
    loss: Loss = cross_entropy
    nll: Callable[[Batch], Tensor] | None = None  # compiled `model.nll`; None: uncompiled
    # Called every `eval_every` steps, after the last and, except in base, before the first.
    score: Callable[[], Mapping[str, float]] | None = None

    step: int = field(default=0, init=False)  # steps done
    _writing: Future[None] | None = field(default=None, init=False)  # a checkpoint being written
    _saved_at: float = field(default=0.0, init=False)  # time.monotonic()
    _pace: float | None = field(default=None, init=False)  # seconds per step, smoothed
    # By shape: tensors at fixed addresses and a CUDA graph that reads them.
    _recorded: dict[torch.Size, tuple[list[Tensor], Replay]] = field(
        default_factory=dict, init=False
    )

    def fit(self) -> None:
        """Resume, train to the last step and save; each evaluation follows its save."""
        self.resume()
        self._saved_at = time.monotonic()
        if self.step not in [row["step"] for row in self.stage.metrics.rows("eval")]:
            self.run_score()  # interrupted between save and evaluation
        try:
            while self.step < self.steps:
                started = time.perf_counter()
                row, stop, save = self.train_step()
                self.log(row, time.perf_counter() - started)
                if stop or save or self.step == self.steps:
                    self.save()
                if stop and self.step < self.steps:
                    raise Stopped(f"stopped and saved after step {self.step} of {self.steps}")
                self.run_score()
        finally:
            self.finish_save()  # also if an evaluation was interrupted

    def resume(self) -> None:
        """Load the newest complete checkpoint, if any, and drop metrics of later steps."""
        if self.runtime.is_lead:
            checkpoint.remove_unfinished(self.stage.checkpoints)
        found = checkpoint.latest(self.stage.checkpoints)
        if found is not None:
            checkpoint.check_same(found, self.about)
            checkpoint.restore_model(found, self.model)
            checkpoint.restore_optimizer(found, self.optimizer)
            self.step = found.step
        self.runtime.barrier()
        if self.runtime.is_lead:
            self.stage.metrics.truncate(self.step)
        self.runtime.barrier()

    def train_step(self) -> tuple[dict[str, Any], bool, bool]:
        """Run one step: one or more optimizer updates, as the source provides.

        Returns (metrics, whether to stop, whether to save), the same on all ranks.
        """
        scale = lr_scale(self.schedule, self.step, self.steps)
        loss, tokens, norm, stop, save = 0.0, 0, 0.0, False, False
        for batches in self.source.updates(self.step):
            count = sum(batch.count for batch in batches)  # in host memory
            mine = [count, self.guard.stop_requested, self._save_due()]
            counts = self.runtime.sum(torch.tensor(mine, device=self.runtime.device))
            part = self.forward_backward(batches, counts[0])
            grads, squares = self.optimizer.reduce()
            sums = self.runtime.sum(torch.stack((part, squares)))
            # The only device-to-host transfer of an update, so the only synchronisation.
            count, stops, saves, loss, squares = torch.cat((counts, sums)).tolist()
            self._check(count, loss)
            norm = math.sqrt(squares)
            self.optimizer.update(grads, norm, scale)
            self._zero_grad()
            tokens += int(count)
            stop, save = stop or stops > 0, save or saves > 0
        self.step += 1
        # "lr" is the schedule's multiplier, not a learning rate.
        return {"loss": loss, "grad_norm": norm, "lr": scale, "tokens": tokens}, stop, save

    def forward_backward(self, batches: Sequence[Batch], count: Tensor | int) -> Tensor:
        """Accumulate the gradient of loss sum / count; returns this rank's part of the loss.

        count: over all ranks. Summed over ranks, the parts are the loss in nats per token.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for batch in batches:
            if self._records(batch):
                total += self._replay(batch, torch.as_tensor(count))
            else:
                total += self._pass(batch.to(self.runtime.device), count)
        return total

    def _pass(self, batch: Batch, count: Tensor | int) -> Tensor:
        """The forward and backward pass of one micro-batch; returns its part of the loss."""
        with self.runtime.autocast():
            nll_BT = (self.nll or self.model.nll)(batch)
        loss = self.loss(nll_BT, batch) / count
        loss.backward()
        return loss.detach()

    def _records(self, batch: Batch) -> bool:
        """Whether to replay CUDA graphs: for small micro-batches of fixed shape, whose kernels
        would take less time than their launches."""
        if self.runtime.device.type != "cuda" or batch.fields:  # GRPO's shapes vary
            return False
        flops = training_flops(self.model.config, self.model.vocab_size)
        return flops * batch.inputs_BT.numel() < RECORD_FLOPS

    def _replay(self, batch: Batch, count: Tensor) -> Tensor:
        """`_pass` as a CUDA graph, recorded at the first micro-batch of each shape."""
        shape, given = batch.inputs_BT.shape, (batch.inputs_BT, batch.targets_BT, count)
        if shape not in self._recorded:
            copies = [x.to(self.runtime.device, copy=True) for x in given]
            self._recorded[shape] = copies, self._record(*copies)
        copies, replay = self._recorded[shape]
        for copy, new in zip(copies, given, strict=True):
            copy.copy_(new, non_blocking=True)
        return replay()

    def _record(self, inputs_BT: Tensor, targets_BT: Tensor, count: Tensor) -> Replay:
        batch = Batch(inputs_BT=inputs_BT, targets_BT=targets_BT)
        for weight in self.model.parameters():  # from here on at fixed addresses
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        before = [grad.clone() for grad in self._grads()]
        replay = record_graph(lambda: self._pass(batch, count), warm_ups=2)
        torch._foreach_copy_(self._grads(), before)
        return replay

    def _grads(self) -> list[Tensor]:
        return [weight.grad for weight in self.model.parameters() if weight.grad is not None]

    def _zero_grad(self) -> None:
        if self._recorded:
            torch._foreach_zero_(self._grads())
        else:
            self.optimizer.zero_grad()

    def _save_due(self) -> bool:
        """Whether to save after this step; only rank 0 decides."""
        if not self.runtime.is_lead:
            return False
        apart, longest = time.monotonic() - self._saved_at, self.save_minutes
        periodic = (self.step + 1) % self.save_every == 0 and apart >= self.save_apart
        return periodic or (longest is not None and apart >= 60 * longest)

    def _check(self, count: float, loss: float) -> None:
        """Raise, before the update, if there are no targets or the loss is not finite."""
        name = self.stage.name
        if count == 0:
            raise ValueError(f"step {self.step} of {name} has no token to learn from")
        if not math.isfinite(loss):
            at = f"the loss is {loss} at step {self.step} of {name}"
            raise FloatingPointError(f"{at}; lower {name}.lr (now {self.schedule.lr})")

    def log(self, row: Mapping[str, Any], seconds: float) -> None:
        """Append one row to metrics.jsonl (rank 0 only)."""
        self._pace = seconds if self._pace is None else 0.9 * self._pace + 0.1 * seconds
        if self.runtime.is_lead:
            self.stage.metrics.append(
                kind="train",
                step=self.step,
                steps=self.steps,
                **row,
                seconds=seconds,
                tokens_per_second=row["tokens"] / seconds,
                seconds_left=self._pace * (self.steps - self.step),
            )

    def run_score(self) -> None:
        """Append a row of kind "eval" if this step is due for it."""
        due = self.step % self.eval_every == 0 or self.step == self.steps
        if self.score is not None and due and (self.step > 0 or self.stage.name != "base"):
            scores = self.score()
            if self.runtime.is_lead:
                self.stage.metrics.append(kind="eval", step=self.step, **scores)

    def save(self) -> None:
        """Start writing a checkpoint in the background; `finish_save` waits for it."""
        self.finish_save()
        self._saved_at = time.monotonic()
        written = self.stage.checkpoints, self.step, self.model, self.optimizer, self.about
        self._writing = checkpoint.begin(*written)

    def finish_save(self) -> None:
        """Wait for the checkpoint being written, if any; raises its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
