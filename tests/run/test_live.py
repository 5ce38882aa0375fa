# SPDX-License-Identifier: Apache-2.0
"""Status and reports while a run is going, and ``brainprior status``."""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from pathlib import PurePosixPath
from types import SimpleNamespace

import pytest

from brainprior_bids.bids.names import BIDSName
from brainprior_bids.bids.query import Scan
from brainprior_bids.bids.status import read_summary, write_summary
from brainprior_bids.cli.run import main
from brainprior_bids.cli.status import remaining
from brainprior_bids.records import ErrorRecord, ScanRecord
from brainprior_bids.run.live import LiveResults
from brainprior_bids.run.outcome import write_failure, write_running
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
            live._stop.wait(0.01)
    assert states(settings)["sub-01_T2w"] == "done"


def test_status_command(settings, jobs, capsys):
    write_summary(settings.output_dir, done("sub-01_T1w"))
    write_failure(jobs[1].scan, settings, ErrorRecord(type="InputError", message="broken " * 30))
    assert main(["status", str(settings.output_dir)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["sub-01_T1w", "done", "2.0", "min"]
    assert rows[1].startswith("sub-01_T2w  failed")
    assert all(len(row) <= 100 for row in rows[:3])
    assert rows[3] == "1 done, 1 failed, 1 running."
    assert "has 1 scan(s) to do" in rows[4]


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
