# SPDX-License-Identifier: Apache-2.0
"""Likelihoods built directly, without a scan."""

from __future__ import annotations

from brainprior_bids.engine.gaussian import image_space
from brainprior_bids.engine.gaussian.image_space import ImageSpaceSolve
from brainprior_bids.engine.gaussian.slices import SlicedImage, SolveLimits, SpectralSolve
from brainprior_bids.engine.likelihood import Likelihood, Term

LIMITS = SolveLimits()


def sliced_likelihood(y, *, solver, slice_axis, spectrum, support, limits=LIMITS, **term):
    """One scan with its slices along an axis of the image, solved spectrally."""
    operator = SlicedImage(solver, slice_axis)
    likelihood = Likelihood([Term(y, operator=operator, **term)], support)
    likelihood.solve = SpectralSolve(likelihood, spectrum, limits)
    return likelihood


def stacked_likelihood(
    scans,
    operators,
    *,
    spectrum,
    spacing_mm,
    support,
    limits=image_space.LIMITS,
    excess=None,
    **term,
):
    """Scans of any operators, solved in image space; every voxel is entirely inside the brain."""
    excess = excess or [None] * len(scans)
    terms = [
        Term(y, operator=operator, share=y.new_ones(y.shape), excess=more, **term)
        for y, operator, more in zip(scans, operators, excess, strict=True)
    ]
    likelihood = Likelihood(terms, support)
    likelihood.solve = ImageSpaceSolve(likelihood, spectrum, spacing_mm, limits)
    return likelihood
