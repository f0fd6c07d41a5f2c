"""The shared layers: each against its formula, a loop or PyTorch's own attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpmflow.model.layers import (
    ChannelAttention,
    Mlp,
    Projections,
    SelfAttention,
    SwinStage,
    arf,
    attention,
    foreground_weight,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(module: nn.Module) -> nn.Module:
    """`module` in float64 with every parameter random, so that no term hides behind a zero or a one."""
    module = module.double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=number) * 0.5)
    return module


def norm(layer: nn.LayerNorm, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


# The rectifier


@pytest.mark.parametrize("x", [1e-6, 0.01, 0.5, 1.0, 2.0, 7.5, 40.0, 300.0])
def test_arf_is_its_formula(x):
    wanted = (math.exp(x) - math.exp(-x)) / (math.exp(x) + math.exp(-x - 4))
    assert float(arf(torch.tensor(x, dtype=torch.float64))) == pytest.approx(wanted, rel=1e-9)


def test_arf_of_what_is_not_positive_is_zero():
    assert not arf(torch.tensor([0.0, -0.0, -1e-30, -1.0, -1e4, -math.inf])).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arf_does_not_overflow(dtype):
    x = torch.tensor([6e4, -6e4, 100.0, -100.0, math.inf], dtype=dtype)
    assert arf(x).tolist() == [1, 0, 1, 0, 1] and arf(x).dtype == dtype
    x = x[:4].requires_grad_()
    arf(x).sum().backward()
    assert x.grad.isfinite().all()


# Multilayer perceptron


def test_mlp_is_its_formula():
    mlp = randomised(Mlp(6, 2.5))
    x = random(2, 3, 6)
    assert mlp.fc1.weight.shape == (15, 6)
    wanted = gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), wanted)


def test_mlp_drops_out_while_training_only():
    mlp = randomised(Mlp(6, 2.0, dropout=1.0))
    assert mlp(random(2, 6)).any() and not mlp.train()(random(2, 6)).any()


def test_mlp_without_a_hidden_channel_is_refused():
    with pytest.raises(ValueError, match=r"mlp_ratio must leave at least one of 6 channels, got 0\.1"):
        Mlp(6, 0.1)


# Attention


def test_split_gives_the_thirds_and_the_heads_of_qkv():
    layer = randomised(Projections(6, 2))
    x = random(2, 5, 6)
    whole = x @ layer.qkv.weight.T + layer.qkv.bias
    for first, last in ((0, 3), (0, 1), (1, 3), (2, 3)):
        parts = layer.split(x, first, last)
        assert len(parts) == last - first
        for third, part in enumerate(parts, start=first):
            assert part.shape == (2, 2, 5, 3)
            for head in range(2):
                start = 6 * third + 3 * head
                torch.testing.assert_close(part[:, head], whole[:, :, start : start + 3])


def test_join_puts_the_heads_side_by_side():
    layer = randomised(Projections(6, 2))
    x = random(2, 2, 5, 3)
    wanted = torch.cat((x[:, 0], x[:, 1]), dim=-1) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer.join(x), wanted)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads must divide the width 10, got 4"):
        Projections(10, 4)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_attention_equals_the_loops(training, biased):
    """`training` takes the path with the explicit softmax, where there are gradients on the CPU."""
    q, k, v = random(2, 3, 4, 5), random(2, 3, 6, 5, seed=1), random(2, 3, 6, 5, seed=2)
    bias = random(3, 4, 6, seed=3) if biased else None
    wanted = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        logits = [float(q[b, h, i] @ k[b, h, j]) / math.sqrt(5) for j in range(6)]
        weights = [math.exp(x + (float(bias[h, i, j]) if biased else 0)) for j, x in enumerate(logits)]
        wanted[b, h, i] = sum(weight * v[b, h, j] for j, weight in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(attention(q.requires_grad_(training), k, v, bias), wanted)


@pytest.mark.parametrize("training", [False, True])
def test_attention_takes_a_float32_bias_in_half_precision(training):
    q, k, v = (random(1, 2, 4, 8, seed=seed).bfloat16() for seed in range(3))
    bias = random(2, 4, 4).float()
    found = attention(q.requires_grad_(training), k, v, bias)
    assert found.dtype == torch.bfloat16
    wanted = attention(q.double(), k.double(), v.double(), bias.double())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.03)


def test_self_attention_is_pytorchs():
    layer = randomised(SelfAttention(12, 3))
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.in_proj_weight, theirs.in_proj_bias = layer.qkv.weight, layer.qkv.bias
    theirs.out_proj.weight, theirs.out_proj.bias = layer.proj.weight, layer.proj.bias
    x, bias = random(2, 5, 12), random(3, 5, 5)
    torch.testing.assert_close(layer(x), theirs(x, x, x, need_weights=False)[0])
    mask = bias.repeat(2, 1, 1)
    torch.testing.assert_close(layer(x, bias), theirs(x, x, x, attn_mask=mask, need_weights=False)[0])


# Swin and channel attention


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("height", "width", "window"), [(4, 6, 2), (5, 7, 3), (2, 3, 4)])
def test_swin_stage_is_its_formula(height, width, window, training):
    """x + LN(block(x)), where a cell attends to the cells of its own window; heads of 3 channels."""
    stage = randomised(SwinStage(6, 2, window, mlp_ratio=2.0))
    x = random(2, height, width, 6)
    qkv = norm(stage.norm1, x, 1e-5) @ stage.attn.qkv.weight.T + stage.attn.qkv.bias
    attended = torch.zeros_like(x)
    cells = [(r, c) for r in range(height) for c in range(width)]
    for r, c in cells:
        seen = [(i, j) for i, j in cells if i // window == r // window and j // window == c // window]
        for head in range(2):
            q, k, v = (slice(6 * third + 3 * head, 6 * third + 3 * head + 3) for third in range(3))
            rows = [(r - i + window - 1) * (2 * window - 1) + (c - j + window - 1) for i, j in seen]
            keys = torch.stack([qkv[:, i, j, k] for i, j in seen], dim=1)
            values = torch.stack([qkv[:, i, j, v] for i, j in seen], dim=1)
            logits = torch.einsum("bd,bnd->bn", qkv[:, r, c, q], keys) / math.sqrt(3) + stage.bias_table[rows, head]
            weights = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
            attended[:, r, c, 3 * head : 3 * head + 3] = torch.einsum("bn,bnd->bd", weights, values)
    y = x + attended @ stage.attn.proj.weight.T + stage.attn.proj.bias
    hidden = gelu(norm(stage.norm2, y, 1e-5) @ stage.mlp.fc1.weight.T + stage.mlp.fc1.bias)
    y = y + hidden @ stage.mlp.fc2.weight.T + stage.mlp.fc2.bias
    wanted = x + norm(stage.norm_out, y, 1e-5)
    with torch.set_grad_enabled(training):
        found, mean, highest = stage(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(mean, wanted.mean(dim=(1, 2)))
    torch.testing.assert_close(highest, wanted.amax(dim=(1, 2)))
    assert found.requires_grad is training


def test_channel_attention_is_its_formula():
    gate = randomised(ChannelAttention(32))
    x = random(2, 3, 5, 32)
    assert gate.fc1.weight.shape == (2, 32) and gate.fc1.bias is None and gate.fc2.bias is None
    maps = x.permute(0, 3, 1, 2)
    total = 0
    for pooled in (F.adaptive_avg_pool2d(maps, 1), F.adaptive_max_pool2d(maps, 1)):
        hidden = F.conv2d(pooled, gate.fc1.weight[:, :, None, None]).clamp(min=0)
        total = total + F.conv2d(hidden, gate.fc2.weight[:, :, None, None])
    wanted = maps + maps / (1 + torch.exp(-total))
    torch.testing.assert_close(gate(x, x.mean(dim=(1, 2)), x.amax(dim=(1, 2))), wanted.permute(0, 2, 3, 1))


def test_channel_attention_of_few_channels_keeps_one():
    assert ChannelAttention(8).fc1.weight.shape == (1, 8)


# Foreground


def test_foreground_weight_equals_the_loops():
    source, target = random(2, 6, 4), random(2, 6, 4, seed=1)
    found = foreground_weight(source, target)
    assert found.shape == (2, 5) and found.dtype == torch.float32
    for b in range(2):
        g = [(float(source[b, 0, c]) + float(target[b, 0, c])) / 2 for c in range(4)]
        cosine = [
            sum(x * y for x, y in zip(patch, g, strict=True)) / (math.hypot(*patch) * math.hypot(*g))
            for patch in source[b, 1:].tolist()
        ]
        low, high = min(cosine), max(cosine)
        wanted = [(value - low) / (high - low) for value in cosine]
        assert found[b].tolist() == pytest.approx(wanted, abs=1e-6)
        assert found[b].min() == 0 and found[b].max() == 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_foreground_of_equal_patches_is_zero(value):
    tokens = torch.full((2, 5, 4), value)
    assert foreground_weight(tokens, tokens).tolist() == [[0] * 4] * 2
