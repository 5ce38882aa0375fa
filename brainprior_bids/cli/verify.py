# SPDX-License-Identifier: Apache-2.0
"""``brainprior verify``: compare files with the hashes in the provenance."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from brainprior_bids.engine.errors import UsageError


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``brainprior verify``."""
    parser = argparse.ArgumentParser(
        prog="brainprior verify",
        description="Compare every output, and every input that is still in its place, with the "
        "SHA-256 in the provenance; exit with status 1 if one is changed or missing.",
    )
    parser.add_argument(
        "output_dir", type=Path, help="output folder of a run, or a data set of --export"
    )
    return parser


def verify(argv: Sequence[str]) -> int:
    """Print every change; returns 1 if there is one."""
    options = build_parser().parse_args(list(argv))
    from brainprior_bids.bids.provenance import verify_export, verify_records

    report = verify_records(options.output_dir)
    if not report.outputs:
        report = verify_export(options.output_dir)
    if not report.outputs:
        raise UsageError(
            f"{options.output_dir} has no provenance to verify: expected an output folder "
            "(prov/*_io.json), or a data set of --export."
        )
    for address, what in report.changes.items():
        print(f"{what}\t{address}")
    for address in report.out_of_reach:
        print(f"not checked\t{address}")
    print(
        f"{report.outputs} output(s) and {report.inputs} input(s) checked, {len(report.changes)} "
        "changed or missing."
    )
    return 1 if report.changes else 0
