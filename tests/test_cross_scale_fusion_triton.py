"""The Triton `cross_scale_fusion` without a GPU: what it refuses, fakes, launches; values are in tests/interpreted."""

from __future__ import annotations

import itertools

import interpreted
import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="Triton is not installed, or older than 3.4")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from lpmflow import reference  # noqa: E402
from lpmflow_kernels import cross_scale_fusion as op  # noqa: E402
from lpmflow_kernels._interpolate import axis_step  # noqa: E402
from lpmflow_kernels._launch import keep_launches  # noqa: E402

GRIDS = [2, 3, 3, 2, 4, 5, 4, 5]


@interpreted.tests("cross_scale_fusion")
def test_values_and_gradients_through_the_interpreter(done):
    interpreted.check(done)


def test_why_not_says_what_came():
    corr = torch.empty(1, 6, 6)
    assert op.why_not(corr.double()) == "it takes float32, float16 and bfloat16, and corrs[0] is float64"
    assert "it runs on CUDA devices" in op.why_not(corr) and op.why_not(corr).endswith("corrs[0] is on cpu")


def test_cpu_tensors_are_refused_where_nothing_interprets():
    table = torch.zeros(2)
    with pytest.raises(NotImplementedError, match="cross_scale_fusion_triton"):
        op.cross_scale_fusion(
            [torch.zeros(1, 4, 4)], [(2, 2)], [(2, 2)], out_grid=(2, 2), temperature=1.0, x=table, y=table
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_fakes_have_the_shapes_types_and_strides_of_the_outputs(dtype, transposed):
    with FakeTensorMode():
        corrs = [torch.empty(2, *shape, dtype=dtype, device="cuda") for shape in ((6, 6), (20, 20))]
        if transposed:
            corrs = [corr.mT for corr in corrs]
        leaves = [corr.detach().requires_grad_() for corr in corrs]
        x, y = (torch.empty(side, device="cuda", requires_grad=True) for side in (5, 4))
        outputs = torch.ops.lpmflow.cross_scale_fusion_triton(leaves, GRIDS, [4, 5, 0, 0, 4], 0.2, x, y)
        grads, grad_x, grad_y = torch.ops.lpmflow.cross_scale_fusion_triton_backward(
            outputs[0], corrs, GRIDS, [4, 5, 0, 0, 4], 0.2, x, y, *outputs
        )
    shapes = [(2, 2, 2, 4, 5), (2, 2, 4, 5), (2, 2, 4, 5), (2, 6, 6), (2, 20, 20), (5,), (4,)]
    for tensor, shape in zip((*outputs, *grads, grad_x, grad_y), shapes, strict=True):
        assert tuple(tensor.shape) == shape and tensor.is_contiguous() and tensor.device.type == "cuda"
    assert all(output.dtype == torch.float32 for output in outputs) and all(grad.dtype == dtype for grad in grads)
    assert [output.requires_grad for output in outputs] == [True, False, False]


def launches(grids: list[int], out: tuple[int, int], *, tables: bool = True) -> list:
    corrs = [
        torch.empty(1, hs * ws, ht * wt, device="meta")
        for hs, ws, ht, wt in (grids[i : i + 4] for i in range(0, len(grids), 4))
    ]
    x, y = torch.empty(out[1], device="meta"), torch.empty(out[0], device="meta")
    with keep_launches() as kept:
        outputs = op.forward(corrs, grids, [*out, 0, 0, out[0]], 0.02, x, y)
        op.backward(outputs[0], corrs, grids, [*out, 0, 0, out[0]], 0.02, x, y, *outputs, tables)
    return kept


def test_the_launchers_leave_out_what_is_not_needed():
    """Tables without a gradient cost nothing; nothing is launched for an empty batch."""
    names = [launch.kernel.fn.__name__ for launch in launches(GRIDS, (4, 5))]
    assert names == ["fuse_kernel", "fuse_kernel", *(["grad_corr_kernel", "grad_tables_kernel"] * 2)]
    names = [launch.kernel.fn.__name__ for launch in launches(GRIDS, (4, 5), tables=False)]
    assert names == ["fuse_kernel", "fuse_kernel", "grad_corr_kernel", "grad_corr_kernel"]
    corr, table = torch.empty(0, 16, 16, device="meta"), torch.empty(4, device="meta")
    with keep_launches() as kept:
        outputs = op.forward([corr], [4, 4, 4, 4], [4, 4, 0, 0, 4], 0.02, table, table)
        op.backward(outputs[0], [corr], [4, 4, 4, 4], [4, 4, 0, 0, 4], 0.02, table, table, *outputs)
    assert not kept


@pytest.mark.parametrize("out_lines", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("lines", [1, 2, 3, 5])
def test_a_part_without_the_lines_its_rows_lie_between_is_refused(lines, out_lines):
    """Every part of some rows: launched, unless the reference finds a line missing."""
    low, high, _ = reference.lines_of_rows(lines, out_lines, torch.empty(0))
    x, y = torch.empty(3, device="meta"), torch.empty(out_lines, device="meta")
    for first_line, end in itertools.combinations(range(lines + 1), 2):
        corr = torch.empty(1, 2 * (end - first_line), 4, device="meta")
        for first_row, last in itertools.combinations(range(out_lines + 1), 2):
            out = [out_lines, 3, first_line, first_row, last - first_row]
            with keep_launches() as kept:
                if low[first_row] < first_line or high[last - 1] >= end:
                    with pytest.raises(
                        ValueError, match="corrs must have those lines that the output rows lie between"
                    ):
                        op.forward([corr], [lines, 2, 2, 2], out, 0.02, x, y)
                    assert not kept
                    continue
                outputs = op.forward([corr], [lines, 2, 2, 2], out, 0.02, x, y)
            assert len(kept) == 1 and outputs[0].shape == (1, 1, 2, last - first_row, 3)


def test_grids_that_are_the_output_grid_are_not_interpolated():
    fuse = launches([2, 3, 4, 5, 4, 5, 2, 3, 4, 5, 4, 5], (4, 5))[:3]
    flags = [(launch.arguments["SAME_SOURCE"], launch.arguments["SAME_TARGET"]) for launch in fuse]
    assert flags == [(False, True), (True, False), (True, True)]


@pytest.mark.parametrize("out", [(1, 1), (2, 97), (24, 24), (32, 32), (33, 33), (48, 48), (64, 64), (1000, 3)])
@pytest.mark.parametrize("kernel", ["fuse", "grad_corr", "grad_tables"])
def test_tiles_are_powers_of_two_that_fit(kernel, out):
    for same in ((False, False), (False, True), (True, False), (True, True)):
        tiles = op.configuration(kernel, out, *same)
        cells = tiles.block_q * tiles.block_k
        assert cells & (cells - 1) == 0 and cells <= 1024 and 1 <= tiles.num_warps <= max(1, cells // 32)
        assert kernel != "grad_corr" or min(tiles.block_q, tiles.block_k) >= 16
    assert op.configuration("fuse", (24, 24), True, True).block_q == 32  # the whole grid
    assert op.configuration("fuse", (48, 48), True, True).block_q == 16  # three tiles, where 32 x 32 would be four


@pytest.mark.parametrize(("coarse", "out"), [(32, 64), (33, 97), (40, 5), (20, 21), (2, 300)])
def test_coarse_tiles_meet_no_more_output_cells_than_a_tile_has(coarse, out):
    """Along an axis that is too long for one tile, so that the loop over output cells has one pass."""
    launch = launches([1, 1, coarse, coarse], (out, out))[1]
    rows, block = launch.arguments["rows_k"], launch.arguments["BLOCK_H"]
    if coarse <= launch.arguments["COARSE"]:
        assert rows >= coarse
        return
    step = axis_step(coarse, out)
    for first in range(0, coarse, rows):
        met = [cell for cell in range(out) if first - 1 <= int(cell * step) < first + rows]
        assert len(met) <= block
