"""Evaluation of a model on a data set: match pairs whose truth is known, keep the predictions, score, report.

report = evaluate("spair", "SPair-71k", lpmflow.Matcher(), split="val", protocols=["spair", "lpmflow"])
print("\\n".join(report.lines()))
"""

from lpmflow.benchmark.dense import DENSE, evaluate_dense
from lpmflow.benchmark.evaluate import evaluate
from lpmflow.benchmark.predict import PairMatcher, predict
from lpmflow.benchmark.predictions import Predictions
from lpmflow.benchmark.report import Report, Row, check_folder, check_writable, write
from lpmflow.benchmark.world import World, local_device, world
from lpmflow.data.pairs import BENCHMARKS as PAIRS

BENCHMARKS = (*PAIRS, *DENSE)
"""What `lpmflow evaluate --benchmark` knows."""

__all__ = [
    "BENCHMARKS",
    "PairMatcher",
    "Predictions",
    "Report",
    "Row",
    "World",
    "check_folder",
    "check_writable",
    "evaluate",
    "evaluate_dense",
    "local_device",
    "predict",
    "world",
    "write",
]
