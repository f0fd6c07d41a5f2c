"""Flow files (.flo, the Middlebury format), and how this library writes any file: whole or not at all.

A .flo file is little endian: the float32 202021.25 ("PIEH" in ASCII), the width and the height as int32, then the
rows of the flow as float32, x and y of a pixel side by side. The format's own mark for "unknown here" is a
displacement beyond 1e9.
"""

from __future__ import annotations

import os
import secrets
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

TAG = 202021.25
_HEADER = struct.Struct("<fii")

PathLike = str | bytes | os.PathLike[str] | os.PathLike[bytes]


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which takes its place when the block ends without an error.

    Whoever reads `path` finds the old file or the complete new one, also after the power has failed. A device or a pipe
    (`is_stream`) is written to and not replaced. Raises FileNotFoundError when the folder does not exist and
    IsADirectoryError when `path` is one; what the block raises passes through, the temporary file removed, where an
    OSError of the temporary file becomes one of `path`.
    """
    final = as_path(path)
    if not final.parent.is_dir():
        raise FileNotFoundError(f"path must name a file in an existing folder, got {str(final)!r}")
    if final.is_dir():
        raise IsADirectoryError(f"path must name a file, got the folder {str(final)!r}")
    if is_stream(final):
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole"
            yield whole
            # appended: /dev/stdout may be a file that holds what was printed
            with open(whole, "rb") as file, open(final, "ab") as stream:
                shutil.copyfileobj(file, stream)
        return
    temporary = final.parent / f".lpmflow-{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        with open(temporary, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(temporary, final)
    except OSError as error:
        # whoever reads the message knows the path that was given, and no other
        if error.errno is not None and error.filename in (None, temporary, str(temporary)):
            raise OSError(error.errno, error.strerror, str(final)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_stream(path: PathLike) -> bool:
    """Whether a path is a device, a pipe or another place that is written to and never replaced."""
    final = as_path(path).absolute()
    if str(final.parent) in ("/dev", "/dev/fd") or final.parts[1:2] == ("proc",) and final.parent.name == "fd":
        return True  # what /dev/stdout leads to may be a file
    return final.exists() and not final.is_file() and not final.is_dir()


def as_path(path: PathLike) -> Path:
    """`path` as a Path; TypeError when it is none."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"path must be a str, bytes or os.PathLike, got {type(path).__name__}")
    return Path(os.fsdecode(path))


def write_flo(path: PathLike, flow: ArrayLike) -> None:
    """Write a flow (H, W, 2) of finite numbers, channel 0 x and 1 y, to a .flo file as float32.

    Raises ValueError when the array is not such a flow, OSError when the file cannot be written; a file that exists
    is replaced.
    """
    array = np.asarray(flow)
    if array.ndim != 3 or array.shape[2] != 2 or 0 in array.shape:
        raise ValueError(f"flow must have shape (H, W, 2) with no side 0, got {array.shape}")
    if not np.issubdtype(array.dtype, np.floating) and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"flow must hold real numbers, got {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError("flow must be finite, got NaN or infinity")
    height, width = array.shape[:2]
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(_HEADER.pack(TAG, width, height))
        file.write(np.ascontiguousarray(array, dtype="<f4").data)


def read_flo(path: PathLike) -> NDArray[np.float32]:
    """The flow (H, W, 2) float32 stored in a .flo file, channel 0 x and 1 y.

    Raises OSError when the file is missing, is no .flo file, or is shorter or longer than its header says.
    """
    given = as_path(path)
    with open(given, "rb") as file:
        data = file.read()
    if len(data) < _HEADER.size or _HEADER.unpack_from(data)[0] != TAG:
        raise OSError(f"{str(given)!r} is no .flo file: it does not begin with the number {TAG}")
    _, width, height = _HEADER.unpack_from(data)
    wanted = _HEADER.size + 8 * width * height
    if width < 1 or height < 1 or len(data) != wanted:
        raise OSError(
            f"{str(given)!r} is corrupt: a flow of height {height} and width {width} takes {wanted} bytes, "
            f"the file has {len(data)}"
        )
    flow = np.frombuffer(data, dtype="<f4", offset=_HEADER.size).reshape(height, width, 2)
    return flow.astype(np.float32)
