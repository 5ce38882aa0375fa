# SPDX-License-Identifier: Apache-2.0
"""``--nipype-plugin-file``: which of Nipype's plugins runs the steps, and with what arguments.

Like fMRIPrep's file, it is YAML with ``plugin`` and ``plugin_args``; ``step_args`` are additional
arguments for the job of one step. ``{mem_mb}``, ``{mem_gb}`` and ``{threads}`` are replaced by the
requirements of the step. Examples: docs/cluster.
"""

from __future__ import annotations

import reprlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from brainprior_bids.bids.files import decoded
from brainprior_bids.engine.errors import UsageError

LOCAL = ("MultiProc",)
BATCH = ("SLURM", "SLURMGraph", "SGE", "PBS", "LSF", "OAR")
COUNTS = ("n_procs", "n_gpu_procs", "maxtasksperchild", "max_jobs")
AMOUNTS = ("memory_gb", "poll_sleep_duration", "retry_timeout")
CONTEXTS = ("forkserver", "spawn", "fork")
SUBMIT = {
    "SLURM": "sbatch", "SLURMGraph": "sbatch", "SGE": "qsub", "PBS": "qsub", "LSF": "bsub",
    "OAR": "oarsub",
}  # fmt: skip
"""The command with which each plugin submits jobs."""
STEPS = (
    "conform", "parcellate", "lesion", "n4", "align", "affine", "restore", "mni305", "templates",
    "export", "deliver", "reportlets", "write",
)  # fmt: skip


@dataclass(frozen=True)
class PluginFile:
    """The content of the file.

    Parameters
    ----------
    plugin : str
        One of ``LOCAL`` and ``BATCH``.
    plugin_args : mapping
        Nipype's own, see its documentation.
    step_args : mapping
        Step -> ``{"sbatch_args": "..."}`` (or ``qsub_args`` …), for batch plugins.
    """

    plugin: str = "MultiProc"
    plugin_args: dict[str, Any] = field(default_factory=dict)
    step_args: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def memory_gb(self) -> float | None:
        """Memory that the steps may use together (``memory_gb``), for a local plugin."""
        given = None if self.is_batch else self.plugin_args.get("memory_gb")
        return given if given is None else float(given)

    @property
    def is_batch(self) -> bool:
        """True if each step runs as a separate job, perhaps on another machine."""
        return self.plugin in BATCH


def read_plugin_file(path: Path | None) -> PluginFile:
    """The file's content, checked; without a file, MultiProc.

    Raises
    ------
    UsageError
        Naming the entry that cannot be used.
    """
    if path is None:
        return PluginFile()
    try:
        content = yaml.safe_load(decoded(path.read_bytes())[0])
    except RecursionError:
        raise UsageError(
            f"--nipype-plugin-file {path} cannot be read: it is nested too deeply. Use one "
            "of docs/cluster."
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(
            f"--nipype-plugin-file {path} cannot be read: {error}. Repair it."
        ) from error
    who = f"--nipype-plugin-file {path}"
    if not isinstance(content, dict) or not isinstance(content.get("plugin"), str):
        raise UsageError(
            f"{who}: expected `plugin:` (a name) and `plugin_args:`, got {_shown(content)}."
        )
    unknown = sorted(set(map(str, content)) - {"plugin", "plugin_args", "step_args"})
    if unknown:
        raise UsageError(
            f"{who}: unknown {', '.join(unknown)}. Use plugin, plugin_args and step_args only."
        )
    plugin = str(content["plugin"]).removeprefix("Legacy")
    if plugin not in LOCAL + BATCH:
        raise UsageError(
            f"{who}: plugin {plugin!r} is not supported; use one of {', '.join(LOCAL + BATCH)}."
        )
    arguments = _mapping(who, "plugin_args", content.get("plugin_args"))
    steps = _mapping(who, "step_args", content.get("step_args"))
    for step, extra in steps.items():
        if step not in STEPS:
            raise UsageError(f"{who}: step_args: no step {step!r}; use one of {', '.join(STEPS)}.")
        steps[step] = {
            key: _text(f"{who}: step_args.{step}.{key}", value)
            for key, value in _mapping(who, f"step_args.{step}", extra).items()
        }
    for name, value in arguments.items():
        _check_argument(f"{who}: {name}", name, value)
    if steps and plugin in LOCAL:
        raise UsageError(
            f"{who}: {plugin} does not use step_args; they are for schedulers. Leave them out."
        )
    return PluginFile(plugin, arguments, steps)


def require_scheduler(file: PluginFile, output_dir: Path) -> None:
    """Whether jobs can be submitted from here.

    Raises
    ------
    UsageError
        If the scheduler's command is not there: this is no submit host, or a container. If Nipype
        could not hand the output folder's name to a job.
    """
    if file.is_batch and "%" in str(output_dir):
        raise UsageError(
            f"output_dir {output_dir}: Nipype's plugin {file.plugin} treats a per cent sign in "
            "it as a placeholder. Choose a folder without one."
        )
    command = SUBMIT.get(file.plugin)
    if command is not None and shutil.which(command) is None:
        raise UsageError(
            f"--nipype-plugin-file: plugin {file.plugin} needs {command}, which is not on the "
            "PATH. Run this where jobs can be submitted, not in a container, or write an "
            "array job with `brainprior slurm-script`."
        )


def _check_argument(who: str, name: str, value: Any) -> None:
    """Refuse a value of ``plugin_args`` that Nipype cannot use."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in COUNTS and value is not None:
        if not number or isinstance(value, float) or not 1 <= value < 10**6:
            raise UsageError(f"{who}: expected a whole number from 1, got {_shown(value)}.")
    elif name in AMOUNTS and value is not None:
        if not number or not 0 < value < float("inf"):
            raise UsageError(f"{who}: expected a number above 0, got {_shown(value)}.")
    elif name == "mp_context":
        if value not in CONTEXTS:
            raise UsageError(f"{who}: expected {', '.join(CONTEXTS)}, got {_shown(value)}.")
    elif name.endswith("_args"):
        _text(who, value)
    elif isinstance(value, dict | list):
        raise UsageError(f"{who}: expected one value, got {_shown(value)}.")


def _shown(value: Any) -> str:
    """A shortened value, even if its parts refer to each other."""
    return reprlib.repr(value)[:80]


def _text(who: str, value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise UsageError(f"{who}: expected text, got {_shown(value)}.")
    return str(value)


def _mapping(who: str, name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{who}: {name}: expected a mapping, got {_shown(value)}.")
    return {str(key): item for key, item in value.items()}
