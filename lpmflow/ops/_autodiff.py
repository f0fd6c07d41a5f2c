"""What the choice of a backend must know about derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

NO_TANGENT = "it has no forward-mode derivative, which the reference has"


def has_tangent(*tensors: Tensor) -> bool:
    """Whether a tensor carries a forward-mode derivative (torch.func.jvp, dual tensors), which kernels would drop."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
