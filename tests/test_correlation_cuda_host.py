"""The CUDA correlation on a machine without a GPU: its own source on an emulated device, and compiled by nvcc."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import NAN, Output, amid_nan, assert_nothing_spills, emulated
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
HALVES = [torch.float16, torch.bfloat16]
SINGLE_AND_HALVES = [torch.float32, *HALVES]
INF = float("inf")

Strides = ctypes.c_int64 * 3


class Args(ctypes.Structure):
    """CorrelationCudaArgs of csrc/correlation/correlation_cuda.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((f"{name}_stride", Strides) for name in ("q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("attended", "corr", "lse")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "n", "m", "width", "prefix")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int),
    ]


Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(scope="module")
def forward(tmp_path_factory: pytest.TempPathFactory) -> Forward:
    """(attended, corr, lse) of q, k, v by the emulated kernels."""
    launch = emulated("correlation", tmp_path_factory.mktemp("emulated"))

    def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float, prefix: int = 1, seed: int = 0) -> Any:
        batch, heads, n, width = q.shape
        m = k.shape[2]
        shapes = ((batch, heads, n, width), (batch, n - prefix, m - prefix), (batch, heads, n))
        attended, corr, lse = (Output(shape, dtype) for shape, dtype in zip(shapes, (q.dtype, None, None), strict=True))
        pointers = [x.data_ptr() for x in (q, k, v)]
        strides = [Strides(*x.stride()[:3]) for x in (q, k, v)]
        outputs = [x.tensor.data_ptr() for x in (attended, corr, lse)]
        sizes = (batch, heads, n, m, width, prefix)
        args = Args(*pointers, *strides, *outputs, *sizes, scale, DTYPES[q.dtype])
        launch(args, seed)
        return tuple(x.checked() for x in (attended, corr, lse))

    return run


def inputs(
    dtype: torch.dtype, n: int, m: int, width: int, *, batch: int = 1, heads: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, n, width), (batch, heads, m, width), (batch, heads, m, width))
    q, k, v = (amid_nan(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes)
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, *, scale: float, prefix: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The specification in float64."""
    scale = torch.tensor(scale, dtype=torch.float32).double().item()
    logits = scale * torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double())
    probabilities = logits.softmax(-1)
    corr = probabilities[:, :, prefix:, prefix:].sum(1)
    return probabilities @ v.double(), corr, logits.logsumexp(-1)


def assert_close(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], v: Tensor) -> None:
    """attended within a rounding of the largest value to its type, corr and lse within a few of float32."""
    largest = v.double().nan_to_num(0, 0, 0).abs().max().item()
    rounding = max(torch.finfo(v.dtype).eps, 4e-6) * largest
    for x, y, atol in zip(got, wanted, (rounding, 5e-6, 5e-6)[: len(got)], strict=True):
        torch.testing.assert_close(x.double(), y, atol=atol, rtol=5e-6, equal_nan=True)


SIZES = (1, 2, 5, 17, 63, 97)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES)
@pytest.mark.parametrize(("n", "m"), [*itertools.product(SIZES, (1, 17, 97)), (5, 63), (129, 130), (33, 257)])
def test_every_tile_and_its_remainder(forward: Forward, dtype: torch.dtype, n: int, m: int) -> None:
    prefix = min(n, m, n % 3)
    q, k, v = inputs(dtype, n, m, 16, batch=2)
    got = forward(q, k, v, scale=0.25, prefix=prefix)
    assert_close(got, exact(q, k, v, scale=0.25, prefix=prefix), v)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 24, 32, 33, 64, 80, 96, 100, 128, 129, 192, 255, 256])
def test_every_head_width(forward: Forward, dtype: torch.dtype, width: int) -> None:
    q, k, v = inputs(dtype, 37, 70, width)
    scale = width**-0.5
    assert_close(forward(q, k, v, scale=scale), exact(q, k, v, scale=scale), v)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES)
def test_the_shape_of_the_base_model(forward: Forward, dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype, 1 + 128, 1 + 128, 96, heads=3)
    got = forward(q, k, v, scale=96**-0.5)
    assert_close(got, exact(q, k, v, scale=96**-0.5), v)
    assert got[1].shape == (1, 128, 128)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES)
@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
def test_any_scale(forward: Forward, dtype: torch.dtype, scale: float) -> None:
    q, k, v = inputs(dtype, 20, 70, 8)
    assert_close(forward(q, k, v, scale=scale), exact(q, k, v, scale=scale), v)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES)
def test_strides(forward: Forward, dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype, 9, 66, 24, batch=2, heads=3)
    wanted = forward(q, k, v, scale=0.2)
    apart = [amid_nan(x.transpose(1, 2).contiguous()).transpose(1, 2) for x in (q, k, v)]  # (B, N, H, D) in memory
    odd = [amid_nan(x, offset=9) for x in (q, k, v)]  # no row begins at a multiple of 16 bytes
    padded = [torch.nn.functional.pad(x, (0, 3), value=NAN)[..., :24] for x in (q, k, v)]
    for variant in (apart, odd, padded):
        assert all(torch.equal(x, y) for x, y in zip(forward(*variant, scale=0.2), wanted, strict=True))
    shared = [x[:1, :1].expand(2, 3, -1, -1) for x in (q, k, v)]
    assert_close(forward(*shared, scale=0.2), exact(*shared, scale=0.2), v)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES)
def test_no_race(forward: Forward, dtype: torch.dtype) -> None:
    """Warps overtake one another differently under each seed; only a forgotten barrier lets the result know."""
    for width in (40, 41):  # copied asynchronously, and element by element
        q, k, v = inputs(dtype, 66, 150, width, heads=1)
        first = forward(q, k, v, scale=0.2, seed=0)
        assert_close(first, exact(q, k, v, scale=0.2), v)
        for seed in range(1, 4):
            again = forward(q, k, v, scale=0.2, seed=seed)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def along_one_dimension(dtype: torch.dtype, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one head whose logits at scale 1 are q_i times these (M,), with q_i = 1."""
    q = torch.zeros(1, 1, 3, 8)
    q[..., 0] = 1
    k = torch.zeros(1, 1, len(logits), 8)
    k[..., 0] = logits
    v = torch.randn(1, 1, len(logits), 8, generator=torch.Generator().manual_seed(0))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES)
@pytest.mark.parametrize("at", [0, 63, 64, 150])
def test_one_logit_of_ten_thousand_outweighs_the_rest_exactly(forward: Forward, dtype: torch.dtype, at: int) -> None:
    logits = torch.full((151,), -1e4)
    logits[at] = 1e4
    q, k, v = along_one_dimension(dtype, logits)
    # A scale whose products are not representable: they must be rounded alike wherever they are formed.
    attended, corr, _ = forward(q, k, v, scale=1.0123457, prefix=0)
    wanted = torch.zeros(3, 151)
    wanted[:, at] = 1
    assert torch.equal(corr[0], wanted)
    assert torch.equal(attended[0, 0], v[0, 0, at].expand(3, 8))


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES)
def test_equal_logits(forward: Forward, dtype: torch.dtype) -> None:
    for value in (-1e4, 0.0, 1e4):
        q, k, v = along_one_dimension(dtype, torch.full((97,), value))
        attended, corr, _ = forward(q, k, v, scale=1.0, prefix=0)
        # A row's log-sum-exp near 10^4 is known to 5e-4, half a last place, and no better.
        torch.testing.assert_close(corr, torch.full((1, 3, 97), 1 / 97), rtol=6e-4 if value else 1e-6, atol=0)
        mean = v.double().mean(2, keepdim=True).expand(1, 1, 3, 8)
        torch.testing.assert_close(attended.double(), mean, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES)
def test_minus_infinity(forward: Forward, dtype: torch.dtype) -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(1))
    logits[:130] = -INF  # whole tiles before anything finite
    logits[140] = -INF
    q, k, v = along_one_dimension(dtype, logits)
    q, k = q[..., :1].contiguous(), k[..., :1].contiguous()  # no other dimension, where 0 times infinity would be NaN
    v = v[..., :1].contiguous()
    wanted = exact(q, k, v, scale=1.0, prefix=0)
    assert wanted[1].isfinite().all()
    assert_close(forward(q, k, v, scale=1.0, prefix=0), wanted, v)
    assert all(x.isnan().all() for x in forward(q, torch.full_like(k, -INF), v, scale=1.0, prefix=0)[:2])


@pytest.mark.parametrize("dtype", SINGLE_AND_HALVES)
@pytest.mark.parametrize("what", ["q", "k", "v", "+inf"])
@pytest.mark.parametrize("at", [3, 69])
def test_nan_comes_out_as_nan_and_nowhere_else(forward: Forward, dtype: torch.dtype, what: str, at: int) -> None:
    q, k, v = inputs(dtype, 70, 70, 8, batch=2)
    if what == "+inf":
        k[1, 0, at] = INF
    else:
        {"q": q, "k": k, "v": v}[what][1, 0, at, 2] = NAN
    got, wanted = forward(q, k, v, scale=0.5), exact(q, k, v, scale=0.5)
    assert wanted[0][1].isnan().any() and not wanted[0][0].isnan().any()
    assert_close(got[:2], wanted[:2], v)


def test_nothing_but_the_prefix(forward: Forward) -> None:
    q, k, v = inputs(torch.float16, 1, 1, 8)
    attended, corr, _ = forward(q, k, v, scale=1.0)
    assert torch.equal(attended, v) and corr.shape == (1, 0, 0)


@pytest.mark.parametrize(("dtype", "width", "status"), [(torch.float64, 8, 801), (torch.float16, 257, 1)])
def test_what_it_does_not_take(forward: Forward, dtype: torch.dtype, width: int, status: int) -> None:
    with pytest.raises(RuntimeError, match=f"status {status}"):
        forward(*inputs(dtype, 2, 2, width), scale=1.0)


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nvcc_compiles_it_and_nothing_spills(tmp_path: Path, arch: str) -> None:
    # float32, float16 and bfloat16: five widths of the attending kernel and one summing kernel each.
    assert_nothing_spills("correlation", arch, 3 * 6, tmp_path)
