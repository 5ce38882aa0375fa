# SPDX-License-Identifier: Apache-2.0
"""Status and reports while a run is going, and ``brainprior status``."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from types import SimpleNamespace

import pytest

from brainprior_bids.bids.names import BIDSName
from brainprior_bids.bids.query import Scan
from brainprior_bids.bids.status import (
    progress_path,
    read_progress,
    read_summary,
    settle,
    write_summary,
)
from brainprior_bids.cli.run import main
from brainprior_bids.cli.status import remaining
from brainprior_bids.records import ErrorRecord, RunProgressRecord, ScanRecord, ScanStatus, Stage
from brainprior_bids.run import heartbeat
from brainprior_bids.run.heartbeat import Heartbeat
from brainprior_bids.run.live import LiveResults
from brainprior_bids.run.outcome import write_failure, write_running, write_waiting
from brainprior_bids.settings import Settings

RUN = "20260102-030405_0"


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path / "raw", tmp_path / "out", tmp_path / "work", run_uuid=RUN)


@pytest.fixture
def jobs(settings):
    """Three scans of two participants, all running."""
    output = []
    for name in ("sub-01_T1w", "sub-01_T2w", "sub-02_T1w"):
        parsed = BIDSName.parse(f"{name}.nii.gz")
        relative = PurePosixPath(parsed.folder) / "anat" / f"{name}.nii.gz"
        scan = Scan(settings.bids_dir / relative, relative, parsed, {})
        write_running(scan, settings)
        output.append(SimpleNamespace(scan=scan))
    return output


def states(settings):
    path = settings.output_dir / "logs" / "status.tsv"
    if not path.exists():
        return None
    with path.open(newline="") as stream:
        rows = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {row["source"].rpartition("/")[2].partition(".")[0]: row["status"] for row in rows}


def done(name):
    record = {"scan": name, "subject": name[4:6], "source": f"sub-{name[4:6]}/anat/{name}.nii.gz",
              "task": "restore", "status": "done", "seconds": 120.0, "run_uuid": RUN}  # fmt: skip
    return ScanRecord.from_json(record)


def test_status_and_report_change_as_scans_finish(settings, jobs):
    failed: list[str] = []

    def settle(job):
        write_failure(job.scan, settings, ErrorRecord(type="InputError", message="it is broken"))

    live = LiveResults(jobs, settings, failing=lambda: failed, settle=settle)
    live.refresh()
    assert states(settings) is None  # nothing has ended: nothing to write
    write_summary(settings.output_dir, done("sub-01_T1w"))
    live.refresh()
    assert states(settings) == {
        "sub-01_T1w": "done", "sub-01_T2w": "running", "sub-02_T1w": "running"
    }  # fmt: skip
    assert "sub-01_T1w" in (settings.output_dir / "sub-01.html").read_text()
    assert not (settings.output_dir / "sub-02.html").exists()
    failed.append("sub_01_T2w_wf")
    assert jobs[1].scan.name.node_name == "sub_01_T2w"
    live.refresh()
    assert states(settings)["sub-01_T2w"] == "failed"
    assert "it is broken" in (settings.output_dir / "sub-01.html").read_text()
    # the last one is reported at the end of the run, which rebuilds everything
    write_summary(settings.output_dir, done("sub-02_T1w"))
    live.refresh()
    assert states(settings)["sub-02_T1w"] == "running"


def test_a_scan_waits_until_it_begins(settings, jobs):
    begun: set[str] = set()
    for job in jobs:
        write_waiting(job.scan, settings)
    live = LiveResults(jobs, settings, begun=lambda: begun, failing=list, settle=print)
    live.refresh()
    assert states(settings) is None
    write_running(jobs[0].scan, settings)
    begun.add("sub_01_T1w_wf")
    live.refresh()
    expected = {"sub-01_T1w": "running", "sub-01_T2w": "waiting", "sub-02_T1w": "waiting"}
    assert states(settings) == expected
    (settings.output_dir / "logs" / "status.tsv").unlink()
    live.refresh()
    assert states(settings) is None  # nothing new


def test_a_waiting_scan_of_a_job_that_ended_has_failed(settings, jobs):
    with_job = replace(settings, job_id="7_1")
    write_waiting(jobs[0].scan, with_job)
    write_running(jobs[1].scan, with_job)
    assert settle(settings.output_dir, "7") == ["sub-01_T1w", "sub-01_T2w"]


def test_a_waiting_scan_keeps_the_files_of_its_earlier_result(settings, jobs):
    record = replace(done("sub-01_T1w"), outputs=("a.nii.gz",))
    write_summary(settings.output_dir, record)
    for write in (write_waiting, write_running):
        write(jobs[0].scan, settings)
        assert read_summary(settings.output_dir, "sub-01_T1w").outputs == ("a.nii.gz",)


def test_a_status_that_cannot_be_written_does_not_end_the_watch(settings, jobs):
    write_summary(settings.output_dir, done("sub-01_T1w"))
    table = settings.output_dir / "logs" / "status.tsv"
    table.mkdir()  # nothing can be renamed to it
    with LiveResults(jobs, settings, failing=list, settle=print, interval_s=0.01) as live:
        with pytest.raises(OSError, match=r"."):
            live.refresh()
        table.rmdir()
        write_summary(settings.output_dir, done("sub-01_T2w"))
        # a run that hangs here is ended by the test's time limit
        while not table.is_file() or states(settings).get("sub-01_T2w") != "done":
            time.sleep(0.01)
    assert states(settings)["sub-01_T2w"] == "done"


def test_status_command(settings, jobs, capsys):
    write_summary(settings.output_dir, done("sub-01_T1w"))
    write_failure(jobs[1].scan, settings, ErrorRecord(type="InputError", message="broken " * 30))
    assert main(["status", str(settings.output_dir)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["sub-01_T1w", "done", "2.0", "min"]
    assert rows[1].startswith("sub-01_T2w  failed")
    assert rows[1].endswith("broken " * 30)  # a file or a pipe has no width
    assert rows[2].startswith("sub-02_T1w  running             since ")
    assert len(rows[2]) <= 100
    assert rows[3] == "1 done, 1 failed, 1 running."
    assert "has 1 scan(s) to do" in rows[4]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


def test_rows_are_cut_to_the_terminal(settings, jobs, monkeypatch):
    write_failure(jobs[1].scan, settings, ErrorRecord(type="InputError", message="broken " * 30))
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "70")
    assert main(["status", str(settings.output_dir)]) == 0
    rows = sys.stdout.getvalue().splitlines()
    assert max(map(len, rows[:3])) == 70
    assert rows[1].endswith("…")


class HalfDone:
    """The progress of scans whose work is done by half."""

    share = 0.5


def test_a_run_has_a_sign_of_life_until_it_ends(settings):
    with Heartbeat(settings, interval_s=0.01) as beat:
        (record,) = read_progress(settings.output_dir)
        assert (record.run_uuid, record.stage, record.share) == (RUN, Stage.SCANS, None)
        beat.watch(HalfDone())
        # a run that hangs here is ended by the test's time limit
        while read_progress(settings.output_dir)[0].share != 0.5:
            pass
        beat.enter(Stage.END)
        assert read_progress(settings.output_dir)[0].stage is Stage.END
    assert read_progress(settings.output_dir) == []


def test_a_sign_of_life_that_cannot_be_written_does_not_end_the_run(settings):
    settings.output_dir.mkdir()
    (settings.output_dir / "logs").write_text("in the way")
    with Heartbeat(settings) as beat:
        beat.enter(Stage.END)


def test_the_progress_of_killed_runs_is_removed_after_a_while(settings):
    old, recent = (progress_path(settings.output_dir, name) for name in ("old", "recent"))
    old.parent.mkdir(parents=True)
    for path, age in ((old, 2 * heartbeat.FORGOTTEN_S), (recent, 0)):
        path.write_text("{}")
        at = path.stat().st_mtime - age
        os.utime(path, (at, at))
    with Heartbeat(settings):
        assert not old.exists()
        assert recent.exists()


NOW = datetime(2026, 1, 2, 3, 24, 5, tzinfo=UTC)
"""20 minutes after the start of the run."""


def progress(stage=Stage.SCANS, share=None, *, run=RUN, silent_s=5):
    updated = (NOW - timedelta(seconds=silent_s)).isoformat()
    return [RunProgressRecord(run_uuid=run, updated=updated, stage=stage, share=share)]


def test_the_remaining_time_is_known_before_a_scan_has_ended(settings, jobs):
    summaries = [read_summary(settings.output_dir, job.scan.name.stem) for job in jobs]
    text = remaining(summaries, NOW, progress(share=0.25))
    assert "has 3 scan(s) to do: about 60 min left by the steps done so far" in text
    assert "sign of life" not in text
    assert "none has ended yet" in remaining(summaries, NOW, progress(share=0.04))
    # the steps that are done count, not the scans alone
    text = remaining([done("sub-01_T1w"), *summaries[1:]], NOW, progress(share=0.5))
    assert "about 20 min left by the steps" in text


def test_a_run_that_aligns_contrasts_has_not_finished():
    text = remaining([done("sub-01_T1w")], NOW, progress(Stage.END, 1.0))
    assert "has not finished: its scans have ended, contrasts are being aligned" in text


def test_a_silent_run_was_probably_killed(settings, jobs):
    summaries = [read_summary(settings.output_dir, jobs[0].scan.name.stem)]
    text = remaining(summaries, NOW, progress(share=0.5, silent_s=600))
    assert "no sign of life for 10 min: it was probably killed" in text
    # a newer run has ended since: nothing is left to say of it
    newer = replace(done("sub-01_T1w"), run_uuid="20260103-000000_0")
    assert remaining([newer], NOW, progress(Stage.END, silent_s=600)) == ""


def test_a_status_file_of_an_earlier_version_is_read(settings):
    record = {"scan": "sub-01_T1w", "subject": "01", "status": "running", "run_uuid": RUN}
    summary = ScanRecord.from_json(record)
    assert summary.pending
    assert summary.status is ScanStatus.RUNNING
    assert "none has ended yet" in remaining([summary], NOW)


def test_the_remaining_time_is_that_of_the_rate_so_far(settings, jobs):
    now = datetime(2026, 1, 2, 3, 24, 5, tzinfo=UTC)  # 20 minutes after the start
    one, two, three = (read_summary(settings.output_dir, job.scan.name.stem) for job in jobs)
    assert "none has ended yet" in remaining([one, two, three], now)
    assert "about 40 min left at the present rate" in remaining(
        [done("sub-01_T1w"), two, three], now
    )
    assert "about 10 min" in remaining([done("sub-01_T1w"), done("sub-01_T2w"), three], now)
    assert remaining([done("sub-01_T1w")], now) == ""


def test_a_folder_without_a_status_is_refused(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "has no status: expected the output folder" in capsys.readouterr().err
