"""Pairs of Caltech-101 with the outlines of the objects, for metrics that transfer masks instead of points.

    test_pairs_caltech_with_category.csv    source_image, target_image, class, XA, YA, XB, YB
    101_ObjectCategories/accordion/image_0001.jpg

XA and YA are the source object's outline, numbers separated by commas or semicolons inside one field, in 0-based pixels
as later evaluations read them. The category is the photograph's folder; the class, a number, says no more. A pair has
no points and no boxes: its outlines are `source_mask` and `target_mask`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpmflow.data.files import Row, find_file, naming, read_table
from lpmflow.data.pairs import KeypointPair, Layout

_NAMES = ("test_pairs_caltech_with_category.csv", "test_pairs_caltech.csv")
_IMAGES = "101_ObjectCategories"


def _list(root: Path) -> Path | None:
    return next((root / name for name in _NAMES if (root / name).is_file()), None)


def _present(root: Path) -> list[str]:
    return ["test"] if _list(root) is not None else []


def _records(root: Path, split: str) -> list[Callable[[], KeypointPair]]:
    file = _list(root)
    if file is None:
        raise FileNotFoundError(
            f"root must be a folder in the layout of Caltech-101 pairs, but there is no {root / _NAMES[0]}"
        )
    return [functools.partial(_pair, root, number, row) for number, row in enumerate(read_table(file), 1)]


def _pair(root: Path, number: int, row: Row) -> KeypointPair:
    row.require(7)
    row.numbers(row.fields[2:3], "the class")
    source, target = (_image(root, name, row) for name in row.fields[:2])
    outlines = [_outline(row, *row.fields[first : first + 2]) for first in (3, 5)]
    category = source.parent.name
    name = f"{number:06d}-{source.stem}-{target.stem}:{category}"
    with naming(row):
        if target.parent.name != category:
            raise ValueError(f"both images must be of one category, got {row.fields[0]!r} and {row.fields[1]!r}")
        none = np.empty((0, 2))
        return KeypointPair(
            name, category, source, target, none, none, source_mask=outlines[0], target_mask=outlines[1]
        )


def _image(root: Path, name: str, row: Row) -> Path:
    """Lists name the photographs with or without the folder that holds the categories."""
    return find_file(root, name if _IMAGES in name else f"{_IMAGES}/{'/'.join(Path(name).parts[-2:])}", str(row))


def _outline(row: Row, x: str, y: str) -> NDArray[np.float64]:
    columns = [row.numbers(field.replace(";", ",").strip(",").split(","), "an outline") for field in (x, y)]
    if len(columns[0]) != len(columns[1]) or len(columns[0]) < 3:
        raise ValueError(
            f"{row}: an outline must have as many x as y, at least 3, got {len(columns[0])} and {len(columns[1])}"
        )
    return np.stack(columns, axis=1)


LAYOUT = Layout("caltech-101", "Caltech-101 pairs", ("test",), _present, _records)
