# SPDX-License-Identifier: Apache-2.0
"""The parts of a study of ``brainprior evaluate``: cases, the work on one case, and the table."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from brainprior_bids.engine.denoiser import Prior
from brainprior_bids.engine.parcellation_network import ParcellationNetwork
from brainprior_bids.engine.weights import load_parcellation, load_prior
from brainprior_bids.evaluation.protocol import Participant
from brainprior_bids.evaluation.summary import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Source:
    """Where a participant comes from.

    Attributes
    ----------
    path : str
        The 1 mm scan, or the label map if ``synthetic``.
    name, contrast : str
    synthetic : bool
        The brain is synthesised from the label map.
    choosing : bool
        Whether it belongs to the validation set, which has no row in a table.
    """

    path: str
    name: str
    contrast: str
    synthetic: bool
    choosing: bool

    @property
    def stem(self) -> str:
        """Stem of the names of its files."""
        return f"{self.name}_{self.contrast}"


class Settings(Protocol):
    """What distinguishes the cases of a study: a frozen dataclass of JSON values."""

    @property
    def name(self) -> str:
        """Different for each case of a participant; part of the record's file name."""
        ...


@dataclass(frozen=True)
class Bench:
    """Inputs of the work on a case, besides participant and settings.

    Attributes
    ----------
    prior : Path
        Weights.
    device : str
        ``cpu`` or ``cuda[:N]``.
    folder : Path
        Folder of this case alone. It is kept until the record is complete, so that commands that
        finished in it are not repeated.
    source : Path
        The participant's scan or label map.
    penalties : Mapping
        Penalties of the classical methods, from ``protocol.choose``.
    own_labels : bool
        Whether the participant's structures are the true ones, from a label map.
    picture : Path, optional
        PNG to draw.
    limit_s : float
        Time limit of another program's command (``--peer-timeout``), in seconds.
    """

    prior: Path
    device: str
    folder: Path
    source: Path = Path()
    penalties: Mapping[str, float] = field(default_factory=dict)
    own_labels: bool = False
    picture: Path | None = None
    limit_s: float = 7200.0

    def load_prior(self) -> Prior:
        """The prior, loaded once per process."""
        key = (self.prior, self.device)
        if key not in _PRIORS:
            _PRIORS[key] = load_prior(self.prior, device=self.device)
        return _PRIORS[key]

    def begin(self) -> None:
        """Forget what was asked of the coarse network for other cases."""
        for prior in _PRIORS.values():
            prior.asked_coarse = False

    def asked_coarse(self) -> bool:
        """Whether the coarse network took part since ``begin``, here or in a command that wrote to
        ``folder``.
        """
        written = self.folder.rglob("*.json")
        return any(prior.asked_coarse for prior in _PRIORS.values()) or any(
            b'"CoarsePrior"' in path.read_bytes() for path in written
        )


_PRIORS: dict[tuple[Path, str], Prior] = {}
"""The priors that this process has loaded, by path and device."""


@cache
def parcellation() -> ParcellationNetwork:
    """The embedded network, loaded once per process."""
    return load_parcellation()


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes
    ----------
    name : str
        Name of the table's file, and value of ``--study``.
    cases : function
        Options (see ``options``) and sources -> (source, settings) of each case.
    measure : function
        Participant, settings and ``Bench`` of a case -> what is added to its record. A record
        with the key ``failure``, a message, is in the table, but counts as failed.
    table : function
        Records of the test set and of the validation set -> lines of Markdown.
    defaults, quick : Mapping
        Values of options that are not set (None) on the command line, and those for ``--quick``.
    tuned : bool
        Whether the cases need the penalties of the classical methods; their settings are then
        ``protocol.Condition``.
    measured : function, optional
        Same arguments as ``table`` -> the study's part of ``data/measured.json``.
    plot : function, optional
        Records of the test set -> figure of the documentation.
    needs : (str, str), optional
        Module that must be importable, and the name of its package. Without it, the study is
        skipped.
    only_with : str, optional
        Option without which a run of all studies skips this one.
    lacking : function, optional
        Options -> a sentence for each part of the study that cannot be done on this machine.
    weights : tuple of {"prior", "parcellation"}
        The networks on which all results depend; their hashes are in the records and above the
        table. (Those of the prior depend on the embedded parcellation too.) The coarse network is
        named by each result in which it took part.
    """

    name: str
    cases: Callable[[Namespace, Sequence[Source]], Iterator[tuple[Source, Any]]]
    measure: Callable[[Participant, Any, Bench], Record]
    table: Callable[[Sequence[Record], Sequence[Record]], list[str]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool = False
    measured: Callable[[Sequence[Record], Sequence[Record]], dict[str, Any]] | None = None
    plot: Callable[[Sequence[Record]], Figure] | None = None
    needs: tuple[str, str] | None = None
    only_with: str | None = None
    lacking: Callable[[Namespace], Sequence[str]] | None = None
    weights: tuple[str, ...] = ("prior",)

    @property
    def missing_package(self) -> str | None:
        """The package that is needed and not installed."""
        if self.needs is None or find_spec(self.needs[0]) is not None:
            return None
        return self.needs[1]

    def options(self, args: Namespace) -> Namespace:
        """The command line's options, with the study's own values for those that are not set."""
        filled = vars(args).copy()
        for values in (self.quick if args.quick else {}, self.defaults):
            for key, value in values.items():
                if filled.get(key) is None:
                    filled[key] = value
        return Namespace(**filled)


def of_test_set(sources: Sequence[Source], contrast: str | None = None) -> list[Source]:
    """The scans of the test set, label maps excluded; with ``contrast``, only these."""
    return [
        source
        for source in sources
        if not (source.choosing or source.synthetic) and contrast in (None, source.contrast)
    ]


def number_of(name: str) -> int:
    """A participant's number, for seeds; a label that is not a number is read as bytes."""
    return int(name) if name.isdecimal() else int.from_bytes(name.encode(), "big")


def processor_seconds() -> float:
    """Processor time of this process and of the commands that it has run, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
