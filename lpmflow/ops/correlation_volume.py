"""The classical 4D correlation volume of two feature maps, for features of one's own."""

from __future__ import annotations

from torch import Tensor

from lpmflow import reference
from lpmflow.ops._autocast import without_autocast
from lpmflow.ops._checks import check_like, check_shape, check_tensor

OP = "correlation_volume"


def correlation_volume(feat_a: Tensor, feat_b: Tensor, *, normalize: bool = True, mutual: bool = False) -> Tensor:
    """Similarity of every cell of one feature map to every cell of another.

    corr[b, i, j, k, l] = <a[b, :, i, j], b[b, :, k, l]>, with `normalize` of vectors brought to length 1: cosines.
    A zero vector gives zeros, and gets no gradient. With `mutual` each entry is weighted by how near it comes to the
    best of its row and to the best of its column, corr (corr / row's best)(corr / column's best): the soft mutual
    nearest neighbours of NC-Net (Rocco et al., 2018). A negative entry has no weight, and a best below 1e-5 counts as
    1e-5.

    Args:
        feat_a: (B, C, ha, wa); float32, float64, float16 or bfloat16.
        feat_b: (B, C, hb, wb), in feat_a's dtype and on its device.

    Returns:
        (B, ha, wa, hb, wb) in float32 (float64 for float64), row-major cells, differentiable in both maps. It flattens
        to what `cross_scale_fusion` takes: `volume.flatten(3).flatten(1, 2)`. Autocast does not reach inside.

    There is one implementation, PyTorch's. Of the time of cosines its matrix product, which runs near what the machine
    can do, is the larger part from about 32 x 32 cells on (`pytest benchmarks/bench_correlation_volume.py`); a kernel
    of our own has not been tried.

    Raises TypeError or ValueError naming the argument.
    """
    check_tensor(OP, "feat_a", feat_a, "B, C, ha, wa")
    check_tensor(OP, "feat_b", feat_b, "B, C, hb, wb")
    check_like(OP, "feat_b", feat_b, "feat_a", feat_a)
    check_shape(OP, "feat_b", feat_b, (*feat_a.shape[:2], *feat_b.shape[2:]))
    for name, feat in (("feat_a", feat_a), ("feat_b", feat_b)):
        if 0 in feat.shape[1:]:
            raise ValueError(f"{OP}: {name} must have channels and cells, got {tuple(feat.shape)}")
    for name, value in (("normalize", normalize), ("mutual", mutual)):
        if not isinstance(value, bool):
            raise TypeError(f"{OP}: {name} must be True or False, got {value!r}")
    with without_autocast(feat_a.device):
        return reference.correlation_volume(feat_a, feat_b, normalize=normalize, mutual=mutual)
