"""`ops.linear` and the layers made of it: what PyTorch's own give, by oneDNN where that is allowed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lpmflow import ops
from lpmflow.model.layers import Linear, LinearGelu

LARGE = (2, 65, 256)  # times 512 outputs: worth the call


@pytest.fixture
def layer() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = LARGE, (1024, 256), (1024,)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight / 16, bias


def by_onednn(run) -> bool:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    return any(event.key == "mkldnn::_linear_pointwise" for event in found.key_averages())


def plain(x, weight, bias, gelu):
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_pytorchs_own(layer, dtype, with_bias, gelu):
    x, weight, bias = (tensor.to(dtype) for tensor in layer)
    bias = bias if with_bias else None
    exact = plain(x.double(), weight.double(), None if bias is None else bias.double(), gelu)
    with torch.no_grad():
        found, same = ops.linear(x, weight, bias, gelu=gelu), plain(x, weight, bias, gelu)
        if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            assert by_onednn(lambda: ops.linear(x, weight, bias, gelu=gelu))
    assert found.dtype == dtype and found.shape == same.shape
    floor = torch.finfo(dtype).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= 2 * (same.double() - exact).abs().max() + floor


@pytest.mark.parametrize("view", ["slice of the weight", "transposed input", "every second column"])
def test_views(layer, view):
    x, weight, bias = layer
    if view == "slice of the weight":
        weight, bias = weight[512:], bias[512:]
    elif view == "transposed input":
        x = x.transpose(0, 1)
    else:
        x = torch.stack((x, x), dim=-1).flatten(-2)[..., ::2]
    with torch.no_grad():
        found = ops.linear(x, weight, bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_autocast_gives_its_type(layer):
    x, weight, bias = layer
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, same = ops.linear(x, weight, bias), F.linear(x, weight, bias)
        kept = ops.linear(x, weight.bfloat16(), bias.bfloat16())
    assert found.dtype == same.dtype == torch.bfloat16
    torch.testing.assert_close(found, same)
    assert found.equal(kept)


def test_gradients_are_pytorchs(layer):
    x, weight, bias = (tensor.requires_grad_() for tensor in layer)
    assert not by_onednn(lambda: ops.linear(x, weight, bias))
    for gelu in (False, True):
        found = torch.autograd.grad(ops.linear(x, weight, bias, gelu=gelu).sum(), (x, weight, bias))
        same = torch.autograd.grad(plain(x, weight, bias, gelu).sum(), (x, weight, bias))
        assert all(ours.equal(theirs) for ours, theirs in zip(found, same, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by the first dual tensor itself
def test_forward_mode_derivatives_are_pytorchs(layer):
    x, weight, bias = layer
    with forward_ad.dual_level():
        y = ops.linear(forward_ad.make_dual(x, x), weight, bias)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, F.linear(x, weight), rtol=1e-5, atol=1e-4)


def test_vmap_is_pytorchs(layer):
    x, weight, bias = layer
    with torch.no_grad():
        found = torch.func.vmap(lambda row: ops.linear(row, weight, bias))(torch.stack((x, x)))
    torch.testing.assert_close(found, F.linear(torch.stack((x, x)), weight, bias))


@pytest.mark.parametrize("shape", [(256,), (0, 256), (1, 256)])
def test_what_is_not_worth_it_is_pytorchs(layer, shape):
    _, weight, bias = layer
    x = torch.ones(shape)
    with torch.no_grad():
        assert ops.linear(x, weight, bias).equal(F.linear(x, weight, bias))
        assert not by_onednn(lambda: ops.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_pytorchs(layer, dtype):
    x, weight, bias = (tensor.to(dtype) for tensor in layer)
    with torch.no_grad():
        assert ops.linear(x, weight, bias).equal(F.linear(x, weight, bias))


def test_where_there_is_no_onednn(layer, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.no_grad():
        assert not by_onednn(lambda: ops.linear(*layer))


def test_mismatched_shapes_are_pytorchs_error(layer):
    x, weight, bias = layer
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ops.linear(x, weight[:, 1:], bias)


def test_compiled_is_one_graph(layer):
    with torch.no_grad():
        found = torch.compile(ops.linear, backend="eager", fullgraph=True)(*layer, gelu=True)
    torch.testing.assert_close(found, plain(*layer, True), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_traced_is_pytorchs(layer):
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: ops.linear(x, *layer[1:]), layer[:1])
    assert "mkldnn" not in str(traced.graph)


def test_layers(layer):
    x = layer[0]
    torch.manual_seed(0)
    ours, with_gelu = Linear(256, 1024), LinearGelu(256, 1024)
    with torch.no_grad():
        theirs = nn.Linear(256, 1024)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        wanted = F.gelu(F.linear(x, with_gelu.weight, with_gelu.bias))
        torch.testing.assert_close(with_gelu(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_bias_that_is_not_dense(layer):
    x, weight, _ = layer
    with torch.no_grad():
        for bias in (torch.randn(2048)[::2], torch.ones(1).expand(1024), torch.ones(1), torch.ones(1, 1024)):
            torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)


def test_weights_of_other_shapes_are_pytorchs(layer):
    x, weight, _ = layer
    with torch.no_grad():
        assert ops.linear(x, weight[0]).equal(F.linear(x, weight[0]))
        with pytest.raises(RuntimeError):
            ops.linear(x, weight.unflatten(0, (512, 2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_autocast_leaves_other_types_to_pytorch(layer, dtype):
    x, weight, bias = (tensor.to(dtype) for tensor in layer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, same = ops.linear(x, weight, bias), F.linear(x, weight, bias)
    assert found.dtype == same.dtype and found.equal(same)


def test_operations_can_be_counted(layer):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ops.linear(*layer)
    assert counter.get_total_flops() == 2 * 2 * 65 * 256 * 1024


def test_a_processor_without_bfloat16():
    """oneDNN refuses it there, and PyTorch does not."""
    program = """
import torch
from lpmflow import ops
x, weight = torch.ones(2, 65, 256).bfloat16(), torch.ones(1024, 256).bfloat16()
with torch.no_grad():
    assert ops.linear(x, weight).equal(torch.nn.functional.linear(x, weight))
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
