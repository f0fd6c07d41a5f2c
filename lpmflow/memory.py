"""Memory: what a match takes, what is free, and one sentence when the first exceeds the second."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lpmflow.config import LPMFlowConfig

_MAPS = 7
"""Maps of the refinement a match holds at once, at least: the peaks of `benchmarks/bench_image_size.py` are 14."""


def matching_bytes(config: LPMFlowConfig) -> int:
    """Bytes that matching one pair takes at least, half of what was measured: it grows with the number of pixels."""
    height, width = config.flow_grid
    return 4 * (_MAPS * config.refine_width * height * width + 6 * config.input_size[0] * config.input_size[1])


def free_bytes(device: torch.device | None = None) -> int:
    """Bytes that are free on a device; None: on whichever device here has most. 1 << 62 where nobody can tell."""
    if device is None:
        gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        return max(map(free_bytes, [torch.device("cpu"), *gpus]))
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory() if device.type == "cpu" else 1 << 62


def free_memory() -> int:
    """Bytes that programs can still have, those that only hold copies of files included; no bound off Linux."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return 1024 * int(found[1]) if found is not None else 1 << 62


def require_room(config: LPMFlowConfig, device: torch.device | None = None) -> None:
    """ValueError naming image_size when matching one pair takes more memory than is free on `device`.

    None: on every device here.
    """
    require_bytes(config.image_size, matching_bytes(config), device)


def require_bytes(image_size: tuple[int, int], wanted: int, device: torch.device | None = None) -> None:
    """ValueError naming image_size (height, width) when a pair takes `wanted` bytes and fewer are free on `device`."""
    free = free_bytes(device)
    if wanted > free:
        height, width = image_size
        where = "here" if device is None else f"on {device}"
        raise ValueError(
            f"image_size must be smaller, got {height} x {width}: a pair takes {_gib(wanted)} or more at that size, "
            f"and {_gib(free)} are free {where}"
        )


@contextlib.contextmanager
def explained(pairs: int, image_size: tuple[int, int], device: torch.device) -> Iterator[None]:
    """An allocator's failure inside as a RuntimeError of one sentence that says what to make smaller."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # the CPU's allocator raises a bare RuntimeError
        known = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
        if not known and "tried to allocate" not in str(error):
            raise
        fewer = "a smaller batch_size or image_size" if pairs > 1 else "a smaller image_size"
        raise RuntimeError(
            f"{device} has too little memory for {pairs} {'pairs' if pairs > 1 else 'pair'} at image_size "
            f"{image_size[0]} x {image_size[1]}; {fewer} takes less"
        ) from error


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
