"""`correlation`: the reference against triple loops, its gradients, and what the op refuses."""

from __future__ import annotations

import math

import pytest
import torch

from lpmflow.ops import correlation


def naive(q, k, v, scale, prefix):
    batch, heads, n, width = q.shape
    m = k.shape[2]
    attended = torch.zeros_like(q)
    corr = torch.zeros(batch, n - prefix, m - prefix, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                weights = [math.exp(scale * float(q[b, h, i] @ k[b, h, j])) for j in range(m)]
                total = sum(weights)
                for j in range(m):
                    attended[b, h, i] += weights[j] / total * v[b, h, j]
                    if i >= prefix and j >= prefix:
                        corr[b, i - prefix, j - prefix] += weights[j] / total
    return attended, corr


def inputs(batch=2, heads=3, n=5, m=7, width=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, n, width), (batch, heads, m, width), (batch, heads, m, width))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("n", "m", "prefix"), [(5, 7, 1), (1, 1, 0), (1, 1, 1), (2, 17, 0), (9, 3, 2)])
def test_equals_the_loops(n, m, prefix):
    q, k, v = inputs(n=n, m=m)
    attended, corr = correlation(q, k, v, scale=0.7, prefix=prefix)
    wanted_attended, wanted_corr = naive(q, k, v, 0.7, prefix)
    torch.testing.assert_close(attended, wanted_attended, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(corr, wanted_corr, rtol=1e-12, atol=1e-12)


def test_default_scale_is_the_root_of_the_width():
    q, k, v = inputs()
    torch.testing.assert_close(correlation(q, k, v), correlation(q, k, v, scale=4**-0.5))


def test_rows_sum_to_the_number_of_heads_without_a_prefix():
    _, corr = correlation(*inputs(), prefix=0)
    torch.testing.assert_close(corr.sum(-1), torch.full((2, 5), 3.0, dtype=torch.float64))


def test_every_gradient():
    q, k, v = (x.requires_grad_() for x in inputs(batch=1, heads=2, n=4, m=3, width=3))
    assert torch.autograd.gradcheck(correlation, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    q, k, v = inputs(n=33, m=65, dtype=dtype)
    attended, corr = correlation(q, k, v)
    assert attended.dtype == dtype and corr.dtype == torch.float32
    _, exact = correlation(q.double(), k.double(), v.double())
    torch.testing.assert_close(corr.double(), exact, rtol=1e-5, atol=1e-6)


def test_extreme_logits_stay_finite_and_nan_stays_nan():
    q, k, v = inputs(dtype=torch.float32)
    _, corr = correlation(q * 1e4, k * 1e4, v)
    assert torch.isfinite(corr).all()
    q[0, 0, 3] = float("nan")
    attended, corr = correlation(q, k, v)
    assert attended[0, 0, 3].isnan().all() and corr[0, 2].isnan().all()
    assert torch.isfinite(attended[1]).all() and torch.isfinite(corr[0, :2]).all()


def test_transposed_dense_inputs_give_the_same_values():
    q, k, v = inputs()
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not views[0].is_contiguous()
    torch.testing.assert_close(correlation(*views), correlation(q, k, v))


def test_empty_batch():
    attended, corr = correlation(*(x[:0] for x in inputs()))
    assert attended.shape == (0, 3, 5, 4) and corr.shape == (0, 4, 6)


def test_refusals_name_the_argument():
    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"correlation: q must be a torch.Tensor \(B, H, N, D\), got list"):
        correlation([1], k, v)
    with pytest.raises(ValueError, match=r"correlation: v must have shape \(2, 3, 7, 4\), got \(2, 3, 6, 4\)"):
        correlation(q, k, v[:, :, :6])
    with pytest.raises(TypeError, match="correlation: k must have q's dtype"):
        correlation(q, k.float(), v)
    with pytest.raises(TypeError, match="correlation: q must be float32"):
        correlation(q.long(), k, v)
    with pytest.raises(ValueError, match="prefix must be an integer of at least 0, got -1"):
        correlation(q, k, v, prefix=-1)
    with pytest.raises(ValueError, match="q must have at least 6 tokens"):
        correlation(q, k, v, prefix=6)


def test_a_named_backend_runs_or_raises():
    q, k, v = inputs()
    correlation(q, k, v, backend="reference")
    with pytest.raises(ValueError, match="backend must be one of reference, native, triton, got 'cuda'"):
        correlation(q, k, v, backend="cuda")
    with pytest.raises(RuntimeError, match="correlation: backend 'triton' cannot run: "):
        correlation(q.double(), k.double(), v.double(), backend="triton")
