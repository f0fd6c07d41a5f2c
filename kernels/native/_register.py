"""Registration of a native kernel: forward and backward as operators of PyTorch, with fakes, autograd, refusals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lpmflow_kernels._checks import with_memory


class Operator(NamedTuple):
    """One operator: its schema, what runs by device type ("CPU", "CUDA"), what gives the outputs' shapes.

    `fake` also refuses shapes, types and devices that do not fit, and what runs calls it for its outputs.
    """

    schema: str
    runs: dict[str, Callable[..., Any]]
    fake: Callable[..., Any]


def register(
    op: str, forward: Operator, backward: Operator, *, save: Callable[..., None], differentiate: Callable[..., Any]
) -> None:
    """`lpmflow::{op}_native` and `lpmflow::{op}_native_backward`.

    The forward's gradient is `differentiate(ctx, *grads)`, from what `save(ctx, inputs, output)` kept; the backward
    has none, and neither is to be vmapped: both are refused in one sentence.
    """
    _define(op, f"lpmflow::{op}_native", forward)
    _define(op, f"lpmflow::{op}_native_backward", backward)
    torch.library.register_autograd(f"lpmflow::{op}_native", differentiate, setup_context=save)
    torch.library.register_autograd(f"lpmflow::{op}_native_backward", functools.partial(_refuse_second_order, op))


def register_forward(op: str, forward: Operator) -> None:
    """`lpmflow::{op}_native`, for inference: a gradient is refused in one sentence, and so is vmap."""
    _define(op, f"lpmflow::{op}_native", forward)
    torch.library.register_autograd(f"lpmflow::{op}_native", functools.partial(_refuse_gradient, op))


def _define(op: str, name: str, operator: Operator) -> None:
    torch.library.define(name, operator.schema, tags=torch.Tag.pt2_compliant_tag)
    for device, run in operator.runs.items():
        torch.library.impl(name, device)(with_memory(op, run))
    torch.library.register_fake(name)(operator.fake)
    torch.library.register_vmap(name)(functools.partial(_refuse_vmap, op))


def _refuse_gradient(op: str, ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(f"{op}: the native backend does this for inference only, and has no derivative")


def _refuse_second_order(op: str, ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        f"{op}: the native backend has no second derivative; use backend='reference' where the gradient is "
        f"differentiated again"
    )


def _refuse_vmap(op: str, info: Any, in_dims: Any, *args: Any) -> Any:
    raise RuntimeError(
        f"{op}: torch.func.vmap is not supported; the op has a batch dimension, B, of its own (backend='reference' "
        f"supports vmap)"
    )
