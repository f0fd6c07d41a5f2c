"""`window_stage` in one pass on CUDA devices, which triton does: against float64, in a CUDA graph, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_bench import LAYOUTS, assert_within_budget, laid_out, poisoned
from stages import exactly, inputs
from torch import Tensor

from lpmflow import ops, reference
from lpmflow.ops import PooledMap, StageWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (B, H, W, C, heads, window, hidden)
BASE = [(2, 128, 128, 96, 8, window, 384) for window in (16, 8, 4)]
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 5, 3, 6, 2, 2, 7),
    (1, 17, 9, 36, 3, 4, 144),
    (1, 33, 5, 10, 5, 8, 20),
    (1, 40, 40, 8, 2, 3, 17),
    (2, 29, 16, 32, 1, 7, 64),
    (2, 26, 13, 48, 3, 12, 97),
    (1, 21, 41, 96, 3, 20, 33),
    (1, 33, 40, 24, 2, 32, 96),
    *((2, 96, 96, 48, 3, window, 96) for window in (12, 8, 4)),
    *BASE,
]


@pytest.fixture(autouse=True)
def _installed() -> None:
    reason = ops.backend_report()["window_attention"]["triton"]
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The maps that were computed in one pass."""
    from lpmflow_kernels import window_stage as op

    seen: list[Tensor] = []
    whole = op.window_stage

    def counted(x: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(x)
        return whole(x, *args, **options)

    monkeypatch.setattr(op, "window_stage", counted)
    return seen


def run(x: Tensor, weights: StageWeights, sizes: dict[str, int]) -> PooledMap:
    with torch.no_grad():
        return ops.window_stage(x, weights, **sizes, backend="triton")


def on_device(size: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    return inputs(size, dtype, seed, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_statistics(size, dtype, passes, monkeypatch):
    x, weights, sizes = on_device(size, dtype)
    with poisoned(monkeypatch):
        found = run(x, weights, sizes)
    assert len(passes) == 1
    same, exact = reference.window_stage(x, weights, **sizes, eps=1e-5), exactly(x, weights, **sizes)
    for name, value, plain, wanted in zip(PooledMap._fields, found, same, exact, strict=True):
        assert value.dtype == dtype, name
        assert_within_budget(name, value, plain, wanted, 2)


@pytest.mark.parametrize("size", BASE, ids=str)
def test_autocast(size, passes):
    x, weights, sizes = on_device(size)
    with torch.autocast("cuda", torch.bfloat16):
        found = run(x, weights, sizes)
        same = reference.window_stage(x, weights, **sizes, eps=1e-5)
    exact = exactly(x, weights, **sizes)
    assert len(passes) == 1
    for name, value, plain, wanted in zip(PooledMap._fields, found, same, exact, strict=True):
        assert value.dtype == plain.dtype == torch.float32, name
        assert_within_budget(name, value, plain, wanted, 2)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("size", [SIZES[2], SIZES[6]], ids=str)
def test_any_strides_give_the_same_bits(size, layout):
    x, weights, sizes = on_device(size, torch.bfloat16)
    x = laid_out(x, layout)
    wanted = run(x.contiguous(), weights, sizes)
    assert all(torch.equal(*pair) for pair in zip(run(x, weights, sizes), wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", BASE, ids=str)
def test_two_runs_are_bit_equal(size, dtype):
    first, second = (run(*on_device(size, dtype)) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", BASE, ids=str)
def test_nan_stays_in_its_window(size, dtype):
    x, weights, sizes = on_device(size, dtype)
    x[1, 20, 41, 3] = float("nan")
    found, window = run(x, weights, sizes), size[5]
    wanted = torch.zeros(x.shape[:3], dtype=torch.bool, device="cuda")
    r, c = 20 // window * window, 41 // window * window
    wanted[1, r : r + window, c : c + window] = True
    assert torch.equal(found.map.isnan().all(-1), wanted) and torch.equal(found.map.isnan().any(-1), wanted)
    assert found.mean[1].isnan().all() and found.highest[1].isnan().all()
    assert found.mean[0].isfinite().all() and found.highest[0].isfinite().all()


@pytest.mark.parametrize("size", BASE, ids=str)
@pytest.mark.parametrize("factor", [1e4, 0.0])
def test_extreme_and_constant_maps(size, factor):
    x, weights, sizes = on_device(size)
    x = x * factor + 3
    for value, expected in zip(run(x, weights, sizes), exactly(x, weights, **sizes), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("size", BASE, ids=str)
def test_in_a_cuda_graph(size):
    x, weights, sizes = on_device(size, torch.bfloat16)
    run(x, weights, sizes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x, weights, sizes)
    fresh = on_device(size, torch.bfloat16, seed=1)
    for old, new in zip((x, *weights), (fresh[0], *fresh[1]), strict=True):
        old.copy_(new)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(out, run(*fresh), strict=True))


@pytest.mark.parametrize("size", BASE, ids=str)
def test_on_a_stream_of_its_own(size):
    x, weights, sizes = on_device(size)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(x, weights, sizes)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(*pair) for pair in zip(found, run(x, weights, sizes), strict=True))


@pytest.mark.parametrize("size", BASE, ids=str)
def test_compiles_whole(size):
    x, weights, sizes = on_device(size, torch.bfloat16)
    compiled = torch.compile(ops.window_stage, fullgraph=True)
    with torch.no_grad():
        found = compiled(x, weights, **sizes, backend="triton")
    for value, wanted in zip(found, run(x, weights, sizes), strict=True):
        torch.testing.assert_close(value, wanted)


def test_memory_is_bounded():
    """Beside inputs and results q, k and v of the largest windows, of smaller ones the sums of the blocks alone."""
    for size, allowed in zip(BASE, (3.2, 0.2, 0.2), strict=True):
        x, weights, sizes = on_device(size, torch.bfloat16)
        run(x, weights, sizes)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run(x, weights, sizes)
        torch.cuda.synchronize()
        kept = sum(one.numel() * one.element_size() for one in found)
        taken = torch.cuda.max_memory_allocated() - before - kept
        assert taken < allowed * x.numel() * x.element_size(), size
