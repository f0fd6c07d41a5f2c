"""`region_attention` in Triton: joint attention of two images' tokens, its bias read from a table by index arithmetic.

    r = q k^T    u = scale r + bias    P = softmax(u)    attended = P v    scale = D^-0.5

for each head, over the tokens [prefix, source patches, prefix, target patches]. q, k, v (B, H, N, D), any strides with
a dense last dimension; bias_table (H, (2 hm - 1)(2 wm - 1) 4), whose columns `_region_bias.py` explains; attended
(B, H, N, D) in q's type, the heads inside the tokens, so that joining them copies nothing. Products of float16 and
bfloat16 are accumulated in float32, those of float32 are exact (no TF32); bias, softmax and all sums are float32.
Nothing of size N N is in memory.

Forward, two kernels:
    lay_out    the table with its regions apart, and the place of each token in it
    attend     one program per (b, h, query tile), online softmax over the key tiles -> attended, stats
`stats` (2, B, H, N) holds the two numbers that give a row of P back: its largest u and the inverse of its sum,
P = exp(u - largest) inverse. They are kept apart, not as one log-sum-exp, whose rounding would cost 1e-3 of P where
logits reach 1e4.

Backward, from the inputs, attended and stats, with dO the gradient of attended:
    dP = dO v^T    delta = rowsum(P dP) = rowsum(dO attended)    du = P (dP - delta)
    dq = scale du k    dk = scale du^T q    dv = P^T dO    dtable[h, column] = sum of du over b and the pairs of column
    lay_out    as above
    dq         one program per (b, h, query tile), a loop over the key tiles -> dq, delta
    dk, dv     one program per (b, h, key tile), a loop over the query tiles
    dtable     only where the table has a gradient: one program per (part of the batch, h, region, offset between a tile
               of queries and one of keys), a loop over batch and pairs of tiles -> partial sums, which PyTorch adds up
Where a tile is a rectangle of patches, which pairs have which column depends only on how far apart the two tiles are.
So dtable sums du over its pairs of tiles as they are, in registers, and only then over the pairs of a column. That
computes r and dP once more, two products beside the seven of dq, dk and dv. The partial sums are four times the table,
and a few megabytes where the batch is split. Every output is written once by one program: no atomics, and two runs
agree to the last bit.
"""

from __future__ import annotations

import bisect
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpmflow_kernels._checks import check_range, check_tensor
from lpmflow_kernels._contracts import check_region_attention
from lpmflow_kernels._launch import (
    DTYPES,
    Tiles,
    define,
    dense_rows,
    launch,
    refuse_second_order,
    row_alignment,
    strided,
    why_not_on_device,
)
from lpmflow_kernels._region_bias import lay_out_kernel, load_bias, load_key_places, load_query_places, logits
from lpmflow_kernels._tiles import (
    add_product,
    dot_rows,
    load_rows,
    program,
    scale_rows,
    split_width,
    store_rows,
    zero_rows,
)
from lpmflow_kernels.region_attention_backward import dkv_kernel, dq_kernel, dtable_kernel

__all__ = ["configuration", "region_attention", "why_not"]

OP = "region_attention"
Grid = tuple[int, int]
MAX_WIDTH = 256
LOG2_E = math.log2(math.e)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that a row of nothing but -inf comes out NaN, as it should

# Kernel -> float16 and bfloat16, then float32; each for D up to 64, 96, 128 and 256: (queries, keys, warps, stages).
#
# Chosen from what the compiler reports, without spills and within 99 KB of shared memory as compiled for 8.0 (so that
# 8.6 and 8.9 have enough); not measured. 64 rows are what a warpgroup of Hopper multiplies at once; more would leave
# much of the last program's work unused for the base network's 514 tokens. Exact float32 products run unrolled on the
# CUDA cores: larger tiles run out of registers. dtable has as many queries as keys, each a rectangle of patches.
_TILES = {
    "attend": (
        ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2)),
        ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    ),
    "dq": (
        ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 16, 8, 2)),
        ((32, 32, 8, 2), (32, 16, 4, 2), (32, 16, 8, 2), (16, 16, 4, 2)),
    ),
    "dkv": (
        ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2), (16, 64, 8, 2)),
        ((32, 16, 4, 2), (32, 32, 8, 2), (32, 16, 8, 2), (16, 16, 4, 2)),
    ),
    "dtable": (
        ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1)),
    ),
}
_WIDTHS = (64, 96, 128, 256)
_LAY_OUT = Tiles(1, 256, 4, 1)
# dtable's batch is split where that is fewer programs than this: some multiples of what GPUs run at once.
_PROGRAMS = 1024


def configuration(kernel: str, width: int, dtype: torch.dtype) -> Tiles:
    """The tuning of one of the kernels for head width D and an input type."""
    by_width = _TILES[kernel][dtype == torch.float32]
    return Tiles(*by_width[bisect.bisect_left(_WIDTHS, width)])


def rectangle(grids: list[int], cells: int) -> tuple[int, int]:
    """(rows, columns) of tiles of `cells` patches that cover both grids, (hs, ws, ht, wt), with the least to spare."""

    def covered(tile: tuple[int, int]) -> int:
        sides = zip(grids, 2 * tile, strict=True)
        hs, ws, ht, wt = (triton.cdiv(side, step) * step for side, step in sides)
        return hs * ws + ht * wt

    columns = (1 << power for power in reversed(range(cells.bit_length())))
    return min(((cells // c, c) for c in columns), key=covered)


@triton.jit
def attend_kernel(
    # tensors
    p_q, p_k, p_v, p_laid, p_query, p_key, p_attended, p_largest, p_inverse,
    # sizes
    H, N, offsets,
    # strides
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_tb, stride_th, stride_tn,
    # scale, and log2(e)
    scale, exponent,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tile, i_bh, i_b, i_h = program(tl.cdiv(N, BLOCK_Q), H)
    o_q = i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_laid += i_h * 4 * offsets

    b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, o_q, stride_qn, N, D, D0, D1, ALIGN)
    b_query = load_query_places(p_query, o_q, N)[:, None]
    b_largest = tl.full([BLOCK_Q], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_out = zero_rows(BLOCK_Q, D0, D1)
    for first in range(0, N, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        b_k = load_rows(p_k, o_k, stride_kn, N, D, D0, D1, ALIGN)
        b_v = load_rows(p_v, o_k, stride_vn, N, D, D0, D1, ALIGN)
        b_bias = load_bias(p_laid, b_query, load_key_places(p_key, o_k, N)[None, :])
        b_u = logits(dot_rows(b_q, b_k), b_bias, (o_k < N)[None, :], scale)
        # A NaN in u may be lost to the maximum, but not to the sum, and through the sum it reaches the whole row.
        b_new = tl.maximum(b_largest, tl.max(b_u, axis=1))
        b_decay = tl.exp2((b_largest - b_new) * exponent)
        b_p = tl.exp2((b_u - b_new[:, None]) * exponent)  # [BLOCK_Q, BLOCK_K], not yet divided by the row's sum
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        b_out = add_product(scale_rows(b_out, b_decay[:, None]), b_p, b_v, p_v.dtype.element_ty)
        b_largest = b_new

    b_inverse = 1.0 / b_sum
    o_stats = i_bh * N + o_q
    tl.store(p_largest + o_stats, b_largest, mask=o_q < N)
    tl.store(p_inverse + o_stats, b_inverse, mask=o_q < N)
    p_attended += i_b * stride_tb + i_h * stride_th
    store_rows(p_attended, scale_rows(b_out, b_inverse[:, None]), o_q, stride_tn, N, D)


def why_not(q: Tensor) -> str | None:
    """None when the Triton kernels can compute with tensors like `q`, else the reason in one sentence."""
    if q.shape[-1] > MAX_WIDTH:
        return f"it takes head widths D up to {MAX_WIDTH}, got {q.shape[-1]}"
    return why_not_on_device("q", q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, grids: list[int], prefix: int
) -> tuple[Tensor, Tensor]:
    attended, stats = outputs = _outputs(q, k, v, bias_table, grids, prefix)
    if attended.numel() == 0:
        return attended, stats.zero_()
    arguments = _arguments(q, k, v, attended, stats)
    with torch.cuda.device_of(q):
        arguments |= _lay_out(bias_table, grids, prefix, q.shape[2])
        _launch_per_head(attend_kernel, "attend", q, arguments)
    return outputs


def backward(
    grad_attended: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor,
    grids: list[int],
    prefix: int,
    attended: Tensor,
    stats: Tensor,
    table: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dtable = _grads(grad_attended, q, k, v, bias_table, grids, prefix, attended, stats, table)
    if q.numel() == 0:
        return dq, dk, dv, dtable.zero_()
    arguments = _arguments(q, k, v, attended, stats.contiguous())
    grad_attended = dense_rows(grad_attended)
    arguments |= strided("p_do", grad_attended, "stride_o", "bhn")
    arguments["ALIGN"] = min(arguments["ALIGN"], row_alignment(grad_attended))
    arguments |= {"p_delta": stats.new_empty(stats.shape[1:]), "p_dq": dq, "p_dk": dk, "p_dv": dv}
    with torch.cuda.device_of(q):
        arguments |= _lay_out(bias_table, grids, prefix, q.shape[2])
        _launch_per_head(dq_kernel, "dq", q, arguments)
        _launch_per_head(dkv_kernel, "dkv", q, arguments)
        if not table:
            return dq, dk, dv, dtable.zero_()
        partial = _launch_dtable(q, grids, arguments)
    return dq, dk, dv, partial.sum((0, 1)).to(dtable.dtype)


def _arguments(q: Tensor, k: Tensor, v: Tensor, attended: Tensor, stats: Tensor) -> dict[str, Any]:
    """What the kernels are told of the inputs and the outputs."""
    q, k, v, attended = (dense_rows(x) for x in (q, k, v, attended))
    batch, heads, tokens, width = q.shape
    head, tail = split_width(width)
    return {
        **strided("p_q", q, "stride_q", "bhn"),
        **strided("p_k", k, "stride_k", "bhn"),
        **strided("p_v", v, "stride_v", "bhn"),
        **strided("p_attended", attended, "stride_t", "bhn"),
        "p_largest": stats[0],
        "p_inverse": stats[1],
        "B": batch,
        "H": heads,
        "N": tokens,
        "scale": width**-0.5,
        "exponent": LOG2_E,
        "D": width,
        "D0": head,
        "D1": tail,
        "ALIGN": row_alignment(q, k, v, attended),
    }


def _lay_out(bias_table: Tensor, grids: list[int], prefix: int, tokens: int) -> dict[str, Any]:
    """Launches `lay_out_kernel`; what the others are told of the bias."""
    hs, ws, ht, wt = grids
    across = 2 * max(ws, wt) - 1
    table = bias_table.to(torch.float32).contiguous()
    arguments = {
        "p_table": table,
        "p_laid": table.new_empty(table.shape),
        "p_query": table.new_empty(tokens, dtype=torch.int32),
        "p_key": table.new_empty(tokens, dtype=torch.int32),
        "N": tokens,
        "entries": table.numel(),
        "offsets": table.shape[1] // 4,
        "across": across,
        "prefix": prefix,
        "first_target": 2 * prefix + hs * ws,
        "ws": ws,
        "wt": wt,
        "middle": (max(hs, ht) - 1) * across + max(ws, wt) - 1,
    }
    launch(lay_out_kernel, triton.cdiv(max(table.numel(), tokens), _LAY_OUT.block_k), _LAY_OUT, arguments)
    return arguments


def _launch_per_head(kernel: Any, name: str, q: Tensor, arguments: dict[str, Any]) -> None:
    """One program per (b, h, tile of tokens)."""
    tiles = configuration(name, q.shape[-1], q.dtype)
    block = tiles.block_k if name == "dkv" else tiles.block_q
    launch(kernel, q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], block), tiles, arguments)


def _launch_dtable(q: Tensor, grids: list[int], arguments: dict[str, Any]) -> Tensor:
    """(parts, 4, H, columns): what the programs for the parts of the batch find for each entry of the table.

    An entry gets something from up to four programs, since offsets within tiles and between them add up to the same in
    two ways along both axes; each has its own place.
    """
    batch, heads = q.shape[:2]
    hs, ws, ht, wt = grids
    tiles = configuration("dtable", q.shape[-1], q.dtype)
    rows, columns = rectangle(grids, tiles.block_q)
    tiles_r, tiles_c = triton.cdiv(max(hs, ht), rows), triton.cdiv(max(ws, wt), columns)
    programs = heads * 4 * (2 * tiles_r - 1) * (2 * tiles_c - 1)
    parts = max(1, min(batch, _PROGRAMS // programs))
    partial = arguments["p_laid"].new_zeros((parts, 4, heads, 4 * arguments["offsets"]))
    arguments |= {
        "p_partial": partial,
        "parts": parts,
        "hs": hs,
        "ht": ht,
        "hm": max(hs, ht),
        "wm": max(ws, wt),
        "tiles_r": tiles_r,
        "tiles_c": tiles_c,
        "ROWS": rows,
        "COLUMNS": columns,
    }
    launch(dtable_kernel, parts * programs, tiles, arguments)
    return partial


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, grids: list[int], prefix: int
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, bias_table, grids, prefix)
    batch, heads, tokens, width = q.shape
    attended = q.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    return attended, q.new_empty((2, batch, heads, tokens), dtype=torch.float32)


def _grads(
    grad_attended: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor,
    grids: list[int],
    prefix: int,
    attended: Tensor,
    stats: Tensor,
    table: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(q, k, v, bias_table, grids, prefix)
    for name, x in (("grad_attended", grad_attended), ("attended", attended)):
        check_tensor(OP, name, x, tuple(q.shape), q, q.dtype)
    check_tensor(OP, "stats", stats, (2, *q.shape[:3]), q, torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias_table.new_empty(bias_table.shape)


def _check(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, grids: list[int], prefix: int) -> None:
    check_region_attention(q, k, v, bias_table, grids, prefix, DTYPES)
    check_range(OP, "the head width D", q.shape[3], 0, MAX_WIDTH)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias_table, ctx.grids, ctx.prefix = inputs
    attended, stats = output
    ctx.table = bias_table.requires_grad
    ctx.save_for_backward(q, k, v, bias_table, attended, stats)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_attended: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_attended is None:
        return None, None, None, None, None, None
    q, k, v, bias_table, attended, stats = ctx.saved_tensors
    grads = torch.ops.lpmflow.region_attention_triton_backward(
        grad_attended, q, k, v, bias_table, ctx.grids, ctx.prefix, attended, stats, ctx.table
    )
    return (*grads, None, None)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor bias_table, SymInt[] grids, SymInt prefix"
define(OP, "region_attention_triton", f"({_INPUTS}) -> (Tensor, Tensor)", forward, _outputs)
define(
    OP,
    "region_attention_triton_backward",
    f"(Tensor grad_attended, {_INPUTS}, Tensor attended, Tensor stats, bool table=True) "
    f"-> (Tensor, Tensor, Tensor, Tensor)",
    backward,
    _grads,
)
torch.library.register_autograd("lpmflow::region_attention_triton", _differentiate, setup_context=_save)
torch.library.register_autograd("lpmflow::region_attention_triton_backward", functools.partial(refuse_second_order, OP))


def region_attention(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, *, source_grid: Grid, target_grid: Grid, prefix: int
) -> Tensor:
    """`lpmflow.ops.region_attention` of checked arguments."""
    attended, _ = torch.ops.lpmflow.region_attention_triton(q, k, v, bias_table, [*source_grid, *target_grid], prefix)
    return attended
