# SPDX-License-Identifier: Apache-2.0
"""A brain whose intensity says where it is."""

from __future__ import annotations

import numpy as np

from brainprior_bids.engine.grids import Grid
from brainprior_bids.training import preprocess

AFFINE = np.array([[1.1, 0.05, 0, -30], [0, 1.0, 0.1, -40], [0.02, 0, 1.2, -35], [0, 0, 0, 1.0]])


def toy_brain(name="01", *, split="train", contrast="T1w", synthetic=False, seed=0, texture=0.01):
    """A ball whose intensity is 0.3 + |x| / 100 where x is the MNI305 position in mm."""
    shape = (52, 60, 56)
    points = Grid(shape, AFFINE).points_mm()
    centre = (AFFINE @ [26, 30, 28, 1])[:3]
    ball = ((points - centre[:, None, None, None]) ** 2).sum(0) < 24**2
    grain = np.random.default_rng(seed).normal(0, texture, shape)
    data = np.where(ball, 0.3 + np.abs(points[0]) / 100 + grain, 0)
    stored = np.round(data * preprocess.UNIT).astype(np.uint8)
    return preprocess.Brain(
        name, contrast, split, stored, AFFINE, np.array([0.3, 0.45, 0.6]), synthetic
    )
