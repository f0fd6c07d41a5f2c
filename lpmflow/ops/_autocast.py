"""Computing in the dtype of the inputs, whatever autocast is on around."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from lpmflow.ops._backends import _constant


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off for this device; nothing to do for one that has no autocast (some PyTorch releases' MPS, meta)."""
    if _has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@_constant
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)
