"""Predictions: where a model put the marked points of every pair, in original pixels, and the file they are kept in.

Scoring needs nothing else, so a protocol that asks for the same points costs no further matching, and an evaluation
that was stopped goes on. A file is only used for the model, the pairs and the photographs it was made with, and while
its digest is that of what it holds. Runs may share one: a run that saves takes over what others have written since.

In the file (.safetensors), for P pairs: `sizes` (P, 4), height and width of source and target, 0 where not known yet;
and for each way of matching, such as "squash/forward": `.../done` (P,) uint8, and for each way of asking `.../exact`,
`.../512`, ... (K, 2) float64, the points of all pairs one after the other, NaN where not known yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lpmflow
from lpmflow.data.pairs import KeypointPair
from lpmflow.evaluation import PROTOCOLS, Protocol
from lpmflow.evaluation.protocols import FORWARD, Size
from lpmflow.flowfile import replacing

FORMAT = "lpmflow-predictions-2"
Points = NDArray[np.float64]


@dataclass(frozen=True)
class Key:
    """What predictions were made with; two runs may share them when all of it is equal."""

    model: str
    """The matcher's fingerprint."""
    pairs: str
    """`fingerprint` of the pairs."""


def fingerprint(pairs: Sequence[KeypointPair], root: str | os.PathLike[str] = "/") -> str:
    """16 hexadecimal digits of the pairs' names, points, outlines and photographs, these by name and content.

    Names of photographs count from `root`, so that a folder may move. Raises FileNotFoundError when one is missing.
    """
    digest, contents = hashlib.sha256(), {}
    for pair in pairs:
        photographs = []
        for path in (pair.source, pair.target):
            if path not in contents:
                contents[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            name = os.path.relpath(path, root) if Path(path).is_relative_to(root) else Path(path).name
            photographs.append([name, contents[path]])
        digest.update(json.dumps([pair.name, photographs, pair.flip]).encode())
        for points in (*points_of(pair), pair.source_points, pair.target_points):
            digest.update(np.ascontiguousarray(points, dtype=np.float64).tobytes())
    return digest.hexdigest()[:16]


def points_of(pair: KeypointPair) -> tuple[Points, Points]:
    """The source's and the target's points that are transferred: the keypoints, or the outlines of the objects.

    Raises ValueError when the pair has neither.
    """
    if len(pair.source_points):
        return pair.source_points, pair.target_points
    if isinstance(pair.source_mask, np.ndarray) and isinstance(pair.target_mask, np.ndarray):
        return pair.source_mask, pair.target_mask
    raise ValueError(f"pair {pair.name!r} must have keypoints, or outlines of its objects")


def way(rule: Protocol) -> str:
    """How a protocol wants photographs matched: predictions of one way come from the same run of the model."""
    return f"{rule.geometry}/{'forward' if rule.direction == FORWARD else 'backward'}"


def asked(rule: Protocol) -> str:
    """Which points a protocol asks for, among those of its way."""
    return str(rule.frame) if rule.truncate else "exact"


def askings(name: str) -> dict[str, Protocol]:
    """Every asking any protocol has for this way, each with a protocol that asks so: they cost nothing together."""
    return {asked(rule): rule for rule in PROTOCOLS.values() if way(rule) == name}


class Predictions:
    """What is known so far of where a model puts the points of `pairs`."""

    def __init__(self, pairs: Sequence[KeypointPair], key: Key) -> None:
        self.key = key
        self.unsaved = False
        """Whether something was put that no file has."""
        self._seen: tuple[int, ...] | None = None  # the file, as last read or written here
        self.unwritten: OSError | ValueError | None = None
        """Why `predict` could not write the file the last time it tried."""
        self.sizes = np.zeros((len(pairs), 4), dtype=np.int64)
        both = [points_of(pair) for pair in pairs]
        self._ends = {
            side: np.cumsum([0] + [len(points[index]) for points in both])
            for side, index in (("forward", 0), ("backward", 1))
        }
        self._done: dict[str, NDArray[np.uint8]] = {}
        self._points: dict[str, Points] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def missing(self, name: str) -> list[int]:
        """The pairs that have not been matched in the way `name`, such as "squash/forward"."""
        return np.flatnonzero(self._section(name) == 0).tolist()

    def put(self, name: str, number: int, sizes: tuple[Size, Size], landed: dict[str, Points]) -> None:
        """Keep what matching pair `number` in the way `name` gave: asking -> (N, 2)."""
        done = self._section(name)
        rows = self._rows(name, number)
        for asking, points in landed.items():
            self._points[f"{name}/{asking}"][rows] = points
        self.sizes[number] = (*sizes[0], *sizes[1])
        done[number] = 1
        self.unsaved = True

    def landed(self, rule: Protocol, numbers: Sequence[int] | None = None) -> list[Points]:
        """For each pair (N, 2), where the points `rule` asks for were put; every pair must have been matched.

        `numbers` names the pairs that are wanted; None: all.
        """
        name = way(rule)
        wanted = range(len(self)) if numbers is None else numbers
        assert self._section(name)[list(wanted)].all()
        points = self._points[f"{name}/{asked(rule)}"]
        return [points[self._rows(name, number)] for number in wanted]

    def size(self, number: int) -> tuple[Size, Size]:
        """(height, width) of the source and of the target of a pair that has been matched."""
        a, b, c, d = self.sizes[number].tolist()
        return (a, b), (c, d)

    def save(self, path: str | os.PathLike[str], about: dict[str, str]) -> None:
        """Write everything, whole or not at all; `about` is text for whoever looks into the file.

        What another run has written there since it was last read or written here is taken over first; raises what
        `load` raises when that cannot be, and leaves the file as it is.
        """
        from safetensors.numpy import save

        with _alone(path):
            if _state(path) not in (None, self._seen):
                self.load(path)
            tensors: dict[str, NDArray[Any]] = {"sizes": self.sizes, **self._points}
            tensors.update((f"{name}/done", done) for name, done in self._done.items())
            metadata = {**about, "format": FORMAT, "model": self.key.model, "pairs": self.key.pairs}
            with replacing(path) as temporary:
                temporary.write_bytes(save(tensors, {**metadata, "digest": _digest(tensors)}))
            self.unsaved, self._seen = False, _state(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over what the file holds and is not known yet.

        Raises OSError when it is damaged or no such file, ValueError when it was made by another model, for other pairs
        or photographs, or by another version of this format.
        """
        from safetensors import SafetensorError, safe_open

        advice = "delete it or name another file"
        seen = _state(path)
        try:
            with safe_open(path, framework="np") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise OSError(f"predictions {str(path)!r} are damaged or no predictions: {error}; {advice}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"predictions {str(path)!r} must say format {FORMAT}, which they do not; {advice}")
        for field, what in (("model", "another model or precision"), ("pairs", "other pairs or photographs")):
            found, wanted = metadata.get(field), getattr(self.key, field)
            if found != wanted:
                raise ValueError(
                    f"predictions {str(path)!r} were made with {what} ({field} {found}, and this is {wanted}); {advice}"
                )
        if metadata.get("digest") != _digest(tensors):
            raise OSError(f"predictions {str(path)!r} are damaged: they are not what their digest is of; {advice}")
        names = {name.removesuffix("/done") for name in tensors if name.endswith("/done")}
        try:
            self._take(names, tensors)
        except (KeyError, ValueError) as error:
            raise ValueError(f"predictions {str(path)!r} do not fit their pairs: {error}; {advice}") from error
        self._seen = seen

    def _take(self, names: Iterable[str], tensors: dict[str, NDArray[Any]]) -> None:
        if tensors["sizes"].shape != self.sizes.shape:
            raise ValueError(f"sizes must have shape {self.sizes.shape}, got {tensors['sizes'].shape}")
        for name in names:
            self._section(name)
            if any(f"{name}/{asking}" not in tensors for asking in askings(name)):
                continue  # made before a protocol asked for these points: match again
            new = (tensors[f"{name}/done"] == 1) & (self._done[name] == 0)
            rows = np.repeat(new, np.diff(self._ends[name.rpartition("/")[2]]))
            for asking in askings(name):
                held, found = self._points[f"{name}/{asking}"], tensors[f"{name}/{asking}"]
                if held.shape != found.shape:
                    raise ValueError(f"{name}/{asking} must have shape {held.shape}, got {found.shape}")
                held[rows] = found[rows]
            self._done[name][new] = 1
        unknown = ~self.sizes.any(axis=1)
        self.sizes[unknown] = tensors["sizes"][unknown]

    def _section(self, name: str) -> NDArray[np.uint8]:
        if name not in self._done:
            side = name.rpartition("/")[2]
            self._done[name] = np.zeros(len(self), dtype=np.uint8)
            for asking in askings(name):
                self._points[f"{name}/{asking}"] = np.full((int(self._ends[side][-1]), 2), np.nan)
        return self._done[name]

    def _rows(self, name: str, number: int) -> slice:
        ends = self._ends[name.rpartition("/")[2]]
        return slice(int(ends[number]), int(ends[number + 1]))


def _digest(tensors: dict[str, NDArray[Any]]) -> str:
    """SHA-256 of arrays with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _state(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """What changes when a file is replaced; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def about(benchmark: str, split: str, model: str) -> dict[str, str]:
    """Text for the file's metadata."""
    return {"benchmark": benchmark, "split": split, "model name": model, "lpmflow": lpmflow.__version__}


@contextlib.contextmanager
def _alone(path: str | os.PathLike[str]) -> Iterator[None]:
    """One process at a time reads and replaces files of a folder: its lock is the folder's, so that no file stays.

    Where there are no such locks (Windows, some network disks) there is none.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            folder = os.open(Path(path).absolute().parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
