# SPDX-License-Identifier: Apache-2.0
"""``brainprior evaluate``: brains are degraded, restored and compared with the originals.

Three rounds of parallel jobs: the participants, the penalties of the classical methods on the
validation set, the conditions. Each job's result is one file, put in place when complete, with a
fingerprint of its inputs and settings; the same command resumes where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from brainprior_bids.engine.errors import BrainpriorError, UsageError
from brainprior_bids.evaluation.studies import (
    ABLATIONS,
    DAPS,
    LOW_FIELD,
    QUICK,
    REFERENCE,
    STUDIES,
)
from brainprior_bids.run import resources

log = logging.getLogger(__name__)

VERSION = 2
"""Version of the protocol: increase it when a record's meaning changes."""


@dataclass(frozen=True)
class Source:
    """The source of a participant: a scan or a label map."""

    path: str
    name: str
    contrast: str
    synthetic: bool
    choosing: bool

    @property
    def stem(self) -> str:
        return f"{self.name}_{self.contrast}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``brainprior evaluate``."""
    parser.add_argument("data", type=Path, help="1 mm scans with BIDS names, whole or stripped")
    parser.add_argument("out", type=Path, help="folder for results, tables and plots")
    who = parser.add_argument_group("who")
    who.add_argument(
        "--participant-label",
        nargs="+",
        default=[],
        help="participants of the test set (default: all except those of --choose-label)",
    )
    who.add_argument(
        "--choose-label",
        nargs="+",
        default=[],
        help="participants of the validation set, on which the penalties of Tikhonov and TV are "
        "tuned (default: none, fixed penalties)",
    )
    who.add_argument("-m", "--modalities", nargs="+", default=["T1w", "T2w", "FLAIR"])
    who.add_argument("--labels", type=Path, help="folder of label maps for synthetic brains")
    who.add_argument(
        "--maps", nargs="+", default=[], help="label maps of the test set, up to the first dot"
    )
    who.add_argument(
        "--choose-maps", nargs="+", default=[], help="label maps of the validation set"
    )
    who.add_argument("--synthetic", nargs="+", default=["T2w", "FLAIR"], metavar="CONTRAST")
    what = parser.add_argument_group("what")
    what.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    what.add_argument("--spacing", type=float, nargs="+", default=[3.0, 5.0, 7.0], metavar="MM")
    what.add_argument("--noise", type=float, nargs="+", default=[0.01, 0.03], metavar="SD")
    what.add_argument("--profile", default="pulse", help="boxcar, trapezoid, cosine, pulse")
    what.add_argument(
        "--width-off",
        type=float,
        default=0.1,
        help="relative error of the stated slice thickness, alternately above and below "
        "(default: 0.1)",
    )
    what.add_argument(
        "--n-samples", type=int, default=8, help="samples in the study restoration (default: 8)"
    )
    what.add_argument("--n-steps", type=int, help="default: the sampler's own")
    what.add_argument("--sampler", default="auto")
    what.add_argument("--ablation-participants", type=int, default=2)
    what.add_argument("--segmentation-participants", type=int, default=3)
    what.add_argument("--daps", action="store_true", help="add DAPS-1k: 1000 calls per sample")
    what.add_argument("--random-seed", type=int, default=0)
    block = what.add_mutually_exclusive_group()
    block.add_argument(
        "--crop",
        type=int,
        nargs=3,
        default=[80, 96, 80],
        metavar="MM",
        help="block in the middle of each brain (default: 80 96 80); the study segmentation uses "
        "whole brains",
    )
    block.add_argument(
        "--whole", action="store_true", help="evaluate whole brains, in eight times the time"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--prior", help="weights: a file, or a name from `brainprior weights list`")
    how.add_argument("--nprocs", type=int, default=resources.available_processors())
    how.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    how.add_argument(
        "--tables-only", action="store_true", help="only write the tables of existing results"
    )
    kind = how.add_mutually_exclusive_group()
    kind.add_argument(
        "--tables",
        type=Path,
        metavar="FOLDER",
        help="also write the tables of the documentation: FOLDER/tables/restoration.md and so "
        "on, one file per study",
    )
    kind.add_argument(
        "--quick",
        action="store_true",
        help="a first look in minutes: one participant, 5 mm slices, noise 0.01, four samples",
    )


def evaluate(argv: Sequence[str]) -> int:
    """``brainprior evaluate``; returns the exit status."""
    args = parse(argv)
    from brainprior_bids.evaluation.tables import write_tables

    failed: list[str] = []
    if not args.tables_only:
        failed = _run(args)
    print(write_tables(args.out).read_text(encoding="utf-8"))
    for line in failed:
        log.error("%s", line)
    if failed and args.tables is not None:
        log.error("no table was written to %s, because a job failed.", args.tables)
    elif args.tables is not None:
        _write_pages(args, argv)
    return 1 if failed else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; with ``--quick``, those of ``QUICK`` where the command line has none."""
    parser = argparse.ArgumentParser(
        prog="brainprior evaluate",
        description="Make 1 mm brains into thick-slice, noisy scans, restore them, compare with "
        "the truth and with interpolation, Tikhonov and TV; tables and plots.",
    )
    add_arguments(parser)
    args = parser.parse_args(list(argv))
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(list(argv))
    return args


def _write_pages(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """The documentation's tables, from the results of exactly this command."""
    from brainprior_bids.evaluation.pages import write_pages
    from brainprior_bids.evaluation.stamp import shown_command

    paths = [_result_path(args.out, *task) for task in conditions(args, find_sources(args))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UsageError(
            f"evaluate: {len(missing)} of {len(paths)} results for --tables are missing in "
            f"{args.out}, first {missing[0]}. Run the command without --tables-only."
        )
    newest = max(path.stat().st_mtime for path in paths)
    day = datetime.fromtimestamp(newest, UTC).date().isoformat()
    records = [_read(path) for path in paths]
    folder = args.tables / "tables"
    for path in write_pages(records, folder, command=shown_command(argv), day=day):
        log.info("wrote %s", path)


def _run(args: argparse.Namespace) -> list[str]:
    """All rounds; a line for every job that failed."""
    from brainprior_bids.engine.weights import find_weights, read_weights

    prior = find_weights(args.prior, kind="prior")
    sha256 = read_weights(prior, kind="prior")[1]["sha256"]
    if args.nprocs < 1 or args.n_samples < 1:
        raise UsageError("evaluate: --nprocs and --n-samples: expected at least 1.")
    device = resources.resolve_device(args.device)
    sources = find_sources(args)
    args.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    with _pool(args.nprocs) as pool:

        def go(title: str, jobs: list[tuple[Callable[..., Any], tuple[Any, ...], str]]) -> None:
            for count, (name, error) in enumerate(_done(pool, jobs), 1):
                if error is None:
                    log.info("%s %d of %d: %s", title, count, len(jobs), name)
                else:
                    failed.append(f"{title} {name}: {error}")
                    log.warning("%s %s failed: %s", title, name, error)

        participants = [(_prepare, (s, str(args.out)), s.stem) for s in sources]
        go("participant", participants)
        ready = [s for s in sources if _participant_path(args.out, s).is_file()]
        tasks = list(conditions(args, ready))
        choosers = [s for s in ready if s.choosing]
        tunings = {
            (chooser.stem, c.kind): (chooser, _tuning_condition(c, n, args))
            for source, c in tasks
            for n, chooser in enumerate(choosers)
            if _alike(chooser, source)
        }
        go(
            "tuning",
            [(_tune, (s, c, str(args.out)), f"{s.stem} {c.kind}") for s, c in tunings.values()],
        )
        results = []
        for first, (source, condition) in _with_first(tasks):
            others = [chooser.name for chooser in choosers if _alike(chooser, source)]
            facts = (str(args.out), str(prior), sha256, device, first, others)
            name = f"{condition.study} {source.stem} {condition.name}"
            results.append((_measure, (source, condition, *facts), name))
        go("result", results)
    return failed


@contextmanager
def _pool(nprocs: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of processes with one thread each, or None if this process does the work."""
    if nprocs == 1:
        yield None
        return
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    pool = ProcessPoolExecutor(nprocs, mp_context=get_context("spawn"), initializer=_one_thread)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # at an interrupt, not before all jobs are through


def _done(
    pool: ProcessPoolExecutor | None,
    jobs: Sequence[tuple[Callable[..., Any], tuple[Any, ...], str]],
) -> Iterator[tuple[str, BrainpriorError | None]]:
    """Yield (name, error) of every job when it ends."""
    if pool is None:
        for job, arguments, name in jobs:
            try:
                job(*arguments)
                yield name, None
            except BrainpriorError as error:
                yield name, error
        return
    futures = {pool.submit(job, *arguments): name for job, arguments, name in jobs}
    for future in as_completed(futures):
        try:
            future.result()
            yield futures[future], None
        except BrainpriorError as error:
            yield futures[future], error


def _alike(one: Source, other: Source) -> bool:
    return (one.contrast, one.synthetic) == (other.contrast, other.synthetic)


def _with_first(
    tasks: Sequence[tuple[Source, Any]],
) -> Iterator[tuple[bool, tuple[Source, Any]]]:
    """Whether a task is the first of its condition and contrast; that one is drawn."""
    conditions = set()
    for source, condition in tasks:
        key = (condition.study, condition.name, source.contrast)
        yield key not in conditions, (source, condition)
        conditions.add(key)


def find_sources(args: argparse.Namespace) -> list[Source]:
    """The requested scans and label maps.

    Raises
    ------
    UsageError
        If one is missing, or a participant is in both the test and the validation set.
    """
    from brainprior_bids.training.preprocess import find_brains

    report = {label.removeprefix("sub-") for label in args.participant_label}
    choosing = {label.removeprefix("sub-") for label in args.choose_label}
    both = sorted(report & choosing) + sorted(set(args.maps) & set(args.choose_maps))
    if both:
        raise UsageError(
            f"evaluate: {', '.join(both)} cannot be in both the test and the validation set. "
            "Name each once."
        )
    brains = find_brains(args.data, validation=sorted(report | choosing), exclude=())
    sources = [
        Source(str(path), name, contrast, synthetic=False, choosing=name in choosing)
        for name, contrast, _, path in brains
        if contrast in args.modalities and (name in choosing or name in report or not report)
    ]
    stems = [source.stem for source in sources]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise UsageError(f"evaluate: more than one scan of {', '.join(twice)}; give one of each.")
    if not any(not source.choosing for source in sources):
        raise UsageError(
            f"evaluate: no scan of the test set in {args.data}. Check --participant-label."
        )
    if args.labels is None and (args.maps or args.choose_maps):
        raise UsageError("evaluate: --maps and --choose-maps need --labels. Give it.")
    for name in [*args.choose_maps, *args.maps]:
        paths = sorted(args.labels.rglob(f"{name}.nii*"))
        if len(paths) != 1:
            raise UsageError(f"evaluate: expected one {name}.nii.gz in {args.labels}.")
        sources += [
            Source(str(paths[0]), name, contrast, True, name in args.choose_maps)
            for contrast in args.synthetic
        ]
    if args.quick:
        first = next(source for source in sources if not source.choosing)
        sources = [source for source in sources if source.choosing or source == first]
    return sources


def conditions(
    args: argparse.Namespace, sources: Sequence[Source]
) -> Iterator[tuple[Source, Any]]:
    """(participant, condition) of every study, the first study first."""
    from brainprior_bids.evaluation.protocol import Condition

    reporting = [source for source in sources if not source.choosing]
    base = Condition(
        profile=args.profile,
        sampler=args.sampler,
        n_samples=args.n_samples,
        n_steps=args.n_steps,
        crop_mm=None if args.whole else (args.crop[0], args.crop[1], args.crop[2]),
        seed=args.random_seed,
    )

    def turn(n: int) -> float:
        return 1 + args.width_off * (-1) ** n

    number = {source: n for n, source in enumerate(reporting)}
    real = [source for source in reporting if not source.synthetic]
    synthetic = [source for source in reporting if source.synthetic]
    few = min(args.n_samples, 4)
    for study in [study for study in STUDIES if study in args.studies]:
        own = replace(base, study=study)
        if study == "restoration":
            for group, noises in ((real, args.noise), (synthetic, args.noise[:1])):
                for n, spacing in enumerate(args.spacing):
                    for noise in noises:
                        for source in group:
                            width = turn(number[source] + n)
                            yield (
                                source,
                                replace(own, spacing_mm=spacing, noise_sd=noise, width=width),
                            )
        elif study == "low-field":
            for source in real:
                values = {**LOW_FIELD, "n_samples": few}
                yield source, replace(own, width=turn(number[source]), **values)
        elif study == "ablation":
            for variant, values in (ABLATIONS | (DAPS if args.daps else {})).items():
                for source in real[: args.ablation_participants]:
                    changed = {**REFERENCE, "n_samples": few, **values}
                    width = turn(number[source])
                    yield source, replace(own, variant=variant, width=width, **changed)
        else:
            for source in reporting[: args.segmentation_participants]:
                values = {**REFERENCE, "n_samples": min(args.n_samples, 2), "crop_mm": None}
                width = turn(number[source])
                yield source, replace(own, width=width, segment=True, **values)


def _tuning_condition(condition: Any, number: int, args: argparse.Namespace) -> Any:
    crop = condition.crop_mm or tuple(args.crop)
    width = 1 + args.width_off * (-1) ** number
    return replace(condition, bias_sd=0.0, field="none", crop_mm=crop, width=width)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    logging.getLogger("brainprior_bids").setLevel(logging.WARNING)


@cache
def _parcellation() -> Any:
    from brainprior_bids.engine.weights import load_parcellation

    return load_parcellation()


@cache
def _prior(path: str, device: str) -> Any:
    from brainprior_bids.engine.weights import load_prior

    return load_prior(Path(path), device=device)


def _participant_path(out: Path, source: Source) -> Path:
    return out / "participants" / f"{source.stem}.npz"


def _result_path(out: Path, source: Source, condition: Any) -> Path:
    name = condition.name.replace(" ", "-").replace(",", "")
    return out / "results" / condition.study / f"{source.stem}_{name}.json"


def _prepare(source: Source, out: str) -> None:
    from brainprior_bids.engine.weights import FOLDER, sha256_file
    from brainprior_bids.evaluation.protocol import from_labels, from_scan

    path = _participant_path(Path(out), source)
    note = path.with_suffix(".json")
    mark = _mark(
        source=sha256_file(Path(source.path)),
        contrast=source.contrast,
        parcellation=sha256_file(FOLDER / "parcellation.safetensors"),
    )
    if path.is_file() and _is_done(note, mark):
        return
    if source.synthetic:
        participant = from_labels(
            Path(source.path), source.name, source.contrast, _parcellation(), path.parent
        )
    else:
        participant = from_scan(Path(source.path), source.name, source.contrast, _parcellation())
    participant.save(path)
    _write(note, {"fingerprint": mark, "source": Path(source.path).name})


def _tune(source: Source, condition: Any, out: str) -> None:
    from brainprior_bids.evaluation import protocol

    path = Path(out) / "tuning" / f"{source.stem}_{condition.kind}.json"
    participant = _participant_path(Path(out), source)
    used = {
        key: value
        for key, value in asdict(condition).items()
        if key
        in ("spacing_mm", "noise_sd", "width", "profile", "in_plane_mm", "rician", "crop_mm")
    }
    grids = (protocol.TIKHONOV_PENALTIES, protocol.TV_PENALTIES, protocol.SPREADS)
    mark = _mark(participant=_read(participant.with_suffix(".json")), condition=used, grids=grids)
    if not _is_done(path, mark):
        errors = protocol.tune(protocol.Participant.load(participant), condition)
        _write(path, {"fingerprint": mark, "errors": errors})


def _measure(
    source: Source,
    condition: Any,
    out: str,
    prior: str,
    sha256: str,
    device: str,
    picture: bool,
    choosers: Sequence[str],
) -> None:
    from brainprior_bids.evaluation import protocol

    folder = Path(out)
    path = _result_path(folder, source, condition)
    participant = _participant_path(folder, source)
    penalties, tuned_on = tuned(folder, source, condition, choosers)
    mark = _mark(
        participant=_read(participant.with_suffix(".json")),
        condition=asdict(condition),
        prior=sha256,
        penalties=penalties,
        device=device.partition(":")[0],
    )
    if _is_done(path, mark):
        return
    record = protocol.measure(
        protocol.Participant.load(participant),
        condition,
        prior=_prior(prior, device),
        penalties=penalties,
        network=_parcellation() if condition.segment else None,
        own_labels=source.synthetic,
        device=device,
        picture=folder / "pictures" / f"{condition.study}_{path.stem}.png" if picture else None,
    )
    facts = {"fingerprint": mark, "prior_sha256": sha256, "tuned_on": tuned_on}
    _write(path, {**facts, "synthetic": source.synthetic, **record})


def tuned(
    out: Path, source: Source, condition: Any, choosers: Sequence[str]
) -> tuple[dict[str, float], list[str]]:
    """Penalties for a condition from those of the choosers that were measured, and their names."""
    from brainprior_bids.evaluation.protocol import UNTUNED, choose

    files = {
        name: out / "tuning" / f"{name}_{source.contrast}_{condition.kind}.json"
        for name in choosers
    }
    there = {name: path for name, path in files.items() if path.is_file()}
    if not there:
        return dict(UNTUNED), []
    return choose([_read(path)["errors"] for path in there.values()]), list(there)


def _mark(**values: Any) -> str:
    """A fingerprint of everything that decides a result."""
    text = json.dumps({"version": VERSION, **values}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_done(path: Path, mark: str) -> bool:
    return path.is_file() and _read(path).get("fingerprint") == mark


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, values: dict[str, Any]) -> None:
    """Write a file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
