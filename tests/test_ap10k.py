"""The reader of AP-10K: made-up annotations, the pairs built from them by hand-counted rules, prepared pairs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpmflow.data import KeypointPair, load_pairs
from lpmflow.data.ap10k import SPLITS
from lpmflow.evaluation import geometry_aware_points

CATEGORIES = [
    {"id": 1, "name": "antelope", "supercategory": "Bovidae"},
    {"id": 2, "name": "bison", "supercategory": "Bovidae"},
    {"id": 3, "name": "cat", "supercategory": "Felidae"},
]


def keypoints(labelled: range | list[int], number: int = 0, visibility: int = 2) -> list[float]:
    """17 points; point k of photograph n at (k + n, 2 k)."""
    return list(itertools.chain(*([k + number, 2 * k, visibility] if k in labelled else [0, 0, 0] for k in range(17))))


class Set:
    """AP-10K in small, filled by `add` and written by `write`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lists: dict[str, dict[str, Any]] = {
            name: {"images": [], "annotations": [], "categories": CATEGORIES} for name in ("train", "test", "val")
        }

    def add(
        self, number: int, category: int, labelled: range | list[int] = range(17), into: str = "train", **changed: Any
    ) -> None:
        """A photograph of 400 x 300 with one animal."""
        name = f"{number:012d}.jpg"
        self.lists[into]["images"].append({"id": number, "file_name": name, "width": 400, "height": 300})
        self.annotate(number, category, labelled, into, **changed)
        (self.root / "data").mkdir(parents=True, exist_ok=True)
        (self.root / "data" / name).touch()

    def annotate(
        self, number: int, category: int, labelled: range | list[int], into: str = "train", **changed: Any
    ) -> None:
        fields = {
            "id": 1000 + number,
            "image_id": number,
            "category_id": category,
            "keypoints": keypoints(labelled, number % 50),
            "bbox": [10, 20, 100, 50],
            **changed,
        }
        self.lists[into]["annotations"].append(fields)

    def write(self) -> Path:
        folder = self.root / "annotations"
        folder.mkdir(parents=True, exist_ok=True)
        for name, fields in self.lists.items():
            (folder / f"ap10k-{name}-split1.json").write_text(json.dumps(fields))
        return self.root


def numbers(pairs: list[KeypointPair]) -> list[tuple[int, int]]:
    return [(int(pair.source.stem), int(pair.target.stem)) for pair in pairs]


def test_a_pair_has_the_points_labelled_in_both(tmp_path: Path) -> None:
    made = Set(tmp_path)
    made.add(7, 1, [0, 3, 4, 9, 16])
    made.add(5, 1, [0, 2, 4, 9], into="test")
    (pair,) = load_pairs("ap-10k", made.write(), "test")
    assert (pair.name, pair.category) == ("000000000005-000000000007:antelope", "antelope")
    assert pair.source == tmp_path / "data" / "000000000005.jpg"
    assert pair.source_points.tolist() == [[5, 0], [9, 8], [14, 18]]
    assert pair.target_points.tolist() == [[7, 0], [11, 8], [16, 18]]
    assert pair.point_ids is not None and pair.point_ids.tolist() == [0, 4, 9]
    assert pair.source_box is not None and pair.source_box.tolist() == [10, 20, 110, 70]
    assert pair.source_size == pair.target_size == (300, 400)


def test_a_twin_that_only_the_target_shows_is_seen(tmp_path: Path) -> None:
    """0 and 1 are the eyes: the source shows one of them."""
    made = Set(tmp_path)
    made.add(1, 1, [0, 2, 3])
    made.add(2, 1, [0, 1, 2, 3])
    pairs = load_pairs("ap-10k", made.write(), "test")
    assert pairs[0].target_visible is not None and pairs[0].target_visible.tolist() == [0, 1, 2, 3]
    assert geometry_aware_points(pairs, {"antelope": [[0, 1]]}).tolist() == [True, False, False]


def test_what_does_not_count(tmp_path: Path) -> None:
    """Two animals in a photograph, fewer than 3 points labelled, fewer than 3 in common."""
    made = Set(tmp_path)
    made.add(1, 1, [0, 1, 2, 3])
    made.add(2, 1)
    made.annotate(2, 1, range(17))
    made.add(3, 1, [0, 1])
    made.add(4, 1, [2, 3, 4, 5])
    made.add(5, 1, [1, 2, 3])
    assert numbers(load_pairs("ap-10k", made.write(), "test")) == [(1, 5)]


def test_points_that_are_hidden_and_labelled_count(tmp_path: Path) -> None:
    made = Set(tmp_path)
    made.add(1, 1, keypoints=keypoints([0, 1, 2], visibility=1))
    made.add(2, 1)
    (pair,) = load_pairs("ap-10k", made.write(), "test")
    assert len(pair.source_points) == 3


@pytest.mark.parametrize(
    ("count", "parts"), [(2, (0, 0, 2)), (30, (0, 0, 30)), (37, (0, 7, 30)), (50, (0, 20, 30)), (63, (13, 20, 30))]
)
def test_parts_of_a_species(tmp_path: Path, count: int, parts: tuple[int, int, int]) -> None:
    """The last 30 photographs by number, the 20 before them, the rest; every two of a part are a pair."""
    made = Set(tmp_path)
    order = np.random.default_rng(0).permutation(count)
    for index in order.tolist():
        made.add(100 + index, 1, into=("train", "test", "val")[index % 3])
    root = made.write()
    first = 100
    for split, part in zip(("trn", "val", "test"), parts, strict=True):
        wanted = list(itertools.combinations(range(first, first + part), 2))
        assert numbers(load_pairs("ap-10k", root, split)) == wanted
        first += part


def test_at_most_fifty_times_as_many_pairs_as_photographs_for_training(tmp_path: Path) -> None:
    made = Set(tmp_path)
    for index in range(50 + 110):
        made.add(index, 1)
    root = made.write()
    pairs = numbers(load_pairs("ap-10k", root, "trn"))
    assert len(pairs) == len(set(pairs)) == 50 * 110 < 110 * 109 // 2
    assert pairs == sorted(pairs) == numbers(load_pairs("ap-10k", root, "trn"))
    assert all(source < target < 110 for source, target in pairs)
    assert len({number for pair in pairs for number in pair}) == 110


@pytest.fixture(scope="module")
def three_species(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """55 antelopes 100.., 55 bisons 200.., 55 cats 300..: 5 to train with, 20 to validate, 30 to test."""
    made = Set(tmp_path_factory.mktemp("ap-10k"))
    for category, index in itertools.product((1, 2, 3), range(55)):
        made.add(100 * category + index, category)
    return made.write()


def test_across_species(three_species: Path) -> None:
    """Bovidae alone has two species here: 20 x 20 and 30 x 30 pairs, no more than are wanted."""
    for split, first, last, count in (("val_cross_species", 5, 25, 400), ("test_cross_species", 25, 55, 900)):
        pairs = load_pairs("ap-10k", three_species, split)
        wanted = itertools.product(range(100 + first, 100 + last), range(200 + first, 200 + last))
        assert numbers(pairs) == list(wanted) and len(pairs) == count
        assert {pair.category for pair in pairs} == {"Bovidae"}


def test_across_families(three_species: Path) -> None:
    """Bovidae and Felidae: 20 and 30 drawn of 40 x 20 and 60 x 30."""
    for split, first, last, count in (("val_cross_family", 5, 25, 20), ("test_cross_family", 25, 55, 30)):
        pairs = load_pairs("ap-10k", three_species, split)
        assert len(pairs) == count == len(set(numbers(pairs)))
        assert {pair.category for pair in pairs} == {"all"}
        for source, target in numbers(pairs):
            assert source // 100 in (1, 2) and target // 100 == 3
            assert first <= source % 100 < last and first <= target % 100 < last


def test_the_draw_never_changes(three_species: Path) -> None:
    """A fixed answer: were the draw another, figures of one machine could not be compared with another's."""
    drawn = numbers(load_pairs("ap-10k", three_species, "val_cross_family"))
    assert drawn[:4] == [(105, 317), (106, 317), (107, 320), (114, 310)]


def test_names_are_unique(three_species: Path) -> None:
    for split in SPLITS:
        pairs = load_pairs("ap-10k", three_species, split)
        assert len({pair.name for pair in pairs}) == len(pairs) > 0


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_a_list_is_missing(tmp_path: Path, name: str) -> None:
    made = Set(tmp_path)
    made.add(1, 1)
    file = made.write() / "annotations" / f"ap10k-{name}-split1.json"
    file.unlink()
    with pytest.raises(FileNotFoundError) as refused:
        load_pairs("ap-10k", tmp_path, "test")
    assert str(refused.value) == f"root must be a folder in the layout of AP-10K, but there is no {file}"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keypoints": [1, 2, 2]}, r"keypoints must be 51 finite numbers, got shape \(3,\)"),
        ({"keypoints": [None] * 51}, "keypoints must be 51 finite numbers"),
        ({"bbox": [1, 2, 0, 0]}, "bbox must be x, y, width, height with a side above 0, got "),
        ({"bbox": [10, 20, -5, 30]}, "bbox must be x, y, width, height with a side above 0, got "),
        ({"bbox": [1, 2, 3]}, "bbox must be x, y, width, height"),
        ({"category_id": 9}, "its image and its category must be in the same lists"),
        ({"keypoints": [10**400] * 51}, "must hold no number so large: "),
        ({"image_id": 99}, "its image and its category must be in the same lists"),
    ],
)
def test_an_annotation_of_another_kind(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    made = Set(tmp_path)
    made.add(1, 1)
    made.add(2, 1, into="val", **changed)
    with pytest.raises(ValueError, match=rf"ap10k-val-split1\.json, annotation 1002: {message}"):
        load_pairs("ap-10k", made.write(), "test")


def test_points_far_outside(tmp_path: Path) -> None:
    made = Set(tmp_path)
    made.add(1, 1)
    made.add(2, 1, keypoints=[1e4 if index % 3 == 0 else 2 for index in range(51)])
    with pytest.raises(
        ValueError, match=r"000000000001-000000000002:antelope: target_points\[0\] must lie in the photo"
    ):
        load_pairs("ap-10k", made.write(), "test")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": 3, "annotations": [], "categories": []}'])
def test_a_list_of_another_kind(tmp_path: Path, content: str) -> None:
    made = Set(tmp_path)
    made.add(1, 1)
    file = made.write() / "annotations" / "ap10k-test-split1.json"
    file.write_text(content)
    with pytest.raises(ValueError) as refused:
        load_pairs("ap-10k", tmp_path, "test")
    assert str(refused.value).startswith(str(file))


def test_an_image_is_numbered_by_whole_numbers(tmp_path: Path) -> None:
    made = Set(tmp_path)
    made.add(1, 1)
    made.add(2, 1, into="val", image_id="2")
    with pytest.raises(
        ValueError, match=r"val-split1\.json: image_id must be a whole number, got '2' in annotation 1002"
    ):
        load_pairs("ap-10k", made.write(), "test")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": float("inf")}, "width and height must be whole numbers of at least 1, got inf and 300"),
        ({"height": 0}, "width and height must be whole numbers of at least 1, got 400 and 0"),
        ({"height": 299.7}, "width and height must be whole numbers of at least 1, got 400 and 299.7"),
        ({"file_name": "../data/000000000002.jpg"}, "file_name must name a file below "),
        ({"file_name": 2}, "file_name must name a file below "),
    ],
)
def test_an_image_of_another_kind(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    made = Set(tmp_path)
    made.add(1, 1)
    made.add(2, 1, into="val")
    made.lists["val"]["images"][0].update(changed)
    with pytest.raises(ValueError, match=rf"ap10k-val-split1\.json, annotation 1002: {message}"):
        load_pairs("ap-10k", made.write(), "test")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("found", [{}, [[1]], ["1"]])
def test_a_list_that_holds_no_objects(tmp_path: Path, key: str, found: Any) -> None:
    made = Set(tmp_path)
    made.add(1, 1)
    made.lists["val"][key] = found
    with pytest.raises(ValueError, match=rf"ap10k-val-split1\.json: {key} must be a list of objects$"):
        load_pairs("ap-10k", made.write(), "test")


def test_an_image_in_two_lists(tmp_path: Path) -> None:
    made = Set(tmp_path)
    made.add(1, 1)
    made.add(1, 1, into="val")
    with pytest.raises(ValueError, match=r"val-split1\.json: image 1 must be in one list of split 1, and is in two"):
        load_pairs("ap-10k", made.write(), "test")


def test_no_image(tmp_path: Path) -> None:
    made = Set(tmp_path)
    made.add(1, 1)
    (made.write() / "data" / "000000000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotation 1001: there is no image .*000000000001\.jpg$"):
        load_pairs("ap-10k", tmp_path, "test")


# Prepared pairs


def prepare(root: Path, split: str, *names: str, colon: str = ":") -> Path:
    for number in (11, 12):
        fields = {
            "id": number,
            "keypoints": keypoints([0, 1, number], number),
            "bbox": [1, 2, 30, 40],
            "width": 200,
            "height": 100,
            "name": "lion",
            "supercategory": "Felidae",
        }
        for folder, suffix in (("ImageAnnotation", ".json"), ("JPEGImages", ".jpg")):
            file = root / folder / "Felidae" / "lion" / f"{number:012d}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(fields))
    folder = root / "PairAnnotation" / split
    folder.mkdir(parents=True, exist_ok=True)
    where = "data/ap-10k/ImageAnnotation/Felidae/lion"
    for name in names:
        source, target = name.partition(":")[0].split("-")
        paths = {"src_json_path": f"{where}/{source}.json", "trg_json_path": f"{where}/{target}.json"}
        (folder / f"{name.replace(':', colon)}.json").write_text(json.dumps(paths))
    return folder


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("colon", [":", "_"])
def test_prepared_pairs_are_read_as_they_are(tmp_path: Path, split: str, colon: str) -> None:
    names = ["000000000011-000000000012:king cheetah", "000000000012-000000000011:king cheetah"]
    prepare(tmp_path, split, *reversed(names), colon=colon)
    pairs = load_pairs("ap-10k", tmp_path, split)
    assert [pair.name for pair in pairs] == names
    assert pairs[0].category == "king cheetah" and pairs[0].source_size == (100, 200)
    assert pairs[0].source == tmp_path / "JPEGImages" / "Felidae" / "lion" / "000000000011.jpg"
    assert pairs[0].source_points.tolist() == [[11, 0], [12, 2]] == pairs[1].target_points.tolist()
    assert pairs[0].target_points.tolist() == [[12, 0], [13, 2]]
    assert pairs[0].target_box is not None and pairs[0].target_box.tolist() == [1, 2, 31, 42]


def test_prepared_pairs_of_another_kind(tmp_path: Path) -> None:
    folder = prepare(tmp_path, "test", "000000000011-000000000013:all")
    with pytest.raises(FileNotFoundError, match=r"000000000011-000000000013:all\.json: there is no file .*13\.json$"):
        load_pairs("ap-10k", tmp_path, "test")
    (file,) = folder.iterdir()
    file.write_text("{}")
    with pytest.raises(ValueError, match=r":all\.json: has no 'src_json_path'$"):
        load_pairs("ap-10k", tmp_path, "test")
    file.rename(folder / "pair.json")
    with pytest.raises(ValueError, match=r"pair\.json must be called SOURCE-TARGET:category\.json$"):
        load_pairs("ap-10k", tmp_path, "test")
    (folder / "pair.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"^root must be a folder in the layout of AP-10K, but there is no "):
        load_pairs("ap-10k", tmp_path, "test")
