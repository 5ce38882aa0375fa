# SPDX-License-Identifier: Apache-2.0
"""The remaining contrast of a lesion, under a prior in closed form."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from brainprior_bids.anatomy.affine import AffineFit
from brainprior_bids.anatomy.bias import BiasField
from brainprior_bids.anatomy.conform import Conformed
from brainprior_bids.anatomy.parcellation import Parcellation
from brainprior_bids.anatomy.prepare import Prepared
from brainprior_bids.cli.run import main
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.observation import Observation
from brainprior_bids.evaluation import lesions
from brainprior_bids.evaluation.lesions import LesionCase, contrast_kept

LEVEL = 80 / (80 + 2.326)
"""The tissue in the engine's unit: 80 with noise of SD 1, whose 99th percentile is 1."""


class Flat:
    """White prior of variance ``power`` about the tissue's level."""

    def __init__(self, power):
        self.power = power

    def spectrum(self, contrast):
        return self

    def variance(self, sigma, frequency):
        v = sigma**2 * self.power / (sigma**2 + self.power)
        return torch.full_like(frequency, v)

    def denoise(self, x, sigma, *, coordinates, contrast):
        gain = self.power / (self.power + sigma**2)
        return LEVEL + gain * (x - LEVEL)


def case(thick=1, interleave_motion=None):
    shape = (24, 24, 24 // thick)
    affine = np.diag([1.0, 1.0, thick, 1.0])
    affine[:3, 3] = [-11.5, -11.5, -12 + thick / 2]
    grid = Grid(shape, affine)
    rng = np.random.default_rng(0)
    scan = (100 * (0.8 + 0.01 * rng.standard_normal(shape))).astype(np.float32)
    acquisition = Acquisition(2, float(thick), float(thick), "boxcar")
    return LesionCase(
        Observation(scan, grid, acquisition, np.ones(shape), interleave_motion=interleave_motion),
        np.ones((24, 24, 24), np.float32), np.eye(4), "T1w", np.ones((24, 24, 24)),
    )  # fmt: skip


def kept(power, thick=1, noise=0.01):
    return contrast_kept(
        case(thick), Flat(power), centre_mm=np.zeros(3), sizes_mm=[8.0], contrasts=[-0.3],
        n_samples=1, n_steps=8, noise_sd=noise,
    )[0]  # fmt: skip


def test_a_white_prior_keeps_what_wiener_keeps():
    """The fraction ``P / (P + s^2)`` of any change, P the prior's variance and s the noise."""
    for power in (1e-2, 1e-4):
        found = kept(power)
        assert found.restored == pytest.approx(power / (power + 1e-4), abs=0.02)
        assert found.interpolated == pytest.approx(1, abs=0.02)


def test_thick_slices_dilute():
    found = kept(1e-2, thick=4)
    assert 0.6 < found.interpolated < 0.95


def test_a_crop_stays_where_it_is():
    whole = case(4)
    for centre in (0.0, 4.0):
        part = whole.crop(np.array([1.0, 2.0, centre]), 12)
        cut, grid = part.observation, whole.observation.grid
        assert part.mask_1mm.shape == part.depth_mm.shape == cut.grid.one_millimetre().shape
        at = np.round(np.linalg.inv(grid.affine) @ cut.grid.affine @ (0, 0, 0, 1)).astype(int)
        assert cut.scan[0, 0, 0] == whole.observation.scan[tuple(at[:3])]
        assert at[2] % 2 == 0  # even slices remain even


def test_displaced_slices_show_a_lesion_displaced():
    """The brain is halfway: 3 mm to the left of where the even slices show it."""
    motion = np.eye(4)
    motion[0, 3] = 6.0
    one = case(2, [np.eye(4), motion])
    share = one.share(np.zeros(3), 4.0)
    across = np.arange(24) - 11.5
    middle = [np.average(across, weights=share[..., k].sum(1)) for k in (5, 6)]
    assert middle == pytest.approx([-3.0, 3.0], abs=1e-6)
    still = case(2).share(np.zeros(3), 4.0)
    assert share.sum() == pytest.approx(still.sum(), rel=0.05)


def test_a_lesion_outside_the_brain_is_refused(capsys):
    with pytest.raises(InputError, match="not entirely inside the brain"):
        contrast_kept(
            case(), Flat(1.0), centre_mm=np.full(3, 50.0), sizes_mm=[8.0], contrasts=[1.0],
            n_samples=1, n_steps=2,
        )  # fmt: skip
    assert main(["check-lesion", "/nonexistent/scan.nii"]) == 2
    assert "is not a file" in capsys.readouterr().err


def test_weights_go_by_file_or_name_and_a_broken_sidecar_is_refused(tmp_path, capsys):
    (tmp_path / "scan.nii.gz").touch()
    (tmp_path / "scan.json").write_text("SliceThickness: 5")
    command = ["check-lesion", str(tmp_path / "scan.nii.gz"), "--device", "cpu"]
    assert main([*command, "--prior", "nowhere"]) == 2
    assert "expected a weights file, or one of the names" in capsys.readouterr().err
    assert main([*command, "--prior", "embedded"]) == 2
    assert "scan.json cannot be read" in capsys.readouterr().err


def test_a_scan_is_prepared_as_by_the_command(tmp_path, monkeypatch):
    """With the sidecar's metadata; its warnings are returned."""
    part = case(4)
    white = np.zeros((24, 24, 24), np.int16)
    white[8:17, 8:17, 8:17] = 41
    given = part.observation
    mask = given.mask.numpy()
    brain = Parcellation(white, part.mask_1mm.astype(np.uint8), mask, [], ["Look at it."])
    image = nib.Nifti1Image(given.scan.numpy(), given.grid.affine)
    conformed = Conformed(image, given.acquisition, {})
    fit = AffineFit(np.eye(4), 12, {}, 0.0, [])

    def prepare(path, *, metadata, slice_thickness_mm):
        assert (path.name, metadata, slice_thickness_mm) == (
            "scan.nii.gz", {"SliceThickness": 4}, 3.0
        )  # fmt: skip
        return Prepared(conformed, brain, None, BiasField(given.log_bias.numpy(), None, []), fit)

    monkeypatch.setattr(lesions, "prepare", prepare)
    (tmp_path / "scan.json").write_text('{"SliceThickness": 4}')
    path = tmp_path / "scan.nii.gz"
    made, warnings = lesions.prepare_case(path, contrast="T2w", thickness_mm=3.0)
    assert warnings == ["Look at it."]
    assert made.depth_mm.max() == made.depth_mm[12, 12, 12] == 5
    assert made.deepest_mm().tolist() == [0.5, 0.5, 0.5]
    assert made.contrast == "T2w"
    np.testing.assert_array_equal(made.observation.scan, given.scan)
    np.testing.assert_array_equal(made.to_mni305, np.eye(4))
