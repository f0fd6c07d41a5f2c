"""`region_attention` by the native module, for every instruction set here: values, gradients, memory, registration."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from kernel_bench import LAYOUTS, assert_within_budget, laid_out, poisoned
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lpmflow import ops

if (missing := ops.backend_report()["region_attention"]["native"]) is not None:
    pytest.skip(missing, allow_module_level=True)
NATIVE = importlib.import_module("lpmflow_kernels._native")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = ("attended", "grad_q", "grad_k", "grad_v", "grad_table")
# B, H, D, prefix, source grid, target grid
CASES = [
    (1, 1, 1, 0, (1, 1), (1, 1)),
    (2, 2, 3, 1, (1, 1), (1, 1)),
    (1, 2, 7, 3, (2, 5), (4, 1)),
    (2, 3, 24, 1, (5, 2), (5, 2)),
    (1, 2, 33, 0, (17, 1), (1, 17)),
    (1, 1, 130, 1, (3, 20), (11, 6)),
    (3, 2, 12, 2, (7, 5), (1, 1)),
    (1, 8, 96, 1, (9, 9), (9, 9)),
    (1, 1, 5, 1, (2, 97), (3, 33)),
]


@pytest.fixture(params=NATIVE.instruction_sets())
def isa(request) -> Iterator[str]:
    before = NATIVE.instruction_set()
    assert NATIVE.use_instruction_set(request.param)
    yield request.param
    NATIVE.use_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is the test's to change."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(case, dtype=torch.float32, layout="contiguous", seed=0) -> list[Tensor]:
    """q, k, v and the bias table, which is float32 for half types as in the model under autocast."""
    batch, heads, width, prefix, source, target = case
    tokens = 2 * prefix + source[0] * source[1] + target[0] * target[1]
    columns = (2 * max(source[0], target[0]) - 1) * (2 * max(source[1], target[1]) - 1) * 4
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(3)]
    table = torch.randn(heads, columns, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return [*(laid_out(x.to(dtype), layout) for x in draws), table]


def run(case, tensors, backend, **options) -> Tensor:
    _, _, _, prefix, source, target = case
    attended = ops.region_attention(
        *tensors, source_grid=source, target_grid=target, prefix=prefix, backend=backend, **options
    )
    assert ops.last_backend("region_attention") == backend
    return attended


def everything(case, tensors, backend, dtype=None) -> dict[str, Tensor]:
    """Result and gradients by name, for a fixed gradient of the result."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    attended = run(case, leaves, backend)
    grad = torch.randn(attended.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype)
    found = torch.autograd.grad(attended, leaves, grad.to(attended.dtype))
    return dict(zip(NAMES, (attended.detach(), *found), strict=True))


def compare(case, tensors) -> None:
    found, same = (everything(case, tensors, backend) for backend in ("native", "reference"))
    exact = everything(case, tensors, "reference", torch.float64)
    for name, value in found.items():
        assert value.dtype == same[name].dtype, name
        assert_within_budget(name, value, same[name], exact[name], 3 if name.startswith("grad") else 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(isa, case, dtype, monkeypatch):
    tensors = inputs(case, dtype)
    with poisoned(monkeypatch):
        compare(case, tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    case = (2, 3, 24, 1, (3, 5), (4, 2))
    *tensors, table = inputs(case, layout=layout)
    compare(case, [*tensors, table.repeat_interleave(2, dim=1)[:, ::2]])


def test_views_of_one_tensor():
    """As the model's projection leaves them, with what it takes back."""
    case = (2, 3, 8, 1, (3, 5), (4, 2))
    *_, table = inputs(case)
    found = []
    for backend in ("native", "reference"):
        qkv = torch.randn(2, 25, 72, generator=torch.Generator().manual_seed(2)).requires_grad_()
        q, k, v = qkv.unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = run(case, (q, k, v, table), backend)
        attended.transpose(1, 2).flatten(2).square().sum().backward()
        found.append((attended.detach(), qkv.grad))
    for value, wanted in zip(*found, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


def test_heads_lie_inside_the_tokens():
    """So that joining the heads is a view."""
    attended = run(CASES[3], inputs(CASES[3]), "native")
    assert attended.transpose(1, 2).is_contiguous()


def test_a_table_of_another_dtype():
    case = CASES[3]
    *tensors, table = inputs(case, torch.bfloat16)
    found = everything(case, [*tensors, table.double()], "native")
    assert found["attended"].dtype == torch.bfloat16 and found["grad_table"].dtype == torch.float64
    wanted = everything(case, [*tensors, table.double()], "reference")
    torch.testing.assert_close(found["grad_table"], wanted["grad_table"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_threads(threads, count):
    """More threads than heads: the rows of a head are shared out; more heads: some threads have one more."""
    torch.set_num_threads(count)
    for case in ((1, 2, 16, 1, (11, 9), (10, 9)), (3, 2, 8, 1, (6, 7), (5, 4)), (1, 1, 4, 0, (1, 2), (1, 1))):
        tensors = inputs(case)
        compare(case, tensors)
        first, second = (everything(case, tensors, "native") for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def test_more_tokens_than_a_block_of_whole_logits_holds(isa):
    """2890 tokens in float64: 48 rows of logits are more than is held at once."""
    case = (1, 1, 2, 1, (38, 38), (38, 38))
    compare(case, inputs(case, torch.float64))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory of the process is known on Linux only")
def test_memory_does_not_grow_with_the_square_of_the_tokens():
    """6274 tokens, forward and backward: one (N, N) matrix would be 150 MiB."""
    code = """
import torch
from lpmflow import ops
def run(side):
    tokens = 2 * (1 + side * side)
    x = [torch.randn(1, 1, tokens, 4, requires_grad=True) for _ in range(3)]
    table = torch.randn(1, (2 * side - 1) ** 2 * 4, requires_grad=True)
    grids = dict(source_grid=(side, side), target_grid=(side, side))
    ops.region_attention(*x, table, **grids, backend="native").sum().backward()
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
run(4)
before = peak()
run(56)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 * 1024  # KiB


def test_gradcheck():
    case = (2, 2, 3, 1, (2, 2), (1, 3))
    leaves = [x.requires_grad_() for x in inputs(case, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: run(case, x, "native"), leaves)


def test_only_what_needs_a_gradient_gets_one():
    case = CASES[3]
    q, k, v, table = inputs(case)
    table.requires_grad_()
    run(case, (q, k, v, table), "native").square().sum().backward()
    found, table.grad = table.grad, None
    run(case, (q, k, v, table), "reference").square().sum().backward()
    torch.testing.assert_close(found, table.grad, rtol=1e-4, atol=1e-4)
    assert q.grad is None


def test_each_region_and_offset_has_its_own_entry(isa):
    """One entry of the table is raised: the pairs it belongs to, and no others, lose or gain."""
    case = (1, 1, 4, 1, (2, 3), (3, 2))
    q, k, v, table = (x.double() for x in inputs(case))
    flat = torch.zeros_like(table)
    v = torch.eye(14, dtype=torch.float64)[None, None]  # the result is the attention map
    q, k = (x.repeat(1, 1, 1, 4)[..., :14] for x in (q, k))
    for column in range(table.shape[1]):
        flat.zero_()[:, column] = 3
        found, wanted = (run(case, (q, k, v, flat), backend) for backend in ("native", "reference"))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=lambda m, c=column: f"column {c}: {m}")


@pytest.mark.parametrize("factor", [1e4, -1e4, 0.0])
def test_extreme_logits_and_constant_rows(isa, factor):
    case = (1, 2, 8, 1, (3, 4), (2, 5))
    q, k, v, table = inputs(case)
    for tensors in ((q * factor, k, v, table), (q, k, v, table * factor), (q * 0, k, v, table * 0)):
        found = run(case, tensors, "native")
        assert torch.isfinite(found).all()
        # logits of 1e5 keep two digits after the point, in any order of operations
        torch.testing.assert_close(found, run(case, tensors, "reference"), rtol=0.02, atol=0.02)
        gradients = everything(case, tensors, "native")
        assert all(torch.isfinite(value).all() for value in gradients.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_comes_out_where_it_belongs(isa, dtype):
    case = (2, 2, 8, 1, (3, 4), (2, 5))
    for index, spoilt in ((0, (0, 1, 7, 3)), (1, (1, 0, 4, 0)), (2, (0, 0, 2, 5)), (3, (1, 40))):
        tensors = inputs(case, dtype)
        tensors[index][spoilt] = float("nan")
        found, wanted = (run(case, tensors, backend) for backend in ("native", "reference"))
        assert wanted.isnan().any() and torch.equal(found.isnan(), wanted.isnan()), index
    tensors = inputs(case, dtype)
    tensors[1][0, 0, 2] = float("inf")
    found, wanted = (run(case, tensors, backend) for backend in ("native", "reference"))
    assert torch.equal(found.isnan(), wanted.isnan())


def test_a_forbidden_offset_gets_no_weight(isa):
    """-inf in the table: those pairs are out of the question."""
    case = (1, 2, 8, 1, (3, 4), (2, 5))
    *tensors, table = inputs(case)
    table[:, ::3] = float("-inf")
    found, wanted = (everything(case, [*tensors, table], backend) for backend in ("native", "reference"))
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert not found["grad_table"][:, ::3].any()


@pytest.mark.parametrize("empty", ["batch", "heads"])
def test_empty(empty):
    case = (0, 3, 4, 1, (2, 3), (3, 2)) if empty == "batch" else (2, 0, 4, 1, (2, 3), (3, 2))
    tensors = inputs(case)
    found = everything(case, tensors, "native")
    assert found["attended"].shape == tensors[0].shape and found["grad_q"].shape == tensors[0].shape
    assert found["grad_table"].shape == tensors[3].shape and not found["grad_table"].any()


# Choice and refusals


def test_the_automatic_choice_on_the_cpu():
    case = CASES[3]
    *_, prefix, source, target = case
    ops.region_attention(*inputs(case), source_grid=source, target_grid=target, prefix=prefix)
    assert ops.last_backend("region_attention") == "native"


def test_second_derivatives_and_vmap_are_refused():
    case = CASES[1]
    tensors = [x.requires_grad_() for x in inputs(case)]
    (grad,) = torch.autograd.grad(run(case, tensors, "native").square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="region_attention: the native backend has no second derivative"):
        grad.sum().backward()
    q, k, v, table = (x.detach() for x in tensors)
    with pytest.raises(RuntimeError, match="cannot be transformed by torch.func"):
        torch.func.vmap(lambda *x: run(case, (*(y[None] for y in x), table), "native"))(q, k, v)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by the first torch.func.jvp itself
def test_forward_mode_goes_to_the_reference():
    case = CASES[3]
    *_, prefix, source, target = case
    q, k, v, table = inputs(case)

    def op(table, backend=None):
        return ops.region_attention(
            q, k, v, table, source_grid=source, target_grid=target, prefix=prefix, backend=backend
        )

    _, tangent = torch.func.jvp(op, (table,), (torch.rand_like(table),))
    assert ops.last_backend("region_attention") == "reference" and tangent.abs().max() > 0
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(table, torch.ones_like(table))
        with pytest.raises(RuntimeError, match="'native' cannot run: it has no forward-mode derivative"):
            op(dual, "native")


# PyTorch's machinery


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own, on inputs it made
@pytest.mark.parametrize("layout", ["contiguous", "fused", "transposed"])
def test_opcheck(layout):
    case = (2, 2, 4, 1, (2, 3), (3, 2))
    tensors = [x.requires_grad_() for x in inputs(case, layout=layout)]
    rest = ([2, 3, 3, 2], 1)
    torch.library.opcheck(torch.ops.lpmflow.region_attention_native.default, (*tensors, *rest))
    tensors = [x.detach() for x in tensors]
    arguments = (torch.randn(tensors[0].shape), *tensors, *rest)
    torch.library.opcheck(torch.ops.lpmflow.region_attention_native_backward.default, arguments)


def test_shapes_without_numbers():
    with FakeTensorMode():
        q, table = torch.empty(2, 3, 14, 8), torch.empty(3, 100)
        attended = ops.region_attention(q, q, q, table, source_grid=(2, 3), target_grid=(3, 2), backend="native")
    assert attended.shape == (2, 3, 14, 8) and attended.stride() == (336, 8, 24, 1)


def test_compiles_whole_and_once():
    case = CASES[3]
    *_, prefix, source, target = case
    compiled = torch.compile(ops.region_attention, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            tensors = [x.requires_grad_() for x in inputs(case, seed=seed)]
            attended = compiled(*tensors, source_grid=source, target_grid=target, prefix=prefix)
            assert ops.last_backend("region_attention") == "native"
            attended.square().sum().backward()
            found = [x.grad for x in tensors]
            for x in tensors:
                x.grad = None
            run(case, tensors, "reference").square().sum().backward()
            for name, value, x in zip(NAMES[1:], found, tensors, strict=True):
                torch.testing.assert_close(value, x.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_autocast_leaves_the_inputs_dtype():
    case = CASES[3]
    tensors = inputs(case)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(case, tensors, "native")
    assert torch.equal(found, run(case, tensors, "native"))
