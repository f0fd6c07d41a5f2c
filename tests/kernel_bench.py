"""What every kernel is tested with: awkward layouts, an error budget, poisoned outputs. Used by the kernels' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lpmflow.ops import region_bias

LAYOUTS = ("contiguous", "fused", "transposed", "strided", "expanded")
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of x (B, H, N, D) in another arrangement of memory."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "fused":  # one third of what a qkv projection leaves, (B, N, 3, H, D)
        batch, heads, tokens, width = x.shape
        whole = x.new_full((batch, tokens, 3, heads, width), float("nan"))
        whole[:, :, 1] = x.transpose(1, 2)
        return whole[:, :, 1].transpose(1, 2)
    if layout == "transposed":  # dense, but the last dimension is not the innermost
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        whole = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        whole[..., ::2] = x
        return whole[..., ::2]
    if layout == "expanded":  # all heads are the first one
        return x[:, :1].expand_as(x)
    raise ValueError(layout)


def einsum_region_attention(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, *, source_grid: Any, target_grid: Any, prefix: int
) -> Tensor:
    """`region_attention` as eager code computes it in q's own type, where the reference goes to float32."""
    bias = region_bias(bias_table.to(q.dtype), source_grid, target_grid, prefix)
    logits = torch.einsum("bhnd,bhmd->bhnm", q * q.shape[-1] ** -0.5, k) + bias
    return torch.einsum("bhnm,bhmd->bhnd", logits.softmax(-1), v)


def assert_within_budget(name: str, found: Tensor, same_dtype: Tensor, exact: Tensor, factor: float) -> None:
    """The kernel may be `factor` times as far from float64 as the einsum path in its own dtype, plus a floor."""
    assert found.shape == exact.shape, f"{name}: {tuple(found.shape)} instead of {tuple(exact.shape)}"
    scale = exact.abs().max().clamp(min=1.0) if exact.numel() else 1.0
    allowed = factor * (same_dtype.double() - exact).abs().amax() if exact.numel() else 0.0
    error = (found.double() - exact).abs()
    assert torch.isfinite(found).all(), f"{name} is not finite"
    worst = error.amax() if exact.numel() else 0.0
    limit = allowed + FLOOR[found.dtype] * scale
    assert worst <= limit, f"{name} is off by {float(worst):.3g}, allowed are {float(limit):.3g}"


@contextmanager
def poisoned(monkeypatch: Any) -> Iterator[None]:
    """New tensors are full of NaN, so that what a kernel forgets to write shows."""
    empty: Callable[..., Tensor] = Tensor.new_empty

    def new_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fresh = empty(self, *args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        yield
