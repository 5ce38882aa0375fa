# SPDX-License-Identifier: Apache-2.0
"""The command line, and the settings of a run that follow from it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brainprior_bids.bids.files import readable
from brainprior_bids.bids.provenance import new_run_uuid
from brainprior_bids.bids.query import NOT_TEXT, checked_filters, read_filters
from brainprior_bids.cli import options as groups
from brainprior_bids.cli.checks import (
    bare_labels,
    check_anatomy,
    check_paths,
    check_task,
    check_templates,
    chosen_modalities,
    chosen_spaces,
    export_roots,
    named_prior,
    run_labels,
)
from brainprior_bids.cli.config_file import as_tokens, read_config
from brainprior_bids.cli.options import SLOPPY, WORDS, WORK_DIR
from brainprior_bids.cli.sister_options import advice
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.samplers import registry
from brainprior_bids.run import resources
from brainprior_bids.run.plugin_file import read_plugin_file
from brainprior_bids.settings import LEVELS, Settings

DESCRIPTION = """\
brainprior restores brain MRI. Input: T1w, T2w and FLAIR scans with thick slices, noise or a
bias field. Output: skull-stripped, bias-corrected 1 mm images with uncertainty maps, as BIDS
derivatives, in the scan's own space and in MNI305. It runs on a CPU or a GPU.
"""

EPILOG = """\
examples:
  brainprior data out participant                               all scans in ./data
  brainprior data out participant --participant-label 01 -m T2w    the T2w of sub-01
  brainprior data out participant --nprocs 8 --omp-nthreads 4 -w /tmp/work
  brainprior data out participant --dry-run                     expected time and memory
  brainprior data out group                                     tables and a page of all scans

other commands (`brainprior COMMAND --help`):
  train prior|parcellation    train the networks
  selftest                    check this installation and its device
  slurm-script                an array job for Slurm, one task per participant
  check-lesion IMAGE          how much of a lesion's contrast a restoration keeps
  evaluate DATA OUT           degrade 1 mm brains, restore them, compare with the originals
  weights list|verify|add     list or check the networks' weights, add your own
  status OUT                  what is done, failed, running and waiting; the remaining time
  verify OUT                  compare every file with its SHA-256 in the provenance
If your dataset folder has the name of a command, write ./train.

exit codes: 0 every requested scan was processed; 1 a scan failed (logs/status.tsv lists which
and why), the others were processed; 2 the command line or the data set cannot be used.
"""


class _Parser(argparse.ArgumentParser):
    """Raises usage errors as exceptions, so that the command decides how to exit."""

    def error(self, message: str) -> Any:
        kind, _, words = message.partition(": ")
        known = [option for action in self._actions for option in action.option_strings]
        hints = advice(words.split(), known) if kind == "unrecognized arguments" else []
        lines = [message, *hints, "Run `brainprior --help` for the options."]
        raise UsageError("\n".join(lines))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the main command; each destination has the name of its setting."""
    parser = _Parser(
        prog="brainprior",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "bids_dir", type=Path, help="root folder of a raw BIDS data set; never modified"
    )
    parser.add_argument(
        "output_dir", type=Path, help="folder for the derivatives; created if missing"
    )
    parser.add_argument(
        "analysis_level",
        nargs="+",
        choices=LEVELS,
        help="participant: process every scan; group: write one table per contrast and one page "
        "of all scans in output_dir; both can be given",
    )
    groups.query_options(parser.add_argument_group("which scans"))
    groups.task_options(parser.add_argument_group("what to do"))
    groups.anatomy_options(parser.add_argument_group("brain mask and structures"))
    groups.output_options(parser.add_argument_group("what to write"))
    groups.performance_options(parser.add_argument_group("performance"))
    groups.subset_options(parser.add_argument_group("partial runs"))
    groups.other_options(parser.add_argument_group("other"))
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options from the command line, then from ``--config-file``, then the defaults."""
    parser = build_parser()
    options = parser.parse_args(list(argv))
    options.bids_filters = {}
    if options.config_file is None:
        return options
    config = read_config(options.config_file)
    tokens = as_tokens(parser, config)
    folders = [str(options.bids_dir), str(options.output_dir), *options.analysis_level]
    try:
        base = vars(parser.parse_args([*folders, *tokens]))
    except UsageError as error:
        raise UsageError(f"--config-file {options.config_file}: {error}") from error
    explicit = build_parser()
    for action in explicit._actions:
        action.default = argparse.SUPPRESS
    given = vars(explicit.parse_args(list(argv)))
    merged = {**base, **given, "bids_filters": {}}
    if options.bids_filter_file is None:
        merged["bids_filters"] = config.get("bids_filters", {})
    return argparse.Namespace(**merged)


def parse_settings(argv: Sequence[str]) -> Settings:
    """The settings of a command line, with defaults filled in and paths checked.

    Raises
    ------
    UsageError
        With advice what to do.
    SystemExit
        After ``--help`` and ``--version``.
    """
    for word in argv:
        if NOT_TEXT.search(word):
            raise UsageError(
                f"the argument {readable(word)} is not UTF-8 text, so it cannot be recorded. "
                "Rename the file or folder, or correct the argument."
            )
    options = _parse(argv)
    task = "+".join(word for word in WORDS if word in options.task)
    check_task(options, task)
    modalities = chosen_modalities(options.modalities, options.ignore)
    bids_dir = options.bids_dir.absolute()
    output_dir = options.output_dir.absolute()
    work_dir = (options.work_dir or options.output_dir / WORK_DIR).absolute()
    check_paths(bids_dir, output_dir, work_dir)
    exports = export_roots(options.exports, bids_dir, output_dir)
    check_anatomy(options)
    spaces = chosen_spaces(options.output_spaces)
    if not (options.reports_only or options.boilerplate_only):  # these compute nothing
        check_templates(spaces)
    prior = named_prior(options.prior)

    plugin = read_plugin_file(options.plugin_file)
    nprocs = options.nprocs or resources.available_processors()
    sampler = registry.find(options.sampler)
    defaults: dict[str, int | None] = {"n_samples": 4, "n_steps": None}
    if options.sloppy:
        defaults = dict(SLOPPY)
    if not sampler.yields_samples:
        if (options.n_samples or 1) > 1 or options.save_samples:
            raise UsageError(
                f"--sampler {sampler.name} draws no samples: leave out --n-samples and "
                "--save-samples, or use --sampler conditional."
            )
        defaults = {"n_samples": 1, "n_steps": None}
    filters = (
        read_filters(options.bids_filter_file, modalities)
        if options.bids_filter_file
        else checked_filters(
            {key: value for key, value in options.bids_filters.items() if key in modalities},
            modalities,
            f"--config-file {options.config_file}: bids_filters",
        )
    )
    return Settings(
        bids_dir=bids_dir,
        output_dir=output_dir,
        work_dir=work_dir,
        analysis_level=tuple(level for level in LEVELS if level in options.analysis_level),
        participant_label=bare_labels(options.participant_label, "sub-"),
        session_label=bare_labels(options.session_label, "ses-"),
        run_id=run_labels(options.run_id),
        modalities=modalities,
        bids_filters=filters,
        bids_database_dir=_absolute(options.bids_database_dir),
        derivatives=dict(options.derivatives),
        skip_bids_validation=options.skip_bids_validation,
        task=task,
        sampler=options.sampler,
        n_samples=options.n_samples or defaults["n_samples"],
        n_steps=defaults["n_steps"],
        save_samples=options.save_samples,
        viewer=not options.no_viewer,
        fuse=options.fuse,
        lesion_mask=options.lesion_mask,
        dilate_mm=options.dilate_mm,
        trust=options.trust,
        output_spaces=spaces,
        output_grid=options.output_grid,
        exports=exports,
        export_per=options.export_per,
        prior=prior,
        slice_thickness_mm=options.slice_thickness_mm,
        slice_plane=options.slice_plane,
        effective_resolution=options.effective_resolution or "auto",
        field_strength_t=options.field_strength_t,
        skull_strip=options.skull_strip,
        parcellation=options.parcellation,
        synthstrip_model=_absolute(options.synthstrip_model),
        random_seed=options.random_seed,
        # a job of a scheduler sees another machine's devices than this process
        device=options.device if plugin.is_batch else resources.resolve_device(options.device),
        n_gpu_procs=options.n_gpu_procs,
        nprocs=nprocs,
        omp_nthreads=min(options.omp_nthreads or min(nprocs, 8), nprocs),
        mem_gb=options.mem_gb
        or plugin.memory_gb
        or resources.memory_for_steps_gb(resources.memory_limit_gb()[0]),
        job_id=options.job_id,
        low_mem=options.low_mem,
        plugin_file=_absolute(options.plugin_file),
        force=options.force,
        sloppy=options.sloppy,
        dry_run=options.dry_run,
        boilerplate_only=options.boilerplate_only,
        reports_only=options.reports_only,
        clean_workdir=options.clean_workdir,
        resource_monitor=options.resource_monitor,
        debug=options.debug,
        stop_on_first_crash=options.stop_on_first_crash or options.debug,
        write_graph=options.write_graph,
        verbose=max(options.verbose, 1) if options.debug else options.verbose,
        run_uuid=new_run_uuid(),
        command=("brainprior", *argv),
    )


def _absolute(path: Path | None) -> Path | None:
    return path.absolute() if path is not None else None
