# SPDX-License-Identifier: Apache-2.0
"""Corruptions that move the voxels of a head, and the resulting header."""

import nibabel as nib
import numpy as np
import pytest

from brainprior_bids.engine.errors import AnatomyError
from brainprior_bids.engine.weights import load_parcellation
from brainprior_bids.evaluation import harm

AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
AFFINE[:3, 3] = [-30, -40, -50]


def an_image():
    data = np.random.default_rng(0).normal(size=(20, 22, 24)).astype(np.float32)
    return nib.Nifti1Image(data, AFFINE)


@pytest.mark.parametrize("axes", ["LPS", "RSA", "SAL", "ASR"])
def test_a_false_header_turns_the_voxels(axes):
    """As nibabel reads the same voxels with a corresponding affine."""
    image = an_image()
    false = np.zeros((4, 4))
    false[3, 3] = 1
    for axis, (letter, mm) in enumerate(zip(axes, (2, 3, 4), strict=True)):
        row = ["RL", "AP", "SI"].index(next(p for p in ("RL", "AP", "SI") if letter in p))
        false[row, axis] = mm if letter in "RAS" else -mm
    expected = nib.as_closest_canonical(nib.Nifti1Image(image.get_fdata(), false))
    made = harm.mislabelled(image, np.ones(image.shape, bool), axes=axes)
    np.testing.assert_array_equal(made.get_fdata(), expected.get_fdata())
    np.testing.assert_allclose(made.header.get_zooms(), expected.header.get_zooms())
    assert made.get_fdata(dtype=np.float32).flags.c_contiguous  # as torch requires


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_turned_head_stays_where_it_is(axis):
    """Only the field of view moves: it is centred on the brain; a bright spot does not move."""
    image = an_image()
    place = np.indices(image.shape)
    spot = np.exp(-sum((p - c) ** 2 for p, c in zip(place, (12, 8, 14), strict=True)) / 8)
    image = nib.Nifti1Image(spot.astype(np.float32), AFFINE)
    brain = np.zeros(image.shape, bool)
    brain[8:13, 9:14, 10:15] = True
    made = harm.turned(image, brain, axis=axis, degrees=35)
    middle = made.affine @ [*(np.array(made.shape) - 1) / 2, 1]
    np.testing.assert_allclose(middle, AFFINE @ [10, 11, 12, 1], atol=1e-6)
    values = made.get_fdata()
    centre = [(p * values).sum() / values.sum() for p in np.indices(values.shape)]
    np.testing.assert_allclose(made.affine @ [*centre, 1], AFFINE @ [12, 8, 14, 1], atol=0.1)
    cosine = (made.affine[:3, :3] / np.diag(AFFINE)[:3])[axis - 1, axis - 1]
    assert cosine == pytest.approx(np.cos(np.deg2rad(35)))


def no_transform(*_):
    raise AnatomyError("affine: no plausible transform")


def test_a_scan_agrees_with_itself(demo_head, monkeypatch):
    """Steps and limits of the command on the demo's head; motion is measured."""
    image = nib.Nifti1Image(demo_head.scan.astype(np.float32), demo_head.scan_grid.affine)
    network = load_parcellation()
    facts, reference = harm.compare(image, network)
    assert facts["verdict"] == "pass", facts["reasons"]
    assert facts["dof"] == 12
    assert 0 < facts["slice_mismatch"] < 0.7
    again, _ = harm.compare(image, network, reference)
    assert again["dice"] == 1
    assert again["corner_mm"] == 0
    # the networks' output for an image without a brain depends on the processor's rounding
    monkeypatch.setattr(harm, "align_to_mni305", no_transform)
    refused, nothing = harm.compare(image, network, reference)
    assert (refused["verdict"], nothing) == ("fail", {})
    assert refused["error"] == "affine: no plausible transform"
    assert refused["volume_ml"] > 0  # measurements before the failure are kept
