"""Tables loaded to another grid: closed forms at a third and a half of the size, a bicubic of our own elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lpmflow import create_model, load_checkpoint, save_checkpoint
from lpmflow.model import LPMFlow
from lpmflow.model.released import from_released, to_released
from lpmflow.model.resize import resize_tables

POSITIONS = {
    "layout.position": (1, 0),
    "superres.match_coarse.position_source": (1, 1),
    "superres.match_coarse.position_target": (1, 1),
    "superres.match_cross.position_source": (1, 1),
    "superres.match_cross.position_target": (1, 1),
    "superres.match_cross.position_source_fine": (2, 1),
    "superres.match_cross.position_target_fine": (2, 1),
    "superres.match_fine.position_source_fine": (2, 1),
    "superres.match_fine.position_target_fine": (2, 1),
}
"""Name -> cells a coarse cell and axis, and tokens before the patches (cls)."""
REGION_BIAS = "layout.blocks.0.attn.bias_table"
COORDINATES = ("integration.x_normal", "integration.y_normal")


def network(grid: tuple[int, int], **options) -> LPMFlow:
    """A network whose backbone gives `grid`, made without the time and memory for its weights."""
    chosen = {
        "layout_depth": 1,
        "cross_scale": True,
        "fine_features": False,
        "superres_depth": 2,
        "superres_window": 2,
        "windows": (4, 3, 2),
        **options,
    }
    with torch.device("meta"):
        return create_model("lpmflow-tiny", image_size=(16 * grid[0], 16 * grid[1]), **chosen)


def tables(model: LPMFlow, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors for all of `model`'s parameters, but the coordinates it starts with."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.linspace(-1, 1, len(like)) if name in COORDINATES else torch.randn(like.shape, generator=generator)
        for name, like in model.state_dict().items()
    }


def patches(state: dict[str, Tensor], name: str, grid: tuple[int, int]) -> np.ndarray:
    """The rows of a position table that belong to cells, as (rows, columns, channels)."""
    scale, prefix = POSITIONS[name]
    return state[name][0, prefix:].reshape(scale * grid[0], scale * grid[1], -1).numpy()


def regions(state: dict[str, Tensor], grid: tuple[int, int]) -> np.ndarray:
    """The region bias as (heads, row offsets, column offsets, regions)."""
    return state[REGION_BIAS].reshape(-1, 2 * grid[0] - 1, 2 * grid[1] - 1, 4).numpy()


def bicubic(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(rows, columns, ...) resized by cubic convolution with a = -3/4, pixel areas aligned, edges repeated."""
    a = -0.75
    for axis, length in enumerate(size):
        out = []
        for index in range(length):
            place = (index + 0.5) * maps.shape[axis] / length - 0.5
            first = math.floor(place)
            total = 0.0
            for tap in range(first - 1, first + 3):
                x = abs(place - tap)
                near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
                total = total + (near if x <= 1 else far) * maps.take(min(max(tap, 0), maps.shape[axis] - 1), axis)
            out.append(total)
        maps = np.stack(out, axis)
    return maps


# The same grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_grid_is_bit_identical(dtype):
    model = network((2, 5))
    state = {name: tensor.to(dtype) for name, tensor in tables(model).items()}
    resized = resize_tables(state, model)
    assert list(resized) == list(state)
    for name, tensor in state.items():
        assert resized[name] is tensor, name


def test_only_tables_change():
    old, new = network((6, 9)), network((2, 3))
    state = tables(old)
    resized = resize_tables(state, new)
    changed = {name for name, tensor in resized.items() if tensor is not state[name]}
    assert changed == {*POSITIONS, REGION_BIAS, *COORDINATES}


# Positions


@pytest.mark.parametrize("name", POSITIONS)
def test_a_third_of_the_grid_takes_every_third_position(name):
    """The centre of a cell three times as large is the centre of the middle one of the three."""
    state = tables(network((6, 9)))
    resized = resize_tables(state, network((2, 3)))
    prefix = POSITIONS[name][1]
    np.testing.assert_array_equal(resized[name][:, :prefix], state[name][:, :prefix])
    wanted = patches(state, name, (6, 9))[1::3, 1::3]
    np.testing.assert_allclose(patches(resized, name, (2, 3)), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["layout.position", "superres.match_cross.position_target_fine"])
def test_a_table_linear_in_the_position_stays_linear(name):
    """Halved, the centres lie half way between two cells, where cubic convolution is exact but for the border."""
    old, new = (8, 12), (4, 6)
    scale, prefix = POSITIONS[name]
    rows, columns = np.mgrid[: scale * old[0], : scale * old[1]]
    state = tables(network(old))
    plane = 5 + 3 * (rows + 0.5) / scale / old[0] - 7 * (columns + 0.5) / scale / old[1]
    state[name][0, prefix:] = torch.from_numpy(plane.reshape(-1, 1)).float()
    rows, columns = np.mgrid[: scale * new[0], : scale * new[1]]
    wanted = 5 + 3 * (rows + 0.5) / scale / new[0] - 7 * (columns + 0.5) / scale / new[1]
    found = patches(resize_tables(state, network(new)), name, new)
    np.testing.assert_allclose(
        found[1:-1, 1:-1], np.broadcast_to(wanted[1:-1, 1:-1, None], found[1:-1, 1:-1].shape), atol=2e-6
    )


@pytest.mark.parametrize(("old", "new"), [((3, 2), (4, 7)), ((2, 4), (4, 2)), ((2, 8), (4, 4)), ((5, 5), (3, 5))])
def test_any_other_grid_is_bicubic(old, new):
    """2x4 and 4x2, or 2x8 and 4x4, have tables of one shape, and yet are resized."""
    state = tables(network(old))
    resized = resize_tables(state, network(new))
    for name, (scale, _) in POSITIONS.items():
        wanted = bicubic(patches(state, name, old).astype(np.float64), (scale * new[0], scale * new[1]))
        np.testing.assert_allclose(patches(resized, name, new), wanted, atol=1e-5, err_msg=name)
    wanted = bicubic(regions(state, old).transpose(1, 2, 0, 3).astype(np.float64), (2 * new[0] - 1, 2 * new[1] - 1))
    np.testing.assert_allclose(regions(resized, new), wanted.transpose(2, 0, 1, 3), atol=1e-5)


# Biases


def test_a_third_of_the_offsets_takes_every_third_bias():
    """15 x 9 offsets of an 8 x 5 grid, 5 x 3 of a 3 x 2 grid; heads and the four regions stay apart."""
    state = tables(network((8, 5)))
    found = regions(resize_tables(state, network((3, 2))), (3, 2))
    np.testing.assert_allclose(found, regions(state, (8, 5))[:, 1::3, 1::3], atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [((4, 6), (9, 4)), ((6, 4), (4, 9))])
def test_a_bias_that_is_odd_in_the_offset_stays_odd(old, new):
    """Offset 0 stays in the middle, and what is no bias towards one side does not become one."""
    rows, columns = (np.arange(2 * side - 1.0) - (side - 1) for side in old)
    odd = rows[:, None] ** 3 + 2 * columns[None, :] - columns[None, :] ** 2 * rows[:, None]
    state = tables(network(old))
    state[REGION_BIAS] = torch.from_numpy(np.broadcast_to(odd[None, :, :, None], (6, *odd.shape, 4)).copy()).flatten(1)
    found = regions(resize_tables(state, network(new)), new)
    np.testing.assert_allclose(found, -found[:, ::-1, ::-1], atol=1e-9)
    assert np.abs(found).max() > 10
    np.testing.assert_allclose(found[:, new[0] - 1, new[1] - 1], 0, atol=1e-9)


def test_window_biases_follow_the_window_and_not_the_grid():
    """15 x 15 offsets of window 8 to the 5 x 5 of window 3; the others pass, in another grid too."""
    names = [f"integration.stages.{number}.bias_table" for number in range(3)]
    state = tables(network((4, 4), windows=(8, 5, 2)))
    resized = resize_tables(state, network((3, 6), windows=(3, 5, 2)))
    wanted = state[names[0]].reshape(15, 15, -1)[1::3, 1::3].flatten(0, 1)
    torch.testing.assert_close(resized[names[0]], wanted, rtol=0, atol=1e-6)
    for name in (*names[1:], "superres.upsample.stages.1.bias_table"):
        assert resized[name] is state[name]


# Coordinates


def test_coordinates_keep_their_ends_and_stay_linear():
    resized = resize_tables(tables(network((2, 4))), network((7, 3)))
    torch.testing.assert_close(resized["integration.y_normal"], torch.linspace(-1, 1, 14))
    torch.testing.assert_close(resized["integration.x_normal"], torch.linspace(-1, 1, 6))


def test_trained_coordinates_are_interpolated():
    """4 entries to 10: the old ones are every third, the others lie on the lines between."""
    state = tables(network((2, 2)))
    state["integration.x_normal"] = torch.tensor([-1.1, 0.2, 0.5, 1.4])
    found = resize_tables(state, network((2, 5)))["integration.x_normal"]
    wanted = np.interp(np.arange(10) / 3, np.arange(4), [-1.1, 0.2, 0.5, 1.4])
    np.testing.assert_allclose(found, wanted, atol=1e-6)


# Through files


def test_a_checkpoint_loads_to_another_image_size(tmp_path):
    torch.manual_seed(0)
    model = LPMFlow(network((2, 4)).config)
    with torch.no_grad():
        model.integration.x_normal.mul_(1.1)
    save_checkpoint(model, tmp_path / "a.safetensors", dtype=torch.float16)
    loaded = load_checkpoint(tmp_path / "a.safetensors", image_size=(64, 32))
    assert loaded.config == model.config.replace(image_size=(64, 32))
    for name, (scale, _) in POSITIONS.items():
        wanted = bicubic(patches(model.state_dict(), name, (2, 4)), (4 * scale, 2 * scale))
        np.testing.assert_allclose(patches(loaded.state_dict(), name, (4, 2)), wanted, atol=1e-3, err_msg=name)
    torch.testing.assert_close(loaded.integration.x_normal.data, torch.linspace(-1.1, 1.1, 4), rtol=0, atol=1e-3)
    with torch.inference_mode():
        flow = loaded(*torch.randn(2, 1, 3, 64, 32)).flow
    assert flow.shape == (1, 2, 32, 16) and flow.isfinite().all()


@pytest.mark.parametrize("grid", [(2, 8), (8, 2)])
def test_a_released_checkpoint_tells_its_own_grid(grid):
    """2x8, 8x2 and 4x4 cells: tables of one length, the coordinate tables tell them apart."""
    old = network(grid)
    state = tables(old)
    old.load_state_dict(state, assign=True)
    released = to_released(old)
    for name, tensor in from_released(released, network(grid)).items():
        assert torch.equal(tensor, state[name]), name
    found = from_released(released, network((4, 4)))
    wanted = bicubic(patches(state, "layout.position", grid), (4, 4))
    np.testing.assert_allclose(patches(found, "layout.position", (4, 4)), wanted, atol=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("layout.position", (1, 9, 192), "(1, 8, 192)"),
        ("layout.position", (1, 8, 96), "(1, 8, 192)"),
        ("superres.match_fine.position_source_fine", (1, 32, 192), "(1, 33, 192)"),
        (REGION_BIAS, (8, 84), "(6, 84)"),
        (REGION_BIAS, (6, 85), "(6, 84)"),
        ("integration.stages.1.bias_table", (26, 3), "(25, 3)"),
        ("integration.stages.1.bias_table", (25, 8), "(25, 3)"),
        ("integration.x_normal", (7,), "(2 x cells,)"),
        ("integration.y_normal", (2, 2), "(2 x cells,)"),
        ("layout.norm.weight", (8,), "(192,)"),
    ],
)
@pytest.mark.parametrize("grid", [(2, 4), (3, 3)])
def test_what_fits_no_grid_is_named(grid, name, shape, wanted):
    state = tables(network((2, 4)))
    state[name] = torch.zeros(shape)
    with pytest.raises(ValueError) as caught:
        resize_tables(state, network(grid))
    assert str(caught.value) == f"parameter {name} must have shape {wanted}, got {shape}"
