# SPDX-License-Identifier: Apache-2.0
"""The graph of a run: scans are independent, so a failed scan does not stop the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from brainprior_bids.workflows.scan import Job, init_scan_wf
from nipype import config, logging
from nipype.pipeline import engine as pe

from brainprior_bids.settings import Settings


def init_brainprior_wf(
    *, jobs: Sequence[Job], settings: Settings, prior: Path, parcellation: Path
) -> pe.Workflow:
    """One independent workflow per scan.

    Parameters
    ----------
    jobs : sequence of Job
        Scans to be restored.
    settings : Settings
        Settings of the run.
    prior, parcellation : Path
        Weights.

    Returns
    -------
    Workflow
        Its folders below ``settings.work_dir`` depend only on the scans' names, so that a later
        run resumes where this one stopped.
    """
    workflow = pe.Workflow(name="brainprior_wf", base_dir=str(settings.work_dir))
    workflow.add_nodes(
        [
            init_scan_wf(
                job=job,
                settings=settings,
                prior=prior,
                parcellation=parcellation,
                name=f"{job.scan.name.node_name}_wf",
            )
            for job in jobs
        ]
    )
    return workflow


def configure_nipype(settings: Settings, *, crash_dir: Path) -> None:
    """Set Nipype's configuration for this process; workers receive it with the nodes.

    Results are looked up by the content of the inputs, nothing that a node wrote is removed, and a
    crash of one scan is recorded and does not stop the others.
    """
    config.update_config(
        {
            "execution": {
                "crashdump_dir": str(crash_dir).replace("%", "%%"),  # as configparser requires
                "crashfile_format": "txt",
                "hash_method": "content",
                "stop_on_first_crash": str(settings.stop_on_first_crash).lower(),
                "remove_unnecessary_outputs": "false",
                "keep_inputs": "true",
                "get_linked_libs": "false",
                "check_version": "false",
                "poll_sleep_duration": "0.2",
                "create_report": "false",
            },
            "logging": {
                "log_directory": str(crash_dir).replace("%", "%%"),
                "log_to_file": "false",
                "workflow_level": settings.nipype_level,
            },
        }
    )
    logging.update_logging(config)
