#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs every command of docs/dicom.md, in order, with links to the files that the page uses, and
# checks that the three data sets contain the scan from which they were made.
#
#   scripts/test_dicom.sh
#
# WORK (default: a new folder, removed at the end) is for the files. Needs .venv, which `make demo`
# creates.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
if [ -n "${WORK:-}" ]; then
    mkdir -p "$WORK" && WORK=$(realpath "$WORK")
else
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
fi
cd "$WORK"
ln -sfn "$here/docs" docs
ln -sfn "$here/scripts" scripts
ln -sfn "$here/.venv" .venv
sed -n '/^```sh$/,/^```$/{/^```/!p}' docs/dicom.md >commands.sh
bash -eux -o pipefail commands.sh
.venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

import nibabel as nib
import numpy as np

source = nib.as_closest_canonical(nib.load("demo/bids/sub-01/anat/sub-01_T1w.nii.gz"))
for folder in ("by-hand", "dcm2bids", "heudiconv"):
    (path,) = Path("demo", folder, "sub-01", "anat").glob("*_T1w.nii.gz")
    image = nib.as_closest_canonical(nib.load(path))
    sidecar = json.loads(Path(str(path).replace(".nii.gz", ".json")).read_text())
    np.testing.assert_array_equal(image.get_fdata(), source.get_fdata())
    np.testing.assert_allclose(image.affine, source.affine, atol=1e-4)
    assert sidecar["SliceThickness"] == 5, path
    print(f"test_dicom: {path}: voxels, affine and slice thickness are the phantom's")
PYTHON
echo "test_dicom: passed"
