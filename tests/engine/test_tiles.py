# SPDX-License-Identifier: Apache-2.0
"""Tiles: the same answer as the whole volume, and the way there when memory runs out."""

from __future__ import annotations

import logging

import pytest
import torch

from brainprior_bids.engine import tiles
from brainprior_bids.engine.denoiser import ErrorSpectrum, Precondition, Prior, fast_dtype
from brainprior_bids.engine.errors import MemoryShortageError, UsageError
from brainprior_bids.engine.memory import out_of_memory
from brainprior_bids.engine.unet import UNet
from brainprior_bids.engine.weights import load_prior

BAND_SD = torch.tensor([1.5, 0.1, 0.1, 0.04, 0.1, 0.04, 0.04, 0.02])


def random_prior(
    channels=(8, 8, 8), blocks=(1, 2, 2), dtype=torch.float32, spread=False, **options
) -> Prior:
    """Every weight random, so strong that features of all resolutions reach the output."""
    generator = torch.Generator().manual_seed(4)
    network = UNet(channels, blocks, embedding=8, spread=spread)
    for parameter in network.parameters():
        fan = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan**0.5
    model = Precondition(network, BAND_SD)
    spectra = {"unknown": ErrorSpectrum.isotropic(0.5)}
    return Prior(model, spectra=spectra, metadata={}, dtype=dtype, **options)


def case(*shape: int, n: int = 1, seed: int = 0) -> dict:
    x = torch.randn(n, 1, *shape, generator=torch.Generator().manual_seed(seed))
    place = torch.stack(
        torch.meshgrid(*[torch.arange(float(s)) - s / 2 for s in shape], indexing="ij")
    )
    return {"x": x, "sigma": 0.3, "coordinates": place, "contrast": "T2w"}


def answer(prior: Prior, arguments: dict, **changes) -> torch.Tensor:
    call = {**arguments, **changes}
    return prior.denoise(call.pop("x"), call.pop("sigma"), **call)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the 99th percentile of the image."""
    return float((a - b).abs().max() / torch.quantile(b.abs().flatten()[::3], 0.99))


DTYPES = [torch.float32, *filter(None, [fast_dtype(torch.device("cpu"))])]
"""Those that the program computes in on this processor."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [False, True], ids=["as trained", "disturbed"])
def test_tiles_of_the_shipped_network_equal_the_whole(dtype, noise):
    prior = load_prior(dtype=dtype)
    if noise:
        generator = torch.Generator().manual_seed(1)
        for parameter in prior.model.parameters():
            spread = 0.2 * float(parameter.detach().std()) if parameter.numel() > 1 else 0.1
            parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    arguments = case(64, 24, 32)
    whole = answer(prior, arguments)
    for tile in (4, 20, 30, 48, 100):
        prior.tile_mm = tile
        assert difference(answer(prior, arguments), whole) < 1e-3, tile
    assert prior.warnings == []


@pytest.mark.parametrize("shape", [(41, 9, 14), (1, 8, 8), (7, 16, 16), (130, 8, 8)])
@pytest.mark.parametrize("tile", [4, 8, 16, 37])
def test_any_size_in_any_tile(shape, tile):
    arguments = case(*shape, n=2)
    whole = answer(random_prior(), arguments)
    assert difference(answer(random_prior(tile_mm=tile), arguments), whole) < 1e-5


@pytest.mark.parametrize("tile", [4, 16, 37])
def test_the_predicted_sd_is_the_same_in_tiles(tile):
    arguments = case(41, 9, 14, n=2)
    x, sigma = arguments.pop("x"), arguments.pop("sigma")
    _, whole = random_prior(spread=True).estimate(x, sigma, **arguments)
    _, tiled = random_prior(spread=True, tile_mm=tile).estimate(x, sigma, **arguments)
    assert whole.shape == x.shape
    assert float(whole.std()) > 0.1 * float(whole.mean())
    assert difference(tiled, whole) < 1e-5


def test_a_block_needs_the_rows_of_its_neighbours(monkeypatch):
    """The comparison is sharp: without those rows there are seams."""
    arguments = case(64, 8, 8)
    whole = answer(random_prior(), arguments)

    def alone(block, h, e, rows):
        for start, stop in tiles.slabs(h.shape[2], rows):
            h[:, :, start:stop] = block(h[:, :, start:stop], e)

    monkeypatch.setattr(tiles, "block_in_slabs", alone)
    assert difference(answer(random_prior(tile_mm=16), arguments), whole) > 0.01


def test_features_beyond_a_slab_are_not_made():
    """The input of every layer is a slab plus its receptive margin, not more."""
    prior = random_prior(tile_mm=16)
    seen = []
    for module in prior.model.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    answer(prior, case(128, 8, 8))
    assert max(seen) <= 16 // 2 + 2 * tiles.REACH


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    MemoryError("no more"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_out_of_memory_falls_back_to_tiles_and_says_so(error, caplog):
    prior, arguments = random_prior(), case(96, 8, 8)
    whole = answer(prior, arguments)

    def hungry(module, args):
        if args[0].shape[2] > 24:
            raise error

    prior.model.network.image_in.register_forward_pre_hook(hungry)
    with caplog.at_level(logging.WARNING, "brainprior.engine"):
        result = answer(prior, arguments)
    assert difference(result, whole) < 1e-5
    assert prior.tile_mm == 32
    assert len(prior.warnings) == 2  # the whole volume, then tiles of 64 mm
    assert "did not run as a whole on (96, 8, 8)" in prior.warnings[0]
    assert "runs in tiles of 32 mm" in prior.warnings[1]
    assert [r.message for r in caplog.records] == prior.warnings
    answer(prior, arguments)  # without another failure
    assert len(prior.warnings) == 2


def test_when_the_thinnest_tile_does_not_fit_the_error_says_what_to_do(monkeypatch):
    prior = random_prior(tile_mm=20)

    def never(*_):
        raise MemoryError("none left")

    prior.model.network.image_in.register_forward_pre_hook(never)
    with pytest.raises(MemoryShortageError, match=r"tiles of 8 mm \(none left\).*Free memory"):
        answer(prior, case(32, 8, 8))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    prior = random_prior()

    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    prior.model.network.image_in.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="mat1"):
        answer(prior, case(16, 8, 8))
    assert prior.tile_mm is None
    assert not out_of_memory(ValueError("out of memory"))


def test_a_tile_must_hold_what_a_block_reads():
    with pytest.raises(UsageError, match="at least 4 mm"):
        random_prior(tile_mm=3)
    with pytest.raises(UsageError, match="at least 4 mm"):
        load_prior(tile_mm=0)


def test_features_of_position_are_made_anew_for_each_image():
    prior, first = random_prior(tile_mm=8), case(16, 8, 8)
    moved = answer(prior, first, coordinates=first["coordinates"] + 40)
    assert difference(moved, answer(prior, first)) > 1e-3
