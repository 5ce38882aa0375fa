# SPDX-License-Identifier: Apache-2.0
"""``restore`` end to end on a small phantom, under a prior known in closed form.

The prior is Gaussian: a mean image that is a function of the MNI305 coordinates (so that wrong
coordinates show), and a stationary covariance around it. The scan is made by code of its own.
"""

from __future__ import annotations

import functools
import itertools
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from calls import restore_one
from gaussian import gaussian_prior
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import (
    GeometryError,
    InputError,
    MemoryShortageError,
    ShapeMismatchError,
    UsageError,
)
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.likelihood import Likelihood
from brainprior_bids.engine.operators.slices import slice_weights
from brainprior_bids.engine.problem import given_noise
from brainprior_bids.engine.restore import sample_seed
from brainprior_bids.engine.result import sample_sd
from brainprior_bids.engine.samplers.conditional import BLIND, answer_weights
from brainprior_bids.engine.samplers.daps import DapsSettings
from brainprior_bids.engine.sensing import reduce_to

GAIN = 700.0  # scanner units per unit of the phantom
NOISE = 0.02
RADII = (18.0, 22.0, 16.0)
TO_MNI = np.array([[1, 0, 0, 3.0], [0, 1, 0, -2.0], [0, 0, 1, 1.0], [0, 0, 0, 1]])


def anatomy(mm):
    """The prior's mean at (3, ...) MNI305 mm: an ellipsoid with folds, in [0, 1]."""
    x, y, z = mm[0] - 3, mm[1] + 2, mm[2] - 1
    r2 = (x / RADII[0]) ** 2 + (y / RADII[1]) ** 2 + (z / RADII[2]) ** 2
    folds = 0.65 + 0.3 * torch.cos(x / 2.5) * torch.cos(y / 3) * torch.cos(z / 2)
    return torch.where(r2 < 1, folds, 0.0)


def power(frequency):
    return 0.05 / (1 + (frequency / 0.08) ** 2) ** 1.5 + 1e-5


class Spectrum:
    def __init__(self, scale):
        self.scale = scale

    def variance(self, sigma, frequency):
        p = self.scale**2 * power(frequency)
        return sigma**2 * p / (sigma**2 + p)


class GaussianPrior:
    """D(x; sigma) of that prior, in the call shape of ``denoiser.Prior``.

    ``scale`` brings the phantom to the unit of the engine: 99th percentile of the scan = 1.
    """

    def __init__(self, scale):
        self.scale = scale
        self.calls = 0

    def spectrum(self, contrast):
        assert contrast == "T1w"
        return Spectrum(self.scale)

    def denoise(self, x, sigma, *, coordinates, contrast):
        self.calls += 1
        assert x.shape[0] == x.shape[1] == 1
        mean = self.scale * anatomy(coordinates)
        axes = [torch.fft.fftfreq(n) for n in x.shape[2:]]
        frequency = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)
        p = self.scale**2 * power(frequency)
        gain = p / (p + sigma**2)
        return (mean + torch.fft.ifftn(torch.fft.fftn(x[0, 0] - mean) * gain).real)[None, None]


def grid_of(shape, spacing):
    """Centred on the scanner's origin."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(spacing) * (np.array(shape) - 1) / 2
    return Grid(shape, affine)


def block_mean(x, factors):
    for axis, f in enumerate(factors):
        x = np.add.reduceat(x, np.arange(0, x.shape[axis], f), axis=axis) / f
    return x


def scale_of(y, share):
    return 1 / float(np.quantile(y[share > 0.5], 0.99))


@functools.cache
def phantom(axis=2, thick=4, bias=0.0, seed=0):
    """A scan of thick slices by plain block means, with everything that ``restore`` asks."""
    fine = grid_of((48, 56, 48), (1.0, 1.0, 1.0))
    factors = [thick if a == axis else 1 for a in range(3)]
    shape = tuple(n // f for n, f in zip(fine.shape, factors, strict=True))
    grid = grid_of(shape, [float(f) for f in factors])
    generator = torch.Generator().manual_seed(seed)
    mean = anatomy(torch.from_numpy(fine.points_mm(TO_MNI)))
    axes = [torch.fft.fftfreq(n) for n in fine.shape]
    root = power(torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)).sqrt()
    white = torch.randn(fine.shape, generator=generator)
    mask = (mean > 0).numpy()
    truth = np.where(
        mask, mean.numpy() + torch.fft.ifftn(torch.fft.fftn(white) * root).real.numpy(), 0
    )
    around = ndimage.binary_dilation(mask, iterations=6) & ~ndimage.binary_dilation(
        mask, iterations=3
    )
    head = truth + 0.7 * around
    field = bias * np.cos(math.pi * (np.arange(shape[1]) + 0.5) / shape[1])[None, :, None]
    share = block_mean(mask.astype(float), factors)
    field = field * np.ones(shape)
    field -= field[share > 0.5].mean()
    y = np.exp(field) * block_mean(head, factors)
    y = y + NOISE * torch.randn(shape, generator=generator).numpy()
    return {
        "truth": truth.astype(np.float32),
        "mask": mask,
        "field": field,
        "arguments": {
            "scan": (GAIN * y).astype(np.float32),
            "grid": grid,
            "acquisition": Acquisition(axis, float(thick), float(thick), "boxcar"),
            "mask": share,
            "mask_1mm": mask,
            "to_mni305": TO_MNI,
            "contrast": "T1w",
            "prior": GaussianPrior(scale_of(y / np.exp(field), share)),
            "n_steps": 8,
            "n_samples": 2,
            "thickness_sd": 0.0,  # the phantom's slices are as thick as stated
        },
    }


def run(case, **changes):
    arguments = {**case["arguments"], **changes}
    return restore_one(arguments.pop("scan"), **arguments)


def rmse(image, case):
    return float(np.sqrt(np.mean((image / GAIN - case["truth"])[case["mask"]] ** 2)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_restores_thick_slices_along_any_axis(axis):
    case = phantom(axis)
    result = run(case, n_samples=3)
    scan, factor = case["arguments"]["scan"], [4 if a == axis else 1 for a in range(3)]
    cubic = ndimage.zoom(scan, factor, order=3, mode="nearest", grid_mode=True)
    assert rmse(result.mean, case) < 0.6 * rmse(cubic, case)
    assert rmse(result.mean, case) < rmse(result.samples.mean(0), case)
    assert rmse(result.samples.mean(0), case) < rmse(result.samples[0], case)
    assert result.residual_ratios == pytest.approx([1, 1, 1], abs=0.1)
    assert result.noise_sd * result.unit / GAIN == pytest.approx(NOISE, rel=0.15)
    # the SD says how wrong the mean of three is
    z = (result.samples.mean(0) / GAIN - case["truth"])[case["mask"]]
    expected = math.sqrt(float((result.sd[case["mask"]] ** 2).mean()) * (1 + 1 / 3)) / GAIN
    assert float(np.sqrt((z**2).mean())) == pytest.approx(expected, rel=0.15)


def test_the_residual_is_judged():
    case = phantom()
    fine = run(case)
    assert fine.warnings == []
    shape = case["arguments"]["grid"].shape
    assert fine.residual_map.shape == shape
    core = case["arguments"]["mask"] > 0.99
    z = fine.residual_map[core]
    # of the scan minus what the mean of both samples predicts: a little below that of each
    assert 0.85 * min(fine.residual_ratios) < np.sqrt((z**2).mean()) < max(fine.residual_ratios)
    # a scan with a fault that no brain of this prior has: every other voxel brighter
    scan = case["arguments"]["scan"].copy()
    noise = fine.noise_sd_initial * fine.unit
    scan[::2, ::2] += 10 * noise
    bad = run(case, scan=scan, noise_sd=fine.noise_sd_initial)
    assert bad.residual_ratios[0] > 1.5
    assert any("times the noise" in warning for warning in bad.warnings)
    assert bad.residuals[0].ratio_final == pytest.approx(bad.residual_ratios[0])  # it was given


def ball(grid, centre_mm, radius_mm):
    offset = grid.points_mm() - np.array(centre_mm)[:, None, None, None]
    return np.square(offset).sum(0) < radius_mm**2


@pytest.mark.parametrize("thick", [1, 4])
def test_what_lies_under_the_mask_has_no_say(thick):
    """The same result whatever the scan shows there, and close to what is missing."""
    case = phantom(thick=thick)
    scan, grid = case["arguments"]["scan"], case["arguments"]["grid"]
    hidden = ball(grid, (4, -5, 3), 7)
    result = run(case, hidden=hidden, n_steps=6)
    lesion = np.where(hidden, 3 * scan.max(), scan)
    again = run(case, scan=lesion, hidden=hidden, n_steps=6)
    np.testing.assert_array_equal(result.mean, again.mean)
    np.testing.assert_array_equal(result.samples, again.samples)
    assert result.predictions.shape == (3, *grid.shape)
    # better than the prior's mean, which is one prior SD wrong; the scan's noise is not predicted
    fine = ball(grid.one_millimetre(), (4, -5, 3), 7)
    prior = anatomy(torch.from_numpy(grid.one_millimetre().points_mm(TO_MNI))).numpy()
    ignorant = np.sqrt(((prior - case["truth"])[fine] ** 2).mean())
    assert np.sqrt(((result.mean / GAIN - case["truth"])[fine] ** 2).mean()) < 0.95 * ignorant
    error = np.sqrt(((result.predictions[0] - scan)[hidden] ** 2).mean()) / GAIN
    assert error < np.hypot(NOISE, ignorant)
    # the spread is larger under the mask than beside it
    brain = case["mask"]
    assert result.sd[fine].mean() > {1: 1.2, 4: 1.05}[thick] * result.sd[brain & ~fine].mean()
    # in units of the true noise: the estimate beforehand takes texture for noise, by 15 % at 1 mm
    noise = result.noise_sd_initial * result.unit / GAIN / NOISE
    assert [noise * ratio for ratio in result.residual_ratios] == pytest.approx([1, 1], abs=0.08)


def test_daps_leaves_out_what_lies_under_the_mask():
    case = phantom(thick=1)
    scan, hidden = case["arguments"]["scan"], ball(case["arguments"]["grid"], (4, -5, 3), 7)
    settings = DapsSettings(n_levels=6, n_ode=2, n_langevin=40, sigma_max=10, sigma_min=0.01)
    options = {"sampler": "daps", "daps": settings, "n_samples": 1, "hidden": hidden}
    options["noise_sd"] = NOISE * case["arguments"]["prior"].scale
    result = run(case, **options)
    assert result.residual_ratios[0] < 1.1  # of the prior's mean: 1.5
    again = run(case, scan=np.where(hidden, 3 * scan.max(), scan), **options)
    np.testing.assert_array_equal(result.samples, again.samples)


def test_a_mask_over_the_whole_brain_is_refused():
    case = phantom()
    grid = case["arguments"]["grid"]
    with pytest.raises(InputError, match="covers the whole brain"):
        run(case, hidden=np.ones(grid.shape))
    rim = case["arguments"]["mask"] > 0.95  # what is left is cut by the mask's edge
    with pytest.raises(InputError, match="nothing is left to condition on"):
        run(case, hidden=rim)


def test_the_sd_of_few_samples_is_that_of_their_neighbourhood():
    """Of two draws; a voxel alone is off by 60 % and more. Nothing leaks at the border."""
    rng = np.random.default_rng(0)
    inside = np.zeros((32, 32, 24), bool)
    inside[4:-4, 4:-4, 4:-4] = True
    true = np.where(np.arange(32)[:, None, None] < 16, 1.0, 3.0) * np.ones(inside.shape)
    samples = (true * inside * rng.normal(size=(2, *inside.shape))).astype(np.float32)
    sd = sample_sd(samples, inside, (1.0, 1.0, 1.0))
    assert not sd[~inside].any()
    away = inside & (np.abs(np.arange(32)[:, None, None] - 15.5) > 4)
    off = sd[away] / true[away]
    assert np.sqrt((off**2).mean()) == pytest.approx(1, abs=0.05)  # no loss at the border
    assert off.std() < 0.2 < 0.6 < (samples.std(0, ddof=1)[away] / true[away]).std()
    everywhere = np.ones(inside.shape, bool)
    total = samples.var(0, ddof=1).sum()
    assert (sample_sd(samples, everywhere, (1, 1, 1)) ** 2).sum() == pytest.approx(total, rel=0.02)
    # slices of 6 mm are not averaged with each other
    coarse = sample_sd(samples, inside, (1.0, 1.0, 6.0))
    plane = sample_sd(samples[..., 10:11], inside[..., 10:11], (1.0, 1.0, 6.0))
    np.testing.assert_allclose(coarse[..., 10:11], plane, rtol=1e-3)


def test_the_record_is_complete():
    case = phantom()
    seen = []
    prior = GaussianPrior(case["arguments"]["prior"].scale)
    result = run(case, prior=prior, observe=lambda *what: seen.append(what))
    grid = case["arguments"]["grid"].one_millimetre()
    assert result.grid == grid
    assert result.samples.shape == (2, *grid.shape)
    assert result.samples.dtype == result.mean.dtype == result.sd.dtype == np.float32
    assert not result.mean[~case["mask"]].any()
    inside = result.mean != 0
    np.testing.assert_allclose(result.sd, sample_sd(result.samples, inside, (1, 1, 1)), rtol=1e-3)
    assert not result.samples[:, ~case["mask"]].any()
    assert prior.calls == 2 * result.calls == 16
    assert result.schedule[-1] == 0
    assert [(s, i) for s, _, _, i in seen] == list(itertools.product(range(8), [0])) + list(
        itertools.product(range(8), [1])
    )
    assert {total for _, total, _, _ in seen} == {8}
    brain = case["arguments"]["mask"] > 0.5
    assert abs(result.log_bias[brain].mean()) < 1e-6
    assert result.seeds == [sample_seed(0, 0), sample_seed(0, 1)]
    assert len({sample_seed(a, b) for a in range(20) for b in range(20)}) == 400
    assert result.sampler == "exact"
    assert result.seconds > 0
    single = run(case, n_samples=1)
    assert single.sd is None


def test_the_same_seed_gives_the_same_bytes():
    case = phantom()
    first, again, other = run(case), run(case, n_samples=1), run(case, seed=1, n_samples=1)
    assert first.samples[0].tobytes() == again.samples[0].tobytes()
    assert (first.samples[0] != first.samples[1]).any()
    assert (other.samples[0] != first.samples[0]).any()


@pytest.mark.parametrize("sampler", ["conditional", "mean", "exact", "daps"])
def test_no_global_randomness_is_read_or_moved(sampler):
    case, prior, result = phantom(), given_prior(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tobytes()
        result.append(
            run(
                case,
                sampler=sampler,
                prior=prior,
                n_samples=1,
                n_steps=3,
                daps=DapsSettings(n_levels=2, n_ode=1, n_langevin=3),
                move_bias=sampler in ("exact", "daps"),
            )
        )
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == np.random.get_state()[1].tobytes()
    assert result[0].mean.tobytes() == result[1].mean.tobytes()
    assert result[0].samples.tobytes() == result[1].samples.tobytes()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(1, 1, -1), (-1, 1, 1)])
def test_storage_order_and_flips_do_not_matter(order, flips):
    """A file stored otherwise is the same scan once it is read in closest-canonical order."""
    case = phantom()
    scan, grid = case["arguments"]["scan"], case["arguments"]["grid"]
    stored = nib.Nifti1Image(scan, grid.affine)
    start = nib.orientations.axcodes2ornt("RAS")
    wanted = np.stack([np.array(order), np.array(flips)], 1).astype(float)
    stored = stored.as_reoriented(nib.orientations.ornt_transform(start, wanted))
    canonical = nib.as_closest_canonical(stored)
    result = run(
        case,
        scan=canonical.get_fdata(dtype=np.float32),
        grid=Grid(canonical.shape, canonical.affine),
        n_samples=1,
        n_steps=2,
    )
    plain = run(case, n_samples=1, n_steps=2)
    assert np.abs(result.mean - plain.mean).max() <= 1e-5 * result.unit


def test_bias_is_found_from_nothing():
    case = phantom(bias=0.2)
    brain = case["arguments"]["mask"] > 0.5
    start = float(case["field"][brain].std())
    result = run(case, n_samples=1, n_steps=20, move_bias=True, bias_scale_mm=25)
    error = float((result.log_bias - case["field"])[brain].std())
    assert error < 0.3 * start
    # the gain that was found is the image's: field times image is as bright as the scan
    core, scan = case["arguments"]["mask"] > 0.99, case["arguments"]["scan"]
    again = np.exp(result.log_bias) * block_mean(result.samples[0], [1, 1, 4])
    assert again[core].sum() == pytest.approx(scan[core].sum(), rel=0.005)
    kept = run(case, n_samples=1, log_bias=case["field"], move_bias=False)
    np.testing.assert_allclose(kept.log_bias[brain], case["field"][brain], atol=1e-6)
    without = run(case, n_samples=1, n_steps=20, move_bias=False)
    assert rmse(result.mean, case) < rmse(without.mean, case)


def told(case, found):
    """Error of the mean of the samples over what their SD says of it."""
    z = (found.samples.mean(0) / GAIN - case["truth"])[case["mask"]]
    n = len(found.samples)
    expected = float((found.sd[case["mask"]] ** 2).mean()) * (1 + 1 / n) / GAIN**2
    return math.sqrt((z**2).mean() / expected)


def test_another_tools_image_beside_the_scan():
    """Better than the scan alone and than the image alone, and the SD still says how wrong."""
    case = phantom()
    rng = np.random.default_rng(0)
    error = 0.02  # phantom units: about what the prior and the scan leave open
    other = 3.0 * (case["truth"] + error * rng.standard_normal(case["truth"].shape))
    tau = error * case["arguments"]["prior"].scale
    alone = run(case, n_samples=3)
    both = run(case, n_samples=3, image=other, trust=tau)
    gain, correlation = both.images[0]
    # by least squares, against a scan with noise of its own: a little below the factor
    assert gain * both.unit == pytest.approx(GAIN / 3, rel=0.03)
    assert correlation > 0.95
    assert alone.images == []
    assert rmse(both.mean, case) < 0.85 * rmse(alone.mean, case)
    assert rmse(both.mean, case) < 0.85 * error
    assert told(case, both) == pytest.approx(1, rel=0.15)
    assert both.residual_ratios == pytest.approx([1, 1, 1], abs=0.1)
    # not trusted, it has no say
    ignored = run(case, n_samples=1, image=other, trust=1e3)
    np.testing.assert_allclose(ignored.mean, run(case, n_samples=1).mean, atol=1e-2 * GAIN)
    for options, messages in (
        ({"trust": 0.0}, "above 0"),
        ({"trust": 0.1, "image": 0 * other}, "same space"),
    ):
        with pytest.raises(InputError, match=messages):
            run(case, **{"image": other, **options})
    settings = DapsSettings(n_levels=12, n_ode=2, n_langevin=40)
    walked = run(case, image=other, trust=tau, sampler="daps", daps=settings, n_samples=1)
    assert rmse(walked.mean, case) < 0.9 * rmse(
        run(case, sampler="daps", daps=settings, n_samples=1).mean, case
    )


def test_an_image_that_is_not_trusted_everywhere():
    """``y = x + e`` with two SDs: the good half is kept, the bad half is mostly the prior's."""
    case = phantom(thick=1)
    truth, grid = case["truth"], case["arguments"]["grid"]
    rng = np.random.default_rng(0)
    sd = np.where(np.arange(grid.shape[0])[:, None, None] < 24, 0.02, 0.2) * np.ones(grid.shape)
    other = GAIN * (truth + sd * rng.standard_normal(grid.shape)).astype(np.float32)
    scale = scale_of(other / GAIN, case["arguments"]["mask"])
    options = {"scan": other, "prior": GaussianPrior(scale), "n_samples": 3}
    result = run(case, noise_sd=scale * sd, **options)
    assert told(case, result) == pytest.approx(1, rel=0.15)
    assert result.residual_ratios == pytest.approx([1, 1, 1], abs=0.1)
    even = run(case, noise_sd=scale * 0.1, **options)
    assert rmse(result.mean, case) < 0.9 * rmse(even.mean, case)
    left = result.sd[:20][case["mask"][:20]].mean()
    right = result.sd[28:][case["mask"][28:]].mean()
    assert left < 0.7 * right
    with pytest.raises(InputError, match="above 0 everywhere"):
        run(case, noise_sd=np.zeros(grid.shape), **options)


def test_a_given_noise_level_is_kept():
    result = run(phantom(), noise_sd=0.03, n_samples=1)
    assert result.noise_sd_initial == result.noise_sd == 0.03


@pytest.mark.parametrize(
    ("shape", "spacing", "axis"),
    [
        ((48, 42, 36), (1.0, 56 / 42, 48 / 36), 0),  # 3-D, sagittal, 1.33 mm in-plane
        ((60, 64, 12), (0.8, 0.875, 4.0), 2),  # finer than 1 mm in-plane
        ((32, 35, 12), (1.5, 1.6, 4.0), 2),  # coarser
        ((37, 43, 12), (48 / 37, 56 / 43, 4.0), 2),  # no common divisor
    ],
)
def test_voxels_of_any_size(shape, spacing, axis):
    """The scan is sampled from the continuous phantom, 3 x 3 x 3 points a voxel or more."""
    case = phantom()
    grid = grid_of(shape, spacing)
    inner = [max(3, round(3 * s)) for s in spacing]
    fine = Grid(
        tuple(n * f for n, f in zip(shape, inner, strict=True)),
        grid_of(
            [n * f for n, f in zip(shape, inner, strict=True)],
            [s / f for s, f in zip(spacing, inner, strict=True)],
        ).affine,
    )
    truth = anatomy(torch.from_numpy(fine.points_mm(TO_MNI))).numpy()
    share = block_mean((truth > 0).astype(float), inner)
    y = block_mean(truth, inner)
    y = y + NOISE * torch.randn(shape, generator=torch.Generator().manual_seed(1)).numpy()
    result = run(
        case,
        scan=(GAIN * y).astype(np.float32),
        grid=grid,
        acquisition=Acquisition(axis, spacing[axis], spacing[axis], "boxcar"),
        mask=share,
        prior=GaussianPrior(scale_of(y, share)),
        n_samples=1,
    )
    assert result.grid == case["arguments"]["grid"].one_millimetre()
    smooth = {**case, "truth": anatomy(torch.from_numpy(result.grid.points_mm(TO_MNI))).numpy()}
    smooth["mask"] = ndimage.binary_erosion(case["mask"], iterations=2)
    assert rmse(result.mean, smooth) < 0.06
    assert result.noise_sd * result.unit / GAIN == pytest.approx(
        NOISE, rel=0.7
    )  # block means are no k-space crop


def test_daps_runs_the_same_task():
    case = phantom(bias=0.2)
    settings = DapsSettings(n_levels=6, n_ode=2, n_langevin=10, sigma_max=10, sigma_min=0.05)
    prior = GaussianPrior(case["arguments"]["prior"].scale)
    result = run(
        case,
        sampler="daps",
        daps=settings,
        n_samples=1,
        prior=prior,
        move_bias=True,
        bias_scale_mm=25,
    )
    assert result.calls == prior.calls == 12
    np.testing.assert_array_equal(result.mean, result.samples[0])
    assert result.sampler == "daps"
    assert len(result.schedule) == 7
    brain = case["arguments"]["mask"] > 0.5
    assert float((result.log_bias - case["field"])[brain].std()) < case["field"][brain].std()
    assert rmse(result.mean, case) < 0.2


NAN = np.full((48, 56, 12), np.nan, np.float32)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"scan": np.zeros((3, 3, 3))}, ShapeMismatchError, "scan must have shape"),
        ({"mask": np.zeros((3, 3, 3))}, ShapeMismatchError, "mask must have shape"),
        ({"mask_1mm": np.zeros((3, 3, 3))}, ShapeMismatchError, "mask_1mm must have shape"),
        ({"log_bias": np.zeros((3, 3, 3))}, ShapeMismatchError, "log_bias must have shape"),
        ({"mask": np.zeros((48, 56, 12))}, InputError, "mask is empty"),
        ({"mask_1mm": np.zeros((48, 56, 48))}, InputError, "mask is empty"),
        ({"scan": NAN}, InputError, "NaN"),
        ({"scan": np.zeros((48, 56, 12))}, InputError, "all zero"),
        ({"noise_sd": 0.0}, InputError, "noise SD"),
        ({"noise_sd": math.nan}, InputError, "noise SD"),
        ({"noise_sd": -0.01}, InputError, "noise SD"),
        ({"noise_sd": math.inf}, InputError, "noise SD"),
        ({"scan": np.ones((48, 56, 12), np.complex64)}, InputError, "complex"),
        ({"mask": NAN}, InputError, "mask holds NaN"),
        ({"mask_1mm": np.full((48, 56, 48), np.nan)}, InputError, "mask_1mm holds NaN"),
        ({"log_bias": NAN}, InputError, "log_bias holds NaN"),
        ({"acquisition": Acquisition(2, 4.0, 60.0)}, GeometryError, "60.0 mm apart do not fit"),
        ({"device": "cuda:99"}, UsageError, "cuda:99 requested, but torch sees"),
        ({"device": "abacus"}, UsageError, "expected 'cpu' or 'cuda:N'"),
        ({"to_mni305": np.zeros((4, 4))}, GeometryError, "to_mni305"),
        ({"to_mni305": np.eye(3)}, GeometryError, "to_mni305"),
        ({"acquisition": Acquisition(2, 60.0, 4.0)}, GeometryError, "field of view"),
        ({"sampler": "magic"}, UsageError, "sampler"),
        ({"n_samples": 0}, UsageError, "n_samples"),
        ({"n_steps": 0}, UsageError, "n_steps"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    with pytest.raises(error, match=text):
        run(phantom(), **change)


def test_a_spacing_that_contradicts_the_image_is_told():
    result = run(phantom(), acquisition=Acquisition(2, 4.0, 6.0, "boxcar"), n_samples=1, n_steps=1)
    assert "the image header is used" in result.warnings[0]


def test_fallbacks_of_the_prior_are_told():
    case = phantom()
    prior = GaussianPrior(case["arguments"]["prior"].scale)
    prior.warnings = []
    assert run(case, prior=prior, n_samples=1, n_steps=1).warnings == []
    prior.warnings = ["Out of memory: tiles."]
    assert run(case, prior=prior, n_samples=1, n_steps=1).warnings == ["Out of memory: tiles."]


def test_a_measured_profile_is_believed():
    """A lopsided one: told of it, the result lies where the brain does."""
    case = phantom()
    pairs = ((-2.0, 0.0), (-1.9, 0.0), (0.0, 1.0), (2.0, 1.0), (2.1, 0.0))
    messages = Acquisition(2, 4.0, 4.0, pairs)
    weights = slice_weights(
        messages.cumulative(), n_slices=12, spacing_mm=4.0, n_thin=48, thin_mm=1.0
    )
    y = np.einsum("kz,ijz->ijk", weights.numpy(), case["truth"])
    y += NOISE * np.random.default_rng(0).standard_normal(y.shape)
    scale = scale_of(y, case["arguments"]["mask"])
    options = {"scan": (GAIN * y).astype(np.float32), "prior": GaussianPrior(scale)}
    options |= {"n_samples": 1, "noise_sd": NOISE * scale}
    right, wrong = run(case, acquisition=messages, **options), run(case, **options)
    assert rmse(right.mean, case) < 0.85 * rmse(wrong.mean, case)
    assert right.residual_ratios == pytest.approx([1], abs=0.1)


@pytest.mark.parametrize(
    "error",
    [MemoryError("no more"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 B\nat")],
)
def test_memory_that_runs_out_beside_the_network_is_said(monkeypatch, error):
    def hungry(*_, **__):
        raise error

    monkeypatch.setattr(Likelihood, "draw", hungry)
    with pytest.raises(MemoryShortageError, match=r"restore: out of memory outside .*Draw fewer"):
        run(phantom(), n_samples=1)
    error = RuntimeError("mat1 and mat2")
    with pytest.raises(RuntimeError, match="mat1"):
        run(phantom(), n_samples=1)


def test_tensors_are_taken_as_well():
    case = phantom()
    plain = run(case, n_samples=1, n_steps=1)
    scan = torch.from_numpy(case["arguments"]["scan"]).double()
    result = run(case, n_samples=1, n_steps=1, scan=scan)
    np.testing.assert_array_equal(result.mean, plain.mean)


@pytest.mark.parametrize(("angles", "warned"), [((35, 30, 30), False), ((60, 10, 0), True)])
def test_a_scan_turned_further_than_training_is_warned_of(angles, warned):
    case = phantom()
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    result = run(case, to_mni305=TO_MNI @ turn, n_samples=1, n_steps=1)
    assert any("turned by 61 degrees" in text for text in result.warnings) == warned


def given_prior(holes=0.0, **metadata):
    """A prior that takes measurements, as wide as the phantom."""
    sd = torch.tensor([1.0, 0.2, 0.2, 0.06, 0.2, 0.06, 0.06, 0.04])
    return gaussian_prior(sd, recipe={"holes": holes}, **metadata)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_auto_tells_the_network_of_thick_slices(axis):
    seen = []
    result = run(
        phantom(axis=axis),
        prior=given_prior(),
        sampler="auto",
        n_samples=2,
        n_steps=10,
        observe=lambda step, total, sigma, index: seen.append((step, total)),
    )
    assert result.sampler == "conditional"
    assert result.calls == 10
    assert seen == [(step, 10) for step in range(10)] * 2
    noise = result.noise_sd_initial * result.unit / GAIN / NOISE  # the estimate over the truth
    assert [noise * ratio for ratio in result.residual_ratios] == pytest.approx([1, 1], abs=0.12)
    assert result.sd[result.mean != 0].mean() > 0
    assert not np.array_equal(result.samples[0], result.samples[1])


@pytest.mark.parametrize("lesion", [False, True])
def test_auto_tells_the_network_of_the_voxels_of_a_3d_scan(lesion):
    case = phantom(thick=1)
    scan, grid = case["arguments"]["scan"], case["arguments"]["grid"]
    hidden = ball(grid, (4, -5, 3), 7)
    options = {"prior": given_prior(0.1), "sampler": "auto", "n_steps": 10, "n_samples": 3}
    options["noise_sd"] = NOISE * case["arguments"]["prior"].scale
    if lesion:
        options["hidden"] = hidden
    result = run(case, **options)
    assert result.sampler == "conditional"
    assert result.residual_ratios == pytest.approx([1] * 3, abs=0.15)
    brain = case["mask"] & ~hidden
    assert rmse(result.mean, {**case, "mask": brain}) < 1.1 * NOISE
    if lesion:
        assert result.sd[hidden].mean() > 3 * result.sd[brain].mean()
        painted = np.where(hidden, 3 * scan.max(), scan)
        again = run(case, **{**options, "scan": painted})
        np.testing.assert_array_equal(result.samples, again.samples)


def test_the_weights_factor_on_the_noise_counts_for_slices_and_not_beside_a_hole():
    options = {"sampler": "auto", "n_steps": 8, "n_samples": 2}
    plain, wider = (given_prior(0.1, **extra) for extra in ({}, {"inflation": 1.3}))
    case = phantom()
    one, other = (run(case, prior=prior, **options) for prior in (plain, wider))
    assert other.sd.mean() == pytest.approx(1.3 * one.sd.mean(), rel=0.02)
    case = phantom(thick=1)
    options["hidden"] = ball(case["arguments"]["grid"], (4, -5, 3), 7)
    one, other = (run(case, prior=prior, **options) for prior in (plain, wider))
    np.testing.assert_array_equal(one.samples, other.samples)


def test_another_tools_image_beside_slices_under_conditional():
    """As with "exact": better than the scan alone, and not trusted it has no say. (At the border,
    the surroundings of the brain count for the scan alone.)
    """
    case = phantom()
    rng = np.random.default_rng(0)
    other = 3.0 * (case["truth"] + 0.02 * rng.standard_normal(case["truth"].shape))
    tau = 0.02 * case["arguments"]["prior"].scale
    options = {"prior": given_prior(), "sampler": "conditional", "n_steps": 10}
    alone = run(case, **options)
    both = run(case, image=other, trust=tau, **options)
    assert rmse(both.mean, case) < 0.5 * rmse(alone.mean, case)
    assert rmse(both.mean, case) < 0.021
    assert both.images[0][1] > 0.95
    ignored = run(case, image=other, trust=1e4, **options)
    inner = ndimage.binary_erosion(case["mask"], iterations=4)
    np.testing.assert_allclose(ignored.mean[inner], alone.mean[inner], atol=0.02 * GAIN)


@pytest.mark.parametrize(
    ("scan", "n_samples", "first"),
    [
        ("slices", 1, 2 / 3),
        ("slices", 2, 1 / 2),
        ("slices", 8, 1 / 5),
        ("3-D", 1, 1 / 6),
        ("3-D", 4, 1 / 6),
        ("hole", 1, 1 / 6),
    ],
)
def test_between_slices_the_first_answer_counts_more_the_fewer_there_are(scan, n_samples, first):
    """The first answer of each chain is 0, the others are 1: the mean tells the weights. Samples
    that assume the same slice thickness share the first.
    """
    case, prior = phantom(thick=4 if scan == "slices" else 1), given_prior(0.1)
    prior.answered, calls, options = 0, 6, {}

    def denoise(x, sigma, **_):
        prior.answered += 1
        return torch.full_like(x, float(sigma < BLIND))

    prior.denoise = denoise
    judged = case["mask"].copy()
    if scan == "hole":
        options["hidden"] = ball(case["arguments"]["grid"], (4, -5, 3), 7)
        judged &= options["hidden"]
    result = run(
        case, prior=prior, sampler="conditional", n_samples=n_samples, n_steps=calls, **options
    )
    assert prior.answered == (calls - 1) * n_samples + 1
    np.testing.assert_allclose(result.mean[judged] / result.unit, 1 - first, rtol=1e-5)
    assert result.samples[:, judged] / result.unit == pytest.approx(1)
    prior.answered, few = 0, {"sampler": "conditional", "n_samples": 4, "n_steps": 2}
    run(case, prior=prior, thickness_sd=0.05, **few)
    assert prior.answered == 4 + (3 if scan == "slices" else 1)
    assert answer_weights(3, 1) == (1.0, 1.0)
    assert answer_weights(1000, 5) == pytest.approx((0.2, 0.2))  # never less than a later one


def test_auto_falls_back_where_the_slices_are_not_of_that_kind():
    thin = run(phantom(thick=1), prior=given_prior(), sampler="auto", n_samples=1, n_steps=4)
    assert thin.sampler == "exact"
    assert thin.sampler_reason == "the prior was not trained on scans with holes"
    case = phantom()
    hidden = ball(case["arguments"]["grid"], (4, -5, 3), 7)
    thick = run(case, prior=given_prior(0.1), sampler="auto", hidden=hidden, n_steps=4)
    assert thick.sampler == "exact"
    assert thick.sampler_reason.startswith("voxels are hidden of a scan that is coarser")
    with pytest.raises(UsageError, match="not trained to be conditioned on measurements"):
        run(case, sampler="conditional", n_samples=1, n_steps=4)
    with pytest.raises(UsageError, match="does not move the bias field"):
        run(
            case,
            prior=given_prior(),
            sampler="conditional",
            move_bias=True,
            n_samples=1,
            n_steps=4,
        )


@pytest.mark.parametrize("sampler", ["exact", "conditional"])
def test_each_sample_takes_slices_of_a_thickness_of_its_own(sampler):
    """Sample k is what a scan gives that is stated to be as thick as sample k assumes."""
    case = phantom()
    options = {"sampler": sampler, "n_samples": 3, "n_steps": 4, "prior": given_prior()}
    if sampler == "exact":
        options["prior"] = case["arguments"]["prior"]
    options["noise_sd"] = NOISE * case["arguments"]["prior"].scale
    result = run(case, thickness_sd=0.1, **options)
    assert result.thickness_factors == pytest.approx(
        [1, 1 + 0.1 * math.sqrt(1.5), 1 - 0.1 * math.sqrt(1.5)]
    )
    assert np.mean(result.thickness_factors) == pytest.approx(1)
    assert np.std(result.thickness_factors) == pytest.approx(0.1)
    for k, width in enumerate(result.thickness_factors):
        stated = Acquisition(2, 4.0 * width, 4.0, "boxcar")
        alone = run(case, acquisition=stated, **options)
        assert alone.thickness_factors == [1, 1, 1]
        np.testing.assert_allclose(result.samples[k], alone.samples[k], atol=1e-6 * GAIN)
    plain = run(case, **options)
    np.testing.assert_array_equal(result.samples[0], plain.samples[0])
    assert result.sd[case["mask"]].mean() > plain.sd[case["mask"]].mean()
    assert result.residual_ratios == pytest.approx(plain.residual_ratios, abs=0.1)


def test_the_bias_field_is_found_under_every_thickness():
    case = phantom(bias=0.2)
    options = {"n_samples": 3, "n_steps": 20, "move_bias": True, "bias_scale_mm": 25}
    result = run(case, thickness_sd=0.1, **options)
    assert result.residual_ratios == pytest.approx([1, 1, 1], abs=0.1)
    brain = case["arguments"]["mask"] > 0.5
    assert (result.log_bias - case["field"])[brain].std() < 0.3 * case["field"][brain].std()


def test_a_3d_scan_has_no_doubt_about_slices():
    result = run(phantom(thick=1), n_steps=3, thickness_sd=0.1)
    assert result.thickness_factors == [1, 1]
    with pytest.raises(UsageError, match="thickness_sd must be between"):
        run(phantom(), thickness_sd=-0.1)


def test_a_mask_that_is_a_voxel_too_narrow_costs_nothing_with_a_rim():
    case = phantom()
    truth, mask = GAIN * case["truth"], case["mask"]
    narrow = ndimage.binary_erosion(mask)
    share = block_mean(narrow.astype(float), [1, 1, 4])
    border = mask & ~narrow

    def error(found):
        return float(np.sqrt(np.square(found.mean - truth)[border].mean()))

    right = run(case, n_samples=1)
    cut = run(case, n_samples=1, mask=share, mask_1mm=narrow)
    rimmed = run(case, n_samples=1, mask=share, mask_1mm=narrow, rim_mm=1.5)
    assert error(cut) == pytest.approx(float(np.sqrt(np.square(truth[border]).mean())))
    assert error(rimmed) < 1.2 * error(right) < 0.3 * error(cut)
    beyond = ndimage.distance_transform_edt(~narrow) > 1.5
    assert not rimmed.samples[0][beyond].any()
    assert rimmed.samples[0][~beyond].all()
    assert rimmed.noise_sd_initial == cut.noise_sd_initial


def test_a_rim_below_zero_is_refused():
    with pytest.raises(UsageError, match="rim_mm must be at least 0, got -1"):
        run(phantom(), rim_mm=-1)


def test_a_map_of_the_noise_is_its_smallest_sd_and_the_variance_beyond():
    sd = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    brain = sd < 0.9
    lowest, extra = given_noise(sd, brain, 0.5, (4, 5, 6))
    assert lowest == pytest.approx(0.5 * float(sd.min()))
    torch.testing.assert_close((lowest**2 + extra)[brain], (0.5 * sd[brain]) ** 2)


def test_white_noise_loses_what_the_crop_to_the_image_says():
    noise = torch.randn(60, 50, 40, generator=torch.Generator().manual_seed(0))
    less, factor = reduce_to(noise, (40, 50, 30))
    assert less.shape == (40, 50, 30)
    assert factor == pytest.approx(math.sqrt(40 / 60 * 30 / 40))
    assert float(less.std()) == pytest.approx(factor, rel=0.05)  # and the Nyquist frequency
