# SPDX-License-Identifier: Apache-2.0
"""A scan restored from Python in one call."""

import nibabel as nib
import numpy as np
import pytest
import torch

from brainprior_bids.engine.denoiser import ErrorSpectrum, Precondition, Prior
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.unet import UNet
from brainprior_bids.evaluation import demo
from brainprior_bids.scan import restore_scan


def test_a_nibabel_image_is_restored_in_its_own_frame(tmp_path):
    """With a network that answers 0; the brain is found by the embedded parcellation."""
    made = demo.make_demo()
    prior = Prior(
        Precondition(UNet((4, 4), (1, 1)), torch.full((8,), 0.3)),
        spectra={"unknown": ErrorSpectrum.isotropic(0.3)},
        metadata={},
    )
    image = nib.Nifti1Image(made.scan.astype(np.float32), made.scan_grid.affine)
    found = restore_scan(
        image,
        contrast="T1w",
        prior=prior,
        n_samples=1,
        n_steps=2,
    )
    assert found.grid == made.grid
    inside = found.mean > 0
    both = inside & made.brain
    assert 2 * both.sum() / (inside.sum() + made.brain.sum()) > 0.95
    assert np.corrcoef(found.mean[both], made.truth[both])[0, 1] > 0.8
    assert any("no SliceThickness" in said for said in found.warnings)
    with pytest.raises(InputError, match=r"missing\.nii"):
        restore_scan(tmp_path / "missing.nii.gz", contrast="T1w")
