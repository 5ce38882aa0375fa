# SPDX-License-Identifier: Apache-2.0
"""Templates are looked up in TemplateFlow's folder, checked, and never downloaded."""

from __future__ import annotations

import importlib
import socket
import sys
import zipfile

import nibabel as nib
import numpy as np
import pytest
from templates import SPACE, paths_of, write_template

from brainprior_bids.anatomy import templates
from brainprior_bids.anatomy.templates import (
    MNI152_BRAIN_ML,
    MNI152_CENTRE_MM,
    MNI152_FROM_MNI305,
    Template,
    find_template,
)
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.settings import SPACES


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
        (lambda path: path.unlink(), "{home} lists no 1 mm"),
        (lambda path: path.write_bytes(b""), "{path} is an empty placeholder"),
        (lambda path: path.write_bytes(b"\x1f\x8b"), "{path} cannot be read"),
    ],
)
def test_what_is_not_there_is_named_and_not_fetched(home, which, spoil, problem):
    path = paths_of(home)[which]
    spoil(path)
    before = tree(home)
    with pytest.raises(UsageError) as refused:
        find_template(SPACE)
    assert problem.format(path=path, home=home) in str(refused.value)
    assert "--output-spaces MNI152NLin2009cAsym" in str(refused.value)
    assert "from templateflow.api import get; get('MNI152NLin2009cAsym'" in str(refused.value)
    assert "TEMPLATEFLOW_HOME" in str(refused.value)
    assert tree(home) == before


def test_a_folder_without_the_template_says_how_to_fetch_it(home):
    with pytest.raises(
        UsageError, match="has only MNI152NLin2009cAsym, and nothing is"
    ) as refused:
        find_template("OASIS30ANTs")
    assert "get('OASIS30ANTs', resolution=1" in str(refused.value)


@pytest.mark.parametrize("exists", [True, False], ids=["folder", "no folder"])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("fsaverage", "fsaverage is a surface. brainprior makes no surfaces; leave it out"),
        ("fsaverage5", "is a surface"),
        ("fsnative", "is a surface"),
        ("fsLR", "is a surface"),
        ("func", "is the space of a functional or diffusion image.*leave it out"),
        ("MNI152NLin2009cAsm", r"no template of that name.*Did you mean MNI152NLin2009cAsym"),
        ("mni152nlin6asym", "Did you mean MNI152NLin6Asym"),
        ("mni305", "Did you mean MNI305"),
        ("Fischer344", r"Expected anat, T1w, MNI305, or one of .*MNI152NLin2009cAsym, .*OASIS"),
        ("nothing", r"Expected anat, T1w, MNI305, or one of .*MNI152NLin2009cAsym, .*OASIS"),
    ],
)
def test_what_cannot_be_fetched_is_not_recommended_to_be_fetched(
    home, monkeypatch, asked, message, exists
):
    if not exists:
        monkeypatch.setenv("TEMPLATEFLOW_HOME", str(home / "none"))
    with pytest.raises(UsageError, match=message) as refused:
        find_template(asked)
    assert "templateflow.api" not in str(refused.value)


def test_the_spaces_without_a_template_are_those_of_the_settings():
    assert templates.WITHOUT_TEMPLATE == SPACES


def test_a_template_of_your_own_in_the_folder_is_looked_up(home):
    (home / "tpl-Mine").mkdir()
    with pytest.raises(UsageError) as refused:
        find_template("Mine")
    assert "no template of that name" not in str(refused.value)


def test_without_a_list_of_templates_every_name_is_looked_up(home, monkeypatch):
    monkeypatch.setattr(zipfile, "ZipFile", fail_to_open)
    templates.templateflow_names.cache_clear()
    with pytest.raises(UsageError, match="has only MNI152NLin2009cAsym"):
        find_template("MNI152NLin2009cAsm")
    templates.templateflow_names.cache_clear()


def fail_to_open(path):
    raise FileNotFoundError(path)


def test_a_mask_on_another_grid_is_refused(home):
    nib.save(nib.Nifti1Image(np.ones((4, 5, 5), np.uint8), np.eye(4)), paths_of(home)[1])
    with pytest.raises(UsageError, match="another grid"):
        find_template(SPACE)


def of_templateflow():
    """The loaded modules that read TEMPLATEFLOW_HOME when they are imported."""
    names = {name for name in sys.modules if name.partition(".")[0] == "templateflow"}
    # ``conf.bids`` can register with pybids only once
    return (names | {"niworkflows.utils.spaces"}) & {*sys.modules} - {"templateflow.conf.bids"}


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory):
    """TemplateFlow's folder as it is before anything was fetched, seen by a new process."""
    folder = tmp_path_factory.mktemp("skeleton") / "templates"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPLATEFLOW_HOME", str(folder))
        for name in of_templateflow():
            patch.delitem(sys.modules, name)
        before = {*sys.modules}
        assert importlib.import_module("templateflow").api.templates()
        assert folder.is_dir()
        yield folder
        for name in of_templateflow() - before:
            del sys.modules[name]


def test_spaces_are_read_as_for_fmriprep(skeleton):
    for asked, message in [
        ("MNIInfan", "Did you mean MNIInfant"),
        ("MNIInfant", 'MNIInfant: .* valid cohort selector from: "cohort-1", "cohort-2"'),
        ("MNIInfant+99", 'MNIInfant:cohort-99: .* does not contain any cohort named "99"'),
        ("MNI152NLin2009cAsym+1", "does not accept a cohort"),
        ("MNI152NLin2009bAsym", "lists no 1 mm brain mask of it.*leave the space out"),
        ("MNIColin27", r"get\('MNIColin27', resolution=None, desc=None"),
        ("MNIInfant+2", r"get\('MNIInfant', cohort='2', resolution=1"),
    ]:
        with pytest.raises(UsageError, match=message):
            find_template(asked)


def test_a_cohort_and_a_template_with_one_resolution_are_found(skeleton):
    for space, stem, address in [
        ("MNIPediatricAsym+3", "tpl-MNIPediatricAsym/cohort-3/tpl-MNIPediatricAsym_cohort-3_res-1",
         "tpl-MNIPediatricAsym/cohort-3/tpl-MNIPediatricAsym_cohort-3_res-1_T1w.nii.gz"),
        ("MNIColin27", "tpl-MNIColin27/tpl-MNIColin27",
         "tpl-MNIColin27/tpl-MNIColin27_T1w.nii.gz"),
    ]:  # fmt: skip
        image, mask = (skeleton / f"{stem}_{end}.nii.gz" for end in ("T1w", "desc-brain_mask"))
        for path in (image, mask):
            assert path.stat().st_size == 0  # TemplateFlow's placeholder
            nib.save(nib.Nifti1Image(np.ones((4, 5, 6), np.float32), np.eye(4)), path)
        template = find_template(space)
        assert (template.image, template.mask) == (image, mask)
        assert template.address == f"https://templateflow.s3.amazonaws.com/{address}"


def test_a_start_gives_the_brains_one_centre_and_volume(tmp_path):
    """Of a template in another frame: a ball of 4 l, whose centre is at (100, 80, 60) mm."""
    points = np.indices((210, 210, 210)) - np.array([105, 105, 105]).reshape(3, 1, 1, 1)
    ball = (points**2).sum(0) < (3 * 4e6 / (4 * np.pi)) ** (2 / 3)
    affine = np.eye(4)
    affine[:3, 3] = np.array([100, 80, 60]) - 105
    write_template(tmp_path, ball, affine)
    start = Template("OASIS30ANTs", *paths_of(tmp_path)).from_mni305() @ np.linalg.inv(
        MNI152_FROM_MNI305
    )
    np.testing.assert_allclose(start @ [*MNI152_CENTRE_MM, 1], [100, 80, 60, 1], atol=0.1)
    assert np.linalg.det(start) == pytest.approx(4000 / MNI152_BRAIN_ML, rel=0.01)


def test_a_folder_that_does_not_exist_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="is missing"):
        find_template(SPACE)
    assert not (tmp_path / "none").exists()
