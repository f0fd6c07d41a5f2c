"""4D correlation construction: cross-attention that also returns its maps, summed over the heads."""

from __future__ import annotations

from torch import Tensor

from lpmflow import reference
from lpmflow.ops._autocast import without_autocast
from lpmflow.ops._autodiff import needs_gradient, why_no_kernel
from lpmflow.ops._backends import choose, why_no_backward
from lpmflow.ops._checks import check_count, check_like, check_shape, check_tensor

OP = "correlation"


def correlation(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prefix: int = 1, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attended values and the correlation tensor of one matching block (paper section 3.3).

    P_h = softmax(scale q_h k_h^T); attended_h = P_h v_h; corr = sum_h P_h without the first `prefix` rows and columns.

    Args:
        q: (B, H, N, D) queries of the source tokens, prefix tokens first; float32, float64, float16 or bfloat16.
        k, v: (B, H, M, D) keys and values of the target tokens, in q's dtype and on its device.
        scale: factor on the logits; D^-0.5 when None.
        prefix: how many leading tokens of both sides are no grid cells (the cls token: 1).
        backend: "reference", "native", "triton" or None to choose.

    Returns:
        attended (B, H, N, D) in q's dtype, and corr (B, N - prefix, M - prefix) in float32 (float64 for float64),
        rows in [0, H]. Both are differentiable in q, k and v. Autocast does not reach inside.

    The backends other than "reference" have first derivatives only, backward-mode. Within `torch.func` (grad, vmap,
    ...) and where tensors carry a forward-mode tangent the reference is chosen, and another backend named there raises
    RuntimeError; so does the derivative of a derivative (`create_graph=True`), unless backend="reference".

    Raises TypeError or ValueError naming the argument, RuntimeError when the named backend cannot run.
    """
    check_tensor(OP, "q", q, "B, H, N, D")
    check_tensor(OP, "k", k, "B, H, M, D")
    check_like(OP, "k", k, "q", q)
    check_shape(OP, "k", k, (*q.shape[:2], k.shape[2], q.shape[3]))
    check_tensor(OP, "v", v, "B, H, M, D")
    check_like(OP, "v", v, "q", q)
    check_shape(OP, "v", v, tuple(k.shape))
    check_count(OP, "prefix", prefix, at_least=0)
    for name, tokens in (("q", q.shape[2]), ("k", k.shape[2])):
        if tokens < max(prefix, 1):
            raise ValueError(f"{OP}: {name} must have at least {max(prefix, 1)} tokens (prefix {prefix}), got {tokens}")
    chosen = choose(OP, backend, q.device.type, lambda name: _why_not(name, q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with without_autocast(q.device):
        if chosen == "native":
            from lpmflow_kernels.native import correlation as native

            return native.correlation(q, k, v, scale=scale, prefix=prefix)
        if chosen == "triton":
            from lpmflow_kernels import correlation as triton

            return triton.correlation(q, k, v, scale=scale, prefix=prefix)
        return reference.correlation(q, k, v, scale=scale, prefix=prefix)


def _why_not(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None when an installed backend can compute with tensors like these, else the reason in one sentence."""
    reason = why_no_kernel(q, k, v)
    if reason is not None:
        return reason
    if backend == "native":
        from lpmflow_kernels.native import correlation as native

        reason = native.why_not(q)
        if reason is None and q.device.type == "cuda" and needs_gradient(q, k, v):
            reason = why_no_backward(OP)
    elif backend == "triton":
        from lpmflow_kernels import correlation as triton

        reason = triton.why_not(q)
    return reason
