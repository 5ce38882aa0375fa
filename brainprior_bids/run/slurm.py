# SPDX-License-Identifier: Apache-2.0
"""The array job of ``brainprior slurm-script``: one task per participant, and a group job."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from brainprior_bids import __version__
from brainprior_bids.run.resources import MAIN_GB


def array_script(
    *,
    command: Sequence[str],
    participants: Sequence[str],
    task: str,
    group: str,
    logs: Path,
    cpus: int,
    memory_gb: float,
    max_running: int | None,
    sbatch: Sequence[str],
    group_sbatch: Sequence[str],
) -> str:
    """A bash script that submits both jobs.

    Parameters
    ----------
    command : sequence of str
        That made the script, for its first line.
    task, group : str
        Command lines of a task, without its participant, and of the group job.
    memory_gb : float
        What the steps of a task may claim together, GiB.
    max_running : int, optional
        Tasks that run at the same time.
    sbatch, group_sbatch : sequence of str
        Further arguments of sbatch.
    """
    limit = f"%{max_running}" if max_running else ""
    head = f"#SBATCH --chdir={shlex.quote(os.getcwd())}\n"
    return f"""\
#!/bin/bash
# Made by brainprior {__version__}: {shlex.join(command)}
# Run it with bash: it submits an array job of {len(participants)} task(s), one participant each,
# and a group job after it. A task that is run again goes on where it stopped.
set -euo pipefail
mkdir -p {shlex.quote(str(logs))}

array=$(sbatch --parsable <<'TASK'
#!/bin/bash
#SBATCH --job-name=brainprior
#SBATCH --array=0-{len(participants) - 1}{limit}
#SBATCH --cpus-per-task={cpus}
#SBATCH --mem={(memory_gb + MAIN_GB) * 1024:.0f}M
#SBATCH --output={shlex.quote(f"{logs}/%A_%a.out")}
{head}{_lines(sbatch)}\
participants=({shlex.join(participants)})
{task} --participant-label "${{participants[$SLURM_ARRAY_TASK_ID]}}" \\
    --nprocs {cpus} --mem {memory_gb:g}G --job-id "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
TASK
)
array=${{array%%;*}}
echo "array job $array"

group=$(sbatch --parsable --dependency="afterany:$array" --export="ALL,ARRAY=$array" <<'GROUP'
#!/bin/bash
#SBATCH --job-name=brainprior-group
#SBATCH --cpus-per-task=1
#SBATCH --mem=2G
#SBATCH --output={shlex.quote(f"{logs}/%j_group.out")}
{head}{_lines(group_sbatch)}\
{group} --job-id "$ARRAY"
GROUP
)
echo "group job ${{group%%;*}}, when all tasks have ended"
"""


def _lines(arguments: Sequence[str]) -> str:
    return "".join(f"#SBATCH {line}\n" for line in arguments)
