# SPDX-License-Identifier: Apache-2.0
"""Regions that are in an image but not in the truth."""

import dataclasses

import numpy as np
import pytest
from participants import toy_participant
from scipy.stats import norm

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.evaluation import protocol
from brainprior_bids.evaluation.protocol import Condition, make_case
from brainprior_bids.evaluation.studies import hallucination
from brainprior_bids.evaluation.studies.base import Bench
from brainprior_bids.evaluation.studies.hallucination import false_structures


def test_regions_are_connected_beyond_three_sd_and_inside():
    shape = (50, 50, 40)  # 100 ml
    truth = np.ones(shape)
    sd = np.full(shape, 0.1)
    sd[40:] = 0.2
    image = truth.copy()
    image[2:5, 2:5, 2:4] += 0.31  # 18 voxels
    image[5:7, 2:5, 2:4] -= 0.31  # 12 voxels next to it, darker: another structure
    image[10:15, 10:15, 10:15] += 0.29  # below three SDs
    image[42:46, 10:15, 10:15] += 0.5  # as well, where the SD is larger
    image[20:26, 20:25, 20:24] -= 0.4  # 120
    image[30, 30, 30] += 1  # 1
    image[31, 31, 30] += 1  # 1: voxels that only share an edge are not neighbours
    inside = np.ones(shape, bool)
    found = false_structures(image, truth, sd, inside)
    assert found == {
        "share": pytest.approx((18 + 12 + 120 + 2) / 1e5),
        "largest": 120,
        "regions": {"10": 3.0, "100": 1.0},
    }
    inside[:, 22:, :] = False  # 120 become 6 x 2 x 4, in 44 ml
    found = false_structures(image, truth, sd, inside)
    assert found["largest"] == 48
    assert found["regions"] == {"10": pytest.approx(3 / 0.44), "100": 0}
    perfect = false_structures(truth, truth, sd, inside)
    assert perfect == {"share": 0, "largest": 0, "regions": {"10": 0, "100": 0}}


def test_errors_of_the_predicted_law_make_almost_no_regions():
    """Independent normal errors: 0.27 % of the voxels, none of them a region of ten."""
    rng = np.random.default_rng(0)
    shape = (60, 60, 60)
    sd = rng.uniform(0.01, 0.1, shape)
    found = false_structures(sd * rng.normal(size=shape), np.zeros(shape), sd, sd > 0)
    assert found["share"] == pytest.approx(2 * norm.sf(3), rel=0.1)
    assert found["regions"]["10"] == 0


class Result:
    """A restoration of known error and SD."""

    sampler, sd_from = "conditional", "samples"

    def __init__(self, mean, samples, sd):
        self.mean, self.samples, self.sd = mean, samples, sd


CONDITION = Condition(study="hallucination", n_samples=8, crop_mm=(32, 32, 40))


def test_every_method_is_judged_by_the_sd_of_the_restored_image(monkeypatch, tmp_path):
    participant = toy_participant()
    case = make_case(participant, CONDITION)
    truth = case.truth.data
    invented = truth.copy()
    i, j, k = (int(v) for v in np.argwhere(case.judged).mean(0))
    invented[i : i + 3, j : j + 3, k : k + 3] += 0.13
    # eight samples: three SDs of 0.04 with their mean's own error are 0.1273
    result = Result(truth, [invented] * 8, np.full(truth.shape, 0.04, np.float32))
    monkeypatch.setattr(hallucination, "restored", lambda *_, **__: result)
    monkeypatch.setattr(Bench, "load_prior", lambda _: None)
    bench = Bench(tmp_path, "cpu", tmp_path, penalties=protocol.UNTUNED)
    record = hallucination.measure(participant, CONDITION, bench)
    methods = record["methods"]
    assert list(methods) == ["cubic", "tv", "sample", "restored"]
    assert methods["restored"]["largest"] == 0
    assert methods["sample"]["largest"] == 27
    assert methods["cubic"]["share"] > methods["tv"]["share"] > 0  # it is given the slice weights
    result.sd = result.sd * 1.1
    assert (
        hallucination.measure(participant, CONDITION, bench)["methods"]["sample"]["largest"] == 0
    )
    result.sd = None
    with pytest.raises(UsageError, match="predict no SD"):
        hallucination.measure(participant, CONDITION, bench)


def test_the_table_has_a_row_per_condition_and_method():
    row = {"share": 0.0125, "largest": 55, "regions": {"10": 4.0, "100": 0.0}}
    fixed = {**dataclasses.asdict(CONDITION), "contrast": "T1w", "synthetic": False,
             "sampler_used": "conditional", "sd_from": "prior", "tuned_on": ["04"]}  # fmt: skip
    records = [
        {**fixed, "methods": {"cubic": row, "restored": row}},
        {**fixed, "methods": {"cubic": {**row, "largest": 70, "share": 0.0375}, "restored": row}},
    ]
    text = hallucination.table(records, [])
    assert text[0].endswith("tuned on 04. SD: predicted by the prior.")
    rows = [line for line in text if line.startswith("| T1w, 5 mm, noise 0.01 |")]
    start = "| T1w, 5 mm, noise 0.01 | cubic | 2.50 [1.25, 3.75] | 4.0 [4.0, 4.0] |"
    assert rows[0].startswith(start)
    assert rows[0].endswith(" 70 |")
    assert "`desc-restored` | 1.25" in rows[1]
