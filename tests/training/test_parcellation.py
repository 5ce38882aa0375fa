# SPDX-License-Identifier: Apache-2.0
"""Training of the parcellation: loss, optimiser, exact resume, the command."""

import argparse

import nibabel as nib
import numpy as np
import pytest
import torch

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.parcellation_network import ParcellationNetwork
from brainprior_bids.engine.weights import load_parcellation
from brainprior_bids.training.muon import Muon, orthogonalise
from brainprior_bids.training.parcellation import (
    SyntheticHeads,
    add_arguments,
    hard_dice,
    learning_rate,
    main,
    segmentation_loss,
    train,
)
from brainprior_bids.training.synthesis import CLASSES, HeadMap, HeadSynthesiser


def toy_labels():
    """Nested cubes: skin, fluid, cortex, white matter with two sides."""
    labels = np.zeros((60, 60, 60), np.int16)
    for margin, value in ((4, 511), (8, 515), (11, 24), (14, 3), (20, 2)):
        labels[(slice(margin, -margin),) * 3] = value
    for left, right in ((2, 41), (3, 42)):
        labels[30:][labels[30:] == left] = right
    return labels


@pytest.fixture(scope="module")
def head():
    return HeadMap.from_labels(toy_labels())


def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_the_formula():
    target = torch.tensor([0, 1, 1, 2]).reshape(1, 4, 1, 1)
    perfect = 50 * torch.nn.functional.one_hot(target, 4).movedim(-1, 1).float()
    loss, dice = segmentation_loss(perfect, target)
    assert float(loss) == pytest.approx(0, abs=1e-5)
    assert dice[3].isnan()  # absent class
    loss, _ = segmentation_loss(torch.zeros(1, 4, 4, 1, 1), target)
    # uniform 1/4: cross-entropy log 4; Dice (2 hit + 1) / (1 + count + 1), hit = count / 4
    expected = np.log(4) + 1 - np.mean([(c / 2 + 1) / (c + 2) for c in (1, 2, 1)])
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_dice_against_sets():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 500), rng.integers(0, 3, 500)
    result = hard_dice(torch.from_numpy(a), torch.from_numpy(b), 4)
    for value in range(3):
        x, y = set(np.flatnonzero(a == value)), set(np.flatnonzero(b == value))
        assert float(result[value]) == pytest.approx(2 * len(x & y) / (len(x) + len(y)))
    assert result[3].isnan()


def test_orthogonalised_updates_have_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((16, 80), (80, 16), (32, 32)):
        matrix = torch.randn(shape, generator=generator)
        s = torch.linalg.svdvals(orthogonalise(matrix))
        assert s.max() < 1.3
        assert s.median() > 0.6
    # rank one: only its own direction grows
    u, v = torch.randn(16, 1, generator=generator), torch.randn(1, 40, generator=generator)
    s = torch.linalg.svdvals(orthogonalise(u @ v))
    assert 0.6 < s[0] < 1.3
    assert s[1] < 1e-3


def test_muon_finds_the_minimum_of_a_quadratic():
    torch.manual_seed(0)
    wanted, weight = torch.randn(8, 12), torch.nn.Parameter(torch.zeros(8, 12))
    optimiser = Muon([weight], lr=0.05)
    for step in range(300):
        optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        optimiser.zero_grad()
        ((weight - wanted) ** 2).sum().backward()
        optimiser.step()
    assert ((weight - wanted) ** 2).mean() < 0.02


def test_the_learning_rate_warms_up_stays_and_falls():
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[199] == rates[600] == 2.0
    assert rates[850] == pytest.approx(1.0)
    assert rates[-1] < 0.01


def test_a_step_s_head_depends_on_seed_and_step_alone(head):
    heads = SyntheticHeads(HeadSynthesiser([head], (16, 16, 16)), seed=3, steps=10)
    image, target = heads[7]
    again, target_again = heads[7]
    assert torch.equal(image, again)
    assert torch.equal(target, target_again)
    assert not torch.equal(image, heads[8][0])


def run(head, folder, steps):
    return train(
        heads=[head],
        held_out=[head],
        work_dir=folder,
        steps=steps,
        widths=(8, 8),
        shape=(16, 16, 16),
        peak_rate=1e-3,
        seed=1,
        workers=0,
        device="cpu",
        validate_every=100,
        save_every=2,
    )


def test_a_resumed_run_equals_an_uninterrupted_one(head, tmp_path, monkeypatch):
    # the rate depends on the number of steps: both runs must mean four, one stops after two
    monkeypatch.setattr("brainprior_bids.training.parcellation.learning_rate", lambda *_: 1e-3)
    whole = run(head, tmp_path / "whole", 4)
    run(head, tmp_path / "parts", 2)
    parts = run(head, tmp_path / "parts", 4)
    assert parts.step == whole.step == 4
    for (name, a), b in zip(
        whole.average.state_dict().items(), parts.average.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_another_network_is_refused(head, tmp_path):
    run(head, tmp_path, 2)
    with pytest.raises(UsageError, match="channels"):
        train(
            heads=[head],
            held_out=[head],
            work_dir=tmp_path,
            steps=2,
            widths=(8, 16),
            shape=(16, 16, 16),
            peak_rate=1e-3,
            seed=1,
            workers=0,
            device="cpu",
            validate_every=100,
        )


def test_the_command_writes_weights_that_load(tmp_path):
    for number in (1, 15):
        image = nib.Nifti1Image(toy_labels(), np.eye(4))
        nib.save(image, tmp_path / f"training_seg_{number:02d}.nii.gz")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    output = tmp_path / "out.safetensors"
    options = f"{tmp_path} --work-dir {tmp_path / 'work'} --output {output} --maps 1 --held-out 15"
    options += " --steps 1 --widths 8 8 --shape 16 16 16 --workers 0 --threads 1"
    assert main(parser.parse_args(options.split())) == 0
    network = load_parcellation(output)
    assert isinstance(network, ParcellationNetwork)
    assert network.classes == CLASSES
    assert network.metadata["steps"] == 1
    with pytest.raises(UsageError, match="no such label map"):
        main(parser.parse_args([*options.split(), "--maps", "9"]))
