"""What papers report on SPair-71k, for comparison; every figure is theirs, none was measured here.

PCK@0.1 in percent on the official test split of 12,234 pairs, mean over pairs, by the protocol of the paper, which for
these is `lpmflow` or `cats`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ALPHA = 0.1

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


def is_spair_test(categories: Sequence[str]) -> bool:
    """Whether pairs of these categories, one for each pair, can be the official test split of SPair-71k."""
    found = {name: 0 for name in SPAIR_CATEGORIES}
    for name in categories:
        found[name] = found.get(name, 0) + 1
    return found == SPAIR_TEST_PAIRS
