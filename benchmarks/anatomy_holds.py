# SPDX-License-Identifier: Apache-2.0
"""Whether mask, structures and affine depend on how a head is stored, scanned and placed.

``python benchmarks/anatomy_holds.py axes HEAD.nii.gz`` stores one head (averaged to about 2 mm, a
bright marker on the left) in all 48 axis orders and flips, and with three oblique affines, and
runs conform, parcellate and affine on each.

``python benchmarks/anatomy_holds.py overlap BIDS_DIR`` labels the T1w and T2w of every participant
and compares the two in MNI305, each transformed by its own affine. With ``--restored OUT``, an
output folder of the program on the same data, it also compares the restored images.

``python benchmarks/anatomy_holds.py nodes BIDS_DIR`` measures the time of conform, parcellate, n4
and affine for the T1w and the T2w of every participant in turn.

``python benchmarks/anatomy_holds.py restored HEAD.nii.gz`` cuts a cube with a marker in the left
hemisphere out of a head, averages it to thick slices, stores it in all 48 axis orders and flips,
and restores each. Then it simulates scans of the same cube in three oblique poses and compares the
means (eight samples each) with the posterior SD, with the truth, and with the error of rotating
the voxels.

``python benchmarks/anatomy_holds.py turns HEAD.nii.gz`` simulates scans of cubes at four places of
a head in many poses, and compares the error of the posterior mean (two network calls) with that of
cubic interpolation, which uses no prior. The ratio separates the cost of a rotated field of view
from the effect of slice positioning.

``python benchmarks/anatomy_holds.py poses LABELS AVG305T1`` generates T1-like heads from held-out
label maps in random poses and compares the affine from the network's structures with the
registration of the map itself to the average of 305 heads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.affine import AffineFit, corner_distance, fit_affine
from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.external import mask_from_file
from brainprior_bids.anatomy.hull import surface
from brainprior_bids.anatomy.parcellation import (
    SCATTERED,
    Parcellation,
    parcellate,
)
from brainprior_bids.anatomy.spaces import move, resample
from brainprior_bids.engine import weights
from brainprior_bids.engine.grids import MNI305, Grid
from brainprior_bids.engine.observation import Observation
from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.result import Restoration

MARKER_MM = 8.0
CUBE_MM, SLICE_MM = 60, 5
HORNS = (5, 44)
POSES = ((10, -8, 5), (25, 15, -20), (35, 30, 30))
"""Rotations about the scanner's axes, degrees."""
STEEPER = ((44, 0, 0), (0, 44, 0), (0, 0, 44), (40, 20, 40), (35, -30, -30))
PLACES = (
    ("Left-Cerebral-White-Matter", (0, 0, 0)),
    ("Right-Cerebral-White-Matter", (0, 0, 0)),
    ("Brain-Stem", (0, 0, 25)),
    ("Left-Cerebral-White-Matter", (0, -25, 5)),
)
"""Structures around whose centroids cubes are cut out, and the shift from there, mm."""


def network() -> Any:
    """The embedded network, on the CPU."""
    return weights.load_parcellation(weights.FOLDER / "parcellation.safetensors", device="cpu")


def label(image: nib.Nifti1Image, net: Any) -> tuple[Parcellation, AffineFit, Grid]:
    """Parcellation and affine of a conformed image, and the 1 mm grid."""
    grid = Grid(image.shape, image.affine).one_millimetre()
    parcellation = parcellate(image, network=net, restored_grid=grid)
    edge = surface(parcellation.mask > 0, grid)
    return parcellation, fit_affine(parcellation.table, surface=edge), grid


def dice(a: Any, b: Any) -> float:
    """Overlap of two masks."""
    return float(2 * (a & b).sum() / max(int(a.sum() + b.sum()), 1))


def compact_dice(one: Any, two: Any) -> float:
    """Mean overlap of the structures that are in one piece."""
    values = [v for v in np.unique(one[one > 0]) if v not in SCATTERED]
    return float(np.mean([dice(one == v, two == v) for v in values]))


def horn_dice(one: Any, two: Any) -> float:
    """Mean overlap of the two inferior horns of the lateral ventricles."""
    return float(np.mean([dice(one == v, two == v) for v in HORNS]))


def small_head(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A head averaged to about 2 mm, on RAS axes, with a bright marker on the left."""
    image = nib.as_closest_canonical(nib.load(path))
    data, affine = image.get_fdata(dtype=np.float32), image.affine
    steps = [max(round(2.0 / s), 1) for s in np.linalg.norm(affine[:3, :3], axis=0)]
    n = [size // step for size, step in zip(data.shape, steps, strict=True)]
    data = data[tuple(slice(a * b) for a, b in zip(n, steps, strict=True))]
    data = data.reshape(n[0], steps[0], n[1], steps[1], n[2], steps[2]).mean((1, 3, 5))
    move = np.diag([*steps, 1.0])
    move[:3, 3] = [(s - 1) / 2 for s in steps]
    affine = affine @ move
    # in the scalp on the left, half way up
    bright = np.argwhere(data[:, n[1] // 2, n[2] // 2] > 0.2 * np.percentile(data, 99)).ravel()
    data[bright[0] : bright[0] + 4, n[1] // 2 : n[1] // 2 + 4, n[2] // 2 : n[2] // 2 + 4] = (
        2 * data.max()
    )
    return data, affine


def marker(image: nib.Nifti1Image) -> np.ndarray:
    """Centre of the brightest voxels, scanner RAS mm."""
    data = np.asarray(image.dataobj)
    centre = np.argwhere(data > 0.75 * data.max()).mean(0)
    return np.asarray((image.affine @ [*centre, 1.0])[:3])


def axes(head: Path) -> dict[str, Any]:
    """Compare 48 axis orders and flips, and three oblique affines, with the first."""
    net = network()
    data, affine = small_head(head)
    rows = []
    reference: Any = None

    def stored(data: np.ndarray, affine: np.ndarray, name: str, pose: np.ndarray) -> None:
        nonlocal reference
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sub-01_T1w.nii"
            image = nib.Nifti1Image(data, affine)
            image.set_sform(affine, 1)
            image.set_qform(affine, 1)
            nib.save(image, path)
            conformed = conform(path, metadata={})
        parcels, fit, grid = label(conformed.image, net)
        if reference is None:
            reference = (conformed, parcels, fit, grid)
        same_grid = conformed.image.shape == reference[0].image.shape
        left = next(r for r in parcels.table if r["name"] == "Left-Thalamus")["centroid_mm"]
        right = next(r for r in parcels.table if r["name"] == "Right-Thalamus")["centroid_mm"]
        expected = pose @ [*marker(reference[0].image), 1.0]
        # the anatomical left of the posed head
        leftward = pose[:3, :3] @ [-1.0, 0.0, 0.0]
        rows.append(
            {
                "stored": name,
                "voxels_equal": same_grid
                and bool(np.array_equal(conformed.image.dataobj, reference[0].image.dataobj)),
                "mask_dice": dice(parcels.mask > 0, reference[1].mask > 0) if same_grid else None,
                "labels_changed": (
                    int((parcels.structures != reference[1].structures).sum())
                    if same_grid
                    else None
                ),
                "corner_mm": corner_distance(fit.matrix @ pose, reference[2].matrix),
                "marker_mm": float(np.linalg.norm(marker(conformed.image) - expected[:3])),
                "left_is_left": bool((np.array(left) - right) @ leftward > 5),
                "acquisition_equal": conformed.acquisition.slice_axis
                == reference[0].acquisition.slice_axis
                and abs(conformed.acquisition.thickness_mm - reference[0].acquisition.thickness_mm)
                < 1e-4,
                "mask_ml": float(parcels.mask.sum() * np.prod(grid.spacing_mm) / 1000),
            }
        )
        print(json.dumps(rows[-1]), flush=True)

    for order in permutations(range(3)):
        for flips in product((1, -1), repeat=3):
            orientation = np.array([[a, f] for a, f in zip(order, flips, strict=True)])
            turned = apply_orientation(data, orientation)
            moved = affine @ inv_ornt_aff(orientation, data.shape)
            stored(np.ascontiguousarray(turned), moved, f"{order} {flips}", np.eye(4))
    for angles in POSES:
        pose = np.eye(4)
        pose[:3, :3] = rotation(angles)
        pose[:3, 3] = [12, -7, 20]
        stored(data, pose @ affine, f"oblique {angles}", pose)
    plain = [row for row in rows if not row["stored"].startswith("oblique")]
    return {
        "n": len(plain),
        "all_voxels_equal": all(row["voxels_equal"] for row in plain),
        "labels_changed": max(row["labels_changed"] for row in plain),
        "largest_corner_mm": max(row["corner_mm"] for row in plain),
        "largest_marker_mm": max(row["marker_mm"] for row in rows),
        "left_is_left": all(row["left_is_left"] for row in rows),
        "oblique": rows[len(plain) :],
    }


class Scene:
    """A head and its brain, from which cubes are cut for simulated scans."""

    def __init__(self, head: Path) -> None:
        image = conform(head, metadata={}).image
        parcels, self.fit, self.fine = label(image, network())
        self.centres = {row["name"]: np.array(row["centroid_mm"]) for row in parcels.table}
        self.data, self.grid = image.get_fdata(dtype=np.float32), Grid(image.shape, image.affine)
        self.mask = parcels.mask.astype(np.float32)
        self.bright = float(np.percentile(self.data[parcels.mask_scan > 0.5], 99))
        self.prior = weights.load_prior()

    def scan(
        self, middle: np.ndarray, turn: np.ndarray, *, marked: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Grid]:
        """Thick slices of a cube, their affine, the cube's mask, the truth, and its grid."""
        affine = np.eye(4)
        affine[:3, :3] = turn
        affine[:3, 3] = middle - turn @ np.full(3, (CUBE_MM - 1) / 2)
        cube = Grid((CUBE_MM,) * 3, affine)
        values = resample(self.data, self.grid, cube)
        if marked:
            values[distance(cube, middle) < MARKER_MM / 2] = 1.5 * self.bright
        mask = resample(self.mask, self.fine, cube, order=1) > 0.5
        thick = values.reshape(CUBE_MM, CUBE_MM, -1, SLICE_MM).mean(-1)
        step = np.diag([1.0, 1, SLICE_MM, 1])
        step[2, 3] = (SLICE_MM - 1) / 2
        return thick, affine @ step, mask, values, cube

    def through(
        self,
        thick: np.ndarray,
        affine: np.ndarray,
        mask: np.ndarray,
        at: np.ndarray,
        n: int,
        calls: int,
        seed: int = 0,
    ) -> Restoration:
        """Store, conform and restore a simulated scan."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / "sub-01_T1w.nii", Path(folder) / "mask.nii"]
            for path, volume, where in zip(
                paths, (thick, mask.astype(np.uint8)), (affine, at), strict=True
            ):
                stored = nib.Nifti1Image(volume, where)
                stored.set_sform(where, 1)
                stored.set_qform(where, 1)
                nib.save(stored, path)
            done = conform(paths[0], metadata={"SliceThickness": SLICE_MM})
            grid = Grid(done.image.shape, done.image.affine)
            inside = mask_from_file(paths[1], grid.one_millimetre(), name="cube")
        share = resample(inside.astype(np.float32), grid.one_millimetre(), grid, order=1)
        scan = np.asarray(done.image.dataobj, np.float32)
        return restore(
            Observation(scan, grid, done.acquisition, share),
            mask_1mm=inside,
            to_mni305=self.fit.matrix,
            contrast="T1w",
            prior=self.prior,
            n_samples=n,
            n_steps=calls,
            seed=seed,
        )


def distance(grid: Grid, point: np.ndarray) -> np.ndarray:
    """Distance of every voxel from a point, mm."""
    return np.asarray(np.linalg.norm(grid.points_mm() - point[:, None, None, None], axis=0))


def rotation(angles: Sequence[float]) -> np.ndarray:
    """(3, 3) rotation about the scanner's x, y and z in turn, degrees."""
    return np.asarray(Rotation.from_euler("xyz", angles, degrees=True).as_matrix())


def deep(grid: Grid, middle: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Voxels deep in the brain and in every cube around ``middle``, whatever its rotation."""
    inside = ndimage.binary_erosion(mask, iterations=3)
    return np.asarray((distance(grid, middle) < CUBE_MM / 2 - 6) & inside)


def turns(head: Path) -> dict[str, Any]:
    """Error of the posterior mean, and of cubic interpolation, by pose; over all places."""
    scene = Scene(head)
    places = [scene.centres[name] + shift for name, shift in PLACES]
    rows: list[dict[str, Any]] = []
    for angles in ((0, 0, 0), *POSES, *STEEPER):
        squares = []
        for middle in places:
            thick, affine, mask, truth, cube = scene.scan(middle, rotation(angles))
            done = scene.through(thick, affine, mask, cube.affine, 1, 2)
            assert np.allclose(done.grid.affine, cube.affine, atol=1e-4)
            spline = ndimage.zoom(thick, (1, 1, SLICE_MM), order=3, mode="nearest", grid_mode=True)
            here = deep(cube, middle, mask)
            squares.append([np.mean((v - truth)[here] ** 2) for v in (done.mean, spline)])
        axes = scene.fit.matrix[:3, :3] @ rotation(angles)
        u, _, vt = np.linalg.svd(axes)
        rows.append(
            {
                "angles": angles,
                "against_mni305_deg": float(np.rad2deg(Rotation.from_matrix(u @ vt).magnitude())),
                "rms_error": (np.sqrt(np.mean(squares, 0)) / scene.bright).tolist(),
                "over_cubic": float(np.sqrt(np.divide(*np.mean(squares, 0)))),
                "over_cubic_each": np.sqrt(np.divide(*np.transpose(squares))).tolist(),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return {"places": [name for name, _ in PLACES], "poses": rows}


def restored(head: Path, samples: int, steps: int) -> dict[str, Any]:
    """Restore 48 axis orders and flips, and three oblique poses."""
    scene = Scene(head)
    middle = scene.centres["Left-Cerebral-White-Matter"]

    def mark(done: Restoration) -> np.ndarray:
        centre = np.argwhere(done.mean > 0.8 * done.mean.max()).mean(0)
        return np.asarray((done.grid.affine @ [*centre, 1.0])[:3])

    thick, affine, mask, truth, cube = scene.scan(middle, np.eye(3), marked=True)
    at = cube.affine
    reference: Restoration | None = None
    rows = []
    for order in permutations(range(3)):
        for flips in product((1, -1), repeat=3):
            turn = np.array([[a, f] for a, f in zip(order, flips, strict=True)])
            done = scene.through(
                np.ascontiguousarray(apply_orientation(thick, turn)),
                affine @ inv_ornt_aff(turn, thick.shape),
                np.ascontiguousarray(apply_orientation(mask, turn)),
                at @ inv_ornt_aff(turn, mask.shape),
                1,
                4,
            )
            reference = reference or done
            rows.append(
                {
                    "stored": f"{order} {flips}",
                    "largest_difference": float(
                        np.abs(done.samples - reference.samples).max() / done.unit
                    ),
                    "marker_mm": float(np.linalg.norm(mark(done) - middle)),
                    "affine_mm": float(np.abs(done.grid.affine - at).max()),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    assert reference is not None

    def rms(values: np.ndarray) -> float:
        return float(np.sqrt(np.mean(values**2)) / plain.unit)

    def inner(done: Restoration, mask: np.ndarray) -> np.ndarray:
        """Voxels of the cube's grid that are deep in the brain and away from the marker."""
        return deep(done.grid, middle, mask) & (distance(done.grid, middle) > MARKER_MM)

    plain = scene.through(thick, affine, mask, at, samples, steps)
    again = scene.through(thick, affine, mask, at, samples, steps, seed=1)
    assert plain.sd is not None
    shared = inner(plain, mask)
    unturned = {
        "rms_error": rms((plain.mean - truth)[shared]),
        "rms_sd": rms(plain.sd[shared]),
        "rms_other_seed": rms((again.mean - plain.mean)[shared]),
    }
    print(json.dumps(unturned), flush=True)
    poses_found = []
    for angles in POSES:
        turned, where, inside, truth_here, there = scene.scan(
            middle, rotation(angles), marked=True
        )
        done = scene.through(turned, where, inside, there.affine, samples, steps)
        assert done.sd is not None
        mean, sd, moved = (
            resample(v, done.grid, plain.grid) for v in (done.mean, done.sd, truth_here)
        )
        both = shared & (mean > 0) & (plain.mean > 0)
        gap = (mean - plain.mean)[both]
        wide = np.sqrt(sd**2 + plain.sd**2)[both]
        here = inner(done, inside)
        poses_found.append(
            {
                "angles": angles,
                "marker_mm": float(np.linalg.norm(mark(done) - middle)),
                "rms_difference": rms(gap),
                "rms_sd": rms(wide),
                "within_2_sd": float(np.mean(np.abs(gap) < 2 * wide)),
                "rms_interpolation": rms((moved - truth)[both]),
                "rms_error": rms((done.mean - truth_here)[here]),
                "rms_own_sd": rms(done.sd[here]),
            }
        )
        print(json.dumps(poses_found[-1]), flush=True)
    keys = ("largest_difference", "marker_mm", "affine_mm")
    return {
        "n": len(rows),
        "sampler": reference.sampler,
        "marker_left_of_midline_mm": float(-(scene.fit.matrix @ [*middle, 1.0])[0]),
        **{f"largest_{key}": max(row[key] for row in rows) for key in keys},
        "unturned": unturned,
        "oblique": poses_found,
    }


def overlap(bids_dir: Path, participants: int, output_dir: Path | None) -> dict[str, Any]:
    """Dice of every participant's T1w and T2w, in MNI305 (2 mm) and in the scanner's space.

    ``labels``: labelled in the scanner's space, then the labels are resampled; ``scan``: the scan
    is resampled, then labelled in MNI305; ``restored``: as ``scan``, for the program's output.
    """
    net = network()
    coarse = Grid(
        tuple(n // 2 for n in MNI305.shape), MNI305.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    )

    def there(image: nib.Nifti1Image) -> np.ndarray:
        """Labels of an image on the MNI305 grid."""
        parcels = parcellate(image, network=net, restored_grid=MNI305)
        return resample(parcels.structures.astype(np.float32), MNI305, coarse, order=0)

    rows = []
    for subject in sorted(bids_dir.glob("sub-*"))[:participants]:
        labels: dict[str, list[np.ndarray]] = {"labels": [], "scan": [], "restored": []}
        scanner = []
        for suffix in ("T1w", "T2w"):
            (path,) = subject.rglob(f"*_{suffix}.nii.gz")
            image = conform(path, metadata={}).image
            parcels, fit, grid = label(image, net)
            structures = parcels.structures.astype(np.float32)
            scanner.append((parcels.structures, grid, fit))
            labels["labels"].append(resample(structures, grid, coarse, matrix=fit.matrix, order=0))
            labels["scan"].append(there(move(image, MNI305, fit.matrix)))
            if output_dir is not None:
                (path,) = output_dir.glob(
                    f"{subject.name}/anat/*_space-MNI305_desc-restored_{suffix}.nii.gz"
                )
                labels["restored"].append(there(conform(path, metadata={}).image))
        (structures, grid, fit), (other, other_grid, other_fit) = scanner
        moved = resample(other.astype(np.float32), other_grid, grid, order=0)
        # outside the T2w's field of view, nothing can overlap
        covered = resample(np.ones(other.shape, np.float32), other_grid, grid, order=0) > 0
        row: dict[str, Any] = {"subject": subject.name}
        for name, both in labels.items():
            if both:
                one, two = both
                row[f"{name}: mask"] = dice(one > 0, two > 0)
                row[f"{name}: structures"] = compact_dice(one, two)
                row[f"{name}: horns"] = horn_dice(one, two)
        row["scanner: mask"] = dice((structures > 0) & covered, (moved > 0) & covered)
        row["affines_apart_mm"] = corner_distance(other_fit.matrix, fit.matrix)
        rows.append(row)
        print(json.dumps(row), flush=True)
    keys = [key for key in rows[0] if key != "subject"]
    return {key: [float(np.median([r[key] for r in rows])),
                  float(np.min([r[key] for r in rows])),
                  float(np.max([r[key] for r in rows]))] for key in keys}  # fmt: skip


def nodes(bids_dir: Path, participants: int, threads: int) -> dict[str, Any]:
    """Seconds from conform to the affine, for the T1w and the T2w of every participant in turn.

    Everything runs in one process, after the weights were read; the first scan is not counted.
    """
    net = network()
    rows = []

    def timed(name: str, row: dict[str, Any], work: Callable[[], Any]) -> Any:
        clock, cpu = time.perf_counter(), time.process_time()
        result = work()
        row[name] = [time.perf_counter() - clock, time.process_time() - cpu]
        return result

    subjects = sorted(bids_dir.glob("sub-*"))[:participants]
    for subject in (subjects[0], *subjects):
        for suffix in ("T1w", "T2w"):
            (path,) = subject.rglob(f"*_{suffix}.nii.gz")
            row: dict[str, Any] = {}
            image = timed("conform", row, partial(conform, path, metadata={})).image
            grid = Grid(image.shape, image.affine).one_millimetre()
            parcels = timed(
                "parcellate", row, partial(parcellate, image, network=net, restored_grid=grid)
            )
            timed("n4", row, partial(n4, image, parcels.mask_scan, threads=threads))
            edge = partial(surface, parcels.mask > 0, grid)
            timed("affine", row, lambda p=parcels, e=edge: fit_affine(p.table, surface=e()))
            row = {**row, "all": np.sum(list(row.values()), axis=0).tolist()}
            rows.append({"subject": subject.name, "suffix": suffix, **row})
            print(json.dumps(rows[-1]), flush=True)
    rows = rows[2:]
    table: dict[str, Any] = {}
    for suffix in ("T1w", "T2w"):
        for name in ("conform", "parcellate", "n4", "affine", "all"):
            seconds = np.array([row[name] for row in rows if row["suffix"] == suffix])
            table[f"{suffix} {name}"] = {
                "median_s": round(float(np.median(seconds[:, 0])), 2),
                "most_s": round(float(seconds[:, 0].max()), 2),
                "median_cpu_s": round(float(np.median(seconds[:, 1])), 2),
            }
    return {"threads": threads, **table}


def poses(folder: Path, average: Path, maps: list[int], n: int) -> dict[str, Any]:
    """Corner error of the network's affine for random poses of label maps."""
    from brainprior_bids.anatomy.rescue import to_ants, write_transform
    from brainprior_bids.training.centroids import COARSE, label_table, register
    from brainprior_bids.training.synthesis import brain_mask, load_labels, mean_t1_head

    net = network()
    template = nib.as_closest_canonical(nib.load(average))
    target = template.get_fdata()
    smooth = ndimage.gaussian_filter(target / target.max() * 100, 0.8)
    fixed = to_ants(smooth[::2, ::2, ::2], template.affine @ COARSE)
    rng = np.random.default_rng(0)
    rows = []
    for number in maps:
        labels, affine = load_labels(folder / f"training_seg_{number:02d}.nii.gz")
        table = label_table(labels, affine)
        coarse, coarse_affine = labels[::2, ::2, ::2], affine @ COARSE
        brain = brain_mask(coarse, radius=3.5)
        start = fit_affine(table, surface=surface(brain, Grid(brain.shape, coarse_affine))).matrix
        clean = mean_t1_head(coarse)
        clean[:, :, : max(int(np.nonzero(brain)[2].min()) - 3, 0)] = 0
        moving = to_ants(
            ndimage.gaussian_filter(clean, 1.25)[::2, ::2, ::2], coarse_affine @ COARSE
        )
        region = ndimage.binary_dilation(
            resample(brain.astype(np.float32), Grid(brain.shape, coarse_affine),
                     Grid(template.shape, template.affine), matrix=start, order=1) > 0.5,
            iterations=3,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            write_transform(Path(scratch) / "start.mat", start)
            true = register(
                fixed,
                moving,
                initial_transform=str(Path(scratch) / "start.mat"),
                mask=to_ants(region[::2, ::2, ::2].astype(float), template.affine @ COARSE),
            )
        head = ndimage.gaussian_filter(mean_t1_head(labels), 0.7).astype(np.float32)
        whole = Grid(head.shape, affine)
        middle = np.mean([row["centroid_mm"] for row in table], axis=0)
        for _ in range(n):
            # scanner of the posed head -> scanner of the map
            pose = np.eye(4)
            pose[:3, :3] = rotation(rng.uniform(-15, 15, 3)) @ np.diag(rng.uniform(0.9, 1.1, 3))
            pose[:3, 3] = middle + rng.uniform(-15, 15, 3) - pose[:3, :3] @ middle
            view = Grid((190, 230, 210), np.eye(4))
            shift = np.eye(4)
            shift[:3, 3] = (np.linalg.inv(pose) @ [*middle, 1.0])[:3] - [95, 115, 125]
            view = Grid(view.shape, shift)
            image = resample(head, whole, view, matrix=np.linalg.inv(pose), order=1)
            image = np.abs(image + rng.normal(0, 0.02 * image.max(), image.shape))
            _, fit, _ = label(nib.Nifti1Image(image.astype(np.float32), shift), net)
            rows.append(
                {
                    "map": number,
                    "corner_mm": corner_distance(fit.matrix, true @ pose),
                    "residual_mm": fit.median_residual_mm,
                    "true_labels_corner_mm": corner_distance(start, true),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    errors = [row["corner_mm"] for row in rows]
    return {"n": len(rows), "median": float(np.median(errors)), "largest": max(errors)}


def main() -> None:
    """Run one of the six measurements and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("axes", "nodes", "overlap", "poses", "restored", "turns"))
    parser.add_argument("data", type=Path)
    parser.add_argument("average", type=Path, nargs="?", help="avg305T1.nii, for poses")
    parser.add_argument("--participants", type=int, default=9)
    parser.add_argument("--maps", type=int, nargs="+", default=[18, 19, 20])
    parser.add_argument("--poses", type=int, default=5, help="poses per map")
    parser.add_argument("--restored", type=Path, help="for overlap: output of the program")
    parser.add_argument("--samples", type=int, default=8, help="samples per pose, for restored")
    parser.add_argument("--steps", type=int, default=20, help="calls per sample, for restored")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "axes":
        result = axes(args.data)
    elif args.what == "nodes":
        result = nodes(args.data, args.participants, args.threads)
    elif args.what == "overlap":
        result = overlap(args.data, args.participants, args.restored)
    elif args.what == "turns":
        result = turns(args.data)
    elif args.what == "restored":
        result = restored(args.data, args.samples, args.steps)
    else:
        result = poses(args.data, args.average, args.maps, args.poses)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
