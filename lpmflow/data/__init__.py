"""Data: photographs, warp pairs made from them, and image pairs with ground truth."""

from lpmflow.data.homographies import HomographyPair, load_homographies
from lpmflow.data.photos import load_photos
from lpmflow.data.spair import KeypointPair, load_spair
from lpmflow.data.warps import WarpBatch, WarpPairs, WarpRange

__all__ = [
    "HomographyPair",
    "KeypointPair",
    "WarpBatch",
    "WarpPairs",
    "WarpRange",
    "load_homographies",
    "load_photos",
    "load_spair",
]
