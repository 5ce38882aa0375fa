# SPDX-License-Identifier: Apache-2.0
"""The limits of a container or a job, by both versions of cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from brainprior_bids.cli.run import main
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.run import resources
from brainprior_bids.settings import Settings

GIB = 2**30


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def proc(tmp_path):
    return tmp_path / "proc"


def test_version_1_with_the_limit_on_a_group_above(tmp_path, proc):
    proc.write_text("4:memory:/slurm/job_7/step_0\n2:cpu,cpuacct:/slurm/job_7\n0::/\n")
    write(tmp_path / "memory/slurm/job_7/step_0/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path / "memory/slurm/job_7/memory.limit_in_bytes", f"{GIB}\n")
    write(tmp_path / "cpu/slurm/job_7/cpu.cfs_quota_us", "150000\n")
    write(tmp_path / "cpu/slurm/job_7/cpu.cfs_period_us", "100000\n")
    assert resources.memory_limit_gb(tmp_path, proc, {})[0] == pytest.approx(1.0)
    assert resources.available_processors(tmp_path, proc) == 1


def test_version_1_in_a_container_that_sees_its_group_as_the_root(tmp_path, proc):
    proc.write_text("4:memory:/docker/0123\n2:cpu:/docker/0123\n")
    write(tmp_path / "memory/memory.limit_in_bytes", f"{GIB // 2}\n")
    assert resources.memory_limit_gb(tmp_path, proc, {})[0] == pytest.approx(0.5)


def test_version_2_the_smallest_limit_on_the_way_up_counts(tmp_path, proc):
    proc.write_text("0::/a/b\n")
    write(tmp_path / "a/b/memory.max", "max\n")
    write(tmp_path / "a/memory.max", f"{GIB}\n")
    write(tmp_path / "other/memory.max", "1000\n")
    assert resources.memory_limit_gb(tmp_path, proc, {})[0] == pytest.approx(1.0)


def test_without_limits_it_is_the_machine(tmp_path, proc):
    proc.write_text("2:cpu:/\n4:memory:/\n")
    write(tmp_path / "cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu/cpu.cfs_period_us", "100000\n")
    assert resources.memory_limit_gb(tmp_path, proc, {})[0] > 0.5
    assert resources.available_processors(tmp_path, proc) >= 1


def test_what_slurm_gave_counts_where_no_group_enforces_it(tmp_path, proc):
    def limit(**environ):
        return resources.memory_limit_gb(tmp_path, proc, environ)[0]

    assert limit(SLURM_MEM_PER_NODE="512") == pytest.approx(0.5)
    assert limit(SLURM_MEM_PER_CPU="256", SLURM_CPUS_ON_NODE="3") == pytest.approx(0.75)
    assert limit(SLURM_MEM_PER_NODE="0") == limit()  # the whole machine


def settings(**given):
    return Settings(Path("/raw"), Path("/out"), Path("/work"), **given)


def fit(limit_gb, **given):
    there = resources.memory_for_steps_gb(limit_gb)
    return resources.fit_memory(
        settings(**{"mem_gb": there, **given}),
        largest_gb=3.0,
        largest_low_gb=2.0,
        limit=(limit_gb, "the container has"),
    ).mem_gb


def test_a_run_fits_from_the_claim_of_its_largest_step_on():
    assert fit(4.0) == pytest.approx(3.0)  # `docker run --memory 4g`
    assert fit(100.0) == pytest.approx(90.0)
    assert fit(3.0, low_mem=True) == pytest.approx(2.0)
    assert fit(16.0, mem_gb=3.0) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("limit_gb", "given", "said"),
    [
        (3.9, {}, "container has 3.9 GiB. Give it 4 GiB, or pass --low-mem, with which 3 GiB"),
        (2.9, {"low_mem": True}, r"up to 2 GiB .* Give it 3 GiB\.$"),
        (16.0, {"mem_gb": 2.0}, r"--mem allows its steps 2 GiB\. Pass --mem 3G, or"),
        (0.5, {}, "Give it 4 GiB"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_is_needed_and_what_is_there(limit_gb, given, said):
    with pytest.raises(UsageError, match=said):
        fit(limit_gb, **given)


def test_more_than_there_is_is_cut_down_and_said(told):
    assert fit(8.0, mem_gb=64.0) == pytest.approx(7.0)
    assert "--mem 64 GiB is more than is available: the container has 8 GiB" in told.text


def test_the_command_stops_at_the_start(tmp_path, monkeypatch, capsys):
    """In a container of 2 GiB, version 2 of cgroups: exit 2, and no output folder."""
    folder = tmp_path / "raw" / "sub-01" / "anat"
    folder.mkdir(parents=True)
    (folder / "sub-01_T2w.nii.gz").touch()
    write(tmp_path / "raw" / "dataset_description.json", '{"Name": "t", "BIDSVersion": "1.10.0"}')
    write(tmp_path / "group" / "memory.max", f"{2 * GIB}\n")
    monkeypatch.setattr(resources, "CGROUP", tmp_path / "group")
    monkeypatch.setattr(resources, "PROC", tmp_path / "none")
    command = [str(tmp_path / "raw"), str(tmp_path / "out"), "participant", "--device", "cpu"]
    assert main(command) == 2
    messages = capsys.readouterr().err
    assert "not enough memory" in messages
    assert f"the container or job has ({tmp_path / 'group' / 'memory.max'}) 2 GiB" in messages
    assert not (tmp_path / "out").exists()
    assert main([*command, "--low-mem"]) == 2
    assert "Give it 3.5 GiB." in capsys.readouterr().err


def test_a_containers_limits_count(tmp_path):
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text(str(2**31))
    assert resources.available_processors(tmp_path, tmp_path / "none") == 1
    assert resources.memory_limit_gb(tmp_path, tmp_path / "none", {})[0] == pytest.approx(2)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.available_processors(tmp_path, tmp_path / "none") >= 1
