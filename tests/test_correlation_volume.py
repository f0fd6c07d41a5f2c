"""`correlation_volume`: against loops, zero vectors, extremes, mutual weights, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lpmflow.ops import correlation_volume, cross_scale_fusion


def maps(*shape_a, b=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in (shape_a, b or shape_a)]


@pytest.mark.parametrize("normalize", [True, False])
def test_every_entry_is_its_definition(normalize):
    a, b = maps(2, 5, 2, 3, b=(2, 5, 3, 1), dtype=torch.float64)
    volume = correlation_volume(a, b, normalize=normalize)
    assert volume.shape == (2, 2, 3, 3, 1)
    for n in range(2):
        for i, j, k in torch.cartesian_prod(*(torch.arange(s) for s in (2, 3, 3))).tolist():
            one, other = a[n, :, i, j], b[n, :, k, 0]
            wanted = F.cosine_similarity(one, other, dim=0) if normalize else one @ other
            torch.testing.assert_close(volume[n, i, j, k, 0], wanted)


def test_mutual_weights():
    a, b = maps(1, 4, 3, 3)
    volume = correlation_volume(a, b).flatten(3).flatten(1, 2)
    found = correlation_volume(a, b, mutual=True).flatten(3).flatten(1, 2)
    alike = volume.clamp(min=0)
    wanted = volume * (alike / volume.amax(1, keepdim=True)) * (alike / volume.amax(2, keepdim=True))
    torch.testing.assert_close(found, wanted)
    assert (volume < 0).any() and not found[volume < 0].any()
    mutual = (volume == volume.amax(1, keepdim=True)) & (volume == volume.amax(2, keepdim=True))
    assert mutual.any()
    torch.testing.assert_close(found[mutual], volume[mutual])
    assert (found.abs() <= volume.abs() + 1e-6).all()
    assert not correlation_volume(torch.ones(1, 4, 1, 1), -torch.ones(1, 4, 1, 1), mutual=True).any()


def test_zero_vectors_give_zero_and_get_no_gradient():
    a, b = maps(1, 4, 2, 2)
    a[:, :, 0, 1] = 0
    a.requires_grad_()
    for mutual in (False, True):
        volume = correlation_volume(a, b, mutual=mutual)
        assert not volume[:, 0, 1].any() and volume.isfinite().all()
        (grad,) = torch.autograd.grad(volume.sum(), a)
        assert grad.isfinite().all() and not grad[:, :, 0, 1].any() and grad.any()
    nothing = torch.zeros(1, 4, 2, 2)
    assert not correlation_volume(nothing, nothing, mutual=True).any()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, size) for size in (1e-38, 1e-30, 1e-10, 1e15, 1e30, 1e38)]
    + [(torch.float64, size) for size in (1e-300, 1e-200, 1e200, 1e300)],
)
def test_lengths_far_from_one(dtype, size):
    a, b = maps(1, 4, 2, 2, dtype=dtype)
    torch.testing.assert_close(correlation_volume(a * size, b), correlation_volume(a, b), rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_cell():
    a, b = maps(1, 4, 2, 2)
    a[0, 1, 1, 0] = float("nan")
    volume = correlation_volume(a, b)
    assert volume[0, 1, 0].isnan().all() and volume.isnan().sum() == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    a, b = maps(2, 96, 3, 4, dtype=dtype)
    volume = correlation_volume(a, b)
    assert volume.dtype == torch.float32
    torch.testing.assert_close(volume, correlation_volume(a.float(), b.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(correlation_volume(a.float(), b.float()), volume)


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients(normalize, mutual):
    a, b = (x.abs().requires_grad_() for x in maps(1, 3, 2, 2, b=(1, 3, 1, 3), dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: correlation_volume(*x, normalize=normalize, mutual=mutual), (a, b))


def test_its_flow_of_a_shift():
    """A map against itself moved by a cell: every inner cell flows by one."""
    a = torch.randn(1, 32, 6, 7, generator=torch.Generator().manual_seed(0))
    b = torch.roll(a, 1, dims=3)
    volume = correlation_volume(a, b).flatten(3).flatten(1, 2)
    mapping = cross_scale_fusion([volume], [(6, 7)], [(6, 7)], out_grid=(6, 7))
    cells = (mapping[0, 0, 0] + 1) * 3
    torch.testing.assert_close(cells[:, :-1], torch.arange(1.0, 7).expand(6, 6), atol=1e-3, rtol=0)


def test_views_and_an_empty_batch():
    a, b = maps(2, 4, 3, 5)
    wanted = correlation_volume(a, b)
    found = correlation_volume(a.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), b.repeat(1, 1, 2, 1)[:, :, :3])
    torch.testing.assert_close(found, wanted)
    assert correlation_volume(a[:0], b[:0], mutual=True).shape == (0, 3, 5, 3, 5)


def test_refusals_name_the_argument():
    a, b = maps(2, 4, 3, 5)
    with pytest.raises(TypeError, match="correlation_volume: feat_a must be a torch.Tensor"):
        correlation_volume(a.numpy(), b)
    with pytest.raises(ValueError, match=r"feat_a must have shape \(B, C, ha, wa\), got \(4, 3, 5\)"):
        correlation_volume(a[0], b)
    with pytest.raises(ValueError, match=r"feat_b must have shape \(2, 4, 3, 5\), got \(2, 3, 3, 5\)"):
        correlation_volume(a, b[:, :3])
    with pytest.raises(TypeError, match="feat_b must have feat_a's dtype"):
        correlation_volume(a, b.double())
    with pytest.raises(ValueError, match="feat_a must have channels and cells"):
        correlation_volume(a[:, :0], b[:, :0])
    with pytest.raises(TypeError, match="mutual must be True or False, got 1"):
        correlation_volume(a, b, mutual=1)
