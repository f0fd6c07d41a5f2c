"""`window_attention` by every backend with a kernel for CUDA devices: against float64, in a CUDA graph, compiled."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from kernel_bench import LAYOUTS, assert_within_budget, laid_out, poisoned
from torch import Tensor

from lpmflow import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (B, H, W, heads, head width, window, shift)
BASE = [(2, 128, 128, 8, 12, window, 0) for window in (16, 8, 4)]
SIZES = [
    (1, 1, 1, 1, 1, 1, 0),
    (2, 1, 5, 2, 3, 2, 0),
    (1, 5, 2, 1, 1, 4, 1),
    (2, 9, 17, 2, 5, 8, 3),
    (1, 7, 8, 2, 24, 7, 0),
    (1, 17, 33, 9, 12, 4, 3),
    (1, 97, 5, 2, 2, 3, 2),
    (1, 17, 33, 2, 16, 16, 5),
    (2, 26, 13, 3, 16, 12, 0),
    (1, 21, 41, 1, 4, 20, 0),
    (1, 33, 40, 2, 12, 32, 7),
    (1, 19, 9, 3, 96, 8, 1),
    (1, 20, 18, 1, 128, 16, 0),
    (2, 32, 32, 8, 96, 4, 0),
    (2, 24, 24, 6, 32, 4, 0),
    *BASE,
]


BACKEND = "triton"


@pytest.fixture(autouse=True, params=["triton", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that is installed here; native's gradients are Triton's work."""
    for needed in {request.param, "triton"}:
        reason = ops.backend_report()["window_attention"][needed]
        if reason is not None:
            pytest.skip(reason)
    monkeypatch.setattr(sys.modules[__name__], "BACKEND", request.param)
    return str(request.param)


def inputs(size: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    batch, height, width, heads, head_width, window, _ = size
    generator = torch.Generator("cuda").manual_seed(seed)
    qkv = torch.randn(batch, height, width, 3 * heads * head_width, generator=generator, device="cuda")
    return qkv.to(dtype), torch.randn((2 * window - 1) ** 2, heads, generator=generator, device="cuda")


def run(qkv: Tensor, table: Tensor, size: Any, backend: str | None = None) -> Tensor:
    out = ops.window_attention(qkv, table, heads=size[3], window=size[5], shift=size[6], backend=backend or BACKEND)
    assert ops.last_backend("window_attention") == (backend or BACKEND)
    return out


def upstream(out: Tensor) -> Tensor:
    """A gradient of the output that is exact in every type."""
    grad = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return grad.bfloat16().to(out.dtype)


def everything(qkv: Tensor, table: Tensor, size: Any, backend: str | None = None) -> dict[str, Tensor]:
    """The output and the gradients by name."""
    leaves = [x.detach().requires_grad_() for x in (qkv, table)]
    out = run(*leaves, size, backend)
    grads = torch.autograd.grad(out, leaves, upstream(out))
    return dict(zip(("out", "grad_qkv", "grad_table"), (out.detach(), *grads), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, dtype, monkeypatch):
    qkv, table = inputs(size, dtype)
    with poisoned(monkeypatch):
        found = everything(qkv, table, size)
    same = everything(qkv, table, size, "reference")
    exact = everything(qkv.double(), table.double(), size, "reference")
    for name, value in found.items():
        assert_within_budget(name, value, same[name], exact[name], 3 if name.startswith("grad") else 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [SIZES[5], SIZES[7]], ids=str)
def test_any_strides_give_the_same_bits(size, layout):
    qkv, table = inputs(size)
    qkv = laid_out(qkv, layout)
    wanted = everything(qkv.contiguous(), table, size)
    for name, value in everything(qkv, table, size).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", BASE, ids=str)
def test_two_runs_are_bit_equal(size, dtype):
    first, second = (everything(*inputs(size, dtype), size) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("size", BASE, ids=str)
def test_constant_rows_are_uniform_even_where_logits_are_large(size):
    qkv, table = inputs(size)
    qkv[..., : 2 * size[3] * size[4]] = 180.0
    qkv[..., 2 * size[3] * size[4] :] = 1.0
    found = run(qkv, torch.full_like(table, 1e4), size)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", BASE, ids=str)
def test_nan_stays_in_its_window_and_head(size):
    qkv, table = inputs(size)
    qkv[1, 20, 40, -1] = float("nan")  # of v
    found, window = run(qkv, table, size).isnan(), size[5]
    r, c = 20 // window * window, 40 // window * window
    assert found[1, r : r + window, c : c + window, -1].all() and found.sum() == window**2


@pytest.mark.parametrize("size", BASE, ids=str)
def test_in_a_cuda_graph(size):
    qkv, table = inputs(size)
    with torch.no_grad():
        run(qkv, table, size)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(qkv, table, size)
        fresh = inputs(size, seed=1)
        for old, new in zip((qkv, table), fresh, strict=True):
            old.copy_(new)
        graph.replay()
        wanted = run(*fresh, size)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("size", BASE, ids=str)
def test_on_a_stream_of_its_own(size):
    qkv, table = inputs(size)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = everything(qkv, table, size)
    torch.cuda.current_stream().wait_stream(stream)
    for name, value in everything(qkv, table, size).items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("size", BASE, ids=str)
def test_compiles_whole_with_gradients(size):
    qkv, table = inputs(size)
    wanted = everything(qkv, table, size)
    compiled = torch.compile(ops.window_attention, fullgraph=True)
    leaves = [x.detach().requires_grad_() for x in (qkv, table)]
    out = compiled(*leaves, heads=size[3], window=size[5], backend=BACKEND)
    grads = torch.autograd.grad(out, leaves, upstream(out))
    for name, value in zip(wanted, (out, *grads), strict=True):
        torch.testing.assert_close(value, wanted[name], msg=lambda text, name=name: f"{name}: {text}")


def test_memory_is_bounded():
    """Beside inputs and results at most the sums of dS, of 32 MiB: the logits of all windows would be 256."""
    size = BASE[0]
    leaves = [x.requires_grad_() for x in inputs(size, torch.bfloat16)]
    grad = torch.randn_like(run(*leaves, size))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run(*leaves, size)
    results = [out, *torch.autograd.grad(out, leaves, grad)]
    torch.cuda.synchronize()
    kept = sum(x.numel() * x.element_size() for x in results)
    assert torch.cuda.max_memory_allocated() - before - kept < 48 << 20
