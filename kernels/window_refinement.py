"""`window_attention` in Triton: self-attention inside the square windows of a map, with a relative position bias.

    S[h, i, j] = scale q[h, i] . k[h, j] + table[offset(i, j), h]    P = softmax over the cells j of i's window
    out[h, i] = sum_j P[h, i, j] v[h, j]
    offset(i, j) = (dr + window - 1)(2 window - 1) + (dc + window - 1),  (dr, dc) = cell i - cell j

qkv (B, H, W, 3 C), any strides with a dense last dimension: thirds q, k, v, each with `heads` heads of D channels;
out (B, H, W, C) in qkv's type. Products of float16 and bfloat16 are accumulated in float32, those of float32 are exact
(no TF32); logits, softmax and all sums are float32. No window is copied out of the map.

Windows cut both axes at 0, window, 2 window, ...; with a shift at 0, shift, shift + window, .... That is Swin's cyclic
shift with its mask, because cells that wrap around never see those they are moved next to; so there is neither padding
nor a mask, only windows that are smaller at the edges.

A tile is queries and keys of one place in the window, and a program has the tile of one head in a run of consecutive
windows. Biases are read by their index in the table, and where a window is one tile (up to 8 x 8 cells) only once a
run. A window of up to 4 x 4 cells is a tile for a group of heads: those lie side by side in memory, and a cell of one
alone is as little as 24 bytes.
    attend       one program per (run, tile of queries, group of heads), online softmax over the tiles of keys

Backward, from qkv and the table, with dO the gradient of out; P is computed anew:
    dP = dO v^T    dS = P (dP - rowsum(P dP))    dq = scale dS k    dk = scale dS^T q    dv = P^T dO
    grad_table[o, h] = sum of dS[h, i, j] over offset(i, j) = o, over all windows
    window       where a window is one tile: one program per (run, group of heads), everything
    rows         else first one program per (run, tile of queries, head): rowsum(P dP), and what gives a row of P back,
                 its largest logit and the inverse of its sum, kept apart because one log-sum-exp would be rounded
    dq           one program per (run, tile of queries, head), a loop over the tiles of keys
    dkv          one program per (run, tile of keys, head), a loop over the tiles of queries
    pairs        one program per (run, tile of queries, tile of keys, head)
    grad_table   one program per (head, dr)
The gradient of the table is a sum over windows, then over the pairs of cells of each offset. `window` and `pairs` do
the first for their run and leave dS of pairs (runs, heads, cells, cells), of bounded size; PyTorch adds up the runs,
and `grad_table` the pairs.
Every output is written once by one program: no atomics, and two runs agree to the last bit.
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

from lpmflow_kernels._checks import check_range
from lpmflow_kernels._contracts import check_window_attention, check_window_attention_gradient
from lpmflow_kernels._launch import (
    DTYPES,
    Tiles,
    define,
    dense_rows,
    launch,
    refuse_second_order,
    row_alignment,
    why_not_on_device,
)
from lpmflow_kernels._tiles import add_product, load_rows_at, scale_rows, split_width, store_rows_at
from lpmflow_kernels._windows import (
    LOG2E,
    LOWEST,
    Map,
    Windows,
    cells_of,
    fill,
    fill_rows,
    heads_of,
    load_bias,
    logits,
    rows_at,
    share_of_program,
)
from lpmflow_kernels.window_refinement_backward import (
    dkv_kernel,
    dq_kernel,
    grad_table_kernel,
    pairs_kernel,
    rows_kernel,
    window_kernel,
)

__all__ = ["configuration", "why_not", "window_attention"]

OP = "window_attention"


@triton.jit
def attend_kernel(
    # a `Map` each
    qkv, out,
    # (heads, offsets)
    p_table,
    # heads, a `Windows`, D^-0.5
    heads, windows, scale,
    WINDOW: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    CELLS: tl.constexpr = WINDOW * WINDOW
    i_head, i_tile, first, end = share_of_program(windows, heads, tl.cdiv(CELLS, BLOCK_Q), GROUP)
    o_h = heads_of(i_head, GROUP)
    o_d, c = o_h * D, heads * D
    o_q = i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    if CELLS <= BLOCK_K:
        b_bias = load_bias(p_table, o_h, heads, o_q[:, None], tl.arange(0, BLOCK_K)[None, :], WINDOW)
    for i_window in range(first, end):
        cells, m_q = cells_of(i_window, o_q, windows, WINDOW)
        m_q_rows = m_q[:, None] & (o_h < heads)
        b_q = load_rows_at(rows_at(qkv, cells) + o_d, m_q_rows, D, D0, D1, ALIGN)
        b_largest = fill(LOWEST, GROUP, BLOCK_Q, 1)
        b_sum = fill(0.0, GROUP, BLOCK_Q, 1)
        b_out = fill_rows(0.0, GROUP, BLOCK_Q, D0, D1)
        for first_k in range(0, CELLS, BLOCK_K):
            o_k = first_k + tl.arange(0, BLOCK_K)
            k_cells, m_k = cells_of(i_window, o_k, windows, WINDOW)
            m_k_rows = m_k[:, None] & (o_h < heads)
            p_k = rows_at(qkv, k_cells) + o_d + c
            b_k = load_rows_at(p_k, m_k_rows, D, D0, D1, ALIGN)
            b_v = load_rows_at(p_k + c, m_k_rows, D, D0, D1, ALIGN)
            if CELLS > BLOCK_K:
                b_bias = load_bias(p_table, o_h, heads, o_q[:, None], o_k[None, :], WINDOW)
            b_s = logits(b_q, b_k, b_bias, m_k, scale)
            # A NaN may be lost to the maximum, but not to the sum, and through the sum it reaches the whole row.
            b_new = tl.maximum(b_largest, tl.max(b_s, axis=-1, keep_dims=True))
            b_decay = tl.exp2((b_largest - b_new) * LOG2E)
            b_p = tl.exp2((b_s - b_new) * LOG2E)  # not yet divided by the row's sum
            b_sum = b_sum * b_decay + tl.sum(b_p, axis=-1, keep_dims=True)
            b_out = add_product(scale_rows(b_out, b_decay), b_p, b_v, qkv.data.dtype.element_ty)
            b_largest = b_new
        store_rows_at(rows_at(out, cells) + o_d, m_q_rows, scale_rows(b_out, 1.0 / b_sum), D)


MAX_WIDTH = 128
MAX_WINDOW = 32
_WARPS = 16384  # of a launch, about: twice what the largest GPUs can hold at a time
_PAIRS_BYTES = 32 << 20  # what the sums of dS of all runs take at most, unless there is one run only

# Kernel -> float16 and bfloat16, then float32; each for D up to 32, 64, 96 and 128: (queries, keys, warps, stages).
#
# Chosen from what the compiler reports, without spills and within 99 KB of shared memory as compiled for 8.0 (so that
# 8.6 and 8.9 have enough); not measured. 64 rows are what a warpgroup of Hopper multiplies at once, and a window of 8 x
# 8. Exact float32 products run unrolled on the CUDA cores: larger tiles run out of registers.
_TILES = {
    "attend": (
        ((64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 2), (64, 32, 4, 2)),
        ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    ),
    "rows": (
        ((64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 2), (64, 32, 4, 2)),
        ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    ),
    "dq": (
        ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
        ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    ),
    "dkv": (
        ((64, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1), (32, 64, 8, 1)),
        ((32, 16, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    ),
    "pairs": (
        ((64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
        ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    ),
}
_WIDTHS = (32, 64, 96, 128)


def configuration(kernel: str, window: int, width: int, heads: int, dtype: torch.dtype) -> Tiles:
    """The tuning of one of the kernels for a window, a head width D, the number of heads and an input type."""
    exact, cells = dtype == torch.float32, max(16, triton.next_power_of_2(window * window))
    even = window & (window - 1) == 0  # else rows and columns of cells come by divisions, which want registers
    if cells == 16:  # each warp has heads of its own
        warps = 2 if exact and width > 32 else min(4, group(window, width, heads))
        return Tiles(16, 16, warps, 2 if kernel == "attend" and not exact else 1)
    if cells <= 64 and width <= 32:
        return Tiles(cells, cells, cells // (16 if even and not exact else 8), 2 if even and not exact else 1)
    queries, keys, warps, stages = _TILES[kernel][exact][bisect.bisect_left(_WIDTHS, width)]
    if not even:
        queries, stages = 32 if kernel == "dq" and width > 64 else queries, 1
    return Tiles(min(queries, cells), min(keys, cells), warps, stages)


def is_whole(window: int, width: int) -> bool:
    """Whether a tile is a whole window in the backward too."""
    return window <= 4 or (window <= 8 and width <= 32)


def group(window: int, width: int, heads: int) -> int:
    """Heads that a program takes at once: in small windows several, where the channels of one are few in a row."""
    return min(8, triton.next_power_of_2(heads)) if window <= 4 and width <= 32 else 1


def why_not(qkv: Tensor, *, width: int, window: int) -> str | None:
    """None when the Triton kernels can compute with tensors like `qkv`, else the reason in one sentence."""
    if width > MAX_WIDTH:
        return f"it takes head widths of up to {MAX_WIDTH}, got {width}"
    if window > MAX_WINDOW:
        return f"it takes windows of up to {MAX_WINDOW} x {MAX_WINDOW} cells, got {window} x {window}"
    return why_not_on_device("qkv", qkv)


def forward(qkv: Tensor, bias_table: Tensor, heads: int, window: int, shift: int) -> Tensor:
    out = _output(qkv, bias_table, heads, window, shift)
    if out.numel() == 0:
        return out
    arguments = _arguments(qkv, bias_table, heads, window) | {"out": _map(out)}
    with torch.cuda.device_of(qkv):
        _launch(attend_kernel, "attend", qkv, arguments, shift)
    return out


def backward(
    grad: Tensor, qkv: Tensor, bias_table: Tensor, heads: int, window: int, shift: int, table: bool = True
) -> tuple[Tensor, Tensor]:
    grad_qkv, grad_table = _grads(grad, qkv, bias_table, heads, window, shift, table)
    if grad_qkv.numel() == 0:
        return grad_qkv, grad_table.zero_()
    grad, arguments = dense_rows(grad), _arguments(qkv, bias_table, heads, window)
    arguments |= {"grad": _map(grad), "grad_qkv": _map(grad_qkv), "p_pairs": None}
    arguments["ALIGN"] = math.gcd(arguments["ALIGN"], row_alignment(grad))
    pairs = qkv.new_empty((heads, window * window, window * window), dtype=torch.float32) if table else None
    with torch.cuda.device_of(qkv):
        if is_whole(window, arguments["D"]):
            _launch(window_kernel, "window", qkv, arguments, shift, pairs)
        else:
            statistics = qkv.new_empty((3, heads, *qkv.shape[:3]), dtype=torch.float32)
            arguments |= zip(("p_largest", "p_inverse", "p_delta"), statistics, strict=True)
            _launch(rows_kernel, "rows", qkv, arguments, shift)
            _launch(dq_kernel, "dq", qkv, arguments, shift)
            _launch(dkv_kernel, "dkv", qkv, arguments, shift)
            if table:
                _launch(pairs_kernel, "pairs", qkv, arguments, shift, pairs)
        if pairs is None:
            return grad_qkv, grad_table.zero_()
        arguments |= {"p_pairs": pairs, "p_grad_table": grad_table}
        side = triton.next_power_of_2(window)
        launch(grad_table_kernel, heads * (2 * window - 1), Tiles(side, 2 * side, 1, 1), arguments)
    return grad_qkv, grad_table


def _arguments(qkv: Tensor, bias_table: Tensor, heads: int, window: int) -> dict[str, Any]:
    """What the kernels are told of the inputs."""
    qkv = dense_rows(qkv)
    width = qkv.shape[-1] // 3 // heads
    head, tail = split_width(width)
    return {
        "qkv": _map(qkv),
        "p_table": bias_table.t().contiguous(),  # (heads, offsets): the keys of a row of cells lie side by side
        "heads": heads,
        "scale": width**-0.5,
        "WINDOW": window,
        "GROUP": group(window, width, heads),
        "D": width,
        "D0": head,
        "D1": tail,
        "ALIGN": math.gcd(row_alignment(qkv), width * qkv.element_size()),
    }


def _map(x: Tensor) -> Map:
    return Map(x, *x.stride()[:3])


def _launch(
    kernel: Any, name: str, qkv: Tensor, arguments: dict[str, Any], shift: int, pairs: Tensor | None = None
) -> None:
    """Launch a kernel for all windows, in runs; `pairs`, if given, gets the sum over the runs of what each leaves."""
    window, heads, (batch, height, width) = arguments["WINDOW"], arguments["heads"], qkv.shape[:3]
    tiles = configuration(name, window, arguments["D"], heads, qkv.dtype)
    tiles_q, tiles_k = (triton.cdiv(window * window, block) for block in (tiles.block_q, tiles.block_k))
    tiles_of_window = {"pairs": tiles_q * tiles_k, "dkv": tiles_k}.get(name, tiles_q)
    lead = -shift % window
    rows, columns = triton.cdiv(height + lead, window), triton.cdiv(width + lead, window)
    count = batch * rows * columns
    programs = triton.cdiv(heads, arguments["GROUP"]) * tiles_of_window
    runs = triton.cdiv(_WARPS, programs * tiles.num_warps)
    if pairs is not None:
        runs = min(runs, max(1, _PAIRS_BYTES // (4 * pairs.numel())))
    run = triton.cdiv(count, min(runs, count))
    runs = triton.cdiv(count, run)
    windows = Windows(height, width, rows, columns, lead, count, run, batch * height * width)
    arguments = {**arguments, "windows": windows}
    if pairs is not None:
        arguments["p_pairs"] = pairs[None] if runs == 1 else pairs.new_empty((runs, *pairs.shape))
    launch(kernel, programs * runs, tiles, arguments)
    if pairs is not None and runs > 1:
        torch.sum(arguments["p_pairs"], 0, out=pairs)


def _output(qkv: Tensor, bias_table: Tensor, heads: int, window: int, shift: int) -> Tensor:
    _check(qkv, bias_table, heads, window, shift)
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


def _grads(
    grad: Tensor, qkv: Tensor, bias_table: Tensor, heads: int, window: int, shift: int, table: bool = True
) -> tuple[Tensor, Tensor]:
    _check(qkv, bias_table, heads, window, shift)
    check_window_attention_gradient(grad, qkv)
    return qkv.new_empty(qkv.shape), bias_table.new_empty(bias_table.shape)


def _check(qkv: Tensor, bias_table: Tensor, heads: int, window: int, shift: int) -> None:
    check_window_attention(qkv, bias_table, heads, window, shift, DTYPES)
    check_range(OP, "window", window, 1, MAX_WINDOW)
    check_range(OP, "the head width", qkv.shape[3] // 3 // heads, 0, MAX_WIDTH)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, bias_table, *ctx.sizes = inputs
    ctx.table = bias_table.requires_grad
    ctx.save_for_backward(qkv, bias_table)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.lpmflow.window_attention_triton_backward(grad, *ctx.saved_tensors, *ctx.sizes, ctx.table)
    return (*grads, None, None, None)


_INPUTS = "Tensor qkv, Tensor bias_table, SymInt heads, SymInt window, SymInt shift"
define(OP, "window_attention_triton", f"({_INPUTS}) -> Tensor", forward, _output)
define(
    OP,
    "window_attention_triton_backward",
    f"(Tensor grad, {_INPUTS}, bool table=True) -> (Tensor, Tensor)",
    backward,
    _grads,
)
torch.library.register_autograd("lpmflow::window_attention_triton", _differentiate, setup_context=_save)
torch.library.register_autograd("lpmflow::window_attention_triton_backward", functools.partial(refuse_second_order, OP))


def window_attention(qkv: Tensor, bias_table: Tensor, *, heads: int, window: int, shift: int) -> Tensor:
    """(B, H, W, C) of checked arguments; see `lpmflow.ops.window_attention`."""
    return torch.ops.lpmflow.window_attention_triton(qkv, bias_table.to(torch.float32), heads, window, shift)
