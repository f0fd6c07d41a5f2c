"""Masks of objects, from an image file or an outline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def read_mask(mask: Path | NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask of a `KeypointPair` as (height, width) bool, True on the object; `size` is its photograph's.

    A file must be an image of that size; what is not 0 is the object. An outline (M, 2), (x, y) with M at least 3, is
    closed and holds the pixels whose centre lies inside it, by the even-odd rule; what lies beyond the border is cut
    off. Raises FileNotFoundError, OSError for a file that is no image, ValueError for another size or shape, for an
    outline that is not finite, and for a mask without a pixel.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be (height, width) of at least one pixel, got {size}")
    if isinstance(mask, np.ndarray):
        found, what = _inside(mask, height, width), f"the outline {mask.tolist()[:3]}..."
    else:
        found, what = _from_file(Path(mask), height, width), str(mask)
    if not found.any():
        raise ValueError(f"mask must cover at least one pixel of {width} x {height}, which {what} does not")
    return found


def _from_file(path: Path, height: int, width: int) -> NDArray[np.bool_]:
    if not path.is_file():
        raise FileNotFoundError(f"mask must be an image file, but there is no file {str(path)!r}")
    from PIL import Image

    try:
        with Image.open(path) as opened:
            values = np.atleast_3d(np.asarray(opened))
            colours = [band != "A" for band in opened.getbands()]
    except Exception as error:
        raise OSError(f"mask must be an image file, but {str(path)!r} cannot be decoded: {error}") from error
    if values.shape[:2] != (height, width):
        raise ValueError(
            f"{path} must be {width} x {height}, as its photograph is, got {values.shape[1]} x {len(values)}"
        )
    return np.asarray((values[..., colours] != 0).any(axis=-1))


def _inside(outline: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """Even-odd rule, a row of pixel centres at a time: a centre is inside when odd edges cross the row left of it."""
    if outline.ndim != 2 or outline.shape[1] != 2 or len(outline) < 3 or not np.isfinite(outline).all():
        raise ValueError(f"mask must be an outline of finite (x, y), shape (M, 2) with M >= 3, got {outline.shape}")
    x1, y1 = outline.T
    x2, y2 = np.roll(outline, -1, axis=0).T
    columns = np.arange(width)
    found = np.zeros((height, width), dtype=bool)
    for row in range(height):
        crossed = (y1 > row) != (y2 > row)
        at = x1[crossed] + (row - y1[crossed]) * (x2 - x1)[crossed] / (y2 - y1)[crossed]
        found[row] = np.searchsorted(np.sort(at), columns, side="right") % 2 == 1
    return found
