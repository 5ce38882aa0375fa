# SPDX-License-Identifier: Apache-2.0
"""Preconditioning, error spectra and the prior's call."""

from __future__ import annotations

import pytest
import torch

from brainprior_bids.engine.denoiser import ErrorSpectrum, Precondition, Prior, fast_dtype
from brainprior_bids.engine.errors import ShapeMismatchError, UsageError
from brainprior_bids.engine.stacks import Stack
from brainprior_bids.engine.unet import UNet, to_bands

BAND_SD = torch.tensor([1.5, 0.1, 0.1, 0.04, 0.1, 0.04, 0.04, 0.02])


def small_prior(*, random: bool = True) -> Prior:
    torch.manual_seed(4)
    network = UNet((8, 8), (1, 1), embedding=8)
    if random:
        for parameter in network.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape)
    spectra = {"unknown": ErrorSpectrum.isotropic(0.5), "T1w": ErrorSpectrum.isotropic(0.3)}
    model = Precondition(network, BAND_SD)
    return Prior(model, spectra=spectra, metadata={"name": "small"}, dtype=torch.float32)


def points(*shape: int) -> torch.Tensor:
    return torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij"))


def test_isotropic_spectrum_is_its_formula():
    spectrum = ErrorSpectrum.isotropic(0.4)
    for sigma in (0.003, 0.05, 0.4, 7.0):
        expected = sigma**2 * 0.4**2 / (sigma**2 + 0.4**2)
        got = spectrum.variance(sigma, torch.linspace(0, 0.8, 12).reshape(3, 4))
        assert got.shape == (3, 4)
        assert torch.allclose(got, torch.full((3, 4), expected), rtol=2e-3)


def test_spectrum_interpolates_between_its_knots():
    sigmas, frequencies = torch.tensor([0.1, 1.0]), torch.tensor([0.1, 0.3])
    table = torch.tensor([[0.01, 0.0025], [0.25, 0.01]])
    spectrum = ErrorSpectrum(sigmas, frequencies, table)
    knots = spectrum.variance(1.0, torch.tensor([0.0, 0.1, 0.3, 0.9]))
    assert torch.allclose(knots, torch.tensor([0.25, 0.25, 0.01, 0.01]))
    middle = spectrum.variance(0.1**0.5, torch.tensor([0.2]))  # middle of both logarithms
    assert torch.allclose(middle, (table.log().mean()).exp().reshape(1), rtol=1e-5)


def test_spectrum_never_exceeds_the_noise_and_never_falls_with_it():
    sigmas = torch.tensor([0.1, 0.2, 0.4])
    table = torch.tensor([[0.02, 0.005], [0.01, 0.004], [0.1, 0.2]])
    spectrum = ErrorSpectrum(sigmas, torch.tensor([0.1, 0.3]), table)
    k = torch.linspace(0, 0.8, 9)
    last = torch.zeros(9)
    for sigma in (0.01, 0.1, 0.15, 0.2, 0.3, 0.4, 2.0):
        v = spectrum.variance(sigma, k)
        assert (v <= sigma**2 * (1 + 1e-6)).all()
        assert (v >= last * (1 - 1e-6)).all()
        last = v
    assert torch.allclose(spectrum.variance(0.01, k), spectrum.variance(0.1, k) / 100)


@pytest.mark.parametrize(
    ("sigmas", "frequencies", "table", "error"),
    [
        ([0.1, 0.2], [0.1], [[1.0]], ShapeMismatchError),
        ([0.2, 0.1], [0.1], [[1.0], [1.0]], UsageError),
        ([0.1, 0.2], [0.1], [[1.0], [0.0]], UsageError),
    ],
)
def test_spectrum_refuses_a_table_that_makes_no_sense(sigmas, frequencies, table, error):
    with pytest.raises(error, match="ErrorSpectrum"):
        ErrorSpectrum(torch.tensor(sigmas), torch.tensor(frequencies), torch.tensor(table))


def test_spectrum_refuses_sigma_zero():
    with pytest.raises(UsageError, match="above 0"):
        ErrorSpectrum.isotropic(1.0).variance(0.0, torch.zeros(1))


def test_untrained_denoiser_is_the_wiener_filter_of_each_band():
    prior = small_prior(random=False)
    x = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(5))
    sigma = 0.3
    got = to_bands(prior.denoise(x, sigma, coordinates=points(8, 8, 8), contrast="T1w"))
    gain = (BAND_SD**2 / (BAND_SD**2 + sigma**2))[None, :, None, None, None]
    assert torch.allclose(got, gain * to_bands(x), atol=1e-5)


def test_scales_give_unit_input_and_target():
    model = small_prior().model
    sigma = torch.tensor([0.01, 1.0])
    c_skip, c_out, c_in = model.scales(sigma)
    s2, n2 = BAND_SD**2, sigma[:, None] ** 2
    assert torch.allclose(c_in.squeeze() ** 2 * (s2 + n2), torch.ones(2, 8))
    # variance of the target (x - c_skip (x + n)) / c_out for x of variance s2
    target = (
        ((1 - c_skip.squeeze()) ** 2 * s2) + c_skip.squeeze() ** 2 * n2
    ) / c_out.squeeze() ** 2
    assert torch.allclose(target, torch.ones(2, 8), rtol=1e-4)


def test_any_size_and_number_is_taken():
    prior = small_prior()
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 1, 9, 6, 11, generator=generator)
    place = points(9, 6, 11)
    both = prior.denoise(x, 0.2, coordinates=place, contrast="T2w")
    assert both.shape == x.shape
    assert both.dtype == torch.float32
    for n in range(2):
        one = prior.denoise(x[n : n + 1], 0.2, coordinates=place, contrast="T2w")
        assert torch.allclose(one, both[n : n + 1], atol=1e-5)


def test_one_thin_axis_is_taken():
    x = torch.randn(1, 1, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    out = small_prior().denoise(x, 0.2, coordinates=points(1, 8, 8), contrast="T1w")
    assert out.shape == x.shape


def test_new_coordinates_are_not_mistaken_for_the_old():
    prior = small_prior()
    x = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(7))
    first = prior.denoise(x, 1.0, coordinates=points(8, 8, 8), contrast="T1w")
    moved = prior.denoise(x, 1.0, coordinates=points(8, 8, 8) + 40, contrast="T1w")
    again = prior.denoise(x, 1.0, coordinates=points(8, 8, 8), contrast="T1w")
    assert torch.equal(first, again)
    assert not torch.allclose(first, moved)


def test_bfloat16_agrees_with_float32():
    exact = small_prior()
    rough = Prior(
        exact.model, spectra={"unknown": exact.spectrum("T2w")}, metadata={}, dtype=torch.bfloat16
    )
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(8))
    place = points(16, 16, 16)
    for sigma in (0.01, 1.0):
        a = exact.denoise(x, sigma, coordinates=place, contrast="T1w")
        b = rough.denoise(x, sigma, coordinates=place, contrast="T1w")
        assert (a - b).square().mean() < 0.02**2 * (a - x).square().mean()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(1, 8, 8, 8)}, ShapeMismatchError, "expected x"),
        ({"coordinates": points(8, 8, 6)}, ShapeMismatchError, "coordinates"),
        ({"contrast": "PDw"}, UsageError, "PDw"),
        ({"sigma": 0.0}, UsageError, "sigma"),
        ({"sigma": float("nan")}, UsageError, "sigma"),
        ({"sigma": float("inf")}, UsageError, "sigma"),
        ({"x": torch.zeros(1, 1, 8, 8, 8, dtype=torch.int16)}, UsageError, "floating point"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(change, error, text):
    call = {
        "x": torch.zeros(1, 1, 8, 8, 8),
        "sigma": 0.1,
        "coordinates": points(8, 8, 8),
        "contrast": "T1w",
    } | change
    with pytest.raises(error, match=text):
        small_prior().denoise(call.pop("x"), call.pop("sigma"), **call)


def test_spectrum_of_an_unmeasured_contrast_is_that_of_unknown():
    prior = small_prior()
    assert prior.spectrum("FLAIR") is prior.spectrum("unknown")
    assert prior.spectrum("T1w") is not prior.spectrum("unknown")
    with pytest.raises(UsageError, match="unknown"):
        Prior(prior.model, spectra={}, metadata={})


def test_fast_dtype_is_one_that_the_device_has():
    assert fast_dtype(torch.device("cpu")) in (None, torch.bfloat16)
    assert fast_dtype(torch.device("meta")) is None


@pytest.mark.parametrize("tile_mm", [None, 8])
def test_slices_are_seen_along_the_last_axis(tile_mm):
    """Such a prior gives the same result for every order of the scan's axes."""
    torch.manual_seed(0)
    network = UNet((8, 8), (1, 1), embedding=8, stacks=True)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape)

    def answer(axis, slices_last):
        prior = Prior(
            Precondition(network, BAND_SD),
            spectra={"unknown": ErrorSpectrum.isotropic(0.5)},
            metadata={"recipe": {"slices_last": slices_last}},
            dtype=torch.float32,
            tile_mm=tile_mm,
        )
        stack = Stack(y.movedim(2, axis), weights, axis, 0.05)
        result = prior.denoise(
            x.movedim(-1, 2 + axis),
            0.5,
            coordinates=mm.movedim(-1, 1 + axis),
            contrast="T2w",
            measured=stack,
        )
        assert result.shape == x.movedim(-1, 2 + axis).shape
        return result.movedim(2 + axis, -1)

    x, mm = torch.randn(1, 1, 20, 24, 16), points(20, 24, 16)
    y = torch.randn(20, 24, 4)
    weights = torch.eye(4, dtype=torch.float64).repeat_interleave(4, 1) / 4
    last = answer(2, True)
    assert torch.equal(last, answer(2, False))
    for axis in (0, 1):
        assert torch.equal(answer(axis, True), last)
        assert not torch.allclose(answer(axis, False), last, atol=1e-3)
