# SPDX-License-Identifier: Apache-2.0
"""Grey matter, white matter and fluid from structures and intensities, for fMRIPrep.

Every structure is grey, white or fluid. Its label, blurred by one millimetre, is the prior
probability, and the intensities refine the borders: one Gaussian per kind of structure, estimated
in a few rounds of expectation and maximisation. The result is no finer than the structures: tissue
that the parcellation missed is not found.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter

from brainprior_bids.engine.errors import AnatomyError

KINDS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "cortex": ("GM", (3, 42)),
    "deep grey": ("GM", (10, 11, 12, 17, 18, 26, 49, 50, 51, 53, 54, 58)),
    "pallidum": ("GM", (13, 52)),
    "cerebellar cortex": ("GM", (8, 47)),
    "white matter": ("WM", (2, 41)),
    "cerebellar white matter": ("WM", (7, 46)),
    "brain stem": ("WM", (16, 28, 60)),
    "fluid": ("CSF", (4, 5, 14, 15, 24, 43, 44)),
}
"""Kind -> tissue and FreeSurfer's labels."""

TISSUES = ("GM", "WM", "CSF")
"""In the order of sMRIPrep's dseg: 1, 2, 3."""

BLUR_MM = 1.0
ROUNDS = 4


def tissue_probabilities(
    image: ArrayLike, labels: ArrayLike, mask: ArrayLike, *, spacing_mm: ArrayLike
) -> dict[str, NDArray[np.float32]]:
    """Probability of each tissue.

    Parameters
    ----------
    image : (i, j, k) array
        Skull-stripped, bias-free.
    labels : (i, j, k) integer array
        FreeSurfer's values; the tissue of brain without a label is determined by its intensity.
    mask : (i, j, k) array
        Brain.
    spacing_mm : (3,)
        Voxel size.

    Returns
    -------
    ``GM``, ``WM``, ``CSF`` -> (i, j, k) float32 array
        They sum to 1 in the mask and are 0 outside.

    Raises
    ------
    AnatomyError
        If one of the three tissues has no label at all.
    """
    inside = np.asarray(mask) > 0
    label_values = np.asarray(labels)
    values = np.asarray(image, np.float32)[inside]
    members = {kind: np.isin(label_values, which) & inside for kind, (_, which) in KINDS.items()}
    kinds = [kind for kind, member in members.items() if member.any()]
    missing = set(TISSUES) - {KINDS[kind][0] for kind in kinds}
    if missing:
        raise AnatomyError(
            f"Tissues: the parcellation has no {', '.join(sorted(missing))}. Look at its picture."
        )
    unlabelled = inside & ~np.any([members[kind] for kind in kinds], axis=0)
    sigma = BLUR_MM / np.asarray(spacing_mm, float)
    prior = np.stack(
        [
            gaussian_filter((members[kind] + unlabelled / len(kinds)).astype(np.float32), sigma)[
                inside
            ]
            for kind in kinds
        ]
    )
    prior /= np.maximum(prior.sum(0), 1e-12)
    spread = max(float(values.std()), 1e-6)
    posterior = prior
    for _ in range(ROUNDS):
        weight = posterior.sum(1)
        mean = posterior @ values / weight
        square = (posterior * (values - mean[:, None]) ** 2).sum(1) / weight
        sd = np.maximum(np.sqrt(square), 0.02 * spread)
        density = np.exp(-0.5 * ((values - mean[:, None]) / sd[:, None]) ** 2) / sd[:, None]
        joint = prior * (density + 1e-6 / spread)  # far from every mean, only the prior is used
        posterior = joint / np.maximum(joint.sum(0), 1e-30)
    out = {}
    for tissue in TISSUES:
        rows = [
            row for row, kind in zip(posterior, kinds, strict=True) if KINDS[kind][0] == tissue
        ]
        volume = np.zeros(inside.shape, np.float32)
        volume[inside] = np.sum(rows, axis=0)
        out[tissue] = volume
    return out


def tissue_labels(
    probabilities: Mapping[str, NDArray[np.float32]], mask: ArrayLike
) -> NDArray[np.uint8]:
    """(i, j, k): 1, 2, 3 for the likeliest of GM, WM, CSF; 0 outside the mask."""
    likeliest = np.argmax([probabilities[tissue] for tissue in TISSUES], axis=0) + 1
    return np.where(np.asarray(mask) > 0, likeliest, 0).astype(np.uint8)
