"""`correlation`: every backend that can run here against the einsum path, its torch.compile, and plain attention.

A backend's answer is checked before its time is taken. Ratios are the einsum path's median over the backend's, both
from one run in which they took turns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from shapes import Correlation, correlation
from timing import Peaks, interleaved, measure_peaks, peak_memory
from torch import Tensor

from lpmflow import ops, reference

HERE = str(Path(__file__).resolve().parent)
COMPILED = ("base 22",)  # compiling takes longer than all the rest
Maps = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    return measure_peaks(device, dtype)


def candidates(inputs: list[Tensor]) -> dict[str, Maps]:
    """Backends that can run on these inputs, the einsum path first."""
    found: dict[str, Maps] = {}
    for backend in ops.BACKENDS:

        def run(q: Tensor, k: Tensor, v: Tensor, backend: str = backend) -> tuple[Tensor, Tensor]:
            return ops.correlation(q, k, v, backend=backend)

        try:
            run(*inputs)
        except RuntimeError as error:
            if "cannot run" not in str(error):
                raise
            continue
        found[backend] = run
    return found


def check(run: Maps, inputs: list[Tensor], name: str) -> None:
    """The gate: as near to float64 as the einsum path in the same dtype, within a factor of two and a floor."""
    scale = inputs[0].shape[-1] ** -0.5
    exact = reference.correlation(*(x.double() for x in inputs), scale=scale, prefix=1)
    same = reference.correlation(*inputs, scale=scale, prefix=1)
    for part, found, plain, wanted in zip(("attended", "corr"), run(*inputs), same, exact, strict=True):
        error, allowed = ((x.double() - wanted).abs().max().item() for x in (found, plain))
        floor = torch.finfo(found.dtype).eps * 8
        assert error <= 2 * allowed + floor, f"{name} {part}: off by {error:.3g}, the einsum path by {allowed:.3g}"


def gradients(run: Maps, inputs: list[Tensor], grads: list[Tensor]) -> Callable[[], object]:
    """Forward and backward."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(run(*leaves), leaves, grads)


@pytest.mark.parametrize("name", [stage.name for stage in correlation()])
def test_correlation(name, device, dtype, batch_size, seconds, peaks, report):
    stage = next(stage for stage in correlation(batch_size) if stage.name == name)
    inputs = stage.inputs(dtype, device)
    runs = candidates(inputs)
    for backend, run in runs.items():
        if backend != "reference":
            check(run, inputs[:], backend)
    attended, corr = runs["reference"](*inputs)
    grads = [torch.randn_like(attended), torch.randn_like(corr)]
    compiled = torch.compile(reference.correlation, fullgraph=True) if name in COMPILED else None
    if compiled is not None:
        runs["compiled"] = lambda q, k, v: compiled(q, k, v, scale=q.shape[-1] ** -0.5, prefix=1)
    forward: dict[str, Callable[[], object]] = {}
    for backend, run in runs.items():
        forward[backend] = lambda run=run: run(*inputs)
    forward["sdpa, no map"] = lambda: F.scaled_dot_product_attention(*inputs)
    with torch.no_grad():
        times = interleaved(forward, device, seconds=seconds)
    tabulate(report, stage, dtype, times, peaks, backward=False)
    both = {backend: gradients(run, inputs, grads) for backend, run in runs.items()}
    times = interleaved(both, device, seconds=seconds)
    tabulate(report, stage, dtype, times, peaks, backward=True)


def tabulate(
    report, stage: Correlation, dtype: torch.dtype, times: dict[str, float], peaks: Peaks, *, backward: bool
) -> None:
    """A row a backend."""
    direction = "forward + backward" if backward else "forward"
    table = f"correlation, {direction}, batch {stage.batch}, {str(dtype).removeprefix('torch.')}"
    floor = peaks.floor(stage.flops(backward=backward), stage.bytes(dtype, backward=backward))
    for backend, time in times.items():
        report.add(
            table,
            stage=stage.name,
            shape=f"{stage.n} x {stage.m}, {stage.heads} x {stage.width}",
            backend=backend,
            ms=1e3 * time,
            ratio=times["reference"] / time,
            roofline=f"{100 * floor / time:.0f} %",
        )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_peak_memory(backward, device, dtype, batch_size, report):
    stage = next(stage for stage in correlation(batch_size if device.type == "cuda" else 1) if stage.name == "base 22")
    found: dict[str, int] = {}
    inputs = stage.inputs(dtype, device)
    for backend in candidates(inputs):
        if device.type == "cuda":
            found[backend] = _cuda_memory(backend, inputs, backward=backward)
        else:
            measured = peak_memory(HERE, "correlation", stage.name, backend, backward=backward)
            if measured is None:
                pytest.skip("peak memory of the process is known on Linux only")
            found[backend] = measured
    for backend, memory in found.items():
        report.add(
            f"correlation, memory beside the results of {'forward + backward' if backward else 'forward'}, "
            f"batch {stage.batch}",
            stage=stage.name,
            backend=backend,
            MiB=memory / 2**20,
            ratio=found["reference"] / memory,
        )


def _cuda_memory(backend: str, inputs: list[Tensor], *, backward: bool) -> int:
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = [*ops.correlation(*leaves, backend=backend)]
    if backward:
        ones = [torch.ones_like(x) for x in results]
        results += [*ones, *torch.autograd.grad(results, leaves, ones)]
    torch.cuda.synchronize()
    kept = sum(x.numel() * x.element_size() for x in results)
    return torch.cuda.max_memory_allocated() - before - kept
