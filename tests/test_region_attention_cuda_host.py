"""The CUDA region_attention without a GPU: its own source on the emulated device, its binding, and what nvcc says."""

from __future__ import annotations

import ctypes
import importlib
import itertools
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
from lpmflow.reference.region_attention import region_bias, region_index

SINGLE_AND_HALVES = [torch.float32, torch.float16, torch.bfloat16]
# (B, H, D, prefix, source grid, target grid)
SIZES = [
    (1, 1, 1, 0, (1, 1), (1, 1)),
    (1, 1, 1, 1, (1, 1), (1, 1)),
    (2, 3, 5, 1, (1, 2), (2, 1)),
    (1, 2, 12, 2, (5, 2), (2, 5)),
    (1, 2, 16, 0, (3, 7), (4, 4)),
    (2, 1, 32, 1, (6, 6), (6, 6)),
    (1, 1, 33, 3, (1, 17), (9, 2)),
    (1, 2, 64, 1, (8, 9), (7, 9)),
    (1, 1, 96, 1, (12, 12), (12, 12)),
    (1, 1, 100, 5, (2, 2), (1, 63)),
    (1, 1, 128, 1, (5, 13), (8, 8)),
]


class Shape(ctypes.Structure):
    """RegionAttentionShape of csrc/region_attention/region_attention.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "width", "prefix")),
        *((name, ctypes.c_int64 * 2) for name in ("height", "across")),
        ("scale", ctypes.c_double),
        ("dtype", ctypes.c_int),
        ("threads", ctypes.c_int),
    ]


class Rows(ctypes.Structure):
    """Rows of csrc/common/rows.h."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]


class Args(ctypes.Structure):
    """RegionCudaArgs of csrc/region_attention/region_attention_cuda.h."""

    _fields_ = [
        ("shape", Shape),
        *((name, Rows) for name in ("q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("table", "attended", "statistics")),
    ]


def shape_of(sizes: Any, scale: float, dtype: int) -> Shape:
    batch, heads, width, prefix, *grids = sizes
    sides = ctypes.c_int64 * 2
    return Shape(batch, heads, width, prefix, sides(*grids[::2]), sides(*grids[1::2]), scale, dtype, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def launch(folder: Path) -> Callable[..., int]:
    """`_native.region_attention_forward_cuda` by the emulated kernels; threads run in an order `seed` determines."""
    run = emulated("region_attention", folder)

    def forward(
        sizes: Any,
        scale: float,
        dtype: int,
        device: int,
        stream: int,
        *addresses: Any,
        seed: int = 0,
    ) -> int:
        assert (device, stream) == (0, 0)
        rows = [Rows(addresses[i], *addresses[i + 1]) for i in (0, 2, 4)]
        return run(Args(shape_of(sizes, scale, dtype), *rows, *addresses[6:]), seed)

    return forward


@pytest.fixture
def library(launch: Callable[..., int], folder: Path) -> ctypes.CDLL:
    """The index arithmetic of the kernels."""
    return ctypes.CDLL(str(folder / "region_attention.so"))


@pytest.fixture
def native(launch: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """`lpmflow_kernels.native.region_attention`, whose CUDA function takes CPU tensors: to the emulated device."""
    return native_on("region_attention", launch, monkeypatch)


def inputs(size: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """q, k, v and the table."""
    batch, heads, width, prefix, source, target = size
    generator = torch.Generator().manual_seed(seed)
    tokens = 2 * prefix + source[0] * source[1] + target[0] * target[1]
    columns = (2 * max(source[0], target[0]) - 1) * (2 * max(source[1], target[1]) - 1) * 4
    q, k, v = (torch.randn(batch, heads, tokens, width, generator=generator).to(dtype) for _ in range(3))
    return [amid_nan(x) for x in (q, k, v, torch.randn(heads, columns, generator=generator))]


def run(launch: Any, size: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, seed: int = 0) -> list[Tensor]:
    """The result, largest logits and inverse sums, into guarded memory."""
    batch, heads, width, prefix, source, target = size
    outputs = [
        Output((batch, q.shape[2], heads, width), q.dtype),
        Output((2, batch, heads, q.shape[2]), None),
    ]
    dtype = importlib.import_module("lpmflow_kernels.native").DTYPES[q.dtype]
    rows = [y for x in (q, k, v) for y in (x.data_ptr(), x.stride()[:3])]
    sizes = (batch, heads, width, prefix, *source, *target)
    pointers = (table.data_ptr(), *(output.tensor.data_ptr() for output in outputs))
    launch(sizes, width**-0.5, dtype, 0, 0, *rows, *pointers, seed=seed)
    attended, statistics = (output.checked() for output in outputs)
    return [attended.transpose(1, 2), *statistics]


def expected(size: Any, *tensors: Tensor) -> Tensor:
    """By the reference in float64."""
    _, _, _, prefix, source, target = size
    doubles = [x.double() for x in tensors]
    return reference.region_attention(*doubles, source_grid=source, target_grid=target, prefix=prefix)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    atol = {torch.float32: 1e-5}.get(found.dtype, FLOOR[found.dtype])
    scale = wanted.nan_to_num(0, 0, 0).abs().max().clamp(min=1).item()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol * scale, equal_nan=True)


# On the emulated device


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_statistics(launch, size, dtype):
    q, k, v, table = inputs(size, dtype)
    found = run(launch, size, q, k, v, table)
    assert_close(found[0], expected(size, q, k, v, table))
    logits = size[2] ** -0.5 * q.double() @ k.double().mT + region_bias(table.double(), *size[4:], size[3])
    largest = logits.amax(-1)
    for value, wanted in zip(found[1:], (largest, 1 / (logits - largest[..., None]).exp().sum(-1)), strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
    for value, again in zip(found, run(launch, size, q, k, v, table, seed=3), strict=True):
        assert torch.equal(value, again)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
def test_no_race(launch, dtype):
    """Warps overtake one another differently under each seed; only a forgotten barrier lets the result know."""
    size = (1, 1, 9, 1, (12, 6), (12, 6))
    arguments = inputs(size, dtype)
    first = run(launch, size, *arguments)
    for seed in (1, 2, 5):
        for value, again in zip(first, run(launch, size, *arguments, seed=seed), strict=True):
            assert torch.equal(value, again)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
def test_one_logit_of_ten_thousand_outweighs_the_rest_exactly(launch, dtype):
    size = (1, 1, 1, 1, (6, 6), (7, 6))
    q, k, v, table = inputs(size, dtype)
    q[:], k[:], table[:] = 100, -100, 0
    k[0, 0, 71] = 100
    found = run(launch, size, q, k, v, table)[0]
    assert torch.equal(found, v[:, :, 71:72].expand_as(found))


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
@pytest.mark.parametrize("value", [1e4, -1e4, 0.0])
def test_equal_logits(launch, dtype, value):
    size = (1, 1, 8, 0, (6, 6), (7, 6))
    q, k, v, table = inputs(size, dtype)
    k[:], table[:] = 0, value
    found = run(launch, size, q, k, v, table)[0]
    mean = v.double().mean(2, keepdim=True).expand(found.shape)
    torch.testing.assert_close(found.double(), mean, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_a_bias_of_minus_infinity_masks(launch):
    size = (1, 2, 4, 1, (4, 5), (5, 6))
    q, k, v, table = inputs(size)
    table[:, ::3] = float("-inf")
    assert_close(run(launch, size, q, k, v, table)[0], expected(size, q, k, v, table))


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
@pytest.mark.parametrize("what", [0, 1, 2, 3], ids=["q", "k", "v", "table"])
def test_nan_comes_out_where_it_belongs(launch, what, dtype):
    size = (2, 2, 4, 1, (6, 6), (7, 6))
    arguments = inputs(size, dtype)
    if what == 3:
        arguments[3][1, 17] = float("nan")
    else:
        arguments[what][1, 0, 40, 2] = float("nan")
    found, wanted = run(launch, size, *arguments)[0], expected(size, *arguments)
    assert wanted.isnan().any() and wanted.isfinite().any()
    assert_close(found, wanted)


@pytest.mark.parametrize(
    ("dtype", "width", "status"),
    [(torch.float64, 4, 801), (torch.float32, 129, 1), (torch.bfloat16, 129, 1)],
    ids=str,
)
def test_what_it_does_not_take(launch, dtype, width, status):
    size = (1, 1, width, 1, (2, 2), (2, 2))
    with pytest.raises(RuntimeError, match=f"status {status}:"):
        run(launch, size, *inputs(size, dtype))


def test_the_places_of_tokens(library):
    """Their differences are the reference's columns; prefix tokens have none."""
    for prefix, source, target in itertools.product((0, 1, 3), ((1, 1), (2, 5), (4, 3)), ((1, 1), (3, 3), (1, 6))):
        shape = shape_of((1, 1, 1, prefix, *source, *target), 1.0, 0)
        n_source, n_target = source[0] * source[1], target[0] * target[1]
        places = torch.zeros(2 * prefix + n_source + n_target, 2, dtype=torch.int32)
        for token, place in enumerate(places):
            library.region_places(ctypes.byref(shape), token, ctypes.c_void_p(place.data_ptr()))
        patches = torch.cat((places[prefix : prefix + n_source], places[2 * prefix + n_source :])).long()
        assert (patches >= 0).all()
        assert torch.equal(patches[:, 0, None] - patches[None, :, 1], region_index(source, target))
        assert (places[:prefix] == -1).all() and (places[prefix + n_source :][:prefix] == -1).all()


# The binding


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "odd"])
def test_any_layout(native, layout, dtype):
    size = (2, 3, 16, 1, (4, 5), (5, 5))
    *rows, table = inputs(size, dtype)
    rows = [amid_nan(x, offset=9) if layout == "odd" else laid_out(x, layout) for x in rows]
    table = table.double().t().contiguous().t()
    attended, statistics = native._forward_cuda(*rows, table, [4, 5, 5, 5], 1)
    assert attended.transpose(1, 2).is_contiguous() and attended.dtype == dtype
    assert statistics.shape == (0,)  # these tensors are on the CPU, where nobody wants them
    assert_close(attended, expected(size, *rows, table))


def test_nothing_in_nothing_out(native):
    empty = [torch.zeros(0, 2, 10, 4) for _ in range(3)]
    attended, _ = native._forward_cuda(*empty, torch.zeros(2, 36), [2, 2, 2, 2], 1)
    assert attended.shape == (0, 2, 10, 4)


def test_the_compiled_function_takes_these_arguments(monkeypatch):
    """It comes as far as asking for a device, of which there is none."""
    module = importlib.import_module("lpmflow_kernels.native.region_attention")
    if (missing := importlib.import_module("lpmflow_kernels.native").cuda_reason) is not None:
        pytest.skip(missing)
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here, which must not be given addresses of the CPU")
    monkeypatch.setattr(module, "place_of", lambda x: (0, 0))
    with pytest.raises(RuntimeError, match="region_attention: the native backend's launch failed with CUDA error"):
        module._forward_cuda(*inputs(SIZES[3]), [5, 2, 2, 5], 2)


def on_cuda(dtype: torch.dtype = torch.float32, *, width: int = 4, **options: Any) -> Tensor:
    """The operation on made-up CUDA tensors, which have sizes and types and no numbers."""
    with FakeTensorMode():
        needs = options.pop("requires_grad", False)
        rows = [torch.empty(2, 3, 10, width, dtype=dtype, device="cuda", requires_grad=needs) for _ in range(3)]
        table = torch.empty(3, 36, device="cuda")
        return ops.region_attention(*rows, table, source_grid=(2, 2), target_grid=(2, 2), **options)


def test_the_choice_on_a_cuda_device(monkeypatch):
    kernels = importlib.import_module("lpmflow_kernels.native")
    monkeypatch.setattr(kernels, "cuda_reason", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    on_cuda()
    assert ops.last_backend("region_attention") == "reference"  # no record, no automatic choice
    out = on_cuda(torch.bfloat16, backend="native")
    assert ops.last_backend("region_attention") == "native"
    assert out.shape == (2, 3, 10, 4) and out.dtype == torch.bfloat16 and out.device.type == "cuda"
    with pytest.raises(RuntimeError, match="it takes float32, float16 and bfloat16 on CUDA devices, and q is float64"):
        on_cuda(torch.float64, backend="native")
    with pytest.raises(RuntimeError, match="it takes head widths D up to 128 on CUDA devices, got 130"):
        on_cuda(width=130, backend="native")
    if not torch.cuda.is_available():
        with pytest.raises(
            RuntimeError, match="no backward on CUDA devices and triton's, which would do it, is missing"
        ):
            on_cuda(backend="native", requires_grad=True)


def test_gradients_on_a_cuda_device_are_tritons():
    pytest.importorskip("triton")
    pytest.importorskip("lpmflow_kernels.region_attention")
    module = importlib.import_module("lpmflow_kernels.native.region_attention")
    for device, wanted in (("cuda", "triton"), ("cpu", "native")):
        with FakeTensorMode(), Called() as called:
            q, k, v = (torch.empty(2, 3, 10, 4, dtype=torch.bfloat16, device=device) for _ in range(3))
            table = torch.empty(3, 36, device=device)
            ctx, output = Context(), module._outputs(q, k, v, table, [2, 2, 2, 2], 1)
            assert output[1].shape == ((2, 2, 3, 10) if device == "cuda" else (0,))
            module._save(ctx, (q, k, v, table, [2, 2, 2, 2], 1), output)
            *grads, grad_table, none, nothing = module._differentiate(ctx, torch.empty_like(output[0]), None)
        assert all(grad.shape == q.shape and grad.dtype == q.dtype for grad in grads) and none is nothing is None
        assert grad_table.shape == table.shape
        assert called.names == [f"lpmflow.region_attention_{wanted}_backward.default"]


def test_the_limit_is_that_of_the_kernels():
    module = importlib.import_module("lpmflow_kernels.native.region_attention")
    header = (CSRC / "region_attention" / "region_attention_cuda.h").read_text()
    assert f"kMostRegionWidth = {module.MAX_WIDTH};" in header


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nvcc_compiles_it_and_nothing_spills(tmp_path: Path, arch: str) -> None:
    # float32, float16 and bfloat16, four head widths each
    assert_nothing_spills("region_attention", arch, 3 * 4, tmp_path)
