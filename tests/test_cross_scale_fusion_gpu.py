"""`cross_scale_fusion` by every backend with a kernel for CUDA devices: against float64, in a CUDA graph, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_bench import assert_within_budget, poisoned
from torch import Tensor

from lpmflow import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COARSE, FINE = (16, 16), (32, 32)
# B, then source and target grid of each scale, then the output grid
BASE = (2, [(COARSE, COARSE), (COARSE, FINE), (FINE, COARSE), (FINE, FINE)], FINE)
CASES = [
    (1, [((1, 1), (1, 1))], (1, 1)),
    (1, [((1, 4), (2, 1)), ((2, 2), (5, 3))], (5, 7)),
    (2, [((3, 5), (4, 6)), ((6, 10), (4, 6)), ((3, 5), (6, 10)), ((6, 10), (6, 10))], (6, 10)),
    (1, [((7, 9), (11, 5)), ((17, 3), (2, 19))], (5, 6)),
    (1, [((2, 3), (2, 63))], (3, 97)),
    BASE,
    (1, [((12, 12), (12, 12)), ((12, 12), (24, 24)), ((24, 24), (12, 12)), ((24, 24), (24, 24))], (24, 24)),
    (1, [((20, 18), (20, 18)), ((20, 18), (48, 40)), ((48, 40), (24, 20)), ((48, 40), (48, 40))], (48, 40)),
]


@pytest.fixture(params=["triton", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that is installed here; native's gradients are Triton's work."""
    reason = ops.backend_report()["cross_scale_fusion"][request.param]
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


def inputs(case: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    batch, scales, out = case
    generator = torch.Generator("cuda").manual_seed(seed)
    corrs = [
        torch.rand(batch, s[0] * s[1], t[0] * t[1], generator=generator, device="cuda").to(dtype) for s, t in scales
    ]
    x, y = (torch.randn(side, generator=generator, device="cuda") for side in (out[1], out[0]))
    return corrs, x, y


def run(backend: str, case: Any, corrs: list[Tensor], x: Tensor, y: Tensor) -> Any:
    _, scales, out = case
    grids = [s for s, _ in scales], [t for _, t in scales]
    try:
        fused = ops.cross_scale_fusion(
            corrs, *grids, out_grid=out, temperature=0.1, x=x, y=y, return_confidence=True, backend=backend
        )
    except RuntimeError as error:
        if "cannot run" not in str(error):
            raise
        pytest.skip(str(error))
    assert ops.last_backend("cross_scale_fusion") == backend
    return fused


def everything(backend: str, case: Any, corrs: list[Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients by name, for a fixed gradient of the mapping."""
    leaves = [leaf.detach().requires_grad_() for leaf in (*corrs, x, y)]
    mapping, confidence = run(backend, case, leaves[:-2], *leaves[-2:])
    generator = torch.Generator("cuda").manual_seed(1)
    grad = torch.randn(mapping.shape, generator=generator, device="cuda").to(mapping.dtype)
    names = [*(f"grad_corrs[{s}]" for s in range(len(corrs))), "grad_x", "grad_y"]
    grads = dict(zip(names, torch.autograd.grad(mapping, leaves, grad), strict=True))
    return {"mapping": mapping.detach(), "confidence": confidence, **grads}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(backend, case, dtype, monkeypatch):
    corrs, x, y = inputs(case, dtype)
    with poisoned(monkeypatch):
        found = everything(backend, case, corrs, x, y)
    same = everything("reference", case, corrs, x, y)
    exact = everything("reference", case, [corr.double() for corr in corrs], x.double(), y.double())
    for name, value in found.items():
        assert_within_budget(name, value, same[name], exact[name], 3 if name.startswith("grad") else 2)


def test_two_runs_are_bit_equal(backend):
    first, second = (everything(backend, BASE, *inputs(BASE)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_constant_rows_are_uniform_even_where_logits_are_large(backend):
    corrs, x, y = inputs(BASE)
    corrs = [(1e4 * torch.arange(corr.shape[1], device="cuda"))[:, None].expand(corr.shape) for corr in corrs]
    with torch.no_grad():
        _, confidence = run(backend, BASE, corrs, x, y)
    torch.testing.assert_close(confidence, torch.full_like(confidence, 1 / 1024), rtol=1e-6, atol=0)


def test_nan_stays_in_its_row(backend):
    corrs, x, y = inputs(BASE)
    corrs[3][1, 40, 7] = float("nan")
    mapping, confidence = run(backend, BASE, corrs, x, y)
    assert mapping.isnan().sum() == 2 and mapping[1, 3, :, 1, 8].isnan().all()
    assert confidence.isnan().sum() == 1


def test_in_a_cuda_graph(backend):
    corrs, x, y = inputs(BASE)
    with torch.no_grad():
        run(backend, BASE, corrs, x, y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fused = run(backend, BASE, corrs, x, y)
        fresh, x_fresh, y_fresh = inputs(BASE, seed=1)
        for old, new in zip((*corrs, x, y), (*fresh, x_fresh, y_fresh), strict=True):
            old.copy_(new)
        graph.replay()
        wanted = run(backend, BASE, fresh, x_fresh, y_fresh)
    assert torch.equal(fused.mapping, wanted.mapping) and torch.equal(fused.confidence, wanted.confidence)


def test_on_a_stream_of_its_own(backend):
    corrs, x, y = inputs(BASE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = everything(backend, BASE, corrs, x, y)
    torch.cuda.current_stream().wait_stream(stream)
    for name, value in everything(backend, BASE, corrs, x, y).items():
        assert torch.equal(found[name], value), name


def test_compiles_whole_with_gradients(backend):
    corrs, x, y = inputs(BASE)
    wanted = everything(backend, BASE, corrs, x, y)
    sources, targets = [s for s, _ in BASE[1]], [t for _, t in BASE[1]]

    def mapping_of(corrs: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return ops.cross_scale_fusion(
            corrs, sources, targets, out_grid=FINE, temperature=0.1, x=x, y=y, backend=backend
        )

    compiled = torch.compile(mapping_of, fullgraph=True)
    leaves = [leaf.detach().requires_grad_() for leaf in (*corrs, x, y)]
    mapping = compiled(leaves[:-2], *leaves[-2:])
    generator = torch.Generator("cuda").manual_seed(1)
    grads = torch.autograd.grad(mapping, leaves, torch.randn(mapping.shape, generator=generator, device="cuda"))
    assert torch.equal(mapping, wanted["mapping"])
    for grad, (name, value) in zip(grads, list(wanted.items())[2:], strict=True):
        torch.testing.assert_close(grad, value, msg=lambda text, name=name: f"{name}: {text}")


def test_rows_larger_than_a_tile_and_than_shared_memory(backend):
    case = (1, [((3, 2), (72, 72)), ((2, 3), (112, 111))], (6, 70))
    corrs, x, y = inputs(case)
    with torch.no_grad():
        found, same = (run(name, case, corrs, x, y) for name in (backend, "reference"))
        exact = run("reference", case, [corr.double() for corr in corrs], x.double(), y.double())
    for name, value, other, wanted in zip(("mapping", "confidence"), found, same, exact, strict=True):
        assert_within_budget(name, value, other, wanted, 2)


def test_more_scales_than_one_launch_takes(backend):
    batch, scales, out = CASES[2]
    case = (batch, scales * 5, out)
    corrs, x, y = inputs(case)
    with torch.no_grad():
        found, same = (run(name, case, corrs, x, y) for name in (backend, "reference"))
        exact = run("reference", case, [corr.double() for corr in corrs], x.double(), y.double())
    for name, value, other, wanted in zip(("mapping", "confidence"), found, same, exact, strict=True):
        assert_within_budget(name, value, other, wanted, 2)
