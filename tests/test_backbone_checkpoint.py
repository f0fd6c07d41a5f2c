"""Backbone checkpoints of others (timm, DINO, iBOT, MAE), made here: their names, their sizes, and refusals."""

from __future__ import annotations

import argparse
import os

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lpmflow import create_model, load_checkpoint, save_checkpoint
from lpmflow.config import CONVNET
from lpmflow.model.checkpoint import load_backbone, read_torch_file

pytestmark = pytest.mark.usefixtures("one_thread")
ORIGINAL = "parametrizations.pos_embed.original"


@pytest.fixture
def vit(small_vit):
    """Builds a network on a ViT of width 32 that was, so to speak, trained at `img_size`."""

    def build(img_size=64, **options):
        chosen = {"image_size": (32, 48), "layout_depth": 1, "windows": (4, 3, 2), "heads": 4}
        backbone = small_vit(img_size=img_size)
        return create_model("lpmflow-small", **{**chosen, "backbone": backbone, **options}).eval()

    return build


def timm_names(model) -> dict[str, Tensor]:
    """The names and shapes of the plain timm model, random numbers."""
    generator = torch.Generator().manual_seed(1)
    return {
        "pos_embed" if name == ORIGINAL else name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.backbone.net.state_dict().items()
    }


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


ONE = torch.zeros(1)
FORMATS = {
    "timm": lambda state: {**state, "head.weight": ONE, "head.bias": ONE},
    "timm, distilled": lambda state: {**state, "head.weight": ONE, "head_dist.weight": ONE},
    "DINO": lambda state: state,
    "DINO, all of it": lambda state: {
        "student": prefixed("module.backbone.", {name: ONE for name in state}),
        "teacher": {**prefixed("backbone.", state), "head.mlp.0.weight": ONE, "head.last_layer.weight_g": ONE},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_base", patch_size=16),
        "dino_loss": {"center": ONE},
    },
    "iBOT": lambda state: {"state_dict": {**state, "masked_embed": ONE}},
    "iBOT, all of it": lambda state: {
        "student": {"module.backbone.masked_embed": ONE},
        "teacher": {**prefixed("module.backbone.", state), "module.head.mlp.0.weight": ONE},
    },
    "MAE": lambda state: {"model": state},
    "MAE, all of it": lambda state: {
        "model": {
            **state,
            "mask_token": ONE,
            "decoder_pos_embed": ONE,
            "decoder_embed.weight": ONE,
            "decoder_blocks.0.attn.qkv.weight": ONE,
            "decoder_pred.bias": ONE,
        },
        "epoch": 1600,
    },
    "a data-parallel script": lambda state: {"state_dict": prefixed("module.", state), "epoch": 3},
}


# What is read


@pytest.mark.parametrize("name", FORMATS)
def test_every_parameter_of_a_format_arrives(vit, tmp_path, name):
    model, path = vit(), tmp_path / "vit.pth"
    state = timm_names(model)
    torch.save(FORMATS[name](state), path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_backbone(model, path)
    for ours, tensor in model.state_dict().items():
        leaf = ours.removeprefix("backbone.net.")
        wanted = state["pos_embed" if leaf == ORIGINAL else leaf] if ours.startswith("backbone.") else before[ours]
        assert torch.equal(tensor, wanted), ours
    assert model.weights is None


def test_safetensors_and_strings(vit, tmp_path):
    model = vit()
    state = timm_names(model)
    safetensors.torch.save_file({**state, "head.weight": ONE}, tmp_path / "vit.safetensors")
    load_backbone(model, str(tmp_path / "vit.safetensors"))
    assert torch.equal(model.backbone.net.blocks[1].mlp.fc2.bias, state["blocks.1.mlp.fc2.bias"])


def test_half_precision_arrives_in_float32(vit, tmp_path):
    model = vit()
    state = {name: tensor.half() for name, tensor in timm_names(vit(img_size=96)).items()}
    torch.save(state, tmp_path / "vit.pth")
    load_backbone(model, tmp_path / "vit.pth")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.backbone.net.get_parameter(ORIGINAL), state["pos_embed"].float())


# Trained at another size


def tokens(model) -> Tensor:
    images = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.backbone(images).tokens


def test_a_table_of_another_size_is_used_as_it_was_trained(vit, tmp_path):
    """As in a network whose backbone was trained at that size to begin with."""
    model, native = vit(img_size=64), vit(img_size=96)
    torch.save(timm_names(native), tmp_path / "vit.pth")
    for network in (model, native):
        load_backbone(network, tmp_path / "vit.pth")
    table = model.backbone.net.get_parameter(ORIGINAL)
    assert table.shape == (1, 37, 32) and table.requires_grad
    assert torch.equal(tokens(model), tokens(native))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_such_a_network_is_saved_and_loaded(vit, tmp_path, dtype):
    model = vit()
    state = timm_names(vit(img_size=96))
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "vit.pth")
    load_backbone(model, tmp_path / "vit.pth")
    save_checkpoint(model, tmp_path / "a.safetensors", dtype=dtype)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.backbone.net.get_parameter(ORIGINAL).shape == (1, 37, 32)
    assert torch.equal(tokens(loaded), tokens(model))
    source, target = torch.randn(2, 1, 3, 32, 48)
    assert loaded(source, target).flow.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 36, 32), (1, 13, 32), (1, 37, 16), (37, 32), (1, 0, 32)])
def test_a_table_of_no_square_or_another_width_is_refused(vit, tmp_path, shape):
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    torch.save({**timm_names(model), "pos_embed": torch.zeros(shape)}, tmp_path / "vit.pth")
    with pytest.raises(ValueError) as caught:
        load_backbone(model, tmp_path / "vit.pth")
    assert str(caught.value).endswith(f"vit.pth does not fit the model: pos_embed is {shape}")
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# Refusals


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"norm.bias": None, "cls_token": None}, r"2 missing \(cls_token, norm\.bias\)$"),
        ({"blocks.2.norm1.bias": ONE, 7: ONE}, r"2 unexpected \(blocks\.2\.norm1\.bias, 7\)$"),
        ({"norm.bias": None, "norm.offset": ONE}, r"1 missing \(norm\.bias\); 1 unexpected \(norm\.offset\)$"),
        ({"norm.bias": torch.zeros(31)}, r"norm\.bias must have shape \(32,\), got \(31,\)$"),
        (
            {"patch_embed.proj.weight": torch.zeros(32, 3, 8, 8)},
            r"must have shape \(32, 3, 16, 16\), got \(32, 3, 8, 8\)$",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(vit, tmp_path, change, wanted):
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    # the table would be replaced, were the rest right
    changed = {**timm_names(vit(img_size=96)), **change}
    torch.save({name: tensor for name, tensor in changed.items() if tensor is not None}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=rf"^the backbone checkpoint .*vit\.pth does not fit the model: .*{wanted}"):
        load_backbone(model, tmp_path / "vit.pth")
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_is_no_tensor_is_named(vit, tmp_path):
    model = vit()
    torch.save({**timm_names(model), "norm.bias": 3}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"vit\.pth must hold tensors, but norm\.bias is int"):
        load_backbone(model, tmp_path / "vit.pth")


def test_files_that_cannot_be_read_and_backbones_without_weights(vit, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*vit\.pth"):
        load_backbone(vit(), tmp_path / "vit.pth")
    (tmp_path / "vit.pth").write_bytes(b"no checkpoint")
    with pytest.raises(OSError, match=r"vit\.pth cannot be read as a PyTorch checkpoint"):
        load_backbone(vit(), tmp_path / "vit.pth")
    tiny = create_model("lpmflow-tiny", image_size=(32, 48), layout_depth=1)
    with pytest.raises(ValueError, match=f"backbone_weights are for timm backbones, not for {CONVNET}"):
        load_backbone(tiny, tmp_path / "vit.pth")


# Files that hold more than numbers


class Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_refused_and_not_run(vit, tmp_path):
    path, made = tmp_path / "a.pth", tmp_path / "made"
    torch.save({"encoder.norm.weight": torch.zeros(1), "args": Payload(str(made))}, path)
    model = vit()
    for load in (load_checkpoint, lambda given: load_backbone(model, given)):
        with pytest.raises(OSError, match=r"a\.pth cannot be read as .* plain tensors: it holds \w+\.mkdir$"):
            load(path)
    assert not made.exists()


def test_options_of_a_training_script_are_plain_data(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"teacher": {"weight": torch.ones(2)}, "args": argparse.Namespace(lr=0.1), "epoch": 3}, path)
    before = set(torch.serialization.get_safe_globals())
    content = read_torch_file(path)
    assert content["args"].lr == 0.1 and content["teacher"]["weight"].tolist() == [1, 1]
    assert set(torch.serialization.get_safe_globals()) == before
