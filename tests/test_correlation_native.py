"""`correlation` by the native module, for every instruction set of this machine: values, gradients, registration."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from kernel_bench import LAYOUTS, assert_within_budget, laid_out, poisoned
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lpmflow import ops, reference

if (missing := ops.backend_report()["correlation"]["native"]) is not None:
    pytest.skip(missing, allow_module_level=True)
NATIVE = importlib.import_module("lpmflow_kernels._native")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# (B, H, N, M, D, prefix)
SIZES = [
    (1, 1, 1, 1, 1, 0),
    (1, 1, 1, 1, 3, 1),
    (2, 3, 5, 2, 7, 1),
    (1, 2, 17, 63, 12, 1),
    (2, 1, 97, 33, 24, 2),
    (1, 8, 50, 97, 96, 1),
    (1, 1, 63, 130, 256, 0),
    (3, 2, 2, 17, 33, 2),
]


@pytest.fixture(params=NATIVE.instruction_sets())
def isa(request) -> Iterator[str]:
    before = NATIVE.instruction_set()
    assert NATIVE.use_instruction_set(request.param)
    yield request.param
    NATIVE.use_instruction_set(before)


def inputs(size, dtype=torch.float32, layout="contiguous", seed=0) -> list[Tensor]:
    batch, heads, n, m, width, _ = size
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(batch, heads, tokens, width, generator=generator) for tokens in (n, m, m)]
    return [laid_out(x.to(dtype), layout) for x in draws]


def everything(q: Tensor, k: Tensor, v: Tensor, prefix: int, run, dtype: torch.dtype | None = None, seed: int = 1):
    """Outputs and gradients by name, of the op `run` in `dtype`, for fixed gradients of the outputs."""
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v))
    attended, corr = run(q, k, v, scale=0.3, prefix=prefix)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator).to(q.dtype).to(x.dtype) for x in (attended, corr)]
    found = torch.autograd.grad((attended, corr), (q, k, v), grads)
    return dict(zip(("attended", "corr", "grad_q", "grad_k", "grad_v"), (attended, corr, *found), strict=True))


def by_native(q, k, v, *, scale, prefix):
    result = ops.correlation(q, k, v, scale=scale, prefix=prefix, backend="native")
    assert ops.last_backend("correlation") == "native"
    return result


def compare(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> None:
    found = everything(q, k, v, prefix, by_native)
    same = everything(q, k, v, prefix, reference.correlation)
    exact = everything(q, k, v, prefix, reference.correlation, torch.float64)
    for name, value in found.items():
        assert value.dtype == same[name].dtype, name
        assert_within_budget(name, value, same[name], exact[name], 3 if name.startswith("grad") else 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(isa, size, dtype, monkeypatch):
    with poisoned(monkeypatch):
        compare(*inputs(size, dtype), prefix=size[-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    compare(*inputs((2, 3, 21, 37, 24, 1), layout=layout), prefix=1)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    """Five threads for two heads: the rows of a head are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(*inputs((1, 2, 301, 40, 16, 1)), prefix=1)
        compare(*inputs((3, 2, 60, 40, 16, 1)), prefix=1)
    finally:
        torch.set_num_threads(before)


def test_two_runs_are_bit_equal():
    q, k, v = inputs((2, 3, 150, 70, 32, 1))
    first, second = (everything(q, k, v, 1, by_native) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("used", ["attended", "corr"])
def test_gradients_when_one_output_is_used(used):
    grads = []
    for run, dtype in ((by_native, torch.float32), (reference.correlation, torch.float64)):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs((1, 2, 20, 30, 8, 1)))
        output = run(q, k, v, scale=0.3, prefix=1)[0 if used == "attended" else 1]
        weight = torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.shape)
        grads.append(torch.autograd.grad((output * weight).sum(), (q, k, v), allow_unused=True))
    for name, found, wanted in zip("qkv", *grads, strict=True):
        wanted = torch.zeros_like(found, dtype=torch.float64) if wanted is None else wanted
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in inputs((1, 2, 5, 4, 3, 1), torch.float64))
    assert torch.autograd.gradcheck(lambda *x: by_native(*x, scale=0.5, prefix=1), (q, k, v))


def test_extreme_logits_and_constant_rows(isa):
    size = (1, 2, 9, 21, 8, 1)
    for factor in (1e4, -1e4, 0.0):
        q, k, v = inputs(size)
        q = q * factor
        found, exact = (run(q, k, v, scale=1.0, prefix=1) for run in (by_native, reference.correlation))
        for value, wanted in zip(found, exact, strict=True):
            assert torch.isfinite(value).all()
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


def test_nan_comes_out_where_it_belongs(isa):
    q, k, v = inputs((2, 2, 20, 21, 8, 1))
    q[0, 1, 7, 3] = float("nan")
    attended, corr = by_native(q, k, v, scale=1.0, prefix=1)
    wanted_attended, wanted_corr = reference.correlation(q, k, v, scale=1.0, prefix=1)
    assert torch.equal(attended.isnan(), wanted_attended.isnan()) and attended.isnan().sum() == 8
    assert torch.equal(corr.isnan(), wanted_corr.isnan()) and corr.isnan().sum() == 20
    k[1, 0, 4, 0] = float("nan")  # one key spoils every row of its head
    attended, corr = by_native(q, k, v, scale=1.0, prefix=1)
    assert attended[1, 0].isnan().all() and attended[1, 1].isfinite().all() and corr[1].isnan().all()
    q, k, v = inputs((1, 1, 4, 5, 8, 1))
    k[0, 0, 2] = float("inf")
    found, wanted = (run(q, k, v, scale=1.0, prefix=1) for run in (by_native, reference.correlation))
    assert torch.equal(found[1].isnan(), wanted[1].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", ["1", "all", "negative"])
def test_every_nan_comes_out(isa, dtype, bits):
    """A NaN is any number with a full exponent and a payload, not only the one that float("nan") is."""
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    canonical = torch.tensor(float("nan"), dtype=dtype).view(integer)
    pattern = {
        "1": canonical | 1,
        "all": torch.full_like(canonical, -1),
        "negative": canonical | torch.iinfo(integer).min,
    }[bits]
    nan = pattern.view(dtype)
    assert nan.isnan()
    q, k, v = inputs((1, 2, 20, 21, 8, 1), dtype)
    q[0, 1, 7, 3] = nan
    found, wanted = (run(q, k, v, scale=1.0, prefix=1) for run in (by_native, reference.correlation))
    for value, expected in zip(found, wanted, strict=True):
        assert torch.equal(value.isnan(), expected.isnan())
    q, k, v = inputs((1, 2, 20, 21, 8, 1), dtype)
    k[0, 1, 3] = nan
    attended, corr = by_native(q, k, v, scale=1.0, prefix=1)
    assert attended[0, 1].isnan().all() and corr.isnan().all()


def test_nothing_but_the_prefix():
    q, k, v = inputs((1, 2, 3, 2, 4, 2))
    attended, corr = by_native(q, k, v, scale=1.0, prefix=2)
    assert corr.shape == (1, 1, 0)
    torch.testing.assert_close(attended, reference.correlation(q, k, v, scale=1.0, prefix=2)[0])


@pytest.mark.parametrize("size", [(0, 3, 5, 7, 4, 1), (2, 0, 5, 7, 4, 1)])
def test_empty(size):
    q, k, v = (x.requires_grad_() for x in inputs(size))
    attended, corr = by_native(q, k, v, scale=1.0, prefix=1)
    assert attended.shape == q.shape and corr.shape == (size[0], 4, 6) and not corr.any()
    (attended.sum() + corr.sum()).backward()
    assert q.grad.shape == q.shape


# Choice and refusals


def test_the_automatic_choice_on_the_cpu():
    q, k, v = inputs((1, 2, 5, 7, 4, 1))
    ops.correlation(q, k, v)
    assert ops.last_backend("correlation") == "native"
    ops.correlation(*(x.repeat(1, 1, 1, 100) for x in (q, k, v)))  # wider than it takes
    assert ops.last_backend("correlation") == "reference"


def test_too_wide_is_refused_by_name():
    q, k, v = inputs((1, 1, 3, 3, 257, 1))
    with pytest.raises(RuntimeError, match="'native' cannot run: it takes head widths D up to 256, got 257"):
        ops.correlation(q, k, v, backend="native")


def test_second_derivatives_are_refused():
    q, k, v = (x.requires_grad_() for x in inputs((1, 1, 3, 3, 4, 1)))
    attended, _ = by_native(q, k, v, scale=1.0, prefix=1)
    (grad,) = torch.autograd.grad(attended.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="the native backend has no second derivative"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by the first torch.func.jvp itself
def test_forward_mode_goes_to_the_reference():
    q, k, v = inputs((1, 2, 5, 7, 4, 1), torch.float64)
    tangent = torch.ones_like(q)
    _, found = torch.func.jvp(lambda x: ops.correlation(x, k, v)[1], (q,), (tangent,))
    _, wanted = torch.func.jvp(lambda x: reference.correlation(x, k, v, scale=0.5, prefix=1)[1], (q,), (tangent,))
    torch.testing.assert_close(found, wanted)
    assert found.abs().max() > 0.01 and ops.last_backend("correlation") == "reference"
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, tangent)
        with pytest.raises(RuntimeError, match="'native' cannot run: it has no forward-mode derivative"):
            ops.correlation(dual, k, v, backend="native")
        ops.correlation(q, k, v, backend="native")  # no tangent, nothing to lose


def test_vmap_is_refused():
    q, k, v = inputs((4, 2, 5, 7, 4, 1))
    with pytest.raises(RuntimeError, match="cannot be transformed by torch.func"):
        torch.func.vmap(lambda *x: by_native(*(y[None] for y in x), scale=1.0, prefix=1))(q, k, v)


def test_an_unknown_instruction_set_is_refused():
    code = "import lpmflow_kernels.native"
    environment = {**os.environ, "LPMFLOW_CPU_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "LPMFLOW_CPU_ISA must be one of" in done.stderr and "got 'mmx'" in done.stderr


# PyTorch's machinery


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own, on inputs it made
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(layout):
    q, k, v = (x.requires_grad_() for x in inputs((2, 2, 5, 7, 4, 1), layout=layout))
    torch.library.opcheck(torch.ops.lpmflow.correlation_native.default, (q, k, v, 0.5, 1))
    grads = (torch.randn(2, 2, 5, 4), torch.randn(2, 4, 6))
    arguments = (*grads, *(x.detach() for x in (q, k, v)), 0.5, 1)
    torch.library.opcheck(torch.ops.lpmflow.correlation_native_backward.default, arguments)


def test_shapes_without_numbers():
    with FakeTensorMode():
        q, k = torch.empty(2, 3, 9, 8), torch.empty(2, 3, 5, 8)
        attended, corr = ops.correlation(q, k, k, prefix=2, backend="native")
    assert attended.shape == (2, 3, 9, 8) and corr.shape == (2, 7, 3) and attended.stride() == (216, 72, 8, 1)


def test_compiles_whole_and_once():
    compiled = torch.compile(ops.correlation, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            q, k, v = (x.requires_grad_() for x in inputs((1, 2, 9, 11, 8, 1), seed=seed))
            attended, corr = compiled(q, k, v)
            assert ops.last_backend("correlation") == "native"
            (attended.sum() + corr.square().sum()).backward()
            found, q.grad = q.grad, None
            attended, corr = reference.correlation(q, k, v, scale=8**-0.5, prefix=1)
            (attended.sum() + corr.square().sum()).backward()
            torch.testing.assert_close(found, q.grad, rtol=1e-4, atol=1e-5)


def test_autocast_leaves_the_inputs_dtype():
    q, k, v = inputs((1, 2, 9, 11, 8, 1))
    with torch.autocast("cpu", torch.bfloat16):
        attended, corr = by_native(q, k, v, scale=1.0, prefix=1)
    assert attended.dtype == torch.float32
    torch.testing.assert_close(corr, by_native(q, k, v, scale=1.0, prefix=1)[1])
