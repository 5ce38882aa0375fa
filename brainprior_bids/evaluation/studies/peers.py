# SPDX-License-Identifier: Apache-2.0
"""How accurate are other programs on the same scans?

T1w brains (whole unless ``--crop`` is given) are degraded as in ``restoration``, but with Rician
noise: programs estimate the noise of a magnitude image from its background, which has no negative
values. Each program of
``--peer NAME=COMMAND`` is given the scan as a NIfTI file, in scanner units and with its centre at
0 mm. Its image is interpolated to the truth's grid by a cubic spline and compared there like
cubic, TV and brainprior's own images.

One case has the methods of the package (no ``command``), and one each program, so that a failure
or another command concerns that program alone. A program's image must cover the whole region in
which the methods are compared, which is then the same for all of them.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.errors import BrainpriorError, InputError, SamplerError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.result import Restoration
from brainprior_bids.evaluation import protocol
from brainprior_bids.evaluation.baselines import interpolate
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.metrics import compare, field_psnr_db, matching_gain
from brainprior_bids.evaluation.peers import (
    NOTE,
    Peer,
    parse_peers,
    read_peer_image,
    run_peer,
)
from brainprior_bids.evaluation.protocol import Case, Condition, Participant, make_case
from brainprior_bids.evaluation.stamp import shown_template
from brainprior_bids.evaluation.studies.base import Bench, Source, Study, of_test_set
from brainprior_bids.evaluation.studies.command import SCANNER_UNIT
from brainprior_bids.evaluation.studies.restoration import base_condition, width_of
from brainprior_bids.evaluation.summary import (
    NAMES,
    Record,
    condition_key,
    groups_of,
    mean,
    mean_sd,
    settings,
    title,
)
from brainprior_bids.evaluation.usage import Watch

BUILT_IN = {**{key: NAMES[key] for key in ("cubic", "tv", "restored")},
            "mean": "`--sampler mean`"}  # fmt: skip
"""Method of the package -> its row."""
METRICS = (("psnr_db", "PSNR, dB", 2), ("psnr_field_db", "PSNR after a smooth gain, dB", 2),
           ("mae", "MAE", 4), ("ssim", "SSIM", 3))  # fmt: skip
USAGE = (("seconds", "wall, s", 1), ("cpu_seconds", "processor, s", 1),
         ("peak_memory_gb", "memory, GiB", 1))  # fmt: skip

Image = NDArray[np.float32]


@dataclass(frozen=True)
class Settings(Condition):
    """``command``: the template of the program ``variant``; empty for the package's methods."""

    command: str = ""


def parse(options: Namespace) -> list[Peer]:
    """The programs of the command line; raises as ``parse_peers``."""
    return parse_peers(options.peer, reserved=tuple(BUILT_IN))


def lacking(options: Namespace) -> list[str]:
    """A sentence for each program that is not installed."""
    return [
        f"peers: {peer.name} is skipped, because {peer.missing_program} is not installed."
        for peer in parse(options)
        if peer.missing_program
    ]


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Settings]]:
    """For every T1w, spacing and noise one case of the package and one per installed program."""
    base = asdict(base_condition(options, "peers")) | {"rician": True}
    if not options.crop_given:
        base["crop_mm"] = None
    peers = [Peer("", ""), *(peer for peer in parse(options) if not peer.missing_program)]
    for spacing, noise in itertools.product(options.spacing, options.noise):
        scan = replace(Settings(**base), spacing_mm=spacing, noise_sd=noise)
        for n, source in enumerate(of_test_set(sources, "T1w")):
            own = replace(scan, width=width_of(options, n))
            for peer in peers:
                yield source, replace(own, variant=peer.name, command=peer.command)


def measure(participant: Participant, condition: Settings, bench: Bench) -> Record:
    """Metrics of ``methods``, and what their computation used.

    A program that fails has the key ``failure`` instead of metrics.
    """
    case = make_case(participant, condition)
    if condition.command:
        return _measure_peer(case, condition, participant.name, bench)
    images = protocol.classical(case, bench.penalties)
    images = {method: images[method] for method in ("cubic", "tv")}
    usage, used = {}, {}
    for method, sampler in (("restored", condition.sampler), ("mean", "mean")):
        own = replace(condition, sampler=sampler)
        try:
            result, usage[method] = _restored(case, own, participant.contrast, bench)
        except SamplerError:
            if method == "restored":
                raise
            continue  # weights that cannot be conditioned
        images[method], used[method] = result.mean, result.sampler
    _draw(bench.picture, case, images, participant.name)
    rows = {
        method: {**errors(image, case), **usage.get(method, {})}
        for method, image in images.items()
    }
    return {"sampler_used": used["restored"], "methods": rows}


def _restored(
    case: Case, condition: Settings, contrast: str, bench: Bench
) -> tuple[Restoration, dict[str, float]]:
    prior = bench.load_prior()
    with Watch(family=False) as watch:
        result = protocol.restored(case, condition, contrast, prior=prior, device=bench.device)
    return result, asdict(watch.usage)


def errors(image: Image, case: Case) -> dict[str, float]:
    """MAE, PSNR and SSIM after the least-squares gain, and PSNR after a smooth gain."""
    truth, judged = case.truth.data, case.judged
    alike = (image * matching_gain(image, truth, judged)).astype(np.float32)
    return {
        **compare(alike, truth, judged),
        "psnr_field_db": field_psnr_db(image, truth, judged),
    }


def _measure_peer(case: Case, condition: Settings, name: str, bench: Bench) -> Record:
    peer = Peer(condition.variant, condition.command)
    to_scanner = np.eye(4)  # mm of the case -> mm of the file, whose centre is 0
    to_scanner[:3, 3] = -case.truth.grid.extent_mm / 2
    scan = bench.folder / f"sub-{name}_T1w.nii.gz"
    _write_scan(scan, case, to_scanner)
    try:
        path, usage = run_peer(
            peer,
            scan,
            bench.folder,
            thickness_mm=condition.spacing_mm,
            spacing_mm=condition.spacing_mm,
            limit_s=bench.limit_s,
        )
        image = _on_truth(peer, path, case, to_scanner)
        row = {**errors(image, case), **asdict(usage)}
    except BrainpriorError as error:
        (bench.folder / NOTE).unlink(missing_ok=True)  # the next run repeats the program
        return {"methods": {}, "failure": str(error)}
    _draw(bench.picture, case, {peer.name: image}, name)
    return {"methods": {peer.name: row}}


def _write_scan(path: Path, case: Case, to_scanner: NDArray[np.float64]) -> None:
    image = nib.Nifti1Image(SCANNER_UNIT * case.scan.data, to_scanner @ case.scan.grid.affine)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def _on_truth(peer: Peer, path: Path, case: Case, to_scanner: NDArray[np.float64]) -> Image:
    """A program's image on the truth's grid, 0 where it has no values.

    Raises
    ------
    InputError
        If the image does not cover the region that is compared.
    """
    volume = read_peer_image(path, peer.name)
    data = np.where(np.isfinite(volume.data), volume.data, 0).astype(np.float32)
    grid = Grid(data.shape, np.linalg.inv(to_scanner) @ volume.grid.affine)
    index = np.linalg.inv(grid.affine) @ case.truth.grid.affine
    at = np.argwhere(case.judged) @ index[:3, :3].T + index[:3, 3]
    outside = float(((at < -0.5) | (at > np.array(grid.shape) - 0.5)).any(1).mean())
    if outside > 0:
        raise InputError(
            f"{peer.name}: its image does not cover the brain: {100 * outside:.1f} % of the brain "
            "is outside. Does the program keep the position of the scan?"
        )
    return resample(data, grid, case.truth.grid)


def _draw(path: Path | None, case: Case, images: dict[str, Image], name: str) -> None:
    if path is None:
        return
    truth, judged = case.truth.data, case.judged
    shown = {
        "truth": truth,
        "slices": interpolate(case.scan.data, case.scan.grid, case.truth.grid, order=0),
        **{m: image * matching_gain(image, truth, judged) for m, image in images.items()},
    }
    columns = [Column(key, np.where(judged, image, 0), 1.05) for key, image in shown.items()]
    draw(path, columns, inside=judged, spacing_mm=(1.0, 1.0, 1.0), caption=f"{name} T1w")


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """For every condition one row per method, and the commands of the programs."""
    own = [r for r in records if not r["command"]]
    text = [settings(own)] if own else []
    for group in groups_of(records, condition_key):
        count = len({r["participant"] for r in group})
        text += ["", f"{title(group[0], count)}:", "", *_rows(group)]
    commands = {(r["variant"], r["command"]): None for r in records if r["command"]}
    text += ["", *(f"- {name}: `{shown_template(command)}`" for name, command in commands)]
    return text


def _rows(group: Sequence[Record]) -> list[str]:
    columns = [METRICS[0][1], "minus `desc-restored`", METRICS[1][1], "minus `desc-restored`"]
    columns += [title for _, title, _ in (*METRICS[2:], *USAGE)]
    text = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    restored = {r["participant"]: r["methods"]["restored"] for r in group if not r["command"]}
    for method in dict.fromkeys([*BUILT_IN, *sorted({r["variant"] for r in group} - {""})]):
        shown = [r for r in group if r["variant"] == ("" if method in BUILT_IN else method)]
        rows = {r["participant"]: r["methods"][method] for r in shown if method in r["methods"]}
        failed = sum("failure" in r for r in shown)
        cells = _cells(rows, restored, method)
        if failed:
            cells[0] = f"{cells[0]}; {failed} failed" if rows else "failed"
        if rows or failed:
            text.append(f"| {' | '.join([BUILT_IN.get(method, method), *cells])} |")
    return text


def _cells(rows: dict[str, Any], restored: dict[str, Any], method: str) -> list[str]:
    """Mean ± SD of every metric, and of the paired differences of the first two; usage."""
    if not rows:
        return [""] * (len(METRICS) + len(USAGE) + 2)
    cells = []
    for key, _, digits in METRICS:
        cells.append(mean_sd([row[key] for row in rows.values()], digits))
        if key.startswith("psnr"):
            paired = [
                row[key] - restored[who][key] for who, row in rows.items() if who in restored
            ]
            cells.append("" if method == "restored" else mean_sd(paired, digits, sign=True))
    for key, _, digits in USAGE:
        values = [row[key] for row in rows.values() if key in row]
        cells.append(mean(values, digits) if values else "")
    return cells


STUDY = Study(
    "peers",
    cases,
    measure,
    table,
    defaults={"spacing": (5.0,), "noise": (0.01,), "n_samples": 4},
    quick={"n_samples": 1},
    tuned=True,
    only_with="peer",
    lacking=lacking,
)
