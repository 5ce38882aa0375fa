# SPDX-License-Identifier: Apache-2.0
"""The methods text of a command line, before any scan is processed."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from brainprior_bids.bids.query import find_scans
from brainprior_bids.run.documents import write_boilerplate
from brainprior_bids.run.preflight import checked_weights
from brainprior_bids.settings import Settings


@pytest.fixture
def settings(tmp_path):
    raw = tmp_path / "raw"
    for name in ("T1w", "T2w"):
        path = raw / "sub-01" / "anat" / f"sub-01_{name}.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.zeros((20, 20, 20), np.uint8), np.diag([5.0] * 3 + [1])), path)
    (raw / "dataset_description.json").write_text('{"Name": "t", "BIDSVersion": "1.10.0"}')
    return Settings(raw, tmp_path / "out", tmp_path / "w", device="cpu", modalities=("T1w", "T2w"))


def text(settings):
    """Of ``logs/CITATION.md``, in one line."""
    assert write_boilerplate(find_scans(settings), settings, checked_weights(settings)) == 0
    return " ".join((settings.output_dir / "logs" / "CITATION.md").read_text("utf-8").split())


def test_it_counts_the_scans_and_names_what_the_settings_ask_for(settings):
    written = text(settings)
    assert "1 T1w and 1 T2w scans were restored" in written
    assert "Results were also resampled to MNI305" in written
    assert "TemplateFlow" not in written


@pytest.mark.parametrize(
    ("task", "sampler", "asked"),
    [
        ("restore", "conditional", False),
        ("restore", "exact", True),
        ("inpaint", "conditional", True),
    ],
)
def test_it_names_the_coarse_network_where_it_will_be_asked(settings, task, sampler, asked):
    written = text(replace(settings, task=task, sampler=sampler))
    assert ("second network" in written) == asked


def test_it_names_the_template_and_how_each_contrast_reaches_it(settings):
    written = text(replace(settings, output_spaces=("anat", "MNI152NLin2009cAsym")))
    assert "registered to MNI152NLin2009cAsym (TemplateFlow" in written
    assert "metric: local cross-correlation (T1w)" in written
    assert "Other contrasts were resampled through the rigid transform" in written
    assert "to MNI305 through the affine" not in written
