"""`lpmflow evaluate --benchmark hpatches`: where every pixel lands, against what a homography says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lpmflow.benchmark.predict import PairMatcher
from lpmflow.data.homographies import HomographyPair
from lpmflow.evaluation import end_point_error
from lpmflow.result import Match

SHARES = (0.01, 0.05)
"""Errors counted as right, as parts of the target's longer side."""


def report_homographies(
    pairs: Sequence[HomographyPair], matcher: PairMatcher, *, batch_size: int, say: Callable[[str], object]
) -> dict[str, NDArray[np.float64]]:
    """The error of every source pixel seen in the target, in parts of the target's longer side, by pair."""
    say(
        f"{'':<16}" + "".join(f"{f'within {100 * share:g} %':>14}" for share in SHARES) + "   median error   mean error"
    )
    errors = {}
    for pair, match in _matched(pairs, matcher, batch_size):
        height, width = match.src_size
        pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float64)
        true = pair.transfer(pixels)
        seen = ((true >= -0.5) & (true <= (match.tgt_size[1] - 0.5, match.tgt_size[0] - 0.5))).all(axis=-1)
        if not seen.any():
            raise ValueError(f"{pair.name}: no pixel of {pair.source} lies in {pair.target} by its homography")
        error = np.linalg.norm(pixels + match.flow - true, axis=-1)[seen]
        dense = end_point_error(match.flow, true - pixels, seen)
        errors[pair.name] = error / max(match.tgt_size)
        shares = "".join(f"{100 * (errors[pair.name] <= share).mean():>12.1f} %" for share in SHARES)
        say(f"{pair.name:<16}{shares}   {dense.median:>9.1f} px   {dense.mean:>7.1f} px")
    return errors


def _matched(
    pairs: Sequence[HomographyPair], matcher: PairMatcher, batch_size: int
) -> Iterator[tuple[HomographyPair, Match]]:
    """Each pair and its match, a batch at a time, so that only one batch is in memory."""
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        yield from zip(chunk, matcher.batch([(pair.source, pair.target) for pair in chunk], batch_size), strict=True)
