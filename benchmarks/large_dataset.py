# SPDX-License-Identifier: Apache-2.0
"""Start-up and group level on many subjects: a skeleton of empty files, and copied summaries.

    python benchmarks/large_dataset.py --subjects 1000

Prints wall-clock seconds. The skeleton has two sessions, a T1w and a FLAIR in each, their
sidecars, and a bold run that must not be read.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from brainprior_bids.bids.query import find_scans
from brainprior_bids.bids.status import write_summary
from brainprior_bids.records import ScanRecord
from brainprior_bids.reports.group import build_group
from brainprior_bids.settings import Settings


def skeleton(root: Path, subjects: int) -> None:
    """Write the data set."""
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    for n in range(subjects):
        for session in "ab":
            folder = root / f"sub-{n:04d}" / f"ses-{session}"
            for name in ("anat/{}_T1w", "anat/{}_FLAIR", "func/{}_task-rest_bold"):
                path = folder / name.format(f"sub-{n:04d}_ses-{session}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_suffix(".nii.gz").touch()
                path.with_suffix(".json").write_text('{"SliceThickness": 5}')


def summaries(output_dir: Path, subjects: int) -> None:
    """Write one finished scan per subject, with varying metrics."""
    draw = random.Random(0)
    for n in range(subjects):
        table = [
            {"index": i, "name": f"{side}-{i}", "confidence": draw.uniform(0.6, 0.9),
             "volume_mm3": draw.uniform(3e4, 5e4)}
            for i in range(16) for side in ("Left", "Right")
        ]  # fmt: skip
        write_summary(
            output_dir,
            ScanRecord.from_json({
                "scan": f"sub-{n:04d}_T1w",
                "subject": f"{n:04d}",
                "status": "done",
                "seconds": draw.uniform(200, 900),
                "nodes": [{"peak_memory_gb": draw.uniform(1, 3)}],
                "facts": {
                    "affine": {"median_residual_mm": draw.gauss(2, 0.4)},
                    "parcellation": {"table": table},
                    "restore": {"residual_ratios": [draw.gauss(1, 0.1)] * 4,
                                "noise_sd": draw.gauss(0.02, 0.004),
                                "schedule": [draw.random() for _ in range(20)]},
                },
            }),
        )  # fmt: skip


def timed(what: str, work: Callable[[], object]) -> None:
    """Print how long ``work`` takes."""
    start = time.monotonic()
    result = work()
    size = f" ({len(result)})" if isinstance(result, list) else ""
    print(json.dumps({"what": what + size, "seconds": round(time.monotonic() - start, 2)}))


def main() -> None:
    """Write the data sets, time the steps, and remove everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw, out, index = (Path(folder) / name for name in ("raw", "out", "index"))
        raw.mkdir()
        skeleton(raw, options.subjects)
        settings = Settings(raw, out, out / "work", modalities=("T1w", "FLAIR"))
        one = replace(settings, participant_label=("0007",))
        timed("import pybids and query one participant", lambda: find_scans(one))
        timed("query one participant", lambda: find_scans(one))
        timed("query all", lambda: find_scans(settings))
        kept = replace(settings, bids_database_dir=index)
        timed("query all, writing --bids-database-dir", lambda: find_scans(kept))
        timed(
            "query one participant, reading --bids-database-dir",
            lambda: find_scans(replace(kept, participant_label=("0007",))),
        )
        summaries(out, options.subjects)
        timed("group level", lambda: build_group(out))
        print(f"group.html: {(out / 'group.html').stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
