"""Single pairs: which of them are evaluated, and what came out for each, so that two models compare pair by pair."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpmflow.data.pairs import KeypointPair
from lpmflow.evaluation import Scores


def check_limit(limit: int | None) -> None:
    """ValueError for a `limit` below 1; None is no limit."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")


def spread(total: int, limit: int | None) -> list[int]:
    """The numbers of `limit` of `total` pairs, evenly spread over their order; all of them where there are no more.

    They are always the same, the first pair is among them, and twice as many hold these. Raises what `check_limit`
    raises.
    """
    check_limit(limit)
    if limit is None or limit >= total:
        return list(range(total))
    return [index * total // limit for index in range(limit)]


def pair_rows(
    pairs: Sequence[KeypointPair],
    numbers: Sequence[int],
    root: str | os.PathLike[str],
    figures: Mapping[str, NDArray[np.float64]],
) -> list[dict[str, Any]]:
    """A row for each of the pairs `numbers`: what it is, and its own of each of `figures`, name -> (len(numbers),).

    Photographs are named from `root`. What is not finite is None.
    """
    rows = []
    for place, number in enumerate(numbers):
        pair = pairs[number]
        rows.append(
            {
                "index": number,
                "pair": pair.name,
                "source": _named(pair.source, root),
                "target": _named(pair.target, root),
                "category": pair.category,
                "points": len(pair.source_points) or None,
                **{name: _finite(float(values[place])) for name, values in figures.items()},
            }
        )
    return rows


def figures_of(scores: Scores, alphas: Sequence[float]) -> dict[str, NDArray[np.float64]]:
    """Of each pair PCK at each alpha, percent, and the mean of its points' distances over R, named by the protocol."""
    name = scores.protocol.name
    found = {f"{name} PCK@{alpha}": 100 * scores.by_pair(alpha) for alpha in alphas}
    return {**found, f"{name} mean error": scores.mean_errors()}


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row, below a header; empty where something is None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _named(path: Path, root: str | os.PathLike[str]) -> str:
    found = Path(os.path.relpath(path, root)) if Path(path).is_relative_to(root) else Path(Path(path).name)
    return found.as_posix()


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
