"""The reader of Caltech-101 pairs: made-up folders and everything it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lpmflow.data import load_pairs, read_mask

HEADER = "source_image,target_image,class,XA,YA,XB,YB"
NAME = "test_pairs_caltech_with_category.csv"


def make(root: Path, *lines: str) -> Path:
    for category in ("ant", "watch"):
        for number in (1, 2):
            image = root / "101_ObjectCategories" / category / f"image_000{number}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.touch()
    (root / NAME).write_text("\n".join([HEADER, *lines]), encoding="utf-8")
    return root / NAME


def line(
    source: str = "101_ObjectCategories/ant/image_0001.jpg",
    target: str = "101_ObjectCategories/ant/image_0002.jpg",
    xa: str = '"1.5,4.5,4.5,1.5"',
    ya: str = '"0.5,0.5,3.5,3.5"',
) -> str:
    return f'{source},{target},8,{xa},{ya},"0,9,9","0,0,9"'


@pytest.mark.parametrize("folder", ["101_ObjectCategories/", "", "caltech-101/101_ObjectCategories/"])
def test_a_pair_has_outlines(tmp_path: Path, folder: str) -> None:
    make(tmp_path, line(f"{folder}ant/image_0001.jpg", f"{folder}ant/image_0002.jpg"))
    (pair,) = load_pairs("caltech-101", tmp_path, "test")
    assert (pair.name, pair.category) == ("000001-image_0001-image_0002:ant", "ant")
    assert pair.source == tmp_path / "101_ObjectCategories" / "ant" / "image_0001.jpg"
    assert pair.source_points.shape == pair.target_points.shape == (0, 2) and pair.source_box is None
    assert isinstance(pair.source_mask, np.ndarray) and isinstance(pair.target_mask, np.ndarray)
    assert pair.source_mask.tolist() == [[1.5, 0.5], [4.5, 0.5], [4.5, 3.5], [1.5, 3.5]]
    assert pair.target_mask.tolist() == [[0, 0], [9, 0], [9, 9]]
    assert read_mask(pair.source_mask, (6, 7)).sum() == 9


@pytest.mark.parametrize("xa", ['"1.5;4.5;4.5;1.5"', "1.5;4.5;4.5;1.5", '"1.5, 4.5, 4.5, 1.5,"'])
def test_outlines_written_otherwise(tmp_path: Path, xa: str) -> None:
    make(tmp_path, line(xa=xa))
    (pair,) = load_pairs("caltech-101", tmp_path, "test")
    assert isinstance(pair.source_mask, np.ndarray) and pair.source_mask[:, 0].tolist() == [1.5, 4.5, 4.5, 1.5]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (line() + ",5", "must have 7 fields, got 8"),
        (line(xa='"1,2,x,4"'), "an outline must be numbers: "),
        (line(xa='"1,2,nan,4"'), "an outline must be finite"),
        (line(xa='"1,2,3"'), "an outline must have as many x as y, at least 3, got 3 and 4"),
        (line(xa='"1,2"', ya='"1,2"'), "an outline must have as many x as y, at least 3, got 2 and 2"),
        (line().replace(",8,", ",nonsense,"), "the class must be numbers: "),
        (line(xa=""), "an outline must be numbers: "),
        (line("101_ObjectCategories/watch/image_0001.jpg"), "both images must be of one category, got "),
    ],
)
def test_a_line_of_another_kind(tmp_path: Path, wrong: str, message: str) -> None:
    file = make(tmp_path, line(), wrong)
    with pytest.raises(ValueError) as refused:
        load_pairs("caltech-101", tmp_path, "test")
    assert str(refused.value).startswith(f"{file}, line 3: {message}")


def test_no_image(tmp_path: Path) -> None:
    file = make(tmp_path, line("101_ObjectCategories/ant/image_0007.jpg"))
    with pytest.raises(FileNotFoundError) as refused:
        load_pairs("caltech-101", tmp_path, "test")
    wanted = tmp_path / "101_ObjectCategories" / "ant" / "image_0007.jpg"
    assert str(refused.value) == f"{file}, line 2: there is no file {wanted}"
