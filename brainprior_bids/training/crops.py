# SPDX-License-Identifier: Apache-2.0
"""Training crops of prepared brains: choice, pose, contrast.

Crop number n is a function of (seed, n) alone, so any process can make it, and a resumed training
receives the same crops as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import PchipInterpolator
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils.data import Dataset

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.unet import CONTRASTS
from brainprior_bids.training.averaged import averaged_brain
from brainprior_bids.training.preprocess import UNIT, Brain
from brainprior_bids.training.surroundings import draw_surroundings, no_surroundings

TABLE = np.arange(256) / UNIT
"""Intensity of each stored value."""


def intensity_curve(
    tissues: NDArray[np.float64], contrast: str, rng: np.random.Generator
) -> NDArray[np.float32]:
    """(256,) a random intensity for each stored value of a T1w brain: real anatomy, new contrast.

    A monotone-piecewise curve (PCHIP) through fluid, grey and white matter:

    - T1w: the three shifted a little, as between scanners and sequences;
    - T2w: fluid 0.9-1.05, grey 0.36-0.5, white 0.25-0.36 (ratios of published T2 statistics);
    - FLAIR: fluid 0.05-0.2, grey 0.75-0.95, white 0.78-0.9 of grey;
    - unknown: any three values.

    Stored 0 stays 0: it is the background.
    """
    fluid, grey, white = tissues
    knots = np.array([0.0, 0.5 * fluid, grey, white, 256 / UNIT])
    if contrast == "T1w":
        shift = rng.normal(0, [0.02, 0.035, 0.02])
        values = knots + np.array([0.0, *shift, 0.0])
    elif contrast == "T2w":
        g = rng.uniform(0.36, 0.5)
        w = g * rng.uniform(0.68, 0.8)
        values = np.array([1.05, rng.uniform(0.9, 1.05), g, w, 0.7 * w])
    elif contrast == "FLAIR":
        f, g = rng.uniform(0.05, 0.2), rng.uniform(0.75, 0.95)
        w = g * rng.uniform(0.78, 0.9)
        values = np.array([0.7 * f, f, g, w, w * rng.uniform(0.9, 1.1)])
    else:
        values = rng.uniform(0.05, 1.0, 5)
        values /= values[1:4].max()
    curve = np.clip(PchipInterpolator(knots, values)(TABLE), 0.0, None)
    curve[0] = 0
    return curve.astype(np.float32)


@dataclass(frozen=True)
class Mix:
    """Relative frequency of each kind of crop; the numbers need not sum to 1. ``real``: an
    unmodified scan. ``curved``: a real T1w through ``intensity_curve``. ``synthetic``: a brain
    made from a label map.
    """

    real: float = 0.6
    curved: dict[str, float] = field(
        default_factory=lambda: {"T1w": 0.1, "T2w": 0.1, "FLAIR": 0.03, "unknown": 0.04}
    )
    synthetic: dict[str, float] = field(
        default_factory=lambda: {"T2w": 0.07, "FLAIR": 0.03, "unknown": 0.03}
    )


class Crops(Dataset[dict[str, Tensor]]):
    """``crops[n]``: image (1, c, c, c) float32, matrix (4, 4) voxel to MNI305 mm, contrast (); and
    as in ``Surroundings``, head (1, c, c, c) with the brain, region and near (1, c, c, c) bool.

    Parameters
    ----------
    brains : sequence of Brain
    size : int
        Edge of the crop in voxels.
    seed : int
    mix : Mix
    pose : bool
        Random pose (half the crops: rotation ±15° about each axis, scale ±10 %; all: left-right
        flip, and 2 mm, 1 % and 1° of error in the affine) or none.
    unknown : float
        Share of crops whose contrast is hidden from the network.
    surroundings : bool
        Whether the brains have surroundings, of which the image contains a rim.
    edge : int
        Of a voxel, mm. Above 1: means of blocks of this edge (``averaged_brain``), without
        surroundings.
    """

    def __init__(
        self,
        brains: Sequence[Brain],
        *,
        size: int,
        seed: int,
        mix: Mix | None = None,
        pose: bool = True,
        unknown: float = 0.1,
        surroundings: bool = False,
        edge: int = 1,
    ) -> None:
        mix = mix or Mix()
        self.brains, self.size, self.seed, self.edge = list(brains), size, seed, edge
        self.pose, self.unknown = pose, unknown
        self.surroundings = surroundings and edge == 1
        self.kinds: list[tuple[list[int], str | None]] = []  # candidates, contrast of the curve
        shares = []
        scans = [n for n, b in enumerate(self.brains) if not b.synthetic]
        t1w = [n for n in scans if self.brains[n].contrast == "T1w"]
        self._add(shares, scans, None, mix.real)
        for contrast in CONTRASTS:
            self._add(shares, t1w, contrast, mix.curved.get(contrast, 0))
            synthetic = [
                n for n, b in enumerate(self.brains) if b.synthetic and b.contrast == contrast
            ]
            self._add(shares, synthetic, None, mix.synthetic.get(contrast, 0))
        if not self.kinds:
            raise UsageError("Crops: there is no brain of any kind in the mix.")
        self.shares = np.array(shares) / sum(shares)

    def _add(
        self, shares: list[float], candidates: list[int], curve: str | None, share: float
    ) -> None:
        if candidates and share > 0:
            self.kinds.append((candidates, curve))
            shares.append(share)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, index])
        candidates, curve = self.kinds[rng.choice(len(self.kinds), p=self.shares)]
        brain = self.brains[candidates[rng.integers(len(candidates))]]
        table = TABLE.astype(np.float32)
        contrast = brain.contrast
        if curve is not None:
            table, contrast = intensity_curve(brain.tissues, curve, rng), curve
        if self.edge > 1:
            image, matrix = averaged_brain(brain, table, self.size, self.edge, rng)
        else:
            image, matrix = draw_crop(brain, table, self.size, rng, pose=self.pose)
        around = no_surroundings(image.shape)
        if self.surroundings:
            around = draw_surroundings(image > 0, contrast, rng)
        if rng.random() < self.unknown:
            contrast = "unknown"
        return {
            "image": torch.from_numpy(image + around.head * around.region)[None],
            "head": torch.from_numpy(image + around.head)[None],
            "region": torch.from_numpy(around.region)[None],
            "near": torch.from_numpy(around.near)[None],
            "matrix": torch.from_numpy(matrix).float(),
            "contrast": torch.tensor(CONTRASTS.index(contrast)),
        }


def draw_crop(
    brain: Brain,
    table: NDArray[np.float32],
    size: int,
    rng: np.random.Generator,
    *,
    pose: bool,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """(size, size, size) intensities and the (4, 4) matrix from its voxels to MNI305 mm.

    Centred on a random voxel of the brain (7 of 10) or of its box, so that crops include borders
    and background; voxels beyond the box are 0. Turned crops are cubic-spline interpolated.
    """
    shape = np.array(brain.data.shape)
    centre = rng.uniform(0, shape)
    if rng.random() < 0.7:
        for _ in range(20):
            if brain.data[tuple(centre.astype(int))]:
                break
            centre = rng.uniform(0, shape)
    turned = pose and rng.random() < 0.5
    linear = np.eye(3)
    if turned:
        angles = rng.uniform(-15, 15, 3)
        linear = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(
            1 / rng.uniform(0.9, 1.1, 3)
        )
    else:
        centre = np.floor(centre)
    if pose and rng.random() < 0.5:  # mirror the anatomy; see below for its place in MNI305
        linear = linear @ np.diag([-1.0, 1.0, 1.0])
    to_brain = np.eye(4)  # crop voxel -> brain voxel
    to_brain[:3, :3] = linear
    to_brain[:3, 3] = centre - linear @ np.full(3, size // 2)
    crop = resample(brain.data, table, to_brain, size, turned=turned)
    matrix = brain.to_mni305 @ to_brain
    if np.linalg.det(linear) < 0:
        matrix = np.diag([-1.0, 1.0, 1.0, 1.0]) @ matrix  # a mirrored brain, left still left
    if pose:
        error = np.eye(4)
        error[:3, :3] = Rotation.from_rotvec(
            rng.normal(0, 1, 3), degrees=True
        ).as_matrix() * rng.normal(1, 0.01, 3)
        error[:3, 3] = rng.normal(0, 2, 3)
        matrix = error @ matrix
    return crop, matrix


def resample(
    data: NDArray[np.uint8],
    table: NDArray[np.float32],
    to_brain: NDArray[np.float64],
    size: int,
    *,
    turned: bool,
) -> NDArray[np.float32]:
    """The crop: cubic spline inside the (linearly carried) mask if turned, else exact copying."""
    corners = np.array(np.meshgrid(*[[0, size - 1]] * 3, indexing="ij")).reshape(3, -1)
    reach = to_brain[:3, :3] @ corners + to_brain[:3, 3:]
    margin = 8 if turned else 0  # where the spline's prefilter has died away
    low = np.floor(reach.min(1)).astype(int) - margin
    high = np.ceil(reach.max(1)).astype(int) + 1 + margin
    inside = [
        slice(max(a, 0), max(min(b, n), 0)) for a, b, n in zip(low, high, data.shape, strict=True)
    ]
    box = np.zeros(high - low, np.float32)
    mask = np.zeros(high - low, np.float32)
    target = tuple(
        slice(s.start - a, max(s.stop - a, s.start - a)) for s, a in zip(inside, low, strict=True)
    )
    part = data[tuple(inside)]
    if part.size:
        box[target] = table[part]
        mask[target] = part > 0
    if not turned:
        flipped = to_brain[0, 0] < 0
        return np.ascontiguousarray(box[::-1] if flipped else box)
    linear, offset = to_brain[:3, :3], to_brain[:3, 3] - low
    values = ndimage.affine_transform(box, linear, offset, (size,) * 3, order=3)
    carried = ndimage.affine_transform(mask, linear, offset, (size,) * 3, order=1)
    return np.where(carried > 0.5, np.maximum(values, 0), 0).astype(np.float32)


def matrix_points(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """(n, 4, 4) voxel to mm -> (n, 3, i, j, k) mm of every voxel."""
    axes = [torch.arange(size, device=matrix.device, dtype=matrix.dtype) for size in shape]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return (
        torch.einsum("nab,bijk->naijk", matrix[:, :3, :3], voxels)
        + matrix[:, :3, 3, None, None, None]
    )
