# SPDX-License-Identifier: Apache-2.0
"""Conform: read a scan, check it, bring it to closest-canonical axes, find its slice geometry.

Voxels are permuted and flipped; an image that was interpolated is reduced to the voxels that were
measured (``anatomy.resolution``), and nothing else is resampled. The rules, in one place:

*Affine.* The sform where its code is above 0, otherwise the qform; a singular sform is replaced by
a usable qform. If both are set and differ by more than ``AFFINE_TOLERANCE_MM`` at a corner of the
image, the sform is used, with a warning. If neither is set, left and right cannot be
distinguished: refused. Axes that are not at right angles (beyond rounding) are refused, too; so is
a field of view that no scanner has.

*Values.* float32, the header's slope and intercept applied. Non-finite voxels outside the head
become 0 with a warning; inside the head they are refused. Negative values are kept and counted;
an image without a zero of its own (z-scored, MP2RAGE's UNI) is shifted to begin at 0, with a
warning (``anatomy.values``).

*Slice axis*, first rule that decides: the caller's value; a spacing at least ``ANISOTROPY`` times
the other two; ``dim_info`` of the header; ``SliceEncodingDirection`` of the JSON; the one axis
whose spacing differs from two that agree (in-plane voxels are square); the largest spacing; the
inferior-superior axis.

*Thickness*: the caller's value; ``SliceThickness`` where it lies within 0.3 to 2.2 slice spacings;
otherwise the slice spacing of the header, with a warning for thick slices.

*Spacing*: always the header's; a disagreeing ``SpacingBetweenSlices`` is a warning.

*Interleaves*: from ``SliceTiming``; unusable times are a warning.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from brainprior_bids.anatomy.nifti import open_image, read_values
from brainprior_bids.anatomy.resolution import (
    Resolution,
    Sizes,
    find_resolution,
    reduce_to_measured,
)
from brainprior_bids.anatomy.slice_timing import stated_interleaves
from brainprior_bids.anatomy.values import check_values
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import GeometryError, InputError
from brainprior_bids.engine.grids import PLANES, Grid

AFFINE_TOLERANCE_MM = 0.1
"""Largest accepted difference of sform and qform at a corner: float32 quaternions have an accuracy
of 0.001."""
ANISOTROPY = 1.5
"""A spacing this many times the next one makes its axis the slice axis."""
THIN_MM = 1.5
"""Near-isotropic scans up to this spacing have a boxcar profile one voxel wide."""
LARGEST_VIEW_MM = 600.0
"""Longest field of view: the bore of a scanner is not wider."""
FARTHEST_MM = 10_000.0
"""Largest distance of the first voxel from the origin, which scanners place in their bore."""
ITK_COSINE = 1e-4
"""Cosine between two axes up to which ITK reads an sform as it is; beyond, it takes the qform
(whose axes are always at right angles) or refuses the file. Measured with SimpleITK 2.5."""


@dataclass(frozen=True)
class Conformed:
    """A scan on closest-canonical axes.

    Attributes
    ----------
    image : Nifti1Image
        (i, j, k) float32, RAS axes (closest canonical), scanner units, its own grid.
    acquisition : Acquisition
        Slice geometry on the axes of ``image``.
    facts : dict
        JSON-able: the original header and the source of each value.
    warnings : list of str
        Sentences for the log, the report and the provenance.
    """

    image: nib.Nifti1Image
    acquisition: Acquisition
    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    @property
    def grid(self) -> Grid:
        """Of ``image``."""
        return Grid(self.image.shape, self.image.affine)


def conform(
    path: Path,
    *,
    metadata: Mapping[str, Any],
    slice_thickness_mm: float | None = None,
    slice_axis: int | None = None,
    effective_resolution: str | Sizes = "auto",
) -> Conformed:
    """Read and check one scan.

    Parameters
    ----------
    path : Path
        ``.nii`` or ``.nii.gz``, NIfTI-1 or NIfTI-2.
    metadata : Mapping
        The scan's BIDS metadata, inheritance applied; may be empty.
    slice_thickness_mm : float, optional
        Overrides ``SliceThickness``.
    slice_axis : {0, 1, 2}, optional
        On the closest-canonical axes: 0 for sagittal slices, 1 coronal, 2 axial.
    effective_resolution : "auto", "off" or 3 floats
        Whether the image was interpolated: see ``anatomy.resolution.find_resolution``.

    Raises
    ------
    InputError
        Missing, unreadable or truncated file; more than one volume; constant image; values that
        are not real numbers; non-finite voxels inside the head.
    GeometryError
        No orientation, a singular affine, an impossible voxel size or thickness.
    """
    path = Path(path)
    name = _stem(path)
    image = _open(path, name)
    placed = _place(image, name)
    grid, orientation, warnings = placed.grid, placed.orientation, placed.warnings
    stored = read_values(image, path, name).reshape(_volume_shape(image.shape, name))
    data = np.ascontiguousarray(apply_orientation(stored, orientation), dtype=np.float32)
    data, value_facts = check_values(data, grid, name, warnings)
    resolution = find_resolution(
        data, grid, effective_resolution, step=_step(image), stated_mm=_stated_mm(metadata)
    )
    if resolution.used_mm != resolution.stored_mm:
        data, grid = reduce_to_measured(data, grid, resolution)
    warnings += _about(resolution, name)
    placed = replace(placed, grid=grid)
    acquisition, acquisition_facts = _acquisition(placed, metadata, slice_thickness_mm, slice_axis)
    canonical = nib.Nifti1Image(data, np.array(grid.affine))
    code = placed.facts["code"]
    canonical.set_sform(grid.affine, code)
    canonical.set_qform(grid.affine, code)
    canonical.header.set_xyzt_units("mm", "sec")

    facts = {
        "source": path.name,
        "original": _header_facts(image, orientation),
        "affine": placed.facts,
        "values": value_facts,
        "resolution": resolution.to_dict(),
        "acquisition": acquisition_facts,
        "grid": {
            "shape": list(grid.shape),
            "spacing_mm": [float(s) for s in grid.spacing_mm],
            "affine": grid.affine.tolist(),
            "rotation_from_axes_deg": _obliquity_deg(grid),
        },
    }
    return Conformed(canonical, acquisition, facts, warnings)


@dataclass(frozen=True, eq=False)
class Geometry:
    """Geometry of a scan from header and sidecars, without its values.

    Attributes
    ----------
    grid : Grid
        Grid of the scan on closest-canonical axes.
    acquisition : Acquisition
        Slice geometry on those axes.
    orientation : (3, 2) array
        nibabel's: the stored axes to the canonical ones.
    facts : dict
        JSON-able: ``affine`` and ``acquisition``, with the source of each value.
    warnings : list of str
    """

    grid: Grid
    acquisition: Acquisition
    orientation: NDArray[np.float64]
    facts: dict[str, Any]
    warnings: list[str]


def read_geometry(
    path: Path,
    *,
    metadata: Mapping[str, Any],
    slice_thickness_mm: float | None = None,
    slice_axis: int | None = None,
) -> Geometry:
    """As ``conform``, from the header alone: ``conform`` refuses every scan that this refuses.

    Raises
    ------
    InputError, GeometryError
        As ``conform``, but for the values.
    """
    path = Path(path)
    name = _stem(path)
    placed = _place(_open(path, name), name)
    acquisition, facts = _acquisition(placed, metadata, slice_thickness_mm, slice_axis)
    both = {"affine": placed.facts, "acquisition": facts}
    return Geometry(placed.grid, acquisition, placed.orientation, both, placed.warnings)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


@dataclass(frozen=True, eq=False)
class _Placed:
    """Position of a scan according to its header.

    Attributes
    ----------
    grid : Grid
        On closest-canonical axes.
    orientation : (3, 2) array
        nibabel's.
    facts : dict
        Facts about the affine.
    """

    name: str
    header: nib.Nifti1Header
    grid: Grid
    orientation: NDArray[np.float64]
    facts: dict[str, Any]
    warnings: list[str]


def _place(image: nib.Nifti1Image, name: str) -> _Placed:
    warnings: list[str] = []
    shape = _volume_shape(image.shape, name)
    affine, facts = _choose_affine(image.header, shape, name, warnings)
    original = Grid(shape, affine)  # raises GeometryError where singular
    _check_voxel_size(original, name)
    orientation = io_orientation(affine)
    turned = [0, 0, 0]
    for axis, (to, _) in enumerate(orientation):
        turned[int(to)] = shape[axis]
    # rounded as in a NIfTI file, so that a scan in memory and its file have the same grid
    canonical = np.float32(affine @ inv_ornt_aff(orientation, original.shape))
    grid = Grid((turned[0], turned[1], turned[2]), canonical.astype(np.float64))
    return _Placed(name, image.header, grid, orientation, facts, warnings)


def _stated_mm(metadata: Mapping[str, Any]) -> list[float]:
    """Spacing and thickness of slices, if the sidecars state them."""
    values = (metadata.get(key) for key in ("SpacingBetweenSlices", "SliceThickness"))
    return [
        float(v)
        for v in values
        if isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < np.inf
    ]


def _step(image: nib.Nifti1Image) -> float:
    """Distance between stored values; 0 if they are floating-point."""
    if image.get_data_dtype().kind == "f":
        return 0.0
    return float(abs(image.dataobj.slope))


def _about(resolution: Resolution, name: str) -> list[str]:
    """The warning about an interpolated image."""
    stored, measured, used = (
        _numbers(np.array(sizes))
        for sizes in (resolution.stored_mm, resolution.measured_mm, resolution.used_mm)
    )
    if resolution.measured_mm == resolution.stored_mm:
        if resolution.source != "option":
            return []
        return [
            f"{name}: --effective-resolution states no voxel that is larger than the stored ones "
            f"({stored} mm), so that it changes nothing."
        ]
    if resolution.source == "option":
        return [f"{name}: reduced to voxels of {used} mm, as --effective-resolution asks."]
    what = f"{name}: its voxels of {stored} mm were interpolated from about {measured} mm"
    if resolution.used_mm == resolution.stored_mm:
        return [
            f"{what}; they are used as they are, so that the result is as blurred. With the voxel "
            "size that was measured, --effective-resolution restores the missing resolution."
        ]
    return [
        f"{what}; the image was reduced to {used} mm before it was restored. If that is wrong, "
        "give --effective-resolution off, or the measured voxel size."
    ]


def _open(path: Path, name: str) -> nib.Nifti1Image:
    """The image, without reading its values; InputError if its header alone is refused."""
    image = open_image(path, name)
    if not isinstance(image, nib.Nifti1Image):  # Nifti2Image derives from it
        raise InputError(
            f"{name}: expected a NIfTI file (.nii or .nii.gz), got {type(image).__name__} in "
            f"{path}. Convert it, for example with dcm2niix."
        )
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(
            f"{name}: expected real scalar voxels, got {image.get_data_dtype()} in {path}. "
            "Export the magnitude image."
        )
    return image


def _volume_shape(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """Shape without trailing axes of length 1: (i, j, k), or InputError."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise InputError(
            f"{name}: expected one 3-D volume, got {int(np.prod(shape[3:]))} volumes (shape "
            f"{shape}). Average the repetitions or store one file a volume."
        )
    if len(shape) < 3 or min(shape) < 4:
        raise InputError(
            f"{name}: expected a 3-D volume of at least 4 voxels along each axis, got shape "
            f"{shape}. A localiser or a single slice cannot be restored."
        )
    return int(shape[0]), int(shape[1]), int(shape[2])


def _form(header: nib.Nifti1Header, which: str) -> tuple[NDArray[np.float64] | None, int, str]:
    """The sform or qform: (affine or None if unusable, code, why it is unusable)."""
    code = int(header[f"{which}_code"])
    if code == 0:
        return None, 0, "its code is 0"
    try:
        affine = header.get_sform() if which == "sform" else header.get_qform()
    except (HeaderDataError, ValueError) as error:
        return None, code, str(error)
    if affine is None or not np.isfinite(affine).all():
        return None, code, "it is not finite"
    if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        return None, code, "it is singular"
    return np.asarray(affine, dtype=np.float64), code, ""


def _choose_affine(
    header: nib.Nifti1Header, shape: tuple[int, ...], name: str, warnings: list[str]
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    sform, sform_code, sform_problem = _form(header, "sform")
    qform, qform_code, qform_problem = _form(header, "qform")
    if sform is None and qform is None:
        raise GeometryError(
            f"{name}: expected a usable sform or qform; sform: {sform_problem}; qform: "
            f"{qform_problem}. Left and right cannot be distinguished without one. Convert the "
            "scan again from DICOM, or set the sform."
        )
    facts: dict[str, Any] = {
        "sform_code": sform_code,
        "qform_code": qform_code,
        "sform_qform_mirrored": False,
    }
    if sform is not None and qform is not None:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
        moved = (sform - qform)[:3] @ np.vstack([corners, np.ones(corners.shape[1])])
        distance = float(np.linalg.norm(moved, axis=0).max())
        facts["sform_qform_distance_mm"] = distance
        if distance > AFFINE_TOLERANCE_MM:
            mirrored = bool(np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0)
            facts["sform_qform_mirrored"] = mirrored
            mirror = (
                " and are mirror images of each other, so left may be right" if mirrored else ""
            )
            warnings.append(
                f"{name}: sform and qform differ by up to {distance:.2f} mm{mirror}; the sform is "
                "used. Repair the header if that is wrong."
            )
    for which, affine, code, problem in (
        ("sform", sform, sform_code, sform_problem),
        ("qform", qform, qform_code, qform_problem),
    ):
        if affine is None and code > 0:
            warnings.append(f"{name}: the {which} cannot be used ({problem}); the other one is.")
    affine = sform if sform is not None else qform
    assert affine is not None
    facts["matrix"] = affine.tolist()
    facts["used"] = "sform" if sform is not None else "qform"
    facts["code"] = sform_code if sform is not None else qform_code

    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    pixdim = np.abs(np.asarray(header["pixdim"][1:4], dtype=float))
    if not np.allclose(spacing, pixdim, rtol=0.01):
        warnings.append(
            f"{name}: the header's voxel sizes {_numbers(pixdim)} mm differ from those of its "
            f"{facts['used']}, {_numbers(spacing)} mm; the latter are used."
        )
    affine, facts["largest_cosine_between_axes"] = _at_right_angles(
        affine, shape, f"{name}: the axes of its {facts['used']}"
    )
    return affine, facts


def _at_right_angles(
    affine: NDArray[np.float64], shape: tuple[int, ...], who: str
) -> tuple[NDArray[np.float64], float]:
    """An affine that ITK and a qform can represent, and the cosine between its original axes. Axes
    that are oblique by rounding are straightened about the centre of the image.

    Raises
    ------
    GeometryError
        If that would move a corner by more than ``AFFINE_TOLERANCE_MM``.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    direction = affine[:3, :3] / spacing
    cosine = float(np.abs(direction.T @ direction - np.eye(3)).max())
    if cosine <= ITK_COSINE:
        return affine, cosine
    u, _, vt = np.linalg.svd(direction)  # u @ vt: the nearest right-angled axes
    centre = (np.array(shape) - 1) / 2
    straight = affine.copy()
    straight[:3, :3] = u @ vt * spacing
    straight[:3, 3] += (affine - straight)[:3, :3] @ centre
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    moved = float(np.linalg.norm((corners - centre) @ (affine - straight)[:3, :3].T, axis=1).max())
    if moved > AFFINE_TOLERANCE_MM:
        raise GeometryError(
            f"{who} are not at right angles (cosine {cosine:.2g}, up to {moved:.3g} mm at a "
            "corner), as after a registration with 12 parameters or in slices of a tilted gantry. "
            "Programs that use ITK refuse or misplace such images; up to "
            f"{AFFINE_TOLERANCE_MM} mm is taken for rounding. Give the scan as it was acquired, "
            "or resample it onto a grid with right angles (for example with mri_convert or "
            "nilearn's resample_img)."
        )
    return straight, cosine


def _check_voxel_size(grid: Grid, name: str) -> None:
    spacing = grid.spacing_mm
    if spacing.min() < 0.1 or spacing.max() > 20:
        raise GeometryError(
            f"{name}: expected voxels of 0.1 to 20 mm, got {_numbers(spacing)}. Is the affine in "
            "millimetres?"
        )
    if grid.extent_mm.max() > LARGEST_VIEW_MM:
        raise GeometryError(
            f"{name}: expected a field of view of up to {LARGEST_VIEW_MM:g} mm, got "
            f"{_numbers(grid.extent_mm)} mm ({grid.shape} voxels of {_numbers(spacing)} mm). "
            "Repair the voxel size in its header; crop a scan of the body to the head."
        )
    far = float(np.abs(grid.affine[:3, 3]).max())
    if far > FARTHEST_MM:
        raise GeometryError(
            f"{name}: expected a scan within {FARTHEST_MM / 1000:g} m of the origin of its "
            f"coordinates, got {far:.3g} mm. Repair the offset in its sform or qform."
        )


def _acquisition(
    placed: _Placed,
    metadata: Mapping[str, Any],
    slice_thickness_mm: float | None,
    slice_axis: int | None,
) -> tuple[Acquisition, dict[str, Any]]:
    name, warnings, spacing = placed.name, placed.warnings, placed.grid.spacing_mm
    if slice_axis is None:
        axis, axis_source = _slice_axis(placed, metadata)
    else:
        axis, axis_source = slice_axis, "option"
        largest = int(np.argmax(spacing))
        if spacing[largest] >= ANISOTROPY * spacing[axis]:
            warnings.append(
                f"{name}: the slices are given as {PLANES[axis]}, but the voxels are largest "
                f"across the {PLANES[largest]} planes ({_numbers(spacing)} mm)."
            )
    between = float(spacing[axis])
    in_plane = [float(s) for i, s in enumerate(spacing) if i != axis]
    kind = str(metadata.get("MRAcquisitionType", "")).upper()
    thin = between <= THIN_MM and between <= ANISOTROPY * max(in_plane)

    stated_spacing = _positive(metadata, "SpacingBetweenSlices", name, warnings)
    if stated_spacing is not None and abs(stated_spacing - between) > 0.05 * between:
        warnings.append(
            f"{name}: SpacingBetweenSlices is {stated_spacing:g} mm in the JSON, the header's "
            f"slices are {between:g} mm apart; the header is used."
        )

    stated = _positive(metadata, "SliceThickness", name, warnings)
    if slice_thickness_mm is not None:
        thickness, thickness_source = float(slice_thickness_mm), "option"
        if thickness > 3 * between:
            warnings.append(
                f"{name}: the slice thickness given, {thickness:g} mm, is more than three times "
                f"the slice spacing of {between:g} mm."
            )
    elif stated is not None and 0.3 * between <= stated <= 2.2 * between:
        thickness, thickness_source = stated, "SliceThickness"
    else:
        thickness, thickness_source = between, "header slice spacing"
        if stated is not None:
            warnings.append(
                f"{name}: SliceThickness is {stated:g} mm in the JSON, the header's slices are "
                f"{between:g} mm apart; {between:g} mm assumed. Was the image resampled? Pass "
                "--slice-thickness if that is wrong."
            )
        elif not thin and kind != "3D":
            warnings.append(
                f"{name}: no SliceThickness in any JSON; {between:g} mm assumed from the header's "
                "slice spacing. Pass --slice-thickness if that is wrong."
            )
    thin = thin and thickness <= 1.1 * between
    interleaves, problem = stated_interleaves(metadata, placed.grid.shape[axis])
    warnings += [f"{name}: {problem}"] if problem else []
    profile = "boxcar" if thin else "trapezoid"
    acquisition = Acquisition(axis, thickness, between, profile, interleaves)
    facts = {
        **acquisition.to_dict(),
        "gap_mm": acquisition.gap_mm,
        "in_plane_mm": in_plane,
        "slice_axis_source": axis_source,
        "thickness_source": thickness_source,
        "spacing_source": "header",
        "profile_source": (
            "thin and near-isotropic: one voxel wide" if thin else "default for thick slices"
        ),
        "metadata": {
            key: metadata[key]
            for key in (
                "SliceThickness",
                "SpacingBetweenSlices",
                "MRAcquisitionType",
                "MagneticFieldStrength",
                "SliceEncodingDirection",
                "Manufacturer",
                "PulseSequenceType",
                "EchoTime",
                "RepetitionTime",
                "InversionTime",
            )
            if isinstance(metadata.get(key), str | int | float)
        },
    }
    return acquisition, facts


def _slice_axis(placed: _Placed, metadata: Mapping[str, Any]) -> tuple[int, str]:
    """Slice axis on the canonical axes, and the rule that determined it."""
    spacing, orientation = placed.grid.spacing_mm, placed.orientation
    stated: dict[str, int] = {}
    in_header = placed.header.get_dim_info()[2]
    if in_header is not None:
        stated["header dim_info"] = int(orientation[in_header, 0])
    direction = str(metadata.get("SliceEncodingDirection", ""))[:1]
    if direction in ("i", "j", "k"):
        stated["SliceEncodingDirection"] = int(orientation["ijk".index(direction), 0])

    largest = int(np.argmax(spacing))
    others = np.delete(spacing, largest)
    if spacing[largest] >= ANISOTROPY * others.max():
        for source, axis in stated.items():
            if axis != largest:
                placed.warnings.append(
                    f"{placed.name}: {source} names another slice axis than the one of "
                    f"{spacing[largest]:g} mm spacing; the latter is used."
                )
        return largest, "largest spacing"
    for source, axis in stated.items():
        return axis, source
    for axis in range(3):
        a, b = np.delete(spacing, axis)
        if abs(a - b) <= 0.01 * a and abs(spacing[axis] - a) > 0.01 * a:
            return axis, "square in-plane voxels"
    if spacing[largest] > 1.01 * others.max():
        return largest, "largest spacing"
    return 2, "default"


def _positive(
    metadata: Mapping[str, Any], key: str, name: str, warnings: list[str]
) -> float | None:
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        warnings.append(f"{name}: {key} must be a number above 0 in mm, got {value!r}; ignored.")
        return None
    return float(value)


def _header_facts(image: nib.Nifti1Image, orientation: NDArray[np.float64]) -> dict[str, Any]:
    header = image.header
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    return {
        "format": "NIfTI-2" if isinstance(header, nib.Nifti2Header) else "NIfTI-1",
        "shape": [int(n) for n in image.shape],
        "zooms": [float(z) for z in header.get_zooms()],
        "axis_codes": "".join(nib.orientations.ornt2axcodes(orientation)),
        "axes_to_canonical": [[int(a), int(f)] for a, f in orientation],
        "sform_code": int(header["sform_code"]),
        "qform_code": int(header["qform_code"]),
        "datatype": str(header.get_data_dtype()),
        "scl_slope": float(slope),
        "scl_inter": float(intercept),
        "descrip": bytes(header["descrip"].tobytes()).rstrip(b"\0").decode("latin-1"),
        "xyzt_units": list(header.get_xyzt_units()),
        "header_base64": base64.b64encode(header.binaryblock).decode("ascii"),
    }


def _obliquity_deg(grid: Grid) -> float:
    """Largest angle between a voxel axis and its closest anatomical axis, degrees."""
    direction = grid.affine[:3, :3] / grid.spacing_mm
    cosines = np.clip(np.abs(np.diag(direction)), 0, 1)
    return float(np.degrees(np.arccos(cosines)).max())


def _numbers(values: NDArray[np.float64]) -> str:
    return " × ".join(f"{float(v):.3g}" for v in values)
