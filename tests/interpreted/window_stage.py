"""The Triton `window_stage` through the interpreter: values and statistics, odd maps, layouts, numbers, which way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_bench import LAYOUTS, assert_within_budget, laid_out, poisoned
from stages import exactly, inputs
from torch import Tensor

from lpmflow import ops, reference
from lpmflow.ops import PooledMap, StageWeights
from lpmflow_kernels import window_stage as op
from lpmflow_kernels._launch import Tiles

# The interpreter computes with numpy, which warns of the infinities and NaNs that are meant to be there.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# (B, H, W, C, heads, window, hidden), small: a program of this kernel takes the interpreter half a second
SIZES = [
    ((1, 1, 1, 1, 1, 1, 1), (FLOAT, HALF, BRAIN)),
    ((2, 5, 3, 6, 2, 2, 7), (FLOAT, BRAIN)),
    ((1, 9, 6, 36, 3, 4, 50), (FLOAT, BRAIN)),
    ((1, 3, 4, 10, 5, 8, 20), (HALF,)),
    ((1, 6, 7, 12, 1, 7, 9), (BRAIN,)),
    ((1, 9, 8, 24, 2, 8, 33), (FLOAT, HALF)),
    ((1, 17, 2, 8, 2, 3, 17), (HALF,)),
    ((1, 16, 17, 8, 1, 16, 20), (BRAIN,)),
    ((1, 12, 6, 48, 3, 12, 40), (HALF,)),
    ((1, 4, 4, 96, 8, 4, 384), (BRAIN,)),
    ((1, 5, 9, 32, 1, 9, 16), (FLOAT,)),
    ((1, 20, 3, 4, 1, 20, 8), (BRAIN,)),
]
# Of each kind one: several windows in a block, a window that is a block, and one that is several.
KINDS = [(1, 5, 6, 6, 1, 4, 12), (1, 8, 5, 6, 1, 8, 12), (1, 9, 8, 6, 1, 9, 12)]


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 too, which has small ones for want of registers: fewer programs."""
    monkeypatch.setattr(op, "configuration", lambda *_: Tiles(64, 32, 4, 1))


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written to is NaN."""
    with poisoned(monkeypatch):
        yield


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """What was multiplied in, of each map that was computed in one pass."""
    seen: list[torch.dtype] = []
    run = op.window_stage

    def counted(*args: Any, **options: Any) -> Any:
        seen.append(options["dtype"])
        return run(*args, **options)

    monkeypatch.setattr(op, "window_stage", counted)
    return seen


def stage(x: Tensor, weights: StageWeights, sizes: dict[str, int], eps: float = 1e-5) -> PooledMap:
    return PooledMap(*op.window_stage(x, weights, **sizes, eps=eps, dtype=x.dtype))


def compare(x: Tensor, weights: StageWeights, sizes: dict[str, int]) -> None:
    """Errors against float64 are at most twice those of the reference, plus a floor."""
    found = stage(x, weights, sizes)
    same, exact = reference.window_stage(x, weights, **sizes, eps=1e-5), exactly(x, weights, **sizes)
    for name, value, plain, wanted in zip(PooledMap._fields, found, same, exact, strict=True):
        assert value.dtype == x.dtype, name
        assert_within_budget(name, value, plain, wanted, 2)


@pytest.mark.parametrize(("size", "dtype"), [(size, dtype) for size, dtypes in SIZES for dtype in dtypes], ids=str)
def test_values_and_statistics(size, dtype):
    compare(*inputs(size, dtype))


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("size", [(1, 3, 9, 6, 2, 2, 12), KINDS[1]], ids=str)
def test_whole_windows_with_q_k_v_from_memory_or_made_on_the_way(size, staged, monkeypatch):
    monkeypatch.setattr(op, "configuration", lambda *_: Tiles(64, 64, 4, 1))
    monkeypatch.setattr(op, "is_staged", lambda *_: staged)
    compare(*inputs(size))


def test_statistics_of_many_blocks(monkeypatch):
    """More than one round of the kernel that puts them together; channels that are no multiple of its width."""
    monkeypatch.setattr(op, "_POOL", Tiles(2, 16, 4, 1))
    monkeypatch.setattr(op, "configuration", lambda *_: Tiles(16, 16, 4, 1))
    compare(*inputs((1, 3, 5, 20, 1, 2, 8)))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_any_strides_give_the_same_bits(layout):
    x, weights, sizes = inputs(KINDS[2], torch.float16)
    x = laid_out(x, layout)
    wanted = stage(x.contiguous(), weights, sizes)
    twisted = weights._replace(
        qkv_weight=weights.qkv_weight.t().contiguous().t(), bias_table=weights.bias_table.t().contiguous().t()
    )
    for name, value, expected in zip(PooledMap._fields, stage(x, twisted, sizes), wanted, strict=True):
        assert torch.equal(value, expected), name
    assert wanted.map.is_contiguous()


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("size", KINDS, ids=str)
def test_two_runs_agree_to_the_last_bit(size):
    first, second = (stage(*inputs(size, torch.bfloat16)) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("size", KINDS, ids=str)
@pytest.mark.parametrize("factor", [1e4, 0.0])
def test_extreme_and_constant_maps(size, factor):
    x, weights, sizes = inputs(size)
    x = x * factor + 3
    for value, expected in zip(stage(x, weights, sizes), exactly(x, weights, **sizes), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_tails_of_gelu():
    """Far from zero the activation is x or nothing."""
    values = torch.tensor([-40.0, -13.5, -6.0, -3.0, -1.0, -1e-3, 0.0, 1e-20, 1e-3, 0.5, 2.0, 5.0, 40.0])
    x, weights, sizes = inputs((1, 1, 1, len(values), 1, 1, len(values)))
    silent = StageWeights(*(torch.zeros_like(w) for w in weights))
    ones = silent.norm1_bias + 1
    weights = silent._replace(fc1_bias=values, fc2_weight=torch.eye(len(values)), norm_out_weight=ones)
    found = stage(torch.zeros_like(x), weights, sizes, eps=1e12).map[0, 0, 0].double() * 1e6  # that is: centred only
    wanted = torch.nn.functional.gelu(values.double())
    torch.testing.assert_close(found, wanted - wanted.mean(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", KINDS, ids=str)
def test_without_eps_rows_that_are_no_cells_spoil_nothing(size):
    x, weights, sizes = inputs(size, HALF)
    found = stage(x, weights, sizes, eps=0.0)
    wanted = reference.window_stage(x.double(), StageWeights(*(w.double() for w in weights)), **sizes, eps=0.0)
    torch.testing.assert_close(found.map.double(), wanted.map, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(
    ("window", "value", "dtype"),
    [(4, "nan", FLOAT), (4, "inf", BRAIN), (8, "nan", BRAIN), (8, "inf", FLOAT), (9, "nan", HALF)],
    ids=str,
)
def test_nan_comes_out_where_it_belongs(window, value, dtype):
    """In its window, which may share a block with others, and in the statistics of its map."""
    x, weights, sizes = inputs((2, window + 1, window, 4, 1, window, 4), dtype)
    x[1, window, 1, 3] = float(value)
    found = stage(x, weights, sizes)
    bad = torch.zeros(x.shape[:3], dtype=torch.bool)
    bad[1, window:, :window] = True
    assert torch.equal(found.map.isnan().all(-1), bad) and torch.equal(found.map.isnan().any(-1), bad)
    assert found.mean[1].isnan().all() and found.highest[1].isnan().all()
    assert found.mean[0].isfinite().all() and found.highest[0].isfinite().all()


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("size", KINDS, ids=str)
def test_a_bias_of_minus_infinity_masks(size):
    """Some offsets; then all, which leaves nothing to attend to."""
    x, weights, sizes = inputs(size)
    table, window = weights.bias_table, size[5]
    table[: window * (2 * window - 1)] = float("-inf")  # the queries' own row of cells and those before
    table[(2 * window - 1) ** 2 // 2] = 0.0  # but not themselves
    compare(x, weights, sizes)
    nothing = weights._replace(bias_table=torch.full_like(table, float("-inf")))
    assert stage(x, nothing, sizes).map.isnan().all()


def test_nothing_in_nothing_out():
    found = stage(*inputs((0, 5, 4, 6, 2, 2, 8)))
    assert found.map.shape == (0, 5, 4, 6) and found.mean.shape == found.highest.shape == (0, 6)


# Which way the public function goes


def test_autocast_multiplies_in_its_type_and_leaves_the_map_in_float32(passes):
    """Weights in either type, as a network has them that was passed to a matcher or loaded by it."""
    x, weights, sizes = inputs(KINDS[0])
    matrices = ("qkv", "proj", "fc1", "fc2")
    low = weights._replace(
        **{name: w.bfloat16() for name, w in weights._asdict().items() if name.partition("_")[0] in matrices}
    )
    with torch.autocast("cpu", torch.bfloat16):
        found, stored = (ops.window_stage(x, w, **sizes, backend="triton") for w in (weights, low))
        plain = ops.window_stage(x, weights, **sizes, backend="reference")
        layers = ops.window_stage(x.bfloat16(), weights, **sizes, backend="triton")
    assert passes == [torch.bfloat16] * 2 and layers.map.isfinite().all()
    exact = exactly(x, weights, **sizes)
    for name, value, same, wanted in zip(PooledMap._fields, found, plain, exact, strict=True):
        assert value.dtype == torch.float32, name
        error, allowed = ((one.double() - wanted).abs().max() for one in (value, same))
        assert error <= 2 * allowed, name
        torch.testing.assert_close(getattr(stored, name), value, rtol=0.02, atol=0.02)


def test_one_pass_is_for_inference_only(passes):
    x, weights, sizes = inputs(KINDS[0])
    learning = weights._replace(fc1_bias=weights.fc1_bias.clone().requires_grad_())
    out = ops.window_stage(x, learning, **sizes, backend="triton")
    (found,) = torch.autograd.grad(out.map.square().sum(), learning.fc1_bias)
    exact = reference.window_stage(x, learning, **sizes, eps=1e-5)
    (wanted,) = torch.autograd.grad(exact.map.square().sum(), learning.fc1_bias)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not passes
    with torch.no_grad():
        ops.window_stage(x, learning, **sizes, backend="triton")
    assert passes == [torch.float32] and ops.last_backend("window_attention") == "triton"


def test_what_it_cannot_do_goes_layer_by_layer(passes):
    x, weights, sizes = inputs((1, 2, 3, 98, 7, 2, 8))
    assert op.why_not(x, heads=7, window=2, dtype=x.dtype) == "it takes maps of up to 96 channels, got 98"
    found = ops.window_stage(x, weights, **sizes, backend="triton")
    assert not passes and ops.last_backend("window_attention") == "triton"
    torch.testing.assert_close(found.map.double(), exactly(x, weights, **sizes).map, rtol=1e-4, atol=1e-4)


def test_it_is_not_chosen_by_itself(passes):
    ops.window_stage(*inputs(KINDS[0])[:2], heads=1, window=4)
    assert not passes and ops.last_backend("window_attention") != "triton"
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: it takes float32, float16 and bfloat16"):
        ops.window_stage(*inputs(KINDS[0], torch.float64)[:2], heads=1, window=4, backend="triton")


def test_gradients_and_vmap_are_refused_by_the_operator():
    x, weights, sizes = inputs(KINDS[0])
    run = torch.ops.lpmflow.window_stage_triton
    out = run(x.requires_grad_(), list(weights), *sizes.values(), 1e-5)
    with pytest.raises(RuntimeError, match="window_stage: the triton backend does this for inference only"):
        out[0].sum().backward()
    with torch.no_grad(), pytest.raises(RuntimeError, match="vmap is not supported"):
        torch.vmap(lambda one: run(one[None], list(weights), *sizes.values(), 1e-5))(x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(2, 3, 4, 6, 2, 2, 8), (1, 9, 4, 4, 2, 9, 8)], ids=str)
def test_opcheck(size, transposed):
    x, weights, sizes = inputs(size)
    x = x.transpose(1, 2) if transposed else x
    arguments = (x, list(weights), *sizes.values(), 1e-5)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lpmflow.window_stage_triton.default, arguments, test_utils=checks)


def test_compiles_whole_and_once(monkeypatch):
    x, weights, sizes = inputs((1, 3, 4, 4, 2, 2, 8))
    wanted = [stage(factor * x, weights, sizes) for factor in (1, 2)]
    launched: list[Any] = []
    launch = op.launch
    monkeypatch.setattr(op, "launch", lambda kernel, *rest: (launched.append(kernel), launch(kernel, *rest)))
    compiled = torch.compile(ops.window_stage, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for factor in (1, 2):
            found = compiled(factor * x, weights, **sizes, backend="triton")
            assert all(torch.equal(*pair) for pair in zip(found, wanted[factor - 1], strict=True))
    assert launched == [op.project_kernel, op.stage_kernel, op.pool_kernel] * 2
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert compiled(x, weights, **sizes, backend="triton").map.dtype == torch.float32
    assert launched[6:] == [op.stage_kernel, op.pool_kernel]
