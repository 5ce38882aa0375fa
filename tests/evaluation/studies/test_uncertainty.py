# SPDX-License-Identifier: Apache-2.0
"""The SD of few samples: its intervals on draws of a known law, and the problems of the study."""

import numpy as np
import pytest
from participants import toy_participant

from brainprior_bids.engine.result import Restoration
from brainprior_bids.evaluation.protocol import Condition, make_case
from brainprior_bids.evaluation.studies import uncertainty
from brainprior_bids.evaluation.studies.base import Bench


class Drawn:
    """A result whose truth is one more draw of the law of its samples."""

    def __init__(self, n: int) -> None:
        rng = np.random.default_rng(0)
        shape = (48, 48, 40)
        brain = 5 + rng.random(shape)
        sd = np.where(np.arange(48)[:, None, None] < 24, 0.05, 0.15)
        draws = brain + sd * rng.normal(size=(n + 1, *shape))
        self.truth, self.samples = draws[0].astype("f4"), draws[1:].astype("f4")
        self.mean = self.samples.mean(0)
        self.inside = np.ones(shape, bool)


@pytest.mark.parametrize("n", [2, 4])
def test_both_kinds_of_intervals_cover_and_the_averaged_ones_are_shorter(n):
    drawn = Drawn(n)
    rows = uncertainty.compare_spreads(drawn, drawn.truth, drawn.inside, drawn.inside)
    for row in rows.values():
        assert row["in the 50 % interval"] == pytest.approx(0.5, abs=0.03)
        assert row["in the 90 % interval"] == pytest.approx(0.9, abs=0.02)
        assert row["RMS error / SD"] == pytest.approx((1 + 1 / n) ** 0.5, rel=0.02)
    alone, averaged = rows[uncertainty.ALONE], rows[uncertainty.AVERAGED]
    assert averaged["its half width"] < {2: 0.35, 4: 0.8}[n] * alone["its half width"]
    assert averaged["CRPS"] < alone["CRPS"]


def test_a_block_is_measured_in_four_ways(monkeypatch, tmp_path):
    seen = []

    def restored(observations, **options):
        seen.append((observations, options["sampler"]))
        truth = participant.data
        samples = truth + np.random.default_rng(0).normal(0, 0.1, (2, *truth.shape))
        shape = options["mask_1mm"].shape
        result = object.__new__(Restoration)
        for name, value in {"samples": np.resize(samples, (2, *shape)).astype("f4"),
                            "mean": np.resize(truth, shape)}.items():  # fmt: skip
            object.__setattr__(result, name, value)
        return result

    participant = toy_participant("01", seed=0)
    monkeypatch.setattr(uncertainty, "restore", restored)
    monkeypatch.setattr(Bench, "load_prior", lambda self: None)
    condition = Condition(study="uncertainty", spacing_mm=4.0, noise_sd=0.01, n_samples=2)
    record = uncertainty.measure(participant, condition, Bench(tmp_path, "cpu", tmp_path))
    assert len(record["rows"]) == 8
    (one,), fused, with_image, (holed,) = (observations for observations, _ in seen)
    assert [sampler for _, sampler in seen] == ["exact", "auto", "auto", "auto"]
    assert [scan.acquisition.slice_axis for scan in fused] == [2, 1]
    assert with_image[0] is one is fused[0]
    case = make_case(participant, condition)
    hole = np.asarray(holed.hidden)
    assert holed.grid.shape == case.inside.shape == hole.shape
    assert 0 < hole.sum() < 0.5 * case.inside.sum()
    assert not (hole & ~case.inside).any()
    error = np.asarray(with_image[1].image) - case.truth.data
    assert with_image[1].sd == pytest.approx(error[case.inside].std(), rel=1e-3)
