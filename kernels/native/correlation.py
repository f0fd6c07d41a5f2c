"""`correlation` by the native module: the operators `lpmflow::correlation_native` and its backward.

The arithmetic and its contract are in csrc/correlation. On the CPU the backward computes the probabilities anew, so
nothing but the inputs is kept for it. On a CUDA device there is a forward only; its third output, the log-sum-exp of
each row, lets the Triton kernels do the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpmflow_kernels._checks import exact_type
from lpmflow_kernels._contracts import check_correlation, check_correlation_gradients
from lpmflow_kernels.native import DTYPES, check, check_cuda, dense_rows, loaded, place_of, why_not_on_device
from lpmflow_kernels.native._register import Operator, register

OP = "correlation"
MAX_WIDTH = 256


def why_not(q: Tensor) -> str | None:
    """None when tensors like `q` can be computed here, else the reason in one sentence."""
    reason = why_not_on_device("q", q)
    if reason is None and q.shape[-1] > MAX_WIDTH:
        reason = f"it takes head widths D up to {MAX_WIDTH}, got {q.shape[-1]}"
    return reason


def correlation(q: Tensor, k: Tensor, v: Tensor, *, scale: float, prefix: int) -> tuple[Tensor, Tensor]:
    """(attended, corr) of checked arguments; see `lpmflow.ops.correlation`."""
    attended, corr, _ = torch.ops.lpmflow.correlation_native(q, k, v, scale, prefix)
    return attended, corr


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    attended, corr, lse = _outputs(q, k, v, scale, prefix)
    if attended.numel() == 0:
        return attended, corr.zero_(), lse
    q, k, v = (dense_rows(x) for x in (q, k, v))
    status = loaded(OP).correlation_forward(
        *_shape(q, k, scale, prefix), *_rows(q), *_rows(k), *_rows(v), attended.data_ptr(), corr.data_ptr()
    )
    check(OP, status)
    return attended, corr, lse


def _forward_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    attended, corr, lse = _outputs(q, k, v, scale, prefix)
    if attended.numel() == 0:
        return attended, corr.zero_(), lse
    # Copies live until the launch is enqueued; the allocator keeps their memory for this stream.
    q, k, v = (dense_rows(x) for x in (q, k, v))
    status = loaded(OP).correlation_forward_cuda(
        *_shape(q, k, scale, prefix)[:-1],
        *place_of(q),
        *_rows(q),
        *_rows(k),
        *_rows(v),
        attended.data_ptr(),
        corr.data_ptr(),
        lse.data_ptr(),
    )
    check_cuda(OP, status)
    return attended, corr, lse


def _outputs(q: Tensor, k: Tensor, v: Tensor, scale: float, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    check_correlation(q, k, v, prefix)
    corr = q.new_empty((q.shape[0], q.shape[2] - prefix, k.shape[2] - prefix), dtype=exact_type(q.dtype))
    lse = q.new_empty((0,) if q.device.type == "cpu" else q.shape[:3], dtype=torch.float32)
    return q.new_empty(q.shape), corr, lse


def _backward(
    grad_attended: Tensor | None, grad_corr: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _grads(grad_attended, grad_corr, q, k, v, scale, prefix)
    if 0 in q.shape or (grad_attended is None and grad_corr is None):
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_()
    q, k, v = (dense_rows(x) for x in (q, k, v))
    # Held here until the call is over: what is not dense is copied.
    attended = None if grad_attended is None else dense_rows(grad_attended)
    corr = None if grad_corr is None else dense_rows(grad_corr)
    status = loaded(OP).correlation_backward(
        *_shape(q, k, scale, prefix),
        *_rows(q),
        *_rows(k),
        *_rows(v),
        *((0, (0, 0, 0)) if attended is None else _rows(attended)),
        *((0, (0, 0)) if corr is None else (corr.data_ptr(), corr.stride()[:2])),
        *(grad.data_ptr() for grad in grads),
    )
    check(OP, status)
    return grads


def _grads(
    grad_attended: Tensor | None, grad_corr: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_correlation(q, k, v, prefix)
    check_correlation_gradients(grad_attended, grad_corr, q, k, prefix)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _shape(q: Tensor, k: Tensor, scale: float, prefix: int) -> tuple[Any, ...]:
    sizes = (*q.shape[:3], k.shape[2], q.shape[3])
    return sizes, prefix, scale, DTYPES[q.dtype], torch.get_num_threads()


def _rows(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()[:3]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.prefix = inputs
    attended, _, lse = output
    ctx.save_for_backward(q, k, v, *((attended, lse) if q.device.type == "cuda" else ()))
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_attended: Tensor | None, grad_corr: Tensor | None, _: None) -> tuple[Any, ...]:
    q, k, v, *kept = ctx.saved_tensors
    if kept:
        attended, lse = kept
        backward = torch.ops.lpmflow.correlation_triton_backward
        stats = _row_stats(lse, ctx.scale)
        grads = backward(grad_attended, grad_corr, q, k, v, attended, stats, ctx.scale, ctx.prefix)
    else:
        backward = torch.ops.lpmflow.correlation_native_backward
        grads = backward(grad_attended, grad_corr, q, k, v, ctx.scale, ctx.prefix)
    return (*grads, None, None)


def _row_stats(lse: Tensor, scale: float) -> Tensor:
    """What the Triton backward keeps of a row, (2, B, H, N): P = exp(|scale| (product - first)) second."""
    if scale == 0:
        return torch.stack((torch.zeros_like(lse), torch.exp(-lse)))
    return torch.stack((lse / abs(scale), torch.ones_like(lse)))


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, float scale, SymInt prefix"
register(
    OP,
    Operator(f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", {"CPU": _forward, "CUDA": _forward_cuda}, _outputs),
    Operator(
        f"(Tensor? grad_attended, Tensor? grad_corr, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
        {"CPU": _backward},
        _grads,
    ),
    save=_save,
    differentiate=_differentiate,
)
