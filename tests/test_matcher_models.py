"""Which networks, devices and types of numbers a `Matcher` takes, and the sentence that refuses the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lpmflow
from lpmflow import matcher as door
from lpmflow.matcher import Matcher
from lpmflow.model import create_model, embedded_weights, list_models, save_checkpoint


@pytest.fixture(autouse=True)
def forget_loaded_models():
    door._cached.cache_clear()
    yield
    door._cached.cache_clear()


def test_a_model_without_trained_weights_never_answers(make_fake_model):
    with pytest.raises(ValueError, match="model must have trained weights, but those of this one are random"):
        Matcher(make_fake_model(weights=None))
    with pytest.raises(ValueError, match="model must have trained weights"):
        Matcher(create_model("lpmflow-tiny"))
    with pytest.raises(ValueError, match="model must have trained weights"):
        lpmflow.match(np.zeros((4, 4)), np.zeros((4, 4)), model=create_model("lpmflow-tiny"))


@pytest.mark.parametrize("name", ["lpmflow-base", "lpmflow-small"])
def test_a_preset_without_weights_says_how_to_pass_some(name):
    assert embedded_weights(name) is None
    with pytest.raises(ValueError, match=rf"model '{name}' has no trained weights .* pass the path of a checkpoint"):
        Matcher(name)


def test_unknown_models_list_what_exists(tmp_path):
    names = ", ".join(list_models())
    with pytest.raises(ValueError, match=f"model must be one of {names}, the path .*, got 'lpmflow-huge'"):
        Matcher("lpmflow-huge")
    for path in ("weights.pth", tmp_path / "none.safetensors", "folder/weights"):
        with pytest.raises(FileNotFoundError, match=f"model must be one of {names}, .* there is no file "):
            Matcher(path)


@pytest.mark.parametrize("model", [3, b"a.pth", ["lpmflow-tiny"], object()])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match="model must be a preset's name, the path of a checkpoint, or an LPMFlow, got "):
        Matcher(model)


def test_another_network_is_refused():
    with pytest.raises(TypeError, match="model must be an LPMFlow when it is a module, got Linear"):
        Matcher(nn.Linear(2, 2))


def test_parameters_in_half_precision_are_refused(fake_model):
    with pytest.raises(ValueError, match="model must have float32 parameters, but grid_flow is torch.float16"):
        Matcher(fake_model.half())


def test_a_checkpoint_of_ours(tmp_path, photo, other_photo):
    model = create_model("lpmflow-tiny")
    path = tmp_path / "mine.safetensors"
    save_checkpoint(model, path)
    with pytest.raises(ValueError, match="model must have trained weights, but those of this one are random"):
        Matcher(path, "cpu")
    model.weights = "my own loop"
    save_checkpoint(model, path)
    for given in (path, str(path)):
        match = Matcher(given, "cpu")(photo, other_photo)
        assert match.flow.shape == (40, 60, 2) and np.isfinite(match.flow).all()
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match="broken.safetensors"):
        Matcher(tmp_path / "broken.safetensors")


def test_the_real_network_batched_is_the_same_as_one_by_one(photo, other_photo):
    torch.manual_seed(0)
    model = create_model("lpmflow-tiny")
    model.weights = "random, for this test"
    matcher = Matcher(model, "cpu")
    pairs = [(photo, other_photo), (other_photo, photo), (photo, photo)]
    for found, pair in zip(matcher.batch(pairs, batch_size=2), pairs, strict=True):
        expected = matcher(*pair)
        np.testing.assert_allclose(found.grid_flow, expected.grid_flow, atol=2e-3)
        np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-4)
        np.testing.assert_allclose(found.foreground, expected.foreground, atol=1e-3)


def test_settings_are_plain_and_say_no_path(fake_model, make_fake_model, tmp_path):
    wanted = {"weights": "made up", "image_size": [192, 192], "dtype": "bfloat16", "device": "cpu"}
    assert Matcher(fake_model, "cpu", "bfloat16").settings() == wanted
    trained = make_fake_model(weights=str(tmp_path / "mine.safetensors"), image_size=(96, 128))
    found = Matcher(trained, "cpu").settings()
    assert (found["weights"], found["image_size"], found["dtype"]) == ("mine.safetensors", [96, 128], "float32")


def test_repr(fake_model):
    assert repr(Matcher(fake_model, "cpu", "bfloat16")) == "Matcher(model='fake', device='cpu', dtype='bfloat16')"


# Devices and dtypes


@pytest.mark.parametrize("device", ["tpu", "cpu:3", "", "cuda:99", "meta", torch.device("meta"), "gpu"])
def test_unknown_devices_list_what_exists(fake_model, device):
    with pytest.raises(ValueError, match=r"device must be (one that|cpu).*PyTorch finds here.*, got '"):
        Matcher(fake_model, device)


def test_cuda_without_a_gpu_is_refused(fake_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="^device must be cpu, the only one PyTorch finds here, got 'cuda'$"):
        Matcher(fake_model, "cuda")
    assert Matcher(fake_model).device == torch.device("cpu")


def test_the_gpu_is_chosen_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert door.as_device(None) == torch.device("cuda:1")
    assert door.as_device("cuda") == torch.device("cuda:1")
    assert door.as_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(
        ValueError, match="^device must be one that PyTorch finds here, cpu, cuda, cuda:0, cuda:1.*, got 'cuda:2'$"
    ):
        door.as_device("cuda:2")


def test_the_only_cpu_may_be_numbered():
    assert door.as_device("cpu:0") == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be .*cpu.*, got 'cpu:1'"):
        door.as_device("cpu:1")


@pytest.mark.parametrize("device", [0, 1.5, ["cpu"]])
def test_what_is_no_device(fake_model, device):
    with pytest.raises(TypeError, match="device must be a str or a torch.device, got "):
        Matcher(fake_model, device)


@pytest.mark.parametrize("dtype", ["float64", "half", "", torch.float64, torch.int8])
def test_unknown_dtypes_list_what_exists(fake_model, dtype):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got '"):
        Matcher(fake_model, "cpu", dtype)


def test_what_is_no_dtype(fake_model):
    with pytest.raises(TypeError, match="dtype must be a str or a torch.dtype, got int"):
        Matcher(fake_model, "cpu", 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_the_gpu(fake_model, photo, other_photo, dtype):
    expected = Matcher(fake_model, "cpu")(photo, other_photo)
    found = Matcher(fake_model, "cuda", dtype)(photo, other_photo)
    np.testing.assert_allclose(found.flow, expected.flow, atol=1e-3 if dtype == "float32" else 0.05)
    assert next(fake_model.parameters()).is_cuda
