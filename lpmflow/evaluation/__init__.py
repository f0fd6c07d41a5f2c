"""Evaluation: scores of predicted points against marked ones. It computes and reads no files."""

from lpmflow.evaluation.pck import PCK, box_extent, pck, relative_errors

__all__ = ["PCK", "box_extent", "pck", "relative_errors"]
