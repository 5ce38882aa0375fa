# SPDX-License-Identifier: Apache-2.0
"""``--config-file``: settings of an earlier run, converted to command-line options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brainprior_bids.bids.files import decoded
from brainprior_bids.cli.options import WORK_DIR
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.settings import read_table

NOT_IN_CONFIG = (
    "job_id", "bids_dir", "output_dir", "analysis_level", "run_uuid", "command", "n_steps",
    "dry_run", "boilerplate_only", "reports_only",
)  # fmt: skip
"""Settings that belong to a single run, or are derived from others."""


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a file, without those specific to the run that wrote it."""
    try:
        if "\\u0000" in (text := path.read_bytes().decode("latin-1")) or "\0" in text:
            raise ValueError("a setting contains a zero byte. Remove it.")
        config = read_table(decoded(path.read_bytes())[0])
    except OSError as error:
        raise UsageError(
            f"--config-file {path} cannot be read: {error.strerror}. Check it."
        ) from error
    except ValueError as error:
        raise UsageError(f"--config-file {path}: {error}") from error
    work, output = config.get("work_dir"), config.get("output_dir")
    if work is not None and output is not None and work == output / WORK_DIR:
        del config["work_dir"]  # the default there; here it is inside this output_dir
    if output is not None:
        config["exports"] = {
            kind: "" if Path(root) == output.with_name(f"{output.name}-{kind}") else root
            for kind, root in config.get("exports", {}).items()
        }  # the default there; here it is next to this output_dir
    return {key: value for key, value in config.items() if key not in NOT_IN_CONFIG}


def as_tokens(parser: argparse.ArgumentParser, config: dict[str, Any]) -> list[str]:
    """Settings as command-line options.

    Raises
    ------
    UsageError
        If a label or the like would be read as an option.
    """
    tokens: list[str] = []
    for action in parser._actions:
        if action.dest not in config or not action.option_strings:
            continue
        option, value = action.option_strings[-1], config[action.dest]
        if isinstance(value, bool):
            tokens += [option] * value
        elif action.dest == "task":
            tokens += _several(option, value.split("+"))
        elif action.dest == "verbose":
            tokens += [option] * min(int(value), 3)
        elif action.dest == "mem_gb":
            tokens.append(f"{option}={value}G")
        elif isinstance(value, dict):
            tokens += _several(option, [f"{name}={path}" for name, path in value.items()])
        elif isinstance(value, tuple):
            tokens += _several(option, value)
        else:
            tokens.append(f"{option}={value}")
    return tokens


def _several(option: str, values: Sequence[str]) -> list[str]:
    """An option and its values, if there are any."""
    for value in values:
        if value.startswith("-"):
            raise UsageError(f"--config-file: {option}: {value!r} begins with a dash. Correct it.")
    return [option, *values] if values else []
