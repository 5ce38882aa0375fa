# SPDX-License-Identifier: Apache-2.0
"""The coarse network's training: averaged brains, their holes, and its weights next to a prior."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy import toy_brain

from brainprior_bids.engine.coarse import (
    EDGE,
    MEAN_GRID,
    SHARES,
    BlockWeights,
    Coarse,
    MeanBrains,
    block_means,
    hidden_around,
)
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.voxels import Voxels
from brainprior_bids.engine.weights import load_coarse, load_prior, read_weights
from brainprior_bids.training import crops, prior
from brainprior_bids.training.anatomy import (
    FREE_SIGMAS,
    HOLE_SIGMAS,
    MEAN_EDGE,
    Fit,
    averaged,
    blocks_by_share,
    errors,
    mean_brains,
    measure_weights,
    whole_examples,
)
from brainprior_bids.training.averaged import averaged_brain, of_blocks
from brainprior_bids.training.preprocess import Brain, write_pack
from brainprior_bids.training.stacks import HOLE_MM, draw_voxels

TABLE = crops.TABLE.astype(np.float32)
SIZE = 24
NOTHING = torch.zeros(MEAN_GRID.shape)


def points(image, matrix):
    return crops.matrix_points(torch.from_numpy(matrix)[None], image.shape)[0].numpy()


@pytest.mark.parametrize("edge", [EDGE, MEAN_EDGE])
@pytest.mark.parametrize("number", range(6))
def test_coordinates_follow_the_anatomy(number, edge):
    """The picture encodes |x| in MNI305, however the brain is turned, mirrored and deformed."""
    image, matrix = averaged_brain(toy_brain(), TABLE, SIZE, edge, np.random.default_rng(number))
    x = points(image, matrix)[0]
    deep = image > 0.25
    for axis in range(3):  # voxels wholly inside
        deep &= np.roll(image > 0.25, 1, axis) & np.roll(image > 0.25, -1, axis)
    wrong = np.abs(image - (0.3 + np.abs(x) / 100))[deep]
    assert deep.sum() > 100
    assert np.median(wrong) < 0.06  # the deformation, and the error of an estimated affine


def test_the_matrix_leads_to_the_middle_of_the_blocks():
    matrix = np.array([[1.1, 0.1, 0, 5], [0, 1.2, 0, -3], [0.2, 0, 0.9, 7], [0, 0, 0, 1.0]])
    voxels = torch.from_numpy(Grid((8, 8, 8), matrix).points_mm())
    middles = F.avg_pool3d(voxels[None], 4)[0].numpy()
    assert np.allclose(Grid((2, 2, 2), matrix @ of_blocks(4)).points_mm(), middles)


@pytest.mark.parametrize("edge", [EDGE, MEAN_EDGE])
def test_a_crop_shows_a_brain_at_its_size(edge):
    """About a voxel of it, with voxels of the edge, scaled as the pose."""
    for number in range(6):
        rng = np.random.default_rng(number)
        image, matrix = averaged_brain(toy_brain(), TABLE, SIZE, edge, rng)
        voxel = float(np.linalg.det(matrix[:3, :3])) ** (1 / 3)
        assert voxel == pytest.approx(1.12 * edge, rel=0.12)  # 1.12 mm is a voxel of the toy
        middle = slice(SIZE // 2 - 1, SIZE // 2 + 1)
        assert (image[middle, middle, middle] > 0).any()


def test_a_mirrored_brain_has_its_left_on_the_left():
    brain = toy_brain()
    data = brain.data.copy()
    data[points(data, brain.to_mni305)[0] > 0] = 0  # only the half with x < 0 is left
    half = Brain("01", "T1w", "train", data, brain.to_mni305, brain.tissues)
    sides = set()
    for number in range(12):
        image, matrix = averaged_brain(half, TABLE, SIZE, MEAN_EDGE, np.random.default_rng(number))
        assert np.linalg.det(matrix[:3, :3]) > 0  # MNI305 is never reflected: the anatomy is
        sides.add(np.sign(np.median(points(image, matrix)[0][image > 0.2])))
    assert sides == {-1.0, 1.0}


def test_an_averaged_brain_is_a_function_of_its_number():
    one, two = (crops.Crops([toy_brain()], size=SIZE, seed=3, edge=EDGE) for _ in range(2))
    assert torch.equal(one[5]["image"], two[5]["image"])
    assert not torch.equal(one[5]["image"], one[6]["image"])
    assert one[5]["image"].shape == (1, SIZE, SIZE, SIZE)
    assert bool(one[5]["region"].all())


def test_holes_of_averaged_brains_are_larger():
    """Their semi-axes are given in mm, for each edge of a voxel."""
    image, medians = torch.ones(40, 40, 40), []
    for edge in (1, EDGE):
        volumes = []
        for seed in range(200):
            scan = draw_voxels(image, torch.Generator().manual_seed(seed), edge=edge)
            volumes.append(float(scan.hidden.sum()) * edge**3)
        medians.append(np.median(volumes))
        assert medians[-1] > 4 / 3 * np.pi * HOLE_MM[edge][0] ** 3
    assert medians == sorted(medians)


def test_larger_crops_of_averaged_brains_have_more_holes():
    shares = []
    for size in (40, 64):
        image = torch.ones(size, size, size)
        drawn = [
            draw_voxels(image, torch.Generator().manual_seed(n), edge=EDGE) for n in range(60)
        ]
        shares.append(np.median([float(scan.hidden.float().mean()) for scan in drawn]))
    assert shares[1] > 0.8 * shares[0]  # a quarter if they had as many


def test_the_weight_minimises_the_error_of_both():
    generator = torch.Generator().manual_seed(0)
    shared, own, other = torch.randn(3, 5000, generator=generator)
    fine, coarse = shared + own, shared + 0.5 * other
    fit = Fit()
    fit.add(fine, coarse)
    errors = {
        w: float((fine + w * (coarse - fine)).square().mean()) for w in np.arange(0, 1, 0.01)
    }
    assert fit.weight == pytest.approx(min(errors, key=errors.get), abs=0.006)
    assert fit.rms == pytest.approx((float(fine.std()), float(coarse.std())), rel=0.02)
    assert Fit().weight == 0


def test_in_a_hole_each_weight_is_measured_near_its_share():
    hidden = torch.zeros(48, 48, 48, dtype=torch.bool)
    hidden[4:44, 4:44, 4:44] = True
    around = hidden_around(Voxels(torch.ones(48, 48, 48), hidden, 0.01))
    brain = torch.ones(around.shape, dtype=torch.bool)
    parts = blocks_by_share(around, brain)
    assert len(parts) == len(SHARES)
    assert torch.equal(sum(part.int() for part in parts), (around > 0).int())  # each block once
    for share, part in zip(SHARES, parts, strict=True):
        assert abs(float(around[part].median()) - share) < 0.12
    assert torch.equal(blocks_by_share(None, brain)[0], brain)


@pytest.mark.parametrize("better", ["fine", "coarse"])
def test_the_weights_favour_the_better_network(better):
    """One knows the truth, the other is off by noise; the noise levels are those of the table."""
    brains = [toy_brain(split="validation")]
    example = next(whole_examples(brains, "T1w", 1))
    truth = example.image[None, None]
    off = 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))

    class Knows:
        def __init__(self, answer):
            self.answer, self.metadata = answer, {}

        def denoise(self, *_, **__):
            return self.answer

    fine, coarse = (truth + off, truth) if better == "coarse" else (truth, truth + off)
    network = Coarse(
        Knows(block_means(coarse)), BlockWeights([], []), MeanBrains({"unknown": NOTHING})
    )
    found = measure_weights(Knows(fine), network, brains)
    assert list(found["free"]) == list(FREE_SIGMAS)
    assert list(found["holes"]) == list(HOLE_SIGMAS)
    for fits in (*found["free"].values(), *found["holes"].values()):
        for fit in fits:
            count = fit.errors[3]
            assert fit.weight == (1.0 if better == "coarse" and count else 0.0)
            error = fit.rms[0 if better == "coarse" else 1]
            assert not count or error == pytest.approx(0.1 / 8**0.5, rel=0.2)
    assert all(fit.errors[3] > 50 for fit in found["holes"][1.0])


def test_an_example_and_its_average_are_at_the_same_place():
    whole = next(whole_examples([toy_brain(split="validation")], "T1w", 1))
    coarse = averaged(whole)
    assert [EDGE * n for n in coarse.image.shape] == list(whole.image.shape)
    volume = whole.image.sum(), EDGE**3 * coarse.image.sum()
    assert float(volume[0]) == pytest.approx(float(volume[1]), rel=1e-4)
    centres = [(e.image * e.place).sum((1, 2, 3)) / e.image.sum() for e in (whole, coarse)]
    assert torch.allclose(*centres, atol=0.1)


def test_the_mean_brain_is_that_of_the_training():
    """Of one T1w: 0.3 + |x| / 100 in the ball, at its place in MNI305; no other contrast."""
    mix = crops.Mix(real=1.0, curved={}, synthetic={})
    drawn = crops.Crops([toy_brain()], size=SIZE, seed=3, edge=MEAN_EDGE, mix=mix)
    brains = mean_brains(drawn, 40)
    assert set(brains.volumes) == {"T1w", "unknown"}
    for x in (-12.0, 0.0, 12.0):
        centre = (toy_brain().to_mni305 @ [26, 30, 28, 1])[:3]
        at = torch.tensor([centre[0] + x, centre[1], centre[2]]).float()[:, None, None, None]
        expected = 0.3 + abs(float(at[0])) / 100
        assert float(brains.at(at, "T1w")) == pytest.approx(expected, abs=0.08)
    far = torch.tensor([0.0, 0.0, 80.0])[:, None, None, None]
    assert float(brains.at(far, "T1w")) < 0.02


def test_the_command_trains_a_coarse_network(tmp_path):
    brains = [toy_brain("01"), toy_brain("02", split="validation", seed=1)]
    write_pack(brains, tmp_path)
    parser = argparse.ArgumentParser()
    prior.add_arguments(parser)
    out = tmp_path / "coarse.safetensors"
    words = [str(tmp_path), "--coarse", "--steps", "3", "--size", "24", "--batch", "2"]
    words += ["--stacks", "0", "--holes", "0.6", "--workers", "0", "--threads", "1"]
    words += ["--channels", "8", "8", "--blocks", "1", "1", "--out", str(out)]
    words += ["--validate-every", "2", "--checkpoint-every", "2"]
    assert prior.main(parser.parse_args(words)) == 0
    facts = read_weights(out, kind="coarse")[1]
    assert facts["recipe"]["coarse"]
    assert facts["next_to"] == load_prior(coarse=False).metadata["sha256"]
    for kind, count in (("free", 1), ("holes", len(SHARES))):
        rows = facts["weights"][kind]
        assert [row[0] for row in rows] == sorted(row[0] for row in rows)
        assert all(
            len(row) == 1 + count and 0 <= min(row[1:]) <= max(row[1:]) <= 1 for row in rows
        )
        assert np.shape([row[1:] for row in facts["rms_errors"][kind]]) == (len(rows), count, 2)
    notes = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert any("hole 30" in note.get("errors", {}) for note in notes)
    network = load_coarse(out)
    assert errors(network, brains[1:])["hole 30"] == pytest.approx(
        facts["errors"]["hole 30"], abs=2e-3
    )  # the file has 16 bits
    recipe = prior.Recipe(**{**facts["recipe"], "channels": (8, 8), "blocks": (1, 1)})
    again = prior.Trainer(brains[:1], recipe, tmp_path, device=torch.device("cpu"))
    again.start_from(out)
    for one, other in zip(again.model.parameters(), network.prior.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.begun_with["sha256"] == facts["sha256"]


def test_blocks_keep_the_contrast_of_fine_anatomy():
    """A texture of 3 mm: the SD of its means over blocks of 2 mm, turned and deformed, is hardly
    lower than at rest."""
    toy, shape = toy_brain(), (90, 90, 90)
    cells = np.random.default_rng(0).integers(80, 180, (30, 30, 30)).astype(np.uint8)
    data = cells.repeat(3, 0).repeat(3, 1).repeat(3, 2)
    assert data.shape == shape
    fine = Brain("01", "T1w", "train", data, toy.to_mni305, toy.tissues)
    still = [
        block_means(torch.from_numpy(TABLE[data[o:, o:, o:]])[None, None]).var() for o in range(3)
    ]
    images = [averaged_brain(fine, TABLE, 8, 2, np.random.default_rng(n))[0] for n in range(30)]
    inside = [image.std() for image in images if (image > 0.2).all()]
    assert len(inside) > 5
    assert np.mean(inside) > 0.82 * float(np.mean(still)) ** 0.5
