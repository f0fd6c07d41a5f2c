"""The geometry-aware subset: keypoints that have a twin in view, which only the object's geometry tells apart.

Keypoints of a category that look alike (left and right ear, the four legs) form a symmetric group. A keypoint counts
when two or more members of its group are visible in the target. The groups of a category are given by the user, as
numbers or names of points (`KeypointPair.point_ids`); groups for SPair-71k and AP-10K are part of GeoAware-SC's code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from lpmflow.data.pairs import KeypointPair

Groups = Sequence[Sequence[Any]]


def geometry_aware(point_ids: ArrayLike, groups: Groups, visible: ArrayLike | None = None) -> NDArray[np.bool_]:
    """(N,): whether each keypoint of a pair has a twin in view.

    `point_ids` (N,) says which point of its category each is, `groups` lists the symmetric groups, each of at least two
    ids. `visible` are the ids of all points visible in the target; None: those of the pair itself, which are the points
    marked in both photographs, so that twins marked in the target alone are not seen. Raises ValueError when an id is
    in two groups or a group has fewer than two.
    """
    ids = np.asarray(point_ids)
    group_of = _group_of(groups)
    shown = [str(one) for one in np.asarray(ids if visible is None else visible).tolist()]
    seen = np.bincount([group_of[one] for one in set(shown) if one in group_of], minlength=len(groups))
    mine = [group_of.get(str(one), -1) for one in ids.tolist()]
    return np.array([group >= 0 and bool(seen[group] >= 2) for group in mine], dtype=bool)


def geometry_aware_points(
    pairs: Sequence[KeypointPair], groups: Mapping[str, Groups], *, backward: bool = False
) -> NDArray[np.bool_]:
    """(K,): `geometry_aware` of every keypoint of `pairs`, for `Scores.pck(points=...)`; `groups` by category.

    `backward` is for protocols that transfer target points: what they land in is the source, of which only the pair's
    own points are known.

    What the target shows is `KeypointPair.target_visible`, or the pair's own points where the set does not say. A
    category without groups has no such points. Raises ValueError when a pair does not say which points it has, or
    when no point of any pair is in the subset.
    """
    if not any(pair.category in groups for pair in pairs):
        raise ValueError(
            f"groups must name a category of these pairs, {', '.join(sorted({pair.category for pair in pairs}))}, "
            f"got {', '.join(groups) or 'none'}"
        )
    found = []
    for pair in pairs:
        if pair.point_ids is None:
            raise ValueError(f"groups need pairs that say which points they have, which {pair.name!r} does not")
        seen = None if backward else pair.target_visible
        found.append(geometry_aware(pair.point_ids, groups.get(pair.category, ()), seen))
    aware = np.concatenate(found)
    if not aware.any():
        raise ValueError("groups must hold two points or more that some pair has marked together, but no pair has")
    return aware


def _group_of(groups: Groups) -> dict[str, int]:
    """Id, as text, -> number of its group."""
    found: dict[str, int] = {}
    for number, group in enumerate(groups):
        if isinstance(group, (str, bytes)) or len(group) < 2:
            raise ValueError(f"groups must be lists of at least two points each, got {group!r}")
        for one in group:
            if str(one) in found:
                raise ValueError(f"groups must hold each point once, got {one!r} twice")
            found[str(one)] = number
    return found
