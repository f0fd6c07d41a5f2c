"""The losses: against loops over cells, hand-made distributions and the paper's numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lpmflow.training import correlation_nll, end_point_error, rptc_weight
from lpmflow.training.losses import cell_places

pytestmark = pytest.mark.usefixtures("one_thread")


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# End-point error


def test_end_point_error_is_the_mean_distance_over_labelled_cells() -> None:
    flow, label = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    label[0, :, 0, 0] = torch.tensor([3.0, 4.0])  # 5 away
    label[0, :, 1, 0] = torch.tensor([0.0, -2.0])
    flow[0, :, 1, 0] = torch.tensor([8.0, -17.0])  # 17 away
    flow[0, :, 1, 1] = 100.0  # a label of exactly (0, 0) is none
    assert end_point_error(flow, label).item() == pytest.approx((5 + 17) / 2)
    valid = torch.tensor([[[True, False], [False, True]]])
    assert end_point_error(flow, label, valid).item() == pytest.approx((5 + 100 * math.sqrt(2)) / 2)


def test_half_a_label_of_zero_is_a_label() -> None:
    label = torch.tensor([0.0, 6.0]).reshape(1, 2, 1, 1)
    assert end_point_error(torch.zeros(1, 2, 1, 1), label).item() == 6


@pytest.mark.parametrize("power", [0.5, 0.25])
def test_end_point_error_with_a_power(power: float) -> None:
    flow, label = torch.randn(2, 2, 3, 4, generator=random(1)), torch.randn(2, 2, 3, 4, generator=random(2))
    valid = torch.rand(2, 3, 4, generator=random(3)) < 0.6
    terms = [(math.hypot(*(flow - label)[b, :, i, j].tolist()) + 0.1) ** power for b, i, j in valid.nonzero().tolist()]
    assert end_point_error(flow, label, valid, power=power).item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_end_point_error_without_labels_is_zero(power: float) -> None:
    flow = torch.randn(1, 2, 3, 3, generator=random(), requires_grad=True)
    loss = end_point_error(flow, torch.zeros(1, 2, 3, 3), power=power)
    loss.backward()
    assert loss.item() == 0 and flow.grad is not None and not flow.grad.any()


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_gradient_is_finite_where_the_flow_is_right(power: float) -> None:
    label = torch.ones(1, 2, 2, 2)
    flow = label.clone().requires_grad_()
    end_point_error(flow, label, power=power).backward()
    assert flow.grad is not None and torch.isfinite(flow.grad).all()


def test_half_precision_flow_is_measured_in_float32() -> None:
    flow, label = (torch.tensor([x, 0.0], dtype=torch.bfloat16).reshape(1, 2, 1, 1) for x in (256.0, -1.0))
    assert end_point_error(flow, label).item() == 257  # no bfloat16 number


# The correlation's likelihood


def by_loop(corr: Tensor, places: Tensor, valid: Tensor, grid: tuple[int, int], heads: int) -> float:
    """Cell by cell: minus the mean over both directions of sum_t w(t) log p(t), w the bilinear weights."""
    height, width = grid
    total, count = 0.0, 0
    for b, s in valid.nonzero().tolist():
        x, y = places[b, s].tolist()
        if not (-0.5 < x < width - 0.5 and -0.5 < y < height - 0.5):
            continue
        x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
        count += 1
        for t in range(height * width):
            weight = max(0, 1 - abs(x - t % width)) * max(0, 1 - abs(y - t // width))
            over_targets = corr[b, s, t].item() / heads
            over_sources = (corr[b, s, t] / corr[b, :, t].sum()).item()
            total -= weight * (math.log(max(over_targets, 1e-8)) + math.log(max(over_sources, 1e-8))) / 2
    return total / count


@pytest.mark.parametrize("grid", [(3, 4), (1, 12), (12, 1), (2, 6)])
def test_equals_the_loop(grid: tuple[int, int]) -> None:
    heads, (height, width) = 3, grid
    corr = heads * torch.randn(2, 7, 12, generator=random(1), dtype=torch.float64).softmax(dim=2)
    size = torch.tensor([width, height])
    places = torch.rand(2, 7, 2, generator=random(2), dtype=torch.float64) * (size + 1) - 1  # some beyond the grid
    valid = torch.rand(2, 7, generator=random(3)) < 0.7
    found = correlation_nll(corr, places, valid, grid, heads).item()
    assert found == pytest.approx(by_loop(corr, places, valid, grid, heads), rel=1e-9)


def one_hot(targets: list[int], cells: int, heads: int) -> Tensor:
    return heads * torch.eye(cells)[torch.tensor(targets)][None]


CELLS = torch.stack((torch.arange(4.0).repeat(3), torch.arange(3.0).repeat_interleave(4)), dim=1)[None]  # (x, y)


def test_a_perfect_correlation_costs_nothing_and_a_wrong_one_much() -> None:
    everywhere = torch.ones(1, 12, dtype=torch.bool)
    right = correlation_nll(one_hot(list(range(12)), 12, 6), CELLS, everywhere, (3, 4), 6)
    assert right.item() == pytest.approx(0, abs=1e-6)
    wrong = correlation_nll(one_hot([*range(1, 12), 0], 12, 6), CELLS, everywhere, (3, 4), 6)
    assert wrong.item() == pytest.approx(-math.log(1e-8), rel=1e-5)
    one_wrong = correlation_nll(one_hot([1, 0, *range(2, 12)], 12, 6), CELLS, everywhere, (3, 4), 6)
    assert one_wrong.item() == pytest.approx(-math.log(1e-8) / 6, rel=1e-5)  # two of twelve


def test_a_correlation_that_knows_nothing_costs_the_logarithm_of_the_cells() -> None:
    corr = torch.full((1, 12, 12), 6 / 12)
    found = correlation_nll(corr, CELLS, torch.ones(1, 12, dtype=torch.bool), (3, 4), 6)
    assert found.item() == pytest.approx(math.log(12))


def test_between_cells_the_least_cost_is_the_entropy_of_the_weights() -> None:
    """One source cell, true a quarter to the right of cell 0 and halfway down: weights 3/8, 1/8, 3/8, 1/8."""
    place, weights = torch.tensor([[[0.25, 0.5]]]), torch.tensor([3 / 8, 1 / 8, 0.0, 3 / 8, 1 / 8, 0.0])
    entropy = -sum(2 * w * math.log(w) for w in (3 / 8, 1 / 8))
    valid = torch.ones(1, 1, dtype=torch.bool)
    # a single source takes every column whole, so that the other direction costs nothing
    assert correlation_nll(weights[None, None], place, valid, (2, 3), 1).item() == pytest.approx(entropy / 2)
    for other in ([0.25, 0.25, 0, 0.25, 0.25, 0], [0.5, 0.5, 0, 0, 0, 0], [0.3, 0.1, 0.1, 0.3, 0.1, 0.1]):
        worse = correlation_nll(torch.tensor([[other]]), place, valid, (2, 3), 1)
        assert worse.item() > entropy / 2 + 0.01


def test_places_off_the_grid_and_invalid_cells_do_not_count() -> None:
    corr = one_hot([1, 1], 2, 1) + 0.1
    places = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    alone = correlation_nll(corr, places, torch.tensor([[True, False]]), (1, 2), 1)
    for off in ([-0.5, 0.0], [1.5, 0.0], [0.0, -0.5], [0.0, 0.5], [30.0, -20.0]):
        places[0, 1] = torch.tensor(off)
        assert torch.equal(correlation_nll(corr, places, torch.ones(1, 2, dtype=torch.bool), (1, 2), 1), alone)


def test_no_valid_cell_costs_nothing_and_gradients_are_finite() -> None:
    corr = one_hot([1, 1, 0], 4, 2).requires_grad_()  # columns and entries of zero
    for valid in (torch.zeros(1, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)):
        loss = correlation_nll(corr, torch.rand(1, 3, 2, generator=random()), valid, (2, 2), 2)
        (gradient,) = torch.autograd.grad(loss, corr)
        assert torch.isfinite(gradient).all()
        assert bool(valid.any()) == (loss.item() > 0) == bool(gradient.any())


# From pixels to cells


def test_cell_places_are_the_mean_of_their_pixels() -> None:
    mapping = 30 * torch.rand(2, 6, 12, 2, generator=random(1))
    valid = torch.rand(2, 6, 12, generator=random(2)) < 0.75
    places, known = cell_places(mapping, valid, (2, 3))  # cells of 3 x 4 pixels
    for b in range(2):
        for i in range(2):
            for j in range(3):
                rows, columns = slice(3 * i, 3 * i + 3), slice(4 * j, 4 * j + 4)
                x, y = mapping[b, rows, columns].double().reshape(-1, 2).mean(dim=0).tolist()
                assert places[b, i, j].tolist() == pytest.approx([(x + 0.5) / 4 - 0.5, (y + 0.5) / 3 - 0.5], abs=1e-4)
                assert known[b, i, j] == (valid[b, rows, columns].sum() >= 9)  # of 12
    assert known.any() and not known.all()


def test_the_pixels_own_places_are_the_cells_own_places() -> None:
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    places, known = cell_places(torch.stack((x, y), dim=-1)[None], torch.ones(1, 16, 24, dtype=torch.bool), (4, 3))
    torch.testing.assert_close(places[0, ..., 0], torch.arange(3.0).expand(4, 3))
    torch.testing.assert_close(places[0, ..., 1], torch.arange(4.0)[:, None].expand(4, 3))
    assert known.all()


# RPTC


def test_the_weight_of_rptc_loses_a_tenth_of_its_start_each_epoch() -> None:
    wanted = [0.2, 0.18, 0.16, 0.14, 0.12, 0.1, 0.08, 0.06, 0.04, 0.02, 0, 0, 0]
    assert [rptc_weight(epoch) for epoch in range(13)] == pytest.approx(wanted, abs=1e-12)
    assert min(rptc_weight(epoch) for epoch in range(100)) == 0
    assert rptc_weight(3, start=1.0, decline=0.25) == 0.25
