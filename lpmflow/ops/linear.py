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
"""Multiply-adds from which on it is worth its call, which takes some 35 us more than PyTorch's."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """`torch.nn.functional.linear`, and the exact GELU of it where `gelu` is set.

    On a CPU and without gradients it is computed by oneDNN, activation included, the routine that `torch.compile` uses
    for it as well. On the layers of lpmflow-base in float32 that was 1.02 to 1.15 times as fast as PyTorch's own way,
    MKL, on an AMD processor (`pytest benchmarks/bench_linear.py`). Everything else, and all within `torch.compile` or a
    trace, goes to PyTorch as it is.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs), as `torch.nn.Linear` has it.
        bias: (outputs,) or None.
    """
    dtype = _by_onednn(x, weight, bias)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        activation = ("gelu", "none") if gelu else ("none", "")
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation[0], [], activation[1])
        return y
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """The type to compute in by oneDNN, None where PyTorch is to do it. The cheap questions come first."""
    if x.device.type != "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return None
    if x.ndim < 2 or x.numel() * weight.shape[0] < LEAST:
        return None
    tensors = (x, weight) if bias is None else (x, weight, bias)
    # To PyTorch, for its message or for what it makes of them: other shapes, layouts and subclasses. The routine takes
    # a bias for dense without looking.
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1] or not all(_plain(tensor) for tensor in tensors):
        return None
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        return None
    if needs_gradient(*tensors) or why_no_kernel(*tensors) is not None or torch._C._len_torch_dispatch_stack():
        return None  # the last: modes that count or record operations are to see PyTorch's own
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if any(tensor.dtype not in (dtype, torch.float32) for tensor in tensors):
            return None
    else:
        dtype = x.dtype
        if any(tensor.dtype != dtype for tensor in tensors):
            return None
    return dtype if dtype in _TYPES and _available(dtype) else None


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"


def _available(dtype: torch.dtype) -> bool:
    """Whether oneDNN is here and this processor computes in `dtype`."""
    if not (mkldnn.is_available() and mkldnn.enabled):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
