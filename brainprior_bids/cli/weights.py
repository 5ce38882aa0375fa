# SPDX-License-Identifier: Apache-2.0
"""``brainprior weights list|verify|add``: list, check and add weights files.

Nothing is downloaded. A user's own files are copied into one folder, each next to a file with its
SHA-256, and are found by their name.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brainprior_bids.engine.errors import UsageError, WeightsError

KINDS = ("prior", "coarse", "parcellation")


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``brainprior weights``."""
    parser = argparse.ArgumentParser(
        prog="brainprior weights",
        description="Weights of the networks: the embedded ones, and files of your own in "
        "$BRAINPRIOR_WEIGHTS (default: ~/.local/share/brainprior/weights).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|verify|add")
    commands.add_parser("list", help="list every file: name, kind, licence, SHA-256, path")
    check = commands.add_parser("verify", help="compare files with their recorded hashes")
    check.add_argument("names", nargs="*", metavar="NAME", help="names or files (default: all)")
    add = commands.add_parser("add", help="copy a file of your own into that folder")
    add.add_argument("file", type=Path, help="weights file written by `brainprior train`")
    add.add_argument("--name", help="name for --prior NAME (default: the file's name)")
    add.add_argument("--sha256", help="expected SHA-256 of the file")
    add.add_argument("--force", action="store_true", help="replace an added file of that name")
    return parser


def weights(argv: Sequence[str]) -> int:
    """Run the command; returns 1 if `verify` finds a changed file."""
    options = build_parser().parse_args(list(argv))
    if options.command == "add":
        return _add(options)
    files = _files(options.names if options.command == "verify" else ())
    return _list(files) if options.command == "list" else _verify(files)


def _files(names: Sequence[str]) -> dict[str, Path]:
    """Name -> file: those named, else all."""
    from brainprior_bids.engine.weights import FOLDER, SUFFIX, find_weights, user_folder

    if names:
        files = {}
        for name in names:
            if name == "embedded" or name in [f"embedded {kind}" for kind in KINDS]:
                files |= {f"embedded {kind}": FOLDER / f"{kind}{SUFFIX}" for kind in KINDS}
            else:
                files[name] = find_weights(name, kind="prior")
        return files
    own = {path.stem: path for path in sorted(user_folder().glob(f"*{SUFFIX}"))}
    return {f"embedded {kind}": FOLDER / f"{kind}{SUFFIX}" for kind in KINDS} | own


def read_any(path: Path) -> dict[str, Any]:
    """The header of a weights file of any kind; its tensors are checked against their hash.

    Raises
    ------
    WeightsError
        As ``engine.weights.read_weights``; with the message for a prior if it is of no kind.
    """
    from brainprior_bids.engine.weights import read_weights

    errors = []
    for kind in KINDS:
        try:
            return read_weights(path, kind=kind)[1]
        except WeightsError as error:
            errors.append(error)
    raise errors[0]


def _list(files: dict[str, Path]) -> int:
    print("name\tkind\ttrained as\tlicence\tsha256\tfile")
    for name, path in files.items():
        try:
            facts = read_any(path)
        except WeightsError as error:
            print(f"{name}\tunusable\tn/a\tn/a\tn/a\t{path}\t{error}")
            continue
        row = (name, facts["kind"], facts["name"], facts["licence"], facts["sha256"], path)
        print("\t".join(str(cell) for cell in row))
    return 0


def _verify(files: dict[str, Path]) -> int:
    from brainprior_bids.engine.weights import sha256_file

    bad = 0
    for name, path in files.items():
        note = _note(path)
        try:
            sha256 = read_any(path)["sha256"]
            what = "tensors as written"
            if note.is_file():
                recorded = note.read_text(encoding="utf-8").split()[0]
                if recorded != sha256:
                    raise WeightsError(
                        f"SHA-256 is {sha256}, was {recorded} when it was added. Add it again."
                    )
                what += ", file as added"
            print(f"ok\t{name}\t{what}\t{sha256}")
        except WeightsError as error:
            bad += 1
            hash_now = sha256_file(path) if path.is_file() else "no file"
            print(f"BAD\t{name}\t{error}\t{hash_now}")
    print(f"{len(files)} file(s) checked, {bad} not usable.")
    return 1 if bad else 0


def _note(path: Path) -> Path:
    """Where the SHA-256 of an added file is recorded, in the format of ``sha256sum``."""
    return path.with_name(f"{path.name}.sha256")


def _add(options: argparse.Namespace) -> int:
    from brainprior_bids.engine import weights
    from brainprior_bids.engine.weights import SUFFIX, user_folder

    source = Path(os.path.expanduser(options.file))
    facts = read_any(source)
    getattr(weights, f"load_{facts['kind']}")(source)  # they fit together
    if options.sha256 and options.sha256.lower() != facts["sha256"]:
        raise WeightsError(
            f"{source}: SHA-256 is {facts['sha256']}, expected {options.sha256}. Fetch it again."
        )
    name = options.name or source.name.removesuffix(SUFFIX)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == "embedded":
        raise UsageError(
            f"weights add: a name has letters, digits, '.', '_' and '-', and is not 'embedded'; "
            f"got {name!r}. Pass --name."
        )
    folder = user_folder()
    target = folder / f"{name}{SUFFIX}"
    if target.exists() and not options.force:
        raise UsageError(f"weights add: {target} exists. Pass --force or another --name.")
    folder.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    os.close(handle)
    try:
        shutil.copyfile(source, partial)
        os.chmod(partial, 0o644)
        _note(target).unlink(missing_ok=True)
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    _note(target).write_text(f"{facts['sha256']}  {target.name}\n", encoding="utf-8")
    print(
        f"{facts['kind']} {name}: {target}\nsha256 {facts['sha256']}, licence {facts['licence']}"
    )
    if facts["kind"] == "prior":
        print(f"Use it with: brainprior bids_dir output_dir participant --prior {name}")
    return 0
