# SPDX-License-Identifier: Apache-2.0
"""The limits of a container or a job, by both versions of cgroups."""

from __future__ import annotations

import pytest

from brainprior_bids.cli import resources

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
    assert resources.available_memory_gb(tmp_path, proc) == pytest.approx(0.9)
    assert resources.available_processors(tmp_path, proc) == 1


def test_version_1_in_a_container_that_sees_its_group_as_the_root(tmp_path, proc):
    proc.write_text("4:memory:/docker/0123\n2:cpu:/docker/0123\n")
    write(tmp_path / "memory/memory.limit_in_bytes", f"{GIB // 2}\n")
    assert resources.available_memory_gb(tmp_path, proc) == pytest.approx(0.45)


def test_version_2_the_smallest_limit_on_the_way_up_counts(tmp_path, proc):
    proc.write_text("0::/a/b\n")
    write(tmp_path / "a/b/memory.max", "max\n")
    write(tmp_path / "a/memory.max", f"{GIB}\n")
    write(tmp_path / "other/memory.max", "1000\n")
    assert resources.available_memory_gb(tmp_path, proc) == pytest.approx(0.9)


def test_without_limits_it_is_the_machine(tmp_path, proc):
    proc.write_text("2:cpu:/\n4:memory:/\n")
    write(tmp_path / "cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu/cpu.cfs_period_us", "100000\n")
    assert resources.available_memory_gb(tmp_path, proc) > 0.5
    assert resources.available_processors(tmp_path, proc) >= 1
