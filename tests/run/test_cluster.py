# SPDX-License-Identifier: Apache-2.0
"""Steps as jobs of a scheduler: argument lines, lost and refused jobs, and the generated script.

``sbatch``, ``squeue`` and ``scancel`` are small scripts here that run a job at once; the real
Slurm is tried by hand (docs/cluster.md).
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from brainprior_bids.workflows.scan import NODES
from nipype.interfaces.utility import Function
from nipype.pipeline import engine as pe

from brainprior_bids.cli.run import main
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.run.cluster import LOST, REFUSED, _last_line, make_batch_plugin
from brainprior_bids.run.plugin_file import BATCH, STEPS, read_plugin_file

ROOT = Path(__file__).resolve().parents[2]

SBATCH = """\
#!/bin/bash
# Runs the job in the background; "victim" is lost, "refuse" is not accepted.
cd "$(dirname "$0")"
echo "$@" >>calls
case "$*" in *--refuse*) echo "sbatch: error: Invalid partition" >&2; exit 1 ;; esac
number=$(( $(cat last 2>/dev/null || echo 0) + 1 ))
echo $number >last
comment=$(sed -n 's/.*--comment=\\([^ ]*\\).*/\\1/p' <<<"$*")
script=${@: -1}
echo "$number $comment" >"job.$number"
if [[ "$script" == *victim* ]]; then
  output=$(sed -n 's/.* -o \\([^ ]*\\).*/\\1/p' <<<" $*")
  echo "slurmstepd: error: Exceeded job memory limit" >"${output/\\%j/$number}"
  rm "job.$number"
else
  (bash "$script"; rm "job.$number") >"log.$number" 2>&1 &
  [[ "$*" == *--dependency* ]] && wait
fi
echo "Submitted batch job $number"
"""
SQUEUE = """\
#!/bin/bash
cd "$(dirname "$0")"
case "$1" in
  -j) cat "job.$2" 2>/dev/null || true ;;
  *) cat job.* 2>/dev/null || true ;;
esac
"""


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("LOGNAME", raising=False)
    return folder


def touch(path):
    from pathlib import Path

    Path(path).touch()


def workflow(tmp_path, names, name="wf"):
    output = pe.Workflow(name=name, base_dir=str(tmp_path))
    for step in names:
        node = pe.Node(Function(["path"], [], touch), name=step, mem_gb=2.0, n_procs=3)
        node.inputs.path = str(tmp_path / f"{step}.done")
        output.add_nodes([node])
    output.config["execution"] = {
        "crashdump_dir": str(tmp_path / "crash"),
        "crashfile_format": "txt",
        "poll_sleep_duration": "0.2",
        "job_finished_timeout": "2",
        "stop_on_first_crash": "false",
    }
    return output


def plugin(graph, name="SLURM", events=None, **step_args):
    return make_batch_plugin(
        name,
        plugin_args={"sbatch_args": "--oversubscribe --mem={mem_mb}M -c {threads}"},
        step_args=step_args,
        workflow=graph,
        status_callback=lambda node, event: (events if events is not None else []).append(
            (node.name, event)
        ),
        tag="brainprior-test",
    )


def test_every_node_has_its_whole_line(tmp_path, scheduler):
    graph = workflow(tmp_path, ["n4", "restore"])
    plugin(graph, restore={"sbatch_args": "--gres=gpu:1 --output=own.txt"})
    n4, restore = (graph.get_node(step).plugin_args for step in ("n4", "restore"))
    output = f"{tmp_path}/wf/batch/slurm-%j.out"
    assert n4["overwrite"]
    assert n4["sbatch_args"].split() == [
        "--oversubscribe", "--mem=2560M", "-c", "3", "-o", output, "-e", output,
    ]  # fmt: skip
    assert restore["sbatch_args"].split() == [
        "--oversubscribe", "--mem=2560M", "-c", "3", "--gres=gpu:1", "--output=own.txt",
        "-e", output,
    ]  # fmt: skip
    assert os.environ["LOGNAME"]


@pytest.mark.parametrize("name", ["sge", "pbs"])
def test_restore_goes_to_the_gpu_queue_alone(tmp_path, monkeypatch, name):
    """As in the plugin files of docs/cluster; Grid Engine would use either of two queues."""
    monkeypatch.setenv("LOGNAME", "somebody")
    (tmp_path / "qstat").write_text("#!/bin/sh\necho '<all><job_info/></all>'\n")
    (tmp_path / "qstat").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file = read_plugin_file(ROOT / "docs" / "cluster" / f"{name}.yml")
    graph = workflow(tmp_path, ["n4", "restore"])
    make_batch_plugin(
        file.plugin,
        plugin_args=file.plugin_args,
        step_args=file.step_args,
        workflow=graph,
        status_callback=lambda node, event: None,
        tag="unused",
    )
    n4, restore = (graph.get_node(s).plugin_args["qsub_args"] for s in ("n4", "restore"))
    assert re.findall(r"-q (\S+)", n4) == [{"sge": "cpu.q", "pbs": "cpu"}[name]]
    assert re.findall(r"-q (\S+)", restore) == [{"sge": "gpu.q", "pbs": "gpu"}[name]]
    assert "2560" in n4
    assert "2560" in restore
    assert "{" not in n4 + restore


def test_a_lost_and_a_refused_job_leave_the_others_alone(tmp_path, scheduler):
    events: list[tuple[str, str]] = []
    graph = workflow(tmp_path, ["victim", "fine", "refused"])
    runner = plugin(graph, events=events, refused={"sbatch_args": "--refuse"})
    runner._retry_timeout = 0
    with pytest.raises(RuntimeError):
        graph.run(plugin=runner)
    assert {name: event for name, event in events if event != "start"} == {
        "victim": "exception",
        "fine": "end",
        "refused": "exception",
    }
    assert (tmp_path / "fine.done").exists()
    messages = {path.read_text() for path in (tmp_path / "crash").glob("*.txt")}
    assert len(messages) == 2
    assert any(f"{LOST} Its last output: slurmstepd: error: Exceeded" in text for text in messages)
    assert any(REFUSED in text and "Invalid partition" in text for text in messages)


@pytest.mark.parametrize("name", ["slurm-7.out", "n4.sub_01_T2w_wf.brainprior_wf.me.e7"])
def test_what_a_lost_job_wrote_is_quoted(tmp_path, name):
    """With the file names of Slurm and Grid Engine; job 17 belongs to another step."""
    batch = tmp_path / "wf" / "batch"
    batch.mkdir(parents=True)
    (batch / name.replace("7", "17")).write_text("not this\n")
    (batch / name).write_text("loading\nout of memory\n\n")
    folder = str(tmp_path / "wf" / "scan" / "n4")
    assert _last_line(folder, 7) == "Its last output: out of memory"


def test_a_graph_of_jobs_is_waited_for(tmp_path, scheduler):
    graph = workflow(tmp_path, ["one", "two"])
    runner = plugin(graph, name="SLURMGraph", two={"sbatch_args": "--gres=gpu:1"})
    graph.run(plugin=runner)
    assert (tmp_path / "one.done").exists()
    assert (tmp_path / "two.done").exists()
    calls = (scheduler / "calls").read_text()
    assert calls.count("--comment=brainprior-test --kill-on-invalid-dep=yes") == 2
    assert calls.count("--mem=2560M -c 3") == 2


def test_a_work_folder_that_nipype_would_not_quote_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not quote"):
        plugin(workflow(tmp_path / "my work", ["n4"]))


def test_the_steps_that_a_file_may_name_are_those_of_the_graph():
    assert STEPS == NODES


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "cluster").glob("*.yml")), ids=str)
def test_the_ready_files_are_read_and_only_restore_asks_for_a_gpu(path):
    file = read_plugin_file(path)
    if file.is_batch:
        assert set(file.step_args) == {"restore"}
        assert "gpu" in str(file.step_args)
        assert "gpu" not in str(file.plugin_args)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plugin: [", "cannot be read"),
        ("n_procs: 3", "expected `plugin:`"),
        ("plugin: Magic", "is not supported"),
        ("plugin: SLURM\nargs: {}", "unknown args"),
        ("plugin: SLURM\nplugin_args: 5", "expected a mapping"),
        ("plugin: SLURM\nstep_args: {restoration: {}}", "no step 'restoration'"),
        ("plugin: MultiProc\nstep_args: {restore: {}}", "for schedulers"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, text, said):
    (tmp_path / "plugin.yml").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_plugin_file(tmp_path / "plugin.yml")


def test_a_scheduler_that_is_not_here_is_said_at_the_start(tmp_path, raw, monkeypatch, capsys):
    """As in a container: no output folder, and no scan that waits forever."""
    monkeypatch.setenv("PATH", str(tmp_path))
    file = str(ROOT / "docs" / "cluster" / "slurm.yml")
    line = [str(raw), str(tmp_path / "out"), "participant", "--nipype-plugin-file", file]
    assert main(line) == 2
    assert "needs sbatch, which is not on the PATH" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_file_is_multiproc():
    assert read_plugin_file(None).plugin not in BATCH


@pytest.fixture
def raw(tmp_path):
    for subject in ("01", "02", "x3"):
        folder = tmp_path / "raw" / f"sub-{subject}" / "anat"
        folder.mkdir(parents=True)
        (folder / f"sub-{subject}_T2w.nii.gz").touch()
    (tmp_path / "raw" / "dataset_description.json").write_text(
        '{"Name": "test", "BIDSVersion": "1.10.0"}'
    )
    return tmp_path / "raw"


def test_the_script_submits_one_task_a_participant(tmp_path, raw, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "submit.sh"
    code = main(
        ["slurm-script", "--sbatch", "--partition=gpu --gres=gpu:1", "--max-running", "2",
         "--sbatch", "--time=10",
         "--launcher", "echo run", "-o", str(script), str(raw), str(tmp_path / "out"),
         "participant", "--device", "cuda", "--participant-label", "01", "x3"]
    )  # fmt: skip
    assert code == 0
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\ncat >{tmp_path}/job.$(date +%N)\necho "7;lab"\n'
    )
    (folder / "sbatch").chmod(0o755)
    done = subprocess.run(
        ["bash", script],
        env={"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "array job 7\ngroup job 7" in done.stdout
    assert "--dependency=afterany:7 --export=ALL,ARRAY=7\n" in (tmp_path / "calls").read_text()
    (task,) = (p for p in tmp_path.glob("job.*") if "--array" in p.read_text())
    text = task.read_text()
    assert "#SBATCH --array=0-1%2\n" in text
    assert "#SBATCH --partition=gpu --gres=gpu:1\n#SBATCH --time=10\n" in text
    ran = subprocess.run(
        ["bash", task],
        env={
            "PATH": os.environ["PATH"],
            "SLURM_ARRAY_JOB_ID": "7",
            "SLURM_ARRAY_TASK_ID": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert ran[:5] == ["run", str(raw), str(tmp_path / "out"), "participant", "--device"]
    assert ran[5:8] == ["cuda", "--participant-label", "x3"]
    assert ran[-2:] == ["--job-id", "7_1"]
    (group,) = (p for p in tmp_path.glob("job.*") if "--array" not in p.read_text())
    ran = subprocess.run(
        ["bash", group],
        env={"PATH": os.environ["PATH"], "ARRAY": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert ran == [
        "run", str(raw), str(tmp_path / "out"), "group", "--device", "cuda", "--device", "cpu",
        "--participant-label", "01", "x3", "--job-id", "7",
    ]  # fmt: skip


def test_a_scan_that_no_task_began_has_failed_and_has_its_report(tmp_path, raw, capsys):
    """Its task was refused (no GPU, too little memory), or died in the queue."""
    out = tmp_path / "out"
    line = [str(raw), str(out), "group", "--device", "cpu", "--participant-label", "01", "x3"]
    assert main([*line, "--job-id", "7"]) == 2
    assert "no scan is done" in capsys.readouterr().err
    rows = (out / "logs" / "status.tsv").read_text().splitlines()[1:]
    assert [row.split("\t")[2] for row in rows] == ["failed", "failed"]
    assert all("job 7 ended before this scan was started" in row for row in rows)
    assert "was started" in (out / "sub-01.html").read_text()
    assert not (out / "sub-02.html").exists()


def test_the_level_is_found_beside_a_value_of_its_name(tmp_path, raw, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["-w", "participant", str(raw), "out", "participant", "-m", "T2w"]
    assert main(["slurm-script", *line]) == 0
    assert f"brainprior -w participant {raw} out group -m T2w --device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--max-running", "0"], "at least 1"),
        (["--frobnicate"], "--frobnicate"),
        (["--participant-label", "77"], "77"),
    ],
)
def test_the_script_is_refused_for_what_a_task_would_be(tmp_path, raw, extra, said, capsys):
    assert main(["slurm-script", str(raw), str(tmp_path / "out"), "participant", *extra]) == 2
    assert said in capsys.readouterr().err


def test_folders_with_spaces_are_quoted_as_sbatch_reads_them(tmp_path, raw, monkeypatch, capsys):
    """sbatch 22.05 reports for these lines: Found in script, argument "--output=… my out/…"."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "my out"
    assert main(["slurm-script", str(raw), str(out), "participant"]) == 0
    text = capsys.readouterr().out
    assert f"#SBATCH --output='{out}/logs/slurm/%A_%a.out'\n" in text
    assert f"#SBATCH --output='{out}/logs/slurm/%j_group.out'\n" in text
    assert f"brainprior {raw} '{out}' participant " in text
