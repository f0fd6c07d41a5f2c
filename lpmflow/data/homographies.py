"""Photographs of one flat or distant scene and the homographies between them, in the layout of HPatches.

    v_dogman/1.ppm v_dogman/2.ppm ...     (or .png, .jpg) the photographs of a sequence
    v_dogman/H_1_2 v_dogman/H_1_3 ...     (or H_1_2.txt) 3 x 3 numbers: pixel of photograph 1 -> pixel of photograph k

A folder is one such sequence, or holds them.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpmflow.data.files import require_folder

Truth = tuple[NDArray[np.float64], NDArray[np.bool_]]
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

    def truth(self, source_size: tuple[int, int], target_size: tuple[int, int]) -> Truth:
        """(H, W, 2) float64 flow in pixels and (H, W) bool where the target shows it, for photographs of these sizes.

        Raises ValueError naming both photographs when the target shows no pixel of the source.
        """
        height, width = source_size
        pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float64)
        moved = self.transfer(pixels)
        seen = ((moved >= -0.5) & (moved <= (target_size[1] - 0.5, target_size[0] - 0.5))).all(axis=-1)
        if not seen.any():
            raise ValueError(f"{self.name}: no pixel of {self.source} lies in {self.target} by its homography")
        return moved - pixels, np.asarray(seen)


def load_homographies(root: str | os.PathLike[str]) -> list[HomographyPair]:
    """The pairs 1-2, 1-3, ... of a sequence, or of every sequence in a folder by name; images are not opened.

    Raises FileNotFoundError or NotADirectoryError when there is no such folder, no homography, or an image is missing;
    ValueError naming a file that does not hold 3 x 3 finite numbers.
    """
    return [read() for read in homography_records(root)]


def homography_records(root: str | os.PathLike[str]) -> list[Callable[[], HomographyPair]]:
    """The pairs of `load_homographies`, each read when called, which raises for what is wrong with it alone."""
    folder = require_folder(root)
    folders = [folder] if homography_files(folder) else [one for one in sorted(folder.iterdir()) if one.is_dir()]
    found: list[Callable[[], HomographyPair]] = [
        functools.partial(_pair, one, number, file) for one in folders for number, file in homography_files(one).items()
    ]
    if not found:
        raise FileNotFoundError(
            f"root must hold files H_1_2, H_1_3, ... in the layout of HPatches, or folders that do, got {str(root)!r}"
        )
    return found


def _pair(folder: Path, number: int, file: Path) -> HomographyPair:
    images = numbered_photograph(folder, 1), numbered_photograph(folder, number)
    return HomographyPair(f"{folder.resolve().name} 1-{number}", *images, _homography(file))


def homography_files(folder: Path) -> dict[int, Path]:
    """k -> the file H_1_k, in the order of k; empty when the folder is no sequence."""
    found = {}
    for file in folder.glob("H_1_*"):
        if number := re.fullmatch(r"H_1_(\d+)(\.txt)?", file.name):
            found[int(number[1])] = file
    return dict(sorted(found.items()))


def numbered_photograph(root: Path, number: int) -> Path:
    """The photograph called by its number; FileNotFoundError when there is none."""
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
