"""The package as installed: metadata, data files, the kernels' own name, and what README and CI promise."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import lpmflow

ROOT = Path(__file__).resolve().parent.parent


def distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("lpmflow")
    except PackageNotFoundError:
        pytest.skip("lpmflow is imported from a checkout and not installed")


def test_metadata() -> None:
    installed = distribution()
    assert installed.version == lpmflow.__version__
    assert installed.metadata["License-Expression"] == "Apache-2.0"
    assert installed.metadata["Requires-Python"] == ">=3.10"
    plain = {re.split(r"[^\w-]", line)[0] for line in installed.requires or [] if "extra ==" not in line}
    assert plain == {"torch", "timm", "numpy", "pillow", "safetensors", "tqdm", "matplotlib"}
    scripts = [entry for entry in installed.entry_points if entry.group == "console_scripts"]
    assert [(entry.name, entry.value) for entry in scripts] == [("lpmflow", "lpmflow.cli:main")]


def test_the_kernels_are_found_under_their_own_name() -> None:
    distribution()
    spec = importlib.util.find_spec("lpmflow_kernels")
    assert spec is not None and spec.origin is not None


@pytest.mark.parametrize("name", ["py.typed", "assets/LICENSES.md", "assets/cat.jpg", "assets/raccoon.jpg"])
def test_data_files(name: str) -> None:
    assert (Path(lpmflow.__file__).parent / name).is_file()


def test_weights_that_are_in_the_checkout_are_installed_and_small_enough() -> None:
    checkout = sorted((ROOT / "lpmflow" / "weights").glob("*.safetensors"))
    imported = Path(lpmflow.__file__).parent / "weights"
    assert [path.name for path in checkout] == ["lpmflow-tiny.safetensors"]
    assert [path.name for path in checkout] == sorted(path.name for path in imported.glob("*.safetensors"))
    assert all(path.stat().st_size <= 24_000_000 for path in checkout)


def test_licence_is_the_whole_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = ["pip install . && lpmflow demo", 'pip install ".[test]" && pytest']
    assert [line for line in readme.splitlines() if line.startswith("pip install")] == commands
    assert re.findall(r"^install_and_\w+='(.*)'$", script, re.MULTILINE) == commands
    assert re.findall(r'^step "\$(\w+)"$', script, re.MULTILINE) == ["install_and_demo", "install_and_test"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_building_needs_no_torch() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert not [line for line in settings["build-system"]["requires"] if "torch" in line]
    assert "torch" not in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_readme_names_every_model_and_says_which_ship_weights() -> None:
    from lpmflow.model import embedded_weights, list_models

    rows = {
        cells[1].split("`")[1]: cells[-2].strip()
        for cells in (line.split("|") for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines())
        if len(cells) == 6 and cells[1].strip().startswith("`lpmflow-")
    }
    assert sorted(rows) == sorted(list_models())
    shipped = {name for name in list_models() if embedded_weights(name) is not None}
    assert shipped == {"lpmflow-tiny"}
    assert {name for name, said in rows.items() if said == "yes"} == shipped


def test_readme_keeps_its_names() -> None:
    """The names the README uses exist."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"lpmflow\.([A-Za-z_]+)\(", readme)):
        assert hasattr(lpmflow, name), f"README uses lpmflow.{name}"
    for path in set(re.findall(r"`(lpmflow/[\w/.]+)`", readme)):
        assert (ROOT / path).exists(), f"README names {path}"
