"""`cross_scale_fusion`: every backend that can run here against interpolate, softmax and sum, and its torch.compile."""

from __future__ import annotations

import pytest
import shapes
import torch
from compare import compare, compare_memory

COMPILED = ("base",)  # compiling takes longer than all the rest


@pytest.mark.parametrize("name", [stage.name for stage in shapes.cross_scale_fusion()])
def test_cross_scale_fusion(name, device, dtype, batch_size, seconds, peaks, report):
    stage = next(stage for stage in shapes.cross_scale_fusion(batch_size) if stage.name == name)
    others = {}
    if name in COMPILED:
        compiled = torch.compile(lambda *inputs: stage.run(list(inputs), "reference"), fullgraph=True)
        others["compiled"] = compiled
    compare(
        report,
        f"cross_scale_fusion, {{}}, batch {batch_size}, float32",
        stage,
        stage.inputs(dtype, device),
        torch.float32,
        peaks,
        seconds=seconds,
        shape=f"{len(stage.scales)} to {stage.out[0]} x {stage.out[1]}",
        others=others,
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_peak_memory(backward, device, dtype, batch_size, report):
    stages = shapes.cross_scale_fusion(batch_size if device.type == "cuda" else 1)
    stage = next(stage for stage in stages if stage.name == "base")
    compare_memory(report, "cross_scale_fusion", stage, stage.inputs(dtype, device), backward=backward)
