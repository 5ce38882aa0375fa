# SPDX-License-Identifier: Apache-2.0
"""Tissue classes, volumes and cortical thickness of restored images against the truth."""

import dataclasses
import types

import numpy as np
import pytest
from participants import toy_participant
from scipy import ndimage

from brainprior_bids.cli import evaluate as command
from brainprior_bids.engine.errors import InputError
from brainprior_bids.evaluation import protocol
from brainprior_bids.evaluation import tissue_classes as tissue_module
from brainprior_bids.evaluation.studies import base, downstream
from brainprior_bids.evaluation.studies.base import Bench, Source
from brainprior_bids.evaluation.tissue_classes import Tissues, cortical_thickness, tissue_classes

SETTINGS = downstream.Settings(study="downstream", n_samples=2, crop_mm=None)


def test_limits_of_agreement_are_the_mean_and_1_96_sd():
    found = downstream.bland_altman([1.0, 2.0, 3.0, 6.0])  # deviations -2, -1, 0, 3
    sd = np.sqrt((4 + 1 + 0 + 9) / 3)
    assert found.bias == 3.0
    assert found.limits == pytest.approx((3 - 1.96 * sd, 3 + 1.96 * sd))
    assert found.shown(1) == "+3.0 [-1.2, +7.2]"
    assert downstream.bland_altman([-2.5]).shown(1) == "-2.5"


def test_volumes_and_dice_are_those_of_the_labels():
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[:10] = 1  # 4000 voxels
    truth[10:12] = 2  # 800
    truth[12, 0, :20] = 3  # 20: too few
    other = truth.copy()
    other[9] = 2  # of 1 to 2
    inside = np.ones(truth.shape, bool)
    names = {"one": 1, "two": 2, "three": 3}
    found = downstream.compared({"true": truth, "cubic": other}, names, inside)
    assert found["true_ml"] == {"one": 4.0, "two": 0.8, "three": 0.02}
    row = found["methods"]["cubic"]
    assert row["dice"] == {
        "one": pytest.approx(2 * 3600 / 7600), "two": pytest.approx(2 * 800 / 2000)
    }  # fmt: skip
    assert row["volume_error"] == {"one": pytest.approx(-0.1), "two": pytest.approx(0.5)}


def test_both_sides_of_a_structure_are_one_group():
    labels = np.array([17, 53, 4, 44, 14, 15, 3, 24])
    numbers = downstream.group_labels()
    assert list(numbers) == [
        "hippocampus", "lateral ventricles", "third ventricle", "fourth ventricle"
    ]  # fmt: skip
    assert downstream.in_groups(labels).tolist() == [1, 1, 2, 2, 3, 4, 0, 0]


def test_thickness_is_compared_in_the_cortex_of_the_truth():
    rng = np.random.default_rng(0)
    shape = (40, 40, 20)  # four cubes of 20 mm
    truth = rng.uniform(2, 4, shape).astype(np.float32)
    truth[:20, :20] += 1
    truth[20:, 20:] += 2
    image = truth + rng.normal(0, 0.5, shape).astype(np.float32)
    image[0] = 0  # 800 voxels without a thickness
    everywhere = np.ones(shape, bool)
    own = everywhere.copy()
    own[:, 20:] = False
    found = downstream.compare_thickness(
        {"true": truth, "cubic": image}, {"true": everywhere, "cubic": own}, "01"
    )
    assert found["true_mm"] == pytest.approx(truth.mean(), rel=1e-5)
    assert found["voxels"] == truth.size
    row = found["methods"]["cubic"]
    assert row["missing"] == pytest.approx(1 / 40)
    assert row["mean_mm"] == pytest.approx(image[1:, :20].mean(), rel=1e-5)
    assert row["sd_mm"] == pytest.approx((image - truth)[1:].std(ddof=1), rel=1e-4)
    expected = np.corrcoef(image[1:].ravel(), truth[1:].ravel())[0, 1]
    assert row["correlation"] == pytest.approx(expected, rel=1e-4)
    cubes = [(slice(a, a + 20), slice(b, b + 20)) for a in (0, 20) for b in (0, 20)]
    kept = image > 0
    means = np.array([[x[c][kept[c]].mean() for x in (image, truth)] for c in cubes])
    assert row["cubes"] == 4
    assert row["cube_sd_mm"] == pytest.approx((means[:, 0] - means[:, 1]).std(), rel=1e-4)
    assert row["cube_correlation"] == pytest.approx(np.corrcoef(means.T)[0, 1], rel=1e-4)
    little = np.zeros(shape, bool)
    little[:10, :10, :5] = True
    with pytest.raises(InputError, match=r"1000 voxels of cortex .* of 01, found 500"):
        downstream.compare_thickness({"true": truth}, {"true": little}, "01")


def test_values_that_do_not_vary_have_no_correlation():
    assert downstream.correlation(np.ones(5), np.arange(5.0)) is None
    assert downstream.correlation(np.arange(2.0), np.arange(2.0)) is None
    assert downstream.correlation(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1)


def shells(thick=4):
    """Labels of a white ball in a grey shell in fluid."""
    away = np.sqrt(((np.indices((32, 32, 32)) - 15.5) ** 2).sum(0))
    labels = np.zeros(away.shape, np.uint8)
    labels[away < 15] = 1
    labels[away < 7 + thick] = 2
    labels[away < 7] = 3
    return labels


def test_atropos_orders_the_classes_by_intensity():
    labels = shells()
    rng = np.random.default_rng(0)
    means = np.array([0, 0.2, 0.6, 1.0])
    image = (means[labels] + rng.normal(0, 0.03, labels.shape)).astype(np.float32)
    found = tissue_classes(image, labels > 0)
    assert (found.labels == labels)[labels > 0].mean() > 0.99
    assert not found.labels[labels == 0].any()
    assert found.grey[labels == 2].mean() > 0.95
    assert found.white[labels == 3].mean() > 0.95
    with pytest.raises(InputError, match="fewer than three different values"):
        tissue_classes((labels > 1).astype(np.float32), labels > 0)


def test_the_thickness_of_a_shell_is_found():
    thin, thick = (
        cortical_thickness(
            Tissues(labels, (labels == 2).astype(np.float32), (labels == 3).astype(np.float32))
        )
        for labels in (shells(3), shells(5))
    )
    assert not thin[shells(3) != 2].any()
    means = [image[image > 0].mean() for image in (thin, thick)]
    assert means[0] == pytest.approx(3, abs=0.8)  # voxels of 1 mm, 10 iterations
    assert means[1] == pytest.approx(5, abs=0.8)


def layered_participant():
    """The middle of the toy, whose outermost 4 mm are fluid."""
    toy, part = toy_participant(), np.s_[12:44, 12:48, 12:40]
    inside = toy.inside[part]
    fluid = inside & ~ndimage.binary_erosion(inside, iterations=4)
    data = (toy.data[part] * np.where(fluid, 0.2, 1)).astype(np.float32)
    structures = np.where(fluid, 24, toy.structures[part])
    return dataclasses.replace(toy, data=data, inside=inside, structures=structures)


@pytest.fixture
def cheap(monkeypatch):
    """Without the networks: an error of SD 0.02, and the toy's own structures."""

    def restored(case, condition, contrast, **_):
        noise = np.random.default_rng(0).normal(0, 0.02, (2, *case.truth.data.shape))
        images = (case.truth.data + noise).astype(np.float32)
        return types.SimpleNamespace(mean=images[0], samples=images[1:], sampler="conditional")

    def parcellations(case, images, network):
        methods = ("true", "degraded", *(m for m in downstream.METHODS if m in images))
        return dict.fromkeys(methods, case.structures)

    monkeypatch.setattr(protocol, "restored", restored)
    monkeypatch.setattr(downstream, "parcellations", parcellations)
    monkeypatch.setattr(Bench, "load_prior", lambda _: None)


def test_a_small_brain_is_measured_drawn_and_tabulated(cheap, tmp_path, monkeypatch):
    participant = layered_participant()
    monkeypatch.setattr(tissue_module, "DIRECT_ITERATIONS", 4)
    bench = Bench(
        tmp_path, "cpu", tmp_path, penalties=protocol.UNTUNED, picture=tmp_path / "downstream.png"
    )
    record = downstream.measure(participant, SETTINGS, bench)
    assert (tmp_path / "downstream.png").stat().st_size > 5000
    tissues = record["tissues"]
    assert sum(tissues["true_ml"].values()) == pytest.approx(participant.inside.sum() / 1000)
    dice = {method: row["dice"]["white"] for method, row in tissues["methods"].items()}
    assert list(dice) == ["degraded", "cubic", "tv", "sample", "restored"]
    assert dice["restored"] > dice["cubic"] > dice["degraded"]
    assert record["structures"]["methods"]["cubic"]["dice"] == {}  # the toy has no hippocampus
    thickness = record["cortex"]["methods"]
    assert list(thickness) == ["cubic", "sample", "restored"]
    assert thickness["restored"]["correlation"] > thickness["cubic"]["correlation"]
    assert set(record["thickness_seconds"]) == {"true", "cubic", "sample", "restored"}
    monkeypatch.setattr(downstream, "all_images", None)
    monkeypatch.setattr(downstream, "cortical_thickness", None)
    assert downstream.measure(participant, SETTINGS, bench) == record  # as after an interrupt
    facts = {**dataclasses.asdict(SETTINGS), "contrast": "T1w", "synthetic": False,
             "tuned_on": ["04"]}  # fmt: skip
    text = "\n".join(downstream.table([{**facts, **record}] * 2, []))
    assert "T1w, 1 × 1 × 5 mm, noise 0.01, 2 participants." in text
    assert "| `desc-restored` | 1.000 ± 0.000 | +0.0 [+0.0, +0.0] |" in text
    assert "Cortical thickness by KellyKapowski (10 iterations, 1 mm," in text
    assert "| n/a | n/a |" in text


def test_an_image_of_an_interrupted_call_says_which_networks_made_it(tmp_path, monkeypatch):
    def images(*_, prior, **__):
        prior.asked_coarse = True
        return {"cubic": np.zeros((2, 2, 2), np.float32)}, types.SimpleNamespace(sampler="exact")

    prior = types.SimpleNamespace(asked_coarse=False)
    monkeypatch.setattr(base, "load_prior", lambda path, device: prior)
    monkeypatch.setattr(base, "_PRIORS", {})  # those of this test alone
    monkeypatch.setattr(downstream, "all_images", images)
    bench = Bench(tmp_path, "cpu", tmp_path / "case")
    first, sampler = downstream.restored_once(None, "T1w", SETTINGS, bench)
    bench.begin()
    assert not bench.asked_coarse()
    monkeypatch.setattr(downstream, "all_images", None)
    again, _ = downstream.restored_once(None, "T1w", SETTINGS, bench)
    assert bench.asked_coarse()
    assert (list(first), list(again), sampler) == (["cubic"], ["cubic"], "exact")


def test_thickness_can_be_left_out(cheap, tmp_path, monkeypatch):
    monkeypatch.setattr(downstream, "thickness_maps", None)
    bench = Bench(tmp_path, "cpu", tmp_path, penalties=protocol.UNTUNED)
    settings = dataclasses.replace(SETTINGS, thickness=False)
    record = downstream.measure(layered_participant(), settings, bench)
    assert "cortex" not in record
    facts = {**dataclasses.asdict(settings), "contrast": "T1w", "synthetic": False, "tuned_on": []}
    assert "KellyKapowski" not in "\n".join(downstream.table([{**facts, **record}], []))


def planned(*words):
    args = command.parse(["data", "out", *words])
    sources = [Source("", name, "T1w", False, False) for name in "123"]
    return command.plan(args, [*sources, Source("", "4", "T2w", False, False)])


def test_the_first_participants_are_measured_with_thickness_unless_quick():
    cases, problems = planned("--study", "downstream")
    assert problems == []
    assert [(case.source.name, case.settings.thickness) for case in cases] == [
        ("1", True), ("2", True)
    ]  # fmt: skip
    assert {case.settings.n_samples for case in cases} == {2}
    assert {case.settings.crop_mm for case in cases} == {None}
    quick, _ = planned("--study", "downstream", "--quick")
    assert not quick[0].settings.thickness
    asked, _ = planned("--study", "downstream", "--quick", "--thickness")
    assert asked[0].settings.thickness
    left, _ = planned("--study", "downstream", "--no-thickness", "--downstream-participants", "1")
    assert [case.settings.thickness for case in left] == [False]


def test_without_antspyx_the_study_is_skipped(monkeypatch, caplog):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    cases, problems = planned("--study", "downstream", "segmentation")
    assert problems == ["downstream: skipped, because antspyx is not installed."]
    assert {case.study for case in cases} == {"segmentation"}
    cases, problems = planned()  # all studies: the others are made without an error
    assert problems == []
    assert "downstream" not in {case.study for case in cases}
    assert "downstream: skipped" in caplog.text


def test_a_data_set_without_t1w_is_named():
    args = command.parse(["data", "out", "--study", "downstream", "samples"])
    _, problems = command.plan(args, [Source("", "1", "T2w", False, False)])
    assert problems == [
        "downstream: no scan for this study in data.", "samples: no scan for this study in data."
    ]  # fmt: skip
