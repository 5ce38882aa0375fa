# SPDX-License-Identifier: Apache-2.0
"""Samples without data: structures, z-scores and the distance from real brains."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from participants import toy_participant

from brainprior_bids.bids.qc import UNCERTAIN, reference
from brainprior_bids.cli import evaluate as command
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.parcellation_network import normalise_intensity
from brainprior_bids.engine.weights import find_weights
from brainprior_bids.evaluation.metrics import frechet_distance
from brainprior_bids.evaluation.studies import samples
from brainprior_bids.evaluation.studies.base import Bench, Source, parcellation
from brainprior_bids.training import samples as drawing


def test_z_scores_are_those_of_the_reports():
    norms = reference()
    volumes = {
        name: math.exp(known["log_mean"] + n * 0.1 * known["log_sd"])
        for n, (name, known) in enumerate(norms.items())
    }
    del volumes["Left-Putamen"]
    found = samples.z_scores(volumes)
    assert next(iter(found)) == "Brain"
    assert set(found) == set(norms) - set(UNCERTAIN)
    assert found.pop("Left-Putamen") is None
    place = list(norms)
    for name, z in found.items():
        assert z == pytest.approx(0.1 * place.index(name), abs=1e-6)


def test_features_are_the_bottleneck_in_blocks_that_are_mostly_brain():
    network = parcellation()
    rng = np.random.default_rng(0)
    inside = np.zeros((72, 64, 64), bool)
    inside[4:48, :, 10:64] = True  # 28 and 16 of 32 along i; 22 and 32 along k
    image = np.where(inside, rng.uniform(0.3, 1, inside.shape), 0).astype(np.float32)
    seen = []
    handle = network.middle.register_forward_hook(lambda _, __, output: seen.append(output))
    x = torch.zeros(1, 1, 96, 64, 64)
    x[0, 0, :72] = torch.from_numpy(image)
    small = torch.nn.functional.avg_pool3d(x, 2)
    with torch.no_grad():
        network(normalise_intensity(small))
    handle.remove()
    features = samples.block_features(image, inside, network)
    assert features.shape == (4, network.widths[-1])  # half of a block is not enough
    np.testing.assert_allclose(features, seen[0][0, :, 0].flatten(1).T.numpy(), rtol=1e-5)


def test_a_brain_is_labelled_and_noise_is_no_brain(demo_head, monkeypatch, tmp_path):
    brain = np.where(demo_head.brain, demo_head.truth, 0).astype(np.float32)
    brain /= np.percentile(brain[brain > 0], 99)
    images = {0: brain, 1: np.random.default_rng(0).uniform(0, 1, (64, 64, 64))}
    asked = []

    def unconditional(prior, contrast, *, seed, n_steps):
        asked.append((contrast, seed, n_steps))
        return torch.from_numpy(images[seed].astype(np.float32))

    monkeypatch.setattr(samples, "unconditional", unconditional)
    monkeypatch.setattr(Bench, "load_prior", lambda _: None)
    bench = Bench(tmp_path, "cpu", tmp_path, picture=tmp_path / "sample.png")
    record = samples.measure(toy_participant(), samples.Settings(1, 20, 0), bench)
    assert (tmp_path / "sample.png").stat().st_size > 5000
    assert asked == [("T1w", 0, 20)]
    assert record["brain_ml"] == pytest.approx(1850, abs=60)  # of the demo, docs/evaluation.md
    assert record["z"]["Brain"] == pytest.approx(3.9, abs=0.3)
    assert record["block_mm"] == 32
    assert 30 < len(record["features"]) < record["brain_ml"] * 1000 / 32**3 * 1.5
    noise = samples.measure(toy_participant(), samples.Settings(2, 20, 1), bench)
    assert "parcellate: expected a brain" in noise["problem"]
    assert "z" not in noise


def test_a_small_sample_is_drawn_from_the_shipped_prior(monkeypatch, tmp_path):
    affine = np.eye(4)
    affine[:3, 3] = -16, -30, 0
    monkeypatch.setattr(drawing, "HEAD", Grid((32, 32, 32), affine))
    bench = Bench(find_weights(None, kind="prior"), "cpu", tmp_path)
    record = samples.measure(toy_participant(), samples.Settings(1, 3, 0), bench)
    assert record["sampling_seconds"] > 0
    assert "parcellate: expected a brain" in record["problem"]  # 33 ml


def test_real_brains_are_the_reference_and_the_last_are_the_floor():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 30, 4))
    rows[4:] += 3  # the samples
    parts = [{"block_mm": 32, "features": part.tolist()} for part in rows]
    brains = [{"participant": f"0{n}", **part} for n, part in enumerate(parts[:4], 1)]
    drawn = [{"number": n, **part} for n, part in enumerate(parts[4:], 1)]
    text = samples.distances([*drawn, {"number": 3, "problem": "none"}], brains)
    others = np.concatenate(rows[:2])
    far, near = (frechet_distance(np.concatenate(p), others) for p in (rows[4:], rows[2:4]))
    assert text[0] == "Fréchet distance from two real brains (60 blocks of 32 mm, 4 features):"
    assert text[2] == f"- two samples (60 blocks): {far:.3g}"
    assert text[3] == f"- two other real brains (03, 04; 60 blocks): {near:.3g}"
    assert far > 30 > 1 > near  # |3, 3, 3, 3|² = 36
    assert "not computed" in samples.distances(drawn, brains[:1])[0]
    assert "not computed" in samples.distances([], brains)[0]


def test_the_table_has_a_row_per_sample_and_one_for_real_brains():
    usual = {"Brain": 0.2, "Left-Putamen": 1.0, "Right-Putamen": -2.0, "Brain-Stem": 0.0}
    odd = {**usual, "Left-Putamen": None, "Right-Putamen": -3.4}
    fixed = {"contrast": "T1w", "n_steps": 20, "sampling_seconds": 300.0, "features": [[0.0]]}
    records = [
        {**fixed, "number": 0, "participant": "01", "brain_ml": 1500.0, "z": usual},
        {
            **fixed,
            "number": 2,
            "participant": "01",
            "problem": "parcellate: found 168 ml. Check it.",
        },
        {**fixed, "number": 1, "participant": "01", "brain_ml": 1400.4, "z": odd},
    ]
    del records[1]["features"]
    text = samples.table(records, [])
    assert text[0] == "T1w; samples of 20 calls, 300 s each."
    assert text[4] == (
        "| sample 1 | 1400 | +0.2 | 1 of 3 | 1.70 | Left-Putamen absent, Right-Putamen -3.4 |"
    )
    assert text[5] == "| sample 2 | no brain found: found 168 ml |  |  |  |  |"
    assert (
        text[6] == "| one participant of the test set, mean | 1500 | +0.2 | 3.0 of 3 | 1.00 |  |"
    )
    assert text[-1].startswith("Fréchet distance: not computed")


def test_samples_are_records_of_the_first_participant():
    sources = [
        Source("", "1", "T2w", False, False),
        Source("", "2", "T1w", False, False),
        Source("", "3", "T1w", False, False),
        Source("", "4", "T1w", False, True),
    ]
    args = command.parse(["data", "out", "--study", "samples", "--random-seed", "5"])
    cases, problems = command.plan(args, sources)
    assert problems == []
    names = [(case.source.name, case.settings.name) for case in cases]
    assert names == [
        *(("2", f"sample{n}") for n in range(1, 11)), ("2", "real"), ("3", "real"), ("4", "real")
    ]  # fmt: skip
    assert dataclasses.asdict(cases[1].settings) == {"number": 2, "n_steps": 40, "seed": 6}
    few = command.parse(["data", "out", "--study", "samples", "--quick", "--n-steps", "7"])
    cases, _ = command.plan(few, sources)
    assert [case.settings.n_steps for case in cases if case.settings.number] == [7]
