# SPDX-License-Identifier: Apache-2.0
"""The time that ``--dry-run`` predicts, and its message about the machine."""

from __future__ import annotations

import os
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from brainprior_bids.bids.query import find_scans
from brainprior_bids.run import plan
from brainprior_bids.settings import Settings


@pytest.fixture
def settings(tmp_path):
    raw = tmp_path / "raw"
    for name, shape in (("T1w", (50, 60, 50)), ("T2w", (20, 40, 30))):
        path = raw / "sub-01" / "anat" / f"sub-01_{name}.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.diag([5.0, 5, 5, 1])), path)
    (raw / "dataset_description.json").write_text('{"Name": "t", "BIDSVersion": "1.10.0"}')
    return Settings(raw, tmp_path / "out", tmp_path / "w", device="cpu", modalities=("T1w", "T2w"))


def test_a_brain_counts_not_the_whole_field_of_view(settings, monkeypatch, capsys):
    monkeypatch.setattr(plan, "seconds_per_voxel", lambda settings: 1e-6)
    plan.print_plan(find_scans(settings), settings)
    lines = capsys.readouterr().out.splitlines()
    times = [line.split("(")[1] for line in lines if line.startswith("  about ")]
    box = np.prod(plan.BOX_MM) / 1e6
    assert times[0] == f"{box:.1f} million voxels)"  # of 18.8 million in the field of view
    assert times[1] == f"{100 * 200 * 150 / 1e6:.1f} million voxels)"


@pytest.mark.parametrize(
    ("given", "voxels", "measured_s"),
    [
        # the demo, one thread: processor seconds of all steps, 2.8e-6 s a voxel of a call
        ({"n_samples": 2, "n_steps": 3}, 6.4e6, 220),
    ],
)
def test_the_time_is_within_a_factor_of_what_was_measured(settings, given, voxels, measured_s):
    asked = replace(settings, **given)
    for counted in (voxels, float(np.prod(plan.BOX_MM))):
        predicted = plan.scan_seconds(counted, 0, asked, 2.8e-6)
        assert 1 / 1.5 < predicted / measured_s < 1.5


def test_samples_levels_and_runs_take_time(settings):
    def seconds(n_runs=0, **given):
        return plan.scan_seconds(5e6, n_runs, replace(settings, **given), 2e-6)

    assert seconds(n_samples=2) - seconds(n_samples=1) == pytest.approx(10 * 10 + plan.SAMPLE_S)
    alone = plan.OTHER_S + plan.SAMPLE_S + 2 * 10  # two calls
    assert seconds(sampler="mean", n_samples=1) == pytest.approx(alone)
    assert seconds(n_runs=2) > seconds() + plan.RUN_S


@pytest.mark.parametrize(("load", "words"), [(0.4, "is not busy now (load 0.1"), (8.0, "2.0 per")])
def test_it_says_how_busy_the_machine_is(monkeypatch, load, words):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert words in plan.busy_now()


def test_a_short_time_has_a_decimal():
    assert [plan.minutes(s) for s in (90, 599, 1200)] == ["1.5 min", "10.0 min", "20 min"]


@pytest.mark.parametrize(
    ("given", "n_runs", "expected"),
    [
        ({}, 0, "prior"),
        ({"sampler": "mean", "n_samples": 1}, 0, "prior"),
        ({}, 2, "samples"),  # fused: the network does not predict it
        ({"task": "restore+refine"}, 0, "samples"),
        ({"task": "inpaint"}, 0, "samples"),
        ({"sampler": "exact"}, 0, "samples"),
        ({"sampler": "exact", "n_samples": 1}, 0, None),
    ],
)
def test_where_the_uncertainty_will_be_from(settings, given, n_runs, expected):
    assert plan.uncertainty_from(replace(settings, **given), n_runs) == expected
