# SPDX-License-Identifier: Apache-2.0
"""The node that registers a restored brain to the templates of standard spaces."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
from nipype.interfaces.base import File, InputMultiPath, OutputMultiPath, isdefined, traits

from brainprior_bids.anatomy.templates import Template
from brainprior_bids.bids.names import sample_role, transform_roles
from brainprior_bids.bids.provenance import sha256_file
from brainprior_bids.interfaces import files
from brainprior_bids.interfaces.base import (
    MeasuredInputSpec,
    MeasuredInterface,
    MeasuredOutputSpec,
)
from brainprior_bids.records import TemplateRecord, TemplatesRecord

LOW_AGREEMENT = 0.9
"""Dice of the brain masks below which there is a warning."""


def disagreements(records: Sequence[TemplateRecord]) -> list[str]:
    """A warning for each registration after which the brain masks do not agree."""
    return [
        f"The brain mask and that of {record.space} agree poorly after the registration (Dice "
        f"{record.agreement:.2f}, usually above {LOW_AGREEMENT:g}). Look at the images in "
        f"{record.space} before you use them."
        for record in records
        if record.agreement is not None and record.agreement < LOW_AGREEMENT
    ]


class _ToTemplatesInputSpec(MeasuredInputSpec):
    in_file = File(exists=True, mandatory=True, desc="the restored brain, in the scan's space")
    mask = File(exists=True, mandatory=True, desc="its brain mask, on the same grid")
    affine_json = File(exists=True, mandatory=True, desc="output of CentroidAffine")
    contrast = traits.Str(mandatory=True, desc="T1w, or another one")
    spaces = traits.List(traits.Str, mandatory=True, desc="TemplateFlow's names")
    images = InputMultiPath(File(exists=True), mandatory=True, desc="T1w of each template")
    masks = InputMultiPath(File(exists=True), mandatory=True, desc="brain mask of each template")
    sloppy = traits.Bool(False, usedefault=True, desc="for tests: a coarse registration")
    brain_only = traits.Bool(False, usedefault=True, desc="resample mask and structures only")
    uncertainty = File(exists=True, desc="standard deviation of in_file")
    samples = InputMultiPath(File(exists=True), desc="posterior samples")
    structures = File(exists=True, desc="labels")


class _ToTemplatesOutputSpec(MeasuredOutputSpec):
    files = OutputMultiPath(File(), desc="images on the templates' grids, and transforms")
    roles = traits.List(traits.Str, desc="role of each file, as in bids.names.output_names")
    templates_json = File(desc="the templates, and the agreement of the masks")


class ToTemplates(MeasuredInterface):
    """Register to each template (affine, SyN), and resample once through the transform."""

    input_spec = _ToTemplatesInputSpec
    output_spec = _ToTemplatesOutputSpec

    def _work(self, folder: Path) -> list[str]:
        inputs = self.inputs
        paths: dict[str, str] = {}
        records = []
        for space, image, mask in zip(inputs.spaces, inputs.images, inputs.masks, strict=True):
            template = Template(space, Path(image), Path(mask))
            outputs, record = self._to(template, folder)
            paths |= outputs
            records.append(record)
        self._results["files"] = list(paths.values())
        self._results["roles"] = list(paths)
        self._results["templates_json"] = files.write_record(
            TemplatesRecord(templates=tuple(records)), folder / "templates.json"
        )
        return disagreements(records)

    def _to(self, template: Template, folder: Path) -> tuple[dict[str, str], TemplateRecord]:
        """Role -> file of one template, and the record."""
        from brainprior_bids.anatomy.normalise import (
            agreement,
            metric,
            register,
            resample_through,
        )
        from brainprior_bids.anatomy.spaces import Kind, move

        inputs = self.inputs
        matrix = files.read_matrix(inputs.affine_json)
        mask = nib.load(inputs.mask)
        warp = register(
            nib.load(inputs.in_file),
            mask,
            template,
            to_mni305=matrix,
            contrast=inputs.contrast,
            folder=folder,
            sloppy=inputs.sloppy,
        )
        there, back = transform_roles(template.space)
        paths = {there: str(warp.to_template), back: str(warp.from_template)}
        for role, (path, kind) in self._images().items():
            role = f"{role}_{template.space.lower()}"
            moved = resample_through(nib.load(path), template, [warp.to_template], kind=kind)
            nib.save(moved, folder / f"{role}.nii.gz")
            paths[role] = str(folder / f"{role}.nii.gz")
        moved = nib.load(paths[f"mask_{template.space.lower()}"])
        affine = move(mask, template.grid, template.from_mni305() @ matrix, kind=Kind.MASK)
        return paths, TemplateRecord(
            space=template.space,
            address=template.address,
            image_sha256=sha256_file(template.image),
            mask_sha256=sha256_file(template.mask),
            metric=metric(inputs.contrast).words,
            program=f"ANTsPy {version('antspyx')}",
            agreement=round(agreement(np.asarray(moved.dataobj) > 0, template), 4),
            agreement_affine=round(agreement(np.asarray(affine.dataobj) > 0, template), 4),
        )

    def _images(self) -> dict[str, tuple[str, str]]:
        """Role -> file and kind of the images to resample."""
        from brainprior_bids.anatomy.spaces import Kind

        inputs = self.inputs
        images = {"mask": (inputs.mask, Kind.MASK)}
        if isdefined(inputs.structures):
            images["structures"] = (inputs.structures, Kind.LABELS)
        if inputs.brain_only:
            return images
        images["restored"] = (inputs.in_file, Kind.IMAGE)
        if isdefined(inputs.uncertainty):
            images["uncertainty"] = (inputs.uncertainty, Kind.SPREAD)
        if isdefined(inputs.samples):
            for index, path in enumerate(inputs.samples):
                images[sample_role(index)] = (path, Kind.IMAGE)
        return images
