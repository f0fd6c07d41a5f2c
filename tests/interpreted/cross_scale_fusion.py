"""The Triton `cross_scale_fusion` through the interpreter: values, every gradient, odd grids, layouts and numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_bench import assert_within_budget, poisoned
from torch import Tensor

from lpmflow import ops, reference
from lpmflow_kernels import cross_scale_fusion as op
from lpmflow_kernels._launch import Tiles

# The interpreter computes with numpy, which warns of the infinities and NaNs that are meant to be there.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# B, then source and target grid of each scale, then the output grid.
FOUR = (1, [((2, 3), (2, 3)), ((2, 3), (3, 4)), ((3, 4), (2, 3)), ((3, 4), (3, 4))], (3, 4))
CASES = [
    (1, [((1, 1), (1, 1))], (1, 1)),
    (2, [((1, 1), (1, 1)), ((3, 2), (3, 2))], (3, 2)),
    (1, [((1, 4), (2, 1)), ((2, 2), (5, 3)), ((3, 1), (5, 7))], (5, 7)),
    FOUR,
    (1, [((7, 4), (9, 5)), ((5, 3), (2, 17))], (3, 4)),  # to smaller grids, and an axis that keeps its length
    (3, [((2, 2), (5, 9))], (2, 1)),
    (1, [((1, 2), (2, 63))], (2, 97)),  # by a little
]
# On the source side the lines keep their number, then the columns; then neither is interpolated but the target's lines.
KEPT = (1, [((4, 3), (4, 6)), ((2, 6), (4, 3)), ((4, 6), (2, 6))], (4, 6))
# A tile of the output grid (of 16 x 16 in grad_corr), and the side of one of coarse target cells.
TILED = [
    ((1, [((2, 1), (2, 5)), ((1, 2), (3, 18))], (3, 18)), (2, 8), 16),
    ((1, [((2, 1), (19, 3)), ((1, 1), (33, 20))], (5, 3)), (2, 2), 16),
    ((1, [((1, 1), (20, 1))], (37, 1)), (16, 1), 16),
    ((1, [((1, 1), (2, 20))], (1, 37)), (1, 32), 16),
]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written to is NaN."""
    with poisoned(monkeypatch):
        yield


def inputs(case: Any, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    """Correlations that make neither uniform nor one-hot distributions at temperature 0.1, and uneven tables."""
    batch, scales, out = case
    generator = torch.Generator().manual_seed(0)
    corrs = [torch.rand(batch, s[0] * s[1], t[0] * t[1], generator=generator).to(dtype) for s, t in scales]
    x, y = (torch.randn(side, generator=generator) for side in (out[1], out[0]))
    return corrs, x, y


def run(function: Any, case: Any, corrs: list[Tensor], x: Tensor, y: Tensor, temperature: float = 0.1) -> Any:
    _, scales, out = case
    grids = [s for s, _ in scales], [t for _, t in scales]
    return function(corrs, *grids, out_grid=out, temperature=temperature, x=x, y=y)


# Source, target and output grid, then which source lines there are (first, end) and the output rows (first, end).
PARTS = [
    ((3, 2), (2, 1), (5, 2), (0, 2), (0, 2)),
    ((3, 1), (2, 2), (5, 2), (1, 3), (2, 5)),
    ((2, 1), (2, 1), (4, 2), (0, 2), (1, 3)),  # all lines
    ((4, 2), (1, 2), (4, 2), (1, 3), (1, 3)),  # rows that are lines
    ((4, 1), (2, 1), (4, 2), (1, 3), (1, 3)),  # only columns between others
    ((6, 1), (3, 2), (3, 2), (2, 5), (1, 2)),  # to a smaller grid, with lines that are part of nothing
]


def part_of(case: Any, function: Any, corr: Tensor, x: Tensor, y: Tensor) -> Any:
    """(mapping, confidence) of the rows of a case."""
    source, target, out, (line, _), (row, end) = case
    options = {"out_grid": out, "temperature": 0.1, "x": x, "y": y, "part": (line, row, end - row)}
    return function([corr], [source], [target], **options)


def everything(
    function: Any, case: Any, corrs: list[Tensor], x: Tensor, y: Tensor, temperature: float = 0.1
) -> dict[str, Tensor]:
    """Outputs and gradients by name, for a fixed gradient of the mapping."""
    leaves = [leaf.detach().requires_grad_() for leaf in (*corrs, x, y)]
    mapping, confidence = run(function, case, leaves[:-2], *leaves[-2:], temperature)
    assert not confidence.requires_grad
    grad = torch.randn(mapping.shape, generator=torch.Generator().manual_seed(1)).to(mapping.dtype)
    names = [*(f"grad_corrs[{s}]" for s in range(len(corrs))), "grad_x", "grad_y"]
    grads = dict(zip(names, torch.autograd.grad(mapping, leaves, grad), strict=True))
    return {"mapping": mapping.detach(), "confidence": confidence, **grads}


def compare(case: Any, corrs: list[Tensor], x: Tensor, y: Tensor, temperature: float = 0.1) -> None:
    """Errors against float64 are at most 2 (gradients: 3) times those of the reference, plus a floor."""
    found = everything(op.cross_scale_fusion, case, corrs, x, y, temperature)
    same = everything(reference.cross_scale_fusion, case, corrs, x, y, temperature)
    exact = everything(
        reference.cross_scale_fusion, case, [c.double() for c in corrs], x.double(), y.double(), temperature
    )
    for name, value in found.items():
        assert value.dtype == same[name].dtype, name
        assert_within_budget(name, value, same[name], exact[name], 3 if name.startswith("grad") else 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
    compare(case, *inputs(case))


@pytest.mark.parametrize(("case", "tile", "coarse"), TILED, ids=str)
def test_grids_larger_than_a_tile(case, tile, coarse, monkeypatch):
    def configuration(kernel: str, *_: Any) -> Tiles:
        return Tiles(*((16, 16) if kernel == "grad_corr" else tile), 4, 1)

    monkeypatch.setattr(op, "configuration", configuration)
    monkeypatch.setattr(op, "_COARSE", coarse)
    compare(case, *inputs(case))


@pytest.mark.parametrize(("case", "tile"), [*((case, None) for case in PARTS), (PARTS[1], (1, 2))], ids=str)
def test_some_rows_from_the_lines_between_which_they_lie(case, tile, monkeypatch):
    """Values and gradients; those of lines that are part of no row are zero."""
    if tile is not None:
        monkeypatch.setattr(op, "configuration", lambda k, *_: Tiles(*((16, 16) if k == "grad_corr" else tile), 1, 1))
    (hs, ws), target, out, (line, line_end), _ = case
    (corr,), x, y = inputs((1 + hs % 2, [((hs, ws), target)], out))
    corr = corr[:, line * ws : line_end * ws]
    found, same, exact = [], [], []
    for results, function, dtype in (
        (found, op.cross_scale_fusion, torch.float32),
        (same, reference.cross_scale_fusion, torch.float32),
        (exact, reference.cross_scale_fusion, torch.float64),
    ):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (corr, x, y)]
        mapping, confidence = part_of(case, function, *leaves)
        grad = torch.randn(mapping.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results += [mapping.detach(), confidence, *torch.autograd.grad(mapping, leaves, grad)]
    names = ("mapping", "confidence", "grad_corr", "grad_x", "grad_y")
    for name, *values in zip(names, found, same, exact, strict=True):
        assert_within_budget(name, *values, 3 if name.startswith("grad") else 2)


def test_lines_of_no_row_have_a_gradient_of_zero():
    """Where rows are lines, and more lines are given than rows asked for."""
    (corr,), x, y = inputs((2, [((4, 2), (4, 2))], (4, 2)))
    corr.requires_grad_()
    more, _ = part_of(((4, 2), (4, 2), (4, 2), (1, 4), (2, 3)), op.cross_scale_fusion, corr[:, 2:], x, y)
    wanted, _ = part_of(((4, 2), (4, 2), (4, 2), (2, 3), (2, 3)), op.cross_scale_fusion, corr[:, 4:6], x, y)
    assert torch.equal(more, wanted)
    given = torch.randn(more.shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad(mapping, corr, given)[0] for mapping in (more, wanted)]
    assert torch.equal(*grads) and grads[0][:, 4:6].abs().sum() > 0


def test_no_rows_give_no_gradient():
    (corr,), x, y = inputs((1, [((3, 2), (2, 2))], (3, 2)))
    leaves = [leaf.requires_grad_() for leaf in (corr[:, :2], x, y)]
    mapping, confidence, _ = torch.ops.lpmflow.cross_scale_fusion_triton(
        leaves[:1], [3, 2, 2, 2], [3, 2, 0, 0, 0], 0.1, *leaves[1:]
    )
    assert mapping.shape == (1, 1, 2, 0, 2) and confidence.shape == (1, 1, 0, 2)
    assert all((grad == 0).all() for grad in torch.autograd.grad(mapping, leaves, torch.empty_like(mapping)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    compare(FOUR, *inputs(FOUR, DTYPES[dtype]))


def test_tables_in_double_precision_get_gradients_in_it():
    corrs, x, y = inputs(CASES[1])
    found = everything(op.cross_scale_fusion, CASES[1], corrs, x.double(), y.double())
    wanted = everything(op.cross_scale_fusion, CASES[1], corrs, x, y)
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name
    assert found["grad_x"].dtype == found["grad_y"].dtype == torch.float64


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "sliced"])
def test_any_strides_give_the_same_bits(layout):
    corrs, x, y = inputs(FOUR)
    views = []
    for corr in corrs:
        if layout == "transposed":
            views.append(corr.mT.contiguous().mT)
        elif layout == "strided":
            views.append(corr.repeat_interleave(2, dim=-1)[..., ::2])
        elif layout == "expanded":
            views.append(corr[:, :1].expand_as(corr))
        else:  # without a first row and column, as a map with prefix tokens would be
            whole = corr.new_full((corr.shape[0], corr.shape[1] + 1, corr.shape[2] + 1), float("nan"))
            whole[:, 1:, 1:] = corr
            views.append(whole[:, 1:, 1:])
    assert not any(view.is_contiguous() for view in views)
    wanted = everything(op.cross_scale_fusion, FOUR, [view.contiguous() for view in views], x, y)
    x, y = x.repeat_interleave(2)[::2], y[:, None].expand(-1, 2)[:, 0]
    for name, actual in everything(op.cross_scale_fusion, FOUR, views, x, y).items():
        assert torch.equal(actual, wanted[name]), name


def test_a_gradient_of_any_strides_gives_the_same_bits():
    corrs, x, y = inputs(FOUR)
    leaves = [leaf.requires_grad_() for leaf in (*corrs, x, y)]
    mapping, _ = run(op.cross_scale_fusion, FOUR, leaves[:-2], *leaves[-2:])
    given = torch.ones(()).expand(mapping.shape)
    actual = torch.autograd.grad(mapping, leaves, given, retain_graph=True)
    for one, other in zip(actual, torch.autograd.grad(mapping, leaves, given.contiguous()), strict=True):
        assert torch.equal(one, other)


def test_two_runs_agree_to_the_last_bit():
    first, second = (everything(op.cross_scale_fusion, FOUR, *inputs(FOUR)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("level", [1e4, -1e4, 123.456])
@pytest.mark.parametrize("tile", [None, (2, 4)])
def test_constant_rows_are_uniform_even_where_logits_are_large(level, tile, monkeypatch):
    """Every cell has its own level; mixed of equal cells, it is that level to the last bit."""
    if tile is not None:
        monkeypatch.setattr(op, "configuration", lambda *_: Tiles(*tile, 1, 1))
    corrs, x, y = inputs(FOUR)
    levels = [level * (1 + torch.arange(corr.shape[1]))[:, None].expand(corr.shape[1:]) for corr in corrs]
    corrs = [own.expand(corr.shape) for own, corr in zip(levels, corrs, strict=True)]
    mapping, confidence = run(op.cross_scale_fusion, FOUR, corrs, x, y, temperature=0.02)
    torch.testing.assert_close(confidence, torch.full_like(confidence, 1 / 12), rtol=3e-7, atol=0)
    torch.testing.assert_close(mapping[:, :, 0], x.mean().expand(1, 4, 3, 4), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mapping[:, :, 1], y.mean().expand(1, 4, 3, 4), rtol=1e-6, atol=1e-6)


def test_extreme_logits():
    """Whole numbers up to 1e4 at temperature 0.02, halved at most twice, so that what is compared is not luck."""
    case = (2, [((2, 3), (3, 2)), ((3, 5), (2, 3)), ((3, 5), (3, 5))], (3, 5))
    corrs, x, y = inputs(case)
    corrs = [((corr - 0.5) * 5e3).round() * 4 for corr in corrs]
    corrs[2][..., 1::2] = corrs[2][..., :-1:2]  # ties
    compare(case, corrs, x, y, temperature=0.02)


def test_temperatures_beyond_all_reason():
    corrs, x, y = inputs(FOUR)
    hot, _ = run(op.cross_scale_fusion, FOUR, corrs, x, y, temperature=1e38)
    torch.testing.assert_close(hot[:, :, 0], x.mean().expand(1, 4, 3, 4))
    mapping, confidence = run(op.cross_scale_fusion, FOUR, corrs, x, y, temperature=1e-40)
    assert torch.isfinite(mapping).all() and (confidence == 1).all()


@pytest.mark.parametrize(
    ("case", "value"),
    [*itertools.product([FOUR, CASES[4]], [float("nan"), float("inf"), float("-inf")]), (KEPT, float("nan"))],
)
def test_nan_and_infinity_come_out_where_they_should(case, value):
    """In one element of each tensor; everything else is as finite as the reference has it."""
    corrs, x, y = inputs(case)
    for s, corr in enumerate(corrs):
        corr[0].view(-1)[-(s % 2)] = value
    found = everything(op.cross_scale_fusion, case, corrs, x, y)
    wanted = everything(reference.cross_scale_fusion, case, corrs, x, y)
    assert wanted["mapping"].isnan().any()
    for name, expected in wanted.items():
        assert torch.equal(found[name].isnan(), expected.isnan()), name
        torch.testing.assert_close(found[name], expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", [None, (2, 2)])
def test_cells_out_of_the_question(tile, monkeypatch):
    """-inf where nothing is interpolated: in the first tiles, and in a whole row, which is NaN."""
    if tile is not None:
        monkeypatch.setattr(
            op, "configuration", lambda kernel, *_: Tiles(*((16, 16) if "corr" in kernel else tile), 1, 1)
        )
    case = (1, [((4, 5), (4, 5))], (4, 5))
    corrs, x, y = inputs(case)
    corrs[0][..., :13] = float("-inf")
    corrs[0][:, 6] = float("-inf")
    found = everything(op.cross_scale_fusion, case, corrs, x, y)
    wanted = everything(reference.cross_scale_fusion, case, corrs, x, y)
    bad = found["mapping"][0, 0].isnan().all(0)
    assert bad[1, 1] and bad.sum() == 1 and found["confidence"].isnan().sum() == 1
    for name, expected in wanted.items():
        torch.testing.assert_close(found[name], expected, equal_nan=True, rtol=1e-4, atol=1e-6)


def test_a_gradient_of_nan_stays_with_its_cell():
    case = 2, FOUR[1][3:], FOUR[2]
    corrs, x, y = inputs(case)
    corrs[0].requires_grad_()
    mapping, _ = run(op.cross_scale_fusion, case, corrs, x, y)
    given = torch.zeros_like(mapping)
    given[1, 0, 1, 2, 3] = float("nan")
    (grad,) = torch.autograd.grad(mapping, corrs, given)
    assert grad[1, 11].isnan().all() and grad.isnan().sum() == 12


def test_what_the_native_forward_keeps_serves_this_backward():
    """On CUDA devices native's gradients are computed here, from its mapping, confidence and largest."""
    if (missing := ops.backend_report()["cross_scale_fusion"]["native"]) is not None:
        pytest.skip(missing)
    corrs, x, y = inputs(FOUR)
    grids = [side for pair in FOUR[1] for grid in pair for side in grid]
    out = [*FOUR[2], 0, 0, FOUR[2][0]]
    kept = torch.ops.lpmflow.cross_scale_fusion_native(corrs, grids, out, 0.1, x, y)
    given = torch.randn(kept[0].shape, generator=torch.Generator().manual_seed(1))
    backward = torch.ops.lpmflow.cross_scale_fusion_triton_backward
    found, grad_x, grad_y = backward(given, corrs, grids, out, 0.1, x, y, *kept)
    wanted = everything(reference.cross_scale_fusion, FOUR, corrs, x, y)
    for s, grad in enumerate(found):
        torch.testing.assert_close(grad, wanted[f"grad_corrs[{s}]"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_x, wanted["grad_x"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_y, wanted["grad_y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", ["corrs[1]", "x"])
def test_gradients_of_one_argument_alone(wanted):
    corrs, x, y = inputs(FOUR)
    leaf = (x if wanted == "x" else corrs[1]).requires_grad_()
    mapping, _ = run(op.cross_scale_fusion, FOUR, corrs, x, y)
    given = torch.randn(mapping.shape, generator=torch.Generator().manual_seed(1))
    (actual,) = torch.autograd.grad(mapping, leaf, given)
    assert torch.equal(actual, everything(op.cross_scale_fusion, FOUR, corrs, x, y)[f"grad_{wanted}"])


def test_nothing_in_nothing_out():
    case = (0, *FOUR[1:])
    found = everything(op.cross_scale_fusion, case, *inputs(case))
    assert found["mapping"].shape == (0, 4, 2, 3, 4) and found["grad_corrs[1]"].shape == (0, 6, 12)
    assert (found["grad_x"] == 0).all() and (found["grad_y"] == 0).all()


def test_second_derivatives_and_vmap_are_refused():
    case = CASES[1]
    corrs, x, y = inputs(case)
    corrs[0].requires_grad_()
    mapping, _ = run(op.cross_scale_fusion, case, corrs, x.requires_grad_(), y)
    (grad,) = torch.autograd.grad(mapping.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cross_scale_fusion: the triton backend has no second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="vmap is not supported"):
        torch.vmap(lambda one: run(op.cross_scale_fusion, case, [c.detach() for c in corrs], one, y)[0])(
            torch.stack((x, x)).detach()
        )


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own, on inputs it made
@pytest.mark.parametrize("layout", ["dense", "transposed"])
def test_opcheck(layout):
    case = CASES[1]
    corrs, x, y = inputs(case)
    if layout == "transposed":
        corrs = [corr.mT.contiguous().mT for corr in corrs]
    grids = [side for pair in case[1] for grid in pair for side in grid]
    leaves = [leaf.detach().requires_grad_() for leaf in (*corrs, x, y)]
    arguments = (leaves[:-2], grids, [3, 2, 0, 0, 3], 0.1, *leaves[-2:])
    torch.library.opcheck(torch.ops.lpmflow.cross_scale_fusion_triton.default, arguments)
    with torch.no_grad():
        outputs = torch.ops.lpmflow.cross_scale_fusion_triton(*arguments)
    arguments = (torch.randn(outputs[0].shape), corrs, grids, [3, 2, 0, 0, 3], 0.1, x, y, *outputs)
    backward = torch.ops.lpmflow.cross_scale_fusion_triton_backward.default
    torch.library.opcheck(backward, arguments)
    torch.library.opcheck(backward, (*arguments, False))


def test_the_public_function_runs_it():
    corrs, _, _ = inputs(FOUR)
    grids = [s for s, _ in FOUR[1]], [t for _, t in FOUR[1]]
    fused, wanted = (
        ops.cross_scale_fusion(corrs, *grids, out_grid=(3, 4), return_confidence=True, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(fused, wanted, rtol=1e-4, atol=1e-5)
    with ops.use_backend(cross_scale_fusion="triton"), torch.autocast("cpu", torch.bfloat16):
        again = ops.cross_scale_fusion(corrs, *grids, out_grid=(3, 4), return_confidence=True)
    assert ops.last_backend("cross_scale_fusion") == "triton" and torch.equal(again.mapping, fused.mapping)


def test_the_backend_can_run_here():
    corr = inputs(CASES[0])[0][0]
    assert op.why_not(corr) is None
    assert op.why_not(corr.double()) == "it takes float32, float16 and bfloat16, and corrs[0] is float64"
