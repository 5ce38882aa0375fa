# SPDX-License-Identifier: Apache-2.0
"""Interpolated images are recognised, and reduced to the measured voxels."""

import nibabel as nib
import numpy as np
import pytest
from scipy import fft, ndimage

from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.lesion import read_lesion
from brainprior_bids.anatomy.resolution import find_resolution, reduce_to_measured
from brainprior_bids.engine.errors import GeometryError, UsageError
from brainprior_bids.engine.grids import Grid

SHAPE = (100, 110, 100)


def brain(seed=0, shape=SHAPE):
    """An ellipsoid with anatomy of all sizes (power falls with the cube of the frequency)."""
    rng = np.random.default_rng(seed)
    frequency = np.sqrt(sum(f**2 for f in np.meshgrid(*(fft.fftfreq(n) for n in shape),
                                                      indexing="ij")))  # fmt: skip
    texture = fft.ifftn(fft.fftn(rng.normal(size=shape)) / (0.02 + frequency) ** 1.5).real
    at = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = sum((a / 0.9) ** 2 for a in at) < 1
    return np.where(inside, 500 + 100 * texture / texture.std(), 0).astype(np.float32)


def thick(image, axis, factor, noise=8.0, seed=1):
    """Block means with noise."""
    moved = np.moveaxis(image, axis, 0)
    means = moved.reshape(len(moved) // factor, factor, *moved.shape[1:]).mean(1)
    means += noise * np.random.default_rng(seed).normal(size=means.shape) * (means > 0)
    return np.moveaxis(means, 0, axis)


def interpolated(image, axis, factor, how):
    """The image with ``factor`` times as many voxels along an axis, edges in common."""
    if how == "zero-filled":
        n = image.shape[axis]
        spectrum = fft.dct(image, axis=axis, norm="ortho")
        spectrum = np.concatenate([spectrum, 0 * np.repeat(spectrum, factor - 1, axis)], axis)
        return fft.idct(spectrum, axis=axis, norm="ortho") * np.sqrt(factor) + 0 * n
    zoom = [factor if a == axis else 1 for a in range(3)]
    order = {"linear": 1, "cubic": 3}[how]
    return ndimage.zoom(image, zoom, order=order, grid_mode=True, mode="nearest")


def grid_of(image, spacing=(1.0, 1.0, 1.0)):
    return Grid(image.shape, np.diag([*spacing, 1.0]))


@pytest.mark.parametrize("how", ["linear", "cubic", "zero-filled"])
@pytest.mark.parametrize(("axis", "factor"), [(2, 5), (0, 4), (1, 5)])
def test_interpolated_slices_are_recognised(how, axis, factor):
    image = interpolated(thick(brain(), axis, factor), axis, factor, how).astype(np.float32)
    result = find_resolution(image, grid_of(image), "auto")
    assert result.measured_mm[axis] == pytest.approx(factor, rel=0.1)
    assert [result.measured_mm[a] for a in range(3) if a != axis] == [1, 1]
    assert result.used_mm == result.measured_mm
    assert result.source == "measured"


@pytest.mark.parametrize("step", [0.0, 1.0])
def test_zero_filling_in_both_directions_of_a_plane_is_recognised(step):
    """As scanners deliver 512 x 512 of 256 x 256, with thick slices, rounded or not."""
    image = thick(thick(thick(brain(), 0, 2), 1, 2), 2, 5)
    for axis in (0, 1):
        image = interpolated(image, axis, 4, "zero-filled")
    image = np.round(image / step) * step if step else image
    result = find_resolution(image.astype(np.float32), grid_of(image, (0.5, 0.5, 5)), "auto",
                            step=step)  # fmt: skip
    assert result.measured_mm[:2] == pytest.approx((2, 2), rel=0.15)
    assert result.measured_mm[2] == 5


@pytest.mark.parametrize("noise", [0.5, 4.0, 25.0])
@pytest.mark.parametrize("factors", [(1, 1, 1), (1, 1, 5), (2, 1, 1)])
def test_measured_images_are_left_alone(noise, factors):
    image = brain()
    for axis, factor in enumerate(factors):
        image = thick(image, axis, factor, noise=noise)
    result = find_resolution(image.astype(np.float32), grid_of(image, factors), "auto", step=1.0)
    assert result.measured_mm == result.used_mm == result.stored_mm


def test_twofold_interpolation_is_reported_and_used_as_it_is():
    image = interpolated(thick(brain(), 2, 2), 2, 2, "zero-filled").astype(np.float32)
    result = find_resolution(image, grid_of(image), "auto")
    assert result.measured_mm[2] == pytest.approx(2, rel=0.15)
    assert result.used_mm == (1, 1, 1)
    assert result.factor > 1.4


def test_what_is_asked_for_is_done():
    image = brain()
    grid = grid_of(image)
    assert find_resolution(image, grid, "off").used_mm == (1, 1, 1)
    asked = find_resolution(image, grid, (0.0, 0.5, 5.0))
    assert (asked.used_mm, asked.source) == ((1, 1, 5), "option")
    with pytest.raises(UsageError, match=r"at least 4 voxels .* Give smaller"):
        find_resolution(image, grid, (0.0, 0.0, 40.0))


@pytest.mark.parametrize("how", ["linear", "cubic", "zero-filled"])
def test_the_reduced_image_is_the_measured_one(how):
    """Equal up to rounding; the grid has the same edges."""
    slices = thick(brain(), 2, 5).astype(np.float32)
    image = interpolated(slices, 2, 5, how).astype(np.float32)
    affine = np.array([[0, 0, 1.0, -20], [0.8, 0, 0, 5], [0, 1.2, 0, 7], [0, 0, 0, 1]])
    stored = Grid(image.shape, affine)
    resolution = find_resolution(image, stored, "auto")
    assert resolution.used_mm == pytest.approx((0.8, 1.2, 5.0))
    assert resolution.interpolant == (False, False, how != "zero-filled")
    reduced, grid = reduce_to_measured(image, stored, resolution)
    np.testing.assert_allclose(reduced, slices, atol=5e-3)
    first, last = np.eye(4) @ [-0.5, -0.5, -0.5, 1], [*(np.array(slices.shape) - 0.5), 1]
    np.testing.assert_allclose(grid.affine @ first, affine @ first, atol=1e-5)
    np.testing.assert_allclose(
        grid.affine @ last, affine @ [*(np.array(SHAPE) - 0.5), 1], atol=1e-4
    )


def asked_for(image, size):
    return find_resolution(image, grid_of(image), (0.0, 0.0, size))


def test_a_flat_image_stays_flat_and_a_ramp_does_not_wrap():
    ramp = np.broadcast_to(np.arange(100, dtype=np.float32), (8, 9, 100))
    reduced, _ = reduce_to_measured(np.array(ramp), grid_of(ramp), asked_for(ramp, 5.0))
    assert np.abs(reduced[0, 0] - (np.arange(20) * 5 + 2)).max() < 2  # 100 if it did
    flat = np.full((8, 9, 100), 7, np.float32)
    flat, _ = reduce_to_measured(flat, grid_of(ramp), asked_for(ramp, 3.0))
    np.testing.assert_allclose(flat, 7, rtol=1e-5)


@pytest.fixture
def scan(tmp_path):
    """Slices of 5 mm as voxels of 1 mm, stored as integers."""
    image = interpolated(thick(brain(), 2, 5), 2, 5, "cubic")
    path = tmp_path / "sub-01_T1w.nii.gz"
    nib.save(nib.Nifti1Image(np.round(image).clip(0).astype(np.int16), np.eye(4)), path)
    return path


def test_conform_reduces_the_scan_says_so_and_takes_the_slices_from_it(scan):
    conformed = conform(scan, metadata={"SliceThickness": 5})
    size = conformed.grid.spacing_mm[2]
    assert size == 5  # the exact value is in the sidecar
    assert (conformed.acquisition.slice_axis, conformed.acquisition.thickness_mm) == (2, 5)
    assert conformed.acquisition.spacing_mm == size
    (text,) = conformed.warnings
    assert "interpolated from about 1 × 1 × 5 mm" in text
    assert "--effective-resolution off" in text
    off = conform(scan, metadata={"SliceThickness": 5}, effective_resolution="off")
    assert off.grid.shape == SHAPE
    assert off.facts["resolution"]["source"] == "off"
    given = conform(scan, metadata={}, effective_resolution=(0.0, 0.0, 5.0))
    assert given.grid.shape == (100, 110, 20)
    assert "--effective-resolution asks" in given.warnings[0]


def test_options_that_contradict_the_scan_or_each_other_are_warned_of(scan):
    finer = conform(scan, metadata={}, effective_resolution=(1.0, 0.5, 0.0))
    assert finer.grid.shape == SHAPE
    assert any("so that it changes nothing" in text for text in finer.warnings)
    other = conform(scan, metadata={}, effective_resolution=(0.0, 0.0, 5.0), slice_axis=0)
    assert other.acquisition.slice_axis == 0
    assert any("given as sagittal, but the voxels are largest" in t for t in other.warnings)
    thick = conform(scan, metadata={}, effective_resolution="off", slice_thickness_mm=5.0)
    assert any("more than three times the slice spacing" in text for text in thick.warnings)


def test_a_lesion_drawn_on_the_stored_scan_hides_what_it_touches(scan, tmp_path):
    grid = conform(scan, metadata={}, effective_resolution=(0.0, 0.0, 5.0)).grid
    lesion = np.zeros(SHAPE, np.uint8)
    lesion[40:50, 50:60, 43:46] = 1
    nib.save(nib.Nifti1Image(lesion, np.eye(4)), tmp_path / "lesion.nii.gz")
    hidden = read_lesion(tmp_path / "lesion.nii.gz", grid)
    assert hidden.shape == (100, 110, 20)
    assert list(np.flatnonzero(hidden.any((0, 1)))) == [8, 9]
    assert hidden[40:50, 50:60, 8:10].all()
    assert hidden.sum() == 200
    moved = np.eye(4)
    moved[2, 3] = 2
    nib.save(nib.Nifti1Image(lesion, moved), tmp_path / "moved.nii.gz")
    with pytest.raises(GeometryError, match="2 mm apart"):
        read_lesion(tmp_path / "moved.nii.gz", grid)
    coarse = Grid(grid.shape, np.diag([1, 1, 5.0, 1]))
    with pytest.raises(GeometryError, match="not on the scan's grid"):
        read_lesion(tmp_path / "lesion.nii.gz", Grid((100, 110, 200), coarse.affine))
