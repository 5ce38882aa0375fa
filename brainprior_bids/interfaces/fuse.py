# SPDX-License-Identifier: Apache-2.0
"""The other runs of a scan: each made ready as the reference was, and laid on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nipype.interfaces.base import File, traits

from brainprior_bids.bids.files import read_json, write_json
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import BrainpriorError
from brainprior_bids.engine.weights import sha256_file
from brainprior_bids.interfaces.anatomy import N4, Conform, Parcellate, grid_of, save
from brainprior_bids.interfaces.base import (
    MeasuredInputSpec,
    MeasuredInterface,
    MeasuredOutputSpec,
)


class _AlignInputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the conformed reference")
    conform_json = File(exists=True, mandatory=True, desc="its slice geometry")
    mask = File(exists=True, mandatory=True, desc="its brain on its 1 mm grid")
    log_bias = File(exists=True, mandatory=True, desc="of N4")
    name = traits.Str(mandatory=True, desc="of the reference, for messages")
    runs = traits.List(
        traits.Dict(),
        mandatory=True,
        desc="the other runs: name, conform (inputs of Conform), parcellate (of Parcellate)",
    )


class _AlignOutputSpec(MeasuredOutputSpec):
    mask = File(desc="brain by all runs on the reference's 1 mm grid, uint8")
    runs_json = File(desc="of each other run: files, slice geometry, motion, gain")


class Align(MeasuredInterface):
    """Conform, parcellate and N4 of every other run, and its rigid motion to the reference."""

    input_spec = _AlignInputSpec
    output_spec = _AlignOutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.motion import common_mask, find_motion

        reference = _stack(
            self.inputs.name,
            self.inputs.in_file,
            self.inputs.conform_json,
            self.inputs.mask,
            self.inputs.log_bias,
        )
        warnings, facts, laid = [], [], []
        for run in self.inputs.runs:
            name, place = run["name"], folder / run["name"]
            try:
                files, said, acquisition = self._ready(run, place)
                stack = _stack(name, files["scan"], files["conform"], files["mask"], files["bias"])
                motion = find_motion(reference, stack)
            except BrainpriorError as error:
                if name in str(error):
                    raise
                raise type(error)(f"{name}: {error}") from error
            warnings += [text if name in text else f"{name}: {text}" for text in said]
            laid.append((stack, motion))
            middle = grid_of(nib.load(files["scan"])).points_mm().reshape(3, -1).mean(1)
            facts.append(
                {
                    "name": name,
                    "files": files,
                    # the next node looks at this table, not into the files that it names
                    "hashes": {role: sha256_file(Path(file)) for role, file in files.items()},
                    "acquisition": acquisition,
                    "to_reference": motion.to_reference.tolist(),
                    "angle_deg": round(motion.angle_deg, 3),
                    "shift_mm": round(motion.shift_mm(middle.astype(np.float64)), 3),
                    "gain": motion.gain,
                    "correlation": round(motion.correlation, 4),
                    "shared": round(motion.shared, 4),
                }
            )
        self._results.update(
            mask=save(
                common_mask(reference, laid),
                reference.grid.one_millimetre(),
                folder / "mask.nii.gz",
            ),
            runs_json=str(
                write_json(folder / "runs.json", {"reference": self.inputs.name, "runs": facts})
            ),
        )
        return warnings

    def _ready(
        self, run: dict[str, Any], place: Path
    ) -> tuple[dict[str, str], list[str], dict[str, Any]]:
        """Files of a run after the steps that its reference went through, and their warnings."""
        threads = int(self.inputs.num_threads)
        results = {}
        inputs: dict[str, Any] = {}
        for step, interface in (("conform", Conform), ("parcellate", Parcellate), ("n4", N4)):
            folder = place / step
            folder.mkdir(parents=True, exist_ok=True)
            if step == "parcellate":
                inputs = {"in_file": results["conform"].out_file}
            elif step == "n4":
                inputs = {
                    "in_file": results["conform"].out_file,
                    "mask_scan": results["parcellate"].mask_scan,
                }
            made = interface(num_threads=threads, **inputs, **run.get(step, {}))
            results[step] = made.run(cwd=str(folder)).outputs
        files = {
            "scan": results["conform"].out_file,
            "conform": results["conform"].conform_json,
            "mask": results["parcellate"].mask,
            "mask_scan": results["parcellate"].mask_scan,
            "bias": results["n4"].log_bias,
        }
        warnings = [
            text
            for found in results.values()
            for text in read_json(Path(found.record))["warnings"]
        ]
        acquisition = read_json(Path(files["conform"]))["acquisition"]
        return files, warnings, acquisition


def _stack(name: str, scan: str, conform_json: str, mask: str, log_bias: str) -> Any:
    from brainprior_bids.anatomy.motion import Stack

    image = nib.load(scan)
    bias = np.asarray(nib.load(log_bias).dataobj, np.float32)
    data = np.nan_to_num(np.asarray(image.dataobj, np.float32), nan=0, posinf=0, neginf=0)
    return Stack(
        name,
        (data / np.exp(bias)).astype(np.float32),
        grid_of(image),
        Acquisition.from_dict(read_json(Path(conform_json))["acquisition"]),
        np.asarray(nib.load(mask).dataobj),
    )
