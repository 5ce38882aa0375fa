# SPDX-License-Identifier: Apache-2.0
"""The study of motion between interleaves: its scans, its errors and its table."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

import numpy as np
import pytest

from brainprior_bids.anatomy.interleaves import InterleaveMotion
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.studies import motion
from brainprior_bids.evaluation.studies.base import Source

SHAPE = (10, 12, 48)
SETTINGS = motion.Settings(4.0, 0.0, 3, 2.0, True, True, 1, 4)


def shift(mm):
    matrix = np.eye(4)
    matrix[0, 3] = mm
    return matrix


def head(value):
    return motion.Head(
        np.full(SHAPE, value, np.float32), np.ones(SHAPE, np.float32), Grid(SHAPE, np.eye(4)),
        np.eye(4),
    )  # fmt: skip


@pytest.fixture
def places():
    to_first = np.stack([np.eye(4), shift(2.0), shift(-1.0)])
    return motion.Places([head(1), head(2), head(3)], to_first)


def test_each_interleave_shows_its_own_head(places):
    scan = motion.scanned(places, SETTINGS)
    assert scan.grid.shape == (10, 12, 12)
    np.testing.assert_allclose(scan.scan[5, 5], [1, 2, 3] * 4, rtol=1e-6)
    assert scan.grid.affine[2, 3] == pytest.approx(1.5)  # middle of four thin slices


def test_a_slab_begins_with_the_first_interleave(places):
    thin = motion.Settings(2.0, 0.0, 3, 2.0, True, True, 1, 4)
    part = motion.slab(motion.scanned(places, thin), 3)
    assert part.grid.shape[2] == motion.SLICES
    np.testing.assert_allclose(part.scan[5, 5], [1, 2, 3] * 4, rtol=1e-6)


def test_the_error_is_that_of_the_worst_interleave(places):
    found = np.stack([np.eye(4), shift(2.5), shift(-2.0)])
    estimate = InterleaveMotion(found, 4.5, 0.1, 0.5, 4.0)
    judged = motion._judged(estimate, places)
    assert judged == {"found": 3, "true_mm": pytest.approx(3), "error_mm": pytest.approx(1)}
    wrong = InterleaveMotion(found[:2], 2.5, 0.1, 0.5, 4.0)
    assert motion._judged(wrong, places)["error_mm"] is None
    still = motion.Places(places.heads[:1], places.to_first[:1])
    assert motion._judged(wrong, still)["error_mm"] == pytest.approx(2.5)


def test_a_scan_without_motion_has_one_case():
    options = Namespace(**motion.STUDY.defaults, n_steps=None, random_seed=0)
    cases = [case for _, case in motion.cases(options, [Source("", "1", "T1w", False, False)])]
    assert [(c.interleaves, c.move) for c in cases[::3]] == [
        (1, 0.0),
        (2, 2.0),
        (3, 2.0),
        (4, 2.0),
    ]
    assert {c.interleaves for c in cases if c.restored} == {1, 2, 3, 4}


def test_the_table_has_errors_and_gains():
    def record(interleaves, error, psnr):
        settings = asdict(SETTINGS) | {"interleaves": interleaves, "n_samples": 1}
        still = interleaves == 1
        return {**settings, "slices_mm": 4.0, "found": 2 if still else interleaves,
                "true_mm": 0.0 if still else 3.0, "error_mm": error, "reported": not still,
                "psnr": psnr}  # fmt: skip

    records = [
        record(1, 0.2, {motion.STILL: 23.0, motion.SPLIT: 22.9}),
        record(3, 0.3, {motion.IGNORED: 17.0, motion.CORRECTED: 21.0}),
        record(3, 0.5, {motion.IGNORED: 18.0, motion.CORRECTED: 20.0}),
        record(4, 0.6, {}),
    ]
    lines = motion.table(records, [])
    assert "| 4.0 | - | none | 1 | - | 0.20 (0.20) | 0 of 1 |" in lines
    assert "| 4.0 | 3 | 3.0 | 2 | 2 of 2 | 0.40 (0.50) | 2 of 2 |" in lines
    assert "| 4.0 | 3 | 3.0 | 2 | 23.0 | 17.5 | +3.0 (+2.0, +4.0) |" in lines
    assert "at most 0.10 dB" in lines[-1]
    assert len([line for line in lines if line.startswith("| 4.0 | 4 |")]) == 1
