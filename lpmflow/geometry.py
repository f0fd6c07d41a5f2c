"""THE coordinate convention, once; every other file follows it.

**Pixels.** A point is (x, y): x to the right, y down, in pixels of its own image. Pixel *centres* have integer
coordinates, so an image of height H and width W covers [-0.5, W - 0.5] x [-0.5, H - 0.5], its top left pixel is
(0, 0) and its middle is ((W - 1) / 2, (H - 1) / 2). Sizes are always (height, width), as in tensor shapes; points,
flow channels and displacements are always (x, y).

**Flow** is target position minus source position and lives on the source grid: the source pixel (x, y) is seen in the
target at (x, y) + flow[y, x].

**Grids.** The network squashes both images, whatever their sizes, to one frame and divides it into gh x gw cells, of
which the pixels are a special case: cell centres have integer coordinates too. An image of size (H, W) and its grid
describe the same area, hence

    u = (x + 0.5) * gw / W - 0.5          x = (u + 0.5) * W / gw - 0.5

and the same for v, y with gh, H. A flow (2, gh, gw) in cells (channel 0 is x, 1 is y) sends the source cell centre
(u, v) to the target cell coordinate (u, v) + flow[:, v, u]. Between cell centres it is read bilinearly, beyond the
outermost ones it keeps their value. So for a source of size (Hs, Ws) and a target of size (Ht, Wt), with f the flow
read at (u, v),

    target x = (u + f_x + 0.5) * Wt / gw - 0.5

which for Ws = Wt = 512 and gw = 128 is "resize the flow bilinearly with align_corners=False to 512 and multiply it
by 4", the paper's rule.

**Normalised coordinates** in [-1, 1] (the network's mappings) have the `align_corners=True` meaning: -1 is the
*centre* of the first cell, 1 the centre of the last. A grid one cell wide has the single coordinate -1.

All functions are pure, differentiable where that makes sense, keep the device, and compute in the widest dtype they
are given, at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

Size = tuple[int, int]
"""(height, width)"""

_CHUNK = 1 << 22
"""Pixels worked on at a time, so that a photograph of any size costs little beside its result."""


def pixels_to_cells(points: Tensor, image_size: Size, grid_size: Size) -> Tensor:
    """Pixel coordinates (..., 2) of an image of `image_size` as cell coordinates of its grid of `grid_size`.

    Both sizes are (height, width); swapping them gives the inverse. Grids can be images and images grids, so this is
    also how a point follows a resize. Raises ValueError when the last dimension is not 2 or a size is not positive.
    """
    points = _points(points)
    scale = points.new_tensor(_ratios(grid_size, image_size))
    return (points + 0.5) * scale - 0.5


def cells_to_pixels(cells: Tensor, grid_size: Size, image_size: Size) -> Tensor:
    """The inverse of `pixels_to_cells`: cell coordinates (..., 2) as pixels of the image the grid was laid on."""
    return pixels_to_cells(cells, grid_size, image_size)


def normalized_to_cells(coordinates: Tensor, grid_size: Size) -> Tensor:
    """Normalised coordinates (..., 2), -1 the first cell's centre and 1 the last one's, as cell coordinates."""
    coordinates = _points(coordinates)
    height, width = _size(grid_size)
    return (coordinates + 1) * coordinates.new_tensor([(width - 1) / 2, (height - 1) / 2])


def cells_to_normalized(cells: Tensor, grid_size: Size) -> Tensor:
    """The inverse of `normalized_to_cells`; along a side of one cell the answer is -1 for its only centre."""
    cells = _points(cells)
    height, width = _size(grid_size)
    return cells * cells.new_tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)]) - 1


def flow_to_pixels(flow: Tensor, source_size: Size, target_size: Size) -> Tensor:
    """A grid flow (2, gh, gw) in cells as displacements (Hs, Ws, 2) in original pixels, for every source pixel.

    `source_size` (Hs, Ws) and `target_size` (Ht, Wt) are the sizes of the two original images; where they differ the
    flow contains the change of size. float32, or float64 for a float64 flow. Between images of one size a zero flow
    stays exactly zero. Raises ValueError when the flow is not (2, gh, gw) or a size is not positive.
    """
    flow = _flow(flow)
    grid_size = (flow.shape[1], flow.shape[2])
    (source_height, source_width), (target_height, target_width) = _size(source_size), _size(target_size)
    scale_x, scale_y = _ratios(target_size, grid_size)
    x = torch.arange(source_width, dtype=flow.dtype, device=flow.device)
    y = torch.arange(source_height, dtype=flow.dtype, device=flow.device)
    stretch_x = (x + 0.5) * (target_width / source_width - 1)
    stretch_y = (y + 0.5) * (target_height / source_height - 1)
    columns = _read_line(flow, 2, (x + 0.5) * (grid_size[1] / source_width) - 0.5)
    v = (y + 0.5) * (grid_size[0] / source_height) - 0.5

    pixels = flow.new_empty(source_height, source_width, 2)
    step = max(1, _CHUNK // source_width)
    for top in range(0, source_height, step):
        rows = slice(top, top + step)
        read = _read_line(columns, 1, v[rows])
        pixels[rows, :, 0] = read[0] * scale_x + stretch_x
        pixels[rows, :, 1] = read[1] * scale_y + stretch_y[rows, None]
    return pixels


def transfer(flow: Tensor, points: Tensor, source_size: Size, target_size: Size) -> Tensor:
    """Source pixels (N, 2) moved by a grid flow (2, gh, gw): target pixels (N, 2), sub-pixel.

    At whole pixels this is the pixel plus `flow_to_pixels`. Points need not lie inside the image: beyond the
    outermost cell centres the flow keeps its value there. The result has the wider dtype of flow and points.
    Raises ValueError when a shape or a size is not as stated.
    """
    flow, points = _flow(flow), _points(points)
    if points.ndim != 2:
        raise ValueError(f"points must have shape (N, 2), got {tuple(points.shape)}")
    grid_size = (flow.shape[1], flow.shape[2])
    dtype = torch.promote_types(flow.dtype, points.dtype)
    cells = pixels_to_cells(points.to(dtype), source_size, grid_size)
    return cells_to_pixels(cells + sample_image(flow.to(dtype), cells), grid_size, target_size)


def sample_image(image: Tensor, points: Tensor) -> Tensor:
    """Values of an image (C, H, W) read bilinearly at pixel coordinates (..., 2): (..., C).

    Points outside the image read the nearest border pixel. The result is floating point, in the wider dtype of the
    two. Raises ValueError when a shape is not as stated or the image has no pixels.
    """
    points = _points(points)
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"image must have shape (C, H, W) with no side 0, got {tuple(image.shape)}")
    _, height, width = image.shape
    dtype = torch.promote_types(_floating(image.dtype), points.dtype)
    left, right, across = _neighbours(points[..., 0].to(dtype), width)
    top, bottom, down = _neighbours(points[..., 1].to(dtype), height)
    upper = torch.lerp(image[:, top, left].to(dtype), image[:, top, right].to(dtype), across)
    lower = torch.lerp(image[:, bottom, left].to(dtype), image[:, bottom, right].to(dtype), across)
    return torch.lerp(upper, lower, down).movedim(0, -1)


def warp_image(image: Tensor, flow: Tensor) -> Tensor:
    """The target image (C, Ht, Wt) pulled back to the source frame by a pixel flow (Hs, Ws, 2): (C, Hs, Ws).

    The source pixel p shows the target at p + flow[p], read bilinearly; where that lies outside the target, its
    nearest border pixel. uint8 images are rounded to uint8, others keep their floating dtype. Raises ValueError when
    a shape is not as stated.
    """
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow must have shape (H, W, 2), got {tuple(flow.shape)}")
    height, width = flow.shape[:2]
    warped = image.new_empty(image.shape[0], height, width)
    x = torch.arange(width, dtype=flow.dtype, device=flow.device)
    step = max(1, _CHUNK // (4 * max(width, 1)))
    for top in range(0, height, step):
        part = flow[top : top + step]
        y = torch.arange(top, top + part.shape[0], dtype=flow.dtype, device=flow.device)
        places = part + torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        read = sample_image(image, places).movedim(-1, 0)
        warped[:, top : top + step] = read.round() if image.dtype == torch.uint8 else read
    return warped


def _read_line(values: Tensor, dim: int, positions: Tensor) -> Tensor:
    """`values` read linearly along `dim` at the (sub-cell) positions (n,), clamped to the outermost cells."""
    first, second, weight = _neighbours(positions, values.shape[dim])
    weight = weight.reshape([-1 if axis == dim else 1 for axis in range(values.ndim)])
    return torch.lerp(values.index_select(dim, first), values.index_select(dim, second), weight)


def _neighbours(positions: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the two cells around each position on a line of `length` cells, and the weight of the second."""
    positions = positions.clamp(0, length - 1)
    first = positions.floor()
    indices = first.long()
    return indices, (indices + 1).clamp(max=length - 1), positions - first


def _points(points: Tensor) -> Tensor:
    if points.ndim < 1 or points.shape[-1] != 2:
        raise ValueError(f"points must have shape (..., 2), got {tuple(points.shape)}")
    return points.to(_floating(points.dtype))


def _flow(flow: Tensor) -> Tensor:
    if flow.ndim != 3 or flow.shape[0] != 2 or 0 in flow.shape:
        raise ValueError(f"flow must have shape (2, gh, gw) with no side 0, got {tuple(flow.shape)}")
    return flow.to(_floating(flow.dtype))


def _floating(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _size(size: Size) -> Size:
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"a size must be (height, width), both at least 1, got {tuple(size)}")
    return height, width


def _ratios(numerator: Size, denominator: Size) -> tuple[float, float]:
    """(x, y) ratio of two sizes given as (height, width)."""
    (top_y, top_x), (bottom_y, bottom_x) = _size(numerator), _size(denominator)
    return top_x / bottom_x, top_y / bottom_y
