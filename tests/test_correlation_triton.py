"""The Triton `correlation` without a GPU: what it refuses, fakes and launches; its values are in tests/interpreted."""

from __future__ import annotations

import interpreted
import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="Triton is not installed, or older than 3.4")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from lpmflow_kernels import correlation as op  # noqa: E402
from lpmflow_kernels._launch import keep_launches  # noqa: E402
from lpmflow_kernels._tiles import split_width  # noqa: E402


@interpreted.tests("correlation")
def test_values_and_gradients_through_the_interpreter(done):
    interpreted.check(done)


def test_why_not_says_what_came():
    q = torch.empty(1, 1, 1, 8)
    assert op.why_not(q.double()) == "it takes float32, float16 and bfloat16, and q is float64"
    assert op.why_not(q.new_empty(1, 1, 1, 257)) == "it takes head widths D up to 256, got 257"
    assert "it runs on CUDA devices" in op.why_not(q) and op.why_not(q).endswith("q is on cpu")
    assert op.why_not(q.to("meta")).endswith("q is on meta")


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (7, 5))
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 1, 1, 8, device="cuda")
    assert op.why_not(q) == "it takes GPUs of compute capability 8.0 and later, and q is on one of 7.5"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (8, 0))
    assert op.why_not(q) is None


def test_cpu_tensors_are_refused_where_nothing_interprets():
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(NotImplementedError, match="correlation_triton"):
        op.correlation(q, q, q, scale=1.0, prefix=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_fakes_have_the_shapes_types_and_strides_of_the_outputs(dtype, transposed):
    with FakeTensorMode():
        q, k, v = (torch.empty(2, n, 3, 24, dtype=dtype, device="cuda").transpose(1, 2) for n in (17, 33, 33))
        if not transposed:
            q, k, v = (x.contiguous() for x in (q, k, v))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attended, corr, stats = torch.ops.lpmflow.correlation_triton(*leaves, 0.2, 1)
        grads = torch.ops.lpmflow.correlation_triton_backward(attended, None, q, k, v, attended, stats, 0.2, 1)
    shapes = [(2, 3, 17, 24), (2, 16, 32), (2, 2, 3, 17), *(tuple(x.shape) for x in (q, k, v))]
    for tensor, shape in zip((attended, corr, stats, *grads), shapes, strict=True):
        assert tuple(tensor.shape) == shape and tensor.is_contiguous() and tensor.device.type == "cuda"
    assert attended.dtype == dtype and corr.dtype == stats.dtype == torch.float32
    assert attended.requires_grad and corr.requires_grad and not stats.requires_grad


def test_every_width_has_a_split_that_covers_it_and_wastes_little():
    assert split_width(96) == (64, 32) and split_width(64) == (64, 0) and split_width(12) == (16, 0)
    for width in range(1, 257):
        head, tail = split_width(width)
        assert width <= head + tail <= max(16, width + 64, -(-width // 16) * 16)
        assert all(part == 0 or (part >= 16 and part & (part - 1) == 0) for part in (head, tail)) and tail < head


def test_the_launchers_leave_out_what_is_not_needed():
    """A loss on attended alone costs no pass over corr; nothing is launched where there is nothing to compute."""
    q = torch.empty(1, 2, 5, 24, device="meta")
    with keep_launches() as forward:
        attended, corr, stats = op.forward(q, q, q, 0.2, 1)
        op.forward(q, q, q, 0.2, 5)
        op.forward(q[:0], q[:0], q[:0], 0.2, 1)
    assert [x.kernel.fn.__name__ for x in forward] == ["attend_kernel", "correlate_kernel", "attend_kernel"]
    with keep_launches() as backward:
        op.backward(attended, None, q, q, q, attended, stats, 0.2, 1)
        op.backward(None, None, q, q, q, attended, stats, 0.2, 1)
        op.backward(None, corr[:, :0, :0], q, q, q, attended, stats, 0.2, 5)
    assert [x.kernel.fn.__name__ for x in backward] == ["delta_kernel", "dq_kernel", "dkv_kernel"]
    assert all(x.arguments["p_da"] is None for x in backward)
