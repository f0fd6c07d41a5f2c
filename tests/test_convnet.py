"""The convolutional backbone: gradients against loops and a closed form, its blocks, what each cell looks at."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lpmflow.model.convnet import OrientedConvNet, OrientedGradients, ResidualBlock

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients_by_loops(image: np.ndarray, bins: int) -> np.ndarray:
    """(3, H, W) -> (4 bins, H / 4, W / 4), pixel by pixel."""
    gray = np.pad(image.mean(axis=0), 1, mode="edge")
    height, width = image.shape[1:]
    cells = np.zeros((bins, height // 2, width // 2))
    for y in range(height):
        for x in range(width):
            patch = gray[y : y + 3, x : x + 3]
            dx = (patch[:, 2] - patch[:, 0]) @ [1, 2, 1] / 8
            dy = (patch[2] - patch[0]) @ [1, 2, 1] / 8
            for k in range(bins):
                angle = 2 * math.pi * k / bins
                cells[k, y // 2, x // 2] += max(math.cos(angle) * dx + math.sin(angle) * dy, 0) / 4
    out = np.zeros((4 * bins, height // 4, width // 4))
    for y in range(height // 2):
        for x in range(width // 2):
            around = cells[:, max(y - 4, 0) : y + 5, max(x - 4, 0) : x + 5]
            norm = math.sqrt((around**2).sum(axis=0).mean() + 1e-4)
            for k in range(bins):
                out[4 * k + 2 * (y % 2) + x % 2, y // 2, x // 2] = min(cells[k, y, x] / norm, 2)
    return out


# Oriented gradients


@pytest.mark.parametrize(("size", "bins"), [((16, 24), 8), ((24, 20), 3)])
def test_gradients_equal_the_loops(size, bins):
    torch.manual_seed(0)
    image = torch.randn(3, *size)
    image[:, 9, 9] += 300  # a spot strong enough to meet the upper bound
    found = OrientedGradients(bins)(image[None])[0]
    wanted = gradients_by_loops(image.double().numpy(), bins)
    assert wanted.max() == 2
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize(("direction", "quarter"), [((1, 0), 0), ((0, 1), 1), ((-1, 0), 2), ((0, -1), 3)])
def test_a_ramp_answers_where_it_points(direction, quarter):
    """Brightness grows by g a pixel: bin k away from the direction answers max(cos(k pi / 4), 0), normalised."""
    g = 0.2
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    image = g * (direction[0] * x + direction[1] * y)
    found = OrientedGradients()(image.expand(1, 3, 48, 48))[0].unflatten(0, (8, 4))[:, :, 5, 5]
    away = [max(math.cos(k * math.pi / 4), 0) for k in range(8)]
    norm = math.sqrt(g * g * sum(value**2 for value in away) + 1e-4)
    wanted = torch.tensor([g * value / norm for value in away]).roll(2 * quarter)
    torch.testing.assert_close(found, wanted[:, None].expand(8, 4), rtol=0, atol=1e-5)


def test_gradients_ignore_colour_light_and_almost_contrast():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 32) * 10
    net = OrientedGradients()
    wanted = net(image)
    torch.testing.assert_close(net(image.flip(1)), wanted)
    torch.testing.assert_close(net(image + torch.tensor([5.0, -1.0, 2.0])[:, None, None]), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(net(3 * image), wanted, rtol=0, atol=1e-3)
    torch.testing.assert_close(net(torch.full_like(image, 0.7)), torch.zeros_like(wanted), rtol=0, atol=1e-4)


def test_gradients_are_neither_trained_nor_stored():
    net = OrientedGradients()
    assert not list(net.parameters()) and not net.state_dict()
    assert net.kernels.shape == (8, 1, 3, 3)


def test_gradients_stay_float32_under_autocast():
    torch.manual_seed(0)
    image = 100 + 0.01 * torch.randn(1, 3, 16, 16)
    net = OrientedGradients()
    wanted = net(image)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(image)
    assert found.dtype == torch.float32 and wanted.any()
    assert torch.equal(found, wanted)


# Blocks


@pytest.mark.parametrize(("width_in", "width", "stride"), [(4, 4, 1), (4, 6, 1), (4, 6, 2), (4, 4, 2)])
def test_a_block_is_its_formula(width_in, width, stride):
    """In evaluation, a batch norm is an affine map of its running averages."""

    def norm(layer, x):
        scale = layer.weight / (layer.running_var + 1e-5).sqrt()
        return (x - layer.running_mean[:, None, None]) * scale[:, None, None] + layer.bias[:, None, None]

    block = ResidualBlock(width_in, width, stride).double().eval()
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    x = torch.randn(2, width_in, 6, 8, dtype=torch.float64)
    y = F.conv2d(x, block.conv1.weight, stride=stride, padding=1)
    y = norm(block.bn2, F.conv2d(norm(block.bn1, y).clamp(min=0), block.conv2.weight, padding=1))
    short = x
    if stride == 2:
        short = x.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    if stride == 2 or width != width_in:
        short = norm(block.shortcut[2], torch.einsum("bchw,dc->bdhw", short, block.shortcut[1].weight[:, :, 0, 0]))
    assert isinstance(block.shortcut, torch.nn.Identity) == (stride == 1 and width == width_in)
    torch.testing.assert_close(block(x), (y + short).clamp(min=0))


# The whole network


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 80)])
def test_strides_and_widths(height, width):
    net = OrientedConvNet().eval()
    coarse, fine = net(torch.randn(2, 3, height, width))
    assert (net.width, net.fine_width) == (192, 128)
    assert coarse.shape == (2, 192, height // 16, width // 16)
    assert fine.shape == (2, 128, height // 8, width // 8)


def test_other_widths_and_depths():
    net = OrientedConvNet(widths=(8, 10, 12), depths=(1, 1, 3))
    coarse, fine = net(torch.randn(1, 3, 32, 32))
    assert coarse.shape == (1, 12, 2, 2) and fine.shape == (1, 10, 4, 4)
    assert [len(stage) for stage in net.stages] == [1, 1, 3]


@pytest.mark.parametrize(("level", "stride"), [(0, 16), (1, 8)])
def test_a_cell_looks_at_its_own_pixels(level, stride):
    """The centre of mass of what moves a cell lies in the cell, half a stride around (i + 1/2) stride - 1/2."""
    torch.manual_seed(0)
    net = OrientedConvNet().eval()
    image = torch.randn(1, 3, 192, 256).requires_grad_()
    cell = (96 // stride, 112 // stride)
    net(image)[level][0, :, cell[0], cell[1]].sum().backward()
    weight = image.grad.square().sum(dim=(0, 1))
    y = (weight.sum(dim=1) @ torch.arange(192.0)) / weight.sum()
    x = (weight.sum(dim=0) @ torch.arange(256.0)) / weight.sum()
    assert abs(y - (96 + stride / 2 - 0.5)) < stride / 2
    assert abs(x - (112 + stride / 2 - 0.5)) < stride / 2


def test_every_parameter_is_trained():
    net = OrientedConvNet()
    coarse, fine = net(torch.randn(2, 3, 32, 32))
    (coarse.square().sum() + fine.square().sum()).backward()
    assert all(parameter.grad.any() for parameter in net.parameters())
