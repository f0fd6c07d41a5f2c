"""PFSR: the matching block and the super-resolution against their formulas, and what is matched with what."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lpmflow.config import lpmflow_tiny
from lpmflow.model.superres import FeatureSuperResolution, MatchingBlock, SuperResolution, correlation

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = lpmflow_tiny().replace(image_size=(32, 48), heads=2, cross_scale=True, superres_window=3, superres_depth=2)
"""Grids of 2x3 and 4x6 cells: sequences of 7 and 25 tokens."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(module: nn.Module) -> nn.Module:
    module = module.double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=number) * 0.5)
    return module


# The matching block


def norm(layer, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def rectified(x):
    return torch.where(x > 0, (x.exp() - (-x).exp()) / (x.exp() + (-x - 4).exp()), 0)


def mlp(layer, x):
    hidden = x @ layer.fc1.weight.T + layer.fc1.bias
    return hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2 @ layer.fc2.weight.T + layer.fc2.bias


def attend(layer, queries, keys):
    """Two heads of `queries` on `keys`, and the probabilities (B, 2, N, M)."""
    width = queries.shape[-1]
    q = (queries @ layer.qkv.weight.T + layer.qkv.bias)[..., :width]
    k, v = (keys @ layer.qkv.weight.T + layer.qkv.bias)[..., width:].split(width, dim=-1)
    heads, maps = [], []
    for part in (slice(0, width // 2), slice(width // 2, width)):
        maps.append((q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width / 2)).softmax(dim=-1))
        heads.append(maps[-1] @ v[..., part])
    return torch.cat(heads, dim=-1) @ layer.proj.weight.T + layer.proj.bias, torch.stack(maps, dim=1)


def matching(block, source, target):
    names = {7: "", 25: "_fine"}
    source = source + block.get_parameter(f"position_source{names[source.shape[1]]}")
    target = target + block.get_parameter(f"position_target{names[target.shape[1]]}")
    source = source + rectified(attend(block.self_attn, norm(block.norm1, source), norm(block.norm1, source))[0])
    source = source + norm(block.norm2, source)
    target = target + rectified(attend(block.self_attn, norm(block.norm1, target), norm(block.norm1, target))[0])
    target = target + mlp(block.mlp, norm(block.norm2, target))
    attended, maps = attend(block.cross_attn, norm(block.norm1, source), norm(block.norm1, target))
    source = source + rectified(attended)
    source = source + mlp(block.mlp, norm(block.norm2, source))
    return maps.sum(dim=1)[:, 1:, 1:], source, target


@pytest.mark.parametrize(("n", "m"), [(7, 7), (7, 25), (25, 7), (25, 25)])
def test_a_matching_block_is_its_formula(n, m):
    block = randomised(MatchingBlock(CONFIG, 8, coarse=True, fine=True))
    source, target = random(2, n, 8), random(2, m, 8, seed=1)
    found, wanted = block(source, target, "11", correlation), matching(block, source, target)
    assert found[0].shape == (2, n - 1, m - 1)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_matching_block_leaves_its_inputs_alone():
    block = randomised(MatchingBlock(CONFIG, 8, coarse=True, fine=False))
    source, target = random(2, 7, 8), random(2, 7, 8, seed=1)
    block(source, target, "11", correlation)
    assert torch.equal(source, random(2, 7, 8)) and torch.equal(target, random(2, 7, 8, seed=1))


def test_a_correlation_row_sums_to_a_little_under_the_heads():
    block = randomised(MatchingBlock(CONFIG, 8, coarse=True, fine=True))
    rows = block(random(2, 7, 8), random(2, 25, 8, seed=1), "12", correlation)[0].sum(dim=-1)
    assert (rows < 2).all() and (rows > 1).all()


@pytest.mark.parametrize(("coarse", "fine"), [(True, False), (False, True), (True, True)])
def test_a_block_has_positions_where_it_is_used(coarse, fine):
    block = MatchingBlock(CONFIG, 8, coarse=coarse, fine=fine)
    shapes = {name: tuple(table.shape) for name, table in block.named_parameters() if name.startswith("position")}
    wanted = {}
    if coarse:
        wanted |= {"position_source": (1, 7, 8), "position_target": (1, 7, 8)}
    if fine:
        wanted |= {"position_source_fine": (1, 25, 8), "position_target_fine": (1, 25, 8)}
    assert shapes == wanted


# Super-resolution


def doubled(maps):
    """(B, C, 2, 3) -> (B, C, 4, 6): cell i lies at (i + 1/2) / 2 - 1/2, between its neighbours, inside the border."""
    for axis in (2, 3):
        last = maps.shape[axis] - 1
        out = []
        for index in range(2 * (last + 1)):
            place = min(max((index + 0.5) / 2 - 0.5, 0), last)
            low = int(place)
            after = maps.select(axis, min(low + 1, last))
            out.append((1 - place + low) * maps.select(axis, low) + (place - low) * after)
        maps = torch.stack(out, dim=axis)
    return maps


def test_super_resolution_is_bilinear_then_its_stages():
    upsample = randomised(SuperResolution(CONFIG, 8, None))
    tokens = random(2, 7, 8)
    found = upsample(tokens)
    x = doubled(tokens[:, 1:].reshape(2, 2, 3, 8).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    first, second = upsample.stages
    x = upsample.gates[1](*second(upsample.gates[0](*first(x))))
    torch.testing.assert_close(found[:, 1:], x.reshape(2, 24, 8))
    assert torch.equal(found[:, 0], tokens[:, 0])


def test_super_resolution_adds_projected_fine_features():
    upsample = randomised(SuperResolution(CONFIG, 8, 5))
    upsample.stages, upsample.gates = nn.ModuleList(), nn.ModuleList()
    tokens, fine = random(2, 7, 8), random(2, 5, 4, 6, seed=1)
    wanted = doubled(tokens[:, 1:].reshape(2, 2, 3, 8).permute(0, 3, 1, 2))
    wanted = wanted + torch.einsum("bchw,dc->bdhw", fine, upsample.skip.weight) + upsample.skip.bias[:, None, None]
    torch.testing.assert_close(upsample(tokens, fine)[:, 1:], wanted.flatten(2).transpose(1, 2))


# What is matched with what


class Repeat(nn.Module):
    """In place of U: each patch four times, plus `up`, plus a number an image of the fine features."""

    def forward(self, tokens, fine=None):
        patches = tokens[:, 1:].repeat_interleave(4, dim=1) + 0.5
        if fine is not None:
            patches = patches + fine.mean(dim=(1, 2, 3))[:, None, None]
        return torch.cat((tokens[:, :1], patches), dim=1)


class Mark(nn.Module):
    """In place of M: a correlation that tells its inputs, and both inputs times a number of the block."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, source, target, scale=None, correlate=None):
        corr = self.factor * source[:, 1:, :1] + 1000 * target[:, 1:, 0][:, None]
        return corr, self.factor * source, (self.factor + 1) * target


def stubbed(config):
    network = FeatureSuperResolution(config, 8, None)
    network.upsample, network.match_coarse, network.match_fine = Repeat(), Mark(2.0), Mark(7.0)
    if config.cross_scale:
        network.match_cross = Mark(3.0)
    return network


@pytest.mark.parametrize("with_fine", [False, True])
def test_the_four_correlations(with_fine):
    network, up, cross, fine = stubbed(CONFIG), Repeat(), Mark(3.0), None
    features = (None, None)
    if with_fine:
        fine = random(4, 5, 4, 6)
        features = (fine[:2], fine[2:])
    source, target = random(2, 7, 8), random(2, 7, 8, seed=1)
    corr_11, s, t = Mark(2.0)(source, target)
    up_s, up_t = up(s, features[0]), up(t, features[1])
    corr_12, s12, t12 = cross(s, up_t)
    corr_21, s21, t21 = cross(up_s, t)
    corr_22, last, _ = Mark(7.0)(up(s12, features[0]) + s21, t12 + up(t21, features[1]))
    found, fine_source = network(source, target, fine, correlation)
    assert [tuple(corr.shape) for corr in found] == [(2, 6, 6), (2, 6, 24), (2, 24, 6), (2, 24, 24)]
    for ours, wanted in zip(found, (corr_11, corr_12, corr_21, corr_22), strict=True):
        torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(fine_source, last)


def test_the_two_correlations_without_cross_scale():
    network, up = stubbed(CONFIG.replace(cross_scale=False)), Repeat()
    assert network.match_cross is None
    source, target = random(2, 7, 8), random(2, 7, 8, seed=1)
    corr_11, s, t = Mark(2.0)(source, target)
    corr_22, last, _ = Mark(7.0)(up(s), up(t))
    found, fine_source = network(source, target, None, correlation)
    assert len(found) == 2
    torch.testing.assert_close(found[0], corr_11)
    torch.testing.assert_close(found[1], corr_22)
    torch.testing.assert_close(fine_source, last)


def test_one_super_resolution_and_one_cross_block_are_shared():
    network = FeatureSuperResolution(CONFIG, 8, None)
    assert {name.split(".")[0] for name in network.state_dict()} == {
        "upsample",
        "match_coarse",
        "match_cross",
        "match_fine",
    }
    assert len(network.upsample.stages) == len(network.upsample.gates) == 2
