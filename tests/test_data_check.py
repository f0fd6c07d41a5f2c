"""`lpmflow data check`: made-up folders, right ones and ones with known mistakes, and the stored sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lpmflow import cli
from lpmflow.data.check import check_pairs, recognise


def picture(file: Path, width: int = 60, height: int = 40, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, **options)
    return file


def spair(root: Path, split: str, category: str, *, number: int = 1, **changed: Any) -> Path:
    """Add a pair of two photographs 60 x 40 with two points each; the annotation is returned."""
    for name in ("a.png", "b.png"):
        if not (root / "JPEGImages" / category / name).exists():
            picture(root / "JPEGImages" / category / name)
    fields = {
        "src_imname": "a.png",
        "trg_imname": "b.png",
        "src_kps": [[1, 2], [3.5, 4]],
        "trg_kps": [[5, 6], [7, 8]],
        "kps_ids": ["0", "4"],
        "src_bndbox": [0, 1, 9, 8],
        "trg_bndbox": [2, 3, 20, 30],
        "src_imsize": [60, 40, 3],
        **changed,
    }
    name = f"{number:06d}-a-b"
    file = root / "PairAnnotation" / split / f"{name}_{category}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(fields))
    layout = root / "Layout" / "large" / f"{split}.txt"
    layout.parent.mkdir(parents=True, exist_ok=True)
    with layout.open("a") as lines:
        lines.write(f"{name}:{category}\n")
    return file


RIGHT = """\
{root}: in the layout of SPair-71k
split        pairs       points  photographs   categories
val              1            2            2            1
test             3            6            4            2
val: cat 1
test: bus 1, cat 2
photographs: 4, from 60 x 40 to 60 x 40 pixels
points a little beyond the border of their photograph: 1
nothing is wrong
"""


def test_a_folder_that_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spair(tmp_path, "val", "cat", trg_kps=[[5, 6], [61, 8]])
    for number in (1, 2):
        spair(tmp_path, "test", "cat", number=number, src_imname="b.png", trg_imname="a.png")
    spair(tmp_path, "test", "bus", number=3)
    assert cli.main(["data", "check", str(tmp_path)]) == 0
    assert capsys.readouterr() == (RIGHT.format(root=tmp_path), "")


def test_all_that_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "JPEGImages"
    spair(tmp_path, "val", "cat")
    broken = spair(tmp_path, "val", "cat", number=2)
    broken.write_text("{")
    missing = spair(tmp_path, "val", "cat", number=3, trg_imname="c.png")
    spair(tmp_path, "val", "cat", number=4, kps_ids=["1", "1"])
    spair(tmp_path, "val", "bus", number=5, src_imsize=[61, 40, 3], trg_bndbox=[2, 3, 99, 30])
    spair(tmp_path, "val", "dog", number=6)
    (images / "dog" / "a.png").write_bytes((images / "dog" / "a.png").read_bytes()[:200])
    spair(tmp_path, "val", "dog", number=6)
    (tmp_path / "Layout" / "large" / "trn.txt").write_text("\n")
    assert cli.main(["data", "check", str(tmp_path)]) == 1
    said, errors = capsys.readouterr()
    wrong = said.partition("\nwrong: ")[2].splitlines()
    assert errors == "" and wrong[0] == "8" == str(len(wrong) - 1)
    expected = [
        f"{tmp_path / 'Layout' / 'large' / 'trn.txt'} lists no pair",
        f"{broken} must be JSON: Expecting property name",
        f"{missing}: there is no image {images / 'cat' / 'c.png'}",
        "val, 000006-a-b:dog: a pair must be listed once, and is listed 2 times",
        f"{images / 'dog' / 'a.png'} must be an image file, and cannot be decoded: ",
        "val, 000004-a-b:cat: a point must be marked once, got points [1, 1]",
        f"val, 000005-a-b:bus: {images / 'bus' / 'a.png'} must be 61 x 40, the size it was marked at, got 60 x 40",
        "val, 000005-a-b:bus: target_box[1] must lie in the photograph of 60 x 40, or beyond its border by at most ",
    ]
    for sentence in expected:
        assert sum(line.startswith(f"  {sentence}") for line in wrong[1:]) == 1, sentence


def test_the_rest_is_counted(tmp_path: Path) -> None:
    for number in range(27):
        spair(tmp_path, "val", "cat", number=number, kps_ids=["1", "1"])
    report = check_pairs(tmp_path)
    assert len(report.wrong) == 27
    lines = report.lines()
    assert lines[-1] == "  and 7 more" and len(lines) == lines.index("wrong: 27") + 22
    assert report.lines(cap=27)[-1].startswith("  val, 000026")


def test_a_missing_photograph_is_told_once(tmp_path: Path) -> None:
    for number in range(5):
        spair(tmp_path, "val", "cat", number=number)
    picture(tmp_path / "JPEGImages" / "cat" / "c.png")
    spair(tmp_path, "val", "cat", number=5, src_imname="c.png")
    image = tmp_path / "JPEGImages" / "cat" / "a.png"
    image.unlink()
    first = tmp_path / "PairAnnotation" / "val" / "000000-a-b_cat.json"
    assert check_pairs(tmp_path).wrong == [f"{first}: there is no image {image} (and 4 more want it)"]


def test_a_photograph_stored_on_its_side(tmp_path: Path) -> None:
    """60 x 40 pixels with an orientation that turns them: what is seen, and was marked, is 40 x 60."""
    turned = Image.Exif()
    turned[0x0112] = 6
    spair(tmp_path, "val", "cat", src_imsize=[40, 60, 3])
    picture(tmp_path / "JPEGImages" / "cat" / "a.png", exif=turned)
    assert check_pairs(tmp_path).wrong == []


def test_outlines_are_checked(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "101_ObjectCategories" / "ant" / name)
    names = "101_ObjectCategories/ant/a.jpg,101_ObjectCategories/ant/b.jpg"
    file = tmp_path / "test_pairs_caltech_with_category.csv"
    file.write_text(f'a,b,class,XA,YA,XB,YB\n{names},8,"1,9,9","1,1,9","1,9,9","1,1,9"\n')
    assert recognise(tmp_path) == "caltech-101" and check_pairs(tmp_path).wrong == []
    file.write_text(f'a,b,class,XA,YA,XB,YB\n{names},8,"1,9,9","1,1,9","100,109,109","1,1,9"\n')
    (wrong,) = check_pairs(tmp_path).wrong
    assert wrong.startswith("test, 000001-a-b:ant: mask must cover at least one pixel of 60 x 40, which the outline ")


def test_an_outline_is_near_its_photograph(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "101_ObjectCategories" / "ant" / name)
    names = "101_ObjectCategories/ant/a.jpg,101_ObjectCategories/ant/b.jpg"
    file = tmp_path / "test_pairs_caltech_with_category.csv"
    for far, wrong in ((90, 0), (9000, 1)):
        file.write_text(f'a,b,class,XA,YA,XB,YB\n{names},8,"1,{far},9","1,1,9","1,9,9","1,1,9"\n')
        assert len(check_pairs(tmp_path).wrong) == wrong
    (said,) = check_pairs(tmp_path).wrong
    assert said == (
        "test, 000001-a-b:ant: source_mask[1] must lie in the photograph of 60 x 40, or beyond its border by at most 1 "
        "of the longer side, got (9000, 1)"
    )


def test_a_pair_of_two_splits(tmp_path: Path) -> None:
    spair(tmp_path, "val", "cat")
    spair(tmp_path, "test", "cat", number=7)
    spair(tmp_path, "test", "bus", number=8)
    assert check_pairs(tmp_path).wrong == [
        "test, 000007-a-b:cat: a pair must be in one split, and val has its photographs too"
    ]


def test_annotations_without_their_list(tmp_path: Path) -> None:
    spair(tmp_path, "val", "cat")
    spair(tmp_path, "test", "bus")
    (tmp_path / "PairAnnotation" / "trn").mkdir()
    layout = tmp_path / "Layout" / "large" / "test.txt"
    layout.unlink()
    report = check_pairs(tmp_path)
    assert [split.name for split in report.splits] == ["val", "test"]
    assert report.wrong == [f"root must be a folder in the layout of SPair-71k, but there is no {layout}"]


def test_points_of_a_set_that_does_not_say_sizes(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "car(S)" / name)
    values = [*range(20), *range(19), 99]
    header = ",".join(f"c{n}" for n in range(42))
    (tmp_path / "test_pairs.csv").write_text(f"{header}\ncar(S)/a.jpg,car(S)/b.jpg,{','.join(map(str, values))}\n")
    assert recognise(tmp_path) == "pf-willow"
    (wrong,) = check_pairs(tmp_path).wrong
    assert wrong == (
        "test, 000001-a-b:car(S): target_points[9] must lie in the photograph of 60 x 40, or beyond its border by at "
        "most 0.1 of the longer side, got (9, 99)"
    )


def test_annotations_that_several_splits_share_are_wrong_once(tmp_path: Path) -> None:
    """AP-10K's three lists are read for each of its seven splits."""
    from test_ap10k import Set

    made = Set(tmp_path)
    for number in (1, 2):
        made.add(number, 1)
        picture(tmp_path / "data" / f"{number:012d}.jpg", 400, 300)
    made.add(3, 1, bbox=[1, 2])
    made.add(4, 1, into="val", keypoints=[])
    report = check_pairs(made.write())
    assert report.title == "AP-10K" and [split.pairs for split in report.splits] == [0, 0, 1, 0, 0, 0, 0]
    assert [sentence.rpartition(", ann")[2].partition(" must")[0] for sentence in report.wrong] == [
        "otation 1003: bbox",
        "otation 1004: keypoints",
    ]


def test_every_line_of_a_list_is_read(tmp_path: Path) -> None:
    from test_pf_pascal import ROW, make

    make(tmp_path, ROW, ROW.replace(",8", ",0"), ROW.replace("b.jpg", "c.jpg"), ROW.replace(",8", ""))
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "JPEGImages" / name, 80, 90)
    report = check_pairs(tmp_path)
    assert report.title == "PF-PASCAL" and report.splits[0].pairs == 1
    lines = [sentence.partition(", line ")[2].split(":")[0] for sentence in report.wrong]
    assert lines == ["3", "4", "5"]


@pytest.mark.parametrize(
    ("name", "what"),
    [("", " in the layout of one of spair, pf-pascal, "), ("absent", ", but there is no "), ("file", ", but ")],
)
def test_no_layout(tmp_path: Path, name: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["data", "check", str(tmp_path / name)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"lpmflow: error: root must be a folder{what}")


def test_a_layout_in_a_folder_of_the_folder_is_pointed_at(tmp_path: Path) -> None:
    spair(tmp_path / "mine", "val", "cat")
    with pytest.raises(FileNotFoundError, match="which '.*' is not; '.*mine' in it is in that of spair$"):
        check_pairs(tmp_path)


def test_a_layout_that_is_named_and_not_there(tmp_path: Path) -> None:
    spair(tmp_path, "val", "cat")
    for name, message in (
        ("pf-pascal", "^root must be a folder in the layout of PF-PASCAL, but there is no "),
        ("ap-10k", "^root must be a folder in the layout of AP-10K, but there is no "),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            check_pairs(tmp_path, name)
    with pytest.raises(ValueError, match="^benchmark must be one of spair, pf-pascal, "):
        check_pairs(tmp_path, "pascal")


def test_two_layouts_in_one_folder(tmp_path: Path) -> None:
    spair(tmp_path, "val", "cat")
    (tmp_path / "test_pairs_caltech.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="^benchmark must be given, spair or caltech-101: "):
        check_pairs(tmp_path)
    assert check_pairs(tmp_path, "spair").wrong == []


@pytest.mark.parametrize("argv", [["data"], ["data", "check"], ["data", "frob"]])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("lpmflow data") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("folder", "name", "pairs"), [("pairs", "spair", [180, 219, 390]), ("PF-WILLOW", "pf-willow", [900])]
)
def test_the_stored_sets(shared: Path, folder: str, name: str, pairs: list[int]) -> None:
    assert recognise(shared / "data" / folder) == name
    report = check_pairs(shared / "data" / folder)
    assert report.wrong == [] and report.beyond == 0
    assert [split.pairs for split in report.splits] == pairs
