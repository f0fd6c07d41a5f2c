"""Colours with known values, the choice of points, and figures that stay out of pyplot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lpmflow.result import Match
from lpmflow.visualize import (
    choose_points,
    color_wheel,
    correspondence_figure,
    flow_to_color,
    match_figure,
    overlay,
    prediction_figure,
)


def make(source_size=(60, 80), target_size=(70, 50), shift=(0.0, 0.0), foreground=None, confidence=None) -> Match:
    rng = np.random.default_rng(0)
    return Match(
        rng.integers(0, 256, (*source_size, 3), dtype=np.uint8),
        rng.integers(0, 256, (*target_size, 3), dtype=np.uint8),
        np.broadcast_to(np.array(shift, np.float32)[:, None, None], (2, 16, 16)).copy(),
        np.full((8, 8), 0.5, np.float32) if confidence is None else confidence,
        np.full((4, 4), 0.5, np.float32) if foreground is None else foreground,
    )


def test_the_wheel_has_middleburys_55_colours():
    wheel = color_wheel()
    assert wheel.shape == (55, 3) and wheel.min() == 0 and wheel.max() == 1
    corners = wheel[[0, 15, 21, 25, 36, 49]]
    np.testing.assert_array_equal(corners, [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]])
    steps = np.abs(np.diff(wheel, axis=0, append=wheel[:1]))
    assert ((steps > 0).sum(axis=1) == 1).all()


def test_flow_colours():
    flow = np.array([[[0, 0], [1, 0], [-1, 0], [0.5, 0], [2, 0]]])
    colors = flow_to_color(flow, 1.0)
    assert colors.dtype == np.uint8
    np.testing.assert_array_equal(colors[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(colors[0, 1], [255, 0, 0])
    np.testing.assert_array_equal(colors[0, 3], [255, 128, 128])
    np.testing.assert_array_equal(colors[0, 4], [191, 0, 0])
    red, green, blue = colors[0, 2]
    assert red == 0 and min(green, blue) > 190
    np.testing.assert_array_equal(flow_to_color(flow), flow_to_color(flow, 2.0))
    np.testing.assert_array_equal(flow_to_color(np.zeros((2, 2, 2))), np.full((2, 2, 3), 255))


def test_flow_colours_are_continuous_around_the_circle():
    angle = np.linspace(-np.pi, np.pi, 2000)
    colors = flow_to_color(np.stack((np.cos(angle), np.sin(angle)), axis=-1)[None], 1.001)[0].astype(int)
    assert np.abs(np.diff(colors, axis=0)).max() <= 3
    assert np.abs(colors[0] - colors[-1]).max() <= 3


def test_flows_that_have_no_colour():
    with pytest.raises(ValueError, match=r"flow must have shape \(H, W, 2\), got \(2, 4, 4\)"):
        flow_to_color(np.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match="flow must be finite"):
        flow_to_color(np.full((1, 1, 2), np.nan))
    for longest in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="longest must be positive"):
            flow_to_color(np.zeros((1, 1, 2)), longest)


def test_overlay_shows_both_the_value_and_the_image():
    image = np.zeros((2, 2, 3), np.uint8)
    image[1] = 255
    found = overlay(image, [[0, 1], [0, 1]], "gray").astype(int)
    assert found.shape == (2, 2, 3)
    assert (found[:, 1] > found[:, 0]).all()
    assert (found[1] > found[0]).any()
    with pytest.raises(ValueError, match=r"values must have the image's shape \(2, 2\), got \(3, 2\)"):
        overlay(image, np.zeros((3, 2)))


def test_points_are_apart_and_land_in_the_target():
    match = make(shift=(4, 0))
    points = choose_points(match)
    assert 6 <= len(points) <= 12
    moved = match.transfer(points)
    assert (moved >= 0).all() and (moved <= (49, 69)).all()
    apart = np.abs((points[:, None] - points[None]) / (80, 60)).max(axis=2) + np.eye(len(points))
    assert apart.min() > 0.09


def test_points_prefer_confident_foreground():
    foreground = np.zeros((4, 4), np.float32)
    foreground[:, :2] = 1
    confidence = np.zeros((8, 8), np.float32)
    confidence[:4] = 1
    x, y = choose_points(make(foreground=foreground, confidence=confidence), 3).T
    assert (x < 45).all() and (y < 35).all()


def test_no_points_where_nothing_lands_in_the_target():
    match = make(shift=(500, 0))
    assert choose_points(match).shape == (0, 2)
    assert len(match_figure(match).axes) == 6


@pytest.mark.parametrize("source", [(60, 80), (80, 60), (1, 1), (1, 300), (300, 1), (700, 900)])
def test_the_match_figure_can_be_drawn(source):
    figure = match_figure(make(source_size=source, shift=(0.2, -0.1)))
    figure.canvas.draw()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:2] == [f"source, {source[1]} x {source[0]}", "target, 50 x 70"]
    assert titles[2].startswith("target in the source frame") and titles[3].startswith("flow, longest ")
    assert titles[4] == "confidence, 0.50 to 0.50" and titles[5] == "foreground weight"
    for axes in figure.axes[:6]:
        assert max(axes.images[0].get_array().shape) <= 640


def test_the_figure_reports_the_longest_displacement():
    """A shift of 4 of 16 cells to the right is a quarter of the image, whatever the sizes."""
    assert match_figure(make(shift=(4, 0))).axes[3].get_title(loc="left") == "flow, longest 25 % of the image"


def test_correspondence_figure_draws_each_line_once():
    from matplotlib.patches import ConnectionPatch

    match = make()
    points = np.array([[1.0, 2.0], [30.0, 40.0], [70.0, 20.0]])
    figure = correspondence_figure(match.source, match.target, points, match.transfer(points))
    lines = [artist for artist in figure.artists + figure.patches if isinstance(artist, ConnectionPatch)]
    ends = sorted((tuple(line.xy1), tuple(line.xy2)) for line in lines)
    assert ends == sorted((tuple(p), tuple(q)) for p, q in zip(points, match.transfer(points), strict=True))
    figure.canvas.draw()


def test_points_of_ones_own_are_drawn_with_their_numbers():
    """An image of 2000 x 1000 is drawn at half the size and less, and the points with it, in the order given."""
    match = make(source_size=(1000, 2000), shift=(0, 0))
    points = [(1600.0, 900.0), (100.0, 100.0)]
    figure = match_figure(match, points)
    figure.canvas.draw()
    lines = [artist for artist in figure.artists if type(artist).__name__ == "ConnectionPatch"]
    scale = 640 / 2000
    starts = {tuple(np.round((np.array(point) + 0.5) * scale - 0.5, 6)) for point in points}
    assert {tuple(np.round(line.xy1, 6)) for line in lines} == starts and len(lines) == 2
    assert [text.get_text() for text in figure.texts] == ["2", "2", "1", "1"]  # downwards
    for index, wanted, size in ((0, points, scale), (1, match.transfer(points), 1)):
        for number, point in enumerate(wanted, 1):
            found = figure.texts[2 * (2 - number) + index].get_position()
            np.testing.assert_allclose(found, (np.array(point) + 0.5) * size - 0.5, atol=1e-6)
    assert not match_figure(match).texts


def test_a_point_that_lands_outside_is_hollow_at_the_border():
    match = make(shift=(500, 0))
    figure = match_figure(match, np.array([[3, 4]]))
    dots = [artist for artist in figure.artists if type(artist).__name__ == "Line2D"]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, True]
    assert dots[1].get_xdata()[0] == 49.5
    with pytest.raises(ValueError, match=r"points\[0\] must lie inside the source image"):
        match_figure(match, [(-3, 4)])
    assert not match_figure(match, []).artists


def test_pyplot_is_never_imported():
    program = """
import sys, numpy as np
from lpmflow.result import Match
image = np.zeros((8, 8, 3), np.uint8)
grid = np.ones((4, 4), np.float32)
match = Match(image, image, np.zeros((2, 4, 4), np.float32), grid, grid)
assert "matplotlib" not in sys.modules
match.plot().canvas.draw()
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parent.parent)


def test_predictions_are_drawn_with_what_is_right() -> None:
    """A blue line for what is right, a red one for what is wrong, none for a point without an answer."""
    image, other = np.zeros((60, 80, 3), np.uint8), np.zeros((70, 50, 3), np.uint8)
    points, moved = [(5, 5), (70, 50), (30, 30)], [(6, 6), (400, -90), (np.nan, 0)]
    figure = prediction_figure(
        image, other, points, moved, [(6, 6), (40, 40), (9, 9)], [True, False, False], title="it", reach=(4, 2)
    )
    lines = [artist for artist in figure.artists if type(artist).__name__ == "ConnectionPatch"]
    assert [line.get_edgecolor()[2] > 0.5 for line in lines] == [True, False]
    left, right = figure.axes
    assert left.get_xlim() == (-0.5, 79.5) and right.get_ylim() == (69.5, -0.5)  # whatever lies outside
    for axes in (left, right):
        assert [text.get_text() for text in axes.texts] == ["1", "2", "3"]
    assert [(*patch.center, patch.width, patch.height) for patch in right.patches] == [
        (6, 6, 8, 4),
        (40, 40, 8, 4),
        (9, 9, 8, 4),
    ]
    signs = [text.get_text() for text in figure.legends[0].get_texts()]
    assert signs == ["predicted, right", "predicted, wrong", "marked, and what is near enough", "error"]
    assert figure.texts[0].get_text() == "it" and left.get_title(loc="left") == "source"


def test_predictions_that_do_not_fit() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"points, moved and marked must have shape \(N, 2\) and right \(N,\), got "):
        prediction_figure(image, image, [(1, 1)], [(1, 1)], [(1, 1)], [True, False])
