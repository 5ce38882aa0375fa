# SPDX-License-Identifier: Apache-2.0
"""Weights on disk: one safetensors file with metadata in its header.

The header holds one JSON text under ``brainprior``: ``kind`` (prior, coarse, parcellation),
``format_version``, ``name``, ``licence``, ``training_data``, ``config`` (from which the network is
rebuilt), and ``tensors_sha256``, the hash of the tensors, which is checked at every load.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from brainprior_bids.engine.coarse import BlockWeights, Coarse, MeanBrains
from brainprior_bids.engine.denoiser import ErrorSpectrum, Precondition, Prior
from brainprior_bids.engine.errors import ShapeMismatchError, UsageError, WeightsError
from brainprior_bids.engine.parcellation_network import ParcellationNetwork
from brainprior_bids.engine.unet import UNet

Network = TypeVar("Network", bound=torch.nn.Module)

FORMAT_VERSION = 1
FOLDER = Path(__file__).parent.parent / "data" / "weights"
SPECTRUM = "spectrum"
MEAN = "mean."
"""Begin of the names of a coarse network's mean brains."""
SUFFIX = ".safetensors"


def user_folder() -> Path:
    """Folder of `brainprior weights add`: ``$BRAINPRIOR_WEIGHTS``, or the user's data folder."""
    own = os.environ.get("BRAINPRIOR_WEIGHTS")
    if own:
        return Path(os.path.expanduser(own))
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.path.expanduser(data)) / "brainprior" / "weights"


def find_weights(asked: str | Path | None, *, kind: str) -> Path:
    """The weights file for a path, for the name of an added file, or for None (the embedded one).
    A name is looked up in ``user_folder()`` first; ``embedded`` is the file of the package.

    Raises
    ------
    WeightsError
        If it is neither a file nor a known name.
    """
    embedded = FOLDER / f"{kind}.safetensors"
    if asked is None or str(asked) == "embedded":
        return embedded
    path = Path(os.path.expanduser(asked))
    if path.is_file():
        return path.absolute()
    named = user_folder() / f"{asked}{SUFFIX}"
    if path.name == str(asked) and named.is_file():
        return named
    names = sorted(file.stem for file in user_folder().glob(f"*{SUFFIX}"))
    raise WeightsError(
        f"{asked}: expected a weights file, or one of the names embedded"
        f"{''.join(f', {name}' for name in names)}. Add a file with `brainprior weights add`."
    )


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_tensors(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write atomically; the data types of floating tensors are kept.

    Parameters
    ----------
    path : Path
        Replaced only once the new file is complete.
    state : mapping
        Name to tensor.
    metadata : mapping
        JSON-able, with at least ``kind``, ``name``, ``licence``, ``training_data``, ``config``.

    Raises
    ------
    WeightsError
        If one of those is missing.
    """
    missing = {"kind", "name", "licence", "training_data", "config"} - set(metadata)
    if missing:
        raise WeightsError(f"{path.name}: metadata lacks {sorted(missing)}.")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    facts = {
        **metadata,
        "format_version": FORMAT_VERSION,
        "tensors_sha256": _sha256_tensors(tensors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, name, metadata={"brainprior": json.dumps(facts)})
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_weights(path: Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a weights file; adds ``file`` and ``sha256`` (of the file).

    Raises
    ------
    WeightsError
        If the file is missing, was not written by brainprior, is of another kind or version, or
        does not match its hash.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("brainprior")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path}: no such weights file. Pass an existing one, or reinstall brainprior."
        ) from error
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error}).") from error
    try:
        metadata = json.loads(header or "")
        if not isinstance(metadata, dict):
            raise ValueError(f"it holds a {type(metadata).__name__}")
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path}: safetensors without brainprior's metadata. Make weights with "
            "`brainprior train`."
        ) from error
    if metadata.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"{path}: format version {metadata.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}."
        )
    if metadata.get("kind") != kind:
        raise WeightsError(
            f"{path}: expected weights of kind {kind!r}, got {metadata.get('kind')!r}."
        )
    if _sha256_tensors(state) != metadata.get("tensors_sha256"):
        raise WeightsError(
            f"{path}: the tensors do not match their SHA-256. Fetch the file again."
        )
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise WeightsError(
            f"{path}: expected finite numbers, {broken[0]} holds others. The training diverged: "
            "use an earlier checkpoint."
        )
    return state, {**metadata, "file": path.name, "sha256": sha256_file(path)}


def prior_state(model: Precondition, spectra: Mapping[str, ErrorSpectrum]) -> dict[str, Tensor]:
    """The tensors of a prior's file: the network in float16, band SDs and error spectra in
    float32.
    """
    state = {f"network.{k}": v.detach().half() for k, v in model.network.state_dict().items()}
    state["band_sd"] = model.band_sd.float()
    for contrast, spectrum in spectra.items():
        for part in ("sigmas", "frequencies", "variances"):
            state[f"{SPECTRUM}.{contrast}.{part}"] = getattr(spectrum, part).float()
    return state


def load_prior(
    path: Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    tile_mm: int | None = None,
    coarse: bool = True,
) -> Prior:
    """The prior in ``path``, by default the one shipped with the package.

    ``device``, ``dtype`` and ``tile_mm`` are those of ``Prior``; ``coarse`` adds the shipped
    coarse network.

    Raises
    ------
    WeightsError
        As ``read_weights``, and if the tensors do not fit the configuration.
    """
    path = path or FOLDER / "prior.safetensors"
    state, metadata = read_weights(path, kind="prior")
    second = _shipped_coarse(str(device), dtype) if coarse else None
    return _prior_of(
        state, metadata, path, device=device, dtype=dtype, tile_mm=tile_mm, coarse=second
    )


def load_coarse(
    path: Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Coarse:
    """The coarse network in ``path``, by default the one shipped with the package.

    Raises
    ------
    WeightsError
        As ``load_prior``.
    """
    path = path or FOLDER / "coarse.safetensors"
    state, metadata = read_weights(path, kind="coarse")
    network = _prior_of(state, metadata, path, device=device, dtype=dtype)
    means = {k.removeprefix(MEAN): v for k, v in state.items() if k.startswith(MEAN)}
    try:
        return Coarse(network, BlockWeights(**metadata["weights"]), MeanBrains(means))
    except (KeyError, ValueError, TypeError, ShapeMismatchError) as error:
        raise _misfit(path, error) from error


@lru_cache(maxsize=1)
def _shipped_coarse(device: str, dtype: torch.dtype | None) -> Coarse:
    """``load_coarse``, once per process: it has no state."""
    return load_coarse(device=device, dtype=dtype)


def _prior_of(
    state: Mapping[str, Tensor], metadata: Mapping[str, Any], path: Path, **options: Any
) -> Prior:
    """The prior of a file's tensors and metadata; ``options`` are those of ``Prior``."""
    network = _fill(UNet, state, metadata, path)
    try:
        if not bool((state["band_sd"] > 0).all()):
            raise UsageError("band_sd must be above 0")
        model = Precondition(network, state["band_sd"])
        contrasts = {name.split(".")[1] for name in state if name.startswith(f"{SPECTRUM}.")}
        spectra = {
            contrast: ErrorSpectrum(
                *(
                    state[f"{SPECTRUM}.{contrast}.{p}"]
                    for p in ("sigmas", "frequencies", "variances")
                )
            )
            for contrast in sorted(contrasts)
        }
    except KeyError as error:
        raise WeightsError(
            f"{path}: the tensor {error} is missing. Make weights with `brainprior train`."
        ) from error
    except (UsageError, ShapeMismatchError, RuntimeError) as error:
        raise _misfit(path, error) from error
    return Prior(model, spectra=spectra, metadata=metadata, **options)


def load_parcellation(
    path: Path | None = None, *, device: str | torch.device = "cpu"
) -> ParcellationNetwork:
    """The parcellation network in ``path``, by default the one shipped with the package.

    Raises
    ------
    WeightsError
        As ``load_prior``.
    """
    path = path or FOLDER / "parcellation.safetensors"
    state, metadata = read_weights(path, kind="parcellation")
    network = _fill(ParcellationNetwork, state, metadata, path)
    network.metadata = metadata
    return network.to(device).eval()


def _fill(
    make: type[Network], state: Mapping[str, Tensor], metadata: Mapping[str, Any], path: Path
) -> Network:
    """A network built from the metadata's config, with the tensors named ``network.*``."""
    own = {k.removeprefix("network."): v.float() for k, v in state.items() if "network." in k}
    try:
        with torch.device("meta"):  # shapes first: a configuration may need any amount of memory
            expected = make(**metadata["config"]).state_dict()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in expected.items()}:
            names = sorted(set(own) ^ set(expected)) or sorted(
                name for name in own if own[name].shape != expected[name].shape
            )
            raise ValueError(f"{len(names)} tensors differ, the first is {names[0]}")
        with torch.random.fork_rng(devices=[]):  # the first values, drawn at random, are not kept
            network = make(**metadata["config"])
        network.load_state_dict(own)
    except (TypeError, ValueError, KeyError, RuntimeError, UsageError) as error:
        raise _misfit(path, error) from error
    return network


def _misfit(path: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"{path}: tensors and configuration do not fit: {error}. Make weights with "
        "`brainprior train`."
    )
