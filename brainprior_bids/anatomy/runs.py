# SPDX-License-Identifier: Apache-2.0
"""Other runs of a scan, for fusion: each is prepared like the reference and registered to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from brainprior_bids.anatomy.motion import Motion, PlacedScan, find_motion
from brainprior_bids.anatomy.prepare import Prepared
from brainprior_bids.engine.errors import BrainpriorError


@dataclass(frozen=True, eq=False)
class AlignedRun:
    """A prepared run and its rigid motion to the reference."""

    placed: PlacedScan
    motion: Motion
    warnings: list[str]  # each names the run
    lesion: dict[str, Any] | None = None  # facts about its lesion mask

    def facts(self) -> dict[str, Any]:
        """JSON-able: slice geometry, motion (RAS mm, degrees), gain, agreement."""
        middle = self.placed.grid.points_mm().reshape(3, -1).mean(1).astype(np.float64)
        return {
            "acquisition": self.placed.acquisition.to_dict(),
            "to_reference": self.motion.to_reference.tolist(),
            "angle_deg": round(self.motion.angle_deg, 3),
            "shift_mm": round(self.motion.shift_mm(middle), 3),
            "gain": self.motion.gain,
            "correlation": round(self.motion.correlation, 4),
            "shared": round(self.motion.shared, 4),
            **({} if self.lesion is None else {"lesion": self.lesion}),
        }


def align_run(name: str, run: Prepared, reference: PlacedScan) -> AlignedRun:
    """Register a prepared run to the reference.

    Parameters
    ----------
    name : str
        Name of the run, for messages.
    run : Prepared
        With ``log_bias``; its affine to MNI305 is not used.
    reference : PlacedScan

    Raises
    ------
    InputError
        As ``find_motion``.
    """
    assert run.log_bias is not None
    placed = PlacedScan.from_scan(
        name,
        run.values,
        run.log_bias,
        grid=run.grid,
        acquisition=run.acquisition,
        mask=run.mask_1mm,
        hidden=run.hidden,
    )
    warnings = [text if name in text else f"{name}: {text}" for text in run.warnings]
    lesion = None if run.lesion is None else run.lesion.facts
    return AlignedRun(placed, find_motion(reference, placed), warnings, lesion)


@contextmanager
def errors_name(run: str) -> Iterator[None]:
    """Errors of the block begin with the run's name, unless they contain it already."""
    try:
        yield
    except BrainpriorError as error:
        if run in str(error):
            raise
        raise type(error)(f"{run}: {error}") from error
