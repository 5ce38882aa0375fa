# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several tests share."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans beside the checkout; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no real scans beside this checkout")
    return SHARED


@pytest.fixture
def told(caplog, monkeypatch):
    """What the program logs. Its logger does not hand lines on, so caplog would hear nothing."""
    monkeypatch.setattr(logging.getLogger("brainprior"), "propagate", True)
    caplog.set_level(logging.INFO, logger="brainprior")
    return caplog
