"""`window_stage` by the native module: the operator `lpmflow::window_stage_native`, for inference on the CPU.

The arithmetic and its contract are in csrc/window_stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpmflow_kernels._contracts import check_window_stage
from lpmflow_kernels.native import DTYPES, check, dense_rows, loaded
from lpmflow_kernels.native._register import Operator, register_forward

OP = "window_stage"
WEIGHTS = 2**21
"""Bytes of weights up to which one pass measured faster than layer after layer in a library's large products."""


def fits(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """Whether one pass is possible, and quicker: float32 or float64, and weights that stay in the cache."""
    same = all(w.dtype == x.dtype for place, w in enumerate(weights) if place != 4)  # all but the bias table
    size = sum(w.numel() for w in weights) * x.element_size()
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and same and size <= WEIGHTS


def window_stage(
    x: Tensor, weights: tuple[Tensor, ...], *, heads: int, window: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(map, mean, highest) of checked arguments; see `lpmflow.ops.window_stage` for the order of the weights."""
    return torch.ops.lpmflow.window_stage_native(x, list(weights), heads, window, eps)


def _run(x: Tensor, weights: list[Tensor], heads: int, window: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(x, weights, heads, window, eps)
    if outputs[0].numel() == 0:
        return outputs
    x = dense_rows(x)
    weights = [w.to(x.dtype).contiguous() for w in weights]  # held until the call is over
    table = weights[4]
    layers = weights[:4] + weights[5:]
    addresses = tuple((layers[i].data_ptr(), layers[i + 1].data_ptr()) for i in range(0, len(layers), 2))
    width = x.shape[3] // heads
    status = loaded(OP).window_stage(
        (*x.shape[:3], heads, width, window, 0),
        width**-0.5,
        DTYPES[x.dtype],
        torch.get_num_threads(),
        layers[8].shape[0],
        eps,
        x.data_ptr(),
        x.stride()[:3],
        addresses,
        table.data_ptr(),
        *(output.data_ptr() for output in outputs),
    )
    check(OP, status)
    return outputs


def _outputs(x: Tensor, weights: list[Tensor], heads: int, window: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    check_window_stage(x, weights, heads, window, (torch.float32, torch.float64))
    pooled = (x.shape[0], x.shape[3])
    return x.new_empty(x.shape), x.new_empty(pooled), x.new_empty(pooled)


register_forward(
    OP,
    Operator(
        "(Tensor x, Tensor[] weights, SymInt heads, SymInt window, float eps) -> (Tensor, Tensor, Tensor)",
        {"CPU": _run},
        _outputs,
    ),
)
