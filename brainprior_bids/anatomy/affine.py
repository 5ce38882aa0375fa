# SPDX-License-Identifier: Apache-2.0
"""The affine to MNI305 from the centroids of structures.

Symbols: x_s, a structure's centroid in the scan (scanner RAS mm); y_s, its mean centroid in
MNI305 (``data/mni305_centroids.json``); d_s, the SD of that centroid over people; w_s, its weight.

    w_s = confidence_s^2 / (d_s + 3 mm)^2 * min(volume_s / mean volume_s, 1)

A weighted similarity (7 degrees of freedom, Umeyama) is fitted first, then the full affine
(12) by weighted least squares that pulls its linear part towards the similarity, since centroids
lie deep in the brain and say little about its corners. Both are repeated with Huber weights on the
residuals in units of d_s + 3 mm (the 3 mm being the parcellation's own error), so a few wrong
structures do not matter.

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

from brainprior_bids.engine.errors import AnatomyError

Matrix = NDArray[np.float64]

OWN_ERROR_MM = 3.0
"""Added to the spread over people."""
RIDGE_MM = 12.0
"""How strongly 12 degrees are pulled to 7: as much as a centroid spread of this many mm.

This and OWN_ERROR_MM were chosen by leave-one-out on the training maps."""
HUBER = 1.0
"""Residuals beyond this many (d_s + 3 mm) count linearly, beyond four times that not at all."""
ITERATIONS = 20
NEEDED = {12: 10, 7: 4, 6: 3}
"""Fewest structures for that many degrees of freedom."""
PLAUSIBLE_SCALE = (0.65, 1.6)
"""Singular values of the linear part: MNI305 is larger than most heads, children's more so."""
LARGEST_RATIO = 1.5
"""Largest over smallest singular value."""
LARGEST_RESIDUAL_MM = 12.0
"""Weighted median residual beyond which the structures are not where a brain has them."""
DOUBTFUL_RESIDUAL_MM = 5.0
LARGEST_STRANGE_SHARE = 0.3
"""Weight of structures that do not fit at all; more of them than this is no brain."""


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
        Structures that entered, by name.
    warnings : list of str
    """

    matrix: Matrix
    dof: int
    residuals_mm: dict[str, float]
    median_residual_mm: float
    used: list[str]
    warnings: list[str] = field(default_factory=list)


@cache
def mni305_centroids() -> dict[str, Any]:
    """The shipped reference; its ``structures`` map name to centroid, SD, volume and index."""
    path = files("brainprior_bids") / "data" / "mni305_centroids.json"
    reference: dict[str, Any] = json.loads(path.read_text())
    return reference


def fit_affine(
    table: Sequence[Mapping[str, Any]],
    reference: Mapping[str, Any] | None = None,
    *,
    smallest_confidence: float = 0.3,
) -> AffineFit:
    """Scanner to MNI305 from the structures of one scan.

    Parameters
    ----------
    table : sequence of mappings
        As ``Parcellation.table``: ``name``, ``volume_mm3``, ``confidence``, ``centroid_mm``.
    reference : mapping, optional
        As :func:`mni305_centroids`, the default.
    smallest_confidence : float
        Structures below it do not enter.

    Raises
    ------
    AnatomyError
        If fewer than three structures can be used, or no plausible transform fits them.
    """
    structures = (reference or mni305_centroids())["structures"]
    warnings: list[str] = []
    rows = []
    for row in table:
        known = structures.get(row["name"])
        if known is None or row["confidence"] < smallest_confidence:
            continue
        share = row["volume_mm3"] / known["volume_mm3"]
        if share > 0.2:  # less is a fragment, its centroid means nothing
            rows.append((row, known, min(share, 1.0)))
    if len(rows) < NEEDED[6]:
        raise AnatomyError(
            f"fit_affine: expected at least {NEEDED[6]} structures, got "
            f"{[row['name'] for row, _, _ in rows]}. Is enough of the brain in the field of view?"
        )
    names = [str(row["name"]) for row, _, _ in rows]
    x = np.array([row["centroid_mm"] for row, _, _ in rows], float)
    y = np.array([known["centroid_mm"] for _, known, _ in rows], float)
    d = np.array([float(np.linalg.norm(known["sd_mm"])) + OWN_ERROR_MM for _, known, _ in rows])
    w = np.array([row["confidence"] ** 2 * share for row, _, share in rows]) / d**2
    enough = [dof for dof in NEEDED if len(rows) >= NEEDED[dof]]
    problems = []
    for dof in (12, 7) if 12 in enough else enough[:1]:
        matrix = _robust(x, y, w, d, dof)
        residual = np.linalg.norm(x @ matrix[:3, :3].T + matrix[:3, 3] - y, axis=1)
        median = _weighted_median(residual, w)
        problem = _implausible(matrix, median)
        strangers = float(w[residual > 4 * HUBER * d].sum() / w.sum())
        if not problem and strangers > LARGEST_STRANGE_SHARE:
            problem = f"{strangers:.0%} of the structures are far from their places"
        if not problem:
            break
        problems.append(f"with {dof} degrees of freedom {problem}")
    else:
        raise AnatomyError(
            f"fit_affine: no plausible transform to MNI305 from {len(rows)} structures: "
            f"{'; '.join(problems)}. Look at the structures; is the orientation in the header "
            "right?"
        )
    warnings += [f"Affine rejected: {problem}." for problem in problems]
    if dof < 12:
        warnings.append(f"Affine with {dof} degrees of freedom from {len(rows)} structures.")
    if median > DOUBTFUL_RESIDUAL_MM:
        warnings.append(
            f"Structures lie {median:.1f} mm (median) from their places in MNI305 after the "
            f"affine; usual is below {DOUBTFUL_RESIDUAL_MM:g} mm."
        )
    return AffineFit(
        matrix=matrix,
        dof=dof,
        residuals_mm={n: round(float(r), 3) for n, r in zip(names, residual, strict=True)},
        median_residual_mm=round(median, 3),
        used=names,
        warnings=warnings,
    )


def _robust(x: Matrix, y: Matrix, w: Matrix, d: Matrix, dof: int) -> Matrix:
    """Iteratively reweighted fit, starting from a median-based guess of the outliers."""
    factor = np.ones(len(x))
    matrix = np.eye(4)
    for iteration in range(ITERATIONS):
        weights = w * factor
        matrix = similarity(x, y, weights, scale=dof > 6)
        if dof == 12 and iteration >= ITERATIONS // 2:
            matrix = _ridge_affine(x, y, weights, matrix)
        ratio = np.linalg.norm(x @ matrix[:3, :3].T + matrix[:3, 3] - y, axis=1) / d
        # while far off, judge by the spread at hand
        spread = max(1.0, float(np.median(ratio)))
        factor = np.minimum(1.0, HUBER * spread / np.maximum(ratio, 1e-9))
        factor[ratio > 4 * HUBER * spread] = 0.0
    return matrix


def similarity(x: Matrix, y: Matrix, w: Matrix, *, scale: bool) -> Matrix:
    """(4, 4) rotation, shift and, if asked, one scale that takes x (n, 3) to y, weighted."""
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
    """What is wrong with a transform, empty if nothing."""
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
