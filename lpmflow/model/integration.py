"""MMFI, multi-scale matching flow integration (paper section 3.4): correlations to flow, and its refinement."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpmflow import ops
from lpmflow.config import LPMFlowConfig
from lpmflow.model.layers import ChannelAttention, SwinStage

Grid = tuple[int, int]


class FlowIntegration(nn.Module):
    """Cross-scale flow fusion, then windowed coarse-to-fine refinement."""

    def __init__(self, config: LPMFlowConfig, width: int) -> None:
        super().__init__()
        self.config = config
        height, width_cells = config.fine_grid
        self.x_normal = nn.Parameter(torch.linspace(-1, 1, width_cells))
        self.y_normal = nn.Parameter(torch.linspace(-1, 1, height))
        self.context = nn.Conv2d(width, config.context_width, 1)
        self.context_dropout = nn.Dropout2d(config.refine_dropout)
        self.stages = nn.ModuleList(
            SwinStage(config.refine_width, config.refine_heads, window, mlp_ratio=4.0) for window in config.windows
        )
        self.gates = nn.ModuleList(ChannelAttention(config.refine_width) for _ in config.windows)
        self.head_hidden = nn.Conv2d(config.refine_width, 32, 3, padding=1)
        self.head_out = nn.Conv2d(32, 2, 3, padding=1)
        for parameter in self.head_out.parameters():
            nn.init.zeros_(parameter)  # a fresh network starts from the correlation's own flow

    def fuse(self, correlations: tuple[Tensor, ...]) -> ops.FusedFlow:
        """Expected target coordinates in [-1, 1], (B, S, 2, h, w), and their confidence, (B, S, h, w)."""
        fused = ops.cross_scale_fusion(
            correlations,
            [self._grids(scale)[0] for scale in self.config.scales],
            [self._grids(scale)[1] for scale in self.config.scales],
            out_grid=self.config.fine_grid,
            temperature=self.config.temperature,
            x=self.x_normal,
            y=self.y_normal,
            return_confidence=True,
        )
        assert isinstance(fused, ops.FusedFlow)
        return fused

    def correlate(self, scale: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ops.CorrelationFlow]:
        """The flow of one scale from a matching block's q, k and v, without its correlation tensor."""
        source, target = self._grids(scale)
        flow = ops.correlation_flow(
            q,
            k,
            v,
            source_grid=source,
            target_grid=target,
            out_grid=self.config.fine_grid,
            temperature=self.config.temperature,
            x=self.x_normal,
            y=self.y_normal,
        )
        return flow.attended, flow

    def _grids(self, scale: str) -> tuple[Grid, Grid]:
        grids = {"1": self.config.coarse_grid, "2": self.config.fine_grid}
        return grids[scale[0]], grids[scale[1]]

    def to_flow(self, mappings: Tensor) -> Tensor:
        """(B, S, 2, h, w) in [-1, 1] -> (B, S, 2, 4h, 4w) displacement in cells of the flow grid."""
        height, width = mappings.shape[-2:]
        rows = torch.arange(height, dtype=mappings.dtype, device=mappings.device)
        cols = torch.arange(width, dtype=mappings.dtype, device=mappings.device)
        own = torch.stack((cols.expand(height, width), rows[:, None].expand(height, width)))
        last = torch.tensor([width - 1, height - 1], dtype=mappings.dtype, device=mappings.device)
        flow = (mappings + 1) * last[:, None, None] / 2 - own
        return 4 * flow.repeat_interleave(4, dim=-2).repeat_interleave(4, dim=-1)

    def refine(self, flows: Tensor, source: Tensor) -> Tensor:
        """The correction r (B, 2, 4h, 4w) of the finest flow, from all flows and the fine source tokens."""
        maps = source[:, 1:].transpose(1, 2).unflatten(2, self.config.fine_grid)
        # Channels last before the map has grown: it is interpolated faster so, and the windows read it as it lies.
        context = F.relu(self.context(maps)).contiguous(memory_format=torch.channels_last)
        context = F.interpolate(context, self.config.flow_grid, mode="bilinear", align_corners=True)
        context = self.context_dropout(context).permute(0, 2, 3, 1)
        first, *others = flows.permute(0, 3, 4, 1, 2).unbind(3)
        x = torch.cat((first, context, *others), dim=-1)
        total = torch.zeros_like(x)
        for stage, gate in zip(self.stages, self.gates, strict=True):
            x = gate(*stage(x))
            total = total + x
        return self.head_out(F.relu(self.head_hidden(total.permute(0, 3, 1, 2))))
