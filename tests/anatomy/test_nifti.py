# SPDX-License-Identifier: Apache-2.0
"""Files with less data than the header states are refused before that size is allocated."""

import gzip
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from brainprior_bids.anatomy.external import mask_from_file
from brainprior_bids.anatomy.lesion import read_lesion
from brainprior_bids.anatomy.nifti import MAX_VOXELS, open_image, read_values
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.grids import Grid

MEGABYTE = 2**20


def header(shape, dtype, *, kind=nib.Nifti1Header, offset=None, order="<"):
    """A valid header for an image of any size, with its four bytes of no extension."""
    output = kind(endianness=order)
    output.set_data_dtype(dtype)
    output.set_data_shape(shape)
    output.set_sform(np.eye(4), 1)
    output["magic"] = output.single_magic
    output["vox_offset"] = output.single_vox_offset if offset is None else offset
    return output.binaryblock + bytes(4)


def write(path, content, megabytes_of_zeros=0):
    """The content, followed by zeros; compressed if the name ends in .gz."""
    zeros = bytes(MEGABYTE)
    if path.suffix == ".gz":  # concatenated gzip files are one file
        content, zeros = gzip.compress(content), gzip.compress(zeros)
    path.write_bytes(content + megabytes_of_zeros * zeros)
    return path


def extension(length):
    """The flag that extensions follow, and one extension of that many bytes."""
    return b"\1\0\0\0" + np.array([length, 6], "<i4").tobytes()


CLAIMS = {
    "1024^3 doubles in a kilobyte": (".nii", header((1024,) * 3, np.float64), 0),
    "the same, packed": (".nii.gz", header((1024,) * 3, np.float64), 0),
    "more than the file can unpack to": (".nii.gz", header((500,) * 3, np.float64), 1),
    "plain and cut": (".nii", header((200,) * 3, np.int16), 1),
    "NIfTI-2": (".nii", header((2**20,) * 3, np.int16, kind=nib.Nifti2Header), 0),
    "dimensions that overflow": (".nii", header((2**40,) * 3, "i2", kind=nib.Nifti2Header), 0),
    "many volumes": (".nii.gz", header((256, 256, 256, 30000), np.uint8), 4),
    "big-endian": (".nii", header((1000,) * 3, np.float64, order=">"), 0),
    "zeros that unpack": (".nii.gz", header((700,) * 3, np.int16), 700),
    "a long way to the data": (".nii.gz", header((8,) * 3, np.int16, offset=2e9), 1),
    "an extension": (
        ".nii.gz", header((8,) * 3, np.int16, offset=1e6)[:-4] + extension(2**30), 600,
    ),
    "an extension, offset 0": (
        ".nii.gz", header((8,) * 3, np.int16, offset=0)[:-4] + extension(2**30), 600,
    ),
}  # fmt: skip

OPEN_IN_LITTLE = """
import resource, sys
from pathlib import Path
from brainprior_bids.anatomy.conform import conform
from brainprior_bids.engine.errors import InputError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2)
for path in sys.argv[1:]:
    try:
        conform(Path(path), metadata={})
    except (InputError, MemoryError) as error:
        print(str(error) or "MemoryError")
"""
"""Conform with room for 100 MiB: what allocates what was claimed has a MemoryError."""


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """Kind -> expected message."""
    paths = []
    for suffix, content, megabytes in CLAIMS.values():
        folder = tmp_path_factory.mktemp("claims")
        paths.append(str(write(folder / f"sub-01_T1w{suffix}", content, megabytes)))
    command = [sys.executable, "-c", OPEN_IN_LITTLE, *paths]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return dict(zip(CLAIMS, ended.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("kind", CLAIMS)
def test_what_claims_too_much_is_refused_without_allocating_it(messages, kind):
    message = messages[kind]
    assert message.startswith("sub-01_T1w: ")
    assert "claims" in message
    assert "at most" in message  # the limit
    assert "onvert it again" in message


def test_an_extension_and_a_large_scan_are_no_reason_to_refuse(tmp_path):
    image = nib.Nifti1Image(np.ones((8, 8, 8), np.int16), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"x" * 2 * MEGABYTE))
    nib.save(image, tmp_path / "extended.nii.gz")
    opened = open_image(tmp_path / "extended.nii.gz", "scan")
    assert len(opened.header.extensions) == 1
    # 0.4 mm in 256 mm; zeros pack 1028 to 1
    assert MAX_VOXELS >= 640**3
    path = write(tmp_path / "fine.nii.gz", header((512, 512, 16), np.float32), 16)
    assert open_image(path, "scan").shape == (512, 512, 16)


def packed(shape=(20, 20, 20), seed=0):
    """A gzip file of noise, which does not compress, and its values."""
    values = np.random.default_rng(seed).integers(0, 2**15, shape).astype(np.int16)
    return gzip.compress(nib.Nifti1Image(values, np.eye(4)).to_bytes(), mtime=0), values


def read(path):
    return read_values(open_image(path, "sub-01"), path, "sub-01")


@pytest.mark.parametrize("cut", [1, 2, 4, 5, 7, 8, 9, 100])
def test_a_packed_file_that_is_cut_anywhere_is_not_believed(tmp_path, cut):
    content, _ = packed()
    path = tmp_path / "cut.nii.gz"
    path.write_bytes(content[:-cut])
    with pytest.raises(InputError, match="Copy or convert it again"):
        read(path)


@pytest.mark.parametrize("place", [-1, -4, -5, -8, -9, 400, 8000])
def test_a_packed_file_with_a_wrong_bit_is_not_believed(tmp_path, place):
    content, _ = packed()
    damaged = bytearray(content)
    damaged[place] ^= 4
    path = tmp_path / "damaged.nii.gz"
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="Copy or convert it again"):
        read(path)


def test_packed_files_in_pieces_and_with_something_behind_are_read(tmp_path):
    content, values = packed()
    plain = gzip.decompress(content)
    pieces = b"".join(gzip.compress(plain[n : n + 5000]) for n in range(0, len(plain), 5000))
    for number, whole in enumerate((pieces, content + b"behind it", content + bytes(100))):
        path = tmp_path / f"{number}.nii.gz"
        path.write_bytes(whole)
        np.testing.assert_array_equal(read(path), values)


def test_a_packed_file_that_goes_on_behind_its_image_is_refused(tmp_path):
    content, _ = packed()
    longer = gzip.decompress(content) + bytes(20 * MEGABYTE)
    path = tmp_path / "longer.nii.gz"
    path.write_bytes(gzip.compress(longer))
    with pytest.raises(InputError, match="unpacks to more than"):
        read(path)


@pytest.mark.parametrize(
    ("offset", "values"),
    [(0, 0), (0, 347), (70, 12345), (70, 0), (40, 9), (344, 0)],
    ids=["no size", "wrong size", "unknown type", "no type", "nine axes", "no magic"],
)
def test_a_header_with_an_impossible_field_is_refused(tmp_path, offset, values):
    content = bytearray(gzip.decompress(packed()[0]))
    content[offset : offset + 2] = np.int16(values).tobytes()
    path = tmp_path / "odd.nii"
    path.write_bytes(content)
    with pytest.raises(InputError, match="onvert it again"):
        read(path)


def cifti(content, intent=3006):
    """An image whose extension makes nibabel take it for CIFTI, with this XML in it."""
    padded = content + bytes(-(len(content) + 8) % 16)
    output = nib.Nifti2Header()
    output.set_data_dtype(np.int16)
    output.set_data_shape((4, 4, 4))
    output["intent_code"] = intent
    output["vox_offset"] = 544 + 8 + len(padded)
    extra = b"\1\0\0\0" + np.array([8 + len(padded), 32], "<i4").tobytes() + padded
    return output.binaryblock + extra + bytes(128)


@pytest.mark.parametrize("text", [b"<CIFTI></CIFTI>", b"", b"<CIFTI", b"<CIFTI Version='2'>"])
def test_an_extension_that_nibabel_cannot_parse_is_an_unreadable_file(tmp_path, text):
    with pytest.raises(InputError, match=r"sub-01: .* cannot be read, .* Copy or convert it"):
        open_image(write(tmp_path / "cifti.nii", cifti(text)), "sub-01")


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(3000, 3013),
    st.one_of(
        st.binary(max_size=200),
        st.sampled_from(["Matrix", "MatrixIndicesMap", "BrainModel", "Vertices", "Parcel"]).map(
            lambda tag: f"<CIFTI Version='2'><Matrix><{tag}></{tag}></Matrix></CIFTI>".encode()
        ),
    ),
)
def test_no_extension_gets_through_as_another_error(tmp_path, intent, content):
    path = write(tmp_path / "cifti.nii", cifti(content, intent))
    try:
        image = open_image(path, "sub-01")
    except InputError:
        return
    assert image.shape[:3]


@pytest.mark.parametrize("read", [
    lambda path, grid: mask_from_file(path, grid, name="Skull-strip"), read_lesion,
])  # fmt: skip
def test_masks_of_others_are_no_way_around_it(tmp_path, read):
    path = write(tmp_path / "mask.nii.gz", *CLAIMS["zeros that unpack"][1:])
    with pytest.raises(InputError, match="more than a brain scan holds"):
        read(path, Grid((8, 8, 8), np.eye(4)))
