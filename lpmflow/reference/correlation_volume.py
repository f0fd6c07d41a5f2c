"""`correlation_volume` as written: cosines of all pairs of cells, weighted towards mutual nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor


def correlation_volume(feat_a: Tensor, feat_b: Tensor, *, normalize: bool, mutual: bool) -> Tensor:
    """(B, C, ha, wa), (B, C, hb, wb) -> (B, ha, wa, hb, wb); half precision inputs are computed in float32."""
    dtype = torch.promote_types(feat_a.dtype, torch.float32)
    a, b = (feat.to(dtype).flatten(2) for feat in (feat_a, feat_b))
    if normalize:
        a, b = unit(a), unit(b)
    volume = a.transpose(1, 2) @ b  # (B, cells of a, cells of b)
    if mutual:
        alike = volume.clamp(min=0)
        for dim in (1, 2):
            volume = volume * (alike / alike.amax(dim=dim, keepdim=True).clamp(min=EPSILON))
    return volume.unflatten(2, feat_b.shape[2:]).unflatten(1, feat_a.shape[2:])


EPSILON = 1e-5
"""The least maximum a mutual weight is divided by: where nothing is alike, nothing is near."""


def unit(x: Tensor) -> Tensor:
    """(B, C, cells) with vectors of length 1; vectors of length 0 stay, and have no gradient.

    Divided by the largest entry first, so that squares neither overflow nor vanish.
    """
    peak = x.detach().abs().amax(dim=1, keepdim=True)
    nothing = peak == 0
    x = x / torch.where(nothing, 1, peak)
    return torch.where(nothing, 0, x / torch.linalg.vector_norm(x, dim=1, keepdim=True).where(~nothing, 1))
