# SPDX-License-Identifier: Apache-2.0
"""The derivative data set: its description, files that the validator ignores, and sidecars."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from brainprior_bids import __version__
from brainprior_bids.bids.files import (
    read_json,
    temporary_folder,
    write_json,
    write_text,
)
from brainprior_bids.bids.names import named, residual_role, sample_role, transform_roles
from brainprior_bids.bids.query import Scan
from brainprior_bids.engine.errors import UsageError, is_full
from brainprior_bids.engine.samplers import registry
from brainprior_bids.records import (
    AffineRecord,
    BiasRecord,
    ParcellationRecord,
    ResolutionRecord,
    RestoreRecord,
    StepRecords,
    TemplateRecord,
    WeightsRecord,
)
from brainprior_bids.settings import FILLED, MODALITIES, OTHER_MODALITIES, TASKS, is_template

BIDS_VERSION = "1.11.1"
"""The newest version that the validator supports (bids-validator-deno 3.0.2 warns of 1.11.2)."""

ITK_POINTS = (
    "ITK text for antsApplyTransforms: maps points of the target to points of the source, both in "
    "LPS mm"
)
"""Meaning of the matrix in a transform file."""

BIDSIGNORE = (
    "*.html",
    "group_*",
    "logs",
    "prov",
    "sub-*/figures",
    "sub-*/log",
    "*_xfm.*",
    "*_uncertainty.*",
    "*_residual.*",
    ".brainprior*",
)
"""No trailing slashes: the Deno validator would not match them."""

DESCRIPTIONS = {
    "restored": "1 mm skull-stripped image without bias field: estimate of the posterior mean",
    "restoredSample01": "one posterior sample (02, 03, … are others); with --save-samples",
    "inpainted": "the scan, bit for bit, except under the lesion mask, where the values are "
    "predicted from the posterior mean of the brain",
    "refined": "1 mm skull-stripped image: another tool's image, regularised by the prior within "
    "the error --trust",
    "restoredRefined": "as restored, from the scan and another tool's image together",
    "restoredInpainted": "as restored, voxels under the lesion mask excluded from the likelihood",
    "inpaintedRefined": "as inpainted, using another tool's image under the lesion mask",
    "restoredInpaintedRefined": "as restoredInpainted, from the scan and another tool's image; "
    "under the lesion mask, from that image alone",
    "fused": "residual map of a fused run that is not the reference, on its own voxels",
    "brain": "brain mask; its sidecar states the source",
    "structures": "brain structures, FreeSurfer's label values; the sidecar states the source",
}
"""``desc-`` value -> meaning, for the restored image and the other tasks' images."""


UNCERTAINTY = {
    "prior": "voxelwise standard deviation of the true image about the restored one, predicted by "
    "the prior from the scan, in the image's units",
    "samples": "voxelwise standard deviation of the posterior samples, in the image's units; "
    f"their variance was averaged with a Gaussian of SD {registry.SMOOTHING_MM:g} mm",
}


def residual_description(restore: RestoreRecord, *, refined: bool = False) -> str:
    """Description of the residual map; ``refined``: of another tool's image used alone."""
    image = "the image to refine" if refined else "scan"
    if registry.find(restore.sampler or "auto").yields_samples:
        prediction = "the samples' prediction of it (mean over samples)"
        noise = "the standard deviation of the noise as estimated before sampling"
    else:
        prediction = "its prediction from the restored image"
        noise = "the standard deviation of the noise"
    return f"{image} minus {prediction}, in units of {'--trust' if refined else noise}"


def descriptions() -> dict[str, str]:
    """``desc-`` value -> meaning, for all values of any task; for ``descriptions.tsv``."""
    images = [image for image in TASKS.values() if image != "restored"]
    parts = {
        image: ("sample01", *(("brain", "structures") if image == "refined" else ()))
        for image in images
    }
    plain = {"sample01": DESCRIPTIONS["restoredSample01"], **DESCRIPTIONS}
    of_images = {
        named(image, part): f"of desc-{image}: {plain[part]}"
        for image in images
        for part in parts[image]
        if named(image, part) not in DESCRIPTIONS
    }
    common = {
        f"{named(image, part)}{suffix}": f"as {named(image, part)}, of the {suffix}, in a space "
        "that contrasts share"
        for image in ("restored", "refined")
        for part in ("brain", "structures")
        for suffix in (*MODALITIES, *OTHER_MODALITIES)
        if suffix != "T1w"
    }
    return DESCRIPTIONS | of_images | common


MNI305_URL = "https://templateflow.s3.amazonaws.com/tpl-MNI305/tpl-MNI305_T1w.nii.gz"
"""The image that defines the space; it is not downloaded."""
RESOLUTION = "1 mm, the voxels of TemplateFlow's template"

OWN_SPACE = ("volume_mm3", "confidence")
"""Metadata on columns of the table of labels, which the table in other spaces does not have."""

INHERITED = (
    "Manufacturer",
    "ManufacturersModelName",
    "MagneticFieldStrength",
    "EchoTime",
    "RepetitionTime",
    "InversionTime",
    "FlipAngle",
)
"""Metadata of the source that remains valid for the restored image."""


def write_dataset_files(
    output_dir: Path,
    *,
    bids_dir: Path,
    raw: Mapping[str, Any],
    derivatives: Mapping[str, str] | None = None,
) -> None:
    """Write ``dataset_description.json``, ``.bidsignore``, ``descriptions`` and a README.

    Parameters
    ----------
    output_dir : Path
        Root of the derivative data set; created if absent.
    bids_dir : Path
        Root of the raw data set.
    raw : mapping
        Its ``dataset_description.json``.
    derivatives : name -> root, optional
        Other data sets to link.
    """
    described = output_dir / "dataset_description.json"
    # earlier runs' links are kept: their sidecars name files by them
    links = read_json(described).get("DatasetLinks", {}) if described.is_file() else {}
    links |= {name: Path(path).as_uri() for name, path in (derivatives or {}).items()}
    links["raw"] = bids_dir.as_uri()
    description: dict[str, Any] = {
        "Name": f"brainprior: restored images of {raw.get('Name', 'an unnamed data set')}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [generated_by()],
        "DatasetLinks": links,
        "HowToAcknowledge": "Cite brainprior (CITATION.cff in its repository) and the raw data.",
    }
    if raw.get("License"):
        description["License"] = raw["License"]
    source = {"URL": bids_dir.as_uri()}
    if raw.get("DatasetDOI"):
        source["DOI"] = raw["DatasetDOI"]
    description["SourceDatasets"] = [source]
    write_json(described, description)
    write_text(output_dir / ".bidsignore", "\n".join(BIDSIGNORE) + "\n")
    write_descriptions(output_dir, descriptions())
    write_text(
        output_dir / "README",
        "Images restored by brainprior. Open sub-<label>.html for the report of a participant;\n"
        "logs/status.tsv has the status of every scan. The images are estimates under a prior:\n"
        "see the uncertainty map next to each (suffix uncertainty).\n",
    )


def write_descriptions(root: Path, meanings: Mapping[str, str]) -> None:
    """Write ``descriptions.tsv``, with the meaning of each ``desc-``, and its sidecar."""
    rows = [f"desc-{label}\t{text}" for label, text in meanings.items()]
    write_text(root / "descriptions.tsv", "\n".join(["desc_id\tdescription", *rows]) + "\n")
    sidecar = {
        "Description": "The meaning of each desc- label of this data set",
        "desc_id": {"Description": "The entity desc- with its label"},
        "description": {"Description": "The content of the files with this label"},
    }
    write_json(root / "descriptions.json", sidecar)


def generated_by() -> dict[str, Any]:
    """This program, as ``GeneratedBy`` of a data set describes it."""
    return {
        "Name": "brainprior",
        "Version": __version__,
        "Description": "Posterior sampling of 1 mm brain images under a diffusion prior",
        **({"CodeURL": url} if (url := code_url()) else {}),
        **({"Container": image} if (image := container()) else {}),
    }


def code_url() -> str | None:
    """Address of the source code, from the installed package's metadata; None if not stated."""
    try:
        stated = metadata("brainprior")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return None
    links = dict(
        [part.strip() for part in line.split(",", 1)]
        for line in stated.get_all("Project-URL") or []
    )
    return links.get("Source") or stated.get("Home-page")


def container() -> dict[str, str] | None:
    """The container in which this process runs, as BIDS describes it.

    None if neither its name nor its digest is known: a type alone identifies no container, and
    ``/.dockerenv`` is also present in containers that are not brainprior's. The digest is known if
    it is passed at the start of the container: an image cannot contain its own.
    ``BRAINPRIOR_IMAGE`` and ``BRAINPRIOR_IMAGE_DIGEST`` are read.
    """
    apptainer = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
    tag = os.environ.get("BRAINPRIOR_IMAGE") or apptainer
    digest = os.environ.get("BRAINPRIOR_IMAGE_DIGEST")
    if not (tag or digest):
        return None
    image = {"Type": "apptainer" if apptainer else "docker"}
    if tag:
        image["Tag"] = tag
    if digest:
        image["Digest"] = digest
    return image


def check_output(output_dir: Path) -> None:
    """Check that the output folder can be used.

    Raises
    ------
    UsageError
        If it contains another program's data set, or cannot be written.
    """
    path = output_dir / "dataset_description.json"
    if path.exists():
        try:
            description = read_json(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read ({error}). Repair or remove it.") from error
        generated_by = description.get("GeneratedBy")
        generated_by = generated_by if isinstance(generated_by, list) else []
        makers = [maker.get("Name") for maker in generated_by if isinstance(maker, dict)]
        if "brainprior" not in makers:
            raise UsageError(
                f"output_dir {output_dir} is a data set that brainprior did not write "
                f"({description.get('Name', 'unnamed')}). Choose another folder, for example "
                f"{output_dir / 'derivatives' / 'brainprior'}."
            )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with temporary_folder("probe", output_dir):
            pass
    except OSError as error:
        if is_full(error):
            what = "Make room (disk, quota or number of files), and rerun the same command."
        else:
            what = "Check its permissions and that it is mounted read-write."
        raise UsageError(
            f"output_dir {output_dir} cannot be written ({error.strerror}). {what}"
        ) from error


def bids_uri(path: str, *, dataset: str = "") -> str:
    """``bids:<dataset>:<path>``; an empty data set name means this one."""
    return f"bids:{dataset}:{path}"


def sidecars(
    scan: Scan,
    outputs: Mapping[str, str],
    steps: StepRecords,
    *,
    image_desc: str = "restored",
) -> dict[str, dict[str, Any]]:
    """The JSON of every image that has one: role -> content.

    Parameters
    ----------
    scan : Scan
        The source.
    outputs : role -> path
        Relative to the output folder.
    steps : StepRecords
        At least ``restore`` and ``parcellation``, and ``lesion`` if there was one.
    image_desc : str
        ``desc-`` of the image.
    """
    raw = bids_uri(str(scan.relative), dataset="raw")
    mask = bids_uri(outputs["mask"])
    structures = bids_uri(outputs["structures"])
    restored = bids_uri(outputs["restored"])
    restore, parcellation = steps.restore, steps.parcellation
    used = list(dict.fromkeys(file.uri for file in steps.given.values()))
    hidden = [bids_uri(outputs["hidden"])] if "hidden" in outputs else []
    lesion = [steps.given["lesion"].uri] if "lesion" in steps.given else []
    alone = image_desc == "refined"
    if alone:  # another tool's image replaces the scan: none of this applies to the scan
        raw = steps.given["refined"].uri
    sources = [*([] if alone else [raw]), *used, mask, *hidden]
    shift = steps.conform.facts.values.shift
    image: dict[str, Any] = {
        **{key: scan.metadata[key] for key in INHERITED if key in scan.metadata and not alone},
        "SkullStripped": image_desc not in FILLED or parcellation.mask_source.scan_is_stripped,
        "Sources": sources,
        "Sampler": restore.sampler,
        "NumberOfSamples": restore.n_samples,
        "NetworkCallsPerSample": restore.calls,
        "RandomSeed": restore.seed,
        "Prior": _card(restore.prior),
        **({} if restore.coarse is None else {"CoarsePrior": _card(restore.coarse)}),
        "NoiseStandardDeviation": restore.scanner_units(restore.noise_sd),
        "Units": "arbitrary",
        **({} if shift is None else {"IntensityShift": shift}),
        **_resolution(steps.conform.facts.resolution),
        **({"SlicesNotUsed": parcellation.lost_slices} if parcellation.lost_slices else {}),
        **_slices(steps.bias, corrected=steps.restore.interleaves_corrected),
        **({"OutsideTrainingContrasts": True} if restore.outside_training else {}),
        **({"FusedRuns": _fused(restore)} if restore.runs else {}),
    }
    given = parcellation.given
    mask_origin, structures_origin = parcellation.mask_origin, parcellation.structures_origin
    estimator = {"Estimator": registry.find(restore.sampler or "auto").estimate}
    description = DESCRIPTIONS[image_desc]
    if restore.runs:
        description += f"; of {len(restore.runs)} runs in one likelihood"
    contents: dict[str, dict[str, Any]] = {
        "restored": {"Description": description, **image, **estimator},
        "residual": {
            "Description": residual_description(restore, refined=alone),
            "SkullStripped": True,
            "Sources": [raw, restored],
            "NoiseStandardDeviation": restore.scanner_units(restore.noise_sd_initial),
            "Units": "noise standard deviations",
        },
        "mask": {
            "Description": f"brain mask from {mask_origin.words}",
            "Type": "Brain",
            "Sources": (
                [given["mask"].uri]
                if "mask" in given
                else [structures if mask_origin.embedded else raw]
            ),
        },
        "structures": {
            "Description": f"brain structures from {structures_origin.words}, FreeSurfer's "
            "label values",
            "Sources": [given["dseg"].uri, mask] if "dseg" in given else [raw],
            "volume_mm3": {"Description": "volume of the structure", "Units": "mm^3"},
            "confidence": {
                "Description": "the network's mean probability inside the structure, 0 to 1; "
                "n/a if the labels are from another source"
            },
            **({"Weights": _card(parcellation.weights)} if structures_origin.embedded else {}),
        },
    }
    if "restored_native" in outputs:
        contents["restored_native"] = {
            "Description": "the whole head on the scan's own voxels, with bias field and skull: "
            "voxels entirely inside the brain are predicted from the result, all others are "
            "those of the scan",
            **image,
            **estimator,
            "SkullStripped": parcellation.mask_source.scan_is_stripped,
            "Resolution": "the voxels of the scan",
            "Sources": [raw, restored, mask],
            "ChangedShare": restore.changed_share and restore.changed_share.to_json(),
        }
    if "hidden" in outputs and steps.lesion is not None:
        contents["hidden"] = {
            "Description": "the lesion mask, as dilated: the scan is excluded from the likelihood "
            "under it",
            "Type": "Lesion",
            "Sources": [raw, *lesion],
            "Lesion": steps.lesion.to_json(),
        }
    if "uncertainty" in outputs:
        contents["uncertainty"] = {
            "Description": UNCERTAINTY[restore.uncertainty_from or "samples"],
            **image,
            "UncertaintyFrom": restore.uncertainty_from,
            "IntervalHalfWidths": voxel_half_widths(
                None if restore.uncertainty_from == "prior" else restore.n_samples
            ),
        }
        shared = restore.scanner_units(restore.prior.regional_error)
        if shared is not None:
            contents["uncertainty"]["RegionalErrorStandardDeviation"] = shared
    for run in restore.runs or ():
        role = residual_role(run.name)
        if role in outputs:
            contents[role] = {
                **contents["residual"],
                "Description": f"{residual_description(restore)}; of a fused run, on its own "
                "voxels",
                "Sources": [steps.given[run.name].uri, restored],
                "SpatialReference": steps.given[run.name].uri,
                "NoiseStandardDeviation": restore.scanner_units(run.noise_sd) / run.gain,
            }
    for index, seed in enumerate(restore.sample_seeds):
        role = sample_role(index)
        if role in outputs:
            contents[role] = {
                "Description": "one sample of the posterior: as plausible as any other, and "
                "less accurate than their mean",
                **image,
                "SampleSeed": seed,
                "AssumedSliceThickness": restore.acquisition.thickness_mm
                * restore.slice_widths[index],
                "ResidualRatio": restore.residual_ratios[index],
            }
    contents = {role: {"SpatialReference": raw, **content} for role, content in contents.items()}
    moved = resampled(
        contents, outputs, "MNI305", transforms=[outputs["to_mni305"]], reference=MNI305_URL
    )
    ends = (scan.name.suffix, restored), ("MNI305", MNI305_URL)
    moved["to_mni305"] = _affine(steps.affine, *ends)
    moved["from_mni305"] = _affine(steps.affine, *reversed(ends))
    for template in steps.templates:
        there, back = transform_roles(template.space)
        moved |= resampled(
            contents,
            outputs,
            template.space,
            transforms=[outputs[there]],
            reference=template.address,
        )
        moved[there] = _warp(template, f"{scan.name.suffix} to {template.space}", restored)
        moved[back] = _warp(template, f"{template.space} to {scan.name.suffix}", restored)
    return contents | moved


def _affine(
    affine: AffineRecord, source: tuple[str, str], target: tuple[str, str]
) -> dict[str, Any]:
    """The JSON next to an affine; both ends are a space and the address of its image."""
    return {
        "Description": f"affine transform that resamples {source[0]} on {target[0]}; {ITK_POINTS}",
        "Sources": [source[1], target[1]],
        "DegreesOfFreedom": affine.dof,
        "Method": affine.method,
        "MedianResidual": affine.median_residual_mm,
    }


def _warp(template: TemplateRecord, way: str, image: str) -> dict[str, Any]:
    """The JSON next to a nonlinear transform."""
    return {
        "Description": f"nonlinear transform, {way}: composite ITK transform in HDF5, to be "
        "passed to antsApplyTransforms as one transform",
        "Sources": [image, str(template.address)],
        "Metric": template.metric,
        "Software": template.program,
        "TemplateSHA256": template.image_sha256,
        "BrainMaskDice": template.agreement,
        "BrainMaskDiceAffine": template.agreement_affine,
    }


def resampled(
    contents: Mapping[str, Mapping[str, Any]],
    outputs: Mapping[str, str],
    space: str,
    *,
    transforms: Sequence[str],
    reference: str | None,
) -> dict[str, dict[str, Any]]:
    """The JSON of the images that were resampled to a space: role -> content.

    Parameters
    ----------
    contents : role -> content
        The JSON of the images in the scan's own space.
    outputs : role -> path
        Paths of both.
    transforms : sequence of str
        Paths of the transforms that were applied, the first one last.
    reference : str
        ``SpatialReference``: address of the image that defines the space.
    """
    moved = {}
    for role, content in contents.items():
        there = f"{role}_{space.lower()}"
        if there in outputs:
            moved[there] = {
                **{key: value for key, value in content.items() if key not in OWN_SPACE},
                "Description": f"{content['Description']}; resampled once to {space}",
                "Sources": [bids_uri(path) for path in (outputs[role], *transforms)],
                "SpatialReference": reference,
                **({"Resolution": RESOLUTION} if is_template(space) else {}),
            }
    return moved


def _card(weights: WeightsRecord) -> dict[str, str | None]:
    return {"name": weights.name, "sha256": weights.sha256}


def _resolution(resolution: ResolutionRecord) -> dict[str, Any]:
    """Measured and used voxel sizes of an interpolated scan, mm along closest-canonical axes."""
    if not resolution.interpolated:
        return {}
    return {"MeasuredVoxelSize": resolution.measured_mm, "UsedVoxelSize": resolution.used_mm}


def _slices(bias: BiasRecord | None, *, corrected: bool | None) -> dict[str, Any]:
    """Slice gains and motion between interleaves of a 2-D scan, if they were estimated."""
    moved: dict[str, Any] = {}
    if bias is None:
        return moved
    if bias.interleaves is not None and bias.interleaves.moved:
        moved = {
            "InterleaveCount": len(bias.interleaves.to_reference),
            "InterleaveMotion": bias.interleaves.to_reference,
            "InterleaveMotionRMS": bias.interleaves.rms_mm,
            "InterleaveMotionCorrected": bool(corrected),
        }
    if not bias.gains:
        return moved
    return {
        **moved,
        "SliceGainsApplied": bias.applied,
        "SliceGains": bias.gains,
        "SliceGainAlternationPercent": bias.alternation_percent,
        "SliceGainAlternationErrorPercent": bias.alternation_se_percent,
    }


def _fused(restore: RestoreRecord) -> list[dict[str, Any]]:
    """The runs of a fused image, the reference first."""
    return [
        {
            "Name": run.name,
            "SliceThickness": run.acquisition.thickness_mm,
            "ToReference": run.to_reference,
            "Gain": run.gain,
            "NoiseStandardDeviation": restore.scanner_units(run.noise_sd),
            "ResidualRatios": run.residual_ratios,
            **({"Lesion": run.lesion.to_json()} if run.lesion is not None else {}),
        }
        for run in restore.runs or ()
    ]


def voxel_half_widths(n_samples: int | None) -> dict[str, float]:
    """Half width of a central interval for the true value, in units of the uncertainty map.

    The quantile of a Gaussian; if the SD is that of n samples (not None, predicted by the prior),
    times ``sqrt(1 + 1/n)``: the truth is one more draw. Not Student's: the variance was averaged
    over neighbours.

    Returns
    -------
    {"50": ..., "90": ...}
        Per cent of coverage -> factor.
    """
    more = 1.0 if n_samples is None else (1 + 1 / n_samples) ** 0.5
    return {"50": round(0.674490 * more, 4), "90": round(1.644854 * more, 4)}


def interval_half_widths(n_samples: int) -> dict[str, float]:
    """Half width of a central interval for the true value, in SDs of n samples' measurements.

    Few samples have no empirical quantiles; for a Gaussian the next draw (the truth is one more)
    lies within ``t(n - 1) sqrt(1 + 1/n)`` SDs of the mean.

    Returns
    -------
    {"50": ..., "90": ...}
        Per cent of coverage -> factor; n_samples must be 2 or more.
    """
    from scipy.stats import t as student_t  # slow to import, and not needed for --help

    return {
        str(percent): round(
            float(student_t.ppf(0.5 + percent / 200, n_samples - 1)) * (1 + 1 / n_samples) ** 0.5,
            4,
        )
        for percent in (50, 90)
    }


def structures_table(parcellation: ParcellationRecord, *, measures: bool = True) -> str:
    """The ``dseg.tsv``: label value, name, colour, volume and the network's confidence.

    Labels from other sources than the network have no confidence. Without ``measures`` there are
    neither volume nor confidence, because both refer to the scan's own space.
    """
    own = parcellation.structures_origin.embedded
    colours = _colours()
    lines = ["index\tname\tcolor" + "\tvolume_mm3\tconfidence" * measures]
    for row in sorted(parcellation.table, key=lambda item: item.index):
        cells = [str(row.index), row.name, colours.get(row.index, "n/a")]
        if measures:
            cells += [f"{row.volume_mm3:.0f}", f"{row.confidence:.3f}" if own else "n/a"]
        lines.append("\t".join(cells))
    return "\n".join(lines) + "\n"


def _colours() -> dict[int, str]:
    """Label value -> ``#rrggbb``, from ``data/structures.tsv``."""
    text = (resources.files("brainprior_bids") / "data" / "structures.tsv").read_text(
        encoding="utf-8"
    )
    rows = csv.DictReader(text.splitlines(), delimiter="\t")
    return {
        int(row["index"]): "#{:02x}{:02x}{:02x}".format(
            *(int(row[part]) for part in ("red", "green", "blue"))
        )
        for row in rows
    }
