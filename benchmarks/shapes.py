"""The workloads, named after the stages of the model that give rise to them. Tests and benchmarks share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
