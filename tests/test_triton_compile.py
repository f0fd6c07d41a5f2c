"""Every Triton kernel compiles for the GPUs we name, without spilling; a sample here, all by the report's command."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="Triton is not installed, or older than 3.4")

from lpmflow_kernels import (  # noqa: E402
    compile_report,
    correlation,
    cross_scale_fusion,
    region_attention,
    window_refinement,
    window_stage,
)
from lpmflow_kernels._launch import Tiles, keep_launches  # noqa: E402

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# What the models run: heads of 96 and 24; the types and architectures each seen at least once.
SAMPLE = [
    ("bf16", 96, 90),
    ("bf16", 96, 80),
    ("fp16", 96, 100),
    ("fp16", 24, 90),
    ("fp32", 24, 90),
]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Binaries are kept between runs, by Triton, outside the user's own cache."""
    if "TRITON_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "lpmflow-test-triton-cache"))


@pytest.mark.parametrize(("dtype", "width", "capability"), SAMPLE)
def test_correlation_compiles_without_spills(dtype, width, capability):
    launches = [launch for label, launch in compile_report.LAUNCHES["correlation"](TYPES[dtype], width) if label == ""]
    assert launches
    for launch in launches:
        compiled = compile_report.compile_launch("", launch, capability)
        assert compiled.fault() is None
        if dtype != "fp32":
            assert compiled.multiplier == {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[capability], compiled.kernel


@pytest.mark.parametrize(
    ("dtype", "width", "capability"), [("bf16", 96, 90), ("bf16", 96, 80), ("fp16", 96, 100), ("fp32", 32, 90)]
)
def test_region_attention_compiles_without_spills(dtype, width, capability):
    launches = compile_report.LAUNCHES["region_attention"](TYPES[dtype], width)
    names = [launch.kernel.fn.__name__ for _, launch in launches]
    assert names == ["lay_out_kernel", "attend_kernel", "dq_kernel", "dkv_kernel", "dtable_kernel"]
    for label, launch in launches:
        compiled = compile_report.compile_launch(label, launch, capability)
        assert compiled.fault() is None
        if dtype != "fp32" and compiled.kernel != "lay_out":
            assert compiled.multiplier == {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[capability], compiled.kernel


@pytest.mark.parametrize("grids", [(1, 1, 1, 1), (1, 5, 70, 1)])
def test_region_attention_of_single_rows_compiles(grids):
    hs, ws, ht, wt = grids
    q = torch.empty(1, 1, hs * ws + ht * wt, 1, device="meta")
    table = torch.empty(1, (2 * max(hs, ht) - 1) * (2 * max(ws, wt) - 1) * 4, device="meta")
    with keep_launches() as launches:
        outputs = region_attention.forward(q, q, q, table, list(grids), 0)
        region_attention.backward(outputs[0], q, q, q, table, list(grids), 0, *outputs)
    assert len(launches) == 6
    for launch in launches:
        assert compile_report.compile_launch("", launch, 80).registers > 0


@pytest.mark.parametrize(
    ("dtype", "side", "capability"), [("fp32", 32, 90), ("bf16", 32, 80), ("fp16", 24, 100), ("fp32", 64, 90)]
)
def test_cross_scale_fusion_compiles_without_spills(dtype, side, capability):
    launches = compile_report.LAUNCHES["cross_scale_fusion"](TYPES[dtype], side)
    assert len(launches) == 12
    for label, launch in launches:
        assert compile_report.compile_launch(label, launch, capability).fault() is None


@pytest.mark.parametrize(
    ("window", "dtype", "capability"),
    [
        *((4, "bf16", 90), (4, "fp16", 100), (4, "fp32", 80)),
        *((8, "bf16", 80), (8, "fp16", 90), (8, "fp32", 100)),
        *((16, "bf16", 100), (16, "fp16", 80), (16, "fp32", 90)),
        *((7, "bf16", 90), (12, "bf16", 100)),
    ],
)
def test_window_attention_compiles_without_spills(window, dtype, capability):
    """For the narrowest heads of the models; with the widest in their windows of 4 x 4."""
    widths = ("of width 12", "of width 96") if window == 4 else ("of width 12",)
    launches = [
        launch
        for label, launch in compile_report.LAUNCHES["window_attention"](TYPES[dtype], window)
        if label in widths and (dtype == "fp32" or launch.kernel is not window_refinement.grad_table_kernel)
    ]
    assert len({launch.kernel for launch in launches}) == (2 if window <= 8 else 5) + (dtype == "fp32")
    for launch in launches:
        compiled = compile_report.compile_launch("", launch, capability)
        assert compiled.fault() is None
        if dtype == "fp32":
            assert compiled.multiplier == "fma", compiled.kernel  # never as TF32
        elif window > 4:
            assert compiled.multiplier == {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[capability], compiled.kernel


def test_window_attention_of_sizes_and_strides_of_one_compiles():
    qkv, table = torch.empty(1, 1, 1, 3, device="meta"), torch.empty(1, 1, device="meta")
    with keep_launches() as launches:
        out = window_refinement.forward(qkv, table, 1, 1, 0)
        window_refinement.backward(out, qkv, table, 1, 1, 0)
    assert len(launches) == 3
    for launch in launches:
        assert compile_report.compile_launch("", launch, 80).registers > 0


@pytest.mark.parametrize(
    ("window", "dtype", "label", "capability"),
    [
        (16, "bf16", "of 96 channels, autocast", 90),
        (8, "fp16", "of 96 channels", 80),
        (4, "bf16", "of 96 channels, autocast", 100),
        (4, "fp32", "of 48 channels", 90),
    ],
)
def test_window_stage_compiles_without_spills(window, dtype, label, capability):
    launches = [x for name, x in compile_report.LAUNCHES["window_stage"](TYPES[dtype], window) if name == label]
    assert len(launches) == (3 if window > 8 or dtype == "fp32" else 2)
    for launch in launches:
        compiled = compile_report.compile_launch("", launch, capability)
        assert compiled.fault() is None
        if dtype == "fp32" or launch.kernel is window_stage.pool_kernel:
            assert compiled.multiplier == "fma", compiled.kernel  # never as TF32
        else:
            assert compiled.multiplier == {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[capability], compiled.kernel


def test_window_stage_of_sizes_and_strides_of_one_compiles():
    ones = [(1,), (1,), (3, 1), (3,), (1, 1), (1, 1), *[(1,)] * 3, (1, 1), (1,), (1, 1), *[(1,)] * 3]
    weights = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ones]
    with keep_launches() as launches:
        window_stage.forward(weights[0].new_empty(1, 1, 1, 1), weights, 1, 1, 1.0)
    assert len(launches) == 2
    for launch in launches:
        assert compile_report.compile_launch("", launch, 80).registers > 0


def test_cross_scale_fusion_of_single_cells_compiles():
    table = torch.empty(1, device="meta")
    for source, target in ((1, 1), (1, 2), (2, 1), (2, 2)):
        corrs, grids = [torch.empty(1, source, target, device="meta")], [source, 1, 1, target]
        with keep_launches() as launches:
            outputs = cross_scale_fusion.forward(corrs, grids, [1, 1, 0, 0, 1], 0.02, table, table)
            cross_scale_fusion.backward(outputs[0], corrs, grids, [1, 1, 0, 0, 1], 0.02, table, table, *outputs)
        assert len(launches) == 3
        for launch in launches:
            assert compile_report.compile_launch("", launch, 80).registers > 0


def test_sizes_and_strides_of_one_compile():
    """Triton makes constants of arguments that are 1."""
    q, k, v = (torch.empty(2, 1, tokens, 1, device="meta") for tokens in (1, 2, 2))
    with keep_launches() as launches:
        attended, corr, stats = correlation.forward(q, k, v, 1.0, 0)
        correlation.backward(attended, corr, q, k, v, attended, stats, 1.0, 0)
        correlation.forward(*(x.new_empty(1, 1, 2, 1) for x in (q, k, v)), 1.0, 1)
    assert len(launches) == 7
    for launch in launches:
        assert compile_report.compile_launch("", launch, 80).registers > 0


def test_a_spill_is_seen():
    """Tiles far too large for their warps: the report must say so, and its command must fail."""
    launches = [launch for label, launch in compile_report.LAUNCHES["correlation"](torch.bfloat16, 128) if label == ""]
    (launch,) = (launch for launch in launches if launch.kernel is correlation.dkv_kernel)
    large = replace(launch, tiles=Tiles(64, 64, 1, 1), arguments={**launch.arguments, "BLOCK_Q": 64, "BLOCK_K": 64})
    compiled = compile_report.compile_launch("", large, 80)
    assert compiled.spilled > 100 and compiled.fault() == f"dkv spills {compiled.spilled} bytes a thread on 80"


def test_too_much_shared_memory_is_a_fault():
    compiled = compile_report.Compiled("dq", Tiles(64, 64, 4, 2), 90, 168, 0, 100 * 1024, "wgmma")
    assert compiled.fault() is None
    assert (
        replace(compiled, capability=80).fault() == "dq wants 102400 bytes of shared memory on 80, the limit is 101376"
    )


def test_the_command_prints_a_table_and_its_status_says_whether_there_are_faults(capsys, monkeypatch):
    arguments = ["--type", "bf16", "--op", "correlation", "--size", "96", "--sm", "90"]
    good = compile_report.Compiled("dq", Tiles(64, 32, 4, 2), 90, 128, 0, 57344, "wgmma")
    monkeypatch.setattr(compile_report, "compile_launch", lambda *_: good)
    assert compile_report.main(arguments) == 0
    printed = capsys.readouterr()
    assert "| correlation | dq | bf16 | 96 | 64 x 32 | 4 | 2 | 90 | 128 | 0 | 56 | wgmma |" in printed.out
    monkeypatch.setattr(compile_report, "compile_launch", lambda *_: replace(good, spilled=24))
    assert compile_report.main(arguments) == 1
    assert "dq spills 24 bytes a thread on 90" in capsys.readouterr().err
