"""Triton helpers that every kernel shares: tiles of rows, their products, and the interpreter's two gaps.

Names in all kernels: `i_` program index, `o_` offsets, `m_` mask, `p_` pointers, `b_` tile (a block of values).

A tile of rows is a tuple of one or two blocks, because Triton's blocks have sizes in powers of two: rows of width 96
are a head of 64 and a tail of 32, which computes a third less than padding to 128. `split_width` makes the split.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter (TRITON_INTERPRET=1) keeps bfloat16 as its bit pattern and computes with that as if it were the
# number, and rounds to bfloat16 towards zero. So there, tiles are widened when loaded and rounded by hand.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def split_width(width: int) -> tuple[int, int]:
    """(head, tail): powers of two of at least 16 that cover `width` rows, tail 0 where one block does it as cheaply."""
    head = 16
    while 2 * head <= width:
        head *= 2
    if head >= width:
        return head, 0
    tail = max(16, triton.next_power_of_2(width - head))
    return (head, tail) if tail < head else (2 * head, 0)


@triton.jit
def program(tiles, H):
    """(tile, batch and head as one index, batch, head) of a program of a grid (B, H, tiles), tile fastest."""
    i_program = tl.program_id(0)
    i_bh = i_program // tiles
    return i_program % tiles, i_bh.to(tl.int64), (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)


@triton.jit
def load_columns(p_rows, m_rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of rows of width D, zeros outside: [..., ROWS, WIDTH]."""
    o_d = FIRST + tl.arange(0, WIDTH)[None, :]
    m_tile = m_rows & (o_d < D) if FIRST + WIDTH > D else m_rows
    b_tile = tl.load(p_rows + o_d, mask=m_tile, other=0.0)
    return b_tile.to(tl.float32) if INTERPRETED else b_tile


@triton.jit
def load_rows(p, o_rows, stride, rows, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr):
    """Rows of a (rows, D) matrix, dense and `stride` apart, zeros past the last: ([ROWS, D0], [ROWS, D1])."""
    return load_rows_at(p + o_rows.to(tl.int64)[:, None] * stride, (o_rows < rows)[:, None], D, D0, D1, ALIGN)


@triton.jit
def load_rows_at(p_rows, m_rows, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr):
    """The rows of width D that begin at `p_rows` [..., ROWS, 1], dense, zeros where `m_rows` is not set.

    Every row begins at a multiple of ALIGN bytes: 16 lets loads be 16 bytes wide whatever the strides, 1 says nothing.
    """
    if ALIGN > 1:
        p_rows = tl.multiple_of(p_rows, [ALIGN] * len(p_rows.shape))
    if D1 > 0:
        return load_columns(p_rows, m_rows, 0, D0, D), load_columns(p_rows, m_rows, D0, D1, D)
    else:
        return (load_columns(p_rows, m_rows, 0, D0, D),)


@triton.jit
def store_columns(p_rows, m_rows, b_tile, FIRST: tl.constexpr, D: tl.constexpr):
    WIDTH: tl.constexpr = b_tile.shape[-1]
    o_d = FIRST + tl.arange(0, WIDTH)[None, :]
    m_tile = m_rows & (o_d < D) if FIRST + WIDTH > D else m_rows
    tl.store(p_rows + o_d, round_to(b_tile, p_rows.dtype.element_ty), mask=m_tile)


@triton.jit
def store_rows(p, b_rows, o_rows, stride, rows, D: tl.constexpr):
    """The inverse of `load_rows`; rounds to the matrix's type."""
    store_rows_at(p + o_rows.to(tl.int64)[:, None] * stride, (o_rows < rows)[:, None], b_rows, D)


@triton.jit
def store_rows_at(p_rows, m_rows, b_rows, D: tl.constexpr):
    """The inverse of `load_rows_at`; rounds to the type stored."""
    store_columns(p_rows, m_rows, b_rows[0], 0, D)
    if len(b_rows) > 1:
        store_columns(p_rows, m_rows, b_rows[1], b_rows[0].shape[-1], D)


@triton.jit
def zero_rows(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """A tile of rows to accumulate in, float32."""
    if D1 > 0:
        return tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1], tl.float32)
    else:
        return (tl.zeros([ROWS, D0], tl.float32),)


@triton.jit
def scale_rows(b_rows, b_factor):
    """Every row times its own factor [ROWS], or one for all."""
    if len(b_rows) > 1:
        return b_rows[0] * b_factor, b_rows[1] * b_factor
    else:
        return (b_rows[0] * b_factor,)


@triton.jit
def dot_rows(b_a, b_b):
    """a b^T over the whole width, float32: [ROWS_A, ROWS_B]. float32 rows are multiplied exactly, never as TF32."""
    b_c = tl.dot(b_a[0], tl.trans(b_b[0]), input_precision="ieee")
    if len(b_a) > 1:
        b_c = tl.dot(b_a[1], tl.trans(b_b[1]), b_c, input_precision="ieee")
    return b_c


@triton.jit
def sum_products(b_a, b_b):
    """The scalar product of each row of a with the same row of b, in float32: [ROWS]."""
    b_c = tl.sum(b_a[0].to(tl.float32) * b_b[0].to(tl.float32), axis=1)
    if len(b_a) > 1:
        b_c += tl.sum(b_a[1].to(tl.float32) * b_b[1].to(tl.float32), axis=1)
    return b_c


@triton.jit
def add_product(b_sum, b_weights, b_rows, DTYPE: tl.constexpr):
    """sum + weights rows, the weights [ROWS_SUM, ROWS] rounded to DTYPE, the type of the rows."""
    b_w = round_to(b_weights, DTYPE)
    if len(b_sum) > 1:
        return (
            tl.dot(b_w, b_rows[0], b_sum[0], input_precision="ieee"),
            tl.dot(b_w, b_rows[1], b_sum[1], input_precision="ieee"),
        )
    else:
        return (tl.dot(b_w, b_rows[0], b_sum[0], input_precision="ieee"),)


@triton.jit
def product(b_weights, b_rows, DTYPE: tl.constexpr):
    """weights rows, the weights [..., ROWS_SUM, ROWS] rounded to DTYPE, the type of the rows."""
    b_w = round_to(b_weights, DTYPE)
    if len(b_rows) > 1:
        return (
            tl.dot(b_w, b_rows[0], input_precision="ieee"),
            tl.dot(b_w, b_rows[1], input_precision="ieee"),
        )
    else:
        return (tl.dot(b_w, b_rows[0], input_precision="ieee"),)


@triton.jit
def round_to(b, DTYPE: tl.constexpr):
    """float32 `b` in DTYPE, to nearest; in the interpreter with DTYPE's values but still in float32."""
    if not INTERPRETED:
        return b.to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        b_bits = tl.where(b == b, b, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -0x10000
        return tl.where(b == b, b_bits.to(tl.int32).to(tl.float32, bitcast=True), b)
    else:
        return b.to(DTYPE).to(tl.float32)


@triton.jit
def products(b_q, b_k, o_k, M):
    """r of a tile, -inf (so P = 0) where there is no such key: [BLOCK_Q, BLOCK_K]."""
    return tl.where((o_k < M)[None, :], dot_rows(b_q, b_k), float("-inf"))


@triton.jit
def probabilities(b_r, b_largest, b_inverse, exponent):
    """P from r and the stats of its rows."""
    return tl.exp2((b_r - b_largest) * exponent) * b_inverse
