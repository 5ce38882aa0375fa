# SPDX-License-Identifier: Apache-2.0
"""HeuDiConv heuristic: which series are a T1w, a T2w or a FLAIR. See docs/dicom.md."""

from __future__ import annotations

from typing import Any

SUFFIXES = {"t1": "T1w", "t2": "T2w", "flair": "FLAIR"}
"""Beginning of the protocol's name -> BIDS suffix. Edit this for your scanner."""

Key = tuple[str, tuple[str, ...], None]


def infotodict(seqinfo: list[Any]) -> dict[Key, list[str]]:
    """File name -> series, from the list of all series of one session."""
    info: dict[Key, list[str]] = {}
    for series in seqinfo:
        if "DERIVED" in series.image_type:  # reformats and averages: restore the measured slices
            continue
        for start, suffix in SUFFIXES.items():
            if series.protocol_name.lower().startswith(start):
                name = f"sub-{{subject}}/anat/sub-{{subject}}_run-{{item:02d}}_{suffix}"
                info.setdefault((name, ("nii.gz",), None), []).append(series.series_id)
    return info
