# SPDX-License-Identifier: Apache-2.0
"""Runs of one brain in one likelihood; the matrix between their grids."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import GeometryError, InputError, UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.nuisance import THICKNESS_SD, Nuisances
from brainprior_bids.engine.observation import Observation, mean_position
from brainprior_bids.engine.operators.resample import AffineResample, SparseResample
from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.sensing import hidden_voxels

SHAPE, THICK, NOISE, UNIT = (36, 40, 32), 4, 0.02, 500.0
TO_MNI = np.array([[1, 0, 0, 2.0], [0, 1, 0, -1.0], [0, 0, 1, 0.5], [0, 0, 0, 1]])


def turn(degrees, shift):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.eye(4)
    matrix[1:3, 1:3] = [[c, -s], [s, c]]
    matrix[:3, 3] = shift
    return matrix


MOTION = turn(6.0, (1.3, -0.7, 2.2))
"""Reference mm -> mm of the second run."""


def ellipsoid(mm):
    return (mm[0] / 13) ** 2 + (mm[1] / 15) ** 2 + (mm[2] / 11) ** 2 < 1


def truth_at(mm):
    """Waves of 7 to 8 mm in an ellipsoid, at (3, ...) mm of the reference."""
    x, y, z = torch.as_tensor(mm)
    waves = 0.7 + 0.1 * (torch.cos(x / 1.1) + torch.cos(y / 1.3) + torch.cos(z / 1.1))
    return torch.where(ellipsoid((x, y, z)), waves, 0.0)


class Prior:
    """Gaussian about a flat brain, its power falling above 0.1 cycles/mm."""

    def spectrum(self, contrast):
        return self

    @staticmethod
    def power(frequency):
        return 0.3 / (1 + (frequency / 0.1) ** 4) + 1e-5

    def variance(self, sigma, frequency):
        p = self.power(frequency)
        return sigma**2 * p / (sigma**2 + p)

    def denoise(self, x, sigma, *, coordinates, contrast):
        mm = coordinates - torch.tensor([2.0, -1.0, 0.5]).reshape(3, 1, 1, 1)
        mean = torch.where(ellipsoid(mm), 0.7, 0.0)
        axes = [torch.fft.fftfreq(n) for n in x.shape[2:]]
        p = self.power(torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0))
        kept = torch.fft.ifftn(torch.fft.fftn(x[0, 0] - mean) * (p / (p + sigma**2))).real
        return (mean + kept)[None, None]


def make_run(axis, motion, noise=NOISE, seed=0, gain=1.0, around=0.0):
    """Block means of the truth as it lies after ``motion``, in surroundings of a brightness."""
    fine_affine = np.eye(4)
    fine_affine[:3, 3] = -(np.array(SHAPE) - 1) / 2
    fine = Grid(SHAPE, fine_affine)
    back = np.linalg.inv(motion)
    moved = truth_at(fine.points_mm(back)).numpy()
    shape = [n // THICK if a == axis else n for a, n in enumerate(SHAPE)]
    factor = [THICK if a == axis else 1 for a in range(3)]

    def mean(v):
        split = [n for s, f in zip(shape, factor, strict=True) for n in (s, f)]
        return v.reshape(split).mean((1, 3, 5))

    affine = fine_affine @ np.diag([*factor, 1.0])
    affine[:3, 3] = fine_affine[:3, 3] + (np.array(factor) - 1) / 2
    y = mean(np.where(moved > 0, moved, around)) + noise * np.random.default_rng(seed).normal(
        size=shape
    )
    return Observation(
        (UNIT * y / gain).astype(np.float32),
        Grid(tuple(shape), affine),
        Acquisition(axis, THICK, THICK, "boxcar"),
        mean((moved > 0).astype(np.float32)).astype(np.float32),
        to_reference=back,
        gain=gain,
        name=f"run-{axis}",
    ), moved


def together(*runs, **changes):
    fine = runs[0].grid.one_millimetre()
    options = {
        "mask_1mm": truth_at(fine.points_mm()) > 0,
        "to_mni305": TO_MNI,
        "contrast": "T1w",
        "prior": Prior(),
        "n_samples": 2,
        "n_steps": 8,
        "sigma_max": 1.0,
    }
    options |= changes
    nuisances = Nuisances(options.pop("thickness_sd", THICKNESS_SD))
    result = restore(runs, nuisances=nuisances, **options)
    return result, result.scans


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("around", [0.0, 1.5], ids=["stripped", "in fat"])
def test_the_slices_of_a_scan_say_the_same_in_several_observations(around, count):
    """In both strategies x is 0 outside the brain, and the surroundings are unknown."""
    scan, truth = make_run(2, np.eye(4), seed=1, around=around)
    one, _ = together(scan, thickness_sd=0.0)
    several, fits = together(
        replace(scan, interleave_motion=[np.eye(4)] * count), thickness_sd=0.0
    )
    assert (one.solve, several.solve) == ("spectral", "image space")
    assert error(several.mean, truth) < 1.05 * error(one.mean, truth)
    assert [fit.name for fit in fits] == ["run-2"]


INTERLEAVES = turn(5.0, (0.6, -1.0, 1.2))
"""Even slices -> odd ones, mm: the participant moved in between."""


def interleaved(gain=1.0):
    """A scan with motion before its odd slices, which are ``gain`` times as bright, and the brain
    halfway.
    """
    half = mean_position([np.eye(4), INTERLEAVES])
    scan, _ = make_run(2, np.linalg.inv(half), seed=1)
    later, _ = make_run(2, half, seed=2)
    _, truth = make_run(2, np.eye(4))
    scan, later = (replace(one, to_reference=np.eye(4)) for one in (scan, later))
    odd = torch.arange(scan.grid.shape[2]) % 2 == 1
    return replace(
        scan,
        scan=torch.where(odd, gain * later.scan, scan.scan),
        mask=torch.where(odd, later.mask, scan.mask),
        log_bias=torch.where(odd, math.log(gain), 0.0).expand(scan.grid.shape),
        interleave_motion=[np.eye(4), np.linalg.inv(INTERLEAVES)],
    ), truth


def test_displaced_interleaves_are_two_observations_of_one_brain():
    scan, truth = interleaved()
    done, (fit,) = together(scan, sampler="auto")
    assert done.sampler_reason == "the interleaves of the scan are displaced"
    ignored, _ = together(replace(scan, interleave_motion=None), sampler="exact")
    assert error(done.mean, truth) < 0.85 * error(ignored.mean, truth)
    assert all(residual.ratio < 1.4 for residual in fit.residuals)
    assert len(fit.residuals) == 2
    assert (np.abs(fit.residual_map).max((0, 1)) > 0)[2:-2].all()  # of both interleaves
    np.testing.assert_array_equal(fit.residual_map, done.residual_map)


def test_slices_of_displaced_interleaves_are_predicted_where_they_were_measured():
    scan, _ = interleaved(gain=1.3)
    done, _ = together(scan, on_scan=True, n_samples=1)
    assert done.predictions is not None
    inside = scan.mask.numpy() > 0.99
    off = (done.predictions[0] - scan.scan.numpy()) / UNIT
    for parity, gain in ((0, 1.0), (1, 1.3)):
        part = np.s_[..., 2 + parity : 6 : 2]
        assert np.sqrt(np.mean(off[part][inside[part]] ** 2)) < 2 * gain * NOISE


def test_the_mean_of_two_positions_is_halfway():
    half = mean_position([np.eye(4), INTERLEAVES])
    np.testing.assert_allclose(half @ half, INTERLEAVES, atol=1e-12)


def test_the_mean_of_positions_does_not_depend_on_the_reference():
    motions = [np.eye(4), INTERLEAVES, turn(-8.0, (2.0, 0.5, -1.0))]
    mean, other = mean_position(motions), mean_position(motions[::-1])
    np.testing.assert_allclose(other, mean, atol=1e-12)
    moved = mean_position([INTERLEAVES @ one for one in motions])
    np.testing.assert_allclose(moved, INTERLEAVES @ mean, atol=1e-12)
    np.testing.assert_array_equal(mean_position([np.eye(4)] * 3), np.eye(4))


def three_interleaves():
    """A scan of three interleaves, each in another position, and the brain in their mean."""
    motions = [np.eye(4), INTERLEAVES, turn(-4.0, (0.8, 0.9, -0.7))]
    mean = mean_position(motions)
    runs = [
        make_run(2, motion @ np.linalg.inv(mean), seed=seed)[0]
        for seed, motion in enumerate(motions, 1)
    ]
    _, truth = make_run(2, np.eye(4))
    own = torch.arange(runs[0].grid.shape[2]) % 3
    scan, mask = (
        sum(torch.where(own == p, values(run), 0.0) for p, run in enumerate(runs))
        for values in (lambda run: run.scan, lambda run: run.mask)
    )
    back = [np.linalg.inv(motion) for motion in motions]
    one = replace(runs[0], scan=scan, mask=mask, to_reference=np.eye(4))
    return replace(one, interleave_motion=back), truth


def test_three_displaced_interleaves_are_three_observations_of_one_brain():
    scan, truth = three_interleaves()
    done, (fit,) = together(scan, on_scan=True)
    ignored, _ = together(replace(scan, interleave_motion=None), sampler="exact")
    assert error(done.mean, truth) < 0.85 * error(ignored.mean, truth)
    assert all(residual.ratio < 1.4 for residual in fit.residuals)
    inside = scan.mask.numpy() > 0.99
    off = (done.predictions[0] - scan.scan.numpy()) / UNIT
    for p in range(3):
        part = np.s_[..., 2 + p : 8 : 3]
        assert np.sqrt(np.mean(off[part][inside[part]] ** 2)) < 2 * NOISE


@pytest.mark.parametrize(
    "motions", [np.eye(4), [np.eye(4)], [np.eye(4)] * 40, [np.eye(4), np.zeros((4, 4))]]
)
def test_interleaves_without_a_motion_each_are_refused(motions):
    scan, _ = interleaved()
    with pytest.raises(GeometryError, match="interleave_motion"):
        replace(scan, interleave_motion=motions)


def test_warnings_of_a_scan_with_displaced_interleaves_come_once():
    scan, _ = interleaved()
    stated = replace(scan, acquisition=Acquisition(2, THICK, 1.1 * THICK, "boxcar"))
    done, _ = together(stated, n_samples=1, n_steps=2)
    assert sum("mm apart" in text for text in done.warnings) == 1


def test_displaced_interleaves_of_thin_slices_are_refused():
    scan, _ = interleaved()
    thin = Grid(scan.grid.shape, scan.grid.affine @ np.diag([1, 1, 0.2, 1]))
    with pytest.raises(GeometryError, match="at least 1 mm apart"):
        replace(scan, grid=thin, acquisition=Acquisition(2, 1.6, 0.8))


def test_displaced_interleaves_of_different_brightness_show_the_same_brain():
    """The mean of the bias field differs between them."""
    alike, brighter = (together(interleaved(gain)[0], sampler="exact")[0] for gain in (1.0, 1.3))
    np.testing.assert_allclose(brighter.mean, alike.mean, atol=1e-3 * UNIT)
    odd = (brighter.log_bias - alike.log_bias)[..., 1::2]
    np.testing.assert_allclose(odd, math.log(1.3), atol=1e-5)


def test_hidden_slices_hide_no_others_where_the_plane_is_finer_than_the_image():
    hidden = torch.zeros(20, 24, 6)
    hidden[..., 1::2] = 1
    reduced = hidden_voxels(hidden, (10, 24, 6))
    np.testing.assert_array_equal(reduced, hidden[:10] > 0)
    point = torch.zeros(20, 24, 6)
    point[8, 12, 3] = 1
    assert hidden_voxels(point, (10, 24, 6)).nonzero().tolist() == [[i, 12, 3] for i in (3, 4, 5)]


@pytest.fixture(scope="module")
def crossed():
    first, truth = make_run(2, np.eye(4), seed=1)
    second, _ = make_run(0, MOTION, seed=2, gain=1.3)
    return first, second, truth


def error(image, truth):
    inside = truth > 0
    return float(np.sqrt(np.mean((image / UNIT - truth)[inside] ** 2)))


def test_two_crossed_stacks_of_a_moved_brain_show_more_than_each(crossed):
    first, second, truth = crossed
    done, explained = together(first, second)
    fine = first.grid.one_millimetre()
    assert done.grid == fine
    assert done.samples.shape == (2, *fine.shape)
    assert done.unit == pytest.approx(np.quantile(first.scan[first.mask > 0.5], 0.99), rel=0.01)
    alone, _ = together(first)
    fused, single = error(done.mean, truth), error(alone.mean, truth)
    assert fused < 0.75 * single, (fused, single)  # seeded
    assert (done.sampler, done.solve, alone.solve) == ("exact", "image space", "spectral")
    assert "conditioned on measurements" in done.sampler_reason
    assert [e.name for e in explained] == ["run-2", "run-0"]
    for run, result in zip((first, second), explained, strict=True):
        assert result.residual_map.shape == run.scan.shape
        assert result.noise_sd == pytest.approx(NOISE, rel=0.4)
        assert all(0.8 < r.ratio < 1.3 for r in result.residuals)
    again, _ = together(first, second, n_samples=1)
    np.testing.assert_array_equal(again.samples[0], done.samples[0])


def test_a_run_of_a_brain_that_did_not_move_may_have_other_voxels():
    first, truth = make_run(2, np.eye(4), seed=1)
    whole, _ = make_run(0, np.eye(4), seed=2)
    shape = whole.grid.shape
    part = np.s_[:, 4:-2]
    second = replace(
        whole, scan=whole.scan[part], mask=whole.mask[part], log_bias=whole.log_bias[part],
        grid=whole.grid.crop((0, 4, 0), (shape[0], shape[1] - 2, shape[2])),
    )  # fmt: skip
    fused, expected, alone = (
        together(*runs, n_samples=1)[0] for runs in ((first, second), (first, whole), (first,))
    )
    assert error(fused.mean, truth) < 0.75 * error(alone.mean, truth)
    assert error(fused.mean, truth) == pytest.approx(error(expected.mean, truth), rel=0.02)


def test_the_second_sample_takes_wider_slices_in_all_runs(crossed):
    first, second, _ = crossed
    done, _ = together(first, second)
    assert done.thickness_factors == [1, pytest.approx(1 + THICKNESS_SD * 1.5**0.5)]
    wider = [
        replace(r, acquisition=replace(r.acquisition, thickness_mm=t * done.thickness_factors[1]))
        for r, t in (
            (first, first.acquisition.thickness_mm),
            (second, second.acquisition.thickness_mm),
        )
    ]
    stated, _ = together(*wider, thickness_sd=0.0)
    # the noise found before sampling depends on the thickness by a little
    np.testing.assert_allclose(done.samples[1], stated.samples[1], atol=1e-3 * UNIT)
    plain, _ = together(first, second, thickness_sd=0.0)
    assert np.abs(done.samples[1] - plain.samples[1]).max() > 0.02 * UNIT


def test_repeated_3d_scans_have_no_doubt_about_slices(crossed):
    _, _, truth = crossed
    fine = crossed[0].grid.one_millimetre()
    rng = np.random.default_rng(0)
    scans = [
        Observation(
            (UNIT * (truth + NOISE * rng.standard_normal(truth.shape))).astype(np.float32),
            fine, Acquisition(2, 1.0, 1.0), (truth > 0).astype(np.float32), name=name,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    done, _ = together(*scans, n_steps=2)
    assert done.thickness_factors == [1, 1]


def test_without_the_motion_the_runs_contradict_each_other(crossed):
    first, second, _ = crossed
    done, explained = together(first, replace(second, to_reference=np.eye(4)), n_samples=1)
    assert max(r.ratio for e in explained for r in e.residuals) > 1.5
    assert any("run-" in text and "residual" in text for text in done.warnings)


def test_a_noisy_run_has_less_to_say():
    clean, truth = make_run(2, np.eye(4), seed=1)
    noisy, _ = make_run(2, np.eye(4), noise=0.2, seed=2)
    noisy = replace(noisy, name="noisy")
    one, messages = together(clean, noisy, n_samples=1)
    assert messages[1].noise_sd > 5 * messages[0].noise_sd
    average = replace(clean, scan=(clean.scan + noisy.scan) / 2)
    two, _ = together(average, replace(average, name="twice"), n_samples=1)
    assert error(one.mean, truth) < 0.95 * error(two.mean, truth)  # measured: 0.077, 0.085


def test_repeated_runs_average_their_noise():
    runs = [make_run(2, np.eye(4), noise=0.06, seed=s)[0] for s in range(4)]
    truth = make_run(2, np.eye(4))[1]
    four, _ = together(*[replace(r, name=f"run-{i}") for i, r in enumerate(runs)], n_samples=1)
    two, _ = together(runs[0], replace(runs[0], name="same"), n_samples=1)
    assert error(four.mean, truth) < 0.95 * error(two.mean, truth)  # measured: 0.071, 0.077


@pytest.mark.parametrize(
    ("change", "wrong", "kind", "text"),
    [
        ({"sampler": "conditional"}, {}, UsageError, "conditioned on measurements"),
        ({"n_samples": 0}, {}, UsageError, "n_samples"),
        ({"mask_1mm": np.zeros(SHAPE)}, {}, InputError, "mask is empty"),
        ({"mask_1mm": np.zeros((2, 2, 2))}, {}, Exception, "mask_1mm must have shape"),
        ({"to_mni305": np.zeros((4, 4))}, {}, GeometryError, "invertible"),
        ({}, {"scan": np.full((9, 40, 32), np.nan, np.float32)}, InputError, "run-0: .*NaN"),
        ({}, {"scan": np.zeros((2, 2, 2), np.float32)}, Exception, "run-0: .*shape"),
        ({}, {"mask": np.zeros((9, 40, 32), np.float32)}, InputError, "run-0: .*mask is empty"),
        ({}, {"gain": 0.0}, InputError, "run-0: the gain"),
        ({}, {"to_reference": turn(0, (500, 0, 0))}, InputError, "run-0: none of the"),
        ({}, {"to_reference": np.zeros((4, 4))}, GeometryError, "invertible"),
    ],
)
def test_bad_runs_are_named(crossed, change, wrong, kind, text):
    first, second, _ = crossed
    with pytest.raises(kind, match=text):
        together(first, replace(second, **wrong), **change)


def test_no_scan_a_moved_reference_or_a_dark_one_is_refused(crossed):
    first, second, _ = crossed
    with pytest.raises(UsageError, match="at least one Observation"):
        restore([], mask_1mm=first.mask, to_mni305=TO_MNI, contrast="T1w", prior=Prior())
    with pytest.raises(UsageError, match="run-0 comes first and is the reference"):
        together(second, first)
    with pytest.raises(InputError, match="run-2: the 99th percentile"):
        together(replace(first, scan=0 * first.scan), second)


def resamplings():
    grid = Grid((7, 6, 5), np.diag([1.0, 1.1, 0.9, 1]))
    matrix = turn(20.0, (0.3, -0.4, 0.2))
    within = torch.rand(7, 6, 5, generator=torch.Generator().manual_seed(3)) > 0.3
    target = grid.crop((1, 1, 0), (7, 5, 5))
    return (
        SparseResample(grid, target, matrix, within=within),
        AffineResample(grid, target, matrix),
        within,
    )


def test_the_matrix_is_linear_interpolation_and_its_transpose_the_adjoint():
    sparse, pull, within = resamplings()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 6, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 6, 4, 5, generator=generator, dtype=torch.float64)
    last = torch.tensor([6.0, 5.0, 4.0])
    inner = ((pull.points >= 0) & (pull.points <= last)).all(-1)
    assert int(inner.sum()) > 40
    difference = (sparse(x) - pull(x * within))[:, inner]
    assert float(difference.abs().max()) < 1e-12
    one, two = (sparse(x) * y).sum(), (x * sparse.adjoint(y)).sum()
    assert float((one - two).abs()) < 1e-12 * float(x.norm() * y.norm())
    unit = torch.eye(210, dtype=torch.float64).reshape(-1, 7, 6, 5)
    dense = sparse(unit).reshape(210, -1).T
    torch.testing.assert_close((dense @ x[0].flatten()).reshape(6, 4, 5), sparse(x[0]))
    assert sparse(x.float()).dtype == torch.float32
    torch.testing.assert_close(sparse(x.float()).double(), sparse(x), atol=1e-5, rtol=0)


def test_a_matrix_needs_an_invertible_motion():
    grid = Grid((3, 3, 3), np.eye(4))
    with pytest.raises(GeometryError, match="invertible"):
        SparseResample(grid, grid, np.zeros((4, 4)), within=torch.ones(3, 3, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="lies within"):
        SparseResample(grid, grid, np.eye(4), within=torch.zeros(3, 3, 3, dtype=torch.bool))


def test_the_rim_beyond_a_narrow_mask_is_restored(crossed):
    first, second, truth = crossed
    narrow = ndimage.binary_erosion(truth > 0)
    done, _ = together(first, second, mask_1mm=narrow, rim_mm=1.5, n_samples=1, n_steps=2)
    beyond = ndimage.distance_transform_edt(~narrow)
    assert done.samples[0][beyond <= 1.5].all()
    assert not done.samples[0][beyond > 1.5].any()
