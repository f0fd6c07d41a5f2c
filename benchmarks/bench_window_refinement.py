"""`window_attention`, and `window_stage` around it: every backend that can run here against the reference.

The reference cuts the map into windows and runs layer after layer. A stage for which there must be gradients runs layer
after layer on every backend. On a GPU there is a row for the layers one by one around triton's attention, beside which
the row "triton" of the forward says what one pass is worth; under autocast both have one more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import shapes
import torch
from compare import backends, compare, compare_memory
from torch import Tensor

from lpmflow import ops, reference


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
    more = beside(stage, inputs) if device.type == "cuda" and "triton" in backends(stage, inputs) else {}
    compare(
        report, title, stage, inputs, dtype, peaks, seconds=seconds, shape=shape(stage.attention), forward_only=more
    )


def beside(stage: shapes.WindowStage, inputs: list[Tensor]) -> dict[str, Callable[..., Any]]:
    """The rows beside the backends': layer after layer around triton's attention, and both ways under autocast."""
    a = stage.attention
    sizes = {"heads": a.heads, "window": a.window}

    def one_by_one(x: Tensor, *weights: Tensor) -> ops.PooledMap:
        attend = functools.partial(ops.window_attention, backend="triton")
        return reference.window_stage(x, ops.StageWeights(*weights), **sizes, eps=1e-5, attend=attend)

    def at_once(x: Tensor, *weights: Tensor) -> ops.PooledMap:
        return ops.window_stage(x, ops.StageWeights(*weights), **sizes, backend="triton")

    dtype = inputs[0].dtype
    if dtype == torch.float32:
        return {"triton, layers": one_by_one}

    # As the network computes: the map and the normalisations in float32, the layers' matrices in `dtype`.
    layers = ("qkv", "proj", "fc1", "fc2")
    low = [name.rpartition("_")[0] in layers for name in ops.StageWeights._fields]
    kept = [inputs[0].float(), *(w if is_low else w.float() for w, is_low in zip(inputs[1:], low, strict=True))]

    def mixed(run: Callable[..., Any]) -> Callable[..., Any]:
        def under_autocast(*_: Tensor) -> Any:
            with torch.autocast(kept[0].device.type, dtype):
                return run(*kept)

        return under_autocast

    return {
        "triton, layers": one_by_one,
        "triton, autocast": mixed(at_once),
        "triton, layers, autocast": mixed(one_by_one),
    }


def shape(stage: shapes.WindowAttention) -> str:
    """Maps and heads."""
    return f"{stage.batch} x {stage.height} x {stage.width}, {stage.heads} x {stage.head_width}"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("op", ["window_attention", "window_stage"])
def test_peak_memory(op, backward, device, dtype, batch_size, report):
    stages = getattr(shapes, op)(batch_size if device.type == "cuda" else 1)
    stage = next(stage for stage in stages if stage.name == "base 16")
    compare_memory(report, op, stage, stage.inputs(dtype, device), backward=backward)
