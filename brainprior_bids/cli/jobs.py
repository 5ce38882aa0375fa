# SPDX-License-Identifier: Apache-2.0
"""Which scans need work, which are done, and which cannot be begun."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brainprior_bids.bids import export, status
from brainprior_bids.bids.claims import Claims
from brainprior_bids.bids.given import find_given
from brainprior_bids.bids.names import result_name, scan_seed
from brainprior_bids.bids.provenance import fingerprint, sha256_file
from brainprior_bids.bids.query import Scan
from brainprior_bids.cli.logs import LOG
from brainprior_bids.cli.outcome import write_failure
from brainprior_bids.engine.errors import InputError
from brainprior_bids.settings import Settings


def plan_jobs(
    scans: Sequence[Scan], settings: Settings, weights: dict[str, str], claims: Claims
) -> list[Any]:
    """The scans that need work, claimed for this process; the others get their summary here."""
    from brainprior_bids.workflows.scan import Job

    jobs = []
    to_fmriprep = (
        export.choose_t1w(scans, per=settings.export_per)
        if "fmriprep" in settings.exports
        else set()
    )
    _say_export(scans, settings, to_fmriprep)
    for scan in scans:
        if scan.problem is not None:
            write_failure(scan, settings, {"message": scan.problem, "type": "InputError"})
            continue
        try:
            input_sha256 = sha256_file(scan.path)
        except OSError as error:
            message = f"the file cannot be read ({error.strerror}). Check its permissions."
            write_failure(scan, settings, {"message": message, "type": "InputError"})
            continue
        try:
            given = find_given(scan.runs[0] if scan.runs else scan, settings)
            others = [(run, find_given(run, settings)) for run in scan.runs[1:]]
            given_sha256 = {role: sha256_file(file.path) for role, file in given.items()}
            for run, files in others:
                given_sha256 |= {
                    run.name.stem: sha256_file(run.path),
                    f"{run.name.stem} metadata": json.dumps(dict(run.metadata), sort_keys=True),
                    **{f"{run.name.stem} {r}": sha256_file(f.path) for r, f in files.items()},
                }
        except InputError as error:
            write_failure(scan, settings, {"message": str(error), "type": "InputError"})
            continue
        except OSError as error:
            message = f"{error.filename} cannot be read ({error.strerror}). Check its permissions."
            write_failure(scan, settings, {"message": message, "type": "InputError"})
            continue
        if not claims.take(scan.name.stem):
            LOG.error(
                "%s: another process is at work on it, in %s or in %s. It is left to that one.",
                scan.name.stem,
                settings.output_dir,
                settings.work_dir,
            )
            continue
        digest = fingerprint(
            scan, settings, input_sha256=input_sha256, weights=weights, given=given_sha256
        )
        previous = status.read_summary(settings.output_dir, result_name(scan.name, settings.image))
        roots = {
            kind: root
            for kind, root in settings.exports.items()
            if kind == "raw" or scan.name.stem in to_fmriprep
        }
        done = previous is not None and _is_done(previous, digest, settings)
        if done and not settings.force and not export.is_delivered(roots, scan, digest):
            LOG.info("%s: done, but not exported: it is run again for that", scan.name.stem)
        elif done and not settings.force:
            LOG.info("%s: already done with the same input and settings", scan.name.stem)
            previous.update(
                status="skipped",
                message="already done with the same input, settings and version",
            )
            status.write_summary(settings.output_dir, previous)
            if "fmriprep" in roots:  # an earlier export may have been one a session
                export.remove_others(
                    Path(roots["fmriprep"]),
                    scan.subject,
                    export.fmriprep_files(scan.name),
                    per=settings.export_per,
                )
            claims.give_back(scan.name.stem)
            continue
        seed = scan_seed(settings.random_seed, scan.name)
        jobs.append(Job(scan, seed, digest, given, tuple(roots), others))
    return jobs


def _say_export(scans: Sequence[Scan], settings: Settings, chosen: set[str]) -> None:
    """Which T1w goes to fMRIPrep, where there was a choice, and who has none."""
    if "fmriprep" not in settings.exports:
        return
    for stem in sorted(chosen):
        LOG.info("export fmriprep: %s in %s", stem, settings.exports["fmriprep"])
    without = {s.subject for s in scans} - {s.subject for s in scans if s.name.stem in chosen}
    for subject in sorted(without):
        LOG.warning("export fmriprep: sub-%s has no T1w, nothing is exported", subject)


def _is_done(previous: dict[str, Any], digest: str, settings: Settings) -> bool:
    return (
        previous.get("status") in status.FINISHED
        and previous.get("fingerprint") == digest
        and all(
            (settings.output_dir / path).is_file()
            for path in (*previous["outputs"], *previous["figures"])
        )
    )
