"""Scores of a whole set of pairs under one protocol: both averages, tables, subsets and intervals, at any alpha.

    scores = score(protocol("spair"), pairs, landed, sizes)
    scores.pck(0.1).per_image, scores.by_category(0.1)["cat"], scores.interval(0.1)

All distances are kept, so another alpha costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lpmflow.evaluation.pck import PCK
from lpmflow.evaluation.protocols import Protocol, Size

if TYPE_CHECKING:
    from lpmflow.data.pairs import KeypointPair

Bools = NDArray[np.bool_]

DIFFICULTIES = ("viewpoint", "scale", "truncation", "occlusion")
"""What SPair-71k is split by; higher is harder."""


@dataclass(frozen=True)
class Interval:
    """A bootstrap confidence interval, in percent."""

    per_image: tuple[float, float]
    per_point: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Scores:
    """Every point's miss, by pair. Pairs are numbered 0..P-1, points 0..K-1 in the order of the pairs."""

    protocol: Protocol
    names: list[str]
    """P names of pairs."""
    categories: list[str]
    """P categories."""
    owners: NDArray[np.int64]
    """(K,): the pair each point belongs to; not falling, and every pair has one at least."""
    errors: NDArray[np.float64]
    """(K,): distance to the marked point over R; NaN where the model said nothing usable, which is never right."""
    nearest: Bools
    """(K,): whether no other marked point of the pair is nearer to the predicted one."""
    difficulty: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    """Name of `DIFFICULTIES` -> (P,) levels, -1 where the data set does not say."""

    def correct(self, alpha: float) -> Bools:
        """(K,): whether each point is right at `alpha`."""
        with np.errstate(invalid="ignore"):
            return self.errors < alpha if self.protocol.strict else self.errors <= alpha

    def pck(self, alpha: float, *, dagger: bool = False, points: Bools | None = None) -> PCK:
        """PCK at `alpha`.

        `dagger=True` is PCK-dagger: no other marked point of the pair may be nearer to where a point landed than its
        own, so that landing on the neighbouring leg of the chair is wrong however small the chair. `points` (K,)
        restricts to a subset; pairs without a point of it do not count. Raises ValueError when the subset is empty or
        of another shape, or alpha is not above 0.
        """
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha}")
        right = self.correct(alpha)
        if dagger:
            right = right & self.nearest
        shares, sums, counts = self._by_pair(right, points)
        total = int(counts.sum())
        return PCK(alpha, 100 * float(shares.mean()), 100 * float(sums.sum() / total), len(shares), total)

    def by_category(self, alpha: float) -> dict[str, PCK]:
        """Category -> its PCK, in the order of the alphabet."""
        codes = np.array(self.categories)
        return {name: self._of_pairs(alpha, codes == name) for name in sorted(set(self.categories))}

    def by_difficulty(self, alpha: float) -> dict[str, dict[int, PCK]]:
        """Name of `DIFFICULTIES` -> level -> PCK of the pairs at that level; only what the data set says."""
        table: dict[str, dict[int, PCK]] = {}
        for name, levels in self.difficulty.items():
            known = sorted(set(levels[levels >= 0].tolist()))
            if known:
                table[name] = {level: self._of_pairs(alpha, levels == level) for level in known}
        return table

    def by_pair(self, alpha: float) -> NDArray[np.float64]:
        """(P,): each pair's share of points that are right."""
        return self._by_pair(self.correct(alpha), None)[0]

    def mean_errors(self) -> NDArray[np.float64]:
        """(P,): the mean of each pair's `errors` without those that are not finite; NaN where none is."""
        usable = np.isfinite(self.errors)
        sums = np.bincount(self.owners, np.where(usable, self.errors, 0))
        counts = np.bincount(self.owners, usable)
        return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)

    def worst(self, count: int) -> list[int]:
        """Up to `count` pairs with the largest mean error, worst first; a point without a usable answer counts as 1e9.

        Means, not shares, so that pairs of which every point is wrong have an order too.
        """
        errors = np.where(np.isfinite(self.errors), self.errors, 1e9)
        means = np.bincount(self.owners, errors) / np.bincount(self.owners)
        return np.argsort(-means, kind="stable")[: max(count, 0)].tolist()

    def interval(self, alpha: float, *, level: float = 0.95, draws: int = 1000, seed: int = 0) -> Interval:
        """Percentile bootstrap over pairs, the unit that was sampled: the same numbers for the same seed.

        It says how much the figure would move with another draw of pairs of this kind. Pairs that share photographs
        are not independent, so the true interval is wider. Raises ValueError when `level` is not between 0 and 1 or
        `draws` is below 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {level}")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        shares, sums, counts = self._by_pair(self.correct(alpha), None)
        random, pairs = np.random.default_rng(seed), len(shares)
        found = np.empty((draws, 2))
        for first in range(0, draws, 64):
            drawn = random.integers(0, pairs, (min(64, draws - first), pairs))
            found[first : first + 64, 0] = shares[drawn].mean(axis=1)
            found[first : first + 64, 1] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        low, high = np.quantile(100 * found, [(1 - level) / 2, (1 + level) / 2], axis=0).tolist()
        return Interval((low[0], high[0]), (low[1], high[1]))

    def _of_pairs(self, alpha: float, pairs: Bools) -> PCK:
        return self.pck(alpha, points=pairs[self.owners])

    def _by_pair(
        self, right: Bools, points: Bools | None
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each pair with a point of the subset: its share of right ones, how many, of how many."""
        owners = self.owners
        if points is not None:
            if points.shape != owners.shape or points.dtype != np.bool_:
                raise ValueError(f"points must be bool of shape {owners.shape}, got {points.dtype} {points.shape}")
            owners, right = owners[points], right[points]
        if not len(owners):
            raise ValueError("points must hold at least one point")
        counts = np.bincount(owners)
        sums = np.bincount(owners[right], minlength=len(counts))
        sums, counts = sums[counts > 0], counts[counts > 0]
        return sums / counts, sums, counts


def score(
    rule: Protocol,
    pairs: Sequence[KeypointPair],
    landed: Sequence[ArrayLike],
    sizes: Sequence[tuple[Size, Size]],
) -> Scores:
    """Judge predictions under a protocol.

    Args:
        pairs: P pairs with marked points.
        landed: for each pair where the model put `rule.queries` of its points, (N, 2) in original pixels; NaN for a
            point without an answer.
        sizes: for each pair (height, width) of source and target photograph.

    Raises ValueError when the three are not equally many, there is no pair, a pair has no point, or a pair lacks what
    the protocol measures against.
    """
    if not len(pairs) == len(landed) == len(sizes):
        raise ValueError(
            f"pairs, landed and sizes must be equally many, got {len(pairs)}, {len(landed)} and {len(sizes)}"
        )
    if not pairs:
        raise ValueError("pairs must hold at least one pair")
    errors, nearest, counts = [], [], []
    for pair, points, (source_size, target_size) in zip(pairs, landed, sizes, strict=True):
        if not len(pair.source_points):
            raise ValueError(f"pair {pair.name!r} has no keypoints, which a protocol for keypoints needs")
        misses = rule.misses(pair, points, source_size, target_size)
        own = misses.diagonal()
        errors.append(own)
        with np.errstate(invalid="ignore"):
            nearest.append((own[:, None] <= misses).all(axis=1))
        counts.append(len(own))
    levels = {
        name: np.array([pair.difficulty.get(name, -1) for pair in pairs], dtype=np.int64) for name in DIFFICULTIES
    }
    return Scores(
        rule,
        [pair.name for pair in pairs],
        [pair.category for pair in pairs],
        np.repeat(np.arange(len(pairs)), counts),
        np.concatenate(errors),
        np.concatenate(nearest),
        {name: level for name, level in levels.items() if (level >= 0).any()},
    )
