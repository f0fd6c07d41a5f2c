"""Changes of colour, sharpness and visibility for warp pairs: batched, each image on its own, in [0, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_GRAY = (0.299, 0.587, 0.114)


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] with other light and colours, some in another style altogether, blurred and noisy.

    Another style (three in ten): channels mixed at random, sometimes inverted, strong contrast. It takes away what two
    objects of a kind do not share and leaves the shape.
    """

    def uniform(low: float, high: float) -> Tensor:
        shape = (len(images), 1, 1, 1)
        return low + (high - low) * torch.rand(shape, generator=generator, device=images.device)

    def chosen(share: float) -> Tensor:
        return uniform(0, 1) < share

    styled = chosen(0.3)
    mix = torch.eye(3, device=images.device) + 0.08 * torch.randn(
        len(images), 3, 3, generator=generator, device=images.device
    )
    wild = torch.randn(len(images), 3, 3, generator=generator, device=images.device)
    wild = wild.abs() / wild.abs().sum(dim=2, keepdim=True)
    mix = torch.where(styled[:, :, :, 0], wild, mix)
    x = torch.einsum("bij,bjhw->bihw", mix, images)
    gray = (x * x.new_tensor(_GRAY)[:, None, None]).sum(dim=1, keepdim=True)
    saturation = torch.where(chosen(0.2), 0.0, uniform(0.5, 1.4))
    x = gray + saturation * (x - gray)
    x = torch.where(styled & chosen(0.3), 1 - x, x)
    gamma = torch.where(styled, uniform(-1.0, 1.0), uniform(-0.4, 0.4)).exp()
    x = x.clamp(1e-4, 1).pow(gamma)
    middle = x.mean(dim=(1, 2, 3), keepdim=True)
    contrast = torch.where(styled, uniform(-0.7, 0.5), uniform(-0.35, 0.3)).exp()
    x = (x - middle) * contrast + middle + uniform(-0.12, 0.12)
    soft = F.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False)
    x = torch.lerp(x, soft, torch.where(chosen(0.25), uniform(0.3, 1.0), 0.0))
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    x = x + noise * torch.where(chosen(0.3), uniform(0.0, 0.06), 0.0)
    return x.clamp(0, 1)


def occlude(images: Tensor, others: Tensor, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the images (B, 3, H, W) partly covered by blobs of `others` (B, 3, any size), and the mask (B, 1, H, W).

    A blob is where smooth noise is highest; it covers about a quarter of the image at most.
    """
    count = len(images)
    noise = torch.randn(count, 1, 5, 5, generator=generator, device=images.device)
    field = F.interpolate(noise, size, mode="bicubic", align_corners=False)
    share = torch.rand(count, 2, generator=generator, device=images.device)
    # the field's own quantile, from a coarse sample of it: exact enough for a random share
    coarse = field[:, 0, ::8, ::8].flatten(1).sort(dim=1).values
    rank = ((1 - 0.25 * share[:, :1]) * (coarse.shape[1] - 1)).long()
    threshold = torch.where(share[:, 1:] < 0.5, coarse.gather(1, rank), torch.inf)
    mask = (field > threshold[:, :, None, None]).float()
    cover = F.interpolate(others, size, mode="bilinear", align_corners=False)
    return torch.lerp(images, cover, mask), mask
