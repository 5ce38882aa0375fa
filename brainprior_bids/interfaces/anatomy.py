# SPDX-License-Identifier: Apache-2.0
"""Nodes of ``brainprior_bids.anatomy``: each is a specification and one call of a function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nipype.interfaces.base import File, InputMultiPath, OutputMultiPath, isdefined, traits

from brainprior_bids.bids.names import sample_role
from brainprior_bids.engine.grids import MNI305, PLANES
from brainprior_bids.interfaces import files
from brainprior_bids.interfaces.base import (
    MeasuredInputSpec,
    MeasuredInterface,
    MeasuredOutputSpec,
)
from brainprior_bids.interfaces.files import given, grid_of, read_array
from brainprior_bids.settings import PARCELLATIONS, SKULL_STRIPS

if TYPE_CHECKING:
    from brainprior_bids.anatomy.brain import BrainSources


def conform_options(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``anatomy.prepare.conform_scan`` from Conform's inputs that are set."""
    thickness, plane = inputs.get("slice_thickness"), inputs.get("slice_plane")
    resolution = inputs.get("effective_resolution", "auto")
    if resolution not in ("auto", "off"):
        resolution = tuple(float(size) for size in resolution.split(","))
    return {
        "metadata": inputs.get("metadata", {}),
        "slice_thickness_mm": None if thickness is None else float(thickness),
        "slice_axis": None if plane is None else PLANES.index(plane),
        "effective_resolution": resolution,
    }


def brain_sources(inputs: Mapping[str, Any]) -> BrainSources:
    """``anatomy.brain.BrainSources`` from Parcellate's inputs that are set."""
    from brainprior_bids.anatomy.brain import BrainSources, SuppliedFile

    supplied = {
        role: SuppliedFile(Path(inputs[f"{role}_file"]), inputs.get(f"{role}_uri"))
        for role in ("mask", "dseg")
        if f"{role}_file" in inputs
    }
    model = inputs.get("synthstrip_model")
    return BrainSources(
        skull_strip=inputs.get("skull_strip", "embedded"),
        parcellation=inputs.get("parcellation", "embedded"),
        synthstrip_model=None if model is None else Path(model),
        **supplied,
    )


class _ConformInputSpec(MeasuredInputSpec):
    in_file = File(mandatory=True, desc="a raw T1w, T2w or FLAIR")
    metadata = traits.Dict({}, usedefault=True, desc="metadata of its sidecars, with inheritance")
    warnings = traits.List(traits.Str, desc="corrections that were needed to read the sidecars")
    slice_thickness = traits.Range(
        low=0.0, exclude_low=True, desc="in mm; overrides SliceThickness of the sidecars"
    )
    slice_plane = traits.Enum(*PLANES, desc="overrides header and sidecars")
    effective_resolution = traits.Str(
        "auto", usedefault=True, desc="auto, off, or measured voxel sizes in mm: 0,0,5"
    )


class _ConformOutputSpec(MeasuredOutputSpec):
    out_file = File(desc="the scan on closest-canonical axes, float32, scanner units")
    conform_json = File(desc="facts about the header, and the slice geometry")


class Conform(MeasuredInterface):
    """Check the header, the geometry and the values; turn the axes to RAS; undo interpolation."""

    input_spec = _ConformInputSpec
    output_spec = _ConformOutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.prepare import conform_scan

        conformed = conform_scan(self.inputs.in_file, **conform_options(given(self.inputs)))
        self._results.update(files.write_conformed(conformed, folder))
        return [*given(self.inputs).get("warnings", ()), *conformed.warnings]


class _ParcellateInputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the conformed scan")
    conform_json = File(exists=True, desc="output of Conform; needed to compare the slices")
    weights = File(exists=True, mandatory=True, desc="weights of the parcellation network")
    device = traits.Str("cpu", usedefault=True, nohash=True)
    skull_strip = traits.Enum(*SKULL_STRIPS, usedefault=True, desc="source of the mask")
    parcellation = traits.Enum(*PARCELLATIONS, usedefault=True, desc="source of the labels")
    mask_file = File(exists=True, desc="brain mask in the scan's space, for skull_strip=mask")
    dseg_file = File(exists=True, desc="FreeSurfer labels, for parcellation=derivatives")
    mask_uri = traits.Str(desc="name of mask_file in the records")
    dseg_uri = traits.Str(desc="name of dseg_file in the records")
    synthstrip_model = File(exists=True, desc="weights of SynthStrip")


class _ParcellateOutputSpec(MeasuredOutputSpec):
    structures = File(desc="label image on the 1 mm grid, FreeSurfer values, int16")
    mask = File(desc="brain on the 1 mm grid, uint8")
    mask_scan = File(desc="share of each scan voxel inside the brain, float32")
    structures_json = File(desc="table of structures, and the sources of mask and labels")


class Parcellate(MeasuredInterface):
    """Brain mask and structures: the embedded network's, another program's, or supplied ones."""

    input_spec = _ParcellateInputSpec
    output_spec = _ParcellateOutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.brain import find_brain
        from brainprior_bids.engine.weights import load_parcellation

        image = nib.load(self.inputs.in_file)
        inputs = given(self.inputs)
        slices = inputs.get("conform_json")
        brain = find_brain(
            image,
            network=load_parcellation(Path(self.inputs.weights), device=self.inputs.device),
            sources=brain_sources(inputs),
            slice_axis=files.read_acquisition(slices).slice_axis if slices else None,
            threads=self.inputs.num_threads,
            folder=folder,
        )
        self._results.update(files.write_brain(brain, grid_of(image), folder))
        return brain.warnings


class _N4InputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the conformed scan")
    conform_json = File(exists=True, mandatory=True, desc="output of Conform: the slice geometry")
    mask_scan = File(exists=True, mandatory=True, desc="brain on the scan's grid, in [0, 1]")
    structures_json = File(exists=True, desc="output of Parcellate: slices that are not used")


class _N4OutputSpec(MeasuredOutputSpec):
    log_bias = File(
        desc="natural log of the bias field, slice gains included, on the scan's grid; mean 0 in "
        "the mask"
    )
    bias_json = File(desc="the slice gains")


class N4(MeasuredInterface):
    """Estimate the bias field inside the brain: N4, and the gains of a 2-D scan's slices."""

    input_spec = _N4InputSpec
    output_spec = _N4OutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.bias import find_bias
        from brainprior_bids.anatomy.slices import without_slices

        image = nib.load(self.inputs.in_file)
        acquisition = files.read_acquisition(self.inputs.conform_json)
        lost = files.read_lost(given(self.inputs).get("structures_json"))
        mask = read_array(self.inputs.mask_scan, np.float32)
        bias = find_bias(
            image,
            without_slices(mask, lost, axis=acquisition.slice_axis),
            acquisition,
            threads=self.inputs.num_threads,
        )
        self._results.update(files.write_bias(bias, grid_of(image), folder))
        return bias.warnings


class _CentroidAffineInputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the conformed scan")
    mask = File(exists=True, mandatory=True, desc="brain on the 1 mm grid")
    structures_json = File(exists=True, mandatory=True, desc="table of structures")


class _CentroidAffineOutputSpec(MeasuredOutputSpec):
    affine_json = File(desc="matrix scanner RAS mm -> MNI305 RAS mm, and its residuals")
    to_mni305 = File(desc="ITK text: resamples the scan into MNI305")
    from_mni305 = File(desc="ITK text: resamples MNI305 into the scan's space")


class CentroidAffine(MeasuredInterface):
    """Fit structures and the brain's extent to those of MNI305; use the template if they fail."""

    input_spec = _CentroidAffineInputSpec
    output_spec = _CentroidAffineOutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.prepare import align_to_mni305

        fit = align_to_mni305(
            nib.load(self.inputs.in_file),
            read_array(self.inputs.mask),
            files.read_table(self.inputs.structures_json),
        )
        self._results.update(files.write_affine(fit, folder))
        return fit.warnings


class _ToMNI305InputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the result, in the scan's space")
    affine_json = File(exists=True, mandatory=True, desc="output of CentroidAffine")
    uncertainty = File(exists=True, desc="its standard deviation")
    samples = InputMultiPath(File(exists=True), desc="posterior samples")
    mask = File(exists=True, desc="brain mask")
    structures = File(exists=True, desc="labels")


class _ToMNI305OutputSpec(MeasuredOutputSpec):
    out_file = File(desc="the result on the 1 mm MNI305 grid")
    uncertainty = File(desc="the same of each further input")
    samples = OutputMultiPath(File())
    mask = File()
    structures = File()


class ToMNI305(MeasuredInterface):
    """Resample once, through the affine, onto the 1 mm MNI305 grid."""

    input_spec = _ToMNI305InputSpec
    output_spec = _ToMNI305OutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.anatomy.spaces import Kind, move

        inputs = self.inputs
        matrix = files.read_matrix(inputs.affine_json)

        def moved(path: str, name: str, kind: Kind) -> str:
            out_file = folder / f"{name}_mni305.nii.gz"
            nib.save(move(nib.load(path), MNI305, matrix, kind=kind), out_file)
            return str(out_file)

        self._results["out_file"] = moved(inputs.in_file, "restored", Kind.IMAGE)
        kinds = {"uncertainty": Kind.SPREAD, "mask": Kind.MASK, "structures": Kind.LABELS}
        for name, kind in kinds.items():
            if isdefined(getattr(inputs, name)):
                self._results[name] = moved(getattr(inputs, name), name, kind)
        if isdefined(inputs.samples):
            self._results["samples"] = [
                moved(path, sample_role(index), Kind.IMAGE)
                for index, path in enumerate(inputs.samples)
            ]
        return []
