# SPDX-License-Identifier: Apache-2.0
"""The coarse network: what its answer does to that of the fine one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainprior_bids.engine.coarse import (
    AROUND_MM,
    EDGE,
    LEAST_NOISE,
    MEAN_GRID,
    NOISE_FACTOR,
    BlockWeights,
    Coarse,
    MeanBrains,
    block_means,
    hidden_around,
    mean_scan,
    smooth_field,
)
from brainprior_bids.engine.denoiser import ErrorSpectrum, Precondition, Prior
from brainprior_bids.engine.errors import ShapeMismatchError, WeightsError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.stacks import Stack
from brainprior_bids.engine.unet import UNet
from brainprior_bids.engine.voxels import Voxels
from brainprior_bids.engine.weights import load_coarse, prior_state, write_weights

SHAPE = (15, 21, 18)  # odd and even
WEIGHTS = BlockWeights([(1.0, 0.0), (4.0, 1.0)], [(0.1, 0, 0, 0, 0), (1.0, 1, 1, 1, 1)])
NOTHING = MeanBrains({"unknown": torch.zeros(MEAN_GRID.shape)})


class Oracle:
    """Answers with the means of a known image, and remembers what it was asked."""

    def __init__(self, truth):
        self.metadata, self.truth, self.asked = {}, truth, []

    def denoise(self, x, sigma, *, coordinates, contrast, measured=None):
        self.asked.append((x, sigma, coordinates, contrast, measured))
        return self.truth


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def place(shape=SHAPE):
    return torch.from_numpy(Grid(shape, np.diag([1.1, 1.2, 0.9, 1])).points_mm()).float()


def padded_truth(seed=1):
    return noise(1, 1, 8, 11, 9, seed=seed)


def test_white_noise_of_voxels_is_weaker_white_noise_in_the_means():
    means = block_means(noise(1, 1, 64, 64, 64))
    assert float(means.std()) == pytest.approx(NOISE_FACTOR, rel=0.03)


def test_the_smooth_field_has_the_given_means_and_no_steps():
    means = noise(1, 1, 6, 7, 8)
    field = smooth_field(means)
    assert torch.allclose(block_means(field), means, atol=1e-5)
    steps = field.diff(dim=2)
    between = steps[:, :, 1::2]  # over the middle of a block, the slope is that of both sides
    middle = (between[:, :, 1:] + between[:, :, :-1]) / 2
    assert torch.allclose(steps[:, :, 2:-1:2], middle, atol=1e-5)
    assert float(field.std()) < 2 * float(means.std())


def test_means_of_a_scan_leave_out_what_is_hidden():
    y = noise(4, 4, 4)
    hidden = torch.zeros(4, 4, 4, dtype=torch.bool)
    hidden[:2, :2, :1] = True  # half of the first block
    hidden[2:, :2, :2] = True
    hidden[3, 1, 1] = False  # seven eighths of another one
    means = mean_scan(Voxels(y, hidden, 0.08))
    assert float(means.y[0, 0, 0]) == pytest.approx(float(y[:2, :2, 1].mean()), abs=1e-6)
    assert means.hidden.nonzero().tolist() == [[1, 0, 0]]
    assert means.noise_sd == pytest.approx(0.08 / 8**0.5)
    assert mean_scan(Voxels(y, hidden, 0.01)).noise_sd == LEAST_NOISE


def test_without_data_the_means_of_the_answer_are_those_of_the_coarse_network():
    oracle, answer = Oracle(padded_truth()), noise(1, 1, *SHAPE, seed=2)
    x, at = noise(1, 1, *SHAPE, seed=3), place()
    corrected = Coarse(oracle, WEIGHTS, NOTHING).correct(
        answer, x, 5.0, coordinates=at, contrast="T2w", measured=None
    )
    whole = [slice(0, 2 * (n // 2)) for n in SHAPE]
    means = block_means(corrected[:, :, *whole])
    i, j, k = means.shape[2:]
    truth = oracle.truth[:, :, :i, :j, :k]
    assert torch.allclose(means, truth, atol=1e-4)
    seen, sigma, coordinates, contrast, measured = oracle.asked[0]
    assert (contrast, measured) == ("T2w", None)
    assert sigma == pytest.approx(5 / 8**0.5)
    assert torch.allclose(seen[:, :, :i, :j, :k], block_means(x[:, :, *whole]))
    assert torch.allclose(
        coordinates[:, :i, :j, :k], block_means(at[None][:, :, *whole])[0], atol=1e-4
    )


def test_the_hidden_share_of_the_surroundings():
    """At the flat border of a half-space half is hidden; in a small hole little, deep inside all;
    0 where a voxel of the block is measured."""
    hidden = torch.zeros(96, 48, 48, dtype=torch.bool)
    hidden[48:] = True
    hidden[20:24, 20:24, 20:24] = True
    hidden[8, 8, 8] = True
    share = hidden_around(Voxels(noise(96, 48, 48), hidden, 0.01))[0, 0]
    assert share.shape == (48, 24, 24)
    assert float(share[24, 12, 12]) == pytest.approx(0.5 + EDGE / 2 * 0.399 / AROUND_MM, abs=0.02)
    assert 0 < float(share[10, 10, 10]) < 0.1
    assert float(share[-1, 3, 3]) == pytest.approx(1, abs=1e-4)
    assert float(share[4, 4, 4]) == 0
    assert not bool(share[23].any())


def test_the_weight_in_a_hole_rises_with_what_is_hidden_around():
    weights = BlockWeights([], [(1, 0.2, 0.8, 0.9, 1.0)])
    share = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.7, 0.8, 1.0])
    expected = torch.tensor([0, 0.2, 0.2, 0.5, 0.8, 0.95, 1.0, 1.0])
    assert torch.allclose(weights.at(2.0, share), expected)
    assert not weights.at(0.5, share).any()  # not measured so low
    assert float(weights.at(2.0, None)) == 0  # nor without data


def test_the_weight_is_linear_in_the_logarithm_of_the_noise():
    assert float(WEIGHTS.at(2.0, None)) == pytest.approx(0.5)
    assert float(WEIGHTS.at(100.0, None)) == 1
    assert float(WEIGHTS.at(0.9, None)) == 0


def test_the_weight_scales_the_change_and_falls_with_the_noise():
    oracle, answer = Oracle(padded_truth()), noise(1, 1, *SHAPE, seed=2)
    coarse = Coarse(oracle, WEIGHTS, NOTHING)
    arguments = {"coordinates": place(), "contrast": "T1w"}
    full = coarse.correct(answer, answer, 4.0, **arguments) - answer
    half = coarse.correct(answer, answer, 2.0, **arguments) - answer
    assert torch.allclose(half, full / 2, atol=1e-5)
    asked = len(oracle.asked)
    assert coarse.correct(answer, answer, 1.0, **arguments) is answer
    assert coarse.correct(answer, answer, 0.9, **arguments) is answer  # not measured so low
    assert len(oracle.asked) == asked


def test_only_hidden_voxels_of_open_blocks_change():
    oracle, answer = Oracle(padded_truth()), noise(1, 1, *SHAPE, seed=2)
    hidden = torch.zeros(SHAPE, dtype=torch.bool)
    hidden[3:11, 4:12, 4:12] = True  # blocks 2 to 4 along i are open, 1 and 5 partly
    scan = Voxels(noise(*SHAPE, seed=4), hidden, 0.01)
    corrected = Coarse(oracle, WEIGHTS, NOTHING).correct(
        answer, answer, 100.0, coordinates=place(), contrast="T1w", measured=scan
    )
    assert torch.equal(corrected[0, 0][~hidden], answer[0, 0][~hidden])
    inner = block_means(corrected[:, :, 4:10, 4:12, 4:12])
    assert torch.allclose(inner, oracle.truth[:, :, 2:5, 2:6, 2:6], atol=1e-4)
    given = oracle.asked[0][4]
    assert given.hidden[2:5, 2:6, 2:6].all()


@pytest.mark.parametrize("kind", ["slices", "nothing hidden", "a thin hole"])
def test_where_the_fine_network_sees_enough_its_answer_stands(kind):
    oracle, answer = Oracle(padded_truth()), noise(1, 1, *SHAPE, seed=2)
    hidden = torch.zeros(SHAPE, dtype=torch.bool)
    if kind == "a thin hole":
        hidden[9] = True
    measured = Voxels(answer[0, 0], hidden, 0.01)
    if kind == "slices":
        weights = torch.eye(SHAPE[2], dtype=torch.float64)
        measured = Stack(answer[0, 0], weights, 2, 0.01)
    corrected = Coarse(oracle, WEIGHTS, NOTHING).correct(
        answer, answer, 100.0, coordinates=place(), contrast="T1w", measured=measured
    )
    assert corrected is answer
    assert not oracle.asked


def test_the_prior_answers_with_both_networks():
    oracle = Oracle(padded_truth())
    model = Precondition(UNet((8, 8), (1, 1), stacks=True), torch.full((8,), 0.1))
    flat = {"unknown": ErrorSpectrum.isotropic(0.1)}
    alone = Prior(model, spectra=flat, metadata={}, dtype=torch.float32)
    both = Prior(
        model,
        spectra=flat,
        metadata={},
        dtype=torch.float32,
        coarse=Coarse(oracle, WEIGHTS, NOTHING),
    )
    x, given = noise(1, 1, *SHAPE), {"coordinates": place(), "contrast": "T1w"}
    expected = Coarse(oracle, WEIGHTS, NOTHING).correct(
        alone.denoise(x, 4.0, **given), x, 4.0, **given
    )
    assert torch.equal(both.denoise(x, 0.5, **given), alone.denoise(x, 0.5, **given))
    assert not both.asked_coarse
    assert torch.equal(both.denoise(x, 4.0, **given), expected)
    assert both.asked_coarse


def ramp():
    """1 plus the position along each axis: what a linear interpolation recovers exactly."""
    points = torch.from_numpy(MEAN_GRID.points_mm()).float()
    return 1 + points[0] / 100 - points[1] / 200 + points[2] / 400


def test_the_mean_brain_is_interpolated_at_its_place_in_mni305():
    brains = MeanBrains({"unknown": torch.zeros(MEAN_GRID.shape), "T2w": ramp()})
    at = place((8, 9, 10)) - 5
    expected = 1 + at[0] / 100 - at[1] / 200 + at[2] / 400
    assert torch.allclose(brains.at(at, "T2w"), expected, atol=1e-5)
    assert not brains.at(at, "FLAIR").any()  # "unknown" stands in
    assert not brains.at(at + 500, "T2w").any()


@pytest.mark.parametrize(
    "volumes", [{"T1w": torch.zeros(MEAN_GRID.shape)}, {"unknown": torch.zeros(3, 3, 3)}]
)
def test_mean_brains_need_their_grid_and_one_for_any_contrast(volumes):
    with pytest.raises(ShapeMismatchError, match="unknown"):
        MeanBrains(volumes)


def test_the_network_is_asked_for_the_difference_from_the_mean_brain():
    rest = padded_truth()
    oracle = Oracle(rest)
    coarse = Coarse(oracle, WEIGHTS, MeanBrains({"unknown": ramp()}))
    x, at = noise(1, 1, 8, 11, 9), place((8, 11, 9))
    hidden = torch.zeros(8, 11, 9, dtype=torch.bool)
    scan = Voxels(noise(8, 11, 9, seed=6), hidden, 0.01)
    mean = coarse.brains.at(at, "T1w")
    answer = coarse.denoise(x, 0.5, coordinates=at, contrast="T1w", measured=scan)
    assert torch.allclose(answer, mean + rest)
    seen, _, _, _, given = oracle.asked[0]
    assert torch.equal(seen, x - mean)
    assert torch.equal(given.y, scan.y - mean)


@pytest.mark.parametrize("lacking", ["", "weights", "weights in holes", "means"])
def test_its_file_has_the_weights_and_the_mean_brains(tmp_path, lacking):
    model = Precondition(UNet((8, 8), (1, 1), stacks=True), torch.full((8,), 0.1))
    path = tmp_path / "coarse.safetensors"
    facts = {"kind": "coarse", "name": "n", "licence": "Apache-2.0", "training_data": "none"}
    facts["config"] = model.network.config
    weights = {"free": [(1.0, 0.0), (4.0, 1.0)], "holes": [(1.0, 0, 0, 0, 1)]}
    if lacking == "weights in holes":
        del weights["holes"]
    if lacking != "weights":
        facts["weights"] = weights
    state = prior_state(model, {"unknown": ErrorSpectrum.isotropic(0.1)})
    if lacking != "means":
        state["mean.unknown"] = ramp().half()
    write_weights(path, state, facts)
    if lacking:
        with pytest.raises(WeightsError, match=r"coarse\.safetensors"):
            load_coarse(path)
    else:
        coarse = load_coarse(path)
        assert float(coarse.weights.at(2.0, None)) == pytest.approx(0.5)
        assert coarse.weights.at(2.0, torch.tensor([0.2, 0.9])).tolist() == [0, 1]
        assert torch.equal(coarse.brains.volumes["unknown"], ramp().half().float())
