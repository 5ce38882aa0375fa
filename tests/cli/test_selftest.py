# SPDX-License-Identifier: Apache-2.0
"""The self-test, the choice of the device, and the agreement of container files with setup.cfg."""

from __future__ import annotations

import configparser
import re
import shutil
from pathlib import Path

import pytest
import torch

from brainprior_bids.cli.run import main
from brainprior_bids.engine import weights
from brainprior_bids.engine.device import choose_device
from brainprior_bids.engine.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_this_installation_passes(capsys):
    assert main(["selftest", "--device", "cpu"]) == 0
    messages = capsys.readouterr().out
    assert "self-test passed" in messages
    for kind in ("prior", "parcellation"):
        digest = weights.sha256_file(weights.FOLDER / f"{kind}.safetensors")
        assert f"weights of the {kind} are intact, SHA-256 {digest}" in messages


def test_changed_weights_do_not_pass(tmp_path, monkeypatch, capsys):
    for file in weights.FOLDER.glob("*.safetensors"):
        shutil.copy(file, tmp_path)
    content = bytearray((tmp_path / "parcellation.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "parcellation.safetensors").write_bytes(content)
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    assert main(["selftest", "--device", "cpu"]) == 1
    assert "parcellation.safetensors" in capsys.readouterr().err


def test_a_gpu_that_was_asked_for_and_is_not_there_stops(no_gpu):
    with pytest.raises(UsageError, match=r"--gpus all.*--nv"):
        choose_device("cuda")


@pytest.mark.parametrize("command", [["selftest"], ["raw", "out", "participant"]], ids=str)
def test_the_command_ends_with_2_and_names_the_flags(
    no_gpu, tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--device", "cuda"]) == 2
    messages = capsys.readouterr().err
    assert "--gpus all" in messages
    assert "--nv" in messages
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environ", "driver", "said", "doubtful"),
    [
        ({}, "nowhere", "no GPU found", False),
        ({"CUDA_VISIBLE_DEVICES": ""}, "nowhere", "no GPU found", False),
        ({"SLURM_JOB_GPUS": "0"}, "nowhere", "SLURM_JOB_GPUS=0", True),
        ({}, "version", "NVIDIA's driver", True),
    ],
)
def test_auto_without_a_gpu_says_why_it_takes_the_cpu(
    no_gpu, tmp_path, environ, driver, said, doubtful
):
    (tmp_path / "version").touch()
    device, why, doubt = choose_device("auto", environ=environ, driver=tmp_path / driver)
    assert (device, doubt) == ("cpu", doubtful)
    assert said in why


def test_a_cuda_build_that_sees_nothing_names_the_flags(no_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (tmp_path / "version").touch()
    _, why, _ = choose_device("auto", environ={}, driver=tmp_path / "version")
    assert "--gpus all" in why
    assert "--nv" in why


def test_the_container_files_name_this_version():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    version = config["metadata"]["version"]
    assert f"ARG VERSION={version}\n" in (ROOT / "Dockerfile").read_text()
    assert f"    VERSION={version}\n" in (ROOT / "Singularity.def").read_text()


def test_the_image_gets_every_folder_of_the_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = set(re.findall(r"= *(\w+)$", config["options"]["package_dir"], re.MULTILINE))
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    definition = (ROOT / "Singularity.def").read_text()
    assert folders == {"brainprior_bids", "workflows"}
    for folder in folders:
        assert f"!{folder}" in ignored
        assert f"    {folder} /src/{folder}\n" in definition


@pytest.mark.parametrize("name", ["Dockerfile", "Singularity.def"])
def test_torch_comes_alone_from_its_own_index(name):
    """PyTorch's index has other versions of torch's dependencies than constraints.txt."""
    (command,) = re.findall(
        r"bin/pip install((?:.*\\\n)+.*--index-url.* torch)$", (ROOT / name).read_text(), re.M
    )
    assert "--no-deps" in command
    assert "-c constraints.txt" in command
