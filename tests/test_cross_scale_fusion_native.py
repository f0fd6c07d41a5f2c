"""`cross_scale_fusion` by the native module, for every instruction set here: values, gradients, registration."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from kernel_bench import assert_within_budget, poisoned
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lpmflow import ops

if (missing := ops.backend_report()["cross_scale_fusion"]["native"]) is not None:
    pytest.skip(missing, allow_module_level=True)
NATIVE = importlib.import_module("lpmflow_kernels._native")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# B, then source and target grid of each scale, then the output grid
CASES = [
    (1, [((1, 1), (1, 1))], (1, 1)),
    (2, [((1, 1), (1, 1)), ((3, 2), (3, 2))], (3, 2)),
    (1, [((1, 4), (2, 1)), ((2, 2), (5, 3))], (5, 7)),
    (2, [((3, 5), (4, 6)), ((6, 10), (4, 6)), ((3, 5), (6, 10)), ((6, 10), (6, 10))], (6, 10)),
    (1, [((16, 16), (16, 16)), ((16, 16), (32, 32))], (32, 32)),
    (1, [((7, 9), (11, 5)), ((17, 3), (2, 19))], (5, 6)),  # to smaller grids
    (1, [((5, 4), (30, 31))], (31, 33)),  # by a little: a vector's taps lie far apart
    (1, [((2, 3), (2, 63))], (3, 97)),
    (3, [((4, 4), (9, 33))], (2, 1)),
    (2, [((5, 16), (5, 16)), ((5, 16), (3, 4)), ((2, 8), (5, 16))], (5, 16)),  # whole vectors, gradients in place
]
NAMES = ("mapping", "confidence", "grad_x", "grad_y")


@pytest.fixture(params=NATIVE.instruction_sets())
def isa(request) -> Iterator[str]:
    before = NATIVE.instruction_set()
    assert NATIVE.use_instruction_set(request.param)
    yield request.param
    NATIVE.use_instruction_set(before)


def inputs(case, dtype=torch.float32, seed=0) -> tuple[list[Tensor], Tensor, Tensor]:
    """Correlations that make neither uniform nor one-hot distributions at temperature 0.1, and uneven tables."""
    batch, scales, out = case
    generator = torch.Generator().manual_seed(seed)
    corrs = [torch.rand(batch, s[0] * s[1], t[0] * t[1], generator=generator).to(dtype) for s, t in scales]
    exact = torch.promote_types(dtype, torch.float32)
    x, y = (torch.randn(side, generator=generator).to(exact) for side in (out[1], out[0]))
    return corrs, x, y


def run(case, corrs, x, y, backend, temperature=0.1, **options):
    _, scales, out = case
    result = ops.cross_scale_fusion(
        corrs,
        [s for s, _ in scales],
        [t for _, t in scales],
        out_grid=out,
        temperature=temperature,
        x=x,
        y=y,
        backend=backend,
        return_confidence=True,
        **options,
    )
    assert ops.last_backend("cross_scale_fusion") == backend
    return result


def everything(case, corrs, x, y, backend, dtype=None, temperature=0.1) -> dict[str, Tensor]:
    """Outputs and gradients by name, for a fixed gradient of the mapping."""
    corrs, x, y = (
        [c.detach().to(dtype or c.dtype).requires_grad_() for c in corrs],
        *(table.detach().to(dtype or table.dtype).requires_grad_() for table in (x, y)),
    )
    mapping, confidence = run(case, corrs, x, y, backend, temperature)
    assert not confidence.requires_grad
    grad = torch.randn(mapping.shape, generator=torch.Generator().manual_seed(1)).to(mapping.dtype)
    *grads, grad_x, grad_y = torch.autograd.grad(mapping, (*corrs, x, y), grad)
    found = dict(zip(NAMES, (mapping, confidence, grad_x, grad_y), strict=True))
    return found | {f"grad_corrs[{s}]": value for s, value in enumerate(grads)}


def compare(case, corrs, x, y, temperature=0.1) -> None:
    found, same = (everything(case, corrs, x, y, backend, None, temperature) for backend in ("native", "reference"))
    exact = everything(case, corrs, x, y, "reference", torch.float64, temperature)
    for name, value in found.items():
        assert value.dtype == same[name].dtype, name
        assert_within_budget(name, value.detach(), same[name].detach(), exact[name].detach(), 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(isa, case, dtype, monkeypatch):
    with poisoned(monkeypatch):
        compare(case, *inputs(case, dtype))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "sliced"])
def test_layouts(layout):
    case = CASES[3]
    corrs, x, y = inputs(case)
    nan = float("nan")
    for s, corr in enumerate(corrs):
        if layout == "transposed":
            corrs[s] = corr.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "strided":
            whole = corr.new_full((*corr.shape[:-1], 2 * corr.shape[-1]), nan)
            whole[..., ::2] = corr
            corrs[s] = whole[..., ::2]
        elif layout == "expanded":
            corrs[s] = corr[:1].expand_as(corr)
        else:  # without a first row and column, as a map with prefix tokens would be
            whole = corr.new_full((corr.shape[0], corr.shape[1] + 1, corr.shape[2] + 1), nan)
            whole[:, 1:, 1:] = corr
            corrs[s] = whole[:, 1:, 1:]
    compare(case, corrs, x.repeat_interleave(2)[::2], y.flip(0).flip(0))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    case = CASES[3]
    before = torch.get_num_threads()
    wanted = everything(case, *inputs(case), "native")
    torch.set_num_threads(threads)
    try:
        found = everything(case, *inputs(case), "native")
    finally:
        torch.set_num_threads(before)
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


def test_the_models_temperature():
    compare(CASES[4], *inputs(CASES[4]), temperature=0.02)


def test_gradcheck():
    case = (2, [((2, 2), (3, 2)), ((3, 4), (2, 2))], (3, 4))
    corrs, x, y = inputs(case, torch.float64)
    leaves = [t.requires_grad_() for t in (*corrs, x, y)]
    assert torch.autograd.gradcheck(lambda a, b, x, y: run(case, [a, b], x, y, "native", 0.5)[0], leaves)


def test_only_what_needs_a_gradient_gets_one():
    case = CASES[3]
    corrs, x, y = inputs(case)
    corrs[2].requires_grad_()
    run(case, corrs, x, y, "native").mapping.square().sum().backward()
    found, corrs[2].grad = corrs[2].grad, None
    run(case, corrs, x, y, "reference").mapping.square().sum().backward()
    torch.testing.assert_close(found, corrs[2].grad, rtol=1e-4, atol=1e-5)
    assert corrs[0].grad is None and x.grad is None


@pytest.mark.parametrize("level", [1e4, -1e4, 0.0])
def test_extremes_and_constant_rows(isa, level):
    case = (1, [((3, 3), (4, 4)), ((6, 6), (6, 6))], (6, 6))
    corrs, x, y = inputs(case)
    for corr in corrs:
        corr.copy_(corr * level if level else torch.full_like(corr, 7.0))
        corr[:, 4] = level
    found, wanted = (run(case, corrs, x, y, backend, 0.02) for backend in ("native", "reference"))
    for value in found:
        assert torch.isfinite(value).all()
    # interpolated logits of 1e4 / 0.02 keep two digits after the point, in any order of operations
    torch.testing.assert_close(found.mapping[:, 1], wanted.mapping[:, 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mapping[:, 0], wanted.mapping[:, 0], rtol=0.1, atol=0.1)
    gradients = everything(case, corrs, x, y, "native", None, 0.02)
    assert all(torch.isfinite(value).all() for value in gradients.values())


def test_nan_comes_out_where_it_belongs(isa):
    case = (2, [((3, 3), (3, 3)), ((6, 6), (3, 3)), ((6, 6), (6, 6))], (6, 6))
    corrs, x, y = inputs(case)
    corrs[0][1, 4, 2] = corrs[1][0, 7, 8] = corrs[2][1, 35, 0] = float("nan")
    corrs[2][0, 3] = float("inf")
    found, wanted = (run(case, corrs, x, y, backend) for backend in ("native", "reference"))
    for value, expected in zip(found, wanted, strict=True):
        assert torch.equal(value.isnan(), expected.isnan())
    # 5 x 5 cells are interpolated from the first, one of them each way with a weight of 0, as F.interpolate has it
    assert found.confidence.isnan().sum() == 25 + 1 + 2


def test_an_axis_that_keeps_its_length_reads_no_neighbours(isa):
    case = (1, [((4, 3), (4, 6)), ((2, 6), (4, 3)), ((4, 6), (2, 6))], (4, 6))
    corrs, x, y = inputs(case)
    corrs[0][0, 4] = corrs[1][0, 7, 4] = corrs[2][0, 20] = float("nan")
    corrs[0][0, 9, 1] = corrs[1][0, 2, 7] = float("-inf")
    found, wanted = (everything(case, corrs, x, y, backend) for backend in ("native", "reference"))
    for name, expected in wanted.items():
        assert torch.equal(found[name].isnan(), expected.isnan()), name
        assert expected.isnan().any(), name
        assert expected.isfinite().any() or name in ("grad_x", "grad_y"), name


def test_masked_cells_get_no_weight(isa):
    """-inf where a tensor has the output's grid: those target cells are out of the question."""
    case = (1, [((4, 4), (4, 4))], (4, 4))
    corrs, x, y = inputs(case)
    corrs[0][:, :, ::2] = float("-inf")
    found, wanted = (everything(case, corrs, x, y, backend) for backend in ("native", "reference"))
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5)
    assert not found["grad_corrs[0]"][:, :, ::2].any()


def test_empty_batch():
    case = (0, CASES[3][1], CASES[3][2])
    found = everything(case, *inputs(case), "native")
    assert found["mapping"].shape == (0, 4, 2, 6, 10) and not found["grad_x"].any() and not found["grad_y"].any()
    assert found["grad_corrs[1]"].shape == (0, 60, 24)


def test_the_automatic_choice_on_the_cpu():
    corr = torch.rand(1, 4, 4)
    ops.cross_scale_fusion([corr], [(2, 2)], [(2, 2)], out_grid=(2, 2))
    assert ops.last_backend("cross_scale_fusion") == "native"


def test_second_derivatives_and_vmap_are_refused():
    case = CASES[2]
    corrs, x, y = inputs(case)
    corrs[0].requires_grad_()
    (grad,) = torch.autograd.grad(run(case, corrs, x, y, "native").mapping.square().sum(), corrs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cross_scale_fusion: the native backend has no second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="cannot be transformed by torch.func"):
        torch.func.vmap(lambda a, b: run(case, [a[None], b[None]], x, y, "native").mapping)(
            *(c.detach() for c in corrs)
        )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by the first torch.func.jvp itself
def test_forward_mode_goes_to_the_reference():
    corr = torch.rand(1, 4, 4)
    _, tangent = torch.func.jvp(
        lambda c: ops.cross_scale_fusion([c], [(2, 2)], [(2, 2)], out_grid=(2, 2)), (corr,), (torch.rand(1, 4, 4),)
    )
    assert ops.last_backend("cross_scale_fusion") == "reference" and tangent.abs().max() > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own, on inputs it made
def test_opcheck():
    case = CASES[3]
    corrs, x, y = inputs(case)
    grids = [side for pair in case[1] for grid in pair for side in grid]
    arguments = (
        [c.requires_grad_() for c in corrs],
        grids,
        [6, 10, 0, 0, 6],
        0.1,
        x.requires_grad_(),
        y.requires_grad_(),
    )
    torch.library.opcheck(torch.ops.lpmflow.cross_scale_fusion_native.default, arguments)
    with torch.no_grad():
        outputs = torch.ops.lpmflow.cross_scale_fusion_native(*arguments)
    corrs, x, y = [c.detach() for c in corrs], x.detach(), y.detach()
    arguments = (torch.randn(outputs[0].shape), corrs, grids, [6, 10, 0, 0, 6], 0.1, x, y, *outputs)
    for tables in (True, False):
        torch.library.opcheck(torch.ops.lpmflow.cross_scale_fusion_native_backward.default, (*arguments, tables))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_the_tables_have_a_gradient_only_where_it_is_wanted(case):
    corrs, x, y = inputs(case)
    corrs = [corr.requires_grad_() for corr in corrs]
    wanted = []
    for tables in (True, False):
        arguments = {"x": x.requires_grad_(tables), "y": y.requires_grad_(tables), "backend": "native"}
        mapping = ops.cross_scale_fusion(corrs, *zip(*case[1], strict=True), out_grid=case[2], **arguments)
        mapping.square().sum().backward()
        wanted.append([corr.grad for corr in corrs])
        assert tables == (x.grad is not None) == (y.grad is not None)
        for tensor in (*corrs, x, y):
            tensor.grad = None
    for with_tables, without in zip(*wanted, strict=True):
        torch.testing.assert_close(without, with_tables, rtol=0, atol=0)


def test_shapes_without_numbers():
    with FakeTensorMode():
        mapping = ops.cross_scale_fusion([torch.empty(2, 6, 4)], [(2, 3)], [(2, 2)], out_grid=(5, 7), backend="native")
    assert isinstance(mapping, Tensor) and mapping.shape == (2, 1, 2, 5, 7)


def test_compiles_whole_and_once():
    case = CASES[3]
    compiled = torch.compile(ops.cross_scale_fusion, fullgraph=True, backend="aot_eager")
    grids = [s for s, _ in case[1]], [t for _, t in case[1]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            corrs, x, y = inputs(case, seed=seed)
            x.requires_grad_()
            mapping = compiled(corrs, *grids, out_grid=case[2], temperature=0.1, x=x, y=y)
            mapping.square().sum().backward()
            found, x.grad = x.grad, None
            run(case, corrs, x, y, "reference").mapping.square().sum().backward()
            torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-5)


def test_half_precision_under_autocast_stays_as_given():
    case = CASES[3]
    corrs, x, y = inputs(case)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(case, corrs, x, y, "native").mapping
    assert torch.equal(found, run(case, corrs, x, y, "native").mapping)
