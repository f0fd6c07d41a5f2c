"""The Triton `window_stage` without a GPU: what it refuses, fakes, launches; values are in tests/interpreted."""

from __future__ import annotations

import interpreted
import pytest
import torch
from stages import inputs

pytest.importorskip("triton", minversion="3.4", reason="Triton is not installed, or older than 3.4")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from lpmflow_kernels import window_stage as op  # noqa: E402
from lpmflow_kernels._launch import Launch, keep_launches  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@interpreted.tests("window_stage")
def test_values_through_the_interpreter(done):
    interpreted.check(done)


def test_why_not_says_what_came():
    x = torch.empty(1, 4, 4, 96)
    size = {"heads": 8, "window": 4, "dtype": torch.bfloat16}
    assert op.why_not(x.double(), **size) == "it takes float32, float16 and bfloat16, and x is float64"
    assert "it runs on CUDA devices" in op.why_not(x, **size) and op.why_not(x, **size).endswith("x is on cpu")
    assert op.why_not(x[..., :1].expand(1, 4, 4, 97), **size) == "it takes maps of up to 96 channels, got 97"
    assert op.why_not(x, **{**size, "heads": 2}) == "it takes head widths of up to 32, got 48"
    assert op.why_not(x, **{**size, "window": 33}) == "it takes windows of up to 32 x 32 cells, got 33 x 33"
    wide = {**size, "dtype": torch.float64}
    assert op.why_not(x, **wide) == "it multiplies in float32, float16 and bfloat16, not in float64"


def test_cpu_tensors_are_refused_where_nothing_interprets():
    x, weights, sizes = inputs((1, 2, 2, 6, 2, 2, 8))
    with pytest.raises(NotImplementedError, match="window_stage_triton"):
        op.window_stage(x, weights, **sizes, eps=1e-5, dtype=x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_fakes_have_the_shapes_types_and_strides_of_the_outputs(transposed, dtype):
    with FakeTensorMode():
        x, weights, sizes = inputs((2, 9, 7, 12, 3, 4, 24))
        x, weights = x.to("cuda", dtype), [w.to("cuda") for w in weights]
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x
        found = op.window_stage(x, weights, **sizes, eps=1e-5, dtype=torch.bfloat16)
    for tensor, shape in zip(found, ((2, 9, 7, 12), (2, 12), (2, 12)), strict=True):
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous() and tensor.device.type == "cuda"


def launches(window: int, dtype: torch.dtype, batch: int = 2, side: int = 128) -> list[Launch]:
    _, weights, sizes = inputs((1, 1, 1, 96, 8, window, 384), dtype, device="meta")
    x = torch.empty(batch, side, side, 96, dtype=dtype, device="meta")
    with keep_launches() as kept:
        op.forward(x, list(weights), *sizes.values(), 1e-5)
    return kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 4, 7, 8, 9, 16, 32])
def test_one_launch_does_the_stage_where_a_block_is_whole_windows(window, dtype):
    """One before it for q, k and v where it is not, and in float32; one after it for the statistics of whole maps."""
    names = [launch.kernel.fn.__name__ for launch in launches(window, dtype)]
    first = ["project_kernel"] if window not in (1, 4, 8) or dtype == torch.float32 else []
    assert names == [*first, "stage_kernel", "pool_kernel"]
    assert launches(window, dtype, batch=0) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [1, 5, 16, 33])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 20, 32])
def test_blocks_hold_every_cell(window, side, dtype):
    """As many rows of the statistics as programs; rows enough for the windows, which begin at powers of two of them."""
    kept = {launch.kernel.fn.__name__: launch for launch in launches(window, dtype, side=side)}
    stage = kept["stage_kernel"]
    rows, group = stage.tiles.block_q, stage.arguments["GROUP"]
    blocks, windows = stage.arguments["p_pooled"].shape[1], stage.arguments["windows"]
    assert windows.rows * window >= side > (windows.rows - 1) * window and windows.rows == windows.columns
    assert rows % group == 0 and blocks == kept["pool_kernel"].arguments["blocks"]
    slot = rows // group
    assert slot >= 16 and slot & (slot - 1) == 0
    parts = -(-(window**2) // slot)
    assert parts == 1 or group == 1
    assert blocks == -(-(windows.rows**2) // group) * parts


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_q_k_v_of_larger_windows_are_in_memory(dtype):
    """Beside the statistics of the blocks, which are 6 % of a map of float32."""
    for window in (4, 8, 16):
        stage = launches(window, dtype)[-2]
        qkv, pooled = stage.arguments["qkv"], stage.arguments["p_pooled"]
        assert (qkv is not None) == (window == 16 or dtype == torch.float32)
        assert qkv is None or (qkv.data.shape == (2, 128, 128, 288) and qkv.data.dtype == dtype)
        assert pooled.numel() <= 0.07 * 2 * 128 * 128 * 96
