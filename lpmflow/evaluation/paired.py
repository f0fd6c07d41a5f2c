"""Two models on the same pairs: the difference of their figures, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class PairedDifference:
    """How far the first model is ahead of the second, in the unit of their figures."""

    mean: float
    """Mean over pairs (weighted where weights were given) of first minus second."""
    low: float
    high: float
    """Bounds of the bootstrap interval of `mean`."""
    ahead: float
    """Share of draws in which the first is ahead; a draw with no difference counts half."""
    pairs: int


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> PairedDifference:
    """Percentile bootstrap over pairs of the difference between two models.

    Pairs that are hard for one model are hard for the other, so the difference is surer than two intervals that
    overlap make it look. Pairs share photographs, so the true interval is a little wider. The same numbers for the same
    seed, and with 1,000 draws the very draws of `Scores.interval`.

    Args:
        first, second: (P,) each model's figure of each pair, in one order, such as PCK in percent.
        weights: (P,), above 0: what each pair counts, such as its number of points, which makes averages over
            pairs averages over points; None: all alike.
        level, draws, seed: as for `Scores.interval`.

    Raises ValueError for arrays that do not fit together, are empty or not finite, and for a level or draws that make
    no sense.
    """
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if ours.ndim != 1 or ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"first and second must both have shape (P,) with P > 0, got {ours.shape} and {theirs.shape}")
    counted = np.ones(len(ours)) if weights is None else np.asarray(weights, dtype=np.float64)
    if counted.shape != ours.shape or not (counted > 0).all():
        raise ValueError(f"weights must be numbers above 0 of shape {ours.shape}, as many as pairs")
    difference = ours - theirs
    if not (np.isfinite(difference).all() and np.isfinite(counted).all()):
        raise ValueError("first, second and weights must be finite; leave out pairs that one of the models lacks")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    random, found = np.random.default_rng(seed), np.empty(draws)
    for start in range(0, draws, 64):
        drawn = random.integers(0, len(ours), (min(64, draws - start), len(ours)))
        found[start : start + 64] = (counted * difference)[drawn].sum(axis=1) / counted[drawn].sum(axis=1)
    mean = float((counted * difference).sum() / counted.sum())
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]).tolist()
    ahead = float(((found > 0) + 0.5 * (found == 0)).mean())
    return PairedDifference(mean, low, high, ahead, len(ours))
