"""Derivatives of every kind through the ops as they choose their backend: torch.func, forward mode, the second one."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from lpmflow import ops

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by the first torch.func.jvp itself
GRIDS = {"source_grid": (2, 2), "target_grid": (2, 3)}


class Op(NamedTuple):
    """A scalar of one op's result, as a function of one of its arguments, with the backend's name to give."""

    run: Callable[[Tensor, str | None], Tensor]
    x: Tensor
    names: tuple[str, ...]  # of the ops that choose


def _numbers(*shape: int) -> Tensor:
    """Different everywhere, and made without chance, which neither vmap nor the compiler takes along."""
    return (1.7 * torch.arange(1.0, 1 + math.prod(shape), dtype=torch.float64)).sin().view(shape)


def _correlation(q: Tensor, backend: str | None) -> Tensor:
    k = _numbers(1, 2, 7, 4)
    attended, corr = ops.correlation(q, k, k, backend=backend)
    return attended.square().sum() + corr.square().sum()


def _fusion(corr: Tensor, backend: str | None) -> Tensor:
    options = {"out_grid": (3, 4), "temperature": 0.5, "backend": backend}
    return ops.cross_scale_fusion([corr], [(2, 2)], [(2, 3)], **options).square().sum()


def _region(q: Tensor, backend: str | None) -> Tensor:
    k, table = _numbers(1, 2, 12, 4), _numbers(2, 3 * 5 * 4)
    return ops.region_attention(q, k, k, table, **GRIDS, backend=backend).square().sum()


def _window(qkv: Tensor, backend: str | None) -> Tensor:
    return ops.window_attention(qkv, _numbers(9, 2), heads=2, window=2, shift=1, backend=backend).square().sum()


def _stage(x: Tensor, backend: str | None) -> Tensor:
    shapes = [(4,), (4,), (12, 4), (12,), (9, 2), (4, 4), (4,), (4,), (4,), (7, 4), (7,), (4, 7), (4,), (4,), (4,)]
    weights = ops.StageWeights(*(_numbers(*shape) for shape in shapes))
    return sum(part.square().sum() for part in ops.window_stage(x, weights, heads=2, window=2, backend=backend))


def _flow(q: Tensor, backend: str | None) -> Tensor:
    k = _numbers(1, 2, 7, 4)
    found = ops.correlation_flow(q, k, k, **GRIDS, out_grid=(3, 4), temperature=0.5, backend=backend)
    return found.attended.square().sum() + found.mapping.square().sum()


OPS = {
    "correlation": Op(_correlation, _numbers(1, 2, 5, 4), ("correlation",)),
    "cross_scale_fusion": Op(_fusion, _numbers(1, 4, 6), ("cross_scale_fusion",)),
    "region_attention": Op(_region, _numbers(1, 2, 12, 4), ("region_attention",)),
    "window_attention": Op(_window, _numbers(1, 3, 3, 12), ("window_attention",)),
    "window_stage": Op(_stage, _numbers(1, 3, 3, 4), ("window_attention",)),
    "correlation_flow": Op(_flow, _numbers(1, 2, 5, 4), ("correlation", "cross_scale_fusion")),
}


@pytest.fixture(params=OPS)
def op(request) -> Op:
    return OPS[request.param]


@pytest.fixture(params=["whole", "streamed"])
def flow(request, monkeypatch) -> Op:
    """`correlation_flow`, the other way of computing it too."""
    if request.param == "streamed":
        monkeypatch.setattr(sys.modules["lpmflow.ops.correlation_flow"], "BLOCK_BYTES", 1)
    return OPS["correlation_flow"]


def by_autograd(op: Op) -> Tensor:
    """The gradient that the chosen backend gives."""
    x = op.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(op.run(x, None), x)
    return grad


def check_transforms(op: Op) -> None:
    def run(x: Tensor) -> Tensor:
        return op.run(x, None)

    wanted = by_autograd(op)
    torch.testing.assert_close(torch.func.grad(run)(op.x), wanted)
    assert all(ops.last_backend(name) == "reference" for name in op.names)
    many = torch.stack((op.x, 0.5 * op.x))
    values = torch.stack([run(x) for x in many])
    torch.testing.assert_close(torch.func.vmap(run)(many), values)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(run))(many)[0], wanted)
    _, tangent = torch.func.jvp(run, (op.x,), (torch.ones_like(op.x),))
    torch.testing.assert_close(tangent, wanted.sum())


def test_torch_func_goes_through_the_reference(op):
    check_transforms(op)


def test_torch_func_takes_the_flow_in_one_piece(flow):
    check_transforms(flow)


def test_forward_mode_goes_through_the_reference(op):
    with forward_ad.dual_level():
        value = op.run(forward_ad.make_dual(op.x, torch.ones_like(op.x)), None)
        tangent = forward_ad.unpack_dual(value).tangent
    assert all(ops.last_backend(name) == "reference" for name in op.names)
    torch.testing.assert_close(tangent, by_autograd(op).sum())


def test_second_derivatives_are_the_references(op):
    """By hand they are refused in a sentence, unless the reference is named; torch.func takes it."""
    along = torch.linspace(-1, 1, op.x.numel(), dtype=op.x.dtype).view(op.x.shape)

    def twice(backend: str | None) -> Tensor:
        x = op.x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(op.run(x, backend), x, create_graph=True)
        return torch.autograd.grad((grad * along).sum(), x)[0]

    wanted = twice("reference")
    assert wanted.abs().max() > 1e-6
    _, found = torch.func.jvp(torch.func.grad(lambda x: op.run(x, None)), (op.x,), (along,))
    torch.testing.assert_close(found, wanted)
    if ops.backend_report()[op.names[0]]["native"] is not None:
        pytest.skip("the native module is not built here")
    with pytest.raises(RuntimeError, match="has no second derivative; use backend='reference' where the gradient is"):
        twice(None)


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.hessian, lambda f: lambda x: torch.func.vmap(f)(x[None])]
)
def test_a_backend_named_within_torch_func_is_refused(op, transform):
    if ops.backend_report()[op.names[0]]["native"] is not None:
        pytest.skip("the native module is not built here")
    said = "backend 'native' cannot run: it (cannot be transformed by torch.func|has no forward-mode derivative)"
    with pytest.raises(RuntimeError, match=said):
        transform(lambda x: op.run(x, "native"))(op.x)


def test_torch_func_in_compiled_code():
    op = OPS["correlation"]
    grad = torch.compile(torch.func.grad(lambda x: op.run(x, None)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(grad(op.x), by_autograd(op))
