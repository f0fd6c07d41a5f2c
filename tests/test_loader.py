"""Pairs with their photographs: pixels and points together, flips, the photographs kept, workers, what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from lpmflow.data import KeypointPair, loader
from lpmflow.data.loader import PairDataset, collate
from lpmflow.images import load_image, load_pixels

pytestmark = pytest.mark.usefixtures("one_thread")


def dotted(file: Path, size: tuple[int, int], points: np.ndarray) -> Path:
    """A black photograph with a white pixel at each of the points."""
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    pixels[points[:, 1].astype(int), points[:, 0].astype(int)] = 255
    Image.fromarray(pixels).save(file)
    return file


SOURCE = np.array([[3.0, 4.0], [17, 2], [0, 19]])
TARGET = np.array([[30.0, 1.0], [2, 9], [39, 0]])


@pytest.fixture
def pair(tmp_path: Path) -> KeypointPair:
    source = dotted(tmp_path / "a.png", (20, 30), SOURCE)
    target = dotted(tmp_path / "b.png", (10, 40), TARGET)
    return KeypointPair("one", "cat", source, target, SOURCE, TARGET)


def changed(pair: KeypointPair, **fields: Any) -> KeypointPair:
    kept = {name: getattr(pair, name) for name in ("source", "target", "source_points", "target_points")}
    return KeypointPair(pair.name, pair.category, **{**kept, **fields})


def lit(image: torch.Tensor, points: torch.Tensor) -> list[int]:
    """The value of the pixel at each point, which must be whole."""
    assert torch.equal(points, points.round())
    return [int(image[0, int(y), int(x)]) for x, y in points.tolist()]


@pytest.mark.parametrize("flip", [False, True])
def test_as_stored(pair: KeypointPair, flip: bool) -> None:
    (sample,) = PairDataset([changed(pair, flip=flip)])
    assert sample.number == 0
    assert (sample.source.shape, sample.target.shape) == ((3, 20, 30), (3, 10, 40))
    assert sample.source.dtype == torch.uint8 and sample.source_points.dtype == torch.float32
    for image, points in ((sample.source, sample.source_points), (sample.target, sample.target_points)):
        assert lit(image, points) == [255, 255, 255] and int((image[0] == 255).sum()) == 3
    wanted = SOURCE if not flip else np.array([[26, 4], [12, 2], [29, 19]])
    assert sample.source_points.tolist() == wanted.tolist()


@pytest.mark.parametrize("flip", [False, True])
def test_points_follow_the_photograph(pair: KeypointPair, flip: bool) -> None:
    """Shrunk to a half, a white pixel is gray, and holds the point a quarter of a pixel from its centre."""
    (sample,) = PairDataset([changed(pair, flip=flip)], (10, 15))
    inside = sample.source_points - sample.source_points.round()
    assert inside.abs().max() == 0.25
    assert sample.source.shape == (3, 10, 15)
    for x, y in sample.source_points.round().long().tolist():
        around = sample.source[0, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        assert sample.source[0, y, x] == around.amax() > 0


@pytest.mark.parametrize("size", [(1, 1), (17, 97), (10, 40), (256, 192)])
def test_squashed_as_the_network_is_given_it(pair: KeypointPair, size: tuple[int, int]) -> None:
    (sample,) = PairDataset([pair], size)
    for name in ("source", "target"):
        image = load_image(getattr(pair, name))[None]
        wanted = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)[0]
        assert (getattr(sample, name) / 255 - wanted).abs().max() <= 0.5 / 255 + 1e-6
    height, width = size
    scale = np.array([width / 40, height / 10])
    np.testing.assert_allclose(sample.target_points.numpy(), (TARGET + 0.5) * scale - 0.5, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1, 2, -1, -3])
def test_any_index(pair: KeypointPair, index: int) -> None:
    pairs = PairDataset([pair] * 3)
    assert len(pairs) == 3 and pairs[index].number == index % 3
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            pairs[beyond]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read: list[Path] = []

    def counted(path: Path, name: str) -> torch.Tensor:
        read.append(path)
        return load_pixels(path, name)

    monkeypatch.setattr(loader, "load_pixels", counted)
    return read


@pytest.mark.parametrize("size", [None, (8, 8)])
def test_photographs_are_decoded_once(
    pair: KeypointPair, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] | None
) -> None:
    read = count_reads(monkeypatch)
    pairs = PairDataset([pair, changed(pair, flip=True), pair], size)
    first = [pairs[index] for index in range(3)]
    again = [pairs[index] for index in range(3)]
    assert sorted(read) == [pair.source, pair.target]
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(one[field], other[field]) for field in range(1, 5))
    assert torch.equal(first[0].source.flip(2), first[1].source)


@pytest.mark.parametrize("flip", [False, True])
def test_what_is_given_away_may_be_changed(pair: KeypointPair, flip: bool) -> None:
    pairs = PairDataset([changed(pair, flip=flip)])
    first = pairs[0]
    kept = first.source.clone()
    first.source.zero_()
    first.source_points.zero_()
    assert torch.equal(pairs[0].source, kept) and pairs[0].source_points.abs().max() > 0
    assert pair.source_points.tolist() == SOURCE.tolist()


def test_nothing_is_kept_where_nothing_may_be(pair: KeypointPair, monkeypatch: pytest.MonkeyPatch) -> None:
    read = count_reads(monkeypatch)
    pairs = PairDataset([pair], cache_bytes=0)
    assert torch.equal(pairs[0].source, pairs[0].source) and len(read) == 4


def test_the_longest_unused_goes_first(pair: KeypointPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two photographs of 20 x 30: the third takes the place of the one that was not used again."""
    read = count_reads(monkeypatch)
    files = [dotted(tmp_path / f"{n}.png", (20, 30), SOURCE) for n in range(3)]
    same = [changed(pair, source=file, target=file, target_points=SOURCE) for file in files]
    pairs = PairDataset(same, cache_bytes=2 * 3 * 20 * 30)
    for index in (0, 1, 0, 2, 0, 1):
        pairs[index]
    assert [files.index(path) for path in read] == [0, 1, 2, 1]
    assert pairs._cache is not None and pairs._cache.bytes == 2 * 3 * 20 * 30


def test_memory_bounds_what_is_kept(pair: KeypointPair, monkeypatch: pytest.MonkeyPatch) -> None:
    read = count_reads(monkeypatch)
    monkeypatch.setattr(loader, "_share_of_free_memory", lambda: 3 * 20 * 30)  # the source, and no more
    pairs = PairDataset([pair])
    pairs[0], pairs[0]
    assert sorted(read) == [pair.source, pair.source, pair.target, pair.target]  # 10 x 40 takes the place of 20 x 30


def test_a_quarter_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < loader.free_memory() <= 1 << 62
    monkeypatch.setattr(loader, "free_memory", lambda: 4000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert loader._share_of_free_memory() == 1000
    workers = type("Info", (), {"num_workers": 5})
    monkeypatch.setattr(loader, "get_worker_info", lambda: workers)
    assert loader._share_of_free_memory() == 200
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loader._share_of_free_memory() == 50


@pytest.mark.parametrize("workers", [0, 1])
def test_through_a_data_loader(pair: KeypointPair, workers: int) -> None:
    pairs = PairDataset([pair, changed(pair, source_points=SOURCE[:1], target_points=TARGET[:1]), pair], (16, 24))
    expected = [pairs[index] for index in range(3)]
    # a process with threads that forks is warned by newer Pythons; where workers are spawned, all must be picklable
    context = "spawn" if workers else None
    loaded = DataLoader(pairs, 2, num_workers=workers, multiprocessing_context=context, collate_fn=collate)
    batches = list(loaded)
    assert [batch.number.tolist() for batch in batches] == [[0, 1], [2]]
    assert batches[0].source.shape == (2, 3, 16, 24) and batches[0].source.dtype == torch.uint8
    assert [len(points) for points in batches[0].target_points] == [3, 1]
    for batch in batches:
        for place, number in enumerate(batch.number.tolist()):
            for field in ("source", "target", "source_points", "target_points"):
                assert torch.equal(getattr(batch, field)[place], getattr(expected[number], field))


def test_a_pickled_data_set_leaves_its_photographs_behind(pair: KeypointPair) -> None:
    pairs = PairDataset([pair], (8, 8))
    sample = pairs[0]
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy._cache is None and pairs._cache is not None
    assert torch.equal(copy[0].source, sample.source)


def test_photographs_of_several_sizes_are_no_batch(pair: KeypointPair, tmp_path: Path) -> None:
    other = changed(pair, source=dotted(tmp_path / "c.png", (25, 30), SOURCE))
    samples = list(PairDataset([pair, other]))
    with pytest.raises(ValueError, match=r"got source images of \(20, 30\), \(25, 30\): give PairDataset a size"):
        collate(samples)
    with pytest.raises(ValueError, match="samples must be at least one"):
        collate([])


def test_pairs_without_points(pair: KeypointPair) -> None:
    none = np.empty((0, 2))
    batch = collate(list(PairDataset([changed(pair, source_points=none, target_points=none)], (8, 8))))
    assert batch.source_points[0].shape == (0, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": (0, 5)}, r"size must be \(height, width\) or one number, whole ones of at least 1, got \(0, 5\)"),
        ({"size": "a"}, "size must be .*, got 'a'"),
        ({"size": 2.5}, "size must be .*, got 2.5"),
        ({"size": (1, 2, 3)}, r"size must be .*, got \(1, 2, 3\)"),
        ({"cache_bytes": -1}, "cache_bytes"),
    ],
)
def test_wrong_options(pair: KeypointPair, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairDataset([pair], **given)


def test_one_number_is_a_square(pair: KeypointPair) -> None:
    (sample,) = PairDataset([pair], 8)
    assert sample.source.shape == sample.target.shape == (3, 8, 8)
    assert torch.equal(sample.source, PairDataset([pair], (8, 8))[0].source)


def test_what_a_pair_and_its_photograph_disagree_about(pair: KeypointPair) -> None:
    with pytest.raises(ValueError, match=r"b\.png, one: must be 40 x 11, the size it was marked at, got 40 x 10$"):
        PairDataset([changed(pair, target_size=(11, 40))])[0]
    with pytest.raises(ValueError, match=r"a\.png, one: source_points\[0\] must lie in the photograph of 30 x 20, or"):
        PairDataset([changed(pair, source_points=SOURCE + (0, 30))])[0]
    pair.source.unlink()
    with pytest.raises(FileNotFoundError, match=r"^one: source must be .*, but there is no file .*a\.png"):
        PairDataset([pair])[0]
    pair.target.write_text("no photograph")
    pair.source.symlink_to(dotted(pair.target.parent / "c.png", (20, 30), SOURCE))
    with pytest.raises(OSError, match=r"^one: target must be an image file, but Pillow cannot identify .*b\.png"):
        PairDataset([pair])[0]


def test_the_stored_pairs(shared: Path) -> None:
    from lpmflow.data import load_pairs

    pairs = load_pairs("spair", shared / "data" / "pairs", "val")
    for batch in DataLoader(PairDataset(pairs, (64, 48)), batch_size=32, collate_fn=collate):
        for points in (*batch.source_points, *batch.target_points):
            assert (points >= -0.5).all() and (points <= torch.tensor([47.5, 63.5])).all()
