"""Backbones: tokens against timm's own, DINO's resize of the positions against loops, refusals in a sentence."""

from __future__ import annotations

import builtins
import math
import sys

import pytest
import timm
import torch

from lpmflow.config import CONVNET, LPMFlowConfig, lpmflow_tiny
from lpmflow.model.backbone import ResizedPositions, create_backbone, import_timm

pytestmark = pytest.mark.usefixtures("one_thread")


def config(backbone, image_size=(64, 64), patch_size=16):
    return LPMFlowConfig(name="of a test", backbone=backbone, image_size=image_size, patch_size=patch_size)


def dino(table, prefix, trained, wanted):
    """(1, prefix + n, C) resized by cubic convolution (a = -3/4) with the factor (wanted + 0.1) / trained."""
    a = -0.75
    out = table[0, prefix:].double().unflatten(0, trained)
    for axis in (0, 1):
        rows = []
        for index in range(wanted[axis]):
            place = (index + 0.5) * trained[axis] / (wanted[axis] + 0.1) - 0.5
            total = 0
            for tap in range(math.floor(place) - 1, math.floor(place) + 3):
                x = abs(place - tap)
                near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
                total = total + (near if x <= 1 else far) * out.select(axis, min(max(tap, 0), trained[axis] - 1))
            rows.append(total)
        out = torch.stack(rows, axis)
    return torch.cat((table[0, :prefix].double(), out.flatten(0, 1)))[None]


# The convolutional backbone


@pytest.mark.parametrize("image_size", [(32, 32), (32, 80)])
def test_convolutional_tokens(image_size):
    """Normalised cells row by row, behind their mean."""
    backbone = create_backbone(lpmflow_tiny().replace(image_size=image_size)).eval()
    with torch.no_grad():
        backbone.norm.weight.uniform_(0.5, 1.5)
        backbone.norm.bias.normal_()
        images = torch.randn(2, 3, *image_size)
        tokens, fine = backbone(images)
        coarse, wanted_fine = backbone.net(images)
    assert torch.equal(fine, wanted_fine) and fine.shape[1] == backbone.fine_width == 128
    height, width = image_size[0] // 16, image_size[1] // 16
    assert tokens.shape == (2, 1 + height * width, backbone.width)
    for row in range(height):
        for column in range(width):
            cell = coarse[:, :, row, column]
            cell = (cell - cell.mean(1, keepdim=True)) / (cell.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
            wanted = cell * backbone.norm.weight + backbone.norm.bias
            torch.testing.assert_close(tokens[:, 1 + row * width + column], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(dim=1))


def test_the_convolutional_backbone_has_one_stride_and_no_weights():
    with pytest.raises(ValueError, match=f"patch_size must be 16 for the backbone {CONVNET}, got 8"):
        create_backbone(lpmflow_tiny().replace(patch_size=8))
    with pytest.raises(ValueError, match=f"weights exist for timm backbones only, not for {CONVNET}"):
        create_backbone(lpmflow_tiny(), pretrained=True)


# Vision transformers

VARIANTS = [
    ({}, 1, 1),
    ({"reg_tokens": 3}, 4, 4),
    ({"reg_tokens": 2, "no_embed_class": True}, 3, 0),
    ({"class_token": False, "global_pool": "avg"}, 0, 0),
    ({"class_token": False, "global_pool": "avg", "reg_tokens": 2, "fc_norm": False}, 2, 2),
    ({"global_pool": "avg"}, 1, 1),
]
"""Options, tokens before the patches, and how many of them have a position."""


@pytest.mark.parametrize(("options", "prefix", "placed"), VARIANTS)
@pytest.mark.parametrize("image_size", [(64, 64), (48, 96)])
def test_tokens_are_timms(small_vit, options, prefix, placed, image_size):
    """timm's network of that image size, given the resized table: cls or the mean patch, then normalised patches."""
    torch.manual_seed(0)
    backbone = create_backbone(config(small_vit(**options), image_size)).eval()
    theirs = timm.create_model(small_vit(**options), num_classes=0, img_size=image_size).eval()
    state = {
        name.removeprefix("parametrizations.").removesuffix(".original"): 3 * torch.randn_like(tensor)
        for name, tensor in backbone.net.state_dict().items()
    }
    ours = {name: state[n] for name, n in zip(backbone.net.state_dict(), state, strict=True)}
    backbone.net.load_state_dict(ours)
    if image_size != (64, 64):
        grid = (image_size[0] // 16, image_size[1] // 16)
        state["pos_embed"] = dino(state["pos_embed"], placed, (4, 4), grid).float()
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, *image_size)
    with torch.no_grad():
        found = backbone(images)
        tokens = theirs.forward_features(images)
        last = theirs.fc_norm if isinstance(theirs.norm, torch.nn.Identity) else theirs.norm
        assert isinstance(last, torch.nn.LayerNorm)
        if last is theirs.fc_norm:
            tokens = last(tokens)
    patches = tokens[:, prefix:]
    cls = tokens[:, :1] if options.get("class_token", True) else patches.mean(dim=1, keepdim=True)
    assert found.fine is None and found.tokens.shape == (2, 1 + image_size[0] * image_size[1] // 256, 32)
    torch.testing.assert_close(found.tokens, torch.cat((cls, patches), dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "patch_size", "width"),
    [
        ("vit_small_patch8_224", 8, 384),
        ("vit_small_patch14_reg4_dinov2", 14, 384),
        ("deit_tiny_distilled_patch16_224", 16, 192),
        ("vit_base_patch16_siglip_224", 16, 768),
        ("eva02_tiny_patch14_224", 14, 192),
        ("vit_tiny_patch16_224", 12, 192),
    ],
)
def test_timm_models_at_an_oblong_size(name, patch_size, width):
    with torch.device("meta"):
        backbone = create_backbone(config(name, (3 * patch_size, 5 * patch_size), patch_size))
        tokens = backbone(torch.zeros(2, 3, 3 * patch_size, 5 * patch_size)).tokens
    assert tokens.shape == (2, 1 + 15, width) and backbone.width == width


@pytest.mark.parametrize(("patch_size", "image_size"), [(8, (32, 48)), (14, (28, 42))])
def test_another_patch_size_keeps_the_table_of_the_trained_grid(small_vit, patch_size, image_size):
    backbone = create_backbone(config(small_vit(), image_size, patch_size)).eval()
    stored = backbone.net.state_dict()
    assert stored["parametrizations.pos_embed.original"].shape == (1, 17, 32)
    assert stored["patch_embed.proj.weight"].shape == (32, 3, patch_size, patch_size)
    tokens = backbone(torch.randn(1, 3, *image_size)).tokens
    assert tokens.shape == (1, 1 + image_size[0] * image_size[1] // patch_size**2, 32)


# Positions


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("trained", "wanted"),
    [((14, 14), (16, 16)), ((4, 4), (3, 6)), ((3, 2), (7, 2)), ((4, 4), (4, 8)), ((2, 2), (1, 1))],
)
def test_positions_are_resized_as_dino_does(trained, wanted, prefix):
    torch.manual_seed(0)
    table = torch.randn(1, prefix + trained[0] * trained[1], 3)
    found = ResizedPositions(trained, wanted, prefix)(table)
    torch.testing.assert_close(found.double(), dino(table, prefix, trained, wanted), rtol=0, atol=1e-5)
    assert torch.equal(found[:, :prefix], table[:, :prefix])


def test_positions_of_the_trained_grid_are_left_alone():
    table = torch.randn(1, 17, 3)
    assert ResizedPositions((4, 4), (4, 4), 1)(table) is table


def test_the_stored_table_is_the_trained_one_and_is_trained_on(small_vit):
    backbone = create_backbone(config(small_vit(), (96, 32)))
    backbone(torch.randn(1, 3, 96, 32)).tokens.pow(3).sum().backward()
    original = backbone.net.parametrizations.pos_embed.original
    assert original.shape == (1, 17, 32) and original.grad.any(dim=2).all()
    assert backbone.net.pos_embed.shape == (1, 13, 32)


# Refusals


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("vit_tinny", "'vit_tinny'"),
        ("vit_tiny_patch16_224.nobody", "'vit_tiny_patch16_224.nobody'"),
        ("resnet18", r"'resnet18' \(ResNet\)"),
        ("swin_tiny_patch4_window7_224", r"'swin_tiny_patch4_window7_224' \(SwinTransformer\)"),
        ("vit_tiny_r_s16_p8_224", r"'vit_tiny_r_s16_p8_224' \(VisionTransformer\)"),
    ],
)
def test_what_is_no_vision_transformer_on_patches_is_refused(name, got):
    wanted = f"backbone must be '{CONVNET}' or the name of a timm vision transformer, got {got}$"
    with pytest.raises(ValueError, match=wanted), torch.device("meta"):
        create_backbone(config(name))


def test_pretrained_weights_have_one_patch_size(small_vit):
    wanted = "patch_size must be 16 for pretrained weights of small_vit, got 8"
    with pytest.raises(ValueError, match=wanted):
        create_backbone(config(small_vit(), patch_size=8), pretrained=True)


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="^this model's backbone needs timm: pip install timm$"):
        import_timm()


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (ModuleNotFoundError("No module named 'torchvision'", name="torchvision"), "pip install torchvision$"),
        (
            RuntimeError("operator torchvision::nms does not exist"),
            "torchvision does not fit torch .*nms does not exist$",
        ),
    ],
)
def test_timm_that_cannot_be_imported(monkeypatch, error, wanted):
    breaking_timm(monkeypatch, error)
    with pytest.raises(ImportError, match=f"^timm cannot be imported because .*{wanted}") as caught:
        import_timm()
    assert caught.value.__cause__ is error


def breaking_timm(monkeypatch, error, file="elsewhere.py"):
    """`import timm` raises the error, from a line of that file."""

    def broken(name, *args, **options):
        if name == "timm":
            exec(compile("raise error", file, "exec"), {"error": error})
        return real(name, *args, **options)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", broken)


@pytest.mark.parametrize("kind", [ImportError, OSError])
def test_torchvision_is_blamed_only_for_what_it_raised(monkeypatch, kind):
    with monkeypatch.context() as patch:
        breaking_timm(patch, kind("undefined symbol"), "site-packages/torchvision/extension.py")
        with pytest.raises(ImportError, match="torchvision does not fit torch .*--force-reinstall .*undefined symbol$"):
            import_timm()
    breaking_timm(monkeypatch, kind("undefined symbol"))
    with pytest.raises(ImportError, match="^timm cannot be imported: undefined symbol$"):
        import_timm()
