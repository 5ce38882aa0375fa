# SPDX-License-Identifier: Apache-2.0
"""The demo data set: BIDS, oblique, reproducible bytes, and a brain inside a head."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from brainprior_bids.anatomy.conform import conform
from brainprior_bids.evaluation import demo


@pytest.fixture(scope="module")
def made(demo_head):
    return demo_head


@pytest.fixture(scope="module")
def written(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "bids"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "make_demo", lambda: made)
        assert demo.main([str(out)]) == 0
    return out


def test_the_scan_is_thick_oblique_and_whole(made, written):
    path = written / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    image = nib.load(path)
    assert image.get_data_dtype() == np.int16
    np.testing.assert_allclose(image.get_fdata(), np.round(made.scan), atol=0.51)
    metadata = json.loads(path.with_name("sub-01_T1w.json").read_text())
    conformed = conform(path, metadata=metadata)
    assert conformed.warnings == []
    assert conformed.acquisition.slice_axis == 2
    assert conformed.acquisition.thickness_mm == 5
    assert conformed.acquisition.spacing_mm == pytest.approx(5, abs=1e-4)
    assert 8 < conformed.facts["grid"]["rotation_from_axes_deg"] < 12
    # the one-millimetre grid of the scan is the truth's
    grid = made.scan_grid.one_millimetre()
    assert grid == made.grid
    border = np.ones(made.brain.shape, bool)
    border[4:-4, 4:-4, 4:] = False  # the brain stem leaves through the lowest slice
    assert not (made.brain & border & (np.arange(made.brain.shape[2]) > 10)).any()


def test_the_brain_is_inside_dark_fluid_and_bone(made):
    unit = np.percentile(made.truth[made.brain], 99)
    assert unit == pytest.approx(demo.SCANNER_UNIT, rel=0.03)
    assert 1.6e6 < made.brain.sum() < 2.0e6
    away = ndimage.distance_transform_edt(~made.brain)
    upper = np.zeros(made.brain.shape, bool)
    upper[:, :, 90:] = True
    skull = made.truth[(away > 4) & (away < 5) & upper].mean() / unit
    scalp = made.truth[(away > 11) & (away < 15) & upper].mean() / unit
    assert skull < 0.4
    assert scalp > 2 * skull


def test_no_error_in_the_validator(written):
    validator = shutil.which("bids-validator-deno") or Path(sys.executable).with_name(
        "bids-validator-deno"
    )
    command = [str(validator), str(written), "--format", "json"]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
    )
    issues = json.loads(run.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_the_same_bytes_again(made, written, tmp_path, monkeypatch):
    again = demo.make_demo()
    np.testing.assert_array_equal(again.scan, made.scan)
    monkeypatch.setattr(demo, "make_demo", lambda: again)
    other = demo.write_demo(tmp_path / "again")
    for path in sorted(p for p in written.rglob("*") if p.is_file()):
        assert (other / path.relative_to(written)).read_bytes() == path.read_bytes(), path.name
    demo.write_demo(other)  # over an earlier demo: allowed


def test_other_folders_are_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert demo.main([str(tmp_path)]) == 2
    assert "contains other files" in capsys.readouterr().err
    assert demo.main([str(tmp_path / "thesis.txt")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
