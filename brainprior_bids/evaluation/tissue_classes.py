# SPDX-License-Identifier: Apache-2.0
"""Tissue classes and cortical thickness by ANTs (antspyx), which shares nothing with our network.

Images are T1w with voxels of 1 mm. Thickness is DiReCT's (Das et al., NeuroImage 45, 2009).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainprior_bids.engine.errors import InputError

CLASSES = {"fluid": 1, "grey": 2, "white": 3}
"""Name -> label, by rising mean intensity in a T1w."""
MRF = "[0.2,1x1x1]"
ATROPOS_ITERATIONS = 5
"""antspyx's own defaults for the Markov random field and the convergence of Atropos."""
DIRECT_ITERATIONS, DIRECT_RATE = 10, 0.25
INTEGRATION_POINTS, INVERSE_ITERATIONS = 5, 5
"""Of KellyKapowski, for about four minutes of a core per brain; its defaults (45 steps of 0.025,
10 points, 20 iterations) need half an hour. In a block of 50 mm, the mean is 2.36 mm with these,
and 2.55 or 2.71 mm with 10 or 20 steps of 0.1 and 10 points. The correlation of the voxels between
the first two is 0.99. So compare images, not absolute values."""
SMOOTHING = 1.5
"""antspyx's default for the gradient field, voxels."""


@dataclass(frozen=True, eq=False)
class Tissues:
    """What Atropos yields.

    Attributes
    ----------
    labels : (i, j, k) uint8 array
        ``CLASSES``, 0 outside the mask.
    grey, white : (i, j, k) float32 arrays
        Probabilities.
    """

    labels: NDArray[np.uint8]
    grey: NDArray[np.float32]
    white: NDArray[np.float32]


def tissue_classes(image: NDArray[np.floating[Any]], inside: NDArray[np.bool_]) -> Tissues:
    """Three classes by Atropos, started from k-means.

    Raises
    ------
    InputError
        If the image has fewer than three different values inside, or a class remains empty.
    """
    if len(np.unique(image[inside][:10000])) < len(CLASSES):
        raise InputError("Atropos: the image has fewer than three different values in the mask.")
    import ants

    result = ants.atropos(
        a=_ants_image(np.where(inside, image, 0)),
        x=_ants_image(inside),
        i=f"kmeans[{len(CLASSES)}]",
        m=MRF,
        c=f"[{ATROPOS_ITERATIONS},0]",
        r=0,  # a fixed seed
    )
    labels = result["segmentation"].numpy().astype(np.uint8)
    empty = [name for name, label in CLASSES.items() if not (labels == label).any()]
    if empty:
        raise InputError(f"Atropos: no voxel of {', '.join(empty)}. Is it a T1w brain?")
    grey, white = (
        result["probabilityimages"][CLASSES[name] - 1].numpy() for name in ("grey", "white")
    )
    return Tissues(labels, grey, white)


def cortical_thickness(tissues: Tissues) -> NDArray[np.float32]:
    """(i, j, k) thickness in mm of the grey matter by KellyKapowski; 0 elsewhere."""
    import ants

    thickness: NDArray[np.float32] = ants.kelly_kapowski(
        s=_ants_image(tissues.labels),
        g=_ants_image(tissues.grey),
        w=_ants_image(tissues.white),
        its=DIRECT_ITERATIONS,
        r=DIRECT_RATE,
        m=SMOOTHING,
        n=INTEGRATION_POINTS,
        p=INVERSE_ITERATIONS,
        gm_label=CLASSES["grey"],
        wm_label=CLASSES["white"],
        verbose=0,
    ).numpy()
    return thickness


def _ants_image(data: NDArray[Any]) -> Any:
    import ants

    return ants.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
