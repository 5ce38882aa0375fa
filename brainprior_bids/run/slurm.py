# SPDX-License-Identifier: Apache-2.0
"""The script for Slurm: an array job, one task per participant, and a group job after it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from brainprior_bids import __version__
from brainprior_bids.run.resources import MAIN_GB


@dataclass(frozen=True, kw_only=True)
class ArrayJob:
    """An array job and its group job.

    Parameters
    ----------
    participants : sequence of str
        Labels; one task each.
    task, group : str
        Command lines of a task (without participant and resources) and of the group job.
    logs : Path
        Folder for the jobs' own output.
    processors : int
        Processors of a task.
    memory_gb : float
        Memory that the steps of a task may reserve together, in GiB.
    sbatch, group_sbatch : sequence of str
        Additional arguments of sbatch for the tasks and for the group job.
    max_running : int, optional
        Maximum number of simultaneous tasks.
    made_by : str
        The command line that wrote this script.
    """

    participants: Sequence[str]
    task: str
    group: str
    logs: Path
    processors: int
    memory_gb: float
    sbatch: Sequence[str] = ()
    group_sbatch: Sequence[str] = ()
    max_running: int | None = None
    made_by: str = ""

    def script(self) -> str:
        """Bash; it submits both jobs."""
        participants, logs, cpus = self.participants, self.logs, self.processors
        limit = f"%{self.max_running}" if self.max_running else ""
        head = f"#SBATCH --chdir={shlex.quote(os.getcwd())}\n"
        memory = f"{self.memory_gb:g}G"
        return f"""\
#!/bin/bash
# Made by brainprior {__version__}: {self.made_by}
# Run it with bash: it submits an array job of {len(participants)} task(s), one participant each,
# and a group job after it. A task that is run again resumes where it stopped.
set -euo pipefail
mkdir -p {shlex.quote(str(logs))}

array=$(sbatch --parsable <<'TASK'
#!/bin/bash
#SBATCH --job-name=brainprior
#SBATCH --array=0-{len(participants) - 1}{limit}
#SBATCH --cpus-per-task={cpus}
#SBATCH --mem={(self.memory_gb + MAIN_GB) * 1024:.0f}M
#SBATCH --output={shlex.quote(f"{logs}/%A_%a.out")}
{head}{_lines(self.sbatch)}\
participants=({shlex.join(participants)})
{self.task} --participant-label "${{participants[$SLURM_ARRAY_TASK_ID]}}" \\
    --nprocs {cpus} --mem {memory} --job-id "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
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
{head}{_lines(self.group_sbatch)}\
{self.group} --job-id "$ARRAY"
GROUP
)
echo "group job ${{group%%;*}}, when all tasks have ended"
"""


def _lines(arguments: Sequence[str]) -> str:
    return "".join(f"#SBATCH {line}\n" for line in arguments)
