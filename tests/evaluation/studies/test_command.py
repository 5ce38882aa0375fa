# SPDX-License-Identifier: Apache-2.0
"""Studies of the whole command, which is replaced by one that writes the truth."""

import numpy as np
import pytest
from participants import Answer, toy_participant
from scipy import ndimage

from brainprior_bids.evaluation.metrics import compare
from brainprior_bids.evaluation.scans import Volume, read_image
from brainprior_bids.evaluation.studies import command, fuse, inpaint, refine
from brainprior_bids.evaluation.studies.base import Bench, number_of
from brainprior_bids.evaluation.studies.command import CommandSettings, padded


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "prior.safetensors", "cpu", tmp_path / "work")


@pytest.mark.parametrize(("slab", "planes"), [(None, 52), (20, 20)])
def test_the_margin_and_the_slab_keep_the_place_in_mni305(slab, planes):
    participant = toy_participant()
    own = (20, 30, 26)
    participant.data[own] = 2
    truth = padded(participant, 4.0, slab)
    assert all(n % 4 == 0 for n in truth.data.shape)
    (now,) = np.argwhere(truth.data == 2)
    place = participant.to_mni305 @ [*own, 1]
    assert np.allclose(truth.to_mni305 @ [*now, 1], place)
    (seen,) = np.nonzero(truth.inside.any((0, 1)))
    assert seen[0] >= command.MARGIN
    assert len(seen) <= planes


def test_a_label_that_is_no_number_has_a_seed_too():
    assert number_of("058") == 58
    assert number_of("ab") == 0x6162


def test_a_perfect_filling_has_no_error_and_no_seam(bench, monkeypatch):
    participant = toy_participant()
    settings = inpaint.Settings(1.0, 0.02, 2)
    truth = padded(participant, 1.0)
    scan = inpaint.make_scan(truth, settings, settings.rng(participant))
    answer = Answer(
        Volume(scan.clean, truth.grid), truth.inside, factor={"restored": 1, "sample01": 1.1}.get
    )
    monkeypatch.setattr(command, "run_command", answer)
    rows = inpaint.measure(participant, settings, bench)["rows"]
    assert [name for name, _ in answer.asked] == ["hole-out", "lesion-out", "control-out"]
    for hole in inpaint.PLACES:
        for variant in ("hole", "lesion"):
            row = rows[f"{variant} | mean | {hole}"]
            assert row["MAE"] == pytest.approx(0, abs=1e-6)
            assert row["seam"] == pytest.approx(1, abs=1e-4)
            assert row["off control"] == 0
        where = scan.holes[hole]
        expected = 0.1 * scan.clean[where].mean() / np.percentile(scan.clean[where], 99)
        assert rows[f"control | sample | {hole}"]["MAE"] == pytest.approx(expected, rel=1e-3)
        nearest = rows[f"- | nearest | {hole}"]
        assert nearest["MAE"] > 0.01
    assert not any("average" in label for label in rows)
    # the written image has no noise, so it differs from the scan outside the mask
    assert rows[f"hole: {inpaint.OUTSIDE}"] == {"value": 0.0}


def test_what_lies_under_the_mask_differs_between_the_data_sets(bench, monkeypatch):
    participant = toy_participant()
    settings = inpaint.Settings(4.0, 0.02, 1)
    truth = padded(participant, 4.0)
    answer = Answer(Volume(truth.data, truth.grid), truth.inside)
    monkeypatch.setattr(command, "run_command", answer)
    rows = inpaint.measure(participant, settings, bench)["rows"]
    assert answer.asked[0][1][-4:] == ["--task", "restore", "inpaint", "--save-samples"]
    assert rows["lesion | mean | 20 mm"]["MAE"] == pytest.approx(0, abs=1e-5)
    anat = [bench.folder / v / "sub-01" / "anat" for v in ("hole", "lesion", "control")]
    hole, lesion, control = (read_image(path / "sub-01_T1w.nii.gz").data for path in anat)
    mask = read_image(anat[0] / "sub-01_label-lesion_roi.nii.gz").data > 0
    assert (hole[mask] == 0).all()
    np.testing.assert_allclose(lesion[mask], inpaint.LESION * control[mask], rtol=1e-5)
    assert np.array_equal(hole[~mask], control[~mask])
    scan = inpaint.make_scan(truth, settings, settings.rng(participant))
    assert mask.sum() * 4 >= scan.everywhere.sum()  # every slice that a hole touches


def test_holes_are_spheres_and_a_seam_is_a_step():
    inside = np.ones((120, 120, 120), bool)
    found = inpaint.holes(inside, np.random.default_rng(0))
    for name in ("10 mm", "20 mm", "30 mm"):
        volume = np.pi / 6 * float(name.split()[0]) ** 3
        assert found[name].sum() == pytest.approx(volume, rel=0.03)
    image = np.zeros((6, 6, 6), np.float32)
    where = np.zeros(image.shape, bool)
    where[2:4, 2:4, 2:4] = True
    image[where] = 3
    assert inpaint.seam(image, where, np.ones_like(where)) == 3


def test_a_fused_image_is_compared_with_each_stack_and_their_average(bench, monkeypatch):
    participant = toy_participant()
    settings = CommandSettings(5.0, 0.01, 1)
    truth = padded(participant, 5.0)
    shift = np.eye(4)
    shift[:3, 3] = 2, 0, -1
    off = np.eye(4)
    off[:3, 3] = 0, 0.3, 0.4  # the error of the estimated motion
    monkeypatch.setattr(fuse, "rigid", lambda rng, centre: shift)
    runs = {f"sub-01_acq-{name}_T1w": off @ np.linalg.inv(shift) for name in ("cor", "sag")}
    runs["sub-01_acq-axi_T1w"] = np.eye(4)
    mask = ndimage.binary_erosion(truth.inside)
    answer = Answer(Volume(truth.data, truth.grid), mask, runs=runs)
    monkeypatch.setattr(command, "run_command", answer)
    rows = fuse.measure(participant, settings, bench)["rows"]
    assert [name for name, _ in answer.asked] == ["alone", "fused"]
    assert answer.asked[1][1][-2:] == ["--fuse", "runs"]
    assert list(rows)[:9] == [
        "cubic, axi", "cubic, cor", "cubic, sag", "restored, axi", "restored, cor",
        "restored, sag", "cubic, average of three", "restored, average of three", "fused",
    ]  # fmt: skip
    assert rows["fused"]["MAE"] == pytest.approx(0, abs=1e-5)
    assert rows["restored, axi"]["MAE"] == pytest.approx(
        0, abs=1e-5
    )  # the reference does not move
    assert rows["restored, cor"]["MAE"] > 0.01  # the truth, moved back by another motion
    assert rows["cubic, average of three"]["PSNR, dB"] > rows["cubic, cor"]["PSNR, dB"]
    assert rows["fused, motion found to mm at the worst voxel"]["value"] == pytest.approx(0.5)
    stripped = 1 - mask.sum() / ndimage.binary_fill_holes(truth.inside).sum()
    assert rows["fused, share of the given mask that it strips"]["value"] == pytest.approx(
        stripped, abs=1e-6
    )
    assert rows["fused, residual in noise SDs, mean"]["value"] == 1.25
    best = max(
        row["PSNR, dB"] for name, row in rows.items() if "PSNR, dB" in row and name != "fused"
    )
    assert rows[fuse.GAIN]["value"] == pytest.approx(rows["fused"]["PSNR, dB"] - best)


def test_a_refined_image_is_compared_with_the_scan_alone_and_the_image_itself(bench, monkeypatch):
    participant = toy_participant()
    settings = refine.Settings(4.0, 0.01, 1, slab_mm=24, tools=("smooth",), trusts=(0.1, 0.3))
    truth = padded(participant, 4.0, 24)
    answer = Answer(Volume(truth.data, truth.grid), truth.inside)
    monkeypatch.setattr(command, "run_command", answer)
    rows = refine.measure(participant, settings, bench)["rows"]
    assert [name for name, _ in answer.asked] == [
        "the-scan-alone", "smooth-refined-alone-0.1", "smooth-with-the-scan-0.1",
        "smooth-refined-alone-0.3", "smooth-with-the-scan-0.3",
    ]  # fmt: skip
    options = answer.asked[2][1]
    other = bench.folder / "smooth"
    assert options[-7:] == [
        "--task", "restore", "refine", "-d", f"smooth={other}", "--trust", "0.1"
    ]  # fmt: skip
    blurred = refine.other_tool(truth.data, truth.inside, "smooth")
    written = read_image(other / "sub-01" / "anat" / "sub-01_desc-smooth_T1w.nii.gz").data
    np.testing.assert_allclose(written, command.SCANNER_UNIT * blurred, rtol=1e-5)
    gain = (blurred * truth.data).sum() / (blurred**2).sum()
    expected = compare(gain * blurred, truth.data, truth.inside)["rmse"]
    assert rows["smooth | as it is | -"]["RMSE"] == pytest.approx(expected, rel=1e-4)
    assert "residual" not in rows["smooth | as it is | -"]
    assert rows[refine.ALONE] == {"RMSE": pytest.approx(0, abs=1e-5), "residual": 1.0,
                                  "slow gain": pytest.approx(0, abs=1e-5)}  # fmt: skip
    assert rows[refine.STRIPPED]["value"] == 0


def test_a_sharpened_image_has_the_detail_twice():
    truth = np.ones((9, 9, 9), np.float32)
    truth[4, 4, 4] = 2
    inside = np.ones(truth.shape, bool)
    smooth, sharp = (refine.other_tool(truth, inside, kind) for kind in ("smooth", "sharp"))
    np.testing.assert_allclose(smooth + sharp, 2 * truth, rtol=1e-5)


def test_pictures_are_drawn(bench, monkeypatch, tmp_path):
    participant = toy_participant()
    truth = padded(participant, 4.0, 24)
    monkeypatch.setattr(
        command, "run_command", Answer(Volume(truth.data, truth.grid), truth.inside)
    )
    drawn = Bench(bench.prior, "cpu", bench.folder, picture=tmp_path / "p" / "refine_01.png")
    settings = refine.Settings(4.0, 0.01, 1, slab_mm=24, trusts=(0.1,))
    refine.measure(participant, settings, drawn)
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert names == ["refine_01_sharp.png", "refine_01_smooth.png"]
