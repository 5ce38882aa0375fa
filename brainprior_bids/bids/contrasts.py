# SPDX-License-Identifier: Apache-2.0
"""Alignment of the contrasts of a session: the pairs, and the files that describe it.

A session's reference is its T1w, or the first contrast that it has. Every result of another
contrast gets a rigid transform to it and back, and with ``--output-spaces T1w`` its images on the
T1w's grid. The T1w's transform to a template is used for the other contrasts too; a contrast is
registered to a template itself only if its session has no T1w. Everything is derived from finished
results in the output folder, after the scans: a contrast that cannot be registered does not affect
them.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import nibabel as nib
import numpy as np

from brainprior_bids.anatomy.contrasts import ContrastMotion, RestoredContrast
from brainprior_bids.anatomy.normalise import resample_through
from brainprior_bids.anatomy.spaces import Kind, move, write_itk_affine
from brainprior_bids.anatomy.templates import find_template
from brainprior_bids.bids.derivatives import ITK_POINTS, bids_uri, resampled, structures_table
from brainprior_bids.bids.files import read_json, to_json
from brainprior_bids.bids.fingerprint import code_version
from brainprior_bids.bids.names import (
    BIDSName,
    names_in_space,
    output_names,
    result_name,
    transform_roles,
)
from brainprior_bids.bids.provenance import file_provenance, sha256_file
from brainprior_bids.bids.status import contrast_path
from brainprior_bids.records import ContrastRecord, ScanRecord
from brainprior_bids.settings import (
    FILLED,
    MODALITIES,
    OTHER_MODALITIES,
    TASKS,
    Settings,
)

ORDER = (*MODALITIES, *OTHER_MODALITIES)
"""Order of contrasts: the first that a session has is its reference."""


@dataclass(frozen=True)
class Result:
    """One scan's result in the output folder.

    Parameters
    ----------
    name : BIDSName
        Name of the scan.
    image : str
        ``desc-`` of the result.
    thickness_mm : float
        Thickness of the scan's slices.
    """

    name: BIDSName
    image: str
    thickness_mm: float = 0.0

    @property
    def title(self) -> str:
        """Name of the result in ``logs/scans``."""
        return result_name(self.name, self.image)

    def files(
        self, n_samples: int, *, save_samples: bool, uncertainty: bool = False
    ) -> dict[str, str]:
        """Role -> path of its files in its own space, from the output folder."""
        names = output_names(
            self.name,
            n_samples=n_samples,
            save_samples=save_samples,
            image=self.image,
            spaces=("anat",),
            uncertainty=uncertainty or n_samples > 1,
        )
        return {role: f"{self.name.folder}/anat/{file}" for role, file in names.items()}

    def to_template(self, space: str) -> str:
        """Path of the transform to a template, from the output folder."""
        names = output_names(self.name, n_samples=1, image=self.image, spaces=(space,))
        return f"{self.name.folder}/anat/{names[transform_roles(space)[0]]}"


@dataclass(frozen=True)
class Pair:
    """A contrast, and the session's reference."""

    reference: Result
    other: Result

    @property
    def transforms(self) -> tuple[str, str]:
        """Paths of the transform to the reference and of the one back."""
        name, own, there = self.other.name, self.other.name.suffix, self.reference.name.suffix
        desc = {"desc": self.other.image} if self.other.image == "refined" else {}
        files = (
            name.derivative("xfm", ".txt", from_=a, to=b, mode="image", **desc)
            for a, b in ((own, there), (there, own))
        )
        forward, back = (f"{name.folder}/anat/{file}" for file in files)
        return forward, back

    def on_reference(self, own: Mapping[str, str], spaces: Iterable[str]) -> dict[str, str]:
        """Role -> path of the files on the reference's grid.

        Parameters
        ----------
        own : role -> path
            Files of the contrast in its own space.
        """
        space = self.reference.name.suffix
        if space != "T1w" or "T1w" not in spaces:
            return {}
        names = names_in_space(self.other.name, own, space, image=self.other.image)
        return {role: f"{self.other.name.folder}/anat/{file}" for role, file in names.items()}

    def on_template(self, own: Mapping[str, str], space: str) -> dict[str, str]:
        """Role -> path of the files on a template's grid; arguments as in ``on_reference``."""
        if self.reference.name.suffix != "T1w":
            return {}
        names = names_in_space(self.other.name, own, space, image=self.other.image)
        return {role: f"{self.other.name.folder}/anat/{file}" for role, file in names.items()}


def pairs(results: Sequence[Result]) -> Iterator[Pair]:
    """Every result of another contrast than its session's reference, with that reference.

    The reference is the result with the thinnest slices, then the first by name.
    """
    sessions = defaultdict(list)
    for result in results:
        if result.image not in FILLED and result.name.suffix in ORDER:
            sessions[result.name.folder, result.image].append(result)
    for session in sessions.values():
        ranked = sorted(
            session, key=lambda r: (ORDER.index(r.name.suffix), r.thickness_mm, r.title)
        )
        reference = ranked[0]
        for other in ranked[1:]:
            if other.name.suffix != reference.name.suffix:
                yield Pair(reference, other)


def result_of(summary: ScanRecord) -> Result:
    """The result in a finished scan's summary."""
    image = TASKS[summary.task or "restore"]
    name = BIDSName.parse(summary.scan)
    own = BIDSName.parse(name.derivative(extension=".nii.gz", desc=None))
    return Result(own, image, summary.facts.conform.acquisition.thickness_mm or 0.0)


def through_t1w(
    names: Sequence[BIDSName], summaries: Iterable[ScanRecord], settings: Settings
) -> set[str]:
    """Stems of the scans that reach the templates through a T1w of their session.

    Parameters
    ----------
    names : sequence of BIDSName
        Names of the scans of this run.
    summaries : iterable of ScanRecord
        Summaries of earlier runs: a finished T1w counts if it has a transform to every template.
    """
    if not settings.template_spaces:
        return set()
    results = [Result(name, settings.image) for name in names]
    for summary in summaries:
        if summary.finished and summary.task == settings.task:
            result = result_of(summary)
            paths = {result.to_template(space) for space in settings.template_spaces}
            if result.name.suffix == "T1w" and paths <= set(summary.outputs):
                results.append(result)
    all_pairs = pairs(list({result.title: result for result in results}.values()))
    return {pair.other.name.stem for pair in all_pairs if pair.reference.name.suffix == "T1w"}


def record_path(output_dir: Path, pair: Pair) -> Path:
    """Path of the record of a contrast's alignment."""
    return contrast_path(output_dir, pair.other.title)


@dataclass(frozen=True)
class Alignment:
    """The inputs of a pair's alignment, and the names of its files.

    Parameters
    ----------
    pair : Pair
    output_dir : Path
    own : role -> path
        The existing files of the contrast in its own space.
    on_reference : role -> path
        Files to write on the reference's grid.
    on_templates : space -> role -> path
        Files to write on templates' grids, through the reference's transform.
    summary : ScanRecord
        Summary of the contrast.
    """

    pair: Pair
    output_dir: Path
    own: Mapping[str, str]
    on_reference: Mapping[str, str]
    on_templates: Mapping[str, Mapping[str, str]]
    summary: ScanRecord

    @classmethod
    def of(cls, pair: Pair, summary: ScanRecord, settings: Settings) -> Alignment:
        """The alignment, from the contrast's summary and the run's settings."""
        own = pair.other.files(
            summary.facts.restore.n_samples or 1, save_samples=True, uncertainty=True
        )
        own = {role: path for role, path in own.items() if path in summary.outputs}
        on_reference = pair.on_reference(own, settings.output_spaces)
        on_templates = {
            space: pair.on_template(own, space)
            for space in settings.template_spaces
            # a contrast that was registered itself already has its images
            if pair.other.to_template(space) not in summary.outputs
            and (settings.output_dir / pair.reference.to_template(space)).is_file()
        }
        return cls(pair, settings.output_dir, own, on_reference, on_templates, summary)

    @property
    def inputs(self) -> dict[str, str]:
        """Path -> SHA-256 of the images that are registered or resampled."""
        reference = self.pair.reference.files(1, save_samples=False)
        used = [reference[role] for role in ("restored", "mask", "structures")]
        moved = {role.removesuffix("_t1w") for role in self.on_reference}
        for space, roles in self.on_templates.items():
            moved |= {role.removesuffix(f"_{space.lower()}") for role in roles}
            used.append(self.pair.reference.to_template(space))
        moved |= {"restored", "mask", "structures"}
        used += [path for role, path in self.own.items() if role in moved]
        binary = [path for path in used if path.endswith((".nii.gz", ".h5"))]
        return {path: sha256_file(self.output_dir / path) for path in binary}

    def fingerprint(self, inputs: Mapping[str, str]) -> str:
        """SHA-256 over everything that determines the files."""
        written = [self.on_reference, *self.on_templates.values()]
        paths = sorted(path for roles in written for path in roles.values())
        parts = [code_version(), dict(inputs), paths]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def images(self, which: Result) -> RestoredContrast:
        """Image, mask and structures of the reference or of the contrast."""
        files = which.files(1, save_samples=False)
        roles = ("restored", "mask", "structures")
        return RestoredContrast(
            which.title, *(nib.load(self.output_dir / files[role]) for role in roles)
        )

    def stage(self, staging: Path, motion: ContrastMotion, activity: str) -> list[str]:
        """Write everything below ``staging``; returns the relative paths.

        The sidecars name the alignment by its identifier, ``activity``.
        """
        forward, back = self.pair.transforms
        (staging / forward).parent.mkdir(parents=True)
        matrix = motion.to_reference
        write_itk_affine(staging / forward, matrix)
        write_itk_affine(staging / back, np.linalg.inv(matrix))
        staged = [forward, back]
        for path, (source, target) in zip(
            (forward, back),
            ((self.pair.other, self.pair.reference), (self.pair.reference, self.pair.other)),
            strict=True,
        ):
            staged.append(self._describe(staging, path, source, target, motion, activity))
        reference = self.pair.reference
        if self.on_reference:
            grid = self.images(reference).grid
            staged += self._stage_images(
                staging,
                "T1w",
                self.on_reference,
                partial(move, target=grid, matrix=matrix),
                [forward],
                bids_uri(reference.files(1, save_samples=False)["restored"]),
                activity,
            )
        for space, roles in self.on_templates.items():
            template, warp = find_template(space), reference.to_template(space)
            chain = [self.output_dir / warp, staging / forward]
            staged += self._stage_images(
                staging,
                space,
                roles,
                partial(resample_through, template=template, transforms=chain),
                [warp, forward],
                template.address,
                activity,
            )
        return staged

    def _describe(
        self,
        staging: Path,
        path: str,
        source: Result,
        target: Result,
        motion: ContrastMotion,
        activity: str,
    ) -> str:
        """Write the JSON next to a transform; returns its path."""
        files = [result.files(1, save_samples=False)["restored"] for result in (source, target)]
        content = {
            "Description": f"rigid transform that resamples {source.title} on {target.title}; "
            f"{ITK_POINTS}",
            "Sources": [bids_uri(file) for file in files],
            "SharedShareOfSmallerBrain": round(motion.shared, 4),
            "ShareWithSameLabel": round(motion.alike, 4),
            **file_provenance(activity, sha256_file(staging / path)),
        }
        side = path.removesuffix(".txt") + ".json"
        (staging / side).write_text(to_json(content), encoding="utf-8")
        return side

    def _stage_images(
        self,
        staging: Path,
        space: str,
        paths: Mapping[str, str],
        resample: Callable[..., nib.Nifti1Image],
        transforms: Sequence[str],
        address: str,
        activity: str,
    ) -> list[str]:
        """Write the images, their JSON and the table in another space; returns their paths.

        Parameters
        ----------
        space : str
            As in ``space-``.
        paths : role in that space -> path
        resample : function
            An image and its kind -> the image in that space.
        transforms : sequence of str
            Paths of the transforms that ``resample`` applies, the first one last.
        address : str
            Address of the image that defines the space.
        activity : str
            Identifier of the alignment, for the sidecars.
        """
        kinds = {"mask": Kind.MASK, "structures": Kind.LABELS, "uncertainty": Kind.SPREAD}
        contents: dict[str, Mapping[str, Any]] = {}
        staged = []
        for role, path in self.own.items():
            there = paths.get(f"{role}_{space.lower()}")
            if there is None:
                continue
            if role == "structures_table":
                table = structures_table(self.summary.facts.parcellation, measures=False)
                (staging / there).write_text(table, encoding="utf-8")
            else:
                image = nib.load(self.output_dir / path)
                nib.save(resample(image, kind=kinds.get(role, Kind.IMAGE)), staging / there)
                side = path.removesuffix(".nii.gz") + ".json"
                contents[role] = read_json(self.output_dir / side)
            staged.append(there)
        sides = resampled(
            contents,
            {**self.own, **paths},
            space,
            transforms=transforms,
            reference=address,
        )
        for role, content in sides.items():
            image = paths[role]
            origin = file_provenance(activity, sha256_file(staging / image))
            side = image.removesuffix(".nii.gz") + ".json"
            (staging / side).write_text(to_json(content | origin), encoding="utf-8")
            staged.append(side)
        return staged


def remove_stale(output_dir: Path, previous: ContrastRecord | None, kept: Iterable[str]) -> None:
    """Remove files of an earlier alignment of the contrast that this one did not replace."""
    for path in set(previous.outputs if previous else ()) - set(kept):
        (output_dir / PurePosixPath(path)).unlink(missing_ok=True)
