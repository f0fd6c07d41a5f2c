"""`lpmflow evaluate` where every pixel is known: a network of known shift, so that every figure can be worked out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_pairs import picture

import lpmflow
from lpmflow import cli
from lpmflow.benchmark import World, evaluate_dense
from lpmflow.benchmark.dense import MEASURES
from lpmflow.identity import IdentityMatcher

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shifted(make_fake_model: Any) -> lpmflow.Matcher:
    """Finds everything 3 cells to the right and 2 up; its grid is 96 x 96, as the pictures are."""
    return lpmflow.Matcher(make_fake_model((3.0, -2.0)), "cpu")


def sequence(folder: Path, **homographies: str) -> Path:
    picture(folder / "1.png")
    for name, text in homographies.items():
        picture(folder / f"{name[4:]}.png")
        (folder / name).write_text(text)
    return folder


# STRETCHED sends x to 2 x; 48 columns are seen, and the shift by 3 misses by |x - 3|: at most 0.96 in one of them, at
# most 4.8 in eight (0 to 7), at most 1, 3 and 5 in three, seven and nine, and more than 3 and 5 % of x in all others:
# 41, for a miss of 4 and more is more than 5 % of the 100 at most.
HOMOGRAPHIES = {
    "H_1_2": "1 0 3 0 1 -2 0 0 1",
    "H_1_3": "1 0 3 0 1 -4 0 0 1",
    "H_1_4": "2 0 0 0 1 -2 0 0 1",
}
MISSES = np.abs(np.arange(48) - 3)
FIGURES = {
    "v_wall 1-2": (93 * 94, [0, 0, 100, 100, 100, 100, 100, 0]),
    "v_wall 1-3": (93 * 92, [2, 2, 0, 100, 100, 0, 100, 0]),
    "v_wall 1-4": (
        48 * 94,
        [MISSES.mean(), np.median(MISSES), *(100 * n / 48 for n in (3, 7, 9, 1, 8)), 100 * 41 / 48],
    ),
}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_figures_by_hand(tmp_path: Path, shifted: lpmflow.Matcher, batch_size: int) -> None:
    folder = sequence(tmp_path / "v_wall", **HOMOGRAPHIES)
    report = evaluate_dense("hpatches", folder, shifted, batch_size=batch_size)
    for index, measure in enumerate(MEASURES):
        rows = report.select("hpatches", measure, "pair")
        assert [(row.name, row.points) for row in rows] == [(name, pixels) for name, (pixels, _) in FIGURES.items()]
        wanted = np.array([figures[index] for _, figures in FIGURES.values()])
        np.testing.assert_allclose([row.per_image for row in rows], wanted, atol=1e-4)
        (total,) = report.select("hpatches", measure)
        assert total.per_image == pytest.approx(wanted.mean(), abs=1e-4)
        counts = np.array([pixels for pixels, _ in FIGURES.values()])
        if measure == "median":
            assert total.per_point is None
        else:
            assert total.per_point == pytest.approx((wanted * counts).sum() / counts.sum(), abs=1e-4)
    assert (report.pairs, report.points, report.model) == (3, 93 * 94 + 93 * 92 + 48 * 94, "fake")
    assert len(shifted.model.calls) == -(-3 // batch_size)  # type: ignore[arg-type]


def test_a_flow_of_its_own_size(tmp_path: Path) -> None:
    """The identity between photographs of 40 x 20 and 80 x 20 moves x to 2 x + 0.5; where the flow says 10, it misses
    by |x - 9.5|. Only a row is known."""
    picture(tmp_path / "1.png", 40, 20)
    picture(tmp_path / "2.png", 80, 20)
    flow, valid = np.full((20, 40, 2), [10.0, 0.0], np.float32), np.zeros((20, 40), bool)
    valid[7] = True
    np.savez(tmp_path / "flow.npz", flow=flow, valid=valid)
    report = evaluate_dense("dense", tmp_path, IdentityMatcher())
    misses = np.abs(np.arange(40) - 9.5)
    found = {measure: report.select("dense", measure)[0].per_image for measure in MEASURES}
    assert report.points == 40 and found["EPE"] == pytest.approx(misses.mean(), abs=1e-4)
    assert found["median"] == pytest.approx(np.median(misses), abs=1e-4)
    assert found["within 3 px"] == pytest.approx(100 * (misses <= 3).mean())
    assert found["within 5 %"] == pytest.approx(100 * (misses <= 4).mean())
    assert found["Fl"] == pytest.approx(100 * (misses > 3).mean())


def test_a_limit_is_said(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    report = evaluate_dense("hpatches", sequence(tmp_path / "v_wall", **HOMOGRAPHIES), shifted, limit=2)
    assert [row.name for row in report.select("hpatches", "EPE", "pair")] == ["v_wall 1-2", "v_wall 1-3"]
    assert (report.pairs, report.of_pairs) == (2, 3) and report.lines()[1].startswith("ONLY 2 OF 3 PAIRS (limit)")


class Two(World):
    """The second of two processes, whose first has done its share: it answers with what `first` recorded."""

    first: list[Any] = []

    def gather(self, value: Any) -> list[Any]:
        return [self.first.pop(0), value]


class Recorder(World):
    def gather(self, value: Any) -> list[Any]:
        Two.first.append(value)
        return [value, []]


def test_processes_share_the_pairs(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    folder = sequence(tmp_path / "v_wall", **HOMOGRAPHIES)
    whole = evaluate_dense("hpatches", folder, shifted, batch_size=1)
    with pytest.raises(KeyError):  # nobody answered for the second process
        evaluate_dense("hpatches", folder, shifted, batch_size=1, world=Recorder(0, 2))
    assert evaluate_dense("hpatches", folder, shifted, batch_size=1, world=Two(1, 2)).rows == whole.rows


def test_a_process_that_fails_stops_the_others(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    folder = sequence(tmp_path / "v_wall", **HOMOGRAPHIES)
    Two.first = [OSError("no photograph")]
    with pytest.raises(RuntimeError, match="^process 0 of 2 failed: no photograph$"):
        evaluate_dense("hpatches", folder, shifted, world=Two(1, 2))


def test_the_hash_changes_with_truth_and_photographs(tmp_path: Path) -> None:
    folder = sequence(tmp_path / "v_wall", **HOMOGRAPHIES)

    def found() -> str:
        return evaluate_dense("hpatches", folder, IdentityMatcher()).dataset_hash

    first = found()
    assert found() == first
    (folder / "H_1_3").write_text("1 0 3 0 1 -4.5 0 0 1")
    second = found()
    picture(folder / "4.png", 95)
    assert len({first, second, found()}) == 3


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shifted: lpmflow.Matcher, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lpmflow.matcher.Matcher", lambda **options: shifted)
    folder = sequence(tmp_path / "v_wall", **HOMOGRAPHIES)
    files = {name: tmp_path / name for name in ("json", "csv", "markdown")}
    options = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    assert cli.main(["evaluate", "--benchmark", "hpatches", "--root", str(folder), *options]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == f"hpatches all of v_wall: 3 pairs, {93 * 94 + 93 * 92 + 48 * 94:,} pixels, 1 folder"
    assert "matched 3 of 3 pairs" in said.err
    at = next(index for index, line in enumerate(lines) if line.startswith("pair "))
    assert lines[at + 2].split() == ["v_wall", "1-3", "2.0", "2.0", "0.0", "100.0", "100.0", "0.0", "100.0", "0.0"]
    assert lines[at + 5].split()[:3] == ["all", "pixels", "5.1"] and lines[at + 5].split()[3] == "-"
    read = json.loads(files["json"].read_text())
    assert len(read["rows"]) == 4 * len(MEASURES) and read["model_hash"] == shifted.fingerprint()
    assert len(list(csv.DictReader(files["csv"].read_text().splitlines()))) == 4 * len(MEASURES)
    assert "| v_wall 1-3 | 2.0 | 2.0 | 0.0 |" in files["markdown"].read_text()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("spair", {}, "benchmark must be one of hpatches, dense, got 'spair'"),
        ("dense", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("dense", {"limit": -1}, "limit must be at least 1, got -1"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_dense(name, tmp_path, IdentityMatcher(), **options)
