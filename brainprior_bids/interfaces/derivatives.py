# SPDX-License-Identifier: Apache-2.0
"""The last two nodes of a scan: drawing pictures, and writing the derivatives."""

from __future__ import annotations

import shutil
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform
from nipype.interfaces.base import File, InputMultiPath, OutputMultiPath, isdefined, traits

from brainprior_bids import __version__
from brainprior_bids.bids.derivatives import sidecars, structures_table
from brainprior_bids.bids.files import publish, temporary_folder, to_json
from brainprior_bids.bids.names import (
    BIDSName,
    in_common_space,
    named,
    output_names,
    residual_role,
    result_name,
    sample_role,
)
from brainprior_bids.bids.provenance import (
    activity_id,
    file_provenance,
    scan_records,
    sha256_file,
)
from brainprior_bids.bids.query import Scan
from brainprior_bids.bids.status import read_summary, summary_path, write_summary
from brainprior_bids.interfaces.base import (
    MeasuredInputSpec,
    MeasuredInterface,
    MeasuredOutputSpec,
)
from brainprior_bids.records import (
    AffineRecord,
    AlignRecord,
    BiasRecord,
    ConformRecord,
    FileRecord,
    HeaderRecord,
    LesionRecord,
    NodeRecord,
    ParcellationRecord,
    RestoreRecord,
    ScanRecord,
    ScanStatus,
    StepRecords,
    TemplatesRecord,
    TissuesRecord,
    total_seconds,
)
from brainprior_bids.settings import FILLED, TASKS, is_template

IMAGES = (
    "hidden", "uncertainty", "restored_mni305", "uncertainty_mni305", "mask_mni305",
    "structures_mni305", "restored_native", "residual", "mask", "structures",
)  # fmt: skip
TEXTS = ("to_mni305", "from_mni305")


class _ScanFilesInputSpec(MeasuredInputSpec):
    """Files of the preceding nodes."""

    scan = File(exists=True, mandatory=True)
    conform_json = File(exists=True, mandatory=True)
    structures = File(exists=True, mandatory=True)
    structures_json = File(exists=True, mandatory=True)
    mask = File(exists=True, mandatory=True)
    mask_scan = File(exists=True, mandatory=True)
    affine_json = File(exists=True, mandatory=True)
    restored = File(exists=True, mandatory=True)
    uncertainty = File(exists=True)
    residual = File(exists=True, mandatory=True)
    log_bias = File(exists=True, mandatory=True)
    restored_mni305 = File(exists=True, mandatory=True)
    restore_json = File(exists=True, mandatory=True)
    image = File(exists=True, mandatory=True, desc="the result")
    hidden = File(exists=True, desc="mask of the inpainted voxels, on the scan's grid")
    bias_json = File(exists=True, desc="output of N4: the slice gains")
    name = traits.Str(mandatory=True, desc="BIDS name of the scan, without extension")
    image_desc = traits.Str("restored", usedefault=True, desc="desc- of the image")


class _ReportletsInputSpec(_ScanFilesInputSpec):
    viewer = traits.Bool(True, usedefault=True, desc="write pages with three linked planes, too")


class _ReportletsOutputSpec(MeasuredOutputSpec):
    figures = OutputMultiPath(File(), desc="SVG pictures, and the viewer's pages")
    tissues_json = File(desc="signal and contrast by tissue; see anatomy.tissue_metrics")


class Reportlets(MeasuredInterface):
    """Draw the pictures of one scan, and measure signal and contrast by tissue."""

    input_spec = _ReportletsInputSpec
    output_spec = _ReportletsOutputSpec

    def _work(self, folder: Path) -> list[str]:
        from brainprior_bids.reports.reportlets import (
            make_reportlets,
            make_viewers,
            tissues_record,
        )

        inputs = self.inputs
        files = {
            "scan": inputs.scan,
            "mask_scan": inputs.mask_scan,
            "residual": inputs.residual,
            "log_bias": inputs.log_bias,
            "mask": inputs.mask,
            "structures": inputs.structures,
            "structures_table": inputs.structures_json,
            "restored": inputs.restored,
            "restored_mni305": inputs.restored_mni305,
            "conform": inputs.conform_json,
            "affine": inputs.affine_json,
            "restore": inputs.restore_json,
        }
        for role in ("uncertainty", "hidden"):
            if isdefined(getattr(inputs, role)):
                files[role] = getattr(inputs, role)
        if isdefined(inputs.bias_json):
            files["gains"] = inputs.bias_json
        if inputs.image_desc in FILLED:
            files["filled"] = inputs.image
        name = BIDSName.parse(inputs.name)
        prefix = name.stem.removesuffix(f"_{name.suffix}")
        paths = {role: Path(path) for role, path in files.items()}
        figures: list[Path] = []
        warnings = []
        try:
            tissues = tissues_record(paths)
            if tissues is not None:
                target = folder / "tissues.json"
                _write(target, to_json(tissues.to_json()))
                self._results["tissues_json"] = str(target)
            figures = make_reportlets(paths, folder / "figures", prefix=prefix, suffix=name.suffix)
            if inputs.viewer:
                figures += make_viewers(
                    paths,
                    folder / "figures",
                    prefix=prefix,
                    suffix=name.suffix,
                    image=inputs.image_desc,
                )
        except Exception as error:  # a failed picture must not prevent writing the images
            what = "the viewer's pages" if figures else "the pictures"
            warnings.append(
                f"{inputs.name}: {what} could not be drawn "
                f"({type(error).__name__}: {error}); the images are not affected."
            )
        self._results["figures"] = [str(_rename(path, self.inputs.image_desc)) for path in figures]
        return warnings


class _WriteInputSpec(_ScanFilesInputSpec):
    to_mni305 = File(exists=True, mandatory=True)
    from_mni305 = File(exists=True, mandatory=True)
    lesion_json = File(exists=True, desc="output of Lesion")
    restored_native = File(exists=True, desc="the whole head on the scan's grid")
    runs_json = File(exists=True, desc="output of Align: the other runs that were fused")
    run_residuals = InputMultiPath(File(exists=True), desc="residual of each of them")
    samples = InputMultiPath(File(exists=True), desc="every sample, with --save-samples")
    uncertainty_mni305 = File(exists=True, desc="output of ToMNI305, like the next three")
    mask_mni305 = File(exists=True)
    structures_mni305 = File(exists=True)
    samples_mni305 = InputMultiPath(File(exists=True))
    template_files = InputMultiPath(File(exists=True), desc="output of ToTemplates")
    template_roles = traits.List(traits.Str, desc="role of each of them")
    templates_json = File(exists=True, desc="output of ToTemplates")
    figures = InputMultiPath(File(exists=True))
    tissues_json = File(exists=True, desc="output of Reportlets")
    records = InputMultiPath(File(exists=True), desc="node.json of the preceding nodes")
    source_file = File(exists=True, mandatory=True, desc="the raw image")
    relative = traits.Str(mandatory=True, desc="its path from the data set's root")
    metadata = traits.Dict({}, usedefault=True)
    given = traits.Dict({}, usedefault=True, desc="role -> path and URI of other input files")
    output_dir = traits.Str(mandatory=True)
    settings = traits.Dict(mandatory=True, desc="settings that affect the result")
    seed = traits.Range(low=0, high=2**63 - 1, value=0, usedefault=True)
    fingerprint = traits.Str(mandatory=True)
    parts = traits.Dict({}, usedefault=True, desc="the components of the fingerprint")
    run_uuid = traits.Str(mandatory=True)
    command = traits.List(traits.Str(), desc="argv")


class _WriteOutputSpec(MeasuredOutputSpec):
    summary = File(desc="logs/scans/<scan>.json")


class Write(MeasuredInterface):
    """Put the derivatives, their sidecars, the pictures and the provenance in place.

    Everything is first written into a hidden folder of the output folder, then renamed: a reader
    sees a whole file or none. The summary is written last, so a scan is ``done`` only with
    everything in place. The node always runs: the outputs may have been removed while the work
    folder was kept.
    """

    input_spec = _WriteInputSpec
    output_spec = _WriteOutputSpec
    _always_run = True

    def _work(self, folder: Path) -> list[str]:
        inputs = self.inputs
        output_dir = Path(inputs.output_dir)
        scan = Scan(
            Path(inputs.source_file),
            PurePosixPath(inputs.relative),
            BIDSName.parse(inputs.name),  # without run and acquisition if runs were fused
            inputs.metadata,
        )
        steps = StepRecords(
            conform=ConformRecord.read(inputs.conform_json),
            parcellation=ParcellationRecord.read(inputs.structures_json),
            affine=AffineRecord.read(inputs.affine_json),
            restore=RestoreRecord.read(inputs.restore_json),
            lesion=(
                LesionRecord.read(inputs.lesion_json) if isdefined(inputs.lesion_json) else None
            ),
            bias=BiasRecord.read(inputs.bias_json) if isdefined(inputs.bias_json) else None,
            tissues=(
                TissuesRecord.read(inputs.tissues_json) if isdefined(inputs.tissues_json) else None
            ),
            templates=(
                TemplatesRecord.read(inputs.templates_json).templates
                if isdefined(inputs.templates_json)
                else ()
            ),
            given={
                role: FileRecord(uri=file["uri"], sha256=sha256_file(Path(file["path"])))
                for role, file in inputs.given.items()
            },
            seed=inputs.seed,
        )
        nodes = [NodeRecord.read(record) for record in inputs.records]
        warnings = [text for node in nodes for text in node.warnings]
        with temporary_folder("staging", output_dir) as name:
            staging = Path(name)
            staged, outputs = self._stage(staging, scan, steps)
            roles = {path: role for role, path in outputs.items()}
            digests = [
                (roles.get(path, "sidecar"), path, sha256_file(staging / path)) for path in staged
            ]
            warnings += _replaced(output_dir, scan.name, inputs.image_desc, digests)
            input_sha256 = sha256_file(scan.path)
            records = scan_records(
                scan,
                run_uuid=inputs.run_uuid,
                activity=activity_id("restore", inputs.fingerprint),
                command=list(inputs.command),
                settings=inputs.settings,
                seed=inputs.seed,
                input_sha256=input_sha256,
                outputs=digests,
                steps=steps,
                nodes=nodes,
                warnings=warnings,
            )
            for file_name, text in records.items():
                staged.append(f"prov/{file_name}")
                _write(staging / "prov" / file_name, text)
            figures = self._stage_figures(staging, scan)
            staged += figures
            result = result_name(scan.name, inputs.image_desc)
            previous = read_summary(output_dir, result)
            publish({staging / path: output_dir / path for path in staged})
        if previous is not None:
            self._remove_stale(output_dir, previous, set(staged))
        write_summary(
            output_dir,
            ScanRecord(
                scan=result,
                subject=scan.subject,
                source=str(scan.relative),
                source_sha256=input_sha256,
                task=inputs.settings["task"],
                status=ScanStatus.DONE,
                seconds=total_seconds(nodes),
                message=f"{len(warnings)} warning(s)" if warnings else "",
                run_uuid=inputs.run_uuid,
                version=__version__,
                fingerprint=inputs.fingerprint,
                parts=dict(inputs.parts),
                seed=inputs.seed,
                outputs=tuple(sorted(path for path in staged if path not in figures)),
                figures=tuple(figures),
                warnings=tuple(warnings),
                facts=steps,
                nodes=tuple(nodes),
            ),
        )
        self._results["summary"] = str(summary_path(output_dir, result))
        return []

    def _stage(
        self, staging: Path, scan: Scan, steps: StepRecords
    ) -> tuple[list[str], dict[str, str]]:
        """Write images, transforms, tables and sidecars below ``staging``.

        Returns
        -------
        every staged path, and role -> path of those that are not sidecars; all relative.
        """
        inputs = self.inputs
        samples = list(inputs.samples) if isdefined(inputs.samples) else []
        runs = AlignRecord.read(inputs.runs_json).runs if isdefined(inputs.runs_json) else ()
        names = output_names(
            scan.name,
            n_samples=steps.restore.n_samples or 1,
            uncertainty=isdefined(inputs.uncertainty),
            spaces=[
                *(s for s in inputs.settings["output_spaces"] if not is_template(s)),
                *(template.space for template in steps.templates),
            ],
            save_samples=bool(samples),
            image=inputs.image_desc,
            native=isdefined(inputs.restored_native),
            runs=[BIDSName.parse(run.name) for run in runs],
            lesion=isdefined(inputs.hidden),
        )
        anat = PurePosixPath(scan.name.folder) / "anat"
        outputs = {role: str(anat / name) for role, name in names.items()}
        (staging / anat).mkdir(parents=True)
        code, original = _header(steps.conform)
        own_grid = {"residual", "hidden", "restored_native"}
        if inputs.image_desc in FILLED:
            own_grid |= {sample_role(index) for index in range(len(samples))}
            own_grid |= {"restored", "uncertainty"}
        files = {role: getattr(inputs, role) for role in IMAGES} | {"restored": inputs.image}
        files |= {sample_role(index): sample for index, sample in enumerate(samples)}
        if isdefined(inputs.samples_mni305):
            moved = enumerate(inputs.samples_mni305)
            files |= {f"{sample_role(index)}_mni305": sample for index, sample in moved}
        transforms = {role: getattr(inputs, role) for role in TEXTS}
        if steps.templates:
            moved_to = dict(zip(inputs.template_roles, inputs.template_files, strict=True))
            warps = {role for role, file in moved_to.items() if file.endswith(".h5")}
            transforms |= {role: moved_to.pop(role) for role in warps}
            files |= moved_to
        for role, file in files.items():
            if role in outputs:
                header = original if role in own_grid else None
                copy_image(Path(file), staging / outputs[role], role, code, header)
        for run, file in zip(runs, inputs.run_residuals if runs else (), strict=True):
            role = residual_role(run.name)
            header = _header(ConformRecord.read(run.files["conform"]))
            copy_image(Path(file), staging / outputs[role], role, *header)
        for role, file in transforms.items():
            shutil.copyfile(file, staging / outputs[role])
        for role in outputs:
            if role.startswith("structures_table"):
                own = role == "structures_table"
                table = structures_table(steps.parcellation, measures=own)
                _write(staging / outputs[role], table)
        staged = list(outputs.values())
        activity = activity_id("restore", inputs.fingerprint)
        for role, content in sidecars(scan, outputs, steps, image_desc=inputs.image_desc).items():
            path = f"{outputs[role].partition('.')[0]}.json"
            origin = file_provenance(activity, sha256_file(staging / outputs[role]))
            _write(staging / path, to_json(content | origin))
            staged.append(path)
        return staged, outputs

    def _stage_figures(self, staging: Path, scan: Scan) -> list[str]:
        """Copy the pictures into ``sub-XX/figures``; relative paths."""
        if not isdefined(self.inputs.figures):
            return []
        target = PurePosixPath(f"sub-{scan.subject}") / "figures"
        (staging / target).mkdir(parents=True)
        figures = []
        for figure in self.inputs.figures:
            path = target / Path(figure).name
            shutil.copyfile(figure, staging / path)
            figures.append(str(path))
        return figures

    @staticmethod
    def _remove_stale(output_dir: Path, previous: ScanRecord, staged: set[str]) -> None:
        """Remove files of an earlier run of this scan that this one did not replace."""
        for path in set(previous.files) - staged:
            (output_dir / path).unlink(missing_ok=True)


def _replaced(
    output_dir: Path, scan: BIDSName, image: str, digests: Sequence[tuple[str, str, str]]
) -> list[str]:
    """A warning if mask, structures or transforms of another task's result are replaced."""
    changed: dict[str, None] = {}
    results = []
    for other in TASKS.values():
        result = result_name(scan, other)
        previous = read_summary(output_dir, result) if other != image else None
        replaced = [
            PurePosixPath(path).name
            for _, path, digest in digests
            if path.endswith((".nii.gz", ".txt", ".h5"))
            and previous is not None
            and path in previous.outputs
            and (output_dir / path).is_file()
            and sha256_file(output_dir / path) != digest
        ]
        if replaced:
            changed |= dict.fromkeys(replaced)
            results.append(result)
    if not changed:
        return []
    return [
        f"{result_name(scan, image)}: {', '.join(changed)} replaced those of "
        f"{', '.join(results)}, which came from other settings or another version. Make that "
        "again with these, or use an output folder for each."
    ]


def _header(conform: ConformRecord) -> tuple[int, HeaderRecord]:
    """A scan's sform code, and its original header."""
    return conform.facts.affine.code, conform.facts.original


def _rename(path: Path, image: str) -> Path:
    """``desc-flicker`` -> ``desc-inpaintedFlicker``: pictures of two tasks have two names."""
    what = BIDSName.parse(path.name).get("desc") or ""
    return path.rename(
        path.with_name(path.name.replace(f"desc-{what}", f"desc-{named(image, what)}"))
    )


def copy_image(
    source: Path, target: Path, role: str, code: int, original: HeaderRecord | None = None
) -> None:
    """Copy an image; those in the scan's own space carry the scan's own sform code.

    With ``original``, the scan's original header, the voxels are stored in the scan's order under
    that header; only the fields that describe their values are new.
    """
    image = nib.load(source)
    if original is not None:
        axes = axcodes2ornt(tuple(original.axis_codes))  # such as "LPS"
        image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axes))
    if not in_common_space(role):
        image.set_sform(image.affine, code)
        image.set_qform(image.affine, code)
    array = np.asanyarray(image.dataobj)
    if original is None:
        copy = nib.Nifti1Image(array, image.affine, image.header)
    else:
        kind = nib.Nifti2Image if original.format == "NIfTI-2" else nib.Nifti1Image
        header = kind.header_class(b64decode(original.header_base64)).as_byteswapped("<")
        header.set_data_dtype(array.dtype)
        pixdim = header["pixdim"].copy()
        header.set_data_shape(array.shape)  # forgets the repetition time
        header["pixdim"] = pixdim
        copy = kind(array, None, header)
        if not np.allclose(header.get_best_affine(), image.affine, atol=1e-4):
            # a reader would take an sform that conform could not use
            copy.set_sform(image.affine, code)
            copy.set_qform(image.affine, code)
    copy.header.set_slope_inter(1, 0)
    nib.save(copy, target)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
