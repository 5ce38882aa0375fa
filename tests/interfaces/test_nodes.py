# SPDX-License-Identifier: Apache-2.0
"""Nodes on small files: their outputs, measurements and failures."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from templates import SPACE, write_template

from brainprior_bids.anatomy import normalise
from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.templates import find_template
from brainprior_bids.bids.derivatives import check_output, write_dataset_files
from brainprior_bids.bids.provenance import recorded_sha256, sha256_file, verify_records
from brainprior_bids.bids.qc import metrics, reasons
from brainprior_bids.bids.status import read_summaries, read_summary
from brainprior_bids.bids.validate import find_validator, validate, validate_scans
from brainprior_bids.engine import weights
from brainprior_bids.engine.denoiser import ErrorSpectrum, Precondition
from brainprior_bids.engine.errors import GeometryError, InputError, UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.restore import sample_seed
from brainprior_bids.engine.result import sample_sd
from brainprior_bids.engine.unet import UNet
from brainprior_bids.interfaces.anatomy import Conform, ToMNI305
from brainprior_bids.interfaces.base import FAILURE, RECORD, Meter
from brainprior_bids.interfaces.derivatives import Write, copy_image
from brainprior_bids.interfaces.files import save
from brainprior_bids.interfaces.lesion import Lesion
from brainprior_bids.interfaces.restoration import found_motion
from brainprior_bids.interfaces.restore import Restore
from brainprior_bids.interfaces.templates import ToTemplates, disagreements
from brainprior_bids.records import HeaderRecord, TemplatesRecord
from brainprior_bids.reports.methods import methods_text, of_summary

SHAPE = (40, 44, 10)
SPACING = (1.0, 1.0, 4.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A data set of one small FLAIR: a bright ellipsoid with a stripe, and noise."""
    root = tmp_path_factory.mktemp("source") / "raw"
    (root / "sub-01" / "ses-a" / "anat").mkdir(parents=True)
    (root / "dataset_description.json").write_text(
        json.dumps({"Name": "t", "BIDSVersion": "1.10.0", "DatasetType": "raw", "License": "CC0"})
    )
    (root / "README").write_text("A data set for a test. " * 10)
    (root / "FLAIR.json").write_text('{"SliceThickness": 4.0, "MagneticFieldStrength": 3}')
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = -np.array(SHAPE) * SPACING / 2
    grid = Grid(SHAPE, affine)
    rng = np.random.default_rng(1)
    inside = ellipsoid(grid)
    data = inside * (600 + 150 * np.sin(grid.points_mm()[0] / 3)) + rng.normal(0, 10, SHAPE)
    path = root / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_FLAIR.nii.gz"
    image = nib.Nifti1Image(np.abs(data).astype(np.int16), affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_dim_info(freq=1, phase=0, slice=2)
    image.header["descrip"] = b"TE=90"
    image.header["pixdim"][4] = 9
    nib.save(image, path)
    return root


@pytest.fixture
def raw(source, tmp_path):
    """A copy of it that a test can change."""
    return Path(shutil.copytree(source, tmp_path / "raw"))


def ellipsoid(grid: Grid) -> np.ndarray:
    return (np.square(grid.points_mm() / np.array([15, 17, 15])[:, None, None, None]).sum(0)) < 1


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A prior with an untrained network: zero mean, white errors of known SD."""
    torch.manual_seed(0)
    model = Precondition(UNet(channels=(8, 8), blocks=(1, 1), embedding=16), torch.full((8,), 0.5))
    path = tmp_path_factory.mktemp("prior") / "prior.safetensors"
    weights.write_weights(
        path,
        weights.prior_state(model, {"unknown": ErrorSpectrum.isotropic(0.5)}),
        {
            "kind": "prior",
            "name": "untrained",
            "licence": "CC0",
            "training_data": "none",
            "config": model.network.config,
        },
    )
    return path


def run(interface, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    return interface.run(cwd=str(folder)).outputs


@pytest.fixture(scope="module")
def files(source, prior, tmp_path_factory):
    """The files of every node before Write, from a real restoration; they must not be changed."""
    folder = tmp_path_factory.mktemp("files")
    scan = source / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_FLAIR.nii.gz"
    conformed = run(Conform(in_file=str(scan), metadata={"SliceThickness": 4.0}), folder / "c")
    scan = nib.load(conformed.out_file)
    grid = Grid(scan.shape, scan.affine)
    fine = grid.one_millimetre()
    output = folder / "made"
    output.mkdir()
    mask = ellipsoid(fine)
    text = {
        "structures_json": {
            "table": [
                {"index": 2, "name": "Left-Cerebral-White-Matter", "volume_mm3": 7000.0,
                 "confidence": 0.9, "centroid_mm": [0.0, 0.0, 0.0]},
            ],
            "warnings": [],
            "weights": {"name": "p", "sha256": "0" * 64},
        },
        "affine_json": {"matrix": np.eye(4).tolist()},
    }  # fmt: skip
    out = {}
    for name, value in text.items():
        path = output / f"{name}.json"
        path.write_text(json.dumps(value))
        out[name] = str(path)
    for name in ("to_mni305", "from_mni305"):
        (output / f"{name}.txt").write_text("#Insight Transform File V1.0\n")
        out[name] = str(output / f"{name}.txt")
    out["mask"] = save(mask.astype(np.uint8), fine, output / "mask.nii.gz")
    out["structures"] = save(2 * mask.astype(np.int16), fine, output / "structures.nii.gz")
    out["mask_scan"] = save(ellipsoid(grid).astype(np.float32), grid, output / "mask_scan.nii.gz")
    log_bias = save(np.zeros(SHAPE, np.float32), grid, output / "log_bias.nii.gz")
    restored = run(
        Restore(
            in_file=conformed.out_file,
            conform_json=conformed.conform_json,
            mask=out["mask"],
            mask_scan=out["mask_scan"],
            log_bias=log_bias,
            affine_json=out["affine_json"],
            prior=str(prior),
            contrast="FLAIR",
            n_samples=2,
            n_steps=4,
            seed=3,
            save_samples=True,
        ),
        folder / "r",
    )
    template = run(
        ToMNI305(
            in_file=restored.restored,
            affine_json=out["affine_json"],
            uncertainty=restored.uncertainty,
            samples=restored.samples,
            mask=out["mask"],
            structures=out["structures"],
        ),
        folder / "m",
    )
    out.update(
        scan=conformed.out_file,
        conform_json=conformed.conform_json,
        restored=restored.restored,
        image=restored.image,
        uncertainty=restored.uncertainty,
        residual=restored.residual,
        samples=restored.samples,
        log_bias=restored.log_bias,
        restore_json=restored.restore_json,
        restored_mni305=template.out_file,
        uncertainty_mni305=template.uncertainty,
        samples_mni305=template.samples,
        mask_mni305=template.mask,
        structures_mni305=template.structures,
        records=[conformed.record, restored.record, template.record],
    )
    return out


def writer(files, raw, output_dir, **changes):
    relative = "sub-01/ses-a/anat/sub-01_ses-a_FLAIR.nii.gz"
    values = {
        "name": "sub-01_ses-a_FLAIR",
        "source_file": str(raw / relative),
        "relative": relative,
        "metadata": {"SliceThickness": 4.0, "MagneticFieldStrength": 3},
        "output_dir": str(output_dir),
        "settings": {"task": "restore", "random_seed": 0, "output_spaces": ["anat", "MNI305"]},
        "seed": 3,
        "fingerprint": "f" * 64,
        "run_uuid": "20260101-000000_abc",
        "command": ["brainprior", "raw", "out", "participant"],
        **files,
        **changes,
    }
    return Write(**{name: value for name, value in values.items() if value is not None})


@pytest.fixture
def output_dir(raw, tmp_path):
    output_dir = tmp_path / "out"
    check_output(output_dir)
    raw_description = json.loads((raw / "dataset_description.json").read_text())
    write_dataset_files(output_dir, bids_dir=raw, raw=raw_description)
    return output_dir


def tree(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_a_finished_scan_leaves_the_documented_files(files, raw, output_dir, tmp_path):
    run(writer(files, raw, output_dir), tmp_path / "w")
    anat = "sub-01/ses-a/anat/sub-01_ses-a"
    run_label = "prov/prov-20260101000000abcsub01sesaFLAIR"
    assert tree(output_dir) == sorted(
        [
            ".bidsignore",
            "README",
            "dataset_description.json",
            "descriptions.json",
            "descriptions.tsv",
            "logs/scans/sub-01_ses-a_FLAIR.json",
            f"{run_label}_act.json",
            f"{run_label}_io.json",
            f"{anat}_from-FLAIR_to-MNI305_mode-image_xfm.txt",
            f"{anat}_from-FLAIR_to-MNI305_mode-image_xfm.json",
            f"{anat}_from-MNI305_to-FLAIR_mode-image_xfm.txt",
            f"{anat}_from-MNI305_to-FLAIR_mode-image_xfm.json",
            f"{anat}_space-FLAIR_desc-structures_dseg.tsv",
            f"{anat}_space-MNI305_desc-structuresFLAIR_dseg.tsv",
            *(
                f"{anat}_{name}{extension}"
                for name in (
                    "desc-restored_FLAIR",
                    "mod-FLAIR_desc-restored_uncertainty",
                    "mod-FLAIR_desc-restored_residual",
                    "desc-restoredSample01_FLAIR",
                    "desc-restoredSample02_FLAIR",
                    "space-MNI305_desc-restored_FLAIR",
                    "mod-FLAIR_space-MNI305_desc-restored_uncertainty",
                    "space-MNI305_desc-restoredSample01_FLAIR",
                    "space-MNI305_desc-restoredSample02_FLAIR",
                    "space-MNI305_desc-brainFLAIR_mask",
                    "space-MNI305_desc-structuresFLAIR_dseg",
                    "space-FLAIR_desc-brain_mask",
                    "space-FLAIR_desc-structures_dseg",
                )
                for extension in (".nii.gz", ".json")
            ),
        ]
    )
    side = json.loads((output_dir / f"{anat}_desc-restored_FLAIR.json").read_text())
    assert side["SkullStripped"] is True
    assert side["MagneticFieldStrength"] == 3
    assert side["Sources"][0] == "bids:raw:sub-01/ses-a/anat/sub-01_ses-a_FLAIR.nii.gz"
    mask = json.loads((output_dir / f"{anat}_space-FLAIR_desc-brain_mask.json").read_text())
    assert mask["Type"] == "Brain"
    assert mask["SpatialReference"].endswith("_FLAIR.nii.gz")
    there = f"{anat}_space-MNI305"
    labels = nib.load(output_dir / f"{there}_desc-structuresFLAIR_dseg.nii.gz")
    brain = nib.load(output_dir / f"{there}_desc-brainFLAIR_mask.nii.gz")
    assert (labels.get_data_dtype(), brain.get_data_dtype()) == (np.int16, np.uint8)
    differ = labels.get_fdata() != 2 * brain.get_fdata()
    assert differ.sum() < 1e-3 * brain.get_fdata().sum()  # of ties, by rounding
    side = json.loads((output_dir / f"{there}_desc-brainFLAIR_mask.json").read_text())
    assert side["Type"] == "Brain"
    assert side["SpatialReference"].endswith("tpl-MNI305_T1w.nii.gz")
    assert side["Sources"] == [
        f"bids::{anat}_space-FLAIR_desc-brain_mask.nii.gz",
        f"bids::{anat}_from-FLAIR_to-MNI305_mode-image_xfm.txt",
    ]
    side = json.loads(
        (output_dir / f"{anat}_mod-FLAIR_space-MNI305_desc-restored_uncertainty.json").read_text()
    )
    assert side["SkullStripped"] is True
    assert side["IntervalHalfWidths"]
    table = (output_dir / f"{there}_desc-structuresFLAIR_dseg.tsv").read_text()
    assert table.splitlines()[0] == "index\tname\tcolor"
    restored = nib.load(output_dir / f"{anat}_desc-restored_FLAIR.nii.gz")
    assert restored.get_data_dtype() == np.float32
    assert restored.shape == (40, 44, 40)
    np.testing.assert_array_equal(restored.get_sform(), restored.get_qform())


@pytest.fixture(scope="module")
def on_template(files, tmp_path_factory):
    """The restored brain registered to a small template, with one iteration, for its files."""
    home = tmp_path_factory.mktemp("templates")
    restored = nib.load(files["restored"])
    template = np.where(nib.load(files["mask"]).get_fdata() > 0, restored.get_fdata(), 0)
    write_template(home, template[::2, ::2, ::2], restored.affine @ np.diag([2, 2, 2, 1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPLATEFLOW_HOME", str(home))
        patch.setattr(normalise, "ITERATIONS", (1,))
        result = find_template(SPACE)
        return run(
            ToTemplates(
                in_file=files["restored"], mask=files["mask"], affine_json=files["affine_json"],
                contrast="FLAIR", spaces=[SPACE], images=[str(result.image)],
                masks=[str(result.mask)], uncertainty=files["uncertainty"],
                samples=files["samples"], structures=files["structures"],
            ),
            tmp_path_factory.mktemp("t"),
        )  # fmt: skip


def test_what_is_on_a_templates_grid_is_written_and_recorded(
    files, on_template, raw, output_dir, tmp_path
):
    settings = {"task": "restore", "random_seed": 0, "output_spaces": ["anat", SPACE]}
    asked = {
        "template_files": on_template.files,
        "template_roles": on_template.roles,
        "templates_json": on_template.templates_json,
        "settings": settings,
    }
    run(writer(files, raw, output_dir, **asked), tmp_path / "w")
    anat = "sub-01/ses-a/anat/sub-01_ses-a"
    images = [
        f"{anat}_mod-FLAIR_space-{SPACE}_res-1_desc-restored_uncertainty",
        *(
            f"{anat}_space-{SPACE}_res-1_{name}"
            for name in (
                "desc-restored_FLAIR", "desc-restoredSample01_FLAIR",
                "desc-restoredSample02_FLAIR", "desc-brainFLAIR_mask",
                "desc-structuresFLAIR_dseg",
            )
        ),
    ]  # fmt: skip
    there = f"{anat}_from-FLAIR_to-{SPACE}_mode-image_xfm"
    back = f"{anat}_from-{SPACE}_to-FLAIR_mode-image_xfm"
    assert [path for path in tree(output_dir) if SPACE in path] == sorted([
        *(f"{stem}{end}" for stem in images for end in (".nii.gz", ".json")),
        *(f"{stem}{end}" for stem in (there, back) for end in (".h5", ".json")),
        f"{images[-1]}.tsv",
    ])  # fmt: skip
    assert not [path for path in tree(output_dir) if "space-MNI305" in path]
    for stem in images:
        image = nib.load(output_dir / f"{stem}.nii.gz")
        assert (image.shape, int(image.header["sform_code"])) == ((20, 22, 20), 4)
        side = json.loads((output_dir / f"{stem}.json").read_text())
        assert side["SpatialReference"].endswith(f"tpl-{SPACE}_res-01_T1w.nii.gz")
        assert side["Resolution"].startswith("1 mm")
        assert side["Sources"][1] == f"bids::{there}.h5"
    side = json.loads((output_dir / f"{there}.json").read_text())
    assert side["Metric"] == "mutual information"
    assert side["BrainMaskDice"] > 0.9
    (summary,) = read_summaries(output_dir)
    (record,) = summary.facts.templates
    assert (record.space, record.program[:6]) == (SPACE, "ANTsPy")
    (act,) = (output_dir / "prov").glob("*_act.json")
    (activity,) = json.loads(act.read_text())["Activities"]
    assert activity["Templates"] == [record.to_json()]
    (used,) = (output_dir / "prov").glob("*_io.json")
    ids = [entry["Id"] for entry in json.loads(used.read_text())["Files"]]
    assert f"bids::prov#entity-template-{SPACE}-{record.image_sha256[:12]}" in ids
    schemas = resources.files("brainprior_bids") / "data" / "schemas"
    for path in (act, used):
        text = (schemas / f"{path.stem.rpartition('_')[2]}.schema.json").read_text()
        errors = jsonschema.Draft202012Validator(json.loads(text)).iter_errors(
            json.loads(path.read_text())
        )
        assert not [e.message for e in errors if "Templates" in e.json_path or path == used]
    assert verify_records(output_dir).changes == {}


def test_masks_that_do_not_agree_on_the_template_are_warned_about(on_template):
    (record,) = TemplatesRecord.read(on_template.templates_json).templates
    assert disagreements([record]) == []
    (warning,) = disagreements([record, replace(record, agreement=0.5)])
    assert f"that of {SPACE} agree poorly after the registration (Dice 0.50" in warning


def test_slice_gains_are_in_sidecar_provenance_and_verdict(files, raw, output_dir, tmp_path):
    gains = [0.98 if k % 2 else 1.02 for k in range(SHAPE[2])]
    bias = {"applied": True, "gains": gains, "alternation_percent": -2.2, "random_sd_percent": 0.0}
    (tmp_path / "bias.json").write_text(json.dumps(bias))
    run(writer(files, raw, output_dir, bias_json=str(tmp_path / "bias.json")), tmp_path / "w")
    anat = "sub-01/ses-a/anat/sub-01_ses-a"
    side = json.loads((output_dir / f"{anat}_desc-restored_FLAIR.json").read_text())
    assert side["SliceGainsApplied"] is True
    assert side["SliceGains"] == gains
    assert side["SliceGainAlternationPercent"] == -2.2
    (record,) = (output_dir / "prov").glob("*_act.json")
    assert json.loads(record.read_text())["Activities"][0]["Bias"]["gains"] == gains
    (summary,) = read_summaries(output_dir)
    values = metrics(summary)
    assert values["slice_gain_alternation"] == 2.2
    assert "slice_gain_alternation 2.2 is above 2" in reasons(values)


MOTION = [np.eye(4).tolist(), [[1, 0, 0, 0], [0, 1, 0, 2.0], [0, 0, 1, 0], [0, 0, 0, 1]]]
"""Each interleave to the first: the second 2 mm forwards."""


def test_moved_interleaves_and_lost_slices_reach_sidecar_and_verdict(
    files, raw, output_dir, tmp_path
):
    moved = {"moved": True, "to_reference": MOTION, "rms_mm": 2.0, "error_mm": 0.3}
    (tmp_path / "bias.json").write_text(json.dumps({"interleaves": moved}))
    structures = json.loads(Path(files["structures_json"]).read_text()) | {"lost_slices": [3]}
    (tmp_path / "structures.json").write_text(json.dumps(structures))
    changed = {
        "bias_json": str(tmp_path / "bias.json"),
        "structures_json": str(tmp_path / "structures.json"),
    }
    run(writer(files, raw, output_dir, **changed), tmp_path / "w")
    side = "sub-01/ses-a/anat/sub-01_ses-a_desc-restored_FLAIR.json"
    content = json.loads((output_dir / side).read_text())
    assert content["SlicesNotUsed"] == [3]
    assert (content["InterleaveMotion"], content["InterleaveMotionRMS"]) == (MOTION, 2.0)
    assert (content["InterleaveCount"], content["InterleaveMotionCorrected"]) == (2, False)
    (summary,) = read_summaries(output_dir)
    assert "interleave_motion_mm 2 is above 0" in reasons(metrics(summary))


@pytest.mark.parametrize(
    ("more", "obstacle"),
    [
        ({}, None),
        ({"keep_scan": True}, "the scan itself is kept"),
        ({"refined": "image.nii.gz"}, "another image is refined"),
        ({"runs_json": "runs.json"}, "several scans are fused"),
    ],
)
def test_displaced_interleaves_are_corrected_in_one_scan_that_is_restored(
    tmp_path, more, obstacle
):
    motion = {
        "moved": True,
        "to_reference": MOTION,
        "rms_mm": 2.0,
        "error_mm": 0.3,
    }
    (tmp_path / "bias.json").write_text(json.dumps({"interleaves": motion}))
    (tmp_path / "runs.json").write_text(json.dumps({"reference": "run-1", "runs": []}))
    inputs = {"keep_scan": False, "bias_json": str(tmp_path / "bias.json"), **more}
    if "runs_json" in inputs:
        inputs["runs_json"] = str(tmp_path / "runs.json")
    assert found_motion(inputs)[1] == obstacle


def test_motion_in_a_fused_run_is_named(tmp_path):
    motion = {
        "moved": True,
        "to_reference": MOTION,
        "rms_mm": 2.0,
        "error_mm": 0.3,
    }
    run = {"name": "run-2", "acquisition": {}, "bias": {"interleaves": motion}}
    (tmp_path / "bias.json").write_text("{}")
    (tmp_path / "runs.json").write_text(json.dumps({"reference": "run-1", "runs": [run]}))
    inputs = {"keep_scan": False} | {
        f"{name}_json": str(tmp_path / f"{name}.json") for name in ("bias", "runs")
    }
    found, obstacle = found_motion(inputs)
    assert (found.rms_mm, obstacle) == (2.0, "several scans are fused")


def test_lost_slices_are_restored_as_missing(files, prior, tmp_path):
    structures = json.loads(Path(files["structures_json"]).read_text()) | {"lost_slices": [4]}
    (tmp_path / "structures.json").write_text(json.dumps(structures))
    done = run(
        Restore(
            in_file=files["scan"], conform_json=files["conform_json"], mask=files["mask"],
            mask_scan=files["mask_scan"], affine_json=files["affine_json"], prior=str(prior),
            structures_json=str(tmp_path / "structures.json"),
            contrast="FLAIR", n_samples=2, n_steps=2, sampler="mean",  # which cannot leave it out
        ),
        tmp_path / "moved",
    )  # fmt: skip
    residual = np.asarray(nib.load(done.residual).dataobj)
    assert residual.shape == SHAPE
    explained = residual.any((0, 1))
    assert not explained[4]
    assert explained[[3, 5, 6]].all()
    record = json.loads(Path(done.restore_json).read_text())
    assert record["sampler"] == "exact"
    assert any("--sampler mean was not used" in text for text in record["warnings"])
    assert len(record["residual_ratios"]) == 2


def test_signal_and_contrast_reach_the_summary(files, raw, output_dir, tmp_path):
    tissues = {"input": {"cnr": 1.5}, "restored": {"cnr": 2.5}}
    (tmp_path / "tissues.json").write_text(json.dumps(tissues))
    run(
        writer(files, raw, output_dir, tissues_json=str(tmp_path / "tissues.json")), tmp_path / "w"
    )
    (summary,) = read_summaries(output_dir)
    assert summary.facts.tissues.to_json() == tissues


def test_interpolation_is_in_sidecar_and_verdict(files, raw, output_dir, tmp_path):
    record = json.loads(Path(files["conform_json"]).read_text())
    record["facts"]["resolution"] = {
        "stored_mm": [1, 1, 1], "measured_mm": [1, 1, 5], "used_mm": [1, 1, 5],
        "source": "measured",
    }  # fmt: skip
    (tmp_path / "conform.json").write_text(json.dumps(record))
    run(
        writer(files, raw, output_dir, conform_json=str(tmp_path / "conform.json")), tmp_path / "w"
    )
    side = "sub-01/ses-a/anat/sub-01_ses-a_desc-restored_FLAIR.json"
    content = json.loads((output_dir / side).read_text())
    assert (content["MeasuredVoxelSize"], content["UsedVoxelSize"]) == ([1, 1, 5], [1, 1, 5])
    (summary,) = read_summaries(output_dir)
    assert "interpolation 5 is above 1.35" in reasons(metrics(summary))
    assert "This scan had been interpolated" in methods_text([of_summary(summary)])


def test_a_predicted_uncertainty_says_so_and_what_regions_need(files, raw, output_dir, tmp_path):
    facts = json.loads(Path(files["restore_json"]).read_text())
    assert facts["uncertainty_from"] == "samples"
    facts["uncertainty_from"] = "prior"
    facts["prior"]["regional_error"] = 0.002
    (tmp_path / "restore.json").write_text(json.dumps(facts))
    run(
        writer(files, raw, output_dir, restore_json=str(tmp_path / "restore.json")),
        tmp_path / "w",
    )
    name = "sub-01/ses-a/anat/sub-01_ses-a_mod-FLAIR_desc-restored_uncertainty.json"
    side = json.loads((output_dir / name).read_text())
    assert side["UncertaintyFrom"] == "prior"
    assert "predicted by the prior" in side["Description"]
    assert side["IntervalHalfWidths"] == {"50": 0.6745, "90": 1.6449}
    assert side["RegionalErrorStandardDeviation"] == pytest.approx(0.002 * facts["unit"])


def test_samples_and_residual_are_what_their_sidecars_say(files, raw, output_dir, tmp_path):
    run(writer(files, raw, output_dir), tmp_path / "w")
    anat = output_dir / "sub-01" / "ses-a" / "anat"

    def image(desc):
        return nib.load(anat / f"sub-01_ses-a_{desc}.nii.gz")

    def side(desc):
        return json.loads((anat / f"sub-01_ses-a_{desc}.json").read_text())

    samples = np.stack([image(f"desc-restoredSample0{i}_FLAIR").get_fdata() for i in (1, 2)])
    sd = image("mod-FLAIR_desc-restored_uncertainty")
    expected = sample_sd(samples.astype(np.float32), sd.get_fdata() > 0, sd.header.get_zooms())
    np.testing.assert_allclose(sd.get_fdata(), expected, rtol=1e-3, atol=1e-3)
    seeds = [side(f"desc-restoredSample0{i}_FLAIR")["SampleSeed"] for i in (1, 2)]
    assert seeds == [sample_seed(3, 0), sample_seed(3, 1)]
    widths = side("mod-FLAIR_desc-restored_uncertainty")["IntervalHalfWidths"]
    assert widths == pytest.approx({"50": 0.6745 * 1.5**0.5, "90": 1.6449 * 1.5**0.5}, rel=1e-3)
    residual = image("mod-FLAIR_desc-restored_residual")
    assert residual.shape == SHAPE
    z = residual.get_fdata()[np.asarray(nib.load(files["mask_scan"]).dataobj) > 0.95]
    facts = json.loads(Path(files["restore_json"]).read_text())
    assert facts["share_beyond_3_sd"] == pytest.approx((np.abs(z) > 3).mean(), abs=1e-3)
    bias = nib.load(files["log_bias"]).get_fdata()[residual.get_fdata() != 0]
    assert 1 <= facts["bias_range"] <= np.exp(np.ptp(bias)) + 1e-4
    ratios = [side(f"desc-restoredSample0{i}_FLAIR")["ResidualRatio"] for i in (1, 2)]
    assert 0.3 * max(ratios) < np.sqrt((z**2).mean()) <= max(ratios) * 1.01  # of their mean


def test_an_inpainted_scan_is_the_scan_outside_the_mask(files, raw, output_dir, prior, tmp_path):
    """Bit for bit, in the file's order of axes; no file of another task is replaced."""
    run(writer(files, raw, output_dir), tmp_path / "w0")
    before = {path: sha256_file(output_dir / path) for path in tree(output_dir)}
    scan = nib.load(files["scan"])
    grid = Grid(scan.shape, scan.affine)
    lesion = np.square(grid.points_mm() - np.array([4, -3, 2])[:, None, None, None]).sum(0) < 36
    output = run(
        Lesion(
            in_file=files["scan"],
            lesion=save(lesion.astype(np.uint8), grid, tmp_path / "lesion.nii.gz"),
            mask=files["mask"],
            mask_scan=files["mask_scan"],
        ),
        tmp_path / "l",
    )
    filled = run(
        Restore(
            in_file=files["scan"],
            conform_json=files["conform_json"],
            mask=output.mask,
            mask_scan=output.mask_scan,
            hidden=output.hidden,
            log_bias=files["log_bias"],
            affine_json=files["affine_json"],
            prior=str(prior),
            contrast="FLAIR",
            n_samples=2,
            n_steps=2,
            keep_scan=True,
            save_samples=True,
        ),
        tmp_path / "r2",
    )
    made_now = ("image", "restored", "uncertainty", "residual", "samples", "restore_json")
    given = {name: getattr(filled, name) for name in made_now}
    conform = json.loads(Path(files["conform_json"]).read_text())
    conform["facts"]["original"]["axis_codes"] = "LPS"  # as if the file were stored so
    other = tmp_path / "conform.json"
    other.write_text(json.dumps(conform))
    asked = {
        **files, **given, "hidden": output.hidden, "lesion_json": output.lesion_json,
        "conform_json": str(other), "image_desc": "inpainted",
        "settings": {"task": "inpaint", "output_spaces": ["anat", "MNI305"]},
    }  # fmt: skip
    run(writer(asked, raw, output_dir), tmp_path / "w")
    anat = output_dir / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a"
    here = np.flip(lesion, (0, 1))
    raw_data = np.flip(np.asarray(scan.dataobj, np.float32), (0, 1))
    for desc in ("inpainted", "inpaintedSample01", "inpaintedSample02"):
        image = nib.load(f"{anat}_desc-{desc}_FLAIR.nii.gz")
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        data = np.asarray(image.dataobj)
        assert data[~here].tobytes() == raw_data[~here].tobytes()
        assert (data[here] != raw_data[here]).mean() > 0.99
    sd = np.asarray(nib.load(f"{anat}_mod-FLAIR_desc-inpainted_uncertainty.nii.gz").dataobj)
    assert not sd[~here].any()
    assert (sd[here] > 0).all()
    mask = nib.load(f"{anat}_space-FLAIR_label-lesion_desc-inpainted_mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj) > 0, here)
    side = json.loads(Path(f"{anat}_desc-inpainted_FLAIR.json").read_text())
    assert side["SkullStripped"] is False
    shared = ("mask", "dseg", "xfm", "prov", "logs")  # the same content, written again
    for path, digest in before.items():
        if not any(word in path for word in shared):
            assert sha256_file(output_dir / path) == digest
    assert read_summary(output_dir, "sub-01_ses-a_FLAIR").task == "restore"
    summary = read_summary(output_dir, "sub-01_ses-a_desc-inpainted_FLAIR")
    assert summary.task == "inpaint"
    assert not any("replaced" in messages for messages in summary.warnings)
    # but with another mask than the one of the restored image
    half = np.asarray(nib.load(files["mask"]).dataobj).copy()
    half[20:] = 0
    asked["mask"] = save(half, grid.one_millimetre(), tmp_path / "half.nii.gz")
    run(writer(asked, raw, output_dir), tmp_path / "w2")
    *_, messages = read_summary(output_dir, "sub-01_ses-a_desc-inpainted_FLAIR").warnings
    assert "_space-FLAIR_desc-brain_mask.nii.gz replaced those of sub-01_ses-a_FLAIR" in messages


def test_another_tools_image_and_its_trust(files, raw, output_dir, prior, tmp_path):
    """On its own grid and in its own unit; a map must be on the grid of the image."""
    scan = nib.load(files["scan"])
    # flipped, a voxel less on each side, and 3 times as bright as the scan
    other = scan.slicer[1:-1, 1:-1, 1:-1].as_reoriented([[0, -1], [1, 1], [2, 1]])
    other = nib.Nifti1Image(3 * other.get_fdata(dtype=np.float32), other.affine)
    nib.save(other, tmp_path / "other.nii.gz")

    def refined(name, **changes):
        node = Restore(
            conform_json=files["conform_json"], in_file=files["scan"], mask=files["mask"],
            mask_scan=files["mask_scan"], affine_json=files["affine_json"], prior=str(prior),
            contrast="FLAIR", n_samples=1, n_steps=2, sampler="exact", **changes,
        )  # fmt: skip
        return run(node, tmp_path / name)

    both = refined(
        "both", refined=str(tmp_path / "other.nii.gz"), trust=0.1, log_bias=files["log_bias"]
    )
    facts = json.loads(Path(both.restore_json).read_text())["refined"]
    assert facts["gain"] == pytest.approx(1 / 3, rel=0.15)
    assert facts["correlation"] > 0.5
    holed = np.where(other.get_fdata(dtype=np.float32) > 0, other.get_fdata(), np.nan)
    nib.save(nib.Nifti1Image(holed.astype(np.float32), other.affine), tmp_path / "nan.nii.gz")
    again = refined("nan", refined=str(tmp_path / "nan.nii.gz"), trust=0.1)  # as SPM writes it
    assert np.isfinite(nib.load(again.restored).get_fdata()).all()
    nowhere = nib.Nifti1Image(other.get_fdata(dtype=np.float32), None)
    nib.save(nowhere, tmp_path / "nowhere.nii.gz")
    with pytest.raises(GeometryError, match=r"nowhere.nii.gz: its header has neither"):
        refined("nowhere", refined=str(tmp_path / "nowhere.nii.gz"), trust=0.1)
    dark = other.get_fdata().max() - other.get_fdata()  # another contrast
    nib.save(nib.Nifti1Image(dark, other.affine), tmp_path / "dark.nii.gz")
    with pytest.raises(InputError, match="same participant"):
        refined("dark", refined=str(tmp_path / "dark.nii.gz"), trust=0.1)
    alone = refined("alone", trust=0.05)
    assert json.loads(Path(alone.restore_json).read_text())["noise_sd_initial"] == 0.05
    assert not np.asarray(nib.load(alone.log_bias).dataobj).any()
    sd = nib.Nifti1Image(np.full(scan.shape, 0.07, np.float32), scan.affine)
    nib.save(sd, tmp_path / "sd.nii.gz")
    mapped = refined("mapped", trust_map=str(tmp_path / "sd.nii.gz"))
    result = json.loads(Path(mapped.restore_json).read_text())["noise_sd_initial"]
    assert result == pytest.approx(0.07)
    nib.save(sd.slicer[1:], tmp_path / "cut.nii.gz")
    with pytest.raises(GeometryError, match="is not on the grid"):
        refined("cut", trust_map=str(tmp_path / "cut.nii.gz"))


def test_the_whole_head_on_the_scans_own_voxels(files, raw, prior, output_dir, tmp_path):
    """Outside, the scan bit for bit; inside, the difference is that of the noise."""
    restored = run(
        Restore(
            in_file=files["scan"],
            **{key: files[key] for key in ("conform_json", "mask", "mask_scan", "affine_json")},
            log_bias=files["log_bias"],
            prior=str(prior),
            contrast="FLAIR",
            n_samples=1,
            n_steps=4,
            seed=3,
            native=True,
        ),
        tmp_path / "n",
    )
    run(
        writer(files, raw, output_dir, restored_native=restored.restored_native,
               restore_json=restored.restore_json, uncertainty=None, samples=None),
        tmp_path / "w",
    )  # fmt: skip
    (path,) = output_dir.glob("sub-01/ses-a/anat/*_res-native_desc-restored_FLAIR.nii.gz")
    output = nib.load(path)
    scan = nib.load(raw / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_FLAIR.nii.gz")
    assert output.shape == scan.shape
    np.testing.assert_array_equal(output.affine, scan.affine)
    new = {"datatype", "bitpix", "scl_slope", "scl_inter"}  # fields that describe the values
    for key in set(scan.header) - new:
        np.testing.assert_array_equal(output.header[key], scan.header[key], key)
    canonical = nib.as_closest_canonical(output)
    before = np.asarray(nib.load(files["scan"]).dataobj, np.float32)
    after = np.asarray(canonical.dataobj, np.float32)
    inside = np.asarray(nib.load(files["mask_scan"]).dataobj) > 0.999
    np.testing.assert_array_equal(after[~inside], before[~inside])
    facts = json.loads(Path(restored.restore_json).read_text())
    noise = facts["noise_sd_initial"] * facts["unit"]
    apart = np.sqrt(np.mean((after - before)[inside] ** 2)) / noise
    assert 0.1 < apart < 2
    assert facts["changed_share"]["outside"] == 0
    assert facts["changed_share"]["inside"] > 0.9
    side = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
    assert side["SkullStripped"] is False
    assert side["Resolution"]


def test_the_records_hold_the_hashes_of_what_is_there(files, raw, output_dir, tmp_path):
    run(writer(files, raw, output_dir), tmp_path / "w")
    (path,) = (output_dir / "prov").glob("*_io.json")
    recorded = json.loads(path.read_text())["Files"]
    source = recorded[0]
    outputs = [file for file in recorded if "GeneratedBy" in file]
    assert recorded_sha256(source) == sha256_file(raw / source["AtLocation"])
    assert len({file["Label"] for file in outputs} - {"sidecar"}) == 17
    assert {file["AtLocation"] for file in outputs} == {
        str(path.relative_to(output_dir)) for path in output_dir.glob("sub-01/**/anat/*")
    }
    for file in outputs:
        assert recorded_sha256(file) == sha256_file(output_dir / file["AtLocation"])
    (path,) = (output_dir / "prov").glob("*_act.json")
    (activity,) = json.loads(path.read_text())["Activities"]
    assert {name for file in outputs for name in file["GeneratedBy"]} == {activity["Id"]}
    described = {file["Id"] for file in recorded} - {file["Id"] for file in outputs}
    assert set(activity["Used"]) - described == {"bids::prov#environment-20260101000000abc"}
    assert activity["ScanSeed"] == 3
    assert activity["Restore"]["sampler"] == "exact"
    assert len(activity["Restore"]["residual_ratios"]) == 2
    assert activity["Restore"]["prior"]["name"] == "untrained"
    assert [node["node"] for node in activity["Nodes"]] == ["Conform", "Restore", "ToMNI305"]
    assert all(node["peak_memory_gb"] > 0.05 for node in activity["Nodes"])


def test_sidecars_have_hash_and_origin_of_their_images_in_any_run(
    files, raw, output_dir, tmp_path
):
    run(writer(files, raw, output_dir), tmp_path / "w")
    anat = output_dir / "sub-01" / "ses-a" / "anat"
    before = {path.name: path.read_bytes() for path in anat.glob("*.json")}
    assert len(before) == 15
    for name in before:
        side = json.loads(before[name])
        assert side["GeneratedBy"] == ["bids::prov#restore-ffffffffffff"]
        (entry,) = side["Checksum"]
        assert entry["ChecksumAlgorithm"] == "spdx:checksumAlgorithm_sha256"
        image = anat / name.replace(".json", ".txt" if "xfm" in name else ".nii.gz")
        assert entry["ChecksumValue"] == hashlib.sha256(image.read_bytes()).hexdigest()
    run(writer(files, raw, output_dir, run_uuid="20260102-000000_def"), tmp_path / "w2")
    assert {path.name: path.read_bytes() for path in anat.glob("*.json")} == before
    run(writer(files, raw, output_dir, fingerprint="e" * 64), tmp_path / "w3")
    side = json.loads((anat / "sub-01_ses-a_desc-restored_FLAIR.json").read_text())
    assert side["GeneratedBy"] == ["bids::prov#restore-eeeeeeeeeeee"]


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno is not installed")
def test_the_validator_finds_no_error(files, raw, output_dir, tmp_path):
    run(writer(files, raw, output_dir), tmp_path / "w")
    command = find_validator()
    assert validate(output_dir, command=command) == []
    (output_dir / "sub-01" / "ses-a" / "anat" / "nonsense.nii.gz").touch()
    assert validate(output_dir, command=command)  # it does check


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno is not installed")
def test_only_the_requested_part_is_validated(raw, tmp_path):
    from brainprior_bids.bids.query import find_scans
    from brainprior_bids.settings import Settings

    bad = raw / "sub-02" / "anat" / "sub-02_acq_T1w.nii.gz"
    bad.parent.mkdir(parents=True)
    bad.touch()
    settings = Settings(raw, tmp_path / "o", tmp_path / "w", participant_label=("01",))
    scans = find_scans(settings)
    assert validate_scans(raw, scans, command=find_validator(), scratch=tmp_path) == []
    assert validate(raw, command=find_validator())
    # at the root: sidecars and tables of images that are not requested, and ignored files
    for name in ("task-rest_bold.json", "FLAIR.json", "task-rest_events.json"):
        (raw / name).write_text("{}")
    (raw / "task-rest_events.tsv").write_text("onset\tduration\n1\t2\n")
    (raw / "participants.tsv").write_text("participant_id\nsub-01\nsub-02\n")
    (raw / "notes.xyz").touch()
    ignored = raw / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_CT.nii.gz"
    ignored.touch()
    (raw / ".bidsignore").write_text("notes.xyz\n*_CT.nii.gz\n")
    assert validate_scans(raw, scans, command=find_validator(), scratch=tmp_path) == []
    alone = ignored.with_name("sub-01_ses-a_acq-gone_T1w.json")
    alone.write_text("{}")  # next to the scans it is an error
    (issue,) = validate_scans(raw, scans, command=find_validator(), scratch=tmp_path)
    assert issue.code == "SIDECAR_WITHOUT_DATAFILE"
    assert issue.location.endswith(alone.name)


def test_one_sample_has_no_uncertainty_and_removes_an_older_one(files, raw, output_dir, tmp_path):
    run(writer(files, raw, output_dir), tmp_path / "w")
    assert any("uncertainty" in name for name in tree(output_dir))
    again = writer(
        files, raw, output_dir, uncertainty=None, samples=None, run_uuid="20260102-000000_def"
    )
    run(again, tmp_path / "w2")
    assert not any("uncertainty" in name for name in tree(output_dir))
    assert len(list((output_dir / "prov").glob("*_act.json"))) == 1
    summary = read_summary(output_dir, "sub-01_ses-a_FLAIR")
    assert summary.run_uuid.endswith("def")


def test_a_failure_while_writing_leaves_nothing(files, raw, output_dir, tmp_path):
    before = tree(output_dir)
    in_the_way = output_dir / "sub-01" / "ses-a" / "anat"
    in_the_way = in_the_way / "sub-01_ses-a_space-MNI305_desc-restored_FLAIR.nii.gz"
    in_the_way.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        run(writer(files, raw, output_dir), tmp_path / "w")
    assert tree(output_dir) == before
    assert read_summary(output_dir, "sub-01_ses-a_FLAIR") is None


def test_the_same_seed_gives_the_same_bytes(files, raw, prior, tmp_path):
    def restored(seed: int, folder: str) -> bytes:
        output = run(
            Restore(
                in_file=files["scan"],
                conform_json=files["conform_json"],
                mask=files["mask"],
                mask_scan=files["mask_scan"],
                log_bias=files["log_bias"],
                affine_json=files["affine_json"],
                prior=str(prior),
                contrast="FLAIR",
                n_samples=1,
                n_steps=3,
                seed=seed,
            ),
            tmp_path / folder,
        )
        return Path(output.restored).read_bytes()

    first = restored(3, "a")
    assert first == restored(3, "b")
    assert first != restored(4, "d")


def test_a_node_that_fails_says_why_in_one_sentence(tmp_path):
    bad = tmp_path / "sub-01_T1w.nii.gz"
    bad.write_bytes(b"\x1f\x8b broken")
    folder = tmp_path / "node"
    with pytest.raises(InputError):
        run(Conform(in_file=str(bad)), folder)
    failure = json.loads((folder / FAILURE).read_text())
    assert failure["expected"] is True
    assert failure["message"].startswith("sub-01_T1w:")
    assert not (folder / RECORD).exists()


def test_the_meter_sees_memory_that_is_gone_again():
    meter = Meter()
    with meter:
        begun = time.monotonic()
        block = np.ones(60 * 2**20, np.uint8)
        while meter._peak - meter._baseline < 55 * 2**20:  # until its thread has measured
            time.sleep(0.01)
        del block
        inside = time.monotonic() - begun
    facts = meter.facts()
    assert facts["seconds"] >= inside - 0.0005  # written with three decimals
    assert facts["peak_memory_gb"] > facts["added_memory_gb"] > 0.05


def test_the_links_of_earlier_runs_stay(raw, output_dir, tmp_path):
    """Their sidecars contain names of files with these links."""
    for tool in ("one", "two"):
        given = {tool: str(tmp_path / tool)}
        write_dataset_files(output_dir, bids_dir=raw, raw={}, derivatives=given)
    links = json.loads((output_dir / "dataset_description.json").read_text())["DatasetLinks"]
    roots = {"raw": raw, "one": tmp_path / "one", "two": tmp_path / "two"}
    assert links == {name: root.as_uri() for name, root in roots.items()}


def test_a_foreign_data_set_is_not_written_into(raw, tmp_path):
    with pytest.raises(UsageError, match="did not write"):
        check_output(raw)
    locked = tmp_path / "file"
    locked.write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        check_output(locked / "out")


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("sform", ["as it is", "moved", "singular"])
def test_images_on_the_scans_voxels_carry_its_header(tmp_path, kind, sform):
    """Axes LPS, oblique, one volume too many in the header; an sform that nobody can use."""
    values = np.arange(6 * 7 * 5, dtype=np.int16).reshape(6, 7, 5, 1)
    affine = np.diag([-2.0, -2, 3, 1])
    affine[:3, :3] = (
        Rotation.from_euler("xyz", (12, -9, 5), degrees=True).as_matrix() @ (affine[:3, :3])
    )
    affine[:3, 3] = [30, 40, -20]
    image = kind(values, affine)
    image.set_qform(affine, 1)
    other = np.diag([0.0, 2, 3, 1]) if sform == "singular" else affine.copy()
    other[0, 3] += 9 * (sform == "moved")
    image.set_sform(other, 2)
    image.header.set_dim_info(slice=2)
    nib.save(image, tmp_path / "scan.nii.gz")
    done = conform(tmp_path / "scan.nii.gz", metadata={})
    nib.save(done.image, tmp_path / "canonical.nii.gz")
    copy_image(
        tmp_path / "canonical.nii.gz",
        tmp_path / "made.nii.gz",
        "restored_native",
        done.facts["affine"]["code"],
        HeaderRecord.from_json(done.facts["original"]),
    )
    output, scan = nib.load(tmp_path / "made.nii.gz"), nib.load(tmp_path / "scan.nii.gz")
    assert type(output) is kind
    np.testing.assert_array_equal(np.asarray(output.dataobj), values[..., 0])
    used = affine if sform == "singular" else scan.affine
    np.testing.assert_allclose(output.affine, used, atol=1e-5)
    new = {"datatype", "bitpix", "scl_slope", "scl_inter", "dim", "pixdim"}
    if sform == "singular":
        new |= {key for key in scan.header if key.startswith(("srow", "sform", "q"))}
    for key in set(scan.header) - new:
        np.testing.assert_array_equal(output.header[key], scan.header[key], key)


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        ({}, None),
        ({"obstacle": "it is mostly across the slices"}, "it is mostly across the slices"),
        ({"moved": False}, ""),
    ],
)
def test_displaced_interleaves_are_restored_as_two_observations(
    files, prior, tmp_path, change, obstacle
):
    motion = {"moved": True, "to_reference": MOTION, "rms_mm": 2.0, "error_mm": 0.3} | change
    (tmp_path / "bias.json").write_text(json.dumps({"interleaves": motion}))
    done = run(
        Restore(
            in_file=files["scan"], conform_json=files["conform_json"], mask=files["mask"],
            mask_scan=files["mask_scan"], affine_json=files["affine_json"], prior=str(prior),
            bias_json=str(tmp_path / "bias.json"), contrast="FLAIR", n_samples=2, n_steps=2,
        ),
        tmp_path / "restored",
    )  # fmt: skip
    record = json.loads(Path(done.restore_json).read_text())
    told = [
        text for text in record["warnings"] if "displacement of the packages of slices" in text
    ]
    assert record.get("interleaves_corrected") == {None: True, "": None}.get(obstacle, False)
    assert [(obstacle or "is corrected") in text for text in told] == [True] * (obstacle != "")
    if obstacle is None:
        assert "interleaves of the scan are displaced" in record["sampler_reason"]
        residual = np.asarray(nib.load(done.residual).dataobj)
        assert residual.any((0, 1))[3:7].all()
        assert len(record["residual_ratios"]) == 2
