"""Seconds that scoring takes once pairs are matched: as many made-up pairs as the test split of SPair-71k has.

`pytest benchmarks/bench_scores.py` takes some seconds. Processor time, of which one core is used.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from lpmflow.benchmark.report import keypoint_rows
from lpmflow.data import KeypointPair
from lpmflow.evaluation import protocol, score

PAIRS = 12234


def test_scores(report: Any) -> None:
    random, pairs, landed = np.random.default_rng(0), [], []
    box = np.array([0.0, 0.0, 200.0, 150.0])
    for number in range(PAIRS):
        points = random.uniform(0, 300, (int(random.integers(3, 21)), 2))
        levels = {"viewpoint": number % 3, "scale": number % 3, "truncation": number % 4, "occlusion": number % 4}
        files = Path("a"), Path("b")
        pairs.append(KeypointPair(str(number), f"{number % 18}", *files, points, points, box, box, difficulty=levels))
        landed.append(points + random.normal(0, 20, points.shape))
    start = time.process_time()
    scores = score(protocol("spair"), pairs, landed, [((375, 500), (375, 500))] * PAIRS)
    scored = time.process_time()
    rows = keypoint_rows(scores, scores.protocol.alphas)
    told = time.process_time()
    assert rows[0].pairs == PAIRS and len(rows) == 4 * (2 + 18 + 3 + 3 + 4 + 4)
    report.add(
        f"scoring {PAIRS:,} pairs, {len(scores.owners):,} points, under spair at four alphas",
        distances=f"{scored - start:.1f} s",
        tables_and_intervals=f"{told - scored:.1f} s",
    )
