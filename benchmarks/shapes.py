"""The workloads, named after the stages of the model that give rise to them. Tests and benchmarks share them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lpmflow import ops

Grid = tuple[int, int]


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

    def small(self) -> Correlation:
        """The same on a few tokens."""
        return replace(self, n=9, m=9, batch=1)

    def run(self, inputs: list[Tensor], backend: str | None) -> tuple[Tensor, ...]:
        """The operation on such inputs: what it returns that has a gradient."""
        return ops.correlation(*inputs, prefix=self.prefix, backend=backend)

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
class WindowAttention:
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

    def small(self) -> WindowAttention:
        """The same on one window."""
        return replace(self, height=self.window, width=self.window, batch=1)

    def run(self, inputs: list[Tensor], backend: str | None) -> tuple[Tensor, ...]:
        """The op."""
        return (ops.window_attention(*inputs, heads=self.heads, window=self.window, backend=backend),)

    def flops(self, *, backward: bool) -> int:
        """Multiplications and additions that must run: two products forward, five backward (one to have P again)."""
        return (7 if backward else 2) * 2 * self.batch * self.height * self.width * self.window**2 * self.channels

    def bytes(self, dtype: torch.dtype, *, backward: bool) -> int:
        """Bytes that must move: qkv read and the result written once, and their gradients likewise."""
        return (3 if backward else 1) * 4 * self.batch * self.height * self.width * self.channels * dtype.itemsize


def window_attention(batch: int = 1) -> list[WindowAttention]:
    """The refinement stages and the super-resolution of the base network, and those of the tiny one.

    Super-resolution works on both images at once, so its batch is twice the pairs.
    """
    return [
        WindowAttention("base 16", 128, 128, heads=8, head_width=12, window=16, batch=batch),
        WindowAttention("base 8", 128, 128, heads=8, head_width=12, window=8, batch=batch),
        WindowAttention("base 4", 128, 128, heads=8, head_width=12, window=4, batch=batch),
        WindowAttention("base superres", 32, 32, heads=8, head_width=96, window=4, batch=2 * batch),
        WindowAttention("tiny 12", 96, 96, heads=3, head_width=16, window=12, batch=batch),
        WindowAttention("tiny 8", 96, 96, heads=3, head_width=16, window=8, batch=batch),
        WindowAttention("tiny 4", 96, 96, heads=3, head_width=16, window=4, batch=batch),
        WindowAttention("tiny superres", 24, 24, heads=6, head_width=32, window=4, batch=2 * batch),
    ]


@dataclass(frozen=True)
class WindowStage:
    """A whole refinement stage: the layers around the attention, and what channel attention pools."""

    attention: WindowAttention
    hidden: int

    @property
    def name(self) -> str:
        """As the attention's."""
        return self.attention.name

    @property
    def batch(self) -> int:
        """As the attention's."""
        return self.attention.batch

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
        """The map, and the weights in the order of `ops.StageWeights`."""
        a, c = self.attention, self.attention.channels
        generator = torch.Generator().manual_seed(seed)
        norm = [(c,), (c,)]
        shapes: list[tuple[int, ...]] = [(a.batch, a.height, a.width, c)]
        shapes += [*norm, (3 * c, c), (3 * c,), ((2 * a.window - 1) ** 2, a.heads), (c, c), (c,)]
        shapes += [*norm, (self.hidden, c), (self.hidden,), (c, self.hidden), (c,), *norm]
        drawn = (torch.randn(shape, generator=generator) for shape in shapes)
        return [(x if x.ndim == 4 else x * x.shape[-1] ** -0.5).to(device, dtype) for x in drawn]

    def small(self) -> WindowStage:
        """The same on one window."""
        return replace(self, attention=self.attention.small())

    def run(self, inputs: list[Tensor], backend: str | None) -> tuple[Tensor, ...]:
        """The op."""
        a, weights = self.attention, ops.StageWeights(*inputs[1:])
        return tuple(ops.window_stage(inputs[0], weights, heads=a.heads, window=a.window, backend=backend))

    def flops(self, *, backward: bool) -> int:
        """Multiplications and additions that must run, the backward of a linear layer twice those of its forward."""
        a = self.attention
        layers = 2 * a.batch * a.height * a.width * a.channels * (4 * a.channels + 2 * self.hidden)
        return (3 if backward else 1) * layers + a.flops(backward=backward)

    def bytes(self, dtype: torch.dtype, *, backward: bool) -> int:
        """Bytes that must move: the map read and written once, its gradients likewise, and the weights."""
        a = self.attention
        weights = a.channels * (4 * a.channels + 2 * self.hidden)
        return (2 if backward else 1) * (2 * a.batch * a.height * a.width * a.channels + weights) * dtype.itemsize


def window_stage(batch: int = 1) -> list[WindowStage]:
    """The stages of `window_attention`; the MLP is four times as wide, in the tiny super-resolution twice."""
    stages = window_attention(batch)
    return [WindowStage(a, (2 if a.name == "tiny superres" else 4) * a.channels) for a in stages]


@dataclass(frozen=True)
class CrossScaleFusion:
    """Correlation tensors of one or more scales to flow on the fine grid."""

    name: str
    scales: tuple[tuple[Grid, Grid], ...]
    out: Grid
    batch: int = 1
    temperature: float = 0.02

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
        """The tensors, float32 as `correlation` leaves them whatever the model computes in, and the tables x and y."""
        del dtype
        generator = torch.Generator().manual_seed(seed)
        sizes = ((self.batch, s[0] * s[1], t[0] * t[1]) for s, t in self.scales)
        corrs = [0.3 * torch.rand(size, generator=generator) for size in sizes]
        tables = (torch.linspace(-1, 1, side) for side in (self.out[1], self.out[0]))
        return [x.to(device) for x in (*corrs, *tables)]

    def small(self) -> CrossScaleFusion:
        """The same on a few cells."""
        return replace(self, scales=tuple(((1, 1), (1, 1)) for _ in self.scales), out=(2, 2), batch=1)

    def run(self, inputs: list[Tensor], backend: str | None) -> tuple[Tensor, ...]:
        """The operation on such inputs: the mapping."""
        *corrs, x, y = inputs
        mapping = ops.cross_scale_fusion(
            corrs,
            [source for source, _ in self.scales],
            [target for _, target in self.scales],
            out_grid=self.out,
            temperature=self.temperature,
            x=x,
            y=y,
            backend=backend,
        )
        assert isinstance(mapping, Tensor)
        return (mapping,)

    def flops(self, *, backward: bool) -> int:
        """Of an interpolated entry: 6 for its interpolation, 20 for its exponential, 6 for the sums; backward again."""
        entries = self.batch * len(self.scales) * (self.out[0] * self.out[1]) ** 2
        return (72 if backward else 32) * entries

    def bytes(self, dtype: torch.dtype, *, backward: bool) -> int:
        """The tensors read once; backward read once more, and their gradients written."""
        del dtype
        entries = sum(s[0] * s[1] * t[0] * t[1] for s, t in self.scales)
        return self.batch * entries * 4 * (3 if backward else 1)


def cross_scale_fusion(batch: int = 1) -> list[CrossScaleFusion]:
    """The base network's four tensors, one by one and together, and the tiny network's two."""
    coarse, fine = (16, 16), (32, 32)
    pairs = {"11": (coarse, coarse), "12": (coarse, fine), "21": (fine, coarse), "22": (fine, fine)}
    return [
        *(CrossScaleFusion(f"base {name}", (pair,), fine, batch) for name, pair in pairs.items()),
        CrossScaleFusion("base", tuple(pairs.values()), fine, batch),
        CrossScaleFusion("tiny", (((12, 12), (12, 12)), ((24, 24), (24, 24))), (24, 24), batch),
    ]


@dataclass(frozen=True)
class RegionAttention:
    """The layout encoder's joint attention: of each image a cls token and its grid of patches."""

    name: str
    grid: Grid
    heads: int
    width: int
    batch: int = 1

    @property
    def tokens(self) -> int:
        """N, of both images."""
        return 2 * (1 + self.grid[0] * self.grid[1])

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
        """q, k, v as views of one projection's result, and the bias table in float32."""
        generator = torch.Generator().manual_seed(seed)
        qkv = torch.randn(self.batch, self.tokens, 3, self.heads, self.width, generator=generator)
        table = torch.randn(self.heads, (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1) * 4, generator=generator)
        return [*qkv.to(device, dtype).permute(2, 0, 3, 1, 4).unbind(0), table.to(device)]

    def small(self) -> RegionAttention:
        """The same on a few cells."""
        return replace(self, grid=(2, 2), batch=1)

    def run(self, inputs: list[Tensor], backend: str | None) -> tuple[Tensor, ...]:
        """The operation on such inputs."""
        return (ops.region_attention(*inputs, source_grid=self.grid, target_grid=self.grid, backend=backend),)

    def flops(self, *, backward: bool) -> int:
        """Multiplications and additions that must run: two products forward, five backward (one to have P again)."""
        return (7 if backward else 2) * 2 * self.batch * self.heads * self.tokens**2 * self.width

    def bytes(self, dtype: torch.dtype, *, backward: bool) -> int:
        """Bytes that must move: q, k, v read and the result written once each, and their gradients likewise."""
        return (3 if backward else 1) * 4 * self.batch * self.heads * self.tokens * self.width * dtype.itemsize


def region_attention(batch: int = 1) -> list[RegionAttention]:
    """The base network at 256 pixels, at 512 pixels, and the tiny one."""
    return [
        RegionAttention("base", (16, 16), heads=8, width=96, batch=batch),
        RegionAttention("base 512", (32, 32), heads=8, width=96, batch=batch),
        RegionAttention("tiny", (12, 12), heads=6, width=32, batch=batch),
    ]
