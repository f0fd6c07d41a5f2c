"""Inputs of `window_stage` at any size, and the same in float64. Used by its tests."""

from __future__ import annotations

import torch
from torch import Tensor

from lpmflow import reference
from lpmflow.ops import PooledMap, StageWeights


def inputs(size, dtype=torch.float32, seed=0, device="cpu") -> tuple[Tensor, StageWeights, dict[str, int]]:
    """Map, weights, and heads and window, for a size (B, H, W, C, heads, window, hidden)."""
    batch, height, width, channels, heads, window, hidden = size
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        scale = shape[-1] ** -0.5 * (2 if len(shape) == 2 else 1)
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    weights = StageWeights(
        1 + random(channels),
        random(channels),
        random(3 * channels, channels),
        random(3 * channels),
        random((2 * window - 1) ** 2, heads),
        random(channels, channels),
        random(channels),
        1 + random(channels),
        random(channels),
        random(hidden, channels),
        random(hidden),
        random(channels, hidden),
        random(channels),
        1 + random(channels),
        random(channels),
    )
    x = torch.randn(batch, height, width, channels, generator=generator).to(device, dtype)
    return x, weights, {"heads": heads, "window": window}


def exactly(x: Tensor, weights: StageWeights, **sizes: int) -> PooledMap:
    """By the reference in float64."""
    return reference.window_stage(x.double(), StageWeights(*(w.double() for w in weights)), **sizes, eps=1e-5)
