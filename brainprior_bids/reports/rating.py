# SPDX-License-Identifier: Apache-2.0
"""The form with which a reader rates a scan in the report, and saves the rating as a file.

It works offline, from a local file; the browser keeps the entries. The fields of the saved file
are described in ``docs/outputs.md``.
"""

from __future__ import annotations

RATINGS = ("excellent", "acceptable", "poor", "exclude")
"""MRIQC's four ratings, best first."""
ARTEFACTS = {
    "motion": "motion: blur, or slices that do not match",
    "noise": "noise",
    "ghosts": "ghosts or interference",
    "brightness": "uneven brightness",
    "field-of-view": "the field of view cuts the brain or wraps around",
    "mask": "brain mask wrong",
    "structures": "labels of structures wrong",
    "alignment": "alignment to MNI305 wrong",
    "anatomy": "anatomy invented or lost by the restoration",
    "lesion": "lesion",
    "other": "other (say what in the comment)",
}
"""Value in the file -> text of the box."""
