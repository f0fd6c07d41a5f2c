"""`python -m lpmflow_kernels.compile_report`: what the compiler made of every Triton kernel, as a Markdown table.

Compiles ahead of time, which needs no GPU, what the launchers would launch for each input type, size (a head width D,
the side of an output grid, or a window) and architecture, and exits with 1 when a kernel spills registers or wants
more shared memory than there is.
Rows are kernels: the tile (queries x keys), warps and stages from the op's `configuration`, registers a thread, bytes
spilled a thread, kilobytes of shared memory a program, and which instruction multiplies.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lpmflow_kernels import correlation, cross_scale_fusion, region_attention, window_refinement, window_stage
from lpmflow_kernels._launch import DTYPES, Launch, Tiles, keep_launches

# Head widths of correlation and region_attention, sides of the output grid of cross_scale_fusion, windows of
# window_attention and window_stage.
WIDTHS = (12, 24, 32, 64, 96, 128, 160, 256)
SIZES = {
    "correlation": WIDTHS,
    "cross_scale_fusion": (24, 32, 64),
    "window_attention": (4, 7, 8, 12, 16, 32),
    "window_stage": (4, 7, 8, 12, 16, 32),
    "region_attention": WIDTHS,
}
CAPABILITIES = (80, 90, 100)
# Bytes a thread. ptxas puts a value or two aside, from before a loop to after it, where that lets one more program run
# on a multiprocessor at the same time; to be short of registers costs hundreds.
SPILL_LIMIT = 16
# Bytes a program may have. 8.0 itself has 163 KB, but what is compiled for it also runs on 8.6 and 8.9.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_MULTIPLIERS = ("wgmma", "tcgen05.mma", "mma.sync")  # else the CUDA cores, one FMA after another


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled; `spilled` in bytes a thread, `shared` in bytes a program."""

    kernel: str
    tiles: Tiles
    capability: int
    registers: int
    spilled: int
    shared: int
    multiplier: str

    def fault(self) -> str | None:
        """Why this must not ship, None when it may."""
        limit = SHARED_LIMIT[self.capability]
        if self.spilled > SPILL_LIMIT:
            return f"{self.kernel} spills {self.spilled} bytes a thread on {self.capability}"
        if self.shared > limit:
            return (
                f"{self.kernel} wants {self.shared} bytes of shared memory on {self.capability}, the limit is {limit}"
            )
        return None

    def cells(self) -> str:
        """Its cells in the table, from the tile on."""
        tile = f"{self.tiles.block_q} x {self.tiles.block_k} | {self.tiles.num_warps} | {self.tiles.num_stages}"
        resources = f"{self.registers} | {self.spilled} | {self.shared / 1024:.0f} | {self.multiplier}"
        return f"{tile} | {self.capability} | {resources}"


def correlation_launches(dtype: torch.dtype, width: int) -> list[tuple[str, Launch]]:
    """Forward, then backward with both gradients and with either alone: (what for, launch)."""
    q, k, v = (torch.empty((2, 8, tokens, width), dtype=dtype, device="meta") for tokens in (257, 1025, 1025))
    found: list[tuple[str, Launch]] = []

    def keep(label: str, call: Callable[..., Any], *arguments: Any) -> Any:
        with keep_launches() as kept:
            result = call(*arguments)
        found.extend((label, launch) for launch in kept)
        return result

    attended, corr, stats = keep("", correlation.forward, q, k, v, width**-0.5, 1)
    gradients: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "": (attended, corr), "of attended": (attended, None), "of corr": (None, corr)
    }  # fmt: skip
    for label, given in gradients.items():
        keep(label, correlation.backward, *given, q, k, v, attended, stats, width**-0.5, 1)
    return found


def cross_scale_fusion_launches(dtype: torch.dtype, side: int) -> list[tuple[str, Launch]]:
    """Forward and backward where both sides, the source, the target, and neither are interpolated."""
    found = []
    table, out = torch.empty(side, device="meta"), [side, side, 0, 0, side]
    half = side // 2
    for label, source, target in (
        ("both", half, half),
        ("source", half, side),
        ("target", side, half),
        ("", side, side),
    ):
        corrs, grids = [torch.empty((2, source**2, target**2), dtype=dtype, device="meta")], [source] * 2 + [target] * 2
        with keep_launches() as kept:
            outputs = cross_scale_fusion.forward(corrs, grids, out, 0.02, table, table)
            cross_scale_fusion.backward(outputs[0], corrs, grids, out, 0.02, table, table, *outputs)
        found.extend((label, launch) for launch in kept)
    return found


def window_attention_launches(dtype: torch.dtype, window: int) -> list[tuple[str, Launch]]:
    """Forward and backward for the head widths of the models."""
    found = []
    for width in (12, 16, 32, 96):
        qkv = torch.empty((2, 128, 128, 3 * 8 * width), dtype=dtype, device="meta")
        table = torch.empty(((2 * window - 1) ** 2, 8), device="meta")
        with keep_launches() as kept:
            out = window_refinement.forward(qkv, table, 8, window, 0)
            window_refinement.backward(out, qkv, table, 8, window, 0)
        found.extend((f"of width {width}", launch) for launch in kept)
    return found


def window_stage_launches(dtype: torch.dtype, window: int) -> list[tuple[str, Launch]]:
    """The refinement of the tiny and of the base network, and of the latter under autocast, whose map is float32."""
    found = []
    kinds = {"of 48 channels": (48, 3, dtype), "of 96 channels": (96, 8, dtype)}
    if dtype != torch.float32:
        kinds["of 96 channels, autocast"] = (96, 8, torch.float32)
    for label, (c, heads, map_type) in kinds.items():
        norm, hidden = [(c,), (c,)], 4 * c
        shapes = [*norm, (3 * c, c), (3 * c,), ((2 * window - 1) ** 2, heads), (c, c), (c,), *norm]
        shapes += [(hidden, c), (hidden,), (c, hidden), (c,), *norm]
        # Under autocast a loaded network has its matrices and their biases in the lower type, not its normalisations.
        low = (2, 3, 5, 6, 9, 10, 11, 12)
        types = [dtype if place in low else map_type for place in range(len(shapes))]
        weights = [torch.empty(shape, dtype=kind, device="meta") for shape, kind in zip(shapes, types, strict=True)]
        x = torch.empty((2, 128, 128, c), dtype=map_type, device="meta")
        with keep_launches() as kept:
            window_stage.forward(x, weights, heads, window, 1e-5)
        found.extend((label, launch) for launch in kept)
    return found


def region_attention_launches(dtype: torch.dtype, width: int) -> list[tuple[str, Launch]]:
    """Forward and backward of two grids of 16 x 16, as the base network has them."""
    q, k, v = (torch.empty((2, 8, 514, width), dtype=dtype, device="meta") for _ in range(3))
    inputs = (q, k, v, torch.empty((8, 3844), device="meta"), [16, 16, 16, 16], 1)
    with keep_launches() as kept:
        outputs = region_attention.forward(*inputs)
        region_attention.backward(outputs[0], *inputs, *outputs)
    by_kernel = {launch.kernel: launch for launch in kept}  # the backward lays out the table once more
    return [("", launch) for launch in by_kernel.values()]


# Op -> its launches for an input type and a size. A new op adds a line.
LAUNCHES: dict[str, Callable[[torch.dtype, int], list[tuple[str, Launch]]]] = {
    "correlation": correlation_launches,
    "cross_scale_fusion": cross_scale_fusion_launches,
    "window_attention": window_attention_launches,
    "window_stage": window_stage_launches,
    "region_attention": region_attention_launches,
}


def compile_launch(label: str, launch: Launch, capability: int) -> Compiled:
    """Compile what `launch` would run, specialised for its arguments as Triton does when launching."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(path: tuple[int, ...], value: Any, is_constant: bool) -> Any:
        """The type of an argument or, for a tuple, of all in it; `path` leads there."""
        if isinstance(value, tuple) and not is_constant:
            types = [describe((*path, index), one, False) for index, one in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if value is None or is_constant or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return f"*{'i32' if value.dtype == torch.int32 else _TYPES[value.dtype]}"
        return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"

    for index, (name, value) in enumerate(launch.arguments.items()):
        signature[name] = describe((index,), value, launch.kernel.params[index].is_constexpr)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.tiles.options())
    registers, spilled = _resources(built.asm["cubin"])
    multiplier = next((name for name in _MULTIPLIERS if name in built.asm["ptx"]), "fma")
    kernel = f"{launch.kernel.fn.__name__.removesuffix('_kernel')} {label}".strip()
    return Compiled(kernel, launch.tiles, capability, registers, spilled, built.metadata.shared, multiplier)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) a thread, as the disassembler reads them from the binary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(field.split(":", 1) for field in said.split() if ":" in field)
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])


def report(
    ops: Sequence[str], dtypes: Sequence[torch.dtype], sizes: Sequence[int] | None, capabilities: Sequence[int]
) -> Iterator[tuple[str, str | None]]:
    """(line of the table, why it is at fault or None), as they are compiled."""
    yield "| op | kernel | type | size | tile | warps | stages | sm | registers | spilled | shared | multiplies |", None
    yield f"|{' --- |' * 12}", None
    for op in ops:
        for dtype in dtypes:
            for size in sizes or SIZES[op]:
                for label, launch in LAUNCHES[op](dtype, size):
                    for capability in capabilities:
                        one = compile_launch(label, launch, capability)
                        row = f"| {op} | {one.kernel} | {_TYPES[dtype]} | {size} | {one.cells()} |"
                        yield row, one.fault()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lpmflow_kernels.compile_report", description=__doc__)
    types = {name: dtype for dtype, name in _TYPES.items()}
    parser.add_argument("--op", nargs="+", choices=tuple(LAUNCHES), default=tuple(LAUNCHES))
    parser.add_argument("--type", nargs="+", choices=tuple(types), default=tuple(_TYPES[dtype] for dtype in DTYPES))
    parser.add_argument("--size", nargs="+", type=int, help="head widths D, sides of the output grid, or windows")
    parser.add_argument("--sm", nargs="+", type=int, choices=tuple(SHARED_LIMIT), default=CAPABILITIES)
    chosen = parser.parse_args(arguments)
    faults = []
    for line, fault in report(chosen.op, [types[name] for name in chosen.type], chosen.size, chosen.sm):
        print(line, flush=True)
        faults += [fault] if fault else []
    print("".join(f"\nfault: {fault}" for fault in faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
