# SPDX-License-Identifier: Apache-2.0
"""Masks and labels of other data sets: which file belongs to a scan, and its record."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np
import pytest
from brainprior_bids.workflows.scan import Job, init_scan_wf

from brainprior_bids.bids.derivatives import sidecars, structures_table
from brainprior_bids.bids.fingerprint import decisive, fingerprint
from brainprior_bids.bids.given import find_given
from brainprior_bids.bids.names import BIDSName, output_names
from brainprior_bids.bids.provenance import recorded_sha256, scan_records, sha256_file
from brainprior_bids.bids.query import Scan
from brainprior_bids.bids.refined import name_after_images
from brainprior_bids.cli.run import main
from brainprior_bids.engine import weights
from brainprior_bids.engine.errors import InputError
from brainprior_bids.interfaces.anatomy import Parcellate
from brainprior_bids.records import (
    MaskSource,
    Origin,
    ParcellationRecord,
    StepRecords,
    StructuresSource,
)
from brainprior_bids.reports.methods import Method, methods_text
from brainprior_bids.settings import Settings


def given_of(scan, settings):
    """The files of a scan that is not fused."""
    (given,) = find_given(scan, settings)
    return given


def scan(stem="sub-01_T1w"):
    name = BIDSName.parse(f"{stem}.nii.gz")
    relative = PurePosixPath(name.folder) / "anat" / f"{stem}.nii.gz"
    return Scan(relative, relative, name, {})


def dataset(root, *files):
    root.mkdir()
    (root / "dataset_description.json").write_text("{}")
    for name in files:
        folder = root / BIDSName.parse(name).folder / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return str(root)


@pytest.fixture
def settings(tmp_path):
    return Settings(
        tmp_path / "raw", tmp_path / "out", tmp_path / "work",
        skull_strip="mask", parcellation="derivatives",
    )  # fmt: skip


def test_the_files_of_a_scan_are_found(settings, tmp_path):
    fmriprep = dataset(
        tmp_path / "prep",
        "sub-01_desc-brain_mask.nii.gz",
        "sub-01_desc-head_mask.nii.gz",
        "sub-01_label-lesion_mask.nii.gz",
        "sub-01_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz",
        "sub-01_dseg.nii.gz",
        "sub-01_desc-aseg_dseg.nii.gz",
        "sub-01_desc-aparcaseg_dseg.nii.gz",
    )
    other = dataset(
        tmp_path / "other",
        "sub-01_space-T2w_desc-brain_mask.nii.gz",
        "sub-01_space-T2w_desc-structures_dseg.nii.gz",
        "sub-01_ses-a_run-01_desc-brain_mask.nii.gz",
        "sub-01_ses-a_run-2_desc-brain_mask.nii.gz",
        "sub-01_ses-a_desc-aseg_dseg.nii",
    )
    both = replace(settings, derivatives={"prep": fmriprep, "other": other})

    def found(stem):
        return {role: file.uri for role, file in given_of(scan(stem), both).items()}

    assert found("sub-01_T1w") == {
        "mask": "bids:prep:sub-01/anat/sub-01_desc-brain_mask.nii.gz",
        "dseg": "bids:prep:sub-01/anat/sub-01_desc-aseg_dseg.nii.gz",
    }
    assert found("sub-01_T2w")["mask"].endswith("sub-01_space-T2w_desc-brain_mask.nii.gz")
    assert found("sub-01_ses-a_run-1_T1w") == {
        "mask": "bids:other:sub-01/ses-a/anat/sub-01_ses-a_run-01_desc-brain_mask.nii.gz",
        "dseg": "bids:other:sub-01/ses-a/anat/sub-01_ses-a_desc-aseg_dseg.nii",
    }
    with pytest.raises(InputError, match=r"no data set of --derivatives \(prep, other\)"):
        found("sub-01_ses-a_run-3_T1w")
    assert given_of(scan(), replace(both, skull_strip="skip", parcellation="embedded")) == {}


def test_two_masks_that_cannot_be_told_apart_are_refused(settings, tmp_path):
    names = ("sub-01_desc-brain_mask.nii.gz", "sub-01_desc-brain_mask.nii")
    both = replace(settings, derivatives={"d": dataset(tmp_path / "d", *names)})
    with pytest.raises(InputError, match="expected one file"):
        given_of(scan(), both)


def test_the_options_need_a_data_set_and_a_missing_file_fails_that_scan(tmp_path, capsys):
    raw = tmp_path / "raw"
    (raw / "sub-01" / "anat").mkdir(parents=True)
    (raw / "dataset_description.json").write_text('{"Name": "t", "BIDSVersion": "1.10.0"}')
    (raw / "sub-01" / "anat" / "sub-01_T1w.nii.gz").write_bytes(b"x")
    line = [str(raw), str(tmp_path / "out"), "participant", "--device", "cpu",
            "--skip-bids-validation", "--skull-strip", "mask"]  # fmt: skip
    assert main(line) == 2
    assert "expected --derivatives NAME=PATH" in capsys.readouterr().err
    assert main([*line, "-d", f"fs={dataset(tmp_path / 'fs')}"]) == 1
    with (tmp_path / "out" / "logs" / "status.tsv").open(newline="") as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    assert row["status"] == "failed"
    assert "(fs) has sub-01/anat/*_desc-brain_mask.nii.gz" in row["message"]


def test_another_mask_is_another_result(settings):
    def digest(**given):
        parts = decisive(scan(), settings, input_sha256="a", weights={}, given=given)
        return fingerprint(scan(), parts)

    assert digest(mask="1") == digest(mask="1")
    assert len({digest(), digest(mask="1"), digest(mask="2"), digest(dseg="1")}) == 4


def head():
    """A head of 4 mm voxels, its brain, and labels of six structures in it."""
    shape = (48, 56, 48)
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    place = np.indices(shape)

    def ball(radius, at):
        return sum((p - a) ** 2 for p, a in zip(place, at, strict=True)) < radius**2

    brain = ball(15, (24, 28, 24))
    labels = np.where(brain, 2, 0)
    labels[24:][brain[24:]] = 41
    for value, at in ((10, (20, 28, 24)), (49, (28, 28, 24)), (16, (24, 24, 16)),
                      (12, (17, 32, 24)), (51, (31, 32, 24)), (17, (18, 26, 18))):  # fmt: skip
        labels[ball(3, at)] = value
    data = 300.0 * ball(18, (24, 28, 24)) + 400.0 * brain
    return data.astype(np.float32), brain, labels.astype(np.int16), affine


def test_a_given_mask_and_labels_are_used_and_recorded(settings, tmp_path):
    data, brain, labels, affine = head()
    names = ("sub-01_desc-brain_mask.nii.gz", "sub-01_desc-aseg_dseg.nii.gz")
    other = tmp_path / "fs"
    asked = replace(settings, derivatives={"fs": dataset(other, *names)})
    for name, array in zip(names, (brain.astype(np.uint8), labels), strict=True):
        nib.save(nib.Nifti1Image(array, affine), other / "sub-01" / "anat" / name)
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "scan.nii")
    given = given_of(scan(), asked)
    workflow = init_scan_wf(
        job=Job(replace(scan(), path=tmp_path / "scan.nii"), 0, "f", given),
        settings=asked,
        name="x",
        prior=other / "dataset_description.json",
        parcellation=weights.FOLDER / "parcellation.safetensors",
    )  # fmt: skip
    node = workflow.get_node("parcellate").inputs
    folder = tmp_path / "node"
    folder.mkdir()
    inputs = {key: value for key, value in node.get().items() if key != "in_file"}
    done = Parcellate(in_file=str(tmp_path / "scan.nii"), **inputs).run(cwd=str(folder)).outputs
    output = nib.load(done.mask)
    assert output.shape == (192, 224, 192)
    share = np.asarray(output.dataobj).reshape(48, 4, 56, 4, 48, 4).mean((1, 3, 5)) > 0.5
    assert 2 * (share & brain).sum() / (share.sum() + brain.sum()) > 0.98
    facts = json.loads(Path(done.structures_json).read_text())
    # the network runs as well, to check whether the mask can be the brain
    assert 0.5 < facts["mask_agreement"] < 1, facts["mask_agreement"]
    uri = "bids:fs:sub-01/anat/sub-01_desc-brain_mask.nii.gz"
    assert facts["mask_source"] == "mask"
    assert facts["given"]["mask"] == {"uri": uri, "sha256": sha256_file(given["mask"].path)}
    assert {row["index"] for row in facts["table"]} >= {10, 49, 16, 12, 51}

    records = scan_records(
        scan(), run_uuid="r", activity="bids::prov#restore-0", command=[],
        settings={"task": "restore"}, seed=0,
        input_sha256="0", outputs={}, steps=StepRecords.from_json({"parcellation": facts}),
        nodes=[], warnings=[],
    )  # fmt: skip
    (files,) = (json.loads(t)["Files"] for n, t in records.items() if "_io" in n)
    assert {f["Id"]: recorded_sha256(f) for f in files}[uri] == sha256_file(given["mask"].path)
    (activity,) = (json.loads(t)["Activities"][0] for n, t in records.items() if "_act" in n)
    assert uri in activity["Used"]

    restore = {"sampler": "exact", "n_samples": 1, "calls": 1, "seed": 0, "prior": {}, "unit": 1.0,
               "noise_sd": 1.0, "noise_sd_initial": 1.0, "sample_seeds": []}  # fmt: skip
    side = sidecars(
        scan(),
        output_names(scan().name, n_samples=1),
        StepRecords.from_json({"restore": restore, "parcellation": facts}),
        image_desc="restored",
    )
    assert side["mask"]["Sources"] == [uri]
    assert uri in side["mask"]["Description"]
    assert "Weights" not in side["structures"]
    rows = [
        line.split("\t")
        for line in structures_table(ParcellationRecord.from_json(facts)).splitlines()
    ]
    assert {row[-1] for row in rows} == {
        "confidence",
        "n/a",
    }  # from the network, not from these files


def test_the_image_to_refine_and_its_trust(settings, tmp_path):
    """One image of the scan's contrast, in its space; a trust map by its pattern."""
    root = dataset(tmp_path / "fs", "sub-01_desc-brain_mask.nii.gz")
    asked = replace(
        settings, task="refine", trust="0.05", derivatives={"fs": root},
        skull_strip="embedded", parcellation="embedded",
    )  # fmt: skip
    folder = Path(root) / "sub-01" / "anat"
    with pytest.raises(InputError, match="no image to refine"):
        given_of(scan(), asked)
    for name in ("sub-02_T1w", "sub-01_run-2_T1w", "sub-01_space-MNI305_T1w"):
        (folder / f"{name}.nii.gz").touch()
    with pytest.raises(InputError, match="no image to refine"):
        given_of(scan(), asked)
    (folder / "sub-01_desc-SynthSR_T1w.nii.gz").touch()
    (folder / "sub-01_T2w.nii.gz").touch()  # the scan's own contrast takes precedence
    result = given_of(scan(), asked)
    assert result["refined"].uri == "bids:fs:sub-01/anat/sub-01_desc-SynthSR_T1w.nii.gz"
    assert set(result) == {"refined"}
    mapped = replace(asked, trust=str(folder / "{stem}_sd.nii.gz"))
    with pytest.raises(InputError, match="names 0 files"):
        given_of(scan(), mapped)
    (folder / "sub-01_T1w_sd.nii.gz").touch()
    assert given_of(scan(), mapped)["trust"].uri == "bids:fs:sub-01/anat/sub-01_T1w_sd.nii.gz"
    (folder / "sub-01_desc-other_T1w.nii.gz").touch()
    with pytest.raises(InputError, match="expected one image"):
        given_of(scan(), asked)


def test_an_image_of_another_contrast_is_found_and_gives_its_name(settings, tmp_path):
    """SynthSR returns a T1w for every contrast; the refined image is then a T1w."""
    root = dataset(tmp_path / "fs", "sub-01_desc-SynthSR_T1w.nii.gz")
    raw = tmp_path / "raw" / "sub-01" / "anat"
    raw.mkdir(parents=True)
    asked = replace(
        settings, task="refine", trust="0.05", derivatives={"fs": root},
        skull_strip="embedded", parcellation="embedded",
    )  # fmt: skip

    def of(stem):
        path = raw / f"{stem}.nii.gz"
        path.touch()
        return replace(scan(stem), path=path)

    t2w = of("sub-01_T2w")
    (named,) = name_after_images([t2w], asked)
    assert (named.name.stem, named.contrast, named.path) == ("sub-01_T1w", "T1w", t2w.path)
    assert given_of(named, asked) == given_of(t2w, asked)
    with pytest.raises(InputError, match="Use --task refine alone"):
        given_of(t2w, replace(asked, task="restore+refine"))
    # two scans, one image: its source must be specified
    flair = of("sub-01_FLAIR")
    problems = [s.problem for s in name_after_images([t2w, flair], asked)]
    assert all("sub-01_T2w.nii.gz, sub-01_FLAIR.nii.gz" in problem for problem in problems)
    folder = Path(root) / "sub-01" / "anat"
    (folder / "sub-01_desc-SynthSR_T1w.nii.gz").rename(folder / "sub-01_space-FLAIR_T1w.nii.gz")
    left, right = name_after_images([t2w, flair], asked)
    assert (left.name.stem, right.name.stem) == ("sub-01_T2w", "sub-01_T1w")
    assert given_of(right, asked)["refined"].path.name == "sub-01_space-FLAIR_T1w.nii.gz"
    with pytest.raises(InputError, match="no image to refine"):
        given_of(left, asked)
    # if there is a T1w among the scans, an image without space- belongs to it
    (folder / "sub-01_space-FLAIR_T1w.nii.gz").rename(folder / "sub-01_T1w.nii.gz")
    of("sub-01_T1w")
    with pytest.raises(InputError, match="no image to refine"):
        given_of(t2w, asked)
    (folder / "sub-01_space-T2w_T1w.nii.gz").touch()  # would have the name of that scan's result
    with pytest.raises(InputError, match="no image to refine"):
        given_of(t2w, asked)
    (raw / "sub-01_T1w.nii.gz").unlink()
    with pytest.raises(InputError, match="expected one image"):
        given_of(t2w, asked)


def test_the_methods_text_says_whose_masks_they_are():
    own = Origin(MaskSource.EMBEDDED)

    def method(mask, structures=Origin(StructuresSource.EMBEDDED)):  # noqa: B008
        return Method("T1w", "restore", "exact", 4, 20, "1", "p", "little-net", mask, structures)

    assert "structures and provided the brain mask (weights" in methods_text([method(own)])
    given = [Origin(MaskSource.FILE, f"bids:fs:sub-{n}/a") for n in (1, 2)]
    text = methods_text([method(mask) for mask in given])
    assert text.count("Brain masks were taken from the data set fs.") == 1
    assert "provided the brain mask" not in text
    programs = method(Origin(MaskSource.SYNTHSTRIP), Origin(StructuresSource.SYNTHSEG))
    text = methods_text([method(own), programs])
    assert "Brain masks of some scans were taken from SynthStrip." in text
    only = methods_text([programs])
    assert "little-net" not in only
