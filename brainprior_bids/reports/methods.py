# SPDX-License-Identifier: Apache-2.0
"""The methods text for a paper, from the records of a run, as Markdown, HTML and LaTeX.

It is generated from the summaries of finished scans, so it names the samplers, weights and
versions that were used. Citations in the Markdown are in pandoc's form (``[@key]``), with the
keys of ``CITATION.bib``.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from brainprior_bids import __version__
from brainprior_bids.bids.files import write_text
from brainprior_bids.bids.status import read_contrast
from brainprior_bids.engine.samplers import registry
from brainprior_bids.records import (
    AffineMethod,
    ContrastRecord,
    MaskSource,
    Origin,
    ScanRecord,
    StructuresSource,
    TemplateRecord,
)
from brainprior_bids.reports.references import bibtex, html_list

CITATION = re.compile(r"\[@([A-Za-z0-9]+)\]")
DONE = {
    "restore": "restored",
    "inpaint": "inpainted",
    "restore+inpaint": "restored and inpainted",
    "refine": "refined from another tool's image",
    "restore+refine": "restored together with another tool's image",
    "inpaint+refine": "inpainted using another tool's image",
    "restore+inpaint+refine": "restored and inpainted together with another tool's image",
}
"""Task -> what was done to the scan."""

OWN_MASK = Origin(MaskSource.EMBEDDED)
OWN_STRUCTURES = Origin(StructuresSource.EMBEDDED)


@dataclass(frozen=True)
class Method:
    """The properties of one scan's result that a methods section reports.

    ``scan`` is the name of its record, empty before a run. ``in_mni305`` says whether its images
    are also in MNI305 space, ``contrast`` how it was aligned with its session's reference.
    """

    suffix: str
    task: str
    sampler: str
    n_samples: int
    calls: int
    version: str
    prior: str
    parcellation: str
    mask: Origin = OWN_MASK
    structures: Origin = OWN_STRUCTURES
    runs: int = 1
    aligned_by: AffineMethod = AffineMethod.STRUCTURES
    widths: tuple[float, ...] = ()
    slice_gains: bool = False
    interleaves: bool = False
    reduced: bool = False
    coarse: str | None = None
    uncertainty_from: str | None = None
    templates: tuple[TemplateRecord, ...] = ()
    scan: str = ""
    in_mni305: bool = False
    contrast: ContrastRecord | None = None


def of_summary(summary: ScanRecord) -> Method:
    """A ``Method`` from a finished scan's summary."""
    restore, parcellation = summary.facts.restore, summary.facts.parcellation
    return Method(
        suffix=_suffix(summary.scan),
        task=summary.task or "restore",
        sampler=restore.sampler or "exact",
        n_samples=restore.n_samples or 0,
        calls=restore.calls or 0,
        version=summary.version or __version__,
        prior=restore.prior.label,
        parcellation=parcellation.weights.label,
        mask=parcellation.mask_origin,
        structures=parcellation.structures_origin,
        runs=len(restore.runs or (None,)),
        aligned_by=summary.facts.affine.method,
        widths=tuple(sorted(set(restore.slice_widths))),
        slice_gains=summary.facts.bias is not None and bool(summary.facts.bias.applied),
        interleaves=bool(restore.interleaves_corrected),
        reduced=summary.facts.conform.facts.resolution.reduced,
        coarse=None if restore.coarse is None else restore.coarse.label,
        uncertainty_from=restore.uncertainty_from,
        templates=summary.facts.templates,
        scan=summary.scan,
        in_mni305=_has_images(summary.outputs, "MNI305"),
    )


def with_contrasts(methods: Sequence[Method], output_dir: Path) -> list[Method]:
    """The methods with the alignment of each contrast, from ``logs/contrasts``."""
    return [
        replace(method, contrast=read_contrast(output_dir, method.scan)) if method.scan else method
        for method in methods
    ]


def _has_images(outputs: Sequence[str], space: str) -> bool:
    """Whether images in a space are among the paths."""
    return any(f"_space-{space}_" in path and path.endswith(".nii.gz") for path in outputs)


def methods_text(methods: Sequence[Method]) -> str:
    """The paragraphs, in Markdown."""
    if not methods:
        return "No scan was restored.\n"
    pairs = [(method.suffix, method.task) for method in methods]
    counts = "; ".join(
        _listed([f"{pairs.count((s, t))} {s}" for s, t in dict.fromkeys(pairs) if t == task])
        + f" {'scan was' if sum(t == task for _, t in pairs) == 1 else 'scans were'} {DONE[task]}"
        for task in dict.fromkeys(task for _, task in pairs)
    )
    hidden = _reduced(methods) + _missing(methods) + _refined(methods)
    fused = [method.runs for method in methods if method.runs > 1]
    if fused:
        several = str(fused[0]) if len(set(fused)) == 1 else f"{min(fused)} to {max(fused)}"
        hidden += (
            f"\n\n{len(fused)} of these images {'combines' if len(fused) == 1 else 'combine'} "
            f"{several} runs of one contrast each. Every run was registered rigidly\n"
            "(correlation, SimpleITK) to the run with the thinnest slices, after blurring "
            "each of the two images\nby the slice profile of the other. All runs entered a joint "
            "likelihood, each with its own\nslice profile, bias field and noise level, and a gain "
            "relative to the reference run."
        )
    spaces = _contrasts(methods) + _resampled(methods) + _standard_spaces(methods)
    versions = ", ".join(dict.fromkeys(method.version for method in methods))
    drawn = _drawn(methods) + _coarse(methods)
    spread = _uncertainty(methods)
    drawing = any(registry.find(method.sampler).yields_samples for method in methods)
    start = "Images were drawn from" if drawing else "Images are estimates of the mean of"
    widths = sorted({width for method in methods for width in method.widths})
    if len(widths) > 1:
        spread += (
            "\nTo account for the uncertainty of the slice profile, the assumed thickness of "
            f"thick slices was\n{', '.join(f'{width:.2f}' for width in widths)} times the stated "
            "value in different samples."
        )
    priors = "; ".join(dict.fromkeys(method.prior for method in methods))
    return f"""\
{counts} with *brainprior* {versions},
a BIDS App [@bids] on Nipype {_version("nipype")} [@nipype], nibabel {_version("nibabel")} and
PyTorch {_version("torch")}.

Each scan was reoriented to the closest-canonical axis order without resampling.
{_anatomy(methods)}
{_bias(methods)}{_aligned(methods)}{spaces}{hidden}

The scan was modelled as *y* = *b* (*A* *x*) + noise, where *x* is the unknown 1 mm image of the
brain, *A* is the linear operator of the slice profile and the in-plane voxels of the scan, and
*b* is the bias field. {start} the posterior of *x* under a three-dimensional diffusion prior
[@edm] [@brain3d] (weights {priors}), {drawn}{spread}
The random seed of every scan is recorded in the provenance.
"""


def _missing(methods: Sequence[Method]) -> str:
    """The sentences on voxels under a lesion mask."""
    masked = [method for method in methods if "inpaint" in method.task]
    if not masked:
        return ""
    given = ["its surroundings"]
    given += ["the other runs"] * any(method.runs > 1 for method in masked)
    given += ["the other tool's image"] * any("refine" in method.task for method in masked)
    text = (
        "\n\nVoxels under a lesion mask were treated as missing data: they were excluded from the "
        "estimate of the\nbias field and from the likelihood below, and the brain there was "
        f"estimated conditional on {_listed(given)}."
    )
    if any("restore" not in method.task for method in masked):
        text += (
            "\nIn scans that were inpainted but not restored, every voxel outside the mask was "
            "left unchanged."
        )
    return text


def _refined(methods: Sequence[Method]) -> str:
    """The sentence on another tool's image."""
    alone = {method.task == "refine" for method in methods if "refine" in method.task}
    if not alone:
        return ""
    ways = ["in place of the scan, without a bias field"] * (True in alone)
    ways += ["together with the scan"] * (False in alone)
    return (
        "\n\nAnother tool's image *z* entered the model as *z* = *x* + white noise of known "
        f"standard deviation,\n{' or '.join(ways)}."
    )


def _listed(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _drawn(methods: Sequence[Method]) -> str:
    """The sentences on samples and estimate, per group of scans if they differ."""
    ways: dict[tuple[str, int, int], list[str]] = {}
    for method in methods:
        ways.setdefault((method.sampler, method.n_samples, method.calls), []).append(method.suffix)
    sentences = [
        (
            _sampling(sampler, n, calls),
            f"{_listed([f'{suffixes.count(s)} {s}' for s in dict.fromkeys(suffixes)])} "
            f"{'scan' if len(suffixes) == 1 else 'scans'}",
        )
        for (sampler, n, calls), suffixes in ways.items()
    ]
    if len(sentences) == 1:
        return sentences[0][0]
    return f"in {len(sentences)} ways. " + " ".join(f"For {who}, {how}" for how, who in sentences)


def _coarse(methods: Sequence[Method]) -> str:
    """The sentence on scans for which the coarse network was asked."""
    asked = [method.coarse for method in methods if method.coarse is not None]
    if not asked:
        return ""
    return (
        f" In {_scans(len(asked), methods)}, a second network, trained on brains averaged to 2 "
        "mm, took part where the first was given no measurements: at high noise, the means of "
        f"blocks of 2 mm were moved towards its own (weights {'; '.join(dict.fromkeys(asked))})."
    )


def _uncertainty(methods: Sequence[Method]) -> str:
    """The sentence on the uncertainty maps."""
    sources = {method.uncertainty_from for method in methods}
    predicted = (
        "predicted by the network from the scan, and calibrated on scans that were not used for "
        "training"
    )
    drawn = (
        "the voxelwise standard deviation of the samples (their variance was averaged with a "
        f"Gaussian of SD {registry.SMOOTHING_MM:g} mm)"
    )
    if sources >= {"prior", "samples"}:
        return f" The uncertainty map is {predicted}, or, for some images, {drawn}."
    if "prior" in sources:
        return (
            f" The uncertainty map is the posterior's voxelwise standard deviation, {predicted}."
        )
    return f" The uncertainty map is {drawn}." if "samples" in sources else ""


def _sampling(name: str, n_samples: int, calls: int) -> str:
    """One sampler and its estimate; for "auto" (before a run), both possible samplers."""
    facts, other = registry.find(name), registry.FALLBACK
    method, estimate = facts.method, facts.estimate_method
    if name == "auto":
        method += f" (thick slices and 3-D scans), or {other.method} (all other scans)"
        estimate += f" For all other scans: {other.estimate_method}"
    if not facts.yields_samples:
        return f"{method}. {estimate}"
    samples = "1 sample" if n_samples == 1 else f"{n_samples} samples"
    return f"{method} ({samples}, {calls} network calls each). {estimate}"


def _bias(methods: Sequence[Method]) -> str:
    """The sentence on the bias field; an image that is refined alone has none."""
    if all(method.task == "refine" for method in methods):
        return ""
    return (
        f"The bias field was estimated by N4 [@n4] (SimpleITK {_version('SimpleITK')}) inside "
        "the mask.\n" + _slice_gains(methods) + _interleaves(methods)
    )


def _scans(count: int, methods: Sequence[Method]) -> str:
    return "this scan" if len(methods) == 1 else f"{count} of the {len(methods)} scans"


def _reduced(methods: Sequence[Method]) -> str:
    """The sentence on interpolated scans that were reduced to the measured voxels."""
    count = sum(method.reduced for method in methods)
    if not count:
        return ""
    scans = _scans(count, methods).capitalize()
    return (
        f"\n\n{scans} had been interpolated to smaller voxels. The voxel size of the measurement "
        "was estimated\nfrom the power spectrum inside the head (or specified), and the image was "
        "reduced to it by a crop of its cosine\nspectrum before any other step."
    )


def _slice_gains(methods: Sequence[Method]) -> str:
    """The sentence on scans whose slice gains were corrected."""
    count = sum(method.slice_gains for method in methods)
    if not count:
        return ""
    scans = _scans(count, methods)
    return (
        f"In {scans}, the brightness of single slices differed; one gain per slice was estimated "
        "from matched tissue\nin neighbouring slices, and became part of the bias field.\n"
    )


def _interleaves(methods: Sequence[Method]) -> str:
    """The sentence on scans whose displaced interleaves were registered."""
    count = sum(method.interleaves for method in methods)
    if not count:
        return ""
    scans = _scans(count, methods)
    return (
        f"In {scans}, the participant had moved between packages of interleaved slices; these "
        "were registered rigidly\nand entered the restoration as separate observations. The "
        "restored image shows the brain in the mean\nof their positions.\n"
    )


def _aligned(methods: Sequence[Method]) -> str:
    """The sentences on the transforms to MNI305."""
    fitted = [method.aligned_by is AffineMethod.STRUCTURES for method in methods]
    sentences = []
    if any(fitted):
        sentences.append(
            "An affine transform to MNI305 was fitted by weighted least squares to the centres "
            "of the\nstructures and to the extent of the brain mask."
        )
    if not all(fitted):
        which = "For the other scans" if any(fitted) else "An affine transform to MNI305"
        which += " it was estimated" if any(fitted) else " was estimated"
        way = AffineMethod.TEMPLATE.words
        sentences.append(f"{which} by {way} (ANTsPy {_version('antspyx')}).")
    return "\n".join(sentences)


def _contrasts(methods: Sequence[Method]) -> str:
    """The sentence on rigid registration to another contrast of the session."""
    aligned: dict[str, list[str]] = {}
    for method in methods:
        if method.contrast is not None and method.contrast.to_reference is not None:
            aligned.setdefault(_suffix(method.contrast.reference), []).append(method.suffix)
    sentences = []
    for reference, suffixes in aligned.items():
        which = _listed([f"{suffixes.count(s)} restored {s}" for s in dict.fromkeys(suffixes)])
        was, their = ("was", "its") if len(suffixes) == 1 else ("were", "their")
        sentences.append(
            f"\n{which} {was} registered rigidly to the restored {reference} of {their} session\n"
            f"(mutual information, SimpleITK {_version('SimpleITK')})."
        )
    return "".join(sentences)


def _resampled(methods: Sequence[Method]) -> str:
    """The sentence on results on the grid of MNI305 or of the session's T1w."""
    ways = []
    if any(method.in_mni305 for method in methods):
        ways.append("to MNI305 through the affine")
    if any(_is_on_t1w(method) for method in methods):
        ways.append("to the grid of the session's T1w through the rigid transform")
    if not ways:
        return ""
    return (
        f"\nResults were also resampled {_listed(ways)}\n(each in one interpolation: images by "
        "cubic splines, uncertainty maps and masks linearly)."
    )


def _is_on_t1w(method: Method) -> bool:
    """Whether a contrast's images are also on the grid of its session's T1w."""
    return method.contrast is not None and _has_images(method.contrast.outputs, "T1w")


def _suffix(scan: str) -> str:
    return scan.rpartition("_")[2]


def _standard_spaces(methods: Sequence[Method]) -> str:
    """The sentences on nonlinear registration to templates."""
    used = [template for method in methods for template in method.templates]
    if not used:
        return ""
    spaces = _listed(list(dict.fromkeys(template.space for template in used)))
    programs = ", ".join(dict.fromkeys(str(template.program) for template in used))
    metrics = _listed(
        [
            f"{metric} ({_listed(list(dict.fromkeys(suffixes)))})"
            for metric in dict.fromkeys(str(template.metric) for template in used)
            if (suffixes := [m.suffix for m in methods for t in m.templates if t.metric == metric])
        ]
    )
    sentence = (
        f"\nRestored brains were registered to {spaces} (TemplateFlow [@templateflow]) by an "
        f"affine and\nsymmetric diffeomorphic registration (SyN [@syn], {programs}; metric: "
        f"{metrics}),\nstarting from the affine to MNI305."
    )
    if any(not method.templates and method.suffix != "T1w" for method in methods):
        sentence += (
            "\nOther contrasts were resampled through the rigid transform to the T1w of their "
            "session and the\ntransform of that T1w."
        )
    return sentence


def _anatomy(methods: Sequence[Method]) -> str:
    """The sentences on the sources of brain masks and structures."""
    sources = {
        "segmented the brain structures": [m.structures for m in methods],
        "provided the brain mask": [m.mask for m in methods],
    }
    own = [what for what, origins in sources.items() if any(o.embedded for o in origins)]
    sentences = []
    if own:
        networks = "; ".join(
            dict.fromkeys(
                m.parcellation for m in methods if m.structures.embedded or m.mask.embedded
            )
        )
        sentences.append(
            "A convolutional network trained on synthetic images generated from label maps, "
            f"following SynthSeg [@synthseg], {' and '.join(own)} (weights {networks})."
        )
    for what, origins in zip(("Structures", "Brain masks"), sources.values(), strict=True):
        others = sorted({origin.data_set for origin in origins if not origin.embedded})
        if others:
            some = " of some scans" if any(origin.embedded for origin in origins) else ""
            sentences.append(f"{what}{some} were taken from {'; '.join(others)}.")
    return "\n".join(sentences)


def write_citation(folder: Path, methods: Sequence[Method]) -> list[Path]:
    """Write ``CITATION.md``, ``.html``, ``.tex`` and ``.bib``.

    Parameters
    ----------
    folder : Path
        ``logs`` of the output folder, which has the records of aligned contrasts.
    methods : sequence of Method
    """
    text = methods_text(with_contrasts(methods, folder.parent))
    cited = set(CITATION.findall(text))
    bib = "\n".join(entry for key, entry in bibtex().items() if key in cited)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8" />'
        f"<title>brainprior: methods</title></head><body>\n{to_html(text)}</body></html>\n"
    )
    return [
        write_text(folder / "CITATION.md", f"{text}\n## References\n\nSee CITATION.bib.\n"),
        write_text(folder / "CITATION.html", page),
        write_text(folder / "CITATION.tex", to_tex(text)),
        write_text(folder / "CITATION.bib", bib),
    ]


def to_html(text: str) -> str:
    """Paragraphs with numbered citations, and the list of references."""
    order = list(dict.fromkeys(CITATION.findall(text)))
    body = CITATION.sub(lambda m: f"[{order.index(m[1]) + 1}]", html.escape(text.strip()))
    body = re.sub(r"\*(.+?)\*", r"<em>\1</em>", body)
    paragraphs = "".join(f"<p>{part}</p>\n" for part in body.split("\n\n"))
    return paragraphs + (html_list(order) if order else "")


def to_tex(text: str) -> str:
    """A fragment for ``\\\\input``, with ``\\\\cite`` commands."""
    for plain, escaped in (("%", r"\%"), ("&", r"\&"), ("_", r"\_"), ("…", r"\ldots{}")):
        text = text.replace(plain, escaped)
    text = re.sub(r"\*(.+?)\*", r"\\emph{\1}", text)
    return CITATION.sub(r"\\cite{\1}", text)


def _version(package: str) -> str:
    return version(package)
