"""The small parts several modules of the network share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpmflow import ops

Grid = tuple[int, int]


class Linear(nn.Linear):
    """`torch.nn.Linear` by `ops.linear`, which is faster on a CPU where there are no gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class LinearGelu(nn.Linear):
    """`Linear`, then the exact GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, gelu=True)


class Mlp(nn.Module):
    """Linear, GELU, linear on (..., C)."""

    def __init__(self, width: int, ratio: float, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(width * ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratio must leave at least one of {width} channels, got {ratio}")
        self.fc1 = LinearGelu(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.fc1(x))))


class Projections(nn.Module):
    """The `qkv` and `proj` layers of a multi-head attention, without the attention itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def split(self, x: Tensor, first: int = 0, last: int = 3) -> tuple[Tensor, ...]:
        """Thirds `first` to `last` of qkv applied to x (B, N, C), each as (B, heads, N, C / heads)."""
        width = x.shape[-1]
        rows = slice(first * width, last * width)
        thirds = ops.linear(x, self.qkv.weight[rows], self.qkv.bias[rows])
        return thirds.unflatten(-1, (last - first, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def join(self, x: Tensor) -> Tensor:
        """(B, heads, N, D) -> proj of (B, N, heads * D)."""
        return self.proj(x.transpose(1, 2).flatten(2))


class SelfAttention(Projections):
    """Plain multi-head self-attention on (B, N, C)."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bias`, if given, is added to the logits: (heads, N, N)."""
        q, k, v = self.split(x)
        return self.join(attention(q, k, v, bias))


class SwinStage(nn.Module):
    """One Swin block without shift, then x + LN(block(x)); on (B, H, W, C).

    Where no gradients are recorded the whole is one operation, which may compute it in one pass over the map.
    """

    def __init__(self, width: int, heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = Projections(width, heads)
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = Mlp(width, mlp_ratio)
        self.norm_out = nn.LayerNorm(width, eps=1e-5)
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor) -> ops.PooledMap:
        """The map, and what `ChannelAttention` wants of it."""
        if not torch.is_grad_enabled():
            return ops.window_stage(x, self.weights(), heads=self.attn.heads, window=self.window, eps=self.norm1.eps)
        qkv = self.attn.qkv(self.norm1(x))
        attended = ops.window_attention(qkv, self.bias_table, heads=self.attn.heads, window=self.window)
        y = x + self.attn.proj(attended)
        y = y + self.mlp(self.norm2(y))
        y = x + self.norm_out(y)
        return ops.PooledMap(y, y.mean(dim=(1, 2)), y.amax(dim=(1, 2)))

    def weights(self) -> ops.StageWeights:
        """All parameters, by the names of the operation."""
        norm1, attn, norm2, mlp, norm_out = self.norm1, self.attn, self.norm2, self.mlp, self.norm_out
        return ops.StageWeights(
            norm1_weight=norm1.weight,
            norm1_bias=norm1.bias,
            qkv_weight=attn.qkv.weight,
            qkv_bias=attn.qkv.bias,
            bias_table=self.bias_table,
            proj_weight=attn.proj.weight,
            proj_bias=attn.proj.bias,
            norm2_weight=norm2.weight,
            norm2_bias=norm2.bias,
            fc1_weight=mlp.fc1.weight,
            fc1_bias=mlp.fc1.bias,
            fc2_weight=mlp.fc2.weight,
            fc2_bias=mlp.fc2.bias,
            norm_out_weight=norm_out.weight,
            norm_out_bias=norm_out.bias,
        )


class ChannelAttention(nn.Module):
    """x + x * sigmoid(f(mean x) + f(max x)) with one gate a channel; on (B, H, W, C), mean and max given."""

    def __init__(self, width: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, max(width // reduction, 1), bias=False)
        self.fc2 = nn.Linear(max(width // reduction, 1), width, bias=False)

    def forward(self, x: Tensor, mean: Tensor, highest: Tensor) -> Tensor:
        """`mean` and `highest` (B, C) are of x over its cells."""
        gate = self.fc2(F.relu(self.fc1(torch.stack((mean, highest))))).sum(dim=0).sigmoid()
        return x + x * gate[:, None, None, :]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v on (B, heads, N, D); bias (heads, N, M) or None."""
    bias = None if bias is None else bias.to(q.dtype)
    if q.device.type == "cpu" and q.requires_grad:
        # PyTorch's fused attention has a slow backward on the CPU: a training step took 1.7 times as long with it
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return (logits if bias is None else logits + bias).softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def arf(x: Tensor) -> Tensor:
    """(e^x - e^-x) / (e^x + e^(-x-4)) for x > 0, else 0: the rectifier on attention outputs (paper section 3.3).

    Written with e^(-2x), which cannot overflow.
    """
    positive = x.clamp(min=0)
    decay = torch.exp(-2 * positive)
    return (1 - decay) / (1 + decay * math.exp(-4))


def foreground_weight(source: Tensor, target: Tensor) -> Tensor:
    """Cosine of each source patch with the mean of both cls tokens, max-min normalised to [0, 1] (paper section 3.2).

    source, target (B, 1 + n, C) backbone tokens, cls first -> (B, n) float32; all zero where every patch is alike.
    """
    layout = (source[:, :1] + target[:, :1]) / 2
    cosine = F.cosine_similarity(source[:, 1:].float(), layout.float(), dim=-1)
    low, high = cosine.amin(dim=1, keepdim=True), cosine.amax(dim=1, keepdim=True)
    return (cosine - low) / (high - low).clamp(min=torch.finfo(cosine.dtype).tiny)
