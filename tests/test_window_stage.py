"""`window_stage`: both ways of computing it against float64, its statistics, when it is done in one pass, refusals."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from kernel_bench import LAYOUTS, assert_within_budget, laid_out, poisoned
from stages import exactly, inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lpmflow import ops, reference
from lpmflow.ops import PooledMap, StageWeights, window_stage

missing = ops.backend_report()["window_attention"]["native"]
native_only = pytest.mark.skipif(missing is not None, reason=str(missing))
NATIVE = importlib.import_module("lpmflow_kernels._native") if missing is None else None

# (B, H, W, C, heads, window, hidden)
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 5, 3, 6, 2, 2, 7),
    (1, 17, 9, 36, 3, 4, 144),
    (2, 9, 20, 48, 3, 12, 97),
    (3, 16, 16, 96, 8, 16, 384),
    (1, 33, 5, 10, 5, 8, 20),
    (1, 40, 40, 8, 2, 3, 17),
    (2, 6, 6, 130, 2, 4, 33),
]


@pytest.fixture(params=NATIVE.instruction_sets() if NATIVE else [])
def isa(request) -> Iterator[str]:
    before = NATIVE.instruction_set()
    assert NATIVE.use_instruction_set(request.param)
    yield request.param
    NATIVE.use_instruction_set(before)


@pytest.fixture
def passes(monkeypatch) -> list[Tensor]:
    """The maps that were computed in one pass."""
    module = importlib.import_module("lpmflow_kernels.native.window_stage")
    seen: list[Tensor] = []
    run = module.window_stage

    def counted(x, *args, **options):
        seen.append(x)
        return run(x, *args, **options)

    monkeypatch.setattr(module, "window_stage", counted)
    return seen


def compare(x: Tensor, weights: StageWeights, sizes: dict[str, int]) -> None:
    found = window_stage(x, weights, **sizes, backend="native")
    same = reference.window_stage(x, weights, **sizes, eps=1e-5)
    exact = exactly(x, weights, **sizes)
    for name in PooledMap._fields:
        value, plain, wanted = (getattr(result, name) for result in (found, same, exact))
        assert value.dtype == x.dtype
        assert_within_budget(name, value, plain, wanted, 2)


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_pass_equals_the_layers(isa, passes, size, dtype, monkeypatch):
    with poisoned(monkeypatch):
        compare(*inputs(size, dtype))
    assert len(passes) == 1


@native_only
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(passes, layout):
    x, weights, sizes = inputs((2, 5, 7, 12, 2, 4, 24))
    weights = weights._replace(
        qkv_weight=weights.qkv_weight.t().contiguous().t(), norm1_bias=weights.norm1_bias[:1].expand(12)
    )
    compare(laid_out(x, layout), weights, sizes)
    assert len(passes) == 1


@native_only
def test_bit_equal_for_any_number_of_threads():
    x, weights, sizes = inputs((2, 20, 28, 24, 3, 4, 48))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2, 7):
            torch.set_num_threads(threads)
            found.append(window_stage(x, weights, **sizes, backend="native"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@native_only
def test_the_tails_of_gelu(isa):
    """Far from zero the activation is x or nothing, near it half of x; in between the error stays below 2e-7."""
    values = torch.tensor([-40.0, -13.5, -9.0, -6.0, -3.0, -1.0, -1e-3, -1e-20, 0.0, 1e-20, 1e-3, 0.5, 2.0, 5.0, 40.0])
    hidden, channels = len(values), 2
    x, weights, sizes = inputs((1, 1, 1, channels, 1, 1, hidden))
    zeros = [torch.zeros_like(w) for w in weights]
    silent = StageWeights(*zeros)._replace(fc1_bias=values, fc2_weight=torch.zeros(channels, hidden))
    x = torch.zeros_like(x)
    for index, value in enumerate(values.tolist()):
        # norm_out of (g, 0) with a large eps is linear in g, which is how g can be read off the output
        fc2 = torch.zeros(channels, hidden)
        fc2[0, index] = 1
        weights = silent._replace(fc2_weight=fc2, norm_out_weight=torch.ones(channels))
        found = window_stage(x, weights, **sizes, eps=1e6, backend="native").map[0, 0, 0, 0].item()
        g = torch.nn.functional.gelu(torch.tensor(value, dtype=torch.float64)).item()
        wanted = g / 2 / (g * g / 4 + 1e6) ** 0.5
        assert abs(found - wanted) <= 2e-7 * max(abs(wanted), 5e-4), value


@native_only
@pytest.mark.parametrize("factor", [1e4, 0.0])
def test_extreme_and_constant_maps(isa, factor):
    x, weights, sizes = inputs((1, 6, 5, 12, 2, 4, 24))
    x = x * factor + 3
    found, wanted = window_stage(x, weights, **sizes, backend="native"), exactly(x, weights, **sizes)
    for value, expected in zip(found, wanted, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)


@native_only
def test_nan_comes_out_where_it_belongs(isa):
    x, weights, sizes = inputs((2, 9, 9, 24, 2, 4, 48))
    x[1, 6, 5, 3] = float("nan")
    found = window_stage(x, weights, **sizes, backend="native")
    wanted = torch.zeros(2, 9, 9, dtype=torch.bool)
    wanted[1, 4:8, 4:8] = True
    assert torch.equal(found.map.isnan().all(-1), wanted) and torch.equal(found.map.isnan().any(-1), wanted)
    assert found.mean[1].isnan().all() and found.highest[1].isnan().all()
    assert found.mean[0].isfinite().all() and found.highest[0].isfinite().all()


@native_only
@pytest.mark.parametrize("batch", [0, 2])
def test_empty_batch(batch):
    x, weights, sizes = inputs((batch, 5, 4, 6, 2, 2, 8))
    found = window_stage(x, weights, **sizes, backend="native")
    assert found.map.shape == x.shape and found.mean.shape == found.highest.shape == (batch, 6)


# Which way it is computed


@native_only
def test_one_pass_is_for_inference_only(passes):
    x, weights, sizes = inputs((1, 5, 4, 6, 2, 2, 8), torch.float64)
    window_stage(x, weights, **sizes)
    assert len(passes) == 1 and ops.last_backend("window_attention") == "native"
    learning = weights._replace(fc1_bias=weights.fc1_bias.requires_grad_())
    out = window_stage(x, learning, **sizes, backend="native")
    (found,) = torch.autograd.grad(out.map.square().sum(), learning.fc1_bias)
    exact = reference.window_stage(x, learning, **sizes, eps=1e-5)
    torch.testing.assert_close(found, torch.autograd.grad(exact.map.square().sum(), learning.fc1_bias)[0])
    assert len(passes) == 1 and ops.last_backend("window_attention") == "native"
    with torch.no_grad():
        window_stage(x, learning, **sizes)
    assert len(passes) == 2


@native_only
def test_one_pass_is_for_one_precision_without_autocast(passes):
    x, weights, sizes = inputs((1, 5, 4, 6, 2, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = window_stage(x, weights, **sizes)
    half = window_stage(x.bfloat16(), StageWeights(*(w.bfloat16() for w in weights)), **sizes)
    exact = exactly(x, weights, **sizes)
    assert not passes and half.map.dtype == torch.bfloat16
    for found in (mixed, half):
        torch.testing.assert_close(found.map.double(), exact.map, rtol=0.05, atol=0.1)
    window_stage(x, weights._replace(bias_table=weights.bias_table.double()), **sizes)
    assert len(passes) == 1


@native_only
def test_one_pass_is_for_weights_that_fit_the_cache(passes):
    x, weights, sizes = inputs((1, 2, 2, 320, 2, 2, 1280))
    found = window_stage(x, weights, **sizes, backend="native")
    assert not passes
    torch.testing.assert_close(found.map.double(), exactly(x, weights, **sizes).map, rtol=1e-5, atol=1e-4)


def test_the_reference_is_layers_around_the_reference():
    x, weights, sizes = inputs((1, 5, 4, 6, 2, 2, 8))
    with ops.use_backend("reference"):
        found = window_stage(x, weights, **sizes)
    assert ops.last_backend("window_attention") == "reference"
    for value, wanted in zip(found, exactly(x, weights, **sizes), strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by the first torch.func.jvp itself
def test_forward_mode():
    x, weights, sizes = inputs((1, 3, 4, 6, 2, 2, 8), torch.float64)

    def along(run):
        def of(table):
            return run(x, weights._replace(proj_bias=table), **sizes, eps=1e-5).map

        return torch.func.jvp(of, (weights.proj_bias,), (torch.linspace(-1, 1, 6, dtype=torch.float64),))[1]

    found = along(window_stage)
    torch.testing.assert_close(found, along(reference.window_stage))
    assert found.abs().max() > 1e-3


@native_only
def test_the_operator_itself_refuses_gradients_and_vmap():
    x, weights, sizes = inputs((1, 3, 4, 6, 2, 2, 8))
    importlib.import_module("lpmflow_kernels.native.window_stage")
    run = torch.ops.lpmflow.window_stage_native
    out = run(x.requires_grad_(), list(weights), *sizes.values(), 1e-5)
    with pytest.raises(RuntimeError, match="window_stage: the native backend does this for inference only"):
        out[0].sum().backward()
    with torch.no_grad(), pytest.raises(RuntimeError, match="window_stage: torch.func.vmap is not supported"):
        torch.func.vmap(lambda x: run(x[None], list(weights), *sizes.values(), 1e-5))(x)


@native_only
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    x, weights, sizes = inputs((2, 3, 4, 6, 2, 2, 8))
    x = x.transpose(1, 2) if transposed else x
    checks = ("test_schema", "test_faketensor")
    arguments = (x, list(weights), *sizes.values(), 1e-5)
    torch.library.opcheck(torch.ops.lpmflow.window_stage_native.default, arguments, test_utils=checks)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        out = window_stage(torch.empty(2, 3, 4, 6), weights, **sizes, backend="native")
    assert out.map.shape == (2, 3, 4, 6) and out.mean.shape == (2, 6)


@native_only
def test_compiles_whole(passes):
    compiled = torch.compile(window_stage, fullgraph=True, backend="aot_eager")
    x, weights, sizes = inputs((1, 6, 5, 12, 2, 4, 24))
    with torch.no_grad():
        found, wanted = compiled(x, weights, **sizes), window_stage(x, weights, **sizes)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_refusals_name_the_argument():
    x, weights, sizes = inputs((1, 5, 4, 6, 2, 2, 8))
    with pytest.raises(ValueError, match=r"window_stage: x must have shape \(B, H, W, C\)"):
        window_stage(x[0], weights, **sizes)
    with pytest.raises(ValueError, match=r"x must have a multiple of heads \(4\) channels, got 6"):
        window_stage(x, weights, heads=4, window=2)
    with pytest.raises(ValueError, match="x must have at least one cell and one channel"):
        window_stage(x[:, :0], weights, **sizes)
    with pytest.raises(TypeError, match="weights must be StageWeights, got list"):
        window_stage(x, list(weights), **sizes)
    with pytest.raises(ValueError, match=r"fc2_weight must have shape \(6, 8\), got \(8, 6\)"):
        window_stage(x, weights._replace(fc2_weight=weights.fc2_weight.t()), **sizes)
    with pytest.raises(ValueError, match=r"norm_out_bias must have shape \(6,\), got \(5,\)"):
        window_stage(x, weights._replace(norm_out_bias=weights.norm_out_bias[:5]), **sizes)
    with pytest.raises(TypeError, match=r"qkv_bias must be a torch.Tensor \(channels\), got NoneType"):
        window_stage(x, weights._replace(qkv_bias=None), **sizes)
    with pytest.raises(
        TypeError, match="proj_weight must have x's dtype torch.float32 outside autocast, got torch.float64"
    ):
        window_stage(x, weights._replace(proj_weight=weights.proj_weight.double()), **sizes)
    with pytest.raises(ValueError, match=r"bias_table must have shape \(25, 2\), got \(9, 2\)"):
        window_stage(x, weights, heads=2, window=3)
