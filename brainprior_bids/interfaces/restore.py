# SPDX-License-Identifier: Apache-2.0
"""Interface to ``brainprior_bids.engine.restore``; the graph's only GPU node."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nipype.interfaces.base import File, OutputMultiPath, traits

from brainprior_bids.bids.files import write_json
from brainprior_bids.engine.samplers import registry
from brainprior_bids.interfaces.base import (
    MeasuredInputSpec,
    MeasuredInterface,
    MeasuredOutputSpec,
)
from brainprior_bids.interfaces.files import given, read_array, read_matrix

PROGRESS = "progress.json"
"""Progress file in the node's folder: ``sample`` of ``samples``, ``step`` of ``steps``."""


class _RestoreInputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the conformed scan, bias and skull included")
    conform_json = File(exists=True, mandatory=True, desc="output of Conform: the slice geometry")
    mask = File(exists=True, mandatory=True, desc="brain on the 1 mm grid")
    mask_scan = File(exists=True, mandatory=True, desc="brain on the scan's grid, in [0, 1]")
    log_bias = File(exists=True, desc="output of N4; without it there is no bias field")
    bias_json = File(exists=True, desc="output of N4: motion between the interleaves")
    trust = traits.Range(
        low=0.0, exclude_low=True, desc="SD of the error of the image to refine, engine unit"
    )
    trust_map = File(exists=True, desc="the same for each voxel of the image to refine")
    runs_json = File(exists=True, desc="output of Align: other runs to be fused with in_file")
    refined = File(
        exists=True,
        desc="the image to refine, together with in_file; without it, in_file is refined",
    )
    affine_json = File(
        exists=True, mandatory=True, desc="output of CentroidAffine: scanner RAS -> MNI305"
    )
    prior = File(exists=True, mandatory=True, desc="weights of the prior")
    contrast = traits.Enum("T1w", "T2w", "FLAIR", "unknown", mandatory=True)
    sampler = traits.Enum(*registry.NAMES, usedefault=True)
    n_samples = traits.Range(low=1, value=4, usedefault=True)
    n_steps = traits.Range(low=1, desc="noise levels; by default the sampler's own")
    seed = traits.Range(low=0, high=2**63 - 1, value=0, usedefault=True)
    device = traits.Str(
        "cpu", usedefault=True, nohash=True, desc="cpu, cuda:N, or auto (resolved by the node)"
    )
    use_gpu = traits.Bool(
        False, usedefault=True, nohash=True, desc="makes this a GPU node for Nipype's scheduler"
    )
    tile_mm = traits.Range(low=4, nohash=True, desc="the network's slabs; else whole volumes")
    hidden = File(exists=True, desc="1 where the scan is excluded, on its grid")
    structures_json = File(exists=True, desc="output of Parcellate: slices that are not used")
    keep_scan = traits.Bool(
        False, usedefault=True, desc="write the scan with its hidden voxels filled in"
    )
    native = traits.Bool(
        False, usedefault=True, desc="also write the whole head on the scan's grid"
    )
    save_samples = traits.Bool(False, usedefault=True, desc="write every sample as an image")


class _RestoreOutputSpec(MeasuredOutputSpec):
    image = File(desc="the result: restored, or with keep_scan the filled scan on its grid")
    restored_native = File(
        desc="with native: the scan, with the result's prediction inside the brain"
    )
    restored = File(desc="mean of the samples on the 1 mm grid, scanner units")
    uncertainty = File(desc="SD of the posterior, same grid and units; where there is one")
    log_bias = File(desc="natural log of the estimated bias field, on the scan's grid")
    residual = File(desc="scan minus its prediction, in SDs of the noise, on the scan's grid")
    run_residuals = OutputMultiPath(
        File(), desc="with runs_json: the residual of each other run, on its own grid"
    )
    samples = OutputMultiPath(File(), desc="with save_samples: each sample, as restored")
    restore_json = File(desc="noise, residuals, calls, schedule, weights")


class Restore(MeasuredInterface):
    """Draw from the posterior of the 1 mm brain, given the scan and the prior."""

    input_spec = _RestoreInputSpec
    output_spec = _RestoreOutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.engine.device import choose_device
        from brainprior_bids.engine.errors import SamplerError
        from brainprior_bids.engine.restore import RIM_MM, restore
        from brainprior_bids.engine.samplers.daps import DAPS_1K, DapsSettings
        from brainprior_bids.engine.weights import load_prior, sha256_file
        from brainprior_bids.interfaces import restoration

        inputs = given(self.inputs)
        device, why, unexpected = choose_device(inputs["device"])
        prior = load_prior(Path(inputs["prior"]), device=device, tile_mm=inputs.get("tile_mm"))
        draw = partial(
            restore,
            restoration.read_observations(inputs),
            mask_1mm=read_array(inputs["mask"]),
            to_mni305=read_matrix(inputs["affine_json"]),
            contrast=inputs["contrast"],
            prior=prior,
            rim_mm=RIM_MM,
            on_scan=inputs["native"] or inputs["keep_scan"],
            n_samples=inputs["n_samples"],
            n_steps=inputs.get("n_steps"),
            seed=inputs["seed"],
            device=device,
            observe=restoration.progress_writer(folder / PROGRESS, inputs["n_samples"]),
            daps=DapsSettings(n_levels=inputs["n_steps"]) if "n_steps" in inputs else DAPS_1K,
        )
        notes = [f"restored on the CPU: {why}"] if unexpected else []
        try:
            result = draw(sampler=inputs["sampler"])
        except SamplerError as error:
            result = draw(sampler="auto")
            notes.append(
                f"--sampler {inputs['sampler']} was not used: {error.obstacle}. The sampler is "
                f"{result.sampler}."
                + (" One sample has no uncertainty map." if inputs["n_samples"] == 1 else "")
            )
        warnings = restoration.find_warnings(inputs, result, notes)
        outputs, changed = restoration.write_images(inputs, result, folder)
        record = restoration.record_of(
            inputs,
            result,
            prior=prior,
            prior_sha256=sha256_file(Path(inputs["prior"])),
            rim_mm=RIM_MM,
            device=device,
            warnings=warnings,
            changed=changed,
        )
        restore_json = write_json(folder / "restore.json", record.to_json())
        self._results.update(outputs, restore_json=str(restore_json))
        return warnings
