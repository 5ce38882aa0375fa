# SPDX-License-Identifier: Apache-2.0
"""Training of the prior: data, crops, schedule, resuming."""

from __future__ import annotations

import argparse
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from toy import AFFINE, toy_brain

from brainprior_bids.engine.coarse import NOISE_FACTOR
from brainprior_bids.engine.denoiser import ErrorSpectrum
from brainprior_bids.engine.errors import InputError, UsageError, WeightsError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.weights import (
    FOLDER,
    load_coarse,
    load_prior,
    prior_state,
    sha256_file,
    write_weights,
)
from brainprior_bids.training import crops, preprocess, prior, spectra
from brainprior_bids.training.stacks import draw_stack


def test_noise_levels_are_stratified_over_the_pieces():
    sigma = prior.draw_sigmas(1000, torch.Generator().manual_seed(0)).sort().values
    assert 0.005 <= sigma[0] < 0.0051
    assert 39 < sigma[-1] <= 40
    assert sigma[99] <= 0.02 <= sigma[100]
    assert sigma[899] <= 3 <= sigma[900]
    assert sigma[500] == pytest.approx((0.02 * 3) ** 0.5, rel=0.01)  # middle of the middle piece


def test_the_coarse_network_learns_the_noise_at_which_it_is_asked():
    drawn = prior.draw_sigmas(1000, torch.Generator().manual_seed(0), prior.COARSE_PIECES)
    sigma = drawn.sort().values
    assert 0.15 <= sigma[0] < 0.16
    assert sigma[749] <= 3 <= sigma[750]
    lowest = load_coarse().weights.least_sigma
    assert sigma[0] <= lowest * NOISE_FACTOR


def test_learning_rate_rises_stays_and_falls():
    recipe = prior.Recipe(steps=100, warmup=10, decay=20, learning_rate=1.0)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == [1.0] * 72
    assert rates[-1] == pytest.approx(1 / 20)
    assert rates[81:] == sorted(rates[81:], reverse=True)


def test_a_crop_is_a_function_of_its_number():
    one = crops.Crops([toy_brain()], size=16, seed=3)
    two = crops.Crops([toy_brain()], size=16, seed=3)
    other = crops.Crops([toy_brain()], size=16, seed=4)
    assert torch.equal(one[5]["image"], two[5]["image"])
    assert torch.equal(one[5]["matrix"], two[5]["matrix"])
    assert not torch.equal(one[5]["matrix"], other[5]["matrix"])


@pytest.mark.parametrize("number", range(12))
def test_coordinates_follow_the_anatomy(number):
    """The picture encodes |x| in MNI305; turned, scaled and mirrored crops still agree with it."""
    table = crops.TABLE.astype(np.float32)
    image, matrix = crops.draw_crop(
        toy_brain(), table, 32, np.random.default_rng(number), pose=True
    )
    x = crops.matrix_points(torch.from_numpy(matrix)[None], image.shape)[0, 0].numpy()
    inside = image > 0.25
    wrong = np.abs(image - (0.3 + np.abs(x) / 100))[inside]
    assert inside.any()
    # a doubt of 2 mm, 1 degree and 1 % is part of the pose: some 6 mm at the most
    assert np.median(wrong) < 0.06


def test_a_mirrored_brain_has_its_left_on_the_left():
    brain = toy_brain()
    data = brain.data.copy()
    middle = Grid(data.shape, AFFINE).points_mm()[0] > 0
    data[middle] = 0  # only the half with x < 0 is left
    half = preprocess.Brain("01", "T1w", "train", data, AFFINE, brain.tissues)
    sides = set()
    for number in range(12):
        table = crops.TABLE.astype(np.float32)
        image, matrix = crops.draw_crop(half, table, 64, np.random.default_rng(number), pose=True)
        x = crops.matrix_points(torch.from_numpy(matrix)[None], image.shape)[0, 0].numpy()
        mirrored = np.linalg.det(matrix[:3, :3]) * np.linalg.det(AFFINE[:3, :3]) < 0
        assert not mirrored  # MNI305 is never reflected: the anatomy is
        sides.add(np.sign(np.median(x[image > 0])))
    assert sides == {-1.0, 1.0}


def test_an_unturned_crop_is_copied_exactly():
    brain = toy_brain()
    table = crops.TABLE.astype(np.float32)
    to_brain = np.eye(4)
    to_brain[:3, 3] = [-4, 10, 50]  # beyond the box at both ends
    crop = crops.resample(brain.data, table, to_brain, 16, turned=False)
    expected = np.zeros((16, 16, 16), np.float32)
    expected[4:, :, :6] = table[brain.data[:12, 10:26, 50:56]]
    assert np.array_equal(crop, expected)
    to_brain[0] = [-1, 0, 0, 11]
    assert np.array_equal(
        crops.resample(brain.data, table, to_brain, 16, turned=False)[:12], expected[4:][::-1]
    )


def test_a_turned_crop_agrees_with_the_slow_way():
    brain = toy_brain()
    table = crops.TABLE.astype(np.float32)
    linear = crops.Rotation.from_euler("xyz", [10, -5, 12], degrees=True).as_matrix() * 1.05
    to_brain = np.eye(4)
    to_brain[:3, :3], to_brain[:3, 3] = linear, [20, 18, 22]
    fast = crops.resample(brain.data, table, to_brain, 20, turned=True)
    slow = crops.ndimage.affine_transform(
        table[brain.data], linear, to_brain[:3, 3], (20, 20, 20), order=3
    )
    inside = fast > 0
    assert inside.mean() > 0.5
    assert np.abs(fast - slow)[inside].max() < 2e-3


@pytest.mark.parametrize("contrast", ["T1w", "T2w", "FLAIR", "unknown"])
def test_curves_order_the_tissues_as_the_contrast_does(contrast):
    tissues = np.array([0.28, 0.57, 0.88])
    at = np.round(np.array([0.14, 0.57, 0.88]) * preprocess.UNIT).astype(int)
    for seed in range(20):
        curve = crops.intensity_curve(tissues, contrast, np.random.default_rng(seed))
        fluid, grey, white = curve[at]
        assert curve[0] == 0
        assert (curve >= 0).all()
        if contrast == "T1w":
            assert fluid < grey < white
        elif contrast == "T2w":
            assert fluid > grey > white
        elif contrast == "FLAIR":
            assert fluid < white < grey


def test_the_mix_decides_what_is_drawn():
    brains = [toy_brain(), toy_brain(contrast="T2w", synthetic=True)]
    mix = crops.Mix(real=0.0, curved={"FLAIR": 1.0}, synthetic={"T2w": 1.0})
    drawn = crops.Crops(brains, size=8, seed=0, mix=mix, unknown=0.0)
    kinds = [int(drawn[n]["contrast"]) for n in range(60)]
    assert set(kinds) == {1, 2}  # T2w and FLAIR
    assert 15 < sum(kind == 1 for kind in kinds) < 45
    with pytest.raises(UsageError, match="no brain"):
        crops.Crops(brains[:1], size=8, seed=0, mix=crops.Mix(0.0, {}, {"T2w": 1.0}))


def tiny(tmp_path, steps):
    recipe = prior.Recipe(
        steps=steps, warmup=1, decay=1, batch=2, size=12, channels=(8, 8), blocks=(1, 1), seed=2
    )
    return prior.Trainer([toy_brain()], recipe, tmp_path, device=torch.device("cpu"))


def run(trainer):
    trainer.run(workers=0, checkpoint_every=100, validate_every=100, validation=[])


def test_a_resumed_training_is_the_same_training(tmp_path):
    whole = tiny(tmp_path / "whole", 6)
    run(whole)
    first = tiny(tmp_path / "parts", 4)  # its last four steps do not fall: decay is 1
    run(first)
    second = tiny(tmp_path / "parts", 6)
    assert second.resume()
    assert second.step == 4
    run(second)
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    for a, b in zip(whole.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_training_that_is_given_time_takes_the_steps_that_fit(tmp_path):
    trainer = tiny(tmp_path, 1010)
    trainer.recipe = replace(trainer.recipe, decay=500)
    trainer.step = 10
    trainer.fit_into(60.0, 0.5)
    assert (trainer.recipe.steps, trainer.recipe.decay) == (130, 60)
    assert trainer.recipe.rate(129) < trainer.recipe.rate(69) / 50
    trainer.fit_into(1e6, 0.5)
    assert trainer.recipe.steps == 130  # never more than were asked for


def test_a_training_that_saw_slices_another_way_does_not_go_on(tmp_path):
    before = tiny(tmp_path, 1)
    run(before)
    path = tmp_path / prior.CHECKPOINT
    saved = torch.load(path, weights_only=True)
    del saved["recipe"]["slices_last"]
    torch.save(saved, path)
    with pytest.raises(UsageError, match="Begin a new one"):
        tiny(tmp_path, 2).resume()


def test_a_crop_too_small_for_the_network_is_refused(tmp_path):
    recipe = prior.Recipe(size=8, channels=(8, 8), blocks=(1, 1))
    with pytest.raises(UsageError, match="multiple of 4 of at least 12"):
        prior.Trainer([toy_brain()], recipe, tmp_path, device=torch.device("cpu"))


def test_training_learns(tmp_path):
    recipe = prior.Recipe(
        steps=40,
        warmup=5,
        decay=20,
        batch=4,
        size=16,
        learning_rate=6e-3,
        channels=(16, 16),
        blocks=(1, 1),
        seed=2,
    )
    trainer = prior.Trainer([toy_brain(texture=0)], recipe, tmp_path, device=torch.device("cpu"))
    batch = torch.utils.data.default_collate([trainer.crops[n] for n in range(16)])
    before = float(trainer.loss(batch, 9).detach())
    run(trainer)
    after = float(trainer.loss(batch, 9).detach())
    assert after < 0.99 * before


def test_divergence_is_an_error(tmp_path):
    trainer = tiny(tmp_path, 2)
    next(trainer.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(UsageError, match="diverged at step 1"):
        run(trainer)


def test_the_command_trains_exports_and_evaluates(tmp_path, capsys):
    brains = [toy_brain("01"), toy_brain("02", split="validation", seed=1)]
    preprocess.write_pack(brains, tmp_path)
    parser = argparse.ArgumentParser()
    prior.add_arguments(parser)
    out = tmp_path / "prior.safetensors"
    words = [str(tmp_path), "--steps", "2", "--size", "12", "--batch", "2", "--workers", "0"]
    words += ["--channels", "8", "8", "--blocks", "1", "1", "--out", str(out)]
    words += ["--spectrum-brains", "1", "--threads", "1"]
    assert prior.main(parser.parse_args(words)) == 0
    output = load_prior(out)
    assert output.metadata["steps"] == 2
    assert output.metadata["recipe"]["seed"] == 1
    v = output.spectrum("T1w").variance(0.1, torch.linspace(0, 0.5, 5))
    assert ((v > 0) & (v <= 0.01 * (1 + 1e-6))).all()
    assert prior.main(parser.parse_args([*words, "--evaluate"])) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("T1w")]
    assert f"0.1: {output.metadata['gain']['T1w']['0.1']:.3f}" in lines[0]
    held_out = [brain for brain in brains if brain.split == "validation"]
    psnr = spectra.stack_errors(output, held_out)["T1w"]["5"]
    assert f"5: {psnr:.2f}" in lines[1]


def test_a_training_may_begin_with_the_weights_of_another(tmp_path):
    preprocess.write_pack([toy_brain(), toy_brain("02", split="validation")], tmp_path)
    parser = argparse.ArgumentParser()
    prior.add_arguments(parser)
    words = ["--size", "12", "--batch", "2", "--workers", "0", "--spectrum-brains", "1"]
    words += ["--channels", "8", "8", "--blocks", "1", "1", "--threads", "1"]

    def train(*more):
        assert prior.main(parser.parse_args([*map(str, more), *words])) == 0

    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    train(tmp_path, "--steps", 3, "--decay", 1, "--learning-rate", 0.01, "--out", one)
    (tmp_path / prior.CHECKPOINT).unlink()
    own = ["--conditioned-sigma", 3, 100, "--begin-with", one, "--out", two]
    train(tmp_path, "--steps", 0, *own)
    (tmp_path / prior.CHECKPOINT).unlink(missing_ok=True)
    begun, state = load_prior(two), load_prior(one).model.state_dict()
    for name, tensor in begun.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert begun.metadata["recipe"]["conditioned_sigma"] == [3, 100]
    assert begun.metadata["begun_with"] == {"sha256": sha256_file(one), "steps": 3}
    train(tmp_path, "--steps", 3, "--decay", 1, "--learning-rate", 0.01, *own)
    moved = load_prior(two).model.state_dict()
    assert any(not torch.equal(tensor, state[name]) for name, tensor in moved.items())
    with pytest.raises(WeightsError, match="its network is"):
        tiny(tmp_path / "other", 1).start_from(FOLDER / "prior.safetensors")


def test_the_sd_is_learned_of_weights_that_stay_as_they_are(tmp_path, capsys):
    """Stage one knows no SD; stage two adds it, with its factor; all else is bit for bit."""
    brains = [toy_brain(texture=0.05), toy_brain("02", split="validation", texture=0.05)]
    preprocess.write_pack(brains, tmp_path)
    parser = argparse.ArgumentParser()
    prior.add_arguments(parser)
    words = ["--size", "12", "--batch", "2", "--workers", "0", "--spectrum-brains", "1"]
    words += ["--channels", "8", "8", "--blocks", "1", "1", "--threads", "1"]

    def train(*more):
        return prior.main(parser.parse_args([*map(str, (tmp_path, *more)), *words]))

    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    train("--steps", 3, "--out", one)
    with pytest.raises(UsageError, match="--spread needs --begin-with"):
        train("--spread", "--steps", 1)
    train("--spread", "--steps", 30, "--learning-rate", 0.02, "--begin-with", one, "--out", two)
    before, after = load_prior(one), load_prior(two)
    assert (before.predicts_spread, after.predicts_spread) == (False, True)
    state = after.model.state_dict()
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(state.pop(name), tensor), name
    assert all(name.startswith("network.spread_out.") for name in state)
    held_out = [brain for brain in preprocess.read_pack(tmp_path) if brain.split == "validation"]
    ratio, parts = spectra.spread_errors(after, held_out)["T1w"]
    assert ratio == pytest.approx(1, abs=0.01)  # by the factor in the header
    assert len(parts) == 10
    assert after.spread_factor("T1w") != 1
    assert torch.equal(after.spectrum("T1w").variances, before.spectrum("T1w").variances)
    train("--steps", 0, "--begin-with", two, "--out", tmp_path / "on.safetensors")
    assert not load_prior(tmp_path / "on.safetensors").predicts_spread  # trained on without it
    capsys.readouterr()
    train("--out", two, "--evaluate")
    assert f"T1w {ratio:.3f}" in capsys.readouterr().out


def test_a_network_is_enlarged_without_a_change_of_what_it_computes(tmp_path):
    """Weights without the second reading of the slices, as of earlier versions."""
    plain = replace(tiny(tmp_path, 1).recipe, stack_hidden=0)
    old = prior.Trainer([toy_brain()], plain, tmp_path / "old", device=torch.device("cpu"))
    for parameter in old.average.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path / "old.safetensors"
    facts = {"kind": "prior", "name": "old", "licence": "x", "training_data": "x"}
    facts["config"] = old.average.network.config
    flat = {"unknown": ErrorSpectrum.isotropic(0.5)}
    write_weights(path, prior_state(old.average, flat), facts)
    new = tiny(tmp_path / "new", 1)
    new.start_from(path)
    image = torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    stack = draw_stack(image[0, 0], torch.Generator().manual_seed(1))
    options = {"coordinates": torch.zeros(3, 12, 12, 12), "contrast": "T1w", "measured": stack}
    expected = load_prior(path, dtype=torch.float32, coarse=False).denoise(image, 0.5, **options)
    enlarged = new.prior()
    enlarged.dtype = torch.float32
    enlarged.metadata.pop("recipe")
    assert torch.equal(enlarged.denoise(image, 0.5, **options), expected)
    torch.nn.init.normal_(enlarged.model.network.stack_more[2].weight)
    assert not torch.allclose(enlarged.denoise(image, 0.5, **options), expected, atol=1e-3)
    assert torch.allclose(  # nothing measured, nothing read
        enlarged.denoise(image, 0.5, coordinates=options["coordinates"], contrast="T1w"),
        load_prior(path, dtype=torch.float32, coarse=False).denoise(
            image, 0.5, coordinates=options["coordinates"], contrast="T1w"
        ),
    )


def test_export_without_a_checkpoint_is_a_usage_error(tmp_path):
    preprocess.write_pack([toy_brain()], tmp_path)
    parser = argparse.ArgumentParser()
    prior.add_arguments(parser)
    words = [str(tmp_path), "--export-only", "--channels", "8", "8", "--blocks", "1", "1"]
    with pytest.raises(UsageError, match=r"no checkpoint\.pt"):
        prior.main(parser.parse_args(words))


def test_pack_round_trip_and_parts(tmp_path, monkeypatch):
    brains = [toy_brain(str(n), seed=n) for n in range(3)]
    monkeypatch.setattr(preprocess, "PART_BYTES", 1)
    assert len(preprocess.write_pack(brains, tmp_path)) == 3
    preprocess.write_pack([toy_brain("map", synthetic=True)], tmp_path, stem="synthetic")
    back = preprocess.read_pack(tmp_path)
    assert [b.name for b in back] == ["0", "1", "2", "map"]
    assert [b.synthetic for b in back] == [False, False, False, True]
    assert np.array_equal(back[1].data, brains[1].data)
    assert np.allclose(back[1].to_mni305, AFFINE)
    with pytest.raises(UsageError, match="no pack"):
        preprocess.read_pack(tmp_path / "nowhere")


def test_brains_are_found_and_split_by_name(tmp_path):
    for name in ("sub-01_desc-brain_T1w.nii.gz", "sub-02_FLAIR.nii", "sub-03_T1w.nii.gz", "x.nii"):
        (tmp_path / name).touch()
    result = preprocess.find_brains(tmp_path, validation=["02"], exclude=["03"])
    assert [row[:3] for row in result] == [("01", "T1w", "train"), ("02", "FLAIR", "validation")]
    with pytest.raises(UsageError, match="no participant 9"):
        preprocess.find_brains(tmp_path, validation=["9"], exclude=[])
    with pytest.raises(UsageError, match="no sub-"):
        preprocess.find_brains(tmp_path / "none", validation=[], exclude=[])


def test_nobody_is_trained_on_for_a_slip_of_the_pen(tmp_path, monkeypatch):
    """Names of --exclude and --validation that are nobody's are refused, with or without sub-."""
    for name in ("sub-01_T1w", "sub-02_T1w", "sub-03_T1w"):
        (tmp_path / f"{name}.nii.gz").touch()
    built = []
    monkeypatch.setattr(prior, "build_pack", lambda *_, **given: built.append(given))
    parser = argparse.ArgumentParser()
    prior.add_arguments(parser)
    command = [str(tmp_path / "work"), "--heads", str(tmp_path), "--validation", "sub-02"]
    with pytest.raises(UsageError, match="no label map 3 in the data"):
        prior._build_packs(parser.parse_args([*command, "--exclude", "3"]))
    assert not built
    prior._build_packs(parser.parse_args([*command, "--exclude", "03"]))
    assert built == [{"processes": 1, "validation": ["02"], "exclude": ["03"]}]


def test_outputs_of_brainprior_are_no_training_data(tmp_path):
    folder = tmp_path / "derivatives" / "sub-01" / "anat"
    folder.mkdir(parents=True)
    (folder / "sub-01_desc-restored_T1w.nii.gz").touch()
    (folder / "sub-01_desc-brain_T1w.nii.gz").touch()
    (tmp_path / "sub-01_T1w.nii.gz").touch()
    result = preprocess.find_brains(tmp_path, validation=[], exclude=[])
    assert [row[3].name for row in result] == ["sub-01_T1w.nii.gz"]  # not into derivatives
    with pytest.raises(UsageError, match="an output of brainprior"):
        preprocess.find_brains(tmp_path / "derivatives", validation=[], exclude=[])


def test_tissue_means_find_three_classes():
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(m, 0.03, n) for m, n in ((0.2, 3000), (0.55, 9000), (0.85, 8000))]
    )
    result = preprocess.tissue_means(values.astype(np.float32))
    assert result == pytest.approx([0.2, 0.55, 0.85], abs=0.01)


@pytest.mark.parametrize(
    ("data", "zoom", "text"),
    [
        (np.ones((10, 10, 10)), 1.0, "skull-stripped"),
        (np.pad(np.ones((6, 6, 6)), 2), 2.0, "1 mm"),
    ],
)
def test_what_is_no_stripped_brain_is_refused(tmp_path, data, zoom, text):
    path = tmp_path / "sub-01_T1w.nii"
    nib.save(nib.Nifti1Image(data.astype(np.float32), np.diag([zoom, zoom, zoom, 1])), path)
    with pytest.raises(InputError, match=text):
        preprocess.prepare("01", "T1w", "train", path, (None, None))


def test_n4_removes_a_known_field():
    points = Grid((48, 48, 48), np.eye(4)).points_mm() - 23.5
    mask = (points**2).sum(0) < 20**2
    field = 0.3 * points[0] / 20
    rng = np.random.default_rng(0)
    tissue = np.where(rng.random(mask.shape) < 0.5, 1.0, 0.7)
    image = np.where(mask, 100 * tissue * np.exp(field), 0).astype(np.float32)
    result = preprocess.n4(image, mask)
    truth = (field - field[mask].mean())[mask]
    assert np.corrcoef(result[mask], truth)[0, 1] > 0.95
    assert result[mask].mean() == pytest.approx(0, abs=1e-4)


@pytest.mark.shared
def test_registration_recovers_a_known_affine(shared_data):
    reference = preprocess.mni305_brain(shared_data / "templates" / "avg305T1.nii")
    data, affine = reference
    known = np.eye(4)
    known[:3, :3] = crops.Rotation.from_euler("xyz", [8, -5, 6], degrees=True).as_matrix() * 0.93
    known[:3, 3] = [4, -12, 9]
    scanner = Grid((150, 180, 150), np.array(np.eye(4)))
    scanner = Grid(scanner.shape, np.linalg.inv(known) @ affine @ np.diag([0.5, 0.5, 0.5, 1]))
    spacing = np.linalg.norm(scanner.affine[:3, :3], axis=0)
    straight = np.diag([*spacing, 1.0])  # the scan's own axes: known is in them
    straight[:3, 3] = scanner.affine[:3, 3]
    voxel = np.linalg.inv(affine) @ known @ straight
    moved = crops.ndimage.affine_transform(
        data, voxel[:3, :3], voxel[:3, 3], scanner.shape, order=1
    )
    result = preprocess.register(moved.astype(np.float32), straight, reference)
    box = np.array([[x, y, z, 1] for x in (-60, 60) for y in (-90, 60) for z in (-40, 60)]).T
    back = result @ np.linalg.inv(known) @ box
    assert np.abs(back - box).max() < 3.0


def test_radial_power_of_white_noise_is_its_variance():
    noise = 0.3 * torch.randn(32, 40, 36, generator=torch.Generator().manual_seed(0))
    sums, counts = spectra.radial_power(noise, 1.0)
    assert float(counts.sum()) == noise.numel()
    wide = counts > 500
    assert torch.allclose((sums / counts)[wide], torch.tensor(0.09).double(), rtol=0.25)
    half = noise.clone()
    half[16:] = 0  # a mask of one half: corrected by its share
    sums, counts = spectra.radial_power(half, 0.5)
    assert torch.allclose((sums.sum() / counts.sum()), torch.tensor(0.09).double(), rtol=0.05)


class Shrink:
    """A denoiser that halves everything: its error is known."""

    def denoise(self, x, sigma, *, coordinates, contrast):
        assert coordinates.shape == (3, *x.shape[2:])
        return x / 2


def test_gain_and_spectrum_of_a_known_denoiser():
    brain = toy_brain(split="validation")
    image = brain.data / preprocess.UNIT
    inside = image > 0
    table = spectra.gains(Shrink(), [brain], sigmas=(0.5,))
    signal = (image[inside] ** 2).mean() / 4  # error: (sigma n - x) / 2
    assert table["T1w"]["0.5"] == pytest.approx((0.25 + signal / 0.5**2) ** 0.5, rel=0.05)
    measured = spectra.measure_spectra(Shrink(), [brain], sigmas=(3.0, 10.0), limit=1)
    assert isinstance(measured["T1w"], ErrorSpectrum)
    high = measured["T1w"].variance(10.0, torch.tensor([0.3, 0.5]))
    assert torch.allclose(high, torch.tensor(25.0), rtol=0.1)  # the image is smooth: noise alone


def test_skull_stripped_brains_need_antspyx(monkeypatch):
    monkeypatch.setattr(preprocess, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="antspyx is needed"):
        preprocess.register(np.zeros((4, 4, 4), np.float32), np.eye(4), (None, None))
