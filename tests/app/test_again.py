# SPDX-License-Identifier: Apache-2.0
"""A finished scan is skipped if nothing changed, and otherwise processed again, with the reason.

Nothing is restored here: the summary is written as ``Write`` does, with the parts that were looked
up, and what a second command would do is asked.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from brainprior_bids.bids import fingerprint as code
from brainprior_bids.bids.claims import Claims
from brainprior_bids.bids.files import write_json
from brainprior_bids.bids.fingerprint import changes
from brainprior_bids.bids.fuse import fuse_runs
from brainprior_bids.bids.query import find_scans
from brainprior_bids.bids.status import read_summary, write_summary
from brainprior_bids.cli.parser import parse_settings
from brainprior_bids.cli.run import main
from brainprior_bids.engine import weights as embedded
from brainprior_bids.engine.weights import write_weights
from brainprior_bids.records import ScanRecord, ScanStatus
from brainprior_bids.run.jobs import look_up, plan_jobs
from brainprior_bids.run.preflight import checked_weights

SCAN = "sub-01/anat/sub-01_run-1_T1w"


def image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.full((4, 4, 4), value, np.int16), np.eye(4)), path)


@pytest.fixture
def raw(tmp_path):
    root = tmp_path / "raw"
    for name in (SCAN, SCAN.replace("run-1", "run-2")):
        image(root / f"{name}.nii.gz")
    write_json(root / "dataset_description.json", {"Name": "t", "BIDSVersion": "1.10.0"})
    write_json(root / "T1w.json", {"SliceThickness": 5.0})
    (root.parent / "strip.pt").write_bytes(b"model")
    return root


def command(raw, *extra):
    given = [raw, raw.parent / "out", "participant", "--device", "cpu", "--nprocs", 1, "-m", "T1w"]
    return [*map(str, given), *map(str, extra)]


def scans_of(settings):
    result = find_scans(settings)
    return fuse_runs(result) if settings.fuse else result


def hashes(settings):
    return {role: digest for role, (_, digest) in checked_weights(settings).items()}


def finish(raw, *extra):
    """Write the summaries that a run of this command would write."""
    settings = parse_settings(command(raw, *extra))
    for scan in scans_of(settings):
        result = look_up(scan, settings, hashes(settings))
        output = f"{scan.name.stem}.nii.gz"
        (settings.output_dir).mkdir(exist_ok=True)
        (settings.output_dir / output).touch()
        write_summary(
            settings.output_dir,
            ScanRecord(
                scan=scan.name.stem,
                subject="01",
                status=ScanStatus.DONE,
                parts=result.parts,
                fingerprint=result.fingerprint,
                outputs=(output,),
            ),
        )


def again(raw, told, *extra):
    """Scans that the next run would process again: stem -> reason."""
    settings = parse_settings(command(raw, *extra))
    told.clear()
    with Claims([settings.work_dir]) as claims:
        jobs = plan_jobs(scans_of(settings), settings, hashes(settings), claims)
    messages = [record.getMessage() for record in told.records]
    stems = [job.scan.name.stem for job in jobs]
    return {stem: next(text for text in messages if text.startswith(stem)) for stem in stems}


def test_what_did_not_change_is_skipped_however_it_is_computed(raw, told):
    finish(raw)
    assert again(raw, told) == {}
    same = ("--nprocs", "3", "--omp-nthreads", "1", "--low-mem", "-v", "--mem", "5G")
    assert again(raw, told, *same, "--random-seed", "0", "--sampler", "auto") == {}
    summary = read_summary(raw.parent / "out", "sub-01_run-1_T1w")
    assert summary.status == "skipped"
    assert summary.parts["setting n_samples"] == "4"


OPTIONS = (
    (["--random-seed", "1"], "setting random_seed (0, now 1)"),
    (["--n-samples", "2"], "setting n_samples (4, now 2)"),
    (["--sloppy"], 'setting n_samples (4, now 1), setting n_steps ("default", now 3)'),
    (["--sampler", "exact"], 'setting sampler ("auto", now "exact")'),
    (["--slice-thickness", "4"], "setting slice_thickness_mm (null, now 4.0)"),
    (["--slice-plane", "axial"], 'setting slice_plane (null, now "axial")'),
    (["--save-samples"], "setting save_samples (false, now true)"),
    (["--output-grid", "native"], 'setting output_grid ("1mm", now "native")'),
    (["--output-spaces", "anat"], "setting output_spaces"),
    (["--skull-strip", "skip"], 'setting skull_strip ("embedded", now "skip")'),
    (["--force"], "because of --force"),
)


def test_another_option_does_it_again(raw, told):
    finish(raw)
    for extra, messages in OPTIONS:
        result = again(raw, told, *extra)
        assert set(result) == {"sub-01_run-1_T1w", "sub-01_run-2_T1w"}, extra
        assert all(messages in text for text in result.values()), result


def test_a_changed_scan_sidecar_or_output_does_only_that_scan_again(raw, told):
    finish(raw)
    only = "sub-01_run-1_T1w"
    image(raw / f"{SCAN}.nii.gz", value=1)
    result = again(raw, told)
    assert list(result) == [only]
    assert result[only].endswith("changes: image")
    finish(raw)
    write_json(raw / f"{SCAN}.json", {"SliceThickness": 3.0, "EchoTime": 0.1})
    result = again(raw, told)
    assert list(result) == [only]
    assert "metadata EchoTime (absent, now 0.1)" in result[only]
    assert "metadata SliceThickness (5.0, now 3.0)" in result[only]
    finish(raw)
    (raw.parent / "out" / f"{only}.nii.gz").unlink()
    assert "1 file(s) are missing" in again(raw, told)[only]
    # inherited by both
    finish(raw)
    write_json(raw / "T1w.json", {"SliceThickness": 5.0, "MRAcquisitionType": "2D"})
    assert len(again(raw, told)) == 2


@pytest.mark.parametrize("role", ["prior", "parcellation"])
def test_other_weights_do_it_again(raw, told, tmp_path, monkeypatch, role):
    """Another file of ``--prior``, and other weights in the package under the same name."""
    finish(raw)
    folder = tmp_path / "weights"
    shutil.copytree(embedded.FOLDER, folder)
    path = folder / f"{role}.safetensors"
    state, card = embedded.read_weights(path, kind=role)
    name = next(iter(state))
    state[name] = state[name] + 1
    kept = {key: value for key, value in card.items() if key not in ("file", "sha256")}
    write_weights(path, state, kept)
    if role == "prior":
        result = again(raw, told, "--prior", path)
        assert all(text.endswith("changes: weights of prior") for text in result.values())
        assert len(result) == 2
    monkeypatch.setattr(embedded, "FOLDER", folder)
    result = again(raw, told)
    assert len(result) == 2
    assert all(text.endswith(f"changes: weights of {role}") for text in result.values())


def test_other_code_does_it_again(raw, told, tmp_path, monkeypatch):
    """An updated checkout with the same version number."""
    finish(raw)
    copy = tmp_path / "package"
    for name in code.COMPUTES:
        source = code.PACKAGE / name
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    monkeypatch.setattr(code, "PACKAGE", copy)
    code.code_version.cache_clear()
    try:
        assert again(raw, told) == {}
        slices = copy / "engine" / "operators" / "slices.py"
        slices.write_text(slices.read_text() + "\n# another profile\n")
        code.code_version.cache_clear()
        result = again(raw, told)
        assert len(result) == 2
        assert all(text.endswith("changes: program") for text in result.values())
    finally:
        code.code_version.cache_clear()


def test_each_fused_run_counts(raw, told):
    finish(raw, "--fuse", "runs")
    assert again(raw, told, "--fuse", "runs") == {}
    image(raw / f"{SCAN.replace('run-1', 'run-2')}.nii.gz", value=1)
    (text,) = again(raw, told, "--fuse", "runs").values()
    assert text.endswith("changes: sub-01_run-2_T1w")


def test_a_lesion_mask_counts(raw, told):
    lesion = raw / "sub-01" / "anat" / "sub-01_label-lesion_roi.nii.gz"
    image(lesion)
    task = ("--task", "restore", "inpaint", "--participant-label", "01", "--run-id", "1")
    settings = parse_settings(command(raw, *task))
    (scan,) = scans_of(settings)
    first = look_up(scan, settings, {})
    image(lesion, value=1)
    assert changes(first.parts, look_up(scan, settings, {}).parts) == "lesion"


def test_what_an_older_version_left_is_done_again(raw, told):
    finish(raw)
    out = raw.parent / "out"
    for stem in ("sub-01_run-1_T1w", "sub-01_run-2_T1w"):
        summary = read_summary(out, stem)
        write_summary(out, replace(summary, parts={}, fingerprint="0"))
    result = again(raw, told)
    assert len(result) == 2
    assert all("not recorded" in text for text in result.values())


def test_a_failure_says_that_an_earlier_result_is_still_there(raw, told):
    """The paths are kept, so that a later success can remove files that it does not replace."""
    finish(raw)
    for _ in range(2):  # a second failure forgets nothing
        again(raw, told, "--task", "restore", "--skull-strip", "mask", "-d", f"x={given(raw)}")
        summary = read_summary(raw.parent / "out", "sub-01_run-1_T1w")
        assert summary.status == "failed"
        assert summary.message.endswith("The files of an earlier run are still in place.")
        assert summary.outputs == ()
        assert summary.left == ("sub-01_run-1_T1w.nii.gz",)
    (raw.parent / "out" / "sub-01_run-1_T1w.nii.gz").unlink()
    again(raw, told, "--skull-strip", "mask", "-d", f"x={given(raw)}")
    summary = read_summary(raw.parent / "out", "sub-01_run-1_T1w")
    assert summary.left == ()
    assert "earlier run" not in summary.message


def given(raw):
    """A derivative data set without any mask."""
    write_json(raw.parent / "masks" / "dataset_description.json", {"Name": "m"})
    return raw.parent / "masks"


def test_a_dry_run_says_which_scans_are_done(raw, capsys):
    finish(raw)
    image(raw / f"{SCAN}.nii.gz", value=1)
    before = read_summary(raw.parent / "out", "sub-01_run-1_T1w")
    assert main(command(raw, "--dry-run")) == 0
    messages = capsys.readouterr().out
    assert messages.count("it would be skipped") == 1
    assert messages.count("rerunning because of changes: image") == 1
    assert "2 scan(s), of which 1 would be skipped, 40 network calls" in messages
    assert read_summary(raw.parent / "out", "sub-01_run-1_T1w") == before
