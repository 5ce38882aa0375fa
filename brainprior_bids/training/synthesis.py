# SPDX-License-Identifier: Apache-2.0
"""Synthetic brains and heads from label maps: SynthSeg's recipe.

Two generators:

- :func:`synthesise_brain` draws the intensities of one brain at the label map's own resolution
  (about 1 mm) with published statistics of T1w and T2w scans, for the prior;
- :class:`HeadSynthesiser` draws a deformed whole head of random contrast, resolution and quality
  at 2 mm together with its labels, for the parcellation.

Label maps hold FreeSurfer values, 24 for cerebrospinal fluid around the brain and 502-530 for
tissues outside it (the convention of SynthSeg's training maps). The intensity statistics are
those published with SynthSR (``prior_means_t1_hr``, ``prior_means_t2``) and SynthSeg
(``prior_means_t1``), copied below: mean and SD over scans of a structure's mean, and of its SD.

References: Billot et al., SynthSeg, doi:10.1016/j.media.2023.102789; Iglesias et al., SynthSR,
doi:10.1126/sciadv.add3607.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.engine.errors import InputError

CONTRASTS = ("T1w", "T2w", "FLAIR", "unknown")

LEFT_RIGHT = {
    **dict(zip((2, 3, 4, 5, 7, 8), (41, 42, 43, 44, 46, 47), strict=True)),
    **dict(zip((10, 11, 12, 13, 17, 18), (49, 50, 51, 52, 53, 54), strict=True)),
    **dict(zip((25, 26, 28, 30, 31, 136, 137), (57, 58, 60, 62, 63, 163, 164), strict=True)),
}
"""Left value -> right value of every sided structure."""

BRAIN = (2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 26, 28)
"""Left and middle structures that are told apart; their right partners are in LEFT_RIGHT."""

MERGED_INTO = {25: 2, 57: 41, 30: 12, 62: 51, 136: 4, 163: 43, 137: 5, 164: 44, 31: 4, 63: 43}
"""Small parts -> the structure they are counted with: lesions, vessels, plexus."""

CSF = 24
OUTSIDE = {
    502: "artery",
    506: "eye fluid",
    507: "soft tissue",
    508: "eye tissue",
    509: "mucosa",
    511: "skin",
    512: "spinal cord",
    514: "vein",
    515: "bone",
    516: "marrow",
    530: "optic nerve",
}

# key of the statistics: left value of a group that shares them
_SHARED_STATISTICS = {7: 2, 8: 3, 14: 4, 15: 4, 5: 4, 24: 4, 72: 4, 85: 2, 25: 2, 30: 12}
_SHARED_STATISTICS |= {136: 31, 137: 31, 512: 16}

# value: (mean of means, SD of means, mean of SDs) on a 0-255 scale
_T1 = {
    2: (226.4, 3.7, 15.4), 3: (130.2, 10.1, 18.5), 4: (58.8, 13.7, 28.6), 16: (180.0, 3.4, 10.9),
    10: (188.8, 7.1, 15.4), 11: (152.4, 8.8, 10.5), 12: (179.2, 7.0, 10.7), 13: (224.6, 9.5, 6.8),
    17: (129.2, 9.9, 10.5), 18: (134.1, 8.6, 8.0), 26: (150.1, 6.8, 5.7), 28: (209.2, 5.1, 12.4),
    31: (114.5, 17.6, 30.4),
}  # fmt: skip
_T2 = {
    2: (72.4, 8.7, 12.2), 3: (97.5, 10.8, 20.2), 4: (238.2, 14.0, 24.8), 16: (65.5, 11.2, 11.7),
    10: (66.7, 11.7, 8.7), 11: (78.8, 12.3, 11.3), 12: (65.2, 10.5, 9.3), 13: (37.5, 4.9, 9.5),
    17: (96.7, 14.3, 14.1), 18: (90.0, 14.2, 9.2), 26: (81.2, 14.5, 8.9), 28: (61.3, 10.0, 19.2),
    31: (133.0, 6.0, 68.8),
}  # fmt: skip


def load_labels(path: str | Path) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """A label map in closest-canonical RAS order.

    Returns
    -------
    labels : (i, j, k) int16 array
    affine : (4, 4) array
        Voxel to mm.
    """
    image = nib.as_closest_canonical(nib.load(path))
    return np.asanyarray(image.dataobj).round().astype(np.int16), np.asarray(image.affine)


def bounding_box(mask: NDArray[np.bool_], margin: int) -> tuple[slice, ...]:
    """Slices of the box around ``mask`` with ``margin`` voxels added, clipped to the array.

    Raises
    ------
    InputError
        If the mask is empty.
    """
    if not mask.any():
        raise InputError("bounding_box: expected a mask with at least one voxel, got none.")
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(max(hit[0] - margin, 0), min(hit[-1] + margin + 1, mask.shape[axis])))
    return tuple(box)


def brain_mask(labels: NDArray[np.integer], *, radius: float = 7.0) -> NDArray[np.bool_]:
    """The brain as skull-strippers cut it: structures and the fluid between the gyri.

    The structures are closed with a ball, so that sulci are inside, one voxel of fluid is kept
    around them, and what is neither structure nor fluid (bone, veins) stays outside.

    Parameters
    ----------
    labels : (i, j, k) integer array
        Voxels of about 1 mm.
    radius : float
        Radius of the ball in voxels.
    """
    tissue = (labels > 0) & (labels < 500) & (labels != CSF)
    box = bounding_box(tissue, int(radius) + 2)
    inner = np.pad(tissue[box], int(radius) + 2)
    dilated = ndimage.distance_transform_edt(~inner) <= radius
    closed = ndimage.distance_transform_edt(dilated) > radius
    closed = ndimage.binary_dilation(closed | inner)
    closed = closed[(slice(int(radius) + 2, -int(radius) - 2),) * 3]
    part = labels[box]
    has_fluid = bool((labels == CSF).any())
    allowed = (part > 0) & (part < 500) if has_fluid else np.ones_like(closed)
    out = np.zeros(labels.shape, bool)
    filled = ndimage.binary_fill_holes((closed & allowed) | tissue[box])
    components, _ = ndimage.label(filled)
    out[box] = components == np.argmax(np.bincount(components[filled]))
    return out


def _statistics_key(value: int) -> int:
    left = {right: left for left, right in LEFT_RIGHT.items()}.get(value, value)
    return _SHARED_STATISTICS.get(left, left)


def _brain_intensities(contrast: str, rng: np.random.Generator) -> dict[int, tuple[float, float]]:
    """Mean and SD of every statistics key for one scan, 0-255.

    FLAIR has no published statistics here. Rule: a T2-like draw with its tissue contrast
    compressed (55 + 0.65 T2), grey matter so above white matter, fluid suppressed to 18 +- 6,
    plexus 90, SDs multiplied by 0.6. Unknown: uniform means and SDs.
    """
    table = _T1 if contrast == "T1w" else _T2
    drawn = {}
    for key, (mean, mean_sd, sd) in table.items():
        drawn[key] = (mean + mean_sd * rng.standard_normal(), sd * rng.uniform(0.6, 1.1))
    if contrast == "FLAIR":
        drawn = {key: (55 + 0.65 * mean, 0.6 * sd) for key, (mean, sd) in drawn.items()}
        drawn[4] = (18 + 6 * rng.standard_normal(), 7.0)
        drawn[31] = (90 + 10 * rng.standard_normal(), 15.0)
    elif contrast == "unknown":
        drawn = {key: (rng.uniform(10, 240), rng.uniform(3, 22)) for key in drawn}
    return {key: (max(mean, 5.0), sd) for key, (mean, sd) in drawn.items()}


def synthesise_brain(
    labels: NDArray[np.integer],
    contrast: str,
    rng: np.random.Generator,
    *,
    mask: NDArray[np.bool_] | None = None,
    blur: float | None = None,
) -> NDArray[np.float32]:
    """A skull-stripped brain of one contrast from a label map.

    Structures get a mean and SD drawn from the published statistics; the sharp map of means is
    blurred (partial volume), then fine texture and a slow variation within tissue are added.

    Parameters
    ----------
    labels : (i, j, k) integer array
        FreeSurfer values on voxels of about 1 mm; left and right may be merged.
    contrast : {"T1w", "T2w", "FLAIR", "unknown"}
    rng : numpy Generator
        Source of every draw.
    mask : (i, j, k) bool array, optional
        :func:`brain_mask` of ``labels`` when already computed (it costs seconds).
    blur : float, optional
        SD of the partial-volume Gaussian in voxels; drawn from 0.35-0.65 when not given.

    Returns
    -------
    (i, j, k) float32 array
        99th percentile inside the mask = 1, zero outside the mask, no bias field and no noise.

    Raises
    ------
    InputError
        If the contrast is not one of the four.
    """
    if contrast not in CONTRASTS:
        raise InputError(
            f"synthesise_brain: contrast must be one of {CONTRASTS}, got {contrast!r}."
        )
    mask = brain_mask(labels) if mask is None else mask
    box = bounding_box(mask, 3)
    part, inside = labels[box], mask[box]
    intensities = _brain_intensities(contrast, rng)
    fluid = intensities[4]
    values = np.unique(part)
    mean_of = np.zeros(int(values.max()) + 1, np.float32)
    sd_of = np.zeros_like(mean_of)
    for value in values:  # gaps and tissue outside the brain count as fluid
        mean_of[value], sd_of[value] = intensities.get(_statistics_key(int(value)), fluid)
    mean = mean_of[part]
    sd = sd_of[part]
    amount = rng.uniform(0.35, 0.65) if blur is None else blur
    mean = ndimage.gaussian_filter(mean, amount)
    sd = ndimage.gaussian_filter(sd, 0.6)
    texture = ndimage.gaussian_filter(rng.standard_normal(part.shape, np.float32), 0.7)
    texture /= texture.std()
    coarse = rng.standard_normal([max(n // 12, 2) for n in part.shape], np.float32)
    factors = [n / m for n, m in zip(part.shape, coarse.shape, strict=True)]
    slow = ndimage.zoom(coarse, factors, order=1)
    slow = slow[tuple(slice(0, n) for n in part.shape)]
    brain = mean + sd * (0.35 * texture + 0.25 * slow)
    brain = np.clip(brain, 0, None) * inside
    out = np.zeros(labels.shape, np.float32)
    out[box] = brain / np.percentile(brain[inside], 99)
    return out
