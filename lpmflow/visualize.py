"""Pictures of matches: arrays and matplotlib figures, returned and never shown.

Figures are made without pyplot, so no window, global state or display is involved. Images are (H, W, 3) uint8 arrays,
points and flows are (x, y) as in `lpmflow.geometry`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lpmflow import geometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lpmflow.result import Match

_SIDE = 640
"""Longest side of an image in a figure, in pixels."""
_INK = "#1c2430"
_RIGHT, _WRONG = "#1f6fd6", "#d62728"
_WIDTH, _MARGIN, _GAP, _TITLE = 12.0, 0.25, 0.2, 0.3
"""Inches: of the figure, around it, between panels, and above each for its title."""

_SEGMENTS = ((15, 0, 1, True), (6, 1, 0, False), (4, 1, 2, True), (11, 2, 1, False), (13, 2, 0, True), (6, 0, 2, False))
"""The colour wheel's arcs: number of colours, the channel that is full, the one that moves, whether it rises."""


def color_wheel() -> NDArray[np.float64]:
    """The 55 colours of the Middlebury flow wheel, (55, 3) in [0, 1]: red, yellow, green, cyan, blue, magenta."""
    arcs = []
    for count, full, moving, rises in _SEGMENTS:
        ramp = np.arange(count) / count
        arc = np.zeros((count, 3))
        arc[:, full] = 1
        arc[:, moving] = ramp if rises else 1 - ramp
        arcs.append(arc)
    return np.concatenate(arcs)


def flow_to_color(flow: ArrayLike, longest: float | None = None) -> NDArray[np.uint8]:
    """A flow (H, W, 2) as Middlebury colours (H, W, 3) uint8: the hue is the direction, the saturation the length.

    Zero is white, right is red, down yellow, left cyan, up violet; `longest` is the length that gets full colour
    (None: the flow's longest), beyond it colours are darker. The wheel is closed here, so that there is no edge between
    directions just above and just below "right". Raises ValueError when the shape is another, a
    number is not finite, or `longest` is not positive.
    """
    array = np.asarray(flow, dtype=np.float64)
    if array.ndim != 3 or array.shape[2] != 2:
        raise ValueError(f"flow must have shape (H, W, 2), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("flow must be finite, got NaN or infinity")
    length = np.hypot(array[..., 0], array[..., 1])
    if longest is None:
        longest = float(length.max(initial=0)) or 1.0
    if not longest > 0:
        raise ValueError(f"longest must be positive, got {longest}")
    wheel = color_wheel()
    turn = np.arctan2(array[..., 1], array[..., 0]) / (2 * np.pi) * len(wheel)
    first = np.floor(turn).astype(int)
    part = (turn - first)[..., None]
    hue = (1 - part) * wheel[first % len(wheel)] + part * wheel[(first + 1) % len(wheel)]
    saturation = (length / longest)[..., None]
    colors = np.where(saturation <= 1, 1 - saturation * (1 - hue), hue * 0.75)
    return np.round(255 * colors).astype(np.uint8)


def overlay(image: NDArray[np.uint8], values: ArrayLike, colormap: str = "viridis") -> NDArray[np.uint8]:
    """`values` (H, W) in [0, 1] as colours over the gray `image` (H, W, 3): (H, W, 3) uint8.

    `colormap` is one of matplotlib's. Raises ValueError when the sizes differ.
    """
    from matplotlib import colormaps

    array = np.asarray(values, dtype=np.float64)
    if array.shape != image.shape[:2]:
        raise ValueError(f"values must have the image's shape {image.shape[:2]}, got {array.shape}")
    gray = (image @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    colors = colormaps[colormap](array)[..., :3]
    return np.round(255 * np.clip(colors * (0.55 + 0.45 * gray) + 0.22 * gray, 0, 1)).astype(np.uint8)


def choose_points(match: Match, count: int = 12) -> NDArray[np.float64]:
    """Up to `count` source points (n, 2) worth drawing: confident, in the foreground, apart, landing in the target.

    The best of a regular lattice by confidence times foreground weight, each at a distance from those before it.
    """
    (height, width), (target_height, target_width) = match.src_size, match.tgt_size
    x, y = ((np.arange(24) + 0.5) * side / 24 - 0.5 for side in (width, height))
    lattice = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    landing = match.transfer(lattice)
    inside = ((landing >= 0) & (landing <= (target_width - 1, target_height - 1))).all(axis=1)
    lattice = lattice[inside]
    weights = torch.from_numpy(np.stack((match.confidence, match.foreground)))
    score = geometry.sample_image(weights, torch.from_numpy(lattice)).prod(dim=1).numpy()
    apart = 0.7 / max(count, 1) ** 0.5
    chosen: list[NDArray[np.float64]] = []
    for point in lattice[np.argsort(-score, kind="stable")]:
        if len(chosen) < count and all(
            np.abs((point - other) / (width, height)).max() >= apart / 2 for other in chosen
        ):
            chosen.append(point)
    return np.array(chosen).reshape(-1, 2)


def correspondence_figure(
    source: NDArray[np.uint8], target: NDArray[np.uint8], points: ArrayLike, moved: ArrayLike
) -> Figure:
    """Source and target side by side with a coloured line from each source point (N, 2) to its place in the target."""
    from matplotlib.figure import Figure

    panel = (_WIDTH - 2 * _MARGIN - _GAP) / 2
    height = panel * max(_aspect(source), _aspect(target))
    figure = Figure(figsize=(_WIDTH, height + _TITLE + 2 * _MARGIN), dpi=130, facecolor="white")
    _draw_correspondences(
        figure, source, target, np.asarray(points), np.asarray(moved), _MARGIN, height, ("source", "target")
    )
    return figure


def prediction_figure(
    source: NDArray[np.uint8],
    target: NDArray[np.uint8],
    points: ArrayLike,
    moved: ArrayLike,
    marked: ArrayLike,
    right: ArrayLike,
    *,
    title: str = "",
    sides: tuple[str, str] = ("source", "target"),
    reach: tuple[float, float] | None = None,
) -> Figure:
    """Where points (N, 2) of the source were put, `moved` (N, 2), and where they should be, `marked` (N, 2).

    Points have their numbers, from 1. A line leads from each point to its place, blue where `right` (N,) says so, else
    red; in the target a dotted line leads on to a ring at the marked place. `sides` are the panels' titles, and `reach`
    (x, y) in pixels of the target how far from a marked place is still right, drawn around it. Raises ValueError when
    shapes differ.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch, Ellipse
    from matplotlib.patheffects import Normal, Stroke

    begin, end, truth = (np.asarray(array, dtype=np.float64) for array in (points, moved, marked))
    good = np.asarray(right, dtype=bool)
    if begin.ndim != 2 or begin.shape[1] != 2 or not begin.shape == end.shape == truth.shape == (len(good), 2):
        raise ValueError(
            f"points, moved and marked must have shape (N, 2) and right (N,), got {begin.shape}, {end.shape}, "
            f"{truth.shape} and {good.shape}"
        )
    panel = (_WIDTH - 2 * _MARGIN - _GAP) / 2
    height = panel * max(_aspect(source), _aspect(target))
    figure = Figure(figsize=(_WIDTH, height + 3 * _TITLE + 2 * _MARGIN), dpi=110, facecolor="white")
    figure.text(0.5, 1 - _MARGIN / figure.get_figheight(), title, ha="center", va="top", fontsize=11, color=_INK)
    left = _axes(figure, _MARGIN, _MARGIN + _TITLE, panel, height, sides[0])
    beside = _axes(figure, _MARGIN + panel + _GAP, _MARGIN + _TITLE, panel, height, sides[1])
    left.imshow(source)
    beside.imshow(target)
    halo = [Stroke(linewidth=3.4, foreground="white", alpha=0.9), Normal()]
    for number, (start, place, mark, ok) in enumerate(zip(begin, end, truth, good, strict=True), 1):
        color = _RIGHT if ok else _WRONG
        _draw_dot(figure, left, start, color)
        beside.plot(*mark, "o", color="none", markersize=9, markeredgecolor=color, markeredgewidth=2, clip_on=False,
                    path_effects=halo)  # fmt: skip
        if reach is not None:
            beside.add_patch(Ellipse(mark, 2 * reach[0], 2 * reach[1], fill=False, color="white", linewidth=0.8))
        _write_number(left, start, number, color, -1)
        _write_number(beside, mark, number, color, 1)
        if not np.isfinite(place).all():
            continue
        line = ConnectionPatch(start, place, "data", "data", axesA=left, axesB=beside, color=color, linewidth=1.2)
        line.set_path_effects(halo)
        figure.add_artist(line)
        beside.plot(*zip(place, mark, strict=True), ":", color=color, linewidth=1.6, clip_on=False, path_effects=halo)
        _draw_dot(figure, beside, place, color)
    _write_legend(figure, reach is not None)
    for axes, image in ((left, source), (beside, target)):
        axes.set_xlim(-0.5, image.shape[1] - 0.5)  # what lies outside must not shrink the photograph
        axes.set_ylim(image.shape[0] - 0.5, -0.5)
    return figure


def _draw_dot(figure: Figure, axes: Axes, place: NDArray[np.float64], color: str) -> None:
    """A dot of the figure and not of the panel, because the lines are the figure's and would cover it."""
    from matplotlib.lines import Line2D

    dot = Line2D([place[0]], [place[1]], color=color, marker="o", markersize=7, transform=axes.transData, zorder=5)
    dot.set(markeredgecolor="white", markeredgewidth=1.2)
    figure.add_artist(dot)


def _write_number(axes: Axes, place: NDArray[np.float64], number: int, color: str, side: int) -> None:
    """A point's number beside it, to the left (-1) or right (1)."""
    from matplotlib.patheffects import Normal, Stroke

    effects = [Stroke(linewidth=2.5, foreground="white"), Normal()]
    alignment: Literal["left", "right"] = "right" if side < 0 else "left"
    axes.annotate(
        str(number), (place[0], place[1]), xytext=(7 * side, 0), textcoords="offset points", ha=alignment, va="center",
        fontsize=9, fontweight="bold", color=color, path_effects=effects, annotation_clip=False,
    )  # fmt: skip


def _write_legend(figure: Figure, reach: bool) -> None:
    """What the signs of `prediction_figure` say, in one line at its foot."""
    from matplotlib.lines import Line2D

    dot: dict[str, Any] = {"marker": "o", "linewidth": 1.2}
    ring: dict[str, Any] = {"marker": "o", "linestyle": "", "markerfacecolor": "none"}
    signs = {
        "predicted, right": Line2D([], [], color=_RIGHT, **dot),
        "predicted, wrong": Line2D([], [], color=_WRONG, **dot),
        "marked" + (", and what is near enough" if reach else ""): Line2D([], [], color=_INK, **ring),
        "error": Line2D([], [], color=_INK, linestyle=":", linewidth=1.6),
    }
    figure.legend(
        list(signs.values()),
        list(signs),
        loc="lower center",
        ncols=len(signs),
        frameon=False,
        fontsize=9,
        borderpad=0.2,
    )


def match_figure(match: Match, points: ArrayLike | None = None) -> Figure:
    """The whole match on one figure.

    Above: both images, and lines between corresponding points, each end of a line in the same colour. The points are
    `points` (N, 2), source pixels, with their numbers from 1 at both ends, or those of `choose_points`; one that lands
    outside the target is drawn hollow at its border. Below, all in the source frame: the target pulled back by the
    flow; the flow in Middlebury colours, as displacement relative to the image with a wheel that explains them, so that
    it does not depend on the two images' sizes; the confidence, brightest where it is highest in this image; the
    foreground weight. Images longer than 640 pixels are drawn smaller. Raises what `Match.transfer` raises.
    """
    from matplotlib.figure import Figure

    landed = None if points is None else match.transfer(points)
    small = match.shrunk(_SIDE)
    panel = (_WIDTH - 2 * _MARGIN - 3 * _GAP) / 4
    low = panel * _aspect(small.source)
    high = (_WIDTH - 2 * _MARGIN - _GAP) / 2 * max(_aspect(small.source), _aspect(small.target))
    figure = Figure(figsize=(_WIDTH, high + low + 2 * _TITLE + _GAP + 2 * _MARGIN), dpi=130, facecolor="white")
    titles = (f"source, {_pixels(match.src_size)}", f"target, {_pixels(match.tgt_size)}")
    bottom = low + _TITLE + _GAP + _MARGIN
    if landed is None:
        starts = choose_points(small)
        ends = small.transfer(starts)
    else:
        starts = _resized(np.asarray(points, dtype=np.float64).reshape(-1, 2), match.src_size, small.src_size)
        ends = _resized(landed, match.tgt_size, small.tgt_size)
    numbered = landed is not None
    _draw_correspondences(figure, small.source, small.target, starts, ends, bottom, high, titles, numbered=numbered)

    flow = geometry.flow_to_pixels(torch.from_numpy(small.grid_flow), small.src_size, small.src_size).numpy()
    relative = float(np.hypot(flow[..., 0] / small.src_size[1], flow[..., 1] / small.src_size[0]).max())
    confidence = small.confidence
    panels = (
        ("target in the source frame", small.warp()),
        (f"flow, longest {100 * relative:.0f} % of the image", flow_to_color(flow)),
        (
            f"confidence, {confidence.min():.2f} to {confidence.max():.2f}",
            overlay(small.source, confidence / max(float(confidence.max()), 1e-12)),
        ),
        ("foreground weight", overlay(small.source, small.foreground, "magma")),
    )
    for index, (title, picture) in enumerate(panels):
        axes = _axes(figure, _MARGIN + index * (panel + _GAP), _MARGIN, panel, low, title)
        axes.imshow(picture, interpolation="bilinear" if max(picture.shape) > 64 else "nearest")
        if index == 1:
            _draw_wheel(axes)
    return figure


def _draw_correspondences(
    figure: Figure,
    source: NDArray[np.uint8],
    target: NDArray[np.uint8],
    points: NDArray[np.float64],
    moved: NDArray[np.float64],
    bottom: float,
    height: float,
    titles: tuple[str, str],
    *,
    numbered: bool = False,
) -> None:
    """Source and target as two panels of `height` inches, `bottom` inches above the figure's edge, with the lines."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.patches import ConnectionPatch
    from matplotlib.patheffects import Normal, Stroke
    from matplotlib.transforms import offset_copy

    panel = (_WIDTH - 2 * _MARGIN - _GAP) / 2
    left = _axes(figure, _MARGIN, bottom, panel, height, titles[0])
    right = _axes(figure, _MARGIN + panel + _GAP, bottom, panel, height, titles[1])
    left.imshow(source)
    right.imshow(target)
    halo = [Stroke(linewidth=3, foreground="white", alpha=0.75), Normal()]
    corner = np.array([target.shape[1], target.shape[0]]) - 0.5
    shown = np.clip(moved, -0.5, corner)
    for rank, number in enumerate(np.argsort(points[:, 1], kind="stable")):
        start, end = points[number], shown[number]
        color = colormaps["turbo"](0.08 + 0.87 * rank / max(len(points) - 1, 1))
        line = ConnectionPatch(start, end, "data", "data", axesA=left, axesB=right, color=color, linewidth=1.4)
        line.set_path_effects(halo)
        figure.add_artist(line)
        inside = bool((end == moved[number]).all())
        for axes, (x, y), full in ((left, start, True), (right, end, inside)):
            # Of the figure and not of the panel, because the lines are the figure's and would cover it.
            dot = Line2D([x], [y], color=color, marker="o", markersize=7, transform=axes.transData, zorder=5)
            dot.set(markeredgecolor="white" if full else color, markeredgewidth=1.3)
            dot.set_markerfacecolor(color if full else "white")
            figure.add_artist(dot)
            if numbered:
                side = -1 if axes is left else 1  # away from the line
                near = offset_copy(axes.transData, figure, 6 * side, 0, units="points")
                label = figure.text(x, y, str(number + 1), transform=near, color=color, fontsize=10, zorder=6)
                label.set(ha="right" if axes is left else "left", va="center", fontweight="bold")
                label.set_path_effects([Stroke(linewidth=2.5, foreground="white"), Normal()])


def _draw_wheel(axes: Axes) -> None:
    """A small disc in the corner: the colour of a displacement from its centre."""
    side = 96
    line = np.linspace(-1, 1, side)
    directions = np.stack(np.meshgrid(line, line), axis=-1)
    inside = np.hypot(directions[..., 0], directions[..., 1]) <= 1
    disc = np.dstack((flow_to_color(directions, 1.0), (255 * inside).astype(np.uint8)))
    corner = axes.inset_axes((0.81, 0.03, 0.17, 0.17))
    corner.imshow(disc)
    corner.set_axis_off()


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float, title: str) -> Axes:
    """A panel placed in inches, without ticks, its title small above its left corner."""
    across, up = figure.get_size_inches()
    axes = figure.add_axes((left / across, bottom / up, width / across, height / up))
    axes.set_title(title, loc="left", fontsize=9, color=_INK, pad=5)
    axes.set_anchor("N")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _resized(points: NDArray[np.float64], size: tuple[int, int], shown: tuple[int, int]) -> NDArray[np.float64]:
    """Points of an image of `size` on a copy of it of the size `shown`."""
    return geometry.pixels_to_cells(torch.from_numpy(points), size, shown).numpy()


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


def _aspect(image: NDArray[np.uint8]) -> float:
    """Height of a panel for this image over its width; within bounds, so that thin images do not make odd figures."""
    return float(np.clip(image.shape[0] / image.shape[1], 0.4, 1.2))
