# SPDX-License-Identifier: Apache-2.0
"""Write a simulated scan as a BIDS data set, run the command on it, and read its outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from brainprior_bids.bids.derivatives import BIDS_VERSION
from brainprior_bids.bids.names import BIDSName, output_names
from brainprior_bids.engine.errors import BrainpriorError
from brainprior_bids.engine.grids import Grid


@dataclass(frozen=True, eq=False)
class Volume:
    """An image and its grid."""

    data: NDArray[np.float32]
    grid: Grid


def write_scan(
    bids_dir: Path, name: str, volume: Volume, *, dataset: str, metadata: Mapping[str, Any]
) -> Path:
    """Write one scan of a BIDS data set.

    Parameters
    ----------
    bids_dir : Path
        Created if missing.
    name : str
        ``sub-<label>_<suffix>``.
    volume : Volume
        Stored as float32.
    dataset : str
        Name of the data set, which describes the simulation.
    metadata : Mapping
        Content of the scan's sidecar.
    """
    anat = bids_dir / name.partition("_")[0] / "anat"
    anat.mkdir(parents=True, exist_ok=True)
    description = {"Name": dataset, "BIDSVersion": BIDS_VERSION, "DatasetType": "raw"}
    (bids_dir / "dataset_description.json").write_text(json.dumps(description), encoding="utf-8")
    (bids_dir / "README").write_text(f"{dataset}\n", encoding="utf-8")
    image = nib.Nifti1Image(np.asarray(volume.data, np.float32), np.array(volume.grid.affine))
    image.set_sform(volume.grid.affine, 1)
    image.set_qform(volume.grid.affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    path = anat / f"{name}.nii.gz"
    nib.save(image, path)
    (anat / f"{name}.json").write_text(json.dumps(dict(metadata)), encoding="utf-8")
    return path


def run_command(bids_dir: Path, output_dir: Path, options: Sequence[str]) -> None:
    """``brainprior bids_dir output_dir participant OPTIONS`` in a separate process.

    Raises
    ------
    BrainpriorError
        If it does not exit with 0; the message has the last lines of its output.
    """
    command = [sys.executable, "-m", "brainprior_bids", str(bids_dir), str(output_dir)]
    run = subprocess.run(
        [*command, "participant", *options], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        tail = "\n".join((run.stdout + run.stderr).splitlines()[-15:])
        raise BrainpriorError(
            f"Evaluation: brainprior exited with status {run.returncode} on {bids_dir}:\n{tail}"
        )


def read_output(
    output_dir: Path, stem: str, image: str = "restored", role: str = "restored"
) -> Volume:
    """Read an image that the command wrote.

    Parameters
    ----------
    output_dir : Path
        Output folder of the command.
    stem : str
        File name of the scan without extension, ``sub-01_T1w``.
    image : str
        ``restored``, ``inpainted`` …
    role : str
        As in ``bids.names.output_names``: ``restored``, ``mask``, ``uncertainty`` …
    """
    source = BIDSName.parse(f"{stem}.nii.gz")
    names = output_names(source, n_samples=1, save_samples=True, image=image, uncertainty=True)
    return read_image(output_dir / source.folder / "anat" / names[role])


def read_image(path: Path) -> Volume:
    """Read an image file as float32."""
    image = nib.load(path)
    return Volume(image.get_fdata(dtype=np.float32), Grid(image.shape, image.affine))
