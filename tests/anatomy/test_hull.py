# SPDX-License-Identifier: Apache-2.0
"""The extent of the brain: against the formula of an ellipsoid, and in the affine."""

import numpy as np

from brainprior_bids.anatomy.affine import corner_distance, fit_affine, mni305_centroids
from brainprior_bids.anatomy.hull import directions, supports, surface
from brainprior_bids.engine.grids import Grid

REFERENCE = mni305_centroids()


def ellipsoid(radii, shape=(90, 110, 90), mm=2.0):
    affine = np.diag([mm, mm, mm, 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) * mm / 2
    points = np.indices(shape).reshape(3, -1).T @ affine[:3, :3] + affine[:3, 3]
    return ((points / radii) ** 2).sum(1).reshape(shape) < 1, Grid(shape, affine)


def test_directions_are_mirror_images_in_pairs():
    towards = directions()
    half = len(towards) // 2
    np.testing.assert_allclose(np.linalg.norm(towards, axis=1), 1)
    np.testing.assert_allclose(towards[:half] * [-1, 1, 1], towards[half:])
    assert towards[:, 2].min() > -0.61


def test_the_reach_of_an_ellipsoid_is_that_of_the_formula():
    radii = np.array([65.0, 85.0, 60.0])
    points, cut = surface(*ellipsoid(radii))
    assert not cut.any()
    towards = directions()
    height, place, seen = supports(points, np.eye(4), towards, cut)
    exact = np.linalg.norm(towards * radii, axis=1)
    # the outermost 2 % of an ellipsoid's surface lie up to 4 % below its tip
    assert (height < exact + 1).all()
    assert (height > 0.95 * exact - 1).all()
    assert seen.all()
    np.testing.assert_allclose(np.einsum("nk,nk->n", place, towards), height)


def test_where_the_view_ends_nothing_is_said():
    mask, grid = ellipsoid((65, 85, 60))
    points, cut = surface(mask[:, :, :60], Grid((90, 110, 60), grid.affine))
    _, _, seen = supports(points, np.eye(4), directions(), cut)
    up = directions()[:, 2]
    assert not seen[up > 0.9].any()
    assert seen[up < -0.2].all()


def test_where_the_image_was_padded_nothing_is_said():
    mask, grid = ellipsoid((65, 85, 60))
    mask[:, :, 60:] = False
    empty = np.zeros(mask.shape, bool)
    empty[:, :, 60:] = True
    towards = directions()
    for unmeasured, messages in ((None, True), (empty, False)):
        points, cut = surface(mask, grid, unmeasured)
        _, _, seen = supports(points, np.eye(4), towards, cut)
        assert seen[towards[:, 2] > 0.9].all() == messages
        assert seen[towards[:, 2] < -0.2].all()


def table_of(to_scan):
    return [
        {
            "index": entry["index"],
            "name": name,
            "volume_mm3": entry["volume_mm3"],
            "confidence": 0.9,
            "centroid_mm": (to_scan @ [*entry["centroid_mm"], 1])[:3].tolist(),
        }
        for name, entry in REFERENCE["structures"].items()
    ]


def reference_surface():
    """Points whose support is the reference's: its planes' intersection, as a cloud."""
    towards, height = (
        np.array(REFERENCE["hull"]["directions"]),
        np.array(REFERENCE["hull"]["height_mm"]),
    )
    rng = np.random.default_rng(0)
    rays = rng.standard_normal((20000, 3))
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    reach = height / np.maximum(rays @ towards.T, 1e-3)
    return rays * reach.min(1)[:, None]


def test_the_hull_corrects_an_anisotropy_that_the_ridge_would_keep():
    to_scan = np.diag([0.92, 0.84, 0.88, 1.0])
    table = table_of(to_scan)
    points = reference_surface() @ to_scan[:3, :3].T
    here = {**REFERENCE, "hull": {**REFERENCE["hull"]}}
    here["hull"]["height_mm"] = supports(
        reference_surface(), np.eye(4), np.array(here["hull"]["directions"])
    )[0]
    truth = np.linalg.inv(to_scan)
    cut = np.zeros(len(points), bool)
    without = fit_affine(table, here)
    with_hull = fit_affine(table, here, surface=(points, cut))
    assert corner_distance(without.matrix, truth) > 1.5
    assert corner_distance(with_hull.matrix, truth) < 0.5
    assert with_hull.hull_residual_mm < 0.5
    # if hardly any structure is in view as a whole, only the centroids are used
    blind = fit_affine(table, here, surface=(points, ~cut))
    np.testing.assert_allclose(blind.matrix, without.matrix)
    assert blind.hull_residual_mm is None


def test_a_bulge_of_the_mask_pulls_little():
    table = table_of(np.eye(4))
    points = reference_surface()
    hull = {**REFERENCE["hull"]}
    hull["height_mm"] = supports(points, np.eye(4), np.array(hull["directions"]))[0]
    here = {**REFERENCE, "hull": hull}
    bulging = points.copy()
    near = np.linalg.norm(points - [60, 20, 0], axis=1) < 25
    bulging[near] *= 1.2
    fit = fit_affine(table, here, surface=(bulging, np.zeros(len(points), bool)))
    # a bulge of 12 mm, 50 mm wide: 3.5 mm measured
    assert corner_distance(fit.matrix, np.eye(4)) < 4.0


def test_cut_structures_do_not_enter_while_enough_are_whole():
    table = table_of(np.eye(4))
    for row in table[:2]:
        row["cut_share"] = 0.5
        row["centroid_mm"] = np.add(row["centroid_mm"], [0, 0, -15]).tolist()
    fit = fit_affine(table)
    assert not {table[0]["name"], table[1]["name"]} & set(fit.used)
    assert corner_distance(fit.matrix, np.eye(4)) < 1e-6
