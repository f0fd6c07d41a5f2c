"""What an operator asks of its arguments before their addresses are taken; one operation after another in `_contracts`.

`lpmflow.ops` has checked its arguments by then. But anybody can call `torch.ops.lpmflow`, and there a size that does
not fit would be memory read or written beyond a tensor's end. Native and Triton operators ask the same.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def exact_type(dtype: torch.dtype) -> torch.dtype:
    """The type sums are formed in: float32, for float64 float64."""
    return torch.promote_types(dtype, torch.float32)


def check_first(op: str, name: str, x: Tensor, layout: str, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """The tensor that says what the others must be: as many dimensions as `layout` has names, one of `dtypes`."""
    if x.ndim != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} must have shape ({layout}), got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be one of {wanted}, got {x.dtype}")


def check_tensor(
    op: str, name: str, x: Tensor, shape: tuple[int | None, ...], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """This shape, None for any length; `like`'s device; this type, None for any that a kernel reads."""
    if x.ndim != len(shape) or any(side is not None and side != x.shape[axis] for axis, side in enumerate(shape)):
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise ValueError(f"{op}: {name} must have shape ({wanted}), got {tuple(x.shape)}")
    if x.dtype not in ((dtype,) if dtype is not None else FLOATS):
        raise TypeError(f"{op}: {name} must be {dtype or 'of a floating point type'}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of the other tensors, {like.device}, got {x.device}")


def check_range(op: str, name: str, value: Any, low: int, high: int | None = None) -> None:
    """At least `low`, at most `high`."""
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{op}: {name} must be {wanted}, got {value}")


def with_memory(op: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, for tensors that have memory."""
    names = tuple(inspect.signature(run).parameters)

    @functools.wraps(run)
    def checked(*arguments: Any) -> Any:
        check_memory(op, names, arguments)
        return run(*arguments)

    return checked


def check_memory(op: str, names: Sequence[str], arguments: Sequence[Any]) -> None:
    """Every tensor has the memory its shape and strides speak of, which one whose storage was given up has not."""
    for name, x in _tensors(names, arguments):
        if x.numel() == 0:
            continue
        end = x.storage_offset() + 1 + sum((side - 1) * step for side, step in zip(x.shape, x.stride(), strict=True))
        if end * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError(f"{op}: {name} must have its storage, got one of {x.untyped_storage().nbytes()} bytes")


def _tensors(names: Sequence[str], arguments: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    # an operator leaves out arguments at the end that have their default
    for name, value in zip(names, arguments, strict=False):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list):
            yield from ((f"{name}[{i}]", x) for i, x in enumerate(value) if isinstance(x, Tensor))
