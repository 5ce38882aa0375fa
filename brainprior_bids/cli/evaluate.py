# SPDX-License-Identifier: Apache-2.0
"""``brainprior evaluate``: brains are degraded, restored and compared with the originals.

The studies are in ``evaluation.studies``; ``evaluation.harness`` runs their cases.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.weights import find_weights
from brainprior_bids.evaluation import harness
from brainprior_bids.evaluation.harness import Case, Failure
from brainprior_bids.evaluation.studies import STUDIES, find
from brainprior_bids.evaluation.studies.base import Source, Study
from brainprior_bids.run import resources

log = logging.getLogger(__name__)

CONTRASTS = ("T1w", "T2w", "FLAIR")
CROP = (80, 96, 80)
"""Block of the studies that use blocks, mm."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``brainprior evaluate``."""
    parser = argparse.ArgumentParser(
        prog="brainprior evaluate",
        description="Degrade 1 mm brains, restore them, and compare the results with the truth "
        "and with other methods; writes tables and plots for each study.",
    )
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
    who.add_argument(
        "-m", "--modalities", nargs="+", choices=CONTRASTS, help="default: all that exist"
    )
    who.add_argument("--labels", type=Path, help="folder of label maps for synthetic brains")
    who.add_argument(
        "--maps", nargs="+", default=[], help="label maps of the test set, up to the first dot"
    )
    who.add_argument(
        "--choose-maps", nargs="+", default=[], help="label maps of the validation set"
    )
    who.add_argument("--synthetic", nargs="+", default=["T2w", "FLAIR"], metavar="CONTRAST")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--study",
        "--studies",
        dest="studies",
        nargs="+",
        choices=STUDIES,
        default=list(STUDIES),
        help="default: all",
    )
    default = "default: the study's own"
    what.add_argument(
        "--spacing", type=float, nargs="+", metavar="MM", help=f"slice spacings; {default}"
    )
    what.add_argument(
        "--noise", type=float, nargs="+", metavar="SD", help=f"SDs of the noise; {default}"
    )
    what.add_argument("--profile", default="pulse", help="boxcar, trapezoid, cosine, pulse")
    what.add_argument(
        "--width-off",
        type=float,
        default=0.1,
        help="relative error of the stated slice thickness, alternately above and below "
        "(default: 0.1)",
    )
    what.add_argument("--n-samples", type=int, help=f"samples per image; {default}")
    what.add_argument("--n-steps", type=int, help="default: the sampler's own")
    what.add_argument("--sampler", default="auto")
    what.add_argument("--ablation-participants", type=int, default=2)
    what.add_argument("--segmentation-participants", type=int, default=3)
    what.add_argument("--downstream-participants", type=int, default=2)
    what.add_argument(
        "--syn-participants",
        type=int,
        metavar="N",
        help="brains that the study alignment registers to MNI152 by SyN, in minutes each "
        "(default: 2; with --quick none)",
    )
    what.add_argument(
        "--thickness",
        action=argparse.BooleanOptionalAction,
        help="cortical thickness in the study downstream, in minutes per image (default: yes; "
        "with --quick no)",
    )
    what.add_argument("--daps", action="store_true", help="add DAPS-1k: 1000 calls per sample")
    what.add_argument(
        "--average", type=Path, help="average head in MNI305, a baseline of the study inpaint"
    )
    what.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="another program for the study peers, which may be given several times. COMMAND is "
        "run without a shell; {scan} is the degraded scan, {folder} an empty folder for the "
        "program's only image (or {output} its path), {thickness} and {spacing} are in mm",
    )
    what.add_argument(
        "--peer-timeout",
        type=float,
        default=120,
        metavar="MINUTES",
        help="time limit of each run of a --peer (default: 120)",
    )
    what.add_argument("--random-seed", type=int, default=0)
    block = what.add_mutually_exclusive_group()
    block.add_argument(
        "--crop",
        type=int,
        nargs=3,
        metavar="MM",
        help="block in the middle of each brain (default: 80 96 80, for peers the whole brain); "
        "segmentation uses whole brains; inpaint, fuse and refine run the whole command on "
        "brains or slabs",
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
        "on, one file per study; in a checkout, data/measured.json too",
    )
    kind.add_argument(
        "--quick",
        action="store_true",
        help="a first look in minutes: one participant, and few settings of every study",
    )
    return parser


def evaluate(argv: Sequence[str]) -> int:
    """``brainprior evaluate``; returns the exit status."""
    args = parse(argv)
    from brainprior_bids.evaluation.tables import write_tables

    if args.tables_only and args.tables is None:
        print(write_tables(args.out).read_text(encoding="utf-8"))
        return 0
    sources = find_sources(args)
    cases, problems = plan(args, sources)
    failures = [Failure(text, frozenset()) for text in problems]
    if not args.tables_only:
        failures += _run(args, cases, sources)
    if args.tables_only or (args.out / "results").is_dir():
        print(write_tables(args.out).read_text(encoding="utf-8"))
    for failure in failures:
        log.error("%s", failure.text)
    if args.tables is not None:
        _write_pages(args, argv, cases, frozenset().union(*(f.studies for f in failures)))
    return 1 if failures else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments."""
    args = build_parser().parse_args(list(argv))
    args.crop_given, args.crop = args.crop is not None, args.crop or list(CROP)
    return args


def plan(args: argparse.Namespace, sources: Sequence[Source]) -> tuple[list[Case], list[str]]:
    """Every case of the requested studies, and a message for each scan that they lack."""
    problems = _missing_contrasts(args, sources)
    cases = []
    for name in (name for name in STUDIES if name in args.studies):
        study = find(name)
        skipped, messages = _left_out(study, args)
        if set(args.studies) != set(STUDIES):  # asked for by name
            problems += messages
        else:
            for text in messages:
                log.warning("%s", text)
        if skipped:
            continue
        study_cases = [
            Case(name, source, settings)
            for source, settings in study.cases(study.options(args), sources)
        ]
        if not any(not case.source.choosing for case in study_cases):
            problems.append(f"{name}: no scan for this study in {args.data}.")
        cases += study_cases
    return cases, problems


def _left_out(study: Study, args: argparse.Namespace) -> tuple[bool, list[str]]:
    """Whether the study is skipped, and a message for it or for each part that is left out."""
    if study.missing_package is not None:
        return True, [f"{study.name}: skipped, because {study.missing_package} is not installed."]
    everything = set(args.studies) == set(STUDIES)
    if everything and study.only_with and not getattr(args, study.only_with):
        return True, [f"{study.name}: skipped, because --{study.only_with} is not given."]
    return False, list(study.lacking(args)) if study.lacking else []


def _missing_contrasts(args: argparse.Namespace, sources: Sequence[Source]) -> list[str]:
    """A message for each requested contrast that requested participants do not have."""
    problems = []
    for contrast in args.modalities or ():
        available = {s.name for s in sources if s.contrast == contrast and not s.choosing}
        missing = {s.removeprefix("sub-") for s in args.participant_label} - available
        if missing:
            problems.append(f"no {contrast} of {', '.join(sorted(missing))} in {args.data}.")
        elif not available:
            problems.append(f"no {contrast} of the test set in {args.data}.")
    return problems


def _write_pages(
    args: argparse.Namespace, argv: Sequence[str], cases: Sequence[Case], failed: frozenset[str]
) -> None:
    """The documentation's tables, from the results of exactly this command."""
    from brainprior_bids.evaluation.pages import write_pages
    from brainprior_bids.evaluation.stamp import shown_command

    for name in sorted(failed):
        log.error("no table of %s was written to %s, because a job failed.", name, args.tables)
    paths = [case.record(args.out) for case in cases if case.study not in failed]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UsageError(
            f"evaluate: {len(missing)} of {len(paths)} results for --tables are missing in "
            f"{args.out}, first {missing[0]}. Run the command without --tables-only."
        )
    if not paths:
        return
    newest = max(path.stat().st_mtime for path in paths)
    day = datetime.fromtimestamp(newest, UTC).date().isoformat()
    records = [harness.read(path) for path in paths]
    command = shown_command(argv)
    pages = write_pages(records, args.tables, command=command, day=day, nprocs=args.nprocs)
    for path in pages:
        log.info("wrote %s", path)


def _run(
    args: argparse.Namespace, cases: Sequence[Case], sources: Sequence[Source]
) -> list[Failure]:
    """Compute every record; returns the failures."""
    prior = find_weights(args.prior, kind="prior")
    if args.nprocs < 1 or (args.n_samples or 1) < 1:
        raise UsageError("evaluate: --nprocs and --n-samples: expected at least 1.")
    if not args.peer_timeout > 0:
        raise UsageError("evaluate: --peer-timeout: expected a number of minutes above 0.")
    if args.average is not None and not args.average.is_file():
        raise UsageError(
            f"evaluate: --average: {args.average} is not a file. Give the average head."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    return harness.run(
        cases,
        sources,
        out=args.out,
        prior=prior,
        device=resources.resolve_device(args.device),
        nprocs=args.nprocs,
        crop=(args.crop[0], args.crop[1], args.crop[2]),
        width_off=args.width_off,
        limit_s=60 * args.peer_timeout,
    )


def find_sources(args: argparse.Namespace) -> list[Source]:
    """The requested scans and label maps.

    Raises
    ------
    UsageError
        If one is missing, or a participant is in both the test and the validation set.
    """
    from brainprior_bids.training.preprocess import find_brains

    test = {label.removeprefix("sub-") for label in args.participant_label}
    validation = {label.removeprefix("sub-") for label in args.choose_label}
    both = sorted(test & validation) + sorted(set(args.maps) & set(args.choose_maps))
    if both:
        raise UsageError(
            f"evaluate: {', '.join(both)} cannot be in both the test and the validation set. "
            "Name each once."
        )
    brains = find_brains(args.data, validation=sorted(test | validation), exclude=())
    sources = [
        Source(str(path), name, contrast, synthetic=False, choosing=name in validation)
        for name, contrast, _, path in brains
        if contrast in (args.modalities or CONTRASTS)
        and (name in validation or name in test or not test)
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
        test_sources = [source for source in sources if not source.choosing]
        first = min(test_sources, key=lambda source: source.contrast != "T1w")
        sources = [source for source in sources if source.choosing or source == first]
    return sources
