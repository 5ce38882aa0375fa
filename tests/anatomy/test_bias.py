# SPDX-License-Identifier: Apache-2.0
"""N4 recovers the simulated bias field of a phantom, in thin and in thick slices."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from brainprior_bids.anatomy import bias
from brainprior_bids.anatomy.bias import n4
from brainprior_bids.engine.errors import AnatomyError, DivergenceError, ShapeMismatchError


def phantom(spacing):
    """Two tissues in shells, 2 % noise, an ellipsoidal head of 120 x 150 x 110 mm."""
    shape = tuple(int(n) for n in np.round(np.array((150, 180, 140)) / spacing))
    mm = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    x, y, z = np.meshgrid(*mm, indexing="ij")
    radius = np.sqrt((x / 60) ** 2 + (y / 75) ** 2 + (z / 55) ** 2)
    mask = radius < 1
    folded = radius + 0.08 * np.sin(x / 5) * np.sin(y / 5) * np.sin(z / 6)
    tissue = np.where(folded < 0.75, 100.0, 65.0) * mask
    field = 0.25 * (x / 60) + 0.2 * (y / 75) ** 2 - 0.15 * (z / 55) * (x / 60)
    field -= field[mask].mean()
    noise = np.random.default_rng(1).normal(0, 2, shape)
    data = (tissue * np.exp(field) + noise * mask).astype(np.float32)
    return nib.Nifti1Image(data, np.diag([*spacing, 1])), mask, field


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 5.0), (5.0, 1.2, 1.2), (2.0, 2.0, 2.0)])
def test_a_known_field_is_found(spacing):
    image, mask, field = phantom(spacing)
    result = n4(image, mask.astype(np.float32))
    assert result.shape == image.shape
    assert result.dtype == np.float32
    assert abs(result[mask].mean()) < 1e-5
    before = field[mask].std()
    after = (field - result)[mask].std()
    assert before > 0.1
    assert after < 0.25 * before  # measured 0.08 to 0.19
    assert np.abs(result).max() < 1.5 * np.abs(field).max()  # no wild extrapolation


def test_the_scale_does_not_matter_and_two_runs_agree(monkeypatch):
    monkeypatch.setattr(bias, "ITERATIONS", (5, 5))
    image, mask, _ = phantom((2.5, 2.5, 5.0))
    once = n4(image, mask)
    np.testing.assert_array_equal(once, n4(image, mask))
    scaled = nib.Nifti1Image(image.get_fdata(dtype=np.float32) * 1024, image.affine)
    np.testing.assert_allclose(n4(scaled, mask), once, atol=2e-3)


def test_what_ran_before_in_the_process_does_not_matter(monkeypatch):
    """A registration changes the number of threads of the ITK filters that follow."""
    monkeypatch.setattr(bias, "ITERATIONS", (5, 5))
    image, mask, _ = phantom((2.5, 2.5, 5.0))
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    fields = []
    for threads in (1, 2, 7):
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
        fields.append(n4(image, mask, threads=2))
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    np.testing.assert_array_equal(fields[0], fields[1])
    np.testing.assert_array_equal(fields[0], fields[2])


def test_bad_masks_are_refused():
    image, mask, _ = phantom((3.0, 3.0, 5.0))
    with pytest.raises(ShapeMismatchError, match="mask on the image's grid"):
        n4(image, mask[:-1])
    with pytest.raises(AnatomyError, match="Look at the mask"):
        n4(image, np.zeros(mask.shape))
    dark = nib.Nifti1Image(-np.ones(mask.shape, np.float32), image.affine)
    with pytest.raises(AnatomyError, match="99th percentile of -1"):
        n4(dark, mask)


def test_a_field_that_is_not_finite_is_an_error(monkeypatch):
    image, mask, _ = phantom((3.0, 3.0, 5.0))
    monkeypatch.setattr(bias, "ITERATIONS", (2,))

    def not_a_number(_, reference):
        return sitk.Cast(reference, sitk.sitkFloat32) * float("nan")

    monkeypatch.setattr(
        sitk.N4BiasFieldCorrectionImageFilter, "GetLogBiasFieldAsImage", not_a_number
    )
    with pytest.raises(DivergenceError, match="not finite"):
        n4(image, mask)
