"""Every protocol on a pair worked out by hand, the truncating rule against its definition, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lpmflow.data import KeypointPair
from lpmflow.evaluation import PROTOCOLS, Protocol, protocol
from lpmflow.evaluation.protocols import BACKWARD, DEFAULTS, FORWARD
from lpmflow.result import Match

SOURCE_SIZE, TARGET_SIZE = (256, 512), (1024, 256)
"""(height, width): a source of 512 x 256 and a target of 256 x 1024, so that every scale to 512 is 1, 2 or a half."""


def pair(**fields: object) -> KeypointPair:
    given = {
        "source_points": np.array([[100.0, 50.0], [300.0, 200.0]]),
        "target_points": np.array([[40.0, 400.0], [100.0, 700.0]]),
        "source_box": np.array([90.0, 40.0, 310.0, 140.0]),  # 220 x 100; squashed to 512: 220 x 200
        "target_box": np.array([20.0, 300.0, 120.0, 800.0]),  # 100 x 500; squashed to 512: 200 x 250
        **fields,
    }
    return KeypointPair("000001-a-b:cup", "cup", Path("a.png"), Path("b.png"), **given)  # type: ignore[arg-type]


# The first point lands 12 to the right of the target's and 16 below, the second 3 to the left and 4 above: 20 and 5
# original pixels. Squashed to 512 x 512, where x counts double and y half: (24, 8) and (-6, -2).
FORWARDS = np.array([[52.0, 416.0], [97.0, 696.0]])
FAR, NEAR = np.hypot(24, 8), np.hypot(6, 2)


@pytest.mark.parametrize(
    ("name", "reference", "first", "second"),
    [
        ("spair", 500, 20, 5),
        ("dift", 500, 20, 5),
        ("geoaware", 500, 20, 5),
        ("pf-pascal", 512, FAR, NEAR),
        ("pf-willow", 150, FAR, NEAR),  # the points span 60 x 300: squashed 120 x 150
        ("pf-willow-bbox", 351, FAR, NEAR),  # the largest coordinate is 700 / 2, and from there to -1
    ],
)
def test_a_pair_by_hand(name: str, reference: float, first: float, second: float) -> None:
    rule = protocol(name)
    assert rule.reference(pair(), SOURCE_SIZE, TARGET_SIZE) == pytest.approx(reference, abs=1e-12)
    misses = rule.misses(pair(), FORWARDS, SOURCE_SIZE, TARGET_SIZE)
    np.testing.assert_allclose(misses.diagonal(), np.array([first, second]) / reference, rtol=1e-12)


def test_lpmflow_by_hand() -> None:
    """R is the *source* box, in the squashed source 220 x 200, and points are compared in the squashed target.

    There a prediction t is pixel (t + 0.5) * scale - 0.5, and a marked point g is g * scale: x 52 -> 104.5, not 104,
    and y 416 -> 207.75, not 208. The misses are (104.5 - 80, 207.75 - 200) and (194.5 - 200, 347.75 - 350).
    """
    rule = protocol("lpmflow")
    assert rule.reference(pair(), SOURCE_SIZE, TARGET_SIZE) == pytest.approx(220)
    misses = rule.misses(pair(), FORWARDS, SOURCE_SIZE, TARGET_SIZE).diagonal()
    np.testing.assert_allclose(misses, np.hypot([24.5, -5.5], [7.75, -2.25]) / 220, rtol=1e-12)


def test_cats_by_hand() -> None:
    """Target to source at 256 x 256, x of the source halved and y as it is: R = max(220 / 2, 100) = 110."""
    rule = protocol("cats")
    assert rule.direction == BACKWARD and rule.start(pair()) is not rule.truth(pair())
    np.testing.assert_array_equal(rule.start(pair()), [[40, 400], [100, 700]])
    assert rule.reference(pair(), SOURCE_SIZE, TARGET_SIZE) == pytest.approx(110)
    landed = np.array([[120.5, 53.0], [300.5, 190.0]])  # pixels (60, 53) and (150, 190) of 256 x 256
    misses = rule.misses(pair(), landed, SOURCE_SIZE, TARGET_SIZE).diagonal()
    np.testing.assert_allclose(misses, np.hypot([10, 0], [3, -10]) / 110, rtol=1e-12)


def test_cats_at_512_by_hand() -> None:
    """The same pair at 512 x 512: x of the source as it is and y doubled, R = max(220, 2 * 100) = 220."""
    rule = protocol("cats-512")
    assert rule.reference(pair(), SOURCE_SIZE, TARGET_SIZE) == pytest.approx(220)
    landed = np.array([[120.5, 53.0], [300.5, 190.0]])  # pixels (120.5, 106.5) and (300.5, 380.5) of 512 x 512
    misses = rule.misses(pair(), landed, SOURCE_SIZE, TARGET_SIZE).diagonal()
    np.testing.assert_allclose(misses, np.hypot([20.5, 0.5], [6.5, -19.5]) / 220, rtol=1e-12)


def test_which_photograph_is_judged() -> None:
    for rule in PROTOCOLS.values():
        forward = rule.name not in ("cats", "cats-512")
        assert rule.direction == (FORWARD if forward else BACKWARD)
        np.testing.assert_array_equal(rule.truth(pair()), pair().target_points if forward else pair().source_points)


def test_which_protocols_differ_from_the_common_rule() -> None:
    assert [rule.name for rule in PROTOCOLS.values() if rule.strict] == ["geoaware"]
    assert [rule.name for rule in PROTOCOLS.values() if rule.truncate] == ["lpmflow", "cats", "cats-512"]
    assert [rule.name for rule in PROTOCOLS.values() if rule.geometry == "pad"] == ["geoaware"]
    assert set(DEFAULTS.values()) <= set(PROTOCOLS)
    assert all(0.1 in rule.alphas and list(rule.alphas) == sorted(rule.alphas) for rule in PROTOCOLS.values())


def test_the_distance_to_every_marked_point() -> None:
    """Row i is the prediction, column j the marked point: (52, 416) is 20 from the first and hypot(48, 284) beyond."""
    misses = protocol("spair").misses(pair(), FORWARDS, SOURCE_SIZE, TARGET_SIZE) * 500
    np.testing.assert_allclose(misses, [[20, np.hypot(48, 284)], [np.hypot(57, 296), 5]], rtol=1e-12)


def test_one_point_has_an_extent_only_with_the_padding() -> None:
    lone = pair(source_points=np.array([[1.0, 2.0]]), target_points=np.array([[100.0, 700.0]]))
    assert protocol("pf-willow-bbox").reference(lone, SOURCE_SIZE, TARGET_SIZE) == 351
    with pytest.raises(ValueError, match="protocol 'pf-willow' needs marked points that lie apart, which '000001-a-b"):
        protocol("pf-willow").reference(lone, SOURCE_SIZE, TARGET_SIZE)


# Which points the model is asked for


def test_points_are_asked_for_as_they_are_and_moved_onto_the_border() -> None:
    given = [[10.25, 20.75], [-3.0, 100.0], [600.0, 300.0]]
    for name in ("spair", "geoaware", "pf-willow"):
        asked = protocol(name).queries(given, SOURCE_SIZE)
        np.testing.assert_array_equal(asked, [[10.25, 20.75], [-0.5, 100.0], [511.5, 255.5]])


def test_truncated_points_are_whole_pixels_of_the_frame() -> None:
    """x 10.9 becomes 10, y 20.75 is 41.5 and becomes 41; (-3, 300) becomes (0, 511): their centres are asked for."""
    asked = protocol("lpmflow").queries([[10.9, 20.75], [-3.0, 300.0]], SOURCE_SIZE)
    np.testing.assert_allclose(asked, [[10, 41.5 / 2 - 0.5], [0, 511.5 / 2 - 0.5]], rtol=1e-12)


@pytest.mark.parametrize("name", ["lpmflow", "cats", "cats-512"])
def test_truncation_is_the_rule_of_the_released_codes(name: str) -> None:
    """The flow is resized to the frame and read at the truncated point, which it moves."""
    rule, random = protocol(name), np.random.default_rng(3)
    sizes = {"source": (333, 500), "target": (281, 187)}
    points = {side: random.uniform(-2, 1.01, (20, 2)) * (size[1], size[0]) for side, size in sizes.items()}
    points = {side: array.clip(-5, max(sizes[side]) * 1.005) for side, array in points.items()}
    example = pair(
        source_points=points["source"], target_points=points["target"], source_box=np.array([10.0, 20.0, 210.0, 90.0])
    )
    begin, end = ("source", "target") if rule.direction == FORWARD else ("target", "source")
    flow = torch.from_numpy(random.normal(0, 9, (2, 128, 128)).astype(np.float32))

    side = rule.frame
    assert side is not None
    resized = F.interpolate(flow[None], (side, side), mode="bilinear", align_corners=False)[0] * (side / 128)

    def scaled(which: str) -> torch.Tensor:
        height, width = sizes[which]
        return torch.from_numpy(points[which]).float() * torch.tensor([side / width, side / height])

    pixels = scaled(begin).long().clamp(0, side - 1)
    moved = pixels + resized[:, pixels[:, 1], pixels[:, 0]].T
    box = np.array([10.0, 20.0, 210.0, 90.0]).reshape(2, 2) * [side / 500, side / 333]
    expected = (moved - scaled(end)).norm(dim=1).numpy() / np.ptp(box, axis=0).max()

    blank = {which: np.zeros((*size, 3), np.uint8) for which, size in sizes.items()}
    gray = np.zeros((8, 8), np.float32)
    landed = Match(blank[begin], blank[end], flow.numpy(), gray, gray).transfer(
        rule.queries(points[begin], sizes[begin])
    )
    misses = rule.misses(example, landed, sizes["source"], sizes["target"])
    np.testing.assert_allclose(misses.diagonal(), expected, rtol=2e-4, atol=1e-5)


# What is refused


@pytest.mark.parametrize(("name", "missing"), [("spair", "target_box"), ("lpmflow", "source_box")])
def test_a_pair_without_the_box_it_needs(name: str, missing: str) -> None:
    with pytest.raises(ValueError) as refused:
        protocol(name).misses(pair(**{missing: None}), FORWARDS, SOURCE_SIZE, TARGET_SIZE)
    wanted = f"protocol {name!r} needs pairs with a {missing.replace('_', ' ')}, which '000001-a-b:cup' has not"
    assert str(refused.value) == wanted


@pytest.mark.parametrize("landed", [np.zeros((3, 2)), np.zeros((2, 3)), np.zeros(2)])
def test_another_number_of_predictions(landed: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"landed must have shape \(2, 2\) for pair '000001-a-b:cup', got \("):
        protocol("spair").misses(pair(), landed, SOURCE_SIZE, TARGET_SIZE)


def test_an_unknown_protocol() -> None:
    with pytest.raises(ValueError, match="protocol must be one of spair, lpmflow, cats, .*, got 'SPair'"):
        protocol("SPair")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"direction": "there"}, "direction must be one of source to target, target to source, got 'there'"),
        ({"extent": "box"}, "extent must be one of source box, target box, image, points, padded points, got 'box'"),
        ({"geometry": "crop"}, "geometry must be one of squash, pad, got 'crop'"),
        ({"frame": 0}, "frame must be at least 1, got 0"),
        ({"truncate": True}, "truncate needs a frame, whose pixels points are truncated to"),
    ],
)
def test_a_protocol_that_makes_no_sense(fields: dict[str, object], message: str) -> None:
    given = {"direction": FORWARD, "extent": "target box", "frame": None, **fields}
    with pytest.raises(ValueError) as refused:
        Protocol("mine", **given)  # type: ignore[arg-type]
    assert str(refused.value) == message


def test_the_rule_says_what_counts() -> None:
    assert protocol("geoaware").rule == (
        "source to target, distance < alpha x the longer side of the target object's box, in original pixels; "
        "the model sees each photograph in the middle of a black square"
    )
    assert protocol("cats").rule == (
        "target to source, distance <= alpha x the longer side of the source object's box, both images squashed to "
        "256 x 256, keypoints truncated to whole pixels first"
    )
    said = protocol("cats").as_dict()
    assert said["name"] == "cats" and said["frame"] == 256 and said["rule"] == protocol("cats").rule


def test_scoring_needs_no_torch() -> None:
    program = "import sys; import lpmflow.evaluation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
