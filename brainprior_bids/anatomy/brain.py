# SPDX-License-Identifier: Apache-2.0
"""Brain mask and structures of one scan, from the requested source.

The embedded network is always run: even if a mask and labels are supplied, its mask is compared
with the supplied one. The mask can also be the scan's own edge (always, if the scan is already
skull-stripped), SynthStrip's, or a file; the structures can be SynthSeg's, or a file. All are
moved to the scan's 1 mm grid and pass the same checks (``anatomy.external``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
from numpy.typing import NDArray

from brainprior_bids.anatomy import external
from brainprior_bids.anatomy.external import Mask
from brainprior_bids.anatomy.parcellation import Parcellation, parcellate
from brainprior_bids.anatomy.slices import bridged, check_slices, lost_slices, name_lost
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.errors import AnatomyError, InputError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.parcellation_network import ParcellationNetwork
from brainprior_bids.engine.weights import sha256_file
from brainprior_bids.records import MaskSource, Origin, StructuresSource

EMPTY_BACKGROUND = 0.9
"""Share of exactly empty voxels outside the head; with less, a scan is not skull-stripped."""


@dataclass(frozen=True)
class SuppliedFile:
    """A file from another source, and the name under which the records list it."""

    path: Path
    uri: str | None = None

    @property
    def name(self) -> str:
        """The URI, or the file's name if there is none."""
        return self.uri or self.path.name

    def facts(self) -> dict[str, str]:
        """Name and SHA-256 of the contents."""
        return {"uri": self.name, "sha256": sha256_file(self.path)}


@dataclass(frozen=True)
class BrainSources:
    """Sources of mask and structures.

    Parameters
    ----------
    skull_strip : {"embedded", "skip", "mask", "synthstrip"}
        The embedded network, the scan's own edge, the file ``mask``, or SynthStrip.
    parcellation : {"embedded", "derivatives", "synthseg"}
        The embedded network, the file ``dseg``, or SynthSeg.
    mask, dseg : SuppliedFile, optional
        A brain mask, and labels with FreeSurfer's values, in the scan's space, on any grid.
    synthstrip_model : Path, optional
        Weights for ``nipreps-synthstrip``.
    """

    skull_strip: Literal["embedded", "skip", "mask", "synthstrip"] = "embedded"
    parcellation: Literal["embedded", "derivatives", "synthseg"] = "embedded"
    mask: SuppliedFile | None = None
    dseg: SuppliedFile | None = None
    synthstrip_model: Path | None = None

    @property
    def need_network(self) -> bool:
        """Whether the embedded network's result is used, rather than only compared."""
        return "embedded" in (self.skull_strip, self.parcellation)

    def file(self, role: Literal["mask", "dseg"]) -> SuppliedFile:
        """The supplied file for ``role``; InputError where it is missing."""
        file = self.mask if role == "mask" else self.dseg
        if file is None:
            raise InputError(f"Parcellate: expected {role}_file for this setting, got none.")
        return file


@dataclass(frozen=True)
class _Programs:
    """How external programs are run: their files, threads, and whether they use the GPU."""

    folder: Path
    threads: int
    cuda: bool

    def scan_file(self, image: nib.Nifti1Image) -> Path:
        """The file the image was loaded from; one in memory is written into ``folder``."""
        name = image.get_filename()
        if name is not None:
            return Path(name)
        path = self.folder / "scan.nii.gz"
        nib.save(image, path)
        return path


@dataclass(frozen=True, eq=False)
class _Replacement:
    """A mask (bool) or labels (int16) on the 1 mm grid that replace the network's."""

    values: NDArray[Any]
    origin: Origin
    given: dict[str, dict[str, str]] = field(default_factory=dict)  # role -> supplied file
    program: dict[str, Any] = field(default_factory=dict)  # name -> what was run
    warnings: list[str] = field(default_factory=list)


def find_brain(
    image: nib.Nifti1Image,
    *,
    network: ParcellationNetwork,
    sources: BrainSources | None = None,
    slice_axis: int | None = None,
    threads: int = 1,
    folder: Path | None = None,
) -> Parcellation:
    """Brain mask and structures of a conformed scan.

    Parameters
    ----------
    image : Nifti1Image
        (i, j, k), closest-canonical axes, scanner units.
    network : ParcellationNetwork
        From ``engine.weights.load_parcellation``.
    sources : BrainSources, optional
        Default: the embedded network for both.
    slice_axis : {0, 1, 2}, optional
        If set, every slice is compared with its neighbours, and slices without signal are replaced
        by them (``anatomy.slices``).
    threads : int
        For external programs.
    folder : Path, optional
        Folder in which external programs write; default: a temporary folder.

    Returns
    -------
    Parcellation
        On ``Grid.one_millimetre`` of the scan; ``facts`` and ``warnings`` of all sources.

    Raises
    ------
    AnatomyError
        If no brain is found, a mask is implausible, or an external program fails.
    InputError, GeometryError
        If a supplied file is missing, unreadable, or not in the scan's space.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            return find_brain(
                image, network=network, sources=sources, slice_axis=slice_axis,
                threads=threads, folder=Path(scratch),
            )  # fmt: skip
    sources = sources or BrainSources()
    scan = image
    lost: tuple[int, ...] = ()
    if slice_axis is not None:
        lost = lost_slices(scan, axis=slice_axis)
        image = bridged(scan, lost, axis=slice_axis) if lost else scan
    programs = _Programs(folder, threads, next(network.parameters()).device.type == "cuda")
    grid = Grid(image.shape, image.affine).one_millimetre()
    own, warnings = _network_brain(image, network, grid, required=sources.need_network)
    mask = _find_mask(image, grid, own, sources, programs)
    labels = _find_labels(image, grid, sources, programs)
    brain = _combine(image, grid, own, mask, labels)
    facts = _facts(network, own, mask, labels)
    warnings += [] if mask is None else mask.warnings
    if slice_axis is not None:
        fit, slice_warnings = check_slices(scan, brain.mask_scan, axis=slice_axis, lost=lost)
        facts |= {} if fit is None else {"slices": asdict(fit)}
        facts |= {"lost_slices": list(lost)} if lost else {}
        warnings += name_lost(lost, scan.shape[slice_axis], axis=slice_axis) + slice_warnings
    return replace(brain, facts=facts, warnings=warnings, lost=lost)


def _network_brain(
    image: nib.Nifti1Image, network: ParcellationNetwork, grid: Grid, *, required: bool
) -> tuple[Parcellation | None, list[str]]:
    """The embedded network's result and its warnings; None if it fails and is not required."""
    try:
        brain = parcellate(image, network=network, restored_grid=grid)
    except AnatomyError as error:
        if required:
            raise
        return None, [
            "The supplied mask could not be compared with the embedded network's, which found "
            f"no brain: {error}"
        ]
    return brain, list(brain.warnings)


def _find_mask(
    image: nib.Nifti1Image,
    grid: Grid,
    own: Parcellation | None,
    sources: BrainSources,
    programs: _Programs,
) -> _Replacement | None:
    """The checked mask, if it is not the network's."""
    if sources.skull_strip == "embedded":
        assert own is not None
        mask = _stripped_mask(image, grid, own)
    elif sources.skull_strip == "skip":
        mask = _edge_mask(image, grid)
    elif sources.skull_strip == "mask":
        file = sources.file("mask")
        values = external.mask_from_file(file.path, grid, name="Skull-strip")
        origin = Origin(MaskSource.FILE, file.name)
        mask = _Replacement(values, origin, given={"mask": file.facts()})
    else:
        mask = _synthstrip_mask(image, grid, sources.synthstrip_model, programs)
    if mask is None:
        return None
    values, warnings = external.checked_mask(
        mask.values,
        grid,
        source=mask.origin.words,
        network_mask=None if own is None else own.mask > 0,
    )
    return replace(mask, values=values, warnings=[*mask.warnings, *warnings])


def _stripped_mask(image: nib.Nifti1Image, grid: Grid, own: Parcellation) -> _Replacement | None:
    """The scan's own edge if it is already skull-stripped."""
    edge = external.stripped_edge(image, own.mask_scan)
    if edge is None:
        return None
    return _Replacement(
        _on_grid(edge, image, grid),
        Origin(MaskSource.OWN_EDGE),
        warnings=["The scan is already skull-stripped: its own edge is the mask."],
    )


def _edge_mask(image: nib.Nifti1Image, grid: Grid) -> _Replacement:
    """The scan's own edge, because the settings state that it is skull-stripped."""
    edge, empty = external.own_edge(image)
    warnings = []
    if empty < EMPTY_BACKGROUND:
        warnings.append(
            "--skull-strip skip, but the background is not empty: the scan does not look "
            "skull-stripped, and the whole head is treated as brain."
        )
    origin = Origin(MaskSource.SKIP)
    return _Replacement(_on_grid(edge, image, grid), origin, warnings=warnings)


def _on_grid(edge: Mask, image: nib.Nifti1Image, grid: Grid) -> Mask:
    """A mask on the image's grid, moved to the 1 mm grid."""
    moved: Mask = resample(edge, Grid(image.shape, image.affine), grid, order=1) >= 0.5
    return moved


def _synthstrip_mask(
    image: nib.Nifti1Image, grid: Grid, model: Path | None, programs: _Programs
) -> _Replacement:
    """SynthStrip's mask."""
    output = programs.folder / "synthstrip_mask.nii.gz"
    command = external.synthstrip_command(
        programs.scan_file(image),
        output,
        model=model,
        threads=programs.threads,
        cuda=programs.cuda,
    )
    program = external.run_program(command, output)
    values = external.mask_from_file(output, grid, name="SynthStrip")
    return _Replacement(values, Origin(MaskSource.SYNTHSTRIP), program={"synthstrip": program})


def _find_labels(
    image: nib.Nifti1Image, grid: Grid, sources: BrainSources, programs: _Programs
) -> _Replacement | None:
    """The labels, if they are not the network's."""
    if sources.parcellation == "embedded":
        return None
    if sources.parcellation == "derivatives":
        file = sources.file("dseg")
        labels = external.labels_from_file(file.path, grid, name="Parcellation")
        origin = Origin(StructuresSource.FILE, file.name)
        return _Replacement(labels, origin, given={"dseg": file.facts()})
    output = programs.folder / "synthseg.nii.gz"
    command = external.synthseg_command(
        programs.scan_file(image), output, threads=programs.threads, cuda=programs.cuda
    )
    program = external.run_program(command, output)
    labels = external.labels_from_file(output, grid, name="Parcellation")
    return _Replacement(labels, Origin(StructuresSource.SYNTHSEG), program={"synthseg": program})


def _combine(
    image: nib.Nifti1Image,
    grid: Grid,
    own: Parcellation | None,
    mask: _Replacement | None,
    labels: _Replacement | None,
) -> Parcellation:
    """The network's result, with the parts that are replaced."""
    if mask is None and labels is None:
        assert own is not None
        return own
    confidence: Mapping[int, float] = {}
    if labels is not None:
        structures = labels.values
    else:
        assert own is not None
        structures = own.structures
        confidence = {row["index"]: row["confidence"] for row in own.table}
    if mask is not None:
        inside = mask.values
    else:
        assert own is not None
        inside = own.mask > 0
    return external.assemble(
        structures,
        inside,
        confidence,
        image=image,
        restored_grid=grid,
    )


def _facts(
    network: ParcellationNetwork,
    own: Parcellation | None,
    mask: _Replacement | None,
    labels: _Replacement | None,
) -> dict[str, Any]:
    """Facts about the sources of mask and structures, for the records; JSON-able."""
    card = ("name", "licence", "training_data", "sha256")
    facts: dict[str, Any] = {
        "mask_source": MaskSource.EMBEDDED if mask is None else mask.origin.source,
        "structures_source": (
            StructuresSource.EMBEDDED if labels is None else labels.origin.source
        ),
        "weights": {key: network.metadata.get(key) for key in card},
    }
    given: dict[str, dict[str, str]] = {}
    for part in (mask, labels):
        if part is not None:
            given |= part.given
            facts |= part.program
    if given:
        facts["given"] = given
    if mask is not None and own is not None:
        facts["mask_agreement"] = external.dice(mask.values, own.mask > 0)
    return facts
