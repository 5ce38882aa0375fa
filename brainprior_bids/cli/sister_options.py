# SPDX-License-Identifier: Apache-2.0
"""Options of fMRIPrep, sMRIPrep, MRIQC and QSIPrep that brainprior lacks: what to do instead.

docs/comparison.md lists why each is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_SURFACES = "brainprior reconstructs no surfaces and needs no FreeSurfer licence: leave it out"
_FUNCTIONAL = "brainprior processes no functional or diffusion images: leave it out"
_ALONE = "brainprior restores every scan on its own: leave it out"
_LAYOUT = "brainprior has one layout of its output and one report per participant: leave it out"
_SENDS_NOTHING = "brainprior sends nothing anywhere: leave it out"
_ANTS = "brainprior's registrations have fixed settings: leave it out"
_MEMORY = "use --mem with a unit, such as --mem 8G"
_PROCESSORS = "use --nprocs for all processors and --omp-nthreads for one step"
_PART = "use --participant-label"

OPTIONS = {
    _SURFACES: "--fs-license-file --fs-no-reconall --no-fs-reconall --fs-subjects-dir "
    "--fs-no-resume --fs-reuse-base --submm-recon --no-submm-recon --msm --no-msm --cifti-output "
    "--medial-surface-nan --project-goodvoxels --track-sessions",
    _FUNCTIONAL: "-t --task-id --echo-idx --dummy-scans --use-syn-sdc --force-syn --bold2anat-dof "
    "--bold2anat-init --bold2t1w-dof --bold2t1w-init --force-bbr --force-no-bbr --slice-time-ref "
    "--me-output-echos --me-t2s-fit-method --return-all-components --fd-spike-threshold "
    "--dvars-spike-threshold --fmap-bspline --fmap-no-demean --fallback-total-readout-time "
    "--output-resolution --denoise-method --min-dwi-length --min-bold-length --fd_thres "
    "--fft-spikes-detector --despike --start-idx --stop-idx",
    "brainprior's --force takes no value: it processes finished scans again": "bbr no-bbr syn-sdc "
    "fmap-jacobian",
    _LAYOUT: "--output-layout --aggregate-session-reports --verbose-reports",
    "brainprior processes anatomical images only: leave it out": "--anat-only",
    "brainprior has one level of processing: leave it out": "--level",
    _ALONE: "--longitudinal",
    f"{_ALONE}, or use --export-per session with --export fmriprep": (
        "--subject-anatomical-reference"
    ),
    "use --skull-strip embedded or --skull-strip skip": "--skull-strip-t1w",
    "brainprior needs no template for skull-stripping: leave it out": "--skull-strip-template",
    "every step has a fixed seed, see --random-seed: leave it out": "--skull-strip-fixed-seed",
    _ANTS: "--ants-float --ants-settings",
    _MEMORY: "--mem_gb --mem-gb",
    _PROCESSORS: "--n_procs --n-procs -n-cpus --nthreads-per-node --ants-nthreads",
    _PART: "--participant-labels --participant_labels",
    "remove the folder of --bids-database-dir yourself": "--bids-database-wipe",
    "the methods text needs no pandoc here: leave it out": "--md-only-boilerplate",
    _SENDS_NOTHING: "--track-carbon --country-code --no-sub --email --webapi-url --webapi-port "
    "--upload-strict",
    "use --sloppy": "--testing",
    "use --debug": "--pdb",
    "use --resource-monitor": "--profile",
    "crash files are always text: leave it out": "--crashfile-format",
    "images are always float32: leave it out": "-f --float32",
    "brainprior downloads nothing: leave it out": "--no-datalad-get",
    "brainprior is for human brains: leave it out": "--species",
    "the data set's name is that of its dataset_description.json: leave it out": "--dsname",
    "results keep the scan's own frame, tilted or not: leave it out": "--deoblique",
}
"""What to do -> options, separated by blanks."""
HINTS = {option: hint for hint, options in OPTIONS.items() for option in options.split()}
FAMILIES = {"--fs-": _SURFACES, "--me-": _FUNCTIONAL, "--fmap-": _FUNCTIONAL}
"""Beginnings of options that later versions may add."""


def advice(unknown: Sequence[str], known: Iterable[str]) -> list[str]:
    """One line for each unknown option: a hint, or options with a similar spelling.

    Parameters
    ----------
    unknown : sequence of str
        Words that the parser did not recognise; values among them are ignored.
    known : iterable of str
        Existing options.
    """
    options = list(known)
    lines = []
    for word in unknown:
        option = word.partition("=")[0]
        family = next((hint for start, hint in FAMILIES.items() if option.startswith(start)), None)
        if hint := HINTS.get(option, family):
            lines.append(f"{option}: {hint}.")
        elif option.startswith("--") and (
            near := get_close_matches(option, options, n=2, cutoff=0.75)
        ):
            lines.append(f"{option}: did you mean {' or '.join(near)}?")
    return lines
