# SPDX-License-Identifier: Apache-2.0
"""``brainprior train``: train the prior or the parcellation network."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

TRAINERS = ("prior", "parcellation")


def build_parser(networks: Sequence[str] = TRAINERS) -> argparse.ArgumentParser:
    """The parser of ``brainprior train``.

    Parameters
    ----------
    networks : sequence of str
        Those whose options it has; their trainers are imported, which takes seconds.
    """
    parser = argparse.ArgumentParser(prog="brainprior train", description="Train a network.")
    commands = parser.add_subparsers(dest="network", required=True, metavar="|".join(TRAINERS))
    for name in TRAINERS:
        command = commands.add_parser(name, help=f"train the {name} network")
        if name in networks:
            module = importlib.import_module(f"brainprior_bids.training.{name}")
            module.add_arguments(command)
            command.set_defaults(trainer=module.main)
    return parser


def train(argv: Sequence[str]) -> int:
    """Train the network that the arguments name; returns the exit status."""
    chosen = [word for word in argv if word in TRAINERS][:1]
    options = build_parser(chosen).parse_args(list(argv))
    return int(options.trainer(options))
