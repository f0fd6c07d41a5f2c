"""The arguments of each operation as every operator of it asks them, native or Triton; `dtypes` are those it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpmflow_kernels._checks import FLOATS, check_first, check_range, check_tensor, exact_type

Types = Sequence[torch.dtype]


def check_correlation(q: Tensor, k: Tensor, v: Tensor, prefix: int, dtypes: Types = FLOATS) -> None:
    """q (B, H, N, D), k and v (B, H, M, D) of one type, M at least 1, prefix at most N and M."""
    op = "correlation"
    check_first(op, "q", q, "B, H, N, D", dtypes)
    check_tensor(op, "k", k, (*q.shape[:2], None, q.shape[3]), q, q.dtype)
    check_tensor(op, "v", v, tuple(k.shape), q, q.dtype)
    check_range(op, "the number of keys", k.shape[2], 1)
    check_range(op, "prefix", prefix, 0, min(q.shape[2], k.shape[2]))


def check_correlation_gradients(
    grad_attended: Tensor | None, grad_corr: Tensor | None, q: Tensor, k: Tensor, prefix: int
) -> None:
    """Those of attended and corr, either may be missing; the other arguments are checked."""
    op = "correlation"
    if grad_attended is not None:
        check_tensor(op, "grad_attended", grad_attended, tuple(q.shape), q, q.dtype)
    if grad_corr is not None:
        wanted = (q.shape[0], q.shape[2] - prefix, k.shape[2] - prefix)
        check_tensor(op, "grad_corr", grad_corr, wanted, q, exact_type(q.dtype))


def check_region_attention(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, grids: Sequence[int], prefix: int, dtypes: Types = FLOATS
) -> None:
    """q, k, v (B, H, N, D) of one type, N = 2 prefix + the cells of both grids; bias_table of any type."""
    op = "region_attention"
    check_first(op, "q", q, "B, H, N, D", dtypes)
    if len(grids) != 4:
        raise ValueError(f"{op}: grids must be the heights and widths of source and target, got {list(grids)}")
    for side in grids:
        check_range(op, "a side of a grid", side, 1)
    check_range(op, "prefix", prefix, 0)
    height, width, target_height, target_width = grids
    tokens = 2 * prefix + height * width + target_height * target_width
    check_tensor(op, "q", q, (*q.shape[:2], tokens, q.shape[3]), q)
    for name, x in (("k", k), ("v", v)):
        check_tensor(op, name, x, tuple(q.shape), q, q.dtype)
    columns = (2 * max(height, target_height) - 1) * (2 * max(width, target_width) - 1) * 4
    check_tensor(op, "bias_table", bias_table, (q.shape[1], columns), q)


def check_window_attention(
    qkv: Tensor, bias_table: Tensor, heads: int, window: int, shift: int, dtypes: Types = FLOATS
) -> None:
    """qkv (B, H, W, 3 heads width); bias_table ((2 window - 1)^2, heads) in the type sums are formed in."""
    op = "window_attention"
    check_first(op, "qkv", qkv, "B, H, W, 3C", dtypes)
    check_range(op, "heads", heads, 1)
    check_range(op, "window", window, 1)
    check_range(op, "shift", shift, 0, window - 1)
    if qkv.shape[3] % (3 * heads):
        raise ValueError(f"{op}: qkv must have 3 x heads x width channels (heads {heads}), got {qkv.shape[3]}")
    check_tensor(op, "bias_table", bias_table, ((2 * window - 1) ** 2, heads), qkv, exact_type(qkv.dtype))


def check_window_attention_gradient(grad: Tensor, qkv: Tensor) -> None:
    """That of the output; qkv is checked."""
    check_tensor("window_attention", "grad", grad, (*qkv.shape[:3], qkv.shape[3] // 3), qkv, qkv.dtype)


def check_cross_scale_fusion(
    corrs: Sequence[Tensor], grids: Sequence[int], out: Sequence[int], x: Tensor, y: Tensor, dtypes: Types = FLOATS
) -> None:
    """corrs (B, lines ws, ht wt) of one type; grids hs, ws, ht, wt of each; x (w) and y (h) of any type.

    out: h, w, the first coarse line that corrs have, the first output row, and how many rows there are. That the lines
    of a part are those its rows lie between is left to the operator, whose arithmetic says between which a row lies.
    """
    op = "cross_scale_fusion"
    if not corrs or len(grids) != 4 * len(corrs) or len(out) != 5:
        raise ValueError(
            f"{op}: corrs, grids and out must be S >= 1 tensors, 4 S sides and 5 numbers, "
            f"got {len(corrs)}, {len(grids)} and {len(out)}"
        )
    h, w, first_line, first_row, rows = out
    for side in (*grids, h, w):
        check_range(op, "a side of a grid", side, 1)
    check_range(op, "the first line", first_line, 0)
    check_range(op, "the first row", first_row, 0, h)
    check_range(op, "the number of rows", rows, 0, h - first_row)
    check_first(op, "corrs[0]", corrs[0], "B, hs ws, ht wt", dtypes)
    for s, corr in enumerate(corrs):
        name, (hs, ws, ht, wt) = f"corrs[{s}]", grids[4 * s : 4 * s + 4]
        check_tensor(op, name, corr, (corrs[0].shape[0], None, ht * wt), corrs[0], corrs[0].dtype)
        if corr.shape[1] % ws:
            raise ValueError(f"{op}: {name} must have whole lines of {ws} source cells, got {corr.shape[1]} cells")
        lines = corr.shape[1] // ws
        check_range(op, f"the number of lines of {name}", lines, 1, hs if lines == hs else hs - first_line)
    for name, table, side in (("x", x, w), ("y", y, h)):
        check_tensor(op, name, table, (side,), corrs[0])


def check_cross_scale_fusion_gradient(
    grad_mapping: Tensor,
    corrs: Sequence[Tensor],
    out: Sequence[int],
    mapping: Tensor,
    confidence: Tensor,
    largest: Tensor,
) -> None:
    """That of the mapping, and what the forward kept; the other arguments are checked."""
    op, exact = "cross_scale_fusion", exact_type(corrs[0].dtype)
    scales, cells = (corrs[0].shape[0], len(corrs)), (out[4], out[1])
    for name, value in (("grad_mapping", grad_mapping), ("mapping", mapping)):
        check_tensor(op, name, value, (*scales, 2, *cells), corrs[0], exact)
    for name, value in (("confidence", confidence), ("largest", largest)):
        check_tensor(op, name, value, (*scales, *cells), corrs[0], exact)


def check_window_stage(x: Tensor, weights: Sequence[Tensor], heads: int, window: int, dtypes: Types) -> None:
    """x (B, H, W, C) without an empty side but B, and the 15 weights of a stage, of any floating types."""
    op = "window_stage"
    check_first(op, "x", x, "B, H, W, C", dtypes)
    for name, side in zip(("height", "width", "number of channels"), x.shape[1:], strict=True):
        check_range(op, f"the {name} of x", side, 1)
    check_range(op, "heads", heads, 1)
    check_range(op, "window", window, 1)
    if x.shape[3] % heads:
        raise ValueError(f"{op}: x must have a multiple of heads ({heads}) channels, got {x.shape[3]}")
    if len(weights) != 15 or weights[9].ndim != 2:
        raise ValueError(f"{op}: weights must be the 15 of a stage, in their order, got {len(weights)}")
    c, hidden = x.shape[3], weights[9].shape[0]
    norm, table = [(c,), (c,)], ((2 * window - 1) ** 2, heads)
    attention = [(3 * c, c), (3 * c,), table, (c, c), (c,)]
    shapes = [*norm, *attention, *norm, (hidden, c), (hidden,), (c, hidden), (c,), *norm]
    for i, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        check_tensor(op, f"weights[{i}]", weight, shape, x)
