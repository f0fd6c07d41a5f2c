"""AP-10K as pairs: 17 points of the animals of 54 species in 23 families, within and across species and families.

AP-10K itself has photographs and no pairs; those come from the paper "Telling Left from Right" (CVPR 2024). Two layouts
are read. What that paper's own preparation leaves, whose pairs are taken as they are and are the ones to compare with:

    PairAnnotation/test_cross_family/SOURCE-TARGET:all.json     src_json_path, trg_json_path
    ImageAnnotation/Bovidae/antelope/000000000001.json          keypoints (17 x, y, visibility), bbox, width, height
    JPEGImages/Bovidae/antelope/000000000001.jpg

and AP-10K as its authors distribute it, from which the pairs are built here by the same rules:

    annotations/ap10k-{train,test,val}-split1.json              COCO style; the three are read as one
    data/000000000001.jpg

- A photograph counts when exactly one animal is annotated in it, with at least 3 points labelled (visibility above 0).
- Of each species, in the order of the photographs' numbers, the last 30 are for testing, the 20 before them for
  validation, the rest for training.
- Within a species ("trn", "val", "test") every two photographs are a pair; for training at most 50 times as many pairs
  as photographs. Across the species of a family: 400 pairs a family for validation, 900 for testing. Across families:
  20 and 30 for every two families. A pair has at least 3 points labelled in both. Where there are more pairs than
  wanted they are drawn at random, always the same ones; the source is the one that comes first in the alphabet, or by
  number.

The paper's own draw depends on the order in which a file system lists its files and on a list of crowded photographs
made by hand, so the pairs built here are not its pairs, and figures on them are not quite its figures. Boxes are COCO's
x, y, width, height as corners. Points are numbered 0..16 in AP-10K's order; the category is the species, the family, or
"all".
"""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpmflow.data.files import find_file, naming, parts_below, read_json
from lpmflow.data.pairs import KeypointPair, Layout, is_box

POINTS = 17
_LEAST = 3
_TEST, _VAL = 30, 20
_LISTS = ("train", "test", "val")
_WITHIN = {"trn": 50, "val": None, "test": None}
_LIMITS = {"val_cross_species": 400, "test_cross_species": 900, "val_cross_family": 20, "test_cross_family": 30}
SPLITS = (*_WITHIN, *_LIMITS)


@dataclass(frozen=True, eq=False)
class Animal:
    """A photograph with one animal."""

    number: int
    image: Path
    family: str
    species: str
    points: NDArray[np.float64]
    """(17, 3): x, y, visibility, 0 where the point is not labelled."""
    box: NDArray[np.float64]
    size: tuple[int, int]


def _present(root: Path) -> list[str]:
    if _is_prepared(root):
        return [split for split in SPLITS if (root / "PairAnnotation" / split).is_dir()]
    return list(SPLITS) if _list(root, "train").is_file() else []


def _is_prepared(root: Path) -> bool:
    return (root / "PairAnnotation").is_dir() and (root / "ImageAnnotation").is_dir() and not (root / "Layout").exists()


def _list(root: Path, name: str) -> Path:
    return root / "annotations" / f"ap10k-{name}-split1.json"


def _records(root: Path, split: str) -> list[Callable[[], KeypointPair]]:
    if _is_prepared(root):
        return _prepared(root, split)
    if not _list(root, "train").is_file():
        raise FileNotFoundError(
            f"root must be a folder in the layout of AP-10K, but there is no {_list(root, 'train')}"
        )
    species, wrong = _species(root)
    built = _built(species, split)
    return [
        *(functools.partial(_refuse, error) for error in wrong),
        *(functools.partial(_pair, _list(root, "*"), category, source, target) for category, source, target in built),
    ]


# Pairs as they are prepared


def _prepared(root: Path, split: str) -> list[Callable[[], KeypointPair]]:
    folder = root / "PairAnnotation" / split
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"root must be a folder in the layout of AP-10K, but there is no {folder}/*.json")
    read = functools.cache(functools.partial(_annotated, root))
    return [functools.partial(_prepared_pair, root, file, read) for file in files]


def _prepared_pair(root: Path, file: Path, read: Callable[[Path], Animal]) -> KeypointPair:
    named = re.fullmatch(r"\d+-\d+[:_](.+)", file.stem)
    if named is None:
        raise ValueError(f"{file} must be called SOURCE-TARGET:category.json")
    fields = read_json(file)
    with naming(file):
        names = [fields[key] for key in ("src_json_path", "trg_json_path")]
    source, target = (read(find_file(root, name, str(file))) for name in names)
    return _pair(file, named[1], source, target)


def _annotated(root: Path, file: Path) -> Animal:
    fields = read_json(file)
    folder = "/".join(("JPEGImages", *file.parts[-3:-1]))
    image = find_file(root, f"{folder}/{file.stem}.jpg", str(file))
    with naming(file):
        return _animal(fields, fields, fields, int(file.stem), image)


# Pairs built here


def _refuse(error: Exception) -> KeypointPair:
    raise error


def _species(root: Path) -> tuple[dict[tuple[str, str], list[Animal]], list[Exception]]:
    """(family, species) in the order of the alphabet -> its animals by the number of their photograph; and what is
    wrong with the others."""
    images: dict[int, dict[str, Any]] = {}
    categories: dict[int, dict[str, Any]] = {}
    annotations: dict[int, list[tuple[Path, dict[str, Any]]]] = {}
    for name in _LISTS:
        file = _list(root, name)
        if not file.is_file():
            raise FileNotFoundError(f"root must be a folder in the layout of AP-10K, but there is no {file}")
        fields = read_json(file)
        with naming(file):
            for image in _objects(fields, "images"):
                if image["id"] in images:
                    raise ValueError(f"image {image['id']} must be in one list of split 1, and is in two")
                images[image["id"]] = image
            categories.update({category["id"]: category for category in _objects(fields, "categories")})
            for annotation in _objects(fields, "annotations"):
                if type(annotation["image_id"]) is not int:
                    raise ValueError(
                        f"image_id must be a whole number, got {annotation['image_id']!r} in annotation "
                        f"{annotation.get('id')}"
                    )
                annotations.setdefault(annotation["image_id"], []).append((file, annotation))
    found: dict[tuple[str, str], list[Animal]] = {}
    wrong: list[Exception] = []
    for number in sorted(annotations):
        (file, annotation), *others = annotations[number]
        record = f"{file}, annotation {annotation.get('id')}"
        try:
            with naming(record):
                if number not in images or annotation["category_id"] not in categories:
                    raise ValueError("its image and its category must be in the same lists")
                image, category = images[number], categories[annotation["category_id"]]
                path = root.joinpath("data", *parts_below(root / "data", image["file_name"], "file_name"))
                animal = _animal(annotation, image, category, number, path)
            if others or np.count_nonzero(animal.points[:, 2] > 0) < _LEAST:
                continue
            if not path.is_file():
                raise FileNotFoundError(f"{record}: there is no image {path}")
        except (ValueError, FileNotFoundError) as error:
            wrong.append(error)
            continue
        found.setdefault((animal.family, animal.species), []).append(animal)
    return dict(sorted(found.items())), wrong


def _objects(fields: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = fields[key]
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{key} must be a list of objects")
    return found


def _built(species: dict[tuple[str, str], list[Animal]], split: str) -> Iterator[tuple[str, Animal, Animal]]:
    """(category, source, target) of each pair of a split."""
    ours = {key: _part(animals, split.partition("_")[0]) for key, animals in species.items()}
    if split in _WITHIN:
        for (_, name), animals in ours.items():
            factor = _WITHIN[split]
            limit = None if factor is None else factor * len(animals)
            yield from _drawn(split, name, [(animals, animals)], limit)
        return
    families = {
        family: [animals for _, animals in group]
        for family, group in itertools.groupby(ours.items(), key=lambda item: item[0][0])
    }
    if split.endswith("_cross_species"):
        for family, groups in families.items():
            yield from _drawn(split, family, list(itertools.combinations(groups, 2)), _LIMITS[split])
    else:
        whole = {family: list(itertools.chain(*groups)) for family, groups in families.items()}
        for first, second in itertools.combinations(whole, 2):
            both = _drawn(split, f"{first}-{second}", [(whole[first], whole[second])], _LIMITS[split])
            yield from (("all", source, target) for _, source, target in both)


def _part(animals: list[Animal], part: str) -> list[Animal]:
    test = max(len(animals) - _TEST, 0)
    val = max(test - _VAL, 0)
    return {"trn": animals[:val], "val": animals[val:test], "test": animals[test:]}[part]


def _drawn(
    split: str, name: str, groups: Sequence[tuple[list[Animal], list[Animal]]], limit: int | None
) -> Iterator[tuple[str, Animal, Animal]]:
    """The pairs across each two groups that have points enough in common, `limit` of them at most; `name` is theirs."""
    pairs = []
    for first, second in groups:
        labelled = [
            np.array([animal.points[:, 2] > 0 for animal in one]).reshape(-1, POINTS) for one in (first, second)
        ]
        enough = labelled[0].astype(int) @ labelled[1].T.astype(int) >= _LEAST
        if first is second:
            enough = np.triu(enough, 1)
        pairs += [(first[i], second[j]) for i, j in np.argwhere(enough).tolist()]
    chosen = list(range(len(pairs)))
    if limit is not None and limit < len(pairs):
        # RandomState, not Generator: its stream is promised never to change
        random = np.random.RandomState(zlib.crc32(f"{split}/{name}".encode()))
        chosen = sorted(random.permutation(len(pairs))[:limit].tolist())
    yield from ((name, *pairs[index]) for index in chosen)


# What both have in common


def _animal(
    annotation: dict[str, Any], image: dict[str, Any], category: dict[str, Any], number: int, path: Path
) -> Animal:
    points = np.array(annotation["keypoints"], dtype=np.float64)
    if points.shape != (3 * POINTS,) or not np.isfinite(points).all():
        raise ValueError(f"keypoints must be {3 * POINTS} finite numbers, got shape {points.shape}")
    box = np.array(annotation["bbox"], dtype=np.float64)
    corners = np.concatenate((box[:2], box[:2] + box[2:])) if box.shape == (4,) else None
    if corners is None or not np.isfinite(corners).all() or not is_box(corners):
        raise ValueError(f"bbox must be x, y, width, height with a side above 0, got {annotation['bbox']!r}")
    height, width = image["height"], image["width"]
    if not all(isinstance(side, (int, float)) and side >= 1 and side % 1 == 0 for side in (width, height)):
        raise ValueError(f"width and height must be whole numbers of at least 1, got {width!r} and {height!r}")
    family, name = str(category["supercategory"]), str(category["name"])
    return Animal(number, path, family, name, points.reshape(POINTS, 3), corners, (int(height), int(width)))


def _pair(record: object, category: str, source: Animal, target: Animal) -> KeypointPair:
    common = np.flatnonzero((source.points[:, 2] > 0) & (target.points[:, 2] > 0))
    name = f"{source.number:012d}-{target.number:012d}:{category}"
    with naming(f"{record}, {name}"):
        if not len(common):
            raise ValueError("the two animals must have a labelled point in common")
        return KeypointPair(
            name,
            category,
            source.image,
            target.image,
            source.points[common, :2],
            target.points[common, :2],
            source.box,
            target.box,
            source_size=source.size,
            target_size=target.size,
            point_ids=common,
            target_visible=np.flatnonzero(target.points[:, 2] > 0),
        )


LAYOUT = Layout("ap-10k", "AP-10K", SPLITS, _present, _records)
