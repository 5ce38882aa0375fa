# SPDX-License-Identifier: Apache-2.0
"""Build and run the graph of a run, and record the reason for every unfinished scan."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from brainprior_bids.bids import status
from brainprior_bids.bids.files import reserved, write_text
from brainprior_bids.bids.names import result_name
from brainprior_bids.bids.qc import rebuild_qc
from brainprior_bids.engine.errors import is_full
from brainprior_bids.records import ScanRecord, ScanStatus
from brainprior_bids.run.environment import why_no_workers
from brainprior_bids.run.failures import Failure
from brainprior_bids.run.heartbeat import Heartbeat
from brainprior_bids.run.live import LiveResults
from brainprior_bids.run.logs import LOG
from brainprior_bids.run.monitor import ResourceMonitor
from brainprior_bids.run.outcome import (
    step_records,
    why_not_ended,
    write_failure,
    write_running,
    write_waiting,
)
from brainprior_bids.run.plugin_file import read_plugin_file
from brainprior_bids.run.progress import Progress
from brainprior_bids.settings import Settings

RESERVE, RESERVE_PER_SCAN = 2**18, 2**10
"""Bytes reserved on disk during a run, for the status of every scan and the end of the log."""


def execute(
    jobs: Sequence[Any], settings: Settings, weights: dict[str, Path], heartbeat: Heartbeat
) -> None:
    """Build the graph, run it, and write a summary with the reason for every unfinished scan.

    ``heartbeat`` records the progress.
    """
    from brainprior_bids.interfaces.base import FAILURE
    from brainprior_bids.interfaces.restore import PROGRESS
    from brainprior_bids.workflows.base import configure_nipype, init_brainprior_wf
    from brainprior_bids.workflows.scan import log_dir

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
        kind = "svg" if shutil.which("dot") else "dot"
        workflow.write_graph(str(logs / "graph.dot"), graph2use="colored", format=kind)
        hint = "" if kind == "svg" else " (a picture of it needs Graphviz, which is not installed)"
        LOG.info("graph: %s%s", logs / f"graph.{kind}", hint)
    base = settings.work_dir / workflow.name
    folders = [base / f"{job.scan.name.node_name}_wf" for job in jobs]
    for folder in folders:  # only these: another process may be working on other scans
        for left in (*folder.glob(f"*/{FAILURE}"), *folder.glob(f"*/{PROGRESS}")):
            left.unlink()
    crashed: Exception | KeyboardInterrupt | None = None
    failures: dict[str, Failure] = {}
    try:
        with reserved(settings.output_dir / "logs", RESERVE + RESERVE_PER_SCAN * len(jobs)):
            for job in jobs:
                write_waiting(job.scan, settings)
            status.rebuild_status(settings.output_dir)
            named_jobs = dict(zip(folders, jobs, strict=True))
            crashed = _run(workflow, named_jobs, settings, failures, heartbeat)
    except OSError as error:
        if not is_full(error):
            raise
        crashed = error
    _settle(jobs, folders, workflow.list_node_names(), settings, crashed, failures)
    if isinstance(crashed, KeyboardInterrupt):
        status.rebuild_status(settings.output_dir)
        rebuild_qc(settings.output_dir)
        raise crashed


def _settle(
    jobs: Sequence[Any],
    folders: Sequence[Path],
    every_step: Sequence[str],
    settings: Settings,
    crashed: BaseException | None,
    failures: Mapping[str, Failure],
) -> None:
    """Write a summary with the reason for every unfinished scan."""
    for job, folder in zip(jobs, folders, strict=True):
        summary = status.read_summary(
            settings.output_dir, result_name(job.scan.name, settings.image)
        )
        if summary is None or summary.pending or _failed_now(summary, settings):
            error = why_not_ended(job.scan, folder, settings, crashed, failures)
            inside = f"{folder.name}."
            steps = [name.removeprefix(inside) for name in every_step if name.startswith(inside)]
            records = step_records(folder, steps, error.node)
            write_failure(job.scan, settings, error, nodes=records)


def _failed_now(summary: ScanRecord, settings: Settings) -> bool:
    """Whether a scan failed in this run: other steps may have ended after the failed one."""
    return summary.status is ScanStatus.FAILED and summary.run_uuid == settings.run_uuid


def _run(
    workflow: Any,
    jobs: Mapping[Path, Any],
    settings: Settings,
    failures: dict[str, Failure],
    heartbeat: Heartbeat,
) -> Exception | KeyboardInterrupt | None:
    """Run the graph; returns its error, if any, and fills ``failures`` with those of steps.

    Parameters
    ----------
    jobs : folder of a scan's steps -> its job
    """
    from brainprior_bids.workflows.scan import expected_work

    folders = {folder.name: folder for folder in jobs}
    scans = {folder.name: job.scan.name.stem for folder, job in jobs.items()}
    work = expected_work(settings)
    # a scan that reaches the templates through a T1w is not registered itself
    without = [job for job in jobs.values() if "templates" in work and not job.templates]
    progress = Progress(
        scans,
        folders,
        work,
        left_out=["templates"] * len(without),
        on_begin=lambda name: _begin(jobs[folders[name]], settings),
    )
    heartbeat.watch(progress)
    monitor = (
        ResourceMonitor(
            settings.output_dir / "logs" / f"{settings.run_uuid}_resources.tsv",
            lambda: progress.running,
        )
        if settings.resource_monitor
        else nullcontext()
    )
    plugin = make_plugin(workflow, settings, progress)
    every_step = workflow.list_node_names()
    live = LiveResults(
        list(jobs.values()),
        settings,
        begun=lambda: progress.begun,
        failing=lambda: {name.split(".")[-2] for name in list(plugin.failures)},
        settle=lambda job: _settle(
            [job],
            [folders[f"{job.scan.name.node_name}_wf"]],
            every_step,
            settings,
            None,
            dict(plugin.failures),
        ),
    )
    with progress, monitor, live:
        try:
            workflow.run(plugin=plugin)
        except Exception as error:  # Nipype re-raises the first failed node's error, of any type
            LOG.debug("the graph ended with an error", exc_info=True)
            return error
        except KeyboardInterrupt as interrupt:
            return interrupt
        finally:  # after an interrupt, and with --stop-on-first-crash, nodes may still be running
            plugin.stop()
            failures |= plugin.failures
    return None


def _begin(job: Any, settings: Settings) -> None:
    """Set a scan's status to running: before its next step starts, so that no other status is
    overwritten."""
    try:
        write_running(job.scan, settings)
    except OSError as error:  # a full disk, perhaps: the run continues
        LOG.debug("the status was not updated: %s", error, exc_info=True)


def make_plugin(workflow: Any, settings: Settings, progress: Progress) -> Any:
    """Our own pool, or the scheduler named in ``--nipype-plugin-file``."""
    from brainprior_bids.run.cluster import make_batch_plugin
    from brainprior_bids.run.in_turn import InTurn
    from brainprior_bids.run.pool import SurvivingPool
    from brainprior_bids.workflows.scan import NODES, claims_gb

    if settings.debug:
        return InTurn(plugin_args={"status_callback": progress})
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
    if (problem := why_no_workers()) is not None:
        LOG.warning(
            "No worker process can be started: %s. The steps run in this process, one by one.",
            problem,
        )
        return InTurn(plugin_args={"status_callback": progress})
    arguments = {
        "n_procs": settings.nprocs,
        "n_gpu_procs": settings.n_gpu_procs if settings.use_gpu else 0,
        "raise_insufficient": False,
        "mp_context": "forkserver",
        **file.plugin_args,
        "memory_gb": max(claims_gb(settings).values()) if settings.low_mem else settings.mem_gb,
        "status_callback": progress,
        "order": NODES,
    }
    return SurvivingPool(plugin_args=arguments)
