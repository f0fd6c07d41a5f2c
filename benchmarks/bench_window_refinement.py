"""`window_attention`, and `window_stage` around it: every backend that can run here against the reference.

The reference cuts the map into windows and runs layer after layer. A stage for which there must be gradients runs layer
after layer on every backend.
"""

from __future__ import annotations

import pytest
import shapes
from compare import compare, compare_memory


@pytest.mark.parametrize("name", [stage.name for stage in shapes.window_attention()])
def test_window_attention(name, device, dtype, batch_size, seconds, peaks, report):
    stage = next(stage for stage in shapes.window_attention(batch_size) if stage.name == name)
    title = f"window_attention, {{}}, {str(dtype).removeprefix('torch.')}"
    inputs = stage.inputs(dtype, device)
    compare(report, title, stage, inputs, dtype, peaks, seconds=seconds, shape=shape(stage))


@pytest.mark.parametrize("name", [stage.name for stage in shapes.window_stage()])
def test_window_stage(name, device, dtype, batch_size, seconds, peaks, report):
    stage = next(stage for stage in shapes.window_stage(batch_size) if stage.name == name)
    title = f"window_stage, {{}}, {str(dtype).removeprefix('torch.')}"
    inputs = stage.inputs(dtype, device)
    compare(report, title, stage, inputs, dtype, peaks, seconds=seconds, shape=shape(stage.attention))


def shape(stage: shapes.WindowAttention) -> str:
    """Maps and heads."""
    return f"{stage.batch} x {stage.height} x {stage.width}, {stage.heads} x {stage.head_width}"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("op", ["window_attention", "window_stage"])
def test_peak_memory(op, backward, device, dtype, batch_size, report):
    stages = getattr(shapes, op)(batch_size if device.type == "cuda" else 1)
    stage = next(stage for stage in stages if stage.name == "base 16")
    compare_memory(report, op, stage, stage.inputs(dtype, device), backward=backward)
