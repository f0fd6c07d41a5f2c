"""Where the time of one match goes: operations, bytes, seconds and share of the roofline, stage by stage.

Operations and bytes are counted on a copy of the network without memory ("meta" tensors) on the reference backend, so
they are those of the mathematics, whatever kernel computes it. Seconds are measured on the network itself.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lpmflow.memory import explained

if TYPE_CHECKING:
    from lpmflow.model import LPMFlow

BETWEEN = "between the stages"


@dataclass(frozen=True)
class Peaks:
    """What a device reached in a large matrix product and in a large copy."""

    flops: float
    """Operations a second, two a multiply-add."""
    bytes: float
    """Bytes a second, read and written together."""

    def floor(self, flops: float, moved: float) -> float:
        """The least seconds a computation of that size can take: its roofline."""
        return max(flops / self.flops, moved / self.bytes)


@dataclass(frozen=True)
class Stage:
    """One part of the network, all its calls within one forward pass together."""

    name: str
    calls: int
    flops: int
    """Of every matrix product and convolution, two a multiply-add."""
    bytes: int
    """Its parameters, what goes in and what comes out, each once and in the dtype that is computed in."""
    seconds: float
    """Median of one forward pass, without the stages inside it."""
    roofline: float
    """Share of it that the device's peaks would need, from 0 to 1."""


@dataclass(frozen=True)
class Profile:
    """What `profile` returns."""

    model: str
    batch_size: int
    image_size: tuple[int, int]
    dtype: str
    device: str
    threads: int
    peaks: Peaks
    seconds: float
    """Median of the whole forward pass, measured without the stages' clocks."""
    stages: tuple[Stage, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `json.dumps` takes them."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """A table for the screen."""
        pairs = f"{self.batch_size} pair" + ("s" if self.batch_size > 1 else "")
        height, width = self.image_size
        threads = f" ({self.threads} threads)" if self.device == "cpu" else ""
        total = sum(stage.flops for stage in self.stages)
        measured = sum(stage.seconds for stage in self.stages)
        rows = [("stage", "calls", "GFLOP", "MB", "ms", "share", "GFLOP/s", "roofline")]
        for stage in self.stages:
            rate = f"{stage.flops / stage.seconds / 1e9:.0f}" if stage.flops and stage.seconds else "-"
            share, roofline = (f"{100 * part:.0f} %" for part in (stage.seconds / measured, stage.roofline))
            size = (f"{stage.flops / 1e9:.2f}", f"{stage.bytes / 1e6:.1f}", f"{1e3 * stage.seconds:.2f}")
            rows.append((stage.name, str(stage.calls), *size, share, rate, roofline if stage.bytes else "-"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = [
            "  ".join(cell.rjust(size) if column else cell.ljust(size) for column, (cell, size) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        return [
            f"{self.model}, {pairs}, {height}x{width}, {self.dtype}, {self.device}{threads}",
            f"one forward pass {1e3 * self.seconds:.1f} ms, {self.batch_size / self.seconds:.2f} pairs/s, "
            f"{total / 1e9:.1f} GFLOP, {total / self.seconds / 1e9:.0f} GFLOP/s",
            f"this device's peaks: {self.peaks.flops / 1e9:.0f} GFLOP/s in a large product, "
            f"{self.peaks.bytes / 1e9:.0f} GB/s in a large copy",
            "",
            *table,
        ]


def network(
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> tuple[LPMFlow, torch.dtype]:
    """What a `Matcher` of these arguments would run, and the type it computes in; a preset gets random weights."""
    from lpmflow.matcher import DEFAULT_MODEL, as_device, as_dtype
    from lpmflow.model import create_model, list_models, load_checkpoint
    from lpmflow.model.inference import keep_weights_in

    place, precision = as_device(device), as_dtype(dtype)
    named = model if model is not None else DEFAULT_MODEL
    size: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    if named in list_models():
        found = create_model(str(named), **size)
    elif Path(named).is_file():
        found = load_checkpoint(named, **size)
    else:
        raise ValueError(f"model must be one of {', '.join(list_models())} or the path of a checkpoint, got {named!r}")
    if precision != torch.float32:
        keep_weights_in(found, precision)
    return found.to(place).eval(), precision


def profile(
    model: LPMFlow, *, batch_size: int = 1, dtype: torch.dtype = torch.float32, seconds: float = 3.0
) -> Profile:
    """Run `model` as a `Matcher` runs it, on images of noise, and take its time apart.

    Args:
        model: an `LPMFlow` in evaluation mode, on the device to measure; its weights may be random.
        batch_size: pairs in one forward pass.
        dtype: float32, bfloat16 or float16; the network computes in the last two by autocast.
        seconds: how long to measure, at least; two passes, whole and in parts, are the least.

    On a GPU the device is waited for at the border of every stage, so that a small batch takes longer stage by stage
    than as a whole. Raises ValueError or TypeError naming the argument, also for a model in training
    mode, and RuntimeError when the memory does not suffice.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool):
        raise TypeError(f"batch_size must be an integer, got {type(batch_size).__name__}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be at least 0 and finite, got {seconds}")
    if model.training:
        raise ValueError("model must be in evaluation mode, got one in training mode; call its eval()")
    device = next(model.parameters()).device
    shape = (batch_size, 3, *model.config.image_size)
    flops, moved = _count(model, shape, dtype)
    images = torch.randn(2, *shape, device=device)
    half = dtype != torch.float32

    def run() -> None:
        mixed = torch.autocast(device.type, dtype) if half else contextlib.nullcontext()
        with explained(batch_size, model.config.image_size, device), torch.inference_mode(), mixed:
            model(*images)
            _wait(device)

    def clock() -> float:
        _wait(device)
        return time.perf_counter()

    run()
    whole: list[float] = []
    parts: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    begin = time.perf_counter()
    while len(whole) < 2 or time.perf_counter() - begin < seconds:
        start = clock()
        run()
        whole.append(clock() - start)
        with _metered(model, clock) as meter:
            run()
        calls = meter.calls
        for name, taken in meter.spent.items():
            parts.setdefault(name, []).append(taken)
    peaks = measure_peaks(device, dtype)
    stages = []
    for name, taken_by_part in parts.items():
        median = statistics.median(taken_by_part)
        size = int(flops.get(name, 0)), moved.get(name, 0)
        stages.append(Stage(name, calls[name], *size, median, peaks.floor(*size) / median if median else 0.0))
    return Profile(
        model=model.config.name,
        batch_size=batch_size,
        image_size=model.config.image_size,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        threads=torch.get_num_threads(),
        peaks=peaks,
        seconds=statistics.median(whole),
        stages=tuple(stages),
    )


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The best of a few large products in `dtype` and of a few large copies."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.zeros(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.zeros_like(source)

    def best(run: Callable[[], object]) -> float:
        times = []
        for _ in range(8):
            _wait(device)
            begin = time.perf_counter()
            run()
            _wait(device)
            times.append(time.perf_counter() - begin)
        return min(times)

    product, moved = best(lambda: torch.mm(a, b, out=out)), best(lambda: target.copy_(source))
    return Peaks(2 * side**3 / product, 2 * source.numel() * source.itemsize / moved)


class _Meter:
    """What a reading grew by within each stage, without the stages inside it."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.spent: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.moved: dict[str, int] = {}
        self._inside: list[float] = []

    def around(self, name: str, parts: tuple[nn.Module, ...], function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, read before and after."""

        def metered(*args: Any, **kwargs: Any) -> Any:
            self.spent.setdefault(name, 0.0)  # in the order in which they begin
            self._inside.append(0.0)
            begin = self.read()
            result = function(*args, **kwargs)
            taken = self.read() - begin
            self.spent[name] += taken - self._inside.pop()
            if self._inside:
                self._inside[-1] += taken
            self.calls[name] = self.calls.get(name, 0) + 1
            if name != BETWEEN:
                used = {id(x): x.numel() for x in _tensors((args, kwargs, result))}
                used |= {id(p): p.numel() for part in parts for p in part.parameters()}
                self.moved[name] = self.moved.get(name, 0) + sum(used.values())
            return result

        return metered


@contextlib.contextmanager
def _metered(model: LPMFlow, read: Callable[[], float]) -> Iterator[_Meter]:
    """`model` with a meter around each stage, which within the block stands in the place of its method."""
    meter = _Meter(read)
    superres, integration = model.superres, model.integration
    refinement = (integration.context, integration.stages, integration.gates, integration.head_hidden)
    stages: list[tuple[str, nn.Module | None, str, tuple[nn.Module, ...]]] = [
        (BETWEEN, model, "forward", ()),
        ("backbone", model.backbone, "forward", (model.backbone,)),
        ("layout encoder", model.layout, "forward", (model.layout,)),
        ("matching 11", superres.match_coarse, "forward", (superres.match_coarse,)),
        ("super-resolution", superres.upsample, "forward", (superres.upsample,)),
        ("matching 12, 21", superres.match_cross, "forward", (superres.match_cross,) if superres.match_cross else ()),
        ("matching 22", superres.match_fine, "forward", (superres.match_fine,)),
        ("correlation to flow", integration, "fuse", ()),
        ("correlation to flow", integration, "correlate", ()),
        ("refinement", integration, "refine", (*refinement, integration.head_out)),
    ]
    placed = []
    try:
        for name, owner, method, parts in stages:
            if owner is not None:
                owner.__dict__[method] = meter.around(name, parts, getattr(owner, method))
                placed.append((owner, method))
        yield meter
    finally:
        for owner, method in placed:
            del owner.__dict__[method]


def _count(model: LPMFlow, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, float], dict[str, int]]:
    """Operations and bytes of each stage."""
    from torch.utils.flop_counter import FlopCounterMode

    from lpmflow import ops

    memo: dict[int, Any] = {
        id(x): nn.Parameter(torch.empty_like(x, device="meta", dtype=torch.float32)) for x in model.parameters()
    }
    memo |= {id(x): torch.empty_like(x, device="meta") for x in model.buffers()}
    weightless = copy.deepcopy(model, memo)
    images = torch.empty(2, *shape, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), ops.use_backend("reference"), counter, _metered(weightless, counter.get_total_flops) as meter:
        weightless(*images)
    return meter.spent, {name: elements * dtype.itemsize for name, elements in meter.moved.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
