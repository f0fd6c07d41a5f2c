"""Triton helpers of `window_stage`: normalisation, linear layers and the activation on a tile of rows of a map.

A tile of C channels is a tuple of one or two blocks, as in `_tiles`, and zero in the columns past the last channel. A
matrix is contiguous (outputs, inputs), as `torch.nn.Linear` has it; vectors are contiguous and of any type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lpmflow_kernels._tiles import INTERPRETED, dot_rows, load_rows_at, round_to


class Layer(NamedTuple):
    """The weight and the bias of a layer."""

    weight: Any
    bias: Any


@triton.jit
def load_vector(p, o, m):
    """Numbers of a vector, float32, zeros where `m` is not set."""
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def widen(b_rows):
    """A tile in float32."""
    if len(b_rows) > 1:
        return b_rows[0].to(tl.float32), b_rows[1].to(tl.float32)
    else:
        return (b_rows[0].to(tl.float32),)


@triton.jit
def round_rows(b_rows, DTYPE: tl.constexpr):
    """A float32 tile in DTYPE, to be multiplied."""
    if len(b_rows) > 1:
        return round_to(b_rows[0], DTYPE), round_to(b_rows[1], DTYPE)
    else:
        return (round_to(b_rows[0], DTYPE),)


@triton.jit
def add_rows(b_a, b_b):
    """The sum of two tiles."""
    if len(b_a) > 1:
        return b_a[0] + b_b[0], b_a[1] + b_b[1]
    else:
        return (b_a[0] + b_b[0],)


@triton.jit
def add_vector(b_rows, p, C: tl.constexpr):
    """A vector of C numbers added to every row."""
    C0: tl.constexpr = b_rows[0].shape[-1]
    o_c = tl.arange(0, C0)
    b_head = b_rows[0] + load_vector(p, o_c, o_c < C)[None, :]
    if len(b_rows) > 1:
        o_c = C0 + tl.arange(0, b_rows[1].shape[-1])
        return b_head, b_rows[1] + load_vector(p, o_c, o_c < C)[None, :]
    else:
        return (b_head,)


@triton.jit
def centre(b_tile, b_mean, FIRST: tl.constexpr, C: tl.constexpr):
    """What the columns from FIRST on differ from the mean by, and zero past the last channel."""
    o_c = FIRST + tl.arange(0, b_tile.shape[-1])[None, :]
    return tl.where(o_c < C, b_tile - b_mean, 0.0)


@triton.jit
def scale_columns(b_tile, b_factor, layer, FIRST: tl.constexpr, C: tl.constexpr):
    o_c = FIRST + tl.arange(0, b_tile.shape[-1])
    m_c = o_c < C
    return b_tile * b_factor * load_vector(layer.weight, o_c, m_c)[None, :] + load_vector(layer.bias, o_c, m_c)[None, :]


@triton.jit
def normalise(b_rows, layer, eps, C: tl.constexpr):
    """Layer normalisation of the C channels of every row, float32: the variance is that of the differences."""
    C0: tl.constexpr = b_rows[0].shape[-1]
    if len(b_rows) > 1:
        b_mean = (tl.sum(b_rows[0], axis=1, keep_dims=True) + tl.sum(b_rows[1], axis=1, keep_dims=True)) / C
        b_head, b_tail = centre(b_rows[0], b_mean, 0, C), centre(b_rows[1], b_mean, C0, C)
        b_squares = tl.sum(b_head * b_head, axis=1, keep_dims=True) + tl.sum(b_tail * b_tail, axis=1, keep_dims=True)
        b_factor = tl.rsqrt(b_squares / C + eps)
        return scale_columns(b_head, b_factor, layer, 0, C), scale_columns(b_tail, b_factor, layer, C0, C)
    else:
        b_head = centre(b_rows[0], tl.sum(b_rows[0], axis=1, keep_dims=True) / C, 0, C)
        b_factor = tl.rsqrt(tl.sum(b_head * b_head, axis=1, keep_dims=True) / C + eps)
        return (scale_columns(b_head, b_factor, layer, 0, C),)


@triton.jit
def linear(b_rows, layer, o_out, m_out, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """The outputs `o_out` of a layer of C inputs, float32, zeros where `m_out` is not set: [ROWS, OUT]."""
    b_weight = load_rows_at(layer.weight + o_out[:, None] * C, m_out[:, None], C, C0, C1, 1)
    return dot_rows(b_rows, b_weight) + load_vector(layer.bias, o_out, m_out)[None, :]


@triton.jit
def add_columns(b_sum, b_in, p_weight, inputs, o_in, m_in, FIRST: tl.constexpr, C: tl.constexpr):
    o_c = FIRST + tl.arange(0, b_sum.shape[-1])
    m_weight = m_in[None, :] & (o_c < C)[:, None]
    b_weight = tl.load(p_weight + o_c[:, None] * inputs + o_in[None, :], mask=m_weight, other=0.0)
    b_weight = b_weight.to(tl.float32) if INTERPRETED else b_weight
    return tl.dot(b_in, tl.trans(b_weight), b_sum, input_precision="ieee")


@triton.jit
def add_linear(b_sum, b_in, p_weight, inputs, o_in, m_in, C: tl.constexpr):
    """sum + what the inputs `o_in`, given as `b_in` [ROWS, IN], add to the C outputs of a layer of `inputs`."""
    b_head = add_columns(b_sum[0], b_in, p_weight, inputs, o_in, m_in, 0, C)
    if len(b_sum) > 1:
        C0: tl.constexpr = b_sum[0].shape[-1]
        return b_head, add_columns(b_sum[1], b_in, p_weight, inputs, o_in, m_in, C0, C)
    else:
        return (b_head,)


@triton.jit
def gelu(b):
    """The exact one."""
    return 0.5 * b * (1.0 + tl.erf(b * 0.7071067811865476))
