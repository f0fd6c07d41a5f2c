"""The reader of MATLAB files: bytes made here, scipy's writer where scipy is, and everything it refuses."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from matlab_files import COMPRESSED, compressed, element, header, matrix, write

from lpmflow.data.matfile import read_mat

POINTS = np.array([[1.5, np.nan], [3.0, -4.25], [1e300, 6.0]])
BOX = np.array([[12, 34, 300, 255]])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_two_matrices(tmp_path: Path, order: str, packed: bool) -> None:
    parts = [matrix("kps", POINTS, order), matrix("bbox", BOX, order, stored="u2"), matrix("a_long_name", BOX, order)]
    file = write(tmp_path / "a.mat", *(compressed(part, order) if packed else part for part in parts), order=order)
    points, box, other = read_mat(file, "kps", "bbox", "a_long_name")
    np.testing.assert_array_equal(points, POINTS)
    np.testing.assert_array_equal(box, BOX)
    np.testing.assert_array_equal(other, BOX)
    assert points.dtype == box.dtype == np.float64


@pytest.mark.parametrize("dtype", ["f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 5), (17, 2), (0, 0), (0, 2)])
def test_every_type_and_shape(tmp_path: Path, dtype: str, shape: tuple[int, int]) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    (read,) = read_mat(write(tmp_path / "a.mat", matrix("x", values)), "x")
    np.testing.assert_array_equal(read, values)
    assert read.shape == shape


@pytest.mark.parametrize("packed", [False, True])
def test_files_of_another_writer(tmp_path: Path, packed: bool) -> None:
    """Beside what such files also hold: text, structures, cells, complex and sparse matrices, volumes."""
    io, sparse = pytest.importorskip("scipy.io"), pytest.importorskip("scipy.sparse")
    others = {
        "class": "aeroplane",
        "s": {"kps": np.zeros((2, 2)), "name": "x"},
        "c": np.array([[1, "two"]], dtype=object),
        "z": np.array([[1 + 2j]]),
        "sparse": sparse.csc_matrix(np.eye(3)),
        "volume": np.zeros((2, 3, 4)),
        "yes": np.array([[True, False]]),
    }
    small = np.array([[7.0]])
    io.savemat(tmp_path / "a.mat", {**others, "kps": POINTS, "bbox": BOX, "v": small}, do_compression=packed)
    points, box, one, yes = read_mat(tmp_path / "a.mat", "kps", "bbox", "v", "yes")
    np.testing.assert_array_equal(points, POINTS)
    np.testing.assert_array_equal(box, BOX)
    assert one.tolist() == [[7]] and yes.tolist() == [[1, 0]]
    for name, what in (
        ("class", "'class' must be a real matrix of numbers, got a text"),
        ("s", "'s' must be a real matrix of numbers, got a structure"),
        ("c", "'c' must be a real matrix of numbers, got a cell array"),
        ("z", "'z' must be a real matrix of numbers, got a complex matrix"),
        ("sparse", "'sparse' must be a real matrix of numbers, got a sparse matrix"),
        ("volume", r"'volume' must have rows and columns, got shape \(2, 3, 4\)"),
    ):
        with pytest.raises(ValueError, match=f"cannot be read as a MATLAB file of version 5: {what}$"):
            read_mat(tmp_path / "a.mat", name)


def test_files_that_matlab_wrote() -> None:
    """The ones scipy keeps for its own tests: several versions, both byte orders, compressed and not."""
    io = pytest.importorskip("scipy.io")
    folder = Path(io.matlab.__file__).parent / "tests" / "data"
    files = sorted(file for file in folder.glob("test*_[5-7].*.mat") if "hdf5" not in file.name)
    if not files:
        pytest.skip("this scipy is installed without its test files")
    read = 0
    for file in files:
        for name, values in io.loadmat(file).items():
            if isinstance(values, np.ndarray) and values.dtype.kind in "fiu" and values.ndim == 2:
                (ours,) = read_mat(file, name)
                np.testing.assert_array_equal(ours, values)
                read += 1
    assert read >= 10


def refusal(file: Path) -> str:
    with pytest.raises(ValueError) as refused:
        read_mat(file, "kps")
    assert type(refused.value) is ValueError and str(refused.value).startswith(str(file))
    return str(refused.value).removeprefix(f"{file} cannot be read as a MATLAB file of version 5: ")


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mat", matrix("bbox", BOX))
    assert refusal(file) == f"{file} has no matrix 'kps'"
    assert refusal(write(tmp_path / "b.mat")) == f"{tmp_path / 'b.mat'} has no matrix 'kps'"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*a\.mat$"):
        read_mat(tmp_path / "a.mat", "kps")
    with pytest.raises(FileNotFoundError):
        read_mat(tmp_path, "kps")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no MATLAB file",
        b"\0" * 128,
        header()[:127],
        header(version=0x0200),
        header(">")[:126] + b"IM",
        b"\x00\x00\x00\x00" + struct.pack("<iii", 2, 2, 0) + b"kps\0" + b"\0" * 120,  # version 4
    ],
)
def test_another_header(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.mat").write_bytes(data)
    assert refusal(tmp_path / "a.mat") == "its header is that of something else"


@pytest.mark.parametrize(
    "data", [b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512), b"\x89HDF\r\n\x1a\n" + b"\0" * 99]
)
def test_version_7_3(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.mat").write_bytes(data)
    assert refusal(tmp_path / "a.mat") == "it is of version 7.3; save it again with -v7"


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_cut_off_anywhere(tmp_path: Path, packed: bool) -> None:
    whole = matrix("kps", POINTS)
    data = write(tmp_path / "a.mat", compressed(whole) if packed else whole).read_bytes()
    for end in range(129, len(data)):
        (tmp_path / "a.mat").write_bytes(data[:end])
        assert refusal(tmp_path / "a.mat")


@pytest.mark.parametrize("packed", [False, True])
def test_any_byte_changed(tmp_path: Path, packed: bool) -> None:
    """Either numbers come out, or one sentence."""
    whole = matrix("kps", POINTS)
    data = bytearray(write(tmp_path / "a.mat", compressed(whole) if packed else whole).read_bytes())
    for at in range(124, len(data)):
        for value in (0, 0x7F, 0xFF, data[at] ^ 1):
            changed = data.copy()
            changed[at] = value
            (tmp_path / "b.mat").write_bytes(changed)
            try:
                (found,) = read_mat(tmp_path / "b.mat", "kps")
            except ValueError as error:
                assert str(error).startswith(str(tmp_path / "b.mat"))
            else:
                assert found.ndim == 2


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (matrix("kps", POINTS, shape=(2, 2)), "'kps' must hold 2 x 2 numbers, got 6"),
        (matrix("kps", POINTS, shape=(-3, -2)), "'kps' must have rows and columns, got shape (-3, -2)"),
        (element(14, element(6, b"\x06" + b"\0" * 7)), "a matrix has no name"),
        (struct.pack("<I", 7 << 16 | 1) + b"abcd", "a short element has 7 bytes"),
        (struct.pack("<II", 9, 1 << 30), f"an element of {1 << 30} bytes ends beyond the file"),
        (element(14, matrix("kps", POINTS)[8:-56]), "'kps' must hold numbers, got element type 0"),
    ],
)
def test_a_part_of_another_kind(tmp_path: Path, part: bytes, message: str) -> None:
    assert refusal(write(tmp_path / "a.mat", part)) == message


def test_a_stream_that_unpacks_to_too_much(tmp_path: Path) -> None:
    packed = zlib.compress(bytes((1 << 26) + 1))
    file = write(tmp_path / "a.mat", struct.pack("<II", COMPRESSED, len(packed)) + packed)
    assert refusal(file) == f"a compressed element is cut off, or larger than {1 << 26} bytes"
