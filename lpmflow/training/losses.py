"""Losses on flow and on the correlation itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def end_point_error(flow: Tensor, label: Tensor, valid: Tensor | None = None, *, power: float = 1.0) -> Tensor:
    """Mean distance of flow and label (B, 2, h, w) over the labelled cells; a scalar, 0 where nothing is labelled.

    `valid` (B, h, w) says which cells are labelled; without it a label of exactly (0, 0) counts as none, the released
    rule. A `power` below 1 gives mean (distance + 0.1)^power, which large errors, mostly wrong labels or wrong
    matches that need another remedy, dominate less. The paper's loss has power 1 (section 3.5).
    """
    if valid is None:
        valid = (label != 0).any(dim=1)
    error = flow.float() - label.float()
    if power == 1.0:
        distance = torch.linalg.vector_norm(error, dim=1)
    else:
        distance = ((error.square().sum(dim=1) + 1e-6).sqrt() + 0.1).pow(power)
    return (distance * valid).sum() / valid.sum().clamp(min=1)


def correlation_nll(corr: Tensor, places: Tensor, valid: Tensor, target_grid: Grid, heads: int) -> Tensor:
    """How unlikely the correlation holds the true match, in both directions; nats, a scalar.

    corr (B, n, m) head-summed attention, places (B, n, 2) the true target cell (x, y) of each source cell, valid
    (B, n). The match is the four cells around the place with bilinear weights. A row of corr over `heads` is a
    distribution over targets; a column over its sum is one over sources. End-point error alone teaches a correlation
    slowly: its gradient dies where the softmax has picked a wrong cell.
    """
    weights, index, inside = _bilinear(places, target_grid)
    mask = valid & inside
    forward = (corr / heads).clamp(min=1e-8).log()
    backward = (corr / corr.sum(dim=1, keepdim=True).clamp(min=1e-8)).clamp(min=1e-8).log()
    both = (forward + backward).gather(2, index)
    return -((both * weights).sum(dim=2) * mask).sum() / (2 * mask.sum().clamp(min=1))


def rptc_weight(epoch: float, start: float = 0.2, decline: float = 0.1) -> float:
    """RPTC weight in an epoch counted from 0: `start`, less that share of it each epoch, until 0 (the paper's rule)."""
    return max(start * (1 - decline * epoch), 0.0)


def _bilinear(places: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The four cells around each place: weights and indices (B, n, 4), and whether the place is on the grid (B, n)."""
    height, width = grid
    last = places.new_tensor([width - 1, height - 1])
    inside = ((places > -0.5) & (places < last + 0.5)).all(dim=-1)
    clamped = torch.minimum(places.clamp(min=0), last)
    low = torch.minimum(clamped.floor(), (last - 1).clamp(min=0))
    part = clamped - low
    weights, indices = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            wx, wy = (part[..., axis] if step else 1 - part[..., axis] for axis, step in ((0, dx), (1, dy)))
            column = (low[..., 0] + dx).clamp(max=width - 1)
            row = (low[..., 1] + dy).clamp(max=height - 1)
            weights.append(wx * wy)
            indices.append((row * width + column).long())
    return torch.stack(weights, dim=-1), torch.stack(indices, dim=-1), inside


def cell_places(mapping: Tensor, valid: Tensor, grid: Grid, *, inside_share: float = 0.75) -> tuple[Tensor, Tensor]:
    """Pixel truth (B, H, W, 2), (B, H, W) -> places of a grid's cells (B, h, w, 2) in its own cells, valid (B, h, w).

    H, W must be multiples of h, w. A cell's place is the mean over its pixels; it is valid when most of them are.
    """
    height, width = mapping.shape[1:3]
    kernel = (height // grid[0], width // grid[1])
    pixels = F.avg_pool2d(mapping.permute(0, 3, 1, 2), kernel).permute(0, 2, 3, 1)
    scale = pixels.new_tensor([grid[1] / width, grid[0] / height])
    share = F.avg_pool2d(valid[:, None].float(), kernel)[:, 0]
    return (pixels + 0.5) * scale - 0.5, share >= inside_share
