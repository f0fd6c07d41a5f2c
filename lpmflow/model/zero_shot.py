"""Matching without training: features of a timm backbone, their cosine volume, and the best target cell of each cell.

It has the interface of `LPMFlow` that `lpmflow.Matcher` needs, so that the two are used and scored alike.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpmflow import ops
from lpmflow.memory import require_bytes
from lpmflow.model.backbone import import_timm
from lpmflow.model.checkpoint import read_backbone
from lpmflow.model.lpmflow import FlowOutput

READOUTS = ("window", "nearest")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TEMPERATURE = 0.02
"""Of the softmax in the window, over cosines."""


@dataclass(frozen=True)
class ZeroShotConfig:
    """What decides the answers beside the weights."""

    backbone: str
    input_size: tuple[int, int]
    readout: str = "window"
    name: str = "zero-shot"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


class ZeroShot(nn.Module):
    """Nearest neighbours of a backbone's last features.

    Args:
        backbone: the name of a timm model, such as "vit_base_patch14_reg4_dinov2.lvd142m" or "convnext_base".
        weights: a file of its parameters (.safetensors or .pth, timm's names); None asks timm for them, which
            downloads them at the first call. There is no third way: without weights it raises.
        image_size: what the backbone sees, one number or (height, width); None is the size it was trained at.
        readout: "nearest" takes the most similar target cell; "window" averages the cells around it, 1/8 of the grid
            to each side, under a softmax of their cosines (soft-argmax), which gives places between cells.

    Raises ValueError for a name timm does not have, a size that does not fit or takes more memory than there is;
    OSError when there are no weights.
    """

    def __init__(
        self,
        backbone: str,
        *,
        weights: str | os.PathLike[str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        readout: str = "window",
    ) -> None:
        super().__init__()
        if readout not in READOUTS:
            raise ValueError(f"readout must be one of {', '.join(READOUTS)}, got {readout!r}")
        self.net = _create(backbone, weights)
        trained = self.net.pretrained_cfg
        size = trained["input_size"][-2:] if image_size is None else image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
            raise ValueError(f"image_size must be a positive integer or (height, width), got {image_size!r}")
        reduction = self.net.feature_info[-1]["reduction"]
        cells = max(size[0] // reduction, 1) * max(size[1] // reduction, 1)
        # photographs twice; similarities, those in the window, and which these are
        require_bytes(size, 48 * size[0] * size[1] + 9 * cells**2)
        if size != tuple(trained["input_size"][-2:]):
            _resize(self.net, backbone, size, reduction)
        self.config = ZeroShotConfig(backbone, size, readout)
        self.weights: str | None = f"timm's {backbone}" if weights is None else str(weights)
        mean, std = (torch.tensor(trained[key]).view(3, 1, 1) for key in ("mean", "std"))
        theirs, deviation = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
        self.gain: Tensor
        self.shift: Tensor
        # images come normalised with ImageNet's statistics, and some backbones were trained with others
        self.register_buffer("gain", deviation / std, persistent=False)
        self.register_buffer("shift", (theirs - mean) / std, persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> FlowOutput:
        """source, target (B, 3, *config.input_size), ImageNet-normalised -> the flow on the grid of the features.

        The confidence is the cosine of the best cell, at least 0. The foreground is 1 everywhere: none is known.
        """
        images = torch.cat((source, target)) * self.gain + self.shift
        features = self.net.forward_intermediates(images, indices=1, output_fmt="NCHW", intermediates_only=True)[-1]
        grid = features.shape[-2:]
        volume = ops.correlation_volume(*features.chunk(2)).flatten(3).flatten(1, 2)  # (B, cells, cells)
        if self.config.readout == "window":
            volume = _around_the_best(volume, grid)
            mapping = ops.cross_scale_fusion([volume], [grid], [grid], out_grid=grid, temperature=TEMPERATURE)
            assert isinstance(mapping, Tensor)
        else:
            mapping = _cells(volume.argmax(dim=2), grid)[:, None]
        confidence = volume.amax(dim=2).clamp(0, 1).unflatten(1, grid)
        last = torch.tensor([grid[1] - 1, grid[0] - 1], device=mapping.device)[:, None, None]
        rows, columns = (torch.arange(side, device=mapping.device) for side in grid)
        own = torch.stack((columns.expand(grid), rows[:, None].expand(grid)))
        flow = (mapping[:, 0] + 1) * last / 2 - own
        return FlowOutput(flow, mapping, confidence, torch.ones_like(confidence), None, None)


def _around_the_best(volume: Tensor, grid: tuple[int, int]) -> Tensor:
    """`volume` with -inf outside a window around the best target cell of each source cell."""
    best = volume.argmax(dim=2, keepdim=True)
    rows, columns = (torch.arange(side, device=volume.device) for side in grid)
    far = (rows - best // grid[1]).abs() > max(grid[0] // 8, 1), (columns - best % grid[1]).abs() > max(grid[1] // 8, 1)
    outside = (far[0][..., None] | far[1][..., None, :]).flatten(2)
    return volume.masked_fill(outside, float("-inf"))


def _cells(best: Tensor, grid: tuple[int, int]) -> Tensor:
    """Coordinates (B, 2, h, w) in [-1, 1] of target cells (B, cells)."""
    places = torch.stack((best % grid[1], best // grid[1]), dim=1).float()
    last = torch.tensor([grid[1] - 1, grid[0] - 1], device=best.device).clamp(min=1)
    return (2 * places / last[:, None] - 1).unflatten(2, grid)


def _resize(net: Any, backbone: str, size: tuple[int, int], reduction: int) -> None:
    """Prepares `net` for another size than its own, or ValueError: timm finds some that do not fit while matching."""
    if any(side % reduction for side in size):
        raise ValueError(f"image_size must be a multiple of {reduction}, the cells of {backbone}, got {size}")
    try:
        if hasattr(net, "set_input_size"):
            net.set_input_size(img_size=size)
        with torch.inference_mode():
            net.eval().forward_intermediates(torch.zeros(1, 3, *size), indices=1, intermediates_only=True)
    except Exception as error:  # whatever a backbone says that has one size only
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"image_size must be one that {backbone} can take, got {size}: {reason}") from error


def _create(backbone: str, weights: str | os.PathLike[str] | None) -> Any:
    """The timm model with its parameters, or one sentence why not."""
    timm = import_timm()
    if not isinstance(backbone, str) or not timm.is_model(backbone):
        raise ValueError(f"backbone must be the name of a timm model, got {backbone!r}")
    given = {} if weights is None else {"pretrained_cfg_overlay": _overlay(timm, backbone, Path(weights))}
    try:
        net = timm.create_model(backbone, pretrained=True, num_classes=0, **given)
    except Exception as error:  # timm, the Hub's client and torch raise a dozen types for what is missing or wrong
        reason = " ".join(str(error).split()) or type(error).__name__
        if weights is not None:
            raise ValueError(f"{weights} does not hold the parameters of {backbone}: {reason:.400}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"the weights of {backbone} could not be had from timm ({reason}); give a file as backbone_weights"
        ) from error
    for kept in (getattr(net, "pretrained_cfg", None), getattr(net, "default_cfg", None)):
        if isinstance(kept, dict):
            kept.pop("state_dict", None)  # timm would hold the file's numbers as long as the network's
    if not hasattr(net, "forward_intermediates") or not hasattr(net, "pretrained_cfg"):
        raise ValueError(f"backbone must be a timm model that gives feature maps, which {backbone} does not")
    return net


def _overlay(timm: Any, backbone: str, path: Path) -> dict[str, Any]:
    """What has timm take its weights from a file, by its own rules for names, all of them and no others."""
    if not path.is_file():
        raise FileNotFoundError(f"backbone_weights must be a file of parameters, but there is no {str(path)!r}")
    try:
        trained = timm.models.get_pretrained_cfg(backbone)
    except RuntimeError as error:
        raise ValueError(f"backbone must be the name of a timm model, got {backbone!r}: {error}") from error
    heads = getattr(trained, "classifier", None) or ()
    heads = (heads,) if isinstance(heads, str) else heads
    unwanted = {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    state_dict = {name: value for name, value in read_backbone(path).items() if name not in unwanted}
    return {"state_dict": state_dict, "num_classes": 0}  # a head, which we have not, is all that timm would drop
