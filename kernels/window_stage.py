"""`window_stage` in Triton: a refinement stage on a whole map, and its pooled statistics, for inference.

    y = x + proj(attention(qkv(norm1(x))))        attention of `window_refinement`, without shift
    z = y + fc2(gelu(fc1(norm2(y))))
    out = x + norm_out(z)
    mean[b, c], highest[b, c]: of out over the cells of the map

x (B, H, W, C), any strides with a dense last dimension; out (B, H, W, C) contiguous and mean, highest (B, C), in x's
type. Products have operands of the type of the matrices, float16 and bfloat16 accumulated in float32, float32 exact (no
TF32); everything between two products is float32.

    stage        one program per block of cells of one map: from x to out, one read and one write
    project      before it where a window is larger than a block, and in float32: norm1 and qkv, one program per block
    pool         one program per (map, some channels): the blocks' sums and maxima to mean and highest

A block is a few windows side by side, or a part of one. A program holds the sums y of its rows, (BLOCK_Q, C), and goes
through the heads, then through the hidden channels of the MLP some BLOCK_K at a time, and adds what each gives to y at
once: neither the attended map nor the hidden one is ever whole. Where the block is whole windows, q, k and v of a head
are made where they are used, out of the normalised rows, and are never in memory either.

Where it is a part of a window, the keys of the others are needed too. To make them anew in every block would be 2/3 of
qkv once more for each block but the first: of 96 channels 1.3 times the multiplications of the whole stage in a window
of 16 x 16, which is four blocks (215 k a cell, not 160 k), and 1.9 times in one of 32 x 32. So `project` leaves q, k
and v in memory, three maps in the matrices' type, and the blocks of a window, neighbours in the grid, read them while
they are in the second cache.

All of it fits the registers of one program, so there is no kernel of its own for the MLP, which would read y again.
Every output is written once by one program: no atomics, and two runs agree to the last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpmflow_kernels._contracts import check_window_stage
from lpmflow_kernels._launch import (
    DTYPES,
    Tiles,
    define,
    dense_rows,
    launch,
    refuse_gradient,
    row_alignment,
    why_not_on_device,
)
from lpmflow_kernels._layers import (
    Layer,
    add_linear,
    add_rows,
    add_vector,
    gelu,
    linear,
    normalise,
    round_rows,
    widen,
)
from lpmflow_kernels._tiles import load_columns, load_rows_at, round_to, split_width, store_rows_at
from lpmflow_kernels._windows import LOG2E, LOWEST, Map, load_bias, rows_at

__all__ = ["configuration", "why_not", "window_stage"]

OP = "window_stage"


class Cut(NamedTuple):
    """A map's cells, and the windows along its height and along its width."""

    height: int
    width: int
    rows: int
    columns: int


@triton.jit
def block_of(windows, WINDOW: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr):
    """(map, first window, first cell in it) of a program: GROUP whole windows, or a part of one."""
    PARTS: tl.constexpr = (WINDOW * WINDOW + BLOCK_Q // GROUP - 1) // (BLOCK_Q // GROUP)
    i_block = tl.program_id(0) // PARTS
    blocks = tl.cdiv(windows.rows * windows.columns, GROUP)
    return i_block // blocks, i_block % blocks * GROUP, tl.program_id(0) % PARTS * (BLOCK_Q // GROUP)


@triton.jit
def cells_from(i_b, i_window, first, windows, WINDOW: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """(map, rows, columns) of ROWS cells of GROUP windows, each from its cell `first` on; and which there are."""
    o_cells = first + tl.arange(0, ROWS) % (ROWS // GROUP)
    o_window = i_window + tl.arange(0, ROWS) // (ROWS // GROUP)
    o_r = o_window // windows.columns * WINDOW + o_cells // WINDOW
    o_c = o_window % windows.columns * WINDOW + o_cells % WINDOW
    m_cells = (o_cells < WINDOW * WINDOW) & (o_r < windows.height) & (o_c < windows.width)
    return (i_b.to(tl.int64), o_r.to(tl.int64), o_c.to(tl.int64)), m_cells


@triton.jit
def project_kernel(
    # a `Map` each
    x, qkv,
    # a `Layer` each, a `Cut`, of the normalisation
    norm1, to_qkv, windows, eps,
    WINDOW: tl.constexpr, GROUP: tl.constexpr,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = qkv.data.dtype.element_ty
    i_b, i_window, first = block_of(windows, WINDOW, GROUP, BLOCK_Q)
    cells, m_cells = cells_from(i_b, i_window, first, windows, WINDOW, GROUP, BLOCK_Q)
    b_x = widen(load_rows_at(rows_at(x, cells), m_cells[:, None], C, C0, C1, ALIGN))
    b_normed = round_rows(normalise(b_x, norm1, eps, C), DTYPE)
    p_qkv = rows_at(qkv, cells)
    for first_out in range(0, 3 * C, BLOCK_K):
        o_out = first_out + tl.arange(0, BLOCK_K)
        b_out = linear(b_normed, to_qkv, o_out, o_out < 3 * C, C, C0, C1)
        tl.store(p_qkv + o_out[None, :], round_to(b_out, DTYPE), mask=m_cells[:, None] & (o_out < 3 * C)[None, :])


@triton.jit
def stage_kernel(
    # a `Map` each; of the first, or None
    x, qkv, out,
    # (programs, 2, C): sum and maximum of a block's rows; (heads, offsets)
    p_pooled, p_table,
    # a `Layer` each
    norm1, to_qkv, proj, norm2, fc1, fc2, norm_out,
    # a `Cut`, D^-0.5, of the normalisations
    windows, scale, eps,
    STAGED: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HIDDEN: tl.constexpr,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = proj.weight.dtype.element_ty
    CELLS: tl.constexpr = WINDOW * WINDOW
    SLOT: tl.constexpr = BLOCK_Q // GROUP
    i_b, i_window, first = block_of(windows, WINDOW, GROUP, BLOCK_Q)
    cells, m_cells = cells_from(i_b, i_window, first, windows, WINDOW, GROUP, BLOCK_Q)
    m_rows = m_cells[:, None]
    o_d, o_q = tl.arange(0, D0), first + tl.arange(0, SLOT)
    m_d = o_d < D
    b_x = widen(load_rows_at(rows_at(x, cells), m_rows, C, C0, C1, ALIGN))
    if not STAGED:
        b_normed = round_rows(normalise(b_x, norm1, eps, C), DTYPE)
    b_y = add_vector(b_x, proj.bias, C)
    for i_head in tl.range(0, HEADS, num_stages=1):  # more loads in flight run out of registers
        o_h = i_head * D
        if STAGED:
            p_q = rows_at(qkv, cells) + o_h
            b_q = load_columns(p_q, m_rows, 0, D0, D)
        else:
            b_q = round_to(linear(b_normed, to_qkv, o_h + o_d, m_d, C, C0, C1), DTYPE)
            b_k = round_to(linear(b_normed, to_qkv, C + o_h + o_d, m_d, C, C0, C1), DTYPE)
            b_v = linear(b_normed, to_qkv, 2 * C + o_h + o_d, m_d, C, C0, C1)
            b_v = round_to(tl.where(m_rows, b_v, 0.0), DTYPE)
        if CELLS <= SLOT:
            if STAGED:
                b_k = load_columns(p_q + C, m_rows, 0, D0, D)
                b_v = load_columns(p_q + 2 * C, m_rows, 0, D0, D)
            if GROUP > 1:
                b_q, b_k = tl.reshape(b_q, [GROUP, SLOT, D0]), tl.reshape(b_k, [GROUP, SLOT, D0])
                b_v = tl.reshape(b_v, [GROUP, SLOT, D0])
            b_bias = load_bias(p_table, i_head, HEADS, o_q[:, None], o_q[None, :], WINDOW)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale + b_bias
            b_s = tl.where(tl.reshape(m_cells, [GROUP, 1, SLOT] if GROUP > 1 else [1, SLOT]), b_s, float("-inf"))
            b_p = tl.exp2((b_s - tl.maximum(tl.max(b_s, axis=-1, keep_dims=True), LOWEST)) * LOG2E)
            b_sum = tl.sum(b_p, axis=-1, keep_dims=True)
            b_out = tl.dot(round_to(b_p, DTYPE), b_v, input_precision="ieee")
        else:
            b_largest = tl.full([SLOT, 1], LOWEST, tl.float32)
            b_sum, b_out = tl.zeros([SLOT, 1], tl.float32), tl.zeros([SLOT, D0], tl.float32)
            for first_k in range(0, CELLS, BLOCK_K):
                k_cells, m_k = cells_from(i_b, i_window, first_k, windows, WINDOW, 1, BLOCK_K)
                p_k = rows_at(qkv, k_cells) + C + o_h
                b_k = load_columns(p_k, m_k[:, None], 0, D0, D)
                b_v = load_columns(p_k + C, m_k[:, None], 0, D0, D)
                o_k = first_k + tl.arange(0, BLOCK_K)
                b_bias = load_bias(p_table, i_head, HEADS, o_q[:, None], o_k[None, :], WINDOW)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale + b_bias
                b_s = tl.where(m_k[None, :], b_s, float("-inf"))
                # A NaN may be lost to the maximum, but not to the sum, and through the sum it reaches the whole row.
                b_new = tl.maximum(b_largest, tl.max(b_s, axis=-1, keep_dims=True))
                b_decay = tl.exp2((b_largest - b_new) * LOG2E)
                b_p = tl.exp2((b_s - b_new) * LOG2E)  # not yet divided by the row's sum
                b_sum = b_sum * b_decay + tl.sum(b_p, axis=-1, keep_dims=True)
                b_out = tl.dot(round_to(b_p, DTYPE), b_v, b_out * b_decay, input_precision="ieee")
                b_largest = b_new
        b_out = round_to(tl.reshape(b_out / b_sum, [BLOCK_Q, D0]), DTYPE)
        b_y = add_linear(b_y, b_out, proj.weight + i_head * D, C, o_d, m_d, C)
    b_normed = round_rows(normalise(b_y, norm2, eps, C), DTYPE)
    b_y = add_vector(b_y, fc2.bias, C)
    for first_hidden in range(0, HIDDEN, BLOCK_K):
        o_hidden = first_hidden + tl.arange(0, BLOCK_K)
        m_hidden = o_hidden < HIDDEN
        b_hidden = round_to(gelu(linear(b_normed, fc1, o_hidden, m_hidden, C, C0, C1)), DTYPE)
        b_y = add_linear(b_y, b_hidden, fc2.weight, HIDDEN, o_hidden, m_hidden, C)
    b_x = widen(load_rows_at(rows_at(x, cells), m_rows, C, C0, C1, ALIGN))  # again: that is cheaper than to keep it
    b_y = add_rows(b_x, normalise(b_y, norm_out, eps, C))
    store_rows_at(rows_at(out, cells), m_rows, b_y, C)
    p_pooled += tl.program_id(0).to(tl.int64) * 2 * C
    pool_columns(p_pooled, b_y[0], m_rows, 0, C)
    if C1 > 0:
        pool_columns(p_pooled, b_y[1], m_rows, C0, C)


@triton.jit
def pool_columns(p_pooled, b_tile, m_rows, FIRST: tl.constexpr, C: tl.constexpr):
    """Sum and maximum of each column to p_pooled (2, C)."""
    o_c = FIRST + tl.arange(0, b_tile.shape[-1])
    tl.store(p_pooled + o_c, tl.sum(tl.where(m_rows, b_tile, 0.0), axis=0), mask=o_c < C)
    tl.store(p_pooled + C + o_c, tl.max(tl.where(m_rows, b_tile, float("-inf")), axis=0), mask=o_c < C)


@triton.jit
def pool_kernel(
    # (B, blocks, 2, C), (B, C) each
    p_pooled, p_mean, p_highest,
    blocks, cells,
    C: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // tl.cdiv(C, BLOCK_K)).to(tl.int64)
    o_c = tl.program_id(0) % tl.cdiv(C, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_c = (o_c < C)[None, :]
    b_sum = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    b_largest = tl.full([BLOCK_Q, BLOCK_K], float("-inf"), tl.float32)
    for first in range(0, blocks, BLOCK_Q):
        o_part = first + tl.arange(0, BLOCK_Q)
        m_part = (o_part < blocks)[:, None] & m_c
        p_part = p_pooled + (i_b * blocks + o_part)[:, None] * (2 * C) + o_c[None, :]
        b_sum += tl.load(p_part, mask=m_part, other=0.0)
        b_largest = tl.maximum(b_largest, tl.load(p_part + C, mask=m_part, other=float("-inf")))
    b_total = tl.sum(b_sum, axis=0)
    # A NaN may be lost to the maxima, but not to the sums.
    b_highest = tl.where(b_total == b_total, tl.max(b_largest, axis=0), b_total)
    DTYPE: tl.constexpr = p_mean.dtype.element_ty
    tl.store(p_mean + i_b * C + o_c, round_to(b_total / cells, DTYPE), mask=o_c < C)
    tl.store(p_highest + i_b * C + o_c, round_to(b_highest, DTYPE), mask=o_c < C)


MAX_CHANNELS = 96  # 128 spill in float16 and bfloat16
MAX_WIDTH = 32
MAX_WINDOW = 32
_POOL = Tiles(64, 32, 4, 1)


def configuration(window: int, channels: int, dtype: torch.dtype) -> Tiles:
    """The tuning of `project` and `stage` for the matrices' type: rows of a block, keys of a tile or hidden channels.

    Chosen from what the compiler reports for the windows and channels of the models; not measured. In float16 and
    bfloat16 the 64 rows are a window of 8 x 8 and what a warpgroup of Hopper multiplies at once. With 96 channels they
    take 240 to 255 registers of four warps, so that two programs share a multiprocessor; 128 rows of eight warps spill,
    and on Blackwell so do windows of 4 x 4 with loads of the MLP in flight and those whose sides are no powers of two.
    Exact float32 products run unrolled on the CUDA cores, where 64 rows are at the limit. None of those compiled puts
    aside more than 16 bytes a thread.
    """
    if dtype == torch.float32:
        return Tiles(32, 32, 8, 1)
    if window & (window - 1) and channels > 64:  # rows and columns of cells come by divisions, which want registers
        return Tiles(32, 32, 4, 1)
    return Tiles(64, 32, 4, 2 if window > 4 else 1, registers=255)


def is_staged(window: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether `project` goes before `stage`: in float32 always, where making q, k and v on the way spills."""
    return window * window > configuration(window, channels, dtype).block_q or dtype == torch.float32


def group(window: int, rows: int) -> int:
    """Windows in a block of rows, each in a power of two of them; one also where a block is but a part of it."""
    return max(1, rows // max(16, triton.next_power_of_2(window * window)))


def why_not(x: Tensor, *, heads: int, window: int, dtype: torch.dtype) -> str | None:
    """None when the kernels can compute with maps like `x`, multiplied in `dtype`, else the reason in one sentence."""
    if (reason := _why_not_sizes(x.shape[-1], heads, window)) is not None:
        return reason
    if dtype not in DTYPES:
        return f"it multiplies in float32, float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    return why_not_on_device("x", x)


def _why_not_sizes(channels: int, heads: int, window: int) -> str | None:
    if channels > MAX_CHANNELS:
        return f"it takes maps of up to {MAX_CHANNELS} channels, got {channels}"
    if channels > MAX_WIDTH * heads:
        return f"it takes head widths of up to {MAX_WIDTH}, got {channels // heads}"
    if window > MAX_WINDOW:
        return f"it takes windows of up to {MAX_WINDOW} x {MAX_WINDOW} cells, got {window} x {window}"
    return None


def forward(x: Tensor, weights: list[Tensor], heads: int, window: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, highest = outputs = _outputs(x, weights, heads, window, eps)
    if out.numel() == 0:
        return outputs
    x, weights = dense_rows(x), [w.contiguous() for w in weights]
    batch, height, width, channels = x.shape
    layers, table = weights[:4] + weights[5:], weights[4]
    named = {name: Layer(*layers[2 * i : 2 * i + 2]) for i, name in enumerate(_LAYERS)}
    dtype, (head, tail) = weights[2].dtype, split_width(channels)
    tiles, staged = configuration(window, channels, dtype), is_staged(window, channels, dtype)
    cut = Cut(height, width, triton.cdiv(height, window), triton.cdiv(width, window))
    together = group(window, tiles.block_q)
    blocks = triton.cdiv(cut.rows * cut.columns, together) * triton.cdiv(window * window, tiles.block_q // together)
    arguments = {
        "x": _map(x),
        "qkv": _map(x.new_empty((batch, height, width, 3 * channels), dtype=dtype)) if staged else None,
        "out": _map(out),
        "p_pooled": x.new_empty((batch, blocks, 2, channels), dtype=torch.float32),
        "p_mean": mean,
        "p_highest": highest,
        "p_table": table.float().t().contiguous(),  # (heads, offsets): the keys of a row of cells lie side by side
        **named,
        "windows": cut,
        "scale": (channels // heads) ** -0.5,
        "eps": float(eps),
        "blocks": blocks,
        "cells": height * width,
        "STAGED": staged,
        "WINDOW": window,
        "GROUP": together,
        "HEADS": heads,
        "HIDDEN": weights[9].shape[0],
        "C": channels,
        "C0": head,
        "C1": tail,
        "D": channels // heads,
        "D0": max(16, triton.next_power_of_2(channels // heads)),
        "ALIGN": row_alignment(x),
    }
    with torch.cuda.device_of(x):
        if staged:
            launch(project_kernel, batch * blocks, tiles, arguments)
        launch(stage_kernel, batch * blocks, tiles, arguments)
        launch(pool_kernel, batch * triton.cdiv(channels, _POOL.block_k), _POOL, arguments)
    return outputs


_MATRICES = (2, 5, 9, 11)
"""Of the weights: those of linear layers, in the type that is multiplied in."""
_LAYERS = ("norm1", "to_qkv", "proj", "norm2", "fc1", "fc2", "norm_out")


def _map(x: Tensor) -> Map:
    return Map(x, *x.stride()[:3])


def _outputs(x: Tensor, weights: list[Tensor], heads: int, window: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    check_window_stage(x, weights, heads, window, DTYPES)
    if any(weight.dtype not in DTYPES for weight in weights) or len({weights[i].dtype for i in _MATRICES}) > 1:
        raise TypeError(f"{OP}: weights must be float32, float16 or bfloat16, and those of linear layers of one type")
    if (reason := _why_not_sizes(x.shape[3], heads, window)) is not None:
        raise ValueError(f"{OP}: the triton backend cannot do this: {reason}")
    pooled = (x.shape[0], x.shape[3])
    return x.new_empty(x.shape), x.new_empty(pooled), x.new_empty(pooled)


define(
    OP,
    "window_stage_triton",
    "(Tensor x, Tensor[] weights, SymInt heads, SymInt window, float eps) -> (Tensor, Tensor, Tensor)",
    forward,
    _outputs,
)
torch.library.register_autograd("lpmflow::window_stage_triton", functools.partial(refuse_gradient, OP))


def window_stage(
    x: Tensor, weights: Sequence[Tensor], *, heads: int, window: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(map, mean, highest) of checked arguments, multiplied in `dtype`; see `lpmflow.ops.window_stage`."""
    matrices = [w.to(dtype) if place in _MATRICES else w for place, w in enumerate(weights)]
    return torch.ops.lpmflow.window_stage_triton(x, matrices, heads, window, eps)
