"""PCK, the percentage of correct keypoints: predicted points against the marked ones.

A transferred keypoint is correct when it lies within alpha * R of the marked one, the border included. R and the way
pairs are averaged differ between protocols, and a figure means nothing without them. Here R is the longer side of the
*target* object's box, as the authors of SPair-71k define it, and both averages are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class PCK:
    """PCK of a set of pairs at one alpha, in percent."""

    alpha: float
    per_image: float
    """Mean over pairs of each pair's share of correct keypoints: the figure papers give for SPair-71k."""
    per_point: float
    """Share of correct keypoints among all of them."""
    pairs: int
    points: int


def box_extent(box: ArrayLike) -> float:
    """The longer side of a box x1, y1, x2, y2, in pixels; ValueError when it has none or is no box."""
    corners = np.asarray(box, dtype=np.float64)
    if corners.shape != (4,):
        raise ValueError(f"box must be x1, y1, x2, y2, got shape {corners.shape}")
    x1, y1, x2, y2 = corners.tolist()
    extent = float(max(x2 - x1, y2 - y1))
    if not extent > 0:
        raise ValueError(f"box must have a positive side, got {(x1, y1, x2, y2)}")
    return extent


def relative_errors(predicted: ArrayLike, marked: ArrayLike, extent: float) -> NDArray[np.float64]:
    """(N,): the distance of predicted and marked points (N, 2), over R = `extent`; NaN where nothing was predicted.

    Raises ValueError when the shapes differ or are not (N, 2), a marked point is not finite, or the extent not above 0.
    """
    ours, theirs = np.asarray(predicted, dtype=np.float64), np.asarray(marked, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 2 or ours.shape[1] != 2:
        raise ValueError(f"predicted and marked must both have shape (N, 2), got {ours.shape} and {theirs.shape}")
    if not np.isfinite(theirs).all():
        raise ValueError("marked must hold finite points")
    if not extent > 0:
        raise ValueError(f"extent must be above 0, got {extent}")
    return np.asarray(np.linalg.norm(ours - theirs, axis=1) / extent)


def pck(errors: Sequence[NDArray[np.float64]], alpha: float) -> PCK:
    """PCK at `alpha` of pairs given as their relative errors (see `relative_errors`), one array a pair.

    Raises ValueError when there is no pair or a pair has no keypoint.
    """
    if isinstance(errors, np.ndarray) and errors.ndim == 1:
        raise ValueError("errors must be a sequence of arrays, one a pair, and is one array")
    if not len(errors) or any(len(pair) == 0 for pair in errors):
        raise ValueError("errors must hold at least one pair, and every pair at least one keypoint")
    correct = [pair <= alpha for pair in errors]
    return PCK(
        alpha=alpha,
        per_image=100 * float(np.mean([pair.mean() for pair in correct])),
        per_point=100 * float(np.concatenate(correct).mean()),
        pairs=len(correct),
        points=sum(len(pair) for pair in correct),
    )
