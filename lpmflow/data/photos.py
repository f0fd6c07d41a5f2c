"""A folder of photographs as one array, decoded once: the raw material of warp pairs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lpmflow.images import load_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def find_photos(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files below `folder`, sorted; FileNotFoundError when it is no folder or holds none."""
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"photos must be a folder of image files, got {str(root)!r}")
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise FileNotFoundError(f"photos must hold {', '.join(SUFFIXES)} files, found none in {str(root)!r}")
    return found


def load_photos(
    folder: str | os.PathLike[str], size: int = 256, *, progress: Callable[[list[Path]], Iterable[Path]] | None = None
) -> Tensor:
    """Every photograph below `folder` squashed to a square: (N, 3, size, size) uint8, in the order of the file names.

    Photographs are squashed because the network squashes what it matches too. `progress` may wrap the list of files,
    as tqdm does. Raises FileNotFoundError when there is none, OSError naming a file that cannot be decoded.
    """
    files = find_photos(folder)
    photos = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for photo, file in zip(photos, progress(files) if progress else files, strict=True):
        image = load_image(file, "photos")
        squashed = F.interpolate(image[None], (size, size), mode="bilinear", align_corners=False, antialias=True)
        photo.copy_((squashed[0] * 255).round_())
    return photos
