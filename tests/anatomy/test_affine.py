# SPDX-License-Identifier: Apache-2.0
"""The centroid affine recovers known poses and ignores wrong structures."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy import affine
from brainprior_bids.anatomy.affine import fit_affine, mni305_centroids, similarity
from brainprior_bids.anatomy.parcellation import mirrored, structure_names
from brainprior_bids.engine.errors import AnatomyError

STRUCTURES = mni305_centroids()["structures"]


def make_table(to_scan, names=None, noise_mm=0.0, seed=0):
    """Structures of a scan with the MNI305-to-scan transform ``to_scan``."""
    rng = np.random.default_rng(seed)
    table = []
    for name in names or STRUCTURES:
        entry = STRUCTURES[name]
        point = (to_scan @ [*entry["centroid_mm"], 1])[:3] + noise_mm * rng.standard_normal(3)
        table.append(
            {
                "index": entry["index"],
                "name": name,
                "volume_mm3": entry["volume_mm3"] * 0.8,
                "confidence": 0.9,
                "centroid_mm": point.tolist(),
            }
        )
    return table


def pose(seed, scales=(0.9, 0.9, 0.9)):
    rng = np.random.default_rng(seed)
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", rng.uniform(-25, 25, 3), degrees=True).as_matrix()
    matrix[:3, :3] = matrix[:3, :3] @ np.diag(scales)
    matrix[:3, 3] = rng.uniform(-60, 60, 3)
    return matrix


def corner_error(found, true_to_scan):
    """Largest distance in MNI305 mm over the corners of the brain's box."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * [140, 180, 140] - [70, 110, 60]
    points = np.c_[corners, np.ones(8)]
    back = points @ (found @ true_to_scan).T
    return np.linalg.norm((back - points)[:, :3], axis=1).max()


@pytest.mark.parametrize("seed", range(5))
def test_a_similarity_comes_back_exactly(seed):
    true = pose(seed)
    fit = fit_affine(make_table(true))
    assert fit.dof == 12
    assert corner_error(fit.matrix, true) < 1e-6
    assert fit.median_residual_mm < 1e-6
    assert not fit.warnings


@pytest.mark.parametrize("seed", range(5))
def test_unequal_scales_come_back_nearly(seed):
    # the ridge reduces a 4 % anisotropy, which is 3.6 mm at a 90 mm corner
    true = pose(seed, scales=(0.88, 0.92, 0.90))
    fit = fit_affine(make_table(true))
    assert corner_error(fit.matrix, true) < 3.6


@pytest.mark.parametrize("seed", range(3))
def test_three_wrong_structures_do_not_matter(seed):
    true = pose(seed)
    table = make_table(true, noise_mm=0.5, seed=seed)
    without = fit_affine(table)
    for row, shift in zip(table[4:19:7], ((40, 0, 0), (0, -55, 20), (-30, 30, 30)), strict=True):
        row["centroid_mm"] = (np.array(row["centroid_mm"]) + shift).tolist()
    fit = fit_affine(table)
    assert corner_error(fit.matrix, true) < corner_error(without.matrix, true) + 1.5
    assert max(fit.residuals_mm.values()) > 25  # and they are reported


def test_few_structures_fall_to_seven_and_six_degrees():
    true = pose(1, scales=(0.95, 0.95, 0.95))
    names = ["Left-Thalamus", "Right-Thalamus", "Brain-Stem", "Left-Caudate", "Right-Hippocampus"]
    fit = fit_affine(make_table(true, names))
    assert fit.dof == 7
    assert corner_error(fit.matrix, true) < 1e-6
    rigid = pose(2, scales=(1, 1, 1))
    fit = fit_affine(make_table(rigid, names[:3]))
    assert fit.dof == 6
    assert corner_error(fit.matrix, rigid) < 1e-6
    assert any("6 degrees" in warning for warning in fit.warnings)


def test_too_few_structures():
    table = make_table(pose(0), ["Left-Thalamus", "Right-Thalamus"])
    with pytest.raises(AnatomyError, match="at least 3 structures"):
        fit_affine(table)


def test_doubtful_structures_and_fragments_do_not_enter():
    table = make_table(pose(0))
    table[0]["confidence"] = 0.1
    table[1]["volume_mm3"] *= 0.1
    fit = fit_affine(table)
    assert not {table[0]["name"], table[1]["name"]} & set(fit.used)
    assert len(fit.used) == len(table) - 2


def test_structures_in_the_wrong_places_are_refused():
    table = make_table(np.eye(4))
    rng = np.random.default_rng(0)
    for row in table:
        row["centroid_mm"] = rng.uniform(-80, 80, 3).tolist()
    with pytest.raises(AnatomyError, match="no plausible transform"):
        fit_affine(table)


def test_a_mirrored_head_is_refused_or_far_off():
    # a header with left and right exchanged: the sides match no rotation
    table = make_table(np.diag([-1.0, 1.0, 1.0, 1.0]))
    with pytest.raises(AnatomyError):
        fit_affine(table)


def test_a_head_of_half_the_size_is_refused():
    with pytest.raises(AnatomyError, match="scale"):
        fit_affine(make_table(np.diag([0.5, 0.5, 0.5, 1.0])))


def test_similarity_against_the_closed_form_of_scipy():
    rng = np.random.default_rng(3)
    x, y, w = rng.normal(size=(20, 3)), rng.normal(size=(20, 3)), rng.uniform(0.1, 1, 20)
    result = similarity(x, y, w, scale=False)
    xc, yc = x - w @ x / w.sum(), y - w @ y / w.sum()
    expected, _ = Rotation.align_vectors(yc, xc, weights=w)
    np.testing.assert_allclose(result[:3, :3], expected.as_matrix(), atol=1e-8)


def test_the_shipped_centroids_are_symmetric_and_right_handed():
    names = structure_names()
    for name, entry in STRUCTURES.items():
        partner = STRUCTURES[names[mirrored(entry["index"])]]
        np.testing.assert_allclose(
            entry["centroid_mm"], np.array(partner["centroid_mm"]) * [-1, 1, 1], atol=2e-3
        )
        if name.startswith("Left-"):
            assert entry["centroid_mm"][0] < 0
    assert STRUCTURES["Brain-Stem"]["centroid_mm"][2] < -15
    assert STRUCTURES["Left-Cerebellum-Cortex"]["centroid_mm"][1] < -50
    assert affine.NEEDED[12] < len(STRUCTURES)
