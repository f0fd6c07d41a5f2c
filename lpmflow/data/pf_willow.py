"""PF-WILLOW: 900 ordered pairs within 10 sub-classes of cars, ducks, motorbikes and wine bottles, 10 points each.

    test_pairs.csv (or test_pairs_pf.csv)    imageA, imageB, XA1..XA10, YA1..YA10, XB1..XB10, YB1..YB10
    car(G)/Cars_006a.jpg                     the photographs, by sub-class

There are no boxes: the protocols of this set take an object's extent from its points. Its authors' own code (MATLAB)
reads the coordinates as 1-based pixels, every later evaluation as 0-based ones, and so does this reader, lest its
figures be those of no paper; source and target shift alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lpmflow.data.files import Row, find_file, naming, read_table
from lpmflow.data.pairs import KeypointPair, Layout

_POINTS = 10


def _list(root: Path) -> Path | None:
    """The list of pairs by either of its names, when it is one of this set: PF-PASCAL's is called the same."""
    files = [root / name for name in ("test_pairs.csv", "test_pairs_pf.csv")]
    return next((file for file in files if file.is_file() and _is_ours(file)), None)


def _is_ours(file: Path) -> bool:
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        return lines.readline().count(",") == 4 * _POINTS + 1


def _present(root: Path) -> list[str]:
    return ["test"] if _list(root) is not None else []


def _records(root: Path, split: str) -> list[Callable[[], KeypointPair]]:
    file = _list(root)
    if file is None:
        raise FileNotFoundError(
            f"root must be a folder in the layout of PF-WILLOW, but there is no {root / 'test_pairs.csv'} "
            f"with {4 * _POINTS + 2} columns"
        )
    return [functools.partial(_pair, root, number, row) for number, row in enumerate(read_table(file), 1)]


def _pair(root: Path, number: int, row: Row) -> KeypointPair:
    row.require(4 * _POINTS + 2)
    source, target = (find_file(root, name, str(row)) for name in row.fields[:2])
    coordinates = row.numbers(row.fields[2:], "coordinates").reshape(2, 2, _POINTS)
    category = source.parent.name
    name = f"{number:06d}-{source.stem}-{target.stem}:{category}"
    with naming(row):
        if target.parent.name != category:
            raise ValueError(f"both images must be of one sub-class, got {row.fields[0]!r} and {row.fields[1]!r}")
        # columns hold all x of a photograph before all y
        source_points, target_points = (np.ascontiguousarray(one.T) for one in coordinates)
        ids = np.arange(_POINTS)
        return KeypointPair(name, category, source, target, source_points, target_points, point_ids=ids)


LAYOUT = Layout("pf-willow", "PF-WILLOW", ("test",), _present, _records)
