"""Writes small MATLAB files of version 5, byte by byte, for the tests of their reader."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

MATRIX, COMPRESSED = 14, 15
NUMBERS = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 9, "i8": 12, "u8": 13}
CLASSES = {"f8": 6, "f4": 7, "i1": 8, "u1": 9, "i2": 10, "u2": 11, "i4": 12, "u4": 13, "i8": 14, "u8": 15}


def header(order: str = "<", version: int = 0x0100) -> bytes:
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(order + "H", version) + (b"IM" if order == "<" else b"MI")


def element(kind: int, content: bytes, order: str = "<", short: bool = False) -> bytes:
    if short:
        return struct.pack(order + "I", len(content) << 16 | kind) + content.ljust(4, b"\0")
    return struct.pack(order + "II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def matrix(
    name: str,
    values: Any,
    order: str = "<",
    stored: str | None = None,
    array_class: int | None = None,
    flags: int = 0,
    shape: tuple[int, ...] | None = None,
) -> bytes:
    """A matrix as MATLAB writes it; whole numbers are often `stored` in a smaller type than their class."""
    array = np.asarray(values)
    code = stored or array.dtype.str[1:]
    content = array.astype(order + code).tobytes(order="F")
    dimensions = struct.pack(f"{order}{len(shape or array.shape)}i", *(shape or array.shape))
    label = name.encode("latin-1")
    return element(
        MATRIX,
        element(6, struct.pack(order + "II", (array_class or CLASSES[array.dtype.str[1:]]) | flags, 0), order)
        + element(5, dimensions, order)
        + element(1, label, order, short=len(label) <= 4)
        + element(NUMBERS[code], content, order, short=len(content) <= 4),
        order,
    )


def compressed(part: bytes, order: str = "<") -> bytes:
    packed = zlib.compress(part)
    return struct.pack(order + "II", COMPRESSED, len(packed)) + packed


def write(file: Path, *parts: bytes, order: str = "<") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(header(order) + b"".join(parts))
    return file
