"""A report on a screen and in files: what stands where, and that nobody takes a subset for the official split."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpmflow.benchmark import Report, check_folder, check_writable, write
from lpmflow.benchmark.report import keypoint_rows
from lpmflow.data import KeypointPair
from lpmflow.evaluation import protocol, score
from lpmflow.evaluation.published import SPAIR_CATEGORIES, SPAIR_TABLE, SPAIR_TEST_PAIRS, is_spair_test

SIZE = (200, 200)


def make(categories: list[str], benchmark: str = "spair", official: bool = False, rule: str = "spair") -> Report:
    """Pairs of two points: a category's first pair meets both, its others meet one and miss one by half the box."""
    pairs, landed, seen = [], [], set()
    points, box = np.array([[10.0, 10.0], [110.0, 60.0]]), np.array([0.0, 0.0, 100.0, 50.0])
    for number, category in enumerate(categories):
        levels = {"viewpoint": number % 2}
        pairs.append(
            KeypointPair(f"{number}", category, Path("a"), Path("b"), points, points, box, box, difficulty=levels)
        )
        landed.append(points + [[0, 0], [0 if category not in seen else 50, 0]])
        seen.add(category)
    scores = score(protocol(rule), pairs, landed, [(SIZE, SIZE)] * len(pairs))
    return Report(
        benchmark=benchmark,
        root="folder",
        split="test",
        pairs=len(pairs),
        points=2 * len(pairs),
        categories=len(seen),
        model="mine",
        model_hash="0123456789abcdef",
        dataset_hash="fedcba9876543210",
        official=official,
        protocols={rule: protocol(rule).as_dict()},
        alphas={rule: (0.05, 0.1)},
        rows=keypoint_rows(scores, (0.05, 0.1)),
    )


SMALL = make(["tvmonitor", "cat", "cat"])


def test_the_summary() -> None:
    lines = SMALL.lines()
    assert lines[0] == "spair test of folder: 3 pairs, 6 points, 2 categories"
    assert lines[1] == "model mine, 0123456789abcdef"
    assert lines[3].startswith(
        "spair: source to target, distance <= alpha x the longer side of the target object's box"
    )
    assert lines[5].split("  ")[0] == "PCK at alpha"
    assert lines[7].split()[:2] == ["0.1", "83.3"]  # (100 + 100 + 50) / 3


def test_categories_stand_in_the_papers_order() -> None:
    header, image, point = (
        line for line in SMALL.lines() if line.startswith(("PCK@0.1", "mine, per image", "mine, per point"))
    )
    assert header.split() == ["PCK@0.1", "cat", "tv", "|", "all"]
    assert image.split() == ["mine,", "per", "image", "75.0", "100.0", "|", "83.3"]
    assert point.split() == ["mine,", "per", "point", "75.0", "100.0", "|", "83.3"]
    assert header.index("|") == image.index("|") == point.index("|")


def test_what_papers_do_not_measure_is_not_followed_by_their_figures() -> None:
    """`spair` is no protocol of theirs, and nobody takes the identity for a method."""
    assert "Papers" not in "\n".join(SMALL.lines())
    nothing = dataclasses.replace(make(["cat"], rule="lpmflow"), model="identity", model_hash="identity")
    assert "Papers" not in "\n".join(nothing.lines()) and nothing.lines()[1] == "model identity"
    assert "\n- model: identity\n" in nothing.to_markdown()


def test_one_of_a_kind() -> None:
    one = make(["cat"])
    assert one.lines()[0] == "spair test of folder: 1 pair, 2 points, 1 category"
    assert "- data: folder, 1 pair, 2 points, hash" in one.to_markdown()
    dense = dataclasses.replace(SMALL, benchmark="dense", pairs=1, points=1, categories=1, protocols={}, alphas={})
    assert dense.lines()[0] == "dense test of folder: 1 pair, 1 pixel, 1 folder"


def test_two_names_of_one_rule_are_said_to_be_one() -> None:
    rules = {name: protocol(name).as_dict() for name in ("spair", "lpmflow", "dift")}
    rows = [row for name in rules for row in (dataclasses.replace(one, protocol=name) for one in SMALL.rows)]
    both = dataclasses.replace(SMALL, protocols=rules, alphas=dict.fromkeys(rules, (0.05, 0.1)), rows=rows)
    said = "(the same rule as spair, so the same figures)"
    for text in (" ".join("\n".join(both.lines()).split()), both.to_markdown()):
        assert text.count("the same rule as") == 1 and f"{protocol('dift').rule[7:]} {said}" in text


def test_a_subset_is_not_shown_beside_the_papers() -> None:
    subset = make(["tvmonitor", "cat", "cat"], rule="lpmflow")
    text = "\n".join(subset.lines())
    assert "(paper)" not in text
    note = " ".join(text[text.index("Papers,") :].split())
    assert note.startswith(
        "Papers, for the official test split of 12,234 pairs, which this is not, PCK@0.1 per image by their own "
        "protocols (lpmflow or cats):"
    )
    assert note.endswith("NC-Net 20.1.") and "LPMFlow 65.6, ACTR 62.1" in note
    assert "Not the official test split of SPair-71k" in subset.to_markdown()


def test_the_official_split_is_shown_beside_the_papers() -> None:
    report = make([name for name in SPAIR_CATEGORIES for _ in range(2)], official=True)
    lines = report.lines()
    header = next(line for line in lines if line.startswith("PCK@0.1 "))
    names = "aero bike bird boat bott bus car cat chai cow dog hors mbik pers plan shee trai tv | all"
    assert " ".join(header.split()[1:]) == names
    paper = next(line for line in lines if line.startswith("LPMFlow (paper)"))
    figures = "71.4 54.8 83.2 50.3 57.0 75.4 68.9 79.3 41.1 78.4 74.1 73.7 58.7 56.9 48.7 54.7 87.5 74.6 | 65.6"
    assert " ".join(paper.split()[2:]) == figures
    actr = next(line for line in lines if line.startswith("ACTR (paper)"))
    assert actr.split()[2:] == ["-"] * 18 + ["|", "62.1"]
    assert len([line for line in lines if "(paper) " in line]) == len(SPAIR_TABLE) == 11
    assert "Papers," not in "\n".join(lines) and "Not the official" not in report.to_markdown()
    assert max(map(len, lines)) <= 150


@pytest.mark.parametrize(
    ("rule", "other"), [("spair", ", not by spair"), ("geoaware", ", not by geoaware"), ("lpmflow", "")]
)
def test_the_papers_rows_say_by_which_protocol_they_are(rule: str, other: str) -> None:
    report = make([name for name in SPAIR_CATEGORIES for _ in range(2)], official=True, rule=rule)
    note = f"(paper): PCK@0.1 per image as published, by lpmflow or cats{other}."
    lines = report.lines()
    assert lines[next(n for n, line in enumerate(lines) if line.startswith("NC-Net (paper)")) + 1] == note
    text = report.to_markdown()
    figures = "71.4 54.8 83.2 50.3 57.0 75.4 68.9 79.3 41.1 78.4 74.1 73.7 58.7 56.9 48.7 54.7 87.5 74.6 65.6"
    assert f"| LPMFlow (paper) | {' | '.join(figures.split())} |\n| ACTR (paper) | - |" in text
    assert f"\n\n{note}\n" in text and "(paper)" not in SMALL.to_markdown()


def test_both_averages_of_dagger_are_shown() -> None:
    """Both points of a pair land beside the second, which is right for that alone; a pair of one point is met."""
    box = np.array([0.0, 0.0, 100.0, 50.0])
    marked = [np.array([[10.0, 10.0], [60.0, 10.0]]), np.array([[10.0, 10.0]])]
    pairs = [
        KeypointPair(str(n), "cat", Path("a"), Path("b"), points, points, box, box) for n, points in enumerate(marked)
    ]
    scores = score(protocol("spair"), pairs, [marked[0][[1, 1]] + [0, 10], marked[1]], [(SIZE, SIZE)] * 2)
    report = dataclasses.replace(SMALL, alphas={"spair": (1.0,)}, rows=keypoint_rows(scores, (1.0,)))
    header, row = next(
        (line, below) for line, below in zip(report.lines(), report.lines()[1:], strict=False) if "dagger" in line
    )
    assert header.endswith("  dagger, per image  per point") and row.split()[-2:] == ["75.0", "66.7"]
    assert "| dagger, per image | per point |\n" in report.to_markdown() and "| 75.0 | 66.7 |\n" in report.to_markdown()


def test_what_is_the_official_split() -> None:
    official = official_pairs()
    assert len(official) == 12234 and is_spair_test(official)
    assert not is_spair_test(official[:-1]) and not is_spair_test([])
    assert not is_spair_test([*official[:-1], official[0]]) and not is_spair_test([*official, official[0]])


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "000000-2008_000000-2008_000001:cat"},  # not its own category
        {"name": "000000-2008_000000-2008_000001_aeroplane"},
        {"name": "000001-2008_000000-2008_000001:aeroplane"},  # the number of another pair
        {"name": "000000-2008_000002-2008_000001:aeroplane"},  # not its own photographs
        {"name": "000000-2008_000000-2008_000000:aeroplane", "target": Path("2008_000000.jpg")},
        {"name": "000000-2008_000000-2008_000002:aeroplane", "target": Path("2008_000002.jpg")},  # a pair there is
        {"category": "cup"},
        {"difficulty": {}},
        {"difficulty": {"viewpoint": 0, "scale": 0, "truncation": 0}},
        {"point_ids": None},
    ],
)
def test_a_single_pair_that_is_not_of_the_official_split(fields: dict[str, Any]) -> None:
    first, *others = official_pairs()
    assert is_spair_test([first, *others])
    assert not is_spair_test([dataclasses.replace(first, **fields), *others])


def test_pairs_of_too_many_photographs_are_not_the_official_split() -> None:
    assert not is_spair_test(official_pairs(photographs=101))


def official_pairs(photographs: int = 30) -> list[KeypointPair]:
    """Pairs with the official counts, called as the official ones, between so many photographs of each category."""
    points, pairs = np.array([[1.0, 1.0]]), []
    levels = {"viewpoint": 0, "scale": 0, "truncation": 0, "occlusion": 0}
    for category, count in SPAIR_TEST_PAIRS.items():
        ordered = [(a, (a + step) % photographs) for step in range(1, photographs) for a in range(photographs)]
        for a, b in sorted(ordered[:count]):
            names = f"2008_{a:06d}", f"2008_{b:06d}"
            name = f"{len(pairs):06d}-{names[0]}-{names[1]}:{category}"
            images = [Path(f"{one}.jpg") for one in names]
            pairs.append(
                KeypointPair(name, category, *images, points, points, point_ids=np.array([0]), difficulty=levels)
            )
    return pairs


def test_categories_of_another_data_set_stand_below_each_other() -> None:
    lines = make(["duck(S)", "car(G)", "car(G)"], "pf-willow", rule="pf-willow").lines()
    at = next(index for index, line in enumerate(lines) if line.startswith("category, PCK@0.1"))
    assert lines[at + 1].split() == ["car(G)", "2", "75.0", "75.0"]
    assert lines[at + 2].split() == ["duck(S)", "1", "100.0", "100.0"] and "Papers" not in "\n".join(lines)


def test_difficulties() -> None:
    lines = SMALL.lines()
    at = next(index for index, line in enumerate(lines) if line.startswith("difficulty, PCK@0.1"))
    assert lines[at + 1].split() == ["viewpoint", "0", "2", "75.0", "75.0"]
    assert lines[at + 2].split() == ["viewpoint", "1", "1", "100.0", "100.0"]


def test_files_say_what_was_measured_and_by_what(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.json", "a.csv", "a.md")]
    write(SMALL, *files)
    read = json.loads(files[0].read_text())
    assert read["model_hash"] == "0123456789abcdef" and read["protocols"]["spair"]["extent"] == "target box"
    assert {"lpmflow", "python", "torch", "numpy"} <= set(read["versions"]) and read["date"].endswith("+00:00")
    assert read["rows"] == [dataclasses.asdict(row) for row in SMALL.rows]
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert len(rows) == len(SMALL.rows) == 12
    assert [float(row["per_image"]) for row in rows] == [row.per_image for row in SMALL.rows]
    shared = {name: SMALL.versions[name] for name in ("lpmflow", "python", "torch", "timm", "numpy", "pillow")}
    shared |= {"model_hash": "0123456789abcdef", "dataset_hash": "fedcba9876543210", "date": SMALL.date}
    shared |= {"root": "folder", "protocol": "spair", "rule": protocol("spair").rule}
    assert all(row[name] == value for row in rows for name, value in shared.items())
    text = files[2].read_text()
    for part in ("`0123456789abcdef`", "`fedcba9876543210`", SMALL.date, "| cat | 2 | 75.0 | 75.0 |", "## spair"):
        assert part in text
    assert sorted(tmp_path.iterdir()) == sorted(files)


RUN = {
    "weights": "mine.safetensors",
    "image_size": [192, 256],
    "dtype": "bfloat16",
    "device": "cuda",
    "batch_size": 4,
    "groups": "groups.json",
    "options": {"benchmark": "spair", "root": "two words", "protocol": ["spair", "cats"], "image_size": 192},
}


def test_a_report_says_how_the_model_was_run() -> None:
    report = dataclasses.replace(SMALL, settings=RUN)
    said = "weights mine.safetensors, 192 x 256 pixels, bfloat16 on cuda, batches of 4, groups groups.json"
    assert report.lines()[1] == f"model mine, 0123456789abcdef, {said}"
    text = report.to_markdown()
    command = "lpmflow evaluate --benchmark spair --root 'two words' --protocol spair cats --image-size 192"
    assert f"\n- run: {said}\n- command: `{command}`\n" in text
    assert json.loads(report.to_json())["settings"] == RUN
    row = next(csv.DictReader(report.to_csv().splitlines()))
    columns = ("weights", "backbone", "readout", "image_size", "dtype", "device", "batch_size", "groups")
    assert [row[name] for name in columns] == [
        "mine.safetensors", "", "", "192x256", "bfloat16", "cuda", "4", "groups.json",
    ]  # fmt: skip
    zero = dataclasses.replace(SMALL, settings={"weights": "timm's vit", "backbone": "vit", "readout": "nearest"})
    assert zero.lines()[1].endswith(", weights timm's vit, backbone vit, readout nearest")
    assert "- run" not in SMALL.to_markdown() and "- command" not in SMALL.to_markdown()


def test_a_file_that_cannot_be_written_is_named_after_all_have_been_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if text.startswith("{"):
            raise OSError(28, "No space left on device")
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"^a\.json could not be written: No space left on device$"):
        write(SMALL, "a.json", "a.csv", "a.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.md"]


@pytest.mark.skipif(os.name != "posix", reason="devices of POSIX")
def test_devices_may_be_written_to() -> None:
    check_writable({"json": "/dev/null"})
    with pytest.raises(FileNotFoundError, match="^json must name a file that can be written, got '/dev/absent': No su"):
        check_writable({"json": "/dev/absent"})


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable({"json": None, "csv": tmp_path / "a"})
    with pytest.raises(FileNotFoundError, match="^csv must name a file in an existing folder, got "):
        check_writable({"json": tmp_path / "a", "csv": tmp_path / "no" / "a"})
    with pytest.raises(IsADirectoryError, match="^json must name a file, got the folder "):
        check_writable({"json": tmp_path})
    with pytest.raises(OSError, match="^json must name a file that can be written, got 'a+': File name too long"):
        check_writable({"json": "a" * 300})

    def refuse(dir: Path) -> None:
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match="^json must name a file that can be written, got '.*a': Read-only file system$"):
        check_writable({"json": tmp_path / "a"})


def test_a_file_that_two_arguments_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("a")
    for other in ("a", "./a", str(tmp_path / "a"), "link"):
        with pytest.raises(ValueError, match="^json must name another file than predictions, got "):
            check_writable({"predictions": "a", "json": other, "csv": "b"})


def test_a_place_where_no_folder_can_be(tmp_path: Path) -> None:
    check_folder("worst", tmp_path)
    check_folder("worst", tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(NotADirectoryError, match="^worst must be a folder, or a place for one, but '.*file' is a "):
            check_folder("worst", path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_alpha_of_ones_own() -> None:
    report = dataclasses.replace(
        SMALL, alphas={"spair": (0.05,)}, rows=[row for row in SMALL.rows if row.alpha == 0.05]
    )
    text = "\n".join(report.lines())
    assert "PCK@0.05" in text and "PCK@0.1" not in text and "Papers" not in text
