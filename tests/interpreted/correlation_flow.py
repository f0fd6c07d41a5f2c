"""`correlation_flow` by Triton through the interpreter: in one piece and in blocks, values, gradients, memory."""

from __future__ import annotations

import sys

import pytest
import torch
from kernel_bench import assert_within_budget
from torch import Tensor

from lpmflow import ops, reference

module = sys.modules["lpmflow.ops.correlation_flow"]
# source, target, output grid, prefix, blocks of one line
CASES = [
    ((3, 2), (2, 2), (3, 2), 1, 3),  # rows that are lines
    ((2, 2), (3, 2), (4, 2), 1, 2),
    ((5, 2), (2, 2), (2, 2), 2, 5),  # to a coarser grid: some lines belong to no row
]
NAMES = ("attended", "mapping", "confidence", "grad_q", "grad_k", "grad_v", "grad_x", "grad_y")


def everything(function, case, tensors: list[Tensor], dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Outputs and gradients by name; tables are float32 where the tokens are of half that."""
    source, target, out, prefix, _ = case
    exact = torch.promote_types(dtype, torch.float32)
    leaves = [x.detach().to(exact if x.ndim == 1 else dtype).requires_grad_() for x in tensors]
    *qkv, x, y = leaves
    options |= {"scale": 0.4, "prefix": prefix, "temperature": 0.3, "x": x, "y": y}
    found = function(*qkv, source_grid=source, target_grid=target, out_grid=out, **options)
    assert not found[2].requires_grad
    grads = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t.dtype) for t in found[:2]]
    outputs = [t.detach() for t in found]
    return dict(zip(NAMES, (*outputs, *torch.autograd.grad(found[:2], leaves, grads)), strict=True))


def inputs(case) -> list[Tensor]:
    source, target, out, prefix, _ = case
    generator = torch.Generator().manual_seed(0)
    tokens = [prefix + grid[0] * grid[1] for grid in (source, target, target)]
    qkv = [torch.randn(1, 2, count, 8, generator=generator) for count in tokens]
    return [*qkv, *(torch.randn(side, generator=generator) for side in (out[1], out[0]))]


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), (CASES[1], torch.bfloat16)], ids=str
)
def test_blocks_equal_the_whole(case, dtype, monkeypatch):
    """Against float64, a line at a time; the forward's and the backward's correlation tensors are a block's."""
    tensors = inputs(case)
    lines = []
    original = module.correlation

    def recorded(q, *args, **options):
        lines.append((q.shape[2] - case[3]) // case[0][1])
        return original(q, *args, **options)

    monkeypatch.setattr(module, "correlation", recorded)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    found = everything(ops.correlation_flow, case, tensors, dtype, backend="triton")
    assert ops.last_backend("correlation") == ops.last_backend("cross_scale_fusion") == "triton"
    assert len(lines) == 2 * case[4] and max(lines) <= (1 if case[0] == case[2] else 2)
    same = everything(reference.correlation_flow, case, tensors, dtype)
    exact = everything(reference.correlation_flow, case, [x.to(dtype) for x in tensors], torch.float64)
    for name, value in found.items():
        assert value.dtype == same[name].dtype, name
        assert_within_budget(name, value, same[name], exact[name], 3)


def test_a_volume_that_fits_is_computed_in_one_piece(monkeypatch):
    source, target, out, prefix, _ = CASES[1]
    q, k, v, x, y = inputs(CASES[1])
    calls = []
    original = module.correlation
    monkeypatch.setattr(module, "correlation", lambda *a, **o: calls.append(1) or original(*a, **o))
    grids = {"source_grid": source, "target_grid": target, "out_grid": out}
    options = {**grids, "scale": 0.4, "prefix": prefix, "temperature": 0.3, "x": x, "y": y}
    found = ops.correlation_flow(q, k, v, **options, backend="triton")
    torch.testing.assert_close(tuple(found), reference.correlation_flow(q, k, v, **options), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
