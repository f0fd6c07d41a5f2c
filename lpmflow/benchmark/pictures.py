"""Pictures of the pairs a model does worst on."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lpmflow.benchmark.predictions import Points
from lpmflow.data.pairs import KeypointPair
from lpmflow.evaluation import Scores
from lpmflow.evaluation.protocols import FORWARD
from lpmflow.flowfile import replacing
from lpmflow.images import load_pixels, to_uint8
from lpmflow.visualize import prediction_figure

_MARK = "lpmflow evaluate --worst"
"""What every picture holds as its software, so that the next run knows it from a user's own files."""


def draw_worst(
    scores: Scores,
    pairs: Sequence[KeypointPair],
    landed: Sequence[Points],
    count: int,
    folder: str | os.PathLike[str],
    alpha: float,
) -> list[Path]:
    """Draw the `count` pairs with the largest mean error, worst first, as 001-NAME.png, ... in `folder`.

    A pair is drawn as the protocol matches it: lines lead from the points that were asked for to where the model put
    them, and marks show where they should be, with how far from there is right at `alpha`. Pictures that an earlier run
    drew there, and no other files, are removed. Raises OSError when the folder cannot be made or a photograph
    not be read.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    rule, drawn = scores.protocol, []
    right = scores.correct(alpha)
    errors = np.bincount(scores.owners, scores.errors) / np.bincount(scores.owners)
    for rank, number in enumerate(scores.worst(count), 1):
        pair = pairs[number]
        sides = ("source", "target") if rule.direction == FORWARD else ("target", "source")
        images = [to_uint8(load_pixels(getattr(pair, side), side)) for side in sides]
        own = np.flatnonzero(scores.owners == number)
        title = f"{pair.name}, {right[own].sum()} of {len(own)} right at alpha {alpha:g} ({rule.name})"
        if np.isfinite(errors[number]):
            title += f", mean error {errors[number]:.2f} R"
        places = rule.start(pair), landed[number], rule.truth(pair)
        sizes = [image.shape[:2] for image in (images if rule.direction == FORWARD else images[::-1])]
        reach = alpha * rule.reference(pair, *sizes) / rule.scale(images[1].shape[:2])
        figure = prediction_figure(
            images[0], images[1], *places, right[own], title=title, sides=sides, reach=(reach[0], reach[1])
        )
        path = root / f"{rank:03d}-{re.sub(r'[^0-9A-Za-z._()-]+', '_', pair.name)}.png"
        with replacing(path) as temporary, open(temporary, "wb") as file:
            figure.savefig(file, format="png", metadata={"Software": _MARK})
        drawn.append(path)
    for other in root.glob("[0-9][0-9][0-9]*-*.png"):
        if other not in drawn and _is_ours(other):
            other.unlink()
    return drawn


def _is_ours(path: Path) -> bool:
    """Whether a picture says of itself that it was drawn here."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == _MARK
    except OSError:
        return False
