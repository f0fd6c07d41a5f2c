"""Networks by name, in timm's manner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpmflow.config import PRESETS, preset
from lpmflow.memory import require_room
from lpmflow.model.lpmflow import LPMFlow

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return list(PRESETS)


def create_model(name: str, *, pretrained: bool = False, backbone_weights: Any = None, **overrides: Any) -> LPMFlow:
    """A new network, in training mode as PyTorch makes them.

    Args:
        name: one of `list_models()`.
        pretrained: True gives `lpmflow-tiny` its embedded weights and asks timm for the backbone weights of the
            others (a download; the rest of such a network stays random, and it answers no `match` before training).
        backbone_weights: path of a DINO / iBOT / MAE / timm checkpoint for the backbone instead.
        overrides: any field of `lpmflow.config.LPMFlowConfig`, such as `representation="isolated"`,
            `region_bias=False`, `cross_scale=False`, `windows=(8, 8, 8)`, `rptc_top_k=0`, `image_size=(256, 384)`.

    Raises ValueError for an unknown name, a field that makes no sense or an image size that takes more memory than
    there is, TypeError for an unknown field, ImportError when the backbone needs timm and timm cannot be imported,
    OSError for a file that cannot be read.
    """
    from lpmflow.model.checkpoint import load_backbone, load_checkpoint

    config = preset(name).replace(**overrides)
    shipped = embedded_weights(name)
    if pretrained and shipped is not None:
        if backbone_weights is not None:
            raise ValueError("backbone_weights cannot be combined with pretrained=True for a model that ships weights")
        return load_checkpoint(shipped, **overrides).train()
    if config.image_size != preset(name).image_size:
        require_room(config)
    model = LPMFlow(config, pretrained=pretrained and backbone_weights is None)
    if backbone_weights is not None:
        load_backbone(model, backbone_weights)
    return model


def embedded_weights(name: str) -> Path | None:
    """The weight file that ships with the package for this preset; None when it ships without."""
    path = WEIGHTS / f"{preset(name).name}.safetensors"
    return path if path.is_file() else None
