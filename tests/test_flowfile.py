"""The .flo format byte by byte, and writing files whole or not at all."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lpmflow.flowfile import as_path, is_stream, read_flo, replacing, write_flo

FLOW = np.arange(2 * 3 * 2, dtype=np.float32).reshape(2, 3, 2) - 4.5


def test_the_bytes_are_middleburys(tmp_path):
    write_flo(tmp_path / "a.flo", FLOW)
    data = (tmp_path / "a.flo").read_bytes()
    assert data[:4] == b"PIEH"
    assert struct.unpack("<ii", data[4:12]) == (3, 2)
    assert struct.unpack("<12f", data[12:]) == tuple(FLOW.ravel().tolist())


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4", np.int64])
def test_other_number_types_are_stored_as_float32(tmp_path, dtype):
    write_flo(tmp_path / "a.flo", np.floor(FLOW).astype(dtype))
    found = read_flo(tmp_path / "a.flo")
    assert found.dtype == np.float32 and found.flags.writeable
    np.testing.assert_array_equal(found, np.floor(FLOW))


def test_a_view_that_is_not_contiguous(tmp_path):
    write_flo(tmp_path / "a.flo", FLOW.transpose(1, 0, 2))
    np.testing.assert_array_equal(read_flo(os.fsencode(tmp_path / "a.flo")), FLOW.transpose(1, 0, 2))


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (np.zeros((2, 3)), r"flow must have shape \(H, W, 2\) with no side 0, got \(2, 3\)"),
        (np.zeros((2, 3, 3)), r"got \(2, 3, 3\)"),
        (np.zeros((0, 3, 2)), r"got \(0, 3, 2\)"),
        (np.full((2, 3, 2), np.nan), "flow must be finite"),
        (np.full((2, 3, 2), -np.inf), "flow must be finite"),
        (np.zeros((2, 3, 2), complex), "flow must hold real numbers, got complex128"),
    ],
)
def test_what_is_no_flow_is_refused_and_writes_nothing(tmp_path, flow, message):
    with pytest.raises(ValueError, match=message):
        write_flo(tmp_path / "a.flo", flow)
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_flo(tmp_path):
    path = tmp_path / "a.flo"
    for data in (b"", b"PIEH", b"GIF89a" * 10):
        path.write_bytes(data)
        with pytest.raises(OSError, match=r"is no \.flo file"):
            read_flo(path)
    write_flo(path, FLOW)
    whole = path.read_bytes()
    for data in (whole[:-1], whole + b"\0", whole[:4] + struct.pack("<ii", -3, -2) + whole[12:]):
        path.write_bytes(data)
        with pytest.raises(OSError, match="is corrupt"):
            read_flo(path)
    with pytest.raises(FileNotFoundError):
        read_flo(tmp_path / "missing.flo")


def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_replacing_gives_the_usual_permissions(tmp_path):
    plain, replaced = tmp_path / "plain", tmp_path / "replaced"
    plain.write_text("")
    with replacing(replaced) as temporary:
        temporary.write_text("")
    assert replaced.stat().st_mode == plain.stat().st_mode


def test_replacing_refuses_folders(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="path must name a file in an existing folder"),
        replacing(tmp_path / "none" / "a"),
    ):
        pass
    with pytest.raises(IsADirectoryError, match="path must name a file, got the folder"), replacing(tmp_path):
        pass
    with pytest.raises(TypeError, match="path must be a str, bytes or os.PathLike, got int"):
        as_path(3)


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    path, done = tmp_path / "a", []

    def fsync(file):
        done.append(("fsync", os.fstat(file).st_ino, os.fstat(file).st_size))

    def replace(temporary, final):
        done.append(("replace", Path(temporary).stat().st_ino, final))
        os.rename(temporary, final)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with replacing(path) as temporary:
        temporary.write_text("written")
    assert done == [("fsync", path.stat().st_ino, 7), ("replace", path.stat().st_ino, path)]


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes of POSIX")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    with replacing(pipe) as temporary:
        temporary.write_text("all of it")
    reader.join()
    assert found == ["all of it"] and is_stream(pipe) and [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes of POSIX")
def test_a_device_stays_one():
    with replacing("/dev/null") as temporary:
        temporary.write_text("gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert [is_stream(path) for path in ("/dev/null", "/dev/stdout", "/dev/shm/a", __file__, ".")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_standard_output_that_is_a_file_keeps_what_was_printed(tmp_path):
    program = (
        "from lpmflow.flowfile import replacing\n"
        "print('first', flush=True)\n"
        "with replacing('/dev/stdout') as temporary: temporary.write_text('second')\n"
    )
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "first\nsecond"


def test_an_error_of_writing_names_the_path_that_was_given(tmp_path):
    path = tmp_path / "a"
    for filename in (None, "temporary"):
        with pytest.raises(OSError) as failed, replacing(path) as temporary:
            raise OSError(28, "No space left on device", *([str(temporary)] if filename else []))
        assert str(failed.value) == f"[Errno 28] No space left on device: {str(path)!r}"
    with pytest.raises(OSError, match="'another'"), replacing(path):
        raise OSError(2, "No such file", "another")
