# SPDX-License-Identifier: Apache-2.0
"""Print the steps of smriprep's workflow without and with an export, as JSON.

    python smriprep_steps.py RAW EXPORT OUT

A process of its own: TemplateFlow lists its folder when it is imported, and tests change it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from niworkflows.utils.spaces import Reference, SpatialReferences
from smriprep.utils.bids import collect_derivatives
from smriprep.workflows.anatomical import init_anat_fit_wf


def steps(precomputed: dict, raw: Path, out: Path) -> list[str]:
    """Names of the steps for participant 02."""
    spaces = SpatialReferences([])
    spaces.checkpoint()
    workflow = init_anat_fit_wf(
        bids_root=str(raw),
        output_dir=str(out),
        freesurfer=False,
        hires=False,
        fs_no_resume=False,
        longitudinal=False,
        msm_sulc=False,
        t1w=[str(raw / f"sub-02/anat/sub-02_run-{run}_T1w.nii.gz") for run in (1, 2)],
        t2w=[],
        flair=[],
        skull_strip_mode="skip",
        skull_strip_template=Reference("OASIS30ANTs"),
        spaces=spaces,
        precomputed=precomputed,
        omp_nthreads=1,
    )
    return sorted({name.split(".")[0] for name in workflow.list_node_names()})


if __name__ == "__main__":
    raw, export, out = map(Path, sys.argv[1:])
    both = [steps({}, raw, out), steps(collect_derivatives(export, "02", []), raw, out)]
    print(json.dumps(both))
