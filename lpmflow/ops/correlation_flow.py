"""Correlation straight to flow: what `correlation` and `cross_scale_fusion` give together, without the 4D volume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lpmflow import reference
from lpmflow.ops._autodiff import needs_gradient, transformed
from lpmflow.ops._backends import _constant, named_backend, use_backend
from lpmflow.ops._checks import check_count, check_grid, check_shape, check_temperature, check_tensor
from lpmflow.ops.correlation import correlation
from lpmflow.ops.cross_scale_fusion import coordinate_table, fuse_part

OP = "correlation_flow"
Grid = tuple[int, int]

BLOCK_BYTES = 64 << 20
"""How much of the correlation tensor is in memory at once. A tensor that fits is computed in one piece."""


class CorrelationFlow(NamedTuple):
    """What `correlation_flow` returns."""

    attended: Tensor
    """(B, H, N, D) attended values, in q's dtype."""
    mapping: Tensor
    """(B, 2, h, w) expected target coordinate (x, y) of each output source cell, in the units of the tables."""
    confidence: Tensor
    """(B, h, w) largest probability of the cell's distribution over target cells, in (0, 1]."""


class _Block(NamedTuple):
    """Some lines of the source grid, and the output rows interpolated between them."""

    first_line: int
    lines: int
    own: int  # how many of the lines are no other block's
    first_row: int
    rows: int


def correlation_flow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    source_grid: Grid,
    target_grid: Grid,
    out_grid: Grid | None = None,
    scale: float | None = None,
    prefix: int = 1,
    temperature: float = 0.02,
    x: Tensor | None = None,
    y: Tensor | None = None,
    backend: str | None = None,
) -> CorrelationFlow:
    """Attended values of a matching block and the flow of its correlation tensor (paper sections 3.3 and 3.4).

    Equal to `correlation` followed by `cross_scale_fusion` of its one tensor, up to rounding. A tensor of more than
    `BLOCK_BYTES` is never whole in memory: it is computed a block of source lines at a time, of that size or of the
    line or two that a row of the result needs, each block is turned into flow and dropped, and where a gradient is
    needed computed again for it (`torch.utils.checkpoint`). Memory then grows with the number of tokens, N + M, and not
    with N M. Computed in blocks with a gradient, it cannot be traced as one graph by `torch.compile`; without, it can.
    Within `torch.func` it is computed in one piece whatever the size. Derivatives are those of the two ops.

    Args:
        q: (B, H, N, D) queries, N = prefix + cells of `source_grid`; k, v: (B, H, M, D), M = prefix + cells of
            `target_grid`. Types as in `correlation`.
        source_grid, target_grid: (height, width) of the two sides.
        out_grid: (h, w) of the result; the one of the two grids with more cells when None.
        scale, prefix: as in `correlation`.
        temperature, x, y: as in `cross_scale_fusion`.
        backend: for both parts; None chooses for each.

    Raises TypeError or ValueError naming the argument, RuntimeError when the named backend cannot run.
    """
    source = check_grid(OP, "source_grid", source_grid)
    target = check_grid(OP, "target_grid", target_grid)
    out = check_grid(OP, "out_grid", out_grid if out_grid is not None else max(source, target, key=math.prod))
    check_count(OP, "prefix", prefix, at_least=0)
    check_tensor(OP, "q", q, "B, H, N, D")
    check_tensor(OP, "k", k, "B, H, M, D")
    check_shape(OP, "q", q, (*q.shape[:2], prefix + source[0] * source[1], q.shape[3]))
    check_shape(OP, "k", k, (*q.shape[:2], prefix + target[0] * target[1], q.shape[3]))
    temperature = check_temperature(OP, temperature)
    exact = torch.promote_types(q.dtype, torch.float32)
    table_x, table_y = (
        coordinate_table(OP, name, table, side, q, exact) for name, table, side in (("x", x, out[1]), ("y", y, out[0]))
    )

    # Named once: the backward, which computes blocks again, may run after a block of `use_backend`, or in a thread that
    # it does not reach.
    by_op = {op: named_backend(op, backend) for op in ("correlation", "cross_scale_fusion")}

    def run(block: _Block, q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attended, corr = correlation(q, k, v, scale=scale, prefix=prefix, backend=by_op["correlation"])
        part = None if len(blocks) == 1 else (block.first_line, block.first_row, block.rows)
        named = by_op["cross_scale_fusion"]
        mapping, confidence = fuse_part(corr, source, target, out, temperature, x, y, named, part)
        return attended, mapping, confidence

    def run_as_named(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with use_backend(**by_op):  # where none was named, none is when the block is computed again
            return run(*arguments)

    whole = transformed() or volume_fits(q.shape[0], source, target, exact)
    line_bytes = max(q.shape[0] * source[1] * math.prod(target) * exact.itemsize, 1)
    # where rows are interpolated a block has the first line of the next one too
    at_once = source[0] if whole else max(BLOCK_BYTES // line_bytes - int(source != out), 1)
    blocks = list(_blocks(source, out, at_once, exact))
    if len(blocks) == 1:
        return CorrelationFlow(*run(blocks[0], q, k, v, table_x, table_y))
    again = needs_gradient(q, k, v, table_x, table_y)
    found: list[list[Tensor]] = [[], [], []]
    for block in blocks:
        # The rows before a block's own take the place of the prefix, which only the first block has.
        begin = block.first_line * source[1]
        arguments = (block, q[:, :, begin : prefix + begin + block.lines * source[1]], k, v, table_x, table_y)
        if again:
            pieces = checkpoint(run_as_named, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            pieces = run(*arguments)
        attended, mapping, confidence = pieces
        first = 0 if block is blocks[0] else prefix
        found[0].append(attended[:, :, first : prefix + block.own * source[1]])
        found[1].append(mapping)
        found[2].append(confidence)
    return CorrelationFlow(torch.cat(found[0], dim=2), torch.cat(found[1], dim=2), torch.cat(found[2], dim=1))


def volume_fits(batch: int, source_grid: Grid, target_grid: Grid, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the correlation tensor of such grids, in `dtype`, is small enough to be held whole."""
    return batch * math.prod(source_grid) * math.prod(target_grid) * dtype.itemsize <= BLOCK_BYTES


@_constant
def _upper_lines(lines: int, rows: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The upper line of each output row, in the kernels' type: its rounding decides between which lines a row lies."""
    low, _, _ = reference.lines_of_rows(lines, rows, torch.empty(0, dtype=dtype, device="cpu"))
    return tuple(low.tolist())


def _blocks(source: Grid, out: Grid, at_once: int, dtype: torch.dtype) -> Iterator[_Block]:
    """Blocks of `at_once` lines; where rows are interpolated also the next line, which is in the next block again."""
    if source == out or at_once >= source[0]:
        for first in range(0, source[0], at_once):
            count = min(at_once, source[0] - first)
            yield _Block(first, count, count, first, count if source == out else out[0])
        return
    upper = _upper_lines(source[0], out[0], dtype)
    for first in range(0, source[0], at_once):
        own = min(at_once, source[0] - first)
        inside = [row for row, line in enumerate(upper) if first <= line < first + own]
        lines = min(own + 1, source[0] - first)
        yield _Block(first, lines, own, inside[0] if inside else 0, len(inside))
