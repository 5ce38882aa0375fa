# SPDX-License-Identifier: Apache-2.0
"""Simulated clinical scans: the demo's head with other sequences.

Each goes through ``prepare`` without N4. The mask is compared with the demo's brain, and the
affine with that of MNI152 (in which the demo's brain lies) to MNI305: the demo's own T1w has a
Dice of 0.985 and an error of 5.6 mm. Limits are the measured values, noted beside each scan, with
a margin.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from brainprior_bids.anatomy.prepare import prepare
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.anatomy.templates import MNI152_FROM_MNI305
from brainprior_bids.bids.fuse import fuse_runs
from brainprior_bids.bids.names import BIDSName, output_names
from brainprior_bids.bids.query import Scan
from brainprior_bids.evaluation.degrade import Recipe, degrade
from brainprior_bids.evaluation.demo import SCANNER_UNIT

OUTSIDE = ((0, 0), (0.07, 0.05), (0.22, 0.3), (0.42, 0.35), (1.15, 0.7), (1.4, 0.8))
"""T1w intensity and that of other contrasts, in scalp, skull and muscle."""
T2W = ((0, 0.02), (0.07, 0.05), (0.14, 0.3), (0.22, 1.2), (0.4, 1.1), (0.62, 0.72),
       (0.75, 0.65), (1.0, 0.42), (1.4, 0.6))  # fmt: skip
PDW = ((0, 0.02), (0.07, 0.08), (0.14, 0.4), (0.22, 0.85), (0.4, 0.95), (0.62, 1.0),
       (0.75, 0.97), (1.0, 0.8), (1.4, 0.8))  # fmt: skip
T2STARW = ((0, 0.02), (0.07, 0.05), (0.14, 0.4), (0.22, 1.1), (0.4, 0.95), (0.62, 0.85),
           (0.75, 0.82), (1.0, 0.7), (1.4, 0.5))  # fmt: skip


def t1w(demo):
    """1 is bright white matter."""
    return demo.truth / np.float32(SCANNER_UNIT)


def depth_mm(demo):
    """Distance outside the brain."""
    return ndimage.distance_transform_edt(~demo.brain).astype(np.float32)


def clusters(shape, mm, rng):
    """Smooth noise of SD 1."""
    noise = rng.normal(size=[n // 2 + 2 for n in shape]).astype(np.float32)
    noise = ndimage.gaussian_filter(noise, mm / 2)
    fine = np.kron(noise / noise.std(), np.ones((2, 2, 2), np.float32))
    return fine[tuple(slice(n) for n in shape)]


def gadolinium(demo):
    """Bright sinuses, cortical veins, dura and nasal mucosa, and a lesion with a bright rim."""
    x, (p, q, r), depth = t1w(demo).copy(), demo.grid.points_mm(), depth_mm(demo)
    sagittal = (depth > 0) & (depth < 7) & (np.abs(p) < 4) & (r > -10)
    transverse = (depth > 0) & (depth < 7) & (q < -45) & (r < -12) & (r > -32)
    veins = clusters(x.shape, 4, np.random.default_rng(5)) > 0.8
    x[(depth >= 2.5) & (depth < 3.5)] = 1.2
    x[sagittal | transverse | (veins & (depth > 0) & (depth < 2.5))] = 1.5
    x[(np.abs(p) < 15) & (q > 35) & (r < -30) & (x > 0.3)] = 1.4
    away = np.sqrt((p - 30) ** 2 + (q + 20) ** 2 + (r - 30) ** 2)
    x[np.abs(away - 10) < 2], x[away < 8] = 1.6, 0.35
    return x


def other_contrast(demo, table):
    """Intensities of the brain and its fluid by ``table``, of the rest by ``OUTSIDE``."""
    x = t1w(demo)
    inside = demo.brain | ((depth_mm(demo) < 5) & (x < 0.4))
    tables = (np.interp(x, *zip(*one, strict=True)) for one in (table, OUTSIDE))
    return np.where(inside, *tables).astype(np.float32)


def t2starw(demo):
    """With signal loss above the sinuses and the ears, and in veins."""
    x, points = other_contrast(demo, T2STARW), demo.grid.points_mm()
    for centre, mm in (((0, 45, -25), 18), ((45, -20, -35), 12), ((-45, -20, -35), 12)):
        away = sum((a - c) ** 2 for a, c in zip(points, centre, strict=True))
        x *= 1 - 0.9 * np.exp(-away / (2 * mm**2))
    veins = (depth_mm(demo) < 3) & (clusters(x.shape, 3, np.random.default_rng(5)) > 1.5)
    return np.where(veins, 0.2 * x, x).astype(np.float32)


def unit1(demo):
    """Re(S1* S2) / (|S1|^2 + |S2|^2) of two noisy inversions as 0 to 4095: noise where there is no
    signal has the full range."""
    rng, x = np.random.default_rng(5), t1w(demo)
    u = np.interp(x, [0, 0.22, 0.42, 0.65, 1.0, 1.4], [-0.45, -0.45, -0.2, 0.05, 0.35, 0.45])
    second = np.interp(x, [0, 0.01, 0.07, 0.22, 0.5, 1.4], [0, 0.01, 0.06, 0.9, 0.9, 0.8])
    u = np.where(np.abs(u) < 1e-3, 1e-3, u)
    first = second * (1 - np.sqrt(1 - 4 * u**2)) / (2 * u)
    s1, s2 = (
        s + 0.03 * (rng.normal(size=x.shape) + 1j * rng.normal(size=x.shape))
        for s in (first, second)
    )
    uni = np.real(np.conj(s1) * s2) / (np.abs(s1) ** 2 + np.abs(s2) ** 2)
    return np.float32((uni + 0.5) * 4095)


def scanned(demo, x, **recipe):
    """A simulated measurement: bias field, slices, noise."""
    defaults = {"noise_sd": 0.015, "bias_sd": 0.12, "rician": True}
    settings = Recipe(**{**defaults, **recipe})
    rng = np.random.default_rng(3)
    return degrade(x * np.float32(SCANNER_UNIT), demo.grid, settings, rng, unit=SCANNER_UNIT)


def slab(demo, mm):
    """Slices of 5 mm through the middle."""
    scan, grid = scanned(demo, t1w(demo))
    first = len(scan[0, 0]) // 2 - mm // 10
    stop = first + mm // 5
    return scan[:, :, first:stop], grid.crop((0, 0, first), (*grid.shape[:2], stop))


THIN = {"spacing_mm": 3.0, "thickness_mm": 3.0}
GAP = {"spacing_mm": 6.0, "thickness_mm": 5.0}
SCANS = {
    "ce-gadolinium_T1w": (lambda d: scanned(d, gadolinium(d)), 0.973, 5.8),
    "UNIT1": (lambda d: (unit1(d), d.grid), 0.981, 5.7),
    "PDw": (lambda d: scanned(d, other_contrast(d, PDW), **THIN), 0.934, 7.4),
    "part-mag_T2starw": (lambda d: scanned(d, t2starw(d), **THIN), 0.951, 6.6),
    "acq-sagittal_T2w": (
        lambda d: scanned(d, other_contrast(d, T2W), axis=0, **GAP), 0.978, 6.2
    ),
    "acq-coronal_T2w": (
        lambda d: scanned(d, other_contrast(d, T2W), axis=1, spacing_mm=8, thickness_mm=7),
        0.978, 6.1
    ),
    "acq-lowfield_T1w": (
        lambda d: scanned(d, t1w(d), in_plane_mm=1.6, noise_sd=0.05), 0.984, 5.7
    ),
}  # fmt: skip
"""Name -> how it is made, measured Dice of the mask, and measured error of the affine in mm."""


def found_in(scan, grid, demo):
    """(Dice of the mask, RMS error of the affine in mm, what ``prepare`` returns)."""
    image = nib.Nifti1Image(np.round(scan).astype(np.int16), np.array(grid.affine))
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    prepared = prepare(image, unbias=False)
    fine, mask = prepared.grid.one_millimetre(), prepared.mask_1mm > 0
    brain = resample(demo.brain.astype(np.float32), demo.grid, fine, order=1) > 0.5
    dice = 2 * (mask & brain).sum() / (mask.sum() + brain.sum())
    points = fine.points_mm()[:, brain][:, ::501]
    wrong = prepared.to_mni305 - np.linalg.inv(MNI152_FROM_MNI305)
    off = wrong[:3, :3] @ points + wrong[:3, 3:]
    return dice, np.sqrt(np.mean(np.sum(off**2, 0))), prepared


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_of_a_clinic_gets_the_brain_and_its_place(demo_head, name):
    make, dice, error_mm = SCANS[name]
    found, off_mm, prepared = found_in(*make(demo_head), demo_head)
    assert found > dice - 0.015
    assert off_mm < error_mm + 1.5
    spacing = prepared.grid.spacing_mm
    if spacing.max() > 2:  # the slice axis is read from the header, in every plane
        assert prepared.acquisition.slice_axis == int(np.argmax(spacing))
        assert prepared.acquisition.spacing_mm == pytest.approx(spacing.max())


def test_a_slab_gets_its_part_of_the_brain(demo_head):
    """45 mm in slices of 5 mm; a warning states that it is a part of the brain."""
    dice, _, prepared = found_in(*slab(demo_head, 45), demo_head)
    assert dice > 0.97  # measured: 0.990
    assert any("only the part inside is restored" in text for text in prepared.warnings)


def scan_of(name):
    return Scan(Path(f"/raw/{name}.nii.gz"), None, BIDSName.parse(f"{name}.nii.gz"))


@pytest.mark.parametrize(
    ("name", "contrast"),
    [
        ("sub-01_UNIT1", "T1w"),
        ("sub-01_inv-1_T1w", "unknown"),
        ("sub-01_ce-gadolinium_T1w", "T1w"),
        ("sub-01_echo-2_T1w", "T1w"),
        ("sub-01_part-mag_T2starw", "unknown"),
        ("sub-01_PDw", "unknown"),
    ],
)
def test_the_network_is_given_the_contrast(name, contrast):
    assert scan_of(name).contrast == contrast


def test_echoes_and_enhanced_scans_are_scans_of_their_own():
    """With separate names; never fused with others, even if there are runs."""
    names = ("T1w", "ce-gadolinium_T1w", "echo-1_T1w", "echo-2_T1w", "part-mag_T1w", "inv-1_T1w",
             "inv-2_T1w", "UNIT1")  # fmt: skip
    stems = [f"sub-01_{name}" for name in names]
    scans = [scan_of(stem) for stem in stems]
    assert [scan.name.stem for scan in fuse_runs(scans)] == stems
    files = [file for s in scans for file in output_names(s.name, n_samples=1).values()]
    assert len(set(files)) == len(files)
    assert output_names(scan_of("sub-01_UNIT1").name, n_samples=1)["restored"] == (
        "sub-01_desc-restored_UNIT1.nii.gz"
    )
