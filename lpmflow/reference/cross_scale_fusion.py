"""`cross_scale_fusion` as written: interpolate the 4D correlation, softmax over the target, expected coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def cross_scale_fusion(
    corrs: Sequence[Tensor],
    source_grids: Sequence[Grid],
    target_grids: Sequence[Grid],
    *,
    out_grid: Grid,
    temperature: float,
    x: Tensor,
    y: Tensor,
    part: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Expected target coordinate of each output source cell, and how concentrated its distribution is.

    corrs: S tensors (B, hs ws, ht wt); x (w), y (h) tables -> mapping (B, S, 2, h, w) with channel 0 = x,
    confidence (B, S, h, w) = the largest probability, without a gradient. Half precision is
    computed in float32.

    part = (first line, first row, rows): `corrs` hold only the lines of the source grids from `first line` on that the
    `rows` output rows from `first row` on are interpolated from, and only those rows are computed: h is `rows`.
    """
    mappings, confidences = [], []
    for corr, source_grid, target_grid in zip(corrs, source_grids, target_grids, strict=True):
        volume = interpolate_volume(corr, source_grid, target_grid, out_grid, part)
        dtype = volume.dtype
        probabilities = (volume / temperature).softmax(dim=-1)  # (B, h, w, h * w)
        by_cell = probabilities.unflatten(-1, out_grid)
        expected_x = torch.einsum("brcij,j->brc", by_cell, x.to(dtype))
        expected_y = torch.einsum("brcij,i->brc", by_cell, y.to(dtype))
        mappings.append(torch.stack((expected_x, expected_y), dim=1))
        confidences.append(probabilities.detach().amax(dim=-1))
    return torch.stack(mappings, dim=1), torch.stack(confidences, dim=1)


def interpolate_volume(
    corr: Tensor,
    source_grid: Grid,
    target_grid: Grid,
    out_grid: Grid,
    part: tuple[int, int, int] | None = None,
) -> Tensor:
    """(B, hs ws, ht wt) -> (B, h, w, h w): bilinear with `align_corners=True`, target grid first, then source grid."""
    batch, cells = corr.shape[:2]
    volume = corr.to(torch.promote_types(corr.dtype, torch.float32))
    if target_grid != out_grid:
        rows = volume.reshape(batch * cells, 1, *target_grid)
        volume = F.interpolate(rows, out_grid, mode="bilinear", align_corners=True)
    volume = volume.reshape(batch, cells // source_grid[1], source_grid[1], out_grid[0] * out_grid[1])
    if source_grid == out_grid:
        return volume
    out = out_grid
    if part is not None:
        first_line, first_row, count = part
        low, high, weight = lines_of_rows(source_grid[0], out_grid[0], volume)
        low, high, weight = (table[first_row : first_row + count] for table in (low, high, weight))
        weight = weight[:, None, None]
        volume = volume[:, low - first_line] * (1 - weight) + volume[:, high - first_line] * weight
        out = (count, out_grid[1])
    columns = volume.permute(0, 3, 1, 2)
    return F.interpolate(columns, out, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)


def lines_of_rows(lines: int, rows: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `rows` output rows the two of `lines` input lines it lies between, and the weight of the second.

    `align_corners=True`, with the rounding of `F.interpolate` in like's dtype and on its device.
    """
    step = torch.tensor(lines - 1, dtype=like.dtype) / (rows - 1) if rows > 1 else torch.zeros((), dtype=like.dtype)
    place = torch.arange(rows, device=like.device, dtype=like.dtype) * step.to(like.device)
    low = place.long().clamp(max=lines - 1)
    high = low if rows == lines else (low + 1).clamp(max=lines - 1)
    return low, high, place - low
