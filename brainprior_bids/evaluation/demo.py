# SPDX-License-Identifier: Apache-2.0
"""The demo data set: ``python -m brainprior_bids.evaluation.demo OUT``.

One simulated participant: the ICBM152 average brain that nilearn provides, inside a synthetic head
(subarachnoid fluid, two tables of skull with marrow between, fat and skin, eyes, airways, jaw,
neck), with a simulated clinical scan: tilted axial slices of 1 x 1 x 5 mm, a bias field and noise.
It shows that the program runs. An average brain is smooth already, so it does not show how well an
individual brain is restored.

Every run writes the same bytes: all random numbers derive from ``SEED``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nilearn import datasets
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.bids.derivatives import BIDS_VERSION
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.degrade import Recipe, degrade

SEED = 152
TILT_DEG = (9.0, -4.0, 3.0)  # pitch, roll and yaw of the slices relative to the head
FOV_MM = (192, 224, 175)
CENTRE_MM = (0.0, -14.0, 6.0)  # MNI152 coordinates of the middle of the field of view
RECIPE = Recipe(noise_sd=0.015, bias_sd=0.12, rician=True)
SCANNER_UNIT = 700.0  # scanner units of the brain's 99th percentile

_PAD = ((4, 4), (6, 14), (44, 12))  # voxels around the template for face, neck and scalp

# T1w intensities, relative to bright white matter = 1
_FLUID, _BONE, _MARROW, _FAT, _SKIN, _MUSCLE, _AIR = 0.22, 0.07, 0.55, 1.15, 0.55, 0.42, 0.01


@dataclass(frozen=True)
class Demo:
    """The demo scan, and the truth from which it was simulated.

    Attributes
    ----------
    scan, scan_grid
        (i, j, k) float32 in scanner units; the oblique 1 x 1 x 5 mm grid.
    truth, brain, grid
        The whole head and the brain mask (bool) on the aligned 1 mm grid, no bias, no noise.
    """

    scan: NDArray[np.float32]
    scan_grid: Grid
    truth: NDArray[np.float32]
    brain: NDArray[np.bool_]
    grid: Grid


def make_demo() -> Demo:
    """Build the head, resample it to the tilted grid and simulate the scan."""
    rng = np.random.default_rng(SEED)
    head, brain, head_grid = _head(rng)
    grid = _tilted_grid()
    index = np.linalg.inv(head_grid.affine) @ grid.affine

    def move(volume: NDArray[Any], order: int) -> NDArray[np.float32]:
        return ndimage.affine_transform(
            np.asarray(volume, np.float32),
            index[:3, :3],
            index[:3, 3],
            output_shape=grid.shape,
            order=order,
        )

    truth = np.maximum(move(head, 3), 0) * np.float32(SCANNER_UNIT)
    inside = move(brain, 1) > 0.5
    scan, scan_grid = degrade(truth, grid, RECIPE, rng, unit=SCANNER_UNIT)
    return Demo(scan, scan_grid, truth, inside, grid)


def write_demo(out: Path) -> Path:
    """Write the demo as a BIDS data set.

    Raises
    ------
    UsageError
        If ``out`` exists and is not a folder, or contains anything other than an earlier demo.
    """
    description = out / "dataset_description.json"
    if out.exists() and not out.is_dir():
        raise UsageError(f"demo: expected a folder, {out} is a file. Name another one.")
    if out.is_dir() and any(out.iterdir()):
        known = description.is_file() and _DESCRIPTION["Name"] in description.read_text("utf-8")
        if not known:
            raise UsageError(f"demo: {out} contains other files. Name an empty or a new folder.")
    demo = make_demo()
    anat = out / "sub-01" / "anat"
    anat.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.round(demo.scan).astype(np.int16), np.array(demo.scan_grid.affine))
    image.set_sform(demo.scan_grid.affine, 1)
    image.set_qform(demo.scan_grid.affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_dim_info(slice=2)
    nib.save(image, anat / "sub-01_T1w.nii.gz")
    _write_json(
        anat / "sub-01_T1w.json",
        {
            "Modality": "MR",
            "MagneticFieldStrength": 1.5,
            "MRAcquisitionType": "2D",
            "SliceThickness": RECIPE.thickness_mm,
            "SpacingBetweenSlices": RECIPE.spacing_mm,
        },
    )
    _write_json(description, _DESCRIPTION)
    (out / "README").write_text(_README, encoding="utf-8")
    (out / "participants.tsv").write_text(
        "participant_id\tspecies\nsub-01\thomo sapiens\n", "utf-8"
    )
    _write_json(
        out / "participants.json",
        {"species": {"Description": "An average of 152 participants in a synthetic head"}},
    )
    return out


def _head(rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.bool_], Grid]:
    """The head on the padded template grid: (intensities, brain mask, grid)."""
    template = datasets.load_mni152_template(resolution=1)
    brain = template.get_fdata(dtype=np.float32)
    mask = brain > 0
    brain = np.pad(brain / np.percentile(brain[mask], 99), _PAD)
    mask = np.pad(mask, _PAD)
    affine = np.array(template.affine)
    affine[:3, 3] -= [before for before, _ in _PAD]
    grid = Grid(brain.shape, affine)
    x, y, z = grid.points_mm()

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Any:
        parts = zip((x, y, z), centre, radii, strict=True)
        return np.sqrt(sum(((axis - c) / r) ** 2 for axis, c, r in parts))

    def wobble(size_mm: float, sd: float) -> NDArray[np.float32]:
        step = max(1, int(size_mm / 2))  # smooth noise needs no fine grid
        coarse = rng.normal(size=[n // step + 2 for n in brain.shape]).astype(np.float32)
        noise = ndimage.gaussian_filter(coarse, size_mm / step)
        for axis, n in enumerate(brain.shape):  # linear interpolation, one axis after the other
            at = np.arange(n) / step
            knots = np.arange(noise.shape[axis])
            share = np.maximum(1 - np.abs(at[:, None] - knots), 0).astype(np.float32)
            noise = np.moveaxis(np.tensordot(share, noise, axes=(1, axis)), 0, axis)
        return noise / noise.std() * np.float32(sd)

    # depth: mm outside the closed surface of the brain
    closed = _close(mask, 14)
    depth = ndimage.distance_transform_edt(~closed).astype(np.float32) + wobble(9, 0.5)
    inner = 2.5 + wobble(14, 0.4)
    outer = inner + 6.5 + wobble(16, 1.0)
    surface = outer + 6.0 + wobble(18, 1.2)

    # face, jaw and neck below the skull
    neck = np.where(z < -20, np.hypot(x / 58, (y + 22) / 62), np.inf)
    face = np.minimum(ellipsoid((0, 42, -52), (64, 58, 68)), ellipsoid((0, 88, -38), (16, 22, 26)))
    soft = (face < 1) | (neck < 1) | (depth < surface)
    soft = ndimage.gaussian_filter(soft.astype(np.float32), 3) > 0.5
    under_skin = ndimage.distance_transform_edt(soft).astype(np.float32)

    head = np.full(brain.shape, _AIR, np.float32)
    head[soft] = _MUSCLE * (1 + wobble(2.5, 0.12))[soft]
    head[soft & (wobble(4, 1.0) > 1.3)] = 0.8 * _FAT  # fat between the muscles
    head[soft & (under_skin < 6 + wobble(8, 1.0))] = _FAT
    head[soft & (under_skin < 1.8)] = _SKIN

    jaw = np.abs(ellipsoid((0, 40, -84), (46, 48, 20)) - 0.95)
    head[soft & (jaw < 0.12)] = _BONE
    head[soft & (jaw < 0.05)] = _MARROW
    spine = np.hypot(x / 14, (y + 38 + 0.25 * (z + 72)) / 16)
    bony = (z < -78) & soft
    head[bony & (spine < 1.9)] = _BONE
    head[bony & (spine < 1.7) & (np.sin(z / 3.2) > -0.6)] = 0.8 * _MARROW
    head[bony & (spine < 0.75)] = _FLUID
    head[bony & (spine < 0.45)] = 0.8  # spinal cord

    nose = ellipsoid((0, 62, -46), (13, 26, 22))
    head[nose < 1] = np.where(np.sin(x / 2.2 + y / 9) > 0.2, _MUSCLE * 1.2, _AIR)[nose < 1]
    for airway in (
        ellipsoid((0, 20, -84), (9, 9, 34)),  # pharynx
        ellipsoid((28, 44, -56), (13, 15, 14)),  # maxillary sinuses
        ellipsoid((-28, 44, -56), (13, 15, 14)),
    ):
        head[airway < 1.1] = 0.6
        head[airway < 1] = _AIR

    skull = depth < outer
    head[skull] = _BONE
    marrow = (depth > inner + 2.0) & (depth < outer - 1.8)
    head[marrow] = (_MARROW * (1 + wobble(2, 0.2)))[marrow]
    head[ellipsoid((0, 66, -6), (22, 9, 11)) < 1] = _AIR  # frontal sinus, in front of the brain
    head[depth < inner + 0.8] = 0.5  # dura
    head[depth < inner] = _FLUID

    for side in (-1, 1):
        orbit = ellipsoid((32 * side, 58, -38), (19, 24, 18))
        eye = ellipsoid((32 * side, 66, -38), (12, 12, 12))
        head[(orbit < 1) & (depth > outer)] = _FAT
        head[eye < 1.12] = 0.45
        head[eye < 1] = 0.18
    head *= 1 + wobble(6, 0.04)

    share = np.clip(ndimage.gaussian_filter(mask.astype(np.float32), 0.6) * 2 - 1, 0, 1)
    head = np.where(mask, share * brain + (1 - share) * _FLUID, head)
    inside = ndimage.gaussian_filter(head, 0.5)  # no tissue border is sharper than a voxel
    return np.where(mask, head, inside).astype(np.float32), mask, grid


def _close(mask: NDArray[np.bool_], radius_mm: float) -> NDArray[np.bool_]:
    """Closing by a ball on a 1 mm grid, computed at 2 mm and then smoothed."""
    margin = int(radius_mm) + 2
    padded = np.pad(mask, margin)
    dilated = ndimage.distance_transform_edt(~padded[::2, ::2, ::2], sampling=2) <= radius_mm
    closed = ndimage.distance_transform_edt(dilated, sampling=2) > radius_mm
    fine = closed.astype(np.float32)
    for axis, n in enumerate(padded.shape):
        fine = np.repeat(fine, 2, axis=axis).take(range(n), axis=axis)
    inner = slice(margin, -margin)
    return (ndimage.gaussian_filter(fine, 2)[inner, inner, inner] > 0.5) | mask


def _tilted_grid() -> Grid:
    """1 mm voxels along the tilted axes of the scanner's slices."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", TILT_DEG, degrees=True).as_matrix()
    middle = (np.array(FOV_MM) - 1) / 2
    affine[:3, 3] = np.array(CENTRE_MM) - affine[:3, :3] @ middle
    return Grid(FOV_MM, affine)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_DESCRIPTION: dict[str, Any] = {
    "Name": "brainprior demo: a thick-slice scan of an average brain in a synthetic head",
    "BIDSVersion": BIDS_VERSION,
    "DatasetType": "raw",
    "License": "ICBM152: Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, "
    "Montreal Neurological Institute, McGill University; use, copy, modify and distribute freely "
    "with this notice",
    "Authors": ["brainprior developers"],
    "Acknowledgements": "Brain: ICBM152 nonlinear symmetric template 2009a, from nilearn",
    "ReferencesAndLinks": [
        "Fonov et al., NeuroImage 54 (2011) 313-327",
        "https://nilearn.github.io/stable/modules/generated/nilearn.datasets.load_mni152_template.html",
    ],
}

_README = """\
brainprior demo
===============

No participant was scanned. sub-01 is the ICBM152 average brain (2009a, nonlinear, symmetric, as
nilearn provides it) inside a synthetic head with fluid, skull, marrow, fat, skin, eyes, airways,
jaw and neck. The head was tilted by 9, -4 and 3 degrees and "scanned" with 5 mm axial
slices of 1 x 1 mm in-plane, a trapezoid slice profile, a smooth bias field (SD 12 %) and Rician
noise (SD 1.5 % of bright white matter).

An average brain is smooth already: this data set shows that the program runs, not how well it
restores an individual brain.

Written by ``python -m brainprior_bids.evaluation.demo``; every run writes the same bytes.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m brainprior_bids.evaluation.demo", description="Write the demo data set."
    )
    parser.add_argument("out", type=Path, help="folder of the new BIDS data set")
    args = parser.parse_args(argv)
    try:
        out = write_demo(args.out)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out}: sub-01_T1w, 1 x 1 x 5 mm")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
