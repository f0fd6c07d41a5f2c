"""The backbone: images to tokens `[cls] + patches`, from any timm ViT or the small convolutional network."""

from __future__ import annotations

import traceback
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lpmflow.config import CONVNET, LPMFlowConfig
from lpmflow.model.convnet import STRIDE, OrientedConvNet
from lpmflow.model.layers import Linear, LinearGelu

Grid = tuple[int, int]


class Features(NamedTuple):
    """What a backbone gives for a batch of images."""

    tokens: Tensor
    """(B, 1 + n, C), cls first, patches row-major. A network without a cls token gives the mean patch in its place."""
    fine: Tensor | None
    """(B, C_fine, 2h, 2w) features at half the stride, where the network has them."""


def import_timm() -> ModuleType:
    """timm, or an ImportError that says in one sentence what to install.

    timm imports torchvision, and a torchvision built for another torch fails with messages that name neither.
    """
    try:
        with torch.device("cpu"):  # older torchvisions read numbers when imported, which tensors on "meta" have not
            import timm
    except ModuleNotFoundError as error:
        if error.name == "timm":
            raise ImportError("this model's backbone needs timm: pip install timm") from error
        raise ImportError(
            f"timm cannot be imported because {error.name} is missing: pip install {error.name}"
        ) from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        passed = traceback.extract_tb(error.__traceback__)
        if not any("torchvision" in frame.filename for frame in passed) and "torchvision" not in str(error):
            raise ImportError(f"timm cannot be imported: {error}") from error
        raise ImportError(
            f"timm cannot be imported because torchvision does not fit torch {torch.__version__} "
            f"(install the two from the same index: pip install --force-reinstall torch torchvision): {error}"
        ) from error
    return timm


class ConvBackbone(nn.Module):
    """`OrientedConvNet` as tokens; the cls token is the mean of the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = OrientedConvNet()
        self.width, self.fine_width = self.net.width, self.net.fine_width
        self.norm = nn.LayerNorm(self.width, eps=1e-6)

    def forward(self, images: Tensor) -> Features:
        coarse, fine = self.net(images)
        patches = self.norm(coarse.flatten(2).transpose(1, 2))
        return Features(torch.cat((patches.mean(dim=1, keepdim=True), patches), dim=1), fine)


class ViTBackbone(nn.Module):
    """Any timm vision transformer that cuts the image itself into patches, run at the configured image size.

    The position table stays at the size it was trained at and is resized in the forward pass, with DINO's rule, so
    that a checkpoint of any size loads and is saved unchanged. Register tokens are dropped.
    """

    fine_width = None

    def __init__(self, config: LPMFlowConfig, pretrained: bool) -> None:
        super().__init__()
        timm = import_timm()
        try:
            net = timm.create_model(config.backbone, pretrained=pretrained, num_classes=0)
        except RuntimeError as error:
            if not str(error).startswith(("Unknown model", "Invalid pretrained tag")):
                raise
            raise ValueError(
                f"backbone must be {CONVNET!r} or the name of a timm vision transformer, got {config.backbone!r}"
            ) from error
        needed = all(hasattr(net, name) for name in ("set_input_size", "num_prefix_tokens", "blocks"))
        if not needed or not isinstance(getattr(net, "patch_embed", None), timm.layers.PatchEmbed):
            raise ValueError(
                f"backbone must be {CONVNET!r} or the name of a timm vision transformer, "
                f"got {config.backbone!r} ({type(net).__name__})"
            )
        native_patch = net.patch_embed.patch_size
        if tuple(native_patch) != (config.patch_size, config.patch_size) and pretrained:
            raise ValueError(
                f"patch_size must be {native_patch[0]} for pretrained weights of {config.backbone}, "
                f"got {config.patch_size}"
            )
        if tuple(native_patch) != (config.patch_size, config.patch_size):
            native_size = net.patch_embed.img_size
            scaled = tuple(
                side // patch * config.patch_size for side, patch in zip(native_size, native_patch, strict=True)
            )
            net = timm.create_model(config.backbone, num_classes=0, patch_size=config.patch_size, img_size=scaled)
        self.prefix: int = net.num_prefix_tokens
        self.has_cls: bool = getattr(net, "cls_token", None) is not None
        self.width: int = net.num_features
        native_table, native_grid = getattr(net, "pos_embed", None), tuple(net.patch_embed.grid_size)
        net.set_input_size(img_size=config.image_size)
        if isinstance(native_table, nn.Parameter) and native_table.ndim == 3:
            prefix = native_table.shape[1] - native_grid[0] * native_grid[1]
            net.pos_embed = native_table
            resize = ResizedPositions(native_grid, config.coarse_grid, prefix)
            parametrize.register_parametrization(net, "pos_embed", resize, unsafe=True)
        _use_our_layers(net, timm.layers.Mlp)
        self.net = net

    def forward(self, images: Tensor) -> Features:
        tokens = self.net.forward_features(images)
        if isinstance(self.net.norm, nn.Identity):
            tokens = self.net.fc_norm(tokens)  # a network pooled by the mean keeps its final norm behind the pooling
        patches = tokens[:, self.prefix :]
        cls = tokens[:, :1] if self.has_cls else patches.mean(dim=1, keepdim=True)
        return Features(torch.cat((cls, patches), dim=1), None)


def _use_our_layers(net: nn.Module, mlp: type[nn.Module]) -> None:
    """Linear layers become those of `ops.linear`, and where an `mlp` has a GELU behind its first, both in one."""
    for module in net.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    for module in net.modules():
        if type(module) is not mlp:
            continue
        first, activation = getattr(module, "fc1", None), getattr(module, "act", None)
        if type(first) is Linear and type(activation) is nn.GELU and activation.approximate == "none":
            first.__class__ = LinearGelu  # type: ignore[assignment]
            module.act = nn.Identity()


class ResizedPositions(nn.Module):
    """A position table (1, prefix + n, C) resized bicubically to another grid, by DINO's rule.

    DINO passes the scale factor (size + 0.1) / trained size, and that factor enters the sampling coordinates, so the
    result differs slightly from a resize to the size. The same grid gives the table itself.
    """

    def __init__(self, trained: Grid, wanted: Grid, prefix: int) -> None:
        super().__init__()
        self.trained, self.wanted, self.prefix = trained, wanted, prefix

    def forward(self, table: Tensor) -> Tensor:
        if self.trained == self.wanted:
            return table
        prefix, patches = table[:, : self.prefix], table[:, self.prefix :]
        maps = patches.transpose(1, 2).unflatten(2, self.trained)
        factors = [(wanted + 0.1) / trained for wanted, trained in zip(self.wanted, self.trained, strict=True)]
        maps = F.interpolate(maps, scale_factor=factors, mode="bicubic", align_corners=False)
        return torch.cat((prefix, maps.flatten(2).transpose(1, 2)), dim=1)

    def right_inverse(self, table: Tensor) -> Tensor:
        return table


def create_backbone(config: LPMFlowConfig, *, pretrained: bool = False) -> ConvBackbone | ViTBackbone:
    """The network `config.backbone` names; `pretrained=True` asks timm for its weights."""
    if config.backbone != CONVNET:
        return ViTBackbone(config, pretrained)
    if config.patch_size != STRIDE:
        raise ValueError(f"patch_size must be {STRIDE} for the backbone {CONVNET}, got {config.patch_size}")
    if pretrained:
        raise ValueError(f"pretrained backbone weights exist for timm backbones only, not for {CONVNET}")
    return ConvBackbone()
