# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: one frozen object, passed as an argument, written as TOML.

Nothing in the package reads a global setting: every function receives what it needs.
"""

from __future__ import annotations

import json
import reprlib
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

EXPORTS = ("fmriprep", "raw")
"""What a run can be exported as, see ``bids.export``."""
TASKS = {
    "restore": "restored",
    "inpaint": "inpainted",
    "restore+inpaint": "restoredInpainted",
    "refine": "refined",
    "restore+refine": "restoredRefined",
    "inpaint+refine": "inpaintedRefined",
    "restore+inpaint+refine": "restoredInpaintedRefined",
}
"""Task -> the ``desc-`` of its image (docs/tasks/combinations.md)."""
FILLED = ("inpainted", "inpaintedRefined")
"""Images that are the scan on its own grid, in which only the voxels under the lesion mask are
replaced."""
SKULL_STRIPS = ("embedded", "synthstrip", "skip", "mask")
PARCELLATIONS = ("embedded", "synthseg", "derivatives")
MODALITIES = ("T1w", "T2w", "FLAIR")
OTHER_MODALITIES = ("UNIT1", "PDw", "T2starw")
"""Contrasts on which the prior was not trained; processed only on request."""
SIMILAR_CONTRAST = {"UNIT1": "T1w"}
"""Of these, the ones that the network treats as a contrast of its training."""
FUSE = ("runs",)
SPACES = ("anat", "T1w", "MNI305")
"""Output spaces that need no template."""
DEFAULT_SPACES = ("anat", "MNI305")
EXPORT_PER = ("subject", "session")
LEVELS = ("participant", "group")
OUTPUT_GRIDS = ("1mm", "native")
LOW_MEMORY_TILE_MM = 32
"""Width of the prior's tiles with ``--low-mem``."""


def is_template(space: str) -> bool:
    """Whether an output space is reached by nonlinear registration to TemplateFlow's template."""
    return space not in SPACES


@dataclass(frozen=True)
class Settings:
    """All settings of a run, with the defaults filled in.

    Parameters
    ----------
    bids_dir, output_dir, work_dir : Path
        Absolute.
    analysis_level : tuple of str
        ``participant``, ``group`` or both.
    participant_label, session_label, run_id : tuple of str
        Labels without ``sub-``, ``ses-``, ``run-``; empty means all.
    modalities : tuple of str
        Suffixes of the scans to process.
    bids_filters : mapping
        Suffix -> pybids query, from ``--bids-filter-file``; in TOML as JSON text.
    bids_database_dir : Path or None
        Folder of the pybids index; None indexes in memory.
    derivatives : mapping
        Name -> root of other derivative data sets; in TOML as JSON text.
    task, sampler, n_samples, n_steps
        Options of the engine; see ``brainprior_bids.engine.restore``. ``n_steps`` is None for the
        sampler's default.
    lesion_mask : str or None
        Pattern of the lesion masks' paths; None looks them up by their BIDS names.
    fuse : str or None
        ``runs``: all runs and acquisitions of one contrast of a session are combined in one
        result.
    dilate_mm : float
        Dilation of the lesion mask.
    trust : str or None
        SD of the error of the image to refine, as a fraction of the brain's 99th percentile, or
        the pattern of the path of an error map.
    save_samples : bool
        Write each sample as a separate image.
    viewer : bool
        Write the pages that show a result in three linked planes.
    exports : mapping
        ``fmriprep``, ``raw`` -> root of the data set to write; in TOML as JSON text.
    export_per : str
        ``subject`` or ``session``: export one T1w for each.
    prior : Path or None
        Weights of the prior; None for the embedded ones.
    slice_thickness_mm : float or None
        Overrides the sidecars.
    slice_plane : str or None
        ``sagittal``, ``coronal`` or ``axial``; overrides header and sidecars.
    effective_resolution : str
        ``auto``, ``off``, or the measured voxel size in mm: ``0,0,5``.
    field_strength_t : float or None
        Overrides the sidecars.
    output_spaces : tuple of str
        Any of ``anat`` (the scan's own), ``T1w`` (other contrasts on the T1w's grid), ``MNI305``,
        and labels of TemplateFlow's templates; cohort 3 of a template is ``NAME+3``.
    output_grid : str
        ``native`` writes the whole head on the scan's own voxels as well.
    skull_strip, parcellation : str
        Source of the brain mask and of the structures.
    synthstrip_model : Path or None
        Weights of SynthStrip, for programs that do not include them.
    random_seed : int
        Each scan's seed is derived from it and the scan's name.
    device : str
        ``cpu`` or ``cuda:N``; ``auto`` is resolved before a run starts, or, where the steps are
        jobs of a scheduler, by the restoration itself.
    nprocs, omp_nthreads, n_gpu_procs : int
        Processors in total, threads per node, simultaneous restorations on the GPU.
    mem_gb : float
        Upper bound of the memory that the running nodes may reserve together.
    low_mem : bool
        Never use more memory at once than the largest step needs; the prior runs in tiles.
    job_id : str or None
        The scheduler's job in which a participant runs or, at the group level, that has ended.
    plugin_file : Path or None
        Nipype's execution plugin and its arguments, YAML; None is our own pool.
    """

    bids_dir: Path
    output_dir: Path
    work_dir: Path
    analysis_level: tuple[str, ...] = ("participant",)
    participant_label: tuple[str, ...] = ()
    session_label: tuple[str, ...] = ()
    run_id: tuple[str, ...] = ()
    modalities: tuple[str, ...] = MODALITIES
    bids_filters: dict[str, Any] = field(default_factory=dict)
    bids_database_dir: Path | None = None
    derivatives: dict[str, Any] = field(default_factory=dict)
    skip_bids_validation: bool = False
    task: str = "restore"
    sampler: str = "auto"
    n_samples: int = 4
    n_steps: int | None = None
    save_samples: bool = False
    viewer: bool = True
    output_spaces: tuple[str, ...] = DEFAULT_SPACES
    output_grid: str = "1mm"
    fuse: str | None = None
    lesion_mask: str | None = None
    dilate_mm: float = 0.0
    trust: str | None = None
    exports: dict[str, Any] = field(default_factory=dict)
    export_per: str = "subject"
    prior: Path | None = None
    slice_thickness_mm: float | None = None
    slice_plane: str | None = None
    effective_resolution: str = "auto"
    field_strength_t: float | None = None
    skull_strip: str = "embedded"
    parcellation: str = "embedded"
    synthstrip_model: Path | None = None
    random_seed: int = 0
    device: str = "auto"
    n_gpu_procs: int = 1
    nprocs: int = 1
    omp_nthreads: int = 1
    mem_gb: float = 8.0
    low_mem: bool = False
    job_id: str | None = None
    plugin_file: Path | None = None
    force: bool = False
    sloppy: bool = False
    dry_run: bool = False
    boilerplate_only: bool = False
    reports_only: bool = False
    clean_workdir: bool = False
    resource_monitor: bool = False
    debug: bool = False
    stop_on_first_crash: bool = False
    write_graph: bool = False
    verbose: int = 0
    run_uuid: str = ""
    command: tuple[str, ...] = ()

    @property
    def use_gpu(self) -> bool:
        """True if the device was resolved to CUDA."""
        return self.device.startswith("cuda")

    @property
    def nipype_level(self) -> str:
        """Level of Nipype's own log: silent (we report failures), tracebacks, everything."""
        return ("CRITICAL", "ERROR", "INFO", "DEBUG")[min(self.verbose, 3)]

    @property
    def image(self) -> str:
        """The ``desc-`` of the image that the task makes."""
        return TASKS[self.task]

    @property
    def inpaints(self) -> bool:
        """Whether the task needs a lesion mask."""
        return "inpaint" in self.task

    @property
    def refines(self) -> bool:
        """Whether the task needs another tool's image."""
        return "refine" in self.task

    @property
    def fills_scan(self) -> bool:
        """Whether the image is the scan itself, with only the voxels under the lesion mask
        replaced.
        """
        return self.image in FILLED

    @property
    def simple(self) -> bool:
        """Whether each result is computed from one scan without hidden voxels."""
        return not (self.inpaints or self.fuse)

    @property
    def uses_scan(self) -> bool:
        """False if another tool's image replaces the scan (``refine`` alone)."""
        return self.task != "refine"

    @property
    def template_spaces(self) -> tuple[str, ...]:
        """The ``output_spaces`` that need a template."""
        return tuple(space for space in self.output_spaces if is_template(space))

    @property
    def trust_sd(self) -> float | None:
        """``trust`` as a number; None if it names a map or is not set."""
        try:
            return float(self.trust or "")
        except ValueError:
            return None

    def scan_settings(self) -> dict[str, Any]:
        """The settings that determine a scan's result, for given image, metadata and weights."""
        return {
            "task": self.task,
            "sampler": self.sampler,
            "n_samples": self.n_samples,
            "n_steps": self.n_steps or "default",
            "save_samples": self.save_samples,
            # files on the T1w's grid are derived from finished scans
            "output_spaces": [space for space in self.output_spaces if space != "T1w"],
            "output_grid": self.output_grid,
            "fuse": self.fuse,
            "dilate_mm": self.dilate_mm,
            "trust": self.trust,
            "slice_thickness_mm": self.slice_thickness_mm,
            "slice_plane": self.slice_plane,
            "effective_resolution": self.effective_resolution,
            "field_strength_t": self.field_strength_t,
            "skull_strip": self.skull_strip,
            "parcellation": self.parcellation,
            "random_seed": self.random_seed,
        }

    def to_toml(self) -> str:
        """The settings as TOML, one ``[brainprior]`` table; unset values are left out."""
        lines = ["# Settings of one brainprior run; --config-file reads them.", "[brainprior]"]
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None:
                continue
            if isinstance(value, dict):
                value = json.dumps(value, default=str)
            lines.append(f"{item.name} = {_toml(value)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str) -> Settings:
        """Read a text written by ``to_toml``.

        Raises
        ------
        ValueError
            If the text is not TOML, lacks the table, or names a setting that does not exist.
        """
        return cls(**read_table(text))


def read_table(text: str) -> dict[str, Any]:
    """The ``[brainprior]`` table of a TOML text: setting -> value, of the setting's type.

    Raises
    ------
    ValueError
        If the text is not TOML, lacks the table, names a setting that does not exist, or gives
        one a value of another type.
    """
    try:
        table = tomllib.loads(text).get("brainprior")
    except RecursionError:
        raise ValueError("Settings: the text is nested too deeply.") from None
    if not isinstance(table, dict):
        raise ValueError("Settings: expected a [brainprior] table, got none.")
    kinds = {item.name: str(item.type).removesuffix(" | None") for item in fields(Settings)}
    unknown = sorted(set(table) - set(kinds))
    if unknown:
        raise ValueError(f"Settings: unknown {', '.join(unknown)}. Remove or correct them.")
    return {name: _typed(name, kinds[name], value) for name, value in table.items()}


def _typed(name: str, kind: str, value: Any) -> Any:
    expected: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "int": (int,),
        "float": (int, float),
        "tuple[str, ...]": (list,),
    }
    allowed = expected.get(kind, (str,))
    fits = isinstance(value, allowed) and (kind == "bool" or not isinstance(value, bool))
    if not fits or (kind.startswith("tuple") and not all(isinstance(v, str) for v in value)):
        what = {"Path": "a path in quotes", "dict[str, Any]": "JSON in quotes",
                "tuple[str, ...]": "a list of strings"}.get(kind, kind)  # fmt: skip
        raise ValueError(f"Settings: {name} must be {what}, got {reprlib.repr(value)}.")
    if kind == "Path":
        return Path(value)
    if kind.startswith("dict"):
        return _object(name, value)
    return tuple(value) if kind.startswith("tuple") else value


def _object(name: str, text: str) -> dict[str, Any]:
    """The JSON object in a setting's text; all but filters map names to text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Settings: {name} must be JSON in quotes: {error}.") from None
    item = dict if name == "bids_filters" else str
    if not isinstance(value, dict) or not all(isinstance(v, item) for v in value.values()):
        what = "objects" if item is dict else "text"
        raise ValueError(
            f"Settings: {name} must be a JSON object of {what} in quotes, got {text[:60]!r}."
        )
    return value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    # a JSON string without surrogate pairs is a TOML basic string
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
