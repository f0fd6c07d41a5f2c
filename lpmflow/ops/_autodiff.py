"""What the choice of a backend must know about derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(*tensors: Tensor) -> bool:
    """Whether a tensor carries a forward-mode derivative (torch.func.jvp, dual tensors), which kernels would drop."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp, ...) is at work around here; kernels are no part of what it transforms."""
    return torch._C._are_functorch_transforms_active()


def why_no_kernel(*tensors: Tensor) -> str | None:
    """Why derivatives of tensors like these, taken the way they are here, go through the reference only; else None."""
    if has_tangent(*tensors):
        return "it has no forward-mode derivative, which the reference has"
    if transformed():
        return "it cannot be transformed by torch.func (grad, vmap, ...), which the reference can"
    return None


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
