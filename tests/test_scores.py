"""Averages, tables, subsets and intervals of made-up pairs whose figures are known; and the speed of it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpmflow.data import KeypointPair, load_pairs
from lpmflow.evaluation import Scores, pck, protocol, relative_errors, score

SIZE = (300, 400)


def pair(number: int, category: str, marked: list[tuple[float, float]], **fields: object) -> KeypointPair:
    """Its target box has a longer side of 100."""
    points = np.array(marked, dtype=np.float64)
    box = np.array([0.0, 0.0, 100.0, 60.0])
    return KeypointPair(
        f"{number:06d}", category, Path("a.png"), Path("b.png"), points, points, box, box, **fields  # type: ignore[arg-type]
    )  # fmt: skip


# cat: 1 of 2 and 2 of 2 within a tenth; dog: 1 of 4
PAIRS = [
    pair(1, "cat", [(10, 10), (200, 100)], difficulty={"viewpoint": 0, "scale": 1}),
    pair(2, "dog", [(10, 10), (15, 10), (200, 100), (50, 50)], difficulty={"viewpoint": 2, "scale": 1}),
    pair(3, "cat", [(30, 30), (60, 60)], difficulty={"viewpoint": 0, "scale": 0}),
]
LANDED = [
    np.array([(20, 10), (211, 100)]),  # 10 and 11 pixels off
    np.array([(13, 10), (27, 10), (np.nan, 100), (50, 63)]),  # 3, 12, no answer and 13; the first nearer to the second
    np.array([(30, 30), (60, 54)]),  # 0 and 6
]


@pytest.fixture
def scores() -> Scores:
    return score(protocol("spair"), PAIRS, LANDED, [(SIZE, SIZE)] * 3)


def test_both_averages(scores: Scores) -> None:
    found = scores.pck(0.1)
    assert (found.alpha, found.pairs, found.points) == (0.1, 3, 8)
    assert found.per_image == pytest.approx(100 * (1 / 2 + 1 / 4 + 1) / 3)
    assert found.per_point == pytest.approx(100 * 4 / 8)
    wide = scores.pck(0.2)
    assert (wide.per_image, wide.per_point) == (pytest.approx(100 * 2.75 / 3), pytest.approx(100 * 7 / 8))


def test_the_same_as_pck_of_the_errors(scores: Scores) -> None:
    errors = [relative_errors(landed, one.target_points, 100) for one, landed in zip(PAIRS, LANDED, strict=True)]
    for alpha in (0.03, 0.1, 0.125, 0.5):
        assert scores.pck(alpha) == pck(errors, alpha)


def test_mean_errors_leave_out_what_has_no_answer(scores: Scores) -> None:
    assert scores.mean_errors() == pytest.approx([(10 + 11) / 200, (3 + 12 + 13) / 300, 6 / 200])
    none = score(protocol("spair"), [pair(1, "cat", [(10, 10)])], [[(np.nan, 10)]], [(SIZE, SIZE)])
    assert np.isnan(none.mean_errors()).all()


def test_the_border_is_outside_where_the_protocol_is_strict() -> None:
    """10 of 100 pixels, and R a power of two besides, where nothing is rounded."""
    for name, right in (("spair", 100), ("geoaware", 0)):
        one = score(protocol(name), [pair(1, "cat", [(10, 10)])], [[(20, 10)]], [(SIZE, SIZE)])
        assert one.pck(0.1).per_point == right
        assert one.pck(0.1000001).per_point == 100


def test_by_category(scores: Scores) -> None:
    table = scores.by_category(0.1)
    assert list(table) == ["cat", "dog"]
    assert (table["cat"].per_image, table["cat"].per_point, table["cat"].pairs) == (75, 75, 2)
    assert (table["dog"].per_image, table["dog"].points) == (25, 4)


def test_by_difficulty(scores: Scores) -> None:
    table = scores.by_difficulty(0.1)
    assert {name: list(levels) for name, levels in table.items()} == {"viewpoint": [0, 2], "scale": [0, 1]}
    assert (table["viewpoint"][0].per_image, table["viewpoint"][2].per_image) == (75, 25)
    assert (table["scale"][1].per_image, table["scale"][1].per_point) == (37.5, pytest.approx(100 * 2 / 6))


def test_pairs_whose_difficulty_is_not_known_are_left_out() -> None:
    some = [PAIRS[0], pair(9, "cat", [(10, 10)])]
    found = score(protocol("spair"), some, [LANDED[0], [(10, 10)]], [(SIZE, SIZE)] * 2)
    assert found.by_difficulty(0.1)["viewpoint"][0].pairs == 1
    none = score(protocol("spair"), some[1:], [[(10, 10)]], [(SIZE, SIZE)])
    assert none.by_difficulty(0.1) == {}


def test_dagger_needs_the_own_point_to_be_nearest(scores: Scores) -> None:
    """Pair 2, point 1 lands 3 from its own and 2 from the next; all other right ones are nearest to their own."""
    assert scores.pck(0.1, dagger=True).per_point == pytest.approx(100 * 3 / 8)
    assert scores.pck(0.1, dagger=True).per_image == pytest.approx(100 * (1 / 2 + 0 + 1) / 3)


def test_dagger_with_two_points_at_one_place() -> None:
    """Neither is nearer, so both can be right."""
    found = score(protocol("spair"), [pair(1, "cat", [(10, 10), (10, 10)])], [[(11, 10), (10, 12)]], [(SIZE, SIZE)])
    assert found.pck(0.1, dagger=True).per_point == 100


def test_dagger_in_a_squashed_frame_is_measured_there() -> None:
    """The own mark is nearer in original pixels (8 against 9), but squashed from 400 x 100, where y counts 4 times."""
    rule = protocol("pf-willow")
    one = pair(1, "duck", [(100, 50), (109, 58)])
    found = score(rule, [one], [[(100, 58), (109, 58)]], [((100, 400), (100, 400))])
    assert found.nearest.tolist() == [False, True]


def test_a_subset_of_points(scores: Scores) -> None:
    chosen = np.array([1, 0, 1, 1, 0, 0, 0, 0], dtype=bool)
    found = scores.pck(0.1, points=chosen)
    assert (found.pairs, found.points) == (2, 3)
    assert (found.per_image, found.per_point) == (75, pytest.approx(100 * 2 / 3))


def test_the_worst(scores: Scores) -> None:
    assert scores.worst(2) == [1, 0] and scores.worst(9) == [1, 0, 2] and scores.worst(0) == []
    assert scores.by_pair(0.1).tolist() == [0.5, 0.25, 1]


def test_the_interval_is_the_quantiles_of_resampled_pairs(scores: Scores) -> None:
    """Three pairs can be drawn in 27 ways: with 20,000 draws the quantiles are those of all of them."""
    shares, sums, counts = np.array([0.5, 0.25, 1]), np.array([1, 1, 2]), np.array([2, 4, 2])
    drawn = np.stack(np.meshgrid(*[range(3)] * 3)).reshape(3, -1)
    found = scores.interval(0.1, level=0.5, draws=20000)
    per_point = sums[drawn].sum(axis=0) / counts[drawn].sum(axis=0)
    for said, values in ((found.per_image, shares[drawn].mean(axis=0)), (found.per_point, per_point)):
        wanted = 100 * np.quantile(values, [0.25, 0.75], method="inverted_cdf")
        np.testing.assert_allclose(said, wanted, atol=1e-9)


def test_the_interval_is_the_same_for_the_same_seed() -> None:
    random = np.random.default_rng(0)
    pairs = [pair(number, "cat", [(10, 10), (50, 50)]) for number in range(200)]
    landed = [one.target_points + random.normal(0, 8, (2, 2)) for one in pairs]
    found = score(protocol("spair"), pairs, landed, [(SIZE, SIZE)] * 200)
    assert found.interval(0.1) == found.interval(0.1) != found.interval(0.1, seed=1)
    low, high = found.interval(0.1).per_image
    share = found.pck(0.1).per_image / 100
    assert low < 100 * share < high
    spread = 100 * found.by_pair(0.1).std() / np.sqrt(200)  # of a mean of 200 independent pairs
    assert 2 * 1.96 * spread == pytest.approx(high - low, rel=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"level": 1.0}, "level must lie between 0 and 1, got 1.0"), ({"draws": 0}, "draws must be at least 1, got 0")],
)
def test_an_interval_that_makes_no_sense(scores: Scores, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scores.interval(0.1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0, -0.1, np.nan])
def test_an_alpha_that_makes_no_sense(scores: Scores, alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be above 0, got "):
        scores.pck(alpha)


def test_subsets_that_make_no_sense(scores: Scores) -> None:
    with pytest.raises(ValueError, match=r"points must be bool of shape \(8,\), got bool \(3,\)"):
        scores.pck(0.1, points=np.ones(3, bool))
    with pytest.raises(ValueError, match="points must hold at least one point"):
        scores.pck(0.1, points=np.zeros(8, bool))


def test_lists_that_do_not_fit() -> None:
    rule = protocol("spair")
    with pytest.raises(ValueError, match="must be equally many, got 3, 2 and 3"):
        score(rule, PAIRS, LANDED[:2], [(SIZE, SIZE)] * 3)
    with pytest.raises(ValueError, match="pairs must hold at least one pair"):
        score(rule, [], [], [])
    with pytest.raises(ValueError, match="pair '000007' has no keypoints, which a protocol for keypoints needs"):
        empty = np.empty((0, 2))
        score(rule, [KeypointPair("000007", "cat", Path("a"), Path("b"), empty, empty)], [empty], [(SIZE, SIZE)])


def test_the_whole_test_split_of_spair_is_scored_in_seconds() -> None:
    """12,234 pairs with 7 points each, two protocols, four alphas, tables, dagger and intervals: under five seconds."""
    random = np.random.default_rng(0)
    pairs, landed = [], []
    for number in range(12234):
        points = random.uniform(0, 200, (7, 2))
        pairs.append(pair(number, f"class {number % 18}", points.tolist(), difficulty={"viewpoint": number % 3}))
        landed.append(points + random.normal(0, 8, (7, 2)))
    start = time.process_time()
    for name in ("spair", "lpmflow"):
        found = score(protocol(name), pairs, landed, [(SIZE, SIZE)] * len(pairs))
        for alpha in found.protocol.alphas:
            assert found.pck(alpha, dagger=True).per_point <= found.pck(alpha).per_point
            assert len(found.by_category(alpha)) == 18 and len(found.by_difficulty(alpha)["viewpoint"]) == 3
            found.interval(alpha)
    assert time.process_time() - start < 5


def test_pf_willow_is_what_a_few_lines_of_ones_own_say(shared: Path) -> None:
    """The 900 pairs, read, scaled and counted once more from the file: every figure, to the last digit.

    Predictions are the points at the same part of the photograph, the first half of them shaken.
    """
    root = shared / "data" / "PF-WILLOW"
    pairs = load_pairs("pf-willow", root, "test")
    noise = np.random.default_rng(5).normal(0, 12, (900, 10, 2)) * (np.arange(10) < 5)[:, None]
    opened = {}
    for path in {one.source for one in pairs} | {one.target for one in pairs}:
        with Image.open(path) as image:
            opened[path] = image.size
    landed, sizes = [], []
    for one, shake in zip(pairs, noise, strict=True):
        source, target = np.array(opened[one.source]), np.array(opened[one.target])
        landed.append(one.source_points * target / source + shake)
        sizes.append(((source[1], source[0]), (target[1], target[0])))
    shares: dict[str, list[list[float]]] = {"pf-willow": [], "pf-willow-bbox": []}
    with (root / "test_pairs.csv").open() as lines:
        next(lines)
        for line, shake in zip(lines, noise, strict=True):
            names, numbers = line.split(",")[:2], np.array(line.split(",")[2:], dtype=float)
            xa, ya, xb, yb = numbers.reshape(4, 10)
            (wa, ha), (wb, hb) = (opened[root / name.removeprefix("PF-WILLOW/")] for name in names)
            px, py = (xa * wb / wa + shake[:, 0]) * (512 / wb), (ya * hb / ha + shake[:, 1]) * (512 / hb)
            gx, gy = xb * (512 / wb), yb * (512 / hb)
            for name, extent in (
                ("pf-willow", max(gx.max() - gx.min(), gy.max() - gy.min())),
                ("pf-willow-bbox", max(gx.max() + 1, gy.max() + 1)),
            ):
                near = np.hypot(px - gx, py - gy) / extent
                shares[name].append([float((near <= alpha).mean()) for alpha in (0.05, 0.1, 0.15)])
    for name, own in shares.items():
        found = score(protocol(name), pairs, landed, sizes)
        said = [found.pck(alpha).per_image for alpha in (0.05, 0.1, 0.15)]
        assert said == [100 * float(np.mean(column)) for column in zip(*own, strict=True)] and said[0] > 5
    assert shares["pf-willow"] != shares["pf-willow-bbox"]
