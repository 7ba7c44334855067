"""The current process: device, dtype, threads, ranks and random seeds.

Nothing happens at import: a worker calls `Runtime.start` once and passes the result on.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nanolib.config import MachineConfig

Replay = Callable[[], Tensor]  # work on tensors at fixed addresses
Record = Callable[[Replay], Replay]  # such as `record_graph`


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Device, dtype, rank and world size of this process."""

    device: torch.device
    dtype: torch.dtype  # of activations; weights and optimizer state stay float32
    rank: int = 0
    world_size: int = 1

    @classmethod
    def start(cls, machine: MachineConfig) -> Runtime:
        """Choose the device, set threads, and join the process group under torchrun.

        Raises ValueError if the requested device is not available.
        """
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = _device(machine.device, int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_num_threads(machine.threads or max(1, (os.cpu_count() or 1) // world_size))
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
            # On an H100, torch prefers cuDNN attention, which spends 40 to 240 ms planning each new
            # shape; nearly every batch of prompts or answers has one. `GPT.compiled_nll` allows it
            # for training on rows of equal length.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if world_size > 1 and not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
        fitting = "bfloat16" if device.type == "cuda" else "float32"
        dtype = getattr(torch, fitting if machine.dtype == "auto" else machine.dtype)
        return cls(device=device, dtype=dtype, rank=rank, world_size=world_size)

    @property
    def is_lead(self) -> bool:
        """Whether this is rank 0, which writes the shared files."""
        return self.rank == 0

    def autocast(self, wanted: bool = True) -> torch.autocast:
        """Autocast to `dtype`; a no-op if that is float32 or `wanted` is False."""
        enabled = wanted and self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def sum(self, value: Tensor) -> Tensor:
        """All-reduce: sum `value` over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: object) -> list:
        """All-gather of picklable values: a list indexed by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(wanted: str, local_rank: int) -> torch.device:
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
    seen = [*(name for name, backend in backends.items() if backend.is_available()), "cpu"]
    if wanted == "auto":
        wanted = seen[0]
    if wanted not in seen:
        raise ValueError(f"machine.device is {wanted!r}, which torch does not see here; try auto")
    return torch.device(wanted, local_rank) if wanted == "cuda" else torch.device(wanted)


def record_graph(work: Replay, warm_ups: int = 0) -> Replay:
    """Capture `work`, which must have run before, as a CUDA graph: one launch, not hundreds.

    A replay reads the inputs' current contents and overwrites the previous result. warm_ups: times
    to run `work` first, on a stream of its own, as a backward pass needs.
    """
    if warm_ups:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                work()
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def processor() -> str:
    """The CPU model name (Linux), or else the machine architecture."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"^model name\s*:(.*)", text, re.MULTILINE)
    return name[1].strip() if name else platform.machine()


def seed_of(seed: int, *purpose: str | int) -> int:
    """Derive a 63-bit seed for one purpose, so that no generator state has to be saved.

    >>> seed_of(1, "init") != seed_of(1, "rows", 0)
    True
    """
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
