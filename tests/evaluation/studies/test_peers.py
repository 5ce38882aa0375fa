# SPDX-License-Identifier: Apache-2.0
"""Other programs on the same scans: small real programs that interpolate, crash or do nothing."""

import dataclasses
import json
import re
import shlex
import sys
import time

import nibabel as nib
import numpy as np
import psutil
import pytest
from participants import toy_participant, write_prepared

from brainprior_bids.cli import evaluate as command
from brainprior_bids.cli.run import main
from brainprior_bids.engine.errors import BrainpriorError, UsageError
from brainprior_bids.evaluation.peers import NOTE, Peer, parse_peers, read_peer_image, run_peer
from brainprior_bids.evaluation.stamp import read_stamp, shown_command
from brainprior_bids.evaluation.studies import STUDIES, peers
from brainprior_bids.evaluation.studies.base import Bench, Source

CUBIC = """
import sys
import nibabel as nib
import numpy as np
from scipy import ndimage

image = nib.load(sys.argv[1])
assert image.header.get_zooms() == (1, 1, 5)
assert image.get_fdata().min() >= 0
n = image.shape
index = np.diag([-1, 1, 1 / float(sys.argv[3]), 1])  # fine -> thick, left and right swapped
index[:3, 3] = n[0] - 1, 0, -0.4
fine = ndimage.affine_transform(
    image.get_fdata(), index, output_shape=(n[0], n[1], 5 * n[2]), order=3, mode="nearest"
)
nib.save(nib.Nifti1Image(fine, image.affine @ index), sys.argv[2] + "/deep/fine.nii.gz")
"""
FOLDER_FIRST = "import pathlib, sys\npathlib.Path(sys.argv[2], 'deep').mkdir()\n"
CRASH = "import sys\nprint('begins')\nsys.exit('no weights for this contrast')\n"
SILENT = "print('there is nothing to do')\n"


@pytest.fixture
def template(tmp_path):
    """Text of a program -> template of its command."""

    def write(text, words="{scan} {folder} {thickness}"):
        path = tmp_path / "my programs" / f"program{abs(hash(text))}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return f"{shlex.join([sys.executable, str(path)])} {words}"

    return write


def part_of_toy(name, seed):
    """24 mm of the toy, all of it brain."""
    toy, part = toy_participant(name, seed=seed), np.s_[16:40, 18:42, 14:38]
    return dataclasses.replace(
        toy, data=toy.data[part], inside=toy.inside[part], structures=toy.structures[part]
    )


@pytest.fixture
def ready(tmp_path):
    """The words of a command whose participants are already prepared."""
    data, out = tmp_path / "data", tmp_path / "my out"
    data.mkdir()
    for seed, name in enumerate(("01", "02")):
        write_prepared(data, out, part_of_toy(name, seed))
    words = ["evaluate", str(data), str(out), "--study", "peers", "--nprocs", "1"]
    return out, [*words, "--n-samples", "1", "--n-steps", "3"]


def rows_of(text):
    """First cell -> the others, of every line of a table."""
    study = text.partition("### Time")[0]
    lines = [line.strip("|").split("|") for line in study.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_programs_are_compared_and_a_failure_concerns_one_alone(
    ready, template, tmp_path, capsys, caplog
):
    out, words = ready
    docs = ["--tables", str(tmp_path / "docs")]
    good = ["--peer", f"good={template(FOLDER_FIRST + CUBIC)}"]
    bad = ["--peer", f"crash={template(CRASH)}", "--peer", f"silent={template(SILENT)}"]
    assert main([*words, *good, *bad, *docs]) == 1
    rows = rows_of(capsys.readouterr().out)
    assert list(rows)[2:] == ["cubic", "TV (given the slice weights)", "`desc-restored`",
                              "`--sampler mean`", "crash", "good", "silent"]  # fmt: skip
    assert rows["crash"][0] == rows["silent"][0] == "failed"
    psnr = {name: float(cells[0].split(" ±")[0]) for name, cells in rows.items()
            if re.match(r"\d", cells[0])}  # fmt: skip
    assert psnr["good"] == pytest.approx(psnr["cubic"], abs=0.02)  # the same on its own voxels
    assert float(rows["good"][1].split(" ±")[0]) == pytest.approx(
        psnr["good"] - psnr["`desc-restored`"], abs=0.011
    )
    assert float(rows["good"][2].split(" ±")[0]) >= psnr["good"]  # a field fits better than a gain
    assert all(float(cell) > 0 for cell in rows["good"][-2:])
    assert "01_T1w 5mm-noise0.01-rician-crash: crash exited with status 1:" in caplog.text
    assert "begins\n    no weights for this contrast" in caplog.text
    assert "silent ended without an error, but one image is expected" in caplog.text
    assert "there is nothing to do" in caplog.text
    assert "no table of peers was written" in caplog.text

    paths = {p.stem: p.stat().st_mtime_ns for p in (out / "results" / "peers").iterdir()}
    assert len(paths) == 2 * 4
    other = ["--peer", f"crash={template(FOLDER_FIRST + CUBIC)}"]
    assert main([*words, *good, *other, *docs]) == 0
    for path in (out / "results" / "peers").iterdir():  # another command: measured again
        assert (path.stat().st_mtime_ns == paths[path.stem]) == ("crash" not in path.stem)
    page = (tmp_path / "docs" / "tables" / "peers.md").read_text()
    assert str(tmp_path) not in page
    assert re.search(r"- good: `python\S* program\d+\.py \{scan\} \{folder\} \{thickness\}`", page)
    assert "--peer 'good=python" in read_stamp(page, "peers.md").command
    assert len(list((out / "pictures").glob("peers_*.png"))) == 3


def test_a_program_is_not_repeated_after_an_interrupt(template, tmp_path):
    peer = Peer("good", template(FOLDER_FIRST + CUBIC))
    settings = peers.Settings(crop_mm=None, rician=True, variant=peer.name, command=peer.command)
    bench = Bench(tmp_path, "cpu", tmp_path / "work")
    record = peers.measure(part_of_toy("01", 0), settings, bench)
    seconds = json.loads((bench.folder / NOTE).read_text())["seconds"]
    assert record["methods"]["good"]["seconds"] == seconds > 0
    image = bench.folder / "output" / "deep" / "fine.nii.gz"
    written = image.stat().st_mtime_ns
    assert peers.measure(part_of_toy("01", 0), settings, bench) == record
    assert image.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("image.affine[2, 3] += 100", "does not cover the brain"),
        ("image.affine[0, 3] -= 45", "does not cover the brain"),
    ],
)
def test_an_image_of_another_place_is_refused(change, message, template, tmp_path):
    """Though the program itself ends without an error."""
    text = CUBIC.replace("n = image", f"{change}\nn = image")
    peer = Peer("moved", template(FOLDER_FIRST + text))
    settings = peers.Settings(crop_mm=None, rician=True, variant="moved", command=peer.command)
    record = peers.measure(part_of_toy("01", 0), settings, Bench(tmp_path, "cpu", tmp_path / "w"))
    assert message in record["failure"]
    assert record["methods"] == {}
    assert (tmp_path / "w" / "output" / "deep" / "fine.nii.gz").is_file()
    assert not (tmp_path / "w" / NOTE).exists()  # the next run repeats the program


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "a scan.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((3, 4, 5), np.float32), np.eye(4)), path)
    return path


def ran(name, template, scan, folder, limit_s=60.0):
    return run_peer(
        Peer(name, template), scan, folder, thickness_mm=5.0, spacing_mm=6.0, limit_s=limit_s
    )


def test_placeholders_survive_spaces_and_the_named_output_is_read(template, scan, tmp_path):
    text = "import shutil, sys\nshutil.copy(*sys.argv[1:3])\nprint(sys.argv[3:])\n"
    text += "shutil.copy(sys.argv[1], sys.argv[2].replace('output.nii', 'mask.nii'))\n"
    folder = tmp_path / "a folder"
    words = "{scan} {output} --mm={thickness}/{spacing} '{not one}'"
    path, usage = ran("copy", template(text, words), scan, folder)
    assert path == folder / "output" / "output.nii.gz"
    assert (folder / "log.txt").read_text() == "['--mm=5/6', '{not one}']\n"
    assert 0 < usage.cpu_seconds < 10
    assert 0.001 < usage.peak_memory_gb < 1
    with pytest.raises(BrainpriorError, match=r"found: mask\.nii\.gz, output\.nii\.gz"):
        ran("two", template(text, "{scan} {folder}/output.nii.gz"), scan, tmp_path / "two")


def test_a_program_that_does_not_end_is_killed_with_its_children(template, scan, tmp_path):
    text = "import subprocess, sys, time\n"
    text += "c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    text += "print(c.pid, flush=True)\ntime.sleep(60)\n"
    began = time.monotonic()
    with pytest.raises(BrainpriorError, match=r"was stopped after 0\.05 minutes"):
        ran("slow", template(text), scan, tmp_path / "slow", limit_s=3.0)
    assert time.monotonic() - began < 30
    child = int((tmp_path / "slow" / "log.txt").read_text())
    for _ in range(100):  # the signal may arrive late on a busy machine
        if not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie":
            return
        time.sleep(0.05)
    pytest.fail("the child is alive")


def test_an_image_without_a_place_or_in_pieces_is_refused(tmp_path):
    lost = nib.Nifti1Image(np.ones((3, 4, 5), np.float32), None)
    nib.save(lost, tmp_path / "lost.nii.gz")
    with pytest.raises(BrainpriorError, match="neither sform nor qform"):
        read_peer_image(tmp_path / "lost.nii.gz", "tool")
    noise = np.random.default_rng(0).normal(size=(20, 20, 20))
    nib.save(nib.Nifti1Image(noise, np.eye(4)), tmp_path / "whole.nii.gz")
    (tmp_path / "torn.nii.gz").write_bytes((tmp_path / "whole.nii.gz").read_bytes()[:9000])
    with pytest.raises(BrainpriorError, match=r"torn\.nii\.gz cannot be read"):
        read_peer_image(tmp_path / "torn.nii.gz", "tool")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["tool=run {folder}"], r"tool: the command needs \{scan\}"),
        (["tool=run {scan} {thicknes}"], r"does not know \{thicknes\}. Placeholders: \{scan\}"),
        (["tool=run '{scan}"], "No closing quotation"),
        (["run {scan}"], "expected NAME=COMMAND"),
        (["my tool=run {scan}"], "expected NAME=COMMAND"),
        (["tool="], "expected NAME=COMMAND"),
        (["tool=run {scan}", "tool=other {scan}"], "tool is the name of another method"),
        (["cubic=run {scan}"], "cubic is the name of another method"),
    ],
)
def test_a_wrong_template_is_a_usage_error(texts, message, ready, capsys):
    words = [word for text in texts for word in ("--peer", text)]
    assert main([*ready[1], *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises(UsageError, match=message):
        parse_peers(texts, reserved=("cubic",))


def planned(*words):
    args = command.parse(["data", "out", *words])
    return command.plan(args, [Source("", name, "T1w", False, False) for name in "12"])


def test_a_program_that_is_not_installed_is_left_out(caplog):
    words = ["--peer", "gone=run-nowhere {scan}", "--peer", f"here={sys.executable} {{scan}}"]
    cases, problems = planned("--study", "peers", *words)
    text = "peers: gone is skipped, because run-nowhere is not installed."
    assert problems == [text]
    assert [(c.source.name, c.settings.variant) for c in cases] == [
        ("1", ""), ("1", "here"), ("2", ""), ("2", "here")
    ]  # fmt: skip
    assert {c.settings.crop_mm for c in cases} == {None}
    (case, _), _ = planned("--study", "peers", "--crop", "40", "40", "40")
    assert case.settings.crop_mm == (40, 40, 40)
    _, problems = planned(*words)  # all studies
    assert problems == []
    assert text in caplog.text


def test_without_a_program_the_study_is_skipped_unless_it_is_named(caplog):
    cases, problems = planned()
    assert problems == []
    assert {case.study for case in cases} == set(STUDIES) - {"peers"}
    assert "peers: skipped, because --peer is not given." in caplog.text
    cases, problems = planned("--study", "peers")
    assert problems == []
    assert [case.settings.command for case in cases] == ["", ""]


def record(participant, psnr, peer="", **values):
    row = {"psnr_db": psnr, "psnr_field_db": psnr + 1, "mae": 0.05, "ssim": 0.9, "seconds": 30.0}
    settings = peers.Settings(crop_mm=None, rician=True, variant=peer, command=peer and "x {scan}")
    return {
        **dataclasses.asdict(settings), "participant": participant, "contrast": "T1w",
        "synthetic": False, "tuned_on": [], "sampler_used": "conditional",
        "methods": {peer or "restored": row}, **values,
    }  # fmt: skip


def test_a_program_that_wins_is_shown_as_winning():
    records = [record("01", 25.0), record("02", 24.0), record("01", 25.5, "tool")]
    records += [record("02", 25.5, "tool")]
    rows = rows_of("\n".join(peers.table(records, [])))
    assert rows["tool"][:4] == ["25.50 ± 0.00", "+1.00 ± 0.71", "26.50 ± 0.00", "+1.00 ± 0.71"]
    assert rows["`desc-restored`"][1] == ""
    records[-1] |= {"methods": {}, "failure": "tool exited with status 1"}
    rows = rows_of("\n".join(peers.table(records, [])))
    assert rows["tool"][:2] == ["25.50; 1 failed", "+0.50"]
    rows = rows_of("\n".join(peers.table(records[2:], [])))  # the package's own case failed
    assert rows["tool"][:2] == ["25.50; 1 failed", "n/a"]


def test_a_command_with_a_program_has_names_in_place_of_paths():
    words = ["/data/brains", "out", "--peer", "tool=/opt/a b/run --in {scan} --net=/w/net.pt"]
    words[3] = words[3].replace("a b", "'a b'")
    expected = "'tool=run --in {scan} --net=net.pt'"
    assert shown_command(words) == f"brainprior evaluate brains out --peer {expected}"
    words[2:] = [f"--peer={words[3]}"]
    assert shown_command(words) == f"brainprior evaluate brains out '--peer={expected[1:]}"
