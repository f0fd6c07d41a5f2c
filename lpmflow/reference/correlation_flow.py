"""`correlation_flow` as written: the correlation tensor, whole, then the flow it implies."""

from __future__ import annotations

from torch import Tensor

from lpmflow.reference.correlation import correlation
from lpmflow.reference.cross_scale_fusion import cross_scale_fusion

Grid = tuple[int, int]


def correlation_flow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    source_grid: Grid,
    target_grid: Grid,
    out_grid: Grid,
    scale: float,
    prefix: int,
    temperature: float,
    x: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`correlation`, then `cross_scale_fusion` of its one tensor.

    Returns attended (B, H, N, D), mapping (B, 2, h, w), confidence (B, h, w).
    """
    attended, corr = correlation(q, k, v, scale=scale, prefix=prefix)
    mapping, confidence = cross_scale_fusion(
        [corr], [source_grid], [target_grid], out_grid=out_grid, temperature=temperature, x=x, y=y
    )
    return attended, mapping[:, 0], confidence[:, 0]
