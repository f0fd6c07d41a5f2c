"""The reader of SPair-71k's layout: made-up folders, everything it refuses, and the stored photographs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpmflow.data import KeypointPair, load_spair

NAME = "000001-left-right:cat"
BOX = "must be x1, y1, x2, y2 with x1 <= x2, y1 <= y2, and not a point"
FIELDS: dict[str, Any] = {
    "src_imname": "left.jpg",
    "trg_imname": "right.jpg",
    "src_kps": [[1, 2], [3.5, 4]],
    "trg_kps": [[5, 6], [7, 8]],
    "src_bndbox": [0, 1, 9, 8],
    "trg_bndbox": [2, 3, 20, 30],
}


def make(root: Path, split: str = "val", name: str = NAME, colon: str = ":", **changed: Any) -> Path:
    """Add a pair to a folder in the layout; `changed` fields of its annotation, None to leave one out."""
    stem, _, category = name.rpartition(":")
    fields = {key: value for key, value in {**FIELDS, "category": category, **changed}.items() if value is not None}
    annotation = root / "PairAnnotation" / split / f"{stem}{colon}{category}.json"
    for image in ("left.jpg", "right.jpg"):
        file = root / "JPEGImages" / category / image
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    annotation.parent.mkdir(parents=True, exist_ok=True)
    annotation.write_text(json.dumps(fields), encoding="utf-8")
    layout = root / "Layout" / "large" / f"{split}.txt"
    layout.parent.mkdir(parents=True, exist_ok=True)
    with layout.open("a", encoding="utf-8") as file:
        file.write(f"{name}\n")
    return annotation


@pytest.mark.parametrize("colon", [":", "_"])
@pytest.mark.parametrize("split", ["trn", "val", "test"])
def test_a_pair_is_read_as_written(tmp_path: Path, colon: str, split: str) -> None:
    make(tmp_path, split, colon=colon)
    (pair,) = load_spair(tmp_path, split)
    assert (pair.name, pair.category) == (NAME, "cat")
    assert pair.source == tmp_path / "JPEGImages" / "cat" / "left.jpg"
    assert pair.target == tmp_path / "JPEGImages" / "cat" / "right.jpg"
    assert pair.source_points.tolist() == [[1, 2], [3.5, 4]]
    assert pair.target_points.tolist() == [[5, 6], [7, 8]]
    assert pair.source_box is not None and pair.target_box is not None
    assert (pair.source_box.tolist(), pair.target_box.tolist()) == ([0, 1, 9, 8], [2, 3, 20, 30])
    arrays = (pair.source_points, pair.target_points, pair.source_box, pair.target_box)
    assert all(array.dtype == np.float64 for array in arrays)


def test_what_the_annotation_says_beside_the_points(tmp_path: Path) -> None:
    flags = {"viewpoint_variation": 1, "scale_variation": 2, "truncation": 3, "occlusion": 0, "mirror": 1}
    make(tmp_path, kps_ids=["3", "17"], src_imsize=[60, 40, 3], trg_imsize=[25, 33, 3], **flags)
    (pair,) = load_spair(tmp_path, "val")
    assert pair.difficulty == {"viewpoint": 1, "scale": 2, "truncation": 3, "occlusion": 0, "mirror": 1}
    assert pair.point_ids is not None and pair.point_ids.dtype == np.int64 and pair.point_ids.tolist() == [3, 17]
    assert (pair.source_size, pair.target_size) == ((40, 60), (33, 25))
    assert pair.flip is False and pair.source_mask is None


def test_a_box_may_be_one_pixel_wide(tmp_path: Path) -> None:
    make(tmp_path, src_bndbox=[4, 1, 4, 8])
    (pair,) = load_spair(tmp_path, "val")
    assert pair.source_box is not None and pair.source_box.tolist() == [4, 1, 4, 8]


def test_names_of_points_and_unknown_difficulties(tmp_path: Path) -> None:
    make(tmp_path, kps_ids=["u3", "7"], truncation=0, occlusion=0, variation_flags_known=False)
    (pair,) = load_spair(tmp_path, "val")
    assert pair.point_ids is not None and pair.point_ids.tolist() == ["u3", "7"] and pair.difficulty == {}


def test_an_annotation_that_says_no_more_than_the_points(tmp_path: Path) -> None:
    make(tmp_path)
    (pair,) = load_spair(tmp_path, "val")
    assert pair.point_ids is pair.source_size is pair.target_size is None and pair.difficulty == {}


def test_the_order_is_that_of_the_layout_file(tmp_path: Path) -> None:
    names = ["000009-b-a:dog", "000002-a-b:cat", "000005-c-d:potted_plant"]
    for name in names:
        make(tmp_path, name=name, colon="_")
    layout = tmp_path / "Layout" / "large" / "val.txt"
    layout.write_text(layout.read_text(encoding="utf-8").replace("\n", "\r\n\n"), encoding="utf-8", newline="")
    pairs = load_spair(str(tmp_path), "val")
    assert [pair.name for pair in pairs] == names
    assert [pair.category for pair in pairs] == ["dog", "cat", "potted_plant"]


def refusal(root: Path, kind: type[Exception] = ValueError, split: str = "val") -> str:
    with pytest.raises(kind) as refused:
        load_spair(root, split)
    assert type(refused.value) is kind  # a UnicodeDecodeError is a ValueError too, but says nothing useful
    return str(refused.value)


@pytest.mark.parametrize("split", ["train", "", "VAL", "../val"])
def test_an_unknown_split(tmp_path: Path, split: str) -> None:
    assert refusal(tmp_path, split=split) == f"split must be one of trn, val, test, got {split!r}"


def test_no_layout_file(tmp_path: Path) -> None:
    wanted = tmp_path / "Layout" / "large" / "test.txt"
    make(tmp_path, "val")
    said = refusal(tmp_path, FileNotFoundError, "test")
    without = f"root must be a folder in the layout of SPair-71k, but there is no {wanted}"
    assert said == f"{without}; of the splits it holds val"


def test_a_layout_file_of_another_kind(tmp_path: Path) -> None:
    make(tmp_path)
    layout = tmp_path / "Layout" / "large" / "val.txt"
    layout.write_text("\n  \n", encoding="utf-8")
    assert refusal(tmp_path) == f"{layout} lists no pair"
    layout.write_text("000001-left-right\n", encoding="utf-8")
    assert refusal(tmp_path) == f"{layout} must list NUMBER-SOURCE-TARGET:category, got '000001-left-right'"
    layout.write_text("../val/000001-left-right:cat\n", encoding="utf-8")
    assert refusal(tmp_path).startswith(f"{layout} must list NUMBER-SOURCE-TARGET:category, got '../val/")
    layout.write_bytes(b"\xff\xfe\x00")
    assert refusal(tmp_path).startswith(f"{layout} must be text: ")


def test_no_annotation(tmp_path: Path) -> None:
    make(tmp_path)
    annotation = make(tmp_path, name="000002-left-right:cat")
    annotation.unlink()
    said = refusal(tmp_path, FileNotFoundError)
    assert said == f"pair '000002-left-right:cat' of split 'val' has no annotation {annotation}"


@pytest.mark.parametrize("side", ["left.jpg", "right.jpg"])
def test_no_image(tmp_path: Path, side: str) -> None:
    annotation = make(tmp_path)
    image = tmp_path / "JPEGImages" / "cat" / side
    image.unlink()
    assert refusal(tmp_path, FileNotFoundError) == f"{annotation}: there is no image {image}"


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_missing(tmp_path: Path, field: str) -> None:
    annotation = make(tmp_path, **{field: None})
    assert refusal(tmp_path) == f"{annotation}: has no '{field}'"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("src_kps", [1, 2], r"src_kps must be numbers of shape \(N, 2\), got shape \(2,\)"),
        ("trg_kps", [[1, 2, 3]], r"trg_kps must be numbers of shape \(N, 2\), got shape \(1, 3\)"),
        ("src_kps", [], "src_kps and trg_kps must be equally many and at least one, got 0 and 2"),
        ("src_kps", [[1, 2]], "src_kps and trg_kps must be equally many and at least one, got 1 and 2"),
        ("src_bndbox", [1, 2, 3], r"src_bndbox must be numbers of shape \(4\), got shape \(3,\)"),
        ("trg_bndbox", [[1, 2, 3, 4]], r"trg_bndbox must be numbers of shape \(4\)"),
        ("trg_bndbox", [5, 5, 5, 5], f"trg_bndbox {BOX}"),
        ("src_bndbox", [9, 9, 3, 4], f"src_bndbox {BOX}"),
        ("src_bndbox", [9, 3, 3, 4], f"src_bndbox {BOX}"),
        ("trg_bndbox", [3, 9, 4, 4], f"trg_bndbox {BOX}"),
        ("src_kps", [[1, 2], [3]], "."),
        ("src_kps", [[1, "two"], [3, 4]], "two"),
        ("src_kps", [[1, None], [3, 4]], "src_kps must be finite"),
        ("trg_kps", [[1, float("nan")], [3, 4]], "trg_kps must be finite"),
        ("trg_bndbox", [0, 0, float("inf"), 4], "trg_bndbox must be finite"),
        ("src_kps", {"x": 1}, "."),
        ("src_kps", [[1, 10**400], [3, 4]], "must hold no number so large: "),
        ("src_imname", 7, "src_imname must name a file below "),
        ("src_imname", "", "src_imname must name a file below "),
        ("src_imname", "../cat/left.jpg", "src_imname must name a file below "),
        ("trg_imname", "/etc/hosts", "trg_imname must name a file below "),
        ("trg_imname", "left.jpg", "src_imname and trg_imname must be two photographs, got left.jpg twice"),
        ("category", "dog", "category must be that of the list, cat, got 'dog'"),
        ("kps_ids", [10**30, 4], "must hold no number so large: "),
        ("kps_ids", ["1"], "kps_ids must be as many as src_kps, 2, got 1"),
        ("kps_ids", "12", "kps_ids must be a list of numbers or names, got '12'"),
        ("kps_ids", [1.5, 2], "kps_ids must be a list of numbers or names"),
        ("src_imsize", [60, 0, 3], r"src_imsize must be \[width, height, channels\] in whole pixels, got \[60, 0, 3\]"),
        ("src_imsize", [60.9, 40, 3], r"src_imsize must be \[width, height, channels\] in whole pixels, got \[60\.9,"),
        ("trg_imsize", [10, 5, 3], r"target_points\[0\] must lie in the photograph of 10 x 5, or beyond "),
        ("truncation", -1, "truncation must be a whole number from 0 to 3, got -1"),
        ("viewpoint_variation", "2", "viewpoint_variation must be a whole number from 0 to 2, got '2'"),
        ("viewpoint_variation", 3, "viewpoint_variation must be a whole number from 0 to 2, got 3"),
        ("mirror", 2, "mirror must be a whole number from 0 to 1, got 2"),
        ("variation_flags_known", "no", "variation_flags_known must be true or false, got 'no'"),
    ],
)
def test_a_field_of_another_kind(tmp_path: Path, field: str, value: Any, message: str) -> None:
    annotation = make(tmp_path, **{field: value})
    assert re.match(re.escape(f"{annotation}: ") + ".*" + message, refusal(tmp_path), re.DOTALL)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe"])
def test_an_annotation_of_another_kind(tmp_path: Path, content: bytes) -> None:
    annotation = make(tmp_path)
    annotation.write_bytes(content)
    assert refusal(tmp_path).startswith(f"{annotation} must ")


@pytest.mark.parametrize(("split", "count"), [("val", 219), ("test", 390), ("trn", 180)])
def test_the_stored_photographs(shared: Path, split: str, count: int) -> None:
    def check(pair: KeypointPair) -> None:
        assert pair.point_ids is not None and len(set(pair.point_ids.tolist())) == len(pair.source_points)
        assert pair.difficulty == {}
        assert pair.source.is_file() and pair.target.is_file()
        assert pair.source_points.shape == pair.target_points.shape == (len(pair.source_points), 2)
        assert np.isfinite(np.concatenate((pair.source_points, pair.target_points))).all()
        for box in (pair.source_box, pair.target_box):
            assert box is not None and box.shape == (4,) and box[0] < box[2] and box[1] < box[3]

    pairs = load_spair(shared / "data" / "pairs", split)
    assert len(pairs) == count == len({pair.name for pair in pairs})
    for pair in pairs:
        check(pair)
