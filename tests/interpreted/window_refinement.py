"""The Triton `window_attention` through the interpreter: values, every gradient, odd maps, layouts and numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_bench import LAYOUTS, assert_within_budget, laid_out, poisoned
from torch import Tensor

from lpmflow import ops, reference
from lpmflow_kernels import window_refinement as op
from lpmflow_kernels._launch import Tiles

# The interpreter computes with numpy, which warns of the infinities and NaNs that are meant to be there.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# (B, H, W, heads, head width, window, shift)
SIZES = [
    (1, 1, 1, 1, 1, 1, 0),
    (2, 1, 5, 2, 3, 2, 0),
    (1, 5, 2, 1, 1, 4, 1),
    (1, 9, 6, 3, 12, 4, 0),
    (1, 4, 5, 9, 4, 4, 3),
    (1, 4, 5, 5, 96, 4, 0),
    (1, 9, 8, 2, 5, 8, 3),
    (1, 7, 8, 1, 24, 7, 0),
    (1, 3, 3, 2, 7, 8, 6),
    (1, 17, 2, 1, 2, 3, 2),
    (1, 10, 9, 1, 12, 9, 2),
]
LARGE = [
    ((1, 16, 17, 1, 12, 16, 0), "bfloat16"),
    ((1, 5, 18, 1, 16, 16, 5), "float32"),
    ((1, 12, 5, 2, 32, 12, 0), "float16"),
    ((1, 21, 3, 1, 4, 20, 0), "bfloat16"),
    ((1, 9, 8, 1, 96, 8, 1), "float16"),
    ((1, 4, 9, 1, 128, 8, 0), "float32"),
    ((1, 97, 2, 1, 2, 4, 0), "float32"),
]
# Of each kind of kernel one: a group of heads, a window that is a tile, and one that is several.
KINDS = [(2, 5, 4, 3, 12, 4, 1), (2, 8, 9, 2, 12, 8, 0), (1, 9, 11, 2, 12, 9, 0)]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written to is NaN."""
    with poisoned(monkeypatch):
        yield


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 too, which has small ones for want of registers: the interpreter is slow for each and has no such."""
    monkeypatch.setattr(op, "_TILES", {kernel: (half, half) for kernel, (half, _) in op._TILES.items()})


def inputs(size: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    batch, height, width, heads, head_width, window, _ = size
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, height, width, 3 * heads * head_width, generator=generator)
    return qkv.to(dtype), torch.randn((2 * window - 1) ** 2, heads, generator=generator)


def run(function: Any, qkv: Tensor, table: Tensor, size: Any) -> Tensor:
    return function(qkv, table, heads=size[3], window=size[5], shift=size[6])


def everything(function: Any, qkv: Tensor, table: Tensor, size: Any, double: bool = False) -> dict[str, Tensor]:
    """The output and the gradients by name, for a fixed gradient of the output."""
    leaves = [(x.double() if double else x).detach().requires_grad_() for x in (qkv, table)]
    out = run(function, *leaves, size)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    grads = torch.autograd.grad(out, leaves, grad)
    return dict(zip(("out", "grad_qkv", "grad_table"), (out.detach(), *grads), strict=True))


by_triton = functools.partial(everything, op.window_attention)
by_reference = functools.partial(everything, reference.window_attention)


def compare(qkv: Tensor, table: Tensor, size: Any) -> None:
    """Errors against float64 are at most 2 (gradients: 3) times those of the reference, plus a floor."""
    found, same = by_triton(qkv, table, size), by_reference(qkv, table, size)
    exact = by_reference(qkv, table, size, double=True)
    for name, value in found.items():
        assert value.dtype == same[name].dtype, name
        assert_within_budget(name, value, same[name], exact[name], 3 if name.startswith("grad") else 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, dtype):
    compare(*inputs(size, DTYPES[dtype]), size)


@pytest.mark.parametrize(("size", "dtype"), LARGE, ids=str)
def test_large_windows_wide_heads_and_long_maps(size, dtype):
    compare(*inputs(size, DTYPES[dtype]), size)


@pytest.mark.parametrize("tile", [(16, 32), (32, 16)])
@pytest.mark.parametrize("size", [(1, 8, 9, 1, 12, 8, 0), (1, 6, 5, 1, 4, 5, 2)], ids=str)
def test_windows_larger_than_a_tile(size, tile, monkeypatch):
    monkeypatch.setattr(op, "configuration", lambda *_: Tiles(*tile, 4, 1))
    monkeypatch.setattr(op, "is_whole", lambda *_: False)
    compare(*inputs(size), size)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("bytes_of_pairs", [1, 1 << 30])
@pytest.mark.parametrize(("size", "warps"), [(KINDS[0], 12), (KINDS[1], 48), (KINDS[2], 4)], ids=str)
def test_programs_that_visit_several_windows(size, warps, bytes_of_pairs, monkeypatch):
    """Of 8 windows 3, 3 and 2, of 4 windows 2 and 2, both of 2; or all, without memory for the sums of more."""
    monkeypatch.setattr(op, "_WARPS", warps)
    monkeypatch.setattr(op, "_PAIRS_BYTES", bytes_of_pairs)
    compare(*inputs(size), size)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("size", KINDS, ids=str)
def test_any_strides_give_the_same_bits(size, layout):
    qkv, table = inputs(size)
    qkv = laid_out(qkv, layout)
    wanted = by_triton(qkv.contiguous(), table, size)
    for name, value in by_triton(qkv, table.t().contiguous().t(), size).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("kind", ["broadcast", "transposed"])
@pytest.mark.parametrize("size", KINDS, ids=str)
def test_a_gradient_of_any_strides_gives_the_same_bits(size, kind):
    leaves = [x.requires_grad_() for x in inputs(size)]
    out = run(op.window_attention, *leaves, size)
    given = torch.ones(()).expand(out.shape) if kind == "broadcast" else out.detach().mT.contiguous().mT
    actual = torch.autograd.grad(out, leaves, given, retain_graph=True)
    for one, other in zip(actual, torch.autograd.grad(out, leaves, given.contiguous()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_table_of_another_type_gets_its_gradient_in_it(dtype):
    qkv, table = inputs(KINDS[0])
    table = table.bfloat16().to(dtype)
    found, wanted = (by_triton(qkv, x, KINDS[0]) for x in (table, table.float()))
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name
    assert found["grad_table"].dtype == dtype


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("size", KINDS, ids=str)
def test_two_runs_agree_to_the_last_bit(size):
    first, second = (by_triton(*inputs(size, torch.float16), size) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("size", KINDS, ids=str)
@pytest.mark.parametrize("wanted", ["qkv", "table"])
def test_gradients_of_one_argument_alone(size, wanted):
    qkv, table = inputs(size)
    leaf = (qkv if wanted == "qkv" else table).requires_grad_()
    out = run(op.window_attention, qkv, table, size)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    (actual,) = torch.autograd.grad(out, leaf, grad)
    assert torch.equal(actual, by_triton(qkv, table, size)[f"grad_{wanted}"])


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("size", KINDS, ids=str)
def test_extreme_logits(size):
    """Whole numbers, so that products are exact and what is compared is not luck where two logits nearly tie."""
    qkv, table = inputs(size)
    channels = qkv.shape[-1] // 3
    qkv[..., : 2 * channels] = (100 * qkv[..., : 2 * channels]).round()
    compare(qkv, table.round(), size)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("size", KINDS, ids=str)
@pytest.mark.parametrize("level", [1e4, -1e4])
def test_constant_rows_are_uniform_even_where_logits_are_large(size, level):
    qkv, table = inputs(size)
    channels = qkv.shape[-1] // 3
    qkv[..., : 2 * channels] = 180.0
    qkv[..., 2 * channels :] = 1.0
    found = run(op.window_attention, qkv, torch.full_like(table, level), size)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("size", KINDS, ids=str)
def test_a_bias_of_minus_infinity_masks(size):
    """Some offsets; then all, which leaves nothing to attend to."""
    qkv, table = inputs(size)
    table[: size[5] * (2 * size[5] - 1)] = float("-inf")  # the queries' own row of cells and those before
    table[(2 * size[5] - 1) ** 2 // 2] = 0.0  # but not themselves
    found, wanted = by_triton(qkv, table, size), by_reference(qkv, table, size)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert run(op.window_attention, qkv, torch.full_like(table, float("-inf")), size).isnan().all()


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("value", "shift"), [(float("nan"), 0), (float("nan"), 1), (float("inf"), 0)])
@pytest.mark.parametrize("third", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("window", [4, 8, 9])
def test_nan_and_infinity_come_out_where_they_belong(window, third, value, shift):
    """A query spoils its own cell, a key or value what its window shows; other windows and heads stay whole."""
    size = (1, window + 1, window + 2, 2, 4, window, shift)
    qkv, table = inputs(size)
    qkv[..., 6] = qkv[..., 6].abs() + 0.1  # so that an infinite query or key of head 1 has the logits inf
    qkv[..., 14] = qkv[..., 14].abs() + 0.1
    qkv[0, window, window, 8 * third + 6] = value
    found = by_triton(qkv, table, size)
    shown = slice(1, window + 1) if shift else slice(window, None)
    bad = torch.zeros_like(found["out"], dtype=torch.bool)
    if third == 0:
        bad[0, window, window, 4:] = True
    elif third == 1:
        bad[0, shown, shown, 4:] = True
    else:
        bad[0, shown, shown, 6] = True
    assert torch.equal(~found["out"].isfinite(), bad)
    whole = found["grad_qkv"].isfinite().unflatten(-1, (3, 2, 4))
    assert whole[..., 0, :].all()
    assert not whole[0, window, window, 0, 1].any()
    whole[0, shown, shown, :, 1] = True
    assert whole.all()
    assert found["grad_table"][:, 0].isfinite().all() and not found["grad_table"][:, 1].isfinite().all()


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("window", [4, 8, 9])
def test_infinite_keys_leave_the_gradients_of_others_alone(window):
    """Lanes without a cell meet the infinite key too; nothing of theirs may reach a gradient."""
    size = (1, 3, 3, 1, 2, window, 0)
    qkv, table = inputs(size)
    qkv[0, 1, 1, 2] = float("-inf")
    qkv[..., 0] = qkv[..., 0].abs() + 0.1  # every query: logit minus infinity, probability zero
    found, wanted = by_triton(qkv, table, size), by_reference(qkv, table, size, double=True)
    assert found["out"].isfinite().all() and wanted["out"].isfinite().all()
    torch.testing.assert_close(found["grad_table"].double(), wanted["grad_table"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["grad_qkv"][..., 2:].double(), wanted["grad_qkv"][..., 2:], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("size", KINDS, ids=str)
def test_a_gradient_of_nan_stays_in_its_window_and_head(size):
    qkv, table = (x.requires_grad_() for x in inputs(size))
    out = run(op.window_attention, qkv, table, size)
    given = torch.zeros_like(out)
    given[0, 0, 0, -1] = float("nan")
    grad, _ = torch.autograd.grad(out, (qkv, table), given)
    finite = grad.isfinite().unflatten(-1, (3, size[3], size[4]))
    first = size[6] or size[5]  # of the first window, the side
    assert finite[..., :-1, :].all() and finite[0, first:].all() and finite[0, :, first:].all() and finite[1:].all()
    assert not finite[0, :first, :first, 1:, -1].any(-1).all()


@pytest.mark.parametrize("shape", [(0, 9, 9), (2, 0, 9), (2, 9, 0)], ids=str)
@pytest.mark.parametrize("window", [4, 9])
def test_nothing_in_nothing_out(shape, window):
    size = (*shape, 2, 3, window, 1)
    found = by_triton(*inputs(size), size)
    assert found["out"].shape == (*shape, 6) and found["grad_qkv"].shape == (*shape, 18)
    assert (found["grad_table"] == 0).all()


def test_second_derivatives_and_vmap_are_refused():
    size = (2, 2, 2, 1, 2, 2, 0)
    qkv, table = inputs(size)
    out = run(op.window_attention, qkv.requires_grad_(), table, size)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="window_attention: the triton backend has no second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="vmap is not supported"):
        torch.vmap(lambda one: run(op.window_attention, one[None], table, size))(qkv.detach())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own, on inputs it made
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("size", [(2, 5, 3, 2, 4, 2, 1), (1, 9, 4, 2, 4, 9, 0)], ids=str)
def test_opcheck(size, layout):
    qkv, table = inputs(size)
    leaves = [x.requires_grad_() for x in (laid_out(qkv, layout), table)]
    torch.library.opcheck(torch.ops.lpmflow.window_attention_triton.default, (*leaves, size[3], *size[5:]))
    batch, height, width, heads, head_width = size[:5]
    grad = torch.randn(batch, height, width, heads * head_width)
    arguments = (grad, leaves[0].detach(), table.detach(), size[3], *size[5:])
    backward = torch.ops.lpmflow.window_attention_triton_backward.default
    torch.library.opcheck(backward, arguments)
    torch.library.opcheck(backward, (*arguments, False))


def test_compiles_whole_and_once():
    compiled = torch.compile(ops.window_attention, fullgraph=True, backend="aot_eager")
    size = (1, 3, 4, 2, 4, 2, 0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for factor in (1, 2):
            leaves = [factor * x for x in inputs(size)]
            wanted = by_triton(*leaves, size)
            out = compiled(*(x.requires_grad_() for x in leaves), heads=2, window=2, backend="triton")
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
            for found, expected in zip((out, *torch.autograd.grad(out, leaves, grad)), wanted.values(), strict=True):
                assert torch.equal(found, expected)
    assert ops.last_backend("window_attention") == "triton"


def test_the_public_functions_run_it():
    size = KINDS[0]
    qkv, table = inputs(size)
    wanted = run(reference.window_attention, qkv, table, size)
    with ops.use_backend(window_attention="triton"), torch.autocast("cpu", torch.bfloat16):
        found = run(ops.window_attention, qkv, table, size)
    assert ops.last_backend("window_attention") == "triton" and found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    generator = torch.Generator().manual_seed(0)
    shapes = [(6,), (6,), (18, 6), (18,), (9, 2), (6, 6), (6,), (6,), (6,), (7, 6), (7,), (6, 7), (6,), (6,), (6,)]
    weights = ops.StageWeights(*(torch.randn(shape, generator=generator) for shape in shapes))
    x = torch.randn(2, 5, 3, 6, generator=generator)
    stages = [ops.window_stage(x, weights, heads=2, window=2, backend=name) for name in ("triton", "reference")]
    torch.testing.assert_close(*stages, rtol=1e-4, atol=1e-4)


def test_the_backend_can_run_here_and_is_not_chosen_by_itself():
    qkv, table = inputs(KINDS[0])
    assert op.why_not(qkv, width=12, window=4) is None
    assert op.why_not(qkv.double(), width=12, window=4).startswith("it takes float32, float16 and bfloat16, and qkv")
    run(ops.window_attention, qkv, table, KINDS[0])
    assert ops.last_backend("window_attention") != "triton"
    with pytest.raises(RuntimeError, match="window_attention: backend 'triton' cannot run: it takes windows of up to"):
        ops.window_attention(qkv, torch.zeros(65**2, 3), heads=3, window=33, backend="triton")
