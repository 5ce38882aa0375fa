# SPDX-License-Identifier: Apache-2.0
"""The embedded parcellation of whole brains, degraded and restored."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from brainprior_bids.evaluation.protocol import Condition
from brainprior_bids.evaluation.studies.base import Source, Study
from brainprior_bids.evaluation.studies.restoration import (
    REFERENCE,
    base_condition,
    measure,
    width_of,
)
from brainprior_bids.evaluation.summary import (
    NAMES,
    Record,
    condition_key,
    groups_of,
    mean_sd,
    settings,
    title,
)


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Condition]]:
    """One scan of each of the first participants and label maps."""
    base = base_condition(options, "segmentation")
    test_sources = [source for source in sources if not source.choosing]
    for n, source in enumerate(test_sources[: options.segmentation_participants]):
        changed = {**REFERENCE, "crop_mm": None, "segment": True}
        yield source, replace(base, width=width_of(options, n), **changed)


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """For every condition one row per image."""
    text = [settings(records)]
    for group in groups_of(records, condition_key):
        text += ["", f"{title(group[0], len(group))}.", "", *segmentation_table(group)]
    return text


def segmentation_table(group: Sequence[Record]) -> list[str]:
    """One row per image for the records of one condition, after a line with the reference."""
    what = "the label map" if group[0]["synthetic"] else "that of the truth"
    text = [f"The embedded parcellation of every image against {what}.", ""]
    text += ["| | mean Dice | cortex | white matter | ventricles | volume error, % |"]
    text += ["|---" * 6 + "|"]
    for method in ("true", "degraded", "cubic", "tv", "restored", "sample"):
        if method not in group[0]["segmentation"]:
            continue
        rows = [r["segmentation"][method] for r in group]
        cells = [mean_sd([row["mean_dice"] for row in rows], 3)]
        for pair in (("3", "42"), ("2", "41"), ("4", "43")):
            known = [[row["dice"][i] for i in pair if i in row["dice"]] for row in rows]
            cells.append(mean_sd([float(np.mean(values)) for values in known if values], 3))
        errors = [100 * row["mean_absolute_volume_error"] for row in rows]
        text.append(f"| {NAMES[method]} | " + " | ".join(cells) + f" | {mean_sd(errors, 1)} |")
    return text


STUDY = Study(
    "segmentation",
    cases,
    measure,
    table,
    defaults={"n_samples": 2},
    quick={"n_samples": 1},
    tuned=True,
)
