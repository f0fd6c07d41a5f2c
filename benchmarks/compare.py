"""One workload of `shapes.py` on every backend that can run it: the answers checked, then times, then memory.

Ratios are the einsum path's median over the backend's, both from one run in which they took turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import memory
import torch
from timing import interleaved
from torch import Tensor

from lpmflow import ops
from lpmflow.profile import Peaks

Outputs = tuple[Tensor, ...]


def backends(stage: Any, inputs: list[Tensor]) -> list[str]:
    """Those that can run on these inputs, the einsum path first."""
    found = []
    for backend in ops.BACKENDS:
        try:
            stage.run(inputs, backend)
        except RuntimeError as error:
            if "cannot run" not in str(error):
                raise
        else:
            found.append(backend)
    return found


def check(stage: Any, inputs: list[Tensor], backend: str) -> None:
    """The gate: as near to float64 as the einsum path in the same dtype, within a factor of two and a floor."""
    exact = stage.run([x.double() for x in inputs], "reference")
    same, found = (stage.run(inputs, name) for name in ("reference", backend))
    for part, (ours, plain, wanted) in enumerate(zip(found, same, exact, strict=True)):
        error, allowed = ((x.double() - wanted).abs().max().item() for x in (ours, plain))
        floor = torch.finfo(ours.dtype).eps * 8 * max(1.0, wanted.abs().max().item())
        assert error <= 2 * allowed + floor, f"{stage.name}, {backend}, output {part}: off by {error:.3g}"


def compare(
    report: Any,
    title: str,
    stage: Any,
    inputs: list[Tensor],
    dtype: torch.dtype,
    peaks: Peaks,
    *,
    seconds: float,
    shape: str,
    others: Mapping[str, Callable[..., Outputs]] | None = None,
    forward_only: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """Adds a row a backend to the tables `title` with "forward" and "forward + backward" in the place of {}."""
    device = inputs[0].device
    names = backends(stage, inputs)
    for backend in names[1:]:
        check(stage, inputs, backend)
    runs: dict[str, Callable[..., Outputs]] = {
        backend: (lambda *x, backend=backend: stage.run(list(x), backend)) for backend in names
    }
    runs |= others or {}
    forward: dict[str, Callable[[], object]] = {
        name: (lambda run=run: run(*inputs)) for name, run in {**runs, **(forward_only or {})}.items()
    }
    with torch.no_grad():
        times = interleaved(forward, device, seconds=seconds)
    _tabulate(report, title.format("forward"), stage, dtype, times, peaks, shape, backward=False)
    grads = [torch.randn_like(x) for x in stage.run(inputs, "reference")]
    leaves = [x.detach().requires_grad_() for x in inputs]
    both: dict[str, Callable[[], object]] = {
        name: (lambda run=run: torch.autograd.grad(run(*leaves), leaves, grads)) for name, run in runs.items()
    }
    times = interleaved(both, device, seconds=seconds)
    _tabulate(report, title.format("forward + backward"), stage, dtype, times, peaks, shape, backward=True)


def _tabulate(
    report: Any,
    table: str,
    stage: Any,
    dtype: torch.dtype,
    times: dict[str, float],
    peaks: Peaks,
    shape: str,
    *,
    backward: bool,
) -> None:
    floor = peaks.floor(stage.flops(backward=backward), stage.bytes(dtype, backward=backward))
    for backend, time in times.items():
        report.add(
            table,
            stage=stage.name,
            shape=shape,
            backend=backend,
            ms=1e3 * time,
            ratio=times["reference"] / time,
            roofline=f"{100 * floor / time:.0f} %",
        )


def compare_memory(report: Any, op: str, stage: Any, inputs: list[Tensor], *, backward: bool) -> None:
    """Adds a row a backend: the peak beside inputs and results."""
    x = inputs[0]
    memory.skip_unless_known(x.device)
    found = {
        backend: memory.in_a_process(
            memory.of_operation, op, stage.name, stage.batch, backend, x.dtype, str(x.device), backward
        )
        for backend in backends(stage, inputs)
    }
    direction = "forward + backward" if backward else "forward"
    for backend, taken in found.items():
        report.add(
            f"{op}, memory beside the results of {direction}, batch {stage.batch}",
            stage=stage.name,
            backend=backend,
            MiB=taken / 2**20,
            ratio=found["reference"] / taken if taken > 0 else None,
        )
