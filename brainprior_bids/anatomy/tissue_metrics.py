# SPDX-License-Identifier: Apache-2.0
"""Signal and contrast by tissue, in the scan and in the restored image, under MRIQC's names.

With m, s and d the median, the standard deviation and the scaled median absolute deviation of the
voxels of a tissue:

- ``snr_<tissue>`` = m / s; ``snr_total`` is the mean over the tissues,
- ``cnr`` = abs(m_wm - m_gm) / sqrt(s_wm² + s_gm²),
- ``cjv`` = (d_wm + d_gm) / abs(m_wm - m_gm),
- ``summary_<tissue>_median``, ``summary_<tissue>_stdv`` = m, s.

MRIQC takes the tissues from a segmentation of the intensities, and its grey matter includes the
deep nuclei; here they are labels of the parcellation (cortex alone), all of their voxels. MRIQC's
``cnr`` has the noise of the air around the head as a third term, which the restored image lacks.
Both images are used without the bias field, as in MRIQC. Its metrics that need air, scalp,
partial-volume maps or a template (``snrd``, ``efc``, ``fber``, ``qi``, ``wm2max``, ``rpve``,
``tpm_overlap``) have no counterpart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainprior_bids.engine.errors import ShapeMismatchError

TISSUES: dict[str, tuple[int, ...]] = {"csf": (4, 24, 43), "gm": (3, 42), "wm": (2, 41)}
"""MRIQC's name -> labels: lateral ventricles and other fluid, cortex, cerebral white matter."""
RATIOS = (*(f"snr_{tissue}" for tissue in TISSUES), "snr_total", "cnr", "cjv")
"""The metrics without units."""
FEWEST = 50
"""Fewest voxels of a tissue for which its metrics are computed."""
MAD_TO_SD = 1.4826
"""SD over median absolute deviation of a normal distribution."""

Values = NDArray[np.float32]


def tissue_values(
    image: Values, labels: NDArray[Any], use: NDArray[np.bool_]
) -> dict[str, Values]:
    """The values of each tissue.

    Parameters
    ----------
    image : (i, j, k) array
    labels : (i, j, k) array
        Structures, in FreeSurfer's numbering, at the voxels of the image.
    use : (i, j, k) bool array
        Voxels that are not used (under a lesion mask) are False.

    Returns
    -------
    One array per tissue of ``TISSUES``; empty if the image has no such voxel.

    Raises
    ------
    ShapeMismatchError
        If the three differ in shape.
    """
    if not image.shape == labels.shape == use.shape:
        raise ShapeMismatchError(
            f"tissue_values: image {image.shape}, labels {labels.shape} and use {use.shape} must "
            "be on one grid."
        )
    here = np.where(use, np.round(labels), 0).astype(int)
    return {tissue: image[np.isin(here, values)] for tissue, values in TISSUES.items()}


def tissue_metrics(values: Mapping[str, Values]) -> dict[str, float]:
    """The metrics that can be computed, by MRIQC's names.

    Parameters
    ----------
    values : Mapping of tissue to array
        See ``tissue_values``; in scanner units.

    Returns
    -------
    Metrics are left out if a tissue has fewer than ``FEWEST`` voxels or does not vary.
    """
    enough = {
        tissue: array.astype(np.float64)
        for tissue, array in values.items()
        if array.size >= FEWEST and np.ptp(array) > 0
    }
    middle = {tissue: float(np.median(array)) for tissue, array in enough.items()}
    spread = {tissue: float(array.std(ddof=1)) for tissue, array in enough.items()}
    metrics = {f"snr_{tissue}": middle[tissue] / spread[tissue] for tissue in enough}
    if len(metrics) == len(TISSUES):
        metrics["snr_total"] = sum(metrics.values()) / len(TISSUES)
    if "wm" in enough and "gm" in enough and middle["wm"] != middle["gm"]:
        contrast = abs(middle["wm"] - middle["gm"])
        deviation = sum(
            MAD_TO_SD * float(np.median(np.abs(enough[tissue] - middle[tissue])))
            for tissue in ("wm", "gm")
        )
        metrics["cnr"] = contrast / float(np.hypot(spread["wm"], spread["gm"]))
        metrics["cjv"] = deviation / contrast
    for tissue in enough:
        metrics[f"summary_{tissue}_median"] = middle[tissue]
        metrics[f"summary_{tissue}_stdv"] = spread[tissue]
    return metrics
