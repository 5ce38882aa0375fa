# SPDX-License-Identifier: Apache-2.0
"""``--fuse runs``: which scans are fused, the name of the result, and the reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import PurePosixPath

import nibabel as nib
import numpy as np
import pytest
from brainprior_bids.workflows.base import init_brainprior_wf
from brainprior_bids.workflows.scan import Job, expected_work

from brainprior_bids.bids.derivatives import sidecars
from brainprior_bids.bids.fuse import fuse_runs
from brainprior_bids.bids.given import Given
from brainprior_bids.bids.names import BIDSName, output_names, residual_role
from brainprior_bids.bids.query import Scan, find_scans
from brainprior_bids.cli.parser import parse_settings
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.records import ScanRecord, StepRecords
from brainprior_bids.reports.methods import methods_text, of_summary
from brainprior_bids.reports.subject import restore_rows
from brainprior_bids.run.plan import print_plan
from brainprior_bids.settings import Settings

STEMS = (
    "sub-01_ses-a_acq-cor_run-1_T2w",
    "sub-01_ses-a_acq-axi_run-1_T2w",
    "sub-01_ses-a_run-2_T2w",
    "sub-01_ses-a_run-1_T1w",
    "sub-01_ses-a_rec-dis_run-1_T1w",
    "sub-01_ses-b_run-1_T2w",
    "sub-02_run-1_T2w",
    "sub-02_run-2_T2w",
)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuse") / "raw"
    for index, stem in enumerate(STEMS):
        path = root / BIDSName.parse(stem).folder / "anat" / f"{stem}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        thick = 3.0 if "axi" in stem else 5.0
        image = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.diag([1, 1, thick, 1]))
        nib.save(image, path)
        path.with_name(f"{stem}.json").write_text(json.dumps({"EchoTime": 0.01 * index}))
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    return root


@pytest.fixture
def settings(raw, tmp_path):
    return Settings(raw, tmp_path / "out", tmp_path / "work", fuse="runs")


def test_runs_of_one_contrast_and_session_become_one_scan(settings):
    fused = {scan.name.stem: scan for scan in fuse_runs(find_scans(settings))}
    assert set(fused) == {
        "sub-01_ses-a_T2w",
        "sub-01_ses-a_run-1_T1w",  # alone: it keeps its name
        "sub-01_ses-a_rec-dis_run-1_T1w",
        "sub-01_ses-b_run-1_T2w",
        "sub-02_T2w",
    }
    scan = fused["sub-01_ses-a_T2w"]
    assert [run.name.stem for run in scan.runs] == [STEMS[1], STEMS[0], STEMS[2]]  # thinnest first
    assert scan.path == scan.runs[0].path
    assert scan.metadata == {"EchoTime": 0.01}
    assert (
        output_names(scan.name, n_samples=1)["restored"] == "sub-01_ses-a_desc-restored_T2w.nii.gz"
    )
    assert not fused["sub-01_ses-b_run-1_T2w"].runs


def test_a_run_that_cannot_be_used_fails_its_group_alone(settings):
    scans = find_scans(settings)
    broken = [
        replace(scan, problem="the file is gone") if scan.name.stem == STEMS[0] else scan
        for scan in scans
    ]
    fused = {scan.name.stem: scan for scan in fuse_runs(broken)}
    problem = fused["sub-01_ses-a_T2w"].problem
    assert problem == "sub-01_ses-a_T2w: cannot be fused. the file is gone"
    assert all(scan.problem is None for name, scan in fused.items() if "ses-a_T2w" not in name)


def test_the_graph_aligns_every_other_run(settings, tmp_path):
    file = tmp_path / "weights"
    file.touch()
    scan = next(s for s in fuse_runs(find_scans(settings)) if s.name.stem == "sub-01_ses-a_T2w")
    given = {"mask": Given(file, "bids:x:mask")}
    asked = replace(settings, slice_thickness_mm=4.0, field_strength_t=0.55, skull_strip="mask")
    job = Job(scan, 7, "f" * 64, given, (), [(run, given) for run in scan.runs[1:]])
    workflow = init_brainprior_wf(jobs=[job], settings=asked, prior=file, parcellation=file)
    steps = {node.name: node for node in workflow._get_all_nodes()}
    assert set(steps) - {"records"} == set(expected_work(asked))
    runs = steps["align"].inputs.runs
    assert [run["name"] for run in runs] == [STEMS[0], STEMS[2]]
    for run, source in zip(runs, scan.runs[1:], strict=True):
        assert run["conform"]["in_file"] == str(source.path)
        assert run["conform"]["slice_thickness"] == 4.0
        assert run["conform"]["metadata"]["MagneticFieldStrength"] == 0.55
        assert run["parcellate"]["mask_file"] == str(file)
        assert run["parcellate"]["skull_strip"] == "mask"
    write = steps["write"].inputs
    assert write.name == "sub-01_ses-a_T2w"
    assert write.given[STEMS[0]]["uri"] == f"bids:raw:sub-01/ses-a/anat/{STEMS[0]}.nii.gz"


def test_the_dry_run_says_what_is_fused(settings, capsys):
    print_plan(fuse_runs(find_scans(settings)), settings)
    messages = capsys.readouterr().out
    assert messages.count("  fuses ") == 5
    assert f"  fuses sub-01/ses-a/anat/{STEMS[2]}.nii.gz" in messages
    assert "sub-02/anat/sub-02_desc-restored_T2w.nii.gz" in messages


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--task", "refine", "-d", "x=RAW", "--trust", "0.1"], "refine alone uses none"),
        (["--sampler", "mean"], "can be conditioned on only one"),
        (["--export", "fmriprep"], "Leave out --export or --fuse"),
    ],
)
def test_what_does_not_go_with_fusing_is_a_usage_error(raw, tmp_path, given, text):
    command = [str(raw), str(tmp_path / "out"), "participant", "--fuse", "runs"]
    command += [word.replace("RAW", str(raw)) for word in given]
    with pytest.raises(UsageError, match=text):
        parse_settings(command)
    assert parse_settings(command[:5]).fuse == "runs"


FACTS = {
    "sampler": "exact", "n_samples": 2, "calls": 20, "seed": 1, "prior": {}, "unit": 500.0,
    "noise_sd": 0.01, "noise_sd_initial": 0.01, "sample_seeds": [1, 2], "contrast": "T2w",
    "residual_ratios": [1.0, 1.0],
    "runs": [
        {"name": STEMS[1], "acquisition": {"thickness_mm": 3.0, "slice_axis": 2},
         "to_reference": np.eye(4).tolist(), "gain": 1.0, "noise_sd": 0.01,
         "residual_ratios": [1.01, 0.99]},
        {"name": STEMS[0], "acquisition": {"thickness_mm": 5.0, "slice_axis": 1},
         "to_reference": np.eye(4).tolist(), "gain": 1.25, "noise_sd": 0.02,
         "residual_ratios": [1.1, 1.2], "angle_deg": 3.21, "shift_mm": 4.5, "correlation": 0.97,
         "lesion": {"hidden_ml": 1.25}},
    ],
}  # fmt: skip


def scan_record(restore):
    return ScanRecord.from_json(
        {"scan": "sub-01_ses-a_T2w", "task": "restore", "facts": {"restore": restore}}
    )


def test_report_methods_and_sidecar_say_what_was_fused():
    rows = dict(restore_rows(scan_record(FACTS)))
    assert (
        rows[f"Run {STEMS[1]}"]
        == "slices of 3 mm inferior-superior, noise 0.0100, residual 1.01, 0.99"
    )
    assert (
        "registered to the first by 3.2° and 4.5 mm at its centre, correlation 0.97"
        in rows[f"Run {STEMS[0]}"]
    )
    assert rows[f"Run {STEMS[0]}"].endswith("; 1.2 ml under its own lesion mask excluded")
    assert rows["Coverage of the intervals"] == "not measured for these weights"
    measured = {**FACTS, "prior": {"coverage": "50 % in 44 %"}}
    assert ("Coverage of the intervals", "50 % in 44 %") in restore_rows(scan_record(measured))
    text = " ".join(methods_text([of_summary(scan_record(FACTS))]).split())
    assert "1 of these images combines 2 runs of one contrast each" in text
    alone = {**FACTS, "runs": None}
    text = methods_text([of_summary(scan_record(alone))])
    assert "of one contrast" not in text

    name = BIDSName.parse("sub-01_ses-a_T2w")
    path = PurePosixPath("sub-01/ses-a/anat") / f"{STEMS[1]}.nii.gz"
    uri = f"bids:raw:sub-01/ses-a/anat/{STEMS[0]}.nii.gz"
    names = output_names(name, n_samples=2, runs=[BIDSName.parse(STEMS[0])])
    every = sidecars(
        Scan(path, path, name),
        names,
        StepRecords.from_json(
            {"restore": FACTS, "given": {STEMS[0]: {"uri": uri, "sha256": "0"}}}
        ),
    )
    residual = every[residual_role(STEMS[0])]
    assert names[residual_role(STEMS[0])] == f"{STEMS[0][:-4]}_mod-T2w_desc-fused_residual.nii.gz"
    assert residual["Sources"] == [uri, f"bids::{names['restored']}"]
    assert residual["NoiseStandardDeviation"] == 8.0  # in the units of that run
    assert "minus the samples' prediction" in residual["Description"]
    side = every["restored"]
    assert side["Sources"][:2] == [f"bids:raw:{path}", uri]
    assert side["Description"].endswith("of 2 runs in one likelihood")
    assert side["FusedRuns"][1]["NoiseStandardDeviation"] == 10.0
    assert side["FusedRuns"][1]["Lesion"]["hidden_ml"] == 1.25
    assert "Lesion" not in side["FusedRuns"][0]
    assert "OutsideTrainingContrasts" not in side


def test_a_contrast_outside_of_the_training_is_marked(raw, tmp_path):
    command = [str(raw), str(tmp_path / "out"), "participant", "-m", "PDw", "T2starw"]
    assert parse_settings(command).modalities == ("PDw", "T2starw")
    with pytest.raises(UsageError, match="use T1w, T2w, FLAIR, UNIT1, PDw"):
        parse_settings([*command[:4], "bold"])
    path = PurePosixPath("sub-01/anat/sub-01_PDw.nii.gz")
    scan = Scan(path, path, BIDSName.parse(path))
    assert scan.contrast == "unknown"
    facts = {**FACTS, "contrast": "unknown", "runs": None}
    names = output_names(scan.name, n_samples=2)
    side = sidecars(scan, names, scan_record(facts).facts)
    assert side["restored"]["OutsideTrainingContrasts"] is True
    rows = dict(restore_rows(scan_record(facts)))
    assert rows["Contrast"].startswith("unknown: the prior was not trained on this contrast")
