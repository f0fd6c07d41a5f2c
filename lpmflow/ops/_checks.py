"""Argument checks shared by the ops: one sentence that starts with the op's name, says what was wanted, what came."""

from __future__ import annotations

import torch
from torch import Tensor

Grid = tuple[int, int]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_tensor(op: str, name: str, value: object, layout: str) -> Tensor:
    """`value` as a floating tensor with as many dimensions as `layout` ("B, H, N, D") has names."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor ({layout}), got {type(value).__name__}")
    if value.ndim != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} must have shape ({layout}), got {tuple(value.shape)}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, float16 or bfloat16, got {value.dtype}")
    return value


def check_like(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Same device and dtype as the op's first tensor."""
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other_name}'s device {other.device}, got {value.device}")
    if value.dtype != other.dtype:
        raise TypeError(f"{op}: {name} must have {other_name}'s dtype {other.dtype}, got {value.dtype}")


def check_shape(op: str, name: str, value: Tensor, wanted: tuple[int, ...]) -> None:
    """Exactly this shape."""
    if tuple(value.shape) != wanted:
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(value.shape)}")


def check_grid(op: str, name: str, value: object) -> Grid:
    """(height, width), both at least 1."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(s, int) and s > 0 for s in value):
        raise ValueError(f"{op}: {name} must be (height, width) of positive integers, got {value!r}")
    return value[0], value[1]


def check_count(op: str, name: str, value: object, *, at_least: int) -> int:
    """A whole number of at least that much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{op}: {name} must be an integer of at least {at_least}, got {value!r}")
    return value


def check_temperature(op: str, value: object) -> float:
    """A number above 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{op}: temperature must be a number above 0, got {value!r}")
    return float(value)
