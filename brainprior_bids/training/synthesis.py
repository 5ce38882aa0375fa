# SPDX-License-Identifier: Apache-2.0
"""Synthetic brains and heads from label maps: SynthSeg's recipe.

Two generators:

- :func:`synthesise_brain` draws the intensities of one brain at the label map's own resolution
  (about 1 mm) with published statistics of T1w and T2w scans, for the prior;
- :class:`HeadSynthesiser` draws a deformed whole head of random contrast, resolution and quality
  at 2 mm together with its labels, for the parcellation.

Label maps contain FreeSurfer values, 24 for cerebrospinal fluid around the brain and 502-530 for
tissues outside it (the convention of SynthSeg's training maps). The intensity statistics are
those published with SynthSR (``prior_means_t1_hr``, ``prior_means_t2``) and SynthSeg
(``prior_means_t1``), copied below: mean and SD over scans of a structure's mean, and of its SD.

References: Billot et al., SynthSeg, doi:10.1016/j.media.2023.102789; Iglesias et al., SynthSR,
doi:10.1126/sciadv.add3607.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.parcellation_network import normalise_intensity

CONTRASTS = ("T1w", "T2w", "FLAIR", "unknown")

LEFT_RIGHT = {
    **dict(zip((2, 3, 4, 5, 7, 8), (41, 42, 43, 44, 46, 47), strict=True)),
    **dict(zip((10, 11, 12, 13, 17, 18), (49, 50, 51, 52, 53, 54), strict=True)),
    **dict(zip((25, 26, 28, 30, 31, 136, 137), (57, 58, 60, 62, 63, 163, 164), strict=True)),
}
"""Left value -> right value of every sided structure."""

BRAIN = (2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 26, 28)
"""Left and middle structures with labels of their own; their right partners are in LEFT_RIGHT."""

MERGED_INTO = {25: 2, 57: 41, 30: 12, 62: 51, 136: 4, 163: 43, 137: 5, 164: 44, 31: 4, 63: 43}
"""Small parts -> the structure with which they are merged: lesions, vessels, plexus."""

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
    """The brain mask as from skull-stripping programs: structures and the fluid between the gyri.

    The structures are closed with a ball, so that sulci are inside, one voxel of fluid is kept
    around them, and other tissue (bone, veins) is excluded.

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
    compressed (55 + 0.65 T2), so that grey matter is brighter than white matter; fluid suppressed
    to 18 +- 6, plexus 90, SDs multiplied by 0.6. Unknown: uniform means and SDs.
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
        :func:`brain_mask` of ``labels`` if already computed (it takes seconds).
    blur : float, optional
        SD of the partial-volume Gaussian in voxels; drawn from 0.35-0.65 if not given.

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


# --- whole heads -------------------------------------------------------------------------------

SKULL, OUTER_CSF, HEAD = 165, 257, 258
"""FreeSurfer's values of skull, fluid outside the brain mask, and other tissue of the head."""

CLASSES = (
    0,
    *BRAIN,
    *(LEFT_RIGHT[value] for value in BRAIN if value in LEFT_RIGHT),
    CSF,
    SKULL,
    OUTER_CSF,
    HEAD,
)
"""Label values that the parcellation distinguishes, in the order of the network's channels."""

_CLASS_OF_OUTSIDE = {502: OUTER_CSF, 514: OUTER_CSF, 515: SKULL, 516: SKULL}

_T1_OUTSIDE = {
    0: (7, 5), 502: (126, 84), 506: (18, 14), 507: (94, 49), 508: (117, 65), 509: (70, 25),
    511: (114, 75), 512: (68, 36), 514: (48, 20), 515: (30, 22), 516: (94, 43), 530: (144, 45),
}  # fmt: skip
"""SynthSeg's published T1w statistics (mean, SD) of tissue outside the brain, 0-255."""

_T2_OUTSIDE = {
    0: (0, 8), 502: (5, 60), 506: (180, 255), 507: (25, 200), 508: (40, 200), 509: (80, 250),
    511: (15, 220), 512: (55, 95), 514: (5, 120), 515: (3, 50), 516: (15, 170), 530: (55, 130),
}  # fmt: skip
"""Ranges for T2-like heads, 0-255: bright fluid, dark cortical bone, fat of any intensity."""


def mean_t1_head(labels: NDArray[np.integer]) -> NDArray[np.float32]:
    """A T1w-like head without randomness: every label at its published mean, 0-255."""
    values = np.unique(labels)
    mean_of = np.zeros(int(values.max()) + 1, np.float32)
    for value in values:
        if value in _T1_OUTSIDE:
            mean_of[value] = _T1_OUTSIDE[int(value)][0]
        else:
            mean_of[value] = _T1.get(_statistics_key(int(value)), _T1[4])[0] * 160 / 226
    return mean_of[labels]


@dataclass(frozen=True)
class HeadMap:
    """The labels of one head, prepared for drawing.

    Parameters
    ----------
    codes : (i, j, k) uint8 tensor
        Index into ``values``; voxels of about 1 mm, RAS order.
    values : tuple of int
        Label value of every code; 24 occurs twice, inside and outside the brain mask.
    targets : (codes,) int64 tensor
        Channel of :data:`CLASSES` of every code.
    centre : (3,) tensor
        Centre of the brain mask's box, voxels.
    surface : (n, 3) tensor
        Points on the brain's surface, voxels.
    """

    codes: Tensor
    values: tuple[int, ...]
    targets: Tensor
    centre: Tensor
    surface: Tensor

    @classmethod
    def from_labels(cls, labels: NDArray[np.integer]) -> HeadMap:
        """Prepare a label map of about 1 mm in RAS order."""
        mask = brain_mask(labels)
        box = bounding_box(labels > 0, 2)
        labels, mask = labels[box], mask[box]
        present = [int(v) for v in np.unique(labels)]
        values = [*present, CSF]
        lookup = np.zeros(max(present) + 1, np.uint8)
        lookup[present] = np.arange(len(present))
        codes = lookup[labels]
        codes[(labels == CSF) & ~mask] = len(present)
        targets = []
        for code, value in enumerate(values):
            merged = MERGED_INTO.get(value, value)
            if value == CSF:
                merged = OUTER_CSF if code == len(present) else CSF
            elif merged not in CLASSES:
                merged = _CLASS_OF_OUTSIDE.get(value, HEAD) if value >= 500 else CSF
            targets.append(CLASSES.index(merged))
        inside = np.argwhere(mask)
        shell = np.argwhere(mask & ~ndimage.binary_erosion(mask))[::37]
        return cls(
            codes=torch.from_numpy(codes),
            values=tuple(values),
            targets=torch.tensor(targets),
            centre=torch.from_numpy((inside.min(0) + inside.max(0)) / 2).float(),
            surface=torch.from_numpy(shell).float(),
        )


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _smooth_field(
    shape: tuple[int, ...], nodes: int, generator: torch.Generator, channels: int = 1
) -> Tensor:
    """(channels, i, j, k) of unit-variance nodes, linearly interpolated."""
    coarse = torch.randn((1, channels, nodes, nodes, nodes), generator=generator)
    field = functional.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)
    return field[0]


def slice_matrix(
    n: int, voxel_mm: float, thickness_mm: float, spacing_mm: float, phase: float
) -> tuple[Tensor, Tensor]:
    """Slices of a box profile and the linear interpolation back to voxels.

    Parameters
    ----------
    n : int
        Voxels along the axis.
    phase : float
        Position of the first slice within one spacing, 0-1.

    Returns
    -------
    average : (slices, n) tensor
        Rows sum to 1.
    interpolate : (n, slices) tensor
        Rows sum to 1.
    """
    positions = torch.arange(n) * voxel_mm
    centres = torch.arange((phase - 0.5) * spacing_mm, float(positions[-1]), spacing_mm)
    low = torch.maximum(centres[:, None] - thickness_mm / 2, positions - voxel_mm / 2)
    high = torch.minimum(centres[:, None] + thickness_mm / 2, positions + voxel_mm / 2)
    average = (high - low).clamp_min(0)
    covered = average.sum(1) > 0
    average, centres = average[covered], centres[covered]
    average = average / average.sum(1, keepdim=True)
    if len(centres) == 1:
        return average, torch.ones((n, 1))
    interpolate = (1 - (positions[:, None] - centres).abs() / spacing_mm).clamp_min(0)
    interpolate[positions <= centres[0], 0] = 1.0
    interpolate[positions >= centres[-1], -1] = 1.0
    return average, interpolate / interpolate.sum(1, keepdim=True)


def _along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Apply an (m, n) matrix along one axis of a 3-D tensor."""
    return torch.movedim(torch.movedim(x, axis, -1) @ matrix.T, -1, axis)


@dataclass(frozen=True)
class HeadSettings:
    """Settings of one synthetic head; None means random.

    Parameters
    ----------
    contrast : {"T1w", "T2w", "FLAIR", "unknown"}, optional
    thickness_mm : float, optional
        Slice thickness; 2 or less leaves the grid's own resolution.
    slice_axis : int, optional
    deform, damage : bool
        Pose and elastic deformation; cropping, defacing, skull-stripping.
    noise_sd : float, optional
        In units of the bright tissue.
    """

    contrast: str | None = None
    thickness_mm: float | None = None
    slice_axis: int | None = None
    deform: bool = True
    damage: bool = True
    noise_sd: float | None = None


class HeadSynthesiser:
    """Draw 2 mm heads and their labels from 1 mm label maps.

    Each draw: pose (rotation up to 20 degrees, scale, shear, shift), elastic deformation,
    left-right flip with exchanged labels, intensities by structure (published T1w or T2w
    statistics, a FLAIR rule, or uniform), patchy tissue outside the brain, bias field, damage
    (field of view cut off, face removed, brain stripped), slices up to 9 mm or low isotropic
    resolution, Rician noise, gamma.

    Parameters
    ----------
    heads : list of HeadMap
    shape : (i, j, k)
        Voxels of the drawn window.
    voxel_mm : float
        Size of these voxels.
    """

    def __init__(
        self,
        heads: list[HeadMap],
        shape: tuple[int, int, int] = (80, 96, 80),
        voxel_mm: float = 2.0,
    ) -> None:
        self.heads = heads
        self.shape = shape
        self.voxel_mm = voxel_mm

    def draw(
        self,
        generator: torch.Generator,
        settings: HeadSettings | None = None,
        index: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One head.

        Returns
        -------
        image : (1, i, j, k) float32 tensor
            Bright tissue about 1, see ``normalise_intensity``.
        target : (i, j, k) int64 tensor
            Channel of :data:`CLASSES`.
        """
        settings = settings or HeadSettings()
        if index is None:
            index = int(torch.randint(len(self.heads), (), generator=generator))
        head = self.heads[index]
        points = self._points(head, generator, settings)
        flip = settings.deform and _uniform(generator, 0, 1) < 0.5
        values = [_mirrored(v) for v in head.values] if flip else list(head.values)
        if flip:
            points = points.flip(0)
        mean_of, sd_of = self._intensities(values, generator, settings)
        image, codes = self._sample(head, points, mean_of, sd_of, generator)
        targets = head.targets
        if flip:
            mirrored = [CLASSES.index(_mirrored(CLASSES[int(t)])) for t in targets]
            targets = torch.tensor(mirrored)
        target = targets[codes]
        image = self._outside_texture(image, target, generator)
        amount = _uniform(generator, 0.0, 0.5)
        nodes = int(torch.randint(3, 6, (), generator=generator))
        image = image * torch.exp(amount * _smooth_field(self.shape, nodes, generator)[0])
        if settings.damage:
            image, target = self._damage(image, target, head, points, generator)
        image = self._acquire(image, generator, settings)
        image = normalise_intensity(image)
        if settings.contrast is None:
            image = image ** float(np.exp(0.25 * float(torch.randn((), generator=generator))))
            image = image * _uniform(generator, 0.7, 1.4)
        return image[None], target

    def _points(self, head: HeadMap, generator: torch.Generator, settings: HeadSettings) -> Tensor:
        """(i, j, k, 3) label-map voxel coordinates of the window."""
        size = torch.tensor(self.shape)
        axes = [(torch.arange(n) - (n - 1) / 2) * self.voxel_mm for n in self.shape]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        if not settings.deform:
            return grid + head.centre
        angles = torch.deg2rad((torch.rand(3, generator=generator) * 2 - 1) * 20)
        rotation = _rotation(angles)
        scale = 1 + (torch.rand(3, generator=generator) * 2 - 1) * 0.08
        scale = scale * _uniform(generator, 0.88, 1.14)
        shear = torch.eye(3) + torch.triu(torch.randn((3, 3), generator=generator) * 0.04, 1)
        matrix = rotation @ torch.diag(scale) @ shear
        shift = (torch.rand(3, generator=generator) * 2 - 1) * torch.tensor([12.0, 16.0, 16.0])
        if _uniform(generator, 0, 1) < 0.3:  # more of the face and neck
            shift[1:] += torch.tensor([_uniform(generator, -10, 50), _uniform(generator, -60, 0)])
        points = (grid + shift) @ matrix.T + head.centre
        nodes = int(torch.randint(4, 10, (), generator=generator))
        strength = _uniform(generator, 0.0, 16.0 / nodes)
        field = _smooth_field(tuple(size.tolist()), nodes, generator, channels=3)
        return points + strength * torch.movedim(field, 0, -1)

    def _intensities(
        self, values: list[int], generator: torch.Generator, settings: HeadSettings
    ) -> tuple[Tensor, Tensor]:
        """Mean and SD of every code."""
        seed = int(torch.randint(2**31, (), generator=generator))
        rng = np.random.default_rng(seed)
        contrast = settings.contrast or str(rng.choice(CONTRASTS, p=(0.27, 0.23, 0.12, 0.38)))
        brain = _brain_intensities(contrast, rng)
        if settings.contrast is None and contrast != "unknown":  # other scanners, other protocols
            brain = {k: (m * rng.uniform(0.88, 1.12), s) for k, (m, s) in brain.items()}
            fluid = brain[4]
            brain[4] = (fluid[0] * rng.uniform(0.5, 1.1), fluid[1])
        outside = {}
        for value in (0, *OUTSIDE):
            if contrast == "T1w":
                mean, sd = _T1_OUTSIDE[value]
                mean = mean + 0.5 * sd * rng.standard_normal()
            elif contrast == "unknown":
                mean = rng.uniform(0, 240) if value else rng.uniform(0, 12)
            else:
                low, high = _T2_OUTSIDE[value]
                mean = rng.uniform(low, high)
                if value == 506 and contrast == "FLAIR":
                    mean = rng.uniform(5, 60)
            sd = rng.uniform(2, 25) if value else rng.uniform(0, 5)
            outside[value] = (max(mean, 0.0), sd)
        if contrast == "unknown" and rng.random() < 0.5:  # real bone has little signal
            outside[515] = (rng.uniform(0, 50), outside[515][1])
        drawn = [
            outside[v] if v in outside else brain.get(_statistics_key(v), brain[4]) for v in values
        ]
        mean_of = torch.tensor([mean for mean, _ in drawn], dtype=torch.float32)
        sd_of = torch.tensor([sd for _, sd in drawn], dtype=torch.float32)
        return mean_of, sd_of

    def _sample(
        self,
        head: HeadMap,
        points: Tensor,
        mean_of: Tensor,
        sd_of: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Image and codes on the window; partial volume by blurring before sampling."""
        low = points.reshape(-1, 3).amin(0).floor().long() - 5
        high = points.reshape(-1, 3).amax(0).ceil().long() + 6
        stop = torch.tensor(head.codes.shape)
        low, high = low.clamp_min(0), torch.minimum(high, stop)
        low = torch.minimum(low, high - 10)
        part = head.codes[tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))]
        volume = mean_of[part.int()][None, None]
        passes = 2 * int(torch.randint(1, 4, (), generator=generator))
        for _ in range(passes):
            volume = _halfway(volume)
        image = _grid_sample(volume, points - low - passes / 2, "bilinear")
        codes = _grid_sample(part.float()[None, None], points - low, "nearest").long()
        noise = 0.5 * torch.randn(self.shape, generator=generator)
        image = image + sd_of[codes] * noise
        return image.clamp_min(0), codes

    def _outside_texture(
        self, image: Tensor, target: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Add patches of other intensities outside the brain, like those of muscle and fat."""
        outside = (target == CLASSES.index(HEAD)) | (target == CLASSES.index(SKULL))
        strength = _uniform(generator, 0.0, 0.9)
        nodes = int(torch.randint(6, 24, (), generator=generator))
        field = _smooth_field(self.shape, nodes, generator)[0]
        patches = torch.tanh(3 * (field - _uniform(generator, -0.5, 0.5)))
        return torch.where(outside, image * torch.exp(strength * patches), image)

    def _damage(
        self,
        image: Tensor,
        target: Tensor,
        head: HeadMap,
        points: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Strip, deface and crop the head, each at random."""
        keep = torch.ones(self.shape, dtype=torch.bool)
        if _uniform(generator, 0, 1) < 0.08:
            inside = (target > 0) & (target < CLASSES.index(SKULL))
            if _uniform(generator, 0, 1) < 0.4:
                inside |= target == CLASSES.index(OUTER_CSF)
            keep &= inside
        if _uniform(generator, 0, 1) < 0.55:
            keep &= ~self._face(head, points, generator)
        if _uniform(generator, 0, 1) < 0.45:
            for axis in range(3):
                cut = 40 if axis == 2 else 20
                start = int(_uniform(generator, -cut, cut) / self.voxel_mm)
                stop = int(_uniform(generator, -cut, 0.7 * cut) / self.voxel_mm)
                index = torch.arange(self.shape[axis])
                inside_axis = (index >= start) & (index < self.shape[axis] - max(stop, 0))
                view = [1, 1, 1]
                view[axis] = -1
                keep &= inside_axis.reshape(view)
        return image * keep, torch.where(keep, target, 0)

    def _face(self, head: HeadMap, points: Tensor, generator: torch.Generator) -> Tensor:
        """The region that a defacing tool removes: in front of and below one or two planes."""
        removed = torch.ones(self.shape, dtype=torch.bool)
        for _ in range(1 if _uniform(generator, 0, 1) < 0.5 else 2):
            angle = np.deg2rad(_uniform(generator, 5, 75))
            normal = torch.tensor([0.0, float(np.cos(angle)), -float(np.sin(angle))])
            reach = (head.surface @ normal).max() + _uniform(generator, 0, 25)
            removed &= (points @ normal) > reach
        return removed

    def _acquire(
        self, image: Tensor, generator: torch.Generator, settings: HeadSettings
    ) -> Tensor:
        """Simulate slices, resolution and noise; interpolate linearly back to the window."""
        image = image / (image.max() * 0.8 + 1e-6)
        choice = _uniform(generator, 0, 1)
        thickness = settings.thickness_mm
        widths = [self.voxel_mm] * 3
        if thickness is not None:
            axis = 2 if settings.slice_axis is None else settings.slice_axis
            widths[axis] = thickness
        elif choice < 0.5:
            axis = int(torch.randint(3, (), generator=generator))
            widths[axis] = _uniform(generator, 3.0, 9.0)
        elif choice < 0.65:
            widths = [_uniform(generator, 2.0, 4.0)] * 3
        back = []
        for axis, width in enumerate(widths):
            if width <= self.voxel_mm:
                continue
            gap = 1.0 if thickness is not None else _uniform(generator, 1.0, 1.25)
            average, interpolate = slice_matrix(
                self.shape[axis], self.voxel_mm, width, width * gap, _uniform(generator, 0, 1)
            )
            image = _along(image, average, axis)
            back.append((axis, interpolate))
        sd = settings.noise_sd
        if sd is None:
            sd = 0.1 * _uniform(generator, 0, 1) ** 2
        real = image + sd * torch.randn(image.shape, generator=generator)
        imaginary = sd * torch.randn(image.shape, generator=generator)
        measured = image > 0
        image = torch.where(measured, torch.sqrt(real**2 + imaginary**2), image)
        for axis, interpolate in back:
            image = _along(image, interpolate, axis)
        return image


def _mirrored(value: int) -> int:
    """The label on the other side; midline values are unchanged."""
    other = LEFT_RIGHT | {right: left for left, right in LEFT_RIGHT.items()}
    return other.get(value, value)


def _rotation(angles: Tensor) -> Tensor:
    """(3, 3) rotation about x, then y, then z; angles in radians."""
    matrix = torch.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [i for i in range(3) if i != axis]
        step = torch.eye(3)
        step[a, a] = step[b, b] = torch.cos(angle)
        step[a, b], step[b, a] = -torch.sin(angle), torch.sin(angle)
        matrix = step @ matrix
    return matrix


def _grid_sample(volume: Tensor, points: Tensor, mode: str) -> Tensor:
    """(1, 1, i, j, k) at (a, b, c, 3) voxel coordinates -> (a, b, c); zero outside."""
    size = torch.tensor(volume.shape[2:]) - 1
    locations = (points / size * 2 - 1).flip(-1)[None]  # grid_sample expects the last axis first
    return functional.grid_sample(volume, locations, mode=mode, align_corners=True)[0, 0]


def _halfway(volume: Tensor) -> Tensor:
    """Mean of neighbours along the last three axes: one voxel smaller, shifted by half a voxel."""
    for axis in (2, 3, 4):
        n = volume.shape[axis] - 1
        volume = volume.narrow(axis, 0, n) + volume.narrow(axis, 1, n)
    return volume.mul_(1 / 8)
