"""LARL, layout-aware representation learning (paper section 3.2): one encoder that sees both images.

The tokens of both images attend to each other in one sequence, with a learned bias for the relative position of two
patches that depends on which images they are of. Two other ways to combine the images are the paper's ablations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lpmflow import ops
from lpmflow.config import LPMFlowConfig
from lpmflow.model.layers import Mlp, Projections, attention

Grid = tuple[int, int]


class RegionAttention(Projections):
    """Joint attention of [cls, source patches, cls, target patches], (B, 2 + 2n, C)."""

    def __init__(self, width: int, heads: int, grid: Grid, region_bias: bool) -> None:
        super().__init__(width, heads)
        self.grid = grid
        columns = (2 * grid[0] - 1) * (2 * grid[1] - 1) * 4
        table = torch.zeros(heads, columns)
        self.bias_table: Tensor
        if region_bias:
            self.bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        else:
            self.register_buffer("bias_table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.join(ops.region_attention(q, k, v, self.bias_table, source_grid=self.grid, target_grid=self.grid))


class DualAttention(RegionAttention):
    """Attention of each image's tokens to one image only: their own, or the other's. Ablation of the joint encoder."""

    def __init__(self, width: int, heads: int, grid: Grid, region_bias: bool, cross: bool) -> None:
        super().__init__(width, heads, grid, region_bias)
        self.cross = cross

    def forward(self, x: Tensor) -> Tensor:
        bias = ops.region_bias(self.bias_table, self.grid, self.grid, prefix=1)
        half = x.shape[1] // 2
        q, k, v = self.split(x)
        out = []
        for own in (slice(0, half), slice(half, 2 * half)):
            seen = slice(half - own.start, 2 * half - own.start) if self.cross else own
            out.append(attention(q[:, :, own], k[:, :, seen], v[:, :, seen], bias[:, own, seen]))
        return self.join(torch.cat(out, dim=2))


class LayoutBlock(nn.Module):
    """x += Attn(LN x); with the bidirectional representation x += Cross(LN x); x += MLP(LN x)."""

    def __init__(self, config: LPMFlowConfig, width: int) -> None:
        super().__init__()
        arguments = (width, config.heads, config.coarse_grid, config.region_bias)
        joint = config.representation == "joint"
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = RegionAttention(*arguments) if joint else DualAttention(*arguments, cross=False)
        self.cross_attn: DualAttention | None = None
        if config.representation == "bidirectional":
            self.norm_cross = nn.LayerNorm(width, eps=1e-6)
            self.cross_attn = DualAttention(*arguments, cross=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, config.mlp_ratio, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.norm_cross(x))
        return x + self.mlp(self.norm2(x))


class LayoutEncoder(nn.Module):
    """Position and segment embeddings, `layout_depth` blocks and a final norm on both images' tokens."""

    def __init__(self, config: LPMFlowConfig, width: int) -> None:
        super().__init__()
        cells = config.coarse_grid[0] * config.coarse_grid[1]
        # one position table for both images, as in the released network; the segment tells them apart
        self.position = _embedding(cells, width)
        self.cls_position = _embedding(1, width)
        self.segment_source = _embedding(1, width)
        self.segment_target = _embedding(1, width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(LayoutBlock(config, width) for _ in range(config.layout_depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + n, C) twice -> the same, each image aware of the other."""
        parts = []
        for tokens, segment in ((source, self.segment_source), (target, self.segment_target)):
            parts += [tokens[:, :1] + self.cls_position, tokens[:, 1:] + self.position + segment]
        x = self.dropout(torch.cat(parts, dim=1))
        for block in self.blocks:
            x = block(x)
        first, second = self.norm(x).chunk(2, dim=1)
        return first, second


def _embedding(length: int, width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, length, width), std=0.02))
