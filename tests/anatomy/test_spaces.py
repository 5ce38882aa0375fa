# SPDX-License-Identifier: Apache-2.0
"""Resampling between grids, and ITK text files, against SimpleITK, antspyx and nitransforms."""

import errno
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from brainprior_bids.anatomy.spaces import (
    Kind,
    move,
    resample,
    resample_labels,
    write_itk_affine,
)
from brainprior_bids.engine.errors import GeometryError, ShapeMismatchError
from brainprior_bids.engine.grids import MNI305, Grid


def a_rotation(seed):
    """About 15 degrees around some axis."""
    q, _ = np.linalg.qr(np.eye(3) + 0.2 * np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.diag(q))


def an_affine(seed):
    """Rotation, scales of 10 %, shear, shifts of 20 mm."""
    rng = np.random.default_rng(seed)
    stretch = np.diag(rng.uniform(0.9, 1.1, 3)) + np.triu(rng.normal(0, 0.05, (3, 3)), 1)
    matrix = np.eye(4)
    matrix[:3, :3] = a_rotation(seed) @ stretch
    matrix[:3, 3] = rng.uniform(-20, 20, 3)
    return matrix


def smooth_blob(grid, centre=(3, -10, 15), width=18.0):
    points = grid.points_mm()
    distance = sum((p - c) ** 2 for p, c in zip(points, centre, strict=True))
    return (100 * np.exp(-distance / (2 * width**2))).astype(np.float32)


def scan_grid():
    affine = np.eye(4)
    affine[:3, :3] = a_rotation(5) @ np.diag((1.2, 1.1, 3.0))
    affine[:3, 3] = affine[:3, :3] @ (-60, -75, -28)
    return Grid((120, 150, 56), affine)


@pytest.mark.parametrize("seed", range(5))
def test_points_agree_with_antspyx_and_nitransforms(tmp_path, seed):
    import ants
    import nitransforms

    matrix = an_affine(seed)
    path = write_itk_affine(tmp_path / "from-T1w_to-MNI305_mode-image_xfm.txt", matrix)
    points = np.random.default_rng(seed).uniform(-120, 120, (20, 3))  # MNI305, RAS
    expected = (np.linalg.inv(matrix) @ np.c_[points, np.ones(20)].T)[:3].T  # T1w, RAS

    transform = ants.read_transform(str(path))
    to_lps = np.array((-1, -1, 1))
    by_ants = [to_lps * ants.apply_ants_transform_to_point(transform, p * to_lps) for p in points]
    np.testing.assert_allclose(by_ants, expected, atol=0.01)

    linear = nitransforms.linear.load(path, fmt="itk")
    np.testing.assert_allclose(linear.map(points), expected, atol=0.01)

    by_sitk = [to_lps * sitk.ReadTransform(str(path)).TransformPoint(p * to_lps) for p in points]
    np.testing.assert_allclose(by_sitk, expected, atol=1e-9)


def test_the_file_does_what_its_name_says_in_ants(tmp_path):
    """antsApplyTransforms with the file maps the T1w as to_mni305 does."""
    import ants

    grid, matrix = scan_grid(), an_affine(7)
    image = nib.Nifti1Image(smooth_blob(grid), np.array(grid.affine))
    path = write_itk_affine(tmp_path / "xfm.txt", matrix)
    nib.save(image, tmp_path / "T1w.nii")
    empty = np.zeros(MNI305.shape, np.float32)
    nib.save(nib.Nifti1Image(empty, np.array(MNI305.affine)), tmp_path / "ref.nii")
    moved = ants.apply_transforms(
        ants.image_read(str(tmp_path / "ref.nii")),
        ants.image_read(str(tmp_path / "T1w.nii")),
        [str(path)],
        interpolator="linear",
    )
    ours = move(image, MNI305, matrix, kind=Kind.SPREAD)
    inside = ours.get_fdata() > 5  # ants treats the outermost half voxel differently
    assert inside.sum() > 100_000
    np.testing.assert_allclose(ours.get_fdata()[inside], moved.numpy()[inside], atol=0.01)
    back = write_itk_affine(tmp_path / "inverse.txt", np.linalg.inv(matrix))
    both = sitk.CompositeTransform([sitk.ReadTransform(str(path)), sitk.ReadTransform(str(back))])
    np.testing.assert_allclose(both.TransformPoint((10.0, 20.0, 30.0)), (10, 20, 30), atol=1e-9)


def test_a_smooth_image_keeps_its_place_on_mni305():
    grid, matrix = scan_grid(), an_affine(3)
    image = nib.Nifti1Image(smooth_blob(grid), np.array(grid.affine))
    moved = move(image, MNI305, matrix)
    assert moved.shape == (181, 217, 181)
    np.testing.assert_array_equal(moved.affine, MNI305.affine)
    assert moved.get_data_dtype() == np.float32
    points = MNI305.points_mm(np.linalg.inv(matrix))
    expected = 100 * np.exp(
        -sum((p - c) ** 2 for p, c in zip(points, (3, -10, 15), strict=True)) / (2 * 18.0**2)
    )
    inverse = np.linalg.inv(grid.affine)
    voxel = np.tensordot(inverse[:3, :3], points, 1) + inverse[:3, 3, None, None, None]
    limit = np.array(grid.shape)[:, None, None, None] - 3
    inside = ((voxel > 2) & (voxel < limit)).all(0)
    assert np.abs(moved.get_fdata() - expected)[inside].max() < 0.05


def test_cubic_does_not_fall_below_zero():
    grid = Grid((20, 20, 20), np.eye(4))
    step = np.zeros(grid.shape, np.float32)
    step[8:] = 10
    shifted = np.eye(4)
    shifted[0, 3] = 0.4
    moved = resample(step, grid, grid, matrix=shifted)
    assert moved.min() == 0
    assert 10 < moved.max() < 11.5
    assert resample(step - 3, grid, grid, matrix=shifted).min() == -3
    labels = resample(step, grid, grid, matrix=shifted, order=0)
    assert set(np.unique(labels)) == {0, 10}
    np.testing.assert_allclose(resample(step, grid, grid), step, atol=1e-5)


def test_outside_the_source_is_zero():
    grid = Grid((10, 10, 10), np.eye(4))
    far = np.eye(4)
    far[:3, 3] = 50
    assert not resample(np.ones(grid.shape), grid, grid, matrix=far).any()


@pytest.mark.parametrize(
    "matrix", [np.zeros((4, 4)), np.eye(3), np.full((4, 4), np.nan), np.eye(4)[[0, 1, 3, 2]]]
)
def test_what_is_no_affine_is_refused(tmp_path, matrix):
    with pytest.raises(GeometryError, match="invertible 4 x 4 affine"):
        write_itk_affine(tmp_path / "xfm.txt", matrix)
    assert not list(tmp_path.iterdir())


def test_labels_go_where_most_of_the_weight_is():
    """Against a loop over the labels; an oblique affine, so that no weight is a tie."""
    rng = np.random.default_rng(2)
    grid, other = Grid((9, 8, 7), np.eye(4)), Grid((10, 9, 8), np.eye(4))
    labels = rng.integers(0, 4, grid.shape) * 17
    matrix = an_affine(1) @ np.diag([0.9, 1.1, 1, 1])
    matrix[:3, 3] = (0.3, -0.4, 0.2)
    shares = [resample(labels == v, grid, other, matrix=matrix, order=1) for v in range(0, 68, 17)]
    shares[0] = 1 - sum(shares[1:])  # outside there is no label either
    expected = 17 * np.argmax(shares, axis=0)
    assert len(np.unique(expected)) == 4
    np.testing.assert_array_equal(resample_labels(labels, grid, other, matrix=matrix), expected)


def test_mask_and_spread_keep_their_kind():
    grid = scan_grid()
    points = grid.points_mm()
    ball = (sum((p - c) ** 2 for p, c in zip(points, (0, -20, 10), strict=True)) < 40**2) * 1.0
    image = nib.Nifti1Image(ball.astype(np.float32), grid.affine)
    mask = move(image, MNI305, an_affine(3), kind=Kind.MASK)
    labels = move(image, MNI305, an_affine(3), kind=Kind.LABELS)
    spread = move(image, MNI305, an_affine(3), kind=Kind.SPREAD).get_fdata()
    assert (mask.get_data_dtype(), labels.get_data_dtype()) == (np.uint8, np.int16)
    np.testing.assert_array_equal(np.asarray(mask.dataobj) > 0, spread > 0)
    assert (mask.get_fdata() != labels.get_fdata()).sum() < 10  # ties on the border
    assert spread.max() <= 1 + 1e-6


def test_data_on_another_grid_are_refused():
    grid = Grid((10, 10, 10), np.eye(4))
    with pytest.raises(ShapeMismatchError, match="expected data on its grid"):
        resample(np.ones((10, 10, 9)), grid, grid)


def test_a_skull_stripped_image_stays_so():
    """There is no ringing from the edge of a mask into the background."""
    grid = scan_grid()
    points = grid.points_mm()
    ball = (sum((p - c) ** 2 for p, c in zip(points, (0, -20, 10), strict=True)) < 40**2) * 80.0
    ball = ball.astype(np.float32)
    moved = move(nib.Nifti1Image(ball, grid.affine), MNI305, an_affine(3)).get_fdata()
    plain = resample(ball, grid, MNI305, matrix=an_affine(3))
    assert (plain != 0).sum() > 2 * (moved != 0).sum()  # what the spline alone leaves
    volume = (ball > 0).sum() * abs(np.linalg.det(an_affine(3) @ grid.affine))
    assert (moved != 0).sum() == pytest.approx(volume, rel=0.02)


def test_a_full_disk_leaves_no_transform(tmp_path):
    """ITK reports no error and writes an empty file."""
    code = f"""
import resource, signal
import numpy as np
from brainprior_bids.anatomy.spaces import write_itk_affine
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    write_itk_affine({str(tmp_path / "xfm.txt")!r}, np.eye(4))
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
