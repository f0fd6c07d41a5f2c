"""Scores against dense truth: masks carried from one photograph to the other, and flows known at every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class EndPointError:
    """How far a flow is from the true one, over the pixels where the truth is known."""

    mean: float
    """Pixels: what papers call EPE or AEPE."""
    median: float
    """Pixels; a mean is made by a few large misses."""
    outliers: float
    """Percent of pixels that miss by more than 3 pixels and by more than 5 % of the true length: KITTI's Fl."""
    pixels: int


def end_point_error(flow: ArrayLike, truth: ArrayLike, valid: ArrayLike | None = None) -> EndPointError:
    """The end-point error of a flow (H, W, 2) against the truth (H, W, 2), in pixels, where `valid` (H, W) is not 0.

    None: where the truth is finite. Raises ValueError when shapes differ, no pixel is valid, the truth is not finite at
    a valid one, or the flow is not.
    """
    ours, theirs = np.asarray(flow, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if ours.ndim != 3 or ours.shape[2] != 2 or ours.shape != theirs.shape:
        raise ValueError(f"flow and truth must have the same shape (H, W, 2), got {ours.shape} and {theirs.shape}")
    known = np.isfinite(theirs).all(axis=-1) if valid is None else np.asarray(valid) != 0
    if known.shape != ours.shape[:2]:
        raise ValueError(f"valid must have shape {ours.shape[:2]}, got {known.shape}")
    if not known.any():
        raise ValueError("valid must hold at least one pixel")
    ours, theirs = ours[known], theirs[known]
    for name, values in (("flow", ours), ("truth", theirs)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite at valid pixels")
    error = np.hypot(*(ours - theirs).T)
    wrong = (error > 3) & (error > 0.05 * np.hypot(*theirs.T))
    return EndPointError(float(error.mean()), float(np.median(error)), 100 * float(wrong.mean()), len(error))


def label_transfer_accuracy(predicted: ArrayLike, true: ArrayLike) -> float:
    """LT-ACC, in percent: the share of all pixels, object or not, that a transferred mask (H, W) labels as `true` does.

    What is not 0 is the object. Raises ValueError when the shapes differ, there is no pixel or one is NaN.
    """
    ours, theirs = _masks(predicted, true)
    return 100 * float((ours == theirs).mean())


def intersection_over_union(predicted: ArrayLike, true: ArrayLike) -> float:
    """IoU of a transferred mask (H, W) and the true one, in percent.

    What is not 0 is the object. Raises ValueError when the shapes differ, a pixel is NaN, or `true` has no object.
    """
    ours, theirs = _masks(predicted, true)
    if not theirs.any():
        raise ValueError("true must cover at least one pixel")
    return 100 * float((ours & theirs).sum() / (ours | theirs).sum())


def _masks(predicted: ArrayLike, true: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    for name, mask in (("predicted", predicted), ("true", true)):
        if np.isnan(np.asarray(mask, dtype=np.float64)).any():
            raise ValueError(f"{name} must say of every pixel whether it is the object (0: it is not), but holds NaN")
    ours, theirs = np.asarray(predicted) != 0, np.asarray(true) != 0
    if ours.ndim != 2 or ours.shape != theirs.shape or not ours.size:
        raise ValueError(
            f"predicted and true must have the same shape (H, W) with a pixel, got {ours.shape} and {theirs.shape}"
        )
    return ours, theirs
