#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the demo's scan as DICOM files, to test a converter without data of a participant.

    python scripts/phantom_dicom.py BIDS_DIR OUT

BIDS_DIR is the demo data set, written by ``python -m brainprior_bids.evaluation.demo``. OUT gets
two series of one study, one file per slice: a three-slice localizer, with which most sessions
begin, and the T1w. The script needs numpy, nibabel and pydicom but not brainprior, so that it runs
in the environment of the converters (docs/dicom.md).

Every run writes the same bytes: identifiers are numbered under a root that is derived from a fixed
name, and dates are fixed.
"""

from __future__ import annotations

import argparse
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

ROOT = f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, 'brainprior phantom').int >> 64}"
"""UID root of the phantom; the UUID is shortened so that numbered UIDs fit into 64 characters."""
DATE, TIME = "20260101", "120000"
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
LOCALIZER_SLICES = 3


@dataclass(frozen=True)
class Series:
    """A stack of slices, with the metadata that a scanner would write.

    Attributes
    ----------
    number : int
        SeriesNumber.
    description : str
        SeriesDescription and ProtocolName.
    data : (columns, rows, slices) uint16
        Columns run to the participant's left, rows to posterior, slices to superior.
    affine : (4, 4)
        Voxel to DICOM's LPS mm.
    metadata : dict
        The fields of a BIDS sidecar.
    """

    number: int
    description: str
    data: np.ndarray
    affine: np.ndarray
    metadata: dict[str, Any]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Write the demo's scan as DICOM files.")
    parser.add_argument("bids_dir", type=Path, help="the demo data set")
    parser.add_argument("out", type=Path, help="folder of the DICOM files")
    args = parser.parse_args()
    anat = args.bids_dir / "sub-01" / "anat"
    data, affine = load_lps(anat / "sub-01_T1w.nii.gz")
    metadata = json.loads((anat / "sub-01_T1w.json").read_text("utf-8"))
    scan = Series(2, "t1_tse_tra", data, affine, metadata)
    for series in (localizer(scan), scan):
        folder = args.out / f"{series.number:02d}_{series.description}"
        folder.mkdir(parents=True, exist_ok=True)
        n_slices = series.data.shape[2]
        for k in range(n_slices):
            dicom_slice(series, k).save_as(folder / f"{k + 1:04d}.dcm", enforce_file_format=True)
        print(f"{folder}: {n_slices} files")


def load_lps(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels along left, posterior, superior, and their affine to LPS mm."""
    image = nib.load(path)
    wanted = nib.orientations.axcodes2ornt("LPS")
    image = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted)
    )
    return np.asarray(image.dataobj, np.uint16), TO_LPS @ image.affine


def localizer(scan: Series) -> Series:
    """Evenly spaced slices of the scan, as a series that a heuristic must exclude."""
    step = scan.data.shape[2] // LOCALIZER_SLICES
    first = step // 2
    data = scan.data[:, :, first::step][:, :, :LOCALIZER_SLICES]
    affine = scan.affine.copy()
    affine[:3, 3] += first * affine[:3, 2]
    affine[:3, 2] *= step
    spacing = float(np.linalg.norm(affine[:3, 2]))
    return Series(1, "localizer", data, affine, {**scan.metadata, "SpacingBetweenSlices": spacing})


def dicom_slice(series: Series, k: int) -> FileDataset:
    """Slice k as an MR Image Storage object."""
    columns, rows = (series.affine[:3, axis] for axis in (0, 1))
    spacing = [float(np.linalg.norm(axis)) for axis in (columns, rows)]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = f"{ROOT}.1.{series.number}.{k + 1}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    describe(data, series)
    data.SOPClassUID = meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.InstanceNumber = k + 1
    position = series.affine @ [0, 0, k, 1]
    data.ImagePositionPatient = numbers(position[:3])
    data.ImageOrientationPatient = numbers([*columns / spacing[0], *rows / spacing[1]])
    data.PixelSpacing = numbers([spacing[1], spacing[0]])  # between rows, then between columns
    pixels = series.data[:, :, k].T  # (row, column)
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelRepresentation = 0
    if pixels.max() >= 2**12:
        raise SystemExit(f"phantom_dicom: {pixels.max()} does not fit the 12 bits of a scanner")
    data.PixelData = np.ascontiguousarray(pixels, "<u2").tobytes()
    return data


def describe(data: Dataset, series: Series) -> None:
    """Set the fields that all slices of a series share."""
    data.SpecificCharacterSet = "ISO_IR 192"
    data.PatientName, data.PatientID = "Phantom^Demo", "phantom01"
    data.PatientBirthDate, data.PatientSex = "", ""
    data.PatientIdentityRemoved = "YES"
    data.StudyInstanceUID, data.StudyID = f"{ROOT}.2", "1"
    data.StudyDescription = "brainprior^demo"
    data.StudyDate = data.SeriesDate = data.AcquisitionDate = data.ContentDate = DATE
    data.StudyTime = data.SeriesTime = data.AcquisitionTime = data.ContentTime = TIME
    data.AccessionNumber = data.ReferringPhysicianName = ""
    data.Modality, data.Manufacturer = "MR", "Demo"
    data.FrameOfReferenceUID, data.PositionReferenceIndicator = f"{ROOT}.3", ""
    data.SeriesInstanceUID, data.SeriesNumber = f"{ROOT}.4.{series.number}", series.number
    data.SeriesDescription = data.ProtocolName = series.description
    data.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
    data.PatientPosition, data.BodyPartExamined = "HFS", "HEAD"
    data.ScanningSequence, data.SequenceVariant, data.ScanOptions = "RM", "NONE", ""
    data.MRAcquisitionType = series.metadata["MRAcquisitionType"]
    data.MagneticFieldStrength = numbers([series.metadata["MagneticFieldStrength"]])[0]
    data.SliceThickness = numbers([series.metadata["SliceThickness"]])[0]
    data.SpacingBetweenSlices = numbers([series.metadata["SpacingBetweenSlices"]])[0]
    data.EchoTime = data.RepetitionTime = data.EchoTrainLength = None  # a phantom has none


def numbers(values: Any) -> list[str]:
    """Decimal strings of at most 16 characters."""
    return [pydicom.valuerep.format_number_as_ds(float(value)) for value in values]


if __name__ == "__main__":
    main()
