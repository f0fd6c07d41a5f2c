"""Tests of the Triton kernels on the CPU, through Triton's interpreter: one file an operation.

Whether Triton interprets is settled when it is imported, so these files are not collected with the others. Each runs
in a process of its own, started by the test of its operation, or by hand:

    TRITON_INTERPRET=1 pytest tests/interpreted/correlation.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(op: str) -> tuple[int, str]:
    """pytest's exit status and output for tests/interpreted/<op>.py."""
    path = Path(__file__).resolve().with_name(f"{op}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(path)]
    # One thread: the interpreter's arrays are small.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout
