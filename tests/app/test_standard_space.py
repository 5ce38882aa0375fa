# SPDX-License-Identifier: Apache-2.0
"""The command with a standard space, from the scan to the images on the template's grid.

The demo's head contains the brain of nilearn's ICBM152 template, tilted and scanned in thick
slices: registered to that template, it must match it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nilearn.datasets import load_mni152_brain_mask, load_mni152_template
from templates import SPACE, write_template

AT = f"sub-01/anat/sub-01_space-{SPACE}_res-1"


@pytest.fixture(scope="module")
def ended(tmp_path_factory, write_demo):
    """A run without network, and its output folder and template."""
    folder = tmp_path_factory.mktemp("standard")
    raw = write_demo(folder / "raw")
    template = load_mni152_template(resolution=1)
    brain = np.asarray(load_mni152_brain_mask(resolution=1).dataobj) > 0
    image = np.where(brain, template.get_fdata(dtype=np.float32), 0)
    write_template(folder / "templates", image, template.affine)
    options = ["--output-spaces", SPACE, "--sampler", "mean", "--sloppy", "--no-viewer",
               "--device", "cpu", "--nprocs", "1", "--skip-bids-validation"]  # fmt: skip
    command = [sys.executable, "-m", "brainprior_bids", raw, folder / "out", "participant"]
    done, planned = (
        subprocess.run(
            [*map(str, command), *options, *extra],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ
            | {
                "TEMPLATEFLOW_HOME": str(folder / "templates"),
                "http_proxy": "http://127.0.0.1:9",
                "https_proxy": "http://127.0.0.1:9",
            },
        )
        for extra in ([], ["--dry-run", "--force"])
    )
    return done, planned, folder / "out", (image, brain)


def test_the_brain_lies_on_the_template(ended):
    done, _, out, (template, brain) = ended
    assert done.returncode == 0, done.stderr
    restored = nib.load(out / f"{AT}_desc-restored_T1w.nii.gz").get_fdata()
    mask = nib.load(out / f"{AT}_desc-brain_mask.nii.gz").get_fdata() > 0
    assert restored.shape == template.shape
    assert 2 * (mask & brain).sum() / (mask.sum() + brain.sum()) > 0.95
    both = mask & brain
    assert np.corrcoef(restored[both], template[both])[0, 1] > 0.9


def test_the_inverse_takes_the_template_back(ended):
    out = ended[2]
    stem = out / "sub-01/anat/sub-01"
    there, back = (
        sitk.ReadTransform(f"{stem}_from-{a}_to-{b}_mode-image_xfm.h5")
        for a, b in (("T1w", SPACE), (SPACE, "T1w"))
    )
    both = sitk.CompositeTransform([there, back])
    for point in ((20.0, 30.0, 10.0), (-40.0, 10.0, 20.0), (5.0, 60.0, -20.0)):
        np.testing.assert_allclose(both.TransformPoint(point), point, atol=1.0)


def test_the_plan_lists_what_is_written_and_the_methods_text_says_how(ended):
    _, planned, out, _ = ended
    listed = {line.strip() for line in planned.stdout.splitlines() if SPACE in line}
    output = {str(p.relative_to(out)) for p in out.glob(f"sub-01/anat/*{SPACE}*")}
    assert {path for path in output if not path.endswith(".json")} == listed
    assert "TemplateFlow" in (out / "logs" / "CITATION.md").read_text()
