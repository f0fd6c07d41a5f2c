"""Peak memory of one call, each in a process of its own: what an allocator kept from earlier calls would hide it.

The processes are forked from one that has imported PyTorch and lpmflow and done nothing yet, which spares each of them
the seconds that takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import shapes
import torch
from released import released_structure
from torch import Tensor

import lpmflow
from lpmflow import ops, profile
from lpmflow.model import create_model

_PROCESSES = multiprocessing.get_context("forkserver" if sys.platform.startswith("linux") else "spawn")
if sys.platform.startswith("linux"):
    _PROCESSES.set_forkserver_preload(["torch", "lpmflow.matcher", "lpmflow.profile", "lpmflow_kernels.native"])


def skip_unless_known(device: torch.device) -> None:
    if device.type == "cpu" and not sys.platform.startswith("linux"):
        pytest.skip("peak memory of the process is known on Linux only")


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` is one of a module."""
    with ProcessPoolExecutor(1, mp_context=_PROCESSES) as process:
        return process.submit(function, *arguments).result()


class Peak:
    """Bytes by which something raised the peak of the process or of the GPU."""

    bytes = 0


@contextlib.contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    found = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    gc.collect()
    # Free memory that is kept would hide what takes its place.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    before = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    yield found
    found.bytes = _resident("VmHWM") - before


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def of_operation(op: str, name: str, batch: int, backend: str, dtype: torch.dtype, device: str, backward: bool) -> int:
    """Of one workload of `shapes.py`, beside its inputs and results."""

    def run(stage: Any, inputs: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(backward) for x in inputs]
        results = [*stage.run(leaves, backend)]
        if backward:
            ones = [torch.ones_like(x) for x in results]
            results += [*ones, *torch.autograd.grad(results, leaves, ones)]
        return results

    place = torch.device(device)
    stage = next(stage for stage in getattr(shapes, op)(batch) if stage.name == name)
    small = stage.small()
    run(small, small.inputs(dtype, place))  # threads and libraries are not what is measured
    inputs = stage.inputs(dtype, place)
    with peak(place) as found:
        kept = run(stage, inputs)
    return found.bytes - sum(x.numel() * x.element_size() for x in kept)


def of_network(name: str, dtype: str, released: bool, device: str) -> tuple[int, int]:
    """Of one pair beside the weights, and these."""
    place, precision = torch.device(device), getattr(torch, dtype)
    model = create_model(name).eval().to(place) if released else profile.network(name, device, dtype)[0]

    def run(model: Any, side: tuple[int, int]) -> None:
        images = torch.zeros(2, 1, 3, *side, device=place)
        half = torch.autocast(place.type, precision) if dtype != "float32" else contextlib.nullcontext()
        with torch.inference_mode(), half, released_structure(model) if released else contextlib.nullcontext():
            model(*images)

    run(create_model("lpmflow-tiny", image_size=96).eval().to(place), (96, 96))
    if place.type == "cuda":
        run(model, model.config.image_size)
    with peak(place) as found:
        run(model, model.config.image_size)
    return found.bytes, sum(p.numel() * p.element_size() for p in model.parameters())


def of_image_size(size: int, backend: str | None, whole: bool, device: str) -> tuple[float, int]:
    """Seconds and bytes of one pair of `size` pixels through lpmflow-tiny."""
    place = torch.device(device)
    model = lpmflow.Matcher(image_size=size, device=device).model
    torch.manual_seed(0)
    source, target = torch.randn(2, 1, 3, size, size, device=place)
    small = lpmflow.Matcher(device=device).model
    with torch.inference_mode():
        small(*torch.zeros(2, 1, 3, 192, 192, device=place))

    def run() -> None:
        with torch.inference_mode(), ops.use_backend(backend):
            model(source, target, return_correlations=whole)
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    if place.type == "cuda":
        run()
    with peak(place) as found:
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
    return seconds, found.bytes
