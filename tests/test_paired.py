"""The paired bootstrap, against every draw there is of two and three pairs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from lpmflow.evaluation import paired_bootstrap


def test_two_pairs_by_hand() -> None:
    """Differences of 10 and 0: a draw gives 0, 5, 5 or 10, each as often."""
    found = paired_bootstrap([60, 30], [50, 30], draws=20_000)
    assert (found.mean, found.low, found.high, found.pairs) == (5, 0, 10, 2)
    assert found.ahead == pytest.approx(3 / 4 + 1 / 8, abs=0.01)
    middle = paired_bootstrap([60, 30], [50, 30], draws=20_000, level=0.4)  # between 30 and 70 % of the draws
    assert (middle.low, middle.high) == (5, 5)


def test_weights_make_it_an_average_over_points() -> None:
    """Every draw of three pairs, written out."""
    first, second, weights = np.array([100.0, 0, 50]), np.array([50.0, 20, 50]), np.array([4.0, 10, 2])
    every = [
        np.average((first - second)[list(draw)], weights=weights[list(draw)])
        for draw in itertools.product(range(3), repeat=3)
    ]
    found = paired_bootstrap(first, second, weights=weights, draws=50_000, level=0.8)
    assert found.mean == 0  # (4 * 50 - 10 * 20) / 16
    assert found.ahead == pytest.approx(np.mean(np.sign(every)) / 2 + 0.5, abs=0.01)
    assert (found.low, found.high) == pytest.approx(np.quantile(every, [0.1, 0.9], method="inverted_cdf"), abs=1e-9)


def test_it_is_surer_than_two_intervals() -> None:
    """Figures that differ from pair to pair much more than from model to model."""
    base = np.random.default_rng(1).uniform(0, 90, 200)
    found = paired_bootstrap(base + 3 + np.tile([1.0, -1.0], 100), base)
    assert found.mean == pytest.approx(3) and 2.8 < found.low < 3 < found.high < 3.2 and found.ahead == 1
    assert found == paired_bootstrap(base + 3 + np.tile([1.0, -1.0], 100), base)
    assert found != paired_bootstrap(base + 3 + np.tile([1.0, -1.0], 100), base, seed=1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], []), {}, r"first and second must both have shape \(P,\) with P > 0, got \(0,\) and \(0,\)"),
        (([1, 2], [1]), {}, r"got \(2,\) and \(1,\)"),
        (([[1]], [[1]]), {}, r"got \(1, 1\) and \(1, 1\)"),
        (([1, np.nan], [1, 2]), {}, "must be finite; leave out pairs that one of the models lacks"),
        (([1, 2], [1, 2]), {"weights": [1]}, r"weights must be numbers above 0 of shape \(2,\)"),
        (([1, 2], [1, 2]), {"weights": [1, 0]}, "weights must be numbers above 0"),
        (([1, 2], [1, 2]), {"level": 1}, "level must lie between 0 and 1, got 1"),
        (([1, 2], [1, 2]), {"draws": 0}, "draws must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sense(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(*arguments, **options)
