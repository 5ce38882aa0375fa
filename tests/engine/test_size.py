# SPDX-License-Identifier: Apache-2.0
"""The engine stays readable: functions fit on a screen and take few arguments."""

from __future__ import annotations

import ast
from pathlib import Path

import brainprior_bids.engine as engine

LONGEST, MOST_PARAMETERS = 80, 12
ENTRY, ENTRY_LONGEST = "restore", 170
"""The public entry documents every argument."""


def functions():
    for path in Path(engine.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield path.name, node


def test_no_function_is_longer_than_a_screen():
    long = {
        f"{file}: {node.name}": node.end_lineno - node.lineno + 1
        for file, node in functions()
        if node.end_lineno - node.lineno + 1 > (ENTRY_LONGEST if node.name == ENTRY else LONGEST)
    }
    assert long == {}


def test_no_function_but_the_entry_takes_more_than_a_dozen_arguments():
    many = {
        f"{file}: {node.name}": len(node.args.args) + len(node.args.kwonlyargs)
        for file, node in functions()
        if node.name != ENTRY and len(node.args.args) + len(node.args.kwonlyargs) > MOST_PARAMETERS
    }
    assert many == {}
