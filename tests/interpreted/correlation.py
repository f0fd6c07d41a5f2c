"""The Triton `correlation` through the interpreter: values, every gradient, odd sizes, layouts and numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lpmflow import reference
from lpmflow_kernels import correlation as op
from lpmflow_kernels._launch import Tiles

# The interpreter computes with numpy, which warns of the infinities and NaNs that are meant to be there.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMES = ("attended", "corr", "dq", "dk", "dv")

# B, H, N, M, D, prefix, and the tiles (queries, keys) where the table's are not meant.
SHAPES = [
    (1, 1, 1, 1, 1, 0, None),
    (1, 3, 1, 2, 12, 1, None),
    (2, 1, 2, 5, 24, 0, None),
    (1, 3, 5, 17, 12, 2, None),
    (2, 3, 17, 5, 32, 1, (16, 16)),
    (1, 1, 63, 97, 24, 1, None),
    (1, 1, 97, 63, 24, 0, (32, 16)),
    (1, 3, 17, 63, 96, 2, (16, 32)),
    (2, 1, 5, 97, 96, 1, (16, 64)),
    (1, 1, 63, 17, 160, 0, None),
    (1, 1, 2, 2, 256, 2, None),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written to is NaN."""

    def poison(allocate: Any) -> Any:
        def allocate_nan(*args: Any, **kwargs: Any) -> Tensor:
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return allocate_nan

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


def inputs(batch: int = 2, heads: int = 2, n: int = 5, m: int = 7, width: int = 12, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch * 1000 + n * 100 + m * 10 + width)
    shapes = [(batch, heads, tokens, width) for tokens in (n, m, m)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(options.get("dtype", torch.float32)) for x in made]


def upstream(outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Gradients of attended and corr to start from."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]


def everything(function: Any, tensors: list[Tensor], given: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of `function`, by name."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*leaves, **options)
    given = [g.to(x.dtype) for g, x in zip(given, outputs, strict=True)]
    return dict(zip(NAMES, (*outputs, *torch.autograd.grad(outputs, leaves, given)), strict=True))


def einsum_path(q: Tensor, k: Tensor, v: Tensor, *, scale: float, prefix: int) -> tuple[Tensor, Tensor]:
    """The op as eager code computes it in q's own type; corr, which is float32, from the reference."""
    p = (torch.einsum("bhnd,bhmd->bhnm", q, k) * scale).softmax(-1)
    corr = reference.correlation(q, k, v, scale=scale, prefix=prefix)[1]
    return torch.einsum("bhnm,bhmd->bhnd", p, v), corr


def assert_within_budget(tensors: list[Tensor], scale: float, prefix: int, cancelled: float = 0.0) -> None:
    """Errors against float64 are at most 2 (gradients: 3) times those of the einsum path, plus a floor.

    The floor is one rounding of the largest value and, for gradients, of terms as large as `cancelled` in float32.
    """
    options = {"scale": scale, "prefix": prefix}
    given = upstream(reference.correlation(*tensors, **options))
    actual = everything(op.correlation, tensors, given, **options)
    eager = everything(einsum_path, tensors, given, **options)
    exact = everything(reference.correlation, [x.double() for x in tensors], given, **options)
    for name, wanted in exact.items():
        assert actual[name].shape == wanted.shape and actual[name].dtype == eager[name].dtype, name
        if wanted.numel() == 0:
            continue
        error, usual = ((found[name].double() - wanted).abs().max().item() for found in (actual, eager))
        floor = torch.finfo(actual[name].dtype).eps * wanted.abs().max().item()
        factor = 2
        if name in ("dq", "dk", "dv"):
            factor, floor = 3, floor + torch.finfo(torch.float32).eps * cancelled
        assert error <= factor * usual + floor, f"{name}: error {error:.3g}, the einsum path's {usual:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "n", "m", "width", "prefix", "tiles"), SHAPES)
def test_errors_stay_within_the_budget(batch, heads, n, m, width, prefix, tiles, dtype, monkeypatch):
    if tiles is not None:
        monkeypatch.setattr(op, "configuration", lambda *_: Tiles(*tiles, 4, 1))
    assert_within_budget(inputs(batch, heads, n, m, width, dtype=DTYPES[dtype]), width**-0.5, prefix)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_are_not_positive(scale):
    assert_within_budget(inputs(), scale, 1)


def layouts(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
    yield "transposed dense", [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    yield "last dimension not dense", [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    yield "broadcast", [x[:1, :1].expand(x.shape) for x in (q, k, v)]
    fused = torch.randn(2, 7, 3, 2, 12, generator=torch.Generator().manual_seed(0))
    yield "fused projection", list(fused.permute(2, 0, 3, 1, 4).unbind(0))


@pytest.mark.parametrize("layout", ["transposed dense", "last dimension not dense", "broadcast", "fused projection"])
def test_any_strides_give_the_same_bits(layout):
    views = dict(layouts(*inputs()))[layout]
    assert not any(x.is_contiguous() for x in views)
    dense = [x.contiguous() for x in views]
    given = upstream(reference.correlation(*dense, scale=0.3, prefix=1))
    wanted = everything(op.correlation, dense, given, scale=0.3, prefix=1)
    for name, actual in everything(op.correlation, views, given, scale=0.3, prefix=1).items():
        assert torch.equal(actual, wanted[name]), name


@pytest.mark.parametrize("kind", ["broadcast", "transposed"])
def test_gradients_of_any_strides_give_the_same_bits(kind):
    leaves = [x.requires_grad_() for x in inputs()]
    outputs = op.correlation(*leaves, scale=0.3, prefix=1)
    if kind == "broadcast":
        given = [torch.ones(()).expand(x.shape) for x in outputs]
    else:
        given = [x.detach().mT.contiguous().mT for x in outputs]
    actual = torch.autograd.grad(outputs, leaves, given, retain_graph=True)
    wanted = torch.autograd.grad(outputs, leaves, [x.contiguous() for x in given])
    for name, x, y in zip("qkv", actual, wanted, strict=True):
        assert torch.equal(x, y), f"d{name}"


@pytest.mark.parametrize("used", ["attended", "corr"])
def test_gradients_when_only_one_output_is_used(used):
    index = NAMES.index(used)
    leaves, exact_leaves = (
        [x.to(t).requires_grad_() for x in inputs(n=17, m=33)] for t in (torch.float32, torch.float64)
    )
    output = op.correlation(*leaves, scale=0.3, prefix=2)[index]
    exact = reference.correlation(*exact_leaves, scale=0.3, prefix=2)[index]
    given = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(exact, exact_leaves, given.double(), materialize_grads=True)
    for name, x, y in zip("qkv", torch.autograd.grad(output, leaves, given), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-6, msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype):
    """Logits of +-1e4: rows of P hold one value or two near ones, and the gradients are what is left of large terms.

    Inputs are whole numbers, so that products are exact and what is compared is not luck where two logits nearly tie.
    """
    q, k, v = inputs(n=17, m=34, dtype=torch.float64)
    q, k = (q * 50).round().clamp(-96, 96), (k * 50).round().clamp(-96, 96)
    q[..., 0] /= 64
    k[:, :, 1::2, 1:] = k[:, :, ::2, 1:]
    assert (q @ k.mT).abs().max() * 0.5 > 1e4
    d_attended, d_corr = upstream(reference.correlation(q, k, v, scale=0.5, prefix=1))
    d_p = (d_attended @ v.mT).abs().max() + d_corr.abs().max()
    cancelled = 0.5 * 96 * d_p.item()
    assert_within_budget([x.to(DTYPES[dtype]) for x in (q, k, v)], 0.5, 1, cancelled)


@pytest.mark.parametrize("level", [0.0, 180.0, -180.0])
def test_constant_rows_are_uniform_even_where_logits_are_large(level):
    q, k, v = inputs(m=33)
    q, k = torch.full_like(q, 180.0), torch.full_like(k, level)  # logits of +-1.2e5
    attended, corr = op.correlation(q, k, v, scale=0.3, prefix=1)
    torch.testing.assert_close(corr, torch.full_like(corr, 2 / 33), rtol=3e-7, atol=0)
    torch.testing.assert_close(attended, v.mean(2, keepdim=True).expand(q.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_outputs_are_rounded_to_the_nearest(dtype):
    q, k, v = inputs(m=2, width=96, dtype=DTYPES[dtype])
    attended, _ = op.correlation(q, torch.zeros_like(k), v, scale=0.3, prefix=1)
    assert torch.equal(attended, v.float().mean(2, keepdim=True).to(q.dtype).expand(q.shape))


def test_logits_of_minus_infinity(monkeypatch):
    """Keys that are out of the question fill the first tile, or, for the last token, all tiles: then P is NaN."""
    monkeypatch.setattr(op, "configuration", lambda *_: Tiles(16, 16, 4, 1))
    q, k, v = inputs(m=40)
    q[..., 0] = 1.0
    k[:, :, :20, 0] = float("-inf")
    q[..., 1], k[..., 1] = 0.0, -3e38
    q[:, :, 4, 1] = 1e30  # times -3e38 there is nothing but -inf
    attended, corr = op.correlation(q, k, v, scale=0.3, prefix=0)
    wanted = reference.correlation(q, k, v, scale=0.3, prefix=0)
    torch.testing.assert_close((attended, corr), wanted, equal_nan=True)
    assert torch.isfinite(attended[:, :, :4]).all() and attended[:, :, 4].isnan().all()


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_come_out_where_they_should(name, dtype, value):
    """In one token of one head, in a second tile; everything else is as finite as the reference has it."""
    tensors = inputs(n=33, m=40, dtype=DTYPES[dtype])
    tensors["qkv".index(name)][0, 1, 32, 3] = value
    given = upstream(reference.correlation(*tensors, scale=0.3, prefix=1))
    actual = everything(op.correlation, tensors, given, scale=0.3, prefix=1)
    wanted = everything(reference.correlation, tensors, given, scale=0.3, prefix=1)
    assert actual["attended"].isnan().any() or wanted["attended"].isinf().any()
    for key, expected in wanted.items():
        assert torch.equal(actual[key].isnan(), expected.isnan()), key


def test_a_gradient_of_nan_comes_out():
    q, k, v = (x.requires_grad_() for x in inputs())
    _, corr = op.correlation(q, k, v, scale=0.3, prefix=1)
    given = torch.zeros_like(corr)
    given[1, 2, 3] = float("nan")
    dq, dk, dv = torch.autograd.grad(corr, [q, k, v], given)
    assert dq[1, :, 3].isnan().all() and dk[1].isnan().all()
    assert torch.isfinite(dq[0]).all() and torch.isfinite(dk[0]).all() and (dv == 0).all()


def test_two_runs_agree_to_the_last_bit():
    tensors = inputs(n=33, m=40, dtype=torch.float16)
    given = upstream(reference.correlation(*tensors, scale=0.3, prefix=1))
    first, second = (everything(op.correlation, tensors, given, scale=0.3, prefix=1) for _ in range(2))
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("empty", ["batch", "heads"])
def test_nothing_in_nothing_out(empty):
    q, k, v = (x.requires_grad_() for x in inputs(**{empty: 0}))
    attended, corr = op.correlation(q, k, v, scale=0.3, prefix=1)
    assert attended.shape == q.shape and corr.shape == (q.shape[0], 4, 6) and (corr == 0).all()
    for gradient in torch.autograd.grad(attended.sum() + corr.sum(), [q, k, v]):
        assert gradient.numel() == 0


def test_all_tokens_are_prefix():
    q, k, v = (x.requires_grad_() for x in inputs(n=2, m=2))
    attended, corr = op.correlation(q, k, v, scale=0.3, prefix=2)
    assert corr.shape == (2, 0, 0)
    assert all((x == 0).all() for x in torch.autograd.grad(corr.sum(), [q, k, v], retain_graph=True))
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(attended.sum() + corr.sum(), [q, k, v]))


def test_a_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in inputs())
    attended, corr = op.correlation(q, k, v, scale=0.3, prefix=1)
    (dq,) = torch.autograd.grad(attended.sum() + corr.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="correlation: the triton backend has no second derivative"):
        dq.sum().backward()


def test_stats_have_no_gradient_and_vmap_is_refused():
    q, k, v = (x.requires_grad_() for x in inputs())
    assert not torch.ops.lpmflow.correlation_triton(q, k, v, 0.3, 1)[2].requires_grad
    with pytest.raises(RuntimeError, match="vmap is not supported"):
        torch.vmap(lambda x: op.correlation(x, k, v, scale=0.3, prefix=1)[1])(torch.stack((q, q)))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own, on inputs it made
@pytest.mark.parametrize("layout", ["dense", "transposed dense"])
def test_opcheck(layout):
    dense = inputs()
    q, k, v = dense if layout == "dense" else dict(layouts(*dense))[layout]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.lpmflow.correlation_triton, (*leaves, 0.3, 1))
    attended, corr, stats = torch.ops.lpmflow.correlation_triton(q, k, v, 0.3, 1)
    for given in itertools.islice(itertools.product((attended, None), (corr, None)), 3):
        torch.library.opcheck(torch.ops.lpmflow.correlation_triton_backward, (*given, q, k, v, attended, stats, 0.3, 1))


def test_the_backend_can_run_here():
    assert op.why_not(inputs()[0]) is None
    assert op.why_not(inputs(dtype=torch.float64)[0]) == "it takes float32, float16 and bfloat16, and q is float64"
