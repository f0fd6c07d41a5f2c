"""The Triton `region_attention` through the interpreter: values, every gradient, odd grids, layouts and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_bench import LAYOUTS, assert_within_budget, einsum_region_attention, laid_out, poisoned
from torch import Tensor

from lpmflow import ops, reference
from lpmflow.reference.region_attention import region_index
from lpmflow_kernels import region_attention as op
from lpmflow_kernels._launch import Tiles

# The interpreter computes with numpy, which warns of the infinities and NaNs that are meant to be there.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMES = ("attended", "grad_q", "grad_k", "grad_v", "grad_table")
# B, H, D, prefix, source grid, target grid
SMALL = (2, 2, 8, 1, (3, 4), (2, 5))
CASES = [
    (1, 1, 1, 0, (1, 1), (1, 1)),
    (2, 2, 3, 1, (1, 1), (1, 1)),
    (1, 2, 7, 3, (2, 5), (4, 1)),
    (2, 3, 24, 1, (5, 2), (5, 2)),
    (1, 1, 33, 0, (9, 1), (1, 9)),
    (2, 1, 12, 2, (5, 3), (1, 1)),
    (1, 2, 96, 1, (6, 6), (6, 6)),
    (1, 1, 160, 0, (3, 5), (2, 2)),
    (1, 1, 256, 1, (2, 2), (3, 1)),
    (1, 1, 5, 1, (1, 63), (2, 17)),
]
# Cases where the programs of each kernel have more than one tile, with queries and keys of a tile (in the table's
# gradient: as many queries), and with that the rectangle of patches.
TILED = [
    ((1, 2, 12, 1, (3, 8), (5, 7)), (16, 32), (2, 8)),
    ((2, 1, 24, 0, (7, 4), (9, 2)), (32, 16), (8, 2)),
    ((1, 1, 8, 3, (17, 1), (20, 1)), (16, 16), (16, 1)),
    ((2, 1, 8, 1, (1, 18), (2, 17)), (16, 16), (1, 16)),
    ((1, 1, 96, 1, (4, 4), (7, 8)), (16, 16), (4, 4)),
]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written to is NaN."""
    with poisoned(monkeypatch):
        yield


def inputs(case: Any, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Tensor]:
    """q, k, v and the bias table, which is float32 as in the model under autocast."""
    batch, heads, width, prefix, source, target = case
    tokens = 2 * prefix + source[0] * source[1] + target[0] * target[1]
    columns = (2 * max(source[0], target[0]) - 1) * (2 * max(source[1], target[1]) - 1) * 4
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(3)]
    return [*(laid_out(x.to(dtype), layout) for x in draws), torch.randn(heads, columns, generator=generator)]


def run(case: Any, tensors: list[Tensor], function: Any = op.region_attention) -> Tensor:
    *_, prefix, source, target = case
    return function(*tensors, source_grid=source, target_grid=target, prefix=prefix)


def everything(
    case: Any, tensors: list[Tensor], function: Any = op.region_attention, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Result and gradients by name, for a fixed gradient of the result."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    attended = run(case, leaves, function)
    grad = torch.randn(attended.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype)
    return dict(zip(NAMES, (attended.detach(), *torch.autograd.grad(attended, leaves, grad.to(attended))), strict=True))


def compare(case: Any, tensors: list[Tensor]) -> None:
    found, same = everything(case, tensors), everything(case, tensors, einsum_region_attention)
    exact = everything(case, tensors, reference.region_attention, torch.float64)
    for name, value in found.items():
        assert value.dtype == same[name].dtype, name
        assert_within_budget(name, value, same[name], exact[name], 3 if name.startswith("grad") else 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype):
    compare(case, inputs(case, DTYPES[dtype]))


@pytest.mark.parametrize(("case", "tile", "rectangle"), TILED, ids=str)
def test_more_tokens_than_a_tile(case, tile, rectangle, monkeypatch):
    def configuration(kernel: str, *_: Any) -> Tiles:
        return Tiles(*((16, 16) if kernel == "dtable" else tile), 4, 1)

    monkeypatch.setattr(op, "configuration", configuration)
    assert op.rectangle([*case[4], *case[5]], 16) == rectangle
    compare(case, inputs(case))


@pytest.mark.parametrize("programs", [1, 60, 10_000])
def test_the_batch_is_split_in_any_number_of_parts(programs, monkeypatch):
    monkeypatch.setattr(op, "_PROGRAMS", programs)
    case = (5, 1, 4, 1, (3, 4), (2, 3))
    compare(case, inputs(case))


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize(("source", "target"), [((3, 4), (2, 5)), ((1, 1), (6, 1)), ((17, 9), (9, 17))])
def test_the_places_are_those_of_the_contract(source, target, prefix):
    """Query place minus key place leads to the entry that the reference's index names, and below zero elsewhere."""
    *_, table = inputs((1, 2, 1, prefix, source, target))
    tokens = 2 * prefix + source[0] * source[1] + target[0] * target[1]
    found = op._lay_out(table, [*source, *target], prefix, tokens)
    assert torch.equal(found["p_laid"].view(2, 4, -1).mT.reshape(table.shape), table)
    place = (found["p_query"][:, None] - found["p_key"][None, :]).long()
    wanted = reference.region_bias(table, source, target, prefix)
    bias = torch.where(place >= 0, found["p_laid"][:, place.clamp(min=0)], torch.zeros(()))
    assert torch.equal(bias, wanted)
    assert (place >= 0).sum() == region_index(source, target).numel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same_bits(layout):
    *tensors, table = inputs(SMALL, layout=layout)
    wanted = everything(SMALL, [*(x.contiguous() for x in tensors), table])
    found = everything(SMALL, [*tensors, table.repeat_interleave(2, dim=1)[:, ::2]])
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_a_gradient_of_any_strides_gives_the_same_bits(kind):
    leaves = [x.requires_grad_() for x in inputs(SMALL)]
    attended = run(SMALL, leaves)
    given = torch.ones(()).expand(attended.shape) if kind == "expanded" else attended.detach().mT.contiguous().mT
    actual = torch.autograd.grad(attended, leaves, given, retain_graph=True)
    for name, one, other in zip(
        NAMES[1:], actual, torch.autograd.grad(attended, leaves, given.contiguous()), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_table_of_another_type(dtype):
    *tensors, table = inputs(SMALL)
    found = everything(SMALL, [*tensors, table.to(dtype)])
    wanted = everything(SMALL, [*tensors, table.to(dtype).float()])
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name
    assert found["grad_table"].dtype == dtype


def test_heads_lie_inside_the_tokens():
    """So that joining the heads is a view."""
    assert run(SMALL, inputs(SMALL)).transpose(1, 2).is_contiguous()


def test_only_what_needs_a_gradient_gets_one():
    wanted = everything(SMALL, inputs(SMALL))
    grad = torch.randn(wanted["attended"].shape, generator=torch.Generator().manual_seed(1))
    for index, name in enumerate(NAMES[1:]):
        tensors = inputs(SMALL)
        tensors[index].requires_grad_()
        run(SMALL, tensors).backward(grad)
        assert torch.equal(tensors[index].grad, wanted[name]), name


def test_two_runs_agree_to_the_last_bit():
    case = (2, 1, 12, 1, (4, 3), (3, 5))
    first, second = (everything(case, inputs(case, torch.float16)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype):
    """Logits of +-1e4: rows of P hold one value or two near ones, and the gradients are what is left of large terms.

    Inputs are whole numbers and the scale is 1/4, so that logits are exact and what is compared is not luck where two
    of them nearly tie. The floor is a rounding of the largest value and, for gradients, of terms that cancel.
    """
    case = (1, 2, 16, 1, (3, 4), (5, 5))
    q, k, v, table = inputs(case)
    q, k = ((x * 50).round().clamp(-96, 96) for x in (q, k))
    k[:, :, 1::2] = k[:, :, :-1:2]
    tensors = [*(x.to(DTYPES[dtype]) for x in (q, k, v)), (table * 5e3).round()]
    found, same = everything(case, tensors), everything(case, tensors, reference.region_attention)
    exact = everything(case, tensors, reference.region_attention, torch.float64)
    largest = (v.double() @ torch.randn(16, generator=torch.Generator().manual_seed(1)).double()).abs().max() * 4
    for name, wanted in exact.items():
        error, usual = ((x[name].double() - wanted).abs().max() for x in (found, same))
        floor = torch.finfo(tensors[0].dtype if name != "grad_table" else torch.float32).eps * wanted.abs().max()
        if name in ("grad_q", "grad_k", "grad_table"):
            floor += torch.finfo(tensors[0].dtype).eps * largest * (1 if name == "grad_table" else 96 / 4)
        assert error <= 3 * usual + floor, f"{name}: error {error:.3g}, the reference's {usual:.3g}"


@pytest.mark.parametrize("level", [0.0, 180.0, -180.0])
def test_constant_rows_are_uniform_even_where_logits_are_large(level):
    case = (1, 1, 12, 0, (3, 11), (3, 11))
    q, k, v, table = inputs(case)
    tensors = [torch.full_like(q, 180.0), torch.full_like(k, level), v, torch.full_like(table, 1e3 * level)]
    wanted = v.mean(2, keepdim=True).expand(q.shape)
    torch.testing.assert_close(run(case, tensors), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "place"), [("q", (0, 1, 7, 3)), ("k", (1, 0, 4, 0)), ("v", (0, 0, 2, 5))])
def test_nan_and_infinity_come_out_where_they_should(name, place, value, dtype):
    """In one token of one head; everything else is as finite as the reference has it."""
    tensors = inputs(SMALL, DTYPES[dtype])
    tensors["qkv".index(name)][place] = value
    found, wanted = (everything(SMALL, tensors, f) for f in (op.region_attention, reference.region_attention))
    assert not torch.isfinite(wanted["attended"]).all()
    for key, expected in wanted.items():
        assert torch.equal(found[key].isnan(), expected.isnan()), key


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 40, 46])
def test_nan_and_infinity_in_the_table(column, value):
    """In a column that no pair has, in one of the source's own, and in one between the images."""
    tensors = inputs(SMALL)
    tensors[3][1, column] = value
    found, wanted = (everything(SMALL, tensors, f) for f in (op.region_attention, reference.region_attention))
    for key, expected in wanted.items():
        assert torch.equal(found[key].isnan(), expected.isnan()), key
        torch.testing.assert_close(found[key], expected, equal_nan=True, msg=lambda text, key=key: f"{key}: {text}")


def test_rows_without_a_key(monkeypatch):
    """-inf for all keys of the first tiles, and for all there are: then the result is NaN."""
    monkeypatch.setattr(op, "configuration", lambda *_: Tiles(16, 16, 4, 1))
    case = (1, 1, 8, 0, (4, 10), (1, 1))
    tensors = inputs(case)
    tensors[3][:, ::4] = float("-inf")  # among the source's own patches
    found, wanted = (everything(case, tensors, f) for f in (op.region_attention, reference.region_attention))
    for key, expected in wanted.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-5, msg=lambda t, key=key: f"{key}: {t}")
    assert not found["grad_table"][:, ::4].any()
    tensors[3][:, 1::4] = float("-inf")  # and from them to the target
    attended = run(case, tensors)
    assert attended[:, :, :40].isnan().all() and torch.isfinite(attended[:, :, 40:]).all()


def test_a_gradient_of_nan_comes_out():
    leaves = [x.requires_grad_() for x in inputs(SMALL)]
    attended = run(SMALL, leaves)
    given = torch.ones_like(attended)
    given[1, 0, 3, 2] = float("nan")
    found = torch.autograd.grad(attended, leaves, given)
    wanted = torch.autograd.grad(run(SMALL, leaves, reference.region_attention), leaves, given)
    for name, value, expected in zip(NAMES[1:], found, wanted, strict=True):
        assert expected.isnan().any() and torch.equal(value.isnan(), expected.isnan()), name


@pytest.mark.parametrize("empty", ["batch", "heads"])
def test_nothing_in_nothing_out(empty):
    case = (0, 3, 4, 1, (2, 3), (3, 2)) if empty == "batch" else (2, 0, 4, 1, (2, 3), (3, 2))
    tensors = inputs(case)
    found = everything(case, tensors)
    assert found["attended"].shape == tensors[0].shape and found["grad_q"].shape == tensors[0].shape
    assert found["grad_table"].shape == tensors[3].shape and not found["grad_table"].any()


def test_second_derivatives_and_vmap_are_refused():
    leaves = [x.requires_grad_() for x in inputs(SMALL)]
    (grad,) = torch.autograd.grad(run(SMALL, leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="region_attention: the triton backend has no second derivative"):
        grad.sum().backward()
    q, k, v, table = (x.detach() for x in leaves)
    with pytest.raises(RuntimeError, match="vmap is not supported; the op has a batch dimension"):
        torch.vmap(lambda x: run(SMALL, [x, k, v, table]))(torch.stack((q, q)))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own, on inputs it made
@pytest.mark.parametrize("layout", ["contiguous", "fused", "transposed"])
def test_opcheck(layout):
    case = (1, 2, 4, 1, (1, 2), (2, 1))
    tensors = inputs(case, layout=layout)
    rest = ([1, 2, 2, 1], 1)
    leaves = [x.detach().requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.lpmflow.region_attention_triton.default, (*leaves, *rest))
    attended, stats = torch.ops.lpmflow.region_attention_triton(*tensors, *rest)
    for table in (True, False):
        arguments = (torch.randn(attended.shape), *tensors, *rest, attended, stats, table)
        torch.library.opcheck(torch.ops.lpmflow.region_attention_triton_backward.default, arguments)


def test_through_the_public_operation():
    tensors = inputs(SMALL)
    *_, prefix, source, target = SMALL
    wanted = run(SMALL, tensors)
    grids = {"source_grid": source, "target_grid": target, "prefix": prefix}
    with ops.use_backend(region_attention="triton"), torch.autocast("cpu", torch.bfloat16):
        found = ops.region_attention(*tensors, **grids)
    assert ops.last_backend("region_attention") == "triton" and torch.equal(found, wanted)
    with pytest.raises(RuntimeError, match="'triton' cannot run: it takes head widths D up to 256, got 257"):
        q = torch.zeros(1, 1, 4, 257)
        ops.region_attention(q, q, q, torch.zeros(1, 4), source_grid=(1, 1), target_grid=(1, 1), backend="triton")


def test_the_backend_can_run_here():
    q = inputs(SMALL)[0]
    assert op.why_not(q) is None
    assert op.why_not(q.double()) == "it takes float32, float16 and bfloat16, and q is float64"
