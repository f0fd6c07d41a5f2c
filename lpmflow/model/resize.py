"""Tables trained on one grid, resized to another: what lets weights run at an image size they were not trained at."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpmflow.config import LPMFlowConfig

Grid = tuple[int, int]


def resize_tables(
    state_dict: dict[str, Tensor], model: nn.Module, trained: LPMFlowConfig | None = None
) -> dict[str, Tensor]:
    """`state_dict` (our names) with every table that depends on a grid or a window resized to `model`'s shapes.

    `trained` is the configuration the tables come from; None means square grids. Tensors that already fit pass
    unchanged; ValueError names one that neither fits nor is such a table.
    """
    wanted = model.state_dict()
    return {
        name: tensor
        if name not in wanted or tensor.shape == wanted[name].shape
        else _resize(name, tensor, wanted[name], model, trained)
        for name, tensor in state_dict.items()
    }


def _resize(name: str, table: Tensor, like: Tensor, model: nn.Module, trained: LPMFlowConfig | None) -> Tensor:
    config: LPMFlowConfig = model.config  # type: ignore[assignment]
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("x_normal", "y_normal"):
        return F.interpolate(table[None, None].float(), like.shape[0], mode="linear", align_corners=True)[0, 0]
    if name.startswith("layout.") and leaf == "bias_table":
        cells = table.shape[1] // 4
        old = trained.coarse_grid if trained else _square((math.isqrt(cells) + 1) // 2)
        maps = table.unflatten(1, (2 * old[0] - 1, 2 * old[1] - 1, 4)).permute(0, 3, 1, 2)
        new = config.coarse_grid
        return _bicubic(maps, (2 * new[0] - 1, 2 * new[1] - 1)).permute(0, 2, 3, 1).flatten(1)
    if leaf == "bias_table":
        old_side, new_side = math.isqrt(table.shape[0]), math.isqrt(like.shape[0])
        maps = table.t().unflatten(1, (old_side, old_side))[None]
        return _bicubic(maps, (new_side, new_side))[0].flatten(1).t()
    if leaf.startswith("position"):
        fine = leaf.endswith("_fine")
        new = config.fine_grid if fine else config.coarse_grid
        prefix = like.shape[1] - new[0] * new[1]
        cells = table.shape[1] - prefix
        old = (trained.fine_grid if fine else trained.coarse_grid) if trained else _square(math.isqrt(cells))
        maps = table[:, prefix:].transpose(1, 2).unflatten(2, old)
        return torch.cat((table[:, :prefix].float(), _bicubic(maps, new).flatten(2).transpose(1, 2)), dim=1)
    raise ValueError(f"parameter {name} must have shape {tuple(like.shape)}, got {tuple(table.shape)}")


def _bicubic(maps: Tensor, size: Grid) -> Tensor:
    return F.interpolate(maps.float(), size, mode="bicubic", align_corners=False)


def _square(side: int) -> Grid:
    return side, side
