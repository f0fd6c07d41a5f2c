"""PF-PASCAL: pairs of photographs of the 20 PASCAL classes with points and boxes.

    {trn,val,test}_pairs.csv                  source_image, target_image, class 1..20, and for trn a flip flag, 0 or 1
                                              (read where a list for val or test has one too)
    JPEGImages/2008_006325.jpg                the photographs
    Annotations/aeroplane/2008_006325.mat     kps (n, 2), NaN where a point is not labelled, and bbox (1, 4)

The lists are also found under the names {train,val,test}_pairs_pf_pascal.csv, whose further columns, points once more,
are not read. A pair has the points labelled in both photographs, numbered by their row in `kps`; where one list of
rows is shorter its missing rows are not labelled, nor is a row with one number and one NaN: so the evaluations that use
this set have it. A flip flag of 1 wants both photographs mirrored (`KeypointPair.flip`).

Coordinates are taken as 0-based pixels, as they stand. The set's authors mark and evaluate in MATLAB, whose first pixel
is 1, but every later evaluation reads the numbers as 0-based, and this reader does too, lest its figures be those of no
paper; source and target shift alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpmflow.data.files import Row, find_file, naming, read_table
from lpmflow.data.matfile import read_mat
from lpmflow.data.pairs import KeypointPair, Layout, is_box

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_LISTS = {
    "trn": ("trn_pairs.csv", "train_pairs_pf_pascal.csv", "trn_pairs_pf_pascal.csv"),
    "val": ("val_pairs.csv", "val_pairs_pf_pascal.csv"),
    "test": ("test_pairs.csv", "test_pairs_pf_pascal.csv"),
}


def _list(root: Path, split: str) -> Path | None:
    return next((root / name for name in _LISTS[split] if (root / name).is_file()), None)


def _present(root: Path) -> list[str]:
    # PF-WILLOW's list has the same name, but no annotations beside it
    return [split for split in _LISTS if _list(root, split) is not None] if (root / "Annotations").is_dir() else []


def _records(root: Path, split: str) -> list[Callable[[], KeypointPair]]:
    file = _list(root, split)
    if file is None:
        raise FileNotFoundError(
            f"root must be a folder in the layout of PF-PASCAL, but there is no {root / _LISTS[split][0]}"
        )
    return [functools.partial(_pair, root, split, number, row) for number, row in enumerate(read_table(file), 1)]


def _pair(root: Path, split: str, number: int, row: Row) -> KeypointPair:
    row.require(3, 4, 7)
    category = _category(row)
    source, target = (find_file(root, f"JPEGImages/{Path(name).name}", str(row)) for name in row.fields[:2])
    (source_rows, source_box), (target_rows, target_box) = (
        _annotation(root, category, image.stem, row) for image in (source, target)
    )
    count = min(len(source_rows), len(target_rows))
    labelled = np.isfinite(source_rows[:count]).all(axis=1) & np.isfinite(target_rows[:count]).all(axis=1)
    flip = _flip(row) if split == "trn" or len(row.fields) == 4 else False
    name = f"{number:06d}-{source.stem}-{target.stem}:{category}"
    with naming(row):
        if not labelled.any():
            raise ValueError(f"{source.stem} and {target.stem} must have a point of {category} in common")
        return KeypointPair(
            name,
            category,
            source,
            target,
            source_rows[:count][labelled],
            target_rows[:count][labelled],
            source_box,
            target_box,
            point_ids=np.flatnonzero(labelled),
            flip=flip,
            target_visible=np.flatnonzero(np.isfinite(target_rows).all(axis=1)),
        )


def _category(row: Row) -> str:
    number = row.numbers(row.fields[2:3], "the class").item()
    if number not in range(1, len(CLASSES) + 1):
        raise ValueError(f"{row}: the class must be a whole number from 1 to {len(CLASSES)}, got {row.fields[2]!r}")
    return CLASSES[int(number) - 1]


def _flip(row: Row) -> bool:
    if len(row.fields) != 4:
        raise ValueError(f"{row}: must have a flip flag as its fourth field, as lists of training pairs do")
    if row.fields[3] not in ("0", "1", "0.0", "1.0"):
        raise ValueError(f"{row}: the flip flag must be 0 or 1, got {row.fields[3]!r}")
    return row.fields[3].startswith("1")


def _annotation(root: Path, category: str, stem: str, row: Row) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Every row of `kps` (n, 2), and the box (4,)."""
    file = root / "Annotations" / category / f"{stem}.mat"
    if not file.is_file():
        raise FileNotFoundError(f"{row}: there is no annotation {file}")
    points, box = read_mat(file, "kps", "bbox")
    if points.shape[1] != 2:
        raise ValueError(f"{file}: kps must have shape (n, 2), got {points.shape}")
    if np.isinf(points).any():
        raise ValueError(f"{file}: kps must be finite, or NaN where a point is not labelled")
    if box.size != 4 or not np.isfinite(box).all():
        raise ValueError(f"{file}: bbox must be four finite numbers, got shape {box.shape}")
    corners = box.reshape(4)
    if not is_box(corners):
        raise ValueError(
            f"{file}: bbox must be x1, y1, x2, y2 with x1 <= x2, y1 <= y2, and not a point, got {corners.tolist()}"
        )
    return points, corners


LAYOUT = Layout("pf-pascal", "PF-PASCAL", ("trn", "val", "test"), _present, _records)
