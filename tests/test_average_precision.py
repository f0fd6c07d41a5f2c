"""KAP: the candidates of a pair by hand, average precision by hand and against the sum over thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from lpmflow.evaluation import average_precision, kap_candidates

CELLS = [(0, 0), (10, 0), (20, 0), (30, 0)]


def test_candidates_by_hand() -> None:
    """Stretched by (s + 1) / 2. The first shows at cell 1 and reaches 0 and 1; the second does not show."""
    similarities = [[0.0, 0.4, 1.0, -0.5], [-1.0, 0.2, 0.0, 0.6]]
    scores, accept = kap_candidates(similarities, CELLS, [(6, 0), (np.nan, np.nan)], radius=8)
    np.testing.assert_allclose(scores, [0.7, 1.0, 0.8])
    assert accept.tolist() == [True, False, False]


def test_the_nearest_cell_counts_however_small_the_radius() -> None:
    scores, accept = kap_candidates([[0.0, 0.5, 1.0, 0.2]], CELLS, [(13, 0)], radius=0.1)
    assert (scores.tolist(), accept.tolist()) == ([0.5, 1.0], [True, False])


def test_the_radius_itself_is_outside() -> None:
    scores, _ = kap_candidates([[0.0, 0.5, 1.0, 0.2]], CELLS, [(10, 0)], radius=10)
    assert scores.tolist() == [0.5, 1.0]


def test_a_radius_that_holds_everything_leaves_nothing_to_reject() -> None:
    scores, accept = kap_candidates([[0.0, 0.5, 1.0, 0.2]], CELLS, [(10, 0)], radius=100)
    assert (scores.tolist(), accept.tolist()) == ([1.0], [True])


def test_a_flat_map() -> None:
    scores, accept = kap_candidates([[3.0, 3, 3, 3]], CELLS, [(10, 0)], radius=1)
    assert (scores.tolist(), accept.tolist()) == ([0, 0], [True, False])


@pytest.mark.parametrize(
    ("scores", "accept", "expected"),
    [
        ([0.9, 0.8, 0.7], [1, 0, 1], 0.5 * 1 + 0.5 * 2 / 3),
        ([0.9, 0.8, 0.7], [0, 0, 1], 1 / 3),
        ([0.9, 0.8], [1, 1], 1),
        ([0.5, 0.5, 0.5, 0.1], [1, 0, 0, 0], 1 / 3),  # equal scores stand or fall together
        ([0.5], [1], 1),
    ],
)
def test_average_precision_by_hand(scores: list[float], accept: list[int], expected: float) -> None:
    assert average_precision(scores, accept) == pytest.approx(expected)


def test_average_precision_is_the_sum_over_thresholds() -> None:
    random = np.random.default_rng(1)
    scores = random.integers(0, 20, 200) / 20  # with many ties
    accept = random.random(200) < 0.4
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        recall = (accept & taken).sum() / accept.sum()
        total += (recall - recall_before) * (accept & taken).sum() / taken.sum()
        recall_before = recall
    assert average_precision(scores, accept) == pytest.approx(total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0.0, 1.0]], CELLS, [(1, 1)], 1), r"must have shapes \(N, M\), \(M, 2\) and \(N, 2\)"),
        ((np.zeros((0, 4)), CELLS, np.zeros((0, 2)), 1), r"got \(0, 4\), \(4, 2\) and \(0, 2\)"),
        (([[0.0, 1, 2, np.nan]], CELLS, [(1, 1)], 1), "similarities must be finite"),
        (([[0.0, 1, 2, 3]], CELLS, [(1, 1)], 0), "radius must be above 0, got 0"),
    ],
)
def test_candidates_that_make_no_sense(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kap_candidates(*arguments)


@pytest.mark.parametrize(
    ("scores", "accept", "message"),
    [
        ([0.1, 0.2], [1], r"scores and accept must have the same shape \(C,\), got \(2,\) and \(1,\)"),
        ([0.1, np.inf], [1, 0], "scores must be finite"),
        ([0.1, 0.2], [0, 0], "accept must hold at least one candidate that should be accepted"),
    ],
)
def test_ranks_that_make_no_sense(scores: list[float], accept: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_precision(scores, accept)
