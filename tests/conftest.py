"""Shared material: a small network with LPMFlow's interface, small images, and the facts beside the repository."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import beside
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lpmflow
from lpmflow.config import LPMFlowConfig, lpmflow_tiny
from lpmflow.model import FlowOutput

processes = beside.Processes()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: beside.command_of(item) is not None)  # last: they run beside the others


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    commands, option = beside.commands_of(session.items), session.config.option
    alone = not beside.has_second_core() or "PYTEST_XDIST_WORKER" in os.environ
    if len(session.items) > len(commands) and not (alone or option.collectonly or option.setupplan):
        processes.begin(commands)


def pytest_unconfigure() -> None:
    processes.stop()


@pytest.fixture
def done(request: pytest.FixtureRequest) -> beside.Done:
    """How the process of a test marked by `beside.python` ended."""
    command = beside.command_of(request.node)
    assert command is not None
    return processes.result(command)


SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of stored facts and photographs beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with stored facts and photographs is not here")
    return SHARED


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors: threads gain nothing there, lose much on a busy machine, and may change the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class FakeModel(nn.Module):
    """Answers like an LPMFlow, in numbers a test can work out.

    flow = `grid_flow` (2, 96, 96), or everywhere `shift` (x, y) cells, plus the difference of the two images' mean
    brightness in both channels, so that images, their order and their place in a batch matter while identical images
    add nothing. Confidence and foreground are made from the source's pixels. `calls` records how it was called.
    """

    def __init__(
        self,
        shift: tuple[float, float] = (0.0, 0.0),
        *,
        grid_flow: Tensor | None = None,
        weights: str | None = "made up",
        **config: Any,
    ) -> None:
        super().__init__()
        self.config: LPMFlowConfig = lpmflow_tiny().replace(name="fake", **config)
        self.weights = weights
        self.calls: list[dict[str, Any]] = []
        if grid_flow is None:
            grid_flow = torch.tensor(shift)[:, None, None].expand(2, *self.config.flow_grid)
        self.grid_flow = nn.Parameter(grid_flow.clone().float())
        self.mix = nn.Linear(3, 1, bias=False)
        nn.init.constant_(self.mix.weight, 1 / 3)

    def forward(self, source: Tensor, target: Tensor, *, return_correlations: bool = False) -> FlowOutput:
        device = source.device.type
        gray = self.mix(torch.stack((source, target)).movedim(2, -1)).squeeze(-1)
        self.calls.append(
            {
                "shape": tuple(source.shape),
                "training": self.training,
                "inference": torch.is_inference_mode_enabled(),
                "autocast": torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
                "computed_in": gray.dtype,
            }
        )
        brightness = gray.mean(dim=(2, 3))
        flow = self.grid_flow + (brightness[1] - brightness[0])[:, None, None, None]
        fine = F.adaptive_avg_pool2d(gray[0][:, None].float(), self.config.fine_grid)[:, 0]
        coarse = F.adaptive_avg_pool2d(gray[0][:, None].float(), self.config.coarse_grid)[:, 0]
        mappings = flow.new_zeros(len(source), 4, 2, *self.config.fine_grid)
        return FlowOutput(flow, mappings, fine.sigmoid(), coarse.sigmoid(), None, None)


@pytest.fixture
def fake_model() -> FakeModel:
    """A fake network that finds no displacement between identical images."""
    return FakeModel()


@pytest.fixture
def make_fake_model() -> type[FakeModel]:
    """The class of the fake network, for a shift, a flow or a configuration of one's own."""
    return FakeModel


@pytest.fixture
def shifted() -> lpmflow.Matcher:
    """Finds everything 3 cells to the right and 2 up."""
    return lpmflow.Matcher(FakeModel((3.0, -2.0)), "cpu")


@pytest.fixture
def photo() -> np.ndarray:
    """A colourful uint8 image (40, 60, 3), different everywhere."""
    y, x = np.mgrid[:40, :60]
    channels = (4 * x + y, 255 - 3 * x, 127 + 100 * np.sin(0.3 * x + 0.2 * y))
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture
def other_photo() -> np.ndarray:
    """Another uint8 image, of another size: (33, 25, 3)."""
    return np.random.default_rng(7).integers(0, 256, (33, 25, 3), dtype=np.uint8)


@functools.cache
def _register_vit(options: tuple[tuple[str, Any], ...]) -> str:
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    def entry(**given: Any) -> nn.Module:
        sizes = {name: given[name] for name in ("img_size", "patch_size", "num_classes") if name in given}
        shape = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
        return VisionTransformer(**{**shape, **dict(options), **sizes})

    entry.__name__ = "_".join(["small_vit", *(f"{name}_{value}".lower() for name, value in options)])
    register_model(entry)
    return entry.__name__


@pytest.fixture(scope="session")
def small_vit() -> Callable[..., str]:
    """Registers a timm ViT of width 32 and two blocks, trained, were it trained, at 64 x 64; gives its name."""
    return lambda **options: _register_vit(tuple(options.items()))
