"""The baseline that matches nothing; it answers like `lpmflow.Matcher`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lpmflow.images import ImageLike, load_pixels, to_uint8
from lpmflow.result import Match


class IdentityMatcher:
    """Says that each point lies where it lies, as a part of the photograph: x scaled by the widths, y by the heights.

    What it scores is what a data set gives away for nothing.
    """

    name = "identity"

    def __call__(self, src: ImageLike, tgt: ImageLike) -> Match:
        """The `Match` without a displacement; images as for `lpmflow.Matcher`, with its errors."""
        source, target = (to_uint8(load_pixels(image, name)) for image, name in ((src, "src"), (tgt, "tgt")))
        one = np.ones((1, 1), np.float32)
        return Match(source, target, np.zeros((2, 1, 1), np.float32), one, one)

    def batch(self, pairs: Iterable[tuple[ImageLike, ImageLike]], batch_size: int = 8) -> list[Match]:
        """One `Match` for each (source, target)."""
        return [self(src, tgt) for src, tgt in pairs]

    def fingerprint(self) -> str:
        return "identity"
