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
    structures_json = File(exists=True, desc="output of Parcellate: slices that are not used")
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
        warnings += self._unmasked(
            {self.inputs.name: isdefined(self.inputs.hidden)}
            | {request["name"]: "lesion" in request for request in self.inputs.runs}
        )
        record = AlignRecord(reference=self.inputs.name, runs=tuple(records))
        mask = common_mask(reference, motions)
        grid = reference.grid.one_millimetre()
        self._results.update(
            mask=files.save(mask, grid, folder / "mask.nii.gz"),
            runs_json=files.write_record(record, folder / "runs.json"),
        )
        return warnings

    @staticmethod
    def _unmasked(masked: dict[str, bool]) -> list[str]:
        """A warning for every run without a lesion mask, if another one has one."""
        if not any(masked.values()):
            return []
        return [
            f"{name} has no lesion mask: it is used everywhere, also under the lesion masks "
            "of the other runs."
            for name, has in masked.items()
            if not has
        ]

    def _reference(self) -> PlacedScan:
        from brainprior_bids.anatomy.motion import PlacedScan
        from brainprior_bids.anatomy.slices import hidden_voxels

        inputs = files.given(self.inputs)
        grid = files.grid_of(nib.load(inputs["in_file"]))
        acquisition = files.read_acquisition(inputs["conform_json"])
        lesion = files.read_array(inputs["hidden"]) if "hidden" in inputs else None
        lost = files.read_lost(inputs.get("structures_json"))
        return PlacedScan.from_scan(
            inputs["name"],
            files.read_array(inputs["in_file"], np.float32),
            files.read_array(inputs["log_bias"], np.float32),
            grid=grid,
            acquisition=acquisition,
            mask=files.read_array(inputs["mask"]),
            hidden=hidden_voxels(lesion, lost, grid.shape, axis=acquisition.slice_axis),
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
    """The files of a run that Restore reads, by role."""
    assert scan.bias is not None
    conformed = files.write_conformed(scan.conformed, folder)
    brain = files.write_brain(scan.brain, scan.grid, folder)
    if scan.lesion is not None:  # whose masks are of brain and lesion
        brain |= files.write_lesion(scan.lesion, scan.grid, folder)
    if scan.hidden is not None:
        brain["hidden"] = files.save(scan.hidden, scan.grid, folder / "not_used.nii.gz")
    return {
        "scan": conformed["out_file"],
        "conform": conformed["conform_json"],
        "bias": files.write_bias(scan.bias, scan.grid, folder)["log_bias"],
        **{role: brain[role] for role in ("mask", "mask_scan", "hidden") if role in brain},
    }
