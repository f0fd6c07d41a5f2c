"""`Match` in numbers that can be worked out by hand, its errors, and its files."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lpmflow.flowfile import read_flo
from lpmflow.result import Match

SOURCE, TARGET = (40, 60), (33, 25)


def make(
    grid_flow: np.ndarray | None = None, source: np.ndarray | None = None, target: np.ndarray | None = None
) -> Match:
    rng = np.random.default_rng(3)
    return Match(
        source=rng.integers(0, 256, (*SOURCE, 3), dtype=np.uint8) if source is None else source,
        target=rng.integers(0, 256, (*TARGET, 3), dtype=np.uint8) if target is None else target,
        grid_flow=np.zeros((2, 16, 24), np.float32) if grid_flow is None else grid_flow,
        grid_confidence=rng.random((4, 6), dtype=np.float32),
        grid_foreground=rng.random((2, 3), dtype=np.float32),
    )


def constant(x: float, y: float) -> np.ndarray:
    return np.broadcast_to(np.array([x, y], np.float32)[:, None, None], (2, 16, 24)).copy()


def test_shapes_dtypes_and_sizes():
    match = make()
    assert (match.src_size, match.tgt_size) == (SOURCE, TARGET)
    assert (match.flow.shape, match.flow.dtype) == ((*SOURCE, 2), np.float32)
    assert (match.confidence.shape, match.confidence.dtype) == (SOURCE, np.float32)
    assert (match.foreground.shape, match.foreground.dtype) == (SOURCE, np.float32)
    assert (match.warp().shape, match.warp().dtype) == ((*SOURCE, 3), np.uint8)
    assert repr(match) == "Match(src_size=(40, 60), tgt_size=(33, 25))"


def test_arrays_are_computed_once():
    match = make()
    assert match.flow is match.flow and match.confidence is match.confidence and match.foreground is match.foreground


def test_the_fields_are_frozen_and_the_match_travels():
    match = make(constant(1, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        match.grid_flow = None
    again = pickle.loads(pickle.dumps(match))
    np.testing.assert_array_equal(again.flow, match.flow)


def test_zero_flow_between_equal_sizes_is_the_identity(photo):
    match = make(source=photo, target=photo)
    assert not match.flow.any()
    np.testing.assert_array_equal(match.warp(), photo)
    points = [(0, 0), (12.25, 7.75), (59.5, 39.5), (-0.5, -0.5)]
    np.testing.assert_allclose(match.transfer(points), points, atol=1e-12)


def test_zero_flow_between_different_sizes_is_the_change_of_size():
    """The corners of the source's area land on the corners of the target's."""
    match = make()
    moved = match.transfer([(-0.5, -0.5), (59.5, 39.5), (29.5, 19.5)])
    np.testing.assert_allclose(moved, [(-0.5, -0.5), (24.5, 32.5), (12, 16)], atol=1e-12)
    np.testing.assert_allclose(match.flow[0, 0], [0.5 * 25 / 60 - 0.5, 0.5 * 33 / 40 - 0.5], atol=1e-6)


def test_a_shift_in_cells_is_a_shift_in_target_pixels():
    match = make(constant(3, -2))
    expected = [29.5 * 25 / 60 + 0.5 * 25 / 60 - 0.5 + 3 * 25 / 24, 10.5 * 33 / 40 - 0.5 - 2 * 33 / 16]
    np.testing.assert_allclose(match.transfer([(29.5, 10)])[0], expected, atol=1e-6)


def test_a_flip_shows_the_image_mirrored(photo):
    """The grid's mirror image; the outer half cells, where the flow is clamped, are left out."""
    u = np.arange(24, dtype=np.float32)
    flow = np.stack((np.broadcast_to(23 - 2 * u, (16, 24)), np.zeros((16, 24), np.float32))).copy()
    match = make(flow, photo, photo)
    inside = slice(1, 59)
    np.testing.assert_allclose(
        match.flow[:, inside, 0], np.broadcast_to(59 - 2 * np.arange(1, 59), (40, 58)), atol=1e-4
    )
    np.testing.assert_array_equal(match.warp()[:, inside], photo[:, ::-1][:, inside])
    np.testing.assert_allclose(match.transfer([(10.25, 5)]), [(48.75, 5)], atol=1e-5)


def test_transfer_at_whole_pixels_is_the_flow():
    flow = np.random.default_rng(0).normal(size=(2, 16, 24)).astype(np.float32)
    match = make(flow)
    points = np.array([(0, 0), (59, 39), (17, 5)])
    expected = points + match.flow[points[:, 1], points[:, 0]]
    np.testing.assert_allclose(match.transfer(points), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda p: np.array(p, np.float16)])
def test_transfer_takes_any_array(kind):
    found = make().transfer(kind([[1, 2], [3, 4]]))
    assert found.shape == (2, 2) and found.dtype == np.float64
    np.testing.assert_allclose(found[0], [1.5 * 25 / 60 - 0.5, 2.5 * 33 / 40 - 0.5])


@pytest.mark.parametrize("points", [[], np.zeros((0, 2)), torch.zeros(0, 2)])
def test_no_points_is_no_result(points):
    assert make().transfer(points).shape == (0, 2)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([1, 2], r"points must have shape \(N, 2\), one \(x, y\) a row, got \(2,\)"),
        ([[1, 2, 3]], r"got \(1, 3\)"),
        (np.zeros((0, 3)), r"got \(0, 3\)"),
        ([[1, 2], [3]], r"points must have shape \(N, 2\), one \(x, y\) a row"),
        (3, r"got \(\)"),
        ([[np.nan, 0]], "points must be finite"),
        ([[0, np.inf]], "points must be finite"),
        ([[0, 0], [59.6, 0]], r"points\[1\] must lie inside the source image, x from -0.5 to 59.5 .* got \(59.6, 0\)"),
        ([[0, -0.51]], r"points\[0\] must lie inside .* y from -0.5 to 39.5, got \(0, -0.51\)"),
    ],
)
def test_points_that_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        make().transfer(points)


@pytest.mark.parametrize("points", [[["a", "b"]], [[True, False]], [[1j, 2]], None, [[None, 1]]])
def test_points_that_are_no_numbers(points):
    with pytest.raises(TypeError, match="points must be real numbers"):
        make().transfer(points)


def test_confidence_and_foreground_are_the_grids_resized_bilinearly():
    match = make()
    for found, grid in ((match.confidence, match.grid_confidence), (match.foreground, match.grid_foreground)):
        expected = F.interpolate(torch.from_numpy(grid)[None, None], SOURCE, mode="bilinear")[0, 0]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert found.min() >= 0 and found.max() <= 1


def test_warp_outside_the_target_repeats_its_border(photo):
    match = make(constant(240, 0), photo, photo)
    np.testing.assert_array_equal(match.warp(), np.repeat(photo[:, -1:], 60, axis=1))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_sources_and_targets(size, tmp_path):
    thin = np.zeros((*size, 3), np.uint8)
    for match in (make(constant(0.1, 0), source=thin), make(constant(0.1, 0), target=thin)):
        assert match.flow.shape == (*match.src_size, 2) and np.isfinite(match.flow).all()
        assert match.warp().shape == (*match.src_size, 3)
        match.save(tmp_path / "a.png")


def test_save_npz(tmp_path):
    match = make(constant(1, 2))
    match.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as stored:
        assert sorted(stored) == ["confidence", "flow", "foreground", "src_size", "tgt_size"]
        np.testing.assert_array_equal(stored["flow"], match.flow)
        np.testing.assert_array_equal(stored["confidence"], match.confidence)
        np.testing.assert_array_equal(stored["foreground"], match.foreground)
        assert (tuple(stored["src_size"]), tuple(stored["tgt_size"])) == (SOURCE, TARGET)


def test_save_flo_and_png(tmp_path):
    from PIL import Image

    match = make(constant(1, 2))
    match.save(str(tmp_path / "a.FLO"))
    np.testing.assert_array_equal(read_flo(tmp_path / "a.FLO"), match.flow)
    match.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.FLO", "a.png"]


def test_save_refuses_other_extensions_and_folders(tmp_path):
    match = make()
    for name in ("a.jpg", "a", ".png"):
        with pytest.raises(ValueError, match=r"path must end in \.png, \.npz or \.flo, got "):
            match.save(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="path must name a file in an existing folder"):
        match.save(tmp_path / "none" / "a.png")
    with pytest.raises(TypeError, match="path must be a str, bytes or os.PathLike, got NoneType"):
        match.save(None)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("old")
    monkeypatch.setattr(Match, "plot", lambda self, points: (_ for _ in ()).throw(RuntimeError("no picture")))
    with pytest.raises(RuntimeError, match="no picture"):
        make().save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"] and path.read_text() == "old"


def test_shrunk_is_the_same_match_between_smaller_images():
    flow = np.random.default_rng(0).normal(size=(2, 16, 24)).astype(np.float32)
    match = make(flow)
    small = match.shrunk(30)
    assert (small.src_size, small.tgt_size) == ((20, 30), (30, 23))
    moved = match.transfer([(29.5, 19.5)])[0]
    found = small.transfer([(14.5, 9.5)])[0]
    np.testing.assert_allclose((found + 0.5) / (23, 30), (moved + 0.5) / (25, 33), atol=1e-9)
    assert make().shrunk(60).src_size == SOURCE


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("source", np.zeros((4, 5, 3)), r"source must be \(H, W, 3\) uint8 with no side 0, got \(4, 5, 3\) float64"),
        ("target", np.zeros((0, 5, 3), np.uint8), "target must be"),
        ("grid_flow", np.zeros((4, 5, 2), np.float32), r"grid_flow must have shape \(2, gh, gw\)"),
        ("grid_confidence", np.zeros((1, 4, 5), np.float32), r"grid_confidence must have shape \(h, w\)"),
        ("grid_foreground", np.zeros((4, 0), np.float32), r"grid_foreground must have shape \(h, w\)"),
    ],
)
def test_fields_of_another_shape_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make(), **{field: value})
