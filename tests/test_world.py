"""Two processes find what one finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from made_up_pairs import keypoints
from PIL import Image
from safetensors.numpy import load_file

from lpmflow.benchmark import World, world
from lpmflow.benchmark.world import local_device


def test_one_process() -> None:
    with world() as here:
        assert here == World(0, 1) and here.first
        assert here.gather(3) == [3] and here.same("a") == "a"
    assert local_device() is None


def test_two_processes_find_the_same_as_one(tmp_path: Path) -> None:
    """The embedded model on five pairs of noise, in batches of two and one: every figure, to the last digit."""
    random = np.random.default_rng(0)
    points = [[tuple(random.uniform(5, 90, 2)) for _ in range(6)] for _ in range(10)]
    root = keypoints(tmp_path / "data", list(zip(points[:5], points[5:], strict=True)))
    for file in sorted((root / "JPEGImages").rglob("*.png")):
        Image.fromarray(random.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(file)
    evaluate = ["-m", "lpmflow", "evaluate", "--benchmark", "spair", "--root", str(root), "--batch-size", "2"]
    evaluate += ["--protocol", "spair", "cats", "--device", "cpu", "--alpha", "0.1", "0.3", "0.6"]
    found, said = [], []
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        start = [sys.executable, *(launcher if processes > 1 else []), *evaluate]
        files = ["--json", str(tmp_path / f"{processes}.json"), "--predictions", str(tmp_path / str(processes))]
        done = subprocess.run(
            [*start, *files],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / f"{processes}.json").read_text())
        said.append(done.stdout)
        found.append({key: value for key, value in report.items() if key != "date"})
    assert found[0] == found[1] and found[0]["pairs"] == 5
    assert said[0] == said[1] and said[0].count("spair val of data") == 1
    one, two = (load_file(tmp_path / name) for name in ("1", "2"))
    assert set(one) == set(two) and all(np.array_equal(one[name], two[name]) for name in one)
    assert any(0 < row["per_point"] < 100 for row in found[0]["rows"])
