# SPDX-License-Identifier: Apache-2.0
"""Brains for tests of the evaluation."""

import json

import nibabel as nib
import numpy as np
from scipy import ndimage

from brainprior_bids.bids.names import BIDSName, output_names, result_name
from brainprior_bids.bids.status import write_summary
from brainprior_bids.engine.weights import FOLDER, sha256_file
from brainprior_bids.evaluation import harness
from brainprior_bids.evaluation.protocol import Participant
from brainprior_bids.evaluation.studies.command import SCANNER_UNIT
from brainprior_bids.records import ScanRecord


def toy_participant(name="01", contrast="T1w", seed=0):
    """Two tissues with a folded border in a ball."""
    rng = np.random.default_rng(seed)
    shape = (56, 60, 52)
    away = np.indices(shape) - np.array(shape)[:, None, None, None] / 2
    inside = (away**2).sum(0) < 25**2
    folds = ndimage.gaussian_filter(rng.normal(size=shape), 3) > 0
    texture = rng.normal(0, 0.02, shape)
    data = np.where(inside, np.where(folds, 0.95, 0.6) + texture, 0).astype(np.float32)
    structures = np.where(inside, np.where(folds, 2, 3), 0).astype(np.int16)
    to_mni305 = np.eye(4)
    to_mni305[:3, 3] = -28, -40, -10
    return Participant(name, contrast, data, inside, structures, to_mni305)


def write_prepared(data, out, participant):
    """A source in ``data`` and its prepared participant in ``out``, as the harness writes them."""
    stem = f"{participant.name}_{participant.contrast}"
    path = data / f"sub-{stem}.nii.gz"
    path.write_bytes(participant.name.encode())
    participant.save(out / "participants" / f"{stem}.npz")
    mark = harness.fingerprint(
        source=sha256_file(path),
        contrast=participant.contrast,
        parcellation=sha256_file(FOLDER / "parcellation.safetensors"),
    )
    note = {"fingerprint": mark, "source": path.name}
    (out / "participants" / f"{stem}.json").write_text(json.dumps(note))


class Answer:
    """A command that writes a given image as the result of every scan.

    Parameters
    ----------
    image : Volume
        99th percentile 1, as the scans have before they are written.
    mask : array
        Brain mask on the image's grid.
    factor : function, optional
        Role of the output (``restored``, ``sample01``) -> factor on the image.
    runs : dict, optional
        Name of each run -> its matrix to the reference, for a fused result.
    """

    def __init__(self, image, mask, *, factor=lambda role: 1.0, runs=None):
        self.image, self.mask, self.factor, self.runs = image, mask, factor, runs
        self.asked = []

    def __call__(self, bids_dir, output_dir, options):
        self.asked.append((output_dir.name, list(options)))
        stems = [p.name.removesuffix(".nii.gz") for p in sorted(bids_dir.rglob("*_T1w.nii.gz"))]
        if "--fuse" in options:
            stems = [f"{stems[0].split('_')[0]}_T1w"]
        tasks = options[options.index("--task") + 1 :] if "--task" in options else ["restore"]
        tasks = [task for task in tasks[:2] if task in ("restore", "inpaint", "refine")]
        words = {"restore": "restored", "inpaint": "Inpainted", "refine": "Refined"}
        image = "".join(words[task] for task in tasks)
        image = image[0].lower() + image[1:]
        for stem in stems:
            self.write(output_dir, BIDSName.parse(f"{stem}.nii.gz"), image, "--fuse" in options)

    def write(self, output_dir, source, image, fused):
        names = output_names(source, n_samples=1, save_samples=True, image=image)
        anat = output_dir / source.folder / "anat"
        anat.mkdir(parents=True, exist_ok=True)
        affine = np.array(self.image.grid.affine)
        for role in ("restored", "sample01"):
            values = (self.factor(role) * SCANNER_UNIT * self.image.data).astype(np.float32)
            nib.save(nib.Nifti1Image(values, affine), anat / names[role])
        nib.save(nib.Nifti1Image(self.mask.astype(np.uint8), affine), anat / names["mask"])
        runs = [
            {"name": name, "to_reference": matrix.tolist(), "residual_ratios": [1.25]}
            for name, matrix in (self.runs or {}).items()
        ]
        restore = {"residual_ratios": [0.75, 1.25], **({"runs": runs} if fused else {})}
        scan = result_name(source, image)
        summary = {"scan": scan, "status": "done", "facts": {"restore": restore}}
        write_summary(output_dir, ScanRecord.from_json(summary))
