# SPDX-License-Identifier: Apache-2.0
"""Prepare brains as a compact training pack.

Per skull-stripped brain: closest-canonical axes, N4 inside the brain, 99th percentile of the
corrected brain = 1 (the engine's unit), affine registration to the MNI305 average (ANTs), mean
intensity of the three tissue classes. Whole heads go through the workflow's own steps instead
(``prepare_head``). A pack is a few ``.npz`` parts, each small enough to be copied elsewhere, with
the brains as uint8 (``UNIT`` = 1), their affines and the split: training needs nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.anatomy.templates import MNI152_FROM_MNI305
from brainprior_bids.engine.errors import AnatomyError, GeometryError, InputError, UsageError
from brainprior_bids.training.synthesis import (
    bounding_box,
    brain_mask,
    load_labels,
    synthesise_brain,
)

log = logging.getLogger(__name__)

UNIT = 200
"""Stored value of intensity 1; the largest stored intensity is 255 / 200 = 1.275."""

PART_BYTES = 56 * 2**20
"""Uncompressed size is not the limit: a part is closed once its compressed brains exceed this."""

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Brain:
    """One prepared brain.

    Parameters
    ----------
    name : str
        Participant label.
    contrast : str
        BIDS suffix.
    split : {"train", "validation"}
    data : (i, j, k) uint8
        Intensity x ``UNIT``, 0 outside the brain.
    to_mni305 : (4, 4) float64
        Voxel index of ``data`` to MNI305 mm.
    tissues : (3,) float64
        Mean intensity of the dark, middle and bright tissue (CSF, grey, white in a T1w).
    synthetic : bool
        Synthesised from a label map, not scanned.
    """

    name: str
    contrast: str
    split: str
    data: NDArray[np.uint8]
    to_mni305: NDArray[np.float64]
    tissues: NDArray[np.float64]
    synthetic: bool = False


RESULTS = re.compile(
    r"_desc-(restored|inpainted|refined|uncertainty|residual)[0-9A-Za-z]*_(T1w|T2w|FLAIR)\."
)
"""Names of images written by brainprior."""


def find_brains(
    folder: Path, *, validation: Sequence[str], exclude: Sequence[str]
) -> list[tuple[str, str, str, Path]]:
    """(name, contrast, split, path) of every ``sub-*_{T1w,T2w,FLAIR}.nii[.gz]`` below ``folder``.

    Its ``derivatives`` and ``sourcedata`` are ignored.

    Raises
    ------
    UsageError
        If there are none, a name in ``validation`` or ``exclude`` is not among them, or there are
        outputs of brainprior: a prior must be trained and evaluated on scans.
    """
    scans = []
    for path in sorted(folder.rglob("sub-*.nii*")):
        if {"derivatives", "sourcedata"} & set(path.relative_to(folder).parts):
            continue
        if RESULTS.search(path.name):
            raise UsageError(
                f"{folder}: {path.name} is an output of brainprior. Give scans: for training, "
                "`--heads BIDS_DIR` strips, corrects and aligns the raw data set itself."
            )
        match = re.fullmatch(
            r"sub-([0-9A-Za-z]+)_(?:.*_)?(T1w|T2w|FLAIR)\.nii(?:\.gz)?", path.name
        )
        if match:
            scans.append((match[1], match[2], path))
    names = {name for name, _, _ in scans}
    if not scans:
        raise UsageError(
            f"{folder}: no sub-*_T1w, _T2w or _FLAIR image found. Give a folder of skull-stripped "
            "brains with BIDS names."
        )
    unknown = sorted((set(validation) | set(exclude)) - names)
    if unknown:
        raise UsageError(
            f"{folder}: no participant {', '.join(unknown)}; there are {sorted(names)}."
        )
    return [
        (name, contrast, "validation" if name in validation else "train", path)
        for name, contrast, path in scans
        if name not in exclude
    ]


def n4(
    data: NDArray[np.float32], mask: NDArray[np.bool_], *, shrink: int = 4
) -> NDArray[np.float32]:
    """(i, j, k) natural log of the bias field by N4, mean 0 inside the mask, 1 mm voxels."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    image = sitk.GetImageFromArray(np.maximum(data, 1e-3))
    region = sitk.GetImageFromArray(mask.astype(np.uint8))
    n4_filter = sitk.N4BiasFieldCorrectionImageFilter()
    n4_filter.SetMaximumNumberOfIterations([50, 50, 50])
    n4_filter.Execute(sitk.Shrink(image, [shrink] * 3), sitk.Shrink(region, [shrink] * 3))
    field = sitk.GetArrayFromImage(n4_filter.GetLogBiasFieldAsImage(image)).astype(np.float32)
    return field - field[mask].mean()


def mni305_brain(average: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The MNI305 average head without its skull: array and affine.

    The mask is nilearn's MNI152 brain mask, transformed by ``MNI152_FROM_MNI305``.
    """
    from nilearn.datasets import load_mni152_brain_mask

    head = nib.as_closest_canonical(nib.load(average))
    data = np.asarray(head.dataobj, dtype=np.float32)
    mask = load_mni152_brain_mask(resolution=2)
    voxel = np.linalg.inv(mask.affine) @ MNI152_FROM_MNI305 @ head.affine
    inside = ndimage.affine_transform(
        np.asarray(mask.dataobj, dtype=np.float32),
        voxel[:3, :3],
        voxel[:3, 3],
        output_shape=data.shape,
        order=1,
    )
    return np.where(inside > 0.5, data, 0), np.asarray(head.affine, dtype=np.float64)


def _ants_image(data: NDArray[np.float32], affine: NDArray[np.float64]) -> Any:
    """An ANTs image of an array whose affine has voxels along orthogonal axes (RAS mm)."""
    import ants

    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    return ants.from_numpy(
        np.ascontiguousarray(data, dtype=np.float32),
        origin=lps[:3, 3].tolist(),
        spacing=spacing.tolist(),
        direction=lps[:3, :3] / spacing,
    )


def register(
    data: NDArray[np.float32],
    affine: NDArray[np.float64],
    reference: tuple[NDArray[np.float32], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """(4, 4) scanner RAS mm -> reference RAS mm: 12 parameters, mutual information, ANTs.

    The brain is registered at 2 mm, starting from its centre of mass.

    Raises
    ------
    UsageError
        If antspyx is not installed.
    """
    if find_spec("ants") is None:
        raise UsageError(
            "train prior: antspyx is needed to register skull-stripped brains, and is not "
            "installed. Install it, or train from whole heads with --heads."
        )
    import ants

    smooth = ndimage.gaussian_filter(data, 0.8)[::2, ::2, ::2]
    half = affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    with tempfile.TemporaryDirectory() as folder:
        result = ants.registration(
            _ants_image(*reference),
            _ants_image(smooth, half),
            type_of_transform="Affine",
            outprefix=str(Path(folder) / "affine"),
            random_seed=1,
        )
        transform = ants.read_transform(result["fwdtransforms"][0])
    matrix = np.eye(4)  # reference LPS mm -> scanner LPS mm
    matrix[:3, :3] = np.reshape(transform.parameters[:9], (3, 3))
    centre = np.asarray(transform.fixed_parameters)
    matrix[:3, 3] = np.asarray(transform.parameters[9:]) + centre - matrix[:3, :3] @ centre
    return np.asarray(np.linalg.inv(LPS @ matrix @ LPS), dtype=np.float64)


def tissue_means(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """(3,) ascending class means of 1-D k-means, started at the 5th, 45th and 85th percentile."""
    sample = np.sort(values)[:: max(1, values.size // 20000)].astype(np.float64)
    means = np.percentile(sample, [5, 45, 85])
    for _ in range(50):
        edges = (means[1:] + means[:-1]) / 2
        means = np.array(
            [
                part.mean() if part.size else mean
                for part, mean in zip(
                    np.split(sample, np.searchsorted(sample, edges)), means, strict=True
                )
            ]
        )
    return means


def prepare(name: str, contrast: str, split: str, path: Path, reference: tuple[Any, Any]) -> Brain:
    """Read, correct, scale and register one skull-stripped brain.

    Raises
    ------
    InputError
        If the file does not show a brain surrounded by zeros.
    """
    image = nib.as_closest_canonical(nib.load(path))
    data = np.asarray(image.dataobj, dtype=np.float32)
    zooms = np.linalg.norm(image.affine[:3, :3], axis=0)
    if data.ndim != 3 or np.abs(zooms - 1).max() > 0.05:
        raise InputError(
            f"{path.name}: expected one 3-D image of 1 mm, got {data.shape}, {zooms} mm."
        )
    mask = ndimage.binary_fill_holes(data > 0)
    labels, _ = ndimage.label(mask)
    mask = labels == np.bincount(labels.ravel())[1:].argmax() + 1 if labels.any() else mask
    if not 0.02 < mask.mean() < 0.95:
        raise InputError(
            f"{path.name}: {mask.mean():.0%} of the voxels are not 0, expected a skull-stripped "
            "brain."
        )
    corrected = np.where(mask, data * np.exp(-n4(data, mask)), 0).astype(np.float32)
    corrected /= np.percentile(corrected[mask], 99)
    to_mni305 = register(corrected, image.affine, reference) @ image.affine
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    shift = np.eye(4)
    shift[:3, 3] = [edge.start for edge in box]
    stored = np.clip(np.round(corrected[box] * UNIT), 0, 255).astype(np.uint8)
    return Brain(name, contrast, split, stored, to_mni305 @ shift, tissue_means(corrected[mask]))


def prepare_head(name: str, contrast: str, split: str, path: Path) -> Brain | None:
    """One scan through the workflow's own steps; None, with the reason in the log, if they fail.

    The steps are conform, parcellate, N4, the affine from structures and the brain's extent, and
    cubic interpolation to 1 mm.
    """
    import torch

    from brainprior_bids.anatomy.extract import extract_brain
    from brainprior_bids.engine.weights import load_parcellation

    torch.set_num_threads(1)
    sidecar = path.with_name(path.name.split(".")[0] + ".json")
    metadata = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else {}
    try:
        extracted = extract_brain(path, network=load_parcellation(), metadata=metadata)
    except (AnatomyError, GeometryError, InputError) as error:
        log.warning("%s is left out: %s", path.name, error)
        return None
    for warning in extracted.warnings:
        log.warning("%s: %s", path.name, warning)
    box = bounding_box(extracted.mask, 0)
    shift = np.eye(4)
    shift[:3, 3] = [edge.start for edge in box]
    stored = np.clip(np.round(extracted.data[box] * UNIT), 0, 255).astype(np.uint8)
    to_mni305 = extracted.to_mni305 @ extracted.grid.affine @ shift
    return Brain(
        name, contrast, split, stored, to_mni305, tissue_means(extracted.data[extracted.mask])
    )


def _prepare_star(job: tuple[Any, ...]) -> Brain | None:
    return prepare_head(*job) if len(job) == 4 else prepare(*job)


def build_pack(
    folder: Path,
    average: Path | None,
    out: Path,
    *,
    validation: Sequence[str] = (),
    exclude: Sequence[str] = (),
    processes: int = 2,
) -> list[Path]:
    """Prepare every brain below ``folder`` and write the pack's parts into ``out``.

    Skull-stripped 1 mm brains are registered to ``average``, the MNI305 average head; without it
    they are whole heads (or stripped ones) for the workflow's own steps (``prepare_head``).

    Raises
    ------
    UsageError
        As ``find_brains``, and if no scan could be prepared.
    """
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
    jobs: list[tuple[Any, ...]] = list(find_brains(folder, validation=validation, exclude=exclude))
    if average is not None:
        reference = mni305_brain(average)
        jobs = [(*job, reference) for job in jobs]
    out.mkdir(parents=True, exist_ok=True)
    brains = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for count, brain in enumerate(pool.map(_prepare_star, jobs), 1):
            log.info("prepared %s (%d of %d)", jobs[count - 1][3].name, count, len(jobs))
            if brain is not None:
                brains.append(brain)
    if not brains:
        raise UsageError(f"{folder}: none of {len(jobs)} scans could be prepared; see the log.")
    return write_pack(brains, out)


def _prepare_labels(
    path: Path, split: str, versions: Mapping[str, int], reference: tuple[Any, Any]
) -> list[Brain]:
    """Synthetic brains of one label map; the affine is that of its synthetic T1w."""
    labels, affine = load_labels(path)
    mask = brain_mask(labels)
    box = bounding_box(mask, 1)
    labels, mask = labels[box], mask[box]
    shift = np.eye(4)
    shift[:3, 3] = [edge.start for edge in box]
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    t1w = synthesise_brain(labels, "T1w", rng, mask=mask)
    to_mni305 = register(t1w, affine @ shift, reference) @ affine @ shift
    brains = []
    for contrast, count in versions.items():
        for _ in range(count):
            image = synthesise_brain(labels, contrast, rng, mask=mask)
            stored = np.clip(np.round(image * UNIT), 0, 255).astype(np.uint8)
            name = path.name.split(".")[0]
            tissues = tissue_means(image[mask])
            brains.append(Brain(name, contrast, split, stored, to_mni305, tissues, True))
    return brains


def _prepare_labels_star(job: tuple[Any, ...]) -> list[Brain]:
    return _prepare_labels(*job)


VERSIONS = {"T1w": 1, "T2w": 3, "FLAIR": 2, "unknown": 3}
"""Synthetic brains made of each training map; a validation map gives one of each contrast."""


def build_synthetic_pack(
    folder: Path,
    average: Path,
    out: Path,
    *,
    validation: Sequence[str] = (),
    exclude: Sequence[str] = (),
    processes: int = 2,
) -> list[Path]:
    """Brains synthesised from every label map below ``folder``: parts ``synthetic-*.npz``.

    ``validation`` and ``exclude`` name maps by their file name up to the first dot.

    Raises
    ------
    UsageError
        If there are none.
    """
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
    reference = mni305_brain(average)
    jobs = []
    for path in sorted(folder.rglob("*.nii*")):
        name = path.name.split(".")[0]
        if name in validation:
            jobs.append((path, "validation", dict.fromkeys(VERSIONS, 1), reference))
        elif name not in exclude:
            jobs.append((path, "train", VERSIONS, reference))
    if not jobs:
        raise UsageError(f"{folder}: no label map (*.nii, *.nii.gz) found.")
    out.mkdir(parents=True, exist_ok=True)
    brains: list[Brain] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for count, part in enumerate(pool.map(_prepare_labels_star, jobs), 1):
            log.info("synthesised from %s (%d of %d)", part[0].name, count, len(jobs))
            brains.extend(part)
    return write_pack(brains, out, stem="synthetic")


def write_pack(brains: Iterable[Brain], out: Path, *, stem: str = "pack") -> list[Path]:
    """Write ``<stem>-1.npz``, ``<stem>-2.npz``, …; returns their paths."""
    parts: list[list[Brain]] = [[]]
    size = 0
    for brain in brains:
        bytes_here = len(zlib.compress(brain.data.tobytes(), 6))
        if size + bytes_here > PART_BYTES and parts[-1]:
            parts.append([])
            size = 0
        parts[-1].append(brain)
        size += bytes_here
    paths = []
    for number, part in enumerate(parts, 1):
        table = [
            {
                "name": b.name,
                "contrast": b.contrast,
                "split": b.split,
                "to_mni305": b.to_mni305.tolist(),
                "tissues": b.tissues.tolist(),
            }
            for b in part
        ]
        arrays: Mapping[str, Any] = {f"brain{n}": b.data for n, b in enumerate(part)}
        path = out / f"{stem}-{number}.npz"
        np.savez_compressed(_partial(path), table=np.array(json.dumps(table)), **arrays)
        paths.append(path)
    for path in paths:  # an incomplete set of parts would be read as complete
        _partial(path).replace(path)
    return paths


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.partial.npz")


def read_pack(folder: Path) -> list[Brain]:
    """Every brain of the parts ``pack-*.npz`` and ``synthetic-*.npz`` in ``folder``.

    Raises
    ------
    UsageError
        If there are none.
    """
    brains = []
    for path in sorted([*folder.glob("pack-*.npz"), *folder.glob("synthetic-*.npz")]):
        with np.load(path, allow_pickle=False) as part:
            for n, row in enumerate(json.loads(str(part["table"]))):
                brains.append(
                    Brain(
                        row["name"],
                        row["contrast"],
                        row["split"],
                        part[f"brain{n}"],
                        np.array(row["to_mni305"]),
                        np.array(row["tissues"]),
                        path.name.startswith("synthetic"),
                    )
                )
    if not brains:
        raise UsageError(
            f"{folder}: no pack-*.npz or synthetic-*.npz. Build one with --data or --labels."
        )
    return brains
