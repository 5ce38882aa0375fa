# SPDX-License-Identifier: Apache-2.0
"""How well brains are aligned with a template by the affine to MNI305 alone, and by SyN.

``python benchmarks/standard_space.py BRAINS --work DIR --subjects 10 …``

BRAINS has skull-stripped 1 mm T1w ``sub-<label>_desc-brain_T1w.nii.gz``. The template is
nilearn's ICBM152 2009a (symmetric). Template and brains are labelled by the embedded parcellation
network, each in its own space; the brain's labels are resampled to the template by either
transform, and compared with the template's. Prints, for each brain, the mean Dice over the
structures, the Dice of the brain masks, processor seconds and peak memory of the registration.
``--known`` registers the template itself after a known smooth deformation instead, and prints the
distances of points of the brain from their true positions.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.anatomy.brain import find_brain
from brainprior_bids.anatomy.normalise import Warp, agreement, register, resample_through
from brainprior_bids.anatomy.prepare import align_to_mni305
from brainprior_bids.anatomy.spaces import Kind, move
from brainprior_bids.anatomy.templates import MNI152_FROM_MNI305, Template
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.weights import load_parcellation

LPS = np.array([[-1.0], [-1.0], [1.0]])
KNOWN_MM, KNOWN_SMOOTH_MM = 4.0, 20.0
"""SD of each component of the known deformation, and the SD of its Gaussian smoothing."""


def make_template(work: Path) -> Template:
    """nilearn's ICBM152 template and brain mask, as files."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    template = Template("ICBM152", work / "template.nii.gz", work / "template_mask.nii.gz")
    if not template.mask.exists():
        nib.save(load_mni152_template(resolution=1), template.image)
        mask = load_mni152_brain_mask(resolution=1)
        data = np.asarray(mask.dataobj).astype(np.uint8)
        nib.save(nib.Nifti1Image(data, mask.affine), template.mask)
    return template


def labelled(image: nib.Nifti1Image, cache: Path) -> dict[str, NDArray[Any]]:
    """Mask and labels on the 1 mm grid, and the affine to MNI305, from ``cache`` if it exists."""
    if not cache.exists():
        brain = find_brain(image, network=load_parcellation())
        fit = align_to_mni305(image, brain.mask, brain.table)
        np.savez_compressed(cache, mask=brain.mask, structures=brain.structures, matrix=fit.matrix)
    with np.load(cache) as arrays:
        return dict(arrays)


def mean_dice(labels: NDArray[Any], truth: NDArray[Any]) -> float:
    """Mean Dice over the structures of the truth."""
    values = []
    for label in np.unique(truth)[1:]:
        one, other = labels == label, truth == label
        values.append(2 * (one & other).sum() / (one.sum() + other.sum()))
    return float(np.mean(values))


def measured(image: Any, mask: Any, template: Template, **options: Any) -> tuple[Warp, str]:
    """The registration, with its processor time and the process's peak memory."""
    start = time.process_time()
    warp = register(image, mask, template, **options)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return warp, f"{seconds:.0f} s of processor time, peak {peak:.2f} GiB"


def compare(path: Path, template: Template, work: Path, contrast: str) -> None:
    """Print the agreement of one brain with the template, before and after SyN."""
    image = nib.load(path)
    grid = Grid(image.shape, image.affine).one_millimetre()
    own = labelled(image, work / f"{path.name.partition('_')[0]}.npz")
    brain = nib.load(template.image).affine
    truth = labelled(
        nib.Nifti1Image(template.brain(), brain), work / "template.npz"
    )["structures"]  # fmt: skip
    mask = nib.Nifti1Image(own["mask"].astype(np.uint8), grid.affine)
    structures = nib.Nifti1Image(own["structures"].astype(np.int16), grid.affine)
    warp, cost = measured(
        image, mask, template, to_mni305=own["matrix"], contrast=contrast, folder=work
    )
    affine = MNI152_FROM_MNI305 @ own["matrix"]
    ways = {
        "affine": lambda i, kind: move(i, template.grid, affine, kind=kind),
        "SyN": lambda i, kind: resample_through(i, template, [warp.to_template], kind=kind),
    }
    for name, way in ways.items():
        dice = mean_dice(np.asarray(way(structures, Kind.LABELS).dataobj), truth)
        masks = agreement(np.asarray(way(mask, Kind.MASK).dataobj) > 0, template)
        print(f"{path.name} {name}: structures {dice:.3f}, brain {masks:.3f}", flush=True)
    print(f"  {cost}", flush=True)


def known(template: Template, work: Path, contrast: str) -> None:
    """Print the errors of points, for a known deformation of the template."""
    grid = template.grid
    rng = np.random.default_rng(0)
    smooth = [
        ndimage.gaussian_filter(rng.normal(size=[n // 4 for n in grid.shape]), KNOWN_SMOOTH_MM / 4)
        for _ in range(3)
    ]
    factors = [n / (n // 4) for n in grid.shape]
    field = np.stack([ndimage.zoom(f / f.std(), factors, order=1) for f in smooth]) * KNOWN_MM
    where = np.indices(grid.shape) + field  # 1 mm voxels: a scan's point -> the template's
    image = ndimage.map_coordinates(template.brain(), where, order=1)
    mask = ndimage.map_coordinates(template.mask_array().astype(np.float32), where, order=1) > 0.5
    images = [nib.Nifti1Image(a.astype(np.float32), grid.affine) for a in (image * mask, mask)]
    warp, cost = measured(
        *images, template, to_mni305=np.linalg.inv(MNI152_FROM_MNI305), contrast=contrast,
        folder=work,
    )  # fmt: skip
    chosen = rng.permutation(np.argwhere(mask))[:2000].T
    truth = grid.affine[:3, :3] @ where[:, *chosen] + grid.affine[:3, 3:]
    points = grid.affine[:3, :3] @ chosen + grid.affine[:3, 3:]
    back = sitk.ReadTransform(str(warp.from_template))
    mapped = LPS * np.array([back.TransformPoint(p) for p in (LPS * points).T]).T
    for name, estimate in (("before", points), ("SyN", mapped)):
        mm = np.linalg.norm(estimate - truth, axis=0)
        print(f"known, {name}: mean {mm.mean():.2f} mm, 95 % {np.percentile(mm, 95):.2f} mm")
    print(f"  {cost}")


def main() -> None:
    """Parse the command line, and compare."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("brains", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="for labels and transforms")
    parser.add_argument("--subjects", nargs="*", default=[])
    parser.add_argument("--contrast", default="T1w", help="T2w: register by mutual information")
    parser.add_argument("--known", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True)
    template = make_template(options.work)
    if options.known:
        known(template, options.work, options.contrast)
    for subject in options.subjects:
        path = options.brains / f"sub-{subject}_desc-brain_T1w.nii.gz"
        compare(path, template, options.work, options.contrast)


if __name__ == "__main__":
    main()
