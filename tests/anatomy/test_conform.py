# SPDX-License-Identifier: Apache-2.0
"""Conform gives the same scan for every storage order, and refuses files that are not scans."""

import gzip
import itertools
import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from brainprior_bids.workflows.scan import field_of_view_l
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, inv_ornt_aff

from brainprior_bids.anatomy.conform import conform, read_geometry
from brainprior_bids.bids.files import to_json
from brainprior_bids.bids.qc import metrics, reasons, verdict
from brainprior_bids.engine.errors import GeometryError, InputError
from brainprior_bids.records import HeaderRecord, ScanRecord

ORDERS = [
    np.array([[a, f] for a, f in zip(order, flips, strict=True)], dtype=float)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def rotation(degrees, axis):
    angle = np.radians(degrees)
    c, s = np.cos(angle), np.sin(angle)
    i, j = [a for a in range(3) if a != axis]
    matrix = np.eye(4)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def a_scan(zooms=(1.0, 1.0, 5.0), shape=(12, 14, 9), degrees=8.0):
    """An ellipsoid with noise and a bright marker on the left, oblique."""
    rng = np.random.default_rng(3)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = sum(a**2 for a in axes) < 0.8
    data = np.where(inside, 100 + rng.normal(0, 5, shape), 0).astype(np.float32)
    data[2, 7, 4] = 500  # the first axis runs to the right, so this is left of the middle
    affine = rotation(degrees, 0) @ np.diag([*zooms, 1.0])
    affine[:3, 3] = (-6, -8, -20)
    return data, affine


def write(path, data, affine, *, kind=nib.Nifti1Image, sform=1, qform=1):
    image = kind(data, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


def stored(data, affine, order):
    """The same scan with its array turned by one of the 48 axis orders and flips."""
    return apply_orientation(data, order), affine @ inv_ornt_aff(order, data.shape)


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: "".join(f"{int(a):+d}" for a in o.ravel()))
def test_all_48_axis_orders_give_the_same_scan(tmp_path, order):
    data, affine = a_scan()
    path = write(tmp_path / "sub-01_T1w.nii.gz", *stored(data, affine, order))
    conformed = conform(path, metadata={"SliceThickness": 4.0})
    np.testing.assert_array_equal(conformed.image.get_fdata(dtype=np.float32), data)
    np.testing.assert_allclose(conformed.image.affine, affine, atol=2e-5)  # float32 header
    assert conformed.acquisition.slice_axis == 2
    assert conformed.acquisition.thickness_mm == 4.0
    assert conformed.acquisition.spacing_mm == pytest.approx(5.0, abs=1e-5)
    brightest = np.unravel_index(data.argmax(), data.shape)
    assert (conformed.image.affine @ [*brightest, 1])[0] == pytest.approx(-4, abs=1e-4)
    assert conformed.warnings == []


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    order=st.sampled_from(ORDERS),
    angles=st.tuples(*[st.floats(-40, 40)] * 3),
    zooms=st.tuples(*[st.floats(0.5, 6)] * 3),
)
def test_every_voxel_keeps_its_place_in_mm(tmp_path, order, angles, zooms):
    data, _ = a_scan()
    affine = np.eye(4)
    for axis, angle in enumerate(angles):
        affine = rotation(angle, axis) @ affine
    affine = affine @ np.diag([*zooms, 1])
    array, stored_affine = stored(data, affine, order)
    path = write(tmp_path / "sub-01_T1w.nii", array, stored_affine)
    image = conform(path, metadata={}).image
    here = np.unravel_index(image.get_fdata().argmax(), image.shape)
    there = np.unravel_index(array.argmax(), array.shape)
    np.testing.assert_allclose(image.affine @ [*here, 1], stored_affine @ [*there, 1], atol=1e-3)
    direction = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S"), direction


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_formats_scaled_integers_and_trailing_axes(tmp_path, kind, suffix):
    values = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8, 1, 1)
    image = kind(values, np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / f"scan{suffix}")
    conformed = conform(tmp_path / f"scan{suffix}", metadata={})
    assert conformed.image.shape == (6, 7, 8)
    assert conformed.image.get_data_dtype() == np.float32
    expected = 0.5 * values[..., 0, 0] - 3
    np.testing.assert_allclose(conformed.image.get_fdata(), expected, rtol=1e-6)
    original = conformed.facts["original"]
    assert (original["scl_slope"], original["scl_inter"]) == (0.5, -3)
    assert original["format"] == ("NIfTI-1" if kind is nib.Nifti1Image else "NIfTI-2")
    json.dumps(conformed.facts, allow_nan=False)


def test_sform_wins_over_a_different_qform(tmp_path):
    data, affine = a_scan()
    path = write(tmp_path / "sub-01_T1w.nii", data, affine)
    image = nib.load(path, mmap=False)
    moved = affine.copy()
    moved[1, 3] += 3
    image.set_qform(moved, 1)
    nib.save(image, path)
    conformed = conform(path, metadata={"SliceThickness": 5})
    np.testing.assert_allclose(conformed.image.affine, affine, atol=1e-4)
    assert len(conformed.warnings) == 1
    assert "differ by up to 3.00 mm; the sform is used" in conformed.warnings[0]


def test_mirrored_qform_is_called_so(tmp_path):
    data, affine = a_scan()
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(np.diag([-1, 1, 1, 1]) @ affine, 1)
    nib.save(image, tmp_path / "sub-01_T1w.nii")
    done = conform(tmp_path / "sub-01_T1w.nii", metadata={"SliceThickness": 5})
    assert any("left may be right" in w for w in done.warnings)
    steps = {"conform": {"facts": done.facts}}
    values = metrics(ScanRecord.from_json({"scan": "x", "facts": steps}))
    assert verdict(values) == "look"
    assert reasons(values) == ["mirrored_forms 1 is above 0"]


def test_qform_serves_where_the_sform_is_unset_or_singular(tmp_path):
    data, affine = a_scan()
    path = write(tmp_path / "sub-01_T1w.nii", data, affine, sform=0)
    conformed = conform(path, metadata={"SliceThickness": 5})
    np.testing.assert_allclose(conformed.image.affine, affine, atol=1e-4)
    assert conformed.facts["affine"]["used"] == "qform"

    write(tmp_path / "sub-02_T1w.nii", data, affine)
    raw = bytearray((tmp_path / "sub-02_T1w.nii").read_bytes())
    raw[280:296] = bytes(16)  # srow_x
    (tmp_path / "sub-02_T1w.nii").write_bytes(raw)
    conformed = conform(tmp_path / "sub-02_T1w.nii", metadata={"SliceThickness": 5})
    np.testing.assert_allclose(conformed.image.affine, affine, atol=1e-4)
    assert any("the sform cannot be used (it is singular)" in w for w in conformed.warnings)


def test_unusable_qform_quaternion_is_a_warning_beside_a_good_sform(tmp_path):
    data, affine = a_scan()
    path = write(tmp_path / "sub-01_T1w.nii", data, affine)
    raw = bytearray(path.read_bytes())
    raw[256:260] = np.float32(7).tobytes()  # quatern_b
    path.write_bytes(raw)
    conformed = conform(path, metadata={"SliceThickness": 5})
    np.testing.assert_allclose(conformed.image.affine, affine, atol=1e-4)
    assert any("the qform cannot be used" in w for w in conformed.warnings)


def test_no_orientation_at_all_is_refused(tmp_path):
    data, affine = a_scan()
    path = write(tmp_path / "sub-01_T1w.nii", data, affine, sform=0, qform=0)
    with pytest.raises(GeometryError, match="Left and right cannot be distinguished"):
        conform(path, metadata={})


@pytest.mark.parametrize("scale", [0.001, 1000.0])
def test_affine_in_another_unit_is_refused(tmp_path, scale):
    data, affine = a_scan()
    path = write(tmp_path / "sub-01_T1w.nii", data, np.diag([scale] * 3 + [1]) @ affine)
    with pytest.raises(GeometryError, match="Is the affine in millimetres"):
        conform(path, metadata={})


def test_odd_voxel_sizes_are_warned_about(tmp_path):
    data, affine = a_scan()
    path = write(tmp_path / "sub-01_T1w.nii", data, affine, qform=0)
    raw = bytearray(path.read_bytes())
    raw[80:84] = np.float32(3).tobytes()  # pixdim[1]
    path.write_bytes(raw)
    warnings = conform(path, metadata={"SliceThickness": 5}).warnings
    assert any("the header's voxel sizes 3 × 1 × 5 mm differ" in w for w in warnings)


@pytest.mark.parametrize("size", [np.nan, np.inf])
def test_a_voxel_size_that_is_no_number_does_not_stop_a_scan_with_an_sform(tmp_path, size):
    data, affine = a_scan()
    path = write(tmp_path / "sub-01_T1w.nii", data, affine, qform=0)
    raw = bytearray(path.read_bytes())
    raw[80:84] = np.float32(size).tobytes()  # pixdim[1]
    path.write_bytes(raw)
    conformed = conform(path, metadata={"SliceThickness": 5})
    assert any(f"voxel sizes {size:.4g} × 1 × 5 mm differ" in w for w in conformed.warnings)
    kept = json.loads(to_json(conformed.facts))["original"]
    assert HeaderRecord.from_json(kept).zooms == (None, 1, 5)


def sheared(cosine, shape=(256, 256, 40)):
    """A grid whose first two axes are not at right angles, oblique, for a head's field of view."""
    data, affine = np.zeros(shape, np.int16), a_scan()[1]
    data[20:-20, 20:-20, 5:-5] = 100
    shear = np.eye(4)
    shear[0, 1] = cosine
    return data, affine @ shear


@pytest.mark.parametrize("qform", [0, 1])
@pytest.mark.parametrize("cosine", [0.003, 0.02, 0.2])
def test_axes_that_are_not_at_right_angles_are_refused(tmp_path, cosine, qform):
    data, affine = sheared(cosine)
    path = write(tmp_path / "sub-01_T1w.nii", data, affine, qform=qform)
    with pytest.raises(GeometryError, match="not at right angles") as caught:
        conform(path, metadata={})
    assert "resample it onto a grid with right angles" in str(caught.value)
    with pytest.raises(GeometryError, match="not at right angles"):
        read_geometry(path, metadata={})


@pytest.mark.parametrize("cosine", [1e-7, 1e-5, 9e-5, 1.1e-4, 3e-4, 6e-4])
def test_axes_that_are_oblique_by_rounding_end_as_one_truth(tmp_path, cosine):
    """The written sform and qform agree, and ITK reads the image at the scan's position."""
    data, affine = sheared(cosine)
    path = write(tmp_path / "sub-01_T1w.nii", data, affine, qform=0)
    image = conform(path, metadata={}).image
    nib.save(image, tmp_path / "out.nii")
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "sform.nii")  # ITK can only use the sform
    corner = np.array([255.0, 255.0, 39.0])
    lay = (affine @ np.append(corner, 1))[:3]
    written = nib.load(tmp_path / "out.nii").header
    for form in (written.get_sform(), written.get_qform()):
        assert np.linalg.norm((form @ np.append(corner, 1))[:3] - lay) <= 0.1
    for name in ("out.nii", "sform.nii"):
        point = sitk.ReadImage(str(tmp_path / name)).TransformContinuousIndexToPhysicalPoint(
            corner
        )
        assert np.linalg.norm(np.array(point) * [-1, -1, 1] - lay) <= 0.1
    if cosine < 1e-4:  # nothing is changed without need
        np.testing.assert_array_equal(image.affine, np.float32(affine).astype(float))


def test_a_field_of_view_that_no_scanner_has_is_refused_by_its_geometry(tmp_path):
    """A voxel size that is wrong by a factor: 2 m, with every voxel below 20 mm."""
    data, affine = a_scan(zooms=(16.0, 16.0, 18.0), shape=(128, 128, 9))
    path = write(tmp_path / "sub-01_T1w.nii", data, affine)
    message = r"field of view of up to 600 mm, got 2.05e\+03 × 2.05e\+03 × 162 mm .*voxel size"
    with pytest.raises(GeometryError, match=message):
        read_geometry(path, metadata={})
    assert (
        field_of_view_l(path) == 0
    )  # so that no memory is allocated, and conform can report the reason


@pytest.mark.parametrize("offset", [2e4, -1e30])
def test_a_scan_far_from_the_origin_is_refused(tmp_path, offset):
    data, affine = a_scan()
    affine[1, 3] = offset
    path = write(tmp_path / "sub-01_T1w.nii", data, affine)
    with pytest.raises(GeometryError, match=r"within 10 m of the origin .* Repair the offset"):
        read_geometry(path, metadata={})


def test_nan_outside_the_head_becomes_zero(tmp_path):
    data, affine = a_scan(shape=(40, 40, 12))
    data[:3] = np.nan
    data[-2:, :, 3] = np.inf
    path = write(tmp_path / "sub-01_T1w.nii", data, affine)
    conformed = conform(path, metadata={"SliceThickness": 5})
    bad = int((~np.isfinite(data)).sum())
    assert conformed.facts["values"]["non_finite_voxels_set_to_0"] == bad
    assert conformed.warnings == [
        f"sub-01_T1w: {bad} voxels outside the head are NaN or infinite; set to 0."
    ]
    expected = np.where(np.isfinite(data), data, 0)
    np.testing.assert_array_equal(conformed.image.get_fdata(dtype=np.float32), expected)


def test_nan_inside_the_head_is_refused(tmp_path):
    data, affine = a_scan(shape=(40, 40, 12))
    data[18:21, 20, 6] = np.nan
    path = write(tmp_path / "sub-01_T1w.nii", data, affine)
    with pytest.raises(InputError, match="3 voxels inside the head are NaN"):
        conform(path, metadata={})


def test_nan_in_an_image_of_negative_values_is_refused(tmp_path):
    data, affine = a_scan()
    data = -np.abs(data) - 1
    data[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="inside the head"):
        conform(write(tmp_path / "sub-01_T1w.nii", data - 1, affine), metadata={})


def test_negative_values_are_kept_and_counted(tmp_path):
    data, affine = a_scan()
    data[:3, :3] = -7
    conformed = conform(
        write(tmp_path / "sub-01_T1w.nii", data, affine), metadata={"SliceThickness": 5}
    )
    assert conformed.facts["values"]["negative_voxels"] == int((data < 0).sum())
    assert conformed.image.get_fdata().min() == -7
    assert any("are negative, down to -7; kept" in w for w in conformed.warnings)


def a_head():
    """Air of exactly 0 around an ellipsoid of three grey levels, float32."""
    data, affine = a_scan(shape=(40, 40, 12))
    data[:, :20] *= np.float32(0.5)
    data[:, :8] = 0
    return data, affine


@pytest.mark.parametrize("kind", ["z-scored", "UNI", "white matter", "all negative", "stripped"])
def test_an_image_without_a_zero_of_its_own_is_as_the_positive_one(tmp_path, kind):
    """After the shift, it equals the positive image up to one factor."""
    data, affine = a_head()
    inside = data > 0
    moved, scale = {
        "z-scored": ((data - data[inside].mean()) / data[inside].std(), data[inside].std()),
        "UNI": (data / data.max() - 0.5, data.max()),
        "white matter": ((data - 100) / 5, 5),
        "all negative": (data - 1000, 1),
        # the background stays 0 in the middle of the brain's values
        "stripped": (np.where(inside, data - data[inside].mean(), 0), 1),
    }[kind]
    path = write(tmp_path / "sub-01_T1w.nii", moved.astype(np.float32), affine)
    conformed = conform(path, metadata={"SliceThickness": 5})
    result = conformed.image.get_fdata(dtype=np.float32)
    expected = data / scale
    if kind == "stripped":
        expected = np.where(inside, data - data[inside].min(), 0)
    np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(moved).max())
    shift = conformed.facts["values"]["shift"]
    assert shift == pytest.approx(-moved.min(), rel=1e-5)
    (warning,) = conformed.warnings
    assert f"{shift:g} was added to it" in warning


@pytest.mark.parametrize("kind", ["rings", "noise", "magnitude"])
def test_what_is_negative_by_rings_or_noise_is_not_shifted(tmp_path, kind):
    data, affine = a_head()
    rng = np.random.default_rng(0)
    data += {
        "rings": np.where(rng.random(data.shape) < 0.05, -9, 0),
        "noise": rng.normal(0, 4, data.shape),  # real-valued, 4 % of the bright level
        "magnitude": 0,
    }[kind]
    conformed = conform(write(tmp_path / "a.nii", data, affine), metadata={"SliceThickness": 5})
    assert "shift" not in conformed.facts["values"]
    np.testing.assert_array_equal(conformed.image.get_fdata(dtype=np.float32), data)


def test_outliers_far_below_an_image_without_a_zero_are_refused(tmp_path):
    data, affine = a_head()
    data -= 50
    data[20, 20, 6] = -30000
    with pytest.raises(InputError, match=r"some reach down to -30000.*Remove these outliers"):
        conform(write(tmp_path / "sub-01_T1w.nii", data, affine), metadata={})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((8, 8, 8), np.int16), "every voxel is 0"),
        (np.full((8, 8, 8), 17, np.int16), "every voxel is 17"),
        (1e16 * np.random.default_rng(0).random((8, 8, 8)), r"values up to 1e\+15, got .*export"),
        (np.full((8, 8, 8), np.nan, np.float32), "every voxel is NaN or infinite"),
        (np.ones((8, 8, 8, 12), np.int16), "got 12 volumes"),
        (np.ones((8, 8, 8, 1, 3), np.int16), "got 3 volumes"),
        (np.ones((64, 64, 1), np.int16), "at least 4 voxels along each axis"),
        (np.ones((64, 64), np.int16), "expected a 3-D volume"),
        (np.ones((8, 8, 8), np.complex64), "expected real scalar voxels"),
    ],
)
def test_what_is_no_scan_is_refused(tmp_path, data, message):
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "sub-01_T1w.nii.gz")
    with pytest.raises(InputError, match=message) as caught:
        conform(tmp_path / "sub-01_T1w.nii.gz", metadata={})
    assert str(caught.value).startswith("sub-01_T1w: ")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path, suffix, share):
    data, affine = a_scan(shape=(30, 30, 12))
    path = write(tmp_path / f"sub-01_T1w{suffix}", data, affine)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(InputError, match=r"sub-01_T1w: .*cannot be read") as caught:
        conform(path, metadata={})
    assert "\n" not in str(caught.value)  # one row of the status table, one line of the log


def test_files_that_are_not_nifti_are_refused(tmp_path):
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"no image here" * 100))
    with pytest.raises(InputError, match="cannot be read"):
        conform(tmp_path / "text.nii.gz", metadata={})
    nib.save(nib.MGHImage(np.ones((5, 5, 5), np.float32), np.eye(4)), tmp_path / "scan.mgz")
    with pytest.raises(InputError, match="expected a NIfTI file"):
        conform(tmp_path / "scan.mgz", metadata={})


def test_missing_file_and_unfetched_link(tmp_path):
    with pytest.raises(InputError, match="there is none at"):
        conform(tmp_path / "sub-01_T1w.nii.gz", metadata={})
    link = tmp_path / "sub-02_T1w.nii.gz"
    link.symlink_to(tmp_path / "annex" / "object")
    with pytest.raises(InputError, match="datalad get"):
        conform(link, metadata={})


def test_a_header_of_absurd_size_is_refused_before_it_is_read(tmp_path):
    data, affine = a_scan()
    path = write(tmp_path / "sub-01_T1w.nii", data, affine)
    raw = bytearray(path.read_bytes())
    raw[42:48] = np.array([30000, 30000, 30000], np.int16).tobytes()
    path.write_bytes(raw)
    with pytest.raises(InputError, match="more than a brain scan holds"):
        conform(path, metadata={})


def acquisition_of(tmp_path, zooms, metadata, *, thickness=None, dim_info=None):
    data, affine = a_scan(zooms=zooms, degrees=0)
    path = write(tmp_path / "sub-01_T2w.nii", data, affine)
    if dim_info is not None:
        image = nib.load(path, mmap=False)
        image.header.set_dim_info(slice=dim_info)
        nib.save(image, path)
    conformed = conform(path, metadata=metadata, slice_thickness_mm=thickness)
    return conformed.acquisition, conformed.facts["acquisition"], conformed.warnings


@pytest.mark.parametrize(
    ("zooms", "metadata", "axis", "thickness", "profile"),
    [
        ((1, 1, 5), {"SliceThickness": 4}, 2, 4, "trapezoid"),
        ((1, 5, 1), {"SliceThickness": 5}, 1, 5, "trapezoid"),
        ((6, 0.9, 0.9), {"SliceThickness": 5, "SpacingBetweenSlices": 6}, 0, 5, "trapezoid"),
        ((1, 1.33, 1.33), {"MRAcquisitionType": "3D"}, 0, 1, "boxcar"),
        ((1, 1.33, 1.33), {}, 0, 1, "boxcar"),
        ((1, 1, 1), {}, 2, 1, "boxcar"),
        ((1, 1, 1), {"SliceEncodingDirection": "j-"}, 1, 1, "boxcar"),
        ((1, 1, 1), {"SliceThickness": 2}, 2, 2, "trapezoid"),  # slices interpolated to half
        ((1.6, 1.6, 5), {"MRAcquisitionType": "3D"}, 2, 5, "trapezoid"),
        ((0.8, 0.9, 1.1), {}, 2, 1.1, "boxcar"),
    ],
)
def test_how_the_scan_was_made(tmp_path, zooms, metadata, axis, thickness, profile):
    acquisition, facts, warnings = acquisition_of(tmp_path, zooms, metadata)
    assert acquisition.slice_axis == axis
    assert acquisition.thickness_mm == pytest.approx(thickness, abs=1e-5)
    assert acquisition.spacing_mm == pytest.approx(zooms[axis], abs=1e-5)
    assert acquisition.profile == profile
    assert facts["gap_mm"] == pytest.approx(zooms[axis] - thickness, abs=1e-5)
    assert warnings == []


def test_dim_info_decides_for_isotropic_voxels_and_yields_to_thick_ones(tmp_path):
    acquisition, facts, warnings = acquisition_of(tmp_path, (1, 1, 1), {}, dim_info=0)
    assert (acquisition.slice_axis, facts["slice_axis_source"]) == (0, "header dim_info")
    acquisition, _, warnings = acquisition_of(
        tmp_path, (1, 1, 5), {"SliceThickness": 5}, dim_info=0
    )
    assert acquisition.slice_axis == 2
    assert any("names another slice axis" in w for w in warnings)


def test_the_slice_axis_can_be_given(tmp_path):
    data, affine = a_scan(zooms=(1, 1, 5), degrees=0)
    path = write(tmp_path / "sub-01_T2w.nii", data, affine)
    metadata = {"SliceThickness": 1}
    given = conform(path, metadata=metadata, slice_axis=0)
    assert given.acquisition.slice_axis == 0
    assert given.acquisition.spacing_mm == pytest.approx(1)
    assert given.facts["acquisition"]["slice_axis_source"] == "option"
    (warning,) = given.warnings
    assert "given as sagittal, but the voxels are largest across the axial planes" in warning
    agreed = conform(path, metadata={"SliceThickness": 5}, slice_axis=2)
    assert agreed.warnings == []


def test_missing_thickness_is_assumed_aloud(tmp_path):
    acquisition, facts, warnings = acquisition_of(tmp_path, (1, 1, 5), {})
    assert acquisition.thickness_mm == pytest.approx(5)
    assert facts["thickness_source"] == "header slice spacing"
    assert warnings == [
        "sub-01_T2w: no SliceThickness in any JSON; 5 mm assumed from the header's slice "
        "spacing. Pass --slice-thickness if that is wrong."
    ]


@pytest.mark.parametrize("value", ["5", -1, 0, float("nan"), [5], True])
def test_a_senseless_thickness_in_the_json_is_ignored_aloud(tmp_path, value):
    acquisition, _, warnings = acquisition_of(tmp_path, (1, 1, 5), {"SliceThickness": value})
    assert acquisition.thickness_mm == pytest.approx(5)
    assert any("SliceThickness must be a number above 0" in w for w in warnings)


def test_json_that_does_not_fit_the_header(tmp_path):
    acquisition, _, warnings = acquisition_of(
        tmp_path, (1, 1, 1), {"SliceThickness": 5, "SpacingBetweenSlices": 6}
    )
    assert acquisition.thickness_mm == pytest.approx(1)
    assert any("Was the image resampled?" in w for w in warnings)
    assert any("SpacingBetweenSlices is 6 mm in the JSON" in w for w in warnings)


def test_the_option_overrides_the_json(tmp_path):
    metadata = {"SliceThickness": 5}
    acquisition, facts, warnings = acquisition_of(tmp_path, (1, 1, 5), metadata, thickness=3.5)
    assert (acquisition.thickness_mm, facts["thickness_source"]) == (3.5, "option")
    assert warnings == []
    _, _, warnings = acquisition_of(tmp_path, (1, 1, 5), metadata, thickness=25)
    assert any("more than three times" in w for w in warnings)
    with pytest.raises(GeometryError, match="thickness_mm must be above 0"):
        acquisition_of(tmp_path, (1, 1, 5), metadata, thickness=0)


@pytest.mark.shared
def test_real_heads(shared_data):
    """Nine participants, T1w 1 x 1.33 x 1.33 mm and T2w 1.56 x 1.56 x 5 mm, stored LAS."""
    scans = sorted((shared_data / "heads").glob("sub-*/anat/*.nii.gz"))
    assert len(scans) == 18
    for path in scans:
        conformed = conform(path, metadata={})
        source = nib.load(path)
        np.testing.assert_array_equal(
            conformed.image.get_fdata(dtype=np.float32), source.get_fdata(dtype=np.float32)[::-1]
        )
        assert nib.aff2axcodes(conformed.image.affine) == ("R", "A", "S")
        acquisition = conformed.acquisition
        if path.name.endswith("_T1w.nii.gz"):
            assert (acquisition.slice_axis, acquisition.profile) == (0, "boxcar")
            assert conformed.warnings == []
        else:
            assert (acquisition.slice_axis, acquisition.thickness_mm) == (2, 5)
            assert [w for w in conformed.warnings if "no SliceThickness" not in w] == []
