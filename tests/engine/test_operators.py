# SPDX-License-Identifier: Apache-2.0
"""One law kit over every operator, in float64, and a dense or slow oracle for each."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, ndimage, stats

from brainprior_bids.engine.box import Box
from brainprior_bids.engine.errors import GeometryError, InputError, ShapeMismatchError
from brainprior_bids.engine.gaussian.image_space import sliced
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.operators.base import Composition, VStack, squared_norm
from brainprior_bids.engine.operators.diagonal import Multiply
from brainprior_bids.engine.operators.fourier import (
    kept_frequencies,
    resampling_matrix,
)
from brainprior_bids.engine.operators.resample import AffineResample, SparseResample
from brainprior_bids.engine.operators.slices import (
    SliceProfile,
    boxcar_profile,
    gaussian_profile,
    measured_profile,
    slice_weights,
    trapezoid_profile,
)

SHAPE = (5, 6, 7)
OBLIQUE = np.array(
    [[0.9, -0.3, 0.1, 1.0], [0.2, 1.1, 0.2, -0.5], [0.0, -0.1, 1.3, 0.3], [0, 0, 0, 1]]
)


def weights(n_slices=3, n_thin=7, thickness=2.0, make=gaussian_profile):
    spacing = n_thin / n_slices
    return slice_weights(
        make(thickness),
        n_slices=n_slices,
        spacing_mm=spacing,
        n_thin=n_thin,
        thin_mm=1.0,
    )


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lopsided(thickness):
    """A measured profile, not symmetric."""
    at = torch.tensor([-1.0, -0.2, 0.3, 0.7], dtype=torch.float64) * thickness
    return measured_profile(at, torch.tensor([0.0, 2.0, 5.0, 0.0]))


def operators():
    grid = Grid(SHAPE, np.eye(4))
    target = Grid((4, 5, 3), OBLIQUE)
    profile = SliceProfile(weights(), SHAPE, 2)
    bias = Multiply(1 + 0.3 * random(*profile.out_shape).abs())
    brain = random(*SHAPE, seed=7) > -0.5
    box = Box((0, 0, 0), SHAPE, (0, 0, 0), (4, 5, 3))
    return {
        "bias": Multiply(1 + 0.3 * random(*SHAPE).abs()),
        "slices axis 0": SliceProfile(weights(2, 5), SHAPE, 0),
        "slices axis 1": SliceProfile(weights(4, 6, 0.7), SHAPE, 1),
        "slices axis 2": profile,
        "slices, boxcar": SliceProfile(weights(make=boxcar_profile), SHAPE, 2),
        "slices, trapezoid": SliceProfile(weights(make=trapezoid_profile), SHAPE, 2),
        "slices, measured": SliceProfile(weights(make=lopsided), SHAPE, 2),
        "affine, linear": AffineResample(grid, target),
        "affine, cubic": AffineResample(grid, target, OBLIQUE, order=3),
        "affine, sparse": SparseResample(grid, target, OBLIQUE, within=brain),
        "k-space crop, odd": SliceProfile(resampling_matrix(SHAPE[0], 3), SHAPE, 0),
        "k-space crop, even": SliceProfile(resampling_matrix(SHAPE[1], 4), SHAPE, 1),
        "k-space pad": SliceProfile(resampling_matrix(SHAPE[2], 10), SHAPE, 2),
        "composition": bias @ profile,
        "scan in its box": Multiply(random(4, 5, 3).exp())
        @ sliced(AffineResample(grid, grid, OBLIQUE), box, 2, weights()),
        "precision": Multiply(random(*profile.out_shape).exp()) @ profile,
        "stack": VStack([bias @ profile, AffineResample(grid, target)]),
    }


NAMES = list(operators())


def dense(operator):
    """The matrix, column by column."""
    size = math.prod(operator.in_shape)
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *operator.in_shape)
    return torch.stack([operator(e).flatten() for e in unit], 1)


@pytest.mark.parametrize("name", NAMES)
def test_laws(name):
    """Adjoint, linearity, the dense matrix, batches and autograd."""
    a = operators()[name]
    x, z, y = random(*a.in_shape), random(*a.in_shape, seed=1), random(*a.out_shape, seed=2)
    ax, aty = a(x), a.adjoint(y)
    assert tuple(ax.shape) == a.out_shape
    assert tuple(aty.shape) == a.in_shape
    scale = float(ax.norm() * y.norm())
    assert abs(float((ax * y).sum() - (x * aty).sum())) <= 1e-12 * scale
    torch.testing.assert_close(a(2 * x - 3 * z), 2 * ax - 3 * a(z), rtol=0, atol=1e-12 * scale)
    matrix = dense(a)
    torch.testing.assert_close(matrix @ x.flatten(), ax.flatten(), rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(matrix.T @ y.flatten(), aty.flatten(), rtol=0, atol=1e-12 * scale)
    gram = a.gram(x).flatten()
    torch.testing.assert_close(matrix.T @ matrix @ x.flatten(), gram, rtol=0, atol=1e-11 * scale)
    pair = torch.stack([x, z])
    torch.testing.assert_close(a(pair)[1], a(z), rtol=0, atol=1e-13 * scale)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad((a(x) * y).sum(), x)
    torch.testing.assert_close(gradient, aty, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape_is_refused(name):
    a = operators()[name]
    with pytest.raises(ShapeMismatchError, match="expected an array that ends in"):
        a(torch.zeros(*a.in_shape[:-1], a.in_shape[-1] + 1))
    with pytest.raises(ShapeMismatchError, match="adjoint"):
        a.adjoint(torch.zeros(*a.out_shape[:-1], a.out_shape[-1] + 1))


def test_composition_is_the_product_of_the_matrices():
    all_of_them = operators()
    a = all_of_them["composition"]
    torch.testing.assert_close(dense(a), dense(a.outer) @ dense(a.inner))
    with pytest.raises(ShapeMismatchError, match="Composition"):
        Composition(all_of_them["bias"], all_of_them["slices axis 2"])


def test_stack_gives_each_scan_back():
    a = operators()["stack"]
    x = random(*SHAPE)
    for part, operator in zip(a.split(a(x)), a.operators, strict=True):
        torch.testing.assert_close(part, operator(x))
    with pytest.raises(ShapeMismatchError, match="at least one"):
        VStack([])
    with pytest.raises(ShapeMismatchError, match="one image grid"):
        VStack([Multiply(torch.ones(2, 2)), Multiply(torch.ones(2, 3))])


@pytest.mark.parametrize("name", ["slices axis 1", "composition", "k-space pad", "affine, linear"])
def test_squared_norm(name):
    a = operators()[name]
    exact = float(torch.linalg.matrix_norm(dense(a), 2)) ** 2
    result = squared_norm(a, torch.Generator().manual_seed(0), iterations=200)
    assert result == pytest.approx(exact, rel=1e-3)
    assert squared_norm(Multiply(torch.zeros(3)), torch.Generator().manual_seed(0)) == 0.0


def gaussian_pdf(thickness):
    sd = thickness / (2 * math.sqrt(2 * math.log(2)))
    return lambda d: stats.norm.pdf(d, scale=sd)


def boxcar_pdf(thickness):
    return lambda d: 1 / thickness if abs(d) < thickness / 2 else 0.0


def trapezoid_pdf(thickness):
    return lambda d: min(max((0.8 - abs(d) / thickness) / 0.6, 0), 1) / thickness


@pytest.mark.parametrize(
    ("make", "pdf"),
    [
        (gaussian_profile, gaussian_pdf),
        (boxcar_profile, boxcar_pdf),
        (trapezoid_profile, trapezoid_pdf),
    ],
)
@pytest.mark.parametrize(
    ("thickness", "spacing", "thin"),
    [(5.0, 5.0, 1.0), (4.0, 6.5, 0.9375), (6.0, 3.3, 1.1)],  # touching, gap, overlap
)
def test_slice_weights_against_numerical_integration(make, pdf, thickness, spacing, thin):
    n_slices, n_thin = 4, round(4 * spacing / thin)
    w = slice_weights(
        make(thickness), n_slices=n_slices, spacing_mm=spacing, n_thin=n_thin, thin_mm=thin
    )
    density = pdf(thickness)
    for k, j in itertools.product(range(n_slices), range(n_thin)):
        centre = (k + 0.5) * spacing
        kinks = [
            c * thickness
            for c in (-0.8, -0.5, -0.2, 0.2, 0.5, 0.8)
            if j * thin < centre + c * thickness < (j + 1) * thin
        ]
        expected, _ = integrate.quad(
            lambda t, c=centre: density(t - c),
            j * thin,
            (j + 1) * thin,
            points=[centre + c for c in kinks] or None,
        )
        assert float(w[k, j]) == pytest.approx(expected, abs=1e-9)


def test_a_boxcar_on_matching_voxels_is_the_plain_mean():
    w = slice_weights(boxcar_profile(5.0), n_slices=3, spacing_mm=5.0, n_thin=15, thin_mm=1.0)
    x = random(15)
    torch.testing.assert_close(w @ x, x.reshape(3, 5).mean(1))


def test_a_measured_profile_reproduces_a_dense_sampling_of_a_gaussian():
    distance = torch.linspace(-15, 15, 6001, dtype=torch.float64)
    sampled = measured_profile(
        distance, torch.tensor([gaussian_pdf(5.0)(d) for d in distance.tolist()])
    )
    at = torch.linspace(-12, 12, 97, dtype=torch.float64)
    torch.testing.assert_close(sampled(at), gaussian_profile(5.0)(at), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("distance", "sensitivity", "error"),
    [
        ([0.0, 1.0], [1.0], ShapeMismatchError),
        ([0.0, 0.0], [1.0, 1.0], GeometryError),
        ([0.0, 1.0], [0.0, 0.0], GeometryError),
        ([0.0, 1.0], [1.0, -1.0], GeometryError),
    ],
)
def test_a_measured_profile_is_checked(distance, sensitivity, error):
    with pytest.raises(error, match="measured_profile"):
        measured_profile(torch.tensor(distance), torch.tensor(sensitivity))


@pytest.mark.parametrize(("spacing", "thin"), [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_slice_spacings_must_be_positive(spacing, thin):
    with pytest.raises(GeometryError, match="above 0"):
        slice_weights(boxcar_profile(1.0), n_slices=1, spacing_mm=spacing, n_thin=4, thin_mm=thin)


def test_slices_wider_apart_than_the_field_of_view_are_refused():
    with pytest.raises(GeometryError, match="field of view"):
        slice_weights(boxcar_profile(5.0), n_slices=1, spacing_mm=5.0, n_thin=4, thin_mm=1.0)


def test_slice_profile_checks_its_matrix():
    with pytest.raises(ShapeMismatchError, match="SliceProfile"):
        SliceProfile(torch.ones(2, 6), SHAPE, 2)


def by_fft(x, m):
    """Keep the frequencies of both grids, shifted by half the difference of the voxel sizes."""
    n = len(x)
    k = kept_frequencies(max(n, m), min(n, m))
    shift = 2j * math.pi * k.double() * (0.5 / m - 0.5 / n)
    spectrum = torch.zeros(m, dtype=torch.complex128)
    spectrum[k % m] = torch.fft.fft(x)[k % n] * shift.exp()
    return torch.fft.ifft(spectrum).real * m / n if n != m else x


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 24), m=st.integers(1, 24))
def test_k_space_resampling_keeps_what_both_grids_hold(n, m):
    """FFT against matrix; constants stay; a low cosine is sampled at the new positions."""
    x = random(n)
    matrix = resampling_matrix(n, m)
    torch.testing.assert_close(by_fft(x, m), matrix @ x)
    torch.testing.assert_close(matrix.sum(1), torch.ones(m, dtype=torch.float64))
    highest = (min(n, m) - 1) // 2
    at_n = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    at_m = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    wave = torch.cos(2 * math.pi * highest * at_n + 0.3)
    expected = torch.cos(2 * math.pi * highest * at_m + 0.3)
    torch.testing.assert_close(matrix @ wave, expected, rtol=0, atol=1e-12)


def test_a_crop_to_fewer_voxels_and_back_loses_nothing_low():
    up = resampling_matrix(12, 16)
    there_and_back = resampling_matrix(16, 12) @ up
    torch.testing.assert_close(up @ there_and_back, up)
    torch.testing.assert_close(there_and_back @ there_and_back, there_and_back)


def test_finer_data_than_the_image_are_refused():
    with pytest.raises(GeometryError, match="finer"):
        kept_frequencies(4, 5)


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_affine_resampling_against_scipy(flip):
    """Linear interpolation; only voxels entirely inside, for which the border rules agree."""
    source = Grid((9, 8, 7), np.diag([1.0, 1.0, 1.2, 1.0]))
    affine = OBLIQUE.copy()
    affine[:, 0] *= flip
    affine[0, 3] = 4 if flip > 0 else 7
    affine[1:3, 3] = [1.0, 1.0]
    target = Grid((4, 5, 3), affine)
    x = random(*source.shape)
    voxels = np.linalg.inv(source.affine) @ target.affine
    expected = ndimage.affine_transform(
        x.numpy(),
        voxels[:3, :3],
        voxels[:3, 3],
        target.shape,
        order=1,
        mode="constant",
        cval=np.nan,
    )
    inside = np.isfinite(expected)
    assert inside.mean() > 0.3
    result = AffineResample(source, target)(x).numpy()
    np.testing.assert_allclose(result[inside], expected[inside], atol=1e-10)


def test_a_singular_matrix_is_refused():
    grid = Grid((2, 2, 2), np.eye(4))
    with pytest.raises(GeometryError, match="AffineResample"):
        AffineResample(grid, grid, np.zeros((4, 4)))


def test_diagonal_operators_check_what_they_get():
    with pytest.raises(InputError, match="Multiply"):
        Multiply(torch.tensor([1.0, float("nan")]))
