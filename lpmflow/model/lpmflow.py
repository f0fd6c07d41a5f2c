"""The assembled network: backbone, LARL, PFSR, MMFI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpmflow import ops
from lpmflow.config import LPMFlowConfig
from lpmflow.model.backbone import create_backbone
from lpmflow.model.integration import FlowIntegration
from lpmflow.model.layers import foreground_weight
from lpmflow.model.layout import LayoutEncoder
from lpmflow.model.rptc import replace_tokens, rptc_loss
from lpmflow.model.superres import FeatureSuperResolution, MatchingBlock, correlation


class FlowOutput(NamedTuple):
    """What the network returns for B pairs; (h, w) is the fine grid, 32x32 in the base network."""

    flow: Tensor
    """(B, 2, 4h, 4w) source -> target displacement in cells of that grid, on the source grid; channel 0 x, 1 y."""
    mappings: Tensor
    """(B, S, 2, h, w) expected target coordinate (x, y) of each source cell, -1 the first cell, 1 the last."""
    confidence: Tensor
    """(B, h, w) largest probability of the finest correlation's target distribution, in (0, 1]."""
    foreground: Tensor
    """(B, h / 2, w / 2) foreground weight of the source patches, in [0, 1]."""
    correlations: tuple[Tensor, ...] | None
    """S tensors (B, source cells, target cells), when asked for."""
    rptc_loss: Tensor | None
    """Scalar; in training mode with RPTC on."""


class LPMFlow(nn.Module):
    """LPMFlow (CVPR 2024): dense semantic flow between two images of one category.

    `weights` says where the parameters came from; None means they are random, and such a model answers no `match`.
    After training one in a loop of your own, set it to a word of your choice.
    `skip_refinement = True` leaves the flow of the finest correlation as it is: for training its first part.
    """

    def __init__(self, config: LPMFlowConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        self.weights: str | None = None
        self.skip_refinement = False
        self.backbone = create_backbone(config, pretrained=pretrained)
        width = self.backbone.width
        fine_width = self.backbone.fine_width if config.fine_features else None
        if config.fine_features and fine_width is None:
            raise ValueError(f"fine_features must be False for the backbone {config.backbone}: it has one stride only")
        if width % config.heads:
            raise ValueError(f"heads must divide the backbone's width {width}, got {config.heads}")
        self.layout = LayoutEncoder(config, width)
        self.superres = FeatureSuperResolution(config, width, fine_width)
        self.integration = FlowIntegration(config, width)
        for part in (self.layout, self.superres, self.integration):
            part.apply(_init_linear)
        for module in self.superres.modules():
            if isinstance(module, MatchingBlock):
                _tie_query_and_key(module)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """PyTorch's own; a load that left nothing out also says in `weights` that they are no longer random."""
        result = super().load_state_dict(state_dict, strict, assign)
        if not result.missing_keys:
            self.weights = "load_state_dict"
        return result

    def forward(self, source: Tensor, target: Tensor, *, return_correlations: bool = False) -> FlowOutput:
        """source, target (B, 3, H, W), ImageNet-normalised, any size: resized to `config.image_size`.

        Raises ValueError or TypeError naming the argument. In training mode `rptc_loss` is set where RPTC is on.
        """
        for name, images in (("source", source), ("target", target)):
            _check_images(name, images, self.integration.x_normal)
        if source.shape[0] != target.shape[0]:
            raise ValueError(
                f"source and target must have the same batch size, got {source.shape[0]} and {target.shape[0]}"
            )
        config = self.config
        tokens, fine = self.backbone(torch.cat([self._resize(images) for images in (source, target)]))
        source_tokens, target_tokens = tokens.chunk(2)
        foreground = foreground_weight(source_tokens, target_tokens).unflatten(1, config.coarse_grid)
        positions = None
        if self.training and config.rptc_top_k:
            source_tokens, positions = replace_tokens(source_tokens, target_tokens, config)
        source_tokens, target_tokens = self.layout(source_tokens, target_tokens)
        task = None
        if positions is not None:
            task = rptc_loss(source_tokens.float(), positions, config.coarse_grid, config.rptc_temperature)
        tokens_and_features = (source_tokens, target_tokens, fine if config.fine_features else None)
        correlations: tuple[Tensor, ...] | None = None
        exact = torch.promote_types(source_tokens.dtype, torch.float32)
        if return_correlations or ops.volume_fits(source.shape[0], config.fine_grid, config.fine_grid, exact):
            correlations, source_fine = self.superres(*tokens_and_features, correlation)
            mappings, confidences = self.integration.fuse(correlations)
        else:  # more than is worth holding
            found, source_fine = self.superres(*tokens_and_features, self.integration.correlate)
            mappings = torch.stack([flow.mapping for flow in found], dim=1)
            confidences = torch.stack([flow.confidence for flow in found], dim=1)
        flows = self.integration.to_flow(mappings)
        flow = flows[:, -1]
        if not self.skip_refinement:
            flow = flow + self.integration.refine(flows, source_fine)
        kept = correlations if return_correlations else None
        return FlowOutput(flow, mappings, confidences[:, -1], foreground, kept, task)

    def _resize(self, images: Tensor) -> Tensor:
        if images.shape[-2:] == self.config.image_size:
            return images
        return F.interpolate(images, self.config.image_size, mode="bilinear", align_corners=False)

    def load_released_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load the parameters of a released LPMFlow checkpoint (see `lpmflow.model.released`)."""
        from lpmflow.model.released import from_released

        self.load_state_dict(from_released(state_dict, self))
        self.weights = "a released checkpoint"

    def released_state_dict(self) -> dict[str, Tensor]:
        """The parameters under the released checkpoint's names, ready for `torch.save`."""
        from lpmflow.model.released import to_released

        return to_released(self)


def _check_images(name: str, images: object, parameter: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor (B, 3, H, W), got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"{name} must have shape (B, 3, H, W) with B, H, W at least 1, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"{name} must be floating point and ImageNet-normalised, got {images.dtype}")
    if images.device != parameter.device:
        raise ValueError(f"{name} must be on the network's device {parameter.device}, got {images.device}")
    if parameter.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"the network's parameters must be float32 or float64 (autocast computes in less), got {parameter.dtype}"
        )
    if images.dtype != parameter.dtype and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(f"{name} must have the network's dtype {parameter.dtype} outside autocast, got {images.dtype}")


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _tie_query_and_key(block: MatchingBlock) -> None:
    """Start the cross-attention as a similarity: keys projected like queries, so that like tokens match from step 0."""
    width = block.norm1.normalized_shape[0]
    with torch.no_grad():
        weight = block.cross_attn.qkv.weight
        weight[: 2 * width].normal_(std=width**-0.5)
        weight[width : 2 * width] = weight[:width]
