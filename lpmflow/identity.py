"""The baseline that matches nothing; it answers like `lpmflow.Matcher`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from lpmflow.images import ImageLike, load_image, to_uint8
from lpmflow.result import Match


class IdentityMatcher:
    """Says that each point lies where it lies, as a part of the photograph: x scaled by the widths, y by the heights.

    What it scores is what a data set gives away for nothing.
    """

    name = "identity"

    def __call__(self, src: ImageLike, tgt: ImageLike) -> Match:
        """The `Match` without a displacement; images as for `lpmflow.Matcher`, with its errors."""
        source, target = (_pixels(image, name) for image, name in ((src, "src"), (tgt, "tgt")))
        one = np.ones((1, 1), np.float32)
        return Match(source, target, np.zeros((2, 1, 1), np.float32), one, one)

    def batch(self, pairs: Iterable[tuple[ImageLike, ImageLike]], batch_size: int = 8) -> list[Match]:
        """One `Match` for each (source, target)."""
        return [self(src, tgt) for src, tgt in pairs]

    def fingerprint(self) -> str:
        return "identity"


def _pixels(image: ImageLike, name: str) -> NDArray[np.uint8]:
    """(H, W, 3). A tensor that has them, as an evaluation gives, is taken as it is: nothing else would take time."""
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3:
        found: NDArray[np.uint8] = image.permute(1, 2, 0).cpu().numpy()
        if found.size:
            return found
    return to_uint8(load_image(image, name))
