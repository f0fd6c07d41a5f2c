"""Changes of colour and visibility: chance replaced by known numbers, then what holds whatever is drawn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lpmflow.data.photometric import occlude, recolour

pytestmark = pytest.mark.usefixtures("one_thread")

LIGHT = np.array([0.299, 0.587, 0.114])[:, None, None]


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 6, 9, generator=random(5))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`drawn(a, b)`: every uniform number is a, every normal number b."""

    def fix(uniform: float, normal: float) -> None:
        monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(_shape(shape), uniform))
        monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.full(_shape(shape), normal))

    def _shape(shape: tuple[Any, ...]) -> tuple[int, ...]:
        return tuple(shape[0]) if not isinstance(shape[0], int) else shape

    return fix


def contrast(x: np.ndarray, factor: float, offset: float) -> np.ndarray:
    return (x - x.mean()) * factor + x.mean() + offset


def test_a_plain_change_by_hand(images: Tensor, drawn: Any) -> None:
    """Everything in the middle of its range, nothing that has a chance below one half."""
    drawn(0.5, 0.0)
    found = recolour(images, random())
    for image, got in zip(images.double().numpy(), found.numpy(), strict=True):
        gray = (LIGHT * image).sum(axis=0)
        paler = (gray + 0.95 * (image - gray)).clip(1e-4, 1)
        np.testing.assert_allclose(got, contrast(paler, math.exp(-0.025), 0).clip(0, 1), atol=1e-5)


def test_another_style_by_hand(images: Tensor, drawn: Any) -> None:
    """Everything at the low end and all that has a chance: equal channels, inverted, blurred."""
    drawn(0.0, 1.0)
    found = recolour(images, random())
    for image, got in zip(images.double().numpy(), found.numpy(), strict=True):
        inverted = (1 - image.mean(axis=0)).clip(1e-4, 1) ** math.exp(-1)
        x = contrast(inverted, math.exp(-0.7), -0.12)
        blurred = np.array(
            [[x[max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3].mean() for j in range(9)] for i in range(6)]
        )
        wanted = (0.7 * x + 0.3 * blurred).clip(0, 1)
        np.testing.assert_allclose(got, np.stack([wanted] * 3), atol=1e-5)


def test_colours_stay_in_range(images: Tensor) -> None:
    many = images.repeat(100, 1, 1, 1)
    found = recolour(many, random())
    assert found.shape == many.shape and found.dtype == torch.float32
    assert found.min() == 0 and found.max() == 1  # strong contrast reaches both ends and is cut there


def test_each_image_changes_on_its_own(images: Tensor) -> None:
    before = recolour(images, random(3))
    assert torch.equal(before, recolour(images, random(3)))
    assert not torch.equal(before, recolour(images, random(4)))
    changed = images.clone()
    changed[1] = 0.5
    after = recolour(changed, random(3))
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.equal(after[1], before[1])
    same = recolour(images[:1].expand(2, -1, -1, -1), random(3))
    assert (same[0] - same[1]).abs().max() > 0.05


def test_one_in_seven_is_gray(images: Tensor) -> None:
    """A fifth loses its colours, and three in ten of those get coloured noise: 14 %."""
    gray = (recolour(images[:1].expand(1000, -1, -1, -1), random()).std(dim=1) < 1e-4).flatten(1).all(dim=1)
    assert 105 < gray.sum() < 175


def test_the_images_given_are_not_changed(images: Tensor) -> None:
    before = images.clone()
    recolour(images, random())
    occlude(images, images, (6, 9), random())
    assert torch.equal(images, before)


def test_a_blob_shows_the_other_photograph_and_nothing_else_changes() -> None:
    images, others = torch.rand(40, 3, 48, 80, generator=random(1)), torch.rand(40, 3, 7, 5, generator=random(2))
    covered, mask = occlude(images, others, (48, 80), random())
    assert mask.shape == (40, 1, 48, 80) and set(mask.unique().tolist()) == {0.0, 1.0}
    cover = F.interpolate(others, (48, 80), mode="bilinear", align_corners=False)
    assert torch.equal(covered, torch.where(mask.bool(), cover, images))


def test_half_of_the_images_are_covered_by_a_quarter_at_most() -> None:
    _, mask = occlude(torch.zeros(300, 3, 192, 192), torch.ones(300, 3, 2, 2), (192, 192), random())
    share = mask.mean(dim=(1, 2, 3))
    covered = share[share > 0]
    assert 120 < len(covered) < 180
    assert 0.2 < covered.max() < 0.26
    assert 0.11 < covered.mean() < 0.14  # uniform from none to a quarter


def test_a_blob_is_where_smooth_noise_is_highest() -> None:
    _, mask = occlude(torch.zeros(30, 3, 48, 48), torch.ones(30, 3, 2, 2), (48, 48), random(6))
    field = F.interpolate(torch.randn(30, 1, 5, 5, generator=random(6)), (48, 48), mode="bicubic", align_corners=False)
    partly = 0
    for noise, hidden in zip(field, mask.bool(), strict=True):
        if hidden.any():
            assert noise[hidden].min() > noise[~hidden].max()
            partly += 1
    assert partly > 5
