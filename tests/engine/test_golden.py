# SPDX-License-Identifier: Apache-2.0
"""A dozen small problems over all tasks and samplers, with stored results.

``golden.json`` holds, for each problem, the noise SD, the residuals, and the mean, the SD and some
voxels of the restored image and of the last sample, in scanner units. ``python
tests/engine/test_golden.py [PROBLEM ...]`` rewrites it; the commit that changes it states why the
new values are right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FILE = Path(__file__).with_name("golden.json")
if __name__ == "__main__":
    sys.path.insert(0, str(FILE.parent))

from test_fusion import MOTION, make_run, together  # noqa: E402
from test_mni305 import run as run_on_mni305  # noqa: E402
from test_restore import GAIN, ball, given_prior, phantom, run  # noqa: E402

from brainprior_bids.engine.acquisition import Acquisition  # noqa: E402
from brainprior_bids.engine.samplers.daps import DapsSettings  # noqa: E402

WALK = DapsSettings(n_levels=5, n_ode=2, n_langevin=10, sigma_max=3, sigma_min=0.05)
VOXELS = 16


def hole(case):
    return ball(case["arguments"]["grid"], (4, -5, 3), 7)


def other_image(case, error=0.02):
    rng = np.random.default_rng(0)
    return 3.0 * (case["truth"] + error * rng.standard_normal(case["truth"].shape))


def single(thick=4, axis=2, bias=0.0, **changes):
    case = phantom(axis=axis, thick=thick, bias=bias)
    options = {k: v(case) if callable(v) else v for k, v in changes.items()}
    return run(case, **{"n_steps": 5, **options})


def coarse_in_plane():
    case = phantom()
    scan = case["arguments"]["scan"][::2]  # every second column: 2 mm
    grid = case["arguments"]["grid"]
    affine = grid.affine @ np.diag([2.0, 1, 1, 1])
    affine[0, 3] = grid.affine[0, 3] + 0.5
    return run(
        case,
        scan=scan,
        grid=type(grid)((24, 56, 12), affine),
        mask=case["arguments"]["mask"][::2],
        acquisition=Acquisition(2, 4.0, 4.0),
        n_steps=5,
    )


def fused(**options):
    runs = [make_run(2, np.eye(4), seed=1)[0], make_run(0, MOTION, seed=2, gain=1.3)[0]]
    return together(*runs, n_steps=5, **options)[0]


def noise_map(case):
    grid = case["arguments"]["grid"]
    return np.linspace(0.02, 0.1, grid.shape[0])[:, None, None] * np.ones(grid.shape)


GIVEN = {
    "prior": lambda _: given_prior(0.1, inflation=1.1),
    "sampler": "conditional",
    "n_steps": 5,
}
TRUST = {"image": other_image, "trust": 0.03}
PROBLEMS = {
    "conditional, sagittal": lambda: single(axis=0, thickness_sd=0.1, **GIVEN),
    "conditional, axial, bias": lambda: single(
        bias=0.2, log_bias=lambda c: c["field"], rim_mm=1.5, **GIVEN
    ),
    "conditional, 3-D": lambda: single(1, **GIVEN),
    "conditional, 3-D, hole": lambda: single(1, hidden=hole, **GIVEN),
    "conditional, another image": lambda: single(**TRUST, **GIVEN),
    "exact, coronal": lambda: single(axis=1, thickness_sd=0.1),
    "exact, bias moved": lambda: single(bias=0.2, move_bias=True, bias_scale_mm=25.0),
    "exact, hole": lambda: single(hidden=hole),
    "exact, another image": lambda: single(**TRUST),
    "exact, map of the noise": lambda: single(1, noise_sd=noise_map),
    "exact, coarse in plane": coarse_in_plane,
    "exact, two runs": fused,
    "exact, on MNI305": lambda: run_on_mni305(n_samples=1, sigma_max=1.0),
    "mean": lambda: single(**{**GIVEN, "sampler": "mean"}),
    "conditional, two runs": lambda: fused(prior=given_prior(0.1), sampler="auto"),
    "exact, hole and another image": lambda: single(hidden=hole, **TRUST),
    "daps": lambda: single(sampler="daps", daps=WALK, n_samples=1),
    "daps, hole": lambda: single(1, sampler="daps", daps=WALK, n_samples=1, hidden=hole),
    "daps, on MNI305": lambda: run_on_mni305(n_samples=1, sampler="daps", daps=WALK),
}


def summary(result):
    """Numbers of a result that show any change of it."""
    inside = np.flatnonzero(result.mean)
    places = inside[:: max(len(inside) // VOXELS, 1)][:VOXELS]
    images = {"mean": result.mean}
    if len(result.samples):
        images["last sample"] = result.samples[-1]
    return {
        "noise_sd": float(result.noise_sd),
        "residuals": [float(r) for r in result.residual_ratios],
        **{
            name: [
                float(image[image != 0].mean()),
                float(image[image != 0].std()),
                *(float(v) for v in image.flat[places]),
            ]
            for name, image in images.items()
        },
    }


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_result_is_what_it_was(name):
    """To a thousandth of the brain's brightness: float32 sums in another order, five levels."""
    expected = json.loads(FILE.read_text())[name]
    result = summary(PROBLEMS[name]())
    for key, values in expected.items():
        scale = GAIN if key in ("mean", "last sample") else 1.0
        np.testing.assert_allclose(
            result[key], values, rtol=1e-3, atol=1e-3 * scale, err_msg=f"{name}: {key}"
        )


if __name__ == "__main__":
    torch.set_num_threads(2)
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    results |= {name: summary(PROBLEMS[name]()) for name in sys.argv[1:] or PROBLEMS}
    FILE.write_text(json.dumps(results, indent=1) + "\n")
