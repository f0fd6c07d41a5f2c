"""`lpmflow evaluate` on pairs with marked points or outlines: match what is not matched yet, score, report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpmflow.benchmark.by_pair import check_limit, figures_of, pair_rows, spread
from lpmflow.benchmark.pictures import draw_worst
from lpmflow.benchmark.predict import PairMatcher, predict
from lpmflow.benchmark.predictions import Predictions, about, way
from lpmflow.benchmark.report import Report, Row, check_folder, folder_name, keypoint_rows, mask_rows
from lpmflow.benchmark.settings import settings_of
from lpmflow.benchmark.world import World
from lpmflow.data.loader import require_photographs
from lpmflow.data.masks import read_mask
from lpmflow.data.pairs import KeypointPair, layout, load_pairs
from lpmflow.evaluation import (
    DEFAULTS,
    Protocol,
    geometry_aware_points,
    intersection_over_union,
    label_transfer_accuracy,
    protocol,
    score,
)
from lpmflow.evaluation.protocols import BACKWARD
from lpmflow.evaluation.published import is_spair_test

MASKS = "masks"
OUTLINES = "outlines transferred from source to target and filled, even-odd; all pixels of the target count for LT-ACC"
_FORWARD = "squash/forward"


def evaluate(
    benchmark: str,
    root: str | os.PathLike[str],
    matcher: PairMatcher,
    *,
    split: str | None = None,
    protocols: Sequence[str] = (),
    alphas: Sequence[float] = (),
    batch_size: int = 8,
    workers: int = 0,
    predictions: str | os.PathLike[str] | None = None,
    groups: Mapping[str, Sequence[Sequence[Any]]] | None = None,
    worst: int = 0,
    worst_folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    world: World | None = None,
    ready: Callable[[Report], None] | None = None,
) -> Report:
    """Match the pairs of a data set and score them.

    Args:
        benchmark, root, split: as for `lpmflow.data.load_pairs`; split None: "val" where the data set has one, so that
            nothing is chosen on test pairs by accident, else its only one.
        matcher: an `lpmflow.Matcher`, or what answers like one.
        protocols: names, see `lpmflow.evaluation.PROTOCOLS`; none: the one most papers use on this data set. Pairs of
            Caltech-101 have outlines and no points; they are scored by LT-ACC and IoU, and no protocol applies.
        alphas: none: each protocol's own.
        batch_size, workers, predictions, world: see `predict`.
        groups: category -> symmetric groups of points, for the geometry-aware subset.
        limit: evaluate so many pairs only, evenly spread over the list (`lpmflow.benchmark.by_pair.spread`); the report
            says so, and its `dataset_hash` and the predictions' file are those of all pairs, so that a run without a
            limit goes on from there.
        worst, worst_folder: draw so many of the worst pairs there, under the first protocol, at alpha 0.1 if that is
            asked for, else the largest.
        ready: is given the report before a picture is drawn and before an error of writing the predictions is raised,
            so that no figure is lost by either.

    Raises ValueError for a name or a number that makes no sense, and what reading the data, `predict` and `score`
    raise; whatever can be refused is refused before anything is matched.
    """
    chosen = layout(benchmark)
    part = split if split is not None else ("val" if "val" in chosen.splits else chosen.splits[0])
    here = world or World()
    if benchmark not in DEFAULTS:
        for name, given in (("protocol", protocols), ("alpha", alphas), ("groups", groups)):
            if given:
                raise ValueError(
                    f"{name} must not be given for {benchmark}, whose pairs have outlines and no keypoints"
                )
    rules = _rules(benchmark, protocols)
    for alpha in alphas:
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha must be a number above 0, got {alpha}")
    check_limit(limit)
    if worst < 0:
        raise ValueError(f"worst must be at least 0, got {worst}")
    if worst and (worst_folder is None or not rules):
        raise ValueError("worst needs a folder to draw into, and pairs with keypoints")
    if worst_folder is not None:
        check_folder("worst_folder", worst_folder)
    everything = load_pairs(benchmark, root, part)
    for rule in rules:
        _check(rule, everything)
    numbers = spread(len(everything), limit)
    pairs = [everything[number] for number in numbers]
    aware: dict[str, NDArray[np.bool_]] = {}  # by direction: what is in view where the points land
    if groups is not None:
        owners = np.repeat(np.arange(len(everything)), [len(pair.source_points) for pair in everything])
        for direction in dict.fromkeys(rule.direction for rule in rules):
            found = geometry_aware_points(everything, groups, backward=direction == BACKWARD)
            aware[direction] = found[np.isin(owners, numbers)]
        _check_groups(groups, everything)
        if not all(found.any() for found in aware.values()):
            raise ValueError(f"limit must take in a pair with geometry-aware points for groups, got {limit}")
    require_photographs(pairs)
    ways = list(dict.fromkeys(way(rule) for rule in rules)) or [_FORWARD]
    known = predict(
        everything, matcher, ways, root=root, batch_size=batch_size, workers=workers, file=predictions,
        about=about(benchmark, part, matcher.name), world=here, only=numbers,
    )  # fmt: skip
    sizes = [known.size(number) for number in numbers]
    rows: list[Row] = []
    figures: dict[str, NDArray[np.float64]] = {}
    used: dict[str, tuple[float, ...]] = {}
    for number, rule in enumerate(rules):
        landed = known.landed(rule, numbers)
        scores = score(rule, pairs, landed, sizes)
        used[rule.name] = tuple(sorted(set(alphas or rule.alphas)))
        rows += keypoint_rows(scores, used[rule.name], aware.get(rule.direction))
        figures |= figures_of(scores, used[rule.name])
        if number == 0:
            first = scores, landed
    if not rules:
        figures = masks(pairs, known, numbers)
        rows += mask_rows([pair.category for pair in pairs], figures)
    categories = [pair.category for pair in pairs]
    report = Report(
        benchmark=benchmark,
        root=folder_name(root),
        split=part,
        pairs=len(pairs),
        points=sum(len(pair.source_points) for pair in pairs),
        categories=len(set(categories)),
        model=matcher.name,
        model_hash=known.key.model,
        dataset_hash=known.key.pairs,
        official=benchmark == "spair" and part == "test" and is_spair_test(pairs),
        protocols={rule.name: rule.as_dict() for rule in rules} or {MASKS: {"name": MASKS, "rule": OUTLINES}},
        alphas=used,
        rows=rows,
        of_pairs=len(everything) if len(pairs) < len(everything) else None,
        by_pair=pair_rows(everything, numbers, root, figures),
        settings=settings_of(matcher, batch_size),
    )
    if ready is not None:
        ready(report)
    if worst and worst_folder is not None and here.first:
        draw_worst(first[0], pairs, first[1], worst, worst_folder, report.table_alpha(rules[0].name))
    if known.unwritten is not None:
        raise known.unwritten
    return report


def masks(pairs: Sequence[KeypointPair], known: Predictions, numbers: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """LT-ACC and IoU of each pair, percent: the source's outline, transferred and filled, against the target's mask.

    `numbers` are those of `pairs` in `known`.
    """
    exact = protocol("spair")  # asks for every vertex as it is
    found: dict[str, list[float]] = {"LT-ACC": [], "IoU": []}
    for number, pair, outline in zip(numbers, pairs, known.landed(exact, numbers), strict=True):
        size = known.size(number)[1]
        assert pair.target_mask is not None
        true = read_mask(pair.target_mask, size)
        try:
            moved = read_mask(outline, size)
        except ValueError:  # it was moved out of the photograph, or shrunk to nothing
            moved = np.zeros(size, dtype=bool)
        found["LT-ACC"].append(label_transfer_accuracy(moved, true))
        found["IoU"].append(intersection_over_union(moved, true))
    return {name: np.array(values) for name, values in found.items()}


def _rules(benchmark: str, names: Sequence[str]) -> list[Protocol]:
    if benchmark not in DEFAULTS:
        return []
    return [protocol(name) for name in dict.fromkeys(names or (DEFAULTS[benchmark],))]


def _check_groups(groups: Mapping[str, Sequence[Sequence[Any]]], pairs: Sequence[KeypointPair]) -> None:
    """ValueError for a category or a point that no pair has: by a slip there, points would be left out in silence."""
    known: dict[str, set[str]] = {}
    for pair in pairs:
        seen = pair.point_ids if pair.target_visible is None else pair.target_visible  # which the others are among
        known.setdefault(pair.category, set()).update(str(one) for one in np.asarray(seen).tolist())
    for category, own in groups.items():
        if category not in known:
            raise ValueError(f"groups must name categories of these pairs, {', '.join(sorted(known))}, got {category}")
        absent = [str(one) for group in own for one in group if str(one) not in known[category]]
        if absent:
            there = ", ".join(sorted(known[category], key=lambda text: (len(text), text)))
            raise ValueError(f"groups must hold points that some pair of {category} has, {there}, got {absent[0]}")


def _check(rule: Protocol, pairs: Sequence[KeypointPair]) -> None:
    """ValueError when a pair lacks what the protocol measures against, so far as that shows before matching."""
    for pair in pairs:
        rule.reference(pair, pair.source_size or (1, 1), pair.target_size or (1, 1))
