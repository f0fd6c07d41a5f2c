"""The reader of PF-PASCAL: made-up folders with annotations written byte by byte, and everything it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matlab_files import matrix, write

from lpmflow.data import load_pairs

NAN = float("nan")
A = [[1, 2], [3.5, 4], [NAN, NAN], [7, 8]]
B = [[11, 12], [NAN, 14], [15, 16], [17, 18.25]]
HEADERS = {"trn": "source_image,target_image,class,flip", "val": "source_image,target_image,class"}
ROW = "PF-PASCAL/JPEGImages/a.jpg,PF-PASCAL/JPEGImages/b.jpg,8"


def annotate(root: Path, stem: str, points: Any, box: Any = ((1, 2, 30, 40),), category: str = "cat") -> Path:
    image = root / "JPEGImages" / f"{stem}.jpg"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.touch()
    file = root / "Annotations" / category / f"{stem}.mat"
    return write(file, matrix("kps", np.array(points, dtype=float)), matrix("bbox", np.array(box)))


def make(root: Path, *lines: str, split: str = "test", name: str | None = None) -> Path:
    annotate(root, "a", A, [[1, 2, 30, 40]])
    annotate(root, "b", B, [[5, 6, 70, 80]])
    file = root / (name or f"{split}_pairs.csv")
    file.write_text("\n".join([HEADERS.get(split, HEADERS["val"]), *lines]), encoding="utf-8")
    return file


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("name", ["{}_pairs.csv", "{}_pairs_pf_pascal.csv"])
def test_a_pair_has_the_points_labelled_in_both(tmp_path: Path, split: str, name: str) -> None:
    make(tmp_path, ROW, split=split, name=name.format(split))
    (pair,) = load_pairs("pf-pascal", tmp_path, split)
    assert (pair.name, pair.category, pair.flip) == ("000001-a-b:cat", "cat", False)
    assert (pair.source, pair.target) == (tmp_path / "JPEGImages" / "a.jpg", tmp_path / "JPEGImages" / "b.jpg")
    assert pair.source_points.tolist() == [[1, 2], [7, 8]] and pair.target_points.tolist() == [[11, 12], [17, 18.25]]
    assert pair.point_ids is not None and pair.point_ids.tolist() == [0, 3]
    assert pair.target_visible is not None and pair.target_visible.tolist() == [0, 2, 3]
    assert pair.source_box is not None and pair.source_box.tolist() == [1, 2, 30, 40]
    assert pair.target_box is not None and pair.target_box.tolist() == [5, 6, 70, 80]


@pytest.mark.parametrize("name", ["trn_pairs.csv", "train_pairs_pf_pascal.csv"])
def test_training_pairs_have_a_flip_flag(tmp_path: Path, name: str) -> None:
    make(tmp_path, f"{ROW},0", f"{ROW},1", f"{ROW},1.0", split="trn", name=name)
    pairs = load_pairs("pf-pascal", tmp_path, "trn")
    assert [pair.flip for pair in pairs] == [False, True, True]
    assert pairs[0].source_points.tolist() == pairs[1].source_points.tolist()
    assert len({pair.name for pair in pairs}) == 3


def test_a_flip_flag_of_another_list_is_read_too(tmp_path: Path) -> None:
    make(tmp_path, f"{ROW},0", f"{ROW},1", split="val")
    assert [pair.flip for pair in load_pairs("pf-pascal", tmp_path, "val")] == [False, True]


def test_columns_with_points_once_more_are_not_read(tmp_path: Path) -> None:
    make(tmp_path, f"{ROW},99;98,97;96,95;94,93;92")
    (pair,) = load_pairs("pf-pascal", tmp_path, "test")
    assert pair.source_points.tolist() == [[1, 2], [7, 8]]


def test_a_photograph_of_two_classes(tmp_path: Path) -> None:
    make(tmp_path, ROW, ROW.replace(",8", ",20"))
    for stem in "ab":
        annotate(tmp_path, stem, [[9, 9]], category="tvmonitor")
    cat, monitor = load_pairs("pf-pascal", tmp_path, "test")
    assert (cat.category, monitor.category) == ("cat", "tvmonitor")
    assert monitor.source_points.tolist() == [[9, 9]]


def test_rows_that_one_annotation_lacks_are_not_labelled(tmp_path: Path) -> None:
    make(tmp_path, ROW)
    annotate(tmp_path, "b", B[:1])
    (pair,) = load_pairs("pf-pascal", tmp_path, "test")
    assert pair.point_ids is not None and pair.point_ids.tolist() == [0]


@pytest.mark.parametrize("split", ["trn", "val", "test"])
def test_no_list(tmp_path: Path, split: str) -> None:
    with pytest.raises(FileNotFoundError) as refused:
        load_pairs("pf-pascal", tmp_path, split)
    wanted = tmp_path / f"{split}_pairs.csv"
    assert str(refused.value) == f"root must be a folder in the layout of PF-PASCAL, but there is no {wanted}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW.replace(",8", ""), "must have 3 or 4 or 7 fields, got 2"),
        (ROW.replace(",8", ",0"), "the class must be a whole number from 1 to 20, got '0'"),
        (ROW.replace(",8", ",21"), "the class must be a whole number from 1 to 20, got '21'"),
        (ROW.replace(",8", ",8.5"), "the class must be a whole number from 1 to 20, got '8.5'"),
        (ROW.replace(",8", ",cat"), "the class must be numbers: "),
    ],
)
@pytest.mark.parametrize("split", ["trn", "val"])
def test_a_line_of_another_kind(tmp_path: Path, split: str, row: str, message: str) -> None:
    file = make(tmp_path, row, split=split)
    with pytest.raises(ValueError) as refused:
        load_pairs("pf-pascal", tmp_path, split)
    assert str(refused.value).startswith(f"{file}, line 2: {message}")


@pytest.mark.parametrize(
    ("row", "message"),
    [(ROW, "must have a flip flag as its fourth field"), (f"{ROW},2", "the flip flag must be 0 or 1")],
)
def test_no_flip_flag(tmp_path: Path, row: str, message: str) -> None:
    make(tmp_path, row, split="trn")
    with pytest.raises(ValueError, match=rf"trn_pairs\.csv, line 2: {message}"):
        load_pairs("pf-pascal", tmp_path, "trn")


def test_no_point_in_common(tmp_path: Path) -> None:
    file = make(tmp_path, ROW)
    annotate(tmp_path, "b", [[NAN, NAN], [NAN, 1], [3, 4]])
    with pytest.raises(ValueError) as refused:
        load_pairs("pf-pascal", tmp_path, "test")
    assert str(refused.value) == f"{file}, line 2: a and b must have a point of cat in common"


def test_no_annotation_and_no_image(tmp_path: Path) -> None:
    file = make(tmp_path, ROW)
    annotation, image = tmp_path / "Annotations" / "cat" / "b.mat", tmp_path / "JPEGImages" / "a.jpg"
    annotation.unlink()
    with pytest.raises(FileNotFoundError) as refused:
        load_pairs("pf-pascal", tmp_path, "test")
    assert str(refused.value) == f"{file}, line 2: there is no annotation {annotation}"
    image.unlink()
    with pytest.raises(FileNotFoundError) as refused:
        load_pairs("pf-pascal", tmp_path, "test")
    assert str(refused.value) == f"{file}, line 2: there is no file {image}"


@pytest.mark.parametrize(
    ("points", "box", "message"),
    [
        (np.zeros((4, 3)), [[1, 2, 3, 4]], r"kps must have shape \(n, 2\), got \(4, 3\)"),
        ([[np.inf, 1]], [[1, 2, 3, 4]], "kps must be finite, or NaN where a point is not labelled"),
        ([[1, 1]], [[1, 2, 3]], r"bbox must be four finite numbers, got shape \(1, 3\)"),
        ([[1, 1]], [[1, 2, 3, np.nan]], "bbox must be four finite numbers"),
        ([[1, 1]], [[5, 5, 5, 5]], "bbox must be x1, y1, x2, y2 with x1 <= x2, y1 <= y2, and not a point"),
        ([[1, 1]], [[30, 40, 5, 80]], "bbox must be x1, y1, x2, y2 with x1 <= x2, y1 <= y2, and not a point"),
    ],
)
def test_an_annotation_of_another_kind(tmp_path: Path, points: Any, box: Any, message: str) -> None:
    make(tmp_path, ROW)
    annotate(tmp_path, "b", points, np.array(box, dtype=float))
    with pytest.raises(ValueError, match=rf"b\.mat: {message}"):
        load_pairs("pf-pascal", tmp_path, "test")


def test_an_annotation_that_is_no_matlab_file(tmp_path: Path) -> None:
    make(tmp_path, ROW)
    (tmp_path / "Annotations" / "cat" / "a.mat").write_bytes(b"version https://git-lfs")
    with pytest.raises(
        ValueError, match=r"a\.mat cannot be read as a MATLAB file of version 5: its header is that of something else"
    ):
        load_pairs("pf-pascal", tmp_path, "test")


def test_willow_is_another_set(tmp_path: Path) -> None:
    """Both call their lists alike; neither reader takes the other's folder for its own."""
    from lpmflow.data.pairs import layout

    make(tmp_path, ROW)
    assert (layout("pf-pascal").present(tmp_path), layout("pf-willow").present(tmp_path)) == (["test"], [])
