"""Window attention of the refinement stages, on whole maps."""

from __future__ import annotations

from torch import Tensor

from lpmflow import reference
from lpmflow.ops._autocast import without_autocast
from lpmflow.ops._autodiff import needs_gradient, why_no_kernel
from lpmflow.ops._backends import choose, why_no_backward
from lpmflow.ops._checks import check_count, check_shape, check_tensor

OP = "window_attention"


def window_attention(
    qkv: Tensor, bias_table: Tensor, *, heads: int, window: int, shift: int = 0, backend: str | None = None
) -> Tensor:
    """Multi-head self-attention inside square windows with a relative position bias (paper section 3.4; Swin).

    Args:
        qkv: (B, H, W, 3C) as a linear layer leaves it: q, k, v thirds, heads inside each third.
        bias_table: ((2 window - 1)^2, heads); row (dr + window - 1)(2 window - 1) + (dc + window - 1) for the offset
            (dr, dc) = query cell - key cell.
        heads: divides C; the scale is (C / heads)^-0.5.
        window: side of a window in cells. A map that is not a multiple is padded, and the padding is never attended to.
        shift: 0 <= shift < window; moves the windows cyclically, with Swin's mask.
        backend: "reference", "native", "triton" or None to choose.

    Returns:
        (B, H, W, C) in qkv's dtype, differentiable in qkv and bias_table. Autocast does not reach inside.

    The backends other than "reference" have first derivatives only, backward-mode. Within `torch.func` (grad, vmap,
    ...) and where tensors carry a forward-mode tangent the reference is chosen, and another backend named there raises
    RuntimeError; so does the derivative of a derivative (`create_graph=True`), unless backend="reference".

    Raises TypeError or ValueError naming the argument, RuntimeError when the named backend cannot run.
    """
    check_tensor(OP, "qkv", qkv, "B, H, W, 3C")
    check_tensor(OP, "bias_table", bias_table, "(2 window - 1)^2, heads")
    check_count(OP, "heads", heads, at_least=1)
    check_count(OP, "window", window, at_least=1)
    check_count(OP, "shift", shift, at_least=0)
    if shift >= window:
        raise ValueError(f"{OP}: shift must be smaller than window {window}, got {shift}")
    if qkv.shape[-1] % (3 * heads) or not qkv.shape[-1]:
        raise ValueError(f"{OP}: qkv must have 3 x heads x width channels (heads {heads}), got {qkv.shape[-1]}")
    check_shape(OP, "bias_table", bias_table, ((2 * window - 1) ** 2, heads))
    if bias_table.device != qkv.device:
        raise ValueError(f"{OP}: bias_table must be on qkv's device {qkv.device}, got {bias_table.device}")
    width = qkv.shape[-1] // 3 // heads
    chosen = choose(OP, backend, qkv.device.type, lambda name: why_not_attention(name, qkv, bias_table, width, window))
    with without_autocast(qkv.device):
        if chosen == "triton":
            from lpmflow_kernels import window_refinement as triton

            return triton.window_attention(qkv, bias_table, heads=heads, window=window, shift=shift)
        if chosen == "native":
            from lpmflow_kernels.native import window_refinement as native

            return native.window_attention(qkv, bias_table, heads=heads, window=window, shift=shift)
        return reference.window_attention(qkv, bias_table, heads=heads, window=window, shift=shift)


def why_not_attention(backend: str, qkv: Tensor, bias_table: Tensor, width: int, window: int) -> str | None:
    """None when an installed backend can compute with tensors like these and heads of `width`, else the reason."""
    reason = why_no_kernel(qkv, bias_table)
    if reason is not None:
        return reason
    if backend == "native":
        from lpmflow_kernels.native import window_refinement as native

        reason = native.why_not(qkv, width=width, window=window)
        if reason is None and qkv.device.type == "cuda" and needs_gradient(qkv, bias_table):
            reason = why_no_backward(OP)
    elif backend == "triton":
        from lpmflow_kernels import window_refinement as triton

        reason = triton.why_not(qkv, width=width, window=window)
    return reason
