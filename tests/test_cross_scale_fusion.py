"""`cross_scale_fusion`: the reference against explicit 4D interpolation, exact cases, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from lpmflow.ops import FusedFlow, cross_scale_fusion


def weights_1d(size_in, size_out):
    """(size_out, size_in) matrix of bilinear interpolation with align_corners=True."""
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for i in range(size_out):
        place = 0.0 if size_out == 1 else i * (size_in - 1) / (size_out - 1)
        low = min(int(place), size_in - 1)
        high = min(low + 1, size_in - 1)
        matrix[i, low] += 1 - (place - low)
        matrix[i, high] += place - low
    return matrix


def naive(corr, source, target, out, temperature, x, y):
    volume = corr.reshape(-1, *source, *target)
    sides = zip((*source, *target), (*out, *out), strict=True)
    matrices = [weights_1d(a, b) for a, b in sides]
    volume = torch.einsum("brcij,Rr,Cc,Ii,Jj->bRCIJ", volume, *matrices)
    p = (volume / temperature).flatten(3).softmax(-1).view_as(volume)
    mapping = torch.stack((torch.einsum("brcij,j->brc", p, x), torch.einsum("brcij,i->brc", p, y)), 1)
    return mapping, p.flatten(3).amax(-1)


def table(n):
    return torch.linspace(-1, 1, n, dtype=torch.float64)


@pytest.mark.parametrize(
    ("source", "target", "out"),
    [((3, 3), (3, 3), (3, 3)), ((2, 3), (4, 5), (4, 6)), ((5, 4), (2, 2), (3, 7)), ((1, 1), (1, 4), (2, 2))],
)
def test_equals_separable_interpolation(source, target, out):
    torch.manual_seed(0)
    corr = torch.rand(2, source[0] * source[1], target[0] * target[1], dtype=torch.float64)
    x, y = torch.rand(out[1], dtype=torch.float64), torch.rand(out[0], dtype=torch.float64)
    fused = cross_scale_fusion(
        [corr], [source], [target], out_grid=out, temperature=0.1, x=x, y=y, return_confidence=True
    )
    assert isinstance(fused, FusedFlow)
    mapping, confidence = naive(corr, source, target, out, 0.1, x, y)
    torch.testing.assert_close(fused.mapping[:, 0], mapping, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fused.confidence[:, 0], confidence, rtol=1e-10, atol=1e-12)


def test_a_permutation_is_read_back_exactly():
    height, width = 3, 4
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    corr = 50 * torch.eye(12)[order][None]
    mapping = cross_scale_fusion([corr], [(3, 4)], [(3, 4)], out_grid=(3, 4))
    assert isinstance(mapping, torch.Tensor)
    wanted_x = torch.linspace(-1, 1, width)[order % width].view(height, width)
    wanted_y = torch.linspace(-1, 1, height)[order // width].view(height, width)
    torch.testing.assert_close(mapping[0, 0], torch.stack((wanted_x, wanted_y)))


def test_a_constant_row_points_to_the_middle():
    fused = cross_scale_fusion(
        [torch.full((1, 9, 9), 7.0)], [(3, 3)], [(3, 3)], out_grid=(3, 3), return_confidence=True
    )
    torch.testing.assert_close(fused.mapping, torch.zeros(1, 1, 2, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(fused.confidence, torch.full((1, 1, 3, 3), 1 / 9))


def test_scales_do_not_mix_and_extremes_stay_finite():
    torch.manual_seed(0)
    coarse, fine = torch.randn(2, 4, 4) * 1e4, torch.randn(2, 16, 16) * 1e4
    both = cross_scale_fusion([coarse, fine], [(2, 2), (4, 4)], [(2, 2), (4, 4)], out_grid=(4, 4))
    one = cross_scale_fusion([fine], [(4, 4)], [(4, 4)], out_grid=(4, 4))
    assert torch.isfinite(both).all() and both.shape == (2, 2, 2, 4, 4)
    torch.testing.assert_close(both[:, 1:], one)


def test_nan_stays_in_its_row():
    corr = torch.rand(1, 9, 9)
    corr[0, 4, 2] = float("nan")
    mapping = cross_scale_fusion([corr], [(3, 3)], [(3, 3)], out_grid=(3, 3))
    bad = mapping[0, 0].isnan().any(0)
    assert bad[1, 1] and bad.sum() == 1


def test_every_gradient():
    torch.manual_seed(0)
    coarse = torch.rand(1, 4, 4, dtype=torch.float64, requires_grad=True)
    cross = torch.rand(1, 4, 9, dtype=torch.float64, requires_grad=True)
    x, y = table(3).requires_grad_(), table(3).requires_grad_()

    def op(coarse, cross, x, y):
        return cross_scale_fusion(
            [coarse, cross], [(2, 2), (2, 2)], [(2, 2), (3, 3)], out_grid=(3, 3), temperature=0.5, x=x, y=y
        )

    assert torch.autograd.gradcheck(op, (coarse, cross, x, y))


def test_refusals_name_the_argument():
    corr = torch.rand(1, 4, 4)
    grids = [(2, 2)]
    with pytest.raises(ValueError, match="corrs must be a non-empty sequence"):
        cross_scale_fusion([], [], [], out_grid=(2, 2))
    with pytest.raises(ValueError, match="one entry a scale, got 1, 2 and 1"):
        cross_scale_fusion([corr], grids * 2, grids, out_grid=(2, 2))
    with pytest.raises(ValueError, match=r"corrs\[0\] must have shape \(1, 6, 4\), got \(1, 4, 4\)"):
        cross_scale_fusion([corr], [(2, 3)], grids, out_grid=(2, 2))
    with pytest.raises(ValueError, match=r"out_grid must be \(height, width\)"):
        cross_scale_fusion([corr], grids, grids, out_grid=(0, 2))
    with pytest.raises(ValueError, match="temperature must be a number above 0, got 0"):
        cross_scale_fusion([corr], grids, grids, out_grid=(2, 2), temperature=0)
    with pytest.raises(ValueError, match=r"x must have shape \(2,\), got \(3,\)"):
        cross_scale_fusion([corr], grids, grids, out_grid=(2, 2), x=torch.zeros(3))
