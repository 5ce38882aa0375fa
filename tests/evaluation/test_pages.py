# SPDX-License-Identifier: Apache-2.0
"""The documentation's tables, from made-up records."""

import json

import numpy as np
import pytest

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.evaluation import plots
from brainprior_bids.evaluation.metrics import DEPTHS
from brainprior_bids.evaluation.pages import write_pages
from brainprior_bids.evaluation.stamp import MEASURED, read_stamp
from brainprior_bids.evaluation.studies import coverage

PSNR = {"linear": 20.0, "cubic": 21.0, "tikhonov": 22.0, "tv": 23.0, "sample": 22.5}


def record(participant="01", *, restored=25.0, **more):
    """A restoration whose restored image has this PSNR; MAE and SSIM follow from the PSNR."""
    psnr = {**PSNR, "restored": restored}
    return {
        "study": "restoration",
        "variant": "",
        "participant": participant,
        "contrast": "T1w",
        "synthetic": False,
        "spacing_mm": 5.0,
        "in_plane_mm": None,
        "noise_sd": 0.01,
        "rician": False,
        "crop_mm": [80, 96, 80],
        "n_samples": 8,
        "n_steps": 12,
        "sampler_used": "conditional",
        "tuned_on": ["04", "05"],
        "prior_sha256": "ab" * 32,
        "methods": {
            method: {
                "psnr_db": value,
                "mae": 1 / value,
                "ssim": value / 100,
                "cnr": 2.0,
                "histogram_distance": 0.01,
            }
            for method, value in psnr.items()
        },
        "truth": {"cnr": 2.25},
        "crps": 0.02,
        "crps_tikhonov": 0.03,
        "error_over_sd": 1.1,
        "residual_ratios": [0.9, 1.0],
        "seconds": 10.0,
        **more,
    }


def written(tmp_path, records, study="restoration"):
    paths = write_pages(records, tmp_path, command="brainprior evaluate", day="2026-01-02")
    (path,) = (path for path in paths if path.stem == study)
    return path.read_text()


def cells(text, start):
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_row_of_the_restoration_table_is_the_means_of_its_participants(tmp_path):
    records = [record("01", restored=25.0), record("02", restored=26.0)]
    text = written(tmp_path, records)
    stamp = read_stamp(text, "restoration.md")
    assert (stamp.weights, stamp.day) == ("abababababab", "2026-01-02")
    assert (stamp.participants, stamp.maps) == (2, 0)
    assert "Weights abababababab, 2026-01-02, 2 participants: `brainprior evaluate`" in text
    assert (
        "Blocks of 80 × 96 × 80 mm; samples per image: 8, of 12 calls each; penalties of Tikhonov "
        "and TV tuned on 04, 05." in text
    )
    row = cells(text, "T1w, 5 mm, noise 0.01")
    assert row[1:6] == ["21.00", "22.00", "23.00", "22.50", "**25.50**"]
    assert row[6:8] == ["+4.50 ± 0.71", "+2.50 ± 0.71"]  # of 4 and 5, of 2 and 3
    share = ((21 / 25 - 1) + (21 / 26 - 1)) / 2
    assert row[8:] == [
        f"{100 * share:+.1f} %", "0.210, 0.230, 0.255", "0.0200, 0.0300", "1.10", "0.95",
    ]  # fmt: skip
    assert len(cells(text, "scan")) == len(row)
    assert "decile" not in text


def test_the_cases_in_which_the_restored_image_is_better_are_counted(tmp_path):
    made = record("map", synthetic=True, contrast="T2w", restored=22.0, crps=0.04, tuned_on=[])
    text = written(tmp_path, [record(), made])
    assert cells(text, "synthetic T2w, 5 mm, noise 0.01")[7] == "-1.00"
    assert "1 participant and 1 label map:" in text
    assert (
        "Of 2 cases (a participant or map in one row), `desc-restored` is better in PSNR, MAE and "
        "SSIM than cubic in 2 and than TV in 1; its CRPS is better than Tikhonov's in 1." in text
    )


def test_a_predicted_sd_has_its_crps_and_its_deciles(tmp_path):
    predicted = {"crps_predicted": 0.025}
    first = {**predicted, "error_over_sd_by_decile": [0.5] * 9 + [1.5]}
    second = {**predicted, "error_over_sd_by_decile": [0.7] * 9 + [1.3]}
    other = {**predicted, "error_over_sd_by_decile": [9.0] * 10}
    records = [record("01", **first), record("02", **second)]
    text = written(tmp_path, [*records, record("01", noise_sd=0.03, **other)])
    assert cells(text, "scan")[10] == "CRPS: samples, predicted SD, Tikhonov"
    assert cells(text, "T1w, 5 mm, noise 0.01")[10] == "0.0200, 0.0250, 0.0300"
    shown = ", ".join(["0.60"] * 9 + ["1.40"])
    line = f"RMS error / predicted SD by decile of the SD, T1w, 5 mm, noise 0.01: {shown}"
    assert text.splitlines()[-1] == line


def test_without_samples_nothing_is_said_of_them(tmp_path):
    mean = record(sampler_used="mean", crps=None)
    del mean["methods"]["sample"]
    row = cells(written(tmp_path, [mean]), "T1w, 5 mm, noise 0.01")
    assert row[4] == "n/a"
    assert row[10] == "n/a, 0.0300"


def test_the_other_studies_have_a_file_each(tmp_path):
    low = {"study": "low-field", "in_plane_mm": 1.6, "noise_sd": 0.05, "rician": True}
    parts = {
        method: {"dice": {"3": 0.8}, "mean_dice": 0.75, "mean_absolute_volume_error": 0.02}
        for method in ("degraded", "cubic", "tv", "restored", "sample")
    }
    records = [
        record("01", **low, restored=24.0),
        record("02", **low, restored=22.0),
        record("01", study="ablation", variant="default settings"),
        record("01", study="ablation", variant="5 calls", n_steps=5),
        record("01", study="segmentation", crop_mm=None, segmentation=parts),
    ]
    text = written(tmp_path, records, "low-field")
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == [
        "ablation.md", "low-field.md", "segmentation.md",
    ]  # fmt: skip
    assert "T1w, 1.6 × 1.6 × 5 mm, Rician noise 0.05, 2 participants:" in text
    assert "| SSIM | grey-white CNR (truth 2.25) | histogram distance |" in text
    assert cells(text, "`desc-restored` (8)")[2] == "23.00 ± 1.41"
    assert "+2.00 ± 1.41 dB over cubic (better in 2 of 2), +0.00 ± 1.41 dB over TV" in text
    assert "(better in 1 of 2). CRPS 0.020 (tuned Tikhonov posterior 0.030)" in text
    text = written(tmp_path, records, "ablation")
    assert "1 participant; each row changes one setting:" in text
    assert cells(text, "5 calls")[3] == "25.00"
    text = written(tmp_path, records, "segmentation")
    assert text.splitlines()[4].startswith("Whole brains; ")
    assert cells(text, "thick slices, unprocessed")[1:3] == ["0.750", "0.800"]


def test_records_of_two_priors_make_no_table(tmp_path):
    with pytest.raises(UsageError, match="one prior for --tables, got abababababab, cdcdcdcdcdcd"):
        write_pages([record(), record("02", prior_sha256="cd" * 32)], tmp_path, command="", day="")
    assert not list(tmp_path.iterdir())


def test_the_stamp_has_the_time_of_all_cases_if_it_is_known(tmp_path):
    records = [record(f"0{n}", case_processor_seconds=90.0) for n in (1, 2)]
    path = tmp_path / "tables" / "restoration.md"
    write_pages(records, tmp_path, command="", day="2026-01-02", nprocs=2)
    stamp = read_stamp(path.read_text(), path.name)
    assert (stamp.minutes, stamp.processes) == (3.0, 2)
    write_pages([*records, record("03")], tmp_path, command="", day="2026-01-02")
    assert read_stamp(path.read_text(), path.name).minutes is None


def test_a_study_of_the_parcellation_has_its_weights(tmp_path):
    row = {"Dice of the structures": 0.6}
    one = {"study": "alignment", "participant": "01", "synthetic": False, "choosing": False,
           "parcellation_sha256": "cd" * 32, "template": {"affine": row}}  # fmt: skip
    text = written(tmp_path, [one, record()], "alignment")
    stamp = read_stamp(text, "alignment.md")
    assert (stamp.network, stamp.weights) == ("parcellation", "cdcdcdcdcdcd")
    assert cells(text, "affine") == ["affine", "0.6000", "1"]
    assert "separately" not in text  # no T2w


def coverage_record(participant, errors, *, choosing=False, sha256="ab" * 32):
    """Eight samples whose spread in every cube is 1; the errors are the truth's distances."""
    return {
        "study": "coverage", "participant": participant, "contrast": "T1w", "synthetic": False,
        "choosing": choosing, "spacing_mm": 5.0, "noise_sd": 0.01, "crop_mm": [80, 96, 80],
        "n_samples": 8, "n_steps": None, "sampler_used": "conditional", "prior_sha256": sha256,
        "cubes": {"error": errors, "sd": [1.0] * len(errors)},
    }  # fmt: skip


def lesion_record(participant, spacing, kept):
    """Remaining shares of a contrast of +-30 % in spheres of 8 mm."""
    rows = [
        {"size_mm": 8.0, "contrast": c, "restored": share, "interpolated": 0.5,
         "sampler": "conditional"}
        for c, share in zip((-0.3, 0.3), kept, strict=True)
    ]  # fmt: skip
    return {
        "study": "lesions", "participant": participant, "contrast": "T1w", "synthetic": False,
        "choosing": False, "spacing_mm": spacing, "sizes_mm": [8.0], "contrasts": [-0.3, 0.3],
        "crop_mm": 64.0, "n_samples": 2, "kept": rows, "prior_sha256": "ab" * 32,
    }  # fmt: skip


def test_coverage_counts_intervals_that_hold_the_truth(tmp_path):
    """Student's t with 7 degrees: 0.711 and 1.895, times sqrt(1 + 1/8) = 1.061."""
    records = [
        coverage_record("01", [0.7, 0.8, 1.9, 2.1]),  # 1 of 4 within 0.754, 3 within 2.010
        coverage_record("02", [0.0, 0.0, 0.0, 3.0]),  # 3 and 3
    ]
    text = written(tmp_path, records, "coverage")
    assert read_stamp(text, "coverage.md").participants == 2
    (row,) = (line for line in text.splitlines() if line.startswith("| 5 mm, 1 % |"))
    row = [cell.strip() for cell in row.strip("|").split("|")]
    assert row[1:5] == ["4 cubes of 8 mm", "0", "50 % [25, 75]", "75 % [75, 75]"]
    z = [np.sqrt((0.7**2 + 0.8**2 + 1.9**2 + 2.1**2) / 4), 1.5] / np.sqrt(1 + 1 / 8)
    assert row[5] == f"{z.mean():.2f}"


def test_the_own_error_is_of_the_validation_set(tmp_path):
    chose = coverage_record("04", [9.0, -9.0], choosing=True)
    text = written(tmp_path, [coverage_record("01", [0.7]), chose], "coverage")
    assert read_stamp(text, "coverage.md").participants == 1
    assert "estimated in 04." in text
    rows = [line for line in text.splitlines() if line.startswith("| 5 mm, 1 % |")]
    assert [row.split("|")[3].strip() for row in rows] == ["0", "0.0500"]  # the largest candidate


@pytest.mark.parametrize("true", [0.0, 0.02])
def test_the_own_error_is_found_by_its_likelihood(true):
    """Errors of 4000 regions with SD 0.01 between samples, and ``true`` common to all."""
    total = np.sqrt(0.01**2 * 9 / 8 + true**2)
    errors = total * np.random.default_rng(0).standard_t(7, 4000)
    found = coverage.own_error([{"error": errors.tolist(), "sd": [0.01] * 4000}], 8)
    assert found == pytest.approx(true, rel=0.1, abs=0.003)


def test_the_figures_of_the_reports_are_written_in_a_checkout(tmp_path):
    """The parts of other studies are unchanged."""
    measured = tmp_path / MEASURED
    measured.parent.mkdir(parents=True)
    lesions = {"prior_sha256": "cd" * 32, "how": "before", "rows": []}
    measured.write_text(json.dumps({"coverage": {"prior_sha256": "old"}, "lesions": lesions}))
    records = [coverage_record(f"0{n}", [0.1, 5.0]) for n in (1, 2)]
    paths = write_pages(records, tmp_path / "docs", command="brainprior evaluate", day="")
    assert paths == [tmp_path / "docs" / "tables" / "coverage.md", measured]
    parts = json.loads(measured.read_text())
    assert parts["lesions"] == lesions
    assert parts["coverage"] == {
        "prior_sha256": "ab" * 32,
        "how": "two participants, T1w, eight samples of conditional",
        "of": {"contrast": "T1w", "sampler": "conditional", "task": "restore"},
        "rows": [{"scans": "5 mm, 1 %", "of": "cubes of 8 mm", "50": 50, "90": 50}],
    }
    kept = [lesion_record("01", 3.0, (0.91, 0.8)), lesion_record("02", 3.0, (0.85, 0.902))]
    write_pages(kept, tmp_path / "docs", command="brainprior evaluate", day="")
    parts = json.loads(measured.read_text())["lesions"]
    assert parts["how"] == (
        "two participants, T1w, 1 % noise, spheres in white matter, 30 % darker and brighter"
    )
    size = "8 mm across"
    assert parts["rows"] == [{"scans": "3 mm", "size": size, "least": 0.8, "most": 0.91}]
    text = (tmp_path / "docs" / "tables" / "lesions.md").read_text()
    assert cells(text, "3 mm")[2:] == ["0.88 (0.85-0.91)", "0.85 (0.80-0.90)", "0.50 (0.50-0.50)"]


def test_rows_of_a_study_of_the_command_are_means_with_intervals(tmp_path):
    fixed = {"study": "fuse", "contrast": "T1w", "synthetic": False, "choosing": False,
             "spacing_mm": 5.0, "noise_sd": 0.01, "slab_mm": None, "n_samples": 1,
             "prior_sha256": "ab" * 32}  # fmt: skip
    records = [
        {**fixed, "participant": "01", "rows": {"fused": {"MAE": 0.1}, "gain": {"value": 1.0}}},
        {**fixed, "participant": "02", "rows": {"fused": {"MAE": 0.3}, "gain": {"value": 3.0}}},
    ]
    text = written(tmp_path, records, "fuse")
    assert "T1w, whole brains, slices of 5 mm, noise 0.01; samples per image: 1." in text
    assert "| fused | 0.2000 [0.1000, 0.3000] | 2 |" in text
    assert "- gain: 2.0000 [1.0000, 3.0000] (2)" in text


def test_the_plot_shows_each_participant_and_the_mean_gain(tmp_path):
    deciles = {"error_over_sd_by_decile": [1.0] * 10}
    records = [record("01", restored=25.0, **deciles), record("02", restored=26.0, **deciles)]
    paths = write_pages(records, tmp_path, command="brainprior evaluate", day="2026-01-02")
    (image,) = (path for path in paths if path.suffix == ".png")
    assert image == tmp_path / "images" / "evaluation-restoration.png"
    assert image.stat().st_size > 5000
    cubic, tv, calibration = plots.forest(records).axes
    for axes, values in ((cubic, [4, 5]), (tv, [2, 3])):
        assert axes.lines[0].get_xdata().tolist() == values
        assert axes.lines[1].get_xdata().tolist() == [np.mean(values)]
    assert calibration.lines[0].get_ydata().tolist() == [1.0] * 10


def test_the_plot_of_depths_joins_the_means():
    rows = {key: 0.1 * n for n, key in enumerate(DEPTHS, 1)}
    methods = {"cubic": rows, "tv": rows, "restored": {k: v / 2 for k, v in rows.items()}}
    (axes,) = plots.depth([{"methods": methods}, {"methods": methods}]).axes
    means = [line.get_ydata() for line in axes.lines if line.get_label() == "brainprior"]
    np.testing.assert_allclose(means, [[0.05, 0.1, 0.15, 0.2, 0.25]])


def test_time_and_quality_has_the_variants_of_the_sampler_alone():
    records = [
        record(variant=variant, restored=psnr, seconds=s)
        for variant, psnr, s in (
            ("default settings", 25.0, 40.0), ("sampler mean", 24.5, 4.0), ("field ignored", 20, 9)
        )
    ]  # fmt: skip
    (axes,) = plots.time_and_quality(records).axes
    assert {t.get_text() for t in axes.texts} == {"default settings", "sampler mean"}
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines[:2]}
    assert points == {(40.0, 25.0), (4.0, 24.5)}
