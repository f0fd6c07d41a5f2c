"""`region_attention` by every backend with a kernel for CUDA devices: against float64, in a CUDA graph, compiled."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from kernel_bench import LAYOUTS, assert_within_budget, einsum_region_attention, laid_out, poisoned
from torch import Tensor

from lpmflow import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("attended", "grad_q", "grad_k", "grad_v", "grad_table")
# B, H, D, prefix, source grid, target grid
BASE = (2, 8, 96, 1, (16, 16), (16, 16))
CASES = [
    (1, 1, 1, 0, (1, 1), (1, 1)),
    (2, 2, 3, 1, (1, 1), (1, 1)),
    (1, 2, 7, 3, (2, 5), (4, 1)),
    (2, 3, 24, 1, (5, 2), (5, 2)),
    (1, 2, 33, 0, (17, 1), (1, 17)),
    (1, 1, 130, 1, (3, 20), (11, 6)),
    (3, 2, 12, 2, (7, 5), (1, 1)),
    (1, 1, 5, 1, (2, 97), (3, 33)),
    (1, 2, 160, 1, (9, 9), (9, 9)),
    (2, 1, 256, 1, (13, 7), (6, 11)),
    (2, 6, 32, 1, (12, 12), (12, 12)),
    (2, 4, 64, 1, (24, 24), (24, 24)),
    (20, 8, 96, 1, (16, 16), (16, 16)),
    BASE,
]


BACKEND = "triton"


@pytest.fixture(autouse=True, params=["triton", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that is installed here; native's gradients are Triton's work."""
    for needed in {request.param, "triton"}:
        reason = ops.backend_report()["region_attention"][needed]
        if reason is not None:
            pytest.skip(reason)
    monkeypatch.setattr(sys.modules[__name__], "BACKEND", request.param)
    return str(request.param)


def inputs(case: Any, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> list[Tensor]:
    """q, k, v and the bias table, which is float32 as in the model under autocast."""
    batch, heads, width, prefix, source, target = case
    tokens = 2 * prefix + source[0] * source[1] + target[0] * target[1]
    columns = (2 * max(source[0], target[0]) - 1) * (2 * max(source[1], target[1]) - 1) * 4
    generator = torch.Generator("cuda").manual_seed(seed)
    draws = [torch.randn(batch, heads, tokens, width, device="cuda", generator=generator) for _ in range(3)]
    table = torch.randn(heads, columns, device="cuda", generator=generator)
    return [*(laid_out(x.to(dtype), layout) for x in draws), table]


def kernel(*tensors: Tensor, backend: str | None = None, **grids: Any) -> Tensor:
    attended = ops.region_attention(*tensors, **grids, backend=backend or BACKEND)
    assert ops.last_backend("region_attention") == (backend or BACKEND)
    return attended


def exact(*tensors: Tensor, **grids: Any) -> Tensor:
    return kernel(*tensors, backend="reference", **grids)


def run(case: Any, tensors: list[Tensor], function: Any = kernel) -> Tensor:
    *_, prefix, source, target = case
    return function(*tensors, source_grid=source, target_grid=target, prefix=prefix)


def everything(
    case: Any, tensors: list[Tensor], function: Any = kernel, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Result and gradients by name, for a fixed gradient of the result."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    attended = run(case, leaves, function)
    generator = torch.Generator("cuda").manual_seed(1)
    grad = torch.randn(attended.shape, device="cuda", generator=generator).to(tensors[0].dtype)
    return dict(zip(NAMES, (attended.detach(), *torch.autograd.grad(attended, leaves, grad.to(attended))), strict=True))


def compare(case: Any, tensors: list[Tensor], found: dict[str, Tensor]) -> None:
    same, wanted = (
        everything(case, tensors, einsum_region_attention), everything(case, tensors, exact, torch.float64)
    )  # fmt: skip
    for name, value in found.items():
        assert_within_budget(name, value, same[name], wanted[name], 3 if name.startswith("grad") else 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(backend, case, dtype, monkeypatch):
    if backend == "native" and case[2] > 128:
        pytest.skip("native takes head widths up to 128 on CUDA devices")
    tensors = inputs(case, dtype)
    with poisoned(monkeypatch):
        found = everything(case, tensors)
    compare(case, tensors, found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    case = (2, 3, 96, 1, (9, 7), (8, 10))
    tensors = inputs(case, torch.bfloat16, layout)
    compare(case, tensors, everything(case, tensors))


def test_two_runs_are_bit_equal():
    first, second = (everything(BASE, inputs(BASE, torch.bfloat16)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("factor", [1e4, -1e4, 0.0])
def test_extreme_logits_and_constant_rows(factor):
    q, k, v, table = inputs(BASE)
    for tensors in ([q * factor, k, v, table], [q, k, v, table * factor], [q * 0, k, v, table * 0]):
        found = everything(BASE, tensors)
        assert all(torch.isfinite(value).all() for value in found.values())
        # logits of 1e5 keep two digits after the point, in any order of operations
        torch.testing.assert_close(found["attended"], run(BASE, tensors, exact), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("index", "spoilt"), [(0, (0, 1, 7, 3)), (1, (1, 0, 4, 0)), (2, (0, 0, 2, 5)), (3, (1, 400))])
def test_nan_comes_out_where_it_belongs(index, spoilt):
    tensors = inputs(BASE)
    tensors[index][spoilt] = float("nan")
    found, wanted = everything(BASE, tensors), everything(BASE, tensors, exact)
    for name, value in wanted.items():
        assert value.isnan().any() or name == "grad_v"
        assert torch.equal(found[name].isnan(), value.isnan()), name


def test_no_memory_grows_with_the_square_of_the_tokens():
    """One (N, N) matrix of 8194 tokens in float32 would be 256 MiB, for each head."""
    case = (1, 2, 32, 1, (64, 64), (64, 64))
    leaves = [x.requires_grad_() for x in inputs(case, torch.bfloat16)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(case, leaves).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


def test_in_a_cuda_graph():
    tensors = inputs(BASE, torch.bfloat16)
    with torch.no_grad():
        run(BASE, tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attended = run(BASE, tensors)
        fresh = inputs(BASE, torch.bfloat16, seed=1)
        for old, new in zip(tensors, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(attended, run(BASE, fresh))


def test_on_a_stream_of_its_own():
    tensors = inputs(BASE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = everything(BASE, tensors)
    torch.cuda.current_stream().wait_stream(stream)
    for name, value in everything(BASE, tensors).items():
        assert torch.equal(found[name], value), name


def test_compiles_whole_with_gradients():
    wanted = everything(BASE, inputs(BASE))
    compiled = torch.compile(lambda *x: run(BASE, list(x)), fullgraph=True)
    leaves = [x.requires_grad_() for x in inputs(BASE)]
    attended = compiled(*leaves)
    generator = torch.Generator("cuda").manual_seed(1)
    grads = torch.autograd.grad(attended, leaves, torch.randn(attended.shape, device="cuda", generator=generator))
    for name, value in zip(NAMES, (attended, *grads), strict=True):
        torch.testing.assert_close(value, wanted[name], msg=lambda text, name=name: f"{name}: {text}")


def test_nothing_without_a_record_is_chosen():
    from lpmflow.ops._backends import FASTEST

    run(CASES[3], inputs(CASES[3]), ops.region_attention)
    wanted = (*FASTEST.get(("region_attention", "cuda"), ()), "reference")
    assert ops.last_backend("region_attention") == wanted[0]
