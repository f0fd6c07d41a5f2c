"""Evaluation: scores of predictions against what is marked. It computes, needs numpy alone, and reads no files."""

from lpmflow.evaluation.average_precision import average_precision, kap_candidates
from lpmflow.evaluation.dense import EndPointError, end_point_error, intersection_over_union, label_transfer_accuracy
from lpmflow.evaluation.paired import PairedDifference, paired_bootstrap
from lpmflow.evaluation.pck import PCK, box_extent, pck, relative_errors
from lpmflow.evaluation.protocols import DEFAULTS, PROTOCOLS, Protocol, protocol
from lpmflow.evaluation.scores import Interval, Scores, score
from lpmflow.evaluation.symmetry import geometry_aware, geometry_aware_points

__all__ = [
    "DEFAULTS",
    "PCK",
    "PROTOCOLS",
    "EndPointError",
    "Interval",
    "PairedDifference",
    "Protocol",
    "Scores",
    "average_precision",
    "box_extent",
    "end_point_error",
    "geometry_aware",
    "geometry_aware_points",
    "intersection_over_union",
    "kap_candidates",
    "label_transfer_accuracy",
    "paired_bootstrap",
    "pck",
    "protocol",
    "relative_errors",
    "score",
]
