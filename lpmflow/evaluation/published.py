"""What papers report on SPair-71k, for comparison; every figure is theirs, none was measured here.

PCK@0.1 in percent on the official test split of 12,234 pairs, mean over pairs, by the protocol of the paper, which for
these is one of `PAPER_PROTOCOLS`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lpmflow.data.pairs import KeypointPair

ALPHA = 0.1
PAPER_PROTOCOLS = ("lpmflow", "cats")
_DIFFICULTIES = ("viewpoint", "scale", "truncation", "occlusion")

SPAIR_CATEGORIES = {
    "aeroplane": "aero",
    "bicycle": "bike",
    "bird": "bird",
    "boat": "boat",
    "bottle": "bott",
    "bus": "bus",
    "car": "car",
    "cat": "cat",
    "chair": "chai",
    "cow": "cow",
    "dog": "dog",
    "horse": "hors",
    "motorbike": "mbik",
    "person": "pers",
    "pottedplant": "plan",
    "sheep": "shee",
    "train": "trai",
    "tvmonitor": "tv",
}
"""The 18 categories in the order of the papers' tables, and what the tables call them."""

SPAIR_TEST_PAIRS = dict(
    zip(
        SPAIR_CATEGORIES,
        (690, 650, 702, 702, 870, 644, 564, 600, 646, 640, 600, 600, 702, 650, 862, 664, 756, 692),
        strict=True,
    )
)
"""Category -> its pairs in the official test split, 12,234 together."""


@dataclass(frozen=True)
class PublishedRow:
    """A method's row of the table."""

    method: str
    all: float
    by_category: Mapping[str, float] = field(default_factory=dict)
    """Category -> figure; empty where only `all` is known here."""


_LPMFLOW = "71.4 54.8 83.2 50.3 57.0 75.4 68.9 79.3 41.1 78.4 74.1 73.7 58.7 56.9 48.7 54.7 87.5 74.6"

SPAIR_TABLE = (
    PublishedRow("LPMFlow", 65.6, dict(zip(SPAIR_CATEGORIES, map(float, _LPMFLOW.split()), strict=True))),
    PublishedRow("ACTR", 62.1),
    PublishedRow("TransforMatcher on iBOT-B", 57.9),
    PublishedRow("CATs on iBOT-B", 55.2),
    PublishedRow("TransforMatcher", 53.7),
    PublishedRow("MMNet", 50.4),
    PublishedRow("CATs", 49.9),
    PublishedRow("CHM", 46.3),
    PublishedRow("DHPF", 37.3),
    PublishedRow("SCOT", 35.6),
    PublishedRow("NC-Net", 20.1),
)
"""From the table of the LPMFlow paper, best first."""


_SPAIR_NAME = re.compile(r"(\d+)-([^-:]+)-([^-:]+):(\w+)")
_PHOTOGRAPHS = 100
"""Of a category in the whole of SPair-71k, which has 1,800."""


def is_spair_test(pairs: Sequence[KeypointPair]) -> bool:
    """Whether pairs are the official test split of SPair-71k, so far as that shows without its list.

    All of this must hold, and a subset, a split of one's own or pairs re-combined from the same annotations fail by it:

    - as many pairs of each category as `SPAIR_TEST_PAIRS` says, 12,234 together;
    - every pair is called NUMBER-SOURCE-TARGET:category, by its own category, by the files of its two different
      photographs, and by a number no other pair has;
    - no two photographs are a pair twice in one direction, and no category shows more than the 100 photographs it has;
    - every pair says its category's points and all four difficulties, as the official annotations do.

    The contents of photographs and annotations are not looked at: the hash of the data in a report tells copies apart.
    """
    if Counter(pair.category for pair in pairs) != SPAIR_TEST_PAIRS:
        return False
    numbers, ordered = set(), set()
    shown: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        parts = _SPAIR_NAME.fullmatch(pair.name)
        if parts is None or parts[4] != pair.category or parts[2] == parts[3]:
            return False
        if (pair.source.stem, pair.target.stem) != (parts[2], parts[3]):
            return False
        if pair.point_ids is None or not all(name in pair.difficulty for name in _DIFFICULTIES):
            return False
        numbers.add(parts[1])
        ordered.add((pair.category, parts[2], parts[3]))
        shown[pair.category] |= {parts[2], parts[3]}
    return len(numbers) == len(ordered) == len(pairs) and max(map(len, shown.values())) <= _PHOTOGRAPHS
