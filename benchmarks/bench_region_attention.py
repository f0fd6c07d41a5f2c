"""`region_attention`: every backend that can run here against the einsum path, its torch.compile, and PyTorch's own.

PyTorch's fused attention takes the bias as an (H, N, N) tensor: made from the table at each call, or at hand, which
leaves out what the bias costs. FlexAttention reads the table by index, as the kernels do; on a CPU it is forward only.
"""

from __future__ import annotations

import pytest
import shapes
import torch
import torch.nn.functional as F
from compare import compare, compare_memory
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from lpmflow import ops, reference

COMPILED = ("base",)  # compiling takes longer than all the rest


def flex(stage: shapes.RegionAttention, device: torch.device):
    """FlexAttention with the region bias: a column of the table is a number of the query minus one of the key."""
    height, width = stage.grid
    patch = torch.arange(height * width, device=device)
    offset = (patch // width * (2 * width - 1) + patch % width) * 4
    of_query, of_key = (F.pad(torch.stack((offset, offset + step)), (1, 0), value=0).flatten() for step in (2, -1))
    bias = torch.ones(2, 1 + len(patch), dtype=torch.bool, device=device)
    bias[:, 0] = False
    bias = bias.flatten()
    middle = ((height - 1) * (2 * width - 1) + width - 1) * 4
    compiled = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(bias[i] & bias[j], s + table[h, of_query[i] - of_key[j] + middle], s)

        return compiled(q, k, v, score_mod=score)

    return run


@pytest.mark.parametrize("name", [stage.name for stage in shapes.region_attention()])
def test_region_attention(name, device, dtype, batch_size, seconds, peaks, report):
    stage = next(stage for stage in shapes.region_attention(batch_size) if stage.name == name)
    inputs = stage.inputs(dtype, device)
    bias = ops.region_bias(inputs[3], stage.grid, stage.grid, 1).to(dtype)

    def with_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor]:
        made = ops.region_bias(table, stage.grid, stage.grid, 1).to(dtype)
        return (F.scaled_dot_product_attention(q, k, v, made[None]),)

    others, forward_only = {}, {}
    if name != "base 512":  # where making the bias takes a second
        others["sdpa"] = with_bias
    forward_only["sdpa, bias at hand"] = lambda q, k, v, table: F.scaled_dot_product_attention(q, k, v, bias[None])
    if name in COMPILED:
        compiled = torch.compile(reference.region_attention, fullgraph=True)
        grids = {"source_grid": stage.grid, "target_grid": stage.grid, "prefix": 1}
        others["compiled"] = lambda *x: (compiled(*x, **grids),)
        compiled_flex = flex(stage, device)
        with torch.no_grad():
            torch.testing.assert_close(compiled_flex(*inputs), with_bias(*inputs)[0], rtol=2e-2, atol=2e-2)
        if device.type == "cuda":
            others["flex"] = lambda *x: (compiled_flex(*x),)
        else:
            forward_only["flex"] = compiled_flex
    compare(
        report,
        f"region_attention, {{}}, batch {batch_size}, {str(dtype).removeprefix('torch.')}",
        stage,
        inputs,
        dtype,
        peaks,
        seconds=seconds,
        shape=f"{stage.tokens}, {stage.heads} x {stage.width}",
        others=others,
        forward_only=forward_only,
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["base", "base 512"])
def test_peak_memory(name, backward, device, dtype, batch_size, report):
    stages = shapes.region_attention(batch_size if device.type == "cuda" else 1)
    stage = next(stage for stage in stages if stage.name == name)
    compare_memory(report, "region_attention", stage, stage.inputs(dtype, device), backward=backward)
