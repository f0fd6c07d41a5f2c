"""Joint attention of both images' tokens with the region-based 2D relative position bias of LARL."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lpmflow import reference
from lpmflow.ops._autocast import without_autocast
from lpmflow.ops._autodiff import needs_gradient, why_no_kernel
from lpmflow.ops._backends import choose, why_no_backward
from lpmflow.ops._checks import check_count, check_grid, check_like, check_shape, check_tensor

OP = "region_attention"
Grid = tuple[int, int]


def region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor,
    *,
    source_grid: Grid,
    target_grid: Grid,
    prefix: int = 1,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over [prefix, source patches, prefix, target patches] (paper section 3.2).

    Args:
        q, k, v: (B, H, N, D), N = 2 prefix + source cells + target cells; float32, float64, float16 or bfloat16.
        bias_table: (H, (2 hm - 1)(2 wm - 1) 4), hm and wm the larger grid sides; for query patch (r, c) of image a and
            key patch (r', c') of image b (0 source, 1 target) the column is
            ((r - r' + hm - 1)(2 wm - 1) + (c - c' + wm - 1)) 4 + 2 a + b. Prefix tokens get no bias.
        source_grid, target_grid: (height, width) of the patches.
        prefix: leading tokens of each image that are no patches (the cls token: 1).
        backend: "reference", "native", "triton" or None to choose.

    Returns:
        (B, H, N, D) in q's dtype, differentiable in q, k, v and bias_table. Autocast does not reach inside.

    The backends other than "reference" never hold an N x N matrix, and have first derivatives only, backward-mode, with
    the same choices and refusals in `torch.func` and for other derivatives as in `correlation`.

    Raises TypeError or ValueError naming the argument, RuntimeError when the named backend cannot run.
    """
    source = check_grid(OP, "source_grid", source_grid)
    target = check_grid(OP, "target_grid", target_grid)
    check_count(OP, "prefix", prefix, at_least=0)
    check_tensor(OP, "q", q, "B, H, N, D")
    tokens = 2 * prefix + source[0] * source[1] + target[0] * target[1]
    check_shape(OP, "q", q, (*q.shape[:2], tokens, q.shape[3]))
    for name, value in (("k", k), ("v", v)):
        check_tensor(OP, name, value, "B, H, N, D")
        check_like(OP, name, value, "q", q)
        check_shape(OP, name, value, tuple(q.shape))
    check_tensor(OP, "bias_table", bias_table, "H, columns")
    columns = (2 * max(source[0], target[0]) - 1) * (2 * max(source[1], target[1]) - 1) * 4
    check_shape(OP, "bias_table", bias_table, (q.shape[1], columns))
    if bias_table.device != q.device:
        raise ValueError(f"{OP}: bias_table must be on q's device {q.device}, got {bias_table.device}")
    chosen = choose(OP, backend, q.device.type, lambda name: _why_not(name, q, k, v, bias_table))
    arguments: dict[str, Any] = {"source_grid": source, "target_grid": target, "prefix": prefix}
    with without_autocast(q.device):
        if chosen == "native":
            from lpmflow_kernels.native import region_attention as native

            return native.region_attention(q, k, v, bias_table, **arguments)
        if chosen == "triton":
            from lpmflow_kernels import region_attention as triton

            return triton.region_attention(q, k, v, bias_table, **arguments)
        return reference.region_attention(q, k, v, bias_table, **arguments)


def _why_not(backend: str, q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor) -> str | None:
    """None when an installed backend can compute with tensors like these, else the reason in one sentence."""
    reason = why_no_kernel(q, k, v, bias_table)
    if reason is not None:
        return reason
    if backend == "native":
        from lpmflow_kernels.native import region_attention as native

        reason = native.why_not(q)
        if reason is None and q.device.type == "cuda" and needs_gradient(q, k, v, bias_table):
            reason = why_no_backward(OP)
    elif backend == "triton":
        from lpmflow_kernels import region_attention as triton

        reason = triton.why_not(q)
    return reason
