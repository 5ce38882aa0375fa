# SPDX-License-Identifier: Apache-2.0
"""Quality figures, the tables and the page of the group level."""

from __future__ import annotations

import csv
import json

import pytest
from lxml import html

from brainprior_bids.bids.qc import METRICS, concerns, metrics
from brainprior_bids.bids.status import write_summary
from brainprior_bids.cli.run import main
from brainprior_bids.reports.group import build_group, robust_scores


def summary(number: int, suffix: str = "T1w", **values):
    name = f"sub-{number:02d}_{suffix}"
    return {
        "scan": name,
        "subject": f"{number:02d}",
        "status": "done",
        "message": "",
        "seconds": 100.0 + number,
        "warnings": [],
        "nodes": [{"peak_memory_gb": 1.0}, {"peak_memory_gb": 2.5}],
        "facts": {
            "conform": {
                "acquisition": {"thickness_mm": 5.0},
                "facts": {"acquisition": {"in_plane_mm": [0.9, 1.0]}},
            },
            "affine": {"median_residual_mm": 1.0 + number / 100},
            "parcellation": {
                "table": [
                    {"name": "Left-A", "index": 1, "volume_mm3": 4e5, "confidence": 0.8},
                    {"name": "Right-A", "index": 2, "volume_mm3": 6e5, "confidence": 0.6},
                ]
            },
            "restore": {"residual_ratios": [0.9, 1.1], "noise_sd": 0.02},
        },
        **values,
    }


def test_figures_come_from_the_summary():
    values = metrics(summary(3))
    assert set(values) == set(METRICS)
    assert values["misfit"] == pytest.approx(1.0)
    assert values["noise_percent"] == pytest.approx(2.0)
    assert values["brain_ml"] == pytest.approx(1000)
    assert values["confidence"] == pytest.approx(0.4 * 0.8 + 0.6 * 0.6)
    assert values["asymmetry_percent"] == pytest.approx(40)
    assert values["in_plane_mm"] == 1.0
    assert values["peak_memory_gb"] == 2.5
    assert concerns(values) == ["structures 2 is below 20", "asymmetry_percent 40 is above 15"]
    empty = metrics({"scan": "x"})
    assert all(v is None for name, v in empty.items() if name != "warnings")
    assert concerns(empty) == []


def test_one_scan_apart_is_found_and_too_few_are_not_judged():
    rows = [dict.fromkeys(METRICS) | {"misfit": 1 + n / 100} for n in range(9)]
    rows.append(dict.fromkeys(METRICS) | {"misfit": 5.0})
    scores = robust_scores(rows)
    # median 1.045, MAD 0.025 (distances 0.005 … 0.045, 3.955)
    assert scores[9]["misfit"] == pytest.approx((5 - 1.045) / (1.4826 * 0.025))
    assert all(abs(score["misfit"]) < 3.5 for score in scores[:9])
    assert robust_scores(rows[-7:]) == [{}] * 7


def test_a_table_a_contrast_and_one_page(tmp_path):
    for number in range(1, 13):
        write_summary(tmp_path, summary(number))
    write_summary(tmp_path, summary(1, "T2w"))
    write_summary(tmp_path, summary(20, status="failed", message="<no> brain"))
    odd = summary(13)
    odd["facts"]["affine"]["median_residual_mm"] = 9.0
    write_summary(tmp_path, odd)
    written = [path.name for path in build_group(tmp_path)]
    assert written == [
        "group_T1w.tsv", "group_T1w.json", "group_T2w.tsv", "group_T2w.json", "group.html",
    ]  # fmt: skip
    with (tmp_path / "group_T1w.tsv").open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["bids_name"] for row in rows] == [f"sub-{n:02d}_T1w" for n in range(1, 14)]
    assert float(rows[0]["mni305_residual_mm"]) == pytest.approx(1.01)
    assert rows[12]["outlier"] == "mni305_residual_mm"
    assert "mni305_residual_mm 9 is above 6" in rows[12]["concerns"]
    assert {row["outlier"] for row in rows[:12]} == {"n/a"}
    assert set(json.loads((tmp_path / "group_T1w.json").read_text())) == set(rows[0])
    text = (tmp_path / "group.html").read_text()
    page = html.fromstring(text)
    assert "http" not in text.replace("http://www.w3.org", "")
    assert len(page.xpath("//section[@id='T1w']//tbody/tr")) == 13
    assert page.xpath("//td[contains(@class, 'apart')]/text()") == ["9"]
    assert "<no>" not in text
    assert "sub-20_T1w: &lt;no&gt; brain" in text


def test_the_group_level_of_nothing_says_what_to_do(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "dataset_description.json").write_text('{"Name": "a", "BIDSVersion": "1.10.0"}')
    assert main([str(raw), str(tmp_path / "out"), "group", "--device", "cpu"]) == 2
    assert "Run the participant level first" in capsys.readouterr().err
    write_summary(tmp_path / "out", summary(1))
    assert main([str(raw), str(tmp_path / "out"), "group", "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "group.html").exists()


def test_what_another_task_made_is_no_outlier_of_the_restored(tmp_path):
    for number in range(3):
        write_summary(tmp_path, summary(number))
    write_summary(tmp_path, {**summary(1), "scan": "sub-01_desc-inpainted_T1w"})
    build_group(tmp_path)
    assert len((tmp_path / "group_T1w.tsv").read_text().splitlines()) == 1 + 3
    own = (tmp_path / "group_desc-inpainted_T1w.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in own] == ["bids_name", "sub-01_desc-inpainted_T1w"]
    assert "sub-01_desc-inpainted_T1w" in (tmp_path / "group.html").read_text()
