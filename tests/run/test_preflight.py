# SPDX-License-Identifier: Apache-2.0
"""What is looked at before the first step."""

from __future__ import annotations

from brainprior_bids.run.preflight import clean_work_dir


def test_a_work_folder_is_cleaned_of_our_own_only(tmp_path):
    for name in ("brainprior_wf/a", "home", "validate-x", "mine"):
        (tmp_path / name).mkdir(parents=True)
    clean_work_dir(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
