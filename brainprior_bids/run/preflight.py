# SPDX-License-Identifier: Apache-2.0
"""What is looked at before the first step: the data set, the weights, the work folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from brainprior_bids.bids.query import Scan
from brainprior_bids.bids.validate import find_validator, validate_scans
from brainprior_bids.engine.errors import UsageError, WeightsError
from brainprior_bids.run.logs import LOG
from brainprior_bids.settings import Settings


def clean_work_dir(work_dir: Path) -> None:
    """Remove what brainprior makes in a work folder, and nothing else."""
    for name in ("brainprior_wf", "home"):
        shutil.rmtree(work_dir / name, ignore_errors=True)
    for left in work_dir.glob("validate-*"):
        shutil.rmtree(left, ignore_errors=True)


def validate_request(scans: Sequence[Scan], settings: Settings) -> None:
    """Run the BIDS validator on what was asked for, if it is installed.

    Raises
    ------
    UsageError
        With its errors, except those of a single image: they are that scan's failure.
    """
    command = find_validator()
    if command is None:
        LOG.warning("bids-validator-deno is not installed: the data set was not validated.")
        return
    try:
        issues = validate_scans(
            settings.bids_dir, scans, command=command, scratch=settings.work_dir
        )
    except RuntimeError as error:
        LOG.warning("%s The data set was not validated.", error)
        return
    # an image that is broken is that scan's own matter, and so is its sidecar without an image
    broken = {issue.location for issue in issues} & {f"/{scan.relative}" for scan in scans}
    stems = {location.removesuffix(".gz").removesuffix(".nii") for location in broken}
    own = broken | {f"{stem}.json" for stem in stems}
    for issue in issues:
        if issue.location in own:
            LOG.warning("validator: %s", issue)
    fatal = [issue for issue in issues if issue.location not in own]
    if fatal:
        shown = "\n".join(f"  {issue}" for issue in fatal[:10])
        raise UsageError(
            f"{settings.bids_dir} is not valid BIDS, {len(fatal)} error(s) in what was asked "
            f"for:\n{shown}\nRepair them, or pass --skip-bids-validation."
        )


def checked_weights(settings: Settings) -> dict[str, tuple[Path, str]]:
    """Role -> file and SHA-256 of the weights, checked before anything runs."""
    from brainprior_bids.engine import weights

    paths = {
        "prior": settings.prior or weights.FOLDER / "prior.safetensors",
        "parcellation": weights.FOLDER / "parcellation.safetensors",
    }
    checked = {}
    for kind, path in paths.items():
        try:
            _, metadata = weights.read_weights(path, kind=kind)
        except WeightsError as error:
            raise UsageError(str(error)) from error
        checked[kind] = (path, metadata["sha256"])
    return checked
