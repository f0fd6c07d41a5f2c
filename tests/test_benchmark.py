"""`lpmflow evaluate`: made-up folders and a network of known shift, so that every figure of the report is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lpmflow
from lpmflow import benchmark, cli
from lpmflow.data import load_homographies, load_spair

pytestmark = pytest.mark.usefixtures("one_thread")

Point = tuple[float, float]


def picture(file: Path, width: int = 96, height: int = 96) -> None:
    """Gray everywhere: between pictures of one colour the fake network's shift is exact. Its grid is 96 x 96."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (128, 128, 128)).save(file)


def keypoints(root: Path, pairs: list[tuple[list[Point], list[Point]]], target: tuple[int, int] = (96, 96)) -> Path:
    """A folder in SPair-71k's layout; all boxes have a longer side of 100."""
    names = []
    for number, (source_points, target_points) in enumerate(pairs):
        name = f"{number:06d}-a-b"
        picture(root / "JPEGImages" / "cup" / f"a{number}.png")
        picture(root / "JPEGImages" / "cup" / f"b{number}.png", *target)
        fields = {"src_imname": f"a{number}.png", "trg_imname": f"b{number}.png"}
        boxes = {"src_bndbox": [0, 0, 50, 30], "trg_bndbox": [-10, 5, 20, 105]}
        file = root / "PairAnnotation" / "val" / f"{name}_cup.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**fields, **boxes, "src_kps": source_points, "trg_kps": target_points}))
        names.append(f"{name}:cup")
    (root / "Layout" / "large").mkdir(parents=True)
    (root / "Layout" / "large" / "val.txt").write_text("\n".join(names))
    return root


@pytest.fixture
def shifted(make_fake_model: Any) -> lpmflow.Matcher:
    """Finds everything 3 cells to the right and 2 up."""
    return lpmflow.Matcher(make_fake_model((3.0, -2.0)), "cpu")


# Four keypoints that miss by 0, 4.9, 9.9 and 16 pixels, one that is met, and two that miss by 4.9 (2.94 to the right,
# 3.92 down) and 40. None lies on a border, which rounding inside the network might cross.
THREE: list[tuple[list[Point], list[Point]]] = [
    ([(10, 20), (11, 21), (50, 60), (90, 8)], [(13, 18), (18.9, 19), (53, 48.1), (77, 6)]),
    ([(4.5, 40)], [(7.5, 38)]),
    ([(30, 30), (20, 20)], [(35.94, 31.92), (63, 18)]),
]
# within 1: 1 of 4, 1 of 1, 0 of 2; within 5: 2 of 4, 1 of 1, 1 of 2; within 10: 3 of 4, 1, 1 of 2; within 15: the same
REPORT = """\
{title}: 3 pairs, 7 keypoints; correct is distance <= alpha x longer side of the target box
alpha   per image   per keypoint
0.01       41.7 %         28.6 %
0.05       66.7 %         57.1 %
0.1        75.0 %         71.4 %
0.15       75.0 %         71.4 %
"""


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_pck_of_known_misses(tmp_path: Path, shifted: lpmflow.Matcher, batch_size: int) -> None:
    lines: list[str] = []
    root = keypoints(tmp_path, THREE)
    benchmark.run("spair", root, shifted, batch_size=batch_size, say=lines.append)
    assert "\n".join(lines) + "\n" == REPORT.format(title=f"{root}, val")
    batches = [call["shape"][0] for call in shifted.model.calls]  # type: ignore[operator, union-attr]
    assert batches == {1: [1, 1, 1], 2: [2, 1], 8: [3]}[batch_size]


def test_the_scores_are_returned(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    pairs = load_spair(keypoints(tmp_path, THREE), "val")
    scores = benchmark.report_keypoints(pairs, shifted, batch_size=2, say=str, title="")
    assert list(scores) == [0.01, 0.05, 0.1, 0.15]
    assert [score.per_image for score in scores.values()] == pytest.approx([125 / 3, 200 / 3, 75, 75])
    assert [score.per_point for score in scores.values()] == pytest.approx([200 / 7, 400 / 7, 500 / 7, 500 / 7])
    assert {(score.pairs, score.points) for score in scores.values()} == {(3, 7)}


def test_the_miss_is_measured_in_pixels_of_the_target(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """A target twice as wide and three times as high: x -> 2 (x + 3 + 0.5) - 0.5, y -> 3 (y - 2 + 0.5) - 0.5."""
    root = keypoints(tmp_path, [([(10, 10), (10, 10)], [(26.5, 25), (26.5 + 4, 25 + 4)])], target=(192, 288))
    scores = benchmark.report_keypoints(load_spair(root, "val"), shifted, batch_size=1, say=str, title="")
    assert (scores[0.05].per_point, scores[0.1].per_point) == (50, 100)  # misses of 0 and 5.7 pixels


def test_points_beyond_the_border_are_moved_onto_it(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """(-4, 50) counts as (-0.5, 50) and (40, 99) as (40, 95.5)."""
    root = keypoints(tmp_path, [([(-4, 50), (40, 99)], [(2.5 + 4.9, 48), (43, 93.5 - 5.1)])])
    scores = benchmark.report_keypoints(load_spair(root, "val"), shifted, batch_size=1, say=str, title="")
    assert (scores[0.05].per_point, scores[0.1].per_point) == (50, 100)


def sequence(folder: Path, **homographies: str) -> Path:
    picture(folder / "1.png")
    for name, text in homographies.items():
        picture(folder / f"{name[4:]}.png")
        (folder / name).write_text(text)
    return folder


MET, TWO_OFF = "1 0 3 0 1 -2 0 0 1", "1 0 3 0 1 -4 0 0 1"
STRETCHED = "2 0 0 0 1 -2 0 0 1"
# STRETCHED sends x to 2 x; 48 columns are seen, and the shift by 3 misses by |x - 3|: at most 0.96 in one of them, at
# most 4.8 in eight, and half of them by 20 or less, half by 21 or more.
SHARES = """\
                   within 1 %    within 5 %   median error
v_wall 1-2             100.0 %       100.0 %   0.0 px
v_wall 1-3               0.0 %       100.0 %   2.0 px
v_wall 1-4               2.1 %        16.7 %   20.5 px
"""


def test_shares_of_known_misses(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    lines: list[str] = []
    folder = sequence(tmp_path / "v_wall", H_1_2=MET, H_1_3=TWO_OFF, H_1_4=STRETCHED)
    benchmark.run("hpatches", folder, shifted, batch_size=2, say=lines.append)
    assert [line.split() for line in lines] == [line.split() for line in SHARES.splitlines()]
    assert len({line.index("%") for line in lines[1:]}) == 1  # in columns


def test_only_pixels_seen_in_the_target_count(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    pairs = load_homographies(sequence(tmp_path / "v_wall", H_1_2=MET, H_1_3=TWO_OFF, H_1_4=STRETCHED))
    errors = benchmark.report_homographies(pairs, shifted, batch_size=8, say=str)
    assert list(errors) == ["v_wall 1-2", "v_wall 1-3", "v_wall 1-4"]
    assert [len(error) for error in errors.values()] == [93 * 94, 93 * 92, 48 * 94]
    np.testing.assert_allclose(errors["v_wall 1-3"], 2 / 96, atol=1e-6)
    wanted = np.tile(np.abs(np.arange(48) - 3) / 96, 94)
    np.testing.assert_allclose(errors["v_wall 1-4"], wanted, atol=1e-6)


def test_a_homography_that_shows_nothing(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    folder = sequence(tmp_path / "v_wall", H_1_2="1 0 500 0 1 0 0 0 1")
    with pytest.raises(ValueError, match=r"v_wall 1-2: no pixel of .*1\.png lies in .*2\.png by its homography"):
        benchmark.run("hpatches", folder, shifted, say=str)


@pytest.mark.parametrize("name", ["pascal", "", "SPair"])
def test_an_unknown_benchmark(tmp_path: Path, shifted: lpmflow.Matcher, name: str) -> None:
    with pytest.raises(ValueError) as refused:
        benchmark.run(name, tmp_path, shifted)
    assert str(refused.value) == f"benchmark must be one of {', '.join(benchmark.BENCHMARKS)}, got {name!r}"


def test_an_unknown_split(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    with pytest.raises(ValueError, match="split must be one of trn, val, test, got 'train'"):
        benchmark.run("spair", tmp_path, shifted, split="train")


@pytest.mark.parametrize("kind", ["spair", "hpatches"])
@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing(tmp_path: Path, shifted: lpmflow.Matcher, kind: str, batch_size: int) -> None:
    said: list[str] = []
    keypoints(tmp_path, THREE)
    sequence(tmp_path, H_1_2=MET)
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        benchmark.run(kind, tmp_path, shifted, batch_size=batch_size, say=said.append)
    assert said == []


# The command


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, shifted: lpmflow.Matcher) -> list[dict[str, Any]]:
    """What the command line asked `Matcher` for; it gets the fake."""
    recorded: list[dict[str, Any]] = []

    def make(**options: Any) -> lpmflow.Matcher:
        recorded.append(options)
        return shifted

    monkeypatch.setattr("lpmflow.matcher.Matcher", make)
    return recorded


def test_the_command_prints_the_report(
    tmp_path: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(keypoints(tmp_path, THREE))
    options = ["--model", "mine.safetensors", "--device", "cpu", "--dtype", "bfloat16", "--batch-size", "2"]
    assert cli.main(["evaluate", "--benchmark", "spair", "--root", root, *options]) == 0
    assert capsys.readouterr() == (REPORT.format(title=f"{root}, val"), "")
    assert asked == [{"model": "mine.safetensors", "device": "cpu", "dtype": "bfloat16", "image_size": None}]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--benchmark", "spair", "--root", "absent"], "root must be a folder in the layout of SPair-71k"),
        (["--benchmark", "hpatches", "--root", "absent"], "folder must hold files H_1_2"),
        (["--benchmark", "spair", "--root", ".", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--benchmark", "hpatches", "--root", ".", "--batch-size", "-3"], "batch_size must be at least 1, got -3"),
    ],
)
def test_an_error_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *argv]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"lpmflow: error: {message}") and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --benchmark, --root"),
        (["--benchmark", "spair", "--root", ".", "--batch-size", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_usage_exits_with_2(
    asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", *argv])
    assert stopped.value.code == 2 and message in capsys.readouterr().err and asked == []


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "\n  lpmflow evaluate --benchmark spair --root " in shown
    assert all(name in shown for name in benchmark.BENCHMARKS)


def test_photographs_of_another_size_than_the_annotation_says(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    root = keypoints(tmp_path, THREE)
    file = root / "PairAnnotation" / "val" / "000001-a-b_cup.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "src_imsize": [96, 96, 3], "trg_imsize": [96, 48, 3]}))
    with pytest.raises(ValueError, match=r"b1\.png must be 96 x 48, the size it was marked at, got 96 x 96"):
        benchmark.report_keypoints(load_spair(root, "val"), shifted, batch_size=2, say=str, title="")
