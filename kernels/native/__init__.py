"""The compiled module `lpmflow_kernels._native`: loading it, why it may be missing, what its functions need.

Its functions take addresses, sizes and strides. The files beside this one wrap each as a PyTorch operator, and all
that a caller could get wrong is checked before an address is taken.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before the native module, so that both share one OpenMP runtime
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_STATUS = {1: "out of memory", 2: "this build's compiler had no 16-bit floating-point type"}


def build_report() -> dict[str, Any]:
    """What the installation wrote about building the module (see csrc/build.py); empty when there is no such note."""
    path = Path(__file__).resolve().parent.parent / "native_build.json"
    if not path.is_file():
        return {}
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def _load() -> tuple[ModuleType | None, str | None]:
    """The module, or the reason in one sentence why there is none."""
    try:
        found = importlib.import_module("lpmflow_kernels._native")
    except ModuleNotFoundError:
        told = build_report().get("reason")
        missing = "the native module is missing"
        return None, f"{missing}: {told}" if told else f"{missing} (pip install . builds it)"
    except ImportError as error:
        return None, f"the native module cannot be loaded: {error}"
    wanted = os.environ.get("LPMFLOW_CPU_ISA")
    if wanted and not found.use_instruction_set(wanted):
        known = ", ".join(found.instruction_sets())
        raise ValueError(f"LPMFLOW_CPU_ISA must be one of {known} on this machine, got {wanted!r}")
    return found, None


module, reason = _load()
"""The native module, None when it is not there; and why it is not, in one sentence."""


def _why_no_cuda() -> str | None:
    """None when the module has CUDA kernels, else the reason in one sentence."""
    if module is None:
        return reason
    if module.cuda_architectures:
        return None
    return f"the native module has no CUDA kernels: {build_report().get('cuda_reason') or 'it was built without them'}"


cuda_reason = _why_no_cuda()
"""Why the native module has no CUDA kernels, None when it has."""


def loaded(op: str) -> Any:
    """The module; RuntimeError where it is missing and somebody called the operator himself."""
    if module is None:
        raise RuntimeError(f"{op}: backend 'native' cannot run: {reason}")
    return module


def why_not_dtype(dtype: torch.dtype) -> str | None:
    """None when the CPU kernels take this type, else the reason in one sentence."""
    if dtype == torch.float16 and module is not None and not module.float16:
        return "the compiler it was built with had no 16-bit floating-point type"
    return None


def why_not_on_cpu(name: str, x: Tensor) -> str | None:
    """None when the kernels of an operation that has CPU ones only can compute with `x`, else the reason."""
    if module is None:
        return reason
    if x.device.type != "cpu":
        return f"it runs on the CPU, and {name} is on {x.device.type}"
    return why_not_dtype(x.dtype)


def why_not_on_device(name: str, x: Tensor) -> str | None:
    """None when the kernels of an operation that has CPU and CUDA ones can compute with `x`, else the reason."""
    if x.device.type != "cuda":
        if module is not None and x.device.type != "cpu":
            return f"it runs on the CPU and on CUDA devices, and {name} is on {x.device.type}"
        return why_not_on_cpu(name, x)
    if cuda_reason is not None:
        return cuda_reason
    if x.dtype == torch.float64:
        return f"it takes float32, float16 and bfloat16 on CUDA devices, and {name} is float64"
    major, minor = torch.cuda.get_device_capability(x.device.index)
    if major < 8:
        return f"it takes GPUs of compute capability 8.0 and later, and {name} is on one of {major}.{minor}"
    return None


def place_of(x: Tensor) -> tuple[int | None, int]:
    """Where a launch for `x` goes: the number of its device, and the handle of the current stream there."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def dense_rows(x: Tensor) -> Tensor:
    """`x` with a dense last dimension: itself where that is so, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def check_cuda(op: str, status: int) -> None:
    """Raise when a launch returned a CUDA error, or the negative of a status of ours."""
    if status < 0:
        check(op, -status)
    if status:
        raise RuntimeError(f"{op}: the native backend's launch failed with CUDA error {status}")


def check(op: str, status: int) -> None:
    """Raise what a native function's status means."""
    if status == 1:
        raise MemoryError(f"{op}: out of memory in the native backend")
    if status == 3:
        raise ValueError(f"{op}: corrs must have those lines that the output rows lie between")
    if status:
        raise RuntimeError(f"{op}: the native backend failed: {_STATUS.get(status, f'status {status}')}")
