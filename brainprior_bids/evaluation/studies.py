# SPDX-License-Identifier: Apache-2.0
"""The studies of ``brainprior evaluate``: what is changed from one row to the next."""

from __future__ import annotations

from typing import Any

STUDIES = ("restoration", "low-field", "ablation", "segmentation")
LOW_FIELD = {"in_plane_mm": 1.6, "noise_sd": 0.05, "rician": True, "n_samples": 4}
REFERENCE = {"spacing_mm": 5.0, "noise_sd": 0.01}
"""What ablations and segmentation are done on."""
BIASED = {"bias_sd": 0.1, "sampler": "exact"}
ABLATIONS: dict[str, dict[str, Any]] = {
    "default settings": {},
    "sampler exact": {"sampler": "exact"},
    "sampler mean": {"sampler": "mean"},
    "5 calls": {"n_steps": 5},
    "20 calls": {"n_steps": 20},
    "40 calls": {"n_steps": 40},
    "assumed noise 0.005": {"assumed_noise": 0.005},
    "assumed noise 0.01": {"assumed_noise": 0.01},
    "assumed noise 0.02": {"assumed_noise": 0.02},
    "field ignored": BIASED,
    "field by N4": {**BIASED, "field": "n4"},
    "field by N4, refined while sampling": {**BIASED, "field": "n4", "move_bias": True},
    "field estimated while sampling, from 0": {**BIASED, "move_bias": True},
}
DAPS = {"sampler daps": {"sampler": "daps", "n_samples": 1}}
QUICK: dict[str, Any] = {
    "studies": ["restoration"],
    "spacing": [5.0],
    "noise": [0.01],
    "n_samples": 4,
    "nprocs": 1,
}
"""Defaults of a first look, with one participant: the one job has all threads."""
