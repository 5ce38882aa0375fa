# SPDX-License-Identifier: Apache-2.0
"""Templates are looked up in TemplateFlow's folder, checked, and never downloaded."""

from __future__ import annotations

import socket

import nibabel as nib
import numpy as np
import pytest
from templates import SPACE, paths_of, write_template

from brainprior_bids.anatomy.templates import find_template
from brainprior_bids.engine.errors import UsageError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """TemplateFlow's folder with a small template; any use of the network fails."""
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was used"))
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "templates"))
    write_template(tmp_path / "templates", np.ones((4, 5, 6)), np.eye(4))
    return tmp_path / "templates"


def tree(folder):
    return {str(path): path.stat().st_size for path in folder.rglob("*")}


def test_a_template_is_found_by_its_path(home):
    template = find_template(SPACE)
    assert (template.image, template.mask) == paths_of(home)
    assert template.grid.shape == (4, 5, 6)
    assert template.address == (
        "https://templateflow.s3.amazonaws.com/tpl-MNI152NLin2009cAsym/"
        "tpl-MNI152NLin2009cAsym_res-01_T1w.nii.gz"
    )
    np.testing.assert_array_equal(template.brain(), 1)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "is an empty placeholder"),  # TemplateFlow's skeleton
        (lambda path: path.write_bytes(b"\x1f\x8b"), "cannot be read"),
    ],
)
def test_what_is_not_there_is_named_and_not_fetched(home, which, spoil, problem):
    path = paths_of(home)[which]
    spoil(path)
    before = tree(home)
    with pytest.raises(UsageError) as refused:
        find_template(SPACE)
    assert f"{path} {problem}" in str(refused.value)
    assert "--output-spaces MNI152NLin2009cAsym" in str(refused.value)
    assert "from templateflow.api import get; get('MNI152NLin2009cAsym'" in str(refused.value)
    assert "TEMPLATEFLOW_HOME" in str(refused.value)
    assert tree(home) == before


def test_a_mask_on_another_grid_is_refused(home):
    nib.save(nib.Nifti1Image(np.ones((4, 5, 5), np.uint8), np.eye(4)), paths_of(home)[1])
    with pytest.raises(UsageError, match="another grid"):
        find_template(SPACE)


def test_a_folder_that_does_not_exist_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="is missing"):
        find_template(SPACE)
    assert not (tmp_path / "none").exists()
