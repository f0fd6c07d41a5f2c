"""Images in: whatever people call an image becomes a float32 tensor (3, H, W) in [0, 1], or an error that says why not.

What is accepted, and how it is read:

- a **path** (str, bytes, os.PathLike) of any file Pillow opens, first frame of an animation;
- a **PIL image** of any mode Pillow converts to RGB. The EXIF orientation is applied here too, as to files;
- a **numpy array** (H, W, 3), (H, W, 4), (H, W, 1) or (H, W);
- a **torch tensor** (3, H, W), (4, H, W), (1, H, W) or (H, W), on any device; the result is on the CPU.

Arrays and tensors are uint8 (divided by 255), uint16 (by 65535), bool, or floating point in [0, 1]. Pillow's modes
"I;16" and "I" hold 16-bit values (divided by 65535), its mode "F" numbers in [0, 1]. One channel is gray. A fourth
channel, or transparency of another kind, is opacity: the image is laid over white.
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

ImageLike = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]", "Image", NDArray[Any], Tensor]
"""What `load_image` accepts."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FULL_SCALE = {torch.uint8: 255.0, torch.uint16: 65535.0, torch.bool: 1.0}
_ROUNDING = 1e-6
_ORIENTATION = 0x0112
_WARNINGS = threading.Lock()


def load_image(image: ImageLike, name: str = "image") -> Tensor:
    """`image` as a new contiguous float32 tensor (3, H, W) in [0, 1] on the CPU; `name` is the argument's, for errors.

    Raises FileNotFoundError or another OSError for a file that is missing or cannot be decoded, TypeError for what is
    no image or has another dtype, ValueError for a wrong shape, an image without pixels, and values that are not
    finite or not in [0, 1]. The file's docstring says what is accepted.
    """
    pixels = load_pixels(image, name)
    return pixels if pixels.is_floating_point() else (pixels.to(torch.float32) / 255).contiguous()


def load_pixels(image: ImageLike, name: str = "image") -> Tensor:
    """The same (3, H, W), in the numbers it has where these are opaque colours of 8 bits: a new tensor, uint8, in any
    order of memory. `preprocess` and `to_uint8` take it as it is, which for a large photograph is several times faster.
    """
    if isinstance(image, (str, bytes, os.PathLike)):
        return _from_file(image, name)
    if isinstance(image, Tensor):
        return _from_tensor(image, name)
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    from PIL import Image

    if isinstance(image, Image.Image):
        return _from_pil(image, name)
    raise TypeError(
        f"{name} must be a path, a PIL image, a numpy array (H, W, 3) or (H, W), or a torch tensor (3, H, W) or "
        f"(H, W), got {type(image).__name__}"
    )


def image_size(path: str | bytes | os.PathLike[Any], name: str = "image") -> tuple[int, int]:
    """(height, width) that `load_image` would give an image file, which is not decoded where its format allows.

    Raises OSError for a file that is missing or no image; `name` is the argument's, for errors.
    """
    with _opened(path, name) as image:
        try:
            if image.format == "TIFF":
                image.load()  # whose header Pillow turns already, and drops the tag only here
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        except Exception as error:
            raise OSError(
                f"{name} must be a readable image, but the file {str(path)!r} cannot be decoded: {error}"
            ) from error
        return (image.width, image.height) if turned else (image.height, image.width)


def to_uint8(image: Tensor) -> NDArray[np.uint8]:
    """An image (3, H, W), float in [0, 1], which is rounded, or uint8, as a numpy array (H, W, 3) uint8."""
    pixels = image if image.dtype == torch.uint8 else (image * 255).round_().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def preprocess(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (3, H, W), float in [0, 1] or uint8, as the network wants it: squashed to `size` (height, width),
    normalised.

    The resize is bilinear and antialiased, whatever the aspect ratio; the normalisation is `normalize`.
    """
    values = image.to(torch.float32)
    squashed = F.interpolate(values[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    return normalize(squashed / 255 if image.dtype == torch.uint8 else squashed)


def normalize(images: Tensor) -> Tensor:
    """Images (..., 3, H, W) in [0, 1] minus the ImageNet mean, divided by the ImageNet standard deviation."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def _from_file(given: str | bytes | os.PathLike[Any], name: str) -> Tensor:
    with _opened(given, name) as opened:
        return _from_pil(opened, name, f"file {str(Path(os.fsdecode(given)))!r}")


def _opened(given: str | bytes | os.PathLike[Any], name: str) -> Image:
    """The file as Pillow opens it, its header read."""
    path = _file(given, name)
    from PIL import Image

    # Pillow opens images up to twice its limit with a warning, and refuses larger ones; only the refusal matters here.
    # Filters belong to the process, hence the lock.
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(path)
        except Image.DecompressionBombError as error:
            raise OSError(
                f"{name} must have at most {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels (twice "
                f"PIL.Image.MAX_IMAGE_PIXELS), which the file {str(path)!r} has not: {error}"
            ) from error
        except Exception as error:
            if path.stat().st_size == 0:
                raise OSError(f"{name} must be an image file, but {str(path)!r} is empty") from error
            raise OSError(f"{name} must be an image file, but Pillow cannot identify {str(path)!r}") from error


def _file(given: str | bytes | os.PathLike[Any], name: str) -> Path:
    raw = os.fspath(given)
    if isinstance(raw, bytes) and (len(raw) > 4096 or b"\0" in raw):
        raise ValueError(
            f"{name} must be a path when it is bytes, not the contents of a file "
            f"(pass PIL.Image.open(io.BytesIO(contents)) instead)"
        )
    path = Path(os.fsdecode(raw))
    shown = str(path) if len(str(path)) <= 300 else f"{str(path)[:300]}..."
    try:
        found, folder, regular = path.exists(), path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise OSError(f"{name} must be the path of an image file, but {shown!r} cannot be read: {error}") from error
    if not found or not raw:
        raise FileNotFoundError(f"{name} must be the path of an image file, but there is no file {shown!r}")
    if folder:
        raise IsADirectoryError(f"{name} must be the path of an image file, but {shown!r} is a folder")
    if not regular:
        raise OSError(f"{name} must be the path of an image file, but {shown!r} is no regular file")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{name} must be the path of an image file, but {shown!r} may not be read")
    return path


def _from_pil(image: Image, name: str, what: str = "PIL image") -> Tensor:
    if 0 in image.size:
        raise ValueError(f"{name} must have at least one pixel, got a {what} of {image.width} x {image.height}")
    from PIL import ImageOps

    try:
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception as error:
        raise OSError(f"{name} must be a readable image, but the {what} cannot be decoded: {error}") from error
    if image.mode.startswith("I") and "transparency" in image.info:
        raise ValueError(f"{name} must not be a 16-bit {what} with a transparent value; save it with an alpha channel")
    if image.mode.startswith("I;16"):
        return _from_array(np.asarray(image).astype(np.uint16), name)
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f'{name} must hold values from 0 to 65535 when its mode is "I", got {values.min()} to {values.max()}'
            )
        return _from_array(values.astype(np.uint16), name)
    if image.mode == "F":
        return _from_array(np.asarray(image), name)
    if image.mode == "La":
        image = image.convert("LA")
    transparent = image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info
    try:
        converted = image.convert("RGBA" if transparent else "RGB")
    except ValueError as error:
        raise ValueError(f"{name} must have a mode that Pillow converts to RGB, got {image.mode!r}") from error
    return _from_array(np.asarray(converted), name)


def _from_array(array: NDArray[Any], name: str) -> Tensor:
    shape = array.shape
    if array.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        raise ValueError(
            f"{name} must have shape (H, W, 3) or (H, W) as a numpy array, got {shape}, which looks like (C, H, W): "
            f"transpose it with array.transpose(1, 2, 0)"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        raise ValueError(f"{name} must have shape (H, W, 3), (H, W, 4), (H, W, 1) or (H, W), got {shape}")
    if array.dtype.kind == "f":
        array = array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32, order="C")
    elif array.dtype == np.bool_ or array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    else:
        _refuse_dtype(name, array.dtype)
    tensor = torch.from_numpy(array)
    return _as_colours(tensor[None] if array.ndim == 2 else tensor.permute(2, 0, 1), name)


def _from_tensor(tensor: Tensor, name: str) -> Tensor:
    shape = tuple(tensor.shape)
    if tensor.ndim == 3 and shape[0] not in (1, 3, 4) and shape[2] in (1, 3, 4):
        raise ValueError(
            f"{name} must have shape (3, H, W) or (H, W) as a torch tensor, got {shape}, which looks like (H, W, C): "
            f"move its channels first with tensor.permute(2, 0, 1)"
        )
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and shape[0] not in (1, 3, 4)):
        raise ValueError(f"{name} must have shape (3, H, W), (4, H, W), (1, H, W) or (H, W), got {shape}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(f"{name} must be a dense tensor with data, got layout {tensor.layout} on {tensor.device}")
    if not tensor.is_floating_point() and tensor.dtype not in _FULL_SCALE:
        _refuse_dtype(name, tensor.dtype)
    tensor = tensor.detach().to("cpu", copy=tensor.dtype == torch.uint8)
    return _as_colours(tensor[None] if tensor.ndim == 2 else tensor, name)


def _refuse_dtype(name: str, dtype: object) -> None:
    raise TypeError(
        f"{name} must be uint8, uint16, bool or floating point in [0, 1], got {str(dtype).removeprefix('torch.')}"
    )


def _as_colours(tensor: Tensor, name: str) -> Tensor:
    """A checked (1, 3 or 4, H, W) tensor of any accepted dtype as RGB: uint8 as it is, unless something shines through,
    and everything else in [0, 1]."""
    if 0 in tensor.shape:
        raise ValueError(
            f"{name} must have at least one pixel, got height {tensor.shape[1]} and width {tensor.shape[2]}"
        )
    if tensor.is_floating_point():
        lowest, highest = (value.item() for value in torch.aminmax(tensor.float()))
        if not np.isfinite([lowest, highest]).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        if lowest < -_ROUNDING or highest > 1 + _ROUNDING:
            raise ValueError(
                f"{name} must lie in [0, 1] when it is floating point, got values from {lowest:g} to {highest:g}"
            )
        values = tensor.to(torch.float32).clamp(0, 1)
    elif tensor.dtype == torch.uint8 and tensor.shape[0] != 4:
        return tensor.expand(3, -1, -1)
    else:
        values = tensor.to(torch.float32) / _FULL_SCALE[tensor.dtype]
    if values.shape[0] == 4:
        opacity = values[3:]
        values = values[:3] * opacity + (1 - opacity)
    return values.expand(3, -1, -1).contiguous()
