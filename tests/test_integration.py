"""MMFI: flow in hand-made numbers, correlations of known matches, and the order of the refinement's parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lpmflow.config import lpmflow_tiny
from lpmflow.model.integration import FlowIntegration

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"image_size": (16, 32), "windows": (4, 3, 2), "refine_width": 12, "refine_heads": 2, "refine_dropout": 0.5}
"""Grids: 1x2 coarse, 2x4 fine, 8x16 flow; 12 channels are 8 of flows and 4 of context, or 4 and 8."""


def integration(width=6, **options):
    torch.manual_seed(0)
    return FlowIntegration(lpmflow_tiny().replace(**{"cross_scale": True, **OPTIONS, **options}), width).eval()


def coordinates():
    """(2, 2, 4) the mapping of each cell to itself: x and y from -1 to 1."""
    return torch.stack((torch.linspace(-1, 1, 4).expand(2, 4), torch.tensor([[-1.0], [1.0]]).expand(2, 4)))


# Mappings to flow


def test_each_cell_mapped_to_itself_does_not_move():
    flow = integration().to_flow(coordinates()[None, None])
    assert flow.shape == (1, 1, 2, 8, 16)
    torch.testing.assert_close(flow, torch.zeros_like(flow), rtol=0, atol=1e-6)


def test_flow_in_hand_made_numbers():
    """All cells mapped to one third of the way along x and half way along y: cell (x, y) = (1, 1/2)."""
    mapping = torch.tensor([-1 / 3, 0.0])[:, None, None].expand(1, 1, 2, 2, 4)
    flow = integration().to_flow(mapping)[0, 0]
    by_cell = torch.tensor([[[4.0, 0.0, -4.0, -8.0]] * 2, [[2.0] * 4, [-2.0] * 4]])
    torch.testing.assert_close(flow[:, ::4, ::4], by_cell)
    for row in range(8):
        for column in range(16):
            assert torch.equal(flow[:, row, column], flow[:, row // 4 * 4, column // 4 * 4])


def test_flow_of_every_pair_and_scale():
    mappings = torch.randn(2, 3, 2, 2, 4, dtype=torch.float64)
    flow = integration().to_flow(mappings)
    assert flow.shape == (2, 3, 2, 8, 16) and flow.dtype == torch.float64
    for b, s, row, column in ((0, 0, 0, 0), (1, 2, 7, 13), (0, 1, 4, 15), (1, 0, 3, 8)):
        x, y = mappings[b, s, :, row // 4, column // 4].tolist()
        wanted = [4 * ((x + 1) * 3 / 2 - column // 4), 4 * ((y + 1) / 2 - row // 4)]
        assert flow[b, s, :, row, column].tolist() == pytest.approx(wanted)


# Correlations to mappings


def peaked(sources, targets, match):
    """(1, sources, targets) a correlation in which source cell i has all its weight on match(i)."""
    corr = torch.zeros(1, sources, targets)
    for i in range(sources):
        corr[0, i, match(i)] = 8.0
    return corr


def test_known_matches_of_all_scales():
    layer = integration()
    corrs = (
        peaked(2, 2, lambda i: 1 - i),  # coarse: the two columns change places
        peaked(2, 8, lambda i: 5),  # all to row 1, column 1
        peaked(8, 2, lambda i: 0),
        peaked(8, 8, lambda i: 7 - i),  # fine: turned by 180 degrees
    )
    fused = layer.fuse(corrs)
    assert fused.mapping.shape == (1, 4, 2, 2, 4) and fused.confidence.shape == (1, 4, 2, 4)
    x = fused.mapping[0, :, 0].detach()
    assert x[0, 0, 0] > 0.9 and x[0, 0, 3] < -0.9 and (x[0, 0, :2] > 0).all() and (x[0, 0, 2:] < 0).all()
    torch.testing.assert_close(x[1], torch.full((2, 4), -1 / 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(fused.mapping[0, 1, 1].detach(), torch.ones(2, 4), rtol=0, atol=1e-5)
    assert (x[2] < -0.9).all()
    torch.testing.assert_close(fused.mapping[0, 3].detach(), -coordinates(), rtol=0, atol=1e-5)
    torch.testing.assert_close(fused.confidence[0, [1, 3]], torch.ones(2, 2, 4), rtol=0, atol=1e-5)


def test_two_scales_without_cross_scale():
    layer = integration(cross_scale=False)
    fused = layer.fuse((peaked(2, 2, lambda i: i), peaked(8, 8, lambda i: i)))
    assert fused.mapping.shape == (1, 2, 2, 2, 4)
    torch.testing.assert_close(fused.mapping[0, 1].detach(), coordinates(), rtol=0, atol=1e-5)


def test_the_temperature_divides_the_correlation():
    layer = integration(cross_scale=False, temperature=0.5)
    corr = torch.rand(1, 8, 8)
    fused = layer.fuse((torch.rand(1, 2, 2), corr))
    probabilities = (2 * corr).exp() / (2 * corr).exp().sum(dim=2, keepdim=True)
    torch.testing.assert_close(fused.confidence[0, 1].flatten(), probabilities.amax(dim=2)[0])
    wanted = torch.einsum("ij,cj->ci", probabilities[0], coordinates().flatten(1))
    torch.testing.assert_close(fused.mapping[0, 1].detach().flatten(1), wanted)


def test_the_coordinate_tables_are_trained_and_used():
    layer = integration()
    torch.testing.assert_close(layer.x_normal.data, torch.linspace(-1, 1, 4))
    torch.testing.assert_close(layer.y_normal.data, torch.tensor([-1.0, 1.0]))
    with torch.no_grad():
        layer.x_normal.copy_(torch.tensor([0.0, 10.0, 20.0, 30.0]))
        layer.y_normal.copy_(torch.tensor([5.0, 7.0]))
    corrs = (torch.rand(1, 2, 2), torch.rand(1, 2, 8), torch.rand(1, 8, 2), peaked(8, 8, lambda i: 6))
    mapping = layer.fuse(corrs).mapping
    torch.testing.assert_close(mapping[0, 3].detach(), torch.tensor([20.0, 7.0])[:, None, None].expand(2, 2, 4))
    mapping.sum().backward()
    assert layer.x_normal.grad.ne(0).all() and layer.y_normal.grad.ne(0).all()


# Refinement


class Plus(nn.Module):
    """In place of a stage: adds a number, and keeps what it saw."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x):
        self.seen = x
        return x + self.number, x, x


class Open(nn.Module):
    """In place of a gate: lets the map through."""

    def forward(self, x, mean, highest):
        return x


def stubbed(layer, numbers=(1.0, 10.0, 100.0)):
    layer.stages = nn.ModuleList(Plus(number) for number in numbers)
    layer.gates = nn.ModuleList(Open() for _ in numbers)
    return layer


def stretched(maps, height, width):
    """(B, C, h, w) resized bilinearly so that the corner cells stay in the corners."""
    for axis, length in ((2, height), (3, width)):
        last = maps.shape[axis] - 1
        out = []
        for index in range(length):
            place = index * last / (length - 1)
            low = min(int(place), last)
            after = maps.select(axis, min(low + 1, last))
            out.append((1 - place + low) * maps.select(axis, low) + (place - low) * after)
        maps = torch.stack(out, dim=axis)
    return maps


@pytest.mark.parametrize(("cross_scale", "scales", "context"), [(True, 4, 4), (False, 2, 8)])
def test_the_parts_are_flow_11_context_and_the_other_flows(cross_scale, scales, context):
    layer = stubbed(integration(cross_scale=cross_scale))
    flows, source = torch.randn(2, scales, 2, 8, 16), torch.randn(2, 9, 6)
    layer.refine(flows, source)
    x = layer.stages[0].seen.permute(0, 3, 1, 2)
    assert x.shape == (2, 12, 8, 16)
    assert torch.equal(x[:, :2], flows[:, 0])
    assert torch.equal(x[:, 2 + context :], flows[:, 1:].flatten(1, 2))
    patches = source[:, 1:].reshape(2, 2, 4, 6)
    maps = (patches @ layer.context.weight[:, :, 0, 0].T + layer.context.bias).clamp(min=0).permute(0, 3, 1, 2)
    torch.testing.assert_close(x[:, 2 : 2 + context], stretched(maps, 8, 16), rtol=1e-4, atol=1e-5)


def test_stages_follow_each_other_and_their_results_are_added_up():
    """z, z + 1, z + 11, z + 111: the head sees 3 z + 123; here it lets channels 0 and 10 through."""
    layer = stubbed(integration())
    with torch.no_grad():
        for conv in (layer.head_hidden, layer.head_out):
            conv.weight.zero_()
            conv.bias.zero_()
        for hidden, channel in enumerate((0, 10)):
            layer.head_hidden.weight[hidden, channel, 1, 1] = 1
            layer.head_out.weight[hidden, hidden, 1, 1] = 2
    flows, source = torch.rand(2, 4, 2, 8, 16), torch.randn(2, 9, 6)
    wanted = 2 * (3 * torch.stack((flows[:, 0, 0], flows[:, 3, 0]), dim=1) + 123)
    torch.testing.assert_close(layer.refine(flows, source), wanted)


def test_the_head_is_two_convolutions_of_three_by_three():
    layer = integration()
    assert layer.head_hidden.weight.shape == (32, 12, 3, 3) and layer.head_out.weight.shape == (2, 32, 3, 3)
    with torch.no_grad():
        layer.head_out.weight.normal_()
    layer = stubbed(layer)
    wide = layer.refine(torch.randn(1, 4, 2, 8, 16), torch.randn(1, 9, 6))
    assert wide.shape == (1, 2, 8, 16) and wide.isfinite().all()


def test_windows_choose_the_stages():
    layer = integration(windows=(5, 2))
    assert [stage.window for stage in layer.stages] == [5, 2] and len(layer.gates) == 2
    assert [len(stage.bias_table) for stage in layer.stages] == [81, 9]


def test_a_fresh_refinement_changes_nothing_but_learns():
    layer = integration().train()
    refined = layer.refine(torch.randn(2, 4, 2, 8, 16), torch.randn(2, 9, 6))
    assert not refined.any()
    (refined * torch.randn_like(refined)).sum().backward()
    assert layer.head_out.weight.grad.any() and layer.head_out.bias.grad.ne(0).all()


def test_context_drops_out_by_whole_maps_while_training_only():
    layer = stubbed(integration())
    flows, source = torch.randn(8, 4, 2, 8, 16), torch.randn(8, 9, 6)
    nn.init.constant_(layer.context.bias, 5.0)
    layer.refine(flows, source)
    kept = layer.stages[0].seen[..., 2:6]
    assert (kept > 0).all()
    layer.train().refine(flows, source)
    x = layer.stages[0].seen
    assert torch.equal(x[..., :2], flows[:, 0].permute(0, 2, 3, 1))
    dropped = (x[..., 2:6] == 0).flatten(1, 2)
    assert torch.equal(dropped.any(dim=1), dropped.all(dim=1))
    assert dropped.any() and not dropped.all()
    torch.testing.assert_close(x[..., 2:6], torch.where(x[..., 2:6] == 0, 0, 2 * kept))
