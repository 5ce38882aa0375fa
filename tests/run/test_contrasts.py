# SPDX-License-Identifier: Apache-2.0
"""Alignment of a session's contrasts, from finished results: written, kept and removed files."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from importlib import resources
from pathlib import Path, PurePosixPath

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation
from templates import SPACE, write_template

from brainprior_bids.anatomy.spaces import Kind, move
from brainprior_bids.bids.contrasts import Result, pairs, through_t1w
from brainprior_bids.bids.names import BIDSName
from brainprior_bids.bids.provenance import recorded_sha256, sha256_file, verify_records
from brainprior_bids.bids.qc import metrics, reasons
from brainprior_bids.bids.status import read_summaries, write_summary
from brainprior_bids.engine.grids import Grid
from brainprior_bids.records import RestoreRecord, ScanRecord, ScanStatus, StepRecords
from brainprior_bids.run.contrasts import align_contrasts
from brainprior_bids.settings import Settings

SHAPE = (48, 56, 44)
GRID = Grid(SHAPE, np.array([[1.0, 0, 0, -24], [0, 1, 0, -28], [0, 0, 1, -22], [0, 0, 0, 1]]))
MOTION = np.eye(4)
MOTION[:3, :3] = Rotation.from_rotvec(np.radians((4, -3, 5))).as_matrix()
MOTION[:3, 3] = (3, -2, 2)
ANAT = "sub-01/anat/sub-01"
RUN = "20260101-000000_01234567-89ab-cdef-0123-456789abcdef"
FORWARD = f"{ANAT}_from-T2w_to-T1w_mode-image_xfm.txt"
BACK = f"{ANAT}_from-T1w_to-T2w_mode-image_xfm.txt"


def write_result(root: Path, suffix: str, seed: int, matrix=None) -> None:
    """Image, mask, labels, sidecars and summary of one scan's result."""
    rng = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(rng.normal(size=SHAPE), 3.0)
    mask = (np.square(GRID.points_mm() / np.array([18, 21, 16])[:, None, None, None]).sum(0)) < 1
    labels = np.where(mask, 1 + np.digitize(texture / texture.std(), (-0.7, 0, 0.7)), 0)
    bright = np.array([0, 200, 400, 600, 800.0] if suffix == "T1w" else [0, 900, 300, 500, 700.0])
    space = "" if suffix == "T1w" else f"_space-{suffix}"
    files = {
        f"{ANAT}_desc-restored_{suffix}": (Kind.IMAGE, bright[labels]),
        f"{ANAT}{space}_desc-brain_mask": (Kind.MASK, mask),
        f"{ANAT}{space}_desc-structures_dseg": (Kind.LABELS, labels),
    }
    (root / ANAT).parent.mkdir(parents=True, exist_ok=True)
    for stem, (kind, data) in files.items():
        image = nib.Nifti1Image(data.astype(np.float32), GRID.affine)
        if matrix is not None:
            image = move(image, GRID, matrix, kind=kind)
        nib.save(image, root / f"{stem}.nii.gz")
        side = {"Description": stem, "SkullStripped": True, "volume_mm3": {}, "GeneratedBy": ["x"]}
        (root / f"{stem}.json").write_text(json.dumps(side))
    table = f"{ANAT}{space}_desc-structures_dseg.tsv"
    (root / table).write_text("index\tname\n")
    outputs = (*(f"{stem}.nii.gz" for stem in files), table)
    facts = StepRecords(restore=replace(RestoreRecord.empty(), n_samples=1))
    write_summary(
        root,
        ScanRecord(
            scan=f"sub-01_{suffix}", subject="01", task="restore", status=ScanStatus.DONE,
            outputs=outputs, facts=facts,
        ),
    )  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    root = tmp_path / "out"
    write_result(root, "T1w", 1)
    write_result(root, "T2w", 1, MOTION)
    return Settings(
        tmp_path / "raw", root, tmp_path / "w", output_spaces=("anat", "T1w", "MNI305"),
        run_uuid=RUN, command=("brainprior", "raw", "out", "participant"),
    )  # fmt: skip


def left(root: Path) -> dict[str, int]:
    """The files that an alignment can write: path -> time of the last change."""
    result = [*root.glob("sub-01/anat/*xfm*"), *root.glob("sub-01/anat/*space-T1w*")]
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in result}


def test_transforms_and_images_on_the_t1w(settings):
    root = settings.output_dir
    align_contrasts({"01"}, settings)
    names = [
        *(
            path.replace(".txt", ending)
            for path in (FORWARD, BACK)
            for ending in (".txt", ".json")
        ),
        *(
            f"{ANAT}_space-T1w_desc-{name}{ending}"
            for name in ("restored_T2w", "brainT2w_mask", "structuresT2w_dseg")
            for ending in (".nii.gz", ".json")
        ),
        f"{ANAT}_space-T1w_desc-structuresT2w_dseg.tsv",
    ]
    assert sorted(left(root)) == sorted(names)
    # with the file, ITK maps the T2w to the position of our image
    t1w = sitk.ReadImage(str(root / f"{ANAT}_desc-restored_T1w.nii.gz"), sitk.sitkFloat32)
    t2w = sitk.ReadImage(str(root / f"{ANAT}_desc-restored_T2w.nii.gz"), sitk.sitkFloat32)
    moved = sitk.Resample(t2w, t1w, sitk.ReadTransform(str(root / FORWARD)), sitk.sitkBSpline)
    ours = nib.load(root / f"{ANAT}_space-T1w_desc-restored_T2w.nii.gz")
    assert ours.shape == SHAPE
    inner = ndimage.binary_erosion(ours.get_fdata() > 0, iterations=3)
    apart = sitk.GetArrayFromImage(moved).T[inner] - ours.get_fdata()[inner]
    assert np.sqrt(np.mean(apart**2)) < 2
    labels = nib.load(root / f"{ANAT}_space-T1w_desc-structuresT2w_dseg.nii.gz").get_fdata()
    truth = nib.load(root / f"{ANAT}_desc-structures_dseg.nii.gz").get_fdata()
    assert (labels == truth)[truth > 0].mean() > 0.85
    both = sitk.CompositeTransform([sitk.ReadTransform(str(root / f)) for f in (FORWARD, BACK)])
    np.testing.assert_allclose(both.TransformPoint((10.0, 20.0, 30.0)), (10, 20, 30), atol=1e-9)
    side = json.loads((root / f"{ANAT}_space-T1w_desc-brainT2w_mask.json").read_text())
    assert side["SpatialReference"] == f"bids::{ANAT}_desc-restored_T1w.nii.gz"
    own = f"{ANAT}_space-T2w_desc-brain_mask.nii.gz"
    assert side["Sources"] == [f"bids::{own}", f"bids::{FORWARD}"]


def test_ants_and_nitransforms_read_the_rigid_transforms(settings):
    """Points of the T1w (RAS) through from-T2w_to-T1w, which resamples the T2w on the T1w."""
    import ants
    import nitransforms

    root = settings.output_dir
    align_contrasts({"01"}, settings)
    record = json.loads((root / "logs/contrasts/sub-01_T2w.json").read_text())
    to_t1w = np.array(record["to_reference"])
    points = np.random.default_rng(0).uniform(-100, 100, (20, 3))
    to_lps = np.array((-1, -1, 1))
    for path, matrix in ((FORWARD, np.linalg.inv(to_t1w)), (BACK, to_t1w)):
        expected = points @ matrix[:3, :3].T + matrix[:3, 3]
        linear = nitransforms.linear.load(root / path, fmt="itk")
        np.testing.assert_allclose(linear.map(points), expected, atol=0.01)
        transform = ants.read_transform(str(root / path))
        by_ants = [
            to_lps * ants.apply_ants_transform_to_point(transform, p * to_lps) for p in points
        ]
        np.testing.assert_allclose(by_ants, expected, atol=0.01)


def test_its_records_fit_their_schema_and_are_verified(settings):
    root = settings.output_dir
    align_contrasts({"01"}, settings)
    (act,) = (root / "prov").glob("*_act.json")
    activity = json.loads(act.read_text())["Activities"][0]
    assert activity["StartedAtTime"] <= activity["EndedAtTime"]
    result = verify_records(root)
    assert (result.changes, result.outputs) == ({}, 11)
    (root / BACK).write_text("")
    assert verify_records(root).changes == {BACK: "changed"}
    for record in ("act", "io", "soft", "env"):
        text = resources.files("brainprior_bids") / "data" / "schemas" / f"{record}.schema.json"
        check = jsonschema.Draft202012Validator(json.loads(text.read_text()))
        (path,) = (root / "prov").glob(f"*_{record}.json")
        content = json.loads(path.read_text())
        assert not list(check.iter_errors(content))
        if record == "act":
            activity = content["Activities"][0]["Id"]
            del content["Activities"][0]["ToReference"]
            assert list(check.iter_errors(content))
    for path in (FORWARD, f"{ANAT}_space-T1w_desc-brainT2w_mask.nii.gz"):
        side = json.loads((root / f"{path.partition('.')[0]}.json").read_text())
        assert side["GeneratedBy"] == [activity]
        assert recorded_sha256(side) == sha256_file(root / path)


def test_it_is_done_once_and_again_if_an_image_changed(settings):
    root = settings.output_dir
    align_contrasts({"01"}, settings)
    before = left(root)
    align_contrasts({"01"}, settings)
    assert left(root) == before
    align_contrasts({"02"}, settings)
    assert left(root) == before
    plain = replace(settings, output_spaces=("anat",), run_uuid=RUN.replace("0101", "0102"))
    align_contrasts({"01"}, plain)
    assert not [path for path in left(root) if "space-T1w" in path]
    assert len(list((root / "prov").glob("*_io.json"))) == 1
    write_result(root, "T2w", 1)
    align_contrasts({"01"}, plain)
    record = json.loads((root / "logs/contrasts/sub-01_T2w.json").read_text())
    np.testing.assert_allclose(record["to_reference"], np.eye(4), atol=0.05)


def test_a_contrast_that_cannot_be_registered_is_named_and_leaves_nothing(settings, told):
    root = settings.output_dir
    align_contrasts({"01"}, settings)
    write_result(root, "T2w", 2)  # another brain
    told.clear()
    align_contrasts({"01"}, settings)
    (line,) = [r.getMessage() for r in told.records if r.levelno == logging.WARNING]
    assert line.startswith("sub-01_T2w could not be registered to sub-01_T1w: ")
    assert not left(root)
    assert not list((root / "prov").glob("*_io.json"))
    align_contrasts({"01"}, settings)  # the warning is repeated
    assert [r.getMessage() for r in told.records].count(line) == 2


def t2w(settings) -> ScanRecord:
    """The T2w's summary."""
    return next(s for s in read_summaries(settings.output_dir) if s.scan == "sub-01_T2w")


def test_the_alignment_is_in_the_summary_and_decides_on_the_verdict(settings):
    align_contrasts({"01"}, settings)
    alignment = t2w(settings).facts.alignment
    assert (alignment.reference, alignment.message) == ("sub-01_T1w", "")
    assert alignment.alike > 0.8
    assert t2w(settings).warnings == ()
    write_result(settings.output_dir, "T2w", 2)  # another brain
    align_contrasts({"01"}, settings)
    align_contrasts({"01"}, settings)
    summary = t2w(settings)
    assert summary.facts.alignment.alike < 0.75
    assert summary.warnings == (summary.facts.alignment.message,)
    assert "is below 0.75" in " ".join(r for r in reasons(metrics(summary)) if "same_label" in r)
    # the participant's own T2w again, its result replaced behind the summary's back
    write_summary(settings.output_dir, replace(summary, warnings=("Old.", *summary.warnings)))
    told_before = t2w(settings)
    write_result(settings.output_dir, "T2w", 1, MOTION)
    write_summary(settings.output_dir, told_before)
    align_contrasts({"01"}, settings)
    assert t2w(settings).warnings == ("Old.",)
    assert t2w(settings).facts.alignment.message == ""


def test_an_unreadable_image_stops_nothing(settings, told):
    (settings.output_dir / f"{ANAT}_desc-restored_T2w.nii.gz").write_bytes(b"\x1f\x8b")
    align_contrasts({"01"}, settings)
    assert any("sub-01_T2w could not be aligned with sub-01_T1w" in t for t in told.messages)
    assert "could not be aligned" in t2w(settings).facts.alignment.message


@pytest.fixture
def with_template(settings, tmp_path, monkeypatch):
    """The T1w has a transform to a template that is shifted by 4 mm to the right."""
    home = tmp_path / "templates"
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(home))
    write_template(home, np.ones(SHAPE), GRID.affine)
    shift = sitk.TranslationTransform(3, (4.0, 0.0, 0.0))  # LPS points of the template to the T1w
    sitk.WriteTransform(sitk.CompositeTransform([shift]), str(settings.output_dir / TO_TEMPLATE))
    return replace(settings, output_spaces=("anat", SPACE))


TO_TEMPLATE = f"{ANAT}_from-T1w_to-{SPACE}_mode-image_xfm.h5"
ON_TEMPLATE = f"{ANAT}_space-{SPACE}_res-1"


def test_the_t1ws_transform_takes_a_contrast_to_a_template(with_template):
    root = with_template.output_dir
    align_contrasts({"01"}, with_template)
    output = sorted(str(p.relative_to(root)) for p in root.glob(f"{ON_TEMPLATE}*"))
    assert output == sorted([
        f"{ON_TEMPLATE}_desc-restored_T2w.json", f"{ON_TEMPLATE}_desc-restored_T2w.nii.gz",
        f"{ON_TEMPLATE}_desc-brainT2w_mask.json", f"{ON_TEMPLATE}_desc-brainT2w_mask.nii.gz",
        f"{ON_TEMPLATE}_desc-structuresT2w_dseg.json",
        f"{ON_TEMPLATE}_desc-structuresT2w_dseg.nii.gz",
        f"{ON_TEMPLATE}_desc-structuresT2w_dseg.tsv",
    ])  # fmt: skip
    # the T1w's labels, moved by 4 mm to the right, are where the T2w's are
    labels = nib.load(root / f"{ON_TEMPLATE}_desc-structuresT2w_dseg.nii.gz").get_fdata()
    truth = nib.load(root / f"{ANAT}_desc-structures_dseg.nii.gz").get_fdata()
    there = np.roll(truth, 4, axis=0)
    assert (labels == there)[there > 0].mean() > 0.85
    assert (labels == truth)[truth > 0].mean() < 0.7
    side = json.loads((root / f"{ON_TEMPLATE}_desc-restored_T2w.json").read_text())
    assert side["Sources"] == [
        f"bids::{ANAT}_desc-restored_T2w.nii.gz", f"bids::{TO_TEMPLATE}", f"bids::{FORWARD}",
    ]  # fmt: skip
    assert side["SpatialReference"].endswith(f"tpl-{SPACE}_res-01_T1w.nii.gz")
    assert side["Resolution"].startswith("1 mm")
    assert verify_records(root).changes == {}


def test_a_contrast_that_was_registered_itself_keeps_its_images(with_template):
    root = with_template.output_dir
    (summary,) = [s for s in read_summaries(root) if s.scan == "sub-01_T2w"]
    own = f"{ANAT}_from-T2w_to-{SPACE}_mode-image_xfm.h5"
    write_summary(root, replace(summary, outputs=(*summary.outputs, own)))
    align_contrasts({"01"}, with_template)
    assert not list(root.glob(f"{ON_TEMPLATE}*"))
    assert (root / FORWARD).is_file()


def test_a_finished_t1w_without_the_transform_takes_no_contrast_along(with_template):
    """The scan is then registered to the template itself."""
    summaries = read_summaries(with_template.output_dir)
    t2w = [BIDSName.parse("sub-01_T2w.nii.gz")]
    assert through_t1w(t2w, summaries, with_template) == set()
    done = [
        replace(s, outputs=(*s.outputs, TO_TEMPLATE)) if s.scan == "sub-01_T1w" else s
        for s in summaries
    ]
    assert through_t1w(t2w, done, with_template) == {"sub-01_T2w"}


def result(stem: str, thickness: float = 1.0, image: str = "restored") -> Result:
    return Result(BIDSName.parse(f"{stem}.nii.gz"), image, thickness)


def test_the_reference_is_the_t1w_with_the_thinnest_slices():
    results = [
        result("sub-01_FLAIR"), result("sub-01_acq-a_T1w", 5.0), result("sub-01_acq-b_T1w"),
        result("sub-01_T2w"), result("sub-02_FLAIR"), result("sub-02_T2w"),
        result("sub-03_ses-a_T1w"), result("sub-03_ses-b_T2w"), result("sub-04_T1w"),
        result("sub-04_T2w", image="inpainted"),
    ]  # fmt: skip
    found = {(p.other.name.stem, p.reference.name.stem) for p in pairs(results)}
    assert found == {
        ("sub-01_FLAIR", "sub-01_acq-b_T1w"),
        ("sub-01_T2w", "sub-01_acq-b_T1w"),
        ("sub-02_FLAIR", "sub-02_T2w"),
    }
    without_t1w = next(p for p in pairs(results) if p.reference.name.suffix == "T2w")
    assert PurePosixPath(without_t1w.transforms[0]).name == (
        "sub-02_from-FLAIR_to-T2w_mode-image_xfm.txt"
    )
    assert without_t1w.on_reference({}, ("anat", "T1w")) == {}
