"""`correlation_volume`: how much of its time is the matrix product that nobody here could make faster."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timing import interleaved

from lpmflow import ops
from lpmflow.profile import Peaks


@pytest.mark.parametrize("side", [16, 32, 64])
def test_correlation_volume(side, device, dtype, batch_size, seconds, peaks: Peaks, report):
    a, b = (torch.randn(batch_size, 768, side, side, device=device).to(dtype) for _ in range(2))
    rows, columns = a.float().flatten(2).transpose(1, 2), b.float().flatten(2)
    runs: dict[str, Callable[[], object]] = {
        "matrix product alone": lambda: rows @ columns,
        "not normalised": lambda: ops.correlation_volume(a, b, normalize=False),
        "cosines": lambda: ops.correlation_volume(a, b),
        "cosines, mutual": lambda: ops.correlation_volume(a, b, mutual=True),
    }
    with torch.no_grad():
        times = interleaved(runs, device, seconds=seconds)
    floor = peaks.floor(2 * batch_size * side**4 * 768, batch_size * side**4 * 4)
    for name, time in times.items():
        report.add(
            f"correlation_volume, forward, batch {batch_size}, 768 channels",
            cells=f"{side} x {side}",
            what=name,
            ms=1e3 * time,
            ratio=times["matrix product alone"] / time,
            roofline=f"{100 * floor / time:.0f} %",
        )
