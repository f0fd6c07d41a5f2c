"""`window_attention` as written: cut the map into windows, attend inside each with a relative bias, paste back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_attention(qkv: Tensor, bias_table: Tensor, *, heads: int, window: int, shift: int = 0) -> Tensor:
    """Swin attention on qkv (B, H, W, 3C) -> (B, H, W, C).

    A map that is not a multiple of the window is padded at the bottom and right; padded keys are masked. With
    `shift` the windows are moved by that many cells, cyclically, and cells that were not neighbours are masked.
    """
    batch, height, width, channels = qkv.shape
    padded = (height + -height % window, width + -width % window)
    regions = _regions(height, width, padded, window, shift, qkv.device)
    x = F.pad(qkv, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
    if shift:
        x = x.roll((-shift, -shift), dims=(1, 2))
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    windows = _partition(x, window).unflatten(-1, (3, heads, channels // 3 // heads)).to(dtype)
    q, k, v = windows.permute(2, 0, 3, 1, 4)  # (windows, heads, window * window, head width) each
    logits = torch.einsum("nhqd,nhkd->nhqk", q * (channels // 3 // heads) ** -0.5, k)
    logits = logits + bias_table.to(dtype)[relative_index(window, qkv.device)].permute(2, 0, 1)
    if regions is not None:
        apart = regions[:, :, None] != regions[:, None, :]  # (windows of one map, queries, keys)
        logits = (
            logits.unflatten(0, (batch, regions.shape[0]))
            .masked_fill(apart[None, :, None], float("-inf"))
            .flatten(0, 1)
        )
    out = torch.einsum("nhqk,nhkd->nqhd", logits.softmax(dim=-1), v).flatten(2)
    out = _merge(out.to(qkv.dtype), batch, padded, window)
    if shift:
        out = out.roll((shift, shift), dims=(1, 2))
    return out[:, :height, :width]


def relative_index(window: int, device: torch.device | None = None) -> Tensor:
    """(w^2, w^2) row of the bias table for (query, key): (dr + w - 1) (2 w - 1) + (dc + w - 1), query minus key."""
    cells = torch.arange(window * window, device=device)
    row, col = cells // window, cells % window
    rows = row[:, None] - row[None, :] + window - 1
    cols = col[:, None] - col[None, :] + window - 1
    return rows * (2 * window - 1) + cols


def _regions(
    height: int, width: int, padded: tuple[int, int], window: int, shift: int, device: torch.device
) -> Tensor | None:
    """(windows, w^2) label of each cell; only cells of one label may attend to each other. None: all may.

    Padding has a label of its own, so a padded query sees padded keys and its softmax stays finite.
    """
    if not shift and padded == (height, width):
        return None
    labels = torch.zeros(padded, dtype=torch.long, device=device)
    if shift:
        for axis, side in enumerate(padded):
            place = torch.arange(side, device=device)
            band = (place >= side - window).long() + (place >= side - shift).long()
            labels = 3 * labels + (band[:, None] if axis == 0 else band[None, :])
    rows = (torch.arange(padded[0], device=device) + shift) % padded[0] < height
    cols = (torch.arange(padded[1], device=device) + shift) % padded[1] < width
    labels = torch.where(rows[:, None] & cols[None, :], labels, -1)
    return _partition(labels[None, :, :, None], window)[..., 0]


def _partition(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B H/w W/w, w^2, C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def _merge(x: Tensor, batch: int, size: tuple[int, int], window: int) -> Tensor:
    """(B H/w W/w, w^2, C) -> (B, H, W, C)."""
    height, width = size
    x = x.reshape(batch, height // window, width // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(batch, height, width, x.shape[-1])
