# SPDX-License-Identifier: Apache-2.0
"""Checks of options against each other, which the parser cannot make on one value alone."""

from __future__ import annotations

import argparse
import re
import reprlib
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from brainprior_bids.anatomy.templates import as_asked, find_template
from brainprior_bids.bids import patterns
from brainprior_bids.cli.options import WORK_DIR
from brainprior_bids.engine.errors import UsageError, WeightsError
from brainprior_bids.settings import (
    DEFAULT_SPACES,
    MODALITIES,
    OTHER_MODALITIES,
    SPACES,
    is_template,
)

_NO_SCANS = {
    "PDT2": "such a file contains two contrasts, PD and T2; each restoration takes one. Split it "
    "into a PDw and a T2w (fslsplit), and request those.",
    "MP2RAGE": "such a file is one inversion, without a contrast that the prior knows. Request "
    "the image that the scanner combines from both: UNIT1.",
    "SWI": "no suffix of a raw image in BIDS. Name the magnitude image T2starw (with part-mag, if "
    "there is a part-phase), and request that.",
}
"""Suffixes that users ask for, and what to ask for instead."""


def chosen_spaces(asked: Sequence[str]) -> tuple[str, ...]:
    """The spaces of ``--output-spaces``; the scan's own is always among them."""
    if not asked:
        return DEFAULT_SPACES
    templates = sorted({space for space in asked if is_template(space)})
    return (*(s for s in SPACES if s == "anat" or s in asked), *templates)


def chosen_modalities(asked: Sequence[str], ignored: Sequence[str]) -> tuple[str, ...]:
    """The contrasts of ``--modalities`` without those of ``--ignore``."""
    modalities = tuple(dict.fromkeys(asked)) or MODALITIES
    known = (*MODALITIES, *OTHER_MODALITIES)
    unknown = [suffix for suffix in modalities if suffix not in known]
    for suffix in unknown:
        if suffix in _NO_SCANS:
            raise UsageError(f"--modalities {suffix}: {_NO_SCANS[suffix]}")
    if unknown:
        raise UsageError(
            f"--modalities: no prior for {', '.join(unknown)}; use {', '.join(known)}."
        )
    left = tuple(suffix for suffix in modalities if suffix.lower() not in ignored)
    if not left:
        raise UsageError(
            f"--ignore {' '.join(ignored)} leaves nothing of {', '.join(modalities)} to process. "
            "Ignore less, or give other --modalities."
        )
    return left


def bare_labels(given: Sequence[str], prefix: str) -> tuple[str, ...]:
    """Labels without their prefix, each once."""
    return tuple(dict.fromkeys(label.removeprefix(prefix) for label in given))


def run_labels(given: Sequence[str]) -> tuple[str, ...]:
    """Runs without ``run-``; each a whole number."""
    runs = bare_labels(given, "run-")
    for run in runs:
        if not re.fullmatch("[0-9]{1,9}", run):
            raise UsageError(
                "--run-id: a run is a whole number of up to 9 digits such as 1 or 02, got "
                f"{reprlib.repr(run)}."
            )
    return runs


def check_task(options: argparse.Namespace, task: str) -> None:
    """Refuse options that this task does not use; every combination of its words is a task."""
    if options.output_grid == "native" and "restore" not in task:
        why = (
            "the result is on the scan's own grid already"
            if "inpaint" in task
            else "another tool's image replaces the scan, so there is no head for the brain"
        )
        raise UsageError(
            f"--output-grid native needs --task restore, not --task {task.replace('+', ' ')}: "
            f"{why}. Leave it out."
        )
    if "refine" in task:
        _check_refine(options, task)
    elif options.trust is not None:
        raise UsageError(f"--trust needs --task refine; the task is {task}. Leave it out.")
    if options.fuse:
        _check_fuse(options, task)
    if "inpaint" not in task:
        for option, value in (
            ("--lesion-mask", options.lesion_mask),
            ("--dilate", options.dilate_mm),
        ):
            if value:
                raise UsageError(
                    f"{option} needs --task inpaint; the task is {task}. Leave it out."
                )
    _check_pattern("--lesion-mask", options.lesion_mask)


def _check_fuse(options: argparse.Namespace, task: str) -> None:
    if task == "refine":
        raise UsageError(
            "--fuse combines several scans, and --task refine alone uses none: another tool's "
            "image replaces the scan. Use --task restore refine."
        )
    if options.sampler == "mean":
        raise UsageError(
            "--sampler mean: the calls of the network can be conditioned on only one "
            "scan; --fuse has several. Use --sampler conditional or exact."
        )
    if options.exports:
        raise UsageError(
            "--export inserts the brain into the head of its scan; a fused brain comes from "
            "several heads. Leave out --export or --fuse."
        )


def _check_refine(options: argparse.Namespace, task: str) -> None:
    if not options.derivatives:
        raise UsageError("--task refine needs the other tool's data set: --derivatives NAME=PATH.")
    if task == "refine" and options.exports:
        raise UsageError(
            "--export inserts the brain into the head of its scan, but with --task refine another "
            "tool's image replaces the scan. Use --task restore refine."
        )
    if options.trust is None:
        raise UsageError(
            "--task refine needs --trust. Give the SD of the image's error: 0.05 means 5 % of the "
            "brain's 99th percentile."
        )
    try:
        trust = float(options.trust)
    except ValueError:
        if task != "refine":
            raise UsageError(
                f"--task {task.replace('+', ' ')} takes one SD for all voxels, got --trust "
                f"{options.trust}: next to a scan, the error of the image must be white noise "
                "(the same SD everywhere) to be combined with the noisy image that is the "
                "network's input. Give a number."
            ) from None
        _check_pattern("--trust", options.trust)
    else:
        if not 0 < trust < float("inf"):
            raise UsageError(f"--trust: expected a number above 0, got {options.trust}.")


def _check_pattern(option: str, pattern: str | None) -> None:
    if pattern is None:
        return
    try:
        patterns.check(pattern)
    except ValueError as error:
        raise UsageError(
            f"{option} {pattern}: {error}; use a path with {{subject}}, {{session}}, "
            "{suffix} or {stem} in it, and * for any text."
        ) from error


def check_anatomy(options: argparse.Namespace) -> None:
    """Refuse options whose program or file is missing, before anything runs."""
    model = options.synthstrip_model
    for option, value in (("--skull-strip", "mask"), ("--parcellation", "derivatives")):
        if getattr(options, option[2:].replace("-", "_")) == value and not options.derivatives:
            raise UsageError(
                f"{option} {value}: expected --derivatives NAME=PATH with the data set that has "
                "it, got none. Add it."
            )
    if model is not None and not model.is_file():
        raise UsageError(f"--synthstrip-model {model}: no such file. Check the path.")
    if model is not None and options.skull_strip != "synthstrip":
        raise UsageError("--synthstrip-model needs --skull-strip synthstrip. Leave it out.")
    if options.skull_strip == "synthstrip" and not (
        shutil.which("mri_synthstrip") or (model and shutil.which("nipreps-synthstrip"))
    ):
        raise UsageError(
            "--skull-strip synthstrip: expected mri_synthstrip (FreeSurfer) on the PATH, or "
            "nipreps-synthstrip on it and --synthstrip-model FILE. Install one, or use "
            "--skull-strip embedded."
        )
    if options.parcellation == "synthseg" and not shutil.which("mri_synthseg"):
        raise UsageError(
            "--parcellation synthseg: mri_synthseg (FreeSurfer 7.3 or later) is not on the PATH. "
            "Install FreeSurfer, or use --parcellation embedded."
        )


def check_templates(spaces: Sequence[str]) -> None:
    """Refuse a standard space without its template, or without the program that registers to it.

    Raises
    ------
    UsageError
    """
    templates = [space for space in spaces if is_template(space)]
    if templates and find_spec("ants") is None:
        raise UsageError(
            f"--output-spaces {as_asked(templates[0])}: antspyx, which registers to the template, "
            "is not installed. Install it (pip install antspyx), or leave the space out."
        )
    for space in templates:
        template = find_template(space)
        size = template.grid.spacing_mm
        if max(abs(float(mm) - 1) for mm in size) > 0.01:
            raise UsageError(
                f"--output-spaces {as_asked(space)}: {template.image} has voxels of "
                f"{' x '.join(f'{mm:.3g}' for mm in size)} mm; only templates of 1 mm are used. "
                "Leave the space out."
            )


def check_paths(bids_dir: Path, output_dir: Path, work_dir: Path) -> None:
    """Refuse folders that would write into the raw data.

    Raises
    ------
    UsageError
    """
    raw, out, work = (path.resolve() for path in (bids_dir, output_dir, work_dir))
    if out == raw:
        raise UsageError(
            "output_dir is bids_dir: the raw data would be changed. Use, for example, "
            f"{bids_dir / 'derivatives' / 'brainprior'}."
        )
    derivatives = raw / "derivatives"
    if raw in out.parents and derivatives not in out.parents:
        raise UsageError(
            f"output_dir {output_dir} is inside bids_dir. Choose a folder outside of it, or "
            f"{derivatives}/NAME."
        )
    if (work == raw or raw in work.parents) and not (work == out or out in work.parents):
        raise UsageError(
            f"--work-dir {work_dir} is inside bids_dir. Choose a folder outside of it."
        )
    if work == out:
        raise UsageError(
            f"--work-dir is output_dir. Leave it out (it is then {WORK_DIR} inside, hidden), or "
            "choose another folder."
        )


def export_roots(
    asked: Sequence[tuple[str, str]], bids_dir: Path, output_dir: Path
) -> dict[str, str]:
    """Kind -> absolute root, each outside of the other data sets."""
    exports = {}
    for kind, folder in asked:
        root = Path(folder) if folder else output_dir.with_name(f"{output_dir.name}-{kind}")
        root = root.absolute()
        if not folder and root.parent == Path("/"):
            raise UsageError(
                f"--export {kind}: {root} would not be in a folder that a container mounts: its "
                f"files would be lost. Name a mounted folder: --export {kind}=/exports, or use an "
                "output_dir one level deeper."
            )
        folders = [bids_dir, output_dir, *map(Path, exports.values())]
        for other in (path.resolve() for path in folders):
            own = root.resolve()
            in_derivatives = bids_dir.resolve() / "derivatives" in own.parents
            clash = own == other or (other in own.parents and not in_derivatives)
            if clash or own in other.parents or output_dir.resolve() in own.parents:
                raise UsageError(
                    f"--export {kind}: {root} and {other} overlap. Give each export a separate "
                    f"folder: --export {kind}=DIR."
                )
        exports[kind] = str(root)
    return exports


def named_prior(asked: Path | None) -> Path | None:
    """The file of ``--prior``: a path, or a name recorded by `brainprior weights add`.

    Raises
    ------
    UsageError
        If it is neither.
    """
    if asked is None:
        return None
    from brainprior_bids.engine.weights import find_weights  # imports torch: only if needed

    try:
        return find_weights(asked, kind="prior")
    except WeightsError as error:
        raise UsageError(f"--prior {error}") from error
