# SPDX-License-Identifier: Apache-2.0
"""The whole command on a data set with one good scan and several unusable ones."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jsonschema
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from brainprior_bids import __version__
from brainprior_bids.bids.provenance import recorded_sha256
from brainprior_bids.bids.validate import find_validator, validate
from brainprior_bids.engine.grids import MNI305
from brainprior_bids.engine.restore import RIM_MM
from brainprior_bids.evaluation import demo

BAD = {
    "02": "truncated",
    "03": "four volumes",
    "04": "all zero",
    "05": "NaN in the brain",
    "06": "empty file",
    "07": "cannot be opened",
    "08": "a link to nothing",
}


def brainprior(*arguments, **environment):
    """Run the command as a user does; few steps, two processors, no home, no HTTP."""
    return subprocess.run(
        [sys.executable, "-m", "brainprior_bids", *map(str, arguments), "--device", "cpu",
         "--nprocs", "2", "--omp-nthreads", "2", "--sloppy"],
        capture_output=True,
        text=True,
        check=False,
        env={
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
            **environment,
        },
    )  # fmt: skip


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def raw(tmp_path_factory, write_demo):
    root = write_demo(tmp_path_factory.mktemp("app") / "raw data")
    good = root / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    image = nib.load(good)
    data = np.asarray(image.dataobj)
    moved = np.array(image.affine)
    moved[0, 3] += 7
    image.set_qform(moved, 1)  # a fallback with a warning: the sform is used
    nib.save(nib.Nifti1Image(data, None, image.header), good)
    for subject, what in BAD.items():
        path = root / f"sub-{subject}" / "anat" / f"sub-{subject}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        shutil.copy(good.with_name("sub-01_T1w.json"), path.with_name(f"sub-{subject}_T1w.json"))
        if what == "truncated":
            path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
        elif what == "a link to nothing":
            path.symlink_to("../../.git/annex/objects/gone")
        elif what == "cannot be opened":  # permissions have no effect for root
            path.with_name(f"sub-{subject}_T1w.json").unlink()
            folder = os.open(path.parent, os.O_RDONLY)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(f"/proc/self/fd/{folder}/{path.name}")
            os.close(folder)
        elif what == "empty file":
            path.touch()
        else:
            bad = data.astype(np.float32)
            if what == "four volumes":
                bad = np.stack([bad[::4, ::4]] * 4, axis=-1)
            elif what == "all zero":
                bad = np.zeros_like(bad)
            else:
                middle = tuple(slice(n // 3, 2 * n // 3) for n in bad.shape)
                bad[middle] = np.nan
            nib.save(nib.Nifti1Image(bad, image.affine), path)
    participants = root / "participants.tsv"
    if participants.exists():
        participants.unlink()
    return root


@pytest.fixture(scope="module")
def ended(raw):
    """The run, and the raw data's hashes before it."""
    before = digests(raw)
    output_dir = raw.parent / "out put"
    return brainprior(raw, output_dir, "participant"), output_dir, before


def test_one_scan_is_done_and_the_others_fail_with_a_reason(ended):
    done, output_dir, _ = ended
    assert done.returncode == 1, done.stderr
    with (output_dir / "logs" / "status.tsv").open(newline="") as stream:
        rows = {
            row["source"][4:6]: row
            for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        }
    assert {subject: row["status"] for subject, row in rows.items()} == {
        "01": "done",
        **dict.fromkeys(BAD, "failed"),
    }
    for subject in BAD:
        message = rows[subject]["message"]
        assert message.startswith(f"sub-{subject}_T1w: "), message
        assert "Traceback" not in message
        assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert float(rows["01"]["seconds"]) > 1


def test_a_fallback_is_logged_reported_and_recorded(ended):
    done, output_dir, _ = ended
    text = "sub-01_T1w: sform and qform differ by up to 7.00 mm; the sform is used."
    assert text in done.stderr
    assert text in (output_dir / "sub-01.html").read_text()
    (record,) = (output_dir / "prov").glob("*_act*")
    (activity,) = json.loads(record.read_text())["Activities"]
    assert any(warning.startswith(text) for warning in activity["Warnings"])


def test_only_the_good_scan_leaves_derivatives(ended):
    _, output_dir, _ = ended
    for subject in BAD:
        assert not (output_dir / f"sub-{subject}" / "anat").exists()
        assert "failed" in (output_dir / f"sub-{subject}.html").read_text()
    assert not list(output_dir.glob(".brainprior-staging-*"))
    assert not [path for path in output_dir.rglob("*.json") if path.stat().st_size == 0]


def test_the_raw_data_is_untouched(ended, raw):
    assert digests(raw) == ended[2]


def test_the_outputs_are_on_their_grids_and_plausible(ended, raw):
    _, output_dir, _ = ended
    anat = output_dir / "sub-01" / "anat"
    source = nib.load(raw / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    restored = nib.load(anat / "sub-01_desc-restored_T1w.nii.gz")
    mask = nib.load(anat / "sub-01_desc-brain_mask.nii.gz")
    labels = nib.load(anat / "sub-01_desc-structures_dseg.nii.gz")
    template = nib.load(anat / "sub-01_space-MNI305_desc-restored_T1w.nii.gz")
    np.testing.assert_allclose(restored.header.get_zooms(), 1.0, atol=0.02)
    for image in (mask, labels):
        assert image.shape == restored.shape
        np.testing.assert_allclose(image.affine, restored.affine)
    # the corners of both fields of view meet: same axes, same edges
    for corner in (0, 1):
        at = [nib.affines.apply_affine(image.affine, np.array(image.shape) * corner - 0.5)
              for image in (source, restored)]  # fmt: skip
        np.testing.assert_allclose(at[0], at[1], atol=1e-3)
    assert template.shape == MNI305.shape
    np.testing.assert_array_equal(template.affine, MNI305.affine)
    inside = np.asarray(mask.dataobj) > 0
    values = restored.get_fdata(dtype=np.float32)
    assert np.isfinite(values).all()
    away = ndimage.distance_transform_edt(~inside, sampling=mask.header.get_zooms())
    assert not values[away > RIM_MM + 0.1].any()
    ml = inside.sum() * np.prod(mask.header.get_zooms()) / 1000
    assert 1200 < ml < 2300
    # without bias field and in the scan's units: the truth of the demo
    assert np.percentile(values[inside], 99) == pytest.approx(demo.SCANNER_UNIT, rel=0.25)


def test_left_is_left(ended):
    """Left structures lie at smaller scanner x (RAS), in the image and in the transform."""
    _, output_dir, _ = ended
    summary = json.loads((output_dir / "logs" / "scans" / "sub-01_T1w.json").read_text())
    centroid = {
        row["name"]: row["centroid_mm"][0] for row in summary["facts"]["parcellation"]["table"]
    }
    sides = [name[5:] for name in centroid if name.startswith("Left-")]
    assert len(sides) > 8
    for name in sides:
        assert centroid[f"Left-{name}"] < centroid[f"Right-{name}"]
    assert np.linalg.det(np.array(summary["facts"]["affine"]["matrix"])[:3, :3]) > 0


def test_time_and_memory_of_every_node_are_recorded(ended):
    _, output_dir, _ = ended
    summary = json.loads((output_dir / "logs" / "scans" / "sub-01_T1w.json").read_text())
    names = [node["node"] for node in summary["nodes"]]
    assert names == [
        "Conform", "Parcellate", "N4", "CentroidAffine", "Restore", "ToMNI305", "Reportlets",
    ]  # fmt: skip
    assert all(0.05 < node["peak_memory_gb"] < 8 for node in summary["nodes"])
    assert len(summary["figures"]) >= 7
    for figure in summary["figures"]:
        assert (output_dir / figure).stat().st_size > 1000
    assert (output_dir / "sub-01.html").stat().st_size > 1000


def schema(record):
    text = resources.files("brainprior_bids") / "data" / "schemas" / f"{record}.schema.json"
    content = json.loads(text.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content)


@pytest.mark.parametrize("record", ["act", "io", "soft", "env"])
def test_provenance_is_as_its_schema_says(ended, record):
    files = list((ended[1] / "prov").glob(f"prov-*_{record}.json"))
    assert len(files) == 1  # of the run, or of the one scan that was done
    result = json.loads(files[0].read_text())
    check = schema(record)
    check.validate(result)
    for key in next(iter(result.values()))[0]:  # and the schema does not accept everything
        if key in ("AtLocation", "GeneratedBy"):
            continue
        less = copy.deepcopy(result)
        del next(iter(less.values()))[0][key]
        assert not check.is_valid(less), key
    next(iter(result.values()))[0]["Surprise"] = 1
    assert not check.is_valid(result)


def test_every_file_has_its_hash_in_the_provenance(ended):
    _, output_dir, _ = ended
    (record,) = (output_dir / "prov").glob("prov-*_io.json")
    files = json.loads(record.read_text())["Files"]
    written = {f["AtLocation"]: recorded_sha256(f) for f in files if "GeneratedBy" in f}
    anat = digests(output_dir / "sub-01" / "anat")
    assert written == {f"sub-01/anat/{name}": digest for name, digest in anat.items()}
    others = [f["Label"] for f in files if "GeneratedBy" not in f]
    assert others[0] == "sub-01_T1w.nii.gz"
    assert [label.split(":")[0] for label in others[1:]] == ["weights", "weights"]


def test_every_label_of_the_records_is_described_once(ended):
    folder = ended[1] / "prov"
    header, *lines = (folder / "provenance.tsv").read_text().splitlines()
    assert header == "provenance_id\tdescription"
    rows = [line.split("\t") for line in lines]
    labels = {path.name.partition("_")[0] for path in folder.glob("*.json")}
    assert [name for name, _ in rows] == sorted(labels)
    run, scan = (meaning for _, meaning in rows)
    assert run == f"software and environment of a run of brainprior {__version__}"
    assert scan == "restore sub-01_T1w"


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno is not installed")
def test_the_validator_finds_no_error_in_the_outputs(ended):
    assert validate(ended[1], command=find_validator()) == []


def test_a_second_call_skips_what_is_done(ended, raw):
    _, output_dir, _ = ended
    before = digests(output_dir / "sub-01" / "anat")
    again = brainprior(raw, output_dir, "participant", "--participant-label", "sub-01")
    assert again.returncode == 0, again.stderr
    assert "already done" in again.stderr
    assert digests(output_dir / "sub-01" / "anat") == before
    rows = (output_dir / "logs" / "status.tsv").read_text().splitlines()
    assert rows[1].split("\t")[2] == "skipped"
    assert len(rows) == 1 + 1 + len(BAD)  # the other scans' rows stay


def test_removed_outputs_come_back_from_the_work_folder(ended, raw):
    _, output_dir, _ = ended
    before = digests(output_dir / "sub-01" / "anat")
    shutil.rmtree(output_dir / "sub-01" / "anat")
    again = brainprior(raw, output_dir, "participant", "--participant-label", "01")
    assert again.returncode == 0, again.stderr
    assert "restore …" not in again.stderr  # reused from the work folder
    assert digests(output_dir / "sub-01" / "anat") == before


def test_usage_errors_end_with_2_and_write_nothing(raw, tmp_path):
    output_dir = tmp_path / "out"
    for extra, messages in (
        (["--participant-label", "99"], "No such participant"),
        (["-m", "FLAIR"], "modalities: FLAIR"),
        (["--task", "refine"], "--derivatives NAME=PATH"),
    ):
        done = brainprior(raw, output_dir, "participant", *extra)
        assert done.returncode == 2
        assert messages in done.stderr
        assert not output_dir.exists()


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno is not installed")
def test_invalid_bids_ends_with_2_unless_skipped(raw, tmp_path):
    copy = tmp_path / "raw"
    shutil.copytree(raw / "sub-04", copy / "sub-04")
    (copy / "dataset_description.json").write_text('{"BIDSVersion": "1.10.0"}')  # no Name
    done = brainprior(copy, tmp_path / "out", "participant")
    assert done.returncode == 2
    assert "--skip-bids-validation" in done.stderr
    done = brainprior(copy, tmp_path / "out", "participant", "--skip-bids-validation")
    assert done.returncode == 1
