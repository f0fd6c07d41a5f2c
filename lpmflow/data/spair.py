"""Image pairs with keypoints in the layout of SPair-71k, the data set's own or any folder arranged like it.

    Layout/large/{trn,val,test}.txt                 one pair a line, NUMBER-SOURCE-TARGET:category
    PairAnnotation/{split}/NUMBER-SOURCE-TARGET:category.json    (or _category.json)
    JPEGImages/category/IMAGE.jpg

Coordinates in the files are 0-based pixels with the centre of the top left pixel at (0, 0), as in `lpmflow.geometry`.
A folder whose difficulties are not known may say so with `"variation_flags_known": false`; its pairs then have none.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpmflow.data.files import naming, parts_below, read_json, read_text
from lpmflow.data.pairs import KeypointPair, Layout, is_box, load_pairs

_DIFFICULTY = {
    "viewpoint": ("viewpoint_variation", 2),
    "scale": ("scale_variation", 2),
    "truncation": ("truncation", 3),
    "occlusion": ("occlusion", 3),
    "mirror": ("mirror", 1),
}
"""Ours -> the field, and the highest value it has."""


def load_spair(root: str | os.PathLike[str], split: str) -> list[KeypointPair]:
    """The pairs of a split, "trn", "val" or "test", in the order of the layout file; images are not opened.

    Raises ValueError for an unknown split; FileNotFoundError when the layout file, an annotation or an image is not
    there; ValueError naming the file when one is not as the layout says. Nothing is skipped.
    """
    return load_pairs("spair", root, split)


def _present(root: Path) -> list[str]:
    """The splits with a list; beside one, also those whose list is missing though their annotations are there."""
    listed = {split for split in LAYOUT.splits if _list(root, split).is_file()}
    # without any list the annotations are those of another layout
    return [split for split in LAYOUT.splits if listed and (split in listed or _is_annotated(root, split))]


def _is_annotated(root: Path, split: str) -> bool:
    return any((root / "PairAnnotation" / split).glob("*.json"))


def _list(root: Path, split: str) -> Path:
    return root / "Layout" / "large" / f"{split}.txt"


def _records(root: Path, split: str) -> list[Callable[[], KeypointPair]]:
    layout = _list(root, split)
    if not layout.is_file():
        raise FileNotFoundError(f"root must be a folder in the layout of SPair-71k, but there is no {layout}")
    names = [line.strip() for line in read_text(layout).splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{layout} lists no pair")
    return [functools.partial(_pair, root, split, name) for name in names]


def _pair(root: Path, split: str, name: str) -> KeypointPair:
    stem, colon, category = name.rpartition(":")
    if not colon or "/" in name or "\\" in name:
        raise ValueError(f"{_list(root, split)} must list NUMBER-SOURCE-TARGET:category, got {name!r}")
    folder = root / "PairAnnotation" / split
    # Windows allows no colon in a file name, and some copies of the data set avoid it.
    files = [folder / f"{name}.json", folder / f"{stem}_{category}.json"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"pair {name!r} of split {split!r} has no annotation {files[0]}")
    fields = read_json(file)
    with naming(file):
        points = [_array(fields, key, (-1, 2)) for key in ("src_kps", "trg_kps")]
        boxes = [_box(fields, key) for key in ("src_bndbox", "trg_bndbox")]
        sizes = [_size(fields, key) for key in ("src_imsize", "trg_imsize")]
        if fields.get("category", category) != category:
            raise ValueError(f"category must be that of the list, {category}, got {fields['category']!r}")
        images = root / "JPEGImages" / category
        source, target = (
            images.joinpath(*parts_below(images, fields[key], key)) for key in ("src_imname", "trg_imname")
        )
        if source == target:
            raise ValueError(f"src_imname and trg_imname must be two photographs, got {source.name} twice")
        if len(points[0]) != len(points[1]) or not len(points[0]):
            raise ValueError(
                f"src_kps and trg_kps must be equally many and at least one, got {len(points[0])} and {len(points[1])}"
            )
        ids = _ids(fields)
        if ids is not None and len(ids) != len(points[0]):
            raise ValueError(f"kps_ids must be as many as src_kps, {len(points[0])}, got {len(ids)}")
        for image in (source, target):
            if not image.is_file():
                raise FileNotFoundError(f"{file}: there is no image {image}")
        return KeypointPair(
            name,
            category,
            source,
            target,
            points[0],
            points[1],
            source_box=boxes[0],
            target_box=boxes[1],
            source_size=sizes[0],
            target_size=sizes[1],
            point_ids=ids,
            difficulty=_difficulty(fields),
        )


def _array(fields: dict[str, Any], key: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    values = np.array(fields[key], dtype=np.float64)
    if shape[0] == -1 and fields[key] == []:
        values = values.reshape(0, *shape[1:])
    if values.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, values.shape, strict=True)):
        wanted = ", ".join("N" if side == -1 else str(side) for side in shape)
        raise ValueError(f"{key} must be numbers of shape ({wanted}), got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{key} must be finite")
    return values


def _box(fields: dict[str, Any], key: str) -> NDArray[np.float64]:
    box = _array(fields, key, (4,))
    if not is_box(box):
        raise ValueError(f"{key} must be x1, y1, x2, y2 with x1 <= x2, y1 <= y2, and not a point, got {box.tolist()}")
    return box


def _size(fields: dict[str, Any], key: str) -> tuple[int, int] | None:
    """(height, width) of an image whose annotation says [width, height, channels]; None where it does not."""
    if key not in fields:
        return None
    width, height, _ = _array(fields, key, (3,)).tolist()
    if width < 1 or height < 1 or width % 1 or height % 1:
        raise ValueError(f"{key} must be [width, height, channels] in whole pixels, got {fields[key]!r}")
    return int(height), int(width)


def _ids(fields: dict[str, Any]) -> NDArray[Any] | None:
    """(N,) int64 where the file numbers its keypoints, as SPair-71k does ("0", "1", ...), else their names."""
    given = fields.get("kps_ids")
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(one, (str, int)) for one in given):
        raise ValueError(f"kps_ids must be a list of numbers or names, got {given!r}")
    names = [str(one) for one in given]
    return np.array(names, dtype=np.int64 if all(name.isdecimal() for name in names) else np.str_)


def _difficulty(fields: dict[str, Any]) -> dict[str, int]:
    known = fields.get("variation_flags_known", True)
    if not isinstance(known, bool):
        raise ValueError(f"variation_flags_known must be true or false, got {known!r}")
    if not known:
        return {}
    found = {}
    for name, (key, highest) in _DIFFICULTY.items():
        if key in fields:
            found[name] = fields[key]
            if type(found[name]) is not int or not 0 <= found[name] <= highest:
                raise ValueError(f"{key} must be a whole number from 0 to {highest}, got {found[name]!r}")
    return found


LAYOUT = Layout("spair", "SPair-71k", ("trn", "val", "test"), _present, _records)
