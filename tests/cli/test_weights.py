# SPDX-License-Identifier: Apache-2.0
"""``brainprior weights``: list, verify, add; ``--prior NAME``."""

import shutil

import pytest
import torch

from brainprior_bids.cli.parser import parse_settings
from brainprior_bids.cli.run import main
from brainprior_bids.engine.denoiser import ErrorSpectrum, Precondition
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.unet import UNet
from brainprior_bids.engine.weights import FOLDER, prior_state, sha256_file, write_weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder, empty."""
    monkeypatch.setenv("BRAINPRIOR_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def own(tmp_path):
    """A small prior of the user."""
    network = UNet((8, 8), (1, 1))
    model = Precondition(network, torch.ones(8))
    facts = {"kind": "prior", "name": "mine", "licence": "CC0", "training_data": "none"}
    path = tmp_path / "big.safetensors"
    state = prior_state(model, {"unknown": ErrorSpectrum.isotropic(0.2)})
    write_weights(path, state, {**facts, "config": network.config})
    return path


def test_the_embedded_weights_are_listed_and_whole(folder, capsys):
    assert main(["weights", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[:2] for line in lines[1:]] == [
        ["embedded prior", "prior"],
        ["embedded coarse", "coarse"],
        ["embedded parcellation", "parcellation"],
    ]
    assert sha256_file(FOLDER / "prior.safetensors") in lines[1]
    assert main(["weights", "verify"]) == 0
    assert "3 file(s) checked, 0 not usable" in capsys.readouterr().out


def test_a_file_that_was_added_is_found_by_its_name(folder, own, tmp_path, capsys):
    sha256 = sha256_file(own)
    assert main(["weights", "add", str(own), "--sha256", sha256]) == 0
    assert "--prior big" in capsys.readouterr().out
    assert sha256_file(folder / "big.safetensors") == sha256
    assert (folder / "big.safetensors.sha256").read_text() == f"{sha256}  big.safetensors\n"
    assert main(["weights", "list"]) == 0
    assert f"big\tprior\tmine\tCC0\t{sha256}\t" in capsys.readouterr().out
    (tmp_path / "bids").mkdir()
    words = [str(tmp_path / "bids"), str(tmp_path / "out"), "participant", "--prior"]
    assert parse_settings([*words, "big"]).prior == folder / "big.safetensors"
    assert parse_settings([*words, str(own)]).prior == own
    assert parse_settings([*words, "embedded"]).prior == FOLDER / "prior.safetensors"
    with pytest.raises(UsageError, match="one of the names embedded, big"):
        parse_settings([*words, "bigger"])


def test_a_name_is_not_taken_twice_without_force(folder, own, capsys):
    assert main(["weights", "add", str(own), "--name", "a"]) == 0
    assert main(["weights", "add", str(own), "--name", "a"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["weights", "add", str(own), "--name", "a", "--force"]) == 0
    for name in ("../a", "embedded", ""):
        words = ["weights", "add", str(own), f"--name={name}"]
        assert main(words) == (2 if name else 0)  # no name: the file's


def test_what_is_no_weights_file_is_not_added(folder, own, tmp_path, capsys):
    broken = tmp_path / "broken.safetensors"
    content = bytearray(own.read_bytes())
    content[-3] ^= 1
    broken.write_bytes(content)
    for path, text in (
        (broken, "do not match their SHA-256"),
        (tmp_path / "none.safetensors", "no such weights file"),
    ):
        assert main(["weights", "add", str(path)]) == 1
        assert text in capsys.readouterr().err
    assert main(["weights", "add", str(own), "--sha256", "0" * 64]) == 1
    assert "expected 000" in capsys.readouterr().err
    assert not folder.exists()


def test_verify_notices_a_file_that_changed(folder, own, capsys):
    assert main(["weights", "add", str(own), "--name", "a"]) == 0
    assert main(["weights", "verify", "a"]) == 0
    assert "file as added" in capsys.readouterr().out
    path = folder / "a.safetensors"
    shutil.copyfile(FOLDER / "prior.safetensors", path)  # intact, but not the file that was added
    assert main(["weights", "verify"]) == 1
    shown = capsys.readouterr().out
    assert "BAD\ta\tSHA-256 is" in shown
    assert "4 file(s) checked, 1 not usable" in shown
    path.write_bytes(b"nothing")
    assert main(["weights", "verify", "a"]) == 1
    assert main(["weights", "list"]) == 0
    assert "a\tunusable" in capsys.readouterr().out
