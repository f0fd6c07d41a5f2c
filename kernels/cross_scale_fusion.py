"""`cross_scale_fusion` in Triton: correlation tensors of several scales to expected target coordinates on one grid.

    u[c, j] = corr interpolated at output source cell c and output target cell j    p[c] = softmax(u[c] / temperature)
    mapping[c] = sum_j p[c, j] (x[column of j], y[row of j])    confidence[c] = max_j p[c, j]

corr of scale s is (B, hs ws, ht wt), any strides with a dense last dimension; mapping (B, S, 2, h, w) and confidence
(B, S, h, w) are float32, like everything that is computed. A side whose grid is (h, w) is read as it is, and -inf there
is a cell out of the question. Neither u nor p is ever in memory. Some of the output rows alone are computed from those
lines of corr that they lie between; the outputs, and the gradient of corr, have these rows and lines only.

Forward, one kernel, launched once a scale:
    fuse         one program per (b, coarse source cell): the output cells between this one and the next (one output
                 cell, where the source grids agree). It holds in registers the up to four rows of corr that these are
                 mixed of, interpolated over the target, so that a row comes from memory once and from L2 four times.
                 Where the output grid is larger than a tile, they are read again for each cell, in an online softmax.
One launch for all scales would be possible, and was worse: every program gets the registers of the greediest case, 182
of both sides interpolated against 32 of neither.

For the backward are kept, beside mapping, the `largest` u of each cell and the inverse of its sum, which is its
confidence: p = exp((u - largest) / temperature) confidence. They are kept apart, not as one log-sum-exp, whose rounding
would cost 1e-2 of p where logits reach 1e5. With g the gradient of mapping:
    dL/du[c, j] = p[c, j] ((x[j] - mapping_x[c]) g_x[c] + (y[j] - mapping_y[c]) g_y[c]) / temperature
    grad_x[column] = sum_c g_x[c] sum_rows p[c, .], and grad_y likewise
    grad_corr    one program per (b, coarse source cell, tile of coarse target cells): sums dL/du over the output cells
                 that the source cell is part of, then transposes the interpolation over the target by two products
    grad_tables  one program per (b, row of coarse source cells, tile of output target cells): partial sums of grad_x
                 and grad_y, which PyTorch adds up
Every output is written once by one program: no atomics, and two runs agree to the last bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpmflow_kernels._contracts import check_cross_scale_fusion, check_cross_scale_fusion_gradient
from lpmflow_kernels._interpolate import (
    Scale,
    axis_step,
    fine_cells,
    lines_of_row,
    load_sources,
    low_cell,
    mix_sources,
    rows_of_group,
    share_of_next,
    tile_offsets,
)
from lpmflow_kernels._launch import DTYPES, Tiles, define, dense_rows, launch, refuse_second_order, why_not_on_device
from lpmflow_kernels.cross_scale_fusion_backward import grad_corr_kernel, grad_tables_kernel

__all__ = ["configuration", "cross_scale_fusion", "why_not"]

OP = "cross_scale_fusion"
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that tiles of nothing but -inf may come first


@triton.jit
def exponentials(b_u, b_x, b_y, largest, exponent):
    """Of a tile: the sum of exp(u - largest), and the sums of the same times x and y."""
    b_e = tl.exp2((b_u - largest) * exponent)
    b_by_row = tl.sum(b_e, axis=1)
    return tl.sum(b_by_row), tl.sum(tl.sum(b_e, axis=0) * b_x), tl.sum(b_by_row * b_y)


@triton.jit
def fuse_kernel(
    # a `Scale`, the tables x and y, the outputs for all scales
    scale, p_x, p_y, p_mapping, p_confidence, p_largest,
    # output grid, its rows that are computed, and the groups of them
    h, w, first_row, rows, groups_r,
    # output cells of a batch item over all scales, and of the scales before this one
    cells_b, cells_s,
    # log2(e) / temperature
    exponent,
    SAME_SOURCE: tl.constexpr, SAME_TARGET: tl.constexpr,
    # whether a tile covers the output grid
    WHOLE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    groups_c = tl.minimum(scale.ws, w)
    i_b = (i_program // (groups_r * groups_c)).to(tl.int64)
    a_r, r_first, r_end = rows_of_group(i_program // groups_c % groups_r, scale, h, first_row, rows)
    c_first, c_end = fine_cells(i_program % groups_c, scale.step_c, scale.ws, w)
    a_c = low_cell(c_first, scale.step_c, scale.ws)
    p_corr = scale.corr + i_b * scale.stride_b
    i_cells = i_b * cells_b + cells_s

    o_h, o_w = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_W)
    tiles_w = tl.cdiv(w, BLOCK_W)
    if WHOLE:
        offsets = tile_offsets(o_h, o_w, scale, h, w, SAME_TARGET)
        b_sources = load_sources(p_corr, a_r, a_c, scale, h, w, offsets, SAME_SOURCE, SAME_TARGET)
        b_x = tl.load(p_x + o_w, mask=o_w < w, other=0.0)
        b_y = tl.load(p_y + o_h, mask=o_h < h, other=0.0)
        m_tile = (o_h < h)[:, None] & (o_w < w)[None, :]
    for r in range(r_first, r_end):
        down = share_of_next(r, scale.step_r, a_r)
        for c in range(c_first, c_end):
            right = share_of_next(c, scale.step_c, a_c)
            # A NaN in u may be lost to the maximum, but not to the sum, and through the sum it reaches the whole row.
            if WHOLE:
                b_u = tl.where(m_tile, mix_sources(b_sources, down, right), float("-inf"))
                largest = tl.max(b_u)
                total, total_x, total_y = exponentials(b_u, b_x, b_y, largest, exponent)
            else:
                largest = tl.full([], LOWEST, tl.float32)
                total, total_x, total_y = 0.0, 0.0, 0.0
                for i_tile in range(0, tl.cdiv(h, BLOCK_H) * tiles_w):
                    o_i, o_j = i_tile // tiles_w * BLOCK_H + o_h, i_tile % tiles_w * BLOCK_W + o_w
                    offsets = tile_offsets(o_i, o_j, scale, h, w, SAME_TARGET)
                    b_sources = load_sources(p_corr, a_r, a_c, scale, h, w, offsets, SAME_SOURCE, SAME_TARGET)
                    m_tile = (o_i < h)[:, None] & (o_j < w)[None, :]
                    b_u = tl.where(m_tile, mix_sources(b_sources, down, right), float("-inf"))
                    b_x = tl.load(p_x + o_j, mask=o_j < w, other=0.0)
                    b_y = tl.load(p_y + o_i, mask=o_i < h, other=0.0)
                    new = tl.maximum(largest, tl.max(b_u))
                    decay = tl.exp2((largest - new) * exponent)
                    tile, tile_x, tile_y = exponentials(b_u, b_x, b_y, new, exponent)
                    total = total * decay + tile
                    total_x = total_x * decay + tile_x
                    total_y = total_y * decay + tile_y
                    largest = new
            inverse = tl.where(total == 0, float("nan"), 1.0 / total)  # 0 where there is nothing but -inf
            i_cell = (r - first_row) * w + c
            tl.store(p_mapping + 2 * i_cells + i_cell, total_x * inverse)
            tl.store(p_mapping + 2 * i_cells + rows * w + i_cell, total_y * inverse)
            tl.store(p_confidence + i_cells + i_cell, inverse)
            tl.store(p_largest + i_cells + i_cell, largest)


# Shapes of a tile where the output grid is larger than one: 1024 cells, the squarest first. Not measured: what four
# warps hold in registers for the rows of four sources, with several programs on a multiprocessor at a time.
_TILES = [
    (32, 32),
    (16, 64),
    (64, 16),
    (8, 128),
    (128, 8),
    (4, 256),
    (256, 4),
    (2, 512),
    (512, 2),
    (1, 1024),
    (1024, 1),
]
_CELLS = 1024
# Kernel -> warps where both sides are interpolated, the source, the target, and neither.
_WARPS = {"fuse": (8, 4, 4, 2), "grad_corr": (8, 8, 4, 4), "grad_tables": (8, 8, 8, 4)}
_COARSE = 32  # rows and columns of a tile of coarse target cells in grad_corr
_COLDEST = 1e30


def configuration(kernel: str, out_grid: Sequence[int], same_source: bool, same_target: bool) -> Tiles:
    """The tuning of "fuse", "grad_corr" or "grad_tables": one tile for the output grid where it fits."""
    least = 16 if kernel == "grad_corr" else 1  # its products take no smaller blocks
    rows, columns = (max(least, triton.next_power_of_2(side)) for side in out_grid)
    if rows * columns > _CELLS:
        shapes = [shape for shape in _TILES if min(shape) >= least]
        rows, columns = min(shapes, key=lambda shape: _count(out_grid, shape))
    warps = _WARPS[kernel][2 * same_source + same_target]
    return Tiles(rows, columns, max(1, min(warps, rows * columns // 32)), 1)


def _count(grid: Sequence[int], tile: Sequence[int]) -> int:
    """How many tiles cover a grid."""
    return triton.cdiv(grid[0], tile[0]) * triton.cdiv(grid[1], tile[1])


def why_not(corr: Tensor) -> str | None:
    """None when the Triton kernels can compute with tensors like `corr`, else the reason in one sentence."""
    return why_not_on_device("corrs[0]", corr)


def forward(
    corrs: list[Tensor], grids: list[int], out: list[int], temperature: float, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(corrs, grids, out, temperature, x, y)
    if outputs[0].numel() == 0:
        return outputs
    h, w = out_grid = out[:2]
    with torch.cuda.device_of(corrs[0]):
        for one in _scales(corrs, grids, out, temperature, x, y, outputs):
            tiles = configuration("fuse", out_grid, one["SAME_SOURCE"], one["SAME_TARGET"])
            one["WHOLE"] = h <= tiles.block_q and w <= tiles.block_k
            groups = one["groups_r"] * min(one["scale"].ws, w)
            _launch(fuse_kernel, len(corrs[0]) * groups, tiles, one)
    return outputs


def backward(
    grad_mapping: Tensor,
    corrs: list[Tensor],
    grids: list[int],
    out: list[int],
    temperature: float,
    x: Tensor,
    y: Tensor,
    mapping: Tensor,
    confidence: Tensor,
    largest: Tensor,
    tables: bool = True,
) -> tuple[list[Tensor], Tensor, Tensor]:
    grads, grad_x, grad_y = _grads(
        grad_mapping, corrs, grids, out, temperature, x, y, mapping, confidence, largest, tables
    )
    if mapping.numel() == 0:
        return [grad.zero_() for grad in grads], grad_x.zero_(), grad_y.zero_()
    batch, out_grid = len(corrs[0]), out[:2]
    h, w = out_grid
    kept = tuple(output.contiguous() for output in (mapping, confidence, largest))
    grad_mapping = grad_mapping.contiguous()
    partial_x, partial_y = [], []
    with torch.cuda.device_of(corrs[0]):
        scales = _scales(corrs, grids, out, temperature, x, y, kept)
        for one, grad in zip(scales, grads, strict=True):
            scale, same = one["scale"], (one["SAME_SOURCE"], one["SAME_TARGET"])
            one |= {"p_grad": grad_mapping, "p_out": grad, "COARSE": _COARSE}
            tiles = configuration("grad_corr", out_grid, *same)
            one["rows_k"], one["columns_k"] = coarse_tile = _coarse_tile(scale, out_grid, tiles)
            programs = batch * scale.lines * scale.ws * _count((scale.ht, scale.wt), coarse_tile)
            _launch(grad_corr_kernel, programs, tiles, one)
            if not tables:
                continue
            tiles = configuration("grad_tables", out_grid, *same)
            rows, tiles_h, tiles_w = (
                batch * one["groups_r"],
                triton.cdiv(h, tiles.block_q),
                triton.cdiv(w, tiles.block_k),
            )
            partial_x.append(mapping.new_empty((rows * tiles_h, w)))
            partial_y.append(mapping.new_empty((rows * tiles_w, h)))
            one |= {"p_partial_x": partial_x[-1], "p_partial_y": partial_y[-1]}
            _launch(grad_tables_kernel, rows * tiles_h * tiles_w, tiles, one)
    if not tables:
        return grads, grad_x.zero_(), grad_y.zero_()
    return grads, torch.cat(partial_x).sum(0).to(x.dtype), torch.cat(partial_y).sum(0).to(y.dtype)


def _scales(
    corrs: list[Tensor],
    grids: list[int],
    out: list[int],
    temperature: float,
    x: Tensor,
    y: Tensor,
    outputs: tuple[Tensor, ...],
) -> Iterator[dict[str, Any]]:
    """For each scale what the kernels are told of the inputs and of the forward's outputs."""
    h, w, first_line, first_row, rows = out
    p_x, p_y = (table.to(torch.float32).contiguous() for table in (x, y))
    for s, corr in enumerate(corrs):
        corr = dense_rows(corr)
        hs, ws, ht, wt = grids[4 * s : 4 * s + 4]
        lines = corr.shape[1] // ws
        first = first_line if lines < hs else 0
        between = lines_of_row(hs, h, first_row)[0], lines_of_row(hs, h, first_row + rows - 1)[1]
        if between[0] < first or between[1] >= first + lines:
            raise ValueError(f"{OP}: corrs must have those lines that the output rows lie between")
        steps = (axis_step(coarse, fine) for coarse, fine in ((hs, h), (ws, w), (ht, h), (wt, w)))
        yield {
            "scale": Scale(corr, *corr.stride()[:2], hs, ws, ht, wt, first, lines, *steps),
            "p_x": p_x,
            "p_y": p_y,
            **dict(zip(("p_mapping", "p_confidence", "p_largest"), outputs, strict=True)),
            "h": h,
            "w": w,
            "first_row": first_row,
            "rows": rows,
            "groups_r": lines if hs < h else rows,
            "cells_b": len(corrs) * rows * w,
            "cells_s": s * rows * w,
            "cold": min(1 / temperature, _COLDEST),
            # Not 0, so that -inf stays -inf, and not infinite, so that 0 stays 0.
            "exponent": min(max(math.log2(math.e) / temperature, 1 / _COLDEST), _COLDEST),
            "SAME_SOURCE": (hs, ws) == (h, w),
            "SAME_TARGET": (ht, wt) == (h, w),
        }


def _coarse_tile(scale: Scale, out_grid: Sequence[int], tiles: Tiles) -> tuple[int, int]:
    """Rows and columns of coarse target cells for one program of grad_corr.

    The output's tile where nothing is interpolated. Else the whole axis where it is short, and where it is not, as many
    as are part of no more output cells than a tile has.
    """
    if (scale.ht, scale.wt) == tuple(out_grid):
        return tiles.block_q, tiles.block_k
    axes = ((scale.ht, scale.step_i, tiles.block_q), (scale.wt, scale.step_j, tiles.block_k))
    rows, columns = (
        _COARSE if coarse <= _COARSE else min(max(int((block - 1) * step) - 1, 1), _COARSE)
        for coarse, step, block in axes
    )
    return rows, columns


def _launch(kernel: Any, programs: int, tiles: Tiles, arguments: dict[str, Any]) -> None:
    """`launch` with the names that these kernels have for the sides of a tile."""
    launch(kernel, programs, tiles, {**arguments, "BLOCK_H": tiles.block_q, "BLOCK_W": tiles.block_k})


def _outputs(
    corrs: list[Tensor], grids: list[int], out: list[int], temperature: float, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_cross_scale_fusion(corrs, grids, out, x, y, DTYPES)
    cells = (corrs[0].shape[0], len(corrs), out[4], out[1])
    mapping = corrs[0].new_empty((*cells[:2], 2, *cells[2:]), dtype=torch.float32)
    return mapping, corrs[0].new_empty(cells, dtype=torch.float32), corrs[0].new_empty(cells, dtype=torch.float32)


def _grads(
    grad_mapping: Tensor,
    corrs: list[Tensor],
    grids: list[int],
    out: list[int],
    temperature: float,
    x: Tensor,
    y: Tensor,
    mapping: Tensor,
    confidence: Tensor,
    largest: Tensor,
    tables: bool = True,
) -> tuple[list[Tensor], Tensor, Tensor]:
    check_cross_scale_fusion(corrs, grids, out, x, y, DTYPES)
    check_cross_scale_fusion_gradient(grad_mapping, corrs, out, mapping, confidence, largest)
    return [corr.new_empty(corr.shape) for corr in corrs], x.new_empty(x.shape), y.new_empty(y.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    corrs, ctx.grids, ctx.out, ctx.temperature, x, y = inputs
    ctx.tables = x.requires_grad or y.requires_grad
    ctx.save_for_backward(*corrs, x, y, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_mapping: Tensor | None, *_: None) -> tuple[Any, ...]:
    *corrs, x, y, mapping, confidence, largest = ctx.saved_tensors
    if grad_mapping is None:
        return [None] * len(corrs), None, None, None, None, None
    grads, grad_x, grad_y = torch.ops.lpmflow.cross_scale_fusion_triton_backward(
        grad_mapping, corrs, ctx.grids, ctx.out, ctx.temperature, x, y, mapping, confidence, largest, ctx.tables
    )
    return grads, None, None, None, grad_x, grad_y


# out: h, w, then the first coarse line that corrs has, the first output line, and how many of these there are.
_INPUTS = "Tensor[] corrs, SymInt[] grids, SymInt[] out, float temperature, Tensor x, Tensor y"
define(OP, "cross_scale_fusion_triton", f"({_INPUTS}) -> (Tensor, Tensor, Tensor)", forward, _outputs)
define(
    OP,
    "cross_scale_fusion_triton_backward",
    f"(Tensor grad_mapping, {_INPUTS}, Tensor mapping, Tensor confidence, Tensor largest, bool tables=True) "
    f"-> (Tensor[], Tensor, Tensor)",
    backward,
    _grads,
)
torch.library.register_autograd("lpmflow::cross_scale_fusion_triton", _differentiate, setup_context=_save)
torch.library.register_autograd(
    "lpmflow::cross_scale_fusion_triton_backward", functools.partial(refuse_second_order, OP)
)


def cross_scale_fusion(
    corrs: Sequence[Tensor],
    source_grids: Sequence[tuple[int, int]],
    target_grids: Sequence[tuple[int, int]],
    *,
    out_grid: tuple[int, int],
    temperature: float,
    x: Tensor,
    y: Tensor,
    part: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(mapping, confidence) of checked arguments; see `lpmflow.ops.cross_scale_fusion`, `part` in the reference."""
    grids = [side for pair in zip(source_grids, target_grids, strict=True) for grid in pair for side in grid]
    out = [*out_grid, *(part or (0, 0, out_grid[0]))]
    mapping, confidence, _ = torch.ops.lpmflow.cross_scale_fusion_triton(list(corrs), grids, out, temperature, x, y)
    return mapping, confidence
