"""One refinement stage at a time: the layers around the window attention, and what channel attention pools."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lpmflow import reference
from lpmflow.ops._autodiff import has_tangent, needs_gradient
from lpmflow.ops._backends import choose
from lpmflow.ops._checks import check_count, check_shape, check_tensor
from lpmflow.ops.linear import linear
from lpmflow.ops.window_refinement import OP as ATTENTION
from lpmflow.ops.window_refinement import why_not_attention, window_attention
from lpmflow.reference import PooledMap, StageWeights

OP = "window_stage"


def window_stage(
    x: Tensor, weights: StageWeights, *, heads: int, window: int, eps: float = 1e-5, backend: str | None = None
) -> PooledMap:
    """x + norm_out(block(x)), block a Swin block without shift, and its average and maximum (paper section 3.4).

    block(x) = y + fc2(gelu(fc1(norm2(y)))) with y = x + proj(window_attention(qkv(norm1(x)))); the GELU is the exact
    one.

    Args:
        x: (B, H, W, C), at least one cell.
        weights: `StageWeights`, on x's device and, outside autocast, in its dtype (the bias table in any).
        heads: divides C.
        window: side of a window in cells; a map that is not a multiple has smaller windows at its edges.
        eps: of the three normalisations.
        backend: "reference", "native", "triton" or None to choose, as for `window_attention`, as which it is chosen.

    Returns:
        `PooledMap`: the map (B, H, W, C), its mean and its highest (B, C).

    Where nothing asks for a gradient, two backends compute the whole stage in one pass over the map: the native one on
    the CPU, where autocast is off, everything is float32 or everything float64, and the stage is narrow enough for its
    weights to stay in the cache; and the triton one, for up to 96 channels in heads of up to 32, under autocast where x
    is float32. Elsewhere the layers run one by one, the backend does the attention among them, and everything is
    differentiable, with other derivatives and `torch.func` as in `window_attention`.

    Raises TypeError or ValueError naming the argument, RuntimeError when the named backend cannot run.
    """
    check_tensor(OP, "x", x, "B, H, W, C")
    check_count(OP, "heads", heads, at_least=1)
    check_count(OP, "window", window, at_least=1)
    if 0 in x.shape[1:]:
        raise ValueError(f"{OP}: x must have at least one cell and one channel, got {tuple(x.shape)}")
    if x.shape[-1] % heads:
        raise ValueError(f"{OP}: x must have a multiple of heads ({heads}) channels, got {x.shape[-1]}")
    _check_weights(weights, x, heads, window)
    width, table = x.shape[-1] // heads, weights.bias_table
    chosen = choose(ATTENTION, backend, x.device.type, lambda name: why_not_attention(name, x, table, width, window))
    if chosen == "native" and _in_one_pass(chosen, x, weights, heads, window):
        from lpmflow_kernels.native import window_stage as native

        return PooledMap(*native.window_stage(x, weights, heads=heads, window=window, eps=eps))
    if chosen == "triton" and _in_one_pass(chosen, x, weights, heads, window):
        from lpmflow_kernels import window_stage as triton

        dtype = _multiplied_in(x)
        return PooledMap(*triton.window_stage(x, weights, heads=heads, window=window, eps=eps, dtype=dtype))
    attend = functools.partial(window_attention, backend=backend)
    layer = {"linear": linear} if chosen == "native" else {}
    return reference.window_stage(x, weights, heads=heads, window=window, eps=eps, attend=attend, **layer)


def _check_weights(weights: StageWeights, x: Tensor, heads: int, window: int) -> None:
    if not isinstance(weights, StageWeights):
        raise TypeError(f"{OP}: weights must be StageWeights, got {type(weights).__name__}")
    width = x.shape[-1]
    hidden = weights.fc1_bias.shape[0] if isinstance(weights.fc1_bias, Tensor) and weights.fc1_bias.ndim == 1 else 0
    matrices = {"qkv": (3 * width, width), "proj": (width, width), "fc1": (hidden, width), "fc2": (width, hidden)}
    for name, value in zip(StageWeights._fields, weights, strict=True):
        layer = name.rpartition("_")[0]
        shape = matrices.get(layer, (width,))
        if name == "bias_table":
            shape = ((2 * window - 1) ** 2, heads)
        elif name.endswith("_bias"):
            shape = shape[:1]
        check_tensor(OP, name, value, "outputs, inputs" if len(shape) == 2 else "channels")
        check_shape(OP, name, value, shape)
        if value.device != x.device:
            raise ValueError(f"{OP}: {name} must be on x's device {x.device}, got {value.device}")
        if name != "bias_table" and value.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{OP}: {name} must have x's dtype {x.dtype} outside autocast, got {value.dtype}")


def _multiplied_in(x: Tensor) -> torch.dtype:
    """The type of the layers' products: x's, and autocast's where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _in_one_pass(backend: str, x: Tensor, weights: StageWeights, heads: int, window: int) -> bool:
    """Whether the chosen backend may do the stage at once."""
    if needs_gradient(x, *weights) or has_tangent(x, *weights):
        return False
    mixed = torch.is_autocast_enabled(x.device.type)
    if backend == "native":
        from lpmflow_kernels.native import window_stage as native

        return not mixed and native.fits(x, weights)
    from lpmflow_kernels import window_stage as triton

    if mixed and x.dtype != torch.float32:
        return False  # layer after layer, what comes out is of a type of its own
    return triton.why_not(x, heads=heads, window=window, dtype=_multiplied_in(x)) is None
