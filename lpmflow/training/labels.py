"""The label grid of the paper's keypoint supervision: a few marked points -> flow for the cells around them."""

from __future__ import annotations

import torch
from torch import Tensor

REACH = 17.0
"""Half side of the square of cells a keypoint labels, in pixels of the frame (the released training code)."""


def keypoint_labels(
    source_points: Tensor,
    target_points: Tensor,
    valid: Tensor | None = None,
    *,
    frame: tuple[int, int] = (512, 512),
    grid: tuple[int, int] = (128, 128),
) -> Tensor:
    """Flow labels (B, 2, gh, gw) in cells, channel 0 x and 1 y; (0, 0) where a cell has none. The released rule.

    source_points, target_points (B, N, 2): the same keypoints (x, y) in pixels of the frame both images are squashed
    to, of size `frame` (height, width). `valid` (B, N) bool leaves out the padding. A cell is labelled by every source
    keypoint within 17 pixels of its centre, the border included, on each axis. Its label points from the mean of these
    to the *last* one's target, which is what the released code computes where several reach a cell. Labels of exactly
    (0, 0) mean "none" there too, so that a keypoint which does not move labels nothing.

    A cell's centre here is at ((j + 0.5) w, (i + 0.5) h) for cells w x h pixels large, as in the released code, half a
    pixel beyond the convention of `lpmflow.geometry`. Raises ValueError when a shape is not as stated.
    """
    if source_points.ndim != 3 or source_points.shape[2] != 2 or source_points.shape != target_points.shape:
        raise ValueError(
            f"source_points and target_points must both have shape (B, N, 2), got {tuple(source_points.shape)} and "
            f"{tuple(target_points.shape)}"
        )
    batch, count, _ = source_points.shape
    if valid is None:
        valid = torch.ones(batch, count, dtype=torch.bool, device=source_points.device)
    if valid.shape != (batch, count):
        raise ValueError(f"valid must have shape {(batch, count)}, got {tuple(valid.shape)}")
    height, width = grid
    cell = source_points.new_tensor([frame[1] / width, frame[0] / height])
    y, x = torch.meshgrid(
        torch.arange(height, device=cell.device, dtype=cell.dtype) + 0.5,
        torch.arange(width, device=cell.device, dtype=cell.dtype) + 0.5,
        indexing="ij",
    )
    centres = torch.stack((x, y), dim=-1) * cell  # (gh, gw, 2)
    labels = source_points.new_zeros(batch, height, width, 2)
    total, reached = torch.zeros_like(labels), labels.new_zeros(batch, height, width, 1)
    last = torch.zeros_like(labels)
    for point in range(count):  # in their order: the last one's target stays
        place = source_points[:, point, None, None]
        near = ((centres - place).abs() <= REACH).all(dim=-1, keepdim=True) & valid[:, point, None, None, None]
        total = total + near * place
        reached = reached + near
        last = torch.where(near, target_points[:, point, None, None], last)
    labels = torch.where(reached > 0, (last - total / reached.clamp(min=1)) / cell, labels)
    return labels.permute(0, 3, 1, 2)
