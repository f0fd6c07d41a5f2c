"""`create_model`: names and options, embedded and backbone weights, and what `weights` says of a network."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from lpmflow import create_model, list_models, save_checkpoint
from lpmflow.config import preset
from lpmflow.model import embedded_weights, factory

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"image_size": (32, 48), "layout_depth": 1, "windows": (4, 3, 2)}


def tiny(**options):
    return create_model("lpmflow-tiny", **{**SMALL, **options})


@pytest.fixture
def no_weights(monkeypatch, tmp_path) -> Path:
    """An empty folder in the place of the embedded weights'."""
    monkeypatch.setattr(factory, "WEIGHTS", tmp_path)
    return tmp_path


# Names and options


def test_the_presets_are_the_models():
    assert list_models() == ["lpmflow-base", "lpmflow-small", "lpmflow-tiny"]


def test_a_new_network_is_random_and_in_training_mode():
    model = tiny()
    assert model.training and model.weights is None and not model.skip_refinement
    assert model.config == preset("lpmflow-tiny").replace(**SMALL)


def test_names_and_options_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="unknown model 'lpmflow'; the models are lpmflow-base, lpmflow-small, lpm"):
        create_model("lpmflow")
    with pytest.raises(TypeError, match="unknown model option 'depth'; the options are name, backbone, "):
        tiny(depth=3)
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size 16"):
        tiny(image_size=(32, 40))


# Weights


def test_a_whole_state_makes_a_network_trained():
    other = tiny()
    other.load_state_dict(tiny().state_dict())
    assert other.weights == "load_state_dict"
    assert copy.deepcopy(other).weights == "load_state_dict"


def test_a_part_of_a_state_leaves_a_network_random():
    model = tiny()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("integration.")}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys
    model.backbone.load_state_dict(model.backbone.state_dict())
    assert model.weights is None


def test_pretrained_loads_the_embedded_weights(no_weights):
    path = no_weights / "lpmflow-tiny.safetensors"
    model = tiny()
    model.weights = "made up"
    save_checkpoint(model, path)
    assert embedded_weights("lpmflow-tiny") == path and embedded_weights("lpmflow-base") is None
    loaded = create_model("lpmflow-tiny", pretrained=True, image_size=(48, 32))
    assert loaded.config == model.config.replace(image_size=(48, 32))
    assert loaded.weights == str(path) and loaded.training
    assert torch.equal(loaded.layout.norm.weight, model.layout.norm.weight)
    assert tiny().weights is None
    with pytest.raises(ValueError, match="backbone_weights cannot be combined with pretrained=True"):
        tiny(pretrained=True, backbone_weights="some.pth")


def test_without_embedded_weights_pretrained_is_refused(no_weights):
    assert [embedded_weights(name) for name in list_models()] == [None] * 3
    with pytest.raises(ValueError, match="pretrained backbone weights exist for timm backbones only"):
        tiny(pretrained=True)
    with pytest.raises(ValueError, match="unknown model 'lpmflow-huge'"):
        embedded_weights("lpmflow-huge")


def test_a_pretrained_backbone_does_not_make_a_trained_network(no_weights, small_vit):
    options = {**SMALL, "backbone": small_vit(), "heads": 4}
    assert create_model("lpmflow-small", pretrained=True, **options).weights is None


def test_backbone_weights_load_into_the_backbone_alone(small_vit, tmp_path):
    options = {**SMALL, "backbone": small_vit(), "heads": 4}
    model = create_model("lpmflow-small", **options)
    names = {name: name.removeprefix("parametrizations.").removesuffix(".original") for name in net_state(model)}
    torch.save({names[name]: tensor for name, tensor in net_state(model).items()}, tmp_path / "vit.pth")
    loaded = create_model("lpmflow-small", backbone_weights=tmp_path / "vit.pth", **options)
    for name, tensor in net_state(model).items():
        assert torch.equal(net_state(loaded)[name], tensor), name
    assert loaded.weights is None and loaded.training
    assert not torch.equal(loaded.layout.position, model.layout.position)
    with pytest.raises(ValueError, match="backbone_weights are for timm backbones, not for oriented-convnet"):
        tiny(backbone_weights=tmp_path / "vit.pth")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.pth"):
        create_model("lpmflow-small", backbone_weights=tmp_path / "none.pth", **options)


def net_state(model) -> dict[str, torch.Tensor]:
    return model.backbone.net.state_dict()
