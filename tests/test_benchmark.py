"""`lpmflow.benchmark.evaluate`: made-up folders and a network of known shift: every figure of the report is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_pairs import PER_IMAGE, PER_POINT, THREE, keypoints, outlines, picture

import lpmflow
from lpmflow.benchmark import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (2, 0), (8, 0), (2, 1)])
def test_pck_of_known_misses(tmp_path: Path, shifted: lpmflow.Matcher, batch_size: int, workers: int) -> None:
    report = evaluate("spair", keypoints(tmp_path, THREE), shifted, batch_size=batch_size, workers=workers)
    rows = report.select("spair")
    assert [row.alpha for row in rows] == [0.01, 0.05, 0.1, 0.15]
    assert [row.per_image for row in rows] == pytest.approx(PER_IMAGE)
    assert [row.per_point for row in rows] == pytest.approx(PER_POINT)
    assert {(row.pairs, row.points) for row in rows} == {(3, 7)}
    batches = [call["shape"][0] for call in shifted.model.calls]  # type: ignore[operator, union-attr]
    assert batches == {1: [1, 1, 1], 2: [2, 1], 8: [3]}[batch_size]
    assert (report.benchmark, report.split, report.pairs, report.points) == ("spair", "val", 3, 7)
    assert (report.model, report.model_hash) == ("fake", shifted.fingerprint()) and not report.official


def test_several_protocols_and_alphas(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """`lpmflow` has half the R here (the source box), and both images are squashed alike."""
    root = keypoints(tmp_path, THREE)
    report = evaluate("spair", root, shifted, protocols=["spair", "lpmflow", "spair"], alphas=[0.2, 0.1, 0.2])
    assert list(report.protocols) == ["spair", "lpmflow"] and report.alphas["lpmflow"] == (0.1, 0.2)
    spair, ours = report.select("spair", alpha=0.1)[0], report.select("lpmflow", alpha=0.2)[0]
    # the truncated point lies less than a pixel of 512 from the point, so misses change by less than 0.3 pixels
    assert ours.per_image == spair.per_image and ours.per_point == spair.per_point
    assert len(shifted.model.calls) == 1  # type: ignore[arg-type]


def test_the_other_direction(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """Target points land 3 to the right and 2 up in the source: 6 and -4 away from where the first ones come from."""
    root = keypoints(tmp_path, [([(10, 20)], [(13, 18)]), ([(30, 30)], [(27, 32)])])
    report = evaluate("spair", root, shifted, protocols=["cats", "spair"], alphas=[0.07])
    # cats, R = 50: the first misses by hypot(6, 4) = 7.2, the second by less than a pixel; spair, R = 100: the reverse
    assert report.select("cats")[0].per_point == 50 and report.select("spair")[0].per_point == 50


def test_the_miss_is_measured_in_pixels_of_the_target(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """A target twice as wide and three times as high: x -> 2 (x + 3 + 0.5) - 0.5, y -> 3 (y - 2 + 0.5) - 0.5."""
    root = keypoints(tmp_path, [([(10, 10), (10, 10)], [(26.5, 25), (26.5 + 4, 25 + 4)])], target=(192, 288))
    rows = evaluate("spair", root, shifted, alphas=[0.05, 0.1]).select("spair")
    assert [row.per_point for row in rows] == [50, 100]  # misses of 0 and 5.7 pixels


def test_padded_photographs(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """A target of 192 x 96 becomes 192 x 192 with 48 black rows above: x -> 2 (x + 3.5) - 0.5, y -> 2 (y - 1.5) - 48.5.

    The black rows make the padded target darker, and the fake network adds the difference of brightness to its flow,
    so the miss is that many cells of 2 pixels; it is worked out from the network's own answer.
    """
    root = keypoints(tmp_path, [([(20, 60)], [(46.5, 68.5)])], target=(192, 96))
    gray = np.full((96, 96, 3), 128, np.uint8)
    square = np.zeros((192, 192, 3), np.uint8)
    square[48:144] = 128
    wanted = shifted(gray, square).transfer([(20, 60)])[0] - (0, 48)
    assert np.abs(wanted - (46.5, 68.5)).max() > 1
    found = evaluate("spair", root, shifted, protocols=["geoaware"], alphas=[0.1, 0.2]).select("geoaware")
    miss = np.hypot(*(wanted - (46.5, 68.5))) / 100
    assert [row.per_point for row in found] == [100 * (miss < 0.1), 100 * (miss < 0.2)]
    report = evaluate("spair", root, shifted, protocols=["geoaware"], alphas=[miss * 0.9999, miss * 1.0001])
    assert [row.per_point for row in report.select("geoaware")] == [0, 100]


def test_points_beyond_the_border_are_moved_onto_it(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """(-4, 50) counts as (-0.5, 50) and (40, 99) as (40, 95.5)."""
    root = keypoints(tmp_path, [([(-4, 50), (40, 99)], [(2.5 + 4.9, 48), (43, 93.5 - 5.1)])])
    rows = evaluate("spair", root, shifted, alphas=[0.05, 0.1]).select("spair")
    assert [row.per_point for row in rows] == [50, 100]


def test_photographs_of_another_size_than_the_annotation_says(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    root = keypoints(tmp_path, THREE, src_imsize=[96, 96, 3], trg_imsize=[96, 98, 3])
    with pytest.raises(
        ValueError, match=r"b0\.png, 000000-a-b:cup: must be 96 x 98, the size it was marked at, got 96 x"
    ):
        evaluate("spair", root, shifted)
    assert shifted.model.calls == []


def test_a_point_outside_is_refused_before_anything_is_matched(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """In the last pair of a set whose lists do not say sizes, by the photograph and the pair."""
    for name in ("a", "b"):
        picture(tmp_path / "car(S)" / f"{name}.jpg")
    rows = [[*range(20), *range(20)]] * 2 + [[*range(20), *range(19), 106]]
    lines = [",".join(["car(S)/a.jpg", "car(S)/b.jpg", *map(str, row)]) for row in rows]
    (tmp_path / "test_pairs.csv").write_text("\n".join([",".join("x" * 42), *lines]))
    with pytest.raises(ValueError) as refused:
        evaluate("pf-willow", tmp_path, shifted, batch_size=1)
    where = (
        f"{tmp_path / 'car(S)' / 'b.jpg'}, 000003-a-b:car(S): target_points[9] must lie in the photograph of 96 x 96"
    )
    assert str(refused.value).startswith(where) and shifted.model.calls == []


def test_difficulties_and_symmetric_groups(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    fields = {"viewpoint_variation": 1, "scale_variation": 2, "truncation": 0, "occlusion": 3, "mirror": 0}
    root = keypoints(tmp_path, THREE[:1], kps_ids=["4", "7", "9", "2"], **fields)
    report = evaluate("spair", root, shifted, alphas=[0.1], groups={"cup": [[4, 9]]})
    assert [(row.group, row.name) for row in report.rows if row.group not in ("all", "category")] == [
        ("geometry-aware", ""), ("viewpoint", "1"), ("scale", "2"), ("truncation", "0"), ("occlusion", "3"),
    ]  # fmt: skip
    aware = report.select("spair", group="geometry-aware")[0]
    assert (aware.per_point, aware.points) == (100, 2)  # points 4 and 9 miss by 0 and 9.9


def test_outlines_are_scored_as_masks(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """The first square lands on the target's; the second overlaps it by half: 200 of 600 pixels, and 400 are wrong."""
    report = evaluate("caltech-101", outlines(tmp_path), shifted)
    (accuracy,), (iou,) = report.select("masks", "LT-ACC"), report.select("masks", "IoU")
    assert accuracy.per_image == pytest.approx(100 * (1 + 1 - 400 / 96**2) / 2)
    assert iou.per_image == pytest.approx(100 * (1 + 1 / 3) / 2)
    assert report.select("masks", "IoU", "category")[0].name == "cup" and report.split == "test"
    assert any(line.split() == ["IoU", "66.7"] for line in report.lines())
    assert "| cup | 2 | 97.8 | 66.7 |" in report.to_markdown()
    assert "filled, even-odd" in report.protocols["masks"]["rule"]


@pytest.mark.parametrize(
    ("name", "given"),
    [("protocol", {"protocols": ["spair"]}), ("alpha", {"alphas": [0.1]}), ("groups", {"groups": {"cup": [[1, 2]]}})],
)
def test_outlines_take_no_options_of_keypoints(
    tmp_path: Path, shifted: lpmflow.Matcher, name: str, given: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be given for caltech-101, whose pairs have outlines and no"):
        evaluate("caltech-101", outlines(tmp_path), shifted, **given)
    assert shifted.model.calls == []


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"cup": [[4, 9]], "cpu": [[4, 9]]}, "groups must name categories of these pairs, cup, got cpu"),
        ({"cup": [[4, 9], [7, 77]]}, "groups must hold points that some pair of cup has, 2, 4, 7, 9, 10, got 77"),
    ],
)
def test_groups_that_would_be_ignored(
    tmp_path: Path, shifted: lpmflow.Matcher, groups: dict[str, Any], message: str
) -> None:
    root = keypoints(tmp_path, [(THREE[0][0] + [(1, 1)], THREE[0][1] + [(1, 1)])], kps_ids=["4", "7", "9", "2", "10"])
    with pytest.raises(ValueError, match=f"^{message}$"):
        evaluate("spair", root, shifted, groups=groups)
    assert shifted.model.calls == []


def test_an_outline_moved_out_of_the_photograph_is_no_mask(tmp_path: Path, make_fake_model: Any) -> None:
    away = lpmflow.Matcher(make_fake_model((200.0, 0.0)), "cpu")
    report = evaluate("caltech-101", outlines(tmp_path), away)
    assert report.select("masks", "IoU")[0].per_image == 0
    assert report.select("masks", "LT-ACC")[0].per_image == pytest.approx(100 * (1 - 400 / 96**2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "split must be one of trn, val, test, got 'train'"),
        ({"protocols": ["pck"]}, "protocol must be one of spair, lpmflow, .*, got 'pck'"),
        ({"alphas": [0.1, 0]}, "alpha must be a number above 0, got 0"),
        ({"alphas": [float("nan")]}, "alpha must be a number above 0, got nan"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"worst": 3}, "worst needs a folder to draw into, and pairs with keypoints"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"worst": -1}, "worst must be at least 0, got -1"),
        ({"predictions": "absent/file"}, "predictions must be a file in an existing folder, got 'absent/file'"),
        ({"groups": {"dog": [[1, 2]]}}, "groups must name a category of these pairs, cup, got dog"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_matched(
    tmp_path: Path, shifted: lpmflow.Matcher, options: dict[str, Any], message: str
) -> None:
    root = keypoints(tmp_path, THREE)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate("spair", root, shifted, **options)
    assert shifted.model.calls == []


def test_a_pair_without_what_the_protocol_measures_against(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    root = keypoints(tmp_path, [([(1, 1)], [(2, 2)])])
    with pytest.raises(ValueError, match="protocol 'pf-willow' needs marked points that lie apart, which '000000-a-b"):
        evaluate("spair", root, shifted, protocols=["pf-willow"])
    assert shifted.model.calls == []


@pytest.mark.parametrize("name", ["pascal", "", "SPair"])
def test_an_unknown_benchmark(tmp_path: Path, shifted: lpmflow.Matcher, name: str) -> None:
    with pytest.raises(ValueError, match=f"benchmark must be one of spair, pf-pascal, .*, got {name!r}"):
        evaluate(name, tmp_path, shifted)
