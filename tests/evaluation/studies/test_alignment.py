# SPDX-License-Identifier: Apache-2.0
"""Distances of landmarks and Dice in closed form, and the work on one participant."""

import types

import numpy as np
import pytest
from participants import toy_participant

from brainprior_bids.anatomy.contrasts import ContrastMotion
from brainprior_bids.anatomy.normalise import Warp
from brainprior_bids.anatomy.templates import MNI152_FROM_MNI305
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.studies import alignment
from brainprior_bids.evaluation.studies.base import Bench

SHIFT = np.eye(4)
SHIFT[:3, 3] = 3, 0, -4


def test_landmarks_that_both_have_are_compared():
    one = {"a": np.zeros(3), "b": np.ones(3), "only here": np.ones(3)}
    other = {"a": np.array([0, 0, 2.0]), "b": np.array([1, 1, -1.0]), "only there": np.ones(3)}
    assert alignment.apart(one, other, np.eye(4)) == {
        "median distance, mm": 2.0, "mean displacement, mm": 0.0, "landmarks": 2.0,
    }  # fmt: skip
    assert alignment.apart(one, one, SHIFT)["mean displacement, mm"] == 5.0


def test_uncertain_and_cut_structures_are_no_landmarks():
    table = [
        {"name": name, "centroid_mm": [1, 2, 3], "confidence": confidence, "cut_share": cut}
        for name, confidence, cut in (("a", 0.6, 0.05), ("b", 0.59, 0.0), ("c", 0.9, 0.06))
    ]
    scan = types.SimpleNamespace(brain=types.SimpleNamespace(table=table))
    assert list(alignment.landmarks(scan)) == ["a"]


def test_the_mean_dice_is_over_the_structures_of_the_truth():
    truth = np.array([0, 1, 1, 2, 2])
    assert alignment.mean_dice([0, 1, 0, 2, 2], truth) == pytest.approx((2 / 3 + 1) / 2)


def test_two_contrasts_are_compared_by_each_alignment(monkeypatch, tmp_path):
    """The T2w is shifted; the registration finds half of it, and the affines all of it."""
    points = {"a": np.array([10.0, 0, 0]), "b": np.array([0, 20.0, 5])}

    def prepared(path, **_):
        other = "_T2w" in path.name
        matrix = np.linalg.inv(SHIFT) if other else np.eye(4)
        placed = alignment.moved(points, SHIFT) if other else points
        table = [
            {"name": name, "centroid_mm": p, "confidence": 1.0, "cut_share": 0.0}
            for name, p in placed.items()
        ]
        brain = types.SimpleNamespace(table=table, mask=np.ones((4,) * 3, np.uint8),
                                      structures=np.ones((4,) * 3, np.int16))  # fmt: skip
        return types.SimpleNamespace(
            affine=types.SimpleNamespace(matrix=matrix), brain=brain,
            grid=Grid((4, 4, 4), np.eye(4)), values=np.ones((4,) * 3, np.float32),
        )  # fmt: skip

    half = np.eye(4)
    half[:3, 3] = -SHIFT[:3, 3] / 2
    monkeypatch.setattr(alignment, "prepare", prepared)
    monkeypatch.setattr(alignment, "align_contrast", lambda *_: ContrastMotion(half, 1.0, 1.0))
    monkeypatch.setattr(alignment, "in_template", lambda *_: {})
    source = tmp_path / "sub-01_T1w.nii.gz"
    bench = Bench(tmp_path, "cpu", tmp_path, source=source)
    settings = alignment.Settings(syn=False)
    assert alignment.measure(toy_participant(), settings, bench) == {"template": {}}
    source.with_name("sub-01_T2w.nii.gz").touch()
    rows = alignment.measure(toy_participant(), settings, bench)["contrasts"]
    assert {name: row["median distance, mm"] for name, row in rows.items()} == {
        "headers alone": 5.0,
        "rigid registration": 2.5,
        "each by its own affine to MNI305": 0.0,
    }


def test_a_brain_that_is_the_template_agrees_with_it(monkeypatch, tmp_path):
    participant = toy_participant()
    affine = MNI152_FROM_MNI305 @ participant.to_mni305
    grid = Grid(participant.data.shape, affine)
    target = types.SimpleNamespace(grid=grid, mask_array=lambda: participant.inside)
    monkeypatch.setattr(alignment, "template", lambda: (None, target, participant.structures))
    (row,) = alignment.in_template(participant, alignment.Settings(False), tmp_path).values()
    assert row == {"Dice of the structures": 1.0, "Dice of the brain masks": 1.0}


def test_syn_is_compared_with_the_affine_and_timed(monkeypatch, tmp_path):
    """A registration that moves every label away."""
    participant = toy_participant()
    grid = Grid(participant.data.shape, MNI152_FROM_MNI305 @ participant.to_mni305)
    target = types.SimpleNamespace(grid=grid, mask_array=lambda: participant.inside)
    monkeypatch.setattr(alignment, "template", lambda: (None, target, participant.structures))

    def registered(image, mask, template, *, to_mni305, contrast, folder):
        assert folder.is_dir()
        assert template is target
        assert to_mni305 is participant.to_mni305
        return Warp(folder / "to.h5", folder / "from.h5")

    def through(labels, template, transforms, *, kind):
        assert transforms == [tmp_path / "new" / "to.h5"]
        return types.SimpleNamespace(dataobj=np.zeros(labels.shape))

    monkeypatch.setattr(alignment, "register", registered)
    monkeypatch.setattr(alignment, "resample_through", through)
    rows = alignment.in_template(participant, alignment.Settings(True), tmp_path / "new")
    assert rows["affine to MNI305, and from there to MNI152"]["Dice of the structures"] == 1.0
    assert rows["affine and SyN"]["Dice of the structures"] == 0.0
    assert rows["affine and SyN"]["processor time, s"] >= 0
