# SPDX-License-Identifier: Apache-2.0
"""If the structures give no affine to MNI305: the template, or an error with both reasons."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from brainprior_bids.anatomy import rescue
from brainprior_bids.anatomy.affine import corner_distance, judge_affine, mni305_centroids
from brainprior_bids.anatomy.rescue import find_affine, template_folder
from brainprior_bids.engine.errors import AnatomyError
from brainprior_bids.records import AffineMethod

STRUCTURES = mni305_centroids()["structures"]
POSE = np.array([[1.05, 0.06, 0, 4], [-0.05, 1.02, 0.04, -6], [0, -0.05, 1.0, 3], [0, 0, 0, 1.0]])
"""Scanner to MNI305."""


def table_in_scan(names=None):
    return [
        {
            "index": entry["index"],
            "name": name,
            "volume_mm3": entry["volume_mm3"],
            "confidence": 0.9,
            "centroid_mm": (np.linalg.inv(POSE) @ [*entry["centroid_mm"], 1])[:3].tolist(),
        }
        for name, entry in STRUCTURES.items()
        if names is None or name in names
    ]


def scrambled(table):
    rng = np.random.default_rng(0)
    places = rng.uniform(-80, 80, (len(table), 3))
    return [{**row, "centroid_mm": p.tolist()} for row, p in zip(table, places, strict=True)]


@pytest.fixture(scope="module")
def brain():
    """A template of blobs in an ellipsoid, 5 mm, and the same in the scanner's space."""
    affine = np.diag([5.0, 5.0, 5.0, 1.0])
    affine[:3, 3] = [-90, -126, -72]
    shape = (36, 44, 36)
    noise = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=shape), 1.5)
    points = np.indices(shape).reshape(3, -1).T * 5.0 + affine[:3, 3]
    inside = (((points - [0, -18, 10]) / [65, 82, 62]) ** 2).sum(1).reshape(shape) < 1
    template = ((100 + 600 * noise) * inside).astype(np.float32)
    # scan(x) = template(POSE x)
    index = np.linalg.inv(affine) @ POSE @ affine
    moved = [
        ndimage.affine_transform(a.astype(float), index[:3, :3], index[:3, 3], order=1)
        for a in (template, inside)
    ]
    scan = nib.Nifti1Image(moved[0].astype(np.float32), affine)
    mask = nib.Nifti1Image((moved[1] > 0.5).astype(np.uint8), affine)
    return template, inside, affine, scan, mask


@pytest.fixture(scope="module")
def templates(brain, tmp_path_factory):
    template, inside, affine, *_ = brain
    tmp_path = tmp_path_factory.mktemp("templateflow")
    for name, data in ((rescue.TEMPLATE, template), (rescue.TEMPLATE_MASK, inside)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(data.astype(np.float32), affine), tmp_path / name)
    return tmp_path


def test_good_structures_need_no_template(brain, monkeypatch):
    monkeypatch.setattr(rescue, "register_to_template", lambda *_, **__: pytest.fail("called"))
    *_, scan, mask = brain
    fit = find_affine(table_in_scan(), None, image=scan, mask=mask, templates=None)
    assert fit.method is AffineMethod.STRUCTURES
    assert not fit.warnings


def test_a_rescue_is_said_and_recorded(brain, templates, monkeypatch):
    *_, scan, mask = brain

    def fails(*_, **__):
        raise AnatomyError("fit_affine: the structures make no sense.")

    monkeypatch.setattr(rescue, "fit_affine", fails)
    monkeypatch.setattr(rescue, "WORK_MM", 5.0)
    fit = find_affine(table_in_scan(), None, image=scan, mask=mask, templates=templates)
    assert fit.method is AffineMethod.TEMPLATE
    assert corner_distance(fit.matrix, POSE) < 3
    assert "structures make no sense" in fit.warnings[0]


def test_when_both_fail_both_reasons_are_given(brain, templates, monkeypatch):
    *_, scan, mask = brain
    monkeypatch.setattr(rescue, "register_to_template", lambda *_, **__: POSE)
    with pytest.raises(AnatomyError, match=r"(?s)no plausible transform.*template failed too"):
        find_affine(scrambled(table_in_scan()), None, image=scan, mask=mask, templates=templates)


def test_without_a_template_the_refusal_says_how_to_get_it(brain):
    *_, scan, mask = brain
    with pytest.raises(AnatomyError, match=r"templateflow\.api\.get"):
        find_affine(scrambled(table_in_scan()), None, image=scan, mask=mask, templates=None)


def test_a_doubtful_fit_without_a_template_is_kept_with_a_warning(brain):
    *_, scan, mask = brain
    rng = np.random.default_rng(4)
    table = table_in_scan()
    for row in table:
        row["centroid_mm"] = (np.array(row["centroid_mm"]) + rng.normal(0, 5, 3)).tolist()
    fit = find_affine(table, None, image=scan, mask=mask, templates=None)
    assert fit.median_residual_mm > 5
    assert any("not in TemplateFlow's folder" in text for text in fit.warnings)


def test_the_template_is_looked_for_and_never_fetched(tmp_path, monkeypatch, templates):
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(templates))
    assert template_folder() == templates
    empty = tmp_path / "skeleton"
    for name in (rescue.TEMPLATE, rescue.TEMPLATE_MASK):
        (empty / name).parent.mkdir(parents=True, exist_ok=True)
        (empty / name).touch()
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(empty))
    assert template_folder() is None


def test_too_few_structures_cannot_judge(brain):
    with pytest.raises(AnatomyError, match="to judge it by"):
        judge_affine(POSE, table_in_scan(["Left-Thalamus"]))
    with pytest.raises(AnatomyError, match="mirrors"):
        judge_affine(np.diag([-1.0, 1, 1, 1]) @ POSE, table_in_scan())


def test_without_antspyx_the_refusal_says_what_to_install(brain, templates, monkeypatch):
    *_, scan, mask = brain
    monkeypatch.setattr(rescue, "find_spec", lambda name: None)
    with pytest.raises(AnatomyError, match="antspyx is not installed"):
        find_affine(scrambled(table_in_scan()), None, image=scan, mask=mask, templates=templates)
