"""The CUDA window attention without a GPU: its own source on the emulated device, its binding, and what nvcc says."""

from __future__ import annotations

import ctypes
import importlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import ARCHITECTURES, CSRC, Called, Context, Output, amid_nan, assert_nothing_spills, emulated, native_on
from kernel_bench import FLOOR, LAYOUTS, laid_out
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lpmflow import ops, reference

SINGLE_AND_HALVES = [torch.float32, torch.float16, torch.bfloat16]
# (B, H, W, heads, head width, window, shift)
SIZES = [
    (1, 1, 1, 1, 1, 1, 0),
    (2, 1, 5, 2, 3, 2, 0),
    (1, 5, 2, 1, 1, 4, 1),
    (1, 17, 9, 3, 12, 4, 0),
    (1, 8, 8, 2, 12, 8, 0),
    (2, 9, 17, 2, 5, 8, 3),
    (1, 16, 16, 2, 12, 16, 0),
    (1, 17, 33, 1, 16, 16, 5),
    (1, 26, 13, 1, 16, 12, 0),
    (1, 5, 4, 3, 96, 4, 0),
    (1, 3, 3, 2, 7, 8, 6),
    (1, 21, 23, 1, 4, 20, 0),
    (1, 97, 5, 2, 2, 3, 2),
    (1, 2, 63, 1, 32, 17, 1),
    (1, 6, 5, 2, 64, 4, 2),
    (1, 5, 9, 1, 40, 5, 0),
    (1, 5, 5, 1, 100, 5, 0),
    (1, 9, 9, 1, 128, 9, 0),
    (1, 4, 4, 1, 128, 4, 0),
]


class Shape(ctypes.Structure):
    """WindowShape of csrc/window_refinement/window_refinement.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "heads", "head_width", "window", "shift")),
        ("scale", ctypes.c_double),
        ("dtype", ctypes.c_int),
        ("threads", ctypes.c_int),
    ]


class Args(ctypes.Structure):
    """WindowCudaArgs of csrc/window_refinement/window_refinement_cuda.h."""

    _fields_ = [
        ("shape", Shape),
        ("qkv", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("qkv_batch", "qkv_row", "qkv_cell")),
        *((name, ctypes.c_void_p) for name in ("table", "out")),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def launch(folder: Path) -> Callable[..., int]:
    """`_native.window_refinement_forward_cuda` by the emulated kernels; threads run in an order `seed` determines."""
    run = emulated("window_refinement", folder)

    def forward(
        sizes: Any,
        scale: float,
        dtype: int,
        device: int,
        stream: int,
        qkv: int,
        strides: Any,
        *pointers: int,
        seed: int = 0,
    ) -> int:
        assert (device, stream) == (0, 0)
        return run(Args(Shape(*sizes, scale, dtype, 1), qkv, *strides, *pointers), seed)

    return forward


@pytest.fixture
def library(launch: Callable[..., int], folder: Path) -> ctypes.CDLL:
    """The index arithmetic of the kernels."""
    return ctypes.CDLL(str(folder / "window_refinement.so"))


@pytest.fixture
def native(launch: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """`lpmflow_kernels.native.window_refinement`, whose CUDA function takes CPU tensors: to the emulated device."""
    return native_on("window_refinement", launch, monkeypatch)


def inputs(size: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    batch, height, width, heads, head_width, window, _ = size
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, height, width, 3 * heads * head_width, generator=generator).to(dtype)
    return amid_nan(qkv), amid_nan(torch.randn((2 * window - 1) ** 2, heads, generator=generator))


def run(launch: Any, size: Any, qkv: Tensor, table: Tensor, seed: int = 0) -> Tensor:
    """The result, into guarded memory."""
    batch, height, width, heads, head_width, _, _ = size
    out = Output((batch, height, width, heads * head_width), qkv.dtype)
    dtype = importlib.import_module("lpmflow_kernels.native").DTYPES[qkv.dtype]
    pointers = (table.data_ptr(), out.tensor.data_ptr())
    launch(size, head_width**-0.5, dtype, 0, 0, qkv.data_ptr(), qkv.stride()[:3], *pointers, seed=seed)
    return out.checked()


def expected(size: Any, qkv: Tensor, table: Tensor) -> Tensor:
    """By the reference in float64."""
    options = {"heads": size[3], "window": size[5], "shift": size[6]}
    return reference.window_attention(qkv.double(), table.double(), **options)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    atol = {torch.float32: 1e-5}.get(found.dtype, FLOOR[found.dtype])
    scale = wanted.nan_to_num(0, 0, 0).abs().max().clamp(min=1).item()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol * scale, equal_nan=True)


# On the emulated device


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(launch, size, dtype):
    arguments = inputs(size, dtype)
    found = run(launch, size, *arguments)
    assert_close(found, expected(size, *arguments))
    assert torch.equal(found, run(launch, size, *arguments, seed=3))


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
def test_no_race(launch, dtype):
    """Warps overtake one another differently under each seed; only a forgotten barrier lets the result know."""
    for size in ((1, 12, 13, 1, 12, 12, 0), (1, 9, 10, 2, 9, 4, 0), (1, 9, 10, 2, 32, 8, 0)):
        arguments = inputs(size, dtype)
        first = run(launch, size, *arguments)
        for seed in (1, 2, 5):
            assert torch.equal(first, run(launch, size, *arguments, seed=seed))


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
@pytest.mark.parametrize("factor", [1e4, -1e4, 0.0])
def test_extreme_logits_and_constant_rows(launch, dtype, factor):
    size = (1, 9, 12, 2, 8, 9, 0)
    qkv, table = inputs(size, dtype)
    qkv[..., :16] *= factor
    found = run(launch, size, qkv, table)
    assert torch.isfinite(found).all()
    wanted = expected(size, qkv, table)
    # logits near 1e4 are known to a thousandth, and so are their weights
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=FLOOR[dtype] * 4 + (5e-3 if factor else 0))


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
def test_one_logit_outweighs_the_rest_exactly(launch, dtype):
    size = (1, 10, 10, 1, 1, 10, 0)
    qkv, table = inputs(size, dtype)
    qkv[..., 0], qkv[..., 1], table[:] = 100, -100, 0
    qkv[0, 7, 3, 1] = 100
    found = run(launch, size, qkv, table)
    assert torch.equal(found, qkv[0, 7, 3, 2].expand_as(found))


def test_a_bias_of_minus_infinity_masks(launch):
    size = (1, 10, 8, 2, 4, 9, 0)
    qkv, table = inputs(size)
    table[::3] = float("-inf")
    assert_close(run(launch, size, qkv, table), expected(size, qkv, table))
    assert_close(
        run(launch, size, qkv, torch.full_like(table, float("-inf"))), torch.full((1, 10, 8, 8), torch.nan).double()
    )


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("third", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("window", [4, 9])
def test_nan_comes_out_where_it_belongs(launch, third, shift, window, dtype):
    """A query spoils its own cell, a key or value what its window shows; other windows and heads stay whole."""
    size = (2, 2 * window + 1, 2 * window + 2, 2, 4, window, shift)
    qkv, table = inputs(size, dtype)
    at = window + 1
    qkv[1, at, at, 8 * third + 6] = float("nan")  # head 1
    found = run(launch, size, qkv, table).isnan()
    wanted = torch.zeros_like(found)
    inside = slice(window + shift, 2 * window + shift)
    if third == 0:
        wanted[1, at, at, 4:] = True
    elif third == 1:
        wanted[1, inside, inside, 4:] = True
    else:
        wanted[1, inside, inside, 6] = True
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("dtype", "size", "status"),
    [
        (torch.float64, (1, 2, 2, 1, 2, 2, 0), 801),
        (torch.float32, (1, 2, 2, 1, 129, 2, 0), 1),
        (torch.float32, (1, 2, 2, 1, 2, 33, 0), 1),
    ],
    ids=str,
)
def test_what_it_does_not_take(launch, dtype, size, status):
    with pytest.raises(RuntimeError, match=f"status {status}:"):
        run(launch, size, *inputs(size, dtype))


def test_the_largest_window_and_head(launch):
    size = (1, 3, 35, 1, 128, 32, 0)
    for dtype in SINGLE_AND_HALVES:
        arguments = inputs(size, dtype)
        assert_close(run(launch, size, *arguments), expected(size, *arguments))


# Index arithmetic


def test_division_by_a_product(library):
    quotient = library.small_quotient
    for divisor in range(1, 65):
        for x in range(4096):
            assert quotient(x, divisor) == x // divisor, (x, divisor)


@pytest.mark.parametrize("size", [*SIZES, (2, 40, 30, 3, 1, 16, 7)], ids=str)
@pytest.mark.parametrize("warp_rows", [8, 16])
def test_every_query_is_in_one_group(library, size, warp_rows):
    """Windows, heads and first queries of all groups, and how many of them share a block."""
    batch, height, width, heads, _, window, shift = size
    shape = Shape(*size, 1.0, 0, 1)
    found = torch.zeros(200000, dtype=torch.int64)
    of_block = ctypes.c_int64()
    groups = library.window_groups
    groups.restype = ctypes.c_int64
    count = groups(ctypes.byref(shape), warp_rows, ctypes.c_void_p(found.data_ptr()), ctypes.byref(of_block))
    found = found[: 3 * count].view(-1, 3)
    cells = min(window, height) * min(window, width)
    warps = min(4, next(w for w in (1, 2, 4, 1 << 20) if w * warp_rows >= cells))
    assert of_block.value == 4 // warps
    down, across = (1 + -(-max(side - shift, 0) // window) if shift else -(-side // window) for side in (height, width))
    tiles = torch.arange(0, cells, warps * warp_rows)
    wanted = torch.cartesian_prod(torch.arange(batch * down * across), torch.arange(heads), tiles)
    assert torch.equal(found, wanted)


# The binding


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "odd"])
@pytest.mark.parametrize("size", [(2, 7, 10, 2, 12, 4, 1), (2, 9, 10, 2, 8, 9, 0)], ids=str)
def test_any_layout(native, size, layout, dtype):
    qkv, table = inputs(size, dtype)
    qkv = amid_nan(qkv, offset=9) if layout == "odd" else laid_out(qkv, layout)
    out = native._forward_cuda(qkv, table.t().contiguous().t(), *size[3:4], *size[5:])
    assert out.is_contiguous() and out.dtype == dtype
    assert_close(out, expected(size, qkv, table))


def test_nothing_in_nothing_out(native):
    for shape in ((0, 4, 4), (2, 0, 4), (2, 4, 0)):
        out = native._forward_cuda(torch.zeros(*shape, 12), torch.zeros(9, 2), 2, 2, 1)
        assert out.shape == (*shape, 4)


def test_the_compiled_function_takes_these_arguments(monkeypatch):
    """It comes as far as asking for a device, of which there is none."""
    module = importlib.import_module("lpmflow_kernels.native.window_refinement")
    if (missing := importlib.import_module("lpmflow_kernels.native").cuda_reason) is not None:
        pytest.skip(missing)
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here, which must not be given addresses of the CPU")
    monkeypatch.setattr(module, "place_of", lambda x: (0, 0))
    size = SIZES[3]
    with pytest.raises(RuntimeError, match="window_attention: the native backend's launch failed with CUDA error"):
        module._forward_cuda(*inputs(size), *size[3:4], *size[5:])


def on_cuda(dtype: torch.dtype = torch.float32, *, width: int = 4, window: int = 3, **options: Any) -> Tensor:
    """The operation on made-up CUDA tensors, which have sizes and types and no numbers."""
    with FakeTensorMode():
        needs = options.pop("requires_grad", False)
        qkv = torch.empty(2, 9, 5, 6 * width, dtype=dtype, device="cuda", requires_grad=needs)
        table = torch.empty((2 * window - 1) ** 2, 2, device="cuda")
        return ops.window_attention(qkv, table, heads=2, window=window, **options)


def test_the_choice_on_a_cuda_device(monkeypatch):
    kernels = importlib.import_module("lpmflow_kernels.native")
    monkeypatch.setattr(kernels, "cuda_reason", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    on_cuda()
    assert ops.last_backend("window_attention") == "reference"  # no record, no automatic choice
    for window in (3, 9):
        out = on_cuda(torch.bfloat16, window=window, backend="native")
        assert ops.last_backend("window_attention") == "native"
        assert out.shape == (2, 9, 5, 8) and out.dtype == torch.bfloat16 and out.device.type == "cuda"
    with pytest.raises(
        RuntimeError, match="it takes float32, float16 and bfloat16 on CUDA devices, and qkv is float64"
    ):
        on_cuda(torch.float64, backend="native")
    with pytest.raises(RuntimeError, match="it takes head widths up to 128 on CUDA devices, got 130"):
        on_cuda(width=130, backend="native")
    with pytest.raises(RuntimeError, match="it takes windows of up to 32 x 32 cells on CUDA devices, got 33 x 33"):
        on_cuda(window=33, backend="native")
    if not torch.cuda.is_available():
        with pytest.raises(
            RuntimeError, match="no backward on CUDA devices and triton's, which would do it, is missing"
        ):
            on_cuda(backend="native", requires_grad=True)


def test_gradients_on_a_cuda_device_are_tritons():
    pytest.importorskip("triton")
    triton = pytest.importorskip("lpmflow_kernels.window_refinement")
    module = importlib.import_module("lpmflow_kernels.native.window_refinement")
    assert triton.MAX_WINDOW >= module.MAX_WINDOW and triton.MAX_WIDTH >= module.MAX_WIDTH
    for device, wanted in (("cuda", "triton"), ("cpu", "native")):
        with FakeTensorMode(), Called() as called:
            qkv = torch.empty(2, 9, 5, 24, dtype=torch.bfloat16, device=device)
            table = torch.empty(25, 2, device=device)
            ctx, out = Context(), module._output(qkv, table, 2, 3, 1)
            module._save(ctx, (qkv, table, 2, 3, 1), out)
            grad_qkv, grad_table, *nothing = module._differentiate(ctx, torch.empty_like(out))
        assert grad_qkv.shape == qkv.shape and grad_qkv.dtype == qkv.dtype and nothing == [None] * 3
        assert grad_table.shape == table.shape
        assert called.names == [f"lpmflow.window_attention_{wanted}_backward.default"]


def test_the_limits_are_those_of_the_kernels():
    module = importlib.import_module("lpmflow_kernels.native.window_refinement")
    header = (CSRC / "window_refinement" / "window_refinement_cuda.h").read_text()
    assert f"kMostHeadWidth = {module.MAX_WIDTH}, kMostWindow = {module.MAX_WINDOW};" in header


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nvcc_compiles_it_and_nothing_spills(tmp_path: Path, arch: str) -> None:
    # float16 and bfloat16: five head widths, in windows of up to 16 cells and in larger ones; float32: four
    assert_nothing_spills("window_refinement", arch, 2 * 5 * 2 + 4, tmp_path)
