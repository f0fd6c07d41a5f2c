"""What a folder of image pairs holds, and all that is wrong with it: every list, annotation and photograph is read.

report = check_pairs("SPair-71k")
print("\\n".join(report.lines()))
"""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from lpmflow.data.files import require_folder
from lpmflow.data.flows import FlowPair, flow_records, holds_flow
from lpmflow.data.homographies import HomographyPair, homography_files, homography_records
from lpmflow.data.masks import read_mask
from lpmflow.data.pairs import BENCHMARKS, KeypointPair, Layout, beyond, layout, pair_records, require_inside

Pair = TypeVar("Pair")
_HOLDS = {"hpatches": homography_files, "dense": holds_flow}
KNOWN = (*BENCHMARKS, *_HOLDS)
"""The layouts that are recognised."""
CAP = 20
"""Mistakes that are printed; the rest are counted."""
_OUTLINE_BEYOND = 1.0
"""How far beyond the border an outline may lie, as a part of the longer side: it is cut off there, so only what cannot
be a hand's drawing is a mistake."""


@dataclass
class SplitReport:
    """What one split holds, the pairs that cannot be read left out."""

    name: str
    pairs: int = 0
    points: int = 0
    photographs: int = 0
    categories: Counter[str] = field(default_factory=Counter)


@dataclass
class Report:
    """What a folder holds, and what is wrong with it."""

    root: Path
    title: str
    splits: list[SplitReport] = field(default_factory=list)
    sizes: dict[Path, tuple[int, int]] = field(default_factory=dict)
    """(height, width) of every photograph that can be decoded."""
    beyond: int = 0
    """Points that lie beyond the border of their photograph, by no more than is allowed; one of every pair's each."""
    unit: str = "points"
    """What is known to correspond: points, or pixels where every one's place is known."""
    wrong: list[str] = field(default_factory=list)
    """One sentence each, beginning with the file and the record; a missing file is told once, with how many want it."""

    def lines(self, cap: int = CAP) -> list[str]:
        """The report as lines of text, with `cap` mistakes at most and the number of the rest."""
        table: list[tuple[str, ...]] = [("split", "pairs", self.unit, "photographs", "categories")]
        for split in self.splits:
            counts = (split.pairs, split.points, split.photographs, len(split.categories))
            table.append((split.name, *(f"{count:,}" for count in counts)))
        wide = max(len(row[0]) for row in table)
        said = [f"{self.root}: in the layout of {self.title}"]
        said += ["".join((row[0].ljust(wide), *(cell.rjust(13) for cell in row[1:]))) for row in table]
        for split in self.splits:
            if split.categories:
                # a no-break space keeps a name and its number on one line
                counted = ", ".join(f"{name}\xa0{count:,}" for name, count in sorted(split.categories.items()))
                wrapped = textwrap.wrap(f"{split.name}: {counted}", 100, subsequent_indent="    ")
                said += [line.replace("\xa0", " ") for line in wrapped]
        if self.sizes:
            small, large = (pick(self.sizes.values(), key=lambda size: size[0] * size[1]) for pick in (min, max))
            said.append(
                f"photographs: {len(self.sizes):,}, from {small[1]} x {small[0]} to {large[1]} x {large[0]} pixels"
            )
        if self.beyond:
            said.append(f"points a little beyond the border of their photograph: {self.beyond:,}")
        if not self.wrong:
            return [*said, "nothing is wrong"]
        said.append(f"wrong: {len(self.wrong):,}")
        said += [f"  {' '.join(sentence.split())}" for sentence in self.wrong[:cap]]
        if len(self.wrong) > cap:
            said.append(f"  and {len(self.wrong) - cap:,} more")
        return said


def recognise(root: str | os.PathLike[str]) -> str:
    """The name, one of `KNOWN`, of the layout a folder is in.

    Raises FileNotFoundError or NotADirectoryError when it is in none, ValueError when it is in several.
    """
    folder = require_folder(root)
    found = _recognised(folder)
    if not found:
        below = [(one, names) for one in sorted(folder.iterdir()) if one.is_dir() and (names := _recognised(one))]
        hint = f"; {str(below[0][0])!r} in it is in that of {below[0][1][0]}" if below else ""
        raise FileNotFoundError(
            f"root must be a folder in the layout of one of {', '.join(KNOWN)}, which {str(root)!r} is not{hint}"
        )
    if len(found) > 1:
        raise ValueError(f"benchmark must be given, {' or '.join(found)}: {str(root)!r} is in the layout of each")
    return found[0]


def _recognised(folder: Path) -> list[str]:
    names = [name for name in BENCHMARKS if layout(name).present(folder)]
    inside = [folder, *(one for one in folder.iterdir() if one.is_dir())]
    return [*names, *(name for name, holds in _HOLDS.items() if any(map(holds, inside)))]


def check_pairs(
    root: str | os.PathLike[str],
    benchmark: str | None = None,
    *,
    progress: Callable[[list[Path]], Iterable[Path]] | None = None,
) -> Report:
    """Read every split, annotation and photograph of a folder; `benchmark` is recognised when it is not given.

    `progress` may wrap the list of photographs, as tqdm does. Raises ValueError for an unknown benchmark, and
    OSError or ValueError when there is no such folder or layout; all that is wrong inside comes in the report.
    """
    folder = require_folder(root)
    name = benchmark if benchmark is not None else recognise(folder)
    if name in _HOLDS:
        return _check_dense(name, folder, progress)
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark must be one of {', '.join(KNOWN)}, got {name!r}")
    found = layout(name)
    splits = found.present(folder)
    if not splits:
        pair_records(found, folder, found.splits[-1])
        raise FileNotFoundError(f"root must be a folder in the layout of {found.title}, which {str(root)!r} is not")
    report = Report(folder, found.title)
    wrong = _Mistakes()
    pairs = [(split, pair) for split in splits for pair in _pairs(found, folder, split, report, wrong)]
    photographs = list(dict.fromkeys(path for _, pair in pairs for path in (pair.source, pair.target)))
    for path in progress(photographs) if progress else photographs:
        try:
            report.sizes[path] = _size(path)
        except OSError as error:
            wrong.add(error)
    first: dict[tuple[Path, Path, str], str] = {}
    for split, pair in pairs:
        other = first.setdefault((pair.source, pair.target, pair.category), split)
        if other != split:
            wrong.add(f"{split}, {pair.name}: a pair must be in one split, and {other} has its photographs too")
        for sentence in _mistakes(pair, report):
            wrong.add(f"{split}, {pair.name}: {sentence}")
    report.wrong = wrong.sentences()
    return report


def _check_dense(name: str, folder: Path, progress: Callable[[list[Path]], Iterable[Path]] | None) -> Report:
    """The same for pairs whose every pixel is known; a category is a folder."""
    records: Sequence[Callable[[], HomographyPair | FlowPair]] = (
        homography_records(folder) if name == "hpatches" else flow_records(folder)
    )
    wrong = _Mistakes()
    pairs = _readable(records, wrong)
    photographs = list(dict.fromkeys(path for pair in pairs for path in (pair.source, pair.target)))
    title = "HPatches" if name == "hpatches" else "dense flow"
    report, split = Report(folder, title, unit="pixels"), SplitReport("all", len(pairs))
    for path in progress(photographs) if progress else photographs:
        try:
            report.sizes[path] = _size(path)
        except OSError as error:
            wrong.add(error)
    for pair in pairs:
        split.categories[pair.source.resolve().parent.name] += 1
        if pair.source in report.sizes and pair.target in report.sizes:
            try:
                split.points += int(pair.truth(report.sizes[pair.source], report.sizes[pair.target])[1].sum())
            except (ValueError, OSError) as error:
                wrong.add(error)
    split.photographs = len(photographs)
    report.splits.append(split)
    report.wrong = wrong.sentences()
    return report


class _Mistakes:
    """Sentences in their order, each once; records that want the same missing file are one."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._records: dict[str, set[str]] = {}

    def add(self, mistake: object) -> None:
        sentence = str(mistake)
        _, missing, file = sentence.rpartition(": there is no ")
        cause = file if missing else sentence
        self._first.setdefault(cause, sentence)
        self._records.setdefault(cause, set()).add(sentence)

    def sentences(self) -> list[str]:
        said = []
        for cause, sentence in self._first.items():
            others = len(self._records[cause]) - 1
            said.append(f"{sentence} (and {others} more want it)" if others else sentence)
        return said


def _pairs(found: Layout, folder: Path, split: str, report: Report, wrong: _Mistakes) -> list[KeypointPair]:
    """The pairs of a split that can be read; counts them, and notes why the others cannot."""
    summary = SplitReport(split)
    report.splits.append(summary)
    try:
        records = pair_records(found, folder, split)
    except (ValueError, OSError) as error:
        wrong.add(error)
        return []
    pairs = _readable(records, wrong)
    summary.pairs = len(pairs)
    summary.points = sum(len(pair.source_points) for pair in pairs)
    summary.photographs = len({path for pair in pairs for path in (pair.source, pair.target)})
    summary.categories.update(pair.category for pair in pairs)
    for name, count in Counter(pair.name for pair in pairs).items():
        if count > 1:
            wrong.add(f"{split}, {name}: a pair must be listed once, and is listed {count} times")
    return pairs


def _readable(records: Iterable[Callable[[], Pair]], wrong: _Mistakes) -> list[Pair]:
    """The pairs that can be read; notes why the others cannot."""
    pairs = []
    for read in records:
        try:
            pairs.append(read())
        except (ValueError, OSError) as error:
            wrong.add(error)
    return pairs


def _size(path: Path) -> tuple[int, int]:
    """(height, width) of a photograph as `lpmflow.images` sees it; OSError naming it when it cannot be decoded."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            opened.load()
            width, height = ImageOps.exif_transpose(opened).size
    except Exception as error:
        raise OSError(f"{path} must be an image file, and cannot be decoded: {error}") from error
    return height, width


def _mistakes(pair: KeypointPair, report: Report) -> Iterable[str]:
    """What is wrong between a pair and its photographs."""
    if pair.point_ids is not None and len(np.unique(pair.point_ids)) < len(pair.point_ids):
        yield f"a point must be marked once, got points {pair.point_ids.tolist()}"
    sides = (
        ("source", pair.source, pair.source_points, pair.source_box, pair.source_size, pair.source_mask),
        ("target", pair.target, pair.target_points, pair.target_box, pair.target_size, pair.target_mask),
    )
    for side, path, points, box, said, mask in sides:
        size = report.sizes.get(path)
        if size is None:
            continue
        if said is not None and said != size:
            yield f"{path} must be {said[1]} x {said[0]}, the size it was marked at, got {size[1]} x {size[0]}"
            continue
        report.beyond += int(np.count_nonzero(beyond(points, size)))
        try:
            require_inside(f"{side}_points", points, size)
            if box is not None:
                require_inside(f"{side}_box", box.reshape(2, 2), size)
            if isinstance(mask, np.ndarray):
                require_inside(f"{side}_mask", mask, size, _OUTLINE_BEYOND)
            if mask is not None:
                read_mask(mask, size)
        except (ValueError, OSError) as error:
            yield str(error)
