"""Image pairs with ground truth: what every data set is read into, and the one door to all of them.

    for pair in load_pairs("spair", "SPair-71k", "test"):
        pair.source, pair.source_points, pair.target, pair.target_points

A data set is a `Layout`, one file of this folder each. What its authors call a pair becomes a `KeypointPair`, in pixels
of the photographs as they are stored; images are not opened.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpmflow.data.files import require_folder

BEYOND = 0.1
"""How far beyond the border a marked point may lie, as a part of the photograph's longer side."""

DIFFICULTIES = ("viewpoint", "scale", "truncation", "occlusion", "mirror")
"""The keys `KeypointPair.difficulty` may have, those of SPair-71k; higher is harder, up to 2, 2, 3, 3 and 1."""


@dataclass(frozen=True, eq=False)
class KeypointPair:
    """Two photographs of objects of one kind, and what is known to correspond: points, or the objects' masks.

    Points are (x, y) in pixels of the photograph as stored, the centre of the top left pixel at (0, 0). Raises
    ValueError when the arrays do not fit each other, are not finite, or lie too far outside (`require_inside`).
    """

    name: str
    """Unique within its split."""
    category: str
    source: Path
    target: Path
    source_points: NDArray[np.float64]
    """(N, 2), (x, y); a little beyond the border here and there. (0, 2) where the set has masks instead."""
    target_points: NDArray[np.float64]
    """(N, 2): the same points of the object in the same order."""
    source_box: NDArray[np.float64] | None = None
    """(4,): x1, y1, x2, y2 of the object; None where the set has no boxes."""
    target_box: NDArray[np.float64] | None = None
    source_size: tuple[int, int] | None = None
    """(height, width) the annotation was made at, where it says so."""
    target_size: tuple[int, int] | None = None
    point_ids: NDArray[Any] | None = None
    """(N,): which point of its category each is, int64 or names; None where the set does not say."""
    difficulty: Mapping[str, int] = field(default_factory=dict)
    """Some of `DIFFICULTIES`; empty where the set does not say."""
    flip: bool = False
    """Whether the set wants both photographs mirrored left to right; points and boxes are those of the stored ones."""
    source_mask: Path | NDArray[np.float64] | None = None
    """The object: an image file, not 0 where it is, or its outline (M, 2), (x, y); `lpmflow.data.read_mask` reads both.
    None where the set has no masks."""
    target_mask: Path | NDArray[np.float64] | None = None
    target_visible: NDArray[Any] | None = None
    """(M,): every point of its category marked in the target, as `point_ids` and those among them; None where the set
    does not say."""

    def __post_init__(self) -> None:
        for name in ("source_points", "target_points"):
            _require(name, getattr(self, name), (None, 2))
        count = len(self.source_points)
        if len(self.target_points) != count:
            raise ValueError(
                f"source_points and target_points must be equally many, got {count} and {len(self.target_points)}"
            )
        for points, size in (("source_points", self.source_size), ("target_points", self.target_size)):
            if size is not None:
                require_inside(points, getattr(self, points), size)
        for name in ("source_box", "target_box"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), (4,))
        if self.point_ids is not None and np.shape(self.point_ids) != (count,):
            raise ValueError(f"point_ids must have shape ({count},), got {np.shape(self.point_ids)}")
        if self.target_visible is not None and (
            self.point_ids is None or not set(self.point_ids.tolist()) <= set(self.target_visible.tolist())
        ):
            raise ValueError("target_visible must hold every one of point_ids")
        for name in ("source_mask", "target_mask"):
            if isinstance(getattr(self, name), np.ndarray):
                _require(name, getattr(self, name), (None, 2))


@dataclass(frozen=True)
class Layout:
    """How one data set lies on disk."""

    name: str
    title: str
    """What its authors call it."""
    splits: tuple[str, ...]
    present: Callable[[Path], list[str]]
    """The splits that a folder holds; none when it is not in this layout."""
    records: Callable[[Path, str], list[Callable[[], KeypointPair]]]
    """The pairs of a split, each read when called.

    Raises FileNotFoundError or ValueError for what is wrong with the split as a whole; a call raises it for one pair.
    """


_HOMES = {
    "spair": "lpmflow.data.spair",
    "pf-pascal": "lpmflow.data.pf_pascal",
    "pf-willow": "lpmflow.data.pf_willow",
    "caltech-101": "lpmflow.data.caltech",
    "ap-10k": "lpmflow.data.ap10k",
}
BENCHMARKS = tuple(_HOMES)
"""The names `load_pairs` knows. Any folder arranged like SPair-71k is "spair"."""


def layout(benchmark: str) -> Layout:
    """The layout of a data set by name; ValueError when it is none of `BENCHMARKS`."""
    dense = {"hpatches": "load_homographies", "dense": "load_flows"}
    if benchmark in dense:
        raise ValueError(
            f"benchmark must be one whose pairs have keypoints or masks ({', '.join(BENCHMARKS)}), got {benchmark!r}: "
            f"lpmflow.data.{dense[benchmark]} reads its pairs"
        )
    if benchmark not in _HOMES:
        raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {benchmark!r}")
    found: Layout = importlib.import_module(_HOMES[benchmark]).LAYOUT
    return found


def load_pairs(benchmark: str, root: str | os.PathLike[str], split: str) -> list[KeypointPair]:
    """The pairs of a split of a data set in the folder `root`, in the data set's own order; images are not opened.

    Raises ValueError for an unknown benchmark or split, FileNotFoundError when the folder or a file that the layout or
    an annotation names is not there, ValueError naming file and record when one is not as the layout says. Nothing is
    skipped.
    """
    return [read() for read in pair_records(layout(benchmark), root, split)]


def pair_records(found: Layout, root: str | os.PathLike[str], split: str) -> list[Callable[[], KeypointPair]]:
    """The pairs of a split, each read when called; the errors of `load_pairs`."""
    if split not in found.splits:
        raise ValueError(f"split must be {_either(found.splits)}, got {split!r}")
    folder = require_folder(root)
    try:
        return found.records(folder, split)
    except FileNotFoundError as error:
        there = found.present(folder)
        if not there or split in there:
            raise
        raise FileNotFoundError(f"{error}; of the splits it holds {', '.join(there)}") from error


def _either(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def require_inside(name: str, points: NDArray[np.float64], size: tuple[int, int], allowed: float = BEYOND) -> None:
    """ValueError when one of `points` (N, 2) is no point of a photograph of `size` (height, width).

    Points of parts at the very border, marked by hand, lie a little outside here and there; up to `allowed` of the
    longer side is taken for that, more for a mistake.
    """
    far = beyond(points, size) > allowed * max(size)
    if far.any():
        x, y = points[far.argmax()].tolist()
        raise ValueError(
            f"{name}[{far.argmax()}] must lie in the photograph of {size[1]} x {size[0]}, or beyond its border by at "
            f"most {allowed:g} of the longer side, got ({x:g}, {y:g})"
        )


def is_box(corners: NDArray[np.float64]) -> bool:
    """Whether (4,) are x1, y1, x2, y2 of an object: not turned round, and longer than nothing on one side.

    A side of 0 is that of an object one pixel wide, whose last pixel PASCAL's boxes name.
    """
    sides = corners[2:] - corners[:2]
    return bool((sides >= 0).all() and (sides > 0).any())


def beyond(points: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """(N,): how far each point (x, y) lies beyond the border of a photograph of `size`, in pixels; 0 inside."""
    corner = np.array([size[1], size[0]]) - 0.5
    return np.maximum(np.maximum(-0.5 - points, points - corner), 0).max(axis=1, initial=0)


def _require(name: str, array: NDArray[np.float64], shape: tuple[int | None, ...]) -> None:
    found = np.shape(array)
    if len(found) != len(shape) or any(want not in (None, got) for want, got in zip(shape, found, strict=True)):
        wanted = ", ".join("N" if side is None else str(side) for side in shape)
        raise ValueError(f"{name} must have shape ({wanted}{',' if len(shape) == 1 else ''}), got {found}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
