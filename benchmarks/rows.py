# SPDX-License-Identifier: Apache-2.0
"""Shared by fused_samplers.py and interleaves.py: a record per participant, and the table.

A participant is not measured again if ``OUT/<participant>.json`` is from the same weights and
options. The table, ``OUT/table.md``, has the mean of each metric over the participants and the
95 % interval of a bootstrap over them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from brainprior_bids.engine.weights import find_weights, sha256_file
from brainprior_bids.evaluation import harness
from brainprior_bids.evaluation.protocol import Participant
from brainprior_bids.evaluation.studies.base import Source
from brainprior_bids.evaluation.summary import label_table

Rows = dict[str, dict[str, float]]
"""Label -> metric -> value."""
PATHS = ("out", "brains", "prior")
"""Options that do not affect the metrics of a record."""


def label_of(path: Path) -> str:
    """The participant's label, from ``sub-<label>_...``."""
    return path.name.partition("_")[0].removeprefix("sub-")


def participant(path: Path, args: argparse.Namespace) -> Participant:
    """The truth, with mask, bias field and unit from brainprior's preprocessing; prepared once."""
    source = Source(str(path), label_of(path), "T1w", synthetic=False, choosing=False)
    harness.prepare(source, args.out)
    return Participant.load(harness.participant_path(args.out, source))


def parser(description: str | None, *, n_samples: int) -> argparse.ArgumentParser:
    """The options that the scripts have in common."""
    common = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    common.add_argument("out", type=Path, help="folder of the records and of table.md")
    common.add_argument("brains", type=Path, nargs="+", help="1 mm T1w")
    common.add_argument("--prior", type=Path, help="weights; default: embedded")
    common.add_argument("--n-samples", type=int, default=n_samples)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--device", default="cpu")
    return common


def run(
    args: argparse.Namespace,
    one: Callable[[Path, argparse.Namespace], Rows],
    header: Sequence[str],
) -> None:
    """Measure all participants, then print the table.

    Parameters
    ----------
    one : function
        Measures a participant's rows.
    header : sequence of str
        Headings of the parts of a row's label, which are separated by " | ".
    """
    options = {key: value for key, value in vars(args).items() if key not in PATHS}
    weights = sha256_file(find_weights(args.prior, kind="prior"))
    mark = harness.fingerprint(options=options, prior=weights)
    records = []
    for path in args.brains:
        record = args.out / f"{label_of(path)}.json"
        if not harness.is_done(record, mark):
            harness.write(record, {"fingerprint": mark, "rows": one(path, args)})
        records.append(harness.read(record)["rows"])
        print(path.name, flush=True)
    text = "\n".join(
        [*label_table(records, header), "", f"Prior {weights[:12]} (start of SHA-256)."]
    )
    (args.out / "table.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
