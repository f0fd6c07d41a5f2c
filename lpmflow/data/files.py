"""Reading the small files of data sets: text, JSON, tables, and the photographs they name.

Errors begin with the file and the record they are about.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray


@contextlib.contextmanager
def naming(record: object) -> Iterator[None]:
    """What is wrong inside, as a ValueError that begins with the file and record it is wrong in."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else str(error)
        if isinstance(error, OverflowError):
            what = f"must hold no number so large: {error}"
        raise ValueError(f"{record}: {what}") from error


def read_text(file: Path) -> str:
    """The text of a file; ValueError when it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be text: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The fields of the object that a JSON file holds; ValueError when it holds none."""
    text = read_text(file)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # more digits or brackets than Python reads are no JSONDecodeError
        raise ValueError(f"{file} must be JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(found).__name__}")
    return found


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    file: Path
    line: int
    """Its number in the file, the column names being line 1."""
    fields: list[str]

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"

    def require(self, *counts: int) -> None:
        """ValueError when the line does not have one of these numbers of fields."""
        if len(self.fields) not in counts:
            wanted = " or ".join(map(str, counts))
            raise ValueError(f"{self}: must have {wanted} fields, got {len(self.fields)}")

    def numbers(self, fields: Sequence[str], what: str) -> NDArray[np.float64]:
        """`fields` as finite float64; ValueError saying `what` when one is no number."""
        try:
            values = np.array([float(field) for field in fields])
        except ValueError as error:
            raise ValueError(f"{self}: {what} must be numbers: {error}") from error
        if not np.isfinite(values).all():
            raise ValueError(f"{self}: {what} must be finite")
        return values


def read_table(file: Path) -> list[Row]:
    """The lines of a comma-separated file below its column names; ValueError when it has none of either."""
    lines = [(number, fields) for number, fields in _lines(file) if any(field.strip() for field in fields)]
    if not lines or any(_is_number(field) for field in lines[0][1]):
        raise ValueError(f"{file} must begin with a line of column names")
    if len(lines) == 1:
        raise ValueError(f"{file} lists no pair")
    return [Row(file, number, [field.strip() for field in fields]) for number, fields in lines[1:]]


def _lines(file: Path) -> list[tuple[int, list[str]]]:
    reader = csv.reader(read_text(file).splitlines(), strict=True)
    try:
        return [(reader.line_num, fields) for fields in reader]
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: must be comma-separated fields: {error}") from error


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def require_folder(root: str | os.PathLike[str]) -> Path:
    """`root` as a Path; FileNotFoundError or NotADirectoryError when there is no such folder."""
    folder = Path(root)
    if not folder.exists():
        raise FileNotFoundError(f"root must be a folder, but there is no {str(root)!r}")
    if not folder.is_dir():
        raise NotADirectoryError(f"root must be a folder, but {str(root)!r} is a file")
    return folder


def parts_below(folder: Path, name: object, what: str) -> tuple[str, ...]:
    """The parts of a file's name that a data set gives relative to `folder`, with slashes of either kind.

    Raises ValueError beginning with `what` when it is no name, or one that leads out of `folder`.
    """
    # a Windows path has both kinds of slash, and an anchor when it begins with either or with a drive
    path = PureWindowsPath(name) if isinstance(name, str) else PureWindowsPath()
    if not path.parts or ".." in path.parts or path.anchor:
        raise ValueError(f"{what} must name a file below {folder}, got {name!r}")
    return path.parts


def find_file(root: Path, name: object, what: str) -> Path:
    """The file that a list below `root` calls `name`, such as PF-dataset/car(G)/Cars_006a.png.

    Lists begin their names at different folders, so leading ones that are not there are left out, but for the last
    folder. Raises FileNotFoundError saying `what` record asks for it and where it is wanted, ValueError for a name that
    leads out of `root`.
    """
    parts = parts_below(root, name, f"{what}:")
    places = [root.joinpath(*parts[first:]) for first in range(max(1, len(parts) - 1))]
    for place in places:
        if place.is_file():
            return place
    wanted = next((place for place in places if place.parent.is_dir()), places[-1])
    raise FileNotFoundError(f"{what}: there is no file {wanted}")
