"""What this installation is and can do: versions, devices, models, and the backends each operation can run.

Versions come from the metadata of the installed packages, not from importing them. Two imports are needed all the
same: torch, for the devices, and timm, because a torchvision that does not fit torch shows only when timm loads it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "pillow", "safetensors", "matplotlib")


def collect() -> dict[str, Any]:
    """Everything `lpmflow info` prints, as plain values that `json.dumps` accepts.

    - `versions`: name -> version, None when that package is not installed; also `lpmflow`, `python` and `cuda`, the
      CUDA release torch was built for (None for a CPU build).
    - `locations`: where `lpmflow` and `lpmflow_kernels` are imported from, None when not installed.
    - `devices`: name -> description, for every device a model can be put on; the CPU comes first.
    - `models`: name -> path of the weights that ship with the package, None when a model ships without.
    - `ops`: operation -> backend -> None when it can run here, else the reason in one sentence.
    - `problems`: what is wrong with this installation, one sentence each; empty when all is well.
    """
    import torch

    import lpmflow
    from lpmflow import ops
    from lpmflow.model import embedded_weights, list_models

    versions: dict[str, str | None] = {"lpmflow": lpmflow.__version__, "python": platform.python_version()}
    versions.update((name, installed_version(name)) for name in PACKAGES)
    versions["cuda"] = torch.version.cuda
    weights = {name: embedded_weights(name) for name in list_models()}
    return {
        "versions": versions,
        "locations": {name: _location(name) for name in ("lpmflow", "lpmflow_kernels")},
        "devices": devices(),
        "models": {name: None if path is None else str(path) for name, path in weights.items()},
        "ops": ops.backend_report(),
        "problems": problems(),
    }


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, None when it is not installed; does not import it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> dict[str, str]:
    """Device name -> description: the CPU with its threads and instruction set, then what accelerators torch sees."""
    import torch

    found = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def problems() -> list[str]:
    """One sentence for each thing that keeps part of the library from working; empty when all is well."""
    from lpmflow.model import import_timm

    try:
        import_timm()
    except ImportError as error:
        return [" ".join(str(error).split())]
    return []


def format_info(info: dict[str, Any]) -> str:
    """The text `lpmflow info` prints for the value of `collect()`, without a final newline."""
    lines = ["versions"]
    lines += _table({name: version or "not installed" for name, version in info["versions"].items() if name != "cuda"})
    lines += _table({"cuda": info["versions"]["cuda"] or "none (this torch is a CPU build)"})
    lines += ["", "installed in"]
    lines += _table({name: place or "not installed" for name, place in info["locations"].items()})
    lines += ["", "devices"]
    lines += _table(info["devices"])
    lines += ["", "models"]
    lines += _table({name: path or "no embedded weights" for name, path in info["models"].items()})
    for op, backends in info["ops"].items():
        lines += ["", f"backends of {op}"]
        lines += _table({name: "can run" if reason is None else f"no: {reason}" for name, reason in backends.items()})
    if info["problems"]:
        lines += ["", "problems"]
        lines += [f"  {problem}" for problem in info["problems"]]
    return "\n".join(lines)


def _table(rows: dict[str, str]) -> list[str]:
    return [f"  {name:<15} {value}" for name, value in rows.items()]


def _location(package: str) -> str | None:
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent)
