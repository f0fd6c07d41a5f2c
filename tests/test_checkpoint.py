"""Our weight files: there and back, whole or not at all, and what is refused of them and of released ones."""

from __future__ import annotations

import json
import os

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lpmflow import create_model, load_checkpoint, save_checkpoint
from lpmflow.config import lpmflow_tiny

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"image_size": (32, 48), "layout_depth": 1, "windows": (4, 3, 2)}


def tiny(**options):
    return disturbed(create_model("lpmflow-tiny", **{**SMALL, **options}))


@pytest.fixture(scope="module")
def model():
    """A small network that no test changes."""
    return tiny()


@pytest.fixture
def vit(small_vit):
    """Builds a network of four correlations on a ViT of width 32 that was, so to speak, trained at `img_size`."""

    def build(img_size=64, **options):
        chosen = {**SMALL, "backbone": small_vit(img_size=img_size), "heads": 4, "refine_width": 24, "refine_heads": 4}
        return disturbed(create_model("lpmflow-small", **{**chosen, **options}))

    return build


def disturbed(model):
    """A network no number of which is where it started."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


def flow(model) -> Tensor:
    source, target = torch.randn(2, 1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(source, target).flow


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


# There and back


@pytest.mark.parametrize("preset", ["tiny", "vit"])
def test_round_trip(vit, preset, tmp_path):
    model = tiny() if preset == "tiny" else vit(rptc_top_k=7)
    model.weights = "made up"
    path = tmp_path / "a.safetensors"
    save_checkpoint(model.train(), path)
    for given in (path, str(path)):
        loaded = load_checkpoint(given)
        assert loaded.weights == str(path) and loaded.config == model.config and not loaded.training
        same(loaded.state_dict(), model.state_dict())
    assert torch.equal(flow(loaded), flow(model.eval()))


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_a_file_in_half_precision(vit, dtype, relative, tmp_path):
    model = vit()
    save_checkpoint(model, tmp_path / "full.safetensors")
    save_checkpoint(model, tmp_path / "half.safetensors", dtype=dtype)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = load_checkpoint(tmp_path / "half.safetensors").state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype, name
        torch.testing.assert_close(loaded[name], tensor, rtol=relative, atol=1e-6)


def test_another_image_size_keeps_the_table_of_the_trained_one(vit, tmp_path):
    model = vit()
    save_checkpoint(model, tmp_path / "a.safetensors")
    loaded = load_checkpoint(tmp_path / "a.safetensors", image_size=(48, 32), temperature=0.5)
    assert loaded.config == model.config.replace(image_size=(48, 32), temperature=0.5)
    same(loaded.backbone.state_dict(), model.backbone.state_dict())
    assert loaded.layout.position.shape == (1, 6, 32) and flow(loaded).shape == (1, 2, 24, 16)


def test_the_metadata_says_format_configuration_and_more(model, tmp_path):
    save_checkpoint(model, tmp_path / "a.safetensors", extra={"training": "two photographs"})
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "config", "training", "weights"} and metadata["weights"] == "random"
    assert metadata["format"] == "lpmflow-1" and metadata["training"] == "two photographs"
    assert json.loads(metadata["config"])["image_size"] == [32, 48]


# Whole or not at all


def interrupted(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError("no space left on device")


def unmoved(old, new):
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("target", "replacement"),
    [
        ("pathlib.Path.write_bytes", interrupted),
        ("os.replace", unmoved),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_the_folder_as_it_was(model, monkeypatch, tmp_path, target, replacement, existing):
    path = tmp_path / "a.safetensors"
    if existing:
        path.write_text("what was there")
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    monkeypatch.setattr(target, replacement)
    with pytest.raises(OSError, match="no space left on device"):
        save_checkpoint(model, path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_a_save_replaces_a_file_and_leaves_no_other(model, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("something else")
    save_checkpoint(model, path)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    same(load_checkpoint(path).state_dict(), model.state_dict())


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (float("inf"), None), (1e5, torch.float16)])
def test_numbers_that_a_file_cannot_hold_are_refused(tmp_path, value, dtype):
    model = tiny()
    with torch.no_grad():
        model.layout.norm.bias[3] = value
    wanted = f"parameter layout.norm.bias is not finite as {dtype or torch.float32}"
    with pytest.raises(ValueError, match=wanted):
        save_checkpoint(model, tmp_path / "a.safetensors", dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "wanted"),
    [
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model must be an LPMFlow, got Linear"),
        ({"path": "a.pth"}, ValueError, "path must end in .safetensors, got '.*a.pth'"),
        (
            {"path": "none/a.safetensors"},
            FileNotFoundError,
            "path must name a file in an existing folder, got '.*none/a",
        ),
        ({"dtype": torch.int8}, TypeError, "dtype must be torch.float16, .* or None, got torch.int8"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype must be torch.float16, .*, got torch.float8_e4m3fn"),
        ({"dtype": "float16"}, TypeError, "dtype must be torch.float16, .*, got 'float16'"),
        ({"extra": {"epoch": 3}}, TypeError, "extra must map str to str, got 'epoch': int"),
        ({"extra": {"config": "{}"}}, ValueError, "extra must not hold the key 'config'"),
    ],
)
def test_arguments_that_make_no_sense_are_named(model, tmp_path, change, error, wanted):
    given = {"model": model, "path": "a.safetensors", **change}
    with pytest.raises(error, match=wanted):
        save_checkpoint(given.pop("model"), tmp_path / given.pop("path"), **given)
    assert not list(tmp_path.iterdir())


# Files that are no checkpoint of ours


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_missing_and_corrupt_files(model, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(FileNotFoundError, match="no checkpoint at "):
        load_checkpoint(path)
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=rf"a\{suffix} must be a checkpoint file, and is a folder$"):
        load_checkpoint(path)
    path.rmdir()
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save({"encoder.norm.weight": torch.zeros(1000)}, whole)
    else:
        save_checkpoint(model, whole)
    for content in (b"", b"hello, world", b"PK\x03\x04 and more", whole.read_bytes()[:-500], whole.read_bytes()[:300]):
        path.write_bytes(content)
        with pytest.raises(OSError, match=rf"a\{suffix} cannot be read as a ") as caught:
            load_checkpoint(path)
        assert len(str(caught.value).splitlines()) == 1
        if content == b"hello, world" and suffix == ".pth":
            assert str(caught.value).endswith(": it is no file that torch.save writes")


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        ({"format": None}, "is no LPMFlow checkpoint: its metadata must say format lpmflow-1"),
        ({"format": "lpmflow-2"}, "is no LPMFlow checkpoint: its metadata must say format lpmflow-1"),
        ({"config": None}, "holds a configuration this version cannot read: "),
        ({"config": "[1]"}, "holds a configuration this version cannot read: "),
        ({"config": '{"name": "x"}'}, "holds a configuration this version cannot read: .*backbone"),
        ({"config": '{"colour": 1}'}, "holds a configuration this version cannot read: unknown fields .*: colour"),
        (
            {"config": '{"name": "x", "backbone": "y", "heads": 0}'},
            "holds a configuration .* read: heads must be an integer",
        ),
    ],
)
def test_metadata_of_something_else(tmp_path, metadata, wanted):
    plain = {"format": "lpmflow-1", "config": json.dumps(lpmflow_tiny().to_dict())}
    kept = {name: value for name, value in {**plain, **metadata}.items() if value is not None}
    safetensors.torch.save_file({"layout.norm.weight": torch.ones(192)}, tmp_path / "a.safetensors", kept)
    with pytest.raises(ValueError, match=rf"a\.safetensors {wanted}"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_parameters_and_options_that_do_not_fit_are_named(model, tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(model, path)
    for name, value in (("representation", "isolated"), ("region_bias", False), ("cross_scale", True), ("heads", 3)):
        stored = getattr(model.config, name)
        with pytest.raises(ValueError, match=f"^{name} must be {stored!r}, with which .*a.safetensors was trained; "):
            load_checkpoint(path, **{name: value})
    with pytest.raises(TypeError, match="unknown model option 'size'"):
        load_checkpoint(path, size=3)


def test_a_file_of_no_dict_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth must hold a dict of tensors, got list"):
        load_checkpoint(tmp_path / "a.pth")
