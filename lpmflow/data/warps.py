"""Warp pairs: two views of one photograph, and where every pixel of the first lies in the second, exactly.

The target is a crop c of the photograph. The source is the target seen through a smooth map m, which is the truth:

    target(q) = photo(c(q))        source(p) = photo(c(m(p)))        p in the source lies at m(p) in the target

with m an affine map, a thin-plate spline and a perspective tilt. Colours change and pieces of other photographs are
pasted over, in each view on its own. Everything is drawn for a whole batch at once, on the device of the photographs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpmflow.data.photometric import occlude, recolour

_CONTROL = 4


@dataclass(frozen=True)
class WarpRange:
    """How far a random map m may go. Lengths are in half frames: the frame is [-1, 1] wide and high."""

    rotation: float
    """Degrees, either way."""
    scale: float
    """Largest factor of the size, either way."""
    aspect: float
    """Largest factor of width against height, either way."""
    shear: float
    translation: float
    bend: float
    """Standard deviation of the 4 x 4 control points of the thin-plate spline."""
    perspective: float

    def towards(self, other: WarpRange, amount: float) -> WarpRange:
        """This range for amount 0, the other for amount 1, in between by proportion."""
        amount = min(max(amount, 0.0), 1.0)
        return WarpRange(**{name: value + amount * (vars(other)[name] - value) for name, value in vars(self).items()})


MILD = WarpRange(rotation=15, scale=1.25, aspect=1.1, shear=0.1, translation=0.15, bend=0.06, perspective=0.1)
HARD = WarpRange(rotation=25, scale=1.5, aspect=1.3, shear=0.2, translation=0.25, bend=0.11, perspective=0.2)


class WarpBatch(NamedTuple):
    """B pairs of size (H, W)."""

    source: Tensor
    """(B, 3, H, W) float32 in [0, 1]"""
    target: Tensor
    """(B, 3, H, W) float32 in [0, 1]"""
    mapping: Tensor
    """(B, H, W, 2) float32: the target pixel (x, y) of each source pixel, also where it lies outside the frame."""
    valid: Tensor
    """(B, H, W) bool: the source pixel is no occluder and is seen in the target."""


class WarpPairs:
    """Random warp pairs of `photos` (N, 3, S, S) uint8, at `size` (height, width); the same seed gives the same pairs.

    Raises ValueError when `photos` has another shape or fewer than two photographs, TypeError for another dtype.
    """

    def __init__(self, photos: Tensor, size: tuple[int, int], seed: int = 0) -> None:
        if photos.dtype != torch.uint8:
            raise TypeError(f"photos must be uint8, got {photos.dtype}")
        if photos.ndim != 4 or photos.shape[0] < 2 or photos.shape[1] != 3 or 0 in photos.shape:
            raise ValueError(f"photos must have shape (N, 3, H, W) with N at least 2, got {tuple(photos.shape)}")
        self.photos = photos
        self.size = size
        self.generator = torch.Generator(photos.device).manual_seed(seed)
        self.grid = _frame(size).to(photos.device)
        self.spline = _spline(self.grid)

    def sample(self, count: int, limits: WarpRange = HARD) -> WarpBatch:
        """`count` new pairs, their maps within `limits`."""
        photos = self._choose(count)
        mapping = self._maps(count, limits)  # (B, H W, 2), in half frames
        crop, offset = self._crops(count)
        source_places = mapping @ crop.transpose(1, 2) + offset
        target_places = self.grid @ crop.transpose(1, 2) + offset
        source, target = (self._read(photos, places) for places in (source_places, target_places))
        views = recolour(torch.cat((source, target)), self.generator)
        views, hidden = occlude(views, self._choose(2 * count), self.size, self.generator)
        source, target = views.chunk(2)
        hidden_source, hidden_target = hidden.chunk(2)
        places = mapping.unflatten(1, self.size)
        seen = F.grid_sample(hidden_target, places, align_corners=False, padding_mode="border")[:, 0] < 0.5
        inside = (places.abs() <= 1).all(dim=-1)
        pixels = (places + 1) / 2 * places.new_tensor([self.size[1], self.size[0]]) - 0.5
        return WarpBatch(source, target, pixels, inside & seen & (hidden_source[:, 0] < 0.5))

    def state(self) -> Tensor:
        """The state of the random numbers, for `set_state` to go on from."""
        return self.generator.get_state()

    def set_state(self, state: Tensor) -> None:
        """Go on where `state` was taken."""
        self.generator.set_state(state)

    def _choose(self, count: int) -> Tensor:
        index = torch.randint(len(self.photos), (count,), generator=self.generator, device=self.photos.device)
        return self.photos[index].float() / 255

    def _uniform(self, *shape: int) -> Tensor:
        """Uniform in [-1, 1]."""
        return torch.rand(*shape, generator=self.generator, device=self.photos.device) * 2 - 1

    def _maps(self, count: int, limits: WarpRange) -> Tensor:
        linear = _linear(
            angle=self._uniform(count) * math.radians(limits.rotation),
            scale=self._uniform(count) * math.log(limits.scale),
            aspect=self._uniform(count) * math.log(limits.aspect),
            shear=self._uniform(count) * limits.shear,
        )
        knots = torch.randn(count, _CONTROL**2, 2, generator=self.generator, device=self.photos.device)
        amount = torch.rand(count, 1, 1, generator=self.generator, device=self.photos.device)
        bent = self.grid + self.spline @ (knots * amount * limits.bend)
        moved = bent @ linear.transpose(1, 2)
        tilt = self._uniform(count, 1, 2) * limits.perspective
        moved = moved / (1 + (self.grid * tilt).sum(dim=-1, keepdim=True))
        return moved + self._uniform(count, 1, 2) * limits.translation

    def _crops(self, count: int) -> tuple[Tensor, Tensor]:
        """Part of the photograph the target shows: the middle of it, always inside."""
        extent = 0.78 + 0.18 * self._uniform(count, 2)
        offset = self._uniform(count, 1, 2) * (1 - extent[:, None])
        mirrored = torch.where(self._uniform(count) < 0, -1.0, 1.0)  # both views alike: no mirror images to tell apart
        extent = torch.stack((extent[:, 0] * mirrored, extent[:, 1]), dim=-1)
        return torch.diag_embed(extent), offset

    def _read(self, photos: Tensor, places: Tensor) -> Tensor:
        return F.grid_sample(photos, places.unflatten(1, self.size), align_corners=False, padding_mode="reflection")


def _linear(angle: Tensor, scale: Tensor, aspect: Tensor, shear: Tensor) -> Tensor:
    """(B, 2, 2) rotation x shear x scale; scale and aspect are logarithms."""
    cos, sin = angle.cos(), angle.sin()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
    slant = torch.stack((one, shear, zero, one), dim=-1).unflatten(-1, (2, 2))
    sizes = torch.stack(((scale + aspect / 2).exp(), (scale - aspect / 2).exp()), dim=-1)
    return turn @ slant @ torch.diag_embed(sizes)


def _frame(size: tuple[int, int]) -> Tensor:
    """(H W, 2) pixel centres (x, y) in half frames."""
    height, width = size
    y = (torch.arange(height) + 0.5) * 2 / height - 1
    x = (torch.arange(width) + 0.5) * 2 / width - 1
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


def _spline(points: Tensor) -> Tensor:
    """(points, 16): the thin-plate spline is linear in the displacements of its control points; this is its matrix."""
    line = torch.linspace(-1, 1, _CONTROL, dtype=torch.float64)
    knots = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).flatten(0, 1)
    count = len(knots)
    system = torch.zeros(count + 3, count + 3, dtype=torch.float64)
    affine = torch.cat((torch.ones(count, 1, dtype=torch.float64), knots), dim=1)
    system[:count, :count] = _radial(torch.cdist(knots, knots))
    system[:count, count:], system[count:, :count] = affine, affine.T
    weights = torch.linalg.inv(system)[:, :count]
    places = points.double().cpu()
    basis = torch.cat((_radial(torch.cdist(places, knots)), torch.ones(len(places), 1, dtype=torch.float64), places), 1)
    return (basis @ weights).to(points)


def _radial(distance: Tensor) -> Tensor:
    return torch.xlogy(distance.square(), distance)
