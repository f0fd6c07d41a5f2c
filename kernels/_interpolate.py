"""Triton helpers for bilinear interpolation with `align_corners=True`, as `F.interpolate` does it: one axis, its
transpose, a tile of a map, and a tile of a correlation interpolated on both sides.

Along one axis a coarse grid goes to a fine one (which may also be the smaller). Fine cell f lies at f step, between the
coarse cells low(f) = floor(f step) and the next, of which the second has the share f step - low(f). The last cell is
its own next, and so is every cell of an axis that keeps its length. `step` is (coarse - 1) / (fine - 1) in float32, 0
for a single fine cell, and like PyTorch's it is rounded before it is multiplied, so that the same cells are read and
the same NaN come out.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import triton
import triton.language as tl


class Scale(NamedTuple):
    """One correlation tensor (B, lines ws, ht wt) with a dense last dimension, as the kernels are told of it."""

    corr: Any
    stride_b: int
    stride_n: int
    hs: int
    ws: int
    ht: int
    wt: int
    # the source lines that corr has, which may be some of the hs: from which on, and how many
    first_line: int
    lines: int
    # coarse cells from one fine cell to the next: source rows and columns, target rows and columns
    step_r: float
    step_c: float
    step_i: float
    step_j: float


def axis_step(coarse: int, fine: int) -> float:
    """Coarse cells from one fine cell to the next; Triton rounds it to float32."""
    return (coarse - 1) / (fine - 1) if fine > 1 else 0.0


def lines_of_row(coarse: int, fine: int, row: int) -> tuple[int, int]:
    """The two coarse lines that a fine row lies between, with the rounding of the kernels."""
    low = min(int(_single(row * _single(axis_step(coarse, fine)))), coarse - 1)
    return low, low if coarse == fine else min(low + 1, coarse - 1)


def _single(x: float) -> float:
    """x rounded to float32."""
    rounded: float = struct.unpack("f", struct.pack("f", x))[0]
    return rounded


@triton.jit
def low_cell(o_fine, step, coarse):
    """The coarse cell at or before each fine cell."""
    return tl.minimum((tl.cast(o_fine, tl.float32) * step).to(tl.int32), coarse - 1)


@triton.jit
def next_cell(o_low, coarse, fine):
    """The coarse cell after the low one."""
    return tl.where(tl.cast(coarse, tl.int32) == fine, o_low, tl.minimum(o_low + 1, coarse - 1))


@triton.jit
def share_of_next(o_fine, step, o_low):
    """The share of the coarse cell after the low one."""
    return tl.cast(o_fine, tl.float32) * step - o_low


@triton.jit
def first_fine(o_coarse, step, fine):
    """The first fine cell whose low cell is `o_coarse` or later; `fine` where there is none."""
    exact = tl.cast(o_coarse, tl.float32) / tl.maximum(step, 1e-12)
    o_fine = tl.minimum(tl.maximum(exact, 0.0), tl.cast(fine, tl.float32)).to(tl.int32)
    o_fine = tl.maximum(o_fine - 1, 0)
    for _ in tl.static_range(3):  # the quotient is rounded, and so are the products that decide
        o_fine += ((tl.cast(o_fine, tl.float32) * step).to(tl.int32) < o_coarse).to(tl.int32)
    return tl.minimum(o_fine, fine)


@triton.jit
def is_read(o_coarse, step, coarse, fine):
    """Whether a coarse cell is part of any fine cell, be it with a share of 0."""
    before = tl.where(tl.cast(coarse, tl.int32) == fine, o_coarse, o_coarse - 1)
    return first_fine(before, step, fine) < first_fine(o_coarse + 1, step, fine)


@triton.jit
def fine_cells(i_group, step, coarse, fine):
    """Fine cells [first, end) of one of min(coarse, fine) groups, whose cells lie between the same two coarse cells."""
    wider = tl.cast(coarse, tl.int32) < fine
    first = tl.where(wider, first_fine(i_group, step, fine), i_group)
    end = tl.where(wider, first_fine(i_group + 1, step, fine), i_group + 1)
    return first, end


@triton.jit
def rows_of_group(i_group, scale, h, first_row, rows):
    """(coarse line, first output row, end) of a group of the rows of a part: those after one of its lines, or one row.

    The rows of a part are `rows` from `first_row` on. The line before them may have none.
    """
    wider = tl.cast(scale.hs, tl.int32) < h
    r_first, r_end = fine_cells(i_group + tl.where(wider, scale.first_line, first_row), scale.step_r, scale.hs, h)
    a_r = low_cell(r_first, scale.step_r, scale.hs)
    return a_r, tl.maximum(r_first, first_row), tl.minimum(r_end, first_row + rows)


@triton.jit
def transpose_weights(o_coarse, o_fine, step, coarse, fine):
    """What each fine cell gives back to each coarse cell; [COARSE, FINE] for offsets of these lengths."""
    o_low = low_cell(o_fine, step, coarse)
    b_share = share_of_next(o_fine, step, o_low)[None, :]
    o_next = next_cell(o_low, coarse, fine)
    at_low = tl.where(o_low[None, :] == o_coarse[:, None], 1.0 - b_share, 0.0)
    return at_low + tl.where(o_next[None, :] == o_coarse[:, None], b_share, 0.0)


@triton.jit
def tile_offsets(o_i, o_j, scale, h, w, SAME_TARGET: tl.constexpr):
    """How `load_row` reads target cells (o_i, o_j) of a row of the correlation that is interpolated to (h, w).

    SAME_TARGET, where nothing is interpolated: (offsets, mask). Else: offsets of the neighbours' rows above and below
    and columns left and right, never outside, and the shares of the lower and of the right ones. They stay apart: sums
    of all four pairs would be kept in registers, 64 bits each.
    """
    if SAME_TARGET:
        return o_i[:, None] * w + o_j[None, :], (o_i < h)[:, None] & (o_j < w)[None, :]
    else:
        o_above, o_left = low_cell(o_i, scale.step_i, scale.ht), low_cell(o_j, scale.step_j, scale.wt)
        o_below, o_right = next_cell(o_above, scale.ht, h), next_cell(o_left, scale.wt, w)
        return (
            (o_above * scale.wt)[:, None],
            (o_below * scale.wt)[:, None],
            o_left[None, :],
            o_right[None, :],
            share_of_next(o_i, scale.step_i, o_above)[:, None],
            share_of_next(o_j, scale.step_j, o_left)[None, :],
        )


@triton.jit
def between(b_low, b_next, share):
    """(1 - share) low + share next, infinities and NaN included, written so that equal values give that very value."""
    b_step = tl.where(tl.abs(b_low) == float("inf"), b_next, b_next - b_low)
    return b_low + share * b_step


@triton.jit
def mix(b_above_left, b_above_right, b_below_left, b_below_right, down, right):
    """Four neighbours in their shares."""
    return between(between(b_above_left, b_above_right, right), between(b_below_left, b_below_right, right), down)


@triton.jit
def load_row(p_row, offsets, SAME_TARGET: tl.constexpr):
    """A tile of a row: [BLOCK_H, BLOCK_W], float32."""
    if SAME_TARGET:
        return tl.load(p_row + offsets[0], mask=offsets[1], other=0.0).to(tl.float32)
    else:
        p_above, p_below = p_row + offsets[0], p_row + offsets[1]
        return mix(
            tl.load(p_above + offsets[2]).to(tl.float32),
            tl.load(p_above + offsets[3]).to(tl.float32),
            tl.load(p_below + offsets[2]).to(tl.float32),
            tl.load(p_below + offsets[3]).to(tl.float32),
            offsets[4],
            offsets[5],
        )


@triton.jit
def held_line(o_line, scale):
    """Where corr has a coarse line; for one it lacks, which no row of the part is made of, one it has."""
    return tl.minimum(tl.maximum(o_line - scale.first_line, 0), scale.lines - 1)


@triton.jit
def load_sources(p_corr, a_r, a_c, scale, h, w, offsets, SAME_SOURCE: tl.constexpr, SAME_TARGET: tl.constexpr):
    """Tiles of the rows of coarse source cell (a_r, a_c) and of the next to the right, below and both.

    SAME_SOURCE, where nothing is interpolated over the source: of the one cell.
    """
    above = held_line(a_r, scale) * scale.ws
    if SAME_SOURCE:
        return (load_row(p_corr + (above + a_c).to(tl.int64) * scale.stride_n, offsets, SAME_TARGET),)
    else:
        below = held_line(next_cell(a_r, scale.hs, h), scale) * scale.ws
        p_above = p_corr + above.to(tl.int64) * scale.stride_n
        p_below = p_corr + below.to(tl.int64) * scale.stride_n
        left = a_c.to(tl.int64) * scale.stride_n
        right = next_cell(a_c, scale.ws, w).to(tl.int64) * scale.stride_n
        return (
            load_row(p_above + left, offsets, SAME_TARGET),
            load_row(p_above + right, offsets, SAME_TARGET),
            load_row(p_below + left, offsets, SAME_TARGET),
            load_row(p_below + right, offsets, SAME_TARGET),
        )


@triton.jit
def mix_sources(b_sources, down, right):
    """The tile of an output source cell with these shares of the lower and right sources: [BLOCK_H, BLOCK_W]."""
    if len(b_sources) == 1:
        return b_sources[0]
    else:
        return mix(b_sources[0], b_sources[1], b_sources[2], b_sources[3], down, right)
