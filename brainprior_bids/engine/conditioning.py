# SPDX-License-Identifier: Apache-2.0
"""The inputs of the network in addition to x_t: another tool's image, and measurements.

Another tool's image z, ``z = x + N(0, tau^2)``, and x_t, ``x_t = x + N(0, sigma^2)``, are two
images of one brain with white noise. Together they are equivalent to one image with less noise:

    E[x | x_t, z] = D((x_t / sigma^2 + z / tau^2) s^2; s),   1 / s^2 = 1 / sigma^2 + 1 / tau^2.

So an image changes the prior p(x) to p(x | z), whose denoiser and error spectrum V_s are known;
likelihood, solve and samplers do not depend on it.

Measurements y (``Measured``: a stack of slices, or voxels on the image's grid) can be passed to a
network that was trained for it, which then returns E[x | x_t, y].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import InputError, ShapeMismatchError
from brainprior_bids.engine.gaussian.spectral import Spectrum
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.likelihood import Likelihood
from brainprior_bids.engine.measured import Measured
from brainprior_bids.engine.observation import ImageObservation
from brainprior_bids.engine.operators.fourier import resampling_matrix
from brainprior_bids.engine.operators.slices import SliceProfile
from brainprior_bids.engine.problem import Problem
from brainprior_bids.engine.samplers.conditional import BLIND
from brainprior_bids.engine.sensing import sensitivity, triple
from brainprior_bids.engine.stacks import Stack
from brainprior_bids.engine.voxels import Voxels

SIGMA_BLIND = 30.0
"""A noise level at which x_t contains almost no information, so that V is the power of the images
themselves. A chain starts from a draw conditional on the data under this Gaussian alone. This
costs no network call, and the levels can begin where the network contributes."""
UNLIKE = 0.2
"""An image with a lower correlation with the scan shows something else."""
IN_PLANE = 2.2
"""Largest in-plane voxel size, in restored voxels, for which networks that take stacks were
trained."""
SPACING = 1.4
"""Smallest slice spacing, in restored voxels, of the 2-D slices on which they were trained."""

UNTRAINED = "the prior was not trained to be conditioned on measurements"
UNEVEN_NOISE = "the noise differs between voxels"

Denoise = Callable[[Tensor, float], Tensor]


class SpreadPrior(Protocol):
    """A prior that also predicts the SD of its error (``predicts_spread``)."""

    def estimate(
        self,
        x: Tensor,
        sigma: float,
        *,
        coordinates: Tensor,
        contrast: str,
        measured: Measured | None = None,
        spread: bool = True,
        position: tuple[int, int] = (0, 0),
    ) -> tuple[Tensor, Tensor | None]:
        """As ``PriorLike.denoise``, and the SD of each voxel; see ``denoiser.Prior``."""
        ...


class PriorLike(Protocol):
    """What ``restore`` requires of a prior (such as ``denoiser.Prior``)."""

    def denoise(
        self,
        x: Tensor,
        sigma: float,
        *,
        coordinates: Tensor,
        contrast: str,
        measured: Measured | None = None,
    ) -> Tensor:
        """(n, 1, i, j, k) noisy -> Tweedie mean; ``measured`` only if ``takes_stacks``."""
        ...

    def spectrum(self, contrast: str) -> Spectrum:
        """The calibrated error spectrum of that contrast."""
        ...


@dataclass(frozen=True, eq=False)
class WhiteImage:
    """Other tools' images of the brain, combined to one with white noise.

    Parameters
    ----------
    z : (i, j, k) tensor
        On the home grid, engine unit.
    tau : float
        SD of its error.
    fits : tuple of (gain, correlation)
        Gain and correlation of each image with the scan, in voxels wholly inside the brain.
    """

    z: Tensor
    tau: float
    fits: tuple[tuple[float, float], ...]

    def sd(self, sigma: float) -> float:
        """s, the noise SD of x_t and z together."""
        return sigma * self.tau / math.hypot(sigma, self.tau)

    def merge(self, x_t: Tensor, sigma: float) -> tuple[Tensor, float]:
        """x_t and z as one image with white noise, and the SD of that noise."""
        share = sigma**2 / (sigma**2 + self.tau**2)
        return torch.lerp(x_t, self.z, share), self.sd(sigma)


@dataclass(frozen=True)
class GivenSpectrum:
    """V of ``spectrum`` for a denoiser whose input includes another tool's image."""

    spectrum: Spectrum
    image: WhiteImage

    def variance(self, sigma: float, frequency: Tensor) -> Tensor:
        """Same shape as ``frequency`` (cycles per mm)."""
        return self.spectrum.variance(self.image.sd(sigma), frequency)


def fit_images(images: Sequence[ImageObservation], problem: Problem) -> WhiteImage | None:
    """Scale other tools' images to the scan's unit and combine them; None if there is none.

    Raises
    ------
    InputError
        If an image is 0 where the scan shows brain, or correlates with it by less than
        ``UNLIKE``.
    ShapeMismatchError
        If an image is not on the reference's 1 mm grid.
    """
    if not images:
        return None
    term = problem.measurement_of_reference()
    scan = (term.y / term.bias)[term.core]
    total, precision, fits = torch.zeros_like(problem.support), 0.0, []
    for one in images:
        assert isinstance(one.image, Tensor)
        if tuple(one.image.shape) != problem.grid.shape:
            raise ShapeMismatchError(
                f"image to refine: expected shape {problem.grid.shape} on the reference's 1 mm "
                f"grid, got {tuple(one.image.shape)}. Resample it."
            )
        z = (one.image[problem.box.image_slices] * problem.support).to(problem.device)
        gain, correlation = _fit(term.operator(z)[term.core], scan)
        fits.append((gain, correlation))
        total = total.to(z) + gain * z / one.sd**2
        precision += one.sd**-2
    return WhiteImage(total / precision, precision**-0.5, tuple(fits))


def _fit(seen: Tensor, scan: Tensor) -> tuple[float, float]:
    if not bool((seen > 0).any()):
        raise InputError(
            "the image to refine is 0 where the scan shows brain. Do they lie in the same space?"
        )
    gain = float((seen @ scan) / (seen @ seen))
    correlation = float(torch.corrcoef(torch.stack((seen, scan)))[0, 1])
    if not correlation > UNLIKE:
        raise InputError(
            f"the image to refine and the scan correlate by {correlation:.2f} inside the "
            f"brain, at least {UNLIKE} is needed. Do they show the same participant, in the same "
            "space and contrast?"
        )
    return gain, correlation


class GivenDenoiser:
    """``E[x | x_t, y]`` for the samplers: (i, j, k), sigma -> (i, j, k).

    Attributes
    ----------
    sd : (i, j, k) tensor or None
        SD of x given y alone, predicted by the prior in the blind call; None before that call, and
        if the prior does not predict it.
    """

    def __init__(
        self,
        view: Conditioning,
        likelihood: Likelihood,
        measured: Measured,
        *,
        with_surroundings: bool,
        averaged: bool,
    ) -> None:
        self._view, self._likelihood, self._measured = view, likelihood, measured
        self._with_surroundings = with_surroundings
        self._positions = view.positions if averaged else (None,)
        self.sd: Tensor | None = None

    def __call__(self, x_t: Tensor, sigma: float) -> Tensor:
        blind = sigma >= BLIND
        answers = [
            self._view.ask(x_t, sigma, spread=blind, position=position, measured=self._measured)
            for position in self._positions
        ]
        mean = torch.stack([answer for answer, _ in answers]).mean(0)
        if blind:
            squares = [sd.square() for _, sd in answers if sd is not None]
            self.sd = torch.stack(squares).mean(0).sqrt() if squares else None
        return mean if self._with_surroundings else self._likelihood.constrain(mean)


class Conditioning:
    """A prior for one problem: with its MNI305 coordinates, contrast and other tools' images.

    Parameters
    ----------
    prior : PriorLike
    problem : Problem
    contrast : str
    images : sequence of ImageObservation
    """

    def __init__(
        self,
        prior: PriorLike,
        problem: Problem,
        contrast: str,
        images: Sequence[ImageObservation] = (),
    ) -> None:
        self.prior, self.problem, self.contrast = prior, problem, contrast
        self.image = fit_images(images, problem)
        own = prior.spectrum(contrast)
        self.spectrum = own if self.image is None else GivenSpectrum(own, self.image)

    @cached_property
    def guess(self) -> Tensor:
        """(i, j, k) estimate on the home grid before any network call: 0, or the other tool's
        image, weighted by its error and by V at ``SIGMA_BLIND``.
        """
        shape, device = self.problem.box.shape, self.problem.device
        if self.image is None:
            return torch.zeros(shape, device=device)
        spacing = [float(s) for s in self.problem.home.spacing_mm]
        i, j = (torch.fft.fftfreq(n, d=d) for n, d in zip(shape[:2], spacing[:2], strict=True))
        k = torch.fft.rfftfreq(shape[2], d=spacing[2])
        frequency = (i[:, None, None] ** 2 + j[:, None] ** 2 + k**2).sqrt()
        power = self.prior.spectrum(self.contrast).variance(SIGMA_BLIND, frequency)
        weight = (power / (power + self.image.tau**2)).to(device, torch.float32)
        guess: Tensor = torch.fft.irfftn(torch.fft.rfftn(self.image.z) * weight, s=shape)
        return guess

    def denoiser(self) -> Denoise:
        """``E[x | x_t]``, or ``E[x | x_t, z]``: (i, j, k) -> (i, j, k)."""
        return lambda x_t, sigma: self.ask(x_t, sigma)[0]

    def denoiser_given(
        self, likelihood: Likelihood, thickness_factor: float, *, averaged: bool = False
    ) -> GivenDenoiser:
        """The same, conditioned on the reference's measurements, with slices that are
        ``thickness_factor`` times as thick as stated; ``averaged`` over ``positions``.
        """
        return GivenDenoiser(
            self,
            likelihood,
            self._measurements(likelihood, thickness_factor),
            with_surroundings=self._with_surroundings,
            averaged=averaged,
        )

    @property
    def positions(self) -> Sequence[tuple[int, int] | None]:
        """Positions of the network's blocks to average over; None is the prior's own."""
        known: Sequence[tuple[int, int] | None] = getattr(self.prior, "positions", (None,))
        return known

    @property
    def _with_surroundings(self) -> bool:
        """Whether the network is given the brain with its nearest surroundings, and restores them
        too: for one scan with thick slices. Other tools' images and the solve for further scans
        do not include them.
        """
        box, scans = self.problem.reference.box, self.problem.scans
        return box.shape != box.data_shape and len(scans) == 1 and self.image is None

    def ask(
        self,
        x_t: Tensor,
        sigma: float,
        *,
        spread: bool = False,
        position: tuple[int, int] | None = None,
        **measured: Measured,
    ) -> tuple[Tensor, Tensor | None]:
        """The network's output, and the SD of its error if requested and predicted. With another
        tool's image, no SD is predicted, because the network was not trained for it.
        """
        if self.image is not None:
            x_t, sigma = self.image.merge(x_t, sigma)
            spread = False
        place, contrast = self.problem.coordinates, self.contrast
        x = x_t[None, None]
        spread = spread and getattr(self.prior, "predicts_spread", False)
        if position is None and not spread:
            answer = self.prior.denoise(x, sigma, coordinates=place, contrast=contrast, **measured)
            return answer[0, 0], None
        mean, sd = cast(SpreadPrior, self.prior).estimate(
            x,
            sigma,
            coordinates=place,
            contrast=contrast,
            spread=spread,
            position=position or (0, 0),
            **measured,
        )
        return mean[0, 0], None if sd is None else sd[0, 0]

    def _measurements(self, likelihood: Likelihood, thickness_factor: float) -> Measured:
        """The reference divided by its bias field; 0 far from the brain, or outside it.

        Without the surroundings, voxels partly outside the brain are hidden on the restored grid.
        In thick slices, they have the Gaussian estimate of the signal of the brain alone.
        """
        term, box = likelihood.reference, self.problem.reference.box
        if box.shape == box.data_shape:
            y = term.brain_alone(torch.zeros_like(likelihood.support))
            return Voxels(y.cpu(), term.partly_seen().cpu(), term.noise_sd)
        if self._with_surroundings:
            y = self.problem.reference_with_surroundings(thickness_factor)
        else:
            y = term.brain_alone(likelihood.expect(self.guess, SIGMA_BLIND)).cpu()
        axis, shares = self.problem.scans[0].acquisition.slice_axis, []
        for a in range(3):
            n, m = y.shape[a], box.shape[a]
            if a != axis:
                shares.append(n / m)
                y = SliceProfile(resampling_matrix(n, m), tuple(y.shape), a)(y)
        noise_sd = term.noise_sd / math.sqrt(shares[0] * shares[1])
        weights = self.problem.slice_weights(thickness_factor)
        return Stack(y, weights.double().cpu(), axis, noise_sd, (shares[0], shares[1]))

    def obstacle(self) -> str | None:
        """Why the network cannot be conditioned on the reference's measurements, or None."""
        problem, prior = self.problem, self.prior
        box, scan = problem.reference.box, problem.scans[0]
        if problem.displaced:
            return "the interleaves of the scan are displaced"
        if not getattr(prior, "takes_stacks", False):
            return UNTRAINED
        if problem.nuisances.move_bias:
            return "it does not move the bias field"
        if problem.reference.excess is not None:
            return UNEVEN_NOISE
        if problem.box.shape != box.shape or problem.box.start != box.start:
            return "the unknown does not lie on the scan's axes"
        return obstacle_in_voxels(
            box.shape,
            box.data_shape,
            axis=scan.acquisition.slice_axis,
            any_hidden=problem.any_hidden,
            sinc_shaped=bool((problem.slice_weights() < -0.01).any()),
            takes_holes=getattr(prior, "takes_holes", False),
        )


def obstacle_in_voxels(
    shape: Sequence[int],
    data_shape: Sequence[int],
    *,
    axis: int,
    any_hidden: bool,
    sinc_shaped: bool,
    takes_holes: bool,
) -> str | None:
    """Why a network that takes measurements cannot be conditioned on voxels of this size, or None.

    Parameters
    ----------
    shape, data_shape : (i, j, k)
        Voxels of the restored image and of the scan in one box; only their ratio counts.
    axis : int
        Slice axis.
    any_hidden : bool
        Whether voxels of the scan are hidden.
    sinc_shaped : bool
        Whether the slice profile is that of a 3-D scan whose slices are thicker than the restored
        voxels.
    takes_holes : bool
        Whether the network was trained on partly hidden scans on the restored grid.
    """
    if tuple(shape) == tuple(data_shape):
        return None if takes_holes else "the prior was not trained on scans with holes"
    if any_hidden:
        return "voxels are hidden of a scan that is coarser than the restored image"
    if any(a != axis and shape[a] > IN_PLANE * data_shape[a] for a in range(3)):
        return f"voxels in the plane of the slices are above {IN_PLANE} restored ones"
    thin = shape[axis] < SPACING * data_shape[axis]
    if thin and not (sinc_shaped and takes_holes):
        return "the slices are as thin as the restored voxels"
    return None


def expected_obstacle(
    grid: Grid, acquisition: Acquisition, *, any_hidden: bool, facts: Mapping[str, Any]
) -> str | None:
    """``Conditioning.obstacle`` as far as it is known before a scan is read.

    Noise that differs between voxels is for the caller to judge. Unknown are displaced slices,
    lost slices and voxels that were interpolated.

    Parameters
    ----------
    grid : Grid
        Grid of the scan, from its header.
    acquisition : Acquisition
    any_hidden : bool
        Whether voxels are hidden by a lesion mask.
    facts : mapping
        Metadata of the prior's weights (``weights.read_weights``).
    """
    if not facts["config"].get("stacks"):
        return UNTRAINED
    shape = grid.one_millimetre().shape
    data_shape = triple(tuple(min(pair) for pair in zip(shape, grid.shape, strict=True)))
    profile, _ = sensitivity(grid, acquisition, data_shape)
    return obstacle_in_voxels(
        shape,
        data_shape,
        axis=acquisition.slice_axis,
        any_hidden=any_hidden,
        sinc_shaped=bool((profile < -0.01).any()),
        takes_holes=facts.get("recipe", {}).get("holes", 0) > 0,
    )
