# SPDX-License-Identifier: Apache-2.0
"""``brainprior evaluate``: cases, resuming, failures, tables."""

import dataclasses
import json
import os
import sys
import time
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from participants import toy_participant, write_prepared

from brainprior_bids.cli import evaluate as command
from brainprior_bids.cli.run import main
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.weights import FOLDER, sha256_file
from brainprior_bids.evaluation import harness, protocol
from brainprior_bids.evaluation.stamp import read_stamp
from brainprior_bids.evaluation.studies import STUDIES, ablation
from brainprior_bids.evaluation.studies.base import Source


@pytest.fixture
def ready(tmp_path):
    """Sources whose participants are already prepared."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for seed, name in enumerate(("01", "02", "03")):
        write_prepared(data, out, toy_participant(name, seed=seed))
    words = (
        f"evaluate {data} {out} --choose-label 03 --studies restoration --spacing 5 --noise 0.01"
    )
    words += " --n-samples 2 --n-steps 3 --crop 32 32 40 --nprocs 1"
    return out, words.split()


@pytest.fixture
def cheap(monkeypatch):
    """Without the network: errors of SD 0.05."""

    def restored(case, condition, contrast, **_):
        draws = condition.sampler != "mean"
        shape = (3 if draws else 1, *case.truth.data.shape)
        images = case.truth.data + np.random.default_rng(0).normal(0, 0.05, shape)
        return types.SimpleNamespace(
            mean=images[0].astype(np.float32),
            samples=images[1:].astype(np.float32),
            sd=np.full(shape[1:], 0.05, np.float32),
            sd_from="samples" if draws else "prior",
            sampler="conditional" if draws else "mean",
            noise_sd=0.01,
            residual_ratios=[1.0, 1.0],
            warnings=[],
        )

    monkeypatch.setattr(protocol, "restored", restored)


def test_the_command_measures_once_and_writes_tables(ready, capsys):
    out, words = ready
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "### T1w, 1 × 1 × 5 mm, noise 0.01, 2 participants" in shown
    assert "tuned on 03" in shown
    paths = sorted((out / "results" / "restoration").glob("*.json"))
    assert [path.name for path in paths] == [f"0{n}_T1w_5mm-noise0.01.json" for n in (1, 2)]
    records = [json.loads(path.read_text()) for path in paths]
    assert [r["width"] for r in records] == [1.1, 0.9]
    gain = [
        r["methods"]["restored"]["psnr_db"] - r["methods"]["cubic"]["psnr_db"] for r in records
    ]
    assert f"minus cubic, paired: PSNR {np.mean(gain):+.2f} ± {np.std(gain, ddof=1):.2f}" in shown
    assert len((out / "results.tsv").read_text().splitlines()) == 1 + 2 * len(protocol.METHODS)
    for name in ("restoration.png", "restoration_histograms.png"):
        assert (out / name).stat().st_size > 5000
    written = [path.stat().st_mtime_ns for path in paths]
    paths[0].unlink()
    assert main(words) == 0  # resumes: only what is missing
    assert paths[1].stat().st_mtime_ns == written[1]
    again = json.loads(paths[0].read_text())
    assert again["methods"] == records[0]["methods"]
    assert main([*words, "--random-seed", "1"]) == 0  # another condition: computed again
    assert paths[1].stat().st_mtime_ns != written[1]


def test_a_sampler_without_samples_has_its_tables_too(ready, cheap, capsys):
    out, words = ready
    assert main([*words, "--sampler", "mean"]) == 0
    shown = capsys.readouterr().out
    assert "| `desc-restored` | " in shown
    assert "| one sample | n/a | " in shown
    assert (out / "restoration_histograms.png").stat().st_size > 5000


def test_the_documentations_tables_are_of_this_command_alone(ready, cheap, tmp_path, capsys):
    words = ready[1]
    assert main([*words, "--noise", "0.02"]) == 0  # in the same folder
    asked = [*words, "--tables", str(tmp_path / "pages")]
    assert main([*asked, "--tables-only"]) == 2
    assert "2 of 2 results for --tables are missing" in capsys.readouterr().err
    assert main(asked) == 0
    (page,) = (tmp_path / "pages" / "tables").iterdir()
    assert page.name == "restoration.md"
    text = page.read_text()
    stamp = read_stamp(text, page.name)
    assert stamp.weights == sha256_file(FOLDER / "prior.safetensors")[:12]
    assert (stamp.participants, stamp.maps) == (2, 0)
    assert stamp.command.startswith("brainprior evaluate data out --choose-label 03 --studies")
    assert stamp.command.endswith("--nprocs 1 --tables pages")
    assert str(tmp_path) not in text
    assert "| T1w, 5 mm, noise 0.01 |" in text
    assert "noise 0.02" not in text
    assert "tuned on 03." in text
    page.unlink()
    assert main([*asked, "--tables-only"]) == 0
    assert page.read_text() == text  # the same day and command


def planned(words):
    args = command.parse(words)
    return args, command.plan(args, command.find_sources(args))


def test_a_quick_run_is_one_participant_and_few_cases_of_every_study(ready):
    data, out = (word for word in ready[1][1:3])
    _, (cases, problems) = planned([data, out, "--quick"])
    assert problems == []
    assert {case.source.name for case in cases} == {"01"}
    count = {name: sum(case.study == name for case in cases) for name in STUDIES}
    assert count == dict.fromkeys(STUDIES, 1) | {"ablation": 2, "samples": 2, "peers": 0}
    first = cases[0].settings
    assert (first.name, first.n_samples) == ("5mm-noise0.01", 4)
    more = ["--participant-label", "02", "01", "--choose-label", "03", "--noise", "0.05"]
    args, (cases, _) = planned([data, out, "--quick", "--study", "restoration", *more])
    sources = command.find_sources(args)
    assert [(s.name, s.choosing) for s in sources] == [("01", False), ("03", True)]
    assert [case.settings.noise_sd for case in cases] == [
        0.05
    ]  # the command line takes precedence
    with pytest.raises(SystemExit):  # a table of one participant does not enter the pages
        command.parse([data, out, "--quick", "--tables", "docs"])


def test_a_failed_job_does_not_stop_the_others(ready, cheap, monkeypatch, caplog):
    """A crash of any kind; the table of its study is not written, those of others are."""
    out, words = ready
    measure = protocol.measure

    def fails(participant, condition, **kwargs):
        if participant.name == "01" and condition.study == "restoration":
            raise ZeroDivisionError("no")
        return measure(participant, condition, **kwargs)

    monkeypatch.setattr(protocol, "measure", fails)
    words = [*words, "--study", "restoration", "low-field", "--tables", str(out)]
    assert main(words) == 1
    assert "result restoration 01_T1w 5mm-noise0.01: ZeroDivisionError: no" in caplog.text
    assert "no table of restoration was written" in caplog.text
    assert [path.name for path in (out / "tables").iterdir()] == ["low-field.md"]
    assert [p.name[:2] for p in (out / "results" / "restoration").glob("*.json")] == ["02"]


@pytest.mark.parametrize("where", ["here", "in a command"])
def test_the_coarse_network_is_on_record_where_it_took_part(ready, cheap, monkeypatch, where):
    """The record and the table depend on its weights then."""
    out, words = ready
    study, asked = harness.find("restoration"), []

    def asks(participant, condition, bench):
        asked.append(participant.name)
        if participant.name == "01" and where == "here":
            bench.load_prior().asked_coarse = True
        elif participant.name == "01":
            bench.folder.mkdir(parents=True)
            sidecar = bench.folder / "sub-01_desc-restored_T1w.json"
            sidecar.write_text(json.dumps({"CoarsePrior": {"name": "x"}}))
        return study.measure(participant, condition, bench)

    monkeypatch.setattr(harness, "find", lambda _: dataclasses.replace(study, measure=asks))
    words = [*words, "--tables", str(out)]
    assert main(words) == 0
    paths = sorted((out / "results" / "restoration").glob("*.json"))
    coarse = sha256_file(FOLDER / "coarse.safetensors")
    assert [json.loads(path.read_text()).get("coarse_sha256") for path in paths] == [coarse, None]
    page = out / "tables" / "restoration.md"
    stamp = read_stamp(page.read_text(), page.name)
    assert stamp.network == "prior+coarse"
    assert stamp.weights.endswith(f"+{coarse[:12]}")
    assert main(words) == 0
    assert asked == ["01", "02"]
    record = json.loads(paths[0].read_text())
    paths[0].write_text(json.dumps({**record, "coarse_sha256": "ab" * 32}))  # of other weights
    assert main(words) == 0
    assert asked == ["01", "02", "01"]


def test_a_scan_that_cannot_be_prepared_is_named(ready, cheap, caplog):
    out, words = ready
    (out / "participants" / "02_T1w.json").unlink()  # it is prepared again: 2 bytes are no image
    assert main([*words, "--tables", str(out)]) == 1
    assert "participant 02_T1w:" in caplog.text
    assert [p.name[:2] for p in (out / "results" / "restoration").glob("*.json")] == ["01"]
    assert not (out / "tables").exists()


def test_a_killed_process_ends_its_own_job_alone(caplog):
    jobs = [
        harness.Job("result", "killed", frozenset({"fuse"}), os._exit, (9,)),
        harness.Job("result", "wrong", frozenset({"refine"}), int, ("x",)),
        *(harness.Job("result", f"good {n}", frozenset(), time.sleep, (0.2,)) for n in range(2)),
    ]
    with harness.Pool(2) as pool:
        failures = {failure.text.split(":")[0]: failure for failure in pool.run(jobs)}
        assert pool.run(jobs[2:]) == []  # there are processes again
    assert set(failures) == {"result killed", "result wrong"}
    assert "its process was killed" in failures["result killed"].text
    assert failures["result killed"].studies == {"fuse"}
    assert "ValueError" in failures["result wrong"].text


def test_penalties_that_cannot_be_tuned_are_a_failure_of_the_study(ready, cheap, monkeypatch):
    out, words = ready

    def fails(*_):
        raise UsageError("no")

    monkeypatch.setattr(protocol, "tune", fails)
    assert main([*words, "--tables", str(out)]) == 1
    records = [json.loads(p.read_text()) for p in (out / "results").rglob("*.json")]
    assert [record["tuned_on"] for record in records] == [[], []]
    assert not (out / "tables").exists()


def test_a_contrast_that_is_missing_is_named(ready, caplog):
    data, out = ready[1][1:3]
    words = ["--study", "restoration", "coverage", "-m", "T1w", "FLAIR"]
    _, (cases, problems) = planned([data, out, *words])
    assert problems == [f"no FLAIR of the test set in {data}."]
    assert {case.study for case in cases} == {"restoration", "coverage"}
    _, (_, problems) = planned([data, out, *words, "--participant-label", "01", "02"])
    assert problems == [f"no FLAIR of 01, 02 in {data}."]
    for name in ("01", "02", "03"):
        (Path(data) / f"sub-{name}_T1w.nii.gz").rename(Path(data) / f"sub-{name}_T2w.nii.gz")
    _, (cases, problems) = planned([data, out, "--study", "restoration", "coverage"])
    assert problems == [f"coverage: no scan for this study in {data}."]
    assert len(cases) == 3 * 6


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--participant-label", "03"], "cannot be in both the test"),
        (["--participant-label", "77"], "no participant 77"),
        (["--maps", "training_seg_18"], "need --labels"),
        (["-m", "FLAIR"], "no scan of the test set"),
        (["--prior", "nowhere"], "expected a weights file"),
    ],
)
def test_what_cannot_be_evaluated_is_said(ready, capsys, more, text):
    assert main([*ready[1], *more]) != 0
    assert text in capsys.readouterr().err


def test_tables_without_results_are_a_usage_error(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path), str(tmp_path), "--tables-only"]) == 2
    assert "no results" in capsys.readouterr().err


def test_every_study_is_planned(ready):
    words = [str(ready[0]), str(ready[0]), "--average", "avg305T1.nii", "--syn-participants", "1"]
    args = command.parse([*words, "--peer", f"other={sys.executable} {{scan}}"])
    sources = [Source("", name, "T1w", False, name == "3") for name in "123"]
    sources.append(Source("", "map", "T2w", True, False))
    cases, problems = command.plan(args, sources)
    assert problems == []
    count = {s: sum(case.study == s for case in cases) for s in STUDIES}
    assert count == {
        "restoration": 2 * 3 * 2 + 3,
        "low-field": 2,
        "ablation": 2 * len(ablation.ABLATIONS),
        "samplers": 2,
        "segmentation": 3,
        "downstream": 2,
        "coverage": 3 * 2 * 2,  # the validation set too
        "hallucination": 2 * 3,
        "uncertainty": 2,
        "peers": 2 * 2,
        "samples": 10 + 3,  # the validation set too
        "lesions": 2 * 3,
        "heads": 2,
        "inpaint": 2,
        "fuse": 2,
        "refine": 2,
        "motion": 2 * 3 * 4,
        "alignment": 2,
    }
    assert {case.study for case in cases if case.source.name == "3"} == {"coverage", "samples"}
    records = [case.record(ready[0]) for case in cases]
    assert len(set(records)) == len(records)
    own = {case.study: case.settings for case in cases}
    assert {c.settings.width for c in cases if c.study == "restoration"} == {0.9, 1.1}
    assert own["segmentation"].crop_mm is None
    assert own["coverage"].width == 1
    assert (own["refine"].slab_mm, own["fuse"].slab_mm) == (60, None)
    samples = [own[name].n_samples for name in STUDIES if name not in ("samples", "alignment")]
    assert samples == [8, 4, 4, 4, 2, 2, 8, 4, 4, 4, 2, 4, 2, 2, 1, 1]
    if find_spec("ants"):
        assert [c.settings.syn for c in cases if c.study == "alignment"] == [True, False]
    for case in cases:  # settings determine the fingerprint, and are in the record
        json.dumps(dataclasses.asdict(case.settings))
