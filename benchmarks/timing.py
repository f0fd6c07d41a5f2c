"""Measuring: interleaved medians, the machine's own peaks, peak memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]


def interleaved(
    runs: dict[str, Run], device: torch.device, *, seconds: float, rounds: int = 5, warm: int = 2
) -> dict[str, float]:
    """Median seconds of one call of each run, all taking turns, so that a slow moment of the machine hits them alike.

    Each gets `warm` turns that do not count, then at least `rounds`, and they go on until `seconds` have passed in all.
    """
    for run in runs.values():  # what is built or tuned at the first call is not what is measured
        for _ in range(warm):
            run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    turn = 0
    while turn < rounds or time.perf_counter() - start < seconds:
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


_MEMORY = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import shapes
backend, backward = sys.argv[2], sys.argv[3] == "1"
stage = next(stage for stage in getattr(shapes, sys.argv[4])() if stage.name == sys.argv[5])
def run(stage, inputs):
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    outputs = stage.run(inputs, backend)
    kept = [*outputs]
    if backward:
        ones = [torch.ones_like(x) for x in outputs]
        kept += [*ones, *torch.autograd.grad(outputs, inputs, ones)]
    return kept
def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024
device = torch.device("cpu")
small = stage.small()
run(small, small.inputs(torch.float32, device))  # threads and libraries are not what is measured
inputs = stage.inputs(torch.float32, device)
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
kept = run(stage, inputs)
print(resident("VmHWM") - before - sum(x.numel() * x.element_size() for x in kept))
"""


def peak_memory(folder: str, op: str, stage: str, backend: str, *, backward: bool) -> int | None:
    """Bytes by which one call on the CPU raised this process's peak, beside its results; None off Linux.

    In a process of its own, because an allocator that kept memory from earlier calls would hide it.
    """
    if not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, "-c", _MEMORY, folder, backend, "1" if backward else "0", op, stage]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)
