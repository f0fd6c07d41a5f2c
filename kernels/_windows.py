"""Triton helpers of `window_attention`: the cells of a window, the heads of a group, the logits of their pairs.

A tile is of one head, [ROWS, COLUMNS], where GROUP is 1, and else of GROUP heads, [GROUP, ROWS, COLUMNS]. All that
comes after the heads is written once for both, because a block of lower rank gets its missing axes on the left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lpmflow_kernels._tiles import dot_rows

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that tiles of nothing but -inf may come first


class Map(NamedTuple):
    """A map (B, height, width, channels) with a dense last dimension, as the kernels are told of it."""

    data: Any
    stride_b: int
    stride_r: int
    stride_c: int


class Windows(NamedTuple):
    """How maps are cut into windows, and these given to programs."""

    height: int
    width: int
    # windows along the height and along the width, and cells that the first ones begin before the map
    rows: int
    columns: int
    lead: int
    # windows of all maps, those that one program visits, one after another, and cells of all maps
    count: int
    run: int
    cells: int


@triton.jit
def share_of_program(windows, heads, tiles, GROUP: tl.constexpr):
    """(first head, tile, first window, end) of a program of a grid (runs, tiles, groups of heads), groups fastest."""
    i_program = tl.program_id(0)
    groups = tl.cdiv(heads, GROUP)
    first = i_program // (groups * tiles) * windows.run
    end = tl.minimum(first + windows.run, windows.count)
    return i_program % groups * GROUP, i_program // groups % tiles, first, end


@triton.jit
def heads_of(i_head, GROUP: tl.constexpr):
    """The heads of a group, from its first one: a number where there is one, else [GROUP, 1, 1]."""
    if GROUP > 1:
        return (i_head + tl.arange(0, GROUP))[:, None, None]
    else:
        return i_head


@triton.jit
def cells_of(i_window, o_cells, windows, WINDOW: tl.constexpr):
    """(map, rows, columns) of cells of a window, which are counted row by row, and which of them there are."""
    i_b = (i_window // (windows.rows * windows.columns)).to(tl.int64)
    o_r = i_window // windows.columns % windows.rows * WINDOW - windows.lead + o_cells // WINDOW
    o_c = i_window % windows.columns * WINDOW - windows.lead + o_cells % WINDOW
    m_cells = (o_cells < WINDOW * WINDOW) & (o_r >= 0) & (o_r < windows.height) & (o_c >= 0) & (o_c < windows.width)
    return (i_b, o_r.to(tl.int64), o_c.to(tl.int64)), m_cells


@triton.jit
def rows_at(map, cells):
    """Where the channels of cells begin: [CELLS, 1]."""
    i_b, o_r, o_c = cells
    return map.data + i_b * map.stride_b + (o_r * map.stride_r + o_c * map.stride_c)[:, None]


@triton.jit
def number_of(cells, windows):
    """The place of cells in a contiguous (B, height, width): [CELLS]."""
    i_b, o_r, o_c = cells
    return (i_b * windows.height + o_r) * windows.width + o_c


@triton.jit
def load_bias(p_table, o_h, heads, o_queries, o_keys, WINDOW: tl.constexpr):
    """The bias of pairs of cells, of shapes that are broadcast, from a table (heads, (2 WINDOW - 1)^2)."""
    SIDE: tl.constexpr = 2 * WINDOW - 1
    o_query = o_queries // WINDOW * SIDE + o_queries % WINDOW
    o_key = o_keys // WINDOW * SIDE + o_keys % WINDOW
    m_pairs = (o_queries < WINDOW * WINDOW) & (o_keys < WINDOW * WINDOW) & (o_h < heads)
    return tl.load(
        p_table + o_h * (SIDE * SIDE) + (o_query - o_key + (WINDOW - 1) * (SIDE + 1)), mask=m_pairs, other=0.0
    )


@triton.jit
def logits(b_q, b_k, b_bias, m_keys, scale):
    """Those of queries and keys, -inf for keys that are no cells: [..., QUERIES, KEYS]."""
    return tl.where(m_keys[None, :], dot_rows(b_q, b_k) * scale + b_bias, float("-inf"))


@triton.jit
def fill(value, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of one value, float32."""
    if GROUP > 1:
        return tl.full([GROUP, ROWS, COLUMNS], value, tl.float32)
    else:
        return tl.full([ROWS, COLUMNS], value, tl.float32)


@triton.jit
def fill_rows(value, GROUP: tl.constexpr, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """A tile of rows of one value, float32."""
    if D1 > 0:
        return fill(value, GROUP, ROWS, D0), fill(value, GROUP, ROWS, D1)
    else:
        return (fill(value, GROUP, ROWS, D0),)
