"""The two backward kernels of `cross_scale_fusion`; the formulas and what owns what are on that page."""

from __future__ import annotations

import triton
import triton.language as tl

from lpmflow_kernels._interpolate import (
    fine_cells,
    first_fine,
    is_read,
    load_sources,
    low_cell,
    mix_sources,
    rows_of_group,
    share_of_next,
    tile_offsets,
    transpose_weights,
)
from lpmflow_kernels._tiles import round_to


@triton.jit
def probabilities(b_sources, m_tile, down, right, p_largest, p_confidence, exponent):
    """p of an output source cell, 0 where there is no target cell: [BLOCK_H, BLOCK_W]."""
    b_u = tl.where(m_tile, mix_sources(b_sources, down, right), float("-inf"))
    return tl.exp2((b_u - tl.load(p_largest)) * exponent) * tl.load(p_confidence)


@triton.jit
def cell_gradient(b_p, b_x, b_y, p_grad, p_mapping, cells):
    """dL/du of an output source cell, times the temperature."""
    b_pull_x = (b_x - tl.load(p_mapping)) * tl.load(p_grad)
    b_pull_y = (b_y - tl.load(p_mapping + cells)) * tl.load(p_grad + cells)
    return b_p * (b_pull_x[None, :] + b_pull_y[:, None])


@triton.jit
def source_gradient(
    o_i, o_j, a_r, a_c, i_cells, scale, p_corr,
    p_grad, p_x, p_y, p_mapping, p_confidence, p_largest,
    h, w, first_row, rows, exponent,
    SAME_SOURCE: tl.constexpr, SAME_TARGET: tl.constexpr,
):  # fmt: skip
    """The gradient of the row of coarse source cell (a_r, a_c), still at output target cells (o_i, o_j)."""
    cells = rows * w
    p_grad += 2 * i_cells
    p_mapping += 2 * i_cells
    p_confidence += i_cells
    p_largest += i_cells
    b_x = tl.load(p_x + o_j, mask=o_j < w, other=0.0)
    b_y = tl.load(p_y + o_i, mask=o_i < h, other=0.0)
    m_tile = (o_i < h)[:, None] & (o_j < w)[None, :]
    offsets = tile_offsets(o_i, o_j, scale, h, w, SAME_TARGET)
    if SAME_SOURCE:
        r = a_r - first_row
        m_row = (r >= 0) & (r < rows)
        i_cell = tl.minimum(tl.maximum(r, 0), rows - 1) * w + a_c
        b_sources = load_sources(p_corr, a_r, a_c, scale, h, w, offsets, SAME_SOURCE, SAME_TARGET)
        b_p = probabilities(b_sources, m_tile, 0.0, 0.0, p_largest + i_cell, p_confidence + i_cell, exponent)
        b_grad = cell_gradient(b_p, b_x, b_y, p_grad + i_cell, p_mapping + i_cell, cells)
        return tl.where(m_row, b_grad, 0.0)
    else:
        b_grad = tl.zeros([o_i.shape[0], o_j.shape[0]], tl.float32)
        for quarter in range(0, 4):  # output cells before and after the coarse one, in both directions
            low_r, low_c = a_r - 1 + quarter // 2, a_c - 1 + quarter % 2
            r_first, r_end = cells_with_share(low_r, a_r, scale.step_r, scale.hs, h)
            c_first, c_end = cells_with_share(low_c, a_c, scale.step_c, scale.ws, w)
            here_r, here_c = tl.maximum(low_r, 0), tl.maximum(low_c, 0)  # before the first there are no output cells
            b_sources = load_sources(p_corr, here_r, here_c, scale, h, w, offsets, SAME_SOURCE, SAME_TARGET)
            for r in range(tl.maximum(r_first, first_row), tl.minimum(r_end, first_row + rows)):
                down = share_of_next(r, scale.step_r, low_r)
                share_r = own_share(down, low_r, a_r, scale.hs)
                for c in range(c_first, c_end):
                    right = share_of_next(c, scale.step_c, low_c)
                    share = share_r * own_share(right, low_c, a_c, scale.ws)
                    i_cell = (r - first_row) * w + c
                    b_p = probabilities(
                        b_sources, m_tile, down, right, p_largest + i_cell, p_confidence + i_cell, exponent
                    )
                    b_grad += share * cell_gradient(b_p, b_x, b_y, p_grad + i_cell, p_mapping + i_cell, cells)
        return b_grad


@triton.jit
def cells_with_share(low, a, step, coarse, fine):
    """Output cells [first, end) between coarse cell `low` and the next, none where `a` is neither."""
    first = first_fine(low, step, fine)
    is_part = (low == a) | (tl.cast(coarse, tl.int32) != fine)
    return first, tl.where(is_part, first_fine(low + 1, step, fine), first)


@triton.jit
def own_share(share_of_next, low, a, coarse):
    """The share that coarse cell `a` has in a cell between `low` and the next; the last cell is its own next."""
    return tl.where(low < a, share_of_next, tl.where(a + 1 < coarse, 1.0 - share_of_next, 1.0))


@triton.jit
def grad_corr_kernel(
    # a `Scale`, its gradient, and the coarse target rows and columns of a tile
    scale, p_out, rows_k, columns_k,
    # what the forward had and kept, for all scales
    p_grad, p_x, p_y, p_mapping, p_confidence, p_largest,
    # output grid and its rows that are computed
    h, w, first_row, rows,
    # output cells of a batch item over all scales, and of the scales before this one
    cells_b, cells_s,
    # 1 / temperature, and log2(e) / temperature
    cold, exponent,
    SAME_SOURCE: tl.constexpr, SAME_TARGET: tl.constexpr,
    COARSE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    tiles_w = tl.cdiv(scale.wt, columns_k)
    tiles = tl.cdiv(scale.ht, rows_k) * tiles_w
    i_row = i_program // tiles
    k_i, k_j = i_program % tiles // tiles_w * rows_k, i_program % tiles_w * columns_k
    a_r, a_c = scale.first_line + i_row // scale.ws % scale.lines, i_row % scale.ws
    i_b = (i_row // (scale.lines * scale.ws)).to(tl.int64)
    i_cells = i_b * cells_b + cells_s
    p_corr = scale.corr + i_b * scale.stride_b
    p_out += i_row.to(tl.int64) * (scale.ht * scale.wt)
    o_h, o_w = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_W)

    if SAME_TARGET:
        o_i, o_j = k_i + o_h, k_j + o_w
        b_grad = source_gradient(
            o_i, o_j, a_r, a_c, i_cells, scale, p_corr,
            p_grad, p_x, p_y, p_mapping, p_confidence, p_largest,
            h, w, first_row, rows, exponent, SAME_SOURCE, SAME_TARGET,
        )  # fmt: skip
        m_tile = (o_i < h)[:, None] & (o_j < w)[None, :]
        tl.store(p_out + o_i[:, None] * w + o_j[None, :], round_to(b_grad * cold, p_out.dtype.element_ty), mask=m_tile)
    else:
        o_k = tl.arange(0, COARSE)
        b_sum = tl.zeros([COARSE, COARSE], tl.float32)
        j_first = first_fine(k_j - 1, scale.step_j, w)
        j_end = first_fine(k_j + columns_k, scale.step_j, w)
        # Output target cells that the tile's coarse ones are part of.
        for i in range(first_fine(k_i - 1, scale.step_i, h), first_fine(k_i + rows_k, scale.step_i, h), BLOCK_H):
            b_down = transpose_weights(k_i + o_k, i + o_h, scale.step_i, scale.ht, h)  # [COARSE, BLOCK_H]
            for j in range(j_first, j_end, BLOCK_W):
                b_grad = source_gradient(
                    i + o_h, j + o_w, a_r, a_c, i_cells, scale, p_corr,
                    p_grad, p_x, p_y, p_mapping, p_confidence, p_largest,
                    h, w, first_row, rows, exponent, SAME_SOURCE, SAME_TARGET,
                )  # fmt: skip
                b_right = transpose_weights(k_j + o_k, j + o_w, scale.step_j, scale.wt, w)  # [COARSE, BLOCK_W]
                b_half = tl.dot(b_down, b_grad, input_precision="ieee")
                b_sum = tl.dot(b_half, tl.trans(b_right), b_sum, input_precision="ieee")
        # A NaN in the products reaches all coarse cells of the tile, those too that no output cell is made of.
        m_read_i = is_read(k_i + o_k, scale.step_i, scale.ht, h)
        m_read_j = is_read(k_j + o_k, scale.step_j, scale.wt, w)
        b_sum = tl.where(m_read_i[:, None] & m_read_j[None, :], b_sum * cold, 0.0)
        m_rows = (o_k < rows_k) & (k_i + o_k < scale.ht)
        m_columns = (o_k < columns_k) & (k_j + o_k < scale.wt)
        p_tile = p_out + (k_i + o_k)[:, None] * scale.wt + (k_j + o_k)[None, :]
        tl.store(p_tile, round_to(b_sum, p_out.dtype.element_ty), mask=m_rows[:, None] & m_columns[None, :])


@triton.jit
def grad_tables_kernel(
    # a `Scale`; what the forward kept, for all scales
    scale, p_grad, p_confidence, p_largest,
    # (rows of groups, tiles of rows, w) and (rows of groups, tiles of columns, h)
    p_partial_x, p_partial_y,
    # output grid, its rows that are computed, and the groups of them
    h, w, first_row, rows, groups_r,
    # output cells of a batch item over all scales, and of the scales before this one
    cells_b, cells_s,
    # log2(e) / temperature
    exponent,
    SAME_SOURCE: tl.constexpr, SAME_TARGET: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    tiles_h, tiles_w = tl.cdiv(h, BLOCK_H), tl.cdiv(w, BLOCK_W)
    i_tile = i_program % (tiles_h * tiles_w)
    i_row = i_program // (tiles_h * tiles_w)
    i_b = (i_row // groups_r).to(tl.int64)
    a_r, r_first, r_end = rows_of_group(i_row % groups_r, scale, h, first_row, rows)
    p_corr = scale.corr + i_b * scale.stride_b
    i_cells = i_b * cells_b + cells_s
    # moved so that cells count from the output's first row, not the part's: registers are short in the loop
    p_grad += 2 * i_cells - first_row * w
    p_confidence += i_cells - first_row * w
    p_largest += i_cells - first_row * w
    o_i = i_tile // tiles_w * BLOCK_H + tl.arange(0, BLOCK_H)
    o_j = i_tile % tiles_w * BLOCK_W + tl.arange(0, BLOCK_W)
    m_tile = (o_i < h)[:, None] & (o_j < w)[None, :]
    offsets = tile_offsets(o_i, o_j, scale, h, w, SAME_TARGET)

    b_x = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    b_y = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    for i_c in range(0, tl.minimum(scale.ws, w)):
        c_first, c_end = fine_cells(i_c, scale.step_c, scale.ws, w)
        a_c = low_cell(c_first, scale.step_c, scale.ws)
        b_sources = load_sources(p_corr, a_r, a_c, scale, h, w, offsets, SAME_SOURCE, SAME_TARGET)
        for r in range(r_first, r_end):
            down = share_of_next(r, scale.step_r, a_r)
            for c in range(c_first, c_end):
                right = share_of_next(c, scale.step_c, a_c)
                i_cell = r * w + c
                b_p = probabilities(b_sources, m_tile, down, right, p_largest + i_cell, p_confidence + i_cell, exponent)
                b_x += b_p * tl.load(p_grad + i_cell)
                b_y += b_p * tl.load(p_grad + i_cell + rows * w)
    p_x = p_partial_x + (i_row.to(tl.int64) * tiles_h + i_tile // tiles_w) * w
    p_y = p_partial_y + (i_row.to(tl.int64) * tiles_w + i_tile % tiles_w) * h
    tl.store(p_x + o_j, tl.sum(b_x, axis=0), mask=o_j < w)
    tl.store(p_y + o_i, tl.sum(b_y, axis=1), mask=o_i < h)
