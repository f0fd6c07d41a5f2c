"""The operators called by hand, with arguments that do not fit: refused, one and all, and never a crash.

Each operator, native or Triton, is called rightly first, then with one thing wrong at a time: each size off by one,
each other element type, each number off by one, zero, negative and enormous, tensors without memory. What still fits is
listed. This file run by hand prints what fits a backend; Triton's kernels are interpreted there.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import beside
import interpreted
import pytest
import torch
from torch import Tensor

from lpmflow import ops, reference

REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool)


def correlation() -> dict[str, Any]:
    q, k = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 6, 4)
    return {"q": q, "k": k, "v": torch.rand(k.shape), "scale": 0.5, "prefix": 1}


def region_attention() -> dict[str, Any]:
    q = torch.rand(1, 3, 14, 4)
    tensors = {"q": q, "k": torch.rand(q.shape), "v": torch.rand(q.shape), "bias_table": torch.rand(3, 3 * 5 * 4)}
    return {**tensors, "grids": [2, 3, 2, 3], "prefix": 1}


def window_attention() -> dict[str, Any]:
    return {"qkv": torch.rand(2, 5, 6, 12), "bias_table": torch.rand(25, 2), "heads": 2, "window": 3, "shift": 1}


def window_stage() -> dict[str, Any]:
    shapes = [(4,), (4,), (12, 4), (12,), (25, 2), (4, 4), (4,), (4,), (4,), (7, 4), (7,), (4, 7), (4,), (4,), (4,)]
    return {
        "x": torch.rand(2, 5, 6, 4),
        "weights": [torch.rand(s) for s in shapes],
        "heads": 2,
        "window": 3,
        "eps": 0.1,
    }


def cross_scale_fusion() -> dict[str, Any]:
    """The last of three output rows, from both of two coarse lines and from one that it is itself."""
    corrs = [torch.rand(1, 2 * 1, 2 * 3), torch.rand(1, 1 * 2, 3 * 2)]
    grids = [2, 1, 2, 3, 3, 2, 3, 2]
    tables = {"x": torch.rand(2), "y": torch.rand(3)}
    return {"corrs": corrs, "grids": grids, "out": [3, 2, 2, 2, 1], "temperature": 0.1, **tables}


def with_gradients(op: str, backend: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The backward's arguments; Triton's keeps more of the forward's results."""
    found = call(f"{op}_{backend}", inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    grad = torch.rand(outputs[0].shape)
    if op == "cross_scale_fusion":
        kept = dict(zip(("mapping", "confidence", "largest"), outputs, strict=True))
        return {"grad_mapping": grad, **inputs, **kept, "tables": True}
    given = {"grad": grad}
    if op == "correlation":
        given = {"grad_attended": grad, "grad_corr": torch.rand(outputs[1].shape)}
    if backend == "native" or op == "window_attention":
        return {**given, **inputs}
    kept = {"attended": outputs[0], "stats": outputs[-1]}
    if op == "correlation":
        return {**given, "q": inputs["q"], "k": inputs["k"], "v": inputs["v"], **kept, "scale": 0.5, "prefix": 1}
    return {**given, **inputs, **kept}


def call(operator: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.lpmflow, operator)(*arguments.values())


def operators(backend: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every operator of a backend, with arguments that fit."""
    ops.backend_report()  # registers those that run here
    named = {"correlation": correlation, "region_attention": region_attention, "window_attention": window_attention}
    named["cross_scale_fusion"] = cross_scale_fusion
    for op, arguments in named.items():
        yield f"{op}_{backend}", arguments()
        yield f"{op}_{backend}_backward", with_gradients(op, backend, arguments())
    importlib.import_module(f"lpmflow_kernels.{'native.' if backend == 'native' else ''}window_stage")
    yield f"window_stage_{backend}", window_stage()


def wrong_tensors(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    for axis, side in enumerate(x.shape):
        for other in (side - 1, side + 1):
            yield f"axis {axis}", x.new_zeros((*x.shape[:axis], other, *x.shape[axis + 1 :]))
    for dtype in DTYPES:
        if dtype != x.dtype:
            yield "precision" if dtype.is_floating_point else "type", x.to(dtype)
    yield "axes", x[None]
    yield "axes", x[0]
    yield "meta", x.to("meta")
    yield "sparse", x.to_sparse()
    for kept in (0, 4):
        without = x.clone()
        without.untyped_storage().resize_(kept)
        yield "memory", without


def wrong_numbers(x: int) -> Iterator[tuple[str, int]]:
    for other in (x - 1, x + 1, 0, -1, -(2**62), 2**31, 2**62):
        if other != x:
            yield "less" if 0 <= other < x else "number", other


def wrong_arguments(arguments: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what is wrong, the arguments)."""
    for name, value in arguments.items():
        if isinstance(value, list):
            yield f"{name}: shorter", {**arguments, name: value[:-1]}
            yield f"{name}: longer", {**arguments, name: [*value, value[-1]]}
            yield f"{name}: empty", {**arguments, name: []}
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, (float, bool)):
                continue
            changes = wrong_tensors(item) if isinstance(item, Tensor) else wrong_numbers(item)
            for change, other in changes:
                place = f"{name}[{i}]" if isinstance(value, list) else name
                whole = [*value[:i], other, *value[i + 1 :]] if isinstance(value, list) else other
                yield f"{place}: {change}", {**arguments, name: whole}


# What still fits: another number of source tokens, fewer prefix tokens, tables that are converted, half the precision.
WEIGHTS = {f"weights[{i}]: precision" for i in range(15)}
FITS = {
    "correlation": {"q: axis 2", "prefix: less", "prefix: number"},
    "correlation_backward": set(),
    "region_attention": {"bias_table: precision"},
    "region_attention_backward": {"bias_table: precision"},
    "window_attention": {
        "qkv: axis 0",
        "qkv: axis 1",
        "qkv: axis 2",
        "qkv: precision",
        "shift: less",
        "shift: number",
    },
    "window_attention_backward": {"shift: less", "shift: number"},
    "window_stage": {"x: axis 0", "x: axis 1", "x: axis 2", "x: precision", *WEIGHTS},
    "cross_scale_fusion": {"out[4]: less", "x: precision", "y: precision"},  # no rows
    "cross_scale_fusion_backward": {"x: precision", "y: precision"},
}


def what_fits(backend: str) -> dict[str, list[str]]:
    """Operator -> the changes it took. Anything but a refusal in words ends this here, a crash ends the process."""
    found: dict[str, list[str]] = {}
    for operator, arguments in operators(backend):
        op = operator.replace(f"_{backend}", "")
        call(operator, arguments)
        found[op] = []
        for what, wrong in wrong_arguments(arguments):
            with contextlib.suppress(REFUSALS):
                call(operator, wrong)
                found[op].append(what)
        check_any_strides(operator, arguments)
    return found


def check_any_strides(operator: str, arguments: dict[str, Any]) -> None:
    """With every tensor a broadcast one, all its numbers in one place, the same as with tensors written out."""

    def filled(value: Any, whole: bool) -> Any:
        if isinstance(value, list):
            return [filled(one, whole) for one in value]
        if not isinstance(value, Tensor):
            return value
        return value.new_full(value.shape, 0.25) if whole else value.new_tensor(0.25).expand(value.shape)

    found = [call(operator, {k: filled(v, whole) for k, v in arguments.items()}) for whole in (False, True)]
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{operator}: {text}")


native_missing = ops.backend_report()["correlation"]["native"]
native_only = pytest.mark.skipif(native_missing is not None, reason=str(native_missing))
by_native = (native_only, beside.python(__file__, "native"))
by_triton = (interpreted.needs_triton, beside.python(__file__, "triton", TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


@pytest.mark.parametrize("backend", [pytest.param("native", marks=by_native), pytest.param("triton", marks=by_triton)])
def test_what_does_not_fit_is_refused(backend, done):
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = dict(FITS)
    if backend == "triton":  # which converts no matrices
        wanted["window_stage"] = FITS["window_stage"] - {f"weights[{i}]: precision" for i in (2, 5, 9, 11)}
    assert {op: set(took) for op, took in json.loads(done.stdout).items()} == wanted


@native_only
@pytest.mark.parametrize("out_lines", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("lines", [1, 3, 5])
def test_a_part_has_the_lines_its_rows_lie_between(lines, out_lines):
    """Every part there is: as the reference computes it, or refused where the reference finds a line missing."""
    native = torch.ops.lpmflow.cross_scale_fusion_native
    source, target, out = (lines, 2), (2, 2), (out_lines, 3)
    corr, x, y = torch.rand(1, lines * 2, 4), torch.rand(3), torch.rand(out_lines)
    low, high, _ = reference.lines_of_rows(lines, out_lines, x)
    for first_line, end in itertools.combinations(range(lines + 1), 2):
        for first_row, last in itertools.combinations(range(out_lines + 1), 2):
            part = (first_line, first_row, last - first_row)
            corrs = [corr[:, 2 * first_line : 2 * end].contiguous()]
            if low[first_row] < first_line or high[last - 1] >= end:
                with pytest.raises(ValueError, match="corrs must have those lines that the output rows lie between"):
                    native(corrs, [*source, *target], [*out, *part], 0.1, x, y)
                continue
            found, _, _ = native(corrs, [*source, *target], [*out, *part], 0.1, x, y)
            options = {"out_grid": out, "temperature": 0.1, "x": x, "y": y, "part": part}
            wanted, _ = reference.cross_scale_fusion(corrs, [source], [target], **options)
            torch.testing.assert_close(found, wanted)


@native_only
@pytest.mark.parametrize(
    ("operator", "change", "refusal"),
    [
        ("correlation_native", {"k": torch.rand(2, 3, 6, 5)}, r"correlation: k must have shape \(2, 3, any, 4\), got"),
        ("correlation_native", {"prefix": 6}, "correlation: prefix must be from 0 to 5, got 6"),
        ("correlation_native_backward", {"grad_corr": torch.rand(2, 4, 4)}, "correlation: grad_corr must have shape"),
        ("region_attention_native", {"grids": [2, 3, 3, 2]}, "region_attention: bias_table must have shape"),
        ("window_attention_native", {"bias_table": torch.rand(25, 2).half()}, "bias_table must be torch.float32"),
        (
            "window_stage_native",
            {"x": torch.rand(2, 5, 6, 4).half()},
            "window_stage: x must be one of float32, float64",
        ),
        ("cross_scale_fusion_native", {"x": torch.rand(5)}, r"cross_scale_fusion: x must have shape \(2\), got \(5,\)"),
    ],
)
def test_the_refusals_name_the_argument(operator, change, refusal):
    with pytest.raises((ValueError, TypeError), match=refusal):
        call(operator, {**dict(operators("native"))[operator], **change})


if __name__ == "__main__":
    print(json.dumps(what_fits(sys.argv[1])))
