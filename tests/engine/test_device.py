# SPDX-License-Identifier: Apache-2.0
"""The CUDA path without a GPU: every route through the engine on a second device (``pretend``).

The kernels are those of the CPU, so the answer has the same bytes as on the CPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian import gaussian_prior
from pretend import FAR, second_device
from test_fusion import MOTION, make_run, together
from test_mni305 import run as run_on_mni305
from test_restore import ball, phantom, run

from brainprior_bids.engine.denoiser import fast_dtype
from brainprior_bids.engine.grids import MNI305
from brainprior_bids.engine.samplers.daps import DapsSettings
from brainprior_bids.engine.weights import load_prior

SD = torch.tensor([1.0, 0.2, 0.2, 0.06, 0.2, 0.06, 0.06, 0.04])
WALK = DapsSettings(n_levels=3, n_ode=2, n_langevin=6, n_leapfrog=2)


def both(monkeypatch, restore, **options):
    """The same call on the CPU and on the other device."""

    def on(device):
        prior = gaussian_prior(SD, device=device, recipe={"holes": 0.1})
        return restore(prior=prior, device=device, n_samples=1, **options)

    near = on("cpu")
    with second_device(monkeypatch):
        return near, on(FAR)


def hole(case):
    return ball(case["arguments"]["grid"], (4, -5, 3), 7)


def noise_map(case):
    return np.linspace(0.02, 0.1, case["arguments"]["grid"].shape[0])[:, None, None] * np.ones(
        case["arguments"]["grid"].shape
    )


ROUTES = {
    "conditional, slices": (4, lambda _: {"n_steps": 3}),
    "conditional, hole": (1, lambda case: {"n_steps": 3, "hidden": hole(case)}),
    "conditional, another image": (
        4,
        lambda case: {"n_steps": 3, "image": case["truth"], "trust": 0.05},
    ),
    "exact, bias": (4, lambda _: {"sampler": "exact", "n_steps": 3, "move_bias": True}),
    "exact, hole": (4, lambda case: {"n_steps": 2, "hidden": hole(case)}),
    "exact, another image": (
        4,
        lambda case: {"sampler": "exact", "n_steps": 2, "image": case["truth"], "trust": 0.1},
    ),
    "exact, a map of the noise": (
        1,
        lambda case: {"sampler": "exact", "n_steps": 2, "noise_sd": noise_map(case)},
    ),
    "mean": (4, lambda _: {"sampler": "mean"}),
    "daps": (4, lambda _: {"sampler": "daps", "daps": WALK}),
}


@pytest.mark.parametrize("route", ROUTES)
def test_restore_on_another_device(monkeypatch, route):
    thick, options = ROUTES[route]
    case = phantom(thick=thick)
    near, far = both(monkeypatch, lambda **o: run(case, **o), **options(case))
    assert near.sampler == far.sampler == route.partition(",")[0]
    assert far.mean.any()
    np.testing.assert_array_equal(far.samples, near.samples)
    np.testing.assert_array_equal(far.mean, near.mean)
    np.testing.assert_array_equal(far.residual_map, near.residual_map)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("route", ROUTES)
def test_restore_on_a_gpu(route):
    """The same noise on both: only the order of float32 summation differs."""
    thick, options = ROUTES[route]
    case = phantom(thick=thick)
    near, far = (
        run(
            case,
            prior=gaussian_prior(SD, device=device, recipe={"holes": 0.1}),
            device=device,
            n_samples=1,
            **options(case),
        )
        for device in ("cpu", "cuda")
    )
    scale = float(np.abs(near.mean).max())
    np.testing.assert_allclose(far.mean, near.mean, rtol=0, atol=2e-3 * scale)
    np.testing.assert_allclose(far.samples, near.samples, rtol=0, atol=2e-3 * scale)


def test_fused_scans_on_another_device(monkeypatch):
    runs = [make_run(2, np.eye(4), seed=1)[0], make_run(0, MOTION, seed=2)[0]]
    near, far = both(monkeypatch, lambda **o: together(*runs, **o)[0], n_steps=2)
    np.testing.assert_array_equal(far.samples, near.samples)


def test_mni305_on_another_device(monkeypatch):
    near, far = both(monkeypatch, run_on_mni305, sampler="daps", daps=WALK)
    np.testing.assert_array_equal(far.samples, near.samples)


@pytest.mark.parametrize("tile", [None, 8])
def test_the_shipped_network_on_another_device(monkeypatch, tile):
    """As a whole and in tiles; the result is on the device of the image."""
    x = torch.randn(1, 1, 16, 24, 24, generator=torch.Generator().manual_seed(1))
    place = torch.from_numpy(MNI305.crop((80, 100, 80), (96, 124, 104)).points_mm())
    options = {"dtype": torch.float32, "tile_mm": tile}
    near = load_prior(**options).denoise(x, 0.1, coordinates=place, contrast="T1w")
    with second_device(monkeypatch):
        prior = load_prior(device=FAR, **options)
        far = prior.denoise(x.to(FAR), 0.1, coordinates=place.to(FAR), contrast="T1w")
        assert far.device == FAR
        back = prior.denoise(x, 0.1, coordinates=place, contrast="T1w")
        assert back.device.type == "cpu"
        torch.testing.assert_close(far.cpu(), near, rtol=0, atol=1e-5)
    torch.testing.assert_close(back, near, rtol=0, atol=1e-5)


def test_a_gpu_computes_in_bfloat16_where_it_can(monkeypatch):
    for has, wanted in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has: has)
        assert fast_dtype(torch.device("cuda:0")) is wanted


def test_the_second_device_refuses_what_a_gpu_refuses(monkeypatch):
    near = torch.ones(3)
    with second_device(monkeypatch):
        far = near.to(FAR)
        assert float((2 * far + torch.tensor(1.0)).sum()) == 9.0
        assert float(far[near > 0].sum()) == 3.0
        with pytest.raises(RuntimeError, match="same device"):
            far + near
        with pytest.raises(RuntimeError, match="same device"):
            near[far > 0]
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device=FAR, generator=torch.Generator())
        with pytest.raises(RuntimeError, match="numpy"):
            far.numpy()
