# SPDX-License-Identifier: Apache-2.0
"""``brainprior evaluate``: cases, penalties, records, resuming, tables."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import ndimage

from brainprior_bids.cli import evaluate as command
from brainprior_bids.cli.run import main
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.weights import FOLDER, load_prior, sha256_file
from brainprior_bids.evaluation import perceptual, protocol, tables
from brainprior_bids.evaluation.metrics import crps
from brainprior_bids.evaluation.protocol import Condition, Participant, make_case
from brainprior_bids.evaluation.stamp import read_stamp


def toy_participant(name="01", contrast="T1w", seed=0):
    """Two tissues with a folded border in a ball."""
    rng = np.random.default_rng(seed)
    shape = (56, 60, 52)
    away = np.indices(shape) - np.array(shape)[:, None, None, None] / 2
    inside = (away**2).sum(0) < 25**2
    folds = ndimage.gaussian_filter(rng.normal(size=shape), 3) > 0
    texture = rng.normal(0, 0.02, shape)
    data = np.where(inside, np.where(folds, 0.95, 0.6) + texture, 0).astype(np.float32)
    structures = np.where(inside, np.where(folds, 2, 3), 0).astype(np.int16)
    to_mni305 = np.eye(4)
    to_mni305[:3, 3] = -28, -40, -10
    return Participant(name, contrast, data, inside, structures, to_mni305)


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
    # a voxel's place in MNI305 is that of the participant's own voxel
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
    assert sd[0] > sd[2]  # the end of the field of view is known least


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
    figures = record["methods"]
    assert figures["tv"]["psnr_db"] > figures["linear"]["psnr_db"]  # it knows the weights
    for row in figures.values():
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


@pytest.fixture
def ready(tmp_path):
    """Sources whose participants are already prepared."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for seed, name in enumerate(("01", "02", "03")):
        path = data / f"sub-{name}_T1w.nii.gz"
        path.write_bytes(name.encode())
        toy_participant(name, seed=seed).save(out / "participants" / f"{name}_T1w.npz")
        mark = command._mark(
            source=sha256_file(path),
            contrast="T1w",
            parcellation=sha256_file(FOLDER / "parcellation.safetensors"),
        )
        note = {"fingerprint": mark, "source": path.name}
        (out / "participants" / f"{name}_T1w.json").write_text(json.dumps(note))
    words = (
        f"evaluate {data} {out} --choose-label 03 --studies restoration --spacing 5 --noise 0.01"
    )
    words += " --n-samples 2 --n-steps 3 --crop 32 32 40 --nprocs 1"
    return out, words.split()


def test_the_command_measures_once_and_writes_tables(ready, capsys):
    out, words = ready
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "### T1w, 1 × 1 × 5 mm, noise 0.01, 2 participants" in shown
    assert "tuned on 03" in shown
    paths = sorted((out / "results" / "restoration").glob("*.json"))
    assert [path.name for path in paths] == [f"0{n}_T1w_5mm-noise0.01.json" for n in (1, 2)]
    records = [json.loads(path.read_text()) for path in paths]
    assert [r["width"] for r in records] == [1.1, 0.9]
    gain = [
        r["methods"]["restored"]["psnr_db"] - r["methods"]["cubic"]["psnr_db"] for r in records
    ]
    assert f"minus cubic, paired: PSNR {np.mean(gain):+.2f} ± {np.std(gain, ddof=1):.2f}" in shown
    assert len((out / "results.tsv").read_text().splitlines()) == 1 + 2 * len(protocol.METHODS)
    for name in ("restoration.png", "restoration_histograms.png"):
        assert (out / name).stat().st_size > 5000
    written = [path.stat().st_mtime_ns for path in paths]
    paths[0].unlink()
    assert main(words) == 0  # goes on: only what is missing
    assert paths[1].stat().st_mtime_ns == written[1]
    again = json.loads(paths[0].read_text())
    assert again["methods"] == records[0]["methods"]
    assert main([*words, "--random-seed", "1"]) == 0  # another condition: done again
    assert paths[1].stat().st_mtime_ns != written[1]


def test_the_documentations_tables_are_of_this_command_alone(ready, tmp_path, capsys):
    words = ready[1]
    assert main([*words, "--noise", "0.02"]) == 0  # in the same folder
    asked = [*words, "--tables", str(tmp_path / "pages")]
    assert main([*asked, "--tables-only"]) == 2
    assert "2 of 2 results for --tables are missing" in capsys.readouterr().err
    assert main(asked) == 0
    (page,) = (tmp_path / "pages" / "tables").iterdir()
    assert page.name == "restoration.md"
    text = page.read_text()
    stamp = read_stamp(text, page.name)
    assert stamp.weights == sha256_file(FOLDER / "prior.safetensors")[:12]
    assert (stamp.participants, stamp.maps) == (2, 0)
    assert stamp.command.startswith("brainprior evaluate data out --choose-label 03 --studies")
    assert stamp.command.endswith("--nprocs 1 --tables pages")
    assert str(tmp_path) not in text
    assert "| T1w, 5 mm, noise 0.01 |" in text
    assert "noise 0.02" not in text
    assert "tuned on 03." in text
    page.unlink()
    assert main([*asked, "--tables-only"]) == 0
    assert page.read_text() == text  # the same day and command


def test_a_quick_run_is_one_job_unless_told_otherwise(ready):
    data, out = (word for word in ready[1][1:3])
    args = command.parse([data, out, "--quick"])
    ((source, condition),) = command.conditions(args, command.find_sources(args))
    assert (source.name, condition.name) == ("01", "5mm-noise0.01")
    assert (condition.study, condition.n_samples, args.nprocs) == ("restoration", 4, 1)
    more = ["--participant-label", "02", "01", "--choose-label", "03", "--noise", "0.05"]
    args = command.parse([data, out, "--quick", *more])
    sources = command.find_sources(args)
    assert [(s.name, s.choosing) for s in sources] == [("01", False), ("03", True)]
    assert [c.noise_sd for _, c in command.conditions(args, sources)] == [0.05]
    with pytest.raises(SystemExit):  # a table of one participant does not enter the pages
        command.parse([data, out, "--quick", "--tables", "docs"])


def test_a_failed_job_does_not_stop_the_others(ready, monkeypatch):
    out, words = ready
    measure = protocol.measure

    def fails(participant, *args, **kwargs):
        if participant.name == "01":
            raise UsageError("no")
        return measure(participant, *args, **kwargs)

    monkeypatch.setattr(protocol, "measure", fails)
    assert main([*words, "--tables", str(out)]) == 1
    assert not (out / "tables").exists()  # a participant would be missing
    assert [p.name[:2] for p in (out / "results" / "restoration").glob("*.json")] == ["02"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--participant-label", "03"], "cannot be in both the test"),
        (["--participant-label", "77"], "no participant 77"),
        (["--maps", "training_seg_18"], "need --labels"),
        (["-m", "FLAIR"], "no scan of the test set"),
        (["--prior", "nowhere"], "expected a weights file"),
    ],
)
def test_what_cannot_be_evaluated_is_said(ready, capsys, more, text):
    assert main([*ready[1], *more]) != 0
    assert text in capsys.readouterr().err


def test_tables_without_results_are_a_usage_error(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path), str(tmp_path), "--tables-only"]) == 2
    assert "no results" in capsys.readouterr().err


def test_every_study_is_planned(ready):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([str(ready[0]), str(ready[0])])
    sources = [command.Source("", name, "T1w", False, name == "3") for name in "123"]
    sources.append(command.Source("", "map", "T2w", True, False))
    found = list(command.conditions(args, sources))
    count = {s: sum(c.study == s for _, c in found) for s in tables.STUDIES}
    variants = len(command.ABLATIONS)
    assert count == {
        "restoration": 2 * 3 * 2 + 3,
        "low-field": 2,
        "ablation": 2 * variants,
        "segmentation": 3,
    }
    assert not any(source.name == "3" for source, _ in found)
    assert {c.width for _, c in found} == {0.9, 1.1}
    assert all(c.crop_mm is None for _, c in found if c.study == "segmentation")


def test_ablations_and_segmentation_have_tables(tmp_path):
    options = {"prior": load_prior(), "penalties": protocol.UNTUNED}
    record = protocol.measure(toy_participant(), SMALL, **options)
    mean = protocol.measure(
        toy_participant(), dataclasses.replace(SMALL, sampler="mean"), **options
    )
    facts = {"synthetic": False, "prior_sha256": "ab" * 32, "tuned_on": []}
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
    assert (tmp_path / "segmentation.png").stat().st_size > 3000
