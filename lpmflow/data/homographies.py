"""Photographs of one flat or distant scene and the homographies between them, in the layout of HPatches.

1.png 2.png ... (or .ppm, .jpg)     the photographs
H_1_2 H_1_3 ...                     (or H_1_2.txt) 3 x 3 numbers: pixel of photograph 1 -> pixel of photograph k
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_IMAGES = (".png", ".ppm", ".jpg", ".jpeg")


@dataclass(frozen=True, eq=False)
class HomographyPair:
    """The first photograph of a sequence and another of it."""

    name: str
    source: Path
    target: Path
    homography: NDArray[np.float64]
    """(3, 3): source pixel (x, y, 1) -> target pixel, up to a factor; pixel centres are integers."""

    def transfer(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Source pixels (..., 2) as target pixels, the truth; float64, NaN for what the second camera has behind it.

        That is where the homography's third coordinate has another sign than at the first pixel, (0, 0).
        """
        moved = points @ self.homography[:, :2].T + self.homography[:, 2]
        depth = moved[..., 2:] * np.sign(self.homography[2, 2] or 1.0)
        return np.where(depth > 0, moved[..., :2] / np.where(depth > 0, moved[..., 2:], 1.0), np.nan)


def load_homographies(folder: str | os.PathLike[str]) -> list[HomographyPair]:
    """The pairs 1-2, 1-3, ... of one sequence; images are not opened.

    Raises FileNotFoundError when there is no homography or an image is missing, ValueError naming a file that does
    not hold 3 x 3 finite numbers.
    """
    root = Path(folder)
    found = {}
    for file in root.glob("H_1_*") if root.is_dir() else ():
        number = re.fullmatch(r"H_1_(\d+)(\.txt)?", file.name)
        if number:
            found[int(number[1])] = file
    if not found:
        raise FileNotFoundError(
            f"folder must hold files H_1_2, H_1_3, ... in the layout of HPatches, got {str(root)!r}"
        )
    first = _image(root, 1)
    return [
        HomographyPair(f"{root.name} 1-{number}", first, _image(root, number), _homography(found[number]))
        for number in sorted(found)
    ]


def _image(root: Path, number: int) -> Path:
    for suffix in _IMAGES:
        if (root / f"{number}{suffix}").is_file():
            return root / f"{number}{suffix}"
    raise FileNotFoundError(f"{root} has no photograph {number}{_IMAGES[0]} (or {', '.join(_IMAGES[1:])})")


def _homography(file: Path) -> NDArray[np.float64]:
    try:
        matrix = np.array(file.read_text(encoding="utf-8").split(), dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{file} must hold 3 x 3 numbers: {error}") from error
    if matrix.size != 9 or not np.isfinite(matrix).all():
        raise ValueError(f"{file} must hold 3 x 3 finite numbers, got {matrix.size} values")
    return matrix.reshape(3, 3)
