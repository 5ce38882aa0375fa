# SPDX-License-Identifier: Apache-2.0
"""Which restorations the study makes, and what it computes of them."""

import types

import numpy as np
import pytest
from participants import toy_participant

from brainprior_bids.evaluation.protocol import Condition
from brainprior_bids.evaluation.studies import samplers
from brainprior_bids.evaluation.studies.base import Bench


@pytest.fixture
def restorations(monkeypatch):
    """The arguments of each restoration; the images are the truth with errors of SD 0.05."""
    seen = []

    def restored(observations, *, sampler, n_samples, n_steps, mask_1mm, **_):
        seen.append((len(observations), sampler, n_samples, n_steps))
        rng = np.random.default_rng(0)
        truth = rng.random(mask_1mm.shape)
        samples = truth + rng.normal(0, 0.05, (n_samples, *truth.shape))
        return types.SimpleNamespace(
            mean=samples.mean(0), samples=samples, sampler=sampler, residual_ratios=[0.9, 1.1]
        )

    monkeypatch.setattr(samplers, "restore", restored)
    monkeypatch.setattr(Bench, "load_prior", lambda self: None)
    return seen


def rows_of(tmp_path, **settings):
    condition = Condition(study="samplers", spacing_mm=4.0, noise_sd=0.01, **settings)
    return samplers.measure(toy_participant(), condition, Bench(tmp_path, "cpu", tmp_path))["rows"]


def test_every_row_has_its_samples_and_calls(restorations, tmp_path):
    rows = rows_of(tmp_path, n_samples=4)
    assert restorations == [
        (1, "mean", 1, None), (1, "conditional", 2, 10), (1, "conditional", 4, 10),
        (1, "conditional", 8, 10), (1, "exact", 4, 20), (2, "conditional", 2, 20),
        (2, "exact", 2, 20), (2, "exact", 2, 40),
    ]  # fmt: skip
    assert list(rows) == [
        "one scan | `mean` | 2 | none", "one scan | `conditional` | 10 | 2",
        "one scan | `conditional` | 10 | 4", "one scan | `conditional` | 10 | 8",
        "one scan | `exact` | 20 | 4", "two crossed scans | `conditional` | 20 | 2",
        "two crossed scans | `exact` | 20 | 2", "two crossed scans | `exact` | 40 | 2",
    ]  # fmt: skip
    assert set(rows["one scan | `mean` | 2 | none"]) == {"PSNR, dB", "processor time, s"}
    assert rows["one scan | `exact` | 20 | 4"]["residual"] == 1.0


def test_with_one_sample_no_row_is_made_twice_and_none_of_crossed_scans(restorations, tmp_path):
    rows = rows_of(tmp_path, n_samples=1, n_steps=3)
    assert [(sampler, n, calls) for _, sampler, n, calls in restorations] == [
        ("mean", 1, None), ("conditional", 1, 3), ("conditional", 2, 3), ("exact", 1, 3),
    ]  # fmt: skip
    assert "CRPS of the samples" not in rows["one scan | `exact` | 3 | 1"]


def test_the_quality_of_independent_errors_is_that_of_the_formula():
    """Errors of SD 0.05: -20 log10(0.05) = 26.0 dB, the mean of four 6.0 dB above.

    Truth and samples are draws of one law, so the CRPS is SD / sqrt(pi) / unit.
    """
    rng = np.random.default_rng(0)
    brain, shape = 0.5 + 0.5 * rng.random((40, 40, 40)), (40, 40, 40)
    draws = brain + rng.normal(0, 0.05, (5, *shape))
    truth, samples = draws[0], draws[1:]
    everywhere = np.ones(shape, bool)
    case = types.SimpleNamespace(truth=types.SimpleNamespace(data=truth), judged=everywhere)
    result = types.SimpleNamespace(
        mean=samples.mean(0), samples=samples, sampler="conditional", residual_ratios=[1.0, 2.0]
    )
    values = samplers.quality(result, case)
    unit = np.percentile(truth, 99)
    one, mean = (20 * np.log10(unit / (0.05 * np.sqrt(1 + 1 / n))) for n in (1, 4))
    assert values["one sample, dB"] == pytest.approx(one, abs=0.1)
    assert values["PSNR, dB"] == pytest.approx(mean, abs=0.1)
    assert values["CRPS of the samples"] == pytest.approx(0.05 / np.sqrt(np.pi) / unit, rel=0.03)
    assert values["residual"] == 1.5
