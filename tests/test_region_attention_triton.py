"""The Triton `region_attention` without a GPU: what it refuses, fakes, launches; values are in tests/interpreted."""

from __future__ import annotations

import interpreted
import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="Triton is not installed, or older than 3.4")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from lpmflow_kernels import region_attention as op  # noqa: E402
from lpmflow_kernels._launch import keep_launches  # noqa: E402

GRIDS = [2, 3, 3, 2]


@interpreted.tests("region_attention")
def test_values_and_gradients_through_the_interpreter(done):
    interpreted.check(done)


def test_why_not_says_what_came():
    q = torch.empty(1, 1, 1, 8)
    assert op.why_not(q.double()) == "it takes float32, float16 and bfloat16, and q is float64"
    assert op.why_not(q.new_empty(1, 1, 1, 257)) == "it takes head widths D up to 256, got 257"
    assert "it runs on CUDA devices" in op.why_not(q) and op.why_not(q).endswith("q is on cpu")


def test_cpu_tensors_are_refused_where_nothing_interprets():
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(NotImplementedError, match="region_attention_triton"):
        op.region_attention(q, q, q, torch.zeros(1, 4), source_grid=(1, 1), target_grid=(1, 1), prefix=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_fakes_have_the_shapes_types_and_strides_of_the_outputs(dtype, transposed):
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 14, 3, 24, dtype=dtype, device="cuda").transpose(1, 2) for _ in range(3))
        if not transposed:
            q, k, v = (x.contiguous() for x in (q, k, v))
        inputs = [*(x.detach().requires_grad_() for x in (q, k, v, torch.empty(3, 100, device="cuda"))), GRIDS, 1]
        attended, stats = torch.ops.lpmflow.region_attention_triton(*inputs)
        grads = torch.ops.lpmflow.region_attention_triton_backward(attended, *inputs, attended, stats)
    assert tuple(attended.shape) == (2, 3, 14, 24) and attended.transpose(1, 2).is_contiguous()
    for tensor, shape in zip((stats, *grads), [(2, 2, 3, 14), *[(2, 3, 14, 24)] * 3, (3, 100)], strict=True):
        assert tuple(tensor.shape) == shape and tensor.is_contiguous() and tensor.device.type == "cuda"
    assert [x.dtype for x in (attended, stats, *grads)] == [dtype, torch.float32, *[dtype] * 3, torch.float32]
    assert attended.requires_grad and not stats.requires_grad


def launches(batch: int = 2, *, grids: tuple[int, ...] = (16, 16, 16, 16), width: int = 96, table: bool = True) -> list:
    hs, ws, ht, wt = grids
    q = torch.empty(batch, 8, 2 + hs * ws + ht * wt, width, dtype=torch.bfloat16, device="meta")
    columns = (2 * max(hs, ht) - 1) * (2 * max(ws, wt) - 1) * 4
    inputs = (q, q, q, torch.empty(8, columns, device="meta"), list(grids), 1)
    with keep_launches() as kept:
        outputs = op.forward(*inputs)
        op.backward(outputs[0], *inputs, *outputs, table)
    return kept


def test_the_launchers_leave_out_what_is_not_needed():
    """A table without a gradient costs nothing; nothing is launched for an empty batch."""
    forward, backward = ["lay_out_kernel", "attend_kernel"], ["lay_out_kernel", "dq_kernel", "dkv_kernel"]
    names = [launch.kernel.fn.__name__ for launch in launches()]
    assert names == [*forward, *backward, "dtable_kernel"]
    assert [launch.kernel.fn.__name__ for launch in launches(table=False)] == [*forward, *backward]
    assert not launches(0)


def test_partial_sums_do_not_grow_with_the_batch():
    """Four times the table, or less than 8 MiB where the batch is split; never anything like N x N."""
    for grids in ((16, 16, 16, 16), (32, 32, 32, 32), (12, 12, 12, 12), (1, 97, 64, 2), (1, 1, 1, 1)):
        table = 8 * (2 * max(grids[::2]) - 1) * (2 * max(grids[1::2]) - 1) * 4
        for batch in (1, 16, 1000):
            partial = launches(batch, grids=grids)[-1].arguments["p_partial"]
            assert partial.shape[0] <= batch and partial.numel() <= max(4 * table, 2**21)


@pytest.mark.parametrize("width", [12, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_powers_of_two(width, dtype):
    for kernel in ("attend", "dq", "dkv", "dtable"):
        tiles = op.configuration(kernel, width, dtype)
        for side in (tiles.block_q, tiles.block_k):
            assert side >= 16 and side & (side - 1) == 0
        assert kernel != "dtable" or tiles.block_q == tiles.block_k


def test_rectangles_cover_the_grids_with_little_to_spare():
    assert op.rectangle([16, 16, 16, 16], 64) == (4, 16)
    assert op.rectangle([12, 12, 12, 12], 64) == (4, 16)
    assert op.rectangle([24, 24, 24, 24], 64) == (8, 8)
    assert op.rectangle([32, 32, 32, 32], 64) == (1, 64) or op.rectangle([32, 32, 32, 32], 64) == (2, 32)
    assert op.rectangle([1, 97, 1, 97], 64) == (1, 64) and op.rectangle([97, 1, 97, 1], 64) == (64, 1)
