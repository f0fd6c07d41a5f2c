"""Computing in the dtype of the inputs, whatever autocast is on around."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off for this device; nothing to do for one that has no autocast (some PyTorch releases' MPS, meta)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
