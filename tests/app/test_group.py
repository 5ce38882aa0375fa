# SPDX-License-Identifier: Apache-2.0
"""Quality metrics, the tables and the page of the group level."""

from __future__ import annotations

import csv
import json
import math
import re

import pytest
from lxml import html

from brainprior_bids.bids.qc import (
    METRICS,
    VERDICTS,
    metrics,
    reasons,
    rebuild_qc,
    reference,
    relative_scores,
    verdict,
    z_score,
)
from brainprior_bids.bids.status import write_summary
from brainprior_bids.cli.run import main
from brainprior_bids.records import ScanRecord, StructureRecord
from brainprior_bids.reports.group import WIDTH, build_group, robust_scores


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


def store(output_dir, value):
    write_summary(output_dir, ScanRecord.from_json(value))


def test_figures_come_from_the_summary():
    values = metrics(ScanRecord.from_json(summary(3)))
    assert set(values) == set(METRICS)
    assert values["residual"] == pytest.approx(1.0)
    assert values["noise_percent"] == pytest.approx(2.0)
    assert values["brain_ml"] == pytest.approx(1000)
    assert values["confidence"] == pytest.approx(0.4 * 0.8 + 0.6 * 0.6)
    assert values["asymmetry_percent"] == pytest.approx(40)
    assert values["in_plane_mm"] == 1.0
    assert values["peak_memory_gb"] == 2.5
    assert reasons(values) == ["structures 2 is below 12", "asymmetry_percent 40 is above 15"]
    assert verdict(values) == "fail"
    empty = metrics(ScanRecord.from_json({"scan": "x"}))
    assert all(v is None for name, v in empty.items() if name != "warnings")
    assert reasons(empty) == []


def brain(scale: float = 1.0, **factors: float):
    """Structures of the reference's median brain, resized."""
    return [
        {
            "name": name,
            "volume_mm3": math.exp(known["log_mean"]) * scale * factors.get(name, 1.0),
            "confidence": 0.8,
            "cut_share": 0.0,
        }
        for name, known in reference().items()
        if name != "Brain"
    ]


def judged(table, **parcellation):
    steps = {"parcellation": {"table": table, **parcellation}}
    values = metrics(ScanRecord.from_json({"scan": "x", "facts": steps}))
    return values, verdict(values)


def test_volumes_are_compared_with_those_of_54_people():
    sd = reference()["Brain"]["log_sd"]
    assert z_score("Brain", math.exp(reference()["Brain"]["log_mean"] + 2 * sd)) == pytest.approx(
        2
    )
    assert z_score("Brain", 0.0) is None
    values, messages = judged(brain())
    assert abs(values["brain_z"]) < 0.2  # medians add up to about the median of the sum
    assert messages == "pass"
    # a large head has large structures: only the whole brain is unusual
    values, messages = judged(brain(math.exp(5 * sd)))
    assert values["brain_z"] == pytest.approx(5, abs=0.2)
    assert abs(values["structure_z"]) < 0.3
    assert messages == "look"
    assert judged(brain(math.exp(-7 * sd)))[1] == "fail"
    known = reference()["Left-Putamen"]
    table = brain(**{"Left-Putamen": math.exp(-9 * known["log_sd"]), "CSF": 1.5})
    values, messages = judged(table)
    rows = [StructureRecord.from_json(row) for row in table]
    assert relative_scores(rows)["Left-Putamen"] == values["structure_z"]
    assert values["structure_z"] == pytest.approx(-9, abs=1)
    assert messages == "look"


def test_a_brain_that_is_cut_is_not_called_small():
    table = brain(0.5)
    for row in table:
        row["cut_share"] = 0.5
    values, messages = judged(table)
    area = sum(0.5 * row["volume_mm3"] ** (2 / 3) for row in table) / 100
    assert values["cut_cm2"] == pytest.approx(area)
    assert values["brain_z"] is None
    assert messages == "look"


def test_labels_from_elsewhere_have_no_confidence_and_a_mask_is_compared():
    values, messages = judged(brain(), structures_source="synthseg", mask_agreement=0.8)
    assert values["confidence"] is None
    assert messages == "look"
    assert judged(brain(), mask_agreement=0.4)[1] == "fail"


@pytest.mark.parametrize(
    ("affine", "fallbacks", "expected"),
    [
        ({"dof": 12, "method": "structures"}, 0, "pass"),
        ({"dof": 7, "method": "structures"}, 1, "look"),
        ({"dof": 12, "method": "template"}, 1, "look"),
        ({"dof": 6, "method": "structures"}, 2, "fail"),
    ],
)
def test_a_fallback_of_the_affine_never_passes(affine, fallbacks, expected):
    """Even if the distances are small: three structures fit anywhere."""
    steps = {"affine": {**affine, "median_residual_mm": 0.8}}
    values = metrics(ScanRecord.from_json({"scan": "x", "facts": steps}))
    assert values["affine_fallbacks"] == fallbacks
    assert verdict(values) == expected


@pytest.mark.parametrize(
    ("area", "text"),
    [
        (10.0, None),
        (10.0004, "cut_cm2 10.0004 is above 10"),
        (10.04, "cut_cm2 10.04 is above 10"),
        (10.26, "cut_cm2 10.3 is above 10"),
        (math.nextafter(10.0, 11.0), "cut_cm2 10.000000000000002 is above 10"),
    ],
)
def test_a_reason_shows_that_the_value_is_beyond_the_limit(area, text):
    assert reasons({"cut_cm2": area}) == ([] if text is None else [text])
    assert reasons({"brain_z": -4.0001}) == ["brain_z -4.0001 is below -4"]


def test_descriptions_of_metrics_hold_without_samples():
    for name in ("inconsistent_percent", "noise_percent"):
        assert "sampl" not in METRICS[name].description
    assert "or of the posterior mean if no samples were drawn" in METRICS["residual"].description


def test_the_quality_table_has_a_row_for_every_scan_that_is_done(tmp_path):
    done = summary(1)
    done["source"] = "sub-01/anat/sub-01_T1w.nii.gz"
    done["facts"]["parcellation"]["table"] = brain()
    done["facts"]["restore"] |= {"bias_range": 1.5, "share_beyond_3_sd": 0.2}
    store(tmp_path, done)
    store(tmp_path, summary(2, status="failed", source="x"))
    with rebuild_qc(tmp_path).open(newline="") as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    assert row["source"] == done["source"]
    assert row["verdict"] == "look"
    assert row["reasons"] == "inconsistent_percent 20 is above 10"
    assert float(row["bias_range"]) == 1.5
    assert float(row["Left-Putamen_mm3"]) == pytest.approx(
        math.exp(reference()["Left-Putamen"]["log_mean"]), rel=1e-4
    )


def test_one_scan_apart_is_found_and_too_few_are_not_judged():
    rows = [dict.fromkeys(METRICS) | {"residual": 1 + n / 100} for n in range(9)]
    rows.append(dict.fromkeys(METRICS) | {"residual": 5.0})
    scores = robust_scores(rows)
    # median 1.045, MAD 0.025 (distances 0.005 … 0.045, 3.955)
    assert scores[9]["residual"] == pytest.approx((5 - 1.045) / (1.4826 * 0.025))
    assert all(abs(score["residual"]) < 3.5 for score in scores[:9])
    assert robust_scores(rows[-7:]) == [{}] * 7


def test_a_table_a_contrast_and_one_page(tmp_path):
    for number in range(1, 13):
        store(tmp_path, summary(number))
    store(tmp_path, summary(1, "T2w"))
    store(tmp_path, summary(20, status="failed", message="sub-20_T1w: <no> brain"))
    odd = summary(13)
    odd["facts"]["affine"]["median_residual_mm"] = 9.5
    store(tmp_path, odd)
    written = [path.name for path in build_group(tmp_path)]
    assert written == [
        "group_T1w.tsv", "group_T1w.json", "group_T2w.tsv", "group_T2w.json", "group.html",
    ]  # fmt: skip
    with (tmp_path / "group_T1w.tsv").open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["bids_name"] for row in rows] == [f"sub-{n:02d}_T1w" for n in range(1, 14)]
    assert float(rows[0]["mni305_residual_mm"]) == pytest.approx(1.01)
    assert rows[12]["outlier"] == "mni305_residual_mm"
    assert "mni305_residual_mm 9.5 is above 9" in rows[12]["reasons"]
    assert {row["verdict"] for row in rows} == {"fail"}  # two structures are not a brain
    assert {row["outlier"] for row in rows[:12]} == {"n/a"}
    assert set(json.loads((tmp_path / "group_T1w.json").read_text())) == set(rows[0])
    text = (tmp_path / "group.html").read_text()
    page = html.fromstring(text)
    assert "http" not in text.replace("http://www.w3.org", "")
    assert len(page.xpath("//section[@id='T1w']//tbody/tr")) == 13
    assert page.xpath("//td[contains(@class, 'apart')]/text()") == ["9.5"]
    assert "<no>" not in text
    (failed,) = page.xpath("//section[@id='failed']//li")
    assert failed.text_content() == "sub-20_T1w: <no> brain"
    assert text.count("sub-20_T1w") == 1  # without the name at the beginning of its message


@pytest.mark.parametrize(("scans", "plots", "boxes"), [(1, 0, 0), (2, 2, 0), (3, 2, 0), (4, 2, 2)])
def test_the_page_describes_the_plots_that_it_has(tmp_path, scans, plots, boxes):
    """Of two or three scans the quartiles would be the extremes; one scan has no plot."""
    for number in range(1, scans + 1):
        store(tmp_path, summary(number))
    build_group(tmp_path)
    page = html.fromstring((tmp_path / "group.html").read_text())
    assert len(page.xpath("//svg[@data-metric]")) == plots
    assert len(page.xpath("//svg[@data-metric]/rect")) == boxes
    assert len(page.xpath("//svg[@data-metric]/line[@stroke='#444']")) == plots
    shown = " ".join(page.xpath("//main/p[not(@hidden)]")[-1].text_content().split())
    assert ("each dot is a scan" in shown) == bool(plots)
    assert ("the middle half" in shown) == bool(boxes)
    assert shown.endswith("Black line: the median; dashed: the limits.") == bool(plots)
    assert "lick" not in shown
    # what needs a script is shown by the script
    (scripted,) = page.xpath("//main/p[@hidden]")
    assert scripted.get("class") == "caption scripted"
    assert "Click a heading to sort." in scripted.text_content()
    assert ("click it" in scripted.text_content()) == bool(plots)


def test_rows_and_dots_lead_to_the_reports(tmp_path):
    for number in range(1, 13):
        store(tmp_path, summary(number))
    store(tmp_path, summary(20, status="failed", message="sub-20_T1w: no brain"))
    build_group(tmp_path)
    page = html.fromstring((tmp_path / "group.html").read_text())
    links = page.xpath("//tbody/tr/td[1]/a/@href")
    assert links == [f"sub-{n:02d}.html#sub-{n:02d}_T1w" for n in range(1, 13)]
    assert page.xpath("//section[@id='failed']//a/@href") == ["sub-20.html#Errors"]
    plots = page.xpath("//svg[@data-metric]")
    assert {plot.get("data-metric") for plot in plots} == {"mni305_residual_mm", "seconds"}
    for plot in plots:
        (path,) = plot.xpath("./path")  # all scans have one verdict
        assert path.get("data-rows") == " ".join(map(str, range(12)))
        places = [float(x) for x in re.findall(r"M([\d.]+) [\d.]+h0", path.get("d"))]
        assert places == sorted(places)  # both metrics grow with the number
        assert places[0] == 10
        assert places[-1] == WIDTH - 10


def test_the_reasons_are_next_to_the_verdict_and_the_page_can_be_filtered(tmp_path):
    for number in range(1, 10):
        good = summary(number)
        good["facts"]["parcellation"]["table"] = brain()
        if number == 4:
            good["facts"]["restore"]["residual_ratios"] = [2.0]
        store(tmp_path, good)
    build_group(tmp_path)
    text = (tmp_path / "group.html").read_text()
    page = html.fromstring(text)
    heads = [head.text_content() for head in page.xpath("//thead//th")]
    assert heads == ["scan", "verdict", "reasons", "residual", "mni305_residual_mm", "seconds"]
    captions = [" ".join(p.text_content().split()) for p in page.xpath("//section/p")]
    assert captions[0].startswith("The same in all scans: noise_percent 2, brain_ml ")
    assert captions[1].startswith("Not measured in any scan: inconsistent_percent, affine_fallba")
    shown = {name for name in METRICS if any(name in text for text in [*heads, *captions])}
    assert shown == set(METRICS)
    row = page.xpath("//tbody/tr")[3]
    assert [cell.text_content() for cell in row[:3]] == [
        "sub-04_T1w", "look", "residual 2 is above 1.5",
    ]  # fmt: skip
    # one class per verdict, which the filter's style sheet hides in table and plots
    assert [r.get("class") for r in page.xpath("//tbody/tr")].count("look") == 1
    (plot,) = page.xpath("//svg[@data-metric='residual']")
    assert {p.get("class"): p.get("data-rows") for p in plot.xpath("./path")} == {
        "dots pass": "0 1 2 4 5 6 7 8",
        "dots look": "3",
    }
    labels = [label.text_content().strip() for label in page.xpath("//fieldset/label")]
    assert labels == ["pass (8)", "look (1)", "fail (0)"]
    assert page.xpath("//fieldset/@hidden")  # shown by the script that makes it work
    assert ".filter[hidden] { display: none; }" in text  # its own display would override "hidden"
    for name in VERDICTS:
        assert f'[data-hide~="{name}"] .{name}' in text


def test_the_page_of_many_scans_has_few_elements(tmp_path):
    """A browser opens 1,000 scans in about a second if only the table's cells are elements."""
    for number in range(1, 61):
        store(tmp_path, summary(number))
    build_group(tmp_path)
    page = html.fromstring((tmp_path / "group.html").read_text())
    cells = 60 * (2 + 3)  # mni305_residual_mm and seconds differ; two structures are the reasons
    assert len(page.xpath("//*")) < cells + 2 * 60 + 250


def test_the_group_level_of_nothing_says_what_to_do(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "dataset_description.json").write_text('{"Name": "a", "BIDSVersion": "1.10.0"}')
    assert main([str(raw), str(tmp_path / "out"), "group", "--device", "cpu"]) == 2
    assert "Run the participant level first" in capsys.readouterr().err
    store(tmp_path / "out", summary(1))
    assert main([str(raw), str(tmp_path / "out"), "group", "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "group.html").exists()


def test_what_another_task_made_is_no_outlier_of_the_restored(tmp_path):
    for number in range(3):
        store(tmp_path, summary(number))
    store(tmp_path, {**summary(1), "scan": "sub-01_desc-inpainted_T1w"})
    build_group(tmp_path)
    assert len((tmp_path / "group_T1w.tsv").read_text().splitlines()) == 1 + 3
    own = (tmp_path / "group_desc-inpainted_T1w.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in own] == ["bids_name", "sub-01_desc-inpainted_T1w"]
    assert "sub-01_desc-inpainted_T1w" in (tmp_path / "group.html").read_text()


def test_the_reference_is_made_of_volumes():
    from brainprior_bids.training.volumes import reference as made

    tables = [
        [{"name": "a", "volume_mm3": 100.0}, {"name": "b", "volume_mm3": 300.0}],
        [{"name": "a", "volume_mm3": 400.0}, {"name": "b", "volume_mm3": 300.0}],
    ]
    result = made(tables)
    assert result["a"] == {
        "n": 2,
        "log_mean": pytest.approx(math.log(200), abs=1e-4),
        "log_sd": pytest.approx(math.log(2) * 2**0.5, abs=1e-4),
    }
    assert result["Brain"]["log_mean"] == pytest.approx(math.log(400 * 700) / 2, abs=1e-4)
