# SPDX-License-Identifier: Apache-2.0
"""``prepare`` gives the same results as the nodes, with the same fallbacks and errors."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from brainprior_bids import scan
from brainprior_bids.anatomy import brain as brain_module
from brainprior_bids.anatomy import external, rescue
from brainprior_bids.anatomy import prepare as prepare_module
from brainprior_bids.anatomy.brain import BrainSources, SuppliedFile, find_brain
from brainprior_bids.anatomy.prepare import align_to_mni305, prepare
from brainprior_bids.anatomy.runs import errors_name
from brainprior_bids.bids.files import to_json
from brainprior_bids.engine import weights
from brainprior_bids.engine.errors import AnatomyError, InputError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.interfaces.anatomy import N4, CentroidAffine, Conform, Parcellate
from brainprior_bids.interfaces.files import bias_record
from brainprior_bids.interfaces.fuse import Align
from brainprior_bids.interfaces.lesion import Lesion
from brainprior_bids.interfaces.restoration import read_observations
from brainprior_bids.records import AffineMethod, MaskSource, StructuresSource

METADATA = {"SliceThickness": 5.0}
PARCELLATION = str(weights.FOLDER / "parcellation.safetensors")


PART = ((20, 14, 9), (172, 210, 31))
"""First and last voxel of the demo's scan that are used: no neck, half the time."""
LOST = 13
"""A slice of this part without signal."""


@pytest.fixture(scope="module")
def files(demo_head, tmp_path_factory):
    """Part of the demo's scan, stored as LAS so that conforming moves its origin, in which a
    slice is lost; and a lesion mask."""
    folder = tmp_path_factory.mktemp("demo")
    grid = demo_head.scan_grid.crop(*PART)
    box = tuple(slice(*ends) for ends in zip(*PART, strict=True))
    scan = np.round(demo_head.scan[box]).astype(np.int16)
    scan[:, :, LOST] //= 10
    image = nib.Nifti1Image(scan, grid.affine)
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    nib.save(image.as_reoriented(np.array([[0, -1], [1, 1], [2, 1]])), folder / "sub-01_T1w.nii")
    middle = np.argwhere(demo_head.brain).mean(0)
    centre = (demo_head.grid.affine @ np.append(middle, 1))[:3, None, None, None]
    away = np.linalg.norm(grid.points_mm() - centre, axis=0)
    lesion = nib.Nifti1Image((away < 8).astype(np.uint8), grid.affine)
    nib.save(lesion, folder / "lesion.nii")
    return folder


@pytest.fixture(scope="module")
def prepared(files):
    return prepare(
        files / "sub-01_T1w.nii", metadata=METADATA, lesion=files / "lesion.nii", dilate_mm=2.0
    )


def run(interface, folder: Path):
    folder.mkdir(parents=True)
    return interface.run(cwd=str(folder)).outputs


@pytest.fixture(scope="module")
def nodes(files, tmp_path_factory):
    """Outputs of the nodes, by name, as the workflow connects them."""
    out = tmp_path_factory.mktemp("nodes")
    conform = run(
        Conform(in_file=str(files / "sub-01_T1w.nii"), metadata=METADATA), out / "conform"
    )
    parcellate = run(
        Parcellate(
            in_file=conform.out_file, conform_json=conform.conform_json, weights=PARCELLATION
        ),
        out / "parcellate",
    )
    lesion = run(
        Lesion(
            in_file=conform.out_file,
            lesion=str(files / "lesion.nii"),
            mask=parcellate.mask,
            mask_scan=parcellate.mask_scan,
            dilate_mm=2.0,
        ),
        out / "lesion",
    )
    n4 = run(
        N4(
            in_file=conform.out_file,
            conform_json=conform.conform_json,
            mask_scan=lesion.measured,
            structures_json=parcellate.structures_json,
        ),
        out / "n4",
    )
    affine = run(
        CentroidAffine(
            in_file=conform.out_file,
            mask=parcellate.mask,
            structures_json=parcellate.structures_json,
        ),
        out / "affine",
    )
    return {
        "conform": conform, "parcellate": parcellate, "lesion": lesion, "n4": n4, "affine": affine
    }  # fmt: skip


def test_nodes_and_prepare_agree_bit_for_bit(prepared, nodes):
    """All images with their affines, and all numbers of the JSON files."""
    on_scan = {
        nodes["conform"].out_file: prepared.values,
        nodes["parcellate"].mask_scan: prepared.brain.mask_scan,
        nodes["lesion"].mask_scan: prepared.mask,
        nodes["lesion"].hidden: prepared.lesion.hidden,
        nodes["n4"].log_bias: prepared.log_bias,
    }
    at_1mm = {
        nodes["parcellate"].mask: prepared.brain.mask,
        nodes["parcellate"].structures: prepared.brain.structures,
        nodes["lesion"].mask: prepared.mask_1mm,
    }
    np.testing.assert_array_equal(
        nib.load(nodes["conform"].out_file).affine, prepared.conformed.image.affine
    )
    fine = prepared.grid.one_millimetre()
    for images, grid in ((on_scan, prepared.grid), (at_1mm, fine)):
        for path, values in images.items():
            image = nib.load(path)
            np.testing.assert_array_equal(np.asarray(image.dataobj), values, path)
            assert Grid(image.shape, image.affine) == grid

    def read(path):
        return json.loads(Path(path).read_text())

    def plain(value):
        return json.loads(to_json(value))

    conform = read(nodes["conform"].conform_json)
    assert conform["facts"] == plain(prepared.conformed.facts)
    assert conform["acquisition"] == plain(prepared.acquisition.to_dict())
    assert read(nodes["parcellate"].structures_json) == plain(
        {
            "table": prepared.brain.table,
            "warnings": prepared.brain.warnings,
            **prepared.brain.facts,
        }
    )
    assert read(nodes["lesion"].lesion_json) == plain(
        {**prepared.lesion.facts, "warnings": prepared.lesion.warnings}
    )
    assert read(nodes["n4"].bias_json) == plain(bias_record(prepared.bias).to_json())
    assert prepared.bias.gains is not None  # a scan of 5 mm slices
    affine = read(nodes["affine"].affine_json)
    assert affine == plain(vars(prepared.affine))
    assert affine["matrix"] == prepared.to_mni305.tolist()
    warnings = [text for node in nodes.values() for text in read(node.record)["warnings"]]
    assert warnings == prepared.warnings


def test_the_facts_name_the_weights_and_the_slices(prepared):
    facts = prepared.brain.facts
    assert facts["mask_source"] == facts["structures_source"] == "embedded"
    assert facts["weights"]["sha256"] == weights.sha256_file(Path(PARCELLATION))
    assert facts["slices"]["mismatch"] > 0
    assert facts["lost_slices"] == [LOST]
    assert prepared.brain.mask_scan[:, :, LOST].sum() > 1000  # its neighbours are used instead


def test_what_restore_reads_of_a_lost_slice_is_missing(prepared, nodes):
    """For the engine, for fusion, and for the bias field."""
    assert prepared.hidden[:, :, LOST].all()
    rest = np.delete(np.arange(prepared.grid.shape[2]), LOST)
    np.testing.assert_array_equal(prepared.hidden[:, :, rest], prepared.lesion.hidden[:, :, rest])
    inputs = {
        "in_file": nodes["conform"].out_file,
        "conform_json": nodes["conform"].conform_json,
        "structures_json": nodes["parcellate"].structures_json,
        "mask_scan": nodes["lesion"].mask_scan,
        "hidden": nodes["lesion"].hidden,
        "log_bias": nodes["n4"].log_bias,
    }
    (observation,) = read_observations(inputs)
    np.testing.assert_array_equal(observation.hidden.numpy(), prepared.hidden > 0)
    del inputs["structures_json"]
    (believed,) = read_observations(inputs)
    np.testing.assert_array_equal(believed.hidden.numpy(), prepared.lesion.hidden > 0)


def test_an_image_in_memory_is_prepared_like_its_file(prepared, files):
    image = nib.load(files / "sub-01_T1w.nii")
    other = prepare(
        nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header),
        metadata=METADATA,
        unbias=False,
        align=False,
    )
    np.testing.assert_array_equal(other.values, prepared.values)
    np.testing.assert_array_equal(other.mask, prepared.brain.mask_scan)
    assert other.grid == prepared.grid
    assert (other.log_bias, other.to_mni305, other.lesion) == (None, None, None)
    assert other.hidden[:, :, LOST].all()


def test_another_run_is_prepared_like_the_reference(prepared, files, nodes, tmp_path, monkeypatch):
    """The scan itself as its own second run: no motion, and the same files."""
    monkeypatch.setattr(prepare_module, "find_brain", lambda image, **_: prepared.brain)
    monkeypatch.setattr(prepare_module, "find_bias", lambda *_, **__: prepared.bias)
    path = str(files / "sub-01_T1w.nii")
    request = {
        "name": "sub-01_run-2_T1w",
        "conform": {"in_file": path, "metadata": METADATA},
        "parcellate": {"weights": PARCELLATION},
    }
    reference = {
        "name": "sub-01_run-1_T1w",
        "structures_json": nodes["parcellate"].structures_json,
        "in_file": nodes["conform"].out_file,
        "conform_json": nodes["conform"].conform_json,
        "mask": nodes["parcellate"].mask,
        "log_bias": nodes["n4"].log_bias,
    }
    outputs = run(Align(runs=[request], **reference), tmp_path / "align")
    report = json.loads(Path(outputs.runs_json).read_text())
    assert report["reference"] == "sub-01_run-1_T1w"
    (aligned,) = report["runs"]
    assert set(aligned) == {
        "name", "files", "hashes", "acquisition", "to_reference", "angle_deg", "shift_mm", "gain",
        "correlation", "shared", "bias",
    }  # fmt: skip
    assert aligned["angle_deg"] < 0.1
    assert aligned["shift_mm"] < 0.1
    for role, file in aligned["files"].items():
        assert aligned["hashes"][role] == weights.sha256_file(Path(file))
    hidden = np.asarray(nib.load(aligned["files"]["hidden"]).dataobj)
    assert hidden[:, :, LOST].all()
    assert not np.delete(hidden, LOST, axis=2).any()
    mask = np.asarray(nib.load(aligned["files"]["mask_scan"]).dataobj)
    np.testing.assert_array_equal(mask, prepared.brain.mask_scan)
    gone = {**request, "conform": {"in_file": str(files / "gone.nii"), "metadata": {}}}
    with pytest.raises(InputError, match=r"^sub-01_run-2_T1w: gone: expected an image file"):
        run(Align(runs=[gone], **reference), tmp_path / "gone")


def test_an_error_names_its_run_once():
    with pytest.raises(AnatomyError, match=r"^run-2: no brain$"), errors_name("run-2"):
        raise AnatomyError("no brain")
    with pytest.raises(AnatomyError, match=r"^run-2 is empty$"), errors_name("run-2"):
        raise AnatomyError("run-2 is empty")


@pytest.fixture
def without_structures(monkeypatch):
    """No affine can be fitted to the structures."""

    def fails(table, **_):
        raise AnatomyError("fit_affine: the structures make no sense.")

    monkeypatch.setattr(rescue, "fit_affine", fails)


def test_restore_scan_rescues_a_failed_affine(
    prepared, files, without_structures, monkeypatch, tmp_path
):
    """As the command does: by the template, if it is on this machine; with a warning."""
    path, result = files / "sub-01_T1w.nii", {}
    doubtful = replace(prepared.brain, warnings=["Neighbouring slices are inconsistent"])
    monkeypatch.setattr(prepare_module, "find_brain", lambda image, **_: doubtful)
    monkeypatch.setattr(prepare_module, "find_bias", lambda *_, **__: prepared.bias)

    def restore(observation, **options):
        result.update(options, observation=observation)
        raise AnatomyError("far enough")

    monkeypatch.setattr(scan, "restore", restore)
    monkeypatch.setattr(prepare_module, "template_folder", lambda: None)
    with pytest.raises(AnatomyError, match=r"make no sense\. And MNI305 is not in TemplateFlow"):
        scan.restore_scan(path, contrast="T1w", metadata=METADATA, prior=object())
    monkeypatch.setattr(prepare_module, "template_folder", lambda: tmp_path)
    monkeypatch.setattr(rescue, "register_to_template", lambda *_, **__: prepared.to_mni305)
    with pytest.raises(AnatomyError, match="far enough"):
        scan.restore_scan(
            path, contrast="T1w", metadata=METADATA, prior=object(), lesion=files / "lesion.nii"
        )
    np.testing.assert_array_equal(result["to_mni305"], prepared.to_mni305)
    observation = result["observation"]
    np.testing.assert_array_equal(np.asarray(observation.scan), prepared.values)
    assert np.asarray(observation.hidden).any()
    assert observation.acquisition == prepared.acquisition


def test_the_rescue_is_a_warning_of_prepare(prepared, files, without_structures, monkeypatch):
    monkeypatch.setattr(prepare_module, "find_brain", lambda image, **_: prepared.brain)
    monkeypatch.setattr(prepare_module, "template_folder", lambda: files)
    monkeypatch.setattr(rescue, "register_to_template", lambda *_, **__: prepared.to_mni305)
    rescued = prepare(files / "sub-01_T1w.nii", metadata=METADATA, unbias=False)
    assert rescued.affine.method == AffineMethod.TEMPLATE
    assert any("The structures yielded no affine to MNI305" in text for text in rescued.warnings)


def test_a_lesion_outside_the_brain_is_refused(prepared, files, monkeypatch, tmp_path):
    monkeypatch.setattr(prepare_module, "find_brain", lambda image, **_: prepared.brain)
    corner = np.zeros(prepared.grid.shape, np.uint8)
    corner[:2, :2, :2] = 1
    nib.save(nib.Nifti1Image(corner, prepared.grid.affine), tmp_path / "corner.nii")
    with pytest.raises(InputError, match="the lesion mask does not touch the brain"):
        prepare(files / "sub-01_T1w.nii", metadata=METADATA, lesion=tmp_path / "corner.nii")


# --- find_brain: where mask and structures come from -------------------------------------------

SHAPE = (48, 56, 48)
AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])
GRID = Grid(SHAPE, AFFINE)


def ball(radius, at):
    return sum((p - a) ** 2 for p, a in zip(np.indices(SHAPE), at, strict=True)) < radius**2


BRAIN = ball(15, (24, 28, 24))


def labels():
    """Two hemispheres and six structures, FreeSurfer's values, 4 mm."""
    values = np.where(BRAIN, 2, 0)
    values[24:][BRAIN[24:]] = 41
    for value, at in ((10, (20, 28, 24)), (49, (28, 28, 24)), (16, (24, 24, 16)),
                      (12, (17, 32, 24)), (51, (31, 32, 24)), (17, (18, 26, 18))):  # fmt: skip
        values[ball(3, at)] = value
    return values.astype(np.int16)


def head(*, stripped=False):
    noise = np.abs(np.random.default_rng(0).normal(0, 5, SHAPE))
    skin = 300.0 * ball(18, (24, 28, 24)) + noise
    data = 400.0 * BRAIN + (0 if stripped else skin)
    return nib.Nifti1Image(data.astype(np.float32), AFFINE)


class Network(torch.nn.Linear):
    """A substitute for the embedded network: parameters and a card."""

    def __init__(self):
        super().__init__(1, 1)
        self.metadata = {"name": "stand-in", "sha256": "0" * 64}


@pytest.fixture
def network(monkeypatch):
    """A network that finds the true brain."""
    fine = GRID.one_millimetre()
    values = np.kron(labels(), np.ones((4, 4, 4), np.int16))
    result = external.assemble(values, values > 0, {10: 0.5}, image=head(), restored_grid=fine)
    monkeypatch.setattr(
        brain_module, "parcellate", lambda *_, **__: replace(result, warnings=["look"])
    )
    return Network()


@pytest.fixture
def blind(monkeypatch):
    """A network that finds no brain."""

    def fails(*_, **__):
        raise AnatomyError("parcellate: expected a brain.")

    monkeypatch.setattr(brain_module, "parcellate", fails)
    return Network()


@pytest.fixture
def supplied(tmp_path):
    mask, dseg = tmp_path / "mask.nii", tmp_path / "dseg.nii"
    nib.save(nib.Nifti1Image(BRAIN.astype(np.uint8), AFFINE), mask)
    nib.save(nib.Nifti1Image(labels(), AFFINE), dseg)
    return BrainSources(
        "mask", "derivatives", SuppliedFile(mask, "bids:d:mask"), SuppliedFile(dseg)
    )


def test_the_embedded_networks_brain_is_the_default(network):
    brain = find_brain(head(), network=network)
    assert brain.warnings == ["look"]
    assert brain.facts == {
        "mask_source": "embedded",
        "structures_source": "embedded",
        "weights": {
            "name": "stand-in", "licence": None, "training_data": None, "sha256": "0" * 64
        },
    }  # fmt: skip
    checked = find_brain(head(), network=network, slice_axis=2)
    assert set(checked.facts["slices"]) == {"mismatch", "faintest", "faintest_slice"}


def test_a_stripped_scan_keeps_its_own_edge(network):
    brain = find_brain(head(stripped=True), network=network)
    assert brain.facts["mask_source"] == MaskSource.OWN_EDGE
    assert brain.warnings == [
        "look", "The scan is already skull-stripped: its own edge is the mask."
    ]  # fmt: skip
    np.testing.assert_allclose(brain.mask_scan > 0.5, BRAIN)
    assert {row["index"]: row["confidence"] for row in brain.table}[10] == 0.5
    skipped = find_brain(head(), network=network, sources=BrainSources("skip"))
    assert skipped.facts["mask_source"] == MaskSource.SKIP
    assert "the background is not empty" in skipped.warnings[1]


def test_supplied_files_replace_the_network(network, supplied):
    brain = find_brain(head(), network=network, sources=supplied)
    assert brain.facts["mask_source"] == MaskSource.FILE
    assert brain.facts["structures_source"] == StructuresSource.FILE
    assert brain.facts["given"] == {"mask": supplied.mask.facts(), "dseg": supplied.dseg.facts()}
    assert brain.facts["mask_agreement"] > 0.95
    assert {row["confidence"] for row in brain.table} == {1.0}


def test_a_network_that_fails_stops_only_where_it_is_needed(blind, supplied):
    brain = find_brain(head(), network=blind, sources=supplied)
    assert "mask_agreement" not in brain.facts
    assert brain.warnings == [
        "The supplied mask could not be compared with the embedded network's, which found no "
        "brain: "
        "parcellate: expected a brain."
    ]
    for sources in (None, BrainSources("skip"), replace(supplied, parcellation="embedded")):
        with pytest.raises(AnatomyError, match="expected a brain"):
            find_brain(head(), network=blind, sources=sources)


def test_a_supplied_file_that_is_missing_is_named(network):
    with pytest.raises(InputError, match="expected mask_file for this setting, got none"):
        find_brain(head(), network=network, sources=BrainSources("mask"))
    with pytest.raises(InputError, match="expected dseg_file for this setting, got none"):
        find_brain(head(), network=network, sources=BrainSources(parcellation="derivatives"))


def test_programs_are_given_a_file_of_the_scan(network, supplied, tmp_path, monkeypatch):
    """An image in memory is written to a file for them; the command is recorded."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, option, file in (
        ("mri_synthstrip", "$4", supplied.mask), ("mri_synthseg", "$4", supplied.dseg)
    ):  # fmt: skip
        script = programs / name
        script.write_text(f'#!/bin/sh\ntest -f "$2" && cp {file.path} "{option}.nii"\n'
                          f'gzip -c "{option}.nii" > "{option}"\n')  # fmt: skip
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    brain = find_brain(head(), network=network, sources=BrainSources("synthstrip", "synthseg"))
    assert brain.facts["mask_source"] == MaskSource.SYNTHSTRIP
    assert brain.facts["structures_source"] == StructuresSource.SYNTHSEG
    for name in ("synthstrip", "synthseg"):
        assert brain.facts[name]["program"] == str(programs / f"mri_{name}")
        assert brain.facts[name]["command"][2].endswith("scan.nii.gz")
    assert brain.facts["synthseg"]["command"][-1] == "--cpu"


def test_an_affine_needs_structures():
    with pytest.raises(AnatomyError, match="expected at least 3 structures"):
        align_to_mni305(head(), np.kron(BRAIN, np.ones((4, 4, 4))), [])
