# SPDX-License-Identifier: Apache-2.0
"""The number of interleaves is read from the times of the slices, if these have such a pattern."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.slice_timing import stated_interleaves


def times(order, slices=24):
    """Seconds of slices that are measured one after the other, interleave by interleave."""
    count = len(order)
    measured = [k for first in order for k in range(first, slices, count)]
    seconds = np.empty(slices)
    seconds[measured] = 0.1 * np.arange(slices)
    return seconds.tolist()


@pytest.mark.parametrize(
    "order", [(0,), (0, 1), (1, 0), (0, 1, 2), (2, 0, 1), (0, 2, 1, 3), (0, 1, 2, 3, 4)]
)
def test_interleaves_are_counted_in_either_direction(order):
    stated = times(order)
    assert stated_interleaves({"SliceTiming": stated}, 24) == (len(order), "")
    assert stated_interleaves({"SliceTiming": stated[::-1]}, 24) == (len(order), "")
    assert stated_interleaves({"SliceTiming": [-t for t in stated]}, 24) == (len(order), "")


@pytest.mark.parametrize(
    ("stated", "word"),
    [
        (times((0, 1), 23), "23 times, but the image has 24"),
        (["a"] * 24, "list of seconds"),
        ([[0.0] * 24], "list of seconds"),
        ([float("nan")] * 24, "list of seconds"),
        (1.0, "list of seconds"),
        (np.random.default_rng(0).permutation(24).tolist(), "regular interleaves"),
    ],
)
def test_times_that_cannot_be_used_are_named(stated, word):
    count, problem = stated_interleaves({"SliceTiming": stated}, 24)
    assert count is None
    assert word in problem


def test_a_scan_without_times_says_nothing():
    assert stated_interleaves({}, 24) == (None, "")


@pytest.mark.parametrize(("slices", "count"), [(24, 3), (20, None)])
def test_contradicting_times_are_a_warning_and_the_scan_is_conformed(tmp_path, slices, count):
    rng = np.random.default_rng(0)
    image = nib.Nifti1Image(rng.uniform(1, 100, (20, 22, 24)), np.diag([1, 1, 4.0, 1]))
    path = tmp_path / "sub-01_T1w.nii.gz"
    nib.save(image, path)
    stated = {"SliceThickness": 4.0, "SliceTiming": times((0, 2, 1), slices)}
    done = conform(path, metadata=stated)
    assert done.acquisition.interleaves == count
    warned = [text for text in done.warnings if "SliceTiming" in text]
    assert len(warned) == (count is None)
