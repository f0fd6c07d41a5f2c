"""Several processes at one evaluation, as `torchrun` starts them; or one, which needs none of this.

torchrun --nproc-per-node 2 -m lpmflow evaluate --benchmark spair --root SPair-71k
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class World:
    """Which process this is, of how many. Process 0 writes and prints."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank, in every process; each must call it equally often. Values are pickled."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def gather_or_raise(self, value: Any) -> list[Any]:
        """`gather` where a process that failed gives its Exception: it raises that, and the others RuntimeError."""
        found = self.gather(value)
        for rank, one in enumerate(found):
            if isinstance(one, Exception):
                if rank == self.rank:
                    raise one
                raise RuntimeError(f"process {rank} of {self.size} failed: {one}")
        return found

    def same(self, value: Any) -> Any:
        """The first process's `value`, in every process."""
        return self.gather(value)[0]


@contextlib.contextmanager
def world() -> Iterator[World]:
    """The processes `torchrun` started, joined over gloo (its environment says so, or a group exists already).

    A group made here ends with the block. Raises RuntimeError when torch cannot join them.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield World()
        return
    dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def local_device() -> str | None:
    """The GPU that is this process's share when `torchrun` started several on a machine with GPUs; else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else None
