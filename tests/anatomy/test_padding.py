# SPDX-License-Identifier: Apache-2.0
"""The shipped network segments a cut and padded head like the same cut without padding."""

import nibabel as nib
import numpy as np
import pytest

from brainprior_bids.anatomy.prepare import prepare

META = {"SliceThickness": 5.0, "SpacingBetweenSlices": 5.0}


def ready(data, affine):
    image = nib.Nifti1Image(np.asarray(data, np.float32), affine)
    return prepare(image, metadata=META, unbias=False)


@pytest.fixture(scope="module")
def whole(demo_head):
    return ready(demo_head.scan, demo_head.scan_grid.affine)


def test_a_padded_head_is_aligned_as_the_whole_one(demo_head, whole):
    """Earlier, the cut surface was fitted to the top of the brain: error 3.5 mm, 10.7 at most."""
    assert not [text for text in whole.warnings if "cuts" in text]
    data = np.array(demo_head.scan)
    data[:, :, 27:] = 0
    padded = ready(data, demo_head.scan_grid.affine)
    assert [text for text in padded.warnings if "cuts through the brain" in text]
    grid = whole.grid.one_millimetre()
    inside = np.c_[np.argwhere(whole.mask_1mm > 0), np.ones(int((whole.mask_1mm > 0).sum()))]
    apart = (padded.to_mni305 - whole.to_mni305) @ grid.affine @ inside.T
    off = np.linalg.norm(apart[:3], axis=0)
    assert off.mean() < 1.0  # measured: 0.3 mm, 0.7 at most; cropped instead: 0.4 and 0.7
    assert off.max() < 2.0
