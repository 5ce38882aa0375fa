# SPDX-License-Identifier: Apache-2.0
"""Which scans are found, and the messages if there is none."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from brainprior_bids.bids.query import check_dataset, find_scans, read_filters
from brainprior_bids.cli.run import main
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.settings import Settings

FILES = [
    "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
    "sub-01/ses-a/anat/sub-01_ses-a_run-1_T2w.nii.gz",
    "sub-01/ses-a/anat/sub-01_ses-a_run-2_T2w.nii.gz",
    "sub-01/ses-b/anat/sub-01_ses-b_acq-thick_FLAIR.nii",
    "sub-01/ses-a/anat/sub-01_ses-a_part-phase_T1w.nii.gz",
    "sub-01/ses-b/func/sub-01_ses-b_task-rest_bold.nii.gz",
    "sub-02/anat/sub-02_T2w.nii.gz",
    "derivatives/other/sub-02/anat/sub-02_T1w.nii.gz",
    "sourcedata/sub-03/anat/sub-03_T1w.nii.gz",
]


@pytest.fixture
def dataset(tmp_path):
    root = tmp_path / "raw"
    for name in FILES:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (root / "dataset_description.json").write_text('{"Name": "t", "BIDSVersion": "1.10.0"}')
    (root / "T2w.json").write_text('{"SliceThickness": 5, "EchoTime": 0.1}')
    (root / "sub-02" / "anat" / "sub-02_T2w.json").write_text('{"EchoTime": 0.09}')
    (root / "sub-01" / "sub-01_T2w.json").write_text('{"EchoTime": 0.08}')
    (root / "sub-01" / "ses-a" / "sub-01_ses-a_T2w.json").write_text('{"FlipAngle": 9}')
    return root


@pytest.fixture
def settings(dataset, tmp_path):
    return Settings(dataset, tmp_path / "out", tmp_path / "work")


def names(scans):
    return [str(scan.relative) for scan in scans]


def test_everything_by_default_but_phase_images_and_other_folders(settings):
    assert names(find_scans(settings)) == sorted(f for f in FILES[:4] + FILES[6:7])


def test_a_phase_image_without_its_magnitude_is_refused(settings, dataset):
    """It is not omitted silently: nothing else reports that this participant has no result."""
    for part in ("phase", "real", "mag"):
        for subject in ("02", "03"):
            anat = dataset / f"sub-{subject}" / "anat"
            anat.mkdir(parents=True, exist_ok=True)
            (anat / f"sub-{subject}_part-{part}_T1w.nii.gz").write_bytes(b"x")
    (anat / "sub-03_part-mag_T1w.nii.gz").rename(anat / "sub-03_acq-other_part-mag_T1w.nii.gz")
    scans = find_scans(replace(settings, modalities=("T1w",), participant_label=("02", "03")))
    good, bad = [s for s in scans if not s.problem], [s for s in scans if s.problem]
    assert [s.name.stem for s in good] == ["sub-02_part-mag_T1w", "sub-03_acq-other_part-mag_T1w"]
    assert [s.name.stem for s in bad] == ["sub-03_part-phase_T1w", "sub-03_part-real_T1w"]
    assert bad[0].problem.startswith("sub-03_part-phase_T1w: expected a magnitude image")
    without = {"T1w": {"part": [None, "mag"]}}  # as the message advises
    asked = replace(settings, modalities=("T1w",), participant_label=("02", "03"))
    assert find_scans(replace(asked, bids_filters=without)) == good


def test_labels_and_runs_narrow_it_down(settings):
    assert names(find_scans(replace(settings, participant_label=("02",)))) == [FILES[6]]
    assert names(find_scans(replace(settings, session_label=("b",)))) == [FILES[3]]
    assert names(find_scans(replace(settings, run_id=("02",)))) == [FILES[2]]
    assert names(find_scans(replace(settings, modalities=("T1w",)))) == [FILES[0]]


def test_metadata_is_inherited_and_the_nearest_wins(settings):
    by_subject = {s.subject: s for s in find_scans(replace(settings, modalities=("T2w",)))}
    assert by_subject["01"].metadata == {"SliceThickness": 5, "EchoTime": 0.08, "FlipAngle": 9}
    assert by_subject["02"].metadata == {"SliceThickness": 5, "EchoTime": 0.09}


def test_metadata_is_what_pybids_finds(settings, dataset):
    """The same scans through pybids' own reading of every sidecar."""
    from bids.layout import BIDSLayout

    (dataset / "run-01_T2w.json").write_text('{"RepetitionTime": 4, "EchoTime": 1}')
    layout = BIDSLayout(dataset, validate=False)
    scans = find_scans(settings)
    assert len(scans) == 5
    for scan in scans:
        assert scan.metadata == layout.get_file(scan.path).get_metadata()
    with_run = next(scan for scan in scans if scan.name.get("run") == "1")
    assert with_run.metadata["RepetitionTime"] == 4


def test_filters_may_name_a_field_of_the_sidecars(settings):
    asked = replace(settings, bids_filters={"T2w": {"FlipAngle": 9}}, modalities=("T2w",))
    assert names(find_scans(asked)) == FILES[1:3]


def test_filters_select_absent_and_present_entities(settings):
    present = replace(settings, bids_filters={"T2w": {"run": "*"}}, modalities=("T2w",))
    assert names(find_scans(present)) == FILES[1:3]
    absent = replace(settings, bids_filters={"T2w": {"run": None}}, modalities=("T2w",))
    assert names(find_scans(absent)) == [FILES[6]]
    either = replace(settings, bids_filters={"T2w": {"run": [1, None]}}, modalities=("T2w",))
    assert names(find_scans(either)) == [FILES[1], FILES[6]]


def test_only_the_requested_subject_is_opened(settings, dataset):
    (dataset / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_T1w.json").write_text("{broken")
    assert names(find_scans(replace(settings, participant_label=("02",)))) == [FILES[6]]
    assert "sub-01_ses-a_T1w.json" in find_scans(settings)[0].problem


def test_derivatives_are_no_raw_scans(settings, dataset):
    """Their results could have the name of another scan's; brainprior's are not raw data."""
    anat = dataset / "sub-02" / "anat"
    (anat / "sub-02_space-MNI305_desc-preproc_T2w.nii.gz").write_bytes(b"x")
    raw, scan = find_scans(replace(settings, participant_label=("02",)))
    assert "a raw scan has no space-, desc- in its name" in scan.problem
    assert raw.problem is None
    description = dataset / "dataset_description.json"
    description.write_text('{"GeneratedBy": [{"Name": "brainprior"}]}')
    with pytest.raises(UsageError, match="written by brainprior"):
        check_dataset(dataset)


def test_when_every_scan_failed_both_levels_end_with_1(dataset, tmp_path, capsys):
    """Not with 2: the command line was valid."""
    anat = dataset / "sub-02" / "anat"
    (anat / "sub-02_T2w.nii.gz").unlink()
    (anat / "sub-02_T2w.nii.gz").symlink_to("gone")
    out = tmp_path / "out"
    command = [str(dataset), str(out), "participant", "group", "--participant-label", "sub-02",
               "02", "--skip-bids-validation", "--device", "cpu"]  # fmt: skip
    assert main(command) == 1
    messages = capsys.readouterr().err
    assert "1 failed" in messages
    assert "group: no scan is done" in messages
    assert "datalad get" in (out / "logs" / "status.tsv").read_text()


def test_nothing_is_written_to_the_data_set(settings, dataset):
    before = sorted(dataset.rglob("*"))
    find_scans(settings)
    assert sorted(dataset.rglob("*")) == before


def test_unknown_labels_print_what_is_there(settings):
    with pytest.raises(UsageError, match=r"participant.*09.*There are 2: 01, 02"):
        find_scans(replace(settings, participant_label=("09",)))
    with pytest.raises(UsageError, match=r"session.*c.*There are 2: a, b"):
        find_scans(replace(settings, session_label=("c",)))


def test_an_empty_query_prints_the_filters(settings):
    asked = replace(settings, participant_label=("02",), modalities=("FLAIR",), run_id=("7",))
    with pytest.raises(UsageError, match=r"(?s)participants: 02.*runs: 7.*modalities: FLAIR"):
        find_scans(asked)


def test_an_unknown_entity_in_a_filter_is_named(settings):
    with pytest.raises(UsageError, match="colour"):
        find_scans(replace(settings, bids_filters={"T1w": {"colour": "red"}}))


def test_a_link_without_content_is_a_failed_scan_not_a_crash(settings, dataset):
    path = dataset / FILES[6]
    path.unlink()
    os.symlink(".git/annex/objects/gone", path)
    (scan,) = find_scans(replace(settings, participant_label=("02",)))
    assert "datalad get" in scan.problem


@pytest.mark.parametrize("middle", ["acq-high-res", "new", "run-1b_acq-é"])
def test_a_name_that_is_not_bids_is_a_failed_scan_and_the_others_go_on(settings, dataset, middle):
    (dataset / "sub-02" / "anat" / f"sub-02_{middle}_T2w.nii.gz").write_bytes(b"x")
    result = find_scans(replace(settings, participant_label=("02",)))
    good, bad = sorted(result, key=lambda scan: scan.problem is not None)
    assert good.problem is None
    problem = bad.problem
    assert f"sub-02_{middle}_T2w" in problem
    assert "Rename the file" in problem


def test_two_files_for_one_scan_are_reported(settings, dataset):
    (dataset / "sub-02" / "anat" / "sub-02_T2w.nii").write_bytes(b"x")
    (scan,) = find_scans(replace(settings, participant_label=("02",)))
    assert "two files" in scan.problem


def test_the_data_set_is_checked_first(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        check_dataset(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a folder"):
        check_dataset(tmp_path / "file")
    with pytest.raises(UsageError, match=r"no dataset_description\.json"):
        check_dataset(tmp_path)
    path = tmp_path / "dataset_description.json"
    for text, messages in (("{", "not valid JSON"), ("[]", "JSON object")):
        path.write_text(text)
        with pytest.raises(UsageError, match=messages):
            check_dataset(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "object of objects"),
        ('{"t1w": 3}', "object of objects"),
        ('{"colour": {}}', "unknown key colour"),
    ],
)
def test_filter_files_are_checked(tmp_path, content, said):
    path = tmp_path / "filter.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=said):
        read_filters(path, ("T1w",))


def test_a_filter_file_is_read(tmp_path):
    path = tmp_path / "filter.json"
    path.write_text(json.dumps({"T1w": {"session": None}}))
    assert read_filters(path, ("T1w", "T2w")) == {"T1w": {"session": None}}
    # one file for several programs: fMRIPrep's keys, and contrasts that were not requested
    path.write_text(json.dumps({"bold": {"task": "rest"}, "flair": {}, "t1w": {"run": 1}}))
    assert read_filters(path, ("T1w", "T2w")) == {"T1w": {"run": 1}}
    with pytest.raises(UsageError, match="cannot be read"):
        read_filters(Path(tmp_path / "no.json"), ("T1w",))


def test_a_database_is_made_once_and_read_afterwards(settings, dataset, tmp_path):
    kept = replace(settings, bids_database_dir=tmp_path / "index")
    everything = names(find_scans(settings))
    one = replace(kept, participant_label=("02",))
    assert names(find_scans(one)) == [FILES[6]]
    output = (tmp_path / "index" / "layout_index.sqlite").stat().st_mtime_ns
    (dataset / "sub-02" / "anat" / "sub-02_T1w.nii.gz").write_bytes(b"x")
    assert names(find_scans(kept)) == everything  # not indexed again
    assert (tmp_path / "index" / "layout_index.sqlite").stat().st_mtime_ns == output
    (dataset / FILES[6]).unlink()
    (scan,) = find_scans(one)
    assert "--bids-database-dir" in scan.problem


def test_a_database_of_another_data_set_is_refused(settings, dataset, tmp_path):
    kept = replace(settings, bids_database_dir=tmp_path / "index")
    find_scans(kept)
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    with pytest.raises(UsageError, match=r"--bids-database-dir"):
        find_scans(replace(kept, bids_dir=other))
