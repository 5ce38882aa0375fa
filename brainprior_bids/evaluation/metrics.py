# SPDX-License-Identifier: Apache-2.0
"""Errors of an image with respect to the truth, inside a mask.

The unit of intensity is the 99th percentile of the truth inside the mask. It is also PSNR's peak
and SSIM's data range, so that the metrics of different scans can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from brainprior_bids.engine.errors import InputError, ShapeMismatchError

SSIM_SIGMA = 1.5  # voxels; Wang et al. 2004, with K1 = 0.01 and K2 = 0.03


def matching_gain(image: ArrayLike, truth: ArrayLike, mask: ArrayLike) -> float:
    """The factor on ``image`` that brings it closest to ``truth`` in least squares.

    Raises
    ------
    ShapeMismatchError
        If the shapes disagree.
    InputError
        If the mask is empty, a value inside is not finite, or the image is 0 inside.
    """
    x, t, _ = _inside(image, truth, mask)
    power = float(x @ x)
    if power == 0:
        raise InputError("matching_gain: the image is 0 everywhere in the mask.")
    return float(x @ t) / power


def matching_field(
    image: NDArray[np.float32], truth: NDArray[np.float32], mask: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """The cubic polynomial of position that, as a gain, brings ``image`` closest to ``truth``.

    Parameters
    ----------
    image, truth : (i, j, k) arrays
    mask : (i, j, k) bool array
        Where they are compared.

    Returns
    -------
    (i, j, k) float32 array
        The gain; 1 outside the mask.
    """
    where = np.array(np.nonzero(mask), dtype=np.float64)
    middle, half = where.mean(1, keepdims=True), np.ptp(where, axis=1)[:, None] / 2 + 1
    x, y, z = (where - middle) / half
    powers = [p for p in product(range(4), repeat=3) if sum(p) <= 3]
    basis = np.stack([x**a * y**b * z**c for a, b, c in powers], axis=1)
    values = image[mask].astype(np.float64)
    design = basis * values[:, None]
    target = truth[mask].astype(np.float64)
    coefficients = np.linalg.solve(design.T @ design, design.T @ target)
    field = np.ones(mask.shape, np.float32)
    field[mask] = basis @ coefficients
    return field


def compare(image: ArrayLike, truth: ArrayLike, mask: ArrayLike) -> dict[str, float]:
    """MAE, PSNR and SSIM inside the mask.

    Parameters
    ----------
    image, truth : (i, j, k) arrays
        Same grid and intensity unit.
    mask : (i, j, k) array
        Above 0.5 is inside. SSIM is taken on images set to 0 outside, and averaged inside.

    Returns
    -------
    dict
        ``mae`` and ``rmse`` in units of the truth's 99th percentile, ``psnr_db``, ``ssim``.

    Raises
    ------
    ShapeMismatchError
        If the three disagree.
    InputError
        If the mask is empty, a value inside is not finite, or the truth is not above 0.
    """
    x, t, inside = _inside(image, truth, mask)
    unit = float(np.percentile(t, 99))
    if unit <= 0:
        raise InputError(f"compare: the truth's 99th percentile must be above 0, got {unit:g}.")
    difference = (x - t) / unit
    mse = float(np.mean(difference**2))
    return {
        "mae": float(np.abs(difference).mean()),
        "rmse": float(np.sqrt(mse)),
        "psnr_db": float(-10 * np.log10(mse)) if mse > 0 else float("inf"),
        "ssim": _ssim(np.asarray(image), np.asarray(truth), inside, unit),
    }


SHELLS_MM = (0, 1, 2, 3, 5)
"""Depths below the mask's border that separate the shells of ``by_depth``; the last is open."""
DEPTHS = tuple(
    f"rmse_{low}_{high}mm" if high else f"rmse_{low}mm"
    for low, high in zip(SHELLS_MM, (*SHELLS_MM[1:], None), strict=True)
)
"""The keys of ``by_depth``, from the border inwards."""


def by_depth(
    image: ArrayLike, truth: ArrayLike, mask: ArrayLike, spacing_mm: Sequence[float]
) -> dict[str, float]:
    """RMSE in shells, by the distance from the nearest voxel outside the mask.

    Parameters
    ----------
    image, truth, mask : (i, j, k) arrays
        As ``compare``.
    spacing_mm : three floats
        Voxel size.

    Returns
    -------
    dict
        Keys ``DEPTHS``, in units of the truth's 99th percentile; NaN for an empty shell.

    Raises
    ------
    ShapeMismatchError, InputError
        As ``compare``.
    """
    x, t, inside = _inside(image, truth, mask)
    depth = ndimage.distance_transform_edt(inside, sampling=spacing_mm)[inside]
    square = ((x - t) / np.percentile(t, 99)) ** 2
    shell = np.searchsorted(SHELLS_MM[1:], depth - 1e-6)
    count = np.bincount(shell, minlength=len(DEPTHS))
    total = np.bincount(shell, square, minlength=len(DEPTHS))
    return {
        key: float(np.sqrt(s / n)) if n else float("nan")
        for key, s, n in zip(DEPTHS, total, count, strict=True)
    }


def field_psnr_db(
    image: NDArray[np.float32], truth: NDArray[np.float32], mask: NDArray[np.bool_]
) -> float:
    """PSNR after ``matching_field`` in dB, so that a smooth bias field does not count.

    Parameters
    ----------
    image, truth, mask : (i, j, k) arrays
        As ``matching_field``.

    Raises
    ------
    ShapeMismatchError, InputError
        As ``compare``.
    """
    return compare(image * matching_field(image, truth, mask), truth, mask)["psnr_db"]


def metrics_of(
    images: Mapping[str, NDArray[np.float32]],
    truth: NDArray[np.float32],
    inside: NDArray[np.bool_],
    spacing_mm: Sequence[float],
) -> dict[str, dict[str, float]]:
    """``compare`` and ``by_depth`` of every image after its gain.

    ``psnr_field_db`` is the PSNR after ``matching_field``.
    """
    table = {}
    for method, image in images.items():
        alike = matching_gain(image, truth, inside) * image
        table[method] = {
            **compare(alike, truth, inside),
            **by_depth(alike, truth, inside, spacing_mm),
            "psnr_field_db": field_psnr_db(image, truth, inside),
        }
    return table


def crps(samples: ArrayLike, truth: ArrayLike, mask: ArrayLike) -> float:
    """Fair continuous ranked probability score of N samples, averaged inside the mask.

    ``mean |x_i - t| - sum_ij |x_i - x_j| / (2 N (N - 1))``, in units of the truth's 99th
    percentile; the mean absolute error for N = 1. Ferro, QJRMS 140 (2014).

    Parameters
    ----------
    samples : (n, i, j, k) array
    truth, mask : (i, j, k) arrays

    Raises
    ------
    ShapeMismatchError, InputError
        As ``compare``.
    """
    stack = np.asarray(samples)
    parts = [_inside(sample, truth, mask) for sample in stack]
    t = parts[0][1]
    x = np.sort(np.stack([part[0] for part in parts]), axis=0)
    n = len(x)
    score = np.abs(x - t).mean(0)
    if n > 1:
        rank = 2 * np.arange(n) - (n - 1)  # sum_{i<j} (x_j - x_i) of the sorted samples
        score = score - np.tensordot(rank, x, 1) / (n * (n - 1))
    return float(score.mean() / np.percentile(t, 99))


def frechet_distance(one: ArrayLike, other: ArrayLike) -> float:
    """Between the Gaussians of two sets of features, in units of the features squared.

    ``|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` with the sets' means and covariances (n - 1).
    Heusel et al., arXiv 1706.08500. Small sets make it larger: compare sets of the same sizes.

    Parameters
    ----------
    one, other : (n, features) arrays
        At least two rows each.

    Raises
    ------
    ShapeMismatchError
        If they disagree on the features or have too few rows.
    """
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ShapeMismatchError(
            f"frechet_distance: expected two sets of at least two rows with the same features, "
            f"got {a.shape} and {b.shape}."
        )
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ second @ root)  # of C1 C2, which is not symmetric
    spread = np.trace(first) + np.trace(second) - 2 * np.sqrt(np.maximum(shared, 0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + spread)


def _inside(
    image: ArrayLike, truth: ArrayLike, mask: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    x, t, inside = np.asarray(image), np.asarray(truth), np.asarray(mask) > 0.5
    if not x.shape == t.shape == inside.shape:
        raise ShapeMismatchError(
            f"Metrics: expected one shape, got image {x.shape}, truth {t.shape}, mask "
            f"{inside.shape}."
        )
    if not inside.any():
        raise InputError("Metrics: the mask is empty.")
    values, reference = x[inside].astype(np.float64), t[inside].astype(np.float64)
    if not (np.isfinite(values).all() and np.isfinite(reference).all()):
        raise InputError("Metrics: a value inside the mask is not finite.")
    return values, reference, inside


def _ssim(
    image: NDArray[np.floating],
    truth: NDArray[np.floating],
    inside: NDArray[np.bool_],
    unit: float,
) -> float:
    margin = int(4 * SSIM_SIGMA)
    corners = [
        (np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {a})))[[0, -1]]) for a in range(3)
    ]
    box = tuple(slice(max(a - margin, 0), b + margin + 1) for a, b in corners)
    inside = inside[box]
    x = np.where(inside, image[box], 0).astype(np.float64) / unit
    t = np.where(inside, truth[box], 0).astype(np.float64) / unit

    def local(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return ndimage.gaussian_filter(values, SSIM_SIGMA, truncate=3.5)

    mean_x, mean_t = local(x), local(t)
    var_x, var_t = local(x * x) - mean_x**2, local(t * t) - mean_t**2
    covariance = local(x * t) - mean_x * mean_t
    c1, c2 = 0.01**2, 0.03**2
    ssim = ((2 * mean_x * mean_t + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_t**2 + c1) * (var_x + var_t + c2)
    )
    return float(ssim[inside].mean())
