# SPDX-License-Identifier: Apache-2.0
"""The facts about each sampler: parser, plan, provenance, report and methods text read them here.

A sampler is defined by the input of the network and by the treatment of the remaining
measurements.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampler:
    """One sampler.

    Parameters
    ----------
    name : str
        On the command line and in the provenance.
    steps, more_steps : int
        Default number of noise levels for one scan without hidden voxels, and for everything else:
        a hole, several scans (``--sloppy`` takes fewer).
    calls_per_step : int
        Network calls at each of them.
    yields_samples : bool
        Whether it draws samples.
    given_data : bool
        Whether the network is conditioned on the measurements. Its first call has no other input,
        and a prior may predict the SD for that call. It cannot be conditioned on a scan with
        missing slices.
    own_thickness : bool
        Whether each sample assumes a different slice thickness (``nuisance``).
    solve_share : float
        Measured time of the inner solve divided by that of the network (docs/performance.md).
    help : str
        For ``--help``.
    estimate : str
        What ``desc-restored`` is, for its sidecar.
    method, estimate_method : str
        How it samples and what the image is, for the methods text; citations as ``[@key]``.
    """

    name: str
    steps: int
    more_steps: int
    calls_per_step: int
    yields_samples: bool
    given_data: bool
    own_thickness: bool
    solve_share: float
    help: str
    estimate: str
    method: str
    estimate_method: str

    def levels(self, n_steps: int | None, *, simple: bool) -> int:
        """Number of noise levels: as requested, or the default (None).

        ``simple``: the problem is one scan without hidden voxels.
        """
        return n_steps or (self.steps if simple else self.more_steps)

    def calls(self, n_steps: int | None, *, simple: bool) -> int:
        """Network calls for one sample; arguments as in ``levels``."""
        return self.levels(n_steps, simple=simple) * self.calls_per_step


SMOOTHING_MM = 1.0
"""SD of the Gaussian with which the variance of samples is averaged, where the prior does not
predict the SD (docs/decisions/uncertainty.md)."""

_DAPS = "in the manner of decoupled annealing posterior sampling [@daps], "

SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            "conditional",
            steps=10,
            more_steps=20,
            calls_per_step=1,
            yields_samples=True,
            given_data=True,
            own_thickness=True,
            solve_share=0.0,
            help="the network is conditioned on the measurements and returns the posterior mean "
            "at every noise level",
            estimate="average, over all samples' chains and noise levels, of the network's "
            "expectation of the image given the chain's state and the scan",
            method="by exact posterior scores [@eps]: the denoiser is conditioned on the measured "
            "data, so that the reverse diffusion yields a posterior sample",
            estimate_method="The restored image estimates the posterior mean: it is a weighted "
            "average of the network's expectations of the image, given the scan, over the noise "
            "levels of the samples' chains.",
        ),
        Sampler(
            "mean",
            steps=1,
            more_steps=1,
            calls_per_step=2,
            yields_samples=False,
            given_data=True,
            own_thickness=False,
            solve_share=0.0,
            help="the posterior mean and its SD in two network calls: fast, no samples",
            estimate="the network's expectation of the image given the scan, average of two calls "
            "with its blocks at two positions",
            method="in a single step: the denoiser is conditioned on the measured data alone and "
            "returns the posterior mean [@eps]",
            estimate_method="The restored image is the network's estimate of the posterior mean, "
            "averaged over two positions of its blocks of voxels; no samples were drawn.",
        ),
        Sampler(
            "exact",
            steps=20,
            more_steps=20,
            calls_per_step=1,
            yields_samples=True,
            given_data=False,
            own_thickness=True,
            solve_share=0.16,
            help="the network sees the noisy image alone; the measurements enter by exact draws "
            "from the linear-Gaussian conditional",
            estimate="average, over all samples' chains and every second noise level, of the "
            "conditional expectation of the image given the chain's state and the scan",
            method=f"{_DAPS}with the inner Langevin walk replaced by the exact draw that it "
            "approximates",
            estimate_method="The restored image estimates the posterior mean: it is the average "
            "of the conditional expectations of the image along the samples' chains.",
        ),
        Sampler(
            "daps",
            steps=200,
            more_steps=200,
            calls_per_step=5,
            yields_samples=True,
            given_data=False,
            own_thickness=False,
            solve_share=0.0,
            help="DAPS as published, with its Langevin walk: 1000 network calls per sample",
            estimate="mean of the samples",
            method=f"{_DAPS}with its inner Langevin walk",
            estimate_method="The restored image is the mean of the samples.",
        ),
    )
}
"""Name -> facts; the default (``auto``) is the first, or ``exact`` where it is not applicable."""
NAMES = ("auto", *SAMPLERS)
"""Possible values of ``sampler``."""
DEFAULT, FALLBACK = SAMPLERS["conditional"], SAMPLERS["exact"]
EARLIER_NAMES = {"eps": "conditional"}
"""Names in the outputs of earlier versions."""
RETIRED = {
    "map": Sampler(
        "map",
        steps=20,
        more_steps=20,
        calls_per_step=1,
        yields_samples=False,
        given_data=False,
        own_thickness=False,
        solve_share=0.16,
        help="a point estimate; no longer available",
        estimate="point estimate of the last noise level; no posterior mean",
        method=f"{_DAPS}followed from high to low noise without drawing",
        estimate_method="The restored image is a point estimate, without an uncertainty.",
    )
}
"""Samplers of earlier versions, which reports of their outputs still name."""


def find(name: str) -> Sampler:
    """The sampler of that name, an earlier or retired one included; ``auto`` is the default.

    Raises
    ------
    KeyError
        If there is none.
    """
    known = SAMPLERS | RETIRED
    return DEFAULT if name == "auto" else known[EARLIER_NAMES.get(name, name)]
