# SPDX-License-Identifier: Apache-2.0
"""Open an image file, and check the size that it claims before any allocation.

A few kilobytes can claim gigabytes: a header with large dimensions, a header extension, a gzip of
zeros. What a NIfTI header claims is therefore compared with the size of the file and with
``MAX_VOXELS`` first, from the first bytes of the file.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.openers import ImageOpener
from numpy.typing import NDArray

from brainprior_bids.engine.errors import InputError

MAX_VOXELS = 2**28
"""645 along each axis: a head of 258 mm at 0.4 mm."""
MAX_HEADER_BYTES = 16 * 2**20
"""Limit for header and extensions; a DICOM header stored there has some hundred thousand bytes."""
CHUNK = 2**16
"""Bytes of a gzip file that are unpacked at a time."""
DEFLATE_RATIO = 1032
"""Maximum number of bytes from one byte of a gzip file (zlib's technical details)."""


def open_image(path: Path, name: str) -> nib.spatialimages.SpatialImage:
    """The image, in any of nibabel's formats, without reading its values.

    Parameters
    ----------
    path : Path
    name : str
        Name of the image, for messages.

    Raises
    ------
    InputError
        If it is missing or unreadable, claims more than its file can contain, or is larger than
        any head scan.
    """
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"{name}: {path} is a link to a file that is not there. In a DataLad or git-annex "
            "data set fetch its content first (datalad get)."
        )
    if not path.is_file():
        raise InputError(f"{name}: expected an image file, there is none at {path}.")
    with _reading(path, name):
        if path.name.endswith((".nii", ".nii.gz")):
            _check_claims(path, name)
        image = nib.load(path, mmap=False)
    _check_voxels(image.shape, path, name)
    return image


def read_values(image: nib.spatialimages.SpatialImage, path: Path, name: str) -> NDArray[Any]:
    """The image's values; InputError if the file is truncated or damaged."""
    with _reading(path, name):
        values = np.asanyarray(image.dataobj)
        if path.name.endswith(".nii.gz"):
            length = image.get_data_dtype().itemsize * values.size
            _check_sums(path, image.dataobj.offset + length)
        return values


def _check_sums(path: Path, needed: int) -> None:
    """Compare a gzip file with its check sums, up to the end of the stream that fills ``needed``.

    gzip's own reader checks the sums only if a caller reads beyond the last value.
    """
    stream, count = zlib.decompressobj(wbits=31), 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            while block:
                count += len(stream.decompress(block))
                if count > needed + MAX_HEADER_BYTES:
                    raise ValueError(f"it unpacks to more than the {_size(needed)} of its image")
                if stream.eof and count >= needed:
                    return
                block = stream.unused_data
                if stream.eof:
                    stream = zlib.decompressobj(wbits=31)
    raise EOFError("it ends within its compressed data")


@contextmanager
def _reading(path: Path, name: str) -> Generator[None]:
    """Convert any parser's error (nibabel, gzip, the XML in an extension) to an InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise unreadable(path, name, error) from error


def unreadable(path: Path, name: str, error: BaseException) -> InputError:
    """The message about a file that nibabel cannot read."""
    return InputError(
        f"{name}: {path} cannot be read, it is truncated, damaged or no NIfTI file "
        f"({' '.join(str(error).split())}). Copy or convert it again."
    )


def _check_claims(path: Path, name: str) -> None:
    """Refuse a NIfTI file that claims more than it can contain, or than a scan has."""
    with ImageOpener(path) as stream:
        header = _header(stream)
        if header is None:
            raise ValueError("it does not begin with the header of a NIfTI file")
        shape = tuple(int(n) for n in header["dim"][1 : 1 + min(int(header["dim"][0]), 7)])
        _check_voxels(shape, path, name)
        offset = float(header["vox_offset"])
        largest = max((offset, *_extension_ends(stream, header, offset)))
    if largest > MAX_HEADER_BYTES:
        raise InputError(
            f"{name}: the header of {path} claims {_size(largest)} for itself and its extensions, "
            f"at most {_size(MAX_HEADER_BYTES)} are read. The file is damaged; convert it again."
        )
    claimed = offset + float(np.prod(shape, dtype=float)) * header.get_data_dtype().itemsize
    size = path.stat().st_size
    holds = size * DEFLATE_RATIO if path.name.endswith(".gz") else size
    if claimed > holds:
        raise ValueError(
            f"its header claims {_size(claimed)} for {shape} voxels, a file of {_size(size)} "
            f"holds {_size(holds)} at most"
        )


def _header(stream: IO[bytes]) -> nib.Nifti1Header | None:
    """The header alone, unchecked; None if the bytes are not a header."""
    block = stream.read(nib.Nifti2Header.template_dtype.itemsize)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        length = kind.template_dtype.itemsize
        sizes = (length.to_bytes(4, "little"), length.to_bytes(4, "big"))
        if len(block) >= length and block[:4] in sizes:
            return kind(block[:length], check=False)
    return None


def _extension_ends(stream: IO[bytes], header: nib.Nifti1Header, offset: float) -> Iterator[float]:
    """Byte at which each header extension ends, as far as ``MAX_HEADER_BYTES``."""
    start = header.template_dtype.itemsize
    stream.seek(start)
    if stream.read(4)[:1] in (b"", b"\0") or not offset <= MAX_HEADER_BYTES:
        return
    order = "little" if header.endianness == "<" else "big"
    end = start + 4
    while end <= MAX_HEADER_BYTES and (end < offset or offset <= 0):
        stream.seek(end)
        length = int.from_bytes(stream.read(4), order)
        if length < 8:  # not an extension: left to nibabel
            return
        end += length
        yield end


def _check_voxels(shape: tuple[int, ...], path: Path, name: str) -> None:
    """Refuse more voxels than a scan has."""
    voxels = float(np.prod(np.maximum(shape, 0), dtype=float))
    if voxels > MAX_VOXELS:
        raise InputError(
            f"{name}: the header of {path} claims {voxels:.3g} voxels {shape}, more than a brain "
            f"scan holds (at most {MAX_VOXELS:,}, as 645 x 645 x 645). The file is damaged, or "
            "holds more than one scan. Convert it again, or give one scan."
        )


def _size(n_bytes: float) -> str:
    """Bytes with a unit."""
    power = min(int(np.log2(max(n_bytes, 1)) // 10), 3)
    return f"{n_bytes / 1024**power:.3g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
