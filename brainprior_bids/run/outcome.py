# SPDX-License-Identifier: Apache-2.0
"""The status of a scan while it runs and where its last step was not reached."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from brainprior_bids import __version__
from brainprior_bids.bids import status
from brainprior_bids.bids.names import result_name
from brainprior_bids.bids.query import Scan
from brainprior_bids.settings import Settings


def write_running(scan: Scan, settings: Settings) -> None:
    """What the status says of a scan from now until it ends, or for good if this is killed."""
    number = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = settings.job_id or (f"{number}_{task}" if task else number)
    result = result_name(scan.name, settings.image)
    previous = status.read_summary(settings.output_dir, result) or {}
    kept = {key: previous.get(key, []) for key in ("outputs", "figures", "left")}
    status.write_summary(
        settings.output_dir,
        {
            **_summary(scan, settings),
            **kept,  # the last step removes those that it does not replace
            "status": "running",
            "job": job,
            "message": f"began {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC on {platform.node()}"
            f"{f', job {job}' if job else ''}; not ended: it is at work, or was killed",
        },
    )


def write_failure(
    scan: Scan,
    settings: Settings,
    error: dict[str, Any],
    *,
    nodes: Sequence[dict[str, Any]] = (),
) -> None:
    """Write the summary of a failed scan: why, and the steps that it got through.

    ``left`` are files of an earlier run that are still in place: the message says so, and the next
    run that succeeds removes those that it does not replace.
    """
    message = str(error["message"])
    if not message.startswith(scan.name.stem):
        message = f"{scan.name.stem}: {message}"
    previous = status.read_summary(settings.output_dir, result_name(scan.name, settings.image))
    made = {
        path for key in ("outputs", "figures", "left") for path in (previous or {}).get(key, ())
    }
    left = sorted(path for path in made if (settings.output_dir / path).is_file())
    if left:
        message = f"{message.rstrip('.')}. What an earlier run made of it is still in place."
    status.write_summary(
        settings.output_dir,
        {
            **_summary(scan, settings),
            "seconds": round(sum(node["seconds"] for node in nodes), 3) if nodes else None,
            "message": message,
            "left": left,
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


def step_records(folder: Path, steps: Collection[str], last: str | None) -> list[dict[str, Any]]:
    """Time and memory of the steps that a scan got through, in their order.

    Another task may have worked in the folder: what is not of this one's ``steps``, and what comes
    after ``last``, the step that failed, is its record.
    """
    from brainprior_bids.bids.files import read_json
    from brainprior_bids.interfaces.base import RECORD
    from brainprior_bids.workflows.scan import NODES

    reached = NODES[: NODES.index(last)] if last in NODES else NODES
    paths = (folder / name / RECORD for name in reached if name in steps)
    return [read_json(path) for path in paths if path.exists()]


def why_not_ended(
    scan: Scan, folder: Path, settings: Settings, crashed: BaseException | None
) -> dict[str, Any]:
    """Why a scan did not end: what its node said, or what the graph ended with."""
    from brainprior_bids.bids.files import read_json
    from brainprior_bids.interfaces.base import FAILURE, RECORD
    from brainprior_bids.run.cluster import LOST, REFUSED
    from brainprior_bids.run.pool import KILLED
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


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
