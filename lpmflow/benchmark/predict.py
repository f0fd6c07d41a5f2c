"""Match every pair and keep where its points went: in batches, on several processes, going on where a run stopped."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lpmflow.benchmark.predictions import Key, Points, Predictions, askings, fingerprint, points_of
from lpmflow.benchmark.progress import Progress
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
    only: Sequence[int] | None = None,
) -> Predictions:
    """Where `matcher` puts the points of `pairs`, matched in each of `ways`, such as "squash/forward".

    Args:
        root: the folder that photographs are named from, see `lpmflow.benchmark.predictions.fingerprint`.
        batch_size: pairs the model gets at once. Pairs are batched in their order whatever the number of processes, so
            that results do not depend on it.
        workers: processes that read photographs ahead; 0: this one reads them. They are spawned, so a script that asks
            for any must do its work below `if __name__ == "__main__":`, or they would do it too.
        file: where predictions are kept between runs, written every half minute and when the work ends or is
            interrupted. What it holds is not matched again; what another run writes there meanwhile is kept.
        world: the processes that share the work; None: this one alone. Every one gets all predictions.
        only: numbers of the pairs to match, None all. A file serves both: what one run matched no other matches again.

    When the file cannot be written that is said on stderr and stands in `Predictions.unwritten`; it stops nothing.
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
        _match_missing(pairs, matcher, name, known, only, batch_size, workers, here, save)
    return known


def _match_missing(
    pairs: Sequence[KeypointPair],
    matcher: PairMatcher,
    name: str,
    known: Predictions,
    only: Sequence[int] | None,
    batch_size: int,
    workers: int,
    here: World,
    save: _Saver,
) -> None:
    wanted = set(range(len(pairs)) if only is None else only)
    missing = [number for number in known.missing(name) if number in wanted]
    batches = [missing[first : first + batch_size] for first in range(0, len(missing), batch_size)]
    progress = Progress(name, len(missing), len(wanted), here.first)
    with _loading(pairs, batches[here.rank :: here.size], workers) as mine, save:
        for _ in range(0, len(batches), here.size):
            try:
                samples = _read(next(mine, []))
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


class _Tried(Dataset[PairSample | OSError | ValueError]):
    """Samples, or what reading them raised: an exception that leaves a worker becomes a traceback in a string."""

    def __init__(self, pairs: Sequence[KeypointPair]) -> None:
        self.samples = PairDataset(pairs)

    def __getitem__(self, index: int) -> PairSample | OSError | ValueError:
        try:
            return self.samples[index]
        except (OSError, ValueError) as error:
            return error


def _read(tried: Sequence[PairSample | OSError | ValueError]) -> list[PairSample]:
    samples = []
    for sample in tried:
        if isinstance(sample, Exception):
            raise sample
        samples.append(sample)
    return samples


@contextlib.contextmanager
def _loading(pairs: Sequence[KeypointPair], batches: list[list[int]], workers: int) -> Iterator[Iterator[Any]]:
    """The photographs of each batch, decoded, at their own sizes, as `_read` takes them."""
    loader: DataLoader[Any] = DataLoader(
        _Tried(pairs),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        # a process with threads must not fork
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_leave_quickly,
    )
    if not workers:
        yield iter(loader)
        return
    with _signals_are_ours():
        loading: Any = iter(loader)
    try:
        yield loading
    finally:
        loading._shutdown_workers()  # an error may hold on to it until the end, when SIGTERM is sent and waited for


def _leave_quickly(worker: int) -> None:
    """A worker that is still sending when it ends would abort, its sending thread torn down within torch."""
    atexit.register(os._exit, 0)


@contextlib.contextmanager
def _signals_are_ours() -> Iterator[None]:
    """Processes started inside never get Ctrl-C or SIGTERM.

    Terminals and schedulers send both to all processes of a program. This one answers, and the others, which end with
    it, must be there until it has: that one of them died would be an error, in the midst of saving.
    """
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # starting it lets the two signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    """Writes the file when something new is known: now and then, and when a block of it ends, however it ends."""

    def __init__(self, known: Predictions, file: str | os.PathLike[str] | None, about: dict[str, str]) -> None:
        self.known, self.file, self.about = known, file, about
        self.saved = time.monotonic()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.or_say_why_not("")  # what ends the block is what is raised

    def now_and_then(self) -> None:
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.or_say_why_not()

    def or_say_why_not(self, and_now: str = "; matching goes on") -> None:
        """A full disk, or a file that is another's by now, is said once and stops nothing: figures need no file."""
        before, self.known.unwritten = self.known.unwritten, None
        try:
            self.save()
        except (OSError, ValueError) as error:
            if reason := getattr(error, "strerror", None):  # else it names the file itself
                error = OSError(f"predictions {str(self.file)!r} could not be written: {reason}")
            self.known.unwritten = error
            self.saved = time.monotonic()
            if before is None:
                print(f"{self.known.unwritten}{and_now}", file=sys.stderr, flush=True)

    def save(self) -> None:
        if self.file is not None and self.known.unsaved:
            self.known.save(self.file, self.about)
        self.saved = time.monotonic()
