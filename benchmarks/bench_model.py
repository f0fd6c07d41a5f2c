"""The network as a whole: against the released network's own structure, by batch size, in memory, and stage by stage.

Weights are random and images noise, which changes nothing about the time. "lpmflow" is what a `Matcher` runs; on a GPU
both ways are measured under `torch.compile` as well, and on the CPU where `--compile` is given, which takes minutes.
"""

from __future__ import annotations

import contextlib
import copy
import functools

import memory
import pytest
import torch
from released import released_structure
from timing import interleaved
from torch.utils.flop_counter import FlopCounterMode

from lpmflow import profile
from lpmflow.config import preset
from lpmflow.model import LPMFlow, create_model
from lpmflow.model.inference import keep_weights_in

PRESETS = ("lpmflow-base", "lpmflow-tiny")
DTYPES = ("float32", "bfloat16")
BATCHES = {"cpu": {"lpmflow-base": (1,), "lpmflow-tiny": (1, 4)}, "cuda": dict.fromkeys(PRESETS, (1, 8, 32))}


@functools.lru_cache(maxsize=1)
def network(name: str) -> LPMFlow:
    """With random weights, made once for all measurements of it."""
    torch.manual_seed(0)
    return create_model(name).eval()


def runs(name: str, dtype: str, device: torch.device, batch: int, *, compiled: bool) -> dict:
    """Each way to compute the flow of the same pairs."""
    plain, precision = network(name).to(device), getattr(torch, dtype)
    prepared = copy.deepcopy(plain)
    if dtype != "float32":
        keep_weights_in(prepared, precision)
    images = torch.randn(2, batch, 3, *plain.config.image_size, device=device)

    def within(function, around=contextlib.nullcontext):
        def run():
            half = torch.autocast(device.type, precision) if dtype != "float32" else contextlib.nullcontext()
            with torch.inference_mode(), half, around():
                return function(*images).flow

        return run

    found = {
        "released structure": within(plain, lambda: released_structure(plain)),
        "lpmflow": within(prepared),
    }
    if compiled:
        mode = "reduce-overhead" if device.type == "cuda" else None
        faster = torch.compile(prepared, fullgraph=True, dynamic=False, mode=mode)
        slower = torch.compile(plain, dynamic=False)
        found["released structure, torch.compile"] = within(slower, lambda: released_structure(plain))
        found["lpmflow, torch.compile"] = within(faster)
    wanted = found["released structure"]()
    for way, run in found.items():
        allowed = 1e-3 if dtype == "float32" and device.type == "cpu" else 1.0
        assert (run() - wanted).abs().max() <= allowed, f"{way} answers otherwise"
    return found


def skip_what_is_imitated(dtype: str, device: torch.device) -> None:
    if device.type == "cpu" and dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor does not compute in bfloat16, and its imitation takes minutes")


def test_released_operations():
    """The structure compared with is the released one: 384 GFLOP a pair."""
    weightless = create_model("lpmflow-base").eval().to("meta")
    images = torch.empty(2, 1, 3, *weightless.config.image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter, released_structure(weightless):
        weightless(*images)
    assert counter.get_total_flops() == pytest.approx(384e9, rel=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRESETS)
def test_speed(name, dtype, device, seconds, report, request):
    skip_what_is_imitated(dtype, device)
    compiled = device.type == "cuda" or request.config.getoption("--compile")
    for batch in BATCHES[device.type][name]:
        ways = runs(name, dtype, device, batch, compiled=compiled)
        times = interleaved(ways, device, seconds=seconds, rounds=3, warm=0)  # `runs` has run each
        for way, time in times.items():
            report.add(
                "whole network",
                model=name,
                dtype=dtype,
                pairs=batch,
                way=way,
                ms=1e3 * time,
                ratio=times["released structure"] / time,
                pairs_per_second=batch / time,
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRESETS)
def test_stages(name, dtype, device, report):
    if device.type == "cpu" and dtype != "float32":
        pytest.skip("on a CPU in float32 only, for time; lpmflow profile --dtype bfloat16 shows it")
    model, precision = copy.deepcopy(network(name)).to(device), getattr(torch, dtype)
    if dtype != "float32":
        keep_weights_in(model, precision)
    found = profile.profile(model, dtype=precision, seconds=0)
    whole = sum(stage.seconds for stage in found.stages)
    for stage in found.stages:
        report.add(
            f"{name}, one pair of {preset(name).image_size[0]} pixels, stage by stage",
            dtype=dtype,
            stage=stage.name,
            GFLOP=stage.flops / 1e9,
            MB=stage.bytes / 1e6,
            ms=1e3 * stage.seconds,
            share=f"{100 * stage.seconds / whole:.0f} %",
            roofline=f"{100 * stage.roofline:.0f} %" if stage.bytes else None,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRESETS)
def test_peak_memory(name, dtype, device, report):
    memory.skip_unless_known(device)
    skip_what_is_imitated(dtype, device)
    for way, released in (("released structure", True), ("lpmflow", False)):
        beside, weights = memory.in_a_process(memory.of_network, name, dtype, released, str(device))
        report.add(
            "memory of one pair",
            model=name,
            dtype=dtype,
            way=way,
            weights_MiB=weights / 2**20,
            beside_them_MiB=beside / 2**20,
        )
