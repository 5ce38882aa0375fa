# SPDX-License-Identifier: Apache-2.0
"""The Boutiques descriptor of the command, generated from its parser so that it stays up to date.

    python -m brainprior_bids.cli.boutiques >docs/boutiques/brainprior.json

``bosh validate --bids`` requires the output folder as two inputs with one key, a name for the
participant level and a folder for the group level. With those, bosh 0.5 omits the folder from the
group level's command line, so here it is one input for both.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from brainprior_bids import __version__
from brainprior_bids.cli.parser import build_parser
from brainprior_bids.run.resources import MAIN_GB
from brainprior_bids.settings import LEVELS

FILES = ("bids_filter_file", "synthstrip_model", "prior", "plugin_file", "config_file")
"""Paths of files that must exist; other paths may be created, and are strings for Boutiques."""
NUMBERS: dict[str, dict[str, Any]] = {
    "positive_int": {"integer": True, "minimum": 1},
    "positive_float": {"minimum": 0, "exclusive-minimum": True},
    "distance": {"minimum": 0},
    "seed": {"integer": True, "minimum": 0},
}
"""Type of an option -> its name in Boutiques."""
ERROR_CODES = {
    1: "A scan failed, the others were processed: logs/status.tsv lists the reasons.",
    2: "The command line or the data set cannot be used, or there is not enough memory.",
}


def descriptor() -> dict[str, Any]:
    """The whole descriptor, schema 0.5."""
    from brainprior_bids.workflows.scan import MEMORY_GB

    options = [
        _option(action)
        for action in build_parser()._actions
        if action.option_strings and action.dest not in ("help", "version")
    ]
    # the options that BIDS Apps share are first, in this order
    options.sort(key=lambda option: option["id"] not in ("participant_label", "session_label"))
    keys = [option["value-key"] for option in options]
    return {
        "name": "brainprior",
        "description": "BIDS App that restores brain MRI (T1w, T2w, FLAIR; any slice thickness) "
        "to 1 mm with an uncertainty, by sampling from the posterior under a 3-D diffusion prior",
        "tool-version": __version__,
        "schema-version": "0.5",
        "command-line": "mkdir -p [OUTPUT_DIR]; brainprior [BIDS_DIR] [OUTPUT_DIR] "
        f"[ANALYSIS_LEVEL] {' '.join(keys)}",
        "container-image": {"type": "docker", "image": f"brainprior:{__version__}"},
        "inputs": [
            {
                "id": "bids_dir",
                "name": "BIDS data set",
                "type": "File",
                "description": "Root of a raw BIDS data set; only read.",
                "value-key": "[BIDS_DIR]",
                "optional": False,
            },
            {
                "id": "output_dir_name",
                "name": "Output folder",
                "type": "String",
                "description": "Folder for the derivatives; created if missing. For the group "
                "level, the folder of the participant level.",
                "value-key": "[OUTPUT_DIR]",
                "optional": False,
            },
            {
                "id": "analysis_level",
                "name": "Analysis level",
                "type": "String",
                "description": "participant: restore every scan on its own; group: tables and one "
                "page over all scans in the output folder.",
                "value-key": "[ANALYSIS_LEVEL]",
                "value-choices": list(LEVELS),
                "optional": False,
            },
            *options,
        ],
        "output-files": [
            {
                "id": "output_dir",
                "name": "Derivatives",
                "description": "The derivatives.",
                "path-template": "[OUTPUT_DIR]",
                "optional": False,
            }
        ],
        "error-codes": [{"code": c, "description": text} for c, text in ERROR_CODES.items()],
        "suggested-resources": {"cpu-cores": 4, "ram": max(MEMORY_GB.values()) + MAIN_GB},
        "tags": {"domain": ["neuroinformatics", "mri", "anatomical"]},
    }


def _option(action: argparse.Action) -> dict[str, Any]:
    flag = next(text for text in action.option_strings if text.startswith("--"))
    entry: dict[str, Any] = {
        "id": action.dest,
        "name": flag,
        "type": "String",
        "description": str(action.help).replace("%%", "%"),
        "value-key": f"[{action.dest.upper()}]",
        "command-line-flag": flag,
        "optional": True,
    }
    kind = getattr(action.type, "__name__", "")
    if action.nargs == 0:
        entry["type"] = "Flag"
    elif action.dest in FILES:
        entry["type"] = "File"
    elif kind in NUMBERS:
        entry |= {"type": "Number", **NUMBERS[kind]}
    if action.choices is not None:
        entry["value-choices"] = list(action.choices)
    if action.nargs == "+":
        entry["list"] = True
    return entry


if __name__ == "__main__":
    print(json.dumps(descriptor(), indent=2, ensure_ascii=False))
