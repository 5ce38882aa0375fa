# SPDX-License-Identifier: Apache-2.0
"""Files are moved into place when complete; the status table is derived from the summaries."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from brainprior_bids.bids.claims import Claims
from brainprior_bids.bids.files import (
    OWNER,
    TEMPORARY,
    publish,
    read_json,
    reserved,
    temporary_folder,
    to_json,
    write_json,
    write_text,
)
from brainprior_bids.bids.provenance import verify_records, write_provenance_table
from brainprior_bids.bids.status import read_summaries, rebuild_status, settle, write_summary
from brainprior_bids.cli.run import main
from brainprior_bids.engine.errors import is_full
from brainprior_bids.records import FULL_DISK, FailureRecord, ScanRecord


def summary(scan: str, **values):
    return ScanRecord.from_json(
        {"scan": scan, "source": f"{scan}.nii.gz", "task": "restore", "status": "done",
         "seconds": 12.34, "message": "", **values}
    )  # fmt: skip


def test_one_row_a_scan_with_messages_on_one_line(tmp_path):
    write_summary(tmp_path, summary("sub-02_T1w"))
    write_summary(
        tmp_path, summary("sub-01_T1w", status="failed", seconds=None, message='a\tb\n"c"')
    )
    with rebuild_status(tmp_path).open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [list(row.values()) for row in rows] == [
        ["sub-01_T1w.nii.gz", "restore", "failed", "n/a", 'a b "c"'],
        ["sub-02_T1w.nii.gz", "restore", "done", "12.3", "n/a"],
    ]


def test_scans_of_a_job_that_has_ended_have_failed(tmp_path):
    for scan, job in (("sub-01_T1w", "7_0"), ("sub-02_T1w", "71_0"), ("sub-03_T1w", None)):
        write_summary(tmp_path, summary(scan, status="running", job=job))
    write_summary(tmp_path, summary("sub-04_T1w", job="7_1"))  # done before its task was killed
    assert settle(tmp_path, "7") == ["sub-01_T1w"]
    states = {s.scan: s.status for s in read_summaries(tmp_path)}
    assert states == {
        "sub-01_T1w": "failed",
        "sub-02_T1w": "running",
        "sub-03_T1w": "running",
        "sub-04_T1w": "done",
    }
    assert "job 7_0 ended before" in read_summaries(tmp_path)[0].message


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{", "not JSON"), ('{"scan": "sub-01_T1w", "seconds": "long"}', "seconds must be a number")],
)
def test_a_damaged_summary_does_not_take_the_others_with_it(tmp_path, told, content, problem):
    write_summary(tmp_path, summary("sub-02_T1w"))
    path = tmp_path / "logs" / "scans" / "sub-01_T1w.json"
    path.write_text(content)
    for _ in range(2):
        assert [s.scan for s in read_summaries(tmp_path)] == ["sub-02_T1w"]
    (warning,) = (record.getMessage() for record in told.records)  # once
    assert str(path) in warning
    assert problem in warning


def _write_many(folder: str, worker: int) -> None:
    for number in range(10):
        write_summary(Path(folder), summary(f"sub-{worker}{number}_T1w"))
        rebuild_status(Path(folder))


def test_a_message_of_any_length_leaves_a_table_that_readers_take(tmp_path):
    write_summary(tmp_path, replace(summary("sub-01_T1w"), message="a\tb " * 100_000))
    with rebuild_status(tmp_path).open(newline="") as stream:
        (row,) = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    assert row["message"].startswith("a b a b")
    assert row["message"].endswith("…")


def test_processes_that_share_a_folder_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_many, args=(str(tmp_path), n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    rebuild_status(tmp_path)
    lines = (tmp_path / "logs" / "status.tsv").read_text().splitlines()
    assert len(lines) == 31
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


HOLD = """
import sys
from pathlib import Path
from brainprior_bids.bids.claims import Claims
with Claims(map(Path, sys.argv[1:])) as claims:
    print(claims.take("sub-01_T1w"), flush=True)
    sys.stdin.read()
"""


def test_a_scan_is_claimed_by_one_process_until_it_ends(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out), str(work)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout.readline() == "True\n"
    for shared in (out, work):  # either folder is enough
        with Claims([tmp_path / "mine", shared]) as claims:
            assert not claims.take("sub-01_T1w")
            assert claims.take("sub-02_T1w")
            assert claims.refused == ["sub-01_T1w"]
    with Claims([tmp_path / "mine"]) as claims:
        assert claims.take("sub-01_T1w")  # the refused process above has no claim
    other.kill()
    other.communicate()
    with Claims([out, work]) as claims:
        assert claims.take("sub-01_T1w")
        claims.give_back("sub-01_T1w")


def test_where_locks_are_unknown_a_warning_says_so(tmp_path, monkeypatch, told):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with Claims([tmp_path]) as claims:
        assert claims.take("sub-01_T1w")
    assert "no other process" in told.text


def test_json_has_no_nan_and_no_numpy():
    value = {"a": np.float32(1.5), "b": np.array([1, 2]), "c": float("nan"), "d": (Path("/x"),)}
    assert json.loads(to_json(value)) == {"a": 1.5, "b": [1, 2], "c": None, "d": ["/x"]}


def test_read_json_wants_an_object(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match="object"):
        read_json(tmp_path / "a.json")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_not_text_comes_back_from_json(tmp_path):
    value = {"source": "sub-\udcff", "long": "x"}
    path = write_json(tmp_path / f"{'a' * 250}.json", value)  # the longest possible name
    assert read_json(path) == value


def test_files_are_published_all_or_none(tmp_path):
    staged = tmp_path / "staged"
    staged.mkdir()
    for name in "abc":
        (staged / name).write_text(name)
    target = tmp_path / "out"
    (target / "c").mkdir(parents=True)  # a folder in the way of the last rename
    files = {staged / name: target / name for name in "abc"}
    with pytest.raises(OSError, match=r"."):
        publish(files)
    assert [p.name for p in target.iterdir()] == ["c"]


def write_files_record(folder, name, files, *, old):
    """A record of files, in the present form or that of earlier versions.

    Parameters
    ----------
    files : address -> SHA-256
        Those of this data set (``bids::``) were written by an activity.
    """
    entries = []
    for address, digest in files.items():
        entry = {"Id": address, "Label": address}
        if address.startswith("bids::") and "#" not in address:
            entry["AtLocation"] = address.removeprefix("bids::")
            entry["GeneratedBy"] = "bids::prov#a-1" if old else ["bids::prov#a-1"]
        algorithm = "spdx:checksumAlgorithm_sha256"
        if old:
            entry["Digest"] = {"sha256": digest}
        else:
            entry["Checksum"] = [{"ChecksumAlgorithm": algorithm, "ChecksumValue": digest}]
        entries.append(entry)
    key, record = ("Entities", "ent") if old else ("Files", "io")
    write_json(folder / "prov" / f"prov-{name}_{record}.json", {key: entries})


@pytest.mark.parametrize(("old", "newer_old"), [(False, False), (True, True), (True, False)])
def test_verify_finds_what_changed_and_what_is_gone(tmp_path, capsys, old, newer_old):
    recorded = {}
    for name in ("kept", "changed", "gone"):
        (tmp_path / name).write_text(name)
        recorded[f"bids::{name}"] = hashlib.sha256(name.encode()).hexdigest()
    raw = tmp_path / "raw data"
    raw.mkdir()
    (raw / "scan").write_text("scan")
    recorded |= {
        f"bids:{where}:scan": hashlib.sha256(b"scan").hexdigest() for where in ("raw", "away")
    }
    recorded["bids::prov#entity-weights-prior-0"] = "0"  # no file
    write_files_record(tmp_path, "1", recorded, old=old)
    links = {"raw": raw.as_uri(), "away": (tmp_path / "gone away").as_uri()}
    write_json(tmp_path / "dataset_description.json", {"DatasetLinks": links})
    assert main(["verify", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "not checked\tbids:away:scan" in out
    assert "3 output(s) and 1 input(s) checked, 0" in out
    (tmp_path / "changed").write_text("other")
    (tmp_path / "gone").unlink()
    (raw / "scan").write_text("another")
    assert main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == ["changed\tchanged", "missing\tgone", "changed\tbids:raw:scan"]
    # a newer record of the same scan is used
    newer = {"bids::changed": hashlib.sha256(b"other").hexdigest()}
    write_files_record(tmp_path, "2", newer, old=newer_old)
    assert verify_records(tmp_path).changes == {"gone": "missing", "bids:raw:scan": "changed"}
    assert main(["verify", str(tmp_path / "prov")]) == 2


def test_a_record_in_the_earlier_form_is_verified(tmp_path):
    """Every field as it was written before the names of the draft changed."""
    digest = hashlib.sha256(b"image").hexdigest()
    text = """
    {"Entities": [
      {"Id": "bids:raw:sub-01/anat/sub-01_T1w.nii.gz", "Label": "sub-01_T1w.nii.gz",
       "AtLocation": "sub-01/anat/sub-01_T1w.nii.gz", "Digest": {"sha256": "DIGEST"}},
      {"Id": "bids::prov#weights-prior-0123456789ab", "Label": "weights: w", "License": null,
       "TrainingData": null, "Digest": {"sha256": "DIGEST"}},
      {"Id": "bids::sub-01_desc-restored_T1w.nii.gz", "Label": "restored",
       "AtLocation": "sub-01_desc-restored_T1w.nii.gz",
       "GeneratedBy": "bids::prov#restore-20260101000000abcsub01T1w",
       "Digest": {"sha256": "DIGEST"}}
    ]}
    """
    record = tmp_path / "prov" / "prov-20260101000000abcsub01T1w_ent.json"
    record.parent.mkdir()
    record.write_text(text.replace("DIGEST", digest))
    image = tmp_path / "sub-01_desc-restored_T1w.nii.gz"
    image.write_bytes(b"image")
    result = verify_records(tmp_path)
    assert (result.changes, result.outputs, result.inputs) == ({}, 1, 0)
    assert result.out_of_reach == ("bids:raw:sub-01/anat/sub-01_T1w.nii.gz",)
    image.write_bytes(b"other")
    assert verify_records(tmp_path).changes == {image.name: "changed"}


def test_the_table_of_records_keeps_its_rows_and_forgets_what_is_gone(tmp_path):
    write_provenance_table(tmp_path)  # there is no record: no table
    assert not (tmp_path / "prov").exists()
    act = tmp_path / "prov" / "prov-1sub01T1w_act.json"
    write_json(act, {"Activities": [{"Label": "restore sub-01_T1w"}]})
    write_files_record(tmp_path, "0sub02T1w", {}, old=True)  # its activities are missing
    write_provenance_table(tmp_path)
    table = tmp_path / "prov" / "provenance.tsv"
    assert table.read_text().splitlines() == [
        "provenance_id\tdescription",
        "prov-0sub02T1w\tn/a",
        "prov-1sub01T1w\trestore sub-01_T1w",
    ]
    write_json(tmp_path / "prov" / "prov-2_soft.json", {"Software": [{"Version": "9.8"}]})
    (tmp_path / "prov" / "prov-0sub02T1w_ent.json").unlink()
    act.write_text("{}")  # not read again
    write_provenance_table(tmp_path)
    assert table.read_text().splitlines()[1:] == [
        "prov-1sub01T1w\trestore sub-01_T1w",
        "prov-2\tsoftware and environment of a run of brainprior 9.8",
    ]


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    """By owner: this run, a running one, a killed one; and files of other programs."""
    logs = tmp_path / "logs"
    logs.mkdir()
    code = HOLD.replace('print(claims.take("sub-01_T1w"), flush=True)', LEAVE)
    living, dying = (
        subprocess.Popen(
            [sys.executable, "-c", code, str(logs)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    )  # fmt: skip
    assert living.stdout.readline() == dying.stdout.readline() == "left\n"
    dying.kill()
    dying.communicate()
    for name in (".mine", ".status.tsv.abcd1234", ".brainprior-staging-unowned.abcd1234"):
        (logs / name).touch()
    with Claims([logs]) as claims:
        with temporary_folder("staging", logs) as own:
            claims.sweep([logs, tmp_path / "absent"])
            left = {path.name for path in logs.iterdir()}
            assert Path(own).name in left
        assert {".mine", ".status.tsv.abcd1234", ".brainprior-staging-unowned.abcd1234"} < left
        owners = {match[1] for name in left if (match := TEMPORARY.fullmatch(name))}
        assert owners == {os.environ[OWNER], f"{living.pid}x{owners_part(left, living.pid)}"}
        assert (
            len(left) == 3 + 2 + 1 + 1
        )  # other programs', a running run's, this run's, the lock file
    # without locks nothing is removed
    living.kill()
    living.communicate()
    with Claims([logs]) as claims:
        monkeypatch.setattr(fcntl, "lockf", refuse_locks)
        claims.sweep([logs])
        assert len([p for p in logs.iterdir() if TEMPORARY.fullmatch(p.name)]) == 2
        monkeypatch.undo()
        claims.sweep([logs])
        assert not [p for p in logs.iterdir() if TEMPORARY.fullmatch(p.name)]


LEAVE = """
    import os
    from brainprior_bids.bids import files
    os.replace = lambda *_: None  # as if killed before
    files.write_text(Path(sys.argv[1]) / "status.tsv", "half")
    folder = files.temporary_folder("staging", Path(sys.argv[1]))
    (Path(folder.name) / "sub-01").mkdir()
    print("left", flush=True)"""


def owners_part(names, pid):
    """The random part of a process's name as an owner."""
    (part,) = {
        match[1].partition("x")[2]
        for name in names
        if (match := TEMPORARY.fullmatch(name)) and match[1].startswith(f"{pid}x")
    }
    return part


def refuse_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_room_is_kept_for_the_last_words(tmp_path):
    with reserved(tmp_path, 5000):
        (content,) = tmp_path.iterdir()
        assert content.stat().st_size == 5000
        assert TEMPORARY.fullmatch(content.name) or "unowned" in content.name
    assert list(tmp_path.iterdir()) == []


def test_on_a_full_disk_a_status_gives_its_room_to_the_next(tmp_path, monkeypatch):
    """The summary has the status ``running``, which is outdated: no summary is better."""
    path = write_summary(tmp_path, summary("sub-01_T1w", status="running"))
    flushed = os.fsync

    def full(handle):
        if path.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        flushed(handle)

    monkeypatch.setattr("os.fsync", full)
    write_summary(tmp_path, summary("sub-01_T1w", status="failed"))
    assert [s.status for s in read_summaries(tmp_path)] == ["failed"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("NodeExecutionError: [Errno 28] No space left on device"), True),
        (ValueError("no room"), False),
        (None, False),
    ],
)
def test_a_full_disk_is_recognised_behind_the_error_that_it_caused(error, full):
    assert is_full(error) is full
    later = FileNotFoundError("result file")
    later.__context__ = error
    assert is_full(later) is full
    record = FailureRecord.of(later)
    assert (record.type == FULL_DISK) is full
