"""What an evaluation found, as rows, and the files they are written to: JSON, CSV and Markdown.

Every file says what was measured, by which protocol, with which model, by which versions and when, because a figure
without these cannot be compared with another.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lpmflow
from lpmflow.benchmark.by_pair import to_csv
from lpmflow.benchmark.settings import cells
from lpmflow.evaluation import PCK, Scores
from lpmflow.flowfile import PathLike, as_path, is_stream, replacing

LEVEL = 0.95
"""Of the confidence intervals."""


@dataclass(frozen=True)
class Row:
    """One figure."""

    protocol: str
    measure: str
    """"PCK", "PCK-dagger", "LT-ACC", "IoU", or one of `lpmflow.benchmark.dense.MEASURES`."""
    alpha: float | None
    group: str
    """"all", "category", "geometry-aware", "pair", or what pairs are split by, such as "viewpoint"."""
    name: str
    """Which category, level or pair; empty for "all"."""
    per_image: float
    """Percent (pixels where the measure is one of distance), mean over pairs."""
    per_point: float | None
    """The same over all points or pixels; None for masks and medians."""
    pairs: int
    points: int | None
    per_image_low: float | None = None
    """Bounds of the 95 % bootstrap interval over pairs; only for "all"."""
    per_image_high: float | None = None
    per_point_low: float | None = None
    per_point_high: float | None = None


@dataclass(frozen=True)
class Report:
    """An evaluation's figures, and what they are figures of."""

    benchmark: str
    root: str
    split: str
    pairs: int
    points: int
    categories: int
    model: str
    model_hash: str
    dataset_hash: str
    official: bool
    """Whether this is the official test split of SPair-71k, of which papers report; `is_spair_test` says by what."""
    protocols: dict[str, dict[str, Any]]
    """Name -> fields and rule."""
    alphas: dict[str, tuple[float, ...]]
    """Protocol -> its alphas."""
    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    """How the model was run: any of `lpmflow.benchmark.settings.FIELDS`; from the command line also "options"."""
    of_pairs: int | None = None
    """How many pairs there are, where only `pairs` of them were evaluated: then no figure is one of the data set."""
    by_pair: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """What came out for each pair, as `lpmflow.benchmark.by_pair.pair_rows` has it; empty where truth is dense."""
    versions: dict[str, str] = field(default_factory=lambda: versions())
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def select(self, protocol: str, measure: str = "PCK", group: str = "all", alpha: float | None = None) -> list[Row]:
        """The rows of one table, in their order; `alpha` None: of every alpha."""
        return [
            row
            for row in self.rows
            if (row.protocol, row.measure, row.group) == (protocol, measure, group) and alpha in (None, row.alpha)
        ]

    def table_alpha(self, protocol: str) -> float:
        """The alpha tables by category are shown at: 0.1, as in papers, else the largest."""
        alphas = self.alphas[protocol]
        return 0.1 if 0.1 in alphas else max(alphas)

    def as_dict(self) -> dict[str, Any]:
        """Everything but `by_pair` as plain values."""
        found = asdict(replace(self, by_pair=[]))
        del found["by_pair"]
        return found

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2) + "\n"

    def to_csv(self) -> str:
        """A line for each row; what is the same for all of them stands on every line."""
        text = io.StringIO()
        names = [one.name for one in fields(Row)]
        shared = {
            "benchmark": self.benchmark,
            "root": self.root,
            "split": self.split,
            "of_pairs": self.of_pairs or self.pairs,
            "model": self.model,
            "model_hash": self.model_hash,
            "dataset_hash": self.dataset_hash,
            **cells(self.settings),
            **self.versions,
            "date": self.date,
        }
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*shared, "rule", *names])
        for row in self.rows:
            values, rule = asdict(row), self.protocols[row.protocol]["rule"]
            writer.writerow([*shared.values(), rule, *("" if values[name] is None else values[name] for name in names)])
        return text.getvalue()

    def pairs_to_csv(self) -> str:
        """A line for each pair."""
        return to_csv(self.by_pair)

    def to_markdown(self) -> str:
        """A section with a table for each protocol."""
        from lpmflow.benchmark.table import markdown

        return markdown(self)

    def lines(self) -> list[str]:
        """The report as it is shown on a screen."""
        from lpmflow.benchmark.table import screen

        return screen(self)


def write(
    report: Report,
    json: PathLike | None = None,
    csv: PathLike | None = None,
    markdown: PathLike | None = None,
    pairs_csv: PathLike | None = None,
) -> None:
    """Write the report to the files that are named, each whole or not at all.

    Raises the first OSError when one cannot be written, after all have been tried.
    """
    failed: OSError | None = None
    texts = ((json, report.to_json), (csv, report.to_csv), (markdown, report.to_markdown))
    for path, text in (*texts, (pairs_csv, report.pairs_to_csv)):
        if path is not None:
            try:
                with replacing(path) as temporary:
                    temporary.write_text(text(), encoding="utf-8")
            except (OSError, ValueError) as error:  # ValueError: names that no text can hold
                reason = getattr(error, "strerror", None) or str(error)
                failed = failed or OSError(f"{as_path(path)} could not be written: {reason}")
    if failed is not None:
        raise failed


def check_writable(paths: Mapping[str, PathLike | None]) -> None:
    """OSError for a path that no file can be written to, ValueError for one that is named twice, before any work.

    `paths` by the argument's name. In each folder a file is made and removed again.
    """
    names: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        final = as_path(path).absolute()
        if not final.parent.is_dir():
            raise FileNotFoundError(f"{name} must name a file in an existing folder, got {str(path)!r}")
        if os.path.isdir(final):
            raise IsADirectoryError(f"{name} must name a file, got the folder {str(path)!r}")
        try:
            _try_to_write(final)
        except OSError as error:
            reason = error.strerror or str(error)
            raise type(error)(f"{name} must name a file that can be written, got {str(path)!r}: {reason}") from error
        first = names.setdefault(final.resolve(), name)
        if first != name:
            raise ValueError(f"{name} must name another file than {first}, got {str(path)!r}")


def _try_to_write(path: Path) -> None:
    """OSError when nothing can be written there; what is there stays as it is."""
    if is_stream(path):
        os.stat(path)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    with contextlib.suppress(FileNotFoundError):
        os.lstat(path)  # a name may be too long
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def check_folder(name: str, path: PathLike) -> None:
    """OSError for a path that is no folder and that none can be made at; `name` is the argument's."""
    given = as_path(path).absolute()
    there = next(part for part in (given, *given.parents) if part.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{name} must be a folder, or a place for one, but {str(there)!r} is a file")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{name} must be a folder that can be written to, got {str(path)!r}")


def keypoint_rows(scores: Scores, alphas: Sequence[float], aware: NDArray[np.bool_] | None = None) -> list[Row]:
    """Every figure of one protocol; `aware` (K,) is the geometry-aware subset, where it is known."""

    def row(measure: str, alpha: float, group: str, name: str, found: PCK, **bounds: float) -> Row:
        return Row(
            scores.protocol.name,
            measure,
            alpha,
            group,
            name,
            found.per_image,
            found.per_point,
            found.pairs,
            found.points,
            **bounds,
        )

    rows = []
    for alpha in alphas:
        interval = scores.interval(alpha, level=LEVEL)
        bounds = {
            f"{average}_{end}": getattr(interval, average)[index]
            for average in ("per_image", "per_point")
            for index, end in enumerate(("low", "high"))
        }
        rows.append(row("PCK", alpha, "all", "", scores.pck(alpha), **bounds))
        rows.append(row("PCK-dagger", alpha, "all", "", scores.pck(alpha, dagger=True)))
        if aware is not None:
            rows.append(row("PCK", alpha, "geometry-aware", "", scores.pck(alpha, points=aware)))
        rows += [row("PCK", alpha, "category", name, found) for name, found in scores.by_category(alpha).items()]
        for kind, levels in scores.by_difficulty(alpha).items():
            rows += [row("PCK", alpha, kind, str(level), found) for level, found in levels.items()]
    return rows


def mask_rows(categories: Sequence[str], values: dict[str, NDArray[np.float64]]) -> list[Row]:
    """Rows of measures of masks: measure -> (P,) percent of each pair."""
    rows, codes = [], np.array(categories)
    for measure, found in values.items():
        rows.append(Row("masks", measure, None, "all", "", float(found.mean()), None, len(found), None))
        for name in sorted(set(categories)):
            own = found[codes == name]
            rows.append(Row("masks", measure, None, "category", name, float(own.mean()), None, len(own), None))
    return rows


def versions() -> dict[str, str]:
    """What measured."""
    packages = ("torch", "timm", "numpy", "pillow")
    return {
        "lpmflow": lpmflow.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def folder_name(path: PathLike) -> str:
    """The last part of a path, to be shown: whole paths say more about a machine than about a figure."""
    return Path(as_path(path)).resolve().name
