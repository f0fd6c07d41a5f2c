"""The geometry-aware subset by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lpmflow.data import KeypointPair
from lpmflow.evaluation import geometry_aware, geometry_aware_points

EARS_AND_LEGS = [[2, 3], [9, 10, 11, 12]]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([2, 3, 5], [True, True, False]),  # both ears; 5 has no twin
        ([2, 5, 9], [False, False, False]),  # one ear, one leg
        ([9, 12, 3], [True, True, False]),  # two of the four legs are enough
        ([], []),
    ],
)
def test_a_point_counts_when_two_of_its_group_are_in_view(ids: list[int], expected: list[bool]) -> None:
    found = geometry_aware(np.array(ids, dtype=np.int64), EARS_AND_LEGS)
    assert found.tolist() == expected and found.dtype == bool


def test_twins_that_only_the_target_shows() -> None:
    assert geometry_aware([2, 9], EARS_AND_LEGS, visible=[2, 3, 9]).tolist() == [True, False]


def test_points_may_have_names() -> None:
    found = geometry_aware(np.array(["left ear", "nose", "right ear"]), [["left ear", "right ear"]])
    assert found.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[2]], r"groups must be lists of at least two points each, got \[2\]"),
        (["23"], "groups must be lists of at least two points each, got '23'"),
        ([[2, 3], [3, 4]], "groups must hold each point once, got 3 twice"),
    ],
)
def test_groups_that_make_no_sense(groups: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geometry_aware([2, 3], groups)  # type: ignore[arg-type]


def pair(category: str, ids: list[int] | None) -> KeypointPair:
    points = np.zeros((2 if ids is None else len(ids), 2))
    known = None if ids is None else np.array(ids)
    return KeypointPair(f"1:{category}", category, Path("a"), Path("b"), points, points, point_ids=known)


def test_the_points_of_all_pairs() -> None:
    pairs = [pair("cat", [2, 3, 5]), pair("dog", [2, 3]), pair("cat", [2, 9])]
    found = geometry_aware_points(pairs, {"cat": EARS_AND_LEGS})
    assert found.tolist() == [True, True, False, False, False, False, False]


def test_a_pair_may_say_all_that_its_target_shows() -> None:
    shown = dataclasses.replace(pair("cat", [2, 9]), target_visible=np.array([2, 3, 9]))
    assert geometry_aware_points([shown, pair("cat", [9, 10])], {"cat": EARS_AND_LEGS}).tolist() == [
        *(True, False),
        *(True, True),
    ]
    # where target points are transferred, they land in the source, of which nothing more is known
    backward = geometry_aware_points([shown, pair("cat", [9, 10])], {"cat": EARS_AND_LEGS}, backward=True)
    assert backward.tolist() == [False, False, True, True]


def test_pairs_that_do_not_say_which_points_they_have() -> None:
    with pytest.raises(ValueError, match="groups need pairs that say which points they have, which '1:cat' does not"):
        geometry_aware_points([pair("cat", None)], {"cat": EARS_AND_LEGS})


def test_groups_of_other_categories() -> None:
    with pytest.raises(ValueError, match="groups must name a category of these pairs, cat, got dog, cow"):
        geometry_aware_points([pair("cat", [1])], {"dog": EARS_AND_LEGS, "cow": EARS_AND_LEGS})


def test_groups_that_no_pair_has_two_points_of() -> None:
    with pytest.raises(ValueError, match="groups must hold two points or more that some pair has marked together"):
        geometry_aware_points([pair("cat", [2, 5, 9])], {"cat": EARS_AND_LEGS})
