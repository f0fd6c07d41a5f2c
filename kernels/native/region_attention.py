"""`region_attention` by the native module: the operators `lpmflow::region_attention_native` and its backward.

The arithmetic and its contract are in csrc/region_attention. On the CPU the backward computes the probabilities anew,
so nothing but the inputs is kept for it. On a CUDA device there is a forward only, whose second output is the largest
logit and the inverse sum of each row, with which the Triton kernels do the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpmflow_kernels._checks import check_tensor, exact_type
from lpmflow_kernels._contracts import check_region_attention
from lpmflow_kernels.native import DTYPES, check, check_cuda, dense_rows, loaded, place_of, why_not_on_device
from lpmflow_kernels.native._register import Operator, register

OP = "region_attention"
MAX_WIDTH = 128  # on CUDA devices
Grid = tuple[int, int]


def why_not(q: Tensor) -> str | None:
    """None when tensors like `q` can be computed here, else the reason in one sentence."""
    reason = why_not_on_device("q", q)
    if reason is None and q.device.type == "cuda" and q.shape[-1] > MAX_WIDTH:
        reason = f"it takes head widths D up to {MAX_WIDTH} on CUDA devices, got {q.shape[-1]}"
    return reason


def region_attention(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, *, source_grid: Grid, target_grid: Grid, prefix: int
) -> Tensor:
    """`lpmflow.ops.region_attention` of checked arguments."""
    attended, _ = torch.ops.lpmflow.region_attention_native(q, k, v, bias_table, [*source_grid, *target_grid], prefix)
    return attended


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, grids: list[int], prefix: int
) -> tuple[Tensor, Tensor]:
    attended, statistics = _outputs(q, k, v, bias_table, grids, prefix)
    if attended.numel() == 0:
        return attended, statistics
    q, k, v = (dense_rows(x) for x in (q, k, v))
    table = _exact(bias_table, q)
    status = loaded(OP).region_attention_forward(
        *_shape(q, grids, prefix), *_rows(q), *_rows(k), *_rows(v), table.data_ptr(), attended.data_ptr()
    )
    check(OP, status)
    return attended, statistics


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, grids: list[int], prefix: int
) -> tuple[Tensor, Tensor]:
    attended, statistics = _outputs(q, k, v, bias_table, grids, prefix)
    if attended.numel() == 0:
        return attended, statistics
    # Copies live until the launch is enqueued; the allocator keeps their memory for this stream.
    q, k, v = (dense_rows(x) for x in (q, k, v))
    table = _exact(bias_table, q)
    status = loaded(OP).region_attention_forward_cuda(
        *_shape(q, grids, prefix)[:-1],
        *place_of(q),
        *_rows(q),
        *_rows(k),
        *_rows(v),
        table.data_ptr(),
        attended.data_ptr(),
        statistics.data_ptr(),
    )
    check_cuda(OP, status)
    return attended, statistics


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, grids: list[int], prefix: int
) -> tuple[Tensor, Tensor]:
    """(B, H, N, D) with the heads inside the tokens, so that joining them copies nothing; and statistics for CUDA."""
    check_region_attention(q, k, v, bias_table, grids, prefix)
    batch, heads, tokens, width = q.shape
    statistics = (2, batch, heads, tokens) if q.device.type == "cuda" else (0,)
    attended = q.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    return attended, q.new_empty(statistics, dtype=torch.float32)


def _backward(
    grad_attended: Tensor, q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, grids: list[int], prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _grads(grad_attended, q, k, v, bias_table, grids, prefix)
    if q.numel() == 0:
        return *grads[:3], grads[3].zero_()
    # Held here until the call is over: what is not dense is copied.
    grad, q, k, v = (dense_rows(x) for x in (grad_attended, q, k, v))
    table = _exact(bias_table, q)
    grad_table = table.new_empty(table.shape)
    status = loaded(OP).region_attention_backward(
        *_shape(q, grids, prefix),
        *_rows(q),
        *_rows(k),
        *_rows(v),
        table.data_ptr(),
        *_rows(grad),
        *(x.data_ptr() for x in (*grads[:3], grad_table)),
    )
    check(OP, status)
    return *grads[:3], grad_table.to(bias_table.dtype)


def _grads(
    grad_attended: Tensor, q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, grids: list[int], prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_region_attention(q, k, v, bias_table, grids, prefix)
    check_tensor(OP, "grad_attended", grad_attended, tuple(q.shape), q, q.dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias_table.new_empty(bias_table.shape)


def _exact(bias_table: Tensor, q: Tensor) -> Tensor:
    """The table in the type sums are formed in, dense."""
    return bias_table.to(exact_type(q.dtype)).contiguous()


def _shape(q: Tensor, grids: list[int], prefix: int) -> tuple[Any, ...]:
    batch, heads, _, width = q.shape
    return (batch, heads, width, prefix, *grids), width**-0.5, DTYPES[q.dtype], torch.get_num_threads()


def _rows(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()[:3]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias_table, ctx.grids, ctx.prefix = inputs
    ctx.table = bias_table.requires_grad
    ctx.save_for_backward(q, k, v, bias_table, *(output if q.device.type == "cuda" else ()))
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_attended: Tensor, _: None) -> tuple[Any, ...]:
    inputs, kept = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    if kept:
        backward = torch.ops.lpmflow.region_attention_triton_backward
        grads = backward(grad_attended, *inputs, ctx.grids, ctx.prefix, *kept, ctx.table)
    else:
        backward = torch.ops.lpmflow.region_attention_native_backward
        grads = backward(grad_attended, *inputs, ctx.grids, ctx.prefix)
    return (*grads, None, None)


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor bias_table, SymInt[] grids, SymInt prefix"
register(
    OP,
    Operator(f"({_ARGUMENTS}) -> (Tensor, Tensor)", {"CPU": _forward, "CUDA": _forward_cuda}, _outputs),
    Operator(f"(Tensor grad_attended, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", {"CPU": _backward}, _grads),
    save=_save,
    differentiate=_differentiate,
)
