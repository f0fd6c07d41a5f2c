"""Tables trained on one grid, resized to another: what lets weights run at an image size they were not trained at."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lpmflow.model.lpmflow import LPMFlow

Grid = tuple[int, int]
_COORDINATES = ("integration.y_normal", "integration.x_normal")


def resize_tables(state_dict: dict[str, Tensor], model: LPMFlow) -> dict[str, Tensor]:
    """`state_dict` (all parameters, our names) with every table of a grid or a window resized to `model`'s.

    The grid the tables come from is told by the lengths of `integration.y_normal` and `x_normal`, for the number of a
    table's entries does not tell 2x8 cells from 4x4. Tables of the same grid or window pass unchanged, as does what no
    grid decides. Raises ValueError naming a parameter that fits neither grid.
    """
    trained = _trained_grid(state_dict)
    return {
        name: _resize(name, state_dict[name], tuple(like.shape), trained, model.config.coarse_grid)
        for name, like in model.state_dict().items()
    }


def _trained_grid(state_dict: dict[str, Tensor]) -> Grid:
    """(h, w) of the coarse grid; the coordinate tables have one entry a column or row of the fine one."""
    for name in _COORDINATES:
        table = state_dict[name]
        if table.ndim != 1 or len(table) == 0 or len(table) % 2:
            raise ValueError(f"parameter {name} must have shape (2 x cells,), got {tuple(table.shape)}")
    height, width = (len(state_dict[name]) // 2 for name in _COORDINATES)
    return height, width


def _resize(name: str, table: Tensor, wanted: tuple[int, ...], old: Grid, new: Grid) -> Tensor:
    """`table` of the parameter `name`, from the coarse grid `old` to `new`, where it has the shape `wanted`."""
    leaf = name.rsplit(".", 1)[-1]
    if name in _COORDINATES:
        if tuple(table.shape) == wanted:
            return table
        return F.interpolate(_full(table)[None, None], wanted[0], mode="linear", align_corners=True)[0, 0]
    if name.startswith("layout.") and leaf == "bias_table":
        _check(name, table, (wanted[0], (2 * old[0] - 1) * (2 * old[1] - 1) * 4))
        if old == new:
            return table
        maps = table.unflatten(1, (2 * old[0] - 1, 2 * old[1] - 1, 4)).permute(0, 3, 1, 2)
        return _bicubic(maps, (2 * new[0] - 1, 2 * new[1] - 1)).permute(0, 2, 3, 1).flatten(1)
    if leaf == "bias_table":
        side = math.isqrt(table.shape[0])
        _check(name, table, (side * side, wanted[1]))
        if tuple(table.shape) == wanted:
            return table
        maps = table.t().unflatten(1, (side, side))[None]
        return _bicubic(maps, (math.isqrt(wanted[0]),) * 2)[0].flatten(1).t()
    if leaf.startswith("position"):
        if leaf.endswith("_fine"):
            old, new = (2 * old[0], 2 * old[1]), (2 * new[0], 2 * new[1])
        prefix = wanted[1] - new[0] * new[1]
        _check(name, table, (1, prefix + old[0] * old[1], wanted[2]))
        if old == new:
            return table
        maps = table[:, prefix:].transpose(1, 2).unflatten(2, old)
        return torch.cat((_full(table[:, :prefix]), _bicubic(maps, new).flatten(2).transpose(1, 2)), dim=1)
    _check(name, table, wanted)
    return table


def _check(name: str, table: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(table.shape) != shape:
        raise ValueError(f"parameter {name} must have shape {shape}, got {tuple(table.shape)}")


def _bicubic(maps: Tensor, size: Grid) -> Tensor:
    return F.interpolate(_full(maps), size, mode="bicubic", align_corners=False)


def _full(table: Tensor) -> Tensor:
    """`table` in at least float32: half precision is for storage."""
    return table.to(torch.promote_types(table.dtype, torch.float32))
