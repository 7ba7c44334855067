"""Ranks as threads of the test's own process, for code that talks through `Runtime.gather`."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from nanolib.runtime import Runtime


def as_ranks(
    runtime: Runtime, world_size: int, work: Callable[[Runtime], Any]
) -> tuple[list[Any], list[Any]]:
    """What `work` returns on each rank, and what each gave to `gather` last."""
    parts: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size, timeout=60)

    def run(rank: int) -> Any:
        def gather(part: Any) -> list[Any]:
            parts[rank] = part
            barrier.wait()
            return list(parts)

        mine = replace(runtime, rank=rank, world_size=world_size)
        object.__setattr__(mine, "gather", gather)
        return work(mine)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size))), parts
