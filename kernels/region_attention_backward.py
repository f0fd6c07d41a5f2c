"""The three backward kernels of `region_attention`; the formulas and what owns what are on that page."""

from __future__ import annotations

import triton
import triton.language as tl

from lpmflow_kernels._region_bias import load_bias, load_key_places, load_query_places, logits
from lpmflow_kernels._tiles import (
    add_product,
    dot_rows,
    load_rows,
    probabilities,
    program,
    scale_rows,
    store_rows,
    sum_products,
    zero_rows,
)


@triton.jit
def dq_kernel(
    # tensors
    p_q, p_k, p_v, p_laid, p_query, p_key, p_attended, p_largest, p_inverse, p_do, p_delta, p_dq,
    # sizes
    H, N, offsets,
    # strides
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_tb, stride_th, stride_tn, stride_ob, stride_oh, stride_on,
    # scale, and log2(e)
    scale, exponent,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tile, i_bh, i_b, i_h = program(tl.cdiv(N, BLOCK_Q), H)
    o_q = i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_stats = i_bh * N + o_q
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_laid += i_h * 4 * offsets

    b_do = load_rows(p_do + i_b * stride_ob + i_h * stride_oh, o_q, stride_on, N, D, D0, D1, ALIGN)
    b_attended = load_rows(p_attended + i_b * stride_tb + i_h * stride_th, o_q, stride_tn, N, D, D0, D1, ALIGN)
    b_delta = sum_products(b_do, b_attended)
    tl.store(p_delta + o_stats, b_delta, mask=o_q < N)
    b_delta = b_delta[:, None]
    b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, o_q, stride_qn, N, D, D0, D1, ALIGN)
    b_query = load_query_places(p_query, o_q, N)[:, None]
    b_largest = tl.load(p_largest + o_stats, mask=o_q < N, other=0.0)[:, None]
    b_inverse = tl.load(p_inverse + o_stats, mask=o_q < N, other=0.0)[:, None]
    b_dq = zero_rows(BLOCK_Q, D0, D1)
    for first in range(0, N, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        b_k = load_rows(p_k, o_k, stride_kn, N, D, D0, D1, ALIGN)
        b_v = load_rows(p_v, o_k, stride_vn, N, D, D0, D1, ALIGN)
        b_bias = load_bias(p_laid, b_query, load_key_places(p_key, o_k, N)[None, :])
        b_u = logits(dot_rows(b_q, b_k), b_bias, (o_k < N)[None, :], scale)
        b_du = probabilities(b_u, b_largest, b_inverse, exponent) * (dot_rows(b_do, b_v) - b_delta)
        b_dq = add_product(b_dq, b_du, b_k, p_k.dtype.element_ty)
    store_rows(p_dq + i_bh * N * D, scale_rows(b_dq, scale), o_q, D, N, D)


@triton.jit
def dkv_kernel(
    # tensors
    p_q, p_k, p_v, p_laid, p_query, p_key, p_largest, p_inverse, p_do, p_delta, p_dk, p_dv,
    # sizes
    H, N, offsets,
    # strides
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    # scale, and log2(e)
    scale, exponent,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tile, i_bh, i_b, i_h = program(tl.cdiv(N, BLOCK_K), H)
    o_k = i_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    p_q += i_b * stride_qb + i_h * stride_qh
    p_do += i_b * stride_ob + i_h * stride_oh
    p_laid += i_h * 4 * offsets

    b_k = load_rows(p_k + i_b * stride_kb + i_h * stride_kh, o_k, stride_kn, N, D, D0, D1, ALIGN)
    b_v = load_rows(p_v + i_b * stride_vb + i_h * stride_vh, o_k, stride_vn, N, D, D0, D1, ALIGN)
    b_key = load_key_places(p_key, o_k, N)[:, None]
    b_dk = zero_rows(BLOCK_K, D0, D1)
    b_dv = zero_rows(BLOCK_K, D0, D1)
    for first in range(0, N, BLOCK_Q):
        o_q = first + tl.arange(0, BLOCK_Q)
        o_stats = i_bh * N + o_q
        b_q = load_rows(p_q, o_q, stride_qn, N, D, D0, D1, ALIGN)
        b_do = load_rows(p_do, o_q, stride_on, N, D, D0, D1, ALIGN)
        b_largest = tl.load(p_largest + o_stats, mask=o_q < N, other=0.0)[None, :]
        b_inverse = tl.load(p_inverse + o_stats, mask=o_q < N, other=0.0)[None, :]
        b_delta = tl.load(p_delta + o_stats, mask=o_q < N, other=0.0)[None, :]
        # Everything transposed: keys along the rows, so that no tile is turned in registers.
        b_bias = load_bias(p_laid, load_query_places(p_query, o_q, N)[None, :], b_key)
        b_u = logits(dot_rows(b_k, b_q), b_bias, (o_q < N)[None, :], scale)
        b_p = probabilities(b_u, b_largest, b_inverse, exponent)
        b_dv = add_product(b_dv, b_p, b_do, p_do.dtype.element_ty)
        b_dk = add_product(b_dk, b_p * (dot_rows(b_v, b_do) - b_delta), b_q, p_q.dtype.element_ty)
    store_rows(p_dk + i_bh * N * D, scale_rows(b_dk, scale), o_k, D, N, D)
    store_rows(p_dv + i_bh * N * D, b_dv, o_k, D, N, D)


@triton.jit
def image_of(i_image, prefix, first_target, hs, ws, ht, wt):
    """(first patch, height, width) of the source, 0, or the target, 1."""
    is_source = i_image == 0
    return tl.where(is_source, prefix, first_target), tl.where(is_source, hs, ht), tl.where(is_source, ws, wt)


@triton.jit
def shared_tiles(shift, tiles_q, tiles_k):
    """(first, count) of the tiles of queries that lie `shift` after one of keys, along one axis."""
    first = tl.maximum(shift, 0)
    return first, tl.maximum(tl.minimum(tiles_q, tiles_k + shift) - first, 0)


@triton.jit
def patches(o_r, o_c, first, height, width, N):
    """The tokens of patches (o_r, o_c), N where there are none."""
    return tl.where((o_r < height) & (o_c < width), first + o_r * width + o_c, N)


@triton.jit
def dtable_kernel(
    # tensors
    p_q, p_k, p_v, p_laid, p_largest, p_inverse, p_do, p_delta, p_partial,
    # sizes: of the inputs, of the table, of the images
    B, H, N, offsets, across, hm, wm, prefix, first_target, hs, ws, ht, wt,
    # parts of the batch, tiles along the larger sides of the grids
    parts, tiles_r, tiles_c,
    # strides
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    # scale, and log2(e)
    scale, exponent,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    # of patches in a tile; together BLOCK_Q, which is BLOCK_K
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    shifts_r, shifts_c = 2 * tiles_r - 1, 2 * tiles_c - 1
    i_program = tl.program_id(0)
    shift_r = i_program // shifts_c % shifts_r - (tiles_r - 1)
    shift_c = i_program % shifts_c - (tiles_c - 1)
    i_program = i_program // (shifts_r * shifts_c)
    i_region = i_program % 4
    i_h = (i_program // 4 % H).to(tl.int64)
    i_part = i_program // 4 // H
    first_q, h_q, w_q = image_of(i_region // 2, prefix, first_target, hs, ws, ht, wt)
    first_k, h_k, w_k = image_of(i_region % 2, prefix, first_target, hs, ws, ht, wt)
    tile_r, count_r = shared_tiles(shift_r, tl.cdiv(h_q, ROWS), tl.cdiv(h_k, ROWS))
    tile_c, count_c = shared_tiles(shift_c, tl.cdiv(w_q, COLUMNS), tl.cdiv(w_k, COLUMNS))
    pairs = count_r * count_c

    o_r, o_c = tl.arange(0, BLOCK_Q) // COLUMNS, tl.arange(0, BLOCK_Q) % COLUMNS
    o_down = shift_r * ROWS + o_r[:, None] - o_r[None, :]  # r - r', the same for all pairs of tiles
    o_right = shift_c * COLUMNS + o_c[:, None] - o_c[None, :]
    m_bias = (tl.abs(o_down) < hm) & (tl.abs(o_right) < wm)
    p_laid += (4 * i_h + i_region) * offsets + (hm - 1) * across + wm - 1
    b_bias = tl.load(p_laid + o_down * across + o_right, mask=m_bias, other=0.0)
    b_sum = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for step in range(0, tl.cdiv(B - i_part, parts) * pairs):
        i_b = (i_part + step // pairs * parts).to(tl.int64)
        r_q = (tile_r + step % pairs // count_c) * ROWS + o_r
        c_q = (tile_c + step % pairs % count_c) * COLUMNS + o_c
        o_q = patches(r_q, c_q, first_q, h_q, w_q, N)
        o_k = patches(r_q - shift_r * ROWS, c_q - shift_c * COLUMNS, first_k, h_k, w_k, N)
        b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, o_q, stride_qn, N, D, D0, D1, ALIGN)
        b_k = load_rows(p_k + i_b * stride_kb + i_h * stride_kh, o_k, stride_kn, N, D, D0, D1, ALIGN)
        b_v = load_rows(p_v + i_b * stride_vb + i_h * stride_vh, o_k, stride_vn, N, D, D0, D1, ALIGN)
        b_do = load_rows(p_do + i_b * stride_ob + i_h * stride_oh, o_q, stride_on, N, D, D0, D1, ALIGN)
        o_stats = (i_b * H + i_h) * N + o_q
        b_largest = tl.load(p_largest + o_stats, mask=o_q < N, other=0.0)[:, None]
        b_inverse = tl.load(p_inverse + o_stats, mask=o_q < N, other=0.0)[:, None]
        b_delta = tl.load(p_delta + o_stats, mask=o_q < N, other=0.0)[:, None]
        m_tile = (o_q < N)[:, None] & (o_k < N)[None, :]
        b_p = probabilities(dot_rows(b_q, b_k) * scale + b_bias, b_largest, b_inverse, exponent)
        b_sum += tl.where(m_tile, b_p * (dot_rows(b_do, b_v) - b_delta), 0.0)

    if pairs > 0:
        # Sums over the pairs of a column: of each query, the key that is (x_r, x_c) before it in its tile.
        p_partial += (i_part * 4 * H + i_h) * 4 * offsets + i_region
        for first in range(0, 4 * BLOCK_Q, BLOCK_K):
            o_x = first + tl.arange(0, BLOCK_K)
            x_r, x_c = o_x // (2 * COLUMNS) - ROWS, o_x % (2 * COLUMNS) - COLUMNS
            k_r, k_c = o_r[:, None] - x_r[None, :], o_c[:, None] - x_c[None, :]
            m_key = (k_r >= 0) & (k_r < ROWS) & (k_c >= 0) & (k_c < COLUMNS)
            b_du = tl.gather(b_sum, tl.where(m_key, k_r * COLUMNS + k_c, 0), axis=1)
            b_entry = tl.sum(tl.where(m_key, b_du, 0.0), axis=0)
            d_r, d_c = shift_r * ROWS + x_r, shift_c * COLUMNS + x_c
            m_entry = (tl.abs(d_r) < hm) & (tl.abs(d_c) < wm)
            o_entry = (d_r + hm - 1) * across + d_c + wm - 1
            i_place = 2 * (x_r < 0).to(tl.int64) + (x_c < 0).to(tl.int64)
            tl.store(p_partial + (i_place * H * offsets + o_entry) * 4, b_entry, mask=m_entry)
