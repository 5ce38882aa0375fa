# SPDX-License-Identifier: Apache-2.0
"""A bad file fails only its own scan, also for data that are read before the scan's steps.

No image is restored here: the scans are empty files or a few voxels. The tests look at which scans
are found, with which messages, and which could be started.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bids.layout import BIDSLayoutIndexer
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from brainprior_bids.bids import status
from brainprior_bids.bids.claims import Claims
from brainprior_bids.bids.files import to_json
from brainprior_bids.bids.fuse import fuse_runs
from brainprior_bids.bids.query import (
    check_dataset,
    find_scans,
    subjects_without,
)
from brainprior_bids.bids.validate import Issue
from brainprior_bids.cli.run import main
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.run.jobs import plan_jobs
from brainprior_bids.run.participants import name_absent
from brainprior_bids.run.preflight import with_problems
from brainprior_bids.settings import Settings

GOOD = "sub-09/anat/sub-09_T1w.nii.gz"
"""The neighbour that must not be harmed."""


@pytest.fixture
def raw(tmp_path):
    """A data set with one good scan."""
    root = tmp_path / "raw"
    put(root, GOOD)
    (root / "dataset_description.json").write_text('{"Name": "t", "BIDSVersion": "1.10.0"}')
    return root


@pytest.fixture
def asked(raw, tmp_path):
    return Settings(raw, tmp_path / "out", tmp_path / "work", skip_bids_validation=True)


def put(root, relative, sidecar=None):
    """An image that nobody opens, and its sidecar's bytes."""
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    if sidecar is not None:
        path.with_name(path.name.partition(".")[0] + ".json").write_bytes(sidecar)
    return path


def only_other(scans):
    """The scan next to the good one, which is found and has no problem."""
    by_source = {str(scan.relative): scan for scan in scans}
    assert by_source.pop(GOOD).problem is None
    (other,) = by_source.values()
    return other


BAD_SIDECARS = {
    "no JSON": b"SliceThickness: 5",
    "empty": b"",
    "array": b"[1, 2]",
    "text": b'"x"',
    "null": b"null",
    "cut": b'{"SliceThickness": 5',
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "zeros": bytes(1000),
    "too large": b'{"x": "' + b"a" * (17 * 2**20) + b'"}',
}


@pytest.mark.parametrize("kind", BAD_SIDECARS)
def test_a_sidecar_that_cannot_be_read_fails_its_scan(raw, asked, kind):
    put(raw, "sub-01/anat/sub-01_T1w.nii.gz", BAD_SIDECARS[kind])
    other = only_other(find_scans(asked))
    assert other.problem.startswith("sub-01_T1w: the sidecar ")
    assert "sub-01_T1w.json" in other.problem
    assert "remove it" in other.problem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'\xef\xbb\xbf{"Maker": "M\xc3\xbcller"}', "utf-8 with a byte order mark"),
        ('{"Maker": "Müller"}'.encode("latin-1"), "read as Latin-1"),
        ('{"Maker": "Müller"}'.encode("utf-16"), "utf-16-le with a byte order mark"),
    ],
)
def test_a_sidecar_in_another_encoding_is_read_with_a_warning(raw, asked, content, said):
    put(raw, "sub-01/anat/sub-01_T1w.nii.gz", content)
    other = only_other(find_scans(asked))
    assert other.problem is None
    assert other.metadata == {"Maker": "Müller"}
    assert said in other.warnings[0]


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 400, "9" * 5000])
def test_a_number_beyond_float_is_infinite(raw, asked, number):
    put(raw, "sub-01/anat/sub-01_T1w.nii.gz", f'{{"SliceThickness": {number}, "a": 5}}'.encode())
    other = only_other(find_scans(asked))
    assert other.problem is None
    assert other.metadata == {"SliceThickness": float(number), "a": 5}
    assert json.loads(to_json(other.metadata)) == {"SliceThickness": None, "a": 5}


def test_half_a_surrogate_pair_in_a_sidecar_can_be_written_down(raw, asked):
    put(raw, "sub-01/anat/sub-01_T1w.nii.gz", rb'{"Maker": ["\ud800x"], "\udfff": "\ud83e\udde0"}')
    other = only_other(find_scans(asked))
    assert other.problem is None
    assert other.metadata == {"Maker": ["\ufffdx"], "\ufffd": "\U0001f9e0"}


@pytest.mark.parametrize("kind", ["dangling", "folder", "pipe"])
def test_a_sidecar_that_is_no_file_fails_its_scan(raw, asked, kind):
    side = put(raw, "sub-01/anat/sub-01_T1w.nii.gz").with_name("sub-01_T1w.json")
    if kind == "dangling":
        side.symlink_to("../../.git/annex/objects/xx/yy/key.json")
    elif kind == "folder":
        side.mkdir()
    else:
        os.mkfifo(side)
    problem = only_other(find_scans(asked)).problem
    assert problem.startswith("sub-01_T1w: ")
    assert ("datalad get" in problem) == ("git annex get" in problem) == (kind == "dangling")


def test_a_sidecar_of_several_scans_fails_those_that_it_applies_to(raw, asked):
    put(raw, "sub-01/anat/sub-01_T2w.nii.gz")
    (raw / "T2w.json").write_text("{")
    assert "T2w.json" in only_other(find_scans(asked)).problem


def test_a_filter_by_metadata_reads_past_a_broken_sidecar(raw, asked, tmp_path):
    put(raw, "sub-01/anat/sub-01_T1w.nii.gz", b"{")
    (raw / GOOD.replace("nii.gz", "json")).write_text('{"EchoTime": 0.08, "ImageType": ["M"]}')
    for query in ({"EchoTime": 0.08}, {"EchoTime": [0.1, 0.08]}, {"ImageType": "M"}):
        some = replace(asked, bids_filters={"T1w": query})
        assert only_other(find_scans(some)).problem
    none = replace(asked, bids_filters={"T1w": {"EchoTime": 0.1}})
    assert [str(scan.relative)[:6] for scan in find_scans(none)] == ["sub-01"]
    kept = replace(asked, bids_database_dir=tmp_path / "index")
    for _ in range(2):  # created, then read
        assert only_other(find_scans(kept)).problem


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_sidecar_harms_another_scan(raw, asked, content):
    put(raw, "sub-01/anat/sub-01_T1w.nii.gz", content)
    only_other(find_scans(asked))


BAD_NAMES = {
    "no participant": "sub-01/anat/acq-x_T1w.nii.gz",
    "only a suffix": "sub-01/anat/T1w.nii.gz",
    "capitals": "sub-01/anat/SUB-01_T1w.nii.gz",
    "no label": "sub-01/anat/sub-_T1w.nii.gz",
    "no label at all": "sub-/anat/sub-_T1w.nii.gz",
    "markup": "sub-x<b>/anat/sub-x<b>_T1w.nii.gz",
    "underscore": "sub-a_b/anat/sub-a_b_T1w.nii.gz",
    "a space": "sub-01/anat/sub-01_acq-a b_T1w.nii.gz",
    "a line break": "sub-01/anat/sub-01_acq-a\nb_T1w.nii.gz",
    "an accent": "sub-01/anat/sub-01_acq-é_T1w.nii.gz",
    "an entity twice": "sub-01/anat/sub-01_acq-a_acq-b_T1w.nii.gz",
    "long": f"sub-01/anat/sub-01_acq-{'a' * 226}_T1w.nii.gz",
    "a superscript": "sub-01/anat/sub-01_run-²_T1w.nii.gz",
    "another participant": "sub-01/anat/sub-09_T1w.nii.gz",
    "another spelling": "sub-1/anat/sub-01_T1w.nii.gz",
    "another session": "sub-01/ses-a/anat/sub-01_ses-b_T1w.nii.gz",
    "no session in the name": "sub-01/ses-a/anat/sub-01_T1w.nii.gz",
    "no session in the path": "sub-01/anat/sub-01_ses-a_T1w.nii.gz",
    "not text": "sub-01/anat/sub-01_acq-\udcff_T1w.nii.gz",
    "a folder that is not text": "sub-\udcff/anat/sub-01_T1w.nii.gz",
}


@pytest.mark.parametrize("kind", BAD_NAMES)
def test_a_name_that_cannot_be_used_fails_its_scan_in_its_own_name(raw, asked, kind):
    put(raw, BAD_NAMES[kind])
    other = only_other(find_scans(asked))
    assert other.problem is not None
    assert other.name.derivative() != "sub-09_T1w.nii.gz"  # not in another scan's name
    assert other.name.stem.isprintable()
    assert len(other.name.stem) < 120
    plan_jobs([other], asked, {}, Claims([asked.output_dir / "logs"]))
    (row,) = status.rebuild_status(asked.output_dir).read_text("utf-8").splitlines()[1:]
    source, _, state, _, message = row.split("\t")
    assert state == "failed"
    assert message.startswith(source.rpartition("/")[2].partition(".")[0])
    assert any(word in message for word in ("Rename", "Shorten", "move"))


@given(st.text(st.characters(exclude_characters="/\0", codec="utf-8"), max_size=30))
@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_name_harms_another_scan(raw, asked, text):
    path = raw / "sub-01" / "anat" / f"{text}_T1w.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    try:
        good = [s for s in find_scans(asked) if str(s.relative) == GOOD]
    finally:
        path.unlink()
    assert [scan.problem for scan in good] == [None]


def test_a_name_too_long_for_its_results_is_refused_before_anything_runs(raw, asked):
    run = replace(asked, run_uuid="20260101-000000_" + 36 * "0")
    put(raw, f"sub-01/anat/sub-01_acq-{'a' * 201}_T1w.nii.gz")  # its own name is short enough
    other = only_other(find_scans(run))
    assert other.problem is None
    assert plan_jobs([other], run, {}, Claims([run.output_dir / "logs"])) == []
    row = status.rebuild_status(run.output_dir).read_text().splitlines()[1]
    assert "too long" in row
    assert "Shorten it" in row


def test_scans_whose_results_would_share_names_are_not_both_done(raw, asked):
    put(raw, "sub-01/anat/sub-01_acq-x_run-1_T1w.nii.gz")
    put(raw, "sub-01/anat/sub-01_run-1_acq-x_T1w.nii.gz")
    first, second, _ = find_scans(asked)
    assert first.problem is None
    assert "two files represent this scan" in second.problem
    assert first.name.derivative() != second.name.derivative()


def test_a_file_with_a_bad_name_is_no_run_to_be_fused(raw, asked):
    put(raw, "sub-09/anat/acq-x_T1w.nii.gz")
    scans = fuse_runs(find_scans(asked))
    assert [scan.problem is None for scan in scans] == [False, True]
    assert not any(scan.runs for scan in scans)


def test_a_misplaced_file_does_not_replace_the_results_of_another_participant(raw, asked):
    """The file in sub-02's folder has a name of sub-09; only sub-02 is requested."""
    put(raw, "sub-02/anat/sub-09_T1w.nii.gz")
    (scan,) = find_scans(replace(asked, participant_label=("02",)))
    assert scan.subject == "02"
    assert "is in sub-02/anat, but its name belongs in sub-09/anat" in scan.problem
    assert scan.name.derivative() != "sub-09_T1w.nii.gz"


NO_IMAGES = ["dangling", "folder", "full folder", "link to a folder", "pipe", "device", "loop"]


def no_image(path, kind):
    """Put something that is not an image at a path with an image's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if "folder" in kind:
        folder = path.parents[3] / "elsewhere" if kind.startswith("link") else path
        put(folder, f"sub-01/anat/{path.name}")  # a trap: it must not be treated as a scan
        put(folder, path.name)
        if folder is not path:
            path.symlink_to(folder)
        elif kind == "folder":
            shutil.rmtree(path)
            path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"dangling": "nowhere", "device": "/dev/zero", "loop": path.name}[kind])


@pytest.mark.parametrize("database", [False, True], ids=["", "database"])
@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_file_fails_its_scan_without_being_opened(raw, asked, tmp_path, kind, database):
    if database:
        asked = replace(asked, bids_database_dir=tmp_path / "database")
    no_image(raw / "sub-01/anat/sub-01_T1w.nii.gz", kind)
    other = only_other(find_scans(asked))
    assert str(other.relative) == "sub-01/anat/sub-01_T1w.nii.gz"
    assert other.problem.startswith("sub-01_T1w: ")
    assert plan_jobs([other], asked, {}, Claims([asked.output_dir / "logs"])) == []


@pytest.mark.parametrize("link", [False, True], ids=["folder", "link"])
def test_what_lies_below_an_anat_folder_is_not_entered(raw, asked, tmp_path, monkeypatch, link):
    """A link may lead to a file system of any size, or in a circle."""
    put(tmp_path / "elsewhere", "sub-09_acq-deep_T1w.nii.gz")
    if link:
        (raw / "sub-09/anat/more").symlink_to(tmp_path / "elsewhere")
        (raw / "sub-09/anat/again").symlink_to("..")
    else:
        put(raw, "sub-09/anat/more/sub-09_acq-deep_T1w.nii.gz")
    entered = []
    index = BIDSLayoutIndexer._index_dir

    def noted(self, path, *args, **kwargs):
        entered.append(path.name)
        return index(self, path, *args, **kwargs)

    monkeypatch.setattr(BIDSLayoutIndexer, "_index_dir", noted)
    assert [str(scan.relative) for scan in find_scans(asked)] == [GOOD]
    assert entered == ["raw", "sub-09", "anat"]


@pytest.fixture
def unprivileged(tmp_path_factory):
    """Root would ignore permissions, so the test runs as the user nobody, in a separate folder
    that this user can access."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        os.chmod(name, 0o777)
        patch.setattr(tmp_path_factory, "_basetemp", Path(name))
        superuser = os.geteuid() == 0
        if superuser:
            os.seteuid(65534)
        yield
        if superuser:
            os.seteuid(0)


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111], ids=["closed", "no entry", "no listing"])
@pytest.mark.parametrize("place", ["sub-01", "sub-01/ses-2", "sub-01/ses-2/anat"])
@pytest.mark.parametrize("database", [False, True], ids=["", "database"])
def test_a_folder_that_cannot_be_read_is_named(
    unprivileged, raw, asked, told, mode, place, database
):
    if database:
        asked = replace(asked, bids_database_dir=raw.parent / "database")
    put(raw, "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz")
    put(raw, "sub-01/ses-3/anat/sub-01_ses-3_T1w.nii.gz")
    (raw / place).chmod(mode)
    try:
        scans = find_scans(asked)
        others = [] if place == "sub-01" else ["sub-01/ses-3/anat/sub-01_ses-3_T1w.nii.gz"]
        assert [str(scan.relative) for scan in scans] == [*others, GOOD]
        assert name_absent(scans, asked) == ["01"]
        session = () if place == "sub-01" else ("2",)  # its sessions are unknown
        alone = replace(asked, participant_label=("01",), session_label=session)
        with pytest.raises(UsageError, match=f"{place}: this folder cannot be read"):
            find_scans(alone)
        elsewhere = replace(asked, session_label=("3",))
        assert (name_absent(scans, elsewhere) == []) == (place != "sub-01")
        assert name_absent(scans, asked) == ["01"]
    finally:
        (raw / place).chmod(0o755)
    (row,) = status.rebuild_status(asked.output_dir).read_text("utf-8").splitlines()[1:]
    assert row.split("\t")[0] == "sub-01"
    assert f"{place}: this folder cannot be read (Permission denied)" in row
    assert f"{place}: this folder cannot be read" in told.text
    scans = find_scans(
        replace(asked, bids_database_dir=None)
    )  # readable again: its row is removed
    assert len(scans) == 3
    assert name_absent(scans, asked) == []
    assert "sub-01" not in status.rebuild_status(asked.output_dir).read_text("utf-8")


@pytest.mark.parametrize("text", ["", "[1]", '{"name": "bids", "entities": 5}'])
def test_a_layout_config_in_the_data_set_changes_nothing(raw, asked, text):
    for folder in (raw, raw / "sub-09", raw / "sub-09/anat"):
        (folder / "layout_config.json").write_text(text)
    assert [str(scan.relative) for scan in find_scans(asked)] == [GOOD]


def broken_header(path, kind):
    """A small image whose header makes nibabel raise."""
    image = nib.Nifti1Image(np.ones((8, 8, 8), np.int16), np.eye(4))
    image.set_sform(None, 0)
    image.set_qform(np.eye(4), 1)
    nib.save(image, path)
    data = bytearray(path.read_bytes())
    if kind == "quaternion":  # longer than 1
        data[256:268] = np.array([2.0, 2.0, 2.0], "<f4").tobytes()
    elif kind == "vox_offset":
        data[108:112] = np.float32(np.nan).tobytes()
    elif kind == "offset beyond the file":
        data[108:112] = np.float32(1e30).tobytes()
    elif kind == "extension":  # CIFTI's code, with a content that is not XML
        data[348:352] = b"\1\0\0\0"
        data[352:352] = np.array([32, 32], "<i4").tobytes() + b"<no" + bytes(21)
    elif kind == "dimensions":
        data[40:56] = np.full(8, -1, "<i2").tobytes()
    path.write_bytes(data)


@pytest.mark.parametrize(
    "kind", ["quaternion", "vox_offset", "offset beyond the file", "extension", "dimensions"]
)
def test_a_header_that_nibabel_refuses_is_left_to_its_scan(raw, asked, kind, capsys, monkeypatch):
    from brainprior_bids.workflows.scan import field_of_view_l

    from brainprior_bids.run import plan

    path = put(raw, "sub-01/anat/sub-01_T1w.nii")
    broken_header(path, kind)
    assert field_of_view_l(path) >= 0
    monkeypatch.setattr(plan, "seconds_per_voxel", lambda settings: 1e-6)
    plan.print_plan(find_scans(asked), asked)
    assert f"{GOOD}  restore" in capsys.readouterr().out


def test_what_was_not_foreseen_is_the_scans_failure(raw, asked, monkeypatch):
    from brainprior_bids.run import jobs

    def fail(scan, settings):
        raise ZeroDivisionError("nobody thought of it")

    monkeypatch.setattr(jobs, "find_given", fail)
    assert plan_jobs(find_scans(asked), asked, {}, Claims([asked.output_dir / "logs"])) == []
    row = status.rebuild_status(asked.output_dir).read_text().splitlines()[1]
    assert "nobody thought of it" in row


def test_an_error_of_the_validator_fails_the_scans_that_it_concerns(raw, asked):
    for name in ("sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz"):
        put(raw, name)
    put(raw, "sub-03/anat/sub-03_T1w.nii.gz", b"\xef\xbb\xbf{}")
    issues = [
        Issue("JSON_INVALID", "/sub-01/anat/sub-01_T1w.json", ""),
        Issue("NOT_INCLUDED", "/sub-02/anat/notes.txt", ""),
        Issue("INVALID_JSON_ENCODING", "/sub-03/anat/sub-03_T1w.json", ""),  # was read
        Issue("EMPTY_FILE", f"/{GOOD}", ""),  # its own steps report the reason
    ]
    problems = [scan.problem for scan in with_problems(find_scans(asked), issues, raw)]
    assert "JSON_INVALID" in problems[0]
    assert "notes.txt" in problems[1]
    assert problems[2:] == [None, None]
    with pytest.raises(UsageError, match="that all participants share"):
        with_problems(find_scans(asked), [Issue("JSON_INVALID", "/participants.json", "")], raw)


def test_a_description_with_a_byte_order_mark_is_read(raw):
    path = raw / "dataset_description.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert check_dataset(raw)["Name"] == "t"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="is not a regular file"):
        check_dataset(raw)


def test_participants_without_a_scan_are_named_in_log_and_status(raw, asked, told):
    (raw / "sub-01" / "anat").mkdir(parents=True)
    put(raw, "sub-02/anat/sub-02_FLAIR.nii.gz")
    (raw / "sub-\udcff").mkdir()
    put(raw, "sub-0.1/anat/sub-0.1_T1w.nii.gz")  # not an image for pybids
    some = replace(asked, modalities=("T1w",))
    scans = find_scans(some)
    assert subjects_without(scans, some) == ["0.1", "01", "02", "\udcff"]
    name_absent(scans, some)
    rows = status.rebuild_status(some.output_dir).read_text("utf-8").splitlines()[1:]
    assert [row.split("\t")[::2][:2] for row in rows] == [
        [f"sub-{label}", "no scan"] for label in ("0.1", "01", "02", "\\udcff")
    ]
    assert "sub-02: no scan matches the request" in told.text
    named = replace(some, participant_label=("09", "02"))
    assert subjects_without(find_scans(named), named) == ["02"]
    put(raw, "sub-02/anat/sub-02_T1w.nii.gz")  # it exists now: its row is removed
    name_absent(find_scans(named), named)
    assert "sub-02" not in status.rebuild_status(some.output_dir).read_text("utf-8")


MISNAMED = {
    "SUB-01": "sub-01", "Sub-02": "sub-02", "sub_03": "sub-03", "sub04": "sub-04",
    "subject-05": "sub-05", "sub 06": "sub-06", "sub-09/SES-1": "ses-1",
}  # fmt: skip


@pytest.mark.parametrize("name", MISNAMED)
def test_a_folder_that_is_ignored_because_of_its_name_is_named(raw, asked, told, name):
    put(raw, f"{name}/anat/{name.rpartition('/')[2]}_T1w.nii.gz")
    for other in ("code", "substitutions", "sub-", "Subjects", "derivatives"):  # no message needed
        (raw / other).mkdir()
    (raw / "SUB-07").touch()
    scans = find_scans(asked)
    assert [str(scan.relative) for scan in scans] == [GOOD]
    name_absent(scans, asked)
    rows = status.rebuild_status(asked.output_dir).read_text("utf-8").splitlines()[1:]
    sources = [row.split("\t")[0] for row in rows]
    assert sources == [name, "sub-"]
    assert f"{name}: this folder is ignored" in told.text
    assert f"for example to {MISNAMED[name]}." in rows[0]
    (raw / name).rename(
        raw / name.replace(name.rpartition("/")[2], "x")
    )  # removed: its row is removed
    name_absent(scans, asked)
    assert name not in status.rebuild_status(asked.output_dir).read_text("utf-8")


def test_a_link_that_cannot_be_made_is_a_failure_in_the_status(raw, tmp_path, capsys):
    """The command continues to the end: status, filter file, exit code 1."""
    put(raw, "sub-09/func/sub-09_task-rest_bold.nii.gz")
    view, out = tmp_path / "view", tmp_path / "out"
    put(view, "sub-09/func/sub-09_task-rest_bold.nii.gz")
    words = [str(raw), str(out), "participant", "--export", f"raw={view}"]
    assert main([*words, "--skip-bids-validation", "--device", "cpu"]) == 1
    (row,) = (out / "logs" / "status.tsv").read_text().splitlines()[1:]
    assert "--export raw" in row
    assert "is in the way. Remove it" in row
    assert (view / "code" / "bids_filter.json").is_file()
    assert "Traceback" not in capsys.readouterr().err


def test_a_failure_leaves_the_status_with_its_file(raw, asked):
    """Renamed as the message says, a file is not listed twice."""
    bad = put(raw, "sub-01/anat/acq-x_T1w.nii.gz")
    other = put(raw, "sub-02/anat/sub-02_T1w.nii.gz", b"{")
    plan_jobs(find_scans(asked)[:2], asked, {}, Claims([asked.output_dir / "logs"]))

    def failed():
        rows = status.rebuild_status(asked.output_dir).read_text("utf-8").splitlines()[1:]
        return [row.split("\t")[0] for row in rows]

    both = [str(path.relative_to(raw)) for path in (bad, other)]
    name_absent(find_scans(asked), asked)
    assert failed() == both  # while they exist
    bad.rename(bad.with_name("sub-01_acq-x_T1w.nii.gz"))
    elsewhere = replace(asked, participant_label=("09",))
    name_absent(find_scans(elsewhere), elsewhere)
    assert failed() == both  # sub-01 was not requested: its data may be on another machine
    name_absent(find_scans(asked), asked)
    assert failed() == both[1:]


def test_what_an_earlier_run_left_in_place_stays_in_the_status(raw, asked):
    bad = put(raw, "sub-01/anat/sub-01_T1w.nii.gz", b"{")
    plan_jobs(find_scans(asked)[:1], asked, {}, Claims([asked.output_dir / "logs"]))
    (summary,) = status.read_summaries(asked.output_dir)
    status.write_summary(asked.output_dir, replace(summary, left=("sub-01/anat/x.nii.gz",)))
    bad.unlink()
    name_absent(find_scans(asked), asked)
    assert "sub-01_T1w.nii.gz" in status.rebuild_status(asked.output_dir).read_text("utf-8")


def test_a_participant_alone_without_a_scan_is_in_the_status_too(raw, tmp_path, capsys):
    """As a task of an array job, which has one participant."""
    (raw / "sub-01" / "anat").mkdir(parents=True)
    out = tmp_path / "out"
    code = main([str(raw), str(out), "participant", "--participant-label", "01"])
    assert code == 2
    assert "No scan in" in capsys.readouterr().err
    assert "sub-01\tn/a\tno scan" in (out / "logs" / "status.tsv").read_text()


@pytest.mark.parametrize(
    ("suffix", "advice"), [("PDT2", "Split it"), ("MP2RAGE", "UNIT1"), ("SWI", "T2starw")]
)
def test_files_that_are_no_scan_of_one_contrast_are_not_offered(
    raw, tmp_path, capsys, suffix, advice
):
    assert main([str(raw), str(tmp_path / "o"), "participant", "-m", suffix, "--dry-run"]) == 2
    assert advice in capsys.readouterr().err
