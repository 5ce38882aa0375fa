# SPDX-License-Identifier: Apache-2.0
"""``restore`` of one scan with everything in one flat list of options."""

from __future__ import annotations

from brainprior_bids.engine.nuisance import Nuisances
from brainprior_bids.engine.observation import ImageObservation, Observation
from brainprior_bids.engine.restore import restore

OF_THE_SCAN = ("grid", "acquisition", "mask", "log_bias", "hidden", "noise_sd")
OF_THE_NUISANCES = ("thickness_sd", "move_bias", "bias_scale_mm")


def restore_one(scan, *, image=None, trust=None, **options):
    """Options of ``Observation``, ``Nuisances`` and ``restore``; ``image`` is another tool's."""

    def taken(names):
        return {name: options.pop(name) for name in names if name in options}

    observations = [Observation(scan, **taken(OF_THE_SCAN))]
    if image is not None:
        observations.append(ImageObservation(image, trust))
    nuisances = Nuisances(**taken(OF_THE_NUISANCES))
    return restore(observations, nuisances=nuisances, **options)
