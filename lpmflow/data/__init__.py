"""Data: photographs, warp pairs made from them, and image pairs with ground truth."""

from lpmflow.data.flows import FlowPair, load_flows
from lpmflow.data.homographies import HomographyPair, load_homographies
from lpmflow.data.loader import PairBatch, PairDataset, PairSample, collate
from lpmflow.data.masks import read_mask
from lpmflow.data.pairs import BENCHMARKS, KeypointPair, load_pairs
from lpmflow.data.photos import load_photos
from lpmflow.data.spair import load_spair
from lpmflow.data.warps import WarpBatch, WarpPairs, WarpRange

__all__ = [
    "BENCHMARKS",
    "FlowPair",
    "HomographyPair",
    "KeypointPair",
    "PairBatch",
    "PairDataset",
    "PairSample",
    "WarpBatch",
    "WarpPairs",
    "WarpRange",
    "collate",
    "load_flows",
    "load_homographies",
    "load_pairs",
    "load_photos",
    "load_spair",
    "read_mask",
]
