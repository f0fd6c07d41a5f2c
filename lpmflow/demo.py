"""`lpmflow demo`: two matches of bundled photographs on the CPU, with the embedded weights.

The first is a photograph against a known warp of itself, so the true answer is known to the pixel and the error can
be printed. The second is a cat against a raccoon, where only the eyes and noses, marked by hand, tell.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lpmflow.matcher import Matcher
    from lpmflow.result import Match

ASSETS = Path(__file__).resolve().parent / "assets"
MODEL = "lpmflow-tiny"

LANDMARKS = {
    "cat": {"left eye": (173.0, 106.0), "right eye": (316.0, 131.0), "nose": (264.0, 243.0)},
    "raccoon": {"left eye": (161.0, 184.0), "right eye": (264.0, 202.0), "nose": (191.0, 287.0)},
}
"""Points (x, y) in pixels of the bundled photographs, marked by hand; left and right as the viewer sees them."""


def photograph(name: str) -> Path:
    """The path of a bundled photograph, "cat" or "raccoon"; their licences are in assets/LICENSES.md."""
    if name not in LANDMARKS:
        raise ValueError(f"name must be one of {', '.join(LANDMARKS)}, got {name!r}")
    return ASSETS / f"{name}.jpg"


def known_warp(size: tuple[int, int]) -> NDArray[np.float64]:
    """The demo's homography (3, 3), source pixel -> target pixel, for images of `size` (height, width).

    A turn by 8 degrees about the centre, 1.3 times larger, slightly tilted. Every pixel of a target of the same size
    shows a part of the source, so nothing has to be invented at the border.
    """
    height, width = size
    centre = np.array([[1, 0, (width - 1) / 2], [0, 1, (height - 1) / 2], [0, 0, 1]])
    cos, sin = 1.3 * np.cos(np.radians(8)), 1.3 * np.sin(np.radians(8))
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0.15 / width, 0.1 / height, 1]])
    return np.asarray(centre @ turn @ np.linalg.inv(centre))


def move(points: NDArray[np.float64], homography: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (..., 2) as (x, y), moved by a homography."""
    moved = points @ homography[:, :2].T + homography[:, 2]
    return np.asarray(moved[..., :2] / moved[..., 2:])


def run(
    output: str | os.PathLike[str] = "lpmflow-demo", *, model: str = MODEL, say: Callable[[str], object] = print
) -> list[Path]:
    """Run both matches, write the pictures into the folder `output` (made if absent) and return their paths.

    `say` is called with each line of the account. Raises OSError when the folder cannot be written, and what
    `lpmflow.Matcher` raises when the model cannot be had.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)

    from lpmflow.matcher import Matcher

    start = time.perf_counter()
    matcher = Matcher(model=model, device="cpu")
    say(f"loaded {model} on the CPU in {time.perf_counter() - start:.2f} s")
    files = _known_warp(matcher, folder, say) + _two_faces(matcher, folder, say)
    say("")
    for path in files:
        say(f"wrote {path}")
    say("")
    say("the same from Python, with your own photographs in place of these:")
    cat, raccoon = str(photograph("cat")), str(photograph("raccoon"))
    say(f"  import lpmflow; print(lpmflow.match({cat!r}, {raccoon!r}).transfer([(173, 106)]))")
    return files


def true_flow(size: tuple[int, int], homography: NDArray[Any]) -> NDArray[np.float64]:
    """The flow (H, W, 2) of a homography on a grid of `size` (height, width), in pixels."""
    pixels = _pixels(size)
    return move(pixels, homography) - pixels


def warped(image: NDArray[np.uint8], homography: NDArray[np.float64]) -> NDArray[np.uint8]:
    """An image (H, W, 3) seen through a homography source pixel -> target pixel, on a canvas of the same size."""
    import torch

    from lpmflow.geometry import warp_image

    back = true_flow((image.shape[0], image.shape[1]), np.linalg.inv(homography))
    return warp_image(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(back)).permute(1, 2, 0).numpy()


def flow_error(flow: NDArray[Any], homography: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance in pixels between a flow (H, W, 2) and the true one, for source pixels that stay inside the frame."""
    height, width = flow.shape[:2]
    true = true_flow((height, width), homography)
    places = true + _pixels((height, width))
    inside = ((places >= -0.5) & (places <= (width - 0.5, height - 0.5))).all(axis=-1)
    return np.asarray(np.linalg.norm(flow - true, axis=-1)[inside])


def _known_warp(matcher: Matcher, folder: Path, say: Callable[[str], object]) -> list[Path]:
    from PIL import Image

    from lpmflow.flowfile import replacing

    with Image.open(photograph("raccoon")) as file:
        source = np.array(file.convert("RGB"))
    size = (source.shape[0], source.shape[1])
    homography = known_warp(size)
    target = warped(source, homography)
    match, seconds = _timed(matcher, source, target)

    side = max(size)
    error, unmoved = flow_error(match.flow, homography), flow_error(np.zeros_like(match.flow), homography)
    say("")
    say(f"1. raccoon.jpg ({_size(size)}) against itself turned by 8 degrees, 1.3 times larger and tilted")
    say(f"   matched in {seconds:.2f} s; the {error.size} pixels that stay in the frame are off the truth by")
    say(f"   {_length(error.mean(), side)} on average and {_length(np.median(error), side)} in the median")
    say(f"   (they lie {_length(unmoved.mean(), side)} apart on average; percentages are of the longer side)")
    picture, rendered = folder / "warp.png", folder / "raccoon-warped.png"
    with replacing(rendered) as temporary:
        Image.fromarray(target).save(temporary, format="PNG")
    match.save(picture)
    return [rendered, picture]


def _two_faces(matcher: Matcher, folder: Path, say: Callable[[str], object]) -> list[Path]:
    cat, raccoon = LANDMARKS["cat"], LANDMARKS["raccoon"]
    match, seconds = _timed(matcher, photograph("cat"), photograph("raccoon"))
    side = max(match.tgt_size)
    moved = match.transfer(list(cat.values()))
    say("")
    say(f"2. cat.jpg ({_size(match.src_size)}) against raccoon.jpg ({_size(match.tgt_size)})")
    say(f"   matched in {seconds:.2f} s; three points of the cat and where they land, against points marked by hand:")
    for name, (u, v) in zip(cat, moved, strict=True):
        distance = np.hypot(u - raccoon[name][0], v - raccoon[name][1])
        say(f"   {name:<9} {cat[name][0]:g},{cat[name][1]:g} -> {u:.1f},{v:.1f}, off by {_length(distance, side)}")
    picture = folder / "faces.png"
    match.save(picture)
    return [picture]


def _pixels(size: tuple[int, int]) -> NDArray[np.float64]:
    """(H, W, 2): the coordinates (x, y) of every pixel."""
    return np.stack(np.meshgrid(np.arange(size[1]), np.arange(size[0])), axis=-1).astype(np.float64)


def _timed(matcher: Matcher, source: Any, target: Any) -> tuple[Match, float]:
    """The match, its full-size flow made, and the seconds that took."""
    start = time.perf_counter()
    match = matcher(source, target)
    _ = match.flow
    return match, time.perf_counter() - start


def _length(distance: float, side: int) -> str:
    return f"{distance:.1f} px ({100 * distance / side:.1f} %)"


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
