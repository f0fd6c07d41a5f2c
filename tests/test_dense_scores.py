"""End-point error, label-transfer accuracy and IoU by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lpmflow.evaluation import end_point_error, intersection_over_union, label_transfer_accuracy


def test_end_point_error_by_hand() -> None:
    """Misses of 0, 5, 3 (no outlier) and 10; the last is under 5 % of a displacement of 300."""
    truth = np.array([[[0.0, 0], [3, 4]], [[1, 1], [300, 0]]])
    flow = np.array([[[0.0, 0], [0, 0]], [[1, 4], [300, 10]]])
    found = end_point_error(flow, truth)
    assert (found.mean, found.median, found.outliers, found.pixels) == (4.5, 4.0, 25.0, 4)


def test_only_valid_pixels_count() -> None:
    truth = np.array([[[0.0, 0], [np.nan, 4]], [[1, 1], [5, 0]]])
    flow = np.array([[[1.0, 0], [0, 0]], [[1, 4], [5, np.inf]]])
    valid = np.array([[1, 0], [255, 0]])
    assert end_point_error(flow, truth, valid).mean == 2 and end_point_error(flow, truth, valid != 0).pixels == 2
    flow[1, 1] = 5, 2
    assert end_point_error(flow, truth).pixels == 3  # where the truth is finite


@pytest.mark.parametrize(
    ("flow", "truth", "valid", "message"),
    [
        (np.zeros((2, 3, 2)), np.zeros((3, 2, 2)), None, r"must have the same shape \(H, W, 2\), got \(2, 3, 2\)"),
        (np.zeros((2, 3)), np.zeros((2, 3)), None, r"must have the same shape \(H, W, 2\), got \(2, 3\)"),
        (np.zeros((2, 3, 2)), np.zeros((2, 3, 2)), np.ones((3, 2)), r"valid must have shape \(2, 3\), got \(3, 2\)"),
        (np.zeros((1, 1, 2)), np.full((1, 1, 2), np.nan), None, "valid must hold at least one pixel"),
        (np.full((1, 1, 2), np.nan), np.zeros((1, 1, 2)), None, "flow must be finite at valid pixels"),
        (np.zeros((1, 1, 2)), np.full((1, 1, 2), np.nan), [[True]], "truth must be finite at valid pixels"),
    ],
)
def test_flows_that_make_no_sense(flow: np.ndarray, truth: np.ndarray, valid: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        end_point_error(flow, truth, valid)  # type: ignore[arg-type]


def test_masks_by_hand() -> None:
    true = np.zeros((4, 5))
    true[1:3, 1:3] = 255
    moved = np.zeros((4, 5), bool)
    moved[1:3, 2:5] = True  # 2 of 4 pixels of the object, and 4 beside it
    assert label_transfer_accuracy(moved, true) == pytest.approx(100 * 14 / 20)
    assert intersection_over_union(moved, true) == pytest.approx(100 * 2 / 8)
    assert label_transfer_accuracy(true, true) == intersection_over_union(true, true) == 100


def test_nothing_predicted() -> None:
    true = np.array([[1, 0, 0, 0]])
    assert label_transfer_accuracy(true * 0, true) == 75 and intersection_over_union(true * 0, true) == 0


@pytest.mark.parametrize("measure", [label_transfer_accuracy, intersection_over_union])
@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((2,), (2,)), ((0, 3), (0, 3))])
def test_masks_of_another_shape(measure: object, shapes: tuple) -> None:
    with pytest.raises(ValueError, match=r"predicted and true must have the same shape \(H, W\) with a pixel, got \("):
        measure(*map(np.ones, shapes))  # type: ignore[operator]


def test_iou_needs_an_object() -> None:
    with pytest.raises(ValueError, match="true must cover at least one pixel"):
        intersection_over_union(np.ones((2, 2)), np.zeros((2, 2)))


@pytest.mark.parametrize("measure", [intersection_over_union, label_transfer_accuracy])
def test_a_mask_says_something_of_every_pixel(measure: object) -> None:
    unknown, known = np.array([[1.0, np.nan]]), np.array([[1, 0]])
    with pytest.raises(ValueError, match=r"predicted must say of every pixel .*, but holds NaN"):
        measure(unknown, known)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"true must say of every pixel .*, but holds NaN"):
        measure(known, unknown)  # type: ignore[operator]
