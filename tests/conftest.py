# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from brainprior_bids.evaluation.demo import Demo

# Before torch is imported. Idle threads sleep, as in the command: on busy cores they would spin in
# the way of other work (tests/engine/test_voxels.py, two threads: 253 s; 17 s if they sleep).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # make test runs several processes
os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Captured text that is not UTF-8 (names with half a surrogate pair) would end the process
    that sends it to another one, ``pytest -n``."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans next to the checkout; the test is skipped if it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no real scans beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def demo_head() -> Demo:
    """The demo participant, created once (15 s); it must not be modified."""
    from brainprior_bids.evaluation import demo

    output = demo.make_demo()
    for array in (output.scan, output.truth, output.brain):
        array.setflags(write=False)
    return output


@pytest.fixture(scope="session")
def demo_slab(demo_head: Demo) -> Demo:
    """A slab of 30 mm through its middle, scan and truth, to save time."""
    from brainprior_bids.evaluation.demo import Demo

    start, stop = (20, 14, 15), (172, 210, 21)
    first, last = (20, 14, 75), (172, 210, 105)  # slices of 5 mm
    scan, fine = (
        tuple(slice(a, b) for a, b in zip(*ends, strict=True))
        for ends in ((start, stop), (first, last))
    )
    return Demo(
        demo_head.scan[scan], demo_head.scan_grid.crop(start, stop), demo_head.truth[fine],
        demo_head.brain[fine], demo_head.grid.crop(first, last),
    )  # fmt: skip


@pytest.fixture(scope="session")
def write_demo(demo_head: Demo) -> Callable[[Path], Path]:
    """``demo.write_demo`` with that participant."""
    from brainprior_bids.evaluation import demo

    def write(out: Path) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo, "make_demo", lambda: demo_head)
            return demo.write_demo(out)

    return write


@pytest.fixture
def told(caplog, monkeypatch):
    """The program's log. Its logger does not propagate records, so caplog would be empty."""
    monkeypatch.setattr(logging.getLogger("brainprior"), "propagate", True)
    caplog.set_level(logging.INFO, logger="brainprior")
    return caplog
