# SPDX-License-Identifier: Apache-2.0
"""Interface for exports to other programs: the whole head and its tissues."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np
from nipype.interfaces.base import File, isdefined, traits
from numpy.typing import NDArray

from brainprior_bids.bids.export import remove_others, stage_fmriprep, stage_raw
from brainprior_bids.bids.files import publish, temporary_folder
from brainprior_bids.bids.names import BIDSName
from brainprior_bids.bids.query import Scan
from brainprior_bids.interfaces.base import (
    MeasuredInputSpec,
    MeasuredInterface,
    MeasuredOutputSpec,
)
from brainprior_bids.interfaces.files import (
    grid_of,
    read_acquisition,
    read_array,
    save,
    write_record,
)
from brainprior_bids.records import BiasRecord, ExportRecord
from brainprior_bids.settings import EXPORT_PER


class _ExportInputSpec(MeasuredInputSpec):
    scan = File(exists=True, mandatory=True, desc="the conformed scan")
    mask_scan = File(exists=True, mandatory=True, desc="brain on the scan's grid, in [0, 1]")
    log_bias = File(exists=True, mandatory=True, desc="natural log of the estimated bias field")
    conform_json = File(exists=True, desc="the slice geometry, for the slice gains")
    bias_json = File(exists=True, desc="output of N4: the slice gains in log_bias")
    restored = File(exists=True, mandatory=True, desc="the restored brain, 1 mm")
    mask = File(exists=True, mandatory=True, desc="brain, 1 mm")
    structures = File(exists=True, mandatory=True, desc="FreeSurfer's labels, 1 mm")
    tissues = traits.Bool(True, usedefault=True, desc="also write GM, WM and CSF")


class _ExportOutputSpec(MeasuredOutputSpec):
    head = File(desc="whole head with the restored brain, on the 1 mm grid")
    dseg = File(desc="1 GM, 2 WM, 3 CSF")
    gm = File(desc="probability of grey matter")
    wm = File(desc="probability of white matter")
    csf = File(desc="probability of fluid")
    export_json = File(desc="gain")


class Export(MeasuredInterface):
    """Insert the brain into its head; segment its tissues."""

    input_spec = _ExportInputSpec
    output_spec = _ExportOutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.pasteback import FEATHER_MM, paste_back
        from brainprior_bids.anatomy.tissues import (
            TISSUES,
            tissue_labels,
            tissue_probabilities,
        )

        inputs = self.inputs
        scan, restored = nib.load(inputs.scan), nib.load(inputs.restored)
        grid = grid_of(restored)
        brain, mask = restored.get_fdata(dtype=np.float32), read_array(inputs.mask) > 0
        pasted = paste_back(
            scan.get_fdata(dtype=np.float32),
            brain,
            scan_grid=grid_of(scan),
            grid=grid,
            mask=mask,
            mask_scan=read_array(inputs.mask_scan),
            log_bias=read_array(inputs.log_bias),
            log_gains=self._log_gains(),
        )
        self._results["head"] = save(pasted.head, grid, folder / "head.nii.gz")
        if inputs.tissues:
            tissues = tissue_probabilities(
                brain, read_array(inputs.structures), mask, spacing_mm=grid.spacing_mm
            )
            labels = tissue_labels(tissues, mask)
            self._results["dseg"] = save(labels, grid, folder / "dseg.nii.gz")
            for tissue in TISSUES:
                path = folder / f"{tissue.lower()}.nii.gz"
                self._results[tissue.lower()] = save(tissues[tissue], grid, path)
        record = ExportRecord(
            gain=pasted.gain, feather_mm=FEATHER_MM, warnings=tuple(pasted.warnings)
        )
        self._results["export_json"] = write_record(record, folder / "export.json")
        return pasted.warnings

    def _log_gains(self) -> NDArray[np.float32]:
        """The log slice gains, in a shape that broadcasts over the scan; 0 without any."""
        inputs = self.inputs
        if not (isdefined(inputs.bias_json) and isdefined(inputs.conform_json)):
            return np.zeros((1, 1, 1), np.float32)
        gains = BiasRecord.read(inputs.bias_json).gains or (1.0,)
        shape = [1, 1, 1]
        shape[read_acquisition(inputs.conform_json).slice_axis] = len(gains)
        return np.log(np.array(gains, np.float32)).reshape(shape)


class _DeliverInputSpec(MeasuredInputSpec):
    head = File(exists=True, mandatory=True)
    export_json = File(exists=True, mandatory=True)
    mask = File(exists=True, mandatory=True)
    dseg = File(exists=True)
    gm = File(exists=True)
    wm = File(exists=True)
    csf = File(exists=True)
    source_file = File(exists=True, mandatory=True, desc="the raw image")
    relative = traits.Str(mandatory=True, desc="its path from the data set's root")
    metadata = traits.Dict({}, usedefault=True)
    fingerprint = traits.Str(
        mandatory=True, desc="SHA-256 over everything that determines the result"
    )
    exports = traits.Dict(mandatory=True, desc="kind -> root")
    per = traits.Enum(*EXPORT_PER, usedefault=True)
    made_from = traits.Dict(mandatory=True, desc="role -> path of its parent in the output folder")


class Deliver(MeasuredInterface):
    """Put a scan's exported files in place, all or none; it always runs, as ``Write`` does."""

    input_spec = _DeliverInputSpec
    output_spec = MeasuredOutputSpec
    _always_run = True

    def _work(self, folder: Path) -> list[str]:
        inputs = self.inputs
        relative = PurePosixPath(inputs.relative)
        scan = Scan(Path(inputs.source_file), relative, BIDSName.parse(relative), inputs.metadata)
        facts = {
            "export": ExportRecord.read(inputs.export_json),
            "fingerprint": inputs.fingerprint,
        }
        for kind, name in inputs.exports.items():
            root = Path(name)
            with temporary_folder("staging", root) as staged_in:
                staging = Path(staged_in)
                if kind == "fmriprep":
                    roles = ("head", "mask", "dseg", "gm", "wm", "csf")
                    images = {role: Path(getattr(inputs, role)) for role in roles}
                    staged = stage_fmriprep(
                        staging, scan, images, made_from=inputs.made_from, **facts
                    )
                    # before publishing, so that there are never two T1w
                    remove_others(root, scan.subject, staged, per=inputs.per)
                else:
                    staged = stage_raw(staging, scan, Path(inputs.head), **facts)
                publish({staging / path: root / path for path in staged})
        return []
