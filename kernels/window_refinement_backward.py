"""The backward kernels of `window_attention`; the formulas and what owns what are on that page."""

from __future__ import annotations

import triton
import triton.language as tl

from lpmflow_kernels._tiles import add_product, dot_rows, load_rows_at, product, scale_rows, store_rows_at
from lpmflow_kernels._windows import (
    LOG2E,
    LOWEST,
    cells_of,
    fill,
    fill_rows,
    heads_of,
    load_bias,
    logits,
    number_of,
    rows_at,
    share_of_program,
)


@triton.jit
def window_kernel(
    # a `Map` each
    qkv, grad, grad_qkv,
    # tensors, the last may be None
    p_table, p_pairs,
    # heads, a `Windows`, D^-0.5
    heads, windows, scale,
    WINDOW: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = qkv.data.dtype.element_ty
    i_head, _, first, end = share_of_program(windows, heads, 1, GROUP)
    o_h = heads_of(i_head, GROUP)
    o_d, c = o_h * D, heads * D
    o_cells = tl.arange(0, BLOCK_Q)

    b_bias = load_bias(p_table, o_h, heads, o_cells[:, None], o_cells[None, :], WINDOW)
    b_sum = tl.zeros_like(b_bias)
    for i_window in range(first, end):
        cells, m_cells = cells_of(i_window, o_cells, windows, WINDOW)
        m_tile = m_cells[:, None] & m_cells[None, :]
        m_rows = m_cells[:, None] & (o_h < heads)
        p_q = rows_at(qkv, cells) + o_d
        b_q = load_rows_at(p_q, m_rows, D, D0, D1, ALIGN)
        b_k = load_rows_at(p_q + c, m_rows, D, D0, D1, ALIGN)
        b_v = load_rows_at(p_q + 2 * c, m_rows, D, D0, D1, ALIGN)
        b_do = load_rows_at(rows_at(grad, cells) + o_d, m_rows, D, D0, D1, ALIGN)

        b_s = logits(b_q, b_k, b_bias, m_cells, scale)
        b_p = tl.exp2((b_s - tl.max(b_s, axis=-1, keep_dims=True)) * LOG2E)
        # Rows that are no cells meet the infinities of those that are, and nothing of theirs may reach a sum.
        b_p = tl.where(m_tile, b_p / tl.sum(b_p, axis=-1, keep_dims=True), 0.0)
        b_dp = dot_rows(b_do, b_v)
        b_ds = tl.where(m_tile, b_p * (b_dp - tl.sum(b_p * b_dp, axis=-1, keep_dims=True)), 0.0)
        b_sum += b_ds
        p_dq = rows_at(grad_qkv, cells) + o_d
        store_rows_at(p_dq, m_rows, scale_rows(product(b_ds, b_k, DTYPE), scale), D)
        store_rows_at(p_dq + c, m_rows, scale_rows(product(tl.trans(b_ds), b_q, DTYPE), scale), D)
        store_rows_at(p_dq + 2 * c, m_rows, product(tl.trans(b_p), b_do, DTYPE), D)
    if p_pairs is not None:
        store_pairs(p_pairs, b_sum, first // windows.run, o_h, heads, o_cells, o_cells, WINDOW)


@triton.jit
def store_pairs(p_pairs, b_sum, i_run, o_h, heads, o_q, o_k, WINDOW: tl.constexpr):
    """A tile of (runs, heads, cells, cells)."""
    CELLS: tl.constexpr = WINDOW * WINDOW
    p_pairs += (i_run * heads + o_h).to(tl.int64) * (CELLS * CELLS)
    m_pairs = (o_q < CELLS)[:, None] & (o_k < CELLS)[None, :] & (o_h < heads)
    tl.store(p_pairs + (o_q[:, None] * CELLS + o_k[None, :]), b_sum, mask=m_pairs)


@triton.jit
def rows_kernel(
    # a `Map` each
    qkv, grad,
    # tensors
    p_table, p_largest, p_inverse, p_delta,
    # heads, a `Windows`, D^-0.5
    heads, windows, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    CELLS: tl.constexpr = WINDOW * WINDOW
    i_head, i_tile, first, end = share_of_program(windows, heads, tl.cdiv(CELLS, BLOCK_Q), 1)
    o_d, c = i_head * D, heads * D
    o_q = i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    for i_window in range(first, end):
        cells, m_q = cells_of(i_window, o_q, windows, WINDOW)
        b_q = load_rows_at(rows_at(qkv, cells) + o_d, m_q[:, None], D, D0, D1, ALIGN)
        b_do = load_rows_at(rows_at(grad, cells) + o_d, m_q[:, None], D, D0, D1, ALIGN)
        b_largest = fill(LOWEST, 1, BLOCK_Q, 1)
        b_sum = fill(0.0, 1, BLOCK_Q, 1)
        b_delta = fill(0.0, 1, BLOCK_Q, 1)
        for first_k in range(0, CELLS, BLOCK_K):
            o_k = first_k + tl.arange(0, BLOCK_K)
            k_cells, m_k = cells_of(i_window, o_k, windows, WINDOW)
            p_k = rows_at(qkv, k_cells) + o_d + c
            b_k = load_rows_at(p_k, m_k[:, None], D, D0, D1, ALIGN)
            b_v = load_rows_at(p_k + c, m_k[:, None], D, D0, D1, ALIGN)
            b_bias = load_bias(p_table, i_head, heads, o_q[:, None], o_k[None, :], WINDOW)
            b_s = logits(b_q, b_k, b_bias, m_k, scale)
            b_new = tl.maximum(b_largest, tl.max(b_s, axis=-1, keep_dims=True))
            b_decay = tl.exp2((b_largest - b_new) * LOG2E)
            b_p = tl.exp2((b_s - b_new) * LOG2E)
            b_sum = b_sum * b_decay + tl.sum(b_p, axis=-1, keep_dims=True)
            b_delta = b_delta * b_decay + tl.sum(b_p * dot_rows(b_do, b_v), axis=-1, keep_dims=True)
            b_largest = b_new
        o_stats = i_head.to(tl.int64) * windows.cells + number_of(cells, windows)[:, None]
        tl.store(p_largest + o_stats, b_largest, mask=m_q[:, None])
        tl.store(p_inverse + o_stats, 1.0 / b_sum, mask=m_q[:, None])
        tl.store(p_delta + o_stats, b_delta / b_sum, mask=m_q[:, None])


@triton.jit
def dq_kernel(
    # a `Map` each
    qkv, grad, grad_qkv,
    # tensors
    p_table, p_largest, p_inverse, p_delta,
    # heads, a `Windows`, D^-0.5
    heads, windows, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    CELLS: tl.constexpr = WINDOW * WINDOW
    i_head, i_tile, first, end = share_of_program(windows, heads, tl.cdiv(CELLS, BLOCK_Q), 1)
    o_d, c = i_head * D, heads * D
    o_q = i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    for i_window in range(first, end):
        cells, m_q = cells_of(i_window, o_q, windows, WINDOW)
        b_q = load_rows_at(rows_at(qkv, cells) + o_d, m_q[:, None], D, D0, D1, ALIGN)
        b_do = load_rows_at(rows_at(grad, cells) + o_d, m_q[:, None], D, D0, D1, ALIGN)
        o_stats = i_head.to(tl.int64) * windows.cells + number_of(cells, windows)
        b_largest = tl.load(p_largest + o_stats, mask=m_q, other=0.0)[:, None]
        b_inverse = tl.load(p_inverse + o_stats, mask=m_q, other=0.0)[:, None]
        b_delta = tl.load(p_delta + o_stats, mask=m_q, other=0.0)[:, None]
        b_dq = fill_rows(0.0, 1, BLOCK_Q, D0, D1)
        for first_k in range(0, CELLS, BLOCK_K):
            o_k = first_k + tl.arange(0, BLOCK_K)
            k_cells, m_k = cells_of(i_window, o_k, windows, WINDOW)
            p_k = rows_at(qkv, k_cells) + o_d + c
            b_k = load_rows_at(p_k, m_k[:, None], D, D0, D1, ALIGN)
            b_v = load_rows_at(p_k + c, m_k[:, None], D, D0, D1, ALIGN)
            b_bias = load_bias(p_table, i_head, heads, o_q[:, None], o_k[None, :], WINDOW)
            b_p = tl.exp2((logits(b_q, b_k, b_bias, m_k, scale) - b_largest) * LOG2E) * b_inverse
            b_dq = add_product(b_dq, b_p * (dot_rows(b_do, b_v) - b_delta), b_k, qkv.data.dtype.element_ty)
        store_rows_at(rows_at(grad_qkv, cells) + o_d, m_q[:, None], scale_rows(b_dq, scale), D)


@triton.jit
def dkv_kernel(
    # a `Map` each
    qkv, grad, grad_qkv,
    # tensors
    p_table, p_largest, p_inverse, p_delta,
    # heads, a `Windows`, D^-0.5
    heads, windows, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    CELLS: tl.constexpr = WINDOW * WINDOW
    DTYPE: tl.constexpr = qkv.data.dtype.element_ty
    i_head, i_tile, first, end = share_of_program(windows, heads, tl.cdiv(CELLS, BLOCK_K), 1)
    o_d, c = i_head * D, heads * D
    o_k = i_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    for i_window in range(first, end):
        cells, m_k = cells_of(i_window, o_k, windows, WINDOW)
        p_k = rows_at(qkv, cells) + o_d + c
        b_k = load_rows_at(p_k, m_k[:, None], D, D0, D1, ALIGN)
        b_v = load_rows_at(p_k + c, m_k[:, None], D, D0, D1, ALIGN)
        b_dk = fill_rows(0.0, 1, BLOCK_K, D0, D1)
        b_dv = fill_rows(0.0, 1, BLOCK_K, D0, D1)
        for first_q in range(0, CELLS, BLOCK_Q):
            o_q = first_q + tl.arange(0, BLOCK_Q)
            q_cells, m_q = cells_of(i_window, o_q, windows, WINDOW)
            b_q = load_rows_at(rows_at(qkv, q_cells) + o_d, m_q[:, None], D, D0, D1, ALIGN)
            b_do = load_rows_at(rows_at(grad, q_cells) + o_d, m_q[:, None], D, D0, D1, ALIGN)
            # Everything transposed: keys along the rows, so that no tile is turned in registers.
            b_bias = load_bias(p_table, i_head, heads, o_q[None, :], o_k[:, None], WINDOW)
            o_stats = i_head.to(tl.int64) * windows.cells + number_of(q_cells, windows)
            b_largest = tl.load(p_largest + o_stats, mask=m_q, other=0.0)[None, :]
            b_inverse = tl.load(p_inverse + o_stats, mask=m_q, other=0.0)[None, :]
            b_delta = tl.load(p_delta + o_stats, mask=m_q, other=0.0)[None, :]
            b_p = tl.exp2((dot_rows(b_k, b_q) * scale + b_bias - b_largest) * LOG2E) * b_inverse
            b_p = tl.where(m_q[None, :], b_p, 0.0)
            b_dv = add_product(b_dv, b_p, b_do, DTYPE)
            b_ds = tl.where(m_q[None, :], b_p * (dot_rows(b_v, b_do) - b_delta), 0.0)
            b_dk = add_product(b_dk, b_ds, b_q, DTYPE)
        p_dk = rows_at(grad_qkv, cells) + o_d + c
        store_rows_at(p_dk, m_k[:, None], scale_rows(b_dk, scale), D)
        store_rows_at(p_dk + c, m_k[:, None], b_dv, D)


@triton.jit
def pairs_kernel(
    # a `Map` each
    qkv, grad,
    # tensors
    p_table, p_largest, p_inverse, p_delta, p_pairs,
    # heads, a `Windows`, D^-0.5
    heads, windows, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    CELLS: tl.constexpr = WINDOW * WINDOW
    tiles_k = tl.cdiv(CELLS, BLOCK_K)
    i_head, i_tile, first, end = share_of_program(windows, heads, tl.cdiv(CELLS, BLOCK_Q) * tiles_k, 1)
    o_d, c = i_head * D, heads * D
    o_q = i_tile // tiles_k * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_k = i_tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)

    b_bias = load_bias(p_table, i_head, heads, o_q[:, None], o_k[None, :], WINDOW)
    b_sum = tl.zeros_like(b_bias)
    for i_window in range(first, end):
        cells, m_q = cells_of(i_window, o_q, windows, WINDOW)
        k_cells, m_k = cells_of(i_window, o_k, windows, WINDOW)
        p_k = rows_at(qkv, k_cells) + o_d + c
        b_q = load_rows_at(rows_at(qkv, cells) + o_d, m_q[:, None], D, D0, D1, ALIGN)
        b_k = load_rows_at(p_k, m_k[:, None], D, D0, D1, ALIGN)
        b_v = load_rows_at(p_k + c, m_k[:, None], D, D0, D1, ALIGN)
        b_do = load_rows_at(rows_at(grad, cells) + o_d, m_q[:, None], D, D0, D1, ALIGN)
        o_stats = i_head.to(tl.int64) * windows.cells + number_of(cells, windows)
        b_largest = tl.load(p_largest + o_stats, mask=m_q, other=0.0)[:, None]
        b_inverse = tl.load(p_inverse + o_stats, mask=m_q, other=0.0)[:, None]
        b_delta = tl.load(p_delta + o_stats, mask=m_q, other=0.0)[:, None]
        b_p = tl.exp2((logits(b_q, b_k, b_bias, m_k, scale) - b_largest) * LOG2E) * b_inverse
        b_sum += tl.where(m_q[:, None] & m_k[None, :], b_p * (dot_rows(b_do, b_v) - b_delta), 0.0)
    store_pairs(p_pairs, b_sum, first // windows.run, i_head, heads, o_q, o_k, WINDOW)


@triton.jit
def grad_table_kernel(
    # (heads, cells, cells) and (offsets, heads)
    p_pairs, p_grad_table,
    heads,
    WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    CELLS: tl.constexpr = WINDOW * WINDOW
    SIDE: tl.constexpr = 2 * WINDOW - 1
    i_head, i_dr = tl.program_id(0) // SIDE, tl.program_id(0) % SIDE
    d_r = i_dr - (WINDOW - 1)
    o_c = tl.arange(0, BLOCK_Q)[:, None]  # columns of queries
    o_dc = tl.arange(0, BLOCK_K)  # columns of offsets
    o_key = o_c - o_dc[None, :] + (WINDOW - 1)
    m_pairs = (o_c < WINDOW) & (o_dc < SIDE)[None, :] & (o_key >= 0) & (o_key < WINDOW)
    p_pairs += i_head.to(tl.int64) * (CELLS * CELLS) + o_c * CELLS + o_key

    b_sum = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for r in range(tl.maximum(d_r, 0), tl.minimum(WINDOW, WINDOW + d_r)):
        b_sum += tl.load(p_pairs + (r * WINDOW * CELLS + (r - d_r) * WINDOW), mask=m_pairs, other=0.0)
    p_grad_table += (i_dr * SIDE + o_dc) * heads + i_head
    tl.store(p_grad_table, tl.sum(b_sum, axis=0), mask=o_dc < SIDE)
