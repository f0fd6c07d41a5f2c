"""PCK worked out by hand: the border, both averages, the box's longer side, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from lpmflow.evaluation import box_extent, pck, relative_errors


@pytest.mark.parametrize(
    ("box", "extent"), [((10, 20, 110, 60), 100), ((0, 0, 3.5, 7.25), 7.25), ((-4, -9, 6, -8), 10), ((5, 5, 5, 9), 4)]
)
def test_the_extent_is_the_longer_side(box: tuple[float, ...], extent: float) -> None:
    assert box_extent(box) == box_extent(np.array(box)) == extent


def test_relative_errors_are_distances_over_the_extent() -> None:
    predicted = [[3, 4], [10, 10], [1.5, -2]]
    marked = [[0, 0], [10, 10], [1.5, 10]]
    errors = relative_errors(predicted, marked, 50)
    assert errors.tolist() == [5 / 50, 0.0, 12 / 50] and errors.dtype == np.float64


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.15])
@pytest.mark.parametrize("extent", [20, 100, 300, 700])
def test_the_border_is_included(alpha: float, extent: int) -> None:
    limit = round(100 * alpha) * extent / 100  # rounded once, as alpha is: alpha * extent may be a bit more or less
    on, beyond = (relative_errors([[x, 0]], [[0, 0]], extent) for x in (limit, limit * (1 + 1e-12)))
    assert pck([on], alpha).per_point == 100
    assert pck([beyond], alpha).per_point == 0


def test_both_averages_by_hand() -> None:
    """Three pairs of 4, 1 and 2 keypoints, of which 1, 1 and 0 lie within a tenth."""
    errors = [np.array([0.1, 0.2, 0.3, 0.11]), np.array([0.0]), np.array([0.5, 0.101])]
    found = pck(errors, 0.1)
    assert (found.alpha, found.pairs, found.points) == (0.1, 3, 7)
    assert (found.per_image, found.per_point) == (pytest.approx(100 * 1.25 / 3), pytest.approx(200 / 7))
    wider = pck(errors, 0.2)  # 3, 1 and 1 of them
    assert (wider.per_image, wider.per_point) == (pytest.approx(100 * (0.75 + 1 + 0.5) / 3), pytest.approx(500 / 7))
    everything = pck(errors, 1)
    assert (everything.per_image, everything.per_point) == (100, 100)


def test_a_prediction_that_is_no_number_is_wrong() -> None:
    errors = relative_errors([[np.nan, 0], [0, 0]], [[0, 0], [0, 0]], 10)
    assert pck([errors], 1).per_point == 50


def test_each_pair_has_its_own_extent() -> None:
    """The same 6 pixels are right for an object of 100 pixels and wrong for one of 50."""
    boxes = ((0, 0, 100, 40), (0, 0, 20, 50))
    errors = [relative_errors([[6, 0]], [[0, 0]], box_extent(box)) for box in boxes]
    assert pck(errors, 0.1).per_image == 50


@pytest.mark.parametrize("box", [(5, 5, 5, 5), (9, 9, 3, 4), (0, 0, np.nan, np.nan)])
def test_a_box_without_a_side(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="box must have a positive side, got "):
        box_extent(box)


@pytest.mark.parametrize("box", [(1, 2, 3), (1, 2, 3, 4, 5), 7, [[0, 0, 1, 1]]])
def test_a_box_of_another_shape(box: object) -> None:
    with pytest.raises(ValueError, match=r"box must be x1, y1, x2, y2, got shape \("):
        box_extent(box)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("predicted", "marked"),
    [(np.zeros((2, 2)), np.zeros((3, 2))), (np.zeros((2, 3)), np.zeros((2, 3))), (np.zeros(2), np.zeros(2))],
)
def test_points_of_another_shape(predicted: np.ndarray, marked: np.ndarray) -> None:
    with pytest.raises(ValueError) as refused:
        relative_errors(predicted, marked, 1.0)
    wanted = f"predicted and marked must both have shape (N, 2), got {predicted.shape} and {marked.shape}"
    assert str(refused.value) == wanted


@pytest.mark.parametrize("extent", [0.0, -3.0, np.nan])
def test_an_extent_that_is_none(extent: float) -> None:
    with pytest.raises(ValueError, match="extent must be above 0, got "):
        relative_errors([[0, 0]], [[0, 0]], extent)


@pytest.mark.parametrize("errors", [[], [np.zeros(2), np.zeros(0)]])
def test_nothing_to_average(errors: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="errors must hold at least one pair, and every pair at least one keypoint"):
        pck(errors, 0.1)


def test_a_marked_point_must_be_a_place_and_pairs_stay_apart() -> None:
    with pytest.raises(ValueError, match="marked must hold finite points"):
        relative_errors([(1, 1)], [(np.nan, 1)], 10)
    with pytest.raises(ValueError, match="errors must be a sequence of arrays, one a pair, and is one array"):
        pck(np.array([0.1, 0.2]), 0.1)  # type: ignore[arg-type]
