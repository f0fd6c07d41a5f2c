"""`correlation`: every backend that can run here against the einsum path, its torch.compile, and plain attention."""

from __future__ import annotations

import pytest
import shapes
import torch
import torch.nn.functional as F
from compare import compare, compare_memory

from lpmflow import reference

COMPILED = ("base 22",)  # compiling takes longer than all the rest


@pytest.mark.parametrize("name", [stage.name for stage in shapes.correlation()])
def test_correlation(name, device, dtype, batch_size, seconds, peaks, report):
    stage = next(stage for stage in shapes.correlation(batch_size) if stage.name == name)
    title = f"correlation, {{}}, batch {batch_size}, {str(dtype).removeprefix('torch.')}"
    others = {}
    if name in COMPILED:
        compiled = torch.compile(reference.correlation, fullgraph=True)
        others["compiled"] = lambda q, k, v: compiled(q, k, v, scale=q.shape[-1] ** -0.5, prefix=stage.prefix)
    compare(
        report,
        title,
        stage,
        stage.inputs(dtype, device),
        dtype,
        peaks,
        seconds=seconds,
        shape=f"{stage.n} x {stage.m}, {stage.heads} x {stage.width}",
        others=others,
        forward_only={"sdpa, no map": F.scaled_dot_product_attention},
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_peak_memory(backward, device, dtype, batch_size, report):
    stages = shapes.correlation(batch_size if device.type == "cuda" else 1)
    stage = next(stage for stage in stages if stage.name == "base 22")
    compare_memory(report, "correlation", stage, stage.inputs(dtype, device), backward=backward)
