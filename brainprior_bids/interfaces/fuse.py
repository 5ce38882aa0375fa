# SPDX-License-Identifier: Apache-2.0
"""The other runs of a scan: each is prepared like the reference and registered to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nipype.interfaces.base import File, isdefined, traits

from brainprior_bids.engine.weights import sha256_file
from brainprior_bids.interfaces import files
from brainprior_bids.interfaces.anatomy import brain_sources, conform_options
from brainprior_bids.interfaces.base import (
    MeasuredInputSpec,
    MeasuredInterface,
    MeasuredOutputSpec,
)
from brainprior_bids.records import AlignRecord, BiasRecord, RunRecord

if TYPE_CHECKING:
    from brainprior_bids.anatomy.motion import PlacedScan
    from brainprior_bids.anatomy.prepare import Prepared
    from brainprior_bids.anatomy.runs import AlignedRun


class _AlignInputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the conformed reference")
    conform_json = File(exists=True, mandatory=True, desc="its slice geometry")
    mask = File(exists=True, mandatory=True, desc="its brain on its 1 mm grid")
    log_bias = File(exists=True, mandatory=True, desc="output of N4")
    hidden = File(exists=True, desc="output of Lesion: its lesion mask on its own grid")
    name = traits.Str(mandatory=True, desc="name of the reference, for messages")
    runs = traits.List(
        traits.Dict(),
        mandatory=True,
        desc="the other runs: name, conform (inputs of Conform), parcellate (of Parcellate), "
        "where they have a mask lesion (of Lesion), and hashes of their files",
    )


class _AlignOutputSpec(MeasuredOutputSpec):
    mask = File(desc="brain by all runs on the reference's 1 mm grid, uint8")
    runs_json = File(desc="of each other run: files, slice geometry, motion, gain")


class Align(MeasuredInterface):
    """Conform, parcellate and N4 of every other run, and its rigid motion to the reference."""

    input_spec = _AlignInputSpec
    output_spec = _AlignOutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.motion import common_mask

        reference = self._reference()
        warnings, records, motions = [], [], []
        for request in self.inputs.runs:
            run, paths = self._align(request, reference, folder / request["name"])
            warnings += run.warnings
            motions.append((run.placed, run.motion))
            # the next node hashes this table, not the files that it names
            hashes = {role: sha256_file(Path(path)) for role, path in paths.items()}
            report = {"name": request["name"], "files": paths, "hashes": hashes, **run.facts()}
            bias = BiasRecord.read(folder / request["name"] / "bias.json")
            records.append(replace(RunRecord.from_json(report), bias=bias))
        warnings += self._unmasked(reference, [placed for placed, _ in motions])
        record = AlignRecord(reference=self.inputs.name, runs=tuple(records))
        mask = common_mask(reference, motions)
        grid = reference.grid.one_millimetre()
        self._results.update(
            mask=files.save(mask, grid, folder / "mask.nii.gz"),
            runs_json=files.write_record(record, folder / "runs.json"),
        )
        return warnings

    @staticmethod
    def _unmasked(reference: PlacedScan, others: list[PlacedScan]) -> list[str]:
        """A warning of every run without a lesion mask, where another one has one."""
        scans = [reference, *others]
        if all(scan.hidden is None for scan in scans):
            return []
        return [
            f"{scan.name} has no lesion mask: it is used everywhere, also under the lesion masks "
            "of the other runs."
            for scan in scans
            if scan.hidden is None
        ]

    def _reference(self) -> PlacedScan:
        from brainprior_bids.anatomy.motion import PlacedScan

        return PlacedScan.from_scan(
            self.inputs.name,
            files.read_array(self.inputs.in_file, np.float32),
            files.read_array(self.inputs.log_bias, np.float32),
            grid=files.grid_of(nib.load(self.inputs.in_file)),
            acquisition=files.read_acquisition(self.inputs.conform_json),
            mask=files.read_array(self.inputs.mask),
            hidden=(
                files.read_array(self.inputs.hidden) if isdefined(self.inputs.hidden) else None
            ),
        )

    def _align(
        self, request: dict[str, Any], reference: PlacedScan, folder: Path
    ) -> tuple[AlignedRun, dict[str, str]]:
        """One other run, and its files by role; errors name the run."""
        from brainprior_bids.anatomy.prepare import prepare
        from brainprior_bids.anatomy.runs import align_run, errors_name
        from brainprior_bids.engine.weights import load_parcellation

        folder.mkdir(parents=True, exist_ok=True)
        conform, parcellate = request["conform"], request["parcellate"]
        lesion = request.get("lesion", {})
        with errors_name(request["name"]):
            scan = prepare(
                conform["in_file"],
                **conform_options(conform),
                network=load_parcellation(Path(parcellate["weights"])),
                sources=brain_sources(parcellate),
                lesion=Path(lesion["lesion"]) if lesion else None,
                dilate_mm=lesion.get("dilate_mm", 0.0),
                align=False,
                threads=self.inputs.num_threads,
                folder=folder,
            )
            paths = _write(scan, folder)
            return align_run(request["name"], scan, reference), paths


def _write(scan: Prepared, folder: Path) -> dict[str, str]:
    """What Restore reads of a run, by role."""
    assert scan.bias is not None
    conformed = files.write_conformed(scan.conformed, folder)
    brain = files.write_brain(scan.brain, scan.grid, folder)
    if scan.lesion is not None:  # whose masks are of brain and lesion
        brain |= files.write_lesion(scan.lesion, scan.grid, folder)
    return {
        "scan": conformed["out_file"],
        "conform": conformed["conform_json"],
        "bias": files.write_bias(scan.bias, scan.grid, folder)["log_bias"],
        **{role: brain[role] for role in ("mask", "mask_scan", "hidden") if role in brain},
    }
