# SPDX-License-Identifier: Apache-2.0
"""The sampler and the time that ``--dry-run`` predicts, and its message about the machine."""

from __future__ import annotations

import os
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from brainprior_bids.bids.contrasts import Result, pairs, record_path
from brainprior_bids.bids.query import find_scans
from brainprior_bids.bids.status import write_summary
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.samplers import registry
from brainprior_bids.records import ScanRecord, ScanStatus
from brainprior_bids.run import forecast, plan
from brainprior_bids.settings import Settings


def save(path, shape, spacing):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.diag([*spacing, 1.0])), path)


@pytest.fixture
def settings(tmp_path):
    raw = tmp_path / "raw"
    for name, shape in (("T1w", (50, 60, 50)), ("T2w", (20, 40, 30))):
        path = raw / "sub-01" / "anat" / f"sub-01_{name}.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.diag([5.0, 5, 5, 1])), path)
    (raw / "dataset_description.json").write_text('{"Name": "t", "BIDSVersion": "1.10.0"}')
    return Settings(raw, tmp_path / "out", tmp_path / "w", device="cpu", modalities=("T1w", "T2w"))


def planned(settings, monkeypatch, capsys):
    """The lines of the plan on a machine that takes 1 µs per voxel of a network call."""
    monkeypatch.setattr(plan, "seconds_per_voxel", lambda settings: 1e-6)
    plan.print_plan(find_scans(settings), settings)
    return capsys.readouterr().out.splitlines()


def test_a_brain_counts_not_the_whole_field_of_view(settings, monkeypatch, capsys):
    lines = planned(settings, monkeypatch, capsys)
    sizes = [line.rpartition("(")[2] for line in lines if line.startswith("  sampler ")]
    box = np.prod(plan.BOX_MM) / 1e6
    assert sizes[0] == f"{box:.1f} million voxels)"  # of 18.8 million in the field of view
    assert sizes[1] == f"{100 * 200 * 150 / 1e6:.1f} million voxels)"


@pytest.fixture
def contrasts(tmp_path):
    """A 3-D T1w of 1 × 1.33 × 1.33 mm and a T2w with slices of 5 mm, and the settings."""
    raw = tmp_path / "two"
    save(raw / "sub-01/anat/sub-01_T1w.nii", (160, 192, 192), (1, 4 / 3, 4 / 3))
    save(raw / "sub-01/anat/sub-01_T2w.nii", (128, 128, 30), (1.5625, 1.5625, 5))
    (raw / "dataset_description.json").write_text('{"Name": "t", "BIDSVersion": "1.10.0"}')
    return Settings(raw, tmp_path / "out", tmp_path / "w", device="cpu", n_samples=1)


def test_every_scan_has_its_own_sampler_and_files(contrasts, monkeypatch, capsys):
    """As in the run: ``mean`` where it can be used, else ``exact``, without an uncertainty map."""
    lines = planned(replace(contrasts, sampler="mean"), monkeypatch, capsys)
    thin, thick = (line for line in lines if line.startswith("  sampler "))
    assert thin.startswith(
        "  sampler exact (not mean: the slices are as thin as the restored voxels), "
        "20 network calls, about "
    )
    assert thick.startswith("  sampler mean, 2 network calls, about ")
    uncertain = {line.strip() for line in lines if "uncertainty" in line}
    at = "sub-01/anat/sub-01_mod-T2w"
    assert uncertain == {
        f"{at}_desc-restored_uncertainty.nii.gz",
        f"{at}_space-MNI305_desc-restored_uncertainty.nii.gz",
    }
    assert any(line.startswith("2 scan(s), 22 network calls, on cpu") for line in lines)
    assert plan.ONLY_IN_THE_RUN in lines


def test_exact_needs_no_caution(contrasts, monkeypatch, capsys):
    lines = planned(replace(contrasts, sampler="exact"), monkeypatch, capsys)
    assert plan.ONLY_IN_THE_RUN not in lines
    assert [line.partition(",")[0] for line in lines if "network calls, about" in line] == [
        "  sampler exact"
    ] * 2


def test_the_alignment_of_contrasts_is_counted(contrasts, monkeypatch, capsys):
    lines = planned(contrasts, monkeypatch, capsys)
    assert "sub-01_T2w would be aligned with sub-01_T1w" in lines
    (last,) = (line for line in lines if line.startswith("2 scan(s)"))
    around = plan.minutes(plan.COMMAND_S + plan.ALIGN_S)
    assert f"{around} of them to start, to align 1 contrast(s) and to write" in last
    lines = planned(replace(contrasts, modalities=("T2w",)), monkeypatch, capsys)
    (last,) = (line for line in lines if line.startswith("1 scan(s)"))
    assert f"{plan.minutes(plan.COMMAND_S)} of them to start and to write" in last


def test_contrasts_that_were_aligned_before_are_not_counted(contrasts):
    results = [Result(scan.name, "restored") for scan in find_scans(contrasts)]
    (pair,) = pairs(results)
    assert plan.pairs_to_align(results, (), contrasts) == [pair]
    path = record_path(contrasts.output_dir, pair)
    path.parent.mkdir(parents=True)
    path.touch()
    assert plan.pairs_to_align(results, (), contrasts) == []
    assert plan.pairs_to_align(results, {"sub-01_T1w"}, contrasts) == [pair]


def test_a_finished_contrast_has_the_files_that_it_has(contrasts, monkeypatch, capsys):
    monkeypatch.setattr(plan, "why_again", lambda *_: None)
    settings = replace(contrasts, output_spaces=("anat", "T1w"))
    on_t1w = "sub-01/anat/sub-01_mod-T2w_space-T1w_desc-restored_uncertainty.nii.gz"
    for outputs, listed in (((), False), (("a_uncertainty.nii.gz",), True)):
        record = ScanRecord(scan="sub-01_T2w", subject="01", task="restore",
                            status=ScanStatus.DONE, outputs=outputs)  # fmt: skip
        write_summary(settings.output_dir, record)
        lines = planned(settings, monkeypatch, capsys)
        assert (f"  {on_t1w}" in lines) == listed


# millions of voxels of the scan and of the restored box, network calls, processor seconds of all
# nodes: six real heads on one machine, whose network calls took 8.4e-7 s per voxel
MEASURED = [
    ("exact", 5.90, 5.41, 144.6),  # 1 mm
    ("mean", 1.95, 5.37, 49.2),  # 3 mm
    ("mean", 1.95, 4.42, 44.8),
    ("mean", 1.95, 3.65, 38.4),
    ("mean", 0.49, 6.00, 39.7),  # 5 mm
    ("mean", 0.49, 5.25, 32.5),
]


@pytest.mark.parametrize(("sampler", "scan", "box", "measured_s"), MEASURED)
def test_the_time_is_what_was_measured(sampler, scan, box, measured_s):
    facts = registry.find(sampler)
    calls = facts.calls(None, simple=True)
    predicted = forecast.scan_seconds(
        forecast.Sampling(facts, None, calls, None), box_voxels=1e6 * box, scan_voxels=1e6 * scan,
        n_runs=0, n_samples=1, voxel_s=8.4e-7,
    )  # fmt: skip
    assert predicted == pytest.approx(measured_s, rel=0.15)


def seconds(settings, *, n_runs=0, sampler="exact"):
    facts = registry.find(sampler)
    calls = settings.n_samples * facts.calls(settings.n_steps, simple=n_runs < 2)
    return forecast.scan_seconds(
        forecast.Sampling(facts, None, calls, None), box_voxels=5e6, scan_voxels=2e6,
        n_runs=n_runs, n_samples=settings.n_samples, voxel_s=2e-6,
    )  # fmt: skip


def test_a_slower_machine_and_several_samples(settings):
    """The demo on a machine three times slower, two samples of three levels: 220 s."""
    facts = registry.find("conditional")
    for voxels in (6.4e6, float(np.prod(plan.BOX_MM))):
        predicted = plan.COMMAND_S + forecast.scan_seconds(
            forecast.Sampling(facts, None, 6, "prior"), box_voxels=voxels, scan_voxels=1e6,
            n_runs=0, n_samples=2, voxel_s=2.8e-6,
        )  # fmt: skip
        assert predicted == pytest.approx(220, rel=0.15)


def test_samples_levels_and_runs_take_time(settings):
    one, two = (seconds(replace(settings, n_samples=n), sampler="conditional") for n in (1, 2))
    assert two - one == pytest.approx(10 * 10 + forecast.SAMPLE_S)
    others = forecast.other_seconds(2e6) * 2e-6 / forecast.THERE_S
    alone = others + forecast.SAMPLE_S + 2 * 10  # two calls
    assert seconds(replace(settings, n_samples=1), sampler="mean") == pytest.approx(alone)
    assert seconds(settings, n_runs=2) > seconds(settings, n_runs=0) + forecast.RUN_S


def test_the_other_steps_take_longer_for_more_voxels():
    assert forecast.other_seconds(1e5) == 22
    assert 22 < forecast.other_seconds(1e6) < forecast.other_seconds(4e6) < 35
    assert forecast.other_seconds(1e8) == 35


@pytest.mark.parametrize(("load", "words"), [(0.4, "is not busy now (load 0.1"), (8.0, "2.0 per")])
def test_it_says_how_busy_the_machine_is(monkeypatch, load, words):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert words in plan.busy_now()


def test_a_short_time_has_a_decimal():
    assert [plan.minutes(s) for s in (90, 599, 1200)] == ["1.5 min", "10.0 min", "20 min"]


THICK = (Grid((160, 200, 30), np.diag([1.0, 1, 5, 1])), Acquisition(2, 5.0, 5.0))
THIN = (Grid((160, 200, 150), np.eye(4)), Acquisition(2, 1.0, 1.0))
MEDIUM = (Grid((130, 160, 120), np.diag([1.25, 1.25, 1.25, 1])), Acquisition(2, 1.25, 1.25))
TWO_D = (Grid((160, 200, 130), np.diag([1.0, 1, 1.3, 1])), Acquisition(2, 1.0, 1.3))


@pytest.mark.parametrize(
    ("scan", "given", "more", "sampler", "calls", "uncertainty"),
    [
        (THICK, {}, {}, "conditional", 40, "prior"),
        (THIN, {}, {}, "conditional", 40, "prior"),
        (MEDIUM, {}, {}, "conditional", 40, "prior"),  # encoded in k-space
        (TWO_D, {}, {}, "exact", 80, "samples"),
        (THICK, {"sampler": "mean", "n_samples": 1}, {}, "mean", 2, "prior"),
        (TWO_D, {"sampler": "mean", "n_samples": 1}, {}, "exact", 20, None),
        (TWO_D, {"sampler": "conditional", "n_samples": 1}, {}, "exact", 20, None),
        (THICK, {"sampler": "exact"}, {}, "exact", 80, "samples"),
        (THICK, {"sampler": "exact", "n_samples": 1}, {}, "exact", 20, None),
        (THICK, {"n_samples": 1, "n_steps": 1}, {}, "exact", 1, None),
        # fused: the network does not predict the uncertainty
        (THICK, {}, {"n_runs": 2}, "conditional", 80, "samples"),
        (THICK, {"sampler": "mean", "n_samples": 1}, {"n_runs": 2}, "conditional", 20, None),
        (THICK, {"task": "restore+inpaint"}, {"any_hidden": True}, "exact", 80, "samples"),
        (THIN, {"task": "restore+inpaint"}, {"any_hidden": True}, "conditional", 80, "prior"),
        (THIN, {"task": "inpaint"}, {"any_hidden": True}, "conditional", 80, "samples"),
        (THICK, {"task": "restore+refine"}, {}, "conditional", 40, "samples"),
        (THIN, {"task": "refine"}, {}, "conditional", 40, "prior"),
        (THIN, {"task": "refine"}, {"uneven_noise": True}, "exact", 80, "samples"),
    ],
)
def test_the_sampling_of_a_scan(settings, scan, given, more, sampler, calls, uncertainty):
    result = plan.expected_sampling(*scan, replace(settings, **given), **more)
    assert (result.sampler.name, result.calls, result.uncertainty) == (sampler, calls, uncertainty)
    requested = {"auto": "conditional"}.get(given.get("sampler", "auto"), given.get("sampler"))
    assert (result.reason is None) == (sampler == requested)
