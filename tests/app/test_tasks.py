# SPDX-License-Identifier: Apache-2.0
"""Every task except plain restoration, through the command, together with unusable scans.

The scan is a slab of 30 mm through the middle of the demo's head: a run takes seconds.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from brainprior_bids.cli.run import main
from brainprior_bids.settings import TASKS


def brainprior(*arguments):
    """Run the command with few steps; exit code and status table."""
    done = subprocess.run(
        [sys.executable, "-m", "brainprior_bids", *map(str, arguments), "--device", "cpu",
         "--nprocs", "1", "--omp-nthreads", "1", "--sloppy", "--skip-bids-validation",
         "--no-viewer"],
        capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def status(output_dir):
    """Participant -> (status, message), of the rows with that task."""
    with (output_dir / "logs" / "status.tsv").open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    return {(r["source"][4:6], r["task"]): (r["status"], r["message"]) for r in rows}


def put(path, data, affine, **sidecar):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    if sidecar:
        path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(sidecar))


THICK = {"SliceThickness": 5.0, "SpacingBetweenSlices": 5.0, "MRAcquisitionType": "2D"}


@pytest.fixture(scope="module")
def head(demo_slab):
    """The slab of the demo: scan, truth and their grids."""
    return demo_slab


@pytest.fixture(scope="module")
def raw(tmp_path_factory, head):
    """Six participants with the slab and a lesion mask each, five of them wrong."""
    root = tmp_path_factory.mktemp("tasks") / "raw"
    affine = np.array(head.scan_grid.affine)
    middle = np.array(head.scan_grid.shape) // 2
    lesion = np.zeros(head.scan_grid.shape, np.uint8)
    lesion[
        middle[0] + 18 : middle[0] + 30, middle[1] : middle[1] + 12, middle[2] : middle[2] + 2
    ] = 1
    masks = {
        "01": {"sub-01_label-lesion_roi": lesion},
        "02": {"sub-02_label-lesion_roi": lesion[::2, ::2]},
        "03": {"sub-03_label-lesion_roi": 0 * lesion},
        "04": {"sub-04_label-lesion_roi": np.ones_like(lesion)},
        "05": {"ses-b/sub-05_ses-b_label-lesion_roi": lesion},
        "06": {"sub-06_label-lesion_roi": lesion, "sub-06_label-lesion_desc-b_roi": lesion},
    }
    for subject, named in masks.items():
        session = "ses-a" if subject == "05" else ""
        stem = f"sub-{subject}" + (f"_{session}" if session else "")
        folder = root / f"sub-{subject}" / session / "anat"
        put(folder / f"{stem}_T1w.nii.gz", head.scan, affine, **THICK)
        for name, mask in named.items():
            where, _, name = name.rpartition("/")
            at = affine @ np.diag([2, 2, 1, 1]) if subject == "02" else affine
            put(root / f"sub-{subject}" / where / "anat" / f"{name}.nii.gz", mask, at)
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    return root


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def inpainted(raw):
    output_dir = raw.parent / "out"
    return brainprior(raw, output_dir, "participant", "--task", "inpaint"), output_dir


def test_a_good_lesion_is_filled_and_the_others_named(inpainted, raw):
    done, output_dir = inpainted
    assert done.returncode == 1
    rows = {subject: row for (subject, _), row in status(output_dir).items()}
    assert rows.pop("01")[0] == "done"
    for subject, messages in (
        ("02", "grid"),
        ("03", "empty"),
        ("04", "cover"),
        ("05", "another session"),
        ("06", "2 lesion masks"),
    ):
        state, message = rows.pop(subject)
        assert (state, f"sub-{subject}" in message, messages in message) == ("failed", True, True)
        assert message in done.stderr
        assert not list((output_dir / f"sub-{subject}").rglob("*.nii.gz"))
    assert not rows
    anat = output_dir / "sub-01" / "anat"
    before = np.asarray(nib.load(raw / "sub-01/anat/sub-01_T1w.nii.gz").dataobj)
    after = np.asarray(nib.load(anat / "sub-01_desc-inpainted_T1w.nii.gz").dataobj)
    hole = np.asarray(nib.load(raw / "sub-01/anat/sub-01_label-lesion_roi.nii.gz").dataobj) > 0
    np.testing.assert_array_equal(after[~hole], before.astype(np.float32)[~hole])
    assert (after[hole] != before[hole]).mean() > 0.99


def test_another_tools_image_is_refined_beside_it(inpainted, raw, head, tmp_path, capsys):
    _, output_dir = inpainted
    before = digests(output_dir / "sub-01" / "anat")
    tool = tmp_path / "tool"
    smooth = ndimage.gaussian_filter(head.truth * head.brain, 1.0).astype(np.float32)
    affine = np.array(head.grid.affine)
    put(tool / "sub-01/anat/sub-01_desc-SynthSR_T1w.nii.gz", smooth, affine)
    for desc in ("one", "two"):
        put(tool / f"sub-03/anat/sub-03_desc-{desc}_T1w.nii.gz", smooth, affine)
    (tool / "dataset_description.json").write_text("{}")
    asked = [raw, output_dir, "participant", "--participant-label", "01", "02", "03",
             "--task", "restore", "refine", "-d", f"tool={tool}"]  # fmt: skip
    assert main([*map(str, asked), "--trust", "0", "--device", "cpu"]) == 2
    assert "--trust: expected a number above 0" in capsys.readouterr().err
    done = brainprior(*asked, "--trust", "0.05")
    assert done.returncode == 1
    rows = {s: row for (s, task), row in status(output_dir).items() if task == "restore+refine"}
    assert rows["01"][0] == "done"
    assert rows["02"][0] == rows["03"][0] == "failed"
    assert "no image to refine" in rows["02"][1]
    assert "expected one image" in rows["03"][1]
    anat = output_dir / "sub-01" / "anat"
    output = nib.load(anat / "sub-01_desc-restoredRefined_T1w.nii.gz")
    np.testing.assert_allclose(output.header.get_zooms(), 1.0, atol=0.02)
    after = digests(anat)
    assert {name for name in before if "inpainted" in name} <= set(after)
    assert all(after[name] == digest for name, digest in before.items() if "inpainted" in name)


def test_an_image_of_another_contrast_is_refined_within_a_map_of_trust(head, tmp_path):
    """A FLAIR, its SynthSR image (a T1w) and a map of that one's error; three maps are wrong."""
    raw, tool, output_dir = tmp_path / "raw", tmp_path / "tool", tmp_path / "out"
    smooth = ndimage.gaussian_filter(head.truth * head.brain, 1.0).astype(np.float32)
    affine = np.array(head.grid.affine)
    trust = np.full(smooth.shape, 0.05, np.float32)
    trust[: len(trust) // 2] = 0.2
    maps = {"01": trust, "02": trust[1:], "03": 0 * trust, "04": None}
    for subject, sd in maps.items():
        anat = raw / f"sub-{subject}" / "anat"
        put(anat / f"sub-{subject}_FLAIR.nii.gz", head.scan, np.array(head.scan_grid.affine),
            **THICK)  # fmt: skip
        put(tool / f"sub-{subject}/anat/sub-{subject}_desc-SynthSR_T1w.nii.gz", smooth, affine)
        if sd is not None:
            put(tmp_path / "maps" / f"sub-{subject}_sd.nii.gz", sd, affine)
    for root in (raw, tool):
        description = '{"Name": "x", "BIDSVersion": "1.10.0"}'
        (root / "dataset_description.json").write_text(description)
    pattern = str(tmp_path / "maps" / "sub-{subject}_sd.nii.gz")
    done = brainprior(raw, output_dir, "participant", "-m", "FLAIR", "--task", "refine", "-d",
                      f"synthsr={tool}", "--trust", pattern)  # fmt: skip
    assert done.returncode == 1
    rows = {subject: row for (subject, _), row in status(output_dir).items()}
    assert rows["01"][0] == "done", rows
    for subject, messages in (
        ("02", "grid of the image to refine"),
        ("03", "above 0"),
        ("04", "names 0 files"),
    ):
        state, message = rows[subject]
        assert (state, messages in message) == ("failed", True), message
        assert f"sub-{subject}" in message
    side = json.loads((output_dir / "sub-01/anat/sub-01_desc-refined_T1w.json").read_text())
    assert "bids:synthsr:sub-01/anat/sub-01_desc-SynthSR_T1w.nii.gz" in side["Sources"]
    assert not list((output_dir / "sub-01" / "anat").glob("*FLAIR*.nii.gz"))


def test_runs_of_one_person_are_fused_and_of_two_refused(head, tmp_path):
    """Also a PDw, a contrast on which the prior was not trained."""
    raw, output_dir = tmp_path / "raw", tmp_path / "out"
    rng = np.random.default_rng(0)
    affine = np.array(head.scan_grid.affine)
    again = (head.scan + rng.normal(0, 10, head.scan.shape)).astype(np.float32)
    turned = affine.copy()
    turned[:3, 3] += (3.0, -2.0, 1.0)  # the participant moved
    # another participant: every structure displaced by about 5 mm
    away = [ndimage.gaussian_filter(rng.normal(size=again.shape), (12, 12, 2)) for _ in range(3)]
    size = np.array([5, 5, 0.5])[:, None, None, None]
    points = np.indices(again.shape) + size * [a / a.std() for a in away]
    other = ndimage.map_coordinates(head.scan, points, order=1).astype(np.float32)
    scans = {
        "sub-01_run-1_T1w": (head.scan, affine),
        "sub-01_run-2_T1w": (again, turned),
        "sub-02_run-1_T1w": (head.scan, affine),
        "sub-02_run-2_T1w": (other, affine),
        "sub-03_PDw": (head.scan.max() - head.scan, affine),
    }
    for stem, (data, at) in scans.items():
        put(raw / stem[:6] / "anat" / f"{stem}.nii.gz", data.astype(np.float32), at, **THICK)
    (raw / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    done = brainprior(raw, output_dir, "participant", "--fuse", "runs", "-m", "T1w", "PDw")
    assert done.returncode == 1
    rows = {subject: row for (subject, _), row in status(output_dir).items()}
    assert rows["01"][0] == rows["03"][0] == "done", rows
    state, message = rows["02"]
    assert state == "failed"
    assert "sub-02_run-2_T1w and sub-02_run-1_T1w do not show the same brain" in message
    assert message in done.stderr
    assert not list((output_dir / "sub-02").rglob("*.nii.gz"))
    side = json.loads((output_dir / "sub-01/anat/sub-01_desc-restored_T1w.json").read_text())
    moved = np.array(side["FusedRuns"][1]["ToReference"])
    np.testing.assert_allclose(moved[:3, 3], (-3, 2, -1), atol=1.0)
    left = nib.load(output_dir / "sub-01/anat/sub-01_run-2_mod-T1w_desc-fused_residual.nii.gz")
    np.testing.assert_allclose(left.affine, turned, atol=1e-4)
    z = np.asarray(left.dataobj)  # on that run's own voxels
    ratio = side["FusedRuns"][1]["ResidualRatios"][0]
    assert np.sqrt(np.square(z[z != 0]).mean()) == pytest.approx(ratio, rel=0.05)
    side = json.loads((output_dir / "sub-03/anat/sub-03_desc-restored_PDw.json").read_text())
    assert side["OutsideTrainingContrasts"] is True
    assert "the prior was not trained on this contrast" in (output_dir / "sub-03.html").read_text()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory, head):
    """A participant with two runs, a lesion mask on each, and another tool's image of the first.

    The participant moved by 3 mm; the lesion is dark in both, the tool's image is healthy tissue.
    """
    root = tmp_path_factory.mktemp("combinations")
    raw, tool = root / "raw", root / "tool"
    affine = np.array(head.scan_grid.affine)
    moved = affine.copy()
    moved[:3, 3] += (3.0, -2.0, 1.0)
    middle = np.array(head.scan_grid.shape) // 2
    hole = np.zeros(head.scan_grid.shape, np.uint8)
    hole[
        middle[0] + 18 : middle[0] + 30, middle[1] : middle[1] + 12, middle[2] : middle[2] + 2
    ] = 1
    rng = np.random.default_rng(0)
    for run, at in ((1, affine), (2, moved)):
        noisy = head.scan + (run - 1) * rng.normal(0, 10, head.scan.shape)
        damaged = np.where(hole > 0, 0.1 * noisy, noisy).astype(np.float32)
        anat = raw / "sub-01" / "anat"
        put(anat / f"sub-01_run-{run}_T1w.nii.gz", damaged, at, **THICK)
        put(anat / f"sub-01_run-{run}_label-lesion_roi.nii.gz", hole, at)
    smooth = ndimage.gaussian_filter(head.truth * head.brain, 1.0).astype(np.float32)
    name = "sub-01/anat/sub-01_run-1_desc-SynthSR_T1w.nii.gz"
    put(tool / name, smooth, np.array(head.grid.affine))
    for folder in (raw, tool):
        description = '{"Name": "x", "BIDSVersion": "1.10.0"}'
        (folder / "dataset_description.json").write_text(description)
    return raw, tool


def check_filled(raw, output_dir, name, image):
    """Outside the mask, the reference's voxels bit for bit; inside, all of them changed."""
    anat, own = output_dir / "sub-01" / "anat", raw / "sub-01" / "anat"
    before = np.asarray(nib.load(own / "sub-01_run-1_T1w.nii.gz").dataobj)
    hole = np.asarray(nib.load(own / "sub-01_run-1_label-lesion_roi.nii.gz").dataobj) > 0
    after = nib.load(anat / f"{name}_desc-{image}_T1w.nii.gz")
    filled = np.asarray(after.dataobj)
    assert filled.shape == before.shape
    np.testing.assert_array_equal(filled[~hole], before[~hole])
    assert (filled[hole] > 2 * before[hole].mean()).mean() > 0.9  # the lesion was dark
    used = np.asarray(nib.load(anat / f"{name}_label-lesion_desc-{image}_mask.nii.gz").dataobj)
    np.testing.assert_array_equal(used > 0, hole)


@pytest.mark.parametrize("task", ["inpaint+refine", "restore+inpaint+refine"])
def test_another_tools_image_informs_what_is_filled_in(two_runs, tmp_path, task):
    raw, tool = two_runs
    done = brainprior(
        raw, tmp_path, "participant", "--run-id", "1", "--task", *task.split("+"),
        "-d", f"tool={tool}", "--trust", "0.05", "--output-spaces", "anat",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    image = TASKS[task]
    anat = tmp_path / "sub-01" / "anat"
    side = json.loads((anat / f"sub-01_run-1_desc-{image}_T1w.json").read_text())
    assert "bids:tool:sub-01/anat/sub-01_run-1_desc-SynthSR_T1w.nii.gz" in side["Sources"]
    assert "bids:raw:sub-01/anat/sub-01_run-1_label-lesion_roi.nii.gz" in side["Sources"]
    lesion = json.loads((anat / f"sub-01_run-1_label-lesion_desc-{image}_mask.json").read_text())
    assert lesion["Sources"][1:] == ["bids:raw:sub-01/anat/sub-01_run-1_label-lesion_roi.nii.gz"]
    if task == "inpaint+refine":
        check_filled(raw, tmp_path, "sub-01_run-1", image)
        assert side["SkullStripped"] is False
    else:
        output = nib.load(anat / f"sub-01_run-1_desc-{image}_T1w.nii.gz")
        np.testing.assert_allclose(output.header.get_zooms(), 1.0, atol=0.02)
    assert f"desc-{image}" in (tmp_path / "sub-01.html").read_text()


@pytest.mark.parametrize(
    "task", ["inpaint", "restore+inpaint", "restore+refine", "restore+inpaint+refine"]
)
def test_runs_are_fused_with_lesions_and_another_tools_image(two_runs, tmp_path, task):
    raw, tool = two_runs
    asked = ["--output-spaces", "anat"]
    asked += ["-d", f"tool={tool}", "--trust", "0.05"] if "refine" in task else []
    if "restore" in task:
        asked += ["--output-grid", "native"]
    done = brainprior(
        raw, tmp_path, "participant", "--fuse", "runs", "--task", *task.split("+"), *asked
    )
    assert done.returncode == 0, done.stderr
    image = TASKS[task]
    anat = tmp_path / "sub-01" / "anat"
    side = json.loads((anat / f"sub-01_desc-{image}_T1w.json").read_text())
    _, other = side["FusedRuns"]
    np.testing.assert_allclose(np.array(other["ToReference"])[:3, 3], (-3, 2, -1), atol=1.0)
    of_run_2 = "bids:raw:sub-01/anat/sub-01_run-2_label-lesion_roi.nii.gz"
    assert (of_run_2 in side["Sources"]) == ("inpaint" in task)
    assert ("Lesion" in other) == ("inpaint" in task)
    residual = np.asarray(
        nib.load(anat / "sub-01_run-2_mod-T1w_desc-fused_residual.nii.gz").dataobj
    )
    if "inpaint" in task:  # hidden voxels are not compared
        hole = raw / "sub-01" / "anat" / "sub-01_run-2_label-lesion_roi.nii.gz"
        assert (residual[np.asarray(nib.load(hole).dataobj) > 0] == 0).all()
    if task == "inpaint":
        check_filled(raw, tmp_path, "sub-01", image)
        return
    output = nib.load(anat / f"sub-01_desc-{image}_T1w.nii.gz")
    np.testing.assert_allclose(output.header.get_zooms(), 1.0, atol=0.02)
    native = nib.load(anat / f"sub-01_res-native_desc-{image}_T1w.nii.gz")
    scan = nib.load(raw / "sub-01/anat/sub-01_run-1_T1w.nii.gz")
    np.testing.assert_allclose(native.affine, scan.affine, atol=1e-4)
    assert native.shape == scan.shape
