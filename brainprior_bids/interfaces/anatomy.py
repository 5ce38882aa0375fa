# SPDX-License-Identifier: Apache-2.0
"""Interfaces to ``brainprior_bids.anatomy``: files in the node's folder <-> arrays."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nipype.interfaces.base import File, isdefined, traits

from brainprior_bids.bids.files import read_json, write_json
from brainprior_bids.engine.acquisition import PLANES
from brainprior_bids.engine.errors import AnatomyError, InputError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.interfaces.base import (
    MeasuredInputSpec,
    MeasuredInterface,
    MeasuredOutputSpec,
)
from brainprior_bids.settings import PARCELLATIONS, SKULL_STRIPS

ENDS = ("left", "back", "bottom")
"""Where closest-canonical axes begin."""


def grid_of(image: nib.Nifti1Image) -> Grid:
    """The grid of a conformed image."""
    return Grid(image.shape[:3], image.affine)


def save(array: np.ndarray, grid: Grid, path: Path) -> str:
    """Write an array on a grid as NIfTI: its own dtype, slope 1, sform and qform alike."""
    image = nib.Nifti1Image(array, np.array(grid.affine))
    image.set_sform(grid.affine, 1)
    image.set_qform(grid.affine, 1)
    image.header.set_slope_inter(1, 0)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return str(path)


class _ConformInputSpec(MeasuredInputSpec):
    in_file = File(mandatory=True, desc="a raw T1w, T2w or FLAIR")
    metadata = traits.Dict({}, usedefault=True, desc="of its sidecars, inheritance applied")
    slice_thickness = traits.Range(
        low=0.0, exclude_low=True, desc="mm; overrides the sidecars' SliceThickness"
    )
    slice_plane = traits.Enum(*PLANES, desc="overrides header and sidecars")


class _ConformOutputSpec(MeasuredOutputSpec):
    out_file = File(desc="the scan on closest-canonical axes, float32, scanner units")
    conform_json = File(desc="facts about the header, and the slice geometry")


class Conform(MeasuredInterface):
    """Check the header, the geometry and the values; turn the axes to RAS; resample nothing."""

    input_spec = _ConformInputSpec
    output_spec = _ConformOutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.conform import conform

        thickness, plane = self.inputs.slice_thickness, self.inputs.slice_plane
        done = conform(
            Path(self.inputs.in_file),
            metadata=self.inputs.metadata,
            slice_thickness_mm=float(thickness) if isdefined(thickness) else None,
            slice_axis=PLANES.index(plane) if isdefined(plane) else None,
        )
        out_file = folder / "scan.nii.gz"
        nib.save(done.image, out_file)
        conform_json = write_json(
            folder / "conform.json",
            {
                "acquisition": done.acquisition.to_dict(),
                "facts": done.facts,
                "warnings": done.warnings,
            },
        )
        self._results.update(out_file=str(out_file), conform_json=str(conform_json))
        return done.warnings


class _ParcellateInputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the conformed scan")
    conform_json = File(exists=True, desc="of Conform; with it the slices are compared")
    weights = File(exists=True, mandatory=True, desc="weights of the parcellation network")
    device = traits.Str("cpu", usedefault=True, nohash=True)
    skull_strip = traits.Enum(*SKULL_STRIPS, usedefault=True, desc="where the mask comes from")
    parcellation = traits.Enum(*PARCELLATIONS, usedefault=True, desc="where the labels come from")
    mask_file = File(exists=True, desc="brain mask in the scan's space, for skull_strip=mask")
    dseg_file = File(exists=True, desc="FreeSurfer labels, for parcellation=derivatives")
    mask_uri = traits.Str(desc="what the records call mask_file")
    dseg_uri = traits.Str(desc="what the records call dseg_file")
    synthstrip_model = File(exists=True, desc="weights of SynthStrip")


class _ParcellateOutputSpec(MeasuredOutputSpec):
    structures = File(desc="label image on the 1 mm grid, FreeSurfer values, int16")
    mask = File(desc="brain on the 1 mm grid, uint8")
    mask_scan = File(desc="share of each scan voxel inside the brain, float32")
    structures_json = File(desc="table of structures, and what made mask and labels")


class Parcellate(MeasuredInterface):
    """Brain mask and structures: the embedded network's, another program's, or given ones."""

    input_spec = _ParcellateInputSpec
    output_spec = _ParcellateOutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy import external
        from brainprior_bids.anatomy.parcellation import parcellate
        from brainprior_bids.engine.weights import load_parcellation, sha256_file

        image = nib.load(self.inputs.in_file)
        scan_grid = grid_of(image)
        grid = scan_grid.one_millimetre()
        facts: dict[str, Any] = {"mask_source": "embedded", "structures_source": "embedded"}
        warnings: list[str] = []
        found = None
        weights = Path(self.inputs.weights)
        network = load_parcellation(weights, device=self.inputs.device)
        facts["weights"] = {
            "name": network.metadata.get("name"),
            "licence": network.metadata.get("licence"),
            "training_data": network.metadata.get("training_data"),
            "sha256": sha256_file(weights),
        }
        needed = "embedded" in (self.inputs.skull_strip, self.inputs.parcellation)
        try:
            found = parcellate(image, network=network, restored_grid=grid)
            warnings += found.warnings
        except AnatomyError as error:
            if needed:
                raise
            warnings.append(
                "The given mask could not be compared with the embedded network's, which found "
                f"no brain: {error}"
            )
        network_mask = None if found is None else found.mask > 0
        mask, mask_warnings = self._mask(folder, image, grid, network_mask, found, facts)
        labels = self._labels(folder, grid, facts)
        warnings += mask_warnings
        if mask is not None and network_mask is not None:
            facts["mask_agreement"] = external.dice(mask, network_mask)
        if mask is not None or labels is not None:
            if mask is None:
                mask = network_mask
            known = {} if found is None else {r["index"]: r["confidence"] for r in found.table}
            if labels is None:
                labels = found.structures
            else:
                known = {}
            found = external.assemble(labels, mask, known, scan_grid=scan_grid, restored_grid=grid)
        if isdefined(self.inputs.conform_json):
            warnings += self._slices(image, found.mask_scan, facts)
        structures_json = write_json(
            folder / "structures.json",
            {"table": found.table, "warnings": warnings, **facts},
        )
        self._results.update(
            structures=save(
                np.asarray(found.structures, np.int16), grid, folder / "structures.nii.gz"
            ),
            mask=save(np.asarray(found.mask, np.uint8), grid, folder / "mask.nii.gz"),
            mask_scan=save(
                np.asarray(found.mask_scan, np.float32), scan_grid, folder / "mask_scan.nii.gz"
            ),
            structures_json=str(structures_json),
        )
        return warnings

    def _mask(
        self,
        folder: Path,
        image: nib.Nifti1Image,
        grid: Grid,
        network_mask: np.ndarray | None,
        found: Any,
        facts: dict[str, Any],
    ) -> tuple[np.ndarray | None, list[str]]:
        """The mask on ``grid`` where it is not the network's, and warnings."""
        from brainprior_bids.anatomy import external
        from brainprior_bids.anatomy.spaces import resample

        how, warnings = self.inputs.skull_strip, []
        edge = None
        if how == "embedded":
            edge = external.stripped_edge(image, found.mask_scan)
            if edge is None:
                return None, []
            facts["mask_source"] = "the scan's own edge: it is already skull-stripped"
            warnings.append("The scan is already skull-stripped: its own edge is the mask.")
        elif how == "skip":
            edge, empty = external.own_edge(image)
            facts["mask_source"] = "the scan's own edge (--skull-strip skip)"
            if empty < 0.9:
                warnings.append(
                    "--skull-strip skip, but the background is not empty: the scan does not look "
                    "skull-stripped, and all of the head is taken for brain."
                )
        if edge is not None:
            mask = resample(edge, grid_of(image), grid, order=1) >= 0.5
        elif how == "mask":
            facts["mask_source"] = self._given("mask", facts)
            mask = external.mask_from_file(Path(self.inputs.mask_file), grid, name="Skull-strip")
        else:
            model = self.inputs.synthstrip_model
            target = folder / "synthstrip_mask.nii.gz"
            command = external.synthstrip_command(
                Path(self.inputs.in_file),
                target,
                model=Path(model) if isdefined(model) else None,
                threads=int(self.inputs.num_threads),
                cuda=self.inputs.device.startswith("cuda"),
            )
            facts["synthstrip"] = external.run_program(command, target)
            mask = external.mask_from_file(target, grid, name="SynthStrip")
            facts["mask_source"] = "SynthStrip"
        mask, more = external.checked_mask(
            mask, grid, source=facts["mask_source"], network_mask=network_mask
        )
        return mask, [*warnings, *more]

    def _labels(self, folder: Path, grid: Grid, facts: dict[str, Any]) -> np.ndarray | None:
        """Labels on ``grid`` where they are not the network's."""
        from brainprior_bids.anatomy import external

        if self.inputs.parcellation == "embedded":
            return None
        if self.inputs.parcellation == "derivatives":
            facts["structures_source"] = self._given("dseg", facts)
            path = Path(self.inputs.dseg_file)
        else:
            path = folder / "synthseg.nii.gz"
            command = external.synthseg_command(
                Path(self.inputs.in_file),
                path,
                threads=int(self.inputs.num_threads),
                cuda=self.inputs.device.startswith("cuda"),
            )
            facts["synthseg"] = external.run_program(command, path)
            facts["structures_source"] = "SynthSeg"
        return external.labels_from_file(path, grid, name="Parcellation")

    def _slices(
        self, image: nib.Nifti1Image, mask_scan: np.ndarray, facts: dict[str, Any]
    ) -> list[str]:
        """Note how the slices fit together; warnings where one is lost or they do not."""
        from brainprior_bids.anatomy.slices import slice_fit
        from brainprior_bids.bids.qc import METRICS

        axis = int(read_json(Path(self.inputs.conform_json))["acquisition"]["slice_axis"])
        fit = slice_fit(image, mask_scan, axis=axis)
        if fit is None:
            return []
        facts["slices"] = asdict(fit)
        warnings = []
        if fit.faintest < (METRICS["faintest_slice"].low or 0):
            warnings.append(
                f"Slice {fit.faintest_slice + 1} of {image.shape[axis]} ({PLANES[axis]}, counted "
                f"from the {ENDS[axis]}) has {100 * fit.faintest:.0f} % of its neighbours' "
                "brightness: lost signal is restored as if it were the brain's."
            )
        if fit.mismatch > (METRICS["slice_mismatch"].high or np.inf):
            warnings.append(
                f"Neighbouring slices do not fit together (mismatch {fit.mismatch:.2f}, usual is "
                "0.4 to 0.6): motion between slices, another brightness of every second one, or a "
                "lost slice. The result keeps what they show."
            )
        return warnings

    def _given(self, role: str, facts: dict[str, Any]) -> str:
        """Note a file of another data set in the facts; its name there."""
        from brainprior_bids.bids.provenance import sha256_file

        path, uri = getattr(self.inputs, f"{role}_file"), getattr(self.inputs, f"{role}_uri")
        if not isdefined(path):
            raise InputError(f"Parcellate: expected {role}_file for this setting, got none.")
        name = uri if isdefined(uri) else Path(path).name
        facts.setdefault("given", {})[role] = {"uri": name, "sha256": sha256_file(Path(path))}
        return name


class _N4InputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the conformed scan")
    mask_scan = File(exists=True, mandatory=True, desc="brain on the scan's grid, in [0, 1]")


class _N4OutputSpec(MeasuredOutputSpec):
    log_bias = File(desc="natural log of the bias field on the scan's grid, mean 0 in the mask")


class N4(MeasuredInterface):
    """Estimate the bias field inside the brain (N4); it only starts the engine's own."""

    input_spec = _N4InputSpec
    output_spec = _N4OutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.bias import n4

        image = nib.load(self.inputs.in_file)
        mask = np.asarray(nib.load(self.inputs.mask_scan).dataobj, np.float32)
        log_bias = np.asarray(n4(image, mask, threads=int(self.inputs.num_threads)), np.float32)
        self._results["log_bias"] = save(log_bias, grid_of(image), folder / "log_bias.nii.gz")
        return []


class _CentroidAffineInputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the conformed scan")
    mask = File(exists=True, mandatory=True, desc="brain on the 1 mm grid")
    structures_json = File(exists=True, mandatory=True, desc="table of structures")


class _CentroidAffineOutputSpec(MeasuredOutputSpec):
    affine_json = File(desc="matrix scanner RAS mm -> MNI305 RAS mm, and its residuals")
    to_mni305 = File(desc="ITK text: resamples the scan into MNI305")
    from_mni305 = File(desc="ITK text: resamples MNI305 into the scan's space")


class CentroidAffine(MeasuredInterface):
    """Fit structures and the brain's reach to those of MNI305; the template where they fail."""

    input_spec = _CentroidAffineInputSpec
    output_spec = _CentroidAffineOutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.hull import surface
        from brainprior_bids.anatomy.rescue import find_affine, template_folder
        from brainprior_bids.anatomy.spaces import write_itk_affine

        mask = nib.load(self.inputs.mask)
        fit = find_affine(
            read_json(Path(self.inputs.structures_json))["table"],
            surface(np.asarray(mask.dataobj) > 0, grid_of(mask)),
            image=nib.load(self.inputs.in_file),
            mask=mask,
            templates=template_folder(),
        )
        matrix = np.asarray(fit.matrix, np.float64)
        affine_json = write_json(
            folder / "affine.json",
            {
                "matrix": matrix,
                "method": fit.method,
                "dof": fit.dof,
                "residuals_mm": fit.residuals_mm,
                "median_residual_mm": fit.median_residual_mm,
                "hull_residual_mm": fit.hull_residual_mm,
                "used": fit.used,
                "warnings": fit.warnings,
            },
        )
        forward, inverse = folder / "to_mni305.txt", folder / "from_mni305.txt"
        write_itk_affine(forward, matrix)
        write_itk_affine(inverse, np.linalg.inv(matrix))
        self._results.update(
            affine_json=str(affine_json), to_mni305=str(forward), from_mni305=str(inverse)
        )
        return list(fit.warnings)


class _ToMNI305InputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="an image in the scan's space")
    affine_json = File(exists=True, mandatory=True, desc="of CentroidAffine")


class _ToMNI305OutputSpec(MeasuredOutputSpec):
    out_file = File(desc="the image on the 1 mm MNI305 grid")


class ToMNI305(MeasuredInterface):
    """Resample once, through the affine, onto the 1 mm MNI305 grid."""

    input_spec = _ToMNI305InputSpec
    output_spec = _ToMNI305OutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.spaces import to_mni305

        matrix = np.array(read_json(Path(self.inputs.affine_json))["matrix"], np.float64)
        if matrix.shape != (4, 4):
            raise InputError(
                f"ToMNI305: expected a 4 x 4 matrix in {self.inputs.affine_json}, got "
                f"{matrix.shape}. Remove the work folder and run again."
            )
        out_file = folder / "restored_mni305.nii.gz"
        nib.save(to_mni305(nib.load(self.inputs.in_file), matrix), out_file)
        self._results["out_file"] = str(out_file)
        return []
