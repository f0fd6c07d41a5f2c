"""Arrays out of MATLAB files of version 5, the annotations of PF-PASCAL.

A full reader of this format (scipy's) is a large dependency for two small arrays of numbers, and the format has not
changed since 1996; so this reads what those files use and refuses the rest in one sentence. The file is a header of 128
bytes and a chain of elements, each a tag (type, bytes) and its data, in multiples of 8 bytes; an element may be a zlib
stream that holds one more. A matrix is an element of elements: flags, dimensions, name, numbers in column order.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {1: "cell array", 2: "structure", 3: "object", 4: "text", 5: "sparse matrix"}
_COMPLEX = 0x0800
_LIMIT = 1 << 26
"""Bytes an element may unpack to: annotations take some hundreds."""


def read_mat(file: Path, *names: str) -> list[NDArray[np.float64]]:
    """The matrices `names` of a MATLAB file, (rows, columns) float64 each.

    Raises FileNotFoundError; ValueError naming the file when it is no MATLAB file of version 5 (`save -v6` or `-v7`
    writes one), ends early, lacks a name, or holds anything but a real matrix of numbers under it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    data = file.read_bytes()
    try:
        order = _byte_order(data)
        found: dict[str, NDArray[np.float64]] = {}
        for kind, content in _elements(data[128:], order):
            matrix = _unpack(content, order) if kind == _COMPRESSED else content if kind == _MATRIX else None
            if matrix is not None:
                name, values = _matrix(matrix, order, names)
                if values is not None:
                    found[name] = values
    except (ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{file} cannot be read as a MATLAB file of version 5: {error}") from error
    for name in names:
        if name not in found:
            raise ValueError(f"{file} has no matrix {name!r}")
    return [found[name] for name in names]


def _byte_order(data: bytes) -> str:
    if data[:10] == b"MATLAB 7.3" or data[:8] == b"\x89HDF\r\n\x1a\n":
        raise ValueError("it is of version 7.3; save it again with -v7")
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None or struct.unpack(order + "H", data[124:126])[0] != 0x0100:
        raise ValueError("its header is that of something else")
    return order


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, content) of each element of a chain."""
    at = 0
    while at < len(data):
        if len(data) - at < 8:
            raise ValueError("it ends in the middle of a tag")
        kind, size = struct.unpack_from(order + "II", data, at)
        start = at + 8
        if kind >> 16:  # up to 4 bytes, in the second half of the tag itself
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
            at += 8
            if size > 4:
                raise ValueError(f"a short element has {size} bytes")
        else:
            at = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(data):
            raise ValueError(f"an element of {size} bytes ends beyond the file")
        yield kind, data[start : start + size]


def _unpack(content: bytes, order: str) -> bytes | None:
    """The matrix inside a compressed element; None where it holds something else."""
    stream = zlib.decompressobj()
    plain = stream.decompress(content, _LIMIT)
    if not stream.eof:
        raise ValueError(f"a compressed element is cut off, or larger than {_LIMIT} bytes")
    return next((inner for kind, inner in _elements(plain, order) if kind == _MATRIX), None)


def _matrix(content: bytes, order: str, wanted: tuple[str, ...]) -> tuple[str, NDArray[np.float64] | None]:
    """The name of a matrix and, where it is one of `wanted`, its numbers."""
    parts = _elements(content, order)
    try:
        (_, flags), (_, dimensions), (_, label) = next(parts), next(parts), next(parts)
    except StopIteration:
        raise ValueError("a matrix has no name") from None
    name = label.decode("latin-1")
    if name not in wanted:
        return name, None
    (word,) = struct.unpack_from(order + "I", flags)
    if word & 0xFF in _CLASSES or word & _COMPLEX:
        what = _CLASSES.get(word & 0xFF, "complex matrix")
        raise ValueError(f"{name!r} must be a real matrix of numbers, got a {what}")
    shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions)
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"{name!r} must have rows and columns, got shape {shape}")
    kind, numbers = next(parts, (0, b""))
    if kind not in _NUMBERS:
        raise ValueError(f"{name!r} must hold numbers, got element type {kind}")
    values = np.frombuffer(numbers, dtype=order + _NUMBERS[kind])
    if values.size != shape[0] * shape[1]:
        raise ValueError(f"{name!r} must hold {shape[0]} x {shape[1]} numbers, got {values.size}")
    return name, values.reshape(shape, order="F").astype(np.float64)
