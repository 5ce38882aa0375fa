# SPDX-License-Identifier: Apache-2.0
"""The record of each step of a scan, as frozen dataclasses.

A node writes its record as JSON into its folder. The last node gathers the records into the scan's
summary (``ScanRecord``, ``logs/scans/<scan>.json``), from which tables, reports, the methods text
and the provenance are derived.

A record is constructed with all of its fields and read leniently (``typed_json``): a key that
another version did not write reads as "not recorded". Other forms written by older versions are
translated in ``_upgraded``, and nowhere else.

Units are in the names; coordinates are scanner RAS mm. Axes are closest-canonical (RAS).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, cast

from brainprior_bids.engine.errors import (
    BrainpriorError,
    ShapeMismatchError,
    is_full,
    is_out_of_memory,
)
from brainprior_bids.engine.samplers.registry import EARLIER_NAMES
from brainprior_bids.typed_json import OMIT, Record

Triple = tuple[float, float, float]
Voxel = tuple[int, int, int]
Row = tuple[float, float, float, float]
Matrix = tuple[Row, Row, Row, Row]
"""4 × 4: voxels or mm to mm."""
Pairs = tuple[tuple[float, float], ...]


def matrix_rows(matrix: Any) -> Matrix:
    """A (4, 4) array in the form of a record.

    Raises
    ------
    ShapeMismatchError
        If it is not 4 x 4.
    """
    rows = tuple(tuple(float(value) for value in row) for row in matrix)
    if [len(row) for row in rows] != [4, 4, 4, 4]:
        raise ShapeMismatchError(f"matrix_rows: expected a 4 x 4 matrix, got {matrix!r}.")
    return cast(Matrix, rows)


EMBEDDED = "the embedded parcellation network"
OTHER_DATA = "another data set (--derivatives)"


class MaskSource(StrEnum):
    """Source of a brain mask; those that can be requested have the names of ``--skull-strip``."""

    EMBEDDED = "embedded"
    OWN_EDGE = "own-edge"
    SKIP = "skip"
    SYNTHSTRIP = "synthstrip"
    FILE = "mask"

    @property
    def words(self) -> str:
        """Description for logs and reports."""
        return {
            MaskSource.EMBEDDED: EMBEDDED,
            MaskSource.OWN_EDGE: "the scan's own edge: it is already skull-stripped",
            MaskSource.SKIP: "the scan's own edge (--skull-strip skip)",
            MaskSource.SYNTHSTRIP: "SynthStrip",
            MaskSource.FILE: OTHER_DATA,
        }[self]

    @property
    def scan_is_stripped(self) -> bool:
        """Whether the scan was already skull-stripped."""
        return self in (MaskSource.OWN_EDGE, MaskSource.SKIP)


class StructuresSource(StrEnum):
    """Source of the labels of structures, by the names of ``--parcellation``."""

    EMBEDDED = "embedded"
    SYNTHSEG = "synthseg"
    FILE = "derivatives"

    @property
    def words(self) -> str:
        """Description for logs and reports."""
        return {
            StructuresSource.EMBEDDED: EMBEDDED,
            StructuresSource.SYNTHSEG: "SynthSeg",
            StructuresSource.FILE: OTHER_DATA,
        }[self]


class AffineMethod(StrEnum):
    """Source of the affine to MNI305."""

    STRUCTURES = "structures"
    TEMPLATE = "template"

    @property
    def words(self) -> str:
        """Description for logs and reports."""
        return {
            AffineMethod.STRUCTURES: "structures",
            AffineMethod.TEMPLATE: "registration to the template",
        }[self]


@dataclass(frozen=True)
class Origin:
    """A source, and its name if it is a file.

    Parameters
    ----------
    source : MaskSource or StructuresSource
    uri : str, optional
        ``bids:<data set>:<path>`` or a file name.
    """

    source: MaskSource | StructuresSource
    uri: str | None = None

    @property
    def embedded(self) -> bool:
        """Whether the source is the embedded network."""
        return self.source in (MaskSource.EMBEDDED, StructuresSource.EMBEDDED)

    @property
    def words(self) -> str:
        """Description for sidecars, reports and messages: the file, or the source in words."""
        return self.uri or self.source.words

    @property
    def data_set(self) -> str:
        """Description for the methods text: a file by its data set's name, others in words."""
        scheme, _, rest = (self.uri or "").partition(":")
        return f"the data set {rest.partition(':')[0]}" if scheme == "bids" else self.words


class ScanStatus(StrEnum):
    """State of a scan."""

    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"
    WAITING = "waiting"
    RUNNING = "running"


@dataclass(frozen=True, kw_only=True)
class FileRecord(Record):
    """A file from another data set that was used."""

    uri: str
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class WeightsRecord(Record):
    """Identity of a network's weights, and facts from their header."""

    name: str | None = None
    licence: str | None = field(default=None, metadata=OMIT)
    training_data: Any = field(default=None, metadata=OMIT)
    format: Any = field(default=None, metadata=OMIT)
    version: Any = field(default=None, metadata=OMIT)
    coverage: str | None = field(default=None, metadata=OMIT)
    regional_error: float | None = field(default=None, metadata=OMIT)
    """SD of the error that the samples share in the mean over a structure, engine unit."""
    sha256: str | None = None

    @property
    def label(self) -> str:
        """``name, SHA-256 abcdef…``."""
        return f"{self.name or 'unnamed'}, SHA-256 {str(self.sha256)[:12]}…"


@dataclass(frozen=True, kw_only=True)
class AcquisitionRecord(Record):
    """The slice geometry that was used; see ``engine.acquisition.Acquisition``."""

    slice_axis: int | None
    thickness_mm: float | None
    spacing_mm: float | None
    profile: str | Pairs | None
    interleaves: int | None = None


@dataclass(frozen=True, kw_only=True)
class HeaderRecord(Record):
    """The original header; a voxel size that is not a number is None."""

    format: str | None
    shape: tuple[int, ...]
    zooms: tuple[float | None, ...]
    axis_codes: str | None
    axes_to_canonical: tuple[tuple[int, int], ...]
    sform_code: int | None
    qform_code: int | None
    datatype: str | None
    scl_slope: float | None
    scl_inter: float | None
    descrip: str | None
    xyzt_units: tuple[str, ...]
    header_base64: str | None


@dataclass(frozen=True, kw_only=True)
class HeaderAffineRecord(Record):
    """Sform and qform, and which of them was used."""

    sform_code: int | None
    qform_code: int | None
    sform_qform_mirrored: bool | None
    sform_qform_distance_mm: float | None = field(default=None, metadata=OMIT)
    matrix: Matrix | None
    used: str | None
    code: int | None
    largest_cosine_between_axes: float | None


@dataclass(frozen=True, kw_only=True)
class ValuesRecord(Record):
    """The voxels' values, scanner units."""

    min: float | None
    max: float | None
    non_finite_voxels_set_to_0: int | None
    negative_voxels: int | None
    shift: float | None = field(default=None, metadata=OMIT)
    """Constant added to an image without a zero of its own."""


@dataclass(frozen=True, kw_only=True)
class ResolutionRecord(Record):
    """The measured voxels of the scan; see ``anatomy.resolution``."""

    stored_mm: tuple[float, ...]
    measured_mm: tuple[float, ...]
    used_mm: tuple[float, ...]
    source: str | None
    interpolant: tuple[bool, ...] = ()

    @property
    def factor(self) -> float | None:
        """The largest ratio of measured and stored voxel size; None if not recorded."""
        pairs = zip(self.measured_mm, self.stored_mm, strict=True)
        return max((measured / stored for measured, stored in pairs), default=None)

    @property
    def interpolated(self) -> bool:
        """Whether the stored voxels are smaller than the measured ones."""
        return self.measured_mm != self.stored_mm

    @property
    def reduced(self) -> bool:
        """Whether larger voxels than the stored ones were used."""
        return self.used_mm != self.stored_mm


@dataclass(frozen=True, kw_only=True)
class StatedAcquisitionRecord(AcquisitionRecord):
    """The slice geometry, the source of each value, and the values in the sidecars."""

    gap_mm: float | None
    in_plane_mm: tuple[float, ...]
    slice_axis_source: str | None
    thickness_source: str | None
    spacing_source: str | None
    profile_source: str | None
    metadata: Mapping[str, Any]

    @property
    def field_strength_t(self) -> float | None:
        """Field strength from the sidecars."""
        value = self.metadata.get("MagneticFieldStrength")
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True, kw_only=True)
class GridRecord(Record):
    """The scan's grid on closest-canonical axes."""

    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    affine: Matrix | None
    rotation_from_axes_deg: float | None


@dataclass(frozen=True, kw_only=True)
class ConformFacts(Record):
    """Header, values and grid of the scan."""

    source: str | None
    original: HeaderRecord
    affine: HeaderAffineRecord
    values: ValuesRecord
    resolution: ResolutionRecord
    acquisition: StatedAcquisitionRecord
    grid: GridRecord


@dataclass(frozen=True, kw_only=True)
class ConformRecord(Record):
    """``conform.json``."""

    acquisition: AcquisitionRecord
    facts: ConformFacts
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StructureRecord(Record):
    """One structure of the parcellation."""

    index: int | None
    name: str
    volume_mm3: float | None
    confidence: float | None
    centroid_mm: Triple | None
    cut_share: float | None


@dataclass(frozen=True, kw_only=True)
class SliceFitRecord(Record):
    """Consistency of the slices; see ``anatomy.slices``."""

    mismatch: float | None
    faintest: float | None
    faintest_slice: int | None


@dataclass(frozen=True, kw_only=True)
class ProgramRecord(Record):
    """An external program that was run."""

    command: tuple[str, ...]
    program: str | None


@dataclass(frozen=True, kw_only=True)
class ParcellationRecord(Record):
    """``structures.json``: mask and structures, and their sources."""

    table: tuple[StructureRecord, ...]
    warnings: tuple[str, ...]
    mask_source: MaskSource = MaskSource.EMBEDDED
    structures_source: StructuresSource = StructuresSource.EMBEDDED
    weights: WeightsRecord
    given: Mapping[str, FileRecord] = field(default_factory=dict, metadata=OMIT)
    mask_agreement: float | None = field(default=None, metadata=OMIT)
    synthstrip: ProgramRecord | None = field(default=None, metadata=OMIT)
    synthseg: ProgramRecord | None = field(default=None, metadata=OMIT)
    slices: SliceFitRecord | None = field(default=None, metadata=OMIT)
    lost_slices: tuple[int, ...] = field(default=(), metadata=OMIT)

    @property
    def mask_origin(self) -> Origin:
        """Source of the mask."""
        return Origin(self.mask_source, self._uri("mask"))

    @property
    def structures_origin(self) -> Origin:
        """Source of the labels."""
        return Origin(self.structures_source, self._uri("dseg"))

    def _uri(self, role: str) -> str | None:
        return self.given[role].uri if role in self.given else None

    @classmethod
    def _upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The source used to be a sentence, or the file's address."""
        sentences = {
            "the scan's own edge: it is already skull-stripped": MaskSource.OWN_EDGE,
            "the scan's own edge (--skull-strip skip)": MaskSource.SKIP,
            "SynthStrip": MaskSource.SYNTHSTRIP,
            "SynthSeg": StructuresSource.SYNTHSEG,
        }
        for key, role, file in (
            ("mask_source", "mask", MaskSource.FILE),
            ("structures_source", "dseg", StructuresSource.FILE),
        ):
            source = values.get(key)
            if not isinstance(source, str) or source in list(type(file)):
                continue
            values[key] = sentences.get(source, file)
            if source not in sentences:
                values["given"] = {role: {"uri": source}, **(values.get("given") or {})}
        return values


@dataclass(frozen=True, kw_only=True)
class LesionRecord(Record):
    """``lesion.json``: the lesion mask that was used."""

    volume_ml: float | None
    hidden_ml: float | None
    share_inside_brain: float | None
    share_of_brain: float | None
    depth_mm: float | None
    dilate_mm: float | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class InterleaveRecord(Record):
    """Motion between the interleaves of a 2-D scan; see ``anatomy.interleaves``."""

    moved: bool
    """Whether the motion is large and certain."""
    obstacle: str | None = None
    """Why the scan is not restored with it; None if it can be."""
    to_reference: tuple[Matrix, ...]
    """One matrix per interleave; that of the first is the identity."""
    rms_mm: float
    across_mm: float | None = None
    """The part of ``rms_mm`` across the slices."""
    error_mm: float
    mismatch_ratio: float | None

    @classmethod
    def _upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """There used to be two interleaves, with one matrix from the odd slices to the even."""
        matrices = values.get("to_reference")
        if matrices and not isinstance(matrices[0][0], list | tuple):
            identity = [[float(i == j) for j in range(4)] for i in range(4)]
            values["to_reference"] = [identity, matrices]
        return values


@dataclass(frozen=True, kw_only=True)
class BiasRecord(Record):
    """``bias.json``: slice gains and interleaves of a 2-D scan; see ``anatomy.slice_gains``.

    Slices are counted along the closest-canonical axis, from the left, the back or the bottom.
    Without gains, the scan is a 3-D one or they could not be estimated.
    """

    applied: bool | None
    """Whether the scan was corrected: the gains are large and significant."""
    gains: tuple[float, ...]
    """Brightness of each slice relative to the smooth bias field; 1 if not applied."""
    compared: tuple[bool, ...]
    """Whether the slice could be compared with its neighbours; others follow the alternation."""
    alternation_percent: float | None
    """Half of the difference in log gain between even and odd slices."""
    alternation_se_percent: float | None
    random_sd_percent: float | None
    """SD of the random gains; 0 if not significant."""
    rms_percent: float | None
    """RMS of the log gains that were applied."""
    evidence: float | None
    """Twice the log likelihood ratio of ``random_sd_percent`` against 0."""
    warnings: tuple[str, ...]
    interleaves: InterleaveRecord | None = field(default=None, metadata=OMIT)


@dataclass(frozen=True, kw_only=True)
class AffineRecord(Record):
    """``affine.json``: scanner RAS mm to MNI305 RAS mm, and its residuals."""

    matrix: Matrix | None
    method: AffineMethod = AffineMethod.STRUCTURES
    dof: int | None
    residuals_mm: Mapping[str, float]
    median_residual_mm: float | None
    hull_residual_mm: float | None
    used: tuple[str, ...]
    warnings: tuple[str, ...]

    @classmethod
    def _upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The method used to be a sentence."""
        if values.get("method") == "registration to the template":
            values["method"] = AffineMethod.TEMPLATE
        return values


@dataclass(frozen=True, kw_only=True)
class TemplateRecord(Record):
    """The registration to one template; see ``anatomy.normalise``."""

    space: str
    address: str | None
    """Address of the image that defines the space."""
    image_sha256: str | None
    mask_sha256: str | None
    metric: str | None
    """Metric of the nonlinear stage."""
    program: str | None
    agreement: float | None
    """Dice of the two brain masks after the registration."""
    agreement_affine: float | None
    """The same with the affine to MNI305 alone."""


@dataclass(frozen=True, kw_only=True)
class TemplatesRecord(Record):
    """``templates.json``: every template that a scan was registered to."""

    templates: tuple[TemplateRecord, ...]


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """One run of a fused image, the reference included.

    Motion and agreement are relative to the reference, which has none itself; files and hashes are
    only in ``runs.json``, noise and residuals only in ``restore.json``.
    """

    name: str
    files: Mapping[str, str] = field(default_factory=dict, metadata=OMIT)
    hashes: Mapping[str, str] = field(default_factory=dict, metadata=OMIT)
    acquisition: AcquisitionRecord
    to_reference: Matrix | None
    angle_deg: float | None = field(default=None, metadata=OMIT)
    shift_mm: float | None = field(default=None, metadata=OMIT)
    gain: float | None
    correlation: float | None = field(default=None, metadata=OMIT)
    shared: float | None = field(default=None, metadata=OMIT)
    noise_sd: float | None = field(default=None, metadata=OMIT)
    residual_ratios: tuple[float, ...] = field(default=(), metadata=OMIT)
    lesion: LesionRecord | None = field(default=None, metadata=OMIT)
    """Set for a run other than the reference that has a lesion mask."""
    bias: BiasRecord | None = field(default=None, metadata=OMIT)
    """Set for a run other than the reference."""


@dataclass(frozen=True, kw_only=True)
class AlignRecord(Record):
    """``runs.json``: the reference's name, and the other runs."""

    reference: str
    runs: tuple[RunRecord, ...]


@dataclass(frozen=True, kw_only=True)
class BoxRecord(Record):
    """The part of the 1 mm grid that was computed: first voxel, and one past the last."""

    start: Voxel
    stop: Voxel


@dataclass(frozen=True, kw_only=True)
class EnvironmentRecord(Record):
    """Further facts on which the bytes of a result depend."""

    device: str | None
    threads: int | None
    processor: str | None
    torch: str | None
    cpu_capability: str | None
    deterministic_algorithms: bool | None
    gpu: str | None = field(default=None, metadata=OMIT)
    gpu_memory_gb: float | None = field(default=None, metadata=OMIT)
    cuda: str | None = field(default=None, metadata=OMIT)
    cudnn: int | None = field(default=None, metadata=OMIT)
    cudnn_deterministic: bool | None = field(default=None, metadata=OMIT)
    tf32: bool | None = field(default=None, metadata=OMIT)
    network_dtype: str | None


@dataclass(frozen=True, kw_only=True)
class RefinedRecord(Record):
    """Another tool's image used with the scan: gain to scanner units, and correlation."""

    gain: float | None
    correlation: float | None


@dataclass(frozen=True, kw_only=True)
class ChangedRecord(Record):
    """Share of the scan's voxels that have changed, inside and outside of the mask."""

    inside: float | None
    outside: float | None


@dataclass(frozen=True, kw_only=True)
class RestoreRecord(Record):
    """``restore.json``: sampler, noise, and agreement of the result with the scan.

    Noise levels are in ``unit``, the brain's 99th percentile in scanner units.
    """

    sampler: str | None
    sampler_reason: str | None
    """Why another sampler than the default was used."""
    solve: str | None = field(default=None, metadata=OMIT)
    """Strategy of the linear-Gaussian solve."""
    contrast: str | None
    n_samples: int | None
    uncertainty_from: str | None = None
    """Source of the uncertainty map: the "prior"'s prediction, or the SD of the "samples"."""
    seed: int | None
    schedule: tuple[float, ...]
    calls: int | None
    tile_mm: float | None
    sample_seeds: tuple[int, ...]
    slice_widths: tuple[float, ...]
    """Ratio of assumed to stated slice thickness, per sample."""
    inner_iterations: float | None
    rim_mm: float | None
    box: BoxRecord | None
    noise_sd_initial: float | None
    noise_sd: float | None
    residual_ratios: tuple[float, ...]
    """RMS of scan minus prediction, divided by the noise SD before sampling, per sample."""
    residual_ratios_final: tuple[float, ...]
    residual_correlation: tuple[Triple, ...]
    """Lag-one autocorrelation of the residual along i, j, k, per sample."""
    bias_range: float | None
    share_beyond_3_sd: float | None
    unit: float | None
    seconds: float | None
    acquisition: AcquisitionRecord
    environment: EnvironmentRecord
    prior: WeightsRecord
    coarse: WeightsRecord | None = field(default=None, metadata=OMIT)
    """The coarse network, if it was asked."""
    warnings: tuple[str, ...]
    runs: tuple[RunRecord, ...] | None = field(default=None, metadata=OMIT)
    refined: RefinedRecord | None = field(default=None, metadata=OMIT)
    changed_share: ChangedRecord | None = field(default=None, metadata=OMIT)
    interleaves_corrected: bool | None = field(default=None, metadata=OMIT)
    """Whether each displaced interleave was restored as an observation; None if none is."""

    def scanner_units(self, value: float | None) -> float | None:
        """A value in ``unit`` as scanner units; None if either is not recorded."""
        return None if value is None or self.unit is None else value * self.unit

    @property
    def outside_training(self) -> bool:
        """Whether the prior was not trained on this contrast."""
        return self.contrast == "unknown"

    @classmethod
    def _upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``sampler_reason`` used to be ``not_eps``, a sampler had another name, and the
        uncertainty was always from samples."""
        values.setdefault("sampler_reason", values.pop("not_eps", None))
        if (values.get("n_samples") or 0) > 1:
            values.setdefault("uncertainty_from", "samples")
        sampler = values.get("sampler")
        if isinstance(sampler, str):
            values["sampler"] = EARLIER_NAMES.get(sampler, sampler)
        return values


@dataclass(frozen=True, kw_only=True)
class ProgressRecord(Record):
    """``progress.json``, while the restoration runs: sample and step, both from 1."""

    sample: int
    samples: int
    step: int
    steps: int

    @property
    def share(self) -> float:
        """Completed share of all steps of all samples."""
        return ((self.sample - 1) * self.steps + self.step) / (self.samples * self.steps)


class Stage(StrEnum):
    """Part of a run."""

    SCANS = "scans"
    END = "end"
    """After the scans: contrasts are aligned, tables and reports written."""


@dataclass(frozen=True, kw_only=True)
class RunProgressRecord(Record):
    """``logs/<run>_progress.json``, while a run is going: rewritten every few seconds."""

    run_uuid: str
    updated: str
    """Time of the last change, ISO 8601 with time zone."""
    stage: Stage
    share: float | None = None
    """Share of the expected work of all scans that is done; None if it is not known."""


@dataclass(frozen=True, kw_only=True)
class ExportRecord(Record):
    """``export.json``: how the brain was inserted into its head."""

    gain: float
    feather_mm: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class UsageRecord(Record):
    """Time and memory of a node; ``started`` is UTC, memory in GiB."""

    started: str | None
    seconds: float | None
    cpu_seconds: float | None
    peak_memory_gb: float | None
    added_memory_gb: float | None
    gpu_memory_gb: float | None


@dataclass(frozen=True, kw_only=True)
class NodeRecord(UsageRecord):
    """``node.json``: time, memory and warnings of a node."""

    node: str | None
    threads: int | None
    warnings: tuple[str, ...]


FULL_DISK = "FullDisk"
"""``type`` of a failure because the disk is full: its size, a quota or the number of files."""
OUT_OF_MEMORY = (
    "memory ran out. Allow more (the limit of the job, container or shell), or pass --low-mem"
)


@dataclass(frozen=True, kw_only=True)
class FailureRecord(UsageRecord):
    """``failure.json``: why a node failed; expected errors have a self-explanatory message."""

    node: str
    type: str
    message: str
    expected: bool

    @classmethod
    def of(cls, error: BaseException | None, **known: Any) -> FailureRecord:
        """The record of a step that failed with ``error``, or for the ``known`` reason."""
        facts: dict[str, Any] = dict.fromkeys(f.name for f in fields(UsageRecord))
        facts |= {"node": "", "expected": error is None or isinstance(error, BrainpriorError)}
        if error is not None:
            facts |= {"type": type(error).__name__, "message": str(error) or "no reason is given"}
        if is_full(error):
            facts |= {"type": FULL_DISK, "expected": True}
        elif not facts["expected"] and is_out_of_memory(error):
            facts |= {"message": f"{OUT_OF_MEMORY} ({facts['message']})", "expected": True}
        return cls(**{**facts, **known})


@dataclass(frozen=True, kw_only=True)
class ErrorRecord(Record):
    """Why a scan failed."""

    node: str | None = None
    type: str | None
    message: str | None
    crash_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class TissuesRecord(Record):
    """``tissues.json``: metrics by MRIQC's names; see ``anatomy.tissue_metrics``."""

    input: Mapping[str, float]
    """Metrics of the scan without its bias field."""
    restored: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class AlignmentRecord(Record):
    """How well a result could be registered to its session's reference contrast."""

    reference: str
    shared: float | None = None
    """Share of the smaller brain that is in both."""
    alike: float | None = None
    """Share of the voxels in both brains that have one label."""
    message: str = ""
    """Why the two are not aligned; empty if they are."""


@dataclass(frozen=True, kw_only=True)
class StepRecords(Record):
    """The records of a scan's steps, and the files from other data sets, by role."""

    conform: ConformRecord = field(default_factory=ConformRecord.empty, metadata=OMIT)
    parcellation: ParcellationRecord = field(
        default_factory=ParcellationRecord.empty, metadata=OMIT
    )
    affine: AffineRecord = field(default_factory=AffineRecord.empty, metadata=OMIT)
    restore: RestoreRecord = field(default_factory=RestoreRecord.empty, metadata=OMIT)
    lesion: LesionRecord | None = field(default=None, metadata=OMIT)
    bias: BiasRecord | None = field(default=None, metadata=OMIT)
    """None for another tool's image that was refined alone."""
    tissues: TissuesRecord | None = field(default=None, metadata=OMIT)
    """None if they could not be computed, and for a scan that was only inpainted."""
    templates: tuple[TemplateRecord, ...] = field(default=(), metadata=OMIT)
    alignment: AlignmentRecord | None = field(default=None, metadata=OMIT)
    """None for the session's reference contrast, and until its contrasts are aligned."""
    given: Mapping[str, FileRecord] = field(default_factory=dict, metadata=OMIT)
    seed: int | None = field(default=None, metadata=OMIT)

    @property
    def every_file(self) -> dict[str, FileRecord]:
        """Role -> file from another data set, including those of the parcellation."""
        return {**self.parcellation.given, **self.given}

    @property
    def networks(self) -> dict[str, WeightsRecord]:
        """``parcellation``, ``prior``, ``coarse`` -> weights, if recorded."""
        cards = {
            "parcellation": self.parcellation.weights,
            "prior": self.restore.prior,
            "coarse": self.restore.coarse,
        }
        return {kind: card for kind, card in cards.items() if card and card.sha256 is not None}


@dataclass(frozen=True, kw_only=True)
class ScanRecord(Record):
    """``logs/scans/<scan>.json``: the summary of one scan."""

    scan: str
    subject: str | None
    source: str | None = None
    source_sha256: str | None = field(default=None, metadata=OMIT)
    task: str | None = None
    status: ScanStatus | None = None
    seconds: float | None = None
    """Sum of the nodes' times."""
    message: str = ""
    job: str | None = field(default=None, metadata=OMIT)
    """Job number of the scheduler, while the scan runs."""
    run_uuid: str | None = None
    version: str | None = None
    fingerprint: str | None = None
    """SHA-256 over everything that determines the result."""
    parts: Mapping[str, str] = field(default_factory=dict, metadata=OMIT)
    """The inputs of the fingerprint: name -> value or SHA-256."""
    seed: int | None = field(default=None, metadata=OMIT)
    outputs: tuple[str, ...] = ()
    """Paths from the output folder, also for ``figures`` and ``left``."""
    figures: tuple[str, ...] = ()
    left: tuple[str, ...] = field(default=(), metadata=OMIT)
    """Files of an earlier run that are still in place."""
    warnings: tuple[str, ...] = ()
    facts: StepRecords = field(default_factory=StepRecords)
    nodes: tuple[NodeRecord, ...] = ()
    error: ErrorRecord | None = None

    @property
    def finished(self) -> bool:
        """Whether its result is in place."""
        return self.status in (ScanStatus.DONE, ScanStatus.SKIPPED)

    @property
    def pending(self) -> bool:
        """Whether it waits or is being processed, or did when its process was killed."""
        return self.status in (ScanStatus.WAITING, ScanStatus.RUNNING)

    @property
    def files(self) -> tuple[str, ...]:
        """Every path that this scan wrote in the output folder."""
        return (*self.outputs, *self.figures, *self.left)

    @property
    def peak_memory_gb(self) -> float | None:
        """Largest peak memory of its nodes."""
        peaks = (node.peak_memory_gb for node in self.nodes)
        return max((peak for peak in peaks if peak is not None), default=None)


def total_seconds(nodes: Iterable[NodeRecord]) -> float:
    """Time of all nodes."""
    return round(sum(node.seconds or 0.0 for node in nodes), 3)


def named(text: str, scan: str) -> str:
    """A message that begins with the scan's name, unless it names one of the subject already."""
    subject = scan.partition("_")[0]
    return text if text.startswith(f"{subject}_") else f"{scan}: {text}"


def unnamed(text: str, scan: str) -> str:
    """A message without the scan's name in front."""
    return text.removeprefix(f"{scan}: ")


@dataclass(frozen=True, kw_only=True)
class ContrastRecord(Record):
    """Alignment of a contrast with the session's reference contrast (``logs/contrasts``).
    ``to_reference`` is RAS mm to RAS mm, and None if the two could not be registered; ``message``
    then states why. ``outputs`` are paths in the output folder.
    """

    scan: str
    reference: str
    fingerprint: str | None = None
    to_reference: Matrix | None = None
    shared: float | None = None
    alike: float | None = None
    message: str = ""
    run_uuid: str | None = None
    outputs: tuple[str, ...] = ()

    @property
    def alignment(self) -> AlignmentRecord:
        """What the summary of the scan states of it."""
        return AlignmentRecord(
            reference=self.reference,
            shared=self.shared,
            alike=self.alike,
            message=self.message,
        )
