"""`window_attention`: every backend that can run here against the reference, which cuts the map into windows.

A backend's answer is checked before its time is taken. Ratios are the reference's median over the backend's, both from
one run in which they took turns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shapes import WindowRefinement, window_refinement
from timing import Peaks, interleaved, measure_peaks, peak_memory
from torch import Tensor

from lpmflow import ops

HERE = str(Path(__file__).resolve().parent)


@pytest.fixture(scope="session")
def peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    return measure_peaks(device, dtype)


def candidates(stage: WindowRefinement, inputs: list[Tensor]) -> list[str]:
    """Backends that can run on these inputs, the reference first."""
    found = []
    for backend in ops.BACKENDS:
        try:
            stage.run(inputs, backend)
        except RuntimeError as error:
            if "cannot run" not in str(error):
                raise
            continue
        found.append(backend)
    return found


def check(stage: WindowRefinement, inputs: list[Tensor], backend: str) -> None:
    """The gate: as near to float64 as the reference in the same dtype, within a factor of two and a floor."""
    (exact,) = stage.run([x.double() for x in inputs], "reference")
    (plain,) = stage.run(inputs, "reference")
    (found,) = stage.run(inputs, backend)
    error, allowed = ((x.double() - exact).abs().max().item() for x in (found, plain))
    floor = torch.finfo(found.dtype).eps * 8
    assert error <= 2 * allowed + floor, f"{backend}: off by {error:.3g}, the reference by {allowed:.3g}"


def gradients(stage: WindowRefinement, inputs: list[Tensor], grad: Tensor, backend: str) -> Callable[[], object]:
    """Forward and backward."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(stage.run(leaves, backend), leaves, grad)


@pytest.mark.parametrize("name", [stage.name for stage in window_refinement()])
def test_window_attention(name, device, dtype, batch_size, seconds, peaks, report):
    stage = next(stage for stage in window_refinement(batch_size) if stage.name == name)
    inputs = stage.inputs(dtype, device)
    backends = candidates(stage, inputs)
    for backend in backends:
        if backend != "reference":
            check(stage, inputs, backend)
    grad = torch.randn_like(stage.run(inputs, "reference")[0])
    forward = {backend: lambda backend=backend: stage.run(inputs, backend) for backend in backends}
    with torch.no_grad():
        times = interleaved(forward, device, seconds=seconds)
    tabulate(report, stage, dtype, times, peaks, backward=False)
    both = {backend: gradients(stage, inputs, grad, backend) for backend in backends}
    times = interleaved(both, device, seconds=seconds)
    tabulate(report, stage, dtype, times, peaks, backward=True)


def tabulate(
    report, stage: WindowRefinement, dtype: torch.dtype, times: dict[str, float], peaks: Peaks, *, backward: bool
) -> None:
    """A row a backend."""
    direction = "forward + backward" if backward else "forward"
    floor = peaks.floor(stage.flops(backward=backward), stage.bytes(dtype, backward=backward))
    for backend, time in times.items():
        report.add(
            f"window_attention, {direction}, {str(dtype).removeprefix('torch.')}",
            stage=stage.name,
            shape=f"{stage.batch} x {stage.height} x {stage.width}, {stage.heads} x {stage.head_width}",
            window=stage.window,
            backend=backend,
            ms=1e3 * time,
            ratio=times["reference"] / time,
            roofline=f"{100 * floor / time:.0f} %",
        )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_peak_memory(backward, device, report):
    if device.type != "cpu":
        pytest.skip("measured on the CPU only")
    stage = next(stage for stage in window_refinement() if stage.name == "base 16")
    found: dict[str, int] = {}
    for backend in candidates(stage, stage.inputs(torch.float32, device)):
        measured = peak_memory(HERE, "window_refinement", stage.name, backend, backward=backward)
        if measured is None:
            pytest.skip("peak memory of the process is known on Linux only")
        found[backend] = measured
    for backend, memory in found.items():
        report.add(
            f"window_attention, memory beside the results of {'forward + backward' if backward else 'forward'}",
            stage=stage.name,
            backend=backend,
            MiB=memory / 2**20,
            ratio=found["reference"] / memory if memory > 0 else None,
        )
