# SPDX-License-Identifier: Apache-2.0
"""The unknowns of a scan in addition to the brain, and the values that each sample assumes.

- Slice thickness: the true profile is unknown and affects the brightness of whole structures. Each
sample is drawn under a different thickness.
- Bias field: N4's estimate, fixed or refined while sampling (``move_bias``).
- Noise level: estimated before sampling and, unless it was specified, lowered by up to a half
while sampling.
- Gain and rigid motion of further scans: estimated beforehand, the same in all samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from brainprior_bids.engine.bias import CosineField, gauss_newton_step
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.noise import fisher_noise_variance

THICKNESS_SD = 0.14
"""SD of the ratio of true to stated slice thickness: pulses differ from the header's values, in
width and in shape. Chosen on participants whose slices were 10 % thicker or thinner than stated
and of another shape."""
BIAS_TRUST = 0.02
"""Weight of the data in a step of the bias field. V assumes that the denoiser's errors are
stationary, but at high noise they follow the anatomy over centimetres, like a bias field."""


@dataclass(frozen=True)
class Nuisances:
    """How the unknowns of a scan are treated.

    Parameters
    ----------
    thickness_sd : float
        SD of the ratio of true to stated thickness of 2-D slices, 0 to 0.3. With 0, all samples
        assume the stated thickness, as for 3-D scans.
    move_bias : bool
        Refine the bias field (and the gain) while sampling. See ``docs/decisions/bias-field.md``.
    bias_scale_mm : float
        Shortest half wave of that refinement.

    Raises
    ------
    UsageError
        If ``thickness_sd`` is out of range.
    """

    thickness_sd: float = THICKNESS_SD
    move_bias: bool = False
    bias_scale_mm: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.thickness_sd <= 0.3:
            raise UsageError(
                f"Nuisances: thickness_sd must be between 0 and 0.3, got {self.thickness_sd}."
            )

    def thickness_factor(self, index: int) -> float:
        """Ratio of the slice thickness that sample ``index`` assumes to the stated one. It is 1,
        wider, narrower in turn: any three consecutive samples have mean 1 and SD ``thickness_sd``
        (divided by 3, not by 2), and the first (or only) one is as stated.
        """
        return 1 + (0.0, 1.0, -1.0)[index % 3] * math.sqrt(1.5) * self.thickness_sd


class BiasModel:
    """Basis of the part of a log bias field that is refined, on the data box of a scan.

    Parameters
    ----------
    field : CosineField
    basis : list of (n_f, n) tensors
        ``field.basis`` at the data voxels.
    """

    def __init__(self, field: CosineField, basis: list[Tensor]) -> None:
        self.field, self.basis = field, basis


class NuisanceState:
    """Noise level and bias field of the reference in one chain.

    Parameters
    ----------
    noise_sd : float
        SD before sampling, engine unit.
    log_bias : (i', j', k') tensor
        The initial bias field.
    brain : (i', j', k') bool tensor
        The field counts as 1 elsewhere.
    model : BiasModel, optional
        Basis on which the field may change; by default it is fixed.
    """

    def __init__(
        self, noise_sd: float, log_bias: Tensor, brain: Tensor, model: BiasModel | None = None
    ) -> None:
        self.initial_noise_sd, self.initial_log_bias = noise_sd, log_bias
        self.brain, self.model = brain, model
        self.reset()

    def reset(self) -> None:
        """Reset to the values before sampling."""
        self.noise_sd = self.initial_noise_sd
        n = self.model.field.n if self.model is not None else 0
        self.set_coefficients(torch.zeros(n, dtype=torch.float64))

    def set_coefficients(self, coefficients: Tensor) -> None:
        """Set the field to these coefficients."""
        self.coefficients, log_bias = coefficients, self.initial_log_bias
        if self.model is not None:
            moved = coefficients.to(log_bias.device)
            log_bias = log_bias + self.model.field.evaluate(moved, self.model.basis)
        self.bias = torch.where(self.brain, log_bias, 0.0).exp()

    def step_bias(
        self, prediction: Tensor, residual: Tensor, whiten: Callable[[Tensor], Tensor]
    ) -> None:
        """One ridge Gauss-Newton step (``gauss_newton_step`` has the arguments)."""
        if self.model is None:
            return
        step = gauss_newton_step(
            self.model.field,
            self.model.basis,
            coefficients=self.coefficients,
            prediction=prediction,
            residual=residual,
            whiten=whiten,
            trust=BIAS_TRUST,
        )
        self.set_coefficients(step.cpu())

    def step_noise(self, power: float, traces: tuple[float, float], size: int) -> None:
        """One Fisher-scoring step on the noise variance (``fisher_noise_variance``).

        The step is weighted by the fraction of the ``size`` data that distinguishes noise from V.
        The SD is kept between one half and all of the SD estimated beforehand: that estimate tends
        to be too high (texture), and a prior that misses a texture must not gain weight by this.
        """
        variance = self.noise_sd**2
        value, information = fisher_noise_variance(power, *traces, variance)
        value = variance + information / size * (value - variance)
        low, high = (0.5 * self.initial_noise_sd) ** 2, self.initial_noise_sd**2
        self.noise_sd = math.sqrt(min(max(value, low), high))
