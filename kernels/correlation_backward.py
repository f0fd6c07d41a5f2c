"""The three backward kernels of `correlation`; the formulas and what owns what are on that page."""

from __future__ import annotations

import triton
import triton.language as tl

from lpmflow_kernels._tiles import (
    add_product,
    dot_rows,
    load_rows,
    probabilities,
    products,
    program,
    scale_rows,
    store_rows,
    sum_products,
    zero_rows,
)


@triton.jit
def load_map(p, o_q, o_k, stride_n, stride_m, N, M, prefix):
    """Elements (o_q, o_k), of broadcastable shapes, of a map without the first `prefix` rows and columns, there 0."""
    m_map = ((o_q >= prefix) & (o_q < N)) & ((o_k >= prefix) & (o_k < M))
    p_map = p + (o_q - prefix).to(tl.int64) * stride_n + (o_k - prefix).to(tl.int64) * stride_m
    return tl.load(p_map, mask=m_map, other=0.0)


@triton.jit
def delta_kernel(
    # tensors; p_do and p_da may be None
    p_q, p_k, p_attended, p_largest, p_inverse, p_do, p_da, p_delta,
    # sizes
    H, N, M, prefix,
    # strides
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_km,
    stride_ob, stride_oh, stride_on, stride_ab, stride_an, stride_am,
    # scale log2(e)
    exponent,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tile, i_bh, i_b, i_h = program(tl.cdiv(N, BLOCK_Q), H)
    o_q = i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_stats = i_bh * N + o_q

    b_delta = tl.zeros([BLOCK_Q], tl.float32)
    if p_do is not None:
        b_do = load_rows(p_do + i_b * stride_ob + i_h * stride_oh, o_q, stride_on, N, D, D0, D1, ALIGN)
        b_delta += sum_products(b_do, load_rows(p_attended + i_bh * N * D, o_q, D, N, D, D0, D1, ALIGN))
    if p_da is not None:
        p_k += i_b * stride_kb + i_h * stride_kh
        p_da += i_b * stride_ab
        b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, o_q, stride_qn, N, D, D0, D1, ALIGN)
        b_largest = tl.load(p_largest + o_stats, mask=o_q < N, other=0.0)[:, None]
        b_inverse = tl.load(p_inverse + o_stats, mask=o_q < N, other=0.0)[:, None]
        for first in range(0, M, BLOCK_K):
            o_k = first + tl.arange(0, BLOCK_K)
            b_k = load_rows(p_k, o_k, stride_km, M, D, D0, D1, ALIGN)
            b_da = load_map(p_da, o_q[:, None], o_k[None, :], stride_an, stride_am, N, M, prefix)
            b_p = probabilities(products(b_q, b_k, o_k, M), b_largest, b_inverse, exponent)
            b_delta += tl.sum(b_p * b_da, axis=1)
    tl.store(p_delta + o_stats, b_delta, mask=o_q < N)


@triton.jit
def dq_kernel(
    # tensors; p_do and p_da may be None
    p_q, p_k, p_v, p_largest, p_inverse, p_do, p_da, p_delta, p_dq,
    # sizes
    H, N, M, prefix,
    # strides
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    stride_ob, stride_oh, stride_on, stride_ab, stride_an, stride_am,
    # scale, and scale log2(e)
    scale, exponent,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tile, i_bh, i_b, i_h = program(tl.cdiv(N, BLOCK_Q), H)
    o_q = i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_stats = i_bh * N + o_q
    p_k += i_b * stride_kb + i_h * stride_kh

    b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, o_q, stride_qn, N, D, D0, D1, ALIGN)
    b_largest = tl.load(p_largest + o_stats, mask=o_q < N, other=0.0)[:, None]
    b_inverse = tl.load(p_inverse + o_stats, mask=o_q < N, other=0.0)[:, None]
    b_delta = tl.load(p_delta + o_stats, mask=o_q < N, other=0.0)[:, None]
    if p_do is not None:
        p_v += i_b * stride_vb + i_h * stride_vh
        b_do = load_rows(p_do + i_b * stride_ob + i_h * stride_oh, o_q, stride_on, N, D, D0, D1, ALIGN)
    if p_da is not None:
        p_da += i_b * stride_ab
    b_dq = zero_rows(BLOCK_Q, D0, D1)
    for first in range(0, M, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        b_k = load_rows(p_k, o_k, stride_km, M, D, D0, D1, ALIGN)
        b_p = probabilities(products(b_q, b_k, o_k, M), b_largest, b_inverse, exponent)
        b_dp = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        if p_do is not None:
            b_dp += dot_rows(b_do, load_rows(p_v, o_k, stride_vm, M, D, D0, D1, ALIGN))
        if p_da is not None:
            b_dp += load_map(p_da, o_q[:, None], o_k[None, :], stride_an, stride_am, N, M, prefix)
        b_dq = add_product(b_dq, b_p * (b_dp - b_delta), b_k, p_k.dtype.element_ty)
    store_rows(p_dq + i_bh * N * D, scale_rows(b_dq, scale), o_q, D, N, D)


@triton.jit
def dkv_kernel(
    # tensors; p_do (then p_dv too) and p_da may be None
    p_q, p_k, p_v, p_largest, p_inverse, p_do, p_da, p_delta, p_dk, p_dv,
    # sizes
    H, N, M, prefix,
    # strides
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    stride_ob, stride_oh, stride_on, stride_ab, stride_an, stride_am,
    # scale, and scale log2(e)
    scale, exponent,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tile, i_bh, i_b, i_h = program(tl.cdiv(M, BLOCK_K), H)
    o_k = i_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    p_q += i_b * stride_qb + i_h * stride_qh

    b_k = load_rows(p_k + i_b * stride_kb + i_h * stride_kh, o_k, stride_km, M, D, D0, D1, ALIGN)
    b_dk = zero_rows(BLOCK_K, D0, D1)
    if p_do is not None:
        p_do += i_b * stride_ob + i_h * stride_oh
        b_v = load_rows(p_v + i_b * stride_vb + i_h * stride_vh, o_k, stride_vm, M, D, D0, D1, ALIGN)
        b_dv = zero_rows(BLOCK_K, D0, D1)
    if p_da is not None:
        p_da += i_b * stride_ab
    for first in range(0, N, BLOCK_Q):
        o_q = first + tl.arange(0, BLOCK_Q)
        o_stats = i_bh * N + o_q
        b_q = load_rows(p_q, o_q, stride_qn, N, D, D0, D1, ALIGN)
        b_largest = tl.load(p_largest + o_stats, mask=o_q < N, other=0.0)[None, :]
        b_inverse = tl.load(p_inverse + o_stats, mask=o_q < N, other=0.0)[None, :]
        b_delta = tl.load(p_delta + o_stats, mask=o_q < N, other=0.0)[None, :]
        # Everything transposed: keys along the rows, so that no tile is turned in registers.
        b_p = probabilities(dot_rows(b_k, b_q), b_largest, b_inverse, exponent)
        b_dp = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
        if p_do is not None:
            b_do = load_rows(p_do, o_q, stride_on, N, D, D0, D1, ALIGN)
            b_dv = add_product(b_dv, b_p, b_do, p_do.dtype.element_ty)
            b_dp += dot_rows(b_v, b_do)
        if p_da is not None:
            b_dp += load_map(p_da, o_q[None, :], o_k[:, None], stride_an, stride_am, N, M, prefix)
        b_dk = add_product(b_dk, b_p * (b_dp - b_delta), b_q, p_q.dtype.element_ty)
    store_rows(p_dk + i_bh * M * D, scale_rows(b_dk, scale), o_k, D, M, D)
    if p_do is not None:
        store_rows(p_dv + i_bh * M * D, b_dv, o_k, D, M, D)
