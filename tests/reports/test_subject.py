# SPDX-License-Identifier: Apache-2.0
"""The report of a subject: links resolve, nothing is loaded from the network, errors are shown."""

from __future__ import annotations

import csv
import errno
import json
import re
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from lxml import etree, html

from brainprior_bids.bids.files import write_json
from brainprior_bids.bids.qc import rebuild_qc, reference
from brainprior_bids.bids.status import write_summary
from brainprior_bids.records import RestoreRecord, RunRecord, ScanRecord, WeightsRecord
from brainprior_bids.reports import volumes
from brainprior_bids.reports.assembler import SubjectReport
from brainprior_bids.reports.measured import coverage, lesions
from brainprior_bids.reports.rating import ARTEFACTS, RATINGS
from brainprior_bids.reports.sheet import XML, Panel, Picture, Sheet
from brainprior_bids.reports.subject import build_subject_report, restore_rows
from brainprior_bids.settings import Settings

SVG = f'{XML}<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 1"/>'
PICTURES = (
    *("flicker", "slices", "uncertainty", "mask", "structures", "bias", "gains", "histogram"),
    "tissues",
)


def summary(scan, **values):
    """A summary as the last node of a scan writes it."""
    return {
        "scan": scan,
        "subject": scan.split("_")[0].removeprefix("sub-"),
        "source": f"{scan.split('_')[0]}/anat/{scan}.nii.gz",
        "status": "done",
        "seconds": 130.0,
        "message": "",
        "version": "9.8.7",
        "run_uuid": "20260102-030405_ab-cd",
        "seed": 2**62 + 11,
        "warnings": [],
        "outputs": [],
        "nodes": [
            {"node": "Conform", "seconds": 1.5, "peak_memory_gb": 0.4, "threads": 1},
            {"node": "Restore", "seconds": 128.5, "peak_memory_gb": 2.75, "threads": 2},
        ],
        "facts": {
            "conform": {
                "acquisition": {
                    "slice_axis": 2,
                    "thickness_mm": 5.0,
                    "spacing_mm": 6.0,
                    "profile": "gaussian",
                },
                "facts": {
                    "original": {"axis_codes": "LPS"},
                    "grid": {
                        "shape": [128, 120, 30],
                        "spacing_mm": [1.5, 1.5, 6.0],
                        "rotation_from_axes_deg": 12.34,
                    },
                    "acquisition": {
                        "thickness_source": "SliceThickness",
                        "gap_mm": 1.0,
                        "metadata": {"MagneticFieldStrength": 3},
                    },
                },
            },
            "parcellation": {
                "table": [
                    {
                        "index": 10,
                        "name": "Left-Thalamus",
                        "volume_mm3": 7650.0,
                        "confidence": 0.91,
                        "centroid_mm": [-10.0, -18.0, 8.0],
                    }
                ],
                "weights": {"name": "little-net", "sha256": "ab" * 32},
            },
            "affine": {
                "residuals_mm": {"Left-Thalamus": 1.26},
                "dof": 12,
                "used": ["Left-Thalamus"],
                "median_residual_mm": 2.5,
            },
            "restore": {
                "sampler": "exact",
                "contrast": "T2w",
                "n_samples": 4,
                "calls": 20,
                "schedule": [10.0, 1.0, 0.0],
                "noise_sd_initial": 0.02,
                "noise_sd": 0.021,
                "residual_ratios": [1.0, 1.04],
                "unit": 500.0,
                "seconds": 128.0,
                "environment": {"device": "cpu", "processor": "x86_64", "threads": 2},
                "prior": {"name": "little-prior", "sha256": "cd" * 32},
            },
        },
        "error": None,
        **values,
    }


def store(output_dir, value):
    write_summary(output_dir, ScanRecord.from_json(value))


def pictures(output_dir, scan, whats=PICTURES):
    """Picture files of a scan."""
    prefix, _, suffix = scan.rpartition("_")
    folder = output_dir / scan.split("_")[0] / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for what in whats:
        (folder / f"{prefix}_desc-{what}_{suffix}.svg").write_text(SVG)
    (folder / f"{prefix}_space-MNI305_desc-mni305_{suffix}.svg").write_text(SVG)


def read(path):
    """The page as a tree."""
    return html.fromstring(path.read_text(encoding="utf-8"))


def provenance(path):
    """Label -> value of the rows of one scan's provenance."""
    rows = read(path).xpath("//section[@id='Provenance']//table[@class='facts']//tr")
    return {row.find("th").text_content(): row.find("td").text_content() for row in rows}


def linked(page):
    """(element, address) of everything that the page loads or points to."""
    return [(e, a) for e, _, a, _ in page.iterlinks()]


@pytest.fixture
def output_dir(tmp_path):
    """Two scans done, one failed, and another subject's scan."""
    for scan in ("sub-01_ses-a_T1w", "sub-01_ses-a_acq-x_T1w"):
        store(tmp_path, summary(scan))
        pictures(tmp_path, scan)
    store(
        tmp_path,
        summary(
            "sub-01_ses-a_FLAIR",
            status="failed",
            facts={},
            nodes=[],
            warnings=["sub-01_ses-a_FLAIR: sform and qform differ by up to 7.00 mm."],
            error={
                "node": "Conform",
                "type": "InputError",
                "message": "sub-01_ses-a_FLAIR: expected <one> volume & got 4.",
                "crash_file": "sub-01/log/crash-1.txt",
            },
        ),
    )
    store(tmp_path, summary("sub-011_T1w"))
    pictures(tmp_path, "sub-011_T1w")
    return tmp_path


def test_every_link_resolves_and_nothing_comes_from_the_network(output_dir):
    path = build_subject_report(output_dir, "sub-01")
    assert path == output_dir / "sub-01.html"
    page = read(path)
    identifiers = {element.get("id") for element in page.iter() if element.get("id")}
    shown = set()
    for element, address in linked(page):
        if element.tag == "a" and address.startswith("http"):
            continue  # a reference: opened only when it is clicked
        assert not re.match(r"(?:[a-z]+:)?//", address), address
        if address.startswith("#"):
            assert unquote(address[1:]) in identifiers
            continue
        file = output_dir / unquote(address.partition("#")[0])
        assert file.is_file(), address
        if element.tag in ("img", "object"):
            shown.add(file.name)
    assert shown == {p.name for p in (output_dir / "sub-01" / "figures").iterdir()}
    assert not page.xpath("//script[@src]")
    assert "@import" not in path.read_text()
    assert "url(" not in path.read_text()


def test_the_pages_of_the_viewer_are_linked_from_their_scan(tmp_path):
    for scan, whats in (
        ("sub-01_acq-x_T1w", ("viewer", "viewerUncertainty")),
        ("sub-01_T1w", ("viewer",)),
        ("sub-01_T2w", ()),
    ):
        store(tmp_path, summary(scan))
        pictures(tmp_path, scan)
        for what in whats:
            name = scan.replace("_T1w", f"_desc-{what}_T1w.html")
            (tmp_path / "sub-01" / "figures" / name).write_text("<p>planes</p>")
    page = read(build_subject_report(tmp_path, "01"))
    links = page.xpath("//p[@class='viewers']/a")
    assert [link.get("href") for link in links] == [
        "sub-01/figures/sub-01_desc-viewer_T1w.html",
        "sub-01/figures/sub-01_acq-x_desc-viewer_T1w.html",
        "sub-01/figures/sub-01_acq-x_desc-viewerUncertainty_T1w.html",
    ]
    assert "planes" not in page.text_content().replace("linked planes", "")


def test_the_flicker_is_an_object_because_an_image_does_not_see_the_pointer(output_dir):
    page = read(build_subject_report(output_dir, "01"))
    assert len(page.xpath("//object")) == 2
    assert all("desc-flicker" in element.get("data") for element in page.xpath("//object"))


def test_every_picture_has_a_text_for_those_who_do_not_see_it(output_dir):
    page = read(build_subject_report(output_dir, "01"))
    alts = [element.get("alt") for element in page.xpath("//img")]
    assert all(alts)
    assert len(set(alts)) == len(alts)
    (own,) = (alt for alt in alts if "Histograms of the values inside" in alt and "acq-x" in alt)
    assert own == (
        "sub-01_ses-a_acq-x_T1w: Histograms of the values inside the brain mask, input and "
        "restored image."
    )
    labels = [element.get("aria-label") for element in page.xpath("//object")]
    assert all("Input and restored image" in label for label in labels)


def test_a_picture_describes_itself_and_the_flicker_has_states(tmp_path):
    """The numbers in the picture are in its alternative text; links keep one state."""
    store(tmp_path, summary("sub-01_T1w"))
    folder = tmp_path / "sub-01" / "figures"
    folder.mkdir(parents=True)
    picture = volumes.Section(np.zeros((4, 4), np.float32), 2, 0.0, (1.0, 1.0))
    for what, before in (("uncertainty", False), ("flicker", True)):
        sheet = Sheet()
        sheet.title("A & B", note="median 3 < 4", before="Input" if before else "")
        sheet.row([Panel([Picture(picture, (0, 1), before=before)])])
        sheet.save(folder / f"sub-01_desc-{what}_T1w.svg")
    page = read(build_subject_report(tmp_path, "01"))
    (image,) = page.xpath("//img")
    assert image.get("alt").endswith("three in per cent. A & B (median 3 < 4).")
    (flicker,) = page.xpath("//object")
    assert flicker.get("aria-label").endswith("A & B (median 3 < 4).")
    links = page.xpath("//p[@class='states']/a")
    assert [link.get("target") for link in links] == [flicker.get("name")] * 3
    assert [link.get("href") for link in links] == [
        f"{flicker.get('data')}#{state}" for state in ("input", "result", "alternate")
    ]
    root = etree.parse(tmp_path / flicker.get("data")).getroot()
    assert root.get("tabindex") == "0"
    assert {"input", "result"} <= {element.get("id") for element in root.iter()}
    still = etree.parse(tmp_path / image.get("src")).getroot()
    assert still.get("tabindex") is None


def test_headings_are_in_order_and_every_picture_can_be_reached(output_dir):
    page = read(build_subject_report(output_dir, "01"))
    levels = [int(heading.tag[1]) for heading in page.xpath("//h1 | //h2 | //h3 | //h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for scan in ("sub-01_ses-a_T1w", "sub-01_ses-a_acq-x_T1w"):
        links = page.xpath(f"//section[@id='{scan}']/nav/a/@href")
        headed = page.xpath(f"//section[@id='{scan}']/div[h3[not(ancestor::table)]]/@id")
        assert links == [f"#{name}" for name in headed]
        assert len(links) == len(PICTURES) + 2  # MNI305, the rating


def test_the_methods_can_be_copied_with_their_references(output_dir):
    page = read(build_subject_report(output_dir, "01"))
    (button,) = page.xpath("//section[@id='Methods']//button")
    assert button.get("hidden") is not None  # until the script shows it
    (source,) = page.xpath(f"//*[@id='{button.get('data-copy')}']")
    cited = {int(number) for number in re.findall(r"\[(\d+)\]", source.text_content())}
    assert cited == set(range(1, len(source.xpath("./ol/li")) + 1))
    assert "IEEE Transactions on Medical Imaging 29(6), 1310–1320, 2010. doi:10.1109" in " ".join(
        source.text_content().split()
    )
    assert "and others" not in source.text_content()


def test_a_scan_can_be_rated(output_dir):
    """A form per finished scan, shown by a script; every control has a label, nothing is sent."""
    page = read(build_subject_report(output_dir, "01"))
    forms = {form.get("data-scan"): form for form in page.xpath("//form")}
    assert list(forms) == ["sub-01_ses-a_T1w", "sub-01_ses-a_acq-x_T1w"]
    for scan, form in forms.items():
        assert form.getparent().get("id") == f"{scan}-rating"
        assert form.get("hidden") is not None
        assert form.get("action") is None
        assert form.get("data-version") == "9.8.7"
        controls = form.xpath(".//input | .//textarea")
        assert all(control.getparent().text_content().strip() for control in controls)
        assert {control.getparent().tag for control in controls} == {"label"}
        (ratings, artefacts) = form.xpath(".//fieldset[legend]")
        assert ratings.xpath(".//input/@value") == ["excellent", "acceptable", "poor", "exclude"]
        assert set(ratings.xpath(".//input/@type")) == {"radio"}
        assert artefacts.xpath(".//input/@value") == list(ARTEFACTS)
        assert form.xpath(".//button/@type") == ["submit", "reset"]
        assert "needs JavaScript" in form.getparent().xpath("string(noscript)")


def test_what_a_rating_can_say_is_documented():
    text = " ".join((Path(__file__).parents[2] / "docs" / "outputs.md").read_text().split())
    for words in (RATINGS, ARTEFACTS):
        assert ", ".join(f"`{word}`" for word in words) in text


def test_signal_and_contrast_are_shown_before_and_after(tmp_path):
    value = summary("sub-01_T1w")
    value["facts"]["tissues"] = {
        "input": {"snr_gm": 4.0, "cjv": 0.6},
        "restored": {"snr_gm": 6.25},
    }
    store(tmp_path, value)
    store(tmp_path, summary("sub-02_T1w"))
    (section,) = read(build_subject_report(tmp_path, "01")).xpath("//section[@id='sub-01_T1w']")
    rows = [
        [cell.text_content() for cell in row]
        for row in section.xpath(".//details[contains(., 'MRIQC')]//tbody/tr")
    ]
    assert ["snr_gm", "4", "6.25"] in rows
    assert ["cjv", "0.6", "–"] in rows
    assert "MRIQC" not in build_subject_report(tmp_path, "02").read_text()
    with rebuild_qc(tmp_path).open(newline="") as stream:
        row, other = csv.DictReader(stream, delimiter="\t")
    assert (row["snr_gm_input"], row["snr_gm_restored"]) == ("4", "6.25")
    assert (row["cjv_restored"], other["snr_gm_input"]) == ("n/a", "n/a")


def test_the_norms_of_the_volumes_are_named(output_dir):
    page = read(build_subject_report(output_dir, "01"))
    (details,) = page.xpath("//section[@id='sub-01_ses-a_T1w']//details[contains(., 'Thalamus')]")
    text = " ".join(details.text_content().split())
    assert "54 participants (T1w of ds002748" in text
    assert "they are not clinical ones" in text


def test_each_scan_has_its_own_section_with_its_own_pictures(output_dir):
    page = read(build_subject_report(output_dir, "01"))
    names = [section.get("id") for section in page.xpath("//section")]
    assert names == [
        "Summary",
        "sub-01_ses-a_T1w",
        "sub-01_ses-a_acq-x_T1w",
        "Methods",
        "Errors",
        "Provenance",
    ]
    for scan, prefix in (
        ("sub-01_ses-a_T1w", "sub-01_ses-a_"),
        ("sub-01_ses-a_acq-x_T1w", "sub-01_ses-a_acq-x_"),
    ):
        (section,) = page.xpath(f"//section[@id='{scan}']")
        drawn = [e.get("src") or e.get("data") for e in section.xpath(".//img | .//object")]
        assert len(drawn) == len(PICTURES) + 1
        rest = {d.rpartition("/")[2].removeprefix(prefix) for d in drawn}
        assert all(r.startswith(("desc-", "space-MNI305_desc-")) for r in rest)


def test_facts_of_a_scan(output_dir):
    page = read(build_subject_report(output_dir, "01"))
    (section,) = page.xpath("//section[@id='sub-01_ses-a_T1w']")
    rows = {
        row.find("th").text_content(): row.find("td").text_content()
        for row in section.xpath(".//table[@class='facts']//tr")
    }
    expected = {
        "File": "sub-01/anat/sub-01_ses-a_T1w.nii.gz",
        "Stored orientation": "LPS",
        "Voxel size": "1.5 × 1.5 × 6 mm",
        "Grid": "128 × 120 × 30",
        "Tilt of the scan's axes": "12.3°",
        "Slice direction": "inferior-superior",
        "Slice thickness": "5 mm (from: SliceThickness)",
        "Gap between slices": "1 mm",
        "Field strength": "3 T",
        "Noise levels": "3, from 10 to 0",
        "Noise before sampling": "0.0200 of the brain's 99th percentile, 10 in scanner units",
        "Residual of each sample, in SDs of the noise before sampling": "1.00, 1.04",
        "Seed": str(2**62 + 11),
        "Volume of all structures": "8 ml",
        "Median distance of centroids from MNI305": "2.5 mm",
        "Time": "2.2 min",
        "Peak memory": "2.8 GB",
        "Device": "cpu (x86_64)",
    }
    assert {key: rows[key] for key in expected} == expected


def test_a_mean_without_samples_is_not_called_unrecorded(tmp_path):
    value = summary("sub-01_T1w")
    value["facts"]["restore"] |= {"sampler": "mean", "n_samples": 0}
    store(tmp_path, value)
    page = read(build_subject_report(tmp_path, "01"))
    cells = page.xpath("//section[@id='Summary']//tbody//td/text()")
    assert "mean" in cells
    assert not any("0 samples" in cell for cell in cells)
    (samples,) = page.xpath("//th[text()='Samples']/following-sibling::td/text()")
    assert samples == "none: the posterior mean alone"
    rows = dict(restore_rows(ScanRecord.from_json(value)))
    assert rows["Residual of the posterior mean, in SDs of the noise"] == "1.00, 1.04"
    assert rows["Noise"].startswith("0.0210 of")
    assert not any("sample" in label or "sampling" in label for label in rows)


def test_the_summary_names_a_table_that_exists_without_the_group_level(output_dir):
    (top,) = read(build_subject_report(output_dir, "01")).xpath("//section[@id='Summary']")
    text = " ".join(top.text_content().split())
    assert "logs/qc.tsv has the metrics of all scans" in text
    assert "group_" not in text
    assert "If samples were drawn" in text


def test_the_registration_to_the_other_contrast_is_shown(tmp_path):
    def shown(scan, **alignment):
        value = summary(f"sub-01_{scan}")
        value["facts"]["alignment"] = alignment
        store(tmp_path, value)
        page = read(build_subject_report(tmp_path, "01"))
        place = f"//section[@id='sub-01_{scan}']//th[text()='Registered to sub-01_T1w']"
        (text,) = page.xpath(f"{place}/following-sibling::td/text()")
        return text

    aligned = {"reference": "sub-01_T1w", "shared": 0.98, "alike": 0.82}
    fit = "82 % of the brain has the same label in both"
    assert shown("T2w", **aligned) == fit
    assert shown("FLAIR", **aligned | {"message": "They differ."}) == f"no: {fit}"
    assert shown("PDw", reference="sub-01_T1w", message="Empty.") == "no"


def test_table_of_structures(output_dir):
    page = read(build_subject_report(output_dir, "01"))
    (table,) = page.xpath("//section[@id='sub-01_ses-a_T1w']//details//tbody")
    cells = [[td.text_content() for td in row.findall("td")] for row in table.findall("tr")]
    brain, thalamus = (reference()[name] for name in ("Brain", "Left-Thalamus"))
    # alone it is the whole brain, whatever its volume
    z = (brain["log_mean"] - thalamus["log_mean"]) / thalamus["log_sd"]
    # 7650 mm3; 1.26 mm
    assert cells == [["Left-Thalamus", "10", "7.7", f"{z:+.1f}", "0.91", "1.3"]]


def test_a_failed_scan_is_told_with_its_message(output_dir):
    path = build_subject_report(output_dir, "01")
    page = read(path)
    (errors,) = page.xpath("//section[@id='Errors']")
    text = errors.text_content()
    assert "sub-01_ses-a_FLAIR" in text
    assert "expected <one> volume & got 4." in text  # escaped in the source, whole in the page
    assert "<one>" not in path.read_text()
    assert "Conform" in text
    assert "crash-1.txt" in text
    assert "sform and qform differ" in text
    (top,) = page.xpath("//section[@id='Summary']")
    assert "1 of 3 scans failed" in top.text_content()
    assert "No errors" not in page.text_content()


def test_the_provenance_of_a_failed_scan_has_what_is_known(tmp_path):
    """Command and seed are in the settings of the run; what is unknown has no row."""
    failed = summary("sub-01_T1w", status="failed", facts={}, nodes=[], seed=None)
    store(tmp_path, failed)
    rows = provenance(build_subject_report(tmp_path, "01"))
    assert rows == {"Run": failed["run_uuid"], "Version": "brainprior 9.8.7"}
    settings = Settings(
        bids_dir=tmp_path / "raw",
        output_dir=tmp_path,
        work_dir=tmp_path / "work",
        random_seed=5,
        run_uuid=failed["run_uuid"],
        command=("brainprior", "a b", "out", "participant"),
    )
    folder = tmp_path / "sub-01" / "log" / failed["run_uuid"]
    folder.mkdir(parents=True)
    (folder / "brainprior.toml").write_text(settings.to_toml())
    rows = provenance(build_subject_report(tmp_path, "01"))
    assert rows["Command"] == "brainprior 'a b' out participant"
    assert rows["Seed of the run"] == "5"
    assert "not recorded" not in rows.values()
    (folder / "brainprior.toml").write_text("[brainprior]\nfrom_another_version = 1\n")
    assert "Command" not in provenance(build_subject_report(tmp_path, "01"))


def test_the_provenance_of_a_finished_scan_says_what_is_missing(tmp_path):
    store(tmp_path, summary("sub-01_T1w", seed=None))
    rows = provenance(build_subject_report(tmp_path, "01"))
    assert rows["Command"] == rows["Seed of the scan"] == "not recorded"


def test_pictures_stay_legible_on_a_narrow_screen(output_dir):
    """Their text is 11 to 15 units high on sheets of 1200; 56rem are 896 pixels."""
    text = build_subject_report(output_dir, "01").read_text()
    assert ".reportlet img, .reportlet object { min-width: 56rem; }" in text
    assert "(max-width: 60rem) { .reportlet { overflow-x: auto; }" in text
    assert "box.tabIndex = 0" in text  # a region that scrolls can have the focus


def test_no_error_says_so(tmp_path):
    store(tmp_path, summary("sub-2_T1w"))
    page = read(build_subject_report(tmp_path, "2"))
    (errors,) = page.xpath("//section[@id='Errors']")
    assert "No errors to report." in errors.text_content()


def test_the_caution_about_lesions_is_in_the_summary(output_dir):
    (top,) = read(build_subject_report(output_dir, "01")).xpath("//section[@id='Summary']")
    text = " ".join(top.text_content().split())
    assert "may erase a lesion or invent one" in text
    assert "Do not use a restored image to look for lesions" in text


def test_what_was_measured_of_the_prior_is_said_of_it_alone(tmp_path):
    """Unmeasured contrasts, samplers and tasks are named; other weights have no values."""
    held = json.loads((files("brainprior_bids") / "data" / "measured.json").read_text())
    said = {
        "coverage": "50 and 90 % intervals of a regional mean that contained",
        "lesions": "lesion&#39;s contrast that a restored",
    }
    for study, words in said.items():  # each part records its weights
        weights = {"sha256": held[study]["prior_sha256"]}
        restore = {"prior": weights, "contrast": "T1w", "sampler": "conditional"}
        store(tmp_path, summary("sub-2_T1w", facts={"restore": restore}))
        text = build_subject_report(tmp_path, "2").read_text()
        assert words in text
        assert "Not measured for" not in text
    measured = {"sha256": held["coverage"]["prior_sha256"]}
    record = RestoreRecord.from_json({**restore, "prior": measured})
    assert coverage(replace(record, sampler="exact"), task="inpaint").endswith(
        "Not measured for the sampler exact, the task inpaint."
    )
    fused = replace(record, runs=(RunRecord.from_json({"name": "sub-2_run-1_T1w"}),) * 2)
    assert coverage(fused, task="restore").endswith("Not measured for fused runs.")
    other = replace(record, prior=WeightsRecord(sha256="0" * 64))
    assert coverage(other, task="restore") == "not measured for these weights"
    assert lesions([other]) == ""


def test_warnings_stand_above_the_pictures(tmp_path):
    store(tmp_path, summary("sub-2_T1w", warnings=["5 mm assumed <from> the header."]))
    pictures(tmp_path, "sub-2_T1w")
    path = build_subject_report(tmp_path, "2")
    text = path.read_text()
    assert text.index("5 mm assumed &lt;from&gt;") < text.index("desc-flicker")


@pytest.mark.parametrize(
    "bare",
    [
        {"scan": "sub-3_T1w", "subject": "3", "status": "done"},
        {"scan": "sub-3_T1w", "subject": "3", "status": "failed"},
        {"scan": "sub-3_T1w", "subject": "3"},
    ],
)
def test_a_summary_with_little_in_it(tmp_path, bare):
    store(tmp_path, bare)
    text = build_subject_report(tmp_path, "3").read_text()
    assert "not recorded" in text


def test_a_subject_without_scans_gets_a_page(tmp_path):
    text = build_subject_report(tmp_path, "7").read_text()
    assert "No scan of this participant was restored." in text


@pytest.mark.parametrize("old", [False, True])
def test_provenance_is_read_from_the_records(tmp_path, old):
    scan = "sub-01_T1w"
    run = "20260102030405abcd"
    act, soft = f"prov/prov-{run}sub01T1w_act.json", f"prov/prov-{run}_soft.json"
    command = ["brainprior", "in", "out", "participant"]
    write_json(
        tmp_path / act,
        {"Activities": [{"Arguments": command, "Settings": {"random_seed": 5}}]},
    )
    env = soft.replace("soft", "env")
    packages = {"torch": "2.13.0"}
    if old:  # as written by earlier versions
        write_json(tmp_path / soft, {"Software": [{"Python": "3.11.7", "Packages": packages}]})
        write_json(tmp_path / env, {"Environments": [{"Label": "machine"}]})
    else:
        packages["python"] = "3.11.7"
        write_json(tmp_path / soft, {"Software": [{"Label": "brainprior"}]})
        write_json(tmp_path / env, {"Environments": [{"Dependencies": packages}]})
    store(tmp_path, summary(scan, outputs=[act]))
    page = read(build_subject_report(tmp_path, "01"))
    (section,) = page.xpath("//section[@id='Provenance']")
    text = section.text_content()
    for expected in (
        " ".join(command),
        "9.8.7",
        "cd" * 32,
        str(2**62 + 11),
        "python 3.11.7",
        "torch 2.13.0",
    ):
        assert expected in text
    links = {a for e, a in linked(section) if e.tag == "a"}
    assert links == {f"./{act}", f"./{soft}", f"./{env}"}


def test_methods_name_what_ran(tmp_path):
    store(tmp_path, summary("sub-01_T1w"))
    daps = summary("sub-01_T2w")
    daps["facts"]["restore"] |= {"sampler": "daps", "n_samples": 2, "calls": 50}
    store(tmp_path, daps)
    (section,) = read(build_subject_report(tmp_path, "01")).xpath("//section[@id='Methods']")
    text = " ".join(section.text_content().split())
    for expected in (
        "1 T1w and 1 T2w scans",
        "9.8.7",
        "little-prior, SHA-256 cdcdcdcdcdcd",
        "the exact draw that it approximates (4 samples, 20 network calls each)",
        "with its inner Langevin walk (2 samples, 50 network calls each)",
        "arXiv:2510.15119",
        "arXiv:2407.01521",
        "arXiv:2206.00364",
    ):
        assert expected in text


def test_the_report_changes_no_picture_and_leaves_nothing_behind(output_dir):
    folder = output_dir / "sub-01" / "figures"
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    first = build_subject_report(output_dir, "01").read_bytes()
    assert build_subject_report(output_dir, "01").read_bytes() == first
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before
    assert {p.name for p in output_dir.iterdir()} == {"logs", "sub-01", "sub-011", "sub-01.html"}


def test_a_report_that_cannot_be_made_keeps_the_old_one(output_dir, monkeypatch):
    old = build_subject_report(output_dir, "01").read_bytes()

    def disk_full(report):
        report.out_filename.write_text("<html>half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SubjectReport, "generate_report", disk_full)
    with pytest.raises(OSError, match="No space"):
        build_subject_report(output_dir, "01")
    assert (output_dir / "sub-01.html").read_bytes() == old
    assert not [p for p in output_dir.iterdir() if p.name.startswith(".report")]


def test_files_of_others_in_the_figures_folder_are_left_out(output_dir):
    folder = output_dir / "sub-01" / "figures"
    (folder / "sub-01_ses-a_task_rest.svg").write_text(SVG)
    (folder / "notes.txt").write_text("mine")
    (folder / "sub-01_ses-a_desc-other_T1w.svg").write_text(SVG)
    text = build_subject_report(output_dir, "01").read_text()
    assert "task_rest" not in text
    assert "notes.txt" not in text
    assert "desc-other" not in text
