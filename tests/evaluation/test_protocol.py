# SPDX-License-Identifier: Apache-2.0
"""Degraded cases, penalties, records, and the tables of records."""

import dataclasses
import json
import math

import numpy as np
import pytest
from participants import toy_participant

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.weights import load_prior
from brainprior_bids.evaluation import perceptual, protocol, tables
from brainprior_bids.evaluation.metrics import crps
from brainprior_bids.evaluation.protocol import Condition, make_case

SMALL = Condition(n_samples=2, n_steps=3, crop_mm=(32, 32, 40))


def test_a_whole_scan_is_the_truth_averaged_by_the_weights():
    participant = toy_participant()
    condition = dataclasses.replace(SMALL, noise_sd=1e-6, width=0.9, crop_mm=None)
    case = make_case(participant, condition)
    assert case.truth.data.shape[2] % 5 == 0
    assert case.scan.grid.one_millimetre() == case.truth.grid
    expected = np.tensordot(case.truth.data, case.slice_weights, axes=(2, 1))
    assert np.abs(case.scan.data - expected).max() < 1e-4
    share = np.tensordot(case.inside.astype(float), case.slice_weights, axes=(2, 1))
    assert np.abs(case.mask - share).max() < 1e-5
    assert np.array_equal(case.judged, case.inside)


def test_a_block_is_a_part_of_the_whole_and_its_rim_is_not_judged():
    participant = toy_participant()
    whole = make_case(participant, dataclasses.replace(SMALL, crop_mm=None))
    block = make_case(participant, SMALL)
    assert block.truth.data.shape == (32, 32, 40)
    assert block.scan.data.shape == (32, 32, 8)
    start = np.round(np.linalg.inv(whole.truth.grid.affine) @ block.truth.grid.affine[:, 3])[:3]
    i, j, k = start.astype(int)
    assert np.array_equal(block.truth.data, whole.truth.data[i : i + 32, j : j + 32, k : k + 40])
    assert np.array_equal(
        block.scan.data, whole.scan.data[i : i + 32, j : j + 32, k // 5 : k // 5 + 8]
    )
    edge = np.argwhere(block.judged)
    assert edge.min(0).tolist() == [7, 7, 8]
    assert edge.max(0).tolist() == [24, 24, 31]
    # a voxel's MNI305 position is that of the participant's voxel
    at = block.to_mni305 @ block.truth.grid.affine @ [0, 0, 0, 1]
    own = participant.to_mni305 @ [*(start - protocol.SURROUND_MM), 1]
    assert np.allclose(at, own)
    with pytest.raises(UsageError, match="larger --crop"):
        make_case(participant, dataclasses.replace(SMALL, crop_mm=(14, 32, 40)))


def test_coarse_planes_lie_on_whole_millimetres():
    case = make_case(toy_participant(), dataclasses.replace(SMALL, in_plane_mm=1.6))
    assert case.scan.grid.one_millimetre() == case.truth.grid
    assert np.allclose(case.scan.grid.spacing_mm, [1.6, 1.6, 5])
    again = protocol.in_slices(case)
    assert again.shape == (*case.truth.data.shape[:2], case.scan.data.shape[2])
    assert [protocol.period(mm) for mm in (1.6, 2.5, 3, 7)] == [8, 5, 3, 7]
    with pytest.raises(UsageError, match="whole number"):
        protocol.period(math.pi)


def test_crps_of_a_normal_law_agrees_with_its_samples():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(4, 4, 6)).astype(np.float32)
    inside = np.ones(truth.shape, bool)
    mean = np.zeros_like(truth)
    sd = np.linspace(0.5, 2, 6)
    draws = mean + sd * rng.normal(size=(4000, *truth.shape))
    found = protocol.gaussian_crps(mean, sd, truth, inside)
    assert found == pytest.approx(crps(draws, truth, inside), rel=0.02)


def test_the_spread_of_tikhonov_is_that_of_its_gaussian():
    weights = np.kron(np.eye(4), np.full((1, 5), 0.2))
    sd = protocol.tikhonov_sd(weights, 0.01, 0.05)
    assert sd.mean() == pytest.approx(0.05)
    difference = np.diff(np.eye(20), axis=0)
    covariance = np.linalg.inv(weights.T @ weights / 0.01 + difference.T @ difference)
    assert np.allclose(sd**2 / sd[0] ** 2, np.diag(covariance) / covariance[0, 0])
    assert sd[0] > sd[2]  # the error is largest at the end of the field of view


def test_penalties_are_those_of_the_least_mean_error():
    first = {"tikhonov": {"0.1": 1.0, "0.2": 2.0}, "tv": {"1": 5.0, "2": 4.0}}
    second = {"tikhonov": {"0.1": 4.0, "0.2": 2.0}, "tv": {"1": 1.0, "2": 3.0}}
    spreads = {f"0.2 {s}": abs(s - 0.07) for s in protocol.SPREADS}
    found = protocol.choose([{**first, "spread": spreads}, {**second, "spread": spreads}])
    assert found == {"tikhonov": 0.2, "tv": 1.0, "spread": 0.07}
    table = protocol.tune(toy_participant(), SMALL)
    assert set(table["tv"]) == {str(p) for p in protocol.TV_PENALTIES}
    best = protocol.choose([table])
    assert table["tv"][str(best["tv"])] == min(table["tv"].values())


def test_a_record_holds_every_method(tmp_path):
    picture = tmp_path / "a.png"
    record = protocol.measure(
        toy_participant(), SMALL, prior=load_prior(), penalties=protocol.UNTUNED, picture=picture
    )
    json.dumps(record)
    assert list(record["methods"]) == list(protocol.METHODS)
    metrics = record["methods"]
    assert metrics["tv"]["psnr_db"] > metrics["linear"]["psnr_db"]  # it is given the weights
    for row in metrics.values():
        assert 0 < row["ssim"] < 1
        assert row["lpips"] is None
    assert record["sampler_used"] == "conditional"
    assert record["truth"]["white"] == pytest.approx(0.95, abs=0.002)
    assert record["truth"]["cnr"] == pytest.approx(0.35 / 0.02, rel=0.05)
    assert sum(record["histograms"]["truth"]) == record["voxels"]
    assert picture.stat().st_size > 1000


def test_a_bias_field_is_estimated_on_the_whole_scan():
    condition = dataclasses.replace(SMALL, bias_sd=0.1, field="n4")
    participant = toy_participant()
    case = make_case(participant, condition)
    plain = make_case(participant, SMALL)
    field = np.log(np.maximum(case.scan.data, 0.1) / np.maximum(plain.scan.data, 0.1))
    inner = case.mask > 0.99
    assert np.corrcoef(field[inner], case.log_bias[inner])[0, 1] > 0.7


def test_lpips_is_left_out_without_a_download(monkeypatch, tmp_path):
    perceptual._network.cache_clear()
    monkeypatch.setattr(perceptual, "find_spec", lambda name: True)
    monkeypatch.setattr(perceptual.torch.hub, "get_dir", lambda: str(tmp_path))
    image = np.ones((4, 4, 4), np.float32)
    assert perceptual.lpips_distance(image, image, image > 0) is None
    perceptual._network.cache_clear()


def test_ablations_and_segmentation_have_tables(tmp_path):
    options = {"prior": load_prior(), "penalties": protocol.UNTUNED}
    record = protocol.measure(toy_participant(), SMALL, **options)
    mean = protocol.measure(
        toy_participant(),
        dataclasses.replace(SMALL, sampler="mean"),
        picture=tmp_path / "mean.png",
        **options,
    )
    assert (tmp_path / "mean.png").stat().st_size > 10_000  # without a sample
    facts = {"synthetic": False, "prior_sha256": "ab" * 32, "tuned_on": [], "case_seconds": 90.0}
    parts = {
        method: {
            "dice": {"3": 0.5 + at / 10, "42": 0.5, "2": 0.9},
            "volume_error": {"3": -0.1, "42": 0.1, "2": 0.0},
            "mean_dice": 0.6 + at / 10,
            "mean_absolute_volume_error": 0.0667,
        }
        for at, method in enumerate(("true", "degraded", "cubic", "tv"))
    }
    parts |= {"restored": parts["tv"], "sample": parts["cubic"]}
    for study, more in (
        ("ablation", {**mean, "variant": "sampler mean"}),
        ("ablation", {"variant": "default settings"}),
        ("ablation", {"variant": "field by N4"}),
        ("segmentation", {"segmentation": parts}),
    ):
        path = tmp_path / "results" / study / f"{more.get('variant', 'x')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**record, **more, **facts, "study": study}))
    text = tables.write_tables(tmp_path).read_text()
    shown = record["methods"]["restored"]
    assert (
        f"| default settings | conditional | {shown['mae']:.4f} | {shown['psnr_db']:.2f} |" in text
    )
    shown = mean["methods"]["restored"]
    row = f"| sampler mean | mean | {shown['mae']:.4f} | {shown['psnr_db']:.2f} |"
    (row,) = (line for line in text.splitlines() if line.startswith(row))
    assert row.split(" | ")[5:7] == ["n/a", "n/a"]  # no sample, no CRPS
    assert f"| cubic, field by N4 | | {record['methods']['cubic']['mae']:.4f} |" in text
    assert "| thick slices, unprocessed | 0.700 | 0.550 | 0.900 | n/a | 6.7 |" in text
    assert "| ablation | 3 | 4.5 |" in text
    assert "| all | 4 | 6.0 |" in text
    assert (tmp_path / "segmentation.png").stat().st_size > 3000
