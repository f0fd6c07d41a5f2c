"""What the Triton operators share on the host: tile sizes, launching, which tensors they take, registration."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lpmflow_kernels._checks import with_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_OLDEST = (3, 4)


@dataclass(frozen=True)
class Tiles:
    """Tuning of one kernel: queries and keys of a tile, warps of a program, iterations of loads in flight.

    `registers` is the most a thread may have; without it, the compiler spends all there are on loads in flight.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int | None = None

    def options(self) -> dict[str, Any]:
        """The compiler's options. Triton 3.9 warns where fusion is left to its default, which it is going to change."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, kept instead of carried out."""

    kernel: Any
    arguments: dict[str, Any]
    tiles: Tiles


_kept: ContextVar[list[Launch] | None] = ContextVar("lpmflow_kept_launches", default=None)


def launch(kernel: Any, programs: int, tiles: Tiles, arguments: dict[str, Any]) -> None:
    """Run `programs` programs of `kernel` on the current stream, with those of the arguments that it names."""
    arguments = {**arguments, "BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k}
    arguments = {name: arguments[name] for name in kernel.arg_names}
    kept = _kept.get()
    if kept is not None:
        kept.append(Launch(kernel, arguments, tiles))
        return
    kernel[(programs,)](**arguments, **tiles.options())


@contextlib.contextmanager
def keep_launches() -> Iterator[list[Launch]]:
    """Within the block launches are kept in the list and not carried out, so that meta tensors will do."""
    token = _kept.set([])
    try:
        yield _kept.get()  # type: ignore[misc]
    finally:
        _kept.reset(token)


def why_no_device() -> str | None:
    """None when there is a device that Triton's kernels could run on, else the reason in one sentence."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
        return f"it needs Triton 3.4 or newer, and this is {triton.__version__}"
    if _INTERPRETED or torch.cuda.is_available():
        return None
    return "it runs on CUDA devices and none is visible (on the CPU with TRITON_INTERPRET=1, slowly)"


def why_not_on_device(name: str, x: Tensor) -> str | None:
    """None when Triton's kernels can compute with tensors like the argument `name`, else the reason in one sentence."""
    if x.dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, and {name} is {str(x.dtype).removeprefix('torch.')}"
    if _INTERPRETED and x.device.type in ("cpu", "cuda"):
        return None
    if x.device.type != "cuda":
        return f"it runs on CUDA devices (on the CPU with TRITON_INTERPRET=1, slowly), and {name} is on {x.device.type}"
    major, minor = torch.cuda.get_device_capability(x.device.index)
    if major < 8:
        return f"it takes GPUs of compute capability 8.0 and later, and {name} is on one of {major}.{minor}"
    return None


def dense_rows(x: Tensor) -> Tensor:
    """`x` with a dense last dimension: itself where that is so, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_alignment(*tensors: Tensor) -> int:
    """16 where all rows of all tensors begin at multiples of 16 bytes, else 1."""
    aligned = all(step * x.element_size() % 16 == 0 for x in tensors for step in x.stride()[:-1])
    return 16 if aligned and all(x.data_ptr() % 16 == 0 for x in tensors) else 1


def strided(pointer: str, x: Tensor | None, stride: str, axes: str) -> dict[str, Any]:
    """The arguments for a tensor and the strides of its first axes: None and zeros where there is none."""
    steps = (0,) * len(axes) if x is None else x.stride()[: len(axes)]
    return {pointer: x, **{f"{stride}{axis}": step for axis, step in zip(axes, steps, strict=True)}}


def define(op: str, name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """The operator `lpmflow::name` of `op`, on CUDA devices and, where Triton interprets its kernels, on the CPU.

    `fake` also refuses shapes, types and devices that do not fit, and `run` calls it for its outputs.
    """
    full = f"lpmflow::{name}"
    torch.library.define(full, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(full, ("CUDA", "CPU") if _INTERPRETED else "CUDA")(with_memory(op, run))
    torch.library.register_fake(full)(fake)
    torch.library.register_vmap(full)(functools.partial(_refuse_vmap, op))


def _refuse_vmap(op: str, info: Any, in_dims: Any, *args: Any) -> Any:
    raise RuntimeError(
        f"{op}: torch.func.vmap is not supported; the op has a batch dimension, B, of its own (backend='reference' "
        f"supports vmap)"
    )


def refuse_second_order(op: str, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """What an operator's backward has for a gradient of its own."""
    raise RuntimeError(
        f"{op}: the triton backend has no second derivative; use backend='reference' where the gradient is "
        f"differentiated again"
    )


def refuse_gradient(op: str, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """What an operator for inference has for a gradient."""
    raise RuntimeError(f"{op}: the triton backend does this for inference only, and has no derivative")
