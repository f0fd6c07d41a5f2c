"""Correlation tensors of several scales to expected target coordinates on one grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpmflow import reference
from lpmflow.ops._autocast import without_autocast
from lpmflow.ops._autodiff import needs_gradient, why_no_kernel
from lpmflow.ops._backends import choose, why_no_backward
from lpmflow.ops._checks import check_grid, check_like, check_shape, check_temperature, check_tensor

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
    other than "reference" never hold the interpolated (h w) x (h w) volume, and have first derivatives only,
    backward-mode, with the same choices and refusals in `torch.func` and for other derivatives as in `correlation`.

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
    temperature = check_temperature(OP, temperature)
    table_x = coordinate_table(OP, "x", x, out[1], corrs[0])
    table_y = coordinate_table(OP, "y", y, out[0], corrs[0])
    mapping, confidence = _run(list(corrs), grids[0], grids[1], out, temperature, table_x, table_y, backend)
    return FusedFlow(mapping, confidence) if return_confidence else mapping


def fuse_part(
    corr: Tensor,
    source: Grid,
    target: Grid,
    out: Grid,
    temperature: float,
    x: Tensor,
    y: Tensor,
    backend: str | None,
    part: tuple[int, int, int] | None,
) -> tuple[Tensor, Tensor]:
    """mapping (B, 2, rows, w) and confidence (B, rows, w) of one tensor of checked sizes, or of a part of its lines.

    `part` as in `lpmflow.reference.cross_scale_fusion`.
    """
    if part is not None and part[2] == 0:
        empty = corr.new_zeros((corr.shape[0], 0, out[1]))
        return empty[:, None].expand(-1, 2, -1, -1), empty
    mapping, confidence = _run([corr], [source], [target], out, temperature, x, y, backend, part)
    return mapping[:, 0], confidence[:, 0]


def _run(
    corrs: list[Tensor],
    sources: list[Grid],
    targets: list[Grid],
    out: Grid,
    temperature: float,
    x: Tensor,
    y: Tensor,
    backend: str | None,
    part: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The op on checked arguments."""
    tensors = (*corrs, x, y)
    chosen = choose(OP, backend, corrs[0].device.type, lambda name: _why_not(name, corrs[0], tensors))
    arguments: dict[str, Any] = {"out_grid": out, "temperature": temperature, "x": x, "y": y}
    with without_autocast(corrs[0].device):
        if chosen == "triton":
            from lpmflow_kernels import cross_scale_fusion as triton

            return triton.cross_scale_fusion(corrs, sources, targets, **arguments, part=part)
        if chosen == "native":
            from lpmflow_kernels.native import cross_scale_fusion as native

            return native.cross_scale_fusion(corrs, sources, targets, **arguments, part=part)
        return reference.cross_scale_fusion(corrs, sources, targets, **arguments, part=part)


def _why_not(backend: str, corr: Tensor, tensors: tuple[Tensor, ...]) -> str | None:
    """None when an installed backend can compute with tensors like these, else the reason in one sentence."""
    reason = why_no_kernel(*tensors)
    if reason is not None:
        return reason
    if backend == "native":
        from lpmflow_kernels.native import cross_scale_fusion as native

        reason = native.why_not(corr)
        if reason is None and corr.device.type == "cuda" and needs_gradient(*tensors):
            reason = why_no_backward(OP)
    elif backend == "triton":
        from lpmflow_kernels import cross_scale_fusion as triton

        reason = triton.why_not(corr)
    return reason


def coordinate_table(
    op: str, name: str, table: Tensor | None, length: int, like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """The coordinate table, by default linspace(-1, 1); one cell lies at -1, as linspace has it."""
    if table is None:
        exact = dtype or torch.promote_types(like.dtype, torch.float32)
        return torch.linspace(-1, 1, length, device=like.device, dtype=exact)
    check_tensor(op, name, table, "length")
    check_shape(op, name, table, (length,))
    if table.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of the other tensors, {like.device}, got {table.device}")
    return table
