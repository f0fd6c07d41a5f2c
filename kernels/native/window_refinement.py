"""`window_attention` by the native module: the operators `lpmflow::window_attention_native` and its backward.

The arithmetic and its contract are in csrc/window_refinement. The backward computes the probabilities anew, so nothing
but the inputs is kept for it. On a CUDA device there is a forward only, and the Triton kernels do the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpmflow_kernels._checks import exact_type
from lpmflow_kernels._contracts import check_window_attention, check_window_attention_gradient
from lpmflow_kernels.native import DTYPES, check, check_cuda, dense_rows, loaded, place_of, why_not_on_device
from lpmflow_kernels.native._register import Operator, register

OP = "window_attention"
MAX_WIDTH = 128  # on CUDA devices, and so is
MAX_WINDOW = 32


def why_not(qkv: Tensor, *, width: int, window: int) -> str | None:
    """None when tensors like this one, heads of `width` and such windows can be computed here, else the reason."""
    reason = why_not_on_device("qkv", qkv)
    if reason is not None or qkv.device.type == "cpu":
        return reason
    if width > MAX_WIDTH:
        return f"it takes head widths up to {MAX_WIDTH} on CUDA devices, got {width}"
    if window > MAX_WINDOW:
        return f"it takes windows of up to {MAX_WINDOW} x {MAX_WINDOW} cells on CUDA devices, got {window} x {window}"
    return None


def window_attention(qkv: Tensor, bias_table: Tensor, *, heads: int, window: int, shift: int) -> Tensor:
    """(B, H, W, C) of checked arguments; see `lpmflow.ops.window_attention`."""
    table = bias_table.to(exact_type(qkv.dtype))
    return torch.ops.lpmflow.window_attention_native(qkv, table, heads, window, shift)


def _forward(qkv: Tensor, bias_table: Tensor, heads: int, window: int, shift: int) -> Tensor:
    out = _output(qkv, bias_table, heads, window, shift)
    if out.numel() == 0:
        return out
    qkv, bias_table = dense_rows(qkv), bias_table.contiguous()
    status = loaded(OP).window_refinement_forward(
        *_shape(qkv, heads, window, shift), *_cells(qkv), bias_table.data_ptr(), out.data_ptr()
    )
    check(OP, status)
    return out


def _forward_cuda(qkv: Tensor, bias_table: Tensor, heads: int, window: int, shift: int) -> Tensor:
    out = _output(qkv, bias_table, heads, window, shift)
    if out.numel() == 0:
        return out
    # Copies live until the launch is enqueued; the allocator keeps their memory for this stream.
    qkv, bias_table = dense_rows(qkv), bias_table.contiguous()
    status = loaded(OP).window_refinement_forward_cuda(
        *_shape(qkv, heads, window, shift)[:-1],
        *place_of(qkv),
        *_cells(qkv),
        bias_table.data_ptr(),
        out.data_ptr(),
    )
    check_cuda(OP, status)
    return out


def _output(qkv: Tensor, bias_table: Tensor, heads: int, window: int, shift: int) -> Tensor:
    check_window_attention(qkv, bias_table, heads, window, shift)
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


def _backward(
    grad: Tensor, qkv: Tensor, bias_table: Tensor, heads: int, window: int, shift: int
) -> tuple[Tensor, Tensor]:
    grad_qkv, grad_table = _grads(grad, qkv, bias_table, heads, window, shift)
    if grad_qkv.numel() == 0:
        return grad_qkv, grad_table.zero_()
    qkv, bias_table, grad = dense_rows(qkv), bias_table.contiguous(), dense_rows(grad)
    status = loaded(OP).window_refinement_backward(
        *_shape(qkv, heads, window, shift),
        *_cells(qkv),
        *_cells(grad),
        bias_table.data_ptr(),
        grad_qkv.data_ptr(),
        grad_table.data_ptr(),
    )
    check(OP, status)
    return grad_qkv, grad_table


def _grads(grad: Tensor, qkv: Tensor, bias_table: Tensor, heads: int, window: int, shift: int) -> tuple[Tensor, Tensor]:
    check_window_attention(qkv, bias_table, heads, window, shift)
    check_window_attention_gradient(grad, qkv)
    return qkv.new_empty(qkv.shape), bias_table.new_empty(bias_table.shape)


def _shape(qkv: Tensor, heads: int, window: int, shift: int) -> tuple[Any, ...]:
    width = qkv.shape[3] // 3 // heads
    sizes = (*qkv.shape[:3], heads, width, window, shift)
    return sizes, width**-0.5, DTYPES[qkv.dtype], torch.get_num_threads()


def _cells(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()[:3]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, bias_table, *ctx.sizes = inputs
    ctx.table = bias_table.requires_grad
    ctx.save_for_backward(qkv, bias_table)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if grad.device.type == "cuda":
        backward = torch.ops.lpmflow.window_attention_triton_backward
        grads = backward(grad, *ctx.saved_tensors, *ctx.sizes, ctx.table)
    else:
        grads = torch.ops.lpmflow.window_attention_native_backward(grad, *ctx.saved_tensors, *ctx.sizes)
    return (*grads, None, None, None)


_ARGUMENTS = "Tensor qkv, Tensor bias_table, SymInt heads, SymInt window, SymInt shift"
register(
    OP,
    Operator(f"({_ARGUMENTS}) -> Tensor", {"CPU": _forward, "CUDA": _forward_cuda}, _output),
    Operator(f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)", {"CPU": _backward}, _grads),
    save=_save,
    differentiate=_differentiate,
)
