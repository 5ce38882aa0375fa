# SPDX-License-Identifier: Apache-2.0
"""The methods text describes what was run, in four consistent formats."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from lxml import html

from brainprior_bids.bids.files import write_json
from brainprior_bids.engine.samplers import registry
from brainprior_bids.records import AffineMethod, ContrastRecord, ScanRecord, TemplateRecord
from brainprior_bids.reports.methods import (
    CITATION,
    Method,
    methods_text,
    of_summary,
    to_html,
    with_contrasts,
    write_citation,
)
from brainprior_bids.reports.references import MOST_AUTHORS, bibtex, html_list, references

ONE = Method(
    "T1w", "restore", "exact", 4, 20, "9.8.7", "p_1, SHA-256 ab…", "n, SHA-256 cd…",
    uncertainty_from="samples",
)  # fmt: skip
MEAN = Method("T2w", "restore", "mean", 0, 1, "9.8.7", "p_1, SHA-256 ab…", "n, SHA-256 cd…")

TEMPLATE = TemplateRecord(
    space="MNI152NLin2009cAsym", address="a", image_sha256="b", mask_sha256="c",
    metric="local cross-correlation", program="ANTsPy 1", agreement=0.98, agreement_affine=0.9,
)  # fmt: skip


@pytest.mark.parametrize(
    ("sources", "expected", "absent"),
    [
        (["prior"], "deviation, predicted by the network", "deviation of the samples"),
        (["samples"], "standard deviation of the samples", "predicted by the network"),
        (["prior", "samples"], "or, for some images, the voxelwise", "no such words"),
        ([None], "posterior", "uncertainty map"),
    ],
)
def test_it_says_what_the_uncertainty_map_is(sources, expected, absent):
    several = [replace(ONE, uncertainty_from=source) for source in sources]
    text = " ".join(methods_text(several).split())
    assert expected in text
    assert absent not in text


def test_what_ran_and_nothing_else():
    text = " ".join(methods_text([ONE]).split())
    assert "1 T1w scan was restored with *brainprior* 9.8.7" in text
    assert "(4 samples, 20 network calls each)" in text
    assert "conditional expectations" in text
    assert "uncertainty map" in text
    assert "times the stated value" not in text
    doubted = " ".join(methods_text([replace(ONE, widths=(0.83, 1.0, 1.17))]).split())
    assert "slices was 0.83, 1.00, 1.17 times the stated value in different samples" in doubted
    point = " ".join(methods_text([MEAN]).split())
    assert "no samples were drawn" in point
    assert "standard deviation" not in point
    assert "Langevin" not in point
    assert "Images were drawn" not in point
    both = " ".join(methods_text([ONE, MEAN]).split())
    assert "1 T1w and 1 T2w scans were restored with" in both
    assert "lesion" not in both
    # which scans were drawn in which way
    third = replace(ONE, suffix="FLAIR")
    assert methods_text([ONE, MEAN, third]).startswith("1 T1w, 1 T2w and 1 FLAIR scans were")
    assert "2 ways. For 1 T1w scan, in the manner of decoupled annealing" in both
    assert "no samples were drawn" in both.split("For 1 T2w scan, ")[1]
    assert "no samples were drawn" not in both.split("For 1 T2w scan, ")[0]
    filled = " ".join(methods_text([ONE, MEAN, replace(ONE, task="inpaint")]).split())
    assert "scans were restored; 1 T1w scan was inpainted with *brainprior*" in filled
    assert "Voxels under a lesion mask were treated as missing data" in filled


def test_displaced_interleaves_are_named_where_they_were_corrected():
    text = " ".join(methods_text([ONE, replace(ONE, interleaves=True)]).split())
    assert "In 1 of the 2 scans, the participant had moved between packages" in text
    assert "in the mean of their positions" in text
    assert "participant had moved" not in methods_text([ONE])


def test_the_coarse_network_is_named_where_it_was_asked():
    asked = replace(ONE, coarse="c_1, SHA-256 ef…")
    once = " ".join(methods_text([asked]).split())
    assert "In this scan, a second network, trained on brains averaged to 2 mm, took part" in once
    text = methods_text([ONE, asked, asked])
    assert "In 2 of the 3 scans, a second network" in text
    assert text.count("weights c_1, SHA-256 ef…") == 1
    assert "second network" not in methods_text([ONE])


def test_slice_gains_are_named_where_they_were_corrected():
    gains = replace(ONE, slice_gains=True)
    assert "one gain per slice" not in methods_text([ONE])
    assert "In this scan, the brightness of single slices" in methods_text([gains])
    assert "In 1 of the 2 scans, the brightness" in methods_text([ONE, gains])


def test_every_citation_has_its_reference():
    known = references()
    both = [ONE, replace(ONE, sampler="conditional", templates=(TEMPLATE,))]
    assert set(CITATION.findall(methods_text(both))) == set(known)
    for entry in known.values():
        assert {"author", "title", "year"} <= set(entry)
        assert ("doi" in entry) != ("url" in entry)
        assert "others" not in entry["author"].split(" and ")
        if "journal" in entry or "booktitle" in entry:
            assert "pages" in entry
        if "journal" in entry:
            assert "volume" in entry


def test_a_long_list_of_authors_is_cut_in_the_page_alone():
    few, many = html.fromstring(html_list(["daps", "bids"])).xpath("//li")
    assert few.text_content().startswith(
        "Zhang, B., Chu, W., Berner, J., Meng, C., Anandkumar, A., Song, Y. Improving"
    )
    assert "(CVPR), 20895–20905, 2025. arXiv:2407.01521" in few.text_content()
    assert many.text_content().startswith("Gorgolewski, K. J., Alfaro-Almagro, F.")
    assert "Chakravarty, M. M., et al. BIDS apps" in many.text_content()
    assert "PLOS Computational Biology 13(3), e1005209, 2017. doi:" in many.text_content()
    assert references()["bids"]["author"].count(" and ") > MOST_AUTHORS
    assert "Poldrack, R. A." in bibtex()["bids"]


def test_html_numbers_the_references_in_order():
    page = html.fromstring(f"<div>{to_html(methods_text([ONE]))}</div>")
    numbers = [int(n) for n in re.findall(r"\[(\d+)\]", page.text_content())]
    first = list(dict.fromkeys(numbers))
    assert first == list(range(1, len(page.xpath("//ol/li")) + 1))
    assert "*" not in page.text_content()


def test_four_files(tmp_path):
    names = [path.name for path in write_citation(tmp_path, [ONE])]
    assert names == ["CITATION.md", "CITATION.html", "CITATION.tex", "CITATION.bib"]
    tex = (tmp_path / "CITATION.tex").read_text()
    assert r"\cite{synthseg}" in tex
    assert r"p\_1" in tex
    assert "[@" not in tex
    bib = (tmp_path / "CITATION.bib").read_text()
    cited = set(re.findall(r"\\cite\{(\w+)\}", tex))
    assert cited == set(re.findall(r"@\w+\{(\w+),", bib))  # no sampler that was not used
    assert {"daps", "n4"} <= cited
    assert "eps" not in cited


def test_steps_that_did_not_run_are_not_described():
    alone = " ".join(methods_text([replace(ONE, task="refine")]).split())
    assert "N4" not in alone
    moved = replace(ONE, aligned_by=AffineMethod.TEMPLATE)
    text = " ".join(methods_text([moved]).split())
    assert "least squares" not in text
    assert "MNI305 was estimated by registration to the template (ANTsPy" in text
    both = " ".join(methods_text([ONE, moved]).split())
    assert "least squares" in both
    assert "For the other scans it was estimated by registration" in both


def test_every_sampler_can_be_described_those_of_earlier_outputs_too():
    for sampler in (*registry.NAMES, *registry.EARLIER_NAMES, *registry.RETIRED):
        assert "weights p_1" in methods_text([replace(ONE, sampler=sampler)])


def test_registration_to_templates_is_named_where_it_ran():
    moved = replace(ONE, templates=(TEMPLATE,))
    text = " ".join(methods_text([moved]).split())
    assert "registered to MNI152NLin2009cAsym (TemplateFlow [@templateflow]) by an affine" in text
    assert "(SyN [@syn], ANTsPy 1; metric: local cross-correlation (T1w))" in text
    assert "Other contrasts" not in text
    assert "Other contrasts were resampled through" in methods_text([moved, MEAN])
    assert "TemplateFlow" not in methods_text([ONE, MEAN])


def contrast(scan, **values):
    """The record of an alignment with the session's T1w."""
    rows = ((1.0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))
    reference = f"{scan.partition('_')[0]}_T1w"
    return ContrastRecord(**{"scan": scan, "reference": reference, "to_reference": rows, **values})


def test_contrasts_and_further_spaces_are_named_where_they_were_written():
    """A contrast that could not be registered is left out."""
    moved = ("sub-1/anat/sub-1_space-T1w_desc-restored_T2w.nii.gz",)
    other = replace(MEAN, contrast=contrast("sub-1_T2w"))
    text = " ".join(methods_text([ONE, other]).split())
    assert "1 restored T2w was registered rigidly to the restored T1w of its session (mut" in text
    assert "resampled" not in text
    on_t1w = replace(MEAN, contrast=contrast("sub-1_T2w", outputs=moved))
    flair = replace(other, suffix="FLAIR")
    text = " ".join(methods_text([replace(ONE, in_mni305=True), on_t1w, flair]).split())
    assert "1 restored T2w and 1 restored FLAIR were registered rigidly" in text
    assert "resampled to MNI305 through the affine and to the grid of the session's T1w" in text
    failed = replace(
        MEAN, contrast=contrast("sub-1_T2w", to_reference=None, message="other brain")
    )
    for methods in ([ONE, MEAN], [ONE, failed]):
        assert "rigid" not in methods_text(methods)
        assert "resampled" not in methods_text(methods)


def test_alignment_and_spaces_are_read_from_the_output_folder(tmp_path):
    """The citation files and the report name what is in the records."""
    images = ["sub-1/anat/sub-1_space-MNI305_desc-restored_T2w.nii.gz"]
    done = {"scan": "sub-1_T2w", "subject": "1", "status": "done", "outputs": images}
    method = of_summary(ScanRecord.from_json(done))
    assert method.in_mni305
    folder = tmp_path / "logs" / "contrasts"
    write_json(folder / "sub-1_T2w.json", contrast("sub-1_T2w").to_json())
    (aligned,) = with_contrasts([method], tmp_path)
    assert aligned.contrast == contrast("sub-1_T2w")
    assert with_contrasts([ONE], tmp_path) == [ONE]  # before a run there is no scan
    paths = write_citation(tmp_path / "logs", [method])
    assert "1 restored T2w was registered rigidly" in paths[0].read_text()
    (folder / "sub-1_T2w.json").write_text("no JSON")
    assert with_contrasts([method], tmp_path)[0].contrast is None
