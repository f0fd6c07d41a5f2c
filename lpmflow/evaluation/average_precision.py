"""KAP, keypoint average precision: does a model also know when a keypoint has no counterpart?

From "Improving Semantic Correspondence with Viewpoint-Guided Spherical Maps" (CVPR 2024), after its released code. PCK
asks only for keypoints visible in both photographs. KAP asks for every keypoint of the source: its similarity to each
cell of the target is looked at, and

- when the keypoint is visible in the target, the largest similarity among cells within alpha * R of it (< as there; the
  nearest cell always counts) is a candidate that should be accepted, the largest among all other cells one that should
  be rejected;
- when it is not visible, the largest similarity of all is a candidate that should be rejected.

KAP of a category is the average precision of all candidates of its pairs, ranked by similarity. Similarities are
stretched to [0, 1] within a pair before, so that pairs can be ranked together. It needs similarity maps, which a flow
does not have, and keypoints that only the source shows, so it is not part of `lpmflow evaluate`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def kap_candidates(
    similarities: ArrayLike, cells: ArrayLike, marked: ArrayLike, radius: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The candidates of one pair: scores (C,) in [0, 1], and whether each should be accepted (C,).

    Args:
        similarities: (N, M), of each source keypoint to each target cell.
        cells: (M, 2), where the centres of the target's cells are, (x, y) in pixels.
        marked: (N, 2), where the keypoints are in the target, in the same pixels; a row of NaN when it does not show.
        radius: alpha * R in those pixels.

    Raises ValueError when shapes differ, a similarity is not finite, or the radius is not above 0.
    """
    table = np.asarray(similarities, dtype=np.float64)
    places, points = np.asarray(cells, dtype=np.float64), np.asarray(marked, dtype=np.float64)
    if table.ndim != 2 or not table.size or places.shape != (table.shape[1], 2) or points.shape != (len(table), 2):
        raise ValueError(
            f"similarities, cells and marked must have shapes (N, M), (M, 2) and (N, 2) with N and M at least 1, got "
            f"{table.shape}, {places.shape} and {points.shape}"
        )
    if not np.isfinite(table).all():
        raise ValueError("similarities must be finite")
    if not radius > 0:
        raise ValueError(f"radius must be above 0, got {radius}")
    spread = np.ptp(table)
    table = (table - table.min()) / spread if spread > 0 else np.zeros_like(table)
    scores, accept = [], []
    for row, point in zip(table, points, strict=True):
        if not np.isfinite(point).all():
            scores.append(row.max())
            accept.append(False)
            continue
        distance = np.hypot(*(places - point).T)
        near = distance < radius
        near[distance.argmin()] = True
        scores.append(row[near].max())
        accept.append(True)
        if not near.all():
            scores.append(row[~near].max())
            accept.append(False)
    return np.array(scores), np.array(accept)


def average_precision(scores: ArrayLike, accept: ArrayLike) -> float:
    """Average precision of candidates ranked by score, in [0, 1]: sum over thresholds of precision x gain in recall.

    Candidates of equal score are taken together. Raises ValueError when shapes differ, a score is not finite, or no
    candidate should be accepted.
    """
    values, wanted = np.asarray(scores, dtype=np.float64), np.asarray(accept, dtype=bool)
    if values.ndim != 1 or values.shape != wanted.shape:
        raise ValueError(f"scores and accept must have the same shape (C,), got {values.shape} and {wanted.shape}")
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite")
    if not wanted.any():
        raise ValueError("accept must hold at least one candidate that should be accepted")
    order = np.argsort(-values, kind="stable")
    last = np.append(np.diff(values[order]) != 0, True)
    hits = np.cumsum(wanted[order])[last]
    precision = hits / (np.flatnonzero(last) + 1)
    recall = hits / wanted.sum()
    return float((np.diff(recall, prepend=0.0) * precision).sum())
