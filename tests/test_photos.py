"""A folder of photographs as one array: what is found, in which order, squashed how, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpmflow.data import load_photos
from lpmflow.data.photos import find_photos


def save(file: Path, image: np.ndarray) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)
    return file


def plain(value: int, size: tuple[int, int] = (5, 7)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def test_images_in_all_folders_below_sorted(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.jpg", "b/c.PNG", "b/d/e.webp", "f.Jpeg", "g.bmp")]
    for file in reversed(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for other in ("notes.txt", "a.jpg.part", "jpg", "z.gif"):
        (tmp_path / other).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert find_photos(tmp_path) == files
    assert find_photos(str(tmp_path)) == files


def test_photographs_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, value in (("c.png", 30), ("a.png", 10), ("b/x.png", 20)):
        save(tmp_path / name, plain(value))
    photos = load_photos(tmp_path, 4)
    assert photos.shape == (3, 3, 4, 4) and photos.dtype == torch.uint8 and photos.device.type == "cpu"
    assert (photos == torch.tensor([10, 20, 30])[:, None, None, None]).all()


def test_squashed_like_pillow_does(tmp_path: Path, photo: np.ndarray) -> None:
    save(tmp_path / "photo.png", photo)
    for size in (16, 100):
        wanted = np.asarray(Image.fromarray(photo).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        found = load_photos(tmp_path, size)[0].permute(1, 2, 0).numpy()
        assert np.abs(found - wanted).max() <= 1


def test_a_photograph_of_that_size_is_kept_as_it_is(tmp_path: Path, photo: np.ndarray) -> None:
    save(tmp_path / "photo.png", photo[:, :40])
    np.testing.assert_array_equal(load_photos(tmp_path, 40)[0].permute(1, 2, 0).numpy(), photo[:, :40])


def test_gray_and_transparent_files_become_colour(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.full((4, 4), 77, np.uint8))
    save(tmp_path / "b.png", np.zeros((4, 4, 4), np.uint8))  # laid over white
    photos = load_photos(tmp_path, 4)
    assert (photos[0] == 77).all() and (photos[1] == 255).all()


def test_progress_wraps_the_files(tmp_path: Path) -> None:
    files = [save(tmp_path / name, plain(1)) for name in ("a.png", "b.png")]
    seen: list[Path] = []

    def progress(given: list[Path]) -> list[Path]:
        seen.extend(given)
        return given

    assert len(load_photos(tmp_path, 4, progress=progress)) == 2
    assert seen == files


def test_no_folder(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", plain(1))
    for folder in (tmp_path / "absent", file):
        with pytest.raises(FileNotFoundError) as refused:
            load_photos(folder)
        assert str(refused.value) == f"photos must be a folder of image files, got {str(folder)!r}"


def test_no_photographs(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError) as refused:
        load_photos(tmp_path)
    assert str(refused.value).startswith("photos must hold .jpg, ")
    assert str(refused.value).endswith(f"found none in {str(tmp_path)!r}")


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png", plain(1))
    (tmp_path / "b.jpg").write_bytes(b"not a photograph")
    with pytest.raises(OSError, match=r"photos .*b\.jpg"):
        load_photos(tmp_path, 4)
    (tmp_path / "b.jpg").unlink()
    whole = save(tmp_path / "c.png", np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    whole.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"photos .*c\.png"):
        load_photos(tmp_path, 4)
