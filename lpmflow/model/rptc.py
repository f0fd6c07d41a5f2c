"""RPTC, the training task of LARL (paper section 3.2): tell a replaced token from its neighbourhood.

Some foreground patches of the source are replaced, before the encoder, by the sum of both images' cls tokens; after
it, each must be closer to its neighbours than to the other replaced tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lpmflow.config import LPMFlowConfig
from lpmflow.model.layers import foreground_weight
from lpmflow.ops._autocast import without_autocast

Grid = tuple[int, int]


def replace_tokens(
    source: Tensor, target: Tensor, config: LPMFlowConfig, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Replace a random part of the foreground patches of `source` by cls_source + cls_target.

    source, target (B, 1 + n, C) -> the changed source and the replaced positions (B, R) as token indices (cls = 0),
    R = ratio x top_k, at least 1. The patches are the `rptc_top_k` with the largest foreground weight.
    """
    top_k = min(config.rptc_top_k, source.shape[1] - 1)
    count = max(round(top_k * config.rptc_ratio), 1)
    foreground = foreground_weight(source.detach(), target.detach()).topk(top_k, dim=1).indices
    order = torch.rand(foreground.shape, device=source.device, generator=generator).argsort(dim=1)[:, :count]
    positions = foreground.gather(1, order) + 1
    layout = (source[:, :1] + target[:, :1]).expand(-1, count, -1)
    index = positions[:, :, None].expand(-1, -1, source.shape[2])
    return source.scatter(1, index, layout.to(source.dtype)), positions


def rptc_loss(tokens: Tensor, positions: Tensor, grid: Grid, temperature: float = 0.1) -> Tensor:
    """InfoNCE of each replaced token against the mean of its up to 8 grid neighbours; a scalar.

    tokens (B, 1 + n, C) source tokens after the encoder, positions (B, R) token indices (cls = 0), grid (h, w) with
    h w = n. The neighbours carry no gradient; the negatives are the other replaced tokens of the same image.
    """
    with without_autocast(tokens.device):  # positives and negatives in one precision
        height, width = grid
        maps = tokens[:, 1:].detach().transpose(1, 2).unflatten(2, grid)
        # divisor 1: sums over the 3x3 neighbourhood; the centre is taken out and the true count divides
        total = F.avg_pool2d(maps, 3, stride=1, padding=1, divisor_override=1) - maps
        ones = torch.ones(1, 1, height, width, dtype=maps.dtype, device=maps.device)
        count = (F.avg_pool2d(ones, 3, stride=1, padding=1, divisor_override=1) - 1).clamp(min=1)
        neighbours = (total / count).flatten(2).transpose(1, 2)
        index = positions[:, :, None].expand(-1, -1, tokens.shape[2])
        query = F.normalize(tokens.gather(1, index), dim=-1)
        positive = F.normalize(neighbours.gather(1, index - 1), dim=-1)
        same = (query * positive).sum(dim=-1, keepdim=True)
        others = query @ query.transpose(1, 2)
        others = others.masked_fill(
            torch.eye(positions.shape[1], dtype=torch.bool, device=tokens.device), float("-inf")
        )
        logits = torch.cat((same, others), dim=2) / temperature
        return -logits.log_softmax(dim=2)[:, :, 0].mean()
