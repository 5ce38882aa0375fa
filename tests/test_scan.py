# SPDX-License-Identifier: Apache-2.0
"""A scan restored from Python in one call, as the page on the engine shows it."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from brainprior_bids import scan
from brainprior_bids.anatomy import prepare
from brainprior_bids.anatomy.interleaves import InterleaveMotion
from brainprior_bids.engine.errors import AnatomyError, InputError

RESTORE = scan.restore
FIRST, SECOND = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs/engine.md").read_text(), re.DOTALL
)


def test_the_five_lines_of_the_page_restore_a_scan(demo_slab, tmp_path, monkeypatch):
    """As on the page, with the embedded networks, but with fewer and shorter chains."""
    assert len([line for line in FIRST.splitlines() if line]) == 5
    output = demo_slab
    monkeypatch.chdir(tmp_path)
    image = nib.Nifti1Image(output.scan.astype(np.float32), output.scan_grid.affine)
    nib.save(image, "sub-01_T1w.nii.gz")
    monkeypatch.setattr(scan, "restore", functools.partial(scan.restore, n_samples=2, n_steps=2))
    names = {}
    exec(FIRST, names)
    result = names["result"]
    assert result.grid == output.grid
    inside = result.mean > 0
    both = inside & output.brain
    assert 2 * both.sum() / (inside.sum() + output.brain.sum()) > 0.95
    assert np.corrcoef(result.mean[both], output.truth[both])[0, 1] > 0.8
    for name, values in (("restored", result.mean), ("uncertainty", result.sd)):
        written = nib.load(f"{name}.nii.gz")
        np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), values)
        np.testing.assert_allclose(written.affine, output.grid.affine, atol=1e-4)


@pytest.mark.parametrize(("spacing_mm", "word"), [(4.0, "is corrected"), (6.0, "not corrected")])
def test_displaced_interleaves_are_treated_as_by_the_command(
    demo_slab, monkeypatch, spacing_mm, word
):
    image = nib.Nifti1Image(demo_slab.scan.astype(np.float32), demo_slab.scan_grid.affine)
    matrix = np.eye(4)
    matrix[1, 3] = 2.0
    motion = InterleaveMotion(np.stack([np.eye(4), matrix]), 2.0, 0.1, 0.5, spacing_mm)
    find_bias, given = prepare.find_bias, []

    def moved(*args, **options):
        return replace(find_bias(*args, **options), interleaves=motion)

    def restore(observation, **options):
        given.append(observation)
        return RESTORE(observation, **options, n_samples=1, n_steps=1, sampler="exact")

    monkeypatch.setattr(prepare, "find_bias", moved)
    monkeypatch.setattr(scan, "restore", restore)
    result = scan.restore_scan(image, contrast="T1w")
    (observation,) = given
    expected = motion.to_reference if word == "is corrected" else None
    np.testing.assert_array_equal(observation.interleave_motion, expected)
    assert sum(word in text for text in result.warnings) == 1


def test_an_image_is_read_as_its_file_would_be(monkeypatch):
    image = nib.Nifti1Image(np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.eye(4))

    def nothing_found(path, *, metadata, **_):
        np.testing.assert_array_equal(nib.load(path).get_fdata(), image.get_fdata())
        assert metadata == {}
        raise AnatomyError("no brain")

    monkeypatch.setattr(prepare, "conform", nothing_found)
    with pytest.raises(AnatomyError, match="no brain"):
        scan.restore_scan(image, contrast="T1w")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"missing\.nii"):
        scan.restore_scan(tmp_path / "missing.nii.gz", contrast="T1w")


def test_the_engine_as_the_page_calls_it():
    """As on the page, with the embedded prior, on a ball of 22 mm; tensors and arrays."""
    squares = [np.linspace(-1, 1, n) ** 2 for n in (24, 28, 25)]
    inside = squares[0][:, None, None] + squares[1][:, None] + squares[2] < 0.81
    share = inside.reshape(24, 28, 5, 5).mean(-1, dtype=np.float32)
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    affine[:3, 3] = (-12, -14, 10)
    names = {
        "scan": torch.from_numpy(500 * share + 10 * rng.standard_normal(share.shape)),
        "affine": affine,
        "mask": torch.from_numpy(share),
        "mask_1mm": inside,
        "matrix": np.eye(4),
        "log_bias": np.zeros_like(share),
    }
    exec(SECOND, names)
    result = names["result"]
    assert result.sampler == "conditional"
    assert result.samples.shape == (4, 24, 28, 25)
    assert np.isfinite(result.samples).all()
    assert result.mean[inside].mean() == pytest.approx(500, rel=0.1)
    assert (result.sd[inside] > 0).all()
