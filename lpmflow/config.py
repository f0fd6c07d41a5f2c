"""The numbers of a network, once: one frozen dataclass and the presets as functions.

Every variant the paper ablates is a field, so a variant is `create_model("lpmflow-base", region_bias=False)` and
nothing else. Grids and image sizes are (height, width).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

REPRESENTATIONS = ("joint", "isolated", "bidirectional")
CONVNET = "oriented-convnet"
"""Backbone name of the small convolutional network of `lpmflow.model.convnet`; any other name is timm's."""


@dataclass(frozen=True)
class LPMFlowConfig:
    """Everything that decides the shape and the arithmetic of one LPMFlow network.

    `image_size` (height, width) is what the backbone sees; whatever is passed to the model is resized to it.
    `input_size` is what a photograph is squashed to before that (the released network: 512, then 256).
    Both accept one number for a square. Raises ValueError or TypeError naming the field when one makes no sense.
    """

    name: str
    backbone: str
    patch_size: int = 16
    image_size: tuple[int, int] = (256, 256)
    input_size: tuple[int, int] = (512, 512)
    heads: int = 8
    mlp_ratio: float = 4.0
    dropout: float = 0.1

    # LARL, the joint encoder (paper section 3.2)
    layout_depth: int = 6
    representation: str = "joint"
    region_bias: bool = True

    # RPTC, its training task; top_k = 0 means no RPTC
    rptc_top_k: int = 64
    rptc_ratio: float = 0.25
    rptc_temperature: float = 0.1
    rptc_weight: float = 0.2
    rptc_decline: float = 0.1

    # PFSR, feature super-resolution and the correlation tensors (paper section 3.3)
    superres_depth: int = 2
    superres_window: int = 4
    fine_features: bool = False
    cross_scale: bool = True

    # MMFI, flow fusion and refinement (paper section 3.4)
    temperature: float = 0.02
    windows: tuple[int, ...] = (16, 8, 4)
    refine_width: int = 96
    refine_heads: int = 8
    refine_dropout: float = 0.5

    def __post_init__(self) -> None:
        for field in ("image_size", "input_size"):
            object.__setattr__(self, field, _size(field, getattr(self, field)))
        object.__setattr__(self, "windows", _windows(self.windows))
        for field in ("name", "backbone"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise ValueError(f"{field} must be a non-empty str, got {getattr(self, field)!r}")
        for field in ("region_bias", "fine_features", "cross_scale"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be True or False, got {getattr(self, field)!r}")
        if self.representation not in REPRESENTATIONS:
            raise ValueError(f"representation must be one of {', '.join(REPRESENTATIONS)}, got {self.representation!r}")
        for field in ("patch_size", "heads", "layout_depth", "superres_depth", "superres_window", "refine_heads"):
            _whole(field, getattr(self, field), at_least=1)
        for field in ("rptc_top_k", "refine_width"):
            _whole(field, getattr(self, field), at_least=0)
        for field in ("dropout", "refine_dropout", "rptc_ratio", "rptc_decline"):
            _number(field, getattr(self, field), low=0.0, high=1.0)
        for field in ("mlp_ratio", "temperature", "rptc_temperature"):
            _number(field, getattr(self, field), low=0.0, high=math.inf, open_low=True)
        _number("rptc_weight", self.rptc_weight, low=0.0, high=math.inf)
        for side in self.image_size:
            if side % self.patch_size:
                raise ValueError(
                    f"image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size}"
                )
        if self.refine_width % self.refine_heads or self.context_width < 1:
            raise ValueError(
                f"refine_width must be a multiple of refine_heads ({self.refine_heads}) and more than the "
                f"{2 * len(self.scales)} flow channels, got {self.refine_width}"
            )

    @property
    def coarse_grid(self) -> tuple[int, int]:
        """(h, w) of the backbone's patch tokens; 16x16 in the base network."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def fine_grid(self) -> tuple[int, int]:
        """(h, w) after super-resolution, twice the coarse grid; 32x32 in the base network."""
        return 2 * self.coarse_grid[0], 2 * self.coarse_grid[1]

    @property
    def flow_grid(self) -> tuple[int, int]:
        """(h, w) of the flow, four times the fine grid; 128x128 in the base network."""
        return 4 * self.fine_grid[0], 4 * self.fine_grid[1]

    @property
    def scales(self) -> tuple[str, ...]:
        """Names of the correlation tensors, source scale then target scale: 1 is coarse, 2 is fine."""
        return ("11", "12", "21", "22") if self.cross_scale else ("11", "22")

    @property
    def context_width(self) -> int:
        """Feature channels beside the flows in the refinement's input; 88 in the base network."""
        return self.refine_width - 2 * len(self.scales)

    def replace(self, **overrides: Any) -> LPMFlowConfig:
        """A copy with the named fields changed; TypeError lists the fields when a name is unknown.

        An `image_size` alone takes `input_size` along in proportion, so that more of a photograph reaches the network.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in known:
                raise TypeError(f"unknown model option {name!r}; the options are {', '.join(known)}")
        if "image_size" in overrides and "input_size" not in overrides:
            wanted = _size("image_size", overrides["image_size"])
            sides = zip(self.input_size, self.image_size, wanted, strict=True)
            overrides["input_size"] = tuple(max(given * new // old, 1) for given, old, new in sides)
        return dataclasses.replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in a checkpoint's metadata."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LPMFlowConfig:
        """The inverse of `to_dict`, also after a trip through JSON; TypeError names an unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise TypeError(f"unknown fields in the stored configuration: {', '.join(unknown)}")
        return cls(**values)


def lpmflow_base() -> LPMFlowConfig:
    """The paper's network: ViT-B/16, width 768, 179 M parameters."""
    return LPMFlowConfig(name="lpmflow-base", backbone="vit_base_patch16_224.dino")


def lpmflow_small() -> LPMFlowConfig:
    """The same structure on ViT-S/16: width 384, 8 heads of 48."""
    return LPMFlowConfig(name="lpmflow-small", backbone="vit_small_patch16_224.dino")


def lpmflow_tiny() -> LPMFlowConfig:
    """A network small enough to train on a CPU and to ship: convolutional backbone, width 192, 6 heads of 32.

    A convolutional backbone learns from few photographs because locality and translation are built in; its stride-8
    features also reach the fine grid, which interpolated tokens cannot give. Two correlation tensors instead of four
    halve the cost of a training step (paper ablation: 0.9 points of PCK on the base network).
    """
    return LPMFlowConfig(
        name="lpmflow-tiny",
        backbone=CONVNET,
        image_size=(192, 192),
        input_size=(192, 192),
        heads=6,
        mlp_ratio=2.0,
        dropout=0.0,
        layout_depth=3,
        rptc_top_k=0,
        superres_depth=1,
        fine_features=True,
        cross_scale=False,
        windows=(12, 8, 4),
        refine_width=48,
        refine_heads=3,
        refine_dropout=0.1,
    )


PRESETS: dict[str, Callable[[], LPMFlowConfig]] = {
    "lpmflow-base": lpmflow_base,
    "lpmflow-small": lpmflow_small,
    "lpmflow-tiny": lpmflow_tiny,
}


def preset(name: str) -> LPMFlowConfig:
    """The configuration of that name; ValueError lists the names when there is none."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(PRESETS)}")
    return PRESETS[name]()


def _size(field: str, value: Any) -> tuple[int, int]:
    sides = (value, value) if _is_whole(value) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(sides) != 2 or not all(_is_whole(side) and side >= 1 for side in sides):
        raise ValueError(f"{field} must be a positive integer or (height, width), got {value!r}")
    return sides


def _windows(value: Any) -> tuple[int, ...]:
    windows = tuple(value) if isinstance(value, (tuple, list)) else ()
    if not windows or not all(_is_whole(window) and window >= 1 for window in windows):
        raise ValueError(f"windows must be a sequence of positive integers such as (16, 8, 4), got {value!r}")
    return windows


def _whole(field: str, value: Any, *, at_least: int) -> None:
    if not _is_whole(value) or value < at_least:
        raise ValueError(f"{field} must be an integer of at least {at_least}, got {value!r}")


def _number(field: str, value: Any, *, low: float, high: float, open_low: bool = False) -> None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not (low < value if open_low else low <= value) or value > high or value == math.inf:
        bounds = f"from {low:g} to {high:g}" if high < math.inf else f"{'above' if open_low else 'of at least'} {low:g}"
        raise ValueError(f"{field} must be a finite number {bounds}, got {value!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
