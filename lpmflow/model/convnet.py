"""The convolutional backbone of `lpmflow-tiny`: oriented gradients beside RGB, then residual stages to stride 16.

Gradient orientation, locally normalised, is what classical semantic matching (SIFT, HOG) stood on before pretrained
features: it ignores colour and illumination. Giving it as fixed channels spares a network that sees few photographs
the learning of it. Batch normalisation, because it trains fastest from scratch and costs nothing at inference.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpmflow.ops._autocast import without_autocast

STRIDE = 16


class OrientedGradients(nn.Module):
    """(B, 3, H, W) -> (B, 4 * bins, H / 4, W / 4): rectified directional derivatives, locally normalised."""

    def __init__(self, bins: int = 8) -> None:
        super().__init__()
        smooth = torch.tensor([1.0, 2.0, 1.0])
        step = torch.tensor([-1.0, 0.0, 1.0])
        dx, dy = smooth[:, None] * step[None, :] / 8, step[:, None] * smooth[None, :] / 8
        angles = torch.arange(bins) * (2 * math.pi / bins)
        kernels = angles.cos()[:, None, None] * dx + angles.sin()[:, None, None] * dy
        self.register_buffer("kernels", kernels[:, None], persistent=False)
        self.kernels: Tensor

    def forward(self, images: Tensor) -> Tensor:
        # float32 throughout: the small differences of neighbouring pixels vanish in half precision
        with without_autocast(images.device):
            brightness = F.pad(images.float().mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
            cells = F.avg_pool2d(F.relu(F.conv2d(brightness, self.kernels.float())), 2)
            energy = cells.square().sum(dim=1, keepdim=True)
            norm = F.avg_pool2d(energy, 9, stride=1, padding=4, count_include_pad=False).add(1e-4).sqrt()
            return F.pixel_unshuffle((cells / norm).clamp(max=2.0), 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride) if stride != 1 else nn.Identity(),
                nn.Conv2d(width_in, width, 1, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class OrientedConvNet(nn.Module):
    """Features at stride 16 and stride 8 of normalised images (B, 3, H, W), sides multiples of 16.

    Returns (B, width, H / 16, W / 16) and (B, fine_width, H / 8, W / 8).
    """

    def __init__(self, widths: tuple[int, int, int] = (64, 128, 192), depths: tuple[int, int, int] = (1, 2, 2)) -> None:
        super().__init__()
        self.gradients = OrientedGradients()
        self.stem = nn.Sequential(
            nn.Conv2d(4 * 8 + 16 * 3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages, width_in = [], widths[0]
        for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = [ResidualBlock(width_in, width, stride=1 if number == 0 else 2)]
            blocks += [ResidualBlock(width, width, stride=1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            width_in = width
        self.stages = nn.ModuleList(stages)
        self.fine_width, self.width = widths[1], widths[2]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat((self.gradients(images), F.pixel_unshuffle(images, 4)), dim=1)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        fine = self.stages[1](self.stages[0](x))
        return self.stages[2](fine), fine
