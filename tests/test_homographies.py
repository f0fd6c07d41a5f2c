"""The reader of HPatches' layout and the transfer by a homography, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lpmflow.data import HomographyPair, load_homographies
from lpmflow.data.check import check_pairs

SHIFT = "1 0 3\n0 1 -2\n0 0 1\n"
TILT = "2 0 1  0 2 0  0.5 0 1"


def make(root: Path, homographies: dict[str, str], images: tuple[str, ...]) -> Path:
    root.mkdir(exist_ok=True)
    for name, text in homographies.items():
        (root / name).write_text(text, encoding="utf-8")
    for name in images:
        (root / name).touch()
    return root


def test_a_sequence(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "v_wall",
        {"H_1_2": SHIFT, "H_1_10.txt": TILT, "H_1_3": SHIFT, "H_2_3": "no pair of ours", "H_1_x": "nor this"},
        ("1.ppm", "2.png", "3.jpg", "10.jpeg"),
    )
    pairs = load_homographies(folder)
    assert [pair.name for pair in pairs] == ["v_wall 1-2", "v_wall 1-3", "v_wall 1-10"]
    assert {pair.source for pair in pairs} == {folder / "1.ppm"}
    assert [pair.target.name for pair in pairs] == ["2.png", "3.jpg", "10.jpeg"]
    assert pairs[2].homography.tolist() == [[2, 0, 1], [0, 2, 0], [0.5, 0, 1]]
    assert pairs[0].homography.dtype == np.float64
    assert [pair.name for pair in load_homographies(str(folder))] == [pair.name for pair in pairs]


def pair(*rows: tuple[float, float, float]) -> HomographyPair:
    return HomographyPair("pair", Path("1.png"), Path("2.png"), np.array(rows, dtype=np.float64))


def test_transfer_by_hand() -> None:
    shift = pair((1, 0, 3), (0, 1, -2), (0, 0, 1))
    assert shift.transfer(np.array([[0.0, 0.0], [10.5, 4.0]])).tolist() == [[3, -2], [13.5, 2]]
    tilt = pair((2, 0, 1), (0, 2, 0), (0.5, 0, 1))  # (x, y) -> (2 x + 1, 2 y) / (x / 2 + 1)
    assert tilt.transfer(np.array([[2.0, 3.0], [-1.0, 1.0]])).tolist() == [[2.5, 3.0], [-2.0, 4.0]]


def test_transfer_is_the_loop_over_points_and_ignores_a_factor() -> None:
    rng = np.random.default_rng(1)
    matrix = np.eye(3) + 0.1 * rng.standard_normal((3, 3))
    points = rng.uniform(0, 5, (4, 6, 2))
    wanted = np.empty_like(points)
    for place in np.ndindex(4, 6):
        x, y = points[place]
        u, v, w = (row[0] * x + row[1] * y + row[2] for row in matrix)
        wanted[place] = u / w, v / w
    for factor in (1, -7):
        found = HomographyPair("pair", Path("1.png"), Path("2.png"), factor * matrix).transfer(points)
        assert found.dtype == np.float64 and found.shape == (4, 6, 2)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_what_lies_behind_the_second_camera_is_nowhere() -> None:
    behind = pair((-1, 0, 0), (0, -1, 0), (-0.01, 0, 1))  # the third coordinate is 1 - x / 100
    moved = behind.transfer(np.array([[0.0, 0.0], [50.0, 20.0], [300.0, 20.0]]))
    assert moved[:2].tolist() == [[0, 0], [-100, -40]] and np.isnan(moved[2]).all()
    negative = pair((1, 0, 0), (0, 1, 0), (0, 0, -1))
    assert negative.transfer(np.array([[3.0, 4.0]])).tolist() == [[-3, -4]]


@pytest.mark.parametrize("names", [(), ("H_2_3",), ("H_1_", "H_1_a", "H_1_2.png")])
def test_no_homographies(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = make(tmp_path / "empty", dict.fromkeys(names, SHIFT), ("1.png", "2.png"))
    with pytest.raises(FileNotFoundError) as refused:
        load_homographies(folder)
    assert "root must hold files H_1_2, H_1_3" in str(refused.value) and repr(str(folder)) in str(refused.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="^root must be a folder, but there is no "):
        load_homographies(tmp_path / "absent")


def test_a_folder_of_sequences(tmp_path: Path) -> None:
    for name in ("v_wall", "i_lake"):
        make(tmp_path / name, {"H_1_2": SHIFT, "H_1_3": TILT}, ("1.png", "2.png", "3.png"))
    (tmp_path / "readme").mkdir()
    (tmp_path / "notes.txt").touch()
    names = ["i_lake 1-2", "i_lake 1-3", "v_wall 1-2", "v_wall 1-3"]
    assert [pair.name for pair in load_homographies(tmp_path)] == names


def test_the_flow_of_a_homography() -> None:
    """3 to the right and 2 up: of 4 x 5 pixels of a target as large, the rows from the third and all but 3 columns."""
    flow, seen = pair((1, 0, 3), (0, 1, -2), (0, 0, 1)).truth((5, 4), (5, 4))
    assert flow.shape == (5, 4, 2) and flow[seen].tolist() == [[3, -2]] * 3
    assert np.argwhere(seen).tolist() == [[2, 0], [3, 0], [4, 0]]
    with pytest.raises(ValueError, match=r"pair: no pixel of 1\.png lies in 2\.png by its homography"):
        pair((1, 0, 9), (0, 1, 0), (0, 0, 1)).truth((5, 4), (5, 4))


@pytest.mark.parametrize(("there", "number"), [("2.png", 1), ("1.png", 2)])
def test_a_photograph_is_missing(tmp_path: Path, there: str, number: int) -> None:
    folder = make(tmp_path / "wall", {"H_1_2": SHIFT}, (there,))
    with pytest.raises(FileNotFoundError) as refused:
        load_homographies(folder)
    assert str(refused.value) == f"{folder} has no photograph {number}.png (or .ppm, .jpg, .jpeg)"


@pytest.mark.parametrize(
    "text", ["", "1 0 0 0 1 0 0 0", "1 0 0 0 1 0 0 0 1 0", "1 0 0 0 1 0 0 0 nan", "a b c", "1,0,0"]
)
def test_a_file_that_holds_no_homography(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "wall", {"H_1_2": SHIFT, "H_1_3": text}, ("1.png", "2.png", "3.png"))
    with pytest.raises(ValueError) as refused:
        load_homographies(folder)
    assert str(refused.value).startswith(f"{folder / 'H_1_3'} must hold 3 x 3 ")


def test_the_check_says_all_that_is_wrong(tmp_path: Path) -> None:
    from PIL import Image

    folder = make(tmp_path / "wall", {"H_1_2": "1 0 0", "H_1_3": SHIFT, "H_1_4": SHIFT}, ())
    for number in (1, 2, 4):
        Image.new("RGB", (8, 6)).save(folder / f"{number}.png")
    report = check_pairs(tmp_path)
    assert [split.pairs for split in report.splits] == [1]
    assert report.wrong == [
        f"{folder / 'H_1_2'} must hold 3 x 3 finite numbers, got 3 values",
        f"{folder} has no photograph 3.png (or .ppm, .jpg, .jpeg)",
    ]


def test_a_binary_file(tmp_path: Path) -> None:
    folder = make(tmp_path / "wall", {}, ("1.png", "2.png"))
    (folder / "H_1_2").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="H_1_2 must hold 3 x 3 numbers: "):
        load_homographies(folder)


@pytest.mark.parametrize("name", ["boat", "v_dogman"])
def test_the_stored_sequences(shared: Path, name: str) -> None:
    pairs = load_homographies(shared / "data" / "dense" / name)
    assert [pair.name for pair in pairs] == [f"{name} 1-{number}" for number in range(2, 7)]
    middle = np.array([[200.0, 200.0]])
    assert all(np.abs(pair.transfer(middle)).max() < 1500 for pair in pairs)
