"""Pictures of the worst pairs: which, at which alpha, and what an earlier run left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lpmflow.benchmark import pictures
from lpmflow.data.pairs import KeypointPair
from lpmflow.evaluation import protocol, score

SIZES = ((40, 60), (80, 50))
MARKED = np.array([(10.0, 10.0), (40.0, 60.0)])


def made_up(tmp_path: Path, name: str) -> KeypointPair:
    paths = [tmp_path / f"{side}.png" for side in ("source", "target")]
    for path, (height, width) in zip(paths, SIZES, strict=True):
        Image.new("RGB", (width, height)).save(path)
    points = np.array([(5.0, 5.0), (30.0, 20.0)])
    box = np.array([0.0, 0.0, 40.0, 30.0])
    return KeypointPair(
        name=name, category="cup", source=paths[0], target=paths[1], source_points=points, target_points=MARKED,
        source_box=box, target_box=box,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["spair", "cats-512"])
def test_the_worst_at_the_alpha_given(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, pairs = protocol(name), [made_up(tmp_path, "a"), made_up(tmp_path, "b:cup"), made_up(tmp_path, "c")]
    truth = rule.truth(pairs[0])
    landed = [truth, truth + (3.0, 0.0), np.full((2, 2), np.nan)]
    scores = score(rule, pairs, landed, [SIZES] * 3)
    seen: list[tuple[Any, dict[str, Any]]] = []
    draw = pictures.prediction_figure
    monkeypatch.setattr(pictures, "prediction_figure", lambda *a, **k: seen.append((a, k)) or draw(*a, **k))
    folder = tmp_path / "worst"
    folder.mkdir()
    mine = folder / "003-mine.png"  # a user's own
    Image.new("RGB", (4, 4)).save(mine)
    (folder / "004-text.png").write_text("no picture")
    for count, alpha in ((3, 0.05), (2, 0.1)):
        seen.clear()
        drawn = pictures.draw_worst(scores, pairs, landed, count, folder, alpha)
        assert mine.exists() and (folder / "004-text.png").exists()
        assert {*drawn} == {*folder.iterdir()} - {mine, folder / "004-text.png"}  # none is left of an earlier run
        assert [path.name for path in drawn] == ["001-c.png", "002-b_cup.png", "003-a.png"][:count]
        _, options = seen[1]
        assert f" at alpha {alpha:g} ({name}), mean error " in options["title"]
        assert "mean error" not in seen[0][1]["title"]  # without an answer there is none
        # A point is right exactly inside what is drawn around it.
        across = options["reach"][0]
        assert (seen[1][0][-1] == (across >= 3.0)).all()
    assert (folder / "001-c.png").stat().st_size > 1000
