"""The coordinate convention, proved with numbers: identity, shift, scale, flip, and the paper's resize rule."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lpmflow import geometry

sides = st.integers(1, 700)
sizes = st.tuples(sides, sides)
few = settings(max_examples=40, deadline=None)


def constant_flow(x: float, y: float, grid: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([x, y], dtype=torch.float64)[:, None, None].expand(2, *grid)


def pixel_grid(size: tuple[int, int]) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size[0]).double(), torch.arange(size[1]).double(), indexing="ij")
    return torch.stack((x, y), dim=-1)


@few
@given(sizes, sizes, st.lists(st.tuples(st.floats(-50, 800), st.floats(-50, 800)), min_size=1, max_size=5))
def test_pixels_to_cells_and_back_is_the_identity(image_size, grid_size, points):
    points = torch.tensor(points, dtype=torch.float64)
    cells = geometry.pixels_to_cells(points, image_size, grid_size)
    back = geometry.cells_to_pixels(cells, grid_size, image_size)
    torch.testing.assert_close(back, points, rtol=0, atol=1e-9)


@few
@given(sizes, sizes)
def test_the_borders_of_the_image_are_the_borders_of_the_grid(image_size, grid_size):
    corners = torch.tensor([[-0.5, -0.5], [image_size[1] - 0.5, image_size[0] - 0.5]], dtype=torch.float64)
    expected = torch.tensor([[-0.5, -0.5], [grid_size[1] - 0.5, grid_size[0] - 0.5]], dtype=torch.float64)
    found = geometry.pixels_to_cells(corners, image_size, grid_size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_pixels_to_cells_in_numbers():
    """512 pixels and 128 cells wide, 4 to a cell: pixel 0 lies 3/8 of a cell left of the first centre."""
    points = torch.tensor([[0.0, 0.0], [1.5, 3.5], [511.0, 255.0]])
    expected = torch.tensor([[-0.375, -0.4375], [0.0, 0.0], [127.375, 31.4375]])
    assert torch.equal(geometry.pixels_to_cells(points, (256, 512), (32, 128)), expected)


@few
@given(st.tuples(st.integers(2, 64), st.integers(2, 64)), st.floats(-70, 70), st.floats(-70, 70))
def test_normalized_coordinates_go_there_and_back(grid_size, x, y):
    cells = torch.tensor([[x, y]], dtype=torch.float64)
    back = geometry.normalized_to_cells(geometry.cells_to_normalized(cells, grid_size), grid_size)
    torch.testing.assert_close(back, cells, rtol=0, atol=1e-9)


def test_normalized_ends_are_the_outermost_centres():
    ends = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]])
    expected = torch.tensor([[0.0, 0.0], [31.0, 15.0], [15.5, 7.5]])
    assert torch.equal(geometry.normalized_to_cells(ends, (16, 32)), expected)
    one_cell = geometry.normalized_to_cells(torch.tensor([[-1.0, -1.0]]), (1, 1))
    assert torch.equal(one_cell, torch.zeros(1, 2))
    assert torch.equal(geometry.cells_to_normalized(torch.zeros(1, 2), (1, 1)), torch.full((1, 2), -1.0))


@few
@given(sizes, sizes)
def test_zero_flow_between_equal_sizes_is_exactly_zero(size, grid):
    assert not geometry.flow_to_pixels(torch.zeros(2, *grid), size, size).any()


@few
@given(sizes, sizes, st.tuples(st.integers(1, 20), st.integers(1, 20)), st.floats(-9, 9), st.floats(-9, 9))
def test_a_constant_shift_with_a_change_of_size(source, target, grid, x, y):
    """Shift and scale: a source pixel goes to its relative place in the target, plus the shift in target pixels."""
    flow = constant_flow(x, y, grid)
    scale = torch.tensor([target[1] / source[1], target[0] / source[0]], dtype=torch.float64)
    shift = torch.tensor([x * target[1] / grid[1], y * target[0] / grid[0]], dtype=torch.float64)
    positions = pixel_grid(source)
    expected = (positions + 0.5) * scale - 0.5 + shift
    found = positions + geometry.flow_to_pixels(flow, source, target)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("size", [(512, 512), (128, 128), (33, 70)])
def test_a_flip_of_coordinates(size):
    """The flow that mirrors cells left to right sends pixel x to W - 1 - x, exactly, between the outer cell centres."""
    grid = (16, 32)
    u = torch.arange(grid[1], dtype=torch.float64).expand(grid)
    flow = torch.stack((grid[1] - 1 - 2 * u, torch.zeros_like(u)))
    height, width = size
    inside = [x for x in range(width) if -1e-9 <= (x + 0.5) * grid[1] / width - 0.5 <= grid[1] - 1 + 1e-9]
    found = geometry.flow_to_pixels(flow, size, size)
    expected = torch.tensor([width - 1.0 - 2 * x for x in inside], dtype=torch.float64)
    torch.testing.assert_close(found[height // 2, inside, 0], expected, rtol=0, atol=1e-9)
    assert not found[..., 1].any()
    points = torch.tensor([[x, 0.3 * height] for x in inside], dtype=torch.float64)
    moved = geometry.transfer(flow, points, size, size)
    torch.testing.assert_close(moved[:, 0], width - 1 - points[:, 0], rtol=0, atol=1e-9)
    torch.testing.assert_close(moved[:, 1], points[:, 1], rtol=0, atol=1e-9)


def test_the_papers_case_is_interpolate_times_four():
    flow = torch.randn(2, 128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 4 * F.interpolate(flow[None], (512, 512), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    found = geometry.flow_to_pixels(flow, (512, 512), (512, 512))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@few
@given(sizes, sizes, st.tuples(st.integers(1, 20), st.integers(1, 20)), st.integers(0, 1000))
def test_transfer_at_whole_pixels_is_the_pixel_flow(source, target, grid, seed):
    generator = torch.Generator().manual_seed(seed)
    flow = torch.randn(2, *grid, dtype=torch.float64, generator=generator)
    x = torch.randint(source[1], (10,), generator=generator)
    y = torch.randint(source[0], (10,), generator=generator)
    points = torch.stack((x, y), dim=1)
    expected = points + geometry.flow_to_pixels(flow, source, target)[y, x]
    torch.testing.assert_close(geometry.transfer(flow, points, source, target), expected, rtol=0, atol=1e-8)


def test_chunked_rows_give_the_same_flow_and_warp(monkeypatch):
    flow = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(2))
    whole = geometry.flow_to_pixels(flow, (37, 11), (20, 30))
    warped = geometry.warp_image(image, whole)
    monkeypatch.setattr(geometry, "_CHUNK", 30)
    assert torch.equal(geometry.flow_to_pixels(flow, (37, 11), (20, 30)), whole)
    assert torch.equal(geometry.warp_image(image, whole), warped)


@pytest.mark.parametrize("flow_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_dtypes(flow_dtype):
    flow = torch.zeros(2, 4, 4, dtype=flow_dtype)
    wide = torch.float64 if flow_dtype == torch.float64 else torch.float32
    assert geometry.flow_to_pixels(flow, (3, 3), (5, 5)).dtype == wide
    assert geometry.transfer(flow, torch.zeros(1, 2), (3, 3), (5, 5)).dtype == wide
    assert geometry.transfer(flow, torch.zeros(1, 2).double(), (3, 3), (5, 5)).dtype == torch.float64


def test_sample_image_reads_between_pixels_and_clamps():
    image = torch.tensor([[[0.0, 10.0], [20.0, 30.0]]])
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.0], [0.0, 0.25], [0.5, 0.5], [-3.0, -3.0], [9.0, 0.0]])
    expected = torch.tensor([0.0, 30.0, 5.0, 5.0, 15.0, 0.0, 10.0])[:, None]
    assert torch.equal(geometry.sample_image(image, points), expected)
    assert geometry.sample_image(image, points.reshape(7, 1, 1, 2)).shape == (7, 1, 1, 1)
    byte = (image * 2).to(torch.uint8)
    assert torch.equal(geometry.sample_image(byte, points), expected * 2)


def test_sample_image_gradients_are_those_of_finite_differences():
    image = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
    points = torch.tensor([[0.3, 1.6], [3.2, 2.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(geometry.sample_image, (image, points))


def test_warp_by_a_whole_shift_moves_the_pixels():
    image = torch.arange(60, dtype=torch.uint8).reshape(1, 6, 10)
    flow = torch.tensor([2.0, -1.0]).expand(6, 10, 2)
    warped = geometry.warp_image(image, flow)
    assert warped.dtype == torch.uint8
    assert torch.equal(warped[:, 1:, :8], image[:, :5, 2:])
    assert torch.equal(warped[:, 0, :8], image[:, 0, 2:])
    assert torch.equal(warped[:, 1:, 9], image[:, :5, 9])


def test_huge_images_are_exact_at_the_far_corner():
    flow = constant_flow(1.0, 0.0, (4, 4)).float()
    moved = geometry.transfer(flow, torch.tensor([[5999.0, 3999.0]]).double(), (4000, 6000), (4000, 6000))
    torch.testing.assert_close(moved, torch.tensor([[7499.0, 3999.0]]).double(), rtol=0, atol=1e-9)


def test_shapes_that_make_no_sense_are_refused():
    flow = torch.zeros(2, 4, 4)
    with pytest.raises(ValueError, match=r"points must have shape \(\.\.\., 2\), got \(5, 3\)"):
        geometry.pixels_to_cells(torch.zeros(5, 3), (4, 4), (4, 4))
    with pytest.raises(ValueError, match=r"flow must have shape \(2, gh, gw\) with no side 0, got \(4, 4, 2\)"):
        geometry.flow_to_pixels(torch.zeros(4, 4, 2), (4, 4), (4, 4))
    with pytest.raises(ValueError, match=r"both at least 1, got \(0, 4\)"):
        geometry.flow_to_pixels(flow, (0, 4), (4, 4))
    with pytest.raises(ValueError, match=r"points must have shape \(N, 2\), got \(2,\)"):
        geometry.transfer(flow, torch.zeros(2), (4, 4), (4, 4))
    with pytest.raises(ValueError, match=r"image must have shape \(C, H, W\) with no side 0, got \(4, 4\)"):
        geometry.sample_image(torch.zeros(4, 4), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"flow must have shape \(H, W, 2\), got \(2, 4, 4\)"):
        geometry.warp_image(torch.zeros(3, 4, 4), flow)


def test_the_middle_stays_the_middle():
    grid, size = (3, 5), (11, 21)
    middle = torch.tensor([(size[1] - 1) / 2, (size[0] - 1) / 2])
    expected = torch.tensor([(grid[1] - 1) / 2, (grid[0] - 1) / 2])
    torch.testing.assert_close(geometry.pixels_to_cells(middle, size, grid), expected)
    assert math.isclose(expected[0].item(), 2.0)
