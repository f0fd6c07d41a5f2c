"""The four operations the network is made of, each with one contract and one or more backends; and what follows from
them: `correlation_flow` (correlation straight to flow) and `correlation_volume` (for features of one's own).

Every op checks its arguments, chooses a backend and calls it. `backend=None` takes what measured fastest and can run; a
backend named by the caller, by the argument, by `use_backend` or by the variable LPMFLOW_BACKEND, runs or raises.
`backend_report()` says which can run here and why the others cannot, `last_backend(op)` which one ran.
"""

from lpmflow.ops._backends import BACKENDS, backend_report, last_backend, use_backend
from lpmflow.ops.correlation import correlation
from lpmflow.ops.correlation_flow import CorrelationFlow, correlation_flow, volume_fits
from lpmflow.ops.correlation_volume import correlation_volume
from lpmflow.ops.cross_scale_fusion import FusedFlow, cross_scale_fusion
from lpmflow.ops.linear import linear
from lpmflow.ops.region_attention import region_attention
from lpmflow.ops.window_refinement import window_attention
from lpmflow.ops.window_stage import window_stage
from lpmflow.reference import PooledMap, StageWeights, region_bias

__all__ = [
    "BACKENDS",
    "CorrelationFlow",
    "FusedFlow",
    "PooledMap",
    "StageWeights",
    "backend_report",
    "correlation",
    "correlation_flow",
    "correlation_volume",
    "cross_scale_fusion",
    "last_backend",
    "linear",
    "region_attention",
    "region_bias",
    "use_backend",
    "volume_fits",
    "window_attention",
    "window_stage",
]
