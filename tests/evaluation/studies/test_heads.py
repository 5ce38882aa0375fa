# SPDX-License-Identifier: Apache-2.0
"""A head against itself; the command is replaced by one that writes the truth."""

from argparse import Namespace

import nibabel as nib
import numpy as np
import pytest
from participants import Answer, toy_participant
from scipy import ndimage

from brainprior_bids.anatomy.parcellation import Parcellation
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.scans import Volume, write_scan
from brainprior_bids.evaluation.studies import command, heads
from brainprior_bids.evaluation.studies.base import Bench, Source
from brainprior_bids.evaluation.studies.command import SCANNER_UNIT

SHAPE, SPACING = (40, 52, 68), (1.5, 1.5, 1.0)
KEPT = 65
"""Whole slices of 5 mm."""


@pytest.fixture
def head(tmp_path):
    """A head with a bias field and noise; its path, brain and mask on the kept voxels."""
    mm = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(SHAPE, SPACING, strict=True)]
    x, y, z = np.meshgrid(*mm, indexing="ij")
    radius = np.sqrt((x / 26) ** 2 + (y / 32) ** 2 + (z / 26) ** 2)
    folded = radius + 0.1 * np.sin(x / 4) * np.sin(y / 5) * np.sin(z / 4)
    tissue = ndimage.gaussian_filter(np.where(folded < 0.75, 1.0, 0.6), [2.5 / s for s in SPACING])
    inside = radius < 1
    brain = np.where(inside, tissue, 0).astype(np.float32)
    noise = np.random.default_rng(1).normal(0, 0.005, SHAPE)
    scan = (brain * np.exp(0.1 * x / 30) + noise) * SCANNER_UNIT
    grid = Grid(SHAPE, np.diag((*SPACING, 1.0)))
    path = write_scan(
        tmp_path / "raw", "sub-01_T1w", Volume(scan.astype(np.float32), grid),
        dataset="test", metadata={},
    )  # fmt: skip
    kept = grid.crop((0, 0, 0), (*SHAPE[:2], KEPT))
    return path, Volume(brain[..., :KEPT], kept), inside[..., :KEPT]


@pytest.fixture
def measured(head, tmp_path, monkeypatch):
    """Measure with an answer (a function of brain and mask) and a mask of the head."""
    path, truth, inside = head

    def measure(change=lambda brain, mask: (brain, mask)):
        image, mask = change(truth.data, inside)
        answer = Answer(Volume(image, truth.grid), mask)
        brain = Parcellation(inside, inside, inside.astype(np.float32), [])
        monkeypatch.setattr(command, "run_command", answer)
        monkeypatch.setattr(heads, "parcellation", lambda: None)
        monkeypatch.setattr(heads, "find_brain", lambda *_, **__: brain)
        bench = Bench(
            tmp_path / "prior", "cpu", tmp_path / "work", path, picture=tmp_path / "a.png"
        )
        settings = heads.Settings(5.0, 0.0, 1, sampler="mean")
        return heads.measure(toy_participant(), settings, bench), answer

    return measure


def test_a_perfect_restoration_is_found_perfect(measured, head, tmp_path):
    record, answer = measured()
    (asked,) = answer.asked
    assert asked[1][-2:] == ["--sampler", "mean"]
    thick = nib.load(tmp_path / "work" / "bids" / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    original = nib.load(head[0]).get_fdata()[..., :KEPT]
    assert thick.shape == (*SHAPE[:2], 13)
    np.testing.assert_allclose(
        thick.get_fdata(), original.reshape(*SHAPE[:2], 13, 5).mean(3), rtol=1e-5, atol=1e-3
    )
    np.testing.assert_allclose(thick.affine[:3, 3], (0, 0, 2), atol=1e-6)
    methods = record["methods"]
    assert list(methods) == list(heads.METHODS)
    assert all(set(heads.COLUMNS) <= set(row) for row in methods.values())
    assert record["mask_dice"] == 1
    assert record["slices_mm"] == 5
    restored, cubic = (methods[name]["psnr_field_db"] for name in ("restored", "cubic"))
    assert restored > max(32, cubic + 3)  # noise of 0.005 and N4's own error
    assert methods["restored"]["found_mask_db"] == pytest.approx(methods["restored"]["psnr_db"])
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_mask_that_cuts_the_brain_costs_in_the_originals_mask_alone(measured):
    def cut(brain, mask):
        smaller = ndimage.binary_erosion(mask, iterations=2)
        return np.where(smaller, brain, 0), smaller

    record, _ = measured(cut)
    row = record["methods"]["restored"]
    assert record["mask_dice"] < 0.95
    assert row["psnr_db"] < row["both_masks_db"] - 10
    assert row["found_mask_db"] == pytest.approx(row["both_masks_db"])
    assert row["rmse_0_1mm"] > 5 * row["rmse_5mm"]


def test_the_table_says_who_wins():
    def record(participant, restored):
        row = dict.fromkeys(heads.COLUMNS, 20.0)
        methods = {name: dict(row) for name in heads.METHODS}
        methods["restored"] |= {"psnr_db": restored, "rmse_0_1mm": 21.0}
        return {
            "participant": participant, "contrast": "T1w", "spacing_mm": 5.0, "slices_mm": 16 / 3,
            "methods": methods, "mask_dice": 0.9, "sampler_used": "mean",
        }  # fmt: skip

    lines = heads.table([record("01", 21.0), record("02", 19.5)], [])
    assert "two heads, T1w, slices of 5.3 mm, sampler mean" in lines[0]
    (cubic,) = (line for line in lines if "over cubic" in line)
    assert "+0.25 ± 1.06 dB, better in 1 of 2" in cubic
    assert "border +5.0 %, lower in 0" in cubic


@pytest.mark.parametrize(("sampler", "n_samples"), [("auto", 4), ("mean", 1)])
def test_a_sampler_without_samples_is_not_asked_for_them(sampler, n_samples):
    options = Namespace(spacing=(5.0,), n_samples=4, random_seed=0, sampler=sampler)
    ((_, settings),) = heads.cases(options, [Source("", "01", "T1w", False, False)])
    assert (settings.n_samples, settings.sampler) == (n_samples, sampler)
