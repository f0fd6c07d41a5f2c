"""Image pairs with keypoints in the layout of SPair-71k, the data set's own or any folder arranged like it.

    Layout/large/{trn,val,test}.txt                 one pair a line, NUMBER-SOURCE-TARGET:category
    PairAnnotation/{split}/NUMBER-SOURCE-TARGET:category.json    (or _category.json)
    JPEGImages/category/IMAGE.jpg

Coordinates in the files are 0-based pixels with the centre of the top left pixel at (0, 0), as in `lpmflow.geometry`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLITS = ("trn", "val", "test")


@dataclass(frozen=True, eq=False)
class KeypointPair:
    """Two photographs of objects of one category, and points that lie on the same part of both."""

    name: str
    category: str
    source: Path
    target: Path
    source_points: NDArray[np.float64]
    """(N, 2), (x, y) in pixels of the source."""
    target_points: NDArray[np.float64]
    """(N, 2), (x, y) in pixels of the target; the same points in the same order."""
    source_box: NDArray[np.float64]
    """(4,): x1, y1, x2, y2 of the object, in pixels."""
    target_box: NDArray[np.float64]
    source_size: tuple[int, int] | None = None
    """(height, width) the annotation was made at, where it says so."""
    target_size: tuple[int, int] | None = None


def load_spair(root: str | os.PathLike[str], split: str) -> list[KeypointPair]:
    """The pairs of a split, "trn", "val" or "test", in the order of the layout file; images are not opened.

    Raises ValueError for an unknown split; FileNotFoundError when the layout file, an annotation or an image is not
    there; ValueError naming the file when one is not as the layout says. Nothing is skipped.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    folder = Path(root)
    layout = folder / "Layout" / "large" / f"{split}.txt"
    if not layout.is_file():
        raise FileNotFoundError(f"root must be a folder in the layout of SPair-71k, but there is no {layout}")
    try:
        names = [line.strip() for line in layout.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{layout} must be text: {error}") from error
    if not names:
        raise ValueError(f"{layout} lists no pair")
    for name in names:
        if ":" not in name:
            raise ValueError(f"{layout} must list NUMBER-SOURCE-TARGET:category, got {name!r}")
    return [_pair(folder, split, name) for name in names]


def _pair(root: Path, split: str, name: str) -> KeypointPair:
    stem, _, category = name.rpartition(":")
    folder = root / "PairAnnotation" / split
    # Windows allows no colon in a file name, and some copies of the data set avoid it.
    files = [folder / f"{name}.json", folder / f"{stem}_{category}.json"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"pair {name!r} of split {split!r} has no annotation {files[0]}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        source_points, target_points = (_array(fields, key, (-1, 2)) for key in ("src_kps", "trg_kps"))
        source_box, target_box = (_box(fields, key) for key in ("src_bndbox", "trg_bndbox"))
        sizes = [_size(fields, key) for key in ("src_imsize", "trg_imsize")]
        source, target = (root / "JPEGImages" / category / fields[key] for key in ("src_imname", "trg_imname"))
    except (ValueError, KeyError, TypeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file}: {what}") from error
    if len(source_points) != len(target_points) or not len(source_points):
        raise ValueError(
            f"{file}: src_kps and trg_kps must be equally many and at least one, got {len(source_points)} and "
            f"{len(target_points)}"
        )
    for image in (source, target):
        if not image.is_file():
            raise FileNotFoundError(f"{file}: there is no image {image}")
    return KeypointPair(name, category, source, target, source_points, target_points, source_box, target_box, *sizes)


def _array(fields: dict[str, Any], key: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    values = np.array(fields[key], dtype=np.float64)
    if values.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, values.shape, strict=True)):
        wanted = ", ".join("N" if side == -1 else str(side) for side in shape)
        raise ValueError(f"{key} must be numbers of shape ({wanted}), got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{key} must be finite")
    return values


def _box(fields: dict[str, Any], key: str) -> NDArray[np.float64]:
    box = _array(fields, key, (4,))
    if not (box[:2] < box[2:]).any():
        raise ValueError(f"{key} must be x1, y1, x2, y2 with x1 < x2 or y1 < y2, got {box.tolist()}")
    return box


def _size(fields: dict[str, Any], key: str) -> tuple[int, int] | None:
    """(height, width) of an image whose annotation says [width, height, channels]; None where it does not."""
    if key not in fields:
        return None
    width, height, _ = _array(fields, key, (3,)).astype(int).tolist()
    return height, width
