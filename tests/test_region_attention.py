"""`region_attention`: the reference against the formula cell by cell, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from lpmflow.ops import region_attention, region_bias


def bias_by_formula(table, source, target, prefix):
    hm, wm = max(source[0], target[0]), max(source[1], target[1])
    tokens = []
    for image, (height, width) in enumerate((source, target)):
        tokens += [None] * prefix
        tokens += [(image, r, c) for r in range(height) for c in range(width)]
    bias = torch.zeros(table.shape[0], len(tokens), len(tokens), dtype=table.dtype)
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            if query is not None and key is not None:
                (a, r, c), (b, r2, c2) = query, key
                index = ((r - r2 + hm - 1) * (2 * wm - 1) + (c - c2 + wm - 1)) * 4 + 2 * a + b
                bias[:, i, j] = table[:, index]
    return bias


def inputs(source, target, prefix=1, heads=2, width=3, batch=2):
    torch.manual_seed(0)
    n = 2 * prefix + source[0] * source[1] + target[0] * target[1]
    columns = (2 * max(source[0], target[0]) - 1) * (2 * max(source[1], target[1]) - 1) * 4
    q, k, v = (torch.randn(batch, heads, n, width, dtype=torch.float64) for _ in range(3))
    return q, k, v, torch.randn(heads, columns, dtype=torch.float64)


@pytest.mark.parametrize(
    ("source", "target", "prefix"), [((3, 3), (3, 3), 1), ((2, 4), (3, 2), 1), ((1, 1), (1, 1), 0), ((2, 2), (2, 2), 2)]
)
def test_equals_the_formula(source, target, prefix):
    q, k, v, table = inputs(source, target, prefix)
    bias = bias_by_formula(table, source, target, prefix)
    torch.testing.assert_close(region_bias(table, source, target, prefix), bias)
    wanted = ((q @ k.transpose(-1, -2)) * 3**-0.5 + bias).softmax(-1) @ v
    got = region_attention(q, k, v, table, source_grid=source, target_grid=target, prefix=prefix)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_base_table_has_3844_columns():
    table = torch.arange(3844.0)[None]
    assert region_bias(table, (16, 16), (16, 16), 1).shape == (1, 514, 514)


def test_every_gradient():
    q, k, v, table = (x.requires_grad_() for x in inputs((2, 2), (1, 2), width=2, batch=1))

    def op(q, k, v, table):
        return region_attention(q, k, v, table, source_grid=(2, 2), target_grid=(1, 2))

    assert torch.autograd.gradcheck(op, (q, k, v, table))


def test_refusals_name_the_argument():
    q, k, v, table = inputs((2, 2), (2, 2))
    with pytest.raises(ValueError, match=r"region_attention: q must have shape \(2, 2, 12, 3\), got \(2, 2, 10, 3\)"):
        region_attention(q, k, v, table, source_grid=(2, 3), target_grid=(2, 2))
    with pytest.raises(ValueError, match=r"bias_table must have shape \(2, 36\), got \(2, 35\)"):
        region_attention(q, k, v, table[:, 1:], source_grid=(2, 2), target_grid=(2, 2))
    with pytest.raises(TypeError, match="v must have q's dtype"):
        region_attention(q, k, v.float(), table, source_grid=(2, 2), target_grid=(2, 2))
