# SPDX-License-Identifier: Apache-2.0
"""Training in two processes takes the steps of one process with the double batch."""

import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from brainprior_bids.cli.run import main
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.training import parcellation, preprocess, prior, processes
from brainprior_bids.training.prior import Numbers

# float32, so that rounding is all that may differ
SCRIPT = """
import sys
from brainprior_bids.cli.run import main
from brainprior_bids.training import parcellation, prior
prior.fast_dtype = parcellation.fast_dtype = lambda device: None
prior.leave = parcellation.leave = lambda: None  # one group serves both trainings
for line in sys.argv[1:]:
    assert main(line.split()) == 0
"""


def a_brain():
    rng = np.random.default_rng(0)
    r = np.linalg.norm(
        np.indices((24, 26, 22)) - np.array([12, 13, 11])[:, None, None, None], axis=0
    )
    data = np.where(r < 10, 100 + 60 * (r > 6) + rng.integers(0, 20, r.shape), 0)
    return preprocess.Brain(
        "01", "T1w", "train", data.astype(np.uint8), np.eye(4), np.array([0.2, 0.5, 0.8])
    )


def some_labels(path):
    labels = np.zeros((60, 60, 60), np.int16)
    for margin, value in ((4, 511), (8, 515), (11, 24), (14, 3), (20, 2)):
        labels[(slice(margin, -margin),) * 3] = value
    for left, right in ((2, 41), (3, 42)):
        labels[30:][labels[30:] == left] = right
    for number in (1, 15):
        image = nib.Nifti1Image(labels, np.eye(4))
        nib.save(image, path / f"training_seg_{number:02d}.nii.gz")


def in_two_processes(tmp_path, lines):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *start, str(script), *lines],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def agree(one, two, key):
    one, two = (torch.load(path, weights_only=True)[key] for path in (one, two))
    assert one.keys() == two.keys()
    for name, a in one.items():
        # Muon gives every update the same size: three steps of up to 1.5e-3 move a weight by 1e-3
        assert torch.allclose(a, two[name], rtol=1e-4, atol=3e-6), name


def test_two_processes_train_as_one_with_the_double_batch(tmp_path, monkeypatch):
    some_labels(tmp_path)
    lines = {}
    for count in (1, 2):
        work = tmp_path / str(count)
        work.mkdir()
        preprocess.write_pack([a_brain()], work)
        lines[count] = [
            f"train prior {work} --steps 3 --decay 1 --size 12 --workers 0 --threads 1 "
            f"--channels 8 8 --blocks 1 1 --checkpoint-every 2 --batch {4 // count}",
            f"train parcellation {tmp_path} --work-dir {work} --steps 3 --maps 1 --held-out 15 "
            f"--widths 8 8 --shape 16 16 16 --workers 0 --threads 1 --batch {2 // count}",
        ]
    in_two_processes(tmp_path, lines[2])
    monkeypatch.setattr(prior, "fast_dtype", lambda _: None)
    monkeypatch.setattr(parcellation, "fast_dtype", lambda _: None)
    for line in lines[1]:
        assert main(line.split()) == 0
    folders = tmp_path / "1", tmp_path / "2"
    agree(*(folder / "checkpoint.pt" for folder in folders), "model")
    agree(*(folder / "last.pt" for folder in folders), "network")
    recent = [torch.load(f / "checkpoint.pt", weights_only=True)["recent"] for f in folders]
    assert torch.allclose(*recent, rtol=1e-4)
    log = (folders[1] / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [3]  # one process writes


def test_the_processes_share_the_crops_of_a_step():
    def numbers(rank, size, batch):
        place = processes.Processes(rank, size, torch.device("cpu"))
        return list(Numbers(5, 7, batch, place))

    assert numbers(0, 1, 6) == list(range(30, 42))
    assert numbers(0, 2, 3) == [30, 31, 32, 36, 37, 38]
    assert numbers(1, 2, 3) == [33, 34, 35, 39, 40, 41]


def test_alone_nothing_changes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = processes.join("cpu")
    assert (alone.first, alone.size) == (True, 1)
    layer = nn.Linear(2, 1)
    loss = layer(torch.ones(1, 2)).sum()
    loss.backward()
    before = layer.weight.grad.clone()
    assert float(alone.average(layer.parameters(), loss)) == float(loss.detach())
    assert torch.equal(layer.weight.grad, before)


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match="GPU of its own"):
            processes.join(device)
