"""Tests of the Triton kernels on the CPU, through Triton's interpreter: one file an operation.

Whether Triton interprets is settled when it is imported, so these files are not collected with the others. Each runs
in a process of its own, started for the test of its operation, or by hand:

    TRITON_INTERPRET=1 pytest tests/interpreted/correlation.py
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import beside
import pytest
from packaging.version import Version


def _has_triton() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return Version(triton.__version__) >= Version("3.4")


needs_triton = pytest.mark.skipif(not _has_triton(), reason="Triton is not installed, or older than 3.4")


def tests(op: str) -> pytest.MarkDecorator:
    """The mark of a test that wants tests/interpreted/<op>.py run."""
    path = Path(__file__).resolve().with_name(f"{op}.py")
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(path))
    # One thread: the interpreter's arrays are small.
    return beside.python(*arguments, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


def check(done: subprocess.CompletedProcess[str]) -> None:
    print(done.stdout)
    if done.returncode != 0:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
