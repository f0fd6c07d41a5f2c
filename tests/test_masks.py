"""Masks from outlines, against scikit-image's point-in-polygon test and known areas, and from image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.measure import points_in_poly

from lpmflow.data import read_mask

SQUARE = np.array([[1.5, 0.5], [4.5, 0.5], [4.5, 3.5], [1.5, 3.5]])


def test_a_square_holds_the_centres_inside() -> None:
    wanted = np.zeros((6, 7), dtype=bool)
    wanted[1:4, 2:5] = True
    np.testing.assert_array_equal(read_mask(SQUARE, (6, 7)), wanted)
    np.testing.assert_array_equal(read_mask(SQUARE[::-1], (6, 7)), wanted)
    np.testing.assert_array_equal(read_mask(np.roll(SQUARE, 2, axis=0), (6, 7)), wanted)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (17, 97), (60, 40)])
def test_any_outline(seed: int, size: tuple[int, int]) -> None:
    """Self-crossing ones too, and parts beyond the border."""
    height, width = size
    outline = np.random.default_rng(seed).uniform(-0.2, 1.2, (9, 2)) * (width, height)
    outline = np.concatenate((outline, [[-width, -height]]))
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).reshape(-1, 2)
    wanted = points_in_poly(pixels, outline).reshape(size)
    if wanted.any():
        np.testing.assert_array_equal(read_mask(outline, size), wanted)
    else:
        with pytest.raises(ValueError, match="mask must cover at least one pixel"):
            read_mask(outline, size)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_a_file(tmp_path: Path, mode: str) -> None:
    wanted = np.random.default_rng(0).random((5, 8)) < 0.5
    values = Image.fromarray(wanted.astype(np.uint8) * (1 if mode == "P" else 255))
    if mode == "P":
        values.putpalette([0, 0, 0, 200, 0, 0])
    (values if mode == "P" else values.convert(mode)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", (5, 8)), wanted)


def test_what_is_no_mask(tmp_path: Path) -> None:
    file = tmp_path / "mask.png"
    with pytest.raises(FileNotFoundError, match="mask must be an image file, but there is no file"):
        read_mask(file, (4, 4))
    file.write_bytes(b"no image")
    with pytest.raises(OSError, match="mask must be an image file, but .* cannot be decoded"):
        read_mask(file, (4, 4))
    Image.new("L", (4, 3), 255).save(file)
    with pytest.raises(ValueError, match=r"mask\.png must be 4 x 4, as its photograph is, got 4 x 3$"):
        read_mask(file, (4, 4))
    Image.new("L", (4, 4), 0).save(file)
    with pytest.raises(ValueError, match=r"mask must cover at least one pixel of 4 x 4, which .*mask\.png does not$"):
        read_mask(file, (4, 4))


@pytest.mark.parametrize("outline", [np.zeros((2, 2)), np.zeros((3, 3)), np.zeros(6), np.full((4, 2), np.nan)])
def test_what_is_no_outline(outline: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"mask must be an outline of finite \(x, y\), shape \(M, 2\) with M >= 3"):
        read_mask(outline, (4, 4))


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 4)])
def test_no_pixels(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"size must be \(height, width\) of at least one pixel"):
        read_mask(SQUARE, size)
