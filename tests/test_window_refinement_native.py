"""`window_attention` by the native module, for every instruction set of this machine: values, gradients, refusals."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from kernel_bench import LAYOUTS, assert_within_budget, laid_out, poisoned
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lpmflow import ops, reference

if (missing := ops.backend_report()["window_attention"]["native"]) is not None:
    pytest.skip(missing, allow_module_level=True)
NATIVE = importlib.import_module("lpmflow_kernels._native")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# (B, H, W, heads, head width, window, shift)
SIZES = [
    (1, 1, 1, 1, 1, 1, 0),
    (2, 1, 5, 2, 3, 2, 0),
    (1, 5, 2, 1, 1, 4, 1),
    (1, 17, 9, 3, 12, 4, 0),
    (2, 9, 17, 2, 5, 8, 3),
    (1, 16, 32, 8, 12, 16, 0),
    (1, 17, 33, 2, 16, 16, 5),
    (1, 26, 13, 3, 16, 12, 0),
    (2, 8, 4, 8, 96, 4, 0),
    (1, 3, 3, 2, 7, 8, 6),
    (1, 21, 41, 1, 4, 20, 0),
    (1, 97, 5, 2, 2, 3, 2),
]


@pytest.fixture(params=NATIVE.instruction_sets())
def isa(request) -> Iterator[str]:
    before = NATIVE.instruction_set()
    assert NATIVE.use_instruction_set(request.param)
    yield request.param
    NATIVE.use_instruction_set(before)


def inputs(size, dtype=torch.float32, layout="contiguous", seed=0) -> tuple[Tensor, Tensor]:
    batch, height, width, heads, head_width, window, _ = size
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, height, width, 3 * heads * head_width, generator=generator)
    table = torch.randn((2 * window - 1) ** 2, heads, generator=generator)
    return laid_out(qkv.to(dtype), layout), table


def options(size) -> dict[str, int]:
    return dict(zip(("heads", "window", "shift"), (size[3], *size[5:]), strict=True))


def by_native(qkv: Tensor, table: Tensor, **sizes: int) -> Tensor:
    out = ops.window_attention(qkv, table, **sizes, backend="native")
    assert ops.last_backend("window_attention") == "native"
    return out


def everything(qkv: Tensor, table: Tensor, size, run, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The output and the gradients by name, of the op `run` in `dtype`, for a fixed gradient of the output."""
    dtype = dtype or qkv.dtype
    qkv = qkv.detach().to(dtype).requires_grad_()
    table = table.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    out = run(qkv, table, **options(size))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grad = grad.to(torch.bfloat16).to(dtype)  # exact in every dtype
    grads = torch.autograd.grad(out, (qkv, table), grad)
    return dict(zip(("out", "grad_qkv", "grad_table"), (out, *grads), strict=True))


def compare(qkv: Tensor, table: Tensor, size) -> None:
    found = everything(qkv, table, size, by_native)
    same = everything(qkv, table, size, reference.window_attention)
    exact = everything(qkv, table, size, reference.window_attention, torch.float64)
    for name, value in found.items():
        assert value.dtype == same[name].dtype, name
        assert_within_budget(name, value, same[name], exact[name], 3 if name.startswith("grad") else 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(isa, size, dtype, monkeypatch):
    with poisoned(monkeypatch):
        compare(*inputs(size, dtype), size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    size = (2, 7, 10, 2, 12, 4, 1)
    compare(*inputs(size, layout=layout), size)


def test_a_gradient_in_any_layout():
    size = (1, 6, 7, 2, 3, 4, 0)
    qkv, table = (x.requires_grad_() for x in inputs(size, torch.float64))
    wanted = torch.autograd.grad(reference.window_attention(qkv, table.double(), **options(size)).sum(), (qkv, table))
    found = torch.autograd.grad(by_native(qkv, table, **options(size)).sum(), (qkv, table))  # expanded from one number
    for name, value, expected in zip(("qkv", "table"), found, wanted, strict=True):
        torch.testing.assert_close(value, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_the_table_in_half_precision_and_not_contiguous():
    size = (1, 5, 6, 2, 3, 4, 0)
    qkv, table = inputs(size, torch.bfloat16)
    for given in (table.bfloat16(), table.double(), table.t().contiguous().t()):
        given = given.requires_grad_()
        found = by_native(qkv, given, **options(size))
        torch.testing.assert_close(found, reference.window_attention(qkv, given, **options(size)))
        (grad,) = torch.autograd.grad(found.sum(), given)
        assert grad.dtype == given.dtype and grad.isfinite().all()


@pytest.mark.parametrize("size", [(3, 20, 40, 3, 12, 8, 3), (1, 16, 16, 5, 12, 16, 0)], ids=str)
def test_bit_equal_for_any_number_of_threads(size):
    qkv, table = inputs(size)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2, 7):
            torch.set_num_threads(threads)
            found.append(everything(qkv, table, size, by_native))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name in other:
            assert torch.equal(other[name], found[0][name]), name


def test_gradcheck():
    qkv, table = inputs((1, 3, 5, 2, 2, 2, 1), torch.float64)
    arguments = (qkv.requires_grad_(), table.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda *x: by_native(*x, heads=2, window=2, shift=1), arguments)


def test_extreme_logits_and_constant_rows(isa):
    size = (1, 9, 6, 2, 8, 4, 0)
    for factor in (1e4, -1e4, 0.0):
        qkv, table = inputs(size)
        qkv[..., :16] *= factor
        found, wanted = (run(qkv, table, **options(size)) for run in (by_native, reference.window_attention))
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_bias_of_minus_infinity_masks(isa):
    size = (1, 8, 8, 2, 4, 4, 0)
    qkv, table = inputs(size)
    table[3] = float("-inf")
    found, wanted = (run(qkv, table, **options(size)) for run in (by_native, reference.window_attention))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("third", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_comes_out_where_it_belongs(isa, third, shift):
    """A query spoils its own cell, a key or value what its window shows; other windows and heads stay whole."""
    size = (2, 9, 10, 2, 4, 4, shift)
    qkv, table = inputs(size)
    qkv[1, 5, 5, 8 * third + 6] = float("nan")  # head 1
    found = by_native(qkv, table, **options(size)).isnan()
    wanted = torch.zeros_like(found)
    window = slice(4 + shift, 8 + shift)
    if third == 0:
        wanted[1, 5, 5, 4:] = True
    elif third == 1:
        wanted[1, window, window, 4:] = True
    else:
        wanted[1, window, window, 6] = True
    assert torch.equal(found, wanted)


def test_infinite_keys_leave_the_gradients_of_others_alone():
    """Lanes without a cell meet the infinite key too; nothing of theirs may reach a gradient."""
    size = (1, 3, 3, 1, 2, 4, 0)
    qkv, table = inputs(size, torch.float64)
    qkv[0, 1, 1, 2] = float("-inf")
    qkv[..., 0] = qkv[..., 0].abs() + 0.1  # every query: logit minus infinity, probability zero
    qkv = qkv.requires_grad_()
    table = table.double().requires_grad_()
    grads = []
    for run in (by_native, reference.window_attention):
        out = run(qkv, table, **options(size))
        assert out.isfinite().all()
        grads.append(torch.autograd.grad(out.square().sum(), (qkv, table)))
    torch.testing.assert_close(grads[0][1], grads[1][1])
    torch.testing.assert_close(grads[0][0][..., 4:], grads[1][0][..., 4:])
    assert grads[0][0][..., 2:].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_empty(shape):
    qkv = torch.zeros(*shape, 12, requires_grad=True)
    table = torch.zeros(9, 2, requires_grad=True)
    out = by_native(qkv, table, heads=2, window=2, shift=1)
    assert out.shape == (*shape, 4)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape and not table.grad.any()


# Choice and refusals


def test_the_automatic_choice_on_the_cpu():
    qkv, table = inputs(SIZES[3])
    ops.window_attention(qkv, table, **options(SIZES[3]))
    assert ops.last_backend("window_attention") == "native"


def test_second_derivatives_are_refused():
    qkv, table = inputs((1, 2, 2, 1, 2, 2, 0))
    out = by_native(qkv.requires_grad_(), table, heads=1, window=2)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="window_attention: the native backend has no second derivative"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by the first torch.func.jvp itself
@pytest.mark.parametrize("argument", [0, 1], ids=["qkv", "bias_table"])
def test_forward_mode_goes_to_the_reference(argument):
    size = (1, 5, 4, 2, 3, 2, 0)
    given = [x.double() for x in inputs(size)]
    tangent = torch.ones_like(given[argument]).cumsum(0)

    def along(run):
        def of_one(x):
            arguments = [*given]
            arguments[argument] = x
            return run(*arguments, **options(size))

        return torch.func.jvp(of_one, (given[argument],), (tangent,))[1]

    found, wanted = along(ops.window_attention), along(reference.window_attention)
    torch.testing.assert_close(found, wanted)
    assert found.abs().max() > 0.01 and ops.last_backend("window_attention") == "reference"
    with pytest.raises(RuntimeError, match="'native' cannot run: it has no forward-mode derivative"):
        along(by_native)


def test_vmap_is_refused():
    qkv, table = inputs((4, 2, 2, 1, 2, 2, 0))
    with pytest.raises(RuntimeError, match="cannot be transformed by torch.func"):
        torch.func.vmap(lambda x: by_native(x[None], table, heads=1, window=2))(qkv)


# PyTorch's machinery


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own, on inputs it made
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(layout):
    qkv, table = (x.requires_grad_() for x in inputs((2, 5, 3, 2, 4, 2, 1), layout=layout))
    torch.library.opcheck(torch.ops.lpmflow.window_attention_native.default, (qkv, table, 2, 2, 1))
    arguments = (torch.randn(2, 5, 3, 8), qkv.detach(), table.detach(), 2, 2, 1)
    torch.library.opcheck(torch.ops.lpmflow.window_attention_native_backward.default, arguments)


def test_shapes_without_numbers():
    with FakeTensorMode():
        out = ops.window_attention(torch.empty(2, 9, 5, 12), torch.empty(9, 2), heads=2, window=2, backend="native")
    assert out.shape == (2, 9, 5, 4) and out.is_contiguous()


def test_compiles_whole_and_once():
    compiled = torch.compile(ops.window_attention, fullgraph=True, backend="aot_eager")
    size = (1, 9, 6, 2, 4, 4, 0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            grads = []
            for run in (compiled, reference.window_attention):
                qkv, table = (x.requires_grad_() for x in inputs(size, seed=seed))
                grads.append(torch.autograd.grad(run(qkv, table, **options(size)).square().sum(), (qkv, table)))
            assert ops.last_backend("window_attention") == "native"
            for found, wanted in zip(*grads, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_autocast_leaves_the_inputs_dtype():
    qkv, table = inputs(SIZES[3])
    with torch.autocast("cpu", torch.bfloat16):
        out = by_native(qkv, table, **options(SIZES[3]))
    assert out.dtype == torch.float32
    assert torch.equal(out, by_native(qkv, table, **options(SIZES[3])))
