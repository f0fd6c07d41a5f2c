"""`lpmflow info`: what it reads, and that a broken installation is told in a sentence."""

from __future__ import annotations

import json
import platform
import sys

import pytest
import torch

import lpmflow
from lpmflow import info, ops
from lpmflow.model import embedded_weights, list_models


def test_collect_tells_what_is_installed() -> None:
    found = info.collect()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["lpmflow"] == lpmflow.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["versions"]["cuda"] == torch.version.cuda
    assert found["ops"] == ops.backend_report()
    assert list(found["models"]) == list_models()
    for name, path in found["models"].items():
        assert path == (None if embedded_weights(name) is None else str(embedded_weights(name)))


def test_devices_can_hold_a_tensor() -> None:
    found = info.devices()
    assert list(found)[0] == "cpu"
    assert found["cpu"].startswith(f"{torch.get_num_threads()} threads, ")
    assert len([name for name in found if name.startswith("cuda")]) == torch.cuda.device_count()
    for name in found:
        assert torch.ones(1, device=name).item() == 1


def test_version_of_what_is_not_installed() -> None:
    assert info.installed_version("lpmflow-no-such-distribution") is None


def test_a_broken_timm_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("timm cannot be imported because\n torchvision does not fit")

    monkeypatch.setattr("lpmflow.model.import_timm", broken)
    assert info.problems() == ["timm cannot be imported because torchvision does not fit"]


@pytest.mark.parametrize("error", [RuntimeError("operator torchvision::nms does not exist"), OSError("libc10_cuda.so")])
def test_a_torchvision_of_another_torch_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "timm":  # as if raised by torchvision's own file, when timm imports it
                exec(compile("raise error", "site-packages/torchvision/extension.py", "exec"), {"error": error})

    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    (problem,) = info.problems()
    assert "torchvision" in problem and str(error) in problem and "\n" not in problem


def test_no_problem_is_no_section() -> None:
    found = info.collect() | {"problems": []}
    assert "problems" not in info.format_info(found)


def test_text_names_every_backend_and_its_reason() -> None:
    found = info.collect()
    found |= {
        "ops": {"correlation": {"reference": None, "triton": "triton is not installed"}},
        "models": {"lpmflow-tiny": "/somewhere/tiny.safetensors", "lpmflow-base": None},
        "problems": ["timm is broken"],
    }
    found["versions"] = found["versions"] | {"triton": None, "cuda": None}
    lines = [" ".join(line.split()) for line in info.format_info(found).splitlines()]
    for line in (
        "triton not installed",
        "cuda none (this torch is a CPU build)",
        "lpmflow-tiny /somewhere/tiny.safetensors",
        "lpmflow-base no embedded weights",
        "backends of correlation",
        "reference can run",
        "triton no: triton is not installed",
        "problems",
        "timm is broken",
    ):
        assert line in lines
