"""The region bias by index arithmetic, for the Triton kernels: a table laid out for them, and each token's place in it.

`region_attention` has a bias for a query patch (r, c) of image a and a key patch (r', c') of image b. It is in column
4 (across (r - r' + hm - 1) + c - c' + wm - 1) + 2 a + b of a head's table, with hm and wm the larger sides of the two
grids and across = 2 wm - 1. The kernels read tiles of it, of a few rows of patches each. For that the four regions,
which lie beside each other, are taken apart, so that a row of keys reads a run: laid[h, 2 a + b, offset].

    place of query    2 a offsets + across (r + hm - 1) + c + wm - 1
    place of key                         across r' + c' - b offsets
    offset in a head's table = place of query - place of key

with offsets = (2 hm - 1) across. Tokens that are no patches get places so far away that the difference is negative.
Rows and columns of a token are divisions, which are made once here, not once for every tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(1 << 30)


@triton.jit
def lay_out_kernel(
    # the table (H, offsets, 4), the same as (H, 4, offsets), and the places (N) of tokens as queries and as keys
    p_table, p_laid, p_query, p_key,
    # sizes; all entries of the table
    N, entries, offsets, across, prefix,
    # the first target patch, patches in a row, the place of a query at (0, 0)
    first_target, ws, wt, middle,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_K entries of the table and as many tokens."""
    o = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_column = o % (4 * offsets)
    b_table = tl.load(p_table + o, mask=o < entries, other=0.0)
    tl.store(p_laid + o - o_column + o_column % 4 * offsets + o_column // 4, b_table, mask=o < entries)

    m_target = o >= first_target - prefix
    o_cell = o - tl.where(m_target, first_target, prefix)
    b_width = tl.where(m_target, wt, ws)
    b_place = o_cell // b_width * across + o_cell % b_width
    b_image = tl.where(m_target, offsets, 0)
    tl.store(p_query + o, tl.where(o_cell >= 0, b_place + middle + 2 * b_image, -NOWHERE).to(tl.int32), mask=o < N)
    tl.store(p_key + o, tl.where(o_cell >= 0, b_place - b_image, NOWHERE).to(tl.int32), mask=o < N)


@triton.jit
def load_query_places(p_query, o_q, N):
    return tl.load(p_query + o_q, mask=o_q < N, other=-NOWHERE)


@triton.jit
def load_key_places(p_key, o_k, N):
    return tl.load(p_key + o_k, mask=o_k < N, other=NOWHERE)


@triton.jit
def load_bias(p_laid, b_query, b_key):
    """The bias between places, of broadcastable shapes, from one head's table; 0 where either is no patch."""
    o_bias = b_query - b_key
    return tl.load(p_laid + o_bias, mask=o_bias >= 0, other=0.0)


@triton.jit
def logits(b_r, b_bias, m_tokens, scale):
    """scale r + bias of a tile, -inf (so P = 0) where there is no such token."""
    return tl.where(m_tokens, b_r * scale + b_bias, float("-inf"))
