# SPDX-License-Identifier: Apache-2.0
"""Checks before the first step: the data set, the weights, the work folder."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from brainprior_bids.bids.claims import Claims
from brainprior_bids.bids.query import Scan
from brainprior_bids.bids.validate import Issue, find_validator, validate_scans
from brainprior_bids.engine.errors import UsageError, WeightsError, is_full
from brainprior_bids.run.logs import LOG
from brainprior_bids.settings import Settings

ENCODING = ("INVALID_JSON_ENCODING", "JSON_INVALID")
"""The validator's code for a sidecar that is not UTF-8."""


def open_claims(settings: Settings) -> Claims:
    """Claims for the folders of a run; creates the lock files.

    Raises
    ------
    UsageError
        If one of the folders cannot be written.
    """
    exports = [Path(root) for root in settings.exports.values()]
    try:
        return Claims([settings.output_dir / "logs", settings.work_dir, *exports])
    except OSError as error:
        what = "Make room" if is_full(error) else "Check its permissions"
        raise UsageError(
            f"{error.filename or settings.work_dir} cannot be created or written "
            f"({error.strerror}). {what}, or choose another folder (--work-dir, output_dir, "
            "--export)."
        ) from error


def folders_of_temporaries(settings: Settings, subjects: Collection[str]) -> list[Path]:
    """Folders in which a killed run may have left temporary files."""
    out = settings.output_dir
    logs = [out / "logs", out / "logs" / "scans", out / "logs" / "participants"]
    own = [path for subject in subjects for path in (out / f"sub-{subject}" / "log").glob("*")]
    roots = [Path(root) for root in settings.exports.values()]
    exported = [path for root in roots for path in (root, root / "code")]
    return [out, *logs, out / "prov", *own, *exported, settings.work_dir / "home"]


def clean_work_dir(work_dir: Path, claims: Claims) -> None:
    """Remove brainprior's files from a work folder, except those that another process uses."""
    graph = work_dir / "brainprior_wf"
    with claims.alone() as alone:
        if alone:
            for left in (graph, work_dir / "home", *work_dir.glob("validate-*")):
                shutil.rmtree(left, ignore_errors=True)
            return
    LOG.warning("--clean-workdir: another process uses %s; its files are kept", work_dir)
    for scan in graph.glob("*_wf"):
        if claims.is_free(scan.name.removesuffix("_wf")):
            shutil.rmtree(scan, ignore_errors=True)


def validate_request(scans: Sequence[Scan], settings: Settings) -> Sequence[Scan]:
    """Run the BIDS validator on the requested part, if it is installed.

    Returns
    -------
    The scans; those affected by an error in their participant's folder have a ``problem``.

    Raises
    ------
    UsageError
        With its errors in files that all participants share.
    """
    command = find_validator()
    if command is None:
        LOG.warning("bids-validator-deno is not installed: the data set was not validated.")
        return scans
    try:
        issues = validate_scans(
            settings.bids_dir, scans, command=command, scratch=settings.work_dir
        )
    except RuntimeError as error:
        LOG.warning("%s The data set was not validated.", error)
        return scans
    return with_problems(scans, issues, settings.bids_dir)


def with_problems(
    scans: Sequence[Scan], issues: Sequence[Issue], bids_dir: Path
) -> Sequence[Scan]:
    """The scans; errors of the validator in a scan's folder become its ``problem``.

    Raises
    ------
    UsageError
        With the errors that are in no participant's folder.
    """
    runs = [(scan, run) for scan in scans for run in scan.runs or (scan,)]
    images = {f"/{run.relative}": scan for scan, run in runs}
    broken = {issue.location for issue in issues} & set(images)
    by_sidecar = {f"{_stem(image)}.json": image for image in images}
    fatal: list[Issue] = []
    problems: dict[str, str] = {}
    for issue in issues:
        image = by_sidecar.get(issue.location, issue.location)
        own = images.get(image)
        if own is not None and (
            # a broken image is reported when it is opened; its sidecar then has no image
            image in broken
            or own.problem is not None
            or (own.warnings and issue.code in ENCODING)  # it could be read nevertheless
        ):
            LOG.warning("validator: %s", issue)
            continue
        if not issue.location.startswith("/sub-"):
            fatal.append(issue)
            continue
        folder = f"{issue.location.rpartition('/')[0]}/"
        concerned = [own] if own else [s for i, s in images.items() if i.startswith(folder)]
        for scan in concerned:
            problems.setdefault(
                scan.name.stem,
                f"{scan.name.stem}: not valid BIDS: {issue}. Repair it, or pass "
                "--skip-bids-validation.",
            )
        if not concerned:
            LOG.warning("validator: %s", issue)
    if fatal:
        shown = "\n".join(f"  {issue}" for issue in fatal[:10])
        raise UsageError(
            f"{bids_dir} is not valid BIDS, {len(fatal)} error(s) in files that all "
            f"participants share:\n{shown}\nRepair them, or pass --skip-bids-validation."
        )
    return [replace(scan, problem=scan.problem or problems.get(scan.name.stem)) for scan in scans]


def _stem(path: str) -> str:
    return path.removesuffix(".gz").removesuffix(".nii")


def checked_weights(settings: Settings) -> dict[str, tuple[Path, str]]:
    """Role -> file and SHA-256 of the weights, checked before anything runs."""
    from brainprior_bids.engine import weights

    prior = settings.prior or weights.FOLDER / "prior.safetensors"
    coarse = weights.FOLDER / "coarse.safetensors"
    parcellation = weights.FOLDER / "parcellation.safetensors"
    try:  # as the steps will load them
        return {
            "prior": (prior, weights.load_prior(prior, coarse=False).metadata["sha256"]),
            "coarse": (coarse, weights.load_coarse(coarse).prior.metadata["sha256"]),
            "parcellation": (
                parcellation, weights.load_parcellation(parcellation).metadata["sha256"]
            ),
        }  # fmt: skip
    except WeightsError as error:
        raise UsageError(str(error)) from error
