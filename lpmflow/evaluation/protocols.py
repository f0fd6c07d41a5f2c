"""Protocols by name: what a PCK figure of this field means, which differs from paper to paper.

A transferred keypoint is correct when its distance to the marked one is at most alpha * R. A `Protocol` says the rest:
which photograph is matched to which, what R is, in which frame distances are measured, whether the border counts, how
the model is shown the photographs, and whether keypoints are rounded before they are transferred. Figures under two
protocols cannot be compared; both averages are always given.

Points are (x, y), sizes (height, width), as in `lpmflow.geometry`. A squashed frame scales x by side / width and y by
side / height, as released codes do, without the half pixel of `lpmflow.geometry`; distances are the same either way.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lpmflow.evaluation.pck import box_extent

if TYPE_CHECKING:
    from lpmflow.data.pairs import KeypointPair

Size = tuple[int, int]
Points = NDArray[np.float64]

FORWARD, BACKWARD = "source to target", "target to source"
EXTENTS = {
    "source box": "the longer side of the source object's box",
    "target box": "the longer side of the target object's box",
    "image": "the longer side of the image",
    "points": "the longer side of the box around the marked points",
    "padded points": "the longer side of the box around the marked points and (-1, -1)",
}
GEOMETRIES = {
    "squash": "the model sees each photograph squashed to its input size",
    "pad": "the model sees each photograph in the middle of a black square",
}


@dataclass(frozen=True)
class Protocol:
    """How predicted points are judged. ValueError when a field is none of the words stated."""

    name: str
    direction: str
    """`FORWARD`: source keypoints are transferred, and judged in the target. `BACKWARD`: the other way round."""
    extent: str
    """R, one of `EXTENTS`, measured in the frame of the photograph it is of; points and image are those judged in."""
    frame: int | None
    """Side of the square both photographs are squashed to before anything is measured; None: original pixels."""
    geometry: str = "squash"
    """How the model is shown the photographs, one of `GEOMETRIES`."""
    strict: bool = False
    """True: a distance of exactly alpha * R is wrong (<); False: it is right (<=)."""
    truncate: bool = False
    """True: keypoints are truncated to whole pixels of the frame, and moved into it, before they are transferred."""
    alphas: tuple[float, ...] = (0.05, 0.1, 0.15)

    def __post_init__(self) -> None:
        allowed = {"direction": (FORWARD, BACKWARD), "extent": tuple(EXTENTS), "geometry": tuple(GEOMETRIES)}
        for field, words in allowed.items():
            if getattr(self, field) not in words:
                raise ValueError(f"{field} must be one of {', '.join(words)}, got {getattr(self, field)!r}")
        if self.frame is not None and self.frame < 1:
            raise ValueError(f"frame must be at least 1, got {self.frame}")
        if self.truncate and self.frame is None:
            raise ValueError("truncate needs a frame, whose pixels points are truncated to")

    @property
    def rule(self) -> str:
        """The protocol in one line, for reports."""
        compared = "<" if self.strict else "<="
        frame = "in original pixels" if self.frame is None else f"both images squashed to {self.frame} x {self.frame}"
        rounded = ", keypoints truncated to whole pixels first" if self.truncate else ""
        shown = "" if self.geometry == "squash" else f"; {GEOMETRIES[self.geometry]}"
        return f"{self.direction}, distance {compared} alpha x {EXTENTS[self.extent]}, {frame}{rounded}{shown}"

    def as_dict(self) -> dict[str, Any]:
        """The fields and the rule as plain values, for files."""
        return {**asdict(self), "rule": self.rule}

    def start(self, pair: KeypointPair) -> Points:
        """(N, 2): the points of `pair` that are transferred."""
        return pair.source_points if self.direction == FORWARD else pair.target_points

    def truth(self, pair: KeypointPair) -> Points:
        """(N, 2): where they should land."""
        return pair.target_points if self.direction == FORWARD else pair.source_points

    def queries(self, points: ArrayLike, size: Size) -> Points:
        """The points (N, 2) of a photograph of `size` that the model is asked for, in its pixels, inside its border.

        Marked points lie beyond the border here and there and are moved onto it. With `truncate` they are whole pixels
        of the frame.
        """
        given = np.asarray(points, dtype=np.float64)
        if not self.truncate:
            return given.clip(-0.5, (size[1] - 0.5, size[0] - 0.5))
        assert self.frame is not None
        scale = self.scale(size)
        # float32 as there: a point that falls on a whole pixel must fall on the same side of it
        pixels = np.trunc(given.astype(np.float32) * scale.astype(np.float32)).astype(np.float64)
        pixels = pixels.clip(0, self.frame - 1)
        return (pixels + 0.5) / scale - 0.5

    def scale(self, size: Size) -> NDArray[np.float64]:
        """(2,): what x and y of a photograph of `size` are multiplied by to be in the frame."""
        if self.frame is None:
            return np.ones(2)
        return np.array([self.frame / size[1], self.frame / size[0]])

    def reference(self, pair: KeypointPair, source_size: Size, target_size: Size) -> float:
        """R for `pair`, whose photographs have these sizes, in the frame; ValueError when it has no such thing."""
        judged_size = target_size if self.direction == FORWARD else source_size
        if self.extent in ("source box", "target box"):
            box = pair.source_box if self.extent == "source box" else pair.target_box
            if box is None:
                raise ValueError(
                    f"protocol {self.name!r} needs pairs with a {self.extent}, which {pair.name!r} has not"
                )
            size = source_size if self.extent == "source box" else target_size
            return box_extent(np.asarray(box, dtype=np.float64) * np.tile(self.scale(size), 2))
        if self.extent == "image":
            return float(max(self.scale(judged_size) * (judged_size[1], judged_size[0])))
        marked = self.truth(pair) * self.scale(judged_size)
        if self.extent == "padded points":
            marked = np.concatenate((marked, [[-1.0, -1.0]]))
        extent = float(np.ptp(marked, axis=0).max(initial=0)) if len(marked) else 0.0
        if not extent > 0:
            raise ValueError(f"protocol {self.name!r} needs marked points that lie apart, which {pair.name!r} has not")
        return extent

    def misses(self, pair: KeypointPair, landed: ArrayLike, source_size: Size, target_size: Size) -> Points:
        """(N, N): distance of predicted point i to marked point j over R; the diagonal is what PCK looks at.

        `landed` (N, 2) is where the model put the `queries`, in original pixels; NaN is a miss. Raises ValueError when
        there are not as many of them as marked points, and what `reference` raises.
        """
        predicted, marked = np.asarray(landed, dtype=np.float64), self.truth(pair)
        if predicted.shape != marked.shape:
            raise ValueError(f"landed must have shape {marked.shape} for pair {pair.name!r}, got {predicted.shape}")
        scale = self.scale(target_size if self.direction == FORWARD else source_size)
        # The codes that truncate call pixel k of their frame k, but scale marked points without the half pixel.
        ours = (predicted + 0.5) * scale - 0.5 if self.truncate else predicted * scale
        distances = np.hypot(*(ours[:, None] - (marked * scale)[None]).transpose(2, 0, 1))
        return np.asarray(distances / self.reference(pair, source_size, target_size))


SPAIR = Protocol("spair", FORWARD, "target box", None, alphas=(0.01, 0.05, 0.1, 0.15))
"""The authors of SPair-71k: source to target, R = max(w, h) of the target box, original pixels, <=, mean over pairs."""

LPMFLOW = Protocol("lpmflow", FORWARD, "source box", 512, truncate=True, alphas=(0.01, 0.05, 0.1, 0.15))
"""LPMFlow's and ACTR's released code: source to target, R = max(w, h) of the *source* box although the error is in the
target, both images squashed to 512 x 512, <=, keypoints truncated to whole pixels of 512, mean over pairs."""

CATS = Protocol("cats", BACKWARD, "source box", 256, truncate=True, alphas=(0.01, 0.05, 0.1, 0.15))
"""CATs' released code: *target to source*, R = max(w, h) of the source box, both images squashed to 256 x 256, <=,
keypoints truncated to whole pixels of 256, mean over pairs."""

CATS_512 = Protocol("cats-512", BACKWARD, "source box", 512, truncate=True, alphas=(0.01, 0.05, 0.1, 0.15))
"""The same at 512 x 512, as CATs++ and CATs at its larger size: *target to source*, R = max(w, h) of the source box,
both images squashed to 512 x 512, <=, keypoints truncated to whole pixels of 512, mean over pairs."""

DIFT = Protocol("dift", FORWARD, "target box", None, alphas=(0.01, 0.05, 0.1, 0.15))
"""DIFT: source to target, R = max(w, h) of the target box, original pixels, <=, image and point average both quoted."""

GEOAWARE = Protocol("geoaware", FORWARD, "target box", None, geometry="pad", strict=True, alphas=(0.01, 0.05, 0.1))
"""SD-DINO, GeoAware-SC and followers: source to target, R = max(w, h) of the target box, the photographs with their
aspect kept in a padded square (which changes what the model sees, not distance over R), <, mean over pairs. Their "per
point" figure, points within a category weighted by how many it has, is the average over all points."""

PF_PASCAL = Protocol("pf-pascal", FORWARD, "image", 512)
"""PF-PASCAL, "img": source to target, R = the longer side of the squashed image, which is 512, <=, mean over pairs."""

PF_WILLOW = Protocol("pf-willow", FORWARD, "points", 512)
"""PF-WILLOW, "bbox-kp": source to target, R = the larger extent of the target's marked points, both images squashed to
512 x 512, <=, mean over pairs."""

PF_WILLOW_BBOX = Protocol("pf-willow-bbox", FORWARD, "padded points", 512)
"""PF-WILLOW, "bbox", as many released codes compute it: the lists of points are padded with -1 and the extent includes
the padding, so that R is the largest coordinate plus 1. Figures are higher than under `PF_WILLOW`: for the embedded
weights by 4.5, 7.7 and 8.6 points at 0.05, 0.1 and 0.15."""

_ALL = (SPAIR, LPMFLOW, CATS, CATS_512, DIFT, GEOAWARE, PF_PASCAL, PF_WILLOW, PF_WILLOW_BBOX)
PROTOCOLS = {one.name: one for one in _ALL}

DEFAULTS = {"spair": "spair", "pf-pascal": "pf-pascal", "pf-willow": "pf-willow", "ap-10k": "geoaware"}
"""Data set -> the protocol most papers use on it."""


def protocol(name: str) -> Protocol:
    """The protocol called `name`; ValueError when it is none of `PROTOCOLS`."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]
