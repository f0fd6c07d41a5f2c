"""The reader of flows known pixel by pixel: what it takes, which pixels count, what it refuses."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpmflow.data import load_flows
from lpmflow.data.check import check_pairs, recognise
from lpmflow.flowfile import write_flo

FLOW = np.arange(24, dtype=np.float32).reshape(3, 4, 2)


def make(folder: Path, file: str | None = "flow.npz", **arrays: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "1.png").touch()
    (folder / "2.jpg").touch()
    if file is not None:
        np.savez(folder / file, **(arrays or {"flow": FLOW}))
    return folder


def test_a_pair_and_a_folder_of_them(tmp_path: Path) -> None:
    for name in ("b", "a"):
        make(tmp_path / name)
    make(tmp_path / "no flow", None)
    (tmp_path / "file").touch()
    pairs = load_flows(tmp_path)
    assert [pair.name for pair in pairs] == ["a", "b"]
    assert (pairs[0].source, pairs[0].target) == (tmp_path / "a" / "1.png", tmp_path / "a" / "2.jpg")
    (one,) = load_flows(tmp_path / "b")
    assert one.name == "b"


def test_valid_says_where_the_flow_is_known(tmp_path: Path) -> None:
    flow, valid = FLOW.copy(), np.zeros((3, 4), np.uint8)
    valid[1, 2], flow[0, 0] = 7, np.nan
    (pair,) = load_flows(make(tmp_path / "a", flow=flow, valid=valid))
    found, known = pair.truth((3, 4), (9, 9))
    assert found.dtype == np.float64 and known.dtype == np.bool_
    assert np.argwhere(known).tolist() == [[1, 2]] and found[1, 2].tolist() == [12, 13]


def test_without_valid_it_is_known_where_it_is_finite(tmp_path: Path) -> None:
    flow = FLOW.copy()
    flow[0, 0, 1], flow[2, 3] = np.inf, np.nan
    (pair,) = load_flows(make(tmp_path / "a", flow=flow))
    assert np.argwhere(~pair.truth((3, 4), (9, 9))[1]).tolist() == [[0, 0], [2, 3]]


def test_the_middlebury_format_and_its_mark_for_unknown(tmp_path: Path) -> None:
    flow = FLOW.copy()
    flow[1, 1] = 1e10
    folder = make(tmp_path / "a", None)
    write_flo(folder / "flow.flo", flow)
    (pair,) = load_flows(folder)
    found, known = pair.truth((3, 4), (9, 9))
    assert np.argwhere(~known).tolist() == [[1, 1]]
    np.testing.assert_array_equal(found[known], flow[known])


def write_png(file: Path, values: np.ndarray, depth: int = 16) -> None:
    """(H, W, 3) uint16 as a PNG, the five filters of its rows by turns; of 8 bits the upper half is left out."""
    size = 3 * depth // 8
    rows = values.astype(">u2").view(np.uint8).reshape(len(values), -1) if depth == 16 else values.astype(np.uint8)
    rows = rows.reshape(len(values), -1).astype(int)
    packed, above = b"", np.zeros(rows.shape[1], int)
    for number, row in enumerate(rows):
        left, corner = (np.concatenate((np.zeros(size, int), one[:-size])) for one in (row, above))
        near = np.abs(np.stack((above - corner, left - corner, left + above - 2 * corner)))
        paeth = np.choose(near.argmin(axis=0), (left, above, corner))
        guess = (0 * row, left, above, (left + above) // 2, paeth)[number % 5]
        packed += bytes([number % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes()
        above = row
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), depth, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(packed)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    file.write_bytes(content)


def test_the_kitti_format(tmp_path: Path) -> None:
    """KITTI's own words: u = (R - 2^15) / 64, v = (G - 2^15) / 64, valid where B is not 0."""
    random = np.random.default_rng(0)
    values = random.integers(0, 2**16, (23, 37, 3), dtype=np.uint16)
    values[..., 2] = random.integers(0, 2, (23, 37))
    values[3, 4] = 2**15 + 64, 2**15 - 32, 1
    folder = make(tmp_path / "a", None)
    write_png(folder / "flow.png", values)
    (pair,) = load_flows(folder)
    found, known = pair.truth((23, 37), (9, 9))
    np.testing.assert_array_equal(found, (values[..., :2].astype(float) - 2**15) / 64)
    np.testing.assert_array_equal(known, values[..., 2] == 1)
    assert found[3, 4].tolist() == [1, -0.5] and known[3, 4]


def test_a_picture_is_no_flow(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", None)
    file = folder / "flow.png"
    write_png(file, np.full((3, 4, 3), 7), depth=8)
    with pytest.raises(
        ValueError, match=r"flow\.png must be a PNG of three colours of 16 bits, .*: its colours do not"
    ):
        load_flows(folder)[0].truth((3, 4), (9, 9))
    write_png(file, np.random.default_rng(0).integers(0, 2**16, (30, 40, 3)))
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"flow\.png must be a PNG of three colours of 16 bits, .*: .*truncated"):
        load_flows(folder)[0].truth((30, 40), (9, 9))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"flow": FLOW[:2]},
            r"must hold a flow of numbers of shape \(3, 4, 2\), that of 1\.png, got float32 \(2, ",
        ),
        ({"flow": FLOW.transpose(2, 0, 1)}, r"must hold a flow .* got float32 \(2, 3, 4\)"),
        ({"flow": FLOW.astype(np.complex64)}, r"must hold a flow of numbers .* got complex64"),
        ({"flow": FLOW, "valid": np.ones((4, 3))}, r"must hold valid of shape \(3, 4\), got \(4, 3\)"),
        ({"flow": FLOW * np.nan, "valid": np.ones((3, 4))}, "must hold a finite flow wherever valid is not 0"),
        ({"flow": FLOW * np.nan}, "must know the flow of at least one pixel"),
        ({"flow": FLOW, "valid": np.zeros((3, 4))}, "must know the flow of at least one pixel"),
        ({"flo": FLOW, "x": FLOW}, r"must be a file of numpy arrays \(\.npz\): it has no array 'flow', only flo, x"),
        ({"flow": np.array([None])}, r"must be a file of numpy arrays \(\.npz\): "),
    ],
)
def test_a_file_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    (pair,) = load_flows(make(tmp_path / "a", **arrays))
    with pytest.raises(ValueError, match=rf"flow\.npz {message}"):
        pair.truth((3, 4), (9, 9))


def test_a_damaged_file_that_is_compressed(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", None)
    np.savez_compressed(folder / "flow.npz", flow=FLOW)
    content = bytearray((folder / "flow.npz").read_bytes())
    content[58] = 0xFF  # where the compressed array begins: a kind of block there is none of
    (folder / "flow.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"flow\.npz must be a file of numpy arrays \(\.npz\): "):
        load_flows(folder)[0].truth((3, 4), (9, 9))


@pytest.mark.parametrize("keep", [0, 5, 100])
@pytest.mark.parametrize("text", [None, "no arrays"])
def test_a_damaged_file(tmp_path: Path, keep: int, text: str | None) -> None:
    folder = make(tmp_path / "a")
    file = folder / "flow.npz"
    file.write_bytes(text.encode() if text else file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"flow\.npz must be a file of numpy arrays \(\.npz\), which it is not"):
        load_flows(folder)[0].truth((3, 4), (9, 9))


def test_folders_without(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^root must hold flow\.npz or flow\.flo or flow\.png beside photographs 1 and 2, "
    ):
        load_flows(tmp_path)
    with pytest.raises(FileNotFoundError, match="^root must be a folder, but there is no "):
        load_flows(tmp_path / "absent")
    (make(tmp_path / "a") / "2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"a has no photograph 2\.png \(or \.ppm, "):
        load_flows(tmp_path)


def test_the_check_of_dense_pairs(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        make(tmp_path / name)
        for image in ("1.png", "2.jpg"):
            Image.new("RGB", (4, 3)).save(tmp_path / name / image)
    assert recognise(tmp_path) == recognise(tmp_path / "a") == "dense"
    report = check_pairs(tmp_path)
    assert report.wrong == [] and (report.splits[0].pairs, report.splits[0].points) == (2, 24)
    assert report.lines()[1].split() == ["split", "pairs", "pixels", "photographs", "categories"]
    Image.new("RGB", (5, 3)).save(tmp_path / "b" / "1.png")
    (tmp_path / "a" / "2.jpg").write_text("no photograph")
    wrong = check_pairs(tmp_path).wrong
    assert len(wrong) == 2 and "2.jpg must be an image file" in wrong[0] and "must hold a flow of numbers" in wrong[1]


def test_the_check_goes_on_after_a_pair_that_cannot_be_read(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b", "c"):
        make(tmp_path / name)
        for image in ("1.png", "2.jpg"):
            Image.new("RGB", (4, 3)).save(tmp_path / name / image)
    (tmp_path / "a" / "2.jpg").unlink()
    (tmp_path / "b" / "flow.npz").write_text("no arrays")
    report = check_pairs(tmp_path)
    assert (report.splits[0].pairs, report.splits[0].points) == (2, 12)
    assert len(report.wrong) == 2
    assert report.wrong[0].startswith(f"{tmp_path / 'a'} has no photograph 2.png")
    assert report.wrong[1].startswith(f"{tmp_path / 'b' / 'flow.npz'} must be a file of numpy arrays")


@pytest.mark.parametrize(("name", "pixels"), [("kitti", 75_453), ("aloe", 1_373_890)])
def test_the_stored_flows(shared: Path, name: str, pixels: int) -> None:
    report = check_pairs(shared / "data" / "dense" / name)
    assert report.wrong == [] and report.title == "dense flow" and report.splits[0].points == pixels
