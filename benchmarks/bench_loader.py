"""Pairs a second from `lpmflow.data.loader`: 0, 1 and 2 workers, with and without the photographs kept.

The photographs are JPEG files made here, of the usual size and of smooth content, as photographs are; a second pass
over the same pairs is measured, when what is kept is there. `pytest benchmarks/bench_loader.py` takes half a minute.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from lpmflow.data import KeypointPair
from lpmflow.data.loader import PairDataset, collate

SIZE = (256, 256)
PHOTOGRAPHS, PAIRS = 24, 96


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[KeypointPair]:
    """96 pairs of 24 photographs of 500 x 375."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    files = []
    for number in range(PHOTOGRAPHS):
        coarse = Image.fromarray(random.integers(0, 256, (38, 50, 3), dtype=np.uint8))
        files.append(folder / f"{number}.jpg")
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    points = random.uniform((0, 0), (499, 374), (8, 2))
    chosen = random.integers(0, PHOTOGRAPHS, (PAIRS, 2)).tolist()
    return [KeypointPair(f"{n}", "x", files[a], files[b], points, points) for n, (a, b) in enumerate(chosen)]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kept", [False, True], ids=["decoded each time", "kept"])
def test_loader(pairs: list[KeypointPair], report: Any, workers: int, kept: bool) -> None:
    data = PairDataset(pairs, SIZE, cache_bytes=1 << 30 if kept else 0)
    batches = DataLoader(
        data,
        batch_size=8,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
    )
    seconds = [_pass(batches) for _ in range(2)]
    report.add(
        f"pairs of 500 x 375 JPEG photographs, squashed to {SIZE[1]} x {SIZE[0]}",
        workers=workers,
        photographs="kept" if kept else "decoded each time",
        first_pass=f"{PAIRS / seconds[0]:.0f} pairs/s",
        second_pass=f"{PAIRS / seconds[1]:.0f} pairs/s",
    )


def _pass(batches: DataLoader[Any]) -> float:
    start = time.perf_counter()
    assert sum(len(batch.number) for batch in batches) == PAIRS
    return time.perf_counter() - start
