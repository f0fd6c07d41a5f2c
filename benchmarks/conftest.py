"""Options, and the tables at the end: `pytest benchmarks/ [--device cuda] [--batch-size 16] [--json FILE]`."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from lpmflow.profile import Peaks, measure_peaks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lpmflow benchmarks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--dtype", default=None, choices=list(DTYPES), help="float32 on the CPU, bfloat16 on a GPU")
    group.addoption("--batch-size", type=int, default=None, help="pairs (default: 1 on the CPU, 16 on a GPU)")
    group.addoption("--seconds", type=float, default=0.4, help="how long each comparison is measured (default: 0.4)")
    group.addoption("--compile", action="store_true", help="measure torch.compile of the whole network on a CPU too")
    group.addoption("--json", metavar="FILE", default=None, help="write the figures there as well")


class Report:
    """Rows of figures, by table."""

    def __init__(self) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.notes: list[str] = []

    def add(self, table: str, **row: Any) -> None:
        """One row: column -> value."""
        self.tables.setdefault(table, []).append(row)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = Report()


KEY = pytest.StashKey[Report]()


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Report:
    """Where a benchmark leaves its figures."""
    return request.config.stash[KEY]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where to measure."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """What the inputs are."""
    named = request.config.getoption("--dtype")
    return DTYPES[named or ("bfloat16" if device.type == "cuda" else "float32")]


@pytest.fixture(scope="session")
def batch_size(request: pytest.FixtureRequest, device: torch.device) -> int:
    """Pairs at once."""
    return request.config.getoption("--batch-size") or (16 if device.type == "cuda" else 1)


@pytest.fixture(scope="session")
def peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """What the machine can do at most."""
    return measure_peaks(device, dtype)


@pytest.fixture(scope="session")
def seconds(request: pytest.FixtureRequest) -> float:
    """How long one comparison is measured."""
    return request.config.getoption("--seconds")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    import lpmflow

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "lpmflow": lpmflow.__version__,
        "date": datetime.date.today().isoformat(),
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash[KEY]
    if not found.tables:
        return
    about = machine(torch.device(config.getoption("--device")))
    terminalreporter.write_line("")
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in about.items()))
    for title, rows in found.tables.items():
        terminalreporter.write_line("")
        terminalreporter.write_line(title)
        for line in layout(rows):
            terminalreporter.write_line("  " + line)
    if (path := config.getoption("--json")) is not None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_text(json.dumps({"machine": about, "tables": found.tables}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, target)
        terminalreporter.write_line(f"wrote {target}")


def layout(rows: list[dict[str, Any]]) -> list[str]:
    """Columns aligned; a missing value is a dash."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_shown(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
