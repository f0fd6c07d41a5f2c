"""Two photographs with the flow between them known at single pixels, as KITTI, Sintel and Middlebury give it.

    aloe/1.png aloe/2.png     (or .ppm, .jpg) the photograph the flow is of, and the one it leads to
    aloe/flow.npz             flow (H, W, 2), x and y in pixels of 1 and 2; valid (H, W), not 0 where it is known
    aloe/flow.flo             or this in its place, the Middlebury format
    aloe/flow.png             or this, KITTI's: 16-bit red and green are 64 x and 64 y + 2^15, blue is `valid`

Without `valid` the flow is known where it is finite; in a .flo file also only where it is below 1e9. A folder holds one
such pair, or folders that do.
"""

from __future__ import annotations

import functools
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpmflow.data.files import require_folder
from lpmflow.data.homographies import Truth, numbered_photograph
from lpmflow.flowfile import read_flo

_FILES = ("flow.npz", "flow.flo", "flow.png")
_UNKNOWN = 1e9


@dataclass(frozen=True, eq=False)
class FlowPair:
    """Two photographs and the file that holds the flow from the first to the second."""

    name: str
    source: Path
    target: Path
    file: Path

    def truth(self, source_size: tuple[int, int], target_size: tuple[int, int]) -> Truth:
        """(H, W, 2) float64 flow in pixels and (H, W) bool where it is known, for photographs of these sizes.

        Raises OSError or ValueError naming the file when it is damaged, does not hold such arrays, is of another size
        than the source, or knows no pixel.
        """
        flow, valid = _READERS[self.file.suffix](self.file)
        if flow.shape != (*source_size, 2) or flow.dtype.kind not in "fiu":
            raise ValueError(
                f"{self.file} must hold a flow of numbers of shape ({source_size[0]}, {source_size[1]}, 2), that of "
                f"{self.source.name}, got {flow.dtype} {flow.shape}"
            )
        flow = flow.astype(np.float64)
        known = np.asarray((np.abs(np.nan_to_num(flow, nan=np.inf)) < _UNKNOWN).all(axis=-1))
        if valid is not None:
            if valid.shape != source_size:
                raise ValueError(f"{self.file} must hold valid of shape {source_size}, got {valid.shape}")
            if (~known & (valid != 0)).any():
                raise ValueError(f"{self.file} must hold a finite flow wherever valid is not 0")
            known = np.asarray(valid != 0)
        if not known.any():
            raise ValueError(f"{self.file} must know the flow of at least one pixel")
        return flow, known


def _npz(file: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} must be a file of numpy arrays (.npz), which it is not")
    try:
        with np.load(file, allow_pickle=False) as found:
            if "flow" not in found:
                raise ValueError(f"it has no array 'flow', only {', '.join(found) or 'none'}")
            return found["flow"], found.get("valid")
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} must be a file of numpy arrays (.npz): {error}") from error


def _flo(file: Path) -> tuple[NDArray[Any], None]:
    return read_flo(file), None


def _png(file: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    # Pillow has no colours of 16 bits. Told that the bytes, which come highest first, come lowest first, it gives the
    # lower of the two as colours of 8 bits.
    values = 256 * _colours(file, "RGB;16B").astype(np.int64) + _colours(file, "RGB;16L")
    return (values[..., :2] - 2**15) / 64, values[..., 2]


def _colours(file: Path, order: str) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as opened:
            image: Any = opened
            (codec, box, offset, stored), *others = image.tile
            if stored != "RGB;16B" or others:
                raise ValueError("its colours do not have 16 bits")
            image.tile = [(codec, box, offset, order)]
            return np.asarray(image)
    except Exception as error:
        raise ValueError(f"{file} must be a PNG of three colours of 16 bits, as KITTI has it: {error}") from error


_READERS: dict[str, Callable[[Path], tuple[NDArray[Any], NDArray[Any] | None]]]
_READERS = {".npz": _npz, ".flo": _flo, ".png": _png}


def holds_flow(folder: Path) -> bool:
    """Whether a folder itself holds a flow in this layout."""
    return any((folder / name).is_file() for name in _FILES)


def load_flows(root: str | os.PathLike[str]) -> list[FlowPair]:
    """The pairs of a folder, or of the folders in it by name; neither photographs nor flows are opened.

    Raises FileNotFoundError or NotADirectoryError when there is no such folder, no flow, or no photograph beside one.
    """
    return [read() for read in flow_records(root)]


def flow_records(root: str | os.PathLike[str]) -> list[Callable[[], FlowPair]]:
    """The pairs of `load_flows`, each read when called, which raises FileNotFoundError for a photograph missing."""
    folder = require_folder(root)
    folders = [folder] if holds_flow(folder) else [one for one in sorted(folder.iterdir()) if holds_flow(one)]
    if not folders:
        raise FileNotFoundError(
            f"root must hold {' or '.join(_FILES)} beside photographs 1 and 2, or folders that do, got {str(root)!r}"
        )
    return [functools.partial(_pair, one) for one in folders]


def _pair(folder: Path) -> FlowPair:
    file = next(folder / name for name in _FILES if (folder / name).is_file())
    return FlowPair(folder.resolve().name, numbered_photograph(folder, 1), numbered_photograph(folder, 2), file)
