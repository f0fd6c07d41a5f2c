"""`Matcher("zero-shot")`: features of a small timm network, both read-outs, weights or a refusal."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from lpmflow import Matcher, cli
from lpmflow.model.zero_shot import ZeroShot

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def backbone() -> str:
    """timm's smallest vision transformer, which it has for tests: 160 x 160, patches of 16."""
    return "test_vit"


@pytest.fixture
def weights(backbone, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "backbone.pth"
    torch.save(timm.create_model(backbone, num_classes=0).state_dict(), path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_may_hold_the_head_of_a_classifier(backbone, weights, suffix, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = (tmp_path / "whole").with_suffix(suffix)
    parameters = timm.create_model(backbone).state_dict()
    assert "head.weight" in parameters
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in parameters.items()}}, path)
    else:
        save_file(parameters, path)
    net = ZeroShot(backbone, weights=path).net
    assert not net.pretrained_cfg.get("state_dict")  # the file's numbers are not kept a second time
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, parameters[name], rtol=0, atol=0)


@pytest.mark.parametrize("readout", ["nearest", "window"])
def test_an_image_matches_itself(backbone, weights, readout, photo):
    matcher = Matcher("zero-shot", "cpu", backbone=backbone, backbone_weights=weights, readout=readout)
    assert matcher.name == "zero-shot" and backbone in matcher.fingerprint.__self__.model.config.backbone
    match = matcher(photo, photo)
    # a window's average is a little off the cell itself
    assert np.abs(match.grid_flow).max() <= (1e-6 if readout == "nearest" else 1.0)
    assert match.grid_confidence.min() > 0.999
    assert len(matcher.batch([(photo, photo)] * 3, batch_size=2)) == 3


@pytest.mark.parametrize("readout", ["nearest", "window"])
def test_the_flow_is_that_of_the_most_similar_cell(backbone, weights, readout):
    model = ZeroShot(backbone, weights=weights, image_size=(64, 96), readout=readout).eval()
    generator = torch.Generator().manual_seed(1)
    source, target = torch.randn(2, 2, 3, 64, 96, generator=generator)
    with torch.no_grad():
        out = model(source, target)
        a, b = (
            model.net.forward_intermediates(x * model.gain + model.shift, indices=1, intermediates_only=True)[
                -1
            ].flatten(2)
            for x in (source, target)
        )
    h, w = out.flow.shape[-2:]
    cosines = torch.nn.functional.cosine_similarity(a[:, :, :, None], b[:, :, None], dim=1)
    torch.testing.assert_close(out.confidence.flatten(1), cosines.amax(2).clamp(0, 1), rtol=1e-4, atol=1e-5)
    best = cosines.argmax(2).unflatten(1, (h, w))
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    found = out.flow + torch.stack((columns, rows))
    wanted = torch.stack((best % w, best // w), dim=1).float()
    if readout == "nearest":
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    else:
        assert (found - wanted).abs().max() <= max(h // 8, w // 8, 1) and (found != wanted).any()


def test_statistics_of_the_backbone_are_used(backbone, weights):
    model = ZeroShot(backbone, weights=weights)
    images = torch.rand(1, 3, 4, 4)
    mean, std = (torch.tensor(model.net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    from lpmflow.images import normalize

    torch.testing.assert_close(normalize(images) * model.gain + model.shift, (images - mean) / std)


def test_a_convolutional_backbone(tmp_path, photo):
    torch.manual_seed(0)
    path = tmp_path / "resnet.pth"
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), path)
    matcher = Matcher("zero-shot", "cpu", backbone="test_resnet", backbone_weights=path, image_size=96)
    assert np.abs(matcher(photo, photo).grid_flow).max() <= 1
    assert matcher.settings() == {
        "weights": "resnet.pth", "backbone": "test_resnet", "readout": "window", "image_size": [96, 96],
        "dtype": "float32", "device": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize("error", [ConnectionError("no network"), RuntimeError("no network\nand more")])
def test_without_weights_it_refuses(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("timm.create_model", fail)
    wanted = r"the weights of test_resnet could not be had from timm \(no network\); give a file as backbone_weights$"
    with pytest.raises(OSError, match=wanted):
        Matcher("zero-shot", "cpu", backbone="test_resnet")


def test_refusals_name_the_argument(backbone, weights, tmp_path, fake_model):
    with pytest.raises(ValueError, match="backbone must be the name of a timm model for model='zero-shot', got None"):
        Matcher("zero-shot", "cpu")
    with pytest.raises(ValueError, match="backbone must be the name of a timm model, got 'vit_huge'"):
        Matcher("zero-shot", "cpu", backbone="vit_huge")
    with pytest.raises(ValueError, match="backbone must be the name of a timm model, got 'test_vit.none': Invalid"):
        Matcher("zero-shot", "cpu", backbone="test_vit.none", backbone_weights=weights)
    with pytest.raises(FileNotFoundError, match="backbone_weights must be a file of parameters, but there is no"):
        Matcher("zero-shot", "cpu", backbone=backbone, backbone_weights=tmp_path / "none.pth")
    with pytest.raises(ValueError, match="readout must be one of window, nearest, got 'best'"):
        Matcher("zero-shot", "cpu", backbone=backbone, backbone_weights=weights, readout="best")
    with pytest.raises(ValueError, match="image_size must be a positive integer or"):
        Matcher("zero-shot", "cpu", backbone=backbone, backbone_weights=weights, image_size=0)
    with pytest.raises(ValueError, match="^image_size must be smaller, got 160000 x 160000: a pair takes "):
        Matcher("zero-shot", "cpu", backbone=backbone, backbone_weights=weights, image_size=160_000)
    other = tmp_path / "other.pth"
    other.write_text("hello")
    with pytest.raises(OSError, match=r"other\.pth cannot be read as a PyTorch .*: it is no file that torch\.save "):
        Matcher("zero-shot", "cpu", backbone=backbone, backbone_weights=other)
    torch.save({"weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=r"other\.pth does not hold .*: .* Missing key.*patch_embed"):
        Matcher("zero-shot", "cpu", backbone=backbone, backbone_weights=other)
    for option in ({"backbone": backbone}, {"readout": "window"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for model='zero-shot' only"):
            Matcher(fake_model, "cpu", **option)


def test_a_size_that_does_not_fit_is_refused_before_matching(backbone, weights, monkeypatch):
    given = {"backbone": backbone, "backbone_weights": weights}
    with pytest.raises(ValueError, match="image_size must be a multiple of 16, the cells of test_vit, got .170, 160."):
        Matcher("zero-shot", "cpu", image_size=(170, 160), **given)

    def of_one_size(self, x, **options):  # as timm's backbones do that have a size of their own, while matching
        raise AssertionError(f"Input height ({x.shape[2]}) doesn't match model (160).")

    monkeypatch.setattr(timm.models.VisionTransformer, "forward_intermediates", of_one_size)
    with pytest.raises(ValueError, match=r"one that test_vit can take, got \(192, 160\): Input height \(192\) does"):
        Matcher("zero-shot", "cpu", image_size=(192, 160), **given)


def test_the_command_line(backbone, weights, tmp_path, photo, capsys):
    from PIL import Image

    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    options = ["--model", "zero-shot", "--backbone", backbone, "--backbone-weights", str(weights), "--device", "cpu"]
    assert cli.main(["match", str(path), str(path), *options, "--points", "3,4"]) == 0
    assert capsys.readouterr().out.startswith("3,4 -> ")
