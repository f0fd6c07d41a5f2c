"""Building the native module: what is found, what is refused, and what an installation without a compiler says."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("setuptools")
pytest.importorskip("pybind11")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lpmflow_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch) -> None:
    for name in ("CXX", "CUDA_HOME", "LPMFLOW_CUDA", "LPMFLOW_CUDA_ARCHS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


def script(folder: Path, name: str, text: str) -> Path:
    """An executable of that name in the folder."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_the_report_says_so(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    target = tmp_path / "_native.so"
    target.write_bytes(b"an old one")
    report = build.build(target, tmp_path / "work")
    assert report["reason"].startswith("no C++ compiler was found") and not target.exists()
    assert json.loads((tmp_path / build.REPORT).read_text()) == report


def test_a_compiler_that_was_named_must_exist(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="CXX must name a C\\+\\+ compiler, got 'no-such-compiler'"):
        build.find_compiler()


def test_a_compiler_that_fails_is_an_error_with_its_reason(build, monkeypatch, tmp_path):
    broken = script(tmp_path, "broken", 'echo "simd.h:1: error: the vectors are too wide" >&2; exit 1')
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("LPMFLOW_CUDA", "0")
    with pytest.raises(RuntimeError, match=r"do not compile: simd\.h:1: error: the vectors are too wide"):
        build.build(tmp_path / "_native.so", tmp_path / "work")
    assert not (tmp_path / "_native.so").exists()


@pytest.mark.parametrize("said", ["2", "yes", "on"])
def test_a_wrong_cuda_switch_is_refused(build, monkeypatch, said):
    monkeypatch.setenv("LPMFLOW_CUDA", said)
    with pytest.raises(RuntimeError, match=f"LPMFLOW_CUDA must be 0 or 1, got '{said}'"):
        build.find_nvcc()


def test_cuda_can_be_switched_off(build, monkeypatch):
    monkeypatch.setenv("LPMFLOW_CUDA", "0")
    assert build.find_nvcc() == (None, "it was built with LPMFLOW_CUDA=0")


def test_cuda_that_is_wanted_must_be_there(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "cuda_sources", lambda: [ROOT / "some.cu"])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == (None, "no nvcc was found when it was built (in CUDA_HOME)")
    monkeypatch.setenv("LPMFLOW_CUDA", "1")
    with pytest.raises(RuntimeError, match="LPMFLOW_CUDA=1, but no nvcc was found"):
        build.find_nvcc()


def test_architectures(build, monkeypatch, tmp_path):
    nvcc = script(tmp_path, "nvcc", "echo compute_80; echo compute_90; echo compute_120")
    assert build.cuda_archs(str(nvcc)) == ["80", "90a"]
    monkeypatch.setenv("LPMFLOW_CUDA_ARCHS", "8.6; 90a")
    assert build.cuda_archs(str(nvcc)) == ["86", "90a"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_openmp_needs_its_runtime_library(build, tmp_path):
    """A compiler that knows the option but lacks the library, as some clang packages, would make a broken module."""
    without = """
for argument; do
    case $argument in
        *.cpp) g++ -fopenmp -fPIC -c "$argument" -o "$argument.o" && object=$argument.o ;;
        -shared) options=$argument ;;
    esac
    last=$argument
done
exec g++ $options "$object" -o "$last"
"""
    assert not build.has_openmp(str(script(tmp_path, "clang++", without)))
    text = build.ninja_file(tmp_path / "_native.so", "clang++", None, [], openmp=False)
    assert "-fopenmp" not in text and "-Wno-unknown-pragmas" in text


def test_what_nvcc_is_told_of_the_compiler(build, tmp_path):
    assert build.host_compiler("g++") == "g++"
    assert build.host_compiler("ccache /opt/my\\ tools/g++ -m64") == "/opt/my tools/g++"
    text = build.ninja_file(tmp_path / "_native.so", "ccache g++ -m64", "/opt/my cuda/bin/nvcc", ["80"], openmp=True)
    assert "cxx = ccache g++ -m64\n" in text and "-ccbin g++" in text and "nvcc = '/opt/my cuda/bin/nvcc'\n" in text


def test_one_job_is_one_job(build, monkeypatch, tmp_path):
    arguments = (tmp_path / "_native.so", "g++", "nvcc", ["80"])
    assert "--threads 2" in build.ninja_file(*arguments, openmp=True)
    monkeypatch.setenv("MAX_JOBS", "1")
    assert "--threads" not in build.ninja_file(*arguments, openmp=True)


def test_no_code_for_other_machines_runs_when_the_module_is_loaded():
    """Nothing but the table's own functions may refer to kernels that need AVX: no initialiser does."""
    source = (ROOT / "csrc" / "cpu" / "kernels.cpp").read_text()
    assert "constexpr CpuKernels kTable[]" in source
    assert "table()" not in source


def test_the_script_compiles_every_source(build, tmp_path):
    text = build.ninja_file(tmp_path / "_native.so", "g++", None, [], openmp=True)
    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        if "tests" not in source.parts:
            assert str(source) in text, source
    assert "nvcc" not in text


def test_an_installation_without_a_compiler_succeeds_and_says_what_is_missing(tmp_path):
    """The command setup.py runs, in a copy, on a PATH without a compiler; then what the package says of itself."""
    for name in ("lpmflow", "kernels", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "native_build.json", "__pycache__", "*.safetensors", "tests")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build", "--build-lib", "built"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installed without its native kernels: no C++ compiler was found" in done.stdout + done.stderr
    # An editable installation of the checkout would lend its module.
    code = "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)]\n"
    code += "from lpmflow import ops; print(ops.backend_report()['correlation']['native'])"
    environment["PYTHONPATH"] = str(tmp_path / "built")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "built", env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("the native module is missing: no C++ compiler was found"), done.stderr


def test_where_a_compiler_is_the_installation_has_the_module():
    from lpmflow import ops

    spec = importlib.util.find_spec("lpmflow_kernels")
    if spec is None or shutil.which("g++") is None:
        pytest.skip("lpmflow is not installed here, or there is no g++")
    assert ops.backend_report()["correlation"]["native"] is None
