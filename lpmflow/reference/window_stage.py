"""`window_stage` as written: a Swin block without shift, normalised and added to what went in, and its statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lpmflow.reference.window_refinement import window_attention


class StageWeights(NamedTuple):
    """The parameters of one stage for C channels; a matrix is (outputs, inputs), as `torch.nn.Linear` has it."""

    norm1_weight: Tensor
    """(C,), as all weights and biases of the three normalisations."""
    norm1_bias: Tensor
    qkv_weight: Tensor
    """(3C, C)"""
    qkv_bias: Tensor
    """(3C,)"""
    bias_table: Tensor
    """((2 window - 1)^2, heads), see `window_attention`."""
    proj_weight: Tensor
    """(C, C)"""
    proj_bias: Tensor
    """(C,)"""
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor
    """(hidden, C)"""
    fc1_bias: Tensor
    """(hidden,)"""
    fc2_weight: Tensor
    """(C, hidden)"""
    fc2_bias: Tensor
    """(C,)"""
    norm_out_weight: Tensor
    norm_out_bias: Tensor


class PooledMap(NamedTuple):
    """A map and, for each channel, its average and its largest value over the cells."""

    map: Tensor
    """(B, H, W, C)"""
    mean: Tensor
    """(B, C)"""
    highest: Tensor
    """(B, C)"""


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> Tensor:
    """A linear layer, and the exact GELU of it where `gelu` is set."""
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def window_stage(
    x: Tensor,
    weights: StageWeights,
    *,
    heads: int,
    window: int,
    eps: float,
    attend: Callable[..., Tensor] = window_attention,
    linear: Callable[..., Tensor] = plain_linear,
) -> PooledMap:
    """x + norm_out(block(x)) on (B, H, W, C), GELU between fc1 and fc2; with another attention and layers if given.

    block(x) = y + fc2(gelu(fc1(norm2(y)))) with y = x + proj(attention(qkv(norm1(x)))).
    """
    w, width = weights, (x.shape[-1],)
    qkv = linear(F.layer_norm(x, width, w.norm1_weight, w.norm1_bias, eps), w.qkv_weight, w.qkv_bias)
    attended = attend(qkv, w.bias_table, heads=heads, window=window)
    y = x + linear(attended, w.proj_weight, w.proj_bias)
    normed = F.layer_norm(y, width, w.norm2_weight, w.norm2_bias, eps)
    hidden = linear(normed, w.fc1_weight, w.fc1_bias, gelu=True)
    y = y + linear(hidden, w.fc2_weight, w.fc2_bias)
    out = x + F.layer_norm(y, width, w.norm_out_weight, w.norm_out_bias, eps)
    return PooledMap(out, out.mean(dim=(1, 2)), out.amax(dim=(1, 2)))
