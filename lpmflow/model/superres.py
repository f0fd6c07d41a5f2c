"""PFSR, progressive feature super-resolution (paper section 3.3): coarse and fine tokens, and their correlations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpmflow import ops
from lpmflow.config import LPMFlowConfig
from lpmflow.model.layers import ChannelAttention, Mlp, Projections, SelfAttention, SwinStage, arf

Grid = tuple[int, int]
Found = TypeVar("Found")
Correlate = Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Found]]
"""(name of the scale, q, k, v) -> attended values, and what is wanted of the correlation tensor."""


def correlation(scale: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A `Correlate` that keeps the whole tensor: head-summed attention probabilities, cls left out."""
    return ops.correlation(q, k, v)


class MatchingBlock(nn.Module):
    """Self-attention of both images, then cross-attention whose map is the correlation.

    `coarse` and `fine` say at which grids the block is used; it holds position tables for those.
    """

    def __init__(self, config: LPMFlowConfig, width: int, *, coarse: bool, fine: bool) -> None:
        super().__init__()
        cells = config.coarse_grid[0] * config.coarse_grid[1]
        self.coarse_tokens = 1 + cells
        for used, suffix, length in ((coarse, "", 1 + cells), (fine, "_fine", 1 + 4 * cells)):
            for side in ("source", "target"):
                if used:
                    table = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, length, width), std=0.02))
                    self.register_parameter(f"position_{side}{suffix}", table)
        self.self_attn = SelfAttention(width, config.heads)
        self.cross_attn = Projections(width, config.heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, config.mlp_ratio)

    def forward(
        self, source: Tensor, target: Tensor, scale: str, correlate: Correlate[Found]
    ) -> tuple[Found, Tensor, Tensor]:
        """(B, 1 + n, C), (B, 1 + m, C) -> what `correlate` finds in their correlation, and both sequences updated."""
        source = source + self._position("source", source)
        target = target + self._position("target", target)
        source = source + arf(self.self_attn(self.norm1(source)))
        source = source + self.norm2(source)  # no MLP on this side here: the released network has none
        target = target + arf(self.self_attn(self.norm1(target)))
        target = target + self.mlp(self.norm2(target))
        (query,) = self.cross_attn.split(self.norm1(source), 0, 1)
        key, value = self.cross_attn.split(self.norm1(target), 1, 3)
        attended, found = correlate(scale, query, key, value)
        source = source + arf(self.cross_attn.join(attended))
        source = source + self.mlp(self.norm2(source))
        return found, source, target

    def _position(self, side: str, tokens: Tensor) -> Tensor:
        suffix = "" if tokens.shape[1] == self.coarse_tokens else "_fine"
        return self.get_parameter(f"position_{side}{suffix}")


class SuperResolution(nn.Module):
    """U: tokens (B, 1 + n, C) of the coarse grid to (B, 1 + 4n, C) of the fine one; cls passes through.

    With `fine_features` the backbone's own features at the fine grid are added after the interpolation.
    """

    def __init__(self, config: LPMFlowConfig, width: int, fine_width: int | None) -> None:
        super().__init__()
        self.coarse_grid, self.fine_grid = config.coarse_grid, config.fine_grid
        self.skip = nn.Linear(fine_width, width) if fine_width is not None else None
        stages = range(config.superres_depth)
        self.stages = nn.ModuleList(
            SwinStage(width, config.heads, config.superres_window, config.mlp_ratio) for _ in stages
        )
        self.gates = nn.ModuleList(ChannelAttention(width) for _ in stages)

    def forward(self, tokens: Tensor, fine: Tensor | None = None) -> Tensor:
        cls, patches = tokens[:, :1], tokens[:, 1:]
        maps = patches.transpose(1, 2).unflatten(2, self.coarse_grid)
        x = F.interpolate(maps, self.fine_grid, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        if self.skip is not None and fine is not None:
            x = x + self.skip(fine.permute(0, 2, 3, 1))
        for stage, gate in zip(self.stages, self.gates, strict=True):
            x = gate(*stage(x))
        return torch.cat((cls, x.flatten(1, 2)), dim=1)


class FeatureSuperResolution(nn.Module):
    """Encoded tokens of both images to four correlation tensors (two without cross-scale)."""

    def __init__(self, config: LPMFlowConfig, width: int, fine_width: int | None) -> None:
        super().__init__()
        self.upsample = SuperResolution(config, width, fine_width)
        self.match_coarse = MatchingBlock(config, width, coarse=True, fine=False)
        self.match_cross = MatchingBlock(config, width, coarse=True, fine=True) if config.cross_scale else None
        self.match_fine = MatchingBlock(config, width, coarse=False, fine=True)

    def forward(
        self, source: Tensor, target: Tensor, fine: Tensor | None, correlate: Correlate[Found]
    ) -> tuple[tuple[Found, ...], Tensor]:
        """What `correlate` finds at each scale, in the order of `config.scales`, and the fine source tokens at the end.

        source, target (B, 1 + n, C); fine (2B, C_fine, 2h, 2w), source images first, where there are such. The tokens
        are (B, 1 + 4n, C), what the refinement looks at.
        """
        found_11, source, target = self.match_coarse(source, target, "11", correlate)
        source_up, target_up = self.upsample(torch.cat((source, target)), fine).chunk(2)
        if self.match_cross is None:
            found_22, source_up, _ = self.match_fine(source_up, target_up, "22", correlate)
            return (found_11, found_22), source_up
        found_12, source_12, target_12 = self.match_cross(source, target_up, "12", correlate)
        found_21, source_21, target_21 = self.match_cross(source_up, target, "21", correlate)
        lifted_source, lifted_target = self.upsample(torch.cat((source_12, target_21)), fine).chunk(2)
        found_22, source_22, _ = self.match_fine(lifted_source + source_21, target_12 + lifted_target, "22", correlate)
        return (found_11, found_12, found_21, found_22), source_22
