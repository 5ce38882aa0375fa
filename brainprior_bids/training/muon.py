# SPDX-License-Identifier: Apache-2.0
"""Muon: momentum whose update is orthogonalised, for convolution kernels.

The momentum of a kernel, as an (out, in * k^3) matrix, is replaced by the nearest semi-orthogonal
matrix (five Newton-Schulz iterations) and scaled so that its entries have the root mean square an
Adam update has, so both share one learning rate. AdamW updates vectors and the first and last
layers.

References: Jordan et al., https://kellerjordan.github.io/posts/muon/; Liu et al., arXiv 2502.16982
(the scale 0.2 sqrt(max(out, in))).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """(m, n) float32 -> (m, n) with singular values near 1 (0.7-1.2)."""
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum 0.95 with Nesterov look-ahead, orthogonalised updates, decoupled weight decay.

    Parameters
    ----------
    parameters : iterable of tensors
        At least two axes each; the first is the output.
    lr : float
        Learning rate, shared with AdamW.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the current gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "average" not in state:
                    state["average"] = torch.zeros_like(parameter)
                average = state["average"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(average, group["momentum"]).reshape(len(average), -1)
                update = orthogonalise(ahead) * 0.2 * max(ahead.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"])
