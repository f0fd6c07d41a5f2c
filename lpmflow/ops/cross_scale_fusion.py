"""Correlation tensors of several scales to expected target coordinates on one grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lpmflow import reference
from lpmflow.ops._autocast import without_autocast
from lpmflow.ops._autodiff import NO_TANGENT, has_tangent
from lpmflow.ops._backends import choose
from lpmflow.ops._checks import check_grid, check_like, check_shape, check_tensor

OP = "cross_scale_fusion"
Grid = tuple[int, int]


class FusedFlow(NamedTuple):
    """What `cross_scale_fusion(..., return_confidence=True)` returns."""

    mapping: Tensor
    """(B, S, 2, h, w) expected target coordinate (x, y) of each output source cell, in the units of the tables."""
    confidence: Tensor
    """(B, S, h, w) largest probability of the cell's distribution over target cells, in (0, 1]."""


def cross_scale_fusion(
    corrs: Sequence[Tensor],
    source_grids: Sequence[Grid],
    target_grids: Sequence[Grid],
    *,
    out_grid: Grid,
    temperature: float = 0.02,
    x: Tensor | None = None,
    y: Tensor | None = None,
    return_confidence: bool = False,
    backend: str | None = None,
) -> Tensor | FusedFlow:
    """Expected target coordinate of each source cell, for S correlation tensors at once (paper section 3.4).

    Each tensor is interpolated bilinearly (`align_corners=True`) to `out_grid` on the target and on the source side;
    each source cell's row goes through softmax(row / temperature), and the coordinates are averaged under it.

    Args:
        corrs: S tensors (B, hs ws, ht wt), row-major cells; float32, float64, float16 or bfloat16.
        source_grids, target_grids: the S grids as (height, width).
        out_grid: (h, w) of the result.
        x, y: coordinate tables, (w) for columns and (h) for rows; linspace(-1, 1) when None.
        return_confidence: also return the largest probability of each cell.
        backend: "reference", "native", "triton" or None to choose.

    Returns:
        mapping (B, S, 2, h, w), channel 0 = x, float32 (float64 for float64); `FusedFlow` with `return_confidence`.

    The mapping is differentiable in the correlations and in x and y; the confidence is not differentiable. The backends
    other than "reference" have first derivatives only, backward-mode, and no `torch.func.vmap`, as in `correlation`,
    and never hold the interpolated (h w) x (h w) volume.

    Raises TypeError or ValueError naming the argument, RuntimeError when the named backend cannot run.
    """
    if not isinstance(corrs, (tuple, list)) or not corrs:
        raise ValueError(f"{OP}: corrs must be a non-empty sequence of tensors (B, hs ws, ht wt), got {corrs!r:.60}")
    if not len(corrs) == len(source_grids) == len(target_grids):
        raise ValueError(
            f"{OP}: corrs, source_grids and target_grids must have one entry a scale, "
            f"got {len(corrs)}, {len(source_grids)} and {len(target_grids)}"
        )
    grids: list[list[Grid]] = [[], []]
    for s, corr in enumerate(corrs):
        check_tensor(OP, f"corrs[{s}]", corr, "B, hs ws, ht wt")
        check_like(OP, f"corrs[{s}]", corr, "corrs[0]", corrs[0])
        source = check_grid(OP, f"source_grids[{s}]", source_grids[s])
        target = check_grid(OP, f"target_grids[{s}]", target_grids[s])
        wanted = (corrs[0].shape[0], source[0] * source[1], target[0] * target[1])
        check_shape(OP, f"corrs[{s}]", corr, wanted)
        grids[0].append(source)
        grids[1].append(target)
    out = check_grid(OP, "out_grid", out_grid)
    if not isinstance(temperature, (int, float)) or not temperature > 0:
        raise ValueError(f"{OP}: temperature must be a number above 0, got {temperature!r}")
    table_x = _table("x", x, out[1], corrs[0])
    table_y = _table("y", y, out[0], corrs[0])
    tensors = (*corrs, table_x, table_y)
    chosen = choose(OP, backend, corrs[0].device.type, lambda name: _why_not(name, corrs[0], tensors))
    run = reference.cross_scale_fusion
    if chosen == "native":
        from lpmflow_kernels.native import cross_scale_fusion as native

        run = native.cross_scale_fusion
    elif chosen == "triton":
        from lpmflow_kernels import cross_scale_fusion as triton

        run = triton.cross_scale_fusion
    with without_autocast(corrs[0].device):
        mapping, confidence = run(
            corrs, grids[0], grids[1], out_grid=out, temperature=float(temperature), x=table_x, y=table_y
        )
    return FusedFlow(mapping, confidence) if return_confidence else mapping


def _why_not(backend: str, corr: Tensor, tensors: tuple[Tensor, ...]) -> str | None:
    """None when an installed backend can compute with tensors like these, else the reason in one sentence."""
    if backend != "reference" and has_tangent(*tensors):
        return NO_TANGENT
    reason: str | None = None
    if backend == "native":
        from lpmflow_kernels.native import cross_scale_fusion as native

        reason = native.why_not(corr)
    elif backend == "triton":
        from lpmflow_kernels import cross_scale_fusion as triton

        reason = triton.why_not(corr)
    return reason


def _table(name: str, table: Tensor | None, length: int, like: Tensor) -> Tensor:
    """The coordinate table, by default linspace(-1, 1); one cell lies at -1, as linspace has it."""
    if table is None:
        return torch.linspace(-1, 1, length, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    check_tensor(OP, name, table, "length")
    check_shape(OP, name, table, (length,))
    if table.device != like.device:
        raise ValueError(f"{OP}: {name} must be on corrs[0]'s device {like.device}, got {table.device}")
    return table
