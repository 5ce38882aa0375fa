# SPDX-License-Identifier: Apache-2.0
"""Options of fMRIPrep, sMRIPrep, MRIQC and QSIPrep that brainprior lacks: what to do instead.

docs/comparison.md lists why each is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_SURFACES = "brainprior makes no surfaces and needs no FreeSurfer licence: leave it out"
_FUNCTIONAL = "brainprior processes no functional or diffusion images: leave it out"
_ALONE = "brainprior restores every scan on its own: leave it out"
_LAYOUT = "brainprior has one layout of its output and one report per participant: leave it out"
_SENDS_NOTHING = "brainprior sends nothing anywhere: leave it out"
_MEMORY = "use --mem with a unit, such as --mem 8G"
_PROCESSORS = "use --nprocs for all processors and --omp-nthreads for one step"

HINTS = {
    "--fs-license-file": _SURFACES,
    "--fs-no-reconall": _SURFACES,
    "--no-fs-reconall": _SURFACES,
    "--fs-subjects-dir": _SURFACES,
    "--fs-no-resume": _SURFACES,
    "--fs-reuse-base": _SURFACES,
    "--submm-recon": _SURFACES,
    "--no-submm-recon": _SURFACES,
    "--msm": _SURFACES,
    "--no-msm": _SURFACES,
    "--cifti-output": _SURFACES,
    "--output-layout": _LAYOUT,
    "--aggregate-session-reports": _LAYOUT,
    "--verbose-reports": _LAYOUT,
    "--anat-only": "brainprior processes anatomical images only: leave it out",
    "--level": "brainprior has one level of processing: leave it out",
    "--longitudinal": _ALONE,
    "--subject-anatomical-reference": f"{_ALONE}, or use --export-per session with --export "
    "fmriprep",
    "--skull-strip-t1w": "use --skull-strip embedded or --skull-strip skip",
    "--skull-strip-template": "brainprior needs no template for skull-stripping: leave it out",
    "--skull-strip-fixed-seed": "every step has a fixed seed, see --random-seed: leave it out",
    "--task-id": _FUNCTIONAL,
    "--echo-idx": _FUNCTIONAL,
    "--dummy-scans": _FUNCTIONAL,
    "--use-syn-sdc": _FUNCTIONAL,
    "--bold2anat-dof": _FUNCTIONAL,
    "--bold2anat-init": _FUNCTIONAL,
    "--bold2t1w-dof": _FUNCTIONAL,
    "--slice-time-ref": _FUNCTIONAL,
    "--output-resolution": _FUNCTIONAL,
    "--denoise-method": _FUNCTIONAL,
    "--mem_gb": _MEMORY,
    "--mem-gb": _MEMORY,
    "--n_procs": _PROCESSORS,
    "--n-procs": _PROCESSORS,
    "--nthreads-per-node": _PROCESSORS,
    "--ants-nthreads": _PROCESSORS,
    "--participant-labels": "use --participant-label",
    "--participant_labels": "use --participant-label",
    "--bids-database-wipe": "remove the folder of --bids-database-dir yourself",
    "--md-only-boilerplate": "the methods text needs no pandoc here: leave it out",
    "--track-carbon": _SENDS_NOTHING,
    "--country-code": _SENDS_NOTHING,
    "--no-sub": _SENDS_NOTHING,
    "--email": _SENDS_NOTHING,
    "--testing": "use --sloppy",
    "--float32": "images are always float32: leave it out",
    "--no-datalad-get": "brainprior fetches nothing: leave it out",
}
"""Option -> what to do."""


def advice(unknown: Sequence[str], known: Iterable[str]) -> list[str]:
    """One line for each unknown option: a hint, or options that are spelt like it.

    Parameters
    ----------
    unknown : sequence of str
        Words that the parser did not recognise; values among them are passed over.
    known : iterable of str
        Options that there are.
    """
    options = list(known)
    lines = []
    for word in unknown:
        option = word.partition("=")[0]
        if not option.startswith("--"):
            continue
        if option in HINTS:
            lines.append(f"{option}: {HINTS[option]}.")
        elif option.startswith("--fs-"):
            lines.append(f"{option}: {_SURFACES}.")
        elif near := get_close_matches(option, options, n=2, cutoff=0.75):
            lines.append(f"{option}: did you mean {' or '.join(near)}?")
    return lines
