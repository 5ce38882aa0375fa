# SPDX-License-Identifier: Apache-2.0
"""The inputs that determine a scan's result: whether they have changed, and which ones.

A finished scan is skipped only if every part is unchanged: the version and the code that computes
results, the image, its metadata, the settings, both networks' weights, and files from other data
sets. The parts are in the scan's summary, so that a later run can report which of them changed.
Device and number of threads are not included: they change the last bits only, and are recorded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from brainprior_bids import __version__
from brainprior_bids.bids.query import Scan
from brainprior_bids.settings import Settings

PACKAGE = Path(__file__).parents[1]
COMPUTES = ("engine", "anatomy", "interfaces", "data/mni305_centroids.json", "data/structures.tsv")
"""Packages and data that determine results; reports and records need no new restoration."""
WIRING = "brainprior_bids.workflows.scan"
"""The graph of a scan; in a checkout it is in another folder."""
SHOWN = 40
"""Values up to this length are stored, longer ones are replaced by their SHA-256."""


@cache
def code_version() -> str:
    """The version, and a SHA-256 over the source that computes results.

    The version is not sufficient: it does not change when a checkout is updated.
    """
    digest = hashlib.sha256()
    for name in COMPUTES:
        source = PACKAGE / name
        for path in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    wiring = find_spec(WIRING)
    digest.update(Path(str(getattr(wiring, "origin", None))).read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def decisive(
    scan: Scan,
    settings: Settings,
    *,
    input_sha256: str,
    weights: Mapping[str, str],
    given: Mapping[str, str],
) -> dict[str, str]:
    """Everything that determines a scan's result: name in messages -> value.

    Parameters
    ----------
    input_sha256 : str
        SHA-256 of the image.
    weights : role -> SHA-256
        Weights of the prior and of the parcellation network.
    given : role -> SHA-256
        Files from other data sets, the lesion mask, and fused runs.
    """
    return {
        "program": code_version(),
        "image": input_sha256,
        **{f"metadata {key}": short(value) for key, value in scan.metadata.items()},
        **{f"setting {key}": short(value) for key, value in settings.scan_settings().items()},
        **{f"weights of {role}": digest for role, digest in weights.items()},
        **dict(given),
    }


def short(value: Any) -> str:
    """A value as JSON; its SHA-256 if it is long."""
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= SHOWN else hashlib.sha256(text.encode()).hexdigest()


def fingerprint(scan: Scan, parts: Mapping[str, str]) -> str:
    """SHA-256 over a scan's name and its ``decisive`` parts."""
    text = json.dumps([scan.name.stem, dict(parts)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changes(before: Mapping[str, str] | None, now: Mapping[str, str]) -> str:
    """The differences, for a message: ``setting n_samples (2, now 4), weights of prior``."""
    if not before:
        return "unknown, as its inputs were not recorded"
    differences = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        values = [value for value in (old, new) if value is not None]
        plain = key.startswith(("metadata", "setting")) and max(map(len, values)) <= SHOWN
        if plain:
            differences.append(f"{key} ({old or 'absent'}, now {new or 'absent'})")
        else:
            differences.append(key)
    return ", ".join(differences)
