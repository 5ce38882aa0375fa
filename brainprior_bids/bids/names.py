# SPDX-License-Identifier: Apache-2.0
"""BIDS names: the parts of a scan's name, and the names of its derivatives.

A derivative keeps every entity of its source, in the source's spelling (``run-01`` remains
``run-01``), so two different scans never share a name. Only ``space``, ``res``, ``desc`` and the
like are inserted, in the order of the specification.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from brainprior_bids.bids.files import readable
from brainprior_bids.engine.errors import InputError
from brainprior_bids.settings import FILLED, TASKS, is_template

ENTITY_ORDER = (
    "sub", "tpl", "ses", "cohort", "sample", "task", "tracksys", "acq", "nuc", "voi", "ce",
    "trc", "stain", "rec", "dir", "run", "mod", "echo", "flip", "inv", "mt", "part", "proc",
    "hemi", "space", "split", "recording", "chunk", "atlas", "seg", "scale", "res", "den",
    "label", "from", "to", "mode", "desc",
)  # fmt: skip
"""Entities in the order of BIDS 1.11; ``from``, ``to`` and ``mode`` as fMRIPrep places them."""

_PAIR = re.compile(r"(?P<key>[a-zA-Z]+)-(?P<value>[a-zA-Z0-9+]+)")
MAX_BYTES = 255
"""Longest file name in nearly every file system."""
SAFE_LABEL = 60
"""Maximum length of an unusable participant's label in the name of its report."""


@dataclass(frozen=True)
class BIDSName:
    """A BIDS file name: entities, suffix and extension.

    Parameters
    ----------
    entities : tuple of (key, value)
        As written in the name, ``("sub", "01")`` first.
    suffix : str
        ``T1w``, ``mask`` …
    extension : str
        With the leading dot; may be empty.
    """

    entities: tuple[tuple[str, str], ...]
    suffix: str
    extension: str = ""

    @classmethod
    def parse(cls, path: str | PurePosixPath) -> BIDSName:
        """Parse a file name or path.

        Raises
        ------
        InputError
            If the name is not ``key-value_…_suffix.ext``, does not begin with ``sub-``, or has
            an entity twice.
        """
        name = readable(PurePosixPath(path).name)
        stem, dot, extension = name.partition(".")
        *pairs, suffix = stem.split("_")
        entities = []
        for pair in pairs:
            match = _PAIR.fullmatch(pair)
            if match is None:
                raise InputError(
                    f"{name}: '{pair}' is not a BIDS key-value pair such as 'acq-highres'. "
                    "Rename the file (letters, digits and + only in a value)."
                )
            entities.append((match["key"], match["value"]))
        if not entities or entities[0][0] != "sub":
            raise InputError(f"{name}: a BIDS name begins with 'sub-<label>_'. Rename the file.")
        keys = [key for key, _ in entities]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise InputError(
                f"{name}: a BIDS name has every entity once, this one has {twice[0]}- "
                f"{keys.count(twice[0])} times. Rename the file."
            )
        return cls(tuple(entities), suffix, dot + extension)

    @classmethod
    def stand_in(cls, relative: PurePosixPath, suffix: str) -> BIDSName:
        """A name under which a file is reported if its own name or folder cannot be used.

        It has the participant (and session) of the file's folder, is unique, and is short.
        """
        digest = hashlib.sha256(str(relative).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        entities = []
        for key, part in zip(("sub", "ses"), relative.parts, strict=False):
            if not part.startswith(f"{key}-"):
                break
            label = part.removeprefix(f"{key}-")
            safe = re.sub(r"[^a-zA-Z0-9+]", "", label)[:SAFE_LABEL]
            entities.append((key, label if label and safe == label else f"{safe}x{digest}"))
        entities = entities or [("sub", f"x{digest}")]
        return cls((*entities, ("acq", f"refused{digest}")), suffix, ".nii.gz")

    def get(self, key: str) -> str | None:
        """The value of an entity, or None."""
        return dict(self.entities).get(key)

    @property
    def stem(self) -> str:
        """The name without its extension."""
        return "_".join([*(f"{key}-{value}" for key, value in self.entities), self.suffix])

    @property
    def folder(self) -> PurePosixPath:
        """``sub-XX`` or ``sub-XX/ses-YY``."""
        folder = PurePosixPath(f"sub-{self.get('sub')}")
        session = self.get("ses")
        return folder / f"ses-{session}" if session else folder

    def derivative(
        self, suffix: str | None = None, extension: str = ".nii.gz", **entities: str | None
    ) -> str:
        """The name of a derivative of this scan.

        Parameters
        ----------
        suffix : str, optional
            By default the scan's own.
        entities : str or None
            Added or replaced; None removes one. ``from_`` is the entity ``from``.

        Raises
        ------
        ValueError
            For an entity that BIDS does not define.
        """
        pairs = dict(self.entities)
        for key, value in entities.items():
            key = key.rstrip("_")
            if key not in ENTITY_ORDER:
                raise ValueError(f"BIDSName: unknown entity {key!r}.")
            if value is None:
                pairs.pop(key, None)
            else:
                pairs[key] = value
        order = sorted(pairs, key=lambda key: _rank(key, list(pairs)))
        name = BIDSName(tuple((key, pairs[key]) for key in order), suffix or self.suffix)
        return name.stem + extension

    @property
    def node_name(self) -> str:
        """A name that Nipype accepts (letters, digits, underscore), unique to this scan."""
        name = re.sub(r"[^a-zA-Z0-9]", "_", self.stem)
        if "+" in self.stem:  # replaced above: distinguish a+b from similar names
            name += "_" + hashlib.sha256(self.stem.encode()).hexdigest()[:6]
        return name


def _rank(key: str, given: list[str]) -> tuple[int, int]:
    """Position of an entity; entities unknown to BIDS are last, in the order of the source."""
    place = ENTITY_ORDER.index(key) if key in ENTITY_ORDER else ENTITY_ORDER.index("space") - 1
    return place, given.index(key)


def same_value(one: str | None, other: str) -> bool:
    """Whether two values of an entity are equal; ``run-1`` equals ``run-01``."""
    return one is not None and bare_number(one) == bare_number(other)


def bare_number(value: str) -> str:
    """``01`` -> ``1``; other text is unchanged."""
    return value.lstrip("0") or "0" if re.fullmatch("[0-9]+", value) else value


def sample_role(index: int) -> str:
    """``sample01`` for the first sample."""
    return f"sample{index + 1:02d}"


def residual_role(run: str) -> str:
    """Role of the residual of a fused run other than the reference; ``run`` is its name's stem."""
    return f"residual of {run}"


def output_names(
    source: BIDSName,
    *,
    n_samples: int,
    spaces: Collection[str] = ("anat", "MNI305"),
    save_samples: bool = False,
    image: str = "restored",
    native: bool = False,
    runs: Sequence[BIDSName] = (),
    lesion: bool = True,
    uncertainty: bool | None = None,
) -> dict[str, str]:
    """The files of one restored scan in ``sub-XX/[ses-YY/]anat``: role -> file name.

    ``runs`` are those that were fused with the reference, whose residual is ``residual``.
    ``lesion`` is False if only other runs have a lesion mask, not the reference. ``uncertainty``
    states whether there is a map; None: there is one if there are two samples or more.

    Masks and label images of a T1w carry no ``space-``; those of another contrast carry
    ``space-<suffix>``, because without it they would be read as the T1w's. Maps that are no images
    of a contrast have a suffix of their own (docs/decisions/names-of-maps.md).
    """
    space = None if source.suffix == "T1w" else source.suffix
    # another tool's image alone has its own mask, structures and transform
    own = image if image == "refined" else "restored"
    to = {"desc": image} if image == "refined" else {}
    names = {
        "restored": source.derivative(desc=image),
        "residual": source.derivative("residual", mod=source.suffix, desc=image),
        "mask": source.derivative("mask", space=space, desc=named(own, "brain")),
        "structures": source.derivative("dseg", space=space, desc=named(own, "structures")),
        "structures_table": source.derivative(
            "dseg", ".tsv", space=space, desc=named(own, "structures")
        ),
        "to_mni305": source.derivative(
            "xfm", ".txt", from_=source.suffix, to="MNI305", mode="image", **to
        ),
        "from_mni305": source.derivative(
            "xfm", ".txt", from_="MNI305", to=source.suffix, mode="image", **to
        ),
    }
    if n_samples > 1 if uncertainty is None else uncertainty:
        names["uncertainty"] = source.derivative("uncertainty", mod=source.suffix, desc=image)
    if native:
        names["restored_native"] = source.derivative(res="native", desc=image)
    if save_samples:
        for index in range(n_samples):
            role = sample_role(index)
            names[role] = source.derivative(desc=f"{image}{role.capitalize()}")
    for run in runs:
        names[residual_role(run.stem)] = run.derivative("residual", mod=run.suffix, desc="fused")
    if lesion and "inpainted" in image.lower():
        names["hidden"] = source.derivative("mask", space=space, label="lesion", desc=image)
    own_space = dict(names)
    if "MNI305" in spaces:
        names |= names_in_space(source, own_space, "MNI305", image=image)
    for template in filter(is_template, spaces):
        names |= names_in_space(source, own_space, template, image=image)
        there, back = transform_roles(template)
        xfm = {"suffix": "xfm", "extension": ".h5", "mode": "image", **to}
        names[there] = source.derivative(from_=source.suffix, to=template, **xfm)
        names[back] = source.derivative(from_=template, to=source.suffix, **xfm)
    return names


def transform_roles(space: str) -> tuple[str, str]:
    """Roles of the transform to a space and of the one back."""
    return f"to_{space.lower()}", f"from_{space.lower()}"


def in_common_space(role: str) -> bool:
    """Whether a role is an image that was resampled to another space than the scan's."""
    return (
        re.fullmatch(r"(mask|structures|restored|uncertainty|sample\d+)_(?!native|table).+", role)
        is not None
    )


def names_in_space(
    source: BIDSName, names: Mapping[str, str], space: str, *, image: str
) -> dict[str, str]:
    """The files of ``output_names`` that are resampled to a space: role -> file name.

    The role is that of the file, with ``_`` and the space in lower case. On a template's grid
    the names have ``res-1``, as TemplateFlow calls its 1 mm. An inpainted scan keeps its own grid,
    skull and bias: only its mask and structures are resampled. Masks and labels of other contrasts
    than T1w have the contrast in their ``desc-``; otherwise they would have the names of the T1w's
    in a common space.
    """
    brain = ("mask", "structures", "structures_table")
    images = () if image in FILLED else ("restored", "uncertainty")
    grid = {"res": "1"} if is_template(space) else {}
    moved = {}
    for role, file in names.items():
        name = BIDSName.parse(file)
        if role in brain:
            desc = f"{name.get('desc')}{'' if source.suffix == 'T1w' else source.suffix}"
        elif role in images or (role.startswith("sample") and image not in FILLED):
            desc = str(name.get("desc"))
        else:
            continue
        moved[f"{role}_{space.lower()}"] = name.derivative(
            extension=name.extension, space=space, desc=desc, **grid
        )
    return moved


def named(image: str, what: str) -> str:
    """The ``desc-`` of a file that belongs to an image: without prefix for the restored one."""
    return what if image == "restored" else image + what[:1].upper() + what[1:]


def split_desc(desc: str) -> tuple[str, str]:
    """The reverse of ``named``: (image, what)."""
    images = {*TASKS.values()} - {"restored"}
    for image in sorted(images, key=len, reverse=True):  # "inpaintedRefined" before "inpainted"
        if desc.startswith(image) and desc not in images:
            what = desc[len(image) :]
            return image, what[:1].lower() + what[1:]
    return "restored", desc


def result_name(source: BIDSName, image: str) -> str:
    """Name of a scan's result in ``logs/scans`` and the report: one for each image."""
    return source.stem if image == "restored" else source.derivative(extension="", desc=image)


def scan_seed(random_seed: int, source: BIDSName) -> int:
    """The scan's own seed, in [0, 2**63): SHA-256 of the run's seed and the scan's name.

    It depends on nothing else (not on the order, nor on the other scans of the run).
    """
    digest = hashlib.sha256(f"{random_seed}:{source.stem}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
