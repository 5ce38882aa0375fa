# SPDX-License-Identifier: Apache-2.0
"""Interface to ``brainprior_bids.engine.restore``; the graph's only GPU node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import nibabel as nib
import numpy as np
from nipype.interfaces.base import File, OutputMultiPath, isdefined, traits

from brainprior_bids.anatomy.spaces import check_placed, resample
from brainprior_bids.bids.files import read_json, write_json
from brainprior_bids.bids.names import sample_role
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import GeometryError, InputError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.interfaces.base import (
    MeasuredInputSpec,
    MeasuredInterface,
    MeasuredOutputSpec,
)
from brainprior_bids.interfaces.files import grid_of, save, write_record
from brainprior_bids.records import (
    AcquisitionRecord,
    BoxRecord,
    ChangedRecord,
    EnvironmentRecord,
    RefinedRecord,
    RestoreRecord,
    RunRecord,
    WeightsRecord,
)

if TYPE_CHECKING:
    from brainprior_bids.engine.restore import PriorLike, Restoration

ALIKE = 0.7
"""A refined image that correlates less with the scan, inside the brain, is doubtful."""
PROGRESS = "progress.json"
"""In the node's folder while it runs: ``sample`` of ``samples``, ``step`` of ``steps``."""


OUTSIDE_TRAINING = (
    "The prior was not trained on this contrast (its class is 'unknown'): less is known of how "
    "well it does, and the uncertainty map is not calibrated for it."
)


FEW_STEPS = 5
"""With fewer noise levels nothing was measured of how good the result is (docs/evaluation.md)."""

WHOLLY = 0.999
"""A voxel of the scan with this share of brain is brain alone."""


class Common(TypedDict):
    """What ``restore`` and ``fuse`` are both told."""

    mask_1mm: np.ndarray
    to_mni305: np.ndarray
    contrast: str
    prior: PriorLike
    rim_mm: float
    sampler: str
    n_samples: int
    n_steps: int
    seed: int
    device: str
    observe: Callable[[int, int, float, int], None]


class _RestoreInputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the conformed scan, bias and skull included")
    conform_json = File(exists=True, mandatory=True, desc="slice geometry, of Conform")
    mask = File(exists=True, mandatory=True, desc="brain on the 1 mm grid")
    mask_scan = File(exists=True, mandatory=True, desc="brain on the scan's grid, in [0, 1]")
    log_bias = File(exists=True, desc="of N4, to start from; without it there is no bias field")
    trust = traits.Range(
        low=0.0, exclude_low=True, desc="SD of the error of the image to refine, engine unit"
    )
    trust_map = File(exists=True, desc="the same for each voxel of the image to refine")
    runs_json = File(exists=True, desc="of Align: other runs to be fused with in_file")
    refined = File(
        exists=True, desc="the image to refine, beside in_file; without it in_file is that image"
    )
    affine_json = File(
        exists=True, mandatory=True, desc="scanner RAS -> MNI305, of CentroidAffine"
    )
    prior = File(exists=True, mandatory=True, desc="weights of the prior")
    contrast = traits.Enum("T1w", "T2w", "FLAIR", "unknown", mandatory=True)
    sampler = traits.Enum("auto", "eps", "exact", "daps", "map", usedefault=True)
    n_samples = traits.Range(low=1, value=4, usedefault=True)
    n_steps = traits.Range(low=1, value=20, usedefault=True, desc="noise levels")
    seed = traits.Range(low=0, high=2**63 - 1, value=0, usedefault=True)
    device = traits.Str(
        "cpu", usedefault=True, nohash=True, desc="cpu, cuda:N, or auto: decided here"
    )
    use_gpu = traits.Bool(
        False, usedefault=True, nohash=True, desc="makes this a GPU node for Nipype's scheduler"
    )
    tile_mm = traits.Range(low=4, nohash=True, desc="the network's slabs; else whole volumes")
    hidden = File(exists=True, desc="1 where the scan is not believed, on its grid")
    keep_scan = traits.Bool(
        False, usedefault=True, desc="leave the scan with its hidden voxels filled in"
    )
    native = traits.Bool(
        False, usedefault=True, desc="leave the whole head on the scan's grid too"
    )
    save_samples = traits.Bool(False, usedefault=True, desc="leave every sample as an image")


class _RestoreOutputSpec(MeasuredOutputSpec):
    image = File(desc="the result: restored, or with keep_scan the filled scan on its grid")
    restored_native = File(desc="with native: the scan, its brain as the result predicts it")
    restored = File(desc="mean of the samples on the 1 mm grid, scanner units")
    uncertainty = File(desc="SD of the samples, same grid and units; with 2 samples or more")
    log_bias = File(desc="natural log of the bias field found, on the scan's grid")
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
        from brainprior_bids.engine.restore import RIM_MM, restore
        from brainprior_bids.engine.samplers.daps import DapsSettings
        from brainprior_bids.engine.weights import load_prior, sha256_file

        image = nib.load(self.inputs.in_file)
        grid = grid_of(image)
        prior_path = Path(self.inputs.prior)
        device, why, doubtful = choose_device(self.inputs.device)
        warnings = [f"restored on the CPU: {why}"] if doubtful else []
        prior = load_prior(
            prior_path,
            device=device,
            tile_mm=self.inputs.tile_mm if isdefined(self.inputs.tile_mm) else None,
        )
        acquisition = Acquisition.from_dict(
            read_json(Path(self.inputs.conform_json))["acquisition"]
        )
        common = Common(
            mask_1mm=_array(self.inputs.mask),
            to_mni305=np.array(read_json(Path(self.inputs.affine_json))["matrix"], np.float64),
            contrast=self.inputs.contrast,
            prior=prior,
            rim_mm=RIM_MM,
            sampler=self.inputs.sampler,
            n_samples=self.inputs.n_samples,
            n_steps=self.inputs.n_steps,
            seed=self.inputs.seed,
            device=device,
            observe=progress(folder / PROGRESS, self.inputs.n_samples),
        )
        runs: list[dict[str, Any]] = []
        if isdefined(self.inputs.runs_json):
            done, runs = self._fuse(acquisition, common, folder)
        else:
            done = restore(
                np.asarray(image.dataobj, np.float32),
                grid=grid,
                acquisition=acquisition,
                mask=_array(self.inputs.mask_scan),
                log_bias=_array(self.inputs.log_bias) if isdefined(self.inputs.log_bias) else None,
                hidden=_array(self.inputs.hidden) if isdefined(self.inputs.hidden) else None,
                on_scan=self.inputs.native,
                daps=DapsSettings(n_levels=self.inputs.n_steps),
                **self._trusted(grid),
                **common,
            )
        if self.inputs.contrast == "unknown":
            warnings.append(OUTSIDE_TRAINING)
        if self.inputs.n_steps < FEW_STEPS:
            warnings.append(
                f"Sampled in {self.inputs.n_steps} steps, as with --sloppy: this result is for "
                "testing the program, not for use."
            )
        refined = changed = None
        if done.anchor is not None:
            gain, correlation = done.anchor
            refined = RefinedRecord(gain=gain * done.unit, correlation=correlation)
            if correlation < ALIKE:
                warnings.append(
                    f"The image to refine and the scan correlate by {correlation:.2f} only: is it "
                    "of this person, in this space, and of this contrast?"
                )
        self._results.update(
            restored=save(
                np.asarray(done.mean, np.float32), done.grid, folder / "restored.nii.gz"
            ),
            log_bias=save(np.asarray(done.log_bias, np.float32), grid, folder / "log_bias.nii.gz"),
            residual=save(done.residual_map, grid, folder / "residual.nii.gz"),
        )
        image, sd, samples, target = done.mean, done.sd, done.samples, done.grid
        if self.inputs.keep_scan:
            # every voxel outside the mask is the scan's own, bit for bit
            assert done.predictions is not None
            here = _array(self.inputs.hidden) > 0
            scan = _array(self.inputs.in_file)
            image, *filled = np.where(here, done.predictions, scan).astype(np.float32)
            changed = _changed(image, scan, here)
            samples, target = np.stack(filled), grid
            sd = samples.std(0, ddof=1) if len(samples) > 1 else None
        if self.inputs.native:
            # partly outside the brain, a voxel's prediction lacks the rest of the head
            assert done.predictions is not None
            whole = _array(self.inputs.mask_scan) > WHOLLY
            scan = _array(self.inputs.in_file)
            native = np.where(whole, done.predictions[0], scan)
            changed = _changed(native, scan, whole)
            self._results["restored_native"] = save(native, grid, folder / "native.nii.gz")
        record = RestoreRecord(
            sampler=done.sampler,
            sampler_reason=done.not_eps,
            contrast=self.inputs.contrast,
            n_samples=self.inputs.n_samples,
            seed=self.inputs.seed,
            schedule=tuple(done.schedule),
            calls=done.calls,
            tile_mm=prior.tile_mm,
            sample_seeds=tuple(done.seeds),
            slice_widths=tuple(done.widths),
            inner_iterations=done.inner_iterations,
            rim_mm=RIM_MM,
            box=BoxRecord(start=done.box.start, stop=done.box.stop),
            noise_sd_initial=done.noise_sd_initial,
            noise_sd=done.noise_sd,
            residual_ratios=tuple(done.residual_ratios),
            residual_ratios_final=tuple(r.ratio_final for r in done.residuals),
            residual_correlation=tuple(r.correlation for r in done.residuals),
            **_shares(done.log_bias, done.residual_map, _array(self.inputs.mask_scan)),
            unit=done.unit,
            seconds=done.seconds,
            acquisition=AcquisitionRecord.from_json(acquisition.to_dict()),
            environment=EnvironmentRecord(
                **environment(device, self.inputs.num_threads),
                network_dtype=str(prior.dtype).removeprefix("torch."),
            ),
            prior=WeightsRecord(**_card(prior.metadata), sha256=sha256_file(prior_path)),
            warnings=(*warnings, *done.warnings),
            runs=tuple(RunRecord.from_json(run) for run in runs) or None,
            refined=refined,
            changed_share=changed,
        )
        self._results["restore_json"] = write_record(record, folder / "restore.json")
        if self.inputs.save_samples:
            self._results["samples"] = [
                save(sample, target, folder / f"{sample_role(index)}.nii.gz")
                for index, sample in enumerate(samples)
            ]
        self._results["image"] = (
            save(image, target, folder / "image.nii.gz")
            if self.inputs.keep_scan
            else self._results["restored"]
        )
        if sd is not None:
            self._results["uncertainty"] = save(
                np.asarray(sd, np.float32), target, folder / "uncertainty.nii.gz"
            )
        return [*warnings, *done.warnings]

    def _fuse(
        self, acquisition: Acquisition, common: Common, folder: Path
    ) -> tuple[Restoration, list[dict[str, Any]]]:
        """The result of all runs, and what was found of each, the reference first.

        The residuals of the others go into ``folder``.
        """
        from brainprior_bids.engine.fusion import Run, fuse

        told = read_json(Path(self.inputs.runs_json))
        first = {
            "name": told["reference"],
            "acquisition": acquisition.to_dict(),
            "to_reference": np.eye(4).tolist(),
            "gain": 1.0,
        }
        files = {
            "scan": self.inputs.in_file,
            "mask_scan": self.inputs.mask_scan,
            "bias": self.inputs.log_bias,
        }
        every = [{**first, "files": files}, *told["runs"]]
        done, found = fuse(
            [
                Run(
                    run["name"],
                    _array(run["files"]["scan"]),
                    grid_of(nib.load(run["files"]["scan"])),
                    Acquisition.from_dict(run["acquisition"]),
                    _array(run["files"]["mask_scan"]),
                    _array(run["files"]["bias"]),
                    np.array(run["to_reference"], np.float64),
                    float(run["gain"]),
                )
                for run in every
            ],
            **common,
        )
        self._results["run_residuals"] = [
            save(
                explained.residual_map,
                grid_of(nib.load(run["files"]["scan"])),
                folder / f"{run['name']}_residual.nii.gz",
            )
            for run, explained in zip(every[1:], found[1:], strict=True)
        ]
        facts = [
            {
                **{key: value for key, value in run.items() if key not in ("files", "hashes")},
                "noise_sd": explained.noise_sd,
                "residual_ratios": [r.ratio for r in explained.residuals],
            }
            for run, explained in zip(every, found, strict=True)
        ]
        return done, facts

    def _trusted(self, grid: Grid) -> dict[str, Any]:
        """What ``restore`` is told of the image to refine and of its error."""
        inputs = self.inputs
        trust = inputs.trust if isdefined(inputs.trust) else None
        if isdefined(inputs.trust_map):
            sd = nib.as_closest_canonical(nib.load(inputs.trust_map))
            if sd.shape != grid.shape or not np.allclose(sd.affine, grid.affine, atol=1e-2):
                raise GeometryError(
                    f"--trust {Path(inputs.trust_map).name}: the map ({sd.shape}) does not lie on "
                    f"the grid of the image to refine ({grid.shape}). Resample it."
                )
            return {"noise_sd": np.asarray(sd.dataobj, np.float32)}
        if not isdefined(inputs.refined):
            return {"noise_sd": trust}
        name = Path(inputs.refined).name
        other = nib.load(inputs.refined)
        check_placed(other, name)
        other = nib.as_closest_canonical(other)
        values = np.asarray(other.dataobj, np.float32)
        if values.ndim != 3:
            raise InputError(f"{name}: must be 3-D to be refined, got {values.shape}.")
        values = np.nan_to_num(values, nan=0, posinf=0, neginf=0)  # 0 in the brain is refused
        fine = grid.one_millimetre()
        moved = resample(values, Grid(values.shape, other.affine), fine)
        return {"anchor": moved, "anchor_sd": trust}


def progress(path: Path, n_samples: int) -> Callable[[int, int, float, int], None]:
    """An observer that writes every step to ``path``; the command reads it there and says it."""

    def observe(step: int, total: int, sigma: float, sample: int) -> None:
        write_json(
            path,
            {"sample": sample + 1, "samples": n_samples, "step": step + 1, "steps": total},
        )

    return observe


def environment(device: str, threads: int) -> dict[str, Any]:
    """What else the bytes of a result depend on: processor, torch, CUDA, determinism."""
    import platform

    import torch

    facts: dict[str, Any] = {
        "device": device,
        "threads": threads,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_gb"] = round(
            torch.cuda.get_device_properties(device).total_memory / 2**30
        )
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["cudnn_deterministic"] = torch.backends.cudnn.deterministic
        facts["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return facts


def _changed(image: np.ndarray, scan: np.ndarray, inside: np.ndarray) -> ChangedRecord:
    """Share of the voxels of a scan that are not as they were, inside and outside of a mask."""
    changed = image != scan
    shares = {
        where: round(float(changed[part].mean()), 6) if part.any() else None
        for where, part in (("inside", inside), ("outside", ~inside))
    }
    return ChangedRecord(**shares)


def _shares(
    log_bias: np.ndarray, residual: np.ndarray, mask_scan: np.ndarray
) -> dict[str, float | None]:
    """Range of the bias field, and the share of voxels that are not explained, in the brain.

    ``bias_range`` is the 99th over the 1st percentile of the field, ``share_beyond_3_sd`` the
    share of voxels whose residual exceeds three SDs of the noise.
    """
    inside = (mask_scan > 0.95) & (residual != 0)  # the map is 0 where nothing was compared
    if not inside.any():
        return {"bias_range": None, "share_beyond_3_sd": None}
    low, high = np.percentile(log_bias[inside], (1, 99))
    return {
        "bias_range": round(float(np.exp(high - low)), 4),
        "share_beyond_3_sd": round(float((np.abs(residual[inside]) > 3).mean()), 5),
    }


def _card(metadata: dict[str, Any]) -> dict[str, Any]:
    keys = ("name", "licence", "training_data", "format", "version", "coverage")
    return {key: metadata[key] for key in keys if key in metadata}


def _array(path: str) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj, np.float32)
