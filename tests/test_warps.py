"""Warp pairs: that their truth is true, that maps stay in their range, and what counts as seen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lpmflow.data import WarpBatch, WarpPairs, WarpRange, warps
from lpmflow.data.warps import HARD, MILD
from lpmflow.geometry import sample_image

pytestmark = pytest.mark.usefixtures("one_thread")

STILL = WarpRange(rotation=0, scale=1, aspect=1, shear=0, translation=0, bend=0, perspective=0)
SIZE = (24, 40)


def only(**limits: float) -> WarpRange:
    return WarpRange(**{**vars(STILL), **limits})


def ramps() -> Tensor:
    """Two photographs whose colours are linear in the position, so that bilinear reading is exact: x, y, 128."""
    x = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    flat = torch.full_like(x, 128)
    return torch.stack((torch.stack((x, x.T, flat)), torch.stack((x.T, 255 - x, flat))))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No change of colour, and nothing pasted over."""
    monkeypatch.setattr(warps, "recolour", lambda images, generator: images)
    monkeypatch.setattr(warps, "occlude", lambda images, *_: (images, torch.zeros_like(images[:, :1])))


def frames(batch: WarpBatch) -> Tensor:
    """The mapping in half frames: -1 and 1 are the frame's edges."""
    height, width = batch.mapping.shape[1:3]
    return (batch.mapping + 0.5) * 2 / torch.tensor([width, height]) - 1


def linear_parts(limits: WarpRange, count: int = 300) -> np.ndarray:
    """(count, 3, 2): least squares of the mappings on x, y, 1, in half frames; the mappings must be affine."""
    pairs = WarpPairs(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), (6, 10))
    places = frames(pairs.sample(count, limits)).flatten(1, 2).double().numpy()
    basis = np.concatenate((pairs.grid.numpy(), np.ones((60, 1))), axis=1)
    parts = np.linalg.pinv(basis) @ places
    np.testing.assert_allclose(basis @ parts, places, atol=1e-5)
    return parts


# The truth


@pytest.mark.parametrize("limits", [STILL, MILD, HARD])
@pytest.mark.parametrize("size", [SIZE, (40, 24)])
def test_the_source_shows_the_target_where_the_mapping_says(
    bare: None, limits: WarpRange, size: tuple[int, int]
) -> None:
    batch = WarpPairs(ramps(), size, seed=1).sample(16, limits)
    height, width = size
    checked = 0
    for source, target, mapping, valid in zip(*batch, strict=True):
        # between the outermost pixel centres, where the bilinear reading of a linear image is exact
        between = valid & (mapping >= 0).all(dim=2) & (mapping <= torch.tensor([width - 1, height - 1])).all(dim=2)
        shown, read = source.permute(1, 2, 0)[between], sample_image(target, mapping)[between]
        torch.testing.assert_close(shown, read, rtol=0, atol=1e-4)  # a hundredth of a pixel
        checked += int(between.sum())
    assert checked > 0.5 * 16 * height * width


def test_the_shapes_and_the_range_with_everything_on() -> None:
    batch = WarpPairs(ramps(), SIZE).sample(3)
    assert [tuple(part.shape) for part in batch] == [(3, 3, *SIZE), (3, 3, *SIZE), (3, *SIZE, 2), (3, *SIZE)]
    assert [part.dtype for part in batch] == [torch.float32] * 3 + [torch.bool]
    for views in (batch.source, batch.target):
        assert views.min() >= 0 and views.max() <= 1


def test_without_a_warp_every_pixel_stays(bare: None) -> None:
    batch = WarpPairs(ramps(), SIZE).sample(4, STILL)
    y, x = np.mgrid[:24, :40]
    np.testing.assert_allclose(batch.mapping.numpy(), np.broadcast_to(np.stack((x, y), -1), (4, 24, 40, 2)), atol=1e-5)
    assert batch.valid.all()
    assert torch.equal(batch.source, batch.target)


def test_the_target_is_a_middle_part_of_the_photograph_mirrored_or_not(bare: None) -> None:
    target = WarpPairs(ramps()[:1].expand(2, -1, -1, -1), SIZE).sample(200, STILL).target.double() * 255
    left, right = target[:, 0, 0, 0], target[:, 0, 0, -1]
    share = (right - left) / 256 * 40 / 39  # of the photograph's width, frame edge to frame edge
    assert 0.6 <= share.abs().min() < 0.65 and 0.91 < share.abs().max() <= 0.96
    assert 70 < (share < 0).sum() < 130
    assert ((target[:, 1, -1, 0] - target[:, 1, 0, 0]) > 0).all()  # never upside down
    assert target[:, :2].min() >= 0 and target[:, :2].max() <= 255
    middle = (left + right) / 2 / 256 - 127.5 / 256
    assert ((middle.abs() + share.abs() / 2) <= 0.5 + 1e-6).all() and middle.abs().max() > 0.05


# What is seen


def test_what_leaves_the_frame_is_not_valid(bare: None) -> None:
    batch = WarpPairs(ramps(), SIZE).sample(50, HARD)
    x, y = batch.mapping.double().unbind(3)
    inside = (x >= -0.5) & (x <= 39.5) & (y >= -0.5) & (y <= 23.5)
    border = torch.minimum((x - 19.5).abs() - 20, (y - 11.5).abs() - 12).abs() < 1e-3
    assert torch.equal(batch.valid | border, inside | border)
    assert 0.03 < (~batch.valid).float().mean() < 0.4


def test_occluders_in_either_view_are_not_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixel is no occluder, and the target pixel nearest to its place is none: by a loop over pixels."""
    hidden: list[Tensor] = []
    original = warps.occlude

    def record(*arguments: Any) -> tuple[Tensor, Tensor]:
        covered, mask = original(*arguments)
        hidden.append(mask[:, 0].bool())
        return covered, mask

    monkeypatch.setattr(warps, "occlude", record)
    count = 8
    batch = WarpPairs(ramps(), SIZE, seed=3).sample(count, MILD)
    in_source, in_target = hidden[0].chunk(2)
    assert in_source.any() and in_target.any()
    for pair, row, column in np.ndindex(count, *SIZE):
        x, y = batch.mapping[pair, row, column].tolist()
        found = bool(batch.valid[pair, row, column])
        if in_source[pair, row, column] or not (-0.5 <= x <= 39.5 and -0.5 <= y <= 23.5):
            assert not found
            continue
        near = in_target[pair, max(math.floor(y), 0) : math.floor(y) + 2, max(math.floor(x), 0) : math.floor(x) + 2]
        if near.all() or not near.any():  # in between it depends on the weights of the four
            assert found == (not near.any())


def test_an_occluder_in_the_target_is_moved_to_the_source(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def occlude(images: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        mask = torch.zeros_like(images[:, :1])
        mask[1:, :, :, 30:] = 1  # the second half of the views are the targets: here one, hidden from column 30 on
        return images, mask

    monkeypatch.setattr(warps, "occlude", occlude)
    monkeypatch.setattr(WarpPairs, "_maps", lambda self, *_: self.grid[None] + torch.tensor([2 * 5 / 40, 0.0]))
    batch = WarpPairs(ramps(), SIZE).sample(1)
    assert batch.mapping[0, 7, 3].tolist() == pytest.approx([8, 7], abs=1e-5)
    assert torch.equal(batch.valid[0], (torch.arange(40) < 25).expand(24, 40))


# The ranges


def test_rotations() -> None:
    parts = linear_parts(only(rotation=15))
    angles = np.degrees(np.arctan2(parts[:, 0, 1], parts[:, 0, 0]))
    assert -15 <= angles.min() < -14 and 14 < angles.max() <= 15
    cos, sin = np.cos(np.radians(angles)), np.sin(np.radians(angles))
    turned = np.stack((cos, sin, -sin, cos), axis=1).reshape(-1, 2, 2)  # where x and y go, one a row
    np.testing.assert_allclose(parts[:, :2], turned, atol=1e-5)
    np.testing.assert_allclose(parts[:, 2], 0, atol=1e-5)


def test_scales_and_aspects() -> None:
    sizes = linear_parts(only(scale=1.25))
    np.testing.assert_allclose(sizes[:, 0, 0], sizes[:, 1, 1], atol=1e-5)
    assert 1 / 1.25 - 1e-5 <= sizes[:, 0, 0].min() < 0.82 and 1.22 < sizes[:, 0, 0].max() <= 1.25 + 1e-5
    assert abs(np.log(sizes[:, 0, 0]).mean()) < 0.03  # as often smaller as larger
    aspects = linear_parts(only(aspect=1.3))
    np.testing.assert_allclose(aspects[:, 0, 0] * aspects[:, 1, 1], 1, atol=1e-5)
    ratio = aspects[:, 0, 0] / aspects[:, 1, 1]
    assert 1 / 1.3 - 1e-5 <= ratio.min() < 0.79 and 1.27 < ratio.max() <= 1.3 + 1e-5
    for parts in (sizes, aspects):
        np.testing.assert_allclose(parts[:, [0, 1, 2, 2], [1, 0, 0, 1]], 0, atol=1e-5)


def test_shears_and_translations() -> None:
    shears = linear_parts(only(shear=0.2))
    assert -0.2 <= shears[:, 1, 0].min() < -0.19 and 0.19 < shears[:, 1, 0].max() <= 0.2
    shears[:, 1, 0] = 0
    np.testing.assert_allclose(shears, np.broadcast_to([[1, 0], [0, 1], [0, 0]], (300, 3, 2)), atol=1e-5)
    moves = linear_parts(only(translation=0.25))
    assert (np.abs(moves[:, 2]).max(axis=0) <= 0.25 + 1e-5).all() and (np.abs(moves[:, 2]).max(axis=0) > 0.24).all()
    np.testing.assert_allclose(moves[:, :2], np.broadcast_to(np.eye(2), (300, 2, 2)), atol=1e-5)


def test_perspective_tilts() -> None:
    """p -> p / (1 + t . p)."""
    pairs = WarpPairs(ramps(), (6, 10))
    places, grid = frames(pairs.sample(200, only(perspective=0.2))).flatten(1, 2).numpy(), pairs.grid.numpy()
    tilt = np.linalg.pinv(grid) @ (grid[:, :1] / places[:, :, :1] - 1)  # (200, 2, 1)
    np.testing.assert_allclose(places, grid / (1 + grid @ tilt), atol=1e-5)
    assert 0.19 < np.abs(tilt).max() <= 0.2 + 1e-5


def test_bends_have_their_standard_deviation() -> None:
    pairs = WarpPairs(ramps(), (12, 16))
    moved = frames(pairs.sample(300, only(bend=0.06))).flatten(1, 2) - pairs.grid
    knots = np.einsum("kp,npc->nkc", np.linalg.pinv(pairs.spline.numpy()), moved.numpy())
    assert knots.std() == pytest.approx(0.06 / math.sqrt(3), rel=0.05)  # times an amount uniform in [0, 1]
    amounts = knots.std(axis=(1, 2))
    assert amounts.min() < 0.006 and 0.05 < amounts.max() < 0.09


def test_towards_another_range() -> None:
    assert MILD.towards(HARD, 0) == MILD.towards(HARD, -3) == MILD
    assert vars(MILD.towards(HARD, 1)) == pytest.approx(vars(HARD))
    assert vars(MILD.towards(HARD, 2)) == pytest.approx(vars(HARD))
    halfway = MILD.towards(HARD, 0.5)
    assert (halfway.rotation, halfway.scale) == (20, 1.375)


# The thin-plate spline


def knots() -> Tensor:
    line = torch.tensor([-1, -1 / 3, 1 / 3, 1], dtype=torch.float64)
    return torch.stack((line.repeat(4), line.repeat_interleave(4)), dim=1)


def test_the_spline_passes_through_its_control_points() -> None:
    torch.testing.assert_close(warps._spline(knots()), torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_spline_keeps_affine_maps_and_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    points, centres = rng.uniform(-1, 1, (20, 2)), knots().numpy()
    matrix = warps._spline(torch.from_numpy(points)).numpy()
    affine, offset = rng.normal(size=(2, 2)), rng.normal(size=2)
    np.testing.assert_allclose(matrix @ (centres @ affine + offset), points @ affine + offset, atol=1e-12)

    # f(p) = sum_k w_k U(|p - k|) + a + b . p, U(r) = r^2 log r, with sum w = sum w k = 0 and f(k) = heights
    def radial(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        r = np.linalg.norm(a[:, None] - b[None], axis=2)
        return r**2 * np.log(np.where(r > 0, r, 1))

    heights = rng.normal(size=16)
    flat = np.concatenate((np.ones((16, 1)), centres), axis=1)
    system = np.block([[radial(centres, centres), flat], [flat.T, np.zeros((3, 3))]])
    weights = np.linalg.solve(system, np.concatenate((heights, np.zeros(3))))
    wanted = radial(points, centres) @ weights[:16] + weights[16] + points @ weights[17:]
    np.testing.assert_allclose(matrix @ heights, wanted, atol=1e-10)


# Random numbers


def equal(one: WarpBatch, other: WarpBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_same_seed_gives_the_same_pairs() -> None:
    torch.manual_seed(1)
    first, again, other = (WarpPairs(ramps(), SIZE, seed) for seed in (4, 4, 5))
    one = first.sample(2)
    torch.manual_seed(2)  # not from the global generator
    assert equal(one, again.sample(2))
    assert not equal(one, other.sample(2)) and not equal(one, first.sample(2))


def test_goes_on_from_a_state() -> None:
    pairs = WarpPairs(ramps(), SIZE)
    pairs.sample(2)
    state = pairs.state()
    wanted = [pairs.sample(2), pairs.sample(3)]
    other = WarpPairs(ramps(), SIZE, seed=9)
    other.set_state(state)
    assert equal(other.sample(2), wanted[0]) and equal(other.sample(3), wanted[1])


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 1, 8, 8), (3, 8, 8), (2, 3, 0, 8), (2, 8, 8, 3)])
def test_photographs_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as refused:
        WarpPairs(torch.zeros(shape, dtype=torch.uint8), SIZE)
    assert str(refused.value) == f"photos must have shape (N, 3, H, W) with N at least 2, got {shape}"


def test_photographs_of_another_dtype() -> None:
    with pytest.raises(TypeError, match=r"photos must be uint8, got torch\.float32"):
        WarpPairs(torch.zeros(2, 3, 8, 8), SIZE)
