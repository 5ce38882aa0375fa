# SPDX-License-Identifier: Apache-2.0
"""The studies of ``brainprior evaluate``, one module each; modules are imported when needed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brainprior_bids.evaluation.studies.base import Study

STUDIES = (
    "restoration", "low-field", "ablation", "samplers", "segmentation", "downstream", "coverage",
    "hallucination", "uncertainty", "peers", "samples", "lesions", "heads", "inpaint", "fuse",
    "refine", "motion", "alignment",
)  # fmt: skip
"""Names, in the order of the tables."""


def find(name: str) -> Study:
    """The study of that name, one of ``STUDIES``."""
    study: Study = import_module(f"{__name__}.{name.replace('-', '_')}").STUDY
    return study
