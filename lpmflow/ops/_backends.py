"""Which backend runs an op: what the caller named, else what was measured fastest, else the reference.

A ladder of questions, each answered by None (it can run) or one sentence (why not). A backend the caller names, by the
argument, by `use_backend` or by the variable LPMFLOW_BACKEND, runs or raises; it is never replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

BACKENDS = ("reference", "native", "triton")
OPS = ("correlation", "cross_scale_fusion", "window_attention", "region_attention")

# The automatic choice: (op, device type) -> the backends worth trying, best first. Measured by `pytest benchmarks/`;
# the reference is always the last. A CUDA kernel enters only with a record of its tests on real hardware, which
# kernels/README.md lists; until then it can be asked for by name.
FASTEST: dict[tuple[str, str], tuple[str, ...]] = {
    ("correlation", "cpu"): ("native",),
    ("cross_scale_fusion", "cpu"): ("native",),
    ("window_attention", "cpu"): ("native",),
    ("region_attention", "cpu"): ("native",),
}

_MODULES = {"native": "lpmflow_kernels.native", "triton": "lpmflow_kernels"}
_PAGES = {"window_attention": "window_refinement"}  # where the file is named after the stage of the paper
_named: ContextVar[dict[str, str | None] | None] = ContextVar("lpmflow_backend", default=None)
_traced = threading.local()
"""`chosen` is what `_named` holds, for torch.compile, which traces no context variable in most releases of PyTorch."""
_last: dict[str, str] = dict.fromkeys(OPS, "")

Function = TypeVar("Function", bound=Callable[..., Any])


def _constant(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler here: called while tracing."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def why_not(op: str, backend: str) -> str | None:
    """None when this installation has `backend` for `op`, else the reason in one sentence."""
    if backend == "reference":
        return None
    if importlib.util.find_spec("lpmflow_kernels") is None:
        return "the package lpmflow_kernels is not installed (pip install . builds it)"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    reason: str | None = None
    if backend == "native":
        reason = importlib.import_module("lpmflow_kernels.native").reason
    elif backend == "triton":
        reason = importlib.import_module("lpmflow_kernels._launch").why_no_device()
    if reason is not None:
        return reason
    importlib.import_module(f"{_MODULES[backend]}.{_PAGES.get(op, op)}")  # registers its operators
    return None


def why_no_backward(op: str) -> str | None:
    """None when Triton can do the backward of native's CUDA forward, which has none itself, else the reason."""
    missing = why_not(op, "triton")
    if missing is None:
        return None
    return f"it has no backward on CUDA devices and triton's, which would do it, is missing: {missing}"


def choose(op: str, backend: str | None, device_type: str, fits: Callable[[str], str | None]) -> str:
    """The backend to call for tensors on `device_type`; `fits(backend)` says why they are none of its business.

    Raises ValueError for an unknown name, RuntimeError with the reason when the named backend cannot run.
    """
    named = named_backend(op, backend)
    if named is None:
        for candidate in FASTEST.get((op, device_type), ()):
            if why_not(op, candidate) is None and fits(candidate) is None:
                _last[op] = candidate
                return candidate
        named = "reference"
    _check_name(op, named)
    reason = why_not(op, named)
    if reason is None and named != "reference":
        reason = fits(named)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {named!r} cannot run: {reason}")
    _last[op] = named
    return named


@contextlib.contextmanager
def use_backend(backend: str | None = None, **by_op: str | None) -> Iterator[None]:
    """Within the block, ops run on `backend`, or raise where it cannot; the argument `backend=` goes first.

    `use_backend("native")` is for every op, `use_backend(correlation="native")` for one, and None is the automatic
    choice. The same is said for a whole process by the environment variable LPMFLOW_BACKEND, such as "reference" or
    "correlation=native,region_attention=reference". Holds for the current thread (or asynchronous task) only.
    Raises ValueError for an unknown backend or op.
    """
    chosen = dict(_named.get() or {})
    if backend is not None or not by_op:
        chosen = dict.fromkeys(OPS, backend)
    chosen.update(by_op)
    for op, name in chosen.items():
        _check_op("use_backend", op)
        if name is not None:
            _check_name("use_backend", name)
    token, traced = _named.set(chosen), getattr(_traced, "chosen", None)
    _traced.chosen = chosen
    try:
        yield
    finally:
        _named.reset(token)
        _traced.chosen = traced


def last_backend(op: str) -> str | None:
    """The backend that ran `op` last in this process, None before its first call; for tests and for debugging."""
    _check_op("last_backend", op)
    return _last[op] or None


def backend_report() -> dict[str, dict[str, str | None]]:
    """{op: {backend: None if this installation has it, else the reason in one sentence}}."""
    return {op: {backend: why_not(op, backend) for backend in BACKENDS} for op in OPS}


def named_backend(op: str, backend: str | None) -> str | None:
    """What the caller named, by the argument `backend`, by `use_backend` or by LPMFLOW_BACKEND; None: it is free."""
    if backend is not None:
        return backend
    chosen = getattr(_traced, "chosen", None) if torch.compiler.is_compiling() else _named.get()
    if chosen is not None and op in chosen:
        return chosen[op]
    return _from_environment(op)


@_constant
def _from_environment(op: str) -> str | None:
    """What LPMFLOW_BACKEND says for this op."""
    said: str | None = None
    for part in filter(None, (part.strip() for part in os.environ.get("LPMFLOW_BACKEND", "").split(","))):
        target, _, name = part.rpartition("=")
        _check_name("LPMFLOW_BACKEND", name)
        if target:
            _check_op("LPMFLOW_BACKEND", target)
        if target in ("", op):
            said = name
    return said


def _check_name(who: str, name: object) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{who}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")


def _check_op(who: str, op: str) -> None:
    if op not in OPS:
        raise ValueError(f"{who}: the ops are {', '.join(OPS)}, got {op!r}")
