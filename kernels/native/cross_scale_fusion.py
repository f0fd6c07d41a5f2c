"""`cross_scale_fusion` by the native module: the operators `lpmflow::cross_scale_fusion_native` and its backward.

The arithmetic and its contract are in csrc/cross_scale_fusion. Beside its inputs the backward keeps three small results
of the forward: the mapping, and for each cell the largest logit and its probability. The probability is also the
confidence, which has no gradient. On a CUDA device there is a forward only, and the Triton kernels, which keep the same
three, do the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lpmflow_kernels._checks import exact_type
from lpmflow_kernels._contracts import check_cross_scale_fusion, check_cross_scale_fusion_gradient
from lpmflow_kernels.native import DTYPES, check, check_cuda, dense_rows, loaded, place_of, why_not_on_device
from lpmflow_kernels.native._register import Operator, register

OP = "cross_scale_fusion"


def why_not(corr: Tensor) -> str | None:
    """None when tensors like this one can be computed here, else the reason in one sentence."""
    return why_not_on_device("corrs[0]", corr)


def cross_scale_fusion(
    corrs: Sequence[Tensor],
    source_grids: Sequence[tuple[int, int]],
    target_grids: Sequence[tuple[int, int]],
    *,
    out_grid: tuple[int, int],
    temperature: float,
    x: Tensor,
    y: Tensor,
    part: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(mapping, confidence) of checked arguments; see `lpmflow.ops.cross_scale_fusion`, `part` in the reference."""
    grids = [side for pair in zip(source_grids, target_grids, strict=True) for grid in pair for side in grid]
    out = [*out_grid, *(part or (0, 0, out_grid[0]))]
    mapping, confidence, _ = torch.ops.lpmflow.cross_scale_fusion_native(list(corrs), grids, out, temperature, x, y)
    return mapping, confidence


def _forward(
    corrs: list[Tensor], grids: list[int], out: list[int], temperature: float, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(corrs, grids, out, temperature, x, y)
    if outputs[0].numel() == 0:
        return outputs
    x, y = (table.to(outputs[0].dtype).contiguous() for table in (x, y))
    corrs = [dense_rows(corr) for corr in corrs]
    arguments = _arguments(corrs, [0] * len(corrs), grids, out, temperature, x, y, outputs)
    check(OP, loaded(OP).cross_scale_fusion_forward(*arguments))
    return outputs


def _forward_cuda(
    corrs: list[Tensor], grids: list[int], out: list[int], temperature: float, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(corrs, grids, out, temperature, x, y)
    if outputs[0].numel() == 0:
        return outputs
    # Copies live until the launch is enqueued; the allocator keeps their memory for this stream.
    x, y = (table.to(torch.float32).contiguous() for table in (x, y))
    corrs = [dense_rows(corr) for corr in corrs]
    scales, sizes, _, dtype, _, *addresses = _arguments(corrs, [0] * len(corrs), grids, out, temperature, x, y, outputs)
    status = loaded(OP).cross_scale_fusion_forward_cuda(
        scales, sizes, temperature, dtype, *place_of(corrs[0]), *addresses
    )
    check_cuda(OP, status)
    return outputs


def _outputs(
    corrs: list[Tensor], grids: list[int], out: list[int], temperature: float, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_cross_scale_fusion(corrs, grids, out, x, y)
    exact = exact_type(corrs[0].dtype)
    cells = (corrs[0].shape[0], len(corrs), out[4], out[1])
    mapping = corrs[0].new_empty((*cells[:2], 2, *cells[2:]), dtype=exact)
    return mapping, corrs[0].new_empty(cells, dtype=exact), corrs[0].new_empty(cells, dtype=exact)


def _backward(
    grad_mapping: Tensor,
    corrs: list[Tensor],
    grids: list[int],
    out: list[int],
    temperature: float,
    x: Tensor,
    y: Tensor,
    mapping: Tensor,
    confidence: Tensor,
    largest: Tensor,
    tables: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradients of corrs, x and y; without `tables` those of x and y are not computed, and empty."""
    check_cross_scale_fusion(corrs, grids, out, x, y)
    check_cross_scale_fusion_gradient(grad_mapping, corrs, out, mapping, confidence, largest)
    exact = mapping.dtype
    grad_x, grad_y = (table.new_zeros(table.shape if tables else 0, dtype=exact) for table in (x, y))
    if mapping.numel() == 0:
        return [corr.new_zeros(corr.shape) for corr in corrs], grad_x.to(x.dtype), grad_y.to(y.dtype)
    # Summed in full precision whatever the inputs are; where the source side is not interpolated, written once.
    grads = [
        corr.new_empty(corr.shape, dtype=exact)
        if grids[4 * s : 4 * s + 2] == out[:2]
        else corr.new_zeros(corr.shape, dtype=exact)
        for s, corr in enumerate(corrs)
    ]
    exact_x, exact_y = (table.to(exact).contiguous() for table in (x, y))
    grad_mapping = grad_mapping.contiguous()
    dense = [dense_rows(corr) for corr in corrs]
    saved = (mapping.contiguous(), confidence.contiguous(), largest.contiguous())
    addresses = [grad.data_ptr() for grad in grads]
    arguments = _arguments(dense, addresses, grids, out, temperature, exact_x, exact_y, saved)
    to_tables = (grad_x.data_ptr(), grad_y.data_ptr()) if tables else (0, 0)
    status = loaded(OP).cross_scale_fusion_backward(*arguments, grad_mapping.data_ptr(), *to_tables)
    check(OP, status)
    return (
        [grad.to(corr.dtype) for grad, corr in zip(grads, corrs, strict=True)],
        grad_x.to(x.dtype),
        grad_y.to(y.dtype),
    )


def _grads(
    grad_mapping: Tensor,
    corrs: list[Tensor],
    grids: list[int],
    out: list[int],
    temperature: float,
    x: Tensor,
    y: Tensor,
    mapping: Tensor,
    confidence: Tensor,
    largest: Tensor,
    tables: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    check_cross_scale_fusion(corrs, grids, out, x, y)
    check_cross_scale_fusion_gradient(grad_mapping, corrs, out, mapping, confidence, largest)
    grad_x, grad_y = (table.new_empty(table.shape if tables else 0) for table in (x, y))
    return [corr.new_empty(corr.shape) for corr in corrs], grad_x, grad_y


def _arguments(
    corrs: list[Tensor],
    grads: list[int],
    grids: list[int],
    out: list[int],
    temperature: float,
    x: Tensor,
    y: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> tuple[Any, ...]:
    """What both native functions take first; `grads` are addresses."""
    scales = []
    for s, corr in enumerate(corrs):
        sides = grids[4 * s : 4 * s + 4]
        lines = corr.shape[1] // sides[1]
        scales.append((corr.data_ptr(), *corr.stride()[:2], *sides, out[2] if lines < sides[0] else 0, lines, grads[s]))
    h, w, _, first_row, rows = out
    sizes = (corrs[0].shape[0], h, w, first_row, rows)
    tables = (x.data_ptr(), y.data_ptr())
    addresses = (output.data_ptr() for output in outputs)
    return scales, sizes, temperature, DTYPES[corrs[0].dtype], torch.get_num_threads(), *tables, *addresses


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    corrs, ctx.grids, ctx.out, ctx.temperature, x, y = inputs
    ctx.tables = x.requires_grad or y.requires_grad
    ctx.save_for_backward(*corrs, x, y, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_mapping: Tensor | None, *_: None) -> tuple[Any, ...]:
    *corrs, x, y, mapping, confidence, largest = ctx.saved_tensors
    if grad_mapping is None:
        return [None] * len(corrs), None, None, None, None, None
    kept = (ctx.temperature, x, y, mapping, confidence, largest, ctx.tables)
    if grad_mapping.device.type == "cuda":
        backward = torch.ops.lpmflow.cross_scale_fusion_triton_backward
    else:
        backward = torch.ops.lpmflow.cross_scale_fusion_native_backward
    grads, grad_x, grad_y = backward(grad_mapping, corrs, ctx.grids, ctx.out, *kept)
    return grads, None, None, None, *((grad_x, grad_y) if ctx.tables else (None, None))


# out: h, w, then the first coarse line that corrs has, the first output line, and how many of these there are.
_ARGUMENTS = "Tensor[] corrs, SymInt[] grids, SymInt[] out, float temperature, Tensor x, Tensor y"
register(
    OP,
    Operator(f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", {"CPU": _forward, "CUDA": _forward_cuda}, _outputs),
    Operator(
        f"(Tensor grad_mapping, {_ARGUMENTS}, Tensor mapping, Tensor confidence, Tensor largest, bool tables) "
        f"-> (Tensor[], Tensor, Tensor)",
        {"CPU": _backward},
        _grads,
    ),
    save=_save,
    differentiate=_differentiate,
)
