"""The CUDA cross_scale_fusion without a GPU: its own source on the emulated device, its binding, and what nvcc says."""

from __future__ import annotations

import ctypes
import importlib
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import ARCHITECTURES, Called, Context, Output, amid_nan, assert_nothing_spills, emulated, native_on
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lpmflow import ops, reference
from lpmflow.ops.cross_scale_fusion import fuse_part
from lpmflow.reference.cross_scale_fusion import interpolate_volume

SINGLE_AND_HALVES = [torch.float32, torch.float16, torch.bfloat16]
MOST_SCALES = 8
# B, then source and target grid of each scale, then the output grid
FOUR = (2, [((3, 5), (4, 6)), ((6, 10), (4, 6)), ((3, 5), (6, 10)), ((6, 10), (6, 10))], (6, 10))
CASES = [
    (1, [((1, 1), (1, 1))], (1, 1)),
    (2, [((1, 1), (1, 1)), ((3, 2), (3, 2))], (3, 2)),
    (1, [((1, 1), (1, 1)), ((1, 1), (2, 2)), ((2, 2), (1, 1))], (2, 2)),
    (1, [((1, 4), (2, 1)), ((2, 2), (5, 3)), ((3, 1), (5, 7))], (5, 7)),
    FOUR,
    (1, [((7, 9), (11, 5)), ((17, 3), (2, 19))], (5, 6)),  # to smaller grids
    (1, [((5, 4), (30, 31))], (3, 33)),  # by a little, and beyond the lanes of a warp
    (1, [((2, 3), (2, 63))], (2, 97)),
    (3, [((4, 4), (9, 33))], (2, 1)),
    (1, [((3, 3), (3, 3)), ((5, 5), (3, 3)), ((3, 3), (5, 5))], (5, 5)),
]


class Scale(ctypes.Structure):
    """FusionScale of csrc/cross_scale_fusion/cross_scale_fusion.h."""

    _fields_ = [
        ("corr", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "row", "hs", "ws", "ht", "wt", "first_line", "lines")),
        ("grad", ctypes.c_void_p),
    ]


class Args(ctypes.Structure):
    """FusionCudaArgs of csrc/cross_scale_fusion/cross_scale_fusion_cuda.h."""

    _fields_ = [
        ("scale", Scale * MOST_SCALES),
        *((name, ctypes.c_int64) for name in ("first_scale", "count", "scales")),
        *((name, ctypes.c_int64) for name in ("batch", "h", "w", "first_row", "rows")),
        ("exponent", ctypes.c_float),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("x", "y", "mapping", "confidence", "largest")),
    ]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """`_native.cross_scale_fusion_forward_cuda` by the emulated kernels; threads run in an order `seed` determines."""
    run = emulated("cross_scale_fusion", tmp_path_factory.mktemp("emulated"))

    def forward(
        scales: Sequence[Any],
        sizes: Any,
        temperature: float,
        dtype: int,
        device: int,
        stream: int,
        *pointers: int,
        seed: int = 0,
    ) -> int:
        assert (device, stream) == (0, 0)
        for first in range(0, len(scales), MOST_SCALES):
            some = [Scale(*scale) for scale in scales[first : first + MOST_SCALES]]
            counts = (first, len(some), len(scales))
            exponent = 1.4426950408889634 / temperature
            status = run(Args((Scale * MOST_SCALES)(*some), *counts, *sizes, exponent, dtype, *pointers), seed)
            if status != 0:
                return status
        return 0

    return forward


@pytest.fixture
def native(launch: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """`lpmflow_kernels.native.cross_scale_fusion`, whose CUDA function takes CPU tensors: to the emulated device."""
    return native_on("cross_scale_fusion", launch, monkeypatch)


def inputs(case: Any, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    """Correlations that make neither uniform nor one-hot distributions at temperature 0.1, and uneven tables."""
    batch, scales, out = case
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, s[0] * s[1], t[0] * t[1]) for s, t in scales]
    corrs = [amid_nan(torch.rand(shape, generator=generator).to(dtype)) for shape in shapes]
    x, y = (torch.randn(side, generator=generator) for side in (out[1], out[0]))
    return corrs, x, y


def run(
    launch: Any, case: Any, corrs: list[Tensor], x: Tensor, y: Tensor, temperature: float = 0.1, seed: int = 0
) -> Any:
    """(mapping, confidence, largest), into guarded memory."""
    batch, scales, (h, w) = case
    shapes = ((batch, len(scales), 2, h, w), (batch, len(scales), h, w), (batch, len(scales), h, w))
    outputs = [Output(shape, None) for shape in shapes]
    dtype = importlib.import_module("lpmflow_kernels.native").DTYPES[corrs[0].dtype]
    told = [
        (corr.data_ptr(), *corr.stride()[:2], *source, *target, 0, source[0], 0)
        for corr, (source, target) in zip(corrs, scales, strict=True)
    ]
    pointers = (x.data_ptr(), y.data_ptr(), *(output.tensor.data_ptr() for output in outputs))
    launch(told, (batch, h, w, 0, h), temperature, dtype, 0, 0, *pointers, seed=seed)
    return [output.checked() for output in outputs]


def expected(case: Any, corrs: list[Tensor], x: Tensor, y: Tensor, temperature: float = 0.1) -> list[Tensor]:
    """mapping, confidence and largest by the reference in float64."""
    _, scales, out = case
    sides = [s for s, _ in scales], [t for _, t in scales]
    corrs = [corr.double() for corr in corrs]
    tables = {"x": x.double(), "y": y.double()}
    found = reference.cross_scale_fusion(corrs, *sides, out_grid=out, temperature=temperature, **tables)
    largest = [interpolate_volume(corr, *grids, out).amax(-1) for corr, grids in zip(corrs, scales, strict=True)]
    return [*found, torch.stack(largest, 1)]


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 2e-5) -> None:
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


# On the emulated device


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(launch, case, dtype):
    arguments = inputs(case, dtype)
    found = run(launch, case, *arguments)
    assert_close(found, expected(case, *arguments))
    for value, again in zip(found, run(launch, case, *arguments, seed=3), strict=True):
        assert torch.equal(value, again)


@pytest.mark.parametrize("target", [(61, 67), (71, 97), (111, 112)], ids=["three warps", "one", "none: no room"])
def test_rows_that_leave_shared_memory_less_room(launch, target):
    case = (1, [((2, 1), target), ((3, 2), (2, 2))], (3, 2))
    arguments = inputs(case)
    assert_close(run(launch, case, *arguments), expected(case, *arguments))


def test_the_models_temperature(launch):
    arguments = inputs(FOUR)
    assert_close(run(launch, FOUR, *arguments, temperature=0.02), expected(FOUR, *arguments, temperature=0.02), 1e-4)


@pytest.mark.parametrize("level", [1e4, -1e4, 123.456])
def test_constant_rows_are_uniform_even_where_logits_are_large(launch, level):
    corrs, x, y = inputs(FOUR)
    for corr in corrs:
        corr.copy_((level * (1 + torch.arange(corr.shape[1])))[:, None].expand(corr.shape[1:]))
    mapping, confidence, _ = run(launch, FOUR, corrs, x, y, temperature=0.02)
    torch.testing.assert_close(confidence, torch.full_like(confidence, 1 / 60), rtol=3e-7, atol=0)
    torch.testing.assert_close(mapping[:, :, 0], x.mean().expand(2, 4, 6, 10), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mapping[:, :, 1], y.mean().expand(2, 4, 6, 10), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_extreme_logits(launch, level):
    """Whole numbers up to 1e4 at temperature 0.02, halved at most twice, so that what is compared is not luck."""
    case = (2, [((2, 3), (3, 2)), ((3, 5), (2, 3)), ((3, 5), (3, 5))], (3, 5))
    corrs, x, y = inputs(case)
    corrs = [(corr * level / 4).round() * 4 for corr in corrs]
    corrs[2][..., 1::2] = corrs[2][..., :-1:2]  # ties
    found = run(launch, case, corrs, x, y, temperature=0.02)
    assert_close(found, expected(case, corrs, x, y, temperature=0.02))
    assert (found[1][:, 1] == 1).sum() > 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", [FOUR, CASES[5], CASES[3]], ids=str)
def test_nan_and_infinity_come_out_where_they_should(launch, case, value):
    """In one element of each tensor; everything else is as finite as the reference has it."""
    corrs, x, y = inputs(case)
    for s, corr in enumerate(corrs):
        corr[0].view(-1)[-(s % 2)] = value
    _, scales, out = case
    grids = [s for s, _ in scales], [t for _, t in scales]
    wanted = reference.cross_scale_fusion(corrs, *grids, out_grid=out, temperature=0.1, x=x, y=y)
    assert wanted[0].isnan().any()
    assert_close(run(launch, case, corrs, x, y)[:2], wanted)


def test_an_axis_that_keeps_its_length_reads_no_neighbours(launch):
    case = (1, [((4, 3), (4, 6)), ((2, 6), (4, 3)), ((4, 6), (2, 6))], (4, 6))
    corrs, x, y = inputs(case)
    corrs[0][0, 4] = corrs[1][0, 7, 4] = corrs[2][0, 20] = float("nan")
    found, wanted = run(launch, case, corrs, x, y), expected(case, corrs, x, y)
    for value, other in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(value.isnan(), other.isnan())
        assert value.isnan().any() and value.isfinite().any()


def test_cells_out_of_the_question(launch):
    case = (1, [((4, 5), (4, 5))], (4, 5))
    corrs, x, y = inputs(case)
    corrs[0][..., :13] = float("-inf")
    corrs[0][:, 6] = float("-inf")  # a whole row, which is NaN
    found = run(launch, case, corrs, x, y)
    assert_close(found[:2], expected(case, corrs, x, y)[:2])
    assert found[1].isnan().sum() == 1


@pytest.mark.parametrize(("dtype", "status"), [(torch.float64, 801), (torch.float32, 1)], ids=str)
def test_what_it_does_not_take(launch, dtype, status):
    case = (1, [((2, 2), (2, 2) if dtype == torch.float64 else (2, 0))], (2, 2))
    with pytest.raises(RuntimeError, match=f"status {status}:"):
        run(launch, case, *inputs(case, dtype))


# The binding


def test_through_the_operators_own_function(native):
    """Any layout, tables of any type, more scales than one launch takes."""
    batch, scales, out = FOUR
    case = (batch, scales + scales[:3] + scales[1:3], out)
    corrs, x, y = inputs(case)
    corrs[1] = corrs[1].mT.contiguous().mT
    corrs[2] = corrs[2].repeat_interleave(2, dim=-1)[..., ::2]
    corrs[3] = corrs[3][:, :1].expand(-1, 60, -1)
    grids = [side for pair in case[1] for grid in pair for side in grid]
    tables = x.double(), y.repeat_interleave(2)[::2]
    found = native._forward_cuda(corrs, grids, [6, 10, 0, 0, 6], 0.1, *tables)
    assert all(value.dtype == torch.float32 for value in found)
    assert_close(found, expected(case, corrs, x, y))


@pytest.mark.parametrize(("source", "part"), [((3, 5), (1, 3, 2)), ((6, 10), (2, 2, 3)), ((3, 5), (0, 0, 3))], ids=str)
def test_a_block_of_rows(native, source, part):
    case = (2, [(source, (4, 6))], (6, 10))
    (corr,), x, y = inputs(case)
    first_line, first_row, rows = part
    lines = rows if source == (6, 10) else 2
    some = corr[:, first_line * source[1] : (first_line + lines) * source[1]]
    found = native._forward_cuda([some], [*source, 4, 6], [6, 10, *part], 0.1, x, y)
    wanted = expected(case, [corr], x, y)
    assert_close(found, [value[..., first_row : first_row + rows, :] for value in wanted])


def test_a_block_without_a_line_that_it_needs_is_refused(native):
    for part in ((1, 2, 2), (0, 3, 2)):
        with pytest.raises(ValueError, match="corrs must have those lines that the output rows lie between"):
            native._forward_cuda([torch.rand(1, 10, 4)], [3, 5, 2, 2], [6, 10, *part], 0.1, *inputs(FOUR)[1:])


def test_nothing_in_nothing_out(native):
    corrs, x, y = inputs((0, *FOUR[1:]))
    grids = [side for pair in FOUR[1] for grid in pair for side in grid]
    mapping, confidence, _ = native._forward_cuda(corrs, grids, [6, 10, 0, 0, 6], 0.1, x, y)
    assert mapping.shape == (0, 4, 2, 6, 10) and confidence.shape == (0, 4, 6, 10)


def test_the_compiled_function_takes_these_arguments(monkeypatch):
    """It comes as far as asking for a device, of which there is none."""
    module = importlib.import_module("lpmflow_kernels.native.cross_scale_fusion")
    if (missing := importlib.import_module("lpmflow_kernels.native").cuda_reason) is not None:
        pytest.skip(missing)
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here, which must not be given addresses of the CPU")
    monkeypatch.setattr(module, "place_of", lambda x: (0, 0))
    corrs, x, y = inputs(FOUR)
    grids = [side for pair in FOUR[1] for grid in pair for side in grid]
    with pytest.raises(RuntimeError, match="cross_scale_fusion: the native backend's launch failed with CUDA error"):
        module._forward_cuda(corrs, grids, [6, 10, 0, 0, 6], 0.1, x, y)


@contextmanager
def made_up_tensors() -> Iterator[None]:
    """Tensors with sizes and types and no numbers, on any device; older releases ask CUDA's driver about them too."""
    try:
        with FakeTensorMode():
            yield
    except RuntimeError as error:
        if "CUDA driver version is insufficient" not in str(error):
            raise
        pytest.skip("this PyTorch has no made-up CUDA tensors without a driver")


def on_cuda(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The operation on made-up CUDA tensors, which have sizes and types and no numbers."""
    with made_up_tensors():
        corr = torch.empty(2, 6, 4, dtype=dtype, device="cuda", requires_grad=options.pop("requires_grad", False))
        grids = {"source_grids": [(2, 3)], "target_grids": [(2, 2)], "out_grid": (5, 7)}
        return ops.cross_scale_fusion([corr], **grids, return_confidence=True, **options)


def test_the_choice_on_a_cuda_device(monkeypatch):
    kernels = importlib.import_module("lpmflow_kernels.native")
    monkeypatch.setattr(kernels, "cuda_reason", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    on_cuda()
    assert ops.last_backend("cross_scale_fusion") == "reference"  # no record, no automatic choice
    mapping, confidence = on_cuda(torch.bfloat16, backend="native")
    assert ops.last_backend("cross_scale_fusion") == "native"
    assert mapping.shape == (2, 1, 2, 5, 7) and confidence.shape == (2, 1, 5, 7)
    assert mapping.dtype == torch.float32 and mapping.device.type == "cuda"
    with pytest.raises(RuntimeError, match=r"takes float32, float16 and bfloat16 on CUDA devices, and corrs\[0\] is f"):
        on_cuda(torch.float64, backend="native")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no backward on CUDA devices and triton's, which would do it, is missi"):
            on_cuda(backend="native", requires_grad=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(RuntimeError, match=r"compute capability 8.0 and later, and corrs\[0\] is on one of 7.5"):
        on_cuda(backend="native")
    monkeypatch.setattr(kernels, "cuda_reason", "it was built without them")
    with pytest.raises(RuntimeError, match="'native' cannot run: it was built without them"):
        on_cuda(backend="native")


def test_gradients_on_a_cuda_device_are_tritons():
    pytest.importorskip("triton")
    importlib.import_module("lpmflow_kernels.cross_scale_fusion")
    module = importlib.import_module("lpmflow_kernels.native.cross_scale_fusion")
    for device, wanted, tables in (("cuda", "triton", True), ("cpu", "native", True), ("cpu", "native", False)):
        with FakeTensorMode(), Called() as called:
            corr = torch.empty(2, 6, 4, dtype=torch.bfloat16, device=device)
            x, y = (torch.empty(side, device=device, requires_grad=tables) for side in (7, 5))
            inputs = ([corr], [2, 3, 2, 2], [5, 7, 0, 0, 5], 0.1, x, y)
            ctx, output = Context(), module._outputs(*inputs)
            module._save(ctx, inputs, output)
            (grad,), *nothing, grad_x, grad_y = module._differentiate(ctx, torch.empty_like(output[0]), None, None)
        assert grad.shape == corr.shape and grad.dtype == corr.dtype and nothing == [None] * 3
        if tables:
            assert grad_x.shape == x.shape and grad_y.shape == y.shape
        else:
            assert grad_x is None and grad_y is None
        assert called.names == [f"lpmflow.cross_scale_fusion_{wanted}_backward.default"]


def test_a_block_of_rows_may_have_gradients(monkeypatch):
    monkeypatch.setattr(importlib.import_module("lpmflow_kernels.native"), "cuda_reason", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("lpmflow.ops._backends.why_not", lambda op, backend: None)
    with made_up_tensors():
        corr, x, y = (torch.empty(size, device="cuda") for size in ((2, 6, 4), (7,), (5,)))
        arguments = ((2, 3), (2, 2), (5, 7), 0.1, x, y, "native", (0, 0, 3))
        assert fuse_part(corr, *arguments)[0].shape == (2, 2, 3, 7)
        assert fuse_part(corr.requires_grad_(), *arguments)[0].requires_grad


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nvcc_compiles_it_and_nothing_spills(tmp_path: Path, arch: str) -> None:
    # float32, float16 and bfloat16, with the row in shared memory and without
    assert_nothing_spills("cross_scale_fusion", arch, 3 * 2, tmp_path)
