"""The Triton `window_attention` without a GPU: what it refuses, fakes, launches; values are in tests/interpreted."""

from __future__ import annotations

import interpreted
import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="Triton is not installed, or older than 3.4")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from lpmflow_kernels import window_refinement as op  # noqa: E402
from lpmflow_kernels._launch import Launch, keep_launches  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@interpreted.tests("window_refinement")
def test_values_and_gradients_through_the_interpreter(done):
    interpreted.check(done)


def test_why_not_says_what_came():
    qkv = torch.empty(1, 4, 4, 36)
    size = {"width": 12, "window": 4}
    assert op.why_not(qkv.double(), **size) == "it takes float32, float16 and bfloat16, and qkv is float64"
    assert "it runs on CUDA devices" in op.why_not(qkv, **size) and op.why_not(qkv, **size).endswith("qkv is on cpu")
    assert op.why_not(qkv, width=129, window=4) == "it takes head widths of up to 128, got 129"
    assert op.why_not(qkv, width=12, window=33) == "it takes windows of up to 32 x 32 cells, got 33 x 33"


def test_cpu_tensors_are_refused_where_nothing_interprets():
    with pytest.raises(NotImplementedError, match="window_attention_triton"):
        op.window_attention(torch.zeros(1, 2, 2, 6), torch.zeros(9, 2), heads=2, window=2, shift=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("window", [4, 16])
def test_fakes_have_the_shapes_types_and_strides_of_the_outputs(window, transposed, dtype):
    with FakeTensorMode():
        qkv = torch.empty(2, 9, 7, 36, dtype=dtype, device="cuda")
        qkv = (qkv.transpose(1, 2).contiguous().transpose(1, 2) if transposed else qkv).requires_grad_()
        table = torch.empty((2 * window - 1) ** 2, 3, device="cuda", requires_grad=True)
        out = op.window_attention(qkv, table, heads=3, window=window, shift=1)
        arguments = (x.detach() for x in (out, qkv, table))
        grads = torch.ops.lpmflow.window_attention_triton_backward(*arguments, 3, window, 1)
    wanted = [((2, 9, 7, 12), dtype), (qkv.shape, dtype), (table.shape, torch.float32)]
    for tensor, expected in zip((out, *grads), wanted, strict=True):
        assert (tensor.shape, tensor.dtype) == expected
        assert tensor.is_contiguous() and tensor.device.type == "cuda" and tensor.requires_grad == (tensor is out)


def launches(
    batch: int = 1, side: int = 128, heads: int = 8, width: int = 12, window: int = 16, shift: int = 0, **options: bool
) -> list[Launch]:
    qkv = torch.empty(batch, side, side, 3 * heads * width, device="meta")
    table = torch.empty((2 * window - 1) ** 2, heads, device="meta")
    with keep_launches() as kept:
        out = op.forward(qkv, table, heads, window, shift)
        op.backward(out, qkv, table, heads, window, shift, **options)
    return kept


def names(**options: int | bool) -> list[str]:
    return [launch.kernel.fn.__name__.removesuffix("_kernel") for launch in launches(**options)]


def test_the_launchers_leave_out_what_is_not_needed():
    """A table without a gradient costs nothing; nothing is launched for an empty batch."""
    assert names() == ["attend", "rows", "dq", "dkv", "pairs", "grad_table"]
    assert names(table=False) == ["attend", "rows", "dq", "dkv"]
    assert names(window=8) == ["attend", "window", "grad_table"]
    assert names(window=8, table=False) == ["attend", "window"]
    assert names(batch=0) == []


@pytest.mark.parametrize(
    ("side", "window", "shift", "rows", "lead"),
    [(128, 16, 0, 8, 0), (129, 16, 0, 9, 0), (128, 16, 5, 9, 11), (5, 8, 5, 1, 3), (6, 8, 5, 2, 3), (3, 16, 0, 1, 0)],
)
def test_windows_begin_where_the_shift_says(side, window, shift, rows, lead):
    windows = launches(side=side, window=window, shift=shift, batch=3)[0].arguments["windows"]
    assert (windows.rows, windows.columns, windows.lead) == (rows, rows, lead)
    assert windows.count == 3 * rows**2 and windows.cells == 3 * side**2


@pytest.mark.parametrize("batch", [1, 16, 300])
@pytest.mark.parametrize("window", [1, 4, 7, 8, 12, 16, 32])
def test_sums_of_runs_stay_within_their_bound(window, batch):
    """Unless one run is more; and no run is without a window."""
    kernel = "window" if op.is_whole(window, 12) else "pairs"
    (found,) = (x for x in launches(window=window, batch=batch) if x.kernel.fn.__name__ == f"{kernel}_kernel")
    pairs, windows = found.arguments["p_pairs"], found.arguments["windows"]
    assert pairs.shape[1:] == (8, window**2, window**2)
    assert len(pairs) == 1 or 4 * pairs.numel() <= op._PAIRS_BYTES
    assert (len(pairs) - 1) * windows.run < windows.count <= len(pairs) * windows.run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("width", [1, 12, 32, 33, 64, 96, 128])
@pytest.mark.parametrize("window", [1, 4, 5, 7, 8, 9, 16, 32])
def test_tiles_are_powers_of_two_that_fit(window, width, heads, dtype):
    whole = op.is_whole(window, width)
    for kernel in ("attend", "window") if whole else ("attend", "rows", "dq", "dkv", "pairs"):
        tiles = op.configuration(kernel, window, width, heads, dtype)
        for size in (tiles.block_q, tiles.block_k, tiles.num_warps):
            assert size & (size - 1) == 0
        assert min(tiles.block_q, tiles.block_k) >= 16 and 1 <= tiles.num_warps <= 8
        if kernel == "window":
            assert tiles.block_q == tiles.block_k >= window**2
    assert whole or op.group(window, width, heads) == 1  # the kernels of larger windows take one head
