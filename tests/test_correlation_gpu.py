"""`correlation` on a CUDA device: every backend that has a kernel there against float64, alone and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from kernel_bench import LAYOUTS, assert_within_budget, laid_out, poisoned
from torch import Tensor

from lpmflow import ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
SIZES = [
    (1, 1, 1, 1, 1, 0),
    (2, 3, 5, 2, 7, 1),
    (1, 2, 17, 63, 12, 1),
    (2, 1, 97, 33, 24, 2),
    (1, 8, 257, 257, 96, 1),
    (2, 8, 257, 1025, 96, 1),
    (1, 1, 63, 130, 160, 0),
    (1, 2, 129, 65, 256, 1),
    (16, 8, 1025, 1025, 96, 1),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["triton", "native"])
def backend(request) -> str:
    """A backend that can run on the device; with a gradient or without, `inputs` decides."""
    reason = ops.backend_report()["correlation"][request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


def inputs(size, dtype, layout="contiguous", seed=0) -> list[Tensor]:
    batch, heads, n, m, width, _ = size
    generator = torch.Generator("cuda").manual_seed(seed)
    draws = [torch.randn(batch, heads, tokens, width, device="cuda", generator=generator) for tokens in (n, m, m)]
    return [laid_out(x.to(dtype), layout) for x in draws]


def run(backend: str, *tensors: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    try:
        result = ops.correlation(*tensors, scale=0.3, prefix=prefix, backend=backend)
    except RuntimeError as error:
        if "cannot run" not in str(error):
            raise
        pytest.skip(str(error))
    assert ops.last_backend("correlation") == backend
    return result


def exact_for(name: str, tensors: list[Tensor], prefix: int, grads: list[Tensor] | None) -> list[Tensor]:
    """By the reference, in float64 or in the tensors' own type, gradients included when `grads` are given."""
    leaves = [x.detach().to(torch.float64 if name == "exact" else x.dtype).requires_grad_() for x in tensors]
    outputs = reference.correlation(*leaves, scale=0.3, prefix=prefix)
    if grads is None:
        return [x.detach() for x in outputs]
    wanted = torch.autograd.grad(outputs, leaves, [g.to(x.dtype) for g, x in zip(grads, outputs, strict=True)])
    return [*(x.detach() for x in outputs), *wanted]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(backend, size, dtype, monkeypatch):
    tensors = inputs(size, dtype)
    with torch.no_grad(), poisoned(monkeypatch):
        found = run(backend, *tensors, prefix=size[-1])
    same, exact = (exact_for(name, tensors, size[-1], None) for name in ("same", "exact"))
    for name, value, plain, wanted in zip(("attended", "corr"), found, same, exact, strict=True):
        assert_within_budget(name, value, plain, wanted, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("size", SIZES[:-1], ids=str)
def test_gradients(backend, size, dtype):
    tensors = inputs(size, dtype)
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = run(backend, *leaves, prefix=size[-1])
    grads = [torch.randn_like(x) for x in outputs]
    found = torch.autograd.grad(outputs, leaves, grads)
    same, exact = (exact_for(name, tensors, size[-1], grads)[2:] for name in ("same", "exact"))
    for name, value, plain, wanted in zip(("grad_q", "grad_k", "grad_v"), found, same, exact, strict=True):
        assert_within_budget(name, value, plain, wanted, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    tensors = inputs((2, 3, 65, 130, 96, 1), torch.bfloat16, layout)
    with torch.no_grad():
        found = run(backend, *tensors, prefix=1)
    for name, value, plain, wanted in zip(
        ("attended", "corr"),
        found,
        exact_for("same", tensors, 1, None),
        exact_for("exact", tensors, 1, None),
        strict=True,
    ):
        assert_within_budget(name, value, plain, wanted, 2)


def test_two_runs_are_bit_equal(backend):
    results = []
    for _ in range(2):
        leaves = [x.detach().requires_grad_() for x in inputs((2, 8, 257, 257, 96, 1), torch.bfloat16)]
        attended, corr = run(backend, *leaves, prefix=1)
        results.append([attended, corr, *torch.autograd.grad((attended.float().sum(), corr.square().sum()), leaves)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_nan_and_extreme_logits(backend):
    q, k, v = inputs((1, 2, 70, 130, 32, 1), torch.float32)
    with torch.no_grad():
        _, corr = run(backend, q * 1e4, k, v, prefix=1)
        assert torch.isfinite(corr).all()
        q[0, 1, 7, 3] = float("nan")
        attended, corr = run(backend, q, k, v, prefix=1)
    assert attended.isnan().sum() == 32 and attended[0, 1, 7].isnan().all()
    assert corr.isnan().sum() == 129 and corr[0, 6].isnan().all()


def test_in_a_cuda_graph(backend):
    tensors = inputs((2, 8, 257, 257, 96, 1), torch.bfloat16)
    with torch.no_grad():
        run(backend, *tensors, prefix=1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attended, corr = run(backend, *tensors, prefix=1)
        fresh = inputs((2, 8, 257, 257, 96, 1), torch.bfloat16, seed=1)
        for tensor, new in zip(tensors, fresh, strict=True):
            tensor.copy_(new)
        graph.replay()
        wanted = run(backend, *fresh, prefix=1)
    assert torch.equal(attended, wanted[0]) and torch.equal(corr, wanted[1])


def test_on_a_stream_of_its_own(backend):
    tensors = inputs((2, 8, 257, 257, 96, 1), torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        found = run(backend, *tensors, prefix=1)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad():
        wanted = run(backend, *tensors, prefix=1)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_compiles_whole(backend):
    compiled = torch.compile(lambda *x: ops.correlation(*x, backend=backend), fullgraph=True)
    tensors = inputs((2, 8, 257, 257, 96, 1), torch.bfloat16)
    with torch.no_grad():
        run(backend, *tensors, prefix=1)
        found, wanted = compiled(*tensors), ops.correlation(*tensors, backend=backend)
    torch.testing.assert_close(found, wanted)


def test_nothing_without_a_record_is_chosen():
    tensors = inputs((1, 2, 5, 7, 8, 1), torch.float32)
    ops.correlation(*tensors)
    from lpmflow.ops._backends import FASTEST

    wanted = (*FASTEST.get(("correlation", "cuda"), ()), "reference")
    assert ops.last_backend("correlation") == wanted[0]
