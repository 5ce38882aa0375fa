# SPDX-License-Identifier: Apache-2.0
"""How a table of the documentation was produced, and whether it is from the shipped weights.

``brainprior evaluate --tables docs`` writes each table to ``docs/tables/STUDY.md``. The file's
first line is its stamp: an HTML comment with the attributes of ``Stamp`` as JSON. ``check_tables``
runs in the documentation build and in the tests. ``older.toml`` in the same folder lists the
tables that may still be from older weights: file name = first digits of these weights' SHA-256.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path, PurePath

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.weights import find_weights, sha256_file

BEGIN, END = "<!-- brainprior evaluate: ", " -->"
DIGITS = 12
KINDS = ("prior", "coarse", "parcellation")
"""Networks that a table may depend on."""
OLDER = "older.toml"
METRIC = re.compile(r"\b(PSNR|SSIM|MAE|RMSE|CRPS|Dice|LPIPS)\b")
"""In the heading of a table of results."""
MEASURED = Path("brainprior_bids", "data", "measured.json")
"""In a checkout: values that the reports quote, each part with its weights."""


@dataclass(frozen=True)
class Stamp:
    """How a table was produced.

    Attributes
    ----------
    weights : str
        The first ``DIGITS`` digits of the SHA-256 of the network's file; of several, "+" between.
    day : str
        UTC day of the newest result, YYYY-MM-DD.
    participants, maps : int
        Participants and label maps in the table.
    command : str
        The command as typed; data paths are reduced to their names.
    network : str
        The networks on which the results depend, of ``KINDS``, joined by "+" as their hashes.
    minutes : float, optional
        Processor time of the cases in the table; unknown in tables of earlier versions.
    processes : int, optional
        Cases at once.
    """

    weights: str
    day: str
    participants: int
    maps: int
    command: str
    network: str = "prior"
    minutes: float | None = None
    processes: int | None = None

    def line(self) -> str:
        """The first line of the table's file."""
        return BEGIN + json.dumps(asdict(self)) + END

    def caption(self) -> str:
        """The same facts, as a sentence above the table."""
        counts = ((self.participants, "participant"), (self.maps, "label map"))
        who = " and ".join(f"{n} {name}{'s' * (n > 1)}" for n, name in counts if n)
        of = "" if self.network == "prior" else f"of the {self.network.replace('+', ' and ')} "
        weights = f"Weights {of}"
        time = ""
        if self.minutes is not None and self.processes is not None:
            together = f"{self.processes} process{'es' * (self.processes > 1)}"
            time = f", {self.minutes:.0f} processor minutes in {together}"
        return f"{weights}{self.weights}, {self.day}, {who}{time}: `{self.command}`"


def read_stamp(text: str, name: str) -> Stamp:
    """The stamp of a table.

    Raises
    ------
    UsageError
        If the first line is not a stamp; ``name`` is the file's, for the message.
    """
    first = text.partition("\n")[0]
    try:
        if not (first.startswith(BEGIN) and first.endswith(END)):
            raise ValueError(first)
        return Stamp(**json.loads(first.removeprefix(BEGIN).removesuffix(END)))
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{name}: expected a first line that begins with '{BEGIN}'. Tables are written by "
            "`brainprior evaluate … --tables docs`, not by hand."
        ) from error


def shown_command(words: Sequence[str]) -> str:
    """``brainprior evaluate`` with these arguments, each path reduced to its last name.

    ``--tables-only`` is left out, so that the command makes the results too.
    """
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if (option if equals else before) == "--peer":
            name, _, command = value.partition("=")
            value = f"{name}={shown_template(command)}"
        else:
            value = _short(value)
        shown.append(f"{option}{equals}{value}")
    return shlex.join(
        ["brainprior", "evaluate", *(word for word in shown if word != "--tables-only")]
    )


def shown_template(command: str) -> str:
    """Another program's command template, each path reduced to its last name."""
    words = [_short(word) for word in shlex.split(command)]
    return " ".join(shlex.quote(word) if " " in word else word for word in words)


def _short(word: str) -> str:
    """A path, also one after ``--option=``, reduced to its last name."""
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{PurePath(value).name or value}" if "/" in value else word


def shipped_weights() -> dict[str, str]:
    """Network -> the first digits of the SHA-256 of its embedded weights."""
    return {kind: sha256_file(find_weights(None, kind=kind))[:DIGITS] for kind in KINDS}


def joined(parts: Iterable[str]) -> str:
    """Names or hashes of several networks as one."""
    return "+".join(parts)


def current_of(stamp: Stamp, shipped: Mapping[str, str]) -> str:
    """``weights`` of the stamp of a table if it were of the shipped weights."""
    return joined(shipped[kind] for kind in stamp.network.split("+"))


def check_tables(
    folder: Path, shipped: Mapping[str, str], measured: Path | None = None
) -> list[str]:
    """One sentence for each table that is not from the shipped weights and not listed as older.

    Parameters
    ----------
    folder : Path
        Folder of the tables.
    shipped : Mapping
        As returned by ``shipped_weights``.
    measured : Path, optional
        ``data/measured.json``. Each of its parts must be from the same weights as the table of
        its study; a part without a table is checked as if it had one.
    """
    listed = folder / OLDER
    older = tomllib.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else {}
    problems = []
    weights: dict[str, str] = {}
    expected: dict[str, str] = {}
    commands: dict[str, str] = {}
    for path in sorted(folder.glob("*.md")):
        try:
            stamp = read_stamp(path.read_text(encoding="utf-8"), path.name)
        except UsageError as error:
            problems.append(str(error))
            older.pop(path.name, None)
            continue
        weights[path.name], commands[path.name] = stamp.weights, stamp.command
        expected[path.name] = current_of(stamp, shipped)
    for name, sha256 in _measured_weights(measured).items():
        own = weights.setdefault(f"{name}.md", sha256)
        if own != sha256:
            problems.append(
                f"{name}.md: made with weights {own}, but {MEASURED.name} has {name} of {sha256}. "
                "`brainprior evaluate … --tables docs` in a checkout writes both."
            )
    for name, sha256 in weights.items():
        recorded, current = older.pop(name, None), expected.get(name, shipped["prior"])
        if recorded is None and sha256 != current:
            command = commands.get(
                name, f"brainprior evaluate … --study {name.removesuffix('.md')} --tables docs"
            )
            problems.append(
                f"{name}: made with weights {sha256}, but the shipped weights are "
                f"{current}. Regenerate it with `{command}`, or list it in {OLDER}."
            )
        elif recorded is not None and (recorded != sha256 or recorded == current):
            problems.append(
                f"{name}: made with weights {sha256}, but {OLDER} lists {recorded} "
                f"(the shipped weights are {current}). Correct or remove its line in {OLDER}."
            )
    problems += [f"{OLDER} lists {name}, but there is no such table." for name in older]
    return problems


def check_pages(docs: Path) -> list[str]:
    """One sentence for each table of metrics that was not written by ``brainprior evaluate``.

    Parameters
    ----------
    docs : Path
        Folder of the pages. Those of ``models`` (the log, and model cards with results of the
        training commands) and ``decisions`` may have tables of their own.
    """
    problems = []
    for path in sorted(docs.rglob("*.md")):
        name = path.relative_to(docs)
        if name.parts[0] in ("_build", "tables", "models", "decisions"):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, (line, below) in enumerate(pairwise(lines), 1):
            if below.lstrip().startswith("|--") and METRIC.search(line):
                problems.append(
                    f"{name}, line {number}: a table of results, {line.strip()} Include one of "
                    "`brainprior evaluate … --tables docs`, or move it to models/log.md."
                )
    return problems


def _measured_weights(measured: Path | None) -> dict[str, str]:
    """Study -> first digits of the weights of its part of ``measured.json``."""
    if measured is None:
        return {}
    parts = json.loads(measured.read_text(encoding="utf-8"))
    return {name: part["prior_sha256"][:DIGITS] for name, part in parts.items()}


def with_note(name: str, text: str, shipped: Mapping[str, str]) -> str:
    """A table, the file ``name``, as its page shows it: with a note above it if it is not from the
    shipped weights.
    """
    stamp = read_stamp(text, name)
    current = current_of(stamp, shipped)
    if stamp.weights == current:
        return text
    note = f"**Older weights** ({stamp.weights}; the shipped weights are {current})."
    return text.replace("\n", f"\n\n{note}\n", 1)
