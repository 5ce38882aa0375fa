# SPDX-License-Identifier: Apache-2.0
"""Deriving the MNI305 centroids: transforms and their inverses, averages, a known registration."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.rescue import to_ants, transform_matrix, write_transform
from brainprior_bids.training.centroids import (
    average,
    average_hull,
    corner_error,
    label_table,
    register,
)


def pose(degrees=6.0, shift=(4.0, -3.0, 2.0)):
    matrix = np.eye(4)
    turn = Rotation.from_euler("xyz", [degrees, -degrees / 2, degrees], degrees=True)
    matrix[:3, :3] = turn.as_matrix() * 1.05
    matrix[:3, 3] = shift
    return matrix


def test_a_transform_file_comes_back(tmp_path):
    write_transform(tmp_path / "x.mat", pose())
    np.testing.assert_allclose(transform_matrix(str(tmp_path / "x.mat")), pose(), atol=1e-6)


def test_the_table_of_a_label_map_has_mm_and_merges_small_parts():
    labels = np.zeros((20, 20, 20), np.int16)
    labels[2:6, 4:8, 10:14] = 10
    labels[6, 4:8, 10:14] = 25  # a lesion counts as white matter
    affine = np.diag([2.0, 1.0, 1.5, 1.0])
    affine[:3, 3] = [-10, 5, 0]
    rows = {row["index"]: row for row in label_table(labels, affine)}
    assert set(rows) == {10, 2}
    np.testing.assert_allclose(rows[10]["centroid_mm"], [-10 + 7, 5 + 5.5, 1.5 * 11.5])
    assert rows[10]["volume_mm3"] == pytest.approx(64 * 3)
    assert rows[2]["name"] == "Left-Cerebral-White-Matter"


def test_the_average_is_symmetric_and_carries_the_spread():
    def row(index, point):
        return {"index": index, "name": "", "volume_mm3": 10.0, "centroid_mm": point}

    tables = [[row(10, [-12, 1, 5]), row(49, [10, 1, 5])], [row(10, [-14, 3, 5])]]
    result = average(tables, [np.eye(4), np.eye(4)])
    left, right = result["Left-Thalamus"], result["Right-Thalamus"]
    np.testing.assert_allclose(left["centroid_mm"], [-12, 5 / 3, 5], atol=1e-3)
    np.testing.assert_allclose(right["centroid_mm"], [12, 5 / 3, 5], atol=1e-3)
    np.testing.assert_allclose(left["sd_mm"], [2, np.std([1, 1, 3], ddof=1), 0], atol=1e-3)


def test_the_average_hull_is_that_of_its_parts_and_symmetric():
    rays = np.random.default_rng(0).standard_normal((5000, 3))
    ball = 70 * rays / np.linalg.norm(rays, axis=1, keepdims=True)
    surfaces = [(ball, None), (np.add(ball, [4, 0, 0]), None)]
    hull = average_hull(surfaces, [np.eye(4), np.eye(4)])
    towards, height = np.array(hull["directions"]), np.array(hull["height_mm"])
    half = len(towards) // 2
    np.testing.assert_allclose(height[:half], height[half:], atol=1e-3)
    np.testing.assert_allclose(height, 70, atol=2)  # the outermost 2 % of a ball: 1.4 mm lower


def test_registration_finds_a_known_pose():
    rng = np.random.default_rng(0)
    blobs = ndimage.gaussian_filter(rng.normal(size=(48, 56, 48)), 4)
    i, j, k = np.indices(blobs.shape)
    ball = ((i - 24) / 18) ** 2 + ((j - 28) / 22) ** 2 + ((k - 24) / 18) ** 2 < 1
    fixed = ndimage.gaussian_filter((100 + 800 * blobs) * ball, 1)
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = [-96, -112, -96]
    # moving(x) = fixed(pose x)
    index = np.linalg.inv(affine) @ pose() @ affine
    moving = ndimage.affine_transform(fixed, index[:3, :3], index[:3, 3], order=1)
    result = register(to_ants(fixed, affine), to_ants(moving, affine))
    table = [{"centroid_mm": [0.0, 0.0, 0.0]}]
    assert corner_error(np.eye(4), pose(), table) > 10
    assert corner_error(result, pose(), table) < 4  # one voxel
