# SPDX-License-Identifier: Apache-2.0
"""Metrics against formulas and scikit-image."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from skimage.metrics import structural_similarity

from brainprior_bids.engine.errors import InputError, ShapeMismatchError
from brainprior_bids.evaluation.metrics import (
    by_depth,
    compare,
    crps,
    frechet_distance,
    matching_gain,
)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    truth = 300 * rng.uniform(0.2, 1, (24, 26, 22))
    mask = np.zeros(truth.shape)
    mask[4:-5, 6:-4, 5:-6] = 1
    return truth + rng.normal(0, 12, truth.shape), truth, mask


def test_mae_and_psnr_are_their_formulas(pair):
    image, truth, mask = pair
    unit = np.percentile(truth[mask > 0], 99)
    error = (image - truth)[mask > 0] / unit
    metrics = compare(image, truth, mask)
    assert metrics["mae"] == pytest.approx(np.abs(error).mean())
    assert metrics["psnr_db"] == pytest.approx(-20 * np.log10(error.std() + 0), abs=0.05)
    assert metrics["psnr_db"] == pytest.approx(-20 * np.log10(metrics["rmse"]))


def test_ssim_is_that_of_scikit_image(pair):
    image, truth, mask = pair
    unit = np.percentile(truth[mask > 0], 99)
    _, whole = structural_similarity(
        image / unit * mask,
        truth / unit * mask,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    # scikit-image reflects at the array's border as we do; the mask's bounding box plus the
    # filter's radius contains all voxels on which the values inside depend
    assert compare(image, truth, mask)["ssim"] == pytest.approx(whole[mask > 0].mean(), abs=1e-9)


def test_what_lies_outside_the_mask_does_not_count(pair):
    image, truth, mask = pair
    other = np.where(mask > 0, image, 1e6)
    assert compare(other, truth, mask) == compare(image, truth, mask)


def test_the_same_image_is_perfect_and_the_unit_drops_out(pair):
    image, truth, mask = pair
    same = compare(truth, truth, mask)
    assert (same["mae"], same["psnr_db"]) == (0, float("inf"))
    assert same["ssim"] == pytest.approx(1)
    scaled = compare(1000 * image, 1000 * truth, mask)
    for key, value in compare(image, truth, mask).items():
        assert scaled[key] == pytest.approx(value)


def test_gain(pair):
    image, truth, mask = pair
    assert matching_gain(truth / 3, truth, mask) == pytest.approx(3)
    gain = matching_gain(image, truth, mask)
    best = compare(gain * image, truth, mask)["rmse"]
    assert best < compare(1.01 * gain * image, truth, mask)["rmse"]
    assert best < compare(0.99 * gain * image, truth, mask)["rmse"]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_crps_against_the_double_sum(pair, n):
    image, truth, mask = pair
    samples = image + np.random.default_rng(1).normal(0, 9, (n, *image.shape))
    inside = mask > 0
    x, t = samples[:, inside], truth[inside]
    expected = np.abs(x - t).mean(0)
    if n > 1:
        expected = expected - np.abs(x[:, None] - x[None]).sum((0, 1)) / (2 * n * (n - 1))
    assert crps(samples, truth, mask) == pytest.approx(expected.mean() / np.percentile(t, 99))


def test_bad_input_is_refused(pair):
    image, truth, mask = pair
    with pytest.raises(ShapeMismatchError, match="expected one shape"):
        compare(image[1:], truth, mask)
    with pytest.raises(InputError, match="mask is empty"):
        compare(image, truth, 0 * mask)
    with pytest.raises(InputError, match="not finite"):
        compare(np.where(mask > 0, np.nan, 1), truth, mask)
    with pytest.raises(InputError, match="must be above 0"):
        compare(image, -truth, mask)
    with pytest.raises(InputError, match="0 everywhere"):
        matching_gain(0 * image, truth, mask)


def test_the_error_by_depth_below_the_border():
    truth = np.ones((12, 12, 12))
    mask = np.zeros(truth.shape, bool)
    mask[2:, 2:10, 2:10] = (
        True  # 10 x 8 x 8 voxels; the end of the image does not count as a border
    )
    image = truth.copy()
    image[2:, 2, 2:10] += 0.5  # one outermost layer
    found = by_depth(image, truth, mask, (1, 1, 1))
    outer = 10 * 8 * 8 - 9 * 6 * 6
    assert found["rmse_0_1mm"] == pytest.approx(np.sqrt(0.25 * 80 / outer))
    assert found["rmse_1_2mm"] == found["rmse_2_3mm"] == found["rmse_3_5mm"] == 0
    assert np.isnan(found["rmse_5mm"])
    wide = by_depth(image, truth, mask, (3, 3, 3))
    assert wide["rmse_2_3mm"] == found["rmse_0_1mm"]
    assert wide["rmse_5mm"] == 0


def gaussian(mean, covariance, n=50):
    """Rows with exactly this mean and sample covariance."""
    rows = np.random.default_rng(0).normal(size=(n, len(mean)))
    rows -= rows.mean(0)
    white = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return np.array(mean) + white @ np.linalg.cholesky(covariance).T


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form():
    one = gaussian([0, 1, 2], np.diag([1.0, 4.0, 9.0]))
    other = gaussian([1, 1, 0], np.diag([4.0, 4.0, 1.0]), n=80)
    expected = (1 + 0 + 4) + (1 - 2) ** 2 + 0 + (3 - 1) ** 2  # means, then SDs
    assert frechet_distance(one, other) == pytest.approx(expected)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    first = np.array([[2.0, 0.9, 0], [0.9, 1, 0.2], [0, 0.2, 3]])
    second = np.array([[1.0, -0.3, 0.4], [-0.3, 2, 0], [0.4, 0, 1]])
    cross = np.trace(sqrtm(first @ second).real)  # covariances that do not commute
    expected = np.trace(first) + np.trace(second) - 2 * cross + 9
    assert frechet_distance(
        gaussian([0, 0, 0], first), gaussian([0, 3, 0], second)
    ) == pytest.approx(expected)
    few = np.random.default_rng(1).normal(size=(3, 5))  # covariances of rank two
    assert frechet_distance(few, few + 2) == pytest.approx(20)
    for wrong in (one[:1], one[:, :2], one[0]):
        with pytest.raises(ShapeMismatchError, match="frechet_distance"):
            frechet_distance(one, wrong)
