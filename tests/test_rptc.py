"""RPTC: which tokens are replaced and by what, and the loss against loops, corner cells and gradients included."""

from __future__ import annotations

import math

import pytest
import torch

from lpmflow.config import lpmflow_tiny
from lpmflow.model.rptc import replace_tokens, rptc_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(batch=2, cells=20, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 1 + cells, width, generator=generator, dtype=torch.float64)


def config(top_k=8, ratio=0.25):
    return lpmflow_tiny().replace(rptc_top_k=top_k, rptc_ratio=ratio)


def foreground(source, target, top_k):
    """Token indices of the `top_k` patches most like the mean of both cls tokens, for each image."""
    chosen = []
    for own, other in zip(source.tolist(), target.tolist(), strict=True):
        g = [(a + b) / 2 for a, b in zip(own[0], other[0], strict=True)]
        cosine = [
            sum(a * b for a, b in zip(patch, g, strict=True)) / math.hypot(*patch) / math.hypot(*g) for patch in own[1:]
        ]
        chosen.append({1 + i for i in sorted(range(len(cosine)), key=lambda i: -cosine[i])[:top_k]})
    return chosen


# Replacement


def test_foreground_patches_become_the_sum_of_the_cls_tokens():
    source, target = tokens(), tokens(seed=1)
    before = source.clone()
    changed, positions = replace_tokens(source, target, config(), torch.Generator().manual_seed(0))
    assert positions.shape == (2, 2) and torch.equal(source, before)
    for b, allowed in enumerate(foreground(source, target, 8)):
        replaced = positions[b].tolist()
        assert len(set(replaced)) == 2 and set(replaced) <= allowed
        for i in range(21):
            wanted = source[b, 0] + target[b, 0] if i in replaced else source[b, i]
            assert torch.equal(changed[b, i], wanted)


def test_every_foreground_patch_has_its_turn_and_no_other():
    source, target = tokens(), tokens(seed=1)
    generator = torch.Generator().manual_seed(0)
    seen = [set(), set()]
    for _ in range(60):
        _, positions = replace_tokens(source, target, config(), generator)
        for b in range(2):
            seen[b] |= set(positions[b].tolist())
    assert seen == foreground(source, target, 8)


@pytest.mark.parametrize(
    ("top_k", "ratio", "count"), [(8, 0.25, 2), (8, 1.0, 8), (16, 0.25, 4), (64, 0.25, 5), (3, 0.25, 1), (1, 0.0, 1)]
)
def test_how_many_are_replaced(top_k, ratio, count):
    """A part of the top_k patches, of which an image of 20 cells has at most 20; at least one."""
    positions = replace_tokens(tokens(), tokens(seed=1), config(top_k, ratio))[1]
    assert positions.shape == (2, count)
    assert all(len(set(row)) == count and min(row) >= 1 and max(row) <= 20 for row in positions.tolist())


def test_sixteen_of_the_base_networks_patches():
    source, target = tokens(1, 256), tokens(1, 256, seed=1)
    assert replace_tokens(source, target, config(top_k=64))[1].shape == (1, 16)


def test_a_generator_decides():
    source, target = tokens(cells=60), tokens(cells=60, seed=1)
    draws = [replace_tokens(source, target, config(40), torch.Generator().manual_seed(seed))[1] for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_gradients_reach_the_cls_tokens_in_the_place_of_the_replaced():
    source, target = tokens().requires_grad_(), tokens(seed=1).requires_grad_()
    changed, positions = replace_tokens(source, target, config())
    changed[:, 1:].sum().backward()
    for b in range(2):
        kept = [float(i not in positions[b]) for i in range(1, 21)]
        assert source.grad[b, 1:, 0].tolist() == kept
    assert (source.grad[:, 0] == 2).all() and (target.grad[:, 0] == 2).all() and not target.grad[:, 1:].any()


def test_half_precision_keeps_its_type():
    changed, _ = replace_tokens(tokens().bfloat16(), tokens(seed=1).bfloat16(), config())
    assert changed.dtype == torch.bfloat16


# Loss


def cosine(x, y):
    return (x @ y) / (x @ x).sqrt() / (y @ y).sqrt()


def loss_by_loops(x, positions, grid, temperature):
    height, width = grid
    losses = []
    for b, row in enumerate(positions.tolist()):
        for p in row:
            r, c = divmod(p - 1, width)
            around = [
                x[b, 1 + i * width + j].detach()
                for i in range(max(r - 1, 0), min(r + 2, height))
                for j in range(max(c - 1, 0), min(c + 2, width))
                if (i, j) != (r, c)
            ]
            assert len(around) in (1, 2, 3, 5, 8)
            positive = (cosine(x[b, p], sum(around) / len(around)) / temperature).exp()
            negative = sum((cosine(x[b, p], x[b, q]) / temperature).exp() for q in row if q != p)
            losses.append(-(positive / (positive + negative)).log())
    return sum(losses) / len(losses)


CASES = [
    ((4, 5), [[1, 5, 16], [20, 8, 9]]),  # the four corners, and two inner cells side by side
    ((4, 5), [[3, 6, 13], [1, 2, 7]]),  # borders, and a corner beside its neighbours
    ((1, 5), [[1, 3], [5, 4]]),
    ((2, 2), [[1, 2, 3, 4]]),
]


@pytest.mark.parametrize("temperature", [0.1, 0.7])
@pytest.mark.parametrize(("grid", "positions"), CASES)
def test_the_loss_equals_the_loops(grid, positions, temperature):
    x, positions = tokens(len(positions), grid[0] * grid[1]), torch.tensor(positions)
    wanted = loss_by_loops(x, positions, grid, temperature)
    torch.testing.assert_close(rptc_loss(x, positions, grid, temperature), wanted)


def test_the_papers_temperature_is_a_tenth():
    x, positions = tokens(), torch.tensor([[1, 5], [7, 20]])
    torch.testing.assert_close(rptc_loss(x, positions, (4, 5)), loss_by_loops(x, positions, (4, 5), 0.1))


@pytest.mark.parametrize(("grid", "positions"), CASES)
def test_the_gradient_equals_the_loops(grid, positions):
    x, positions = tokens(len(positions), grid[0] * grid[1]).requires_grad_(), torch.tensor(positions)
    (wanted,) = torch.autograd.grad(loss_by_loops(x, positions, grid, 0.1), x)
    (found,) = torch.autograd.grad(rptc_loss(x, positions, grid, 0.1), x)
    torch.testing.assert_close(found, wanted)
    replaced = torch.zeros(found.shape[:2], dtype=torch.bool).scatter(1, positions, True)
    assert found[replaced].any(dim=1).all() and not found[~replaced].any()


def test_one_token_has_nothing_to_be_told_from():
    x = tokens().requires_grad_()
    loss = rptc_loss(x, torch.tensor([[7], [1]]), (4, 5))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


def test_extremes_stay_finite():
    x = tokens()
    x[0] = 0
    x[1] *= 1e8
    assert rptc_loss(x, torch.tensor([[1, 7], [8, 20]]), (4, 5), 0.01).isfinite()
    assert rptc_loss(tokens(1, 1), torch.tensor([[1]]), (1, 1)).isfinite()
