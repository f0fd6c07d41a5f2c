"""`window_attention`: the reference against loops over cells, padding, shift, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from lpmflow.ops import window_attention


def naive(qkv, table, heads, window, shift):
    """Each cell attends to the cells of its (shifted, cyclic) window that were its neighbours before the shift."""
    batch, height, width, channels = qkv.shape
    head_width = channels // 3 // heads
    q, k, v = qkv.view(batch, height, width, 3, heads, head_width).unbind(3)
    padded_h, padded_w = height + -height % window, width + -width % window
    out = torch.zeros(batch, height, width, heads, head_width, dtype=qkv.dtype)

    def place(r, c):
        rolled_r, rolled_c = (r - shift) % padded_h, (c - shift) % padded_w
        band = (rolled_r >= padded_h - shift, rolled_c >= padded_w - shift) if shift else (False, False)
        return rolled_r, rolled_c, band

    for r in range(height):
        for c in range(width):
            qr, qc, q_band = place(r, c)
            seen = []
            for r2 in range(height):
                for c2 in range(width):
                    kr, kc, k_band = place(r2, c2)
                    if (qr // window, qc // window) == (kr // window, kc // window) and q_band == k_band:
                        index = (qr - kr + window - 1) * (2 * window - 1) + (qc - kc + window - 1)
                        seen.append((r2, c2, index))
            logits = torch.stack(
                [(q[:, r, c] * k[:, r2, c2]).sum(-1) * head_width**-0.5 + table[i] for r2, c2, i in seen], -1
            )
            p = logits.softmax(-1)
            out[:, r, c] = sum(p[..., n, None] * v[:, r2, c2] for n, (r2, c2, _) in enumerate(seen))
    return out.flatten(3)


def inputs(height, width, window, heads=2, head_width=3, batch=2):
    torch.manual_seed(0)
    qkv = torch.randn(batch, height, width, 3 * heads * head_width, dtype=torch.float64)
    return qkv, torch.randn((2 * window - 1) ** 2, heads, dtype=torch.float64)


@pytest.mark.parametrize(
    ("height", "width", "window", "shift"),
    [(4, 4, 2, 0), (4, 6, 2, 1), (5, 7, 4, 0), (5, 7, 4, 2), (3, 3, 4, 0), (1, 5, 2, 1), (6, 6, 3, 1), (8, 4, 4, 3)],
)
def test_equals_the_loops(height, width, window, shift):
    qkv, table = inputs(height, width, window)
    got = window_attention(qkv, table, heads=2, window=window, shift=shift)
    torch.testing.assert_close(got, naive(qkv, table, 2, window, shift), rtol=1e-10, atol=1e-12)


def test_windows_do_not_see_each_other():
    qkv, table = inputs(8, 8, 4)
    before = window_attention(qkv, table, heads=2, window=4)
    qkv[:, 4:, 4:] = 9.0
    after = window_attention(qkv, table, heads=2, window=4)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.equal(after[:, 4:, 4:], before[:, 4:, 4:])


@pytest.mark.parametrize("shift", [0, 1])
def test_every_gradient(shift):
    qkv, table = inputs(3, 4, 2, head_width=2, batch=1)

    def op(qkv, table):
        return window_attention(qkv, table, heads=2, window=2, shift=shift)

    assert torch.autograd.gradcheck(op, (qkv.requires_grad_(), table.requires_grad_()))


def test_half_precision_and_permuted_maps():
    qkv, table = inputs(8, 8, 4)
    permuted = qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(
        window_attention(permuted, table, heads=2, window=4), window_attention(qkv, table, heads=2, window=4)
    )
    half = window_attention(qkv.bfloat16(), table.float(), heads=2, window=4)
    assert half.dtype == torch.bfloat16
    exact = window_attention(qkv.bfloat16().double(), table, heads=2, window=4)
    torch.testing.assert_close(half.double(), exact, rtol=1e-2, atol=1e-2)


def test_refusals_name_the_argument():
    qkv, table = inputs(4, 4, 2)
    with pytest.raises(ValueError, match="window_attention: shift must be smaller than window 2, got 2"):
        window_attention(qkv, table, heads=2, window=2, shift=2)
    with pytest.raises(ValueError, match="3 x heads x width channels"):
        window_attention(qkv, table, heads=4, window=2)
    with pytest.raises(ValueError, match=r"bias_table must have shape \(25, 2\), got \(9, 2\)"):
        window_attention(qkv, table, heads=2, window=3)
    with pytest.raises(ValueError, match=r"qkv must have shape \(B, H, W, 3C\)"):
        window_attention(qkv[0], table, heads=2, window=2)


@pytest.mark.parametrize("shift", [0, 1])
def test_an_empty_batch_of_maps_that_need_masks(shift):
    out = window_attention(
        torch.zeros(0, 5, 4, 12), torch.zeros(25, 2), heads=2, window=3, shift=shift, backend="reference"
    )
    assert out.shape == (0, 5, 4, 4)
