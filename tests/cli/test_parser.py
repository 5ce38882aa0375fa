# SPDX-License-Identifier: Apache-2.0
"""The command line: accepted and refused options, and exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from templates import write_template

from brainprior_bids import __version__
from brainprior_bids.cli import checks
from brainprior_bids.cli.parser import WORK_DIR, build_parser, parse_settings
from brainprior_bids.cli.run import main
from brainprior_bids.cli.sister_options import HINTS, advice
from brainprior_bids.cli.values import memory_gb
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.samplers import registry
from brainprior_bids.settings import TASKS


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "raw").mkdir()
    return [str(tmp_path / "raw"), str(tmp_path / "out"), "participant", "--device", "cpu"]


def test_the_defaults_are_the_documented_ones(folders, tmp_path):
    settings = parse_settings([*folders, "--nprocs", "2"])
    assert settings.modalities == ("T1w", "T2w", "FLAIR")
    assert (settings.task, settings.sampler, settings.n_samples) == ("restore", "auto", 4)
    assert settings.random_seed == 0
    assert settings.work_dir == tmp_path / "out" / WORK_DIR
    assert settings.omp_nthreads == 2
    assert not settings.use_gpu


def test_samplers_have_their_own_defaults(folders):
    chosen = {
        sampler: parse_settings([*folders, "--sampler", sampler])
        for sampler in ("conditional", "mean", "exact", "daps")
    }
    assert {name: s.n_samples for name, s in chosen.items()} == {
        "conditional": 4, "mean": 1, "exact": 4, "daps": 4,
    }  # fmt: skip
    calls = {name: registry.find(name).calls(s.n_steps, simple=True) for name, s in chosen.items()}
    assert calls == {"conditional": 10, "mean": 2, "exact": 20, "daps": 1000}
    assert registry.find("conditional").calls(None, simple=False) == 20
    assert registry.find("conditional").calls(3, simple=False) == 3


def test_prefixes_are_stripped_and_aliases_taken(folders):
    settings = parse_settings(
        [*folders, "--participant-label", "sub-01", "02", "--session-id", "ses-a",
         "--run-id", "run-01", "--n-cpus", "3", "--mem", "6G", "-m", "T2w", "-vv", "--notrack"]
    )  # fmt: skip
    assert settings.participant_label == ("01", "02")
    assert settings.session_label == ("a",)
    assert settings.run_id == ("01",)
    assert settings.nprocs == 3
    assert settings.mem_gb == pytest.approx(6)
    assert settings.verbose == 2


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--skull-strip", "synthstrip"], "mri_synthstrip"),
        (["--parcellation", "synthseg"], "mri_synthseg"),
        (["--synthstrip-model", "nowhere.pt"], "no such file"),
        (["--task", "refine"], "--derivatives NAME=PATH"),
        (["--task", "refine", "-d", "fs={fs}"], "needs --trust"),
        (["--task", "refine", "-d", "fs={fs}", "--trust", "0"], "above 0"),
        (["--task", "refine", "-d", "fs={fs}", "--trust", "-0.1"], "above 0"),
        (["--task", "refine", "-d", "fs={fs}", "--trust", "nan"], "above 0"),
        (["--task", "refine", "-d", "fs={fs}", "--trust", "{who}"], "is not known"),
        (["--task", "restore", "refine", "-d", "fs={fs}", "--trust", "x.nii"], "one SD"),
        (["--task", "refine", "inpaint", "-d", "fs={fs}"], "needs --trust"),
        (["--task", "refine", "inpaint", "-d", "fs={fs}", "--trust", "x.nii"], "white noise"),
        (["--task", "refine", "--fuse", "runs", "-d", "fs={fs}", "--trust", "1"], "uses none"),
        (["--trust", "0.1"], "needs --task refine"),
        (["--output-grid", "native", "--task", "inpaint"], "own grid already"),
        (
            ["--output-grid", "native", "--task", "refine", "-d", "fs={fs}", "--trust", "1"],
            "no head",
        ),
        (["--dilate", "2"], "needs --task inpaint"),
        (["--lesion-mask", "x"], "needs --task inpaint"),
        (["--task", "inpaint", "--lesion-mask", "{who}"], "is not known"),
        (["--modalities", "bold"], "no prior for bold"),
        (["--n-samples", "0"], "at least 1"),
        (["--nprocs", "two"], "whole number of at least 1, got two"),
        (["--slice-thickness", "thin"], "number above 0, got thin"),
        (["--sampler", "mean", "--n-samples", "4"], "draws no samples"),
        (["--sampler", "mean", "--save-samples"], "draws no samples"),
        (["--random-seed", "-1"], "from 0"),
        (["--slice-thickness", "0"], "above 0"),
        (["--effective-resolution", "5"], "such as 0,0,5, got '5'"),
        (["--effective-resolution", "0,0,0"], "such as 0,0,5"),
        (["--effective-resolution", "1,1,nan"], "such as 0,0,5"),
        (["--effective-resolution", "1,1,50"], "such as 0,0,5"),
        (["--mem", "lots"], "8G"),
        (["--device", "gpu"], "cuda:N"),
        (["--device", "cuda:99"], "--gpus all"),
        (["--run-id", "one"], "whole number"),
        (["--prior", "nowhere.safetensors"], "expected a weights file, or one of the names"),
        (["--bids-filter-file", "nowhere.json"], "cannot be read"),
        (["--frobnicate"], "--help"),
    ],
)
def test_what_cannot_be_used_says_so_and_ends_with_2(folders, tmp_path, extra, said, capsys):
    extra = [text.replace("{fs}", str(derivative(tmp_path))) for text in extra]
    assert main([*folders, *extra]) == 2
    assert said in capsys.readouterr().err


def test_nothing_writes_into_the_raw_data(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    common = ["participant", "--device", "cpu"]
    for out, work in (
        (raw, None),
        (raw / "sub-01", None),
        (raw / "derivatives", None),
        (tmp_path / "out", raw / "work"),
        (tmp_path / "out", raw),
        (tmp_path / "out", tmp_path / "out"),
    ):
        given = [str(raw), str(out), *common, *(["-w", str(work)] if work else [])]
        with pytest.raises(UsageError, match=r"output_dir|work-dir"):
            parse_settings(given)
    allowed = parse_settings([str(raw), str(raw / "derivatives" / "brainprior"), *common])
    assert allowed.work_dir.parent == allowed.output_dir


def test_a_link_to_the_raw_data_is_the_raw_data(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    with pytest.raises(UsageError, match="output_dir is bids_dir"):
        parse_settings([str(tmp_path / "raw"), str(tmp_path / "link"), "participant"])


def test_missing_data_set_ends_with_2(tmp_path, capsys):
    given = [str(tmp_path / "no"), str(tmp_path / "out"), "participant", "--device", "cpu"]
    assert main(given) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [[sys.executable, "-m", "brainprior_bids"]])
def test_version_and_help_come_from_the_command(command):
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == f"brainprior {__version__}"
    text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    for word in ("--participant-label", "--session-label", "--nthreads", "exit codes", "examples"):
        assert word in text


def test_help_and_usage_errors_do_not_wait_for_torch(tmp_path):
    """``import torch`` takes seconds, nipype and pandas another one."""
    code = (
        "import sys; from brainprior_bids.cli.run import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'nipype', 'bids', 'pandas', 'scipy.stats'} & set(sys.modules))); "
        "sys.exit(code)"
    )
    refused = f"{tmp_path} {tmp_path}/out participant --sampler mean --n-samples 2".split()
    for words in ["status", str(tmp_path)], refused:
        result = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
        )
        assert result.returncode == 2, result.stderr
        assert "brainprior: error: " in result.stderr
        assert result.stdout == "[]\n"


def test_train_needs_to_be_told_what(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train"])
    assert ended.value.code == 2
    assert "prior|parcellation" in capsys.readouterr().err


@pytest.mark.parametrize("network", ["prior", "parcellation"])
def test_training_explains_itself(network, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", network, "--help"])
    assert ended.value.code == 0
    assert "--steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "gib"), [("8G", 8), ("512M", 0.5), ("1024", 1), ("1T", 1024), ("2 gb", 2)]
)
def test_memory_sizes(text, gib):
    assert memory_gb(text) == pytest.approx(gib)


@pytest.mark.parametrize("fuse", [[], ["--fuse", "runs"]])
@pytest.mark.parametrize("task", TASKS)
def test_every_combination_of_tasks_is_taken_and_read_back(folders, tmp_path, task, fuse):
    """In any order; written as settings, the same."""
    if fuse and task == "refine":
        return  # refused, as tested above
    asked = ["--task", *reversed(task.split("+")), *fuse]
    if "refine" in task:
        asked += ["-d", f"fs={derivative(tmp_path)}", "--trust", "0.1"]
    if "restore" in task:
        asked += ["--output-grid", "native"]
    settings = parse_settings([*folders, *asked])
    assert (settings.task, settings.image) == (task, TASKS[task])
    assert settings.fills_scan == ("restore" not in task and "inpaint" in task)
    config = tmp_path / "brainprior.toml"
    config.write_text(settings.to_toml())
    again = parse_settings([*folders[:3], "--config-file", str(config)])
    assert (again.task, again.fuse) == (task, settings.fuse)


def test_the_settings_of_a_run_are_read_back(folders, tmp_path):
    database = tmp_path / "index"
    first = parse_settings(
        [*folders, "--participant-label", "01", "02", "--n-samples", "7", "--mem", "3G",
         "--slice-thickness", "4.5", "--slice-plane", "coronal",
         "--field-strength", "1.5", "-vv", "--low-mem", "--output-spaces", "T1w",
         "--bids-database-dir", str(database), "--derivatives", f"fs={derivative(tmp_path)}",
         "--task", "inpaint", "restore", "--lesion-mask", "{stem}_*.nii"]
    )  # fmt: skip
    assert first.task == "restore+inpaint"
    config = tmp_path / "brainprior.toml"
    config.write_text(first.to_toml())
    again = parse_settings([*folders[:3], "--config-file", str(config)])
    ours = {"run_uuid", "command"}
    for name in set(vars(first)) - ours:
        assert getattr(again, name) == getattr(first, name), name
    assert again.output_spaces == ("anat", "T1w")
    config.write_text(parse_settings([*folders]).to_toml())  # --dilate 0 is read back
    assert parse_settings([*folders, "--config-file", str(config)]).image == "restored"
    config.write_text(first.to_toml())
    changed = parse_settings(
        [*folders[:3], "--config-file", str(config), "--participant-label", "03", "--n-samples",
         "2", "-v"]
    )  # fmt: skip
    assert changed.participant_label == ("03",)
    assert (changed.n_samples, changed.verbose, changed.mem_gb) == (2, 1, first.mem_gb)


def test_a_cohort_of_a_template_is_read_back(folders, tmp_path):
    """As the command line writes it, and as the record of a run does."""
    asked = "MNIPediatricAsym:cohort-3"
    first = parse_settings([*folders, "--output-spaces", asked, "--reports-only"])
    assert first.template_spaces == ("MNIPediatricAsym+3",)
    config = tmp_path / "brainprior.toml"
    for text in (first.to_toml(), f'[brainprior]\noutput_spaces = ["{asked}"]\n'):
        config.write_text(text)
        again = parse_settings([*folders[:3], "--config-file", str(config), "--reports-only"])
        assert again.template_spaces == first.template_spaces


def derivative(folder):
    path = folder / "free surfer"
    path.mkdir(exist_ok=True)
    (path / "dataset_description.json").write_text("{}")
    return path


def test_filters_of_a_config_hold_until_a_file_is_given(folders, tmp_path):
    config = tmp_path / "brainprior.toml"
    config.write_text('[brainprior]\nbids_filters = "{\\"T1w\\": {\\"run\\": null}}"\n')
    settings = parse_settings([*folders, "--config-file", str(config)])
    assert settings.bids_filters == {"T1w": {"run": None}}
    other = tmp_path / "filter.json"
    other.write_text('{"t2w": {"session": "*"}}')
    settings = parse_settings(
        [*folders, "--config-file", str(config), "--bids-filter-file", str(other)]
    )
    assert settings.bids_filters == {"T2w": {"session": "*"}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[brainprior]\nn_sample = 3\n", "unknown n_sample"),
        ('[brainprior]\nnprocs = "two"\n', "nprocs must be int"),
        ("[brainprior]\nsloppy = 1\n", "sloppy must be bool"),
        ("[brainprior]\nn_samples = 0\n", "at least 1"),
        ("[other]\n", "[brainprior] table"),
        ("not toml", "brainprior.toml"),
    ],
)
def test_config_files_are_checked(folders, tmp_path, capsys, content, said):
    config = tmp_path / "brainprior.toml"
    config.write_text(content)
    assert main([*folders, "--config-file", str(config)]) == 2
    assert said in capsys.readouterr().err


def test_names_as_fmriprep_has_them(folders, tmp_path):
    path = derivative(tmp_path)
    settings = parse_settings(
        [*folders, "--ignore", "t2w", "flair", "-d", str(path), "--n_cpus", "2",
         "--participant_label", "01", "--participant-label", "02", "--debug"]
    )  # fmt: skip
    assert settings.modalities == ("T1w",)
    assert settings.derivatives == {"freesurfer": str(path)}
    assert settings.participant_label == ("01", "02")
    assert settings.stop_on_first_crash
    both = parse_settings([*folders[:3], "group", "--device", "cpu"])
    assert both.analysis_level == ("participant", "group")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--output-spaces", "MNI305:res-2"], "for other voxel sizes, run fMRIPrep"),
        (["--output-spaces", "MNI305:"], "only the modifiers res-1"),
        (["--output-spaces", "fsaverage:den-10k"], "is a surface. brainprior makes no surfaces"),
        (["--output-spaces", "MNI305:cohort-1"], "one cohort of a template was expected"),
        (["--output-spaces", "MNIInfant:cohort-1:cohort-2"], "a space of its own"),
        (["--output-spaces", "MNI 152"], "'MNI 152' is no space"),
        (["--ignore", "t1w", "t2w", "flair"], "leaves nothing"),
        (["-d", "nowhere"], "no dataset_description.json"),
        (["--dry-run", "--reports-only"], "not allowed with"),
    ],
)
def test_more_that_cannot_be_used(folders, extra, said, capsys):
    assert main([*folders, *extra]) == 2
    assert said in capsys.readouterr().err


def test_a_reader_that_stops_reading_is_no_crash(monkeypatch, capfd):
    """``brainprior … | head``."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["weights", "list"]) == 1
    messages = capfd.readouterr().err
    assert "brainprior: stopped: " in messages
    assert "Traceback" not in messages


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            ["--fs-license-file", "license.txt"],
            "--fs-license-file: brainprior reconstructs no surfaces",
        ),
        (["--fs-no-reconall"], "no FreeSurfer licence: leave it out."),
        (["--fs-some-new-option"], "--fs-some-new-option: brainprior reconstructs no surfaces"),
        (["--output-layout", "bids"], "--output-layout: brainprior has one layout"),
        (["--mem_gb=8"], "--mem_gb: use --mem with a unit"),
        (["-t", "rest"], "-t: brainprior processes no functional"),
        (["--fmap-some-new-option"], "--fmap-some-new-option: brainprior processes no functional"),
        (["--force", "bbr"], "bbr: brainprior's --force takes no value"),
        (["--partcipant-label", "01"], "--partcipant-label: did you mean --participant-label"),
    ],
)
def test_an_option_of_a_sister_app_gets_a_hint(folders, words, hint):
    with pytest.raises(UsageError) as caught:
        parse_settings([*folders, *words])
    text = str(caught.value)
    assert hint in text
    assert text.startswith("unrecognized arguments: ")
    assert text.endswith("Run `brainprior --help` for the options.")


SISTERS = """
-t --task-id --echo-idx --anat-only --level --longitudinal --bold2anat-init --bold2anat-dof
--force-bbr --force-no-bbr --force-syn --slice-time-ref --dummy-scans --me-t2s-fit-method
--subject-anatomical-reference --output-layout --aggregate-session-reports --me-output-echos
--medial-surface-nan --project-goodvoxels --md-only-boilerplate --cifti-output --msm --no-msm
--return-all-components --fd-spike-threshold --dvars-spike-threshold --skull-strip-template
--skull-strip-fixed-seed --skull-strip-t1w --fmap-bspline --fmap-no-demean --use-syn-sdc
--fallback-total-readout-time --fs-license-file --fs-subjects-dir --fs-no-reconall --fs-no-resume
--submm-recon --no-submm-recon --track-carbon --country-code --track-sessions
--species --dsname --participant_labels --min-dwi-length --min-bold-length --testing -f --pdb
--bids-database-wipe --no-datalad-get --n_procs -n-cpus --mem_gb --mem-gb --profile --no-sub
--email --webapi-url --webapi-port --upload-strict --ants-nthreads --ants-float --ants-settings
--deoblique --despike --start-idx --stop-idx --fft-spikes-detector --fd_thres
--verbose-reports --crashfile-format --participant-labels --float32
"""
"""Options of fMRIPrep 25.2.7 and MRIQC 24.0.2 (their cli/parser.py) that brainprior lacks."""


def test_every_option_of_fmriprep_and_mriqc_is_there_or_gets_a_hint():
    known = {option for action in build_parser()._actions for option in action.option_strings}
    options = SISTERS.split()
    assert not known & set(options)
    assert [option for option in options if not advice([option], [])] == []


def test_a_word_that_is_no_option_gets_no_hint(folders):
    with pytest.raises(UsageError) as caught:
        parse_settings([*folders, "--zzz"])
    assert len(str(caught.value).splitlines()) == 2


def test_no_hint_names_an_option_that_there_is():
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert not known & set(HINTS)


def test_a_standard_space_needs_its_template(folders, tmp_path, monkeypatch, capsys):
    """Without it the command ends at once, and nothing is written; with it, res-1 is the same."""
    home = tmp_path / "templates"
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(home))
    asked = [*folders, "--output-spaces", "MNI152NLin2009cAsym:res-1", "anat"]
    assert main(asked) == 2
    messages = capsys.readouterr().err
    assert "--output-spaces MNI152NLin2009cAsym: " in messages
    assert "from templateflow.api import get" in messages
    assert not Path(folders[1]).exists()
    assert not home.exists()
    write_template(home, np.ones((3, 3, 3)), np.eye(4))
    settings = parse_settings(asked)
    assert settings.output_spaces == ("anat", "MNI152NLin2009cAsym")
    assert settings.template_spaces == ("MNI152NLin2009cAsym",)
    write_template(home, np.ones((3, 3, 3)), np.diag([2, 2, 2, 1]))
    assert main(asked) == 2
    assert "voxels of 2 x 2 x 2 mm; only templates of 1 mm are used" in capsys.readouterr().err
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    assert main(asked) == 2
    assert "antspyx" in capsys.readouterr().err


def test_reports_need_no_template(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "none"))
    asked = [*folders, "--output-spaces", "MNI152NLin2009cAsym", "--reports-only"]
    assert parse_settings(asked).template_spaces == ("MNI152NLin2009cAsym",)
