# SPDX-License-Identifier: Apache-2.0
"""How a scan was acquired: the facts that the slice operator needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from brainprior_bids.engine.errors import GeometryError
from brainprior_bids.engine.operators.slices import (
    boxcar_profile,
    gaussian_profile,
    measured_profile,
    trapezoid_profile,
)

PROFILES = {
    "trapezoid": trapezoid_profile,
    "gaussian": gaussian_profile,
    "boxcar": boxcar_profile,
}


@dataclass(frozen=True)
class Acquisition:
    """Slice geometry, on the closest-canonical (RAS) axes of the scan.

    Parameters
    ----------
    slice_axis : 0, 1 or 2
        The axis along which slices were excited.
    thickness_mm : float
        Full width at half maximum of the slice profile.
    spacing_mm : float
        Distance between the centres of neighbouring slices; spacing - thickness is the gap.
    profile : {"trapezoid", "gaussian", "boxcar"}, or pairs of (mm, sensitivity)
        Shape of the slice profile. A measured profile lists sensitivities (any unit) at ascending
        distances from the slice's centre; it is linear in between and 0 beyond.
    interleaves : int, optional
        Number of interleaves in which the slices were measured (slice k in interleave k mod n),
        if the metadata state it; 1 for slices in order.

    Raises
    ------
    GeometryError
        If a value makes no sense.
    """

    slice_axis: int
    thickness_mm: float
    spacing_mm: float
    profile: str | tuple[tuple[float, float], ...] = "trapezoid"
    interleaves: int | None = None

    def __post_init__(self) -> None:
        if self.slice_axis not in (0, 1, 2):
            raise GeometryError(
                f"Acquisition: slice_axis must be 0, 1 or 2, got {self.slice_axis}."
            )
        for name in ("thickness_mm", "spacing_mm"):
            value = getattr(self, name)
            if not 0 < value < 1000:
                raise GeometryError(
                    f"Acquisition: {name} must be above 0 and in mm, got {value}. "
                    "Check SliceThickness in the JSON, or pass --slice-thickness."
                )
        if self.interleaves is not None and self.interleaves < 1:
            raise GeometryError(
                f"Acquisition: interleaves must be at least 1, got {self.interleaves}."
            )
        if not isinstance(self.profile, str):
            try:
                pairs = tuple((float(at), float(height)) for at, height in self.profile)
            except (TypeError, ValueError) as error:
                raise GeometryError(
                    "Acquisition: a measured profile is pairs of (mm, sensitivity), got "
                    f"{self.profile!r}."
                ) from error
            object.__setattr__(self, "profile", pairs)
            self.cumulative()
        elif self.profile not in PROFILES:
            raise GeometryError(
                f"Acquisition: profile must be one of {list(PROFILES)} or measured pairs of (mm, "
                f"sensitivity), got {self.profile!r}."
            )

    @property
    def gap_mm(self) -> float:
        """Unmeasured distance between slices; negative where slices overlap."""
        return self.spacing_mm - self.thickness_mm

    def cumulative(self, width: float = 1.0) -> Callable[[Tensor], Tensor]:
        """The profile's cumulative distribution over the distance from a slice's centre in mm.

        ``width`` stretches it: the true thickness over the stated one.
        """
        if isinstance(self.profile, str):
            return PROFILES[self.profile](width * self.thickness_mm)
        pairs = torch.tensor(self.profile, dtype=torch.float64).reshape(-1, 2)
        return measured_profile(width * pairs[:, 0], pairs[:, 1])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping; ``Acquisition.from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Acquisition:
        """Read the result of ``to_dict``; unknown keys are ignored."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})
