"""`lpmflow profile`: operations against hand counts, times that add up, a model left as it was."""

from __future__ import annotations

import json

import pytest
import torch

from lpmflow import cli
from lpmflow import profile as door
from lpmflow.config import lpmflow_tiny
from lpmflow.model import LPMFlow, create_model
from lpmflow.profile import BETWEEN, Peaks, profile


@pytest.fixture(scope="module")
def model() -> LPMFlow:
    return create_model("lpmflow-tiny", image_size=96).eval()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(door, "measure_peaks", lambda device, dtype: Peaks(1e12, 1e10))


def stages(found):
    return {stage.name: stage for stage in found.stages}


def test_operations_of_the_layout_encoder_by_hand(model, quick):
    found = stages(profile(model, batch_size=2, seconds=0))["layout encoder"]
    config, width = model.config, model.backbone.width
    tokens, hidden = 2 * (1 + 36), int(model.backbone.width * config.mlp_ratio)
    layers = 2 * tokens * width * (3 * width + width + 2 * hidden)
    attention = 4 * tokens**2 * width
    assert found.flops == 2 * config.layout_depth * (layers + attention)
    assert found.calls == 1
    parameters = sum(p.numel() for p in model.layout.parameters())
    assert found.bytes == 4 * (parameters + 2 * 2 * tokens * width)


def test_the_released_networks_operations():
    """384 GFLOP a pair as released, of which 9 are thirds of projections that nobody reads."""
    torch.manual_seed(0)
    flops, _ = door._count(create_model("lpmflow-base"), (1, 3, 256, 256), torch.float32)
    assert sum(flops.values()) == pytest.approx(375.2e9, rel=1e-3)


def test_parts_and_whole(model, quick):
    found = profile(model, seconds=0)
    names = ["backbone", "layout encoder", "matching 11", "super-resolution", "matching 22"]
    assert [stage.name for stage in found.stages] == [BETWEEN, *names, "correlation to flow", "refinement"]
    assert all(stage.seconds > 0 for stage in found.stages)
    assert found.model == "lpmflow-tiny" and found.image_size == (96, 96) and found.dtype == "float32"
    backbone = stages(found)["backbone"]
    floor = max(backbone.flops / 1e12, backbone.bytes / 1e10)
    assert backbone.roofline == pytest.approx(floor / backbone.seconds)
    assert json.loads(json.dumps(found.to_dict()))["stages"][1]["name"] == "backbone"
    assert "layout encoder" in "\n".join(found.lines())


def test_stages_inside_others_are_counted_once(model, quick, monkeypatch):
    """A network whose tensors do not fit turns correlations to flow within its matching blocks."""
    whole = stages(profile(model, seconds=0))
    monkeypatch.setattr("lpmflow.ops.volume_fits", lambda *args: False)
    streamed = stages(profile(model, seconds=0))
    assert streamed["correlation to flow"].calls == 2 > whole["correlation to flow"].calls
    assert sum(stage.flops for stage in streamed.values()) == sum(stage.flops for stage in whole.values())


def test_half_precision(quick):
    kept, dtype = door.network("lpmflow-tiny", "cpu", "bfloat16", 96)
    assert dtype == torch.bfloat16
    found = profile(kept, dtype=dtype, seconds=0)
    full = profile(LPMFlow(lpmflow_tiny().replace(image_size=96)).eval(), seconds=0)
    assert [stage.flops for stage in found.stages] == [stage.flops for stage in full.stages]
    assert all(2 * half.bytes == whole.bytes for half, whole in zip(found.stages, full.stages, strict=True))


def test_the_model_is_left_as_it_was(model, quick):
    profile(model, seconds=0)
    assert "forward" not in vars(model) and "refine" not in vars(model.integration)
    model.train()
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        profile(model)
    model.eval()
    for arguments, error, wanted in (
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an integer, got float"),
        ({"dtype": torch.float64}, ValueError, "dtype must be float32, bfloat16 or float16"),
        ({"seconds": float("inf")}, ValueError, "seconds must be at least 0 and finite"),
    ):
        with pytest.raises(error, match=wanted):
            profile(model, **arguments)


def test_measured_peaks_are_of_this_machine():
    found = door.measure_peaks(torch.device("cpu"), torch.float32)
    assert 1e8 < found.flops < 1e14 and 1e7 < found.bytes < 1e13
    assert Peaks(2.0, 4.0).floor(6, 4) == 3


def test_the_command(quick, tmp_path, capsys):
    path = tmp_path / "profile.json"
    arguments = ["profile", "--image-size", "96", "--device", "cpu", "--seconds", "0", "--json", str(path)]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("lpmflow-tiny, 1 pair, 96x96, float32, cpu")
    assert json.loads(path.read_text())["batch_size"] == 1
    assert cli.main([*arguments, "--model", "nothing.pth"]) == 1
    assert "nothing.pth" in capsys.readouterr().err
    assert cli.main(["profile", "--json", str(tmp_path / "no" / "file.json")]) == 1
    assert "existing folder" in capsys.readouterr().err
    assert cli.main([*arguments, "--batch-size", "0"]) == 1
    assert "--batch-size must be at least 1" in capsys.readouterr().err
