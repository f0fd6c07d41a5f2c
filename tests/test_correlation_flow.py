"""`correlation_flow`: the same as its two parts, in one piece and in blocks, gradients, memory, refusals."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import interpreted
import pytest
import torch
from kernel_bench import assert_within_budget
from torch import Tensor

from lpmflow import ops, reference
from lpmflow.ops import correlation_flow as correlation_flow_function

module = sys.modules["lpmflow.ops.correlation_flow"]
# source, target, output grid, prefix
CASES = [
    ((1, 1), (1, 1), (1, 1), 1),
    ((6, 5), (3, 7), (6, 5), 1),
    ((6, 5), (6, 5), (6, 5), 0),
    ((4, 3), (8, 6), (8, 6), 1),
    ((4, 3), (2, 5), (9, 7), 3),
    ((9, 7), (4, 4), (3, 2), 1),  # to a coarser grid: some lines belong to no row
    ((5, 4), (3, 3), (1, 6), 2),
    ((2, 9), (5, 5), (17, 9), 1),
    ((2, 2), (3, 2), (50, 3), 1),  # float32 and float64 round a row to different lines
]
BACKENDS = [b for b in ("reference", "native") if ops.backend_report()["cross_scale_fusion"][b] is None]
NAMES = ("attended", "mapping", "confidence")


def inputs(case, dtype=torch.float32, batch=2) -> list[Tensor]:
    source, target, out, prefix = case
    generator = torch.Generator().manual_seed(0)
    tokens = [prefix + grid[0] * grid[1] for grid in (source, target, target)]
    qkv = [torch.randn(batch, 2, count, 8, generator=generator).to(dtype) for count in tokens]
    exact = torch.promote_types(dtype, torch.float32)
    return [*qkv, *(torch.randn(side, generator=generator).to(exact) for side in (out[1], out[0]))]


def everything(case, run, dtype=None, **options) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    source, target, out, prefix = case
    leaves = [t.to(dtype or t.dtype).requires_grad_() for t in options.pop("tensors")]
    q, k, v, x, y = leaves
    found = run(
        q,
        k,
        v,
        source_grid=source,
        target_grid=target,
        out_grid=out,
        scale=0.4,
        prefix=prefix,
        temperature=0.3,
        x=x,
        y=y,
        **options,
    )
    grads = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t.dtype) for t in found[:2]]
    gradients = torch.autograd.grad(found[:2], leaves, grads)
    named = dict(zip(NAMES, found, strict=True))
    return named | {f"grad_{name}": value for name, value in zip("qkvxy", gradients, strict=True)}


@pytest.fixture(params=["one piece", "line by line", "two lines"])
def pieces(request, monkeypatch) -> str:
    """How much of the correlation tensor may be in memory."""
    if request.param != "one piece":
        monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    if request.param == "two lines":
        original = module._blocks
        monkeypatch.setattr(module, "_blocks", lambda source, out, at_once, dtype: original(source, out, 2, dtype))
    return request.param


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_its_parts(case, dtype, backend, pieces):
    tensors = inputs(case, dtype)
    found = everything(case, correlation_flow_function, tensors=tensors, backend=backend)
    assert ops.last_backend("correlation") == ops.last_backend("cross_scale_fusion") == backend
    same = everything(case, reference.correlation_flow, tensors=tensors)
    exact = everything(case, reference.correlation_flow, torch.float64, tensors=tensors)
    for name, value in found.items():
        assert value.dtype == same[name].dtype and value.shape == same[name].shape, name
        assert_within_budget(name, value.detach(), same[name].detach(), exact[name].detach(), 3)
    assert not found["confidence"].requires_grad


def test_without_a_gradient_nothing_is_computed_again(pieces, monkeypatch):
    case = CASES[3]
    q, k, v, x, y = inputs(case)
    calls = []
    original = module.correlation
    monkeypatch.setattr(module, "correlation", lambda *a, **o: calls.append(1) or original(*a, **o))
    whole = {"source_grid": case[0], "target_grid": case[1]}
    with torch.no_grad():
        module.correlation_flow(q.requires_grad_(), k, v, **whole, x=x, y=y)
    blocks = {"one piece": 1, "line by line": 4, "two lines": 2}[pieces]
    assert len(calls) == blocks
    module.correlation_flow(q, k, v, **whole, x=x, y=y).mapping.sum().backward()
    assert len(calls) == (2 if blocks == 1 else 3 * blocks)


def test_rows_are_the_same_in_pieces_and_whole(monkeypatch):
    """The fusion of a block rounds as the whole does."""
    case = CASES[4]
    corr = torch.rand(2, 12, 10)
    x, y = torch.randn(7), torch.randn(9)
    for backend in BACKENDS:
        whole = ops.cross_scale_fusion(
            [corr], [case[0]], [case[1]], out_grid=case[2], x=x, y=y, backend=backend, return_confidence=True
        )
        fuse_part = sys.modules["lpmflow.ops.cross_scale_fusion"].fuse_part
        for first, lines, row, rows in ((0, 3, 0, 6), (2, 2, 6, 2), (3, 1, 8, 1)):
            part = corr[:, first * 3 : (first + lines) * 3]
            mapping, confidence = fuse_part(part, *case[:3], 0.02, x, y, backend, (first, row, rows))
            torch.testing.assert_close(mapping, whole.mapping[:, 0, :, row : row + rows], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(confidence, whole.confidence[:, 0, row : row + rows], rtol=1e-5, atol=1e-5)


def test_defaults():
    q, k, v, _, _ = inputs(CASES[3])
    found = correlation_flow_function(q, k, v, source_grid=(4, 3), target_grid=(8, 6))
    wanted = ops.correlation(q, k, v)
    mapping = ops.cross_scale_fusion([wanted[1]], [(4, 3)], [(8, 6)], out_grid=(8, 6))
    torch.testing.assert_close(found.attended, wanted[0])
    torch.testing.assert_close(found.mapping, mapping[:, 0])


def test_the_default_grid_is_the_one_with_more_cells():
    q, k = torch.randn(1, 1, 1 + 20, 4), torch.randn(1, 1, 1 + 9, 4)
    found = correlation_flow_function(q, k, k, source_grid=(2, 10), target_grid=(3, 3))
    assert found.mapping.shape == (1, 2, 2, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_block_is_larger_than_allowed(dtype, monkeypatch):
    """Of the correlation tensor, counted with the line that a block shares with the next."""
    sizes = []
    original = module.correlation

    def recorded(*args, **options):
        attended, corr = original(*args, **options)
        sizes.append(corr.numel() * corr.element_size())
        return attended, corr

    monkeypatch.setattr(module, "correlation", recorded)
    line = 5 * 36 * dtype.itemsize
    monkeypatch.setattr(module, "BLOCK_BYTES", 3 * line)
    q, k = (torch.randn(1, 1, 1 + cells, 4, dtype=dtype) for cells in (30, 36))
    for out, wanted in (((6, 5), [3, 3]), ((9, 9), [3, 3, 2])):
        sizes.clear()
        correlation_flow_function(q, k, k, source_grid=(6, 5), target_grid=(6, 6), out_grid=out)
        assert [size // line for size in sizes] == wanted and max(sizes) <= module.BLOCK_BYTES


def test_empty_batch(pieces):
    q, k, v, x, y = inputs(CASES[3], batch=0)
    found = correlation_flow_function(q, k, v, source_grid=(4, 3), target_grid=(8, 6), x=x, y=y)
    assert found.mapping.shape == (0, 2, 8, 6) and found.attended.shape == q.shape


_MEMORY = """
import sys, torch
from lpmflow import ops
side = int(sys.argv[1])
torch.manual_seed(0)
def run(side):
    q, k, v = (torch.randn(1, 2, 1 + side * side, 16) for _ in range(3))
    with torch.no_grad():
        return ops.correlation_flow(q, k, v, source_grid=(side, side), target_grid=(side, side))
def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024
run(8)
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
run(side)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory of the process is known on Linux only")
@pytest.mark.skipif("native" not in BACKENDS, reason="the native module is not built")
def test_memory_does_not_grow_with_the_volume():
    """96 x 96 cells: the tensor would take 324 MiB, and 1.7 of that the einsum path's maps."""
    peaks = {}
    for side in (64, 96):
        command = [sys.executable, "-c", _MEMORY, str(side)]
        peaks[side] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    volume = 96**4 * 4 / 2**20
    assert peaks[96] < volume / 2, peaks
    assert peaks[96] - peaks[64] < 40, peaks  # tokens and results: 2.25 times as many, a few MiB


@interpreted.needs_triton
@interpreted.tests("correlation_flow")
def test_triton_computes_in_blocks_too(done):
    """Through Triton's interpreter: values, gradients, and how much of the correlation tensor there is at once."""
    interpreted.check(done)


@pytest.mark.parametrize("named", ["context", "contexts of both", "environment"])
def test_a_block_computed_again_is_computed_by_the_same_backend(named, monkeypatch):
    """In the backward, which is not where the forward's backend was named."""
    if "native" not in BACKENDS:
        pytest.skip("the native module is not built, and the reference is all there is")
    tensors = [x.requires_grad_() for x in inputs(CASES[3])]
    q, k, v, x, y = tensors
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    by_op = {"correlation": "reference", "cross_scale_fusion": "native"}
    context = {"backend": "reference"} if named == "context" else by_op
    if named == "environment":
        monkeypatch.setenv("LPMFLOW_BACKEND", ",".join(map("=".join, by_op.items())))
        context = {}
    with ops.use_backend(**context) if context else contextlib.nullcontext():
        found = correlation_flow_function(q, k, v, source_grid=(4, 3), target_grid=(8, 6), x=x, y=y)
    monkeypatch.delenv("LPMFLOW_BACKEND", raising=False)
    wanted = [ops.last_backend(op) for op in by_op]
    ops.cross_scale_fusion([ops.correlation(q, k, v)[1]], [(4, 3)], [(8, 6)], out_grid=(8, 6))  # by native, both
    torch.autograd.grad(found.mapping.sum() + found.attended.sum(), tensors)
    assert [ops.last_backend(op) for op in by_op] == wanted and "reference" in wanted


def test_a_block_computed_again_where_another_backend_is_named(monkeypatch):
    """Nothing was named in the forward, and what is named around the backward is not for it."""
    tensors = [x.requires_grad_() for x in inputs(CASES[3])]
    q, k, v, x, y = tensors
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    found = correlation_flow_function(q, k, v, source_grid=(4, 3), target_grid=(8, 6), x=x, y=y)
    chosen = ops.last_backend("correlation")
    with ops.use_backend("reference"):
        torch.autograd.grad(found.mapping.sum() + found.attended.sum(), tensors)
    assert ops.last_backend("correlation") == chosen


@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_inference_compiles_whole(case, pieces):
    options = {"source_grid": case[0], "target_grid": case[1], "out_grid": case[2], "prefix": case[3]}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = correlation_flow_function(q, k, v, **options)
        return found.mapping.square().sum((1, 2, 3)) + found.attended.sum((1, 2, 3))

    torch._dynamo.reset()  # the size of the pieces is patched behind its back
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for batch in (1, 3):
        q, k, v, _, _ = inputs(case, batch=batch)
        torch.testing.assert_close(compiled(q, k, v), run(q, k, v))


def test_refusals_name_the_argument():
    q, k, v, x, y = inputs(CASES[3])
    grids = {"source_grid": (4, 3), "target_grid": (8, 6)}
    with pytest.raises(ValueError, match=r"correlation_flow: q must have shape \(2, 2, 16, 8\), got \(2, 2, 13, 8\)"):
        correlation_flow_function(q, k, v, source_grid=(5, 3), target_grid=(8, 6))
    with pytest.raises(ValueError, match=r"k must have shape \(2, 2, 13, 8\)"):
        correlation_flow_function(q, k, v, source_grid=(4, 3), target_grid=(4, 3))
    with pytest.raises(ValueError, match="temperature must be a number above 0, got -1"):
        correlation_flow_function(q, k, v, **grids, temperature=-1)
    with pytest.raises(ValueError, match=r"x must have shape \(6,\), got \(5,\)"):
        correlation_flow_function(q, k, v, **grids, x=x[:5])
    with pytest.raises(ValueError, match=r"out_grid must be \(height, width\)"):
        correlation_flow_function(q, k, v, **grids, out_grid=(0, 1))
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        correlation_flow_function(q, k, v, **grids, backend="triton")
