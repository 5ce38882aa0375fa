# SPDX-License-Identifier: Apache-2.0
"""Full disks: small file systems in memory, mounted for the command only.

Where no mount is possible (no user namespaces), the tests are skipped. The scan is that of
``test_robust``: a slab of 40 mm through the middle of the demo's head.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys

import nibabel as nib
import pytest

SLAB = (slice(20, 172), slice(14, 210), slice(14, 22))
UNSHARE = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "-r", "--mount"]
SOURCE = "sub-01/anat/sub-01_T1w.nii.gz"


@pytest.fixture(scope="module", autouse=True)
def may_mount(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mount")
    try:
        test = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
        subprocess.run([*UNSHARE, *test], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")


@pytest.fixture(scope="module")
def raw(tmp_path_factory, write_demo):
    root = write_demo(tmp_path_factory.mktemp("full") / "raw")
    scan = root / SOURCE
    image = nib.load(scan).slicer[SLAB]
    nib.save(nib.Nifti1Image(image.get_fdata().astype("int16"), image.affine), scan)
    return root


def command(raw, out, work, *more):
    return [
        sys.executable, "-m", "brainprior_bids", str(raw), str(out), "participant",
        "-w", str(work), "--device", "cpu", "--nprocs", "1", "--omp-nthreads", "1", "--sloppy",
        "--skip-bids-validation", "--no-viewer", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(raw):
    """Output and work folder of a run with enough space."""
    out, work = raw.parent / "whole", raw.parent / "work"
    subprocess.run(command(raw, out, work), check=True, capture_output=True)
    return out, work


def with_little_room(folder, disk, options, line, keep):
    """Run a command on a small disk, then on a larger one; exit codes and what it said.

    ``keep`` is copied to ``first`` and ``second`` after either.
    """
    disk.mkdir()
    script = f"""
    mount -t tmpfs -o {options} tmpfs {disk} || exit 9
    {shlex.join(line)} >first.log 2>&1; echo $? >first.code
    cp -r {keep} first 2>/dev/null
    mount -o remount,size=500M,nr_inodes=100k {disk} || exit 9
    {shlex.join(line)} >second.log 2>&1; echo $? >second.code
    cp -r {keep} second
    """
    subprocess.run([*UNSHARE, "bash", "-c", script], cwd=folder, check=True)
    return [
        (int((folder / f"{name}.code").read_text()), (folder / f"{name}.log").read_text())
        for name in ("first", "second")
    ]


def images(out):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (out / "sub-01" / "anat").glob("*.nii.gz")
    }


def row(out):
    """Status and message of the scan; None without a table or a row."""
    table = out / "logs" / "status.tsv"
    lines = table.read_text().splitlines()[1:] if table.is_file() else []
    return next(((c[2], c[4]) for c in (line.split("\t") for line in lines)), None)


def check_whole_or_absent(out):
    """Every file that remains on a full disk is complete."""
    for path in (path for path in out.rglob("*") if path.is_file()):
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".gz":
            nib.load(path).get_fdata()
        empty_ok = path.name == ".lock" or path.suffix == ".log"
        assert empty_ok or path.stat().st_size > 0, path
        assert not path.name.startswith(".reserve"), path


# 40 KB: not even the description; 700 KB: the status, but no image; 3 MB: some of the images.
@pytest.mark.parametrize("options", ["size=40k", "size=700k", "size=3M", "size=500M,nr_inodes=30"])
def test_a_full_output_folder(tmp_path, raw, whole, options):
    disk = tmp_path / "disk"
    line = command(raw, disk / "out", whole[1])
    first, second = with_little_room(tmp_path, disk, options, line, disk / "out")
    assert first[0] in (1, 2)
    assert "Traceback" not in first[1]
    state = row(tmp_path / "first")
    assert state is None or state[0] == "failed"
    assert "space" in first[1]
    if state is not None:
        assert "no space left on the disk of" in state[1]
        assert str(disk) in state[1]
        assert "Make room" in state[1]
    check_whole_or_absent(tmp_path / "first")
    assert second[0] == 0, second[1]
    assert row(tmp_path / "second")[0] == "done"
    assert images(tmp_path / "second") == images(whole[0])


def test_a_full_work_folder(tmp_path, raw, whole):
    disk, out = tmp_path / "disk", tmp_path / "out"
    line = command(raw, out, disk / "work")
    first, second = with_little_room(tmp_path, disk, "size=1M", line, out)
    assert first[0] == 1
    assert "Traceback" not in first[1]
    state, message = row(tmp_path / "first")
    assert state == "failed"
    assert f"no space left on the disk of --work-dir {disk / 'work'}" in message
    check_whole_or_absent(tmp_path / "first")
    assert second[0] == 0, second[1]
    assert images(tmp_path / "second") == images(whole[0])
