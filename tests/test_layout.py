"""LARL: who attends to whom in each representation, against one masked attention written out; embeddings; bias."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lpmflow.config import lpmflow_tiny
from lpmflow.model.layout import DualAttention, LayoutBlock, LayoutEncoder, RegionAttention

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = (2, 3)
TOKENS = [(image, place) for image in (0, 1) for place in (None, *((r, c) for r in range(2) for c in range(3)))]
"""The image and the (row, column) of each of the 14 tokens; a cls token is in no place."""


def config(**options):
    return lpmflow_tiny().replace(image_size=(32, 48), heads=2, layout_depth=2, **options)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(module: nn.Module) -> nn.Module:
    module = module.double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=number) * 0.5)
    return module


def literal(layer: RegionAttention, x: torch.Tensor, sees, biased: bool = True) -> torch.Tensor:
    """Attention over all 14 tokens with the logits of image b to image a masked unless sees(a, b)."""
    batch, count, width = x.shape
    bias = torch.full((2, count, count), -math.inf, dtype=x.dtype)
    for i, (a, query) in enumerate(TOKENS):
        for j, (b, key) in enumerate(TOKENS):
            if sees(a, b):
                bias[:, i, j] = 0
            if sees(a, b) and biased and query is not None and key is not None:
                column = ((query[0] - key[0] + 1) * 5 + (query[1] - key[1] + 2)) * 4 + 2 * a + b
                bias[:, i, j] = layer.bias_table[:, column]
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(width, dim=-1)
    heads = []
    for head in range(2):
        part = slice(head * width // 2, (head + 1) * width // 2)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width // 2) + bias[head]
        heads.append(logits.softmax(dim=-1) @ v[..., part])
    return torch.cat(heads, dim=-1) @ layer.proj.weight.T + layer.proj.bias


def own(a, b):
    return a == b


def other(a, b):
    return a != b


def both(a, b):
    return True


# One attention


@pytest.mark.parametrize("biased", [True, False])
def test_joint_attention_is_its_formula(biased):
    layer = randomised(RegionAttention(8, 2, GRID, biased))
    x = random(2, 14, 8)
    torch.testing.assert_close(layer(x), literal(layer, x, both, biased))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("cross", "sees"), [(False, own), (True, other)])
def test_dual_attention_is_the_masked_formula(cross, sees, biased):
    layer = randomised(DualAttention(8, 2, GRID, biased, cross))
    x = random(2, 14, 8)
    torch.testing.assert_close(layer(x), literal(layer, x, sees, biased))
    x.requires_grad_()  # with gradients another path computes it on the CPU
    torch.testing.assert_close(layer(x), literal(layer, x, sees, biased))


def test_the_bias_of_the_base_grid_has_3844_columns():
    assert RegionAttention(8, 2, (16, 16), True).bias_table.shape == (2, 3844)


def test_without_bias_nothing_is_trained_or_stored():
    layer = RegionAttention(8, 2, GRID, False)
    assert not layer.bias_table.any() and not layer.bias_table.requires_grad
    assert set(layer.state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert "bias_table" in RegionAttention(8, 2, GRID, True).state_dict()


def test_every_region_of_the_bias_is_trained():
    layer = randomised(RegionAttention(8, 2, GRID, True))
    layer(random(1, 14, 8)).square().sum().backward()
    # 3 x 5 offsets, all of which occur between cells of a 2x3 grid, for each of the four regions
    assert layer.bias_table.grad.reshape(2, 3, 5, 4).ne(0).all()


# One block


def layer_norm(layer, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("representation", "sees"), [("joint", both), ("isolated", own), ("bidirectional", own)])
def test_a_block_is_its_formula(representation, sees, biased):
    block = randomised(LayoutBlock(config(representation=representation, region_bias=biased), 8))
    x = random(2, 14, 8)
    wanted = x + literal(block.attn, layer_norm(block.norm1, x), sees, biased)
    if representation == "bidirectional":
        wanted = wanted + literal(block.cross_attn, layer_norm(block.norm_cross, wanted), other, biased)
    hidden = layer_norm(block.norm2, wanted) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    wanted = wanted + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    torch.testing.assert_close(block(x), wanted)


# The encoder


@pytest.mark.parametrize(("representation", "aware"), [("joint", True), ("isolated", False), ("bidirectional", True)])
@pytest.mark.parametrize("changed", [0, 1])
def test_whether_an_image_sees_the_other(representation, aware, changed):
    encoder = randomised(LayoutEncoder(config(representation=representation), 8))
    images = [random(1, 7, 8), random(1, 7, 8, seed=1)]
    before = encoder(*images)
    images[changed] = images[changed].clone()
    images[changed][:, 4] += 1
    after = encoder(*images)
    assert not torch.equal(after[changed], before[changed])
    assert torch.equal(after[1 - changed], before[1 - changed]) is not aware


def test_pairs_of_a_batch_do_not_see_each_other():
    encoder = randomised(LayoutEncoder(config(), 8))
    source, target = random(3, 7, 8), random(3, 7, 8, seed=1)
    whole = encoder(source, target)
    for pair in range(3):
        alone = encoder(source[pair : pair + 1], target[pair : pair + 1])
        torch.testing.assert_close(alone[0], whole[0][pair : pair + 1])
        torch.testing.assert_close(alone[1], whole[1][pair : pair + 1])


def test_positions_and_segments_are_added_before_the_blocks():
    """cls + cls_position; patches + position + the image's segment. Without blocks, only the last norm follows."""
    encoder = randomised(LayoutEncoder(config(), 8))
    encoder.blocks = nn.ModuleList()
    source, target = random(2, 7, 8), random(2, 7, 8, seed=1)
    for tokens, segment, found in zip(
        (source, target), (encoder.segment_source, encoder.segment_target), encoder(source, target), strict=True
    ):
        wanted = tokens.clone()
        wanted[:, 0] += encoder.cls_position[0, 0]
        for cell in range(6):
            wanted[:, 1 + cell] += encoder.position[0, cell] + segment[0, 0]
        torch.testing.assert_close(found, layer_norm(encoder.norm, wanted))


def test_the_encoder_is_its_blocks_in_order():
    encoder = randomised(LayoutEncoder(config(), 8))
    first, second = encoder.blocks
    zeros = torch.zeros(1, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        for table in (encoder.position, encoder.cls_position, encoder.segment_source, encoder.segment_target):
            table.zero_()
    source, target = random(1, 7, 8), zeros
    joined = torch.cat((source, target), dim=1)
    wanted = layer_norm(encoder.norm, second(first(joined)))
    found = torch.cat(encoder(source, target), dim=1)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, layer_norm(encoder.norm, first(second(joined))))


def test_dropout_acts_while_training_only():
    encoder = randomised(LayoutEncoder(config(dropout=1.0), 8))
    source, target = random(1, 7, 8), random(1, 7, 8, seed=1)
    assert not torch.equal(encoder(source, target)[0], encoder(target, source)[0])
    encoder.train()
    assert torch.equal(encoder(source, target)[0], encoder(target, source)[0])  # nothing is left of the tokens


@pytest.mark.parametrize("representation", ["joint", "isolated", "bidirectional"])
@pytest.mark.parametrize("biased", [True, False])
def test_every_parameter_is_trained(representation, biased):
    encoder = LayoutEncoder(config(representation=representation, region_bias=biased), 8)
    assert len(encoder.blocks) == 2
    source, target = encoder(torch.randn(1, 7, 8), torch.randn(1, 7, 8))
    (source.pow(3).sum() + target.pow(3).sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
