"""CUDA kernels without a GPU: their own source as a library for the CPU, guarded memory for it, and nvcc's report.

`csrc/tests/emulated_device.h` runs the threads of a block as fibers and knows what the tensor-core instructions do, so
tiles, index maps, masks, barriers and the online softmax are those of the kernels. What it cannot show is the speed
and the last bits of real hardware.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = ("80", "90a", "100")  # one a generation, for spills; 86 and 89 are built with the others
NAN = float("nan")


def emulated(op: str, folder: Path) -> Callable[..., int]:
    """`{op}_forward_emulated(args, seed)` of csrc/tests/{op}_emulated.cpp; a CUDA error is raised."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulated device uses the fibers of Linux")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    if compiler is None:
        pytest.skip("no C++ compiler was found (g++ or clang++, or the one CXX names)")
    probe = [*shlex.split(compiler), "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(probe, input=b"_Float16 x;", capture_output=True).returncode != 0:
        pytest.skip("the C++ compiler has no 16-bit floating-point type")
    library = folder / f"{op}.so"
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    options += ["-U_FORTIFY_SOURCE"]  # which takes a change of fiber for an attack
    options += [str(CSRC / "tests" / f"{op}_emulated.cpp"), "-o", str(library)]
    done = subprocess.run([*shlex.split(compiler), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_problem.restype = ctypes.c_char_p

    def run(args: ctypes.Structure, seed: int = 0) -> int:
        status: int = getattr(loaded, f"{op}_forward_emulated")(ctypes.byref(args), ctypes.c_uint64(seed))
        if status > 0:
            raise RuntimeError(f"status {status}: {loaded.emulated_problem().decode()}")
        return status

    return run


def native_on(op: str, launch: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """`lpmflow_kernels.native.{op}`, whose CUDA function takes CPU tensors and is `launch`."""
    module = importlib.import_module(f"lpmflow_kernels.native.{op}")
    monkeypatch.setattr(module, "place_of", lambda x: (0, 0))
    monkeypatch.setattr(module, "loaded", lambda name: types.SimpleNamespace(**{f"{op}_forward_cuda": launch}))
    return module


class Output:
    """A tensor full of NaN between guards that nobody may touch."""

    GUARD, MARK = 256, -7.0

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        count = torch.Size(shape).numel()
        self.all = torch.full((count + 2 * self.GUARD,), self.MARK, dtype=dtype or torch.float32)
        self.tensor = self.all[self.GUARD : self.GUARD + count].view(shape).fill_(NAN)

    def checked(self) -> Tensor:
        for guard in (self.all[: self.GUARD], self.all[-self.GUARD :]):
            assert (guard == self.MARK).all(), "written outside the output"
        return self.tensor


def amid_nan(x: Tensor, *, offset: int = 8) -> Tensor:
    """x, dense, in memory that is NaN around it, so that what is read outside of it shows."""
    memory = torch.full((x.numel() + offset + 512,), NAN, dtype=x.dtype)
    return memory[offset : offset + x.numel()].view(x.shape).copy_(x)


class Context:
    """What an operator's `save` and `differentiate` are given, where the engine has no thread for a made-up device."""

    def __init__(self) -> None:
        self.saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


class Called(TorchDispatchMode):
    """The operators of ours that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [str(function)] if function.namespace == "lpmflow" else []
        return function(*args, **(kwargs or {}))


def assert_nothing_spills(op: str, arch: str, kernels: int, folder: Path) -> None:
    """Compile csrc/{op}/{op}.cu by nvcc: that many kernels, and no register of theirs goes to memory."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc was found (on the PATH, or in CUDA_HOME)")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    if f"compute_{arch.rstrip('a')}" not in known:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    options = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas", "-v", "-cubin"]
    options += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(folder / f"{op}.cubin")]
    done = subprocess.run([nvcc, *options, str(CSRC / op / f"{op}.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    compiled = re.findall(r"Compiling entry function '(\w+)'", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(compiled) == kernels and len(spills) >= len(compiled)
    assert set(spills) == {("0", "0")}, report
