"""The linear layer of inference on a CPU: oneDNN in the place of PyTorch's usual library of matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import mkldnn
from torch.nn import Parameter

from lpmflow.ops._autodiff import needs_gradient, why_no_kernel

_TYPES = (torch.float32, torch.bfloat16)
LEAST = 2**24
"""Multiply-adds from which on it is worth its call, which takes 40 us where PyTorch's takes 5."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """`torch.nn.functional.linear`, and the exact GELU of it where `gelu` is set.

    On a CPU and without gradients it is computed by oneDNN, activation included, the routine that `torch.compile` uses
    for it as well. On the layers of lpmflow-base in float32 that took 0.75 to 0.9 of the time of PyTorch's own choice,
    MKL, on an AMD processor. Everything else, and all within `torch.compile` or a trace, goes to PyTorch as it is.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs), as `torch.nn.Linear` has it.
        bias: (outputs,) or None.
    """
    if _by_onednn(x, weight, bias):
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if x.dtype in _TYPES and weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
            activation = ("gelu", "none") if gelu else ("none", "")
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation[0], [], activation[1])
            return y
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether it may be, but for the type of the tensors. The cheap questions come first."""
    if x.device.type != "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    if x.ndim < 2 or x.numel() * weight.shape[0] < LEAST:
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if x.shape[-1] != weight.shape[-1] or not all(type(tensor) in (Tensor, Parameter) for tensor in tensors):
        return False  # to PyTorch, for its message or for what a subclass makes of it
    if needs_gradient(*tensors) or why_no_kernel(*tensors) is not None:
        return False
    return bool(mkldnn.is_available()) and bool(mkldnn.enabled)
