# SPDX-License-Identifier: Apache-2.0
"""Another tool's image in front of the denoiser, against the product of Gaussians."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gaussian import gaussian_prior
from scipy import ndimage
from test_fusion import MOTION, UNIT, error, make_run, together, truth_at
from test_restore import GAIN, TO_MNI, GaussianPrior, ball, given_prior, phantom, power, run

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.conditioning import (
    Conditioning,
    GivenSpectrum,
    WhiteImage,
    expected_obstacle,
)
from brainprior_bids.engine.errors import InputError, ShapeMismatchError, UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.nuisance import Nuisances
from brainprior_bids.engine.observation import ImageObservation, Observation
from brainprior_bids.engine.problem import Problem
from brainprior_bids.engine.restore import restore

SHAPE, TAU = (10, 8, 12), 0.08


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Prior:
    """Gaussian about 0 with ``power``."""

    def variance(self, sigma, frequency):
        p = power(frequency)
        return sigma**2 * p / (sigma**2 + p)


def frequency():
    axes = [torch.fft.fftfreq(n) for n in SHAPE]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)


def wiener(x, sigma):
    p = power(frequency())
    return torch.fft.ifftn(torch.fft.fftn(x) * p / (p + sigma**2)).real


def test_two_noisy_images_are_one_of_less_noise():
    """Inverse variances add, and weigh the two."""
    x_t, z, sigma = random(*SHAPE, seed=3), random(*SHAPE, seed=4), 0.05
    merged, sd = WhiteImage(z, TAU, ()).merge(x_t, sigma)
    precision = sigma**-2 + TAU**-2
    assert sd == pytest.approx(precision**-0.5)
    expected = (x_t / sigma**2 + z / TAU**2) / precision
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma", [3.0, 0.1, 0.02])
def test_for_a_gaussian_prior_it_is_the_product_formula(sigma):
    """Merged with x_t it gives the mean and the V of N(m, V) N(z; x, tau^2)."""
    x_t, z = random(*SHAPE, seed=3), random(*SHAPE, seed=4)
    image, v = WhiteImage(z, TAU, ()), Prior().variance(sigma, frequency())
    mean = wiener(*image.merge(x_t, sigma))
    m = wiener(x_t, sigma)
    pull = torch.fft.ifftn(torch.fft.fftn(z - m) * v / (v + TAU**2)).real
    torch.testing.assert_close(mean, m + pull, rtol=1e-4, atol=1e-5)
    given = GivenSpectrum(Prior(), image).variance(sigma, frequency())
    torch.testing.assert_close(given, v * TAU**2 / (v + TAU**2), rtol=1e-5, atol=0)


def problem(case, hidden=None, home="scan"):
    a = case["arguments"]
    observation = Observation(a["scan"], a["grid"], a["acquisition"], a["mask"], hidden=hidden)
    return Problem(
        [observation],
        mask=torch.from_numpy(np.asarray(a["mask_1mm"])).float(),
        rim_mm=0.0,
        to_mni305=TO_MNI,
        home=home,
        nuisances=Nuisances(thickness_sd=0.0),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("holes", [0.5, 0.0], ids=["holes", "no holes"])
@pytest.mark.parametrize("lesion", [False, True], ids=["whole", "lesion"])
@pytest.mark.parametrize(
    "spacing",
    [
        (1, 1, 1), (0.8, 0.8, 0.8), (1, 1.33, 1.33), (1.33, 1.33, 1), (1.2, 1.2, 1.2), (1, 1, 1.3),
        (1, 1, 1.5), (1.5, 1.5, 1.5), (1, 1, 3), (1.6, 1.6, 5), (5, 1, 1), (2.4, 2.4, 5),
    ],
    ids=str,
)  # fmt: skip
def test_the_obstacle_is_known_from_the_header(spacing, lesion, holes):
    """The rule of the plan is that of the restoration, here of a ball in noise."""
    shape = tuple(round(48 / size) for size in spacing)
    grid = Grid(shape, np.diag([*spacing, 1.0]))
    axis = int(np.argmax(spacing))
    centre = grid.extent_mm / 2
    points = [np.square(g.points_mm() - centre.reshape(3, 1, 1, 1)).sum(0)
              for g in (grid, grid.one_millimetre())]  # fmt: skip
    mask, fine = (square < 14**2 for square in points)
    scan = 100.0 * mask + np.random.default_rng(0).standard_normal(shape)
    acquisition = Acquisition(axis, spacing[axis], spacing[axis])
    case = {"arguments": {"scan": scan, "grid": grid, "acquisition": acquisition,
                          "mask": mask.astype(float), "mask_1mm": fine}}  # fmt: skip
    hidden = points[0] < 25 if lesion else None
    view = Conditioning(given_prior(holes), problem(case, hidden=hidden), "T1w")
    facts = {"config": {"stacks": True}, "recipe": {"holes": holes}}
    expected = expected_obstacle(grid, acquisition, any_hidden=lesion, facts=facts)
    assert view.obstacle() == expected


def test_weights_that_take_no_measurements_are_an_obstacle():
    grid, acquisition = Grid((40, 40, 10), np.diag([1.0, 1, 4, 1])), Acquisition(2, 4.0, 4.0)
    facts = {"config": {"stacks": False}}
    assert "was not trained to be conditioned" in str(
        expected_obstacle(grid, acquisition, any_hidden=False, facts=facts)
    )


def test_several_images_count_by_their_trust():
    case = phantom()
    truth = torch.from_numpy(case["truth"])
    one, two = 2.0 * truth, 5.0 * truth
    view = Conditioning(
        case["arguments"]["prior"],
        problem(case),
        "T1w",
        [ImageObservation(one, 0.03), ImageObservation(two, 0.06)],
    )
    assert view.image.tau == pytest.approx((0.03**-2 + 0.06**-2) ** -0.5)
    (gain_one, _), (gain_two, correlation) = view.image.fits
    assert 2 * gain_one == pytest.approx(5 * gain_two, rel=1e-5)
    assert correlation > 0.95
    inside = view.problem.final
    expected = 2 * gain_one * truth[view.problem.box.image_slices]
    torch.testing.assert_close(view.image.z[inside], expected[inside], rtol=1e-4, atol=1e-5)


def other_image(case, error=0.02):
    rng = np.random.default_rng(0)
    return 3.0 * (case["truth"] + error * rng.standard_normal(case["truth"].shape))


@pytest.mark.parametrize("thick", [1, 4])
def test_a_lesion_and_another_tools_image_together(thick):
    """Where the scan is hidden, only the image is used, whatever the scan's values."""
    case = phantom(thick=thick)
    scan, grid = case["arguments"]["scan"], case["arguments"]["grid"]
    hidden, fine = ball(grid, (4, -5, 3), 7), ball(grid.one_millimetre(), (4, -5, 3), 7)
    trust = 0.02 * case["arguments"]["prior"].scale
    options = {"hidden": hidden, "n_samples": 2, "n_steps": 6}

    def error(result):
        return float(np.sqrt(((result.mean / GAIN - case["truth"])[fine] ** 2).mean()))

    alone = run(case, **options)
    both = run(case, image=other_image(case), trust=trust, **options)
    assert error(both) < 0.6 * error(alone)
    assert error(both) < 0.02
    again = run(
        case, scan=np.where(hidden, 3 * scan.max(), scan), image=other_image(case), trust=trust,
        **options,
    )  # fmt: skip
    np.testing.assert_array_equal(again.samples, both.samples)


def test_an_image_of_another_place_kind_or_trust_is_refused():
    case = phantom()
    image = other_image(case)
    for change, kind, text in (
        ({"image": -image}, InputError, "0 where the scan"),
        ({"image": random(*image.shape).abs()}, InputError, "correlate by"),
        ({"image": image[:9]}, ShapeMismatchError, "on the reference's 1 mm grid"),
        ({"image": np.full(image.shape, np.nan)}, InputError, "NaN"),
        ({"trust": 0.0}, InputError, "above 0"),
        ({"home": "MNI305"}, UsageError, "no longer be white"),
    ):
        with pytest.raises(kind, match=text):
            run(case, **{"image": image, "trust": 0.05, **change})


def test_mean_is_one_call_for_each_position_of_the_blocks_and_draws_nothing():
    """The start of a chain of the conditional sampler, at two positions."""
    case, prior, levels = phantom(), given_prior(), []
    ask, answers = prior.estimate, []

    def estimate(x, sigma, **more):
        levels.append((sigma, more.get("position")))
        answers.append(ask(x, sigma, **more))
        return answers[-1]

    prior.estimate = estimate
    result = run(case, prior=prior, sampler="mean", n_samples=4)
    assert levels == [(100.0, position) for position in prior.positions]
    assert levels[1:] == [(100.0, (1, 1))]
    (one, _), (other, _) = answers
    assert float((one - other).std()) > 0
    written = result.mean[result.box.image_slices]
    mean = ((one + other) / 2)[0, 0].numpy() * result.unit
    np.testing.assert_allclose(written[written != 0], mean[written != 0], rtol=1e-4)
    assert (result.calls, result.sampler, len(result.samples)) == (2, "mean", 0)
    assert result.sd is None
    assert any("does not predict the uncertainty" in text for text in result.warnings)
    assert result.thickness_factors == [1.0]
    chain = run(case, prior=prior, sampler="conditional", n_samples=1, n_steps=2)
    first = ((3 * chain.mean - chain.samples[0]) / 2)[chain.box.image_slices]  # weights 2/3, 1/3
    difference = (first - one[0, 0].numpy() * chain.unit)[written != 0]
    assert np.abs(difference).max() < 0.02 * GAIN
    with pytest.raises(UsageError, match="conditioned on measurements"):
        run(case, sampler="mean")


def posed(runs):
    fine = runs[0].grid.one_millimetre()
    return Problem(
        runs,
        mask=(truth_at(fine.points_mm()) > 0).float(),
        rim_mm=0.0,
        to_mni305=TO_MNI,
        home="scan",
        nuisances=Nuisances(thickness_sd=0.0),
        device=torch.device("cpu"),
    )


def gaussian_mean(runs, prior):
    """E[x given all scans] of a prior N(0, V), V its spectrum before any call, in one solve."""
    both = posed(runs)
    likelihood = both.likelihood(prior.spectrum("T1w"), 1.0)
    likelihood.reset()
    mean = np.zeros(both.grid.shape, np.float32)
    solved = likelihood.expect(torch.zeros(both.box.shape), 1e3)
    mean[both.box.image_slices] = solved.numpy()
    return mean * both.unit


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_fused_scans_under_a_network_that_is_given_the_reference(noise):
    """Under a white Gaussian prior, whose V is exact, chains scatter about the closed-form mean.

    The larger noise is as large as what the prior leaves open in a slice: whoever counts the
    reference twice is off by more than chains scatter. Two independent sets of chains give the
    scatter: their average is off by half of what they differ by, and a set's samples by their
    SD / 2. Both ratios are 1 with an SD of 7 and 5 % for 200 independent voxels (a tenth of those
    compared): the bounds are 3 and 4 of them.
    """
    reference, truth = make_run(2, np.eye(4), noise=noise, seed=1)
    moved, _ = make_run(0, MOTION, noise=noise, seed=2)
    noise_sd = UNIT * noise / posed([reference, moved]).unit
    runs = [replace(run, noise_sd=noise_sd) for run in (reference, moved)]
    prior = gaussian_prior(torch.full((8,), 0.2), recipe={"holes": 0.1})
    options = {"prior": prior, "n_steps": 6, "n_samples": 4, "thickness_sd": 0.0}
    (one, _), (two, _) = (together(*runs, seed=seed, **options) for seed in (0, 7))
    alone, _ = together(runs[0], **options)
    assert (one.sampler, one.solve) == ("conditional", "image space")
    assert error(one.mean, truth) < 0.9 * error(alone.mean, truth)
    expected = gaussian_mean(runs, prior)
    inside = ndimage.binary_erosion(truth > 0, iterations=5)  # slices entirely inside the brain

    def rms(image):
        return float(np.sqrt(np.square(image[inside]).mean()))

    scatter = rms(one.mean - two.mean) / 2
    assert rms((one.mean + two.mean) / 2 - expected) == pytest.approx(scatter, rel=0.2)
    for result in (one, two):
        off = rms(result.samples.mean(0) - expected)
        assert off == pytest.approx(rms(result.sd) / 2, rel=0.2)
    with pytest.raises(UsageError, match="several are fused"):
        together(*runs, prior=prior, sampler="mean")


def test_the_prior_of_the_phantom_is_called_without_measurements():
    """``GaussianPrior.denoise`` takes none: the exact sampler must not pass any."""
    case = phantom()
    assert isinstance(case["arguments"]["prior"], GaussianPrior)
    result = restore(
        [problem(case).scans[0]],
        **{name: case["arguments"][name] for name in ("mask_1mm", "to_mni305", "contrast")},
        prior=case["arguments"]["prior"],
        n_samples=1,
        n_steps=2,
    )  # fmt: skip
    assert result.sampler == "exact"
