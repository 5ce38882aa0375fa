# SPDX-License-Identifier: Apache-2.0
"""Signal and contrast by tissue: closed forms, and excluded voxels."""

from __future__ import annotations

import numpy as np
import pytest

from brainprior_bids.anatomy.tissue_metrics import (
    FEWEST,
    RATIOS,
    TISSUES,
    tissue_metrics,
    tissue_values,
)
from brainprior_bids.engine.errors import ShapeMismatchError


def normal(mean, sd, n=200_001):
    """The quantiles of a normal distribution: median ``mean``, SD ``sd``."""
    from scipy.stats import norm

    return norm.ppf((np.arange(n) + 0.5) / n, mean, sd).astype(np.float32)


def test_the_metrics_of_normal_tissues_have_closed_forms():
    result = tissue_metrics({"csf": normal(50, 10), "gm": normal(100, 8), "wm": normal(160, 6)})
    expected = {
        "snr_csf": 5.0,
        "snr_gm": 12.5,
        "snr_wm": 160 / 6,
        "snr_total": (5 + 12.5 + 160 / 6) / 3,
        "cnr": 60 / 10,  # sqrt(8^2 + 6^2)
        "cjv": 14 / 60,
        "summary_gm_median": 100.0,
        "summary_wm_stdv": 6.0,
    }
    # the outermost quantiles lack 2e-5 of the variance, and 1.4826 has five digits
    assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert set(RATIOS) <= set(result)


def test_a_tissue_with_few_or_constant_voxels_has_no_metrics():
    few = normal(100, 8, FEWEST - 1)
    assert tissue_metrics({"csf": few, "gm": few, "wm": np.full(FEWEST, 3, np.float32)}) == {}
    result = tissue_metrics({"csf": few, "gm": normal(100, 8), "wm": normal(160, 6)})
    assert {"snr_gm", "snr_wm", "cnr", "cjv"} <= set(result)
    assert not {"snr_csf", "snr_total"} & set(result)
    same = tissue_metrics({"gm": normal(100, 8), "wm": normal(100, 6)})
    assert not {"cnr", "cjv"} & set(same)  # no contrast to divide by


def test_every_label_is_in_its_tissue_and_hidden_voxels_in_none():
    labels = np.array([2, 41, 3, 42, 4, 43, 24, 10, 0, 7], np.float32).reshape(10, 1, 1)
    image = np.arange(10, dtype=np.float32).reshape(10, 1, 1)
    use = np.ones(labels.shape, bool)
    values = {tissue: list(array) for tissue, array in tissue_values(image, labels, use).items()}
    assert values == {"csf": [4, 5, 6], "gm": [2, 3], "wm": [0, 1]}
    use[[0, 4]] = False
    values = {tissue: list(array) for tissue, array in tissue_values(image, labels, use).items()}
    assert values == {"csf": [5, 6], "gm": [2, 3], "wm": [1]}
    assert set(values) == set(TISSUES)


def test_images_on_several_grids_are_refused():
    image = np.zeros((2, 2, 2), np.float32)
    with pytest.raises(ShapeMismatchError, match="one grid"):
        tissue_values(image, np.zeros((2, 2, 3)), np.ones((2, 2, 2), bool))
