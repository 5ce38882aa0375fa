# SPDX-License-Identifier: Apache-2.0
"""The error messages of the command, read from its source.

Every error that ``run`` and ``cli`` raise with a text of their own has advice in it: what was
expected, or what to do. Errors that only pass on another error's text are not checked here.
"""

from __future__ import annotations

import ast
import errno
import re
from pathlib import Path

import pytest

from brainprior_bids.bids.names import BIDSName
from brainprior_bids.bids.query import Scan
from brainprior_bids.engine.errors import InputError, is_out_of_memory
from brainprior_bids.records import FailureRecord
from brainprior_bids.run import failures, outcome
from brainprior_bids.run.failures import Failure
from brainprior_bids.settings import Settings

PACKAGE = Path(failures.__file__).parents[1]
RAISED = {
    "ArgumentTypeError", "BrainpriorError", "ErrorRecord", "InputError", "UsageError",
    "WeightsError",
}  # fmt: skip
ADVICE = re.compile(
    r"\b(add|allow|ask|check|choose|correct|expected|give|ignore|install|leave|make|name|pass|"
    r"please report|reinstall|remove|repair|rerun|run|shorten|split|submit|use|write an)\b",
    re.IGNORECASE,
)


def words(call):
    """The literal text of a call's arguments; None if there is too little of it."""
    parts = [
        node.value
        for argument in [*call.args, *(k.value for k in call.keywords if k.arg != "type")]
        for node in ast.walk(argument)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    text = " ".join(parts)
    return text if len(re.findall(r"[a-z]{2,}", text)) > 3 else None


def errors():
    for folder in ("run", "cli"):
        for path in sorted((PACKAGE / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in RAISED and (text := words(node)) is not None:
                    yield f"{path.name}:{node.lineno}", text


COMPOSED = {"resources.py": "not enough memory"}
"""File -> beginning of a message whose advice is put together before (see ``test_resources``)."""


def test_every_error_of_the_command_has_advice():
    result = dict(errors())
    assert len(result) > 60
    without = {where: text for where, text in result.items() if not ADVICE.search(text)}
    others = {
        where: text
        for where, text in without.items()
        if not text.startswith(COMPOSED.get(where.partition(":")[0], "\0"))
    }
    assert others == {}


@pytest.fixture
def why(tmp_path):
    """The message of a scan whose step failed with an error."""
    settings = Settings(tmp_path / "raw", tmp_path / "out", tmp_path / "work")
    relative = "sub-01/anat/sub-01_T1w.nii.gz"
    scan = Scan(tmp_path / relative, Path(relative), BIDSName.parse("sub-01_T1w"), {})
    folder = tmp_path / "sub_01_T1w_wf"

    def message(record, crashed=None):
        name = f"brainprior_wf.{folder.name}.conform"
        known = {} if record is None else {name: Failure(record, tmp_path / "out" / "crash.txt")}
        return outcome.why_not_ended(scan, folder, settings, crashed, known)

    return message


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError(), OSError(5, "Input/output error"), MemoryError()]
)
def test_an_error_of_another_library_is_more_than_its_name(why, error):
    result = why(FailureRecord.of(error))
    assert result.node == "conform"
    assert result.crash_file == "crash.txt"
    assert not re.match(r"\w+(Error|Exception)\b", result.message)
    assert ADVICE.search(result.message)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 400 MiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("could not create a primitive"),  # oneDNN, in a small address space
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
    ],
)
def test_memory_that_ran_out_is_called_so_whoever_needed_it(why, error):
    message = why(FailureRecord.of(error)).message
    assert message.startswith("memory ran out. Allow more")
    assert str(error) in message
    assert not is_out_of_memory(RuntimeError("size mismatch"))


def test_an_error_that_explains_itself_stays_as_it_is(why):
    text = "sub-01_T1w: all voxels are 0. Check the conversion."
    assert why(FailureRecord.of(InputError(text))).message == text


def test_what_stopped_the_graph_is_the_reason_where_no_step_failed(why):
    assert "rerun the same command" in why(None, KeyboardInterrupt()).message
    assert "no space left on the disk" in why(None, OSError(28, "No space left")).message
    assert "Rerun the same command" in why(None, RuntimeError("squeue has not answered")).message
