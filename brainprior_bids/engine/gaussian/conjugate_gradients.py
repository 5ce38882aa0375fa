# SPDX-License-Identifier: Apache-2.0
"""Preconditioned conjugate gradients with a stated tolerance and no silent failure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from brainprior_bids.engine.errors import ConvergenceError, DivergenceError


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    rhs: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] | None = None,
    start: Tensor | None = None,
    residual_size: Callable[[Tensor], float] | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
    who: str = "conjugate_gradients",
) -> tuple[Tensor, int]:
    """Solve ``M u = rhs`` for a symmetric positive definite M.

    Parameters
    ----------
    apply, precondition : function
        ``M v`` and an approximate ``M^-1 v``.
    start : tensor, optional
        A first guess (warm start).
    residual_size : function, optional
        The value that is compared with ``tolerance``; by default ``|r| / |rhs|``.

    Returns
    -------
    (u, iterations)

    Raises
    ------
    ConvergenceError
        If the tolerance is not met after ``max_iterations``.
    DivergenceError
        If a value is not finite (M not positive definite, NaN in the data).
    """
    scale = float(rhs.norm())
    size = residual_size or (lambda r: float(r.norm()) / scale)
    u = torch.zeros_like(rhs) if start is None else start.clone()
    if scale == 0.0:
        return torch.zeros_like(rhs), 0
    r = rhs - apply(u) if start is not None else rhs.clone()
    z = precondition(r) if precondition else r
    p = z.clone()
    rz = _dot(r, z)
    for iteration in range(max_iterations + 1):
        now = size(r)
        if now <= tolerance:
            return u, iteration
        if iteration == max_iterations:
            break
        mp = apply(p)
        alpha = rz / _dot(p, mp)
        if not (alpha > 0.0 and now < float("inf")):
            raise DivergenceError(
                f"{who}: broke down at iteration {iteration} (step {alpha}, residual {now:.3g}). "
                "The system is not positive definite or the data hold NaN."
            )
        u = u + alpha * p
        r = r - alpha * mp
        z = precondition(r) if precondition else r
        rz, before = _dot(r, z), rz
        p = z + (rz / before) * p
    raise ConvergenceError(
        f"{who}: residual {now:.3g} after {max_iterations} iterations, wanted {tolerance:.3g}. "
        "Raise the cap or the tolerance, or check the noise level and the mask."
    )


def split_conjugate_gradients(
    solve_stationary: Callable[[Tensor], Tensor],
    excess: Tensor,
    rhs: Tensor,
    *,
    residual_size: Callable[[Tensor], float],
    tolerance: float,
    max_iterations: int,
    who: str,
) -> tuple[Tensor, int]:
    """Solve ``(K + diag(excess)) u = rhs`` using ``K^-1`` only, as the preconditioner.

    ``M z = r + excess z`` for ``z = K^-1 r``, so that an iteration costs one product with K^-1
    and none with K; the search direction's product follows by the same recurrence as itself.

    Parameters
    ----------
    solve_stationary : function
        ``K^-1 r``.
    excess : tensor
        The diagonal that K lacks; ``K + diag(excess)`` must be positive definite.

    Raises
    ------
    ConvergenceError, DivergenceError
        As ``conjugate_gradients``.
    """
    u = torch.zeros_like(rhs)
    r = rhs.clone()
    z = solve_stationary(r)
    p, mp = z.clone(), torch.addcmul(r, excess, z)
    rz = _dot(r, z)
    for iteration in range(max_iterations + 1):
        now = size = residual_size(r)
        if now <= tolerance:
            return u, iteration
        if iteration == max_iterations:
            break
        alpha = rz / _dot(p, mp)
        if not (alpha > 0.0 and size < float("inf")):
            raise DivergenceError(
                f"{who}: broke down at iteration {iteration} (step {alpha}, residual {now:.3g}). "
                "The system is not positive definite or the data hold NaN."
            )
        u.add_(p, alpha=alpha)
        r.sub_(mp, alpha=alpha)
        z = solve_stationary(r)
        rz, before = _dot(r, z), rz
        beta = rz / before
        p.mul_(beta).add_(z)
        mp.mul_(beta).add_(r).addcmul_(excess, z)
    raise ConvergenceError(
        f"{who}: residual {now:.3g} after {max_iterations} iterations, wanted {tolerance:.3g}. "
        "Raise the cap or the tolerance, or check the noise level and the mask."
    )
