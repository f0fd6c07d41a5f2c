"""The label grid of keypoint supervision: by hand, by a loop over cells, and against stored labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lpmflow.training import keypoint_labels


def by_loop(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rule, cell by cell, for one image: (2, 128, 128)."""
    labels = np.zeros((2, 128, 128))
    for i in range(128):
        for j in range(128):
            near = [p for p in range(len(source)) if np.abs(source[p] - (4 * j + 2, 4 * i + 2)).max() <= 17]
            if near:
                labels[:, i, j] = (target[near[-1]] - source[near].mean(axis=0)) / 4
    return labels


def test_one_keypoint_labels_the_cells_within_17_pixels() -> None:
    labels = keypoint_labels(torch.tensor([[[100.0, 202.0]]]), torch.tensor([[[108.0, 198.0]]]))
    labelled = (labels != 0).any(dim=1)[0]
    rows, columns = labelled.nonzero().unbind(1)
    assert (columns.min(), columns.max()) == (21, 28)  # centres 86 ... 114: 14 either side; 82 and 118 are 18 away
    assert (rows.min(), rows.max()) == (46, 54)  # centres 186 ... 218: 16 either side
    assert labels[0, :, 50, 24].tolist() == [2.0, -1.0]


def test_the_border_is_included() -> None:
    labels = keypoint_labels(torch.tensor([[[2.0 + 17.0, 2.0]]]), torch.tensor([[[400.0, 2.0]]]))
    assert labels[0, 0, 0, 0] == (400 - 19) / 4
    just_outside = keypoint_labels(torch.tensor([[[2.0 + 17.001, 2.0]]]), torch.tensor([[[400.0, 2.0]]]))
    assert just_outside[0, 0, 0, 0] == 0


def test_several_keypoints_in_a_cell() -> None:
    source = torch.tensor([[[50.0, 50.0], [54.0, 50.0]]])
    target = torch.tensor([[[90.0, 90.0], [20.0, 30.0]]])
    labels = keypoint_labels(source, target)
    assert labels[0, :, 12, 12].tolist() == [(20 - 52) / 4, (30 - 50) / 4]
    first_only = keypoint_labels(source, target, torch.tensor([[True, False]]))
    assert first_only[0, :, 12, 12].tolist() == [10.0, 10.0]


def test_equals_the_loop_over_cells() -> None:
    rng = np.random.default_rng(3)
    source, target = rng.uniform(0, 512, (2, 12, 2)), rng.uniform(0, 512, (2, 12, 2))
    source[:, 6:] = source[:, :6] + rng.uniform(-20, 20, (2, 6, 2))  # keypoints that share cells
    labels = keypoint_labels(torch.from_numpy(source), torch.from_numpy(target))
    for image in (0, 1):
        np.testing.assert_allclose(labels[image].numpy(), by_loop(source[image], target[image]), atol=1e-12)


def test_no_keypoints_no_labels() -> None:
    assert keypoint_labels(torch.zeros(2, 0, 2), torch.zeros(2, 0, 2)).abs().sum() == 0


def test_other_frames_and_grids() -> None:
    labels = keypoint_labels(
        torch.tensor([[[24.0, 8.0]]]), torch.tensor([[[40.0, 8.0]]]), frame=(64, 128), grid=(8, 32)
    )
    assert labels.shape == (1, 2, 8, 32)
    assert labels[0, :, 0, 5].tolist() == [4.0, 0.0]  # 16 pixels are 4 cells of 4


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (1, 4, 2)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must both have shape \(B, N, 2\)"):
        keypoint_labels(torch.zeros(shape), torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="valid must have shape"):
        keypoint_labels(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.ones(1, 2, dtype=torch.bool))


def test_agrees_with_the_stored_labels(shared: Path) -> None:
    stored = np.load(shared / "parity" / "training_parity.npz")
    points = int(stored["n_pts"])  # the rest is padding
    source, target = (torch.from_numpy(stored[name]).T[None, :points] for name in ("kps_src", "kps_tgt"))
    labels = keypoint_labels(source, target)
    assert np.abs(labels[0].numpy() - stored["kp_flow"]).max() < 1e-5
    assert (stored["kp_flow"] != 0).sum() > 100
