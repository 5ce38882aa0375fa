# SPDX-License-Identifier: Apache-2.0
"""The first line of a table of the documentation, and the check of it."""

import json
from dataclasses import replace

import pytest

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.evaluation.stamp import (
    DIGITS,
    OLDER,
    Stamp,
    check_pages,
    check_tables,
    read_stamp,
    shown_command,
    with_note,
)

NEW, OLD = "4f968e2e8d81", "259c1d845118"
SHIPPED = {"prior": NEW, "parcellation": "b76cdbcfb6cd"}
COMMAND = "brainprior evaluate BRAINS OUT --tables docs"


def put(folder, name, weights, older=None):
    stamp = Stamp(weights, "2026-01-02", 6, 3, COMMAND)
    (folder / name).write_text(f"{stamp.line()}\n\n{stamp.caption()}\n")
    lines = (f'"{key}" = "{value}"\n' for key, value in (older or {}).items())
    (folder / "older.toml").write_text("".join(lines))
    return stamp


def test_a_stamp_is_read_as_it_was_written(tmp_path):
    stamp = put(tmp_path, "a.md", NEW)
    text = (tmp_path / "a.md").read_text()
    assert read_stamp(text, "a.md") == stamp
    assert stamp.caption() == (
        f"Weights {NEW}, 2026-01-02, 6 participants and 3 label maps: `{COMMAND}`"
    )
    with pytest.raises(UsageError, match=r"a\.md: expected a first line"):
        read_stamp("| PSNR |\n", "a.md")
    with pytest.raises(UsageError, match=r"a\.md: expected a first line"):
        read_stamp(stamp.line().replace('"day"', '"week"'), "a.md")


def test_the_time_of_the_cases_is_in_the_stamp(tmp_path):
    stamp = Stamp(NEW, "2026-01-02", 1, 0, COMMAND, minutes=73.6, processes=2)
    assert read_stamp(f"{stamp.line()}\n", "a.md") == stamp
    assert f", 1 participant, 74 processor minutes in 2 processes: `{COMMAND}`" in stamp.caption()
    older = "".join((stamp.line().partition(', "network"')[0], "} -->"))  # written before
    assert read_stamp(older, "a.md") == Stamp(NEW, "2026-01-02", 1, 0, COMMAND)


@pytest.mark.parametrize(("weights", "count"), [(SHIPPED["parcellation"], 0), (NEW, 1)])
def test_a_table_without_the_prior_is_of_the_shipped_parcellation(tmp_path, weights, count):
    stamp = Stamp(weights, "2026-01-02", 6, 0, COMMAND, "parcellation")
    (tmp_path / "a.md").write_text(f"{stamp.line()}\n")
    problems = check_tables(tmp_path, SHIPPED)
    assert len(problems) == count
    assert all(f"the shipped weights are {SHIPPED['parcellation']}" in text for text in problems)
    assert stamp.caption().startswith(f"Weights of the parcellation {weights}, ")


def test_a_command_has_names_in_place_of_paths():
    words = [
        "/data/my brains/",
        "../out",
        "--prior=/home/me/new.safetensors",
        "--labels",
        "/l/maps",
    ]
    words += ["--spacing", "5", "--tables-only", "--tables", "/src/docs"]
    assert shown_command(words) == (
        "brainprior evaluate 'my brains' out --prior=new.safetensors --labels maps --spacing 5 "
        "--tables docs"
    )


@pytest.mark.parametrize(
    ("weights", "older", "expected"),
    [
        (NEW, {}, ""),
        (OLD, {"a.md": OLD}, ""),
        (OLD, {}, f"a.md: made with weights {OLD}, but the shipped weights are {NEW}. "
         f"Regenerate it with `{COMMAND}`, or list it in older.toml."),
        (OLD, {"a.md": "0" * 12}, f"but older.toml lists {'0' * 12}"),
        (NEW, {"a.md": OLD}, "Correct or remove its line"),
        (NEW, {"a.md": NEW}, "Correct or remove its line"),
        (NEW, {"b.md": OLD}, "older.toml lists b.md, but there is no such table."),
    ],
)  # fmt: skip
def test_a_table_is_of_the_shipped_weights_or_listed(tmp_path, weights, older, expected):
    put(tmp_path, "a.md", weights, older)
    problems = check_tables(tmp_path, SHIPPED)
    assert len(problems) == bool(expected)
    assert expected in "".join(problems)


@pytest.mark.parametrize(
    ("table", "measured", "older", "expected"),
    [
        (NEW, NEW, {}, ""),
        (OLD, OLD, {"coverage.md": OLD}, ""),
        (None, NEW, {}, ""),
        (None, OLD, {"coverage.md": OLD}, ""),
        (None, OLD, {}, "`brainprior evaluate … --study coverage --tables docs`, or list it"),
        (NEW, OLD, {}, f"coverage.md: made with weights {NEW}, but measured.json has coverage of"),
        (None, NEW, {"coverage.md": OLD}, "Correct or remove its line"),
    ],
)
def test_the_figures_of_the_reports_are_of_the_same_weights(
    tmp_path, table, measured, older, expected
):
    put(tmp_path, "coverage.md", table or NEW, older)
    if table is None:
        (tmp_path / "coverage.md").unlink()
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"coverage": {"prior_sha256": measured + "0" * 52}}))
    problems = check_tables(tmp_path, SHIPPED, path)
    assert len(problems) == bool(expected)
    assert expected in "".join(problems)


def test_a_table_written_by_hand_is_refused(tmp_path):
    (tmp_path / "a.md").write_text("| PSNR |\n")
    (problem,) = check_tables(tmp_path, SHIPPED)
    assert problem.startswith("a.md: expected a first line")


def test_a_table_of_metrics_on_a_page_is_refused(tmp_path):
    """The log and the decisions may have one, and a page may name metrics in other tables."""
    table = "| scan | PSNR, dB |\n|---|---|\n| T1w | 24.0 |\n"
    for name in ("tasks", "tables", "models", "decisions"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.md").write_text(f"# A\n\n{table}")
    (tmp_path / "b.md").write_text("| option | meaning |\n|---|---|\n| `--x` | the PSNR |\n")
    (problem,) = check_pages(tmp_path)
    assert problem.startswith("tasks/a.md, line 3: a table of results, | scan | PSNR, dB |")


def test_the_page_says_that_a_table_is_of_older_weights(tmp_path):
    stamp = put(tmp_path, "a.md", OLD)
    text = (tmp_path / "a.md").read_text()
    assert with_note("fuse.md", text, {**SHIPPED, "prior": OLD}) == text
    lines = with_note("fuse.md", text, SHIPPED).splitlines()
    assert lines[0] == stamp.line()
    assert lines[2] == f"**Older weights** ({OLD}; the shipped weights are {NEW})."
    assert lines[4] == stamp.caption()


def test_a_table_of_two_networks_needs_both(tmp_path):
    """Weights of the second network alone make it older, and its page says so."""
    shipped = {**SHIPPED, "coarse": "c" * DIGITS}
    old, both = (f"{SHIPPED['prior']}+{digit * DIGITS}" for digit in "bc")
    command = "brainprior evaluate brains out"
    stamp = Stamp(old, "2026-11-30", 2, 0, command, network="prior+coarse")
    text = f"{stamp.line()}\n\n| a | b |\n"
    (tmp_path / "inpaint.md").write_text(text, encoding="utf-8")
    (problem,) = check_tables(tmp_path, shipped)
    assert both in problem
    assert f"the shipped weights are {both}" in with_note("inpaint.md", text, shipped)
    (tmp_path / OLDER).write_text(f'"inpaint.md" = "{old}"\n', encoding="utf-8")
    assert check_tables(tmp_path, shipped) == []
    new = replace(stamp, weights=both)
    (tmp_path / "inpaint.md").write_text(new.line() + "\n", encoding="utf-8")
    (tmp_path / OLDER).unlink()
    assert check_tables(tmp_path, shipped) == []
    assert "of the prior and coarse" in new.caption()
