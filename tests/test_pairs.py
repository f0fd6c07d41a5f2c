"""The contract of image pairs: what a pair refuses to hold, and the door to all data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lpmflow.data
from lpmflow.data import BENCHMARKS, KeypointPair, load_pairs
from lpmflow.data.pairs import beyond, layout

POINTS = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def pair(**changed: Any) -> KeypointPair:
    fields = {"source_points": POINTS, "target_points": POINTS + 1, **changed}
    return KeypointPair("one", "cat", Path("a.jpg"), Path("b.jpg"), **fields)


def test_what_a_set_does_not_say_is_none() -> None:
    bare = pair()
    assert bare.source_box is bare.target_box is bare.source_size is bare.target_size is bare.point_ids is None
    assert bare.source_mask is bare.target_mask is None
    assert bare.difficulty == {} and bare.flip is False


def test_a_pair_may_have_masks_and_no_points() -> None:
    nothing = np.empty((0, 2))
    masked = pair(source_points=nothing, target_points=nothing, source_mask=Path("a.png"), target_mask=POINTS)
    assert masked.target_mask is POINTS and len(masked.source_points) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source_points": POINTS[0]}, r"source_points must have shape \(N, 2\), got \(2,\)"),
        ({"target_points": np.zeros((3, 3))}, r"target_points must have shape \(N, 2\), got \(3, 3\)"),
        ({"target_points": POINTS[:2]}, "source_points and target_points must be equally many, got 3 and 2"),
        ({"target_points": POINTS * np.nan}, "target_points must be finite"),
        ({"source_box": POINTS}, r"source_box must have shape \(4,\), got \(3, 2\)"),
        ({"target_box": np.array([0, 0, np.inf, 1])}, "target_box must be finite"),
        ({"point_ids": np.arange(2)}, r"point_ids must have shape \(3,\), got \(2,\)"),
        ({"target_visible": np.arange(3)}, "target_visible must hold every one of point_ids"),
        (
            {"point_ids": np.arange(3), "target_visible": np.array([0, 1, 5])},
            "target_visible must hold every one of point_ids",
        ),
        ({"source_mask": np.zeros(4)}, r"source_mask must have shape \(N, 2\), got \(4,\)"),
    ],
)
def test_arrays_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        pair(**changed)


@pytest.mark.parametrize(
    ("point", "allowed"),
    [
        ((0, 0), True),
        ((-0.5, 39.5), True),
        ((-6.4, 20), True),
        ((65.4, 45.4), True),
        ((-6.6, 20), False),
        ((65.6, 20), False),
        ((30, -6.6), False),
        ((30, 45.6), False),
    ],
)
@pytest.mark.parametrize("side", ["source", "target"])
def test_points_may_lie_a_little_beyond_the_border(side: str, point: tuple[float, float], allowed: bool) -> None:
    """By a tenth of the longer side: 6 pixels of 60 x 40, which covers [-0.5, 59.5] x [-0.5, 39.5]."""
    given = {f"{side}_points": np.array([[1.0, 2.0], point, [3, 4]]), f"{side}_size": (40, 60)}
    if allowed:
        pair(**given)
        return
    with pytest.raises(ValueError) as refused:
        pair(**given)
    assert str(refused.value) == (
        f"{side}_points[1] must lie in the photograph of 60 x 40, or beyond its border by at most 0.1 of the longer "
        f"side, got ({point[0]:g}, {point[1]:g})"
    )


def test_how_far_points_lie_beyond_the_border() -> None:
    points = np.array([[0, 0], [-0.5, 39.5], [-2.5, 20], [61.5, 41], [30, 45.5]])
    assert beyond(points, (40, 60)).tolist() == [0, 0, 2, 2, 6]
    assert beyond(np.empty((0, 2)), (40, 60)).shape == (0,)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_layout_has_its_name(name: str, tmp_path: Path) -> None:
    found = layout(name)
    assert found.name == name and "test" in found.splits
    assert found.present(tmp_path) == [] == found.present(tmp_path / "absent")


@pytest.mark.parametrize("name", ["pascal", "", "SPAIR"])
def test_an_unknown_benchmark(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError) as refused:
        load_pairs(name, tmp_path, "test")
    assert str(refused.value) == f"benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}"


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("split", ["train", "", "VAL", "../val"])
def test_an_unknown_split(tmp_path: Path, name: str, split: str) -> None:
    splits = layout(name).splits
    wanted = f"one of {', '.join(splits)}" if len(splits) > 1 else splits[0]
    with pytest.raises(ValueError) as refused:
        load_pairs(name, tmp_path, split)
    assert str(refused.value) == f"split must be {wanted}, got {split!r}"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_folder_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="^root must be a folder in the layout of "):
        load_pairs(name, tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="^root must be a folder, but there is no '.*absent'$"):
        load_pairs(name, tmp_path / "absent", "test")


@pytest.mark.parametrize(("name", "reader"), [("hpatches", "load_homographies"), ("dense", "load_flows")])
def test_sets_of_dense_truth_have_readers_of_their_own(name: str, reader: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}': lpmflow.data.{reader} reads its pairs"):
        load_pairs(name, ".", "test")
    assert callable(getattr(lpmflow.data, reader))
