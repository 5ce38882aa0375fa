# SPDX-License-Identifier: Apache-2.0
"""Unusable options, settings files and environments cause a one-sentence error, no traceback."""

from __future__ import annotations

import errno
import json
import multiprocessing
import multiprocessing.util
import os
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from brainprior_bids.bids import patterns
from brainprior_bids.cli.parser import parse_settings
from brainprior_bids.cli.run import main
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.run import analysis_levels, environment
from brainprior_bids.run.resources import memory_limit_gb
from brainprior_bids.settings import Settings


@pytest.fixture
def raw(tmp_path):
    root = tmp_path / "raw"
    (root / "sub-01" / "anat").mkdir(parents=True)
    (root / "sub-01" / "anat" / "sub-01_run-1_T1w.nii.gz").write_bytes(b"x")
    (root / "dataset_description.json").write_text('{"Name": "t", "BIDSVersion": "1.10.0"}')
    return root


def refused(raw, capsys, *options):
    """The error message of options for which the command exits with 2."""
    assert main([str(raw), str(raw.parent / "out"), "participant", *map(str, options)]) == 2
    messages = capsys.readouterr().err
    assert "Traceback" not in messages
    assert "brainprior: error: " in messages
    assert len(messages) < 1500
    return messages


@pytest.mark.parametrize("run", ["9" * 5000, "²", "1.5", "٣", "", "run-"])
def test_a_run_is_a_number(raw, capsys, run):
    assert "a run is a whole number" in refused(raw, capsys, "--run-id", run)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--n-samples", "9" * 5000),
        ("--n-samples", "²"),
        ("--random-seed", "9" * 5000),
        ("--mem", "9" * 400),
        ("--device", "cuda:" + "9" * 5000),
        ("--device", "cuda:²"),
    ],
)
def test_numbers_have_an_end(raw, capsys, option, value):
    assert "expected" in refused(raw, capsys, option, value)


BAD_PATTERNS = [
    "{subject.x}", "{subject.__class__}", "{subject[0]}", "{subject!r}", "{subject:>999999999}",
    "{}", "{0}", "{other}", "{subject", "}", "", "/", "**a/{subject}.nii", ".",
]  # fmt: skip


@pytest.mark.parametrize("pattern", BAD_PATTERNS)
def test_a_pattern_has_the_known_names_alone(raw, capsys, pattern):
    messages = refused(raw, capsys, "--task", "inpaint", "--lesion-mask", pattern)
    assert "{subject}, {session}, {suffix} or {stem}" in messages


def test_a_pattern_is_filled():
    values = {"subject": "01", "session": "", "suffix": "T1w", "stem": "sub-01_T1w"}
    assert patterns.fill("/m/{{a}}/{subject}{session}*_{stem}.nii", values) == (
        "/m/{a}/01*_sub-01_T1w.nii"
    )
    patterns.check("//masks/{subject}/*.nii.gz")


@given(st.text(max_size=30))
@hypothesis_settings(max_examples=200, deadline=None)
def test_any_pattern_is_used_or_refused(pattern):
    with suppress(ValueError):
        patterns.check(pattern)


BAD_FILTERS = {
    "nested list": {"t1w": {"acquisition": [["a"]]}},
    "object": {"t1w": {"acquisition": {"a": 1}}},
    "return type": {"t1w": {"return_type": "id", "target": "subject"}},
    "scope": {"t1w": {"scope": "derivatives"}},
    "regular expression": {"t1w": {"regex_search": True, "acquisition": "("}},
    "invalid filters": {"t1w": {"invalid_filters": "allow"}},
    "paths": {"t1w": {"absolute_paths": False}},
    "filters": {"t1w": {"filters": {"a": 1}}},
    "self": {"t1w": {"self": 1}},
    "huge integer": {"t1w": {"run": 10**30}},
    "not a number": {"t1w": {"run": float("nan")}},
    "half a surrogate": {"t1w": {"acquisition": "\ud800"}},
    "extension": {"t1w": {"extension": ".json"}},
    "data type": {"t1w": {"datatype": "func"}},
    "suffix": {"t1w": {"suffix": "bold"}},
    "unknown entity": {"t1w": {"foo": 1}},
    "unknown contrast": {"foo\ud800": {}},
    "list": [],
}


@pytest.mark.parametrize("kind", BAD_FILTERS)
def test_a_filter_that_cannot_be_used_is_named(raw, tmp_path, capsys, kind):
    path = tmp_path / "f.json"
    path.write_text(json.dumps(BAD_FILTERS[kind]))
    assert "--bids-filter-file" in refused(raw, capsys, "--bids-filter-file", path, "--dry-run")


@pytest.mark.parametrize(
    "text", ["{", '{"t1w": ' + "[" * 100_000, '{"t1w": {"run": 1' + "0" * 5000]
)
def test_a_filter_file_is_json(raw, tmp_path, capsys, text):
    path = tmp_path / "f.json"
    path.write_text(text)
    assert "is not valid JSON" in refused(raw, capsys, "--bids-filter-file", path)


def test_the_filters_of_fmriprep_are_taken(raw, tmp_path):
    path = tmp_path / "f.json"
    query = {"datatype": "anat", "suffix": "T1w", "extension": [".nii", ".nii.gz"], "run": 1}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"t1w": query, "pdt2": {}}).encode())
    settings = parse_settings(
        [str(raw), str(tmp_path / "out"), "participant", "--bids-filter-file", str(path)]
    )
    assert settings.bids_filters == {"T1w": query}


BAD_CONFIGS = {
    "no TOML": "= =",
    "deep": "[brainprior]\nx = " + "[" * 5000 + "]" * 5000,
    "filters that are a list": "[brainprior]\nbids_filters = '[1]'\n",
    "filters of a number": "[brainprior]\nbids_filters = '{\"T1w\": 5}'\n",
    "filters of pybids": '[brainprior]\nbids_filters = \'{"T1w": {"return_type": "id"}}\'\n',
    "derivatives that are a number": "[brainprior]\nderivatives = '5'\n",
    "derivatives that are no JSON": "[brainprior]\nderivatives = 'x'\n",
    "deep JSON": "[brainprior]\nderivatives = '" + "[" * 100_000 + "'\n",
    "exports of a list": "[brainprior]\nexports = '{\"raw\": [1]}'\n",
    "help as a label": "[brainprior]\nparticipant_label = ['--help']\n",
    "a zero byte": '[brainprior]\nwork_dir = "a\\u0000b"\n',
    "a negative number": "[brainprior]\nn_samples = -1\n",
    "an integer without end": "[brainprior]\nn_samples = 1" + "0" * 5000 + "\n",
    "binary": "\0\1\2",
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_configuration_that_cannot_be_used_is_named(raw, tmp_path, capsys, kind):
    path = tmp_path / "c.toml"
    path.write_text(BAD_CONFIGS[kind])
    assert "--config-file" in refused(raw, capsys, "--config-file", path)


def test_an_option_as_a_value_of_the_configuration_is_its_text(raw, tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text(
        "[brainprior]\nlesion_mask = '--help'\ntask = 'inpaint'\nverbose = 100000000\n"
    )
    arguments = [str(raw), str(tmp_path / "o"), "participant", "--config-file", str(path)]
    assert parse_settings(arguments).lesion_mask == "--help"


BAD_PLUGINS = {
    "code": '!!python/object/apply:os.system ["true"]',
    "unknown": "plugin: os.system\n",
    "a list as the name": "plugin: [MultiProc]\n",
    "deep": "plugin: " + "[" * 20_000,
    "no processors": "plugin: MultiProc\nplugin_args: {n_procs: -1}\n",
    "text for a number": "plugin: MultiProc\nplugin_args: {n_procs: x}\n",
    "text for memory": "plugin: MultiProc\nplugin_args: {memory_gb: y}\n",
    "truth for memory": "plugin: MultiProc\nplugin_args: {memory_gb: true}\n",
    "memory that is no number": "plugin: MultiProc\nplugin_args: {memory_gb: .nan}\n",
    "context": "plugin: MultiProc\nplugin_args: {mp_context: nonsense}\n",
    "a list of arguments": "plugin: SLURM\nplugin_args: {sbatch_args: [a]}\n",
    "step arguments": "plugin: SLURM\nstep_args: {restore: {sbatch_args: {a: 1}}}\n",
    "doubling": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{c}: &{c} [{','.join(['*' + b] * 9)}]\n" for b, c in pairwise("abcdefghi")),
    "doubling in arguments": "plugin: MultiProc\nplugin_args: &a {b: &b [1,1], c: [*b, *b]}\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_PLUGINS)
def test_a_plugin_file_that_cannot_be_used_is_named(raw, tmp_path, capsys, kind):
    path = tmp_path / "p.yml"
    path.write_text(BAD_PLUGINS[kind])
    assert "--nipype-plugin-file" in refused(raw, capsys, "--nipype-plugin-file", path)


def test_folders_that_are_files(raw, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    messages = refused(raw, capsys, "--bids-database-dir", file)
    assert "Choose another" in messages
    with pytest.raises(UsageError, match=r"--work-dir .*Not a directory"):
        environment.prepare_environment(Settings(raw, tmp_path / "o", file / "work"))
    assert "cannot be written" in (
        main([str(raw), str(file / "out"), "participant"]) == 2 and capsys.readouterr().err
    )


def test_a_description_of_another_type_in_the_output_folder(raw, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "dataset_description.json").write_text('{"GeneratedBy": 5}')
    assert "did not write" in refused(raw, capsys)


@pytest.mark.parametrize(
    ("environ", "gb"),
    [
        ({"SLURM_MEM_PER_NODE": "8"}, 8 / 1024),
        ({"SLURM_MEM_PER_NODE": "16M"}, 16 / 1024),
        ({"SLURM_MEM_PER_NODE": "0.5G"}, 0.5),
        ({"SLURM_MEM_PER_CPU": "64", "SLURM_CPUS_ON_NODE": "2(x3)"}, 0.125),
        ({"SLURM_MEM_PER_NODE": "abc"}, None),
        ({"SLURM_MEM_PER_NODE": ""}, None),
        ({"SLURM_MEM_PER_CPU": "64", "SLURM_CPUS_ON_NODE": "x"}, None),
        ({"SLURM_MEM_PER_NODE": "9" * 5000}, None),
    ],
)
def test_what_slurm_says_of_memory(environ, gb, tmp_path):
    places = {"cgroup": tmp_path, "proc": tmp_path / "none"}
    unlimited, _ = memory_limit_gb(**places, environ={})
    assert memory_limit_gb(**places, environ=environ)[0] == pytest.approx(gb or unlimited)


def test_a_per_cent_sign_in_the_output_folder(raw, tmp_path, monkeypatch):
    from brainprior_bids.workflows.base import configure_nipype
    from nipype import config

    before = config.get("execution", "crashdump_dir"), config.get("logging", "log_directory")
    out = tmp_path / "My%20Study%"
    try:
        configure_nipype(Settings(raw, out, out / "w"), crash_dir=out / "logs")
        assert config.get("execution", "crashdump_dir") == str(out / "logs")
        assert config.get("logging", "log_directory") == str(out / "logs")
    finally:
        config.set("execution", "crashdump_dir", before[0] or "")
        config.set("logging", "log_directory", before[1])


def in_new_process(code, **environ):
    """Output of Python code in a separate environment."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        check=False,
    )


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_the_help_is_shown_in_any_locale():
    code = "from brainprior_bids.cli.run import main; main(['--help'])"
    result = in_new_process(code, HOME="/nonexistent", **ASCII)
    assert result.returncode == 0, result.stderr
    assert b"exit codes" in result.stdout


def test_text_files_are_utf8_in_any_locale(tmp_path):
    path = tmp_path / "x"
    path.write_text("–×", encoding="utf-8")
    code = "from brainprior_bids.run.environment import prepare_process as p; p();"
    code += f"assert open({str(path)!r}).read() == '\\u2013\\xd7'"
    result = in_new_process(code, HOME="/nonexistent", **ASCII)
    assert result.returncode == 0, result.stderr


def test_a_user_without_home_and_name(monkeypatch):
    import pwd

    def unknown(_):
        raise KeyError("no such user")

    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("HOME", "x")
    monkeypatch.delenv("HOME")  # both are put back after the test
    monkeypatch.setenv("LOGNAME", "x")
    monkeypatch.delenv("LOGNAME")
    environment.prepare_process()
    assert Path.home() == Path("/nonexistent")
    assert os.environ["LOGNAME"].startswith("uid")


def test_sockets_have_short_paths(tmp_path):
    long = tmp_path / ("t" * 60) / ("u" * 60)
    long.mkdir(parents=True)
    code = (
        "import tempfile, multiprocessing.connection as c\n"
        "from brainprior_bids.run.environment import find_place_for_sockets, why_no_workers\n"
        "find_place_for_sockets(tempfile.gettempdir())\n"
        "c.Listener(family='AF_UNIX'); print(tempfile.gettempdir())\n"
        "assert why_no_workers() is None"
    )
    result = in_new_process(code, TMPDIR=str(long))
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode().strip() == str(
        long
    )  # everything else stays in the requested folder


def test_why_no_worker_can_start(monkeypatch, tmp_path):
    def lock(self):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(multiprocessing.context.BaseContext, "Lock", lock)
    assert "/dev/shm cannot be used (Read-only file system)" in environment.why_no_workers()
    monkeypatch.undo()
    monkeypatch.setattr(multiprocessing.util, "get_temp_dir", lambda: "/" + "x" * 100)
    assert "set TMPDIR" in environment.why_no_workers()


def test_without_workers_the_steps_run_in_turn(monkeypatch, raw, tmp_path, told):
    from brainprior_bids.run import execute

    monkeypatch.setattr(execute, "why_no_workers", lambda: "it is a test")
    plugin = execute.make_plugin(None, Settings(raw, tmp_path / "o", tmp_path / "w"), print)
    assert type(plugin).__name__ == "InTurn"
    plugin.stop()
    assert "it is a test" in told.text


def test_what_nobody_thought_of_is_one_line_and_a_file(monkeypatch, raw, tmp_path, capsys):
    def fail(settings):
        raise ZeroDivisionError("nobody\nthought of it")

    (tmp_path / "out" / "logs").mkdir(parents=True)
    monkeypatch.setattr(analysis_levels, "run", fail)
    assert main([str(raw), str(tmp_path / "out"), "participant"]) == 1
    messages = capsys.readouterr().err
    (crash,) = (tmp_path / "out" / "logs").glob("crash-*.txt")
    line = messages.splitlines()[-1]
    assert line.startswith("brainprior: failed: unexpected error: nobody thought of it.")
    assert str(crash) in line
    assert "Traceback" not in messages
    assert "ZeroDivisionError" in crash.read_text()


def test_a_log_takes_names_that_are_not_text(tmp_path, capsys):
    from brainprior_bids.run.logs import LOG, log_to_file

    handler = log_to_file(tmp_path / "x.log")
    try:
        LOG.warning("%s", "sub-\udcff")
    finally:
        LOG.removeHandler(handler)
        handler.close()
    assert "sub-\\udcff" in (tmp_path / "x.log").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["{out}\udcff", "participant"],
        ["{out}", "participant", "-w", "{out}\udcff"],
        ["{out}", "participant", "--lesion-mask", "\udcff.nii.gz", "--task", "inpaint"],
        ["{out}", "participant", "--export", "raw={out}\udcff"],
        ["{out}", "participant", "--participant-label", "\udcff"],
    ],
)
def test_an_argument_that_is_not_text_is_refused(raw, tmp_path, capsys, words):
    """TOML and JSON cannot represent it: the settings of such a run could not be read again."""
    words = [word.replace("{out}", str(tmp_path / "out")) for word in words]
    assert main([str(raw), *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("brainprior: error: the argument ")
    assert "\\udcff" in line
    assert "is not UTF-8 text" in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("text", ["\udcff", "\\udcff"])
def test_a_configuration_with_what_is_not_text_is_refused(raw, tmp_path, capsys, text):
    path = tmp_path / "brainprior.toml"
    content = f'[brainprior]\nwork_dir = "/tmp/{text}"\n'
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    words = [str(raw), str(tmp_path / "out"), "participant", "--config-file", str(path)]
    if "\\" in text:
        assert main(words) == 2
        assert "--config-file" in capsys.readouterr().err.splitlines()[-1]
    else:  # bytes in a file are read as Latin-1
        assert str(parse_settings([*words, "--device", "cpu"]).work_dir) == "/tmp/ÿ"


@given(st.binary(max_size=80))
@hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_file_of_settings_ends_in_a_traceback(raw, tmp_path, content):
    path = tmp_path / "any"
    path.write_bytes(content)
    for option in ("--config-file", "--nipype-plugin-file", "--bids-filter-file"):
        with suppress(UsageError):
            folders = [str(raw), str(tmp_path / "o")]
            parse_settings([*folders, "participant", "--device", "cpu", option, str(path)])


def test_a_per_cent_sign_is_refused_before_a_job_is_submitted(tmp_path):
    """Nipype writes the folder into the script of the job, and reads it as a placeholder there."""
    from brainprior_bids.run.plugin_file import PluginFile, require_scheduler

    with pytest.raises(UsageError, match="per cent sign"):
        require_scheduler(PluginFile("SLURM"), tmp_path / "My%20Study")
    require_scheduler(PluginFile(), tmp_path / "My%20Study")
