#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the descriptors with which other platforms list brainprior.

    .venv/bin/python scripts/descriptors.py OUT

OUT gets one folder per platform: ``boutiques``, ``nipoppy`` (a bundle for ``nipoppy pipeline
install``), ``neurodesk`` (a recipe for its container builder) and ``bids-apps`` (the entry for the
list of BIDS Apps). Owner, registry and address come from ``publishing.toml``, the version and the
options from the package, so that no descriptor can be outdated.
"""

from __future__ import annotations

import argparse
import base64
import json
import tomllib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from brainprior_bids import __version__
from brainprior_bids.cli.boutiques import descriptor

ROOT = Path(__file__).resolve().parents[1]
CORES, MEMORY, TIME = 4, "8G", "12:00:00"
"""Resources that a Nipoppy job requests for one participant and session on a CPU."""


def publishing() -> dict[str, str]:
    """The entries of ``publishing.toml``."""
    return tomllib.loads((ROOT / "publishing.toml").read_text("utf-8"))


def boutiques(image: str) -> dict[str, Any]:
    """The Boutiques descriptor with the published image."""
    return {
        **descriptor(),
        "container-image": {"type": "docker", "image": f"{image}:{__version__}"},
    }


def nipoppy(image: str) -> dict[str, dict[str, Any]]:
    """A Nipoppy bundle: file name -> content. One job per participant and session."""
    subject, session = "[[NIPOPPY_BIDS_PARTICIPANT_ID]]", "[[NIPOPPY_BIDS_SESSION_ID]]"
    tool = descriptor()
    # Nipoppy creates the folders and runs the container itself
    tool["command-line"] = tool["command-line"].removeprefix("mkdir -p [OUTPUT_DIR]; ")
    tool["container-image"] = {
        "type": "singularity",
        "index": "docker://",
        "image": f"{image}:{__version__}",
    }
    return {
        "config.json": {
            "NAME": "brainprior",
            "VERSION": __version__,
            "DESCRIPTION": tool["description"],
            "PIPELINE_TYPE": "processing",
            "SCHEMA_VERSION": "1.0",
            "CONTAINER_INFO": {
                "FILE": "[[NIPOPPY_DPATH_CONTAINERS]]/[[PIPELINE_NAME]]_[[PIPELINE_VERSION]].sif",
                "URI": f"docker://{image}:[[PIPELINE_VERSION]]",
            },
            "STEPS": [
                {
                    "ANALYSIS_LEVEL": "participant_session",
                    "DESCRIPTOR_FILE": "descriptor.json",
                    "INVOCATION_FILE": "invocation.json",
                    "TRACKER_CONFIG_FILE": "tracker.json",
                    "HPC_CONFIG_FILE": "hpc.json",
                }
            ],
        },
        "descriptor.json": tool,
        "invocation.json": {
            "bids_dir": "[[NIPOPPY_DPATH_BIDS]]",
            "output_dir_name": "[[NIPOPPY_DPATH_PIPELINE_OUTPUT]]",
            "analysis_level": "participant",
            "participant_label": ["[[NIPOPPY_PARTICIPANT_ID]]"],
            "session_label": ["[[NIPOPPY_SESSION_ID]]"],
            "work_dir": "[[NIPOPPY_DPATH_PIPELINE_WORK]]",
            "nprocs": CORES,
            "omp_nthreads": CORES,
        },
        "tracker.json": {
            "SCHEMA_VERSION": "1.0",
            "PATHS": [
                f"{subject}/{session}/anat/{subject}_{session}*_desc-restored_*.nii.gz",
                f"{subject}.html",
            ],
            "PARTICIPANT_SESSION_DIR": f"{subject}/{session}",
        },
        "hpc.json": {"CORES": str(CORES), "MEMORY": MEMORY, "TIME": TIME},
    }


def neurodesk(repository_url: str, image: str) -> dict[str, dict[str, Any]]:
    """A Neurodesk recipe on top of the published image, and the tests of its container."""
    text = (
        f"## brainprior/{__version__} ##\n"
        "Restores thick-slice, noisy or biased brain MRI (T1w, T2w, FLAIR) to 1 mm, with a\n"
        "voxelwise uncertainty map. For research only: not for finding lesions, not for\n"
        "diagnosis.\n\n"
        "```\nbrainprior bids_dir output_dir participant\nbrainprior bids_dir output_dir group\n"
        "brainprior --help\n```\n\n"
        f"Documentation: {repository_url}\n"
    )
    return {
        "build.yaml": {
            "name": "brainprior",
            "version": __version__,
            "architectures": ["x86_64"],
            "copyright": [{"license": "Apache-2.0", "url": f"{repository_url}/blob/main/LICENSE"}],
            "build": {
                "kind": "neurodocker",
                "base-image": f"{image}:{__version__}",
                "pkg-manager": "apt",
                "add-default-template": False,
                "directives": [{"user": "root"}],
            },
            "deploy": {"bins": ["brainprior"]},
            "readme": text,
            "categories": ["structural imaging", "machine learning", "bids apps"],
            "icon": "data:image/png;base64," + base64.b64encode(icon()).decode(),
        },
        "fulltest.yaml": {
            "name": "brainprior",
            "version": __version__,
            "tests": [
                {
                    "name": "version",
                    "description": "The command reports the recipe's version",
                    "command": "brainprior --version",
                    "expected_output_contains": f"brainprior {__version__}",
                },
                {
                    "name": "self-test",
                    "description": "Libraries, hashes of the weights, and a small restoration",
                    "command": "brainprior selftest --device cpu",
                    "expected_exit_code": 0,
                },
            ],
        },
    }


def bids_apps(repository: str, image: str) -> list[dict[str, Any]]:
    """The entry for the list of BIDS Apps."""
    return [
        {
            "gh": repository,
            "dh": image,
            "status": "active",
            "description": descriptor()["description"],
            "ds_type": ["raw"],
            "datatype": ["anat"],
            "ci": "none",
            "branch": "main",
        }
    ]


class Lines(yaml.SafeDumper):
    """YAML with multi-line texts as blocks."""


Lines.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def icon(size: int = 64) -> bytes:
    """A PNG: a disc of thick slices on the left, of thin ones on the right."""
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1
    stripes = np.where(x < 0, np.floor(y * 4) / 4, y)
    grey = 0.55 + 0.35 * np.cos(3.5 * stripes) * np.cos(2.5 * x)
    inside = np.hypot(x / 0.85, y) < 0.95
    pixels = np.stack([grey * 255, inside * 255.0], axis=-1).astype(np.uint8)
    out = BytesIO()
    Image.fromarray(pixels, "LA").save(out, "png", optimize=True)
    return out.getvalue()


def write(out: Path) -> list[Path]:
    """All files, as JSON or YAML by their names; returns their paths."""
    names = publishing()
    repository, url, image = (names[key] for key in ("repository", "repository_url", "image"))
    contents: dict[str, Any] = {
        "boutiques/brainprior.json": boutiques(image),
        "bids-apps/apps.yml": bids_apps(repository, image),
        **{f"nipoppy/brainprior-{__version__}/{k}": v for k, v in nipoppy(image).items()},
        **{f"neurodesk/brainprior/{k}": v for k, v in neurodesk(url, image).items()},
    }
    for name, content in contents.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        else:
            text = yaml.dump(content, Dumper=Lines, sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8")
    return [out / name for name in contents]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Write the descriptors for other platforms.")
    parser.add_argument("out", type=Path, help="folder of the descriptors")
    for path in write(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
