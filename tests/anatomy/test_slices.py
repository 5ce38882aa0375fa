# SPDX-License-Identifier: Apache-2.0
"""Slices that are consistent with their neighbours, and others."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from brainprior_bids.anatomy.slices import (
    bridged,
    check_slices,
    hidden_voxels,
    lost_slices,
    name_lost,
    slice_fit,
)
from brainprior_bids.bids.qc import metrics, reasons, verdict
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
    assert [text.split()[0] for text in reasons(values)] == said, fit
    assert verdict(values) == ("look" if said else "pass")
    if made is lost:
        assert (fit.faintest, fit.faintest_slice) == (0, 9)


def turned(data, axis):
    """The data with its slices along another axis, as an image."""
    affine = np.diag([*np.roll(np.diag(AFFINE)[:3], axis - 2), 1.0])
    return nib.Nifti1Image(np.transpose(data, np.roll(range(3), axis - 2)), affine)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("gone", [(), (9,), (9, 10), (6, 8), (1, 18), (5, 12)])
@pytest.mark.parametrize("left", [0.0, 0.4])
def test_lost_slices_are_found_without_a_mask(gone, left, axis):
    data = still() + np.abs(np.random.default_rng(1).normal(0, 3, SHAPE)).astype(np.float32)
    data[:, :, list(gone)] *= left
    result = lost_slices(turned(data, axis), axis=axis)
    assert result == tuple(k for k in gone if 1 < k < 18)  # too little brain near the ends


@pytest.mark.parametrize("made", [still, moved, uneven])
def test_slices_with_signal_are_not_lost(made):
    assert lost_slices(nib.Nifti1Image(made(), AFFINE), axis=2) == ()
    dim = made() * np.linspace(1, 0.3, SHAPE[2], dtype=np.float32)  # a coil that ends
    assert lost_slices(nib.Nifti1Image(dim, AFFINE), axis=2) == ()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_lost_slices_are_bridged_and_hidden(axis):
    shape = (5, 6, 7)
    ramp = np.indices(shape)[axis]
    data = np.array(ramp, np.float32)
    np.moveaxis(data, axis, 0)[[2, 3]] = -9
    image = bridged(nib.Nifti1Image(data, np.eye(4)), (2, 3), axis=axis)
    np.testing.assert_allclose(image.get_fdata(), ramp, rtol=1e-6)
    assert np.moveaxis(data, axis, 0)[2].max() == -9  # the scan itself stays
    lesion = np.zeros(shape)
    lesion[0, 0, 0] = 0.5
    hidden = hidden_voxels(lesion, (2, 3), shape, axis=axis)
    np.testing.assert_array_equal(hidden > 0, (ramp == 2) | (ramp == 3) | (lesion > 0))
    np.testing.assert_array_equal(hidden_voxels(None, (), shape, axis=axis) is None, True)
    np.testing.assert_array_equal(hidden_voxels(lesion, (), shape, axis=axis) > 0, lesion > 0)


def test_lost_slices_are_named_once():
    data = lost()
    data[:, :, 12] = 0
    gone = lost_slices(nib.Nifti1Image(data, AFFINE), axis=2)
    (text,) = name_lost(gone, SHAPE[2], axis=2)
    assert text.startswith("Slices 10, 13 of 20 (axial, counted from the bottom) have lost their")
    _, warnings = check_slices(nib.Nifti1Image(data, AFFINE), BRAIN, axis=2, lost=gone)
    assert [text.split(" (")[0] for text in warnings] == ["Neighbouring slices are inconsistent"]
    assert name_lost((), 20, axis=2) == []


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
