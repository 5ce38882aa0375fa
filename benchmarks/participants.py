# SPDX-License-Identifier: Apache-2.0
"""Shared by fuse.py, inpaint.py and refine.py: parallel participants, records, the table.

Every participant has a record, ``OUT/<participant>.json``, rewritten with each row: a run that was
stopped resumes, and several runs (``--nprocs``, or other processes) fill one table. A record of
other weights or options is replaced. The table, ``OUT/table.md``, has the mean of each metric over
the participants and the 95 % interval of a bootstrap over them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from brainprior_bids.bids.files import read_json, write_json
from brainprior_bids.bids.names import BIDSName, output_names, result_name
from brainprior_bids.bids.status import read_summary
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.weights import find_weights, load_parcellation, sha256_file
from brainprior_bids.evaluation.protocol import Participant, from_scan
from brainprior_bids.evaluation.scans import Volume, read_image, run_command
from brainprior_bids.records import RestoreRecord

SCANNER_UNIT = 500.0
"""Scanner value of the brain's 99th percentile in the simulated scans."""
PLANES = {True: (0, 1, 2), False: (2,)}
"""Planes shown for a whole brain (True) and for a slab (False)."""
PATHS = ("out", "brains", "average", "prior", "picture", "nprocs", "keep")
"""Options that do not affect the metrics of a record."""

Figures = dict[str, float]


class Record:
    """A participant's rows: label -> metrics, or ``value`` alone, which gets a line of its own."""

    def __init__(self, path: Path, made_with: dict[str, Any]) -> None:
        self.path = path
        old = read_json(path) if path.exists() else {}
        if old.get("made_with") != made_with:
            old = {"made_with": made_with, "seconds": 0.0, "rows": {}}
        self.held = old
        self.began = time.perf_counter()

    def __contains__(self, label: str) -> bool:
        return label in self.held["rows"]

    def add(self, label: str, figures: Figures) -> None:
        """Keep a row, and print it."""
        now = time.perf_counter()
        self.held["seconds"] += now - self.began
        self.began = now
        self.held["rows"][label] = figures
        write_json(self.path, self.held)
        cells = "  ".join(f"{key} {value:.4f}" for key, value in figures.items())
        print(f"{self.path.stem}  {label}: {cells}", flush=True)


class Runs:
    """The command on data sets of one participant, below ``OUT/<participant>``."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        self.folder = args.out / name
        self.options = ["--skip-bids-validation", "--nprocs", "1", "--omp-nthreads", "1",
                        "--n-samples", str(args.n_samples), "--random-seed", str(args.seed),
                        "--device", args.device, "--clean-workdir", "-m", "T1w"]  # fmt: skip
        if args.prior is not None:
            self.options += ["--prior", str(args.prior)]
        if args.sloppy:
            self.options.append("--sloppy")

    def command(self, bids_dir: Path, output: str, *options: str) -> Path:
        """Run it; a scan that is there already is not made again. Returns the output folder."""
        output_dir = self.folder / output
        run_command(bids_dir, output_dir, [*self.options, *options])
        return output_dir

    def clear(self) -> None:
        """Remove all but the record."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read(output_dir: Path, stem: str, image: str, role: str = "restored") -> Volume:
    """An image that the command wrote.

    Parameters
    ----------
    stem : str
        Of the scan, ``sub-01_T1w``.
    image : str
        ``restored``, ``inpainted`` …
    role : str
        As in ``bids.names.output_names``.
    """
    source = BIDSName.parse(f"{stem}.nii.gz")
    file = output_names(source, n_samples=1, save_samples=True, image=image)[role]
    return read_image(output_dir / source.folder / "anat" / file)


def restore_record(output_dir: Path, stem: str, image: str) -> RestoreRecord:
    """What the command keeps of a result's restoration (``logs/scans``)."""
    source = BIDSName.parse(f"{stem}.nii.gz")
    summary = read_summary(output_dir, result_name(source, image))
    if summary is None:
        raise UsageError(f"{output_dir}: no summary of {stem}.")
    return summary.facts.restore


def participant(path: Path, args: argparse.Namespace) -> Participant:
    """The truth: mask, bias field and unit by brainprior's own preprocessing; made once."""
    name = path.name.partition("_")[0].removeprefix("sub-")
    kept = args.out / f"{name}.npz"
    if not kept.exists():
        from_scan(path, name, "T1w", load_parcellation()).save(kept)
    held = Participant.load(kept)
    if args.slab is None:
        return held
    start = (held.data.shape[2] - args.slab) // 2
    part = np.s_[:, :, start : start + args.slab]
    to_mni305 = held.to_mni305.copy()
    to_mni305[:3, 3] += start * to_mni305[:3, 2]
    return replace(held, data=held.data[part], inside=held.inside[part],
                   structures=held.structures[part], to_mni305=to_mni305)  # fmt: skip


def parser(description: str | None, *, n_samples: int) -> argparse.ArgumentParser:
    """The options that the three scripts have in common."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("out", type=Path, help="folder of the records and of table.md")
    made.add_argument("brains", type=Path, nargs="*", help="1 mm T1w brains; none: the table only")
    made.add_argument(
        "--nprocs", type=int, default=1, help="parallel participants, one thread each"
    )
    made.add_argument("--prior", type=Path, help="weights; default: embedded")
    made.add_argument("--n-samples", type=int, default=n_samples)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="cpu")
    made.add_argument("--picture", type=Path, help="folder for PNGs of each participant")
    made.add_argument("--keep", action="store_true", help="keep the data sets and the outputs")
    made.add_argument("--sloppy", action="store_true", help="to try the script: 3 steps")
    made.add_argument("--slab", type=int, metavar="MM", help="to try it: the brain's middle alone")
    return made


def run(
    args: argparse.Namespace,
    one: Callable[[Path, argparse.Namespace, Record, Runs], None],
    header: Sequence[str],
) -> int:
    """All participants, then the table; returns the exit status.

    Parameters
    ----------
    one : function
        Makes a participant's rows.
    header : sequence of str
        What a row's label says, parted by " | ".
    """
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    failed = 0
    with ProcessPoolExecutor(args.nprocs, mp_context=get_context("spawn")) as pool:
        futures = [(path, pool.submit(_one, one, path, args)) for path in args.brains]
        for path, future in futures:
            error = future.exception()
            if error is not None:
                failed += 1
                print(f"{path.name} failed: {error}", flush=True)
    text = "\n".join(table(sorted(args.out.glob("*.json")), header))
    (args.out / "table.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
    return 1 if failed else 0


def _one(
    one: Callable[[Path, argparse.Namespace, Record, Runs], None],
    path: Path,
    args: argparse.Namespace,
) -> None:
    name = path.name.partition("_")[0]
    made_with = {key: value for key, value in vars(args).items() if key not in PATHS}
    made_with["prior_sha256"] = sha256_file(find_weights(args.prior, kind="prior"))
    runs = Runs(name, args)
    one(path, args, Record(args.out / f"{name}.json", made_with), runs)
    if not args.keep:
        runs.clear()


def table(records: Sequence[Path], header: Sequence[str]) -> list[str]:
    """Markdown: a row a label, with mean and interval of every figure over the participants."""
    held = [read_json(path) for path in records]
    labels = dict.fromkeys(label for record in held for label in record["rows"])
    keys = list(dict.fromkeys(k for r in held for row in r["rows"].values() for k in row))
    if "value" in keys:
        keys.remove("value")
    lines = [f"| {' | '.join([*header, *keys, 'participants'])} |",
             "|---" * (len(header) + len(keys) + 1) + "|"]  # fmt: skip
    single = []
    for label in labels:
        rows = [record["rows"][label] for record in held if label in record["rows"]]
        if "value" in rows[0]:
            single.append(f"- {label}: {interval([r['value'] for r in rows])} ({len(rows)})")
            continue
        cells = [interval([row[key] for row in rows if key in row]) for key in keys]
        lines.append(f"| {label} | {' | '.join(cells)} | {len(rows)} |")
    lines += ["", *single]
    weights = sorted({record["made_with"]["prior_sha256"][:12] for record in held})
    minutes = [record["seconds"] / 60 for record in held]
    if held:
        lines += ["", f"Prior {', '.join(weights)} (start of SHA-256); {np.mean(minutes):.0f} "
                  "minutes a participant."]  # fmt: skip
    if len(weights) > 1:
        lines += ["**These records are of more than one prior.**"]
    return lines


def interval(values: Sequence[float]) -> str:
    """Mean, and for two participants or more the 95 % interval of a bootstrap over them."""
    if not values:
        return ""
    shown = f"{np.mean(values):.4f}"
    if len(values) == 1:
        return shown
    rng = np.random.default_rng(0)
    draws = rng.choice(np.array(values), (4000, len(values))).mean(1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return f"{shown} [{low:.4f}, {high:.4f}]"
