"""LPMFlow: dense semantic correspondence between two photographs (CVPR 2024).

    match = lpmflow.match("cat.jpg", "dog.jpg")
    match.transfer([(120, 80)])

The public names are loaded when they are first used, so that `import lpmflow` is quick and needs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpmflow import ops
    from lpmflow.matcher import Matcher, match
    from lpmflow.model import create_model, list_models, load_checkpoint, released_parameter_shapes, save_checkpoint
    from lpmflow.result import Match

__version__ = "0.1.0"

_HOMES = {
    "Match": "lpmflow.result",
    "Matcher": "lpmflow.matcher",
    "create_model": "lpmflow.model",
    "list_models": "lpmflow.model",
    "load_checkpoint": "lpmflow.model",
    "match": "lpmflow.matcher",
    "ops": "lpmflow",
    "released_parameter_shapes": "lpmflow.model",
    "save_checkpoint": "lpmflow.model",
}

__all__ = [
    "Match",
    "Matcher",
    "__version__",
    "create_model",
    "list_models",
    "load_checkpoint",
    "match",
    "ops",
    "released_parameter_shapes",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lpmflow' has no attribute {name!r}")
    home = _HOMES[name]
    value = (
        importlib.import_module("lpmflow.ops") if home == "lpmflow" else getattr(importlib.import_module(home), name)
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
