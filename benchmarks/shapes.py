"""The workloads, named after the stages of the model that give rise to them. Tests and benchmarks share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpmflow import ops


@dataclass(frozen=True)
class Correlation:
    """One matching block's cross-attention: N source tokens against M target tokens, each a cls token and a grid."""

    name: str
    heads: int
    n: int
    m: int
    width: int
    batch: int = 1
    prefix: int = 1

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
        """q, k, v as the model's projections leave them: heads inside the width, tokens outside."""
        generator = torch.Generator().manual_seed(seed)
        tokens = (self.n, self.m, self.m)
        draws = (torch.randn(self.batch, count, self.heads, self.width, generator=generator) for count in tokens)
        return [x.to(device, dtype).transpose(1, 2) for x in draws]

    def small(self, inputs: list[Tensor]) -> list[Tensor]:
        """The first few tokens."""
        return [x[:, :, :9] for x in inputs]

    def run(self, inputs: list[Tensor], backend: str | None) -> tuple[Tensor, ...]:
        """The op."""
        return ops.correlation(*inputs, backend=backend)

    def flops(self, *, backward: bool) -> int:
        """Multiplications and additions that must run: two products forward, five backward (one to have P again)."""
        product = 2 * self.batch * self.heads * self.n * self.m * self.width
        return (7 if backward else 2) * product

    def bytes(self, dtype: torch.dtype, *, backward: bool) -> int:
        """Bytes that must move: inputs read and outputs written once each, and their gradients likewise."""
        tokens = self.batch * self.heads * self.width * 2 * (self.n + self.m) * dtype.itemsize
        maps = self.batch * (self.n - self.prefix) * (self.m - self.prefix) * 4
        return (3 if backward else 1) * tokens + (2 if backward else 1) * maps


def correlation(batch: int = 1) -> list[Correlation]:
    """The four matching blocks of the base network (16x16 and 32x32 cells) and the two of the tiny one."""
    return [
        Correlation("base 11", heads=8, n=257, m=257, width=96, batch=batch),
        Correlation("base 12", heads=8, n=257, m=1025, width=96, batch=batch),
        Correlation("base 21", heads=8, n=1025, m=257, width=96, batch=batch),
        Correlation("base 22", heads=8, n=1025, m=1025, width=96, batch=batch),
        Correlation("tiny 11", heads=6, n=145, m=145, width=32, batch=batch),
        Correlation("tiny 22", heads=6, n=577, m=577, width=32, batch=batch),
    ]


@dataclass(frozen=True)
class WindowRefinement:
    """The attention of one Swin block on a map of height x width cells."""

    name: str
    height: int
    width: int
    heads: int
    head_width: int
    window: int
    batch: int = 1

    @property
    def channels(self) -> int:
        """C, of all heads together."""
        return self.heads * self.head_width

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
        """qkv as the projection leaves it, and the bias table in float32."""
        generator = torch.Generator().manual_seed(seed)
        qkv = torch.randn(self.batch, self.height, self.width, 3 * self.channels, generator=generator)
        table = torch.randn((2 * self.window - 1) ** 2, self.heads, generator=generator)
        return [qkv.to(device, dtype), table.to(device)]

    def small(self, inputs: list[Tensor]) -> list[Tensor]:
        """One window."""
        return [inputs[0][:1, : self.window, : self.window], inputs[1]]

    def run(self, inputs: list[Tensor], backend: str | None) -> tuple[Tensor, ...]:
        """The op."""
        return (ops.window_attention(*inputs, heads=self.heads, window=self.window, backend=backend),)

    def flops(self, *, backward: bool) -> int:
        """Multiplications and additions that must run: two products forward, five backward (one to have P again)."""
        return (7 if backward else 2) * 2 * self.batch * self.height * self.width * self.window**2 * self.channels

    def bytes(self, dtype: torch.dtype, *, backward: bool) -> int:
        """Bytes that must move: qkv read and the result written once, and their gradients likewise."""
        return (3 if backward else 1) * 4 * self.batch * self.height * self.width * self.channels * dtype.itemsize


def window_refinement(batch: int = 1) -> list[WindowRefinement]:
    """The refinement stages and the super-resolution of the base network, and those of the tiny one.

    Super-resolution works on both images at once, so its batch is twice the pairs.
    """
    return [
        WindowRefinement("base 16", 128, 128, heads=8, head_width=12, window=16, batch=batch),
        WindowRefinement("base 8", 128, 128, heads=8, head_width=12, window=8, batch=batch),
        WindowRefinement("base 4", 128, 128, heads=8, head_width=12, window=4, batch=batch),
        WindowRefinement("base superres", 32, 32, heads=8, head_width=96, window=4, batch=2 * batch),
        WindowRefinement("tiny 12", 96, 96, heads=3, head_width=16, window=12, batch=batch),
        WindowRefinement("tiny 8", 96, 96, heads=3, head_width=16, window=8, batch=batch),
        WindowRefinement("tiny 4", 96, 96, heads=3, head_width=16, window=4, batch=batch),
        WindowRefinement("tiny superres", 24, 24, heads=6, head_width=32, window=4, batch=2 * batch),
    ]
