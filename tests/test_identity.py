"""The baseline that matches nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lpmflow.identity import IdentityMatcher


def test_identity_scales_points_by_the_size_of_the_photographs() -> None:
    matcher, images = IdentityMatcher(), (np.zeros((40, 60, 3), np.uint8), np.zeros((80, 240), np.uint8))
    match = matcher(*images)
    points = [(0, 0), (59, 39), (10.25, 3.5), (-0.5, 39.5)]
    np.testing.assert_allclose(match.transfer(points), [(1.5, 0.5), (237.5, 78.5), (42.5, 7.5), (-0.5, 79.5)])
    (other,) = matcher.batch(iter([images]))
    np.testing.assert_array_equal(other.flow, match.flow)
    assert (matcher.name, matcher.fingerprint()) == ("identity", "identity")


def test_identity_refuses_what_is_no_image() -> None:
    with pytest.raises(FileNotFoundError, match="tgt must be the path of an image file"):
        IdentityMatcher()(np.zeros((4, 4), np.uint8), "absent.png")


def test_pixels_are_taken_as_they_are() -> None:
    """And are the match's own: what is done to the images later is not seen."""
    image = torch.arange(2 * 3 * 5 * 7, dtype=torch.uint8).view(2, 3, 5, 7)
    (match,) = IdentityMatcher().batch([(image[0], image[1])])
    for found, given in ((match.source, image[0]), (match.target, image[1])):
        assert not np.shares_memory(found, given.numpy())
        np.testing.assert_array_equal(found, given.permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match="src must have at least one pixel"):
        IdentityMatcher()(torch.empty(3, 0, 4, dtype=torch.uint8), image[0])
