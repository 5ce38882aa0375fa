# SPDX-License-Identifier: Apache-2.0
"""Slices that fit together, and such that do not."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from brainprior_bids.anatomy.slices import check_slices, slice_fit
from brainprior_bids.bids.qc import concerns, metrics, verdict
from brainprior_bids.engine.errors import ShapeMismatchError
from brainprior_bids.records import ScanRecord

SHAPE = (40, 48, 20)
AFFINE = np.diag([4.0, 4.0, 5.0, 1.0])
BRAIN = sum(
    ((p - (n - 1) / 2) / (0.45 * n)) ** 2 for p, n in zip(np.indices(SHAPE), SHAPE, strict=True)
) < 1  # fmt: skip


def still():
    """Blobs of 15 mm in a brain."""
    noise = np.random.default_rng(0).normal(size=SHAPE)
    blobs = ndimage.gaussian_filter(noise, 15 / 2.355 / np.diag(AFFINE)[:3])
    return np.where(BRAIN, 100 + 15 * blobs / blobs.std(), 0).astype(np.float32)


def moved():
    data = still()
    data[:, :, ::2] = np.roll(data[:, :, ::2], 2, axis=1)
    return data


def uneven():
    data = still()
    data[:, :, ::2] *= 1.2
    return data


def lost():
    data = still()
    data[:, :, 9] = 0
    return data


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (still, []),
        (moved, ["slice_mismatch"]),
        (uneven, ["slice_mismatch"]),
        (lost, ["slice_mismatch", "faintest_slice"]),
    ],
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_does_not_fit_is_found_along_any_axis(made, said, axis):
    affine = np.diag([*np.roll(np.diag(AFFINE)[:3], axis - 2), 1.0])
    data, brain = (np.transpose(v, np.roll(range(3), axis - 2)) for v in (made(), BRAIN))
    fit = slice_fit(nib.Nifti1Image(data, affine), brain, axis=axis)
    slices = {"mismatch": fit.mismatch, "faintest": fit.faintest}
    facts = {"parcellation": {"slices": slices}}
    values = metrics(ScanRecord.from_json({"scan": "sub-01_T2w", "facts": facts}))
    assert [text.split()[0] for text in concerns(values)] == said, fit
    assert verdict(values) == ("look" if said else "pass")
    if made is lost:
        assert (fit.faintest, fit.faintest_slice) == (0, 9)


def test_white_noise_has_the_mismatch_of_the_formula():
    data = np.random.default_rng(1).normal(100, 5, (60, 60, 60)).astype(np.float32)
    inside = np.ones(data.shape, bool)
    fit = slice_fit(nib.Nifti1Image(data, np.diag([2.0, 2, 2, 1])), inside, axis=2)
    assert fit.mismatch == pytest.approx(np.sqrt(1.5 / 2), abs=0.02)


def test_little_brain_is_not_judged_and_a_foreign_mask_refused():
    image = nib.Nifti1Image(still(), AFFINE)
    assert slice_fit(image, np.indices(SHAPE)[2] < 4, axis=2) is None
    with pytest.raises(ShapeMismatchError, match="on the image's grid"):
        slice_fit(image, BRAIN[1:], axis=2)


def test_slices_that_do_not_fit_are_warned_about():
    def warnings(values):
        return check_slices(nib.Nifti1Image(values, AFFINE), BRAIN, axis=2)[1]

    assert warnings(still()) == []
    assert [text.split()[0] for text in warnings(moved())] == ["Neighbouring"]
    faint, mismatch = warnings(lost())
    assert faint.startswith("Slice 10 of 20 (axial, counted from the bottom) has 0 % of")
    assert mismatch.startswith("Neighbouring slices are inconsistent (mismatch")
    image = nib.Nifti1Image(still(), AFFINE)
    assert check_slices(image, np.indices(SHAPE)[2] < 4, axis=2) == (None, [])
