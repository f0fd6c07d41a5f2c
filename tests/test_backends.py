"""Choosing a backend: what the caller names runs or raises, by argument, context or environment; the report."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from lpmflow import ops
from lpmflow.ops import _backends
from lpmflow.ops._backends import BACKENDS, OPS, choose


def fits(backend: str) -> str | None:
    return None


@pytest.fixture
def made_up(monkeypatch) -> dict[tuple[str, str], str | None]:
    """An installation with reasons of our own; everything else can run. `correlation` prefers native on the CPU."""
    reasons: dict[tuple[str, str], str | None] = {}
    monkeypatch.setattr(_backends, "why_not", lambda op, backend: reasons.get((op, backend)))
    monkeypatch.setattr(_backends, "FASTEST", {("correlation", "cpu"): ("native", "triton")})
    return reasons


def test_the_automatic_choice_is_the_first_that_can_run(made_up):
    assert choose("correlation", None, "cpu", fits) == "native"
    assert choose("correlation", None, "cpu", lambda name: "no" if name == "native" else None) == "triton"
    made_up["correlation", "native"] = made_up["correlation", "triton"] = "not built"
    assert choose("correlation", None, "cpu", fits) == "reference"
    assert ops.last_backend("correlation") == "reference"


def test_nothing_is_chosen_on_a_device_without_a_record(made_up):
    assert choose("correlation", None, "cuda", fits) == "reference"
    assert choose("region_attention", None, "cpu", fits) == "reference"


def test_a_named_backend_is_never_replaced(made_up):
    assert choose("correlation", "triton", "cuda", fits) == "triton"
    made_up["correlation", "native"] = "it was not built"
    with pytest.raises(RuntimeError, match="^correlation: backend 'native' cannot run: it was not built$"):
        choose("correlation", "native", "cpu", fits)
    with pytest.raises(RuntimeError, match="^correlation: backend 'triton' cannot run: D is 7$"):
        choose("correlation", "triton", "cpu", lambda name: "D is 7")
    with pytest.raises(ValueError, match="backend must be one of reference, native, triton, got 'cuda'"):
        choose("correlation", "cuda", "cpu", fits)


def test_the_context_names_a_backend_for_all_ops_or_for_one(made_up):
    with ops.use_backend("reference"):
        assert choose("correlation", None, "cpu", fits) == "reference"
        assert choose("correlation", "native", "cpu", fits) == "native"  # the argument goes first
        with ops.use_backend(correlation="triton"):
            assert choose("correlation", None, "cpu", fits) == "triton"
            assert choose("region_attention", None, "cpu", fits) == "reference"
        with ops.use_backend(None):
            assert choose("correlation", None, "cpu", fits) == "native"
        assert choose("correlation", None, "cpu", fits) == "reference"
    assert choose("correlation", None, "cpu", fits) == "native"


def test_the_context_raises_where_its_backend_cannot_run(made_up):
    made_up["correlation", "triton"] = "no driver"
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot run: no driver"):
        choose("correlation", None, "cpu", fits)


def test_the_context_ends_with_an_error_and_holds_for_its_thread_only(made_up):
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert choose("correlation", None, "cpu", fits) == "native"
    seen = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose("correlation", None, "cpu", fits)))
        thread.start()
        thread.join()
    assert seen == ["native"]


@pytest.mark.parametrize(
    ("said", "op", "wanted"),
    [
        ("reference", "correlation", "reference"),
        ("correlation=triton", "correlation", "triton"),
        ("reference, correlation=triton", "correlation", "triton"),
        ("reference,correlation=triton", "region_attention", "reference"),
        ("region_attention=triton", "correlation", "native"),
        ("window_attention=triton", "window_attention", "triton"),
        ("", "correlation", "native"),
    ],
)
def test_the_environment(made_up, monkeypatch, said, op, wanted):
    monkeypatch.setenv("LPMFLOW_BACKEND", said)
    assert choose(op, None, "cpu", fits) == wanted
    with ops.use_backend(None):  # the context goes before the environment
        assert choose("correlation", None, "cpu", fits) == "native"


def test_a_context_for_one_op_leaves_the_environment_to_the_others(made_up, monkeypatch):
    monkeypatch.setenv("LPMFLOW_BACKEND", "reference")
    with ops.use_backend(region_attention="triton"):
        assert choose("correlation", None, "cpu", fits) == "reference"
        assert choose("region_attention", None, "cpu", fits) == "triton"


@pytest.mark.parametrize("said", ["cuda", "correlation=cuda", "correlate=native", "correlation="])
def test_a_wrong_environment_is_an_error(monkeypatch, said):
    monkeypatch.setenv("LPMFLOW_BACKEND", said)
    with pytest.raises(ValueError, match="^LPMFLOW_BACKEND: "):
        choose("correlation", None, "cpu", fits)


def test_wrong_names_in_the_context():
    with pytest.raises(ValueError, match="use_backend: backend must be one of"), ops.use_backend("cuda"):
        pass
    with pytest.raises(ValueError, match="use_backend: the ops are correlation, "), ops.use_backend(correlate="native"):
        pass
    with pytest.raises(ValueError, match="last_backend: the ops are correlation, "):
        ops.last_backend("correlate")


def test_an_op_has_the_name_of_its_function():
    for op in OPS:
        assert callable(getattr(ops, op)) and getattr(ops, op).__name__ == op
    qkv, table = torch.zeros(1, 2, 2, 6), torch.zeros(9, 2)
    with ops.use_backend(window_attention="reference"):
        ops.window_attention(qkv, table, heads=2, window=2)
    assert ops.last_backend("window_attention") == "reference"


def test_the_report_names_every_op_and_backend():
    report = ops.backend_report()
    assert list(report) == list(OPS)
    for reasons in report.values():
        assert list(reasons) == list(BACKENDS) and reasons["reference"] is None
        assert all(reason is None or reason for reason in reasons.values())


def test_without_the_kernels_package_the_reference_runs():
    code = """
import torch
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "lpmflow_kernels" else find(name, *rest)
from lpmflow import ops
q = torch.randn(1, 2, 5, 8)
ops.correlation(q, q, q)
print(ops.last_backend("correlation"), ops.backend_report()["correlation"]["native"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "reference the package lpmflow_kernels is not installed (pip install . builds it)"


def test_a_context_in_compiled_code():
    def run(q: torch.Tensor) -> torch.Tensor:
        return ops.correlation(q, q, q)[1]

    if ops.backend_report()["correlation"]["native"] is not None:
        pytest.skip("the native module is not built here")
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    q = torch.randn(1, 2, 5, 8)
    for backend in ("reference", "native", "reference"):
        with ops.use_backend(correlation=backend):
            compiled(q)
            assert ops.last_backend("correlation") == backend
