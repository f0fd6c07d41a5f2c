"""`lpmflow evaluate` on pairs whose every pixel is known: by a homography (HPatches), or by a flow (such as KITTI).

What papers quote differs from set to set, so all of it is given: the end-point error in pixels (EPE, AEPE) with its
median, the share of pixels within 1, 3 and 5 pixels (PCK of HPatches papers), KITTI's share of outliers (Fl), and the
share within 1 and 5 % of the target's longer side, which is the same for a photograph of any size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lpmflow.benchmark.by_pair import check_limit, spread
from lpmflow.benchmark.predict import PairMatcher
from lpmflow.benchmark.progress import Progress
from lpmflow.benchmark.report import Report, Row, folder_name
from lpmflow.benchmark.settings import settings_of
from lpmflow.benchmark.world import World
from lpmflow.data.flows import FlowPair, load_flows
from lpmflow.data.homographies import HomographyPair, load_homographies
from lpmflow.evaluation import end_point_error
from lpmflow.result import Match

DensePair = HomographyPair | FlowPair
DENSE = ("hpatches", "dense")
"""The benchmarks of this page."""
PIXELS = (1, 3, 5)
SHARES = (0.01, 0.05)
"""Misses counted as right: in pixels, and as parts of the target's longer side."""
MEASURES = (
    "EPE",
    "median",
    *(f"within {limit} px" for limit in PIXELS),
    *(f"within {100 * share:g} %" for share in SHARES),
    "Fl",
)
"""EPE and its median are in pixels, the others in percent of pixels; of EPE, median and Fl less is better."""
RULE = (
    "every pixel of the source whose place in the target is known, distances in original pixels; the photographs are "
    "squashed for the model"
)


def evaluate_dense(
    benchmark: str,
    root: str | os.PathLike[str],
    matcher: PairMatcher,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    world: World | None = None,
) -> Report:
    """Match the pairs of a folder and measure where every pixel of the source lands; `benchmark` is one of `DENSE`.

    `limit`: measure so many pairs only, evenly spread over the list; the report says so. Several processes (`world`)
    share the pairs; every one gets the report. Raises ValueError for another benchmark or a `batch_size` or `limit`
    below 1, and what reading the pairs, matching them and `HomographyPair.truth` or `FlowPair.truth` raise.
    """
    if benchmark not in DENSE:
        raise ValueError(f"benchmark must be one of {', '.join(DENSE)}, got {benchmark!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_limit(limit)
    everything: Sequence[DensePair] = (load_homographies if benchmark == "hpatches" else load_flows)(root)
    pairs = [everything[number] for number in spread(len(everything), limit)]
    here = world or World()
    found = _measured(pairs, matcher, batch_size, here)
    counts = np.array([pixels for pixels, _ in found])
    values = {name: np.array([one[name] for _, one in found]) for name in MEASURES}

    def row(measure: str, group: str, name: str, value: float, mean: float | None, pairs: int, pixels: int) -> Row:
        return Row(benchmark, measure, None, group, name, value, mean, pairs, pixels)

    rows = []
    for measure, by_pair in values.items():
        # a median of all pixels is no mean of medians
        over_all = None if measure == "median" else float((by_pair * counts).sum() / counts.sum())
        rows.append(row(measure, "all", "", float(by_pair.mean()), over_all, len(pairs), int(counts.sum())))
        for pair, value, pixels in zip(pairs, by_pair.tolist(), counts.tolist(), strict=True):
            rows.append(row(measure, "pair", pair.name, value, value, 1, pixels))
    return Report(
        benchmark=benchmark,
        root=folder_name(root),
        split="all",
        pairs=len(pairs),
        points=int(counts.sum()),
        categories=len({pair.source.parent for pair in pairs}),
        model=matcher.name,
        model_hash=matcher.fingerprint(),
        dataset_hash=_fingerprint(pairs),
        official=False,
        protocols={benchmark: {"name": benchmark, "rule": RULE}},
        alphas={},
        rows=rows,
        of_pairs=len(everything) if len(pairs) < len(everything) else None,
        settings=settings_of(matcher, batch_size),
    )


def measure(pair: DensePair, match: Match) -> tuple[int, dict[str, float]]:
    """How many pixels of a pair are known, and each of `MEASURES` over them."""
    truth, known = pair.truth(match.src_size, match.tgt_size)
    error = np.linalg.norm((match.flow - truth)[known], axis=-1)
    dense = end_point_error(match.flow, truth, known)
    found = {"EPE": dense.mean, "median": dense.median, "Fl": dense.outliers}
    found |= {f"within {limit} px": 100 * float((error <= limit).mean()) for limit in PIXELS}
    longer = max(match.tgt_size)
    found |= {f"within {100 * share:g} %": 100 * float((error / longer <= share).mean()) for share in SHARES}
    return dense.pixels, found


def _measured(
    pairs: Sequence[DensePair], matcher: PairMatcher, batch_size: int, here: World
) -> list[tuple[int, dict[str, float]]]:
    """`measure` of every pair, in every process. Batches are the same whatever the number of processes."""
    batches = [range(first, min(first + batch_size, len(pairs))) for first in range(0, len(pairs), batch_size)]
    results: dict[int, tuple[int, dict[str, float]]] = {}
    progress = Progress("dense", len(pairs), len(pairs), here.first)
    for first in range(0, len(batches), here.size):
        mine = batches[first + here.rank] if first + here.rank < len(batches) else range(0)
        try:
            matches = matcher.batch([(pairs[index].source, pairs[index].target) for index in mine], batch_size)
            found: Any = [(index, measure(pairs[index], match)) for index, match in zip(mine, matches, strict=True)]
        except Exception as error:
            if here.size == 1:
                raise
            found = error
        for answers in here.gather_or_raise(found):
            results.update(answers)
            progress.add(len(answers))
    progress.close()
    return [results[index] for index in range(len(pairs))]


def _fingerprint(pairs: Sequence[DensePair]) -> str:
    """16 hexadecimal digits of the photographs and of what is known of them, by name and content."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(pair.name.encode())
        for path in (pair.source, pair.target):
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
        truth = pair.homography.tobytes() if isinstance(pair, HomographyPair) else pair.file.read_bytes()
        digest.update(hashlib.sha256(truth).digest())
    return digest.hexdigest()[:16]
