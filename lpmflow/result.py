"""`Match`: what a matcher found for one pair of images, in the pixels of the two originals.

It keeps what the network said on its grids, which is small, and makes full-size arrays when they are first asked for.
Coordinates are those of `lpmflow.geometry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray

from lpmflow import flowfile, geometry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXTENSIONS = (".png", ".npz", ".flo")


@dataclass(frozen=True, eq=False, repr=False)
class Match:
    """The dense correspondence from a source image to a target image.

    Everything is numpy, on the source grid, computed once when first read and then the same array each time. The
    fields hold the two images and what the network said on its own grids; most users want the properties instead:
    `flow`, `confidence`, `foreground`, and the methods. Raises ValueError when a field has another shape than stated.
    """

    source: NDArray[np.uint8]
    """(H_src, W_src, 3), RGB."""
    target: NDArray[np.uint8]
    """(H_tgt, W_tgt, 3), RGB."""
    grid_flow: NDArray[np.float32]
    """(2, gh, gw) displacement in cells of the network's flow grid, channel 0 x and 1 y."""
    grid_confidence: NDArray[np.float32]
    """(h, w) confidence of the cells of the network's fine grid, in [0, 1]."""
    grid_foreground: NDArray[np.float32]
    """(h0, w0) foreground weight of the cells of the network's coarse grid, in [0, 1]."""

    def __post_init__(self) -> None:
        for name in ("source", "target"):
            image = getattr(self, name)
            if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype != np.uint8:
                raise ValueError(f"{name} must be (H, W, 3) uint8 with no side 0, got {image.shape} {image.dtype}")
        if self.grid_flow.ndim != 3 or self.grid_flow.shape[0] != 2 or 0 in self.grid_flow.shape:
            raise ValueError(f"grid_flow must have shape (2, gh, gw) with no side 0, got {self.grid_flow.shape}")
        for name in ("grid_confidence", "grid_foreground"):
            grid = getattr(self, name)
            if grid.ndim != 2 or 0 in grid.shape:
                raise ValueError(f"{name} must have shape (h, w) with no side 0, got {grid.shape}")

    @property
    def src_size(self) -> tuple[int, int]:
        """(height, width) of the source image in pixels."""
        return self.source.shape[0], self.source.shape[1]

    @property
    def tgt_size(self) -> tuple[int, int]:
        """(height, width) of the target image in pixels."""
        return self.target.shape[0], self.target.shape[1]

    @cached_property
    def flow(self) -> NDArray[np.float32]:
        """(H_src, W_src, 2) float32: target position minus source position, (x, y), in original pixels.

        The source pixel (x, y) is seen in the target at (x, y) + flow[y, x]. Where the images differ in size the flow
        contains that difference: matching an image with its double gives a flow that grows to the right and down.
        Nothing clips it to the target image.
        """
        return geometry.flow_to_pixels(torch.from_numpy(self.grid_flow), self.src_size, self.tgt_size).numpy()

    @cached_property
    def confidence(self) -> NDArray[np.float32]:
        """(H_src, W_src) float32 in [0, 1]: how concentrated the match of a place is.

        The finest correlation gives every source cell a probability over all target cells (the softmax of the
        correlation divided by the network's temperature). The confidence of the cell is the largest of them: 1 when a
        single target cell takes it all, 1 / (number of target cells) when none is preferred. It says how sharp the
        match is, not how often such matches are right. Between cells it is read bilinearly.
        """
        return self._resized(self.grid_confidence)

    @cached_property
    def foreground(self) -> NDArray[np.float32]:
        """(H_src, W_src) float32 in [0, 1]: the paper's foreground weight map (section 3.2).

        The cosine between each source patch and the mean of the two images' cls tokens, stretched so that the source
        image's lowest patch is 0 and its highest is 1: high on what both images show. Read bilinearly between patches.
        """
        return self._resized(self.grid_foreground)

    def transfer(self, points: ArrayLike) -> NDArray[np.float64]:
        """Source pixels (N, 2), (x, y), as target pixels (N, 2) float64; both sub-pixel.

        The flow is read bilinearly at the point itself. A result may lie outside the target image. Raises TypeError
        when the points are no numbers, ValueError when they are not (N, 2), not finite, or when one lies outside the
        source image, which covers [-0.5, W - 0.5] x [-0.5, H - 0.5].
        """
        array = _points(points)
        height, width = self.src_size
        outside = ((array < -0.5) | (array > (width - 0.5, height - 0.5))).any(axis=1)
        if outside.any():
            index = int(outside.argmax())
            x, y = array[index].tolist()
            raise ValueError(
                f"points[{index}] must lie inside the source image, x from -0.5 to {width - 0.5} and y from -0.5 to "
                f"{height - 0.5}, got ({x:g}, {y:g})"
            )
        flow = torch.from_numpy(self.grid_flow)
        return geometry.transfer(flow, torch.from_numpy(array), self.src_size, self.tgt_size).numpy()

    def warp(self) -> NDArray[np.uint8]:
        """The target image pulled back to the source frame: (H_src, W_src, 3) uint8.

        Each source pixel shows the target where the flow says it is, read bilinearly; where that is outside the
        target, the nearest border pixel. For a perfect match it looks like the source in the target's paint.
        """
        image = torch.from_numpy(self.target).permute(2, 0, 1)
        warped = geometry.warp_image(image, torch.from_numpy(self.flow))
        return np.ascontiguousarray(warped.permute(1, 2, 0).numpy())

    def plot(self, points: ArrayLike | None = None) -> Figure:
        """A matplotlib figure of the match (see `lpmflow.visualize.match_figure`); it is returned, never shown.

        `points` (N, 2) are source pixels whose lines are drawn, with their numbers from 1; None: some that the match is
        sure of. Raises what `transfer` raises.
        """
        from lpmflow.visualize import match_figure

        return match_figure(self, points)

    def save(self, path: flowfile.PathLike, points: ArrayLike | None = None) -> None:
        """Write the match to `path`, as its extension says; a file that exists is replaced, whole or not at all.

        - `.png`: the picture `plot(points)` draws;
        - `.npz`: numpy arrays `flow`, `confidence`, `foreground`, `src_size`, `tgt_size`;
        - `.flo`: the flow in the Middlebury format.

        Raises ValueError for another extension, OSError when the file cannot be written.
        """
        final = flowfile.as_path(path)
        extension = final.suffix.lower()
        if extension not in EXTENSIONS:
            raise ValueError(f"path must end in {', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}, got {str(final)!r}")
        if extension == ".flo":
            flowfile.write_flo(final, self.flow)
            return
        with flowfile.replacing(final) as temporary, open(temporary, "wb") as file:
            if extension == ".png":
                self.plot(points).savefig(file, format="png")
            else:
                np.savez_compressed(
                    file,
                    flow=self.flow,
                    confidence=self.confidence,
                    foreground=self.foreground,
                    src_size=np.array(self.src_size),
                    tgt_size=np.array(self.tgt_size),
                )

    def shrunk(self, limit: int) -> Match:
        """The same match between smaller copies of the images, no side longer than `limit` pixels; for drawing.

        An image that is small enough stays as it is.
        """
        return Match(
            _shrink(self.source, limit),
            _shrink(self.target, limit),
            self.grid_flow,
            self.grid_confidence,
            self.grid_foreground,
        )

    def __repr__(self) -> str:
        return f"Match(src_size={self.src_size}, tgt_size={self.tgt_size})"

    def _resized(self, grid: NDArray[np.float32]) -> NDArray[np.float32]:
        values = torch.from_numpy(grid)[None, None]
        resized = F.interpolate(values, self.src_size, mode="bilinear", align_corners=False)[0, 0]
        return resized.clamp_(0, 1).numpy()


def _points(points: Any) -> NDArray[np.float64]:
    if isinstance(points, torch.Tensor):
        points = points.detach().cpu()
    try:
        array = np.asarray(points)
    except (ValueError, TypeError) as error:
        raise ValueError(f"points must have shape (N, 2), one (x, y) a row: {error}") from error
    if array.dtype.kind not in "fiu":
        raise TypeError(f"points must be real numbers of shape (N, 2), got {array.dtype} from {type(points).__name__}")
    if array.shape == (0,):
        array = array.reshape(0, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"points must have shape (N, 2), one (x, y) a row, got {array.shape}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError("points must be finite, got NaN or infinity")
    return array


def _shrink(image: NDArray[np.uint8], limit: int) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    scale = limit / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    small = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)[0]
    return np.ascontiguousarray(small.permute(1, 2, 0).numpy())
