"""Match every pair and keep where its points went: in batches, on several processes, going on where a run stopped."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from lpmflow.benchmark.predictions import Key, Points, Predictions, askings, fingerprint, points_of
from lpmflow.benchmark.world import World
from lpmflow.data.loader import PairDataset, PairSample
from lpmflow.data.pairs import KeypointPair
from lpmflow.evaluation.protocols import Size
from lpmflow.result import Match

SAVE_EVERY = 30.0
"""Seconds between two writings of the file."""


class PairMatcher(Protocol):
    """What can be evaluated: `lpmflow.Matcher` and whatever answers like it."""

    @property
    def name(self) -> str:
        """What to call it in a report."""

    def fingerprint(self) -> str:
        """The same for the same answers, another for others."""

    def batch(self, pairs: Any, batch_size: int = 8) -> list[Match]:
        """One `Match` for each (source, target), images as tensors (3, H, W) uint8 or paths."""


def predict(
    pairs: Sequence[KeypointPair],
    matcher: PairMatcher,
    ways: Sequence[str],
    *,
    root: str | os.PathLike[str] = "/",
    batch_size: int = 8,
    workers: int = 0,
    file: str | os.PathLike[str] | None = None,
    about: dict[str, str] | None = None,
    world: World | None = None,
) -> Predictions:
    """Where `matcher` puts the points of `pairs`, matched in each of `ways`, such as "squash/forward".

    Args:
        root: the folder that photographs are named from, see `lpmflow.benchmark.predictions.fingerprint`.
        batch_size: pairs the model gets at once. Pairs are batched in their order whatever the number of processes, so
            that results do not depend on it.
        workers: processes that read photographs ahead; 0: this one reads them.
        file: where predictions are kept between runs, written every half minute and when the work ends or is
            interrupted. What it holds is not matched again.
        world: the processes that share the work; None: this one alone. Every one gets all predictions.

    Raises ValueError for a `batch_size` below 1 or `workers` below 0, and what `Predictions.load`, reading photographs
    and matching them raise.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    here = world or World()
    known = Predictions(pairs, Key(matcher.fingerprint(), fingerprint(pairs, root)))
    if file is not None:
        if not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(f"predictions must be a file in an existing folder, got {str(file)!r}")
        _load_everywhere(known, file, here)
    save = _Saver(known, file if here.first else None, about or {})
    for name in ways:
        try:
            _match_missing(pairs, matcher, name, known, batch_size, workers, here, save)
        finally:
            save()
    return known


def _match_missing(
    pairs: Sequence[KeypointPair],
    matcher: PairMatcher,
    name: str,
    known: Predictions,
    batch_size: int,
    workers: int,
    here: World,
    save: _Saver,
) -> None:
    missing = known.missing(name)
    batches = [missing[first : first + batch_size] for first in range(0, len(missing), batch_size)]
    mine = iter(_loaded(pairs, batches[here.rank :: here.size], workers))
    progress = Progress(name, len(missing), len(pairs), here.first)
    for _ in range(0, len(batches), here.size):
        try:
            samples = next(mine, [])
            found: Any = [
                (sample.number, *answer)
                for sample, answer in zip(samples, _matched(samples, pairs, matcher, name), strict=True)
            ]
        except Exception as error:
            if here.size == 1:
                raise
            found = error
        for answers in here.gather_or_raise(found):
            for number, sizes, landed in answers:
                known.put(name, number, sizes, landed)
            progress.add(len(answers))
        save.now_and_then()
    progress.close()


def _loaded(pairs: Sequence[KeypointPair], batches: list[list[int]], workers: int) -> Iterator[list[PairSample]]:
    """The photographs of each batch, decoded, at their own sizes."""
    loader: DataLoader[Any] = DataLoader(
        PairDataset(pairs),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        # a process with threads must not fork
        multiprocessing_context="spawn" if workers else None,
    )
    return iter(loader)


def _matched(
    samples: Sequence[PairSample], pairs: Sequence[KeypointPair], matcher: PairMatcher, name: str
) -> list[tuple[tuple[Size, Size], dict[str, Points]]]:
    """Of each sample the sizes of its photographs, and asking -> where the points went, in original pixels."""
    if not samples:
        return []
    geometry, _, side = name.partition("/")
    forward = side == "forward"
    shown, offsets = [], []
    for sample in samples:
        images = (sample.source, sample.target) if forward else (sample.target, sample.source)
        padded = [_padded(image) if geometry == "pad" else (image, np.zeros(2)) for image in images]
        shown.append((padded[0][0], padded[1][0]))
        offsets.append((padded[0][1], padded[1][1]))
    found = []
    for sample, match, (begin, end) in zip(samples, matcher.batch(shown, len(shown)), offsets, strict=True):
        sizes = (_size(sample.source), _size(sample.target))
        size = sizes[0 if forward else 1]
        points = _mirrored(pairs[sample.number], points_of(pairs[sample.number])[0 if forward else 1], size)
        landed = {}
        for asking, rule in askings(name).items():
            moved = match.transfer(rule.queries(points, size) + begin) - end
            landed[asking] = _mirrored(pairs[sample.number], moved, sizes[1 if forward else 0])
        found.append((sizes, landed))
    return found


def _padded(image: Tensor) -> tuple[Tensor, Points]:
    """The photograph (3, H, W) in the middle of a black square, and where its corner went, (x, y)."""
    height, width = _size(image)
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = image.new_zeros(3, side, side)
    square[:, top : top + height, left : left + width] = image
    return square, np.array([left, top], dtype=np.float64)


def _mirrored(pair: KeypointPair, points: Points, size: Size) -> Points:
    """The points where the data set wants photographs mirrored, as `PairDataset` does it to them; and back."""
    return points * [-1, 1] + [size[1] - 1, 0] if pair.flip else points


def _size(image: Tensor) -> Size:
    return image.shape[1], image.shape[2]


def _load_everywhere(known: Predictions, file: str | os.PathLike[str], here: World) -> None:
    """The first process reads the file; the others get what it read, or its error, and need not see the same disk."""
    failed: Exception | None = None
    if here.first and Path(file).exists():
        try:
            known.load(file)
        except (OSError, ValueError) as error:
            failed = error
    if failed := here.same(failed):
        raise failed
    if here.size > 1:
        known.__dict__.update(here.same(known.__dict__))


class _Saver:
    """Writes the file when something new is known."""

    def __init__(self, known: Predictions, file: str | os.PathLike[str] | None, about: dict[str, str]) -> None:
        self.known, self.file, self.about = known, file, about
        self.saved = time.monotonic()

    def now_and_then(self) -> None:
        if time.monotonic() - self.saved > SAVE_EVERY:
            self()

    def __call__(self) -> None:
        if self.file is not None:
            self.known.save(self.file, self.about)
        self.saved = time.monotonic()


class Progress:
    """A bar on a terminal, else one line when it is done; nothing when there was nothing to do."""

    def __init__(self, name: str, missing: int, total: int, shown: bool) -> None:
        from tqdm import tqdm

        self.name, self.total, self.missing = name, total, missing
        self.shown = shown and missing > 0
        self.start = time.monotonic()
        bar = self.shown and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=total - missing, desc=f"matching {name}", unit="pair", disable=not bar)

    def add(self, pairs: int) -> None:
        self.bar.update(pairs)

    def close(self) -> None:
        self.bar.close()
        if self.shown and self.bar.disable:
            seconds = time.monotonic() - self.start
            print(
                f"matched {self.missing} of {self.total} pairs, {self.name}, in {seconds:.0f} s "
                f"({self.missing / max(seconds, 1e-3):.1f} a second)",
                file=sys.stderr,
            )
