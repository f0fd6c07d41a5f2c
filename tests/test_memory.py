"""What a match takes, and the sentences when it is too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lpmflow
from lpmflow import memory
from lpmflow.config import lpmflow_base, lpmflow_tiny


def test_bytes_by_hand() -> None:
    """7 maps of 48 channels on 96 x 96 cells and two photographs of 192 x 192, float32; 16 times that at 768."""
    small = 4 * (7 * 48 * 96 * 96 + 6 * 192 * 192)
    assert memory.matching_bytes(lpmflow_tiny()) == small
    assert memory.matching_bytes(lpmflow_tiny().replace(image_size=768)) == 16 * small


def test_free_memory_is_some() -> None:
    assert 0 < memory.free_bytes(torch.device("cpu")) == pytest.approx(memory.free_bytes(), rel=0.5)


def test_a_size_that_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = memory.matching_bytes(lpmflow_base())
    monkeypatch.setattr(memory, "free_memory", lambda: wanted)
    memory.require_room(lpmflow_base(), torch.device("cpu"))
    monkeypatch.setattr(memory, "free_memory", lambda: wanted - 1)
    with pytest.raises(ValueError, match="^image_size must be smaller, got 256 x 256: .* are free on cpu$"):
        memory.require_room(lpmflow_base(), torch.device("cpu"))


@pytest.mark.parametrize(
    "make",
    [
        lambda size: lpmflow.Matcher(device="cpu", image_size=size),
        lambda size: lpmflow.create_model("lpmflow-tiny", image_size=size),
        lambda size: lpmflow.create_model("lpmflow-tiny", pretrained=True, image_size=size),
    ],
)
def test_a_huge_image_size_is_refused_in_one_sentence(make: Any) -> None:
    """6,250 x 6,250 cells: 7 maps of 48 channels on 50,000 x 50,000 cells, 3.3e12 bytes."""
    with pytest.raises(ValueError) as refused:
        make(100_000)
    said = str(refused.value)
    assert said.startswith("image_size must be smaller, got 100000 x 100000: a pair takes 3,352.8 GiB or more")
    assert said.endswith(" GiB are free here")


def test_an_allocator_that_fails_is_explained(make_fake_model: Any, photo: Any) -> None:
    matcher = lpmflow.Matcher(make_fake_model(), "cpu")

    def fails(*args: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    matcher.model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="^cpu has too little memory for 1 pair at image_size 192 x 192; a smaller "):
        matcher(photo, photo)
    with pytest.raises(RuntimeError, match="for 2 pairs at .*; a smaller batch_size or image_size takes less$"):
        matcher.batch([(photo, photo)] * 2)


def test_another_failure_passes_through() -> None:
    with pytest.raises(RuntimeError, match="^shapes$"), memory.explained(1, (8, 8), torch.device("cpu")):
        raise RuntimeError("shapes")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="^model must be the path of a checkpoint file, but '.*' is a folder$"):
        lpmflow.Matcher(tmp_path, "cpu")
