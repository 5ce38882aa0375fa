# SPDX-License-Identifier: Apache-2.0
"""Settings and their TOML."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainprior_bids.settings import Settings

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


@given(
    labels=st.lists(text, max_size=3),
    seed=st.integers(0, 2**63 - 1),
    thickness=st.one_of(st.none(), st.floats(0.1, 20)),
    command=st.lists(text, max_size=4),
    sloppy=st.booleans(),
)
def test_toml_brings_back_the_same_settings(labels, seed, thickness, command, sloppy):
    settings = Settings(
        Path("/in put/ä"),
        Path("/out"),
        Path('/w"o\\rk'),
        participant_label=tuple(labels),
        bids_filters={"T1w": {"session": None, "acquisition": ["a", "b"]}},
        random_seed=seed,
        slice_thickness_mm=thickness,
        sloppy=sloppy,
        command=tuple(command),
    )
    assert Settings.from_toml(settings.to_toml()) == settings


def test_a_setting_that_does_not_exist_is_named():
    good = Settings(Path("/a"), Path("/b"), Path("/c")).to_toml()
    with pytest.raises(ValueError, match="n_sample"):
        Settings.from_toml(good + "n_sample = 3\n")
    with pytest.raises(ValueError, match=r"\[brainprior\]"):
        Settings.from_toml("n_samples = 3\n")


def test_what_decides_a_result_leaves_out_how_it_was_computed():
    settings = Settings(Path("/a"), Path("/b"), Path("/c"))
    decides = settings.scan_settings()
    assert {"device", "nprocs", "omp_nthreads", "work_dir"}.isdisjoint(decides)
    assert {"random_seed", "n_samples", "sampler", "task"} <= set(decides)
