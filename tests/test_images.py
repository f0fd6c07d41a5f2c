"""Whatever people call an image, and what is refused, with the sentence that says so."""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lpmflow.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    image_size,
    load_image,
    load_pixels,
    normalize,
    preprocess,
    to_uint8,
)


def expected(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32) / 255).permute(2, 0, 1)


def close(found: torch.Tensor, wanted: torch.Tensor, atol: float = 1e-6) -> None:
    assert found.dtype == torch.float32 and found.is_contiguous() and found.device.type == "cpu"
    torch.testing.assert_close(found, wanted.contiguous(), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", [str, os.fsencode, lambda path: path])
def test_paths(tmp_path, photo, kind):
    path = tmp_path / "ä photo.png"
    Image.fromarray(photo).save(path)
    close(load_image(kind(path), "source"), expected(photo))


def test_numpy_and_torch_of_every_accepted_kind(photo):
    wanted = expected(photo)
    channels_first = torch.from_numpy(photo).permute(2, 0, 1)
    for image in (
        photo,
        photo.astype(np.uint16) * 257,
        (photo.astype(np.uint16) * 257).astype(">u2"),
        (photo / 255).astype(np.float32),
        photo / 255,
        (photo / 255).astype(np.longdouble),
        np.asfortranarray(photo),
        photo[::-1][::-1],
        channels_first,
        channels_first / 255,
        (channels_first / 255).double(),
        (channels_first / 255).requires_grad_(),
        (channels_first.to(torch.int32) * 257).to(torch.uint16),
    ):
        close(load_image(image, "source"), wanted)
    close(load_image((photo / 255).astype(np.float16), "source"), wanted, atol=5e-4)
    close(load_image((channels_first / 255).bfloat16(), "source"), wanted, atol=5e-3)


def test_the_result_shares_no_memory(photo):
    for image in (photo / np.float32(255), torch.from_numpy(photo).permute(2, 0, 1) / 255):
        before = float(image[0, 0, 0])
        load_image(image, "source").fill_(0.123)
        assert float(image[0, 0, 0]) == before


def test_a_read_only_array_gives_no_warning(photo):
    photo.flags.writeable = False
    close(load_image(photo, "source"), expected(photo))


def test_one_channel_is_gray(photo):
    gray = photo[..., 0]
    wanted = expected(np.repeat(gray[..., None], 3, axis=2))
    for image in (gray, gray[..., None], torch.from_numpy(gray), torch.from_numpy(gray)[None], Image.fromarray(gray)):
        close(load_image(image, "source"), wanted)


def test_bool_is_black_and_white():
    mask = np.array([[True, False]])
    wanted = torch.tensor([1.0, 0.0]).expand(3, 1, 2)
    close(load_image(mask, "source"), wanted)
    close(load_image(torch.from_numpy(mask), "source"), wanted)
    close(load_image(Image.fromarray(mask), "source"), wanted)


def test_opacity_is_laid_over_white(photo):
    alpha = np.zeros((*photo.shape[:2], 1), np.uint8)
    alpha[:, 10:20], alpha[:, 20:] = 51, 255
    rgba = np.concatenate((photo, alpha), axis=2)
    weight = torch.from_numpy(alpha[..., 0] / np.float32(255))
    wanted = expected(photo) * weight + (1 - weight)
    for image in (rgba, Image.fromarray(rgba), torch.from_numpy(rgba).permute(2, 0, 1)):
        close(load_image(image, "source"), wanted)
    gray = Image.merge("LA", (Image.fromarray(photo[..., 0]), Image.fromarray(alpha[..., 0])))
    close(load_image(gray, "source"), (expected(photo)[:1] * weight + (1 - weight)).expand(3, -1, -1))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_pil_modes(photo, mode):
    image = Image.fromarray(photo)
    for step in {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "PA": ("P", "PA")}.get(mode, (mode,)):
        image = image.convert(step)
    assert image.mode == mode
    wanted = expected(np.asarray(image.convert("LA").convert("RGB") if mode == "La" else image.convert("RGB")))
    close(load_image(image, "source"), wanted)


def test_sixteen_bit_and_float_pil_modes():
    values = np.array([[0, 257, 65535]], np.uint16)
    wanted = torch.tensor([0.0, 1 / 255, 1.0]).expand(3, 1, 3)
    close(load_image(Image.fromarray(values), "source"), wanted)
    close(load_image(Image.fromarray(values.astype(np.int32)), "source"), wanted)
    close(load_image(Image.fromarray(np.array([[0, 1 / 255, 1]], np.float32)), "source"), wanted)
    big_endian = Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
    close(load_image(big_endian, "source"), wanted)
    with pytest.raises(ValueError, match='source must hold values from 0 to 65535 when its mode is "I", got -1 to 5'):
        load_image(Image.fromarray(np.array([[-1, 5]], np.int32)), "source")
    with pytest.raises(ValueError, match=r"source must lie in \[0, 1\] when it is floating point, got .* 0 to 200"):
        load_image(Image.fromarray(np.array([[0, 200]], np.float32)), "source")


def test_a_sixteen_bit_png(tmp_path):
    values = np.array([[0, 257, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    close(load_image(tmp_path / "deep.png", "source"), torch.tensor([0.0, 1 / 255, 1.0]).expand(3, 1, 3))


def test_a_transparent_value_of_16_bits_is_refused(tmp_path):
    image = Image.fromarray(np.full((2, 3), 40000, np.uint16))
    image.info["transparency"] = 40000
    with pytest.raises(ValueError, match="src must not be a 16-bit PIL image with a transparent value"):
        load_image(image, "src")


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    wanted = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])[:, None]
    close(load_image(tmp_path / "a.png", "source"), wanted)
    image.save(tmp_path / "b.png", transparency=b"\xff\x00")
    close(load_image(tmp_path / "b.png", "source"), wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, photo, orientation):
    upright = {1: photo, 2: photo[:, ::-1], 3: photo[::-1, ::-1], 4: photo[::-1]}
    turned = photo.transpose(1, 0, 2)
    upright |= {5: turned, 6: turned[:, ::-1], 7: turned[::-1, ::-1], 8: turned[::-1]}
    image = Image.fromarray(photo)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    wanted = expected(np.ascontiguousarray(upright[orientation]))
    close(load_image(tmp_path / "a.png", "source"), wanted)
    with Image.open(tmp_path / "a.png") as opened:
        close(load_image(opened, "source"), wanted)


def test_an_animation_gives_its_first_frame(tmp_path, photo):
    frames = [Image.fromarray(photo).convert("P"), Image.new("P", (60, 40))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    close(load_image(tmp_path / "a.gif", "source"), expected(np.asarray(frames[0].convert("RGB"))))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_small_and_thin_images(size):
    image = np.full((*size, 3), 51, np.uint8)
    loaded = load_image(image, "source")
    assert loaded.shape == (3, *size)
    found = preprocess(loaded, (16, 24))
    assert found.shape == (3, 16, 24)
    wanted = (0.2 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(found, wanted[:, None, None].expand(3, 16, 24))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="source must be the path of an image file, but there is no file"):
        load_image(tmp_path / "none.png", "source")
    for nothing in ("", b""):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            load_image(nothing, "source")
    with pytest.raises(IsADirectoryError, match=r"source must be .* is a folder"):
        load_image(tmp_path, "source")
    with pytest.raises(OSError, match="source must be the path of an image file"):
        load_image("a" * 5000, "source")
    with pytest.raises(OSError, match="source must be the path of an image file"):
        load_image("a\0b.png", "source")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is no regular file"):
        load_image(tmp_path / "pipe", "source")


def test_bytes_are_a_path_and_not_contents(photo):
    contents = io.BytesIO()
    Image.fromarray(photo).save(contents, "PNG")
    with pytest.raises(ValueError, match=r"source must be a path when it is bytes, .* PIL\.Image\.open"):
        load_image(contents.getvalue(), "source")


def test_files_that_cannot_be_decoded(tmp_path, photo):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"")
    with pytest.raises(OSError, match=r"source must be an image file, but .*a\.jpg' is empty"):
        load_image(path, "source")
    path.write_text("hello")
    with pytest.raises(OSError, match=r"source must be an image file, but Pillow cannot identify .*a\.jpg"):
        load_image(path, "source")
    for name in ("b.jpg", "b.png", "b.gif", "b.tif", "b.webp"):
        Image.fromarray(photo).resize((300, 200)).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(OSError, match=rf"source must be .*{name}"):
            load_image(tmp_path / name, "source")


def test_a_pil_image_whose_file_is_broken(tmp_path, photo):
    path = tmp_path / "a.jpg"
    Image.fromarray(photo).resize((300, 200)).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with Image.open(path) as opened, pytest.raises(OSError, match="target must be a readable image, but the PIL image"):
        load_image(opened, "target")


def test_the_limit_of_pillow(tmp_path, photo, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(photo).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path, "source").shape == (3, 40, 60)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match=r"source must have at most 2000 pixels .*a\.png"):
        load_image(path, "source")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(path, "source").shape == (3, 40, 60)


@pytest.mark.parametrize("image", [None, 3, 0.5, [[1, 2]], (1, 2), object(), {"a": 1}, range(3)])
def test_what_is_no_image(image):
    with pytest.raises(TypeError, match="source must be a path, a PIL image, a numpy array .* or a torch tensor"):
        load_image(image, "source")


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.int16, np.uint32, np.complex64, object, "U1", "M8[s]"])
def test_dtypes_without_a_clear_range(dtype):
    with pytest.raises(TypeError, match=r"source must be uint8, uint16, bool or floating point in \[0, 1\], got "):
        load_image(np.zeros((4, 5, 3), dtype), "source")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.complex64])
def test_torch_dtypes_without_a_clear_range(dtype):
    with pytest.raises(TypeError, match=r"source must be uint8, uint16, bool or floating point in \[0, 1\], got \w+$"):
        load_image(torch.zeros(3, 4, 5, dtype=dtype), "source")


def test_tensors_without_data():
    with pytest.raises(TypeError, match="source must be a dense tensor with data"):
        load_image(torch.zeros(3, 4, 5, device="meta"), "source")
    with pytest.raises(TypeError, match="source must be a dense tensor with data"):
        load_image(torch.zeros(3, 4, 5).to_sparse(), "source")


@pytest.mark.parametrize("shape", [(), (4,), (5, 5, 2), (5, 5, 6), (1, 4, 5, 3), (2, 3, 4, 5, 6)])
def test_wrong_shapes(shape):
    with pytest.raises(ValueError, match=r"source must have shape \(H, W, 3\).* got \("):
        load_image(np.zeros(shape), "source")
    with pytest.raises(ValueError, match=r"source must have shape \(3, H, W\).* got \("):
        load_image(torch.zeros(shape), "source")


def test_the_other_librarys_layout_is_named():
    with pytest.raises(ValueError, match=r"got \(3, 40, 60\), which looks like \(C, H, W\): .*transpose\(1, 2, 0\)"):
        load_image(np.zeros((3, 40, 60)), "source")
    with pytest.raises(ValueError, match=r"got \(40, 60, 3\), which looks like \(H, W, C\): .*permute\(2, 0, 1\)"):
        load_image(torch.zeros(40, 60, 3), "source")
    assert load_image(np.zeros((3, 40, 3)), "source").shape == (3, 3, 40)
    assert load_image(torch.zeros(3, 40, 3), "source").shape == (3, 40, 3)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 5, 3), (5, 0, 3)])
def test_images_without_pixels(shape):
    with pytest.raises(ValueError, match="source must have at least one pixel"):
        load_image(np.zeros(shape, np.uint8), "source")


def test_a_pil_image_without_pixels():
    with pytest.raises(ValueError, match="source must have at least one pixel, got a PIL image of 0 x 5"):
        load_image(Image.new("RGB", (0, 5)), "source")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite(bad, dtype):
    image = np.zeros((4, 5, 3), dtype)
    image[3, 4, 2] = bad
    with pytest.raises(ValueError, match="source must be finite, got NaN or infinity"):
        load_image(image, "source")


@pytest.mark.parametrize("bad", [-0.01, 1.01, 255.0, 1e300])
def test_values_outside_the_range(bad):
    image = np.zeros((4, 5, 3))
    image[0, 0, 0] = bad
    with pytest.raises(ValueError, match="source must "):
        load_image(image, "source")


def test_rounding_beyond_the_range_is_forgiven():
    image = np.array([[1 + 5e-7, -5e-7]])
    assert load_image(image, "source").aminmax() == (0.0, 1.0)


def test_a_mode_pillow_cannot_convert(monkeypatch):
    def convert(self, mode):
        raise ValueError("conversion from LAB to RGB not supported")

    image = Image.new("LAB", (4, 4))
    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(ValueError, match="source must have a mode that Pillow converts to RGB, got 'LAB'"):
        load_image(image, "source")


def test_to_uint8_gives_back_what_was_read(photo):
    back = to_uint8(load_image(photo, "source"))
    assert back.dtype == np.uint8 and back.flags.c_contiguous
    np.testing.assert_array_equal(back, photo)


def test_preprocess_is_pillows_resize_and_the_imagenet_normalisation(photo):
    found = preprocess(load_image(photo, "source"), (24, 16))
    small = np.asarray(Image.fromarray(photo).resize((16, 24), Image.Resampling.BILINEAR)).astype(np.float32) / 255
    wanted = (small - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
    torch.testing.assert_close(found, torch.from_numpy(wanted).permute(2, 0, 1), rtol=0, atol=0.02)
    image = torch.rand(2, 3, 5, 6)
    torch.testing.assert_close(
        normalize(image)[1, 2], (image[1, 2] - IMAGENET_MEAN[2]) / IMAGENET_STD[2], rtol=0, atol=1e-6
    )


def test_preprocess_antialiases():
    stripes = torch.zeros(3, 64, 64)
    stripes[:, :, ::2] = 1
    gray = normalize(torch.full((3, 8, 8), 0.5))
    found = preprocess(stripes, (8, 8))
    torch.testing.assert_close(found[:, :, 1:-1], gray[:, :, 1:-1], rtol=0, atol=0.02)
    assert (normalize(F.interpolate(stripes[None], (8, 8)))[0] - gray).abs().min() > 1


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_the_size_of_a_file_is_that_of_the_image(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    assert image_size(path) == tuple(load_image(path).shape[1:]) == ((30, 20) if orientation > 4 else (20, 30))


def test_the_size_of_a_jpeg_is_read_from_its_header(tmp_path):
    path = tmp_path / "a.jpg"
    Image.effect_noise((30, 20), 50).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    assert image_size(path, "source") == (20, 30)
    with pytest.raises(OSError, match="source must be a readable image, but the file .* cannot be decoded"):
        load_image(path, "source")
    with pytest.raises(FileNotFoundError, match="source must be the path of an image file, but there is no file"):
        image_size(tmp_path / "b.jpg", "source")


def kinds(photo):
    """The same photograph in every form whose pixels are kept as they are."""
    array, tensor = photo.copy(), torch.from_numpy(photo.copy())
    return {
        "PIL": Image.fromarray(photo), "array": array, "gray": array[..., 0], "tensor": tensor.permute(2, 0, 1),
        "dense": tensor.permute(2, 0, 1).contiguous(), "gray tensor": tensor[..., 1],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["PIL", "array", "gray", "tensor", "dense", "gray tensor"])
def test_pixels_are_kept_as_they_are(photo, kind):
    image = kinds(photo)[kind]
    pixels, unit = load_pixels(image), load_image(image)
    assert pixels.dtype == torch.uint8 and pixels.shape == unit.shape
    torch.testing.assert_close(pixels.float() / 255, unit, rtol=0, atol=0)
    assert (to_uint8(pixels) == to_uint8(unit)).all()
    torch.testing.assert_close(preprocess(pixels, (24, 40)), preprocess(unit, (24, 40)), rtol=0, atol=2e-6)
    if kind != "PIL":  # nothing that is done to the image later is seen
        before = to_uint8(pixels)
        image[:] = 7
        assert (to_uint8(pixels) == before).all() and (before != 7).any()


def test_pixels_of_other_kinds_are_those_of_load_image(photo):
    see_through = np.dstack((photo, np.full(photo.shape[:2], 100, np.uint8)))
    for image in (photo.astype(np.uint16) * 257, photo / 255, photo > 99, see_through):
        pixels = load_pixels(image)
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels, load_image(image), rtol=0, atol=0)
