"""`correlation` in Triton: attention that also returns its maps, summed over the heads, without storing them per head.

    r_h = q_h k_h^T    P_h = softmax(scale r_h)    attended_h = P_h v_h    corr = (sum_h P_h)[prefix:, prefix:]

q (B, H, N, D), k and v (B, H, M, D), any strides with a dense last dimension; attended (B, H, N, D) in q's type, corr
(B, N - prefix, M - prefix) in float32. Products of float16 and bfloat16 are accumulated in float32, those of float32
are exact (no TF32); softmax, corr and all sums are float32. Nothing of size B H N M is allocated.

Forward, two kernels:
    attend     one program per (b, h, query tile), online softmax over the key tiles -> attended, stats
    correlate  one program per (b, query tile, key tile), a loop over the heads: P_h from stats, corr stored once
`stats` (2, B, H, N) holds the two numbers that give a row of P_h back: its largest r and the inverse of its sum,
P = exp(scale (r - largest)) inverse. They are kept apart, not as one log-sum-exp, whose rounding would cost 1e-3 of P
where logits reach 1e4.

Backward, from q, k, v, attended and stats, with dO and dA the gradients of attended and corr (either may be missing):
    dP_h = dO_h v_h^T + dA    delta_h = rowsum(P_h dP_h) = rowsum(dO_h attended_h) + rowsum(P_h dA)
    dr_h = P_h (dP_h - delta_h)    dq_h = scale dr_h k_h    dk_h = scale dr_h^T q_h    dv_h = P_h^T dO_h
    delta      one program per (b, h, query tile), a loop over the key tiles only where there is a dA
    dq         one program per (b, h, query tile), a loop over the key tiles
    dk, dv     one program per (b, h, key tile), a loop over the query tiles
Every output is written once by one program: no atomics, and two runs agree to the last bit.
"""

from __future__ import annotations

import bisect
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpmflow_kernels._checks import check_range, check_tensor
from lpmflow_kernels._contracts import check_correlation, check_correlation_gradients
from lpmflow_kernels._launch import (
    DTYPES,
    Tiles,
    define,
    dense_rows,
    launch,
    refuse_second_order,
    row_alignment,
    strided,
    why_not_on_device,
)
from lpmflow_kernels._tiles import (
    add_product,
    dot_rows,
    load_rows,
    probabilities,
    products,
    program,
    scale_rows,
    split_width,
    store_rows,
    zero_rows,
)
from lpmflow_kernels.correlation_backward import delta_kernel, dkv_kernel, dq_kernel

__all__ = ["configuration", "correlation", "why_not"]

OP = "correlation"
MAX_WIDTH = 256
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that a row of nothing but -inf comes out NaN, as it should

# Kernel -> float16 and bfloat16, then float32; each for D up to 64, 96, 128 and 256: (queries, keys, warps, stages).
#
# Chosen from what the compiler reports, without spills and within 99 KB of shared memory as compiled for 8.0 (so that
# 8.6 and 8.9 have enough); not measured. 64 rows are what a warpgroup of Hopper multiplies at once. 128 would leave a
# third of a program's work unused for 257 tokens, so only correlate has them, where 256 are left without the prefix.
# Exact float32 products run unrolled on the CUDA cores: larger tiles run out of registers.
_TILES = {
    "attend": (
        ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)),
        ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    ),
    "correlate": (
        ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
        ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ),
    "delta": (
        ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
        ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ),
    "dq": (
        ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 16, 8, 2)),
        ((32, 32, 8, 2), (32, 16, 4, 2), (32, 16, 8, 2), (16, 16, 4, 2)),
    ),
    "dkv": (
        ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2), (16, 64, 8, 2)),
        ((32, 16, 4, 2), (32, 32, 8, 2), (32, 16, 8, 2), (16, 16, 4, 2)),
    ),
}
_WIDTHS = (64, 96, 128, 256)


def configuration(kernel: str, width: int, dtype: torch.dtype) -> Tiles:
    """The tuning of one of the kernels for head width D and an input type."""
    by_width = _TILES[kernel][dtype == torch.float32]
    return Tiles(*by_width[bisect.bisect_left(_WIDTHS, width)])


@triton.jit
def attend_kernel(
    # tensors
    p_q, p_k, p_v, p_attended, p_largest, p_inverse,
    # sizes
    H, N, M,
    # strides
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    # scale log2(e)
    exponent,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tile, i_bh, i_b, i_h = program(tl.cdiv(N, BLOCK_Q), H)
    o_q = i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh

    b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, o_q, stride_qn, N, D, D0, D1, ALIGN)
    b_largest = tl.full([BLOCK_Q], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_out = zero_rows(BLOCK_Q, D0, D1)
    for first in range(0, M, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        b_k = load_rows(p_k, o_k, stride_km, M, D, D0, D1, ALIGN)
        b_v = load_rows(p_v, o_k, stride_vm, M, D, D0, D1, ALIGN)
        b_r = products(b_q, b_k, o_k, M)
        # A NaN in r may be lost to the maximum, but not to the sum, and through the sum it reaches the whole row.
        b_new = tl.maximum(b_largest, tl.max(b_r, axis=1))
        b_decay = tl.exp2((b_largest - b_new) * exponent)
        b_p = tl.exp2((b_r - b_new[:, None]) * exponent)  # [BLOCK_Q, BLOCK_K], not yet divided by the row's sum
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        b_out = add_product(scale_rows(b_out, b_decay[:, None]), b_p, b_v, p_v.dtype.element_ty)
        b_largest = b_new

    b_inverse = 1.0 / b_sum
    o_stats = i_bh * N + o_q
    tl.store(p_largest + o_stats, b_largest, mask=o_q < N)
    tl.store(p_inverse + o_stats, b_inverse, mask=o_q < N)
    store_rows(p_attended + i_bh * N * D, scale_rows(b_out, b_inverse[:, None]), o_q, D, N, D)


@triton.jit
def correlate_kernel(
    # tensors
    p_q, p_k, p_largest, p_inverse, p_corr,
    # sizes
    H, N, M, prefix,
    # strides
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_km,
    # scale log2(e)
    exponent,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = N - prefix
    columns = M - prefix
    tiles_k = tl.cdiv(columns, BLOCK_K)
    tiles = tl.cdiv(rows, BLOCK_Q) * tiles_k
    i_tile = tl.program_id(0) % tiles
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    # Tiles are counted from the first row and column that are no prefix, so that they meet aligned memory in corr.
    o_q = prefix + (i_tile // tiles_k) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_k = prefix + (i_tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    p_q += i_b * stride_qb
    p_k += i_b * stride_kb
    p_largest += i_b * H * N + o_q
    p_inverse += i_b * H * N + o_q

    b_corr = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for _ in range(0, H):
        b_q = load_rows(p_q, o_q, stride_qn, N, D, D0, D1, ALIGN)
        b_k = load_rows(p_k, o_k, stride_km, M, D, D0, D1, ALIGN)
        b_largest = tl.load(p_largest, mask=o_q < N, other=0.0)[:, None]
        b_inverse = tl.load(p_inverse, mask=o_q < N, other=0.0)[:, None]
        b_corr += probabilities(dot_rows(b_q, b_k), b_largest, b_inverse, exponent)
        p_q += stride_qh
        p_k += stride_kh
        p_largest += N
        p_inverse += N

    p_corr += i_b * rows * columns + (o_q - prefix).to(tl.int64)[:, None] * columns + (o_k - prefix)[None, :]
    tl.store(p_corr, b_corr, mask=(o_q < N)[:, None] & (o_k < M)[None, :])


def why_not(q: Tensor) -> str | None:
    """None when the Triton kernels can compute with tensors like `q`, else the reason in one sentence."""
    if q.shape[-1] > MAX_WIDTH:
        return f"it takes head widths D up to {MAX_WIDTH}, got {q.shape[-1]}"
    return why_not_on_device("q", q)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    attended, corr, stats = outputs = _outputs(q, k, v, scale, prefix)
    if attended.numel() == 0:
        return attended, corr.zero_(), stats.zero_()
    if scale < 0:  # the kernels take the largest product of a row for its largest logit
        return forward(-q, k, v, -scale, prefix)
    arguments = _arguments(q, k, v, scale, prefix)
    arguments |= {"p_attended": attended, "p_largest": stats[0], "p_inverse": stats[1], "p_corr": corr}
    with torch.cuda.device_of(q):
        _launch_per_head(attend_kernel, "attend", q, arguments)
        if corr.numel() > 0:
            tiles = configuration("correlate", q.shape[-1], q.dtype)
            _, rows, columns = corr.shape
            programs = len(q) * triton.cdiv(rows, tiles.block_q) * triton.cdiv(columns, tiles.block_k)
            launch(correlate_kernel, programs, tiles, arguments)
    return outputs


def backward(
    grad_attended: Tensor | None,
    grad_corr: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    stats: Tensor,
    scale: float,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = grads = _grads(grad_attended, grad_corr, q, k, v, attended, stats, scale, prefix)
    if grad_corr is not None and grad_corr.numel() == 0:
        grad_corr = None
    if dq.numel() == 0 or (grad_attended is None and grad_corr is None):
        return dq.zero_(), dk.zero_(), dv.zero_()
    if scale < 0:
        dq, dk, dv = backward(grad_attended, grad_corr, -q, k, v, attended, stats, -scale, prefix)
        return -dq, dk, dv
    attended, stats = attended.contiguous(), stats.contiguous()
    arguments = _arguments(q, k, v, scale, prefix)
    arguments |= {"p_attended": attended, "p_largest": stats[0], "p_inverse": stats[1]}
    arguments |= strided("p_da", grad_corr, "stride_a", "bnm")
    grad_attended = None if grad_attended is None else dense_rows(grad_attended)
    arguments |= strided("p_do", grad_attended, "stride_o", "bhn")
    if grad_attended is not None:
        arguments["ALIGN"] = min(arguments["ALIGN"], row_alignment(attended, grad_attended))
    arguments |= {"p_delta": torch.empty_like(stats[0]), "p_dq": dq, "p_dk": dk, "p_dv": dv}
    if grad_attended is None:
        dv.zero_()
    with torch.cuda.device_of(q):
        _launch_per_head(delta_kernel, "delta", q, arguments)
        _launch_per_head(dq_kernel, "dq", q, arguments)
        _launch_per_head(dkv_kernel, "dkv", k, arguments)
    return grads


def _arguments(q: Tensor, k: Tensor, v: Tensor, scale: float, prefix: int) -> dict[str, Any]:
    """What the kernels are told of the inputs."""
    q, k, v = (dense_rows(x) for x in (q, k, v))
    width = q.shape[-1]
    head, tail = split_width(width)
    return {
        **strided("p_q", q, "stride_q", "bhn"),
        **strided("p_k", k, "stride_k", "bhm"),
        **strided("p_v", v, "stride_v", "bhm"),
        "H": q.shape[1],
        "N": q.shape[2],
        "M": k.shape[2],
        "prefix": prefix,
        "scale": scale,
        "exponent": max(scale * math.log2(math.e), 1e-30),  # not 0, so that -inf stays -inf
        "D": width,
        "D0": head,
        "D1": tail,
        "ALIGN": row_alignment(q, k, v),
    }


def _launch_per_head(kernel: Any, name: str, x: Tensor, arguments: dict[str, Any]) -> None:
    """One program per (b, h, tile of the rows of x)."""
    tiles = configuration(name, x.shape[-1], x.dtype)
    block = tiles.block_k if name == "dkv" else tiles.block_q
    launch(kernel, x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], block), tiles, arguments)


def _outputs(q: Tensor, k: Tensor, v: Tensor, scale: float, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, prefix)
    batch, heads, n, _ = q.shape
    corr = q.new_empty((batch, n - prefix, k.shape[2] - prefix), dtype=torch.float32)
    return q.new_empty(q.shape), corr, q.new_empty((2, batch, heads, n), dtype=torch.float32)


def _grads(
    grad_attended: Tensor | None,
    grad_corr: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    stats: Tensor,
    scale: float,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, prefix)
    check_correlation_gradients(grad_attended, grad_corr, q, k, prefix)
    check_tensor(OP, "attended", attended, tuple(q.shape), q, q.dtype)
    check_tensor(OP, "stats", stats, (2, *q.shape[:3]), q, torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _check(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> None:
    check_correlation(q, k, v, prefix, DTYPES)
    check_range(OP, "the head width D", q.shape[3], 0, MAX_WIDTH)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.prefix = inputs
    attended, _, stats = output
    ctx.save_for_backward(q, k, v, attended, stats)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_attended: Tensor | None, grad_corr: Tensor | None, _: None) -> tuple[Any, ...]:
    grads = torch.ops.lpmflow.correlation_triton_backward(
        grad_attended, grad_corr, *ctx.saved_tensors, ctx.scale, ctx.prefix
    )
    return (*grads, None, None)


define(
    OP,
    "correlation_triton",
    "(Tensor q, Tensor k, Tensor v, float scale, SymInt prefix) -> (Tensor, Tensor, Tensor)",
    forward,
    _outputs,
)
define(
    OP,
    "correlation_triton_backward",
    "(Tensor? grad_attended, Tensor? grad_corr, Tensor q, Tensor k, Tensor v, Tensor attended, Tensor stats, "
    "float scale, SymInt prefix) -> (Tensor, Tensor, Tensor)",
    backward,
    _grads,
)
torch.library.register_autograd("lpmflow::correlation_triton", _differentiate, setup_context=_save)
torch.library.register_autograd("lpmflow::correlation_triton_backward", functools.partial(refuse_second_order, OP))


def correlation(q: Tensor, k: Tensor, v: Tensor, *, scale: float, prefix: int) -> tuple[Tensor, Tensor]:
    """(attended, corr) of checked arguments; see `lpmflow.ops.correlation`."""
    attended, corr, _ = torch.ops.lpmflow.correlation_triton(q, k, v, scale, prefix)
    return attended, corr
