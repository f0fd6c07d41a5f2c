"""Measuring time: interleaved medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]
LONG = 0.1  # seconds


def interleaved(
    runs: dict[str, Run], device: torch.device, *, seconds: float, rounds: int = 5, warm: int = 2
) -> dict[str, float]:
    """Median seconds of one call of each run, all taking turns, so that a slow moment of the machine hits them alike.

    Each gets `warm` turns that do not count, then at least `rounds`, and they go on until `seconds` have passed in all.
    What takes long gets fewer: one turn that does not count, three rounds.
    """
    for run in runs.values():  # what is built or tuned at the first call is not what is measured
        for _ in range(warm):
            if _once(run, device) > LONG:
                break
    taken: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    turn = 0
    while turn < min(rounds, 3) or time.perf_counter() - start < (seconds if turn >= rounds else 4 * seconds):
        for name, run in runs.items():
            taken[name].append(_once(run, device))
        turn += 1
    return {name: statistics.median(times) for name, times in taken.items()}


def _once(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3
    begin_time = time.perf_counter()
    run()
    return time.perf_counter() - begin_time
