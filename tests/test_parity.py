"""The base network against figures of the released one, stored beside the repository: weights, stages and flow.

The weights are drawn by name from a frozen random stream, so nothing but the figures is stored. The figures were
computed in float64; in float32 the released code itself is up to 9e-4 cells away from them. The tolerances of the
stages are several times what this network measured.
"""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lpmflow import create_model, released_parameter_shapes
from lpmflow.model import FlowOutput, LPMFlow
from lpmflow.model.released import from_released
from lpmflow.model.rptc import rptc_loss


@dataclass
class Run:
    """One pair through the base network: its answer, and what stages of it gave."""

    model: LPMFlow
    output: FlowOutput
    backbone: Tensor
    encoder: Tensor
    upsampled: Tensor
    context: Tensor
    residual: Tensor


@pytest.fixture(scope="module")
def parity(shared: Path) -> Path:
    folder = shared / "parity"
    if not (folder / "lpmflow_parity.npz").is_file():
        pytest.skip("../shared holds no parity figures of the released network")
    return folder


@pytest.fixture(scope="module")
def stored(parity: Path) -> dict[str, np.ndarray]:
    with np.load(parity / "lpmflow_parity.npz") as figures:
        return dict(figures)


@pytest.fixture(scope="module")
def run(parity: Path) -> Run:
    fill = runpy.run_path(str(parity / "fill.py"))
    released = {
        name: torch.linspace(-1, 1, 32)
        if name in ("x_normal", "y_normal")
        else torch.from_numpy(fill["tensor_for"](name, shape).astype(np.float32))
        for name, shape in released_parameter_shapes()
    }
    with torch.device("meta"):  # no time for random weights that are not kept
        model = create_model("lpmflow-base").eval()
    model.load_state_dict(from_released(released, model), assign=True)
    seen: dict[str, list] = {"backbone": [], "layout": [], "superres.upsample": [], "integration.context": []}
    for name, outputs in seen.items():
        model.get_submodule(name).register_forward_hook(lambda module, args, output, kept=outputs: kept.append(output))
    refinements: list[Tensor] = []
    model.integration.head_out.register_forward_hook(lambda module, args, output: refinements.append(output))
    source, target = (images.float() for images in fill["images"]())
    with torch.inference_mode():
        output = model(source, target, return_correlations=True)
    return Run(
        model,
        output,
        backbone=seen["backbone"][0].tokens,
        encoder=torch.cat(seen["layout"][0], dim=1)[0],
        upsampled=seen["superres.upsample"][0][0],
        context=seen["integration.context"][0][0].relu(),
        residual=refinements[0][0],
    )


def close(found: Tensor, wanted: np.ndarray, atol: float) -> None:
    assert tuple(found.shape) == wanted.shape
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=atol)


def test_the_flow(run, stored):
    found = run.output.flow[0].numpy()
    assert found.shape == stored["flow"].shape and np.abs(stored["flow"]).max() > 50
    error = np.abs(found - stored["flow"])
    assert error.max() <= 5e-3
    assert error.mean() <= 3e-4


def test_the_refinement(run, stored):
    assert np.abs(stored["residual"]).mean() > 0.01
    close(run.residual, stored["residual"], 2e-3)


@pytest.mark.parametrize(("index", "scale"), list(enumerate(("11", "12", "21", "22"))))
def test_the_mappings(run, stored, index, scale):
    assert run.model.config.scales[index] == scale
    close(run.output.mappings[0, index], stored[f"mapping_{scale}"], 2e-4)


@pytest.mark.parametrize(("index", "scale", "every"), [(0, "11", 1), (1, "12", 4), (2, "21", 8), (3, "22", 16)])
def test_the_correlations(run, stored, index, scale, every):
    close(run.output.correlations[index][0, ::every], stored[f"corr_{scale}"], 2e-5)


@pytest.mark.parametrize(("image", "segment"), [("src", "segment_source"), ("tgt", "segment_target")])
def test_the_backbone(run, stored, image, segment):
    """The stored patches are those the released encoder changed in place, by their position and segment."""
    layout = run.model.layout
    tokens = run.backbone[0 if image == "src" else 1].clone()
    with torch.no_grad():
        tokens[1:] += layout.position[0] + getattr(layout, segment)[0]
    close(tokens[::16], stored[f"backbone_{image}"], 5e-5)


def test_the_encoder(run, stored):
    close(run.encoder[::16], stored["encoder"], 5e-5)


def test_the_super_resolution(run, stored):
    close(run.upsampled[::64], stored["upsampled_src"], 2e-4)


def test_the_context(run, stored):
    close(run.context[::8], stored["context"], 2e-4)


def test_the_training_task(parity):
    with np.load(parity / "training_parity.npz") as figures:
        positions, wanted = torch.from_numpy(figures["rptc_mask"]), float(figures["rptc_loss"])
    tokens = torch.from_numpy(np.random.RandomState(7).standard_normal((2, 257, 768)))
    assert rptc_loss(tokens, positions, (16, 16)).item() == pytest.approx(wanted, rel=1e-9)
    assert wanted == pytest.approx(2.9673, abs=1e-4)
