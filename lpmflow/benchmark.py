"""`lpmflow evaluate`: match pairs whose truth is known, score, report. Data in `data/`, scores in `evaluation/`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from lpmflow.data.homographies import HomographyPair, load_homographies
from lpmflow.data.pairs import KeypointPair
from lpmflow.data.spair import load_spair
from lpmflow.evaluation import PCK, box_extent, pck, relative_errors
from lpmflow.evaluation.pck import PROTOCOL

if TYPE_CHECKING:
    from lpmflow.matcher import Matcher
    from lpmflow.result import Match

Pair = TypeVar("Pair", KeypointPair, HomographyPair)

BENCHMARKS = ("spair", "hpatches")
ALPHAS = (0.01, 0.05, 0.1, 0.15)
SHARES = (0.01, 0.05)
"""Errors counted as right on homographies, as parts of the target's longer side."""


def run(
    benchmark: str,
    root: str | os.PathLike[str],
    matcher: Matcher,
    *,
    split: str = "val",
    batch_size: int = 8,
    say: Callable[[str], object] = print,
) -> None:
    """Match and score a folder in the layout `benchmark`, "spair" or "hpatches", and `say` the report line by line.

    Raises ValueError for an unknown benchmark or a `batch_size` below 1, and what the reader of that layout and the
    matcher raise.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if benchmark == "spair":
        report_keypoints(load_spair(root, split), matcher, batch_size=batch_size, say=say, title=f"{root}, {split}")
    elif benchmark == "hpatches":
        report_homographies(load_homographies(Path(root)), matcher, batch_size=batch_size, say=say)
    else:
        raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {benchmark!r}")


def report_keypoints(
    pairs: Sequence[KeypointPair], matcher: Matcher, *, batch_size: int, say: Callable[[str], object], title: str
) -> dict[float, PCK]:
    """PCK of the matcher on `pairs` at each of `ALPHAS`."""
    errors = []
    for pair, match in _matched(pairs, matcher, batch_size):
        if pair.target_box is None:
            raise ValueError(f"pairs must have a target box, which {pair.name!r} has not")
        for said, found, path in (
            (pair.source_size, match.src_size, pair.source),
            (pair.target_size, match.tgt_size, pair.target),
        ):
            if said is not None and said != found:
                raise ValueError(
                    f"{path} must be {said[1]} x {said[0]}, the size it was marked at, got {found[1]} x {found[0]}"
                )
        height, width = match.src_size
        # marked points of these data sets lie beyond the border here and there
        points = pair.source_points.clip(-0.5, (width - 0.5, height - 0.5))
        moved = match.transfer(points)
        errors.append(relative_errors(moved, pair.target_points, box_extent(pair.target_box)))
    scores = {alpha: pck(errors, alpha) for alpha in ALPHAS}
    say(f"{title}: {len(pairs)} pairs, {sum(map(len, errors))} keypoints; correct is {PROTOCOL}")
    say("alpha   per image   per keypoint")
    for alpha, score in scores.items():
        say(f"{alpha:<5g}   {score.per_image:>7.1f} %   {score.per_point:>10.1f} %")
    return scores


def report_homographies(
    pairs: Sequence[HomographyPair], matcher: Matcher, *, batch_size: int, say: Callable[[str], object]
) -> dict[str, NDArray[np.float64]]:
    """The error of every source pixel seen in the target, in parts of the target's longer side, by pair."""
    say(f"{'':<16}" + "".join(f"{f'within {100 * share:g} %':>14}" for share in SHARES) + "   median error")
    errors = {}
    for pair, match in _matched(pairs, matcher, batch_size):
        height, width = match.src_size
        pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float64)
        true = pair.transfer(pixels)
        seen = ((true >= -0.5) & (true <= (match.tgt_size[1] - 0.5, match.tgt_size[0] - 0.5))).all(axis=-1)
        if not seen.any():
            raise ValueError(f"{pair.name}: no pixel of {pair.source} lies in {pair.target} by its homography")
        error = np.linalg.norm(pixels + match.flow - true, axis=-1)[seen]
        errors[pair.name] = error / max(match.tgt_size)
        shares = "".join(f"{100 * (errors[pair.name] <= share).mean():>12.1f} %" for share in SHARES)
        say(f"{pair.name:<16}{shares}   {np.median(error):.1f} px")
    return errors


def _matched(pairs: Sequence[Pair], matcher: Matcher, batch_size: int) -> Iterator[tuple[Pair, Match]]:
    """Each pair and its match, a batch at a time, so that only one batch is in memory."""
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        yield from zip(chunk, matcher.batch([(pair.source, pair.target) for pair in chunk], batch_size), strict=True)
