# SPDX-License-Identifier: Apache-2.0
"""Interface to ``brainprior_bids.anatomy.lesion``."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from nipype.interfaces.base import File, traits

from brainprior_bids.interfaces.base import (
    MeasuredInputSpec,
    MeasuredInterface,
    MeasuredOutputSpec,
)
from brainprior_bids.interfaces.files import grid_of, read_array, write_lesion


class _LesionInputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the conformed scan")
    lesion = File(exists=True, mandatory=True, desc="mask on the scan's grid, above 0 inside")
    mask = File(exists=True, mandatory=True, desc="brain on the 1 mm grid")
    mask_scan = File(exists=True, mandatory=True, desc="brain on the scan's grid, in [0, 1]")
    dilate_mm = traits.Range(low=0.0, value=0.0, usedefault=True, desc="mm")


class _LesionOutputSpec(MeasuredOutputSpec):
    hidden = File(desc="1 where the scan is treated as missing, on the scan's grid, uint8")
    mask = File(desc="brain and lesion on the 1 mm grid, uint8")
    mask_scan = File(desc="brain and lesion on the scan's grid, float32")
    measured = File(desc="brain without lesion on the scan's grid, float32: for N4")
    lesion_json = File(desc="volume, share of the brain, depth")


class Lesion(MeasuredInterface):
    """Check a lesion mask against its scan; dilate it; add it to the brain."""

    input_spec = _LesionInputSpec
    output_spec = _LesionOutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.lesion import find_lesion

        grid = grid_of(nib.load(self.inputs.in_file))
        lesion = find_lesion(
            Path(self.inputs.lesion),
            grid,
            mask_1mm=read_array(self.inputs.mask),
            mask_scan=read_array(self.inputs.mask_scan, np.float32),
            dilate_mm=float(self.inputs.dilate_mm),
        )
        self._results.update(write_lesion(lesion, grid, folder))
        return lesion.warnings
