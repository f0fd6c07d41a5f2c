"""The reader of PF-WILLOW: made-up folders, everything it refuses, and the stored set against its other copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lpmflow.data import load_pairs
from lpmflow.data.pairs import beyond
from lpmflow.images import load_image

HEADER = ",".join(["imageA", "imageB", *(f"{axis}{side}{n}" for side in "AB" for axis in "XY" for n in range(1, 11))])
VALUES = [str(0.5 * value) for value in range(40)]


def make(root: Path, *lines: str, name: str = "test_pairs.csv", header: str = HEADER) -> Path:
    for image in ("car(G)/a.jpg", "car(G)/b.png", "duck(S)/a.jpg"):
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        (root / image).touch()
    file = root / name
    file.write_text("\n".join([header, *lines]), encoding="utf-8")
    return file


def line(
    source: str = "PF-WILLOW/car(G)/a.jpg", target: str = "PF-WILLOW/car(G)/b.png", values: list[str] = VALUES
) -> str:
    return ",".join([source, target, *values])


@pytest.mark.parametrize("name", ["test_pairs.csv", "test_pairs_pf.csv"])
@pytest.mark.parametrize("folder", ["PF-WILLOW/", "PF-dataset/", "data/PF-WILLOW/", ""])
def test_a_pair_is_read_as_written(tmp_path: Path, name: str, folder: str) -> None:
    make(tmp_path, line(f"{folder}car(G)/a.jpg", f"{folder}car(G)/b.png"), name=name)
    (pair,) = load_pairs("pf-willow", tmp_path, "test")
    assert (pair.name, pair.category) == ("000001-a-b:car(G)", "car(G)")
    assert (pair.source, pair.target) == (tmp_path / "car(G)" / "a.jpg", tmp_path / "car(G)" / "b.png")
    assert pair.source_points.tolist() == [[0.5 * n, 5 + 0.5 * n] for n in range(10)]
    assert pair.target_points.tolist() == [[10 + 0.5 * n, 15 + 0.5 * n] for n in range(10)]
    assert pair.point_ids is not None and pair.point_ids.tolist() == list(range(10))
    assert pair.source_box is pair.target_box is pair.source_size is None and not pair.flip


def test_pairs_are_in_the_order_of_the_list_and_named_apart(tmp_path: Path) -> None:
    make(tmp_path, line(), line(), line("car(G)/b.png", "car(G)/a.jpg"))
    pairs = load_pairs("pf-willow", tmp_path, "test")
    assert [pair.name for pair in pairs] == ["000001-a-b:car(G)", "000002-a-b:car(G)", "000003-b-a:car(G)"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (line(values=VALUES[:-1]), "must have 42 fields, got 41"),
        (line(values=["", *VALUES[1:]]), "coordinates must be numbers: "),
        (line(values=["nan", *VALUES[1:]]), "coordinates must be finite"),
        (line(target="duck(S)/a.jpg"), "both images must be of one sub-class, got "),
        (line("../a.jpg"), "must name a file below "),
    ],
)
def test_a_line_of_another_kind(tmp_path: Path, wrong: str, message: str) -> None:
    file = make(tmp_path, line(), "", wrong)
    with pytest.raises(ValueError) as refused:
        load_pairs("pf-willow", tmp_path, "test")
    assert str(refused.value).startswith(f"{file}, line 4: {message}")


def test_no_image(tmp_path: Path) -> None:
    file = make(tmp_path, line(target="PF-WILLOW/car(G)/c.jpg"))
    with pytest.raises(FileNotFoundError) as refused:
        load_pairs("pf-willow", tmp_path, "test")
    assert str(refused.value) == f"{file}, line 2: there is no file {tmp_path / 'car(G)' / 'c.jpg'}"


@pytest.mark.parametrize("header", ["source_image,target_image,class", ""])
def test_the_list_of_another_set(tmp_path: Path, header: str) -> None:
    make(tmp_path, line(), header=header)
    with pytest.raises(FileNotFoundError, match=r"^root must be a folder in the layout of PF-WILLOW, .* 42 columns$"):
        load_pairs("pf-willow", tmp_path, "test")


def test_the_stored_set(shared: Path) -> None:
    """All ordered pairs of the ten images of each sub-class; every point in its photograph."""
    pairs = load_pairs("pf-willow", shared / "data" / "PF-WILLOW", "test")
    assert len(pairs) == 900 == len({pair.name for pair in pairs})
    assert len({(pair.source, pair.target) for pair in pairs}) == 900
    assert sorted({pair.category for pair in pairs}) == sorted(
        ["car(G)", "car(M)", "car(S)", "duck(S)", "motorbike(G)", "motorbike(M)", "motorbike(S)"]
        + ["winebottle(M)", "winebottle(wC)", "winebottle(woC)"]
    )
    sizes = {path: tuple(load_image(path).shape[1:]) for path in {pair.source for pair in pairs}}
    for pair in pairs:
        assert pair.source.parent == pair.target.parent and pair.source != pair.target
        for points, path in ((pair.source_points, pair.source), (pair.target_points, pair.target)):
            assert not beyond(points, sizes[path]).any()


def test_the_two_stored_copies_agree(shared: Path) -> None:
    """Each of the 390 pairs that are also there in the layout of SPair-71k, point by point and pixel by pixel."""
    ours: dict[tuple[str, str], list[np.ndarray]] = {}
    for pair in load_pairs("pf-willow", shared / "data" / "PF-WILLOW", "test"):
        both = np.stack((pair.source_points, pair.target_points))
        ours.setdefault((pair.source.name, pair.target.name), []).append(both)
    theirs = load_pairs("spair", shared / "data" / "pairs", "test")
    assert len(theirs) == 390
    for pair in theirs:
        candidates = ours[pair.source.name, pair.target.name]  # sub-classes share photographs, marked apart
        points = np.stack((pair.source_points, pair.target_points))
        assert min(np.abs(candidate - points).max() for candidate in candidates) < 0.006  # rounded to hundredths
        assert pair.point_ids is not None and pair.point_ids.tolist() == list(range(10))
    for image in {path for pair in theirs for path in (pair.source, pair.target)}:
        same = list((shared / "data" / "PF-WILLOW").rglob(image.name))
        assert same and all(path.read_bytes() == image.read_bytes() for path in same)
