# SPDX-License-Identifier: Apache-2.0
"""Weights files: round trip, refusal of other files, and the embedded files."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from brainprior_bids.engine import weights
from brainprior_bids.engine.denoiser import ErrorSpectrum, Precondition
from brainprior_bids.engine.errors import WeightsError
from brainprior_bids.engine.unet import UNet

FACTS = {"name": "n", "licence": "CC0", "training_data": "none", "config": {}}


def write_small_prior(path):
    torch.manual_seed(0)
    network = UNet((8, 8), (1, 1), embedding=8)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape)
    model = Precondition(network, torch.linspace(0.1, 1, 8))
    spectra = {"unknown": ErrorSpectrum.isotropic(0.5), "T1w": ErrorSpectrum.isotropic(0.2)}
    facts = {**FACTS, "kind": "prior", "config": network.config}
    weights.write_weights(path, weights.prior_state(model, spectra), facts)
    return model


def rewrite(path, **changes):
    """The same file with other facts in its header."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["brainprior"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(state, path, metadata={"brainprior": json.dumps(facts | changes)})


def test_round_trip(tmp_path):
    path = tmp_path / "prior.safetensors"
    model = write_small_prior(path)
    before = torch.get_rng_state()
    prior = weights.load_prior(path, dtype=torch.float32)
    assert torch.equal(before, torch.get_rng_state())
    assert prior.metadata["name"] == "n"
    assert prior.metadata["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert prior.sigma_data == pytest.approx(float(model.band_sd.square().mean().sqrt()))
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(prior.model.network.state_dict()[name], tensor.half().float()), name
    k = torch.linspace(0, 0.5, 5)
    expected = ErrorSpectrum.isotropic(0.2).variance(0.1, k)
    assert torch.allclose(prior.spectrum("T1w").variance(0.1, k), expected, rtol=1e-5)
    assert torch.isclose(
        prior.spectrum("FLAIR").variance(0.1, k[:1])[0],
        torch.tensor(0.01 * 0.25 / 0.26),
        rtol=2e-3,
    )


def test_only_the_finished_file_is_left(tmp_path):
    write_small_prior(tmp_path / "prior.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["prior.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "prior.safetensors"
    write_small_prior(path)
    before = path.read_bytes()

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        weights.write_weights(path, {}, {**FACTS, "kind": "prior"})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "prior.safetensors"
    write_small_prior(path)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="SHA-256"):
        weights.load_prior(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": "parcellation"}, "expected weights of kind 'prior'"),
        ({"format_version": 99}, "format version 99"),
        ({"config": {"channels": [8, 12], "blocks": [1, 1], "embedding": 8}}, "do not fit"),
        ({"config": {"layers": 3}}, "do not fit"),
        ({"config": [1]}, "do not fit"),
        ({"config": {"channels": "8", "blocks": [1], "embedding": 8}}, "do not fit"),
    ],
)
def test_weights_that_are_something_else_are_refused(tmp_path, changes, text):
    path = tmp_path / "prior.safetensors"
    write_small_prior(path)
    rewrite(path, **changes)
    with pytest.raises(WeightsError, match=text):
        weights.load_prior(path)


def test_files_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="no such weights file"):
        weights.load_prior(tmp_path / "absent.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("hello, this is no safetensors file")
    with pytest.raises(WeightsError, match="not a readable safetensors"):
        weights.load_prior(text)
    bare = tmp_path / "bare.safetensors"
    save_file({"a": torch.zeros(1)}, bare)
    with pytest.raises(WeightsError, match="without brainprior's metadata"):
        weights.load_prior(bare)
    for text in ("[1]", "[" * 100_000, '{"a":', "5"):
        save_file({"a": torch.zeros(1)}, bare, metadata={"brainprior": text})
        with pytest.raises(WeightsError, match="without brainprior's metadata"):
            weights.load_prior(bare)


BROKEN = {
    "band_sd' is missing": lambda state: state.pop("band_sd"),
    "T1w.sigmas' is missing": lambda state: state.pop("spectrum.T1w.sigmas"),
    "band_sd must be above 0": lambda state: state.update(band_sd=torch.zeros(8)),
    "do not fit: shape": lambda state: state.update(band_sd=torch.ones(9)),
    "variances must be": lambda state: state.update({"spectrum.T1w.sigmas": torch.ones(3)}),
    "must ascend": lambda state: state["spectrum.T1w.sigmas"].fill_(1),
    "band_sd holds others": lambda state: state["band_sd"].fill_(torch.nan),
    "1 tensors differ, the first is image_in.bias": lambda state: state.pop(
        "network.image_in.bias"
    ),
}


@pytest.mark.parametrize("text", BROKEN)
def test_tensors_that_are_no_prior_are_named(tmp_path, text):
    path = tmp_path / "prior.safetensors"
    write_small_prior(path)
    state, facts = weights.read_weights(path, kind="prior")
    BROKEN[text](state)
    weights.write_weights(path, state, facts)
    with pytest.raises(WeightsError, match=f"{text}.*(train|checkpoint)"):
        weights.load_prior(path)


def test_a_configuration_of_any_size_is_refused_before_it_takes_memory(tmp_path):
    path = tmp_path / "prior.safetensors"
    write_small_prior(path)
    rewrite(path, config={"channels": [8, 10**6], "blocks": [1, 1], "embedding": 10**6})
    with pytest.raises(WeightsError, match="tensors differ, the first is contrast_in"):
        weights.load_prior(path)


def test_facts_must_be_complete(tmp_path):
    with pytest.raises(WeightsError, match="licence"):
        weights.write_weights(tmp_path / "x", {}, {"kind": "prior"})


def test_the_shipped_prior_loads_and_is_documented():
    prior = weights.load_prior()
    count = sum(parameter.numel() for parameter in prior.model.network.parameters())
    assert 4e6 < count < 5e6
    assert prior.metadata["licence"] == "Apache-2.0"
    assert prior.metadata["steps"] > 0
    k = torch.linspace(0, 0.5, 20)
    for contrast in ("T1w", "T2w", "FLAIR", "unknown"):
        spectrum = prior.spectrum(contrast)
        for sigma in (0.01, 0.1, 1.0, 10.0):
            v = spectrum.variance(sigma, k)
            assert (v > 0).all()
            assert (v <= sigma**2 * (1 + 1e-6)).all()


@pytest.mark.shared
def test_the_shipped_prior_denoises_a_brain_it_never_saw(shared_data):
    """At every level the error is below that of the best per-band linear filter."""
    nib = pytest.importorskip("nibabel")
    image = nib.load(shared_data / "brains" / "sub-04_desc-brain_T1w.nii.gz")
    data = np.asarray(image.dataobj, dtype=np.float32)
    data /= np.percentile(data[data > 0], 99)
    clean = torch.from_numpy(data[40:104, 50:114, 40:104].copy())[None, None]
    middle = torch.tensor([data.shape[0] / 2, data.shape[1] / 2 + 10, data.shape[2] / 2 - 15])
    voxels = torch.stack(
        torch.meshgrid(*[torch.arange(a, a + 64.0) for a in (40, 50, 40)], indexing="ij")
    )
    place = (voxels - middle[:, None, None, None]) * 1.1  # MNI305 is a larger brain
    prior = weights.load_prior()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    for sigma in (0.03, 0.1, 0.3):
        result = prior.denoise(clean + sigma * noise, sigma, coordinates=place, contrast="T1w")
        error = float((result - clean).square().mean().sqrt())
        assert error < 0.9 * sigma
