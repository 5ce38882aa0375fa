# SPDX-License-Identifier: Apache-2.0
"""The work of the restore node: from observations in files to images and a record."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from brainprior_bids.anatomy.interleaves import treatment
from brainprior_bids.anatomy.nifti import open_image
from brainprior_bids.anatomy.slices import hidden_voxels
from brainprior_bids.anatomy.spaces import check_placed, resample
from brainprior_bids.bids.files import write_json
from brainprior_bids.bids.names import sample_role
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import BrainpriorError, GeometryError, InputError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.interfaces.files import (
    grid_of,
    read_acquisition,
    read_array,
    read_lost,
    save,
)
from brainprior_bids.records import (
    AcquisitionRecord,
    AlignRecord,
    BiasRecord,
    BoxRecord,
    ChangedRecord,
    EnvironmentRecord,
    InterleaveRecord,
    ProgressRecord,
    RefinedRecord,
    RestoreRecord,
    RunRecord,
    WeightsRecord,
    matrix_rows,
)

if TYPE_CHECKING:
    from brainprior_bids.engine.denoiser import Prior
    from brainprior_bids.engine.observation import ImageObservation, Observation
    from brainprior_bids.engine.result import Restoration

Inputs = Mapping[str, Any]
"""Inputs of the restore node that are set, name to value."""

ALIKE = 0.7
"""Correlation with the scan inside the brain below which a refined image causes a warning."""
FEW_STEPS = 5
"""Smallest number of noise levels for which the quality was measured (docs/evaluation.md)."""
ENTIRELY = 0.999
"""A voxel of the scan with this share of brain counts as entirely inside."""
OUTSIDE_TRAINING = (
    "The prior was not trained on this contrast (its class is 'unknown'): less is known about its "
    "accuracy, and the uncertainty map is not calibrated for it."
)


def read_observations(inputs: Inputs) -> list[Observation | ImageObservation]:
    """The scan, the runs that are fused with it, and another tool's image.

    Raises
    ------
    InputError, GeometryError
        As ``Observation``; if the image to refine or the map of its error cannot be used.
    """
    from brainprior_bids.engine.observation import Observation

    grid = grid_of(nib.load(inputs["in_file"]))
    acquisition = read_acquisition(inputs["conform_json"])
    lost = read_lost(inputs.get("structures_json"))
    has_image = "refined" in inputs
    reference = Observation(
        read_array(inputs["in_file"]),
        grid,
        acquisition,
        read_array(inputs["mask_scan"]),
        log_bias=_optional(inputs, "log_bias"),
        hidden=hidden_voxels(
            _optional(inputs, "hidden"), lost, grid.shape, axis=acquisition.slice_axis
        ),
        noise_sd=None if has_image else _trust(inputs, grid),
        interleave_motion=_interleave_motion(inputs),
        name=_reference_name(inputs),
    )
    scans: list[Observation | ImageObservation] = [reference, *(_read_runs(inputs))]
    if has_image:
        scans.append(_read_image(Path(inputs["refined"]), float(inputs["trust"]), grid))
    return scans


def found_motion(inputs: Inputs) -> tuple[InterleaveRecord | None, str | None]:
    """The motion between the interleaves of a scan, and why it is not corrected.

    None and None if none was found. It is corrected in one scan that is restored: runs are
    registered by all of their slices, and another tool's image shows the brain as the scan does.
    """
    if "bias_json" not in inputs:
        return None, None
    fields = [BiasRecord.read(inputs["bias_json"])]
    if "runs_json" in inputs:
        fields += [run.bias for run in AlignRecord.read(inputs["runs_json"]).runs if run.bias]
    motions = (field.interleaves for field in fields if field.interleaves is not None)
    motion = next((motion for motion in motions if motion.moved), None)
    if motion is None:
        return None, None
    if inputs["keep_scan"]:
        return motion, "the scan itself is kept"
    if "refined" in inputs:
        return motion, "another image is refined"
    if "runs_json" in inputs:
        return motion, "several scans are fused"
    return motion, motion.obstacle


def _interleave_motion(inputs: Inputs) -> NDArray[np.float64] | None:
    motion, obstacle = found_motion(inputs)
    return None if motion is None or obstacle else np.array(motion.to_reference, np.float64)


def _optional(inputs: Inputs, name: str) -> NDArray[np.float32] | None:
    return read_array(inputs[name]) if name in inputs else None


def _reference_name(inputs: Inputs) -> str:
    return AlignRecord.read(inputs["runs_json"]).reference if "runs_json" in inputs else "scan"


def _read_runs(inputs: Inputs) -> list[Observation]:
    """The runs of ``runs.json``; errors name the run."""
    from brainprior_bids.engine.observation import Observation

    if "runs_json" not in inputs:
        return []
    runs = []
    for run in AlignRecord.read(inputs["runs_json"]).runs:
        files = run.files
        try:
            observation = Observation(
                read_array(files["scan"]),
                grid_of(nib.load(files["scan"])),
                read_acquisition(files["conform"]),
                read_array(files["mask_scan"]),
                log_bias=read_array(files["bias"]),
                hidden=read_array(files["hidden"]) if "hidden" in files else None,
                to_reference=np.array(run.to_reference, np.float64),
                gain=float(run.gain or 1.0),
                name=run.name,
            )
        except BrainpriorError as error:
            if run.name in str(error):
                raise
            raise type(error)(f"{run.name}: {error}") from error
        runs.append(observation)
    return runs


def _trust(inputs: Inputs, grid: Grid) -> float | NDArray[np.float32] | None:
    """SD of the error of an image that is refined alone: a number, a map, or None."""
    if "trust_map" not in inputs:
        return float(inputs["trust"]) if "trust" in inputs else None
    path = Path(inputs["trust_map"])
    sd = nib.as_closest_canonical(open_image(path, f"--trust {path.name}"))
    if sd.shape != grid.shape or not np.allclose(sd.affine, grid.affine, atol=1e-2):
        raise GeometryError(
            f"--trust {path.name}: the map ({sd.shape}) is not on the grid of the image to "
            f"refine ({grid.shape}). Resample it."
        )
    return np.asarray(sd.dataobj, np.float32)


def _read_image(path: Path, trust: float, grid: Grid) -> ImageObservation:
    """Another tool's image on the scan's 1 mm grid; NaN become 0, refused in the brain."""
    from brainprior_bids.engine.observation import ImageObservation

    other = open_image(path, path.name)
    check_placed(other, path.name)
    other = nib.as_closest_canonical(other)
    values = np.asarray(other.dataobj, np.float32)
    if values.ndim != 3:
        raise InputError(f"{path.name}: must be 3-D to be refined, got {values.shape}.")
    values = np.nan_to_num(values, nan=0, posinf=0, neginf=0)
    moved = resample(values, Grid(values.shape, other.affine), grid.one_millimetre())
    return ImageObservation(moved, trust)


def find_warnings(inputs: Inputs, result: Restoration, device_warnings: list[str]) -> list[str]:
    """Warnings about this result, the engine's own first."""
    warnings = [*device_warnings]
    if inputs["contrast"] == "unknown":
        warnings.append(OUTSIDE_TRAINING)
    if inputs.get("n_steps", FEW_STEPS) < FEW_STEPS and result.sampler != "mean":
        warnings.append(
            f"Sampled in {inputs['n_steps']} steps, as with --sloppy: this result is for "
            "testing the program, not for use."
        )
    motion, obstacle = found_motion(inputs)
    if motion is not None:
        warnings.append(treatment(obstacle))
    warnings += result.warnings
    for _, correlation in result.images:
        if correlation < ALIKE:
            warnings.append(
                f"The correlation of the image to refine with the scan is only {correlation:.2f}. "
                "Is it of this participant, in this space, and of this contrast?"
            )
    return warnings


def record_of(
    inputs: Inputs,
    result: Restoration,
    *,
    prior: Prior,
    prior_sha256: str,
    rim_mm: float,
    device: str,
    warnings: list[str],
    changed: ChangedRecord | None,
) -> RestoreRecord:
    """The record of a result for sidecars, quality control, report and methods text."""
    acquisition = read_acquisition(inputs["conform_json"])
    motion, obstacle = found_motion(inputs)
    refined = None
    if result.images:
        gain, correlation = result.images[0]
        refined = RefinedRecord(gain=gain * result.unit, correlation=correlation)
    keys = (
        "name", "licence", "training_data", "format", "version", "coverage", "regional_error"
    )  # fmt: skip
    card = {key: prior.metadata[key] for key in keys if key in prior.metadata}
    coarse = prior.coarse if prior.asked_coarse else None
    return RestoreRecord(
        sampler=result.sampler,
        sampler_reason=result.sampler_reason,
        solve=result.solve,
        contrast=inputs["contrast"],
        n_samples=len(result.samples),
        uncertainty_from=_uncertainty_from(inputs, result),
        seed=inputs["seed"],
        schedule=tuple(result.schedule),
        calls=result.calls,
        tile_mm=prior.tile_mm,
        sample_seeds=tuple(result.seeds),
        slice_widths=tuple(result.thickness_factors),
        inner_iterations=result.inner_iterations,
        rim_mm=rim_mm,
        box=BoxRecord(start=result.box.start, stop=result.box.stop),
        noise_sd_initial=result.noise_sd_initial,
        noise_sd=result.noise_sd,
        residual_ratios=tuple(result.residual_ratios),
        residual_ratios_final=tuple(r.ratio_final for r in result.residuals),
        residual_correlation=tuple(r.correlation for r in result.residuals),
        **_shares(result.log_bias, result.residual_map, read_array(inputs["mask_scan"])),
        unit=result.unit,
        seconds=result.seconds,
        acquisition=AcquisitionRecord.from_json(acquisition.to_dict()),
        environment=_environment(device, int(inputs["num_threads"]), prior),
        prior=WeightsRecord.from_json({**card, "sha256": prior_sha256}),
        coarse=None if coarse is None else WeightsRecord.from_json(coarse.card),
        warnings=tuple(warnings),
        runs=_run_records(inputs, acquisition, result),
        refined=refined,
        changed_share=changed,
        interleaves_corrected=None if motion is None else obstacle is None,
    )


def _uncertainty_from(inputs: Inputs, result: Restoration) -> str | None:
    """Source of the uncertainty map; for a filled-in scan it is the samples."""
    if inputs["keep_scan"]:
        return "samples" if len(result.samples) > 1 else None
    return result.sd_from


def _run_records(
    inputs: Inputs, acquisition: Acquisition, result: Restoration
) -> tuple[RunRecord, ...] | None:
    """Records of all fused runs, the reference first; None if nothing was fused."""
    if "runs_json" not in inputs:
        return None
    table = AlignRecord.read(inputs["runs_json"])
    reference = RunRecord(
        name=table.reference,
        acquisition=AcquisitionRecord.from_json(acquisition.to_dict()),
        to_reference=matrix_rows(np.eye(4)),
        gain=1.0,
    )
    fits = zip((reference, *table.runs), result.scans, strict=True)
    return tuple(
        replace(
            run,
            files={},
            hashes={},
            noise_sd=fit.noise_sd,
            residual_ratios=tuple(residual.ratio for residual in fit.residuals),
        )
        for run, fit in fits
    )


def write_images(
    inputs: Inputs, result: Restoration, folder: Path
) -> tuple[dict[str, Any], ChangedRecord | None]:
    """Outputs of the node, and the share of voxels that changed if the scan was kept.

    With ``keep_scan`` the image is the scan with its hidden voxels filled in: every other voxel
    is the scan's own, bit for bit.
    """
    from brainprior_bids.engine.result import sample_sd  # and torch

    grid = grid_of(nib.load(inputs["in_file"]))
    outputs: dict[str, Any] = {
        "restored": save(result.mean, result.grid, folder / "restored.nii.gz"),
        "log_bias": save(result.log_bias, grid, folder / "log_bias.nii.gz"),
        "residual": save(result.residual_map, grid, folder / "residual.nii.gz"),
    }
    image, sd, samples, target, changed = result.mean, result.sd, result.samples, result.grid, None
    if inputs["keep_scan"]:
        assert result.predictions is not None
        hidden, scan = read_array(inputs["hidden"]) > 0, read_array(inputs["in_file"])
        image, *filled = np.where(hidden, result.predictions, scan).astype(np.float32)
        samples, target = np.array(filled, np.float32), grid
        sd = sample_sd(samples, hidden, grid.spacing_mm) if len(samples) > 1 else None
        changed = _changed(image, scan, hidden)
        outputs["image"] = save(image, target, folder / "image.nii.gz")
    else:
        outputs["image"] = outputs["restored"]
    if inputs["native"]:
        # the prediction of a voxel that is partly outside the brain lacks the rest of the head
        assert result.predictions is not None
        inside, scan = read_array(inputs["mask_scan"]) > ENTIRELY, read_array(inputs["in_file"])
        native = np.where(inside, result.predictions[0], scan)
        changed = _changed(native, scan, inside)
        outputs["restored_native"] = save(native, grid, folder / "native.nii.gz")
    if sd is not None:
        outputs["uncertainty"] = save(
            np.asarray(sd, np.float32), target, folder / "uncertainty.nii.gz"
        )
    if inputs["save_samples"] and len(samples):
        outputs["samples"] = [
            save(sample, target, folder / f"{sample_role(index)}.nii.gz")
            for index, sample in enumerate(samples)
        ]
    if "runs_json" in inputs:
        outputs["run_residuals"] = [
            save(
                fit.residual_map,
                grid_of(nib.load(run.files["scan"])),
                folder / f"{run.name}_residual.nii.gz",
            )
            for run, fit in zip(
                AlignRecord.read(inputs["runs_json"]).runs, result.scans[1:], strict=True
            )
        ]
    return outputs, changed


def progress_writer(path: Path, n_samples: int) -> Callable[[int, int, float, int], None]:
    """An observer that writes every step to ``path``, where the command reads it."""

    def observe(step: int, total: int, sigma: float, sample: int) -> None:
        record = ProgressRecord(sample=sample + 1, samples=n_samples, step=step + 1, steps=total)
        write_json(path, record.to_json())

    return observe


def _environment(device: str, threads: int, prior: Prior) -> EnvironmentRecord:
    """Further facts on which the bytes of a result depend: processor, torch, CUDA, determinism."""
    import torch

    facts: dict[str, Any] = {
        "device": device,
        "threads": threads,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "network_dtype": str(prior.dtype).removeprefix("torch."),
    }
    if device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(device).total_memory
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_gb"] = round(memory / 2**30)
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["cudnn_deterministic"] = torch.backends.cudnn.deterministic
        facts["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return EnvironmentRecord.from_json(facts)


def _changed(
    image: NDArray[np.float32], scan: NDArray[np.float32], inside: NDArray[np.bool_]
) -> ChangedRecord:
    """Share of the voxels of a scan that have changed, inside and outside of a mask."""
    changed = image != scan
    shares = {
        region: round(float(changed[part].mean()), 6) if part.any() else None
        for region, part in (("inside", inside), ("outside", ~inside))
    }
    return ChangedRecord(**shares)


def _shares(
    log_bias: NDArray[np.float32], residual: NDArray[np.float32], mask_scan: NDArray[np.float32]
) -> dict[str, float | None]:
    """Range of the bias field, and the share of voxels with a large residual, in the brain.

    ``bias_range`` is the 99th over the 1st percentile of the field, ``share_beyond_3_sd`` the
    share of voxels whose residual exceeds three SDs of the noise.
    """
    inside = (mask_scan > 0.95) & (residual != 0)  # the map is 0 in voxels that were not compared
    if not inside.any():
        return {"bias_range": None, "share_beyond_3_sd": None}
    low, high = np.percentile(log_bias[inside], (1, 99))
    return {
        "bias_range": round(float(np.exp(high - low)), 4),
        "share_beyond_3_sd": round(float((np.abs(residual[inside]) > 3).mean()), 5),
    }
