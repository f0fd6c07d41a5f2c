"""The demo: its warp is the one it says it is, its error is measured right, and it runs as a newcomer runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpmflow import demo


@pytest.mark.parametrize("name", ["cat", "raccoon"])
def test_photographs(name: str) -> None:
    path = demo.photograph(name)
    assert path.stat().st_size <= 150_000
    with Image.open(path) as image:
        assert image.mode == "RGB" and max(image.size) <= 512
        for x, y in demo.LANDMARKS[name].values():
            assert 0 <= x <= image.width - 1 and 0 <= y <= image.height - 1
    assert f"## {path.name}" in (demo.ASSETS / "LICENSES.md").read_text(encoding="utf-8")


def test_unknown_photograph() -> None:
    with pytest.raises(ValueError, match="cat, raccoon, got 'dog'"):
        demo.photograph("dog")


def test_every_picture_in_the_package_has_a_licence() -> None:
    licences = (demo.ASSETS / "LICENSES.md").read_text(encoding="utf-8")
    pictures = [path.name for path in demo.ASSETS.iterdir() if path.suffix != ".md"]
    assert sorted(pictures) == ["cat.jpg", "raccoon.jpg"]
    assert all(f"## {name}" in licences for name in pictures)


def test_warp_turns_and_enlarges_about_the_centre() -> None:
    homography = demo.known_warp((301, 401))
    centre = np.array([200.0, 150.0])
    np.testing.assert_allclose(demo.move(centre, homography), centre, atol=1e-9)
    step = 1e-4 * np.eye(2)
    jacobian = (demo.move(centre + step, homography) - demo.move(centre - step, homography)).T / 2e-4
    angle = np.radians(8)
    np.testing.assert_allclose(
        jacobian, 1.3 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]), atol=1e-6
    )


@pytest.mark.parametrize("size", [(360, 480), (300, 451), (64, 64)])
def test_the_warped_picture_is_all_source(size: tuple[int, int]) -> None:
    height, width = size
    corners = np.array([[-0.5, -0.5], [width - 0.5, -0.5], [-0.5, height - 0.5], [width - 0.5, height - 0.5]])
    back = demo.move(corners, np.linalg.inv(demo.known_warp(size)))
    assert (back > -0.5).all() and (back < (width - 0.5, height - 0.5)).all()


def test_rendering_agrees_with_the_homography() -> None:
    """A picture of its own coordinates: each target pixel must show the source position it came from."""
    height, width = 200, 240
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height), indexing="xy"), axis=-1)
    image = np.concatenate((pixels, pixels[..., :1]), axis=-1).astype(np.uint8)
    homography = demo.known_warp((height, width))
    shown = demo.warped(image, homography)[..., :2].astype(np.float64)
    true = demo.move(pixels.astype(np.float64), np.linalg.inv(homography))
    assert np.abs(shown - true).max() < 0.51  # rounded to whole numbers
    assert np.abs((shown - true).mean()) < 0.01


def test_flow_error_of_known_flows() -> None:
    size = (30, 40)
    homography = demo.known_warp(size)
    flow = demo.true_flow(size, homography)
    moved = demo.move(np.array([7.0, 5.0]), homography)
    np.testing.assert_allclose(flow[5, 7], moved - (7, 5))
    error = demo.flow_error(flow, homography)
    assert 0 < error.size < 30 * 40
    np.testing.assert_allclose(error, 0, atol=1e-9)
    np.testing.assert_allclose(demo.flow_error(flow + (3, 4), homography), 5)


def test_demo_writes_pictures_and_tells_the_truth(tmp_path: Path) -> None:
    said: list[str] = []
    files = demo.run(tmp_path / "new" / "folder", say=said.append)
    assert sorted(path.name for path in files) == ["faces.png", "raccoon-warped.png", "warp.png"]
    assert sorted((tmp_path / "new" / "folder").iterdir()) == sorted(files)
    for path in files:
        with Image.open(path) as image:
            image.load()
            assert min(image.size) >= 200
        assert f"wrote {path}" in said
    text = "\n".join(said)
    assert "loaded lpmflow-tiny on the CPU in" in text
    assert text.count("matched in") == 2
    mean = float(text.split("off the truth by\n   ")[1].split(" px")[0])
    unmoved = float(text.split("(they lie ")[1].split(" px")[0])
    assert mean < unmoved / 2


def test_the_line_of_python_it_ends_with_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    demo.run(tmp_path, say=said.append)
    exec(said[-1].strip(), {})
    assert capsys.readouterr().out.count(".") >= 2


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        demo.run(tmp_path / "file", say=lambda line: None)
