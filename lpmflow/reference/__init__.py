"""The specification of each op: plain einsum, differentiable, exact in float64. Imports torch only."""

from lpmflow.reference.correlation import correlation
from lpmflow.reference.correlation_flow import correlation_flow
from lpmflow.reference.correlation_volume import correlation_volume
from lpmflow.reference.cross_scale_fusion import cross_scale_fusion, lines_of_rows
from lpmflow.reference.region_attention import region_attention, region_bias
from lpmflow.reference.window_refinement import window_attention
from lpmflow.reference.window_stage import PooledMap, StageWeights, window_stage

__all__ = [
    "PooledMap",
    "StageWeights",
    "correlation",
    "correlation_flow",
    "correlation_volume",
    "cross_scale_fusion",
    "lines_of_rows",
    "region_attention",
    "region_bias",
    "window_attention",
    "window_stage",
]
