# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, that share an output folder, and that are repeated.

The scan is a slab of 40 mm through the middle of the demo's head: a run takes seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import nibabel as nib
import psutil
import pytest

from brainprior_bids.cli.run import main

SLAB = (slice(20, 172), slice(14, 210), slice(14, 22))


@pytest.fixture(scope="module")
def raw(tmp_path_factory, write_demo):
    """Two participants with the same slab."""
    root = write_demo(tmp_path_factory.mktemp("robust") / "raw")
    scan = root / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    image = nib.load(scan).slicer[SLAB]
    nib.save(nib.Nifti1Image(image.get_fdata().astype("int16"), image.affine), scan)
    other = root / "sub-02" / "anat"
    other.mkdir(parents=True)
    for path in scan.parent.iterdir():
        shutil.copy(path, other / path.name.replace("sub-01", "sub-02"))
    (root / "participants.tsv").unlink()
    (root / "participants.json").unlink(missing_ok=True)
    return root


def start(raw, out, *extra, new_session=False):
    """The command in a separate process; its lines on standard error."""
    command = [sys.executable, "-m", "brainprior_bids", str(raw), str(out), "participant",
               "--device", "cpu", "--nprocs", "1", "--omp-nthreads", "1", "--sloppy",
               "--skip-bids-validation", "--no-viewer", *extra]  # fmt: skip
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=new_session,
    )  # fmt: skip


def images(out, subject="01"):
    """Name -> SHA-256 of everything in a participant's ``anat``."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((out / f"sub-{subject}" / "anat").iterdir())
    }


def statuses(out):
    rows = (out / "logs" / "status.tsv").read_text().splitlines()[1:]
    return {row.split("\t")[0][:6]: row.split("\t")[2] for row in rows}


def leftovers(out):
    """Hidden files and folders that do not belong to the data set."""
    own = {".brainprior_work", ".bidsignore", ".lock"}
    work = out / ".brainprior_work"
    hidden = (p for p in out.rglob(".*") if not p.is_relative_to(work))
    return [p for p in hidden if p.name not in own]


@pytest.fixture(scope="module")
def killed(raw, tmp_path_factory):
    """A run that was killed while sampling, after a second run on the same folder was refused.

    Returns its folder, its processes, and the messages of the second run.
    """
    out = tmp_path_factory.mktemp("killed") / "out"
    process = start(raw, out, "--participant-label", "01")
    for line in process.stderr:
        if "restore sample" in line:
            break
    else:
        pytest.fail("the run ended before it could be killed")
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:  # it keeps its claim, and does not end meanwhile
        member.suspend()
    second = start(raw, out, "--participant-label", "01")
    messages = second.communicate()[1]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for member in family[1:]:  # each notices at once that the run has ended
        member.resume()
    process.stderr.close()
    return out, family, (second.returncode, messages)


def test_a_second_process_leaves_a_scan_to_the_one_that_is_at_work(killed):
    code, messages = killed[2]
    assert code == 1
    assert "another process is working on it" in messages
    assert "0 failed, 1 left to another process" in messages
    assert "Traceback" not in messages


def test_a_killed_run_leaves_no_process_and_no_derivative(killed):
    out, family, _ = killed
    assert len(family) > 1
    # returns when all have ended: each checks every 2 s (WATCH_S). The limit only ends a failure.
    _, alive = psutil.wait_procs(family, timeout=600)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    assert not (out / "sub-01" / "anat").exists()
    summary = json.loads((out / "logs" / "scans" / "sub-01_T1w.json").read_text())
    assert summary["status"] == "running"
    assert "or was killed" in summary["message"]


@pytest.fixture(scope="module")
def resumed(killed, raw):
    out = killed[0]
    process = start(raw, out, "--participant-label", "01")
    messages = process.communicate()[1]
    return out, process.returncode, messages


def test_the_same_command_goes_on_where_it_was_killed(resumed):
    out, code, messages = resumed
    assert code == 0, messages
    assert "parcellate …" not in messages  # from the work folder
    assert "restore …" in messages
    assert statuses(out) == {"sub-01": "done"}
    assert leftovers(out) == []
    assert main(["verify", str(out)]) == 0


@pytest.fixture(scope="module")
def shared(raw, tmp_path_factory):
    """Two simultaneous processes on one output folder, one participant each."""
    out = tmp_path_factory.mktemp("shared") / "out"
    both = [start(raw, out, "--participant-label", who) for who in ("01", "02")]
    messages = [process.communicate()[1] for process in both]
    return out, [process.returncode for process in both], messages


def test_two_processes_share_an_output_folder(shared, capsys):
    out, codes, messages = shared
    assert codes == [0, 0], messages
    assert statuses(out) == {"sub-01": "done", "sub-02": "done"}
    assert leftovers(out) == []
    for subject in ("01", "02"):
        assert (out / f"sub-{subject}.html").is_file()
    assert "2 T1w scans" in (out / "logs" / "CITATION.md").read_text()
    assert main(["verify", str(out)]) == 0
    assert "2 input(s) checked, 0 changed or missing" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_bytes(resumed, shared):
    """A run in two parts, and two simultaneous runs: every image and sidecar is the same."""
    assert images(resumed[0]) == images(shared[0])
    # a participant's name is part of the seed
    one, other = (images(shared[0], who) for who in ("01", "02"))
    key = "{}_desc-restored_T1w.nii.gz".format
    assert one[key("sub-01")] != other[key("sub-02")]
    key = "{}_desc-brain_mask.nii.gz".format
    assert one[key("sub-01")] == other[key("sub-02")]


def summary_of(out):
    """A scan's summary without the fields that may differ (docs/outputs.md, "Status")."""
    summary = json.loads((out / "logs" / "scans" / "sub-01_T1w.json").read_text())
    run = "".join(sign for sign in summary.pop("run_uuid") if sign.isalnum())
    for key in ("status", "message", "seconds"):
        summary.pop(key)
    for node in summary["nodes"]:
        for key in ("started", "seconds", "cpu_seconds", "peak_memory_gb", "added_memory_gb",
                    "gpu_memory_gb"):  # fmt: skip
            node.pop(key)
    summary["facts"]["restore"].pop("seconds")
    summary["outputs"] = sorted(path.replace(run, "RUN") for path in summary["outputs"])
    return summary


@pytest.mark.parametrize("seed", [1, 2])
def test_after_random_kills_the_result_is_that_of_an_undisturbed_run(raw, shared, tmp_path, seed):
    """Killed three times, each time when it has written a random number of lines."""
    rng = random.Random(seed)
    out = tmp_path / "out"
    for _ in range(3):
        process = start(raw, out, "--participant-label", "01")
        for _ in range(rng.randint(1, 22)):
            if not process.stderr.readline():
                break
        children = psutil.Process(process.pid).children(recursive=True)
        # the run, all of it, or the first that it started: the tracker of semaphores
        victims = rng.choice([[process], [*children, process], children[:1] or [process]])
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]))
        messages = process.communicate()[1]
        assert "Traceback" not in messages
        psutil.wait_procs(children, timeout=600)  # the limit only ends a failure
    process = start(raw, out, "--participant-label", "01")
    assert process.communicate()[1]
    assert process.returncode == 0
    assert images(out) == images(shared[0])
    assert summary_of(out) == summary_of(shared[0])
    assert leftovers(out) == []
    assert main(["verify", str(out)]) == 0


def test_ctrl_c_twice_ends_the_run_without_a_traceback(raw, tmp_path):
    """A terminal sends it to every process; nothing is left, and the scan has a status."""
    out = tmp_path / "out"
    process = start(raw, out, "--participant-label", "01", new_session=True)
    for line in process.stderr:
        if "n4 …" in line:
            break
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
    messages = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in messages
    assert "interrupted; rerun the same command" in messages
    assert statuses(out) == {"sub-01": "failed"}
    assert "interrupted" in (out / "logs" / "status.tsv").read_text()
    assert leftovers(out) == []
