# SPDX-License-Identifier: Apache-2.0
"""The affine to MNI305 from the centroids of structures.

Symbols: x_s, a structure's centroid in the scan (scanner RAS mm); y_s, its mean centroid in
MNI305 (``data/mni305_centroids.json``); d_s, the SD of that centroid over participants; w_s, its
weight.

    w_s = confidence_s^2 / (d_s + 3 mm)^2 * min(volume_s / mean volume_s, 1)

A weighted similarity (7 degrees of freedom, Umeyama) is fitted first, then the full affine (12) by
weighted least squares with a ridge that pulls its linear part towards the similarity, because
centroids lie deep in the brain and determine its corners poorly. Both are repeated with Huber
weights on the residuals in units of d_s + 3 mm (3 mm is the parcellation's own error), so a few
wrong structures do not matter.

If the brain's surface is supplied, the 12 degrees are then fitted once more to the centroids and
to the extent of the brain in many directions u (``anatomy/hull.py``; h_u, the reference):

    argmin_A  sum_s w_s |A x_s - y_s|^2 + sum_u v_u (u . A p_u - h_u)^2 + ridge

with Huber weights on both. Directions in which the field of view cuts the brain are excluded, and
so are structures that it cuts, if enough others are whole.

Reference: Umeyama, doi:10.1109/34.88573.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainprior_bids.anatomy.hull import supports
from brainprior_bids.engine.errors import AnatomyError
from brainprior_bids.records import AffineMethod

Matrix = NDArray[np.float64]

OWN_ERROR_MM = 3.0
"""The parcellation's own error in mm, added to the SD over participants."""
RIDGE_MM = 12.0
"""Strength with which 12 degrees are pulled to 7, as an SD of the centroids in mm.

This and OWN_ERROR_MM were chosen by leave-one-out on the training maps."""
HUBER = 1.0
"""Residuals above this many (d_s + 3 mm) count linearly; above four times that, they are
ignored."""
ITERATIONS = 20
HULL_SHARE = 9.0
"""Weight of all directions of the hull together, over that of all centroids together."""
HULL_RIDGE_MM = 6.0
"""RIDGE_MM for fits that include the hull."""
HULL_OWN_ERROR_MM = 2.0
HULL_ITERATIONS = 5
SMALLEST_SHARE_SEEN = 0.4
"""Smallest share of the hull's directions in view; with less, only the centroids are used."""
CUT_SHARE = 0.05
"""A structure counts as cut if this share of its cross-section is on the edge of the view."""
NEEDED = {12: 10, 7: 4, 6: 3}
"""Degrees of freedom -> fewest structures needed."""
PLAUSIBLE_SCALE = (0.65, 1.6)
"""Singular values of the linear part: MNI305 is larger than most heads, children's more so."""
LARGEST_RATIO = 1.5
"""Largest over smallest singular value."""
LARGEST_RESIDUAL_MM = 12.0
"""Weighted median residual above which the structures are not at plausible positions."""
UNUSUAL_RESIDUAL_MM = 5.0
LARGEST_STRANGE_SHARE = 0.3
"""Largest share of the weight of structures that do not fit; above it, the image shows no
brain."""


@dataclass(frozen=True)
class AffineFit:
    """An affine and how well it fits.

    Attributes
    ----------
    matrix : (4, 4) float64 array
        Scanner RAS mm to MNI305 RAS mm.
    dof : {12, 7, 6}
    residuals_mm : dict
        Structure name to distance of its mapped centroid from the reference.
    median_residual_mm : float
    used : list of str
        Names of the structures used.
    hull_residual_mm : float or None
        Median difference between the brain's extent and the reference's; None if it was not used.
    method : AffineMethod
        ``STRUCTURES``, or ``TEMPLATE`` (``anatomy/rescue.py``).
    warnings : list of str
    """

    matrix: Matrix
    dof: int
    residuals_mm: dict[str, float]
    median_residual_mm: float
    used: list[str]
    hull_residual_mm: float | None = None
    method: AffineMethod = AffineMethod.STRUCTURES
    warnings: list[str] = field(default_factory=list)


@cache
def mni305_centroids() -> dict[str, Any]:
    """The shipped reference; its ``structures`` map name to centroid, SD, volume and index."""
    path = files("brainprior_bids") / "data" / "mni305_centroids.json"
    reference: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return reference


@dataclass(frozen=True)
class _Match:
    """The matched structures: names, x (n, 3), y (n, 3), d (n), w (n)."""

    names: list[str]
    x: Matrix
    y: Matrix
    d: Matrix
    w: Matrix

    def judge(self, matrix: Matrix) -> tuple[Matrix, float, str]:
        """Residuals in mm, their weighted median, and a description of the problem, if any."""
        residual = np.linalg.norm(self.x @ matrix[:3, :3].T + matrix[:3, 3] - self.y, axis=1)
        median = _weighted_median(residual, self.w)
        problem = _implausible(matrix, median)
        strangers = float(self.w[residual > 4 * HUBER * self.d].sum() / self.w.sum())
        if not problem and strangers > LARGEST_STRANGE_SHARE:
            problem = f"{strangers:.0%} of the structures are far from their expected positions"
        return residual, median, problem

    def named(self, residual: Matrix) -> dict[str, float]:
        """Name -> mm, rounded."""
        return {n: round(float(r), 3) for n, r in zip(self.names, residual, strict=True)}


def _match(
    table: Sequence[Mapping[str, Any]], structures: Mapping[str, Any], smallest_confidence: float
) -> _Match:
    rows = []
    for row in table:
        expected = structures.get(row["name"])
        if expected is None or row["confidence"] < smallest_confidence:
            continue
        share = row["volume_mm3"] / expected["volume_mm3"]
        if share > 0.2:  # less is a fragment, its centroid means nothing
            rows.append((row, expected, min(share, 1.0)))
    whole = [entry for entry in rows if entry[0].get("cut_share", 0.0) <= CUT_SHARE]
    if len(whole) >= NEEDED[12]:
        rows = whole
    spread = [float(np.linalg.norm(expected["sd_mm"])) for _, expected, _ in rows]
    d = np.array(spread) + OWN_ERROR_MM
    return _Match(
        names=[str(row["name"]) for row, _, _ in rows],
        x=np.array([row["centroid_mm"] for row, _, _ in rows], float),
        y=np.array([expected["centroid_mm"] for _, expected, _ in rows], float),
        d=d,
        w=np.array([row["confidence"] ** 2 * share for row, _, share in rows]) / d**2,
    )


def _residual_warning(median: float) -> list[str]:
    if median <= UNUSUAL_RESIDUAL_MM:
        return []
    return [
        f"The structures are {median:.1f} mm (median) from their expected positions in MNI305 "
        f"after the affine; usually this is below {UNUSUAL_RESIDUAL_MM:g} mm."
    ]


def judge_affine(
    matrix: Matrix,
    table: Sequence[Mapping[str, Any]],
    reference: Mapping[str, Any] | None = None,
    *,
    surface: tuple[Matrix, NDArray[np.bool_]] | None = None,
    smallest_confidence: float = 0.3,
) -> AffineFit:
    """Judge a transform from another source by the structures; arguments as ``fit_affine``.

    Raises
    ------
    AnatomyError
        If it is implausible, or there are fewer than three structures to judge it by.
    """
    reference = reference or mni305_centroids()
    match = _match(table, reference["structures"], smallest_confidence)
    if len(match.names) < NEEDED[6]:
        raise AnatomyError(
            f"expected at least {NEEDED[6]} structures to judge it by, got {match.names}."
        )
    residual, median, problem = match.judge(matrix)
    if problem:
        raise AnatomyError(f"the transform is not plausible: {problem}.")
    hull_residual = None
    if surface is not None and "hull" in reference:
        hull_residual = _hull_residual(matrix, surface, reference["hull"])
    return AffineFit(
        matrix=matrix,
        dof=12,
        residuals_mm=match.named(residual),
        median_residual_mm=round(median, 3),
        used=match.names,
        hull_residual_mm=hull_residual,
        warnings=_residual_warning(median),
    )


def fit_affine(
    table: Sequence[Mapping[str, Any]],
    reference: Mapping[str, Any] | None = None,
    *,
    surface: tuple[Matrix, NDArray[np.bool_]] | None = None,
    smallest_confidence: float = 0.3,
) -> AffineFit:
    """Scanner to MNI305 from the structures of one scan.

    Parameters
    ----------
    table : sequence of mappings
        As ``Parcellation.table``: ``name``, ``volume_mm3``, ``confidence``, ``centroid_mm``.
    reference : mapping, optional
        As :func:`mni305_centroids`, the default.
    surface : (points, cut), optional
        Surface of the brain mask, from ``hull.surface``.
    smallest_confidence : float
        Structures with a lower confidence are not used.

    Raises
    ------
    AnatomyError
        If fewer than three structures can be used, or no plausible transform fits them.
    """
    reference = reference or mni305_centroids()
    match = _match(table, reference["structures"], smallest_confidence)
    if len(match.names) < NEEDED[6]:
        raise AnatomyError(
            f"fit_affine: expected at least {NEEDED[6]} structures, got {match.names}. Is enough "
            "of the brain in the field of view?"
        )
    x, y, d, w = match.x, match.y, match.d, match.w
    warnings: list[str] = []
    enough = [dof for dof in NEEDED if len(x) >= NEEDED[dof]]
    problems = []
    hull_residual: float | None = None
    for dof in (12, 7) if 12 in enough else enough[:1]:
        matrix, factor = _robust(x, y, w, d, dof)
        hull_residual = None
        if dof == 12 and surface is not None and "hull" in reference:
            refined = _with_hull(x, y, w * factor, matrix, surface, reference["hull"])
            if refined is not None:
                matrix = refined
                hull_residual = _hull_residual(matrix, surface, reference["hull"])
        residual, median, problem = match.judge(matrix)
        if not problem:
            break
        problems.append(f"with {dof} degrees of freedom {problem}")
    else:
        raise AnatomyError(
            f"fit_affine: no plausible transform to MNI305 from {len(x)} structures: "
            f"{'; '.join(problems)}. Look at the structures; is the orientation in the header "
            "right?"
        )
    warnings += [f"Affine rejected: {problem}." for problem in problems]
    if dof < 12:
        warnings.append(f"Affine with {dof} degrees of freedom from {len(x)} structures.")
    warnings += _residual_warning(median)
    return AffineFit(
        matrix=matrix,
        dof=dof,
        residuals_mm=match.named(residual),
        median_residual_mm=round(median, 3),
        used=match.names,
        hull_residual_mm=hull_residual,
        warnings=warnings,
    )


def _robust(
    x: Matrix, y: Matrix, w: Matrix, d: Matrix, dof: int
) -> tuple[Matrix, NDArray[np.float64]]:
    """Iteratively reweighted fit, starting from a median-based guess of the outliers."""
    factor = np.ones(len(x))
    matrix = np.eye(4)
    for iteration in range(ITERATIONS):
        weights = w * factor
        matrix = similarity(x, y, weights, scale=dof > 6)
        if dof == 12 and iteration >= ITERATIONS // 2:
            matrix = _ridge_affine(x, y, weights, matrix)
        ratio = np.linalg.norm(x @ matrix[:3, :3].T + matrix[:3, 3] - y, axis=1) / d
        # while far from the solution, use the current scatter
        spread = max(1.0, float(np.median(ratio)))
        factor = np.minimum(1.0, HUBER * spread / np.maximum(ratio, 1e-9))
        factor[ratio > 4 * HUBER * spread] = 0.0
    return matrix, factor


def _with_hull(
    x: Matrix,
    y: Matrix,
    w: Matrix,
    start: Matrix,
    surface: tuple[Matrix, NDArray[np.bool_]],
    hull: Mapping[str, Any],
) -> Matrix | None:
    """12 degrees fitted to centroids and hull; None if too little of the hull is in view. The
    outermost points of a direction change with the affine, so the fit is repeated.
    """
    points, cut = surface
    towards, wanted = np.array(hull["directions"]), np.array(hull["height_mm"])
    spread = np.array(hull["sd_mm"]) + HULL_OWN_ERROR_MM
    similar = similarity(x, y, w, scale=True)
    matrix, factor = start, np.ones(len(wanted))
    for _ in range(HULL_ITERATIONS):
        height, place, measured = supports(points, matrix, towards, cut)
        if measured.mean() < SMALLEST_SHARE_SEEN:
            return None
        ratio = np.abs(height - wanted) / spread
        factor = np.minimum(1.0, HUBER / np.maximum(ratio, 1e-9)) * measured
        factor[ratio > 4 * HUBER] = 0.0  # a bulge of the mask, or a piece that is missing
        v = HULL_SHARE * w.sum() / len(wanted) * factor
        matrix = _joint(x, y, w, place, towards, wanted, v, similar)
    return matrix


def _hull_residual(
    matrix: Matrix, surface: tuple[Matrix, NDArray[np.bool_]], hull: Mapping[str, Any]
) -> float | None:
    """Median difference in mm between the extent and the reference's, where in view."""
    points, cut = surface
    height, _, measured = supports(points, matrix, np.array(hull["directions"]), cut)
    if not measured.any():
        return None
    return round(float(np.median(np.abs(height - np.array(hull["height_mm"]))[measured])), 3)


def _joint(
    x: Matrix,
    y: Matrix,
    w: Matrix,
    p: Matrix,
    u: Matrix,
    h: Matrix,
    v: Matrix,
    towards: Matrix,
) -> Matrix:
    """argmin_A of the two sums of squares and the ridge; the 12 unknowns are [linear, shift]."""
    centre = w @ x / w.sum()
    points = np.einsum("kl,nm->nklm", np.eye(3), x - centre).reshape(-1, 9)  # (3n, 9)
    shift = np.tile(np.eye(3), (len(x), 1))
    planes = np.einsum("nk,nm->nkm", u, p - centre).reshape(-1, 9)
    ridge = np.sqrt(w.sum()) * HULL_RIDGE_MM * np.eye(9)
    root_w, root_v = np.sqrt(np.repeat(w, 3))[:, None], np.sqrt(v)[:, None]
    left = np.concatenate(
        [
            root_w * np.c_[points, shift],
            root_v * np.c_[planes, u],
            np.c_[ridge, np.zeros((9, 3))],
        ]
    )
    right = np.concatenate(
        [root_w[:, 0] * y.ravel(), root_v[:, 0] * h, ridge @ towards[:3, :3].ravel()]
    )
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    matrix = np.eye(4)
    matrix[:3, :3] = solution[:9].reshape(3, 3)
    matrix[:3, 3] = solution[9:] - matrix[:3, :3] @ centre
    return matrix


def corner_distance(one: Matrix, other: Matrix) -> float:
    """Mean distance in mm between two scanner-to-MNI305 affines at the corners of the brain's box.

    The box is 130 x 160 x 120 mm around (0, -18, 10) mm of MNI305, mapped by ``other``.
    """
    corners = (np.array(list(np.ndindex(2, 2, 2))) * 2 - 1) * [65.0, 80.0, 60.0] + [0, -18, 10]
    points = np.c_[corners, np.ones(8)]
    back = points @ (one @ np.linalg.inv(other)).T
    return float(np.linalg.norm((back - points)[:, :3], axis=1).mean())


def similarity(x: Matrix, y: Matrix, w: Matrix, *, scale: bool) -> Matrix:
    """(4, 4) rotation, shift and, optionally, one scale that maps x (n, 3) to y, weighted."""
    total = w.sum()
    x_mean, y_mean = w @ x / total, w @ y / total
    xc, yc = x - x_mean, y - y_mean
    u, s, vt = np.linalg.svd((yc * w[:, None]).T @ xc)
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    rotation = (u * signs) @ vt
    size = float((s * signs).sum() / (w @ (xc**2).sum(1))) if scale else 1.0
    matrix = np.eye(4)
    matrix[:3, :3] = size * rotation
    matrix[:3, 3] = y_mean - matrix[:3, :3] @ x_mean
    return matrix


def _ridge_affine(x: Matrix, y: Matrix, w: Matrix, towards: Matrix) -> Matrix:
    """argmin_A sum_s w_s |A x_s + t - y_s|^2 + (sum_s w_s) RIDGE_MM^2 |A - S|^2."""
    total = w.sum()
    x_mean, y_mean = w @ x / total, w @ y / total
    xc, yc = x - x_mean, y - y_mean
    strength = total * RIDGE_MM**2 * np.eye(3)
    left = (yc * w[:, None]).T @ xc + towards[:3, :3] @ strength
    linear = np.linalg.solve(((xc * w[:, None]).T @ xc + strength).T, left.T).T
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = y_mean - linear @ x_mean
    return matrix


def _weighted_median(values: Matrix, w: Matrix) -> float:
    order = np.argsort(values)
    cumulated = np.cumsum(w[order])
    return float(values[order][np.searchsorted(cumulated, cumulated[-1] / 2)])


def _implausible(matrix: Matrix, median: float) -> str:
    """A description of what is wrong with a transform; empty if nothing."""
    linear = matrix[:3, :3]
    s = np.linalg.svd(linear, compute_uv=False)
    low, high = PLAUSIBLE_SCALE
    if np.linalg.det(linear) <= 0:
        return "it mirrors left and right"
    if s[-1] < low or s[0] > high:
        return f"scales {np.round(s, 2).tolist()} outside {low}-{high}"
    if s[0] / s[-1] > LARGEST_RATIO:
        return f"scales {np.round(s, 2).tolist()} differ by more than {LARGEST_RATIO}"
    if median > LARGEST_RESIDUAL_MM:
        return f"a median residual of {median:.1f} mm"
    return ""
