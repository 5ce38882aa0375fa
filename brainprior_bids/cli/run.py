# SPDX-License-Identifier: Apache-2.0
"""The command ``brainprior``: from the command line to an exit code."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import platform
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from brainprior_bids import __version__
from brainprior_bids.bids import export, status
from brainprior_bids.bids.derivatives import check_output, write_dataset_files
from brainprior_bids.bids.files import write_text
from brainprior_bids.bids.given import find_given
from brainprior_bids.bids.names import result_name, scan_seed
from brainprior_bids.bids.provenance import (
    changed_outputs,
    fingerprint,
    sha256_file,
    write_run,
)
from brainprior_bids.bids.qc import rebuild_qc
from brainprior_bids.bids.query import Scan, check_dataset, find_scans
from brainprior_bids.bids.validate import find_validator, validate_scans
from brainprior_bids.cli.environment import prepare_environment
from brainprior_bids.cli.monitor import ResourceMonitor
from brainprior_bids.cli.parser import parse_settings
from brainprior_bids.cli.plugin_file import read_plugin_file
from brainprior_bids.cli.progress import Progress
from brainprior_bids.engine.errors import (
    BrainpriorError,
    InputError,
    UsageError,
    WeightsError,
)
from brainprior_bids.settings import Settings

LOG = logging.getLogger("brainprior")
MASKS = {
    "synthstrip": "SynthStrip",
    "skip": "the scan's own edge (--skull-strip skip)",
    "mask": "another data set (--derivatives)",
}
STRUCTURES = {"synthseg": "SynthSeg", "derivatives": "another data set (--derivatives)"}
"""What the methods text calls a source that is not embedded, before it was used."""
TRAINERS = ("prior", "parcellation")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    0 every requested scan is done; 1 something failed; 2 the request cannot be carried out.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _log_to_stderr()
    before = signal.signal(signal.SIGTERM, _interrupt)  # what a scheduler sends
    try:
        if arguments[:1] == ["train"]:
            return train(arguments[1:])
        if arguments[:1] == ["selftest"]:
            from brainprior_bids.cli.selftest import selftest

            return selftest(arguments[1:])
        if arguments[:1] == ["check-lesion"]:
            from brainprior_bids.cli.check_lesion import check_lesion

            return check_lesion(arguments[1:])
        if arguments[:1] == ["slurm-script"]:
            from brainprior_bids.cli.slurm_script import slurm_script

            return slurm_script(arguments[1:])
        if arguments[:1] == ["verify"]:
            return verify(arguments[1:])
        return run(parse_settings(arguments))
    except UsageError as error:
        print(f"brainprior: error: {error}", file=sys.stderr)
        return 2
    except BrainpriorError as error:
        print(f"brainprior: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("brainprior: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def train(argv: Sequence[str]) -> int:
    """``brainprior train prior|parcellation``; the trainer is imported when it is asked for."""
    parser = argparse.ArgumentParser(prog="brainprior train", description="Train a network.")
    commands = parser.add_subparsers(dest="network", required=True, metavar="|".join(TRAINERS))
    chosen = next((word for word in argv if word in TRAINERS), None)
    for name in TRAINERS:
        command = commands.add_parser(name, help=f"train the {name} network")
        if name == chosen:
            module = importlib.import_module(f"brainprior_bids.training.{name}")
            module.add_arguments(command)
            command.set_defaults(trainer=module.main)
    options = parser.parse_args(list(argv))
    return int(options.trainer(options))


def verify(argv: Sequence[str]) -> int:
    """``brainprior verify OUT``: compare every output with its recorded SHA-256."""
    parser = argparse.ArgumentParser(
        prog="brainprior verify",
        description="Compare every output with the SHA-256 in its provenance; exit 1 if one "
        "changed or is missing.",
    )
    parser.add_argument("output_dir", type=Path)
    options = parser.parse_args(list(argv))
    changes, checked = changed_outputs(options.output_dir)
    if not checked:
        raise UsageError(f"{options.output_dir} has no provenance to verify (prov/*_ent.json).")
    for path, what in changes.items():
        print(f"{what}\t{path}")
    print(f"{checked} file(s) checked, {len(changes)} not as they were written.")
    return 1 if changes else 0


def run(settings: Settings) -> int:
    """Do what the settings ask for; the exit code."""
    LOG.setLevel(logging.DEBUG if settings.verbose else logging.INFO)
    raw = check_dataset(settings.bids_dir)
    if settings.reports_only:
        return _reports_only(settings)
    code = 0
    if "participant" in settings.analysis_level:
        scans = find_scans(settings)
        if settings.dry_run:
            from brainprior_bids.cli.plan import print_plan

            print_plan(scans, settings)
            return 0
        check_output(settings.output_dir)
        code = _participants(scans, settings, raw)
    elif settings.dry_run or settings.boilerplate_only:
        raise UsageError("--dry-run and --boilerplate-only are for the participant level.")
    if "group" in settings.analysis_level and not settings.boilerplate_only:
        _group(settings)
    return code


def _participants(scans: Sequence[Scan], settings: Settings, raw: dict[str, Any]) -> int:
    """The participant level; 0 if every requested scan is done."""
    if settings.clean_workdir:
        _clean(settings.work_dir)
    prepare_environment(settings)
    log_file = _log_to_file(settings.output_dir / "logs" / f"{settings.run_uuid}.log")
    try:
        if not settings.skip_bids_validation and not settings.boilerplate_only:
            _validate(scans, settings)
        weights = _weights(settings)
        if settings.boilerplate_only:
            return _boilerplate_only(scans, settings, weights)
        write_dataset_files(
            settings.output_dir,
            bids_dir=settings.bids_dir,
            raw=raw,
            derivatives=settings.derivatives,
        )
        LOG.info("brainprior %s, run %s", __version__, settings.run_uuid)
        LOG.info(
            "%d scan(s) of %d participant(s); %s, %d processor(s), %d thread(s) a step",
            len(scans),
            len({scan.subject for scan in scans}),
            settings.device,
            settings.nprocs,
            settings.omp_nthreads,
        )
        export.prepare(
            settings.exports,
            bids_dir=settings.bids_dir,
            output_dir=settings.output_dir,
            raw=raw,
        )
        jobs = _plan(scans, settings, {role: digest for role, (_, digest) in weights.items()})
        if jobs:
            write_run(settings)
            _execute(jobs, settings, {role: path for role, (path, _) in weights.items()})
        if "raw" in settings.exports:
            root = Path(settings.exports["raw"])
            links = export.link_rest(root, settings.bids_dir, scans)
            LOG.info("export raw: %d file(s) linked in %s", links, root)
        status.rebuild_status(settings.output_dir)
        rebuild_qc(settings.output_dir)
        reports_made = _reports({scan.subject for scan in scans}, settings)
        return _conclude(scans, settings) or (0 if reports_made else 1)
    finally:
        LOG.removeHandler(log_file)
        log_file.close()


def _reports_only(settings: Settings) -> int:
    """Write table, reports and methods text again, from what is in the output folder."""
    subjects = {
        str(summary["subject"])
        for summary in status.read_summaries(settings.output_dir)
        if not settings.participant_label or summary["subject"] in settings.participant_label
    }
    if not subjects:
        raise UsageError(
            f"--reports-only: nothing is done in {settings.output_dir} for the participants "
            "that were asked for."
        )
    check_output(settings.output_dir)
    status.rebuild_status(settings.output_dir)
    rebuild_qc(settings.output_dir)
    made = True
    if "participant" in settings.analysis_level:
        made = _reports(subjects, settings)
    if "group" in settings.analysis_level:
        _group(settings)
    LOG.info("%d report(s) in %s", len(subjects), settings.output_dir)
    return 0 if made else 1


def _group(settings: Settings) -> None:
    from brainprior_bids.reports.group import build_group

    written = build_group(settings.output_dir)
    if not written:
        raise UsageError(
            f"group: no scan is done in {settings.output_dir}. Run the participant level first."
        )
    for path in written:
        LOG.info("group: %s", path)


def _boilerplate_only(
    scans: Sequence[Scan], settings: Settings, weights: dict[str, tuple[Path, str]]
) -> int:
    """Write the methods text of what these settings would do."""
    from brainprior_bids.engine.weights import read_weights
    from brainprior_bids.reports.methods import Method, card, write_citation

    cards = {role: card(read_weights(path, kind=role)[1]) for role, (path, _) in weights.items()}
    methods = [
        Method(
            suffix=scan.name.suffix,
            task=settings.task,
            sampler=settings.sampler,
            n_samples=settings.n_samples,
            calls=settings.n_steps * (5 if settings.sampler == "daps" else 1),
            version=__version__,
            mask_source=MASKS.get(settings.skull_strip, "embedded"),
            structures_source=STRUCTURES.get(settings.parcellation, "embedded"),
            **cards,
        )
        for scan in scans
        if scan.problem is None
    ]
    for path in write_citation(settings.output_dir / "logs", methods):
        LOG.info("%s", path)
    return 0


def _clean(work_dir: Path) -> None:
    """Remove what brainprior makes in a work folder, and nothing else."""
    for name in ("brainprior_wf", "home"):
        shutil.rmtree(work_dir / name, ignore_errors=True)
    for left in work_dir.glob("validate-*"):
        shutil.rmtree(left, ignore_errors=True)


def _validate(scans: Sequence[Scan], settings: Settings) -> None:
    command = find_validator()
    if command is None:
        LOG.warning("bids-validator-deno is not installed: the data set was not validated.")
        return
    try:
        issues = validate_scans(
            settings.bids_dir, scans, command=command, scratch=settings.work_dir
        )
    except RuntimeError as error:
        LOG.warning("%s The data set was not validated.", error)
        return
    # an image that is broken is that scan's own matter, and so is its sidecar without an image
    broken = {issue.location for issue in issues} & {f"/{scan.relative}" for scan in scans}
    stems = {location.removesuffix(".gz").removesuffix(".nii") for location in broken}
    own = broken | {f"{stem}.json" for stem in stems}
    for issue in issues:
        if issue.location in own:
            LOG.warning("validator: %s", issue)
    fatal = [issue for issue in issues if issue.location not in own]
    if fatal:
        shown = "\n".join(f"  {issue}" for issue in fatal[:10])
        raise UsageError(
            f"{settings.bids_dir} is not valid BIDS, {len(fatal)} error(s) in what was asked "
            f"for:\n{shown}\nRepair them, or pass --skip-bids-validation."
        )


def _weights(settings: Settings) -> dict[str, tuple[Path, str]]:
    """Role -> file and SHA-256 of the weights, checked before anything runs."""
    from brainprior_bids.engine import weights

    paths = {
        "prior": settings.prior or weights.FOLDER / "prior.safetensors",
        "parcellation": weights.FOLDER / "parcellation.safetensors",
    }
    checked = {}
    for kind, path in paths.items():
        try:
            _, metadata = weights.read_weights(path, kind=kind)
        except WeightsError as error:
            raise UsageError(str(error)) from error
        checked[kind] = (path, metadata["sha256"])
    return checked


def _plan(scans: Sequence[Scan], settings: Settings, weights: dict[str, str]) -> list[Any]:
    """The scans that need work; the others get their summary here."""
    from brainprior_bids.workflows.scan import Job

    jobs = []
    to_fmriprep = (
        export.choose_t1w(scans, per=settings.export_per)
        if "fmriprep" in settings.exports
        else set()
    )
    _say_export(scans, settings, to_fmriprep)
    for scan in scans:
        if scan.problem is not None:
            _write_failure(scan, settings, {"message": scan.problem, "type": "InputError"})
            continue
        try:
            input_sha256 = sha256_file(scan.path)
        except OSError as error:
            message = f"the file cannot be read ({error.strerror}). Check its permissions."
            _write_failure(scan, settings, {"message": message, "type": "InputError"})
            continue
        try:
            given = find_given(scan, settings)
            given_sha256 = {role: sha256_file(file.path) for role, file in given.items()}
        except InputError as error:
            _write_failure(scan, settings, {"message": str(error), "type": "InputError"})
            continue
        except OSError as error:
            message = f"{error.filename} cannot be read ({error.strerror}). Check its permissions."
            _write_failure(scan, settings, {"message": message, "type": "InputError"})
            continue
        digest = fingerprint(
            scan, settings, input_sha256=input_sha256, weights=weights, given=given_sha256
        )
        previous = status.read_summary(settings.output_dir, result_name(scan.name, settings.image))
        roots = {
            kind: root
            for kind, root in settings.exports.items()
            if kind == "raw" or scan.name.stem in to_fmriprep
        }
        done = previous is not None and _is_done(previous, digest, settings)
        if done and not settings.force and not export.is_delivered(roots, scan, digest):
            LOG.info("%s: done, but not exported: it is run again for that", scan.name.stem)
        elif done and not settings.force:
            LOG.info("%s: already done with the same input and settings", scan.name.stem)
            previous.update(
                status="skipped",
                message="already done with the same input, settings and version",
            )
            status.write_summary(settings.output_dir, previous)
            if "fmriprep" in roots:  # an earlier export may have been one a session
                export.remove_others(
                    Path(roots["fmriprep"]),
                    scan.subject,
                    export.fmriprep_files(scan.name),
                    per=settings.export_per,
                )
            continue
        seed = scan_seed(settings.random_seed, scan.name)
        jobs.append(Job(scan, seed, digest, given, tuple(roots)))
    return jobs


def _say_export(scans: Sequence[Scan], settings: Settings, chosen: set[str]) -> None:
    """Which T1w goes to fMRIPrep, where there was a choice, and who has none."""
    if "fmriprep" not in settings.exports:
        return
    for stem in sorted(chosen):
        LOG.info("export fmriprep: %s in %s", stem, settings.exports["fmriprep"])
    without = {s.subject for s in scans} - {s.subject for s in scans if s.name.stem in chosen}
    for subject in sorted(without):
        LOG.warning("export fmriprep: sub-%s has no T1w, nothing is exported", subject)


def _is_done(previous: dict[str, Any], digest: str, settings: Settings) -> bool:
    return (
        previous.get("status") in status.FINISHED
        and previous.get("fingerprint") == digest
        and all(
            (settings.output_dir / path).is_file()
            for path in (*previous["outputs"], *previous["figures"])
        )
    )


def _execute(jobs: Sequence[Any], settings: Settings, weights: dict[str, Path]) -> None:
    """Build the graph, run it, and give every scan that did not end a summary saying why."""
    from brainprior_bids.interfaces.base import FAILURE
    from brainprior_bids.workflows.base import configure_nipype, init_brainprior_wf
    from brainprior_bids.workflows.scan import expected_work, log_dir

    for subject in {job.scan.subject for job in jobs}:
        write_text(log_dir(settings, subject) / "brainprior.toml", settings.to_toml())
    configure_nipype(settings, crash_dir=settings.output_dir / "logs")
    workflow = init_brainprior_wf(
        jobs=jobs,
        settings=settings,
        prior=weights["prior"],
        parcellation=weights["parcellation"],
    )
    if settings.write_graph:
        logs = settings.output_dir / "logs"
        logs.mkdir(exist_ok=True)
        workflow.write_graph(
            str(logs / "graph.dot"),
            graph2use="colored",
            format="svg" if shutil.which("dot") else "dot",  # a picture needs Graphviz
        )
    base = settings.work_dir / workflow.name
    folders = [base / f"{job.scan.name.node_name}_wf" for job in jobs]
    for folder in folders:  # only these: another process may be at work on other scans
        for failure in folder.glob(f"*/{FAILURE}"):
            failure.unlink()
    for job in jobs:
        _write_running(job.scan, settings)
    names = {f"{job.scan.name.node_name}_wf": job.scan.name.stem for job in jobs}
    progress = Progress(names, dict(zip(names, folders, strict=True)), expected_work(settings))
    monitor = (
        ResourceMonitor(
            settings.output_dir / "logs" / f"{settings.run_uuid}_resources.tsv",
            lambda: progress.running,
        )
        if settings.resource_monitor
        else nullcontext()
    )
    crashed: Exception | KeyboardInterrupt | None = None
    with progress, monitor:
        pool = _make_plugin(workflow, settings, progress)
        try:
            workflow.run(plugin=pool)
        except Exception as error:  # Nipype re-raises the first failed node's, whatever it was
            crashed = error
            LOG.debug("the graph ended with an error", exc_info=True)
        except KeyboardInterrupt as interrupt:
            crashed = interrupt
        finally:  # after an interrupt, and with --stop-on-first-crash, nodes may still be running
            if not settings.debug:
                pool.stop()
    for job, folder in zip(jobs, folders, strict=True):
        summary = status.read_summary(
            settings.output_dir, result_name(job.scan.name, settings.image)
        )
        if summary is None or summary["status"] == "running":
            error = _why(job.scan, folder, settings, crashed)
            _write_failure(job.scan, settings, error, nodes=_records(folder))
    if isinstance(crashed, KeyboardInterrupt):
        status.rebuild_status(settings.output_dir)
        rebuild_qc(settings.output_dir)
        raise crashed


def _write_running(scan: Scan, settings: Settings) -> None:
    """What the status says of a scan from now until it ends, or for good if this is killed."""
    number = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f", Slurm job {number}{f'_{task}' if task else ''}" if number else ""
    result = result_name(scan.name, settings.image)
    previous = status.read_summary(settings.output_dir, result) or {}
    kept = {key: previous.get(key, []) for key in ("outputs", "figures")}
    status.write_summary(
        settings.output_dir,
        {
            **_summary(scan, settings),
            **kept,  # the last step removes those that it does not replace
            "status": "running",
            "message": f"began {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC on {platform.node()}"
            f"{job}; not ended: it is at work, or was killed",
        },
    )


def _make_plugin(workflow: Any, settings: Settings, progress: Progress) -> Any:
    """Our own pool, or the scheduler that ``--nipype-plugin-file`` names."""
    from nipype.pipeline.plugins import LinearPlugin

    from brainprior_bids.workflows.cluster import make_batch_plugin
    from brainprior_bids.workflows.plugin import SurvivingPool
    from brainprior_bids.workflows.scan import MEMORY_GB, NODES

    if settings.debug:
        return LinearPlugin(plugin_args={"status_callback": progress})
    file = read_plugin_file(settings.plugin_file)
    if file.is_batch:
        return make_batch_plugin(
            file.plugin,
            plugin_args=file.plugin_args,
            step_args=file.step_args,
            workflow=workflow,
            status_callback=progress,
            tag=f"brainprior-{settings.run_uuid}",
        )
    arguments = {
        "n_procs": settings.nprocs,
        "memory_gb": max(MEMORY_GB.values()) if settings.low_mem else settings.mem_gb,
        "n_gpu_procs": settings.n_gpu_procs if settings.use_gpu else 0,
        "raise_insufficient": False,
        "mp_context": "forkserver",
        **file.plugin_args,
        "status_callback": progress,
        "order": NODES,
    }
    return SurvivingPool(plugin_args=arguments)


def _records(folder: Path) -> list[dict[str, Any]]:
    """Time and memory of the steps that a scan got through, in their order."""
    from brainprior_bids.bids.files import read_json
    from brainprior_bids.interfaces.base import RECORD
    from brainprior_bids.workflows.scan import NODES

    paths = (folder / name / RECORD for name in NODES)
    return [read_json(path) for path in paths if path.exists()]


def _why(
    scan: Scan, folder: Path, settings: Settings, crashed: BaseException | None
) -> dict[str, Any]:
    """Why a scan did not end: what its node said, or what the graph ended with."""
    from brainprior_bids.bids.files import read_json
    from brainprior_bids.interfaces.base import FAILURE, RECORD
    from brainprior_bids.workflows.cluster import LOST, REFUSED
    from brainprior_bids.workflows.plugin import KILLED
    from brainprior_bids.workflows.scan import NODES, log_dir

    crash_files = sorted(log_dir(settings, scan.subject).glob("crash-*.txt"))
    own = [path for path in crash_files if f"{scan.name.node_name}_wf" in _read(path)]
    crash_file = str(own[-1].relative_to(settings.output_dir)) if own else None
    for failure in sorted(folder.glob(f"*/{FAILURE}")):
        found = read_json(failure)
        message = found["message"]
        if not found["expected"]:
            message = f"{found['type']} in {failure.parent.name}: {message}"
        return {
            "node": failure.parent.name,
            "type": found["type"],
            "message": message,
            "crash_file": crash_file,
        }
    lines = _read(own[-1]).splitlines() if own else []
    killed = [line for line in lines if line.startswith((KILLED, LOST, REFUSED))]
    if killed:
        step = re.search(r"^Node: \S+\.(\w+)$", "\n".join(lines), re.MULTILINE)
        node = step[1] if step else None
        message = f"{node}: {killed[0]}" if node else killed[0]
        return {
            "node": node,
            "type": "KilledWorker",
            "message": message,
            "crash_file": crash_file,
        }
    if own:
        said = [line.strip() for line in lines if line.strip()]
        return {"type": "Crash", "message": said[-1], "crash_file": crash_file}
    if isinstance(crashed, KeyboardInterrupt):
        return {"type": "Interrupted", "message": "interrupted; the same command goes on"}
    if crashed is not None and settings.stop_on_first_crash:
        return {
            "type": "Stopped",
            "message": "not finished: the run was stopped because another scan failed",
        }
    if crashed is not None:
        last = [line for line in str(crashed).splitlines() if line.strip()][-1:]
        reason = last[0].strip() if last else type(crashed).__name__
        return {"type": type(crashed).__name__, "message": f"not finished: {reason}"}
    step = next((name for name in NODES if not (folder / name / RECORD).exists()), None)
    return {
        "node": step,
        "type": "Unknown",
        "message": f"not finished, stopped in {step}; run again with -vv to see why",
    }


def _write_failure(
    scan: Scan,
    settings: Settings,
    error: dict[str, Any],
    *,
    nodes: Sequence[dict[str, Any]] = (),
) -> None:
    message = str(error["message"])
    if not message.startswith(scan.name.stem):
        message = f"{scan.name.stem}: {message}"
    status.write_summary(
        settings.output_dir,
        {
            **_summary(scan, settings),
            "seconds": round(sum(node["seconds"] for node in nodes), 3) if nodes else None,
            "message": message,
            "warnings": [text for node in nodes for text in node["warnings"]],
            "nodes": list(nodes),
            "error": {"node": None, "crash_file": None, **error},
        },
    )


def _summary(scan: Scan, settings: Settings) -> dict[str, Any]:
    """Of a scan of which nothing was made."""
    return {
        "scan": result_name(scan.name, settings.image),
        "subject": scan.subject,
        "source": str(scan.relative),
        "task": settings.task,
        "status": "failed",
        "seconds": None,
        "message": "",
        "run_uuid": settings.run_uuid,
        "version": __version__,
        "fingerprint": None,
        "outputs": [],
        "figures": [],
        "warnings": [],
        "facts": {},
        "nodes": [],
        "error": None,
    }


def _reports(subjects: Iterable[str], settings: Settings) -> bool:
    """One HTML page a participant and the methods text; False if one could not be made."""
    from brainprior_bids.reports.methods import of_summary, write_citation
    from brainprior_bids.reports.subject import build_subject_report

    made = True
    for subject in sorted(subjects):
        try:
            build_subject_report(settings.output_dir, subject)
        except Exception as error:  # the images are there: say it, and go on
            LOG.error("sub-%s: the report could not be made: %s", subject, error)
            LOG.debug("traceback", exc_info=True)
            made = False
    done = [
        summary
        for summary in status.read_summaries(settings.output_dir)
        if summary.get("status") in status.FINISHED
    ]
    write_citation(settings.output_dir / "logs", [of_summary(summary) for summary in done])
    return made


def _conclude(scans: Sequence[Scan], settings: Settings) -> int:
    """Say how it ended; 0 if every scan is done."""
    summaries = [
        status.read_summary(settings.output_dir, result_name(scan.name, settings.image))
        for scan in scans
    ]
    states = [summary["status"] if summary else "failed" for summary in summaries]
    for summary in summaries:
        if summary and summary["status"] == "failed":
            LOG.error("FAILED %s", summary["message"])
            if summary["error"].get("crash_file"):
                LOG.error("  see %s", settings.output_dir / summary["error"]["crash_file"])
    LOG.info(
        "%d done, %d already done, %d failed. Status: %s",
        states.count("done"),
        states.count("skipped"),
        states.count("failed"),
        settings.output_dir / "logs" / "status.tsv",
    )
    for subject in sorted({scan.subject for scan in scans}):
        report = settings.output_dir / f"sub-{subject}.html"
        if report.exists():
            LOG.info("report: %s", report)
    return 1 if "failed" in states else 0


def _log_to_stderr() -> None:
    if not LOG.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        LOG.addHandler(handler)
        LOG.propagate = False
    LOG.setLevel(logging.INFO)


def _log_to_file(path: Path) -> logging.Handler:
    """Send every line to a file of this run as well, with its date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(handler)
    return handler


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
