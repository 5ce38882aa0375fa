# SPDX-License-Identifier: Apache-2.0
"""Exports for fMRIPrep: one T1w per subject or session, and a raw view."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bids.layout import BIDSLayout, Query

from brainprior_bids.anatomy.pasteback import FEATHER_MM, paste_back
from brainprior_bids.anatomy.tissues import tissue_labels, tissue_probabilities
from brainprior_bids.bids import export
from brainprior_bids.bids.derivatives import generated_by
from brainprior_bids.bids.query import find_scans
from brainprior_bids.bids.validate import find_validator, validate
from brainprior_bids.cli.parser import parse_settings
from brainprior_bids.cli.run import main
from brainprior_bids.engine.errors import AnatomyError, UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.interfaces.export import Deliver
from brainprior_bids.interfaces.files import save
from brainprior_bids.run.participants import link_raw
from brainprior_bids.settings import EXPORTS, Settings

IMAGES = {
    "sub-01/ses-a/anat/sub-01_ses-a_run-1_T1w": 5.0,
    "sub-01/ses-a/anat/sub-01_ses-a_run-2_T1w": 1.0,
    "sub-01/ses-b/anat/sub-01_ses-b_acq-x_rec-norm_T1w": 2.0,
    "sub-01/ses-b/anat/sub-01_ses-b_T2w": 1.0,
    "sub-02/anat/sub-02_run-1_T1w": 1.0,
    "sub-02/anat/sub-02_run-2_T1w": 1.0,
}
"""Scan -> thickness of its slices in mm."""


@pytest.fixture
def raw(tmp_path):
    root = tmp_path / "raw"
    for name, thickness in IMAGES.items():
        path = root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(
            nib.Nifti1Image(np.ones((8, 8, 4), np.uint8), np.diag([1, 1, thickness, 1])), path
        )
    for folder, name in (("sub-01/ses-a/func", "sub-01_ses-a_task-rest_bold"),
                         ("sub-01/ses-a/fmap", "sub-01_ses-a_dir-AP_epi")):  # fmt: skip
        (root / folder).mkdir()
        series = nib.Nifti1Image(np.ones((4, 4, 4, 3), np.int16), np.eye(4))
        series.header.set_zooms((1, 1, 1, 2))
        series.header.set_xyzt_units("mm", "sec")
        nib.save(series, root / folder / f"{name}.nii.gz")
    (root / "task-rest_bold.json").write_text('{"RepetitionTime": 2.0, "TaskName": "rest"}')
    (root / "sub-01/sub-01_task-rest_bold.json").write_text('{"EchoTime": 0.03}')
    (root / "sub-01/ses-a/sub-01_ses-a_task-rest_bold.json").write_text('{"FlipAngle": 77}')
    (root / "T1w.json").write_text('{"SpacingBetweenSlices": 6.0}')
    (root / "._task-rest_bold.json").write_bytes(b"\x00\xff")  # a file of macOS
    (root / "sub-01/ses-a/fmap/sub-01_ses-a_dir-AP_epi.json").write_text(
        '{"PhaseEncodingDirection": "j", "TotalReadoutTime": 0.05}'
    )
    (root / "dataset_description.json").write_text('{"Name": "t", "BIDSVersion": "1.10.0"}')
    (root / "README").write_text("Made by a test.\n" * 20)
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t40\nsub-09\t50\n")
    return root


def deliver(raw, tmp_path, monkeypatch, *, per="subject", labels=()):
    """Export every scan as a run does, with small images; root of each kind."""
    roots = {kind: str(tmp_path / f"out-{kind}") for kind in EXPORTS}
    settings = Settings(raw, tmp_path / "out", tmp_path / "w", exports=roots, export_per=per,
                        participant_label=labels)  # fmt: skip
    description = json.loads((raw / "dataset_description.json").read_text())
    export.prepare(roots, bids_dir=raw, output_dir=tmp_path / "out", raw=description)
    scans = find_scans(settings)
    chosen = export.choose_t1w(scans, per=per)
    grid = Grid((8, 8, 8), np.eye(4))
    work = tmp_path / "node"
    work.mkdir(exist_ok=True)
    monkeypatch.chdir(work)
    ones = np.ones(grid.shape, np.float32)
    images = {role: save(ones, grid, work / f"{role}.nii.gz")
              for role in ("head", "gm", "wm", "csf")}  # fmt: skip
    images |= {role: save(ones.astype(np.uint8), grid, work / f"{role}.nii.gz")
               for role in ("mask", "dseg")}  # fmt: skip
    (work / "export.json").write_text('{"gain": 1.0, "feather_mm": 3.0}')
    for scan in scans:
        kinds = [k for k in roots if k == "raw" or scan.name.stem in chosen]
        Deliver(
            **images,
            export_json=str(work / "export.json"),
            source_file=str(scan.path),
            relative=str(scan.relative),
            metadata=dict(scan.metadata),
            fingerprint=scan.name.stem,
            exports={kind: roots[kind] for kind in kinds},
            per=per,
            made_from=export.parents(scan.name, settings.image),
        ).run(cwd=str(work))
        assert export.is_delivered({kind: roots[kind] for kind in kinds}, scan, scan.name.stem)
    assert export.link_rest(Path(roots["raw"]), raw, scans)[1] == {}
    export.describe_raw(Path(roots["raw"]), raw)
    return {kind: Path(root) for kind, root in roots.items()}


def spec():
    """The query of sMRIPrep 0.19, by suffix: ``datatype anat`` and no ``space``."""
    image = {"datatype": "anat", "space": Query.NONE, "extension": [".nii.gz", ".nii"]}
    return {
        "preproc": {**image, "desc": "preproc", "suffix": "T1w"},
        "mask": {**image, "desc": "brain", "suffix": "mask"},
        "dseg": {**image, "desc": Query.NONE, "suffix": "dseg"},
        **{t: {**image, "label": t, "suffix": "probseg"} for t in ("GM", "WM", "CSF")},
    }


@pytest.mark.parametrize(
    ("per", "asked"),
    [
        ("subject", [("01", None, "ses-a"), ("02", None, None)]),
        ("session", [("01", "a", "ses-a"), ("01", "b", "ses-b"), ("02", None, None)]),
    ],
)
def test_every_query_matches_one_file(raw, tmp_path, monkeypatch, per, asked):
    from niworkflows.data import load

    root = deliver(raw, tmp_path, monkeypatch, per=per)["fmriprep"]
    layout = BIDSLayout(root, config=load("nipreps.json"), validate=False)
    for subject, session, folder in asked:
        who = {"subject": subject} | ({"session": session} if session else {})
        for query in spec().values():
            (result,) = layout.get(**query, **who)
            assert (folder or "sub-02/anat") in result.path
        assert not layout.get(**who, suffix="xfm")
        assert not layout.get(**who, suffix="T2w")


@pytest.mark.parametrize("per", ["subject", "session"])
def test_smriprep_collects_one_of_each(raw, tmp_path, monkeypatch, per):
    bids = pytest.importorskip("smriprep.utils.bids", reason="smriprep is not installed")
    root = deliver(raw, tmp_path, monkeypatch, per=per)["fmriprep"]
    for subject, session in (("01", "a"), ("01", "b"), ("02", None)):
        if per == "subject":
            session = ["a", "b"] if session else None  # as in fMRIPrep without sessionwise
        result = bids.collect_derivatives(root, subject, ["MNI152NLin2009cAsym", "MNI305"],
                                         session_id=session)  # fmt: skip
        tissues = result.pop("t1w_tpms")
        assert [Path(path).name.split("label-")[1][:3] for path in tissues] == [
            "GM_",
            "WM_",
            "CSF",
        ]
        assert result.pop("transforms") == {}
        assert set(result) == {"t1w_preproc", "t1w_mask", "t1w_dseg"}
        assert all(isinstance(path, str) for path in result.values())


def test_the_thinnest_slices_win_then_the_name(raw, tmp_path):
    scans = find_scans(Settings(raw, tmp_path / "o", tmp_path / "w"))
    assert export.choose_t1w(scans, per="subject") == {
        "sub-01_ses-a_run-2_T1w",
        "sub-02_run-1_T1w",
    }
    assert export.choose_t1w(scans, per="session") == {
        "sub-01_ses-a_run-2_T1w",
        "sub-01_ses-b_acq-x_rec-norm_T1w",
        "sub-02_run-1_T1w",
    }


def test_from_one_a_session_to_one_a_subject_nothing_is_left_over(raw, tmp_path, monkeypatch):
    root = deliver(raw, tmp_path, monkeypatch, per="session")["fmriprep"]
    assert len(list(root.rglob("*desc-preproc_T1w.nii.gz"))) == 3
    deliver(raw, tmp_path, monkeypatch, per="subject")
    assert sorted(path.name for path in root.rglob("*desc-preproc_T1w.nii.gz")) == [
        "sub-01_ses-a_desc-preproc_T1w.nii.gz",
        "sub-02_desc-preproc_T1w.nii.gz",
    ]


def test_a_file_of_another_scan_is_not_taken_for_delivered(raw, tmp_path, monkeypatch):
    roots = deliver(raw, tmp_path, monkeypatch)
    (one,) = find_scans(Settings(raw, tmp_path / "o", tmp_path / "w", participant_label=("02",),
                                 run_id=("1",)))  # fmt: skip
    fmriprep = {"fmriprep": str(roots["fmriprep"])}
    assert export.is_delivered(fmriprep, one, one.name.stem)
    assert not export.is_delivered(fmriprep, one, "another result")
    next(roots["fmriprep"].rglob("sub-02*dseg.nii.gz")).unlink()
    assert not export.is_delivered(fmriprep, one, one.name.stem)


def test_the_raw_view_holds_restored_heads_and_links(raw, tmp_path, monkeypatch):
    from niworkflows.utils.bids import collect_data

    root = deliver(raw, tmp_path, monkeypatch)["raw"]
    filters = json.loads((root / export.FILTER_FILE).read_text())
    assert filters["t1w"]["reconstruction"] == ["brainprior", "brainpriorNorm"]
    assert filters["t2w"] == {"datatype": "anat", "reconstruction": "brainprior"}
    data, layout = collect_data(root, "01", bids_validate=False, bids_filters=filters)
    assert [Path(path).name for path in data["t1w"]] == [
        "sub-01_ses-a_rec-brainprior_run-1_T1w.nii.gz",
        "sub-01_ses-a_rec-brainprior_run-2_T1w.nii.gz",
        "sub-01_ses-b_acq-x_rec-brainpriorNorm_T1w.nii.gz",
    ]
    assert len(data["t2w"]) == 1
    (bold,) = data["bold"]
    assert Path(bold).is_symlink()
    assert Path(bold).resolve().is_relative_to(raw.resolve())
    inherited = {"RepetitionTime": 2.0, "EchoTime": 0.03, "FlipAngle": 77}
    assert inherited.items() <= layout.get_metadata(bold).items()
    assert "SpacingBetweenSlices" not in layout.get_metadata(data["t1w"][0])
    assert [Path(path).name for path in data["fmap"]] == ["sub-01_ses-a_dir-AP_epi.nii.gz"]
    table = (root / "participants.tsv").read_text()
    assert "sub-01\t40" in table
    assert "sub-09" not in table


def test_the_raw_view_has_the_sessions_without_a_head(raw, tmp_path):
    """Functional images of a session without a T1w, unless sessions were requested."""
    for session in "cd":
        bold = raw / f"sub-01/ses-{session}/func/sub-01_ses-{session}_task-rest_bold.nii.gz"
        bold.parent.mkdir(parents=True)
        bold.touch()
    scans = find_scans(Settings(raw, tmp_path / "o", tmp_path / "w"))
    for asked, result in (((), ["a", "c", "d"]), (("a", "c"), ["a", "c"])):
        root = tmp_path / "-".join(("view", *asked))
        export.link_rest(root, raw, scans, sessions=asked)
        linked = sorted(path.name for path in root.rglob("*_bold.nii.gz"))
        assert linked == [f"sub-01_ses-{session}_task-rest_bold.nii.gz" for session in result]


@pytest.mark.parametrize("kind", ["file", "folder", "file as a folder", "no permission"])
def test_something_in_the_way_of_a_link_fails_one_participant(raw, tmp_path, kind):
    """Earlier, the export ended for all participants, without a status."""
    places = [
        "sub-01/ses-a/func/sub-01_ses-a_task-rest_bold.nii.gz",
        "sub-02/func/sub-02_task-rest_bold.nii.gz",
    ]
    for place in places:
        (raw / place).parent.mkdir(parents=True, exist_ok=True)
        (raw / place).touch()
    root = tmp_path / "view"
    way = root / places[0]
    way = way.parent if kind == "file as a folder" else way
    way.parent.mkdir(parents=True)
    if kind == "no permission":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        way.parent.chmod(0o500)
    elif kind == "folder":
        way.mkdir()
    else:
        way.write_text("mine")
    settings = Settings(raw, tmp_path / "out", tmp_path / "w", exports={"raw": str(root)},
                        skip_bids_validation=True)  # fmt: skip
    scans, linked = link_raw(find_scans(settings), settings)
    assert linked
    problems = {scan.name.stem: scan.problem for scan in scans}
    assert {stem[:6] for stem, problem in problems.items() if problem} == {"sub-01"}
    for stem, problem in problems.items():
        if problem:
            assert problem.startswith(f"{stem}: --export raw: ")
            assert str(way) in problem
            assert "Remove" in problem
    assert (root / places[1]).is_symlink()


def test_something_in_the_way_of_what_all_share_is_told(raw, tmp_path, told):
    (raw / "task-rest_bold.json").write_text("{}")
    way = tmp_path / "view" / "task-rest_bold.json"
    way.parent.mkdir()
    way.write_text("mine")
    settings = Settings(raw, tmp_path / "out", tmp_path / "w", exports={"raw": str(way.parent)})
    scans, linked = link_raw(find_scans(settings), settings)
    assert not linked
    assert [scan.problem for scan in scans] == [None] * len(scans)
    assert f"{way} is in the way. Remove it" in told.text


def test_smripreps_own_workflow_has_nothing_left_to_do(raw, tmp_path, monkeypatch):
    pytest.importorskip("smriprep.utils.bids", reason="smriprep is not installed")
    root = deliver(raw, tmp_path, monkeypatch, labels=("02",))["fmriprep"]
    script = Path(__file__).with_name("smriprep_steps.py")
    command = [sys.executable, script, raw, root, tmp_path / "smriprep"]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    alone, after_us = map(set, json.loads(ran.stdout.splitlines()[-1]))
    work = {"anat_template_wf", "fast"}  # averaging, the tissues
    assert work <= alone
    assert not after_us & work


def test_an_export_says_where_it_comes_from_and_can_be_verified(
    raw, tmp_path, monkeypatch, capsys
):
    of_raw = {"ChecksumAlgorithm": "spdx:checksumAlgorithm_sha256", "ChecksumValue": "0"}
    origin = json.dumps({"GeneratedBy": ["bids::prov#conversion-0"], "Checksum": [of_raw]})
    (raw / "sub-02/func").mkdir()
    (raw / "sub-02/func/sub-02_task-rest_bold.json").write_text(origin)  # linked, not checked
    (raw / "sub-02/anat/sub-02_run-1_T1w.json").write_text(origin)
    for kind, root in deliver(raw, tmp_path, monkeypatch, labels=("02",)).items():
        assert main(["verify", str(root)]) == 0
        checked = {"fmriprep": 6, "raw": 2}[kind]
        assert (
            f"{checked} output(s) and 0 input(s) checked, 0 changed or missing"
            in capsys.readouterr().out
        )
        side = next(root.rglob("anat/*.json"))
        content = json.loads(side.read_text())
        (entry,) = content.pop("Checksum")
        side.write_text(json.dumps(content | {"SHA256": entry["ChecksumValue"]}))
        assert main(["verify", str(root)]) == 0  # as written by earlier versions
        assert f"{checked} output(s)" in capsys.readouterr().out
        image, *others = sorted(root.rglob("anat/*.nii.gz"))
        image.write_bytes(image.read_bytes() + b"x")
        others[0].unlink()
        assert main(["verify", str(root)]) == 1
        assert capsys.readouterr().out.splitlines()[:2] == [
            f"changed\t{image.relative_to(root)}",
            f"missing\t{others[0].relative_to(root)}",
        ]
    scan = "sub-02/anat/sub-02_run-1"
    anat = tmp_path / "out-raw/sub-02/anat"
    assert "GeneratedBy" not in json.loads(
        (anat / "sub-02_rec-brainprior_run-1_T1w.json").read_text()
    )
    anat = tmp_path / "out-fmriprep/sub-02/anat"
    for side in anat.glob("*.json"):
        content = json.loads(side.read_text())
        assert content["Description"], side.name
        assert content["SpatialReference"] == f"bids:raw:{scan}_T1w.nii.gz", side.name
    description = json.loads((tmp_path / "out-fmriprep/dataset_description.json").read_text())
    assert description["DatasetLinks"]["brainprior"] == (tmp_path / "out").as_uri()
    assert description["GeneratedBy"] == [generated_by()]
    sources = json.loads((anat / "sub-02_desc-preproc_T1w.json").read_text())["Sources"]
    assert sources == [
        f"bids:raw:{scan}_T1w.nii.gz",
        f"bids:brainprior:{scan}_desc-restored_T1w.nii.gz",
        f"bids:brainprior:{scan}_desc-brain_mask.nii.gz",
    ]
    sources = json.loads((anat / "sub-02_dseg.json").read_text())["Sources"]
    assert sources[-1] == f"bids:brainprior:{scan}_desc-structures_dseg.nii.gz"


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno is not installed")
def test_the_validator_finds_no_error(raw, tmp_path, monkeypatch):
    for root in deliver(raw, tmp_path, monkeypatch, labels=("01",)).values():
        assert validate(root, command=find_validator()) == []


def test_exports_lie_apart(tmp_path):
    (tmp_path / "raw").mkdir()
    base = [str(tmp_path / "raw"), str(tmp_path / "out"), "participant", "--device", "cpu"]
    exports = parse_settings([*base, "--export", "fmriprep", f"raw={tmp_path}/view"]).exports
    assert exports == {"fmriprep": f"{tmp_path}/out-fmriprep", "raw": f"{tmp_path}/view"}
    for place in ("out", "out/export", "raw", "raw/export", "."):
        with pytest.raises(UsageError, match="overlap"):
            parse_settings([*base, "--export", f"fmriprep={tmp_path / place}"])
    with pytest.raises(UsageError, match="overlap"):
        parse_settings([*base, "--export", f"raw={tmp_path}/x", f"fmriprep={tmp_path}/x"])
    with pytest.raises(UsageError, match="expected fmriprep or raw"):
        parse_settings([*base, "--export", "spm"])
    with pytest.raises(UsageError, match="container"):
        parse_settings([base[0], "/out", *base[2:], "--export", "fmriprep"])


def test_exports_come_back_from_a_config_file(tmp_path):
    (tmp_path / "raw").mkdir()
    tail = ["participant", "--device", "cpu"]
    first = parse_settings(
        [str(tmp_path / "raw"), str(tmp_path / "a"), *tail, "--export", "fmriprep",
         f"raw={tmp_path}/view", "--export-per", "session"]
    )  # fmt: skip
    (tmp_path / "c.toml").write_text(first.to_toml())
    again = parse_settings(
        [str(tmp_path / "raw"), str(tmp_path / "b"), *tail, "--config-file", f"{tmp_path}/c.toml"]
    )
    assert again.exports == {"fmriprep": f"{tmp_path}/b-fmriprep", "raw": f"{tmp_path}/view"}
    assert again.export_per == "session"


SCAN_GRID = Grid((40, 40, 10), np.diag([1.0, 1.0, 4.0, 1.0]))
FINE = SCAN_GRID.one_millimetre()


def ball(grid, radius_mm):
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1)
    mm = nib.affines.apply_affine(grid.affine, index)
    return np.linalg.norm(mm - [19.5, 19.5, 18.0], axis=-1) < radius_mm


def test_a_head_is_scan_outside_and_restored_brain_inside():
    mask, mask_scan = ball(FINE, 14), ball(SCAN_GRID, 14).astype(np.float32)
    x = np.linspace(-0.3, 0.3, 40)[:, None, None]
    log_bias = np.broadcast_to(x, SCAN_GRID.shape).astype(np.float32)
    content = np.clip(log_bias, log_bias[mask_scan > 0.5].min(), log_bias[mask_scan > 0.5].max())
    scan = 50 * np.exp(content)  # a uniform head, half as bright as the restored brain
    restored = np.where(mask, 100.0, 0.0).astype(np.float32)
    restored[20, 20, 18] = 130.0
    done = paste_back(scan, restored, scan_grid=SCAN_GRID, grid=FINE, mask=mask,
                      mask_scan=mask_scan, log_bias=log_bias)  # fmt: skip
    assert done.gain == pytest.approx(2, rel=1e-3)
    assert "multiplied by 2.00" in done.warnings[0]
    assert done.head[20, 20, 18] == pytest.approx(130)
    rest = np.delete(done.head.ravel(), np.ravel_multi_index((20, 20, 18), FINE.shape))
    # no seam, and the head extends to the edge of the field of view
    np.testing.assert_allclose(rest, 100, rtol=2e-3)


def test_slice_gains_are_divided_out_slice_by_slice_beyond_the_brain_too():
    """Outside the brain the field is limited to its range inside; the gain of a slice is not."""
    mask, mask_scan = ball(FINE, 14), ball(SCAN_GRID, 14).astype(np.float32)
    gains = np.where(np.arange(SCAN_GRID.shape[2]) % 2, 0.05, -0.05)[None, None, :]
    log_bias = np.broadcast_to(gains, SCAN_GRID.shape) - 0.01  # of another mean
    scan, restored = 100 * np.exp(log_bias), np.where(mask, 100.0, 0)
    done = paste_back(scan, restored, scan_grid=SCAN_GRID, grid=FINE, mask=mask,
                      mask_scan=mask_scan, log_bias=log_bias, log_gains=gains)  # fmt: skip
    np.testing.assert_allclose(done.head, 100, rtol=2e-3)


def test_blending_stays_inside_the_mask():
    mask, mask_scan = ball(FINE, 14), ball(SCAN_GRID, 14).astype(np.float32)
    rng = np.random.default_rng(0)
    scan = rng.uniform(50, 150, SCAN_GRID.shape)
    flat = np.zeros(SCAN_GRID.shape, np.float32)

    def head(value):
        restored = np.where(mask, 100.0, 0.0)
        restored[~ball(FINE, 14 - FEATHER_MM + 1) & mask] = value
        return paste_back(scan, restored, scan_grid=SCAN_GRID, grid=FINE, mask=mask,
                          mask_scan=mask_scan, log_bias=flat).head  # fmt: skip

    one, other = head(100.0), head(101.0)
    np.testing.assert_array_equal(one[~mask], other[~mask])
    assert (one != other)[mask].any()


def test_an_empty_brain_is_refused():
    zero = np.zeros(SCAN_GRID.shape, np.float32)
    given = {"scan_grid": SCAN_GRID, "grid": FINE, "log_bias": zero}
    empty = np.zeros(FINE.shape)
    with pytest.raises(AnatomyError, match="mask is empty"):
        paste_back(zero, empty, mask=empty, mask_scan=zero, **given)
    with pytest.raises(AnatomyError, match="positive values"):
        paste_back(zero, empty, mask=ball(FINE, 14), mask_scan=ball(SCAN_GRID, 14), **given)


def test_tissues_follow_labels_and_at_borders_the_intensity():
    rng = np.random.default_rng(0)
    truth = np.where(ball(FINE, 8), 2, np.where(ball(FINE, 12), 3, 24))
    mask = ball(FINE, 16)
    means = {2: 110.0, 3: 80.0, 24: 30.0}
    image = np.select([truth == v for v in means], list(means.values())) + rng.normal(
        0, 4, FINE.shape
    )
    labels = np.where(mask, truth, 0)
    labels[8:20] = np.roll(labels, 1, axis=1)[8:20]  # a parcellation shifted by one voxel
    labels[~mask] = 0
    result = tissue_probabilities(image, labels, mask, spacing_mm=FINE.spacing_mm)
    np.testing.assert_allclose(sum(result.values())[mask], 1, rtol=1e-5)
    assert not any(volume[~mask].any() for volume in result.values())
    right = np.select([truth == 3, truth == 2, truth == 24], [1, 2, 3])
    output = tissue_labels(result, mask)
    before = np.select([labels == 3, labels == 2, labels == 24], [1, 2, 3])
    errors, errors_before = ((output != right)[mask].mean(), (before != right)[mask].mean())
    assert errors < 0.4 * errors_before
    with pytest.raises(AnatomyError, match="CSF"):
        tissue_probabilities(image, np.where(labels == 24, 3, labels), mask, spacing_mm=[1, 1, 1])
