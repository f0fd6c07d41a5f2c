"""Training: labels, losses and the loop."""

from lpmflow.training.labels import keypoint_labels
from lpmflow.training.loop import TrainOptions, train
from lpmflow.training.losses import correlation_nll, end_point_error, rptc_weight

__all__ = ["TrainOptions", "correlation_nll", "end_point_error", "keypoint_labels", "rptc_weight", "train"]
