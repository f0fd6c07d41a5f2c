"""The released network's own structure, to compare with: the same mathematics and weights, computed as it is there.

The images of one side at a time through the backbone; all three thirds of every cross-attention's projection, whether
they are used or not; outside the backbone, attention from whole maps and a whole bias; windows cut out, correlations
interpolated to whole volumes. 384 GFLOP a pair at the size of the paper.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lpmflow import ops
from lpmflow.model import LPMFlow, backbone, layers


@contextlib.contextmanager
def released_structure(model: LPMFlow) -> Iterator[None]:
    """Within the block `model` computes like the released network."""
    both = model.backbone.forward
    some, fused, fast = layers.Projections.split, layers.attention, ops.linear

    def one_at_a_time(images: Tensor) -> backbone.Features:
        found = [both(image) for image in images.chunk(2)]
        fine = None if found[0].fine is None else torch.cat([each.fine for each in found])
        return backbone.Features(torch.cat([each.tokens for each in found]), fine)

    def all_thirds(self: layers.Projections, x: Tensor, first: int = 0, last: int = 3) -> tuple[Tensor, ...]:
        return some(self, x)[first:last]

    def with_map(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return (logits if bias is None else logits + bias).softmax(dim=-1).to(v.dtype) @ v

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y

    try:
        model.backbone.__dict__["forward"] = one_at_a_time
        layers.Projections.split, layers.attention, ops.linear = all_thirds, with_map, linear
        with ops.use_backend("reference"):
            yield
    finally:
        del model.backbone.__dict__["forward"]
        layers.Projections.split, layers.attention, ops.linear = some, fused, fast
